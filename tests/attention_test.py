"""Chunked attention and its written-out backward pass against float64 autograd."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gradjax.model import attention
from gradjax.model.config import qwen2_config
from gradjax.model.layers import rope_tables


def make_config(num_heads: int, num_kv_heads: int, cap: float | None):
    config = qwen2_config(
        vocab_size=11,
        hidden_size=6 * num_heads,
        mlp_size=5,
        num_layers=1,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        rope_theta=100.0,
    )
    return dataclasses.replace(config, attention_softcap=cap)


def inputs(config, batch: int, length: int, seed: int = 0):
    """q, k, v and the cotangent of the output, with scores large enough to be uneven."""
    rng = np.random.default_rng(seed)
    widths = (config.num_heads, config.num_kv_heads, config.num_kv_heads, config.num_heads)
    return [
        2 * rng.standard_normal((batch, length, n * config.head_dim)).astype(np.float32)
        for n in widths
    ]


def torch_attention(config, q, k, v, cotangent, window):
    """The output and the cotangents of q, k, v by autograd over the whole T×T scores."""
    q, k, v, cotangent = (torch.tensor(x, dtype=torch.float64) for x in (q, k, v, cotangent))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    batch, length, _ = q.shape
    half = config.head_dim // 2
    # Angles are float32 in the models themselves.
    frequencies = (config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)).float()
    angles = (torch.arange(length).float()[:, None] * frequencies).double()

    def heads(x, rotated):
        x = x.reshape(batch, length, -1, config.head_dim).transpose(1, 2)
        if rotated:
            first, second = x[..., :half], x[..., half:]
            cos, sin = angles.cos(), angles.sin()
            x = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
        return x.repeat_interleave(config.num_heads // x.shape[1], dim=1)

    scores = heads(q, True) @ heads(k, True).transpose(2, 3) / math.sqrt(config.head_dim)
    if config.attention_softcap:
        scores = config.attention_softcap * torch.tanh(scores / config.attention_softcap)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    scores = scores.masked_fill((distance < 0) | (distance >= window), -math.inf)
    out = (scores.softmax(-1) @ heads(v, False)).transpose(1, 2).reshape(batch, length, -1)
    return [x.detach().numpy() for x in (out, *torch.autograd.grad(out, leaves, cotangent))]


def gradjax_attention(config, q, k, v, cotangent, window):
    """The output and the cotangents of q, k, v as a pullback of `attention`."""
    rope = rope_tables(config, q.shape[1])

    @jax.jit
    def pull_back(q, k, v, cotangent):
        attend = partial(attention.attention, config, window)
        out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, rope)[0], q, k, v)
        return [out, *vjp(cotangent)]

    return pull_back(*(jnp.asarray(x) for x in (q, k, v, cotangent)))


def assert_equals_torch(config, batch, length, window):
    q, k, v, cotangent = inputs(config, batch, length)
    expected = torch_attention(config, q, k, v, cotangent, window or length)
    found_ones = gradjax_attention(config, q, k, v, cotangent, window)
    for found, right in zip(found_ones, expected, strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, right, rtol=0, atol=1e-5 * max(np.abs(right).max(), 1))


@pytest.mark.parametrize("heads", [(6, 2), (5, 1)], ids=["grouped", "single"])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("window", [1, 13, 29, None])
def test_many_chunks_equal_the_whole_matrix(monkeypatch, heads, cap, window):
    monkeypatch.setitem(attention.CHUNKS, "cpu", 29)
    assert_equals_torch(make_config(heads[0], heads[1], cap), 2, 101, window)


@pytest.mark.parametrize(
    ("length", "window", "chunk"),
    [(1, 1, 1), (2, 2, 1), (31, 7, 31), (31, 31, 30), (53, 20, 9), (64, 33, 16), (67, 2, 5)],
)
def test_any_length_window_and_chunk(monkeypatch, length, window, chunk):
    monkeypatch.setitem(attention.CHUNKS, "cpu", chunk)
    assert_equals_torch(make_config(3, 1, 5.0), 1, length, window)


@pytest.mark.parametrize("excess", [-1, 0, 1])
def test_both_sides_of_the_default_chunks(excess):
    for chunks in (1, 2):
        length = chunks * attention.CHUNKS["cpu"] + excess
        assert_equals_torch(make_config(2, 1, None), 1, length, None)


def test_scores_of_all_pairs_never_exist():
    config, length = make_config(4, 2, None), 8 * attention.CHUNKS["cpu"]
    q, k, v, _ = inputs(config, 1, length)
    rope = rope_tables(config, length)

    def pull_back(q, k, v):
        attend = partial(attention.attention, config, None)
        out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, rope)[0], q, k, v)
        return vjp(out)

    memory = jax.jit(pull_back).lower(q, k, v).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 4 * config.num_heads * length**2 / 4


def test_bfloat16_comes_back_as_bfloat16():
    config = make_config(4, 2, None)
    q, k, v, cotangent = (jnp.asarray(x, jnp.bfloat16) for x in inputs(config, 1, 300))
    exact = (np.asarray(x, np.float32) for x in (q, k, v, cotangent))
    expected = torch_attention(config, *exact, window=300)
    found_ones = gradjax_attention(config, q, k, v, cotangent, 300)
    for found, right in zip(found_ones, expected, strict=True):
        assert found.dtype == jnp.bfloat16
        error = np.linalg.norm(np.asarray(found, np.float64) - right) / np.linalg.norm(right)
        assert error < 0.02
