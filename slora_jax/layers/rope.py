"""Rotary position embedding (Su et al., arXiv 2104.09864), with Llama 3's frequency scaling.

Angles are computed in float32 from integer positions, once a step for all layers.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's long-context scaling: low frequencies are divided by ``factor``, high ones
    kept."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """f32[head_dim / 2]: radians per position of each rotated pair."""
    # float32 throughout, as the reference implementation: these are the model's own constants.
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    freqs = (np.float32(1.0) / np.power(np.float32(theta), exponents)).astype(np.float32)
    if scaling is None:
        return freqs
    wavelength = np.float32(2 * math.pi) / freqs
    longest = scaling.original_max_position_embeddings / scaling.low_freq_factor
    shortest = scaling.original_max_position_embeddings / scaling.high_freq_factor
    ramp = (scaling.original_max_position_embeddings / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - ramp) * freqs / scaling.factor + ramp * freqs
    scaled = np.where(wavelength > longest, freqs / scaling.factor, blended)
    return np.where(wavelength < shortest, freqs, scaled).astype(np.float32)


def rope_angles(positions: jax.Array, frequencies: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``positions`` i32[tokens] → (cos, sin), each f32[tokens, 1, head_dim / 2]."""
    angles = positions.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]


def apply_rope(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate ``x`` [tokens, heads, head_dim]; element i pairs with i + head_dim / 2."""
    cos, sin = (a.astype(x.dtype) for a in angles)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
