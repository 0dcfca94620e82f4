"""A checkpoint's decoder and tokenizer, together: what `gradjax.load_model` returns."""

import dataclasses
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from gradjax.checkpoints.hf_config import read_config
from gradjax.checkpoints.orbax import ORIGIN, load_converted, write_converted
from gradjax.checkpoints.resolve import (
    Checkpoint,
    fetch_weights,
    hub_digests,
    load_tokenizer,
    resolve,
)
from gradjax.checkpoints.safetensors import load_decoder, stored_dtype, weights_hash
from gradjax.device import local_device
from gradjax.errors import GradjaxError, out_of_memory
from gradjax.model.config import DecoderConfig
from gradjax.model.decoder import Decoder, random_decoder
from gradjax.model.parameters import count_parameters
from gradjax.storage.filesystem import url_to_fs


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder with its tokenizer."""

    decoder: Decoder
    tokenizer: PreTrainedTokenizerFast

    @property
    def config(self) -> DecoderConfig:
        """The decoder's shape."""
        return self.decoder.config

    def __repr__(self) -> str:
        parameters, dtype = count_parameters(self.config), self.decoder.embedding.dtype
        devices = self.decoder.mesh.devices.flat
        return (
            f"Model({self.config.family}, {self.config.num_layers} layers, {parameters:,} "
            f"parameters in {dtype}, {len(devices)} x {devices[0].device_kind})"
        )


def load_model(
    model: str = "demo",
    *,
    revision: str | None = None,
    dtype: str = "float32",
    random_init: bool = False,
    seed: int = 0,
) -> Model:
    """Loads a model for gradient spectra.

    Args:
      model: a registered name (`gemma2_2b`), a Hub repo (`google/gemma-2-2b`) or a local
        Hugging Face directory.
      revision: a Hub repo's commit, tag or branch; its main branch if None.
      dtype: `float32` or `bfloat16`, of weights and activations.
      random_init: fresh weights of the model's shape instead of its own.
      seed: of the fresh weights.

    Raises:
      GradjaxError: if there is no such model, or its files are not what a checkpoint
        of one of the families holds; the message names the file, key or tensor.
    """
    checkpoint = resolve(model, revision=revision)
    config = read_config(checkpoint.directory)
    tokenizer = load_tokenizer(checkpoint.directory)
    decoder = load_weights(checkpoint, config, dtype, random_init=random_init, seed=seed)
    return Model(decoder, tokenizer)


def load_weights(
    checkpoint: Checkpoint,
    config: DecoderConfig,
    dtype: str,
    *,
    random_init: bool = False,
    seed: int = 0,
    mesh: Mesh | None = None,
    flag: str = "model",
) -> Decoder:
    """A checkpoint's decoder in `dtype`, or fresh weights of its shape, on a mesh.

    Args:
      checkpoint: of `resolve`; its weights are downloaded where they have to be.
      config: of its config.json.
      mesh: the default device if None.
      flag: that named the checkpoint.

    Raises:
      GradjaxError: as `fetch_weights` and `load_decoder`, or if the weights do not fit the memory.
    """
    if not random_init:
        checkpoint = fetch_weights(checkpoint, flag=flag)
    directory = checkpoint.directory
    try:
        if random_init:
            logging.info("Fresh weights of the shape of %s, seed %d", directory, seed)
            return random_decoder(config, seed, jnp.dtype(dtype), mesh)
        load = load_converted if checkpoint.origin else load_decoder
        return load(directory, config, jnp.dtype(dtype), mesh)
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        entries = count_parameters(config)
        needed = entries * jnp.dtype(dtype).itemsize / 2**30
        raise GradjaxError(
            f"the weights of {directory} need {needed:.1f} GiB "
            f"in {dtype}, and this device has {local_device().memory / 2**30:.1f} GiB; use "
            "--dtype=bfloat16, a smaller model or a larger device"
        ) from error


def identity(checkpoint: Checkpoint) -> str:
    """What tells a model's weights from others: a hash of the files, wherever they lie.

    Of a Hub repo the files need not have been downloaded. A converted checkpoint's is that of what
    it was made from.

    Raises:
      GradjaxError: if a Hub repo's weights have to be downloaded for it and cannot be.
    """
    if checkpoint.origin:
        return str(checkpoint.origin["identity"])
    known = hub_digests(checkpoint) if checkpoint.revision else None
    if known is None:
        checkpoint = fetch_weights(checkpoint)
    return f"sha256:{weights_hash(checkpoint.directory, known)}"


def convert(model: str, output: str) -> None:
    """Writes a checkpoint as `load_converted` reads it, the whole of it or nothing usable.

    Args:
      model: as of `load_model`.
      output: a new directory, or a URL of an object store.

    Raises:
      GradjaxError: if the model cannot be loaded, is converted already, or `output` holds
        something.
    """
    filesystem, path = url_to_fs(output)
    if filesystem.exists(path) and filesystem.ls(path):
        raise GradjaxError(f"--output={output} is not empty; give a new directory")
    checkpoint = fetch_weights(resolve(model))
    if checkpoint.origin:
        raise GradjaxError(f"--model={model} is converted already; copy it as it is")
    dtype = stored_dtype(checkpoint.directory).name
    config = read_config(checkpoint.directory)
    decoder = load_weights(checkpoint, config, dtype)
    origin = {"source": checkpoint.source, "identity": identity(checkpoint)}
    with tempfile.TemporaryDirectory() as scratch:
        local = "file" in filesystem.protocol
        directory = Path(path) if local else Path(scratch)
        write_converted(decoder, checkpoint.directory, directory, origin)
        if not local:
            for file in sorted(directory.rglob("*"), key=lambda file: file.name == ORIGIN):
                if file.is_file():
                    filesystem.put_file(str(file), f"{path}/{file.relative_to(directory)}")
    logging.info("%s in %s", checkpoint.source, dtype)
