"""A whole run on one page: rows -> tokens -> batches -> gradients -> spectra -> store."""

import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from gradjax.checkpoints.pretrained import load_weights
from gradjax.config import RunConfig
from gradjax.device import Device, keep_compiled_programs, local_device, parse_topology
from gradjax.distributed import Processes, join
from gradjax.errors import GradjaxError
from gradjax.hashing import sha256
from gradjax.model.config import DecoderConfig
from gradjax.model.decoder import Decoder
from gradjax.model.parallel import log_unsplit
from gradjax.runs.compiled_plan import compile_plan, format_compiled
from gradjax.runs.compilers import missing_compiler
from gradjax.runs.compute import compute_results
from gradjax.runs.cost import Plan, disk_bytes, estimated_seconds, format_plan, require_fit
from gradjax.runs.inputs import Inputs, log_first_example, log_inputs, read_inputs
from gradjax.runs.layout import (
    batch_rows,
    format_shapes,
    lay_out,
    local_rows,
    remedies,
    unfinished,
)
from gradjax.runs.manifest import describe_invocation, describe_machine, manifest, number_settings
from gradjax.runs.progress import BackgroundWriter, shards, with_progress
from gradjax.runs.windows import (
    ReadAhead,
    Window,
    read_sample,
    read_windows,
    with_target_tokens,
)
from gradjax.sharding import DATA, format_mesh, make_mesh, parse_mesh
from gradjax.spectra.decompose import resolved_route
from gradjax.storage.directory import RUN, Directory
from gradjax.storage.results import rows_to_come
from gradjax.storage.store import Key, Store, open_store, read_table, require_run
from gradjax.structs import COMPUTED, Example, ExampleResult, TokenizedExample


def run(config: RunConfig) -> str | Path:
    """Runs what the config asks for, or the rest of it; returns the store's directory.

    Every input row is in the store's `examples/` when this returns, but for those of other
    processes that still work (`results.rows_to_come`). What is refused, and a run with nothing
    left to do, changes nothing that is there; a new run whose data turn out faulty behind the first
    window keeps what it has finished by then.

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
        config = with_target_tokens(config, inputs)
        # Sharded processes compute every batch together, independent ones have rows of their own.
        share = (0, 1) if processes.sharded else (processes.index, processes.count)
        rows = read_windows(config, inputs, *share)
        with ReadAhead(rows, in_order=processes.sharded) as ahead:
            planned = _lay_out(config, inputs, device, processes, ahead)
            window, plan, shared = next(planned)
            _agreed_data(processes, ahead)  # refuses unusable data before any weight is read
            mesh = make_mesh(plan.mesh, processes.devices())
            log_inputs(config, inputs, window.data, mesh)
            log_unsplit(mesh, inputs.model)

            settings = number_settings(config, inputs, device.platform)
            _require_run(inputs, settings)
            _require_one_run(processes, settings, inputs, window, plan.mesh)
            while not (window.left or window.last):
                window, plan, shared = next(planned)
            if window.last:
                _log_counts(ahead, processes)
            if config.overwrite or inputs.found.manifest:
                ahead.settle()  # what is there is not touched if the rest is refused
            before = inputs.found.manifest.get("data", {})
            if window.left or any(before.get(g, {}).get("rows", 0) is None for g in window.data):
                log_first_example(window.tokenized, inputs.tokenizer)
                # Before anything is written: a run is replaced only by one whose model is sound.
                needed = window.to_compute or not window.last
                decoder = _load(config, inputs, mesh) if needed else None
                machines = map(json.loads, processes.exchange(json.dumps(describe_machine())))
                invocation = describe_invocation(config, inputs, plan.mesh, [*machines])
                about = partial(manifest, config, settings, inputs, invocation)
                data = _agreed_data(processes, ahead)
                with open_store(
                    inputs.directory,
                    settings,
                    inputs.found,
                    overwrite=config.overwrite,
                    process=processes.index,
                    num_processes=processes.count,
                    barrier=processes.barrier,
                ) as store:
                    store.write_manifest(about(data))
                    processes.part()
                    waiting: list[Key] = []
                    rest = itertools.chain([(window, plan, shared)], planned)
                    results = _computed(config, inputs, decoder, device, processes, rest, waiting)
                    reported = _reported(results, ahead, processes, counted=window.last)
                    with BackgroundWriter(store, config.store_singular_values) as writer:
                        for shard in shards(reported):
                            writer.append(shard)
                    processes.barrier()  # sharded ones each hold some rows of every batch
                    _require_rows(store, waiting)
                    if not window.last:
                        read = {g: of for g, of in data.items() if of["rows"] is not None}
                        store.write_manifest(about(_agreed_data(processes, ahead) | read))
                        if processes.count > 1 and not processes.sharded:
                            _complete(store, ahead, inputs.model.max_positions)
        return inputs.directory


def _computed(
    config: RunConfig,
    inputs: Inputs,
    decoder: Decoder | None,
    device: Device,
    processes: Processes,
    planned: Iterable[tuple[Window, Plan, frozenset[int] | None]],
    waiting: list[Key],
) -> Iterator[list[ExampleResult]]:
    """What this process finds out about each window's rows: the unusable ones, then by batches.

    Args:
      waiting: takes the rows that are to come.
    """
    for window, plan, shared in planned:
        unusable = [] if processes.sharded and processes.index else window.unusable
        waiting += [result.tokenized.example.key for result in unusable]
        if unusable:
            yield unusable
        rows, model, devices = window.tokenized, inputs.model, math.prod(plan.mesh.values())
        batch_among = partial(
            batch_rows,
            rows,
            config.spectra,
            model,
            device,
            config.batch_tokens,
            devices,
            shared=shared,
        )
        left = unfinished(plan.batches, window.finished, batch_among)
        if decoder and left:
            here = [row for batch in left for row in local_rows(decoder.mesh, batch)]
            waiting += [rows[row].example.key for row in here]
            for batch in compute_results(decoder, rows, config.spectra, left, device):
                yield [*map(window.with_texts, batch)]


def _reported(
    results: Iterator[list[ExampleResult]],
    ahead: ReadAhead,
    processes: Processes,
    *,
    counted: bool,
) -> Iterator[list[ExampleResult]]:
    """Passes results on, with their progress; stops at what reading has come to meanwhile.

    Args:
      counted: whether it is said already how many rows there are.
    """
    for batch in with_progress(results, ahead, processes.count if processes.sharded else 1):
        ahead.check()
        if ahead.complete and not counted:
            counted = True
            _log_counts(ahead, processes)
        yield batch


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


def _log_counts(ahead: ReadAhead, processes: Processes) -> None:
    """Says what is to be done, in numbers that add up to the rows where one process does it."""
    logging.info(
        "%s rows: %s finished before, %s to compute%s, %s not usable",
        f"{ahead.rows:,}",
        f"{ahead.finished:,}",
        f"{ahead.to_compute:,}",
        " here" if processes.count > 1 and not processes.sharded else "",
        f"{ahead.unusable:,}",
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
    config = with_target_tokens(config, inputs)
    windows, sample = read_sample(config, inputs)
    rows = [row for window in windows for row in window.tokenized]
    shared = () if sample or len(windows) > 1 else None
    planned = lay_out(config, inputs.model, rows, device, devices, shared)
    disk = disk_bytes(
        inputs.model,
        config.spectra,
        rows,
        sum(window.texts.num_bytes for window in windows),
        singular_values=config.store_singular_values,
    )
    if sample:
        print(f"sample      the first {sample:,} rows of each group; all below is for these")
    print(format_plan(planned, config.dtype, estimated_seconds(planned, config.dtype), disk))
    print(format_shapes(config, inputs.model, rows, planned))
    for tally in windows[-1].tallies:
        if tally.unusable:
            print(f"not usable  {tally.source.group}: {tally.unusable}")
    require_fit(planned, remedies(config, inputs.model, rows, device, planned.mesh))
    if topology is not None:
        _print_compiled(config, inputs.model, rows, planned)


def _print_compiled(
    config: RunConfig, model: DecoderConfig, rows: Sequence[TokenizedExample], planned: Plan
) -> None:
    """The plan by the compiler of devices that are not here, if it is installed."""
    if planned.fullest is None or config.spectra.spectrum == "dense":
        return
    if missing := missing_compiler(planned.device):
        print(f"compiler    not asked: {missing}")
        return
    sys.stdout.flush()  # compiling may take minutes
    found = compile_plan(config, model, planned)
    print(format_compiled(found))
    require_fit(found.plan, remedies(config, model, rows, planned.device, planned.mesh))


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


def _lay_out(
    config: RunConfig,
    inputs: Inputs,
    device: Device,
    processes: Processes,
    windows: Iterable[Window],
) -> Iterator[tuple[Window, Plan, frozenset[int] | None]]:
    """Each window's batches, on the mesh of the first, and the padded lengths that have programs.

    Later windows take the shapes of earlier ones; there are no such lengths where there is one
    window. The mesh is one that holds rows of `--max_length`, where more rows are to come.

    Raises:
      GradjaxError: for a window whose batches do not fit.
    """
    shared: set[int] | None = None
    devices = len(processes.devices())
    agreed = False
    for window in windows:
        if shared is None and not window.last:
            shared = set()
        rows = window.tokenized
        if not agreed:
            longest = [] if window.last else [_longest_row(config)]
            mesh = lay_out(config, inputs.model, [*rows, *longest], device, devices, shared).mesh
            mesh = format_mesh(_agreed_mesh(processes, mesh))
            config, agreed = dataclasses.replace(config, mesh=mesh), True
        plan = lay_out(config, inputs.model, rows, device, devices, shared)
        others = 1 if processes.sharded else processes.count
        require_fit(plan, remedies(config, inputs.model, rows, device, plan.mesh, others))
        if processes.sharded:
            processes.require_same(sha256(repr((window.hashed, plan.batches))))
        if shared is not None:
            shared |= {batch.length for batch in plan.batches}
        yield window, plan, None if shared is None else frozenset(shared)


def _longest_row(config: RunConfig) -> TokenizedExample:
    """One that may still come."""
    length = config.tokens.max_length
    tokens, targets = np.broadcast_to(np.int32(0), length), np.broadcast_to(np.bool_(True), length)
    return TokenizedExample(Example("", 0, ""), tokens, targets)


def _agreed_mesh(processes: Processes, mesh: dict[str, int]) -> dict[str, int]:
    """That of the process with the longest row: it splits the weights most."""
    meshes = [json.loads(other) for other in processes.exchange(json.dumps(mesh))]
    return min(meshes, key=lambda mesh: (mesh[DATA], sorted(mesh.items())))


def _agreed_data(processes: Processes, ahead: ReadAhead) -> dict[str, dict[str, Any]]:
    """What the manifest says of each group by now.

    Raises:
      GradjaxError: if no row of one is usable, in any process.
    """
    own = {
        t.source.group: (t.usable, t.beyond_positions, t.unusable and t.refusal)
        for t in ahead.tallies
    }
    every = [json.loads(other) for other in processes.exchange(json.dumps(own))]
    every = every[:1] if processes.sharded else every  # which all judge all rows
    data = dict(ahead.data)
    if len(every) < processes.count and not processes.sharded:
        return data  # independent ones have parted
    for tally in ahead.tallies:
        group = tally.source.group
        said = [other.get(group, (0, 0, "")) for other in every]
        beyond = sum(rows for _, rows, _ in said)
        if not any(usable for usable, _, _ in said):
            raise GradjaxError(next(refusal for _, _, refusal in said if refusal))
        if beyond:
            data[group] = data[group] | {"rows_beyond_positions": beyond}
    return data


def _complete(store: Store, ahead: ReadAhead, max_positions: int) -> None:
    """Says in the manifest what only all rows tell, if this is the last of independent processes.

    Raises:
      GradjaxError: if no row of a group is usable.
    """
    if rows_to_come(store.directory) != 0:
        return
    rows = read_table(store.directory, "examples", ["group", "status", "num_tokens"]).to_pandas()
    rows = rows[rows["status"].isin(COMPUTED)]
    beyond = rows.loc[rows["num_tokens"] > max_positions, "group"].value_counts()
    store.add_to_data({group: {"rows_beyond_positions": int(n)} for group, n in beyond.items()})
    for tally in ahead.tallies:
        if tally.source.group not in set(rows["group"]):
            raise GradjaxError(tally.refusal)


def _require_rows(store: Store, rows: Sequence[Key]) -> None:
    """Raises GradjaxError unless the store has all of the rows."""
    missing = sum(row not in store.finished for row in rows)
    if missing:
        raise GradjaxError(
            f"{store.directory} lacks {missing} of {len(rows)} rows although the run has "
            "ended; run the same command again, and report this as a bug if it persists"
        )


def _require_one_run(
    processes: Processes,
    settings: dict[str, object],
    inputs: Inputs,
    window: Window,
    mesh: dict[str, int],
) -> None:
    """Raises GradjaxError unless all processes have begun the same run, at the same point."""
    data = {group: (of["rows"], of["hash"]) for group, of in window.data.items()}
    said = (settings, window.hashed, data, mesh, inputs.found.shards)
    processes.require_same(sha256(repr(said)))
