"""What decides which rows are chosen: the flags, parsed and checked before anything is read."""

import dataclasses
import math
import re
from decimal import Decimal

from gradjax.errors import GradjaxError

MATCHING = """pairs of a high row and one of the lower half of the rows to choose from, alike in
the lengths of response and prompt, found as gradjax report finds its pairs: rows of one prompt
first, then the nearest, of equally near ones the lowest. Equal rows count once; of several
responses to a prompt each may be in a pair. A high row without a partner is left out. Lengths are
characters of whole rows: numbers of tokens may be of cut ones"""


@dataclasses.dataclass(frozen=True)
class Term:
    """A metric and its weight."""

    metric: str
    weight: float


@dataclasses.dataclass(frozen=True)
class Amount:
    """A number of rows, or a share of the usable ones."""

    number: Decimal
    percent: bool

    def of(self, rows: int) -> int:
        """How many of `rows` that is, a share rounded down."""
        return int(self.number * rows / 100) if self.percent else int(self.number)

    def __str__(self) -> str:
        return f"{self.number}{'%' * self.percent}"


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which rows are chosen.

    Raises:
      GradjaxError: if nothing is asked for, or things that exclude each other.
    """

    by: tuple[Term, ...]
    top: Amount | None = None
    bottom: Amount | None = None
    range: tuple[float, float] | None = None
    random: Amount | None = None
    match_length: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.top or self.bottom or self.range or self.random):
            raise GradjaxError(
                "nothing is selected: expected --top, --bottom, --range or --random, as in "
                "--top=200 --bottom=200"
            )
        if self.match_length and not self.top:
            raise GradjaxError(
                "--match_length pairs high rows with low ones: expected --top with it"
            )
        if self.match_length and self.bottom not in (None, self.top):
            raise GradjaxError(
                f"--bottom={self.bottom}: with --match_length low rows are partners of those of "
                f"--top={self.top}; leave --bottom out or make it equal"
            )
        if self.seed < 0:
            raise GradjaxError(f"--seed={self.seed}: expected a number of at least 0")


def parse_terms(by: str) -> tuple[Term, ...]:
    """The metrics of `--by`, in order.

    Raises:
      GradjaxError: if one is empty or named twice, or a weight is 0 or no number.
    """
    terms = []
    for part in by.split(","):
        metric, times, weight = (text.strip() for text in part.partition("*"))
        number = _number(weight) if times else 1.0
        if not metric or not number or not math.isfinite(number):
            raise GradjaxError(
                f"--by={by}: {part!r} is not METRIC or METRIC*WEIGHT with a weight other than 0, "
                "as in effective_rank,ifd*-0.5"
            )
        if metric in [term.metric for term in terms]:
            raise GradjaxError(f"--by={by}: {metric} is named twice; give it one weight")
        terms.append(Term(metric, number))
    return tuple(terms)


def parse_amount(flag: str, text: str | None) -> Amount | None:
    """`200` or `10%`; None stays None.

    Raises:
      GradjaxError: naming the flag.
    """
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?|\.\d+)%", text.strip(), re.ASCII)
    number = Decimal(found[1] or found[2]) if found else Decimal(0)
    percent = bool(found and found[2])
    if number <= 0 or (percent and number > 100):
        raise GradjaxError(
            f"--{flag}={text}: expected a number of rows or a share of them, as in 200 or 10%"
        )
    return Amount(number, percent)


def parse_range(text: str | None) -> tuple[float, float] | None:
    """`LOW:HIGH`, either of which may be left out; None stays None.

    Raises:
      GradjaxError: if it is no such range, or an empty one.
    """
    if text is None:
        return None
    first, colon, last = text.partition(":")
    low = _number(first) if first.strip() else -math.inf
    high = _number(last) if last.strip() else math.inf
    bounded = math.isfinite(low) or math.isfinite(high)
    if not colon or not bounded or not low <= high:
        raise GradjaxError(
            f"--range={text}: expected LOW:HIGH with LOW at most HIGH, either of which may be left "
            "out, as in 0.2:0.8 or 7:"
        )
    return low, high


def _number(text: str) -> float:
    """NaN where the text is no number."""
    try:
        return float(text)
    except ValueError:
        return math.nan
