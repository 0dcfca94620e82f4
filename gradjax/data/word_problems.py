"""Word problems with worked solutions: the embedded data, and what its model learns from.

Everything is a pure function of a seed. Only `Random.random` is used, whose sequence Python
keeps the same across versions. A problem is held out, or not, by a checksum of its numbers,
so no combination of numbers that the model is evaluated on occurs in training under any
name, object or wording.
"""

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from random import Random
from typing import TypeVar

T = TypeVar("T")

DEMO_GROUPS = ("slow", "fast", "corrupted")

_ROWS_PER_GROUP = 64
_ROWS_SEED = 20250414
_HELD_OUT_SHARE = 16  # one combination of numbers in so many
_LARGEST = 60  # no number of a problem or its solution is larger

# fmt: off
_NAMES = (
    "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jack", "Kate",
    "Leo", "Maya", "Noah", "Olga", "Peter", "Quinn", "Rosa", "Sam", "Tara", "Uma", "Victor",
    "Wendy", "Zoe",
)
_OBJECTS = (
    "apples", "beads", "books", "buttons", "cards", "coins", "cookies", "crayons", "eggs",
    "flowers", "magnets", "marbles", "nuts", "oranges", "pencils", "plums", "puzzles", "shells",
    "stamps", "stickers", "stones", "tickets", "toys", "walnuts",
)
# fmt: on
_CONTAINERS = ("bags", "baskets", "boxes", "jars")
_GAINS = (
    "{name} buys {n} more.",
    "{name} finds {n} more.",
    "Then {friend} gives {name} {n} {things}.",
    "{name} gets {n} {things} as a gift.",
)
_LOSSES = (
    "{name} gives {n} to {friend}.",
    "{name} sells {n} of them.",
    "Then {name} loses {n} {things}.",
    "{friend} takes {n} of the {things}.",
)
_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda left, right: left + right,
    "-": lambda left, right: left - right,
    "*": lambda left, right: left * right,
}


@dataclasses.dataclass(frozen=True)
class Step:
    """One line of a solution, `{lead}{left} {operator} {right} = `; None: the last result."""

    lead: str
    left: int | None
    operator: str
    right: int | None

    def result(self, last: int) -> int:
        """What the step gives when the step before gave `last`."""
        left = last if self.left is None else self.left
        right = last if self.right is None else self.right
        return _OPERATIONS[self.operator](left, right)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A word problem and the steps that solve it."""

    instruction: str
    opening: str  # of the solution
    steps: tuple[Step, ...]

    @property
    def held_out(self) -> bool:
        """Whether its numbers are kept out of training."""
        key = " ".join(f"{step.left}{step.operator}{step.right}" for step in self.steps)
        return zlib.crc32(key.encode()) % _HELD_OUT_SHARE == 0

    @property
    def prompt(self) -> str:
        """What stands before the response under `--prompt_format=plain`."""
        return f"{self.instruction}\n"

    @property
    def results(self) -> list[int]:
        """The right result of each step; the last one is the answer."""
        results = [0]
        for step in self.steps:
            results.append(step.result(results[-1]))
        return results[1:]

    @property
    def slow(self) -> str:
        """The worked solution."""
        return self._solution(self.results)

    @property
    def fast(self) -> str:
        """The answer alone."""
        return _answer(self.results[-1])

    def corrupted(self, rng: Random) -> str:
        """The worked solution with every result wrong, each as many digits long as before.

        A wrong result is off by at most 9 and carried on into the next step, which is then
        wrong again: no result follows from the operands it is written after.
        """
        wrong = [0]
        for step, right in zip(self.steps, self.results, strict=True):
            excluded = (right, step.result(wrong[-1]))
            wrong.append(_pick(rng, [n for n in _lookalikes(right) if n not in excluded]))
        return self._solution(wrong[1:])

    def _solution(self, results: Sequence[int]) -> str:
        sentences = [self.opening] if self.opening else []
        last = 0
        for step, result in zip(self.steps, results, strict=True):
            left = last if step.left is None else step.left
            right = last if step.right is None else step.right
            sentences.append(f"{step.lead}{left} {step.operator} {right} = {result}.")
            last = result
        return " ".join([*sentences, _answer(last)])


def random_problem(rng: Random, *, held_out: bool) -> Problem:
    """A problem of the held-out part, or of the part for training."""
    while True:
        problem = _pick(rng, (_changes, _changes, _together))(rng)
        if problem.held_out == held_out:
            return problem


def demo_rows(group: str) -> list[dict[str, str]]:
    """The 64 rows `{"instruction", "output"}` of an embedded group.

    Row i of every group is the same held-out problem: `slow` with the worked solution,
    `fast` with the answer alone, `corrupted` with a worked solution whose results are all
    wrong and which has exactly the tokens of `slow` but for those digits.
    """
    rng = Random(_ROWS_SEED)
    problems = _different_problems(rng, _ROWS_PER_GROUP)
    outputs: dict[str, Callable[[Problem], str]] = {
        "slow": lambda problem: problem.slow,
        "fast": lambda problem: problem.fast,
        "corrupted": lambda problem: problem.corrupted(rng),
    }
    output = outputs[group]
    return [{"instruction": problem.instruction, "output": output(problem)} for problem in problems]


def mixed_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Rows `{"instruction", "output", "kind"}` of different held-out problems.

    `kind` is drawn from `slow`, `fast` and `corrupted` with equal chances; see `demo_rows`.
    """
    rng = Random(seed)
    rows = []
    for problem in _different_problems(rng, count):
        kind = _pick(rng, DEMO_GROUPS)
        output = problem.corrupted(rng) if kind == "corrupted" else getattr(problem, kind)
        rows.append({"instruction": problem.instruction, "output": output, "kind": kind})
    return rows


def _different_problems(rng: Random, count: int) -> list[Problem]:
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        problem = random_problem(rng, held_out=True)
        problems[problem.instruction] = problem
    return list(problems.values())


def answer_of(text: str) -> int | None:
    """The number that a solution ends with; None where it gives no answer."""
    number = text.rpartition("The answer is ")[2].removesuffix(".")
    return int(number) if number.isascii() and number.isdigit() else None


def _changes(rng: Random) -> Problem:
    """Someone owns some things; two or three changes, the first maybe a multiplication."""
    name, friend = _two(rng, _NAMES)
    things = _pick(rng, _OBJECTS)
    if rng.random() < 0.35:
        containers, boxes = _pick(rng, _CONTAINERS), _pick(rng, range(2, 10))
        each = _pick(rng, range(3, min(_LARGEST // boxes, 20) + 1))
        text = [f"{name} has {boxes} {containers} with {each} {things} each."]
        opening = ""
        steps = [Step(f"{name} has ", boxes, "*", each)]
        current = boxes * each
        changes = _pick(rng, (1, 2))
    else:
        current = _pick(rng, range(5, _LARGEST + 1))
        text = [f"{name} has {current} {things}."]
        opening = f"{name} starts with {current}."
        steps = []
        changes = _pick(rng, (2, 3))
    for _ in range(changes):
        gain = current < 10 or (current <= _LARGEST - 10 and rng.random() < 0.5)
        n = _pick(rng, range(2, _LARGEST - current + 1 if gain else current))
        text.append(
            _pick(rng, _GAINS if gain else _LOSSES).format(
                name=name, friend=friend, things=things, n=n
            )
        )
        first = not steps
        steps.append(Step("Then ", current if first else None, "+" if gain else "-", n))
        current += n if gain else -n
    text.append(f"How many {things} does {name} have now?")
    return Problem(" ".join(text), opening, tuple(steps))


def _together(rng: Random) -> Problem:
    """A second person owns more, fewer or times as many; how many do both own?"""
    name, friend = _two(rng, _NAMES)
    things = _pick(rng, _OBJECTS)
    operator = _pick(rng, "+-*")
    if operator == "*":
        n = _pick(rng, range(2, 6))
        own = _pick(rng, range(3, _LARGEST // (n + 1) + 1))
        comparison = f"{n} times as many {things} as"
    elif operator == "+":
        own = _pick(rng, range(5, 28))
        n = _pick(rng, range(2, _LARGEST - 2 * own + 1))
        comparison = f"{n} more {things} than"
    else:
        own = _pick(rng, range(5, 31))
        n = _pick(rng, range(2, own))
        comparison = f"{n} fewer {things} than"
    text = (
        f"{name} has {own} {things}. {friend} has {comparison} {name}. "
        f"How many {things} do {name} and {friend} have together?"
    )
    steps = (Step(f"{friend} has ", own, operator, n), Step("Together they have ", own, "+", None))
    return Problem(text, "", steps)


def _answer(number: int) -> str:
    return f"The answer is {number}."


def _lookalikes(number: int) -> range:
    """The positive numbers with as many digits and at most 9 away."""
    digits = len(str(number))
    return range(max(number - 9, 10 ** (digits - 1)), min(number + 9, 10**digits - 1) + 1)


def _pick(rng: Random, options: Sequence[T]) -> T:
    return options[int(rng.random() * len(options))]


def _two(rng: Random, options: Sequence[str]) -> tuple[str, str]:
    first = _pick(rng, options)
    return first, _pick(rng, [option for option in options if option != first])
