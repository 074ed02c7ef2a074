"""Paged LoRA for Hopper (Mosaic GPU, sm_90a): S-LoRA's MBGMV, shrink and expand in one launch.

Prefill (MBGMM) takes the same launch, its segments merely full.

The step's tokens are sorted by adapter and cut into segments of a few tokens of one adapter; an
item is one segment and one target, and a fixed number of programs share the items, largest rank
first. A step with room for few tokens would leave most of them idle: there several share an item,
each computes h and then a part of the outputs. In each program one warpgroup streams the item's A,
then its Bᵀ, through a ring in shared memory, in chunks of 64 rows (two TMA boxes of 32, which never
cross a page), and runs ahead into the next item; the other multiplies. Eight column blocks of all
r ranks are 8 r rows, so exactly r / 8 chunks: a *window*. The k-th chunk of every window (its
*class*) holds the same ranks of the same blocks of the window, which makes any rank that is a
multiple of 8 regular:

- Shrink: ``chunk [64, 128] · xᵀ``, with eight blocks of each token as columns, summed over the
  windows of a class; of each row only the column of its own block is meant. The rest is thrown
  away: the unit is idle anyway.
- Expand: ``chunkᵀ · H`` with H [64 rows, token and block]: the row's own rank in the column of its
  own block, zeros elsewhere; summed over the chunks of a window, it is eight blocks of y of each
  token. TMA adds them to y.

Tokens are the narrow operand of both: a segment of one token has products 8 columns wide. So h
never leaves the core, nothing is transposed in memory or padded to a larger rank, and a token's
sums run in an order that its own adapter alone decides. Knows one group of targets a call.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels.layout import GROUPS, LANES, TARGETS, AdapterLayout, KVLayout, blocks
from pallas_kernels.paged_lora.batch import LoraBatch

plgpu: Any = mosaic_gpu  # names that jax 0.10.2 lacks

PROGRAMS = 132
"""Persistent programs, one a multiprocessor of an H100 or H200; any number is correct."""

CHUNK = 64
"""Rows of the pool in one matmul: M of wgmma."""

BOX = 32
"""Rows that lie together whatever page they are in: segments and pages are multiples of it."""

BOXES = CHUNK // BOX

WINDOW = 8
"""Column blocks in a window."""

SHARED_BYTES = 224 * 1024
"""Shared memory a program may use; 227 KiB less barriers and alignment."""

FRONT = 64
"""Zeros before a segment's sums, so that shifted reads need no mask."""

SUMS = 448
"""Rows of sums, one for each rank, block of a chunk and shift: FRONT + MAX_RANK + 127, rounded
up."""

TOTALS = 320
"""Rows of h: MAX_RANK + 56, rounded up."""

DECODE_TOKENS = 256
"""Steps of more tokens have larger segments and keep more of H; in others more of the pool is on
its way at once."""

WGMMA = getattr(plgpu, "Layout", None) and plgpu.Layout.WGMMA

# A segment's fields: how many tokens, adapter index, seven ranks, seven rows of A, seven of Bᵀ,
# where the adapter's page ids start, and the tokens' numbers.
COUNT, ADAPTER, RANK, A_ROW, B_ROW, PAGES, TOKENS = 0, 1, 2, 9, 16, 23, 24


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """The step's work, and where the adapters lie."""

    segments: tuple[jax.Array, ...]
    """Per group i32[T, TOKENS + size]: a row a segment, the fields below, largest ranks first."""

    num_segments: tuple[jax.Array, ...]
    """Per group i32[1]."""

    pages: jax.Array
    """As the batch has it."""

    scaling: jax.Array
    """As the batch has it."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Item:
    """One segment and one target, in a kernel's registers."""

    target: Any
    rank: Any
    count: Any
    a_rows: Any
    b_rows: Any
    first_window: Any
    end_window: Any
    a_row: Any
    b_row: Any
    pages: Any
    scale: Any
    tokens: tuple[Any, ...]


def check_support(
    device: Any, *, dtype: Any, num_heads: int, kv: KVLayout, adapters: AdapterLayout
) -> None:
    """NotImplementedError, with the reason, where this module cannot serve."""
    del num_heads, kv, adapters
    if not hasattr(plgpu, "InterpretGPUParams"):
        raise NotImplementedError(f"GPU kernels need jax 0.11 or later, this is {jax.__version__}")
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)):
        raise NotImplementedError(
            f"GPU kernels compute in bfloat16 or float16, not in {jnp.dtype(dtype).name}: Hopper's "
            "matrix unit has no float32"
        )
    capability = getattr(device, "compute_capability", "0")
    if float(capability) != 9.0:
        raise NotImplementedError(
            f"GPU kernels are built for compute capability 9.0 (H100, H200); {device.device_kind} "
            f"has {capability}"
        )


def prepare(batch: LoraBatch, layout: AdapterLayout) -> Plan:
    """See ``api.prepare``."""
    adapters = jnp.concatenate(
        [batch.rank, batch.a_row, batch.b_row, batch.page_start[:, None]], axis=1
    )
    tokens = batch.adapter_index.shape[0]
    sizes = {group: segment_tokens(layout, group, tokens) for group in GROUPS}
    tables = {size: _segments(batch, adapters, size) for size in set(sizes.values())}
    segments, counts = zip(*(tables[sizes[group]] for group in GROUPS), strict=True)
    return Plan(segments, counts, batch.pages, batch.scaling)


def _segments(batch: LoraBatch, adapters: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Segments of up to ``size`` tokens, as Plan has them, and i32[1] their number.

    By counting for each token those before it: a sort and its gathers would take ten times as long.
    """
    index = batch.adapter_index
    tokens, num_adapters = index.shape[0], adapters.shape[0]
    adapted = index > 0
    order = jnp.arange(num_adapters, dtype=jnp.int32)
    order = order - num_adapters * jnp.sum(batch.rank, axis=1)  # the largest first
    key = order[index]
    number = jnp.arange(tokens, dtype=jnp.int32)
    same = index[:, None] == index[None, :]
    nth = jnp.sum(same & (number[None, :] < number[:, None]), axis=1, dtype=jnp.int32)
    alike = jnp.sum(same, axis=1, dtype=jnp.int32)
    leads = adapted & (nth % size == 0)
    before = jnp.sum(leads[None, :] & (key[None, :] < key[:, None]), axis=1, dtype=jnp.int32)
    segment = jnp.where(adapted, before + nth // size, tokens)
    head = jnp.stack([jnp.minimum(size, alike - nth // size * size), index], axis=1)
    place = jnp.arange(2, dtype=jnp.int32)
    table = jnp.zeros((tokens, 2 + size), jnp.int32)
    table = table.at[
        jnp.repeat(segment[:, None], 3, axis=1),
        jnp.concatenate([jnp.broadcast_to(place, (tokens, 2)), 2 + nth[:, None] % size], axis=1),
    ].set(jnp.concatenate([head, number[:, None]], axis=1), mode="drop")
    fields = adapters[table[:, 1]]
    return jnp.concatenate([table[:, :2], fields, table[:, 2:]], axis=1), jnp.sum(
        leads, dtype=jnp.int32
    ).reshape(1)


def segment_tokens(layout: AdapterLayout, group: tuple[str, ...], tokens: int) -> int:
    """Most tokens of a segment, in a step of ``tokens``: as many as 64 KiB of their inputs hold,
    up to 8; in steps of decode an eighth less, for more of the pool to be on its way."""
    token = windows(layout.in_features[TARGETS.index(group[0])]) * WINDOW * LANES * 2
    most = 7 if tokens <= DECODE_TOKENS else 8
    return max(1, min(most, most * 8 * 1024 // token))


def windows(features: int) -> int:
    """Windows that ``features`` columns take."""
    return -(-blocks(features) // WINDOW)


def paged_lora(
    y: jax.Array,
    x: jax.Array,
    pool_layer: jax.Array,
    plan: Plan,
    *,
    layer: int | jax.Array,
    group: tuple[str, ...],
    layout: AdapterLayout,
) -> jax.Array:
    """See ``api.paged_lora``."""
    if pool_layer.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(
            f"paged LoRA on GPU takes bfloat16 or float16 pools, not {pool_layer.dtype}"
        )
    number = GROUPS.index(group)
    targets = [TARGETS.index(name) for name in group]
    return _group_term(
        y,
        x,
        pool_layer,
        plan.segments[number],
        plan.num_segments[number],
        plan.pages,
        plan.scaling,
        jnp.asarray(layer, jnp.int32).reshape(1),
        inputs=layout.in_features[targets[0]],
        outputs=tuple(layout.out_features[target] for target in targets),
        first_target=targets[0],
    )


# One traced function for all layers.
@functools.partial(jax.jit, static_argnames=("inputs", "outputs", "first_target"))
def _group_term(
    y: jax.Array,
    x: jax.Array,
    pool_layer: jax.Array,
    segments: jax.Array,
    num_segments: jax.Array,
    pages: jax.Array,
    scaling: jax.Array,
    layer: jax.Array,
    *,
    inputs: int,
    outputs: tuple[int, ...],
    first_target: int,
) -> jax.Array:
    """``y`` plus the term of one group, which starts at target ``first_target``."""
    tokens, dtype = x.shape[0], pool_layer.dtype
    x = _padded(x.astype(dtype), (inputs,), WINDOW * LANES).reshape(tokens, -1, WINDOW, LANES)
    # y in place where its targets are whole blocks, as those of every large model are; but where
    # each begins at a whole window, y must end at one.
    starts_whole = not any(f % (WINDOW * LANES) for f in outputs[:-1])
    ends_whole = outputs[-1] % (WINDOW * LANES) == 0
    in_place = all(f % LANES == 0 for f in outputs) and (ends_whole or not starts_whole)
    unit = LANES if in_place else WINDOW * LANES
    y_blocks = _padded(y.astype(dtype), outputs, unit).reshape(tokens, -1, LANES)
    y_ref = jax.new_ref(y_blocks)
    places = np.cumsum([0, *(-(-f // unit) * (unit // LANES) for f in outputs)])
    _decode(
        segments,
        num_segments,
        pages,
        scaling,
        layer,
        x,
        pool_layer,
        y_ref,
        first_target=first_target,
        in_blocks=blocks(inputs),
        out_blocks=tuple(blocks(f) for f in outputs),
        places=tuple(int(place) for place in places[:-1]),
    )
    return _unpadded(jax.freeze(y_ref).reshape(tokens, -1), outputs, unit).astype(y.dtype)


def _padded(values: jax.Array, features: tuple[int, ...], unit: int) -> jax.Array:
    """[T, sum of features] → each of the features zero-padded to a multiple of ``unit``."""
    if not any(f % unit for f in features):
        return values
    parts = jnp.split(values, np.cumsum(features[:-1]).tolist(), axis=1)
    return jnp.concatenate(
        [jnp.pad(part, ((0, 0), (0, -f % unit))) for part, f in zip(parts, features, strict=True)],
        axis=1,
    )


def _unpadded(values: jax.Array, features: tuple[int, ...], unit: int) -> jax.Array:
    """The inverse of ``_padded``."""
    if not any(f % unit for f in features):
        return values
    ends = np.cumsum([-(-f // unit) * unit for f in features]).tolist()
    parts = jnp.split(values, ends[:-1], axis=1)
    return jnp.concatenate([p[:, :f] for p, f in zip(parts, features, strict=True)], axis=1)


def _ceil_div(a: Any, b: Any) -> Any:
    return lax.div(a + (b - 1), b)


def _pick(values: tuple[int, ...], index: Any) -> Any:
    """``values[index]`` of a few values known when compiling."""
    result = jnp.int32(values[-1])
    for number in range(len(values) - 1):
        result = jnp.where(index == number, jnp.int32(values[number]), result)
    return result


def _store(ref: Any, values: Any, *, optimized: bool) -> None:
    """``ref[...] = values``; unless ``optimized``, whatever bank conflicts that costs.

    jax 0.12 must be told, and has an operation for it; 0.11 falls back by itself.
    """
    if hasattr(plgpu, "store"):
        plgpu.store(ref, values, optimized=optimized)
    else:
        ref[...] = values


def _add(staged: Any, y: Any, token: Any, block: Any, real: Any) -> None:
    """Add a window staged in shared memory to y [T, blocks, 128]; what is past its end is lost.

    Blocks after the ``real`` ones are zeros, and harm nobody: each addition is atomic.
    """
    del real
    plgpu.copy_smem_to_gmem(
        staged, y.at[token, pl.ds(block, WINDOW)], commit_group=False, reduction_op="add"
    )


def _decode(
    segments: jax.Array,
    num_segments: jax.Array,
    pages: jax.Array,
    scaling: jax.Array,
    layer: jax.Array,
    x: jax.Array,
    pool: jax.Array,
    y_ref: Any,
    *,
    first_target: int,
    in_blocks: int,
    out_blocks: tuple[int, ...],
    places: tuple[int, ...],
) -> None:
    """Add every item's term to ``y_ref`` [T, blocks, 128]; x: [T, windows, 8, 128].

    ``places``: each target's first block in y.
    """
    size = segments.shape[1] - TOKENS
    dtype = pool.dtype
    rows_per_page = pool.shape[1]
    x_windows = x.shape[1]
    columns = WINDOW * size
    num_items = segments.shape[0] * len(out_blocks)
    parts = max(min(PROGRAMS // num_items, -(-max(out_blocks) // WINDOW)), 1)
    programs = min(PROGRAMS, num_items * parts)
    # Classes of H, times tokens, that stay in shared memory between windows.
    kept = 16 if x.shape[0] <= DECODE_TOKENS else 32
    used = 2 * (columns * (x_windows + 2) * LANES + kept * WINDOW * CHUNK)
    used += 4 * WINDOW * (SUMS + TOTALS)
    stages = min(12, (SHARED_BYTES - used) // (CHUNK * LANES * 2))
    ragged = any(n % WINDOW for n in out_blocks)
    aligned = not any(place % WINDOW for place in places)  # tiles of ys must fall on y's

    def body(*refs):
        (
            segments, num_segments, pages, scaling, layer, x, pool, y,
            ring, xs, hs, ys, sums, h, full, empty, x_full, x_empty,
        ) = refs  # fmt: skip
        program = lax.axis_index("program")
        # Back and forth over the programs: a larger item of one round, a smaller of the next.
        count = num_segments[0] * (len(out_blocks) * parts)
        whole_rounds = lax.div(count, programs)
        seat = jnp.where(lax.rem(whole_rounds, 2) == 0, program, programs - 1 - program)
        rounds = whole_rounds + (seat < lax.rem(count, programs)).astype(jnp.int32)

        def read_item(turn):
            """An item's words: both warpgroups read them a turn ahead, to hide the latency."""
            seat = jnp.where(lax.rem(turn, 2) == 0, program, programs - 1 - program)
            number = turn * programs + seat
            item, part = lax.div(number, jnp.int32(parts)), lax.rem(number, jnp.int32(parts))
            segment = lax.div(item, jnp.int32(len(out_blocks)))
            segment = jnp.minimum(segment, segments.shape[0] - 1)
            target = lax.rem(item, jnp.int32(len(out_blocks)))
            rank = segments[segment, RANK + first_target + target]
            windows = _ceil_div(_pick(out_blocks, target), WINDOW)
            of_part = _ceil_div(windows, parts)
            first_window = part * of_part
            end_window = jnp.minimum(first_window + of_part, windows)
            works = (rank > 0) & (first_window < end_window)
            return _Item(
                target=target,
                rank=jnp.maximum(rank, WINDOW),  # without the target: of rank 8, no token, no rows
                count=jnp.where(works, segments[segment, COUNT], 0),
                a_rows=jnp.where(works, in_blocks * rank, 0),
                b_rows=_pick(out_blocks, target) * rank,
                first_window=first_window,
                end_window=jnp.where(works, end_window, first_window),
                a_row=segments[segment, A_ROW + first_target + target],
                b_row=segments[segment, B_ROW + first_target + target],
                pages=segments[segment, PAGES],
                scale=scaling[layer[0], segments[segment, ADAPTER], first_target + target],
                tokens=tuple(segments[segment, TOKENS + t] for t in range(size)),
            )

        def each_item(step, carry):
            """``step(turn, item, carry)`` for the program's items; returns the last carry."""

            def one(turn, state):
                item, carry = state
                following = read_item(turn + 1)
                return following, step(turn, item, carry)

            return lax.fori_loop(0, rounds, one, (read_item(jnp.int32(0)), carry))[1]

        def each_token(item, room, step):
            for t in range(room):
                pl.when(t < item.count)(functools.partial(step, t))

        @pl.when(lax.axis_index("warpgroup") == 1)
        def _producer():
            def copy_chunk(item, first_row, rows, chunk, sent):
                slot = lax.rem(sent, stages)

                def place(first):
                    """(page, row in it) of the box of the chunk's rows from ``first`` on."""
                    # Past the segment its last box again: finite, and of no consequence.
                    box = jnp.minimum(chunk * BOXES + first // BOX, _ceil_div(rows, BOX) - 1)
                    row = first_row + box * BOX
                    page = pages[item.pages + lax.div(row, rows_per_page)]
                    return page, pl.multiple_of(lax.rem(row, rows_per_page), BOX)

                # Before the wait, which hides how long it takes to read a page's id.
                places = {first: place(first) for first in range(0, CHUNK, BOX)}

                @pl.when(sent >= stages)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                def copy(first, length):
                    """Rows of the chunk from ``first`` on, all in one page."""
                    page, at = places[first]
                    plgpu.copy_gmem_to_smem(
                        pool.at[page, pl.ds(at, length)],
                        ring.at[slot, pl.ds(first, length)],
                        full.at[slot],
                    )

                if rows_per_page % CHUNK == 0:
                    whole = (lax.rem(first_row, CHUNK) == 0) & ((chunk + 1) * CHUNK <= rows)
                else:
                    whole = jnp.bool_(False)

                @pl.when(whole)
                def _():
                    copy(0, CHUNK)
                    plgpu.barrier_arrive(full.at[slot])  # stands for the second copy

                @pl.when(~whole)
                def _():
                    for first in places:
                        copy(first, BOX)

                return sent + 1

            def copy_item(turn, item, carry):
                sent, given = carry  # chunks; items with tokens
                classes = lax.div(item.rank, WINDOW)
                a_chunks, b_chunks = _ceil_div(item.a_rows, CHUNK), _ceil_div(item.b_rows, CHUNK)
                first_b = item.first_window * classes
                end_b = jnp.minimum(item.end_window * classes, b_chunks)

                # The consumer passes items without tokens at once: did it free xs for them too, it
                # might do so twice before this has waited once.
                has_tokens = item.count > 0

                @pl.when(has_tokens & (given > 0))
                def _():
                    plgpu.barrier_wait(x_empty)

                def copy_token(t):
                    for w in range(x_windows):
                        plgpu.copy_gmem_to_smem(
                            x.at[item.tokens[t], w],
                            xs.at[w, pl.ds(t * WINDOW, WINDOW)],
                            x_full.at[t],
                        )

                each_token(item, size, copy_token)

                def copy_class(k, sent):
                    def copy_window(w, sent):
                        return copy_chunk(item, item.a_row, item.a_rows, w * classes + k, sent)

                    return lax.fori_loop(0, _ceil_div(a_chunks - k, classes), copy_window, sent)

                sent = lax.fori_loop(0, jnp.minimum(classes, a_chunks), copy_class, sent)

                def copy_b(chunk, sent):
                    return copy_chunk(item, item.b_row, item.b_rows, chunk, sent)

                sent = lax.fori_loop(first_b, end_b, copy_b, sent)
                return sent, given + has_tokens.astype(jnp.int32)

            sent, given = each_item(copy_item, (jnp.int32(0), jnp.int32(0)))

            def drain(k, carry):
                plgpu.barrier_wait(empty.at[lax.rem(k, stages)])
                return carry

            lax.fori_loop(jnp.maximum(sent - stages, 0), sent, drain, None)

            @pl.when(given > 0)
            def _():
                plgpu.barrier_wait(x_empty)

        @pl.when(lax.axis_index("warpgroup") == 0)
        def _consumer():
            row = plgpu.broadcasted_iota(jnp.int32, (CHUNK, WINDOW), 0, layout=WGMMA)
            column = plgpu.broadcasted_iota(jnp.int32, (CHUNK, WINDOW), 1, layout=WGMMA)

            def own(rank, k):
                """bool[64, 8]: whether a row of a class is of the window's n-th block."""
                first = column * rank - k * CHUNK
                return (row >= first) & (row < first + rank)

            def load(ref, at):
                """f32[64 rows, 8 tokens] of ``ref`` from row ``at`` on."""
                return plgpu.load(ref.at[pl.ds(at, CHUNK)], layout=WGMMA, optimized=False)

            def over_columns(values):
                """Each row's sum over 8 columns, in all of them."""
                return lax.broadcast_in_dim(values.sum(axis=1), (CHUNK, WINDOW), [0])

            def multiply(acc, num_chunks, taken, operands):
                """acc += Σ of the next chunks' products; a slot is free once the next is issued."""

                def step(k, carry):
                    slot = lax.rem(taken + k, stages)
                    a, b = operands(k, slot)
                    plgpu.barrier_wait(full.at[slot])
                    plgpu.wgmma(acc, a, b)
                    plgpu.wgmma_wait(1)

                    @pl.when(k > 0)
                    def _():
                        plgpu.barrier_arrive(empty.at[lax.rem(taken + k - 1, stages)])

                    return carry

                lax.fori_loop(0, num_chunks, step, None)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(empty.at[lax.rem(taken + num_chunks - 1, stages)])
                return acc[...]

            def sum_products(shape, num_chunks, taken, operands):
                return pl.run_scoped(
                    lambda acc: multiply(acc, num_chunks, taken, operands),
                    plgpu.ACC(shape, jnp.float32),
                )

            def compute(item, taken, room):
                """The term of an item of up to ``room`` tokens, whose chunks start at ``taken``."""
                rank, classes = item.rank, lax.div(item.rank, WINDOW)
                a_chunks, b_chunks = _ceil_div(item.a_rows, CHUNK), _ceil_div(item.b_rows, CHUNK)
                most = kept // room

                def of_class(k):
                    """Class k of H, transposed: [token and block, 64 rows]."""
                    first = lax.rem(k, most) * (room * WINDOW)
                    return hs.at[pl.ds(pl.multiple_of(first, WINDOW), room * WINDOW)]

                sums[...] = jnp.zeros((SUMS, WINDOW), jnp.float32)
                each_token(item, room, lambda t: plgpu.barrier_wait(x_full.at[t]))

                def shrink_class(k, taken):
                    num_windows = _ceil_div(a_chunks - k, classes)
                    z = sum_products(
                        (CHUNK, room * WINDOW),
                        num_windows,
                        taken,
                        lambda w, slot: (
                            ring.at[slot],
                            xs.at[w, pl.ds(0, room * WINDOW)].transpose((1, 0)),
                        ),
                    )
                    mine = own(rank, k)
                    at = FRONT + lax.rem(k * CHUNK, rank)
                    terms = jnp.zeros((CHUNK, WINDOW), jnp.float32)
                    for t in range(room):
                        of_token = z[:, t * WINDOW : (t + 1) * WINDOW]
                        term = over_columns(jnp.where(mine, of_token, 0.0))
                        # One token has all columns.
                        terms = term if room == 1 else jnp.where(column == t, term, terms)
                    sums[pl.ds(at, CHUNK)] = load(sums, at) + terms
                    return taken + num_windows

                taken = lax.fori_loop(0, jnp.minimum(classes, a_chunks), shrink_class, taken)
                plgpu.barrier_arrive(x_empty)

                # The sums lie at FRONT + i, i < rank + 64, those of one rank `rank` apart. h gets
                # their totals with that period, so that a chunk finds its ranks in one piece.
                pieces = jnp.where(
                    lax.rem(jnp.int32(CHUNK), rank) == 0, 1, _ceil_div(rank + CHUNK - 8, CHUNK)
                )

                def total(piece, carry):
                    first = piece * CHUNK
                    below = lax.div(first + CHUNK - 1, rank)
                    above = lax.div(jnp.maximum(rank + CHUNK - 1 - first, 0), rank)
                    start = FRONT + first - below * rank

                    def add(m, total):
                        # Those too many read zeros.
                        four = [
                            load(sums, jnp.minimum(start + (4 * m + n) * rank, SUMS - CHUNK))
                            for n in range(4)
                        ]
                        return total + ((four[0] + four[1]) + (four[2] + four[3]))

                    nothing = jnp.zeros((CHUNK, WINDOW), jnp.float32)
                    h[pl.ds(first, CHUNK)] = lax.fori_loop(
                        0,
                        _ceil_div(below + above + 1, 4),
                        add,
                        plgpu.layout_cast(nothing, WGMMA),
                    )
                    return carry

                lax.fori_loop(0, pieces, total, None)

                def spread(k):
                    """Class k of H, [64 rows, token and block], into its place, transposed."""
                    ranks, mine = load(h, lax.rem(k * CHUNK, rank)), own(rank, k)
                    parts = []
                    for t in range(room):
                        of_token = ranks
                        if room > 1:
                            of_token = over_columns(jnp.where(column == t, ranks, 0.0))
                        parts.append(jnp.where(mine, of_token, 0.0).astype(dtype))
                    of_class(k).transpose((1, 0))[...] = jnp.concatenate(parts, axis=1)

                def spread_kept(k, carry):
                    spread(k)
                    return carry

                lax.fori_loop(0, jnp.where(classes > most, 0, classes), spread_kept, None)
                plgpu.commit_smem()
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                def expand_window(w, taken):
                    num_chunks = jnp.minimum(classes, b_chunks - w * classes)

                    def operands(k, slot):
                        @pl.when(classes > most)
                        def _():
                            spread(k)
                            plgpu.commit_smem()

                        return ring.at[slot].transpose((1, 0)), of_class(k).transpose((1, 0))

                    delta = sum_products((LANES, room * WINDOW), num_chunks, taken, operands)
                    delta = delta * item.scale
                    left = _pick(out_blocks, item.target) - w * WINDOW
                    if ragged:
                        block = plgpu.broadcasted_iota(
                            jnp.int32, (LANES, room * WINDOW), 1, layout=WGMMA
                        )
                        delta = jnp.where(lax.rem(block, WINDOW) < left, delta, 0.0)
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # two places take turns
                    first = pl.multiple_of(lax.rem(w, 2) * (room * WINDOW), WINDOW)
                    staged = ys.at[pl.ds(first, room * WINDOW)]
                    _store(staged.transpose((1, 0)), delta.astype(dtype), optimized=aligned)
                    plgpu.commit_smem()
                    at = _pick(places, item.target) + w * WINDOW

                    def write(t):
                        staged = ys.at[pl.ds(first + t * WINDOW, WINDOW)]
                        _add(staged, y, item.tokens[t], at, left)

                    each_token(item, room, write)
                    plgpu.commit_smem_to_gmem_group()
                    return taken + num_chunks

                lax.fori_loop(item.first_window, item.end_window, expand_window, taken)

            def compute_item(turn, item, taken):
                classes = lax.div(item.rank, WINDOW)
                a_chunks, b_chunks = _ceil_div(item.a_rows, CHUNK), _ceil_div(item.b_rows, CHUNK)
                first_b = item.first_window * classes
                end_b = jnp.minimum(item.end_window * classes, b_chunks)
                pl.when(item.count == 1)(lambda: compute(item, taken, 1))
                if size > 1:
                    pl.when(item.count > 1)(lambda: compute(item, taken, size))
                return taken + a_chunks + jnp.maximum(end_b - first_b, 0)

            each_item(compute_item, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    tiles = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    plgpu.kernel(
        body,
        out_type=(),
        grid=(programs,),
        grid_names=("program",),
        num_threads=2,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((stages, CHUNK, LANES), dtype, transforms=tiles),
            plgpu.SMEM((x_windows, columns, LANES), dtype, transforms=tiles),
            plgpu.SMEM((kept * WINDOW, CHUNK), dtype, transforms=tiles),
            plgpu.SMEM((2 * columns, LANES), dtype, transforms=tiles if aligned else ()),
            plgpu.SMEM((SUMS, WINDOW), jnp.float32),
            plgpu.SMEM((TOTALS, WINDOW), jnp.float32),
            plgpu.Barrier(num_arrivals=BOXES, num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=x_windows, num_barriers=size),
            plgpu.Barrier(),
        ],
    )(segments, num_segments, pages, scaling, layer, x, pool, y_ref)
