"""README, docs/ and CONTRIBUTING.md: paths exist, commands and flags are real, the site builds."""

import html
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gradjax
from gradjax.config import RunConfig
from gradjax.runs.run import run
from gradjax.storage.results import group_means

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gradjax"
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")],
    key=lambda page: str(page),
)
ARCHITECTURE = ROOT / "docs" / "architecture.md"
FILE = re.compile(r"(?<![\w./*{])(?:[\w.-]+/)*[\w.-]+\.(?:py|html|toml|csv|flags|sh|ipynb|yml)\b")
FOLDER = re.compile(r"`((?:[\w.-]+/)+)`")
EVERYWHERE = {"flagfile", "help", "version", "verbosity"}  # flags of all commands


def named_paths(text: str) -> set[str]:
    return {*FILE.findall(text), *FOLDER.findall(text)}


def found(path: str, *roots: Path) -> Path | None:
    return next((root / path for root in roots if (root / path).exists()), None)


class TestArchitecture:
    def test_every_path_exists(self):
        text = ARCHITECTURE.read_text(encoding="utf-8")
        paths = named_paths(text)
        assert {"runs/run.py", "docs/", "pyproject.toml", "report/page.html"} <= paths
        assert not [path for path in sorted(paths) if not found(path, PACKAGE, ROOT)]

    def test_every_room_and_module_is_named(self):
        paths = named_paths(ARCHITECTURE.read_text(encoding="utf-8"))
        named = {found(path, PACKAGE, ROOT) for path in paths}
        modules = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
        rooms = [path.parent for path in PACKAGE.glob("*/__init__.py")]
        missing = {path for path in [*modules, *rooms] if path not in named}
        assert not {str(path.relative_to(PACKAGE)) for path in missing}, f"not in {ARCHITECTURE}"

    def test_the_layers_are_those_of_the_contract(self):
        contract = (ROOT / "pyproject.toml").read_text().split("layers = [")[1].split("]")[0]
        text = ARCHITECTURE.read_text(encoding="utf-8")
        drawn = text.split("## Which way imports go")[1].split("```")[1].strip().splitlines()
        layers = [re.split(r"\s{2,}", line.strip())[0].split(" | ") for line in drawn]
        expected = [line.split(" | ") for line in re.findall(r'"(.+)"', contract)]
        assert [set(layer) for layer in layers] == [set(layer) for layer in expected]


def test_contributing_names_what_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths = named_paths(text)
    assert len(paths) > 50
    assert not [path for path in sorted(paths) if not found(path, ROOT)]
    tests = {str(path.relative_to(ROOT)) for path in ROOT.glob("tests/*_test.py")}
    assert not tests - paths, "say in CONTRIBUTING.md which change each test belongs to"


def test_names_in_contributing_are_in_the_files_beside_them():
    """`NAME` of `FILE`, `NAME` in `FILE`, and `FILE`: … `NAME`: the file has the name."""
    text = " ".join((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split())
    checked = 0
    for name, file in re.findall(r"`(\w+)` (?:of|in) `([\w/]+\.py)`", text):
        assert re.search(rf"\b{name}\b", (ROOT / file).read_text()), (name, file)
        checked += 1
    for file, name in re.findall(r"`([\w/]+\.py)`: (?:[^`.;]* in )?`(\w+)`", text):
        assert re.search(rf"\b{name}\b", (ROOT / file).read_text()), (name, file)
        checked += 1
    assert checked > 5


def test_the_readme_is_one_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target:
            assert (page.parent / target).is_file(), target


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built without a warning."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said = built.stdout + built.stderr
    assert built.returncode == 0, said
    assert "warning" not in said.lower(), said
    return folder


def helps(site: Path) -> dict[str, str]:
    """What --help of each command says, as the site shows it."""
    page = (site / "flags" / "index.html").read_text(encoding="utf-8")
    text = html.unescape(re.sub(r"<[^>]+>", "", page.replace("<h2", "\f<h2")))
    parts = [part.split(maxsplit=2) for part in text.split("\f")]
    return {part[1].rstrip("¶"): part[2] for part in parts if part and part[0] == "gradjax"}


def commands(text: str) -> list[str]:
    """What is called in a page: lines of its blocks, continued ones as one, and its code spans."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [*lines, *re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))]


def test_the_site_has_the_flags_of_every_command(site: Path):
    names = ("spectra", "score", "select", "report", "prepare", "convert", "export", "demo")
    assert set(helps(site)) == set(names)
    assert all("gradjax" in text and "--" in text for text in helps(site).values())


def test_commands_and_flags_are_real(site: Path):
    known = helps(site)
    checked = 0
    for page in PAGES:
        for command in commands(page.read_text(encoding="utf-8")):
            words = command.split(" #")[0].split()
            if words[:1] != ["gradjax"] or len(words) < 2 or not words[1].islower():
                continue
            assert words[1] in known, f"{page.name}: {command}"
            for flag in re.findall(r"(?<=\s)--(\w+)", command):
                shown = {f"--{flag}", f"--[no]{flag}", f"--[no]{flag.removeprefix('no')}"}
                real = flag in EVERYWHERE or any(
                    re.search(rf"{re.escape(one)}(?!\w)", known[words[1]]) for one in shown
                )
                assert real, f"{page.name}: {command}"
                checked += 1
    assert checked > 30


def test_modules_and_scripts_are_real():
    for page in PAGES:
        for command in commands(page.read_text(encoding="utf-8")):
            for module in re.findall(r"python -m ((?:gradjax|benchmarks)[\w.]*)", command):
                path = module.rstrip(".").replace(".", "/")
                files = [f"{path}.py", f"{path}/__main__.py"]
                assert any(found(file, ROOT) for file in files), f"{page.name}: {command}"
            for script in re.findall(r"(?:bash|sbatch .*?) ?\b((?:launch|tests)/[\w.]+)", command):
                assert found(script, ROOT), f"{page.name}: {command}"


def test_the_reference_has_the_public_names(site: Path):
    import gradjax

    page = (site / "reference" / "index.html").read_text(encoding="utf-8")
    functions = {"score": "score.run.score_rows", "select": "select.write.select_rows"}
    for name in gradjax.__all__:
        assert f'id="gradjax.{functions.get(name, name)}"' in page


def test_the_site_asks_nobody_else(site: Path):
    """No page loads a script, a style, a font or an image from elsewhere."""
    for file in site.rglob("*.html"):
        page = file.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|img|iframe)[^>]*\ssrc="?(?:https?:)?//', page), file
        assert not re.findall(r'<link[^>]*rel="?stylesheet"?[^>]*href="?(?:https?:)?//', page), file


def shown_table(page: str) -> dict[str, list[float]]:
    """The numbers of the embedded groups in a page's table, by group."""
    text = (ROOT / page).read_text(encoding="utf-8")
    rows = re.findall(r"^(slow|fast|corrupted) +([\d. ]+)$", text, re.MULTILINE)
    return {group: [float(number) for number in numbers.split()] for group, numbers in rows}


@pytest.mark.parametrize("page", ["README.md", "docs/demo.md"])
def test_the_title_of_the_first_picture_is_what_the_table_says(page: str):
    table = shown_table(page)
    slow, corrupted = sum(table["slow"][:4]), sum(table["corrupted"][:4])
    assert 45 < corrupted / slow < 55
    for file in (page, "docs/first_picture.svg"):
        words = " ".join((ROOT / file).read_text(encoding="utf-8").split())
        assert "wrong steps pull about 50 times harder on the weights" in words


@pytest.mark.slow
def test_table_and_first_picture_are_those_of_the_embedded_example(tmp_path: Path):
    directory = run(RunConfig(output_dir=tmp_path / "demo"))
    means = group_means(directory)
    for page in ("README.md", "docs/demo.md"):
        table = shown_table(page)
        assert list(table) == list(means.index)
        for group, numbers in table.items():
            assert numbers == pytest.approx(means.loc[group].tolist(), rel=0.01, abs=0.005)

    path = ROOT / "docs" / "first_picture.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    norm, rank = script.first_picture(gradjax.open_run(directory).spectra).axes
    for axes, columns in ((norm, slice(0, 4)), (rank, slice(4, 8))):
        for line, group in zip(axes.lines, ("slow", "corrupted"), strict=True):
            expected = sum(shown_table("README.md")[group][columns]) / 4
            assert line.get_ydata().mean() == pytest.approx(expected, rel=0.01)
