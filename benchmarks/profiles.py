"""A profile of batches in a row, and whether the device ever waited between them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from benchmarks.ways import Start


def profile(start: Start, batches: int, folder: Path) -> dict[str, Any]:
    """Traces some batches, each started before the last is waited for, into `folder`.

    Returns:
      `trace` (the file), and of the first device with a timeline in it `idle_share` and
      `longest_idle_seconds` between its first and last operation; the CPU has no timeline.
    """
    with jax.profiler.trace(str(folder)):
        waiting = start()
        for _ in range(batches - 1):
            following = start()
            waiting()
            waiting = following
        waiting()
    file = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    return {"trace": str(file)} | idle_time(jax.profiler.ProfileData.from_file(str(file)))


def idle_time(trace: Any) -> dict[str, float]:
    """What `profile` returns of the device's timeline, of a `jax.profiler.ProfileData`."""
    for plane in trace.planes:
        spans = sorted(_operations(plane)) if plane.name.startswith("/device:") else []
        if spans:
            idle, longest, end = 0.0, 0.0, spans[0][1]
            for begin, finish in spans:
                idle, longest = idle + max(begin - end, 0), max(longest, begin - end)
                end = max(end, finish)
            share = idle / (end - spans[0][0])
            return {"idle_share": share, "longest_idle_seconds": max(longest, 0) / 1e9}
    return {}


def _operations(plane: Any) -> Iterator[tuple[float, float]]:
    """Begin and end in ns of what a device computed: copies to and from it are not work."""
    for line in plane.lines:
        # CUDA's streams; a TPU's one line of operations.
        if line.name.startswith("Stream") or line.name == "XLA Ops":
            for event in line.events:
                if not event.name.startswith(("Memcpy", "Memset")):
                    yield event.start_ns, event.start_ns + event.duration_ns
