"""`gradjax.score` from rows to the table, stopped, called again, and with other metrics."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import gradjax
from gradjax.config import RunConfig
from gradjax.errors import GradjaxError
from gradjax.run import run
from gradjax.score import run as score_run
from gradjax.score.config import FAMILIES, ScoreConfig
from gradjax.score.run import plan, score
from tests.fake_endpoint import answer, error, fake_endpoint

KEYS = ["group", "example_id", "row_hash"]
LONG = "Nora has 17 pens. How many are left after she gives 4 away?"
ROWS = [
    {"instruction": "How many are 17 + 4?", "output": "17 + 4 = 21. The answer is 21."},
    {"instruction": LONG, "output": "17 - 4 = 13. The answer is 13.", "note": 3},
    {"instruction": "q", "output": " "},
    {"instruction": "q"},
    {"messages": [{"role": r, "content": "so"} for r in ("user", "assistant") * 2]},
    {"instruction": "How many are 17 + 4?", "output": "17 + 4 = 21. The answer is 21."},
    {"instruction": "How many are 3 * 5?", "output": "15"},
]


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    return path


def config(rows: Path, directory: Path, metrics: str = "perplexity", **rest) -> ScoreConfig:
    rest = {"ifd_model": "demo", "data": (f"g={rows}",)} | rest
    return ScoreConfig(tuple(metrics.split(",")), output_dir=directory, **rest)


def table(directory: Path) -> pd.DataFrame:
    """As a user reads it."""
    return pd.read_parquet(directory / "scores")


@pytest.fixture(scope="module")
def gradients(tmp_path_factory) -> Path:
    """A run of the embedded model on five rows of each embedded group."""
    directory = tmp_path_factory.mktemp("gradients") / "run"
    run(RunConfig(limit=5, output_dir=directory))
    return directory


@pytest.mark.smoke
def test_losses_are_those_of_a_run(gradients, tmp_path):
    asked = ScoreConfig(
        ("perplexity", "ifd"), ("demo",), tmp_path / "out", limit=5, ifd_model="demo"
    )
    found = table(Path(score(asked)))
    expected = gradjax.open_run(gradients).examples
    both = found.merge(expected, on=[*KEYS, "status", "num_tokens", "num_target_tokens"])
    assert len(both) == len(found) == 15
    np.testing.assert_allclose(both["loss_x"], both["loss_y"], rtol=1e-5)
    np.testing.assert_allclose(found["perplexity"], np.exp(found["loss"]))
    np.testing.assert_allclose(found["perplexity"], found["perplexity_with_instruction"])
    ratio = found["perplexity_with_instruction"] / found["perplexity_without_instruction"]
    np.testing.assert_allclose(found["ifd"], ratio)
    losses = np.log(found[["perplexity_with_instruction", "perplexity_without_instruction"]])
    np.testing.assert_allclose(found["ifd_loss_ratio"], losses.iloc[:, 0] / losses.iloc[:, 1])


@pytest.mark.smoke
def test_every_row_has_its_place_and_why_it_has_no_number(rows, tmp_path):
    found = table(Path(score(config(rows, tmp_path / "out"))))
    assert found["example_id"].tolist() == list(range(7))
    expected = ["ok", "ok", "empty_response", "invalid_row", "invalid_row", "ok", "ok"]
    assert found["status"].tolist() == expected
    assert found["loss"].notna().tolist() == [status == "ok" for status in expected]
    assert found["reason"].notna().tolist() == [status != "ok" for status in expected]
    assert "prompt_format" in found["reason"][4]
    assert found["loss"][0] == found["loss"][5]


@pytest.mark.smoke
def test_a_killed_scoring_goes_on(rows, tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    program = f"""
import os, signal
from gradjax.score import run
from gradjax.places import LocalPlace
from tests.score_test import config
from pathlib import Path
run._CHUNK_ROWS = 1
put = LocalPlace.put
def put_and_die(place, name, data):
    put(place, name, data)
    if name == "parts/perplexity/000001.parquet":
        os.kill(os.getpid(), signal.SIGKILL)
LocalPlace.put = put_and_die
run.score(config(Path({str(rows)!r}), Path({str(killed)!r})))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent.parent)
    assert done.returncode == -9
    assert not (killed / "scores" / "000000.parquet").exists()
    kept = {path.name: path.read_bytes() for path in (killed / "parts" / "perplexity").iterdir()}
    assert len(kept) == 2
    assert plan(config(rows, killed)) == ["perplexity: 2 of 4 different rows to score"]
    score(config(rows, killed))
    score(config(rows, whole))
    for name, data in kept.items():
        assert (killed / "parts" / "perplexity" / name).read_bytes() == data
    pd.testing.assert_frame_equal(table(killed), table(whole), rtol=1e-5)


@pytest.mark.smoke
def test_what_is_finished_is_not_computed_again(rows, tmp_path, monkeypatch):
    directory = tmp_path / "out"
    first = table(Path(score(config(rows, directory))))
    monkeypatch.setattr("gradjax.score.families.load_language_model", None)
    pd.testing.assert_frame_equal(table(Path(score(config(rows, directory)))), first)


@pytest.mark.smoke
def test_metrics_and_groups_may_be_added(rows, tmp_path):
    directory = tmp_path / "out"
    first = table(Path(score(config(rows, directory))))
    both = table(Path(score(config(rows, directory, "ifd"))))
    assert set(FAMILIES["ifd"] + FAMILIES["perplexity"]) <= set(both)
    kept = ["group", "example_id", *FAMILIES["perplexity"]]
    pd.testing.assert_frame_equal(both[kept], first[kept])
    more = tmp_path / "more.jsonl"
    more.write_text('{"instruction": "How many are 2 + 2?", "output": "4"}\n')
    added = table(Path(score(config(rows, directory, data=(f"g={rows}", f"more={more}")))))
    assert added["group"].tolist() == ["g"] * 7 + ["more"]
    assert set(FAMILIES["ifd"]).isdisjoint(added)  # not every row has it


@pytest.mark.smoke
def test_other_settings_are_refused(rows, tmp_path):
    directory = tmp_path / "out"
    before = table(Path(score(config(rows, directory))))
    cut = config(rows, directory, max_length=31)
    with pytest.raises(GradjaxError, match=r"another max_length \(None there, 31 now\)"):
        score(cut)
    after = table(Path(score(config(rows, directory, max_length=31, overwrite=True))))
    assert not after["loss"].equals(before["loss"])


@pytest.mark.smoke
def test_a_runs_statistics_come_along(gradients, tmp_path):
    only_o = ScoreConfig(run=str(gradients), output_dir=tmp_path, layers="0-1", projections=("o",))
    found = table(Path(score(only_o))).set_index(["group", "example_id"])
    spectra = gradjax.open_run(gradients).spectra
    chosen = spectra[(spectra["layer"] < 2) & (spectra["projection"] == "o")]
    expected = chosen.groupby(["group", "example_id"])[["effective_rank", "spectral_norm", "mean"]]
    means = expected.mean().loc[found.index]
    np.testing.assert_allclose(found["effective_rank"], means["effective_rank"])
    np.testing.assert_allclose(found["effective_rank_o"], means["effective_rank"])
    np.testing.assert_allclose(found["spectral_norm"], means["spectral_norm"])
    np.testing.assert_allclose(found["entry_mean"], means["mean"])
    assert (found["status"] == "ok").all()
    assert {"loss", "perplexity", "same_layer_cosine", "cross_layer_cosine"} <= set(found)


def test_a_run_of_other_rows_is_refused(gradients, rows, tmp_path):
    asked = ScoreConfig(run=str(gradients), data=(f"slow={rows}",), output_dir=tmp_path / "out")
    with pytest.raises(GradjaxError, match="has not row 0 of group 'slow'"):
        score(asked)


def test_judged_rows_are_asked_once_and_failures_again(rows, tmp_path, monkeypatch):
    monkeypatch.setattr("gradjax.score.families.Judge", quick_judge)
    down = True

    def behaviour(prompt: str, _: int):
        return error(500, "down") if down and LONG in prompt else answer('{"difficulty": 3}')

    with fake_endpoint(behaviour) as endpoint:
        asked = config(
            rows,
            tmp_path / "out",
            "difficulty",
            judge_base_url=endpoint.base_url,
            judge_model="judge",
        )
        first = table(Path(score(asked)))
        usable = [0, 1, 4, 5, 6]
        np.testing.assert_array_equal(first["difficulty"][usable], [3, np.nan, 3, 3, 3])
        assert "judge" in first["reason"][1]
        down = False
        second = table(Path(score(asked)))
        assert second["difficulty"][usable].tolist() == [3.0] * 5
        assert second["reason"][usable].isna().all()
        third = len(endpoint.bodies)
        score(asked)
        assert len(endpoint.bodies) == third
        assert max(endpoint.answered.values()) == 1


def quick_judge(**settings):
    from gradjax.score.endpoint import Judge

    return Judge(max_retries=0, timeout=5.0, **settings)


def test_the_program_prints_what_there_is(rows, tmp_path):
    command = [sys.executable, "-m", "gradjax.score", f"--data=g={rows}", "--metrics=perplexity"]
    options = ["--ifd_model=demo", f"--output_dir={tmp_path / 'out'}"]
    done = subprocess.run(
        [*command, *options], cwd=Path(__file__).parent.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"The scores are in {tmp_path / 'out'}" in done.stdout
    line = next(line for line in done.stdout.splitlines() if "perplexity" in line)
    assert line.split()[:5] == ["g", "perplexity", "4", "3", "3"]
    assert "1 rows empty_response" in done.stdout


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"metrics": ("ift",)}, "--metrics=ift: expected some of ifd, ifd_loss_ratio"),
        ({"metrics": ()}, "--metrics is empty"),
        ({"data": ()}, "--data is missing"),
        ({"limit": 0}, "--limit=0"),
        ({"metrics": ("instag",)}, "--judge_model"),
        ({"judge_prompt": "p.txt"}, "--judge_prompt=p.txt: expected with one judged metric"),
        ({"layers": "x"}, "--layers=x"),
    ],
)
def test_wrong_flags_are_one_sentence(settings, says):
    with pytest.raises(GradjaxError, match=says):
        ScoreConfig(**({"metrics": ("perplexity",), "data": ("demo",)} | settings))


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ({"notes.txt": b"x"}, "is not empty and holds no scores"),
        ({"score.json": b'{"families": {}}', "parts/perplexity/000000.parquet": b"x"}, "damaged"),
    ],
)
def test_a_strange_or_damaged_directory_is_refused(names, says, rows, tmp_path):
    directory = tmp_path / "out"
    for name, data in names.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
    with pytest.raises(GradjaxError, match=says):
        score(config(rows, directory))


def test_parts_of_a_metric_have_names_that_go_on(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(score_run, "_CHUNK_ROWS", 3)
    directory = tmp_path / "out"
    score(config(rows, directory, limit=1))
    score(config(rows, directory))
    names = sorted(path.name for path in (directory / "parts" / "perplexity").iterdir())
    assert names == ["000000.parquet", "000001.parquet"]
