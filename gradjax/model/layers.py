"""The decoder's layers as pure functions of arrays. Axis letters: structs.py.

Every matrix product names its precision: JAX's default for float32 is TF32 on NVIDIA and
bfloat16 on TPU, which would change the gradients themselves.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gradjax.model.config import DecoderConfig, LinearScaling, RopeScaling

einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
# The score of what a softmax leaves out.
HIDDEN = float(jnp.finfo(jnp.float32).min)


def linear(x: Float[Array, "... I"], weight: Float[Array, "O I"]) -> Float[Array, "... O"]:
    """`x Wᵀ` for a weight in Hugging Face's (out, in) orientation."""
    return einsum("...i,oi->...o", x, weight)


def linear_transpose(
    delta: Float[Array, "... O"], weight: Float[Array, "O I"]
) -> Float[Array, "... I"]:
    """`δ W`: the cotangent of a linear layer's input from that of its output."""
    return einsum("...o,oi->...i", delta, weight)


def normalize(
    config: DecoderConfig, x: Float[Array, "... W"], scale: Float[Array, " W"]
) -> Float[Array, "... W"]:
    """The config's norm over the last axis, computed in float32.

    RMSNorm is `x / rms(x) · (offset + scale)`, where Gemma's offset is 1. LayerNorm has no
    parameters: its scale is a constant 1.
    """
    x32 = x.astype(jnp.float32)
    if config.norm == "layer":
        x32 -= x32.mean(axis=-1, keepdims=True)
    power = jnp.mean(x32 * x32, axis=-1, keepdims=True)
    normed = x32 * jax.lax.rsqrt(power + config.norm_eps)
    if config.norm == "rms":
        return normed.astype(x.dtype) * scale
    return (normed * (config.norm_offset + scale.astype(jnp.float32))).astype(x.dtype)


def rope_frequencies(config: DecoderConfig, windowed: bool = False) -> np.ndarray:
    """Angular frequency of each pair of a head's dimensions, float32 [half], half = H/2.

    With `rope_scaling` of Llama 3: long wavelengths are stretched by `factor`, short ones
    kept, those between interpolated (transformers, `_compute_llama3_parameters`).

    Args:
      windowed: those of layers with a window, which Gemma 3 has apart and never scales.
    """
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    if windowed and config.window_rope_theta:
        return (config.window_rope_theta**-exponent).astype(np.float32)
    frequencies = (config.rope_theta**-exponent).astype(np.float32)
    if isinstance(config.rope_scaling, LinearScaling):
        return frequencies / np.float32(config.rope_scaling.factor)
    return _scale_llama3(frequencies, config.rope_scaling) if config.rope_scaling else frequencies


def _scale_llama3(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    wavelengths = 2 * np.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((scaling.original_max_position / wavelengths - low) / (high - low), 0, 1)
    return (kept * frequencies + (1 - kept) * frequencies / scaling.factor).astype(np.float32)


def rope_tables(
    config: DecoderConfig, length: int, windowed: bool = False
) -> Float[Array, "2 T half"]:
    """Cosines and sines of positions 0 … length-1, float32 as in transformers."""
    positions = jnp.arange(length, dtype=jnp.float32)
    angles = positions[:, None] * jnp.asarray(rope_frequencies(config, windowed))[None, :]
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)])


def rotate(x: Float[Array, "B T N H"], rope: Float[Array, "2 T half"]) -> Float[Array, "B T N H"]:
    """Rotary position embedding over the two halves of each head."""
    cos, sin = rope[:, None, :, None, :].astype(x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def soft_cap(x: Array, cap: float | None) -> Array:
    """`cap · tanh(x / cap)`, or x where there is no cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def soft_cap_slope(x: Array, cap: float | None) -> tuple[Array, Array | float]:
    """`soft_cap`, and its derivative at x."""
    if cap is None:
        return x, 1.0
    share = jnp.tanh(x / cap)
    return cap * share, 1 - jnp.square(share)


def gated(
    config: DecoderConfig, gate: Float[Array, "B T F"], up: Float[Array, "B T F"]
) -> Float[Array, "B T F"]:
    """The MLP's nonlinearity: `activation(gate) · up`."""
    if config.activation == "silu":
        return jax.nn.silu(gate) * up
    return jax.nn.gelu(gate, approximate=True) * up
