"""Registered data sets, read from files as they are published, and samples of them."""

import collections
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gradjax.data.catalog import DATASETS
from gradjax.data.examples import to_example
from gradjax.data.sample import Sample, write_sample
from gradjax.data.sources import Source, parse_data_flags, read_rows, registered_rows
from gradjax.errors import GradjaxError

pytestmark = pytest.mark.smoke

ROOT = Path(__file__).parent.parent
ROWS = 23


def write_json(file: Path, rows: list[dict]) -> None:
    file.write_text(json.dumps(rows, ensure_ascii=False, indent=1), "utf-8")


def write_shards(directory: Path, rows: list[dict], shards: int) -> None:
    """Parquet files named as `datasets` names them on the Hub."""
    directory.mkdir()
    for shard in range(shards):
        part = rows[shard * len(rows) // shards : (shard + 1) * len(rows) // shards]
        name = f"train-{shard:05d}-of-{shards:05d}.parquet"
        pq.write_table(pa.Table.from_pylist(part), directory / name)


def question(i: int) -> str:
    return f"Größe {i}?"


def wizardlm(place: Path) -> list[dict]:
    rows = [{"instruction": question(i), "output": f"It is\u2028{i}."} for i in range(ROWS)]
    write_json(place / "alpaca_evol_instruct_70k.json", rows)
    return rows


def magpie(place: Path) -> list[dict]:
    rows = [
        {
            "conversations": [
                {"from": "human", "value": question(i)},
                {"from": "gpt", "value": f"It is {i}."},
            ],
            "uuid": f"{i:032x}",
        }
        for i in range(ROWS)
    ]
    write_shards(place / "data", rows, 3)
    return [{"instruction": question(i), "output": f"It is {i}."} for i in range(ROWS)]


def openhermes(place: Path) -> list[dict]:
    """Some rows have a system turn, some a second question, some are plain pairs."""
    rows, expected = [], []
    for i in range(ROWS):
        turns = [("human", question(i)), ("gpt", f"It is {i}.")]
        if i % 3 == 1:
            turns.insert(0, ("system", "Be brief."))
        if i % 3 == 2:
            turns += [("human", "Sure?"), ("gpt", "Yes.")]
        shared = {"category": None, "source": "airoboros2.2", "language": None, "model": "gpt-4"}
        rows.append(
            {"conversations": [{"from": f, "value": v, "weight": None} for f, v in turns], **shared}
        )
        roles = {"human": "user", "gpt": "assistant", "system": "system"}
        messages = [{"role": roles[f], "content": v} for f, v in turns]
        pair = {"instruction": question(i), "output": f"It is {i}."}
        expected.append({"messages": messages} if i % 3 else pair)
    write_json(place / "openhermes2_5.json", rows)
    return expected


def s1(place: Path) -> list[dict]:
    names = ("solution", "cot_type", "source_type", "metadata", "gemini_attempt", "deepseek_grade")
    rows = [
        {
            **dict.fromkeys(names, "not read"),
            "question": question(i),
            "deepseek_thinking_trajectory": f"Okay, {i}.\n\n\nHmm.\n",
            "deepseek_attempt": f"\n\nIt is \\(\\boxed{{{i}}}\\).",
        }
        for i in range(ROWS)
    ]
    write_shards(place / "data", rows, 1)
    return [
        {
            "instruction": question(i),
            "output": f"Okay, {i}.\n\n\nHmm.\n\n\n\nIt is \\(\\boxed{{{i}}}\\).",
        }
        for i in range(ROWS)
    ]


def gsm8k_r1(place: Path) -> list[dict]:
    rows = [{"instruction": question(i), "output": f"Hmm.\n\n\n{i}"} for i in range(ROWS)]
    write_json(place / "gsm8k_R1.json", rows)
    return rows


def gsm8k(place: Path) -> None:
    rows = [
        {
            "question": question(i),
            "answer": f"Ann has {i}*1000=<<{i}*1000={i}000>>{i}000.\nSo {i},000.\n#### {i},000",
        }
        for i in range(ROWS)
    ]
    write_shards(place / "main", rows, 1)
    write_shards(place / "socratic", [{"question": "not read", "answer": "#### 0"}], 1)
    test = pa.Table.from_pylist([{"question": "not read", "answer": "#### 0"}])
    pq.write_table(test, place / "main" / "test-00000-of-00001.parquet")


def gsm8k_fast(place: Path) -> list[dict]:
    gsm8k(place)
    return [{"instruction": question(i), "output": f"{i},000"} for i in range(ROWS)]


def gsm8k_slow(place: Path) -> list[dict]:
    gsm8k(place)
    return [
        {
            "instruction": question(i),
            "output": f"Ann has {i}*1000={i}000.\nSo {i},000.\n#### {i},000",
        }
        for i in range(ROWS)
    ]


PUBLISHED: dict[str, Callable[[Path], list[dict]]] = {
    "wizardlm": wizardlm,
    "magpie": magpie,
    "openhermes2.5": openhermes,
    "s1.1": s1,
    "gsm8k_r1": gsm8k_r1,
    "gsm8k_fast": gsm8k_fast,
    "gsm8k_slow": gsm8k_slow,
}


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]


def prepare(*arguments: str, status: int = 0, **environment: str) -> str:
    """What the program prints; standard error where it fails."""
    result = subprocess.run(
        [sys.executable, "-m", "gradjax.prepare", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == status, result.stderr
    return result.stderr if status else result.stdout


def test_the_registry_is_complete():
    assert set(DATASETS) == set(PUBLISHED)
    for name, dataset in DATASETS.items():
        assert dataset.name == name
        assert dataset.licence
        assert dataset.files
        assert dataset.columns
        assert dataset.repo is None or re.fullmatch(r"[\w-]+/[\w.-]+", dataset.repo)
        assert dataset.repo is None or re.fullmatch(r"main|[0-9a-f]{40}", dataset.revision)
        assert dataset.repo or dataset.note


@pytest.mark.parametrize("name", DATASETS)
def test_every_row_is_read_as_published(tmp_path: Path, name: str):
    expected = PUBLISHED[name](tmp_path)
    rows = list(registered_rows(DATASETS[name], tmp_path))
    examples = [to_example(row, name, i) for i, row in enumerate(rows)]
    assert [example.status for example in examples] == ["ok"] * ROWS

    told = write_sample(DATASETS[name], str(tmp_path), 10_000, 7, tmp_path / "all.jsonl")
    assert f"{ROWS} of {ROWS} rows of {name}, seed 7, from {tmp_path}" in told
    drawn = read_lines(tmp_path / "all.jsonl")
    assert drawn != expected  # another order
    assert sorted(map(json.dumps, drawn)) == sorted(map(json.dumps, expected))


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet", "saved", "saved_dict"])
def test_a_source_may_be_in_any_format(tmp_path: Path, kind: str):
    (tmp_path / "published").mkdir()
    gsm8k(tmp_path / "published")
    rows = pq.read_table(tmp_path / "published" / "main" / "train-00000-of-00001.parquet")
    file = tmp_path / f"rows.{kind}"
    if kind == "json":
        write_json(file, rows.to_pylist())
    elif kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows.to_pylist()), "utf-8")
    elif kind == "parquet":
        pq.write_table(rows, file)
    else:
        data = datasets.Dataset(rows)
        saved = data if kind == "saved" else datasets.DatasetDict({"train": data})
        saved.save_to_disk(str(file))
    for source, output in ((tmp_path / "published", "a.jsonl"), (file, "b.jsonl")):
        write_sample(DATASETS["gsm8k_slow"], str(source), 11, 0, tmp_path / output)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_a_directory_may_be_called_as_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    datasets.Dataset.from_list([{"instruction": "a", "output": "b"}]).save_to_disk("wizardlm")
    (row,) = registered_rows(DATASETS["wizardlm"], Path("wizardlm"))
    assert row == {"instruction": "a", "output": "b"}


def test_the_same_seed_gives_the_same_file_and_its_checksum(tmp_path: Path):
    wizardlm(tmp_path)
    files = [tmp_path / f"{i}.jsonl" for i in range(4)]
    for file, (size, seed) in zip(files, [(13, 0), (13, 0), (13, 1), (5, 0)], strict=True):
        told = write_sample(DATASETS["wizardlm"], str(tmp_path), size, seed, file)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        assert f"sha256 {digest}  {file}" in told
        command = ["sha256sum", "--check", "--strict", f"{file.name}.sha256"]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    first, again, other, smaller = map(read_lines, files)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert first != other
    assert smaller == first[:5]
    assert len({row["instruction"] for row in first}) == 13
    assert again == first
    assert not list(tmp_path.glob(".*"))


def test_fast_and_slow_ask_the_same_questions(tmp_path: Path):
    gsm8k(tmp_path)
    samples = [
        Sample(registered_rows(DATASETS[name], tmp_path), 7, 3)
        for name in ("gsm8k_fast", "gsm8k_slow")
    ]
    fast, slow = ([row["instruction"] for row in sample.rows] for sample in samples)
    assert fast == slow


def test_every_row_is_as_likely_as_any_other():
    rows = [{"instruction": str(i), "output": "."} for i in range(19)]
    counts = collections.Counter(
        row["instruction"] for seed in range(1000) for row in Sample(rows, 5, seed).rows
    )
    expected = 1000 * 5 / 19  # standard deviation 14
    assert all(abs(counts[str(i)] - expected) < 60 for i in range(19))


def test_rows_that_cannot_be_used_are_left_out_and_counted(tmp_path: Path):
    rows = [
        {"question": "a", "answer": "#### 1"},
        {"question": "b", "answer": "no number"},
        {"question": "c", "answer": None},
        {"question": 7, "answer": "#### 2"},
        ["question", "answer"],
        {"question": "d\ud800", "answer": "#### 3"},
        {"question": "e", "answer": "#### 4"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "out.jsonl"
    told = write_sample(DATASETS["gsm8k_fast"], str(tmp_path / "rows.jsonl"), 99, 0, output)
    assert sorted(row["output"] for row in read_lines(output)) == ["1", "4"]
    assert "2 of 2 rows of gsm8k_fast" in told
    assert "1 dropped as empty_response, the first because the response in turn 2 is empty" in told
    assert "4 dropped as invalid_row, the first because" in told
    assert "(found 'no answer')" in told


def test_rows_without_a_plain_form_are_left_out_where_plain_is_asked_for(tmp_path: Path):
    asked, answered = {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}
    system = {"from": "system", "value": "c"}
    turns = [[asked, answered], [asked, answered] * 2, [system, asked, answered]]
    write_json(tmp_path / "rows.json", [{"conversations": conversation} for conversation in turns])
    source, output = str(tmp_path / "rows.json"), tmp_path / "out.jsonl"
    told = write_sample(DATASETS["openhermes2.5"], source, 99, 0, output)
    assert "3 of 3 rows" in told
    told = write_sample(DATASETS["openhermes2.5"], source, 99, 0, output, plain=True)
    assert "2 of 2 rows" in told
    assert "1 dropped as invalid_row, the first because 4 turns have no plain form" in told
    kept = [to_example(row, "", 0).messages for row in read_lines(output)]
    assert sorted(map(len, kept)) == [2, 3]
    with pytest.raises(GradjaxError, match=r"--source=FILE --sample=9 --seed=0 --plain --output="):
        write_sample(DATASETS["gsm8k_r1"], None, 9, 0, output, plain=True)


def test_rows_of_another_data_set_are_none_of_this_one(tmp_path: Path):
    rows = [{"instruction": question(i), "output": "Hmm.", "answer": "#### 1"} for i in range(3)]
    write_json(tmp_path / "r1.json", rows)
    with pytest.raises(GradjaxError, match=r"no usable row.*\(found 'no question'\)") as raised:
        write_sample(DATASETS["gsm8k_fast"], str(tmp_path / "r1.json"), 5, 0, tmp_path / "o.jsonl")
    assert "expected the columns question, answer" in str(raised.value)
    for dataset in DATASETS.values():
        if dataset.convert:
            (column, *rest) = dataset.columns
            row = dict.fromkeys(("instruction", "output", *rest), "text")
            example = to_example(dataset.to_row(row), "", 0)
            assert example.status == "invalid_row"
            assert f"'no {column}'" in example.reason


def test_a_copy_without_all_of_its_files_is_refused(tmp_path: Path):
    magpie(tmp_path)
    for gone, message in (
        ("train-00000-of-00003.parquet", r"lacks 1 of 3 files, .*train-00000-of-00003\.parquet"),
        ("train-00002-of-00003.parquet", r"lacks 2 of 3 files, .*train-00000-of-00003\.parquet"),
    ):
        (tmp_path / "data" / gone).unlink()
        with pytest.raises(GradjaxError, match=message):
            write_sample(DATASETS["magpie"], str(tmp_path), 5, 0, tmp_path / "out.jsonl")
    assert not list(tmp_path.glob("*out*"))


def test_thinking_without_an_answer_is_no_response(tmp_path: Path):
    row = DATASETS["s1.1"].to_row(
        {"question": "?", "deepseek_thinking_trajectory": "Hmm.", "deepseek_attempt": "\n"}
    )
    assert to_example(row, "", 0).status == "empty_response"


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("rows.json", [{"text": "a"}], r"no usable row of magpie \(1 dropped as invalid_row"),
        ("rows.json", [], "holds no rows|no usable row"),
        ("rows.txt", [], "unknown extension '.txt'"),
        ("missing.json", None, r"missing\.json is no copy of magpie: expected.*data/train-\*"),
        ("directory/README.md", [], r"directory is no copy of magpie"),
    ],
)
def test_sources_that_are_no_copy_are_refused(tmp_path: Path, name: str, rows, message: str):
    file = tmp_path / name
    if rows is not None:
        file.parent.mkdir(exist_ok=True)
        write_json(file, rows)
    source = file if file.suffix != ".md" else file.parent
    with pytest.raises(GradjaxError, match=message):
        write_sample(DATASETS["magpie"], str(source), 5, 0, tmp_path / "out.jsonl")
    assert not list(tmp_path.glob("*out*"))


def test_a_checksum_never_lies_beside_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    gsm8k(tmp_path)
    output = tmp_path / "out.jsonl"
    write_sample(DATASETS["gsm8k_fast"], str(tmp_path), 5, 0, output)
    before = output.read_bytes()

    def fails(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(GradjaxError, match=r"out\.jsonl cannot be written \(No space left"):
        write_sample(DATASETS["gsm8k_fast"], str(tmp_path), 6, 0, output)
    assert output.read_bytes() == before
    assert not output.with_name("out.jsonl.sha256").exists()
    assert not list(tmp_path.glob(".out*"))


class TestHub:
    def cache(self, folder: Path, name: str, commit: str = "") -> dict[str, str]:
        """The client's cache, as if the data set had been downloaded; the Hub is out of reach."""
        dataset = DATASETS[name]
        assert dataset.repo
        commit = commit or dataset.revision
        repository = folder / f"datasets--{dataset.repo.replace('/', '--')}"
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        PUBLISHED[name](snapshot)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
        return {"HF_HUB_CACHE": str(folder), "HF_HUB_OFFLINE": "1"}

    @pytest.mark.parametrize(("name", "commit"), [("gsm8k_fast", ""), ("s1.1", "ab" * 20)])
    def test_a_cached_copy_is_used_and_its_commit_recorded(
        self, tmp_path: Path, name: str, commit: str
    ):
        environment = self.cache(tmp_path / "cache", name, commit)
        output = tmp_path / "out.jsonl"
        flags = (f"--dataset={name}", "--sample=5", f"--output={output}")
        told = prepare(*flags, **environment)
        origin = f"{DATASETS[name].repo} at {commit or DATASETS[name].revision}"
        assert f"5 of {ROWS} rows of {name}, seed 0, from {origin}\n" in told
        assert origin in (tmp_path / "out.jsonl.sha256").read_text()
        assert len(read_lines(output)) == 5

    @pytest.mark.parametrize("name", DATASETS)
    def test_what_is_out_of_reach_is_said_in_one_sentence(
        self, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(GradjaxError) as raised:
            write_sample(DATASETS[name], None, 5, 3, tmp_path / "an out.jsonl")
        said = str(raised.value)
        assert "\n" not in said
        command = shlex.split(said[said.index("gradjax prepare ") :])
        assert command[2] == f"--dataset={name}"
        assert command[3] in ("--source=FILE", "--source=DIR")
        assert command[4:] == ["--sample=5", "--seed=3", f"--output={tmp_path / 'an out.jsonl'}"]
        if repo := DATASETS[name].repo:
            assert f"hf download {repo} --repo-type dataset --revision " in said
            assert f"https://huggingface.co/datasets/{repo}" in said
            assert DATASETS[name].licence in said

    def test_main_takes_a_registered_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        cache = self.cache(tmp_path, "gsm8k_fast")["HF_HUB_CACHE"]
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", cache)
        (source,) = parse_data_flags(["gsm8k_fast"])
        assert source == Source("gsm8k_fast", "gsm8k_fast")
        assert parse_data_flags(["s1.1"]) == (Source("s1.1", "s1.1"),)
        assert parse_data_flags(["high=s1.1"]) == (Source("high", "s1.1"),)
        rows = read_rows(source, limit=3)
        assert rows == [{"instruction": question(i), "output": f"{i},000"} for i in range(3)]

    def test_a_registered_name_comes_before_a_path(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        row = {"instruction": "a", "output": "b"}
        datasets.Dataset.from_list([row]).save_to_disk("gsm8k_r1")
        (name,), (path,), (other,) = map(
            parse_data_flags, (["gsm8k_r1"], ["./gsm8k_r1"], ["magpie"])
        )
        with pytest.raises(GradjaxError, match=r"fetched by hand.* lies here: give \./gsm8k_r1 to"):
            read_rows(name)
        assert read_rows(path) == [row]
        with pytest.raises(GradjaxError, match=r"--source=DIR --output=magpie\.jsonl$"):
            read_rows(other)


def test_the_program_lists_and_refuses():
    listed = prepare("--list")
    for dataset in DATASETS.values():
        assert dataset.name in listed
        assert (dataset.repo or "-") in listed
        assert dataset.note in listed
    assert "--dataset is not given" in prepare("--output=x.jsonl", status=1)
    assert "--output is not given" in prepare("--dataset=magpie", status=1)
    refused = prepare("--dataset=magpie", "--output=.", status=1)
    assert "--output=. is a directory; expected the .jsonl file" in refused
    assert "Traceback" not in refused
