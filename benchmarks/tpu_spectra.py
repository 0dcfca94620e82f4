"""Three ways to a gradient's singular values on a TPU: cost of compiling, errors, host's work.

  python -m benchmarks.tpu_spectra --sides=512
  python -m benchmarks.tpu_spectra --sides=512,1024,2048,3584 --ways=cores

  cores     what gradjax does: triangles of X and Δ and their product on the device, the float64
            values of that T × T core on the host
  svd       XLA's own singular values of a core on a TPU: polar decomposition (QDWH), then the
            Hermitian eigenproblem
  jacobi    one-sided block Jacobi of a core: products and eigenproblems of two panels at a time

Compiled for a TPU v5e (see benchmarks.deviceless); errors, relative to σ₁ of float64, are those of
the same operations in float32 on this CPU, of a random and of an ill-conditioned gradient. `host s`
is one thread's work on one core. Factors are 3,584 wide (Qwen2.5-7B).
"""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import threadpoolctl
from absl import flags
from jaxtyping import Array, Float

from gradjax.cli.app import start
from gradjax.device import parse_topology
from gradjax.runs.compilers import absent_devices, compiled
from gradjax.runs.programs import Program
from gradjax.sharding import EXAMPLES, make_mesh
from gradjax.spectra.singular_values import PANEL, matrix_singular_values, triangle

WIDTH = 3584
SWEEPS = 10

flags.DEFINE_list("sides", ["512"], "T, and with it of the core; multiples of 256")
flags.DEFINE_list("ways", ["cores", "svd", "jacobi"], "some of them, separated by commas")


def core(x: Float[Array, "T I"], delta: Float[Array, "T O"]) -> Float[Array, "T T"]:
    """A matrix with the singular values of `ΔᵀX`, T at most O and I."""
    panels = jnp.int32(len(x) // PANEL)
    return triangle(delta, panels).T @ triangle(x, panels)


def xla_values(core: Float[Array, "T T"]) -> Float[Array, " T"]:
    """What `jnp.linalg.svd` becomes on a TPU, on any platform."""
    from jax._src.tpu.linalg.svd import svd  # no public name

    return svd(core, full_matrices=False, compute_uv=False)


def jacobi_values(core: Float[Array, "T T"]) -> Float[Array, " T"]:
    """One-sided Jacobi of pairs of panels: rows become orthogonal, values are their norms."""
    panels = len(core) // PANEL
    pairs = [(i, j) for i in range(panels) for j in range(i)]
    order = jnp.asarray(pairs, jnp.int32)

    def rotate(turn: Array, rows: Array) -> Array:
        i, j = order[turn % len(pairs)]
        parts = [jax.lax.dynamic_slice_in_dim(rows, k * PANEL, PANEL) for k in (i, j)]
        both = jnp.concatenate(parts)
        both = jnp.linalg.eigh(both @ both.T)[1].T @ both
        rows = jax.lax.dynamic_update_slice_in_dim(rows, both[:PANEL], i * PANEL, 0)
        return jax.lax.dynamic_update_slice_in_dim(rows, both[PANEL:], j * PANEL, 0)

    rows = jax.lax.fori_loop(0, SWEEPS * len(pairs), rotate, core)
    return jnp.sort(jnp.linalg.norm(rows, axis=1))[::-1]


def example(side: int, *, ill_conditioned: bool) -> tuple[np.ndarray, np.ndarray]:
    """X and Δ, float32 [T, 3584]; X's singular values from 1 to 1e-9 if ill-conditioned."""
    rng = np.random.default_rng(0)
    x, delta = (rng.standard_normal((side, WIDTH)) for _ in range(2))
    if ill_conditioned:
        u, _, vt = np.linalg.svd(x, full_matrices=False)
        x = (u * np.logspace(0, -9, side)) @ vt
    return x.astype(np.float32), delta.astype(np.float32)


def exact(x: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """Singular values of `ΔᵀX` in float64."""
    upper = [np.asarray(np.linalg.qr(m.T.astype(np.float64), mode="r")) for m in (x, delta)]
    return np.linalg.svd(upper[1] @ upper[0].T, compute_uv=False)


def host_values(core: np.ndarray) -> tuple[np.ndarray, float]:
    """Values of a core as gradjax takes them, and the seconds of one thread."""
    with threadpoolctl.threadpool_limits(1, "blas"):
        began = time.perf_counter()
        values = matrix_singular_values(np, core)
        return values, time.perf_counter() - began


def main(_: list[str]) -> None:
    """Prints a line per side and way."""
    device = parse_topology("v5e-1")[0]
    mesh = make_mesh({"data": 1}, absent_devices(device, 1))
    sharding = jax.sharding.NamedSharding(mesh, EXAMPLES)

    def figures(function: Callable, *shapes: tuple[int, int]) -> str:
        arguments = tuple(jax.ShapeDtypeStruct(s, jnp.float32, sharding=sharding) for s in shapes)
        found = compiled(Program(jax.jit(function), arguments))
        return f"{found.seconds:11.1f}{found.code / 2**20:10.1f}"

    print(
        f"{'T':>5} {'way':8}{'compile s':>11}{'code MiB':>10}{'random':>10}{'ill':>10}{'host s':>9}"
    )
    for side in map(int, flags.FLAGS.sides):
        cases = [example(side, ill_conditioned=ill) for ill in (False, True)]
        expected = [exact(*case) for case in cases]
        with jax.default_matmul_precision("highest"):
            cores = [np.asarray(jax.jit(core)(*case)) for case in cases]
        values: dict[str, Callable] = {"svd": xla_values, "jacobi": jacobi_values}
        for way in flags.FLAGS.ways:
            seconds = ""
            if way == "cores":
                line = figures(core, (side, WIDTH), (side, WIDTH))
                found, taken = zip(*map(host_values, cores), strict=True)
                seconds = f"{min(taken):9.3f}"
            else:
                line = figures(values[way], (side, side))
                with jax.default_matmul_precision("highest"):
                    found = [np.asarray(jax.jit(values[way])(matrix)) for matrix in cores]
            errors = [np.abs(f - e).max() / e[0] for f, e in zip(found, expected, strict=True)]
            print(f"{side:5} {way:8}{line}{errors[0]:10.1e}{errors[1]:10.1e}{seconds}", flush=True)


if __name__ == "__main__":
    start(main)
