"""What a selection is like: its cutoffs, distributions, overlap with others, balance of lengths."""

from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from gradjax.report.ranks import auroc
from gradjax.select.choose import HIGH, LOW, Choice, ascend, rank_values
from gradjax.select.rule import MATCHING, Rule, Term
from gradjax.select.sources import Scored

_QUANTILES = {"min": 0, "q1": 0.25, "median": 0.5, "q3": 0.75, "max": 1}


def summarize(scored: Scored, choice: Choice, rule: Rule) -> dict[str, Any]:
    """What `summary.json` says, in values that JSON has; None where there is no number."""
    return {
        "rows": len(scored.keys),
        "usable": int(np.isfinite(choice.value).sum()),
        "parts": parts(scored, choice),
        "cutoffs": [{"of": name, **asdict(c)} for name, c in choice.cutoffs.items()],
        "rejected": rejected(choice),
        "distributions": distributions(scored.metrics),
        "overlap": overlap(scored, choice, rule),
        "length_auroc": length_auroc(scored, choice),
        "pairs": len(choice.parts[HIGH]) if rule.match_length else None,
    }


def parts(scored: Scored, choice: Choice) -> list[dict[str, Any]]:
    """Rows of each part, also by group, how many equal an earlier one of it, and their length."""
    found = []
    for name, rows in choice.parts.items():
        lengths = _lengths(scored, rows)
        groups = scored.keys["group"].iloc[rows].value_counts(sort=False).sort_index()
        mean = float(np.exp(np.log(lengths).mean())) if len(lengths) else None
        found.append(
            {
                "part": name,
                "rows": len(rows),
                "duplicates": int(scored.keys["row_hash"].iloc[rows].duplicated().sum()),
                "geometric_mean_characters": mean,
                "groups": {str(group): int(count) for group, count in groups.items()},
            }
        )
    return found


def rejected(choice: Choice) -> list[dict[str, Any]]:
    """How many rows were left out for each reason, the commonest first."""
    why = pd.Series(choice.why[choice.why != ""], dtype=object)
    counts = sorted(why.value_counts().items(), key=lambda item: (-item[1], item[0]))
    return [{"reason": reason, "rows": int(count)} for reason, count in counts]


def distributions(metrics: pd.DataFrame) -> list[dict[str, Any]]:
    """Each metric over all rows: how many have a finite number, how many not, and quartiles."""
    found = []
    for name in metrics:
        column = metrics[name].to_numpy(float)
        column = column[np.isfinite(column)]
        row = {"metric": name, "rows": len(column), "null": len(metrics) - len(column)}
        points = np.quantile(column, list(_QUANTILES.values())).tolist() if len(column) else []
        found.append(row | dict(zip(_QUANTILES, points or [None] * len(_QUANTILES), strict=True)))
    return found


def overlap(scored: Scored, choice: Choice, rule: Rule) -> list[dict[str, Any]]:
    """Rows that as many of the highest (lowest) by another metric alone have in common with this.

    `by_chance` is how many independent draws would share, each of the rows that it may choose from.
    """
    found = []
    same = {term.metric for term in rule.by if len(rule.by) == 1 and term.weight > 0}
    names = [str(name) for name in scored.metrics if name not in same]
    for name in names if HIGH in choice.parts or LOW in choice.parts else []:
        _, value = rank_values(scored.keys["status"], scored.metrics, [Term(name, 1.0)])
        candidates = np.isfinite(value)
        ascending = ascend(value, candidates, rule.seed)
        both = int((candidates & choice.candidates).sum())
        pairs = max(len(ascending), 1) * int(choice.candidates.sum())
        row: dict[str, Any] = {"metric": name}
        for part in (HIGH, LOW):
            if part not in choice.parts:
                continue
            ours = choice.parts[part]
            theirs = ascending[-len(ours) :] if part == HIGH else ascending[: len(ours)]
            common = len(np.intersect1d(ours, theirs))
            row[f"{part}_common"] = common
            row[f"{part}_jaccard"] = common / (len(ours) + len(theirs) - common)
            row[f"{part}_by_chance"] = len(ours) * len(theirs) * both / pairs
        found.append(row)
    return found


def length_auroc(scored: Scored, choice: Choice) -> float | None:
    """P(a high row is longer than a low one), ties counted half."""
    high, low = (_lengths(scored, choice.parts.get(part, [])) for part in (HIGH, LOW))
    return auroc(high, low) if len(high) and len(low) else None


def format_summary(summary: dict[str, Any], by: str) -> str:
    """The summary for a terminal."""
    said = [f"{summary['usable']} of {summary['rows']} rows can be ranked by {by}"]
    for row in summary["rejected"]:
        if " is outside " in row["reason"]:  # easily most rows of a weak model's perplexities
            said[0] += f"; of {row['rows']} {row['reason']}, the paper's bounds"
    tables = [("Selected", pd.DataFrame(summary["parts"]).drop(columns="groups"))]
    tables += [
        (title, pd.DataFrame(summary[name]))
        for title, name in (
            ("Cutoffs, and how many of the rows with that value were taken", "cutoffs"),
            ("Left out", "rejected"),
            ("Metrics, over all rows", "distributions"),
            ("Rows in common with as many by another metric", "overlap"),
        )
    ]
    for title, table in tables:
        if len(table):
            text = table.to_string(index=False, na_rep="-", float_format=lambda x: f"{x:.4g}")
            said.append(f"{title}\n{text}")
    if summary["length_auroc"] is not None:
        said.append(
            f"AUROC of characters, high against low: {summary['length_auroc']:.3f} "
            "(0.5: no difference in length)"
        )
    if summary["pairs"] is not None:
        said.append(f"Matched on length, {summary['pairs']} {' '.join(MATCHING.split())}.")
    return "\n\n".join(said)


def _lengths(scored: Scored, rows: Any) -> np.ndarray:
    """Lengths of rows, where they are known."""
    lengths = scored.keys["length"].to_numpy(float)[np.asarray(rows, int)]
    return lengths[lengths > 0]
