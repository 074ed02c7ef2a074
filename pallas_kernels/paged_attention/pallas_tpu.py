"""Paged attention on TPU (v5e, v6e; Pallas, Mosaic TPU). Estimated and interpreted, never run.

Decode: one program a row; blocks of pages are copied into a ring of four, across rows, so that a
short row does not wait for its own. All query heads meet all rows of K of a block in one product,
whatever head they belong to, and other heads' keys are masked: the matrix unit has time for that
while the next block comes from HBM, and K needs no rearranging. A block is a fixed number of
tokens of the layout, so a row's order of sums is its own. The last, short block is met by a
quarter of the work where that suffices.

Prefill: one program a tile; each KV head's K and V are taken out of the block by strided loads of
32-bit words that hold two rows, and meet the tile's queries of their group.

KV write: windows of whole groups of eight rows, which copies need: a token where 8 KV heads or
more are here, else read, merged and written back; in prefill a whole page. No two decode rows of a
step may write to one page, as different sequences do not. Padding writes nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.layout import LANES, KVLayout
from pallas_kernels.paged_attention.batch import AttentionBatch
from pallas_kernels.tpu import VMEM_BYTES, check_support, dot

__all__ = ["check_support", "decode", "kv_write", "paged_attention", "prepare"]

TABLE_BYTES = 768 * 1024
"""Most that a step's page table may take of a core's 1 MiB of scalar memory."""

BUFFER_BYTES = 8 * 2**20
"""VMEM for pages in flight, in ``BUFFERS`` blocks: a block is as many tokens as fit."""

BUFFERS = 4
"""Blocks in flight: short rows end before one block's latency does."""

MASKED = -1e30
"""A score that no softmax weighs; finite, so that no difference of two is NaN."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Writes:
    """Windows of tokens to write: each within one page, and no two in the same place."""

    first_row: jax.Array
    """i32[W]: row of the pool (all pages side by side) at which the window's K begins."""

    low: jax.Array
    """i32[W]: the first token of the window that is new."""

    high: jax.Array
    """i32[W]: behind the last one; ``low`` where nothing is to be written."""

    source: jax.Array
    """i32[W, tokens]: the step's token for each place of the window; any where not new."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """What all layers of a step share."""

    batch: AttentionBatch

    lengths: jax.Array
    """i32[D]: keys of each decode row, its own included; 0 on padding."""

    next_row: jax.Array
    """i32[D + 1]: the first row from here on that has keys; D if none."""

    tile_start: jax.Array
    """i32[NT]: position of each tile's first token."""

    tile_count: jax.Array
    """i32[NT]: its tokens; 0 on padding."""

    writes: tuple[Writes, ...]
    """Of the decode rows, and of the prefill tiles."""


def check_step(*, table_entries: int, **_: Any) -> None:
    """See ``dispatch.check_step``."""
    if 4 * table_entries > TABLE_BYTES:
        raise NotImplementedError(
            f"page tables of {table_entries} entries do not fit the TPU's scalar memory: larger "
            "pages (page_size), shorter requests (max_model_len) or fewer (max_num_seqs) would"
        )


def prepare(batch: AttentionBatch, layout: KVLayout, num_heads: int) -> Plan:
    """See ``api.prepare``."""
    check_step(table_entries=batch.page_table.size)
    num_decode = batch.num_decode
    lengths = batch.positions[:num_decode] + 1
    rows = jnp.where(lengths > 0, jnp.arange(num_decode, dtype=jnp.int32), num_decode)
    rows = jnp.append(rows, jnp.full(1, num_decode, jnp.int32))
    positions = batch.positions[num_decode:].reshape(-1, max(batch.tile, 1))
    count = jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
    start = jnp.max(positions, axis=1, initial=-1) + 1 - count
    writes = []
    if num_decode:
        writes.append(_decode_writes(batch, layout))
    if batch.page_table.shape[0] > num_decode:
        writes.append(_tile_writes(batch, layout, start, count))
    next_row = jax.lax.cummin(rows, reverse=True)
    return Plan(batch, lengths, next_row, start, count, tuple(writes))


def _decode_writes(batch: AttentionBatch, layout: KVLayout) -> Writes:
    """A window a row: as few tokens as fill whole groups of eight rows, which copies need."""
    width = 8 // math.gcd(8, layout.num_kv_heads)
    slots = batch.slots[: batch.num_decode]
    page, token = slots // layout.page_size, slots % layout.page_size
    low = token % width
    new = (batch.positions[: batch.num_decode] >= 0).astype(jnp.int32)
    first_row = page * layout.rows_per_page + (token - low) * layout.num_kv_heads
    source = jnp.arange(batch.num_decode, dtype=jnp.int32)
    return Writes(first_row, low, low + new, jnp.repeat(source[:, None], width, axis=1))


def _tile_writes(
    batch: AttentionBatch, layout: KVLayout, start: jax.Array, count: jax.Array
) -> Writes:
    """A window a page that a tile reaches. A page that two tiles of a sequence share is written by
    the later one, with the tokens of both, so that windows can be written in any order.
    """
    page_size, tile, num_decode = layout.page_size, batch.tile, batch.num_decode
    table = batch.page_table[num_decode:]
    end = start + count
    number = jnp.arange(len(start), dtype=jnp.int32)

    def page_of(tile_number: jax.Array, index: jax.Array) -> jax.Array:
        return table[tile_number, jnp.clip(index, 0, table.shape[1] - 1)]

    before = jnp.maximum(number - 1, 0)
    first_page = start // page_size
    shares = (number > 0) & (count > 0) & (count[before] == tile) & (end[before] == start)
    shares &= (start % page_size > 0) & (page_of(before, first_page) == page_of(number, first_page))
    # Where the run of sharing tiles began: K and V from there on are this step's.
    run = jax.lax.cummax(jnp.where(shares, 0, number))
    oldest = start[run]
    shared_later = jnp.append(shares[1:], jnp.zeros(1, bool))

    reach = (tile + page_size - 2) // page_size + 1
    index = first_page[:, None] + jnp.arange(reach, dtype=jnp.int32)[None, :]  # [NT, reach]
    begin = index * page_size
    low = jnp.maximum(begin, jnp.where(shares, oldest, start)[:, None])
    high = jnp.minimum(begin + page_size, end[:, None])
    later = shared_later[:, None] & (index == (end // page_size)[:, None])
    nothing = (high <= low) | later | (count == 0)[:, None]
    low, high = low - begin, jnp.where(nothing, low, high) - begin
    token = begin[:, :, None] + jnp.arange(page_size, dtype=jnp.int32)[None, None, :]
    source = num_decode + number[:, None, None] * tile + token - start[:, None, None]
    source = jnp.clip(source, 0, batch.positions.shape[0] - 1)
    first_row = page_of(number[:, None], index) * layout.rows_per_page
    return Writes(
        first_row.reshape(-1), low.reshape(-1), high.reshape(-1), source.reshape(-1, page_size)
    )


def kv_write(
    pool_layer: jax.Array, k: jax.Array, v: jax.Array, plan: Plan, *, layout: KVLayout
) -> jax.Array:
    """See ``api.kv_write``."""
    padding = ((0, 0), (0, 0), (0, layout.padded_head_dim - layout.head_dim))
    k, v = (jnp.pad(part, padding).astype(pool_layer.dtype) for part in (k, v))
    parts = [jnp.concatenate([k, v], axis=2)] if layout.padded_head_dim == 64 else [k, v]
    for writes in plan.writes:
        windows = [part[writes.source] for part in parts]  # each [W, tokens, Hkv, 128]
        new = jnp.stack([w.reshape(len(w), -1, LANES) for w in windows], axis=1)
        pool_layer = _write(pool_layer, new, writes, layout=layout)
    return pool_layer


def _write_kernel(
    first_row: Any,  # SMEM i32[W], as the next two
    low: Any,
    high: Any,
    new: Any,  # [U, parts, rows, 128]
    old_pool: Any,
    pool: Any,  # HBM [P * R, 128], the same memory
    buffers: Any,  # [2, U, parts, rows, 128]
    read: Any,
    written: Any,
    *,
    num_windows: int,
    num_kv_heads: int,
    part_rows: int,
) -> None:
    del old_pool
    step, last = pl.program_id(0), pl.num_programs(0) - 1
    _, parallel, parts, rows, _ = buffers.shape

    def for_windows(step: Any, act: Any) -> None:
        @pl.loop(0, jnp.minimum(num_windows - step * parallel, parallel))
        def _(u: Any) -> None:
            window = step * parallel + u
            pl.when(high[window] > low[window])(lambda: act(u, window))

    def copies(step: Any, u: Any, window: Any, semaphore: Any, out: bool) -> list[Any]:
        slot = jax.lax.rem(step, 2)
        result = []
        for part in range(parts):
            row = pl.multiple_of(first_row[window] + part * part_rows, 8)
            here, there = buffers.at[slot, u, part], pool.at[pl.ds(row, rows)]
            source, target = (here, there) if out else (there, here)
            result.append(pltpu.make_async_copy(source, target, semaphore.at[slot]))
        return result

    def partly(window: Any) -> Any:
        return (high[window] - low[window]) * num_kv_heads < rows

    def for_reads(step: Any, act: Any) -> None:
        def of_window(u: Any, window: Any) -> None:
            @pl.when(partly(window))
            def _() -> None:
                for copy in copies(step, u, window, read, False):
                    act(copy)

        for_windows(step, of_window)

    def for_writes(step: Any, act: Any) -> None:
        def of_window(u: Any, window: Any) -> None:
            for copy in copies(step, u, window, written, True):
                act(copy)

        for_windows(step, of_window)

    if rows > num_kv_heads:  # else every window is one token
        pl.when(step == 0)(lambda: for_reads(step, lambda copy: copy.start()))
    pl.when(step > 0)(lambda: for_writes(step - 1, lambda copy: copy.wait()))
    if rows > num_kv_heads:
        pl.when(step < last)(lambda: for_reads(step + 1, lambda copy: copy.start()))
        for_reads(step, lambda copy: copy.wait())

    def merge(u: Any, window: Any) -> None:
        slot = jax.lax.rem(step, 2)
        row = jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 0)
        fresh = (row >= low[window] * num_kv_heads) & (row < high[window] * num_kv_heads)
        for part in range(parts):
            # float32: v5e selects no 16-bit values.
            kept = buffers[slot, u, part].astype(jnp.float32)
            value = jnp.where(fresh, new[u, part].astype(jnp.float32), kept)
            buffers[slot, u, part] = value.astype(buffers.dtype)

    for_windows(step, merge)
    for_writes(step, lambda copy: copy.start())
    pl.when(step == last)(lambda: for_writes(step, lambda copy: copy.wait()))


def _write(pool: jax.Array, new: jax.Array, writes: Writes, *, layout: KVLayout) -> jax.Array:
    """``pool`` with the windows ``new`` [W, parts, rows, 128] in it."""
    num_windows, parts, rows, _ = new.shape
    parallel = min(num_windows, max(1, 2048 // (parts * rows)))
    kernel = functools.partial(
        _write_kernel,
        num_windows=num_windows,
        num_kv_heads=layout.num_kv_heads,
        part_rows=layout.rows_per_page // parts,
    )
    out = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((pool.shape[0] * pool.shape[1], LANES), pool.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(pl.cdiv(num_windows, parallel),),
            in_specs=[
                pl.BlockSpec((parallel, parts, rows, LANES), lambda step, *_: (step, 0, 0, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                pltpu.VMEM((2, parallel, parts, rows, LANES), pool.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        input_output_aliases={4: 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), disable_bounds_checks=True
        ),
        name="kv_write",
    )(writes.first_row, writes.low, writes.high, new, pool.reshape(-1, LANES))
    return out.reshape(pool.shape)


def paged_attention(
    q: jax.Array, pool_layer: jax.Array, plan: Plan, *, layout: KVLayout, scale: float
) -> jax.Array:
    """See ``api.paged_attention``."""
    batch, head_dim = plan.batch, q.shape[2]
    num_decode = batch.num_decode
    rows = jnp.pad(q, ((0, 0), (0, 0), (0, LANES - head_dim)))  # zeros meet V behind K
    parts = []
    if num_decode:
        table = batch.page_table[:num_decode]
        attend = functools.partial(decode, layout=layout, scale=scale)
        parts.append(attend(rows[:num_decode], pool_layer, plan.lengths, plan.next_row, table))
    if len(q) > num_decode:
        table = batch.page_table[num_decode:]
        start, count = plan.tile_start, plan.tile_count
        attend = functools.partial(_prefill, layout=layout, scale=scale)
        parts.append(attend(rows[num_decode:], pool_layer, start, count, table))
    first = LANES - layout.padded_head_dim  # 64 where V lies behind K
    return jnp.concatenate(parts)[:, :, first : first + head_dim]


def _prefill_kernel(
    start: Any,  # SMEM i32[NT]
    count: Any,  # SMEM i32[NT]
    table: Any,  # SMEM i32[NT * NP]
    q_ref: Any,  # [1, Hkv, tile * G, 128], rows (token, head of the group)
    pool: Any,  # HBM [P, R, 128]
    o_ref: Any,  # as q_ref
    buffers: Any,  # [2, pages, R, 128]
    words: Any,  # u32[2 (K, V), rows of K in a block / 2, 128]
    largest: Any,  # f32[Hkv, tile * G, 1], as the next; the softmax so far
    total: Any,
    acc: Any,  # f32[Hkv, tile * G, 128]
    arrived: Any,
    *,
    layout: KVLayout,
    scale: float,
    table_width: int,
    group: int,
) -> None:
    tile = pl.program_id(0)
    block_pages = buffers.shape[1]
    page_size, num_kv_heads = layout.page_size, layout.num_kv_heads
    block_tokens = block_pages * page_size
    part = page_size * num_kv_heads  # rows of K, or of V, in a page
    first_v = layout.rows_per_page - part
    one_part = layout.padded_head_dim == 64
    end = start[tile] + count[tile]
    num_blocks = jnp.where(count[tile] > 0, pl.cdiv(end, block_tokens), 0)

    def for_pages(block: Any, act: Any) -> None:
        slot = jax.lax.rem(block, 2)
        first = block * block_pages

        @pl.loop(0, jnp.minimum(pl.cdiv(end, page_size) - first, block_pages))
        def _(page: Any) -> None:
            source = pool.at[table[tile * table_width + first + page]]
            act(pltpu.make_async_copy(source, buffers.at[slot, page], arrived.at[slot]))

    def hide_tail(slot: Any, left: Any) -> None:
        """Zero V of tokens past the last query: no weight of zero stops a NaN."""

        @pl.loop(jax.lax.div(left, page_size), block_pages)
        def _(page: Any) -> None:
            v = buffers[slot, page, first_v:, :].astype(jnp.float32)
            keep = jax.lax.broadcasted_iota(jnp.int32, v.shape, 0) < (
                (left - page * page_size) * num_kv_heads
            )
            buffers[slot, page, first_v:, :] = jnp.where(keep, v, 0.0).astype(buffers.dtype)

    def head_rows(which: int, head: int) -> jax.Array:
        """[block_tokens, 128] of one head. A word holds two rows; rows of even tokens of a head
        are ``num_kv_heads`` words apart, and so are those of odd ones.
        """
        halves = []
        for odd in (0, 1):
            row = odd * num_kv_heads + head
            word = words[which, pl.ds(row // 2, block_tokens // 2, num_kv_heads), :]
            halves.append((word >> 16 * (row % 2)) & jnp.uint32(0xFFFF))
        return pltpu.bitcast(halves[0] | (halves[1] << 16), buffers.dtype)

    largest[...] = jnp.full(largest.shape, MASKED, jnp.float32)
    total[...] = jnp.zeros(total.shape, jnp.float32)
    acc[...] = jnp.zeros(acc.shape, jnp.float32)
    pl.when(num_blocks > 0)(lambda: for_pages(0, lambda copy: copy.start()))
    shape = (q_ref.shape[2], block_tokens)
    token = jax.lax.broadcasted_iota(jnp.int32, shape, 0) // group
    ahead = jax.lax.broadcasted_iota(jnp.int32, shape, 1) - token

    def step(block: Any, _: Any) -> Any:
        slot = jax.lax.rem(block, 2)
        pl.when(block + 1 < num_blocks)(lambda: for_pages(block + 1, lambda copy: copy.start()))
        for_pages(block, lambda copy: copy.wait())
        left = end - block * block_tokens
        pl.when(left < block_tokens)(lambda: hide_tail(slot, left))
        flat = (block_pages * part, LANES)
        if num_kv_heads > 1:
            words[0] = pltpu.bitcast(buffers[slot, :, :part, :].reshape(flat), jnp.uint32)
            if not one_part:
                words[1] = pltpu.bitcast(buffers[slot, :, first_v:, :].reshape(flat), jnp.uint32)
        seen = ahead <= start[tile] - block * block_tokens
        for head in range(num_kv_heads):
            if num_kv_heads > 1:
                k = head_rows(0, head)
                v = k if one_part else head_rows(1, head)
            else:
                k = buffers[slot, :, :part, :].reshape(flat)
                v = buffers[slot, :, first_v:, :].reshape(flat)
            scores = dot(q_ref[0, head], k, transposed=True) * scale
            scores = jnp.where(seen, scores, MASKED)
            new = jnp.maximum(largest[head], jnp.max(scores, axis=1, keepdims=True))
            weights = jnp.exp(scores - new)
            fade = jnp.exp(largest[head] - new)
            largest[head] = new
            total[head] = total[head] * fade + jnp.sum(weights, axis=1, keepdims=True)
            acc[head] = acc[head] * fade + dot(weights.astype(v.dtype), v)
        return 0

    jax.lax.fori_loop(0, num_blocks, step, 0)
    queries = jax.lax.broadcasted_iota(jnp.int32, (q_ref.shape[2], 1), 0)
    real = queries < count[tile] * group
    for head in range(num_kv_heads):
        o_ref[0, head] = jnp.where(real, acc[head] / total[head], 0.0).astype(o_ref.dtype)


def _prefill(
    q: jax.Array,
    pool: jax.Array,
    start: jax.Array,
    count: jax.Array,
    table: jax.Array,
    *,
    layout: KVLayout,
    scale: float,
) -> jax.Array:
    num_tiles, table_width = table.shape
    num_heads, num_kv_heads = q.shape[1], layout.num_kv_heads
    group, tile = num_heads // num_kv_heads, len(q) // num_tiles
    q = q.reshape(num_tiles, tile, num_kv_heads, group, LANES).swapaxes(1, 2)
    q = q.reshape(num_tiles, num_kv_heads, tile * group, LANES)
    block_pages = min(max(1, 512 // layout.page_size), _block_pages(layout, pool.dtype.itemsize))
    rows = block_pages * layout.page_size * num_kv_heads
    spec = pl.BlockSpec((1, *q.shape[1:]), lambda tile, *_: (tile, 0, 0, 0))
    out = pl.pallas_call(
        functools.partial(
            _prefill_kernel, layout=layout, scale=scale, table_width=table_width, group=group
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(num_tiles,),
            in_specs=[spec, pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=spec,
            scratch_shapes=[
                pltpu.VMEM((2, block_pages, layout.rows_per_page, LANES), pool.dtype),
                pltpu.VMEM((2, rows // 2, LANES), jnp.uint32),
                pltpu.VMEM((*q.shape[1:3], 1), jnp.float32),
                pltpu.VMEM((*q.shape[1:3], 1), jnp.float32),
                pltpu.VMEM(q.shape[1:], jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=VMEM_BYTES,
            disable_bounds_checks=True,
        ),
        name="paged_attention_prefill",
    )(start, count, table.reshape(-1), q, pool)
    out = out.reshape(num_tiles, num_kv_heads, tile, group, LANES).swapaxes(1, 2)
    return out.reshape(-1, num_heads, LANES)


def _block_pages(layout: KVLayout, itemsize: int) -> int:
    """Pages a block of keys: of the layout alone, so that a row's order of sums is its own."""
    page_bytes = layout.rows_per_page * LANES * itemsize
    most = max(1, 1024 // layout.page_size)
    return min(most, max(1, BUFFER_BYTES // BUFFERS // page_bytes))


def block_tokens(layout: KVLayout, itemsize: int) -> int:
    """Tokens a block of keys."""
    return _block_pages(layout, itemsize) * layout.page_size


def _decode_kernel(
    lengths: Any,  # SMEM i32[D]
    next_row: Any,  # SMEM i32[D + 1]
    table: Any,  # SMEM i32[D * NP]
    q_ref: Any,  # [1, Hq, 128]
    other_head: Any,  # f32[Hq, rows of K in a block]
    pool: Any,  # HBM [P, R, 128]
    o_ref: Any,  # [1, Hq, 128]
    buffers: Any,  # [BUFFERS, pages, R, 128]
    arrived: Any,
    cursor: Any,  # SMEM i32[4]
    *,
    layout: KVLayout,
    scale: float,
    table_width: int,
    context: int | None,
) -> None:
    row, num_rows = pl.program_id(0), pl.num_programs(0)
    num_buffers, block_pages = buffers.shape[:2]
    page_size, num_kv_heads = layout.page_size, layout.num_kv_heads
    block_tokens = block_pages * page_size
    part = page_size * num_kv_heads  # rows of K, or of V, in a page
    first_v = layout.rows_per_page - part

    def length_of(row):
        return lengths[row] if context is None else context

    def pages_in(row, block):
        left = length_of(row) - block * block_tokens
        return jnp.minimum(pl.cdiv(left, page_size), block_pages)

    def copy(index, slot, page):
        return pltpu.make_async_copy(
            pool.at[table[index]], buffers.at[slot, page], arrived.at[slot]
        )

    def fetch():
        """Start the copies of the block at the cursor, and move it on to the next."""
        at, block, slot = cursor[0], cursor[1], cursor[2]

        @pl.when(at < num_rows)
        def _():
            first = at * table_width + block * block_pages

            @pl.loop(0, block_pages if context else pages_in(at, block))
            def _(page):
                copy(first + page, slot, page).start()

            more = (block + 1) * block_tokens < length_of(at)
            cursor[0] = jnp.where(more, at, next_row[at + 1] if context is None else at + 1)
            cursor[1] = jnp.where(more, block + 1, 0)
            cursor[2] = jax.lax.rem(slot + 1, num_buffers)

    @pl.when(row == 0)
    def _():
        cursor[0] = next_row[0] if context is None else 0
        for index in (1, 2, 3):
            cursor[index] = 0
        for _ in range(num_buffers - 1):
            fetch()

    length = length_of(row)
    q = q_ref[0]

    def hide_tail(slot, pages, left):
        """Zero V of tokens past the row's end: no weight of zero stops a NaN."""
        page = pages - 1
        inside = (left - page * page_size) * num_kv_heads
        v = buffers[slot, page, first_v:, :].astype(jnp.float32)
        keep = jax.lax.broadcasted_iota(jnp.int32, v.shape, 0) < inside
        buffers[slot, page, first_v:, :] = jnp.where(keep, v, 0.0).astype(buffers.dtype)

        @pl.loop(pages, block_pages)
        def _(page):
            buffers[slot, page, first_v:, :] = jnp.zeros((part, LANES), buffers.dtype)

    def attend(slot, num_pages, left, carry):
        """One step of the running softmax over the first ``num_pages`` of a block."""
        largest, total, acc = carry
        k = buffers[slot, :num_pages, :part, :].reshape(num_pages * part, LANES)
        v = buffers[slot, :num_pages, first_v:, :].reshape(num_pages * part, LANES)
        scores = dot(q, k, transposed=True) * scale + other_head[:, : num_pages * part]
        lane = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        scores = jnp.where(lane < left * num_kv_heads, scores, MASKED)
        new = jnp.maximum(largest, jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp(scores - new)
        fade = jnp.exp(largest - new)
        total = total * fade + jnp.sum(weights, axis=1, keepdims=True)
        return new, total, acc * fade + dot(weights.astype(v.dtype), v)

    few = max(1, block_pages // 4)  # a row of few tokens, or the end of one, is not worth a block

    def step(block, carry):
        fetch()
        slot = cursor[3]
        cursor[3] = jax.lax.rem(slot + 1, num_buffers)
        left = length - block * block_tokens
        if context is not None:
            every = pool.at[pl.ds(0, block_pages)]
            pltpu.make_async_copy(every, buffers.at[slot], arrived.at[slot]).wait()
            return attend(slot, block_pages, left, carry)
        pages = pages_in(row, block)

        @pl.loop(0, pages)
        def _(page):
            copy(0, slot, page).wait()

        @pl.when(left < block_tokens)
        def _():
            hide_tail(slot, pages, left)

        return jax.lax.cond(
            pages <= few,
            lambda carry: attend(slot, few, left, carry),
            lambda carry: attend(slot, block_pages, left, carry),
            carry,
        )

    heads = q.shape[0]
    start = jnp.full((heads, 1), MASKED, jnp.float32)
    zeros = jnp.zeros((heads, 1), jnp.float32)
    acc = jnp.zeros((heads, LANES), jnp.float32)
    num_blocks = pl.cdiv(length, block_tokens)
    _, total, acc = jax.lax.fori_loop(0, num_blocks, step, (start, zeros, acc))
    o_ref[0] = (acc / jnp.where(total > 0, total, 1.0)).astype(o_ref.dtype)


def decode(
    q: jax.Array,
    pool: jax.Array,
    lengths: jax.Array,
    next_row: jax.Array,
    table: jax.Array,
    *,
    layout: KVLayout,
    scale: float,
    context: int | None = None,
) -> jax.Array:
    """Decode rows ``q`` [D, Hq, 128] against the pages of ``table`` [D, NP].

    ``context``: every row's length where it is known, as only an estimate knows it; whole blocks.
    """
    rows, heads, _ = q.shape
    block_pages = _block_pages(layout, pool.dtype.itemsize)
    part = layout.page_size * layout.num_kv_heads
    head_of_lane = jnp.arange(block_pages * part, dtype=jnp.int32) % layout.num_kv_heads
    own = jnp.arange(heads, dtype=jnp.int32) // (heads // layout.num_kv_heads)
    other_head = jnp.where(own[:, None] == head_of_lane[None, :], 0.0, MASKED)
    spec = pl.BlockSpec((1, heads, LANES), lambda row, *_: (row, 0, 0))
    kernel = functools.partial(
        _decode_kernel, layout=layout, scale=scale, table_width=table.shape[1], context=context
    )
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(rows,),
            in_specs=[
                spec,
                pl.BlockSpec(memory_space=pltpu.VMEM),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=spec,
            scratch_shapes=[
                pltpu.VMEM((BUFFERS, block_pages, layout.rows_per_page, LANES), pool.dtype),
                pltpu.SemaphoreType.DMA((BUFFERS,)),
                pltpu.SMEM((4,), jnp.int32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=VMEM_BYTES,
            disable_bounds_checks=True,
        ),
        name="paged_attention_decode",
    )(lengths, next_row, table.reshape(-1), q, other_head.astype(jnp.float32), pool)
