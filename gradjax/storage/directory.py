"""A directory of ours: is it one, what does its manifest say, and is it about the same settings?

A run, scores and a selection are each a directory of one kind, with a manifest in JSON that says
what it was made with. Everything here only reads, but for `write_manifest`.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradjax import strict_json
from gradjax.errors import GradjaxError
from gradjax.storage.filesystem import WORK, LocalPlace, RemotePlace, open_place


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a directory of ours may be."""

    what: str  # as in "DIR is not WHAT"
    manifest: str  # file name
    command: str  # that writes it
    before: frozenset[str] = frozenset()  # what may lie there although the manifest does not yet


RUN = Kind(
    "a gradjax run", "run.json", "gradjax spectra", frozenset({"examples", "spectra", "similarity"})
)
_ANSWERS = frozenset(f"judge.sqlite{part}" for part in ("", "-journal", "-wal", "-shm"))
SCORES = Kind("a gradjax scoring", "score.json", "gradjax score", _ANSWERS)


class Directory:
    """A directory or URL that holds, or is to hold, what one kind says."""

    def __init__(self, directory: str | Path, kind: Kind):
        self.place: LocalPlace | RemotePlace = open_place(directory)
        self.kind = kind

    @property
    def path(self) -> str | Path:
        """A URL as str."""
        return self.place.directory

    def manifest(self) -> dict[str, Any] | None:
        """What the manifest says; None where there is none.

        Raises:
          GradjaxError: if it is damaged or cannot be read.
        """
        text = self.place.read(self.kind.manifest)
        if text is None:
            return None
        try:
            values = json.loads(text)
            if isinstance(values, dict):
                return values
            problem = f"it holds a {type(values).__name__}, expected an object"
        except ValueError as error:
            problem = str(error)
        raise self.damaged(problem)

    def require_manifest(self) -> dict[str, Any]:
        """What the manifest says.

        Raises:
          GradjaxError: as `manifest`, or if there is none.
        """
        values = self.manifest()
        if values is None:
            raise GradjaxError(
                f"{self.path} is not {self.kind.what}: it has no {self.kind.manifest}; give what "
                f"{self.kind.command} wrote (its --output_dir)"
            )
        return values

    def write_manifest(self, values: Mapping[str, Any]) -> None:
        """Replaces the manifest, whole."""
        text = strict_json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        self.place.put(self.kind.manifest, text.encode())

    def require_ours(self) -> None:
        """Raises GradjaxError where the directory holds other things and no manifest."""
        found = self.place.names()
        if self.kind.manifest in found:
            return
        if strangers := [name for name in found if name not in self.kind.before | {WORK}]:
            raise GradjaxError(
                f"{self.path} is not empty and not {self.kind.what} (found "
                f"{', '.join(strangers[:3])}); give an empty or new directory with --output_dir"
            )

    def require_same(self, what: str, there: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        """Raises GradjaxError where settings differ, with each of them named.

        Args:
          what: what the directory holds of these settings, such as `a run`.
          there: settings that the manifest says.
          now: settings that are asked for.
        """
        differing = [
            f"{name} ({there.get(name)!r} there, {now.get(name)!r} now)"
            for name in sorted({*there, *now})
            if there.get(name) != now.get(name)
        ]
        if differing:
            raise GradjaxError(
                f"{self.path} holds {what} with other settings: {'; '.join(differing)}; use the "
                "same settings, another --output_dir, or --overwrite to replace it"
            )

    def damaged(self, problem: object) -> GradjaxError:
        """What to raise where the manifest does not say what it should."""
        return GradjaxError(
            f"{self.path}/{self.kind.manifest} is damaged ({problem}); restore it, or start anew "
            "in another --output_dir"
        )
