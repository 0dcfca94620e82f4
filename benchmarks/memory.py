"""How much memory a piece of work takes: of the device where it says so, else of the process."""

import threading
from pathlib import Path


class PeakMemory:
    """Samples this process's anonymous memory; `bytes` is the largest seen."""

    def __enter__(self) -> "PeakMemory":
        self.bytes = anonymous_memory()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(0.005):
            self.bytes = max(self.bytes, anonymous_memory())

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def anonymous_memory() -> int:
    """Bytes of this process's memory that no file backs."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(x for x in status.splitlines() if x.startswith("RssAnon")).split()[1])
