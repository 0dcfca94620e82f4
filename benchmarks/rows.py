"""How fast rows become tokens, and what they hold in memory.

  python -m benchmarks.rows --model=DIR --rows=20000

Rows are drawn from the words of the embedded word problems, a third of them the prompt's. Beside
gradjax's way stands the plain one: two calls of the tokenizer for each row, as the paper's code has
it. Memory is what Python holds of a run's rows once they are read, beyond token ids (4 bytes) and
target marks (1 byte).
"""

import json
import random
import re
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

from absl import flags
from transformers import PreTrainedTokenizerFast

from gradjax.checkpoints.resolve import load_tokenizer, resolve
from gradjax.cli.app import start
from gradjax.config import RunConfig, TokenConfig
from gradjax.data.examples import to_example
from gradjax.data.sources import parse_data_flags, read_rows
from gradjax.data.tokens import tokenize_rows
from gradjax.runs.inputs import read_inputs

flags.DEFINE_string("model", "demo", "whose tokenizer")
flags.DEFINE_integer("rows", 20_000, "rows")
flags.DEFINE_integer("words", 210, "of a row")


def make_rows(count: int, words: int) -> list[dict[str, str]]:
    """Rows of different words in random order."""
    draw, problems = random.Random(0), parse_data_flags(["demo"])
    texts = " ".join(json.dumps(row) for group in problems for row in read_rows(group))
    known = sorted(set(re.findall(r"[a-zA-Z]+|\d+", texts)))
    return [
        {
            "instruction": " ".join(draw.choices(known, k=words // 3)),
            "output": " ".join(draw.choices(known, k=words - words // 3)),
        }
        for _ in range(count)
    ]


def one_at_a_time(tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, str]]) -> int:
    """Tokens of all rows, by two calls of the tokenizer for each."""
    total = 0
    for row in rows:
        total += len(tokenizer(f"{row['instruction']}\n{row['output']}").input_ids)
        _ = len(tokenizer(f"{row['instruction']}\n").input_ids)
    return total


def together(tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, str]]) -> int:
    """Tokens of all rows, as gradjax reads and encodes them."""
    examples = (to_example(row, "rows", number) for number, row in enumerate(rows))
    found = tokenize_rows(examples, tokenizer, TokenConfig())
    return sum(row.num_tokens for row in found)


def timed(way: Callable[..., int], *arguments: object) -> tuple[int, float, float]:
    """What a way returns, its seconds and its seconds of all cores."""
    began, worked = time.perf_counter(), time.process_time()
    found = way(*arguments)
    return found, time.perf_counter() - began, time.process_time() - worked


def held_bytes(model: str, rows: list[dict[str, str]]) -> float:
    """Bytes a row that a run holds beyond tokens and targets, of rows read from a file."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        tracemalloc.start()
        inputs = read_inputs(
            RunConfig(model=model, data=(str(file),), output_dir=f"{directory}/run")
        )
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return held / len(rows) - 5 * sum(row.num_tokens for row in inputs.tokenized) / len(rows)


def main(_argv: list[str]) -> None:
    """Prints rows per second of both ways, their ratio, and bytes a row."""
    values = flags.FLAGS
    tokenizer = load_tokenizer(resolve(values.model).directory)
    rows = make_rows(values.rows, values.words)
    few = rows[: max(len(rows) // 10, 1)]
    tokens, *plain = timed(one_at_a_time, tokenizer, few)
    _, *ours = timed(together, tokenizer, rows)
    rates = len(few) / plain[0], len(rows) / ours[0]
    print(f"{tokens / len(few):.0f} tokens a row")
    for name, rate, seconds, count in (
        ("one at a time", rates[0], plain[1], len(few)),
        ("together", rates[1], ours[1], len(rows)),
    ):
        print(f"{name:14} {rate:8,.0f} rows/s {1e3 * seconds / count:7.3f} ms of a core a row")
    print(f"{rates[1] / rates[0]:.1f} × as fast")
    print(f"{held_bytes(values.model, rows):,.0f} bytes a row beyond tokens and targets")


if __name__ == "__main__":
    start(main)
