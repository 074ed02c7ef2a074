"""AttentionBatch: where each token of a step writes its K and V, and what each row attends to.

Owns the metadata that every implementation of paged_attention reads. Filled on the host with NumPy;
knows no requests.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

Array = Any
"""``jax.Array`` in a compiled step, ``np.ndarray`` where the host fills it in."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionBatch:
    """T = D + NT * tile tokens: D decode rows, then NT prefill tiles, each of one sequence.

    The tokens of a tile are consecutive positions, with padding at its end. Shapes, ``num_decode``
    and ``tile`` are what a compiled step depends on.
    """

    slots: Array
    """i32[T]: page * page_size + offset that takes each token's K and V; padding points into page
    0."""

    positions: Array
    """i32[T]: each token's position in its sequence; -1 on padding."""

    page_table: Array
    """i32[D + NT, NP]: one row a decode token, then one a tile; null(0)-padded."""

    num_decode: int = dataclasses.field(metadata={"static": True})
    """D: rows 0..D-1 are sequences of one token each."""

    tile: int = dataclasses.field(metadata={"static": True})
    """Tokens a prefill tile: tile i owns rows D + i * tile onward."""
