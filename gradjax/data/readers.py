"""Files of rows: JSON, JSON Lines, CSV and Parquet, compressed or not, here or in an object store.

Files are read as a stream. A line that cannot be read keeps its place as a `BadRow`; faults of a
whole file are raised.
"""

import codecs
import csv
import dataclasses
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePosixPath
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from gradjax.errors import GradjaxError, first_line
from gradjax.storage.filesystem import url_to_fs

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
_CHUNK = 1 << 20  # bytes or characters read at once
_SPACE = re.compile(r"[ \t\r\n]*")
_NUMBER_TAIL = re.compile(r"[.eE+-]*")
_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # with the first, UTF-32 begins too
_LONGEST_TOKEN = 16  # characters of -Infinity or an escaped pair of surrogates
_BLANK = b" \t\r\n\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A line that is no row, and why."""

    text: str  # as it stands
    reason: str


def is_data_file(path: str) -> bool:
    """Whether a path or URL ends like a file that can be read here."""
    return _suffixes(path)[0] in _READERS


def stem(path: str) -> str:
    """A data file's name without its endings: `rows.jsonl.gz` -> `rows`."""
    kind, compression = _suffixes(path)
    return PurePosixPath(path).name.removesuffix(compression).removesuffix(kind)


def read_file(path: str, *, strict: bool = False) -> Iterator[object]:
    """The rows of a file, in order; `path` may be a URL.

    Args:
      strict: raise for a line that cannot be read, instead of giving a `BadRow`.

    Raises:
      GradjaxError: if the file is missing or cannot be read.
    """
    kind, compression = _suffixes(path)
    try:
        with _open(path) as raw:
            stream: Any = raw
            if compression:
                stream = pa.CompressedInputStream(raw, _COMPRESSIONS[compression])
            file = io.BufferedReader(stream)
            if kind != ".parquet" and file.peek(2)[:2] in _WIDE:
                raise GradjaxError(
                    f"{path} is UTF-16 or UTF-32, expected UTF-8: convert it, as with iconv "
                    "-f UTF-16 -t UTF-8"
                )
            for row in _READERS[kind](file, path):
                if strict and isinstance(row, BadRow):
                    raise GradjaxError(f"{path} {row.reason}.")
                yield row
    except GradjaxError:
        raise
    except FileNotFoundError as error:
        raise GradjaxError(f"There is no file {path}.") from error
    except (pa.ArrowException, OSError) as error:
        what = "Parquet" if kind == ".parquet" else (compression or "a file").lstrip(".")
        said = (isinstance(error, OSError) and error.strerror) or first_line(error)
        raise GradjaxError(f"{path} cannot be read as {what}: {said}.") from error
    except Exception as error:
        if "://" not in path:
            raise
        raise GradjaxError(  # each filesystem has errors of its own
            f"{path} cannot be read ({first_line(error)}): check the URL, and keys and endpoint in "
            "the environment."
        ) from error


def _open(path: str) -> IO[bytes]:
    if "://" not in path:
        return open(path, "rb")
    filesystem, inner = url_to_fs(path)
    return filesystem.open(inner, "rb")


def _suffixes(path: str) -> tuple[str, str]:
    """`rows.jsonl.gz` -> (".jsonl", ".gz"); the second is "" for a file that is not compressed."""
    name, last = os.path.splitext(path)
    if last in _COMPRESSIONS:
        return os.path.splitext(name)[1], last
    return last, ""


def _read_json(file: io.BufferedReader, path: str) -> Iterator[object]:
    """The elements of an array one by one; of JSON Lines in a .json file, the lines."""
    try:
        if file.peek(1).lstrip(_BLANK).startswith(b"{"):
            yield from _read_objects(file)
        else:
            with io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
                yield from _Text(text).elements()
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise GradjaxError(f"{path} is not JSON, {where}: {error.msg}.") from error
    except _NoListError as error:
        raise GradjaxError(
            f"{path} holds one {error} at its top level: expected a list of objects."
        ) from error
    except (ValueError, RecursionError) as error:
        raise GradjaxError(f"{path} cannot be read as JSON: {error}.") from error


def _read_objects(file: io.BufferedReader) -> Iterator[object]:
    """JSON Lines, if the first line is a whole object and others follow."""
    first = file.readline()
    try:
        _parse_json(first)
        whole = bool(file.peek(1).strip(_BLANK))
    except ValueError:
        whole = False
    if not whole:
        raise _no_list(_parse_json(first + file.read()))
    yield from _json_lines(itertools.chain([first], file))


def _no_list(value: object) -> "_NoListError":
    keys = f" with the keys {list(value)[:5]}" if isinstance(value, dict) else ""
    return _NoListError(f"{type(value).__name__}{keys}")


class _NoListError(Exception):
    """What stands there instead."""


class _Text:
    """A JSON text that is read piece by piece."""

    def __init__(self, file: io.TextIOBase):
        self.file, self.buffer, self.at, self.ended = file, "", 0, False
        self.lines_before, self.columns_before = 0, 0
        self.decoder = json.JSONDecoder(object_pairs_hook=_object)

    def more(self) -> bool:
        """Reads on, as much again as is there; False at the end."""
        self._forget()
        piece = self.file.read(max(_CHUNK, len(self.buffer)))
        self.buffer += piece
        self.ended = not piece
        return not self.ended

    def _forget(self) -> None:
        gone = self.buffer[: self.at]
        if lines := gone.count("\n"):
            self.lines_before += lines
            self.columns_before = 0
        self.columns_before += len(gone) - (gone.rfind("\n") + 1)
        self.buffer, self.at = self.buffer[self.at :], 0

    def next(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            self.at = _end(_SPACE.match(self.buffer, self.at))
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if not self.more():
                return ""

    def fault(self, message: str, position: int) -> json.JSONDecodeError:
        """An error at a position in the buffer, with the line and column in the whole text."""
        error = json.JSONDecodeError(message, self.buffer, position)
        if error.lineno == 1:
            error.colno += self.columns_before
        error.lineno += self.lines_before
        return error

    def value(self) -> object:
        """The next value whole."""
        self.next()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.buffer, self.at)
            except json.JSONDecodeError as error:
                # What is only cut off is faulty at the buffer's end, or has an open string.
                cut_off = error.pos + _LONGEST_TOKEN >= len(self.buffer)
                if self.ended or not (cut_off or error.msg.startswith("Unterminated string")):
                    raise self.fault(error.msg, error.pos) from None
            else:
                # A number that ends the buffer may go on: 12 of 123, 1 of 1.5e-3.
                if self.ended or not _NUMBER_TAIL.fullmatch(self.buffer, end):
                    self.at = end
                    return value
            self.more()

    def elements(self) -> Iterator[object]:
        """Those of the array that the text is."""
        if self.next() != "[":
            value = self.value()
            if self.next():
                raise self.fault("Extra data", self.at)
            raise _no_list(value)
        self.at += 1
        if self.next() != "]":
            yield self.value()
            while self.next() == ",":
                self.at += 1
                yield self.value()
        if self.next() != "]":
            raise self.fault("Expecting ',' delimiter", self.at)
        self.at += 1
        if self.next():
            raise self.fault("Extra data", self.at)


def _end(match: re.Match[str] | None) -> int:
    assert match  # the expression matches nothing, too
    return match.end()


def _read_jsonl(file: io.BufferedReader, path: str) -> Iterator[object]:
    yield from _json_lines(file)


def _json_lines(lines: Iterable[bytes]) -> Iterator[object]:
    # Lines are split as bytes: text may hold other characters that str.splitlines cuts at.
    for number, line in enumerate(lines, start=1):
        if not line.strip(_BLANK):
            continue
        try:
            yield _parse_json(line.rstrip())
        except json.JSONDecodeError as error:
            where = f"line {number} is not JSON, column {error.colno}: {error.msg}"
            yield _bad(line, f"{where}; expected one object per line")
        except (ValueError, RecursionError) as error:
            yield _bad(line, f"line {number} cannot be read as JSON: {error}")


def _bad(line: bytes, reason: str) -> BadRow:
    return BadRow(line.decode("utf-8", "backslashreplace").rstrip("\r\n"), reason)


def _read_csv(file: io.BufferedReader, path: str, delimiter: str = ",") -> Iterator[object]:
    """Rows as objects of texts, by the names in the first line."""
    csv.field_size_limit(sys.maxsize)  # the default refuses texts over 131,072 characters
    with io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            names = next(reader, [])
            if not "".join(names).strip() or len(set(names)) < len(names):
                raise GradjaxError(
                    f"{path} begins with the names {names[:8]}: expected a line with the columns' "
                    "names, each once."
                )
            for cells in reader:
                if len(cells) == len(names):
                    yield dict(zip(names, cells, strict=True))
                elif cells:  # no blank line
                    reason = f"line {reader.line_num} has {len(cells)} fields, not {len(names)}"
                    yield BadRow(delimiter.join(cells), reason)
        except (csv.Error, UnicodeDecodeError) as error:
            raise GradjaxError(
                f"{path} cannot be read as CSV, at line {max(reader.line_num, 1)}: {error}; "
                "expected UTF-8, and quotes around texts that hold commas or newlines."
            ) from error


def _read_tsv(file: io.BufferedReader, path: str) -> Iterator[object]:
    return _read_csv(file, path, "\t")


def _read_parquet(file: io.BufferedReader, path: str) -> Iterator[object]:
    try:
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches():
                yield from batch.to_pylist()
    except ValueError as error:  # texts that are no UTF-8
        raise GradjaxError(f"{path} cannot be read as Parquet: {first_line(error)}.") from error


def _parse_json(data: bytes) -> object:
    """JSON as Python writes it (NaN is accepted), without repeated keys."""
    return json.loads(data.decode("utf-8-sig"), object_pairs_hook=_object)


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        names = [key for key, _ in pairs]
        repeated = next(key for key in names if names.count(key) > 1)
        raise ValueError(f"an object has the key {repeated!r} twice")
    return keys


_READERS: dict[str, Callable[[io.BufferedReader, str], Iterator[object]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
FORMATS = f"{', '.join(list(_READERS)[:-1])} or .parquet"
