"""Per-example attention gradients as factors (X, Δ), layer by layer from the top.

With X (T×I) the input of a projection and Δ (T×O) the cotangent of its output, an example's
gradient is `G = ΔᵀX`. Only activations get cotangents: the cost is a forward pass and the
input-gradient half of a backward pass. The block's backward pass is written out so that each
matrix product of the forward pass happens once: norms, activations and the attention core
are recomputed from what was kept, through `jax.vjp`.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gradjax.model import decoder, layers
from gradjax.model.attention import attention_backward
from gradjax.model.config import DecoderConfig
from gradjax.model.decoder import Block, BlockActivations, Decoder
from gradjax.structs import Factors

# Target tokens whose logits exist at a time: 78 MB of float32 at a vocabulary of 152k.
HEAD_CHUNK = 128


def attention_gradients(
    model: Decoder,
    tokens: Int[Array, "B T"],
    targets: Bool[Array, "B T"],
    lowest_layer: int = 0,
    *,
    keep_activations: bool = True,
) -> tuple[Float[Array, " B"], Iterator[tuple[int, Factors]]]:
    """The losses of a batch and an iterator over (layer, factors), from the top layer down.

    The backward pass runs as the iterator is consumed and ends at `lowest_layer`. Without
    `keep_activations` only each block's input is kept and its forward pass is repeated:
    about a third more work, memory of one block instead of all.

    Args:
      tokens: token ids, padded on the right.
      targets: true at the tokens that the loss is the mean over (paper, eq. 1).
    """
    config, length = model.config, tokens.shape[1]
    rope = _rope_tables(config, length)
    windows = [jnp.int32(window) for window in decoder.layer_windows(config, length)]
    x = _embed(config, model.embedding[...], tokens)
    kept: list[BlockActivations | Array] = []
    for layer, block in enumerate(model.blocks):
        block_input = x
        x, activations = _block_forward(config, block, x, rope, windows[layer])
        if layer >= lowest_layer:
            kept.append(activations if keep_activations else block_input)
        del activations
    losses, cotangent = head_gradient(
        config, model.final_norm[...], model.output_table, x, tokens, targets
    )
    del x

    def backward(cotangent: Array) -> Iterator[tuple[int, Factors]]:
        for layer in reversed(range(lowest_layer, config.num_layers)):
            block, activations = model.blocks[layer], kept.pop()
            if not isinstance(activations, BlockActivations):
                _, activations = _block_forward(config, block, activations, rope, windows[layer])
            cotangent, factors = _block_backward(
                config, block, activations, cotangent, rope, windows[layer]
            )
            del activations
            yield layer, factors

    return losses, backward(cotangent)


def activation_bytes(config: DecoderConfig, itemsize: int) -> int:
    """Bytes of `BlockActivations` per token and block."""
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    width = 4 * config.hidden_size + heads * config.head_dim + 2 * config.mlp_size
    return width * itemsize + 4 * config.num_heads


@partial(jax.jit, static_argnums=0)
def head_gradient(
    config: DecoderConfig,
    final_norm: Float[Array, " D"],
    table: Float[Array, "V D"],
    x: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    targets: Bool[Array, "B T"],
) -> tuple[Float[Array, " B"], Float[Array, "B T D"]]:
    """Each row's mean loss over its target tokens and the gradient with respect to x.

    Value and gradient are taken together for `HEAD_CHUNK` target positions at a time, so no
    logits are computed twice, for tokens without loss, or all at once.
    """
    batch, length, width = x.shape
    predicts = jnp.pad(targets[:, 1:], ((0, 0), (0, 1)))  # position t predicts token t + 1
    labels = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1))).reshape(-1)
    counts = jnp.maximum(predicts.sum(axis=1), 1).astype(jnp.float32)
    weights = (predicts.astype(jnp.float32) / counts[:, None]).reshape(-1)
    # Positions with loss first, in order; the loop ends after the last of them.
    order = jnp.argsort(~predicts.reshape(-1), stable=True)
    chunk = min(HEAD_CHUNK, batch * length)
    order = jnp.pad(order, (0, -order.size % chunk), constant_values=batch * length)
    flat = x.reshape(-1, width)

    def chunk_loss(rows: Array, labels: Array, weights: Array) -> tuple[Array, Array]:
        scores = decoder.project_logits(config, final_norm, table, rows)
        terms = weights * decoder.token_losses(scores, labels)
        return terms.sum(), terms

    def step(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        terms, gradient = carry
        at = jax.lax.dynamic_slice_in_dim(order, i * chunk, chunk)
        take = partial(jnp.take, indices=at, axis=0, mode="clip")
        in_range = (at < batch * length).astype(jnp.float32)
        (_, chunk_terms), rows = jax.value_and_grad(chunk_loss, has_aux=True)(
            take(flat), take(labels), take(weights) * in_range
        )
        return (
            terms.at[at].set(chunk_terms, mode="drop"),
            gradient.at[at].set(rows, mode="drop"),
        )

    chunks = (predicts.sum() + chunk - 1) // chunk
    zeros = (jnp.zeros(batch * length, jnp.float32), jnp.zeros_like(flat))
    terms, gradient = jax.lax.fori_loop(0, chunks, step, zeros)
    return terms.reshape(batch, length).sum(axis=1), gradient.reshape(x.shape)


@partial(jax.jit, static_argnums=(0, 1))
def _rope_tables(config: DecoderConfig, length: int) -> Float[Array, "2 T half"]:
    return layers.rope_tables(config, length)


_embed = jax.jit(decoder.embed, static_argnums=0)
_block_forward = jax.jit(decoder.block_forward, static_argnums=0)


@partial(jax.jit, static_argnums=0)
def _block_backward(
    config: DecoderConfig,
    block: Block,
    kept: BlockActivations,
    cotangent: Float[Array, "B T D"],
    rope: Float[Array, "2 T half"],
    window: Int[Array, ""],
) -> tuple[Float[Array, "B T D"], Factors]:
    """The cotangent of a block's input, and the factors of its four projections."""
    norm = partial(decoder.norm, config)

    def through_post_norm(out: Array, name: str, cotangent: Array) -> Array:
        post_norm = partial(decoder.post_norm, config, block=block, name=name)
        return jax.vjp(lambda out: post_norm(out), out)[1](cotangent)[0]

    delta = through_post_norm(kept.mlp_out, "mlp_post_norm", cotangent)
    hidden = layers.linear_transpose(delta, block.down[...])
    gate, up = jax.vjp(partial(layers.gated, config), kept.gate, kept.up)[1](hidden)
    hidden = layers.linear_transpose(gate, block.gate[...])
    hidden += layers.linear_transpose(up, block.up[...])
    _, norm_vjp = jax.vjp(lambda x: norm(x, block.mlp_norm[...]), kept.middle)
    cotangent += norm_vjp(hidden)[0]

    o = through_post_norm(kept.attention_out, "attention_post_norm", cotangent)
    attended, heads = kept.attended, (kept.q, kept.k, kept.v)
    from_o = layers.linear_transpose(o, block.o[...])
    q, k, v = attention_backward(config, *heads, rope, window, attended, kept.log_sums, from_o)
    hidden = layers.linear_transpose(q, block.q[...])
    hidden += layers.linear_transpose(k, block.k[...])
    hidden += layers.linear_transpose(v, block.v[...])
    normed, norm_vjp = jax.vjp(lambda x: norm(x, block.attention_norm[...]), kept.x)
    cotangent += norm_vjp(hidden)[0]
    return cotangent, Factors(x_qkv=normed, x_o=attended, q=q, k=k, v=v, o=o)


def mask_padding(factors: Factors, lengths: Int[Array, " B"]) -> Factors:
    """Factors with the rows of padded tokens set to zero."""
    length = factors.q.shape[1]
    real = (jnp.arange(length, dtype=lengths.dtype) < lengths[:, None])[..., None]
    return dataclasses.replace(
        factors,
        x_qkv=jnp.where(real, factors.x_qkv, 0),
        x_o=jnp.where(real, factors.x_o, 0),
    )
