"""How rows are laid out on devices: the mesh, the batches, and what to do if they do not fit."""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial

from jax.sharding import Mesh

from gradjax.config import RunConfig, SpectraConfig
from gradjax.data.batches import MAX_SHAPES, MULTIPLE, BatchSpec, batch_by_length
from gradjax.device import Device
from gradjax.errors import GradjaxError
from gradjax.model.config import DecoderConfig
from gradjax.runs.cost import Plan, batch_flops, fits, gradient_bytes, make_plan
from gradjax.sharding import DATA, local_slots, parse_mesh
from gradjax.structs import TokenizedExample

# Share of the device's memory that whole gradients may take.
_GRADIENTS_SHARE = 0.15
# Numbers of shapes that `--plan` tells the padding of.
_SHAPES_TOLD = (6, 12, MAX_SHAPES)


def lay_out(
    config: RunConfig,
    model: DecoderConfig,
    rows: Sequence[TokenizedExample],
    device: Device,
    devices: int,
    shared: Collection[int] | None = None,
) -> Plan:
    """The mesh and the batches of some rows on so many devices of a kind.

    Without `--mesh` it is `data` over all devices where the model fits one of them, else `fsdp`.

    Args:
      shared: as of `batch_rows`.
    """
    plan = partial(_plan, config, model, rows, device)
    if config.mesh:
        mesh = parse_mesh(config.mesh)
        if config.spectra.spectrum == "dense" and math.prod(mesh.values()) > mesh[DATA]:
            raise GradjaxError(
                f"--mesh={config.mesh}: --spectrum=dense needs all weights on each device; use "
                f"--mesh=data:{math.prod(mesh.values())}"
            )
        return plan(mesh, shared)
    chosen = plan(parse_mesh(f"data:{devices}"), shared)
    if devices > 1 and not fits(chosen) and config.spectra.spectrum == "factored":
        return plan(parse_mesh(f"fsdp:{devices}"), shared)
    return chosen


def remedies(
    config: RunConfig,
    model: DecoderConfig,
    rows: Sequence[TokenizedExample],
    device: Device,
    mesh: dict[str, int],
    processes: int = 1,
) -> Iterator[tuple[str, Plan]]:
    """Flags that make a run need less memory, the least costly first, and the plans they give."""
    devices = math.prod(mesh.values())
    plan = partial(_plan, model=model, rows=rows, device=device)
    tokens = config.batch_tokens or device.batch_tokens
    while (tokens := tokens // 2) >= MULTIPLE:
        changed = dataclasses.replace(config, batch_tokens=tokens)
        yield f"--batch_tokens={tokens}", plan(changed, mesh=mesh)
    one_row = dataclasses.replace(config, batch_tokens=1)
    yield f"--mesh=fsdp:{devices}", plan(config, mesh=parse_mesh(f"fsdp:{devices}"))
    if processes > 1:
        shared = parse_mesh(f"fsdp:{devices * processes}")
        yield "--processes=sharded", plan(config, mesh=shared)
    narrow = dataclasses.replace(one_row, dtype="bfloat16")
    yield "--dtype=bfloat16 --batch_tokens=1", plan(narrow, mesh=mesh)
    length = config.tokens.max_length
    while (length := length // 2) >= 512:
        cut = dataclasses.replace(config.tokens, max_length=length)
        changed = dataclasses.replace(one_row, tokens=cut)
        yield f"--max_length={length} --batch_tokens=1", plan(changed, mesh=mesh)


def _plan(
    config: RunConfig,
    model: DecoderConfig,
    rows: Sequence[TokenizedExample],
    device: Device,
    mesh: dict[str, int],
    shared: Collection[int] | None = None,
) -> Plan:
    # The rows were cut at another --max_length where a remedy is tried.
    longest = -(-config.tokens.max_length // MULTIPLE) * MULTIPLE
    devices, tokens = math.prod(mesh.values()), config.batch_tokens
    batches = [
        dataclasses.replace(batch, length=min(batch.length, longest))
        for batch in batch_rows(rows, config.spectra, model, device, tokens, devices, shared=shared)
    ]
    return make_plan(model, config.spectra, rows, batches, config.dtype, mesh, device)


def local_rows(mesh: Mesh, batch: BatchSpec) -> list[int]:
    """The rows of a batch that this process's devices compute."""
    slots = local_slots(mesh, batch.size)
    return [batch.rows[slot] for slot in slots if slot < len(batch.rows)]


def batch_rows(
    tokenized: Sequence[TokenizedExample],
    config: SpectraConfig,
    model: DecoderConfig,
    device: Device,
    batch_tokens: int | None = None,
    devices: int = 1,
    among: Sequence[int] | None = None,
    shapes: int | None = None,
    shared: Collection[int] | None = None,
) -> list[BatchSpec]:
    """Batches of the `ok` examples; their rows are positions in `tokenized`.

    Args:
      device: of which kind all are.
      batch_tokens: padded tokens per batch and device; by kind if None.
      devices: each has its share of a batch's examples.
      among: the positions to choose from; all if None.
      shapes: at most so many, whatever compiling costs; as many as pay if None.
      shared: padded lengths of earlier rows' batches, as of `batch_by_length`.
    """
    among = range(len(tokenized)) if among is None else among
    positions = [i for i in among if tokenized[i].status == "ok"]
    lengths = [tokenized[i].num_tokens for i in positions]
    specs = batch_by_length(
        lengths,
        batch_tokens or device.batch_tokens,
        _most_rows(model, config, device),
        devices,
        max_shapes=shapes or MAX_SHAPES,
        shape_tokens=0 if shapes else _shape_tokens(model, config, lengths, device, devices),
        shared=shared,
    )
    return [
        dataclasses.replace(spec, rows=tuple(positions[row] for row in spec.rows)) for spec in specs
    ]


def unfinished(
    batches: Sequence[BatchSpec],
    finished: Collection[int],
    batch_among: Callable[[list[int]], list[BatchSpec]],
) -> list[BatchSpec]:
    """Batches of the rows that are left.

    A run that was stopped keeps the batches it had, so that its numbers come out the same to
    the last bit; where they no longer fit (rows were added), the rest is batched anew.
    """
    done = frozenset(finished)
    left = [batch for batch in batches if not done.issuperset(batch.rows)]
    if any(done.intersection(batch.rows) for batch in left):
        return batch_among(sorted(i for batch in left for i in batch.rows if i not in done))
    return left


def format_shapes(
    config: RunConfig, model: DecoderConfig, rows: Sequence[TokenizedExample], plan: Plan
) -> str:
    """How many shapes a plan has, and what others would pad, for a terminal."""
    devices = math.prod(plan.mesh.values())
    trade = {}
    for most in _SHAPES_TOLD:
        batches = batch_rows(
            rows,
            config.spectra,
            model,
            plan.device,
            config.batch_tokens,
            devices,
            shapes=most,
        )
        padded = sum(batch.size * batch.length for batch in batches)
        trade[_count_shapes(batches)] = 1 - plan.tokens / max(padded, 1)
    others = ", ".join(f"{shapes} would pad {padding:.1%}" for shapes, padding in trade.items())
    return f"shapes      {_count_shapes(plan.batches)}; {others}"


def _count_shapes(batches: Sequence[BatchSpec]) -> int:
    return len({(batch.size, batch.length) for batch in batches})


def _shape_tokens(
    model: DecoderConfig,
    config: SpectraConfig,
    lengths: Sequence[int],
    device: Device,
    devices: int,
) -> float:
    """Padded tokens that all devices could compute while one more shape is compiled.

    Devices of a CPU share its cores: eight compute no more than one.
    """
    mean = BatchSpec((), -(-sum(lengths) // max(len(lengths), 1)) or 1, 1)
    flops = batch_flops(model, config, mean, keeps_activations=True)
    share = 1 if device.platform == "cpu" else devices
    return share * device.compiling_flops * mean.length / flops


def _most_rows(model: DecoderConfig, config: SpectraConfig, device: Device) -> int:
    """Examples whose whole float32 gradients fit their share of the memory."""
    row = gradient_bytes(model, config)
    return max(int(_GRADIENTS_SHARE * device.memory / row), 1)
