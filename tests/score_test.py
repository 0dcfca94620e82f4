"""`gradjax.score` from rows to the table, stopped, called again, and with other metrics."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import gradjax
from gradjax.cli.command import parse_flags
from gradjax.cli.score import FLAGS, score_config
from gradjax.config import Reading, RunConfig, TokenConfig
from gradjax.errors import GradjaxError
from gradjax.runs.run import run
from gradjax.score import run as score_run
from gradjax.score.config import FAMILIES, ScoreConfig
from gradjax.score.endpoint import Judge
from gradjax.score.run import plan, score
from gradjax.score.summary import format_scores
from tests.fake_endpoint import answer, error, fake_endpoint

ROOT = Path(__file__).parent.parent
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
    assert found["reason"][4] == "perplexity: 4 turns have no plain form"
    assert found["loss"][0] == found["loss"][5]


@pytest.mark.smoke
def test_a_killed_scoring_goes_on(rows, tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    program = f"""
import os, signal
from gradjax.score import run
from gradjax.score.config import ScoreConfig
from gradjax.storage.filesystem import LocalPlace
run._CHUNK_ROWS = 1
put = LocalPlace.put
def put_and_die(place, name, data):
    put(place, name, data)
    if name == "parts/perplexity/000001.parquet":
        os.kill(os.getpid(), signal.SIGKILL)
LocalPlace.put = put_and_die
data, output = ({f"g={rows}"!r},), {str(killed)!r}
run.score(ScoreConfig(("perplexity",), data, output, ifd_model="demo"))
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
    monkeypatch.setattr("gradjax.score.metrics.load_language_model", None)
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
    assert added["ifd"].notna().tolist() == [*both["ifd"].notna(), False]
    assert "ifd: not scored yet" in added["reason"][7]


@pytest.mark.smoke
def test_other_settings_are_refused(rows, tmp_path):
    directory = tmp_path / "out"
    before = table(Path(score(config(rows, directory))))
    cut = config(rows, directory, max_length=31)
    for asked in (score, plan):
        with pytest.raises(GradjaxError, match=r"settings: max_length \(4096 there, 31 now\)"):
            asked(cut)
    assert plan(dataclasses.replace(cut, overwrite=True)) == [
        "perplexity: 4 of 4 different rows to score"
    ]
    after = table(Path(score(config(rows, directory, max_length=31, overwrite=True))))
    assert not after["loss"].equals(before["loss"])


@pytest.mark.smoke
def test_scores_of_other_texts_of_the_same_rows_are_not_reused(tmp_path):
    answers = {"chosen": "five", "rejected": "6. 7"}
    rows = [{"prompt": f"How many are {i} + 3?", **answers} for i in (2, 3)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))

    def scored(field: str, **changes) -> pd.DataFrame:
        asked = ScoreConfig(
            ("ifd",), (str(path),), tmp_path / "out", ifd_model="demo", reading=Reading(field=field)
        )
        return table(Path(score(dataclasses.replace(asked, **changes))))

    chosen = scored("chosen")
    with pytest.raises(GradjaxError, match=r"other settings: reading \("):
        scored("rejected")
    rejected = scored("rejected", overwrite=True)
    assert (chosen.ifd != rejected.ifd).all()


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
    cosines = gradjax.open_run(gradients).similarity.query(
        "layer_a < 2 and layer_b < 2 and projection == 'o'"
    )
    means = cosines.groupby(["group", "example_id"])["cosine"].mean().loc[found.index]
    np.testing.assert_allclose(found["cross_layer_cosine"], means)
    assert found["same_layer_cosine"].isna().all()  # no pair within o
    kept = table(Path(score(ScoreConfig(("ifd",), ("demo",), tmp_path, limit=5, ifd_model="demo"))))
    assert kept["effective_rank"].tolist() == found["effective_rank"].tolist()
    assert kept["loss"].tolist() == found["loss"].tolist()
    asked = ScoreConfig(("loss",), ("demo",), tmp_path, limit=5, ifd_model="demo", max_length=37)
    assert table(Path(score(asked)))["num_tokens"].max() == 37
    again = table(Path(score(only_o)))
    assert again["loss"].tolist() == found["loss"].tolist()


@pytest.mark.smoke
def test_a_run_that_could_not_use_a_row_leaves_its_other_scores(rows, tmp_path):
    asked = RunConfig(
        data=(f"g={rows}",),
        output_dir=tmp_path / "run",
        tokens=TokenConfig(max_length=41, truncation="drop"),
    )
    run(asked)
    both = config(rows, tmp_path / "out", "ifd", run=str(tmp_path / "run"))
    found = table(Path(score(both)))
    assert found["status"].tolist()[:2] == ["ok", "ok"]
    assert found[["ifd", "effective_rank"]].notna().to_numpy()[:2].tolist() == [
        [True, True],
        [True, False],
    ]
    assert "run: " in found["reason"][1]


@pytest.mark.smoke
def test_a_model_that_cannot_be_had_leaves_the_directory_free(rows, tmp_path):
    with pytest.raises(GradjaxError, match="takes at most 4096"):
        score(config(rows, tmp_path / "out", max_length=100_000))
    score(config(rows, tmp_path / "out"))


@pytest.mark.smoke
def test_a_table_of_other_rows_or_settings_is_gone_at_once(rows, tmp_path, monkeypatch):
    directory = tmp_path / "out"
    score(config(rows, directory))
    monkeypatch.setattr("gradjax.score.metrics.load_language_model", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        score(config(rows, directory, max_length=31, overwrite=True))
    assert not (directory / "scores" / "000000.parquet").exists()


def test_a_run_of_other_rows_is_refused(gradients, rows, tmp_path):
    asked = ScoreConfig(run=str(gradients), data=(f"slow={rows}",), output_dir=tmp_path / "out")
    with pytest.raises(GradjaxError, match="has not row 0 of group 'slow'"):
        score(asked)
    assert not (tmp_path / "out").exists()


def test_judged_rows_are_asked_once_and_failures_again(rows, tmp_path, monkeypatch):
    monkeypatch.setattr("gradjax.score.endpoint.Judge", quick_judge)
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


def scored(*flags: object) -> subprocess.CompletedProcess[str]:
    """What the program does."""
    command = [sys.executable, "-m", "gradjax", "score", *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_status_is_1_while_rows_have_no_answer_of_the_judge(rows, tmp_path):
    whole = False

    def behaviour(prompt: str, _: int):
        if whole or LONG not in prompt:
            return answer("no rating" if "3 * 5" in prompt else '{"difficulty": 3}')
        return error(400, "too long")

    with fake_endpoint(behaviour) as endpoint:
        flags = [f"--data=g={rows}", "--metrics=difficulty", f"--output_dir={tmp_path / 'out'}"]
        flags += [f"--judge_base_url={endpoint.base_url}", "--judge_model=judge"]
        first = scored(*flags, "--judge_concurrency=1")
        assert first.returncode == 1
        said = first.stderr.splitlines()[-1]
        assert said == (
            "gradjax: difficulty: 2 rows have no answer of the judge (1 no answer, 1 given up): "
            "the same command asks for them again; what is given up is asked again only with a "
            "larger --judge_max_tokens, or with another --judge_model or --judge_prompt in another "
            "--output_dir; --allow_missing takes it as it is, with status 0"
        )
        assert f"The scores are in {tmp_path / 'out'}" in first.stdout
        assert "g: 1 rows ok: difficulty: judge: given up (3 answers, none usable" in first.stdout
        found = table(tmp_path / "out")
        assert found["difficulty"].notna().tolist() == [i in (0, 4, 5) for i in range(7)]

        before = len(endpoint.bodies)
        allowed = scored(*flags, "--allow_missing")
        assert allowed.returncode == 0, allowed.stderr
        assert "2 rows have no answer of the judge" in allowed.stderr
        assert [LONG in prompt for prompt in endpoint.prompts[before:]] == [True]

        whole = True
        assert "1 rows have no answer of the judge (1 given up)" in scored(*flags).stderr


def test_a_spent_budget_ends_with_status_1_and_the_next_call_goes_on(rows, tmp_path):
    with fake_endpoint(lambda *_: answer('{"difficulty": 3}')) as endpoint:
        flags = [f"--data=g={rows}", "--metrics=difficulty", f"--output_dir={tmp_path / 'out'}"]
        flags += [f"--judge_base_url={endpoint.base_url}", "--judge_model=judge"]
        flags += ["--judge_budget=requests=2,tokens=2e6", "--judge_concurrency=1"]
        first = scored(*flags)
        assert first.returncode == 1
        assert len(endpoint.bodies) == 2
        said = first.stderr.splitlines()[-1]
        assert "3 rows have no answer of the judge (3 not asked): the same command goes on" in said
        assert "judge: not asked (--judge_budget=requests=2,tokens=2000000 is r" in first.stdout
        second = scored(*flags)
        assert second.returncode == 0, second.stderr
        assert len(endpoint.bodies) == 4


def test_scores_of_another_endpoint_are_not_mixed(rows, tmp_path, monkeypatch):
    monkeypatch.setattr("gradjax.score.endpoint.Judge", quick_judge)
    with (
        fake_endpoint(lambda *_: answer('{"difficulty": 3}')) as one,
        fake_endpoint(lambda *_: answer('{"difficulty": 8}')) as other,
    ):
        first, second = (
            config(
                rows,
                tmp_path / "out",
                "difficulty",
                judge_base_url=endpoint.base_url,
                judge_model="judge",
                overwrite=endpoint is other,
            )
            for endpoint in (one, other)
        )
        score(first)
        with pytest.raises(GradjaxError, match=r"difficulty scores with other settings: endpoint"):
            score(dataclasses.replace(second, overwrite=False))
        assert table(Path(score(second)))["difficulty"].dropna().tolist() == [8.0] * 5
        back = len(one.bodies)
        assert table(Path(score(dataclasses.replace(first, overwrite=True))))["difficulty"][0] == 3
        assert len(one.bodies) == back  # its answers are still there


def test_a_prompt_of_another_form_is_another_metric(rows, tmp_path, monkeypatch):
    """Also where only the tags around the row have changed, which a user's file does not hold."""
    monkeypatch.setattr("gradjax.score.endpoint.Judge", quick_judge)
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Rate {instruction}")
    with fake_endpoint(lambda *_: answer('{"difficulty": 3}')) as endpoint:
        judged = {"judge_base_url": endpoint.base_url, "judge_model": "judge"}
        asked = config(
            rows, tmp_path / "out", "difficulty", judge_prompt=str(prompt), limit=1, **judged
        )
        score(asked)
        monkeypatch.setattr(
            "gradjax.score.judge.fill", lambda prompt, text: prompt.replace("{instruction}", text)
        )
        monkeypatch.setattr(
            "gradjax.score.metrics.fill", lambda prompt, text: prompt.replace("{instruction}", text)
        )
        with pytest.raises(GradjaxError, match=r"difficulty scores with other settings: prompt"):
            score(asked)


def test_rows_that_the_judge_will_not_have_stop_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr("gradjax.score.endpoint.Judge", quick_judge)
    rows = tmp_path / "rows.jsonl"
    lines = [{"instruction": "x" * (n + 1), "output": "y"} for n in range(50)]
    rows.write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    def behaviour(prompt: str, _: int):
        return error(400, "too long") if "x" * 20 in prompt else answer('{"difficulty": 3}')

    with fake_endpoint(behaviour) as endpoint:
        judged = {"judge_base_url": endpoint.base_url, "judge_model": "judge"}
        found = table(Path(score(config(rows, tmp_path / "out", "difficulty", **judged))))
    assert found["difficulty"].notna().tolist() == [n < 19 for n in range(50)]


def test_the_tag_vocabulary_is_told(rows, tmp_path, monkeypatch):
    monkeypatch.setattr("gradjax.score.endpoint.Judge", quick_judge)

    def behaviour(prompt: str, _: int):
        return answer('["sums", "pens"]' if LONG in prompt else '["sums"]')

    with fake_endpoint(behaviour) as endpoint:
        judged = {"judge_base_url": endpoint.base_url, "judge_model": "judge"}
        directory = Path(score(config(rows, tmp_path / "out", "instag", **judged)))
    assert table(directory)["instag"].dropna().tolist() == [1, 2, 1, 1, 1]
    assert "g: 2 different tags" in format_scores(directory)


def quick_judge(**settings):
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
        ({"max_length": 1}, "--max_length=1: expected a number of at least 2"),
        ({"metrics": ("effective_rank",)}, "gradient statistics come with --run=DIR"),
        ({"layers": "0-2"}, "--layers and --projections are of --run"),
        ({"metrics": ("instag",)}, "--judge_model"),
        ({"judge_prompt": "p.txt"}, "--judge_prompt=p.txt: expected with one judged metric"),
        ({"layers": "x"}, "--layers=x"),
        ({"judge_budget": {"requests": 0}}, "--judge_budget=requests=0: expected requests=N"),
        ({"judge_budget": {"tokens": float("nan")}}, "--judge_budget=tokens=nan: expected"),
        ({"judge_budget": {"dollars": 5}}, "--judge_budget=dollars=5: expected requests=N"),
        (
            {"judge_budget": {"requests": 5}, "judge_batch": "b.jsonl"},
            "--judge_budget=requests=5 is for questions that are asked now",
        ),
    ],
)
def test_wrong_flags_are_one_sentence(settings, says):
    with pytest.raises(GradjaxError, match=says):
        ScoreConfig(**({"metrics": ("perplexity",), "data": ("demo",)} | settings))


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ({"notes.txt": b"x"}, r"is not empty and not a gradjax scoring \(found notes.txt\)"),
        ({"score.json": b"{"}, "score.json is damaged"),
        ({"score.json": b'{"families": 3}'}, "score.json is damaged"),
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


@pytest.mark.parametrize(
    "budget", ["1000", "requests=many", "tokens=", "requests=1,requests=2", "euros=3"]
)
def test_a_budget_of_another_form_is_named(budget):
    FLAGS.unparse_flags()
    flags = ["--data=demo", "--metrics=perplexity", f"--judge_budget={budget}"]
    parse_flags(["gradjax score", *flags], FLAGS)
    with pytest.raises(GradjaxError, match=re.escape(f"--judge_budget={budget}: expected")):
        score_config()


def test_python_scores_as_the_command_does(rows, tmp_path):
    found = gradjax.score(
        data=[f"g={rows}"],
        metrics=["perplexity"],
        ifd_model="demo",
        output_dir=tmp_path / "python",
        columns=["instruction=instruction"],
    )
    score(config(rows, tmp_path / "command", reading=Reading(columns=("instruction=instruction",))))
    expected = table(tmp_path / "command")
    pd.testing.assert_frame_equal(found.reset_index(drop=True), expected.reset_index(drop=True))
    with pytest.raises(TypeError, match="nonsense"):
        gradjax.score(data=[str(rows)], metrics=["perplexity"], nonsense=1)
