"""A store's numbers by example: what comparisons, tables and figures are made of."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.compute as pc

from gradjax.config import SpectraConfig
from gradjax.errors import GradjaxError, did_you_mean
from gradjax.storage.store import TABLES, read_manifest, read_shards, read_table
from gradjax.version import __version__

SPECTRAL = ("nuclear_norm", "effective_rank", "normalized_effective_rank")
ALL = "all"  # the mean of the projections
KEY = ["group", "example_id"]


@dataclasses.dataclass(frozen=True)
class RunValues:
    """One run's numbers, of the layers asked for.

    `examples` has one row per input row, with hashes of its texts. The others are of `ok` examples,
    and of the statistics nuclear_norm, effective_rank and normalized_effective_rank, which is
    R / min(T, m, n) of a gradient m × n of T tokens. What has no number is left out of a mean.
    """

    directory: str | Path
    name: str  # the model's
    manifest: dict[str, Any]
    layers: list[int]  # ascending
    examples: pd.DataFrame
    by_example: pd.DataFrame  # over `KEY`, columns (statistic, projection): means over layers
    by_layer: pd.DataFrame  # over group, projection, layer; (statistic, count | mean | sem)
    cosines: pd.Series  # means over group, kind, projection, layer_a, layer_b

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
      GradjaxError: as `require_finished`.
    """
    manifest, chosen = require_finished(directory, layers)
    columns = ["group", "example_id", "status", "reason", "num_tokens", "num_target_tokens"]
    examples = read_table(directory, "examples", [*columns, "truncated", "loss"]).to_pandas()
    examples = examples.merge(_hashes(directory), on=KEY, validate="1:1")
    by_example, by_layer = summed_up(read_matrices(directory, chosen))
    name = manifest["model"]["name"]
    cosines = _mean_cosines(directory, chosen)
    return RunValues(directory, name, manifest, chosen, examples, by_example, by_layer, cosines)


def _hashes(directory: str | Path) -> pd.DataFrame:
    """`text_hashes` of each row, over `KEY`."""
    parts = []
    for (shard,) in read_shards(directory, {"examples": [*KEY, "instruction", "output"]}):
        rows = shard.to_pandas()
        parts.append(rows[KEY].join(text_hashes(rows["instruction"], rows["output"])))
    return pd.concat(parts) if parts else pd.DataFrame(columns=[*KEY, "cluster", "text"])


def text_hashes(prompts: pd.Series, outputs: pd.Series) -> pd.DataFrame:
    """`cluster` and `text` of each row, uint64: equal where the prompts, where the rows are.

    A row without a prompt is of no cluster but its own.
    """
    of_prompt, of_row = (
        pd.util.hash_array(texts.to_numpy(object), categorize=False)
        for texts in (prompts, prompts + "\0" + outputs)
    )
    clusters = np.where(prompts == "", of_row, of_prompt)
    return pd.DataFrame({"cluster": clusters, "text": of_row}, index=prompts.index)


def read_matrices(
    directory: str | Path, layers: Sequence[int], also: Sequence[str] = ()
) -> Iterator[pd.DataFrame]:
    """A row per `ok` example, layer and projection, shard by shard: whole examples.

    A million rows have a hundred million of them.

    Args:
      also: further columns of `spectra`, beside those that `normalized_effective_rank` needs.
    """
    manifest = read_manifest(directory)
    sides = {name: min(shape) for name, shape in manifest["gradient_shapes"].items()}
    columns = [*KEY, "layer", "projection", "nuclear_norm", "effective_rank", *also]
    tables = {"spectra": columns, "examples": [*KEY, "num_tokens"]}
    none = tuple(TABLES[name].empty_table().select(of) for name, of in tables.items())
    for shard, rows in itertools.chain([none], read_shards(directory, tables)):
        matrices = shard.to_pandas()
        matrices = matrices[matrices["layer"].isin(layers)].reset_index(drop=True)
        tokens = matrices.merge(rows.to_pandas(), on=KEY, how="left")["num_tokens"]
        most = np.minimum(tokens.to_numpy(), matrices["projection"].map(sides).to_numpy())
        matrices["normalized_effective_rank"] = matrices["effective_rank"] / most
        yield matrices


def example_means(
    matrices: pd.DataFrame, statistics: Sequence[str], by: str = "projection"
) -> pd.DataFrame:
    """Means over layers, over `KEY`, with columns (statistic, projection).

    Args:
      by: `layer` for means over projections, with columns (statistic, layer).
    """
    means = matrices.groupby([*KEY, by])[list(statistics)].mean()
    return pd.DataFrame(means.unstack(by))


def summed_up(shards: Iterable[pd.DataFrame]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`by_example` and `by_layer` of `RunValues`, from parts of whole examples."""
    examples, layers = [], []
    for matrices in shards:
        examples.append(example_means(matrices, SPECTRAL))
        layers.append(_layer_part(matrices))
    return pd.concat(examples).sort_index(), _joined(pd.concat(layers))


def _layer_part(matrices: pd.DataFrame) -> pd.DataFrame:
    numbers = matrices.groupby(["group", "projection", "layer"])[list(SPECTRAL)]
    return numbers.agg(["count", "mean", "var"])


def _joined(parts: pd.DataFrame) -> pd.DataFrame:
    """Counts, means and standard errors of the whole, from count, mean and var of its parts.

    Chan, Golub and LeVeque (1979): squares about each part's own mean, and of means about the
    whole's.
    """
    levels = list(parts.index.names)

    def part(name: str) -> pd.DataFrame:
        return parts.loc[:, (slice(None), name)].droplevel(1, axis=1)

    def sums(values: pd.DataFrame) -> pd.DataFrame:
        return values.groupby(level=levels).sum()

    counts, means = part("count"), part("mean")
    total = sums(counts)
    mean = sums(counts * means) / total.where(total > 0)
    about = means - mean.reindex(means.index)
    squares = sums(part("var") * (counts - 1)) + sums(counts * about**2)
    sem = (squares / (total - 1).where(total > 1) / total).pow(0.5)
    whole = pd.concat({"count": total, "mean": mean, "sem": sem}, axis=1)
    return whole.swaplevel(axis="columns").sort_index()


def _mean_cosines(directory: str | Path, layers: Sequence[int]) -> pd.Series:
    levels = ["group", "kind", "projection", "layer_a", "layer_b"]
    where = pc.field("layer_a").isin(list(layers)) & pc.field("layer_b").isin(list(layers))
    tables = {"similarity": [*levels, "cosine"]}
    none = TABLES["similarity"].empty_table().select(tables["similarity"])
    parts = [
        shard.to_pandas().groupby(levels)["cosine"].agg(["sum", "count"])
        for (shard,) in itertools.chain([(none,)], read_shards(directory, tables, where))
    ]
    totals = pd.concat(parts).groupby(level=levels).sum()
    return totals["sum"] / totals["count"].where(totals["count"] > 0)


def require_finished(directory: str | Path, layers: str) -> tuple[dict[str, Any], list[int]]:
    """The manifest of a finished run, and those of its layers that are asked for.

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
    there = list(manifest["settings"]["layers"])
    if layers == "all":
        return manifest, there
    chosen = SpectraConfig(layers=layers).layer_numbers(there[-1] + 1)
    if absent := sorted(set(chosen) - set(there)):
        raise GradjaxError(f"--layers={layers}: {directory} was run without layers {absent}")
    return manifest, list(chosen)


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
    parts: dict[str, pd.DataFrame] = {}
    for statistic in SPECTRAL:
        means = pd.DataFrame({p: run.by_example[statistic, p] for p in run.projections})
        parts[statistic] = means.assign(**{ALL: means.mean(axis=1)})
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
    manifest = read_manifest(directory)
    shards = read_matrices(directory, manifest["settings"]["layers"])
    by_layer = _joined(pd.concat(map(_layer_part, shards)))
    layer_means = pd.DataFrame({number: by_layer[number, "mean"] for number in _NUMBERS})
    means = pd.DataFrame(layer_means.groupby(["group", "projection"]).mean().unstack("projection"))
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
