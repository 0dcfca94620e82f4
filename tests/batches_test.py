"""Batches: every row once, few shapes, and the least padding that those allow."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradjax.data.batches import BatchSpec, batch_by_length, make_batch
from gradjax.data.examples import to_example
from gradjax.runs.layout import unfinished
from gradjax.structs import TokenizedExample

pytestmark = pytest.mark.smoke

row_lengths = st.lists(st.integers(1, 700), min_size=1, max_size=80)


def rows_of(specs):
    return sorted(itertools.chain.from_iterable(spec.rows for spec in specs))


def padded_tokens(specs):
    return sum(spec.size * spec.length for spec in specs)


def shapes_of(specs):
    return {(spec.size, spec.length) for spec in specs}


@given(
    lengths=row_lengths,
    batch_tokens=st.integers(1, 3000),
    max_rows=st.none() | st.integers(1, 9),
    devices=st.sampled_from([1, 4]),
    max_shapes=st.integers(1, 9),
    shape_tokens=st.sampled_from([0, 500]),
)
@settings(deadline=None)
def test_plans_hold_every_row_once_in_few_shapes(
    lengths, batch_tokens, max_rows, devices, max_shapes, shape_tokens
):
    def plan():
        return batch_by_length(
            lengths,
            batch_tokens,
            max_rows,
            devices,
            max_shapes=max_shapes,
            shape_tokens=shape_tokens,
        )

    specs = plan()
    assert rows_of(specs) == list(range(len(lengths)))
    for spec in specs:
        assert spec.rows
        assert len(spec.rows) <= spec.size
        assert spec.size % devices == 0
        each = spec.size // devices
        assert each <= (max_rows or math.inf)
        assert spec.length % 8 == 0
        assert spec.length >= max(lengths[row] for row in spec.rows)
        assert each == 1 or each * spec.length <= batch_tokens
    assert len({spec.length for spec in specs}) == len(shapes_of(specs)) <= max_shapes
    assert [spec.length for spec in specs] == sorted((p.length for p in specs), reverse=True)
    # Sorted by padded length, and filler in the last batch of the shortest rows alone.
    ordered = [-(-lengths[row] // 8) for spec in specs for row in spec.rows]
    assert ordered == sorted(ordered, reverse=True)
    assert all(len(spec.rows) == spec.size for spec in specs if spec.length > specs[-1].length)
    assert specs == plan()


@given(
    lengths=st.lists(st.integers(1, 8 * 9), min_size=1, max_size=30),
    batch_tokens=st.sampled_from([1, 75, 250]),
    max_shapes=st.integers(1, 4),
    shape_tokens=st.sampled_from([0, 40, 300]),
)
@settings(deadline=None, max_examples=50)
def test_padded_lengths_are_the_best_choice(lengths, batch_tokens, max_shapes, shape_tokens):
    def tokens_needed(edges):
        total = 0
        for shorter, edge in itertools.pairwise((0, *edges)):
            count = sum(shorter < length <= edge for length in lengths)
            batches = math.ceil(count / max(batch_tokens // edge, 1))
            total += batches * math.ceil(count / batches) * edge + shape_tokens
        return total

    steps = sorted({math.ceil(length / 8) * 8 for length in lengths})
    best = min(
        tokens_needed((*edges, steps[-1]))
        for k in range(min(max_shapes, len(steps)))
        for edges in itertools.combinations(steps[:-1], k)
    )
    specs = batch_by_length(lengths, batch_tokens, max_shapes=max_shapes, shape_tokens=shape_tokens)
    found = padded_tokens(specs) + shape_tokens * len(shapes_of(specs))
    if batch_tokens == 1:
        assert found == best
    else:
        assert found <= best  # shorter rows take the place of filler


def test_filler_takes_shorter_rows():
    # Eight devices, nine long rows: seven of the second batch's slots would be filler.
    specs = batch_by_length([80] * 9 + [48] * 20, 80, devices=8, max_shapes=2)
    assert [(len(spec.rows), spec.size, spec.length) for spec in specs] == [
        (8, 8, 80),
        (8, 8, 80),
        (8, 8, 48),
        (5, 8, 48),
    ]
    assert rows_of(specs) == list(range(29))


def test_more_shapes_where_more_rows_pay_for_them():
    lengths = np.random.default_rng(0).integers(1, 2000, 300).tolist()
    numbers = [
        len(shapes_of(batch_by_length(lengths * times, 2048, shape_tokens=10_000)))
        for times in (1, 4, 16)
    ]
    assert numbers == sorted(set(numbers))
    assert batch_by_length(lengths, 2048, max_shapes=1)[0].length == 2000
    few, many = (
        padded_tokens(batch_by_length(lengths, 2048, max_shapes=shapes)) for shapes in (6, 12)
    )
    assert sum(lengths) < many < few


@given(
    lengths=row_lengths,
    planned_with=st.sampled_from([1, 3, 6]),
    done=st.sets(st.integers(0, 79)),
)
@settings(deadline=None, max_examples=50)
def test_rows_that_are_left_are_batched_whatever_batched_the_others(lengths, planned_with, done):
    """A store may hold any of the rows: of a run with other batches, of another version."""

    def batch_among(rows):
        specs = batch_by_length([lengths[row] for row in rows], 900)
        return [
            BatchSpec(tuple(rows[i] for i in spec.rows), spec.length, spec.size) for spec in specs
        ]

    finished = {row for row in done if row < len(lengths)}
    batches = batch_by_length(lengths, 900, max_shapes=planned_with)
    left = unfinished(batches, finished, batch_among)
    assert rows_of(left) == sorted(set(range(len(lengths))) - finished)
    # Whole batches that are finished leave the others as they were.
    assert unfinished(batches, batches[0].rows, batch_among) == batches[1:]


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
    assert batch_by_length([4096, 1], 4096) == [BatchSpec((0,), 4096, 1), BatchSpec((1,), 8, 1)]


def test_many_lengths_are_planned_quickly_enough_to_try():
    lengths = np.random.default_rng(0).integers(1, 32768, 5000).tolist()
    specs = batch_by_length(lengths, 65536)
    assert padded_tokens(specs) < 1.05 * sum(lengths)


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
    specs = batch_by_length([7] * 5, batch_tokens=16)
    batch = make_batch(specs[position], rows)
    assert batch.lengths.tolist() == ([7, 7] if position == 0 else [7, 0])


def test_later_rows_take_shared_shapes_and_new_ones_where_these_pay():
    draw = np.random.default_rng(3)
    first = draw.integers(1000, 4000, 999).tolist()
    specs = batch_by_length(first, 16384, shape_tokens=2e6, shared=())
    shared = {spec.length for spec in specs}
    assert all(spec.size == max(16384 // spec.length, 1) for spec in specs)  # whatever the rows
    more = draw.integers(1000, 3900, 701).tolist()
    alike = batch_by_length(more, 16384, shape_tokens=2e6, shared=shared)
    assert {spec.length for spec in alike} <= shared
    assert rows_of(alike) == list(range(701))
    short = draw.integers(40, 120, 16_001).tolist()
    others = batch_by_length(short, 16384, shape_tokens=2e5, shared=shared)
    assert rows_of(others) == list(range(16_001))
    assert padded_tokens(others) < 2 * sum(short)
    # So many shapes and no more, as long as rows fit them.
    full = {8 * n for n in range(2, 50, 2)}
    assert len(full) == 24
    specs = batch_by_length(short, 16384, shape_tokens=0, shared=full)
    assert {spec.length for spec in specs} <= full
