"""Paged LoRA on TPU (v5e, v6e; Pallas, Mosaic TPU). Estimated and interpreted, never run.

Tokens are sorted by adapter. An item is one target of a few adapters of one class of rank, and up
to eight tokens of each; adapters with more tokens take several items (rounds) in a row, over rows
that are read once. One program a item, its copies started two items ahead: each adapter's A and
Bᵀ as runs of consecutive rows of pages, its tokens' x one by one from where they lie, and each
token's term to where it belongs; nothing is gathered by XLA. Shrink and expand are fused by the
block-diagonal trick: 16 column blocks of x, as rows, meet the 16 r rows of A of these blocks in
one product, of which only a block's own r columns count; their sum, h, is laid out block-diagonally
and meets the rows of Bᵀ likewise. So A and Bᵀ are used as they lie, for any rank. With
several tokens a row is (block, token) instead; both forms add in the same order, so that a token's
bits do not depend on how many share its adapter.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.layout import GROUPS, LANES, MAX_RANK, RANK_MULTIPLE, TARGETS, AdapterLayout
from pallas_kernels.paged_lora.batch import LoraBatch
from pallas_kernels.tpu import VMEM_BYTES, check_support, dot

__all__ = ["check_support", "decode", "paged_lora", "prepare"]

CLASSES = (8, 16, 32, 64, 128, 256)
"""Ranks that have code of their own; others lie in VMEM as the next of them, with zeros between."""

SLOTS = 8
"""Tokens of one adapter at a time: the sublanes of a register."""

PARALLEL_RANKS = 128
"""Adapters of small ranks are computed together, until their ranks sum to this: one alone is a
chain of dependent steps longer than the time its bytes take."""

BLOCK_MULTIPLE = 16
"""Blocks of x and y are padded to this, the blocks in 128 rows of rank 8."""

DEPTH = 3
"""Items whose copies are under way: one takes less time than a copy's latency."""

Y_DEPTH = 2
"""Items whose terms are on their way out, the one being computed included."""

ITEM_FIELDS = 6  # class, target's place in the group, first member, members, round, buffer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """The step's work: for each group of targets, items of up to eight tokens of some adapters."""

    batch: LoraBatch

    tokens: jax.Array
    """i32[T]: tokens sorted by adapter."""

    first_token: jax.Array
    """i32[N]: where each adapter's begin in ``tokens``."""

    num_tokens: jax.Array
    """i32[N]."""

    members: jax.Array
    """i32[7, N]: for each target its adapters with tokens, by class of rank."""

    items: tuple[jax.Array, ...]
    """Per group i32[I * ITEM_FIELDS]."""

    num_items: jax.Array
    """i32[groups]."""


def _chunk_rows(rank: int) -> int:
    """Rows of A or Bᵀ a product with several tokens: 16 blocks of rank 8, else v6e's 256 rows."""
    return LANES if rank == RANK_MULTIPLE else 2 * LANES


def in_parallel(rank: int) -> int:
    """Adapters of an item."""
    return max(1, PARALLEL_RANKS // rank)


def _classes(rank_bucket: int) -> tuple[int, ...]:
    """The classes that adapters of this bucket can have."""
    largest = max(RANK_MULTIPLE, min(rank_bucket, MAX_RANK))
    return tuple(rank for rank in CLASSES if rank // 2 < largest)


def prepare(batch: LoraBatch, layout: AdapterLayout) -> Plan:
    """See ``api.prepare``."""
    num_adapters, num_tokens = batch.rank.shape[0], batch.adapter_index.shape[0]
    index = jnp.arange(num_adapters, dtype=jnp.int32)
    counts = jnp.sum(batch.adapter_index[None, :] == index[:, None], axis=1, dtype=jnp.int32)
    first_token = jnp.cumsum(counts) - counts
    tokens = jnp.argsort(batch.adapter_index, stable=True).astype(jnp.int32)
    rounds = -(-counts // SLOTS)

    limits = jnp.array(CLASSES, jnp.int32)
    num_classes = len(CLASSES)
    rank = batch.rank.T  # [7, N]
    of_rank = jnp.sum(rank[:, :, None] > limits[None, None, :], axis=2, dtype=jnp.int32)
    of_rank = jnp.where((rank > 0) & (counts > 0)[None, :], of_rank, num_classes)
    # Members of a class stand together, those with most tokens first.
    key = of_rank * (num_tokens + 1) - counts[None, :]
    members = jnp.argsort(key, axis=1).astype(jnp.int32)
    of_rank = jnp.take_along_axis(of_rank, members, axis=1)
    rounds = jnp.where(of_rank < num_classes, rounds[members], 0)

    parallel = jnp.array([*map(in_parallel, CLASSES), 1], jnp.int32)
    in_class = jnp.sum(
        of_rank[:, None, :] == jnp.arange(num_classes + 1, dtype=jnp.int32)[None, :, None],
        axis=2,
        dtype=jnp.int32,
    )
    class_start = jnp.cumsum(in_class, axis=1) - in_class  # [7, classes + 1]
    place = index[None, :] - jnp.take_along_axis(class_start, of_rank, axis=1)
    width = parallel[of_rank]
    leads = place % width == 0
    in_reach = jnp.take_along_axis(in_class, of_rank, axis=1) - place
    size = jnp.minimum(width, in_reach)
    items_of = jnp.where(leads, rounds, 0)  # [7, N]

    items, num_items = [], []
    bound = min(num_tokens, num_adapters - 1 + num_tokens // SLOTS)
    for group in GROUPS:
        targets = [TARGETS.index(name) for name in group]
        these = slice(targets[0], targets[-1] + 1)
        ends = jnp.cumsum(items_of[these].reshape(-1))
        item = jnp.arange(max(1, bound * len(group)), dtype=jnp.int32)
        owner = jnp.sum(ends[None, :] <= item[:, None], axis=1, dtype=jnp.int32)
        owner = jnp.minimum(owner, ends.shape[0] - 1)
        fields = [
            of_rank[these].reshape(-1)[owner],
            owner // num_adapters,
            owner % num_adapters,
            size[these].reshape(-1)[owner],
            item - (ends - items_of[these].reshape(-1))[owner],
            (jnp.cumsum(items_of[these].reshape(-1) > 0, dtype=jnp.int32) % DEPTH)[owner],
        ]
        items.append(jnp.stack(fields, axis=1).reshape(-1))
        num_items.append(ends[-1])
    return Plan(batch, tokens, first_token, counts, members, tuple(items), jnp.stack(num_items))


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
    batch, number = plan.batch, GROUPS.index(group)
    targets = [TARGETS.index(name) for name in group]
    these = slice(targets[0], targets[-1] + 1)
    delta = decode(
        _to_blocks(x, BLOCK_MULTIPLE),
        pool_layer,
        plan.num_items[number].reshape(1),
        plan.items[number],
        plan.members[these].reshape(-1),
        plan.tokens,
        plan.first_token,
        plan.num_tokens,
        batch.pages,
        batch.page_start,
        batch.rank[:, these].T.reshape(-1),
        batch.a_row[:, these].T.reshape(-1),
        batch.b_row[:, these].T.reshape(-1),
        batch.scaling[layer][:, these].T.reshape(-1),
        in_blocks=layout.in_blocks[targets[0]],
        out_blocks=tuple(layout.out_blocks[these]),
        classes=_classes(batch.rank_bucket),
    )
    terms, first = [], 0
    for target in targets:
        features = layout.out_features[target]
        blocks = layout.out_blocks[target]
        part = delta[:, first : first + blocks].reshape(len(y), -1)[:, :features]
        adapted = batch.rank[batch.adapter_index, target] > 0
        terms.append(jnp.where(adapted[:, None], part, 0.0))
        first += _padded(blocks, 8)
    return (y.astype(jnp.float32) + jnp.concatenate(terms, axis=1)).astype(y.dtype)


def _padded(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _to_blocks(x: jax.Array, multiple: int) -> jax.Array:
    """[T, C] → [T, blocks, 128], zeros behind C, blocks padded to a multiple."""
    columns = _padded(x.shape[1], multiple * LANES)
    return jnp.pad(x, ((0, 0), (0, columns - x.shape[1]))).reshape(len(x), -1, LANES)


def _kernel(
    num_items: Any,
    items: Any,
    members: Any,
    tokens: Any,
    first_token: Any,
    num_tokens: Any,
    pages: Any,
    page_start: Any,
    rank_of: Any,
    a_row: Any,
    b_row: Any,
    scaling: Any,
    x: Any,  # HBM [T, x blocks, 128]
    pool: Any,  # HBM [P * R, 128]
    out: Any,  # HBM f32[T, y blocks, 128]
    weights: Any,  # [DEPTH, rows, 128]
    x_in: Any,  # [DEPTH, U * SLOTS, x blocks, 128]
    x_rows: Any,  # f32[U, x blocks * SLOTS, 128]
    y_rows: Any,  # f32[U, y blocks * SLOTS, 128]
    y_out: Any,  # f32[Y_DEPTH, U * SLOTS, y blocks, 128]
    rows_arrived: Any,
    x_arrived: Any,
    y_left: Any,
    *,
    rows_per_page: int,
    in_blocks: int,
    out_blocks: tuple[int, ...],
    classes: tuple[int, ...],
    fixed: tuple[int, int] | None,
) -> None:
    num_adapters = first_token.shape[0]
    x_blocks = x.shape[1]
    y_blocks = _padded(max(out_blocks), BLOCK_MULTIPLE)
    total = num_items[0] if fixed is None else fixed[0]
    sent = [_padded(blocks, 8) for blocks in out_blocks]

    def of_target(values: list[int] | tuple[int, ...], place: jax.Array) -> Any:
        """``values[place]`` of Python numbers."""
        result: Any = values[0]
        for index, value in enumerate(values[1:], start=1):
            if value != values[0] or not isinstance(result, int):
                result = jnp.where(place == index, value, result)
        return result

    def field(item: Any, number: int) -> Any:
        return items[item * ITEM_FIELDS + number]

    def buffer_of(item: Any) -> Any:
        return field(item, 5) if fixed is None else jax.lax.rem(item, DEPTH)

    def kind_of(item: Any) -> Any:
        return field(item, 0) if fixed is None else fixed[1]

    def for_members(item: Any, act: Any) -> None:
        """``act(u, adapter, its place in the tables of ranks and rows)``."""
        target, first = field(item, 1), field(item, 2)

        def of_member(u: Any) -> None:
            adapter = members[target * num_adapters + first + u]
            act(u, adapter, target * num_adapters + adapter)

        if fixed is None:
            pl.loop(0, field(item, 3))(of_member)
        else:
            for u in range(num_tokens_of(item)):
                of_member(u)

    def for_tokens(item: Any, act: Any) -> None:
        """``act(u, slot, token)`` for each token of the item's round."""

        def of_member(u: Any, adapter: Any, _: Any) -> None:
            begin = field(item, 4) * SLOTS

            def of_token(slot: Any) -> None:
                act(u, slot, tokens[first_token[adapter] + begin + slot])

            if fixed is None:
                pl.loop(0, jnp.minimum(num_tokens[adapter] - begin, SLOTS))(of_token)
            else:
                of_token(0)

        for_members(item, of_member)

    def num_tokens_of(item: Any) -> Any:
        if fixed is not None:
            return in_parallel(classes[fixed[1]])

        def add(u: Any, total: Any) -> Any:
            adapter = members[field(item, 1) * num_adapters + field(item, 2) + u]
            return total + jnp.clip(num_tokens[adapter] - field(item, 4) * SLOTS, 0, SLOTS)

        return jax.lax.fori_loop(0, field(item, 3), add, 0)

    def rows_copy(page: Any, offset: Any, count: Any, buffer: Any, into: Any) -> Any:
        multiple = functools.partial(pl.multiple_of, values=RANK_MULTIPLE)
        count = count if isinstance(count, int) else multiple(count)
        return pltpu.make_async_copy(
            pool.at[pl.ds(multiple(page * rows_per_page + offset), count)],
            weights.at[buffer, pl.ds(multiple(into), count)],
            rows_arrived.at[buffer],
        )

    def copy_rows(adapter: Any, row: Any, count: Any, buffer: Any, into: Any) -> None:
        """Start the copies of consecutive rows of an adapter, page by page."""

        def piece(state: Any) -> Any:
            row, into, left = state
            page = pages[page_start[adapter] + jax.lax.div(row, rows_per_page)]
            offset = jax.lax.rem(row, rows_per_page)
            here = jnp.minimum(left, rows_per_page - offset)
            rows_copy(page, offset, here, buffer, into).start()
            return row + here, into + here, left - here

        if fixed is None:
            jax.lax.while_loop(lambda state: state[2] > 0, piece, (row, into, count))
            return
        for done in range(0, count, rows_per_page):  # as if it began with a page
            page = pages[page_start[adapter] + done // rows_per_page]
            here = min(rows_per_page, count - done)
            rows_copy(page, 0, here, buffer, into + done).start()

    def fetch_adapters(item: Any, rank: int) -> None:
        buffer = buffer_of(item)
        outputs = of_target(out_blocks, field(item, 1))

        def of_member(u: Any, adapter: Any, place: Any) -> None:
            into = u * (x_blocks + y_blocks) * rank
            own = rank_of[place] if fixed is None else rank
            for row, blocks, base in (
                (a_row[place], in_blocks, into),
                (b_row[place], outputs, into + x_blocks * rank),
            ):

                @pl.when(own == rank)
                def _(row: Any = row, blocks: Any = blocks, base: Any = base) -> None:
                    copy_rows(adapter, row, blocks * rank, buffer, base)

                if fixed is None and rank > RANK_MULTIPLE:

                    @pl.when(own != rank)
                    def _(row: Any = row, blocks: Any = blocks, base: Any = base) -> None:
                        @pl.loop(0, blocks)
                        def _(block: Any) -> None:
                            to = base + block * rank
                            copy_rows(adapter, row + block * own, own, buffer, to)

        for_members(item, of_member)

    def wait_for_adapters(item: Any, rank: int) -> None:
        """Also zeroes what lies between and behind the rows: nothing may be NaN there."""
        buffer = buffer_of(item)
        outputs = of_target(out_blocks, field(item, 1))

        def clear(first: Any, last: Any) -> None:
            @pl.loop(first // RANK_MULTIPLE, last // RANK_MULTIPLE)
            def _(unit: Any) -> None:
                row = pl.multiple_of(unit * RANK_MULTIPLE, RANK_MULTIPLE)
                zeros = jnp.zeros((RANK_MULTIPLE, LANES), weights.dtype)
                weights[buffer, pl.ds(row, RANK_MULTIPLE), :] = zeros

        def of_member(u: Any, adapter: Any, place: Any) -> None:
            del adapter
            own = rank_of[place] if fixed is None else rank
            rows_copy(0, 0, (in_blocks + outputs) * own, buffer, 0).wait()
            a_base = u * (x_blocks + y_blocks) * rank
            b_base = a_base + x_blocks * rank
            if in_blocks < x_blocks:
                clear(a_base + in_blocks * rank, b_base)
            if any(blocks % BLOCK_MULTIPLE for blocks in out_blocks):
                end = pl.cdiv(outputs, BLOCK_MULTIPLE) * BLOCK_MULTIPLE
                clear(b_base + outputs * rank, b_base + end * rank)
            if fixed is None and rank > RANK_MULTIPLE:

                @pl.when(own != rank)
                def _() -> None:
                    for blocks, base in ((in_blocks, a_base), (outputs, b_base)):

                        @pl.loop(0, blocks)
                        def _(block: Any, base: Any = base) -> None:
                            clear(base + block * rank + own, base + (block + 1) * rank)

        for_members(item, of_member)

    def by_class(item: Any, act: Any) -> None:
        for number, rank in enumerate(classes):
            if fixed is None:
                pl.when(kind_of(item) == number)(functools.partial(act, item, rank))
            elif fixed[1] == number:
                act(item, rank)

    def x_copy(item: Any, u: Any, slot: Any, token: Any) -> Any:
        place = jax.lax.rem(item, DEPTH)
        into = x_in.at[place, u * SLOTS + slot]
        return pltpu.make_async_copy(x.at[token], into, x_arrived.at[place])

    def wait_for_x(item: Any) -> None:
        place = jax.lax.rem(item, DEPTH)
        every = x_in.at[place, pl.ds(0, num_tokens_of(item))]
        pltpu.make_async_copy(every, every, x_arrived.at[place]).wait()

    def y_span(item: Any) -> tuple[Any, Any]:
        """(first block, blocks) of the item's target in ``out``."""
        place = field(item, 1)
        first = pl.multiple_of(of_target([sum(sent[:i]) for i in range(len(sent))], place), 8)
        count = of_target(sent, place)
        return first, count if isinstance(count, int) else pl.multiple_of(count, 8)

    def y_copy(item: Any, parity: Any, u: Any, slot: Any, token: Any) -> Any:
        first, count = y_span(item)
        return pltpu.make_async_copy(
            y_out.at[parity, u * SLOTS + slot, pl.ds(0, count)],
            out.at[token, pl.ds(first, count)],
            y_left.at[parity],
        )

    def fetch(item: Any) -> None:
        for_tokens(item, lambda *at: x_copy(item, *at).start())
        if fixed is None:
            pl.when(field(item, 4) == 0)(lambda: by_class(item, fetch_adapters))
        else:
            by_class(item, fetch_adapters)

    def compute(item: Any, rank: int) -> None:
        if fixed is not None:
            compute_one(item, rank)
            return
        first = members[field(item, 1) * num_adapters + field(item, 2)]
        single = num_tokens[first] - field(item, 4) * SLOTS == 1
        pl.when(single)(lambda: compute_one(item, rank))
        pl.when(jnp.logical_not(single))(lambda: compute_some(item, rank))

    def unit_row(u: int, of_b: bool, index: Any, rank: int) -> Any:
        """Where the rows of 16 blocks of one member's A or Bᵀ begin in ``weights``."""
        row = u * (x_blocks + y_blocks) * rank + of_b * x_blocks * rank
        row += index * BLOCK_MULTIPLE * rank
        return _multiple_of(row, LANES)

    def hidden_of(item: Any, u: int, rank: int, parts: list[jax.Array]) -> jax.Array:
        """x A, scaled, from the sums of each column block: the sum over blocks, in each of them.

        A part is [tokens, chunk rows]: lane ``block * rank + k`` holds what ``block`` gives to k.
        """
        total = functools.reduce(jnp.add, parts)
        folded = rank < total.shape[1] > LANES
        if folded:
            total = total[:, :LANES] + total[:, LANES:]
        shift = rank
        while shift < LANES:
            total += pltpu.roll(total, shift, 1)
            shift *= 2
        place = jnp.minimum(field(item, 2) + u, num_adapters - 1)
        adapter = members[field(item, 1) * num_adapters + place]
        total *= scaling[field(item, 1) * num_adapters + adapter]
        return jnp.concatenate([total, total], axis=1) if folded else total

    def out_trips(item: Any) -> Any:
        if fixed is not None:
            return y_blocks // BLOCK_MULTIPLE
        return pl.cdiv(of_target(out_blocks, field(item, 1)), BLOCK_MULTIPLE)

    def compute_one(item: Any, rank: int) -> None:
        """Members of one token each: rows are column blocks."""
        parity, buffer = jax.lax.rem(item, Y_DEPTH), buffer_of(item)
        place = jax.lax.rem(item, DEPTH)
        chunk_rows, unit = _chunk_rows(rank), BLOCK_MULTIPLE * rank
        parallel = range(in_parallel(rank))
        row = jax.lax.broadcasted_iota(jnp.int32, (BLOCK_MULTIPLE, unit), 0)
        own = jax.lax.broadcasted_iota(jnp.int32, (BLOCK_MULTIPLE, unit), 1) // rank == row

        def shrink(index: Any, sums: Any) -> Any:
            first = _multiple_of(index * BLOCK_MULTIPLE, BLOCK_MULTIPLE)
            return tuple(
                total
                + dot(
                    x_in[place, u * SLOTS, pl.ds(first, BLOCK_MULTIPLE), :],
                    weights[buffer, pl.ds(unit_row(u, False, index, rank), unit), :],
                    transposed=True,
                )
                for u, total in enumerate(sums)
            )

        sums = (jnp.zeros((BLOCK_MULTIPLE, unit), jnp.float32),) * len(parallel)
        sums = _loop(x_blocks // BLOCK_MULTIPLE, shrink, sums)
        hidden = []
        for u, total in enumerate(sums):
            mine = jnp.sum(jnp.where(own, total, 0.0), axis=0, keepdims=True)
            parts = [mine[:, i : i + chunk_rows] for i in range(0, unit, chunk_rows)]
            mine = jnp.concatenate([hidden_of(item, u, rank, parts)] * len(parts), axis=1)
            hidden.append(jnp.where(own, mine, 0.0).astype(weights.dtype))

        def expand(index: Any, _: Any) -> Any:
            first = _multiple_of(index * BLOCK_MULTIPLE, BLOCK_MULTIPLE)
            for u in parallel:
                rows = weights[buffer, pl.ds(unit_row(u, True, index, rank), unit), :]
                y_out[parity, u * SLOTS, pl.ds(first, BLOCK_MULTIPLE), :] = dot(hidden[u], rows)
            return 0

        _loop(out_trips(item), expand, 0)
        for_tokens(item, lambda *at: y_copy(item, parity, *at).start())

    def compute_some(item: Any, rank: int) -> None:
        """Up to eight tokens a member: rows are (column block, token)."""
        parity, buffer = jax.lax.rem(item, Y_DEPTH), buffer_of(item)
        place = jax.lax.rem(item, DEPTH)
        chunk_rows = _chunk_rows(rank)
        blocks = chunk_rows // rank  # column blocks in a chunk
        steps = BLOCK_MULTIPLE // blocks
        width = blocks * SLOTS
        parallel = range(in_parallel(rank))
        own_block = jax.lax.broadcasted_iota(jnp.int32, (SLOTS, chunk_rows), 1) // rank

        def chunk(u: int, of_b: bool, index: Any, step: int) -> jax.Array:
            row = unit_row(u, of_b, index, rank) + step * chunk_rows
            return weights[buffer, pl.ds(_multiple_of(row, LANES), chunk_rows), :]

        def rows_of(index: Any, step: int) -> Any:
            return pl.ds(_multiple_of((index * steps + step) * width, SLOTS), width)

        def spread(u: Any, slot: Any, _: Any) -> None:
            rows = x_in[place, u * SLOTS + slot].astype(jnp.float32)
            x_rows[u, pl.ds(slot, x_blocks, SLOTS), :] = rows

        for_tokens(item, spread)

        def shrink(index: Any, sums: Any) -> Any:
            sums = list(sums)
            for u in parallel:
                for step in range(steps):
                    rows = x_rows[u, rows_of(index, step), :].astype(weights.dtype)
                    product = dot(rows, chunk(u, False, index, step), transposed=True)
                    sums[u * steps + step] += product
            return tuple(sums)

        sums = (jnp.zeros((width, chunk_rows), jnp.float32),) * (len(parallel) * steps)
        sums = _loop(x_blocks // BLOCK_MULTIPLE, shrink, sums)
        hidden = []
        for u in parallel:
            parts = []
            for total in sums[u * steps : (u + 1) * steps]:
                mine = total[:SLOTS]
                for block in range(1, blocks):
                    here = total[block * SLOTS : (block + 1) * SLOTS]
                    mine = jnp.where(own_block == block, here, mine)
                parts.append(mine)
            mine = hidden_of(item, u, rank, parts)
            diagonal = [jnp.where(own_block == block, mine, 0.0) for block in range(blocks)]
            hidden.append(jnp.concatenate(diagonal, axis=0).astype(weights.dtype))

        def expand(index: Any, _: Any) -> Any:
            for u in parallel:
                for step in range(steps):
                    y_rows[u, rows_of(index, step), :] = dot(hidden[u], chunk(u, True, index, step))
            return 0

        _loop(out_trips(item), expand, 0)

        def send(u: Any, slot: Any, token: Any) -> None:
            y_out[parity, u * SLOTS + slot] = y_rows[u, pl.ds(slot, y_blocks, SLOTS), :]
            y_copy(item, parity, u, slot, token).start()

        for_tokens(item, send)

    def wait_for_y(item: Any, parity: Any) -> None:
        every = y_out.at[parity, pl.ds(0, num_tokens_of(item)), pl.ds(0, y_span(item)[1])]
        pltpu.make_async_copy(every, every, y_left.at[parity]).wait()

    item = pl.program_id(0)

    if fixed is None:

        @pl.loop(0, jnp.where(item == 0, jnp.minimum(DEPTH - 1, total), 0))
        def _(first: Any) -> None:
            fetch(first)
    else:

        @pl.when(item == 0)
        def _() -> None:
            for first in range(DEPTH - 1):
                fetch(first)

    def run() -> None:
        pl.when(item + DEPTH - 1 < total)(lambda: fetch(item + DEPTH - 1))
        wait_for_x(item)
        if fixed is None:
            pl.when(field(item, 4) == 0)(lambda: by_class(item, wait_for_adapters))
        else:
            by_class(item, wait_for_adapters)
        by_class(item, compute)
        pl.when(item >= Y_DEPTH - 1)(
            lambda: wait_for_y(item - (Y_DEPTH - 1), jax.lax.rem(item + 1, Y_DEPTH))
        )

    if fixed is not None:
        run()
        return
    pl.when(item < total)(run)
    undone = jnp.maximum(item + 2 - Y_DEPTH, 0)

    @pl.loop(undone, jnp.where(item + 1 == total, total, undone))
    def _(left: Any) -> None:
        wait_for_y(left, jax.lax.rem(left, Y_DEPTH))


def _multiple_of(value: Any, multiple: int) -> Any:
    return value if isinstance(value, int) else pl.multiple_of(value, multiple)


def _loop(trips: Any, body: Any, carry: Any) -> Any:
    """``fori_loop``, unrolled where it is short: a loop drains the pipeline."""
    if isinstance(trips, int) and trips <= 2:
        for index in range(trips):
            carry = body(index, carry)
        return carry
    return jax.lax.fori_loop(0, trips, body, carry)


def decode(
    x: jax.Array,
    pool: jax.Array,
    *metadata: jax.Array,
    in_blocks: int,
    out_blocks: tuple[int, ...],
    classes: tuple[int, ...],
    fixed: tuple[int, int] | None = None,
) -> jax.Array:
    """The terms of one group's targets, f32[T, output blocks, 128]; of base tokens, garbage.

    ``x`` [T, blocks, 128], zeros behind its inputs; ``metadata`` as ``_kernel`` has it. ``fixed``:
    (items, class of them all) of single tokens, which only an estimate knows.
    """
    num_tokens, x_blocks, _ = x.shape
    y_blocks = _padded(max(out_blocks), BLOCK_MULTIPLE)
    most = max(in_parallel(rank) for rank in classes)
    rows = max(in_parallel(rank) * (x_blocks + y_blocks) * rank for rank in classes)
    out_rows = sum(_padded(blocks, 8) for blocks in out_blocks)
    kernel = functools.partial(
        _kernel,
        rows_per_page=pool.shape[1],
        in_blocks=in_blocks,
        out_blocks=out_blocks,
        classes=classes,
        fixed=fixed,
    )
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((num_tokens, out_rows, LANES), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(metadata),
            grid=(jnp.maximum(metadata[0][0], 1) if fixed is None else fixed[0],),
            in_specs=[anywhere, anywhere],
            out_specs=anywhere,
            scratch_shapes=[
                pltpu.VMEM((DEPTH, rows, LANES), pool.dtype),
                pltpu.VMEM((DEPTH, most * SLOTS, x_blocks, LANES), x.dtype),
                pltpu.VMEM((most, x_blocks * SLOTS, LANES), jnp.float32),
                pltpu.VMEM((most, y_blocks * SLOTS, LANES), jnp.float32),
                pltpu.VMEM((Y_DEPTH, most * SLOTS, y_blocks, LANES), jnp.float32),
                *[pltpu.SemaphoreType.DMA((count,)) for count in (DEPTH, DEPTH, Y_DEPTH)],
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=VMEM_BYTES,
            disable_bounds_checks=True,
        ),
        name="paged_lora_decode",
    )(*metadata, x, pool.reshape(-1, LANES))
