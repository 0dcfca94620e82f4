"""Where the singular values of a layer's factors are computed: host pool, device, or both."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import threadpoolctl
from jax.sharding import Mesh
from jaxtyping import Array, Float

from gradjax.config import SpectraConfig
from gradjax.errors import GradjaxError
from gradjax.gradients.causality import Contributing
from gradjax.model.layers import einsum
from gradjax.sharding import EVERYWHERE, EXAMPLES, local_examples
from gradjax.spectra.measures import Gradients
from gradjax.spectra.singular_values import (
    PANEL,
    Route,
    gram_singular_values,
    matrix_singular_values,
    triangle,
)
from gradjax.structs import Factors, Projection, sharing_inputs

# Values per projection: one array [R] per example.
Values = dict[Projection, list[np.ndarray]]
# `form_gradients` of a layer: its gradients, divided, and the divisors.
Formed = tuple[Gradients, dict[Projection, Float[Array, " B"]]]
# Starts on a layer's factors, Δ zero where tokens do not contribute, its gradients, and which of
# the tokens of this process's examples do contribute; the returned call waits for their values.
Decompose = Callable[[Factors, Formed, Contributing], Callable[[], Values]]

# `triangle` takes seconds to compile: it is for this many rows, or a larger power of two.
_FEWEST_ROWS = 512
# Tokens, as a share of min(O, I), up to which the Gram route's core is cheaper than G itself:
# operations 2τ² + 8τ³ against 5, of which the eigenvalues take 4τ³ and 4.
_FACTORS_UP_TO = 0.75
# Cubes of cores' sides, summed, that are worth a task of the pool: about a millisecond of a core.
_TASK = 4e6


def allowed_routes(platform: str) -> tuple[Route, ...]:
    """The routes that a platform can run, the default first.

    A TPU emulates float64: its compiler needs hours for what `gram` asks of it.
    """
    return ("qr",) if platform == "tpu" else ("gram", "qr")


def resolved_route(config: SpectraConfig, platform: str) -> Route | None:
    """The route of a run on a platform; None where whole gradients are decomposed.

    Raises:
      GradjaxError: if the platform cannot run the route that is asked for.
    """
    if config.spectrum == "dense":
        return None
    routes = allowed_routes(platform)
    route = routes[0] if config.spectrum_route == "auto" else config.spectrum_route
    if route not in routes:
        raise GradjaxError(
            f"--spectrum_route={route} needs float64, which a {platform.upper()} only emulates; "
            f"expected auto or {' or '.join(routes)} there"
        )
    return route


def decomposes_on_host(platform: str) -> bool:
    """Whether the host pool is the faster place for `gram`: on CPUs, assumed not elsewhere."""
    return platform == "cpu"


def host_bytes(shapes: Iterable[tuple[int, ...]], length: int) -> int:
    """Bytes that the pool's threads hold at the most, each with a matrix of some [O, I].

    Args:
      length: tokens of the longest row.
    """

    def held(outputs: int, inputs: int) -> int:
        side = min(outputs, inputs)
        if length <= _FACTORS_UP_TO * side:
            # X and one Δ in both formats; six cores: Grams, a factor, products, LAPACK's copy.
            return 12 * length * (inputs + outputs) + 8 * 6 * length**2
        # The matrix in both formats, its Gram matrix, and LAPACK's copy of that.
        return 12 * outputs * inputs + 8 * 2 * side**2

    return _workers() * max(held(*shape) for shape in shapes)


def _workers() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def decomposer(
    route: Route, projections: tuple[Projection, ...], mesh: Mesh, *, on_host: bool
) -> Iterator[Decompose]:
    """A way to singular values.

    `gram` works on the host with LAPACK's values-only drivers on a pool of one thread per core,
    while the devices go on (JAX's `eigvalsh` computes vectors as well); if not `on_host`, batched
    on the mesh's devices. `qr` makes cores on the devices, and their values come from the pool.
    """
    if route == "gram" and not on_host:
        yield partial(_on_device, mesh, projections)
        return
    # Tasks are parallel already: more than one BLAS thread each would make them wait.
    with threadpoolctl.threadpool_limits(1, "blas"), ThreadPoolExecutor(_workers()) as pool:
        if route == "gram":
            yield partial(_on_host, pool, projections)
        else:
            yield partial(_on_both, pool, mesh, projections)


def _fetch(pool: ThreadPoolExecutor, arrays: Any) -> Future[Any]:
    """This process's examples of a tree of arrays, once the devices have made them."""
    # A jax.Array lists its shards when first asked for them, and threads that ask at once can get a
    # wrong list, with it another row's numbers (jax 0.10.2): they are listed here, and one thread
    # fetches them, since that waits for the device. The others wait for what came before them.
    for array in jax.tree.leaves(arrays):
        _ = array.addressable_shards
    return pool.submit(jax.tree.map, local_examples, arrays)


class _Job(NamedTuple):
    """Gradients of a row whose values are computed together."""

    row: int
    projections: tuple[Projection, ...]
    tokens: np.ndarray | None  # of the factors; None: the gradient itself is decomposed
    side: int  # of each core


def _jobs(
    projections: tuple[Projection, ...], gradients: Gradients, contributing: Contributing
) -> Iterator[_Job]:
    for group in sharing_inputs(projections):
        smaller = {p: min(gradients[p].shape[1:]) for p in group}
        # Other tokens add nothing to G but a row to the core.
        for row, mask in enumerate(np.any([contributing[p] for p in group], axis=0)):
            tokens = np.flatnonzero(mask) if mask.any() else np.zeros(1, np.intp)
            few: tuple[Projection, ...] = tuple(
                p for p in group if len(tokens) <= _FACTORS_UP_TO * smaller[p]
            )
            if few:
                yield _Job(row, few, tokens, len(tokens))
            for projection in group:
                if projection not in few:
                    yield _Job(row, (projection,), None, smaller[projection])


def _tasks(jobs: Iterator[_Job]) -> Iterator[list[_Job]]:
    """The jobs, small ones several at a time: one thread hands them to all others."""
    task: list[_Job] = []
    work = 0
    for job in jobs:
        task.append(job)
        work += len(job.projections) * job.side**3
        if work >= _TASK:
            yield task
            task, work = [], 0
    if task:
        yield task


def _on_host(
    pool: ThreadPoolExecutor,
    projections: tuple[Projection, ...],
    factors: Factors,
    formed: Formed,
    contributing: Contributing,
) -> Callable[[], Values]:
    fetched = _fetch(pool, (factors, *formed))
    tasks = list(_tasks(_jobs(projections, formed[0], contributing)))

    def work(task: list[_Job]) -> list[list[np.ndarray]]:
        host = fetched.result()
        return [_host_values(host, job) for job in task]

    futures = [pool.submit(work, task) for task in tasks]

    def wait() -> Values:
        values: Values = {p: [np.zeros(0)] * len(contributing[p]) for p in projections}
        for task, future in zip(tasks, futures, strict=True):
            for job, found in zip(task, future.result(), strict=True):
                for projection, row_values in zip(job.projections, found, strict=True):
                    values[projection][job.row] = row_values
        return cut_values(values, contributing)

    return wait


def _host_values(host: Any, job: _Job) -> list[np.ndarray]:
    """Values of each of a job's projections, from factors and gradients fetched to the host."""
    factors, gradients, scales = host
    row, tokens = job.row, job.tokens
    if tokens is None:
        return [_finite_values(gradients[p][row]) * float(scales[p][row]) for p in job.projections]
    x = factors.of(job.projections[0])[0][row, tokens]
    deltas = [factors.of(projection)[1][row, tokens] for projection in job.projections]
    if not all(np.isfinite(array).all() for array in (x, *deltas)):
        return [np.full(1, np.nan)] * len(deltas)
    return gram_singular_values(np, x, deltas)


def _finite_values(matrix: Float[np.ndarray, "O I"]) -> Float[np.ndarray, " R"]:
    """Singular values of a matrix; NaN where an entry is not finite."""
    if not np.isfinite(matrix).all():
        return np.full(min(matrix.shape), np.nan)
    return matrix_singular_values(np, matrix)


def cut_values(values: Values, contributing: Contributing) -> Values:
    """The values that can be other than zero: as many as tokens contribute, at least one."""
    return {
        projection: [
            row_values[: max(int(count), 1)]
            for row_values, count in zip(rows, contributing[projection].sum(axis=1), strict=True)
        ]
        for projection, rows in values.items()
    }


@partial(jax.jit, static_argnums=(0, 1))
def device_values(
    mesh: Mesh, projections: tuple[Projection, ...], factors: Factors, formed: Formed
) -> dict[Projection, Float[Array, "B R"]]:
    """Singular values on the mesh, each device's of its own examples."""
    tokens = factors.batch_shape[1]

    def own(factors: Factors, formed: Formed) -> dict[Projection, Array]:
        gradients, scales = formed
        values = {}
        for group in sharing_inputs(projections):
            few: list[Projection] = [p for p in group if tokens <= min(gradients[p].shape[1:])]
            if few:
                deltas = [factors.of(projection)[1] for projection in few]
                found = gram_singular_values(jnp, factors.of(few[0])[0], deltas)
                values.update(zip(few, found, strict=True))
            for p in set(group).difference(few):
                scale = scales[p].astype(jnp.float64)[:, None]
                values[p] = matrix_singular_values(jnp, gradients[p]) * scale
        return values

    return _on_mesh(mesh, own, EXAMPLES)(factors, formed)


def _on_device(
    mesh: Mesh,
    projections: tuple[Projection, ...],
    factors: Factors,
    formed: Formed,
    contributing: Contributing,
) -> Callable[[], Values]:
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        values = device_values(mesh, projections, factors, formed)

    def wait() -> Values:
        fetched: Values = {p: list(local_examples(values[p])) for p in projections}
        return cut_values(fetched, contributing)

    return wait


def _on_both(
    pool: ThreadPoolExecutor,
    mesh: Mesh,
    projections: tuple[Projection, ...],
    factors: Factors,
    formed: Formed,
    contributing: Contributing,
) -> Callable[[], Values]:
    rows, length = factors.batch_shape
    rows //= mesh.size  # of each device
    futures: dict[tuple[Projection, int], Future] = {}

    def work(fetched: Future, projection: Projection, device: int, tokens: int) -> np.ndarray:
        core = fetched.result()[projection][device]
        # A core of factors is zero from where the row's padding begins.
        return _finite_values(core[:tokens, :tokens] if len(core) == length else core)

    for row in range(rows):
        fetched = _fetch(pool, _row_cores(mesh, projections, factors, formed, row))
        for projection in projections:
            for device, own in enumerate(contributing[projection][row::rows]):
                tokens = int(max(np.flatnonzero(own), default=0)) + 1
                futures[projection, device * rows + row] = pool.submit(
                    work, fetched, projection, device, tokens
                )

    def wait() -> Values:
        values: Values = {
            p: [futures[p, slot].result() for slot in range(len(contributing[p]))]
            for p in projections
        }
        return cut_values(values, contributing)

    return wait


def _row_cores(
    mesh: Mesh, projections: tuple[Projection, ...], factors: Factors, formed: Formed, row: int
) -> dict[Projection, Float[Array, "_devices R R"]]:
    """Of one row of each device, matrices with the singular values of its gradients."""
    length, cores = factors.batch_shape[1], {}

    def pick(matrix: Array, scale: Array | None = None) -> tuple[Array, Array]:
        return row_operand(mesh, matrix, scale, row)

    def reduced(matrix: Array, scale: Array | None = None) -> tuple[Array, Array]:
        unit, scale = pick(matrix, scale)
        return row_triangle(mesh, unit, -(-min(matrix.shape[1:]) // PANEL)), scale

    with jax.default_matmul_precision("highest"):
        for group in sharing_inputs(projections):
            shared = None
            for projection in group:
                x, delta = factors.of(projection)
                outputs, inputs = delta.shape[-1], x.shape[-1]
                if length <= min(outputs, inputs):
                    shared = shared or reduced(x)
                    lower, scale = reduced(delta)
                    core, scale = row_product(mesh, lower, shared[0]), scale * shared[1]
                else:
                    gradient = formed[0][projection], formed[1][projection]
                    # QR makes a square gradient no smaller.
                    reduce = pick if outputs == inputs else reduced
                    core, scale = reduce(*gradient)
                core = _scaled(core, scale, min(length, outputs, inputs))
                core.copy_to_host_async()
                cores[projection] = core
    return cores


def padded_side(rows: int) -> int:
    """What `row_operand` pads so many rows to."""
    return max(_FEWEST_ROWS, 1 << (rows - 1).bit_length())


@partial(jax.jit, static_argnums=0)
def row_operand(
    mesh: Mesh,
    matrices: Float[Array, "B _rows _columns"],
    scales: Float[Array, " B"] | None,
    row: Array | int,
) -> tuple[Float[Array, "_devices W I"], Float[Array, " _devices"]]:
    """Each device's matrix number `row`, float32, for `row_triangle`: and what to multiply it by.

    Its shorter side comes first and is padded to a size that many batches share.
    """

    def own(matrices: Array, scales: Array | None, row: Array) -> tuple[Array, Array]:
        matrix = matrices[row].astype(jnp.float32)
        matrix = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
        largest = jnp.abs(matrix).max()
        largest = jnp.where(largest > 0, largest, 1)
        rows, columns = matrix.shape
        padded = padded_side(rows)
        unit = jnp.pad(matrix / largest, ((0, padded - rows), (0, max(PANEL - columns, 0))))
        return unit[None], (largest if scales is None else largest * scales[row])[None]

    return _on_mesh(mesh, own, (EXAMPLES, EXAMPLES, EVERYWHERE))(matrices, scales, row)


@partial(jax.jit, static_argnums=0)
def row_triangle(
    mesh: Mesh, matrices: Float[Array, "_devices W I"], panels: Array | int
) -> Float[Array, "_devices W W"]:
    """`triangle` of each device's matrix."""

    def own(matrices: Array, panels: Array) -> Array:
        return triangle(matrices[0], panels)[None]

    return _on_mesh(mesh, own, (EXAMPLES, EVERYWHERE))(matrices, panels)


@partial(jax.jit, static_argnums=0)
def row_product(
    mesh: Mesh, a: Float[Array, "_devices W W"], b: Float[Array, "_devices W W"]
) -> Float[Array, "_devices W W"]:
    """`AᵀB` on each device."""
    return _on_mesh(mesh, partial(einsum, "bti,btj->bij"), EXAMPLES)(a, b)


@partial(jax.jit, static_argnums=2)
def _scaled(
    cores: Float[Array, "_devices W _width"], scales: Float[Array, " _devices"], side: int
) -> Float[Array, "_devices R R"]:
    """Without what `row_operand` padded, and times what it divided by."""
    return cores[:, :side, :side] * scales[:, None, None]


def _on_mesh(mesh: Mesh, function: Callable, in_specs: Any) -> Callable:
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=EXAMPLES, check_vma=False
    )
