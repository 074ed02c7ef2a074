"""Paged attention in plain XLA: an online softmax over chunks of pages, as long as the longest row.

Serves CPU, T4 and whatever has no kernel of its own. A chunk is a fixed number of tokens, so the
order of a row's reduction depends on its positions alone: its bits do not depend on its neighbours.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.layout import LANES, KVLayout
from pallas_kernels.paged_attention.batch import AttentionBatch

FEW_QUERIES = 16
"""Below as many queries a KV head (decode), rows of K and V are gathered whole and met as they lie;
from there on it pays to gather K and V apart."""

CHUNK_TOKENS = 64
"""Keys a trip of the loop."""


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
    num_kv_heads, page_size = layout.num_kv_heads, layout.page_size
    heads_per_kv = num_heads // num_kv_heads
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    # The M queries that share a KV head share a matmul: [S, Hkv, M, Dh].
    q = q.reshape(num_seqs, num_queries, num_kv_heads, heads_per_kv, dim).swapaxes(1, 2)
    q = q.reshape(num_seqs, num_kv_heads, num_queries * heads_per_kv, dim)
    last = jnp.maximum(jnp.max(positions, axis=1, keepdims=True), 0)  # [S, 1]
    head = jnp.arange(num_kv_heads, dtype=jnp.int32)[None, :, None]
    few = q.shape[2] < FEW_QUERIES
    whole_rows = few and dim < LANES
    limit = jnp.repeat(positions, heads_per_kv, axis=1).reshape(num_seqs, 1, -1, 1)
    if whole_rows:
        q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, LANES - dim)))  # zeros meet V

    def keys_and_values(position: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Each [S, Hkv, chunk, lanes]: what lies at ``position`` i32[chunk] of each sequence."""
        # Past a row's end may be NaN, which no weight of zero stops: read its last token again.
        place = jnp.minimum(position[None, :], last)
        page = jnp.take_along_axis(page_table, place // page_size, axis=1, mode="clip")
        if dim < LANES:
            row = (page * page_size + place % page_size)[:, None, :] * num_kv_heads + head
            if whole_rows:
                both = _rows(pool_layer.reshape(-1, LANES), row)
                return both, both
            halves = pool_layer.reshape(-1, dim)
            return _rows(halves, 2 * row), _rows(halves, 2 * row + 1)
        row = (page * 2 * page_size + place % page_size)[:, None, :] * num_kv_heads + head
        rows = pool_layer.reshape(-1, LANES)
        return _rows(rows, row), _rows(rows, row + page_size * num_kv_heads)

    def dot(left: jax.Array, right: jax.Array, left_axis: int, right_axis: int) -> jax.Array:
        """Over one axis of each, for every sequence and KV head; f32."""
        return jax.lax.dot_general(
            left,
            right,
            (((left_axis,), (right_axis,)), ((0, 1), (0, 1))),
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    def add_chunk(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        largest, total, acc = carry
        position = index * CHUNK_TOKENS + jnp.arange(CHUNK_TOKENS, dtype=jnp.int32)
        k, v = keys_and_values(position)
        if few:
            # A product with few columns is twice as fast as one with few rows; the barrier keeps
            # XLA from turning one into the other to save the transposition.
            scores = jax.lax.optimization_barrier(dot(k, q, 3, 3)).swapaxes(2, 3)
        else:
            scores = dot(q, k, 3, 3)  # [S, Hkv, M, chunk]
        visible = position.reshape(1, 1, 1, -1) <= limit
        scores = jnp.where(visible, scores * scale, -jnp.inf)
        new_largest = jnp.maximum(largest, jnp.max(scores, axis=3, keepdims=True))
        weights = jax.lax.optimization_barrier(jnp.exp(scores - new_largest))
        fade = jnp.exp(largest - new_largest)
        total = total * fade + _sum_of_rows(weights)
        update = dot(weights.astype(v.dtype), v, 3, 2)  # [S, Hkv, M, lanes]
        return new_largest, total, acc * fade + update[..., update.shape[3] - dim :]

    zeros = jnp.zeros((*q.shape[:3], 1), jnp.float32)
    acc = jnp.zeros((*q.shape[:3], dim), jnp.float32)
    trips = (jnp.max(positions) + CHUNK_TOKENS) // CHUNK_TOKENS
    # Padding rows see nothing: the least finite number, and no NaN of two infinities.
    largest = jnp.full_like(zeros, jnp.finfo(jnp.float32).min)
    _, total, acc = jax.lax.fori_loop(0, trips, add_chunk, (largest, zeros, acc))
    out = jnp.where(total > 0, acc / jnp.where(total > 0, total, 1.0), 0.0)
    out = out.reshape(num_seqs, num_kv_heads, num_queries, heads_per_kv, dim).swapaxes(1, 2)
    return out.reshape(num_seqs, num_queries, num_heads, dim)


def _sum_of_rows(values: jax.Array) -> jax.Array:
    """Over the last axis, which stays, as a product: a reduction is slower in XLA's CPU backend."""
    ones = jnp.ones((values.shape[-1], 1), values.dtype)
    total = jnp.dot(values.reshape(-1, values.shape[-1]), ones, precision=jax.lax.Precision.HIGHEST)
    return total.reshape(*values.shape[:-1], 1)


def _rows(pool_rows: jax.Array, rows: jax.Array) -> jax.Array:
    """``pool_rows[rows]`` for rows in bounds: one operation, where indexing emits eight."""
    return jax.lax.gather(
        pool_rows,
        rows[..., None],
        jax.lax.GatherDimensionNumbers(
            offset_dims=(rows.ndim,), collapsed_slice_dims=(0,), start_index_map=(0,)
        ),
        slice_sizes=(1, pool_rows.shape[1]),
        mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )
