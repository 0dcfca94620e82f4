"""The command line: help, versions, misspelt words, flagfiles, and next steps that work."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from gradjax.cli import command as command_module
from gradjax.cli import demo, spectra
from gradjax.cli.app import COMMANDS, overview
from gradjax.cli.command import Command, command_line, help_text, parse_flags
from gradjax.config import RunConfig, SpectraConfig
from gradjax.demo import mixed, train
from gradjax.errors import GradjaxError, did_you_mean
from gradjax.score.config import ScoreConfig
from gradjax.storage.results import group_means
from gradjax.version import __version__

ROOT = Path(__file__).parent.parent
NAMES = ["spectra", "score", "select", "report", "prepare", "convert", "export", "demo"]
PROGRAMS = [*COMMANDS.values(), mixed.COMMAND, train.COMMAND]
# Where these cannot be imported, what a user asks for needs none of them.
WITHOUT = """
import sys
for name in sys.argv.pop(1).split(","):
    sys.modules[name] = None
from gradjax.cli.app import main
main()
"""


def call(*arguments: str, cwd: Path = ROOT, without: str = "") -> subprocess.CompletedProcess:
    program = ["-c", WITHOUT, without] if without else ["-m", "gradjax"]
    return subprocess.run(
        [sys.executable, *program, *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def refused(done: subprocess.CompletedProcess) -> str:
    """The one sentence of a command that ended with status 1."""
    assert (done.returncode, done.stdout) == (1, "")
    lines = done.stderr.splitlines()
    assert lines[-1].startswith("gradjax: ")
    assert "Traceback" not in done.stderr
    assert "FATAL" not in done.stderr
    return lines[-1]


class TestHelp:
    def test_the_commands_are_listed_with_a_line_each(self):
        assert list(COMMANDS) == NAMES
        listed = re.findall(r"^  (\w+)  +(.*)", overview(), re.MULTILINE)
        assert listed == [(name, command.summary) for name, command in COMMANDS.items()]
        assert max(map(len, overview().splitlines())) <= 80

    @pytest.mark.parametrize("command", PROGRAMS, ids=lambda command: command.name)
    def test_every_flag_is_explained_once(self, command: Command):
        shown = help_text(command)
        assert max(map(len, shown.splitlines())) <= 80
        assert shown.splitlines()[2] == f"  {command.examples[0]}"
        described = re.findall(r"^  --(?:\[no\])?(\w+)", shown, re.MULTILINE)
        everywhere = ["flagfile", "log_dir", "quiet", "version", "help"]
        assert sorted(described) == sorted([*command.flags, *everywhere])

    def test_choices_defaults_and_what_is_required_are_shown(self):
        shown = " ".join(help_text(spectra.COMMAND).split())
        assert "--truncation=right|drop|error rows beyond" in shown
        assert "--max_length=N tokens per row (default: 4096)" in shown
        assert "(default: q,k,v,o)" in shown
        assert "--[no]store_singular_values" in shown
        assert "<" not in shown
        assert help_text(COMMANDS["select"]).count("(required)") == 1

    @pytest.mark.parametrize(
        "arguments",
        [[], ["--help"], ["-h"], ["spectra", "--help"], ["report", "--run=x", "-h"]],
        ids=" ".join,
    )
    def test_help_is_printed_at_once(self, arguments: list[str]):
        done = call(*arguments, without="jax,pandas,pyarrow,matplotlib,scipy,huggingface_hub")
        assert (done.returncode, done.stderr) == (0, "")
        expected = help_text(COMMANDS[arguments[0]]) if arguments[1:] else overview()
        assert done.stdout == f"{expected}\n"

    @pytest.mark.parametrize("arguments", [["--version"], ["score", "--version"]], ids=" ".join)
    def test_version(self, arguments: list[str]):
        done = call(*arguments, without="jax")
        assert (done.returncode, done.stdout) == (0, f"gradjax {__version__}\n")

    @pytest.mark.parametrize(
        ("module", "name"),
        [
            *((n, n) for n in ("report", "score", "select", "prepare", "convert", "export")),
            ("main", "spectra"),
        ],
    )
    def test_other_names(self, module: str, name: str):
        command = [sys.executable, "-m", f"gradjax.{module}", "-h"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout == f"{help_text(COMMANDS[name])}\n"


class TestFaults:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("spectr", "spectr is not a command (did you mean spectra?)"),
            ("--limit=3", "--limit=3 stands before a command; expected gradjax COMMAND"),
            ("--verison", "--verison stands before a command (did you mean --version?)"),
            (
                "spectra --modle=x",
                "--modle is not a flag of gradjax spectra (did you mean --model?)",
            ),
            ("spectra --nooverwrit", "(did you mean --nooverwrite?)"),
            ("spectra --limit=few", "--limit=few: expected an integer"),
            ("spectra --overwrite=so", "--overwrite=so: expected true or false"),
            ("spectra --data", "--data has no value; expected --data=VALUE"),
            ("spectra --dtype=float23", "float32, bfloat16 (did you mean float32?)"),
            ("spectra rows.json", "unexpected argument 'rows.json'; expected flags only"),
            ("spectra --flagfile=configs/none.flags", "--flagfile=configs/none.flags: there is no"),
            ("spectra --data=rows.json", "--data=rows.json: no --model is given"),
            ("report --run=x --by=layers", "projection, layer, example (did you mean layer?)"),
            ("score --data=x --metrics=rewards", "(did you mean reward?)"),
            ("convert", "--model and --output must be given; gradjax convert --help"),
            ("prepare --sample=0", "--sample=0: expected a positive integer"),
        ],
    )
    def test_each_is_one_sentence_said_at_once(self, arguments: str, message: str):
        assert message in refused(call(*arguments.split(), without="jax"))

    @pytest.mark.parametrize("arguments", ["--help", "spectra --help", "prepare --list"])
    def test_a_reader_that_left_is_no_fault(self, arguments: str):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(
            [sys.executable, "-m", "gradjax", *arguments.split()],
            cwd=ROOT,
            stdout=writer,
            stderr=subprocess.PIPE,
        )
        os.close(writer)
        assert (done.returncode, done.stderr) == (1, b"")

    def test_the_nearest_name_is_meant_and_a_far_one_is_not(self):
        assert did_you_mean("Slwo", ["slow", "fast"]) == " (did you mean slow?)"
        assert did_you_mean("gemma2-2B", ["gemma2_2b"]) == " (did you mean gemma2_2b?)"
        assert did_you_mean("anything", ["slow", "fast"]) == ""

    def test_a_metric_of_a_run_is_meant_where_there_is_a_run(self):
        with pytest.raises(GradjaxError, match=r"did you mean effective_rank\?"):
            ScoreConfig(metrics=("efective_rank",), run="runs/x")

    @pytest.mark.parametrize(
        ("missing", "extra"), [("statsmodels", "report"), ("matplotlib", "report")]
    )
    def test_a_missing_extra_is_named(self, missing: str, extra: str):
        said = refused(call("report", "--run=x", without=missing))
        assert said.endswith(f"pip install 'gradjax[{extra}]'")
        assert missing in said

    def test_the_data_sets_are_listed_without_any_extra(self):
        done = call("prepare", "--list", without="tabulate,jax,pandas,huggingface_hub")
        assert (done.returncode, done.stderr) == (0, "")
        assert re.search(r"^wizardlm +repository +WizardLMTeam/", done.stdout, re.MULTILINE)


def config_of(*arguments: str):
    spectra.FLAGS.unparse_flags()
    assert parse_flags(["gradjax", *arguments], spectra.FLAGS) == ["gradjax"]
    return spectra.run_config()


class TestSpectraFlags:
    def test_a_shipped_flagfile_is_found_from_any_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        name = "configs/qwen2.5_1.5b.flags"
        for given in ([f"--flagfile={name}"], ["--flagfile", name]):
            assert config_of(*given, "--data=a.json").model == "qwen2.5_1.5b"
        # One that stands here comes first.
        (tmp_path / "configs").mkdir()
        (tmp_path / name).write_text("--model=llama3.2_1b\n--verbosity=0\n")
        assert config_of(f"--flagfile={name}").model == "llama3.2_1b"

    def test_model_and_data_are_embedded_unless_data_are_given(self):
        assert (config_of().model, config_of().data) == ("demo", ("demo",))
        assert config_of("--model=gemma2_2b").data == ("demo",)
        assert config_of("--data=demo").model == "demo"
        assert config_of("--data=a.json", "--model=demo").data == ("a.json",)
        with pytest.raises(GradjaxError, match=r"--data=g=a\.json: no --model is given"):
            config_of("--data=demo", "--data=g=a.json")


class TestNextSteps:
    def test_a_printed_command_works_from_another_folder(self, tmp_path):
        here, there = tmp_path / "it's here", tmp_path / "there"
        here.mkdir()
        there.mkdir()
        rows = [{"instruction": f"{i} + 3?", "output": f"The answer is {i + 3}."} for i in range(4)]
        (here / "a.json").write_text(json.dumps(rows))
        flags = ["--model=demo", "--layers=0", "--output_dir=a run"]
        # Without statsmodels there is no comparison, and all else.
        flags += ["--data=a.json", "--data=b=a.json"]
        done = call("spectra", *flags, cwd=here, without="statsmodels")
        assert done.returncode == 0, done.stderr
        assert "The groups are not compared: this needs statsmodels" in done.stdout
        assert "pip install 'gradjax[report]'" in done.stdout
        (line,) = re.findall("Tables, figures and verdicts: (.*)", done.stdout)
        environment = {
            k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")
        }
        subprocess.run(line, shell=True, cwd=there, env=environment, check=True)
        assert (here / "a run" / "report" / "report.html").is_file()

    @pytest.mark.parametrize(
        ("installed", "on_path", "script", "expected"),
        [
            (True, True, True, "gradjax"),
            (True, False, True, "'/my venv/bin/gradjax'"),
            (True, False, False, "'/my venv/bin/python' -P -m gradjax"),
            (False, True, True, f"PYTHONPATH={ROOT} '/my venv/bin/python' -P -m gradjax"),
        ],
    )
    def test_the_program_is_called_as_it_can_be(
        self, monkeypatch, installed: bool, on_path: bool, script: bool, expected: str
    ):
        monkeypatch.setattr(sys, "executable", "/my venv/bin/python")
        monkeypatch.setattr(command_module, "_is_installed", lambda: installed)
        beside = "/my venv/bin/gradjax"
        which = beside if on_path else "/elsewhere/gradjax"
        monkeypatch.setattr(command_module.shutil, "which", lambda _: which)
        monkeypatch.setattr(Path, "is_file", lambda path: script and str(path) == beside)
        command_module._program.cache_clear()
        line = command_line("select", scores=Path("/a b"), data="s3://x/y", by="m*2", top="10%")
        command_module._program.cache_clear()
        assert line == f"{expected} select '--scores=/a b' --data=s3://x/y '--by=m*2' --top=10%"


def test_quiet_says_warnings_only_and_log_dir_writes_all(tmp_path):
    arguments = ["spectra", "--limit=1", f"--output_dir={tmp_path}/run"]
    loud = call(*arguments, f"--log_dir={tmp_path}/logs/deep")
    assert loud.returncode == 0
    (log,) = tmp_path.glob("logs/deep/gradjax-spectra.*.log.INFO.*")
    for said in ("3 rows: 0 finished before, 3 to compute", "3 of 3 rows, 100 %"):
        assert said in log.read_text()
        assert said in loud.stderr
    quiet = call(*arguments, "--overwrite", "--quiet")
    assert quiet.returncode == 0
    assert quiet.stderr == ""
    assert quiet.stdout == loud.stdout
    assert "--log_dir=/proc/x cannot be written" in refused(call(*arguments, "--log_dir=/proc/x"))


def test_json_is_the_table_and_the_comparison(tmp_path):
    rows = [{"instruction": f"{n} + 3 = ?", "output": f"{n + 3}"} for n in range(9)]
    for name, some in (("high", rows[:4]), ("low", rows[4:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(some))
    data = [f"--data={tmp_path}/{name}.json" for name in ("high", "low")]
    flags = ["--model=demo", *data, "--layers=3", f"--output_dir={tmp_path}/run", "--json"]
    done = call("spectra", *flags)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["directory"] == f"{tmp_path}/run"
    assert said["rows_to_come"] == 0
    assert {group: of["rows"] for group, of in said["groups"].items()} == {
        "high": {"used": 4, "not_used": 0},
        "low": {"used": 5, "not_used": 0},
    }
    table = group_means(tmp_path / "run")
    for group, of in said["groups"].items():
        assert of["loss"] == table.loc[group, ("loss", "")]
        for measure in ("nuclear_norm", "effective_rank"):
            expected = {p: table.loc[group, (measure, p)] for p in "qkvo"}
            assert of[measure] == expected
    comparison = {(row["statistic"], row["projection"]): row for row in said["comparison"]}
    assert comparison["effective_rank", "all"]["comparison"] == "high:low"
    assert comparison["effective_rank", "all"]["beyond_length"] in (
        "yes",
        "negligible",
        "no",
        "undecided",
    )
    assert "--plan has none" in refused(call("spectra", "--json", "--plan"))


def test_the_demo_ends_with_verdicts_and_a_page(tmp_path, monkeypatch, capsys, caplog):
    small = {"limit": 16, "spectra": SpectraConfig(layers="3")}
    monkeypatch.setattr(demo, "RunConfig", partial(RunConfig, **small))
    parse_flags(["gradjax", f"--output_dir={tmp_path}/d"], demo.FLAGS)
    demo.main()
    said = capsys.readouterr().out
    assert re.search(r"^slow +0\.0", said, re.MULTILINE)
    # By the first tokens, of which all responses have as many.
    assert "slow against fast, beyond length: nuclear norm yes, smaller in slow" in said
    assert "By the first 5 target tokens of the 16 and 16 responses" in said
    page = tmp_path / "d" / "report" / "report.html"
    assert page.is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"d", "d_5_tokens"}
    page.unlink()
    # Once more, where the report's packages are not installed.
    monkeypatch.delitem(sys.modules, "gradjax.report.write")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    caplog.set_level("INFO", "absl")
    demo.main()
    assert caplog.text.count("48 finished before, 0 to compute") == 2
    assert "pip install 'gradjax[report]'" in capsys.readouterr().out
    assert not page.exists()
