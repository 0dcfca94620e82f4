"""What a report of 10,000 examples × 28 layers takes.

  python -m benchmarks.report

Writes such a run of made-up numbers, 64 singular values each, then reports on it: seconds and peak
memory of tables and statistics alone and of all, each in a process of its own, and the page's size.
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.made_up_runs import Group, write_run
from gradjax.report.compare import adjusted, compare
from gradjax.report.tables import similarity_table, spectra_table
from gradjax.report.write import ReportConfig, write_report
from gradjax.storage.results import read_values

ROWS, LAYERS, VALUES = 5_000, 28, 64


def write(directory: Path) -> None:
    """Two groups of lengths like those of instruction data."""
    rng = np.random.default_rng(0)
    groups = {}
    for name, length in (("high", 300), ("low", 150)):
        target = np.maximum(length * np.exp(0.7 * rng.standard_normal(ROWS)), 2).astype(int)
        noise = np.exp(0.2 * rng.standard_normal((2, ROWS)))
        prompt = rng.integers(5, 100, ROWS)
        groups[name] = Group(target, prompt, noise[0] / target**0.5, noise[1] * target**0.5)
    write_run(directory, groups, layers=LAYERS, singular_values=VALUES)


def peak_memory() -> float:
    """The process's largest memory in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def statistics(directory: str) -> str:
    """Comparisons and tables alone."""
    run = read_values(directory)
    adjusted([compare(run, "high", "low")])
    spectra_table(run, [("high", "low")])
    similarity_table(run, [("high", "low")])
    return ""


def whole(directory: str) -> str:
    """Everything that the program writes."""
    page = write_report(ReportConfig((directory,))).directory / "report.html"
    return f"  report.html {page.stat().st_size / 1e6:.1f} MB"


def main() -> None:
    """Writes the run, and reports on it in new processes."""
    with tempfile.TemporaryDirectory() as scratch:
        write(Path(scratch) / "run")
        for step in ("statistics", "whole"):
            command = [sys.executable, "-m", "benchmarks.report", step, str(Path(scratch) / "run")]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    if sys.argv[1:]:
        start = time.perf_counter()
        said = globals()[sys.argv[1]](sys.argv[2])
        seconds = time.perf_counter() - start
        print(f"{sys.argv[1]:10} {seconds:5.1f} s  {peak_memory():.2f} GiB{said}")
    else:
        main()
