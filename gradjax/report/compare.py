"""High against low: gaps with their uncertainty, and whether they are more than length.

Every number is of examples: an example's value is its mean over layers, and `all` the mean of
the projections.
"""

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import statsmodels.api as sm
from scipy import stats
from statsmodels.stats.nonparametric import rank_compare_2indep

from gradjax.errors import GradjaxError
from gradjax.report.length import (
    FEWEST_PAIRS,
    PROMPTS_APART,
    Effect,
    Lengths,
    match,
    matched_effect,
)
from gradjax.report.ranks import auroc
from gradjax.storage.results import ALL, KEY, RunValues, example_values

COLUMNS = [
    *("comparison", "statistic", "projection", "n_high", "n_low", "mean_high", "mean_low", "gap"),
    *("ci_low", "ci_high", "auroc", "cliffs_delta", "p_adjusted", "matched_pairs", "matched_gap"),
    *("matched_ci_low", "matched_ci_high", "beyond_length"),
]
_TABLE = [
    *(column for column in COLUMNS if column != "p_adjusted"),
    *("p", "auroc_low", "auroc_high", "rank_effect", "prompts_apart"),
    *("equal_length_gap", "equal_length_ci_low", "equal_length_ci_high"),
]
_COMMON = ("model", "tokenizer", "template", "prompt_format", "max_length", "layers", "projections")
INTERVAL = 0.05  # of what is shown: 95 % intervals
ENOUGH = 0.5  # share of rows matched from which matched pairs are the primary view
_RESAMPLES = 2_000
View = Literal["matched", "equal_length", "none"]
Sides = tuple[pd.DataFrame, pd.DataFrame]  # the rows of high and of low


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two groups of the run of a model, `high` and `low`.

    `table` has one row per statistic and projection with `COLUMNS` but for `p_adjusted`, and the
    unadjusted `p`, AUROC's interval, the effect in the equal-length run and `rank_effect`.
    `balance` has geometric means of target and prompt tokens and their standardised difference,
    of all rows and of the matched, in the run and in the equal-length run.
    """

    model: str
    high: str
    low: str
    table: pd.DataFrame
    length_auroc: float
    loss_auroc: float
    pairs: int
    matched_share: float
    balance: pd.DataFrame
    equal_length: int | None  # target tokens of the equal-length run, where there is one
    equal_length_rows: tuple[int, int]  # its rows that are used: of high, of low
    equal_length_pairs: int  # of them, paired on prompt tokens
    cut: int  # matched pairs of which a row was cut at --max_length
    primary: View  # what decides

    @property
    def name(self) -> str:
        """As in `--compare`."""
        return f"{self.high}:{self.low}"


def compare(
    run: RunValues, high: str, low: str, equal_length: RunValues | None = None
) -> Comparison:
    """Compares two groups.

    Args:
      equal_length: a run of the same groups with `--target_tokens`. Such a run is its own.

    Raises:
      GradjaxError: if a group is missing or has no `ok` row.
    """
    sides = run.rows(high), run.rows(low)
    values = example_values(run)
    matched = _match(values, sides, "target")
    pairs = matched.pairs
    share = len(pairs) / min(map(len, sides))
    equal_length = run if run.target_tokens else equal_length
    equal = _match_equal_lengths(run, high, low, equal_length) if equal_length else None
    primary: View = "matched" if len(pairs) >= FEWEST_PAIRS else "none"
    if equal_length and (share < ENOUGH or equal_length is run):
        primary = "equal_length"
    logs = [side.logs for side in matched.lengths]
    rows = []
    for statistic, projection in values.columns:
        ours, theirs = _both(values[statistic, projection], sides)
        at_length = matched.effects[statistic, projection]
        alone = equal.effects.get((statistic, projection)) if equal else None
        deciding = alone if primary == "equal_length" else at_length
        rows.append(
            {
                "comparison": f"{high}:{low}",
                "statistic": statistic,
                "projection": projection,
                **difference(ours, theirs),
                "matched_pairs": len(pairs),
                **_shown("matched", at_length),
                **_shown("equal_length", alone),
                "rank_effect": _rank_effect(ours, theirs, *logs),
                "prompts_apart": deciding.prompts_apart if deciding else np.nan,
                "beyond_length": deciding.verdict if deciding else "undecided",
            }
        )
    balances = [matched.balance("all", "matched")]
    if equal:
        balances.append(equal.balance("equal_length_all", "equal_length_matched"))
    truncated = [side["truncated"].to_numpy() for side in sides]
    return Comparison(
        model=run.name,
        high=high,
        low=low,
        table=pd.DataFrame(rows, columns=_TABLE),
        length_auroc=auroc(*(side["num_target_tokens"].to_numpy(float) for side in sides)),
        loss_auroc=auroc(*(side["loss"].to_numpy(float) for side in sides)),
        pairs=len(pairs),
        matched_share=share,
        balance=pd.concat(balances, ignore_index=True),
        equal_length=equal_length.target_tokens if equal_length else None,
        equal_length_rows=equal.rows if equal else (0, 0),
        equal_length_pairs=len(equal.pairs) if equal else 0,
        cut=int((truncated[0][pairs[:, 0]] | truncated[1][pairs[:, 1]]).sum()),
        primary=primary,
    )


def adjusted(comparisons: Sequence[Comparison]) -> pd.DataFrame:
    """All comparisons' tables, with p adjusted over them as one family (Benjamini–Hochberg)."""
    tables = [one.table.assign(model=one.model) for one in comparisons]
    table = pd.concat(tables, ignore_index=True)
    known = table["p"].notna()
    table["p_adjusted"] = np.nan
    table.loc[known, "p_adjusted"] = stats.false_discovery_control(table.loc[known, "p"])
    return table


def difference(high: np.ndarray, low: np.ndarray) -> dict[str, float]:
    """Gap of two samples' means with its bootstrap interval, AUROC with its interval, and p.

    AUROC is P(high > low), ties counted half; its interval is Brunner and Munzel's, p that of
    the Mann–Whitney test. NaNs are left out.
    """
    high, low = high[np.isfinite(high)], low[np.isfinite(low)]
    found: dict[str, float] = {"n_high": len(high), "n_low": len(low)}
    if not len(high) or not len(low):
        return found
    found |= {"mean_high": high.mean(), "mean_low": low.mean(), "gap": high.mean() - low.mean()}
    found["auroc"] = auroc(high, low)
    found["cliffs_delta"] = 2 * found["auroc"] - 1
    if min(len(high), len(low)) < 2:
        return found
    ends = stats.bootstrap(
        (high, low),
        lambda x, y, axis: x.mean(axis=axis) - y.mean(axis=axis),
        n_resamples=_RESAMPLES,
        batch=max(2_000_000 // max(len(high), len(low)), 1),
        confidence_level=1 - INTERVAL,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    found |= {"ci_low": ends.low, "ci_high": ends.high}
    found["p"] = stats.mannwhitneyu(high, low).pvalue
    return found | _auroc_interval(high, low, found["auroc"])


def _auroc_interval(high: np.ndarray, low: np.ndarray, estimate: float) -> dict[str, float]:
    """Brunner and Munzel's; Wilson's of the smaller side's rows where ranks do not vary."""
    if estimate in (0, 1) or not np.ptp(np.concatenate([high, low])):
        rows = min(len(high), len(low))
        ends = stats.binomtest(round(estimate * rows), rows).proportion_ci(1 - INTERVAL, "wilson")
    else:
        ends = rank_compare_2indep(high, low).conf_int(alpha=INTERVAL)
    return {"auroc_low": max(ends[0], 0.0), "auroc_high": min(ends[1], 1.0)}


def sentence(comparison: Comparison) -> str:
    """Whether nuclear norm and effective rank separate the groups beyond length, and how sure."""
    table = comparison.table[comparison.table["projection"] == ALL]
    rows = {row["statistic"]: row for row in table.to_dict("records")}
    said = [_said(comparison, rows[name]) for name in ("nuclear_norm", "effective_rank")]
    groups = f"{comparison.high} against {comparison.low}"
    return f"{groups}, beyond length: {'; '.join(said)}. {_basis(comparison)}"


def format_gaps(comparison: Comparison) -> str:
    """Gaps of nuclear norm and effective rank with their intervals, for a terminal."""
    rows = {}
    for row in comparison.table.to_dict("records"):
        if row["statistic"] in ("nuclear_norm", "effective_rank"):
            text = f"{row['gap']:.4g} [{row['ci_low']:.4g}, {row['ci_high']:.4g}]"
            rows.setdefault(row["projection"], {})[row["statistic"].replace("_", " ")] = text
    title = f"{comparison.high} − {comparison.low}, mean and 95 % interval"
    return f"{title}\n{pd.DataFrame.from_dict(rows, orient='index').to_string()}"


def _said(comparison: Comparison, row: dict[Hashable, Any]) -> str:
    name, verdict = row["statistic"].replace("_", " "), row["beyond_length"]
    if verdict != "yes":
        return f"{name} {verdict}"
    side = "larger" if row[f"{comparison.primary}_gap"] > 0 else "smaller"
    return f"{name} yes, {side} in {comparison.high}"


def _basis(comparison: Comparison) -> str:
    pairs = f"{comparison.pairs} matched pairs, {comparison.matched_share:.0%} of the smaller group"
    if comparison.primary == "none":
        return (
            f"Too few rows are equally long ({pairs}): run the same rows with --target_tokens=N "
            "and give that run as --equal_length_run."
        )
    basis = f"By {pairs}."
    if comparison.primary == "equal_length":
        high, low = comparison.equal_length_rows
        basis = (
            f"By the first {comparison.equal_length} target tokens of the {high} and {low} "
            f"responses that have them, {comparison.equal_length_pairs} pairs of like prompts."
        )
        if comparison.equal_length_pairs < FEWEST_PAIRS:
            return f"{basis} Fewer than {FEWEST_PAIRS} decide nothing."
    elif comparison.cut:
        basis += f" In {comparison.cut} pairs a row was cut at --max_length: by what was left."
    apart = comparison.table["prompts_apart"].abs().max()
    if apart > PROMPTS_APART:
        basis += f" Prompts are too unlike in length: {apart:.1f} standard deviations apart."
    return basis


@dataclasses.dataclass(frozen=True)
class _Matched:
    """Pairs of two sides' rows, and the effects among them by statistic and projection."""

    lengths: tuple[Lengths, Lengths]
    pairs: np.ndarray
    effects: dict[Any, Effect | None]

    @property
    def rows(self) -> tuple[int, int]:
        """How many each side has."""
        return len(self.lengths[0].target), len(self.lengths[1].target)

    def balance(self, of_all: str, of_pairs: str) -> pd.DataFrame:
        """Geometric means and standardised differences of log tokens, under these names."""
        found = []
        logs = self.lengths[0].logs, self.lengths[1].logs
        # The same spread before and after matching, so that the two can be compared.
        spread = np.sqrt(sum(side.var(axis=0) for side in logs) / 2)
        paired = logs[0][self.pairs[:, 0]], logs[1][self.pairs[:, 1]]
        for which, (ours, theirs) in ((of_all, logs), (of_pairs, paired)):
            for column, kind in enumerate(("target", "prompt")):
                if len(ours):
                    means = ours[:, column].mean(), theirs[:, column].mean()
                    apart = (means[0] - means[1]) / spread[column] if spread[column] else 0.0
                    found.append((which, kind, *np.exp(means), apart))
        return pd.DataFrame(found, columns=["rows", "tokens", "high", "low", "difference"])


def _match(values: pd.DataFrame, sides: Sides, on: Literal["target", "prompt"]) -> _Matched:
    high, low = _lengths(sides[0]), _lengths(sides[1])
    pairs = match(high, low, on)
    effects = {
        name: matched_effect(*_both(values[name], sides), high.logs, low.logs, pairs)
        for name in values.columns
    }
    return _Matched((high, low), pairs, effects)


def _match_equal_lengths(run: RunValues, high: str, low: str, equal_length: RunValues) -> _Matched:
    if equal_length.target_tokens is None:
        raise GradjaxError(
            f"--equal_length_run={equal_length.directory}: it was not run with --target_tokens=N"
        )
    if unlike := _unlike(run, equal_length, (high, low)):
        raise GradjaxError(
            f"--equal_length_run={equal_length.directory} differs from {run.directory} in "
            f"{', '.join(unlike)}; give a run of the same command with --target_tokens=N"
        )
    sides = equal_length.rows(high), equal_length.rows(low)
    return _match(example_values(equal_length), sides, "prompt")


def _unlike(run: RunValues, other: RunValues, groups: tuple[str, str]) -> list[str]:
    """What two runs should have in common and have not."""
    unlike = [
        name
        for name in _COMMON
        if run.manifest["settings"].get(name) != other.manifest["settings"].get(name)
    ]
    for group in groups:
        ours, theirs = (one.manifest["data"].get(group, {}) for one in (run, other))
        if ours.get("hash") != theirs.get("hash"):
            unlike.append(f"the rows of {group}")
    return unlike


def _lengths(rows: pd.DataFrame) -> Lengths:
    target = rows["num_target_tokens"].to_numpy()
    return Lengths(target, rows["num_tokens"].to_numpy() - target)


def _both(column: pd.Series, sides: Sides) -> tuple[np.ndarray, np.ndarray]:
    """The sides' numbers of one statistic and projection."""
    high, low = (
        column.reindex(pd.MultiIndex.from_frame(rows[KEY])).to_numpy(float) for rows in sides
    )
    return high, low


def _shown(view: str, effect: Effect | None) -> dict[str, float]:
    if effect is None:
        return {f"{view}_{name}": np.nan for name in ("gap", "ci_low", "ci_high")}
    low, high = effect.interval(INTERVAL)
    return {f"{view}_gap": effect.gap, f"{view}_ci_low": low, f"{view}_ci_high": high}


def _rank_effect(
    high: np.ndarray, low: np.ndarray, logs_high: np.ndarray, logs_low: np.ndarray
) -> float:
    """How many percentiles high ranks above low in a linear regression on log lengths.

    Descriptive: where the statistic saturates in length it differs from zero without cause.
    """
    values = np.concatenate([high, low])
    known = np.isfinite(values)
    group = np.repeat([1.0, 0.0], [len(high), len(low)])
    logs = np.vstack([logs_high, logs_low])
    logs = logs[:, np.ptp(logs, axis=0) > 0]  # a column of equal lengths is the constant's
    inputs = np.column_stack([group, np.ones(len(values)), logs])
    if np.linalg.matrix_rank(inputs[known]) < inputs.shape[1]:
        return np.nan
    ranks = 100 * stats.rankdata(values[known]) / known.sum()
    return float(sm.OLS(ranks, inputs[known]).fit().params[0])
