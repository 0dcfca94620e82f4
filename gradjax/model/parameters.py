"""The weight table: each parameter's place, Hugging Face name, axes and initial value.

This is the only place that knows Hugging Face's names. Shapes, abstract models, random
models, loading and (later) sharding are all read off this table. Matrices keep the file's
orientation (out, in), so nothing is transposed on the way in and a gradient `ΔᵀX` has
PyTorch's layout.
"""

import dataclasses
import math

from gradjax.model.config import DecoderConfig

_EMBEDDING_STD = 0.02  # transformers' initializer_range of every family


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One array of the decoder. `axes` are letters of the legend in structs.py."""

    hf_key: str | None  # None: a constant, in no file
    axes: tuple[str, ...]
    std: float = _EMBEDDING_STD  # of `--random_init`; 0: the constant `mean`
    mean: float = 0.0

    def shape(self, config: DecoderConfig) -> tuple[int, ...]:
        """The array's shape in a model."""
        sizes = axis_sizes(config)
        return tuple(sizes[axis] for axis in self.axes)


def axis_sizes(config: DecoderConfig) -> dict[str, int]:
    """Length of each weight axis."""
    return {
        "D": config.hidden_size,
        "F": config.mlp_size,
        "V": config.vocab_size,
        "Q": config.num_heads * config.head_dim,
        "C": config.num_kv_heads * config.head_dim,
        "H": config.head_dim,
        "1": 1,  # the score head's only row
    }


def model_parameters(config: DecoderConfig) -> dict[str, Parameter]:
    """Parameters outside the blocks, by attribute of `Decoder`."""
    table = {
        "embedding": Parameter("model.embed_tokens.weight", ("V", "D")),
        "final_norm": _norm(config, "model.norm.weight"),
    }
    if config.score_head:
        table["head"] = Parameter("score.weight", ("1", "D"))
    elif not config.tied_embeddings:
        table["head"] = Parameter("lm_head.weight", ("V", "D"))
    return table


def block_parameters(config: DecoderConfig, layer: int) -> dict[str, Parameter]:
    """Parameters of one block, by attribute of `Block`."""
    prefix = f"model.layers.{layer}."

    def matrix(name: str, *axes: str) -> Parameter:
        return Parameter(f"{prefix}{name}.weight", axes)

    def norm(name: str, axes: tuple[str, ...] = ("D",)) -> Parameter:
        return _norm(config, f"{prefix}{name}.weight", axes)

    table = {
        "q": matrix("self_attn.q_proj", "Q", "D"),
        "k": matrix("self_attn.k_proj", "C", "D"),
        "v": matrix("self_attn.v_proj", "C", "D"),
        "o": matrix("self_attn.o_proj", "D", "Q"),
        "gate": matrix("mlp.gate_proj", "F", "D"),
        "up": matrix("mlp.up_proj", "F", "D"),
        "down": matrix("mlp.down_proj", "D", "F"),
    }
    if config.qkv_bias:
        for name, axis in (("q", "Q"), ("k", "C"), ("v", "C")):
            key = f"{prefix}self_attn.{name}_proj.bias"
            table[f"{name}_bias"] = Parameter(key, (axis,), std=0.0)
    if config.qk_norm:
        for name, axis in (("q", "Q"), ("k", "C")):
            axes = ("H",) if config.qk_norm == "head" else (axis,)
            table[f"{name}_norm"] = norm(f"self_attn.{name}_norm", axes)
    if config.pre_norms:
        # Where there are norms behind the sublayers too, files call this one otherwise.
        second = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
        table["attention_norm"] = norm("input_layernorm")
        table["mlp_norm"] = norm(second)
    if config.post_norms:
        table["attention_post_norm"] = norm("post_attention_layernorm")
        table["mlp_post_norm"] = norm("post_feedforward_layernorm")
    return table


def all_parameters(config: DecoderConfig) -> dict[str, Parameter]:
    """The whole table by path: `embedding`, `blocks.0.q`, …"""
    table = model_parameters(config)
    for layer in range(config.num_layers):
        for name, parameter in block_parameters(config, layer).items():
            table[f"blocks.{layer}.{name}"] = parameter
    return table


def count_parameters(config: DecoderConfig) -> int:
    """Numbers in a model's files; constants are in none."""
    table = all_parameters(config).values()
    return sum(math.prod(p.shape(config)) for p in table if p.hf_key)


def _norm(config: DecoderConfig, hf_key: str, axes: tuple[str, ...] = ("D",)) -> Parameter:
    mean = 1.0 - config.norm_offset
    return Parameter(None if config.norm == "layer" else hf_key, axes, std=0.0, mean=mean)
