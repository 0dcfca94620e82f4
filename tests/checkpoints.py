"""Tiny random Hugging Face models, and checkpoints of them, for tests.

Sizes are odd or prime where the architecture lets them be; biases and norm scales are
away from their initial values; soft caps, windows and RoPE scaling change the result.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FAMILIES = ("qwen2", "qwen3", "llama", "mistral", "olmo", "olmo2", "gemma2", "gemma3_text")
WINDOW = 7

_COMMON: dict[str, Any] = {
    "vocab_size": 101,
    "intermediate_size": 53,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_FAMILY: dict[str, tuple[type[PreTrainedModel], type, dict[str, Any]]] = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"hidden_size": 36, "tie_word_embeddings": True}),
    "llama": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "hidden_size": 42,
            "head_dim": 10,
            "tie_word_embeddings": False,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _LLAMA3_SCALING,
        },
    ),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config,
        {
            "hidden_size": 42,
            "head_dim": 10,
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 13,
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 8.0,
        },
    ),
    "gemma3_text": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {
            "hidden_size": 42,
            "head_dim": 10,
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 13,
            "sliding_window": WINDOW,
            "sliding_window_pattern": 2,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
            },
        },
    ),
    "mistral": (
        MistralForCausalLM,
        MistralConfig,
        {"hidden_size": 42, "head_dim": 10, "tie_word_embeddings": False, "sliding_window": WINDOW},
    ),
    "olmo": (
        OlmoForCausalLM,
        OlmoConfig,
        {"hidden_size": 36, "tie_word_embeddings": True, "clip_qkv": 1.0},
    ),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config, {"hidden_size": 36, "tie_word_embeddings": False}),
    "qwen3": (
        Qwen3ForCausalLM,
        Qwen3Config,
        {"hidden_size": 42, "head_dim": 10, "tie_word_embeddings": True},
    ),
}


def make_hf_model(family: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random float32 model in eval mode; `overrides` are arguments of its HF config."""
    model_class, config_class, sizes = _FAMILY[family]
    config = config_class(**{**_COMMON, **sizes, **overrides}, attn_implementation="eager")
    model = model_class(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean, std = _distribution(family, name, parameter)
            parameter.copy_(mean + std * torch.randn(parameter.shape, generator=generator))
    return model


def save_checkpoint(
    model: PreTrainedModel,
    directory: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_size: str | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the model as `save_pretrained` does, in another dtype if asked; the directory."""
    if dtype is not None:
        model = copy.deepcopy(model).to(dtype)
    model.save_pretrained(directory, max_shard_size=max_shard_size or "50GB")
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    return Path(directory)


def _distribution(family: str, name: str, parameter: torch.Tensor) -> tuple[float, float]:
    """Mean and standard deviation that keep activations and logits at order 1 to 10."""
    if "norm" in name:
        return (0.0 if family.startswith("gemma") else 1.0), 0.2
    if name.endswith("bias"):
        return 0.0, 0.3
    if "embed_tokens" in name or "lm_head" in name:
        return 0.0, 0.5
    return 0.0, 1.3 / parameter.shape[1] ** 0.5
