"""What the device offers."""

import os

import jax


def device_memory() -> int:
    """Bytes of one device's memory; the host's where the device is the CPU."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
