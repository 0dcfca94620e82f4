"""A report as one HTML file that fetches nothing and in which data stays data.

Texts of the data may hold anything. Three fences keep them text: jinja2 escapes what stands in the
page, the page's own script adds the rows of examples as text only, and a Content-Security-Policy
lets nothing else run and nothing load.
"""

import base64
import bisect
import dataclasses
import hashlib
import numbers
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import pandas as pd
from jinja2.utils import htmlsafe_json_dumps

from gradjax import strict_json
from gradjax.storage.filesystem import whole_file

PAGE_BYTES = 14_000_000  # what texts are cut for
MOST_EXAMPLES = 10_000  # rows listed
_MOST_REASONS = 200  # for not using rows
_MOST_CHARACTERS = 500  # of one
_TEXTS = ["instruction", "output"]
_MISSING = "–"


@dataclasses.dataclass(frozen=True)
class Table:
    """A table with what is to be said about it. The frame's index is not shown."""

    heading: str
    note: str
    frame: pd.DataFrame


@dataclasses.dataclass(frozen=True)
class FigureImage:
    """A drawing; `caption` also stands for it where it cannot be seen."""

    caption: str
    svg: bytes


@dataclasses.dataclass(frozen=True)
class Page:
    """What a report says, in the order in which the page shows it.

    `answers` has a line per comparison, `verdicts` a sentence. `examples` has the columns group,
    example_id, status, reason, num_tokens, num_target_tokens, truncated, loss, effective_rank,
    nuclear_norm, instruction and output, null where unknown; `outliers` has `why` besides.
    `not_used` has group, status, reason and rows.
    """

    title: str
    answers: pd.DataFrame
    verdicts: Sequence[str]
    overview: Sequence[FigureImage]  # what the verdicts rest on
    rule: str  # by which the verdicts are found; paragraphs are set apart by empty lines
    tables: Sequence[Table]
    figures: Sequence[FigureImage]
    examples: pd.DataFrame
    outliers: pd.DataFrame
    not_used: pd.DataFrame
    manifest: Mapping[str, Any]


def write_page(path: Path, page: Page) -> None:
    """Writes a report's page, whole or not at all, of at most `PAGE_BYTES`.

    Texts of examples are cut, all to the same number of characters, and examples beyond
    `MOST_EXAMPLES` are thinned evenly; the page says both. Only tables and figures of more than
    `PAGE_BYTES` by themselves make a larger page.

    Raises:
      GradjaxError: if the file cannot be written.
    """
    with whole_file(path, "output_dir") as temporary:
        temporary.write_text(render(page), encoding="utf-8")


def render(page: Page) -> str:
    """The page's HTML."""
    listed = _thinned(page.examples)
    both = pd.concat([listed[_TEXTS], page.outliers[_TEXTS]]).to_numpy().ravel()
    texts = [text for text in both if not pd.isna(text)]

    def html(characters: int) -> str:
        return _ENVIRONMENT.get_template("page.html").render(
            page=page,
            examples=_listing(listed, characters),
            outliers=_listing(page.outliers, characters),
            listed=len(listed),
            reasons=_MOST_REASONS,
            characters=characters,
            texts=len(texts),
            cut=sum(len(text) > characters for text in texts),
        )

    left = PAGE_BYTES - len(html(0).encode())
    return html(_characters_that_fit(texts, left))


def visible(text: str) -> str:
    """A text whose control characters are spelled out: they neither act nor turn text around.

    Newline and tab stay. So do letters of any direction, and the marks that go with them.
    """
    return _INVISIBLE.sub(lambda found: ascii(found[0])[1:-1], text)


# C0, C1, surrogates without a partner, and the explicit directions of Unicode's annex 9.
_INVISIBLE = re.compile(r"[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


class _Column(NamedTuple):
    """A column of the lists of examples."""

    label: str
    kind: str


_COLUMNS = {
    "group": _Column("group", "text"),
    "example_id": _Column("row", "count"),
    "why": _Column("why", "text"),
    "status": _Column("status", "text"),
    "reason": _Column("reason", "text"),
    "num_tokens": _Column("tokens", "count"),
    "num_target_tokens": _Column("target tokens", "count"),
    "truncated": _Column("truncated", "flag"),
    "loss": _Column("loss, nats per token", "number"),
    "effective_rank": _Column("effective rank", "number"),
    "nuclear_norm": _Column("nuclear norm", "number"),
}
_READ: dict[str, Callable[[Any], object]] = {
    "count": int,
    "flag": bool,
    "number": lambda value: float(f"{value:.6g}"),
}


class _Listing(NamedTuple):
    """A list of examples as the page's script reads it."""

    columns: list[_Column]
    rows: str  # JSON: per example its columns, instruction and output; safe where it stands


def _listing(examples: pd.DataFrame, characters: int) -> _Listing:
    names = [name for name in _COLUMNS if name in examples]
    values = [_values(examples[name], _COLUMNS[name].kind, _MOST_CHARACTERS) for name in names]
    values += [_values(examples[name], "text", characters) for name in _TEXTS]
    rows = list(zip(*values, strict=True))
    return _Listing([_COLUMNS[name] for name in names], _embedded(rows))


def _values(column: Iterable[Any], kind: str, characters: int) -> list[object]:
    if kind == "text":
        return [None if pd.isna(text) else _cut(text, characters) for text in column]
    return [
        None if pd.isna(value) or abs(value) == np.inf else _READ[kind](value) for value in column
    ]


def _cut(text: str, characters: int) -> str:
    return visible(text if len(text) <= characters else text[:characters] + "…")


def _characters_that_fit(texts: Sequence[str], budget: int) -> int:
    """To how many characters the texts must be cut to take at most `budget` bytes in the page."""

    def too_many(characters: int) -> bool:
        left = budget
        for text in texts:
            left -= len(_embedded(_cut(text, characters)).encode())
            if left < 0:
                return True
        return False

    longest = max(map(len, texts), default=0)
    return bisect.bisect_left(range(1, longest + 1), True, key=too_many)


def _thinned(examples: pd.DataFrame) -> pd.DataFrame:
    if len(examples) <= MOST_EXAMPLES:
        return examples
    return examples.iloc[np.linspace(0, len(examples) - 1, MOST_EXAMPLES).round().astype(int)]


def _embedded(value: object) -> str:
    """JSON for a `<script>` that is data: with no `<`, nothing in it ends or opens an element."""
    return htmlsafe_json_dumps(value, dumps=_compact_json)


def _compact_json(value: object) -> str:
    return strict_json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _cell(value: Any) -> str:
    if pd.isna(value):
        return _MISSING
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
        return f"{value:#.4g}".rstrip(".")
    return _cut(str(value), _MOST_CHARACTERS)


def _numeric(frame: pd.DataFrame) -> list[bool]:
    return [dtype.kind in "iuf" for dtype in frame.dtypes]


def _sha256(text: str) -> str:
    """As a Content-Security-Policy names the inline styles and scripts that it lets through."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    finalize=lambda value: visible(value) if type(value) is str else value,
)
_ENVIRONMENT.filters |= {
    "base64": lambda data: base64.b64encode(data).decode(),
    "cell": _cell,
    "json": lambda value: strict_json.dumps(value, indent=2, ensure_ascii=False, default=str),
    "numeric": _numeric,
    "sha256": _sha256,
}
