"""Rows -> scores/: each family in turn, chunk by chunk, then one table of all of them.

OUTPUT_DIR/parts/FAMILY/ holds what is finished, by row_hash: equal rows are scored once, and what
was stopped goes on. OUTPUT_DIR/scores/ is made of the parts at the end, whole or not at all.
"""

import dataclasses
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from absl import logging
from tqdm import tqdm

from gradjax.config import Reading, select
from gradjax.data.examples import to_example
from gradjax.data.sources import Source, parse_data_flags, stream_rows
from gradjax.data.usable import Tally
from gradjax.device import keep_compiled_programs
from gradjax.errors import GradjaxError
from gradjax.score.batch_api import batch_lines, read_batch_results, write_batch
from gradjax.score.config import (
    FAMILIES,
    JUDGED,
    METRICS,
    JudgedMetric,
    Score,
    ScoreConfig,
)
from gradjax.score.gradients import run_scores
from gradjax.score.judge import judged_tags, plan_judging, tag_coverage
from gradjax.score.metrics import Family, asked_families, make_judge
from gradjax.storage.directory import SCORES, Directory
from gradjax.storage.filesystem import LocalPlace, RemotePlace, open_place
from gradjax.storage.results import KEY
from gradjax.storage.store import read_manifest
from gradjax.structs import Example
from gradjax.version import __version__

if TYPE_CHECKING:
    from gradjax.score.endpoint import Judge

TABLE = "scores/000000.parquet"
RUN = "run"  # the family of what a run of gradjax spectra measured
_CHUNK_ROWS, _CHUNK_CHARACTERS = 256, 400_000  # a part: what a kill can cost
_LATER = Score({}, reason="not scored yet; ask for it again")

Scores = dict[str, Score]  # by row_hash


def score(config: ScoreConfig) -> Path | str:
    """Scores what the config asks for, or the rest of it; returns the output directory.

    Raises:
      GradjaxError: for a fault of a model, an endpoint, the data or the directory; finished
        parts stay.
    """
    keep_compiled_programs()
    examples, data = read_examples(config)
    directory = config.output_dir
    ours = Directory(directory, SCORES)
    ours.require_ours()
    place = ours.place
    of_run = _read_run(config, examples) if config.run else {}
    judge = make_judge(config)
    families = [_of_texts(family, data) for family in asked_families(config, judge)]
    _stale(ours, _manifest(ours)["families"], config, families)  # what is refused changes nothing
    with place.lock(0):
        if judge and config.judge_batch_results:
            _take_results(judge, config.judge_batch_results)
        manifest = _prepare(ours, config, families, data)
        found = {RUN: of_run} if config.run else {}
        if of_run:
            columns = list(next(iter(of_run.values())).values)
            place.put(f"parts/{RUN}/000000.parquet", _part(columns, of_run))
        found |= {family.name: _complete(place, family, examples) for family in families}
        found |= {n: _read_parts(place, n) for n in manifest["families"] if n not in found}
        if judge:
            logging.info(
                "%s was asked %d times, for %d tokens",
                judge.model,
                judge.budget.requests,
                judge.budget.tokens,
            )
            if "instag" in config.judged:
                manifest["tags"] = _tags(judge, examples)
            manifest["unanswered"] = {
                name: _unanswered(found[name], examples) for name in config.judged
            }
            ours.write_manifest(manifest)
        place.put(TABLE, _parquet(_table(examples, found)))
    return directory


def score_rows(**settings: Any) -> pd.DataFrame:
    """Scores rows as `gradjax score` does, into `output_dir`, and reads the table.

    Args:
      **settings: as the flags of `gradjax score`: `data` and `metrics` (lists), `output_dir`,
        `limit`, `run`, `ifd_model`, `judge_model` and so on. Called again, it goes on where it
        stopped.

    Returns:
      One row per input row: group, example_id, row_hash, status, reason and the metrics.

    Raises:
      GradjaxError: for a fault of the settings, the data or a model.
      TypeError: for an unknown setting.
    """
    reading = select(Reading, settings)
    given: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()
    }
    own = {name: value for name, value in given.items() if name not in vars(reading)}
    return read_scores(score(ScoreConfig(**own, reading=reading)))


def plan(config: ScoreConfig) -> list[str]:
    """One line per family: what is left to score, and what the judge would be asked at least.

    Raises:
      GradjaxError: as `score`, as far as no model is loaded and nothing is asked.
    """
    examples, data = read_examples(config)
    ours = Directory(config.output_dir, SCORES)
    judge = make_judge(config)
    families = [_of_texts(family, data) for family in asked_families(config, judge)]
    stale = _stale(ours, _manifest(ours)["families"], config, families)
    usable = {e.row_hash: e for e in examples if e.status == "ok"}
    lines = []
    for family in families:
        found = {} if family.name in stale else _read_parts(ours.place, family.name)
        left = [example for digest, example in usable.items() if digest not in found]
        lines.append(f"{family.name}: {len(left):,} of {len(usable):,} different rows to score")
        if judge and family.name in config.judged:
            planned = plan_judging(judge, cast(JudgedMetric, family.name), left)
            lines[-1] = str(planned)
            if config.judge_prices:
                cost = planned.cost(*config.judge_prices)
                lines[-1] += f"; at least {cost:.2f} at --judge_prices"
    return lines or [f"nothing to compute: --run={config.run} has the numbers"]


def make_batch(config: ScoreConfig) -> str:
    """Writes `--judge_batch`; returns a sentence on what to do with it."""
    examples, _ = read_examples(config)
    judge = make_judge(config)
    assert judge is not None
    (metric,) = config.judged
    lines = list(batch_lines(judge, metric, [e for e in examples if e.status == "ok"]))
    if not lines:
        return (
            f"Nothing is left to ask of {config.judge_model}: {config.judge_batch} is not written"
        )
    write_batch(config.judge_batch or "", lines)
    return (
        f"{len(lines):,} requests are in {config.judge_batch}: upload them for the endpoint "
        "/v1/chat/completions, and give the results file with --judge_batch_results"
    )


def read_examples(config: ScoreConfig) -> tuple[list[Example], dict[str, dict[str, Any]]]:
    """The rows, and by group their source, number and hash."""
    examples, data = [], {}
    for source, limit in _sources(config):
        tally = Tally(source)
        for number, row in enumerate(stream_rows(source, limit)):
            example = to_example(row, source.group, number, source.reading)
            tally.read(example)
            tally.judge(example, example.status, example.reason)
            examples.append(example)
        tally.require_usable()
        tally.report()
        data[source.group] = tally.describe()
    return examples, data


def read_scores(directory: str | Path) -> pd.DataFrame:
    """The table of a scoring."""
    place = open_place(directory)
    shard = place.read(TABLE)
    if shard is None:
        raise GradjaxError(f"{directory} has no {TABLE}; give what gradjax score wrote")
    return pq.read_table(io.BytesIO(shard)).to_pandas()


def _tags(judge: "Judge", examples: Sequence[Example]) -> dict[str, int]:
    """How many different tags the rows of each group have: the group's tag vocabulary."""
    groups: dict[str, list[Example]] = {}
    for example in (e for e in examples if e.status == "ok"):
        groups.setdefault(example.group, []).append(example)
    return {group: tag_coverage(judged_tags(judge, rows)) for group, rows in groups.items()}


def _unanswered(scores: Scores, examples: Sequence[Example]) -> dict[str, int]:
    """How many rows a judge has given no number, by what their reasons begin with."""
    of_rows = (scores[e.row_hash] for e in examples if e.status == "ok")
    missing = (one.reason for one in of_rows if None in one.values.values())
    return Counter(reason.removeprefix("judge: ").partition(" (")[0] for reason in missing)


def _take_results(judge: "Judge", path: str) -> None:
    answers, faults = read_batch_results(judge, path)
    logging.info("%s: %d answers", path, answers)
    for fault in faults:
        logging.warning("%s", fault)


def read_unanswered(directory: str | Path) -> dict[str, dict[str, int]]:
    """By judged metric of the last call, how many rows have no number, and in short why."""
    return _manifest(Directory(directory, SCORES)).get("unanswered", {})


def read_tags(directory: str | Path) -> dict[str, int]:
    """By group, how many different tags its rows have; empty where none were asked for."""
    return _manifest(Directory(directory, SCORES)).get("tags", {})


def _sources(config: ScoreConfig) -> list[tuple[Source, int | None]]:
    """Sources and how many rows of them; the run's own if none are given."""
    if config.data:
        given = parse_data_flags(config.data, config.reading)
        return [(_as_in_run(source, config.run), config.limit) for source in given]
    data = read_manifest(config.run or "")["data"]
    if unread := [group for group, of in data.items() if of["rows"] is None]:
        raise GradjaxError(
            f"--run={config.run} is not finished: group {unread[0]} was not read to its end; give "
            "the command that began it again, and it goes on"
        )
    return [
        (Source.of_manifest(group, of), config.limit or of["rows"]) for group, of in data.items()
    ]


def _as_in_run(source: Source, run: str | None) -> Source:
    """The source with its texts read as the run read them."""
    of = read_manifest(run)["data"].get(source.group) if run else None
    if not of:
        return source
    before = Source.of_manifest(source.group, of).reading
    return dataclasses.replace(source, reading=source.reading.inherit(before, f"--run={run}"))


def _of_texts(family: Family, data: Mapping[str, Mapping[str, Any]]) -> Family:
    """The family with how texts are read among its settings: rows are told apart by their hash."""
    reading = {group: of["reading"] for group, of in data.items() if "reading" in of}
    if not reading:
        return family
    return dataclasses.replace(family, settings={**family.settings, "reading": reading})


def _manifest(directory: Directory) -> dict[str, Any]:
    manifest = directory.manifest() or {}
    if not isinstance(manifest.setdefault("families", {}), dict):
        raise directory.damaged("families is no object")
    return manifest


def _stale(
    directory: Directory,
    before: Mapping[str, Mapping[str, Any]],
    config: ScoreConfig,
    families: Sequence[Family],
) -> list[str]:
    """Families with parts of other settings; raises GradjaxError unless they may be replaced."""
    stale = []
    for family in families:
        then = before.get(family.name, {})
        if then == family.settings or not directory.place.names(f"parts/{family.name}"):
            continue
        if not config.overwrite:
            directory.require_same(f"{family.name} scores", then, family.settings)
        stale.append(family.name)
    return stale


def _prepare(
    directory: Directory,
    config: ScoreConfig,
    families: Sequence[Family],
    data: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Removes what is to be replaced and writes the manifest, which it returns."""
    manifest, place = _manifest(directory), directory.place
    before = manifest["families"]
    stale = _stale(directory, before, config, families)
    settings = {family.name: family.settings for family in families}
    if config.run:
        stale.append(RUN)
        settings[RUN] = {
            "run": config.run,
            "layers": config.layers,
            "projections": list(config.projections),
        }
    if stale or data != manifest.get("data"):  # the table is of something else
        place.remove([TABLE] if place.names("scores") else [])
        manifest.pop("tags", None)
        manifest.pop("unanswered", None)
    for name in stale:
        place.remove(f"parts/{name}/{part}" for part in place.names(f"parts/{name}"))
    flags = dataclasses.asdict(config) | {"output_dir": str(directory.path)}
    manifest |= {
        "data": data,
        "families": before | settings,
        "flags": flags,
        "versions": {"gradjax": __version__},
    }
    directory.write_manifest(manifest)
    place.make_folders(["scores", "parts", *(f"parts/{name}" for name in manifest["families"])])
    return manifest


def _read_run(config: ScoreConfig, examples: Sequence[Example]) -> Scores:
    """What a run says of the rows: a family of its own, in one part."""
    rows = run_scores(config.run or "", config.layers, config.projections)
    columns = rows.columns.drop([*KEY, "row_hash", "status", "reason"])
    numbers = rows[columns].astype(object).where(rows[columns].notna(), None)
    reasons = rows["reason"].fillna("")
    values = [dict(zip(columns, row, strict=True)) for row in numbers.itertuples(index=False)]
    scores = map(Score, values, rows["status"], reasons)
    found: Scores = dict(zip(rows["row_hash"], scores, strict=True))
    for example in examples:
        if example.row_hash not in found:
            raise GradjaxError(
                f"--run={config.run} has not row {example.example_id} of group {example.group!r} "
                "as it stands in --data; give a run of the same rows"
            )
    return found


def _complete(
    place: LocalPlace | RemotePlace, family: Family, examples: Sequence[Example]
) -> Scores:
    """The scores of all usable rows: those of finished parts, and what is computed now."""
    found = _read_parts(place, family.name)
    usable = {e.row_hash: e for e in examples if e.status == "ok"}
    waiting = [example for digest, example in usable.items() if digest not in found]
    logging.info(
        "%s: %d rows finished before, %d to score",
        family.name,
        len(usable) - len(waiting),
        len(waiting),
    )
    if not waiting:
        return found
    scorer = family.load()
    parts = place.names(f"parts/{family.name}")
    first, failed = int(parts[-1].split(".")[0]) + 1 if parts else 0, 0
    with tqdm(
        total=len(waiting), desc=family.name, unit="row", dynamic_ncols=True, disable=None
    ) as bar:
        scored = 0
        for number, chunk in enumerate(_chunks(waiting), start=first):
            scores = dict(zip((e.row_hash for e in chunk), scorer(chunk, bar.update), strict=True))
            scored += len(chunk)
            bar.update(scored - bar.n)  # rows that no batch had, too
            found |= scores
            # What a judge has not answered is never kept: the next call asks again.
            if family.name in JUDGED:
                scores = {
                    d: score for d, score in scores.items() if None not in score.values.values()
                }
            failed += len(chunk) - len(scores)
            if scores:
                place.put(
                    f"parts/{family.name}/{number:06d}.parquet", _part(family.columns, scores)
                )
    if failed:
        logging.warning("%s: %d different rows have no answer", family.name, failed)
    return found


def _chunks(waiting: Sequence[Example]) -> Iterator[list[Example]]:
    """Chunks of rows of similar length, the shortest first."""
    size = {e.row_hash: sum(len(m.content) for m in e.messages) for e in waiting}
    chunk: list[Example] = []
    characters = 0
    for example in sorted(waiting, key=lambda e: size[e.row_hash]):
        chunk.append(example)
        characters += size[example.row_hash]
        if len(chunk) == _CHUNK_ROWS or characters > _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _part(names: Sequence[str], scores: Scores) -> bytes:
    columns: dict[str, Any] = {"row_hash": list(scores)}
    for name in names:
        columns[name] = pa.array([s.values[name] for s in scores.values()], pa.float64())
    for name in ("status", "reason"):
        columns[name] = [getattr(s, name) for s in scores.values()]
    return _parquet(pa.table(columns))


def _read_parts(place: LocalPlace | RemotePlace, family: str) -> Scores:
    found: Scores = {}
    for name in place.names(f"parts/{family}"):
        try:
            rows = pq.read_table(io.BytesIO(place.read(f"parts/{family}/{name}") or b""))
        except pa.ArrowInvalid as error:
            raise GradjaxError(
                f"{place.directory}/parts/{family}/{name} is damaged ({error}); remove it, and the "
                "same command scores its rows again"
            ) from error
        for row in rows.to_pylist():
            digest, status, reason = row.pop("row_hash"), row.pop("status"), row.pop("reason")
            found[digest] = Score(row, status, reason)
    return found


def _table(examples: Sequence[Example], found: Mapping[str, Scores]) -> pa.Table:
    """One row per input row: keys, status, reason, and each family's columns.

    A row is `ok` if it is for any family; where it has no number, the family's reason says why.
    """
    source = _columns(found)  # by column: the family that it is of
    statuses, reasons = [], []
    columns: dict[str, list[float | None]] = {name: [] for name in source}
    for example in examples:
        status, reason, scores = example.status, example.reason, {}
        if status == "ok":
            scores = {n: of_family.get(example.row_hash, _LATER) for n, of_family in found.items()}
            kinds = [one.status for one in scores.values()]
            status = "ok" if "ok" in kinds else kinds[0]
            reason = "; ".join(f"{n}: {one.reason}" for n, one in scores.items() if one.reason)
        for name, family in source.items():
            columns[name].append(scores[family].values.get(name) if scores else None)
        statuses.append(status)
        reasons.append(reason or None)
    return pa.table(
        {
            "group": [e.group for e in examples],
            "example_id": pa.array([e.example_id for e in examples], pa.int64()),
            "row_hash": [e.row_hash for e in examples],
            "status": statuses,
            "reason": pa.array(reasons, pa.string()),
            **{name: _numbers(name, values) for name, values in columns.items()},
        }
    )


def _columns(found: Mapping[str, Scores]) -> dict[str, str]:
    """The table's columns, and the family that each is taken from: what is asked for now first."""
    source: dict[str, str] = {}
    for family, scores in found.items():
        of_run = next(iter(scores.values()), Score({})).values
        for column in FAMILIES.get(family, of_run):
            source.setdefault(column, family)
    order = {column: place for place, column in enumerate(METRICS)}
    return dict(sorted(source.items(), key=lambda item: order.get(item[0], len(order))))


def _numbers(name: str, values: list[float | None]) -> pa.Array:
    """Counts are integers, everything else float64."""
    whole = name.startswith("num_") or name == "instag"
    return pa.array(values, pa.float64()).cast(pa.int64() if whole else pa.float64())


def _parquet(table: pa.Table) -> bytes:
    shard = io.BytesIO()
    pq.write_table(table, shard, compression="zstd")
    return shard.getvalue()
