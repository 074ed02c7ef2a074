"""RMSNorm (Zhang & Sennrich, arXiv 1910.07467), the only normalisation of Llama."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from slora_jax.sharding import sharded_param


class RMSNorm(nnx.Module):
    """``weight * x / rms(x)``, the statistics in float32 whatever the dtype."""

    def __init__(self, features: int, *, eps: float, dtype: jnp.dtype):
        self.weight = sharded_param(jnp.ones((features,), dtype), ("norm",))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """``x`` [tokens, features] → same shape and dtype."""
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return self.weight[...][None, :] * (wide * scale).astype(x.dtype)
