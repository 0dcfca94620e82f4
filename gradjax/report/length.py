"""Do two groups differ beyond their lengths? Matched pairs, and the rule of a verdict.

A gradient is a sum over tokens, so its norms and its rank follow the response's length, and groups
of different quality mostly differ in length too. Rows of both groups are paired on the logarithm
of their target tokens (of their prompt tokens where all targets are equally many); what length
difference remains within pairs is taken off by regressing the pairs' log ratios of the statistic
on the differences of cubics in log target and log prompt tokens (regression after matching: Rubin
1973, Biometrics 29:185). Statistics are positive and vary in proportion, so they are compared as
logarithms: in the simulations of `benchmarks.length` this finds effects that differences in units
miss.
"""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

CALIPER = 0.2  # in standard deviations of log length within groups (Austin 2011, Pharm Stat 10:150)
DEGREE = 3  # of the polynomial in log length
LEVEL = 0.01  # of a verdict
NEGLIGIBLE = 0.5  # "no" excludes effects of more standard deviations, of what length leaves
FEWEST_PAIRS = 12
# Standard deviations by which log prompt tokens may differ for a regression to take it off
# (Rubin 2001, Health Serv Outcomes Res Methodol 2:169).
PROMPTS_APART = 0.5
Verdict = Literal["yes", "no", "undecided"]
RULE = f"""A statistic separates the groups beyond length ("yes") if its {1 - LEVEL:.0%} interval
at equal length excludes zero, in either direction; it does not ("no") if that interval lies within
±{NEGLIGIBLE} standard deviations of what length leaves of the statistic; otherwise it is undecided.

The interval is that of matched pairs: one row of either group, one-to-one, the closest first, at
most {CALIPER} standard deviations apart in log target tokens. The pairs' log ratios are corrected
for the length differences within pairs by cubics in log target and in log prompt tokens.
Fewer than {FEWEST_PAIRS} pairs decide nothing, nor do pairs whose log prompt tokens differ between
the groups by more than {PROMPTS_APART} standard deviations: no regression makes up for that.

Where fewer than half of the smaller group's rows can be matched and there is a run whose responses
were cut to their first N target tokens, that run decides, its rows paired by log prompt tokens
instead: it has no difference in response length, and asks a slightly different question, since only
the first N tokens of each response count.

Length and loss alone and the rank regression are shown for description and decide nothing.
Effective rank over its bound min(T, m, n), which itself depends on length, has a row of its own and
no part in the sentence."""


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Tokens of each row of one side."""

    target: Int[np.ndarray, " n"]
    prompt: Int[np.ndarray, " n"]

    @property
    def logs(self) -> Float[np.ndarray, "n 2"]:
        """Logarithms of target tokens and of prompt tokens (plus one: a prompt may be empty)."""
        return np.column_stack([np.log(self.target), np.log1p(self.prompt)])


@dataclasses.dataclass(frozen=True)
class Effect:
    """By what factor high is larger than low at equal length, as a logarithm."""

    log_ratio: float
    error: float  # standard error of `log_ratio`
    gap: float  # what the factor makes of a typical row of low, in the statistic's units
    gap_error: float  # its standard error, the typical row's included (delta method)
    degrees_of_freedom: float  # of their Student's t
    spread: float  # standard deviation of a row's log statistic at a given length
    prompts_apart: float  # standard deviations between the groups' log prompt tokens

    def interval(self, level: float) -> tuple[float, float]:
        """The interval of `gap` that leaves out the truth with probability `level`."""
        half = self.gap_error * self._quantile(level)
        return self.gap - half, self.gap + half

    @property
    def verdict(self) -> Verdict:
        """Whether there is an effect, at `LEVEL`; "no" if none of any size that matters."""
        if abs(self.prompts_apart) > PROMPTS_APART:
            return "undecided"
        half = self.error * self._quantile(LEVEL)
        low, high = self.log_ratio - half, self.log_ratio + half
        if low > 0 or high < 0:
            return "yes"
        most = NEGLIGIBLE * self.spread
        return "no" if -most < low and high < most else "undecided"

    def _quantile(self, level: float) -> float:
        return float(stats.t.ppf(1 - level / 2, self.degrees_of_freedom))


def match(
    high: Lengths, low: Lengths, on: Literal["target", "prompt"] = "target"
) -> Int[np.ndarray, "pairs 2"]:
    """One-to-one pairs (row of high, row of low) within `CALIPER` in the logarithm of `on` tokens.

    The closest pair is taken first, of equally close ones the one closest in the other tokens.
    """
    order = [0, 1] if on == "target" else [1, 0]
    highs, lows = high.logs[:, order], low.logs[:, order]
    if min(len(highs), len(lows)) < 2:
        return np.zeros((0, 2), np.int64)
    spread = np.sqrt((highs[:, 0].var(ddof=1) + lows[:, 0].var(ddof=1)) / 2)
    caliper = CALIPER * spread
    by_length = np.argsort(lows[:, 0], kind="stable")
    lengths = lows[by_length, 0]
    first = np.searchsorted(lengths, highs[:, 0] - caliper, "left")
    counts = np.searchsorted(lengths, highs[:, 0] + caliper, "right") - first
    left = np.repeat(np.arange(len(highs)), counts)
    offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    right = by_length[np.repeat(first, counts) + offsets]
    apart = np.abs(highs[left] - lows[right])
    free_high, free_low = [True] * len(highs), [True] * len(lows)
    pairs = []
    closest_first = np.lexsort((apart[:, 1], apart[:, 0]))
    for i, j in zip(left[closest_first].tolist(), right[closest_first].tolist(), strict=True):
        if free_high[i] and free_low[j]:
            free_high[i] = free_low[j] = False
            pairs.append((i, j))
    return np.array(pairs, np.int64).reshape(-1, 2)


def matched_effect(
    high: Float[np.ndarray, " n"],
    low: Float[np.ndarray, " m"],
    logs_high: Float[np.ndarray, "n 2"],
    logs_low: Float[np.ndarray, "m 2"],
    pairs: Int[np.ndarray, "pairs 2"],
) -> Effect | None:
    """The mean log ratio of matched pairs, corrected for what their lengths still differ by.

    The constant of a least-squares fit, with an error that allows for unequal variances (HC3);
    None where the pairs are too few for it. Rows without a positive value are left out.
    """
    import statsmodels.api as sm  # here: gradjax.select, which reads CALIPER, does without

    i, j = pairs.T
    usable = (high[i] > 0) & (low[j] > 0)
    i, j = i[usable], j[usable]
    n = len(i)
    if n < FEWEST_PAIRS:
        return None
    columns = np.column_stack([_powers(x) for x in np.concatenate([logs_high[i], logs_low[j]]).T])
    inputs = np.column_stack([np.ones(n), _independent(columns[:n] - columns[n:])])
    if np.linalg.matrix_rank(inputs) < inputs.shape[1] or n <= inputs.shape[1]:
        return None  # lengths alone tell the groups apart
    ours, theirs = np.log(high[i]), np.log(low[j])
    fit = sm.OLS(ours - theirs, inputs).fit()
    leverage = fit.get_influence().hat_matrix_diag
    shared = leverage < 1 - 1e-8
    if not shared.all():  # a pair that alone decides a coefficient says nothing of the groups
        rest = np.column_stack([i, j])[shared]
        return matched_effect(high, low, logs_high, logs_low, rest)
    ratio, typical = float(fit.params[0]), float(np.exp(theirs.mean()))
    # What each pair moves the estimates by: their squares add up to the variances (HC3).
    moves = fit.model.pinv_wexog[0] * fit.resid / (1 - leverage)
    gap_moves = np.exp(ratio) * moves + np.expm1(ratio) * (theirs - theirs.mean()) / n
    return Effect(
        log_ratio=ratio,
        error=float(np.linalg.norm(moves)),
        gap=typical * float(np.expm1(ratio)),
        gap_error=typical * float(np.linalg.norm(gap_moves)),
        degrees_of_freedom=float(fit.df_resid),
        spread=float(np.sqrt(fit.ssr / fit.df_resid / 2)),  # a pair has the variance of two rows
        prompts_apart=standard_difference(logs_high[i, 1], logs_low[j, 1]),
    )


def standard_difference(high: Float[np.ndarray, " n"], low: Float[np.ndarray, " m"]) -> float:
    """Difference of means in standard deviations within groups."""
    apart = float(high.mean() - low.mean())
    spread = float(np.sqrt((high.var() + low.var()) / 2))
    if spread < 1e-12:
        return 0.0 if abs(apart) < 1e-12 else float(np.copysign(np.inf, apart))
    return apart / spread


def _powers(logs: Float[np.ndarray, " n"]) -> Float[np.ndarray, "n k"]:
    """Powers 1 to `DEGREE` of standardised logarithms."""
    spread = logs.std()
    standard = (logs - logs.mean()) / (spread if spread > 0 else 1)
    return standard[:, None] ** np.arange(1, DEGREE + 1)


def _independent(columns: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n r"]:
    """Orthonormal columns that span the same: few distinct lengths make powers of them repeat."""
    basis, sizes, _ = np.linalg.svd(columns, full_matrices=False)
    return basis[:, sizes > 1e-9 * max(sizes.max(initial=0), 1)]
