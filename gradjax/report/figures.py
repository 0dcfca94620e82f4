"""The report's figures, for print and for colour-blind readers.

Groups and models differ in colour, marker and line style; on a page 7 inches wide no text is
smaller than 8 points. Figures are matplotlib's own objects, without pyplot and its global state.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
    StrMethodFormatter,
)

from gradjax.storage.filesystem import whole_file
from gradjax.storage.results import ALL, KEY, RunValues, example_values
from gradjax.storage.store import read_table
from gradjax.structs import PROJECTIONS

MOST_POINTS = 2_000  # of a group in a scatter plot
FEWEST = 10  # examples that a median is drawn of
_WIDTH = 7.0  # inches
_SIZE = 8  # of text, in points
_Z = 1.96  # standard errors to either end of a 95 % interval
_LONGEST = 30  # characters of a name
_LINE = 110  # characters fit side by side
_SIGN = 12  # of which the sign before a label in the legend takes so many
_POINTS = 100  # of a spectrum, at most
_BEYOND = 10  # times the extreme ratios, where an axis of them ends
_ROUNDING = 1e-7  # of the largest singular value: what its computation leaves of a zero one
# Okabe and Ito's for colour-blind readers, but for the yellow, which is lost on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_LINES = ("-", "--", "-.", ":")
_UNITS = {
    "nuclear_norm": "mean nuclear norm\n(nats per unit weight)",
    "effective_rank": "mean effective rank\n(number of directions)",
    "normalized_effective_rank": "mean effective rank\n(share of min(T, m, n))",
}


def layer_curves(run: RunValues, high: str, low: str, statistic: str) -> Figure:
    """A statistic's mean over `ok` examples, layer by layer, with its 95 % confidence interval.

    One panel per projection; nuclear norms, in which groups differ by orders of magnitude, share
    one logarithmic scale. Missing numbers are left out. Lengths are not controlled for.

    Args:
      statistic: one of `gradjax.storage.results.SPECTRAL`.

    Raises:
      GradjaxError: if a group is missing or has no `ok` row.
    """
    shared = statistic == "nuclear_norm"
    figure, panels = _panels(1, len(run.projections), 2.5, sharey=shared)
    for number, group in enumerate((high, low)):
        for axes, projection in zip(panels[0], run.projections, strict=True):
            by_layer = _by_layer(run, group, projection, statistic)
            means, margin = by_layer["mean"], _Z * by_layer["sem"]
            band = means - margin, means + margin
            if shared:  # of the logarithm (delta method): no end lies below zero
                band = means * np.exp(-margin / means), means * np.exp(margin / means)
            _draw(axes, means.index, means, _style(number), band)
    _label(panels, run.projections, "layer", _UNITS[statistic])
    for axes in panels[0]:
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    if shared:
        panels[0, 0].set_yscale("log")
        _number_decades(panels[0, 0].yaxis)
    _entitle(
        figure, run, "means, not controlled for length, 95 % intervals (± 1.96 standard errors)"
    )
    _explain(figure, [(_style(i), _counted(run, g)) for i, g in enumerate((high, low))])
    return figure


def spectra(run: RunValues, groups: Sequence[str], layers: Sequence[int]) -> Figure | None:
    """Singular values against their index: median and middle half of the `ok` examples.

    One row of panels per layer, one column per projection. A matrix with fewer singular values has
    zeros in place of the others. Medians and quartiles of 1e-7 of the largest median and less are
    rounding errors, and not drawn. Of long spectra a hundred values are drawn at most, evenly
    spaced in the logarithm of the index.

    Args:
      layers: of those that were measured.

    Returns:
      None for a run that did not store its singular values.

    Raises:
      GradjaxError: if a group is missing or has no `ok` row, or a shard cannot be read.
    """
    if not run.manifest["settings"]["store_singular_values"]:
        return None
    legend = [(_style(i), _counted(run, group)) for i, group in enumerate(groups)]
    height = 1 + 1.5 * len(layers)
    figure, panels = _panels(len(layers), len(run.projections), height, sharey=True)
    for axes in panels.flat:
        axes.set(xscale="log", yscale="log")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    columns = ["group", "projection", "singular_values"]
    for row, layer in zip(panels, layers, strict=True):
        # One layer at a time: those of all may not fit into memory.
        table = read_table(run.directory, "spectra", columns, pc.field("layer") == layer)
        for axes, projection in zip(row, run.projections, strict=True):
            for number, group in enumerate(groups):
                where = (pc.field("group") == group) & (pc.field("projection") == projection)
                lists = table.filter(where)["singular_values"]
                indices, (lower, median, upper) = _quartiles(lists.combine_chunks())
                _draw(axes, indices, median, _style(number), (lower, upper))
    titles = [f"{projection}, layer {layer}" for layer in layers for projection in run.projections]
    _label(panels, titles, "index of the singular value", "singular value\n(nats per unit weight)")
    _entitle(figure, run, "medians and middle halves, not controlled for length")
    _explain(figure, legend)
    return figure


def forest(sides: Sequence[tuple[str, str]], answers: Sequence[pd.DataFrame]) -> Figure:
    """The ratios of all comparisons with their intervals, one panel per statistic.

    Args:
      sides: names of high and low of each comparison.
      answers: of each comparison, as `gradjax.report.compare.answers` gives them.
    """
    statistics = list(answers[0]["statistic"])
    figure, panels = _panels(1, len(statistics), 1 + 0.55 * len(sides), sharex=False, sharey=True)
    ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    words: dict[str, Any] = {"ha": "center", "fontsize": _SIZE, "bbox": ground}
    for number, axes in enumerate(panels[0]):
        rows = pd.DataFrame([of.iloc[number] for of in answers])
        for place, row in enumerate(rows.to_dict("records")):
            ends = row["ratio_ci_low"], row["ratio_ci_high"]
            axes.plot(ends, (place, place), color=_COLOURS[0], linewidth=1.5)
            axes.plot(row["ratio"], place, **_decided(row["answer"] != "undecided"), markersize=6)
            at = (1.0 if np.isnan(row["ratio"]) else row["ratio"], place)
            axes.annotate(row["answer"], at, (0, 7), textcoords="offset points", **words)
        _ratio_axis(axes, "x", rows)
    labels = [
        f"{_literal(high)}\nagainst {_literal(low)}\n{of['pairs'].iloc[0]:,} pairs"
        for (high, low), of in zip(sides, answers, strict=True)
    ]
    panels[0, 0].set_yticks(range(len(sides)), labels)
    panels[0, 0].set_ylim(len(sides) - 0.5, -0.7)
    titles = [statistic.replace("_", " ") for statistic in statistics]
    _label(panels, titles, "high ÷ low, at equal length", "")
    figure.suptitle("Ratios with 99 % intervals; filled where decided", fontsize=_SIZE)
    return figure


def controlled_curves(effects: pd.DataFrame, high: str, low: str) -> Figure:
    """Layer by layer, by what factor a statistic is larger in high at equal length.

    Args:
      effects: as `gradjax.report.layers.layer_effects` gives them.
    """
    statistics = effects["statistic"].unique()
    figure, panels = _panels(1, len(statistics), 2.7, sharey=False)
    for axes, statistic in zip(panels[0], statistics, strict=True):
        rows = effects[effects["statistic"] == statistic]
        band = rows["ratio_ci_low"], rows["ratio_ci_high"]
        _draw(axes, rows["layer"], rows["ratio"], {"color": _COLOURS[0], "linewidth": 1.2}, band)
        for yes, some in rows.groupby(rows["beyond_length"].isin(["yes", "negligible"])):
            axes.plot(some["layer"], some["ratio"], **_decided(bool(yes)), markersize=3.5)
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        _ratio_axis(axes, "y", rows)
    titles = [statistic.replace("_", " ") for statistic in statistics]
    _label(panels, titles, "layer", "high ÷ low,\nat equal length")
    sides = f"{_literal(high)} against {_literal(low)}"
    figure.suptitle(f"{sides}: matched pairs, 99 % intervals", fontsize=_SIZE)
    words = {True: "yes, adjusted over layers", False: "no, or undecided"}
    _explain(figure, [(_decided(decided), word) for decided, word in words.items()])
    return figure


def rank_against_length(run: RunValues, high: str, low: str) -> Figure:
    """Each example's effective rank (`all` of `example_values`) against its response's length.

    Lines join the medians of length and rank of the examples in each half-octave of length that
    has at least `FEWEST`. They are of all examples; of more than `MOST_POINTS`, that many drawn at
    random are shown as points.

    Raises:
      GradjaxError: if a group is missing or has no `ok` row.
    """
    figure, panels = _panels(1, 1, 3.5, sharey=True)
    axes = panels[0, 0]
    axes.set_xscale("log")
    ranks = example_values(run)["effective_rank", ALL]
    legend = []
    for number, group in enumerate((high, low)):
        lengths = run.rows(group).set_index(KEY)["num_target_tokens"]
        examples = pd.DataFrame({"tokens": lengths, "rank": ranks.reindex(lengths.index)}).dropna()
        octaves = examples.groupby(np.floor(2 * np.log2(examples["tokens"])))
        medians = octaves.median()[octaves.size() >= FEWEST]
        shown = examples.sample(min(len(examples), MOST_POINTS), random_state=0)
        style = _style(number)
        look = {name: style[name] for name in ("color", "marker")}
        axes.scatter(shown["tokens"], shown["rank"], **look, s=9, alpha=0.25, linewidths=0)
        _draw(axes, medians["tokens"], medians["rank"], style)
        part = f"{len(shown):,} of " if len(shown) < len(examples) else ""
        kept = f" ({part}{len(examples):,} examples{' shown' if part else ''})"
        legend.append((style, _literal(group) + kept))
    _number_decades(axes.xaxis)
    unit = "effective rank (number of directions),\nmean over layers and projections"
    _label(panels, [""], "length of the response (tokens)", unit)
    _entitle(figure, run, f"examples, and medians of {FEWEST} and more in half-octaves of length")
    _explain(figure, legend)
    return figure


def models(runs: Sequence[RunValues], high: str, low: str, statistic: str) -> Figure:
    """A statistic's mean over `ok` examples against relative depth, for several models.

    One panel per projection; layer 0 is at depth 0 and a run's last layer at 1. Nuclear norms, in
    which models differ by orders of magnitude, share one logarithmic scale.

    Args:
      statistic: one of `gradjax.storage.results.SPECTRAL`.

    Raises:
      GradjaxError: if a run lacks a group or has no `ok` row of it.
    """
    projections = [p for p in PROJECTIONS if any(p in run.projections for run in runs)]
    shared = statistic == "nuclear_norm"
    figure, panels = _panels(1, len(projections), 2.9, sharey=shared)
    if shared:
        panels[0, 0].set_yscale("log")
        _number_decades(panels[0, 0].yaxis)
    sides = (("-", high), ("--", low))
    legend: list[tuple[dict[str, Any], str]] = []
    for number, run in enumerate(runs):
        style = _style(number)
        last = max(run.manifest["settings"]["layers"][-1], 1)
        for line, group in sides:
            run.rows(group)  # or it says what is wrong
            for axes, projection in zip(panels[0], projections, strict=True):
                means = _by_layer(run, group, projection, statistic)["mean"]
                _draw(axes, means.index / last, means, style | {"linestyle": line})
        legend.append((style | {"linestyle": ""}, _literal(run.name)))
    _label(panels, projections, "relative depth", _UNITS[statistic])
    figure.suptitle("means over examples, not controlled for length", fontsize=_SIZE)
    for line, group in sides:
        legend.append(({"color": "black", "linestyle": line}, _literal(group)))
    _explain(figure, legend)
    return figure


def save(figure: Figure, path_without_suffix: str | Path) -> None:
    """Writes a figure as PNG (200 dots per inch) and as SVG, each whole or not at all.

    Text in the SVG is text. Equal figures give equal bytes.

    Raises:
      GradjaxError: if a file cannot be written.
    """
    path = Path(path_without_suffix)
    options: dict[str, dict[str, Any]] = {"png": {"dpi": 200}, "svg": {"metadata": {"Date": None}}}
    for suffix, settings in options.items():
        target = path.with_name(f"{path.name}.{suffix}")
        style = matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "gradjax"})
        # An SVG's reader has letters that the PNG's font has not.
        with style, warnings.catch_warnings(), whole_file(target, "output_dir") as temporary:
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            figure.savefig(temporary, format=suffix, **settings)


def _by_layer(run: RunValues, group: str, projection: str, statistic: str) -> pd.DataFrame:
    """Mean and standard error of a statistic, over layers."""
    numbers = pd.DataFrame(run.by_layer[statistic])
    of, by = (numbers.index.get_level_values(name) for name in ("group", "projection"))
    return numbers[(of == group) & (by == projection)].droplevel(["group", "projection"])


def _quartiles(lists: pa.ListArray) -> tuple[Int[np.ndarray, " k"], Float[np.ndarray, "3 k"]]:
    """Indices from 1, and the quartiles of the examples' singular values of these indices."""
    starts, ends = lists.offsets.to_numpy()[:-1, None], lists.offsets.to_numpy()[1:, None]
    longest = max((ends - starts).max(initial=1), 1)
    indices = np.unique(np.geomspace(1, longest, _POINTS).round().astype(int))
    at = starts + indices - 1
    values = np.append(lists.values.to_numpy(), np.float32(0))  # the last is every tail's
    found = np.quantile(values[np.where(at < ends, at, -1)], [0.25, 0.5, 0.75], axis=0)
    return indices, np.where(found > _ROUNDING * found[1, 0], found, np.nan)


def _panels(
    rows: int, columns: int, height: float, sharey: bool, sharex: bool = True
) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey)
    for axes in panels.flat:
        axes.tick_params(which="both", labelsize=_SIZE)
        axes.grid(linewidth=0.5, alpha=0.4)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _style(number: int) -> dict[str, Any]:
    """How a line looks, differently for each number."""
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": _LINES[number % len(_LINES)],
        "linewidth": 1.2,
        "markersize": 3.5,
    }


def _draw(axes: Axes, x: Any, y: Any, style: dict[str, Any], band: tuple | None = None) -> None:
    """A line with some of its points marked, over its band."""
    if band:
        axes.fill_between(x, *band, color=style["color"], alpha=0.2, linewidth=0)
    axes.plot(x, y, **style, markevery=max(len(x) // 8, 1))


def _number_decades(axis: Axis) -> None:
    """Plain numbers on a logarithmic axis."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _ratio_axis(axes: Axes, which: Literal["x", "y"], rows: pd.DataFrame) -> None:
    """A logarithmic axis of ratios with a line at 1; intervals may go beyond it."""
    (axes.axvline if which == "x" else axes.axhline)(1, color="black", linewidth=0.8)
    axes.set(**{f"{which}scale": "log"})
    ratios = rows["ratio"].dropna()
    least, most = min(ratios.min(), 1) / _BEYOND, max(ratios.max(), 1) * _BEYOND
    low = min(np.nanmax([rows["ratio_ci_low"].min(), least]), 1) if len(ratios) else 0.5
    high = max(np.nanmin([rows["ratio_ci_high"].max(), most]), 1) if len(ratios) else 2
    room = max((high / low) ** 0.15, 1.005)
    axes.set(**{f"{which}lim": (low / room, high * room)})
    axis = axes.xaxis if which == "x" else axes.yaxis
    _number_decades(axis)
    if high < 3 * low:
        axis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        axis.set_minor_locator(NullLocator())


def _decided(decided: bool) -> dict[str, Any]:
    """How the marker of a ratio looks."""
    fill = _COLOURS[0] if decided else "white"
    return {"marker": "o", "linestyle": "", "color": _COLOURS[0], "markerfacecolor": fill}


def _label(panels: np.ndarray, titles: Sequence[str], x: str, y: str) -> None:
    for axes, title in zip(panels.flat, titles, strict=True):
        axes.set_title(title, fontsize=_SIZE)
    for axes in panels[-1]:
        axes.set_xlabel(x, fontsize=_SIZE)
    for axes in panels[:, 0]:
        axes.set_ylabel(y, fontsize=_SIZE)


def _entitle(figure: Figure, run: RunValues, shown: str) -> None:
    figure.suptitle(f"{_literal(run.name)}: {shown}", fontsize=_SIZE)


def _explain(figure: Figure, entries: Sequence[tuple[dict[str, Any], str]]) -> None:
    """The legend, below all panels."""
    styles, labels = zip(*entries, strict=True)
    figure.legend(
        [Line2D([], [], **style) for style in styles],
        labels,
        loc="outside lower center",
        ncols=max(_LINE // (_SIGN + max(map(len, labels))), 1),
        fontsize=_SIZE,
        frameon=False,
        handlelength=3,
    )


def _counted(run: RunValues, group: str) -> str:
    return f"{_literal(group)} ({len(run.rows(group)):,} examples)"


def _literal(name: str) -> str:
    """A user's name as text that is shown as it is: no mathtext, nothing that XML forbids."""
    if len(name) > _LONGEST:
        name = f"{name[: _LONGEST // 2]}…{name[1 - _LONGEST // 2 :]}"
    shown = "".join(character if character.isprintable() else "\ufffd" for character in name)
    return shown.replace("$", r"\$")
