"""Paged LoRA on TPU (v5e, v6e; Pallas, Mosaic TPU). Estimated and interpreted, never run.

An adapter's A and Bᵀ of one target are one run of consecutive rows of its pages: it lies in VMEM as
it lies there. Shrink and expand are fused, h never leaves the core. Two kernels share the work:

Decode (MBGMV): tokens sorted by adapter; an item is one target of a few adapters of one class of
rank, and up to eight tokens of each; more tokens take several items (rounds) in a row, over rows
that are read once. One program an item, its copies started two items ahead from a list that
``prepare`` made: the pieces of each adapter's run, tokens' x one by one from where they lie, and
their terms to where they belong; nothing is gathered by XLA. Block-diagonal trick: 16 column
blocks of x, as rows, meet the 16 r rows of A of these blocks in one product, of which only a
block's own r columns count; their sum, h, is laid out block-diagonally and meets the rows of Bᵀ
likewise. So A and Bᵀ are used as they lie, for any rank. Two such units of 16 blocks go side by
side into one product, 256 deep in the shrink and 256 wide in the expand. With several tokens a row
is (block, token) instead.

Prefill (MBGMM): steps of ``TILE`` tokens or more are cut into tiles of tokens as they lie. Where
``TILE_TOKENS`` or more tokens of a tile have one adapter, an item is the tile, a target and that
adapter: each column block of x meets its r rows of A, h meets Bᵀ, and y's window of the tile, in
VMEM meanwhile, is added to in place. The terms that decode has computed for the tile's other tokens
are added there too.

All forms add in the same order (pairs of blocks 16 apart in one product, those pairs; of the 16
sums then those 8 apart first, then 4, 2, 1), so that a token's bits do not depend on how many share
its adapter.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.layout import (
    GROUPS,
    LANES,
    MAX_RANK,
    RANK_MULTIPLE,
    SEGMENT_ROWS,
    TARGETS,
    AdapterLayout,
    KVLayout,
)
from pallas_kernels.paged_lora.batch import LoraBatch
from pallas_kernels.tpu import VMEM_BYTES, dot
from pallas_kernels.tpu import check_support as check_chip

__all__ = ["check_support", "decode", "paged_lora", "prefill", "prepare"]

CLASSES = (8, 16, 32, 64, 128, 256)
"""Ranks that have code of their own; others lie in VMEM as the next of them, with zeros between."""

SLOTS = 8
"""Tokens of one adapter at a time in decode: the sublanes of a register."""

PARALLEL_RANKS = 128
"""Adapters of small ranks are computed together, until their ranks sum to this: one alone is a
chain of dependent steps longer than the time its bytes take."""

BLOCK_MULTIPLE = 16
"""Blocks of x and y are padded to this, the blocks in 128 rows of rank 8."""

DEPTH = 3
"""Items whose copies are under way: one takes less time than a copy's latency."""

Y_DEPTH = 2
"""Items whose terms are on their way out, the one being computed included."""

TILE = 128
"""Tokens a tile; smaller steps are decoded."""

TILE_TOKENS = 32
"""Tokens of one adapter from which a tile is worth an item of its own."""

# A decode item's words; the token of each member follows them.
(
    CLASS,
    TARGET,  # its place in the group
    FIRST,  # first member's place in ``members``
    SIZE,  # members
    ROUND,
    BUFFER,
    LIST,  # which list of copies
    ROWS,  # of the pool that these copy
    ODD,  # whether a member's rank is not its class
    LIVE,  # members with a token in this round
    COUNT,  # tokens of this round
    ITEM_WORDS,
) = range(12)

MEMBER_WORDS = 3
"""In a list of copies, before a member's pieces: adapter, rank, where its rows go. A piece is its
first row in the pool and its rows."""

# A prefill item's words; adapter 0: the terms of decode.
T_TILE, T_TARGET, T_ADAPTER, T_CLASS, T_OPENS_TILE, T_OPENS, T_CLOSES, T_X, T_Y, T_WORDS = range(10)

OF_DECODE = 16
"""In a token's mark, the first of seven bits: decode has a term for this target. Below: the
adapter whose prefill items the token is in."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """The step's work: for each group of targets, items of decode and of prefill."""

    batch: LoraBatch

    tokens: jax.Array
    """i32[T]: tokens sorted by adapter; those of prefill items are with the base's."""

    first_token: jax.Array
    """i32[N]: where each adapter's begin in ``tokens``."""

    num_tokens: jax.Array
    """i32[N]."""

    members: jax.Array
    """i32[7, N]: for each target its adapters with tokens, by class of rank."""

    items: tuple[jax.Array, ...]
    """Per group i32[I * (ITEM_WORDS + members)]."""

    lists: tuple[jax.Array, ...]
    """Per group i32[lists * words]: what to copy for each item of round 0."""

    num_items: jax.Array
    """i32[groups]."""

    tiles: tuple[jax.Array, ...]
    """Per group i32[I * T_WORDS]; no groups in steps of less than a tile."""

    num_tiles: jax.Array
    """i32[groups or 0]: items in ``tiles``."""

    marks: jax.Array
    """i32[T padded to 8 or 0, 128]: which terms each token takes, in every lane."""


def _padded(value: Any, multiple: int) -> Any:
    return -(-value // multiple) * multiple


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


def _run_rows(rank: Any, in_blocks: int, out_blocks: Any) -> Any:
    """Rows of A, of the gap behind it and of Bᵀ."""
    return _padded(in_blocks * rank, SEGMENT_ROWS) + out_blocks * rank


def _region_rows(rank: int, in_blocks: int, out_blocks: tuple[int, ...]) -> int:
    """Rows of VMEM for a run. What is read past A's end is Bᵀ; past Bᵀ's end there must be zeros,
    as no weight of zero stops a NaN.
    """
    return _run_rows(rank, in_blocks, _padded(max(out_blocks), BLOCK_MULTIPLE))


def check_support(
    device: Any, *, dtype: Any, num_heads: int, kv: KVLayout, adapters: AdapterLayout
) -> None:
    """NotImplementedError, with the reason, where this module cannot serve.

    Besides chip and dtype: ``_cut`` cannot cut a run that has fewer units of eight rows than the
    widest target's touches pages.
    """
    check_chip(device, dtype=dtype, num_heads=num_heads, kv=kv, adapters=adapters)
    for group in GROUPS:
        in_blocks, out_blocks = _group_shape(adapters, group)
        for rank in CLASSES:
            least = rank if rank == RANK_MULTIPLE else rank // 2 + RANK_MULTIPLE  # of its class
            units = _run_rows(least, in_blocks, min(out_blocks)) // RANK_MULTIPLE
            if units < _pieces(rank, in_blocks, out_blocks, adapters.rows_per_page):
                raise NotImplementedError(
                    f"LoRA on TPUs does not take pages of {adapters.rows_per_page} rows beside "
                    f"{', '.join(group)} of {out_blocks} blocks: choose a larger page_size"
                )


def _pieces(rank: int, in_blocks: int, out_blocks: tuple[int, ...], rows_per_page: int) -> int:
    """The most pages that a run touches: what each member of a class takes, cut up if need be."""
    rows = _run_rows(rank, in_blocks, max(out_blocks))
    return 1 + -(-(rows - SEGMENT_ROWS) // rows_per_page)


def _words(
    classes: tuple[int, ...], in_blocks: int, out_blocks: tuple[int, ...], rows_per_page: int
) -> int:
    """Words of a list of copies."""
    return max(
        in_parallel(rank) * (MEMBER_WORDS + 2 * _pieces(rank, in_blocks, out_blocks, rows_per_page))
        for rank in classes
    )


def _group_shape(layout: AdapterLayout, group: tuple[str, ...]) -> tuple[int, tuple[int, ...]]:
    """(blocks of the group's input, blocks of each target's output)."""
    targets = [TARGETS.index(name) for name in group]
    return layout.in_blocks[targets[0]], tuple(layout.out_blocks[t] for t in targets)


def prepare(batch: LoraBatch, layout: AdapterLayout) -> Plan:
    """See ``api.prepare``."""
    index = batch.adapter_index
    tiles: list[jax.Array] = []
    num_tiles: list[jax.Array] = []
    marks = jnp.zeros((0, LANES), jnp.int32)
    if len(index) >= TILE:
        index, marks, tiles, num_tiles = _prepare_prefill(batch)
    num_adapters, num_tokens = batch.rank.shape[0], len(index)
    adapters = jnp.arange(num_adapters, dtype=jnp.int32)
    counts = jnp.sum(index[None, :] == adapters[:, None], axis=1, dtype=jnp.int32)
    first_token = jnp.cumsum(counts) - counts
    tokens = jnp.argsort(index, stable=True).astype(jnp.int32)

    num_classes = len(CLASSES)
    of_rank = jnp.where(
        (batch.rank > 0) & (counts > 0)[:, None], _class_of(batch.rank), num_classes
    )
    # Members of a class stand together, those with most tokens first.
    key = of_rank * (num_tokens + 1) - counts[:, None]
    members = jnp.argsort(key.T, axis=1).astype(jnp.int32)  # [7, N]
    of_rank = jnp.take_along_axis(of_rank.T, members, axis=1)
    items, lists, num_items = [], [], []
    for group in GROUPS:
        targets = [TARGETS.index(name) for name in group]
        these = slice(targets[0], targets[-1] + 1)
        work = _prepare_decode(
            batch, layout, group, members[these], of_rank[these], counts, first_token, tokens
        )
        items.append(work[0])
        lists.append(work[1])
        num_items.append(work[2])
    return Plan(
        batch,
        tokens,
        first_token,
        counts,
        members,
        tuple(items),
        tuple(lists),
        jnp.stack(num_items),
        tuple(tiles),
        jnp.stack(num_tiles) if num_tiles else jnp.zeros(0, jnp.int32),
        marks,
    )


def _class_of(rank: jax.Array) -> jax.Array:
    """The number of the class that holds each rank."""
    limits = jnp.array(CLASSES, jnp.int32)
    return jnp.sum(
        rank[..., None] > limits.reshape((1,) * rank.ndim + (-1,)), axis=-1, dtype=jnp.int32
    )


def _prepare_decode(
    batch: LoraBatch,
    layout: AdapterLayout,
    group: tuple[str, ...],
    members: jax.Array,
    of_rank: jax.Array,
    counts: jax.Array,
    first_token: jax.Array,
    tokens: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(items, lists, number of items) of one group; ``members``, ``of_rank``: [targets, N]."""
    num_targets, num_adapters = members.shape
    num_tokens, num_classes = len(tokens), len(CLASSES)
    in_blocks, out_blocks = _group_shape(layout, group)
    first_target = TARGETS.index(group[0])
    classes = _classes(batch.rank_bucket)
    most = max(map(in_parallel, classes))
    place = jnp.arange(num_adapters, dtype=jnp.int32)[None, :]

    # Leads: the first of each item's members.
    in_class = jnp.sum(
        of_rank[:, None, :] == jnp.arange(num_classes + 1, dtype=jnp.int32)[None, :, None],
        axis=2,
        dtype=jnp.int32,
    )
    class_start = jnp.cumsum(in_class, axis=1) - in_class  # [targets, classes + 1]
    nth = place - jnp.take_along_axis(class_start, of_rank, axis=1)
    width = jnp.array([*map(in_parallel, CLASSES), 1], jnp.int32)[of_rank]
    leads = (nth % width == 0) & (of_rank < num_classes)
    size = jnp.minimum(width, jnp.take_along_axis(in_class, of_rank, axis=1) - nth)
    rounds = jnp.where(leads, -(-counts[members] // SLOTS), 0)

    # Lists: one a lead. A class ends with an item that is not full, the others hold at least half
    # of PARALLEL_RANKS.
    half = max(PARALLEL_RANKS // 2, RANK_MULTIPLE)
    most_leads = min(num_adapters - 1, batch.rank_bucket // half + len(CLASSES), num_tokens)
    most_lists = max(1, most_leads * num_targets)
    target, first = (
        part.astype(jnp.int32) for part in jnp.nonzero(leads, size=most_lists, fill_value=0)
    )
    list_class = jnp.minimum(of_rank[target, first], num_classes - 1)
    list_size = jnp.where(jnp.arange(most_lists) < jnp.sum(leads), size[target, first], 0)
    pieces_of = [_pieces(rank, in_blocks, out_blocks, layout.rows_per_page) for rank in CLASSES]
    words = _words(classes, in_blocks, out_blocks, layout.rows_per_page)
    pieces = jnp.array(pieces_of, jnp.int32)[list_class][:, None]
    member_words = MEMBER_WORDS + 2 * pieces
    word = jnp.arange(words, dtype=jnp.int32)[None, :]
    u, word = word // member_words, word % member_words
    live = u < list_size[:, None]
    adapter = members[target[:, None], jnp.minimum(first[:, None] + u, num_adapters - 1)]
    row = batch.a_row[adapter, first_target + target[:, None]]
    rank = batch.rank[adapter, first_target + target[:, None]]
    rows = _run_rows(rank, in_blocks, jnp.array(out_blocks, jnp.int32)[target][:, None])
    class_rank = jnp.array(CLASSES, jnp.int32)[list_class][:, None]
    region = jnp.array([_region_rows(rank, in_blocks, out_blocks) for rank in CLASSES], jnp.int32)[
        list_class
    ][:, None]
    # A run of another rank than its class lies at the end, from where it is spread.
    into = u * region + jnp.where(rank == class_rank, 0, region - rows)
    piece = (word - MEMBER_WORDS) // 2
    begin, end = (
        _cut(row, rows, pieces, number, layout.rows_per_page) for number in (piece, piece + 1)
    )
    page = batch.page_start[adapter] + (row + begin) // layout.rows_per_page
    source = batch.pages.at[page].get(mode="clip") * layout.rows_per_page
    source += (row + begin) % layout.rows_per_page
    values = jnp.where((word - MEMBER_WORDS) % 2 == 0, source, end - begin)
    for number, value in enumerate((adapter, rank, into)):
        values = jnp.where(word == number, value, values)
    lists = jnp.where(live, values, 0)
    header = live & (word == 0)
    list_rows = jnp.sum(jnp.where(header, rows, 0), axis=1, dtype=jnp.int32)
    odd = jnp.any(header & (rank != class_rank), axis=1).astype(jnp.int32)

    # Items: the rounds of each lead.
    ends = jnp.cumsum(rounds.reshape(-1))
    bound = max(1, min(num_tokens, most_leads + num_tokens // SLOTS) * num_targets)
    item = jnp.arange(bound, dtype=jnp.int32)
    owner = jnp.sum(ends[None, :] <= item[:, None], axis=1, dtype=jnp.int32)
    owner = jnp.minimum(owner, ends.shape[0] - 1)
    number = jnp.maximum(jnp.cumsum(leads.reshape(-1), dtype=jnp.int32)[owner] - 1, 0)
    number = jnp.minimum(number, most_lists - 1)
    nth_round = item - (ends - rounds.reshape(-1))[owner]
    u = jnp.arange(most, dtype=jnp.int32)[None, :]
    adapter = members[
        target[number][:, None], jnp.minimum(first[number][:, None] + u, num_adapters - 1)
    ]
    left = jnp.clip(counts[adapter] - nth_round[:, None] * SLOTS, 0, SLOTS)
    left = jnp.where(u < list_size[number][:, None], left, 0)
    token = tokens.at[first_token[adapter] + nth_round[:, None] * SLOTS].get(mode="clip")
    fields = [
        list_class[number],
        target[number],
        first[number],
        list_size[number],
        nth_round,
        number % DEPTH,
        number,
        list_rows[number],
        odd[number],
        jnp.sum(left > 0, axis=1, dtype=jnp.int32),
        jnp.sum(left, axis=1, dtype=jnp.int32),
    ]
    items = jnp.concatenate([jnp.stack(fields, axis=1), jnp.where(left > 0, token, 0)], axis=1)
    return items.reshape(-1), lists.reshape(-1), ends[-1]


def _cut(
    row: jax.Array, rows: jax.Array, pieces: jax.Array, number: jax.Array, rows_per_page: int
) -> jax.Array:
    """Where piece ``number`` of the run ``row`` to ``row + rows`` begins, counted from its start.

    No piece crosses a page and none is empty: where the run touches fewer pages than ``pieces``,
    the first ones are of eight rows.
    """
    unit = RANK_MULTIPLE
    per_page = rows_per_page // unit
    here = per_page - row % rows_per_page // unit  # units in the run's first page
    touched = (row + rows - 1) // rows_per_page - row // rows_per_page + 1
    extra = pieces - touched
    beyond = jnp.maximum(extra - (here - 1), 0)  # small pieces past the first page
    whole = jnp.maximum(beyond - 1, 0) // (per_page - 1)
    small = jnp.where(
        beyond > 0, here + whole * per_page + (beyond - 1 - whole * (per_page - 1)) + 1, extra
    )
    passed = jnp.where(small >= here, (small - here) // per_page + 1, 0)  # pages behind them
    at_page = here + (passed + number - small - 1) * per_page
    cut = unit * jnp.where(number <= small, number, at_page)
    return jnp.where(number >= pieces, rows, jnp.where(number <= 0, 0, cut))


def _prepare_prefill(
    batch: LoraBatch,
) -> tuple[jax.Array, jax.Array, list[jax.Array], list[jax.Array]]:
    """(adapter of each token that is left to decode, marks, items and their number per group).

    Tiles end with the step: prefill's own tiles do, behind decode rows of any number.
    """
    index, num_adapters = batch.adapter_index, batch.rank.shape[0]
    front, behind = -_padded(len(index), SLOTS) % TILE, -len(index) % SLOTS
    index = jnp.pad(index, (front, behind)).reshape(-1, TILE)  # [tiles, TILE]
    adapters = jnp.arange(num_adapters, dtype=jnp.int32)
    own = index[:, :, None] == adapters[None, None, :]
    large = jnp.sum(own, axis=1, dtype=jnp.int32) >= TILE_TOKENS  # [tiles, N]
    large &= (adapters > 0)[None, :]
    in_tile = jnp.any(own & large[:, None, :], axis=2)
    left = jnp.where(in_tile, 0, index)
    terms = batch.rank[left] > 0  # [tiles, TILE, 7]
    bits = 1 << (OF_DECODE + jnp.arange(len(TARGETS), dtype=jnp.int32))
    marks = jnp.where(in_tile, index, 0) + jnp.sum(jnp.where(terms, bits[None, None, :], 0), axis=2)
    marks = marks.astype(jnp.int32).reshape(-1)[front:]
    marks = jnp.broadcast_to(marks[:, None], (len(marks), LANES))
    items, num_items = [], []
    for group in GROUPS:
        targets = [TARGETS.index(name) for name in group]
        these = slice(targets[0], targets[-1] + 1)
        rank = batch.rank[:, these].T  # [targets, N]
        merges = jnp.any(terms[:, :, these], axis=1)
        exists = large[:, None, :] & (rank > 0)[None]
        exists = jnp.concatenate([merges[:, :, None], exists[:, :, 1:]], axis=2)
        bound = len(index) * len(group) * min(num_adapters, 1 + TILE // TILE_TOKENS)
        tile, target, adapter = (
            part.astype(jnp.int32) for part in jnp.nonzero(exists, size=bound, fill_value=0)
        )
        total = jnp.sum(exists, dtype=jnp.int32)
        first = jnp.arange(bound, dtype=jnp.int32) == 0
        last = jnp.arange(bound, dtype=jnp.int32) == total - 1
        opens_tile = first | (tile != jnp.roll(tile, 1))
        opens = opens_tile | (target != jnp.roll(target, 1))
        fields = [
            tile,
            target,
            adapter,
            _class_of(rank[target, adapter]),
            opens_tile,
            opens,
            last | jnp.roll(opens, -1),
            (jnp.cumsum(opens_tile, dtype=jnp.int32) - 1) % 2,
            (jnp.cumsum(opens, dtype=jnp.int32) - 1) % 2,
        ]
        items.append(jnp.stack([f.astype(jnp.int32) for f in fields], axis=1).reshape(-1))
        num_items.append(total)
    left = left.reshape(-1)[front:]
    return left[: len(batch.adapter_index)], marks, items, num_items


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
    in_blocks, out_blocks = _group_shape(layout, group)
    num_tokens, size = len(x), len(plan.marks) or len(x)
    x = jnp.pad(x, ((0, size - num_tokens), (0, in_blocks * LANES - x.shape[1])))
    tables = (
        batch.rank[:, these].T.reshape(-1),
        batch.a_row[:, these].T.reshape(-1),
        batch.b_row[:, these].T.reshape(-1),
        batch.scaling[layer][:, these].T.reshape(-1),
    )
    delta = decode(
        _to_blocks(x, BLOCK_MULTIPLE),
        pool_layer,
        plan.num_items[number].reshape(1),
        plan.items[number],
        plan.lists[number],
        plan.members[these].reshape(-1),
        plan.tokens,
        plan.first_token,
        plan.num_tokens,
        tables[3],
        in_blocks=in_blocks,
        out_blocks=out_blocks,
        classes=_classes(batch.rank_bucket),
    )
    features = [layout.out_features[target] for target in targets]
    if plan.tiles:
        whole = _pad_targets(y, features, size)
        whole = prefill(
            whole,
            x,
            pool_layer,
            delta,
            plan.marks,
            plan.num_tiles[number].reshape(1),
            plan.tiles[number],
            batch.pages,
            batch.page_start,
            *tables,
            in_blocks=in_blocks,
            out_blocks=out_blocks,
            first_target=targets[0],
            classes=_classes(batch.rank_bucket),
        )
        return _unpad_targets(whole, features, num_tokens)
    terms, first = [], 0
    for target, blocks in zip(targets, out_blocks, strict=True):
        part = delta[:, first : first + blocks].reshape(num_tokens, -1)
        part = part[:, : layout.out_features[target]]
        adapted = batch.rank[batch.adapter_index, target] > 0
        terms.append(jnp.where(adapted[:, None], part, 0.0))
        first += _padded(blocks, 8)
    return (y.astype(jnp.float32) + jnp.concatenate(terms, axis=1)).astype(y.dtype)


def _to_blocks(x: jax.Array, multiple: int) -> jax.Array:
    """[T, C] → [T, blocks, 128], zeros behind C, blocks padded to a multiple."""
    columns = _padded(x.shape[1], multiple * LANES)
    return jnp.pad(x, ((0, 0), (0, columns - x.shape[1]))).reshape(len(x), -1, LANES)


def _pad_targets(y: jax.Array, features: list[int], rows: int) -> jax.Array:
    """y with every target's outputs padded to whole blocks, and rows added; y itself where it has
    both.
    """
    if rows == len(y) and not any(size % LANES for size in features):
        return y
    parts, first = [], 0
    for size in features:
        part = y[:, first : first + size]
        parts.append(jnp.pad(part, ((0, rows - len(y)), (0, -size % LANES))))
        first += size
    return jnp.concatenate(parts, axis=1)


def _unpad_targets(y: jax.Array, features: list[int], rows: int) -> jax.Array:
    """The inverse of ``_pad_targets``."""
    if rows == len(y) and not any(size % LANES for size in features):
        return y
    parts, first = [], 0
    for size in features:
        parts.append(y[:rows, first : first + size])
        first += _padded(size, LANES)
    return jnp.concatenate(parts, axis=1)


def _of_target(values: list[int] | tuple[int, ...], place: jax.Array) -> Any:
    """``values[place]`` of Python numbers."""
    result: Any = values[0]
    for index, value in enumerate(values[1:], start=1):
        if value != values[0] or not isinstance(result, int):
            result = jnp.where(place == index, value, result)
    return result


def _multiple_of(value: Any, multiple: int) -> Any:
    return value if isinstance(value, int) else pl.multiple_of(value, multiple)


def _loop(trips: Any, body: Any, carry: Any) -> Any:
    """``fori_loop``, unrolled where it is short: a loop drains the pipeline."""
    if isinstance(trips, int) and trips <= 2:
        for index in range(trips):
            carry = body(index, carry)
        return carry
    return jax.lax.fori_loop(0, trips, body, carry)


def _by_pairs(units: Any, act: Any, carry: Any) -> Any:
    """``act(first, count, carry)`` over units of 16 blocks, two at a time: side by side they fill
    the matrix unit of v6e, 256 by 256, in the time of one.
    """
    pairs = units // 2
    carry = _loop(pairs, lambda pair, carry: act(pair * 2, 2, carry), carry)
    return _loop(units - pairs * 2, lambda _, carry: act(pairs * 2, 1, carry), carry)


def _for_each(count: Any, act: Any) -> None:
    """``act`` on 0 up to ``count``, four at a time: one alone is a chain of waits for scalars."""
    fours = jax.lax.div(count, 4)

    @pl.loop(0, fours)
    def _(four: Any) -> None:
        for index in range(4):
            act(four * 4 + index)

    pl.loop(fours * 4, count)(act)


def _rows_copy(pool: Any, weights: Any, arrived: Any, source: Any, into: Any, count: Any) -> Any:
    """The copy of rows of the pool into a buffer, all multiples of eight."""
    source, into, count = (pl.multiple_of(n, RANK_MULTIPLE) for n in (source, into, count))
    return pltpu.make_async_copy(
        pool.at[pl.ds(source, count)], weights.at[pl.ds(into, count)], arrived
    )


def _wait_for_rows(weights: Any, arrived: Any, count: Any) -> None:
    rows = weights.at[pl.ds(0, pl.multiple_of(count, RANK_MULTIPLE))]
    pltpu.make_async_copy(rows, rows, arrived).wait()


def _clear(weights: Any, first: Any, last: Any) -> None:
    """Zero the rows from ``first`` up to ``last``, multiples of eight."""

    @pl.loop(first // RANK_MULTIPLE, last // RANK_MULTIPLE)
    def _(unit: Any) -> None:
        row = pl.multiple_of(unit * RANK_MULTIPLE, RANK_MULTIPLE)
        zeros = jnp.zeros((RANK_MULTIPLE, LANES), weights.dtype)
        weights[pl.ds(row, RANK_MULTIPLE), :] = zeros


def _spread(
    weights: Any, base: Any, region: int, own: Any, rank: int, in_blocks: int, outputs: Any
) -> None:
    """Lay a run of rank ``own``, at the end of its region, out as one of its class's ``rank``."""
    start = base + region - _run_rows(own, in_blocks, outputs)

    def spread(source: Any, into: Any, blocks: Any) -> None:
        @pl.loop(0, blocks)
        def _(block: Any) -> None:
            @pl.loop(0, own // RANK_MULTIPLE)
            def _(unit: Any) -> None:
                at = [
                    first + unit * RANK_MULTIPLE
                    for first in (source + block * own, into + block * rank)
                ]
                at = [pl.multiple_of(row, RANK_MULTIPLE) for row in at]
                weights[pl.ds(at[1], RANK_MULTIPLE), :] = weights[pl.ds(at[0], RANK_MULTIPLE), :]

            _clear(weights, into + block * rank + own, into + (block + 1) * rank)

    b_base = _padded(in_blocks * rank, SEGMENT_ROWS)
    spread(start, base, in_blocks)
    _clear(weights, base + in_blocks * rank, base + b_base)
    spread(start + _padded(in_blocks * own, SEGMENT_ROWS), base + b_base, outputs)


def _clear_behind(
    weights: Any, base: Any, rank: int, in_blocks: int, outputs: Any, out_blocks: tuple[int, ...]
) -> None:
    """Zeros behind Bᵀ, up to where whole units of blocks end."""
    if any(blocks % BLOCK_MULTIPLE for blocks in out_blocks):
        first = base + _padded(in_blocks * rank, SEGMENT_ROWS)
        end = pl.cdiv(outputs, BLOCK_MULTIPLE) * BLOCK_MULTIPLE
        _clear(weights, first + outputs * rank, first + end * rank)


def _sum_of_blocks(sums: jax.Array, rank: int) -> jax.Array:
    """From 16 blocks' sums, lane ``block * rank + k``, their sum for every k, again and again: in
    128 lanes, or in as many as the rank has. In one order of additions, whatever the rank.
    """
    while sums.shape[1] > max(LANES, rank):
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    shift = sums.shape[1] // 2
    while shift >= rank:
        sums += pltpu.roll(sums, shift, 1)
        shift //= 2
    return sums


def _kernel(
    num_items: Any,
    items: Any,
    lists: Any,
    members: Any,
    tokens: Any,
    first_token: Any,
    num_tokens: Any,
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
) -> None:
    num_adapters = first_token.shape[0]
    x_blocks = x.shape[1]
    y_blocks = _padded(max(out_blocks), BLOCK_MULTIPLE)
    total = num_items[0]
    sent = [_padded(blocks, 8) for blocks in out_blocks]
    stride = ITEM_WORDS + max(map(in_parallel, classes))
    list_words = _words(classes, in_blocks, out_blocks, rows_per_page)

    def field(item: Any, number: Any) -> Any:
        return items[item * stride + number]

    def outputs_of(item: Any) -> Any:
        return _of_target(out_blocks, field(item, TARGET))

    def member_list(item: Any, u: Any, rank: int) -> Any:
        """Where the words of a member begin in ``lists``."""
        words = MEMBER_WORDS + 2 * _pieces(rank, in_blocks, out_blocks, rows_per_page)
        return field(item, LIST) * list_words + u * words

    def by_class(item: Any, act: Any) -> None:
        acts = [functools.partial(act, item, rank) for rank in classes]
        jax.lax.switch(field(item, CLASS), acts)

    def is_single(item: Any) -> Any:
        """Whether no member has a second token in this round."""
        return field(item, COUNT) == field(item, LIVE)

    def for_tokens(item: Any, act: Any) -> None:
        """``act(u, slot, token)`` for each token of the item's round."""

        @pl.loop(0, field(item, LIVE))
        def _(u: Any) -> None:
            adapter = members[field(item, TARGET) * num_adapters + field(item, FIRST) + u]
            begin = field(item, ROUND) * SLOTS

            @pl.loop(0, jnp.minimum(num_tokens[adapter] - begin, SLOTS))
            def _(slot: Any) -> None:
                act(u, slot, tokens[first_token[adapter] + begin + slot])

    def for_singles(item: Any, act: Any) -> None:
        """The same for an item of which no member has more than one."""
        _for_each(field(item, LIVE), lambda u: act(u, 0, field(item, ITEM_WORDS + u)))

    def fetch_rows(item: Any, rank: int) -> None:
        buffer = field(item, BUFFER)
        num_pieces = _pieces(rank, in_blocks, out_blocks, rows_per_page)

        def of_member(u: Any) -> None:
            word = member_list(item, u, rank)
            into = lists[word + MEMBER_WORDS - 1]

            def copy(piece: Any, into: Any) -> Any:
                at = word + MEMBER_WORDS + 2 * piece
                count = lists[at + 1]
                _rows_copy(
                    pool, weights.at[buffer], rows_arrived.at[buffer], lists[at], into, count
                ).start()
                return into + count

            _loop(num_pieces, copy, into)

        _for_each(field(item, SIZE), of_member)

    def wait_for_rows(item: Any, rank: int) -> None:
        """Also zeroes what lies between and behind the rows: nothing may be NaN there."""
        buffer, outputs = field(item, BUFFER), outputs_of(item)
        region = _region_rows(rank, in_blocks, out_blocks)
        _wait_for_rows(weights.at[buffer], rows_arrived.at[buffer], field(item, ROWS))

        def for_members(act: Any) -> None:
            pl.loop(0, field(item, SIZE))(lambda u: act(u, u * region))

        def spread(u: Any, base: Any) -> None:
            own = lists[member_list(item, u, rank) + 1]

            @pl.when(own != rank)
            def _() -> None:
                _spread(weights.at[buffer], base, region, own, rank, in_blocks, outputs)

        if rank > RANK_MULTIPLE:
            pl.when(field(item, ODD) == 1)(lambda: for_members(spread))
        if any(blocks % BLOCK_MULTIPLE for blocks in out_blocks):
            for_members(
                lambda _, base: _clear_behind(
                    weights.at[buffer], base, rank, in_blocks, outputs, out_blocks
                )
            )

    def x_copy(item: Any, u: Any, slot: Any, token: Any) -> Any:
        place = jax.lax.rem(item, DEPTH)
        into = x_in.at[place, u * SLOTS + slot]
        return pltpu.make_async_copy(x.at[token], into, x_arrived.at[place])

    def wait_for_x(item: Any) -> None:
        place = jax.lax.rem(item, DEPTH)
        every = x_in.at[place, pl.ds(0, field(item, COUNT))]
        pltpu.make_async_copy(every, every, x_arrived.at[place]).wait()

    def y_span(item: Any) -> tuple[Any, Any]:
        """(first block, blocks) of the item's target in ``out``."""
        place = field(item, TARGET)
        first = _of_target([sum(sent[:i]) for i in range(len(sent))], place)
        return _multiple_of(first, 8), _multiple_of(_of_target(sent, place), 8)

    def y_copy(item: Any, parity: Any, u: Any, slot: Any, token: Any) -> Any:
        first, count = y_span(item)
        return pltpu.make_async_copy(
            y_out.at[parity, u * SLOTS + slot, pl.ds(0, count)],
            out.at[token, pl.ds(first, count)],
            y_left.at[parity],
        )

    def fetch(item: Any) -> None:
        pl.when(field(item, ROUND) == 0)(lambda: by_class(item, fetch_rows))
        single = is_single(item)

        def start(*at: Any) -> None:
            x_copy(item, *at).start()

        pl.when(single)(lambda: for_singles(item, start))
        pl.when(jnp.logical_not(single))(lambda: for_tokens(item, start))

    def compute(item: Any, rank: int) -> None:
        single = is_single(item)
        pl.when(single)(lambda: compute_one(item, rank))
        pl.when(jnp.logical_not(single))(lambda: compute_some(item, rank))

    def units(
        buffer: Any, u: int, of_b: bool, first: Any, count: int, rank: int, rows: int, step: int = 0
    ) -> jax.Array:
        """[rows, count * 128], side by side: from each of these units (16 blocks of one member's
        A or Bᵀ) the rows from ``step * rows`` on.
        """
        base = u * _region_rows(rank, in_blocks, out_blocks) + step * rows
        base += of_b * _padded(in_blocks * rank, SEGMENT_ROWS)
        starts = [base + (first + n) * BLOCK_MULTIPLE * rank for n in range(count)]
        parts = [weights[buffer, pl.ds(_multiple_of(row, SEGMENT_ROWS), rows), :] for row in starts]
        return jnp.concatenate(parts, axis=1)

    def scale_of(item: Any, u: int, rank: int) -> Any:
        """Of a member that is not there: anything."""
        place = jnp.minimum(field(item, FIRST) + u, num_adapters - 1)
        adapter = members[field(item, TARGET) * num_adapters + place]
        return scaling[field(item, TARGET) * num_adapters + adapter]

    def out_trips(item: Any) -> Any:
        if len(set(out_blocks)) == 1:
            return y_blocks // BLOCK_MULTIPLE
        return pl.cdiv(outputs_of(item), BLOCK_MULTIPLE)

    def compute_one(item: Any, rank: int) -> None:
        """Members of one token each: rows are column blocks."""
        parity, buffer = jax.lax.rem(item, Y_DEPTH), field(item, BUFFER)
        place = jax.lax.rem(item, DEPTH)
        unit = BLOCK_MULTIPLE * rank
        parallel = range(in_parallel(rank))
        row = jax.lax.broadcasted_iota(jnp.int32, (BLOCK_MULTIPLE, unit), 0)
        own = jax.lax.broadcasted_iota(jnp.int32, (BLOCK_MULTIPLE, unit), 1) // rank == row

        def blocks_of(index: Any) -> Any:
            return pl.ds(_multiple_of(index * BLOCK_MULTIPLE, BLOCK_MULTIPLE), BLOCK_MULTIPLE)

        def shrink(first: Any, count: int, sums: Any) -> Any:
            sums = list(sums)
            for u in parallel:
                mine = [x_in[place, u * SLOTS, blocks_of(first + n), :] for n in range(count)]
                rows = units(buffer, u, False, first, count, rank, unit)
                sums[u] += dot(jnp.concatenate(mine, axis=1), rows, transposed=True)
            return tuple(sums)

        sums = (jnp.zeros((BLOCK_MULTIPLE, unit), jnp.float32),) * len(parallel)
        sums = _by_pairs(x_blocks // BLOCK_MULTIPLE, shrink, sums)
        hidden = []
        for u, total in enumerate(sums):
            mine = jnp.sum(jnp.where(own, total, 0.0), axis=0, keepdims=True)
            mine = _sum_of_blocks(mine, rank) * scale_of(item, u, rank)
            mine = jnp.concatenate([mine] * (unit // mine.shape[1]), axis=1)
            hidden.append(jnp.where(own, mine, 0.0).astype(weights.dtype))

        def expand(first: Any, count: int, _: Any) -> Any:
            for u in parallel:
                terms = dot(hidden[u], units(buffer, u, True, first, count, rank, unit))
                for n in range(count):
                    mine = terms[:, n * LANES : (n + 1) * LANES]
                    y_out[parity, u * SLOTS, blocks_of(first + n), :] = mine
            return 0

        _by_pairs(out_trips(item), expand, 0)
        for_singles(item, lambda *at: y_copy(item, parity, *at).start())

    def compute_some(item: Any, rank: int) -> None:
        """Up to eight tokens a member: rows are (column block, token)."""
        parity, buffer = jax.lax.rem(item, Y_DEPTH), field(item, BUFFER)
        place = jax.lax.rem(item, DEPTH)
        chunk_rows = _chunk_rows(rank)
        blocks = chunk_rows // rank  # column blocks in a chunk
        steps = BLOCK_MULTIPLE // blocks
        width = blocks * SLOTS
        parallel = range(in_parallel(rank))
        own_block = jax.lax.broadcasted_iota(jnp.int32, (SLOTS, chunk_rows), 1) // rank

        def rows_of(index: Any, step: int) -> Any:
            return pl.ds(_multiple_of((index * steps + step) * width, SLOTS), width)

        def spread(u: Any, slot: Any, _: Any) -> None:
            rows = x_in[place, u * SLOTS + slot].astype(jnp.float32)
            x_rows[u, pl.ds(slot, x_blocks, SLOTS), :] = rows

        for_tokens(item, spread)

        def shrink(first: Any, count: int, sums: Any) -> Any:
            sums = list(sums)
            for u in parallel:
                for step in range(steps):
                    mine = [x_rows[u, rows_of(first + n, step), :] for n in range(count)]
                    mine = jnp.concatenate(mine, axis=1).astype(weights.dtype)
                    rows = units(buffer, u, False, first, count, rank, chunk_rows, step)
                    sums[u * steps + step] += dot(mine, rows, transposed=True)
            return tuple(sums)

        sums = (jnp.zeros((width, chunk_rows), jnp.float32),) * (len(parallel) * steps)
        sums = _by_pairs(x_blocks // BLOCK_MULTIPLE, shrink, sums)
        hidden = []
        for u in parallel:
            parts = []
            for total in sums[u * steps : (u + 1) * steps]:
                mine = total[:SLOTS]
                for block in range(1, blocks):
                    here = total[block * SLOTS : (block + 1) * SLOTS]
                    mine = jnp.where(own_block == block, here, mine)
                parts.append(mine)
            mine = _sum_of_blocks(jnp.concatenate(parts, axis=1), rank)
            mine *= scale_of(item, u, rank)
            mine = jnp.concatenate([mine] * (chunk_rows // mine.shape[1]), axis=1)
            diagonal = [jnp.where(own_block == block, mine, 0.0) for block in range(blocks)]
            hidden.append(jnp.concatenate(diagonal, axis=0).astype(weights.dtype))

        def expand(first: Any, count: int, _: Any) -> Any:
            for u in parallel:
                for step in range(steps):
                    rows = units(buffer, u, True, first, count, rank, chunk_rows, step)
                    terms = dot(hidden[u], rows)
                    for n in range(count):
                        mine = terms[:, n * LANES : (n + 1) * LANES]
                        y_rows[u, rows_of(first + n, step), :] = mine
            return 0

        _by_pairs(out_trips(item), expand, 0)

        def send(u: Any, slot: Any, token: Any) -> None:
            y_out[parity, u * SLOTS + slot] = y_rows[u, pl.ds(slot, y_blocks, SLOTS), :]
            y_copy(item, parity, u, slot, token).start()

        for_tokens(item, send)

    def wait_for_y(item: Any, parity: Any) -> None:
        every = y_out.at[parity, pl.ds(0, field(item, COUNT)), pl.ds(0, y_span(item)[1])]
        pltpu.make_async_copy(every, every, y_left.at[parity]).wait()

    item = pl.program_id(0)

    @pl.loop(0, jnp.where(item == 0, jnp.minimum(DEPTH - 1, total), 0))
    def _(first: Any) -> None:
        fetch(first)

    def run() -> None:
        pl.when(item + DEPTH - 1 < total)(lambda: fetch(item + DEPTH - 1))
        wait_for_x(item)
        pl.when(field(item, ROUND) == 0)(lambda: by_class(item, wait_for_rows))
        by_class(item, compute)
        pl.when(item >= Y_DEPTH - 1)(
            lambda: wait_for_y(item - (Y_DEPTH - 1), jax.lax.rem(item + 1, Y_DEPTH))
        )

    pl.when(item < total)(run)
    undone = jnp.maximum(item + 2 - Y_DEPTH, 0)

    @pl.loop(undone, jnp.where(item + 1 == total, total, undone))
    def _(left: Any) -> None:
        wait_for_y(left, jax.lax.rem(left, Y_DEPTH))


def decode(
    x: jax.Array,
    pool: jax.Array,
    *metadata: jax.Array,
    in_blocks: int,
    out_blocks: tuple[int, ...],
    classes: tuple[int, ...],
) -> jax.Array:
    """Decode's terms of one group's targets, f32[T, output blocks, 128]; elsewhere garbage.

    ``x`` [T, blocks, 128], zeros behind its inputs; ``metadata`` as ``_kernel`` has it.
    """
    num_tokens, x_blocks, _ = x.shape
    y_blocks = _padded(max(out_blocks), BLOCK_MULTIPLE)
    most = max(in_parallel(rank) for rank in classes)
    rows = max(in_parallel(rank) * _region_rows(rank, in_blocks, out_blocks) for rank in classes)
    out_rows = sum(_padded(blocks, 8) for blocks in out_blocks)
    kernel = functools.partial(
        _kernel,
        rows_per_page=pool.shape[1],
        in_blocks=in_blocks,
        out_blocks=out_blocks,
        classes=classes,
    )
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((num_tokens, out_rows, LANES), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(metadata),
            grid=(jnp.maximum(metadata[0][0], 1),),
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


def _prefill_kernel(
    num_items: Any,
    items: Any,
    pages: Any,
    page_start: Any,
    rank_of: Any,
    a_row: Any,
    b_row: Any,
    scaling: Any,
    x: Any,  # HBM [T, in blocks * 128]
    marks: Any,  # HBM i32[T, 128]
    delta: Any,  # HBM f32[T, y blocks, 128]
    pool: Any,  # HBM [P * R, 128]
    old_y: Any,
    y: Any,  # HBM [T, out blocks * 128], the same memory
    weights: Any,  # [2, rows, 128]
    x_in: Any,  # [2, TILE, in blocks * 128]
    marks_in: Any,  # i32[2, TILE, 128]
    delta_in: Any,  # f32[2, TILE, y blocks, 128]
    y_in: Any,  # [2, TILE, y blocks * 128]
    sums: Any,  # f32[TILE, 16 * rank]
    rows_arrived: Any,
    x_arrived: Any,
    delta_arrived: Any,
    y_arrived: Any,
    y_left: Any,
    leaving: Any,  # SMEM i32[2, 2]: whose window is on its way: its target + 1 or 0, its tile
    *,
    rows_per_page: int,
    in_blocks: int,
    out_blocks: tuple[int, ...],
    first_target: int,
    classes: tuple[int, ...],
) -> None:
    del old_y
    num_adapters = page_start.shape[0]
    total, item = num_items[0], pl.program_id(0)
    front = x.shape[0] % TILE  # tokens of a first tile that is not full
    sent = [_padded(blocks, 8) for blocks in out_blocks]

    def field(item: Any, number: int) -> Any:
        return items[item * T_WORDS + number]

    def outputs_of(item: Any) -> Any:
        return _of_target(out_blocks, field(item, T_TARGET))

    def for_rows(tile: Any, act: Any) -> None:
        """``act(first token, tokens)`` of a tile."""
        if not front:
            act(pl.multiple_of(tile * TILE, TILE), TILE)
            return
        pl.when(tile == 0)(lambda: act(0, front))
        start = pl.multiple_of((tile - 1) * TILE + front, SLOTS)
        pl.when(tile > 0)(lambda: act(start, TILE))

    def for_window(tile: Any, target: Any, act: Any) -> None:
        """``act(first token, tokens, first block of y, of delta, blocks)`` of a tile's window."""
        for place, blocks in enumerate(out_blocks):
            first, first_sent = sum(out_blocks[:place]), sum(sent[:place])

            def of_target(
                first: int = first, first_sent: int = first_sent, n: int = blocks
            ) -> None:
                for_rows(tile, lambda row, count: act(row, count, first, first_sent, n))

            pl.when(target == place)(of_target)

    def x_copies(item: Any, act: Any) -> None:
        slot = field(item, T_X)

        def of_rows(row: Any, count: int) -> None:
            for source, into in ((x, x_in), (marks, marks_in)):
                source, here = source.at[pl.ds(row, count)], into.at[slot, pl.ds(0, count)]
                act(pltpu.make_async_copy(source, here, x_arrived.at[slot]))

        for_rows(field(item, T_TILE), of_rows)

    def y_copies(tile: Any, target: Any, slot: Any, out: bool, act: Any) -> None:
        def of_window(row: Any, count: int, first: int, _: int, blocks: int) -> None:
            here = y_in.at[slot, pl.ds(0, count), pl.ds(0, blocks * LANES)]
            there = y.at[pl.ds(row, count), pl.ds(first * LANES, blocks * LANES)]
            ends = (here, there) if out else (there, here)
            act(pltpu.make_async_copy(*ends, (y_left if out else y_arrived).at[slot]))

        for_window(tile, target, of_window)

    def delta_copies(item: Any, act: Any) -> None:
        slot = field(item, T_Y)

        def of_window(row: Any, count: int, _: int, first: int, blocks: int) -> None:
            blocks = _padded(blocks, 8)
            source = delta.at[pl.ds(row, count), pl.ds(first, blocks)]
            here = delta_in.at[slot, pl.ds(0, count), pl.ds(0, blocks)]
            act(pltpu.make_async_copy(source, here, delta_arrived.at[slot]))

        for_window(field(item, T_TILE), field(item, T_TARGET), of_window)

    def start(copy: Any) -> None:
        copy.start()

    def wait(copy: Any) -> None:
        copy.wait()

    def wait_for_leaving(slot: Any) -> None:
        @pl.when(leaving[slot, 0] > 0)
        def _() -> None:
            y_copies(leaving[slot, 1], leaving[slot, 0] - 1, slot, True, wait)
            leaving[slot, 0] = 0

    def by_class(item: Any, act: Any) -> None:
        acts = [functools.partial(act, item, rank) for rank in classes]
        jax.lax.switch(field(item, T_CLASS), acts)

    def run_of(item: Any) -> tuple[Any, Any, Any]:
        """(adapter, its rank, rows of its run)."""
        adapter = field(item, T_ADAPTER)
        own = rank_of[field(item, T_TARGET) * num_adapters + adapter]
        return adapter, own, _run_rows(own, in_blocks, outputs_of(item))

    def fetch_rows(item: Any, rank: int) -> None:
        slot = jax.lax.rem(item, 2)
        adapter, own, rows = run_of(item)
        into = jnp.where(own == rank, 0, _region_rows(rank, in_blocks, out_blocks) - rows)

        def piece(state: Any) -> Any:
            row, into, left = state
            page = pages[page_start[adapter] + jax.lax.div(row, rows_per_page)]
            offset = jax.lax.rem(row, rows_per_page)
            count = jnp.minimum(left, rows_per_page - offset)
            source = page * rows_per_page + offset
            _rows_copy(pool, weights.at[slot], rows_arrived.at[slot], source, into, count).start()
            return row + count, into + count, left - count

        row = a_row[field(item, T_TARGET) * num_adapters + adapter]
        jax.lax.while_loop(lambda state: state[2] > 0, piece, (row, into, rows))

    def wait_for_rows(item: Any, rank: int) -> None:
        slot, outputs = jax.lax.rem(item, 2), outputs_of(item)
        _, own, rows = run_of(item)
        here = weights.at[slot]
        _wait_for_rows(here, rows_arrived.at[slot], rows)
        if rank > RANK_MULTIPLE:
            region = _region_rows(rank, in_blocks, out_blocks)
            pl.when(own != rank)(lambda: _spread(here, 0, region, own, rank, in_blocks, outputs))
        _clear_behind(here, 0, rank, in_blocks, outputs, out_blocks)

    def fetch(item: Any) -> None:
        pl.when(field(item, T_OPENS_TILE) == 1)(lambda: x_copies(item, start))

        @pl.when(field(item, T_OPENS) == 1)
        def _() -> None:
            wait_for_leaving(field(item, T_Y))
            y_copies(field(item, T_TILE), field(item, T_TARGET), field(item, T_Y), False, start)

        merges = field(item, T_ADAPTER) == 0
        pl.when(merges)(lambda: delta_copies(item, start))
        pl.when(jnp.logical_not(merges))(lambda: by_class(item, fetch_rows))

    def add(item: Any, block: Any, own: jax.Array, term: jax.Array) -> None:
        """Add to a block of y, [TILE, 128], where ``own``."""
        columns = pl.ds(pl.multiple_of(block * LANES, LANES), LANES)
        old = y_in[field(item, T_Y), :, columns].astype(jnp.float32)
        new = jnp.where(own, old + term, old)
        y_in[field(item, T_Y), :, columns] = new.astype(y_in.dtype)

    def merge(item: Any) -> None:
        delta_copies(item, wait)
        shift = OF_DECODE + first_target + field(item, T_TARGET)
        own = jax.lax.shift_right_logical(marks_in[field(item, T_X)], shift) & 1 == 1

        @pl.loop(0, outputs_of(item))
        def _(block: Any) -> None:
            add(item, block, own, delta_in[field(item, T_Y), :, block, :])

    def compute(item: Any, rank: int) -> None:
        slot, x_slot = jax.lax.rem(item, 2), field(item, T_X)
        chunk = max(rank, LANES)
        blocks = chunk // rank  # column blocks in a chunk
        group = jax.lax.broadcasted_iota(jnp.int32, (TILE, chunk), 1) // rank

        def chunk_at(base: int, index: Any, number: int) -> jax.Array:
            row = base + index * (BLOCK_MULTIPLE * rank) + number * chunk
            return weights[slot, pl.ds(_multiple_of(row, SEGMENT_ROWS), chunk), :]

        def shrink(first: Any, most: int) -> None:
            """Two units of 16 blocks, of which there are ``most``, with the same columns side by
            side: of a product with a chunk only its own columns count.
            """
            for number in range(-(-min(most, BLOCK_MULTIPLE) // blocks)):
                lanes = slice(number * chunk, (number + 1) * chunk)
                mine = jnp.zeros((TILE, chunk), jnp.float32)
                for place in range(min(blocks, most - number * blocks)):
                    within = number * blocks + place
                    both = range(1 + (BLOCK_MULTIPLE + within < most))
                    here = [((first + n) * BLOCK_MULTIPLE + within) * LANES for n in both]
                    here = [pl.ds(_multiple_of(column, LANES), LANES) for column in here]
                    inputs = jnp.concatenate([x_in[x_slot, :, at] for at in here], axis=1)
                    rows = jnp.concatenate([chunk_at(0, first + n, number) for n in both], axis=1)
                    product = dot(inputs, rows, transposed=True)
                    mine = product if blocks == 1 else jnp.where(group == place, product, mine)
                sums[:, lanes] += mine

        sums[:, : BLOCK_MULTIPLE * rank] = jnp.zeros((TILE, BLOCK_MULTIPLE * rank), jnp.float32)
        whole, rest = divmod(in_blocks, 2 * BLOCK_MULTIPLE)
        if whole:
            pl.loop(0, whole)(lambda pair: shrink(pair * 2, 2 * BLOCK_MULTIPLE))
        if rest:
            shrink(whole * 2, rest)

        adapter = field(item, T_ADAPTER)
        hidden = _sum_of_blocks(sums[:, : BLOCK_MULTIPLE * rank], rank)
        hidden *= scaling[field(item, T_TARGET) * num_adapters + adapter]
        parts = (
            [hidden]
            if blocks == 1
            else [jnp.where(group == place, hidden, 0.0) for place in range(blocks)]
        )
        parts = [part.astype(weights.dtype) for part in parts]
        own = marks_in[x_slot] & ((1 << OF_DECODE) - 1) == adapter
        base = _padded(in_blocks * rank, SEGMENT_ROWS)

        @pl.loop(0, pl.cdiv(outputs_of(item), BLOCK_MULTIPLE))
        def _(index: Any) -> None:
            for number in range(BLOCK_MULTIPLE // blocks):
                rows = chunk_at(base, index, number)
                for place, part in enumerate(parts):
                    block = index * BLOCK_MULTIPLE + number * blocks + place
                    add(item, block, own, dot(part, rows))

    def run() -> None:
        pl.when(item + 1 < total)(lambda: fetch(item + 1))
        pl.when(field(item, T_OPENS_TILE) == 1)(lambda: x_copies(item, wait))
        slot = field(item, T_Y)
        at = (field(item, T_TILE), field(item, T_TARGET), slot)
        pl.when(field(item, T_OPENS) == 1)(lambda: y_copies(*at, False, wait))
        merges = field(item, T_ADAPTER) == 0
        pl.when(merges)(lambda: merge(item))

        @pl.when(jnp.logical_not(merges))
        def _() -> None:
            by_class(item, wait_for_rows)
            by_class(item, compute)

        @pl.when(field(item, T_CLOSES) == 1)
        def _() -> None:
            y_copies(*at, True, start)
            leaving[slot, 0] = field(item, T_TARGET) + 1
            leaving[slot, 1] = field(item, T_TILE)

        @pl.when(item == total - 1)
        def _() -> None:
            for slot in range(2):
                wait_for_leaving(slot)

    @pl.when(item == 0)
    def _() -> None:
        for slot in range(2):
            leaving[slot, 0] = 0
        pl.when(total > 0)(lambda: fetch(0))

    pl.when(item < total)(run)


def prefill(
    y: jax.Array,
    x: jax.Array,
    pool: jax.Array,
    delta: jax.Array,
    marks: jax.Array,
    *metadata: jax.Array,
    in_blocks: int,
    out_blocks: tuple[int, ...],
    first_target: int,
    classes: tuple[int, ...],
) -> jax.Array:
    """``y`` [T, blocks * 128] with the terms of one group's targets, in place; T a multiple of 8.

    ``x`` [T, in_blocks * 128]; ``delta``: decode's terms as ``decode`` gives them; ``metadata`` as
    ``_prefill_kernel`` has it.
    """
    y_blocks = _padded(max(out_blocks), BLOCK_MULTIPLE)
    rank = max(classes)
    rows = max(_region_rows(rank, in_blocks, out_blocks) for rank in classes)
    kernel = functools.partial(
        _prefill_kernel,
        rows_per_page=pool.shape[1],
        in_blocks=in_blocks,
        out_blocks=out_blocks,
        first_target=first_target,
        classes=classes,
    )
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(y.shape, y.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(metadata),
            grid=(jnp.maximum(metadata[0][0], 1),),
            in_specs=[anywhere] * 5,
            out_specs=anywhere,
            scratch_shapes=[
                pltpu.VMEM((2, rows, LANES), pool.dtype),
                pltpu.VMEM((2, TILE, in_blocks * LANES), x.dtype),
                pltpu.VMEM((2, TILE, LANES), jnp.int32),
                pltpu.VMEM((2, TILE, _padded(max(out_blocks), 8), LANES), jnp.float32),
                pltpu.VMEM((2, TILE, y_blocks * LANES), y.dtype),
                pltpu.VMEM((TILE, BLOCK_MULTIPLE * rank), jnp.float32),
                *[pltpu.SemaphoreType.DMA((2,)) for _ in range(5)],
                pltpu.SMEM((2, 2), jnp.int32),
            ],
        ),
        input_output_aliases={len(metadata) + 4: 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=VMEM_BYTES,
            disable_bounds_checks=True,
        ),
        name="paged_lora_prefill",
    )(*metadata, x, marks, delta, pool.reshape(-1, LANES), y)
