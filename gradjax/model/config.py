"""What a decoder is: one frozen config that all three families fit in."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of long RoPE wavelengths (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Everything in which Qwen2.5, Llama 3 and Gemma 2 differ, as data.

    Hashable, so that it can be a static argument of compiled functions.
    """

    family: Literal["qwen2", "llama", "gemma2"]
    vocab_size: int
    hidden_size: int
    mlp_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_positions: int
    tied_embeddings: bool  # the output head is the embedding table
    qkv_bias: bool
    norm_offset: float  # RMSNorm multiplies by (offset + scale)
    post_norms: bool  # also normalize what attention and MLP add to the stream
    embedding_scale: float
    query_scale: float
    activation: Literal["silu", "gelu_tanh"]
    attention_softcap: float | None
    logits_softcap: float | None
    windows: tuple[int | None, ...]  # [L] tokens that a layer's attention sees; None: all
