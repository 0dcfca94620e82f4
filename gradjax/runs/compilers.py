"""XLA's compilers for TPUs and GPUs, for devices that are not here.

The wheel libtpu and jax-cuda12-plugin with jax-cuda12-pjrt hold them; they compile on any machine.
Nothing is run and nothing is allocated.
"""

import dataclasses
import importlib.util
import math
import os
import re
import time
from collections import Counter
from typing import Any

import jax
from jax.experimental import topologies

from gradjax.device import Device
from gradjax.errors import GradjaxError, first_line
from gradjax.runs.programs import Program

# By platform of a `Device`.
WHEELS = {"tpu": "libtpu", "gpu": "jax-cuda12-plugin jax-cuda12-pjrt"}
_MODULES = {"tpu": "libtpu", "gpu": "jax_plugins.xla_cuda12"}
# Devices that this machine may have stay untouched; libtpu wants to know what it is part of.
_ENVIRONMENT = {
    "tpu": {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    },
    "gpu": {
        "CUDA_VISIBLE_DEVICES": "-1",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0",
    },
}
# The smallest grids of chips that libtpu knows. It has v4's cores, not its chips.
_GRIDS = {"v5e": (2, 4), "v5p": (2, 2, 1), "v6e": (2, 4)}
_CLOCKS = {"v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}  # Hz: peak / width of the matrix units
_GPUS = {
    "h100": """gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 threads_per_core_limit: 2048
  core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536 } platform_name: "CUDA"
  dnn_version_info { major: 9 minor: 8 } runtime_version { major: 12 minor: 9 patch: 0 }
  device_description_str: "NVIDIA H100 80GB HBM3" """
}
_COLLECTIVES = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"


def has_compiler(platform: str) -> bool:
    """Whether `WHEELS` of a platform, `tpu` or `gpu`, are installed."""
    try:
        return importlib.util.find_spec(_MODULES[platform]) is not None
    except ModuleNotFoundError:
        return False


def missing_compiler(device: Device) -> str:
    """Why nothing can be compiled for a kind of device, and what to do; empty if it can."""
    if device.kind not in _GRIDS.keys() | _GPUS.keys():
        return f"no compiler is known for {device.kind} that is not here"
    if not has_compiler(device.platform):
        version = ", of the version of jax," if device.platform == "gpu" else ""
        return f"pip install --no-deps {WHEELS[device.platform]}{version} has {device.kind}'s"
    return ""


def absent_devices(device: Device, count: int) -> list[Any]:
    """Devices of a kind to compile for; to be asked for before JAX opens any.

    Raises:
      GradjaxError: if there is no compiler for them.
    """
    if missing := missing_compiler(device):
        raise GradjaxError(f"no compiler for {device.kind}: {missing}")
    os.environ |= _ENVIRONMENT[device.platform]
    jax.config.update("jax_platforms", "cpu")
    name, platform, options = device.kind, "cuda", {}
    if device.platform == "gpu":
        options = {"target_config": _GPUS[device.kind], "topology": f"1x1x{count}"}
    else:
        name, platform = f"{device.kind}:{_grid(device.kind, count)}", "tpu"
    try:
        return list(topologies.get_topology_desc(name, platform, **options).devices)[:count]
    except Exception as error:  # a wheel of another version, a grid that it has not
        raise GradjaxError(
            f"the compiler for {device.kind} does not take {name} ({first_line(error)}); install "
            f"{WHEELS[device.platform]} of the version that belongs to jax {jax.__version__}"
        ) from error


def _grid(kind: str, count: int) -> str:
    """The smallest grid of at least so many chips, as their cloud has them: 4x8 of 32."""
    sides = list(_GRIDS[kind])
    while math.prod(sides) < count:
        shortest = max(range(len(sides)), key=lambda side: (-sides[side], side))
        sides[shortest] *= 2
    return "x".join(map(str, sides))


@dataclasses.dataclass(frozen=True)
class Figures:
    """What a compiler says of a program. Bytes are on one device."""

    seconds: float  # to compile
    code: int
    argument: int
    temp: int
    output: int
    flops: float  # loops once; 0 on GPUs
    cycles: float  # loops in full; 0 on GPUs
    guessed: bool  # whether a loop's length is not known
    collectives: dict[str, int]
    float64: bool


def compiled(program: Program) -> Figures:
    """Figures of a `Program`, compiled for the devices of its mesh."""
    lowered = program.lower()
    began = time.perf_counter()
    done = lowered.compile()
    seconds = time.perf_counter() - began
    memory, cost, text = done.memory_analysis(), done.cost_analysis() or {}, done.as_text() or ""
    cycles, guessed = estimated_cycles(text, program.turns)
    assert memory is not None
    return Figures(
        seconds,
        memory.generated_code_size_in_bytes,
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes,
        cost.get("flops", 0.0),
        cycles,
        guessed,
        dict(Counter(re.findall(rf" ({_COLLECTIVES})(?:-start)?\(", text))),
        " f64[" in text,
    )


def device_seconds(figures: Figures, device: Device) -> float | None:
    """What a compiled program takes on a device; None where the compiler does not estimate it."""
    clock = _CLOCKS.get(device.kind)
    return figures.cycles / clock if clock else None


def estimated_cycles(text: str, turns: float) -> tuple[float, bool]:
    """Cycles of a compiled TPU program, and whether it has loops whose length had to be guessed.

    The sum of the compiler's estimates of single operations, as often as their loop turns; `turns`
    is of loops of unknown length. Of branches the longest counts.
    """
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if opening := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = opening[2]
            bodies[name] = []
            entry = name if opening[1] else entry
        elif name:
            bodies[name].append(line)
    guessed = False

    def total(name: str) -> float:
        nonlocal guessed
        cycles = 0.0
        for line in bodies.get(name, []):
            estimates = map(int, re.findall(r'"estimated_cycles":"(\d+)"', line))
            # Beyond int64 it is a negative number: the compiler has no estimate.
            cycles += sum(estimate for estimate in estimates if estimate < 2**63)
            if loop := re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line):
                # Loops count from 0 in ones: `compare(turn, constant), direction=LT`.
                condition = "\n".join(bodies[loop[1]])
                bound = re.search(r"ROOT .* compare\(.*?%([\w.\-]+)\), direction=LT", condition)
                name = re.escape(bound[1]) if bound else "-"
                known = re.search(rf"%{name} = .* constant\((\d+)\)", condition)
                guessed |= not known
                cycles += (float(known[1]) if known else turns) * sum(map(total, loop.groups()))
            elif branches := re.search(r"branch_computations=\{([^}]*)\}", line):
                cycles += max(map(total, re.findall(r"[\w.\-]+", branches[1])))
            elif called := re.search(r"(?:to_apply|calls)=%?([\w.\-]+)", line):
                cycles += total(called[1])
        return cycles

    return total(entry), guessed
