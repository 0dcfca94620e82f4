"""Units and pairs of two groups: against brute force and closed forms."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.length import side
from gradjax.report.matching import BALANCE, CALIPERS, Rows, match, nearest_pairs, units_of

points = st.lists(st.tuples(st.floats(-2, 2), st.floats(-2, 2)), min_size=1, max_size=31)


@given(points, points)
def test_nearest_pairs_are_one_to_one_and_none_is_left(high, low):
    high, low = np.array(high), np.array(low)
    pairs = nearest_pairs(high, low)
    assert len(set(pairs[:, 0])) == len(set(pairs[:, 1])) == len(pairs)
    grid = 0.03  # how far a place of the grid is from a point
    assert np.all(np.linalg.norm(high[pairs[:, 0]] - low[pairs[:, 1]], axis=1) < 1 + grid)
    left = np.delete(high, pairs[:, 0], axis=0), np.delete(low, pairs[:, 1], axis=0)
    apart = np.linalg.norm(left[0][:, None] - left[1], axis=2)
    assert not len(left[0]) or not len(left[1]) or apart.min() > 1 - grid


def test_the_closest_pair_is_taken_first():
    high, low = np.array([[0.0], [0.5]]), np.array([[0.6], [-0.7]])
    assert {*map(tuple, nearest_pairs(high, low))} == {(1, 0), (0, 1)}


@pytest.mark.parametrize("many", [1, 997])
def test_points_at_one_place_are_all_used(many):
    high, low = np.zeros((many, 2)), np.full((2 * many, 2), 0.3)
    assert len(nearest_pairs(high, low)) == many


def test_more_neighbours_are_asked_for_where_the_first_are_taken(monkeypatch):
    monkeypatch.setattr("gradjax.report.matching._NEAREST", 2)
    monkeypatch.setattr("gradjax.report.matching._CANDIDATES", 1)
    high = np.linspace(0, 0.02, 101)[:, None] + np.array([[0.0, 0.0]])
    low = np.column_stack([np.linspace(0.1, 0.9, 101), np.zeros(101)])
    assert len(nearest_pairs(high, low)) == 101


def test_repeats_count_once_and_rows_of_a_prompt_together():
    rows = Rows(
        np.array([3, 5, 3, 7]),
        np.array([2, 2, 2, 9]),
        np.array([8, 8, 8, 4], np.uint64),
        np.array([1, 2, 1, 3], np.uint64),
    )
    units = units_of(rows)
    assert units.rows.tolist() == [0, 1, 3]
    assert units.clusters.tolist() == [4, 8]
    means = units.means(rows.target[:, None].astype(float))
    assert means[:, 0].tolist() == [7, 4]
    known = np.array([True, True, True, False])
    np.testing.assert_array_equal(
        units.means(rows.target[:, None].astype(float), known)[:, 0], [np.nan, 4]
    )


def test_prompts_of_both_sides_are_paired_with_themselves_in_any_order():
    rng = np.random.default_rng(0)
    target, prompt = rng.integers(20, 200, (2, 101)), rng.integers(5, 90, 101)
    order = rng.permutation(101)
    high = side(target[0], prompt)
    low = side(target[1], prompt[order], 10**6, clusters=order)
    matched = match(high, low)
    assert matched.paired == len(matched.pairs) > 90
    units = matched.units
    assert np.array_equal(
        units[0].clusters[matched.pairs[:, 0]], units[1].clusters[matched.pairs[:, 1]]
    )
    assert matched.duplicates == matched.shared == 0


def test_a_prompt_of_both_sides_has_no_other_partner():
    """Or pairs would not be independent of each other."""
    rng = np.random.default_rng(0)
    target = np.array([rng.integers(900, 1000, 60), rng.integers(20, 30, 60)])
    target[:, 50:] = 100
    clusters = [np.arange(60), np.arange(60) + np.repeat([0, 1000], [50, 10])]
    matched = match(*(side(target[n], np.full(60, 9), n * 10**6, clusters[n]) for n in range(2)))
    assert matched.paired == 0
    assert set(matched.pairs[:, 0]) == set(range(50, 60))


@pytest.mark.parametrize("apart", [0.0, 0.5, 1.5])
def test_pairs_are_alike_on_average_and_as_many_as_can_be(apart):
    rng = np.random.default_rng(0)
    target = np.exp(5 + 0.7 * rng.standard_normal((2, 300)) + [[0.7 * apart], [0]]).astype(int)
    prompt = np.exp(4 + 0.5 * rng.standard_normal((2, 300)) + [[0.5 * apart], [0]]).astype(int)
    for clusters in (None, np.arange(300)):
        matched = match(*(side(target[n], prompt[n], n * 10**6, clusters) for n in range(2)))
        logs = [matched.units[n].means(matched.rows[n].logs) for n in range(2)]
        spread = np.sqrt((logs[0].var(axis=0, ddof=1) + logs[1].var(axis=0, ddof=1)) / 2)
        difference = logs[0][matched.pairs[:, 0]] - logs[1][matched.pairs[:, 1]]
        assert np.all(np.abs(difference.mean(axis=0)) <= BALANCE * spread + 1e-9)
        if clusters is None:
            distance = np.linalg.norm(difference / spread / CALIPERS, axis=1)
            assert distance.max() < 1.05
        assert len(matched.pairs) > {0.0: 230, 0.5: 150, 1.5: 20}[apart]


def test_groups_without_common_lengths_have_no_pairs():
    high, low = (side(np.arange(n, n + 200), np.full(200, 9), n * 10**6) for n in (500, 5))
    assert len(match(high, low).pairs) == 0


@pytest.mark.parametrize("length", [31, 32, 997])
def test_prompts_of_many_rows_of_one_length_are_paired(length):
    """Means of equal logarithms differ in the last bit."""
    sides = [
        side(
            np.full(77, length), np.full(77, 3 * length), n * 10**6, n * 10**6 + np.arange(77) // s
        )
        for n, s in enumerate((3, 7))
    ]
    assert len(match(*sides).pairs) == 11


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_few_rows_are_no_fault(rows):
    for high, low in itertools.product(range(1, rows + 1), repeat=2):
        matched = match(*(side(np.full(n, 7), np.full(n, 3), 10 * n) for n in (high, low)))
        assert len(matched.pairs) == min(high, low)
        assert matched.share == 1
