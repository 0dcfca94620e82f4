"""Reading rows: every format, and what is said about sources that cannot be read."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gradjax.data.sources import Source, data_hash, parse_data_flags, read_rows, row_hash
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
    assert data_hash(read(stored)) == data_hash(ROWS)


@pytest.mark.parametrize(
    ("spec", "group", "location"),
    [
        ("data/high.json", "high", "data/high.json"),
        ("high=data/x.v2.jsonl", "high", "data/x.v2.jsonl"),
        ("x.v2.parquet", "x.v2", "x.v2.parquet"),
        ("runs/my_set.v1", "my_set.v1", "runs/my_set.v1"),
        ("allenai/tulu-3.1", "tulu-3.1", "allenai/tulu-3.1"),
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
        ("x.json", b'{"a": 1}\n{"a": 2}', r"line 2.*\.jsonl file"),
        ("x.json", b'{"data": [], "version": 1}', r"one dict with the keys \['data', 'version'\]"),
        ("x.json", b'"text"', "one str at its top level: expected a list"),
        ("x.json", b"[]", r"x\.json \(group 'g'\) holds no rows"),
        ("x.json", b'["\xff"]', r"x\.json cannot be read as JSON: 'utf-8' codec.*position 2"),
        ("x.json", b'[{"a": 1, "b": 2, "a": 3}]', "key 'a' twice"),
        ("x.json", b"[" * 100_000, r"x\.json cannot be read as JSON"),
        ("x.jsonl", b"", "holds no rows"),
        ("x.jsonl", b"\n  \n", "holds no rows"),
        ("x.jsonl", b'{"a": 1}\n\n{"a": \n', r"x\.jsonl line 3 is not JSON, column 6"),
        ("x.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"x\.jsonl line 2 cannot be read"),
        ("x.jsonl", b'{"a": 1}\n{"a": 1, "a": 2}', r"x\.jsonl line 2.*key 'a' twice"),
        ("x.jsonl", b'{"a": 1}\n{"a": ' + b"9" * 5000 + b"}", r"x\.jsonl line 2 cannot be read"),
        ("x.parquet", b"", r"x\.parquet cannot be read as Parquet"),
        ("x.parquet", b"PAR1 not really PAR1", r"x\.parquet cannot be read as Parquet"),
        ("x.csv", b"a,b", r"unknown extension '\.csv': expected a \.json"),
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


def test_missing_sources_are_named(tmp_path):
    with pytest.raises(GradjaxError, match=r"no file .*gone\.json"):
        read(tmp_path / "gone.json")
    with pytest.raises(GradjaxError, match="no data source 'nonsense'"):
        read("nonsense")
    with pytest.raises(GradjaxError, match=f"directory {tmp_path} holds no data set"):
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

    def load_dataset(name, **options):
        calls.append((name, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("org/name", limit=2) == ROWS[:2]
    assert calls == [("org/name", {"split": "train"})]


def test_hub_errors_say_what_to_do():
    # Tests run offline, so that the library itself fails here.
    with pytest.raises(GradjaxError, match=r"org/name is no local path.*HF_TOKEN.*local file"):
        read("org/name")


def test_row_hash_follows_the_content():
    assert row_hash({"a": 1, "b": [2]}) == row_hash({"b": [2], "a": 1})
    rows = [{"a": 1}, {"a": "1"}, {"a": None}, {}, [], "a", None, {"a": "\ud800"}, {"a": b"1"}]
    assert len({row_hash(row) for row in rows}) == len(rows)


def test_data_hash_depends_on_rows_and_order():
    assert data_hash(ROWS) != data_hash(ROWS[::-1])
    assert data_hash(ROWS) != data_hash(ROWS[:-1])
