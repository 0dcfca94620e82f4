"""What a selection from scores of 1,000,000 rows takes.

  python -m benchmarks.selection

Writes such scores and their rows as JSON lines, then selects from them in a few ways: seconds and
peak memory, each in a process of its own.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.memory import PeakMemory
from gradjax.data.sources import row_hash
from gradjax.select.rule import Rule, parse_amount, parse_terms
from gradjax.select.write import SelectConfig, write_selection

ROWS, SHARDS = 1_000_000, 10
METRICS = ("ifd", "ifd_loss_ratio", "reward", "instag", "difficulty", "perplexity", "loss")
IFD, SOME, TENTH = parse_terms("ifd"), parse_amount("top", "200"), parse_amount("top", "10%")
WAYS = {
    "top and bottom": Rule(IFD, top=SOME, bottom=SOME),
    "shares": Rule(IFD, top=TENTH, bottom=TENTH, random=TENTH),
    "match_length": Rule(IFD, top=TENTH, match_length=True),
    "two metrics": Rule(parse_terms("ifd*0.5,reward"), top=TENTH, bottom=TENTH),
}


def write(directory: Path) -> None:
    """Scores of one group, some of them null or outside their bounds, and the rows."""
    rng = np.random.default_rng(0)
    lines, hashes = [], []
    for number in range(ROWS):
        row = {"instruction": f"What is {number} + 1?", "output": f"It is {number + 1}. " * 5}
        lines.append(json.dumps(row) + "\n")
        hashes.append(row_hash(row))
    (directory / "rows.jsonl").write_text("".join(lines))
    values = {name: rng.random(ROWS) * 1.05 for name in METRICS}
    values["instag"] = rng.integers(0, 15, ROWS).astype(float)
    for column in values.values():
        column[rng.random(ROWS) < 0.01] = np.nan
    table = pa.table(
        {
            "group": pa.array(["rows"]).take(pa.array(np.zeros(ROWS, int))),
            "example_id": np.arange(ROWS),
            "row_hash": hashes,
            "status": np.full(ROWS, "ok"),
            "reason": np.full(ROWS, ""),
            "num_target_tokens": np.exp(rng.normal(5, 1, ROWS)).astype(int) + 1,
            **{name: pa.Array.from_pandas(column) for name, column in values.items()},
        }
    )
    (directory / "scores").mkdir()
    for shard in range(SHARDS):
        part = table.slice(shard * ROWS // SHARDS, ROWS // SHARDS)
        pq.write_table(part, directory / "scores" / f"{shard:06d}.parquet")
    data = {"rows": {"source": str(directory / "rows.jsonl"), "rows": ROWS, "hash": ""}}
    (directory / "score.json").write_text(json.dumps({"data": data}))


def select(directory: Path, way: str) -> None:
    """Selects in one of `WAYS`."""
    output = directory / "selections" / way
    write_selection(SelectConfig(WAYS[way], scores=(str(directory),), output_dir=str(output)))


def main() -> None:
    """Writes the scores, and selects from them in new processes."""
    with tempfile.TemporaryDirectory() as scratch:
        write(Path(scratch))
        for way in WAYS:
            command = [sys.executable, "-m", "benchmarks.selection", scratch, way]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    if sys.argv[1:]:
        start = time.perf_counter()
        with PeakMemory() as memory:
            select(Path(sys.argv[1]), sys.argv[2])
        seconds = time.perf_counter() - start
        print(f"{sys.argv[2]:15} {seconds:5.1f} s  {memory.bytes / 2**30:.2f} GiB")
    else:
        main()
