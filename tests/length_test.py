"""The verdict on simulated groups whose truth is known."""

import itertools

import numpy as np
import pytest
import statsmodels.api as sm
from scipy.stats import gmean, t

from benchmarks.length import (
    AUROCS,
    CASES,
    NOISES,
    RELATIONS,
    ROWS,
    Drawn,
    draw_lengths,
    independent,
    paired,
    share_of_wrong_reports,
    share_of_yes,
    side,
)
from gradjax.config import NEGLIGIBLE
from gradjax.report.length import (
    LEVEL,
    Effect,
    matched_effect,
    rule,
    standard_difference,
)
from gradjax.report.matching import ROUNDING, Matched, Rows, match, units_of

FAST = ("every row 5 times", "5 of a prompt, 0.9", "prompts 0.8 apart, effect 0.6", "equal")


def slow_unless(fast: bool, *values):
    return pytest.param(*values, marks=() if fast else pytest.mark.slow)


@pytest.mark.parametrize(
    ("auroc", "noise", "relation"),
    [
        slow_unless(noise == 0.2 and relation == "saturating", auroc, noise, relation)
        for auroc, noise, relation in itertools.product(AUROCS, NOISES, RELATIONS)
    ],
)
def test_length_alone_is_seldom_taken_for_more(auroc, noise, relation):
    assert share_of_yes(auroc, noise, relation, effect=0) <= 0.02


@pytest.mark.parametrize(
    ("auroc", "noise", "relation"),
    [
        slow_unless(noise == 0.2 and relation == "saturating", auroc, noise, relation)
        for auroc, noise, relation in itertools.product(AUROCS[:2], NOISES, RELATIONS)
    ],
)
def test_an_effect_beyond_length_is_found(auroc, noise, relation):
    assert share_of_yes(auroc, noise, relation, effect=0.5) >= 0.8


@pytest.mark.parametrize("name", [slow_unless(name in FAST, name) for name in CASES])
def test_the_verdict_is_right_on_rows_like_real_ones(name):
    case = CASES[name]
    share = case.answers().get(case.answer, 0.0)
    if case.at_most is not None:
        assert share <= case.at_most
    if case.at_least is not None:
        assert share >= case.at_least


@pytest.mark.slow
def test_a_report_of_many_comparisons_seldom_has_a_wrong_yes():
    assert share_of_wrong_reports() <= 0.05


def identity(high: Rows, low: Rows) -> Matched:
    """Row i of either side as pair i."""
    pairs = np.column_stack([np.arange(len(high.target))] * 2)
    return Matched((high, low), (units_of(high), units_of(low)), pairs, 0)


def test_the_effect_is_that_of_a_regression_with_hc3_errors():
    """Against statsmodels' own covariance, on columns written out here."""
    rng = np.random.default_rng(0)
    target, prompt = draw_lengths(rng, 0.6, 127)
    target[1] = target[0] + rng.integers(-9, 9, 127).clip(1 - target[0])
    sides = side(target[0], prompt[0]), side(target[1], prompt[1], 10**6)
    values = np.exp(0.3 * rng.standard_t(3, (2, 127))) * target**0.7
    found = matched_effect(identity(*sides), *values)
    assert found is not None
    logs = np.log([target, prompt + 1, target + prompt])  # [columns, sides, rows]
    logs -= logs.mean(axis=(1, 2), keepdims=True)
    powers = np.concatenate([logs**power for power in (1, 2, 3)])
    inputs = sm.add_constant((powers[:, 0] - powers[:, 1]).T)
    fit = sm.OLS(np.log(values[0] / values[1]), inputs).fit(cov_type="HC3", use_t=True)
    assert found.log_ratio == pytest.approx(fit.params[0], rel=1e-6)
    assert found.error == pytest.approx(fit.bse[0], rel=1e-6)
    assert found.degrees_of_freedom == 127 - 10
    assert found.p == pytest.approx(fit.pvalues[0], rel=1e-5)
    np.testing.assert_allclose(found.log_interval, fit.conf_int(LEVEL)[0], rtol=1e-5)
    whole = np.concatenate([powers[:, 0].T, powers[:, 1].T])
    group = np.repeat([0, 1], 127)
    columns = np.column_stack([np.ones(254), group, whole])
    rest = sm.OLS(np.log(np.concatenate(values)), columns).fit()
    assert found.spread == pytest.approx(np.sqrt(rest.mse_resid), rel=1e-6)


@pytest.mark.parametrize(
    ("pairs", "degree"),
    [(12, 1), (79, 1), (80, 2), (119, 2), (120, 3), (500, 3)],
)
def test_fewer_pairs_take_a_lower_degree(pairs, degree):
    rng = np.random.default_rng(0)
    target, prompt = draw_lengths(rng, 0.5, pairs)
    sides = [side(target[n], prompt[n], n * 10**6) for n in range(2)]
    found = matched_effect(identity(*sides), *np.exp(rng.standard_normal((2, pairs))))
    assert found is not None
    assert found.degrees_of_freedom == pairs - 1 - 3 * degree
    assert found.pairs == pairs


@pytest.mark.parametrize("n", [1, 2, 11])
def test_fewer_pairs_than_the_fewest_decide_nothing(n):
    sides = [side(np.full(n, 7), np.full(n, 5), first * 10**6) for first in range(2)]
    assert matched_effect(match(*sides), *np.ones((2, n))) is None


def effect(log_ratio: float, error: float, spread: float = 1.0, apart: float = 0.0) -> Effect:
    return Effect(log_ratio, error, 0.0, 0.0, 1e9, 100, spread, (0.0, apart))


HALF = 2.5758293  # the normal distribution's 99.5 % point


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (effect(1.01 * HALF, 1), "yes"),
        (effect(-1.01 * HALF, 1), "yes"),
        (effect(0.99 * HALF, 1), "undecided"),
        (effect(0.01 * HALF, 0.009), "negligible"),
        (effect(-0.01 * HALF, 0.009), "negligible"),
        (effect(NEGLIGIBLE - 0.009 * HALF, 0.0091), "yes"),
        (effect(NEGLIGIBLE - 0.009 * HALF, 0.0089), "negligible"),
        (effect(0.001, 0.99 * (NEGLIGIBLE - 0.001) / HALF), "no"),
        (effect(0.001, 1.01 * (NEGLIGIBLE - 0.001) / HALF), "undecided"),
        (effect(0.001, 0.5 * NEGLIGIBLE / HALF, spread=0.4), "undecided"),
        (effect(5, 1, apart=0.5), "yes"),
        (effect(5, 1, apart=-0.51), "undecided"),
        (effect(0, 0), "no"),
        (effect(1e-12, 0, spread=0), "no"),
        (effect(1e-6, 0), "negligible"),
        (effect(-1e-6, 0), "negligible"),
        # What may be rounding is no effect, however exact.
        (effect(ROUNDING, 0), "no"),
        (effect(-ROUNDING, 0), "no"),
        (effect(ROUNDING, 0, spread=0), "no"),
        (effect(-ROUNDING, 0, spread=0), "no"),
        # The bounds of what is negligible belong to it.
        (effect(NEGLIGIBLE, 0), "negligible"),
        (effect(-NEGLIGIBLE, 0), "negligible"),
        (effect(1.001 * NEGLIGIBLE, 0), "yes"),
    ],
)
def test_the_rule(found, verdict):
    assert found.verdict() == verdict


def test_a_yes_has_to_hold_for_all_verdicts_together():
    found = effect(3, 1)
    assert found.verdict(p_adjusted=0.05) == "yes"
    assert found.verdict(p_adjusted=0.051) == "undecided"
    assert effect(0, 0.001).verdict(p_adjusted=1.0) == "no"


def test_bounds_of_what_is_negligible_can_be_given():
    found = effect(0.2, 0.05)
    assert found.verdict() == "yes"
    assert found.verdict(negligible=0.4) == "negligible"
    assert "±0.4 standard deviations" in " ".join(rule(0.4).split())


@pytest.mark.parametrize(("ratio", "error"), [(0.2, 0.1), (0.04, 0.05), (0.0, 0.07)])
def test_as_many_pairs_as_are_said_would_decide(ratio, error):
    found = effect(ratio, error)
    assert found.verdict() == "undecided"
    needed = found.pairs_to_decide()
    for pairs, decided in ((needed, True), (0.8 * needed, False)):
        more = effect(ratio, error * np.sqrt(found.pairs / pairs))
        assert (more.verdict() != "undecided") == decided


@pytest.mark.parametrize(
    ("ratio", "error", "pairs"),
    [
        (0.2, 0.1, 170),  # 100 · (2.5758 · 0.1 / 0.2)² = 165.9
        (-0.2, 0.1, 170),
        (0.04, 0.05, 470),  # it is nearer to the middle than to the bounds: 0.06 are needed
        (0.0, 0.07, 330),  # 325.1
        (0.0, 0.7, 33_000),  # 32,512
        (0.2, 0.01, 2),  # 1.66
    ],
)
def test_needed_pairs_are_said_in_two_digits(ratio, error, pairs):
    assert effect(ratio, error).pairs_to_decide(0.1) == pairs


def test_standard_differences_in_closed_form():
    high, low = np.array([1.0, 3.0]), np.array([0.0, 4.0, 8.0, 12.0])  # variances 1 and 20
    assert standard_difference(high, low) == pytest.approx(-4 / np.sqrt(10.5))
    assert standard_difference(low, high) == pytest.approx(4 / np.sqrt(10.5))
    flat = np.full(5, 2.0)
    assert standard_difference(flat, flat) == 0
    assert standard_difference(flat, flat + 1e-13) == 0
    assert standard_difference(flat, flat + 1) == -np.inf


@pytest.mark.parametrize("apart", [0.0, 1e-12, 2.0])
def test_p_without_any_error(apart):
    assert effect(apart, 0).p == (0 if apart > 1 else 1)
    assert np.isnan(effect(1, 1, apart=2).p)


def test_a_known_effect_is_recovered_whatever_length_and_prompt_do():
    rng = np.random.default_rng(0)
    target, prompt = draw_lengths(rng, 0.6, 307)  # enough pairs for cubics

    def values(number: int) -> np.ndarray:
        logs = np.log(target[number]), np.log1p(prompt[number])
        whole = np.log(target[number] + prompt[number])
        return np.exp(logs[0] ** 3 / 50 - logs[0] + 0.7 * logs[1] + whole**2 / 9)

    drawn = Drawn(
        side(target[0], prompt[0]),
        side(target[1], prompt[1], 10**6),
        (1.25 * values(0), values(1)),
    )
    found = drawn.effect
    assert found is not None
    typical = gmean(values(1)[drawn.matched.units[1].rows][drawn.matched.pairs[:, 1]])
    assert found.gap == pytest.approx(0.25 * typical, rel=1e-9)
    assert found.error == pytest.approx(0, abs=1e-9)
    assert found.verdict() == "yes"


def test_what_length_does_in_a_narrow_range_is_taken_off_as_well():
    """A range of a thousandth, and a statistic that goes with the cube of the logarithm in it."""
    rng = np.random.default_rng(0)
    target = rng.integers(20_000, 20_021, (2, 150))
    logs = np.log(target)
    high, low = np.exp(0.3 * ((logs - logs.mean()) / logs.std()) ** 3)
    sides = [side(target[n], np.full(150, 7), n * 10**6) for n in range(2)]
    found = matched_effect(identity(*sides), 1.25 * high, low)
    assert found is not None
    assert found.log_ratio == pytest.approx(np.log(1.25), abs=1e-6)
    assert found.error == pytest.approx(0, abs=1e-6)
    assert found.spread == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 1, 1.3])
@pytest.mark.parametrize("same_prompts", [False, True])
def test_intervals_cover_the_truth(ratio, same_prompts):
    inside = 0
    for number in range(200):
        rng = np.random.default_rng((number, same_prompts))
        draw = (rng, 0.5, np.log(ratio) / 0.6) if same_prompts else (rng,)
        drawn = paired(*draw) if same_prompts else independent(*draw, effect=np.log(ratio) / 0.2)
        assert drawn.effect is not None
        low, high = drawn.effect.log_interval
        inside += low < np.log(ratio) < high
    assert inside / 200 > 0.965


@pytest.mark.parametrize("ratio", [0.5, 1.3])
def test_intervals_of_gaps_cover_the_truth(ratio):
    inside = 0
    for number in range(200):
        rng = np.random.default_rng((number, 7))
        sides = [side(np.full(ROWS, 31), rng.integers(5, 150, ROWS), n * 10**6) for n in range(2)]
        high, low = np.exp(0.6 * rng.standard_normal((2, ROWS)))  # of geometric mean 1
        found = matched_effect(match(*sides), ratio * high, low)
        assert found is not None
        ends = found.interval(0.05)
        inside += ends[0] < ratio - 1 < ends[1]
    assert 0.91 < inside / 200 < 0.985


@pytest.mark.parametrize("ratio", [0.3, 1.0, 2.5])
def test_the_error_of_a_gap_is_that_of_leaving_pairs_out(ratio):
    rng = np.random.default_rng(0)
    sides = [side(np.full(199, 31), np.full(199, 7), n * 10**6) for n in range(2)]
    high, low = np.exp(0.6 * rng.standard_normal((2, 199))) * [[ratio], [1]]
    found = matched_effect(identity(*sides), high, low)
    assert found is not None
    assert found.gap == pytest.approx(gmean(high) - gmean(low), abs=1e-12)
    gaps = [gmean(np.delete(high, n)) - gmean(np.delete(low, n)) for n in range(199)]
    error = np.linalg.norm(np.array(gaps) - found.gap)
    assert found.gap_error == pytest.approx(error, rel=0.01)
    half = t.ppf(0.95, 198) * found.gap_error
    assert found.interval(0.1) == pytest.approx((found.gap - half, found.gap + half))


@pytest.mark.parametrize("lengths", [(7,), (7, 11), (7, 11, 13), (7, 11, 13, 17)])
def test_few_distinct_lengths_are_enough(lengths):
    rng = np.random.default_rng(len(lengths))
    sides = [side(rng.choice(lengths, 60), rng.choice([5, 9], 60), n * 10**6) for n in range(2)]
    high, low = (np.exp(0.1 * rng.standard_normal(60)) * rows.target for rows in sides)
    found = matched_effect(match(*sides), 2 * high, low)
    assert found is not None
    assert found.verdict() == "yes"
    assert found.log_ratio == pytest.approx(np.log(2), abs=0.1)


def test_a_few_pairs_of_other_lengths_do_not_hide_an_effect():
    rng = np.random.default_rng(0)
    target = np.full((2, 60), 40)
    target[0, :3] = 41, 42, 43
    sides = [side(t, rng.integers(5, 9, 60), n * 10**6) for n, t in enumerate(target)]
    high, low = np.exp(0.1 * rng.standard_normal((2, 60)))
    found = matched_effect(match(*sides), 3 * high, low)
    assert found is not None
    assert found.verdict() == "yes"


def test_prompts_that_tell_the_groups_apart_leave_it_undecided():
    sides = [side(np.full(30, 7), np.full(30, prompt), prompt * 10**6) for prompt in (5, 9)]
    values = np.exp(np.random.default_rng(0).standard_normal((2, 30)))
    assert matched_effect(match(*sides), *values) is None


def test_rows_without_a_positive_value_are_left_out():
    rng = np.random.default_rng(0)
    drawn = paired(rng, 0.5, 1.0)
    high = drawn.values[0].copy()
    high[:5] = 0, -1, np.nan, 0, 0
    found = matched_effect(drawn.matched, high, drawn.values[1])
    assert drawn.effect is not None
    assert found is not None
    assert drawn.effect.pairs - 5 <= found.pairs < drawn.effect.pairs


def test_a_statistic_that_never_varies_is_no_effect():
    drawn = independent(np.random.default_rng(0))
    flat = np.ones(ROWS)
    found = matched_effect(drawn.matched, flat, flat)
    assert found is not None
    assert found.gap == pytest.approx(0, abs=1e-9)
    assert found.verdict() == "no"
