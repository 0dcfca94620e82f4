"""What a judge's reply says, and its answers, kept in an SQLite file: each is paid for once.

Of replies that cannot be used the file has their number: a row is given up after a few. Neither
the answers nor what is said of them holds the key of the endpoint.
"""

import contextlib
import dataclasses
import os
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from absl import logging

from gradjax.errors import GradjaxError

KEY_VARIABLE = "OPENAI_API_KEY"

# Of the file. Before, keys did not know the endpoint.
_VERSION = 2
_TABLES = (
    "answers (key TEXT PRIMARY KEY, content TEXT)",
    "unusable (key TEXT, max_tokens INTEGER, attempts INTEGER, reason TEXT, "
    "PRIMARY KEY (key, max_tokens))",
)


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why there is nothing to use.

    `no answer`: the endpoint is at fault, and nothing was paid. `no usable answer`: the model is.
    `given up`: the model was, for the last time. `not asked`: the budget does not allow it.
    """

    kind: Literal["no answer", "no usable answer", "given up", "not asked"]
    reason: str


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
            if _version(cache) < _VERSION:
                # In a file that may only be read, tables of the connection hide those of the file.
                _make_tables(cache, path, temporary=read_only)
            yield cache
    except sqlite3.Error as error:
        raise GradjaxError(
            f"the judge's answers cannot be kept in {path} ({error}): free the disk, give another "
            "--output_dir, or remove the file if it is damaged"
        ) from error


def _version(cache: sqlite3.Connection) -> int:
    return cache.execute("PRAGMA user_version").fetchone()[0]


def _make_tables(cache: sqlite3.Connection, path: Path, temporary: bool) -> None:
    """Makes the tables, empty; those of an earlier gradjax stay in the file under another name."""
    if temporary:
        for table in _TABLES:
            cache.execute(f"CREATE TEMPORARY TABLE {table}")
        return
    cache.execute("BEGIN IMMEDIATE")
    with cache:
        if _version(cache) == _VERSION:  # made by another process meanwhile
            return
        if cache.execute("SELECT 1 FROM sqlite_master WHERE name = 'answers'").fetchone():
            cache.execute("ALTER TABLE answers RENAME TO answers_of_unknown_endpoints")
            logging.warning(
                "%s holds answers of an earlier gradjax, which do not say what endpoint gave them: "
                "they stay in the table answers_of_unknown_endpoints, and the judge is asked anew",
                path,
            )
        for table in _TABLES:
            cache.execute(f"CREATE TABLE {table}")
        cache.execute(f"PRAGMA user_version = {_VERSION}")


def keep(cache: sqlite3.Connection, key: str, content: str) -> None:
    """Puts an answer into the cache; it is on disk on return."""
    cache.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", [key, content])


def keep_unusable(
    cache: sqlite3.Connection, key: str, max_tokens: int, attempts: int, reason: str
) -> None:
    """Notes that so many attempts at an answer gave nothing usable, and why the last did not."""
    cache.execute(
        "INSERT INTO unusable VALUES (?, ?, ?, ?) ON CONFLICT (key, max_tokens) "
        "DO UPDATE SET attempts = max(attempts, excluded.attempts), reason = excluded.reason",
        [key, max_tokens, attempts, reason],
    )


def unusable(cache: sqlite3.Connection, key: str, max_tokens: int) -> tuple[int, str]:
    """How many attempts gave nothing usable, and why; 0 where answers may be longer now."""
    found = cache.execute(
        "SELECT attempts, reason FROM unusable WHERE key = ? AND max_tokens >= ? "
        "ORDER BY attempts DESC LIMIT 1",
        [key, max_tokens],
    )
    return found.fetchone() or (0, "")


def content_of(reply: object) -> str | Failure:
    """The text in a chat completion; a Failure where there is none, or not all of it.

    Args:
      reply: parsed JSON, whatever it is.
    """
    match reply:
        case {"choices": [{"message": {"refusal": str(refusal)}}, *_]} if refusal:
            return Failure("no usable answer", f"refused: {shorten(refusal)}")
        case {"choices": [{"finish_reason": "length" | "content_filter" as reason}, *_]}:
            return Failure("no usable answer", f"finish_reason {reason}")
        case {"choices": [{"message": {"content": str(content)}}, *_]} if content.strip():
            return _without_key(_text(content))
        case {"choices": [{"message": {}}, *_]}:
            return Failure("no usable answer", "empty")
    return Failure("no answer", f"the reply is no chat completion: {shorten(reply)}")


def unparsable(content: str) -> Failure:
    """What an answer is called that says nothing of what was asked for."""
    return Failure("no usable answer", f"unparsable: {shorten(content)}")


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
