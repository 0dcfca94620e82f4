"""What a judge's reply says, and its answers, kept in an SQLite file: each is paid for once.

Neither the answers nor what is said of them holds the key of the endpoint.
"""

import contextlib
import dataclasses
import os
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from gradjax.errors import GradjaxError

KEY_VARIABLE = "OPENAI_API_KEY"


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why there is nothing to use."""

    reason: str
    answered: bool  # by the model; False where the endpoint is at fault, and nothing was paid


@contextlib.contextmanager
def open_cache(path: Path, read_only: bool = False) -> Iterator[sqlite3.Connection]:
    """The cache, each statement of which is a transaction of its own.

    Raises:
      GradjaxError: if the file cannot be used.
    """
    # To read a cache that is not there is no reason to make one.
    mode = "rwc"
    if read_only:
        mode = "ro" if path.exists() else "memory"
    file = f"{path.absolute().as_uri()}?mode={mode}"
    try:
        # Another process may be writing.
        connection = sqlite3.connect(file, timeout=60, isolation_level=None, uri=True)
        with contextlib.closing(connection) as cache:
            if mode != "ro":
                cache.execute(
                    "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, content TEXT)"
                )
            yield cache
    except sqlite3.Error as error:
        raise GradjaxError(
            f"the judge's answers cannot be kept in {path} ({error}): free the disk, give another "
            "--output_dir, or remove the file if it is damaged"
        ) from error


def keep(cache: sqlite3.Connection, key: str, content: str) -> None:
    """Puts an answer into the cache; it is on disk on return."""
    cache.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", [key, content])


def content_of(reply: object) -> str | Failure:
    """The text in a chat completion; a Failure where there is none, or not all of it.

    Args:
      reply: parsed JSON, whatever it is.
    """
    match reply:
        case {"choices": [{"message": {"refusal": str(refusal)}}, *_]} if refusal:
            return Failure(f"refused: {shorten(refusal)}", answered=True)
        case {"choices": [{"finish_reason": "length" | "content_filter" as reason}, *_]}:
            return Failure(f"finish_reason {reason}", answered=True)
        case {"choices": [{"message": {"content": str(content)}}, *_]} if content.strip():
            return _without_key(_text(content))
        case {"choices": [{"message": {}}, *_]}:
            return Failure("empty", answered=True)
    return Failure(f"the reply is no chat completion: {shorten(reply)}", answered=False)


def unparsable(content: str) -> Failure:
    """What an answer is called that says nothing of what was asked for."""
    return Failure(f"unparsable: {shorten(content)}", answered=True)


def shorten(said: object) -> str:
    """Something that came from outside as one short printable line, without the key."""
    text = " ".join(_without_key(_text(str(said))).split())
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return text if len(text) <= 200 else text[:200] + "…"


def _text(said: str) -> str:
    """The same without halves of surrogate pairs, which no file can hold."""
    return said.encode("utf-8", "replace").decode()


def _without_key(text: str) -> str:
    # What is shorter is a placeholder, such as EMPTY, and may well be meant.
    key = api_key()
    return text.replace(key, "(key)") if len(key) >= 8 else text


def api_key() -> str:
    """The key; empty where there is none."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not re.fullmatch("[!-~]*", key):
        raise GradjaxError(
            f"{KEY_VARIABLE} holds a space or another character that no key has: set it to the key "
            "alone"
        )
    return key
