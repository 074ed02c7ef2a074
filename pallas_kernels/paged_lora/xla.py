"""Paged LoRA in plain XLA, for CPU and whatever has no kernel of its own.

Each token multiplies with its own adapter's rows where they lie in the pool, eight ranks at a time,
in two fused loops that copy no page (Punica's BGMV, without its padding to one rank). So a token's
bits depend on nobody else's adapter. Work follows the tokens and the step's largest rank, not the
bucket. README.md beside this file says what was measured, and what did not pay. Knows no layers:
each call is one group of targets.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.layout import GROUPS, LANES, MAX_RANK, RANK_MULTIPLE, TARGETS, AdapterLayout
from pallas_kernels.paged_lora.batch import LoraBatch

UNROLL = 16
"""Column blocks in one fused loop of a shrink; longer inputs take several."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """For each token, where its own adapter lies; U = min(rank_bucket, 256) / 8 units of ranks."""

    a_rows: tuple[jax.Array, ...]
    """Per group i32[U, T, targets, input blocks]: the row of each unit's first rank, of the pool
    seen as rows of the input's ``_width``."""

    b_rows: tuple[jax.Array, ...]
    """Per group i32[U, T, output blocks], targets side by side, of the outputs' ``_width``."""

    rank: jax.Array
    """i32[T, 7]."""

    scaling: jax.Array
    """f32[L, T, 7]."""

    trips: jax.Array
    """i32[groups]: units of the largest rank that a token of the step has."""


def prepare(batch: LoraBatch, layout: AdapterLayout) -> Plan:
    """See ``api.prepare``."""
    index = batch.adapter_index
    rank = batch.rank[index]  # [T, 7]
    units = max(1, min(batch.rank_bucket, MAX_RANK) // RANK_MULTIPLE)
    # What units past a token's rank read: row 0 of the step's largest adapter, as finite as any.
    anyone = batch.page_start[jnp.argmax(jnp.max(batch.rank, axis=1))]

    def rows(first_row: jax.Array, target: int, features: int, width: int) -> jax.Array:
        """i32[U, T, blocks]: where each column block of a unit's first rank lies in the pool."""
        split = LANES // width
        per_page = layout.rows_per_page * split
        unit = RANK_MULTIPLE * jnp.arange(units, dtype=jnp.int32)[:, None, None]
        block = jnp.arange(-(-features // width), dtype=jnp.int32)[None, None, :]
        own = rank[None, :, target, None]
        row = first_row[index, target][None, :, None] + block // split * own + unit
        row = jnp.where(unit < own, row * split + block % split, 0)
        start = jnp.where(unit < own, batch.page_start[index][None, :, None], anyone)
        page = batch.pages.at[start + row // per_page].get(mode="promise_in_bounds")
        return page * per_page + row % per_page

    a_rows, b_rows, trips = [], [], []
    for group in GROUPS:
        targets = [TARGETS.index(name) for name in group]
        inputs = layout.in_features[targets[0]]
        outputs = tuple(layout.out_features[t] for t in targets)
        of_a = [rows(batch.a_row, t, inputs, _width((inputs,))) for t in targets]
        of_b = [rows(batch.b_row, t, layout.out_features[t], _width(outputs)) for t in targets]
        a_rows.append(jnp.stack(of_a, axis=2))
        b_rows.append(jnp.concatenate(of_b, axis=2))
        trips.append(jnp.max(rank[:, targets[0] : targets[-1] + 1]) // RANK_MULTIPLE)
    return Plan(tuple(a_rows), tuple(b_rows), rank, batch.scaling[:, index, :], jnp.stack(trips))


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
    number = GROUPS.index(group)
    targets = [TARGETS.index(name) for name in group]
    these = slice(targets[0], targets[-1] + 1)
    return _group_term(
        y,
        x,
        pool_layer,
        plan.a_rows[number],
        plan.b_rows[number],
        plan.rank[:, these],
        plan.scaling[layer][:, these],
        plan.trips[number],
        inputs=(layout.in_features[targets[0]],),
        outputs=tuple(layout.out_features[these]),
    )


# One traced function for all layers: tracing and lowering 30 layers takes 0.5 s instead of 4.
@functools.partial(jax.jit, static_argnames=("inputs", "outputs"))
def _group_term(
    y: jax.Array,
    x: jax.Array,
    pool_layer: jax.Array,
    a_rows: jax.Array,
    b_rows: jax.Array,
    rank: jax.Array,
    scaling: jax.Array,
    trips: jax.Array,
    *,
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
) -> jax.Array:
    """``y`` plus the term of one group; arguments as Plan has them for the group."""
    in_width, out_width = _width(inputs), _width(outputs)
    a_pool, b_pool = pool_layer.reshape(-1, in_width), pool_layer.reshape(-1, out_width)
    a_step, b_step = LANES // in_width, LANES // out_width  # from one rank's row to the next one's
    target_of_block = np.repeat(np.arange(len(outputs)), [-(-f // out_width) for f in outputs])
    x_blocks = _to_blocks(x.astype(jnp.float32), inputs)  # [T, J, in_width]
    y_blocks = _to_blocks(y.astype(jnp.float32), outputs)  # [T, O, out_width]
    k = jnp.arange(RANK_MULTIPLE, dtype=jnp.int32)
    ones = jnp.ones((in_width, 1), jnp.float32)

    def shrink(rows: jax.Array, x_blocks: jax.Array) -> jax.Array:
        """Σ over J ≤ UNROLL blocks: [T, targets, J], [T, J, width] → [T, targets, 8, width]."""
        rows = rows[..., None] + (k * a_step)[None, None, None, :]
        total = jnp.zeros((), jnp.float32)
        for block in range(x_blocks.shape[1]):
            a = _rows(a_pool, jax.lax.index_in_dim(rows, block, 2, keepdims=False))
            column = jax.lax.index_in_dim(x_blocks, block, 1, keepdims=False)
            term = jax.lax.broadcast_in_dim(column, a.shape, (0, 3)) * a.astype(jnp.float32)
            total = term if block == 0 else total + term
        return total

    def add_unit(unit: jax.Array, y_blocks: jax.Array) -> jax.Array:
        rows = jax.lax.dynamic_index_in_dim(a_rows, unit, keepdims=False)
        partial = _sum_of_chunks(shrink, rows, x_blocks)
        # The last sum as a dot: XLA's CPU backend adds the terms of a reduction one by one.
        hidden = jax.lax.dot_general(
            partial.reshape(-1, in_width),
            ones,
            (((1,), (0,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
        ).reshape(partial.shape[:3])
        owned = (unit * RANK_MULTIPLE + k)[None, None, :] < rank[:, :, None]
        hidden = jnp.where(owned, hidden * scaling[:, :, None], 0.0)  # [T, targets, 8]
        hidden = hidden[:, target_of_block]
        rows = jax.lax.dynamic_index_in_dim(b_rows, unit, keepdims=False)
        total = jnp.zeros((), jnp.float32)
        for number in range(RANK_MULTIPLE):
            b = _rows(b_pool, rows + number * b_step)  # [T, O, out_width]
            column = jax.lax.index_in_dim(hidden, number, 2, keepdims=False)
            term = jax.lax.broadcast_in_dim(column, b.shape, (0, 1)) * b.astype(jnp.float32)
            total = term if number == 0 else total + term
        return y_blocks + total

    y_blocks = jax.lax.fori_loop(0, trips, add_unit, y_blocks)
    return _from_blocks(y_blocks, outputs).astype(y.dtype)


def _rows(pool: jax.Array, rows: jax.Array) -> jax.Array:
    """``pool[rows]`` for rows in bounds: one operation, where indexing emits eight."""
    return jax.lax.gather(
        pool,
        rows[..., None],
        jax.lax.GatherDimensionNumbers(
            offset_dims=(rows.ndim,), collapsed_slice_dims=(0,), start_index_map=(0,)
        ),
        slice_sizes=(1, pool.shape[1]),
        mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )


def _sum_of_chunks(shrink, rows: jax.Array, x_blocks: jax.Array) -> jax.Array:
    """``shrink`` over all column blocks, at most UNROLL at a time."""
    num_blocks = x_blocks.shape[1]
    if num_blocks <= UNROLL:
        return shrink(rows, x_blocks)
    short = -num_blocks % UNROLL
    # Blocks that are not there repeat the last one's rows, times zeros.
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, short)), mode="edge")
    x_blocks = jnp.pad(x_blocks, ((0, 0), (0, short), (0, 0)))

    def add_chunk(chunk: jax.Array, total: jax.Array) -> jax.Array:
        some_rows = jax.lax.dynamic_slice_in_dim(rows, chunk * UNROLL, UNROLL, axis=2)
        some_x = jax.lax.dynamic_slice_in_dim(x_blocks, chunk * UNROLL, UNROLL, axis=1)
        return total + shrink(some_rows, some_x)

    shape = (*rows.shape[:2], RANK_MULTIPLE, x_blocks.shape[2])
    chunks = (num_blocks + short) // UNROLL
    return jax.lax.fori_loop(0, chunks, add_chunk, jnp.zeros(shape, jnp.float32))


def _width(features: tuple[int, ...]) -> int:
    """Lanes of a column block: 64 where that spares padding (576 = 9 * 64), else 128."""
    halves = all(f % 64 == 0 for f in features) and any(f % LANES for f in features)
    return 64 if halves else LANES


def _to_blocks(values: jax.Array, features: tuple[int, ...]) -> jax.Array:
    """[T, sum of features] → [T, blocks, width], each of the features zero-padded to whole
    blocks."""
    width = _width(features)
    if any(f % width for f in features):
        parts = jnp.split(values, np.cumsum(features[:-1]).tolist(), axis=1)
        padded = [
            jnp.pad(part, ((0, 0), (0, -f % width)))
            for part, f in zip(parts, features, strict=True)
        ]
        values = jnp.concatenate(padded, axis=1)
    return values.reshape(values.shape[0], -1, width)


def _from_blocks(values: jax.Array, features: tuple[int, ...]) -> jax.Array:
    """The inverse of ``_to_blocks``."""
    width = _width(features)
    values = values.reshape(values.shape[0], -1)
    if not any(f % width for f in features):
        return values
    ends = np.cumsum([-(-f // width) * width for f in features]).tolist()
    parts = jnp.split(values, ends[:-1], axis=1)
    return jnp.concatenate([p[:, :f] for p, f in zip(parts, features, strict=True)], axis=1)
