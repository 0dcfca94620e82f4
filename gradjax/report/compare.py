"""High against low: gaps with their uncertainty, and whether they are more than length.

Every number is of examples: an example's value is its mean over layers, and `all` the mean of
the projections.
"""

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import statsmodels.api as sm
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.nonparametric import rank_compare_2indep

from gradjax.config import NEGLIGIBLE
from gradjax.errors import GradjaxError
from gradjax.report.length import (
    APART,
    ENOUGH,
    FEWEST_PAIRS,
    Effect,
    matched_effect,
)
from gradjax.report.matching import ROUNDING, Matched, Rows, match
from gradjax.report.ranks import auroc
from gradjax.storage.results import ALL, KEY, RunValues, example_values

RATIO = ["ratio", "ratio_ci_low", "ratio_ci_high"]
COLUMNS = [
    *("comparison", "statistic", "projection", "n_high", "n_low", "mean_high", "mean_low", "gap"),
    *("ci_low", "ci_high", "auroc", "cliffs_delta", "p_adjusted", "matched_pairs", "matched_gap"),
    *("matched_ci_low", "matched_ci_high", "beyond_length", *RATIO),
    *("clusters_high", "clusters_low", "duplicates", "paired", "beyond_loss"),
]
_TABLE = [
    *(column for column in COLUMNS if column != "p_adjusted"),
    *("p", "auroc_low", "auroc_high", "rank_effect"),
    *("equal_length_gap", "equal_length_ci_low", "equal_length_ci_high"),
]
# What a comparison's sentence says, and a report's adjustment is over.
HEADLINE = [("nuclear_norm", ALL), ("effective_rank", ALL)]
_COMMON = ("model", "tokenizer", "template", "prompt_format", "max_length", "layers", "projections")
INTERVAL = 0.05  # of gaps: 95 % intervals
_RESAMPLES = 2_000
_LEAST_LOSS = 1e-6  # nats per token; no logarithm is taken of less
View = Literal["matched", "equal_length", "none"]
Sides = tuple[pd.DataFrame, pd.DataFrame]  # the rows of high and of low
Effects = dict[tuple[str, str], Effect | None]  # by statistic and projection


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two groups of the run of a model, `high` and `low`.

    `table` has one row per statistic and projection with `COLUMNS` but for `p_adjusted`, and the
    unadjusted `p`, AUROC's interval, the effect in the equal-length run and `rank_effect`.
    `balance` has geometric means of target and prompt tokens and their standardised difference,
    of all units and of the matched, in the run and in the equal-length run.
    """

    run: RunValues
    high: str
    low: str
    table: pd.DataFrame
    # What decides: beyond length, and beyond length and loss.
    effects: Effects
    loss_effects: Effects
    length_auroc: float
    loss_auroc: float
    matched: Matched
    balance: pd.DataFrame
    equal_run: RunValues | None  # where there is one, the equal-length run
    equal_matched: Matched | None  # its rows that are used
    cut: int  # matched pairs of which a row was cut at --max_length
    primary: View  # what decides
    negligible: float  # standard deviations of what length leaves, that are of no importance

    @property
    def model(self) -> str:
        """What the run is called."""
        return self.run.name

    @property
    def equal_length(self) -> int | None:
        """Target tokens of the equal-length run."""
        return self.equal_run.target_tokens if self.equal_run else None

    @property
    def deciding_run(self) -> RunValues:
        """The run of the pairs that decide."""
        alone = self.equal_run if self.primary == "equal_length" else None
        return alone or self.run

    @property
    def name(self) -> str:
        """As in `--compare`."""
        return f"{self.high}:{self.low}"

    @property
    def deciding(self) -> Matched:
        """The pairs that decide."""
        alone = self.equal_matched if self.primary == "equal_length" else None
        return alone or self.matched


def compare(
    run: RunValues,
    high: str,
    low: str,
    equal_length: RunValues | None = None,
    negligible: float = NEGLIGIBLE,
) -> Comparison:
    """Compares two groups; its verdicts are adjusted for each other.

    Args:
      equal_length: a run of the same groups with `--target_tokens`. Such a run is its own.
      negligible: standard deviations of what length leaves, that are of no importance.

    Raises:
      GradjaxError: if a group is missing or has no `ok` row.
    """
    whole = _compared(run, high, low)
    equal_length = run if run.target_tokens else equal_length
    alone = None
    if equal_length:
        _require_same_rows(run, equal_length, (high, low))
        alone = _compared(equal_length, high, low)
    primary: View = "matched" if len(whole.matched.pairs) >= FEWEST_PAIRS else "none"
    if alone and (whole.matched.share < ENOUGH or equal_length is run):
        primary = "equal_length"
    deciding = alone if alone and primary == "equal_length" else whole
    balances = [_balance(whole.matched, "all", "matched")]
    if alone:
        balances.append(_balance(alone.matched, "equal_length_all", "equal_length_matched"))
    found = Comparison(
        run=run,
        high=high,
        low=low,
        table=pd.DataFrame(_table(whole, alone, deciding), columns=_TABLE).assign(
            comparison=f"{high}:{low}"
        ),
        effects=deciding.effects,
        loss_effects=_loss_effects(deciding),
        length_auroc=auroc(*(side["num_target_tokens"].to_numpy(float) for side in whole.sides)),
        loss_auroc=auroc(*(side["loss"].to_numpy(float) for side in whole.sides)),
        matched=whole.matched,
        balance=pd.concat(balances, ignore_index=True),
        equal_run=equal_length,
        equal_matched=alone.matched if alone else None,
        cut=_cut(whole.matched, whole.sides),
        primary=primary,
        negligible=negligible,
    )
    (found,) = settled([found])
    return found


def settled(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons with the verdicts of a report of all of them.

    A "yes" of the sentences has to hold for all of them together, as has one of the tables' other
    rows for all of these (Holm).
    """
    asked = [
        _Asked(number, column, name, effect)
        for number, one in enumerate(comparisons)
        for column, effects in (("beyond_length", one.effects), ("beyond_loss", one.loss_effects))
        for name, effect in effects.items()
        if effect and np.isfinite(effect.p)
    ]
    answers: dict[tuple[int, str, tuple[str, str]], str] = {}
    for headline in (True, False):
        family = [one for one in asked if (one.name in HEADLINE) == headline]
        for one, p in zip(family, holm([one.effect.p for one in family]), strict=True):
            negligible = comparisons[one.comparison].negligible
            answers[one.comparison, one.column, one.name] = one.effect.verdict(negligible, p)
    found = []
    for number, one in enumerate(comparisons):
        names = list(zip(one.table["statistic"], one.table["projection"], strict=True))
        columns = {
            column: [answers.get((number, column, name), "undecided") for name in names]
            for column in ("beyond_length", "beyond_loss")
        }
        table = one.table.assign(**columns)
        table.loc[table["statistic"] == "loss", "beyond_loss"] = None
        found.append(dataclasses.replace(one, table=table))
    return found


class _Asked(NamedTuple):
    """A question that has an answer."""

    comparison: int
    column: str  # of the table
    name: tuple[str, str]  # statistic and projection
    effect: Effect


def holm(p: Sequence[float]) -> list[float]:
    """p values, adjusted for one another."""
    return np.asarray(multipletests(p, method="holm")[1]).tolist()


def answers(comparison: Comparison) -> pd.DataFrame:
    """What the sentence says, as a table: a row per statistic of `HEADLINE`.

    Columns statistic, answer, `RATIO`, beyond_loss and pairs; answers in words.
    """
    found = []
    for row in comparison.table.to_dict("records"):
        name = row["statistic"], row["projection"]
        if name in HEADLINE:
            at_loss = comparison.loss_effects.get(name)
            loss_ratio = float(np.exp(at_loss.log_ratio)) if at_loss else np.nan
            found.append(
                {
                    "statistic": row["statistic"],
                    "answer": answer(row["beyond_length"], row["ratio"]),
                    **{column: row[column] for column in RATIO},
                    "beyond_loss": answer(row["beyond_loss"], loss_ratio),
                    "pairs": len(comparison.deciding.pairs),
                }
            )
    return pd.DataFrame(found)


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


def answer(verdict: str, ratio: float) -> str:
    """A verdict in words."""
    if verdict == "yes":
        return f"yes, {'larger' if ratio > 1 else 'smaller'}"
    return "yes, but negligible" if verdict == "negligible" else verdict


def interval(ratio: float, low: float, high: float) -> str:
    """A ratio with the ends of its interval."""
    return f"{_short(ratio)} [{_short(low)}, {_short(high)}]"


def _said(comparison: Comparison, row: dict[Hashable, Any]) -> str:
    statistic, verdict = row["statistic"], row["beyond_length"]
    effect = comparison.effects.get((statistic, ALL))
    name = statistic.replace("_", " ")
    if not effect or not effect.balanced:
        return f"{name} undecided"
    ratio, low, high = (row[column] for column in RATIO)
    where = f" in {comparison.high}" if verdict == "yes" else ""
    said = f"{name} {answer(verdict, ratio)}{where}, ratio {interval(ratio, low, high)}"
    if verdict != "undecided":
        return said
    if not low <= 1 <= high:
        return f"{said}, which may be chance among so many verdicts"
    needed = effect.pairs_to_decide(comparison.negligible)
    return f"{said}; about {needed:,} such pairs would decide"


def _short(ratio: float) -> str:
    return f"{ratio:.3f}" if 0.1 <= ratio < 10 else f"{ratio:.3g}"


def _basis(comparison: Comparison) -> str:
    matched = comparison.deciding
    smaller = min(len(units.clusters) for units in matched.units)
    pairs = (
        f"{len(matched.pairs)} pairs ({matched.paired} of the same prompt; the smaller group has "
        f"{smaller} prompts)"
    )
    if smaller < FEWEST_PAIRS:
        return f"By {pairs}: fewer than {FEWEST_PAIRS} decide nothing; measure more rows."
    if comparison.primary == "none":
        return (
            f"Too few are equally long, {pairs}: run the same rows with --target_tokens=N and "
            "give that run as --equal_length_run."
        )
    basis = f"By {pairs}."
    if comparison.primary == "equal_length":
        high, low = (len(rows.target) for rows in matched.rows)
        basis = (
            f"By the first {comparison.equal_length} target tokens of the {high} and {low} "
            f"responses that have them, {pairs}."
        )
    if len(matched.pairs) < FEWEST_PAIRS:
        return f"{basis} Fewer than {FEWEST_PAIRS} decide nothing."
    if comparison.cut and comparison.primary == "matched":
        basis += f" In {comparison.cut} pairs a row was cut at --max_length: by what was left."
    if matched.duplicates:
        basis += f" {matched.duplicates} rows equal others of their group and count once."
    if matched.shared:
        basis += f" {matched.shared} rows are in both groups."
    known = [effect.apart for effect in comparison.effects.values() if effect]
    for kind, *apart in zip(("Responses", "Prompts"), *known, strict=False):
        if (most := max(map(abs, apart))) > APART:
            basis += f" {kind} are too unlike in length: {most:.1f} standard deviations apart."
    return basis


def _balance(matched: Matched, of_all: str, of_pairs: str) -> pd.DataFrame:
    """Geometric means and standardised differences of log tokens, under these names."""
    sides = zip(matched.units, matched.rows, strict=True)
    logs = [units.means(rows.logs) for units, rows in sides]
    # The same spread before and after matching, so that the two can be compared.
    spread = np.sqrt(sum(side.var(axis=0) for side in logs) / 2)
    paired = logs[0][matched.pairs[:, 0]], logs[1][matched.pairs[:, 1]]
    found = []
    for which, (ours, theirs) in ((of_all, logs), (of_pairs, paired)):
        for column, kind in enumerate(("target", "prompt")):
            if len(ours):
                means = ours[:, column].mean(), theirs[:, column].mean()
                varies = spread[column] > ROUNDING
                apart = (means[0] - means[1]) / spread[column] if varies else 0.0
                found.append((which, kind, *np.exp(means), apart))
    return pd.DataFrame(found, columns=["rows", "tokens", "high", "low", "difference"])


def _cut(matched: Matched, sides: Sides) -> int:
    cut = [
        units.means(side[["truncated"]].to_numpy(float))[matched.pairs[:, number], 0] > 0
        for number, (units, side) in enumerate(zip(matched.units, sides, strict=True))
    ]
    return int((cut[0] | cut[1]).sum())


@dataclasses.dataclass(frozen=True)
class _Compared:
    """Pairs of a run's rows, and the effects among them."""

    sides: Sides
    values: pd.DataFrame  # as `example_values`
    matched: Matched
    effects: Effects


def _compared(run: RunValues, high: str, low: str) -> _Compared:
    sides, values = (run.rows(high), run.rows(low)), example_values(run)
    matched = match(*map(_rows, sides))
    return _Compared(sides, values, matched, _effects(matched, values, sides))


def _effects(matched: Matched, values: pd.DataFrame, sides: Sides) -> Effects:
    names = [(str(statistic), str(part)) for statistic, part in values.columns]
    return {name: matched_effect(matched, *_both(values[name], sides)) for name in names}


def _loss_effects(of: _Compared) -> Effects:
    """The effects among pairs that are alike in loss as well."""
    matched = match(*(_rows(side, loss=True) for side in of.sides))
    return _effects(matched, of.values.drop(columns="loss", level=0), of.sides)


def _table(whole: _Compared, alone: _Compared | None, deciding: _Compared) -> list[dict[str, Any]]:
    """The rows of a comparison's table, without verdicts."""
    logs = [rows.logs for rows in whole.matched.rows]
    pairs = {
        "matched_pairs": len(whole.matched.pairs),
        "clusters_high": len(deciding.matched.units[0].clusters),
        "clusters_low": len(deciding.matched.units[1].clusters),
        "duplicates": deciding.matched.duplicates,
        "paired": deciding.matched.paired,
    }
    table = []
    for name, effect in whole.effects.items():
        ours, theirs = _both(whole.values[name], whole.sides)
        table.append(
            {
                "statistic": name[0],
                "projection": name[1],
                **difference(ours, theirs),
                **pairs,
                **_shown("matched", effect),
                **_shown("equal_length", alone.effects.get(name) if alone else None),
                **ratio_columns(deciding.effects.get(name)),
                "rank_effect": _rank_effect(ours, theirs, *logs),
            }
        )
    return table


def _require_same_rows(run: RunValues, equal_length: RunValues, groups: tuple[str, str]) -> None:
    if equal_length.target_tokens is None:
        raise GradjaxError(
            f"--equal_length_run={equal_length.directory}: it was not run with --target_tokens=N"
        )
    if unlike := _unlike(run, equal_length, groups):
        raise GradjaxError(
            f"--equal_length_run={equal_length.directory} differs from {run.directory} in "
            f"{', '.join(unlike)}; give a run of the same command with --target_tokens=N"
        )


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


def _rows(side: pd.DataFrame, *, loss: bool = False) -> Rows:
    target = side["num_target_tokens"].to_numpy()
    also = np.log(side[["loss"]].to_numpy(float).clip(_LEAST_LOSS)) if loss else None
    return Rows(
        target,
        side["num_tokens"].to_numpy() - target,
        side["cluster"].to_numpy(),
        side["text"].to_numpy(),
        also,
    )


def _both(column: pd.Series, sides: Sides) -> tuple[np.ndarray, np.ndarray]:
    """The sides' numbers of one statistic and projection."""
    high, low = (
        column.reindex(pd.MultiIndex.from_frame(rows[KEY])).to_numpy(float) for rows in sides
    )
    return high, low


def ratio_columns(effect: Effect | None) -> dict[str, float]:
    """High over low with its interval; nothing where the pairs say nothing."""
    if effect is None or not effect.balanced:
        return {}
    logs = [effect.log_ratio, *effect.log_interval]
    return dict(zip(RATIO, np.exp(logs).tolist(), strict=True))


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
