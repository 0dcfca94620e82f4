"""GPT-2, which IFD is usually taken with: its config, its weights and its forward pass.

A family of its own beside the decoder: learned positions, LayerNorm, biases everywhere and
matrices that lie in the file as (in, out). Always float32. Axis letters: structs.py.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gradjax.model.layers import einsum


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """The sizes of a GPT-2. Hashable, so that it can be a static argument."""

    vocab_size: int
    max_positions: int
    hidden_size: int
    mlp_size: int
    num_layers: int
    num_heads: int
    norm_eps: float


class Block(nnx.Module):
    """The weights of one transformer block, named as in `_block_tensors`."""

    attention_norm: nnx.Param
    attention_norm_bias: nnx.Param
    qkv: nnx.Param
    qkv_bias: nnx.Param
    o: nnx.Param
    o_bias: nnx.Param
    mlp_norm: nnx.Param
    mlp_norm_bias: nnx.Param
    up: nnx.Param
    up_bias: nnx.Param
    down: nnx.Param
    down_bias: nnx.Param

    def __init__(self, weights: dict[str, Array]):
        for name, weight in weights.items():
            setattr(self, name, nnx.Param(weight))


class GPT2(nnx.Module):
    """All weights of a model. A plain pytree: no shared references, never mutated."""

    embedding: nnx.Param  # [V, D], the output head as well
    positions: nnx.Param
    final_norm: nnx.Param
    final_norm_bias: nnx.Param

    def __init__(self, config: GPT2Config, weights: dict[str, Array], blocks: list[Block]):
        self.config = config
        for name, weight in weights.items():
            setattr(self, name, nnx.Param(weight))
        self.blocks = nnx.List(blocks)


def hidden_states(model: GPT2, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """The stream after the last block, before the final norm.

    Called outside of `jax.jit`, each batch shape costs the compilation of a single block.
    Padding on the right may go beyond the model's positions.
    """
    x = _embed(model.embedding[...], model.positions[...], tokens)
    for block in model.blocks:
        x = _block_forward(model.config, block, x)
    return x


def project_logits(
    config: GPT2Config,
    final_norm: Float[Array, " D"],
    final_norm_bias: Float[Array, " D"],
    table: Float[Array, "V D"],
    x: Float[Array, "*B D"],
) -> Float[Array, "*B V"]:
    """Final norm and output head."""
    x = _layer_norm(config, x, final_norm, final_norm_bias)
    return einsum("...d,vd->...v", x, table)


@jax.jit
def _embed(
    table: Float[Array, "V D"], positions: Float[Array, "positions D"], tokens: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    at = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    return jnp.take(table, tokens, axis=0) + jnp.take(positions, at, axis=0, mode="clip")


@partial(jax.jit, static_argnums=0)
def _block_forward(
    config: GPT2Config, block: Block, x: Float[Array, "B T D"]
) -> Float[Array, "B T D"]:
    h = _layer_norm(config, x, block.attention_norm[...], block.attention_norm_bias[...])
    attended = _attention(config, _affine(h, block.qkv[...], block.qkv_bias[...]))
    x += _affine(attended, block.o[...], block.o_bias[...])
    h = _layer_norm(config, x, block.mlp_norm[...], block.mlp_norm_bias[...])
    h = jax.nn.gelu(_affine(h, block.up[...], block.up_bias[...]), approximate=True)
    return x + _affine(h, block.down[...], block.down_bias[...])


def _attention(config: GPT2Config, qkv: Float[Array, "B T QKV"]) -> Float[Array, "B T D"]:
    """Causal attention of all heads, at up to 1,024 tokens with whole score matrices."""
    batch, length, _ = qkv.shape
    q, k, v = jnp.moveaxis(qkv.reshape(batch, length, 3, config.num_heads, -1), 2, 0)
    scores = einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
    visible = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(visible, scores, jnp.finfo(scores.dtype).min))
    return einsum("bnts,bsnh->btnh", weights, v).reshape(batch, length, -1)


def _layer_norm(
    config: GPT2Config,
    x: Float[Array, "*B D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"],
) -> Float[Array, "*B D"]:
    # By default the variance is a difference of means, which large means would drown.
    variance = jnp.var(x, axis=-1, keepdims=True)
    return jax.nn.standardize(x, variance=variance, epsilon=config.norm_eps) * scale + bias


def _affine(
    x: Float[Array, "... I"], weight: Float[Array, "I O"], bias: Float[Array, " O"]
) -> Float[Array, "... O"]:
    return einsum("...i,io->...o", x, weight) + bias
