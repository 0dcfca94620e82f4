"""The store in a directory and in an object store, written by real processes that are killed."""

import dataclasses
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import pytest
import s3fs
from absl import logging

import gradjax
from gradjax.config import RunConfig
from gradjax.errors import GradjaxError
from gradjax.storage import filesystem
from gradjax.storage.reference import export
from gradjax.storage.results import group_means
from gradjax.storage.store import (
    TABLES,
    find_run,
    finished_rows,
    open_store,
    read_manifest,
    read_table,
)
from tests.store_writer import LAYERS, MANIFEST, SETTINGS, SHARD, made_up_result, write

ROWS = 23
Directory = Path | str


@pytest.fixture(params=["local", "s3"])
def directory(request, tmp_path) -> Directory:
    if request.param == "local":
        return tmp_path / "run"
    return f"{request.getfixturevalue('bucket')}/{tmp_path.name}"


@dataclasses.dataclass(frozen=True)
class Writer:
    """A process that writes, and this end of the pipe over which it is let on."""

    process: BaseProcess
    pipe: Connection

    def has_come_to(self, where: str) -> None:
        assert self.pipe.recv() == where

    def let_on(self) -> None:
        self.pipe.send("go on")

    def finish(self) -> int | None:
        """Lets it go on to its end; its exit status."""
        self.pipe.close()
        self.process.join()
        return self.process.exitcode


Start = Callable[..., Writer]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a writer, which ends with the test. Forked from a process that has the imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "s3fs", "tests.store_writer"])
    writers = []

    def start(directory: Directory, **options) -> Writer:
        pipe, others = context.Pipe()
        arguments = (others, dict(os.environ), directory, options.pop("rows", ROWS))
        process = context.Process(target=write, args=arguments, kwargs=options)
        process.start()
        others.close()
        writers.append(Writer(process, pipe))
        return writers[-1]

    yield start
    for writer in writers:
        writer.process.kill()
        writer.finish()


def start_together(start: Start, directory: Directory, *options: dict) -> list[Writer]:
    """The processes of one run, one for each dict of options, all of them in and writing."""
    writers = [
        start(directory, process=process, num_processes=len(options), **own)
        for process, own in enumerate(options)
    ]
    for _ in range(2):
        for writer in writers:
            writer.has_come_to("barrier")
        for writer in writers:
            writer.let_on()
    return writers


def frames(directory: Directory) -> dict[str, pd.DataFrame]:
    """The tables as plain pandas reads them, in one order."""
    found = {}
    for table, schema in TABLES.items():
        frame = pd.read_parquet(f"{directory}/{table}")
        if table == "spectra":
            frame["singular_values"] = frame["singular_values"].map(tuple)
        keys = [name for name in schema.names if name in _KEYS]
        found[table] = frame.sort_values(keys).reset_index(drop=True)
    return found


_KEYS = ("group", "example_id", "layer", "projection", "layer_a")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, pd.DataFrame]:
    """The tables of a run that one process wrote undisturbed."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    write_whole(directory)
    return frames(directory)


def write_whole(directory: Directory) -> None:
    with open_store(directory, SETTINGS) as store:
        store.write_manifest(MANIFEST)
        store.append(map(made_up_result, range(ROWS)))


def require_whole(directory: Directory, whole: dict[str, pd.DataFrame]) -> None:
    for table, frame in frames(directory).items():
        pd.testing.assert_frame_equal(frame, whole[table], check_exact=True)


def files(directory: Directory) -> list[str]:
    """Everything there, relative to the directory."""
    fs, root = fsspec.url_to_fs(str(directory), use_listings_cache=False)
    return sorted(path.removeprefix(f"{root}/") for path in fs.find(root))


@pytest.fixture
def killed_count_as_dead(monkeypatch) -> None:
    """The lock of a killed process is not waited for."""
    monkeypatch.setattr(filesystem, "_DEAD_SECONDS", 0)


class TestTables:
    def test_hold_the_results(self, directory):
        results = [made_up_result(number) for number in (13, 3, 7)]
        with open_store(directory, SETTINGS) as store:
            store.append(results[:2])
            store.append(results[2:])
        assert [name for name in files(directory) if ".tmp" not in name] == [
            f"{table}/{number}.parquet"
            for table in sorted(TABLES)
            for number in ("000000", "000001")
        ]
        examples, spectra, similarity = (
            pd.read_parquet(f"{directory}/{table}") for table in TABLES
        )
        assert list(examples.example_id) == [13, 3, 7]
        assert list(examples.output) == ["σ" * 13, "σ" * 3, "σ" * 7]
        assert list(examples.num_tokens) == list(examples.num_target_tokens) == [14, 4, 8]
        assert list(examples.truncated) == [False, False, False]
        assert list(examples.loss)[:2] == [13 / 3, 1.0]
        assert examples.reason.isna().tolist() == [True, True, False]
        # The order within an example is the results' own.
        expected = [(r, s) for r in results for s in r.spectra]
        assert len(spectra) == len(expected) == 2 * len(LAYERS) * 4
        for row, (result, spectrum) in zip(spectra.itertuples(), expected, strict=True):
            assert row.example_id == result.tokenized.example.example_id
            for name in set(TABLES["spectra"].names) - {"group", "example_id", "singular_values"}:
                assert getattr(row, name) == getattr(spectrum, name)
            np.testing.assert_array_equal(row.singular_values, spectrum.singular_values)
        cosines = [s.cosine for r in results for s in r.similarity]
        np.testing.assert_array_equal(similarity.cosine, np.array(cosines, float))
        for table, schema in TABLES.items():
            assert read_table(directory, table).schema == schema

    def test_without_singular_values(self, tmp_path):
        with open_store(tmp_path, SETTINGS) as store:
            store.append([made_up_result(3)], singular_values=False)
        assert read_table(tmp_path, "spectra")["singular_values"].null_count == 12

    def test_of_unusable_rows_only(self, tmp_path):
        with open_store(tmp_path, SETTINGS) as store:
            store.append([made_up_result(7)])
        assert [read_table(tmp_path, table).num_rows for table in TABLES] == [1, 0, 0]

    def test_of_unfinished_rows_are_not_read(self, tmp_path):
        with open_store(tmp_path, SETTINGS) as store:
            store.append([made_up_result(3)])
            shutil.copy(tmp_path / "spectra/000000.parquet", tmp_path / "spectra/000001.parquet")
            assert read_table(tmp_path, "spectra").num_rows == 12

    def test_damaged(self, directory):
        with open_store(directory, SETTINGS) as store:
            store.write_manifest(MANIFEST)
            store.append([made_up_result(3)])
            store._place.put("spectra/000000.parquet", b"PAR1 half a shard PAR1")
            store._place.put("run.json", b"{")
        with pytest.raises(GradjaxError, match=r"damaged file in spectra .*--overwrite"):
            read_table(directory, "spectra")
        with pytest.raises(GradjaxError, match=r"run\.json is damaged"):
            read_manifest(directory)

    def test_of_an_object_store_read_as_those_of_a_directory(self, bucket, tmp_path):
        remote, local = f"{bucket}/a/b/run", tmp_path / "run"
        exported = []
        for place in (remote, local):
            write_whole(place)
            assert export(place, "rows", tmp_path / "rows.jsonl") == 19
            exported.append((tmp_path / "rows.jsonl").read_text())
        assert exported[0] == exported[1]
        pd.testing.assert_frame_equal(group_means(remote), group_means(local))
        opened = gradjax.open_run(f"{remote}/")
        assert opened.manifest == MANIFEST
        pd.testing.assert_frame_equal(opened.examples, gradjax.open_run(local).examples)


class TestResuming:
    def test_finished_rows_say_what_they_are(self, directory):
        for first in (0, 5):
            with open_store(directory, SETTINGS) as store:
                store.write_manifest(MANIFEST)
                assert list(store.finished) == [("rows", n) for n in range(first)]
                store.append(map(made_up_result, range(first, first + 5)))
                finished = dict(store.finished)
        assert finished == finished_rows(directory)
        assert finished["rows", 7] == ("hash 7", "empty_response", 8, False)
        assert finished["rows", 9] == ("hash 9", "ok", 10, False)

    @pytest.mark.parametrize("files_placed", [2, 3, 4, 6])
    def test_killed_between_any_two_files(
        self, files_placed, start, directory, whole, killed_count_as_dead
    ):
        """The first file is the manifest; then spectra, similarity, examples, shard by shard."""
        assert start(directory, files=files_placed).finish() == -9
        finished = finished_rows(directory)
        assert len(finished) == (files_placed - 1) // 3 * SHARD
        for table in TABLES:
            read = read_table(directory, table, ["example_id"])["example_id"].to_pylist()
            assert {("rows", number) for number in read} <= set(finished)
        with open_store(directory, SETTINGS) as store:
            assert store.finished == finished
            store.append(made_up_result(n) for n in range(ROWS) if ("rows", n) not in finished)
        require_whole(directory, whole)
        assert [name for name in files(directory) if ".tmp" in name] in ([], [".tmp/lock"])

    def test_what_a_killed_writer_left_is_cleared(self, tmp_path):
        with open_store(tmp_path, SETTINGS) as store:
            store.write_manifest(MANIFEST)
        (tmp_path / ".tmp" / "spectra-000000.parquet").write_bytes(b"half")
        (tmp_path / ".tmp" / "lock-0003").write_text("killed")
        with open_store(tmp_path, SETTINGS):
            assert files(tmp_path) == [".tmp/lock", "run.json"]

    def test_other_settings_are_refused(self, directory):
        with open_store(directory, SETTINGS) as store:
            store.write_manifest(MANIFEST)
        with pytest.raises(GradjaxError, match=r"other settings: layers \(.*; model \("):
            open_store(directory, SETTINGS | {"layers": [1], "model": "x"}).__enter__()

    def test_overwrite(self, directory):
        for number in (3, 4):
            with open_store(directory, {"number": number}, overwrite=True) as store:
                assert store.finished == {}
                store.write_manifest(MANIFEST | {"settings": {"number": number}})
                store.append([made_up_result(number)])
        assert list(finished_rows(directory)) == [("rows", 4)]

    def test_something_else_is_left_alone(self, directory):
        fs, root = fsspec.url_to_fs(str(directory))
        fs.makedirs(root, exist_ok=True)
        fs.pipe_file(f"{root}/thesis.tex", b"years of work")
        for overwrite in (False, True):
            with pytest.raises(GradjaxError, match=r"not a gradjax run \(found thesis.tex\)"):
                open_store(directory, {}, overwrite=overwrite).__enter__()
        assert files(directory) == ["thesis.tex"]

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_folder_of_the_same_name_is_left_alone(self, overwrite, tmp_path):
        (tmp_path / "examples").mkdir()
        (tmp_path / "examples" / "my_own.py").touch()
        with pytest.raises(GradjaxError, match=r"tables without run\.json"):
            open_store(tmp_path, {}, overwrite=overwrite).__enter__()
        assert files(tmp_path) == ["examples/my_own.py"]

    @pytest.mark.parametrize("manifest", [{}, {"settings": []}, {"data": {}}])
    def test_a_manifest_without_settings_is_no_run_to_go_on_with(self, manifest, directory):
        with open_store(directory, SETTINGS) as store:
            store.write_manifest(manifest)
        with pytest.raises(GradjaxError, match=r"run\.json is damaged \(it has no settings\)"):
            open_store(directory, SETTINGS).__enter__()

    def test_a_run_that_was_replaced_meanwhile_is_noticed(self, directory):
        """Its shards have the same names, and its settings are the same."""
        for number in (3, 4):
            found = find_run(directory) if number == 4 else None
            with open_store(directory, SETTINGS, overwrite=True) as store:
                store.write_manifest(MANIFEST | {"invocations": [number]})
                store.append([made_up_result(number)])
        with pytest.raises(GradjaxError, match="was changed while this run began"):
            open_store(directory, SETTINGS, found).__enter__()
        assert list(finished_rows(directory)) == [("rows", 4)]

    @pytest.mark.parametrize("table", TABLES)
    def test_full_disk(self, table, tmp_path):
        """Writes end up in a device that is always full."""
        with open_store(tmp_path, SETTINGS) as store:
            store.write_manifest(MANIFEST)
            (tmp_path / ".tmp" / f"{table}-000000.parquet").symlink_to("/dev/full")
            with pytest.raises(GradjaxError, match=r"the disk is full .* run the same command"):
                store.append([made_up_result(3)])
        with open_store(tmp_path, SETTINGS) as store:
            assert not store.finished
            store.append([made_up_result(3)])
        assert [read_table(tmp_path, table).num_rows for table in TABLES] == [1, 12, 6]


class TestReadingWhileOthersWrite:
    def test_no_reader_sees_a_part_of_a_file(self, start, directory):
        rows = 61
        (writer,) = start_together(start, directory, {"rows": rows})
        read, last = 0, 0
        while last < rows:
            assert writer.process.is_alive()
            last = len(finished_rows(directory))
            assert last % SHARD == 0 or last == rows
            if last:
                # Plain readers too, and what is finished is whole in every table.
                assert len(pd.read_parquet(f"{directory}/examples")) >= last
                spectra = pd.read_parquet(f"{directory}/spectra", columns=["example_id"])
                assert spectra.example_id.nunique() >= sum(n % 7 > 0 for n in range(last))
                read += 1
        assert read
        assert writer.finish() == 0


class TestOneRunAtATime:
    def test_second_run_is_refused(self, start, directory, monkeypatch):
        monkeypatch.setattr(filesystem, "_RENEW_SECONDS", 0.2)
        (writer,) = start_together(start, directory, {})
        with pytest.raises(GradjaxError, match=f"written by process {writer.process.pid} on "):
            open_store(directory, SETTINGS).__enter__()
        assert writer.finish() == 0
        with open_store(directory, SETTINGS) as store:
            assert len(store.finished) == ROWS

    def test_second_run_is_refused_while_any_process_lives(self, start, directory, monkeypatch):
        monkeypatch.setattr(filesystem, "_RENEW_SECONDS", 0.2)
        first, second = start_together(start, directory, {}, {})
        assert first.finish() == 0
        with pytest.raises(GradjaxError, match=f"written by process {second.process.pid} on "):
            open_store(directory, SETTINGS).__enter__()
        assert second.finish() == 0
        with open_store(directory, SETTINGS) as store:
            assert len(store.finished) == ROWS

    def test_lock_of_a_killed_process_is_waited_for(self, start, bucket, monkeypatch):
        url = f"{bucket}/killed"
        assert start(url, files=4).finish() == -9
        monkeypatch.setattr(filesystem, "_RENEW_SECONDS", 0.5)
        monkeypatch.setattr(filesystem, "_DEAD_SECONDS", 4)
        said = []
        monkeypatch.setattr(logging, "info", lambda text, *values: said.append(text % values))
        with open_store(url, SETTINGS) as store:
            assert len(store.finished) == SHARD
        assert len(said) <= 1  # none if starting up took longer than the lock's time
        assert all("waiting until its lock is renewed" in line for line in said)

    def test_process_that_may_have_lost_its_lock_writes_no_more(self, bucket, monkeypatch):
        with open_store(f"{bucket}/lost", SETTINGS) as store:
            monkeypatch.setattr(filesystem, "_LOST_SECONDS", -1)
            with pytest.raises(GradjaxError, match=r"another run may have taken it over"):
                store.append([made_up_result(3)])
        assert files(f"{bucket}/lost") == []


class TestSeveralProcesses:
    def test_write_what_one_writes(self, start, directory, whole):
        writers = start_together(start, directory, {}, {})
        for writer in writers:
            writer.has_come_to("written")
        assert len(finished_rows(directory)) == ROWS
        assert [writer.finish() for writer in writers] == [0, 0]
        require_whole(directory, whole)
        assert "examples/000000-0001.parquet" in files(directory)

    def test_killed_one_loses_its_own_rows_only(
        self, start, directory, whole, killed_count_as_dead
    ):
        """Another number of processes takes the run up again."""
        writers = start_together(start, directory, {}, {"files": 5})
        assert [writer.finish() for writer in writers] == [0, -9]
        finished = finished_rows(directory)
        assert len(finished) == 12 + SHARD
        assert {n for _, n in finished} >= set(range(0, ROWS, 2))
        again = start_together(start, directory, {"dead_seconds": 0}, {}, {})
        assert [writer.finish() for writer in again] == [0, 0, 0]
        require_whole(directory, whole)

    def test_must_share_the_directory(self, tmp_path):
        follower = open_store(tmp_path / "elsewhere", SETTINGS, process=1, num_processes=2)
        with pytest.raises(GradjaxError, match=r"process 1 on .*that all processes share"):
            follower.__enter__()


class TestFaults:
    def test_no_such_bucket(self, bucket):
        with pytest.raises(GradjaxError, match=r"cannot write to s3://nowhere/run \(.*bucket does"):
            open_store("s3://nowhere/run", SETTINGS).__enter__()
        with pytest.raises(GradjaxError, match="s3://nowhere/run is not a gradjax run"):
            read_manifest("s3://nowhere/run")

    def test_no_such_kind_of_url(self):
        with pytest.raises(
            GradjaxError, match=r"cannot reach s4://x/run \(ValueError: Protocol not known"
        ):
            read_manifest("s4://x/run")

    def test_no_server(self, bucket, monkeypatch):
        s3fs.S3FileSystem.clear_instance_cache()
        monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        with pytest.raises(GradjaxError, match=r"cannot read s3://b/run \(.*: Could not connect"):
            read_manifest("s3://b/run")
        s3fs.S3FileSystem.clear_instance_cache()

    def test_no_keys(self, bucket, monkeypatch):
        s3fs.S3FileSystem.clear_instance_cache()
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        with pytest.raises(GradjaxError, match=r"Unable to locate credentials\); .* environment"):
            read_manifest("s3://b/run")
        s3fs.S3FileSystem.clear_instance_cache()


def test_output_dir_may_be_a_url(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert RunConfig(output_dir="s3://bucket/a/run/").output_dir == "s3://bucket/a/run"
    assert RunConfig(output_dir="file:///mnt/run").output_dir == Path("/mnt/run")
    assert RunConfig(output_dir="~/run").output_dir == Path("/home/me/run")
