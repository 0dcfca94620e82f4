"""Every format broken in every way: a row status or one sentence, and no row is lost."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gradjax.data.examples import to_example
from gradjax.data.sources import Source, read_rows
from gradjax.errors import GradjaxError
from gradjax.structs import Example

ROWS = [{"instruction": f"größer als {n}?", "output": "ja " * n} for n in range(1, 8)]
NAMES = [
    f"x.{kind}{packing}"
    for kind in ("json", "jsonl", "ndjson", "csv", "tsv")
    for packing in ("", ".gz", ".zst", ".bz2")
]
FAULTS = ("truncated", "wrong type", "mixed encodings", "UTF-16")


def text_of(name: str, rows: list[dict[str, str]]) -> str:
    kind = name.split(".")[1]
    if kind == "json":
        return json.dumps(rows, ensure_ascii=False, indent=1)
    if kind in ("csv", "tsv"):
        comma = "," if kind == "csv" else "\t"
        return "".join(comma.join(of) + "\n" for of in (rows[0], *(row.values() for row in rows)))
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(path: Path, content: bytes) -> None:
    """The content, compressed as the file's name says."""
    kinds = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
    if path.suffix in kinds:
        with (
            pa.OSFile(str(path), "wb") as raw,
            pa.CompressedOutputStream(raw, kinds[path.suffix]) as file,
        ):
            file.write(content)
    else:
        path.write_bytes(content)


def break_file(path: Path, fault: str) -> None:
    text = text_of(path.name, ROWS)
    if fault == "truncated":
        write(path, text.encode())
        path.write_bytes(path.read_bytes()[:-11])
    elif fault == "wrong type":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif fault == "mixed encodings":
        whole = text.encode()
        row = ROWS[3]["instruction"]
        write(path, whole.replace(row.encode(), row.encode("latin-1")))
    else:
        write(path, text.encode("utf-16"))


def read(path: Path) -> list[Example] | str:
    """The rows, or what is said of the file."""
    try:
        rows = read_rows(Source("g", str(path)))
    except GradjaxError as error:
        return str(error)
    return [to_example(row, "g", number) for number, row in enumerate(rows)]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", NAMES)
def test_broken_texts_give_a_row_status_or_one_sentence(tmp_path, name, fault):
    path = tmp_path / name
    write(path, text_of(name, ROWS).encode())
    whole = read(path)
    assert [(e.instruction, e.status) for e in whole] == [(r["instruction"], "ok") for r in ROWS]
    break_file(path, fault)
    found = read(path)
    if isinstance(found, str):
        assert str(path) in found
        assert "\n" not in found
        assert len(found) < 400
        assert fault != "UTF-16" or "UTF-16" in found
        return
    # Lines: the broken ones keep their places, the others are as they were.
    assert fault in ("truncated", "mixed encodings", "wrong type")
    for number, example in enumerate(found):
        assert example.example_id == number
        if example.status == "ok" and number < len(ROWS) - 1:
            assert example.instruction == ROWS[number]["instruction"]
        elif example.status != "ok":
            assert example.reason
    if fault == "mixed encodings":
        assert [e.status for e in found] == ["invalid_row" if n == 3 else "ok" for n in range(7)]
    if fault == "truncated":
        assert [e.status for e in found[:6]] == ["ok"] * 6


@pytest.mark.parametrize("fault", ["truncated", "wrong type", "mixed encodings"])
def test_broken_parquet_is_one_sentence(tmp_path, fault):
    path = tmp_path / "x.parquet"
    if fault == "wrong type":
        path.write_text(text_of("x.csv", ROWS))
    elif fault == "truncated":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
        path.write_bytes(path.read_bytes()[:-11])
    else:
        texts = [row["instruction"].encode() for row in ROWS]
        texts[3] = ROWS[3]["instruction"].encode("latin-1")
        column = pa.array(texts, pa.binary()).view(pa.string())
        pq.write_table(pa.table({"instruction": column, "output": column}), path)
    said = read(path)
    assert isinstance(said, str)
    assert str(path) in said
    assert "\n" not in said


@pytest.mark.parametrize("fault", ["truncated", "wrong type", "missing shard"])
def test_a_broken_file_of_a_folder_is_named(tmp_path, fault):
    for number in range(3):
        path = tmp_path / f"train-{number:05d}-of-00003.parquet"
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    if fault == "missing shard":
        path.unlink()
    elif fault == "truncated":
        path.write_bytes(path.read_bytes()[:-11])
    else:
        path.write_text("{}")
    said = read(tmp_path)
    assert isinstance(said, str)
    assert path.name in said
    assert "\n" not in said
