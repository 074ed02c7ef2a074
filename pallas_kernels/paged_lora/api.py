"""Paged LoRA: ``y + scaling · (x A) B`` per token, A and B of its own adapter, read from the pool.

Owns the signature and the choice of implementation; S-LoRA's MBGMM and MBGMV, Punica's SGMV and
BGMV. A named implementation never falls back and unknown names are errors; one that cannot do what
is asked declines with NotImplementedError. Refuses to know how any of them works.
"""

from __future__ import annotations

import jax

from pallas_kernels.dispatch import Plan
from pallas_kernels.dispatch import implementation as implementation_of
from pallas_kernels.layout import AdapterLayout
from pallas_kernels.paged_lora.batch import LoraBatch, lora_bucket_sizes

__all__ = ["LoraBatch", "lora_bucket_sizes", "paged_lora", "prepare"]


def prepare(batch: LoraBatch, layout: AdapterLayout, *, implementation: str = "xla") -> Plan:
    """The part of the work that all layers share: row indices, masks, order of tokens.

    Called inside the compiled step.
    """
    module = implementation_of("paged_lora", implementation)
    return Plan(module.prepare(batch, layout), implementation)


def paged_lora(
    y: jax.Array,
    x: jax.Array,
    pool_layer: jax.Array,
    plan: Plan,
    *,
    layer: int | jax.Array,
    group: tuple[str, ...],
    layout: AdapterLayout,
) -> jax.Array:
    """``y`` plus each token's LoRA term of one group of targets; float32 inside, y's dtype outside.

    y: [T, outputs of the group's targets side by side]; x: [T, inputs]; pool_layer: [P, R, 128],
    this layer's pages. Rows of base tokens come back as they are. Garbage (NaN) in pages that no
    adapter of the batch owns, and in x of other tokens, reaches no row. ``layer`` picks the
    scaling. The plan's implementation computes it.
    """
    return implementation_of("paged_lora", plan.implementation).paged_lora(
        y, x, pool_layer, plan.data, layer=layer, group=group, layout=layout
    )
