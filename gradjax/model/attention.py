"""Causal grouped-query attention that never holds T×T scores.

Queries and keys are taken in chunks, with a running softmax over the key chunks that a query
chunk sees; the backward pass makes each chunk's weights again from the logarithms of the softmax
sums (FlashAttention, arXiv 2205.14135, in plain JAX: true float32 with soft caps and windows,
which no fused kernel offers at once). Up to one chunk it is the textbook formula.

The query heads of a key/value head lie below each other, so that each product of a chunk pair is
one matrix product per example and key/value head: chunked arrays are [n, B, K, ...], n chunks of
S keys, or of M = G·S queries.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gradjax.model.config import DecoderConfig
from gradjax.model.layers import HIDDEN, einsum, rotate, soft_cap_slope
from gradjax.sharding import platform

# Most tokens whose scores exist at a time, as queries and as keys. On a CPU the fastest of 128 to
# 1,024 (scores stay in the cache); on a TPU by the compiler's cycles, of v5e, v5p and v6e alike
# (benchmarks/RESULTS.md); on a GPU not measured, large enough to fill it.
CHUNKS = {"cpu": 256, "gpu": 1024, "tpu": 512}
Index = Array | int  # of a chunk; an int where there is only one
_einsum = partial(einsum, preferred_element_type=jnp.float32)


_with_own_backward: Any = partial(jax.custom_vjp, nondiff_argnums=(0, 1))


@_with_own_backward
def attention(
    config: DecoderConfig,
    window: int | None,
    q: Float[Array, "B T Q"],
    k: Float[Array, "B T C"],
    v: Float[Array, "B T C"],
    rope: Float[Array, "2 T half"],
) -> tuple[Float[Array, "B T Q"], Float[Array, "B T N"]]:
    """Attention between the projections q, k, v and the input of o.

    A token sees itself and all tokens before it, or the `window - 1` before it. Scores and softmax
    are float32.

    Returns:
      What o takes, and the logarithm of each softmax's sum, which `attention_backward` needs and
      through which no gradient is taken.
    """
    qs, ks, vs = _rotated_chunks(config, q, k, v, rope)

    def queries(_: None, i: Index) -> tuple[None, tuple[Array, Array]]:
        def keys(j: Index, carry: tuple[Array, Array, Array], masked: bool) -> Any:
            largest, total, out = carry
            scores, _ = _scores(config, qs[i], ks[j])
            scores = _masked(scores, ks.shape[3], i - j, window) if masked else scores
            new = jnp.maximum(largest, scores.max(axis=-1))
            weights = jnp.exp(scores - new[..., None])
            shrink = jnp.exp(largest - new)
            seen = _einsum("bkms,bksh->bkmh", weights.astype(v.dtype), vs[j])
            total = total * shrink + weights.sum(axis=-1)
            return new, total, out * shrink[..., None] + seen

        f32 = partial(jnp.full, dtype=jnp.float32)
        rows = qs.shape[1:-1]
        start = (f32(rows, HIDDEN), f32(rows, 0), f32(qs.shape[1:], 0))
        largest, total, out = _over_visible(ks, i, window, keys, start)
        return None, ((out / total[..., None]).astype(q.dtype), largest + jnp.log(total))

    _, (out, logsumexp) = _over_chunks(ks, queries, None)
    joined = partial(_joined, length=q.shape[1])
    return joined(out), joined(logsumexp[..., None])


def attention_backward(
    config: DecoderConfig,
    window: int | None,
    q: Float[Array, "B T Q"],
    k: Float[Array, "B T C"],
    v: Float[Array, "B T C"],
    rope: Float[Array, "2 T half"],
    out: Float[Array, "B T Q"],
    logsumexp: Float[Array, "B T N"],
    cotangent: Float[Array, "B T Q"],
) -> tuple[Float[Array, "B T Q"], Float[Array, "B T C"], Float[Array, "B T C"]]:
    """The cotangents of q, k and v, given that of `out`."""
    qs, ks, vs = _rotated_chunks(config, q, k, v, rope)
    chunked = partial(_chunked, config, chunks=len(qs))
    cotangents, outs = (chunked(_heads(config, x)) for x in (cotangent, out))
    sums = chunked(logsumexp[..., None])
    # Σ_s weight · (its cotangent): what the softmax's Jacobian takes off each score of a row.
    products = cotangents.astype(jnp.float32) * outs.astype(jnp.float32)
    means = products.sum(axis=-1, keepdims=True)

    def queries(carry: tuple[Array, Array], i: Index) -> tuple[tuple[Array, Array], Array]:
        def keys(j: Index, carry: tuple[Array, Array, Array], masked: bool) -> Any:
            dq, dk, dv = carry
            scores, slope = _scores(config, qs[i], ks[j])
            scores = _masked(scores, ks.shape[3], i - j, window) if masked else scores
            weights = jnp.exp(scores - sums[i])
            dweights = _einsum("bkmh,bksh->bkms", cotangents[i], vs[j])
            dscores = (weights * (dweights - means[i]) * slope).astype(q.dtype)
            dq += _einsum("bkms,bksh->bkmh", dscores, ks[j])
            # With S last no operand is transposed: three times as fast on a CPU.
            dk_j = _einsum("bkmh,bkms->bkhs", qs[i], dscores)
            dv_j = _einsum("bkmh,bkms->bkhs", cotangents[i], weights.astype(v.dtype))
            return dq, dk.at[j].add(dk_j), dv.at[j].add(dv_j)

        start = (jnp.zeros(qs.shape[1:], jnp.float32), *carry)
        dq, dk, dv = _over_visible(ks, i, window, keys, start)
        return (dk, dv), dq

    zeros = jnp.zeros((*ks.shape[:3], ks.shape[4], ks.shape[3]), jnp.float32)
    (dk, dv), dq = _over_chunks(ks, queries, (zeros, zeros))
    dk, dv = (jnp.swapaxes(x, 3, 4) for x in (dk, dv))
    dq, dk = (x * config.query_scale for x in (dq, dk))
    dq, dk, dv = (_joined(x, q.shape[1]).astype(q.dtype) for x in (dq, dk, dv))
    cos, sin = rope
    unrotate = partial(_rotate_heads, config, rope=jnp.stack([cos, -sin]))
    return unrotate(dq), unrotate(dk), dv


def _forward_rule(
    config: DecoderConfig, window: int | None, *inputs: Array
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    out, logsumexp = attention(config, window, *inputs)
    return (out, logsumexp), (*inputs, out, logsumexp)


def _backward_rule(
    config: DecoderConfig,
    window: int | None,
    kept: tuple[Any, ...],
    cotangents: tuple[Array, Array],
) -> tuple[Array | None, ...]:
    q, k, v, rope, out, logsumexp = kept
    found = attention_backward(config, window, q, k, v, rope, out, logsumexp, cotangents[0])
    return *found, None


attention.defvjp(_forward_rule, _backward_rule)


def _scores(
    config: DecoderConfig, q: Float[Array, "B K M H"], k: Float[Array, "B K S H"]
) -> tuple[Float[Array, "B K M S"], Array | float]:
    """Capped scores of one chunk pair, and their slope over the scaled q·k."""
    scores = _einsum("bkmh,bksh->bkms", q, k) * config.query_scale
    return soft_cap_slope(scores, config.attention_softcap)


def _masked(
    scores: Float[Array, "B K M S"], chunk: int, apart: Index, window: int | None
) -> Float[Array, "B K M S"]:
    """Scores of chunks so many chunks apart, those that a token does not see hidden."""
    tokens = jnp.arange(chunk, dtype=jnp.int32)
    distance = apart * chunk + tokens[:, None] - tokens[None, :]
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    visible = jnp.tile(visible, (scores.shape[2] // chunk, 1))
    return jnp.where(visible, scores, HIDDEN)


def _over_chunks(
    ks: Float[Array, "n B K S H"], body: Callable[[Any, Any], tuple[Any, Any]], start: Any
) -> tuple[Any, Any]:
    """`lax.scan` over the numbers of the query chunks; without a loop where there is one."""
    if len(ks) == 1:
        carry, result = body(start, 0)
        return carry, jax.tree.map(lambda x: x[None], result)
    return jax.lax.scan(body, start, jnp.arange(len(ks), dtype=jnp.int32))


def _over_visible(
    ks: Float[Array, "n B K S H"],
    i: Index,
    window: int | None,
    body: Callable[[Any, Any, bool], Any],
    start: Any,
) -> Any:
    """The carry after all key chunks that query chunk i sees, its own being the last."""
    if len(ks) > 1:
        chunk, masked = ks.shape[3], window is not None
        first = 0 if window is None else jnp.maximum((i * chunk - window + 1) // chunk, 0)
        start = jax.lax.fori_loop(first, i, lambda j, carry: body(j, carry, masked), start)
    return body(i, start, True)


def _rotated_chunks(
    config: DecoderConfig, q: Array, k: Array, v: Array, rope: Array
) -> tuple[Float[Array, "n B K M H"], Float[Array, "n B K S H"], Float[Array, "n B K S H"]]:
    """q, k (rotated) and v in equal chunks of at most `CHUNKS` tokens, zero-padded at the end."""
    chunks = -(-q.shape[1] // CHUNKS[platform()])
    q, k = (_rotate_heads(config, x, rope) for x in (q, k))
    q, k, v = (_chunked(config, _heads(config, x), chunks) for x in (q, k, v))
    return q, k, v


def _heads(config: DecoderConfig, x: Float[Array, "B T W"]) -> Float[Array, "B T heads H"]:
    return x.reshape(*x.shape[:2], -1, config.head_dim)


def _rotate_heads(
    config: DecoderConfig, x: Float[Array, "B T W"], rope: Float[Array, "2 T half"]
) -> Float[Array, "B T W"]:
    return rotate(_heads(config, x), rope).reshape(x.shape)


def _chunked(
    config: DecoderConfig, x: Float[Array, "B T heads W"], chunks: int
) -> Float[Array, "n B K M W"]:
    """The heads of each key/value head below each other, chunk by chunk; of keys M is S."""
    batch, length, _, width = x.shape
    chunk = -(-length // chunks)
    x = jnp.pad(x, ((0, 0), (0, chunks * chunk - length), (0, 0), (0, 0)))
    x = x.reshape(batch, chunks, chunk, config.num_kv_heads, -1, width)
    return x.transpose(1, 0, 3, 4, 2, 5).reshape(chunks, batch, config.num_kv_heads, -1, width)


def _joined(x: Float[Array, "n B K M H"], length: int) -> Float[Array, "B T W"]:
    """The reverse of `_chunked`, heads side by side."""
    chunks, batch, heads, rows, width = x.shape
    chunk = -(-length // chunks)
    x = x.reshape(chunks, batch, heads, rows // chunk, chunk, width).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(batch, chunks * chunk, -1)[:, :length]
