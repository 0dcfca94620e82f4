"""A whole run: the data flow from flags to the store as one visible loop."""

import dataclasses
import hashlib
import importlib.metadata
import math
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

import gradjax
from gradjax.compute import (
    check_vocabulary,
    compute_results,
    default_batch_tokens,
    plan_rows,
    resolved_route,
    unfinished,
)
from gradjax.config import RunConfig
from gradjax.data.batches import MULTIPLE, BatchPlan
from gradjax.data.examples import to_example
from gradjax.data.sources import data_hash, parse_data_flags, read_rows
from gradjax.data.tokens import check_tokenizer, describe, tokenize
from gradjax.device import agree_on_memory, device_memory
from gradjax.errors import GradjaxError
from gradjax.model.config import DecoderConfig
from gradjax.model.hf_config import read_config
from gradjax.model.parameters import block_parameters
from gradjax.model.pretrained import identity, load_weights
from gradjax.model.registry import Checkpoint, load_tokenizer, resolve
from gradjax.plan import Plan, estimated_seconds, fits, format_plan, make_plan, require_fit
from gradjax.processes import Processes, join
from gradjax.sharding import DATA, local_slots, log_unsplit, make_mesh, parse_mesh
from gradjax.spectra.decompose import decomposes_on_host
from gradjax.store import FinishedRow, Key, Store, finished_rows, open_store
from gradjax.structs import Example, ExampleResult, Status, TokenizedExample

# A shard is written when this much work has come together: less is lost when a run is killed,
# more makes fewer files.
_FLUSH_SECONDS = 10.0
_FLUSH_VALUES = 16_000_000  # singular values held in memory
_FLUSH_ROWS = 256  # of a small model, whose values weigh less than the objects around them


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """What a run starts from, before any weight is read."""

    checkpoint: Checkpoint
    model: DecoderConfig
    tokenizer: PreTrainedTokenizerFast
    data: dict[str, dict[str, Any]]  # by group: source, number of rows, hash
    tokenized: list[TokenizedExample]


def run(config: RunConfig) -> str | Path:
    """Runs what the config asks for, or the rest of it; returns the store's directory.

    Every input row is in the store's `examples/` when this returns, but for those of other
    processes that still work (`summary.rows_to_come`).

    Raises:
      GradjaxError: for a fault of the run itself; rows finished before it stay.
    """
    with join(
        config.coordinator_address,
        config.num_processes,
        config.process_id,
        sharded=config.processes == "sharded",
    ) as processes:
        return _run(config, processes)


def keep_compiled_programs() -> None:
    """Keeps what is compiled for later runs on this machine, unless JAX was told where itself.

    In `$XDG_CACHE_HOME/gradjax` (`~/.cache/gradjax`); removing it does no harm.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        # Programs for one CPU may not run on another that shares the home directory.
        jax.config.update("jax_compilation_cache_dir", str(cache / "gradjax" / platform.node()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _run(config: RunConfig, processes: Processes) -> str | Path:
    keep_compiled_programs()
    checkpoint = resolve(config.model, weights=False)
    directory = config.output_dir or Path(f"runs/{checkpoint.name}")
    known = {} if config.overwrite else finished_rows(directory)
    inputs = read_inputs(config, checkpoint, known)
    tokenized = inputs.tokenized
    devices = processes.devices()
    if processes.count > 1:
        agree_on_memory(min(map(int, processes.exchange(str(device_memory())))))
    planned = lay_out(config, inputs, len(devices))
    others = 1 if processes.sharded else processes.count
    require_fit(planned, remedies(config, inputs, planned.mesh, others))
    checkpoint = resolve(config.model, weights=not config.random_init)
    inputs = dataclasses.replace(inputs, checkpoint=checkpoint)
    mesh = make_mesh(planned.mesh, devices)
    log_unsplit(mesh, inputs.model)
    log_first_example(tokenized, inputs.tokenizer)

    settings = number_settings(config, inputs)
    processes.require_same(_sha256(repr((settings, inputs.data, planned.mesh, planned.batches))))
    load = partial(
        load_weights,
        checkpoint,
        config.dtype,
        random_init=config.random_init,
        seed=config.seed,
        mesh=mesh,
    )
    # A run is replaced only by one whose model is sound.
    decoder = load() if config.overwrite else None
    with open_store(
        directory,
        settings,
        overwrite=config.overwrite,
        process=processes.index,
        num_processes=processes.count,
        barrier=processes.barrier,
    ) as store:
        store.write_manifest(manifest(config, settings, inputs, planned, store))
        processes.part()
        if any(store.finished.get(key) != row for key, row in known.items()):
            raise GradjaxError(f"{directory} was replaced while this run began; start it again")
        finished = finished_positions(store, tokenized)
        # Sharded processes compute every batch together, independent ones take turns.
        share = slice(None) if processes.sharded else slice(processes.index, None, processes.count)
        batches = planned.batches[share]
        if processes.index == 0:
            store.append(
                ExampleResult(t, t.status, t.reason)
                for i, t in enumerate(tokenized)
                if t.status != "ok" and i not in finished
            )
        plan_among = partial(_batches, config, inputs, mesh.size)
        left = unfinished(batches, finished, plan_among)
        waiting = [tokenized[row] for batch in left for row in local_rows(mesh, batch)]
        logging.info(
            "%d rows: %d finished before, %d to compute, %d not usable",
            len(tokenized),
            len(finished),
            len(waiting),
            sum(t.status != "ok" for t in tokenized),
        )
        if left:
            results = compute_results(decoder or load(), tokenized, config.spectra, left)
            append_behind(store, shards(with_progress(results, waiting)), config)
        processes.barrier()  # of sharded ones, which each hold some rows of every batch
        there = finished_rows(directory)
        mine = tokenized
        if processes.count > 1 and not processes.sharded:
            mine = [tokenized[row] for batch in batches for row in batch.rows]
        require_rows(directory, mine, there)
    log_truncation(tokenized)
    return directory


def print_plan(config: RunConfig) -> None:
    """What `--plan` asks for; reads the model's config, its tokenizer and the data.

    Raises:
      GradjaxError: as `run`, and, after printing, if the run would not fit.
    """
    inputs = read_inputs(config, resolve(config.model, weights=False), {})
    devices = jax.local_device_count()
    if config.processes == "sharded":
        devices *= config.num_processes or 1
    planned = lay_out(config, inputs, devices)
    print(format_plan(planned, config.dtype, estimated_seconds(planned, config.dtype)))
    require_fit(planned, remedies(config, inputs, planned.mesh))


def read_inputs(
    config: RunConfig, checkpoint: Checkpoint, known: Mapping[Key, FinishedRow]
) -> _Inputs:
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
    check_vocabulary(tokenized, model)
    return _Inputs(checkpoint, model, tokenizer, data, tokenized)


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


def lay_out(config: RunConfig, inputs: _Inputs, devices: int) -> Plan:
    """The mesh and the batches of a run on so many devices.

    Without `--mesh` it is `data` over all devices where the model fits one of them, else `fsdp`.
    """
    if config.mesh:
        mesh = parse_mesh(config.mesh)
        if config.spectra.spectrum == "dense" and math.prod(mesh.values()) > mesh[DATA]:
            raise GradjaxError(
                f"--mesh={config.mesh}: --spectrum=dense needs all weights on each device; use "
                f"--mesh=data:{math.prod(mesh.values())}"
            )
        return _plan(config, inputs, mesh)
    chosen = _plan(config, inputs, parse_mesh(f"data:{devices}"))
    if devices > 1 and not fits(chosen) and config.spectra.spectrum == "factored":
        return _plan(config, inputs, parse_mesh(f"fsdp:{devices}"))
    return chosen


def remedies(
    config: RunConfig, inputs: _Inputs, mesh: dict[str, int], processes: int = 1
) -> Iterator[tuple[str, Plan]]:
    """Flags that make a run need less memory, the least costly first, and the plans they give."""
    devices = math.prod(mesh.values())
    tokens = config.batch_tokens or default_batch_tokens()
    while (tokens := tokens // 2) >= MULTIPLE:
        changed = dataclasses.replace(config, batch_tokens=tokens)
        yield f"--batch_tokens={tokens}", _plan(changed, inputs, mesh)
    one_row = dataclasses.replace(config, batch_tokens=1)
    yield f"--mesh=fsdp:{devices}", _plan(config, inputs, parse_mesh(f"fsdp:{devices}"))
    if processes > 1:
        shared = parse_mesh(f"fsdp:{devices * processes}")
        yield "--processes=sharded", _plan(config, inputs, shared)
    narrow = dataclasses.replace(one_row, dtype="bfloat16")
    yield "--dtype=bfloat16 --batch_tokens=1", _plan(narrow, inputs, mesh)
    length = config.tokens.max_length
    while (length := length // 2) >= 512:
        cut = dataclasses.replace(config.tokens, max_length=length)
        changed = dataclasses.replace(one_row, tokens=cut)
        yield f"--max_length={length} --batch_tokens=1", _plan(changed, inputs, mesh)


def _plan(config: RunConfig, inputs: _Inputs, mesh: dict[str, int]) -> Plan:
    # The rows were cut at another --max_length where a remedy is tried.
    longest = -(-config.tokens.max_length // MULTIPLE) * MULTIPLE
    batches = [
        dataclasses.replace(batch, length=min(batch.length, longest))
        for batch in _batches(config, inputs, math.prod(mesh.values()))
    ]
    return make_plan(inputs.model, config.spectra, inputs.tokenized, batches, config.dtype, mesh)


def _batches(
    config: RunConfig, inputs: _Inputs, devices: int, among: Sequence[int] | None = None
) -> list[BatchPlan]:
    batch_tokens = config.batch_tokens
    return plan_rows(inputs.tokenized, config.spectra, inputs.model, batch_tokens, devices, among)


def append_behind(store: Store, written: Iterator[list[ExampleResult]], config: RunConfig) -> None:
    """Writes each shard in a thread of its own while the next one is computed."""
    waited = 0.0
    with ThreadPoolExecutor(1) as writer:
        writing: Future[None] | None = None
        for shard in written:
            if writing:
                since = time.monotonic()
                writing.result()
                waited += time.monotonic() - since
            writing = writer.submit(
                store.append, shard, singular_values=config.store_singular_values
            )
        if writing:
            writing.result()
    logging.info("Computing waited %.2f s for shards being written", waited)


def local_rows(mesh: Mesh, batch: BatchPlan) -> list[int]:
    """The rows of a batch that this process's devices compute."""
    slots = local_slots(mesh, batch.size)
    return [batch.rows[slot] for slot in slots if slot < len(batch.rows)]


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
            if not terminal and done and (now - last > 15 or done == tokens):
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
        full = values > _FLUSH_VALUES or len(held) >= _FLUSH_ROWS
        if full or time.monotonic() - since > _FLUSH_SECONDS:
            yield held
            held, values, since = [], 0, time.monotonic()
    if held:
        yield held


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


def number_settings(config: RunConfig, inputs: _Inputs) -> dict[str, Any]:
    """What the numbers of a run depend on, beside its rows: equal, or not the same run."""
    tokenizer, num_layers = inputs.tokenizer, inputs.model.num_layers
    template = str(tokenizer.chat_template or "")
    return {
        "model": (
            f"random weights, seed {config.seed}: {_sha256(repr(inputs.model))}"
            if config.random_init
            else identity(inputs.checkpoint)
        ),
        "tokenizer": _sha256(tokenizer.backend_tokenizer.to_str()),
        "template": _sha256(template) if config.tokens.prompt_format == "chat" else None,
        "dtype": config.dtype,
        **dataclasses.asdict(config.tokens),
        "spectrum": config.spectra.spectrum,
        "spectrum_route": (
            resolved_route(config.spectra) if config.spectra.spectrum == "factored" else None
        ),
        "layers": list(config.spectra.layer_numbers(num_layers)),
        "projections": list(config.spectra.projections),
        "similarity": config.spectra.similarity,
        "store_singular_values": config.store_singular_values,
    }


def manifest(
    config: RunConfig,
    settings: dict[str, Any],
    inputs: _Inputs,
    planned: Plan,
    store: Store,
) -> dict[str, Any]:
    """`run.json`: what was run, on what, with what."""
    checkpoint = inputs.checkpoint
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
            projection: block_parameters(inputs.model, layer=0)[projection].shape(inputs.model)
            for projection in config.spectra.projections
        },
        # Groups of an earlier call stay: groups may be added to a run.
        "data": store.manifest.get("data", {}) | inputs.data,
        "versions": {
            "gradjax": gradjax.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "device": {
            "platform": jax.default_backend(),
            "kind": jax.devices()[0].device_kind,
            "count": jax.device_count(),
            "mesh": planned.mesh,
            "decompositions": ("host" if decomposes_on_host(jax.default_backend()) else "device"),
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
