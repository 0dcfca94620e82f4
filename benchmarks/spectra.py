"""What a row's gradient spectra cost, against PyTorch and against the least possible work.

  python -m benchmarks.spectra
  python -m benchmarks.spectra --shapes=c --tokens=256,1024,2048,4096

Each way runs in a process of its own, on random weights and tokens of one shape:

  torch             the paper's reference code: autograd, `torch.linalg.svd` of every q, k, v and o
                    gradient, singular vectors included
  torch svdvals     the same with singular values alone
  torch pass        forward and the cotangents of activations alone, no weight gradients: what a
                    framework that knows nothing of spectra takes for gradjax's `factors`
  dense             gradjax, whole gradients
  factored          gradjax, all that `gradjax spectra` measures
  factors           gradjax, factors computed and thrown away
  floor             loss and input gradient alone by `jax.grad`, nothing recomputed, no spectra
  limit             not a run: products of the passes (4 per weight and token, targets' logits) and
                    causal attention at the rate of this machine's best matrix product

Times are the median of `--repeats` after a first run that compiles; memory is the process's peak
above what it held when weights and tokens were in place. Other work on the machine slows the ways
unequally: run it alone; the load average before each table says whether it was.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import flags

from benchmarks.memory import PeakMemory, anonymous_memory
from gradjax.cli.app import start

WAYS = ("floor", "factors", "factored", "dense", "torch pass", "torch svdvals", "torch")

flags.DEFINE_list("tokens", ["256"], "of the one row, half of them targets; a table for each")
flags.DEFINE_integer("repeats", 3, "timed runs of each way, after one that is not timed")
flags.DEFINE_list(
    "shapes", ["a", "b", "c"], "a: Qwen2.5-0.5B; b: two layers at 7B width; c: SmolLM2-135M"
)
flags.DEFINE_list("ways", list(WAYS), "some of them, separated by commas")
flags.DEFINE_string("one", None, "SHAPE,WAY: measure this in this process, print JSON (internal)")


@dataclasses.dataclass(frozen=True)
class Shape:
    """A decoder's sizes: Qwen2.5, or Llama (no biases)."""

    title: str
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    family: str = "qwen2"

    def torch_model(self) -> Any:
        """Random float32 weights of this shape in transformers."""
        import torch
        import transformers

        torch.manual_seed(0)
        name = {"qwen2": "Qwen2", "llama": "Llama"}[self.family]
        config = getattr(transformers, f"{name}Config")(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            tie_word_embeddings=True,
        )
        return getattr(transformers, f"{name}ForCausalLM")(config).eval()

    def config(self) -> Any:
        """The same sizes in gradjax."""
        from gradjax.model.config import qwen2_config

        config = qwen2_config(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            mlp_size=self.mlp,
            num_layers=self.layers,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            rope_theta=1e6,
        )
        return dataclasses.replace(config, family=self.family, qkv_bias=self.family == "qwen2")

    def decoder(self) -> Any:
        """Random float32 weights of this shape in gradjax."""
        from gradjax.model.decoder import random_decoder

        return random_decoder(self.config(), seed=0)

    def flops(self, length: int) -> float:
        """Multiplications and additions of the least work: passes, causal attention, logits."""
        from gradjax.config import SpectraConfig
        from gradjax.data.batches import BatchSpec
        from gradjax.runs.cost import batch_flops

        config = self.config()
        passes = batch_flops(config, SpectraConfig(), BatchSpec((0,), length, 1), True)
        gradients = 4 * length * self.layers * self.hidden**2 * (1 + self.kv_heads / self.heads)
        return passes - gradients + 4 * self.vocabulary * self.hidden * (length - length // 2)


SHAPES = {
    "a": Shape("Qwen2.5-0.5B shape, 24 layers", 896, 4864, 24, 14, 2, 151_936),
    # The head is small: the slice is about the blocks.
    "b": Shape("two layers at 7B width", 3584, 18_944, 2, 28, 4, 2_048),
    "c": Shape("SmolLM2-135M shape, 30 layers", 576, 1536, 30, 9, 3, 49_152, "llama"),
}


def row(shape: Shape, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens int32 [1, T], and targets bool [1, T]: the second half."""
    tokens = np.random.default_rng(0).integers(0, shape.vocabulary, (1, length), dtype=np.int32)
    return tokens, np.arange(length)[None] >= length // 2


def torch_way(shape: Shape, length: int, way: str) -> Callable[[], Any]:
    """The reference code's computation of one row, without its bugs; or its passes alone."""
    import torch

    model = shape.torch_model()
    tokens, targets = (torch.from_numpy(array) for array in row(shape, length))
    tokens = tokens.long()
    labels = torch.where(targets, tokens, -100)
    matrices = [
        getattr(layer.self_attn, f"{p}_proj").weight for layer in model.model.layers for p in "qkvo"
    ]

    if way == "torch pass":
        model.requires_grad_(False)
        x = model.model.embed_tokens(tokens).requires_grad_()
        return lambda: torch.autograd.grad(model(inputs_embeds=x, labels=labels).loss, x)

    def values(gradient: Any) -> Any:
        if way == "torch":
            return torch.linalg.svd(gradient, full_matrices=False)[1]
        return torch.linalg.svdvals(gradient)

    def work() -> list[Any]:
        model.zero_grad()
        model(tokens, labels=labels).loss.backward()
        return [values(matrix.grad) for matrix in matrices]

    return work


def gradjax_way(shape: Shape, length: int, spectrum: str) -> Callable[[], Any]:
    """`compute_results` on one row: everything that `gradjax spectra` measures."""
    from gradjax.config import SpectraConfig
    from gradjax.device import local_device
    from gradjax.runs.compute import compute_results
    from gradjax.runs.layout import batch_rows
    from gradjax.structs import Example, TokenizedExample

    decoder = shape.decoder()
    tokens, targets = row(shape, length)
    tokenized = [TokenizedExample(Example("row", 0, ""), tokens[0], targets[0])]
    config = SpectraConfig(spectrum=spectrum)  # pyright: ignore[reportArgumentType]
    device = local_device()
    plans = batch_rows(tokenized, config, decoder.config, device)
    return lambda: list(compute_results(decoder, tokenized, config, plans, device))


def factors_way(shape: Shape, length: int) -> Callable[[], Any]:
    """The factors of every layer, as `factored` takes them, dropped one by one."""
    from benchmarks.ways import random_batch, starting

    decoder = shape.decoder()
    batch = random_batch(decoder, rows=1, length=length)

    def work() -> Any:
        with starting("pass", decoder, batch) as begin:
            return begin()()

    return work


def floor_way(shape: Shape, length: int) -> Callable[[], Any]:
    """Forward and input-gradient backward by plain `jax.grad`, logits of targets alone."""
    import jax
    import jax.numpy as jnp

    from gradjax.model import decoder as model
    from gradjax.model import layers

    decoder = shape.decoder()
    config = decoder.config
    tokens = jnp.asarray(row(shape, length)[0])
    first = length // 2

    @jax.jit
    def work(decoder: Any, x: jax.Array) -> Any:
        def loss(x: jax.Array) -> jax.Array:
            rope = layers.rope_tables(config, length)
            for block in decoder.blocks:
                x, _ = model.block_forward(config, block, x, rope, None)
            scores = model.project_logits(
                config, decoder.final_norm[...], decoder.output_table, x[0, first - 1 : -1]
            )
            return model.token_losses(scores, tokens[0, first:]).mean()

        return jax.value_and_grad(loss)(x)

    x = model.embed(config, decoder.embedding[...], tokens)
    return lambda: jax.block_until_ready(work(decoder, x))


def make(shape: Shape, way: str, length: int) -> Callable[[], Any]:
    """The work of one way, weights in place."""
    if way.startswith("torch"):
        return torch_way(shape, length, way)
    own = {"floor": floor_way, "factors": factors_way}
    return own[way](shape, length) if way in own else gradjax_way(shape, length, way)


def measure(shape: Shape, way: str, length: int, repeats: int) -> dict[str, float]:
    """Median seconds and peak bytes above the weights."""
    work = make(shape, way, length)
    before = anonymous_memory()
    seconds = []
    with PeakMemory() as peak:
        for _ in range(repeats + 1):
            started = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - started)
    return {"seconds": statistics.median(seconds[1:]), "bytes": peak.bytes - before}


def best_rate() -> float:
    """Multiplications and additions per second of the fastest of a few float32 products."""
    from gradjax.runs.cost import measured_rate

    return max(measured_rate("float32") for _ in range(3))


def print_table(name: str, length: int) -> None:
    """One shape at one length: every way, and its ratio to the passes and to the reference."""
    values = flags.FLAGS
    load = os.getloadavg()[0]
    print(f"({name}) {SHAPES[name].title}, T={length}, float32, one row; load average {load:.1f}")
    print(
        f"{'':14}{'seconds':>9}{'of floor':>10}{'of torch pass':>15}{'torch /':>9}{'peak GiB':>10}"
    )
    found = {}
    for way in values.ways:
        command = [sys.executable, "-m", "benchmarks.spectra", f"--one={name},{way}"]
        sizes = [f"--tokens={length}", f"--repeats={values.repeats}"]
        output = subprocess.run(command + sizes, stdout=subprocess.PIPE, check=True, text=True)
        found[way] = json.loads(output.stdout.splitlines()[-1])
    found["limit"] = {"seconds": SHAPES[name].flops(length) / best_rate(), "bytes": 0}

    def ratio(above: float | None, below: float | None, width: int) -> str:
        return f"{above / below:{width - 1}.2f}×" if above and below else " " * width

    seconds = {way: result["seconds"] for way, result in found.items()}
    for way, result in found.items():
        print(
            f"{way:14}{seconds[way]:9.2f}{ratio(seconds[way], seconds.get('floor'), 10)}"
            f"{ratio(seconds[way], seconds.get('torch pass'), 15)}"
            f"{ratio(seconds.get('torch'), seconds[way], 9)}{result['bytes'] / 2**30:10.2f}",
            flush=True,
        )


def main(_: list[str]) -> None:
    """Prints one table per shape and length."""
    values = flags.FLAGS
    if values.one:
        shape, way = values.one.split(",")
        print(json.dumps(measure(SHAPES[shape], way, int(values.tokens[0]), values.repeats)))
        return
    for name in values.shapes:
        for length in values.tokens:
            print_table(name, int(length))


if __name__ == "__main__":
    start(main)
