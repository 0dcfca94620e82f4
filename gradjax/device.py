"""What the devices offer."""

import os
import platform
from pathlib import Path

import jax

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


def agree_on_memory(size: int) -> None:
    """From now on devices count as of `size` bytes: plans of several processes must be equal."""
    global _agreed
    _agreed = size


def keep_compiled_programs() -> None:
    """Keeps what is compiled for later runs on this machine, unless JAX was told where itself.

    In `$XDG_CACHE_HOME/gradjax` (`~/.cache/gradjax`); removing it does no harm.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        # Programs for one CPU may not run on another that shares the home directory.
        jax.config.update("jax_compilation_cache_dir", str(cache / "gradjax" / platform.node()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


# Tokens per batch: enough to fill the device's matrix units, little enough for its memory.
_BATCH_TOKENS = {"cpu": 2048}


_ACCELERATOR_BATCH_TOKENS = 16384


def default_batch_tokens() -> int:
    """Padded tokens per batch and device on this backend."""
    return _BATCH_TOKENS.get(jax.default_backend(), _ACCELERATOR_BATCH_TOKENS)
