"""What is said of a group's rows, in its manifest and on the screen: counted as they come."""

import hashlib
from collections import Counter
from typing import Any

from absl import logging

from gradjax.data.sources import Source, describe_rows
from gradjax.errors import GradjaxError
from gradjax.structs import Example, Status


class Tally:
    """Counts the rows of one source, and says what is not as it should be with them."""

    def __init__(self, source: Source):
        self.source = source
        self.rows = 0
        self._hash = hashlib.sha256()
        self._ignored: Counter[str] = Counter()
        self.beyond_positions = self.cut = 0  # usable rows, whose lengths a run looks at
        self._judged = 0
        self._unusable: Counter[str] = Counter()
        self._reasons: dict[str, str] = {}  # the first of each status

    def read(self, example: Example) -> None:
        """Counts a row; all of them, in order."""
        self.rows += 1
        self._hash.update(example.row_hash.encode("ascii"))
        self._ignored.update(example.ignored)

    def judge(self, example: Example, status: Status, reason: str) -> None:
        """Counts whether a row is usable; each process of a run says it of its own rows."""
        self._judged += 1
        if status != "ok":
            self._unusable[status] += 1
            if reason:  # those of an earlier call have none
                self._reasons.setdefault(status, f" (row {example.example_id}: {reason})")

    def describe(self) -> dict[str, Any]:
        """What a manifest says of the source once it is read to its end."""
        said = describe_rows(self.source, self.rows, self._hash.hexdigest()[:32])
        return said | ({"ignored_columns": self.ignored} if self._ignored else {})

    @property
    def ignored(self) -> list[str]:
        """Columns that were not read, those of most rows first."""
        return [name for name, _ in self._ignored.most_common()]

    @property
    def usable(self) -> int:
        """How many rows are, of those that were judged."""
        return self._judged - self._unusable.total()

    @property
    def unusable(self) -> str:
        """Unusable rows by status, with a first reason each; "" if there are none."""
        return ", ".join(
            f"{count:,} {status}{self._reasons.get(status, '')}"
            for status, count in self._unusable.most_common()
        )

    @property
    def refusal(self) -> str:
        """What is to be done if no row is usable."""
        return (
            f"none of the {self.rows:,} rows of group {self.source.group!r} is usable: "
            f"{self.unusable or 'see examples/'}; mend the data, or say how they are read with "
            "--columns, --field, --response_marker or another --prompt_format"
        )

    def report(self) -> None:
        """Logs how many rows are not usable and why, and the columns that were not read."""
        if self._unusable:
            logging.warning("%s: not usable are %s", self.source.group, self.unusable)
        if names := self.ignored:
            shown = ", ".join(names[:12]) + (" …" if len(names) > 12 else "")
            logging.info("%s: columns that are not read: %s", self.source.group, shown)

    def require_usable(self) -> None:
        """Raises GradjaxError if no row is usable."""
        if not self.usable:
            raise GradjaxError(self.refusal)
