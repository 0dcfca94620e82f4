"""What the devices offer."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from gradjax.errors import GradjaxError, out_of_memory

_agreed: int | None = None


def device_memory() -> int:
    """Bytes of one device's memory; the host's, shared out, where the devices are CPUs.

    Where several processes have agreed on a number, that one.
    """
    if _agreed is not None:
        return _agreed
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return host // jax.local_device_count()


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
            f"{device_memory() / 2**30:.0f} GiB of this device; {remedy}"
        ) from error


def agree_on_memory(size: int) -> None:
    """From now on devices count as of `size` bytes: plans of several processes must be equal."""
    global _agreed
    _agreed = size


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


# Tokens per batch: enough to fill the device's matrix units, little enough for its memory.
_BATCH_TOKENS = {"cpu": 2048}


_ACCELERATOR_BATCH_TOKENS = 16384
# What a device computes while a shape's programs are compiled: 2 s of two CPU cores on a small
# model (benchmarks/RESULTS.md), on accelerators assumed to be 5 s at 20 TFLOP/s.
_COMPILING_FLOPS = {"cpu": 5e10}
_ACCELERATOR_COMPILING_FLOPS = 1e14


def default_batch_tokens() -> int:
    """Padded tokens per batch and device on this backend."""
    return _BATCH_TOKENS.get(jax.default_backend(), _ACCELERATOR_BATCH_TOKENS)


def compiling_flops() -> float:
    """FLOPs that a device of this backend gives up for one more shape of a batch."""
    return _COMPILING_FLOPS.get(jax.default_backend(), _ACCELERATOR_COMPILING_FLOPS)
