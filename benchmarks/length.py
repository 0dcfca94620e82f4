"""How often the report's verdict is right: groups of known truth, shaped like real data.

  python -m benchmarks.length

Prints first, for each relation of a statistic to response length, noise of its logarithm and AUROC
of length, the share of simulated comparisons that say "yes": with length alone at work, and with an
effect of half a standard deviation of the noise besides. Then one line for each case of rows that
are not independent, not normal or not alike in their prompts: the shares of the four answers, and
the bound that one of them has to keep.
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import numpy as np
import pandas as pd
from absl import flags
from scipy.stats import norm

from gradjax.cli.app import start
from gradjax.report.compare import HEADLINE, Comparison, settled
from gradjax.report.length import Effect, Verdict, matched_effect
from gradjax.report.matching import Matched, Rows, match
from gradjax.storage.results import RunValues

DATA_SETS, ROWS = 1000, 200
AUROCS = (0.6, 0.75, 0.9, 0.95)
NOISES = (0.6, 0.2, 0.05)
RELATIONS = {"power law": lambda t: t**0.7, "saturating": lambda t: t / (t + 150)}
_LOW = 10**9  # clusters and texts of low's rows have numbers from here on

flags.DEFINE_integer("data_sets", DATA_SETS, "simulated per cell")


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A simulated data set: rows of high and of low, and their statistic."""

    high: Rows
    low: Rows
    values: tuple[np.ndarray, np.ndarray]

    @cached_property
    def matched(self) -> Matched:
        """Its pairs."""
        return match(self.high, self.low)

    @cached_property
    def effect(self) -> Effect | None:
        """The effect in them."""
        return matched_effect(self.matched, *self.values)

    @property
    def verdict(self) -> Verdict:
        """What one comparison says."""
        return self.effect.verdict() if self.effect else "undecided"


def side(
    target: np.ndarray,
    prompt: np.ndarray,
    first: int = 0,
    clusters: np.ndarray | None = None,
) -> Rows:
    """Rows that are all different, numbered from `first` on, unless told otherwise."""
    own = first + np.arange(len(target), dtype=np.uint64)
    clusters = own if clusters is None else clusters.astype(np.uint64)
    return Rows(target, prompt, clusters, own)


def draw_lengths(
    rng: np.random.Generator, auroc: float, rows: int = ROWS
) -> tuple[np.ndarray, np.ndarray]:
    """Lognormal target tokens [2, rows] of the given AUROC, and uniform prompt tokens."""
    shift = np.sqrt(2) * norm.ppf(auroc) / 2
    logs = 5 + 0.7 * rng.standard_normal((2, rows)) + 0.7 * np.array([[shift], [-shift]])
    return np.maximum(np.exp(logs), 1).astype(int), rng.integers(5, 150, (2, rows))


def independent(
    rng: np.random.Generator,
    auroc: float = 0.6,
    noise: float = 0.2,
    relation: str = "power law",
    effect: float = 0.0,
    rows: int = ROWS,
) -> Drawn:
    """Rows of prompts of their own; `effect` is in standard deviations of the noise."""
    target, prompt = draw_lengths(rng, auroc, rows)
    values = RELATIONS[relation](target) * np.exp(noise * rng.standard_normal((2, rows)))
    values[0] *= np.exp(effect * noise)
    sides = side(target[0], prompt[0]), side(target[1], prompt[1], _LOW)
    return Drawn(*sides, (values[0], values[1]))


def repeated(rng: np.random.Generator, times: int) -> Drawn:
    """`ROWS` rows a side, every one of them several times."""
    once = independent(rng, rows=ROWS // times)

    def copies(rows: Rows) -> Rows:
        columns = (rows.target, rows.prompt, rows.clusters, rows.texts)
        target, prompt, clusters, texts = (np.repeat(column, times) for column in columns)
        return Rows(target, prompt, clusters, texts)

    values = tuple(np.repeat(column, times) for column in once.values)
    return Drawn(copies(once.high), copies(once.low), (values[0], values[1]))


def clustered(rng: np.random.Generator, correlation: float, both: bool = True) -> Drawn:
    """Five responses to each prompt, of this intra-class correlation; of high alone if not both."""
    target, prompt = draw_lengths(rng, 0.6)
    sides, values = [], []
    for number in range(2):
        of_prompt = np.arange(ROWS) // (5 if both or number == 0 else 1)
        shared = rng.standard_normal(ROWS)[of_prompt]
        noise = np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * rng.standard_normal(ROWS)
        first = number * _LOW
        rows = side(target[number], prompt[number][of_prompt], first, first + of_prompt)
        sides.append(rows)
        values.append(rows.target**0.7 * np.exp(0.6 * noise))
    return Drawn(sides[0], sides[1], (values[0], values[1]))


def paired(
    rng: np.random.Generator,
    correlation: float,
    effect: float,
    auroc: float = 0.5,
    noise: float = 0.6,
    relation: str = "power law",
    rows: int = ROWS,
    equal_lengths: bool = False,
) -> Drawn:
    """The same prompts on both sides, in different orders; responses to one prompt correlate."""
    target, prompt = draw_lengths(rng, auroc, rows)
    if equal_lengths:
        target[:] = 32
    shared = np.sqrt(correlation) * rng.standard_normal(rows)
    alone = np.sqrt(1 - correlation) * rng.standard_normal((2, rows))
    values = RELATIONS[relation](target) * np.exp(noise * (shared + alone))
    values[0] *= np.exp(effect * noise)
    order = rng.permutation(rows)
    high = side(target[0], prompt[0])
    low = side(target[1][order], prompt[0][order], _LOW, clusters=order)
    return Drawn(high, low, (values[0], values[1][order]))


def unlike_prompts(
    rng: np.random.Generator,
    apart: float,
    effect: float = 0.0,
    noise: float = 0.6,
    rows: int = ROWS,
    of_all: bool = False,
) -> Drawn:
    """Prompts that differ by some standard deviations; the statistic may follow all tokens."""
    target, _ = draw_lengths(rng, 0.6, rows)
    prompt = np.exp(4 + 0.5 * rng.standard_normal((2, rows)) + [[0.5 * apart], [0]]).astype(int)
    values = (target + prompt if of_all else target) ** 0.7
    values = values * np.exp(noise * rng.standard_normal((2, rows)))
    values[0] *= np.exp(effect * noise)
    sides = side(target[0], prompt[0]), side(target[1], prompt[1], _LOW)
    return Drawn(*sides, (values[0], values[1]))


def unequal(
    rng: np.random.Generator, rows: tuple[int, int], noise: str = "normal", spread: float = 1.0
) -> Drawn:
    """No effect, few rows, noise that is not normal, or of more spread in high."""
    target, prompt = draw_lengths(rng, 0.6, max(rows))
    sides, values = [], []
    for number, count in enumerate(rows):
        draws = {
            "normal": rng.standard_normal,
            "t3": partial(rng.standard_t, 3),
            "lognormal": lambda n: np.exp(rng.standard_normal(n)) - np.exp(0.5),
        }
        scale = 0.3 * (spread if number == 0 else 1)
        own = side(target[number][:count], prompt[number][:count], number * _LOW)
        sides.append(own)
        values.append(own.target**0.7 * np.exp(scale * draws[noise](count)))
    return Drawn(sides[0], sides[1], (values[0], values[1]))


def shifted(rng: np.random.Generator, ratio: float, noise: float = 0.2, rows: int = ROWS) -> Drawn:
    """Low's prompts and lengths once more as high's, with a statistic larger by a factor."""
    once = independent(rng, noise=noise, rows=rows)
    low = dataclasses.replace(once.high, texts=once.high.texts + np.uint64(_LOW))
    return Drawn(once.high, low, (ratio * once.values[0], once.values[0]))


@dataclasses.dataclass(frozen=True)
class Case:
    """Simulated data sets, and how many of them may or have to get an answer."""

    draw: Callable[[np.random.Generator], Drawn]
    answer: Verdict = "yes"
    at_most: float | None = None
    at_least: float | None = None
    data_sets: int = DATA_SETS
    seed: int = 0

    def answers(self, data_sets: int | None = None) -> dict[str, float]:
        """The share of each answer."""
        count = data_sets or self.data_sets
        drawn = (self.draw(np.random.default_rng((self.seed, i))) for i in range(count))
        said = Counter(one.verdict for one in drawn)
        return {answer: found / count for answer, found in said.items()}

    @property
    def bound(self) -> str:
        """In words."""
        sign, share = ("<=", self.at_most) if self.at_least is None else (">=", self.at_least)
        return f"{self.answer} {sign} {share:.0%}"


def _null(
    draw: Callable[..., Drawn], at_most: float = 0.02, data_sets: int = DATA_SETS, **given: Any
) -> Case:
    return Case(partial(draw, **given), at_most=at_most, data_sets=data_sets)


_CASES = {
    **{f"every row {n} times": _null(repeated, times=n) for n in (2, 3, 5, 10)},
    **{f"5 of a prompt, {c}": _null(clustered, correlation=c) for c in (0.3, 0.5, 0.9)},
    "5 of a prompt in high alone": _null(clustered, correlation=0.5, both=False),
    "same prompts, 0.8": _null(paired, correlation=0.8, effect=0.0),
    "same prompts, 0.8, AUROC 0.9": _null(
        paired, correlation=0.8, effect=0.0, auroc=0.9, noise=0.05
    ),
    "same prompts, 0.5, effect 0.15": Case(
        partial(paired, correlation=0.5, effect=0.15), at_least=0.25
    ),
    "same prompts, 0.8, effect 0.15": Case(
        partial(paired, correlation=0.8, effect=0.15), at_least=0.7
    ),
    "the same, first N tokens": Case(
        partial(paired, correlation=0.8, effect=0.15, equal_lengths=True), at_least=0.7
    ),
    "prompts 0.8 apart": _null(unlike_prompts, apart=0.8),
    "prompts 0.8 apart, effect 0.6": Case(
        partial(unlike_prompts, apart=0.8, effect=0.6), at_least=0.9
    ),
    "of all tokens, prompts 0.45 apart": _null(
        unlike_prompts, apart=0.45, of_all=True, noise=0.05, rows=1000
    ),
    "the same, 5,000 rows": _null(unlike_prompts, apart=0.45, of_all=True, noise=0.05, rows=5000),
    **{
        f"{n} rows, {noise}": _null(unequal, 0.01, rows=(n, n), noise=noise)
        for n in (13, 20, 30, 45, 60)
        for noise in ("normal", "t3", "lognormal")
    },
    **{f"AUROC {a}": _null(independent, auroc=a, noise=0.05) for a in (0.97, 0.985)},
    "spread 10 : 1": _null(unequal, rows=(ROWS, ROWS), spread=10.0),
    "20 against 5,000 rows": _null(unequal, rows=(20, 5000), data_sets=300),
    "equal but for 1e-6": Case(
        partial(shifted, ratio=1 + 1e-6), answer="negligible", at_least=1.0, data_sets=50
    ),
    "equal": Case(partial(shifted, ratio=1.0), answer="no", at_least=1.0, data_sets=50),
    "equal but for 1.02, 5,000 rows": Case(
        partial(shifted, ratio=1.02, noise=0.6, rows=5000),
        answer="negligible",
        at_least=1.0,
        data_sets=10,
    ),
    "ratio 1.02, same 5,000 prompts, 0.8": Case(
        partial(paired, correlation=0.8, effect=np.log(1.02) / 0.6, rows=5000),
        answer="negligible",
        at_least=0.7,
        data_sets=100,
    ),
    "same prompts, saturating, AUROC 0.75": _null(
        paired, correlation=0.8, effect=0.0, auroc=0.75, noise=0.05, relation="saturating"
    ),
}


CASES = {
    name: dataclasses.replace(case, seed=number)
    for number, (name, case) in enumerate(_CASES.items())
}


def share_of_yes(
    auroc: float, noise: float, relation: str, effect: float, data_sets: int = DATA_SETS
) -> float:
    """Of simulated data sets of independent rows."""
    draw = partial(independent, auroc=auroc, noise=noise, relation=relation, effect=effect)
    seed = int(1000 * auroc + 100 * noise)
    return Case(draw, seed=seed).answers(data_sets).get("yes", 0.0)


def share_of_wrong_reports(reports: int = DATA_SETS, comparisons: int = 8) -> float:
    """Of reports on groups that do not differ, those that say "yes" of some statistic."""
    wrong = 0
    for number in range(reports):
        rng = np.random.default_rng((DATA_SETS, number))
        found = settled([_comparison(rng) for _ in range(comparisons)])
        wrong += any((one.table["beyond_length"] == "yes").any() for one in found)
    return wrong / reports


def _comparison(rng: np.random.Generator) -> Comparison:
    drawn = [independent(rng) for _ in HEADLINE]
    none = pd.DataFrame()
    return Comparison(
        run=RunValues("", "", {}, [], none, none, none, pd.Series(dtype=float)),
        high="high",
        low="low",
        table=pd.DataFrame(HEADLINE, columns=["statistic", "projection"]),
        effects={name: one.effect for name, one in zip(HEADLINE, drawn, strict=True)},
        loss_effects={},
        length_auroc=0.6,
        loss_auroc=0.5,
        matched=drawn[0].matched,
        balance=pd.DataFrame(),
        equal_run=None,
        equal_matched=None,
        cut=0,
        primary="matched",
        negligible=0.1,
    )


def main(_: list[str]) -> None:
    """Prints one row per relation and noise, then one per case."""
    data_sets = flags.FLAGS.data_sets
    columns = [(0.0, auroc) for auroc in AUROCS] + [(0.5, auroc) for auroc in AUROCS[:2]]
    print(f"{'yes, of':17}{'length alone, AUROC':32}effect of 0.5, AUROC")
    print(f"{data_sets:<3}{'noise':>12}" + "".join(f"{auroc:8}" for _, auroc in columns))
    for relation in RELATIONS:
        for noise in NOISES:
            cells = [
                f"{share_of_yes(auroc, noise, relation, effect, data_sets):8.1%}"
                for effect, auroc in columns
            ]
            print(f"{relation:10}{noise:5}" + "".join(cells), flush=True)
    print(f"\n{'':36}{'yes':>7}{'negl.':>7}{'no':>7}{'undec.':>7}  bound")
    for name, case in CASES.items():
        answers = case.answers(min(data_sets, case.data_sets))
        shares = [answers.get(a, 0.0) for a in ("yes", "negligible", "no", "undecided")]
        print(f"{name:36}" + "".join(f"{s:7.1%}" for s in shares) + f"  {case.bound}", flush=True)
    drawn = independent(np.random.default_rng(0), rows=100_000)
    begun = time.perf_counter()
    pairs = len(drawn.matched.pairs)
    seconds = time.perf_counter() - begun
    wrong = share_of_wrong_reports(data_sets)
    print(f"{'8 comparisons, some yes in a report':36}{wrong:7.1%}{'':21}  yes <= 5%")
    print(f"\n100,000 rows a side: {pairs:,} pairs in {seconds:.1f} s")


if __name__ == "__main__":
    start(main)
