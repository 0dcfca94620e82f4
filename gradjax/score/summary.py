"""What a scoring ends with: each group's distribution of each metric, and what is missing."""

from pathlib import Path

import pandas as pd

from gradjax.score.run import read_scores, read_tags, read_unanswered
from gradjax.storage.results import KEY

_QUARTILES = ("min", "25 %", "median", "75 %", "max")
_MOST = 12  # kinds of reasons shown
_KEYS = [*KEY, "row_hash", "status", "reason"]
# What helps rows without an answer of the judge, by why they have none.
_REMEDIES = {
    "no answer": "the same command asks for them again",
    "no usable answer": "the same command asks for them again",
    "not asked": "the same command goes on, with its --judge_budget anew",
    "given up": "what is given up is asked again only with a larger --judge_max_tokens, or with "
    "another --judge_model or --judge_prompt in another --output_dir",
}


def format_scores(directory: str | Path) -> str:
    """For a terminal: rows with a number, without one, and quartiles; then why rows have none."""
    table = read_scores(directory)
    rows = []
    for group, part in table.groupby("group", sort=False):
        for name in table.columns.drop(_KEYS):
            known = part[name].dropna().astype(float)
            row = {"group": group, "metric": name, "rows": len(known)}
            row |= {"missing": len(part) - len(known), "distinct": known.nunique()}
            quartiles = known.quantile([0, 0.25, 0.5, 0.75, 1])
            rows.append(row | dict(zip(_QUARTILES, quartiles, strict=True)))
    text = pd.DataFrame(rows).to_string(index=False, float_format="{:.4g}".format)
    missing = table.loc[table["reason"].notna(), ["group", "status", "reason"]]
    counts = missing.value_counts().head(_MOST).reset_index().to_dict("records")
    lines = [f"{g}: {n} different tags" for g, n in read_tags(directory).items()]
    lines += [f"{r['group']}: {r['count']} rows {r['status']}: {r['reason']}" for r in counts]
    return "\n".join([text, *lines])


def missing_answers(directory: str | Path) -> str:
    """One sentence on rows without an answer of the judge: how many, why, what to do; or none."""
    counts = {name: of for name, of in read_unanswered(directory).items() if of}
    if not counts:
        return ""
    rows = "; ".join(
        f"{name}: {sum(of.values())} rows have no answer of the judge "
        f"({', '.join(f'{count} {why}' for why, count in of.items())})"
        for name, of in counts.items()
    )
    found = {why for of in counts.values() for why in of}
    remedies = dict.fromkeys(remedy for why, remedy in _REMEDIES.items() if why in found)
    return f"{rows}: {'; '.join(remedies)}"
