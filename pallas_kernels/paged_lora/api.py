"""Paged LoRA: ``y + scaling · (x A) B`` per token, A and B of its own adapter, read from the pool.

Owns the signature and the choice of implementation; S-LoRA's MBGMM and MBGMV, Punica's SGMV and
BGMV. A named implementation never falls back and unknown names are errors; one that cannot do what
is asked declines with NotImplementedError. Refuses to know how any of them works.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from pallas_kernels.dispatch import implementation as implementation_of
from pallas_kernels.layout import AdapterLayout
from pallas_kernels.paged_lora.batch import LoraBatch, lora_bucket_sizes

__all__ = ["LoraBatch", "LoraPlan", "lora_bucket_sizes", "paged_lora", "prepare"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraPlan:
    """What an implementation computes once a step and shares between layers."""

    data: Any
    """A pytree of the implementation's own."""

    implementation: str = dataclasses.field(metadata={"static": True})
    """Who made it, and alone can read it."""


def prepare(
    batch: LoraBatch, layout: AdapterLayout, *, implementation: str | None = None
) -> LoraPlan:
    """The part of the work that all layers share: row indices, masks, order of tokens.

    Called inside the compiled step. ``implementation=None`` is "xla".
    """
    name = implementation or "xla"
    return LoraPlan(implementation_of("paged_lora", name).prepare(batch, layout), name)


def paged_lora(
    y: jax.Array,
    x: jax.Array,
    pool_layer: jax.Array,
    plan: LoraPlan,
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
