"""What a row's gradient spectra cost, against PyTorch and against the least possible work.

  python -m benchmarks.spectra

Each way runs in a process of its own, on the same random weights and tokens in one shape:
`torch` as the paper's reference code does it (float32 autograd, `torch.linalg.svd` of every q, k,
v and o gradient, singular vectors included), `torch svdvals`, gradjax `dense` and `factored`, and
the `floor`: loss and input gradient alone by `jax.grad`, nothing recomputed, no spectra.
Times are the median of `--repeats` after a first run that compiles; memory is the process's peak
above what it held when weights and tokens were in place.
"""

import dataclasses
import json
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

WAYS = ("floor", "factored", "dense", "torch svdvals", "torch")

flags.DEFINE_integer("tokens", 256, "of the one row, half of them targets")
flags.DEFINE_integer("repeats", 3, "timed runs of each way, after one that is not timed")
flags.DEFINE_list("shapes", ["a", "b"], "a: Qwen2.5-0.5B; b: two layers at 7B width")
flags.DEFINE_string("one", None, "SHAPE,WAY: measure this in this process, print JSON (internal)")


@dataclasses.dataclass(frozen=True)
class Shape:
    """A Qwen2.5 decoder's sizes."""

    title: str
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    def torch_model(self) -> Any:
        """Random float32 weights of this shape in transformers."""
        import torch
        from transformers import Qwen2Config, Qwen2ForCausalLM

        torch.manual_seed(0)
        return Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=self.vocabulary,
                hidden_size=self.hidden,
                intermediate_size=self.mlp,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
                num_key_value_heads=self.kv_heads,
                tie_word_embeddings=True,
            )
        ).eval()

    def decoder(self) -> Any:
        """Random float32 weights of this shape in gradjax."""
        from gradjax.model.config import qwen2_config
        from gradjax.model.decoder import random_decoder

        config = qwen2_config(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            mlp_size=self.mlp,
            num_layers=self.layers,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            rope_theta=1e6,
        )
        return random_decoder(config, seed=0)


SHAPES = {
    "a": Shape("Qwen2.5-0.5B shape, 24 layers", 896, 4864, 24, 14, 2, 151_936),
    # The head is small: the slice is about the blocks.
    "b": Shape("two layers at 7B width", 3584, 18_944, 2, 28, 4, 2_048),
}


def row(shape: Shape, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens int32 [1, T], and targets bool [1, T]: the second half."""
    tokens = np.random.default_rng(0).integers(0, shape.vocabulary, (1, length), dtype=np.int32)
    return tokens, np.arange(length)[None] >= length // 2


def torch_way(shape: Shape, length: int, whole_svd: bool) -> Callable[[], Any]:
    """The reference code's computation of one row, without its bugs."""
    import torch

    model = shape.torch_model()
    tokens, targets = (torch.from_numpy(array) for array in row(shape, length))
    tokens = tokens.long()
    labels = torch.where(targets, tokens, -100)
    matrices = [
        getattr(layer.self_attn, f"{p}_proj").weight for layer in model.model.layers for p in "qkvo"
    ]

    def values(gradient: Any) -> Any:
        if whole_svd:
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
                x, _ = model.block_forward(config, block, x, rope, jnp.int32(length))
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
        return torch_way(shape, length, whole_svd=way == "torch")
    return floor_way(shape, length) if way == "floor" else gradjax_way(shape, length, way)


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


def main(_: list[str]) -> None:
    """Prints one table per shape."""
    values = flags.FLAGS
    if values.one:
        shape, way = values.one.split(",")
        print(json.dumps(measure(SHAPES[shape], way, values.tokens, values.repeats)))
        return
    for name in values.shapes:
        print(f"({name}) {SHAPES[name].title}, T={values.tokens}, float32, one row")
        print(f"{'':14}{'seconds':>9}{'of floor':>10}{'torch /':>9}{'peak GiB':>10}")
        found = {}
        for way in WAYS:
            command = [sys.executable, "-m", "benchmarks.spectra", f"--one={name},{way}"]
            sizes = [f"--tokens={values.tokens}", f"--repeats={values.repeats}"]
            output = subprocess.run(command + sizes, stdout=subprocess.PIPE, check=True, text=True)
            found[way] = json.loads(output.stdout.splitlines()[-1])
        for way, result in found.items():
            against_floor = result["seconds"] / found["floor"]["seconds"]
            against_torch = found["torch"]["seconds"] / result["seconds"]
            print(
                f"{way:14}{result['seconds']:9.2f}{against_floor:9.2f}×{against_torch:8.1f}×"
                f"{result['bytes'] / 2**30:10.2f}"
            )


if __name__ == "__main__":
    start(main)
