"""The paper's tables: spectra and similarities of two groups and their gap."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from gradjax.storage.results import ALL, RunValues, example_values

SPECTRA = {"nuclear_norm": "Nuclear norm", "effective_rank": "Effective rank"}
_ORDER = ("k", "q", "v", "o", "gate", "up", "down")  # attention's as in the paper's tables
_SIMILARITIES = [
    *(("same_layer", pair) for pair in ("k-v", "q-o")),
    *(("cross_layer", projection) for projection in _ORDER),
]
Pairs = Sequence[tuple[str, str]]


def spectra_table(run: RunValues, pairs: Pairs, by: str = "projection") -> pd.DataFrame:
    """Nuclear norm and effective rank of every projection: high, low and their gap.

    A number is the mean over `ok` examples per layer and projection, then over layers (paper,
    tables 1 to 3).

    Args:
      by: `projection`; `layer` for a row per layer and projection; `example` for every example
        of the groups with its means over layers.

    Returns:
      Columns comparison, statistic, (layer,) projection, high, low, gap; by example: group,
      example_id and one column per statistic and projection.
    """
    if by == "example":
        groups = {group for pair in pairs for group in pair}
        values = example_values(run)[list(SPECTRA)].drop(columns=ALL, level=1)
        values.columns = [f"{statistic}_{projection}" for statistic, projection in values.columns]
        return values[values.index.isin(groups, level="group")].reset_index()
    means = pd.DataFrame({statistic: run.by_layer[statistic, "mean"] for statistic in SPECTRA})
    means = means.reorder_levels(["group", "layer", "projection"])
    order = [projection for projection in _ORDER if projection in run.projections]
    if by == "layer":
        layers = run.layers
        keys = itertools.product(SPECTRA, layers, order)
        levels = ["group", "layer", "projection"]
    else:
        means = means.groupby(["group", "projection"]).mean()
        keys = itertools.product(SPECTRA, order)
        levels = ["group", "projection"]
    long = means.reset_index().melt(levels, var_name="statistic", value_name="mean")
    series = long.set_index(["group", "statistic", *levels[1:]])["mean"]
    return _gaps(series, pairs, keys)


def similarity_table(run: RunValues, pairs: Pairs) -> pd.DataFrame:
    """Cosines of k and v, q and o in a layer, and of adjacent layers: high, low and their gap.

    A number is the mean over `ok` examples per pair of layers, then over pairs (paper, eqs. 3
    and 4).

    Returns:
      Columns comparison, kind, projection, high, low, gap.
    """
    cosines = run.cosines
    layer_a, layer_b = (cosines.index.get_level_values(name) for name in ("layer_a", "layer_b"))
    within = cosines.index.get_level_values("kind") == "same_layer"
    chosen = cosines[within | (layer_b == layer_a + 1)]
    means = chosen.groupby(level=["group", "kind", "projection"]).mean()
    there = set(means.index.droplevel("group"))
    return _gaps(means, pairs, [key for key in _SIMILARITIES if key in there])


def save(table: pd.DataFrame, path: Path) -> None:
    """Writes PATH.csv in full precision, PATH.md and PATH.tex with four digits."""
    table.to_csv(path.with_name(f"{path.name}.csv"), index=False)
    markdown = table.to_markdown(index=False, floatfmt=".4g", missingval="–")
    path.with_name(f"{path.name}.md").write_text(f"{markdown}\n", encoding="utf-8")
    latex = table.style.hide(axis="index").format(escape="latex", precision=4, na_rep="--")
    latex = latex.format("{:.4g}", subset=table.select_dtypes("float").columns, na_rep="--")
    latex = latex.format_index(escape="latex", axis="columns").to_latex(hrules=True)
    path.with_name(f"{path.name}.tex").write_text(latex, encoding="utf-8")


def _gaps(means: pd.Series, pairs: Pairs, keys: Iterable[tuple]) -> pd.DataFrame:
    """Per pair and key, high, low and gap of a series over (group, *key)."""
    keys = list(keys)
    rows = []
    for high, low in pairs:
        for key in keys:
            ours, theirs = (means.get((group, *key), float("nan")) for group in (high, low))
            rows.append((f"{high}:{low}", *key, ours, theirs, ours - theirs))
    return pd.DataFrame(rows, columns=["comparison", *means.index.names[1:], "high", "low", "gap"])
