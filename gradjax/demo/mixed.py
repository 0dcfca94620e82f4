"""Generated rows of mixed quality, to try selection on: `python -m gradjax.demo.mixed`."""

import os
import sys
from pathlib import Path

from absl import flags

from gradjax import strict_json
from gradjax.cli.app import run
from gradjax.cli.command import Command
from gradjax.data.word_problems import mixed_rows
from gradjax.errors import GradjaxError
from gradjax.storage.filesystem import whole_file

FLAGS = flags.FlagValues()
GROUPS = {
    "Rows": [
        flags.DEFINE_integer("rows", 1000, "how many", lower_bound=1, flag_values=FLAGS),
        flags.DEFINE_integer("seed", 0, "seed of the rows", flag_values=FLAGS),
    ],
    "Output": [
        flags.DEFINE_string("output", None, "the .jsonl file to write", FLAGS, required=True)
    ],
}
DETAILS = """
Each row is a word problem that the embedded model was not trained on, and its
`kind` says what its response is: `slow` (worked out), `fast` (the answer alone)
or `corrupted` (worked out wrongly).
"""


def main() -> None:
    """Writes the file and says how many rows of each kind it has."""
    output = Path(FLAGS.output).expanduser()
    if os.path.isdir(output):
        raise GradjaxError(f"--output={output} is a directory; expected the .jsonl file to write")
    rows = mixed_rows(FLAGS.rows, FLAGS.seed)
    with whole_file(output) as temporary:
        temporary.write_text("".join(f"{strict_json.dumps(row)}\n" for row in rows))
    kinds = [row["kind"] for row in rows]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    print(f"{len(rows)} rows in {output}: {counts}")


COMMAND = Command(
    program="python -m gradjax.demo.mixed",
    summary="Generates rows of mixed quality.",
    examples=("python -m gradjax.demo.mixed --rows=1000 --output=mixed.jsonl",),
    details=DETAILS,
    groups=GROUPS,
    flags=FLAGS,
    main=main,
)


if __name__ == "__main__":
    run(COMMAND, sys.argv[1:])
