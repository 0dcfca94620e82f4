"""Real processes of one run on this machine: the store of one process, whoever dies."""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from gradjax.distributed import join
from gradjax.errors import GradjaxError
from gradjax.storage.store import finished_rows
from tests.whole_runs import MAIN, every_byte, start, tables

ROWS = 36


def start_together(
    directory: Path, count: int, *flags: str, devices: int = 1, code: str = MAIN
) -> list[subprocess.Popen]:
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
    }
    together = (f"--coordinator_address=localhost:{port}", f"--num_processes={count}")
    return [
        start(directory, *together, f"--process_id={i}", *flags, code=code, env=environment)
        for i in range(count)
    ]


def finish(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    outputs = [process.communicate() for process in processes]
    return [(p.returncode, *output) for p, output in zip(processes, outputs, strict=True)]


def assert_same_store(directory: Path, expected: Path) -> None:
    """Same rows, and numbers equal to 1e-5 relative to what they are numbers of."""
    right = tables(expected)
    for table, frame in tables(directory).items():
        for name, column in frame.items():
            other = right[table][name]
            if name == "singular_values":
                for found, values in zip(column, other, strict=True):
                    np.testing.assert_allclose(found, values, rtol=0, atol=1e-5 * values[0])
            elif column.dtype == float:
                scale = other.abs()
                if name in ("mean", "max", "min"):
                    scale = right[table][["max", "min"]].abs().max(axis=1)
                if name == "cosine":
                    scale = pd.Series(1.0, other.index)
                assert np.all(np.abs(column - other) <= 1e-5 * scale), name
            else:
                assert column.equals(other), name


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    directory = tmp_path_factory.mktemp("one") / "run"
    ((status, _, errors),) = finish([start(directory)])
    assert status == 0, errors
    return directory


def test_independent_processes_share_the_rows(one_process, tmp_path):
    ended = finish(start_together(tmp_path / "run", 2))
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert any("nuclear norm" in output for _, output, _ in ended)
    assert_same_store(tmp_path / "run", one_process)
    names = {path.stem[-5:] for path in (tmp_path / "run" / "examples").iterdir()}
    assert names == {"-0000", "-0001"}


@pytest.mark.parametrize("dies", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_process_costs_only_its_rows_and_any_number_completes(dies, one_process, tmp_path):
    directory = tmp_path / "run"
    processes = start_together(directory, 2)
    while not list(directory.glob(f"examples/*-{dies:04d}.parquet")):
        assert processes[dies].poll() is None, processes[dies].communicate()
        time.sleep(0.005)
    processes[dies].send_signal(signal.SIGKILL)
    killed, other = finish([processes[dies], processes[1 - dies]])
    assert killed[0] == -signal.SIGKILL
    assert other[0] == 0, other
    there = finished_rows(directory)
    assert ROWS / 3 < len(there) < ROWS
    assert "of the run's other processes are to come" in other[1]

    ended = finish(start_together(directory, 3) if dies else [start(directory)])
    assert {status for status, _, _ in ended} == {0}, ended
    assert f"{len(there)} finished before" in ended[0][2]
    assert_same_store(directory, one_process)


def test_sharded_processes_hold_one_model_together(one_process, tmp_path):
    flags = ("--processes=sharded", "--mesh=fsdp:2,tensor:2")
    ended = finish(start_together(tmp_path / "run", 2, *flags, devices=2))
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert_same_store(tmp_path / "run", one_process)
    assert "nuclear norm" in ended[0][1]  # the first one speaks for both
    assert "nuclear norm" not in ended[1][1]
    before = every_byte(tmp_path / "run")
    ended = finish(start_together(tmp_path / "run", 2, *flags, devices=2))  # with nothing left
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert every_byte(tmp_path / "run") == before


def test_all_are_refused_what_one_is(one_process):
    before = every_byte(one_process)
    ended = finish(start_together(one_process, 2, "--max_length=64"))
    assert every_byte(one_process) == before
    for status, output, errors in ended:
        assert (status, output) == (1, "")
        assert "max_length" in errors
        assert "Traceback" not in errors


def test_detection_without_a_cluster_is_a_clear_error():
    with (
        pytest.raises(GradjaxError, match="--coordinator_address=auto: the run's processes did"),
        join("auto", None, None, sharded=False),
    ):
        pass
