"""TokenBatch -> each row's loss, spectra and cosines.

Both paths, factored and dense, become one stream of layers; what is measured on a layer is
written once.
"""

import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gradjax.gradients.causality import Contributing, contributing_tokens
from gradjax.gradients.dense import dense_gradients
from gradjax.gradients.factored import layer_factors, mask_factors
from gradjax.model.decoder import Decoder, layer_windows
from gradjax.sharding import EXAMPLES, local_examples, local_slots, place_examples
from gradjax.spectra import measures
from gradjax.spectra.decompose import Decompose, Values, cut_values
from gradjax.structs import SAME_LAYER_PAIRS, Projection, Similarity, Spectrum, TokenBatch

# Layers whose spectra may still be in the making: bounds the factors that are alive.
LAYERS_AHEAD = 2
_PAIR = ("kind", "projection", "layer_a", "layer_b")  # fields of `Similarity` but the cosine


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """What to measure. `layers` ascending; `decompose` None takes the dense path."""

    layers: tuple[int, ...]
    projections: tuple[Projection, ...]
    similarity: str  # which layer pairs: adjacent, all or none
    decompose: Decompose | None
    keep_activations: bool = True
    dense_chunk: int = 1  # examples vmapped at a time on the dense path


@dataclasses.dataclass(frozen=True)
class RowSpectra:
    """One row's results; `finite` is false where any number is NaN or infinite."""

    row: int  # as in the batch's `rows`
    loss: float
    finite: bool
    spectra: tuple[Spectrum, ...]
    similarity: tuple[Similarity, ...]


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A batch's gradients in one layer, as unit-scaled matrices, and their values to come."""

    index: int
    gradients: measures.Gradients
    scales: dict[Projection, jax.Array]
    wait_for_values: Callable[[], Values]


@dataclasses.dataclass(frozen=True)
class _Measured:
    """What remains of a layer once its matrices are gone."""

    index: int
    entries: dict[str, measures.Measures]
    wait_for_values: Callable[[], Values]


def batch_spectra(
    model: Decoder, batch: TokenBatch, settings: BatchConfig
) -> Callable[[], list[RowSpectra]]:
    """Starts on a batch; the returned call waits for its losses, spectra and cosines.

    They are those of the rows that this process's devices hold, in order. Layers ascend,
    projections are in the settings' order, and same-layer pairs come before layer pairs. Numbers
    are float64 of float32 measurements; singular values come as their route gives them.
    """
    stream = _factored_layers if settings.decompose else _dense_layers
    losses, layers = stream(model, batch, settings)

    measured: deque[_Measured] = deque()
    cosines: list[tuple[Similarity, jax.Array]] = []  # a pair without, and each row's cosine
    kept: list[_Layer] = []  # layers that later (lower) ones are compared with
    for layer in layers:
        entries = measures.entry_measures(layer.gradients, layer.scales)
        for a, b in SAME_LAYER_PAIRS:
            if a in layer.gradients and b in layer.gradients:
                pair = Similarity("same_layer", f"{a}-{b}", layer.index, layer.index, None)
                cosines.append((pair, measures.cosine(layer.gradients[a], layer.gradients[b])))
        if settings.similarity == "adjacent":
            kept = [other for other in kept if other.index == layer.index + 1]
        for other in kept:
            for projection in settings.projections:
                pair = Similarity("cross_layer", projection, layer.index, other.index, None)
                both = (layer.gradients[projection], other.gradients[projection])
                cosines.append((pair, measures.cosine(*both)))
        if settings.similarity != "none":
            kept.append(layer)
        measured.appendleft(_Measured(layer.index, entries, layer.wait_for_values))
        if len(measured) > LAYERS_AHEAD:
            measured[LAYERS_AHEAD].wait_for_values()
    return partial(_rows, model.mesh, batch, losses, measured, cosines, settings)


def _factored_layers(
    model: Decoder, batch: TokenBatch, settings: BatchConfig
) -> tuple[jax.Array, Iterator[_Layer]]:
    assert settings.decompose is not None
    decompose, place = settings.decompose, partial(place_examples, model.mesh)
    contributing = _contributing(model, batch)
    losses, layers = layer_factors(
        model,
        place(batch.tokens),
        place(batch.targets),
        settings.projections,
        min(settings.layers),
        keep_activations=settings.keep_activations,
    )

    def stream() -> Iterator[_Layer]:
        for index, factors in layers:
            if index in settings.layers:
                tokens = contributing[index]
                masks = {p: place(tokens[p]) for p in settings.projections}
                factors = mask_factors(factors, masks)
                unit, scales = measures.form_gradients(factors, settings.projections)
                wait = decompose(factors, (unit, scales), _own_rows(model.mesh, tokens))
                yield _Layer(index, unit, scales, wait)

    return losses, stream()


def _dense_layers(
    model: Decoder, batch: TokenBatch, settings: BatchConfig
) -> tuple[jax.Array, Iterator[_Layer]]:
    place = partial(place_examples, model.mesh)
    contributing = _contributing(model, batch)
    losses, gradients = dense_gradients(
        model,
        place(batch.tokens),
        place(batch.targets),
        settings.layers,
        settings.projections,
        settings.dense_chunk,
    )

    def stream() -> Iterator[_Layer]:
        for index in reversed(settings.layers):
            tokens = contributing[index]
            # A gradient that no token contributes to is zero, and not its rounding errors.
            some = {
                p: place(np.any(tokens[p], axis=1, keepdims=True)) for p in settings.projections
            }
            matrices = {
                p: jnp.where(some[p][..., None], g.astype(jnp.float32), 0)
                for p, g in gradients[index].items()
            }
            values = {p: dense_singular_values(model.mesh, g) for p, g in matrices.items()}
            unit, scales = measures.unit_scaled(matrices)
            wait = partial(_fetch, values, _own_rows(model.mesh, tokens))
            yield _Layer(index, unit, scales, wait)

    return losses, stream()


def _contributing(model: Decoder, batch: TokenBatch) -> list[Contributing]:
    windows = layer_windows(model.config, batch.tokens.shape[1])
    return contributing_tokens(batch.targets, windows)


def _own_rows(mesh: Mesh, contributing: Contributing) -> Contributing:
    """Those of this process's examples."""
    return {p: mask[local_slots(mesh, len(mask))] for p, mask in contributing.items()}


def _fetch(values: dict[Projection, jax.Array], contributing: Contributing) -> Values:
    fetched: Values = {p: list(local_examples(array)) for p, array in values.items()}
    return cut_values(fetched, contributing)


@partial(jax.jit, static_argnums=0)
def dense_singular_values(mesh: Mesh, gradients: jax.Array) -> jax.Array:
    """Singular values [B, R] of whole gradients [B, O, I], each device's of its own examples."""

    def own(gradients: jax.Array) -> jax.Array:
        # One example at a time: a batched decomposition can deadlock on jax 0.10.2's CPU.
        return jax.lax.map(lambda g: jnp.linalg.svd(g, compute_uv=False), gradients)

    # On a TPU the decomposition is made of JAX's loops, whose carries fail that check.
    on_mesh = jax.shard_map(own, mesh=mesh, in_specs=EXAMPLES, out_specs=EXAMPLES, check_vma=False)
    return on_mesh(gradients)


def _rows(
    mesh: Mesh,
    batch: TokenBatch,
    losses: jax.Array,
    measured: deque[_Measured],
    cosines: list[tuple[Similarity, jax.Array]],
    settings: BatchConfig,
) -> list[RowSpectra]:
    """Per-layer arrays over the batch, turned into per-row results.

    Numbers are worked out for all rows and layers of a projection at once: one Python thread has
    to keep up with all cores.
    """
    slots = local_slots(mesh, len(batch.lengths))
    rows = [batch.rows[slot] for slot in slots if slot < len(batch.rows)]  # no filler
    if not rows:
        return []
    loss = local_examples(losses)[: len(rows)].astype(np.float64)
    finite = np.isfinite(loss)
    values = [layer.wait_for_values() for layer in measured]
    layers = [layer.index for layer in measured]
    by_projection = []
    for projection in settings.projections:
        own = [layer[projection][: len(rows)] for layer in values]
        numbers = _numbers(own, [layer.entries[projection] for layer in measured])
        for name in ("nuclear_norm", "mean", "max", "min"):
            finite &= np.isfinite(numbers[name]).all(axis=0)
        by_projection.append(_spectra(projection, layers, own, numbers))

    order = {"same_layer": 0, "cross_layer": 1}
    cosines = sorted(
        cosines, key=lambda item: (order[item[0].kind], item[0].layer_a, item[0].layer_b)
    )
    pairs = [pair for pair, _ in cosines]
    names = [[getattr(pair, name) for pair in pairs] for name in _PAIR]
    similarity = [local_examples(array)[: len(rows)] for _, array in cosines]
    similarity = _or_none(np.reshape(similarity, (-1, len(rows)))).T.tolist()
    return [
        RowSpectra(
            row,
            float(loss[i]),
            bool(finite[i]),
            tuple(itertools.chain(*zip(*(spectra[i] for spectra in by_projection), strict=True))),
            tuple(itertools.starmap(Similarity, zip(*names, similarity[i], strict=True))),
        )
        for i, row in enumerate(rows)
    ]


def _numbers(
    values: list[list[np.ndarray]], entries: list[measures.Measures]
) -> dict[str, np.ndarray]:
    """What is said of a projection's gradients: the fields of `Spectrum` in order, float64 [L, B].

    Args:
      values: singular values [R] of each layer and row.
      entries: mean, maximum and minimum of each layer, [≥ B]; more than the rows is filler.
    """
    layers, rows = len(values), len(values[0])
    flat = [row_values for layer in values for row_values in layer]
    # Rows have different R, and zeros behind the last value add nothing.
    padded = np.zeros((layers * rows, max(map(len, flat))))
    for row, row_values in zip(padded, flat, strict=True):
        row[: len(row_values)] = row_values
    padded = padded.reshape(layers, rows, -1)
    return {
        "nuclear_norm": np.asarray(measures.nuclear_norm(padded)),
        "effective_rank": _or_none(np.asarray(measures.effective_rank(padded))),
        "frobenius_norm": np.asarray(measures.frobenius_norm(padded)),
        "spectral_norm": padded[..., 0],
    } | {
        name: np.stack([local_examples(layer[name])[:rows] for layer in entries]).astype(np.float64)
        for name in ("mean", "max", "min")
    }


def _spectra(
    projection: Projection,
    layers: list[int],
    values: list[list[np.ndarray]],
    numbers: dict[str, np.ndarray],
) -> list[list[Spectrum]]:
    """A projection's spectra of each row, layer by layer; arguments as of `_numbers`."""
    by_row = zip(*(array.T.tolist() for array in numbers.values()), strict=True)
    return [
        [
            Spectrum(layer, projection, *own, singular_values=of[i])
            for layer, of, *own in zip(layers, values, *columns, strict=True)
        ]
        for i, columns in enumerate(by_row)
    ]


def _or_none(array: np.ndarray) -> np.ndarray:
    """Objects: floats, None where there is no finite one."""
    objects = array.astype(np.float64).astype(object)
    objects[~np.isfinite(array)] = None
    return objects
