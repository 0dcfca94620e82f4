"""configs/paper.csv against the published tables; launch/paper.sh, its programs played or real."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from gradjax.checkpoints.resolve import REGISTRY
from gradjax.cli import score, spectra
from gradjax.cli.app import COMMANDS
from gradjax.cli.command import parse_flags
from gradjax.data.catalog import DATASETS
from gradjax.report.published import published as published_numbers
from tests.fake_endpoint import Reply, answer, fake_endpoint

ROOT = Path(__file__).parent.parent
PUBLISHED = ROOT / "gradjax" / "report" / "published"
KEY = ["number", "model", "dataset", "metric"]
GROUPS = {
    "wizardlm": ("wizardlm:top", "wizardlm:bottom"),
    "magpie": ("magpie:top", "magpie:bottom"),
    "openhermes": ("openhermes2.5:top", "openhermes2.5:bottom"),
    "reasoning": ("s1.1", "gsm8k_r1"),
    "gsm8k": ("gsm8k_slow", "gsm8k_fast"),
}


@pytest.fixture(scope="module")
def experiments() -> pd.DataFrame:
    return pd.read_csv(ROOT / "configs" / "paper.csv", dtype=str)


def published() -> pd.DataFrame:
    tables = [pd.read_csv(PUBLISHED / f"{name}.csv") for name in ("spectra", "similarity")]
    return pd.concat(tables).rename(columns={"table": "number"})[KEY].drop_duplicates()


class TestExperiments:
    def test_every_published_table_is_there_and_no_other(self, experiments: pd.DataFrame):
        tables = experiments[experiments["kind"] == "table"]
        assert not tables.duplicated(KEY).any()
        rows = {tuple(row) for row in tables[KEY].to_numpy()}
        assert rows == {(str(n), *rest) for n, *rest in published().to_numpy()}
        assert set(tables["number"]) == {str(n) for n in range(1, 61)}

    def test_groups_are_those_of_the_data_set(self, experiments: pd.DataFrame):
        for row in experiments.itertuples():
            assert (row.high, row.low) == GROUPS[row.dataset]
            assert row.high.partition(":")[0] in DATASETS
            assert row.low.partition(":")[0] in DATASETS
            assert row.n_per_group == "200"

    def test_the_higher_group_of_fast_and_slow_is_the_published_one(self):
        # Slow thinking has the far smaller nuclear norms (the paper's claim).
        table = pd.read_csv(PUBLISHED / "spectra.csv").query("metric == 'fast_slow'")
        norms = table[table["statistic"] == "nuclear_norm"]
        assert (norms["high"] * 10 < norms["low"]).all()

    def test_the_figure_has_every_model(self, experiments: pd.DataFrame):
        figures = experiments[experiments["kind"] == "figure"]
        assert set(figures["number"]) == {"families"}
        models = {file.stem for file in (ROOT / "configs").glob("*.flags")}
        assert set(figures["model"]) == models
        assert set(experiments["model"]) <= models <= set(REGISTRY)


def call(repository: Path, *arguments: str, status: int = 0, **options) -> SimpleNamespace:
    result = subprocess.run(
        ["bash", repository / "launch" / "paper.sh", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        **options,
    )
    assert result.returncode == status, result.stdout + result.stderr
    return SimpleNamespace(out=result.stdout, err=result.stderr)


def commands(shown: str) -> list[tuple[str, list[str]]]:
    """The programs of a dry run and their flags, in order."""
    found = []
    for line in shown.splitlines():
        gradjax, program, *flags = shlex.split(line)
        assert Path(gradjax).name == "gradjax"
        found.append((program, flags))
    return found


def flag(flags: list[str], name: str) -> str:
    (value,) = [f.partition("=")[2] for f in flags if f.startswith(f"--{name}=")]
    return value


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, list[str]]]:
    here = tmp_path_factory.mktemp("here")
    result = call(ROOT, "--all", "--dry_run", cwd=here)
    assert result.err == ""
    assert list(here.iterdir()) == []
    subprocess.run(["bash", "-n"], input=result.out, text=True, check=True)
    return commands(result.out)


# The commands that launch/paper.sh calls.
CALLED = ("prepare", "score", "select", "spectra", "report")


class TestDryRun:
    def test_every_experiment_is_run_once_and_reported(self, experiments, shown):
        runs = {flag(f, "output_dir"): f for program, f in shown if program == "spectra"}
        reports = [f for program, f in shown if program == "report"]
        assert len(runs) == len([1 for program, _ in shown if program == "spectra"])
        assert len(reports) == len({flag(f, "output_dir") for f in reports})
        for row in experiments.itertuples():
            run = f"runs/paper/runs/{row.model}_{row.dataset}_{row.metric}"
            assert flag(runs[run], "flagfile") == str(ROOT / "configs" / f"{row.model}.flags")
            high, low = (f.partition("=")[2] for f in runs[run] if f.startswith("--data="))
            selected = f"runs/paper/selections/{row.high.partition(':')[0]}_{row.metric}"
            if row.high.endswith(":top"):
                expected = (f"high={selected}/high.jsonl", f"low={selected}/low.jsonl")
            else:
                data = "runs/paper/data"
                expected = (f"high={data}/{row.high}.jsonl", f"low={data}/{row.low}.jsonl")
            assert (high, low) == expected
            equal_length = runs[f"{run}_auto_tokens"]
            both = [f"--run={run}", f"--equal_length_run={run}_auto_tokens"]
            assert equal_length[-1] == "--target_tokens=auto"
            assert [f for f in equal_length[:-1] if not f.startswith("--output_dir=")] == [
                f for f in runs[run] if not f.startswith("--output_dir=")
            ]
            if row.kind == "table":
                number = int(row.number)
                number -= number > 4 and number % 2 == 0
                published = f"--published={row.dataset}/{row.metric}:{number}"
                output = f"--output_dir={run}/report_table_{number}"
                assert [*both, "--compare=high:low", published, output] in reports
            else:
                (figure,) = [f for f in reports if "--output_dir=runs/paper/figures/families" in f]
                assert both == figure[figure.index(both[0]) :][:2]
            assert both == reports[-1][reports[-1].index(both[0]) :][:2]
        assert reports[-1][0] == "--summary"
        assert len(reports[-1]) == 3 + len(runs)

    def test_published_numbers_are_those_of_the_table(self, experiments, shown):
        """Each report names a printing that has the table's own numbers."""
        named = {flag(f, "output_dir"): f for program, f in shown if program == "report"}
        for row in experiments.query("kind == 'table'").itertuples():
            number = int(row.number)
            number -= number > 4 and number % 2 == 0
            run = f"runs/paper/runs/{row.model}_{row.dataset}_{row.metric}"
            asked = flag(named[f"{run}/report_table_{number}"], "published")
            printed = published_numbers(str(row.model), asked)
            tables = {int(n) for kind in printed for n in kind["table"]}
            assert int(row.number) in tables, asked

    def test_only_rows_with_a_plain_form_are_drawn(self, shown):
        assert all("--plain" in flags for program, flags in shown if program == "prepare")
        flagfiles = {flag(f, "flagfile") for program, f in shown if program == "spectra"}
        assert all("--prompt_format=plain\n" in Path(file).read_text() for file in flagfiles)

    def test_what_is_read_was_written_before(self, shown):
        written: set[str] = set()
        for _, flags in shown:
            for name, _, value in (f.partition("=") for f in flags):
                if name in ("--data", "--scores", "--run", "--equal_length_run"):
                    path = value.rpartition("=")[2]
                    assert path in written or str(Path(path).parent) in written
            written |= {v for n, _, v in (f.partition("=") for f in flags) if "output" in n}

    @pytest.mark.parametrize("program", CALLED)
    def test_programs_take_the_flags(self, shown, program: str):
        command = COMMANDS[program]
        calls = {tuple(flags) for name, flags in shown if name == program}
        assert calls
        for arguments in sorted(calls):
            command.flags.unparse_flags()
            assert parse_flags([program, *arguments], command.flags) == [program]
            if program in ("spectra", "score"):
                {"spectra": spectra.run_config, "score": score.score_config}[program]()

    def test_a_metric_is_scored_as_in_the_paper(self, shown):
        flags_of = [flags for program, flags in shown if program == "score"]
        scored = {flag(f, "output_dir").rpartition("/")[2]: f for f in flags_of}
        names = {"wizardlm", "magpie", "openhermes2.5"}
        metrics = {"ifd_gpt2", "reward", "instag", "difficulty"}
        together = {f"{name}_{metric}" for name in names for metric in metrics}
        assert set(scored) == together | {"wizardlm_ifd_qwen7b"}
        assert flag(scored["magpie_ifd_gpt2"], "ifd_model") == "gpt2"
        assert flag(scored["wizardlm_ifd_qwen7b"], "ifd_model") == "qwen2.5_7b"
        reward = flag(scored["magpie_reward"], "reward_model")
        assert reward == "sfairXC/FsfairX-LLaMA3-RM-v0.1"
        assert flag(scored["magpie_instag"], "judge_model") == "gpt-4o"

    def test_one_table_is_the_part_of_all_that_it_needs(self, shown, tmp_path: Path):
        unscored = ["prepare", "prepare", "spectra", "spectra", "report"]
        scored = ["prepare", "score", "select", "spectra", "spectra", "report"]
        for table, programs in (("3", unscored), ("4", scored + unscored), ("60", unscored)):
            part = commands(call(ROOT, f"--table={table}", "--dry_run", cwd=tmp_path).out)
            assert [program for program, _ in part] == programs
            assert all(command in shown for command in part)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((), "give one of --table=N, --figure=NAME, --all and --summary"),
            (("--table=1", "--all"), "give one of"),
            (("--table=61",), "--table=61: configs/paper.csv has no such table; it has tables 1"),
            (("--table=1,qwen2.5_7b",), "configs/paper.csv has no such table"),
            (("--figure=7",), "--figure=7: configs/paper.csv has no such figure"),
            (("--table",), "--table: expected --table=VALUE"),
            (("--summary",), "--summary: no experiment has run in --output_dir=runs/paper"),
            (("--table=5", "--target_tokens=0"), "--target_tokens=0: expected a number of at"),
            (("--limit=3",), "flags of gradjax spectra come after --"),
        ],
    )
    def test_other_arguments_are_refused(self, tmp_path: Path, arguments, message: str):
        assert message in call(ROOT, *arguments, "--dry_run", status=1, cwd=tmp_path).err


def test_help_says_how_to_call_it():
    shown = call(ROOT, "--help").out
    assert "bash launch/paper.sh --table=N" in shown
    assert "--dry_run" in shown
    assert "gradjax prepare --dataset=NAME --source=FILE --sample=200" in shown
    assert "--target_tokens=auto" in shown


def test_help_says_which_tables_are_of_which_model(experiments: pd.DataFrame):
    shown = " ".join(call(ROOT, "--help").out.split())
    tables = experiments[experiments["kind"] == "table"]
    for model, group in tables.astype({"number": int}).query("number > 4").groupby("model"):
        first, last = group["number"].min(), group["number"].max()
        assert re.search(rf"{first} to {last} (for the figures of )?{re.escape(str(model))}", shown)


# Plays the five commands: notes how it was called and makes what the program would make.
PLAYED = """#!/usr/bin/env bash
set -e
name=$1
shift
printf '%s\\n' "$name $*" >>"$CALLS"
for word in "$@"; do
  case $word in
    --output=*) echo data >"${word#*=}"; echo sum >"${word#*=}.sha256" ;;
    --output_dir=*) mkdir -p "${word#*=}" ;;
  esac
done
if [[ ${FAIL:-} == "$name" ]]; then exit 3; fi
"""


class Played:
    """The script in a directory whose Python only plays the programs."""

    def __init__(self, folder: Path):
        self.here = folder / "a place"
        self.here.mkdir()
        self.calls = folder / "calls"
        self.venv = folder / "venv"
        self.environment = os.environ | {"VENV": str(self.venv), "CALLS": str(self.calls)}
        self.environment.pop("JUDGE_BASE_URL", None)
        make_venv(self.venv, PLAYED)

    def run(self, *arguments: str, status: int = 0, **environment: str) -> tuple[list[str], str]:
        """The programs that were called, and what the script said."""
        self.calls.write_text("")
        said = call(
            ROOT, *arguments, status=status, cwd=self.here, env=self.environment | environment
        )
        return [line.split()[0] for line in self.calls.read_text().splitlines()], said.err

    def lines(self, program: str) -> list[str]:
        """How the last call of the script called a program."""
        lines = self.calls.read_text().splitlines()
        return [line for line in lines if line.startswith(f"{program} ")]


def make_venv(folder: Path, gradjax: str, repository: Path = ROOT) -> None:
    """An environment that a repository's scripts take for one with all requirements."""
    (folder / "bin").mkdir(parents=True)
    for name in ("python", "gradjax"):
        (folder / "bin" / name).write_text(gradjax)
        (folder / "bin" / name).chmod(0o755)
    wanted = [(ROOT / name).read_text() for name in ("pyproject.toml", "requirements.txt")]
    (folder / "installed-requirements.txt").write_text("".join([f"{repository}\n", *wanted]))


@pytest.fixture
def played(tmp_path: Path) -> Played:
    return Played(tmp_path)


class TestResuming:
    ALL = ("prepare", "score", "select", "spectra", "spectra", "report")
    JUDGE = "http://127.0.0.1:1/v1"

    def test_what_is_finished_stays(self, played: Played):
        # Table 2 has a scored and an unscored experiment.
        expected = [*self.ALL, "prepare", "prepare", "spectra", "spectra", "report"]
        called, said = played.run("--table=2", JUDGE_BASE_URL=self.JUDGE)
        assert called == expected
        called, said = played.run("--table=2", JUDGE_BASE_URL=self.JUDGE)
        assert called == []
        assert "runs/paper/runs/qwen2.5_7b_magpie_difficulty is there" in said

    @pytest.mark.parametrize("step", CALLED)
    def test_a_step_that_fails_is_where_the_next_call_begins(self, played: Played, step: str):
        # As score does while rows lack an answer: its output is there all the same.
        first = self.ALL.index(step)
        called, _ = played.run("--table=2", status=3, FAIL=step, JUDGE_BASE_URL=self.JUDGE)
        assert called == [*self.ALL[: first + 1]]
        called, _ = played.run("--table=2", JUDGE_BASE_URL=self.JUDGE)
        # A whole file of rows vouches for itself.
        again = first + (step == "prepare")
        expected = [*self.ALL[again:], "prepare", "prepare", "spectra", "spectra", "report"]
        assert called == expected

    def test_scores_that_lack_answers_are_asked_for_again(self, played: Played):
        scores = "runs/paper/scores/magpie_difficulty"
        for _ in range(2):
            called, _ = played.run("--table=2", status=3, FAIL="score", JUDGE_BASE_URL=self.JUDGE)
            assert called[-1] == "score"
            assert (played.here / scores).is_dir()
            assert not (played.here / f"{scores}.done").exists()
        called, _ = played.run("--table=2", "--allow_missing", JUDGE_BASE_URL=self.JUDGE)
        assert called[:2] == ["score", "select"]
        asked = [line.endswith(" --allow_missing") for line in played.lines("score")]
        assert asked == [False]  # it stands before --output_dir
        assert " --allow_missing " in played.lines("score")[0]

    def test_an_output_is_not_vouched_for_by_an_earlier_command(self, played: Played):
        played.run("--table=3")
        played.run("--table=3", "--", "--overwrite", status=3, FAIL="spectra")
        assert played.run("--table=3")[0] == ["spectra", "report"]

    def test_what_follows_from_a_new_output_is_made_again(self, played: Played):
        played.run("--table=2", JUDGE_BASE_URL=self.JUDGE)
        shutil.rmtree(played.here / "runs/paper/selections/magpie_difficulty")
        called, _ = played.run("--table=2", JUDGE_BASE_URL=self.JUDGE)
        assert called == ["select", "spectra", "spectra", "report"]

    def test_other_flags_of_main_are_another_run(self, played: Played):
        played.run("--table=3", "--", "--limit=2")
        assert played.run("--table=3", "--", "--limit=2")[0] == []
        assert played.run("--table=3")[0] == ["spectra", "spectra", "report"]

    def test_another_number_of_target_tokens_is_another_run_at_equal_length(self, played: Played):
        played.run("--table=3")
        called, _ = played.run("--table=3", "--target_tokens=5")
        assert called == ["spectra", "report"]
        assert "_5_tokens --target_tokens=5" in played.lines("spectra")[0]
        assert played.run("--table=3", "--target_tokens=5")[0] == []

    def test_tables_share_what_they_have_in_common(self, played: Played):
        unscored = ["prepare", "prepare", "spectra", "spectra", "report"]
        assert played.run("--table=3")[0] == unscored
        assert played.run("--table=2", JUDGE_BASE_URL=self.JUDGE)[0][:3] == list(self.ALL[:3])
        # Of table 28 the runs are those of table 2; its numbers are printed beside those of 27.
        assert played.run("--table=28")[0] == ["report"]
        assert "--published=reasoning/difficulty:27" in played.lines("report")[0]
        assert played.run("--table=27")[0] == []
        assert played.run("--table=12")[0] == ["spectra", "spectra", "report"]

    def test_data_prepared_by_hand_are_taken(self, played: Played):
        data = played.here / "elsewhere/data"
        data.mkdir(parents=True)
        for name in ("s1.1.jsonl", "s1.1.jsonl.sha256"):
            (data / name).write_text("by hand")
        called, _ = played.run("--table=12", "--output_dir=elsewhere")
        assert called == ["prepare", "spectra", "spectra", "report"]
        assert (data / "s1.1.jsonl").read_text() == "by hand"

    def test_data_that_could_not_be_fetched_are_prepared_by_hand(self, played: Played):
        data = played.here / "runs/paper/data"
        played.run("--table=12")
        stamp = data / "gsm8k_r1.jsonl.done"
        stamp.write_text("as an earlier version drew them\n")
        called, _ = played.run("--table=12", status=3, FAIL="prepare")
        assert called == ["prepare"]
        later = stamp.stat().st_mtime + 9
        os.utime(data / "gsm8k_r1.jsonl.sha256", (later, later))
        called, _ = played.run("--table=12")
        assert called == ["spectra", "spectra", "report"]

    def test_more_rows_than_the_paper_has_are_refused(self, played: Played):
        file = played.here / "my runs/data/s1.1.jsonl"
        file.parent.mkdir(parents=True)
        (file.parent / f"{file.name}.sha256").write_text("by hand")
        file.write_text("{}\n" * 201)
        called, said = played.run("--table=11", "--output_dir=my runs", status=1)
        assert called == []
        assert "my runs/data/s1.1.jsonl has 201 rows where the paper draws 200" in said
        command = shlex.split(said[said.index("bin/gradjax prepare ") :])[2:]
        assert command == [
            "--dataset=s1.1",
            "--source=FILE",
            "--sample=200",
            "--seed=0",
            "--plain",
            "--output=my runs/data/s1.1.jsonl",
        ]
        file.write_text("{}\n" * 200)
        called, _ = played.run("--table=11", "--output_dir=my runs")
        assert called == ["prepare", "spectra", "spectra", "report"]

    def test_a_judge_has_to_be_named_where_it_is_asked(self, played: Played):
        called, said = played.run("--table=2", status=1)
        assert called == ["prepare"]
        assert "JUDGE_BASE_URL is not set; for runs/paper/scores/magpie_difficulty" in said
        played.run("--table=2", JUDGE_BASE_URL=self.JUDGE)
        assert played.run("--table=2")[0] == []

    def test_another_endpoint_has_the_same_judge(self, played: Played):
        played.run("--table=2", JUDGE_BASE_URL=self.JUDGE)
        assert played.run("--table=2", JUDGE_BASE_URL="http://127.0.0.1:2/v1")[0] == []

    def test_settings_are_read_before_anything_is_made(self, played: Played):
        (played.venv / "installed-requirements.txt").unlink()
        for arguments, message in (
            ((), "give one of --table=N"),
            (("--table=1,5",), "--table=1,5: configs/paper.csv has no such table"),
            (("--figure=7",), "the paper's other figures are drawn by the reports of the tables"),
        ):
            called, said = played.run(*arguments, status=1, PYTHON="no-such-python")
            assert called == []
            assert message in said
            assert list(played.here.iterdir()) == []

    def test_the_home_directory_may_be_named_by_a_tilde(self, played: Played):
        home = played.here / "R&D"
        played.run("--table=3", "--output_dir=~/x", HOME=str(home))
        assert (home / "x/runs/qwen2.5_7b_gsm8k_fast_slow/report_table_3").is_dir()
        assert list(played.here.iterdir()) == [home]

    def test_a_figure_has_one_report(self, played: Played):
        called, _ = played.run("--figure=families")
        assert called == ["prepare", "prepare", *["spectra"] * 18, "report"]
        assert played.run("--figure=families")[0] == []

    def test_the_summary_is_of_what_has_run(self, played: Played):
        _, said = played.run("--summary", status=1)
        assert "--summary: no experiment has run in --output_dir=runs/paper" in said
        played.run("--table=3")
        played.run("--table=12")
        played.run("--table=36", status=3, FAIL="spectra")
        assert played.run("--summary")[0] == ["report"]
        (report,) = played.lines("report")
        runs = [Path(word).name for word in report.split() if word.startswith("--run=")]
        assert runs == ["qwen2.5_7b_gsm8k_fast_slow", "qwen2.5_1.5b_reasoning_difficulty"]
        assert report.startswith("report --summary --run=")
        assert report.endswith(" --compare=high:low --output_dir=runs/paper/summary")
        assert played.run("--summary")[0] == []
        played.run("--table=36")
        assert played.run("--summary")[0] == ["report"]
        played.run("--summary", "--target_tokens=5", status=1)


# Real programs, on a machine whose Hub cache holds tiny models and data under the real names.
GRADJAX = f"""#!/usr/bin/env bash
PYTHONPATH={shlex.quote(str(ROOT))} exec {shlex.quote(sys.executable)} -m gradjax "$@"
"""
SIZE = 5  # rows per group
ROWS = 43  # of a data set


def words(i: int) -> str:
    """Short texts, so that few programs are compiled."""
    return f"{'an ' * (i % 3)}apple {i}"


def cached(cache: Path, kind: str, repo: str, commit: str) -> Path:
    """Where the Hub's client looks for a repository that it has downloaded."""
    folder = cache / f"{kind}s--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    return snapshot


def cache_data(cache: Path, name: str, *columns: str, start: str = "") -> None:
    dataset = DATASETS[name]
    assert dataset.repo
    commit = dataset.revision if dataset.revision != "main" else "d" * 40
    file = cached(cache, "dataset", dataset.repo, commit) / dataset.files.replace("*", "0")
    file.parent.mkdir(exist_ok=True)
    texts = [start + words(i) + start for i in range(ROWS)]
    rows = pd.DataFrame({"question": texts, "instruction": texts} | dict.fromkeys(columns, texts))
    if file.suffix == ".json":
        rows.to_json(file, orient="records")
    else:
        rows.to_parquet(file)


def cache_demo_model(cache: Path, repo: str) -> None:
    """The embedded model under another name."""
    directory = cached(cache, "model", repo, "e" * 40)
    shutil.copytree(ROOT / "gradjax" / "demo" / "model", directory, dirs_exist_ok=True)


def cache_scorers(cache: Path) -> None:
    """A random GPT-2 and a random reward model."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaForSequenceClassification

    from tests.checkpoints import make_hf_model
    from tests.tokenizers import make_tokenizer

    directory = cached(cache, "model", "openai-community/gpt2", "f" * 40)
    torch.manual_seed(0)
    sizes = {"vocab_size": 317, "n_positions": 97, "n_embd": 20, "n_layer": 1, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(directory)
    make_tokenizer("qwen2").save_pretrained(directory)

    directory = cached(cache, "model", "sfairXC/FsfairX-LLaMA3-RM-v0.1", "f" * 40)
    config = make_hf_model("llama", vocab_size=317, num_hidden_layers=1).config
    config.num_labels, config.pad_token_id = 1, 0
    LlamaForSequenceClassification(config).float().save_pretrained(directory)
    make_tokenizer("llama").save_pretrained(directory)


def rate(prompt: str, _: int) -> Reply:
    """From 1 to 10, somehow."""
    return answer(json.dumps({"difficulty": sum(prompt.encode()) % 10 + 1}))


class Real:
    """A copy of the scripts with small groups, to be called on tiny models and data."""

    def __init__(self, folder: Path, chosen: str):
        self.repository = folder / "repository"
        self.here = folder / "here"
        self.cache = folder / "cache"
        for name in ("launch", "configs"):
            shutil.copytree(ROOT / name, self.repository / name)
        for name in ("pyproject.toml", "requirements.txt"):
            shutil.copy(ROOT / name, self.repository)
        self.here.mkdir()
        make_venv(folder / "venv", GRADJAX, self.repository)
        experiments = pd.read_csv(ROOT / "configs" / "paper.csv", dtype=str).query(chosen)
        file = self.repository / "configs" / "paper.csv"
        experiments.assign(n_per_group=SIZE).to_csv(file, index=False)
        self.environment = os.environ | {
            "VENV": str(folder / "venv"),
            "HF_HUB_CACHE": str(self.cache),
            "HF_HUB_OFFLINE": "1",
        }

    def run(self, *arguments: str, status: int = 0, **environment: str) -> SimpleNamespace:
        return call(
            self.repository,
            *arguments,
            status=status,
            cwd=self.here,
            env=self.environment | environment,
        )

    def run_of(self, name: str) -> Path:
        return self.here / "runs" / "paper" / "runs" / name


@pytest.mark.slow
def test_fast_and_slow_from_the_data_to_the_report(tmp_path: Path):
    real = Real(tmp_path, "number == '3'")
    cache_data(real.cache, "gsm8k_fast", "answer", start="#### ")
    cache_demo_model(real.cache, "Qwen/Qwen2.5-7B")
    real.run("--table=3", "--", "--layers=1")
    examples = pd.read_parquet(real.run_of("qwen2.5_7b_gsm8k_fast_slow") / "examples")
    assert examples.groupby("group").size().to_dict() == {"high": SIZE, "low": SIZE}
    assert (examples["status"] == "ok").all()
    pairs = examples.pivot(index="example_id", columns="group", values="instruction")
    assert (pairs["high"] == pairs["low"]).all()  # the same questions
    report = real.run_of("qwen2.5_7b_gsm8k_fast_slow") / "report_table_3"
    assert "2504.10766" in (report / "report.html").read_text()
    control = pd.read_csv(report / "length_control.csv")
    assert control["equal_length"].notna().all()
    again = real.run("--table=3", "--", "--layers=1")
    assert "is there" in again.err
    assert again.out == ""

    assert "high against low, beyond length: " in real.run("--summary").out
    summary = pd.read_csv(real.here / "runs/paper/summary/summary.csv")
    assert summary["run"].tolist() == ["runs/paper/runs/qwen2.5_7b_gsm8k_fast_slow"]
    assert (real.here / "runs/paper/summary/report.html").exists()


@pytest.mark.slow
def test_a_figure_with_data_prepared_by_hand(tmp_path: Path):
    real = Real(tmp_path, "kind == 'figure' and model in ('qwen2.5_7b', 'gemma2_2b')")
    cache_data(real.cache, "s1.1", "deepseek_thinking_trajectory", "deepseek_attempt")
    cache_demo_model(real.cache, "Qwen/Qwen2.5-7B")
    cache_demo_model(real.cache, "google/gemma-2-2b")
    figure = ("--figure=families", "--", "--layers=1")
    assert "gsm8k_r1 has to be fetched by hand" in real.run(*figure, status=1).err

    rows = [{"instruction": words(i), "output": words(i + 1)} for i in range(ROWS)]
    (tmp_path / "by_hand.json").write_text(json.dumps(rows))
    output = real.here / "runs/paper/data/gsm8k_r1.jsonl"
    command = [sys.executable, "-m", "gradjax.prepare", "--dataset=gsm8k_r1", f"--sample={SIZE}"]
    command += [f"--source={tmp_path / 'by_hand.json'}", f"--output={output}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    real.run(*figure)
    page = (real.here / "runs/paper/figures/families/report.html").read_text()
    assert "gemma2_2b" in page
    assert "qwen2.5_7b" in page


@pytest.mark.slow
def test_scored_experiments_from_the_data_to_the_report(tmp_path: Path):
    metrics = ("ifd_gpt2", "reward", "difficulty")
    real = Real(tmp_path, f"number == '21' and metric in {metrics}")
    cache_data(real.cache, "wizardlm", "output")
    cache_demo_model(real.cache, "Qwen/Qwen2.5-7B")
    cache_scorers(real.cache)
    with fake_endpoint(rate) as judge:
        keys = {"JUDGE_BASE_URL": judge.base_url, "OPENAI_API_KEY": "secret"}
        real.run("--table=21", "--", "--layers=1", **keys)
    assert judge.keys == {"secret"}
    assert len(judge.prompts) == ROWS
    for metric in metrics:
        run = real.run_of(f"qwen2.5_7b_wizardlm_{metric}")
        examples = pd.read_parquet(run / "examples")
        assert examples.groupby("group").size().to_dict() == {"high": SIZE, "low": SIZE}
        assert (run / "report_table_21" / "report.html").exists()

        column = metric.partition("_")[0]
        scores = pd.read_parquet(real.here / f"runs/paper/scores/wizardlm_{metric}/scores")
        usable = scores[scores[column] <= 1] if column == "ifd" else scores
        values = usable.set_index("row_hash")[column].sort_values()
        for group, expected in (("high", values[-SIZE:]), ("low", values[:SIZE])):
            chosen = values[examples[examples["group"] == group]["row_hash"]]
            assert sorted(chosen) == list(expected)
