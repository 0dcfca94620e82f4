"""Where rows come from: files, saved and registered data sets, the Hub and the embedded groups.

Rows are handed on as they stand, whatever they are; `examples.py` judges them one by
one. What is raised here are faults of a whole source: it is missing, empty or unreadable.
"""

import dataclasses
import glob
import hashlib
import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from gradjax.config import Reading
from gradjax.data.catalog import DATASETS, RegisteredDataset, fetch
from gradjax.data.readers import FORMATS, BadRow, is_data_file, read_file, stem
from gradjax.data.word_problems import DEMO_GROUPS, demo_rows
from gradjax.errors import GradjaxError, extras, first_line
from gradjax.storage.filesystem import url_to_fs

DEMO = "demo"

_GROUP = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# As `datasets` names the files of a split: train-00001-of-00003.parquet.
_SHARD = re.compile(r"(.*-)\d{5}-of-(\d{5})(\..*)")
# ORG/NAME[:CONFIG][@SPLIT]
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?::([\w.+-]+))?(?:@([\w.-]+))?", re.ASCII)
_FORMATS = (
    f"files ({FORMATS}, also .gz or .zst) by path, URL, glob or folder, a directory written by "
    f"datasets.save_to_disk, a registered data set ({', '.join(DATASETS)}), a Hub data set "
    "(ORG/NAME[:CONFIG][@SPLIT]) or demo"
)


@dataclasses.dataclass(frozen=True)
class Source:
    """Rows under one group name."""

    group: str
    location: str  # paths or URLs with commas between, registered name, Hub id, or "demo"
    reading: Reading = dataclasses.field(default_factory=Reading)

    @property
    def absolute(self) -> str:
        """The location as it can be read from any folder."""
        if _known(self):
            return self.location
        return ",".join(map(_absolute, _parts(self.location)))

    @classmethod
    def of_manifest(cls, group: str, of: Mapping[str, Any]) -> "Source":
        """The source that `describe_rows` described."""
        return cls(group, str(of["source"]), Reading(**of.get("reading", {})))


def _absolute(part: str) -> str:
    path = os.path.expanduser(part)
    here = os.path.exists(path) or _is_glob(path)
    return os.path.abspath(path) if here and "://" not in part else part


def _parts(location: str) -> list[str]:
    """Several files of one group have commas between."""
    return [location] if os.path.exists(os.path.expanduser(location)) else location.split(",")


def _is_glob(path: str) -> bool:
    return any(character in path for character in "*?[")


def parse_data_flags(specs: Sequence[str], reading: Reading | None = None) -> tuple[Source, ...]:
    """The sources named by the values of `--data`, each `[GROUP=]SOURCE`.

    GROUP defaults to the file's stem or the Hub id's name. `demo` stands for its three
    groups. Raises GradjaxError for a group name that is odd or used twice.
    """
    sources = [source for spec in specs for source in _parse(spec, reading or Reading())]
    by_group: dict[str, Source] = {}
    for source in sources:
        first = by_group.setdefault(source.group, source)
        if first is not source:
            raise GradjaxError(
                f"--data names the group {source.group!r} twice, for {first.location!r} and "
                f"{source.location!r}: give each its own name with --data=GROUP=SOURCE."
            )
    return tuple(sources)


def _parse(spec: str, reading: Reading) -> list[Source]:
    if spec == DEMO:
        return [Source(group, DEMO) for group in DEMO_GROUPS]
    group, equals, location = spec.partition("=")
    if not equals or "/" in group:  # A path may hold "=" itself: DIR/x=1/rows.json.
        group, location = _default_group(spec), spec
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
    return [Source(group, location, reading)]


def _default_group(location: str) -> str:
    if is_data_file(location):
        return stem(location)
    if hub := _HUB_ID.fullmatch(location):
        location = hub[1]
    return pathlib.PurePath(location).name


def read_rows(source: Source, limit: int | None = None) -> list[object]:
    """`stream_rows` as a list."""
    return list(stream_rows(source, limit))


def stream_rows(source: Source, limit: int | None = None) -> Iterator[object]:
    """The first `limit` rows of a source (all by default), in order, as they are read.

    A row of a JSON file is whatever stands there; rows of column stores are dicts. A registered
    name comes before a path, as with models: what lies here under such a name is ./NAME.
    Raises GradjaxError when the source is missing, empty or cannot be read.
    """
    empty = True
    for row in itertools.islice(_rows(source, limit), limit):
        empty = False
        yield row
    if empty:
        raise GradjaxError(
            f"{source.location} (group {source.group!r}) holds no rows: expected at least one."
        )


def registered_rows(dataset: RegisteredDataset, place: pathlib.Path) -> Iterator[object]:
    """Every row of a registered data set, in order, as `gradjax.data.examples` reads it.

    `place` is a copy of its repository, or its rows in a file or a saved data set. Raises
    GradjaxError when it is none of them, lacks some of its files or cannot be read.
    """
    if os.path.isdir(place) and (files := sorted(place.glob(dataset.files))):
        _require_every_shard(files)
        rows = itertools.chain.from_iterable(read_file(str(file)) for file in files)
    elif os.path.isfile(place) or _is_saved(place):
        rows = _rows(Source(dataset.name, str(place.absolute())), None)
    else:
        raise GradjaxError(
            f"{place} is no copy of {dataset.name}: expected a directory with {dataset.files}, one "
            f"written by datasets.save_to_disk, or a file ({FORMATS})."
        )
    return map(dataset.to_row, rows)


def row_hash(row: object) -> str:
    """Hex digest of a row: equal for equal JSON, whatever the order of the keys."""
    if isinstance(row, BadRow):
        row = row.text
    try:
        text = json.dumps(row, sort_keys=True, separators=(",", ":"), default=repr)
    except (TypeError, ValueError, RecursionError):  # keys that JSON has not; rows in themselves
        text = ascii(row)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:32]


def describe_rows(source: Source, rows: int | None, hashed: str | None) -> dict[str, Any]:
    """What a manifest says of a group: source, how it is read, number of rows and their hash.

    The last two are None until the source is read to its end.
    """
    said = {"source": source.absolute, "rows": rows, "hash": hashed}
    reading = source.reading.settings()
    return said | {"reading": reading} if reading else said


def require_sources(sources: Iterable[Source]) -> None:
    """Raises GradjaxError where there is no such data; reads nothing and asks no other machine."""
    for source in sources:
        if not _known(source) and "://" not in source.location:
            _data_files(source)


def _known(source: Source) -> bool:
    return source.location == DEMO or source.location in DATASETS


def _rows(source: Source, limit: int | None) -> Iterable[object]:
    if source.location == DEMO:
        return demo_rows(source.group)
    if dataset := DATASETS.get(source.location):
        return registered_rows(dataset, _fetch(dataset))
    if files := _data_files(source):
        read = partial(read_file, strict=source.reading.strict)
        return itertools.chain.from_iterable(map(read, files))
    path = pathlib.Path(os.path.expanduser(source.location))
    if os.path.isdir(path):
        return _read_saved(path, limit)
    hub = _HUB_ID.fullmatch(source.location)
    assert hub  # or there are no data
    return _read_hub(source, hub, limit)


def _data_files(source: Source) -> list[str]:
    """The files of a source, none of a saved data set or one of the Hub."""
    parts = {part: _files(part) for part in _parts(source.location)}
    files = list(itertools.chain.from_iterable(parts.values()))
    if len(parts) > 1 and (none := [part for part, found in parts.items() if not found]):
        raise GradjaxError(
            f"--data={source.location}: {none[0]} is no data file, folder or glob; only such go "
            "together in one group, with commas between"
        )
    if len(set(files)) < len(files):
        twice = next(file for file in files if files.count(file) > 1)
        raise GradjaxError(f"--data={source.location} names {twice} twice: each row counts once")
    saved = os.path.isdir(os.path.expanduser(source.location))
    if not (files or saved or _HUB_ID.fullmatch(source.location)):
        raise GradjaxError(f"There is no data source {source.location!r}: expected {_FORMATS}.")
    return files


def _files(part: str) -> list[str]:
    """The data files of a path, URL, glob or folder; none where it is something else."""
    path = part if "://" in part else os.path.expanduser(part)
    # os.path answers False where pathlib raises: names too long, folders that may not be read.
    if "://" in path:
        if is_data_file(path) and not _is_glob(path):
            return [path]
        found = _listed(path)
    elif os.path.isdir(path):
        if _is_saved(pathlib.Path(path)):
            return []
        found = glob.glob(os.path.join(glob.escape(path), "*"))
    elif os.path.exists(path) or (is_data_file(path) and not _is_glob(path)):
        if not is_data_file(path):
            raise GradjaxError(
                f"{path} has the unknown extension {os.path.splitext(path)[1]!r}: expected "
                f"{_FORMATS}."
            )
        if not os.path.isfile(path):
            raise GradjaxError(f"There is no file {path}: expected {_FORMATS}.")
        return [path]
    else:
        found = glob.glob(path, recursive=True) if _is_glob(path) else []
    files = sorted(filter(is_data_file, found))
    if not files and (_is_glob(path) or "://" in path or os.path.isdir(path)):
        raise GradjaxError(f"{path} holds no data files: expected {_FORMATS}.")
    _require_every_shard([pathlib.PurePosixPath(file) for file in files])
    return files


def _listed(url: str) -> list[str]:
    """What lies under a URL, or fits it as a glob."""
    try:
        filesystem, inner = url_to_fs(url)
        pattern = inner if _is_glob(inner) else f"{inner.rstrip('/')}/*"
        return [filesystem.unstrip_protocol(name) for name in filesystem.glob(pattern)]
    except GradjaxError:
        raise
    except Exception as error:  # each filesystem has errors of its own
        raise GradjaxError(
            f"{url} cannot be listed ({first_line(error)}): check the URL, and keys and endpoint "
            "in the environment."
        ) from error


def _fetch(dataset: RegisteredDataset) -> pathlib.Path:
    try:
        return fetch(dataset)
    except GradjaxError as error:
        if not os.path.exists(dataset.name):
            raise
        raise GradjaxError(
            f"{error}; something of this name lies here: give ./{dataset.name} to read it"
        ) from error


def _require_every_shard(files: Sequence[pathlib.PurePath]) -> None:
    there = {file.name for file in files}
    for start, count, end in {shard.groups() for shard in map(_SHARD.fullmatch, there) if shard}:
        names = [f"{start}{i:05d}-of-{count}{end}" for i in range(int(count))]
        if missing := [name for name in names if name not in there]:
            raise GradjaxError(
                f"{files[0].parent} lacks {len(missing)} of {len(names)} files, the first of them "
                f"{missing[0]}: put them there too."
            )


def _read_saved(path: pathlib.Path, limit: int | None) -> Iterable[object]:
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


def _read_hub(source: Source, hub: re.Match[str], limit: int | None) -> Iterable[object]:
    with extras():
        import datasets

    name, config, split = hub[1], hub[2], hub[3] or "train"
    try:
        data = datasets.load_dataset(
            name, config, split=split, revision=source.reading.data_revision
        )
    except Exception as error:  # Network, access, layout: the library raises many kinds.
        raise GradjaxError(
            f"--data={source.location} is no local path, and its split {split!r} cannot be loaded "
            f"from the Hub ({type(error).__name__}: {first_line(error)}): check "
            f"https://huggingface.co/datasets/{name}, name another split or configuration as in "
            f"{name}:CONFIG@SPLIT, accept its terms and set HF_TOKEN if it is gated, or download "
            "it and give the path of a local file."
        ) from error
    return _plain_rows(data, limit)


def _plain_rows(data, limit: int | None) -> list[object]:
    """Rows of a `datasets.Dataset` as plain values; columns of media stay undecoded."""
    return data.with_format("arrow")[:limit].to_pylist()
