"""Rows of similar length go together, in few padded shapes: each shape is compiled once."""

import dataclasses
import itertools
import sys
from collections.abc import Collection, Sequence

import numpy as np

from gradjax.structs import TokenBatch, TokenizedExample

# Padded lengths are multiples of this: a TPU's tile, a tensor core's and a CPU's vector.
MULTIPLE = 8
MAX_SHAPES = 24  # in one call: their programs are held side by side
PAD_ID = 0  # any token will do: padding carries no loss and no real token sees it
# Padded lengths to each doubling, so that there are never too many to choose from: what is
# lost, half a 128th of a length, is less than another shape would win.
_FINENESS = 128


@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """Which rows form a batch, and its padded shape [size, length]."""

    rows: tuple[int, ...]  # positions in the list of lengths
    length: int  # tokens, T
    size: int  # slots, B ≥ len(rows)


@dataclasses.dataclass(frozen=True)
class _Limits:
    """What bounds a batch, on one device and on all."""

    tokens: int
    rows: int | None
    devices: int
    even: bool  # batches of one length are evenly full, or all slots are there

    def split(self, rows: np.ndarray, length: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
        """(number of batches, slots in each) for numbers of rows, at least one, of one length.

        As few batches as the limits allow.
        """
        most = np.maximum(self.tokens // length, 1)
        if self.rows:
            most = np.minimum(most, self.rows)
        batches = -(-rows // (most * self.devices))
        slots = -(-rows // (batches * self.devices)) if self.even else most
        return batches, slots * self.devices


def batch_by_length(
    lengths: Sequence[int],
    batch_tokens: int,
    max_rows: int | None = None,
    devices: int = 1,
    *,
    max_shapes: int = MAX_SHAPES,
    shape_tokens: float = 0,
    shared: Collection[int] | None = None,
) -> list[BatchSpec]:
    """Puts every row in one batch of at most `batch_tokens` padded tokens a device, longest first.

    Rows are sorted by length and cut where the fewest padded tokens follow, filler included. A
    row longer than `batch_tokens` is alone on its device. Memory problems show in the first batch
    rather than at the end.

    Args:
      lengths: in tokens.
      max_rows: of a batch on one device; every device has as many slots.
      max_shapes: pairs of size and padded length, each with a length of its own.
      shape_tokens: what compiling a shape costs, in padded tokens: where one more saves fewer,
        there are fewer than `max_shapes`.
      shared: padded lengths of batches of earlier rows, none at first, where more rows may come:
        rows take these shapes unless others pay.
    """
    if not lengths:
        return []
    limits = _Limits(batch_tokens, max_rows, devices, even=shared is None)
    padded = round_up(np.maximum(lengths, 1), MULTIPLE, _FINENESS)
    order = np.argsort(-padded, kind="stable")
    ascending = padded[order[::-1]]
    specs: list[BatchSpec] = []
    start = 0
    for shorter, length in _spans(padded, limits, max_shapes, shape_tokens, shared or ()):
        count = len(order) - int(np.searchsorted(ascending, shorter, "right")) - start
        if count <= 0:
            continue  # all of them have filled slots of longer batches
        batches, size = (int(n) for n in limits.split(np.asarray(count), length))
        for _ in range(batches):
            # What would be filler takes the longest of the shorter rows.
            specs.append(BatchSpec(tuple(order[start : start + size].tolist()), length, size))
            start += size
    return specs


def round_up(n: np.ndarray, least: int, fineness: int) -> np.ndarray:
    """The next of few numbers: multiples of `least`, but only `fineness` to each doubling.

    `least` and `fineness` are powers of two; `n` is at least 1.
    """
    doubling = np.frexp(n - 1)[1]  # n ≤ 2**doubling
    step = np.maximum(least, (1 << doubling) // (2 * fineness))
    return -(-n // step) * step


def make_batch(spec: BatchSpec, tokenized: Sequence[TokenizedExample]) -> TokenBatch:
    """The formed batch; `tokenized` is the list whose lengths were planned."""
    tokens = np.full((spec.size, spec.length), PAD_ID, np.int32)
    targets = np.zeros((spec.size, spec.length), bool)
    lengths = np.zeros(spec.size, np.int32)
    for slot, row in enumerate(spec.rows):
        n = lengths[slot] = tokenized[row].num_tokens
        tokens[slot, :n] = tokenized[row].tokens
        targets[slot, :n] = tokenized[row].targets
    return TokenBatch(spec.rows, tokens, targets, lengths)


def _spans(
    padded: np.ndarray,
    limits: _Limits,
    max_shapes: int,
    shape_tokens: float,
    shared: Collection[int],
) -> list[tuple[int, int]]:
    """(longest that is shorter, length) of the shapes that rows take, descending.

    Rows that no shared length is long enough for have shapes of their own; others only where these
    save more tokens than they cost.
    """
    known = sorted({0, *shared})
    left = max_shapes - len(shared)
    found: list[tuple[int, int]] = []
    for shorter, length in reversed([*itertools.pairwise([*known, sys.maxsize])]):
        rows = padded[(padded > shorter) & (padded <= length)]
        if not len(rows):
            continue
        new = _shape_lengths(rows, limits, max(left, 1), shape_tokens)
        new = [(max(start, shorter), end) for start, end in new]
        if length < sys.maxsize:
            cost = sum(_tokens(rows, limits, *span) + shape_tokens for span in new)
            if left < len(new) or cost >= _tokens(rows, limits, shorter, length):
                found.append((shorter, length))
                continue
        found += new
        left -= len(new)
    return found


def _tokens(rows: np.ndarray, limits: _Limits, shorter: int, length: int) -> int:
    """Padded tokens of the rows that a shape is for."""
    count = int(((rows > shorter) & (rows <= length)).sum())
    if not count:
        return 0
    batches, slots = limits.split(np.asarray(count), length)
    return int(batches * slots * length)


def _shape_lengths(
    padded: np.ndarray, limits: _Limits, max_shapes: int, shape_tokens: float
) -> list[tuple[int, int]]:
    """(longest that is shorter, length) of the shapes that need the fewest tokens, descending.

    Exact for rows that keep to their shape, by dynamic programming: cost[j] is the least number
    of tokens of the j shortest distinct lengths in so many shapes; one shape more takes lengths
    i to j - 1 up to the last of them.
    """
    steps, counts = np.unique(padded, return_counts=True)
    ends = np.cumsum(counts)
    rows = ends - (ends - counts)[:, None]  # [i, j - 1] of the lengths i to j - 1
    batches, slots = limits.split(np.maximum(rows, 1), steps)
    tokens = np.where(rows > 0, batches * slots * steps + shape_tokens, np.inf)
    cost = np.full(len(steps) + 1, np.inf)
    cost[0] = 0
    origins, totals = [], []
    for _ in range(min(max_shapes, len(steps))):
        options = cost[:-1, None] + tokens
        origin = options.argmin(axis=0)
        cost = np.append(np.inf, options[origin, np.arange(len(steps))])
        origins.append(origin)
        totals.append(cost[-1])
    found, end = [], len(steps)
    for origin in reversed(origins[: int(np.argmin(totals)) + 1]):
        start = int(origin[end - 1])
        found.append((int(steps[start - 1]) if start else 0, int(steps[end - 1])))
        end = start
    return found
