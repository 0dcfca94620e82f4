"""Safetensors on disk -> Decoder, one tensor at a time, every tensor accounted for.

The headers of all files are read and compared with the weight table before any weight is:
a checkpoint that does not fit is refused with all its faults named at once.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from gradjax import sharding
from gradjax.errors import GradjaxError
from gradjax.model.config import DecoderConfig
from gradjax.model.decoder import Decoder
from gradjax.model.parallel import weight_sharding
from gradjax.model.parameters import Parameter, all_parameters

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_FLOATS: dict[str, type] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
# Old transformers saved this constant; it is computed from the config.
_ROPE_CONSTANT = "rotary_emb.inv_freq"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies. `dtype` is safetensors' name, `start` the file's first byte of it."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    def view(self) -> np.ndarray:
        """The tensor as it lies in the file, mapped read-only: costs no anonymous memory."""
        dtype = np.dtype(_FLOATS[self.dtype])
        size = math.prod(self.shape) * dtype.itemsize
        file = np.memmap(self.file, mode="r", dtype=np.uint8)
        return file[self.start : self.start + size].view(dtype).reshape(self.shape)


def load_decoder(
    directory: Path, config: DecoderConfig, dtype: DTypeLike, mesh: Mesh | None = None
) -> Decoder:
    """The decoder with the weights of `directory`'s safetensors, cast to `dtype`.

    Reads `model.safetensors` or the shards of `model.safetensors.index.json`, in any float
    dtype. Every process reads what its devices of the mesh hold (the default device if None).
    Anonymous host memory stays below that in `dtype` plus its largest array.

    Raises GradjaxError where files are missing, damaged or pickles only; where tensors are
    missing, unknown, in two shards, not where the index says, not of the config's shape or
    not floats (all named together); and where a weight is NaN or infinite.
    """
    tensors, problems = find_tensors(directory)
    table = all_parameters(config)
    shapes = {p.hf_key: p.shape(config) for p in table.values() if p.hf_key}
    tied = _EMBEDDING if config.tied_embeddings else None
    check_fit(directory, tensors, problems, shapes, dtype, tied=tied, ignored=(_ROPE_CONSTANT,))
    mesh = mesh or sharding.one_device()

    def load(parameter: Parameter) -> jax.Array:
        placed = weight_sharding(mesh, config, parameter)
        if parameter.hf_key:
            return load_tensor(tensors[parameter.hf_key], dtype, placed)
        return jnp.full(parameter.shape(config), parameter.mean, dtype, device=placed)

    return Decoder(config, {path: load(p) for path, p in table.items()}, mesh)


def find_tensors(directory: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Every tensor of a checkpoint's safetensors by name, and where files and index disagree.

    Only the headers are read. Raises GradjaxError where files are missing, damaged or pickles
    only.
    """
    return _locate(*_checkpoint_files(Path(directory)))


def check_fit(
    directory: Path,
    tensors: dict[str, Tensor],
    problems: list[str],
    shapes: dict[str, tuple[int, ...]],
    dtype: DTypeLike,
    *,
    tied: str | None,
    ignored: tuple[str, ...],
) -> None:
    """Raises GradjaxError unless the tensors found are those of the model, in its shapes.

    Args:
      tensors, problems: of `find_tensors`.
      shapes: of every tensor of the model, by name.
      dtype: that the weights will have.
      tied: the embedding table that is the output head as well, if so; the file may carry the
        head nevertheless, but it must be the same.
      ignored: endings of names of constants, which need no reading.
    """
    if tied and _HEAD in tensors:
        shapes = shapes | {_HEAD: shapes[tied]}
    problems = problems + _mismatches(tensors, shapes, ignored)
    if problems:
        raise GradjaxError(
            f"{directory}: the weights do not fit config.json: {'; '.join(problems)}: use the "
            "config.json and safetensors of one model, or download them again."
        )
    if tied and _HEAD in tensors:
        _check_tied(tensors[tied], tensors[_HEAD], jnp.dtype(dtype))


def load_tensor(tensor: Tensor, dtype: DTypeLike, placed: NamedSharding) -> jax.Array:
    """One tensor as a device array of its own memory.

    Raises GradjaxError where it holds NaN or infinite values in that dtype.
    """
    dtype = jnp.dtype(dtype)

    def part(index: Any) -> np.ndarray:
        view = tensor.view()[index]
        array = _aligned_empty(view.shape, dtype)
        with np.errstate(over="ignore"):
            np.copyto(array, view, casting="unsafe")
        if not np.isfinite(array).all():
            raise GradjaxError(
                f"{tensor.file}: {tensor.name} holds NaN or infinite values (as {dtype.name}), "
                "expected finite weights: download or save the checkpoint again."
            )
        return array

    return jax.block_until_ready(jax.make_array_from_callback(tensor.shape, placed, part))


def stored_dtype(directory: Path) -> np.dtype:
    """The dtype that holds a checkpoint's weights without loss: bfloat16 or float32.

    Raises:
      GradjaxError: as `load_decoder` for missing and damaged files, and for float64 ones.
    """
    tensors, _ = find_tensors(directory)
    if wide := [name for name, tensor in tensors.items() if tensor.dtype == "F64"]:
        raise GradjaxError(
            f"{directory}: {wide[0]} is float64, which cannot be converted without loss; use the "
            "checkpoint as it is"
        )
    bfloat16 = all(tensor.dtype == "BF16" for tensor in tensors.values())
    return jnp.dtype(jnp.bfloat16 if bfloat16 else jnp.float32)


def weights_hash(directory: Path, known: Mapping[str, str] | None = None) -> str:
    """What identifies a checkpoint: SHA-256 of its config.json and safetensors files.

    The hex digest of the lines that `sha256sum config.json FILES` prints there, of the files that
    `load_decoder` reads, by name.

    Args:
      known: digests of all safetensors files by name, where they need not be read for them.
    """
    directory = Path(directory)
    if known is None:
        known = {path.name: _digest(path) for path in _checkpoint_files(directory)[0]}
    digests = {"config.json": _digest(directory / "config.json")} | dict(sorted(known.items()))
    lines = (f"{digest}  {name}\n" for name, digest in digests.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _digest(path: Path) -> str:
    """A file's SHA-256. The Hub's cache names large files by theirs."""
    blob = path.resolve()
    if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name):
        return blob.name
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checkpoint_files(directory: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files to read, and the index (tensor -> file name) of a sharded one."""
    single, index_path = directory / _SINGLE_FILE, directory / _INDEX_FILE
    if single.exists() and index_path.exists():
        raise GradjaxError(
            f"{directory} has both {_SINGLE_FILE} and {_INDEX_FILE}, expected one of them: "
            "remove the one that is left over."
        )
    if single.exists():
        return [single], None
    if not index_path.exists():
        raise _no_safetensors(directory)
    index = _read_index(index_path)
    # Shards that lie there unlisted are read as well: they may be of another model.
    listed = {directory / name for name in index.values()}
    files = sorted(listed.union(directory.glob("model-*.safetensors")))
    if missing := [file.name for file in files if not file.is_file()]:
        raise GradjaxError(
            f"{directory} lacks {', '.join(missing)}, which {_INDEX_FILE} lists: download "
            "the missing files."
        )
    return files, index


def _no_safetensors(directory: Path) -> GradjaxError:
    patterns = ("*.bin", "*.pt", "*.pth", "*.ckpt")
    pickles = sorted(path.name for pattern in patterns for path in directory.glob(pattern))
    if pickles:
        return GradjaxError(
            f"{directory} holds its weights as pickles ({', '.join(pickles)}), which can run code "
            f"when they are read, expected {_SINGLE_FILE}: where you trust their source, convert "
            "them with transformers' AutoModelForCausalLM.from_pretrained(DIR).save_pretrained("
            "NEW_DIR), a reward model with AutoModelForSequenceClassification."
        )
    return GradjaxError(
        f"{directory} has no weights, expected {_SINGLE_FILE} or {_INDEX_FILE} with its shards: "
        "give a Hugging Face checkpoint directory as --model, or --random_init."
    )


def _read_index(path: Path) -> dict[str, str]:
    try:
        index: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        # A name with a folder in it would read files outside the checkpoint.
        if all(isinstance(file, str) and Path(file).name == file for file in index.values()):
            return index
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    raise GradjaxError(
        f"{path} is not an index, expected JSON with a weight_map from tensor names to file names "
        "in the same folder: download it again."
    )


def _locate(files: list[Path], index: dict[str, str] | None) -> tuple[dict[str, Tensor], list[str]]:
    """Every tensor by name, and where files and index disagree."""
    tensors: dict[str, Tensor] = {}
    problems = []
    for file in files:
        for name, tensor in _read_header(file).items():
            if name in tensors:
                problems.append(f"{name} is in both {tensors[name].file.name} and {file.name}")
            elif index is not None and name not in index:
                problems.append(f"{name} is in {file.name} but not in {_INDEX_FILE}")
            elif index is not None and index[name] != file.name:
                problems.append(f"{name} is in {file.name}, by {_INDEX_FILE} in {index[name]}")
            tensors[name] = tensor
    missing = sorted((index or {}).keys() - tensors.keys())
    problems += [f"{name} is in {_INDEX_FILE} but in no shard" for name in missing]
    return tensors, problems


def _read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of one file; safetensors checks that they cover it without gap or overlap."""
    try:
        with safe_open(file, framework="numpy"):
            pass
        with file.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(length))
    except (SafetensorError, OSError) as error:
        raise GradjaxError(
            f"{file} is damaged or incomplete ({error}), expected safetensors: download it again."
        ) from error
    header.pop("__metadata__", None)
    return {
        name: Tensor(
            name, file, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]
        )
        for name, entry in header.items()
    }


def _mismatches(
    tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], ignored: tuple[str, ...]
) -> list[str]:
    """How the tensors found differ from those the config asks for."""
    unknown = tensors.keys() - shapes.keys()
    problems = _listing("missing", shapes.keys() - tensors.keys())
    problems += _listing(
        "not part of this model", [name for name in unknown if not name.endswith(ignored)]
    )
    for name in sorted(tensors.keys() & shapes.keys()):
        found, expected = tensors[name], shapes[name]
        if found.shape != expected:
            problems.append(f"{name} is {list(found.shape)}, by the config {list(expected)}")
        if found.dtype not in _FLOATS:
            problems.append(f"{name} is {found.dtype}, expected one of {', '.join(_FLOATS)}")
    return problems


def _listing(what: str, names: Collection[str]) -> list[str]:
    return [f"{what}: {', '.join(sorted(names))}"] if names else []


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array that the CPU backend takes over as it is: unaligned ones are copied."""
    alignment = 64
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + alignment, np.uint8)
    start = -buffer.ctypes.data % alignment
    return buffer[start : start + size].view(dtype).reshape(shape)


def _check_tied(embedding: Tensor, head: Tensor, dtype: np.dtype) -> None:
    """A tied model may carry its head as well, but then it must be the embedding.

    Where it is not, transformers 4 drops the head and transformers 5 unties the model.
    """
    rows = max(2**24 // embedding.shape[1], 1)  # keeps the copies small
    for first in range(0, embedding.shape[0], rows):
        part = slice(first, first + rows)
        with np.errstate(over="ignore"):
            a, b = (tensor.view()[part].astype(dtype) for tensor in (embedding, head))
        if not np.array_equal(a, b):
            raise GradjaxError(
                f"{head.file}: {head.name} differs from {embedding.name} although config.json says "
                "tie_word_embeddings: set it to false there, or remove the tensor."
            )
