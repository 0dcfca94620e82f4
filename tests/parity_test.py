"""gradjax's logits against transformers' in float64, through files on disk."""

import copy
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from gradjax.checkpoints.hf_config import read_config
from gradjax.checkpoints.safetensors import load_decoder
from gradjax.model.decoder import Decoder, logits
from tests.checkpoints import FAMILIES, WINDOW, make_hf_model, save_checkpoint

LENGTH = 83  # well above every window, and above Llama's original_max_position_embeddings
# key/value heads of 6, tied embeddings, size of a shard
LAYOUTS: dict[str, tuple[int, bool, str | None]] = {
    "mha-tied": (6, True, None),
    "gqa-tied-sharded": (2, True, "11KB"),
    "gqa-untied": (2, False, None),
    "mqa-untied-sharded": (1, False, "11KB"),
}


def tokens_of(model: PreTrainedModel) -> np.ndarray:
    return np.random.default_rng(7).integers(0, model.config.vocab_size, (2, LENGTH))


def reference(model: PreTrainedModel) -> np.ndarray:
    with torch.no_grad():
        return copy.deepcopy(model).double()(torch.tensor(tokens_of(model))).logits.numpy()


def load(directory: Path, dtype=jnp.float32) -> Decoder:
    return load_decoder(directory, read_config(directory), dtype)


def assert_parity(model: PreTrainedModel, directory: Path) -> None:
    expected = reference(model)
    found = np.asarray(logits(load(directory), tokens_of(model)))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_float32_logits_equal_transformers_float64(tmp_path, family, layout):
    kv_heads, tied, shard_size = LAYOUTS[layout]
    sizes = {"num_hidden_layers": 2, "num_key_value_heads": kv_heads, "tie_word_embeddings": tied}
    model = make_hf_model(family, **sizes)
    save_checkpoint(model, tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 3) == (shard_size is not None)
    assert_parity(model, tmp_path)


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2 with windows in its upper layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen2 with wider heads and large theta": (
        "qwen2",
        {"head_dim": 14, "rope_parameters": {"rope_theta": 1e6}},
    ),
    "llama without scaling, head_dim of hidden/heads": (
        "llama",
        {"rope_parameters": {"rope_theta": 5e5}, "hidden_size": 60, "head_dim": None},
    ),
    "gemma2 without soft caps": (
        "gemma2",
        {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma2 with other window layers": (
        "gemma2",
        {"layer_types": ["full_attention", "sliding_attention"]},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_variants(tmp_path, variant):
    family, overrides = VARIANTS[variant]
    model = make_hf_model(family, seed=1, num_hidden_layers=2, **overrides)
    assert_parity(model, save_checkpoint(model, tmp_path))


CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3 scaling": ("llama", {"rope_parameters": {"rope_theta": 10000.0}}),
    "window": ("gemma2", {"sliding_window": WINDOW + 1}),
    "attention cap": ("gemma2", {"attn_logit_softcapping": None}),
    "logits cap": ("gemma2", {"final_logit_softcapping": None}),
    "query scale": ("gemma2", {"query_pre_attn_scalar": 10}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_parity_would_notice(change):
    """What parity is meant to cover moves the logits by far more than its tolerance."""
    family, overrides = CHANGES[change]
    base, changed = reference(make_hf_model(family)), reference(make_hf_model(family, **overrides))
    assert np.abs(base - changed).max() > 1e-2 * np.abs(base).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_close_to_transformers_bfloat16(tmp_path, family):
    model = make_hf_model(family, num_hidden_layers=2)
    save_checkpoint(model, tmp_path, dtype=torch.bfloat16)
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    exact = reference(rounded)
    with torch.no_grad():
        theirs = rounded(torch.tensor(tokens_of(model))).logits.double().numpy()
    ours = np.asarray(logits(load(tmp_path, jnp.bfloat16), tokens_of(model)), np.float64)
    # Both round differently on the way; neither may be much further from the exact logits.
    assert np.sqrt(np.mean((ours - exact) ** 2)) < 1.5 * np.sqrt(np.mean((theirs - exact) ** 2))
