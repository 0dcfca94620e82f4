"""Rows of two groups become pairs of like length: what a comparison beyond length is made of.

Real data are not independent rows. Rows of one prompt resemble each other, so they count together
as one unit, and rows of equal text once; a prompt that both sides have is compared with itself.
Units without such a partner are paired with the nearest one of the other side.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64
from scipy.spatial import KDTree

# How far apart two units may be, in standard deviations within groups of log target tokens
# (Rosenbaum and Rubin 1985, Am Stat 39:33), of log prompt tokens and of further logarithms; a
# pair's distance is Euclid's in these units, at most 1.
CALIPERS = (0.25, 1.0)
# Standard deviations by which the means of pairs may differ for all of them to be kept (Austin
# 2009, Stat Med 28:3083, asks for 0.1; a regression takes off what is left).
BALANCE = 0.2
# Units within a fiftieth of the caliper are equally far from all others.
_GRID = 0.02
ROUNDING = 1e-9  # logarithms that differ by less do so by rounding
_NEAREST = 16  # neighbours that are looked at first
_CANDIDATES = 100_000  # pairs that are weighed at a time


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of one side."""

    target: Int[np.ndarray, " n"]  # tokens
    prompt: Int[np.ndarray, " n"]  # tokens
    clusters: UInt64[np.ndarray, " n"]  # rows with the same number count together
    texts: UInt64[np.ndarray, " n"]  # rows with the same number are equal
    also: Float[np.ndarray, "n k"] | None = None  # further logarithms that are to be alike

    @property
    def logs(self) -> Float[np.ndarray, "n c"]:
        """Logarithms of target tokens, of prompt tokens (plus one: it may be empty), and `also`."""
        logs = np.column_stack([np.log(self.target), np.log1p(self.prompt)])
        return logs if self.also is None else np.column_stack([logs, self.also])


@dataclasses.dataclass(frozen=True)
class Units:
    """The rows of one side that count, by cluster."""

    rows: Int[np.ndarray, " r"]  # the first ones of their texts
    unit: Int[np.ndarray, " r"]  # to which each belongs
    clusters: UInt64[np.ndarray, " u"]  # of each unit, ascending

    def means(
        self, values: Float[np.ndarray, "n k"], known: Bool[np.ndarray, " n"] | None = None
    ) -> Float[np.ndarray, "u k"]:
        """Means of the rows of each unit, of those that are `known`; NaN where none is."""
        unit, chosen = self.unit, values[self.rows]
        if known is not None:
            unit, chosen = unit[known[self.rows]], chosen[known[self.rows]]
        size = len(self.clusters)
        counts = np.bincount(unit, minlength=size)
        sums = np.column_stack([np.bincount(unit, column, size) for column in chosen.T])
        with np.errstate(invalid="ignore"):
            return sums / counts[:, None]


@dataclasses.dataclass(frozen=True)
class Matched:
    """Units of two sides, and pairs of them."""

    rows: tuple[Rows, Rows]  # of high, of low
    units: tuple[Units, Units]
    pairs: Int[np.ndarray, "pairs 2"]  # a unit of high and one of low; each in one pair at most
    paired: int  # pairs of one cluster, which come first

    @property
    def share(self) -> float:
        """Pairs among the units of the side that has fewer."""
        return len(self.pairs) / min(len(units.clusters) for units in self.units)

    @property
    def duplicates(self) -> int:
        """Rows that equal an earlier one of their side."""
        pairs = zip(self.rows, self.units, strict=True)
        return sum(len(rows.target) - len(units.rows) for rows, units in pairs)

    @property
    def shared(self) -> int:
        """Texts that both sides have."""
        high, low = (rows.texts for rows in self.rows)
        return len(np.intersect1d(high, low))


def match(high: Rows, low: Rows) -> Matched:
    """One-to-one pairs of units: those of one cluster, then the nearest ones of the others.

    Of either kind, as many are kept, the most alike ones first, as keep the means of every
    logarithm within `BALANCE` standard deviations. A cluster that both sides have is in no pair
    with another: pairs are independent of each other.
    """
    units = units_of(high), units_of(low)
    means = units[0].means(high.logs), units[1].means(low.logs)
    spread = np.sqrt(sum(np.var(m, axis=0, ddof=min(len(m) - 1, 1)) for m in means) / 2)
    _, *common = np.intersect1d(units[0].clusters, units[1].clusters, return_indices=True)
    same = _balanced(np.column_stack(common), means, spread)
    rest = [np.setdiff1d(np.arange(len(m)), own) for m, own in zip(means, common, strict=True)]
    calipers = np.array([CALIPERS[min(i, 1)] for i in range(len(spread))])
    scale = calipers * np.maximum(spread, ROUNDING)
    found = nearest_pairs(means[0][rest[0]] / scale, means[1][rest[1]] / scale)
    near = np.column_stack([rest[0][found[:, 0]], rest[1][found[:, 1]]])
    pairs = np.concatenate([same, _balanced(near, means, spread)])
    return Matched((high, low), units, pairs, len(same))


def units_of(rows: Rows) -> Units:
    """The units of one side."""
    _, first = np.unique(rows.texts, return_index=True)
    first.sort()
    clusters, unit = np.unique(rows.clusters[first], return_inverse=True)
    return Units(first, unit, clusters)


def _balanced(
    pairs: Int[np.ndarray, "pairs 2"],
    means: tuple[Float[np.ndarray, "u c"], Float[np.ndarray, "v c"]],
    spread: Float[np.ndarray, " c"],
) -> Int[np.ndarray, "kept 2"]:
    """The most pairs, those closest in a logarithm first, whose mean difference in it is small."""
    for column, unit in enumerate(spread):
        apart = means[0][pairs[:, 0], column] - means[1][pairs[:, 1], column]
        order = np.argsort(np.abs(apart), kind="stable")
        so_far = np.cumsum(apart[order]) / np.arange(1, len(order) + 1)
        within = np.flatnonzero(np.abs(so_far) <= BALANCE * unit + ROUNDING)
        pairs = pairs[order[: within[-1] + 1 if len(within) else 0]]
    return pairs


def nearest_pairs(
    high: Float[np.ndarray, "n c"], low: Float[np.ndarray, "m c"]
) -> Int[np.ndarray, "pairs 2"]:
    """One-to-one pairs of points at most 1 apart, the closest first, until none is left.

    Points that are equal on a grid of `_GRID` are one with many copies. All lists of neighbours
    are short: those who are left are given new ones among those who are left.
    """
    (places_high, stock_high), (places_low, stock_low) = _places(high), _places(low)
    free_high, free_low = np.arange(len(places_high)), np.arange(len(places_low))
    pairs: list[tuple[int, int]] = []
    while len(free_high) and len(free_low):
        most = min(max(_NEAREST, _CANDIDATES // len(free_high)), len(free_low))
        ranks: Any = range(1, most + 1)  # unlike a number, gives a list even of one
        tree = KDTree(places_low[free_low])
        nearest = tree.query(places_high[free_high], ranks, distance_upper_bound=1)
        distances, found = map(np.asarray, nearest)
        which, rank = np.nonzero(np.isfinite(distances))
        highs, lows = free_high[which], free_low[found[which, rank]]
        for at in np.lexsort((lows, highs, distances[which, rank])).tolist():
            ours, theirs = stock_high[highs[at]], stock_low[lows[at]]
            while ours and theirs:
                pairs.append((ours.pop(), theirs.pop()))
        # Others had all that is near in their lists.
        cut = np.isfinite(distances[:, -1]) & (most < len(free_low))
        free_high = _in_stock(free_high[cut], stock_high)
        free_low = _in_stock(free_low, stock_low)
    return np.array(pairs, np.int64).reshape(-1, 2)


def _places(
    points: Float[np.ndarray, "n c"],
) -> tuple[Float[np.ndarray, "p c"], list[list[int]]]:
    """The places of the grid where points are, and the points of each, to be taken from the end."""
    places, which = np.unique(np.round(points / _GRID), axis=0, return_inverse=True)
    order = np.argsort(which, kind="stable")
    ends = np.cumsum(np.bincount(which, minlength=len(places)))
    return places * _GRID, [part.tolist() for part in np.split(order, ends[:-1])]


def _in_stock(places: Int[np.ndarray, " n"], stocks: Sequence[list[int]]) -> np.ndarray:
    return places[[bool(stocks[place]) for place in places]]
