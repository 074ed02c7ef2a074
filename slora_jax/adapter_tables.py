"""AdapterTables: where the adapters in the pool lie in it, as paged_lora is told.

Owns a row of numbers for each of them, and picks a step's rows out of them: all NumPy, no device.
Refuses to know what is in an adapter's pages, and why it is in the pool.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

from pallas_kernels.layout import GROUPS, TARGETS
from pallas_kernels.paged_lora.api import LoraBatch, lora_bucket_sizes
from slora_jax.adapter_partition import AdapterPartition
from slora_jax.adapter_store import BASE_VERSION, PackedAdapter
from slora_jax.batch import StepLora


class AdapterTables:
    """The tables of all adapters in the pool, by version.

    Invariant: row 0 is the base's, of rank 0; any other row is one adapter's, or free.
    """

    def __init__(self, partition: AdapterPartition, *, num_layers: int, max_adapters: int):
        """``max_adapters``: at once; memory is taken when a row is first used."""
        rows, targets = max_adapters + 1, len(TARGETS)
        self._partition = partition
        self._row = {BASE_VERSION: 0}
        self._free = list(range(max_adapters, 0, -1))
        self._largest_rank = np.zeros(rows, np.int32)
        self._num_pages = np.zeros(rows, np.int32)
        self._pages = [b""] * rows  # ids as 32-bit integers
        # Stored ranks, first rows of A, first rows of Bᵀ: of each stage.
        self._segments = np.zeros((len(partition.stages), 3, rows, targets), np.int32)
        self._scaling = np.zeros((num_layers, rows, targets), np.float32)
        self.groups: tuple[tuple[str, ...], ...] = ()
        """The groups of targets that any adapter so far has."""

    # -- in the pool: place / forget -----------------------------------------------------------

    def place(self, version: int, packed: PackedAdapter, page_ids: Sequence[int]) -> None:
        """The adapter ``packed`` lies at ``page_ids`` from now on."""
        assert version not in self._row, "it is in the pool already"
        self.expect(packed.ranks)
        row = self._row[version] = self._free.pop()
        self._largest_rank[row] = max(packed.ranks)
        self._num_pages[row] = len(page_ids)
        self._pages[row] = array("i", page_ids).tobytes()
        stages = zip(
            self._partition.stage_ranks(packed.ranks),
            self._partition.segments(packed.ranks),
            strict=True,
        )
        self._segments[:, :, row] = [[ranks, *first_rows] for ranks, first_rows in stages]
        self._scaling[:, row] = packed.scaling

    def forget(self, version: int) -> None:
        """The adapter has left the pool; nothing where it is not in it."""
        row = self._row.pop(version, None)
        if row is not None:
            self._free.append(row)

    def clear(self) -> None:
        """All have left the pool."""
        for version in self._row.keys() - {BASE_VERSION}:
            self.forget(version)

    def expect(self, ranks: Sequence[int]) -> None:
        """An adapter of these ranks, one for each target, may come."""
        has = {target for target, rank in zip(TARGETS, ranks, strict=True) if rank}
        self.groups = tuple(g for g in GROUPS if g in self.groups or has.intersection(g))

    # -- a step's --------------------------------------------------------------------------------

    def sum_of_ranks(self, versions: Sequence[int]) -> int:
        """Of the largest rank of each: what they need of a step's rank bucket."""
        return int(self._largest_rank[self._rows(versions)].sum())

    def num_pages(self, versions: Sequence[int]) -> int:
        """That they take in all."""
        return int(self._num_pages[self._rows(versions)].sum())

    def pack(
        self,
        versions: Sequence[int],
        adapter_index: np.ndarray,
        *,
        rank_bucket: int,
        most_adapters: int,
    ) -> StepLora:
        """What a step is told of its adapters.

        Args:
            versions: of the step, the base's first.
            adapter_index: i32[T], of each token: where its version is among them.
            rank_bucket: at least their ``sum_of_ranks``.
            most_adapters: that a step can have.
        """
        num_rows, num_pages = lora_bucket_sizes(rank_bucket, self._partition)
        rows = np.zeros(min(num_rows, most_adapters + 1), np.int32)  # past the last, the base's
        rows[: len(versions)] = self._rows(versions)
        pages = b"".join([self._pages[row] for row in rows.tolist()])
        ends = np.cumsum(self._num_pages[rows], dtype=np.int32)
        segments = self._segments.take(rows, axis=2)
        scaling = self._scaling.take(rows, axis=1)
        last = len(segments) - 1  # of several stages it alone scales
        return StepLora(
            stages=tuple(
                LoraBatch(
                    adapter_index=adapter_index,
                    pages=np.frombuffer(pages.ljust(4 * num_pages, b"\0"), np.int32),
                    page_start=ends - self._num_pages[rows],
                    rank=rank,
                    a_row=a_row,
                    b_row=b_row,
                    scaling=scaling if stage == last else np.ones_like(scaling),
                    rank_bucket=rank_bucket,
                )
                for stage, (rank, a_row, b_row) in enumerate(segments)
            ),
            groups=self.groups,
        )

    def _rows(self, versions: Sequence[int]) -> list[int]:
        return [self._row[version] for version in versions]
