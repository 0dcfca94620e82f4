"""The judge's answers, kept in an SQLite file as they come: each is paid for once."""

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from gradjax.errors import GradjaxError


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
