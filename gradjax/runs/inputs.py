"""What a run starts from: the model's config, its tokenizer, and every row as tokens."""

import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from absl import logging
from transformers import PreTrainedTokenizerFast

from gradjax.checkpoints.hf_config import read_config
from gradjax.checkpoints.resolve import Checkpoint, load_tokenizer
from gradjax.config import RunConfig
from gradjax.data.examples import to_example
from gradjax.data.sources import data_hash, parse_data_flags, read_rows
from gradjax.data.tokens import check_tokenizer, check_vocabulary, describe, tokenize
from gradjax.errors import GradjaxError
from gradjax.model.config import DecoderConfig
from gradjax.storage.store import FinishedRow, Key, Store
from gradjax.structs import Example, Status, TokenizedExample


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a run starts from, before any weight is read."""

    checkpoint: Checkpoint
    model: DecoderConfig
    tokenizer: PreTrainedTokenizerFast
    data: dict[str, dict[str, Any]]  # by group: source, number of rows, hash
    tokenized: list[TokenizedExample]


def read_inputs(
    config: RunConfig, checkpoint: Checkpoint, known: Mapping[Key, FinishedRow]
) -> Inputs:
    """The model's config, and the data as tokens; rows that are known keep only their length."""
    model = read_config(checkpoint.directory)
    config.spectra.layer_numbers(model.num_layers)  # refused before anything is read
    tokenizer = load_tokenizer(checkpoint.directory)
    check_tokenizer(tokenizer, config.tokens)
    data: dict[str, dict[str, Any]] = {}
    tokenized = []
    for source in parse_data_flags(config.data):
        source_rows = read_rows(source, config.limit)
        data[source.group] = {
            "source": source.location,
            "rows": len(source_rows),
            "hash": data_hash(source_rows),
        }
        for number, row in enumerate(source_rows):
            example = to_example(row, source.group, number)
            found = known.get((source.group, number))
            if found and found.row_hash == example.row_hash:
                tokenized.append(_finished_before(example, found))
            else:
                tokenized.append(tokenize(example, tokenizer, config.tokens))
    check_vocabulary(tokenized, model.vocab_size)
    return Inputs(checkpoint, model, tokenizer, data, tokenized)


def _finished_before(example: Example, found: FinishedRow) -> TokenizedExample:
    """A stand-in of the right length: batches stay what they were, and this row is in none."""
    computed = found.status in ("ok", "non_finite")
    return TokenizedExample(
        example,
        np.broadcast_to(np.int32(0), found.num_tokens),
        np.broadcast_to(np.bool_(False), found.num_tokens),
        truncated=found.truncated,
        status="ok" if computed else cast(Status, found.status),
    )


def log_first_example(
    tokenized: Sequence[TokenizedExample], tokenizer: PreTrainedTokenizerFast
) -> None:
    """Shows one usable example as the model sees it, its target tokens marked."""
    if not any(t.status == "ok" for t in tokenized):
        logging.warning("No row is usable; see the statuses in examples/")
    first = next((t for t in tokenized if t.status == "ok" and t.num_target_tokens), None)
    if first:
        logging.info("First usable example:\n%s", describe(first, tokenizer))


def key_of(tokenized: TokenizedExample) -> Key:
    """What a row is called in the store."""
    return tokenized.example.group, tokenized.example.example_id


def finished_positions(store: Store, tokenized: Sequence[TokenizedExample]) -> set[int]:
    """Positions of the rows that the store holds already.

    Raises:
      GradjaxError: if the store has rows that the data no longer has, or other ones.
    """
    positions = {(t.example.group, t.example.example_id): i for i, t in enumerate(tokenized)}
    groups = {t.example.group for t in tokenized}
    finished = set()
    for (group, example_id), found in store.finished.items():
        position = positions.get((group, example_id))
        if position is None:
            if group in groups:
                raise GradjaxError(
                    f"{store.directory} holds row {example_id} of group {group}, which this run's "
                    "data or --limit leaves out; give all of it, another --output_dir, or "
                    "--overwrite to replace the run"
                )
        elif tokenized[position].example.row_hash != found.row_hash:
            raise GradjaxError(
                f"{store.directory} holds another row {example_id} of group {group} than the data "
                "has now; give the same data, another --output_dir, or --overwrite"
            )
        else:
            finished.add(position)
    return finished


def require_rows(
    directory: str | Path, rows: Sequence[TokenizedExample], there: Collection[Key]
) -> None:
    """Raises GradjaxError unless all of the rows are there."""
    missing = sum(key_of(row) not in there for row in rows)
    if missing:
        raise GradjaxError(
            f"{directory} lacks {missing} of {len(rows)} rows although the run has "
            "ended; run the same command again, and report this as a bug if it persists"
        )


def log_truncation(tokenized: Sequence[TokenizedExample]) -> None:
    """Says how many rows of each group were cut: their spectra are of a part of the response."""
    cut = Counter(t.example.group for t in tokenized if t.truncated and t.status == "ok")
    for group, count in cut.items():
        logging.warning("%s: %d rows cut at --max_length", group, count)
