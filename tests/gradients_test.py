"""Losses, spectra and cosines against float64 autograd, in every family and on every path."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from gradjax.checkpoints.hf_config import read_config
from gradjax.checkpoints.resolve import DEMO, resolve
from gradjax.checkpoints.safetensors import load_decoder
from gradjax.gradients import factored
from gradjax.gradients.factored import HEAD_CHUNKS, layer_factors
from gradjax.model.attention import CHUNKS
from gradjax.sharding import one_device
from gradjax.spectra.batch import BatchConfig, batch_spectra
from gradjax.spectra.decompose import decomposer
from gradjax.structs import PROJECTIONS, TokenBatch
from tests import oracle
from tests.checkpoints import FAMILIES, make_hf_model, save_checkpoint

# T below, between and above the smaller sides of the gradients, which are 12 to 60.
LENGTHS = (7, 37, 97)
PROMPT = 2


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """A Hugging Face model and the decoder loaded from its checkpoint."""
    hf_model = make_hf_model(request.param, seed=11)
    directory = save_checkpoint(hf_model, tmp_path_factory.mktemp(request.param))
    return hf_model, load_decoder(directory, read_config(directory), jnp.float32)


def make_batch(lengths, padded=None, filler=0, seed=0) -> TokenBatch:
    rng = np.random.default_rng(seed)
    padded = padded or max(lengths)
    shape = (len(lengths) + filler, padded)
    tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for row, length in enumerate(lengths):
        # Few distinct tokens, so that layer 0's inputs repeat.
        tokens[row, :length] = rng.integers(0, 29, length)
        targets[row, PROMPT:length] = True
        targets[row, PROMPT + 1 : length : 7] = False  # several response spans
    sizes = np.array([*lengths, *[0] * filler], np.int32)
    return TokenBatch(tuple(range(len(lengths))), tokens, targets, sizes)


def spectra_of(decoder, batch, route, **changes):
    with decomposer(route or "gram", PROJECTIONS, one_device(), on_host=True) as decompose:
        settings = {
            "layers": tuple(range(decoder.config.num_layers)),
            "projections": PROJECTIONS,
            "similarity": "all",
            "decompose": decompose if route else None,
            "dense_chunk": 2,
        }
        return batch_spectra(decoder, batch, BatchConfig(**{**settings, **changes}))()


def assert_equals_oracle(row, hf_model, tokens, targets):
    loss, gradients = oracle.torch_loss_and_gradients(hf_model, tokens, targets)
    assert abs(row.loss - loss) <= 1e-6 * max(1, loss)
    assert row.finite
    assert [(s.layer, s.projection) for s in row.spectra] == sorted(
        gradients, key=lambda key: (key[0], PROJECTIONS.index(key[1]))
    )
    for spectrum in row.spectra:
        gradient = gradients[spectrum.layer, spectrum.projection]
        values = np.linalg.svd(gradient, compute_uv=False)
        found = np.zeros_like(values)  # further values are zero
        found[: len(spectrum.singular_values)] = spectrum.singular_values
        np.testing.assert_allclose(found, values, rtol=0, atol=1e-5 * values[0])
        assert spectrum.spectral_norm == pytest.approx(values[0], rel=1e-5)
        assert spectrum.nuclear_norm == pytest.approx(values.sum(), rel=1e-5)
        assert spectrum.frobenius_norm == pytest.approx(np.linalg.norm(gradient), rel=1e-5)
        assert spectrum.effective_rank == pytest.approx(oracle.effective_rank(values), rel=1e-4)
        largest = np.abs(gradient).max()
        for name in ("mean", "max", "min"):
            expected = getattr(gradient, name)()
            assert abs(getattr(spectrum, name) - expected) <= 1e-5 * largest
    for similarity in row.similarity:
        a, b = similarity.layer_a, similarity.layer_b
        first, _, second = similarity.projection.partition("-")
        pair = gradients[a, first], gradients[b, second or first]
        assert similarity.cosine == pytest.approx(oracle.cosine(*pair), abs=1e-5)
    layers = len(gradients) // len(PROJECTIONS)
    assert len(row.similarity) == 2 * layers + len(PROJECTIONS) * layers * (layers - 1) // 2


@pytest.mark.parametrize("route", ["gram", "qr", None], ids=["gram", "qr", "dense"])
def test_mixed_length_batch_equals_float64_autograd(pair, route):
    hf_model, decoder = pair
    batch = make_batch(LENGTHS, padded=101, filler=2)
    for row, result in enumerate(spectra_of(decoder, batch, route)):
        tokens, targets = batch.tokens[row], batch.targets[row]
        length = LENGTHS[row]
        assert_equals_oracle(result, hf_model, tokens[:length], targets[:length])


@pytest.mark.parametrize("route", ["gram", "qr"])
@pytest.mark.parametrize("length", LENGTHS)
def test_row_alone_equals_float64_autograd(pair, route, length):
    hf_model, decoder = pair
    batch = make_batch([length], seed=length)
    (result,) = spectra_of(decoder, batch, route)
    assert_equals_oracle(result, hf_model, batch.tokens[0], batch.targets[0])


# The dense route meets chunks in one family every time, in the others with --all.
@pytest.mark.parametrize(
    ("family", "route"),
    [
        *((family, "gram") for family in FAMILIES),
        ("gemma2", None),
        *(pytest.param(family, None, marks=pytest.mark.slow) for family in ("qwen2", "llama")),
    ],
)
def test_both_sides_of_an_attention_chunk_equal_float64_autograd(family, route, tmp_path):
    hf_model = make_hf_model(family, seed=3, max_position_embeddings=1024)
    directory = save_checkpoint(hf_model, tmp_path)
    decoder = load_decoder(directory, read_config(directory), jnp.float32)
    lengths = [CHUNKS["cpu"], CHUNKS["cpu"] + 1, 2 * CHUNKS["cpu"] + 11]
    batch = make_batch(lengths)
    for row, result in enumerate(spectra_of(decoder, batch, route)):
        tokens, targets = batch.tokens[row], batch.targets[row]
        assert_equals_oracle(result, hf_model, tokens[: lengths[row]], targets[: lengths[row]])


@pytest.mark.parametrize("overrides", [{"num_key_value_heads": 6}, {"num_key_value_heads": 1}])
@pytest.mark.parametrize("family", FAMILIES)
def test_multi_head_and_multi_query_attention(family, overrides, tmp_path):
    hf_model = make_hf_model(family, seed=5, **overrides)
    directory = save_checkpoint(hf_model, tmp_path)
    decoder = load_decoder(directory, read_config(directory), jnp.float32)
    batch = make_batch([23, 41])
    for row, result in enumerate(spectra_of(decoder, batch, "gram")):
        length = batch.lengths[row]
        assert_equals_oracle(
            result, hf_model, batch.tokens[row, :length], batch.targets[row, :length]
        )


@pytest.mark.parametrize("route", ["gram", "qr"])
def test_a_row_does_not_depend_on_its_batch(pair, route):
    _, decoder = pair
    batch = make_batch(LENGTHS, padded=128, filler=1)
    together = spectra_of(decoder, batch, route)
    for row, length in enumerate(LENGTHS):
        alone = TokenBatch(
            (0,),
            batch.tokens[row : row + 1, :length],
            batch.targets[row : row + 1, :length],
            batch.lengths[row : row + 1],
        )
        (expected,) = spectra_of(decoder, alone, route)
        assert together[row].loss == pytest.approx(expected.loss, rel=1e-6)
        for a, b in zip(together[row].spectra, expected.spectra, strict=True):
            np.testing.assert_allclose(
                a.singular_values, b.singular_values, rtol=0, atol=2e-6 * a.spectral_norm
            )
            assert a.effective_rank == pytest.approx(b.effective_rank, rel=2e-5)
            largest = max(a.max, -a.min)
            for name in ("mean", "max", "min"):
                assert abs(getattr(a, name) - getattr(b, name)) <= 5e-6 * largest
        for a, b in zip(together[row].similarity, expected.similarity, strict=True):
            assert a.cosine == pytest.approx(b.cosine, abs=5e-6)


def test_upper_layers_and_some_projections(pair):
    _, decoder = pair
    batch = make_batch([37])
    (everything,) = spectra_of(decoder, batch, "gram")
    whole = {(s.layer, s.projection): s.nuclear_norm for s in everything.spectra}
    with decomposer("gram", ("k", "o"), one_device(), on_host=True) as decompose:
        settings = BatchConfig((1, 2), ("k", "o"), "adjacent", decompose)
        (some,) = batch_spectra(decoder, batch, settings)()
    assert [(s.layer, s.projection) for s in some.spectra] == [
        (1, "k"), (1, "o"), (2, "k"), (2, "o"),
    ]  # fmt: skip
    for s in some.spectra:
        assert s.nuclear_norm == pytest.approx(whole[s.layer, s.projection], rel=1e-6)
    pairs = [(s.kind, s.projection, s.layer_a, s.layer_b) for s in some.similarity]
    assert pairs == [("cross_layer", "k", 1, 2), ("cross_layer", "o", 1, 2)]


def test_backward_pass_stops_at_the_lowest_layer(pair):
    _, decoder = pair
    batch = make_batch([23])
    _, layers = layer_factors(
        decoder, jnp.asarray(batch.tokens), jnp.asarray(batch.targets), lowest_layer=2
    )
    assert [layer for layer, _ in layers] == [2]


def test_recomputing_activations_changes_nothing(pair):
    _, decoder = pair
    batch = make_batch([23, 37])
    kept = spectra_of(decoder, batch, "gram", keep_activations=True)
    recomputed = spectra_of(decoder, batch, "gram", keep_activations=False)
    for a, b in zip(kept, recomputed, strict=True):
        assert [s.nuclear_norm for s in a.spectra] == pytest.approx(
            [s.nuclear_norm for s in b.spectra], rel=1e-6
        )


def test_more_target_tokens_than_one_head_chunk(pair):
    hf_model, decoder = pair
    length = 2 * HEAD_CHUNKS["cpu"] + 31
    batch = make_batch([length, 11])
    losses, layers = layer_factors(
        decoder, jnp.asarray(batch.tokens), jnp.asarray(batch.targets), lowest_layer=2
    )
    ((_, factors),) = layers
    for row in range(2):
        length = batch.lengths[row]
        loss, gradients = oracle.torch_loss_and_gradients(
            hf_model, batch.tokens[row, :length], batch.targets[row, :length]
        )
        assert abs(float(losses[row]) - loss) <= 1e-6 * max(1, loss)
        x, delta = (np.asarray(array[row], np.float64) for array in factors.of("v"))
        np.testing.assert_allclose(
            delta.T @ x, gradients[2, "v"], atol=1e-5 * np.abs(gradients[2, "v"]).max()
        )


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("vocabulary", [37, 40, 101])
def test_losses_and_their_gradients_in_chunks_of_the_vocabulary(monkeypatch, vocabulary, softcap):
    """Against float64; a token for each label, of which every third is all but certain."""
    monkeypatch.setattr(factored, "VOCABULARY_CHUNK", 40)
    config = dataclasses.replace(read_config(resolve(DEMO).directory), vocab_size=vocabulary)
    config = dataclasses.replace(config, logits_softcap=softcap)
    rng, labels = np.random.default_rng(3), np.arange(vocabulary)
    table, normed = rng.standard_normal((2, vocabulary, 13)).astype(np.float32)
    normed[::3] = 25 * table[::3] / (table[::3] ** 2).sum(axis=1, keepdims=True)

    scores = normed.astype(np.float64) @ table.T.astype(np.float64)
    slopes = np.ones_like(scores)
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
        slopes = 1 - (scores / softcap) ** 2
    others = np.exp(scores - scores[labels, labels][:, None])  # over the label's own
    others[labels, labels] = 0
    pulls = others / (1 + others.sum(axis=1, keepdims=True))
    pulls[labels, labels] = -pulls.sum(axis=1)
    expected = np.log1p(others.sum(axis=1)), (pulls * slopes) @ table

    arrays = (jnp.asarray(array) for array in (table, normed, labels.astype(np.int32)))
    losses, gradients = factored.token_losses_gradient(config, *arrays)
    assert softcap or expected[0].min() < 1e-4
    np.testing.assert_allclose(losses, expected[0], rtol=1e-4)
    largest = np.abs(expected[1]).max(axis=1, keepdims=True)
    np.testing.assert_allclose(gradients / largest, expected[1] / largest, rtol=0, atol=1e-4)


def test_row_without_gradient_has_no_effective_rank(pair):
    _, decoder = pair
    batch = make_batch([13])
    batch.targets[:] = False
    (row,) = spectra_of(decoder, batch, "gram")
    assert row.loss == 0
    assert row.finite
    for spectrum in row.spectra:
        assert spectrum.nuclear_norm == pytest.approx(0, abs=1e-140)
        assert spectrum.effective_rank is None
    assert {similarity.cosine for similarity in row.similarity} == {None}
