"""GPT-2's logits against transformers' in float64, through files on disk, and what is refused."""

import copy
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from gradjax.checkpoints.gpt2 import is_gpt2, load_gpt2, read_gpt2_config
from gradjax.errors import GradjaxError
from gradjax.model.gpt2 import GPT2, GPT2Config, hidden_states, project_logits
from tests.checkpoints import make_hf_model
from tests.gpt2_checkpoints import HUB_CONFIG, make_gpt2, save_as_on_the_hub

LENGTHS = (61, 37, 2)  # the first fills the window
PADDED = 64  # beyond the window, as batches are padded to multiples of 32


def padded_tokens() -> np.ndarray:
    tokens = np.random.default_rng(7).integers(0, 101, (len(LENGTHS), PADDED), dtype=np.int32)
    return np.where(np.arange(PADDED) < np.array(LENGTHS)[:, None], tokens, 0)


def logits(model: GPT2, tokens: np.ndarray) -> np.ndarray:
    head = (model.final_norm[...], model.final_norm_bias[...], model.embedding[...])
    return np.asarray(
        project_logits(model.config, *head, hidden_states(model, jnp.asarray(tokens)))
    )


def assert_parity(model: GPT2LMHeadModel, directory: Path) -> None:
    tokens = padded_tokens()
    ours = load_gpt2(directory)
    found = logits(ours, tokens)
    assert found.dtype == np.float32
    exact = copy.deepcopy(model).double()
    for row, length in enumerate(LENGTHS):
        with torch.no_grad():
            expected = exact(torch.tensor(tokens[row : row + 1, :length])).logits[0].numpy()
        bound = 2e-5 * np.abs(expected).max()
        np.testing.assert_allclose(found[row, :length], expected, rtol=0, atol=bound)


@pytest.mark.parametrize(
    "overrides",
    [{}, {"n_inner": None}, {"layer_norm_epsilon": 0.3}],
    ids=str,
)
def test_float32_logits_equal_transformers_float64(tmp_path, overrides):
    model = make_gpt2(**overrides)
    model.save_pretrained(tmp_path)
    assert_parity(model, tmp_path)


def test_logits_of_a_sharded_checkpoint(tmp_path):
    model = make_gpt2()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_parity(model, tmp_path)


@pytest.mark.parametrize("with_head", [False, True])
def test_logits_of_a_checkpoint_named_as_on_the_hub(tmp_path, with_head):
    model = make_gpt2()
    save_as_on_the_hub(model, tmp_path)
    if with_head:
        edit(tmp_path, **{"lm_head.weight": model.lm_head.weight.detach().clone()})
    assert_parity(model, tmp_path)


def test_large_means_do_not_drown_a_norms_variance(tmp_path):
    model = make_gpt2()
    with torch.no_grad():
        model.transformer.wpe.weight += 300.0
    model.save_pretrained(tmp_path)
    ours = load_gpt2(tmp_path)
    tokens = padded_tokens()[:1, :61]
    found = logits(ours, tokens)
    with torch.no_grad():
        expected = model.double()(torch.tensor(tokens)).logits.numpy()
    # The stream itself has lost two digits to the mean; E[x²] - E[x]² would miss by a tenth.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3 * np.abs(expected).max())


def test_the_hubs_config_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HUB_CONFIG))
    assert is_gpt2(tmp_path)
    assert read_gpt2_config(tmp_path) == GPT2Config(
        vocab_size=50257,
        max_positions=1024,
        hidden_size=768,
        mlp_size=3072,
        num_layers=12,
        num_heads=12,
        norm_eps=1e-5,
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"moon_phase": 3}, "moon_phase is 3 (supported: no such attribute)"),
        ({"activation_function": "relu"}, 'activation_function is "relu" (supported: "gelu_new")'),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is true"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn is true (supported: false)"),
        ({"scale_attn_weights": False}, "scale_attn_weights is false (supported: true)"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is false (supported: true)"),
        ({"add_cross_attention": True}, "add_cross_attention is true (supported: false)"),
        ({"quantization_config": {"bits": 4}}, 'quantization_config is {"bits": 4}'),
        ({"n_head": 11}, "n_embd is 768 (supported: a multiple of n_head, 11)"),
        ({"n_layer": 0}, "n_layer is 0 (supported: a positive integer)"),
        ({"n_inner": "3072"}, 'n_inner is "3072" (supported: a positive integer)'),
        ({"layer_norm_epsilon": None}, "layer_norm_epsilon is null (supported: a positive number)"),
        ({"model_type": "gptj"}, '"gptj", expected ["GPT2LMHeadModel"] and "gpt2"'),
        ({"architectures": ["GPT2DoubleHeadsModel"]}, '["GPT2DoubleHeadsModel"] and "gpt2"'),
    ],
    ids=str,
)
def test_other_configs_are_refused_by_name(tmp_path, change, expected):
    (tmp_path / "config.json").write_text(json.dumps(HUB_CONFIG | change))
    with pytest.raises(GradjaxError) as raised:
        read_gpt2_config(tmp_path)
    assert str(tmp_path / "config.json") in str(raised.value)
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)


def test_all_refused_attributes_are_named_at_once(tmp_path):
    change: dict[str, Any] = {"n_layer": -1, "moon_phase": 3, "activation_function": "relu"}
    (tmp_path / "config.json").write_text(json.dumps(HUB_CONFIG | change))
    with pytest.raises(GradjaxError) as raised:
        read_gpt2_config(tmp_path)
    assert all(name in str(raised.value) for name in change)


def test_a_decoder_of_another_family_is_no_gpt2(tmp_path):
    make_hf_model("qwen2").save_pretrained(tmp_path)
    assert not is_gpt2(tmp_path)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_all_misfits_are_named_at_once(tmp_path, prefix):
    model = make_gpt2()
    model.save_pretrained(tmp_path) if prefix else save_as_on_the_hub(model, tmp_path)
    edit(
        tmp_path,
        **{
            f"{prefix}h.1.mlp.c_fc.bias": None,
            f"{prefix}h.2.attn.c_attn.weight": torch.ones(105, 35),  # (out, in)
            f"{prefix}h.3.ln_1.weight": torch.ones(35),
            f"{prefix}wpe.weight": torch.ones(61, 35, dtype=torch.int8),
        },
    )
    text = message(tmp_path)
    for expected in (
        f"missing: {prefix}h.1.mlp.c_fc.bias;",
        f"{prefix}h.2.attn.c_attn.weight is [105, 35], by the config [35, 105]",
        f"not part of this model: {prefix}h.3.ln_1.weight",
        f"{prefix}wpe.weight is I8",
    ):
        assert expected in text


def test_names_of_both_kinds_are_refused(tmp_path):
    make_gpt2().save_pretrained(tmp_path)
    edit(tmp_path, **{"ln_f.bias": torch.ones(35)})
    assert "not part of this model: ln_f.bias" in message(tmp_path)


def test_a_head_of_its_own_is_refused(tmp_path):
    model = make_gpt2()
    model.save_pretrained(tmp_path)
    edit(tmp_path, **{"lm_head.weight": model.lm_head.weight.detach() + 1e-3})
    assert "lm_head.weight differs from transformer.wte.weight" in message(tmp_path)


def test_a_weight_that_is_not_finite_is_named(tmp_path):
    model = make_gpt2()
    with torch.no_grad():
        model.transformer.h[2].ln_2.bias[7] = float("nan")
    model.save_pretrained(tmp_path)
    assert "transformer.h.2.ln_2.bias holds NaN or infinite values" in message(tmp_path)


def test_pickles_are_refused(tmp_path):
    make_gpt2().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    assert "pickles (pytorch_model.bin)" in message(tmp_path)


def message(directory: Path) -> str:
    with pytest.raises(GradjaxError) as raised:
        load_gpt2(directory)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def edit(directory: Path, **changes: torch.Tensor | None) -> None:
    """Sets (a tensor) or removes (None) tensors of the checkpoint's only file."""
    file = directory / "model.safetensors"
    tensors = load_file(file) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)
