"""Draws a sample of a registered data set and writes it as JSON lines with its SHA-256.

  python -m gradjax.prepare --list
  python -m gradjax.prepare --dataset=wizardlm --sample=10000 --seed=0 --output=wizardlm.jsonl
  python -m gradjax.prepare --dataset=magpie --source=DIR --output=magpie.jsonl

Rows that gradjax.main could not use are left out and counted. The same seed gives the same file,
and a smaller sample is the beginning of a larger one. FILE.sha256, as sha256sum writes it, also
says where the rows came from.
"""

import os
from pathlib import Path

from absl import flags

from gradjax.data.catalog import DATASETS
from gradjax.errors import GradjaxError

SOURCE = """a local copy as the data set was published: its repository's directory, a .json, .jsonl
or .parquet file, or a saved datasets directory (default: fetched from the Hub)"""

flags.DEFINE_enum("dataset", None, list(DATASETS), "which data set")
flags.DEFINE_string("source", None, SOURCE)
flags.DEFINE_integer("sample", 10_000, "rows to draw, all if there are fewer", lower_bound=1)
flags.DEFINE_integer("seed", 0, "of the draw")
flags.DEFINE_string("output", None, "the .jsonl file to write")
flags.DEFINE_boolean("list", False, "print the registered data sets, and end")


def main(_: list[str]) -> None:
    """Writes the sample; says how many rows, which were dropped, and the checksum."""
    values = flags.FLAGS
    if values.list:
        print(registry_table())
        return
    for name in ("dataset", "output"):
        if not getattr(values, name):
            raise GradjaxError(f"--{name} is not given; --list shows the data sets, --help flags")
    dataset, output = DATASETS[values.dataset], Path(values.output).expanduser()
    if os.path.isdir(output):
        raise GradjaxError(f"--output={output} is a directory; expected the .jsonl file to write")
    from gradjax.data.sample import write_sample

    print(write_sample(dataset, values.source, values.sample, values.seed, output))


def registry_table() -> str:
    """The registered data sets as a Markdown table."""
    import pandas as pd

    rows = [
        {
            "name": dataset.name,
            "repository": dataset.repo,
            "revision": dataset.revision[:12],
            "files": dataset.files,
            "columns": ", ".join(dataset.columns),
            "licence": dataset.licence,
            "note": dataset.note,
        }
        for dataset in DATASETS.values()
    ]
    return pd.DataFrame(rows).fillna("-").to_markdown(index=False)
