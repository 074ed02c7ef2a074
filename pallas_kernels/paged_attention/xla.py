"""Paged attention in plain XLA: an online softmax over chunks of pages, as long as the longest row.

Serves CPU, T4 and whatever has no kernel of its own. A chunk is a fixed number of tokens, so the
order of a row's reduction depends on its positions alone: its bits do not depend on its neighbours.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.layout import LANES, KVLayout
from pallas_kernels.paged_attention.batch import AttentionBatch

CHUNK_TOKENS = 64
"""Keys a trip of the loop, rounded up to whole pages."""


def kv_write(
    pool_layer: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array, *, layout: KVLayout
) -> jax.Array:
    """See ``api.kv_write``."""
    padding = ((0, 0), (0, 0), (0, layout.padded_head_dim - layout.head_dim))
    k = jnp.pad(k, padding).astype(pool_layer.dtype)
    v = jnp.pad(v, padding).astype(pool_layer.dtype)
    rows = pool_layer.reshape(-1, layout.num_kv_heads, LANES)
    if layout.padded_head_dim == 64:
        updates = jnp.concatenate([k, v], axis=-1)
        where = slots
    else:
        updates = jnp.concatenate([k, v])
        page, token = slots // layout.page_size, slots % layout.page_size
        where = jnp.concatenate([2 * page, 2 * page + 1]) * layout.page_size
        where = where + jnp.concatenate([token, token])
    if len(where) == 1:
        # XLA turns a scatter of one update into something that copies the pool three times on CPU:
        # write the same once more, into the null page.
        where, updates = jnp.pad(where, (0, 1)), jnp.concatenate([updates, updates])
    rows = rows.at[where].set(updates, mode="promise_in_bounds")
    return rows.reshape(pool_layer.shape)


def paged_attention(
    q: jax.Array, pool_layer: jax.Array, batch: AttentionBatch, *, layout: KVLayout, scale: float
) -> jax.Array:
    """See ``api.paged_attention``."""
    num_decode, tile = batch.num_decode, batch.tile
    num_heads, head_dim = q.shape[1:]
    padding = ((0, 0), (0, 0), (0, layout.padded_head_dim - head_dim))
    q = jnp.pad(q, padding)
    tiles = batch.page_table.shape[0] - num_decode
    parts = []
    for first, count, queries, first_row in (
        (0, num_decode, 1, 0),
        (num_decode, tiles, tile, num_decode),
    ):
        if count:
            tokens = slice(first, first + count * queries)
            parts.append(
                _attend(
                    q[tokens].reshape(count, queries, num_heads, layout.padded_head_dim),
                    pool_layer,
                    batch.positions[tokens].reshape(count, queries),
                    batch.page_table[first_row : first_row + count],
                    layout,
                    scale,
                ).reshape(count * queries, num_heads, layout.padded_head_dim)
            )
    out = jnp.concatenate(parts)
    return out[:, :, :head_dim].astype(q.dtype)


def _attend(
    q: jax.Array,
    pool_layer: jax.Array,
    positions: jax.Array,
    page_table: jax.Array,
    layout: KVLayout,
    scale: float,
) -> jax.Array:
    """f32[S, Q, Hq, Dh] for S sequences of Q queries each."""
    num_seqs, num_queries, num_heads, dim = q.shape
    heads_per_kv = num_heads // layout.num_kv_heads
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    pages_per_chunk = max(1, min(CHUNK_TOKENS // layout.page_size, page_table.shape[1]))
    chunk = pages_per_chunk * layout.page_size
    short = -page_table.shape[1] % pages_per_chunk
    page_table = jnp.pad(page_table, ((0, 0), (0, short)))
    # [S, Hkv, G * Q, Dh]: the queries that share a KV head share a matmul.
    q = q.reshape(num_seqs, num_queries, layout.num_kv_heads, heads_per_kv, dim)
    q = q.transpose(0, 2, 3, 1, 4).reshape(num_seqs, layout.num_kv_heads, -1, dim)
    limit = jnp.tile(positions, (1, heads_per_kv))[:, None, :, None]  # [S, 1, G * Q, 1]
    last = jnp.max(positions, axis=1)[:, None, None, None]  # what any query of the row may see

    def keys_and_values(index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Each [S, chunk, Hkv, Dh]."""
        pages = jax.lax.dynamic_slice_in_dim(
            page_table, index * pages_per_chunk, pages_per_chunk, axis=1
        )
        if dim == 64:
            shape = (-1, layout.page_size, layout.num_kv_heads, LANES)
            rows = pool_layer.reshape(shape).at[pages].get(mode="promise_in_bounds")
            rows = rows.reshape(num_seqs, chunk, layout.num_kv_heads, LANES)
            return rows[..., :64], rows[..., 64:]
        shape = (-1, 2, layout.page_size, layout.num_kv_heads, LANES)
        rows = pool_layer.reshape(shape).at[pages].get(mode="promise_in_bounds")
        rows = rows.transpose(2, 0, 1, 3, 4, 5).reshape(2, num_seqs, chunk, -1, LANES)
        return rows[0], rows[1]

    def body(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        largest, total, acc = carry
        k, v = keys_and_values(index)
        key_position = index * chunk + jnp.arange(chunk, dtype=jnp.int32)[None, None, None, :]
        scores = jax.lax.dot_general(
            q,
            k,
            (((3,), (3,)), ((0, 1), (0, 2))),
            precision=precision,
            preferred_element_type=jnp.float32,
        )  # [S, Hkv, G * Q, chunk]
        scores = jnp.where(key_position <= limit, scores * scale, -jnp.inf)
        new_largest = jnp.maximum(largest, jnp.max(scores, axis=-1, keepdims=True))
        # A row that has seen nothing yet keeps -inf; subtract something finite there.
        finite = jnp.where(jnp.isfinite(new_largest), new_largest, 0.0)
        weights = jnp.exp(scores - finite)
        shrink = jnp.exp(largest - finite)
        total = total * shrink + jnp.sum(weights, axis=-1, keepdims=True)
        written = jnp.swapaxes(key_position, 1, 3) <= last  # unwritten slots may hold NaN
        v = jnp.where(written, v, jnp.zeros((), v.dtype))
        acc = acc * shrink + jax.lax.dot_general(
            weights.astype(v.dtype),
            v,
            (((3,), (1,)), ((0, 1), (0, 2))),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        return new_largest, total, acc

    shape = (num_seqs, layout.num_kv_heads, heads_per_kv * num_queries)
    carry = (
        jnp.full((*shape, 1), -jnp.inf, jnp.float32),
        jnp.zeros((*shape, 1), jnp.float32),
        jnp.zeros((*shape, dim), jnp.float32),
    )
    trips = (jnp.max(positions) + chunk) // chunk
    _, total, acc = jax.lax.fori_loop(0, trips, body, carry)
    out = acc / jnp.where(total > 0, total, 1.0)
    out = out.reshape(num_seqs, layout.num_kv_heads, heads_per_kv, num_queries, dim)
    return out.transpose(0, 3, 1, 2, 4).reshape(num_seqs, num_queries, num_heads, dim)
