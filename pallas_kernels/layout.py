"""How KV and adapters lie in the pages of the pool: plain arithmetic over rows of 128 lanes.

Owns the contract that the packer, the page tables and every kernel share (README.md beside this
file draws it). Knows NumPy only: no jax, no device, no allocator, no names of adapters.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

LANES = 128
RANK_MULTIPLE = 8
MAX_RANK = 256
SEGMENT_ROWS = 32
TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
GROUPS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
"""Targets that read the same input, in the order of ``TARGETS``."""

LayerAdapter = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""One layer of one adapter: target → (a [r, in], b [out, r]), as PEFT stores them."""


def blocks(features: int) -> int:
    """Number of 128-lane blocks that ``features`` columns take."""
    return -(-features // LANES)


def stored_rank(rank: int) -> int:
    """``rank`` rounded up to what pages hold: a multiple of 8; 0 stays 0."""
    if not 0 <= rank <= MAX_RANK:
        raise ValueError(f"rank {rank} is outside 0..{MAX_RANK}")
    return -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE


@dataclasses.dataclass(frozen=True)
class KVLayout:
    """One page of KV: ``page_size`` tokens of every KV head of one layer.

    head_dim up to 64: the page's rows are ``[token, head]``, K in lanes 0:64 and V in 64:128 of one
    row. head_dim up to 128: ``[K or V, token, head]``. Lanes past head_dim are zeros.
    """

    num_kv_heads: int
    head_dim: int
    page_size: int
    """Tokens a page."""

    def __post_init__(self) -> None:
        if self.num_kv_heads < 1 or self.page_size < 1:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} and page_size={self.page_size} must be positive"
            )
        if self.rows_per_page % SEGMENT_ROWS:
            step = _page_size_step(self.rows_per_token)
            raise ValueError(
                f"page_size={self.page_size} gives {self.rows_per_page} rows a page, which must be "
                f"a multiple of {SEGMENT_ROWS}: with {self.num_kv_heads} KV heads of "
                f"{self.head_dim} a page size must be a multiple of {step}, such as "
                f"{', '.join(str(step * k) for k in (1, 2, 4))}"
            )

    @property
    def padded_head_dim(self) -> int:
        """64 or 128."""
        return _padded_head_dim(self.head_dim)

    @property
    def rows_per_token(self) -> int:
        """Rows that one token's K and V take in one layer."""
        return self.num_kv_heads * 2 * self.padded_head_dim // LANES

    @property
    def rows_per_page(self) -> int:
        """R: rows of 128 in one page of one layer."""
        return self.page_size * self.rows_per_token


def _padded_head_dim(head_dim: int) -> int:
    if not 1 <= head_dim <= LANES:
        raise ValueError(f"head_dim={head_dim} is not supported: it must be 1 to {LANES}")
    return 64 if head_dim <= 64 else LANES


def _page_size_step(rows_per_token: int) -> int:
    """Page sizes must be multiples of this for pages to be whole segments."""
    return SEGMENT_ROWS // math.gcd(SEGMENT_ROWS, rows_per_token)


def choose_page_size(num_kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Tokens a page: the most of 16, 32, 64 whose page stays within 128 KiB a layer.

    A page of 64 tokens under 64 KiB (tiny models) becomes one of 128; where even the smallest is
    over 128 KiB (many heads) that one is taken. Llama-3-8B in bf16: 32. Llama-7B: 16.
    """
    rows_per_token = num_kv_heads * 2 * _padded_head_dim(head_dim) // LANES
    page_bytes = {
        size: size * rows_per_token * LANES * itemsize
        for size in (16, 32, 64, 128)
        if size % _page_size_step(rows_per_token) == 0
    }
    if page_bytes[64] < 64 * 1024:
        return 128
    fitting = [size for size in page_bytes if size <= 64 and page_bytes[size] <= 128 * 1024]
    return max(fitting) if fitting else min(page_bytes)


@dataclasses.dataclass(frozen=True)
class AdapterLayout:
    """One adapter in its pages: for each target A, then Bᵀ, as rows of 128 lanes.

    A of rank r over C inputs is rows ``j * r + rank``, with j the 128-column block; Bᵀ over its
    outputs likewise. Targets follow one another in the order of ``TARGETS``, each segment (one A or
    one Bᵀ) starting at a multiple of 32 rows. Rows and lanes in between are zeros.
    """

    in_features: tuple[int, ...]
    """Inputs of each of the seven targets."""

    out_features: tuple[int, ...]
    """Outputs of each of the seven targets."""

    rows_per_page: int
    """R, as the KV pages have it."""

    def __post_init__(self) -> None:
        for name in ("in_features", "out_features"):
            if len(getattr(self, name)) != len(TARGETS):
                raise ValueError(f"{name} must have one entry for each of {', '.join(TARGETS)}")
        if self.rows_per_page < 1 or self.rows_per_page % SEGMENT_ROWS:
            raise ValueError(
                f"rows_per_page={self.rows_per_page} must be a multiple of {SEGMENT_ROWS}"
            )

    @property
    def in_blocks(self) -> tuple[int, ...]:
        """128-column blocks of each target's input."""
        return tuple(blocks(features) for features in self.in_features)

    @property
    def out_blocks(self) -> tuple[int, ...]:
        """128-column blocks of each target's output."""
        return tuple(blocks(features) for features in self.out_features)

    def segments(self, ranks: Sequence[int]) -> tuple[np.ndarray, np.ndarray, int]:
        """Where each target's A and Bᵀ start: (a_row i32[7], b_row i32[7], rows in all).

        ``ranks`` are the adapter's own, true or stored; a target of rank 0 takes no rows.
        """
        if len(ranks) != len(TARGETS):
            raise ValueError(f"ranks {tuple(ranks)} must have one entry a target: {TARGETS}")
        a_row, b_row = np.zeros(len(TARGETS), np.int32), np.zeros(len(TARGETS), np.int32)
        row = 0
        for target, rank in enumerate(ranks):
            stored = stored_rank(int(rank))
            a_row[target] = row
            row += _align(self.in_blocks[target] * stored)
            b_row[target] = row
            row += _align(self.out_blocks[target] * stored)
        return a_row, b_row, row

    def num_pages(self, ranks: Sequence[int]) -> int:
        """Pages that an adapter of these ranks takes (in every layer, the same ids)."""
        return -(-self.segments(ranks)[2] // self.rows_per_page)

    def pack(
        self,
        layers: Sequence[LayerAdapter] | Mapping[int, LayerAdapter],
        num_layers: int,
        ranks: Sequence[int],
        dtype: Any,
    ) -> np.ndarray:
        """One adapter in page form: [num_layers, num_pages, R, 128], ready to be copied as it is.

        ``layers`` may be a mapping that lacks layers, and a layer may lack targets: zeros. An r
        below the stored rank is padded with zeros. A finite value that ``dtype`` cannot hold is a
        ValueError that names it.
        """
        dtype = np.dtype(dtype)
        a_row, b_row, _ = self.segments(ranks)
        num_pages = self.num_pages(ranks)
        rows = np.zeros((num_layers, num_pages * self.rows_per_page, LANES), dtype)
        given = layers if isinstance(layers, Mapping) else dict(enumerate(layers))
        for layer, targets in given.items():
            if not 0 <= layer < num_layers:
                raise ValueError(f"layer {layer} of an adapter of a model of {num_layers} layers")
            for name, (a, b) in targets.items():
                target = TARGETS.index(name)
                rank, stored = a.shape[0], stored_rank(int(ranks[target]))
                wanted = (self.in_features[target], self.out_features[target])
                if (a.shape[1:], b.shape) != (wanted[:1], (wanted[1], rank)) or rank > stored:
                    raise ValueError(
                        f"layer {layer}, {name}: A {a.shape} and B {b.shape} do not fit inputs and "
                        f"outputs {wanted} at rank {ranks[target]}"
                    )
                _check_range(a, dtype, f"layer {layer}, {name}, A")
                _check_range(b, dtype, f"layer {layer}, {name}, B")
                _write(rows[layer, a_row[target] :], a, stored)
                _write(rows[layer, b_row[target] :], b.T, stored)
        return rows.reshape(num_layers, num_pages, self.rows_per_page, LANES)

    def unpack(
        self, pages: np.ndarray, ranks: Sequence[int]
    ) -> list[dict[str, tuple[np.ndarray, np.ndarray]]]:
        """The inverse of ``pack`` at the stored ranks, for tests; targets of rank 0 are left
        out."""
        a_row, b_row, _ = self.segments(ranks)
        layers = []
        for rows in pages.reshape(pages.shape[0], -1, LANES):
            targets = {}
            for index, name in enumerate(TARGETS):
                stored = stored_rank(int(ranks[index]))
                if stored:
                    a = _read(rows[a_row[index] :], stored, self.in_features[index])
                    b = _read(rows[b_row[index] :], stored, self.out_features[index])
                    targets[name] = (a, b.T)
            layers.append(targets)
        return layers


def _align(rows: int) -> int:
    return -(-rows // SEGMENT_ROWS) * SEGMENT_ROWS


def _write(rows: np.ndarray, matrix: np.ndarray, stored: int) -> None:
    """``matrix`` [r, C] into the leading rows of a segment of rank ``stored``."""
    rank, columns = matrix.shape
    segment = rows[: blocks(columns) * stored].reshape(-1, stored, LANES)
    whole = columns // LANES
    segment[:whole, :rank] = (
        matrix[:, : whole * LANES].reshape(rank, whole, LANES).transpose(1, 0, 2)
    )
    if columns % LANES:
        segment[whole, :rank, : columns % LANES] = matrix[:, whole * LANES :]


def _read(rows: np.ndarray, stored: int, columns: int) -> np.ndarray:
    """The matrix [stored, columns] that lies in the leading rows."""
    segment = rows[: blocks(columns) * stored].reshape(-1, stored, LANES)
    return segment.transpose(1, 0, 2).reshape(stored, -1)[:, :columns]


def _check_range(matrix: np.ndarray, dtype: np.dtype, where: str) -> None:
    """Raise ValueError for the first finite value that becomes infinite in ``dtype``."""
    limit = float(ml_dtypes.finfo(dtype).max)
    if not matrix.size or float(ml_dtypes.finfo(matrix.dtype).max) <= limit:
        return
    beyond = np.argwhere(np.isfinite(matrix) & (np.abs(matrix) > limit))
    for index in map(tuple, beyond):
        # Slightly above the limit rounds down to it, and that is no loss.
        with np.errstate(over="ignore"):
            if not np.isfinite(matrix[index].astype(dtype)):
                at = list(map(int, index))
                raise ValueError(f"{where}: {matrix[index]} at {at} is beyond {dtype} ({limit})")
