"""Sizes of the registered models, for random weights without a checkpoint or a network."""

import csv
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from gradjax.checkpoints.hf_config import read_config
from gradjax.checkpoints.resolve import DEMO, resolve
from gradjax.errors import GradjaxError
from gradjax.model.config import DecoderConfig

_SIZES = Path(__file__).parent.parent / "tests" / "data" / "model_shapes.csv"
_ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "olmo": "OlmoForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def shape_config(name: str, layers: int | None = None) -> DecoderConfig:
    """The decoder of a registered model (`demo`: the embedded one), or its first layers.

    With fewer layers the vocabulary is cut in proportion, so that the head keeps its share of the
    work. RoPE scaling is left out: it changes no size and no time.

    Raises:
      GradjaxError: if there is no such model, or it has fewer layers.
    """
    config = _whole_config(name)
    if layers is None:
        return config
    if not 1 <= layers <= config.num_layers:
        raise GradjaxError(
            f"--layers={layers}: {name} has {config.num_layers}; expected 1 to {config.num_layers}"
        )
    return dataclasses.replace(
        config,
        num_layers=layers,
        windows=config.windows[:layers],
        vocab_size=-(-config.vocab_size * layers // config.num_layers),
    )


def _whole_config(name: str) -> DecoderConfig:
    if name == DEMO:
        return read_config(resolve(DEMO).directory)
    with _SIZES.open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    if name not in rows:
        raise GradjaxError(f"--shape={name}: expected one of {', '.join([DEMO, *rows])}")
    row = rows[name]
    values: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[row["family"]]],
        "num_hidden_layers": int(row["layers"]),
        "hidden_size": int(row["hidden"]),
        "intermediate_size": int(row["mlp"]),
        "num_attention_heads": int(row["heads"]),
        "num_key_value_heads": int(row["kv_heads"]),
        "head_dim": int(row["head_dim"]),
        "vocab_size": int(row["vocab"]),
        "tie_word_embeddings": row["tied"] == "1",
        **({} if row["family"] == "olmo" else {"rms_norm_eps": float(row["rms_norm_eps"])}),
        "rope_theta": float(row["rope_theta"]),
    }
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(values))
        return read_config(Path(directory))
