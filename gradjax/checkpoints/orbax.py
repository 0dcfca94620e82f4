"""Checkpoints as `gradjax convert` writes them: Orbax arrays that any mesh restores as its shards.

A folder with the model's config.json and tokenizer files, `weights/` as Orbax writes it (Zarr,
uncompressed: measured twice as fast to read as its default), and, written last, `gradjax.json`,
which says what model it was made from.
"""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from gradjax import sharding, strict_json
from gradjax.errors import GradjaxError, first_line
from gradjax.model.config import DecoderConfig
from gradjax.model.decoder import Decoder
from gradjax.model.parallel import abstract_weights
from gradjax.model.parameters import all_parameters
from gradjax.version import __version__

ORIGIN = "gradjax.json"
_WEIGHTS = "weights"


def write_converted(
    decoder: Decoder, source: Path, directory: Path, origin: Mapping[str, str | None]
) -> None:
    """Writes a decoder and the small files of its `source` directory into a new `directory`.

    `origin` tells what it was made from; see `read_origin`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja", ".txt", ".model") and "safetensors" not in file.name:
            shutil.copyfile(file, directory / file.name)
    weights = {path: decoder.weight(path) for path in all_parameters(decoder.config)}
    with _checkpointer() as checkpointer:
        checkpointer.save(directory.absolute() / _WEIGHTS, weights)
    text = strict_json.dumps({"gradjax": __version__, **origin}, indent=2)
    (directory / ORIGIN).write_text(text + "\n", encoding="utf-8")


def read_origin(directory: Path) -> dict[str, str | None] | None:
    """What a converted checkpoint was made from (`identity`, `source`); None for any other folder.

    Raises:
      GradjaxError: if the file that says so is damaged.
    """
    path = directory / ORIGIN
    if not path.is_file():
        return None
    try:
        origin = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(origin["identity"], str):
            return origin
    except (ValueError, TypeError, KeyError):
        pass
    raise GradjaxError(
        f"{path} is damaged: expected what gradjax convert wrote there; convert the model again"
    )


def load_converted(
    directory: Path, config: DecoderConfig, dtype: DTypeLike, mesh: Mesh | None = None
) -> Decoder:
    """The decoder of a converted checkpoint, cast to `dtype`; each process reads its own parts.

    Raises:
      GradjaxError: if arrays are missing, damaged or of other shapes than config.json's.
    """
    _check_arrays(directory / _WEIGHTS, config)
    mesh = mesh or sharding.one_device()
    wanted = abstract_weights(config, mesh, dtype)
    args = ocp.args.PyTreeRestore(
        item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted)
    )
    try:
        with _checkpointer() as checkpointer:
            weights = checkpointer.restore(directory.absolute() / _WEIGHTS, args=args)
    except (jax.errors.JaxRuntimeError, MemoryError):
        raise  # of the device, not of the files
    except Exception as error:  # for an array that it cannot read Orbax raises just this
        said = first_line(error.__cause__ or error)[:200]
        raise GradjaxError(
            f"{directory / _WEIGHTS} cannot be read ({said}), expected "
            "the arrays of config.json as gradjax convert writes them; convert the model again"
        ) from error
    for path, weight in weights.items():
        if not jnp.isfinite(weight).all():
            raise GradjaxError(
                f"{directory / _WEIGHTS}: {path} holds NaN or infinite values (as "
                f"{weight.dtype.name}), expected finite weights; convert the model again"
            )
    return Decoder(config, weights, mesh)


def _checkpointer() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False))


def _check_arrays(directory: Path, config: DecoderConfig) -> None:
    """Raises GradjaxError unless every array is there, of its shape, and whole; names all faults.

    Before anything is read: where Orbax fails at one array, it leaves the reads of the others
    pending, and Python complains of each of them at some later time.
    """
    problems = []
    for path, parameter in all_parameters(config).items():
        folder, shape = directory / path, list(parameter.shape(config))
        try:
            about = json.loads((folder / ".zarray").read_bytes())
            found, chunks, dtype = about["shape"], about["chunks"], jnp.dtype(about["dtype"])
            if found != shape:
                problems.append(f"{path} is {found}, by config.json {shape}")
                continue
            counts = [-(-size // chunk) for size, chunk in zip(shape, chunks, strict=True)]
            size = math.prod(chunks) * dtype.itemsize  # also of chunks at the edge
            for chunk in np.ndindex(*counts):
                file = folder / ".".join(map(str, chunk))
                if (there := file.stat().st_size) != size:
                    problems.append(f"{path} has {there} of {size} bytes")
        except FileNotFoundError:
            problems.append(f"{path} is missing")
        except (OSError, ValueError, TypeError, KeyError) as error:
            problems.append(f"{path} cannot be read ({first_line(error)})")
    if problems:
        raise GradjaxError(
            f"{directory} is damaged: {'; '.join(problems)}: expected the arrays of config.json as "
            "gradjax convert writes them; convert the model again"
        )
