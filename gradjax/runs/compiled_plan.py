"""A plan with its programs' memory and time as the devices' own compiler has them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from absl import logging

from gradjax.config import RunConfig
from gradjax.errors import GradjaxError, first_line
from gradjax.model.config import DecoderConfig
from gradjax.runs.compilers import Figures, absent_devices, compiled, device_seconds
from gradjax.runs.cost import (
    Plan,
    batch_flops,
    batch_memory,
    format_duration,
    format_memory,
    layer_calls,
    shapes_of,
    workspaces,
)
from gradjax.runs.programs import Program, programs
from gradjax.sharding import make_mesh
from gradjax.spectra.decompose import resolved_route


@dataclasses.dataclass(frozen=True)
class CompiledPlan:
    """What the compiler makes of a plan."""

    plan: Plan  # with the compiled programs' memory
    seconds: float | None  # of the passes of all batches; None where the compiler gives no estimate


def compile_plan(config: RunConfig, model: DecoderConfig, plan: Plan) -> CompiledPlan:
    """Compiles the programs of a plan's fullest batch for its devices, which need not be here.

    Seconds of other batches are to that one's as their FLOPs are.

    Raises:
      GradjaxError: if there is no compiler for the devices, or it refuses a program.
    """
    batch = plan.fullest
    assert batch is not None
    mesh = make_mesh(plan.mesh, absent_devices(plan.device, math.prod(plan.mesh.values())))
    platform, route = plan.device.platform, resolved_route(config.spectra, plan.device.platform)
    all_programs = programs(
        model,
        mesh,
        batch.size,
        batch.length,
        config.dtype,
        projections=config.spectra.projections,
    )
    wanted = {
        name: program
        for name, program in all_programs.items()
        if program.part == "passes" or name.startswith(f"spectra_{route}")
    }
    found = {name: _compile(name, program, plan) for name, program in wanted.items()}

    sizes = (jnp.dtype(config.dtype).itemsize, plan.mesh, platform)
    spaces = workspaces(model, config.spectra, batch, *sizes)
    # What cuSOLVER takes is in the plan's own figure alone.
    spectra = (f.temp for name, f in found.items() if name.startswith("spectra_"))
    spaces |= {"spectra": max(spaces["spectra"], *spectra)}
    spaces |= {name: found[name].temp for name in ("embed", "head", "block_backward")}
    memory = batch_memory(
        model,
        config.spectra,
        batch,
        *sizes,
        keep_activations=plan.keeps_activations,
        spaces=spaces,
    )
    code = sum(figures.code for figures in found.values()) * len(shapes_of(plan.batches))
    changed = dataclasses.replace(plan, memory=dataclasses.replace(memory, code=code))
    return CompiledPlan(changed, _pass_seconds(config, model, plan, wanted, found))


def format_compiled(compiled: CompiledPlan) -> str:
    """For a terminal."""
    plan, batch, memory = compiled.plan, compiled.plan.fullest, compiled.plan.memory
    assert batch is not None
    parts = {"workspace": memory.workspace, "programs": memory.code, "together": memory.total}
    lines = [
        f"compiled    by XLA for {plan.device.kind}: {batch.size} × {batch.length:,} tokens",
        *format_memory(parts),
    ]
    if compiled.seconds is not None:
        took = format_duration(compiled.seconds)
        lines.append(f"time        {took} of the passes, by XLA's estimates of cycles")
    return "\n".join(lines)


def _compile(name: str, program: Program, plan: Plan) -> Figures:
    logging.info("compiling %s for %s", name, plan.device.kind)
    try:
        return compiled(program)
    except jax.errors.JaxRuntimeError as error:
        raise GradjaxError(
            f"the compiler of {plan.device.kind} refuses the program {name}: {first_line(error)}"
        ) from error


def _pass_seconds(
    config: RunConfig,
    model: DecoderConfig,
    plan: Plan,
    wanted: dict[str, Program],
    found: dict[str, Figures],
) -> float | None:
    """Of all batches; the head's programs are compiled as if all tokens were targets."""
    seconds = {name: device_seconds(found[name], plan.device) for name in wanted}
    calls = layer_calls(model, config.spectra, plan.keeps_activations)
    flops = [batch_flops(model, config.spectra, b, plan.keeps_activations) for b in plan.batches]
    fullest = plan.fullest
    assert fullest is not None
    batches = sum(flops) / batch_flops(model, config.spectra, fullest, plan.keeps_activations)
    heads = plan.targets / (fullest.size * fullest.length)
    total = 0.0
    for name, program in wanted.items():
        if program.part == "passes":
            if (one := seconds[name]) is None:
                return None
            total += one * calls.get(name, program.calls) * (heads if name == "head" else batches)
    return total
