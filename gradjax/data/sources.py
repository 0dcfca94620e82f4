"""Where rows come from: files, saved and registered data sets, the Hub and the embedded groups.

Rows are handed on as they stand, whatever they are; `examples.py` judges them one by
one. What is raised here are faults of a whole source: it is missing, empty or unreadable.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pyarrow.parquet

from gradjax.data.catalog import DATASETS, RegisteredDataset, fetch
from gradjax.data.word_problems import DEMO_GROUPS, demo_rows
from gradjax.errors import GradjaxError, extras, first_line

DEMO = "demo"

_GROUP = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# As `datasets` names the files of a split: train-00001-of-00003.parquet.
_SHARD = re.compile(r"(.*-)\d{5}-of-(\d{5})(\..*)")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_FORMATS = (
    "a .json, .jsonl or .parquet file, a directory written by datasets.save_to_disk, "
    f"a registered data set ({', '.join(DATASETS)}), a Hub data set (ORG/NAME) or demo"
)


@dataclasses.dataclass(frozen=True)
class Source:
    """Rows under one group name."""

    group: str
    location: str  # path, registered name, Hub id, or "demo"

    @property
    def absolute(self) -> str:
        """The location as it can be read from any folder."""
        path = os.path.expanduser(self.location)
        named = self.location == DEMO or self.location in DATASETS
        return os.path.abspath(path) if not named and os.path.exists(path) else self.location


def parse_data_flags(specs: Sequence[str]) -> tuple[Source, ...]:
    """The sources named by the values of `--data`, each `[GROUP=]SOURCE`.

    GROUP defaults to the file's stem or the Hub id's name. `demo` stands for its three
    groups. Raises GradjaxError for a group name that is odd or used twice.
    """
    sources = [source for spec in specs for source in _parse(spec)]
    by_group: dict[str, Source] = {}
    for source in sources:
        first = by_group.setdefault(source.group, source)
        if first is not source:
            raise GradjaxError(
                f"--data names the group {source.group!r} twice, for {first.location!r} and "
                f"{source.location!r}: give each its own name with --data=GROUP=SOURCE."
            )
    return tuple(sources)


def _parse(spec: str) -> list[Source]:
    if spec == DEMO:
        return [Source(group, DEMO) for group in DEMO_GROUPS]
    group, equals, location = spec.partition("=")
    if not equals or "/" in group:  # A path may hold "=" itself: DIR/x=1/rows.json.
        path = pathlib.PurePath(spec)
        is_file = path.suffix in _READERS
        group, location = path.stem if is_file else path.name, spec
    if not location:
        raise GradjaxError(f"--data={spec!r} names no source: expected [GROUP=]SOURCE, {_FORMATS}.")
    if not _GROUP.fullmatch(group):
        raise GradjaxError(
            f"--data={spec!r} gives the group name {group!r}: expected letters, digits, '.', '_' "
            "and '-', beginning with a letter or digit; name it with --data=GROUP=SOURCE."
        )
    if location == DEMO:
        raise GradjaxError(
            f"--data={spec!r} names the embedded data, which bring their own groups "
            f"({', '.join(DEMO_GROUPS)}): use --data=demo."
        )
    return [Source(group, location)]


def read_rows(source: Source, limit: int | None = None) -> list[object]:
    """The first `limit` rows of a source (all by default), in order.

    A row of a JSON file is whatever stands there; rows of column stores are dicts. A registered
    name comes before a path, as with models: what lies here under such a name is ./NAME.
    Raises GradjaxError when the source is missing, empty or cannot be read.
    """
    rows = list(itertools.islice(_rows(source, limit), limit))
    if not rows:
        raise GradjaxError(
            f"{source.location} (group {source.group!r}) holds no rows: expected at least one."
        )
    return rows


def registered_rows(dataset: RegisteredDataset, place: pathlib.Path) -> Iterator[object]:
    """Every row of a registered data set, in order, as `gradjax.data.examples` reads it.

    `place` is a copy of its repository, or its rows in a file or a saved data set. Raises
    GradjaxError when it is none of them, lacks some of its files or cannot be read.
    """
    if os.path.isdir(place) and (files := sorted(place.glob(dataset.files))):
        _require_every_shard(files)
        rows = itertools.chain.from_iterable(_READERS[file.suffix](file) for file in files)
    elif os.path.isfile(place) or _is_saved(place):
        rows = _rows(Source(dataset.name, str(place.absolute())), None)
    else:
        raise GradjaxError(
            f"{place} is no copy of {dataset.name}: expected a directory with {dataset.files}, one "
            "written by datasets.save_to_disk, or a .json, .jsonl or .parquet file."
        )
    return map(dataset.to_row, rows)


def row_hash(row: object) -> str:
    """Hex digest of a row: equal for equal JSON, whatever the order of the keys."""
    text = json.dumps(row, sort_keys=True, separators=(",", ":"), default=repr)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:32]


def data_hash(rows: Iterable[object]) -> str:
    """Hex digest of rows in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row_hash(row).encode("ascii"))
    return digest.hexdigest()[:32]


def describe_rows(source: Source, rows: Sequence[object]) -> dict[str, Any]:
    """What a manifest says of a group: source, number of rows and hash."""
    return {"source": source.absolute, "rows": len(rows), "hash": data_hash(rows)}


def _rows(source: Source, limit: int | None) -> Iterable[object]:
    if source.location == DEMO:
        return demo_rows(source.group)
    if dataset := DATASETS.get(source.location):
        return registered_rows(dataset, _fetch(dataset))
    # os.path answers False where pathlib raises: names too long, folders that may not be read.
    path = pathlib.Path(os.path.expanduser(source.location))
    if os.path.isdir(path):
        return _read_saved(path, limit)
    if reader := _READERS.get(path.suffix):
        if not os.path.isfile(path):
            raise GradjaxError(f"There is no file {path}: expected {_FORMATS}.")
        return reader(path)
    if os.path.exists(path):
        raise GradjaxError(
            f"{path} has the unknown extension {path.suffix!r}: expected {_FORMATS}."
        )
    if _HUB_ID.fullmatch(source.location):
        return _read_hub(source.location, limit)
    raise GradjaxError(f"There is no data source {source.location!r}: expected {_FORMATS}.")


def _fetch(dataset: RegisteredDataset) -> pathlib.Path:
    try:
        return fetch(dataset)
    except GradjaxError as error:
        if not os.path.exists(dataset.name):
            raise
        raise GradjaxError(
            f"{error}; something of this name lies here: give ./{dataset.name} to read it"
        ) from error


def _require_every_shard(files: Sequence[pathlib.Path]) -> None:
    there = {file.name for file in files}
    for start, count, end in {shard.groups() for shard in map(_SHARD.fullmatch, there) if shard}:
        names = [f"{start}{i:05d}-of-{count}{end}" for i in range(int(count))]
        if missing := [name for name in names if name not in there]:
            raise GradjaxError(
                f"{files[0].parent} lacks {len(missing)} of {len(names)} files, the first of them "
                f"{missing[0]}: put them there too."
            )


def _read_json(path: pathlib.Path) -> Iterator[object]:
    try:
        data = _parse_json(_read_bytes(path))
    except json.JSONDecodeError as error:
        hint = "; one object per line belongs in a .jsonl file" if "Extra" in error.msg else ""
        raise GradjaxError(
            f"{path} is not JSON, line {error.lineno} column {error.colno}: {error.msg}{hint}."
        ) from error
    except (ValueError, RecursionError) as error:
        raise GradjaxError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(data, list):
        keys = f" with the keys {list(data)[:5]}" if isinstance(data, dict) else ""
        raise GradjaxError(
            f"{path} holds one {type(data).__name__}{keys} at its top level: "
            "expected a list of objects."
        )
    yield from data


def _read_jsonl(path: pathlib.Path) -> Iterator[object]:
    # Lines are split as bytes: text may hold other characters that str.splitlines cuts at.
    for number, line in enumerate(_open_lines(path), start=1):
        if not line.strip(b" \t\r\n\xef\xbb\xbf"):
            continue
        try:
            yield _parse_json(line.rstrip())
        except json.JSONDecodeError as error:
            raise GradjaxError(
                f"{path} line {number} is not JSON, column {error.colno}: {error.msg}; "
                "expected one object per line."
            ) from error
        except (ValueError, RecursionError) as error:
            raise GradjaxError(f"{path} line {number} cannot be read as JSON: {error}.") from error


def _read_parquet(path: pathlib.Path) -> Iterator[object]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise GradjaxError(f"{path} cannot be read as Parquet: {first_line(error)}.") from error


def _read_saved(path: pathlib.Path, limit: int | None) -> Iterable[object]:
    if not _is_saved(path):
        raise GradjaxError(
            f"The directory {path} holds no data set: expected one written by "
            "datasets.save_to_disk, or the path of a .json, .jsonl or .parquet file."
        )
    with extras():
        import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # Whatever a damaged directory makes the library raise.
        raise GradjaxError(
            f"The data set in {path} cannot be loaded: {first_line(error)}."
        ) from error
    if isinstance(data, datasets.DatasetDict):
        if "train" not in data and len(data) != 1:
            raise GradjaxError(
                f"The data set in {path} has the splits {sorted(data)}: expected 'train' or a "
                "single one; name the directory of one split."
            )
        data = data["train"] if "train" in data else next(iter(data.values()))
    return _plain_rows(data, limit)


def _is_saved(path: pathlib.Path) -> bool:
    return any(os.path.isfile(path / name) for name in ("state.json", "dataset_dict.json"))


def _read_hub(name: str, limit: int | None) -> Iterable[object]:
    with extras():
        import datasets

    try:
        data = datasets.load_dataset(name, split="train")
    except Exception as error:  # Network, access, layout: the library raises many kinds.
        raise GradjaxError(
            f"--data={name} is no local path, and its split 'train' cannot be loaded from the "
            f"Hub ({type(error).__name__}: {first_line(error)}): check "
            f"https://huggingface.co/datasets/{name}, accept its terms and set HF_TOKEN if it is "
            "gated, or download it and give the path of a local file."
        ) from error
    return _plain_rows(data, limit)


def _plain_rows(data, limit: int | None) -> list[object]:
    """Rows of a `datasets.Dataset` as plain values; columns of media stay undecoded."""
    return data.with_format("arrow")[:limit].to_pylist()


def _read_bytes(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise GradjaxError(f"{path} cannot be read: {error.strerror}.") from error


def _open_lines(path: pathlib.Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from file
    except OSError as error:
        raise GradjaxError(f"{path} cannot be read: {error.strerror}.") from error


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


_READERS: dict[str, Callable[[pathlib.Path], Iterator[object]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
