"""Runs whose rows come in several windows: the numbers of one, whatever happens on the way."""

import dataclasses
import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from gradjax.checkpoints.resolve import resolve
from gradjax.config import RunConfig, SpectraConfig, TokenConfig
from gradjax.data.examples import to_example
from gradjax.data.tokens import tokenize_rows
from gradjax.data.word_problems import demo_rows
from gradjax.device import local_device
from gradjax.distributed import Processes
from gradjax.errors import GradjaxError
from gradjax.runs import cost
from gradjax.runs import run as run_module
from gradjax.runs import windows as windows_module
from gradjax.runs.inputs import read_inputs
from gradjax.runs.run import print_plan, run
from gradjax.runs.windows import ReadAhead, Window, read_windows
from gradjax.storage.results import read_values, rows_to_come
from gradjax.storage.store import read_manifest, read_table
from gradjax.structs import ExampleResult
from tests.processes_test import assert_same_store, finish, start_together
from tests.whole_runs import MAIN, every_byte, start, tables

ROWS = 36
SMALL_WINDOWS = """
from gradjax.runs import windows
windows.WINDOW_ROWS = 7
"""


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(windows_module, "WINDOW_ROWS", 7)


def config(output_dir: Path, **changes) -> RunConfig:
    defaults = {
        "spectra": SpectraConfig(layers="2-3"),
        "limit": 12,
        "batch_tokens": 128,
        "output_dir": output_dir,
    }
    return RunConfig(**{**defaults, **changes})


@pytest.fixture(scope="module")
def one_window(tmp_path_factory):
    return run(config(tmp_path_factory.mktemp("one") / "run"))


def assert_equal_stores(directory: Path, expected: Path) -> None:
    right = tables(expected)
    for table, frame in tables(directory).items():
        pd.testing.assert_frame_equal(frame, right[table], check_exact=True)


def jsonl(path: Path, rows: list[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_windows_hold_every_row_once_and_say_what_ends_in_them(tmp_path, small_windows):
    asked = config(tmp_path / "run")
    found = [*read_windows(asked, read_inputs(asked))]
    assert [len(window.tokenized) for window in found] == [7, 7, 7, 7, 7, 1]
    keys = [row.example.key for window in found for row in window.tokenized]
    assert keys == [(g, n) for g in ("slow", "fast", "corrupted") for n in range(12)]
    assert [window.last for window in found] == [False] * 5 + [True]
    assert [len(window.tallies) for window in found] == [0, 1, 1, 2, 2, 3]
    known = [[of["rows"] for of in window.data.values()] for window in found]
    assert known == [
        [None] * 3, *[[12, None, None]] * 2, *[[12, 12, None]] * 2, [12, 12, 12]
    ]  # fmt: skip
    assert all(of["hash"] for of in found[-1].data.values())


def test_tokens_and_texts_are_those_of_the_rows(tmp_path, small_windows):
    asked = config(tmp_path / "run")
    inputs = read_inputs(asked)
    found = [*read_windows(asked, inputs)]
    sources = {group: demo_rows(group) for group in ("slow", "fast", "corrupted")}
    for window in found:
        for row in window.tokenized:
            group, number = row.example.key
            assert row.example.instruction == ""  # on disk
            whole = window.with_texts(ExampleResult(row, "ok")).tokenized.example
            assert whole.output == sources[group][number]["output"]
            example = to_example(sources[group][number], group, number)
            (expected,) = tokenize_rows([example], inputs.tokenizer, asked.tokens)
            np.testing.assert_array_equal(row.tokens, expected.tokens)
            np.testing.assert_array_equal(row.targets, expected.targets)


@pytest.mark.parametrize("count", [2, 3, 50])
def test_processes_tokenize_different_rows_and_all_of_them(count, tmp_path, small_windows):
    asked = config(tmp_path / "run")
    inputs = read_inputs(asked)
    shares = [[*read_windows(asked, inputs, i, count)] for i in range(count)]
    for windows in zip(*shares, strict=True):  # all see the same windows
        assert len({(w.rows, w.left, w.hashed, repr(w.data)) for w in windows}) == 1
    keys = [row.example.key for share in shares for w in share for row in w.tokenized]
    assert len(set(keys)) == len(keys) == ROWS


def test_a_long_text_ends_a_window(tmp_path, monkeypatch):
    monkeypatch.setattr(windows_module, "_WINDOW_CHARACTERS", 1)
    asked = config(tmp_path / "run", limit=2)
    assert [len(w.tokenized) for w in read_windows(asked, read_inputs(asked))] == [1] * 6


def test_the_store_of_many_windows_is_that_of_one(tmp_path, small_windows, one_window):
    directory = run(config(tmp_path / "run"))
    assert_same_store(directory, one_window)
    assert read_manifest(directory)["data"] == read_manifest(one_window)["data"]
    assert rows_to_come(directory) == 0
    before = every_byte(directory)
    run(config(tmp_path / "run"))  # nothing is left
    assert every_byte(directory) == before


def test_later_windows_bring_no_new_shapes_but_for_longer_rows(
    tmp_path, small_windows, monkeypatch
):
    shapes = []
    compute = run_module.compute_results

    def recorded(decoder, rows, spectra, specs, device):
        shapes.append({(spec.size, spec.length) for spec in specs})
        return compute(decoder, rows, spectra, specs, device)

    monkeypatch.setattr(run_module, "compute_results", recorded)
    run(config(tmp_path / "run", data=("demo",)))
    seen: set[tuple[int, int]] = set()
    for window in shapes:
        longest = max((length for _, length in seen), default=0)
        assert all(shape in seen or shape[1] > longest for shape in window)
        seen |= window
    sizes = {length: size for size, length in seen}
    assert len(sizes) == len(seen)  # one size for each length


def test_killed_run_of_windows_goes_on_to_the_same_store(tmp_path):
    code = SMALL_WINDOWS + MAIN
    whole = start(tmp_path / "whole", code=code)
    directory = tmp_path / "run"
    for shards in (2, 5):
        process = start(directory, code=code)
        while len(list(directory.glob("examples/*.parquet"))) < shards:
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    done = read_table(directory, "examples").num_rows
    assert 0 < done < ROWS
    assert rows_to_come(directory) is None
    with pytest.raises(GradjaxError, match="is not finished: some rows are missing"):
        read_values(directory)
    for process in (start(directory, code=code), whole):
        output, errors = process.communicate()
        assert process.returncode == 0, errors
    assert "nuclear norm" in output
    assert_equal_stores(directory, tmp_path / "whole")


def test_processes_of_windows_share_the_rows(tmp_path, one_window):
    code = SMALL_WINDOWS + MAIN
    ended = finish(start_together(tmp_path / "run", 2, code=code))
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert any("nuclear norm" in output for _, output, _ in ended)
    assert_same_store(tmp_path / "run", one_window)


def test_the_last_of_independent_processes_says_what_all_rows_tell(tmp_path):
    good = jsonl(tmp_path / "good.jsonl", [{"instruction": "1 + 1", "output": "2"}] * 20)
    long = [{"instruction": "1 + 1", "output": "2 " * n} for n in (20, 30, 2, 40, 50)]
    bad = jsonl(tmp_path / "bad.jsonl", [{"instruction": "1 + 1"}] * 3)
    model = shutil.copytree(resolve("demo").directory, tmp_path / "short")
    text = (model / "config.json").read_text()
    (model / "config.json").write_text(text.replace(": 4096", ": 16"))
    data = (f"--data={good}", f"--data={jsonl(tmp_path / 'long.jsonl', long)}", f"--data={bad}")
    asked = (f"--model={model}", *data, "--limit=100")
    ended = finish(start_together(tmp_path / "run", 2, *asked, code=SMALL_WINDOWS + MAIN))
    assert sorted(status for status, _, _ in ended) in ([0, 1], [1, 1]), ended
    refused = "none of the 3 rows of group 'bad' is usable"
    assert all((refused in errors) == bool(status) for status, _, errors in ended), ended
    said = read_manifest(tmp_path / "run")["data"]
    assert [of.get("rows_beyond_positions") for of in said.values()] == [None, 4, None]
    assert rows_to_come(tmp_path / "run") == 0


def test_a_fault_behind_the_first_window_keeps_what_is_finished(tmp_path, small_windows):
    rows = [{"instruction": f"{n} + 1", "output": str(n + 1)} for n in range(20)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows)[:-1] + ", nonsense]")
    asked = config(tmp_path / "run", data=(str(path),), limit=None)
    with pytest.raises(GradjaxError, match=r"rows\.json is not JSON, line 1 column"):
        run(asked)
    path.write_text(json.dumps(rows))
    run(asked)
    assert read_table(tmp_path / "run", "examples").num_rows == 20
    assert rows_to_come(tmp_path / "run") == 0


def test_a_later_group_without_usable_rows_stops_the_run(tmp_path, small_windows):
    good = jsonl(tmp_path / "good.jsonl", [{"instruction": "1 + 1", "output": "2"}] * 20)
    bad = jsonl(tmp_path / "bad.jsonl", [{"instruction": "1 + 1"}] * 3)
    with pytest.raises(GradjaxError, match="none of the 3 rows of group 'bad' is usable"):
        run(config(tmp_path / "run", data=(good, bad), limit=None))


def test_changed_rows_are_refused_in_any_window(tmp_path, small_windows):
    rows = [{"instruction": f"{n} + 1", "output": str(n + 1)} for n in range(20)]
    asked = config(tmp_path / "run", data=(jsonl(tmp_path / "rows.jsonl", rows),), limit=None)
    run(asked)
    before = every_byte(tmp_path / "run")
    rows[18]["output"] = "other"
    jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(GradjaxError, match="holds another row 18"):
        run(asked)
    jsonl(tmp_path / "rows.jsonl", rows[:18])
    with pytest.raises(GradjaxError, match="row 19 of group rows, which this run's data"):
        run(asked)
    assert every_byte(tmp_path / "run") == before


def test_rows_may_be_added_behind_the_last_window(tmp_path, small_windows):
    rows = [{"instruction": f"{n} + 1", "output": str(n + 1)} for n in range(20)]
    for count in (5, 12, 20):
        data = (jsonl(tmp_path / "rows.jsonl", rows[:count]),)
        directory = run(config(tmp_path / "run", data=data, limit=None))
        assert read_table(directory, "examples").num_rows == count
        assert read_manifest(directory)["data"]["rows"]["rows"] == count


def test_counts_are_of_all_windows(tmp_path, small_windows, caplog):
    rows = [{"instruction": f"{n} + 1", "output": str(n + 1)} for n in range(20)] + [{}] * 2
    data = (jsonl(tmp_path / "rows.jsonl", rows),)
    with caplog.at_level("INFO"):
        run(config(tmp_path / "run", data=data, limit=None))
    assert "22 rows: 0 finished before, 20 to compute, 2 not usable" in caplog.text
    assert "rows: rows, being read; into" in caplog.text
    assert "20 of 20 rows, 100 % of tokens" in caplog.text


def test_reading_runs_ahead_and_stops_with_whoever_takes(tmp_path, small_windows):
    asked = config(tmp_path / "run")
    with ReadAhead(read_windows(asked, read_inputs(asked))) as ahead:
        while not ahead.complete:
            time.sleep(0.005)
        assert (ahead.rows, ahead.to_compute, ahead.data) == (ROWS, ROWS, {})
        first = next(ahead)
        assert isinstance(first, Window)
        assert len([first, *ahead]) == 6

    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield first

    with ReadAhead(endless()) as ahead:
        next(ahead)
    stopped = taken
    time.sleep(0.05)
    assert taken == stopped <= windows_module._AHEAD + 3


def test_a_plan_of_many_rows_is_of_a_sample_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(windows_module, "_SAMPLE_ROWS", 10)
    print_plan(config(tmp_path / "run", limit=None))
    said = capsys.readouterr().out
    assert said.startswith("sample      the first 4 rows of each group")
    assert "\nrows        12 of " in said
    print_plan(config(tmp_path / "run", limit=3))
    said = capsys.readouterr().out
    assert said.startswith("rows        9 of ")


def test_a_window_that_does_not_fit_is_refused(tmp_path, monkeypatch, small_windows):
    """The longest row comes late."""
    monkeypatch.setattr(cost, "_PROCESS", 0)
    rows = [{"instruction": f"{n} + 1", "output": str(n + 1)} for n in range(20)]
    rows.append({"instruction": "count", "output": "1 2 3 " * 400})
    data = (jsonl(tmp_path / "rows.jsonl", rows),)
    asked = config(tmp_path / "run", data=data, limit=None, tokens=TokenConfig(max_length=1024))
    inputs, device = read_inputs(asked), local_device()

    def needs(window):
        plans = run_module._lay_out(asked, inputs, device, Processes(), [window])
        return [plan.memory.total for _, plan, _ in plans]

    *first, last = read_windows(asked, inputs)
    most = max(n for window in first for n in needs(window))
    assert max(needs(last)) > 2 * most
    small = dataclasses.replace(device, memory=int(1.5 * most))
    monkeypatch.setattr(run_module, "local_device", lambda: small)
    with pytest.raises(GradjaxError, match=r"the run needs .*; use --"):
        run(asked)


def test_auto_target_tokens_leave_nine_tenths_of_each_group(tmp_path, caplog):
    lengths = {"long": range(11, 31), "short": [3, 3, 7, 7, 7, 8, *[9] * 15]}
    files = [
        jsonl(
            tmp_path / f"{group}.jsonl",
            [{"instruction": "count", "output": "1 " * n} for n in of] + [{}],
        )
        for group, of in lengths.items()
    ]
    asked = config(tmp_path / "run", data=tuple(files), limit=None, auto_target_tokens=True)
    rows = [row for window in read_windows(asked, read_inputs(asked)) for row in window.tokenized]
    counts = [
        np.array([r.num_target_tokens for r in rows if r.example.group == g and r.status == "ok"])
        for g in lengths
    ]

    best = max(n for n in range(1, 100) if all((own >= n).mean() >= 0.9 for own in counts))
    with caplog.at_level("INFO"):
        run(asked)
    assert (
        f"--target_tokens=auto: {best} tokens, which 100% of long and 90% of short" in caplog.text
    )
    assert read_manifest(tmp_path / "run")["settings"]["target_tokens"] == best
    statuses = read_table(tmp_path / "run", "examples")["status"].to_pylist()
    assert statuses.count("ok") == sum((own >= best).sum() for own in counts)
    before = every_byte(tmp_path / "run")
    run(asked)  # the store says which number it was
    tokens = TokenConfig(target_tokens=best)
    run(dataclasses.replace(asked, auto_target_tokens=False, tokens=tokens))
    assert every_byte(tmp_path / "run") == before
    with pytest.raises(GradjaxError, match="target_tokens"):
        run(dataclasses.replace(asked, auto_target_tokens=False))


def test_a_manifest_that_was_not_written_at_the_end_is_written_by_the_next_call(
    tmp_path, small_windows
):
    directory = run(config(tmp_path / "run"))
    path = tmp_path / "run" / "run.json"
    manifest = json.loads(path.read_text())
    manifest["data"]["corrupted"] |= {"rows": None, "hash": None}
    path.write_text(json.dumps(manifest))
    assert rows_to_come(directory) is None
    run(config(tmp_path / "run"))
    assert rows_to_come(directory) == 0
    assert read_table(directory, "examples").num_rows == ROWS


def test_a_run_is_not_replaced_before_all_of_the_data_are_read(tmp_path, small_windows):
    run(config(tmp_path / "run"))
    before = every_byte(tmp_path / "run")
    good = jsonl(tmp_path / "good.jsonl", [{"instruction": "1 + 1", "output": "2"}] * 20)
    bad = jsonl(tmp_path / "bad.jsonl", [{"instruction": "1 + 1"}] * 3)
    with pytest.raises(GradjaxError, match="'bad' is usable"):
        run(config(tmp_path / "run", data=(good, bad), limit=None, overwrite=True))
    assert every_byte(tmp_path / "run") == before


def test_auto_does_not_go_on_with_whole_responses(tmp_path):
    asked = config(tmp_path / "run", limit=2)
    run(asked)
    with pytest.raises(GradjaxError, match="target_tokens"):
        run(dataclasses.replace(asked, auto_target_tokens=True))
