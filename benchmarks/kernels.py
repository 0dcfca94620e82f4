"""The decompositions that spectra are made of, alone, over batches of matrices."""

import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import threadpoolctl

# Each takes [b, T, T], positive definite, in float64, apart from `qr` and `gram` with the wide
# inputs [b, T, D] of a projection (`qr` in float32, transposed) and `svd` in float32.
KERNELS = ("gram", "cholesky", "eigh", "eigh one by one", "eigh on host", "qr", "svd")


def kernel(name: str, batch: int, tokens: int, width: int) -> Callable[[], Any]:
    """The work of one kernel on random matrices; call it with 64-bit types enabled."""
    dtype = jnp.float32 if name in ("qr", "svd") else jnp.float64
    wide = jax.random.normal(jax.random.key(0), (batch, tokens, width), dtype)
    if name in ("gram", "qr"):
        matrices = wide
    else:
        # Columns of falling size: a gradient's spectrum falls as well.
        falling = jnp.exp(-10 * jnp.arange(width, dtype=dtype) / width)
        matrices = jax.jit(_gram)(wide * falling)
        matrices += 1e-6 * jnp.eye(tokens, dtype=dtype)
    if name == "eigh on host":
        return partial(_on_host, np.asarray(matrices))
    work = jax.jit(_WORK[name])
    return lambda: jax.block_until_ready(work(matrices))


def _gram(x: jax.Array) -> jax.Array:
    return jnp.einsum("bti,bsi->bts", x, x, precision=jax.lax.Precision.HIGHEST)


_WORK: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gram": _gram,
    "cholesky": jnp.linalg.cholesky,
    "eigh": jnp.linalg.eigvalsh,
    "eigh one by one": partial(jax.lax.map, jnp.linalg.eigvalsh),
    "qr": lambda x: jnp.linalg.qr(x.swapaxes(1, 2), mode="r"),
    "svd": partial(jnp.linalg.svd, compute_uv=False),
}


def _on_host(matrices: np.ndarray) -> list[np.ndarray]:
    cores = len(os.sched_getaffinity(0))
    with threadpoolctl.threadpool_limits(1, "blas"), ThreadPoolExecutor(cores) as pool:
        return list(pool.map(np.linalg.eigvalsh, matrices))


def measure_kernel(
    name: str, batch: int, tokens: int, width: int, repeats: int
) -> dict[str, float]:
    """Median seconds for the whole batch after a first call, which compiles."""
    with jax.enable_x64(True):
        work = kernel(name, batch, tokens, width)
        seconds = []
        for _ in range(repeats + 1):
            began = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began)
    return {"seconds": statistics.median(seconds[1:]), "first_seconds": seconds[0]}
