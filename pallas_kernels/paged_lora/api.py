"""Paged LoRA: ``y + scaling · (x A) B`` per token, A and B of its own adapter, read from the pool.

Owns the signature and the choice of implementation; S-LoRA's MBGMM and MBGMV, Punica's SGMV and
BGMV. A named implementation never falls back and unknown names are errors; one that cannot do what
is asked declines with NotImplementedError. Refuses to know how any of them works.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from pallas_kernels.layout import AdapterLayout
from pallas_kernels.paged_lora import reference, xla
from pallas_kernels.paged_lora.batch import LoraBatch, lora_bucket_sizes

__all__ = ["IMPLEMENTATIONS", "LoraBatch", "LoraPlan", "lora_bucket_sizes", "paged_lora", "prepare"]

IMPLEMENTATIONS = {"reference": reference, "xla": xla}


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

    Called inside the compiled step. ``implementation=None`` takes the best for the default backend.
    """
    name = _resolve(implementation)
    return LoraPlan(IMPLEMENTATIONS[name].prepare(batch, layout), name)


def paged_lora(
    y: jax.Array,
    x: jax.Array,
    pool_layer: jax.Array,
    plan: LoraPlan,
    *,
    layer: int | jax.Array,
    group: tuple[str, ...],
    layout: AdapterLayout,
    implementation: str | None = None,
) -> jax.Array:
    """``y`` plus each token's LoRA term of one group of targets; float32 inside, y's dtype outside.

    y: [T, outputs of the group's targets side by side]; x: [T, inputs]; pool_layer: [P, R, 128],
    this layer's pages. Rows of base tokens come back as they are. Garbage (NaN) in pages that no
    adapter of the batch owns, and in x of other tokens, reaches no row. ``layer`` picks the
    scaling. ``implementation=None`` is the plan's; another than the plan's is a ValueError.
    """
    if implementation is not None and _resolve(implementation) != plan.implementation:
        raise ValueError(f"the plan is for {plan.implementation!r}, not for {implementation!r}")
    return IMPLEMENTATIONS[plan.implementation].paged_lora(
        y, x, pool_layer, plan.data, layer=layer, group=group, layout=layout
    )


def _resolve(implementation: str | None) -> str:
    if implementation is None:
        return "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"no implementation {implementation!r} of paged_lora: {', '.join(IMPLEMENTATIONS)}"
        )
    return implementation
