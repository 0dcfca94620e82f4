"""Layer by layer: by what factor a statistic is larger in one group at equal length."""

from collections.abc import Collection, Sequence

import numpy as np
import pandas as pd

from gradjax.report.compare import HEADLINE, RATIO, Comparison, holm, ratio_columns
from gradjax.report.length import matched_effect
from gradjax.storage.results import KEY, RunValues, example_means, read_matrices

STATISTICS = [statistic for statistic, _ in HEADLINE]


def layer_effects(comparisons: Sequence[Comparison]) -> list[pd.DataFrame]:
    """The effects among the pairs that decide, of each example's mean over projections.

    The store of a run is read once for all comparisons that it decides.

    Returns:
      Of each comparison, columns comparison, statistic, layer, ratio, ratio_ci_low, ratio_ci_high
      (99 %, of one layer) and beyond_length, adjusted over the layers of a statistic (Holm).

    Raises:
      GradjaxError: if a shard of a run cannot be read.
    """
    decided = [id(one.deciding_run) for one in comparisons]
    found: dict[int, pd.DataFrame] = {}
    for run in dict.fromkeys(decided):
        own = [number for number, of in enumerate(decided) if of == run]
        groups = {
            side for number in own for side in (comparisons[number].high, comparisons[number].low)
        }
        values = _values(comparisons[own[0]].deciding_run, groups)
        found |= {number: _effects(comparisons[number], values) for number in own}
    return [found[number] for number in range(len(comparisons))]


def _effects(comparison: Comparison, values: pd.DataFrame) -> pd.DataFrame:
    run = comparison.deciding_run
    sides = [
        values.reindex(pd.MultiIndex.from_frame(run.rows(group)[KEY]))
        for group in (comparison.high, comparison.low)
    ]
    found = []
    for statistic in STATISTICS:
        effects = {
            layer: matched_effect(
                comparison.deciding, *(side[statistic, layer].to_numpy(float) for side in sides)
            )
            for layer in run.layers
        }
        known = {layer: effect for layer, effect in effects.items() if effect and effect.balanced}
        adjusted = dict(zip(known, holm([effect.p for effect in known.values()]), strict=True))
        for layer, effect in effects.items():
            verdict = "undecided"
            if layer in known:
                verdict = known[layer].verdict(comparison.negligible, adjusted[layer])
            row = {"statistic": statistic, "layer": layer, "beyond_length": verdict}
            found.append(row | ratio_columns(effect))
    columns = ["comparison", "statistic", "layer", *RATIO, "beyond_length"]
    return pd.DataFrame(found).assign(comparison=comparison.name).reindex(columns=columns)


def _values(run: RunValues, groups: Collection[str]) -> pd.DataFrame:
    """Means over projections of the groups' examples; columns (statistic, layer)."""
    parts = []
    for matrices in read_matrices(run.directory, run.layers):
        chosen = matrices[matrices["group"].isin(groups)]
        if len(chosen):
            parts.append(example_means(chosen, STATISTICS, by="layer").astype(np.float32))
    return pd.concat(parts)
