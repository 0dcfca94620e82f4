"""Singular values of `G = ΔᵀX` from its factors, without decomposing an O×I matrix.

rank(G) ≤ T, so a T×T core has the same singular values; beyond T = min(O, I) the core is the
Gram matrix of G's smaller side. Both routes are written once over the array namespace `xp`:
NumPy on a host pool where the backend is the CPU (LAPACK's values-only driver; jax 0.10.2 can
deadlock there on batched decompositions), `jax.numpy` on the device elsewhere.
"""

from typing import Any, Literal

Route = Literal["gram", "qr"]

# Relative shift that keeps the Cholesky factorization of a rank-deficient Gram matrix
# (repeated tokens share their layer-0 input) defined: far below float64's useful range.
_GRAM_SHIFT = 1e-15


def factor_singular_values(xp: Any, route: Route, x: Any, deltas: list[Any]) -> list[Any]:
    """Singular values of `ΔᵀX` for each Δ that shares the input X.

    Args:
      xp: `numpy` or `jax.numpy` (for `gram`: with 64-bit types enabled).
      route: `gram` works in float64: relative error 1e-11 and better at full rank, and
        1e-8·σ₁ in the tail of a rank-deficient G. `qr` stays in float32, 1e-7·σ₁, for
        backends without fast float64.
      x: [..., T, I], float32 or bfloat16.
      deltas: each [..., T, O].

    Returns:
      Per Δ: [..., min(T, O, I)], descending, float64 (`gram`) or float32 (`qr`).
    """
    values = _gram_route if route == "gram" else _qr_route
    return values(xp, x, deltas)


def _gram_route(xp: Any, x: Any, deltas: list[Any]) -> list[Any]:
    x = x.astype(xp.float64)
    tokens, inputs = x.shape[-2:]
    factor = None  # C with C Cᵀ = X Xᵀ, shared by the deltas
    results = []
    for delta in deltas:
        delta = delta.astype(xp.float64)
        if tokens <= min(inputs, delta.shape[-1]):
            if factor is None:
                factor = _cholesky(xp, x @ _transpose(xp, x))
            core = _transpose(xp, factor) @ (delta @ _transpose(xp, delta)) @ factor
        else:
            gradient = _transpose(xp, delta) @ x
            if gradient.shape[-2] > gradient.shape[-1]:
                gradient = _transpose(xp, gradient)
            core = gradient @ _transpose(xp, gradient)
        squares = xp.linalg.eigvalsh(core)[..., ::-1]
        results.append(xp.sqrt(xp.maximum(squares, 0)))
    return results


def _cholesky(xp: Any, gram: Any) -> Any:
    """The factor of a Gram matrix, shifted; zero for a zero matrix (no attention output)."""
    trace = xp.trace(gram, axis1=-2, axis2=-1)[..., None, None]
    shift = xp.where(trace > 0, _GRAM_SHIFT * trace, 1.0)
    factor = xp.linalg.cholesky(gram + shift * xp.eye(gram.shape[-1], dtype=gram.dtype))
    return xp.where(trace > 0, factor, 0.0)


def _qr_route(xp: Any, x: Any, deltas: list[Any]) -> list[Any]:
    x = x.astype(xp.float32)
    tokens, inputs = x.shape[-2:]
    x_triangle = None
    results = []
    for delta in deltas:
        delta = delta.astype(xp.float32)
        if tokens <= min(inputs, delta.shape[-1]):
            if x_triangle is None:
                x_triangle = xp.linalg.qr(_transpose(xp, x), mode="r")
            delta_triangle = xp.linalg.qr(_transpose(xp, delta), mode="r")
            core = delta_triangle @ _transpose(xp, x_triangle)
        else:
            gradient = _transpose(xp, delta) @ x
            if gradient.shape[-2] < gradient.shape[-1]:
                gradient = _transpose(xp, gradient)
            core = xp.linalg.qr(gradient, mode="r")
        results.append(xp.linalg.svd(core, compute_uv=False))
    return results


def _transpose(xp: Any, matrix: Any) -> Any:
    return xp.swapaxes(matrix, -1, -2)
