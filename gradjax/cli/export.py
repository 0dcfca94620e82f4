"""Writes a group of a run in another tool's format.

  python -m gradjax.export --run=runs/demo --group=slow --output=slow.jsonl

`reference` is the file that the paper's plotting scripts read: one JSON object per `ok` row, in
input order, cosines as whole matrices.
"""

from pathlib import Path

from absl import flags

from gradjax.config import as_directory
from gradjax.storage.reference import export

RUN = "the directory that gradjax.main wrote, or its URL (s3://, gs://)"
# Each writes a group of a run to a file and returns the number of rows.
FORMATS = {"reference": export}

flags.DEFINE_string("run", None, RUN, required=True)
flags.DEFINE_enum("format", "reference", list(FORMATS), "format of the file")
flags.DEFINE_string("group", None, "the group to export", required=True)
flags.DEFINE_string("output", None, "the .jsonl file to write", required=True)


def main(_: list[str]) -> None:
    """Exports and says how many rows went where."""
    output = Path(flags.FLAGS.output).expanduser()
    count = FORMATS[flags.FLAGS.format](as_directory(flags.FLAGS.run), flags.FLAGS.group, output)
    print(f"{count} rows in {output}")
