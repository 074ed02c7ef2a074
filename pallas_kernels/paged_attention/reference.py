"""Paged attention in the plainest jnp: the specification and the oracle of every implementation.

Gathers the whole history of each token through its page table row, masks what lies after it, and
takes one softmax. Owns the meaning, refuses to be fast: T × NP * page_size keys in memory.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.layout import KVLayout
from pallas_kernels.paged_attention.batch import AttentionBatch


def prepare(batch: AttentionBatch, layout: KVLayout, num_heads: int) -> AttentionBatch:
    """See ``api.prepare``: nothing is worth sharing."""
    return batch


def kv_write(
    pool_layer: jax.Array,
    k: jax.Array,
    v: jax.Array,
    batch: AttentionBatch,
    *,
    layout: KVLayout,
) -> jax.Array:
    """See ``api.kv_write``."""
    slots = batch.slots
    padding = ((0, 0), (0, 0), (0, layout.padded_head_dim - layout.head_dim))
    k = jnp.pad(k, padding).astype(pool_layer.dtype)
    v = jnp.pad(v, padding).astype(pool_layer.dtype)
    page, token = slots // layout.page_size, slots % layout.page_size
    pages = pool_layer.reshape(-1, *page_shape(layout))
    if layout.padded_head_dim == 64:
        pages = pages.at[page, token].set(jnp.concatenate([k, v], axis=-1))
    else:
        pages = pages.at[page, 0, token].set(k).at[page, 1, token].set(v)
    return pages.reshape(pool_layer.shape)


def page_shape(layout: KVLayout) -> tuple[int, ...]:
    """The KV view of a page: [token, head, K 0:64 and V 64:128], or [K or V, token, head, 128]."""
    if layout.padded_head_dim == 64:
        return (layout.page_size, layout.num_kv_heads, 128)
    return (2, layout.page_size, layout.num_kv_heads, 128)


def paged_attention(
    q: jax.Array, pool_layer: jax.Array, batch: AttentionBatch, *, layout: KVLayout, scale: float
) -> jax.Array:
    """See ``api.paged_attention``."""
    num_decode, tile = batch.num_decode, batch.tile
    num_tokens, num_heads, head_dim = q.shape
    token = jnp.arange(num_tokens)
    row = jnp.where(token < num_decode, token, num_decode + (token - num_decode) // max(tile, 1))
    pages = pool_layer.reshape(-1, *page_shape(layout)).astype(jnp.float32)
    pages = pages[batch.page_table[row]]  # [T, NP, …page]
    if layout.padded_head_dim == 64:
        k, v = pages[..., :64], pages[..., 64:]
    else:
        k, v = pages[:, :, 0], pages[:, :, 1]
    shape = (num_tokens, -1, layout.num_kv_heads, layout.padded_head_dim)
    k, v = k.reshape(shape)[..., :head_dim], v.reshape(shape)[..., :head_dim]  # [T, S, Hkv, Dh]
    heads_per_kv = num_heads // layout.num_kv_heads
    grouped = q.astype(jnp.float32).reshape(num_tokens, -1, heads_per_kv, head_dim)

    visible = jnp.arange(k.shape[1])[None, :] <= batch.positions[:, None]  # [T, S]
    scores = scale * jnp.einsum("thgd,tshd->thgs", grouped, k, precision="highest")
    scores = jnp.where(visible[:, None, None, :], scores, -jnp.inf)
    # A padding row sees nothing; give it something finite and zero it at the end.
    largest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(largest), largest, 0.0))
    v = jnp.where(visible[:, :, None, None], v, 0.0)  # unwritten slots may hold NaN
    out = jnp.einsum("thgs,tshd->thgd", weights, v, precision="highest")
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = out / jnp.where(total > 0, total, 1.0)
    return out.reshape(q.shape).astype(q.dtype)
