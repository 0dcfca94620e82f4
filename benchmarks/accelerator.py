"""What spectra cost on this machine's accelerator, against the least possible work.

  python -m benchmarks.accelerator --shape=qwen2.5_7b
  python -m benchmarks.accelerator --shape=qwen2.5_7b --kernels
  python -m benchmarks.accelerator --ways=gram --tokens=1024 --dtypes=float32 --profile=DIR

Random weights of a registered model's shape, no network, no checkpoint. benchmarks/ways.py says
what the ways are; each runs in a process of its own per dtype, so that memory is its own and a
crash costs no other figure. Ratios are to the faster floor, per token; `cpu s` is what a batch
takes of the host's cores: on a CPU that others use, the better measure of work. Accuracy is the
largest relative error against float64 over the projections of one layer, of the same factors for
every way. `first s` is the first batch: it compiles what no earlier process of the program
compiled. Every figure is a line of --output at once; tables are printed at the end.
"""

import functools
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks.kernels import KERNELS, measure_kernel
from benchmarks.shapes import shape_config
from benchmarks.ways import FLOORS, SPECTRA, WAYS, NotMeasuredError
from gradjax.cli.app import start
from gradjax.errors import GradjaxError

flags.DEFINE_string("shape", "qwen2.5_7b", "a registered model, or demo")
flags.DEFINE_integer("layers", None, "so many layers, and as much of the vocabulary", lower_bound=1)
flags.DEFINE_list("tokens", ["256", "512", "1024", "2048", "4096"], "T, per row")
flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "of weights and activations")
flags.DEFINE_list("ways", list(WAYS), f"some of {', '.join(WAYS)}")
flags.DEFINE_integer("rows", None, "rows in a batch; as many as gradjax spectra takes if not given")
flags.DEFINE_integer("repeats", 5, "timed batches after the first", lower_bound=1)
flags.DEFINE_float("budget_s", math.inf, "seconds until what is left is recorded as not measured")
flags.DEFINE_float("longest_s", 120, "dense SVDs and kernels expected to take longer are left out")
flags.DEFINE_string("output", None, "a file to append JSON lines to")
flags.DEFINE_string("profile", None, "a folder for traces of a few batches of each way")
flags.DEFINE_bool("kernels", False, "measure the decompositions alone instead")
flags.DEFINE_list("batches", ["1", "4", "16", "56"], "with --kernels: matrices at a time")
flags.DEFINE_string("one", None, "NAME,DTYPE: measure this in this process (internal)")
flags.DEFINE_float("deadline", math.inf, "of --one, as time.time() (internal)")
flags.DEFINE_string("scratch", None, "of --one: a folder shared by all (internal)")

Record = dict[str, Any]


def sizes(name: str) -> list[int]:
    """The numbers of a list flag, ascending."""
    texts = getattr(flags.FLAGS, name)
    if not all(text.isdecimal() and int(text) for text in texts):
        raise GradjaxError(f"--{name}={','.join(texts)}: expected positive whole numbers")
    return sorted(int(text) for text in texts)


def cells(name: str, dtype: str) -> list[Record]:
    """What one process measures, in order."""
    values = flags.FLAGS
    cell = {"shape": values.shape, "layers": values.layers, "dtype": dtype}
    if values.kernels:
        return [
            {"kernel": name, "shape": values.shape, "tokens": t, "matrices": b}
            for t in sizes("tokens")
            for b in sizes("batches")
        ]
    return [cell | {"way": name, "tokens": t} for t in sizes("tokens")]


def measure_one(name: str, dtype: str) -> Iterator[Record]:
    """Measures in this process: a record of the machine, then one per cell."""
    yield machine()
    measure = _kernel_measurer() if flags.FLAGS.kernels else _way_measurer(name, dtype)
    for cell in cells(name, dtype):
        yield cell | attempt(partial(measure, cell), "missing")


def attempt(work: Callable[[], Record], missing: str) -> Record:
    """What `work` returns, or under the key `missing` why it did not: the rest goes on."""
    try:
        if time.time() > flags.FLAGS.deadline:
            raise NotMeasuredError("the time budget was used up")
        return work()
    except NotMeasuredError as reason:
        return {missing: f"not measured: {reason}"}
    except Exception as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        return {missing: f"failed: {first_line}"}


def machine() -> Record:
    """Where and with what the figures come to be."""
    import jax

    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "backend": device.platform,
        "host": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "jax": version("jax"),
        "jaxlib": version("jaxlib"),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "arguments": [argument for argument in sys.argv[1:] if "scratch" not in argument],
    }


def _way_measurer(way: str, dtype: str) -> Callable[[Record], Record]:
    import jax

    from benchmarks import ways
    from benchmarks.profiles import profile
    from gradjax.device import local_device
    from gradjax.model.decoder import Decoder, random_decoder
    from gradjax.structs import TokenBatch

    values = flags.FLAGS

    @functools.cache
    def weights() -> tuple[Decoder, int]:
        config = shape_config(values.shape, values.layers)
        decoder = jax.block_until_ready(random_decoder(config, seed=0, dtype=dtype))
        return decoder, ways.memory_in_use()

    def traced(decoder: Decoder, batch: TokenBatch) -> Record:
        folder = Path(values.profile) / f"{way}-{dtype}-{batch.tokens.shape[1]}"
        with ways.starting(way, decoder, batch) as begin:
            return profile(begin, ways.PROFILED_BATCHES, folder)

    def measure(cell: Record) -> Record:
        decoder, held = weights()
        tokens = cell["tokens"]
        rows = values.rows or max(local_device().batch_tokens // tokens, 1)
        repeats = values.repeats
        if way == "dense":
            rows, repeats = 1, 1
            one, example = ways.expected_dense_seconds(decoder)
            if 3 * example > values.longest_s:
                raise NotMeasuredError(f"one q takes {one:.3g} s, an example about {example:.3g} s")
        batch = ways.random_batch(decoder, rows, tokens)
        found = ways.measure(way, decoder, batch, repeats, values.deadline, held)
        found["rows"] = rows
        if way in SPECTRA:
            reference = Path(values.scratch) / f"{dtype}-{tokens}.npz"
            errors = partial(ways.largest_errors, way, decoder, batch, reference)
            found |= attempt(errors, "accuracy_missing")
        if values.profile:
            found |= attempt(partial(traced, decoder, batch), "profile_missing")
        return found

    return measure


def _kernel_measurer() -> Callable[[Record], Record]:
    values = flags.FLAGS
    width = shape_config(values.shape).hidden_size
    one: dict[int, float] = {}  # seconds per matrix by T, of the last batch

    def measure(cell: Record) -> Record:
        tokens, matrices = cell["tokens"], cell["matrices"]
        expected = matrices * one.get(tokens, 0) * (values.repeats + 1)
        if expected > values.longest_s:
            raise NotMeasuredError(f"expected to take {expected:.3g} s")
        found = measure_kernel(cell["kernel"], matrices, tokens, width, values.repeats)
        one[tokens] = found["seconds"] / matrices
        return found

    return measure


def run_apart(name: str, dtype: str, deadline: float, scratch: str) -> Iterator[Record]:
    """`measure_one` in a new process, which is killed at the deadline."""
    command = [sys.executable, "-m", "benchmarks.accelerator", *sys.argv[1:]]
    command += [f"--one={name},{dtype}", f"--deadline={deadline}", f"--scratch={scratch}"]
    environment = {
        "JAX_COMPILATION_CACHE_DIR": f"{scratch}/compiled",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        # jax 0.10.2 on a CPU of few cores: batched decompositions starve its pool and hang.
        "PJRT_NPROC": "16",
        **os.environ,
    }
    left = cells(name, dtype)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout
        killer = threading.Timer(min(deadline - time.time(), 1e9), process.kill)
        killer.start()
        try:
            for line in process.stdout:
                record = json.loads(line)
                if "device" not in record:
                    left.pop(0)
                yield record
        finally:
            killer.cancel()
    if time.time() > deadline:
        reason = "not measured: the time budget was used up"
    else:
        reason = f"failed: the process ended with status {process.returncode}"
    yield from (cell | {"missing": reason} for cell in left)


def main(_: list[str]) -> None:
    """Prints a table per dtype and T, or per kernel."""
    values = flags.FLAGS
    if values.one:
        for record in measure_one(*values.one.split(",")):
            print(json.dumps(record), flush=True)
        return
    shape_config(values.shape, values.layers)
    names = KERNELS if values.kernels else [way for way in WAYS if way in values.ways]
    if unknown := set(values.ways) - set(WAYS):
        raise GradjaxError(f"--ways: {', '.join(unknown)}: expected some of {', '.join(WAYS)}")
    dtypes = [""] if values.kernels else values.dtypes
    jobs = [(dtype, name) for dtype in dtypes for name in names]
    deadline = time.time() + values.budget_s
    records: list[Record] = []
    with tempfile.TemporaryDirectory() as scratch:
        for done, (dtype, name) in enumerate(jobs):
            # Each has a share of the time left, so that no way starves the others.
            now = time.time()
            share = now + max(deadline - now, 0) / (len(jobs) - done)
            for record in run_apart(name, dtype, share, scratch):
                records.append(record)
                print(json.dumps(record), file=sys.stderr, flush=True)
                if values.output:
                    with open(values.output, "a") as file:
                        file.write(json.dumps(record) + "\n")
    print_machine(records)
    (print_kernels if values.kernels else print_ways)(
        [record for record in records if "device" not in record]
    )


def print_machine(records: list[Record]) -> None:
    """One line about the device, and the range of the machine's load."""
    machines = [record for record in records if "device" in record]
    if machines:
        loads = [record["load"] for record in machines]
        print(
            "{device} ({backend}), {cores} cores, jax {jax}, jaxlib {jaxlib}, Python {python}, "
            "XLA_FLAGS={xla_flags!r}".format(**machines[0]),
            f"load {min(loads):.1f} to {max(loads):.1f}",
            sep=", ",
        )


def print_ways(records: list[Record]) -> None:
    """One table per dtype and T."""
    values = flags.FLAGS
    whole, config = shape_config(values.shape), shape_config(values.shape, values.layers)
    print(
        f"{values.shape}: {config.num_layers} of {whole.num_layers} layers were measured, with "
        f"{config.vocab_size:,} of {whole.vocab_size:,} tokens of the vocabulary; no figure is "
        "extrapolated"
    )
    for dtype in values.dtypes:
        for tokens in sizes("tokens"):
            rows = [r for r in records if (r["dtype"], r["tokens"]) == (dtype, tokens)]
            print(f"\n{dtype}, T={tokens}")
            print(
                f"{'':9}{'rows':>5}{'seconds':>10}{'of floor':>10}{'tokens/s':>10}{'cpu s':>9}"
                f"{'peak GiB':>10}{'first s':>9}{'nuclear':>10}{'eff. rank':>10}"
            )
            floors = [per_token(r) for r in rows if r["way"] in FLOORS and "seconds" in r]
            for record in rows:
                print(way_line(record, min(floors, default=None)))


def per_token(record: Record) -> float:
    """Seconds per token."""
    return record["seconds"] / record["rows"] / record["tokens"]


def way_line(record: Record, floor: float | None) -> str:
    """A row of a table."""
    if "missing" in record:
        return f"{record['way']:9}{record['missing']}"
    ratio = f"{per_token(record) / floor:.2f}×" if floor else "no floor"
    peak = ("≤" if record.get("peak_is_older") else "") + f"{record['peak_bytes'] / 2**30:.2f}"
    errors = [record.get(f"{name}_error") for name in ("nuclear_norm", "effective_rank")]
    notes = ["", *(text for key, text in record.items() if key.endswith("_missing"))]
    if record["recomputes"]:
        notes.append("blocks recomputed")
    if "idle_share" in record:
        idle, longest = record["idle_share"], record["longest_idle_seconds"]
        notes.append(f"idle {idle:.1%}, longest {longest * 1e3:.1f} ms")
    return (
        f"{record['way']:9}{record['rows']:5}{record['seconds']:10.4g}{ratio:>10}"
        f"{1 / per_token(record):10.4g}{record['cpu_seconds']:9.4g}{peak:>10}"
        f"{record['first_seconds']:9.1f}"
        + "".join(f"{error:10.0e}" if error is not None else " " * 10 for error in errors)
        + "  ".join(notes)
    )


def print_kernels(records: list[Record]) -> None:
    """Milliseconds per matrix; columns are numbers of matrices at a time."""
    matrices = sizes("batches")
    width = shape_config(flags.FLAGS.shape).hidden_size
    print(f"milliseconds per matrix, by matrices at a time (gram and qr: T×{width}, others T×T)")
    print(f"{'':16}{'T':>6}" + "".join(f"{b:>10}" for b in matrices))
    for name in KERNELS:
        for tokens in sizes("tokens"):
            row = [r for r in records if (r["kernel"], r["tokens"]) == (name, tokens)]
            found = (
                f"{1e3 * r['seconds'] / r['matrices']:.4g}" if "seconds" in r else "–" for r in row
            )
            print(f"{name:16}{tokens:6}" + "".join(f"{text:>10}" for text in found))
    for record in records:
        if "missing" in record:
            print("{kernel}, T={tokens}, {matrices} at a time: {missing}".format(**record))


if __name__ == "__main__":
    start(main)
