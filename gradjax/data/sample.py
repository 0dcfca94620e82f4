"""Draws rows of a registered data set: what `gradjax prepare` writes."""

import collections
import hashlib
import heapq
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gradjax import strict_json
from gradjax.data.catalog import RegisteredDataset, fetch
from gradjax.data.examples import plain_fault, to_example
from gradjax.data.sources import registered_rows
from gradjax.errors import GradjaxError
from gradjax.storage.filesystem import whole_file
from gradjax.structs import Example


class Sample:
    """Rows drawn without replacement from those that gradjax can use, and what was left out.

    With `plain`, rows that `--prompt_format=plain` cannot take are left out as well, with the
    status that `gradjax spectra` gives them.
    A row's turn is a hash of the seed and its place in the source: a smaller sample is the
    beginning of a larger one, and data sets over the same questions give the same ones.
    """

    def __init__(self, rows: Iterable[object], size: int, seed: int, *, plain: bool = False):
        self.plain = plain
        self.usable = 0
        self.dropped: collections.Counter[str] = collections.Counter()  # by status
        self.reasons: dict[str, str] = {}  # the first of each status
        self.rows = [row for *_, row in heapq.nsmallest(size, self._turns(rows, seed))]

    def _turns(self, rows: Iterable[object], seed: int) -> Iterator[tuple[bytes, int, Any]]:
        for place, row in enumerate(rows):
            example = to_example(row, "", place)
            status, reason = example.status, example.reason
            if self.plain and status == "ok" and (reason := plain_fault(example)):
                status = "invalid_row"
            if status == "ok":
                self.usable += 1
                yield hashlib.sha256(f"{seed} {place}".encode()).digest(), place, _row(example)
            else:
                self.dropped[status] += 1
                self.reasons.setdefault(status, reason)


def _row(example: Example) -> dict[str, Any]:
    question_and_answer = len(example.messages) == 2
    if question_and_answer and not any(message.extra for message in example.messages):
        return {"instruction": example.instruction, "output": example.output}
    return {"messages": [message.to_dict() for message in example.messages]}


def write_sample(
    dataset: RegisteredDataset,
    source: str | None,
    size: int,
    seed: int,
    output: Path,
    *,
    plain: bool = False,
) -> str:
    """Writes a sample as JSON lines, and OUTPUT.sha256; returns what to tell of it.

    Rows have `instruction` and `output`, or `messages` where there are more turns. The file
    is whole or absent; the checksum comes last, and is never there beside other data.

    Args:
      dataset: which.
      source: a local copy, or None to fetch it from the Hub.
      size: rows to draw; all if there are fewer.
      seed: of the draw.
      output: the file to write, in a directory that exists.
      plain: leave out rows that `--prompt_format=plain` cannot take.

    Raises:
      GradjaxError: if the source is missing, unreadable or without a usable row, or the output
        cannot be written.
    """
    flags = f"--sample={size} --seed={seed} {'--plain ' * plain}--output={shlex.quote(str(output))}"
    place = Path(source).expanduser() if source else fetch(dataset, flags)
    origin = str(place) if source else f"{dataset.repo} at {place.name}"
    sample = Sample(registered_rows(dataset, place), size, seed, plain=plain)
    dropped = [
        f"{count} dropped as {status}, the first because {sample.reasons[status]}"
        for status, count in sample.dropped.items()
    ]
    if not sample.rows:
        raise GradjaxError(
            f"{origin} has no usable row of {dataset.name} ({'; '.join(dropped) or 'no rows'}): "
            f"expected the columns {', '.join(dataset.columns)}"
        )
    data = "".join(
        strict_json.dumps(row, ensure_ascii=False) + "\n" for row in sample.rows
    ).encode()
    digest = hashlib.sha256(data).hexdigest()
    drawn = f"{len(sample.rows)} of {sample.usable} rows of {dataset.name}, seed {seed}"
    checksum = output.with_name(f"{output.name}.sha256")
    with whole_file(output) as temporary:
        temporary.write_bytes(data)
        checksum.unlink(missing_ok=True)
    with whole_file(checksum) as temporary:
        temporary.write_text(f"# {drawn}, from {origin}\n{digest}  {output.name}\n")
    return "\n".join([f"{drawn}, from {origin}", *dropped, f"sha256 {digest}  {output}"])
