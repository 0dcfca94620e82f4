"""The table that a run ends with."""

from pathlib import Path

import pandas as pd

from gradjax.store import read_manifest, read_table

_NUMBERS = {"nuclear_norm": "nuclear norm", "effective_rank": "effective rank"}


def group_means(directory: str | Path) -> pd.DataFrame:
    """Group by group: mean nuclear norm and effective rank of each projection, and mean loss.

    A number is the mean over `ok` examples per layer and projection, then over layers (the
    paper's tables). Rows without a number (a zero gradient has no effective rank) are left
    out of its mean. Columns are (measure, projection); `("rows", "used")` and
    `("rows", "not used")` count.
    """
    examples = read_table(directory, "examples", ["group", "status", "loss"]).to_pandas()
    columns = ["group", "layer", "projection", *_NUMBERS]
    spectra = read_table(directory, "spectra", columns).to_pandas()
    by_layer = spectra.groupby(["group", "layer", "projection"])[list(_NUMBERS)].mean()
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


def rows_to_come(directory: str | Path) -> int:
    """How many of a run's input rows it does not hold yet."""
    rows = sum(data["rows"] for data in read_manifest(directory)["data"].values())
    return rows - read_table(directory, "examples", ["example_id"]).num_rows


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
