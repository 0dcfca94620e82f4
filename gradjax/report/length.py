"""Do two groups differ beyond their lengths? The effect in pairs, and the rule of a verdict.

A gradient is a sum over tokens, so its norms and its rank follow the response's length, and groups
of different quality mostly differ in length too. Rows of both groups are paired by length
(`matching`); what difference in length remains within pairs is taken off by regressing the pairs'
log ratios of the statistic on the differences of polynomials in the logarithms of target, prompt
and all tokens (regression after matching: Rubin 1973, Biometrics 29:185). Statistics are positive
and vary in proportion, so they are compared as logarithms: in the simulations of
`benchmarks.length` this finds effects that differences in units miss.
"""

import dataclasses
import math
from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy import stats

from gradjax.config import NEGLIGIBLE
from gradjax.report.matching import BALANCE, CALIPERS, ROUNDING, Matched, Rows

DEGREE = 3  # of the polynomials, at the most
PAIRS_PER_DEGREE = 40  # fewer pairs take a lower one
LEVEL = 0.01  # of a verdict
FAMILY_LEVEL = 0.05  # of all verdicts of a report together (Holm 1979, Scand J Stat 6:65)
FEWEST_PAIRS = 12
# Standard deviations by which pairs may differ in a logarithm for a regression to take it off
# (Rubin 2001, Health Serv Outcomes Res Methodol 2:169).
APART = 0.5
Verdict = Literal["yes", "negligible", "no", "undecided"]
ENOUGH = 0.5  # share of units matched from which matched pairs decide


def rule(negligible: float = NEGLIGIBLE) -> str:
    """The rule in words, with its constants."""
    return f"""The size of a difference at equal length is the ratio of geometric means, high
over low, with its {1 - LEVEL:.0%} interval. The answer is "yes" if the interval excludes 1,
larger or smaller; "yes, but negligible" if it does, and lies within ±{negligible:g} standard
deviations of what length leaves of the statistic (bounds chosen in advance: --negligible); "no"
if it includes 1 and lies within these bounds; otherwise undecided. A "yes" also has to hold at
{FAMILY_LEVEL:.0%} for all verdicts of the report together (Holm's adjustment over nuclear norm
and effective rank of all comparisons, beyond length and beyond loss; the tables' other rows are
adjusted for one another, and so are the layers of a statistic in a comparison).

Rows of one prompt count together, as their mean, and rows of equal text once. Prompts that both
sides have are paired with themselves; the other ones with the nearest one of the other side,
one-to-one, at most {CALIPERS[0]:g} standard deviations apart in log target tokens and
{CALIPERS[1]:g} in log prompt tokens. As many pairs are kept, the most alike ones first, as keep
the means of either within {BALANCE:g} standard deviations. The pairs' log ratios are corrected
for the length differences within pairs by polynomials in the logarithms of target, prompt and
all tokens, of degree {DEGREE} from {DEGREE * PAIRS_PER_DEGREE} pairs on. Errors allow for
unequal variances (HC3). Fewer than {FEWEST_PAIRS} pairs decide nothing, nor do pairs that
differ by more than {APART:g} standard deviations on average.

Where fewer than {ENOUGH:.0%} of the smaller group's prompts can be matched and there is a run whose
responses were cut to their first N target tokens, that run decides: it has no difference in
response length, and asks a slightly different question, since only the first N tokens of each
response count.

Beyond loss asks the same of pairs that are also alike in loss, with its logarithm in the
regression: whether the statistic adds to what the loss says. Length and loss alone and the rank
regression are shown for description and decide nothing. Effective rank over its bound min(T, m,
n), which itself depends on length, has a row of its own and no part in the sentence."""


@dataclasses.dataclass(frozen=True)
class Effect:
    """By what factor high is larger than low at equal length, as a logarithm."""

    log_ratio: float
    error: float  # standard error of `log_ratio`
    gap: float  # what the factor makes of a typical row of low, in the statistic's units
    gap_error: float  # its standard error, the typical row's included (delta method)
    degrees_of_freedom: float  # of their Student's t
    pairs: int
    spread: float  # standard deviation of a row's log statistic at a given length
    apart: tuple[float, ...]  # standard deviations between the pairs' sides, of each logarithm

    def interval(self, level: float) -> tuple[float, float]:
        """The interval of `gap` that leaves out the truth with probability `level`."""
        half = self.gap_error * self._quantile(level)
        return self.gap - half, self.gap + half

    @property
    def log_interval(self) -> tuple[float, float]:
        """That of `log_ratio`, at `LEVEL`."""
        half = self.error * self._quantile(LEVEL)
        return self.log_ratio - half, self.log_ratio + half

    @property
    def p(self) -> float:
        """Of the null hypothesis that `log_ratio` is zero; NaN where the pairs say nothing."""
        if not self.balanced:
            return math.nan
        if self.error == 0:
            return float(abs(self.log_ratio) <= ROUNDING)
        return float(2 * stats.t.sf(abs(self.log_ratio) / self.error, self.degrees_of_freedom))

    @property
    def balanced(self) -> bool:
        """Whether the pairs are enough alike for a regression to take the rest off."""
        return max(map(abs, self.apart)) <= APART

    def verdict(self, negligible: float = NEGLIGIBLE, p_adjusted: float = 0.0) -> Verdict:
        """Whether there is an effect, and one that matters.

        Args:
          negligible: standard deviations of what length leaves.
          p_adjusted: for all verdicts of the report.
        """
        if not self.balanced:
            return "undecided"
        low, high = self.log_interval
        most = max(negligible * self.spread, ROUNDING)
        equal = -most <= low and high <= most
        if low > ROUNDING or high < -ROUNDING:
            if p_adjusted > FAMILY_LEVEL:
                return "undecided"
            return "negligible" if equal else "yes"
        return "no" if equal else "undecided"

    def pairs_to_decide(self, negligible: float = NEGLIGIBLE) -> int:
        """How many such pairs would, if the ratio stayed what it is; two digits."""
        half = self.error * self._quantile(LEVEL)
        size = abs(self.log_ratio)
        needed = max(size, negligible * self.spread - size, ROUNDING)
        pairs = self.pairs * (half / needed) ** 2
        digits = 10 ** max(math.floor(math.log10(max(pairs, 1))) - 1, 0)
        return math.ceil(pairs / digits) * digits

    def _quantile(self, level: float) -> float:
        return float(stats.t.ppf(1 - level / 2, self.degrees_of_freedom))


def matched_effect(
    matched: Matched, high: Float[np.ndarray, " n"], low: Float[np.ndarray, " m"]
) -> Effect | None:
    """The mean log ratio of matched pairs, corrected for what their lengths still differ by.

    The constant of a least-squares fit, with an error that allows for unequal variances (HC3);
    None where the pairs are too few for it. Rows without a positive value are left out.
    """
    sides = list(zip(matched.rows, matched.units, (high, low), strict=True))
    known = [values > 0 for _, _, values in sides]
    with np.errstate(divide="ignore", invalid="ignore"):
        outcomes = [np.log(values) for _, _, values in sides]
    logs = [_all_logs(rows) for rows, _, _ in sides]
    counted = [units.rows[k[units.rows]] for (_, units, _), k in zip(sides, known, strict=True)]
    whole = np.concatenate([x[rows] for x, rows in zip(logs, counted, strict=True)])
    if not len(whole):
        return None
    center, scale = whole.mean(axis=0), whole.std(axis=0)
    standard = [(x - center) / np.where(scale > 0, scale, 1) for x in logs]
    means = [
        units.means(np.column_stack([outcome, _powers(x, DEGREE), x]), k)
        for (_, units, _), outcome, x, k in zip(sides, outcomes, standard, known, strict=True)
    ]
    pairs = matched.pairs
    ours, theirs = means[0][pairs[:, 0]], means[1][pairs[:, 1]]
    usable = np.isfinite(ours[:, 0]) & np.isfinite(theirs[:, 0])
    spread = _spread(outcomes, standard, counted)
    return _fitted(ours[usable], theirs[usable], logs[0].shape[1], spread)


def _fitted(
    ours: Float[np.ndarray, "pairs f"],
    theirs: Float[np.ndarray, "pairs f"],
    columns: int,
    spread: float,
) -> Effect | None:
    """The effect from the pairs' log statistic, powers of `columns` logarithms, and these."""
    n = len(ours)
    if n < FEWEST_PAIRS:
        return None
    degree = min(DEGREE, max(n // PAIRS_PER_DEGREE, 1))
    apart = (ours - theirs)[:, 1 : 1 + degree * columns]
    inputs = np.column_stack([np.ones(n), _independent(apart)])
    if np.linalg.matrix_rank(inputs) < inputs.shape[1] or n <= inputs.shape[1]:
        return None  # lengths alone tell the groups apart
    inverse = np.linalg.pinv(inputs)
    leverage = np.einsum("nk,kn->n", inputs, inverse)
    shared = leverage < 1 - 1e-8
    if not shared.all():  # a pair that alone decides a coefficient says nothing of the groups
        return _fitted(ours[shared], theirs[shared], columns, spread)
    ratios = ours[:, 0] - theirs[:, 0]
    fitted = inverse @ ratios
    ratio, typical = float(fitted[0]), float(np.exp(theirs[:, 0].mean()))
    # What each pair moves the estimates by: their squares add up to the variances (HC3).
    moves = inverse[0] * (ratios - inputs @ fitted) / (1 - leverage)
    typical_moves = (theirs[:, 0] - theirs[:, 0].mean()) / n
    gap_moves = np.exp(ratio) * moves + np.expm1(ratio) * typical_moves
    lengths = range(ours.shape[1] - columns, ours.shape[1] - 1)  # all tokens are of both
    return Effect(
        log_ratio=ratio,
        error=float(np.linalg.norm(moves)),
        gap=typical * float(np.expm1(ratio)),
        gap_error=typical * float(np.linalg.norm(gap_moves)),
        degrees_of_freedom=float(n - inputs.shape[1]),
        pairs=n,
        spread=spread,
        apart=tuple(standard_difference(ours[:, c], theirs[:, c]) for c in lengths),
    )


def _all_logs(rows: Rows) -> Float[np.ndarray, "n c"]:
    """The logarithms that rows are matched on, and that of all tokens."""
    return np.column_stack([rows.logs, np.log(rows.target + rows.prompt)])


def _spread(
    outcomes: list[Float[np.ndarray, " n"]],
    standard: list[Float[np.ndarray, "n c"]],
    counted: list[np.ndarray],
) -> float:
    """Standard deviation of rows' log statistic within groups, given their lengths."""
    pairs = list(zip(outcomes, standard, counted, strict=True))
    outcome = np.concatenate([values[rows] for values, _, rows in pairs])
    powers = np.concatenate([_powers(x[rows], DEGREE) for _, x, rows in pairs])
    group = np.repeat([0.0, 1.0], [len(rows) for rows in counted])
    inputs = np.column_stack([np.ones(len(group)), group, powers])
    fitted, _, rank, _ = np.linalg.lstsq(inputs, outcome)
    rest = outcome - inputs @ fitted
    return float(np.sqrt(rest @ rest / max(len(rest) - rank, 1)))


def standard_difference(high: Float[np.ndarray, " n"], low: Float[np.ndarray, " m"]) -> float:
    """Difference of means in standard deviations within groups."""
    apart = float(high.mean() - low.mean())
    spread = float(np.sqrt((high.var() + low.var()) / 2))
    if spread < 1e-12:
        return 0.0 if abs(apart) < 1e-12 else float(np.copysign(np.inf, apart))
    return apart / spread


def _powers(standard: Float[np.ndarray, "n c"], degree: int) -> Float[np.ndarray, "n k"]:
    """All columns to the first power, then to the second, up to `degree`."""
    return np.column_stack([standard**power for power in range(1, degree + 1)])


def _independent(columns: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n r"]:
    """Orthonormal columns that span the same: few distinct lengths make powers of them repeat."""
    basis, sizes, _ = np.linalg.svd(columns, full_matrices=False)
    return basis[:, sizes > 1e-9 * max(sizes.max(initial=0), 1)]
