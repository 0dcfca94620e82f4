"""`gradjax export`: a group of a run in another tool's format."""

from functools import partial
from pathlib import Path

from absl import flags

from gradjax.cli.command import Command
from gradjax.config import as_directory

FLAGS = flags.FlagValues()


def _write_reference(directory: str | Path, group: str, output: Path) -> int:
    from gradjax.storage.reference import export

    return export(directory, group, output)


def _write_scores(statistic: str, directory: str | Path, group: str, output: Path) -> int:
    from gradjax.storage.datascorer import export

    return export(directory, group, output, statistic)


# Each writes a group of a run to a file and returns the number of rows.
FORMATS = {
    "reference": _write_reference,
    "datascorer_effective_rank": partial(_write_scores, "effective_rank"),
    "datascorer_nuclear_norm": partial(_write_scores, "nuclear_norm"),
}
RUN = "the directory that gradjax spectra wrote, or its URL (s3://, gs://)"
GROUPS = {
    "What is exported": [
        flags.DEFINE_string("run", None, RUN, FLAGS, required=True),
        flags.DEFINE_string("group", None, "the group to export", FLAGS, required=True),
    ],
    "Output": [
        flags.DEFINE_enum(
            "format", "reference", list(FORMATS), "format of the written file", FLAGS
        ),
        flags.DEFINE_string("output", None, "the .jsonl file to write", FLAGS, required=True),
    ],
}
DETAILS = """
The format `reference` is the file that the paper's plotting scripts read: one
JSON object per `ok` row, in input order, cosines as whole matrices.

The formats `datascorer_...` are the rows of ODA-DataScorer's scorers
EffectiveRankScorer and NuclearNormScorer: id (the row's number, from 0),
Q_EffectiveRank and so on, means over the run's layers, null where none is.
"""


def main() -> None:
    """Exports and says how many rows went where."""
    output = Path(FLAGS.output).expanduser()
    count = FORMATS[FLAGS.format](as_directory(FLAGS.run), FLAGS.group, output)
    print(f"{count} rows in {output}")


COMMAND = Command(
    program="gradjax export",
    summary="Writes a group of a run in the format of another tool.",
    examples=("gradjax export --run=runs/demo --group=slow --output=slow.jsonl",),
    details=DETAILS,
    groups=GROUPS,
    flags=FLAGS,
    main=main,
)
