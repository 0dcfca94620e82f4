"""Rows of similar length go together, in few padded shapes: each shape is compiled once."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from gradjax.structs import TokenBatch, TokenizedExample

MULTIPLE = 32  # padded lengths are multiples of this
MAX_BUCKETS = 6  # padded lengths in one call
PAD_ID = 0  # any token will do: padding carries no loss and no real token sees it


@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """Which rows form a batch, and its padded shape [size, length]."""

    rows: tuple[int, ...]  # positions in the list of lengths
    length: int  # tokens, T
    size: int  # slots, B ≥ len(rows)


def batch_by_length(
    lengths: Sequence[int], batch_tokens: int, max_rows: int | None = None, devices: int = 1
) -> list[BatchSpec]:
    """Puts every row in one batch of at most `batch_tokens` padded tokens a device, longest first.

    `lengths` are in tokens; `max_rows` is of one device, and every device has as many slots. At
    most MAX_BUCKETS padded lengths are used, chosen to pad least, and all batches of one padded
    length have one size; on one device, a bucket with n batches has at most n - 1 filler slots. A
    row longer than `batch_tokens` is alone on its device. Memory problems show in the first batch
    rather than at the end.
    """
    split = partial(_split, batch_tokens=batch_tokens, max_rows=max_rows, devices=devices)
    if not lengths:
        return []
    buckets = np.asarray(_length_buckets(lengths, split))
    bucket_of_row = buckets[np.searchsorted(buckets, lengths)]
    specs = []
    for length in reversed(buckets.tolist()):
        rows = np.flatnonzero(bucket_of_row == length)
        size = int(split(np.asarray(len(rows)), length)[1])
        specs += [
            BatchSpec(tuple(rows[i : i + size].tolist()), length, size)
            for i in range(0, len(rows), size)
        ]
    return specs


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


def _split(
    rows: np.ndarray, length: int, batch_tokens: int, max_rows: int | None, devices: int
) -> tuple[np.ndarray, np.ndarray]:
    """(number of batches, slots in each) for numbers of rows of one padded length.

    As few batches as the budget allows, and those evenly full.
    """
    most = min(max(batch_tokens // length, 1), max_rows or batch_tokens) * devices
    batches = -(-rows // most)
    return batches, -(-rows // (batches * devices)) * devices


def _length_buckets(
    lengths: Sequence[int], split: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]
) -> list[int]:
    """The padded lengths, ascending, that need the fewest tokens with padding and filler.

    Exact, by dynamic programming: cost[j] is the least number of tokens for the j shortest
    distinct lengths with the buckets so far; one more bucket takes lengths i to j - 1 up to the
    last of them.
    """
    padded = -(-np.maximum(lengths, 1) // MULTIPLE) * MULTIPLE
    steps, counts = np.unique(padded, return_counts=True)
    rows_below = np.concatenate([[0], np.cumsum(counts)])
    cost = np.full(len(steps) + 1, np.inf)
    cost[0] = 0
    origins = []
    for _ in range(min(MAX_BUCKETS, len(steps))):
        origin = np.zeros(len(steps) + 1, np.int64)
        next_cost = cost.copy()
        for j, length in enumerate(steps.tolist(), start=1):
            rows = rows_below[j] - rows_below[:j]
            batches, slots = split(rows, length)
            options = cost[:j] + batches * slots * length
            origin[j] = np.argmin(options)
            next_cost[j] = options[origin[j]]
        origins.append(origin)
        cost = next_cost
    buckets: list[int] = []
    end = len(steps)
    for origin in reversed(origins):
        if end:
            buckets.append(int(steps[end - 1]))
            end = int(origin[end])
    return buckets[::-1]
