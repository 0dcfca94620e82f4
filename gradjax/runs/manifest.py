"""What run.json says: the settings that numbers depend on, and where each number came from."""

import dataclasses
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

from gradjax.checkpoints.pretrained import identity
from gradjax.config import RunConfig
from gradjax.model.parameters import block_parameters
from gradjax.runs.compute import resolved_route
from gradjax.runs.cost import Plan
from gradjax.runs.inputs import (
    Inputs,
)
from gradjax.spectra.decompose import decomposes_on_host
from gradjax.storage.store import Store
from gradjax.version import __version__


def number_settings(config: RunConfig, inputs: Inputs) -> dict[str, Any]:
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
    inputs: Inputs,
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
            "gradjax": __version__,
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
