"""What comes between computing and the store: an ETA, whole shards, a writer thread of its own."""

import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Self

from absl import logging
from tqdm import tqdm

from gradjax.runs.windows import ReadAhead
from gradjax.storage.store import Store
from gradjax.structs import ExampleResult

# A shard is written when this much work has come together: less is lost when a run is killed,
# more makes fewer files.
_FLUSH_SECONDS = 10.0
_FLUSH_VALUES = 16_000_000  # singular values held in memory
# Shards after which they take twice as much: a kill costs a long run a thirtieth at most, and a
# million rows whose values are few make hundreds of files.
_FLUSH_DOUBLING = 64
_FLUSH_ROWS = 256  # of a small model, whose values weigh less than the objects around them


class BackgroundWriter:
    """Writes each shard in a thread of its own while the next one is computed."""

    def __init__(self, store: Store, singular_values: bool):
        self._append = partial(store.append, singular_values=singular_values)
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        self._waited = 0.0

    def __enter__(self) -> Self:
        return self

    def append(self, shard: list[ExampleResult]) -> None:
        """Begins to write a shard, once the one before it is written; raises its faults."""
        self._wait()
        self._writing = self._thread.submit(self._append, shard)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._wait()
                logging.info("Computing waited %.2f s for shards being written", self._waited)
        finally:
            self._thread.shutdown()

    def _wait(self) -> None:
        if self._writing:
            since = time.monotonic()
            self._writing.result()
            self._waited += time.monotonic() - since


def with_progress(
    results: Iterator[list[ExampleResult]], ahead: ReadAhead, processes: int
) -> Iterator[list[ExampleResult]]:
    """Passes results on, with an ETA weighted by tokens: a bar on a terminal, else lines.

    Args:
      ahead: knows what is to compute, once all is read.
      processes: that compute these rows together, each its part.
    """
    terminal = sys.stderr.isatty()
    with tqdm(
        unit="tok",
        unit_scale=True,
        dynamic_ncols=True,
        mininterval=0.5 if terminal else 30,
        disable=not terminal,
    ) as bar:
        start = last = time.monotonic()
        done = rows = 0
        bar.set_description_str("compiling")  # the bar stands still until a batch is done
        for batch in results:
            computed = [r for r in batch if r.tokenized.status == "ok"]
            new = sum(r.tokenized.num_tokens for r in computed)
            done, rows = done + new, rows + len(computed)
            tokens, every = ahead.tokens // processes, ahead.to_compute // processes
            bar.set_description_str("" if ahead.complete else "reading rows too")
            bar.total = tokens if ahead.complete else None
            bar.update(new)
            now = time.monotonic()
            ended = ahead.complete and done - new < tokens <= done
            if not terminal and done and (now - last > 15 or ended):
                last = now
                if ahead.complete:
                    left = (now - start) * max(tokens - done, 0) / done
                    share = min(100 * done / tokens, 100)
                    logging.info(
                        "%d of %d rows, %.0f %% of tokens, %.0f s left", rows, every, share, left
                    )
                else:
                    logging.info("%d of more than %d rows, which are still being read", rows, every)
            yield batch


def shards(batches: Iterator[list[ExampleResult]]) -> Iterator[list[ExampleResult]]:
    """Joins batches of results until they are worth a shard; the later, the more."""
    held: list[ExampleResult] = []
    values, since, made = 0, time.monotonic(), 0
    for batch in batches:
        held += batch
        values += sum(s.singular_values.size for result in batch for s in result.spectra)
        growth = 2 ** (made // _FLUSH_DOUBLING)
        full = values > _FLUSH_VALUES or len(held) >= growth * _FLUSH_ROWS
        if full or time.monotonic() - since > growth * _FLUSH_SECONDS:
            yield held
            made += 1
            held, values, since = [], 0, time.monotonic()
    if held:
        yield held
