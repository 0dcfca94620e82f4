"""The store: one manifest and three Parquet tables, written in whole shards.

A shard of `examples/` is what makes rows finished: it is put in place after the shards of the
same name in `spectra/` and `similarity/`, and what those hold without it is neither read nor
kept when the run is taken up again. Several processes of a run write shards of their own.
"""

import io
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from gradjax.errors import GradjaxError, did_you_mean
from gradjax.storage.directory import RUN, Directory
from gradjax.storage.filesystem import LocalPlace, RemotePlace, open_place
from gradjax.structs import ExampleResult

TABLES: dict[str, pa.Schema] = {
    "examples": pa.schema(
        [
            ("group", pa.string()),
            ("example_id", pa.int64()),
            ("row_hash", pa.string()),
            ("status", pa.string()),
            ("reason", pa.string()),
            ("instruction", pa.string()),
            ("output", pa.string()),
            ("num_tokens", pa.int32()),
            ("num_target_tokens", pa.int32()),
            ("truncated", pa.bool_()),
            ("loss", pa.float64()),
        ]
    ),
    "spectra": pa.schema(
        [
            ("group", pa.string()),
            ("example_id", pa.int64()),
            ("layer", pa.int32()),
            ("projection", pa.string()),
            ("nuclear_norm", pa.float64()),
            ("effective_rank", pa.float64()),
            ("frobenius_norm", pa.float64()),
            ("spectral_norm", pa.float64()),
            ("mean", pa.float64()),
            ("max", pa.float64()),
            ("min", pa.float64()),
            ("singular_values", pa.list_(pa.float32())),
        ]
    ),
    "similarity": pa.schema(
        [
            ("group", pa.string()),
            ("example_id", pa.int64()),
            ("kind", pa.string()),
            ("projection", pa.string()),
            ("layer_a", pa.int32()),
            ("layer_b", pa.int32()),
            ("cosine", pa.float64()),
        ]
    ),
}
_KEYS = ["group", "status", "projection", "kind"]
# Bytes of floats that vary little compress best side by side: a third less than without.
_ENCODINGS: dict[str, dict[str, Any]] = {
    table: {
        "compression": "zstd",
        "use_dictionary": [name for name in schema.names if name in _KEYS],
        "use_byte_stream_split": [
            f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name
            for field in schema
            if pa.types.is_list(field.type) or pa.types.is_floating(field.type)
        ],
    }
    for table, schema in TABLES.items()
}
Key = tuple[str, int]  # group, example_id


class FinishedRow(NamedTuple):
    """What the store knows of a row that need not be computed again."""

    row_hash: str
    status: str
    num_tokens: int
    truncated: bool


class Found(NamedTuple):
    """What a run's directory holds, read once, before anything is written."""

    manifest: dict[str, Any]  # empty for a new run
    shards: tuple[str, ...]  # of `examples/`
    finished: dict[Key, FinishedRow]


NOTHING = Found({}, (), {})


class Store:
    """A run's directory, held by one process of one run. Made by `open_store`."""

    def __init__(
        self,
        directory: Directory,
        found: Found,
        shard_names: Iterator[str],
        process: int,
        barrier: Callable[[], None],
    ):
        self.directory = directory.path  # a URL as str
        self.finished = dict(found.finished)  # when opened, and what this process has appended
        self._directory = directory
        self._place = directory.place
        self._shard_names = shard_names
        self._process = process
        self._barrier = barrier

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Replaces `run.json`, whole, by what process 0 gives.

        Every process calls it before its first `append`: a run with tables has a manifest.
        """
        if self._process == 0:
            self._directory.write_manifest(manifest)
        self._barrier()  # also: all hold the place, and know what was finished

    def add_to_data(self, said: Mapping[str, Mapping[str, Any]]) -> None:
        """Adds to what `run.json` says of each group; any process may."""
        manifest = self._directory.require_manifest()
        data = {group: of | said.get(group, {}) for group, of in manifest["data"].items()}
        self._directory.write_manifest(manifest | {"data": data})

    def append(self, results: Iterable[ExampleResult], *, singular_values: bool = True) -> None:
        """Adds one shard per table; the rows count as finished once this returns.

        Raises:
          GradjaxError: if the disk or the object store does not take it, or another run may have
            taken the place over; what was finished before stays.
        """
        results = list(results)
        if not results:
            return
        name = next(self._shard_names)
        tables = {
            "spectra": _spectra_table(results, singular_values),
            "similarity": _similarity_table(results),
            "examples": _examples_table(results),  # last: makes the others count
        }
        for table, data in tables.items():
            shard = io.BytesIO()
            pq.write_table(data, shard, **_ENCODINGS[table])
            self._place.put(f"{table}/{name}", shard.getvalue())
        self.finished |= {
            r.tokenized.example.key: FinishedRow(
                r.tokenized.example.row_hash,
                r.status,
                r.tokenized.num_tokens,
                r.tokenized.truncated,
            )
            for r in results
        }


@contextmanager
def open_store(
    directory: str | Path,
    settings: dict[str, Any],
    found: Found | None = None,
    *,
    overwrite: bool = False,
    process: int = 0,
    num_processes: int = 1,
    barrier: Callable[[], None] = lambda: None,
) -> Iterator[Store]:
    """Takes a run's directory for writing: a new one, or one to go on with.

    Several processes of one run open it together: process 0 prepares it, the others come in, and
    all of them see the same `finished` rows. Until the last of them has left, or was killed, no
    other run comes in. The next run may have another number of processes. What is refused changes
    nothing: all is checked before anything is written.

    Args:
      directory: a path, or a URL of an object store (`s3://bucket/run`); made if missing.
      settings: what the numbers depend on; must equal the `settings` of a manifest that is
        there already.
      found: of `find_run`, which is called where it is not given.
      overwrite: starts anew, removing the tables of an earlier run.
      process: which of the run's processes this is, from 0.
      num_processes: how many open the store together.
      barrier: returns once all of them have called it: here, and in `write_manifest`.

    Raises:
      GradjaxError: if another run writes there, if the directory holds something else, if
        the settings differ (each is named), if it has changed since `found`, or if it cannot be
        written.
    """
    ours = Directory(directory, RUN)
    place = ours.place
    if found is None:
        found = find_run(directory)
    if overwrite:
        found = NOTHING
    if process == 0:
        require_run(ours, settings, found.manifest)
    else:
        barrier()  # process 0 has prepared it
    with place.lock(process):
        if process == 0:
            # Another run may have come and gone meanwhile.
            there = found.manifest if overwrite else ours.manifest() or {}
            require_run(ours, settings, there)
            if there != found.manifest:
                raise _changed(directory)
            _prepare(place, overwrite)
            barrier()
        shards = _shards(place, "examples")
        if tuple(shards) != found.shards:
            raise _changed(directory)
        suffix = f"-{process:04d}" if num_processes > 1 else ""
        yield Store(ours, found, _shard_names(shards, suffix), process, barrier)


def find_run(directory: str | Path) -> Found:
    """What a directory holds of a run, `NOTHING` where there is none.

    Raises:
      GradjaxError: if it holds something else, or cannot be read.
    """
    ours = Directory(directory, RUN)
    ours.require_ours()
    manifest = ours.manifest()
    if manifest is None:
        _require_no_tables(ours)
        return NOTHING
    if not isinstance(manifest.get("settings"), dict):
        raise ours.damaged("it has no settings")
    shards = tuple(_shards(ours.place, "examples"))
    return Found(manifest, shards, finished_rows(directory) if shards else {})


def require_run(ours: Directory, settings: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Raises GradjaxError unless a run with these settings may write here."""
    ours.require_ours()
    _require_no_tables(ours)
    if manifest:
        ours.require_same("a run", manifest["settings"], settings)


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The manifest of a run.

    Raises:
      GradjaxError: if the directory holds none.
    """
    return Directory(directory, RUN).require_manifest()


def read_table(
    directory: str | Path,
    table: str,
    columns: list[str] | None = None,
    where: pc.Expression | None = None,
) -> pa.Table:
    """A table of a run: the rows of finished examples, none where there are none yet.

    Args:
      directory: the run's, a path or a URL.
      table: `examples`, `spectra` or `similarity`.
      columns: which; all if None.
      where: a filter over the columns.

    Raises:
      GradjaxError: if a shard cannot be read.
    """
    place = open_place(directory)
    shards = [place.path(f"{table}/{name}") for name in _shards(place, "examples")]
    return _read(place, table, shards, columns, where)


def read_shards(
    directory: str | Path, tables: Mapping[str, list[str]], where: pc.Expression | None = None
) -> Iterator[tuple[pa.Table, ...]]:
    """`read_table` of several tables, shard by shard.

    All rows of an example are in one shard, the same in every table. Runs may go on meanwhile:
    these are the shards of one moment.

    Args:
      tables: columns by name of the table.
      where: a filter over columns that all of them have.
    """
    place = open_place(directory)
    for name in _shards(place, "examples"):
        yield tuple(
            _read(place, table, [place.path(f"{table}/{name}")], columns, where)
            for table, columns in tables.items()
        )


def _read(
    place: LocalPlace | RemotePlace,
    table: str,
    shards: list[str],
    columns: list[str] | None,
    where: pc.Expression | None,
) -> pa.Table:
    with place.faults("read"):
        try:
            return ds.dataset(
                shards, schema=TABLES[table], format="parquet", filesystem=place.filesystem
            ).to_table(columns, where, fragment_readahead=1)  # a third less memory, no slower
        except pa.ArrowInvalid as error:
            raise GradjaxError(
                f"{place.directory} has a damaged file in {table} ({error}); restore it, or run "
                "anew with --overwrite"
            ) from error


def require_group(directory: str | Path, group: str) -> dict[str, Any]:
    """The manifest of a run that has a group.

    Raises:
      GradjaxError: if there is no such run or group.
    """
    manifest = read_manifest(directory)
    if group not in manifest["data"]:
        raise GradjaxError(
            f"--group={group}: {directory} has the groups {', '.join(manifest['data'])}"
            f"{did_you_mean(group, manifest['data'])}"
        )
    return manifest


def finished_rows(directory: str | Path) -> dict[Key, FinishedRow]:
    """The rows that a store holds now, whoever wrote them.

    Raises:
      GradjaxError: if a shard cannot be read.
    """
    columns = ["group", "example_id", *FinishedRow._fields]
    table = read_table(directory, "examples", columns)
    groups, ids, *rest = (table[name].to_pylist() for name in columns)
    return dict(
        zip(
            zip(groups, ids, strict=True),
            map(FinishedRow._make, zip(*rest, strict=True)),
            strict=True,
        )
    )


def _changed(directory: str | Path) -> GradjaxError:
    return GradjaxError(f"{directory} was changed while this run began; start it again")


def _require_no_tables(ours: Directory) -> None:
    """Raises GradjaxError where files lie in the tables' folders and there is no manifest."""
    # Looked at first: a run that is just being started writes its manifest before its tables.
    tables = any(ours.place.names(table) for table in TABLES)
    if tables and RUN.manifest not in ours.place.names():
        raise GradjaxError(
            f"{ours.path} is not empty and not a gradjax run (found tables without "
            f"{RUN.manifest}); give an empty or new directory with --output_dir"
        )


def _prepare(place: LocalPlace | RemotePlace, overwrite: bool) -> None:
    """Leaves only finished shards, none where an earlier run is replaced."""
    if overwrite:
        for table in TABLES:  # examples first, as in any store what other tables hold alone is void
            place.remove(f"{table}/{name}" for name in place.names(table))
        place.remove({RUN.manifest} & set(place.names()))
    place.make_folders(TABLES)
    whole = set(_shards(place, "examples"))
    for table in ("spectra", "similarity"):
        place.remove(f"{table}/{name}" for name in _shards(place, table) if name not in whole)


def _shards(place: LocalPlace | RemotePlace, table: str) -> list[str]:
    return [name for name in place.names(table) if name.endswith(".parquet")]


def _shard_names(shards: Iterable[str], suffix: str) -> Iterator[str]:
    """Names that no shard has yet, nor will have from a process with another suffix."""
    last = max((int(re.split("[-.]", name)[0]) for name in shards), default=-1)
    return (f"{number:06d}{suffix}.parquet" for number in itertools.count(last + 1))


def _examples_table(results: Sequence[ExampleResult]) -> pa.Table:
    rows = [(result.tokenized.example, result.tokenized, result) for result in results]
    return pa.table(
        {
            "group": [e.group for e, _, _ in rows],
            "example_id": [e.example_id for e, _, _ in rows],
            "row_hash": [e.row_hash for e, _, _ in rows],
            "status": [r.status for _, _, r in rows],
            "reason": [r.reason or None for _, _, r in rows],
            "instruction": [e.instruction for e, _, _ in rows],
            "output": [e.output for e, _, _ in rows],
            "num_tokens": [t.num_tokens for _, t, _ in rows],
            "num_target_tokens": [t.num_target_tokens for _, t, _ in rows],
            "truncated": [t.truncated for _, t, _ in rows],
            "loss": [r.loss for _, _, r in rows],
        },
        TABLES["examples"],
    )


def _spectra_table(results: Sequence[ExampleResult], singular_values: bool) -> pa.Table:
    columns = _columns(
        "spectra", [(result.tokenized.example.key, result.spectra) for result in results]
    )
    lists = pa.nulls(len(columns["group"]))
    if singular_values:
        values = [spectrum.singular_values for result in results for spectrum in result.spectra]
        offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
        flat = np.concatenate([np.zeros(0, np.float32), *values], dtype=np.float32)
        lists = pa.ListArray.from_arrays(offsets, flat)
    return pa.table(columns | {"singular_values": lists}, TABLES["spectra"])


def _similarity_table(results: Sequence[ExampleResult]) -> pa.Table:
    rows = [(result.tokenized.example.key, result.similarity) for result in results]
    return pa.table(_columns("similarity", rows), TABLES["similarity"])


def _columns(table: str, examples: Sequence[tuple[Key, Sequence[Any]]]) -> dict[str, Any]:
    """A table's columns but lists, from the objects that are each example's rows."""
    names = [f.name for f in TABLES[table] if not pa.types.is_list(f.type)][2:]
    rows = [row for _, of in examples for row in of]
    fields = zip(*map(attrgetter(*names), rows), strict=True) if rows else [()] * len(names)
    return {
        "group": [group for (group, _), of in examples for _ in of],
        "example_id": [example_id for (_, example_id), of in examples for _ in of],
        **dict(zip(names, fields, strict=True)),
    }
