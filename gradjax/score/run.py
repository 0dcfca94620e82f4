"""Rows -> scores/: each family in turn, chunk by chunk, then one table of all of them.

OUTPUT_DIR/parts/FAMILY/ holds what is finished, by row_hash: equal rows are scored once, and what
was stopped goes on. OUTPUT_DIR/scores/ is made of the parts at the end, whole or not at all.
"""

import dataclasses
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from absl import logging
from tqdm import tqdm

import gradjax
from gradjax.data.examples import to_example
from gradjax.data.sources import Source, data_hash, parse_data_flags, read_rows
from gradjax.errors import GradjaxError
from gradjax.places import LocalPlace, RemotePlace, open_place
from gradjax.report.values import KEY
from gradjax.run import keep_compiled_programs
from gradjax.score.config import FAMILIES, JudgedMetric, ScoreConfig
from gradjax.score.endpoint import Judge
from gradjax.score.families import Family, asked_families, make_judge
from gradjax.score.free import run_scores
from gradjax.score.judge import (
    batch_lines,
    is_retriable,
    judged_tags,
    plan_judging,
    read_batch_results,
    tag_coverage,
    write_batch,
)
from gradjax.score.structs import Score
from gradjax.store import read_manifest
from gradjax.structs import Example

MANIFEST, TABLE = "score.json", "scores/000000.parquet"
_CHUNK_ROWS, _CHUNK_CHARACTERS = 256, 400_000  # a part: what a kill can cost
_TEXT = {"status", "reason"}

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
    place = open_place(directory)
    _require_ours(place)
    with place.lock(0):
        judge = make_judge(config)
        if judge and config.judge_batch_results:
            _take_results(judge, config.judge_batch_results)
        families = asked_families(config, judge)
        manifest = _prepare(place, config, families, data)
        found = {family.name: _complete(place, family, examples) for family in families}
        earlier = [name for name in manifest["families"] if name not in found]
        for name in earlier:
            known = _read_parts(place, name)
            if all(e.row_hash in known for e in examples if e.status == "ok"):
                found[name] = known
        table = _table(examples, found)
        if config.run:
            table = _with_run(table, config)
        if judge and "instag" in config.judged:
            _log_tags(judge, examples)
        place.put(TABLE, _parquet(table))
    return directory


def plan(config: ScoreConfig) -> list[str]:
    """One line per family: what is left to score, and what the judge would be asked at least."""
    examples, _ = read_examples(config)
    place = open_place(config.output_dir)
    judge = make_judge(config)
    lines = []
    for family in asked_families(config, judge):
        usable = {e.row_hash: e for e in examples if e.status == "ok"}
        found = _read_parts(place, family.name)
        left = [example for digest, example in usable.items() if digest not in found]
        lines.append(f"{family.name}: {len(left):,} of {len(usable):,} different rows to score")
        if judge and family.name in config.judged:
            planned = plan_judging(judge, cast(JudgedMetric, family.name), left)
            lines[-1] = str(planned)
            if config.judge_prices:
                cost = planned.cost(*config.judge_prices)
                lines[-1] += f"; at least {cost:.2f} at --judge_prices"
    return lines


def make_batch(config: ScoreConfig) -> str:
    """Writes `--judge_batch`; returns a sentence on what to do with it."""
    examples, _ = read_examples(config)
    judge = make_judge(config)
    assert judge is not None
    (metric,) = config.judged
    lines = list(batch_lines(judge, metric, [e for e in examples if e.status == "ok"]))
    write_batch(config.judge_batch or "", lines)
    return (
        f"{len(lines):,} requests are in {config.judge_batch}: upload them for the endpoint "
        "/v1/chat/completions, and give the results file with --judge_batch_results"
    )


def read_examples(config: ScoreConfig) -> tuple[list[Example], dict[str, dict[str, Any]]]:
    """The rows, and by group their source, number and hash."""
    examples, data = [], {}
    for source, limit in _sources(config):
        rows = read_rows(source, limit)
        data[source.group] = {
            "source": source.location,
            "rows": len(rows),
            "hash": data_hash(rows),
        }
        examples += [to_example(row, source.group, number) for number, row in enumerate(rows)]
    return examples, data


def read_scores(directory: str | Path) -> pd.DataFrame:
    """The table of a scoring."""
    place = open_place(directory)
    shard = place.read(TABLE)
    if shard is None:
        raise GradjaxError(f"{directory} has no {TABLE}; give what gradjax.score wrote")
    return pq.read_table(io.BytesIO(shard)).to_pandas()


def _log_tags(judge: Judge, examples: Sequence[Example]) -> None:
    """The tag vocabulary of each group."""
    for group in dict.fromkeys(e.group for e in examples):
        tags = judged_tags(judge, [e for e in examples if e.group == group and e.status == "ok"])
        known = sum(found is not None for found in tags)
        logging.info("%s: %d different tags in %d rows", group, tag_coverage(tags), known)


def _take_results(judge: Judge, path: str) -> None:
    answers, faults = read_batch_results(judge, path)
    logging.info("%s: %d answers", path, answers)
    for fault in faults:
        logging.warning("%s", fault)


def _sources(config: ScoreConfig) -> list[tuple[Source, int | None]]:
    """Sources and how many rows of them; the run's own if none are given."""
    if config.data:
        return [(source, config.limit) for source in parse_data_flags(config.data)]
    data = read_manifest(config.run or "")["data"]
    return [(Source(group, of["source"]), config.limit or of["rows"]) for group, of in data.items()]


def _require_ours(place: LocalPlace | RemotePlace) -> None:
    names = [name for name in place.names() if name != ".tmp"]
    if names and MANIFEST not in names and "judge.sqlite" not in names:
        raise GradjaxError(
            f"{place.directory} is not empty and holds no scores (found {names[0]}); give an empty "
            "or new directory with --output_dir"
        )


def _prepare(
    place: LocalPlace | RemotePlace,
    config: ScoreConfig,
    families: Sequence[Family],
    data: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Writes the manifest; raises GradjaxError where finished parts have other settings."""
    text = place.read(MANIFEST)
    before = json.loads(text)["families"] if text else {}
    settings = {family.name: family.settings for family in families}
    for name in settings.keys() & before.keys():
        if differing := [k for k in settings[name] if settings[name][k] != before[name].get(k)]:
            if config.overwrite:
                folder = f"parts/{name}"
                place.remove(f"{folder}/{part}" for part in place.names(folder))
                continue
            raise GradjaxError(
                f"{place.directory} has {name} scores of another {differing[0]} "
                f"({before[name].get(differing[0])!r} there, {settings[name][differing[0]]!r} "
                "now); use the same flags, another --output_dir, or --overwrite to replace them"
            )
    flags = dataclasses.asdict(config) | {"output_dir": str(place.directory)}
    manifest = {
        "data": data,
        "families": before | settings,
        "flags": flags,
        "versions": {"gradjax": gradjax.__version__},
    }
    place.make_folders(["scores", "parts", *(f"parts/{name}" for name in manifest["families"])])
    place.put(MANIFEST, (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode())
    return manifest


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
    for number, chunk in enumerate(_with_progress(family.name, waiting), start=first):
        scores = dict(zip((e.row_hash for e in chunk), scorer(chunk), strict=True))
        found |= scores
        # What the endpoint owes is asked for again by the next call.
        kept = {digest: score for digest, score in scores.items() if not is_retriable(score)}
        failed += len(scores) - len(kept)
        if kept:
            place.put(f"parts/{family.name}/{number:06d}.parquet", _part(family, kept))
    if failed:
        logging.warning(
            "%s: the endpoint gave no answer to %d rows; the same command asks again",
            family.name,
            failed,
        )
    return found


def _with_progress(name: str, waiting: Sequence[Example]) -> Iterator[list[Example]]:
    """Chunks of rows of similar length, the shortest first."""
    size = {e.row_hash: sum(len(m.content) for m in e.messages) for e in waiting}
    with tqdm(total=len(waiting), desc=name, unit="row", dynamic_ncols=True, disable=None) as bar:
        chunk: list[Example] = []
        characters = 0
        for example in sorted(waiting, key=lambda e: size[e.row_hash]):
            chunk.append(example)
            characters += size[example.row_hash]
            if len(chunk) == _CHUNK_ROWS or characters > _CHUNK_CHARACTERS:
                yield chunk
                bar.update(len(chunk))
                chunk, characters = [], 0
        if chunk:
            yield chunk
            bar.update(len(chunk))


def _part(family: Family, scores: Scores) -> bytes:
    columns: dict[str, Any] = {"row_hash": list(scores)}
    for name in family.columns:
        columns[name] = pa.array([s.values[name] for s in scores.values()], pa.float64())
    for name in sorted(_TEXT):
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

    A row is `ok` if any family has a number for it.
    """
    statuses, reasons = [], []
    columns: dict[str, list[float | None]] = {c: [] for name in found for c in FAMILIES[name]}
    for example in examples:
        status, reason = example.status, example.reason
        if status == "ok" and found:
            scores = {name: of_family[example.row_hash] for name, of_family in found.items()}
            for one in scores.values():
                for column, value in one.values.items():
                    columns[column].append(value)
            known = any(v is not None for one in scores.values() for v in one.values.values())
            first = next((s.status for s in scores.values() if s.status != "ok"), "ok")
            status = "ok" if known else first
            reason = "; ".join(f"{n}: {s.reason}" for n, s in scores.items() if s.reason)
        else:
            for values in columns.values():
                values.append(None)
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


def _numbers(name: str, values: list[float | None]) -> pa.Array:
    """Counts are integers, everything else float64."""
    whole = name.startswith("num_")
    return pa.array(values, pa.float64()).cast(pa.int64() if whole else pa.float64())


def _with_run(table: pa.Table, config: ScoreConfig) -> pa.Table:
    """The table with a run's columns; the run's status where nothing else was asked for."""
    rows = run_scores(config.run or "", config.layers, config.projections)
    keys = table.select([*KEY, "row_hash"]).to_pandas()
    joined = keys.merge(rows, on=[*KEY, "row_hash"], how="left", indicator=True)
    if (joined["_merge"] != "both").any():
        group, number = joined.loc[joined["_merge"] != "both", KEY].iloc[0]
        raise GradjaxError(
            f"--run={config.run} has not row {number} of group {group!r} as it stands in --data; "
            "give a run of the same rows, or leave --data out"
        )
    if not config.families:
        table = table.drop_columns(["status", "reason"])
        for position, name in enumerate(("status", "reason"), start=3):
            table = table.add_column(position, name, pa.array(joined[name], from_pandas=True))
    for name in rows.columns.drop([*KEY, "row_hash", "status", "reason"]):
        column = pa.array(joined[name].to_numpy(), from_pandas=True)
        table = table.drop_columns([name]) if name in table.column_names else table
        table = table.append_column(name, column)
    return table


def _parquet(table: pa.Table) -> bytes:
    shard = io.BytesIO()
    pq.write_table(table, shard, compression="zstd")
    return shard.getvalue()
