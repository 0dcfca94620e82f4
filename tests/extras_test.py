"""Without an extra of the package: what it is for says in one sentence how to install it."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from gradjax.errors import _EXTRAS, missing_extra

ROOT = Path(__file__).parent.parent
# Where every extra is missing. In a process of its own, since this one may have imported them.
MISSING = f"import sys; sys.modules.update(dict.fromkeys({list(_EXTRAS)}))\n"
# Runs the programs of standard input, a line of JSON each, and prints what each one raised.
RUN = """
import json, traceback
import gradjax
for line in sys.stdin:
    said = "nothing was raised"
    try:
        exec(json.loads(line), {})
    except gradjax.GradjaxError as error:
        said = str(error)
    except BaseException:
        said = traceback.format_exc()
    print(json.dumps(said))
"""
OPEN = "import gradjax; gradjax.open_run({!r})"
READ = "from gradjax.data.sources import *; list(read_rows(parse_data_flags([{!r}])[0], 1))"
CALLS = {
    "a comparison": ("statsmodels", "from gradjax.api import Run; Run('', {}).compare('a', 'b')"),
    "a run in S3": ("s3fs", OPEN.format("s3://bucket/run")),
    "a run in Google Cloud": ("gcsfs", OPEN.format("gs://bucket/run")),
    "a model in Google Cloud": ("gcsfs", "import gradjax; gradjax.load_model('gs://bucket/model')"),
    "a model for S3": (
        "s3fs",
        "from gradjax.checkpoints.pretrained import convert; convert('demo', 's3://bucket/model')",
    ),
    "a saved data set": ("datasets", READ.format("saved")),
    "a data set of the Hub": ("datasets", READ.format("organization/rows")),
    "a judge": (
        "openai",
        "from gradjax.score.config import *; from gradjax.score.metrics import *; "
        "make_judge(ScoreConfig(metrics=('instag',), data=('demo',), judge_model='m'))",
    ),
}


def sentence(package: str) -> str:
    return (
        f"this needs {package}, which is not installed; install it with "
        f"{sys.executable} -m pip install 'gradjax[{_EXTRAS[package]}]'"
    )


def python(
    *arguments: str, here: Path, programs: Sequence[str] = ()
) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=here,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        input="".join(json.dumps(program) + "\n" for program in programs),
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    here = tmp_path_factory.mktemp("here")
    (here / "saved").mkdir()
    (here / "saved" / "state.json").write_text("{}")
    programs = [program for _, program in CALLS.values()]
    result = python("-c", MISSING + RUN, here=here, programs=programs)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(lines) == len(CALLS), result.stderr
    return dict(zip(CALLS, lines, strict=True))


@pytest.mark.parametrize("what", CALLS)
def test_what_needs_an_extra_says_so(said: dict[str, str], what: str):
    package, _ = CALLS[what]
    assert said[what] == sentence(package)


@pytest.mark.parametrize(
    "command", [["report", "--run=runs/demo"], ["score", "--metrics=instag", "--judge_model=m"]]
)
def test_a_command_ends_with_the_sentence(tmp_path: Path, command: list[str]):
    program = f"import runpy; runpy.run_module('gradjax.{command[0]}', run_name='__main__')"
    data = ["--data=demo"] if command[0] == "score" else []
    result = python("-c", MISSING + program, *command[1:], *data, here=tmp_path)
    assert result.returncode == 1
    assert result.stdout == ""
    package = {"report": "matplotlib", "score": "openai"}[command[0]]
    assert result.stderr == f"gradjax: {sentence(package)}\n"


def test_other_packages_that_are_missing_are_no_extra():
    assert missing_extra(ImportError("no such thing", name="numpy")) is None
    assert missing_extra(ImportError("no such thing")) is None
