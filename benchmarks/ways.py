"""Ways through one batch, and how long, how large and how exact each is on this device.

Two floors: `grad` is plain `jax.grad` of the loss with respect to the input embeddings, `pass`
gradjax's own backward pass with the factors thrown away. `entries` measures all but singular
values. `gram` decomposes on the device, `qr` makes cores there whose values the host takes, `host`
sends factors to LAPACK on the host's cores while the device goes on, and `dense` is
`jnp.linalg.svd` of whole gradients.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.memory import PeakMemory, anonymous_memory
from gradjax.config import SpectraConfig
from gradjax.data.batches import BatchSpec
from gradjax.device import local_device
from gradjax.gradients.causality import Contributing
from gradjax.gradients.factored import layer_factors
from gradjax.model import decoder as model
from gradjax.model import layers
from gradjax.model.decoder import Decoder
from gradjax.model.parameters import block_parameters
from gradjax.runs.cost import fitting_memory
from gradjax.sharding import place_examples
from gradjax.spectra import measures
from gradjax.spectra.batch import BatchConfig, batch_spectra
from gradjax.spectra.decompose import Decompose, Formed, Values, decomposer
from gradjax.structs import ATTENTION, Factors, Projection, TokenBatch

FLOORS = ("pass", "grad")
SPECTRA = ("gram", "qr", "host", "dense")
WAYS = (*FLOORS, "entries", *SPECTRA)
PROFILED_BATCHES = 4

# Starts on a batch; the returned call waits for its results.
Start = Callable[[], Callable[[], object]]


class NotMeasuredError(Exception):
    """Why a figure is missing although nothing failed."""


def random_batch(decoder: Decoder, rows: int, length: int) -> TokenBatch:
    """Rows of random tokens, the second half of each its targets."""
    shape = (rows, length)
    tokens = np.random.default_rng(0).integers(0, decoder.config.vocab_size, shape, np.int32)
    targets = np.broadcast_to(np.arange(length) >= length // 2, shape)
    return TokenBatch(tuple(range(rows)), tokens, targets, np.full(rows, length, np.int32))


def settings(
    decoder: Decoder, batch: TokenBatch, decompose: Decompose | None = None
) -> BatchConfig:
    """What `gradjax spectra` measures by default, with activations kept where it keeps them."""
    rows, length = batch.tokens.shape
    plan, config = BatchSpec(batch.rows, length, rows), decoder.config
    itemsize = decoder.embedding.dtype.itemsize
    sizes = dict(decoder.mesh.shape)
    _, keep = fitting_memory(config, SpectraConfig(), plan, itemsize, sizes, local_device())
    every = tuple(range(config.num_layers))
    return BatchConfig(every, ATTENTION, "adjacent", decompose, keep)


@contextmanager
def starting(way: str, decoder: Decoder, batch: TokenBatch) -> Iterator[Start]:
    """One of `WAYS` on a batch."""
    if way == "grad":
        yield _plain_gradient(decoder, batch)
    elif way == "pass":
        yield partial(_factored_pass, decoder, batch, settings(decoder, batch))
    else:
        with _decomposing(way, decoder) as decompose:
            yield partial(batch_spectra, decoder, batch, settings(decoder, batch, decompose))


@contextmanager
def _decomposing(way: str, decoder: Decoder) -> Iterator[Decompose | None]:
    if way in ("dense", "entries"):
        yield _ones if way == "entries" else None
        return
    route = "qr" if way == "qr" else "gram"
    with decomposer(route, ATTENTION, decoder.mesh, on_host=way == "host") as decompose:
        yield decompose


def _ones(_: Factors, __: Formed, contributing: Contributing) -> Callable[[], Values]:
    """Stands in for singular values."""
    return lambda: {p: [np.ones(1)] * len(mask) for p, mask in contributing.items()}


def _factored_pass(
    decoder: Decoder, batch: TokenBatch, settings: BatchConfig
) -> Callable[[], object]:
    place = partial(place_examples, decoder.mesh)
    losses, stream = layer_factors(
        decoder,
        place(batch.tokens),
        place(batch.targets),
        keep_activations=settings.keep_activations,
    )
    jax.block_until_ready((losses, _last(stream)))
    return lambda: losses


def _last(stream: Iterator[tuple[int, Factors]]) -> Factors:
    """The factors of the lowest layer, each one above dropped when the next is there."""
    ((_, factors),) = deque(stream, maxlen=1)
    return factors


def _plain_gradient(decoder: Decoder, batch: TokenBatch) -> Start:
    config = decoder.config
    length = batch.tokens.shape[1]
    first = length // 2

    @jax.jit
    def gradient(decoder: Decoder, x: jax.Array, tokens: jax.Array) -> Any:
        def loss(x: jax.Array) -> jax.Array:
            rope = layers.rope_tables(config, length)
            windows = model.layer_windows(config, length)
            for block, window in zip(decoder.blocks, windows, strict=True):
                x, _ = model.block_forward(config, block, x, rope, window)
            scores = model.project_logits(
                config, decoder.final_norm[...], decoder.output_table, x[:, first - 1 : -1]
            )
            return model.token_losses(scores, tokens[:, first:]).mean(axis=1).sum()

        return jax.value_and_grad(loss)(x)

    tokens = jnp.asarray(batch.tokens)
    x = model.embed(config, decoder.embedding[...], tokens)

    def start() -> Callable[[], object]:
        found = jax.block_until_ready(gradient(decoder, x, tokens))
        return lambda: found

    return start


def measure(
    way: str, decoder: Decoder, batch: TokenBatch, repeats: int, deadline: float, held: int
) -> dict[str, Any]:
    """Seconds per batch (median) and its peak memory, in bytes above `held` (`memory_in_use`).

    As in a run, a batch is started before the one before it is waited for; `first_seconds` is of
    the first, which compiles, `cpu_seconds` of the process's threads on the host's cores. Fewer
    repeats fit where `deadline` (of `time.time`) comes before.

    Raises:
      NotMeasuredError: if the deadline has passed.
    """
    with peak_memory(held) as memory, starting(way, decoder, batch) as start:
        began = time.perf_counter()
        start()()
        first_seconds = time.perf_counter() - began
        seconds: list[float] = []
        cpu_seconds: list[float] = []
        waiting = start()
        while len(seconds) < repeats and time.time() + max(seconds, default=0) < deadline:
            began, cpu_began = time.perf_counter(), time.process_time()
            following = start()
            waiting()
            waiting = following
            seconds.append(time.perf_counter() - began)
            cpu_seconds.append(time.process_time() - cpu_began)
        waiting()
    if not seconds:
        raise NotMeasuredError("the time budget was used up")
    return {
        "seconds": statistics.median(seconds),
        "fastest_seconds": min(seconds),
        "slowest_seconds": max(seconds),
        "cpu_seconds": statistics.median(cpu_seconds),
        "repeats": len(seconds),
        "first_seconds": first_seconds,
        "recomputes": way != "grad" and not settings(decoder, batch).keep_activations,
    } | memory


def memory_in_use() -> int:
    """Bytes held on the device, or by this process where that is not known."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_in_use", anonymous_memory())


@contextmanager
def peak_memory(held: int) -> Iterator[dict[str, Any]]:
    """Fills a dict with the peak of device memory, or of the process's where that is not known.

    `peak_bytes` is above `held`. A device's peak is that since the process began: with
    `peak_is_older` nothing more was used than by earlier work.
    """
    memory: dict[str, Any] = {}
    device = jax.local_devices()[0]
    before = (device.memory_stats() or {}).get("peak_bytes_in_use")
    with PeakMemory() as peak:
        yield memory
    if before is None:
        memory["peak_bytes"] = peak.bytes - held
    else:
        after = (device.memory_stats() or {})["peak_bytes_in_use"]
        memory |= {"peak_bytes": after - held, "peak_is_older": after == before}


def expected_dense_seconds(decoder: Decoder) -> tuple[float, float]:
    """Seconds of one SVD of a q gradient, and of all of an example by their operations."""
    table = block_parameters(decoder.config, layer=0)
    shapes = {projection: sorted(table[projection].shape(decoder.config)) for projection in "qkvo"}
    matrix = jax.random.normal(jax.random.key(0), shapes["q"], jnp.float32)
    values = jax.jit(partial(jnp.linalg.svd, compute_uv=False))
    jax.block_until_ready(values(matrix))
    began = time.perf_counter()
    jax.block_until_ready(values(matrix))
    one = time.perf_counter() - began
    work = {projection: low**2 * high for projection, (low, high) in shapes.items()}
    return one, one * decoder.config.num_layers * sum(work.values()) / work["q"]


def largest_errors(
    way: str, decoder: Decoder, batch: TokenBatch, reference_file: Path
) -> dict[str, float]:
    """Largest relative errors against float64 over the projections of one layer.

    The factors are those of the batch's first example in the middle layer, in every slot. They
    are in `reference_file` with their exact singular values, made here if not there yet.
    """
    if not reference_file.exists():
        _make_reference(decoder, batch, reference_file)
    rows = len(batch.rows)
    with np.load(reference_file) as reference:
        exact = {p: reference[f"exact_{p}"] for p in ATTENTION}
        names = ("x_qkv", "x_o", *ATTENTION)
        whole = {name: np.repeat(reference[name], rows, axis=0) for name in names}
    dtype = decoder.embedding.dtype
    factors = Factors(
        **{n: place_examples(decoder.mesh, array.astype(dtype)) for n, array in whole.items()}
    )
    real: np.ndarray = np.arange(batch.tokens.shape[1]) < batch.lengths[:, None]
    every: Contributing = dict.fromkeys(ATTENTION, real)
    found = _values(way, decoder, factors, every)
    return {
        name: max(
            abs(float(measure(values) / measure(exact[projection])) - 1)
            for projection in ATTENTION
            for values in found[projection]
        )
        for name, measure in (
            ("nuclear_norm_error", measures.nuclear_norm),
            ("effective_rank_error", measures.effective_rank),
        )
    }


def _values(way: str, decoder: Decoder, factors: Factors, contributing: Contributing) -> Values:
    unit, scales = measures.form_gradients(factors, ATTENTION)
    with _decomposing(way, decoder) as decompose:
        if decompose:
            return decompose(factors, (unit, scales), contributing)()
    decompose_all = jax.jit(partial(jnp.linalg.svd, compute_uv=False))
    return {
        p: list(np.asarray(decompose_all(unit[p])) * np.asarray(scales[p])[:, None]) for p in unit
    }


def _make_reference(decoder: Decoder, batch: TokenBatch, file: Path) -> None:
    place = partial(place_examples, decoder.mesh)
    middle = (decoder.config.num_layers - 1) // 2
    tokens, targets = place(batch.tokens), place(batch.targets)
    keep = settings(decoder, batch).keep_activations
    _, stream = layer_factors(decoder, tokens, targets, lowest_layer=middle, keep_activations=keep)
    factors = _last(stream)
    names = ("x_qkv", "x_o", *ATTENTION)
    arrays: dict[str, Any] = {
        n: np.asarray(getattr(factors, n)[:1].astype(jnp.float32)) for n in names
    }
    exact: dict[str, Any] = {f"exact_{p}": exact_values(*_pair(arrays, p)) for p in ATTENTION}
    with file.open("wb") as opened:
        np.savez(opened, **arrays, **exact)


def _pair(arrays: dict[str, np.ndarray], projection: Projection) -> tuple[np.ndarray, np.ndarray]:
    return arrays["x_o" if projection == "o" else "x_qkv"][0], arrays[projection][0]


def exact_values(x: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """Singular values of `ΔᵀX` in float64, [min(T, O, I)]: SVD of what QR leaves of the factors."""
    return np.linalg.svd(_core(delta).T @ _core(x), compute_uv=False)


def _core(factor: np.ndarray) -> np.ndarray:
    """A factor [T, n] in float64, of T < n only its coordinates on an orthonormal basis."""
    factor = factor.astype(np.float64)
    if len(factor) >= factor.shape[1]:
        return factor
    return np.asarray(np.linalg.qr(factor.T, mode="r")).T
