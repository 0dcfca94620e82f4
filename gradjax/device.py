"""What the devices offer: those of this machine, and those that a run is planned for."""

import dataclasses
import math
import os
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import jax

from gradjax.errors import GradjaxError, out_of_memory

# Tokens per batch: enough to fill the device's matrix units, little enough for its memory.
_BATCH_TOKENS = {"cpu": 2048}
_ACCELERATOR_BATCH_TOKENS = 16384
# What a device computes while a shape's programs are compiled: 2 s of two CPU cores on a small
# model (benchmarks/RESULTS.md), on accelerators assumed to be 5 s at 20 TFLOP/s.
_COMPILING_FLOPS = {"cpu": 5e10}
_ACCELERATOR_COMPILING_FLOPS = 1e14


@dataclasses.dataclass(frozen=True)
class Device:
    """The kind of device that a run goes on; all of its devices are of one kind."""

    kind: str  # v5e; as JAX names it where it is at hand
    platform: str  # cpu, gpu or tpu
    memory: int  # bytes that JAX may use
    # FLOP/s of matrix products at their peak, by dtype; None: to be measured, the device is here
    peaks: Mapping[str, float] | None = None

    @property
    def batch_tokens(self) -> int:
        """Padded tokens per batch and device, if the user names none."""
        return _BATCH_TOKENS.get(self.platform, _ACCELERATOR_BATCH_TOKENS)

    @property
    def compiling_flops(self) -> float:
        """FLOPs that the device gives up for one more shape of a batch."""
        return _COMPILING_FLOPS.get(self.platform, _ACCELERATOR_COMPILING_FLOPS)


def local_device() -> Device:
    """The kind of this machine's devices; CPUs have equal shares of the host's memory."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    host = min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), container_memory())
    memory = stats.get("bytes_limit", int(host) // jax.local_device_count())
    return Device(device.device_kind, device.platform, memory)


def container_memory(
    groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> float:
    """Bytes that this process's container may use by cgroup v2; infinite where nothing limits it.

    Args:
      groups: where the hierarchy is mounted.
      own: the file that says where in it this process is.
    """
    limits = [math.inf]
    with suppress(OSError, ValueError):
        lines = own.read_text().splitlines()
        path = next((line[3:].strip("/") for line in lines if line.startswith("0::")), "")
        for group in [groups / path, *(groups / path).parents]:
            if group.is_relative_to(groups) and (group / "memory.max").is_file():
                limit = (group / "memory.max").read_text().strip()
                limits.append(math.inf if limit == "max" else int(limit))
    return min(limits)


def _tpu(kind: str, gibibytes: float, bfloat16: float) -> Device:
    # Six products of bfloat16 make one of float32: the precision that gradjax asks for.
    peaks = {"float32": bfloat16 / 6, "bfloat16": bfloat16}
    return Device(kind, "tpu", int(gibibytes * 2**30), peaks)


def _gpu(kind: str, gigabytes: float, float64: float, float32: float, bfloat16: float) -> Device:
    # JAX takes three quarters of a GPU's memory (XLA_PYTHON_CLIENT_MEM_FRACTION).
    peaks = {"float64": float64, "float32": float32, "bfloat16": bfloat16}
    return Device(kind, "gpu", int(0.75 * gigabytes * 1e9), peaks)


# Memory of TPUs is what their compiler allows a program ("exceeds available HBM"); their peaks are
# of cloud.google.com/tpu/docs/system-architecture-tpu-vm, GPUs' figures of NVIDIA's data sheets
# (SXM, dense; float64 on tensor cores).
_DEVICES = {
    device.kind: device
    for device in (
        _tpu("v4", 30.75, 275e12),
        _tpu("v5e", 15.75, 197e12),
        _tpu("v5p", 95.74, 459e12),
        _tpu("v6e", 31.25, 918e12),
        _gpu("a100", 80, 19.5e12, 19.5e12, 312e12),
        _gpu("h100", 80, 67e12, 67e12, 989e12),
        _gpu("h200", 141, 67e12, 67e12, 989e12),
    )
}
# The N of these names counts cores, of which a chip, one device, has two.
_NAMED_BY_CORES = ("v4", "v5p")


def parse_topology(text: str) -> tuple[Device, int]:
    """`v5e-16`, `h100-8`: a kind of device and their number, named as clouds name them.

    Raises:
      GradjaxError: if the text is not of this form, or the kind is unknown.
    """
    parts = re.fullmatch(r"([a-z0-9]+)-([1-9]\d*)", text.lower().replace("v5litepod", "v5e"))
    kind, count = (parts[1], int(parts[2])) if parts else ("", 0)
    cores = 2 if kind in _NAMED_BY_CORES else 1
    if kind not in _DEVICES or count % cores:
        raise GradjaxError(
            f"--topology={text}: expected KIND-N as in v5e-16 or h100-8, KIND one of "
            f"{', '.join(_DEVICES)}, N even for {' and '.join(_NAMED_BY_CORES)}, whose chips have "
            "two cores"
        )
    return _DEVICES[kind], count // cores


@contextmanager
def memory_faults(size: int, length: int, remedy: str) -> Iterator[None]:
    """Says in one sentence that a batch of so many rows and tokens does not fit, and the remedy."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise GradjaxError(
            f"a batch of {size} rows of {length} tokens does not fit the "
            f"{local_device().memory / 2**30:.0f} GiB of this device; {remedy}"
        ) from error


def cache_directory() -> Path:
    """What gradjax keeps on this machine for later: `$XDG_CACHE_HOME/gradjax`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gradjax"


def keep_compiled_programs() -> None:
    """Keeps what is compiled for later runs on this machine, unless JAX was told where itself.

    In `$XDG_CACHE_HOME/gradjax` (`~/.cache/gradjax`); removing it does no harm.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        # Programs for one CPU may not run on another that shares the home directory.
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / platform.node()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
