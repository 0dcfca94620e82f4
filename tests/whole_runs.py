"""Runs of the embedded model in processes of their own, and what they wrote."""

import subprocess
import sys
from pathlib import Path

import pandas as pd

from gradjax.storage.store import TABLES, read_table

# A process that writes a shard per batch, so that it can be stopped between two.
MAIN = """
import sys
from gradjax.cli.app import main
from gradjax.runs import progress
progress._FLUSH_SECONDS = 0
main(["spectra", *sys.argv[1:]])
"""
FLAGS = ("--limit=12", "--batch_tokens=128", "--layers=2-3")
_KEYS = ("group", "example_id", "layer", "kind", "projection", "layer_a", "layer_b")


def start(output_dir: Path, *flags: str, code: str = MAIN, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", code, f"--output_dir={output_dir}", *FLAGS, *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes, **options)


def tables(directory: Path) -> dict[str, pd.DataFrame]:
    """The store's tables in one order, arrays as tuples, so that frames compare whole."""
    found = {}
    for table, schema in TABLES.items():
        frame = read_table(directory, table).to_pandas()
        if "singular_values" in frame:
            frame["singular_values"] = frame["singular_values"].map(tuple)
        keys = [name for name in schema.names if name in _KEYS]
        found[table] = frame.sort_values(keys).reset_index(drop=True)
        assert not found[table].duplicated(keys).any()
    return found


def every_byte(directory: Path) -> dict[str, bytes]:
    """Every file of a directory."""
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()
    }
