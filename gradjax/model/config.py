"""What a decoder is: one frozen config that every family fits in."""

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
class LinearScaling:
    """All RoPE wavelengths stretched by one factor (`rope_type: linear`)."""

    factor: float


@dataclasses.dataclass(frozen=True)
class ScoreHead:
    """A reward model's head: one score of a text, at its last token that is not `pad_id`."""

    pad_id: int | None  # None: at its last token, whatever it is


# rms: RMSNorm, its result rounded before it is scaled (visible in bfloat16 only); rms_float32:
# scaled before it is rounded; layer: LayerNorm without parameters.
NormKind = Literal["rms", "rms_float32", "layer"]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Everything in which families of models differ, as data.

    Hashable, so that it can be a static argument of compiled functions.
    """

    family: str  # its model_type on the Hub
    vocab_size: int
    hidden_size: int
    mlp_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | LinearScaling | None
    max_positions: int
    score_head: ScoreHead | None  # in place of the next-token head
    tied_embeddings: bool  # the output head is the embedding table
    qkv_bias: bool
    embedding_scale: float
    query_scale: float
    activation: Literal["silu", "gelu_tanh"]
    attention_softcap: float | None
    logits_softcap: float | None
    windows: tuple[int | None, ...]  # [L] tokens that a layer's attention sees; None: all
    norm: NormKind = "rms"
    norm_offset: float = 0.0  # RMSNorm multiplies by (offset + scale)
    pre_norms: bool = True  # normalize what attention and MLP take from the stream
    post_norms: bool = False  # normalize what they add to it
    qk_norm: Literal["head", "all"] | None = None  # normalize queries and keys, by head or whole
    qkv_clip: float | None = None  # queries, keys and values are cut at ± this
    window_rope_theta: float | None = None  # of layers with a window, if they have their own


def qwen2_config(
    *,
    vocab_size: int,
    hidden_size: int,
    mlp_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    rope_theta: float,
) -> DecoderConfig:
    """A Qwen2.5 decoder of given sizes with tied embeddings, for models made here."""
    head_dim = hidden_size // num_heads
    return DecoderConfig(
        family="qwen2",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        mlp_size=mlp_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=1e-6,
        rope_theta=rope_theta,
        rope_scaling=None,
        max_positions=4096,
        score_head=None,
        tied_embeddings=True,
        qkv_bias=True,
        embedding_scale=1.0,
        query_scale=head_dim**-0.5,
        activation="silu",
        attention_softcap=None,
        logits_softcap=None,
        windows=(None,) * num_layers,
    )
