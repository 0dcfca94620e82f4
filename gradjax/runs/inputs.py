"""What a run starts from: the model's config, its tokenizer, and every row as tokens."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from absl import logging
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from gradjax.checkpoints.hf_config import read_config
from gradjax.checkpoints.resolve import DEMO, Checkpoint, load_tokenizer, resolve
from gradjax.config import RunConfig, TokenConfig
from gradjax.data.examples import to_example
from gradjax.data.sources import Source, describe_rows, parse_data_flags, stream_rows
from gradjax.data.texts import Texts
from gradjax.data.tokens import (
    ENCODED_TOGETHER,
    check_tokenizer,
    check_vocabulary,
    describe,
    tokenize_rows,
)
from gradjax.data.usable import report_ignored, report_usable
from gradjax.errors import GradjaxError
from gradjax.hashing import sha256
from gradjax.model.config import DecoderConfig
from gradjax.model.parameters import count_parameters
from gradjax.storage.directory import RUN, Directory
from gradjax.storage.store import NOTHING, FinishedRow, Found, Key, Store, find_run
from gradjax.structs import Example, ExampleResult, Status, TokenizedExample

_LONGEST_NAME = 100  # characters of a default directory


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a run starts from, before any weight is read."""

    checkpoint: Checkpoint  # without weights
    model: DecoderConfig
    tokenizer: PreTrainedTokenizerFast
    data: dict[str, dict[str, Any]]  # by group: source, number of rows, hash
    tokenized: list[TokenizedExample]  # without texts
    texts: Texts  # by position
    first: dict[str, int]  # position of each group's first row
    directory: str | Path  # the store's, a URL as str
    found: Found  # what the store holds
    finished: frozenset[int]  # positions in `tokenized` of the rows among that

    def with_texts(self, result: ExampleResult) -> ExampleResult:
        """A result whose row has its question and answer again."""
        row = result.tokenized
        position = self.first[row.example.group] + row.example.example_id
        whole = self.texts.restore(position, row.example)
        return dataclasses.replace(result, tokenized=dataclasses.replace(row, example=whole))


def read_inputs(config: RunConfig) -> Inputs:
    """Reads the model's config, the store and the data; finished rows keep only their length.

    Raises:
      GradjaxError: for a fault of any of them, or if the store holds other rows than the data.
    """
    directory = config.output_dir
    found = _find(config, directory) if directory else NOTHING
    checkpoint = resolve(config.model, revision=config.revision)
    model = read_config(checkpoint.directory)
    config.spectra.layer_numbers(model.num_layers)  # refused before anything is read
    tokenizer = load_tokenizer(checkpoint.directory)
    check_tokenizer(tokenizer, config.tokens)
    sources = parse_data_flags(config.data, config.reading)
    if not directory:
        directory = default_directory(checkpoint.name, sources)
        found = _find(config, directory)
    data: dict[str, dict[str, Any]] = {}
    tokenized: list[TokenizedExample] = []
    texts, first = Texts(), {}
    for source in sources:
        rows = enumerate(stream_rows(source, config.limit))
        examples = (to_example(row, source.group, number, source.reading) for number, row in rows)
        own = [*_tokenized(examples, found, tokenizer, config.tokens, texts)]
        data[source.group] = describe_rows(source, [row.example.row_hash for row in own])
        data[source.group] |= _report_rows(source.group, own, model.max_positions)
        first[source.group] = len(tokenized)
        tokenized += own
    check_vocabulary(tokenized, model.vocab_size)
    finished = _finished_positions(directory, found, tokenized)
    return Inputs(
        checkpoint, model, tokenizer, data, tokenized, texts, first, directory, found, finished
    )


def _tokenized(
    examples: Iterator[Example],
    found: Found,
    tokenizer: PreTrainedTokenizerFast,
    settings: TokenConfig,
    texts: Texts,
) -> Iterator[TokenizedExample]:
    """The rows as tokens; their texts go into `texts`."""

    def finished(example: Example) -> FinishedRow | None:
        before = found.finished.get((example.group, example.example_id))
        return before if before and before.row_hash == example.row_hash else None

    while together := list(itertools.islice(examples, ENCODED_TOGETHER)):
        new = (example for example in together if not finished(example))
        tokenized = tokenize_rows(new, tokenizer, settings)
        rows = []
        for example in together:
            before = finished(example)
            rows.append(_finished_before(example, before) if before else next(tokenized))
        yield from _packed(rows, texts)


def _packed(rows: list[TokenizedExample], texts: Texts) -> Iterator[TokenizedExample]:
    """The rows without texts, their tokens and targets in one array each: small in memory."""
    tokens = np.concatenate([row.tokens for row in rows])
    targets = np.concatenate([row.targets for row in rows])
    end = 0
    for row in rows:
        start, end = end, end + row.num_tokens
        own = {"tokens": tokens[start:end], "targets": targets[start:end]}
        yield dataclasses.replace(row, example=texts.append(row.example), **own)


def _find(config: RunConfig, directory: str | Path) -> Found:
    """What the store holds of this run; refuses other settings before anything is read."""
    if config.overwrite:
        return NOTHING
    found = find_run(directory)
    if found.manifest:
        asked, there = config.settings, found.manifest["settings"]
        names = asked.keys() | {"reading"}
        known = {name: there[name] for name in names if name in there}
        Directory(directory, RUN).require_same("a run", known, asked)
    return found


def _report_rows(
    group: str, rows: Sequence[TokenizedExample], max_positions: int
) -> dict[str, Any]:
    """Says what is not as it should be with a group's rows; returns what a manifest keeps of it."""
    report_usable(group, [(row.example, row.status, row.reason) for row in rows])
    said: dict[str, Any] = {}
    if ignored := report_ignored(group, (row.example for row in rows)):
        said["ignored_columns"] = ignored
    beyond = sum(row.status == "ok" and row.num_tokens > max_positions for row in rows)
    if beyond:
        said["rows_beyond_positions"] = beyond
        logging.warning(
            "%s: %s rows have more tokens than the %s positions that the model was made for "
            "(max_position_embeddings); their numbers are of text that it cannot read well; "
            "--max_length=%d cuts them",
            group,
            f"{beyond:,}",
            f"{max_positions:,}",
            max_positions,
        )
    return said


def default_directory(model: str, sources: Sequence[Source]) -> Path:
    """`runs/demo` for the embedded model on the embedded groups, else `runs/{model}-{groups}`."""
    groups = dict.fromkeys(DEMO if s.location == DEMO else s.group for s in sources)
    name = "-".join([model, *groups])
    if model == DEMO and all(s.location == DEMO for s in sources):
        name = DEMO
    if len(name) > _LONGEST_NAME:
        name = f"{name[:_LONGEST_NAME]}-{sha256(name)[:8]}"
    return Path("runs") / name


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


def log_inputs(config: RunConfig, inputs: Inputs, mesh: Mesh) -> None:
    """The log's first line: what runs on what."""
    rows = ", ".join(f"{of['rows']:,} of {group}" for group, of in inputs.data.items())
    logging.info(
        "%s (%s), %s parameters in %s, on %d x %s; rows: %s; into %s",
        inputs.checkpoint.name,
        inputs.checkpoint.source,
        f"{count_parameters(inputs.model):,}",
        config.dtype,
        mesh.size,
        mesh.devices.flat[0].device_kind,
        rows,
        inputs.directory,
    )


def log_first_example(
    tokenized: Sequence[TokenizedExample], tokenizer: PreTrainedTokenizerFast
) -> None:
    """Shows one usable example as the model sees it, its target tokens marked."""
    first = next((t for t in tokenized if t.status == "ok" and t.num_target_tokens), None)
    if first:
        logging.info("First usable example:\n%s", describe(first, tokenizer))


def key_of(tokenized: TokenizedExample) -> Key:
    """What a row is called in the store."""
    return tokenized.example.group, tokenized.example.example_id


def _finished_positions(
    directory: str | Path, found: Found, tokenized: Sequence[TokenizedExample]
) -> frozenset[int]:
    """Positions of the rows that the store holds already.

    Raises:
      GradjaxError: if the store has rows that the data no longer has, or other ones.
    """
    if not found.finished:
        return frozenset()
    positions = {(t.example.group, t.example.example_id): i for i, t in enumerate(tokenized)}
    groups = {t.example.group for t in tokenized}
    finished = set()
    for (group, example_id), before in found.finished.items():
        position = positions.get((group, example_id))
        if position is None:
            if group in groups:
                raise GradjaxError(
                    f"{directory} holds row {example_id} of group {group}, which this run's "
                    "data or --limit leaves out; give all of it, another --output_dir, or "
                    "--overwrite to replace the run"
                )
        elif tokenized[position].example.row_hash != before.row_hash:
            raise GradjaxError(
                f"{directory} holds another row {example_id} of group {group} than the data "
                "has now; give the same data, another --output_dir, or --overwrite"
            )
        else:
            finished.add(position)
    return frozenset(finished)


def require_rows(store: Store, rows: Sequence[TokenizedExample]) -> None:
    """Raises GradjaxError unless the store has all of the rows."""
    missing = sum(key_of(row) not in store.finished for row in rows)
    if missing:
        raise GradjaxError(
            f"{store.directory} lacks {missing} of {len(rows)} rows although the run has "
            "ended; run the same command again, and report this as a bug if it persists"
        )


def log_truncation(tokenized: Sequence[TokenizedExample]) -> None:
    """Says how many rows of each group were cut: their spectra are of a part of the response."""
    cut = Counter(t.example.group for t in tokenized if t.truncated and t.status == "ok")
    for group, count in cut.items():
        logging.warning("%s: %d rows cut at --max_length", group, count)
