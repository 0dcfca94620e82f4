"""What a run starts from: the model's config, its tokenizer, the sources and the store."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from gradjax.checkpoints.hf_config import read_config
from gradjax.checkpoints.resolve import DEMO, Checkpoint, load_tokenizer, resolve
from gradjax.config import RunConfig
from gradjax.data.sources import Source, parse_data_flags
from gradjax.data.tokens import check_tokenizer, describe
from gradjax.hashing import sha256
from gradjax.model.config import DecoderConfig
from gradjax.model.parameters import count_parameters
from gradjax.storage.directory import RUN, Directory
from gradjax.storage.store import NOTHING, Found, find_run
from gradjax.structs import TokenizedExample

_LONGEST_NAME = 100  # characters of a default directory


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a run starts from, before any row or weight is read."""

    checkpoint: Checkpoint  # without weights
    model: DecoderConfig
    tokenizer: PreTrainedTokenizerFast
    sources: tuple[Source, ...]
    directory: str | Path  # the store's, a URL as str
    found: Found  # what the store holds


def read_inputs(config: RunConfig) -> Inputs:
    """Reads the model's config, its tokenizer and the store.

    Raises:
      GradjaxError: for a fault of any of them.
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
    return Inputs(checkpoint, model, tokenizer, sources, directory, found)


def _find(config: RunConfig, directory: str | Path) -> Found:
    """What the store holds of this run; refuses other settings before anything is read."""
    if config.overwrite:
        return NOTHING
    found = find_run(directory)
    if found.manifest:
        asked, there = config.settings, found.manifest["settings"]
        if config.auto_target_tokens:
            asked["target_tokens"] = there.get("target_tokens") or "auto"
        names = asked.keys() | {"reading"}
        known = {name: there[name] for name in names if name in there}
        Directory(directory, RUN).require_same("a run", known, asked)
    return found


def default_directory(model: str, sources: Sequence[Source]) -> Path:
    """`runs/demo` for the embedded model on the embedded groups, else `runs/{model}-{groups}`."""
    groups = dict.fromkeys(DEMO if s.location == DEMO else s.group for s in sources)
    name = "-".join([model, *groups])
    if model == DEMO and all(s.location == DEMO for s in sources):
        name = DEMO
    if len(name) > _LONGEST_NAME:
        name = f"{name[:_LONGEST_NAME]}-{sha256(name)[:8]}"
    return Path("runs") / name


def log_inputs(
    config: RunConfig, inputs: Inputs, data: Mapping[str, Mapping[str, Any]], mesh: Mesh
) -> None:
    """The log's first line: what runs on what.

    Args:
      data: what the manifest says of each group by now.
    """
    rows = ", ".join(
        f"{group}, being read" if of["rows"] is None else f"{of['rows']:,} of {group}"
        for group, of in data.items()
    )
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
