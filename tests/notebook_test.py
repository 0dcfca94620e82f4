"""docs/embedded.ipynb: it runs, what it shows is in the store, and what is kept of it is true."""

import base64
import dataclasses
import re
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode
from scipy import stats

import gradjax
from gradjax.api import Run

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs" / "embedded.ipynb"
ABSOLUTE_PATH = re.compile(r"(?<![\w.<:/])/\w[\w.-]*/\w|[A-Z]:\\\w")
KEY = ["group", "example_id"]


def read_notebook() -> NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@dataclasses.dataclass(frozen=True)
class Executed:
    """The notebook after its execution, and the two runs that it made."""

    notebook: NotebookNode
    whole: Run
    cut: Run

    def texts(self, cell_id: str) -> list[str]:
        (cell,) = [cell for cell in self.notebook.cells if cell.id == cell_id]
        return texts(cell)


def texts(cell: NotebookNode) -> list[str]:
    """What a cell prints and shows, as text; a library's warnings are not among it."""
    return [
        output.text if output.output_type == "stream" else output.data["text/plain"]
        for output in cell.outputs
        if output.get("name") != "stderr"
    ]


def words(cell: NotebookNode) -> list[str]:
    """Of what a cell prints and shows, also where it is shown as HTML."""
    data = [output.get("data", {}) for output in cell.outputs]
    pages = [re.sub("<[^>]*>", " ", one["text/html"]) for one in data if "text/html" in one]
    return " ".join([*texts(cell), *pages]).split()


def frame(text: str) -> dict[str, dict[str, str]]:
    """A frame as it was printed: {label: {column: word}}, empty cells at lines' ends left out."""
    (_, *columns), *rows = map(str.split, text.splitlines())
    return {label: dict(zip(columns, cells, strict=False)) for label, *cells in rows}


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Executed:
    """Executes the notebook in an empty folder, without anyone's Jupyter settings."""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = read_notebook()
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(ROOT))
        environment.setenv("TMPDIR", str(folder))
        for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
            environment.setenv(name, str(folder / name))
        with client.setup_kernel():
            for number, cell in enumerate(notebook.cells):
                client.execute_cell(cell, number)
            stores = {path.parent.name: path.parent for path in folder.glob("*/*/run.json")}
            whole, cut = (gradjax.open_run(stores[name]) for name in ("whole", "cut"))
            # Read now: the stores are removed with the kernel.
            assert all(len(run.examples) and len(run.spectra) for run in (whole, cut))
    return Executed(notebook, whole, cut)


def example_values(run: Run, statistic: str, projection: str) -> pd.Series:
    """Per example, from its singular values alone: the mean over layers, and over projections."""

    def measure(values: np.ndarray) -> float:
        if statistic == "nuclear_norm":
            return float(values.sum(dtype=np.float64))
        shares = values[values > 0].astype(np.float64)
        return float(np.exp(stats.entropy(shares)))

    spectra = run.spectra
    if projection != "all":
        spectra = spectra[spectra["projection"] == projection]
    return spectra["singular_values"].map(measure).groupby([spectra[k] for k in KEY]).mean()


def almost(value: float):
    return pytest.approx(value, rel=0.01)  # three digits are shown


@pytest.mark.slow
def test_every_cell_runs(executed: Executed):
    cells = code_cells(executed.notebook)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    assert all(output.output_type != "error" for cell in cells for output in cell.outputs)


@pytest.mark.slow
def test_what_is_kept_is_what_the_code_gives(executed: Executed):
    for kept, ran in zip(code_cells(read_notebook()), code_cells(executed.notebook), strict=True):
        assert words(kept), f"cell {kept.id} was kept without its outputs"
        for ours, theirs in zip(words(kept), words(ran), strict=True):
            assert ours == theirs or float(ours) == almost(float(theirs)), kept.id
        shown = [[sorted(o.data) for o in cell.outputs if "data" in o] for cell in (kept, ran)]
        assert shown[0] == shown[1]
        assert kept.execution_count == ran.execution_count


def test_what_is_kept_is_small_and_of_no_machine():
    notebook = read_notebook()
    nbformat.validate(notebook)
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}
    for cell in code_cells(notebook):
        for output in cell.outputs:
            assert output.get("name") != "stderr"
            data = dict(output.get("data", {"text": output.get("text")}))
            image = base64.b64decode(data.pop("image/png", ""))
            assert len(image) < 100_000
            for shown in (cell.source, *data.values()):
                assert not ABSOLUTE_PATH.search(shown), shown


def test_absolute_paths_are_found():
    for path in ("/home/me/x", "file at '/tmp/abc/d'", "C:\\Users", "in /usr/lib/python3"):
        assert ABSOLUTE_PATH.search(path)
    for text in ("docs/embedded.ipynb", "<td>1</td></tr>", "R / min(T, m, n)", "https://a.b/c/d"):
        assert not ABSOLUTE_PATH.search(text)


@pytest.mark.slow
def test_group_means_are_those_of_the_singular_values(executed: Executed):
    (text,) = executed.texts("means")
    printed = {label: numbers for label, *numbers in map(str.split, text.splitlines())}
    columns = [(s, p) for s in ("effective_rank", "nuclear_norm") for p in "qkvo"]
    for group in ("slow", "fast", "corrupted"):
        expected = [example_values(executed.whole, *c)[group].mean() for c in columns]
        assert [float(number) for number in printed[group]] == [almost(e) for e in expected]


@pytest.mark.slow
@pytest.mark.parametrize("low", ["corrupted", "fast"])
@pytest.mark.parametrize("statistic", ["nuclear_norm", "effective_rank"])
def test_gap_and_auroc_are_the_stores(executed: Executed, low: str, statistic: str):
    rows = frame(executed.texts(low)[0])
    printed = {label: cells[statistic] for label, cells in rows.items() if cells}
    values = example_values(executed.whole, statistic, "all")
    ours, theirs = values["slow"].to_numpy(), values[low].to_numpy()
    larger = (ours[:, None] > theirs).mean()
    assert float(printed["gap"]) == almost(ours.mean() - theirs.mean())
    assert float(printed["auroc"]) == almost(larger)
    if low == "corrupted":
        assert float(printed["n_high"]) == len(ours) == float(printed["n_low"]) == len(theirs)
        assert float(printed["mean_high"]) == almost(ours.mean())
        assert float(printed["mean_low"]) == almost(theirs.mean())
        assert float(printed["cliffs_delta"]) == almost(2 * larger - 1)


def lengths(run: Run, group: str) -> list[int]:
    chosen = run.examples[run.examples["group"] == group]
    return sorted(chosen["num_target_tokens"])


def assert_verdicts(text: str, run: Run, low: str) -> None:
    """The printed verdicts are those of a paired t-test on logarithms.

    But where p is so close to the level that the adjustment for other verdicts may decide.
    """
    printed = frame(text)
    for statistic in ("nuclear_norm", "effective_rank"):
        for projection in ("all", *"qkvo"):
            values = example_values(run, statistic, projection).map(np.log)
            ours, theirs = values["slow"].to_numpy(), values[low].to_numpy()
            test: Any = stats.ttest_rel(ours, theirs)
            if not 1e-4 < test.pvalue < 0.01:
                expected = {"yes"} if test.pvalue < 0.01 else {"no", "undecided"}
                assert printed[statistic][projection] in expected


@pytest.mark.slow
def test_slow_and_corrupted_differ_at_equal_length(executed: Executed):
    slow = lengths(executed.whole, "slow")
    assert slow == lengths(executed.whole, "corrupted")
    statistics, verdicts = executed.texts("corrupted")
    printed = frame(statistics)
    assert set(printed["matched_pairs"].values()) == {str(len(slow))}
    assert set(printed["beyond_length"].values()) == {"yes"}
    assert all(float(word) < 0 for word in printed["matched_ci_high"].values())
    # Row i of both groups is one problem, answered in as many tokens.
    assert_verdicts(verdicts, executed.whole, "corrupted")


@pytest.mark.slow
def test_slow_and_fast_share_no_length(executed: Executed):
    assert max(lengths(executed.whole, "fast")) < min(lengths(executed.whole, "slow"))
    printed = frame(executed.texts("fast")[0])
    assert set(printed["matched_pairs"].values()) == {"0"}
    assert set(printed["beyond_length"].values()) == {"undecided"}


@pytest.mark.slow
def test_the_run_of_equal_length_decides(executed: Executed):
    tokens = min(lengths(executed.whole, "fast"))
    for group in ("slow", "fast", "corrupted"):
        assert set(lengths(executed.cut, group)) == {tokens}
    said, verdicts = executed.texts("equal")
    usable = len(executed.cut.examples)
    assert said == f"every response cut to {tokens} tokens; usable rows: {usable}\n"
    assert_verdicts(verdicts, executed.cut, "fast")
