"""Token embedding and the output projection, which is the same matrix in tied models."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from slora_jax.layers.linear import dot
from slora_jax.sharding import Shards, sharded_param


class Embedding(nnx.Module):
    """A table [vocab, features]: rows are looked up on the way in, dotted with on the way out.

    Cut over devices, each has a share of the rows, the last ones padded with zeros.
    """

    def __init__(
        self,
        vocab_size: int,
        features: int,
        shards: Shards,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        rows = -(-vocab_size // shards.count) * shards.count
        init = jax.random.normal(rngs.params(), (rows, features), jnp.float32)
        self.weight = sharded_param((init * 0.02).astype(dtype), ("vocab", "embed"))
        self.vocab_size = vocab_size
        self.shards = shards

    def __call__(self, token_ids: jax.Array) -> jax.Array:
        """``token_ids`` i32[tokens] → [tokens, features]."""
        table = self.weight[...]
        if self.shards.count == 1:
            return table[token_ids]
        row = token_ids - self.shards.index() * len(table)
        is_own = (row >= 0) & (row < len(table))
        own = table[jnp.clip(row, 0, len(table) - 1)]
        return self.shards.sum(jnp.where(is_own[:, None], own, jnp.zeros((), table.dtype)))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """``hidden`` [rows, features] → f32[rows, this device's share of the vocabulary].

        -inf in columns past the vocabulary's end.
        """
        table = self.weight[...]
        logits = dot(hidden, table, out_dtype=jnp.float32)
        if self.vocab_size % self.shards.count == 0:
            return logits
        column = self.shards.index() * len(table) + jnp.arange(len(table), dtype=jnp.int32)
        return jnp.where((column < self.vocab_size)[None, :], logits, -jnp.inf)
