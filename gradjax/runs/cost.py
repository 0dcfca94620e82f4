"""What a run will need, worked out from shapes alone: batches, memory, FLOPs, time.

Printed by `--plan`, and the reason why a run that cannot fit is refused before a weight is read.
Sizes follow what the compiled programs hold (tests/plan_test.py compares the two).
"""

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradjax.config import SpectraConfig
from gradjax.data.batches import BatchSpec
from gradjax.device import Device
from gradjax.errors import GradjaxError
from gradjax.gradients.factored import HEAD_CHUNKS, VOCABULARY_CHUNK, activation_bytes
from gradjax.model.attention import CHUNKS
from gradjax.model.config import DecoderConfig
from gradjax.model.layers import einsum
from gradjax.model.parameters import Parameter, all_parameters, axis_sizes, block_parameters
from gradjax.sharding import AXES, TENSOR, format_mesh, split_axes
from gradjax.spectra.batch import LAYERS_AHEAD
from gradjax.spectra.decompose import (
    decomposes_on_host,
    host_bytes,
    padded_side,
    resolved_route,
)
from gradjax.structs import SAME_LAYER_PAIRS, TokenizedExample, factor_names, sharing_inputs

# Compressed bytes of a matrix's numbers, a singular value, a cosine and a byte of text in stores of
# the embedded example and of WizardLM rows.
_DISK_MATRIX, _DISK_VALUE, _DISK_COSINE, _DISK_TEXT = 43, 3.3, 6.6, 0.5
# Share of a device's memory that kept activations may take; what is above that is recomputed.
_ACTIVATIONS_SHARE = 0.25
# JAX itself, the runtime and fragmentation.
_USABLE = 0.95
# Where the devices are the host's own cores: Python, JAX and what else is loaded.
_PROCESS = 220 * 2**20


class _Holds(NamedTuple):
    """What a platform's compiled backward pass holds at once, at the fullest moments of its halves.

    Of the MLP: arrays of its width, and of the stream's. Of attention: bytes per pair of a query
    and a key of one chunk (float32, bfloat16), and arrays of the stream's width.
    """

    mlp: int
    mlp_stream: int
    scores: tuple[int, int]
    attention_stream: int


# Read off programs compiled for a CPU, H100 and v5e, whose compiler keeps in its vector memory what
# fits there.
_HOLDS = {
    "cpu": _Holds(4, 4, (16, 16), 4),
    "gpu": _Holds(2, 0, (8, 12), 2),
    "tpu": _Holds(1, 1, (8, 8), 1),
}
# Compiled for one padded shape: 20 to 34 MiB at the widths of 0.5B to 7B; elsewhere it is small.
_CODE = {"tpu": 24 * 2**20}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on the fullest device at the fullest moment."""

    weights: int
    block_inputs: int  # or all activations of the blocks, where these are kept
    factors: int  # X and Δ of the layers whose spectra are in the making, and their gradients
    workspace: int  # of the fullest program
    code: int = 0  # of all programs
    host: int = 0  # where its memory is the device's: the process, what its threads decompose

    @property
    def total(self) -> int:
        """All of them."""
        parts = (self.weights, self.block_inputs, self.factors, self.workspace, self.code)
        return sum(parts) + self.host


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a run goes on its devices. Tokens are padded ones where not said otherwise."""

    batches: tuple[BatchSpec, ...]
    rows: int
    tokens: int  # of the rows themselves
    device: Device
    mesh: dict[str, int]
    memory: Memory
    keeps_activations: bool  # in the fullest batch
    route: str  # to the singular values, and where they are computed
    flops: float  # of the model's passes, in its dtype
    spectra_flops: float
    fullest: BatchSpec | None  # the batch that needs the most memory; None of no batch
    targets: int  # tokens with loss

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
    device: Device,
) -> Plan:
    """The plan of computing `batches` of `tokenized` on a mesh of devices of one kind."""
    itemsize = jnp.dtype(dtype).itemsize
    shapes = shapes_of(batches)
    needs = {
        shape: fitting_memory(model, config, batch, itemsize, mesh, device)
        for shape, batch in shapes.items()
    }
    alone = Memory(weight_bytes(model, itemsize, mesh), 0, 0, 0)
    fullest = max(needs, key=lambda shape: needs[shape][0].total, default=None)
    memory, keeps = needs[fullest] if fullest else (alone, True)
    memory = dataclasses.replace(memory, code=memory.code * len(shapes))
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
        device,
        mesh,
        memory,
        keeps,
        _describe_route(config, device.platform),
        sum(passes[batch.size, batch.length] for batch in batches)
        + 4.0 * model.vocab_size * model.hidden_size * targets,
        sum(
            decompositions.get(tokenized[row].num_tokens, 0.0)
            for batch in batches
            for row in batch.rows
        ),
        shapes[fullest] if fullest else None,
        targets,
    )


def disk_bytes(
    model: DecoderConfig,
    config: SpectraConfig,
    tokenized: Sequence[TokenizedExample],
    text_bytes: int,
    *,
    singular_values: bool,
) -> int:
    """About what a run's store takes.

    Args:
      text_bytes: of all rows' questions and answers.
      singular_values: whether they are stored.
    """
    layers = len(config.layer_numbers(model.num_layers))
    count = len(config.projections)
    pairs = {"none": 0, "adjacent": layers - 1, "all": layers * (layers - 1) // 2}
    within = sum(set(pair) <= set(config.projections) for pair in SAME_LAYER_PAIRS)
    cosines = within * layers + count * pairs[config.similarity]
    row = layers * count * _DISK_MATRIX + cosines * _DISK_COSINE
    lengths = np.array([t.num_tokens for t in tokenized if t.status == "ok"], np.int64)
    total = len(lengths) * row + text_bytes * _DISK_TEXT
    if singular_values:
        sides = [min(_shape(model, projection)) for projection in config.projections]
        total += _DISK_VALUE * layers * sum(int(np.minimum(lengths, s).sum()) for s in sides)
    return int(total)


def shapes_of(batches: Iterable[BatchSpec]) -> dict[tuple[int, int], BatchSpec]:
    """A batch of every shape (rows, tokens)."""
    return {(batch.size, batch.length): batch for batch in batches}


def weight_bytes(model: DecoderConfig, itemsize: int, mesh: dict[str, int]) -> int:
    """Bytes of the weights on one device."""
    return itemsize * sum(_part(model, p, mesh) for p in all_parameters(model).values())


def fitting_memory(
    model: DecoderConfig,
    config: SpectraConfig,
    batch: BatchSpec,
    itemsize: int,
    mesh: dict[str, int],
    device: Device,
) -> tuple[Memory, bool]:
    """What a batch needs, and whether its activations are kept: they are where they fit."""
    needs = partial(batch_memory, model, config, batch, itemsize, mesh, device.platform)
    keep, available = needs(keep_activations=True), device.memory
    if keep.block_inputs <= _ACTIVATIONS_SHARE * available and keep.total <= available / 2:
        return keep, True
    return needs(keep_activations=False), False


def batch_memory(
    model: DecoderConfig,
    config: SpectraConfig,
    batch: BatchSpec,
    itemsize: int,
    mesh: dict[str, int],
    platform: str,
    *,
    keep_activations: bool,
    spaces: Mapping[str, int] | None = None,
) -> Memory:
    """What a batch needs on one device when the backward pass begins, the fullest moment.

    Args:
      spaces: bytes of programs as of `workspaces`, where a compiler says them.
    """
    rows = batch.size // math.prod(mesh.values())
    tokens = rows * batch.length
    layers = config.layer_numbers(model.num_layers)
    stream = tokens * model.hidden_size * itemsize

    activations = tokens * activation_bytes(model, itemsize)
    kept = (model.num_layers - min(layers)) * (activations if keep_activations else stream)

    factors = tokens * _factor_width(model, config) * itemsize
    gradients = rows * gradient_bytes(model, config)
    alive = factors * min(LAYERS_AHEAD + 1, len(layers)) + gradients

    spaces = spaces or workspaces(model, config, batch, itemsize, mesh, platform)
    again = 0 if keep_activations else activations
    fullest = max(spaces["head"], spaces["block_backward"] + again, spaces["spectra"])
    weights = weight_bytes(model, itemsize, mesh)
    host = 0
    if platform == "cpu":
        shapes = [_shape(model, projection) for projection in config.projections]
        host = (_PROCESS + host_bytes(shapes, batch.length)) // math.prod(mesh.values())
        # The last layers of the batch before are still being decomposed.
        host += alive + kept * min(LAYERS_AHEAD + 1, len(layers)) // model.num_layers
    code = _CODE.get(platform, 0)
    return Memory(weights, kept, alive, fullest + 2 * stream, code, host)


def gradient_bytes(model: DecoderConfig, config: SpectraConfig) -> int:
    """Bytes of a row's gradients that exist at once."""
    entries = sum(math.prod(_shape(model, p)) for p in config.projections)
    return 4 * entries * layers_held(model, config)


def _factor_width(model: DecoderConfig, config: SpectraConfig) -> int:
    """Numbers per token in a layer's factors."""
    inputs = sum(_shape(model, group[0])[1] for group in sharing_inputs(config.projections))
    return inputs + sum(_shape(model, p)[0] for p in config.projections)


def layers_held(model: DecoderConfig, config: SpectraConfig) -> int:
    """Layers whose gradients exist at once."""
    layers = len(config.layer_numbers(model.num_layers))
    if config.similarity == "all" or config.spectrum == "dense":
        return layers
    return min(LAYERS_AHEAD + 1, layers)


def workspaces(
    model: DecoderConfig,
    config: SpectraConfig,
    batch: BatchSpec,
    itemsize: int,
    mesh: dict[str, int],
    platform: str,
) -> dict[str, int]:
    """Bytes on one device of the largest programs, beside what they are given and give."""
    rows = batch.size // math.prod(mesh.values())
    tokens = rows * batch.length
    sizes, holds = axis_sizes(model), _HOLDS[platform]
    gathered = itemsize * sum(
        math.prod(p.shape(model)) // _parts(model, p, mesh, (TENSOR,)) - _part(model, p, mesh)
        for p in block_parameters(model, layer=0).values()
    )
    table = all_parameters(model)["embedding"]
    whole_table = itemsize * (math.prod(table.shape(model)) - _part(model, table, mesh))
    by_rows = split_axes(mesh, table.axes, table.shape(model))[table.axes.index("V")]
    stream = tokens * sizes["D"] * itemsize
    # What leaves as a factor is no workspace.
    wide = sum(name in ("gate", "up", "x_down") for name in factor_names(config.projections))
    mlp = tokens * sizes["F"] * itemsize * max(holds.mlp - wide, 0) + stream * holds.mlp_stream
    chunk = -(-batch.length // -(-batch.length // CHUNKS[platform]))
    scores = rows * model.num_heads * chunk**2 * holds.scores[itemsize < 4]
    attention = scores + stream * holds.attention_stream
    targets = min(HEAD_CHUNKS[platform], tokens)
    entries = min(VOCABULARY_CHUNK, model.vocab_size)
    logits = 2 * 4 * targets * entries + (4 * 4 * targets + itemsize * entries) * sizes["D"]
    return {
        # Tokens' rows change hands, of as many tokens at a time as make a stream.
        "embed": min(whole_table, stream) if by_rows else whole_table,
        "head": whole_table + logits,
        "block_backward": gathered + max(mlp, attention),
        "spectra": _spectra_workspace(model, config, rows, batch.length, platform),
    }


def _spectra_workspace(
    model: DecoderConfig, config: SpectraConfig, rows: int, length: int, platform: str
) -> int:
    route = resolved_route(config, platform)
    widest = max((_shape(model, p) for p in config.projections), key=sum)
    side = min(length, max(min(_shape(model, p)) for p in config.projections))
    if route == "gram" and not decomposes_on_host(platform):
        # Float64 copies of X and of one Δ, and the core on its way to its values: two there, and
        # two that cuSOLVER takes and no compiler counts.
        return 8 * rows * (length * sum(widest) + 4 * side**2)
    if route == "qr":
        # Of one row at a time: the operand twice, and its triangle.
        side = padded_side(side)
        return 4 * side * (2 * max(widest) + side)
    return 0


def _describe_route(config: SpectraConfig, platform: str) -> str:
    route = resolved_route(config, platform)
    if route == "qr":
        return "qr on the device, values on the host"
    where = "host" if route and decomposes_on_host(platform) else "device"
    return f"{route or 'dense'}, on the {where}"


def batch_flops(
    model: DecoderConfig, config: SpectraConfig, batch: BatchSpec, keeps_activations: bool
) -> float:
    """Multiplications and additions of a batch's passes, without the output head's.

    The floor is a forward pass and the backward pass of the inputs: four per weight and token.
    """
    flops = program_flops(model, config, batch)
    calls = layer_calls(model, config, keeps_activations)
    return sum(calls[program] * flops[program] for program in calls)


def layer_calls(
    model: DecoderConfig, config: SpectraConfig, keeps_activations: bool
) -> dict[str, int]:
    """How often a batch calls the programs of one layer."""
    layers = config.layer_numbers(model.num_layers)
    above = model.num_layers - min(layers)
    again = 0 if keeps_activations else above
    return {
        "block_forward": model.num_layers + again,
        "block_backward": above,
        "form_gradients": len(layers),
    }


def program_flops(
    model: DecoderConfig, config: SpectraConfig, batch: BatchSpec
) -> dict[str, float]:
    """Multiplications and additions of programs; the head's as if all tokens were targets."""
    tokens = batch.size * batch.length
    weights = sum(math.prod(p.shape(model)) for p in block_parameters(model, 0).values())
    wide = axis_sizes(model)["Q"]
    # Causal: half of T×T. Two products forward; the backward pass makes the scores again.
    return {
        "block_forward": 2.0 * weights * tokens + 2.0 * wide * batch.length * tokens,
        "block_backward": 2.0 * weights * tokens + 5.0 * wide * batch.length * tokens,
        "form_gradients": 2.0
        * tokens
        * sum(math.prod(_shape(model, p)) for p in config.projections),
        "head": 4.0 * model.vocab_size * model.hidden_size * tokens,
    }


def spectra_flops(model: DecoderConfig, config: SpectraConfig, length: int) -> float:
    """Multiplications and additions of a row's singular values by the Gram route."""
    total = 0.0
    for group in sharing_inputs(config.projections):
        shared = False  # XXᵀ and its factor
        for projection in group:
            outputs, inputs = _shape(model, projection)
            rank = min(length, outputs, inputs)
            if length <= min(outputs, inputs):
                total += 0 if shared else 2 * length**2 * inputs + length**3 / 3
                total += 2 * length**2 * outputs + 4 * length**3
                shared = True
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


def format_plan(plan: Plan, dtype: str, seconds: float, disk: int) -> str:
    """The plan for a terminal."""
    devices = math.prod(plan.mesh.values())
    padding = 1 - plan.tokens / max(plan.padded_tokens, 1)
    shapes = Counter((batch.size, batch.length) for batch in plan.batches)
    time = (
        f"at least {format_duration(seconds)}, estimated from the peak rates of {plan.device.kind}"
        if plan.device.peaks
        else f"about {format_duration(seconds)} at this machine's speed of matrix products"
    )
    memory = plan.memory
    parts = {
        "weights": memory.weights,
        "activations" if plan.keeps_activations else "block inputs": memory.block_inputs,
        "factors": memory.factors,
        "workspace": memory.workspace,
        "programs": memory.code,
        "host": memory.host,
        "together": memory.total,
        "available": plan.device.memory,
    }
    return "\n".join(
        [
            f"rows        {plan.rows:,} of {plan.tokens:,} tokens, {padding:.1%} padding",
            *(
                f"batches     {count:,} of {size} × {length:,} tokens"
                for (size, length), count in shapes.items()
            ),
            f"devices     {devices} ({format_mesh(plan.mesh)}) of {plan.device.kind}, {dtype}",
            *format_memory(parts),
            f"disk        {_size(disk)}, about, for these rows",
            f"spectra     {plan.route}",
            f"work        {plan.flops:.2e} FLOPs, {plan.spectra_flops:.2e} of spectra",
            f"time        {time}",
        ]
    )


def format_memory(parts: Mapping[str, int]) -> list[str]:
    """A line for every part of a device's memory that is there, given in bytes."""
    return [f"{name:<11} {_size(size)} per device" for name, size in parts.items() if size]


def estimated_seconds(plan: Plan, dtype: str) -> float:
    """What the work takes: at the peak rates of devices elsewhere, else at rates measured now."""
    devices = math.prod(plan.mesh.values())
    if peaks := plan.device.peaks:
        spectra = plan.spectra_flops / peaks.get("float64", peaks["float32"])
        return (plan.flops / peaks[dtype] + spectra) / devices
    return plan.flops / measured_rate(dtype) / devices + plan.spectra_flops / measured_host_rate()


def fits(plan: Plan) -> bool:
    """Whether it fits its devices."""
    return plan.memory.total <= _USABLE * plan.device.memory


def require_fit(plan: Plan, remedies: Iterable[tuple[str, Plan]]) -> None:
    """Refuses a plan that does not fit a device's memory.

    `remedies` are flags and the plans that they lead to.

    Raises:
      GradjaxError: naming the first flag that would make it fit.
    """
    if fits(plan):
        return
    remedy = next((flag for flag, changed in remedies if fits(changed)), None)
    advice = f"use {remedy}" if remedy else "use larger or more devices (--mesh=fsdp:N)"
    raise GradjaxError(
        f"the run needs {_size(plan.memory.total)} per device, {_size(plan.memory.weights)} of "
        f"them for weights, and a device has {_size(plan.device.memory)}; {advice}"
    )


def format_duration(seconds: float) -> str:
    """In the unit that a reader would take."""
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
