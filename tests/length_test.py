"""The verdict on simulated groups whose truth is known, and the matching that it rests on."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import gmean, norm

from gradjax.report.length import CALIPER, Lengths, match, matched_effect, unmatched_effect

DATA_SETS, ROWS = 300, 200
AUROCS = (0.6, 0.75, 0.9, 0.95)
NOISES = (0.6, 0.2, 0.05)
RELATIONS = {"power law": lambda t: t**0.7, "saturating": lambda t: t / (t + 150)}


def draw_lengths(rng, auroc: float) -> Lengths:
    """Lognormal lengths of high and of low, whose AUROC is the one given."""
    shift = np.sqrt(2) * norm.ppf(auroc) / 2
    logs = 5 + 0.7 * rng.standard_normal((2, ROWS)) + 0.7 * np.array([[shift], [-shift]])
    target = np.maximum(np.exp(logs), 1).astype(int)
    prompt = rng.integers(5, 150, (2, ROWS))
    return Lengths(target[0], prompt[0]), Lengths(target[1], prompt[1])


def verdicts(auroc: float, noise: float, relation: str, effect: float) -> list[str]:
    """Of many data sets: `effect` is in standard deviations of the noise."""
    rng = np.random.default_rng(int(1000 * auroc + 100 * noise))
    found = []
    for _ in range(DATA_SETS):
        lengths = draw_lengths(rng, auroc)
        high, low = (
            RELATIONS[relation](side.target) * np.exp(noise * rng.standard_normal(ROWS))
            for side in lengths
        )
        high = high * np.exp(effect * noise)
        logs = lengths[0].logs, lengths[1].logs
        made = matched_effect(high, low, *logs, match(*lengths))
        found.append(made.verdict if made else "undecided")
    return found


@pytest.mark.parametrize(("auroc", "noise"), list(itertools.product(AUROCS, NOISES)))
@pytest.mark.parametrize("relation", RELATIONS)
def test_length_alone_is_seldom_taken_for_more(auroc, noise, relation):
    found = verdicts(auroc, noise, relation, effect=0)
    assert found.count("yes") <= 0.05 * DATA_SETS


@pytest.mark.parametrize(("auroc", "noise"), list(itertools.product(AUROCS[:2], NOISES)))
@pytest.mark.parametrize("relation", RELATIONS)
def test_an_effect_beyond_length_is_found(auroc, noise, relation):
    found = verdicts(auroc, noise, relation, effect=0.5)
    assert found.count("yes") >= 0.8 * DATA_SETS


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


@pytest.mark.parametrize("matched", [True, False])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 1, 1.3])
def test_intervals_cover_the_truth(ratio, matched):
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(DATA_SETS):
        sides = [Lengths(np.full(ROWS, 31), rng.integers(5, 150, ROWS)) for _ in range(2)]
        high, low = np.exp(0.6 * rng.standard_normal((2, ROWS)))  # of geometric mean 1
        logs = [side.logs for side in sides]
        if matched:
            found = matched_effect(ratio * high, low, *logs, match(*sides))
        else:
            found = unmatched_effect(ratio * high, low, *logs)
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


@pytest.mark.parametrize("matched", [True, False])
def test_prompt_length_alone_is_seldom_taken_for_more(matched):
    rng = np.random.default_rng(0)
    yes = 0
    for _ in range(DATA_SETS):
        prompt = np.exp(4 + np.array([[0.2], [0]]) + 0.5 * rng.standard_normal((2, ROWS))).astype(
            int
        )
        target = rng.integers(10, 60, (2, ROWS)) if matched else np.full((2, ROWS), 31)
        sides = [Lengths(*side) for side in zip(target, prompt, strict=True)]
        noise = np.exp(0.05 * rng.standard_normal((2, ROWS)))
        high, low = np.minimum(target + prompt, 64) ** 0.9 * noise
        logs = [side.logs for side in sides]
        if matched:
            found = matched_effect(high, low, *logs, match(*sides))
        else:
            found = unmatched_effect(high, low, *logs)
        yes += found is not None and found.verdict == "yes"
    assert yes <= 0.05 * DATA_SETS


def test_prompts_far_apart_leave_it_undecided():
    rng = np.random.default_rng(0)
    sides = [Lengths(np.full(ROWS, 31), rng.integers(20, 40, ROWS) + more) for more in (0, 20)]
    values = np.exp(0.1 * rng.standard_normal((2, ROWS))) * [[3], [1]]
    for found in (
        matched_effect(*values, *(side.logs for side in sides), match(*sides)),
        unmatched_effect(*values, *(side.logs for side in sides)),
    ):
        assert found is not None
        assert found.prompts_apart < -1
        assert found.verdict == "undecided"


def test_prompts_that_tell_the_groups_apart_leave_it_undecided():
    sides = [Lengths(np.full(30, 7), np.full(30, prompt)) for prompt in (5, 9)]
    values = np.exp(np.random.default_rng(0).standard_normal((2, 30)))
    logs = [side.logs for side in sides]
    assert matched_effect(*values, *logs, match(*sides)) is None
    assert unmatched_effect(*values, *logs) is None


def test_a_statistic_that_never_varies_is_no_effect():
    rng = np.random.default_rng(0)
    high, low = draw_lengths(rng, 0.6)
    flat = np.ones(ROWS)
    found = matched_effect(flat, flat, high.logs, low.logs, match(high, low))
    assert found is not None
    assert found.gap == pytest.approx(0, abs=1e-9)
    assert found.verdict != "yes"
