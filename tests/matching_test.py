"""Units and pairs of two groups: against brute force and closed forms."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.length import side
from gradjax.report.matching import Rows, match, nearest_pairs, units_of

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


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_pairs_are_those_of_going_through_all_distances(dimensions, monkeypatch):
    monkeypatch.setattr("gradjax.report.matching._GRID", 1e-9)
    rng = np.random.default_rng(dimensions)
    high, low = rng.uniform(0, 2, (101, dimensions)), rng.uniform(0.5, 2.5, (127, dimensions))
    apart = np.linalg.norm(high[:, None] - low, axis=2)
    expected = []
    while apart.min() <= 1:
        pair = np.unravel_index(apart.argmin(), apart.shape)
        expected.append(tuple(map(int, pair)))
        apart[pair[0]] = apart[:, pair[1]] = np.inf
    assert [*map(tuple, nearest_pairs(high, low).tolist())] == expected


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
        np.array([7, 2, 7, 3], np.uint64),
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
    np.testing.assert_array_equal(
        units.means(rows.target[:, None].astype(float), ~known)[:, 0], [7, np.nan]
    )


def test_logarithms_are_of_target_tokens_of_prompt_tokens_and_of_what_is_added():
    rows = side(np.array([3, 5]), np.array([0, 9]))
    logs = np.array([[np.log(3), 0], [np.log(5), np.log(10)]])
    np.testing.assert_allclose(rows.logs, logs, rtol=1e-15)
    also = np.array([[0.3], [0.7]])
    more = dataclasses.replace(rows, also=also)
    np.testing.assert_allclose(more.logs, np.hstack([logs, also]), rtol=1e-15)


def test_repeats_and_rows_of_both_sides_are_counted():
    lengths = np.full(5, 7)
    texts = np.array([[1, 1, 1, 2, 3], [3, 2, 2, 4, 5]], np.uint64)
    matched = match(*(Rows(lengths, lengths, text + 10, text) for text in texts))
    assert matched.duplicates == 2 + 1
    assert matched.shared == 2
    assert matched.paired == 2
    assert len(matched.pairs) == 3
    assert matched.share == 1


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


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(("kind", "caliper"), [("target", 0.25), ("prompt", 1)])
def test_calipers_are_in_unbiased_standard_deviations(kind, caliper, inside):
    """Four rows are alike; the shortest and the longest of either side differ by a factor."""
    factor = {"target": (1.41, 1.5), "prompt": (4.5, 5.5)}[kind][0 if inside else 1]
    logs = np.log([[1e3, *[1e4] * 4, 1e5 * factor], [1e3 * factor, *[1e4] * 4, 1e5]])
    distance = np.log(factor) / np.sqrt(np.var(logs, axis=1, ddof=1).mean()) / caliper
    assert (0.92 < distance < 0.97) if inside else (1.03 < distance < 1.15)
    tokens = {"target": np.full((2, 6), 9), "prompt": np.full((2, 6), 9)}
    tokens[kind] = np.rint(np.exp(logs)).astype(int)
    matched = match(*(side(tokens["target"][n], tokens["prompt"][n], n * 10**6) for n in (0, 1)))
    assert len(matched.pairs) == (6 if inside else 4)


@pytest.mark.parametrize("shift", [0.1, 0.5, 1.0])
def test_the_most_pairs_of_one_prompt_that_are_alike_on_average_are_kept(shift):
    """By going through all numbers of pairs, on targets alone."""
    rng = np.random.default_rng(0)
    logs = 5 + 0.7 * rng.standard_normal((2, 101)) + 0.7 * np.array([[shift], [0]])
    target = np.exp(logs).astype(int) + 1
    matched = match(*(side(target[n], np.full(101, 9), n * 10**6, np.arange(101)) for n in (0, 1)))
    logs = np.log(target)
    apart = sorted(logs[0] - logs[1], key=abs)
    most = 0.2 * np.sqrt(np.var(logs, axis=1, ddof=1).mean())
    expected = max(n for n in range(1, 102) if abs(np.mean(apart[:n])) <= most)
    assert len(matched.pairs) == expected
    kept = np.abs(logs[0][matched.pairs[:, 0]] - logs[1][matched.pairs[:, 1]])
    np.testing.assert_allclose(np.sort(kept), np.abs(apart[:expected]), rtol=1e-12)


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
        assert np.all(np.abs(difference.mean(axis=0)) <= 0.2 * spread + 1e-9)
        if clusters is None:
            distance = np.linalg.norm(difference / spread / (0.25, 1), axis=1)
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
