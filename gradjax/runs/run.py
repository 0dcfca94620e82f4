"""A whole run: the data flow from flags to the store as one visible loop."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
from absl import logging

from gradjax.checkpoints.pretrained import load_weights
from gradjax.checkpoints.resolve import resolve
from gradjax.config import RunConfig
from gradjax.device import (
    agree_on_memory,
    device_memory,
    keep_compiled_programs,
)
from gradjax.distributed import Processes, join
from gradjax.errors import GradjaxError
from gradjax.model.parallel import log_unsplit
from gradjax.runs.compute import compute_results
from gradjax.runs.cost import estimated_seconds, format_plan, require_fit
from gradjax.runs.inputs import (
    finished_positions,
    log_first_example,
    log_truncation,
    read_inputs,
    require_rows,
)
from gradjax.runs.layout import (
    lay_out,
    local_rows,
    remedies,
    row_batches,
    unfinished,
)
from gradjax.runs.manifest import _sha256, manifest, number_settings
from gradjax.runs.progress import (
    append_behind,
    shards,
    with_progress,
)
from gradjax.sharding import make_mesh
from gradjax.storage.store import finished_rows, open_store
from gradjax.structs import ExampleResult


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
        batch_among = partial(row_batches, config, inputs, mesh.size)
        left = unfinished(batches, finished, batch_among)
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
