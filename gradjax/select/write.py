"""Scores and rows -> a selection's files: what `gradjax select` does."""

import dataclasses
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from absl import logging

from gradjax.config import Reading, select
from gradjax.data.examples import to_example
from gradjax.data.sources import parse_data_flags
from gradjax.errors import GradjaxError
from gradjax.select.choose import HIGH, LOW, RANDOM, RANGE, Choice, choose
from gradjax.select.rule import Rule, parse_amount, parse_range, parse_terms
from gradjax.select.sources import KEYS, LENGTHS, Scored, chosen_rows, read_scored
from gradjax.select.summary import format_summary, summarize
from gradjax.storage.directory import Directory, Kind
from gradjax.storage.filesystem import WORK, LocalPlace
from gradjax.structs import ATTENTION

SUMMARY = "summary.json"
REJECTED = "rejected.parquet"
PAIRS = "pairs.parquet"
_PARTS = [f"{part}.{kind}" for part in (HIGH, LOW, RANGE, RANDOM) for kind in ("jsonl", "parquet")]
SELECTION = Kind("a selection", SUMMARY, "gradjax select", frozenset({REJECTED, PAIRS, *_PARTS}))
_CHUNK = 1000  # rows made into a table at once
_TURN = pa.struct([("role", pa.string()), ("content", pa.string())])
_TEXTS = pa.schema(
    [("instruction", pa.string()), ("output", pa.string()), ("messages", pa.list_(_TURN))]
)


@dataclasses.dataclass(frozen=True)
class SelectConfig:
    """The flags of `gradjax select`."""

    rule: Rule
    scores: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    layers: str = "all"
    projections: tuple[str, ...] = ATTENTION
    output_dir: str | None = None
    overwrite: bool = False
    reading: Reading = dataclasses.field(default_factory=Reading)

    def __post_init__(self) -> None:
        if "://" in (self.output_dir or ""):
            raise GradjaxError(
                f"--output_dir={self.output_dir} is a URL; give a directory on this machine"
            )
        if not self.data and self.reading.texts:
            raise GradjaxError(
                "--columns, --field and --response_marker say how --data is read, which is not "
                "given; rows of --scores are read as they were scored"
            )

    @property
    def by(self) -> str:
        """The metrics with their weights, as in `--by`."""
        terms = self.rule.by
        return ",".join(t.metric if t.weight == 1 else f"{t.metric}*{t.weight}" for t in terms)

    @property
    def directory(self) -> Path:
        """Where to write."""
        if self.output_dir:
            return Path(self.output_dir).expanduser()
        return Path("selections") / re.sub(r"[^A-Za-z0-9._-]+", "-", self.by)

    @property
    def settings(self) -> dict[str, Any]:
        """What the selection depends on, beside the scores' and the rows' own contents."""
        amounts = {name: getattr(self.rule, name) for name in ("top", "bottom", "random")}
        return {
            "scores": sorted(set(self.scores)),
            "data": sorted(self.data),
            "by": self.by,
            **{name: amount and str(amount) for name, amount in amounts.items()},
            "range": self.rule.range and list(map(str, self.rule.range)),
            "match_length": self.rule.match_length,
            "layers": self.layers,
            "projections": list(self.projections),
            "seed": self.rule.seed,
            **self.reading.settings(),
        }


@dataclasses.dataclass(frozen=True)
class Written:
    """A selection: where it is, and its summary for a terminal."""

    directory: Path
    text: str


def select_rows(**settings: Any) -> Written:
    """Selects rows as `gradjax select` does and writes them.

    Args:
      **settings: as the flags of `gradjax select`: `by`, `scores` and `data` (lists), `top`,
        `bottom`, `random` (a number, or a share as in "10%"), `range`, `match_length`, `seed`,
        `output_dir`, `overwrite` and so on.

    Returns:
      Where the selection is, and its summary as text.

    Raises:
      GradjaxError: for a fault of the settings, the scores or the rows.
      TypeError: for an unknown setting.
    """
    reading = select(Reading, settings)
    texts = {name: settings.get(name) for name in ("top", "bottom", "random", "range")}
    top, bottom, random, span = (None if t is None else str(t) for t in texts.values())
    rule = Rule(
        by=parse_terms(settings["by"]),
        top=parse_amount("top", top),
        bottom=parse_amount("bottom", bottom),
        range=parse_range(span),
        random=parse_amount("random", random),
        match_length=settings.get("match_length", False),
        seed=settings.get("seed", 0),
    )
    read = {"by", *vars(rule), *vars(reading)}
    own: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in settings.items()
        if name not in read
    }
    return write_selection(SelectConfig(rule, **own, reading=reading))


def write_selection(config: SelectConfig) -> Written:
    """Chooses rows and writes them, the summary last: without it a selection is not finished.

    Raises:
      GradjaxError: if scores or rows cannot be read or do not belong together, more rows are asked
        for than there are, or the directory holds something else.
    """
    directory = Directory(config.directory, SELECTION)
    _require_free(directory, config)
    logging.info("Reading scores")
    rule = config.rule
    scored = read_scored(
        config.scores,
        parse_data_flags(config.data, config.reading),
        [term.metric for term in rule.by],
        config.layers,
        config.projections,
        lengths=rule.match_length,
    )
    choice = choose(scored.keys, scored.metrics, rule)
    chosen = np.unique(np.concatenate(list(choice.parts.values())))
    logging.info("Reading the %d rows chosen of %d", len(chosen), len(scored.keys))
    lines, characters = chosen_rows(scored, chosen)
    scored.keys.loc[list(characters), "length"] = list(characters.values())
    summary = summarize(scored, choice, rule)
    _warn_of_ties(choice)
    place = directory.place
    assert isinstance(place, LocalPlace)  # a URL is refused
    with place.lock(0):
        _write_files(place, scored, choice, lines, matched=rule.match_length)
        directory.write_manifest({"settings": config.settings, **summary})
    return Written(config.directory, format_summary(summary, config.by))


def _require_free(directory: Directory, config: SelectConfig) -> None:
    """Raises GradjaxError where a directory holds anything but a selection that may be replaced."""
    directory.require_ours()
    manifest = directory.manifest()
    if manifest is None:
        return
    there = manifest.get("settings")
    if not isinstance(there, dict):
        raise directory.damaged("it has no settings")
    if not config.overwrite:
        directory.require_same("a selection", there, config.settings)


def _write_files(
    place: LocalPlace, scored: Scored, choice: Choice, lines: Mapping[int, bytes], *, matched: bool
) -> None:
    """Writes every file but the summary aside, then puts all in their places."""
    work = place.directory / WORK
    with place.faults("write to"):
        for part, rows in choice.parts.items():
            with (work / f"{part}.jsonl").open("wb") as file:
                file.writelines(lines[row] + b"\n" for row in rows)
            _write_parquet(work / f"{part}.parquet", _part_tables(scored, choice, rows, lines))
        _write_parquet(work / REJECTED, [_rejected_table(scored, choice)])
        if matched:
            _write_parquet(work / PAIRS, [_pairs_table(scored, choice)])
        new = sorted(path.name for path in work.iterdir() if path.name != "lock")
        old = {SUMMARY, PAIRS, *_PARTS} & set(place.names()) - set(new)
        place.remove(sorted(old, key=SUMMARY.__ne__))  # the summary first: it vouches for the rest
    place.put_written(new)


def _write_parquet(path: Path, tables: Iterable[pa.Table]) -> None:
    tables = iter(tables)
    first = next(tables)
    with pq.ParquetWriter(path, first.schema, compression="zstd") as writer:
        for table in itertools.chain([first], tables):
            writer.write_table(table)


def _part_tables(
    scored: Scored, choice: Choice, rows: np.ndarray, lines: Mapping[int, bytes]
) -> Iterator[pa.Table]:
    """Keys, metrics and texts, chunk by chunk: gradjax reads them as it does the JSON lines."""
    columns = {name: scored.keys[name].iloc[rows] for name in KEYS}
    columns["selection_value"] = pd.Series(choice.value[rows])
    columns |= {str(name): scored.metrics[name].iloc[rows] for name in scored.metrics}
    numbers = pa.table({name: pa.Array.from_pandas(column) for name, column in columns.items()})
    left_out = 0
    for at in range(0, len(rows), _CHUNK):
        texts = [
            _texts(json.loads(lines[row]), scored.sources[scored.keys["group"][row]].reading)
            for row in rows[at : at + _CHUNK]
        ]
        left_out += texts.count((None, None, None))
        table = numbers.slice(at, _CHUNK)
        for column, field in zip(zip(*texts, strict=True), _TEXTS, strict=True):
            table = table.append_column(field, pa.array(column, field.type))
        yield table
    if left_out:
        logging.warning(
            "%s rows have tool calls or thoughts: their texts are in the .jsonl alone",
            f"{left_out:,}",
        )


def _texts(
    row: object, reading: Reading
) -> tuple[str | None, str | None, list[dict[str, str]] | None]:
    """Instruction and output of a question and its answer; else the turns.

    None of a row with tool calls or thoughts, which is in the JSON lines alone.
    """
    messages = to_example(row, "", 0, reading).messages
    if any(message.extra_texts for message in messages):
        return None, None, None  # a table of texts would leave out a part of what was measured
    if [message.role for message in messages] == ["user", "assistant"]:
        return messages[0].content, messages[1].content, None
    return None, None, [{"role": m.role, "content": m.content} for m in messages]


def _rejected_table(scored: Scored, choice: Choice) -> pa.Table:
    """Every row that was not chosen, what kept it out, and its own reason if it was not usable."""
    out = choice.why != ""
    own = scored.keys["reason"].to_numpy(object)[out]
    unusable = np.isnan(choice.value[out]) & (own != "")
    reasons = choice.why[out]
    reasons[unusable] += ": " + own[unusable]
    columns = {name: pa.Array.from_pandas(scored.keys.loc[out, name]) for name in KEYS}
    columns["selection_value"] = pa.Array.from_pandas(choice.value[out])
    return pa.table({**columns, "reason": pa.array(reasons, pa.string())})


def _pairs_table(scored: Scored, choice: Choice) -> pa.Table:
    """Keys of the rows of `high` and of their partners, with what they were matched by."""
    columns = {}
    for part in (HIGH, LOW):
        rows = scored.keys.iloc[choice.parts[part]]
        for name in (*KEYS, *LENGTHS):
            columns[f"{part}_{name}"] = pa.Array.from_pandas(rows[name])
    return pa.table(columns)


def _warn_of_ties(choice: Choice) -> None:
    if {HIGH, LOW} <= choice.parts.keys():
        high, low = choice.value[choice.parts[HIGH]].min(), choice.value[choice.parts[LOW]].max()
        if high == low:
            logging.warning("high and low share the value %g: it does not tell them apart", high)
