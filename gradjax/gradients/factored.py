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
from gradjax.sharding import EVERYWHERE, EXAMPLES, platform
from gradjax.structs import ATTENTION, Factors, Projection, factor_names

# Target tokens and entries of the vocabulary whose logits exist at a time. On a CPU 128 tokens are
# within a tenth of the two products alone, and few of a short answer's slots are filler; on a TPU
# the compiler's cycles of 512 are half those of 128 in bfloat16, which read the table more often.
HEAD_CHUNKS = {"cpu": 128, "gpu": 512, "tpu": 512}
VOCABULARY_CHUNK = 4096


def layer_factors(
    model: Decoder,
    tokens: Int[Array, "B T"],
    targets: Bool[Array, "B T"],
    projections: tuple[Projection, ...] = ATTENTION,
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
      projections: whose factors there are to be.
    """
    config, mesh, length = model.config, model.mesh, tokens.shape[1]
    ropes = decoder.layer_ropes(config, partial(_rope_tables, config, length))
    windows = decoder.layer_windows(config, length)
    x = embed_on_mesh(mesh, config, model.embedding[...], tokens)
    kept: list[BlockActivations | Array] = []
    for layer, block in enumerate(model.blocks):
        block_input = x
        x, activations = block_forward_on_mesh(mesh, config, block, x, ropes[layer], windows[layer])
        if layer >= lowest_layer:
            kept.append(activations if keep_activations else block_input)
        del activations
    table = model.output_table
    losses, cotangent = head_on_mesh(mesh, config, model.final_norm[...], table, x, tokens, targets)
    del x

    def backward(cotangent: Array) -> Iterator[tuple[int, Factors]]:
        for layer in reversed(range(lowest_layer, config.num_layers)):
            block, activations = model.blocks[layer], kept.pop()
            rest = (ropes[layer], windows[layer])
            if not isinstance(activations, BlockActivations):
                _, activations = block_forward_on_mesh(mesh, config, block, activations, *rest)
            cotangent, factors = block_backward_on_mesh(
                mesh, config, projections, block, activations, cotangent, *rest
            )
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

    For a chunk of `HEAD_CHUNKS` target positions at a time: tokens without loss cost nothing.
    """
    table = whole_table(config, table)
    batch, length, width = x.shape
    predicts = jnp.pad(targets[:, 1:], ((0, 0), (0, 1)))  # position t predicts token t + 1
    labels = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1))).reshape(-1)
    counts = jnp.maximum(predicts.sum(axis=1), 1).astype(jnp.float32)
    weights = (predicts.astype(jnp.float32) / counts[:, None]).reshape(-1)
    # Positions with loss first, in order; the loop ends after the last of them.
    order = jnp.argsort(~predicts.reshape(-1), stable=True)
    chunk = min(HEAD_CHUNKS[platform()], batch * length)
    order = jnp.pad(order, (0, -order.size % chunk), constant_values=batch * length)
    flat = x.reshape(-1, width)

    def step(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        terms, gradient = carry
        at = jax.lax.dynamic_slice_in_dim(order, i * chunk, chunk)
        take = partial(jnp.take, indices=at, axis=0, mode="clip")
        normed, norm_vjp = jax.vjp(
            lambda rows: layers.normalize(config, rows, final_norm), take(flat)
        )
        losses, cotangents = token_losses_gradient(config, table, normed, take(labels))
        weight = take(weights) * (at < batch * length).astype(jnp.float32)
        (rows,) = norm_vjp((weight[:, None] * cotangents).astype(normed.dtype))
        return (
            terms.at[at].set(weight * losses, mode="drop"),
            gradient.at[at].set(rows, mode="drop"),
        )

    chunks = (predicts.sum() + chunk - 1) // chunk
    zeros = (jnp.zeros(batch * length, jnp.float32), jnp.zeros_like(flat))
    terms, gradient = jax.lax.fori_loop(0, chunks, step, zeros)
    return terms.reshape(batch, length).sum(axis=1), gradient.reshape(x.shape)


def token_losses_gradient(
    config: DecoderConfig,
    table: Float[Array, "V D"],
    normed: Float[Array, "M D"],
    labels: Int[Array, " M"],
) -> tuple[Float[Array, " M"], Float[Array, "M D"]]:
    """`-log softmax(scores)[label]` of M tokens and its gradient with respect to `normed`, float32.

    The vocabulary is gone through once, in chunks, with a running softmax, so that no exponential
    is taken twice and all logits never exist. The label is apart from the other entries: what its
    probability lacks of 1 is a sum of theirs, not a difference that would lose its digits.
    """
    chunk = min(VOCABULARY_CHUNK, len(table))
    product = partial(layers.einsum, preferred_element_type=jnp.float32)
    own = jnp.take(table, labels, axis=0)
    label_score, label_slope = layers.soft_cap_slope(
        product("md,md->m", normed, own), config.logits_softcap
    )

    def entries(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        largest, total, pulled = carry
        first = jnp.minimum(i * chunk, len(table) - chunk)  # the last chunk begins in one before
        part = jax.lax.dynamic_slice_in_dim(table, first, chunk)
        scores, slope = layers.soft_cap_slope(
            product("md,vd->mv", normed, part), config.logits_softcap
        )
        entry = first + jnp.arange(chunk, dtype=jnp.int32)
        hidden = (entry == labels[:, None]) | (entry < i * chunk)
        scores = jnp.where(hidden, layers.HIDDEN, scores)
        new = jnp.maximum(largest, scores.max(axis=-1))
        weights, shrink = jnp.exp(scores - new[:, None]), jnp.exp(largest - new)
        pull = product("mv,vd->md", (weights * slope).astype(table.dtype), part)
        return new, total * shrink + weights.sum(axis=-1), pulled * shrink[:, None] + pull

    start = (label_score, jnp.zeros_like(label_score), jnp.zeros(normed.shape, jnp.float32))
    largest, others, pulled = jax.lax.fori_loop(0, -(-len(table) // chunk), entries, start)
    losses = jnp.logaddexp(0, jnp.log(others) + (largest - label_score))
    total = others + jnp.exp(label_score - largest)
    pulled -= (others * label_slope)[:, None] * own.astype(jnp.float32)
    return losses, pulled / total[:, None]


_rope_tables = jax.jit(layers.rope_tables, static_argnums=(0, 1, 2))


@partial(jax.jit, static_argnums=(0, 1))
def embed_on_mesh(mesh: Mesh, config: DecoderConfig, table: Array, tokens: Array) -> Array:
    """`decoder.embed`, every device with its examples."""
    return _on_mesh(
        mesh,
        partial(decoder.embed, config),
        (_table_spec(mesh, config), EXAMPLES),
        EXAMPLES,
    )(table, tokens)


@partial(jax.jit, static_argnums=(0, 1))
def head_on_mesh(mesh: Mesh, config: DecoderConfig, *arrays: Array) -> tuple[Array, Array]:
    """`head_gradient`, every device with its examples."""
    specs = (EVERYWHERE, _table_spec(mesh, config), EXAMPLES, EXAMPLES, EXAMPLES)
    return _on_mesh(mesh, partial(head_gradient, config), specs, EXAMPLES)(*arrays)


@partial(jax.jit, static_argnums=(0, 1, 5))
def block_forward_on_mesh(
    mesh: Mesh, config: DecoderConfig, block: Block, x: Array, rope: Array, window: int | None
) -> tuple[Array, BlockActivations]:
    """`decoder.block_forward`, every device with its examples."""
    specs = (_block_specs(mesh, config, block), EXAMPLES, EVERYWHERE)
    out_specs = (EXAMPLES, activation_specs(mesh, config))
    run = partial(decoder.block_forward, config, window=window)
    return _on_mesh(mesh, run, specs, out_specs)(block, x, rope)


@partial(jax.jit, static_argnums=(0, 1, 2, 7))
def block_backward_on_mesh(
    mesh: Mesh,
    config: DecoderConfig,
    projections: tuple[Projection, ...],
    block: Block,
    kept: BlockActivations,
    cotangent: Array,
    rope: Array,
    window: int | None,
) -> tuple[Array, Factors]:
    """`block_backward`, every device with its examples."""
    activations = activation_specs(mesh, config)
    block_specs = _block_specs(mesh, config, block)
    specs = (block_specs, activations, EXAMPLES, EVERYWHERE)
    run = partial(block_backward, config, projections, window=window)
    return _on_mesh(mesh, run, specs, EXAMPLES)(block, kept, cotangent, rope)


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


def activation_specs(mesh: Mesh, config: DecoderConfig) -> BlockActivations:
    """How activations lie on a mesh: those of the MLP split, where it divides, the rest whole."""
    split = config.mlp_size % mesh.shape[sharding.TENSOR] == 0
    group = sharding.GROUP if split else EXAMPLES
    specs: dict[str, Any] = {
        n: group if n in ("gate", "up") else EXAMPLES for n in BlockActivations._fields
    }
    return BlockActivations(**specs)


def block_backward(
    config: DecoderConfig,
    projections: tuple[Projection, ...],
    block: Block,
    kept: BlockActivations,
    cotangent: Float[Array, "B T D"],
    rope: Float[Array, "2 T half"],
    window: int | None,
) -> tuple[Float[Array, "B T D"], Factors]:
    """The cotangent of a block's input, and the factors of some of its projections."""
    norm = partial(decoder.norm, config, block=block)
    matrices = {name: decoder.matrix(config, block, name) for name in decoder.MATRICES}

    def through_norm(x: Array, name: str, cotangent: Array) -> Array:
        return jax.vjp(lambda x: norm(x, name=name), x)[1](cotangent)[0]

    delta = through_norm(kept.mlp_out, "mlp_post_norm", cotangent)
    down = delta
    (hidden,) = from_stream(delta, matrices["down"])
    gate, up = jax.vjp(partial(layers.gated, config), kept.gate, kept.up)[1](hidden)
    hidden = to_stream((gate, matrices["gate"]), (up, matrices["up"]))
    cotangent += through_norm(kept.middle, "mlp_norm", hidden)

    o = through_norm(kept.attention_out, "attention_post_norm", cotangent)
    (hidden,) = from_stream(o, matrices["o"])
    attended, attention_inputs = kept.attended, partial(decoder.attention_inputs, config, block)
    heads, heads_vjp = jax.vjp(attention_inputs, kept.q, kept.k, kept.v)
    from_o = own_examples(hidden, matrices["o"])
    kept_sums = (attended, kept.logsumexp)
    q, k, v = heads_vjp(attention_backward(config, window, *heads, rope, *kept_sums, from_o))
    pairs = ((delta, matrices[name]) for name, delta in zip("qkv", (q, k, v), strict=True))
    hidden = to_stream(*((own_columns(delta, matrix), matrix) for delta, matrix in pairs))
    normed, norm_vjp = jax.vjp(lambda x: norm(x, name="attention_norm"), kept.x)
    cotangent += norm_vjp(hidden)[0]
    # Of the MLP on a tensor group, all columns of own examples. What is not wanted is not computed.
    own = {name: own_examples(y, matrices[name]) for name, y in (("gate", gate), ("up", up))}
    gated = own_examples(layers.gated(config, kept.gate, kept.up), matrices["down"])
    inputs = {"x_qkv": normed, "x_o": attended, "x_mlp": norm(kept.middle, name="mlp_norm")}
    factors = inputs | own | {"x_down": gated, "q": q, "k": k, "v": v, "o": o, "down": down}
    return cotangent, Factors(**{name: factors[name] for name in factor_names(projections)})


@jax.jit
def mask_factors(factors: Factors, contributing: dict[Projection, Bool[Array, "B T"]]) -> Factors:
    """Factors whose Δ is zero for tokens that do not contribute (`contributing_tokens`).

    Their inputs are multiplied by zero then, and stay as they are: finite in any sound row.
    """
    return factors._replace(
        **{
            name: jnp.where(mask[..., None], getattr(factors, name), 0)
            for name, mask in contributing.items()
        }
    )
