"""A store's numbers by example: what comparisons, tables and figures are made of."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gradjax.config import SpectraConfig
from gradjax.errors import GradjaxError, did_you_mean
from gradjax.storage.store import TABLES, read_manifest, read_shards, read_table
from gradjax.version import __version__

SPECTRAL = ("nuclear_norm", "effective_rank", "normalized_effective_rank")
ALL = "all"  # the mean of the projections
KEY = ["group", "example_id"]


@dataclasses.dataclass(frozen=True)
class RunValues:
    """One run's tables, of the layers asked for.

    `examples` has one row per input row, without texts. `matrices` has one per `ok` example,
    layer and projection: nuclear_norm, effective_rank and normalized_effective_rank, which is
    R / min(T, m, n) of a gradient m × n of T tokens. `similarity` is the store's.
    """

    directory: str | Path
    name: str  # the model's
    manifest: dict[str, Any]
    examples: pd.DataFrame
    matrices: pd.DataFrame
    similarity: pd.DataFrame

    @property
    def groups(self) -> list[str]:
        """In the order in which they were given."""
        return list(self.manifest["data"])

    @property
    def projections(self) -> list[str]:
        """Those that were measured."""
        return list(self.manifest["settings"]["projections"])

    @property
    def target_tokens(self) -> int | None:
        """What every response was cut to."""
        return self.manifest["settings"]["target_tokens"]

    def rows(self, group: str) -> pd.DataFrame:
        """The `ok` examples of a group.

        Raises:
          GradjaxError: if there is no such group, or none of its rows is `ok`.
        """
        if group not in self.groups:
            known, hint = ", ".join(self.groups), did_you_mean(group, self.groups)
            raise GradjaxError(f"{self.directory} has no group {group!r}; it has {known}{hint}")
        found = self.examples[self.examples["group"] == group]
        used = found[found["status"] == "ok"]
        if used.empty:
            counts = ", ".join(f"{n} {status}" for status, n in count_statuses(found).items())
            raise GradjaxError(
                f"{self.directory}: none of the {len(found)} rows of group {group!r} can be used "
                f"({counts}); see the reasons in examples/"
            )
        return used


def read_values(directory: str | Path, layers: str = "all") -> RunValues:
    """Reads a finished run.

    Raises:
      GradjaxError: if there is no run, if it is not finished, was written by another version of
        the store, or lacks some of the layers.
    """
    manifest = read_manifest(directory)
    _require_version(directory, manifest)
    if (missing := rows_to_come(directory)) != 0:
        raise GradjaxError(
            f"{directory} is not finished: {missing or 'some'} rows are missing; give the command "
            "that began it again, and it goes on"
        )
    settings = manifest["settings"]
    chosen = list(settings["layers"])
    if layers != "all":
        chosen = SpectraConfig(layers=layers).layer_numbers(chosen[-1] + 1)
        if absent := sorted(set(chosen) - set(settings["layers"])):
            raise GradjaxError(f"--layers={layers}: {directory} was run without layers {absent}")
    columns = ["group", "example_id", "status", "reason", "num_tokens", "num_target_tokens"]
    examples = read_table(directory, "examples", [*columns, "truncated", "loss"]).to_pandas()
    columns = [*KEY, "layer", "projection", "nuclear_norm", "effective_rank"]
    matrices = read_table(directory, "spectra", columns).to_pandas()
    matrices = matrices[matrices["layer"].isin(chosen)]
    tokens = matrices.merge(examples[[*KEY, "num_tokens"]], on=KEY, how="left")["num_tokens"]
    sides = {name: min(shape) for name, shape in manifest["gradient_shapes"].items()}
    most = np.minimum(tokens.to_numpy(), matrices["projection"].map(sides).to_numpy())
    matrices["normalized_effective_rank"] = matrices["effective_rank"] / most
    similarity = read_table(directory, "similarity").to_pandas()
    within = similarity["layer_a"].isin(chosen) & similarity["layer_b"].isin(chosen)
    name = manifest["model"]["name"]
    return RunValues(directory, name, manifest, examples, matrices, similarity[within])


def _require_version(directory: str | Path, manifest: dict[str, Any]) -> None:
    version = manifest.get("versions", {}).get("gradjax", "of an unknown version")
    if version.split(".")[:2] != __version__.split(".")[:2]:
        raise GradjaxError(
            f"{directory} was written by gradjax {version}, and this is {__version__}; "
            "report it with the version that wrote it, or run it anew with --overwrite"
        )


def example_values(run: RunValues) -> pd.DataFrame:
    """Each `ok` example's statistics: its means over layers, and `all`, their mean.

    Returns:
      A frame over (group, example_id) with columns (statistic, projection); null where no layer
      has a number.
    """
    means = run.matrices.groupby([*KEY, "projection"])[list(SPECTRAL)].mean()
    parts = {s: means[s].unstack("projection")[run.projections] for s in SPECTRAL}
    for part in parts.values():
        part[ALL] = part.mean(axis=1)
    loss = run.examples[run.examples["status"] == "ok"].set_index(KEY)["loss"]
    parts["loss"] = pd.DataFrame({ALL: loss})
    return pd.concat(parts, axis=1).sort_index()


def count_statuses(examples: pd.DataFrame) -> dict[str, int]:
    """How many rows have each status other than `ok`."""
    counts = examples.loc[examples["status"] != "ok", "status"].value_counts()
    return {str(status): int(count) for status, count in sorted(counts.items())}


_NUMBERS = {"nuclear_norm": "nuclear norm", "effective_rank": "effective rank"}


def group_means(directory: str | Path) -> pd.DataFrame:
    """Group by group: mean nuclear norm and effective rank of each projection, and mean loss.

    A number is the mean over `ok` examples per layer and projection, then over layers (the
    paper's tables). Rows without a number (a zero gradient has no effective rank) are left
    out of its mean. Columns are (measure, projection); `("rows", "used")` and
    `("rows", "not used")` count.
    """
    examples = read_table(directory, "examples", ["group", "status", "loss"]).to_pandas()
    where, numbers = ["group", "layer", "projection"], list(_NUMBERS)
    # Shard by shard: a million rows have a hundred million matrices.
    none = TABLES["spectra"].empty_table().select([*where, *numbers])
    shards = itertools.chain([none], read_shards(directory, "spectra", [*where, *numbers]))
    parts = [shard.to_pandas().groupby(where)[numbers].agg(["sum", "count"]) for shard in shards]
    totals = pd.concat(parts).groupby(level=where).sum()
    counts = totals.xs("count", axis="columns", level=1)
    by_layer = totals.xs("sum", axis="columns", level=1) / counts.where(counts > 0)
    means = by_layer.groupby(["group", "projection"]).mean().unstack("projection")
    manifest = read_manifest(directory)
    order = [(n, p) for n in _NUMBERS for p in manifest["settings"]["projections"]]
    groups = manifest["data"]  # in the order they were given
    columns = pd.MultiIndex.from_tuples(order, names=["measure", "part"])
    table = means.reindex(index=list(groups), columns=columns)
    table[("loss", "")] = examples.groupby("group")["loss"].mean()
    used = examples["status"] == "ok"
    table[("rows", "used")] = used.groupby(examples["group"]).sum()
    table[("rows", "not used")] = (~used).groupby(examples["group"]).sum()
    return table


def rows_to_come(directory: str | Path) -> int | None:
    """How many of a run's input rows it does not hold yet; None before all of them are read."""
    rows = [data["rows"] for data in read_manifest(directory)["data"].values()]
    if None in rows:
        return None
    return sum(rows) - read_table(directory, "examples", ["example_id"]).num_rows


def unused_rows(directory: str | Path) -> list[str]:
    """One line per group and status other than `ok`: how many rows have it."""
    examples = read_table(directory, "examples", ["group", "status"]).to_pandas()
    counts = examples[examples.status != "ok"].value_counts(sort=False).sort_index()
    return [f"{group}: {count} rows {status}" for (group, status), count in counts.items()]


def format_table(table: pd.DataFrame) -> str:
    """`group_means` for a terminal: two header lines, one line per group."""
    heads = [(_NUMBERS.get(measure) or str(measure), part) for measure, part in table.columns]
    cells = [
        [_format(value, measure) for value, (measure, _) in zip(row, table.columns, strict=True)]
        for row in table.itertuples(index=False)
    ]
    widths = [max(len(part), *(len(row[i]) for row in cells)) for i, (_, part) in enumerate(heads)]
    # A measure's name stands once, over the columns it covers, which it may widen.
    spans: list[tuple[str, list[int]]] = []
    for i, (measure, _) in enumerate(heads):
        if spans and spans[-1][0] == measure:
            spans[-1][1].append(i)
        else:
            spans.append((measure, [i]))
    for measure, span in spans:
        missing = len(measure) - sum(widths[i] for i in span) - 2 * (len(span) - 1)
        widths[span[-1]] += max(missing, 0)

    first = max(len("group"), *(len(str(group)) for group in table.index))
    top = "  ".join(
        measure.center(sum(widths[i] for i in span) + 2 * (len(span) - 1))
        for measure, span in spans
    )
    names = "  ".join(part.rjust(width) for (_, part), width in zip(heads, widths, strict=True))
    lines = [f"{'':{first}}  {top}".rstrip(), f"{'group':{first}}  {names}"]
    for group, row in zip(table.index, cells, strict=True):
        numbers = "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append(f"{group!s:{first}}  {numbers}")
    return "\n".join(lines)


def _format(value: float, measure: str) -> str:
    if pd.isna(value):
        return "–"
    if measure == "rows":
        return str(int(value))
    return f"{value:.4g}" if measure == "nuclear_norm" else f"{value:.2f}"
