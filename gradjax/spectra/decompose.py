"""Where the singular values of a layer's factors are computed: host pool or device."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import threadpoolctl
from jax.sharding import Mesh
from jaxtyping import Array, Float

from gradjax.config import SpectraConfig
from gradjax.errors import GradjaxError
from gradjax.gradients.causality import Contributing
from gradjax.sharding import EXAMPLES, local_examples
from gradjax.spectra.singular_values import Route, factor_singular_values
from gradjax.structs import Factors, Projection

# Values per projection: one array [R] per example.
Values = dict[Projection, list[np.ndarray]]
# Starts on a layer's factors, zero where tokens do not contribute, and which of the tokens of this
# process's examples do; the returned call waits for their values.
Decompose = Callable[[Factors, Contributing], Callable[[], Values]]


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
    """Whether the host pool is the faster place: measured on CPUs, assumed not elsewhere."""
    return platform == "cpu"


@contextmanager
def decomposer(
    route: Route, projections: tuple[Projection, ...], mesh: Mesh, *, on_host: bool
) -> Iterator[Decompose]:
    """A way to singular values.

    On the host, LAPACK's values-only drivers on a pool of one thread per core, while the devices
    go on (JAX's `eigvalsh` computes vectors as well); else batched on the mesh's devices.
    """
    if not on_host:
        yield partial(_on_device, mesh, route, projections)
        return
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # Tasks are parallel already: more than one BLAS thread each would make them wait.
    with threadpoolctl.threadpool_limits(1, "blas"), ThreadPoolExecutor(workers) as pool:
        yield partial(_on_host, pool, route, projections)


def _sharing_inputs(projections: tuple[Projection, ...]) -> list[tuple[Projection, ...]]:
    """q, k and v have one input, o another."""
    shared: tuple[Projection, ...] = tuple(p for p in projections if p != "o")
    own: tuple[Projection, ...] = ("o",) if "o" in projections else ()
    return [group for group in (shared, own) if group]


def _on_host(
    pool: ThreadPoolExecutor,
    route: Route,
    projections: tuple[Projection, ...],
    factors: Factors,
    contributing: Contributing,
) -> Callable[[], Values]:
    # A jax.Array lists its shards when first asked for them, and threads that ask at once can get a
    # wrong list, with it another row's numbers (jax 0.10.2): they are listed here, and one thread
    # fetches them, since that waits for the device. The others wait for what came before them.
    for array in jax.tree.leaves(factors):
        _ = array.addressable_shards
    fetched: Future[Any] = pool.submit(jax.tree.map, local_examples, factors)

    def work(group: tuple[Projection, ...], row: int) -> list[np.ndarray]:
        # Other tokens add nothing to G but a row to the core.
        tokens = np.flatnonzero(np.any([contributing[p][row] for p in group], axis=0))
        if not len(tokens):
            tokens = np.zeros(1, np.intp)  # a zero gradient keeps one, which is zero
        host = fetched.result()
        x = host.of(group[0])[0][row, tokens]
        deltas = [host.of(projection)[1][row, tokens] for projection in group]
        if not all(np.isfinite(array).all() for array in (x, *deltas)):
            return [np.full(1, np.nan)] * len(group)
        return factor_singular_values(np, route, x, deltas)

    rows = len(contributing[projections[0]])
    futures = {
        (group, row): pool.submit(work, group, row)
        for group in _sharing_inputs(projections)
        for row in range(rows)
    }

    def wait() -> Values:
        values: Values = {projection: [] for projection in projections}
        for (group, _), future in futures.items():
            for projection, row_values in zip(group, future.result(), strict=True):
                values[projection].append(row_values)
        return cut_values(values, contributing)

    return wait


def cut_values(values: Values, contributing: Contributing) -> Values:
    """The values that can be other than zero: as many as tokens contribute, at least one."""
    return {
        projection: [
            row_values[: max(int(count), 1)]
            for row_values, count in zip(rows, contributing[projection].sum(axis=1), strict=True)
        ]
        for projection, rows in values.items()
    }


@partial(jax.jit, static_argnums=(0, 1, 2))
def device_values(
    mesh: Mesh,
    route: Route,
    projections: tuple[Projection, ...],
    factors: Factors,
) -> dict[Projection, Float[Array, "B R"]]:
    """Singular values on the mesh, each device's of its own examples."""

    def own(factors: Factors) -> dict[Projection, Array]:
        values = {}
        for group in _sharing_inputs(projections):
            deltas = [factors.of(projection)[1] for projection in group]
            found = factor_singular_values(jnp, route, factors.of(group[0])[0], deltas)
            values.update(zip(group, found, strict=True))
        return values

    on_mesh = jax.shard_map(own, mesh=mesh, in_specs=EXAMPLES, out_specs=EXAMPLES, check_vma=False)
    return on_mesh(factors)


def _on_device(
    mesh: Mesh,
    route: Route,
    projections: tuple[Projection, ...],
    factors: Factors,
    contributing: Contributing,
) -> Callable[[], Values]:
    with jax.enable_x64(route == "gram"), jax.default_matmul_precision("highest"):
        values = device_values(mesh, route, projections, factors)

    def wait() -> Values:
        fetched: Values = {p: list(local_examples(values[p])) for p in projections}
        return cut_values(fetched, contributing)

    return wait
