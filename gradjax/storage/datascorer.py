"""A run in the row format of ODA-DataScorer's EffectiveRankScorer and NuclearNormScorer."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.compute as pc

from gradjax.errors import GradjaxError
from gradjax.storage.filesystem import write_json_lines
from gradjax.storage.results import KEY, example_means
from gradjax.storage.store import read_shards, require_group

SCORERS = {"effective_rank": "EffectiveRank", "nuclear_norm": "NuclearNorm"}


def datascorer_rows(directory: str | Path, group: str, statistic: str) -> Iterator[dict[str, Any]]:
    """One object per row of a group, in the order of the source.

    `id` is the row's number, from 0; `Q_EffectiveRank` and its like are means over the run's layers
    (ODA-DataScorer takes the last layer alone by default), null where a row has no number.

    Args:
      statistic: `effective_rank` or `nuclear_norm`.

    Raises:
      GradjaxError: if there is no such run or group, or not all of its rows are read yet.
    """
    manifest = require_group(directory, group)
    rows = manifest["data"][group]["rows"]
    if rows is None:
        raise GradjaxError(
            f"{directory} is not finished: group {group} was not read to its end; give the "
            "command that began it again, and it goes on"
        )
    columns = [*KEY, "projection", statistic]
    parts = [
        pd.DataFrame(example_means(shard.to_pandas(), [statistic])[statistic]).droplevel("group")
        for (shard,) in read_shards(directory, {"spectra": columns}, pc.field("group") == group)
        if shard.num_rows
    ]
    projections = manifest["settings"]["projections"]
    means = pd.concat(parts) if parts else pd.DataFrame()
    means = means.reindex(index=range(rows), columns=projections)
    names = [f"{projection.upper()}_{SCORERS[statistic]}" for projection in projections]
    for number, values in zip(means.index, means.to_numpy().tolist(), strict=True):
        known = (None if pd.isna(value) else value for value in values)
        yield {"id": number, **dict(zip(names, known, strict=True))}


def export(directory: str | Path, group: str, output: Path, statistic: str) -> int:
    """Writes `datascorer_rows` as JSON lines, the whole file or none; returns their number.

    Raises:
      GradjaxError: as `datascorer_rows`, or if the file cannot be written.
    """
    return write_json_lines(datascorer_rows(directory, group, statistic), output)
