"""The README's first picture: `slow` against `corrupted`, layer by layer.

  gradjax demo
  python docs/first_picture.py runs/demo docs/first_picture.svg

Both groups answer the same word problems in as many tokens; only the steps differ. A row's value
is its mean over q, k, v and o. Shown are the rows' means, with bootstrap 95 % intervals.
"""

import sys

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter
from scipy.stats import bootstrap

import gradjax
from gradjax.storage.results import KEY

# Okabe and Ito's colours, for colour-blind readers too.
GROUPS = {"slow": ("right steps", "#0072B2"), "corrupted": ("wrong steps", "#D55E00")}
SIZE = 9  # of text, in points


def draw(axes: Axes, matrices: pd.DataFrame, statistic: str) -> None:
    """A statistic's means by layer in each group, over their intervals."""
    for group, (_, colour) in GROUPS.items():
        rows = matrices[matrices["group"] == group]
        values = rows.groupby([*KEY, "layer"])[statistic].mean().unstack()  # examples x layers
        means = values.mean()
        drawn = bootstrap([values], np.mean, axis=0, method="percentile", rng=0)
        band = drawn.confidence_interval
        axes.fill_between(means.index, *band, color=colour, linewidth=0, alpha=0.25)
        axes.plot(means.index, means, color=colour, marker="o", markersize=4, linewidth=2)
    axes.set_xlabel("layer", fontsize=SIZE)
    axes.set_xticks(sorted(matrices["layer"].unique()))
    axes.tick_params(labelsize=SIZE)
    axes.grid(linewidth=0.5, alpha=0.4)
    axes.spines[["top", "right"]].set_visible(False)


def label(axes: Axes, group: str, x: float, y: float) -> None:
    """A group's name beside its line, in the line's colour."""
    name, colour = GROUPS[group]
    axes.text(x, y, f"{name} ({group})", color=colour, fontsize=SIZE, fontweight="bold")


def first_picture(matrices: pd.DataFrame) -> Figure:
    """Nuclear norm and effective rank of the embedded groups."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    norm, rank = figure.subplots(1, 2)
    draw(norm, matrices, "nuclear_norm")
    norm.set(yscale="log", ylim=(0.002, 6))
    norm.yaxis.set_major_locator(FixedLocator([0.01, 0.1, 1]))
    norm.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    norm.yaxis.set_minor_locator(NullLocator())
    norm.set_title("nuclear norm (log scale)", fontsize=SIZE)
    label(norm, "corrupted", 0.9, 2.5)
    label(norm, "slow", 1.3, 0.06)
    draw(rank, matrices, "effective_rank")
    rank.set(ylim=(0, 12))
    rank.set_title("effective rank (number of directions)", fontsize=SIZE)
    label(rank, "corrupted", 1.2, 9.7)
    label(rank, "slow", 0.3, 5.8)
    figure.suptitle(
        "At equal length, wrong steps pull about 50 times harder on the weights", fontsize=SIZE + 3
    )
    return figure


if __name__ == "__main__":
    directory, output = sys.argv[1:]
    # Text stays text, and the same run gives the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "gradjax"}):
        picture = first_picture(gradjax.open_run(directory).spectra)
        picture.savefig(output, format="svg", metadata={"Date": None})
