"""Many runs as one table: a row per comparison, for `gradjax report --summary`."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from gradjax.report.compare import HEADLINE, Comparison, sentence


def summary_table(runs: Sequence[Path | str], comparisons: Sequence[Comparison]) -> pd.DataFrame:
    """What the sentence of each comparison says, as columns, and the sentence.

    Args:
      runs: the directory of each comparison's run.
      comparisons: `settled` together, so that a "yes" holds for all of them at once.
    """
    return pd.DataFrame([_row(run, one) for run, one in zip(runs, comparisons, strict=True)])


def _row(run: Path | str, one: Comparison) -> dict[str, object]:
    table = one.table.set_index(["statistic", "projection"])
    row: dict[str, object] = {"run": str(run), "comparison": one.name}
    for name in HEADLINE:
        of_statistic = table.loc[name]
        row[name[0]] = of_statistic["beyond_length"]
        for column in ("ratio", "ratio_ci_low", "ratio_ci_high", "beyond_loss"):
            row[f"{name[0]}_{column}"] = of_statistic[column]
    return row | {
        "n_high": of_statistic["n_high"],
        "n_low": of_statistic["n_low"],
        "length_auroc": one.length_auroc,
        "decided_by": one.primary,
        "equal_length": one.equal_length,
        "pairs": len(one.deciding.pairs),
        "verdict": sentence(one),
    }
