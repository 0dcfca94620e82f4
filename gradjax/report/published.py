"""The paper's own numbers (arXiv 2504.10766, tables 1 to 60) beside measured ones."""

from pathlib import Path

import pandas as pd

from gradjax.errors import GradjaxError

SOURCE = "arXiv 2504.10766"
_FOLDER = Path(__file__).parent / "published"
_KINDS = {"adjacent_layer": "cross_layer"}  # the store's name


def published(model: str, experiment: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The published spectra and similarities of a model on `DATASET/METRIC` or with `:TABLE`.

    The paper prints some experiments twice, with unlike rounding. The table that is asked for
    counts, and of the other kind, spectra or similarities, the nearest to it; else the first.

    Returns:
      Frames over (statistic, projection) and (kind, projection) with columns table, high, low,
      gap: as printed, and of similarities, which have none, high less low.

    Raises:
      GradjaxError: if the paper has no such experiment, or does not print it in that table.
    """
    name, _, table = experiment.partition(":")
    kinds = [_of(model, name, *kind) for kind in (("spectra", "statistic"), ("similarity", "kind"))]
    tables = sorted({number for kind in kinds for number in kind["table"]})
    if not tables:
        raise GradjaxError(
            f"--published={experiment}: {SOURCE} has no such table for {model}; it has "
            f"{_known(model)}"
        )
    if table and table not in map(str, tables):
        raise GradjaxError(
            f"--published={experiment}: {SOURCE} prints {name} of {model} in its tables "
            f"{', '.join(map(str, tables))}; give one of these, or none for the first"
        )
    spectra, similarity = (_nearest(kind, int(table or 0)) for kind in kinds)
    return spectra, similarity


def beside(measured: pd.DataFrame, paper: pd.DataFrame) -> pd.DataFrame:
    """A table of `tables.py` with the published columns, and measured less published numbers."""
    if paper.empty:
        return measured
    key = [str(name) for name in paper.index.names]
    joined = measured.join(paper.add_prefix("published_"), on=key)
    for name in ("high", "low", "gap"):
        joined[f"{name}_difference"] = joined[name] - joined[f"published_{name}"]
    return joined


def _of(model: str, experiment: str, name: str, key: str) -> pd.DataFrame:
    whole = published_table(name)
    chosen = whole[(whole["model"] == model) & (whole["experiment"] == experiment)]
    chosen = chosen.set_index([key, "projection"])
    if "gap" not in chosen:
        chosen = chosen.assign(gap=chosen["high"] - chosen["low"])
    return chosen[["table", "high", "low", "gap"]]


def _nearest(printed: pd.DataFrame, table: int) -> pd.DataFrame:
    apart = (printed["table"] - table).abs()
    return printed[apart == apart.min()]


def published_table(name: str) -> pd.DataFrame:
    """The paper's numbers, `spectra` or `similarity`: one row per cell of its tables."""
    whole = pd.read_csv(_FOLDER / f"{name}.csv").replace({"kind": _KINDS})
    return whole.assign(experiment=whole["dataset"] + "/" + whole["metric"])


def _known(model: str) -> str:
    whole = published_table("spectra")
    of_model = whole[whole["model"] == model]
    if of_model.empty:
        return f"{', '.join(sorted(whole['model'].unique()))} (the run's model is named {model})"
    return ", ".join(sorted(of_model["experiment"].unique()))
