"""Batches: every row once, few shapes, and the least padding that those allow."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradjax.data.batches import MAX_BUCKETS, BatchSpec, batch_by_length, make_batch
from gradjax.data.examples import to_example
from gradjax.structs import TokenizedExample

pytestmark = pytest.mark.smoke

row_lengths = st.lists(st.integers(1, 700), min_size=1, max_size=80)


@given(
    lengths=row_lengths,
    batch_tokens=st.integers(1, 3000),
    max_rows=st.none() | st.integers(1, 9),
)
@settings(deadline=None)
def test_plans_hold_every_row_once_in_few_even_shapes(lengths, batch_tokens, max_rows):
    specs = batch_by_length(lengths, batch_tokens, max_rows)
    assert sorted(itertools.chain.from_iterable(spec.rows for spec in specs)) == list(
        range(len(lengths))
    )
    for spec in specs:
        assert spec.rows
        assert len(spec.rows) <= spec.size <= (max_rows or math.inf)
        assert spec.length % 32 == 0
        assert spec.length >= max(lengths[row] for row in spec.rows)
        assert spec.size == 1 or spec.size * spec.length <= batch_tokens
    assert len({spec.length for spec in specs}) <= MAX_BUCKETS
    assert [spec.length for spec in specs] == sorted((p.length for p in specs), reverse=True)
    for _, bucket in itertools.groupby(specs, key=lambda spec: spec.length):
        bucket = list(bucket)
        assert len({spec.size for spec in bucket}) == 1
        assert sum(spec.size - len(spec.rows) for spec in bucket) <= len(bucket) - 1
    assert specs == batch_by_length(lengths, batch_tokens, max_rows)


@given(
    lengths=st.lists(st.integers(1, 32 * 9), min_size=1, max_size=30),
    batch_tokens=st.sampled_from([1, 300, 1000]),
)
@settings(deadline=None, max_examples=50)
def test_padded_lengths_are_the_best_choice(lengths, batch_tokens):
    def tokens_needed(buckets):
        total = 0
        for shorter, bucket in itertools.pairwise((0, *buckets)):
            count = sum(shorter < length <= bucket for length in lengths)
            if count:
                batches = math.ceil(count / max(batch_tokens // bucket, 1))
                total += batches * math.ceil(count / batches) * bucket
        return total

    steps = sorted({math.ceil(length / 32) * 32 for length in lengths})
    best = min(
        tokens_needed((*buckets, steps[-1]))
        for k in range(min(MAX_BUCKETS, len(steps)))
        for buckets in itertools.combinations(steps[:-1], k)
    )
    specs = batch_by_length(lengths, batch_tokens)
    assert sum(spec.size * spec.length for spec in specs) == best


def test_batches_are_as_full_as_the_budget_allows():
    specs = batch_by_length([60] * 10, batch_tokens=4 * 64)
    assert [(len(spec.rows), spec.size, spec.length) for spec in specs] == [
        (4, 4, 64),
        (4, 4, 64),
        (2, 4, 64),
    ]
    # Three batches are needed either way: 3 + 3 + 3 rather than 4 + 4 + 1.
    assert [len(spec.rows) for spec in batch_by_length([60] * 9, 4 * 64)] == [3, 3, 3]


def test_edges():
    assert batch_by_length([], 100) == []
    assert batch_by_length([5000], 100) == [BatchSpec((0,), 5024, 1)]
    assert batch_by_length([4096, 1], 4096) == [BatchSpec((0,), 4096, 1), BatchSpec((1,), 32, 1)]


def test_many_lengths_are_planned_quickly_enough_to_try():
    lengths = np.random.default_rng(0).integers(1, 32768, 5000).tolist()
    specs = batch_by_length(lengths, 65536)
    padded = sum(spec.length * spec.size for spec in specs)
    assert padded < 1.25 * sum(lengths)


def tokenized(length, seed):
    rng = np.random.default_rng(seed)
    return TokenizedExample(
        to_example({"instruction": "q", "output": "a"}, "g", seed),
        rng.integers(1, 99, length).astype(np.int32),
        rng.random(length) < 0.5,
    )


def test_batches_hold_the_tokens_and_pad_with_nothing():
    rows = [tokenized(length, seed) for seed, length in enumerate([5, 33, 17, 29, 3])]
    specs = batch_by_length([row.num_tokens for row in rows], batch_tokens=100, max_rows=3)
    seen = []
    for spec in specs:
        batch = make_batch(spec, rows)
        assert batch.tokens.shape == batch.targets.shape == (spec.size, spec.length)
        assert (batch.tokens.dtype, batch.targets.dtype) == (np.int32, bool)
        assert batch.lengths.dtype == np.int32
        assert batch.rows == spec.rows
        for slot, row in enumerate(spec.rows):
            n = rows[row].num_tokens
            assert batch.lengths[slot] == n
            np.testing.assert_array_equal(batch.tokens[slot, :n], rows[row].tokens)
            np.testing.assert_array_equal(batch.targets[slot, :n], rows[row].targets)
            assert not batch.tokens[slot, n:].any()
            assert not batch.targets[slot, n:].any()
            seen.append(row)
        for slot in range(len(spec.rows), spec.size):
            assert batch.lengths[slot] == 0
            assert not batch.tokens[slot].any()
            assert not batch.targets[slot].any()
    assert sorted(seen) == list(range(5))


@pytest.mark.parametrize("position", [0, 2])
def test_filler_fills_the_last_batch(position):
    rows = [tokenized(7, seed) for seed in range(5)]
    specs = batch_by_length([7] * 5, batch_tokens=64)
    batch = make_batch(specs[position], rows)
    assert batch.lengths.tolist() == ([7, 7] if position == 0 else [7, 0])
