"""Per-example attention gradients as factors (X, Δ), layer by layer from the top.

With X (T×I) the input of a projection and Δ (T×O) the cotangent of its output, an example's
gradient is `G = ΔᵀX`. Only activations get cotangents: the cost is a forward pass and the
input-gradient half of a backward pass. The block's backward pass is written out so that each
matrix product of the forward pass happens once: norms, activations and the attention core
are recomputed from what was kept, through `jax.vjp`.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from gradjax import sharding
from gradjax.model import decoder, layers
from gradjax.model.attention import attention_backward
from gradjax.model.config import DecoderConfig
from gradjax.model.decoder import Block, BlockActivations, Decoder
from gradjax.model.parallel import (
    from_stream,
    own_columns,
    own_examples,
    to_stream,
    weight_spec,
    whole_table,
)
from gradjax.model.parameters import block_parameters, model_parameters
from gradjax.sharding import EVERYWHERE, EXAMPLES
from gradjax.structs import Factors, Projection

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
    config, mesh, length = model.config, model.mesh, tokens.shape[1]
    rope = _rope_tables(config, length)
    windows = [jnp.int32(window) for window in decoder.layer_windows(config, length)]
    x = _embed(mesh, config, model.embedding[...], tokens)
    kept: list[BlockActivations | Array] = []
    for layer, block in enumerate(model.blocks):
        block_input = x
        x, activations = _block_forward(mesh, config, block, x, rope, windows[layer])
        if layer >= lowest_layer:
            kept.append(activations if keep_activations else block_input)
        del activations
    table = model.output_table
    losses, cotangent = _head_gradient(
        mesh, config, model.final_norm[...], table, x, tokens, targets
    )
    del x

    def backward(cotangent: Array) -> Iterator[tuple[int, Factors]]:
        for layer in reversed(range(lowest_layer, config.num_layers)):
            block, activations = model.blocks[layer], kept.pop()
            rest = (rope, windows[layer])
            if not isinstance(activations, BlockActivations):
                _, activations = _block_forward(mesh, config, block, activations, *rest)
            cotangent, factors = _block_backward(mesh, config, block, activations, cotangent, *rest)
            del activations
            yield layer, factors

    return losses, backward(cotangent)


def activation_bytes(config: DecoderConfig, itemsize: int) -> int:
    """Bytes of `BlockActivations` per token and block."""
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    width = 4 * config.hidden_size + heads * config.head_dim + 2 * config.mlp_size
    return width * itemsize + 4 * config.num_heads


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
    table = whole_table(config, table)
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


@partial(jax.jit, static_argnums=(0, 1))
def _embed(mesh: Mesh, config: DecoderConfig, table: Array, tokens: Array) -> Array:
    return _on_mesh(
        mesh,
        partial(decoder.embed, config),
        (_table_spec(mesh, config), EXAMPLES),
        EXAMPLES,
    )(table, tokens)


@partial(jax.jit, static_argnums=(0, 1))
def _head_gradient(mesh: Mesh, config: DecoderConfig, *arrays: Array) -> tuple[Array, Array]:
    specs = (EVERYWHERE, _table_spec(mesh, config), EXAMPLES, EXAMPLES, EXAMPLES)
    return _on_mesh(mesh, partial(head_gradient, config), specs, EXAMPLES)(*arrays)


@partial(jax.jit, static_argnums=(0, 1))
def _block_forward(
    mesh: Mesh, config: DecoderConfig, block: Block, x: Array, rope: Array, window: Array
) -> tuple[Array, BlockActivations]:
    specs = (_block_specs(mesh, config, block), EXAMPLES, EVERYWHERE, EVERYWHERE)
    out_specs = (EXAMPLES, _activation_specs(mesh, config))
    run = partial(decoder.block_forward, config)
    return _on_mesh(mesh, run, specs, out_specs)(block, x, rope, window)


@partial(jax.jit, static_argnums=(0, 1))
def _block_backward(
    mesh: Mesh,
    config: DecoderConfig,
    block: Block,
    kept: BlockActivations,
    cotangent: Array,
    rope: Array,
    window: Array,
) -> tuple[Array, Factors]:
    activations = _activation_specs(mesh, config)
    block_specs = _block_specs(mesh, config, block)
    specs = (block_specs, activations, EXAMPLES, EVERYWHERE, EVERYWHERE)
    run = partial(block_backward, config)
    return _on_mesh(mesh, run, specs, EXAMPLES)(block, kept, cotangent, rope, window)


def _on_mesh(mesh: Mesh, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def _table_spec(mesh: Mesh, config: DecoderConfig) -> PartitionSpec:
    return weight_spec(mesh, config, model_parameters(config)["embedding"])


def _block_specs(mesh: Mesh, config: DecoderConfig, block: Block) -> Block:
    table = block_parameters(config, layer=0)
    specs = {name: weight_spec(mesh, config, table[name]) for name in table}
    return jax.tree.map_with_path(
        lambda path, _: specs[jax.tree_util.keystr(path[:1], simple=True)], block
    )


def _activation_specs(mesh: Mesh, config: DecoderConfig) -> BlockActivations:
    split = config.mlp_size % mesh.shape[sharding.TENSOR] == 0
    group = sharding.GROUP if split else EXAMPLES
    specs: dict[str, Any] = {
        n: group if n in ("gate", "up") else EXAMPLES for n in BlockActivations._fields
    }
    return BlockActivations(**specs)


def block_backward(
    config: DecoderConfig,
    block: Block,
    kept: BlockActivations,
    cotangent: Float[Array, "B T D"],
    rope: Float[Array, "2 T half"],
    window: Int[Array, ""],
) -> tuple[Float[Array, "B T D"], Factors]:
    """The cotangent of a block's input, and the factors of its four projections."""
    norm = partial(decoder.norm, config)
    matrices = {name: decoder.matrix(config, block, name) for name in decoder.MATRICES}

    def through_post_norm(out: Array, name: str, cotangent: Array) -> Array:
        post_norm = partial(decoder.post_norm, config, block=block, name=name)
        return jax.vjp(lambda out: post_norm(out), out)[1](cotangent)[0]

    delta = through_post_norm(kept.mlp_out, "mlp_post_norm", cotangent)
    (hidden,) = from_stream(delta, matrices["down"])
    gate, up = jax.vjp(partial(layers.gated, config), kept.gate, kept.up)[1](hidden)
    hidden = to_stream((gate, matrices["gate"]), (up, matrices["up"]))
    _, norm_vjp = jax.vjp(lambda x: norm(x, block.mlp_norm[...]), kept.middle)
    cotangent += norm_vjp(hidden)[0]

    o = through_post_norm(kept.attention_out, "attention_post_norm", cotangent)
    (hidden,) = from_stream(o, matrices["o"])
    attended, heads = kept.attended, (kept.q, kept.k, kept.v)
    from_o = own_examples(hidden, matrices["o"])
    q, k, v = attention_backward(config, *heads, rope, window, attended, kept.logsumexp, from_o)
    pairs = ((delta, matrices[name]) for name, delta in zip("qkv", (q, k, v), strict=True))
    hidden = to_stream(*((own_columns(delta, matrix), matrix) for delta, matrix in pairs))
    normed, norm_vjp = jax.vjp(lambda x: norm(x, block.attention_norm[...]), kept.x)
    cotangent += norm_vjp(hidden)[0]
    return cotangent, Factors(x_qkv=normed, x_o=attended, q=q, k=k, v=v, o=o)


@jax.jit
def mask_factors(factors: Factors, contributing: dict[Projection, Bool[Array, "B T"]]) -> Factors:
    """Factors whose rows are zero for tokens that do not contribute (`contributing_tokens`).

    A row of an input stays where any projection that shares the input needs it.
    """
    masks = {name: mask[..., None] for name, mask in contributing.items()}
    qkv = masks["q"] | masks["k"] | masks["v"]
    return Factors(
        x_qkv=jnp.where(qkv, factors.x_qkv, 0),
        x_o=jnp.where(masks["o"], factors.x_o, 0),
        **{name: jnp.where(mask, getattr(factors, name), 0) for name, mask in masks.items()},
    )
