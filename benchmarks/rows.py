"""How fast rows become tokens, and what they hold in memory.

  python -m benchmarks.rows --model=DIR --data=rows.json --rows=8000

Beside gradjax's way stands the plain one: two calls of the tokenizer for each row, as the paper's
code has it. Both read the same rows, repeated until there are enough. Memory is what Python holds
of a run's rows once they are read, beyond token ids (4 bytes) and target marks (1 byte).
"""

import itertools
import json
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from transformers import PreTrainedTokenizerFast

from gradjax.checkpoints.resolve import load_tokenizer, resolve
from gradjax.cli.app import start
from gradjax.config import RunConfig, TokenConfig
from gradjax.data.examples import to_example
from gradjax.data.sources import parse_data_flags, read_rows
from gradjax.data.tokens import tokenize_rows
from gradjax.runs.inputs import read_inputs
from gradjax.runs.windows import read_windows

flags.DEFINE_string("model", "demo", "whose tokenizer")
flags.DEFINE_multi_string("data", ["demo"], "as of gradjax spectra")
flags.DEFINE_integer("rows", 8_000, "rows")


def one_at_a_time(tokenizer: PreTrainedTokenizerFast, rows: list[Any]) -> int:
    """Tokens of all rows, by two calls of the tokenizer for each."""
    total = 0
    for number, row in enumerate(rows):
        example = to_example(row, "rows", number)
        prompt = f"{example.instruction}\n"
        tokens = np.asarray(tokenizer(prompt + example.output).input_ids, np.int32)
        targets = np.arange(len(tokens)) >= len(tokenizer(prompt).input_ids)
        total += len(targets)
    return total


def together(tokenizer: PreTrainedTokenizerFast, rows: list[Any]) -> int:
    """Tokens of all rows, as gradjax reads and encodes them."""
    examples = (to_example(row, "rows", number) for number, row in enumerate(rows))
    found = tokenize_rows(examples, tokenizer, TokenConfig())
    return sum(row.num_tokens for row in found)


def timed(way: Callable[..., int], *arguments: object) -> tuple[int, float, float]:
    """What a way returns, its seconds and its seconds of all cores."""
    began, worked = time.perf_counter(), time.process_time()
    found = way(*arguments)
    return found, time.perf_counter() - began, time.process_time() - worked


def held_bytes(model: str, rows: list[Any]) -> float:
    """Bytes a row that a run holds beyond tokens and targets, of rows read from a file."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        config = RunConfig(model=model, data=(str(file),), output_dir=f"{directory}/run")
        inputs = read_inputs(config)
        began = time.perf_counter()
        next(read_windows(config, inputs))
        print(f"first window of rows after {time.perf_counter() - began:.1f} s")
        tracemalloc.start()
        windows = [*read_windows(config, inputs)]
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    tokens = sum(row.num_tokens for window in windows for row in window.tokenized)
    return (held - 5 * tokens) / len(rows)


def main(_argv: list[str]) -> None:
    """Prints rows per second of both ways, their ratio, and bytes a row."""
    values = flags.FLAGS
    tokenizer = load_tokenizer(resolve(values.model).directory)
    own = [row for source in parse_data_flags(values.data) for row in read_rows(source)]
    rows = list(itertools.islice(itertools.cycle(own), values.rows))
    tokens, *plain = timed(one_at_a_time, tokenizer, rows)
    _, *ours = timed(together, tokenizer, rows)
    print(f"{tokens / len(rows):.0f} tokens a row")
    for name, (clock, cores) in (("one at a time", plain), ("together", ours)):
        rate, each = len(rows) / clock, 1e3 * cores / len(rows)
        print(f"{name:14} {rate:8,.0f} rows/s {each:7.3f} ms of a core a row")
    print(f"{plain[0] / ours[0]:.1f} × as fast")
    print(f"{held_bytes(values.model, rows):,.0f} bytes a row beyond tokens and targets")


if __name__ == "__main__":
    start(main)
