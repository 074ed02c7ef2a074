"""Paged attention and the write of K and V, over the pool that adapters share.

Owns the signatures. A named implementation never falls back and unknown names are errors; one that
cannot do what is asked declines with NotImplementedError. Refuses to know how any of them works.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from pallas_kernels.dispatch import implementation as implementation_of
from pallas_kernels.layout import KVLayout
from pallas_kernels.paged_attention.batch import AttentionBatch

__all__ = ["AttentionBatch", "AttentionPlan", "kv_write", "paged_attention", "prepare"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionPlan:
    """What an implementation computes once a step and shares between layers."""

    data: Any
    """A pytree of the implementation's own."""

    implementation: str = dataclasses.field(metadata={"static": True})
    """Who made it, and alone can read it."""


def prepare(
    batch: AttentionBatch, layout: KVLayout, *, num_heads: int, implementation: str | None = None
) -> AttentionPlan:
    """The part of the work that all layers share: work lists, masks.

    Called inside the compiled step. ``num_heads``: query heads. ``implementation=None`` is "xla".
    """
    name = implementation or "xla"
    module = implementation_of("paged_attention", name)
    return AttentionPlan(module.prepare(batch, layout, num_heads), name)


def kv_write(
    pool_layer: jax.Array, k: jax.Array, v: jax.Array, plan: AttentionPlan, *, layout: KVLayout
) -> jax.Array:
    """``pool_layer`` [P, R, 128] with ``k`` and ``v`` [T, Hkv, Dh] at the batch's slots, in place
    where the pool is donated. Lanes past head_dim become zeros. Slots of page 0 may repeat, others
    not.
    """
    return implementation_of("paged_attention", plan.implementation).kv_write(
        pool_layer, k, v, plan.data, layout=layout
    )


def paged_attention(
    q: jax.Array, pool_layer: jax.Array, plan: AttentionPlan, *, layout: KVLayout, scale: float
) -> jax.Array:
    """``q`` [T, Hq, Dh] → same: a token at position p attends to 0..p of its own sequence.

    Its own K and V were written before (``kv_write``). Softmax in float32; padding rows give zeros.
    Garbage (NaN) in unwritten slots and in pages that the row does not own reaches nothing. Query
    heads ``h * G .. h * G + G - 1`` share KV head h.
    """
    return implementation_of("paged_attention", plan.implementation).paged_attention(
        q, pool_layer, plan.data, layout=layout, scale=scale
    )
