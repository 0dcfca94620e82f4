"""Texts of rows on disk, from when they have become tokens until they are stored."""

import dataclasses
import tempfile
import weakref
from array import array

from gradjax.structs import Example


class Texts:
    """Questions and answers by position, in a nameless temporary file: there may be millions."""

    def __init__(self):
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._ends = array("Q", [0])  # of every text: two to a row

    def append(self, example: Example) -> Example:
        """Takes the texts of the next row; returns the row without."""
        for text in (example.instruction, example.output):
            # Lone surrogates, which JSON may have, are no reason to stop.
            size = self._file.write(text.encode("utf-8", "surrogatepass"))
            self._ends.append(self._ends[-1] + size)
        return dataclasses.replace(example, instruction="", output="", messages=())

    def restore(self, position: int, example: Example) -> Example:
        """The row with the question and the answer of a position."""
        start, middle, end = self._ends[2 * position : 2 * position + 3]
        self._file.seek(start)
        both = self._file.read(end - start)
        self._file.seek(0, 2)
        texts = both[: middle - start], both[middle - start :]
        instruction, output = (text.decode("utf-8", "surrogatepass") for text in texts)
        return dataclasses.replace(example, instruction=instruction, output=output)
