"""The repository's own files: BUILD, the package, requirements, configs, launch/local.sh."""

import ast
import csv
import fnmatch
import functools
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable, Sequence
from importlib.metadata import packages_distributions
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import gradjax
from gradjax.checkpoints.resolve import REGISTRY
from gradjax.cli import spectra
from gradjax.cli.command import parse_flags
from gradjax.errors import _EXTRAS

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
        assert set(python_files("gradjax", "benchmarks", "tests", "launch")) <= listed

    def test_every_listed_file_exists(self):
        for name, target in build_targets().items():
            for file in [*target.srcs, *target.data]:
                assert (ROOT / file).is_file(), f"BUILD, {name}: there is no {file}"

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
        assert pypi_packages(targets["gradjax"]) == set(dependencies("all"))
        for target in targets.values():
            assert pypi_packages(target) <= set(requirements("requirements-test.txt"))
            assert {label[1:] for label in target.deps if label[0] == ":"} <= set(targets)


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def dependencies(*extras: str) -> dict[str, Requirement]:
    """What pyproject.toml lists, by canonical name, with the extras' own."""
    listed = list(PROJECT["project"]["dependencies"])
    for extra in extras:
        listed += PROJECT["project"]["optional-dependencies"][extra]
    found = {}
    for requirement in map(Requirement, listed):
        if requirement.name == "gradjax":
            found |= dependencies(*requirement.extras)
        else:
            found[canonicalize_name(requirement.name)] = requirement
    return found


def requirements(file: str) -> dict[str, Requirement]:
    """What a requirements file lists, by canonical name, with what it includes."""
    found: dict[str, Requirement] = {}
    for line in (ROOT / file).read_text().splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("-r "):
            found |= requirements(line.removeprefix("-r "))
        elif line.startswith("-e ."):
            found |= dependencies(*re.findall(r"\w+", line.removeprefix("-e .")))
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
    def test_the_package_imports_what_it_depends_on(self):
        by_others = {"gcsfs", "s3fs", "tabulate"}  # by fsspec for URLs, by pandas for Markdown
        assert imported_packages("gradjax") | by_others == set(dependencies("all"))

    def test_requirements_name_the_extras(self):
        assert requirements("requirements.txt") == dependencies("all")
        assert requirements("requirements-cuda.txt") == dependencies("all", "cuda")
        assert requirements("requirements-tpu.txt") == dependencies("all", "tpu")

    def test_a_missing_package_is_said_to_be_of_the_extra_that_has_it(self):
        core = set(dependencies())
        added = {
            (name, extra)
            for extra in ("report", "score", "data", "cloud")
            for name in set(dependencies(extra)) - core
        }
        assert set(_EXTRAS.items()) == added
        assert set(_EXTRAS) == set(dependencies("all")) - core

    def test_tests_and_benchmarks_import_what_test_requirements_list(self):
        listed = set(requirements("requirements-test.txt"))
        assert imported_packages("tests", "benchmarks") <= listed

    def test_the_lock_file_meets_the_requirements(self):
        locked = requirements("requirements_lock.txt")
        assert "gradjax" not in locked
        for name, requirement in requirements("requirements-test.txt").items():
            (pin,) = locked[name].specifier
            assert pin.operator == "=="
            assert pin.version in requirement.specifier, f"{name} in requirements_lock.txt"

    def test_bazel_has_the_same_version(self):
        assert f'version = "{gradjax.__version__}"' in (ROOT / "MODULE.bazel").read_text()


def build(source: Path, kind: str, output: Path) -> Path:
    """Builds a `wheel` or `sdist` of a folder, as pip does."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(output)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (built,) = output.iterdir()
    return built


def files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


class TestDockerfile:
    INSTRUCTIONS = re.findall(
        r"^([A-Z]+) +(.*)$", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE
    )
    COPIED = tuple(
        word for kind, rest in INSTRUCTIONS if kind == "COPY" for word in rest.split()[:-1]
    )

    def test_what_it_copies_is_all_that_the_build_sees(self):
        lines = (ROOT / ".dockerignore").read_text().splitlines()
        assert "*" in lines
        assert {line[1:] for line in lines if line[0] == "!"} == set(self.COPIED)

    @pytest.mark.parametrize(
        ("extra", "file"), [("", "requirements.txt"), ("cuda", "requirements-cuda.txt")]
    )
    def test_it_installs_what_the_requirements_say(self, extra: str, file: str):
        (command,) = [rest for _, rest in self.INSTRUCTIONS if rest.startswith("pip install")]
        shown = subprocess.run(
            ["sh", "-c", f"printf '%s ' {command}"],
            env={"EXTRA": extra},
            check=True,
            capture_output=True,
            text=True,
        )
        *_, installed = shown.stdout.split()
        assert f"-e {installed}" in (ROOT / file).read_text().splitlines()

    def test_it_runs_the_command_as_nobody_in_particular(self):
        last = dict(self.INSTRUCTIONS)
        assert ast.literal_eval(last["ENTRYPOINT"]) == list(PROJECT["project"]["scripts"])
        assert last["USER"] != "root"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of what the Dockerfile copies, and of nothing else."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "source").mkdir()
    for name in TestDockerfile.COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / "source" / name)
    return build(folder / "source", "wheel", folder / "wheel")


class TestPackage:
    def test_it_has_every_file_of_the_repository_that_it_needs(self, wheel: Path):
        expected = {
            str(path.relative_to(ROOT))
            for path in (ROOT / "gradjax").rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        for folder in ("configs", "launch"):
            expected |= {f"gradjax/{folder}/{path.name}" for path in (ROOT / folder).glob("*.*")}
        found = {name for name in files(wheel) if ".dist-info/" not in name}
        assert found == expected
        for pattern in ("demo/model/*", "report/*.html", "report/published/*.csv", "py.typed"):
            assert fnmatch.filter(found, f"gradjax/{pattern}")

    def test_the_source_distribution_makes_the_same_wheel(self, wheel: Path, tmp_path: Path):
        with tarfile.open(build(ROOT, "sdist", tmp_path / "sdist")) as archive:
            archive.extractall(tmp_path, filter="data")
        (source,) = tmp_path.glob("gradjax-*")
        assert {path.name for path in source.iterdir()} <= {
            *("gradjax", "configs", "launch", "pyproject.toml", "PKG-INFO", ".gitignore"),
            *("README.md", "LICENSE", "CHANGELOG.md"),
        }
        assert files(build(source, "wheel", tmp_path / "wheel")) == files(wheel)

    def test_it_says_what_it_is(self, wheel: Path):
        with zipfile.ZipFile(wheel) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
            (scripts,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
            metadata = archive.read(name).decode()
            assert "gradjax = gradjax.cli.app:main" in archive.read(scripts).decode()
        assert f"\nVersion: {gradjax.__version__}\n" in metadata
        assert "\nProject-URL: Paper, https://arxiv.org/abs/2504.10766\n" in metadata

    def test_it_runs_from_an_empty_folder_without_any_extra(self, wheel: Path, tmp_path: Path):
        site, here = tmp_path / "site", tmp_path / "here"
        here.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
        missing = f"import sys; sys.modules.update(dict.fromkeys({list(_EXTRAS)}))"
        (site / "sitecustomize.py").write_text(missing)

        def call(*command: str) -> str:
            result = subprocess.run(
                [sys.executable, "-P", *command],
                cwd=here,
                env=os.environ | {"PYTHONPATH": str(site)},
                capture_output=True,
                text=True,
            )
            assert result.returncode == 0, result.stderr
            return result.stdout

        where = "import gradjax.shipped as s; print(s.__file__, s.shipped('configs/paper.csv'))"
        package = site / "gradjax"
        assert call("-c", where).split() == [
            str(package / "shipped.py"),
            str(package / "configs" / "paper.csv"),
        ]
        assert "slow" in call("-m", "gradjax.main", "--limit=2")
        chosen = ("--scores=runs/demo", "--by=effective_rank", "--top=1")
        assert "The selection is in" in call("-m", "gradjax.select", *chosen)
        assert "wizardlm" in call("-m", "gradjax.prepare", "--list")


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
        assert f"gradjax spectra --flagfile=configs/{model}.flags" in header
        assert "Hardware: " in header
        with MODEL_SHAPES.open() as file:
            (parameters,) = [
                int(row["parameters"]) for row in csv.DictReader(file) if row["name"] == model
            ]
        assert f"{parameters * 4 / 2**30:.1f} GiB  weights: {parameters:,} parameters x 4" in header
        (total,) = re.findall(r"Memory: ([\d.]+) GiB, estimated", header)
        parts = re.findall(r"^#\s+([\d.]+) GiB  ", header, flags=re.MULTILINE)
        assert float(total) == pytest.approx(sum(map(float, parts)), abs=0.05 * len(parts))


def test_shellcheck_finds_nothing():
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert found, "install requirements-test.txt"
    scripts = [*(ROOT / "launch").glob("*.*"), ROOT / ".ci" / "run", ROOT / "tests" / "run.sh"]
    subprocess.run([found, "--external-sources", *scripts], cwd=ROOT, check=True)


# Stands in for a Python: venv copies it, pip "installs" what does not ask for the impossible, and
# makes of it the command `gradjax`, which prints its arguments.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
  "-c "*) exit {unusable} ;;
  --version) echo Python 3.{minor} ;;
  "-m pip --version") ;;
  "-m venv --clear "*) rm -rf "$4" && mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
  "-m pip install -r "*) if grep impossible "$5"; then exit 1; fi; cp "$0" "${{0%/*}}/gradjax" ;;
  spectra*) printf '<%s>' "$@" ;;
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
        (root / "pyproject.toml").write_text("")
        for name in ("requirements.txt", "requirements-cuda.txt"):
            (root / name).write_text("jax\n")
        return root

    def launch(self, repository: Path, python: Path, *arguments: str) -> Any:
        environment = {name: value for name, value in os.environ.items() if name != "VENV"}
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
        assert first.stdout == "<spectra><--model=a b><--limit=2>"
        assert f"making {venv}" in first.stderr
        assert "installing requirements.txt" in first.stderr

        second = self.launch(repository, python)
        assert (second.stdout, second.stderr) == ("<spectra>", "")

        repository = repository.rename(repository.with_name("moved"))
        venv, wanted = repository / ".venv", repository / "requirements.txt"
        assert "installing requirements.txt" in self.launch(repository, python).stderr
        assert self.launch(repository, python).stderr == ""

        for file in (wanted, repository / "pyproject.toml"):
            file.write_text("jax>=0.10.2\n")
            changed = self.launch(repository, python)
            assert "making" not in changed.stderr
            assert "installing requirements.txt" in changed.stderr

        wanted.write_text("jax>=0.11\n")
        (venv / "installing.log").touch()
        assert f"making {venv}" in self.launch(repository, python).stderr
        assert self.launch(repository, python).stderr == ""

    def test_cuda_is_installed_where_it_is_asked_for(self, repository: Path):
        python = fake_python(repository.parent / "python", minor=11)
        first = self.launch(repository, python, "--cuda", "--limit=2")
        assert first.stdout == "<spectra><--limit=2>"
        assert "installing requirements-cuda.txt" in first.stderr
        assert self.launch(repository, python, "--cuda").stderr == ""

    def test_an_installed_package_runs_where_it_is_installed(self, repository: Path):
        venv = repository.parent / "venv"
        package = venv / "lib" / "python3.11" / "site-packages" / "gradjax"
        shutil.copytree(repository / "launch", package / "launch")
        (venv / "bin").mkdir()
        fake_python(venv / "bin" / "gradjax", minor=11)
        result = self.launch(package, venv / "no-python", "--limit=2")
        assert (result.stdout, result.stderr) == ("<spectra><--limit=2>", "")
        assert not (package / ".venv").exists()

        for script in ("tpu_pod.sh", "gke_xpk.sh"):
            command = ["bash", package / "launch" / script, "run"]
            refused = subprocess.run(command, capture_output=True, text=True)
            assert refused.returncode == 1
            assert refused.stderr == (
                f"gradjax: launch/{script} sends a commit of gradjax's repository to other "
                f"machines, and {package} is an installed package; call it from a clone of the "
                f"repository: bash CLONE/launch/{script}.\n"
            )

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
