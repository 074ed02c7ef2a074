"""Paged attention and the write of K and V, over the pool that adapters share.

Owns the signatures and the choice of implementation. A named implementation never falls back and
unknown names are errors; one that cannot do what is asked declines with NotImplementedError.
Refuses to know how any of them works.
"""

from __future__ import annotations

import jax

from pallas_kernels.layout import KVLayout
from pallas_kernels.paged_attention import reference, xla
from pallas_kernels.paged_attention.batch import AttentionBatch

__all__ = ["IMPLEMENTATIONS", "AttentionBatch", "kv_write", "paged_attention"]

IMPLEMENTATIONS = {"reference": reference, "xla": xla}


def kv_write(
    pool_layer: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slots: jax.Array,
    *,
    layout: KVLayout,
    implementation: str | None = None,
) -> jax.Array:
    """``pool_layer`` [P, R, 128] with ``k`` and ``v`` [T, Hkv, Dh] at ``slots`` i32[T], in place
    where the pool is donated. Lanes past head_dim become zeros. Slots of page 0 may repeat, others
    not.
    """
    return IMPLEMENTATIONS[_resolve(implementation)].kv_write(
        pool_layer, k, v, slots, layout=layout
    )


def paged_attention(
    q: jax.Array,
    pool_layer: jax.Array,
    batch: AttentionBatch,
    *,
    layout: KVLayout,
    scale: float,
    implementation: str | None = None,
) -> jax.Array:
    """``q`` [T, Hq, Dh] → same: a token at position p attends to 0..p of its own sequence.

    Its own K and V were written before (``kv_write``). Softmax in float32; padding rows give zeros.
    Garbage (NaN) in unwritten slots and in pages that the row does not own reaches nothing. Query
    heads ``h * G .. h * G + G - 1`` share KV head h.
    """
    return IMPLEMENTATIONS[_resolve(implementation)].paged_attention(
        q, pool_layer, batch, layout=layout, scale=scale
    )


def _resolve(implementation: str | None) -> str:
    if implementation is None:
        return "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"no implementation {implementation!r} of paged_attention: {', '.join(IMPLEMENTATIONS)}"
        )
    return implementation
