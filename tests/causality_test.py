"""Which tokens contribute to a gradient: known from causality, whatever a processor computes."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gradjax.checkpoints.hf_config import read_config
from gradjax.checkpoints.safetensors import load_decoder
from gradjax.gradients.causality import contributing_tokens
from gradjax.model.decoder import layer_windows
from gradjax.sharding import one_device
from gradjax.spectra import batch as batch_module
from gradjax.spectra.batch import BatchConfig, batch_spectra
from gradjax.spectra.decompose import decomposer
from gradjax.structs import PROJECTIONS, Factors, TokenBatch
from tests.checkpoints import FAMILIES, make_hf_model, save_checkpoint
from tests.oracle import linear_layer

# Targets at the end, in two spans, at once, at the second token alone, and none.
TARGETS = {
    "end": [range(7, 19)],
    "spans": [range(3, 5), range(11, 13)],
    "early": [range(2, 3)],
    "second": [range(1, 2)],
    "none": [],
}


def make_batch(spans: list[range], length: int = 23) -> TokenBatch:
    tokens = np.random.default_rng(5).integers(0, 101, (1, length)).astype(np.int32)
    targets = np.zeros((1, length), bool)
    for span in spans:
        targets[0, span.start : span.stop] = True
    return TokenBatch((0,), tokens, targets, np.array([length], np.int32))


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    model = make_hf_model(request.param, seed=3)
    directory = save_checkpoint(model, tmp_path_factory.mktemp(request.param))
    return model, load_decoder(directory, read_config(directory), jnp.float32)


def cotangents(model: torch.nn.Module, batch: TokenBatch) -> dict[tuple[int, str], np.ndarray]:
    """(layer, projection) -> float64 cotangents of the projection's output, [T, O]."""
    model = model.double()
    outputs: dict[tuple[int, str], torch.Tensor] = {}
    hooks = []
    for layer, block in enumerate(model.model.layers):
        for p in PROJECTIONS:

            def keep(_, __, output, key=(layer, p)):
                output.retain_grad()
                outputs[key] = output

            hooks.append(linear_layer(block, p).register_forward_hook(keep))
    ids = torch.tensor(batch.tokens, dtype=torch.int64)
    labels = torch.where(torch.tensor(batch.targets[0]), ids[0], -100)[1:]
    scores = model(ids).logits[0, :-1]
    torch.nn.functional.cross_entropy(scores, labels, reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    return {key: output.grad[0].numpy() for key, output in outputs.items()}


@pytest.mark.parametrize("spans", TARGETS.values(), ids=TARGETS)
def test_tokens_are_those_with_a_float64_cotangent(pair, spans):
    model, decoder = pair
    batch = make_batch(spans)
    found = contributing_tokens(batch.targets, layer_windows(decoder.config, 23))
    for (layer, projection), delta in cotangents(model, batch).items():
        sizes = np.abs(delta).max(axis=1)
        expected = sizes > 1e-12 * max(sizes.max(), 1e-3)
        np.testing.assert_array_equal(
            found[layer][projection][0], expected, f"{layer} {projection}"
        )


def spectra_of(decoder, batch, route):
    """By a route on the host, on the device, or by whole matrices."""
    route, _, where = route.partition(" ")
    on_host = where != "device"
    with decomposer(route or "gram", PROJECTIONS, one_device(), on_host=on_host) as decompose:
        layers = tuple(range(decoder.config.num_layers))
        config = BatchConfig(layers, PROJECTIONS, "all", decompose if route else None)
        (row,) = batch_spectra(decoder, batch, config)()
    return row


@pytest.mark.parametrize("spans", TARGETS.values(), ids=TARGETS)
def test_every_route_gives_as_many_values(pair, spans):
    _, decoder = pair
    batch = make_batch(spans)
    counts = [
        [len(s.singular_values) for s in spectra_of(decoder, batch, route).spectra]
        for route in ("gram", "qr", "gram device", "qr device", "")
    ]
    assert all(count == counts[0] for count in counts)


@pytest.mark.parametrize("route", ["gram", "qr", "gram device", ""])
@pytest.mark.parametrize("spans", TARGETS.values(), ids=TARGETS)
def test_rounding_of_the_last_bits_changes_no_count(pair, spans, route, monkeypatch):
    """Another processor's zeros are rounding errors: emulated by adding some everywhere."""
    _, decoder = pair
    batch = make_batch(spans)
    expected = spectra_of(decoder, batch, route)
    rng = np.random.default_rng(11)

    def perturbed(array: jax.Array) -> jax.Array:
        values = np.asarray(array)
        largest = max(np.abs(values).max(), 1e-6)
        return jnp.asarray(values + 1e-8 * largest * rng.standard_normal(values.shape), array.dtype)

    factored, dense = batch_module.layer_factors, batch_module.dense_gradients

    def noisy_factors(*arguments, **options) -> tuple[jax.Array, Iterator[tuple[int, Factors]]]:
        losses, layers = factored(*arguments, **options)
        return losses, ((layer, jax.tree.map(perturbed, factors)) for layer, factors in layers)

    def noisy_gradients(*arguments):
        losses, gradients = dense(*arguments)
        return losses, jax.tree.map(perturbed, gradients)

    monkeypatch.setattr(batch_module, "layer_factors", noisy_factors)
    monkeypatch.setattr(batch_module, "dense_gradients", noisy_gradients)
    found = spectra_of(decoder, batch, route)
    for a, b in zip(found.spectra, expected.spectra, strict=True):
        assert len(a.singular_values) == len(b.singular_values)
        assert (a.effective_rank is None) == (b.effective_rank is None)
        np.testing.assert_allclose(
            a.singular_values, b.singular_values, rtol=0, atol=2e-6 * b.spectral_norm
        )
        if b.effective_rank:
            assert a.effective_rank == pytest.approx(b.effective_rank, rel=2e-5)
    for a, b in zip(found.similarity, expected.similarity, strict=True):
        assert (a.cosine is None) == (b.cosine is None)


@pytest.mark.parametrize("windows", [(9, 9), (1, 9), (2, 3), (9, 1)])
def test_windows_bound_what_reaches_the_loss(windows):
    """By walking the graph of an attention model token by token."""
    targets = np.zeros((1, 9), bool)
    targets[0, [4, 8]] = True
    needed = {3, 7}
    found = contributing_tokens(targets, windows)
    for window, layer in reversed(list(zip(windows, found, strict=True))):
        sees = {p: set(range(max(p - window + 1, 0), p + 1)) for p in needed}
        choosing = {p for p in needed if len(sees[p]) > 1}
        expected = {
            "o": needed,
            "v": set().union(*sees.values()),
            "q": choosing,
            "k": set().union(*(sees[p] for p in choosing)),
        }
        expected |= dict.fromkeys(("gate", "up", "down"), needed)
        for projection in PROJECTIONS:
            assert set(np.flatnonzero(layer[projection][0])) == expected[projection]
        needed = expected["v"]
