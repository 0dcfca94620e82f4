"""What a finished run of `gradjax spectra` says of each row, for nothing."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.compute as pc

from gradjax.errors import GradjaxError
from gradjax.storage.results import (
    KEY,
    SPECTRAL,
    example_means,
    read_matrices,
    require_finished,
)
from gradjax.storage.store import read_shards, read_table
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
    manifest, chosen = require_finished(directory, layers)
    measured = manifest["settings"]["projections"]
    if absent := [name for name in projections if name not in measured]:
        raise GradjaxError(
            f"--projections={','.join(projections)}: {directory} was run without {absent[0]}; it "
            f"has {','.join(measured)}"
        )
    columns = ["row_hash", "status", "reason", "num_tokens", "num_target_tokens", "loss"]
    rows = read_table(directory, "examples", [*KEY, *columns]).to_pandas()
    with np.errstate(over="ignore"):
        rows["perplexity"] = np.exp(rows["loss"])
    shards = read_matrices(directory, chosen, _STATISTICS)
    means = pd.concat([example_means(matrices, (*SPECTRAL, *_STATISTICS)) for matrices in shards])
    means = means.loc[:, means.columns.get_level_values("projection").isin(projections)]
    ranks = means["effective_rank"].add_prefix("effective_rank_")
    averaged = means.T.groupby(level=0, sort=False).mean().T.rename(columns=_NAMES)
    parts = [averaged, ranks, _cosines(directory, chosen, projections)]
    for part in parts:
        rows = rows.join(part, on=KEY)
    return rows


def _cosines(
    directory: str | Path, layers: Sequence[int], projections: Sequence[str]
) -> pd.DataFrame:
    """Means of each row's cosines of some projections, by kind."""
    where = pc.field("layer_a").isin(list(layers)) & pc.field("layer_b").isin(list(layers))
    columns = [*KEY, "kind", "projection", "cosine"]
    none = pd.MultiIndex.from_arrays([[], []], names=KEY)
    parts = [pd.DataFrame(index=none, columns=[*_COSINES], dtype=float)]
    for (shard,) in read_shards(directory, {"similarity": columns}, where):
        cosines = shard.to_pandas()
        pairs = cosines["projection"].str.split("-")  # q-o, or a projection alone
        cosines = cosines[[set(pair) <= set(projections) for pair in pairs]]
        parts.append(cosines.groupby([*KEY, "kind"])["cosine"].mean().unstack("kind"))
    return pd.concat(parts).reindex(columns=list(_COSINES)).rename(columns=_COSINES)
