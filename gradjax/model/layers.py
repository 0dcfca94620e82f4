"""The decoder's layers as pure functions of arrays. Axis letters: structs.py.

Every matrix product names its precision: JAX's default for float32 is TF32 on NVIDIA and
bfloat16 on TPU, which would change the gradients themselves.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gradjax.model.config import DecoderConfig, RopeScaling

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


def rms_norm(
    x: Float[Array, "... D"], scale: Float[Array, " D"], eps: float, offset: float
) -> Float[Array, "... D"]:
    """`x / rms(x) · (offset + scale)`, computed in float32; Gemma's offset is 1."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    if offset:
        # Gemma scales before it rounds, the others after: visible in bfloat16 only.
        return (normed * (offset + scale.astype(jnp.float32))).astype(x.dtype)
    return normed.astype(x.dtype) * scale


def rope_frequencies(config: DecoderConfig) -> np.ndarray:
    """Angular frequency of each pair of a head's dimensions, float32 [half], half = H/2.

    With `rope_scaling` of Llama 3: long wavelengths are stretched by `factor`, short ones
    kept, those between interpolated (transformers, `_compute_llama3_parameters`).
    """
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    frequencies = (config.rope_theta**-exponent).astype(np.float32)
    if config.rope_scaling is None:
        return frequencies
    return _scale_llama3(frequencies, config.rope_scaling)


def _scale_llama3(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    wavelengths = 2 * np.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((scaling.original_max_position / wavelengths - low) / (high - low), 0, 1)
    return (kept * frequencies + (1 - kept) * frequencies / scaling.factor).astype(np.float32)


def rope_tables(config: DecoderConfig, length: int) -> Float[Array, "2 T half"]:
    """Cosines and sines of positions 0 … length-1, float32 as in transformers."""
    positions = jnp.arange(length, dtype=jnp.float32)
    angles = positions[:, None] * jnp.asarray(rope_frequencies(config))[None, :]
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
