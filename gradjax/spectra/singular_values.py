"""Singular values of `G = ΔᵀX` from its factors, without decomposing an O×I matrix.

rank(G) ≤ T, so a T×T core has the same singular values; where T comes near min(O, I) and beyond,
values are those of G itself, which is formed in float32 anyway. The Gram route works in float64 on
either and is written once over the array namespace `xp`: NumPy on a host pool where the backend is
the CPU (LAPACK's values-only driver; jax 0.10.2 can deadlock there on batched decompositions),
`jax.numpy` on the device elsewhere. The QR route needs no fast float64 on the device: it makes
cores there, and their values come from the host.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gradjax.model.layers import einsum

Route = Literal["gram", "qr"]

# Relative shift that keeps the Cholesky factorization of a rank-deficient Gram matrix
# (repeated tokens share their layer-0 input) defined: far below float64's useful range.
_GRAM_SHIFT = 1e-15
# Rows that `triangle` takes at a time: XLA's own QR on a TPU has this many columns in a kernel.
PANEL = 128


def gram_singular_values(xp: Any, x: Any, deltas: list[Any]) -> list[Any]:
    """Singular values of `ΔᵀX` for each Δ that shares the input X.

    In float64: relative error 1e-11 and better at full rank, and 1e-8·σ₁ in the tail of a
    rank-deficient G.

    Args:
      xp: `numpy`, or `jax.numpy` with 64-bit types enabled.
      x: [..., T, I], float32 or bfloat16.
      deltas: each [..., T, O], T at most min(O, I).

    Returns:
      Per Δ: [..., T], descending, float64.
    """
    x = x.astype(xp.float64)
    factor = _cholesky(xp, x @ _transpose(xp, x))  # C with C Cᵀ = X Xᵀ
    results = []
    for delta in (delta.astype(xp.float64) for delta in deltas):
        core = _transpose(xp, factor) @ (delta @ _transpose(xp, delta)) @ factor
        results.append(_roots(xp, core))
    return results


def triangle(matrix: Float[Array, "W I"], panels: Int[Array, ""]) -> Float[Array, "W W"]:
    """L with `L Lᵀ = M Mᵀ`, lower triangular up to rounding: the transposed R of a QR of Mᵀ.

    Block modified Gram-Schmidt with a Householder QR of each panel of `PANEL` rows. Whatever M's
    rank, L is the exact triangle of a matrix within a few float32 roundings of M (Björck 1967;
    Barlow 2019, SIAM J. Matrix Anal. 40(4)). It is a loop of products of one size where XLA's QR
    unrolls its panels, so that a TPU compiles it in seconds at any W.

    Args:
      matrix: float32; W a multiple of `PANEL`, I at least `PANEL`.
      panels: how many panels are not zero. Later rows of M have to be.
    """

    def step(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        panel = jax.lax.dynamic_slice_in_dim(carry[0], i * PANEL, PANEL)
        q = jnp.linalg.qr(panel.T)[0]

        def subtract(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            matrix, lower = carry
            rows = jax.lax.dynamic_slice_in_dim(matrix, j * PANEL, PANEL)
            part = einsum("ti,ip->tp", rows, q)
            rows -= einsum("tp,ip->ti", part, q)
            matrix = jax.lax.dynamic_update_slice_in_dim(matrix, rows, j * PANEL, 0)
            return matrix, jax.lax.dynamic_update_slice(lower, part, (j * PANEL, i * PANEL))

        return jax.lax.fori_loop(i, panels, subtract, carry)

    start = (matrix, jnp.zeros((len(matrix), len(matrix)), matrix.dtype))
    return jax.lax.fori_loop(0, panels, step, start)[1]


def matrix_singular_values(xp: Any, matrix: Any) -> Any:
    """Singular values of matrices that are there: gradients, or cores.

    By LAPACK's eigenvalues of the smaller side's float64 Gram matrix, 1e-8·σ₁ in the tail and
    better above: a third of the time of its singular values, float32 ones included.

    Args:
      xp: `numpy`, or `jax.numpy` with 64-bit types enabled.
      matrix: [..., O, I], float32.

    Returns:
      [..., min(O, I)], descending, float64.
    """
    matrix = matrix.astype(xp.float64)
    if matrix.shape[-2] > matrix.shape[-1]:
        matrix = _transpose(xp, matrix)
    return _roots(xp, matrix @ _transpose(xp, matrix))


def _roots(xp: Any, gram: Any) -> Any:
    return xp.sqrt(xp.maximum(xp.linalg.eigvalsh(gram)[..., ::-1], 0))


def _cholesky(xp: Any, gram: Any) -> Any:
    """The factor of a Gram matrix, shifted; zero for a zero matrix (no attention output)."""
    trace = xp.trace(gram, axis1=-2, axis2=-1)[..., None, None]
    shift = xp.where(trace > 0, _GRAM_SHIFT * trace, 1.0)
    factor = xp.linalg.cholesky(gram + shift * xp.eye(gram.shape[-1], dtype=gram.dtype))
    return xp.where(trace > 0, factor, 0.0)


def _transpose(xp: Any, matrix: Any) -> Any:
    return xp.swapaxes(matrix, -1, -2)
