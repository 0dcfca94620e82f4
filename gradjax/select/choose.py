"""Scores -> positions of the chosen rows, and why each other row was left out. Reads no files."""

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from gradjax.errors import GradjaxError
from gradjax.report.matching import Rows, match
from gradjax.select.rule import Amount, Rule, Term

# What is a valid number, by a metric's name, here or in the paper's files. The paper's code has
# these bounds, each for its own metric: a response of its released IFD selection has a perplexity
# of 23,276.
_BY_MODEL = r"gpt2|qwen[\d._]*b?"
VALID = {
    rf"ifd(_loss_ratio|_({_BY_MODEL}))?": (0, 1),
    rf"perplexity(_with(out)?_instruction)?|ppl_({_BY_MODEL})": (0, 10_000),
}
HIGH, LOW, RANGE, RANDOM = "high", "low", "range", "random"
POOL = "the lower half"  # where partners of like length are from


@dataclasses.dataclass(frozen=True)
class Cutoff:
    """The last value within reach, how many rows to choose from have it, how many were taken."""

    value: float
    tied: int
    taken: int


@dataclasses.dataclass(frozen=True)
class Choice:
    """A selection of n rows.

    `parts` holds positions of rows: `high` and `range` from the highest value down, `low` from the
    lowest up or, matched on length, the partners of `high` in its order, `random` as drawn. Only
    `random` may share rows with others.
    """

    value: np.ndarray  # float64 [n], what rows are ranked by; NaN where a row is not usable
    candidates: np.ndarray  # bool [n], the rows to choose from: the usable ones within the range
    parts: dict[str, np.ndarray]  # int64 [rows of the part]
    cutoffs: dict[str, Cutoff]  # of high and of low, or of the lower half
    why: np.ndarray  # object [n], str: "" for a chosen row, else what kept it out


def choose(keys: pd.DataFrame, metrics: pd.DataFrame, rule: Rule) -> Choice:
    """Chooses rows; the same ones for the same seed.

    Args:
      keys: each row's `status`, and `length`, `prompt_length`, `prompt` and `text` where rows are
        to be matched.
      metrics: numbers of the same rows, NaN where unknown.

    Raises:
      GradjaxError: if more rows are asked for than can be chosen, or high and low would share some.
    """
    why, value = rank_values(keys["status"], metrics, rule.by)
    if rule.match_length:
        _reject(why, ~(keys["length"].to_numpy(float) > 0), "its length is not known")
        value[why != ""] = np.nan
    if rule.range:
        low, high = rule.range
        _reject(why, ~((value >= low) & (value <= high)), f"outside --range={low:g}:{high:g}")
    candidates = why == ""
    if not candidates.any():
        raise GradjaxError(
            f"no row can be chosen: {_left_out(why) or 'there is none'}; give other rows, another "
            "--by or a wider --range"
        )
    ascending = ascend(value, candidates, rule.seed)

    parts, ends = _extremes(rule, ascending, why)
    if rule.match_length:
        ends[POOL] = _lower_half(rule, ascending, why)
        once = [_once(keys, rows) for rows in (parts[HIGH], ends[POOL])]
        parts[HIGH], parts[LOW] = _paired(keys, *once)
        _require_pairs(rule, len(parts[HIGH]))
    if rule.random:
        rng, count = np.random.default_rng((rule.seed, 1)), _count("random", rule.random, why)
        parts[RANDOM] = rng.choice(np.flatnonzero(candidates), count, replace=False)
    cutoffs = {
        name: _cutoff(value, ascending, end[-1], parts[LOW if name == POOL else name])
        for name, end in ends.items()
    }
    if rule.match_length:
        why[ends[HIGH]] = "equals another high row"
        why[_once(keys, ends[HIGH])] = f"no row of like length is free in {POOL}"
        why[ends[POOL]] = "not the partner of a high row"
    for name, cutoff in cutoffs.items():
        _reject(why, value == cutoff.value, f"lost a tie at the cutoff of {name}")
    _reject(why, np.ones(len(why), bool), _left_over(parts))
    for part in parts.values():
        why[part] = ""
    return Choice(value, candidates, parts, cutoffs, why)


def rank_values(
    status: pd.Series, metrics: pd.DataFrame, by: Sequence[Term]
) -> tuple[np.ndarray, np.ndarray]:
    """Why each row is not usable ("" where it is), and what it is ranked by (NaN where not).

    One metric counts as it is, times its weight. Of several, each becomes percentiles among the
    usable rows (mean ranks for ties, from 0 to 1), and these are added with their weights.
    """
    why = np.where(status == "ok", "", status).astype(object)
    columns = [metrics[term.metric].to_numpy(float) for term in by]
    for term, column in zip(by, columns, strict=True):
        _reject(why, np.isnan(column), f"{term.metric} is null")
        _reject(why, np.isinf(column), f"{term.metric} is infinite")
        for name, (low, high) in VALID.items():
            if re.fullmatch(name, term.metric):
                outside = ~((column >= low) & (column <= high))
                _reject(why, outside, f"{term.metric} is outside {low} to {high}")
    value = np.full(len(why), np.nan)
    usable = why == ""
    chosen = [column[usable] for column in columns]
    if len(by) > 1:
        chosen = [(stats.rankdata(column) - 0.5) / max(len(column), 1) for column in chosen]
    value[usable] = sum(t.weight * column for t, column in zip(by, chosen, strict=True))
    return why, value


def ascend(value: np.ndarray, candidates: np.ndarray, seed: int) -> np.ndarray:
    """Positions of the candidates, bool [n], from the lowest value up; the seed draws ties."""
    shuffled = np.random.default_rng(seed).permutation(len(value))
    shuffled = shuffled[candidates[shuffled]]
    return shuffled[np.argsort(value[shuffled], kind="stable")]


def _once(keys: pd.DataFrame, rows: np.ndarray) -> np.ndarray:
    """Those of the rows that equal no earlier one."""
    return rows[~keys["text"].iloc[rows].duplicated().to_numpy()]


def _paired(
    keys: pd.DataFrame, high: np.ndarray, pool: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `high` and of `pool` that are alike in length, as the report pairs them.

    Args:
      high: positions, the highest value first.
      pool: positions, the lowest value first.

    Returns:
      Positions, each row's partner at the same place, in the order of `high`.
    """
    prompts = keys["prompt"].to_numpy()[np.concatenate([high, pool])]
    table = pd.DataFrame({"side": np.repeat([0, 1], [len(high), len(pool)]), "prompt": prompts})
    # Rows are units of their own: the first of a prompt on one side goes with that of the other.
    table["turn"] = table.groupby(["side", "prompt"]).cumcount()
    # Of equally near units the engine takes that of the largest number.
    numbers = table[::-1].groupby(["prompt", "turn"], sort=False).ngroup().sort_index()
    matched, of_unit = [], []
    for side, rows in enumerate((high, pool)):
        units = numbers[table["side"] == side].to_numpy(np.uint64)
        target, prompt = keys[["length", "prompt_length"]].to_numpy()[rows].astype(int).T
        matched.append(Rows(target, prompt, units, np.arange(len(rows), dtype=np.uint64)))
        of_unit.append(np.argsort(units))
    pairs = match(*matched).pairs
    ours, theirs = (units[pairs[:, side]] for side, units in enumerate(of_unit))
    order = np.argsort(ours)
    return high[ours[order]], pool[theirs[order]]


def _extremes(
    rule: Rule, ascending: np.ndarray, why: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """High and low, or all that lies in the range; and those of them that end at a cutoff."""
    n = len(ascending)
    ends: dict[str, np.ndarray] = {}
    if rule.top:
        ends[HIGH] = ascending[n - _count("top", rule.top, why) :][::-1]
    if rule.bottom and not rule.match_length:
        ends[LOW] = ascending[: _count("bottom", rule.bottom, why)]
    if sum(map(len, ends.values())) > n:
        raise GradjaxError(
            f"--top={rule.top} and --bottom={rule.bottom} would share rows: expected at most {n} "
            f"together, {_can_be_chosen(why)}"
        )
    return ({RANGE: ascending[::-1]} if rule.range and not ends else dict(ends)), ends


def _lower_half(rule: Rule, ascending: np.ndarray, why: np.ndarray) -> np.ndarray:
    half = ascending[: len(ascending) // 2]
    if rule.top and rule.top.of(len(ascending)) > len(half):
        raise GradjaxError(
            f"--top={rule.top} with --match_length: as many low rows are drawn from the lower half "
            f"of all, expected at most {len(half)}, {_can_be_chosen(why)}"
        )
    return half


def _require_pairs(rule: Rule, pairs: int) -> None:
    if not pairs:
        raise GradjaxError(
            f"--top={rule.top} with --match_length: none of these rows has one in {POOL} whose "
            "response and prompt are of like length; give a larger --top or another --by"
        )


def _count(flag: str, amount: Amount, why: np.ndarray) -> int:
    rows = int((why == "").sum())
    count = amount.of(rows)
    if not 0 < count <= rows:
        expected = "1" if rows == 1 else f"1 to {rows}"
        raise GradjaxError(
            f"--{flag}={amount} is {count} rows: expected {expected}, {_can_be_chosen(why)}"
        )
    return count


def _can_be_chosen(why: np.ndarray) -> str:
    said = f"as {(why == '').sum()} of {len(why)} rows can be chosen"
    return said + (f" ({left_out})" if (left_out := _left_out(why)) else "")


def _left_out(why: np.ndarray) -> str:
    """The commonest reasons."""
    kinds = Counter(why[why != ""]).most_common(3)
    return ", ".join(f"{count} times {reason}" for reason, count in kinds)


def _reject(why: np.ndarray, mask: np.ndarray, reason: str) -> None:
    """Notes a reason where there is none yet."""
    why[mask & (why == "")] = reason


def _cutoff(value: np.ndarray, candidates: np.ndarray, last: int, taken: np.ndarray) -> Cutoff:
    """At the row `last`, with the candidates and the rows taken that have its value."""
    tied, of_them = (int((value[rows] == value[last]).sum()) for rows in (candidates, taken))
    return Cutoff(float(value[last]), tied, of_them)


def _left_over(parts: dict[str, np.ndarray]) -> str:
    if HIGH in parts and LOW in parts:
        return "between high and low"
    return {HIGH: "below the cutoff", LOW: "above the cutoff"}.get(
        next(iter(parts), ""), "not drawn"
    )
