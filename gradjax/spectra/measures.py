"""What is said about a gradient: formulas over its singular values and over its entries."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gradjax.model.layers import einsum
from gradjax.structs import Factors, Projection


def nuclear_norm(values: Float[np.ndarray, "*B R"]) -> Float[np.ndarray | np.floating, "*B"]:
    """`Σ σ_j` (paper, eq. 2), in float64."""
    return np.asarray(values, np.float64).sum(axis=-1)


def effective_rank(values: Float[np.ndarray, "*B R"]) -> Float[np.ndarray | np.floating, "*B"]:
    """`exp(-Σ p_j ln p_j)` with `p_j = σ_j / Σσ` (Roy & Vetterli 2007), in float64.

    Between 1 and the number of values; NaN where all are zero: a zero gradient has none.
    """
    values = np.asarray(values, np.float64)
    total = values.sum(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        p = values / total
    # 0 ln 0 = 0, and NaN stays NaN.
    return np.exp(-np.einsum("...r,...r->...", p, np.log(np.where(p > 0, p, 1))))


def frobenius_norm(values: Float[np.ndarray, "*B R"]) -> Float[np.ndarray | np.floating, "*B"]:
    """`sqrt(Σ σ_j²)`, in float64 and safe from underflow of the squares."""
    values = np.asarray(values, np.float64)
    largest = values.max(axis=-1, initial=0, keepdims=True)
    scale = np.where(largest > 0, largest, 1)
    scaled = values / scale
    return scale[..., 0] * np.sqrt(np.einsum("...r,...r->...", scaled, scaled))


# projection -> the gradients of a batch in one layer, [B, O, I]
Gradients = dict[Projection, Array]
# What `entry_measures` gives per projection or pair, each [B]
Measures = dict[str, Array]


@partial(jax.jit, static_argnames=("projections",))
def form_gradients(
    factors: Factors, projections: tuple[Projection, ...]
) -> tuple[Gradients, dict[Projection, Float[Array, " B"]]]:
    """`ΔᵀX` in float32, divided by the largest |Δ| of each example, and that divisor.

    The division keeps products of tiny gradients within float32's range.
    """
    gradients: Gradients = {}
    scales: dict[Projection, Array] = {}
    for projection in projections:
        x, delta = factors.of(projection)
        unit, scales[projection] = _divide_by_largest(delta)
        gradients[projection] = einsum("bto,bti->boi", unit, x.astype(jnp.float32))
    return gradients, scales


@jax.jit
def unit_scaled(gradients: Gradients) -> tuple[Gradients, dict[Projection, Float[Array, " B"]]]:
    """Gradients divided by each example's largest entry, and that divisor."""
    units: Gradients = {}
    scales: dict[Projection, Array] = {}
    for projection, gradient in gradients.items():
        units[projection], scales[projection] = _divide_by_largest(gradient)
    return units, scales


def _divide_by_largest(x: Float[Array, "B O I"]) -> tuple[Array, Float[Array, " B"]]:
    x = x.astype(jnp.float32)  # a quotient in bfloat16 would be rounded a second time
    largest = jnp.abs(x).max(axis=(1, 2))
    return x / jnp.where(largest > 0, largest, 1)[:, None, None], largest


@jax.jit
def entry_measures(gradients: Gradients, scales: dict[Projection, Array]) -> dict[str, Measures]:
    """Mean, maximum and minimum of the entries, each [B] per projection."""
    return {
        projection: {
            "mean": scales[projection] * gradient.mean(axis=2).mean(axis=1),
            "max": scales[projection] * gradient.max(axis=(1, 2)),
            "min": scales[projection] * gradient.min(axis=(1, 2)),
        }
        for projection, gradient in gradients.items()
    }


@jax.jit
def cosine(a: Float[Array, "B O I"], b: Float[Array, "B ..."]) -> Float[Array, " B"]:
    """Cosine of gradients flattened row by row (paper, eqs. 3 and 4), also of unlike shapes.

    NaN where either is zero.
    """
    b = b.reshape(a.shape)
    return _inner(a, b) / (jnp.sqrt(_inner(a, a)) * jnp.sqrt(_inner(b, b)))


def _inner(a: Float[Array, "B O I"], b: Float[Array, "B O I"]) -> Float[Array, " B"]:
    # Row by row first: one float32 sum over millions of entries loses three digits.
    return einsum("boi,boi->bo", a, b).sum(axis=1)
