"""The device buffer that KV cache and adapters share, and the copy that brings an adapter in.

Owns one array ``[pages, rows, 128]`` per layer. It is preallocated once, donated through every step
and every swap-in, so that device memory neither grows nor fragments. It refuses to know who owns
which page: that is the page allocator's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

Pool = tuple[jax.Array, ...]

SWAP_IN_PAGES = (8, 4, 2, 1)
"""Pages of one swap-in call, the largest that fits first: few compiled programs, and no padding."""


def allocate_pool(
    num_layers: int, shape: tuple[int, int, int], dtype: jnp.dtype, sharding: jax.sharding.Sharding
) -> Pool:
    """One zeroed array of ``shape`` [pages, rows, 128] per layer."""
    make = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)
    return tuple(make() for _ in range(num_layers))


@functools.partial(jax.jit, donate_argnums=0)
def _write_pages(pool: Pool, page_ids: jax.Array, pages: jax.Array) -> Pool:
    """``pages`` [layers, n, rows, 128] into pages ``page_ids`` i32[n] of each layer, in place."""

    def write_layer(layer_pool: jax.Array, layer_pages: jax.Array) -> jax.Array:
        for index in range(layer_pages.shape[0]):
            layer_pool = jax.lax.dynamic_update_slice(
                layer_pool, layer_pages[index : index + 1], (page_ids[index], 0, 0)
            )
        return layer_pool

    return tuple(write_layer(layer_pool, pages[i]) for i, layer_pool in enumerate(pool))


def swap_in(pool: Pool, page_ids: Sequence[int], pages: np.ndarray) -> Pool:
    """Copy an adapter's ``pages`` [layers, n, rows, 128] to pool pages ``page_ids`` (length n).

    ``pool`` is donated. The copies are queued: a step launched later sees them.
    """
    start = 0
    while start < len(page_ids):
        count = next(size for size in SWAP_IN_PAGES if size <= len(page_ids) - start)
        ids = np.asarray(page_ids[start : start + count], np.int32)
        pool = _write_pages(pool, ids, pages[:, start : start + count])
        start += count
    return pool
