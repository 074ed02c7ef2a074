"""ForwardBatch: everything one compiled step receives besides the weights and the pool.

The seam between the host half, which fills it with NumPy, and the device half, which reads it. All
sizes are buckets; what is real is said by the values (a padding token has position -1 and writes to
the null page). The arrays' shapes and the static fields below are all that a compiled step depends
on: two steps with equal ones share a program.

Letters, the same everywhere: T tokens, D decode rows, S sequences and prefill tiles with a page
table row, N adapters of the step (row 0 is the base), L layers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from pallas_kernels.paged_attention.api import AttentionBatch
from pallas_kernels.paged_lora.api import LoraBatch

Array = Any
"""``jax.Array`` on the device, ``np.ndarray`` on the host."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class StepLora:
    """The adapters of a step."""

    stages: tuple[LoraBatch, ...]
    """One for each stage of the adapters' partition, over the same adapters and pages."""

    groups: tuple[tuple[str, ...], ...] = dataclasses.field(metadata={"static": True})
    """The groups of targets that may have an adapter; the others are not computed."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardBatch:
    """One step's tokens, flat and ragged: D decode rows, then prefill tiles of one request each."""

    token_ids: Array
    """i32[T]; anything valid (0) on padding, and where ``sampled_row`` has the token."""

    sampled_row: Array
    """i32[D]: where among the tokens that the step before sampled a decode row's token is, which
    the host has not read yet; -1 where ``token_ids`` has it."""

    ending_row: Array
    """i32[most requests at once]: the rows whose hidden states the next tokens come from, 0 past
    the last."""

    attention: AttentionBatch
    """Where each token's K and V go, and which pages each row attends to."""

    lora: StepLora | None
    """The adapters of the step; None where every token is the base's, which launches nothing."""
