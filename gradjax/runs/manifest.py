"""What run.json says: the settings that numbers depend on, and where each number came from."""

import dataclasses
import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

from gradjax.checkpoints.pretrained import identity
from gradjax.config import RunConfig
from gradjax.hashing import sha256
from gradjax.model.parameters import block_parameters
from gradjax.runs.inputs import (
    Inputs,
)
from gradjax.spectra.decompose import resolved_route
from gradjax.version import __version__

_PACKAGE = Path(__file__).parent.parent


def number_settings(config: RunConfig, inputs: Inputs, platform: str) -> dict[str, Any]:
    """What the numbers of a run depend on, beside its rows: equal, or not the same run."""
    tokenizer = inputs.tokenizer
    template = str(tokenizer.chat_template or "")
    return config.settings | {
        "model": (
            f"random weights, seed {config.seed}: {sha256(repr(inputs.model))}"
            if config.random_init
            else identity(inputs.checkpoint)
        ),
        "tokenizer": sha256(tokenizer.backend_tokenizer.to_str()),
        "template": sha256(template) if config.tokens.prompt_format == "chat" else None,
        "spectrum_route": resolved_route(config.spectra, platform),
        "layers": list(config.spectra.layer_numbers(inputs.model.num_layers)),
    }


def manifest(
    config: RunConfig,
    settings: dict[str, Any],
    inputs: Inputs,
    invocation: dict[str, Any],
    data: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """`run.json`: what was run, on what, with what.

    Args:
      settings: of `number_settings`.
      invocation: this one, as of `describe_invocation`; those of earlier calls stay.
      data: what is known of each group's rows.
    """
    checkpoint, before = inputs.checkpoint, inputs.found.manifest
    return {
        **before,  # also what an older gradjax wrote there
        "settings": settings,
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
        "data": before.get("data", {}) | data,
        "versions": {"gradjax": __version__},  # whoever reads the store asks for it
        "invocations": [*before.get("invocations", []), invocation],
    }


def describe_invocation(
    config: RunConfig, inputs: Inputs, mesh: dict[str, int], machines: list[dict[str, Any]]
) -> dict[str, Any]:
    """Where the numbers that this call adds come from.

    Args:
      mesh: size of each axis.
      machines: of each process, `describe_machine`.
    """
    flags = {
        **dataclasses.asdict(config.tokens),
        **dataclasses.asdict(config.spectra),
        **dataclasses.asdict(config.reading),
        **{
            field.name: getattr(config, field.name)
            for field in dataclasses.fields(config)
            if field.name not in ("tokens", "spectra", "reading")
        },
        "output_dir": str(inputs.directory),
    }
    packages = ("jax", "jaxlib", "flax", "transformers", "tokenizers", "numpy", "pyarrow")
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "flags": flags,
        "mesh": mesh,
        "machines": machines,
        "versions": {
            "gradjax": __version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "git_revision": git_revision(_PACKAGE),
    }


def describe_machine() -> dict[str, Any]:
    """This process's machine and its devices."""
    return {
        "host": platform.node(),
        "platform": jax.default_backend(),
        "kind": jax.local_devices()[0].device_kind,
        "devices": jax.local_device_count(),
    }


def git_revision(package: Path) -> str | None:
    """The commit of the checkout that gradjax runs from, `-dirty` if it was changed.

    Only gradjax's own: None where `package` was installed, whatever repository is around it.
    """
    root = package.parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        top = git("rev-parse", "--show-toplevel")
        tracked = git("ls-files", f"{package.name}/version.py")
        if not tracked or Path(top).resolve() != root.resolve():
            return None
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or None
    except (OSError, subprocess.SubprocessError):
        return None
