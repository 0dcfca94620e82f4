"""The repository's own files: BUILD, configs, requirements and the scripts that start things."""

import ast
import csv
import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import packages_distributions
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from gradjax.checkpoints.resolve import REGISTRY
from gradjax.cli import spectra
from gradjax.cli.command import parse_flags

ROOT = Path(__file__).parent.parent
MODEL_SHAPES = ROOT / "tests" / "data" / "model_shapes.csv"
PAPER_MODELS = {
    *("qwen2.5_1.5b", "qwen2.5_3b", "qwen2.5_7b", "qwen2.5_14b"),
    *("llama3.1_8b", "llama3.2_1b", "llama3.2_3b", "gemma2_2b", "gemma2_9b"),
}


def python_files(*directories: str) -> list[str]:
    """Paths of the Python files in the repository's directories, relative to it."""
    files = (path for directory in directories for path in (ROOT / directory).rglob("*.py"))
    return sorted(str(path.relative_to(ROOT)) for path in files)


@functools.cache
def build_targets() -> dict[str, SimpleNamespace]:
    """BUILD's targets by name. Starlark is Python here: the rules become functions that note."""
    targets: dict[str, SimpleNamespace] = {}

    def rule(kind: str) -> Callable[..., None]:
        def declare(name: str, **attributes: Any) -> None:
            assert name not in targets
            targets[name] = SimpleNamespace(**{"kind": kind, "data": []} | attributes)

        return declare

    def glob(include: Sequence[str], exclude: Sequence[str] = ()) -> list[str]:
        def files(patterns: Sequence[str]) -> set[str]:
            paths = (path for pattern in patterns for path in ROOT.glob(pattern))
            return {str(path.relative_to(ROOT)) for path in paths if path.is_file()}

        return sorted(files(include) - files(exclude))

    def load(_: str, *names: str) -> None:
        scope.update({name: rule(name) for name in names})

    def ignore(*_: Any, **__: Any) -> None: ...

    scope: dict[str, Any] = {"load": load, "glob": glob}
    scope |= dict.fromkeys(("package", "licenses", "exports_files"), ignore)
    exec((ROOT / "BUILD").read_text(), scope)
    return targets


def targets_of(kind: str) -> list[SimpleNamespace]:
    return [target for target in build_targets().values() if target.kind == kind]


def pypi_packages(target: SimpleNamespace) -> set[str]:
    """Canonical names of the distributions that a target depends on."""
    labels = [label for label in target.deps if not label.startswith(":")]
    return {canonicalize_name(label.removeprefix("@pypi//")) for label in labels}


class TestBuild:
    def test_every_python_file_is_in_a_target(self):
        listed = {source for target in build_targets().values() for source in target.srcs}
        missing = set(python_files("gradjax", "benchmarks", "tests", "launch")) - listed
        assert not missing, "put the NAME of each tests/NAME_test.py into TESTS in BUILD"

    def test_every_listed_file_exists(self):
        for name, target in build_targets().items():
            for file in [*target.srcs, *target.data]:
                assert (ROOT / file).is_file(), f"BUILD, {name}: there is no {file}"

    def test_every_test_file_is_run_by_one_test(self):
        run = []
        for target in targets_of("py_test"):
            (file,) = re.findall(r"\$\(rootpath (.*)\)", *target.args)
            assert {file, target.main} == set(target.srcs)
            run.append(file)
        assert sorted(run) == [f for f in python_files("tests") if f.endswith("_test.py")]

    def test_every_program_has_a_binary(self):
        programs = [
            file
            for file in python_files("gradjax", "benchmarks")
            if 'if __name__ == "__main__"' in (ROOT / file).read_text()
        ]
        binaries = targets_of("py_binary")
        assert sorted(source for binary in binaries for source in binary.srcs) == programs

    def test_dependencies_are_targets_and_requirements(self):
        targets = build_targets()
        assert pypi_packages(targets["gradjax"]) == set(requirements("requirements.txt"))
        for target in targets.values():
            assert pypi_packages(target) <= set(requirements("requirements-test.txt"))
            assert {label[1:] for label in target.deps if label[0] == ":"} <= set(targets)


def requirements(file: str) -> dict[str, Requirement]:
    """What a requirements file lists, by canonical name, with what it includes."""
    found: dict[str, Requirement] = {}
    for line in (ROOT / file).read_text().splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("-r "):
            found |= requirements(line.removeprefix("-r "))
        elif line:
            requirement = Requirement(line)
            found[canonicalize_name(requirement.name)] = requirement
    return found


def imported_packages(*directories: str) -> set[str]:
    """Canonical names of the distributions that the repository's directories import."""
    modules: set[str] = set()
    for file in python_files(*directories):
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if isinstance(node, ast.Import):
                modules.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules.add(node.module.partition(".")[0])
    modules -= {"gradjax", "tests", "benchmarks", *sys.stdlib_module_names}
    distributions = packages_distributions()
    return {canonicalize_name(name) for module in modules for name in distributions[module][:1]}


class TestRequirements:
    def test_the_package_imports_what_requirements_list(self):
        listed = set(requirements("requirements.txt"))
        by_others = {"gcsfs", "s3fs", "tabulate"}  # by fsspec for URLs, by pandas for Markdown
        assert imported_packages("gradjax") | by_others == listed

    def test_tests_and_benchmarks_import_what_test_requirements_list(self):
        listed = set(requirements("requirements-test.txt"))
        assert imported_packages("tests", "benchmarks") <= listed

    def test_the_lock_file_meets_the_requirements(self):
        locked = requirements("requirements_lock.txt")
        for name, requirement in requirements("requirements-test.txt").items():
            (pin,) = locked[name].specifier
            assert pin.operator == "=="
            assert pin.version in requirement.specifier, f"{name} in requirements_lock.txt"


class TestConfigs:
    def test_each_is_the_setting_of_the_paper(self):
        files = sorted((ROOT / "configs").glob("*.flags"))
        assert {file.stem for file in files} == PAPER_MODELS
        for file in files:
            spectra.FLAGS.unparse_flags()
            parse_flags(["gradjax", f"--flagfile={file}"], spectra.FLAGS)
            config = spectra.run_config()
            assert config.model == file.stem
            assert file.stem in REGISTRY
            assert config.dtype == "float32"
            assert config.tokens.prompt_format == "plain"
            assert config.tokens.max_length == 4096

    @pytest.mark.parametrize("model", sorted(PAPER_MODELS))
    def test_each_header_gives_command_hardware_and_memory(self, model: str):
        header = (ROOT / "configs" / f"{model}.flags").read_text()
        assert f"python -m gradjax.main --flagfile=configs/{model}.flags" in header
        assert "Hardware: " in header
        with MODEL_SHAPES.open() as file:
            (parameters,) = [
                int(row["parameters"]) for row in csv.DictReader(file) if row["name"] == model
            ]
        assert f"{parameters * 4 / 2**30:.1f} GiB  weights: {parameters:,} parameters x 4" in header
        (total,) = re.findall(r"Memory: ([\d.]+) GiB, estimated", header)
        parts = re.findall(r"^#\s+([\d.]+) GiB  ", header, flags=re.MULTILINE)
        assert float(total) == pytest.approx(sum(map(float, parts)), abs=0.05 * len(parts))


SCRIPTS = [".ci/run", "launch/environment.sh", "launch/local.sh", "tests/run.sh"]


def test_shellcheck_finds_nothing():
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert found, "install requirements-test.txt"
    subprocess.run([found, "--external-sources", *SCRIPTS], cwd=ROOT, check=True)


# Stands in for a Python: venv copies it, pip "installs" what does not ask for the impossible,
# and gradjax.main prints its arguments.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
  "-c "*) exit {unusable} ;;
  --version) echo Python 3.{minor} ;;
  "-m pip --version") ;;
  "-m venv --clear "*) rm -rf "$4" && mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
  "-m pip install -r "*) if grep impossible "$5"; then exit 1; fi ;;
  "-P -m gradjax.main"*) shift 3; printf '<%s>' "$PYTHONPATH" "$@" ;;
  *) echo "unexpected: $*" >&2; exit 2 ;;
esac
"""


def fake_python(path: Path, *, minor: int) -> Path:
    path.write_text(FAKE_PYTHON.format(minor=minor, unusable=int(minor < 11)))
    path.chmod(0o755)
    return path


class TestLocalScript:
    """launch/local.sh beside other requirements, under a Python that only pretends."""

    @pytest.fixture
    def repository(self, tmp_path: Path) -> Path:
        root = tmp_path / "a repository"
        shutil.copytree(ROOT / "launch", root / "launch")
        (root / "requirements.txt").write_text("jax\n")
        return root

    def launch(self, repository: Path, python: Path, *arguments: str) -> Any:
        environment = {k: v for k, v in os.environ.items() if k not in ("VENV", "PYTHONPATH")}
        return subprocess.run(
            ["bash", repository / "launch" / "local.sh", *arguments],
            cwd=repository.parent,
            env=environment | {"PYTHON": str(python)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    def test_installs_what_is_new_changed_or_interrupted(self, repository: Path):
        python = fake_python(repository.parent / "python", minor=11)
        venv, wanted = repository / ".venv", repository / "requirements.txt"

        first = self.launch(repository, python, "--model=a b", "--limit=2")
        assert first.stdout == f"<{repository}><--model=a b><--limit=2>"
        assert f"making {venv}" in first.stderr
        assert "installing requirements.txt" in first.stderr

        second = self.launch(repository, python)
        assert (second.stdout, second.stderr) == (f"<{repository}>", "")

        wanted.write_text("jax>=0.10.2\n")
        changed = self.launch(repository, python)
        assert "making" not in changed.stderr
        assert "installing requirements.txt" in changed.stderr

        wanted.write_text("jax>=0.11\n")
        (venv / "installing.log").touch()
        assert f"making {venv}" in self.launch(repository, python).stderr
        assert self.launch(repository, python).stderr == ""

    def test_an_installation_that_fails_is_tried_again(self, repository: Path):
        python = fake_python(repository.parent / "python", minor=12)
        (repository / "requirements.txt").write_text("impossible\n")
        for _ in range(2):
            failed = self.launch(repository, python)
            assert (failed.returncode, failed.stdout) == (1, "")
            assert "impossible\ngradjax: pip could not install requirements.txt" in failed.stderr
        (repository / "requirements.txt").write_text("jax\n")
        assert self.launch(repository, python).returncode == 0

    def test_says_which_python_it_found(self, repository: Path, tmp_path: Path):
        old = fake_python(tmp_path / "python3.10", minor=10)
        for python, found in ((old, "Python 3.10"), (tmp_path / "none", "does not run")):
            result = self.launch(repository, python)
            assert result.returncode == 1
            assert f"found {python} ({found}) where Python 3.11 or newer" in result.stderr
            assert not (repository / ".venv").exists()
