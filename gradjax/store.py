"""The store: one manifest and three Parquet tables, written in whole shards.

A shard of `examples/` is what makes rows finished: it is put in place after the shards of the
same name in `spectra/` and `similarity/`, and what those hold without it is removed when the
run is taken up again. Every file is written under `.tmp/`, flushed to disk and renamed.
"""

import dataclasses
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from gradjax.errors import GradjaxError
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
MANIFEST = "run.json"
Key = tuple[str, int]  # group, example_id


class Store:
    """A run's directory, held by one writer. Made by `open_store`."""

    def __init__(self, directory: Path, manifest: dict[str, Any], finished: dict[Key, str]):
        self.directory = directory
        self.manifest = manifest  # empty for a new run
        self.finished = finished  # row hash by key

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Replaces `run.json`, whole."""
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        with self._placed(self.directory / MANIFEST) as path:
            path.write_text(text, encoding="utf-8")

    def append(self, results: Iterable[ExampleResult], *, singular_values: bool = True) -> None:
        """Adds one shard per table; the rows count as finished once this returns.

        Raises:
          GradjaxError: if the disk does not take it; what was finished before stays.
        """
        results = list(results)
        if not results:
            return
        number = 1 + max(
            (int(path.stem) for path in _shards(self.directory, "examples")), default=-1
        )
        columns = {
            "spectra": _spectra_rows(results, singular_values),
            "similarity": _similarity_rows(results),
            "examples": _example_rows(results),  # last: makes the others count
        }
        for table, rows in columns.items():
            data = pa.Table.from_pylist(rows, TABLES[table])
            with self._placed(self.directory / table / f"{number:06d}.parquet") as path:
                pq.write_table(data, path, **_ENCODINGS[table])
        self.finished |= {_key(r): r.tokenized.example.row_hash for r in results}

    @contextmanager
    def _placed(self, target: Path) -> Iterator[Path]:
        """A temporary path that becomes `target` at once, after its bytes are on disk."""
        temporary = self.directory / ".tmp" / target.name
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(target)
            _sync_directory(target.parent)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise _disk_fault(self.directory, error) from error


@contextmanager
def open_store(
    directory: Path, settings: dict[str, Any], *, overwrite: bool = False
) -> Iterator[Store]:
    """Takes a run's directory for writing: a new one, or one to go on with.

    Args:
      directory: made if missing.
      settings: what the numbers depend on; must equal the `settings` of a manifest that is
        there already.
      overwrite: starts anew, removing the tables of an earlier run.

    Raises:
      GradjaxError: if another process writes there, if the directory holds something else, if
        the settings differ (each is named), or if it cannot be written.
    """
    try:
        _require_run_or_nothing(directory)
        (directory / ".tmp").mkdir(parents=True, exist_ok=True)
        lock = (directory / ".tmp" / "lock").open("a+")
    except OSError as error:
        raise _disk_fault(directory, error) from error
    with lock:
        try:
            _take(lock, directory)
            manifest = _prepare(directory, settings, overwrite)
            finished = _finished(directory)
        except OSError as error:
            raise _disk_fault(directory, error) from error
        yield Store(directory, manifest, finished)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a run.

    Raises:
      GradjaxError: if the directory holds none.
    """
    path = directory / MANIFEST
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise GradjaxError(
            f"{directory} is not a gradjax run: it has no {MANIFEST}; give the directory that "
            "gradjax.main wrote (--output_dir)"
        ) from None
    except ValueError as error:
        raise GradjaxError(f"{path} is not valid JSON ({error}); restore it or run anew") from error


def read_table(
    directory: Path,
    table: str,
    columns: list[str] | None = None,
    where: pc.Expression | None = None,
) -> pa.Table:
    """A table of a run, all shards; no rows where there are none yet.

    Args:
      directory: the run's.
      table: `examples`, `spectra` or `similarity`.
      columns: which; all if None.
      where: a filter over the columns.
    """
    shards = [str(path) for path in _shards(directory, table)]
    return ds.dataset(shards, schema=TABLES[table], format="parquet").to_table(columns, where)


def _require_run_or_nothing(directory: Path) -> None:
    """Raises GradjaxError where a directory holds anything but a run; leaves it untouched."""
    if (directory / MANIFEST).exists() or not directory.exists():
        return
    strangers = sorted(p.name for p in directory.iterdir() if p.name not in (".tmp", *TABLES))
    if strangers or any(_shards(directory, table) for table in TABLES):
        raise GradjaxError(
            f"{directory} is not empty and not a gradjax run (found "
            f"{', '.join(strangers[:3]) or 'tables without ' + MANIFEST}); give an empty or "
            "new directory with --output_dir"
        )


def _take(lock: Any, directory: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise GradjaxError(
            f"{directory} is being written by process {lock.read().strip() or 'unknown'}; wait "
            "for it, or give another --output_dir"
        ) from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()


def _prepare(directory: Path, settings: dict[str, Any], overwrite: bool) -> dict[str, Any]:
    """Leaves only finished shards; returns the manifest of the run that is there, if any."""
    manifest: dict[str, Any] = {}
    if (directory / MANIFEST).exists():
        if overwrite:
            for table in TABLES:
                shutil.rmtree(directory / table, ignore_errors=True)
            (directory / MANIFEST).unlink()
        else:
            manifest = read_manifest(directory)
            _require_same(directory, settings, manifest.get("settings", {}))

    for leftover in (directory / ".tmp").iterdir():
        if leftover.name != "lock":
            leftover.unlink()
    for table in TABLES:
        (directory / table).mkdir(exist_ok=True)
    whole = {path.name for path in _shards(directory, "examples")}
    for table in ("spectra", "similarity"):
        for path in _shards(directory, table):
            if path.name not in whole:
                path.unlink()
    return manifest


def _finished(directory: Path) -> dict[Key, str]:
    """The rows that the store holds, and their hashes."""
    rows = read_table(directory, "examples", ["group", "example_id", "row_hash"]).to_pylist()
    return {(row["group"], row["example_id"]): row["row_hash"] for row in rows}


def _require_same(directory: Path, settings: dict[str, Any], found: dict[str, Any]) -> None:
    differing = [
        f"{name} ({found.get(name)!r} there, {settings.get(name)!r} now)"
        for name in sorted({*settings, *found})
        if settings.get(name) != found.get(name)
    ]
    if differing:
        raise GradjaxError(
            f"{directory} holds a run with other settings: {'; '.join(differing)}; use the same "
            "settings, another --output_dir, or --overwrite to replace it"
        )


def _shards(directory: Path, table: str) -> list[Path]:
    return sorted((directory / table).glob("*.parquet"))


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk_fault(directory: Path, error: OSError) -> GradjaxError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return GradjaxError(
            f"the disk is full ({error.strerror}) while writing to {directory}; finished rows are "
            "kept: free some space and run the same command again"
        )
    return GradjaxError(
        f"cannot write to {directory} ({error.strerror or error}); give a writable directory "
        "with --output_dir"
    )


def _key(result: ExampleResult) -> Key:
    example = result.tokenized.example
    return example.group, example.example_id


def _example_rows(results: list[ExampleResult]) -> list[dict[str, Any]]:
    return [
        {
            "group": result.tokenized.example.group,
            "example_id": result.tokenized.example.example_id,
            "row_hash": result.tokenized.example.row_hash,
            "status": result.status,
            "reason": result.reason or None,
            "instruction": result.tokenized.example.instruction,
            "output": result.tokenized.example.output,
            "num_tokens": result.tokenized.num_tokens,
            "num_target_tokens": result.tokenized.num_target_tokens,
            "truncated": result.tokenized.truncated,
            "loss": result.loss,
        }
        for result in results
    ]


def _spectra_rows(results: list[ExampleResult], singular_values: bool) -> list[dict[str, Any]]:
    rows = []
    for result in results:
        group, example_id = _key(result)
        for spectrum in result.spectra:
            row = {
                field.name: getattr(spectrum, field.name) for field in dataclasses.fields(spectrum)
            }
            if not singular_values:
                row["singular_values"] = None
            rows.append({"group": group, "example_id": example_id, **row})
    return rows


def _similarity_rows(results: list[ExampleResult]) -> list[dict[str, Any]]:
    rows = []
    for result in results:
        group, example_id = _key(result)
        for similarity in result.similarity:
            rows.append(
                {"group": group, "example_id": example_id, **dataclasses.asdict(similarity)}
            )
    return rows
