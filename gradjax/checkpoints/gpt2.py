"""GPT-2's config.json and safetensors -> GPT2. Hugging Face's names of its tensors stand here."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from gradjax import sharding
from gradjax.checkpoints.hf_config import FIXED, HARMLESS, Attributes, read_json_object
from gradjax.checkpoints.safetensors import check_fit, find_tensors, load_tensor
from gradjax.errors import GradjaxError
from gradjax.model.gpt2 import GPT2, Block, GPT2Config

ARCHITECTURE = "GPT2LMHeadModel"


_FAMILY = "gpt2"


_DEFAULTS: dict[str, Any] = {  # of transformers' GPT2Config
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "layer_norm_epsilon": 1e-5,
}


# Dropout and the head of another task.
# fmt: off
_GPT2_HARMLESS = frozenset({
    "_num_labels", "attn_pdrop", "embd_pdrop", "gradient_checkpointing", "n_ctx",
    "resid_pdrop", "summary_activation", "summary_first_dropout", "summary_proj_to_labels",
    "summary_type", "summary_use_proj",
})
# fmt: on


_GPT2_FIXED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new",),
    "reorder_and_upcast_attn": (False,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "scale_attn_weights": (True,),
    "tie_word_embeddings": (True,),
}


# Names have it where transformers saved the model, not so in the Hub's `gpt2`.
_PREFIX = "transformer."


# Causal masks, which old transformers saved.
_BUFFERS = (".attn.bias", ".attn.masked_bias")


def is_gpt2(directory: Path) -> bool:
    """Whether a checkpoint's config.json says GPT-2.

    Raises GradjaxError where that is missing or malformed.
    """
    values = read_json_object(Path(directory) / "config.json")
    return values.get("architectures") == [ARCHITECTURE]


def read_gpt2_config(directory: Path) -> GPT2Config:
    """The GPT-2 that `directory/config.json` describes.

    Raises GradjaxError where the file is missing or malformed, of another architecture than
    GPT2LMHeadModel, or an attribute is unknown or has a value that is not implemented; all such
    attributes are named.
    """
    path = Path(directory) / "config.json"
    values = read_json_object(path)
    kind = (values.get("architectures"), values.get("model_type", _FAMILY))
    if kind != ([ARCHITECTURE], _FAMILY):
        raise GradjaxError(
            f"{path}: architectures and model_type are {json.dumps(kind[0])} and "
            f"{json.dumps(kind[1])}, expected {json.dumps([ARCHITECTURE])} and "
            f"{json.dumps(_FAMILY)}: use a GPT-2 checkpoint."
        )
    a = Attributes(values, _DEFAULTS)
    a.seen |= HARMLESS | _GPT2_HARMLESS | {"architectures", "model_type"}
    for name, allowed in (FIXED | _GPT2_FIXED).items():
        a.fixed(name, allowed)
    config = GPT2Config(
        vocab_size=a.integer("vocab_size"),
        max_positions=a.integer("n_positions"),
        hidden_size=a.integer("n_embd"),
        mlp_size=a.optional_integer("n_inner") or 4 * a.integer("n_embd"),
        num_layers=a.integer("n_layer"),
        num_heads=a.integer("n_head"),
        norm_eps=a.number("layer_norm_epsilon"),
    )
    if config.hidden_size % config.num_heads:
        a.refuse("n_embd", f"a multiple of n_head, {config.num_heads}")
    a.refuse_unread("no such attribute")
    if a.problems:
        raise GradjaxError(
            f"{path}: gradjax's GPT-2 does not implement what the config asks for: "
            f"{'; '.join(a.problems.values())}: use a checkpoint with supported values."
        )
    return config


def load_gpt2(directory: Path) -> GPT2:
    """The GPT-2 in a directory with config.json and safetensors, in float32 on the default device.

    Raises GradjaxError as `read_gpt2_config`, and as `load_decoder` for the weights.
    """
    config = read_gpt2_config(directory)
    tensors, problems = find_tensors(directory)
    prefix = _PREFIX if any(name.startswith(_PREFIX) for name in tensors) else ""
    model_table = {path: (prefix + n, shape) for path, (n, shape) in _model_tensors(config).items()}
    block_tables = [
        {p: (f"{prefix}h.{i}.{n}", shape) for p, (n, shape) in _block_tensors(config).items()}
        for i in range(config.num_layers)
    ]
    shapes = dict(entry for table in [model_table, *block_tables] for entry in table.values())
    tied, _ = model_table["embedding"]
    check_fit(directory, tensors, problems, shapes, jnp.float32, tied=tied, ignored=_BUFFERS)
    placed = NamedSharding(sharding.one_device(), PartitionSpec())

    def load(table: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, Array]:
        return {p: load_tensor(tensors[n], jnp.float32, placed) for p, (n, _) in table.items()}

    return GPT2(config, load(model_table), [Block(load(table)) for table in block_tables])


def _model_tensors(config: GPT2Config) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor outside the blocks, by attribute of `GPT2`."""
    width = config.hidden_size
    return {
        "embedding": ("wte.weight", (config.vocab_size, width)),
        "positions": ("wpe.weight", (config.max_positions, width)),
        "final_norm": ("ln_f.weight", (width,)),
        "final_norm_bias": ("ln_f.bias", (width,)),
    }


def _block_tensors(config: GPT2Config) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name within its block and shape of each tensor, by attribute of `Block`."""
    width, mlp = config.hidden_size, config.mlp_size
    return {
        "attention_norm": ("ln_1.weight", (width,)),
        "attention_norm_bias": ("ln_1.bias", (width,)),
        "qkv": ("attn.c_attn.weight", (width, 3 * width)),
        "qkv_bias": ("attn.c_attn.bias", (3 * width,)),
        "o": ("attn.c_proj.weight", (width, width)),
        "o_bias": ("attn.c_proj.bias", (width,)),
        "mlp_norm": ("ln_2.weight", (width,)),
        "mlp_norm_bias": ("ln_2.bias", (width,)),
        "up": ("mlp.c_fc.weight", (width, mlp)),
        "up_bias": ("mlp.c_fc.bias", (mlp,)),
        "down": ("mlp.c_proj.weight", (mlp, width)),
        "down_bias": ("mlp.c_proj.bias", (width,)),
    }
