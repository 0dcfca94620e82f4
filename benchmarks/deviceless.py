"""What compilers say of a run on TPUs or GPUs that are not here.

  python -m benchmarks.deviceless --shape=qwen2.5_7b --tokens=1024 --dtypes=bfloat16
  python -m benchmarks.deviceless --platform=cuda --mesh=data:2,fsdp:2,tensor:2

XLA's compilers for TPUs (the wheel libtpu) and for GPUs (jax-cuda12-plugin, jax-cuda12-pjrt) run on
any machine. Every program that a batch of one row per device takes is compiled; nothing is run and
nothing is allocated. MiB are on one device, `plan` is what gradjax/runs/cost.py says of the same
program. Milliseconds on a TPU are the compiler's own estimates of cycles, at the clock of the
generation: it gives none for copies beside other work and for kernels of QR, Cholesky and Jacobi
methods. A loop of known length counts as often as it turns, one of unknown length as often as
`Program.turns` says, marked `~`. GPUs' compilers give no estimate: there it is the plan's FLOPs at
the peak rate, the least possible.
"""

import dataclasses
import importlib.util
import math
import os
import re
import time
from collections import Counter
from typing import Any

from absl import flags

from gradjax.cli.app import start
from gradjax.errors import GradjaxError

PLATFORMS = ("tpu", "cuda")
flags.DEFINE_enum("platform", "tpu", PLATFORMS, "whose compiler")
flags.DEFINE_string("topology", None, "v5e:2x4 (default), v5p:2x2x1, v6e:2x4, …; h100 of cuda")
flags.DEFINE_string("shape", "demo", "a registered model, or demo")
flags.DEFINE_string("mesh", "data:1", "as of gradjax spectra")
flags.DEFINE_list("tokens", ["64"], "T, per row")
flags.DEFINE_list("dtypes", ["float32"], "of weights and activations")
flags.DEFINE_list("programs", [], "names of some of them, if not all")
flags.DEFINE_integer("attention_chunk", None, "tokens, instead of gradjax/model/attention.py's")

# Devices that this machine may have stay untouched; libtpu wants to know what it is part of.
_ENVIRONMENT = {
    "tpu": {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    },
    "cuda": {
        "CUDA_VISIBLE_DEVICES": "-1",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0",
    },
}
_MODULES = {"tpu": "libtpu", "cuda": "jax_plugins.xla_cuda12"}
WHEELS = {"tpu": "libtpu", "cuda": "jax-cuda12-plugin jax-cuda12-pjrt"}
_TOPOLOGIES = {"tpu": "v5e:2x4", "cuda": "h100"}
_CLOCKS = {"v4": 1.05e9, "v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}  # Hz: peak / MXU width
_H100 = """gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 threads_per_core_limit: 2048
  core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536 } platform_name: "CUDA"
  dnn_version_info { major: 9 minor: 8 } runtime_version { major: 12 minor: 9 patch: 0 }
  device_description_str: "NVIDIA H100 80GB HBM3" """
_COLLECTIVES = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"


def has_compiler(platform: str) -> bool:
    """Whether `WHEELS` of a platform are installed."""
    try:
        return importlib.util.find_spec(_MODULES[platform]) is not None
    except ModuleNotFoundError:
        return False


def absent_devices(platform: str, topology: str | None = None) -> list[Any]:
    """Devices to compile for; to be asked for before JAX opens any.

    Raises:
      GradjaxError: if the compiler is not installed, or does not know the topology.
    """
    topology = topology or _TOPOLOGIES[platform]
    if not has_compiler(platform):
        raise GradjaxError(
            f"--platform={platform}: its compiler is not installed; pip install --no-deps "
            f"{WHEELS[platform]}, of the version of jax for cuda"
        )
    os.environ |= _ENVIRONMENT[platform]
    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    if platform == "cuda" and topology != "h100":
        raise GradjaxError(f"--topology={topology}: expected h100, the one GPU described here")
    options = {"target_config": _H100, "topology": "1x1x8"} if platform == "cuda" else {}
    try:
        return list(topologies.get_topology_desc(topology, platform, **options).devices)
    except Exception as error:
        expected = _TOPOLOGIES[platform]
        raise GradjaxError(f"--topology={topology}: expected as in {expected}; {error}") from error


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


def compiled(program: Any) -> Figures:
    """Figures of a `Program`, compiled for the devices of its mesh."""
    lowered = program.lower()
    began = time.perf_counter()
    done = lowered.compile()
    seconds = time.perf_counter() - began
    memory, cost, text = done.memory_analysis(), done.cost_analysis() or {}, done.as_text() or ""
    cycles, guessed = estimated_cycles(text, program.turns)
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


def main(_: list[str]) -> None:
    """Prints a table per number of tokens and dtype."""
    values = flags.FLAGS
    absent = absent_devices(values.platform, values.topology)
    from benchmarks.shapes import shape_config
    from gradjax.model import attention
    from gradjax.sharding import make_mesh, parse_mesh

    if values.attention_chunk:
        attention.CHUNKS = dict.fromkeys(attention.CHUNKS, values.attention_chunk)
    sizes = parse_mesh(values.mesh)
    if (count := math.prod(sizes.values())) > len(absent):
        raise GradjaxError(f"--mesh={values.mesh}: the topology has {len(absent)} devices")
    config, mesh = shape_config(values.shape), make_mesh(sizes, absent[:count])
    kind = (values.topology or _TOPOLOGIES[values.platform]).split(":")[0]
    for dtype in values.dtypes:
        for tokens in map(int, values.tokens):
            where = f"{values.mesh} of {kind}"
            print(f"\n{values.shape}, {dtype}, a row of {tokens:,} tokens on each of {where}")
            print(_HEAD)
            print_programs(config, mesh, kind, tokens, dtype)


def print_programs(config: Any, mesh: Any, kind: str, tokens: int, dtype: str) -> None:
    """A line per program, and what a row takes in all without its spectra."""
    import jax.numpy as jnp

    from benchmarks.programs import programs
    from gradjax.config import SpectraConfig
    from gradjax.data.batches import BatchSpec
    from gradjax.device import parse_topology
    from gradjax.runs.cost import program_flops, workspaces

    device, _ = parse_topology(f"{kind}-8")
    peak = (device.peaks or {})[dtype]
    batch = BatchSpec(tuple(range(mesh.size)), tokens, mesh.size)
    itemsize, sizes = jnp.dtype(dtype).itemsize, dict(mesh.shape)
    spaces = workspaces(config, SpectraConfig(), batch, itemsize, sizes, device.platform)
    work = program_flops(config, SpectraConfig(), batch)
    row = 0.0
    for name, program in programs(config, mesh, mesh.size, tokens, dtype).items():
        if flags.FLAGS.programs and name not in flags.FLAGS.programs:
            continue
        found, flops = compiled(program), work.get(name, 0.0) / mesh.size
        seconds = found.cycles / _CLOCKS[kind] if kind in _CLOCKS else flops / peak
        row += program.calls * seconds if program.part == "passes" else 0
        space = spaces.get("spectra" if program.part == "spectra" else name)
        print(_line(name, program.calls, found, space, flops, 1e3 * seconds), flush=True)
    print(f"{1e3 * row:,.1f} ms a row in all of these but the spectra, estimated")


_COLUMNS = ("code", "argument", "temp", "(plan)", "output", "GFLOPs", "(plan)", "Mcycles", "ms")
_HEAD = f"{'program':20}calls compiled" + "".join(f"{name:>10}" for name in _COLUMNS)


def _line(name: str, calls: int, found: Figures, space: int | None, flops: float, ms: float) -> str:
    sizes = (found.code, found.argument, found.temp, space, found.output)
    texts = ["" if size is None else f"{size / 2**20:.1f}" for size in sizes]
    texts += [f"{work / 1e9:.1f}" if work else "" for work in (found.flops, flops)]
    texts += [f"{found.cycles / 1e6:.3f}", ("~" if found.guessed else "") + f"{ms:.3f}"]
    collectives = ", ".join(f"{count} {kind}" for kind, count in found.collectives.items())
    return (
        f"{name:20}{calls:5}{found.seconds:9.1f}"
        + "".join(f"{text:>10}" for text in texts)
        + f"  {collectives}{' float64' if found.float64 else ''}"
    )


if __name__ == "__main__":
    start(main)
