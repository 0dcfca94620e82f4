"""A whole run on one page: rows -> tokens -> batches -> gradients -> spectra -> store."""

import dataclasses
import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from gradjax.checkpoints.pretrained import load_weights
from gradjax.config import RunConfig
from gradjax.data.usable import describe_unusable
from gradjax.device import Device, keep_compiled_programs, local_device, parse_topology
from gradjax.distributed import Processes, join
from gradjax.errors import GradjaxError
from gradjax.hashing import sha256
from gradjax.model.decoder import Decoder
from gradjax.model.parallel import log_unsplit
from gradjax.runs.compiled_plan import compile_plan, format_compiled
from gradjax.runs.compilers import missing_compiler
from gradjax.runs.compute import compute_results
from gradjax.runs.cost import Plan, disk_bytes, estimated_seconds, format_plan, require_fit
from gradjax.runs.inputs import (
    Inputs,
    log_first_example,
    log_inputs,
    log_truncation,
    read_inputs,
    require_rows,
)
from gradjax.runs.layout import (
    format_shapes,
    lay_out,
    local_rows,
    remedies,
    row_batches,
    unfinished,
)
from gradjax.runs.manifest import describe_invocation, describe_machine, manifest, number_settings
from gradjax.runs.progress import BackgroundWriter, shards, with_progress
from gradjax.sharding import make_mesh, parse_mesh
from gradjax.spectra.decompose import resolved_route
from gradjax.storage.directory import RUN, Directory
from gradjax.storage.store import open_store, require_run
from gradjax.structs import ExampleResult


def run(config: RunConfig) -> str | Path:
    """Runs what the config asks for, or the rest of it; returns the store's directory.

    Every input row is in the store's `examples/` when this returns, but for those of other
    processes that still work (`results.rows_to_come`). What is refused, and a run with nothing
    left to do, changes nothing.

    Raises:
      GradjaxError: for a fault of the run itself; rows finished before it stay.
    """
    with join(
        config.coordinator_address,
        config.num_processes,
        config.process_id,
        sharded=config.processes == "sharded",
    ) as processes:
        keep_compiled_programs()
        device = _agreed_device(processes)
        resolved_route(config.spectra, device.platform)  # refused before anything is read
        inputs = read_inputs(config)
        tokenized, finished = inputs.tokenized, inputs.finished
        planned = _lay_out(config, inputs, device, processes)
        mesh = make_mesh(planned.mesh, processes.devices())
        log_inputs(config, inputs, mesh)
        log_unsplit(mesh, inputs.model)

        settings = number_settings(config, inputs, device.platform)
        _require_run(inputs, settings)
        _require_one_run(processes, settings, inputs, planned)

        # Sharded processes compute every batch together, independent ones take turns.
        share = slice(None) if processes.sharded else slice(processes.index, None, processes.count)
        batches = planned.batches[share]
        batch_among = partial(row_batches, config, inputs, device, mesh.size)
        left = unfinished(batches, finished, batch_among)
        waiting = [tokenized[row] for batch in left for row in local_rows(mesh, batch)]
        unusable = [
            inputs.with_texts(ExampleResult(t, t.status, t.reason))
            for position, t in enumerate(tokenized)
            if t.status != "ok" and position not in finished and processes.index == 0
        ]
        _log_counts(inputs, len(waiting) if processes.count > 1 else None)
        if len(finished) < len(tokenized):
            log_first_example(tokenized, inputs.tokenizer)
            # Before anything is written: a run is replaced only by one whose model is sound.
            decoder = _load(config, inputs, mesh) if left else None
            machines = [json.loads(m) for m in processes.exchange(json.dumps(describe_machine()))]
            invocation = describe_invocation(config, inputs, planned.mesh, machines)
            with open_store(
                inputs.directory,
                settings,
                inputs.found,
                overwrite=config.overwrite,
                process=processes.index,
                num_processes=processes.count,
                barrier=processes.barrier,
            ) as store:
                store.write_manifest(manifest(config, settings, inputs, invocation))
                processes.part()
                store.append(unusable)
                if decoder:
                    results = compute_results(decoder, tokenized, config.spectra, left, device)
                    whole = ([*map(inputs.with_texts, batch)] for batch in results)
                    reported = with_progress(whole, waiting)
                    with BackgroundWriter(store, config.store_singular_values) as writer:
                        for shard in shards(reported):
                            writer.append(shard)
                processes.barrier()  # of sharded ones, which each hold some rows of every batch
                require_rows(store, [*(result.tokenized for result in unusable), *waiting])
        log_truncation(tokenized)
        return inputs.directory


def _require_run(inputs: Inputs, settings: dict[str, Any]) -> None:
    """Raises GradjaxError unless the store's run has these settings; models are said by name."""
    manifest = inputs.found.manifest
    if manifest and manifest["settings"].get("model") != settings["model"]:
        there = manifest["settings"] | {
            "model": f"{manifest['model']['source']}, {manifest['settings'].get('model')}"
        }
        manifest = manifest | {"settings": there}
        settings = settings | {"model": f"{inputs.checkpoint.source}, {settings['model']}"}
    require_run(Directory(inputs.directory, RUN), settings, manifest)


def _log_counts(inputs: Inputs, here: int | None) -> None:
    """Says what is to be done, in numbers that add up to the rows, and how much of it here."""
    tokenized, finished = inputs.tokenized, inputs.finished
    unusable = sum(t.status != "ok" for i, t in enumerate(tokenized) if i not in finished)
    logging.info(
        "%s rows: %s finished before, %s to compute%s, %s not usable",
        f"{len(tokenized):,}",
        f"{len(finished):,}",
        f"{len(tokenized) - len(finished) - unusable:,}",
        "" if here is None else f" ({here:,} of them here)",
        f"{unusable:,}",
    )


def print_plan(config: RunConfig, topology: str | None = None) -> None:
    """What `--plan` asks for; reads the model's config, its tokenizer and the data.

    Args:
      topology: devices to plan for, as of `parse_topology`; those at hand if None.

    Raises:
      GradjaxError: as `run`, and, after printing, if the run would not fit.
    """
    if topology is None:
        device, devices = _devices_at_hand(config)
    else:
        device, devices = parse_topology(topology)
        if config.mesh and (product := math.prod(parse_mesh(config.mesh).values())) != devices:
            raise GradjaxError(
                f"--mesh={config.mesh} is for {product} devices, and --topology={topology} has "
                f"{devices}; give sizes whose product is {devices}"
            )
    resolved_route(config.spectra, device.platform)
    # Of a whole run, whatever a store holds of it.
    inputs = read_inputs(dataclasses.replace(config, overwrite=True))
    planned = lay_out(config, inputs, device, devices)
    disk = disk_bytes(
        inputs.model,
        config.spectra,
        inputs.tokenized,
        inputs.texts.num_bytes,
        singular_values=config.store_singular_values,
    )
    print(format_plan(planned, config.dtype, estimated_seconds(planned, config.dtype), disk))
    print(format_shapes(config, inputs, planned))
    if unusable := describe_unusable((t.example, t.status, t.reason) for t in inputs.tokenized):
        print(f"not usable  {unusable}")
    require_fit(planned, remedies(config, inputs, device, planned.mesh))
    if topology is not None:
        _print_compiled(config, inputs, planned)


def _print_compiled(config: RunConfig, inputs: Inputs, planned: Plan) -> None:
    """The plan by the compiler of devices that are not here, if it is installed."""
    if planned.fullest is None or config.spectra.spectrum == "dense":
        return
    if missing := missing_compiler(planned.device):
        print(f"compiler    not asked: {missing}")
        return
    sys.stdout.flush()  # compiling may take minutes
    found = compile_plan(config, inputs.model, planned)
    print(format_compiled(found))
    require_fit(found.plan, remedies(config, inputs, planned.device, planned.mesh))


def _devices_at_hand(config: RunConfig) -> tuple[Device, int]:
    sharded = config.processes == "sharded"
    processes = config.num_processes or 1 if sharded else 1
    return local_device(), jax.local_device_count() * processes


def _load(config: RunConfig, inputs: Inputs, mesh: Mesh) -> Decoder:
    return load_weights(
        inputs.checkpoint,
        inputs.model,
        config.dtype,
        random_init=config.random_init,
        seed=config.seed,
        mesh=mesh,
    )


def _agreed_device(processes: Processes) -> Device:
    """The kind of the devices; of the least memory of all processes, whose plans must be equal."""
    device = local_device()
    return dataclasses.replace(device, memory=min(map(int, processes.exchange(str(device.memory)))))


def _lay_out(config: RunConfig, inputs: Inputs, device: Device, processes: Processes) -> Plan:
    """The same batches in every process; raises GradjaxError where they do not fit."""
    planned = lay_out(config, inputs, device, len(processes.devices()))
    others = 1 if processes.sharded else processes.count
    require_fit(planned, remedies(config, inputs, device, planned.mesh, others))
    return planned


def _require_one_run(
    processes: Processes, settings: dict[str, object], inputs: Inputs, planned: Plan
) -> None:
    """Raises GradjaxError unless all processes have begun the same run, at the same point."""
    data = {group: (of["rows"], of["hash"]) for group, of in inputs.data.items()}
    said = (settings, data, planned.mesh, planned.batches, inputs.found.shards)
    processes.require_same(sha256(repr(said)))
