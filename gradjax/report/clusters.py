"""Which rows belong together, where a column of the data says so."""

import dataclasses

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from gradjax.data.examples import to_example
from gradjax.data.sources import Source, stream_rows
from gradjax.data.usable import Tally
from gradjax.errors import GradjaxError, did_you_mean
from gradjax.storage.results import KEY, RunValues


def with_clusters(run: RunValues, pair_by: str | None, cluster_by: str | None) -> RunValues:
    """The run with `cluster` by columns of its data instead of by prompt.

    Rows that have the same value of `pair_by` or of `cluster_by` are of one cluster, and so are all
    that are linked by such rows; the prompt stands for the one that is None.

    Raises:
      GradjaxError: if the data are not there any more, are other rows, or lack a column.
    """
    columns = [column for column in dict.fromkeys([pair_by, cluster_by]) if column]
    if not columns:
        return run
    found = pd.concat([_columns(run, group, columns) for group in run.groups])
    found = run.examples[[*KEY, "cluster"]].merge(found, on=KEY, how="left")
    kept = columns if pair_by and cluster_by else [*columns, "cluster"]
    clusters = _linked(found[kept]).astype(np.uint64)
    return dataclasses.replace(run, examples=run.examples.assign(cluster=clusters))


def _columns(run: RunValues, group: str, columns: list[str]) -> pd.DataFrame:
    """The columns of a group's source, over `KEY`; null where a row has none."""
    said = run.manifest["data"][group]
    source = Source.of_manifest(group, said)
    tally = Tally(source)
    values: dict[str, list[str | None]] = {column: [] for column in columns}
    names: list[str] = []
    for number, row in enumerate(stream_rows(source, said["rows"])):
        tally.read(to_example(row, group, number, source.reading))
        fields = row if isinstance(row, dict) else {}
        names = names or [str(name) for name in fields]
        for column, of_rows in values.items():
            value = fields.get(column)
            of_rows.append(None if value is None or value != value else str(value))
    if tally.describe()["hash"] != said["hash"]:
        raise GradjaxError(
            f"{said['source']} has other rows than those of group {group} in {run.directory}; "
            "--pair_by and --cluster_by need the rows that were measured"
        )
    for column, of_rows in values.items():
        if all(value is None for value in of_rows):
            raise GradjaxError(
                f"{said['source']} has no column {column!r}; it has {', '.join(names)}"
                f"{did_you_mean(column, names)}"
            )
    keys = {"group": group, "example_id": np.arange(tally.rows)}
    return pd.DataFrame(keys | values)


def _linked(keys: pd.DataFrame) -> np.ndarray:
    """Numbers of the components of rows that share a value in some column."""
    rows, nodes, first = [], [], len(keys)
    for _, column in keys.items():
        codes, values = pd.factorize(column)  # null: -1
        known = codes >= 0
        rows.append(np.flatnonzero(known))
        nodes.append(first + codes[known])
        first += len(values)
    ends = np.concatenate(rows), np.concatenate(nodes)
    links = coo_array((np.ones(len(ends[0]), bool), ends), shape=(first, first))
    return connected_components(links, directed=False)[1][: len(keys)]
