"""Paged LoRA in plain XLA, for CPU and whatever has no kernel of its own.

Owns two ways and the choice between them by the batch's static sizes. Few tokens (decode): each
token multiplies with its own adapter's rows where they lie in the pool, eight ranks at a time, in two
fused loops that copy nothing (Punica's BGMV). Many tokens (prefill): windows of tokens by blocks of
ranks, rows gathered and multiplied densely where a token of the window owns a rank of the block
(SGMV). Both do the work that the step holds, not what its bucket could hold. README.md beside this
file says what was measured. Knows no layers: every call is one group of targets.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.layout import GROUPS, LANES, MAX_RANK, RANK_MULTIPLE, TARGETS, AdapterLayout
from pallas_kernels.paged_lora.batch import LoraBatch

PER_TOKEN_LIMIT = 64
"""Up to as many tokens a step, each reads its own adapter; beyond, windows by blocks cost less."""

WINDOW = 64
"""Tokens of one dense product."""

BLOCK = 32
"""Ranks of one dense product."""

UNROLL = 16
"""Column blocks in one fused loop of a shrink; longer inputs take several."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerTokenPlan:
    """For each token, where its own adapter lies; U = min(rank_bucket, 256) / 8 units of ranks."""

    a_rows: tuple[jax.Array, ...]
    """Per group i32[U, T, targets, input blocks]: the row of each unit's first rank, of the pool seen
    as rows of the input's ``_width``."""

    b_rows: tuple[jax.Array, ...]
    """Per group i32[U, T, output blocks], targets side by side, of the outputs' ``_width``."""

    rank: jax.Array
    """i32[T, 7]."""

    scaling: jax.Array
    """f32[L, T, 7]."""

    trips: jax.Array
    """i32[groups]: units of the largest rank that a token has."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DensePlan:
    """Rank slots, adapter after adapter, in blocks; and the (block, window) pairs that meet.

    An adapter has as many slots as its largest target rank. NB blocks, NW windows.
    """

    a_rows: tuple[jax.Array, ...]
    """Per group i32[NB, targets * BLOCK * input blocks], as rows of the input's ``_width``."""

    b_rows: tuple[jax.Array, ...]
    """Per target i32[NB, BLOCK * output blocks], of the outputs' ``_width``."""

    owner: jax.Array
    """i32[NB, 7, BLOCK]: table row of the adapter whose rank this is; -1 where the target has none."""

    scaling: jax.Array
    """f32[L, NB, 7, BLOCK]."""

    adapter_index: jax.Array
    """i32[T]."""

    pairs: jax.Array
    """i32[NB * NW, 2]: block and first token of each pair, the first ``trips`` of them real."""

    trips: jax.Array
    """i32[]."""


Plan = PerTokenPlan | DensePlan


def prepare(batch: LoraBatch, layout: AdapterLayout) -> Plan:
    """See ``api.prepare``."""
    if batch.adapter_index.shape[0] <= PER_TOKEN_LIMIT:
        return _prepare_per_token(batch, layout)
    return _prepare_dense(batch, layout)


def paged_lora(
    y: jax.Array,
    x: jax.Array,
    pool_layer: jax.Array,
    plan: Plan,
    *,
    layer: int,
    group: tuple[str, ...],
    layout: AdapterLayout,
) -> jax.Array:
    """See ``api.paged_lora``."""
    number = GROUPS.index(group)
    targets = [TARGETS.index(name) for name in group]
    these = slice(targets[0], targets[-1] + 1)
    inputs = (layout.in_features[targets[0]],)
    outputs = tuple(layout.out_features[these])
    if isinstance(plan, PerTokenPlan):
        return _per_token(
            y,
            x,
            pool_layer,
            plan.a_rows[number],
            plan.b_rows[number],
            plan.rank[:, these],
            plan.scaling[layer][:, these],
            plan.trips[number],
            inputs=inputs,
            outputs=outputs,
        )
    return _dense(
        y,
        x,
        pool_layer,
        plan.a_rows[number],
        plan.b_rows[these],
        plan.owner[:, these],
        plan.scaling[layer][:, these],
        plan.adapter_index,
        plan.pairs,
        plan.trips,
        inputs=inputs,
        outputs=outputs,
    )


# One traced function for all layers: tracing and lowering 30 layers takes 0.5 s instead of 4.
@functools.partial(jax.jit, static_argnames=("inputs", "outputs"))
def _per_token(
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
    """``y`` plus the term of one group; arguments as PerTokenPlan has them for the group."""
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


@functools.partial(jax.jit, static_argnames=("inputs", "outputs"))
def _dense(
    y: jax.Array,
    x: jax.Array,
    pool_layer: jax.Array,
    a_rows: jax.Array,
    b_rows: tuple[jax.Array, ...],
    owner: jax.Array,
    scaling: jax.Array,
    adapter_index: jax.Array,
    pairs: jax.Array,
    trips: jax.Array,
    *,
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
) -> jax.Array:
    """``y`` plus the term of one group; arguments as DensePlan has them for the group."""
    num_tokens = x.shape[0]
    in_width, out_width = _width(inputs), _width(outputs)
    a_pool, b_pool = pool_layer.reshape(-1, in_width), pool_layer.reshape(-1, out_width)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    x = _to_blocks(x, inputs).reshape(num_tokens, -1)
    total = _to_blocks(y.astype(jnp.float32), outputs).reshape(num_tokens, -1)
    starts = np.cumsum([0] + [-(-f // out_width) * out_width for f in outputs])

    def add_pair(number: jax.Array, total: jax.Array) -> jax.Array:
        block, token = pairs[number, 0], pairs[number, 1]
        # The last window may reach past the end: it starts earlier then, and skips what was before.
        first = jnp.minimum(token, num_tokens - WINDOW)
        rows = jax.lax.dynamic_index_in_dim(a_rows, block, keepdims=False)
        a = _rows(a_pool, rows).reshape(len(outputs) * BLOCK, -1)
        hidden = jax.lax.dot_general(
            jax.lax.dynamic_slice_in_dim(x, first, WINDOW),
            a,
            (((1,), (1,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        ).reshape(WINDOW, len(outputs), BLOCK)
        index = jax.lax.dynamic_slice_in_dim(adapter_index, first, WINDOW)
        index = jnp.where(first + jnp.arange(WINDOW, dtype=jnp.int32) >= token, index, -2)
        owned = index[:, None, None] == jax.lax.dynamic_index_in_dim(owner, block)
        scale = jax.lax.dynamic_index_in_dim(scaling, block)
        hidden = jnp.where(owned, hidden * scale, 0.0).astype(x.dtype)
        for target, rows_of_target in enumerate(b_rows):
            rows = jax.lax.dynamic_index_in_dim(rows_of_target, block, keepdims=False)
            delta = jax.lax.dot_general(
                hidden[:, target],
                _rows(b_pool, rows).reshape(BLOCK, -1),
                (((1,), (0,)), ((), ())),
                precision=precision,
                preferred_element_type=jnp.float32,
            )
            corner = (first, jnp.int32(starts[target]))
            old = jax.lax.dynamic_slice(total, corner, delta.shape)
            total = jax.lax.dynamic_update_slice(total, old + delta, corner)
        return total

    total = jax.lax.fori_loop(0, trips, add_pair, total)
    return _from_blocks(total.reshape(num_tokens, -1, out_width), outputs).astype(y.dtype)


def _prepare_per_token(batch: LoraBatch, layout: AdapterLayout) -> PerTokenPlan:
    index = batch.adapter_index
    rank = batch.rank[index]  # [T, 7]
    units = max(1, min(batch.rank_bucket, MAX_RANK) // RANK_MULTIPLE)
    unit = RANK_MULTIPLE * jnp.arange(units, dtype=jnp.int32)[:, None]  # [U, 1]

    def rows(first_row: jax.Array, target: int, features: int, width: int) -> jax.Array:
        """i32[U, T, blocks]."""
        own = jnp.broadcast_to(rank[None, :, target], (units, index.shape[0]))
        row = first_row[index, target][None, :] + unit
        start = jnp.broadcast_to(batch.page_start[index][None, :], own.shape)
        return _pool_rows(batch, layout, row, start, own, unit < own, features, width)

    a_rows, b_rows, trips = [], [], []
    for group in GROUPS:
        targets = [TARGETS.index(name) for name in group]
        inputs = layout.in_features[targets[0]]
        outputs = tuple(layout.out_features[t] for t in targets)
        a_rows.append(
            jnp.stack([rows(batch.a_row, t, inputs, _width((inputs,))) for t in targets], axis=2)
        )
        b_rows.append(
            jnp.concatenate(
                [rows(batch.b_row, t, layout.out_features[t], _width(outputs)) for t in targets],
                axis=2,
            )
        )
        trips.append(jnp.max(rank[:, targets[0] : targets[-1] + 1]) // RANK_MULTIPLE)
    return PerTokenPlan(
        tuple(a_rows), tuple(b_rows), rank, batch.scaling[:, index, :], jnp.stack(trips)
    )


def _prepare_dense(batch: LoraBatch, layout: AdapterLayout) -> DensePlan:
    index = batch.adapter_index
    num_tokens = index.shape[0]
    num_blocks = max(1, -(-batch.rank_bucket // BLOCK))
    slot = jnp.arange(num_blocks * BLOCK, dtype=jnp.int32)
    largest = jnp.max(batch.rank, axis=1)  # [N]
    end = jnp.cumsum(largest)
    # Table row that owns each slot; slots past the last adapter's get some row, at a rank it lacks.
    row_of_slot = jnp.sum(slot[:, None] >= end[None, :], axis=1, dtype=jnp.int32)
    row_of_slot = jnp.minimum(row_of_slot, end.shape[0] - 1)
    k = slot - (end - largest)[row_of_slot]
    rank = batch.rank[row_of_slot]  # [S, 7]
    owned = k[:, None] < rank

    def rows(first_row: jax.Array, target: int, features: int, width: int) -> jax.Array:
        """i32[NB, BLOCK * blocks]."""
        row, start = first_row[row_of_slot, target] + k, batch.page_start[row_of_slot]
        own = owned[:, target]
        found = _pool_rows(batch, layout, row, start, rank[:, target], own, features, width)
        return found.reshape(num_blocks, -1)

    a_rows, b_rows = [], []
    for group in GROUPS:
        targets = [TARGETS.index(name) for name in group]
        inputs = layout.in_features[targets[0]]
        outputs = tuple(layout.out_features[t] for t in targets)
        a_rows.append(
            jnp.concatenate(
                [rows(batch.a_row, t, inputs, _width((inputs,))) for t in targets], axis=1
            )
        )
        b_rows += [rows(batch.b_row, t, layout.out_features[t], _width(outputs)) for t in targets]

    def by_block(values: jax.Array) -> jax.Array:
        """[..., S, 7] → [..., NB, 7, BLOCK]."""
        return jnp.swapaxes(values.reshape(*values.shape[:-2], num_blocks, BLOCK, 7), -1, -2)

    # A window meets a block where a token's slots, [end - largest, end), reach into the block.
    first = np.arange(0, num_tokens, WINDOW, dtype=np.int32)
    padded = jnp.pad(index, (0, len(first) * WINDOW - num_tokens)).reshape(1, len(first), WINDOW)
    low = BLOCK * jnp.arange(num_blocks, dtype=jnp.int32)[:, None, None]
    reaches = ((end - largest)[padded] < low + BLOCK) & (end[padded] > low)
    meets = jnp.any(reaches & (largest[padded] > 0), axis=2)  # [NB, NW]
    size = num_blocks * len(first)
    block, window = jnp.nonzero(meets, size=size, fill_value=0)
    return DensePlan(
        tuple(a_rows),
        tuple(b_rows),
        by_block(jnp.where(owned, row_of_slot[:, None], -1)),
        by_block(batch.scaling[:, row_of_slot]),
        index,
        jnp.stack([block, window * WINDOW], axis=1).astype(jnp.int32),
        jnp.sum(meets, dtype=jnp.int32),
    )


def _pool_rows(
    batch: LoraBatch,
    layout: AdapterLayout,
    row: jax.Array,
    start: jax.Array,
    rank: jax.Array,
    owned: jax.Array,
    features: int,
    width: int,
) -> jax.Array:
    """[..., blocks]: where the column blocks of one rank lie in the pool seen as rows of ``width``.

    ``row`` is the rank's row of column block 0 within an adapter whose pages start at ``start``. Not
    owned: row 0 of the adapter with the largest rank, which is finite where any adapter is there.
    """
    split = LANES // width
    per_page = layout.rows_per_page * split
    block = np.arange(-(-features // width), dtype=np.int32)
    column, part = (jnp.asarray(b).reshape((1,) * row.ndim + (-1,)) for b in divmod(block, split))
    somewhere = batch.page_start[jnp.argmax(jnp.max(batch.rank, axis=1))]
    start = jnp.where(owned, start, somewhere)[..., None]
    row = (row[..., None] + column * rank[..., None]) * split + part
    row = jnp.where(owned[..., None], row, 0)
    page = batch.pages.at[start + row // per_page].get(mode="promise_in_bounds")
    return page * per_page + row % per_page


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
    """[T, sum of features] → [T, blocks, width], each of the features zero-padded to whole blocks."""
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
