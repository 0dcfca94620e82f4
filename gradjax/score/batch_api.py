"""A judge's requests and answers as files of the Batch API, half the price of asking one by one."""

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradjax import strict_json
from gradjax.errors import GradjaxError
from gradjax.score.answers import (
    Failure,
    content_of,
    keep,
    keep_unusable,
    open_cache,
    shorten,
    unparsable,
)
from gradjax.score.config import JudgedMetric
from gradjax.score.judge import PARSERS, prompts_of
from gradjax.storage.filesystem import whole_file
from gradjax.structs import Example

if TYPE_CHECKING:
    from gradjax.score.endpoint import Judge

_CUSTOM_ID = re.compile("([a-z]+)-([0-9a-f]{32})-([0-9])")


def batch_line(judge: "Judge", label: str, prompt: str, attempts: int) -> str:
    """A line of a Batch-API file.

    Args:
      judge: who is asked.
      label: letters that come back with the answer.
      prompt: the message.
      attempts: how many gave nothing usable before; comes back, too.
    """
    return strict_json.dumps(
        {
            "custom_id": f"{label}-{judge.key(prompt)}-{attempts}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": judge.body(prompt, attempts),
        }
    )


@dataclasses.dataclass(frozen=True)
class BatchAnswer:
    """What a line of a Batch API's results says, and to which request."""

    answer: str | Failure
    label: str = ""
    key: str = ""
    attempts: int = 0  # before this one


def batch_answer(line: bytes) -> BatchAnswer:
    """The answer in a line of a Batch API's results, whatever it holds."""
    try:
        result = json.loads(line)
    except (ValueError, RecursionError):
        return BatchAnswer(Failure("no answer", f"not JSON: {shorten(line)}"))
    match result:
        case {"custom_id": str(name)} if found := _CUSTOM_ID.fullmatch(name):
            label, key, attempts = found.groups()
            return BatchAnswer(_answer(result), label, key, int(attempts))
    said = f"no custom_id as gradjax writes it now: {shorten(result)}"
    return BatchAnswer(Failure("no answer", said))


def _answer(result: dict[str, Any]) -> str | Failure:
    match result:
        case {"error": error} if error:
            said = shorten(error)
        case {"response": {"status_code": 200, "body": body}}:
            return content_of(body)
        case {"response": {"status_code": status, "body": {"error": {"message": message}}}}:
            said = f"HTTP {status}: {shorten(message)}"
        case _:
            said = f"no response: {shorten(result)}"
    return Failure("no answer", said)


def batch_lines(judge: "Judge", metric: JudgedMetric, examples: Sequence[Example]) -> Iterator[str]:
    """Lines of a Batch-API file: a metric's requests whose answers are not in the cache."""
    seen = set()
    with open_cache(judge.cache, read_only=True) as cache:
        for prompt in prompts_of(judge, metric, examples):
            key = judge.key(prompt)
            if key not in seen and judge.known(cache, prompt, PARSERS[metric]) is None:
                seen.add(key)
                yield batch_line(judge, metric, prompt, judge.attempts(cache, prompt))


def write_batch(path: str | Path, lines: Iterable[str]) -> None:
    """Makes or replaces a file of lines, at once.

    Raises:
      GradjaxError: if it cannot be written.
    """
    with whole_file(Path(path).expanduser(), "judge_batch") as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_batch_results(judge: "Judge", path: str | Path) -> tuple[int, list[str]]:
    """Puts the answers of a Batch-API results file into the cache, and notes unusable ones.

    Returns:
      How many there were, and of each other line its number, its request and its fault.

    Raises:
      GradjaxError: if the file cannot be read, or the cache not be written.
    """
    kept, faults = 0, []
    try:
        lines = Path(path).expanduser().read_bytes().splitlines()
    except OSError as error:
        raise GradjaxError(
            f"--judge_batch_results={path} cannot be read ({error.strerror}): give the results "
            "file of the batch"
        ) from error
    with open_cache(judge.cache) as cache:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            found = batch_answer(line)
            answer, parse = found.answer, PARSERS.get(found.label)
            if isinstance(answer, str) and (not parse or parse(answer) is None):
                answer = unparsable(answer)
            if isinstance(answer, str):
                keep(cache, found.key, answer)
                kept += 1
                continue
            if answer.kind == "no usable answer":  # read twice, it counts once
                attempts = found.attempts + 1
                keep_unusable(cache, found.key, judge.max_tokens, attempts, answer.reason)
            faults.append(f"{path} line {number} ({found.label} {found.key}): {answer.reason}")
    return kept, faults
