"""Where scores and rows come from: directories of score and spectra, and the data."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.dataset as ds
from absl import logging

from gradjax import strict_json
from gradjax.data.examples import to_example
from gradjax.data.sources import Source, read_rows
from gradjax.errors import GradjaxError, did_you_mean
from gradjax.score.gradients import run_scores
from gradjax.storage.directory import RUN, SCORES, Directory
from gradjax.storage.results import KEY
from gradjax.structs import ATTENTION, Example

KEYS = [*KEY, "row_hash"]
LENGTHS = ["length", "prompt_length"]
MATCHED = [*LENGTHS, "prompt", "text"]  # what rows are paired by
_COMMON = 0.1  # share of rows from which on a field of theirs is looked at unasked
# What a partition has columns for; a row's own field of such a name is no metric.
RESERVED = {*KEYS, "selection_value", "instruction", "output", "messages"}


@dataclass(frozen=True)
class Scored:
    """Rows with their numbers, sorted by group and example_id; both frames have the same index.

    `keys` has group, example_id, row_hash, status, reason ("" if none) and length, the characters
    of the responses; where rows have been read also prompt_length, those of the rest, and prompt
    and text, equal where prompts and where texts are. `metrics` is of float64. NaN where a number
    is not known.
    """

    keys: pd.DataFrame
    metrics: pd.DataFrame
    sources: dict[str, Source]  # by group
    rows: dict[str, list[object]]  # by group, where they have been read


def read_scored(
    scores: Sequence[str],
    data: Sequence[Source],
    by: Sequence[str],
    layers: str = "all",
    projections: Sequence[str] = ATTENTION,
    *,
    lengths: bool = False,
) -> Scored:
    """Scores joined over directories, and numeric fields of the rows where they are asked for.

    A run's gradient statistics are means over `layers` and `projections` (`run_scores`).
    A metric is looked up in the scores first. The rows themselves are read if there are no scores,
    if one of `by` is not among them, or for `lengths`. Those of scores would not do: their numbers
    of tokens are of rows that a model's window may have cut.

    Raises:
      GradjaxError: if directories do not hold the same rows, rows are not those that were scored,
        there is no metric of a name, or no run to average over some layers or projections.
    """
    given = {source.group: source for source in data}
    _require_run_for(scores, layers, projections)
    if not scores:
        return _read_unscored(given, by)
    keys, metrics, sources, unlike = _join(sorted(set(scores)), layers, projections)
    if unknown := sorted(set(given) - set(sources)):
        raise GradjaxError(
            f"--data names the group {unknown[0]!r}, which was not scored"
            f"{did_you_mean(unknown[0], sources)}; the scores have {', '.join(sorted(sources))}: "
            "name it with --data=GROUP=SOURCE"
        )
    for group, source in given.items():  # elsewhere, but read as it was when scored
        reading = source.reading.inherit(sources[group].reading, f"group {group!r} of --scores")
        sources[group] = replace(source, reading=reading)
    if unlike_by := [name for name in by if name in unlike]:
        raise GradjaxError(
            f"--by={unlike_by[0]}: --scores={unlike[unlike_by[0]]} has other numbers of it than "
            "another --scores; give only one of them"
        )
    missing = [name for name in by if name not in metrics]
    rows: dict[str, list[object]] = {}
    keys["length"] = np.nan
    if missing or lengths:
        rows = {group: _read_rows(sources[group]) for group in sorted(set(keys["group"]))}
        there, fields = _fields_of_scored(keys, sources, rows, missing)
        keys[MATCHED] = there[MATCHED]
        _require_found(missing, fields, metrics, "neither scored nor a number in the rows")
        metrics = metrics.join(fields)
    return Scored(keys, metrics, sources, rows)


def chosen_rows(scored: Scored, chosen: np.ndarray) -> tuple[dict[int, bytes], dict[int, int]]:
    """The chosen rows as JSON, one line each, and the characters of their responses.

    Both by position in `scored.keys`. A line is ASCII and has the row's hash, unless the row holds
    NaN or an infinity, which becomes null: what else JSON cannot say stands as Python writes it.

    Raises:
      GradjaxError: if a source has not the rows that were scored.
    """
    lines, characters = {}, {}
    for group, part in scored.keys.iloc[np.sort(chosen)].groupby("group", sort=True):
        source = scored.sources[str(group)]
        wanted = {
            number: (position, digest)
            for position, number, digest in zip(
                part.index, part["example_id"], part["row_hash"], strict=True
            )
        }
        for number, row in enumerate(scored.rows.get(str(group)) or _read_rows(source)):
            if number in wanted:
                position, digest = wanted.pop(number)
                example = to_example(row, source.group, number, source.reading)
                _require_scored(source, number, example.row_hash, digest)
                lines[position] = strict_json.dumps(row, default=repr).encode("ascii")
                characters[position] = _characters(example)
        if wanted:
            raise _too_short(source, min(wanted))
    return lines, characters


def _require_run_for(scores: Sequence[str], layers: str, projections: Sequence[str]) -> None:
    """Raises GradjaxError where some layers or projections are given, and no run to average."""
    if (layers == "all" and tuple(projections) == ATTENTION) or any(map(_is_run, scores)):
        return
    flag = f"--projections={','.join(projections)}" if layers == "all" else f"--layers={layers}"
    raise GradjaxError(
        f"{flag} says over what a run's statistics are averaged, and no --scores is a run of "
        "gradjax spectra; leave it out, or add --scores=RUN"
    )


def _is_run(directory: str) -> bool:
    names = Directory(directory, RUN).place.names()
    return RUN.manifest in names and SCORES.manifest not in names


def _join(
    directories: Sequence[str], layers: str, projections: Sequence[str]
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Source], dict[str, str]]:
    """Keys, metrics, sources, and the metrics that two directories have different numbers of."""
    first, *others = directories
    keys, metrics, sources = _read_scores(first, layers, projections)
    unlike: dict[str, str] = {}
    for directory in others:
        more_keys, more, more_sources = _read_scores(directory, layers, projections)
        _require_same_rows(first, keys, directory, more_keys)
        failed = (keys["status"] == "ok") & (more_keys["status"] != "ok")
        silent = keys["reason"] == ""
        keys["status"] = keys["status"].mask(failed, more_keys["status"])
        keys["reason"] = keys["reason"].mask(failed | silent, more_keys["reason"])
        sources = more_sources | sources
        for name in map(str, more):
            if name not in metrics and name not in unlike:
                metrics[name] = more[name]
            elif name not in unlike and not metrics[name].equals(more[name]):
                unlike[name] = directory
                metrics = metrics.drop(columns=name)
    if unlike:
        logging.warning("Left out, as --scores differ in it: %s", ", ".join(sorted(unlike)))
    return keys, metrics, sources, unlike


def _read_scores(
    directory: str, layers: str, projections: Sequence[str]
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Source]]:
    """Keys, metrics and sources of one directory, its rows in order."""
    scoring, run = Directory(directory, SCORES), Directory(directory, RUN)
    if (manifest := scoring.manifest()) is not None:
        sources, rows = _read_score_tables(scoring, manifest)
    elif (manifest := run.manifest()) is not None:
        data = manifest["data"]
        sources = {group: Source.of_manifest(group, of) for group, of in data.items()}
        rows = run_scores(run.path, layers, projections)
    else:
        raise GradjaxError(
            f"--scores={directory} has neither {SCORES.manifest} nor {RUN.manifest}: expected what "
            f"{SCORES.command} or {RUN.command} wrote"
        )
    groups, _ = pd.factorize(rows["group"], sort=True)
    rows = rows.iloc[np.lexsort((rows["example_id"], groups))].reset_index(drop=True)
    if (repeated := rows.duplicated(KEY)).any():
        group, number = rows.loc[repeated, KEY].iloc[0]
        raise GradjaxError(
            f"--scores={directory} has row {number} of group {group!r} twice; score it anew"
        )
    numbers = rows.drop(columns=[*KEYS, "status"]).select_dtypes("number")
    keys = rows[[*KEYS, "status"]].assign(reason=rows["reason"].fillna(""))
    return keys, numbers.astype(float), sources


def _read_score_tables(
    scoring: Directory, manifest: Mapping[str, Any]
) -> tuple[dict[str, Source], pd.DataFrame]:
    place = scoring.place
    where, again = scoring.path, "score it anew (gradjax score --overwrite)"
    try:
        data = manifest["data"]
        expected = {group: int(of["rows"]) for group, of in data.items()}
        sources = {group: Source.of_manifest(group, of) for group, of in data.items()}
        shards = [n for n in place.names("scores") if n.endswith(".parquet")]
        if not shards:
            raise GradjaxError(f"--scores={where} has no scores yet; let gradjax score finish")
        paths = [place.path(f"scores/{name}") for name in shards]
        with place.faults("read"):
            table = ds.dataset(paths, format="parquet", filesystem=place.filesystem).to_table()
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # Arrow's are ValueErrors
        said = str(error).partition("\n")[0]
        raise GradjaxError(f"--scores={where} is damaged ({said}); {again}") from error
    wanted = [*KEYS, "status", "reason"]
    if absent := [name for name in wanted if name not in table.column_names]:
        raise GradjaxError(f"--scores={where} has no column {absent[0]} in scores/; {again}")
    rows = table.to_pandas()
    if (empty := rows[[*KEYS, "status"]].isna().any()).any():
        raise GradjaxError(f"--scores={where} has rows without {empty.idxmax()}; {again}")
    found = rows["group"].value_counts().to_dict()
    for group in sorted({*expected, *found}):
        if found.get(group, 0) != expected.get(group, 0):
            raise GradjaxError(
                f"--scores={where} has scores of {found.get(group, 0)} of the "
                f"{expected.get(group, 0)} rows of group {group!r}; let gradjax score finish"
            )
    return sources, rows


def _require_same_rows(first: str, keys: pd.DataFrame, second: str, others: pd.DataFrame) -> None:
    alike = len(keys) == len(others) and (keys[KEY] == others[KEY]).all(axis=None)
    if not alike:
        both = keys[KEY].merge(others[KEY], how="outer", indicator="where")
        alone = both[both["where"] != "both"].iloc[0]
        has, lacks = (first, second) if alone["where"] == "left_only" else (second, first)
        raise GradjaxError(
            f"--scores={has} has row {alone['example_id']} of group {alone['group']!r} and "
            f"--scores={lacks} has not; give scores of the same rows"
        )
    unequal = np.flatnonzero(keys["row_hash"] != others["row_hash"])
    if len(unequal):
        group, number = keys[KEY].iloc[unequal[0]]
        raise GradjaxError(
            f"--scores={first} and --scores={second} have different rows as row {number} of group "
            f"{group!r} (row_hash); give scores of the same data"
        )


def _read_unscored(given: Mapping[str, Source], by: Sequence[str]) -> Scored:
    """Rows whose numbers are fields of theirs."""
    if not given:
        raise GradjaxError(
            "there is nothing to select from: expected --scores=DIR, or --data=SOURCE whose rows "
            "have the numbers as fields"
        )
    rows = {group: _read_rows(given[group]) for group in sorted(given)}
    parts = [_read_fields(given[group], rows[group], by, others=True) for group in rows]
    keys = pd.concat([part for part, _ in parts], ignore_index=True)
    metrics = pd.concat([part for _, part in parts], ignore_index=True)
    _require_found(by, metrics, metrics, "not a number in the rows")
    return Scored(keys, metrics, dict(given), rows)


def _fields_of_scored(
    keys: pd.DataFrame,
    sources: Mapping[str, Source],
    rows: Mapping[str, list[object]],
    names: Sequence[str],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The scored rows as their sources have them: keys, and fields of these names."""
    keys_there, fields = [], []
    for group, part in keys.groupby("group", sort=True):
        source = sources[str(group)]
        there, found = _read_fields(source, rows[str(group)], names, others=False)
        if (last := part["example_id"].max()) >= len(there):
            raise _too_short(source, last)
        numbers = part["example_id"].to_numpy()
        hashes, scored = there["row_hash"].to_numpy()[numbers], part["row_hash"].to_numpy()
        for at in np.flatnonzero(hashes != scored)[:1]:
            _require_scored(source, numbers[at], hashes[at], scored[at])
        keys_there.append(there.iloc[numbers])
        fields.append(found.iloc[numbers])
    return pd.concat(keys_there, ignore_index=True), pd.concat(fields, ignore_index=True)


def _read_fields(
    source: Source, rows: list[object], names: Sequence[str], others: bool
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """All rows of a group: keys as in `Scored`, and numeric fields of these names, or others too
    that many rows have.
    """
    wanted = set(names)
    if others:
        counts = Counter(name for row in rows for name in _numbers(row))
        common = (name for name, count in counts.items() if count >= _COMMON * len(rows))
        wanted.update(filter(str.isprintable, common))
    names = sorted(wanted - RESERVED)
    fields = {name: np.full(len(rows), np.nan) for name in names}
    keys = []
    for number, row in enumerate(rows):
        example = to_example(row, source.group, number, source.reading)
        keys.append((example.row_hash, example.status, example.reason, *_matched_by(example)))
        numbers = _numbers(row) if fields else {}
        for name in fields.keys() & numbers.keys():
            fields[name][number] = numbers[name]
    frame = pd.DataFrame(keys, columns=["row_hash", "status", "reason", *MATCHED])
    frame.insert(0, "group", source.group)
    frame.insert(1, "example_id", np.arange(len(rows)))
    return frame.astype({"length": float}), pd.DataFrame(fields, index=frame.index)


def _characters(example: Example) -> int:
    """Of the responses; 0 for a row that cannot be used."""
    return sum(len(m.content) for m in example.messages if m.role == "assistant")


def _matched_by(example: Example) -> tuple[int, int, int, int]:
    """`MATCHED` of a row; without a prompt it shares that with no other."""
    length = _characters(example)
    prompt_length = sum(len(m.content) for m in example.messages) - length
    texts = example.instruction, example.output
    return length, prompt_length, hash(texts[0] or example.key), hash(texts)


def _numbers(row: object) -> dict[str, float]:
    """A row's fields that are numbers; whole numbers beyond float64 are not."""
    if not isinstance(row, Mapping):
        return {}
    found = {}
    for name, value in row.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            with suppress(OverflowError):
                found[name] = float(value)
    return found


def _read_rows(source: Source) -> list[object]:
    try:
        return read_rows(source)
    except GradjaxError as error:
        raise GradjaxError(
            f"the rows of group {source.group!r} cannot be read: {str(error).rstrip('.')}; say "
            f"where they are with --data={source.group}=SOURCE"
        ) from error


def _require_scored(source: Source, number: int, now: str, scored: str) -> None:
    if now != scored:
        raise GradjaxError(
            f"{source.location} has another row {number} than the one that was scored as group "
            f"{source.group!r}; give the file that was scored with --data={source.group}=SOURCE"
        )


def _too_short(source: Source, number: int) -> GradjaxError:
    return GradjaxError(
        f"{source.location} has no row {number}, which was scored as group {source.group!r}; give "
        f"the file that was scored with --data={source.group}=SOURCE"
    )


def _require_found(
    names: Iterable[str], fields: pd.DataFrame, known: pd.DataFrame, said: str
) -> None:
    for name in names:
        if name not in fields or fields[name].isna().all():
            others = sorted(str(k) for k in known if k != name)
            raise GradjaxError(
                f"--by={name}: {said}{did_you_mean(name, others)}; known metrics: "
                f"{', '.join(others) or 'none'}"
            )
