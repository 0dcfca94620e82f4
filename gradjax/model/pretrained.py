"""A checkpoint's decoder and tokenizer, together: what `gradjax.load_model` returns."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from gradjax.device import device_memory
from gradjax.errors import GradjaxError, out_of_memory
from gradjax.model.config import DecoderConfig
from gradjax.model.decoder import Decoder, random_decoder
from gradjax.model.hf_config import read_config
from gradjax.model.loading import load_decoder, weights_hash
from gradjax.model.parameters import all_parameters
from gradjax.model.registry import Checkpoint, load_tokenizer, resolve


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder with its tokenizer."""

    decoder: Decoder
    tokenizer: PreTrainedTokenizerFast

    @property
    def config(self) -> DecoderConfig:
        """The decoder's shape."""
        return self.decoder.config


def load_model(
    model: str = "demo", *, dtype: str = "float32", random_init: bool = False, seed: int = 0
) -> Model:
    """Loads a model for gradient spectra.

    Args:
      model: a registered name (`gemma2_2b`), a Hub repo (`google/gemma-2-2b`) or a local
        Hugging Face directory.
      dtype: `float32` or `bfloat16`, of weights and activations.
      random_init: fresh weights of the model's shape instead of its own.
      seed: of the fresh weights.

    Raises:
      GradjaxError: if there is no such model, or its files are not what a Qwen2.5, Llama 3 or
        Gemma 2 checkpoint holds; the message names the file, key or tensor.
    """
    checkpoint = resolve(model, weights=not random_init)
    tokenizer = load_tokenizer(checkpoint.directory)
    return Model(
        load_weights(checkpoint.directory, dtype, random_init=random_init, seed=seed), tokenizer
    )


def load_weights(
    directory: Path, dtype: str, *, random_init: bool, seed: int, mesh: Mesh | None = None
) -> Decoder:
    """A local checkpoint's decoder in `dtype`, or fresh weights of its shape, on a mesh.

    On the default device if `mesh` is None.

    Raises:
      GradjaxError: as `load_decoder`, or if the weights do not fit the memory.
    """
    config = read_config(directory)
    try:
        if random_init:
            logging.info("Fresh weights of the shape of %s, seed %d", directory, seed)
            return random_decoder(config, seed, jnp.dtype(dtype), mesh)
        return load_decoder(directory, config, jnp.dtype(dtype), mesh)
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        entries = sum(math.prod(p.shape(config)) for p in all_parameters(config).values())
        needed = entries * jnp.dtype(dtype).itemsize / 2**30
        raise GradjaxError(
            f"the weights of {directory} need {needed:.1f} GiB "
            f"in {dtype}, and this device has {device_memory() / 2**30:.1f} GiB; use "
            "--dtype=bfloat16, a smaller model or a larger device"
        ) from error


def identity(checkpoint: Checkpoint) -> str:
    """What tells a model's weights from others: a Hub revision or a hash of the files."""
    return checkpoint.revision or f"sha256:{weights_hash(checkpoint.directory)}"
