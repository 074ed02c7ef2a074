"""LoraBatch: what one step says about its adapters, and the bucket sizes that bound it.

Owns the metadata that every implementation of paged_lora reads. Filled on the host with NumPy;
knows neither requests nor names of adapters.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol

import jax

from pallas_kernels.layout import MAX_RANK, RANK_MULTIPLE, TARGETS

Array = Any
"""``jax.Array`` in a compiled step, ``np.ndarray`` where the host fills it in."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraBatch:
    """The adapters of one step: a table of N rows, row 0 the base model, unused rows of rank 0.

    Shapes and ``rank_bucket`` are what a compiled step depends on; ``lora_bucket_sizes`` derives N
    and F from ``rank_bucket``, so that it is the only bucket of this batch besides T. Where a step
    has fewer requests than that, N may be one more than they are.
    """

    adapter_index: Array
    """i32[T]: each token's row in the tables; 0 on base and padding tokens."""

    pages: Array
    """i32[F]: page ids of all adapters, one list behind another in table order, null(0)-padded."""

    page_start: Array
    """i32[N]: where each adapter's list starts in ``pages``."""

    rank: Array
    """i32[N, 7]: stored ranks (multiples of 8), 0 where the adapter lacks the target."""

    a_row: Array
    """i32[N, 7]: row within the adapter's pages at which each target's A starts."""

    b_row: Array
    """i32[N, 7]: likewise of each Bᵀ."""

    scaling: Array
    """f32[L, N, 7]."""

    rank_bucket: int = dataclasses.field(metadata={"static": True})
    """Rt, a multiple of 8: at least the sum, over the adapters, of their largest target rank."""


class CountsPages(Protocol):
    """An ``AdapterLayout``, or what is made of several; hashable."""

    def num_pages(self, ranks: Sequence[int]) -> int:
        """Pages that an adapter of these ranks takes."""
        ...


@functools.cache
def lora_bucket_sizes(rank_bucket: int, layout: CountsPages) -> tuple[int, int]:
    """(N, F): table rows and page ids that no step within ``rank_bucket`` can overflow."""
    if rank_bucket < 0 or rank_bucket % RANK_MULTIPLE:
        raise ValueError(f"rank_bucket={rank_bucket} must be a multiple of {RANK_MULTIPLE}")
    units = rank_bucket // RANK_MULTIPLE
    # An adapter has the most pages for its largest rank where all its targets have that rank.
    pages_of = [
        layout.num_pages([unit * RANK_MULTIPLE] * len(TARGETS))
        for unit in range(MAX_RANK // RANK_MULTIPLE + 1)
    ]
    most = [0]  # most[u]: the most pages of any set of adapters whose largest ranks sum to 8 u
    for unit in range(1, units + 1):
        most.append(max(pages_of[k] + most[unit - k] for k in range(1, len(pages_of)) if k <= unit))
    return units + 1, max(most[units], 1)
