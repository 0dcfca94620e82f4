"""Many runs as one table: a row per comparison, for `gradjax report --summary`."""

from collections.abc import Hashable, Sequence
from pathlib import Path

import pandas as pd

from gradjax.report.compare import HEADLINE, Comparison, sentence
from gradjax.storage.results import ALL

_COLUMNS = ("ratio", "ratio_ci_low", "ratio_ci_high", "beyond_loss")


def summary_table(runs: Sequence[Path | str], comparisons: Sequence[Comparison]) -> pd.DataFrame:
    """What the sentence of each comparison says, as columns, and the sentence.

    Args:
      runs: the directory of each comparison's run.
      comparisons: `settled` together, so that a "yes" holds for all of them at once.
    """
    return pd.DataFrame([_row(run, one) for run, one in zip(runs, comparisons, strict=True)])


def _row(run: Path | str, one: Comparison) -> dict[Hashable, object]:
    whole = one.table[one.table["projection"] == ALL].to_dict("records")
    found: dict[Hashable, object] = {"run": str(run), "comparison": one.name}
    for row in (row for row in whole if (row["statistic"], ALL) in HEADLINE):
        name = row["statistic"]
        found[name] = row["beyond_length"]
        found |= {f"{name}_{column}": row[column] for column in _COLUMNS}
    return found | {
        "length_auroc": one.length_auroc,
        "decided_by": one.primary,
        "equal_length": one.equal_length,
        "pairs": len(one.deciding.pairs),
        "verdict": sentence(one),
    }
