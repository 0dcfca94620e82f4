"""The verdict on simulated groups whose truth is known, and the matching that it rests on."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import gmean

from benchmarks.length import (
    AUROCS,
    DATA_SETS,
    NOISES,
    RELATIONS,
    ROWS,
    draw_lengths,
    share_of_yes,
)
from gradjax.report.length import CALIPER, FEWEST_PAIRS, Lengths, match, matched_effect


@pytest.mark.parametrize(("auroc", "noise"), list(itertools.product(AUROCS, NOISES)))
@pytest.mark.parametrize("relation", RELATIONS)
def test_length_alone_is_seldom_taken_for_more(auroc, noise, relation):
    assert share_of_yes(auroc, noise, relation, effect=0) <= 0.05


@pytest.mark.parametrize(("auroc", "noise"), list(itertools.product(AUROCS[:2], NOISES)))
@pytest.mark.parametrize("relation", RELATIONS)
def test_an_effect_beyond_length_is_found(auroc, noise, relation):
    assert share_of_yes(auroc, noise, relation, effect=0.5) >= 0.8


def test_groups_without_common_lengths_are_undecided():
    high, low = (
        Lengths(np.arange(500, 700), np.full(200, 9)),
        Lengths(np.arange(5, 205), np.full(200, 9)),
    )
    pairs = match(high, low)
    assert len(pairs) == 0
    values = np.log(high.target), np.log(low.target)
    assert matched_effect(*values, high.logs, low.logs, pairs) is None


@given(
    st.lists(st.integers(1, 90), min_size=2, max_size=23),
    st.lists(st.integers(1, 90), min_size=2, max_size=19),
)
def test_pairs_are_one_to_one_within_the_caliper_and_none_is_left(high, low):
    sides = [Lengths(np.array(side), np.zeros(len(side), int)) for side in (high, low)]
    logs = [np.log(np.array(side)) for side in (high, low)]
    caliper = CALIPER * np.sqrt((logs[0].var(ddof=1) + logs[1].var(ddof=1)) / 2)
    pairs = match(*sides)
    assert len(set(pairs[:, 0])) == len(set(pairs[:, 1])) == len(pairs)
    for i, j in pairs:
        assert abs(logs[0][i] - logs[1][j]) <= caliper + 1e-12
    left = [np.delete(log, pairs[:, side]) for side, log in enumerate(logs)]
    if len(left[0]) and len(left[1]):
        assert np.abs(left[0][:, None] - left[1]).min() > caliper - 1e-12


def test_equally_long_rows_are_paired_by_their_prompts():
    high, low = (
        Lengths(np.array([50, 50, 90]), np.array([10, 70, 30])),
        Lengths(np.array([50, 90, 50]), np.array([69, 31, 11])),
    )
    assert {tuple(pair) for pair in match(high, low)} == {(0, 2), (1, 0), (2, 1)}


def test_a_known_effect_is_recovered_whatever_length_and_prompt_do():
    rng = np.random.default_rng(0)
    high, low = draw_lengths(rng, 0.75)

    def values(side: Lengths) -> np.ndarray:
        target, prompt = side.logs.T
        return np.exp(target**3 / 50 - target + 0.7 * prompt)

    pairs = match(high, low)
    found = matched_effect(1.25 * values(high), values(low), high.logs, low.logs, pairs)
    assert found is not None
    typical = gmean(values(low)[pairs[:, 1]])
    assert found.gap == pytest.approx(0.25 * typical, rel=1e-9)
    assert found.error == pytest.approx(0, abs=1e-9)
    assert found.verdict == "yes"


@pytest.mark.parametrize("on", ["target", "prompt"])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 1, 1.3])
def test_intervals_cover_the_truth(ratio, on):
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(DATA_SETS):
        sides = [Lengths(np.full(ROWS, 31), rng.integers(5, 150, ROWS)) for _ in range(2)]
        high, low = np.exp(0.6 * rng.standard_normal((2, ROWS)))  # of geometric mean 1
        logs = [side.logs for side in sides]
        found = matched_effect(ratio * high, low, *logs, match(*sides, on=on))
        assert found is not None
        ends = found.interval(0.05)
        inside += ends[0] < ratio - 1 < ends[1]
    assert 0.91 < inside / DATA_SETS < 0.98


@pytest.mark.parametrize("lengths", [(7,), (7, 11), (7, 11, 13), (7, 11, 13, 17)])
def test_few_distinct_lengths_are_enough(lengths):
    rng = np.random.default_rng(len(lengths))
    sides = [Lengths(rng.choice(lengths, 60), rng.choice([5, 9], 60)) for _ in range(2)]
    high, low = (np.exp(0.1 * rng.standard_normal(60)) * side.target for side in sides)
    found = matched_effect(2 * high, low, *(side.logs for side in sides), match(*sides))
    assert found is not None
    assert found.verdict == "yes"
    assert found.log_ratio == pytest.approx(np.log(2), abs=0.1)


def test_a_few_pairs_of_other_lengths_do_not_hide_an_effect():
    rng = np.random.default_rng(0)
    target = np.full((2, 60), 40)
    target[0, :3] = 41, 42, 43
    sides = [Lengths(side, rng.integers(5, 9, 60)) for side in target]
    high, low = np.exp(0.1 * rng.standard_normal((2, 60)))
    found = matched_effect(3 * high, low, *(side.logs for side in sides), match(*sides))
    assert found is not None
    assert found.verdict == "yes"


@pytest.mark.parametrize("on", ["target", "prompt"])
@pytest.mark.parametrize("apart", [0.2, 1.0])
def test_prompt_length_alone_is_seldom_taken_for_more(apart, on):
    rng = np.random.default_rng(0)
    yes = 0
    for _ in range(DATA_SETS):
        logs = 4 + 0.5 * rng.standard_normal((2, ROWS)) + np.array([[0.5 * apart], [0]])
        prompt = np.exp(logs).astype(int)
        target = rng.integers(10, 60, (2, ROWS)) if on == "target" else np.full((2, ROWS), 31)
        sides = [Lengths(*side) for side in zip(target, prompt, strict=True)]
        noise = np.exp(0.05 * rng.standard_normal((2, ROWS)))
        high, low = np.minimum(target + prompt, 64) ** 0.9 * noise
        logs = [side.logs for side in sides]
        found = matched_effect(high, low, *logs, match(*sides, on=on))
        yes += found is not None and found.verdict == "yes"
    assert yes <= 0.05 * DATA_SETS


def test_prompts_far_apart_leave_it_undecided():
    rng = np.random.default_rng(0)
    sides = [Lengths(np.full(ROWS, 31), rng.integers(20, 40, ROWS) + more) for more in (0, 20)]
    values = np.exp(0.1 * rng.standard_normal((2, ROWS))) * [[3], [1]]
    logs = [side.logs for side in sides]
    found = matched_effect(*values, *logs, match(*sides))
    assert found is not None
    assert found.prompts_apart < -1
    assert found.verdict == "undecided"
    assert matched_effect(*values, *logs, match(*sides, on="prompt")) is None  # too few


def test_an_effect_is_found_among_prompts_of_like_length():
    rng = np.random.default_rng(0)
    sides = [Lengths(np.full(ROWS, 31), rng.integers(20, 60, ROWS) + more) for more in (0, 20)]
    pairs = match(*sides, on="prompt")
    assert FEWEST_PAIRS < len(pairs) < 0.8 * ROWS
    values = np.exp(0.1 * rng.standard_normal((2, ROWS))) * [[1.1], [1]]
    found = matched_effect(*values, *(side.logs for side in sides), pairs)
    assert found is not None
    assert abs(found.prompts_apart) < 0.2
    assert found.verdict == "yes"


def test_prompts_that_tell_the_groups_apart_leave_it_undecided():
    sides = [Lengths(np.full(30, 7), np.full(30, prompt)) for prompt in (5, 9)]
    values = np.exp(np.random.default_rng(0).standard_normal((2, 30)))
    logs = [side.logs for side in sides]
    for on in ("target", "prompt"):
        assert matched_effect(*values, *logs, match(*sides, on=on)) is None


def test_a_statistic_that_never_varies_is_no_effect():
    rng = np.random.default_rng(0)
    high, low = draw_lengths(rng, 0.6)
    flat = np.ones(ROWS)
    found = matched_effect(flat, flat, high.logs, low.logs, match(high, low))
    assert found is not None
    assert found.gap == pytest.approx(0, abs=1e-9)
    assert found.verdict != "yes"
