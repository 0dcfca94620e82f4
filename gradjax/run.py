"""A whole run: the data flow from flags to the store as one visible loop."""

import dataclasses
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from absl import logging
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

import gradjax
from gradjax.compute import check_vocabulary, compute_results, resolved_route
from gradjax.config import RunConfig
from gradjax.data.examples import to_example
from gradjax.data.sources import Source, data_hash, parse_data_flags, read_rows
from gradjax.data.tokens import check_tokenizer, describe, tokenize
from gradjax.errors import GradjaxError
from gradjax.model.config import DecoderConfig
from gradjax.model.hf_config import read_config
from gradjax.model.parameters import block_parameters
from gradjax.model.pretrained import identity, load_weights
from gradjax.model.registry import Checkpoint, load_tokenizer, resolve
from gradjax.store import Store, open_store
from gradjax.structs import ExampleResult, TokenizedExample

# A shard is written when this much work has come together: less is lost when a run is killed,
# more makes fewer files.
_FLUSH_SECONDS = 10.0
_FLUSH_VALUES = 16_000_000  # singular values held in memory


def run(config: RunConfig) -> Path:
    """Runs what the config asks for, or the rest of it; returns the store's directory.

    Every input row is in the store's `examples/` when this returns.

    Raises:
      GradjaxError: for a fault of the run itself; rows finished before it stay.
    """
    checkpoint = resolve(config.model, weights=not config.random_init)
    decoder_config = read_config(checkpoint.directory)
    config.spectra.layer_numbers(decoder_config.num_layers)  # refused before anything is read
    tokenizer = load_tokenizer(checkpoint.directory)
    check_tokenizer(tokenizer, config.tokens)

    rows = {source: read_rows(source, config.limit) for source in parse_data_flags(config.data)}
    tokenized = [
        tokenize(to_example(row, source.group, number), tokenizer, config.tokens)
        for source, source_rows in rows.items()
        for number, row in enumerate(source_rows)
    ]
    check_vocabulary(tokenized, decoder_config)
    log_first_example(tokenized, tokenizer)

    directory = Path(config.output_dir or f"runs/{checkpoint.name}")
    settings = number_settings(config, checkpoint, decoder_config, tokenizer)
    load = partial(
        load_weights,
        checkpoint.directory,
        config.dtype,
        random_init=config.random_init,
        seed=config.seed,
    )
    # A run is replaced only by one whose model is sound.
    decoder = load() if config.overwrite else None
    with open_store(directory, settings, overwrite=config.overwrite) as store:
        finished = finished_positions(store, tokenized)
        store.write_manifest(manifest(config, settings, checkpoint, decoder_config, rows, store))
        store.append(
            ExampleResult(t, t.status, t.reason)
            for i, t in enumerate(tokenized)
            if t.status != "ok" and i not in finished
        )
        left = [t for i, t in enumerate(tokenized) if t.status == "ok" and i not in finished]
        logging.info(
            "%d rows: %d finished before, %d to compute, %d not usable",
            len(tokenized),
            len(finished),
            len(left),
            sum(t.status != "ok" for t in tokenized),
        )
        if left:
            results = compute_results(
                decoder or load(), tokenized, config.spectra, config.batch_tokens, finished
            )
            for shard in shards(with_progress(results, left)):
                store.append(shard, singular_values=config.store_singular_values)
        require_every_row(store, tokenized)
    log_truncation(tokenized)
    return directory


def log_first_example(
    tokenized: Sequence[TokenizedExample], tokenizer: PreTrainedTokenizerFast
) -> None:
    """Shows one usable example as the model sees it, its target tokens marked."""
    first = next((t for t in tokenized if t.status == "ok"), None)
    if first is None:
        logging.warning("No row is usable; see the statuses in examples/")
    else:
        logging.info("First usable example:\n%s", describe(first, tokenizer))


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
        elif tokenized[position].example.row_hash != found:
            raise GradjaxError(
                f"{store.directory} holds another row {example_id} of group {group} than the data "
                "has now; give the same data, another --output_dir, or --overwrite"
            )
        else:
            finished.add(position)
    return finished


def with_progress(
    results: Iterator[list[ExampleResult]], left: Sequence[TokenizedExample]
) -> Iterator[list[ExampleResult]]:
    """Passes results on, with an ETA weighted by tokens: a bar on a terminal, else lines."""
    tokens = sum(t.num_tokens for t in left)
    terminal = sys.stderr.isatty()
    with tqdm(
        total=tokens,
        unit="tok",
        unit_scale=True,
        dynamic_ncols=True,
        mininterval=0.5 if terminal else 30,
        disable=not terminal,
    ) as bar:
        start = last = time.monotonic()
        done = rows = 0
        for batch in results:
            done += sum(r.tokenized.num_tokens for r in batch)
            rows += len(batch)
            bar.update(sum(r.tokenized.num_tokens for r in batch))
            now = time.monotonic()
            if not terminal and (now - last > 15 or done == tokens):
                last = now
                logging.info(
                    "%d of %d rows, %.0f %% of tokens, %.0f s left",
                    rows,
                    len(left),
                    100 * done / tokens,
                    (now - start) * (tokens - done) / done,
                )
            yield batch


def shards(batches: Iterator[list[ExampleResult]]) -> Iterator[list[ExampleResult]]:
    """Joins batches of results until they are worth a shard."""
    held: list[ExampleResult] = []
    values, since = 0, time.monotonic()
    for batch in batches:
        held += batch
        values += sum(s.singular_values.size for result in batch for s in result.spectra)
        if time.monotonic() - since > _FLUSH_SECONDS or values > _FLUSH_VALUES:
            yield held
            held, values, since = [], 0, time.monotonic()
    if held:
        yield held


def require_every_row(store: Store, tokenized: Sequence[TokenizedExample]) -> None:
    """Raises GradjaxError unless the store accounts for every row."""
    missing = sum((t.example.group, t.example.example_id) not in store.finished for t in tokenized)
    if missing:
        raise GradjaxError(
            f"{store.directory} lacks {missing} of {len(tokenized)} rows although the run has "
            "ended; run the same command again, and report this as a bug if it persists"
        )


def log_truncation(tokenized: Sequence[TokenizedExample]) -> None:
    """Says how many rows of each group were cut: their spectra are of a part of the response."""
    cut = Counter(t.example.group for t in tokenized if t.truncated and t.status == "ok")
    for group, count in cut.items():
        logging.warning("%s: %d rows cut at --max_length", group, count)


def number_settings(
    config: RunConfig,
    checkpoint: Checkpoint,
    decoder_config: DecoderConfig,
    tokenizer: PreTrainedTokenizerFast,
) -> dict[str, Any]:
    """What the numbers of a run depend on, beside its rows: equal, or not the same run."""
    template = str(tokenizer.chat_template or "")
    return {
        "model": (
            f"random weights, seed {config.seed}: {_sha256(repr(decoder_config))}"
            if config.random_init
            else identity(checkpoint)
        ),
        "tokenizer": _sha256(tokenizer.backend_tokenizer.to_str()),
        "template": _sha256(template) if config.tokens.prompt_format == "chat" else None,
        "dtype": config.dtype,
        **dataclasses.asdict(config.tokens),
        "spectrum": config.spectra.spectrum,
        "spectrum_route": (
            resolved_route(config.spectra) if config.spectra.spectrum == "factored" else None
        ),
        "layers": list(config.spectra.layer_numbers(decoder_config.num_layers)),
        "projections": list(config.spectra.projections),
        "similarity": config.spectra.similarity,
        "store_singular_values": config.store_singular_values,
    }


def manifest(
    config: RunConfig,
    settings: dict[str, Any],
    checkpoint: Checkpoint,
    decoder_config: DecoderConfig,
    rows: dict[Source, list[object]],
    store: Store,
) -> dict[str, Any]:
    """`run.json`: what was run, on what, with what."""
    flags = {
        **dataclasses.asdict(config.tokens),
        **dataclasses.asdict(config.spectra),
        **{
            field.name: getattr(config, field.name)
            for field in dataclasses.fields(config)
            if field.name not in ("tokens", "spectra")
        },
        "output_dir": str(store.directory),
    }
    packages = ("jax", "jaxlib", "flax", "transformers", "tokenizers", "numpy", "pyarrow")
    return {
        "settings": settings,
        "flags": flags,
        "model": {
            "name": checkpoint.name,
            "source": checkpoint.source,
            "revision": checkpoint.revision,
        },
        "gradient_shapes": {
            projection: block_parameters(decoder_config, layer=0)[projection].shape(decoder_config)
            for projection in config.spectra.projections
        },
        # Groups of an earlier call stay: groups may be added to a run.
        "data": store.manifest.get("data", {})
        | {
            source.group: {
                "source": source.location,
                "rows": len(source_rows),
                "hash": data_hash(source_rows),
            }
            for source, source_rows in rows.items()
        },
        "versions": {
            "gradjax": gradjax.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "device": {
            "platform": jax.default_backend(),
            "kind": jax.devices()[0].device_kind,
            "count": jax.device_count(),
        },
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "git_revision": _git_revision(),
    }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _git_revision() -> str | None:
    """The commit of the checkout that gradjax runs from, `-dirty` if it was changed."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None
