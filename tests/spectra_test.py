"""Properties of the singular values and of what is said about them."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradjax.sharding import one_device
from gradjax.spectra import measures
from gradjax.spectra.decompose import _workers, decomposer, host_bytes
from gradjax.spectra.singular_values import gram_singular_values, matrix_singular_values
from gradjax.structs import ATTENTION, Factors

pytestmark = pytest.mark.smoke

ROUTES = ("gram", "qr")
# T below, at and above the smaller side.
SHAPES = [(5, 17, 11), (11, 17, 11), (23, 17, 11), (7, 3, 31), (1, 13, 5), (19, 1, 7)]


def random_factors(shape, seed=0):
    tokens, outputs, inputs = shape
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, inputs)).astype(np.float32)
    return x, rng.standard_normal((tokens, outputs)).astype(np.float32)


def values_of(route, x, delta):
    arrays = {"x_qkv": x, "x_o": x} | dict.fromkeys(ATTENTION, delta)
    factors = Factors(**{name: jnp.asarray(array[None]) for name, array in arrays.items()})
    with decomposer(route, ("q",), one_device(), on_host=True) as decompose:
        (values,) = decomposed(decompose, factors, {"q": np.ones((1, len(x)), bool)})["q"]
    return values


def decomposed(decompose, factors, contributing):
    """With the gradients formed, as in `batch_spectra`."""
    formed = measures.form_gradients(factors, tuple(contributing))
    return decompose(factors, formed, contributing)()


def exact(x, delta):
    gradient = delta.astype(np.float64).T @ x.astype(np.float64)
    return np.linalg.svd(gradient, compute_uv=False)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equal_to_the_svd_of_the_product(route, shape):
    x, delta = random_factors(shape)
    values, expected = values_of(route, x, delta), exact(x, delta)
    assert len(values) == min(shape)
    # Of many tokens the gradient itself is decomposed, which is rounded to float32.
    formed = shape[0] > 0.75 * min(shape[1:])
    tolerance = (2e-6 if route == "qr" else 2e-7 if formed else 2e-8) * expected[0]
    np.testing.assert_allclose(values, expected[: len(values)], rtol=0, atol=tolerance)
    np.testing.assert_allclose(expected[len(values) :], 0, atol=1e-12 * expected[0])


def test_a_batch_has_the_values_of_its_rows():
    rng = np.random.default_rng(0)
    x, delta = (rng.standard_normal((3, 5, side)).astype(np.float32) for side in (11, 17))
    (found,) = gram_singular_values(np, x, [delta])
    formed = matrix_singular_values(np, np.swapaxes(delta, 1, 2) @ x)
    for row in range(3):
        expected = exact(x[row], delta[row])
        np.testing.assert_allclose(found[row], expected[:5], rtol=1e-9)
        np.testing.assert_allclose(formed[row], expected, rtol=0, atol=1e-6 * expected[0])


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(ROUTES),
    st.sampled_from(SHAPES),
    st.integers(0, 2**20),
    st.floats(-12, 12),
)
def test_scaling_scales_values_and_keeps_the_effective_rank(route, shape, seed, exponent):
    x, delta = random_factors(shape, seed)
    factor = np.float32(10.0**exponent)
    values, scaled = values_of(route, x, delta), values_of(route, x, delta * factor)
    np.testing.assert_allclose(scaled, values * factor, rtol=0, atol=1e-5 * scaled[0])
    assert measures.effective_rank(scaled) == pytest.approx(
        measures.effective_rank(values), rel=1e-4
    )
    assert measures.nuclear_norm(scaled) == pytest.approx(
        float(factor) * measures.nuclear_norm(values), rel=1e-5
    )


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(ROUTES), st.sampled_from(SHAPES), st.integers(0, 2**20))
def test_rotating_either_side_changes_no_value(route, shape, seed):
    x, delta = random_factors(shape, seed)
    rng = np.random.default_rng(seed + 1)
    left = np.linalg.qr(rng.standard_normal((shape[1], shape[1])))[0].astype(np.float32)
    right = np.linalg.qr(rng.standard_normal((shape[2], shape[2])))[0].astype(np.float32)
    values = values_of(route, x, delta)
    rotated = values_of(route, x @ right, delta @ left)
    np.testing.assert_allclose(rotated, values, rtol=0, atol=5e-6 * values[0])


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from(ROUTES),
    st.tuples(st.integers(1, 13), st.integers(1, 11), st.integers(1, 17)),
    st.integers(0, 2**20),
    st.integers(0, 4),
)
def test_effective_rank_is_between_one_and_the_rank_bound(route, shape, seed, zero_rows):
    x, delta = random_factors(shape, seed)
    delta[:zero_rows] = 0
    values = values_of(route, x, delta)
    assert np.all(np.diff(values) <= 0)
    assert np.all(values >= 0)
    rank = measures.effective_rank(values)
    if not delta.any():
        assert np.isnan(rank)
    else:
        assert 1 - 1e-12 <= rank <= min(shape) * (1 + 1e-12)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("shape", SHAPES)
def test_zero_gradient(route, shape):
    x, delta = random_factors(shape)
    for factors in ((x, 0 * delta), (0 * x, delta)):
        values = values_of(route, *factors)
        np.testing.assert_array_equal(values, 0)
        assert np.isnan(measures.effective_rank(values))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("shape", [(29, 61, 53), (61, 37, 53)])
def test_repeated_tokens_leave_the_tail_at_zero(route, shape):
    """Layer 0 gives q, k and v the same input for the same token: rank 7 here, not 29."""
    x, delta = random_factors(shape)
    x = x[np.arange(shape[0]) % 7]
    values, expected = values_of(route, x, delta), exact(x, delta)
    np.testing.assert_allclose(values[:7], expected[:7], rtol=2e-6)
    assert values[7] < {"gram": 2e-7, "qr": 2e-6}[route] * values[0]
    assert measures.effective_rank(values) == pytest.approx(
        measures.effective_rank(expected), rel={"gram": 2e-5, "qr": 1e-4}[route]
    )


@pytest.mark.parametrize("route", ROUTES)
def test_padding_changes_nothing(route):
    x, delta = random_factors((9, 31, 23))
    padded = values_of(route, np.pad(x, ((0, 8), (0, 0))), np.pad(delta, ((0, 8), (0, 0))))
    values = values_of(route, x, delta)
    np.testing.assert_allclose(padded[:9], values, rtol=0, atol=2e-6 * values[0])
    np.testing.assert_allclose(padded[9:], 0, atol=2e-7 * values[0])


@pytest.mark.parametrize("length", [0, 13, 29])
def test_device_and_host_agree(length):
    """The Gram route's formulas in jax.numpy, as on an accelerator.

    One example: batched decompositions can deadlock on jax 0.10.2's CPU backend.
    """
    rng = np.random.default_rng(3)
    sizes = {"x_qkv": 19, "x_o": 23, "q": 23, "k": 11, "v": 11, "o": 19}
    arrays = {n: rng.standard_normal((1, 29, s)).astype(np.float32) for n, s in sizes.items()}
    for name in ATTENTION:  # padded tokens have no cotangent
        arrays[name][:, length:] = 0
    factors = Factors(**{name: jnp.asarray(array) for name, array in arrays.items()})
    contributing = dict.fromkeys(ATTENTION, np.arange(29)[None] < length)
    with decomposer("gram", ATTENTION, one_device(), on_host=False) as decompose:
        device = decomposed(decompose, factors, contributing)
    with decomposer("gram", ATTENTION, one_device(), on_host=True) as decompose:
        host = decomposed(decompose, factors, contributing)
    for projection in ATTENTION:
        (a,), (b,) = device[projection], host[projection]
        assert len(a) == len(b) == min(max(length, 1), 19, sizes[projection])
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * max(b[0], 1e-30))
        assert a.dtype == b.dtype == np.float64


@pytest.mark.parametrize("route", ROUTES)
def test_tokens_without_gradient_add_no_noise(route):
    """A long row with five targets: in the last layer five tokens alone reach q and o."""
    rng = np.random.default_rng(7)
    arrays = {
        name: rng.standard_normal((1, 401, 421)).astype(np.float32)
        for name in ("x_qkv", "x_o", "q", "k", "v", "o")
    }
    contributing = {p: np.arange(401)[None] >= (396 if p in "qo" else 0) for p in ATTENTION}
    for name in ("q", "o"):
        arrays[name][:, :396] = 0
    factors = Factors(**{name: jnp.asarray(array) for name, array in arrays.items()})
    with decomposer(route, ATTENTION, one_device(), on_host=True) as decompose:
        found = decomposed(decompose, factors, contributing)
    for projection in ATTENTION:
        x, delta = (np.asarray(array[0]) for array in factors.of(projection))
        values, expected = found[projection][0], exact(x, delta)
        assert len(values) == (5 if projection in "qo" else 401)
        assert measures.effective_rank(values) == pytest.approx(
            measures.effective_rank(expected), rel=1e-6
        )


def orthonormal(rng, rows, columns):
    return np.linalg.qr(rng.standard_normal((rows, columns)))[0]


# What float32 QR has to bear, as x and Δ of three panels and a part of one.
HARD = {
    "random": lambda rng, x, delta: (x, delta),
    "ill-conditioned": lambda rng, x, delta: (
        (orthonormal(rng, len(x), rank := min(x.shape)) * np.logspace(0, -9, rank))
        @ orthonormal(rng, x.shape[1], rank).T,
        delta,
    ),
    "tokens of sizes from 1 to 1e-9": lambda rng, x, delta: (
        x * np.logspace(0, -9, len(x))[:, None],
        delta,
    ),
    "repeated tokens": lambda rng, x, delta: (x[np.arange(len(x)) % 7], delta),
    "tiny": lambda rng, x, delta: (x, 1e-20 * delta),
    "tiny inputs and gradients": lambda rng, x, delta: (1e-12 * x, 1e-20 * delta),
    "no gradient before token 200": lambda rng, x, delta: (
        x,
        np.where(np.arange(len(x))[:, None] < 200, 0, delta),
    ),
    "no gradient from token 200 on": lambda rng, x, delta: (
        x,
        np.where(np.arange(len(x))[:, None] < 200, delta, 0),
    ),
}


@pytest.mark.parametrize("sides", [(421, 389), (131, 389), (389, 131), (131, 131)])
@pytest.mark.parametrize("case", HARD)
def test_the_qr_route_is_within_a_millionth_of_the_largest_value(case, sides):
    """Of float64's singular values, for fewer and for more tokens than the matrix's sides."""
    rng = np.random.default_rng(11)
    x, delta = (rng.standard_normal((353, side)) for side in (sides[1], sides[0]))
    x, delta = (array.astype(np.float32) for array in HARD[case](rng, x, delta))
    values, expected = values_of("qr", x, delta), exact(x, delta)
    assert len(values) == min(353, *sides)
    np.testing.assert_allclose(values, expected[: len(values)], rtol=0, atol=1e-6 * expected[0])
    assert measures.effective_rank(values) == pytest.approx(
        measures.effective_rank(expected), rel=1e-4
    )


def test_closed_forms():
    assert measures.nuclear_norm(np.array([3.0, 4.0])) == 7
    assert measures.frobenius_norm(np.array([3.0, 4.0])) == pytest.approx(5, rel=1e-15)
    assert measures.frobenius_norm(np.array([3e-300, 4e-300])) == pytest.approx(5e-300)
    assert measures.effective_rank(np.ones(7)) == pytest.approx(7, rel=1e-15)
    assert measures.effective_rank(np.array([2.0, 0, 0])) == 1
    assert np.isnan(measures.effective_rank(np.zeros(3)))
    two_thirds = np.exp(-(2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3)))
    assert measures.effective_rank(np.array([2.0, 1.0])) == pytest.approx(two_thirds, rel=1e-15)


def test_a_batch_is_measured_row_by_row():
    values = np.array([[3.0, 2.0, 0.5], [4e-300, 3e-300, 0.0], [5e200, 0.0, 0.0]])
    for measure in (measures.nuclear_norm, measures.effective_rank, measures.frobenius_norm):
        found = measure(values.astype(np.float64))
        np.testing.assert_allclose(found, [measure(row) for row in values], rtol=1e-15)
        assert measure(values[None]).shape == (1, 3)
    np.testing.assert_allclose(measures.nuclear_norm(values), [5.5, 7e-300, 5e200], rtol=1e-15)
    expected = [np.sqrt(13.25), 5e-300, 5e200]
    np.testing.assert_allclose(measures.frobenius_norm(values), expected, rtol=1e-15)
    assert measures.frobenius_norm(np.zeros((2, 0))).tolist() == [0, 0]


@pytest.mark.parametrize("scale", [1.0, 1e-30])
def test_cosines_and_entries_at_any_scale(scale):
    rng = np.random.default_rng(5)
    a, b = (rng.standard_normal((2, 401, 307)).astype(np.float32) for _ in range(2))
    b = 0.1 * a + b
    unit, scales = measures.unit_scaled(
        {"q": jnp.asarray(a) * np.float32(scale), "o": jnp.asarray(b) * np.float32(scale)}
    )
    entries = jax.tree.map(np.asarray, measures.entry_measures(unit, scales))
    found = measures.cosine(unit["q"], unit["o"].reshape(2, 307, 401))
    for row in range(2):
        x, y = a[row].astype(np.float64).ravel(), b[row].astype(np.float64).ravel()
        expected = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
        assert found[row] == pytest.approx(expected, abs=1e-6)
        for name in ("mean", "max", "min"):
            error = abs(entries["q"][name][row] - scale * getattr(x, name)())
            assert error <= 1e-6 * scale * np.abs(x).max()


@pytest.mark.parametrize(
    ("outputs", "inputs", "tokens"), [(307, 311, 53), (307, 311, 229), (307, 611, 500)]
)
def test_host_bytes_are_what_a_decomposition_holds(outputs, inputs, tokens):
    """Of one thread; LAPACK's own copy, which Python does not see, makes the difference."""
    draw = np.random.default_rng(0)
    x, delta = (draw.normal(size=(tokens, n)).astype(np.float32) for n in (inputs, outputs))
    tracemalloc.start()
    if tokens <= 0.75 * min(outputs, inputs):
        # Tokens that contribute are picked out of the batch first.
        gram_singular_values(np, x.copy(), [delta.copy()])
    else:
        matrix_singular_values(np, delta.T @ x)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak <= 1.1 * host_bytes([(outputs, inputs)], tokens) / _workers() <= 2 * peak
