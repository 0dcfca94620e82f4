"""A tiny random GPT-2 as transformers makes and saves it, and in the layout of the Hub's `gpt2`."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "n_positions": 61,
    "n_embd": 35,
    "n_inner": 53,
    "n_layer": 3,
    "n_head": 5,
}


def make_gpt2(**overrides: Any) -> GPT2LMHeadModel:
    """Float32, in eval mode; biases and norms are away from their initial values."""
    config = GPT2Config(**{**SIZES, "bos_token_id": 0, "eos_token_id": 0, **overrides})
    model = GPT2LMHeadModel(config).float().eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = ".ln_" in name and name.endswith("weight")
            matrix = ".c_" in name and name.endswith("weight")
            std = 1.3 / parameter.shape[0] ** 0.5 if matrix else 0.3
            parameter.copy_(norm + std * torch.randn(parameter.shape, generator=generator))
    return model


def save_as_on_the_hub(
    model: GPT2LMHeadModel, directory: Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> Path:
    """Names without `transformer.`, causal masks among the tensors, an old config.json."""
    model.save_pretrained(directory)
    file = directory / "model.safetensors"
    tensors = {
        name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()
    }
    config, length = model.config, model.config.n_positions
    for layer in range(config.n_layer):
        mask = torch.ones(length, length).tril().reshape(1, 1, length, length)
        tensors[f"h.{layer}.attn.bias"] = mask
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, file)
    (directory / "config.json").write_text(json.dumps(HUB_CONFIG | own_sizes(model)))
    if tokenizer:
        tokenizer.save_pretrained(directory)
        (directory / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    return directory


def own_sizes(model: GPT2LMHeadModel) -> dict[str, Any]:
    """A model's sizes as config.json spells them."""
    return {name: getattr(model.config, name) for name in SIZES}


HUB_CONFIG: dict[str, Any] = {  # of openai-community/gpt2
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
