"""Random steps of paged attention: histories scattered over pages, NaN wherever nothing was
written."""

import dataclasses

import numpy as np

from pallas_kernels.layout import LANES, KVLayout
from pallas_kernels.paged_attention.batch import AttentionBatch


@dataclasses.dataclass
class Case:
    """One step: arrays for the api, and what it takes to compute the answer densely."""

    layout: KVLayout
    pool: np.ndarray  # [P, R, 128], K and V of the step's own tokens still unwritten
    batch: AttentionBatch
    q: np.ndarray
    k: np.ndarray  # [T, Hkv, Dh]: of the step's own tokens
    v: np.ndarray
    histories: list  # per page table row (k, v), each [length, Hkv, Dh], its own tokens included
    scale: float

    def expected(self):
        """The definition, dense, in float64."""
        out = np.zeros(self.q.shape)
        num_decode, tile = self.batch.num_decode, self.batch.tile
        group = self.q.shape[1] // self.layout.num_kv_heads
        for token, position in enumerate(self.batch.positions):
            if position < 0:
                continue
            row = token if token < num_decode else num_decode + (token - num_decode) // tile
            k, v = (h[: position + 1].astype(np.float64) for h in self.histories[row])
            for head in range(self.q.shape[1]):
                scores = self.scale * (k[:, head // group] @ self.q[token, head].astype(np.float64))
                weights = np.exp(scores - scores.max())
                out[token, head] = weights / weights.sum() @ v[:, head // group]
        return out


def make_case(
    rng,
    *,
    decode,
    prefill,
    tile=8,
    heads=(6, 2),
    head_dim=64,
    page_size=32,
    max_pages=None,
    dtype="float32",
    pad_decode=0,
    pad_tiles=0,
):
    """``decode``: context lengths, the new token included; ``prefill``: (start, tokens) of each
    chunk.

    Each sequence gets shuffled pages of its own; a chunk takes as many tiles as it needs, all with
    the sequence's page table row. ``pad_decode`` and ``pad_tiles`` rows are padding.
    """
    num_heads, num_kv_heads = heads
    layout = KVLayout(num_kv_heads, head_dim, page_size)
    chunks = [(length - 1, 1) for length in decode] + list(prefill)
    lengths = [start + count for start, count in chunks]
    pages_of = [-(-length // page_size) for length in lengths]
    width = max_pages or max([*pages_of, 1])
    num_pages = sum(pages_of) + 3
    free = list(rng.permutation(np.arange(1, num_pages)))
    pool = np.full((num_pages, layout.rows_per_page, LANES), np.nan, np.float64)
    slots, positions, tables, histories, new = [], [], [], [], []

    def emit(sequence, first, count, padded):
        table, history = sequence
        place = np.arange(first, first + count)
        slots.extend(table[place // page_size] * page_size + place % page_size)
        # Padding writes to the null page, wherever in it.
        slots.extend(rng.integers(0, page_size, padded - count))
        positions.extend([*place, *[-1] * (padded - count)])
        tables.append(table)
        histories.append(history)
        new.extend([(history[0][p], history[1][p]) for p in place])
        new.extend([(np.full((num_kv_heads, head_dim), np.nan),) * 2] * (padded - count))

    nobody = (np.zeros(width, np.int64), (np.zeros((0, num_kv_heads, head_dim)),) * 2)
    for number, (start, count) in enumerate(chunks):
        if number == len(decode):
            for _ in range(pad_decode):
                emit(nobody, 0, 0, 1)
        length, used = lengths[number], pages_of[number]
        table = np.zeros(width, np.int64)
        table[:used] = [free.pop() for _ in range(used)]
        history = tuple(rng.standard_normal((2, length, num_kv_heads, head_dim)).astype(dtype))
        _write(pool, layout, table, history, start)
        if number < len(decode):
            emit((table, history), start, 1, 1)
        else:
            for first in range(start, start + count, tile):
                emit((table, history), first, min(tile, start + count - first), tile)
    if len(chunks) == len(decode):
        for _ in range(pad_decode):
            emit(nobody, 0, 0, 1)
    for _ in range(pad_tiles):
        emit(nobody, 0, 0, tile)

    batch = AttentionBatch(
        slots=np.array(slots, np.int32),
        positions=np.array(positions, np.int32),
        page_table=np.array(tables, np.int32).reshape(-1, width),
        num_decode=len(decode) + pad_decode,
        tile=tile,
    )
    q = rng.standard_normal((len(positions), num_heads, head_dim))
    q[np.array(positions) < 0] = np.nan
    k, v = (np.stack([pair[i] for pair in new]).astype(dtype) for i in (0, 1))
    return Case(
        layout,
        pool.astype(dtype),
        batch,
        q.astype(dtype),
        k,
        v,
        histories,
        scale=head_dim**-0.5,
    )


def _write(pool, layout, table, history, count):
    """The first ``count`` tokens of a history into its pages, one by one, by the layout's words."""
    dim, heads = layout.head_dim, layout.num_kv_heads
    for position in range(count):
        page = pool[table[position // layout.page_size]]
        token = position % layout.page_size
        k, v = (part[position] for part in history)
        if layout.padded_head_dim == 64:
            rows = page.reshape(layout.page_size, heads, LANES)[token]
            rows[:] = 0
            rows[:, :dim], rows[:, 64 : 64 + dim] = k, v
        else:
            rows = page.reshape(2, layout.page_size, heads, LANES)[:, token]
            rows[:] = 0
            rows[0, :, :dim], rows[1, :, :dim] = k, v
