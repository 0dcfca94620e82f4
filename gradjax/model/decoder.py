"""The decoder of every family: a Flax container of arrays and the functions over it.

Blocks are kept apart, not stacked under `jax.lax.scan`: a scan copies each layer's weights
out of the stack in every pass (1.3 times the time of two matrix products at 7B width on a
CPU), while one compiled block serves all layers either way, and its outputs can leave the
device while the next block runs.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from gradjax import sharding
from gradjax.model import layers, parallel
from gradjax.model.attention import attention
from gradjax.model.config import DecoderConfig
from gradjax.model.parallel import (
    Matrix,
    from_stream,
    own_columns,
    own_examples,
    to_stream,
    weight_sharding,
)
from gradjax.model.parameters import Parameter, all_parameters, block_parameters, model_parameters

# Arrays; their shapes alone make a decoder to compile with.
Weights = Mapping[str, Array | jax.ShapeDtypeStruct]
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


class Block(nnx.Module):
    """The weights of one transformer block, named as in the weight table.

    Families have more, or do without the norms: `q_bias`, `q_norm`, `attention_post_norm`, …
    """

    attention_norm: nnx.Param
    q: nnx.Param
    k: nnx.Param
    v: nnx.Param
    o: nnx.Param
    mlp_norm: nnx.Param
    gate: nnx.Param
    up: nnx.Param
    down: nnx.Param

    def __init__(self, weights: Weights):
        for name, weight in weights.items():
            setattr(self, name, nnx.Param(weight))


class Decoder(nnx.Module):
    """All weights of a model. A plain pytree: no shared references, never mutated."""

    def __init__(self, config: DecoderConfig, weights: Weights, mesh: Mesh | None = None):
        """`weights` by path of the weight table (`embedding`, `blocks.0.q`, …), on the mesh."""
        self.config = config
        self.mesh = mesh or sharding.one_device()
        self.embedding = nnx.Param(weights["embedding"])
        self.final_norm = nnx.Param(weights["final_norm"])
        if not config.tied_embeddings:
            self.head = nnx.Param(weights["head"])
        self.blocks = nnx.List(
            [
                Block({n: weights[f"blocks.{i}.{n}"] for n in block_parameters(config, i)})
                for i in range(config.num_layers)
            ]
        )

    def weight(self, path: str) -> Array:
        """The weight at a path of the weight table."""
        *block, name = path.split(".")
        return getattr(self.blocks[int(block[1])] if block else self, name)[...]

    @property
    def output_table(self) -> Float[Array, "V D"]:
        """The output head's weights: the embedding table where they are tied."""
        return self.embedding[...] if self.config.tied_embeddings else self.head[...]


def random_decoder(
    config: DecoderConfig, seed: int, dtype: DTypeLike = jnp.float32, mesh: Mesh | None = None
) -> Decoder:
    """Fresh weights of a model's shape: normal(0.02) matrices, neutral norms, zero biases.

    The same ones on every mesh; the default device's if None.
    """
    mesh = mesh or sharding.one_device()

    @partial(jax.jit, static_argnums=1)
    def initial(key: Array, parameter: Parameter) -> Array:
        shape = parameter.shape(config)
        if parameter.std:
            weight = (parameter.std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)
        else:
            weight = jnp.full(shape, parameter.mean, dtype)
        placed = weight_sharding(mesh, config, parameter)
        return jax.lax.with_sharding_constraint(weight, placed)

    # Layers of one kind differ in the key alone: each kind is compiled once.
    kinds = model_parameters(config) | block_parameters(config, layer=0)
    paths = list(all_parameters(config))
    keys = jax.random.split(jax.random.key(seed), len(paths))
    weights = {
        path: initial(key, kinds[path.rsplit(".", 1)[-1]])
        for path, key in zip(paths, keys, strict=True)
    }
    return Decoder(config, weights, mesh)


def layer_windows(config: DecoderConfig, length: int) -> list[int | None]:
    """Each layer's attention window at a sequence length, [L]; None where it hides nothing."""
    return [None if window is None or window >= length else window for window in config.windows]


class BlockActivations(NamedTuple):
    """What a block's backward pass needs so that no matrix product is done twice."""

    x: Float[Array, "B T D"]  # the block's input
    q: Float[Array, "B T Q"]
    k: Float[Array, "B T C"]
    v: Float[Array, "B T C"]
    attended: Float[Array, "B T Q"]  # the input of o
    logsumexp: Float[Array, "B T N"]  # of the softmax, float32
    attention_out: Float[Array, "B T D"]  # output of o, before any post-norm
    middle: Float[Array, "B T D"]  # the stream between attention and MLP
    # Of all examples of the tensor group where F is split.
    gate: Float[Array, "Bg T F"]
    up: Float[Array, "Bg T F"]
    mlp_out: Float[Array, "B T D"]  # output of down, before any post-norm


def embed(config: DecoderConfig, table: Float[Array, "_ D"], tokens: Int[Array, "B T"]) -> Array:
    """Token embeddings, [B, T, D]. The table may be a device's part, inside `jax.shard_map`."""
    x = parallel.table_rows(config, table, tokens)
    # The factor is rounded to the weights' dtype, as in transformers.
    return x * jnp.asarray(config.embedding_scale, x.dtype) if config.embedding_scale != 1 else x


def norm(config: DecoderConfig, x: Float[Array, "*B W"], block: Block, name: str) -> Array:
    """One of a block's norms; nothing where the family has none of that name."""
    if name not in block_parameters(config, layer=0):
        return x
    return layers.normalize(config, x, getattr(block, name)[...])


def attention_inputs(
    config: DecoderConfig,
    block: Block,
    q: Float[Array, "B T Q"],
    k: Float[Array, "B T C"],
    v: Float[Array, "B T C"],
) -> tuple[Float[Array, "B T Q"], Float[Array, "B T C"], Float[Array, "B T C"]]:
    """What attention takes of the projections: OLMo cuts them, others normalize q and k."""
    if config.qkv_clip is not None:
        q, k, v = (jnp.clip(y, -config.qkv_clip, config.qkv_clip) for y in (q, k, v))
    if config.qk_norm == "all":
        q, k = norm(config, q, block, "q_norm"), norm(config, k, block, "k_norm")
    elif config.qk_norm == "head":
        by_head = [y.reshape(*y.shape[:2], -1, config.head_dim) for y in (q, k)]
        q = norm(config, by_head[0], block, "q_norm").reshape(q.shape)
        k = norm(config, by_head[1], block, "k_norm").reshape(k.shape)
    return q, k, v


def layer_ropes(
    config: DecoderConfig, tables: Callable[[bool], Float[Array, "2 T half"]]
) -> list[Float[Array, "2 T half"]]:
    """Each layer's RoPE tables, [L]; `tables` makes those of layers without and with a window."""
    windowed = [bool(config.window_rope_theta and window) for window in config.windows]
    made = {kind: tables(kind) for kind in sorted(set(windowed))}
    return [made[kind] for kind in windowed]


def bias(config: DecoderConfig, block: Block, name: str) -> Array | float:
    """Bias of q, k or v; 0.0 where the family has none."""
    return getattr(block, f"{name}_bias")[...] if config.qkv_bias else 0.0


def matrix(config: DecoderConfig, block: Block, name: str) -> Matrix:
    """One of a block's `MATRICES`, for use on the device."""
    return parallel.matrix(getattr(block, name)[...], block_parameters(config, 0)[name], config)


def block_forward(
    config: DecoderConfig,
    block: Block,
    x: Float[Array, "B T D"],
    rope: Float[Array, "2 T half"],
    window: int | None,
) -> tuple[Float[Array, "B T D"], BlockActivations]:
    """One block: its output and the activations that its backward pass needs.

    Weights may be the parts that a device of a mesh holds, inside `jax.shard_map`; x is then its
    own examples.
    """
    h = norm(config, x, block, "attention_norm")
    matrices = {name: matrix(config, block, name) for name in MATRICES}
    heads = from_stream(h, *(matrices[name] for name in "qkv"))
    q, k, v = (
        own_examples(y, matrices[name]) + bias(config, block, name)
        for name, y in zip("qkv", heads, strict=True)
    )
    heads = attention_inputs(config, block, q, k, v)
    attended, logsumexp = attention(config, window, *heads, rope)
    o = matrices["o"]
    attention_out = to_stream((own_columns(attended, o), o))
    middle = x + norm(config, attention_out, block, "attention_post_norm")

    h = norm(config, middle, block, "mlp_norm")
    gate, up = from_stream(h, matrices["gate"], matrices["up"])
    mlp_out = to_stream((layers.gated(config, gate, up), matrices["down"]))
    out = middle + norm(config, mlp_out, block, "mlp_post_norm")
    kept = BlockActivations(
        x, q, k, v, attended, logsumexp, attention_out, middle, gate, up, mlp_out
    )
    return out, kept


_first_input = jax.jit(embed, static_argnums=0)
_rope_tables = jax.jit(layers.rope_tables, static_argnums=(0, 1, 2))


@partial(jax.jit, static_argnums=(0, 4))
def _block_output(
    config: DecoderConfig, block: Block, x: Array, rope: Array, window: int | None
) -> Array:
    return block_forward(config, block, x, rope, window)[0]


def hidden_states(model: Decoder, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """The stream after the last block, before the final norm.

    Called outside of `jax.jit`, each batch shape costs the compilation of a single block.
    """
    config = model.config
    length = tokens.shape[1]
    x = _first_input(config, model.embedding[...], tokens)
    ropes = layer_ropes(config, partial(_rope_tables, config, length))
    windows = layer_windows(config, length)
    for block, rope, window in zip(model.blocks, ropes, windows, strict=True):
        x = _block_output(config, block, x, rope, window)
    return x


def project_logits(
    config: DecoderConfig,
    final_norm: Float[Array, " D"],
    table: Float[Array, "V D"],
    x: Float[Array, "*B D"],
) -> Float[Array, "*B V"]:
    """Final norm, output head and soft cap; float32."""
    x = layers.normalize(config, x, final_norm)
    scores = layers.einsum("...d,vd->...v", x, table, preferred_element_type=jnp.float32)
    return layers.soft_cap(scores, config.logits_softcap)


def token_losses(scores: Float[Array, "*B V"], labels: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """`-log softmax(scores)[label]`, in nats.

    As `log(1 + Σ exp(score - label's score))` over the other entries: neither the rounding of
    large scores stands in the loss, nor in a small loss that of a probability near 1.
    """
    chosen = jnp.take_along_axis(scores, labels[..., None], axis=-1)[..., 0]
    entry = jnp.arange(scores.shape[-1], dtype=labels.dtype)
    others = jnp.where(entry == labels[..., None], -jnp.inf, scores)
    largest = jax.lax.stop_gradient(others.max(axis=-1))
    total = jnp.exp(others - largest[..., None]).sum(axis=-1)
    return jnp.logaddexp(0, jnp.log(total) + (largest - chosen))


@jax.jit
def logits(model: Decoder, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    """Next-token scores of every position, float32."""
    x = hidden_states(model, tokens)
    return project_logits(model.config, model.final_norm[...], model.output_table, x)
