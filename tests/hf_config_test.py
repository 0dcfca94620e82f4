import json
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OlmoConfig,
    Qwen2Config,
    Qwen3Config,
)

from gradjax.checkpoints.hf_config import read_config
from gradjax.errors import GradjaxError
from gradjax.model.config import RopeScaling
from tests.checkpoints import FAMILIES, make_hf_model

CONFIG_CLASSES = {
    "Qwen2ForCausalLM": Qwen2Config,
    "LlamaForCausalLM": LlamaConfig,
    "Gemma2ForCausalLM": Gemma2Config,
    "Gemma3ForCausalLM": Gemma3TextConfig,
    "MistralForCausalLM": MistralConfig,
    "OlmoForCausalLM": OlmoConfig,
    "Olmo2ForCausalLM": Olmo2Config,
    "Qwen3ForCausalLM": Qwen3Config,
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 101,
    "hidden_size": 42,
    "intermediate_size": 53,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
}
LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def write(directory: Path, values: Any) -> Path:
    text = values if isinstance(values, str) else json.dumps(values)
    (directory / "config.json").write_text(text)
    return directory


def read(directory: Path, values: Any):
    return read_config(write(directory, values))


def message(directory: Path, values: Any) -> str:
    with pytest.raises(GradjaxError) as raised:
        read(directory, values)
    text = str(raised.value)
    assert "config.json" in text
    assert "\n" not in text
    return text


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_writes_is_read(tmp_path, family):
    model = make_hf_model(family)
    theirs = model.config
    theirs.architectures = [type(model).__name__]
    theirs.save_pretrained(tmp_path)
    ours = read_config(tmp_path)
    assert ours.family == theirs.model_type
    assert ours.vocab_size == theirs.vocab_size
    assert ours.hidden_size == theirs.hidden_size
    assert ours.mlp_size == theirs.intermediate_size
    assert ours.num_layers == theirs.num_hidden_layers
    assert ours.num_heads == theirs.num_attention_heads
    assert ours.num_kv_heads == theirs.num_key_value_heads
    attention = model.model.layers[0].self_attn
    assert ours.head_dim == attention.head_dim
    assert ours.query_scale == pytest.approx(attention.scaling, rel=1e-15)
    assert ours.norm_eps == getattr(theirs, "rms_norm_eps", 1e-5)
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    assert ours.max_positions == theirs.max_position_embeddings
    assert ours.attention_softcap == getattr(theirs, "attn_logit_softcapping", None)
    assert ours.logits_softcap == getattr(theirs, "final_logit_softcapping", None)
    everywhere = theirs.sliding_window if family == "mistral" else None
    assert list(ours.windows) == [
        getattr(layer.self_attn, "sliding_window", everywhere) for layer in model.model.layers
    ]
    assert ours.qkv_bias == (attention.q_proj.bias is not None)
    assert ours.qkv_clip == getattr(theirs, "clip_qkv", None)
    assert (ours.qk_norm is not None) == hasattr(attention, "q_norm")
    assert (ours.rope_scaling is not None) == (family in ("llama", "gemma3_text"))


@pytest.mark.parametrize("architecture", CONFIG_CLASSES)
def test_missing_attributes_have_the_defaults_of_transformers(tmp_path, architecture):
    theirs = CONFIG_CLASSES[architecture]()
    ours = read(tmp_path, {"architectures": [architecture]})
    assert ours.vocab_size == theirs.vocab_size
    assert ours.hidden_size == theirs.hidden_size
    assert ours.mlp_size == theirs.intermediate_size
    assert ours.num_layers == theirs.num_hidden_layers
    assert ours.num_heads == theirs.num_attention_heads
    assert ours.num_kv_heads == theirs.num_key_value_heads
    head_dim = getattr(theirs, "head_dim", None)
    head_dim = head_dim or theirs.hidden_size // theirs.num_attention_heads
    assert ours.head_dim == head_dim
    assert ours.norm_eps == getattr(theirs, "rms_norm_eps", 1e-5)
    ropes = theirs.rope_parameters
    assert ours.rope_theta == ropes.get("full_attention", ropes)["rope_theta"]
    assert ours.window_rope_theta == ropes.get("sliding_attention", {}).get("rope_theta")
    assert ours.rope_scaling is None
    assert ours.max_positions == theirs.max_position_embeddings
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    assert ours.query_scale == getattr(theirs, "query_pre_attn_scalar", head_dim) ** -0.5
    assert ours.attention_softcap == getattr(theirs, "attn_logit_softcapping", None)
    assert ours.logits_softcap == getattr(theirs, "final_logit_softcapping", None)
    everywhere = "sliding_attention" if architecture.startswith("Mistral") else "full_attention"
    kinds = getattr(theirs, "layer_types", [everywhere] * theirs.num_hidden_layers)
    assert list(ours.windows) == [
        theirs.sliding_window if kind == "sliding_attention" else None for kind in kinds
    ]


def test_missing_key_value_heads_differ_from_null_ones(tmp_path):
    qwen = {"architectures": ["Qwen2ForCausalLM"], "num_attention_heads": 64}
    assert read(tmp_path, qwen).num_kv_heads == 32
    assert read(tmp_path, qwen | {"num_key_value_heads": None}).num_kv_heads == 64


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3_SCALING}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3_SCALING}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3_SCALING}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "llama3", **LLAMA3_SCALING}},
    ],
    ids=["4.45", "4.43", "5", "mixed"],
)
def test_old_and_new_spellings_of_rope_are_one(tmp_path, spelling):
    config = read(tmp_path, LLAMA | spelling)
    assert config.rope_theta == 5e5
    assert config.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)


def test_rope_scaling_without_original_length_takes_the_models(tmp_path):
    scaling = {"rope_type": "llama3", **LLAMA3_SCALING}
    del scaling["original_max_position_embeddings"]
    config = read(tmp_path, LLAMA | {"rope_scaling": scaling, "max_position_embeddings": 77})
    assert config.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 77)


def test_bookkeeping_changes_nothing(tmp_path):
    harmless = {
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.0",
        "_name_or_path": "somewhere",
        "use_cache": False,
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "pad_token_id": None,
        "initializer_range": 0.5,
        "pretraining_tp": 2,
        "rope_scaling": None,
        "sliding_window": None,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "head_dim": 14,
    }
    assert read(tmp_path, LLAMA | harmless) == read(tmp_path, LLAMA)


QWEN = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
GEMMA = LLAMA | {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "head_dim": 10}


@pytest.mark.parametrize(
    ("base", "change", "expected"),
    [
        (LLAMA, {"attention_bias": True}, "attention_bias is true (supported: false)"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias is true (supported: false)"),
        (LLAMA, {"hidden_act": "gelu"}, 'hidden_act is "gelu" (supported: "silu")'),
        (LLAMA, {"sliding_window": 8}, "sliding_window is 8 (supported: null)"),
        (LLAMA, {"query_pre_attn_scalar": 5}, "query_pre_attn_scalar is 5"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (LLAMA, {"quantization_config": {"bits": 4}}, 'quantization_config is {"bits": 4}'),
        (LLAMA, {"auto_map": {"AutoModel": "m.py"}}, "auto_map is"),
        (LLAMA, {"moe_experts": 8}, "moe_experts is 8 (supported: no such attribute)"),
        (LLAMA, {"head_dim": 7}, "head_dim is 7 (supported: an even number)"),
        (LLAMA, {"hidden_size": 39}, "hidden_size is 39 (supported: an even multiple"),
        (LLAMA, {"num_attention_heads": 0}, "num_attention_heads is 0 (supported: a positive"),
        (LLAMA, {"num_attention_heads": True}, "num_attention_heads is true"),
        (LLAMA, {"num_key_value_heads": 2}, "num_key_value_heads is 2 (supported: a divisor"),
        (LLAMA, {"vocab_size": "101"}, 'vocab_size is "101" (supported: a positive integer)'),
        (LLAMA, {"vocab_size": 101.5}, "vocab_size is 101.5"),
        (LLAMA, {"rms_norm_eps": -1}, "rms_norm_eps is -1 (supported: a positive number)"),
        (LLAMA, {"rms_norm_eps": float("nan")}, "rms_norm_eps is NaN"),
        (LLAMA, {"tie_word_embeddings": 1}, "tie_word_embeddings is 1 (supported: true or false)"),
        (LLAMA, {"rope_scaling": [8.0]}, "rope_scaling is [8.0] (supported: an object or null)"),
        (
            LLAMA,
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            'rope_scaling.type is "yarn" (supported: "default", "linear" or "llama3")',
        ),
        (
            LLAMA,
            {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3]}},
            "rope_parameters.mrope_section is [2, 3]",
        ),
        (
            LLAMA,
            {"rope_parameters": {"rope_type": "llama3"}},
            "rope_parameters.factor is missing (supported: a positive number)",
        ),
        (
            LLAMA,
            {"rope_scaling": LLAMA3_SCALING | {"type": "llama3", "high_freq_factor": 1.0}},
            "rope_scaling.high_freq_factor is 1.0 (supported: more than low_freq_factor)",
        ),
        (
            LLAMA,
            {"rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}},
            "rope_theta is 5.0 (supported: the same as in rope_parameters",
        ),
        (LLAMA, {"layer_types": ["sliding_attention"] * 3}, "layer_types is"),
        (QWEN, {"layer_types": ["sliding_attention"] * 3}, "layer_types is"),
        (QWEN, {"layer_types": ["full_attention"] * 2}, "(supported: 3 times full_attention)"),
        (QWEN, {"layer_types": [["full_attention"]] * 3}, "layer_types is"),
        (QWEN, {"use_mrope": True}, "use_mrope is true"),
        (QWEN, {"use_sliding_window": True, "sliding_window": 0}, "sliding_window is 0"),
        (QWEN, {"max_window_layers": None}, "max_window_layers is null"),
        (GEMMA, {"hidden_activation": "gelu"}, 'hidden_activation is "gelu"'),
        (GEMMA, {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping is 0.0"),
        (GEMMA, {"use_bidirectional_attention": True}, "use_bidirectional_attention is true"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(tmp_path, base, change, expected):
    read(tmp_path, base)  # the change alone is at fault
    assert expected in message(tmp_path, base | change)


def test_odd_spellings_of_gemma_3_are_refused(tmp_path):
    gemma = {"architectures": ["Gemma3ForCausalLM"]}
    for local in (5, "x", [1]):
        text = message(tmp_path, gemma | {"rope_parameters": {"sliding_attention": local}})
        assert "rope_parameters" in text
    assert "sliding_window is null" in message(tmp_path, gemma | {"sliding_window": None})


def test_layer_types_of_mistral_mean_nothing_as_in_transformers(tmp_path):
    mistral = {"architectures": ["MistralForCausalLM"], "num_hidden_layers": 2}
    kinds = {"layer_types": ["full_attention"] * 2}
    assert read(tmp_path, mistral | kinds).windows == (4096, 4096)


def test_all_faults_are_named_at_once(tmp_path):
    text = message(
        tmp_path, LLAMA | {"mlp_bias": True, "vocab_size": None, "a_new_idea": 1, "hidden_size": 0}
    )
    assert all(name in text for name in ("mlp_bias", "vocab_size", "a_new_idea", "hidden_size"))


@pytest.mark.parametrize(
    "architectures",
    [["MixtralForCausalLM"], ["LlamaForCausalLM", "Qwen2ForCausalLM"], [], None, "x", [["a"]]],
)
def test_unsupported_architectures_are_refused(tmp_path, architectures):
    text = message(tmp_path, LLAMA | {"architectures": architectures})
    assert json.dumps(architectures) in text
    assert all(name in text for name in CONFIG_CLASSES)


def test_model_type_must_fit_the_architecture(tmp_path):
    assert '"mistral"' in message(tmp_path, LLAMA | {"model_type": "mistral"})


def test_a_directory_without_config_is_refused(tmp_path):
    with pytest.raises(GradjaxError, match=r"has no config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{\n"a": 1,\n}', "line 3"),
        ("", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[1]", "holds a JSON list"),
    ],
)
def test_malformed_json_is_refused(tmp_path, text, expected):
    assert expected in message(tmp_path, text)
