"""From the scheduler's decision to the arrays of one step: all NumPy, no device.

Owns the flat layout that ``ForwardBatch`` describes (decode rows first, then prefill tiles of one
request each) and the padding of everything to the step's buckets. Refuses to know how a step is
computed, and decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pallas_kernels.paged_attention.api import AttentionBatch
from slora_jax.adapter_store import BASE_VERSION
from slora_jax.adapter_tables import AdapterTables
from slora_jax.batch import ForwardBatch
from slora_jax.request import Request
from slora_jax.sampling import Penalties, Randomness, SamplingBatch, Truncation
from slora_jax.sampling_params import split_seed
from slora_jax.scheduler import SchedulerOutput

MIN_HISTORY = 64
"""Smallest padded length of the token histories that penalties read."""

_FLOAT32 = np.finfo(np.float32)


class StepShape(NamedTuple):
    """What fixes a step's compiled program. Each is a bucket: at least what the step needs."""

    decode: int
    """D: rows of one token."""
    tiles: int
    """Prefill tiles."""
    rank: int
    """Sum over the step's adapters of their largest rank; 0 compiles no LoRA at all."""


def versions_of(output: SchedulerOutput) -> list[int]:
    """The adapters of a step, the base first whether it has tokens or not."""
    versions = [chunk.request.adapter_version for chunk in (*output.decode, *output.prefill)]
    return list(dict.fromkeys([BASE_VERSION, *versions]))


def needed_shape(output: SchedulerOutput, sum_of_ranks: int, tile: int) -> StepShape:
    """The smallest shape that holds the step, of adapters whose largest ranks have this sum."""
    return StepShape(
        decode=len(output.decode),
        tiles=sum(-(-chunk.num_tokens // tile) for chunk in output.prefill),
        rank=sum_of_ranks,
    )


def first_rows(output: SchedulerOutput, num_decode: int, tile: int) -> list[int]:
    """The row of each chunk's first token in the flat batch, of ``num_decode`` decode rows."""
    rows = list(range(len(output.decode)))
    row = num_decode
    for chunk in output.prefill:
        rows.append(row)
        row += -(-chunk.num_tokens // tile) * tile
    return rows


def pack_step(
    output: SchedulerOutput,
    adapters: AdapterTables,
    versions: Sequence[int],
    shape: StepShape,
    sampled_rows: Mapping[str, int],
    *,
    tile: int,
    page_size: int,
    table_width: int,
    max_num_seqs: int,
) -> ForwardBatch:
    """Fill a step's arrays; everything beyond the real tokens points at the null page.

    ``versions``: ``versions_of`` the step. ``sampled_rows``: request id → row among the tokens that
    the step before samples. ``table_width`` is the most pages one request can have.
    """
    chunks = (*output.decode, *output.prefill)
    rows = first_rows(output, shape.decode, tile)
    known, sampled_row, ending_row = [], [-1] * shape.decode, []
    for (request, start, num_tokens, is_last), row in zip(chunks, rows, strict=True):
        if request.num_tokens_in_flight:  # the chunk is the one token whose value is not known
            assert num_tokens == request.num_tokens_in_flight == 1
            known.append(0)
            sampled_row[row] = sampled_rows[request.request_id]
        else:
            known += request.tokens_between(start, start + num_tokens)
        if is_last:
            ending_row.append(row + num_tokens - 1)

    # Of each chunk.
    start = np.array([chunk.start for chunk in chunks], np.int32)
    length = np.array([chunk.num_tokens for chunk in chunks], np.int32)
    pages = _page_tables([chunk.request for chunk in chunks], table_width)
    index_of_version = {version: index for index, version in enumerate(versions)}
    index = np.array([index_of_version[c.request.adapter_version] for c in chunks], np.int32)

    # Of each token: its chunk, where it is in that, and its row.
    chunk_of = np.repeat(np.arange(len(chunks)), length)
    offset = np.arange(len(chunk_of)) - np.repeat(np.cumsum(length) - length, length)
    row_of = np.repeat(np.array(rows, np.int32), length) + offset

    num_tokens = shape.decode + shape.tiles * tile
    token_ids, slots, adapter_index = np.zeros((3, num_tokens), np.int32)
    positions = np.full(num_tokens, -1, np.int32)
    position = start[chunk_of] + offset
    token_ids[row_of] = known
    positions[row_of] = position
    slots[row_of] = pages[chunk_of, position // page_size] * page_size + position % page_size
    adapter_index[row_of] = index[chunk_of]

    num_decode = len(output.decode)
    tables = np.repeat(pages[num_decode:], -(-length[num_decode:] // tile), axis=0)
    page_table = np.zeros((shape.decode + shape.tiles, table_width), np.int32)
    page_table[:num_decode] = pages[:num_decode]
    page_table[shape.decode : shape.decode + len(tables)] = tables
    lora = None
    if shape.rank:
        lora = adapters.pack(
            versions, adapter_index, rank_bucket=shape.rank, most_adapters=max_num_seqs
        )
    return ForwardBatch(
        token_ids=token_ids,
        sampled_row=np.array(sampled_row, np.int32),
        ending_row=np.array(ending_row + [0] * (max_num_seqs - len(ending_row)), np.int32),
        attention=AttentionBatch(
            slots=slots,
            positions=positions,
            page_table=page_table,
            num_decode=shape.decode,
            tile=tile,
        ),
        lora=lora,
    )


def _page_tables(requests: Sequence[Request], width: int) -> np.ndarray:
    """i32[requests, width]: the pages of each, then the null page."""
    size = 4 * width
    rows = [request.pages.tobytes().ljust(size, b"\0") for request in requests]
    return np.frombuffer(b"".join(rows), np.int32).reshape(-1, width)


def pack_sampling(
    requests: Sequence[Request],
    size: int,
    sampled_rows: Mapping[str, int],
) -> SamplingBatch:
    """How to draw the next token of each request, padded to ``size`` greedy rows.

    A part that no request needs is None, which compiles to nothing. ``sampled_rows`` as for
    ``pack_step``.
    """
    params = [request.sampling_params for request in requests]
    if all([p.is_argmax for p in params]):
        return SamplingBatch()

    def column(name: str, neutral: float, dtype: type) -> np.ndarray:
        values = np.full(size, neutral, dtype)
        values[: len(params)] = [getattr(p, name) for p in params]
        return values

    randomness = truncation = penalties = None
    if not all(p.is_greedy for p in params):
        temperature = np.zeros(size, np.float32)
        temperature[: len(params)] = [
            0.0 if p.is_greedy else min(p.temperature, float(_FLOAT32.max)) for p in params
        ]
        words = np.zeros((size, 2), np.uint32)
        position = np.zeros(size, np.int32)
        words[: len(requests)] = [split_seed(r.seed) for r in requests]
        position[: len(requests)] = [r.num_tokens_with_in_flight for r in requests]
        randomness = Randomness(temperature=temperature, seed=words, position=position)
        if any(p.top_k > 0 or p.top_p < 1 or p.min_p > 0 for p in params):
            truncation = Truncation(
                top_k=np.maximum(column("top_k", 0, np.int32), 0),
                top_p=column("top_p", 1, np.float32),
                min_p=column("min_p", 0, np.float32),
            )
    if any(p.has_penalties for p in params):
        penalties = Penalties(
            history=_padded([_history(r, sampled_rows) for r in requests], size),
            prompt_len=np.asarray(
                [len(r.prompt_token_ids) for r in requests] + [0] * (size - len(requests)), np.int32
            ),
            repetition=column("repetition_penalty", 1, np.float64)
            .clip(1e-30, _FLOAT32.max)  # less would make logits Inf
            .astype(np.float32),
            presence=column("presence_penalty", 0, np.float32),
            frequency=column("frequency_penalty", 0, np.float32),
        )
    banned = [sorted(request.banned_token_ids()) for request in requests]
    return SamplingBatch(
        randomness=randomness,
        truncation=truncation,
        penalties=penalties,
        banned=_padded(banned, size, smallest=8) if any(banned) else None,
    )


def _history(request: Request, sampled_rows: Mapping[str, int]) -> list[int]:
    """All tokens of a request; one in flight as ``Penalties.history`` says it."""
    known = [*request.prompt_token_ids, *request.output_token_ids]
    if not request.num_tokens_in_flight:
        return known
    return [*known, -2 - sampled_rows[request.request_id]]


def _padded(rows: Sequence[Sequence[int]], size: int, smallest: int = MIN_HISTORY) -> np.ndarray:
    """i32[size, width], -1 beyond each row's end; width is a power of two of at least
    ``smallest``."""
    width = smallest
    while width < max((len(row) for row in rows), default=0):
        width *= 2
    result = np.full((size, width), -1, np.int32)
    for k, row in enumerate(rows):
        result[k, : len(row)] = row
    return result
