"""Many runs as one table: a row per comparison, for `gradjax report --summary`."""

from collections.abc import Hashable, Sequence

import pandas as pd

from gradjax.report.compare import RATIO, Comparison, answers, sentence


def summary_table(comparisons: Sequence[Comparison]) -> pd.DataFrame:
    """What the sentence of each comparison says, as columns, and the sentence.

    Args:
      comparisons: `settled` together, so that a "yes" holds for all of them at once.
    """
    return pd.DataFrame([_row(one) for one in comparisons])


def _row(one: Comparison) -> dict[Hashable, object]:
    found: dict[Hashable, object] = {"run": str(one.run.directory), "comparison": one.name}
    for row in answers(one).to_dict("records"):
        name = row["statistic"]
        found[name] = row["answer"]
        found |= {f"{name}_{column}": row[column] for column in [*RATIO, "beyond_loss"]}
    return found | {
        "length_auroc": one.length_auroc,
        "decided_by": one.primary,
        "equal_length": one.equal_length,
        "pairs": len(one.deciding.pairs),
        "verdict": sentence(one),
    }
