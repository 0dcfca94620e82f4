"""Generated rows of mixed quality, to try selection on.

  python -m gradjax.demo.mixed --rows=1000 --output=mixed.jsonl

Each row is a word problem that the embedded model was not trained on, and its `kind` says what its
response is: `slow` (worked out), `fast` (the answer alone) or `corrupted` (worked out wrongly).
"""

import json
import os
from pathlib import Path

from absl import flags

from gradjax.cli.app import start
from gradjax.data.word_problems import mixed_rows
from gradjax.errors import GradjaxError
from gradjax.storage.filesystem import whole_file

flags.DEFINE_integer("rows", 1000, "how many", lower_bound=1)
flags.DEFINE_integer("seed", 0, "of the rows")
flags.DEFINE_string("output", None, "the .jsonl file to write", required=True)


def main(_: list[str]) -> None:
    """Writes the file and says how many rows of each kind it has."""
    values = flags.FLAGS
    output = Path(values.output).expanduser()
    if os.path.isdir(output):
        raise GradjaxError(f"--output={output} is a directory; expected the .jsonl file to write")
    rows = mixed_rows(values.rows, values.seed)
    with whole_file(output) as temporary:
        temporary.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    kinds = [row["kind"] for row in rows]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    print(f"{len(rows)} rows in {output}: {counts}")


if __name__ == "__main__":
    start(main)
