"""What the host does for a row beside the model's passes, and how many cores it can keep busy.

  python -m benchmarks.cores

Random factors stand in for the model: 28 layers of q, k, v and o (112 matrices a row), everything
behind them as in a run: decompositions on pools of 1 to 16 threads, the rows' numbers and objects
in one thread, shards by a writer. The matrices are small, so that locks would show. What one
thread takes for a row (`main`, `writer`) bounds the rows per second of any number of cores.
"""

import tempfile
import time
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import numpy as np
from absl import flags

from gradjax.cli.app import start
from gradjax.config import SpectraConfig
from gradjax.data.batches import BatchSpec
from gradjax.device import local_device
from gradjax.model.config import DecoderConfig, qwen2_config
from gradjax.runs.compute import compute_results
from gradjax.runs.progress import BackgroundWriter, shards
from gradjax.sharding import one_device
from gradjax.storage.store import Store, open_store
from gradjax.structs import ATTENTION, Example, ExampleResult, Factors, TokenizedExample

WORKERS = (1, 2, 4, 8, 16)
LAYERS = 28

flags.DEFINE_integer("tokens", 64, "of a row")
flags.DEFINE_integer("width", 64, "rows and columns of a gradient")
flags.DEFINE_integer("size", 32, "rows of a batch: what 2,048 tokens hold")
flags.DEFINE_integer("rows", 128, "measured with each number of workers")


def random_factors(size: int, tokens: int, width: int) -> Factors:
    """Factors of a layer, [size, tokens, width]."""
    names = ("x_qkv", "x_o", *ATTENTION)
    keys = jax.random.split(jax.random.key(0), len(names))
    arrays = (jax.random.normal(key, (size, tokens, width)) for key in keys)
    return Factors(**dict(zip(names, arrays, strict=True)))


def stand_in(factors: Factors, *_: Any, **__: Any) -> tuple[jax.Array, Iterator[Any]]:
    """In place of `layer_factors`: losses, and factors layer by layer from the top."""
    losses = jax.numpy.zeros(factors.batch_shape[0])
    return losses, ((layer, factors) for layer in reversed(range(LAYERS)))


def model_config(width: int) -> DecoderConfig:
    """Of a decoder whose gradients are square."""
    return qwen2_config(
        vocab_size=32,
        hidden_size=width,
        mlp_size=width,
        num_layers=LAYERS,
        num_heads=1,
        num_kv_heads=1,
        rope_theta=1e6,
    )


class TimedStore:
    """A store that counts the CPU seconds of its `append`, in the thread that calls it."""

    def __init__(self, store: Store):
        self.store = store
        self.seconds = 0.0

    def append(self, shard: list[ExampleResult], *, singular_values: bool) -> None:
        """As of `Store`."""
        started = time.thread_time()
        self.store.append(shard, singular_values=singular_values)
        self.seconds += time.thread_time() - started


def measure(workers: int, rows: int, size: int, tokens: int, width: int) -> tuple[float, ...]:
    """Rows per second; CPU milliseconds a row of the main thread, the writer and all threads."""
    row = TokenizedExample(Example("row", 0, ""), np.zeros(tokens, np.int32), np.ones(tokens, bool))
    specs = [BatchSpec(tuple(range(size)), tokens, size)] * (rows // size)
    table = SimpleNamespace(dtype=np.dtype(np.float32))
    model: Any = SimpleNamespace(mesh=one_device(), config=model_config(width), embedding=table)
    device = local_device()
    factors = partial(stand_in, random_factors(size, tokens, width))
    with (
        mock.patch("os.sched_getaffinity", return_value=range(workers)),
        mock.patch("gradjax.spectra.batch.layer_factors", factors),
        tempfile.TemporaryDirectory() as directory,
        open_store(directory, {}) as store,
    ):
        store.write_manifest({"settings": {}})
        timed: Any = TimedStore(store)
        list(compute_results(model, [row] * size, SpectraConfig(), specs[:1], device))  # compiles
        started, main, threads = time.perf_counter(), time.thread_time(), time.process_time()
        with BackgroundWriter(timed, singular_values=True) as writer:
            found = compute_results(model, [row] * size, SpectraConfig(), specs, device)
            for shard in shards(found):
                writer.append(shard)
        seconds = time.perf_counter() - started
        cpu = (time.thread_time() - main, timed.seconds, time.process_time() - threads)
    return rows / seconds, *(1e3 * part / rows for part in cpu)


def main(_: list[str]) -> None:
    """Prints one line per number of workers."""
    values = flags.FLAGS
    print(f"{values.rows} rows of {values.tokens} tokens, {LAYERS * 4} matrices each")
    print(f"{'workers':>7}{'rows/s':>9}{'main ms':>10}{'writer ms':>11}{'all ms':>9}")
    for workers in WORKERS:
        found = measure(workers, values.rows, values.size, values.tokens, values.width)
        rate, main_ms, writer_ms, all_ms = found
        print(f"{workers:7}{rate:9.1f}{main_ms:10.2f}{writer_ms:11.2f}{all_ms:9.2f}")


if __name__ == "__main__":
    start(main)
