"""How a run's cost grows with its rows: 100, 1,000 and 10,000 of them through the embedded model.

  python -m benchmarks.scaling

Each run and each reading is a process of its own, and each run first computes one batch of every
shape. `s/Mtoken` is from then to the last shard, so without start-up and compilation, the median
of as many runs as fill ten seconds; `peak MiB` is the process's largest memory; `open s` reads the
finished store's examples and its spectra without singular values; `resume s` is the same run asked
for again: alone, and with the start of Python.
"""

import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random

from gradjax.checkpoints.pretrained import load_model
from gradjax.config import RunConfig
from gradjax.data.word_problems import random_problem
from gradjax.device import local_device
from gradjax.runs import run as run_module
from gradjax.runs.compute import compute_results
from gradjax.runs.inputs import read_inputs
from gradjax.runs.layout import lay_out
from gradjax.runs.windows import read_windows
from gradjax.storage.store import read_table

ROWS = (100, 1_000, 10_000)
_LEAST_SECONDS = 10


def write_rows(path: Path, count: int) -> None:
    """Generated word problems with worked solutions, as JSON lines."""
    rng = Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            problem = random_problem(rng, held_out=False)
            row = {"instruction": problem.instruction, "output": problem.slow}
            file.write(json.dumps(row) + "\n")


def timed_run(data: str, store: str) -> dict[str, float]:
    """Runs with everything compiled, and says what it took."""
    config = RunConfig(data=(data,), output_dir=store)
    inputs = read_inputs(config)
    (window,) = read_windows(config, inputs)
    rows, device = window.tokenized, local_device()
    batches = lay_out(config, inputs.model, rows, device, 1).batches
    shapes = {(batch.size, batch.length): batch for batch in batches}
    decoder = load_model(config.model).decoder
    list(compute_results(decoder, rows, config.spectra, list(shapes.values()), device))
    tokens = sum(row.num_tokens for row in rows)
    del window, rows, batches, shapes, decoder
    seconds = []
    while sum(seconds) < _LEAST_SECONDS:
        start = time.perf_counter()
        run_module.run(dataclasses.replace(config, overwrite=True))
        seconds.append(time.perf_counter() - start)
    return {
        "seconds per million tokens": 1e6 * statistics.median(seconds) / tokens,
        "peak bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0,
    }


def timed_resuming(data: str, store: str) -> dict[str, float]:
    """Asks for a finished run again."""
    start = time.perf_counter()
    run_module.run(RunConfig(data=(data,), output_dir=store))
    return {"seconds": time.perf_counter() - start}


def timed_reading(_: str, store: str) -> dict[str, float]:
    """Reads a store as a report would."""
    start = time.perf_counter()
    rows = read_table(store, "examples").num_rows
    columns = ["group", "example_id", "layer", "projection", "nuclear_norm", "effective_rank"]
    read_table(store, "spectra", columns).to_pandas()
    return {"rows": rows, "reading seconds": time.perf_counter() - start}


def in_process(function: str, data: Path, store: Path) -> dict[str, float]:
    """A function of this file in a new process, with the seconds that the process took."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.scaling", function, str(data), str(store)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout) | {"process seconds": time.perf_counter() - start}


def main() -> None:
    """Prints the table."""
    print("   rows  s/Mtoken  peak MiB  bytes/row  files  open s  resume s")
    for rows in ROWS:
        with tempfile.TemporaryDirectory() as scratch:
            data, store = Path(scratch) / "rows.jsonl", Path(scratch) / "run"
            write_rows(data, rows)
            run = in_process("timed_run", data, store)
            shards = [path for path in store.rglob("*.parquet") if path.is_file()]
            size = sum(path.stat().st_size for path in shards) / rows
            reading = in_process("timed_reading", data, store)
            again = in_process("timed_resuming", data, store)
            assert reading["rows"] == rows
            print(
                f"{rows:>7,}  {run['seconds per million tokens']:>8.1f}"
                f"  {run['peak bytes'] / 2**20:>8.0f}  {size:>9.0f}  {len(shards):>5}"
                f"  {reading['reading seconds']:>6.2f}"
                f"  {again['seconds']:.1f}, {again['process seconds']:.1f}",
                flush=True,
            )


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
    else:
        main()
