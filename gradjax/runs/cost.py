"""What a run will need, worked out from shapes alone: batches, memory, FLOPs, time.

Printed by `--plan`, and the reason why a run that cannot fit is refused before a weight is read.
Sizes follow what the compiled programs hold (tests/plan_test.py compares the two).
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gradjax.config import SpectraConfig
from gradjax.data.batches import BatchSpec
from gradjax.device import device_memory
from gradjax.errors import GradjaxError
from gradjax.gradients.factored import HEAD_CHUNK, activation_bytes
from gradjax.model.config import DecoderConfig
from gradjax.model.layers import einsum
from gradjax.model.parameters import Parameter, all_parameters, axis_sizes, block_parameters
from gradjax.sharding import AXES, TENSOR, split_axes
from gradjax.spectra.batch import LAYERS_AHEAD
from gradjax.spectra.decompose import decomposes_on_host
from gradjax.structs import TokenizedExample

# Share of a device's memory that kept activations may take; what is above that is recomputed.
_ACTIVATIONS_SHARE = 0.25
# JAX itself, the runtime and fragmentation.
_USABLE = 0.95


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on the fullest device at the fullest moment."""

    weights: int
    block_inputs: int  # or all activations of the blocks, where these are kept
    factors: int  # X and Δ of the layers whose spectra are in the making, and their gradients
    workspace: int  # of the fullest program

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.block_inputs + self.factors + self.workspace


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a run goes on its devices. Tokens are padded ones where not said otherwise."""

    batches: tuple[BatchSpec, ...]
    rows: int
    tokens: int  # of the rows themselves
    mesh: dict[str, int]
    memory: Memory
    keeps_activations: bool  # in the fullest batch
    flops: float  # of the model's passes, in its dtype
    float64_flops: float  # of the spectra

    @property
    def padded_tokens(self) -> int:
        """Tokens computed, padding and filler included."""
        return sum(batch.size * batch.length for batch in self.batches)


def make_plan(
    model: DecoderConfig,
    config: SpectraConfig,
    tokenized: Sequence[TokenizedExample],
    batches: Sequence[BatchSpec],
    dtype: str,
    mesh: dict[str, int],
) -> Plan:
    """The plan of computing `batches` of `tokenized` on a mesh of the given axis sizes."""
    itemsize = jnp.dtype(dtype).itemsize
    shapes = {(batch.size, batch.length): batch for batch in batches}
    needs = {
        shape: fitting_memory(model, config, batch, itemsize, mesh)
        for shape, batch in shapes.items()
    }
    alone = Memory(weight_bytes(model, itemsize, mesh), 0, 0, 0)
    memory, keeps = max(needs.values(), key=lambda need: need[0].total, default=(alone, True))
    passes = {
        shape: batch_flops(model, config, batch, needs[shape][1]) for shape, batch in shapes.items()
    }
    decompositions: dict[int, float] = {}
    if config.spectrum == "factored":
        lengths = {tokenized[row].num_tokens for batch in batches for row in batch.rows}
        decompositions = {length: spectra_flops(model, config, length) for length in lengths}
    targets = sum(tokenized[row].num_target_tokens for batch in batches for row in batch.rows)
    return Plan(
        tuple(batches),
        sum(len(batch.rows) for batch in batches),
        sum(tokenized[row].num_tokens for batch in batches for row in batch.rows),
        mesh,
        memory,
        keeps,
        sum(passes[batch.size, batch.length] for batch in batches)
        + 4.0 * model.vocab_size * model.hidden_size * targets,
        sum(
            decompositions.get(tokenized[row].num_tokens, 0.0)
            for batch in batches
            for row in batch.rows
        ),
    )


def weight_bytes(model: DecoderConfig, itemsize: int, mesh: dict[str, int]) -> int:
    """Bytes of the weights on one device."""
    return itemsize * sum(_part(model, p, mesh) for p in all_parameters(model).values())


def fitting_memory(
    model: DecoderConfig,
    config: SpectraConfig,
    batch: BatchSpec,
    itemsize: int,
    mesh: dict[str, int],
) -> tuple[Memory, bool]:
    """What a batch needs, and whether its activations are kept: they are where they fit."""
    on_host = decomposes_on_host(jax.default_backend())
    needs = partial(batch_memory, model, config, batch, itemsize, mesh, on_host=on_host)
    keep, available = needs(keep_activations=True), device_memory()
    if keep.block_inputs <= _ACTIVATIONS_SHARE * available and keep.total <= available / 2:
        return keep, True
    return needs(keep_activations=False), False


def batch_memory(
    model: DecoderConfig,
    config: SpectraConfig,
    batch: BatchSpec,
    itemsize: int,
    mesh: dict[str, int],
    *,
    keep_activations: bool,
    on_host: bool = True,
) -> Memory:
    """What a batch needs on one device when the backward pass begins, the fullest moment.

    `on_host`: the spectra's decompositions, which else need workspace on the device.
    """
    rows = batch.size // math.prod(mesh.values())
    tokens = rows * batch.length
    layers = config.layer_numbers(model.num_layers)
    sizes = axis_sizes(model)
    wide, narrow, mlp, width = sizes["Q"], sizes["C"], sizes["F"], sizes["D"]
    stream = tokens * width * itemsize

    activations = tokens * activation_bytes(model, itemsize)
    kept = (model.num_layers - min(layers)) * (activations if keep_activations else stream)

    factors = tokens * (2 * width + 2 * wide + 2 * narrow) * itemsize
    entries = sum(math.prod(_shape(model, p)) for p in config.projections)
    held = len(layers) if config.similarity == "all" else min(2, len(layers))
    gradients = 4 * rows * entries * held
    alive = factors * min(LAYERS_AHEAD + 1, len(layers)) + gradients

    block = block_parameters(model, layer=0).values()
    gathered = itemsize * sum(
        math.prod(p.shape(model)) // _parts(model, p, mesh, (TENSOR,)) - _part(model, p, mesh)
        for p in block
    )
    table = all_parameters(model)["embedding"]
    whole_table = itemsize * (math.prod(table.shape(model)) - _part(model, table, mesh))
    head = whole_table + 2 * 4 * min(HEAD_CHUNK, tokens) * model.vocab_size + 2 * stream
    backward = (
        gathered
        + (0 if keep_activations else activations)
        + 2 * stream
        + tokens * (4 * mlp + 3 * width) * itemsize
    )
    decomposing = 0
    if not on_host:
        # Float64 copies of X and of one Δ, and the core in ten stages of its way to its values.
        core = min(batch.length, max(min(_shape(model, p)) for p in config.projections))
        decomposing = 8 * (tokens * (width + wide) + 10 * rows * core**2)
    workspace = max(head, backward, decomposing)
    return Memory(weight_bytes(model, itemsize, mesh), kept, alive, workspace)


def batch_flops(
    model: DecoderConfig, config: SpectraConfig, batch: BatchSpec, keeps_activations: bool
) -> float:
    """Multiplications and additions of a batch's passes, without the output head's.

    The floor is a forward pass and the backward pass of the inputs: four per weight and token.
    """
    tokens = batch.size * batch.length
    layers = config.layer_numbers(model.num_layers)
    below, above = min(layers), model.num_layers - min(layers)
    weights = sum(math.prod(p.shape(model)) for p in block_parameters(model, 0).values())
    wide = axis_sizes(model)["Q"]
    # Causal: half of T×T. Two products forward; the backward pass makes the scores again.
    forward = 2 * weights * tokens + 2 * wide * batch.length * tokens
    backward = 2 * weights * tokens + 5 * wide * batch.length * tokens
    again = 0 if keeps_activations else forward
    gradients = 2 * tokens * sum(math.prod(_shape(model, p)) for p in config.projections)
    return float((below + above) * forward + above * (backward + again) + len(layers) * gradients)


def spectra_flops(model: DecoderConfig, config: SpectraConfig, length: int) -> float:
    """Multiplications and additions of a row's singular values by the Gram route."""
    total, shared = 0.0, 0.0
    for projection in config.projections:
        outputs, inputs = _shape(model, projection)
        rank = min(length, outputs, inputs)
        if length <= min(outputs, inputs):
            # q, k and v share XXᵀ and its factor.
            first = 2 * length**2 * inputs + length**3 / 3
            total += first if projection == "o" or not shared else 0
            shared = first if projection != "o" else shared
            total += 2 * length**2 * outputs + 4 * length**3
        else:
            total += 2 * length * outputs * inputs + 2 * rank * outputs * inputs
        total += 4 / 3 * rank**3
    return total * len(config.layer_numbers(model.num_layers))


def measured_rate(dtype: str) -> float:
    """Multiplications and additions per second of one device's matrix products, at this moment."""
    side = 1024 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((side, side), jnp.dtype(dtype))
    multiply = jax.jit(lambda a: einsum("ij,jk->ik", a, a))
    return _rate(lambda: multiply(a).block_until_ready(), 2 * side**3)


def measured_host_rate() -> float:
    """The same of the host's float64 products."""
    a = np.ones((512, 512))
    return _rate(lambda: a @ a, 2 * 512**3)


def _rate(work: Callable[[], object], flops: float) -> float:
    work()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return flops / float(np.median(seconds))


def format_plan(plan: Plan, dtype: str, seconds: float) -> str:
    """The plan for a terminal."""
    devices = math.prod(plan.mesh.values())
    memory = plan.memory
    mesh = ",".join(f"{axis}:{plan.mesh[axis]}" for axis in AXES)
    padding = 1 - plan.tokens / max(plan.padded_tokens, 1)
    shapes = {(batch.size, batch.length): 0 for batch in plan.batches}
    for batch in plan.batches:
        shapes[batch.size, batch.length] += 1
    kept = "activations" if plan.keeps_activations else "block inputs"
    parts = {
        "weights": memory.weights,
        kept: memory.block_inputs,
        "factors": memory.factors,
        "workspace": memory.workspace,
        "together": memory.total,
    }
    return "\n".join(
        [
            f"rows        {plan.rows:,} of {plan.tokens:,} tokens, {padding:.1%} padding",
            *(
                f"batches     {count:,} of {size} × {length:,} tokens"
                for (size, length), count in shapes.items()
            ),
            f"devices     {devices} ({mesh}), {dtype}",
            *(f"{name:<11} {_size(size)} per device" for name, size in parts.items()),
            f"work        {plan.flops:.2e} FLOPs, {plan.float64_flops:.2e} in float64",
            f"time        about {_duration(seconds)} at this machine's speed of matrix products",
        ]
    )


def estimated_seconds(plan: Plan, dtype: str) -> float:
    """What the work takes at the rates measured now, on as many devices like this one."""
    devices = math.prod(plan.mesh.values())
    return plan.flops / measured_rate(dtype) / devices + plan.float64_flops / measured_host_rate()


def fits(plan: Plan) -> bool:
    """Whether it fits a device like those here."""
    return plan.memory.total <= _USABLE * device_memory()


def require_fit(plan: Plan, remedies: Iterable[tuple[str, Plan]]) -> None:
    """Refuses a plan that does not fit a device's memory.

    `remedies` are flags and the plans that they lead to.

    Raises:
      GradjaxError: naming the first flag that would make it fit.
    """
    if fits(plan):
        return
    available = device_memory()
    remedy = next((flag for flag, changed in remedies if fits(changed)), None)
    advice = f"use {remedy}" if remedy else "use larger or more devices (--mesh=fsdp:N)"
    raise GradjaxError(
        f"the run needs {_size(plan.memory.total)} per device, {_size(plan.memory.weights)} of "
        f"them for weights, and a device has {_size(available)}; {advice}"
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"


def _shape(model: DecoderConfig, projection: str) -> tuple[int, ...]:
    return block_parameters(model, layer=0)[projection].shape(model)


def _part(model: DecoderConfig, parameter: Parameter, mesh: dict[str, int]) -> int:
    """Entries of a weight on one device."""
    return math.prod(parameter.shape(model)) // _parts(model, parameter, mesh, AXES)


def _parts(
    model: DecoderConfig, parameter: Parameter, mesh: dict[str, int], along: Sequence[str]
) -> int:
    """How many parts some mesh axes split a weight into."""
    split = split_axes(mesh, parameter.axes, parameter.shape(model))
    return math.prod(mesh[axis] for mesh_axes in split for axis in mesh_axes if axis in along)
