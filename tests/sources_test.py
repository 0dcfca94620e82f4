"""Reading rows: every format, and what is said about sources that cannot be read."""

import gzip
import json

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gradjax.config import Reading
from gradjax.data import readers
from gradjax.data.examples import to_example
from gradjax.data.readers import BadRow
from gradjax.data.sources import (
    Source,
    describe_rows,
    parse_data_flags,
    read_rows,
    row_hash,
)
from gradjax.errors import GradjaxError

pytestmark = pytest.mark.smoke

ROWS = [
    {"instruction": f"Question {i}?", "output": f"Größe {i}\u2028é", "score": i / 4}
    for i in range(7)
]


def read(path, limit=None):
    return read_rows(Source("g", str(path)), limit)


@pytest.fixture(params=["json", "jsonl", "parquet", "saved", "saved_dict"])
def stored(request, tmp_path):
    """The same rows in one of the formats."""
    path = tmp_path / f"rows.{request.param}"
    if request.param == "json":
        path.write_text(json.dumps(ROWS, ensure_ascii=False), "utf-8")
    elif request.param == "jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), "utf-8")
    elif request.param == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=3)
    else:
        data = datasets.Dataset.from_list(ROWS)
        if request.param == "saved_dict":
            data = datasets.DatasetDict({"test": data.select([0]), "train": data})
        data.save_to_disk(str(path))
    return path


def test_every_format_gives_the_same_rows_in_order(stored):
    assert read(stored) == ROWS
    assert read(stored, limit=3) == ROWS[:3]
    assert read(stored, limit=99) == ROWS
    assert [*map(row_hash, read(stored))] == [*map(row_hash, ROWS)]


@pytest.mark.parametrize(
    ("spec", "group", "location"),
    [
        ("data/high.json", "high", "data/high.json"),
        ("high=data/x.v2.jsonl", "high", "data/x.v2.jsonl"),
        ("x.v2.parquet", "x.v2", "x.v2.parquet"),
        ("runs/my_set.v1", "my_set.v1", "runs/my_set.v1"),
        ("allenai/tulu-3.1", "tulu-3.1", "allenai/tulu-3.1"),
        ("openai/gsm8k:main@train", "gsm8k", "openai/gsm8k:main@train"),
        ("data/x.jsonl.gz", "x", "data/x.jsonl.gz"),
        ("/a/lang=en/part.json", "part", "/a/lang=en/part.json"),
        ("en=/a/lang=en/part.json", "en", "/a/lang=en/part.json"),
    ],
)
def test_flags_name_group_and_location(spec, group, location):
    assert parse_data_flags([spec]) == (Source(group, location),)


def test_demo_is_three_groups_with_rows():
    sources = parse_data_flags(["demo", "mine=x.json"])
    assert [source.group for source in sources] == ["slow", "fast", "corrupted", "mine"]
    rows = read_rows(sources[0], limit=5)
    assert len(rows) == 5
    assert all(set(row) == {"instruction", "output"} for row in rows)
    assert len(read_rows(sources[1])) == 64


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["a/x.json", "b/x.jsonl"], r"'x' twice, for 'a/x\.json' and 'b/x\.jsonl'.*GROUP=SOURCE"),
        (["demo", "fast=x.json"], r"'fast' twice, for 'demo' and 'x\.json'"),
        (["demo", "demo"], "'slow' twice"),
        (["my data.json"], r"group name 'my data'.*GROUP=SOURCE"),
        (["=x.json"], "group name ''"),
        (["a b=x.json"], "group name 'a b'"),
        ([".hidden=x.json"], "group name '.hidden'"),
        (["x="], "names no source"),
        ([""], "names no source"),
        (["mine=demo"], "bring their own groups"),
    ],
)
def test_odd_flags_are_refused(specs, message):
    with pytest.raises(GradjaxError, match=message):
        parse_data_flags(specs)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", b"", r"x\.json is not JSON, line 1 column 1"),
        ("x.json", b'[\n {"a": 1},\n {"a" 2}\n]', r"line 3 column 7.*':'"),
        ("x.json", b'{"a": 1}{"a": 2}', r"line 1 column 9: Extra data"),
        ("x.json", b'{"data": [], "version": 1}', r"one dict with the keys \['data', 'version'\]"),
        ("x.json", b'"text"', "one str at its top level: expected a list"),
        ("x.json", b"[]", r"x\.json \(group 'g'\) holds no rows"),
        ("x.json", b'["\xff"]', r"x\.json cannot be read as JSON: 'utf-8' codec.*position 2"),
        ("x.json", b'[{"a": 1, "b": 2, "a": 3}]', "key 'a' twice"),
        ("x.json", b"[" * 100_000, r"x\.json cannot be read as JSON"),
        ("x.jsonl", b"", "holds no rows"),
        ("x.jsonl", b"\n  \n", "holds no rows"),
        ("x.parquet", b"", r"x\.parquet cannot be read as Parquet"),
        ("x.parquet", b"PAR1 not really PAR1", r"x\.parquet cannot be read as Parquet"),
        ("x.csv", b"", "begins with the names"),
        ("x.csv", b"a,b", "holds no rows"),
        ("x.csv", b"a,a\n1,2", "names \\['a', 'a'\\].*each once"),
        ("x.csv", b'a,b\n1,2\n"x" y,3\n', r"x\.csv cannot be read as CSV, at line 3"),
        ("x.csv", b'a,b\n1,"2\n', r"x\.csv cannot be read as CSV"),
        ("x.csv", b"a,b\n1,\xff\n", r"x\.csv cannot be read as CSV.*expected UTF-8"),
        ("x.tsv", b"a\ta\n", "each once"),
        (
            "x.jsonl.gz",
            gzip.compress(b"[]\n" * 999, mtime=0)[:-20],
            r"x\.jsonl\.gz cannot be read",
        ),
        ("x.jsonl.gz", b'{"a": 1}\n', r"x\.jsonl\.gz cannot be read as gz"),
        ("x.jsonl.zst", b'{"a": 1}\n', r"x\.jsonl\.zst cannot be read as zst"),
        ("x.txt", b"a,b", r"unknown extension '\.txt': expected files \(\.json"),
    ],
)
def test_unreadable_files_are_named_with_the_fault(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(GradjaxError, match=message):
        read(tmp_path / name)


def test_parquet_without_rows_or_with_broken_text(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"output": pa.array([], pa.string())}), path)
    with pytest.raises(GradjaxError, match="holds no rows"):
        read(path)
    broken = pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"output": broken}), path)
    with pytest.raises(GradjaxError, match=r"x\.parquet cannot be read as Parquet"):
        read(path)


def test_byte_order_mark_blank_lines_and_nan_are_read(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": NaN}\r\n\r\n[1, 2]\n"text"\n')
    rows = read(path)
    assert rows[0]["a"] != rows[0]["a"]
    assert rows[1:] == [[1, 2], "text"]
    path = tmp_path / "x.json"
    path.write_bytes(b'\xef\xbb\xbf[{"a": 1}]')
    assert read(path) == [{"a": 1}]


def test_rows_past_the_limit_are_not_read(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\nbroken')
    assert read(path, limit=2) == [{"a": 1}, {"a": 2}]


BAD_LINES = [
    (b'{"a": ', "line 2 is not JSON, column 6"),
    (b'{"a": "\xff"}', "line 2 cannot be read as JSON: 'utf-8' codec"),
    (b'{"a": 1, "a": 2}', "key 'a' twice"),
    (b'{"a": ' + b"9" * 5000 + b"}", "line 2 cannot be read"),
    (b"[" * 100_000, "line 2 cannot be read"),
    (b"<html>", "line 2 is not JSON, column 1"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.ndjson.gz"])
def test_a_line_that_cannot_be_read_keeps_its_place(tmp_path, name, line, reason):
    content = b'{"instruction": "q", "output": "a"}\n' + line + b'\n{"a": 3}\n'
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    rows = read(path)
    assert [type(row) for row in rows] == [dict, BadRow, dict]
    example = to_example(rows[1], "g", 1)
    assert (example.status, example.example_id) == ("invalid_row", 1)
    assert reason in example.reason
    assert len({row_hash(row) for row in rows}) == 3
    with pytest.raises(GradjaxError, match=rf"{path.name} line 2"):
        read_rows(Source("g", str(path), Reading(strict=True)))


def test_csv_rows_are_texts_by_name_and_ragged_ones_keep_their_place(tmp_path):
    path = tmp_path / "x.csv"
    long = "x" * 200_000  # more than the csv module takes by itself
    path.write_text(f'\ufeffPrompt,Completion\n"a, ""b""\nc",1\n\n1,2,3\né,{long}\n', "utf-8")
    rows = read(path)
    assert rows[0] == {"Prompt": 'a, "b"\nc', "Completion": "1"}
    assert rows[1].reason == "line 5 has 3 fields, not 2"
    assert rows[2] == {"Prompt": "é", "Completion": long}
    assert to_example(rows[0], "g", 0).instruction == 'a, "b"\nc'
    assert to_example(rows[1], "g", 1).status == "invalid_row"


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_arrays_are_read_in_pieces_of_any_size(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(readers, "_CHUNK", chunk)
    path = tmp_path / "x.json"
    values = [
        {"a": [1.5, -2e-7, None]},
        1.5,
        -2.5e-07,
        1e300,
        123456,
        "é\n😀\\",
        [],
        {},
        True,
        False,
        None,
        -1,
    ]
    for text in (json.dumps(values), json.dumps(values, indent=3, ensure_ascii=False)):
        path.write_text(f" {text}\n ", "utf-8")
        assert read(path) == values
    path.write_text('[\n {"a": 1},\n {"a" 2}\n]')
    with pytest.raises(GradjaxError, match=r"x\.json is not JSON, line 3 column 7"):
        read(path)


def test_a_fault_ends_the_reading_of_an_array(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_CHUNK", 1 << 12)
    pieces = 0
    more = readers._Text.more

    def counted(text):
        nonlocal pieces
        pieces += 1
        return more(text)

    monkeypatch.setattr(readers._Text, "more", counted)
    path = tmp_path / "x.json"
    path.write_text('[{"a" 1},\n' + ",\n".join(['{"a": 1}'] * 100_000) + "]")
    with pytest.raises(GradjaxError, match="line 1 column 7"):
        read(path)
    assert pieces <= 3


def test_files_of_a_group_are_read_one_after_another(tmp_path):
    (tmp_path / "part-00000.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    (tmp_path / "part-00001.json").write_text('[{"a": 3}]')
    pq.write_table(pa.Table.from_pylist([{"a": 4}]), tmp_path / "part-00002.parquet")
    (tmp_path / "part-00003.jsonl.zst").write_bytes(zstd(b'{"a": 5}\n'))
    (tmp_path / "README.md").write_text("no data")
    expected = [{"a": i} for i in range(1, 6)]
    assert read(tmp_path) == expected
    assert read(tmp_path / "part-*") == expected
    (source,) = parse_data_flags([f"g={tmp_path}/part-00001.json,{tmp_path}/part-00000.jsonl"])
    assert read_rows(source) == [{"a": 3}, {"a": 1}, {"a": 2}]
    assert read_rows(Source("g", source.absolute)) == read_rows(source)
    assert parse_data_flags([str(tmp_path / "part-00003.jsonl.zst")])[0].group == "part-00003"
    for others in ("gone", "org/name", str(tmp_path / "README.txt")):
        with pytest.raises(GradjaxError, match="is no data file, folder or glob"):
            read_rows(Source("g", f"{tmp_path}/part-00001.json,{others}"))
    with pytest.raises(GradjaxError, match=r"names \S+part-00000\.jsonl twice"):
        read_rows(Source("g", f"{tmp_path}/part-*,{tmp_path}/part-00000.jsonl"))
    with pytest.raises(GradjaxError, match=r"gone-\* holds no data files"):
        read(tmp_path / "gone-*")
    with pytest.raises(GradjaxError, match=r"no file .*gone\.json"):
        read_rows(Source("g", f"{tmp_path}/part-00001.json,{tmp_path}/gone.json"))


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def test_rows_of_an_object_store():
    store = fsspec.filesystem("memory")
    store.pipe("/bucket/rows/a.jsonl", b'{"a": 1}\n')
    store.pipe("/bucket/rows/b.jsonl.gz", gzip.compress(b'{"a": 2}\n'))
    assert read("memory://bucket/rows/a.jsonl") == [{"a": 1}]
    assert read("memory://bucket/rows/*.gz") == [{"a": 2}]
    assert read("memory://bucket/rows") == [{"a": 1}, {"a": 2}]
    with pytest.raises(GradjaxError, match=r"memory://bucket/rows/c\.json"):
        read("memory://bucket/rows/c.json")
    for url in ("nonsense://x/rows", "nonsense://x/rows.jsonl"):
        with pytest.raises(GradjaxError, match=r"nonsense://x/rows.* cannot be"):
            read(url)


def test_what_a_manifest_says_of_a_source_reads_it_again(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n')
    source = Source("g", str(tmp_path / "x.jsonl"), Reading(columns=("instruction=a",)))
    described = json.loads(json.dumps(describe_rows(source, 1, row_hash({"a": 1}))))
    assert Source.of_manifest("g", described) == source
    assert "reading" not in describe_rows(Source("g", "demo"), None, None)


def test_missing_sources_are_named(tmp_path):
    with pytest.raises(GradjaxError, match=r"no file .*gone\.json"):
        read(tmp_path / "gone.json")
    with pytest.raises(GradjaxError, match="no data source 'nonsense'"):
        read("nonsense")
    with pytest.raises(GradjaxError, match=f"{tmp_path} holds no data files"):
        read(tmp_path)


def test_saved_data_sets_that_cannot_be_used(tmp_path):
    data = datasets.Dataset.from_list(ROWS)
    splits = datasets.DatasetDict({"high": data, "low": data})
    splits.save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(GradjaxError, match=r"splits \['high', 'low'\].*directory of one split"):
        read(tmp_path / "splits")
    assert read(tmp_path / "splits" / "low") == ROWS
    datasets.DatasetDict({"test": data}).save_to_disk(str(tmp_path / "single"))
    assert read(tmp_path / "single") == ROWS
    (tmp_path / "single" / "test" / "state.json").write_text("{")
    with pytest.raises(GradjaxError, match="single cannot be loaded"):
        read(tmp_path / "single")


def test_hub_rows_come_from_the_train_split(monkeypatch):
    calls = []

    def load_dataset(name, config, **options):
        calls.append((name, config, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("org/name", limit=2) == ROWS[:2]
    read_rows(Source("g", "org/name:main@test", Reading(data_revision="v1")))
    assert calls == [
        ("org/name", None, {"split": "train", "revision": None}),
        ("org/name", "main", {"split": "test", "revision": "v1"}),
    ]


def test_hub_errors_say_what_to_do():
    # Tests run offline, so that the library itself fails here.
    with pytest.raises(GradjaxError, match=r"org/name is no local path.*HF_TOKEN.*local file"):
        read("org/name")


def test_row_hash_follows_the_content():
    assert row_hash({"a": 1, "b": [2]}) == row_hash({"b": [2], "a": 1})
    rows = [{"a": 1}, {"a": "1"}, {"a": None}, {}, [], "a", None, {"a": "\ud800"}, {"a": b"1"}]
    assert len({row_hash(row) for row in rows}) == len(rows)
