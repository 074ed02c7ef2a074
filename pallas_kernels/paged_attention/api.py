"""Paged attention and the write of K and V, over the pool that adapters share.

Owns the signatures. A named implementation never falls back and unknown names are errors; one that
cannot do what is asked declines with NotImplementedError. Refuses to know how any of them works.
"""

from __future__ import annotations

import jax

from pallas_kernels.dispatch import Plan
from pallas_kernels.dispatch import implementation as implementation_of
from pallas_kernels.layout import KVLayout
from pallas_kernels.paged_attention.batch import AttentionBatch

__all__ = ["AttentionBatch", "kv_write", "paged_attention", "prepare"]


def prepare(
    batch: AttentionBatch, layout: KVLayout, *, num_heads: int, implementation: str = "xla"
) -> Plan:
    """The part of the work that all layers share: work lists, masks.

    Called inside the compiled step. ``num_heads``: query heads.
    """
    module = implementation_of("paged_attention", implementation)
    return Plan(module.prepare(batch, layout, num_heads), implementation)


def kv_write(
    pool_layer: jax.Array, k: jax.Array, v: jax.Array, plan: Plan, *, layout: KVLayout
) -> jax.Array:
    """``pool_layer`` [P, R, 128] with ``k`` and ``v`` [T, Hkv, Dh] at the batch's slots, in place
    where the pool is donated. Lanes past head_dim become zeros. Slots of page 0 may repeat, others
    not.
    """
    return implementation_of("paged_attention", plan.implementation).kv_write(
        pool_layer, k, v, plan.data, layout=layout
    )


def paged_attention(
    q: jax.Array, pool_layer: jax.Array, plan: Plan, *, layout: KVLayout, scale: float
) -> jax.Array:
    """``q`` [T, Hq, Dh] → same: a token at position p attends to 0..p of its own sequence.

    Its own K and V were written before (``kv_write``). Softmax in float32; padding rows give zeros.
    Garbage (NaN) in unwritten slots and in pages that the row does not own reaches nothing. Query
    heads ``h * G .. h * G + G - 1`` share KV head h.
    """
    return implementation_of("paged_attention", plan.implementation).paged_attention(
        q, pool_layer, plan.data, layout=layout, scale=scale
    )
