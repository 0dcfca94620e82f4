"""Causal grouped-query attention that never holds T×T scores.

Queries and keys are taken in chunks, with a running softmax over the key chunks that a query
chunk sees; the backward pass makes each chunk's weights again from the logarithms of the softmax
sums (FlashAttention, arXiv 2205.14135, in plain JAX: true float32 with soft caps and windows,
which no fused kernel offers at once). Up to one chunk it is the textbook formula.

Chunked arrays are [n, B, T, ...]: n chunks of T queries or S keys.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gradjax.model.config import DecoderConfig
from gradjax.model.layers import einsum, rotate, soft_cap

# Most tokens whose scores exist at a time, as queries and as keys. On a CPU the fastest of 128 to
# 1,024 (scores stay in the cache); elsewhere not measured, large enough to fill a GPU.
CHUNKS = {"cpu": 256, "gpu": 1024, "tpu": 1024}
_HIDDEN = float(jnp.finfo(jnp.float32).min)
Index = Array | int  # of a chunk; an int where there is only one
_einsum = partial(einsum, preferred_element_type=jnp.float32)


_with_own_backward: Any = partial(jax.custom_vjp, nondiff_argnums=(0,))


@_with_own_backward
def attention(
    config: DecoderConfig,
    q: Float[Array, "B T Q"],
    k: Float[Array, "B T C"],
    v: Float[Array, "B T C"],
    rope: Float[Array, "2 T half"],
    window: Int[Array, ""],
) -> tuple[Float[Array, "B T Q"], Float[Array, "B T N"]]:
    """Attention between the projections q, k, v and the input of o.

    A token sees itself and the `window - 1` tokens before it. Scores and softmax are float32.

    Returns:
      What o takes, and the logarithm of each softmax's sum, which `attention_backward` needs and
      through which no gradient is taken.
    """
    qs, ks, vs = _rotated_chunks(config, q, k, v, rope)
    _, batch, chunk, *heads, width = qs.shape
    rows = (batch, *heads, chunk)

    def queries(_: None, i: Index) -> tuple[None, tuple[Array, Array]]:
        def keys(j: Index, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            largest, total, out = carry
            scores, _ = _scores(config, qs[i], ks[j], (i - j) * chunk, window)
            new = jnp.maximum(largest, scores.max(axis=-1))
            weights = jnp.exp(scores - new[..., None])
            shrink = jnp.exp(largest - new)
            seen = _einsum("bkgts,bskh->bkgth", weights.astype(v.dtype), vs[j])
            total = total * shrink + weights.sum(axis=-1)
            return new, total, out * shrink[..., None] + seen

        f32 = partial(jnp.full, dtype=jnp.float32)
        start = (f32(rows, _HIDDEN), f32(rows, 0), f32((*rows, width), 0))
        largest, total, out = _over_visible(qs, i, window, keys, start)
        out = (out / total[..., None]).astype(q.dtype)
        return None, (jnp.moveaxis(out, 3, 1), jnp.moveaxis(largest + jnp.log(total), 3, 1))

    _, (out, logsumexp) = _over_chunks(qs, queries, None)
    return _joined(out, q.shape[1]), _joined(logsumexp, q.shape[1])


def attention_backward(
    config: DecoderConfig,
    q: Float[Array, "B T Q"],
    k: Float[Array, "B T C"],
    v: Float[Array, "B T C"],
    rope: Float[Array, "2 T half"],
    window: Int[Array, ""],
    out: Float[Array, "B T Q"],
    logsumexp: Float[Array, "B T N"],
    cotangent: Float[Array, "B T Q"],
) -> tuple[Float[Array, "B T Q"], Float[Array, "B T C"], Float[Array, "B T C"]]:
    """The cotangents of q, k and v, given that of `out`."""
    qs, ks, vs = _rotated_chunks(config, q, k, v, rope)
    chunk = qs.shape[2]
    cotangents, outs = (_chunked(x, len(qs)).reshape(qs.shape) for x in (cotangent, out))
    sums = _chunked(logsumexp, len(qs)).reshape(qs.shape[:-1])
    sums = jnp.moveaxis(sums, 2, -1)[..., None]
    # Σ_s weight · (its cotangent): what the softmax's Jacobian takes off each score of a row.
    means = (cotangents.astype(jnp.float32) * outs.astype(jnp.float32)).sum(axis=-1)
    means = jnp.moveaxis(means, 2, -1)[..., None]

    def queries(carry: tuple[Array, Array], i: Index) -> tuple[tuple[Array, Array], Array]:
        def keys(j: Index, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq, dk, dv = carry
            scores, slope = _scores(config, qs[i], ks[j], (i - j) * chunk, window)
            weights = jnp.exp(scores - sums[i])
            dweights = _einsum("btkgh,bskh->bkgts", cotangents[i], vs[j])
            dscores = (weights * (dweights - means[i]) * slope).astype(q.dtype)
            dq += _einsum("bkgts,bskh->btkgh", dscores, ks[j])
            dk_j = _einsum("bkgts,btkgh->bskh", dscores, qs[i])
            dv_j = _einsum("bkgts,btkgh->bskh", weights.astype(v.dtype), cotangents[i])
            return dq, dk.at[j].add(dk_j), dv.at[j].add(dv_j)

        start = (jnp.zeros(qs.shape[1:], jnp.float32), *carry)
        dq, dk, dv = _over_visible(qs, i, window, keys, start)
        return (dk, dv), dq.astype(q.dtype)

    zeros = jnp.zeros(ks.shape, jnp.float32)
    (dk, dv), dq = _over_chunks(qs, queries, (zeros, zeros))
    dq, dk, dv = (_joined(x, q.shape[1]).astype(q.dtype) for x in (dq, dk, dv))
    cos, sin = rope
    unrotate = partial(_rotate_heads, config, rope=jnp.stack([cos, -sin]))
    return unrotate(dq), unrotate(dk), dv


def _forward_rule(
    config: DecoderConfig, *inputs: Array
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    out, logsumexp = attention(config, *inputs)
    return (out, logsumexp), (*inputs, out, logsumexp)


def _backward_rule(
    config: DecoderConfig, kept: tuple[Any, ...], cotangents: tuple[Array, Array]
) -> tuple[Array | None, ...]:
    q, k, v, rope, window, out, logsumexp = kept
    inputs = (q, k, v, rope, jnp.asarray(window))  # a literal comes back as a NumPy scalar
    return *attention_backward(config, *inputs, out, logsumexp, cotangents[0]), None, None


attention.defvjp(_forward_rule, _backward_rule)


def _scores(
    config: DecoderConfig,
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B S K H"],
    offset: Index,
    window: Int[Array, ""],
) -> tuple[Float[Array, "B K G T S"], Array | float]:
    """Capped scores of one chunk pair, `offset` tokens apart, and their slope over q·k."""
    scores = _einsum("btkgh,bskh->bkgts", q, k) * config.query_scale
    scores = soft_cap(scores, config.attention_softcap)
    slope = config.query_scale
    if config.attention_softcap is not None:
        slope = slope * (1 - jnp.square(scores / config.attention_softcap))
    tokens = jnp.arange(q.shape[1], dtype=jnp.int32)
    distance = offset + tokens[:, None] - tokens[None, :]
    visible = (distance >= 0) & (distance < window)
    return jnp.where(visible, scores, _HIDDEN), slope


def _over_chunks(
    qs: Float[Array, "n B T K G H"], body: Callable[[Any, Any], tuple[Any, Any]], start: Any
) -> tuple[Any, Any]:
    """`lax.scan` over the numbers of the query chunks; without a loop where there is one."""
    if len(qs) == 1:
        carry, result = body(start, 0)
        return carry, jax.tree.map(lambda x: x[None], result)
    return jax.lax.scan(body, start, jnp.arange(len(qs), dtype=jnp.int32))


def _over_visible(
    qs: Float[Array, "n B T K G H"],
    i: Index,
    window: Int[Array, ""],
    body: Callable[[Any, Any], Any],
    start: Any,
) -> Any:
    """The carry after all key chunks that query chunk i sees, its own being the last."""
    if len(qs) == 1:
        return body(0, start)
    chunk = qs.shape[2]
    first = jnp.maximum((i * chunk - window + 1) // chunk, 0)
    return jax.lax.fori_loop(first, i + 1, body, start)


def _rotated_chunks(
    config: DecoderConfig, q: Array, k: Array, v: Array, rope: Array
) -> tuple[
    Float[Array, "n B T K G H"],
    Float[Array, "n B S K H"],
    Float[Array, "n B S K H"],
]:
    """q, k (rotated) and v in equal chunks of at most `CHUNKS` tokens, zero-padded at the end."""
    chunks = -(-q.shape[1] // CHUNKS.get(jax.default_backend(), CHUNKS["gpu"]))
    q, k = (_rotate_heads(config, x, rope) for x in (q, k))
    shape = (-1, config.num_kv_heads, config.head_dim)
    ks, vs = (_chunked(x, chunks) for x in (k, v))
    ks, vs = (x.reshape(*x.shape[:3], *shape[1:]) for x in (ks, vs))
    qs = _chunked(q, chunks)
    return qs.reshape(*qs.shape[:3], shape[1], -1, shape[2]), ks, vs


def _rotate_heads(
    config: DecoderConfig, x: Float[Array, "B T W"], rope: Float[Array, "2 T half"]
) -> Float[Array, "B T W"]:
    heads = x.reshape(*x.shape[:2], -1, config.head_dim)
    return rotate(heads, rope).reshape(x.shape)


def _chunked(x: Float[Array, "B T W"], chunks: int) -> Float[Array, "n B T_chunk W"]:
    batch, length, width = x.shape
    chunk = -(-length // chunks)
    x = jnp.pad(x, ((0, 0), (0, chunks * chunk - length), (0, 0)))
    return jnp.moveaxis(x.reshape(batch, chunks, chunk, width), 1, 0)


def _joined(x: Float[Array, "n B T *heads"], length: int) -> Float[Array, "B T_all W"]:
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], -1)[:, :length]
