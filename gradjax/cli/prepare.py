"""`gradjax prepare`: a sample of a registered data set as a file of rows."""

import os
from pathlib import Path

from absl import flags

from gradjax.cli.command import Command
from gradjax.data.catalog import DATASETS
from gradjax.errors import GradjaxError

FLAGS = flags.FlagValues()
SOURCE = """a local copy as the data set was published: its repository's directory, a .json, .jsonl
or .parquet file, or a saved datasets directory (default: fetched from the Hub)"""
PLAIN = """leave out rows that --prompt_format=plain of gradjax spectra cannot take, as those of
several turns"""
LIST = "print the registered data sets, and end"
GROUPS = {
    "Data": [
        flags.DEFINE_enum("dataset", None, list(DATASETS), "which data set", FLAGS),
        flags.DEFINE_string("source", None, SOURCE, FLAGS),
        flags.DEFINE_boolean("list", False, LIST, FLAGS),
    ],
    "Sample": [
        flags.DEFINE_integer(
            *("sample", 10_000, "rows to draw, all if there are fewer"),
            lower_bound=1,
            flag_values=FLAGS,
        ),
        flags.DEFINE_integer("seed", 0, "seed of the draw", flag_values=FLAGS),
        flags.DEFINE_boolean("plain", False, PLAIN, FLAGS),
    ],
    "Output": [flags.DEFINE_string("output", None, "the .jsonl file to write", FLAGS)],
}
DETAILS = """
Rows that gradjax spectra could not use are left out and counted. The same seed
gives the same file, and a smaller sample is the beginning of a larger one.
FILE.sha256, as sha256sum writes it, also says where the rows came from.
"""


def main() -> None:
    """Writes the sample; says how many rows, which were dropped, and the checksum."""
    if FLAGS.list:
        print(format_datasets())
        return
    for name in ("dataset", "output"):
        if not FLAGS[name].value:
            raise GradjaxError(f"--{name} is not given; --list shows the data sets, --help flags")
    dataset, output = DATASETS[FLAGS.dataset], Path(FLAGS.output).expanduser()
    if os.path.isdir(output):
        raise GradjaxError(f"--output={output} is a directory; expected the .jsonl file to write")
    from gradjax.data.sample import write_sample

    sample, seed, plain = FLAGS.sample, FLAGS.seed, FLAGS.plain
    print(write_sample(dataset, FLAGS.source, sample, seed, output, plain=plain))


def format_datasets() -> str:
    """The registered data sets, one paragraph each."""
    return "\n\n".join(
        "\n".join(
            f"{dataset.name if name == 'repository' else '':16}{name:12}{value}"
            for name, value in (
                ("repository", dataset.repo or "-"),
                ("revision", dataset.revision[:12]),
                ("files", dataset.files),
                ("columns", ", ".join(dataset.columns)),
                ("licence", dataset.licence),
                ("note", dataset.note),
            )
            if value
        )
        for dataset in DATASETS.values()
    )


COMMAND = Command(
    program="gradjax prepare",
    summary="Draws a sample of one of the paper's data sets.",
    examples=(
        "gradjax prepare --dataset=wizardlm --output=wizardlm.jsonl",
        "gradjax prepare --list",
        "gradjax prepare --dataset=magpie --sample=500 --seed=1 --output=magpie.jsonl",
        "gradjax prepare --dataset=magpie --source=DIR --output=magpie.jsonl",
    ),
    details=DETAILS,
    groups=GROUPS,
    flags=FLAGS,
    main=main,
)
