"""TokenBatch -> each row's loss, spectra and cosines.

Both paths, factored and dense, become one stream of layers; what is measured on a layer is
written once.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gradjax.gradients.causality import Contributing, contributing_tokens
from gradjax.gradients.dense import dense_gradients
from gradjax.gradients.factored import attention_gradients, mask_factors
from gradjax.model.decoder import Decoder, layer_windows
from gradjax.sharding import EXAMPLES, local_examples, local_slots, place_examples
from gradjax.spectra import measures
from gradjax.spectra.decompose import Decompose, Values, cut_values
from gradjax.structs import SAME_LAYER_PAIRS, Projection, Similarity, Spectrum, TokenBatch

# Layers whose spectra may still be in the making: bounds the factors that are alive.
LAYERS_AHEAD = 2


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
    losses, layers = attention_gradients(
        model,
        place(batch.tokens),
        place(batch.targets),
        min(settings.layers),
        keep_activations=settings.keep_activations,
    )

    def stream() -> Iterator[_Layer]:
        for index, factors in layers:
            if index in settings.layers:
                tokens = contributing[index]
                factors = mask_factors(factors, {p: place(mask) for p, mask in tokens.items()})
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
            values = {p: _dense_singular_values(model.mesh, g) for p, g in matrices.items()}
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
def _dense_singular_values(mesh: Mesh, gradients: jax.Array) -> jax.Array:
    def own(gradients: jax.Array) -> jax.Array:
        # One example at a time: a batched decomposition can deadlock on jax 0.10.2's CPU.
        return jax.lax.map(lambda g: jnp.linalg.svd(g, compute_uv=False), gradients)

    return jax.shard_map(own, mesh=mesh, in_specs=EXAMPLES, out_specs=EXAMPLES)(gradients)


def _rows(
    mesh: Mesh,
    batch: TokenBatch,
    losses: jax.Array,
    measured: deque[_Measured],
    cosines: list[tuple[Similarity, jax.Array]],
    settings: BatchConfig,
) -> list[RowSpectra]:
    """Per-layer arrays over the batch, turned into per-row results."""
    slots = local_slots(mesh, len(batch.lengths))
    rows = [batch.rows[slot] for slot in slots if slot < len(batch.rows)]  # no filler
    loss = local_examples(losses)[: len(rows)].astype(np.float64)
    spectra: list[list[Spectrum]] = [[] for _ in rows]
    finite = np.isfinite(loss)
    for layer in measured:
        values = layer.wait_for_values()
        entries = jax.tree.map(local_examples, layer.entries)
        for projection in settings.projections:
            for i, row_spectra in enumerate(spectra):
                at = {name: float(array[i]) for name, array in entries[projection].items()}
                spectrum = _spectrum(layer.index, projection, values[projection][i], at)
                finite[i] &= np.isfinite([spectrum.nuclear_norm, *at.values()]).all()
                row_spectra.append(spectrum)

    similarity: list[list[Similarity]] = [[] for _ in rows]
    order = {"same_layer": 0, "cross_layer": 1}
    for pair, array in sorted(
        cosines, key=lambda item: (order[item[0].kind], item[0].layer_a, item[0].layer_b)
    ):
        values = local_examples(array)[: len(rows)]
        for row_similarity, value in zip(similarity, values, strict=True):
            cosine = float(value) if np.isfinite(value) else None
            row_similarity.append(dataclasses.replace(pair, cosine=cosine))
    return [
        RowSpectra(row, float(loss[i]), bool(finite[i]), tuple(spectra[i]), tuple(similarity[i]))
        for i, row in enumerate(rows)
    ]


def _spectrum(
    layer: int, projection: Projection, values: np.ndarray, entries: dict[str, float]
) -> Spectrum:
    rank = float(measures.effective_rank(values))
    return Spectrum(
        layer=layer,
        projection=projection,
        nuclear_norm=float(measures.nuclear_norm(values)),
        effective_rank=None if np.isnan(rank) else rank,
        frobenius_norm=float(measures.frobenius_norm(values)),
        spectral_norm=float(values[0]),
        singular_values=values,
        **entries,
    )
