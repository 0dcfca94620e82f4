"""A judge's requests and answers as files of the Batch API, half the price of asking one by one."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gradjax import strict_json
from gradjax.errors import GradjaxError
from gradjax.score.answers import Failure, content_of, keep, open_cache, shorten, unparsable
from gradjax.score.config import JudgedMetric
from gradjax.score.judge import PARSERS, prompts_of
from gradjax.storage.filesystem import whole_file
from gradjax.structs import Example

if TYPE_CHECKING:
    from gradjax.score.endpoint import Judge

_CUSTOM_ID = re.compile("([a-z]+)-([0-9a-f]{32})")


def batch_line(judge: "Judge", label: str, prompt: str) -> str:
    """A line of a Batch-API file. `label`: letters that come back with the answer."""
    return strict_json.dumps(
        {
            "custom_id": f"{label}-{judge.key(prompt)}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": judge.body(prompt),
        }
    )


def batch_answer(line: bytes) -> tuple[str, str, str | Failure]:
    """(Label, key, answer) in a line of a Batch API's results, whatever it holds."""
    try:
        result = json.loads(line)
    except (ValueError, RecursionError):
        return "", "", Failure(f"not JSON: {shorten(line)}", answered=False)
    match result:
        case {"custom_id": str(name)} if found := _CUSTOM_ID.fullmatch(name):
            label, key = found.groups()
        case _:
            return "", "", Failure(f"no custom_id of gradjax: {shorten(result)}", answered=False)
    match result:
        case {"error": error} if error:
            return label, key, Failure(shorten(error), answered=False)
        case {"response": {"status_code": 200, "body": body}}:
            return label, key, content_of(body)
        case {"response": {"status_code": status, "body": {"error": {"message": said}}}}:
            return label, key, Failure(f"HTTP {status}: {shorten(said)}", answered=False)
    return label, key, Failure(f"no response: {shorten(result)}", answered=False)


def batch_lines(judge: "Judge", metric: JudgedMetric, examples: Sequence[Example]) -> Iterator[str]:
    """Lines of a Batch-API file: a metric's requests whose answers are not in the cache."""
    seen = set()
    with open_cache(judge.cache, read_only=True) as cache:
        for prompt in prompts_of(judge, metric, examples):
            key = judge.key(prompt)
            if key not in seen and judge.cached(cache, prompt, PARSERS[metric]) is None:
                seen.add(key)
                yield batch_line(judge, metric, prompt)


def write_batch(path: str | Path, lines: Iterable[str]) -> None:
    """Makes or replaces a file of lines, at once.

    Raises:
      GradjaxError: if it cannot be written.
    """
    with whole_file(Path(path).expanduser(), "judge_batch") as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_batch_results(judge: "Judge", path: str | Path) -> tuple[int, list[str]]:
    """Puts the answers of a Batch-API results file into the cache.

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
            metric, key, content = batch_answer(line)
            parse = PARSERS.get(metric)
            if isinstance(content, str) and (not parse or parse(content) is None):
                content = unparsable(content)
            if isinstance(content, Failure):
                faults.append(f"{path} line {number} ({metric} {key}): {content.reason}")
            else:
                keep(cache, key, content)
                kept += 1
    return kept, faults
