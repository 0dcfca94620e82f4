"""Batches: every row once, few shapes, and the least padding that those allow."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradjax.data.batches import MAX_RUNGS, BatchPlan, make_batch, plan_batches
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
    plans = plan_batches(lengths, batch_tokens, max_rows)
    assert sorted(itertools.chain.from_iterable(plan.rows for plan in plans)) == list(
        range(len(lengths))
    )
    for plan in plans:
        assert plan.rows
        assert len(plan.rows) <= plan.size <= (max_rows or math.inf)
        assert plan.length % 32 == 0
        assert plan.length >= max(lengths[row] for row in plan.rows)
        assert plan.size == 1 or plan.size * plan.length <= batch_tokens
    assert len({plan.length for plan in plans}) <= MAX_RUNGS
    assert [plan.length for plan in plans] == sorted((p.length for p in plans), reverse=True)
    for _, rung in itertools.groupby(plans, key=lambda plan: plan.length):
        rung = list(rung)
        assert len({plan.size for plan in rung}) == 1
        assert sum(plan.size - len(plan.rows) for plan in rung) <= len(rung) - 1
    assert plans == plan_batches(lengths, batch_tokens, max_rows)


@given(
    lengths=st.lists(st.integers(1, 32 * 9), min_size=1, max_size=30),
    batch_tokens=st.sampled_from([1, 300, 1000]),
)
@settings(deadline=None, max_examples=50)
def test_padded_lengths_are_the_best_choice(lengths, batch_tokens):
    def tokens_needed(rungs):
        total = 0
        for shorter, rung in itertools.pairwise((0, *rungs)):
            count = sum(shorter < length <= rung for length in lengths)
            if count:
                batches = math.ceil(count / max(batch_tokens // rung, 1))
                total += batches * math.ceil(count / batches) * rung
        return total

    steps = sorted({math.ceil(length / 32) * 32 for length in lengths})
    best = min(
        tokens_needed((*rungs, steps[-1]))
        for k in range(min(MAX_RUNGS, len(steps)))
        for rungs in itertools.combinations(steps[:-1], k)
    )
    plans = plan_batches(lengths, batch_tokens)
    assert sum(plan.size * plan.length for plan in plans) == best


def test_batches_are_as_full_as_the_budget_allows():
    plans = plan_batches([60] * 10, batch_tokens=4 * 64)
    assert [(len(plan.rows), plan.size, plan.length) for plan in plans] == [
        (4, 4, 64),
        (4, 4, 64),
        (2, 4, 64),
    ]
    # Three batches are needed either way: 3 + 3 + 3 rather than 4 + 4 + 1.
    assert [len(plan.rows) for plan in plan_batches([60] * 9, 4 * 64)] == [3, 3, 3]


def test_edges():
    assert plan_batches([], 100) == []
    assert plan_batches([5000], 100) == [BatchPlan((0,), 5024, 1)]
    assert plan_batches([4096, 1], 4096) == [BatchPlan((0,), 4096, 1), BatchPlan((1,), 32, 1)]


def test_many_lengths_are_planned_quickly_enough_to_try():
    lengths = np.random.default_rng(0).integers(1, 32768, 5000).tolist()
    plans = plan_batches(lengths, 65536)
    padded = sum(plan.length * plan.size for plan in plans)
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
    plans = plan_batches([row.num_tokens for row in rows], batch_tokens=100, max_rows=3)
    seen = []
    for plan in plans:
        batch = make_batch(plan, rows)
        assert batch.tokens.shape == batch.targets.shape == (plan.size, plan.length)
        assert (batch.tokens.dtype, batch.targets.dtype) == (np.int32, bool)
        assert batch.lengths.dtype == np.int32
        assert batch.rows == plan.rows
        for slot, row in enumerate(plan.rows):
            n = rows[row].num_tokens
            assert batch.lengths[slot] == n
            np.testing.assert_array_equal(batch.tokens[slot, :n], rows[row].tokens)
            np.testing.assert_array_equal(batch.targets[slot, :n], rows[row].targets)
            assert not batch.tokens[slot, n:].any()
            assert not batch.targets[slot, n:].any()
            seen.append(row)
        for slot in range(len(plan.rows), plan.size):
            assert batch.lengths[slot] == 0
            assert not batch.tokens[slot].any()
            assert not batch.targets[slot].any()
    assert sorted(seen) == list(range(5))


@pytest.mark.parametrize("position", [0, 2])
def test_filler_fills_the_last_batch(position):
    rows = [tokenized(7, seed) for seed in range(5)]
    plans = plan_batches([7] * 5, batch_tokens=64)
    batch = make_batch(plans[position], rows)
    assert batch.lengths.tolist() == ([7, 7] if position == 0 else [7, 0])
