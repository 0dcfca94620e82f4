"""Rows are read and become tokens window by window, ahead of the devices that compute them."""

import dataclasses
import itertools
import math
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any, Self, cast

import numpy as np
from absl import logging

from gradjax.config import RunConfig
from gradjax.data.examples import to_example
from gradjax.data.sources import Source, describe_rows, stream_rows
from gradjax.data.texts import Texts
from gradjax.data.tokens import ENCODED_TOGETHER, check_vocabulary, tokenize_rows
from gradjax.data.usable import Tally
from gradjax.errors import GradjaxError
from gradjax.hashing import sha256
from gradjax.runs.inputs import Inputs
from gradjax.storage.store import FinishedRow, Key
from gradjax.structs import COMPUTED, Example, ExampleResult, Status, TokenizedExample

# The first is what a run waits for: some seconds. Fewer rows would be padded more.
WINDOW_ROWS = 16_384
_WINDOW_CHARACTERS = 2**26
_KEPT = 0.9  # of the usable rows of each group, by `auto_target_tokens`
_SAMPLE_ROWS = 4_096  # that a plan is made of
# Windows that may wait for the devices. A million rows are read at once, so that faults of the
# data show in minutes, and how long the run will take.
_AHEAD = 64
_POLL_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class Window:
    """Rows that are batched together."""

    tokenized: list[TokenizedExample]  # this process's, without texts
    texts: Texts  # theirs, by position
    finished: frozenset[int]  # positions of those that the store holds
    rows: int  # of all processes
    left: int  # rows of all processes that the store does not hold
    data: dict[str, dict[str, Any]]  # what a manifest says of each group by now
    tallies: tuple[Tally, ...]  # of the groups that are read to their end
    hashed: str  # of all processes' rows
    last: bool

    @property
    def to_compute(self) -> list[TokenizedExample]:
        """The usable rows that the store does not hold."""
        return [row for _, row in self._unfinished() if row.status == "ok"]

    @property
    def unusable(self) -> list[ExampleResult]:
        """The other rows that it does not hold."""
        return [
            self.with_texts(ExampleResult(row, row.status, row.reason))
            for _, row in self._unfinished()
            if row.status != "ok"
        ]

    def with_texts(self, result: ExampleResult) -> ExampleResult:
        """A result whose row has its question and answer again."""
        row = result.tokenized
        whole = self.texts.restore(self._positions[row.example.key], row.example)
        return dataclasses.replace(result, tokenized=dataclasses.replace(row, example=whole))

    @cached_property
    def _positions(self) -> dict[Key, int]:
        return {row.example.key: position for position, row in enumerate(self.tokenized)}

    def _unfinished(self) -> Iterator[tuple[int, TokenizedExample]]:
        rows = enumerate(self.tokenized)
        return ((position, row) for position, row in rows if position not in self.finished)


def read_windows(
    config: RunConfig,
    inputs: Inputs,
    process: int = 0,
    num_processes: int = 1,
    *,
    whole: bool = True,
) -> Iterator[Window]:
    """All rows in their order, of which this process tokenizes every `num_processes`-th.

    Finished rows keep only their length. What is not as it should be with a group is logged once
    it is read.

    Args:
      whole: False for rows that are a sample: nothing is said or refused of a group.

    Raises:
      GradjaxError: for a source that cannot be read, if the store holds other rows than it, or
        if none of its rows is usable, which a process that tokenizes only some cannot know.
    """
    tallies = {source.group: Tally(source) for source in inputs.sources}
    data = {source.group: describe_rows(source, None, None) for source in inputs.sources}
    ended: list[Tally] = []
    for examples, sources_read in _together(inputs.sources, config.limit):
        for example in examples:
            tallies[example.group].read(example)
        finished = _finished(inputs, examples)
        # By number: with copies of the data that differ no row is lost or taken twice.
        own = [e for e in examples if e.example_id % num_processes == process]
        texts = Texts()
        tokenized = [*_tokenized(own, finished, inputs, config, texts)]
        check_vocabulary(tokenized, inputs.model.vocab_size)
        for row in tokenized:
            _judge(tallies[row.example.group], row, inputs.model.max_positions)
        for group in [*tallies][len(ended) : sources_read]:
            ended.append(tallies[group])
            if whole:
                _require_all(inputs, tallies[group])
                if num_processes == 1:
                    tallies[group].require_usable()
                _report(tallies[group], inputs.model.max_positions)
            data = data | {group: tallies[group].describe()}
        yield Window(
            tokenized,
            texts,
            frozenset(i for i, example in enumerate(own) if example.key in finished),
            len(examples),
            len(examples) - len(finished),
            data,
            tuple(ended),
            sha256("".join(example.row_hash for example in examples)),
            last=sources_read == len(tallies),
        )


def read_sample(config: RunConfig, inputs: Inputs) -> tuple[list[Window], int | None]:
    """The windows of the first rows of every source, and how many these are; None of all rows.

    Raises:
      GradjaxError: as `read_windows`, and if no row of a group that is read to its end is usable.
    """
    most = -(-_SAMPLE_ROWS // len(inputs.sources))
    sampled = config.limit is None or config.limit > most
    shorter = dataclasses.replace(config, limit=most) if sampled else config
    windows = [*read_windows(shorter, inputs, whole=False)]
    for tally in windows[-1].tallies:
        if not (sampled and tally.rows == most):
            tally.require_usable()
    sampled &= any(tally.rows == most for tally in windows[-1].tallies)
    return windows, most if sampled else None


def with_target_tokens(config: RunConfig, inputs: Inputs) -> RunConfig:
    """The config with a number in place of `auto_target_tokens`: what the store was begun with.

    A new run takes the largest number that 90 % of the usable rows of each group have, of its
    first rows where there are many.

    Raises:
      GradjaxError: as `read_windows`.
    """
    if not config.auto_target_tokens:
        return config
    if inputs.found.manifest:
        chosen = inputs.found.manifest["settings"].get("target_tokens")
    else:
        chosen = _common_target_tokens(config, inputs)
    tokens = dataclasses.replace(config.tokens, target_tokens=chosen)
    return dataclasses.replace(config, tokens=tokens)


def _common_target_tokens(config: RunConfig, inputs: Inputs) -> int:
    windows, sample = read_sample(config, inputs)
    counts: dict[str, list[int]] = {source.group: [] for source in inputs.sources}
    for row in (row for window in windows for row in window.tokenized):
        if row.status == "ok":
            counts[row.example.group].append(row.num_target_tokens)
    counts = {group: own for group, own in counts.items() if own}
    if not counts:
        windows[-1].tallies[0].require_usable()
    chosen = min(
        sorted(own, reverse=True)[math.ceil(_KEPT * len(own)) - 1] for own in counts.values()
    )
    shares = [
        f"{sum(count >= chosen for count in own) / len(own):.0%} of {group}"
        for group, own in counts.items()
    ]
    of_sample = f" (of the first {sample:,} rows of each)" if sample else ""
    logging.info(
        "--target_tokens=auto: %d tokens, which %s have%s", chosen, " and ".join(shares), of_sample
    )
    return chosen


def _together(sources: Sequence[Source], limit: int | None) -> Iterator[tuple[list[Example], int]]:
    """The rows of each window, and how many sources are read to their end by then."""

    def read(source: Source) -> Iterator[Example]:
        for number, row in enumerate(stream_rows(source, limit)):
            yield to_example(row, source.group, number, source.reading)

    groups = [source.group for source in sources]
    rows = itertools.chain.from_iterable(map(read, sources))
    following = next(rows, None)
    while following:
        window: list[Example] = []
        characters = 0
        while following and len(window) < WINDOW_ROWS and characters < _WINDOW_CHARACTERS:
            window.append(following)
            characters += len(following.instruction) + len(following.output)
            following = next(rows, None)
        yield window, groups.index(following.group) if following else len(groups)


def _finished(inputs: Inputs, examples: Sequence[Example]) -> dict[Key, FinishedRow]:
    """What the store holds of some rows.

    Raises:
      GradjaxError: if it holds another row in place of one of them.
    """
    finished = {}
    for example in examples:
        if before := inputs.found.finished.get(example.key):
            if before.row_hash != example.row_hash:
                raise GradjaxError(
                    f"{inputs.directory} holds another row {example.example_id} of group "
                    f"{example.group} than the data has now; give the same data, another "
                    "--output_dir, or --overwrite"
                )
            finished[example.key] = before
    return finished


def _require_all(inputs: Inputs, tally: Tally) -> None:
    """Raises GradjaxError if the store holds rows of a group that its source no longer has."""
    group = tally.source.group
    held = (number for of, number in inputs.found.finished if of == group)
    if (last := max(held, default=-1)) >= tally.rows:
        raise GradjaxError(
            f"{inputs.directory} holds row {last} of group {group}, which this run's data or "
            "--limit leaves out; give all of it, another --output_dir, or --overwrite to replace "
            "the run"
        )


def _tokenized(
    examples: Sequence[Example],
    finished: dict[Key, FinishedRow],
    inputs: Inputs,
    config: RunConfig,
    texts: Texts,
) -> Iterator[TokenizedExample]:
    """The rows as tokens; their texts go into `texts`."""
    for start in range(0, len(examples), ENCODED_TOGETHER):
        together = examples[start : start + ENCODED_TOGETHER]
        new = (example for example in together if example.key not in finished)
        tokenized = tokenize_rows(new, inputs.tokenizer, config.tokens)
        rows = []
        for example in together:
            before = finished.get(example.key)
            rows.append(_finished_before(example, before) if before else next(tokenized))
        yield from _packed(rows, texts)


def _packed(rows: list[TokenizedExample], texts: Texts) -> Iterator[TokenizedExample]:
    """The rows without texts, their tokens and targets in one array each: small in memory."""
    tokens = np.concatenate([row.tokens for row in rows])
    targets = np.concatenate([row.targets for row in rows])
    end = 0
    for row in rows:
        start, end = end, end + row.num_tokens
        own = {"tokens": tokens[start:end], "targets": targets[start:end]}
        yield dataclasses.replace(row, example=texts.append(row.example), **own)


def _finished_before(example: Example, found: FinishedRow) -> TokenizedExample:
    """A stand-in of the right length: batches stay what they were, and this row is in none."""
    computed = found.status in COMPUTED
    return TokenizedExample(
        example,
        np.broadcast_to(np.int32(0), found.num_tokens),
        np.broadcast_to(np.bool_(False), found.num_tokens),
        truncated=found.truncated,
        status="ok" if computed else cast(Status, found.status),
    )


def _judge(tally: Tally, row: TokenizedExample, max_positions: int) -> None:
    tally.judge(row.example, row.status, row.reason)
    if row.status == "ok":
        tally.beyond_positions += row.num_tokens > max_positions
        tally.cut += row.truncated


def _report(tally: Tally, max_positions: int) -> None:
    """Says what is not as it should be with a group's rows."""
    tally.report()
    if tally.cut:  # their spectra are of a part of the response
        logging.warning("%s: %d rows cut at --max_length", tally.source.group, tally.cut)
    if tally.beyond_positions:
        logging.warning(
            "%s: %s rows have more tokens than the %s positions that the model was made for "
            "(max_position_embeddings); their numbers are of text that it cannot read well; "
            "--max_length=%d cuts them",
            tally.source.group,
            f"{tally.beyond_positions:,}",
            f"{max_positions:,}",
            max_positions,
        )


class ReadAhead(Iterator[Window]):
    """Windows that a thread of its own reads ahead of whoever takes them."""

    def __init__(self, windows: Iterable[Window], *, in_order: bool = False):
        """`in_order`: faults are raised in their window's place, as in other processes."""
        # Of the windows read so far; the first two count the rows of all processes.
        self.rows = self.finished = self.to_compute = self.unusable = 0
        self.tokens = 0  # of the rows to compute
        self.complete = False
        self.data: dict[str, dict[str, Any]] = {}  # of the window taken last
        self.tallies: tuple[Tally, ...] = ()
        self._in_order = in_order
        self._fault: BaseException | None = None
        self._windows: queue.Queue[Window | None] = queue.Queue(_AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(windows,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._closed.set()
        if kind is None:  # otherwise it may take its seconds
            self._thread.join()

    def __next__(self) -> Window:
        window = self._windows.get()
        self.check()
        if window is None:
            if self._fault:
                raise self._fault
            raise StopIteration
        self.data, self.tallies = window.data, window.tallies
        return window

    def check(self) -> None:
        """Raises what reading has come to, however far ahead, unless faults are in order."""
        if self._fault and not self._in_order:
            raise self._fault

    def settle(self) -> None:
        """Returns once all is read, or as much as may wait; raises what reading has come to."""
        while not (self.complete or self._fault or self._windows.full()):
            self._closed.wait(_POLL_SECONDS / 10)
        if self._fault:
            raise self._fault

    def _read(self, windows: Iterable[Window]) -> None:
        try:
            for window in windows:
                left = window.to_compute
                self.rows += window.rows
                self.finished += window.rows - window.left
                self.to_compute += len(left)
                self.unusable += len(window.tokenized) - len(window.finished) - len(left)
                self.tokens += sum(row.num_tokens for row in left)
                self.complete = window.last
                if not self._put(window):
                    return
        except BaseException as fault:
            self._fault = fault
        self._put(None)

    def _put(self, window: Window | None) -> bool:
        """False if nobody takes windows any more."""
        while not self._closed.is_set():
            with suppress(queue.Full):
                self._windows.put(window, timeout=_POLL_SECONDS)
                return True
        return False
