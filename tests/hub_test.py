"""Pushing to the Hub: what arrives there loads as data sets and as a run."""

import shutil
from fnmatch import fnmatch
from pathlib import Path

import datasets
import huggingface_hub
import pytest

import gradjax
from gradjax.config import RunConfig, SpectraConfig
from gradjax.errors import GradjaxError
from gradjax.runs.run import run
from gradjax.select.write import select_rows
from gradjax.storage.hub import push_run, push_selection, require_repo
from gradjax.storage.results import read_values
from gradjax.storage.store import TABLES


class Hub:
    """A stand-in for the Hub's client that keeps what is uploaded in a folder."""

    folder: Path

    def create_repo(self, repo, *, repo_type, private, exist_ok):
        assert (repo_type, private, exist_ok) == ("dataset", True, True)
        return f"https://huggingface.co/datasets/{repo}"

    def upload_folder(self, *, repo_id, repo_type, folder_path, allow_patterns, commit_message):
        for path in Path(folder_path).rglob("*"):
            name = str(path.relative_to(folder_path))
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, self.folder / name)

    def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id, repo_type, commit_message):
        (self.folder / path_in_repo).write_bytes(path_or_fileobj)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(Hub, "folder", tmp_path / "hub", raising=False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return tmp_path / "hub"


def test_a_pushed_run_loads_as_data_sets_and_as_a_run(tmp_path, hub):
    directory = run(
        RunConfig(limit=3, output_dir=tmp_path / "run", spectra=SpectraConfig(layers="3"))
    )
    assert push_run(directory, "me/run", "a table").endswith("datasets/me/run")
    own = gradjax.open_run(directory)
    for table in TABLES:
        loaded = datasets.load_dataset(str(hub), table, split="train", cache_dir=str(tmp_path))
        assert loaded.num_rows == len(getattr(own, table))
    assert read_values(hub).by_layer.equals(read_values(directory).by_layer)
    written = "".join(p.read_text() for p in hub.iterdir() if p.is_file())
    assert "a table" in written
    assert str(tmp_path) not in written
    assert '"host"' not in written


def test_a_pushed_selection_loads_part_by_part(tmp_path, hub):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(f'{{"instruction": "q", "output": "{n}", "m": {n}}}\n' for n in range(9))
    )
    written = select_rows(
        by="m", data=[str(rows)], top=2, bottom=3, output_dir=str(tmp_path / "selected")
    )
    push_selection(written.directory, "me/rows", "m", written.text)
    high = datasets.load_dataset(str(hub), "high", split="train", cache_dir=str(tmp_path))
    assert high["output"] == ["8", "7"]
    low = datasets.load_dataset(str(hub), "low", split="train", cache_dir=str(tmp_path))
    assert low.num_rows == 3
    assert "rows can be ranked by m" in (hub / "README.md").read_text()


def test_what_cannot_be_pushed_is_refused_before_anything_is_computed(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    for repo, directory, said in (
        ("name", None, "expected ORG/NAME"),
        ("me/name", "s3://bucket/run", "only what lies on this machine"),
        ("me/name", "run", "nobody is logged in; set HF_TOKEN"),
    ):
        with pytest.raises(GradjaxError, match=said):
            require_repo(repo, directory)


def test_a_hub_that_refuses_leaves_the_run(tmp_path, monkeypatch):
    class Refuses(Hub):
        def create_repo(self, *_, **__):
            raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "HfApi", Refuses)
    directory = run(
        RunConfig(limit=1, output_dir=tmp_path / "run", spectra=SpectraConfig(layers="3"))
    )
    with pytest.raises(GradjaxError, match=r"does not take it \(no route\).* is finished"):
        push_run(directory, "me/run", "")
    assert read_values(directory).layers == [3]
