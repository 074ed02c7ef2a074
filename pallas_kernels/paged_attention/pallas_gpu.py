"""Paged attention on NVIDIA Hopper (Mosaic GPU, sm_90a): decode, prefill, and the KV write.

Decode. A page holds K of all KV heads as consecutive rows ``[token, head]``, so a sequence's keys
are one long matrix of rows, and a block of it is 64 rows of 256 contiguous bytes, whatever the page
size and the number of heads: the shape that the TMA engine reads fastest. All query heads of a row
(up to 64, the M of wgmma) meet all rows of a block in one product, and scores of a head with
another head's key are masked. That wastes nothing: one head at a time would pad its G queries to
64 as well, so that both do 64 products a row. A row's keys are cut into splits of a length that its
own length decides, each an item of work with a softmax of its own; the persistent grid shares items
out evenly by blocks, whoever they belong to, and a second kernel merges the splits of long rows.
So ragged lengths balance, and a row's bits depend on nothing but the row (and on whether the step
has room for more than 16).

Prefill. A tile is a query head and up to 128 tokens of a sequence, as in FlashAttention-3
(Shah et al., arXiv 2407.08608): a warpgroup loads 128 keys at a time page by page, two compute for
64 tokens each and take turns on the tensor cores. Blocks past the last token are not read. The
batch's tiles are units of 16 tokens, so that a short chunk pads the step's matmuls by 15 at most;
those of one chunk are joined here.

Only the last block of a sequence holds rows that were never written. They may be NaN, which a
weight of zero does not stop, so V is zeroed there in shared memory.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels.layout import LANES, AdapterLayout, KVLayout
from pallas_kernels.paged_attention.batch import AttentionBatch

# jax 0.10 lacks names that 0.11 has; check_support declines there.
plgpu: Any = mosaic_gpu

TILE = 128
"""Most tokens a program of prefill: two warpgroups of 64."""

UNIT = 16
"""Tokens that the batch's tiles are multiples of; a program takes as many in a row as belong
together."""

CTAS = 132
"""Programs of the decode grid: one on each multiprocessor of an H100 or H200."""

STREAMS = 2
"""Pairs of warpgroups of a decode program, one that loads and one that computes: each pair works
for itself. Two programs of one pair would do, if the registers of each could be limited."""

ROWS = 64
"""Rows of K, and of V, that a block of decode has; and rows of a warpgroup's matrix product."""

STAGES = 2
"""Blocks of K, and of V, that lie in shared memory at once."""

QUERIES = 2
"""Query tiles of a stream of decode that lie in shared memory at once."""

KEYS = 128
"""Keys a block of prefill."""

KEY_STAGES = 2
"""Blocks of K, and of V, that lie in shared memory at once in prefill."""

SPLIT_BYTES = 2**20
"""K and V of a split, about, in steps of many rows: less makes more partial results, more balances
worse."""

FEW_ROWS, FEW_ROWS_SPLIT_BYTES = 16, 2**18
"""Steps with room for no more rows than this have smaller splits: one program reads 1 MiB in 32 us,
and there are not rows enough to keep the others busy meanwhile."""

MAX_SPLITS = 32
"""Splits a row; longer rows have longer ones."""

MERGED = 4
"""Splits that the merge takes at once."""

MASKED = -1e30
"""A score that no softmax gives weight; finite, so that no difference of two is NaN."""

LOG2_E = math.log2(math.e)


def check_support(
    device: Any, *, dtype: Any, num_heads: int, kv: KVLayout, adapters: AdapterLayout | None
) -> None:
    """Raise NotImplementedError, with the reason, for what these kernels cannot serve."""
    if not hasattr(mosaic_gpu, "force_gpu_interpret_mode"):
        raise NotImplementedError(f"the GPU kernels need jax 0.11, this is {jax.__version__}")
    capability = getattr(device, "compute_capability", None)
    if capability is not None and not 9 <= float(capability) < 10:
        raise NotImplementedError(
            f"the attention kernels need compute capability 9 (Hopper), {device} has {capability}"
        )
    _check_shapes(jnp.dtype(dtype), num_heads, kv)


def _check_shapes(dtype: jnp.dtype, num_heads: int, kv: KVLayout) -> None:
    if dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"attention in {dtype}: tensor cores take bfloat16 and float16")
    if num_heads > ROWS:
        raise NotImplementedError(f"{num_heads} query heads a device: at most {ROWS}")
    if kv.page_size % 8:
        raise NotImplementedError(f"page_size={kv.page_size} must be a multiple of 8")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Work:
    """What all layers share. Decode rows first, then prefill tiles."""

    slots: jax.Array
    """i32[T], as in the batch."""

    pages: jax.Array
    """i32[(D + NT) * NP]: the page table, flat."""

    rows: jax.Array
    """i32[D, 4]: keys seen (0 on padding), blocks a split, splits, number of the first split."""

    streams: jax.Array
    """i32[CTAS * STREAMS, 3]: the row and split where each begins, and its number of splits."""

    tiles: jax.Array
    """i32[.., 4]: up to TILE tokens each: the number of the first unit, the position of its first
    token, the keys they see, the number of units (0: nothing to do); most keys first."""

    num_pages: int = dataclasses.field(metadata={"static": True})
    """NP: pages a row of the page table."""

    tile: int = dataclasses.field(metadata={"static": True})
    """Tokens that share a row of the page table."""

    max_splits: int = dataclasses.field(metadata={"static": True})
    """Splits of a row as long as the page table is wide."""


def check_step(*, tile: int, **_: Any) -> None:
    """See ``dispatch.check_step``."""
    if tile % UNIT:
        raise NotImplementedError(f"prefill tiles of {tile} tokens: give a multiple of {UNIT}")


def prepare(batch: AttentionBatch, layout: KVLayout, num_heads: int) -> Work:
    """See ``api.prepare``: the work lists."""
    num_decode, tile = batch.num_decode, batch.tile
    num_rows, num_pages = batch.page_table.shape
    if num_rows > num_decode:
        check_step(tile=tile)
    max_keys = num_pages * layout.page_size
    split = _split_tokens(layout, num_decode)
    rows, streams = _decode_work(
        jnp.asarray(batch.positions[:num_decode]) + 1, split, max_keys, layout.num_kv_heads
    )
    return Work(
        slots=jnp.asarray(batch.slots),
        pages=jnp.asarray(batch.page_table).reshape(-1),
        rows=rows,
        streams=streams,
        tiles=_prefill_work(batch),
        num_pages=num_pages,
        tile=tile,
        max_splits=_max_splits(split, max_keys),
    )


def _prefill_work(batch: AttentionBatch) -> jax.Array:
    """``tiles`` of ``Work``: units that follow each other in one sequence, up to TILE tokens."""
    positions = jnp.asarray(batch.positions[batch.num_decode :]).reshape(-1, UNIT)
    count = len(positions)
    if not count:
        return jnp.zeros((0, 4), jnp.int32)
    number = jnp.arange(count, dtype=jnp.int32)
    start, keys = positions[:, 0], jnp.max(positions, axis=1) + 1
    # No two sequences have a page in common, so the first one tells them apart.
    sequence = jnp.asarray(batch.page_table)[batch.num_decode + number * UNIT // batch.tile, 0]
    before = number - 1
    follows = (start == start[before] + UNIT) & (keys[before] == start)
    follows = (follows & (sequence == sequence[before])) | ((keys == 0) & (keys[before] == 0))
    run = lax.cummax(jnp.where(follows & (number > 0), 0, number))
    leads = (number - run) % (TILE // UNIT) == 0
    tile = jnp.cumsum(leads, dtype=jnp.int32) - 1
    zeros = jnp.zeros(count, jnp.int32)
    first = zeros.at[jnp.where(leads, tile, count)].set(number, mode="drop")
    keys, units = zeros.at[tile].max(keys), zeros.at[tile].add(1)
    tiles = jnp.stack([first, start[first], keys, units], axis=1)
    # The longest first, so that the short ones fill the last wave.
    return tiles[jnp.argsort(-keys)]


def _split_tokens(layout: KVLayout, num_decode: int) -> int:
    """Tokens of a split of a row of no more than MAX_SPLITS: a power of two, 16 to 512, and whole
    blocks."""
    size = FEW_ROWS_SPLIT_BYTES if num_decode <= FEW_ROWS else SPLIT_BYTES
    tokens = size // (layout.rows_per_token * LANES * 2)
    least = max(16, ROWS // math.gcd(ROWS, layout.num_kv_heads))
    return min(max(2 ** int(math.log2(max(tokens, 1))), least), 512)


def _max_splits(split: int, max_keys: int) -> int:
    return min(MAX_SPLITS, -(-max_keys // split))


def _decode_work(
    keys: jax.Array, split: int, max_keys: int, num_kv_heads: int
) -> tuple[jax.Array, jax.Array]:
    """(rows, streams) of ``Work``, for rows that see ``keys`` i32[D]."""
    tokens = jnp.full_like(keys, split)
    while split * MAX_SPLITS < max_keys:
        tokens = jnp.where(keys > split * MAX_SPLITS, 2 * split, tokens)
        split *= 2
    blocks = (keys * num_kv_heads + ROWS - 1) // ROWS
    split_blocks = tokens * num_kv_heads // ROWS
    splits = jnp.maximum((blocks + split_blocks - 1) // split_blocks, 1)
    first = jnp.cumsum(splits) - splits
    rows = jnp.stack([keys, split_blocks, splits, first], axis=1)

    # Stream s of n begins with the first split that starts at or after s/n of all blocks.
    programs = -(-len(keys) * _max_splits(split, max_keys) // STREAMS)
    count = STREAMS * min(CTAS, programs)
    cost = jnp.maximum(blocks, 1)  # a padding row has zeros to write
    starts = jnp.cumsum(cost) - cost
    total = jnp.sum(cost)
    stream = jnp.arange(count, dtype=jnp.int32)
    start = total // max(count, 1) * stream + total % max(count, 1) * stream // max(count, 1)
    row = jnp.sum(starts[None, :] <= start[:, None], axis=1, dtype=jnp.int32) - 1
    at = (start - starts[row] + split_blocks[row] - 1) // split_blocks[row]
    over = at >= splits[row]
    row, at = jnp.where(over, row + 1, row), jnp.where(over, 0, at)
    item = jnp.append(first, jnp.sum(splits))[row] + at
    items = jnp.append(item[1:], jnp.sum(splits)) - item
    return rows, jnp.stack([row, at, items], axis=1)


@functools.partial(jax.jit, static_argnames="layout")
def kv_write(
    pool_layer: jax.Array, k: jax.Array, v: jax.Array, work: Work, *, layout: KVLayout
) -> jax.Array:
    """See ``api.kv_write``: one program a token copies its rows; padding writes nothing."""
    tokens, num_kv_heads, head_dim = k.shape
    page_size, lanes = layout.page_size, layout.padded_head_dim
    padding = ((0, 0), (0, 0), (0, lanes - head_dim))
    k = jnp.pad(k, padding).astype(pool_layer.dtype)
    v = jnp.pad(v, padding).astype(pool_layer.dtype)
    # K and V as one array, which XLA computes in one kernel, RoPE included. One row per token and
    # part: [K and V together], or [K], [V].
    num_parts, axis = (1, 2) if lanes < LANES else (2, 1)
    width = num_kv_heads * LANES
    kv = jnp.concatenate([k, v], axis=axis).reshape(tokens, num_parts * width)

    def body(slots_ref: Any, kv_ref: Any, pool_ref: Any) -> None:
        token = lax.axis_index("token")
        slot = slots_ref[token]

        @pl.when(slot >= page_size)
        def _write() -> None:
            first = lax.div(slot, page_size) * num_parts * page_size + lax.rem(slot, page_size)
            for number in range(num_parts):
                part = kv_ref[token, pl.ds(number * width, width)]
                pool_ref[first + number * page_size] = part

    pool_ref = jax.new_ref(pool_layer.reshape(-1, width))
    plgpu.kernel(body, grid=(tokens,), grid_names=("token",))(work.slots, kv, pool_ref)
    return jax.freeze(pool_ref).reshape(pool_layer.shape)


@functools.partial(jax.jit, static_argnames=("layout", "scale"))
def paged_attention(
    q: jax.Array, pool_layer: jax.Array, work: Work, *, layout: KVLayout, scale: float
) -> jax.Array:
    """See ``api.paged_attention``."""
    _, num_heads, head_dim = q.shape
    _check_shapes(q.dtype, num_heads, layout)
    if q.dtype != pool_layer.dtype:
        raise NotImplementedError(f"queries of {q.dtype} with a pool of {pool_layer.dtype}")
    # The copy engine moves whole groups of 8 rows.
    padding = ((0, 0), (0, -num_heads % 8), (0, layout.padded_head_dim - head_dim))
    # A tile must start at a multiple of 8 tokens, too.
    num_decode = len(work.rows)
    gap = -num_decode % 8 if len(work.tiles) else 0
    q = _with_gap(jnp.pad(q, padding), num_decode, gap)
    out_ref = jax.new_ref(jnp.empty(q.shape, q.dtype))
    static = {"layout": layout, "num_heads": num_heads, "scale": scale * LOG2_E}
    if len(work.rows):
        partial, lse = _decode(q, pool_layer, work, out_ref, **static)
        if work.max_splits > 1:
            _merge(partial, lse, work, out_ref)
    if len(work.tiles):
        _prefill(q, pool_layer, work, out_ref, **static)
    out = jax.freeze(out_ref)[:, :num_heads, :head_dim]
    return jnp.concatenate([out[:num_decode], out[num_decode + gap :]]) if gap else out


def _with_gap(q: jax.Array, at: int, gap: int) -> jax.Array:
    """``q`` with ``gap`` rows of zeros before row ``at``."""
    if not gap:
        return q
    return jnp.concatenate([q[:at], jnp.zeros((gap, *q.shape[1:]), q.dtype), q[at:]])


def _decode(
    q: jax.Array,
    pool_layer: jax.Array,
    work: Work,
    out_ref: Any,
    *,
    layout: KVLayout,
    num_heads: int,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Writes the rows of one split to ``out_ref``, the others' splits to (partial results, log2 of
    their sums of exponentials)."""
    heads, dim = q.shape[1:]
    num_kv_heads = layout.num_kv_heads
    group = num_heads // num_kv_heads
    page_rows = layout.page_size * num_kv_heads
    boxes = ROWS // math.gcd(ROWS, page_rows)
    num_pages = work.num_pages

    def body(
        pages_ref, rows_ref, streams_ref, q_ref, pool_ref, out_ref, partial_ref, lse_ref, scratch
    ):
        thread = lax.axis_index("thread")
        pair, role = lax.div(thread, 2), lax.rem(thread, 2)
        q_smem, k_smem, v_smem, lse_smem = scratch["smem"]
        q_full, k_full, v_full, q_empty, k_empty, v_empty = scratch["barriers"]
        stream = lax.axis_index("cta") * STREAMS + pair
        first_row, first_split, items = (streams_ref[stream, i] for i in range(3))

        def for_each_item(visit):
            """``visit(item, row, split, blocks done, first block, end block)``, in order."""

            def step(item, place):
                row, split, done = place
                size, splits = rows_ref[row, 1], rows_ref[row, 2]
                blocks = lax.div(rows_ref[row, 0] * num_kv_heads + (ROWS - 1), ROWS)
                first = split * size
                end = jnp.minimum(first + size, blocks)
                visit(item, row, split, done, first, end)
                last = split + 1 == splits
                return (
                    jnp.where(last, row + 1, row),
                    jnp.where(last, 0, split + 1),
                    done + (end - first),
                )

            return lax.fori_loop(0, items, step, (first_row, first_split, jnp.int32(0)))

        @pl.when(role == 1)
        def _load():
            plgpu.set_max_registers(56, action="decrease")

            def load_item(item, row, split, done, first, end):
                slot = pair * QUERIES + lax.rem(item, QUERIES)

                @pl.when(item >= QUERIES)
                def _():
                    plgpu.barrier_wait(q_empty.at[slot])

                plgpu.copy_gmem_to_smem(
                    q_ref.at[row], q_smem.at[slot, pl.ds(0, heads)], q_full.at[slot]
                )

                def load_block(block, _):
                    _load_block(
                        block * ROWS,
                        lambda number: pages_ref[row * num_pages + number],
                        lambda page, rows, lanes: pool_ref.at[page, rows, lanes],
                        ((k_smem, k_full, k_empty), (v_smem, v_full, v_empty)),
                        (pair * STAGES, STAGES, done + (block - first)),
                        page_rows=page_rows,
                        num_pages=num_pages,
                    )
                    return _

                lax.fori_loop(first, end, load_block, None)

            _, _, done = for_each_item(load_item)
            _drain(q_empty, pair, items, QUERIES)
            _drain(k_empty, pair, done, STAGES)
            _drain(v_empty, pair, done, STAGES)

        @pl.when(role == 0)
        def _compute():
            plgpu.set_max_registers(200, action="increase")
            wgmma = plgpu.Layout.WGMMA
            iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, (ROWS, ROWS), layout=wgmma)

            def compute_item(item, row, split, done, first, end):
                q_slot = pair * QUERIES + lax.rem(item, QUERIES)
                q_tile = q_smem.at[q_slot]
                rows = rows_ref[row, 0] * num_kv_heads

                def add_block(block, state, last):
                    slot = pair * STAGES + lax.rem(done + (block - first), STAGES)
                    plgpu.barrier_wait(k_full.at[slot])
                    scores = _scores(q_tile, k_smem.at[slot], ROWS)
                    plgpu.barrier_arrive(k_empty.at[slot])
                    visible = _same_head(iota(1), lax.div(iota(0), group), block, num_kv_heads)
                    if last:
                        visible &= iota(1) < rows - block * ROWS
                    scores = jnp.where(visible, scores, MASKED)
                    weights, state = _soften(scores, state, scale)
                    plgpu.barrier_wait(v_full.at[slot])
                    if last:
                        _clear_from(v_smem.at[slot], rows - block * ROWS)
                    state = _add_values(state, weights.astype(q.dtype), v_smem.at[slot])
                    plgpu.barrier_arrive(v_empty.at[slot])
                    return state

                whole = jnp.clip(lax.div(rows, ROWS), first, end)
                plgpu.barrier_wait(q_full.at[q_slot])
                state = _start(ROWS, dim)
                state = lax.fori_loop(first, whole, functools.partial(add_block, last=False), state)
                state = lax.fori_loop(whole, end, functools.partial(add_block, last=True), state)
                q_tile[...], lse_smem[pair] = _finish(state, q.dtype)
                plgpu.commit_smem()
                splits = rows_ref[row, 2]

                @pl.when(splits == 1)
                def _():
                    plgpu.copy_smem_to_gmem(q_tile.at[pl.ds(0, heads)], out_ref.at[row])

                @pl.when(splits > 1)
                def _():
                    number = rows_ref[row, 3] + split
                    plgpu.copy_smem_to_gmem(q_tile.at[pl.ds(0, heads)], partial_ref.at[number])
                    plgpu.copy_smem_to_gmem(lse_smem.at[pair, pl.ds(0, heads)], lse_ref.at[number])

                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(q_empty.at[q_slot])

            for_each_item(compute_item)

    swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    slots = len(work.rows) * work.max_splits
    scratch = {
        "smem": (
            plgpu.SMEM((QUERIES * STREAMS, ROWS, dim), q.dtype, transforms=swizzled),
            plgpu.SMEM((STREAMS * STAGES, ROWS, dim), q.dtype, transforms=swizzled),
            plgpu.SMEM((STREAMS * STAGES, ROWS, dim), q.dtype, transforms=swizzled),
            plgpu.SMEM((STREAMS, ROWS), jnp.float32),
        ),
        "barriers": (
            plgpu.Barrier(num_barriers=QUERIES * STREAMS),
            plgpu.Barrier(num_arrivals=boxes, num_barriers=STREAMS * STAGES),
            plgpu.Barrier(num_arrivals=boxes, num_barriers=STREAMS * STAGES),
            plgpu.Barrier(num_barriers=QUERIES * STREAMS),
            plgpu.Barrier(num_barriers=STREAMS * STAGES),
            plgpu.Barrier(num_barriers=STREAMS * STAGES),
        ),
    }
    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((slots, heads, dim), q.dtype),
            jax.ShapeDtypeStruct((slots, heads), jnp.float32),
        ),
        grid=(len(work.streams) // STREAMS,),
        grid_names=("cta",),
        num_threads=2 * STREAMS,
        thread_name="thread",
        scratch_types={"scratch": scratch},
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=512),
    )(work.pages, work.rows, work.streams, q, pool_layer, out_ref)


def _merge(partial: jax.Array, lse: jax.Array, work: Work, out_ref: Any) -> None:
    """The rows of several splits: their partial results, weighed by their sums."""
    heads, dim = partial.shape[1:]
    shape = (8, dim)
    layout = plgpu.Layout.WG_STRIDED(shape, vec_size=dim // 16)

    def body(rows_ref: Any, partial_ref: Any, lse_ref: Any, out_ref: Any) -> None:
        row, head = lax.axis_index("row"), lax.axis_index("heads") * shape[0]
        splits, first = rows_ref[row, 2], rows_ref[row, 3]

        @pl.when(splits > 1)
        def _() -> None:
            line = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)

            def load(number: jax.Array) -> tuple[jax.Array, jax.Array]:
                """A split's values and, beside each of them, its sum; past the end: no sum."""
                slot = first + jnp.minimum(number, splits - 1)
                values = plgpu.load(partial_ref.at[slot, pl.ds(head, shape[0])], layout=layout)
                size = plgpu.layout_cast(jnp.full(shape, MASKED, jnp.float32), layout)
                for i in range(shape[0]):
                    own = jnp.where(number < splits, lse_ref[slot, head + i], MASKED)
                    size = jnp.where(line == i, own, size)
                return values.astype(jnp.float32), size

            def add(step: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                acc, largest, total = state
                # Several loads at once: one after the other would wait for memory each time.
                loaded = [load(step * MERGED + i) for i in range(MERGED)]
                new = functools.reduce(jnp.maximum, [size for _, size in loaded], largest)
                fade = jnp.exp2(largest - new)
                acc, total = acc * fade, total * fade
                for values, size in loaded:
                    weight = jnp.exp2(size - new)
                    acc, total = acc + values * weight, total + weight
                return acc, new, total

            zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)
            steps = lax.div(splits + (MERGED - 1), MERGED)
            acc, _, total = lax.fori_loop(0, steps, add, (zeros, zeros + MASKED, zeros))
            out_ref[row, pl.ds(head, shape[0])] = (acc / total).astype(out_ref.dtype)

    plgpu.kernel(
        body,
        grid=(len(work.rows), heads // shape[0]),
        grid_names=("row", "heads"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(work.rows, partial, lse, out_ref)


def _prefill(
    q: jax.Array,
    pool_layer: jax.Array,
    work: Work,
    out_ref: Any,
    *,
    layout: KVLayout,
    num_heads: int,
    scale: float,
) -> None:
    """Writes the tiles' rows to ``out_ref``."""
    dim = q.shape[2]
    num_kv_heads, page_size = layout.num_kv_heads, layout.page_size
    group = num_heads // num_kv_heads
    boxes = KEYS // math.gcd(KEYS, page_size)
    num_pages, num_decode = work.num_pages, len(work.rows)
    first_token = num_decode + -num_decode % 8
    half = TILE // 2
    # Whole tiles get a program each; only where there are more, shorter ones, one takes several. A
    # program without any would cost its start.
    programs = -(-len(work.tiles) * UNIT // TILE)
    rounds = -(-len(work.tiles) // programs)

    def body(pages_ref, tiles_ref, q_ref, pool_ref, out_ref, scratch):
        program, head = lax.axis_index("program"), lax.axis_index("head")
        thread = lax.axis_index("thread")
        q_smem, k_smem, v_smem = scratch["smem"]
        q_full, k_full, v_full, k_empty, v_empty, turn, cleared = scratch["barriers"]

        def for_each_tile(visit):
            """``visit(first unit, first position, keys, units)`` of the program's tiles."""

            def step(round_, _):
                tile = jnp.minimum(round_ * programs + program, len(work.tiles) - 1)
                number, start, keys, units = (tiles_ref[tile, i] for i in range(4))
                there = (round_ * programs + program < len(work.tiles)) & (units > 0)
                pl.when(there)(lambda: visit(number, start, keys, units))
                return _

            lax.fori_loop(0, rounds, step, None)

        @pl.when(thread == 2)
        def _load():
            plgpu.set_max_registers(40, action="decrease")
            kv_head = lax.div(head, group)

            def load_tile(number, start, keys, units):
                row = num_decode + lax.div(number * UNIT, work.tile)
                blocks = lax.div(keys + (KEYS - 1), KEYS)

                def load_block(block, _):
                    _load_block(
                        block * KEYS,
                        lambda number: pages_ref[row * num_pages + number],
                        lambda page, rows, lanes: pool_ref.at[page, rows, kv_head, lanes],
                        ((k_smem, k_full, k_empty), (v_smem, v_full, v_empty)),
                        (0, KEY_STAGES, block),
                        page_rows=page_size,
                        num_pages=num_pages,
                    )
                    return _

                lax.fori_loop(0, blocks, load_block, None)
                _drain(k_empty, 0, blocks, KEY_STAGES)
                _drain(v_empty, 0, blocks, KEY_STAGES)

            for_each_tile(load_tile)

        @pl.when(thread < 2)
        def _compute():
            plgpu.set_max_registers(232, action="increase")
            q_tile = q_smem.at[thread]

            def compute_tile(number, start, keys, units):
                blocks = lax.div(keys + (KEYS - 1), KEYS)
                first = first_token + number * UNIT + thread * half
                position = start + thread * half
                own_units = units - thread * (half // UNIT)

                def for_each_unit(visit, otherwise=lambda: None):
                    """``visit(rows in memory, rows of q_tile)`` for the units that there are."""
                    for unit in range(half // UNIT):
                        rows = pl.ds(first + unit * UNIT, UNIT), pl.ds(unit * UNIT, UNIT)
                        pl.when(unit < own_units)(functools.partial(visit, *rows))
                        pl.when(unit >= own_units)(otherwise)

                for_each_unit(
                    lambda there, here: plgpu.copy_gmem_to_smem(
                        q_ref.at[there, head], q_tile.at[here], q_full.at[thread]
                    ),
                    lambda: plgpu.barrier_arrive(q_full.at[thread]),
                )
                iota = functools.partial(
                    plgpu.broadcasted_iota, jnp.int32, (half, KEYS), layout=plgpu.Layout.WGMMA
                )

                def change():
                    plgpu.barrier_arrive(turn)
                    plgpu.barrier_wait(turn)

                def add_block(block, state, last):
                    slot = lax.rem(block, KEY_STAGES)
                    plgpu.barrier_wait(k_full.at[slot])
                    unwritten = jnp.logical_and(block == blocks - 1, keys < blocks * KEYS)
                    if last:
                        # Each clears a half, before it yields to the other.
                        plgpu.barrier_wait(v_full.at[slot])

                        @pl.when(unwritten)
                        def _():
                            part = v_smem.at[slot, pl.ds(thread * half, half)]
                            _clear_from(part, keys - block * KEYS - thread * half)
                            plgpu.barrier_arrive(cleared)

                    scores = _scores(q_tile, k_smem.at[slot], KEYS, change)
                    plgpu.barrier_arrive(k_empty.at[slot])
                    if last:
                        visible = iota(1) + block * KEYS <= iota(0) + position
                        scores = jnp.where(visible, scores, MASKED)
                    weights, state = _soften(scores, state, scale)
                    weights = weights.astype(q.dtype)
                    plgpu.barrier_arrive(turn)
                    if last:

                        @pl.when(unwritten)
                        def _():
                            plgpu.barrier_wait(cleared)
                    else:
                        plgpu.barrier_wait(v_full.at[slot])
                    plgpu.barrier_wait(turn)
                    state = _add_values(state, weights, v_smem.at[slot])
                    plgpu.barrier_arrive(v_empty.at[slot])
                    return state

                plgpu.barrier_wait(q_full.at[thread])
                # The second warpgroup follows the first by half a step.
                pl.when(thread == 1)(change)
                whole = jnp.minimum(lax.div(position + 1, KEYS), lax.div(keys, KEYS))
                state = _start(half, dim)
                state = lax.fori_loop(0, whole, functools.partial(add_block, last=False), state)
                state = lax.fori_loop(whole, blocks, functools.partial(add_block, last=True), state)
                pl.when(thread == 0)(change)
                out = _finish(state, q.dtype)[0]
                token = plgpu.broadcasted_iota(jnp.int32, out.shape, 0, layout=plgpu.Layout.WGMMA)
                q_tile[...] = jnp.where(token + position < keys, out, jnp.zeros_like(out))
                plgpu.commit_smem()
                for_each_unit(
                    lambda there, here: plgpu.copy_smem_to_gmem(
                        q_tile.at[here], out_ref.at[there, head]
                    )
                )
                plgpu.wait_smem_to_gmem(0)

            for_each_tile(compute_tile)

    swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    scratch = {
        "smem": (
            plgpu.SMEM((2, half, dim), q.dtype, transforms=swizzled),
            plgpu.SMEM((KEY_STAGES, KEYS, dim), q.dtype, transforms=swizzled),
            plgpu.SMEM((KEY_STAGES, KEYS, dim), q.dtype, transforms=swizzled),
        ),
        "barriers": (
            plgpu.Barrier(num_arrivals=half // UNIT, num_barriers=2),
            plgpu.Barrier(num_arrivals=boxes, num_barriers=KEY_STAGES),
            plgpu.Barrier(num_arrivals=boxes, num_barriers=KEY_STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=KEY_STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=KEY_STAGES),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2),
        ),
    }
    pages = pool_layer.reshape(pool_layer.shape[0], -1, num_kv_heads, LANES)
    plgpu.kernel(
        body,
        # Tiles run faster than heads: what one head's tiles read together fits the L2 cache.
        grid=(num_heads, programs),
        grid_names=("head", "program"),
        num_threads=3,
        thread_name="thread",
        scratch_types={"scratch": scratch},
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(work.pages, work.tiles, q, pages, out_ref)


def _load_block(
    first: jax.Array,
    page_of: Callable[[jax.Array], jax.Array],
    source: Callable[[jax.Array, Any, Any], Any],
    parts: tuple[tuple[Any, Any, Any], ...],
    place: tuple[jax.Array | int, int, jax.Array],
    *,
    page_rows: int,
    num_pages: int,
) -> None:
    """Start the copies of a block of K, and of V, page by page, once its slot is free.

    ``first``: the block's first row of its sequence's; ``page_of(number)``: the id of a page of the
    sequence; ``source(page, rows, lanes)``: what to copy; ``parts``: shared memory, full and empty
    barriers, of K and of V; ``place``: the ring's first slot, its depth, the block's number in it;
    ``page_rows``: rows of K in a page.
    """
    start, depth, number = place
    slot = start + lax.rem(number, depth)
    rows, dim = parts[0][0].shape[1:]
    box = math.gcd(rows, page_rows)
    # Before the waits, which hide how long it takes to read the ids.
    of_boxes = [lax.div(first + at, page_rows) for at in range(0, rows, box)]
    pages = [page_of(jnp.minimum(page_number, num_pages - 1)) for page_number in of_boxes]
    for part, (smem, full, empty) in enumerate(parts):

        @pl.when(number >= depth)
        def _(empty=empty):
            plgpu.barrier_wait(empty.at[slot])

        for at, page in zip(range(0, rows, box), pages, strict=True):
            row, lane = pl.multiple_of(lax.rem(first + at, page_rows), box), part * dim
            if dim == LANES:
                row, lane = row + part * page_rows, 0
            plgpu.copy_gmem_to_smem(
                source(page, pl.ds(row, box), pl.ds(lane, dim)),
                smem.at[slot, pl.ds(at, box)],
                full.at[slot],
            )


def _drain(empty: Any, ring: Any, count: jax.Array, depth: int) -> None:
    """Wait for what was sent through a ring and not waited for, so that its barriers can go."""

    def wait(step: jax.Array, _: None) -> None:
        plgpu.barrier_wait(empty.at[ring * depth + lax.rem(step, depth)])

    lax.fori_loop(jnp.maximum(count - depth, 0), count, wait, None)


State = tuple[jax.Array, jax.Array, jax.Array]
"""Of a softmax that runs over blocks: sums [M, dim], largest scores [M], sums of weights [M]."""


def _start(rows: int, dim: int) -> State:
    layout = plgpu.Layout.WGMMA
    acc = plgpu.layout_cast(jnp.zeros((rows, dim), jnp.float32), layout)
    largest = plgpu.layout_cast(jnp.full((rows,), MASKED, jnp.float32), layout.reduce(1))
    total = plgpu.layout_cast(jnp.zeros((rows,), jnp.float32), layout.reduce(1))
    return acc, largest, total


def _scores(q_ref: Any, k_ref: Any, keys: int, issued: Any = lambda: None) -> jax.Array:
    """q Kᵀ, f32; ``issued`` is called while the tensor cores work."""

    def product(acc_ref: Any) -> jax.Array:
        plgpu.wgmma(acc_ref, q_ref, k_ref.transpose((1, 0)))
        issued()
        return acc_ref[...]

    return pl.run_scoped(product, plgpu.ACC((q_ref.shape[0], keys), jnp.float32))


def _same_head(line: jax.Array, head: jax.Array, block: jax.Array, num_kv_heads: int) -> jax.Array:
    """Whether row ``line`` of a block of ROWS is a key of KV head ``head``.

    A form that needs few registers for each case: the mask is as large as the scores.
    """
    if ROWS % num_kv_heads == 0:
        return line & (num_kv_heads - 1) == head
    head = head - lax.rem(block * ROWS, num_kv_heads)
    head = jnp.where(head < 0, head + num_kv_heads, head)
    if 2 * num_kv_heads >= ROWS:
        return (line == head) | (line == head + num_kv_heads)
    return lax.rem(line, num_kv_heads) == head


def _soften(scores: jax.Array, state: State, scale: float) -> tuple[jax.Array, State]:
    """(weights f32, the state without their values); ``scale`` makes scores powers of two."""
    acc, largest, total = state
    new = jnp.maximum(largest, jnp.max(scores, axis=1) * scale)
    fade = jnp.exp2(largest - new)
    # One multiply-add an element.
    weights = jnp.exp2(scores * scale - lax.broadcast_in_dim(new, scores.shape, [0]))
    total = total * fade + jnp.sum(weights, axis=1)
    return weights, (acc * lax.broadcast_in_dim(fade, acc.shape, [0]), new, total)


def _add_values(state: State, weights: jax.Array, v_ref: Any) -> State:
    """The state with ``weights`` V added; weights stay in registers."""

    def product(acc_ref: Any) -> None:
        plgpu.wgmma(acc_ref, weights, v_ref)

    return pl.run_state(product)(plgpu.ACC.init(state[0])), *state[1:]


def _finish(state: State, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """(result [M, dim], log2 of the sums of exponentials [M]); zeros for rows without keys."""
    acc, largest, total = state
    total = jnp.maximum(total, 1e-30)
    out = acc / lax.broadcast_in_dim(total, acc.shape, [0])
    return out.astype(dtype), largest + jnp.log2(total)


def _clear_from(v_ref: Any, row: jax.Array) -> None:
    """Zeros in the rows of V from ``row`` on, for the tensor cores to see."""
    layout = plgpu.Layout.WGMMA
    values = plgpu.load(v_ref, layout=layout)
    line = plgpu.broadcasted_iota(jnp.int32, v_ref.shape, 0, layout=layout)
    v_ref[...] = jnp.where(line < row, values, jnp.zeros_like(values))
    plgpu.commit_smem()
