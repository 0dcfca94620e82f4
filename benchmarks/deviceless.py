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

import math
import re
from typing import Any

import jax.numpy as jnp
from absl import flags

from benchmarks.shapes import shape_config
from gradjax.cli.app import start
from gradjax.config import SpectraConfig
from gradjax.data.batches import BatchSpec
from gradjax.device import Device, parse_topology
from gradjax.errors import GradjaxError
from gradjax.model import attention
from gradjax.runs.compilers import Figures, absent_devices, compiled, device_seconds
from gradjax.runs.cost import program_flops, workspaces
from gradjax.runs.programs import programs
from gradjax.sharding import make_mesh, parse_mesh

_TOPOLOGIES = {"tpu": "v5e:2x4", "cuda": "h100:8"}
flags.DEFINE_enum("platform", "tpu", list(_TOPOLOGIES), "whose compiler")
flags.DEFINE_string("topology", None, "v5e:2x4 (default), v5p:2x2x1, v6e:2x4, …; h100:8 of cuda")
flags.DEFINE_string("shape", "demo", "a registered model, or demo")
flags.DEFINE_string("mesh", "data:1", "as of gradjax spectra")
flags.DEFINE_list("tokens", ["64"], "T, per row")
flags.DEFINE_list("dtypes", ["float32"], "of weights and activations")
flags.DEFINE_list("programs", [], "names of some of them, if not all")
flags.DEFINE_integer("attention_chunk", None, "tokens, instead of gradjax/model/attention.py's")


def main(_: list[str]) -> None:
    """Prints a table per number of tokens and dtype."""
    values = flags.FLAGS
    topology = values.topology or _TOPOLOGIES[values.platform]
    if not (parts := re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)):
        raise GradjaxError(f"--topology={topology}: expected as in v5e:2x4, v5p:2x2x1 or h100:8")
    kind, chips = parts[1], math.prod(map(int, parts[2].split("x")))
    sizes = parse_mesh(values.mesh)
    if (count := math.prod(sizes.values())) > chips:
        raise GradjaxError(f"--mesh={values.mesh}: --topology={topology} has {chips} devices")
    device = parse_topology(f"{kind}-8")[0]
    mesh = make_mesh(sizes, absent_devices(device, count))
    if values.attention_chunk:
        attention.CHUNKS = dict.fromkeys(attention.CHUNKS, values.attention_chunk)
    config = shape_config(values.shape)
    for dtype in values.dtypes:
        for tokens in map(int, values.tokens):
            where = f"{values.mesh} of {kind}"
            print(f"\n{values.shape}, {dtype}, a row of {tokens:,} tokens on each of {where}")
            print(_HEAD)
            print_programs(config, mesh, device, tokens, dtype)


def print_programs(config: Any, mesh: Any, device: Device, tokens: int, dtype: str) -> None:
    """A line per program, and what a row takes in all without its spectra."""
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
        seconds = device_seconds(found, device)
        seconds = flops / peak if seconds is None else seconds
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
