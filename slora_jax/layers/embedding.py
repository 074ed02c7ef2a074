"""Token embedding and the output projection, which is the same matrix in tied models."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from slora_jax.layers.linear import dot
from slora_jax.sharding import sharded_param


class Embedding(nnx.Module):
    """A table [vocab, features]: rows are looked up on the way in, dotted with on the way out."""

    def __init__(self, vocab_size: int, features: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        init = jax.random.normal(rngs.params(), (vocab_size, features), jnp.float32)
        self.weight = sharded_param((init * 0.02).astype(dtype), ("vocab", "embed"))

    def __call__(self, token_ids: jax.Array) -> jax.Array:
        """``token_ids`` i32[tokens] → [tokens, features]."""
        return self.weight[...][token_ids]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """``hidden`` [rows, features] → f32[rows, vocab]."""
        return dot(hidden, self.weight[...], out_dtype=jnp.float32)
