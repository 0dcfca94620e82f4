"""InsTag and Difficulty: a chat model reads a row's instruction and says how much is in it.

InsTag (Lu et al., 2023) tags an instruction with the intentions behind it; the score is the
number of tags. Difficulty is a rating from 1 to 10. Both read only the instruction (of a
conversation, all before its last answer). The prompts are gradjax's own. What is no clear answer
is asked for again, up to three times in all, and never guessed: such a row has no score, and its
reason starts with `judge: `.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gradjax.errors import GradjaxError
from gradjax.hashing import sha256
from gradjax.score.answers import Failure, open_cache
from gradjax.score.budget import estimated_tokens
from gradjax.score.config import Done, JudgedMetric, Score, nobody
from gradjax.structs import Example

if TYPE_CHECKING:
    from gradjax.score.endpoint import Judge

PLACEHOLDER = "{instruction}"

_RATING_KEYS = ("difficulty", "difficulty_score", "score", "rating")
# A rating in words is the whole first line: `7`, `**Difficulty Score: 7/10**`, `Rating is 7.`
_RATING = re.compile(
    r"(?:(?:difficulty|score|rating|level|is)(?![a-z0-9])[\s*_:=]*)*"
    r"([0-9]+(?:\.[0-9]+)?)(?:\s*(?:/|out of)\s*10)?",
    re.IGNORECASE,
)
_FENCED = re.compile(r"```\w*\n(.*?)```", re.DOTALL)
_TOKENS_OF_ANSWER: dict[JudgedMetric, int] = {"instag": 150, "difficulty": 50}

T = TypeVar("T")


def score_instag(
    judge: "Judge", examples: Sequence[Example], *, done: Done = nobody
) -> list[Score]:
    """The column `instag`: how many different tags the judge gives.

    Tags are compared as `parse_tags` writes them. The paper's reference code counts `"tag":` in
    the answer, which makes the tags of an error message 0: here they are null.

    Args:
      judge: who is asked, perhaps with a prompt of the user's.
      examples: of status `ok`.

    Returns:
      One score per example, in order; null with a reason where the judge gave none.

    Raises:
      GradjaxError: as `Judge.ask` does.
    """
    tags = judge.ask([*prompts_of(judge, "instag", examples)], parse_tags, done)
    return [_score("instag", answer, len) for answer in tags]


def score_difficulty(
    judge: "Judge", examples: Sequence[Example], *, done: Done = nobody
) -> list[Score]:
    """The column `difficulty`: the judge's rating from 1 to 10. See `score_instag`."""
    ratings = judge.ask([*prompts_of(judge, "difficulty", examples)], parse_difficulty, done)
    return [_score("difficulty", answer, float) for answer in ratings]


def judged_tags(judge: "Judge", examples: Sequence[Example]) -> list[list[str] | None]:
    """The tags behind `instag`, from the cache alone; None for a row without."""
    prompts = prompts_of(judge, "instag", examples)
    with open_cache(judge.cache, read_only=True) as cache:
        return [judge.cached(cache, prompt, parse_tags) for prompt in prompts]


def tag_coverage(tags: Iterable[Sequence[str] | None]) -> int:
    """The tag vocabulary of a set: how many different tags its rows have."""
    return len({tag for row in tags for tag in row or ()})


def parse_tags(answer: str) -> list[str] | None:
    """The different tags in an answer, in lower case, `-`, `_` and `/` as spaces.

    Takes JSON alone, in a fence or with text around it: a list, or an object with a list under
    `tags`, of strings or of objects with a `tag`. None for anything else, and for no tags.
    """
    found = [tags for value in _json_values(answer) if (tags := _tags(value))]
    return found[0] if found and all(tags == found[0] for tags in found) else None


def parse_difficulty(answer: str) -> float | None:
    """The rating in an answer, as JSON or as a first line that holds nothing else.

    Takes a number, or an object with one under `difficulty`, `score` or `rating`; from 1 to 10.
    None for anything else: a range, two ratings that differ, a number outside.
    """
    first_line, _, rest = _after_thinking(answer).strip().partition("\n")
    numbered = rest and re.fullmatch(r"\d+\.", first_line.strip())  # a list's first item
    values = [*_json_values(answer), "" if numbered else first_line]
    found = {rating for value in values for rating in _ratings(value)}
    rating = found.pop() if len(found) == 1 else None
    return float(rating) if rating is not None and 1 <= rating <= 10 else None


def read_prompt(path: str | Path) -> str:
    """The prompt in a user's file.

    Raises:
      GradjaxError: if it cannot be read, or {instruction} is not in it.
    """
    try:
        prompt = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise GradjaxError(f"--judge_prompt={path} cannot be read as text ({error})") from error
    if PLACEHOLDER not in prompt:
        raise GradjaxError(
            f"--judge_prompt={path} has no {PLACEHOLDER}: expected it where the row's instruction "
            "is to stand"
        )
    return prompt


@dataclasses.dataclass(frozen=True)
class JudgePlan:
    """What judging takes at least: unusable answers are asked for up to twice more."""

    metric: JudgedMetric
    rows: int
    cached: int
    given_up: int
    requests: int  # equal prompts are one
    prompt_characters: int  # of the requests

    @property
    def input_tokens(self) -> int:
        """Estimated."""
        return estimated_tokens(self.prompt_characters)

    @property
    def output_tokens(self) -> int:
        """Estimated from answers of this form; a model that thinks first writes many more."""
        return self.requests * _TOKENS_OF_ANSWER[self.metric]

    def cost(self, price_in: float, price_out: float) -> float:
        """In the currency of the prices, which are per million tokens."""
        return (self.input_tokens * price_in + self.output_tokens * price_out) / 1e6

    def __str__(self) -> str:
        return (
            f"{self.metric}: {self.rows:,} rows, {self.cached:,} of them answered before and "
            f"{self.given_up:,} given up, {self.requests:,} requests, about "
            f"{self.input_tokens:,} tokens in ({self.prompt_characters:,} characters / 4) and "
            f"{self.output_tokens:,} out"
        )


def plan_judging(judge: "Judge", metric: JudgedMetric, examples: Sequence[Example]) -> JudgePlan:
    """What a metric would ask of the endpoint; asks and writes nothing."""
    prompts = prompts_of(judge, metric, examples)
    cached, given_up, missing = 0, 0, {}
    with open_cache(judge.cache, read_only=True) as cache:
        for prompt in prompts:
            answer = judge.known(cache, prompt, PARSERS[metric])
            if answer is None:
                missing[judge.key(prompt)] = len(prompt)
            elif isinstance(answer, Failure):
                given_up += 1
            else:
                cached += 1
    return JudgePlan(metric, len(examples), cached, given_up, len(missing), sum(missing.values()))


def own_prompt(metric: JudgedMetric) -> str:
    """What a metric asks by default, with {instruction} in it."""
    return (Path(__file__).parent / "prompts" / f"{metric}.txt").read_text(encoding="utf-8")


def prompts_of(judge: "Judge", metric: JudgedMetric, examples: Sequence[Example]) -> Iterator[str]:
    """What the judge is asked about each example."""
    prompt = own_prompt(metric) if judge.prompt is None else judge.prompt
    return (fill(prompt, example.instruction) for example in examples)


def fill(prompt: str, text: str) -> str:
    """A prompt with a row's text in place of {instruction}, between tags that it cannot close.

    The name of the tags holds a code that comes from the text and is not in it: equal texts make
    equal prompts. One pass: what a row holds is not looked into, not even for the placeholder.
    """
    code = sha256(text)[:16]
    while code in text:
        code = sha256(code)[:16]
    return prompt.replace(PLACEHOLDER, f"<text-{code}>\n{text}\n</text-{code}>")


PARSERS: dict[str, Callable[[str], Any]] = {"instag": parse_tags, "difficulty": parse_difficulty}


def _score(column: JudgedMetric, answer: T | Failure, value: Callable[[T], float]) -> Score:
    if not isinstance(answer, Failure):
        return Score({column: value(answer)})
    return Score({column: None}, reason=f"judge: {answer.kind} ({answer.reason})")


def _json_values(answer: str) -> Iterator[Any]:
    """The JSON in an answer: the whole, in fences, or from the first bracket to the last."""
    text = _after_thinking(answer)
    if (whole := _json(text)) is not None:
        yield whole
        return
    first = re.search(r"[\[{]", text)
    last = max(text.rfind("]"), text.rfind("}"))
    texts = _FENCED.findall(text) or ([text[first.start() : last + 1]] if first else [])
    yield from (value for text in texts if (value := _json(text)) is not None)


def _json(text: str) -> Any:
    """Parsed JSON; None where there is none, or an object has a key twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        return None


def _after_thinking(answer: str) -> str:
    # Local servers leave what a model thinks in its answer.
    return answer.rpartition("</think>")[2]


def _tags(value: Any) -> list[str]:
    items = value.get("tags", [value]) if isinstance(value, dict) else value
    if not isinstance(items, list):
        return []
    names = [item.get("tag") if isinstance(item, dict) else item for item in items]
    if not all(isinstance(name, str) for name in names):
        return []
    words = [re.sub(r"[\s/_-]+", " ", str(name).casefold()).strip() for name in names]
    return [tag for tag in dict.fromkeys(words) if tag]


def _ratings(value: Any) -> list[int | float]:
    """The numbers that a JSON value gives as ratings."""
    if isinstance(value, dict):
        found = [value[key] for key in _RATING_KEYS if key in value]
        return [rating for one in found if not isinstance(one, dict) for rating in _ratings(one)]
    if isinstance(value, str):
        found = _RATING.fullmatch(value.lstrip("#*_ ").rstrip("*_. \t\r"))
        return [float(found[1])] if found else []
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return [value]
    return []
