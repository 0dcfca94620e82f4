"""Bytes that are needed once more, in another order, and are too many for the memory."""

import tempfile
import weakref
from array import array
from collections.abc import Iterator
from contextlib import contextmanager

from gradjax.errors import GradjaxError


class Spool:
    """Pieces of bytes by position, in a nameless temporary file.

    Raises:
      GradjaxError: from any call, if the temporary folder cannot be written.
    """

    def __init__(self):
        with _faults():
            self._file = tempfile.TemporaryFile()  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._ends = array("Q", [0])

    def __len__(self) -> int:
        """How many pieces there are."""
        return len(self._ends) - 1

    @property
    def num_bytes(self) -> int:
        """Of all pieces."""
        return self._ends[-1]

    def append(self, piece: bytes) -> None:
        """Puts a piece behind the others."""
        with _faults():
            self._file.seek(0, 2)
            self._file.write(piece)
        self._ends.append(self._ends[-1] + len(piece))

    def __getitem__(self, position: int) -> bytes:
        """The piece at a position, from 0."""
        start, end = self._ends[position : position + 2]
        with _faults():
            self._file.seek(start)
            return self._file.read(end - start)


@contextmanager
def _faults() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise GradjaxError(
            f"the temporary folder {tempfile.gettempdir()} cannot be written ({error.strerror}); "
            "name one with room in the environment variable TMPDIR"
        ) from error
