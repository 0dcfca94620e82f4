"""Texts of rows on disk, from when they have become tokens until they are stored."""

import dataclasses

from gradjax.storage.spool import Spool
from gradjax.structs import Example


class Texts:
    """Questions and answers by position: there may be millions."""

    def __init__(self):
        self._pieces = Spool()  # two to a row

    @property
    def num_bytes(self) -> int:
        """Of all texts."""
        return self._pieces.num_bytes

    def append(self, example: Example) -> Example:
        """Takes the texts of the next row; returns the row without."""
        for text in (example.instruction, example.output):
            # Lone surrogates, which JSON may have, are no reason to stop.
            self._pieces.append(text.encode("utf-8", "surrogatepass"))
        return dataclasses.replace(example, instruction="", output="", messages=())

    def restore(self, position: int, example: Example) -> Example:
        """The row with the question and the answer of a position."""
        pieces = self._pieces[2 * position], self._pieces[2 * position + 1]
        instruction, output = (piece.decode("utf-8", "surrogatepass") for piece in pieces)
        return dataclasses.replace(example, instruction=instruction, output=output)
