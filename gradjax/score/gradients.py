"""What a finished run of `gradjax spectra` says of each row, for nothing."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from gradjax.errors import GradjaxError
from gradjax.storage.results import KEY, SPECTRAL, read_values
from gradjax.storage.store import read_table
from gradjax.structs import ATTENTION

_STATISTICS = ("frobenius_norm", "spectral_norm", "mean", "max", "min")
_NAMES = {name: f"entry_{name}" for name in ("mean", "max", "min")}  # of a gradient's entries
_COSINES = {"same_layer": "same_layer_cosine", "cross_layer": "cross_layer_cosine"}


def run_scores(
    directory: str | Path, layers: str = "all", projections: Sequence[str] = ATTENTION
) -> pd.DataFrame:
    """A run's numbers, one row per input row.

    Args:
      directory: of `gradjax spectra`, a path or a URL.
      layers: `all`, or numbers and ranges from 0, over which gradient statistics are averaged.
      projections: over which they are averaged after that.

    Returns:
      Columns group, example_id, row_hash, status, reason, num_tokens, num_target_tokens, loss,
      perplexity, and nuclear_norm, effective_rank, normalized_effective_rank (R / min(T, m, n)),
      frobenius_norm, spectral_norm, entry_mean, entry_max, entry_min, same_layer_cosine and
      cross_layer_cosine; effective_rank_q and its like are of one projection. NaN where there is
      no number.

    Raises:
      GradjaxError: if there is no such run, it is not finished, or lacks some of the layers or
        projections.
    """
    run = read_values(directory, layers)
    if absent := [name for name in projections if name not in run.projections]:
        raise GradjaxError(
            f"--projections={','.join(projections)}: {directory} was run without {absent[0]}; it "
            f"has {','.join(run.projections)}"
        )
    columns = ["row_hash", "status", "reason", "num_tokens", "num_target_tokens", "loss"]
    rows = read_table(directory, "examples", [*KEY, *columns]).to_pandas()
    with np.errstate(over="ignore"):
        rows["perplexity"] = np.exp(rows["loss"])
    where = [*KEY, "layer", "projection"]
    others = read_table(directory, "spectra", [*where, *_STATISTICS]).to_pandas()
    matrices = run.matrices.merge(others.rename(columns=_NAMES), on=where)
    matrices = matrices[matrices["projection"].isin(projections)]
    names = [*SPECTRAL, *(_NAMES.get(name, name) for name in _STATISTICS)]
    by_projection = matrices.groupby([*KEY, "projection"])[names].mean()
    ranks = by_projection["effective_rank"].unstack("projection").add_prefix("effective_rank_")
    pairs = run.similarity["projection"].str.split("-")  # q-o, or a projection alone
    chosen = run.similarity[[set(pair) <= set(projections) for pair in pairs]]
    cosines = chosen.groupby([*KEY, "kind"])["cosine"].mean().unstack("kind")
    cosines = cosines.reindex(columns=list(_COSINES)).rename(columns=_COSINES)
    parts = [by_projection.groupby(KEY).mean(), ranks, cosines]
    for part in parts:
        rows = rows.join(part, on=KEY)
    return rows
