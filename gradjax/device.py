"""What the devices offer."""

import os

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
