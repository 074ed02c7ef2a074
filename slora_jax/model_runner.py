"""ModelRunner: the compiled steps and the device arrays they run on.

Owns the weights' state, the page pool and the set of compiled sizes. Takes the scheduler's
decision, packs it, launches the programs and brings back tokens. It refuses to know why a request
was chosen and what becomes of its tokens.

Two parts make a step: *forward* (tokens → hidden states; the pool is donated) and *sample* (the
rows that end a chunk → next tokens). They are separate so that the many ways to sample multiply
only the small one's compilations.

``launch`` returns while the device computes. The next step may be launched before this one's tokens
are read: they stay on the device, and that step takes them from there.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.dispatch import PLATFORMS
from slora_jax.adapter_cache import SwapIn
from slora_jax.adapter_store import BASE_VERSION
from slora_jax.adapter_tables import AdapterTables
from slora_jax.batch import ForwardBatch
from slora_jax.forward_programs import (
    SAME,
    Programs,
    Weights,
    compiler_options,
    count_compiles,
    make_forward,
    over_leaves,
)
from slora_jax.input_packing import (
    StepShape,
    first_rows,
    needed_shape,
    pack_sampling,
    pack_step,
    versions_of,
)
from slora_jax.models.llama import Llama, PoolView
from slora_jax.page_pool import Pool, allocate_pool, swap_in
from slora_jax.request import Request
from slora_jax.sampling import (
    SamplingBatch,
    TokenLogprobs,
    sample,
    token_logprobs,
    with_sampled,
)
from slora_jax.scheduler import Chunk, SchedulerOutput
from slora_jax.sharding import named_sharding, on_each_device, replicate, specs_of
from slora_jax.trace_store import TraceStore
from slora_jax.transfer import Packed, pack, unpack

RoundUp = Callable[[tuple[int, ...]], tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class ScoredToken:
    """One token with its raw log-probability, rank, and the most likely alternatives."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What one step computed, by request id."""

    tokens: dict[str, int]
    """The next token of each request whose known tokens are all computed."""
    logprobs: dict[str, ScoredToken]
    """For the requests that asked for ``logprobs``."""
    prompt_logprobs: dict[str, list[tuple[int, ScoredToken]]]
    """(position, prompt token there) for the requests that asked for ``prompt_logprobs``."""


@dataclasses.dataclass(frozen=True)
class LaunchedStep:
    """A step on the device; ``read`` waits for it."""

    sampled: jax.Array
    """i32[most requests at once]: next tokens, first those of ``ending`` in order."""
    ending: tuple[Request, ...]
    """The requests that get a token."""
    scores: TokenLogprobs | None
    """Of the sampled tokens, where anyone asked."""
    prompt_scores: tuple[list[tuple[Request, int, int]], TokenLogprobs] | None
    """(request, position, token there) of each row of the scores."""

    def start_reading(self) -> None:
        """Begin to copy the results to the host, without waiting."""
        for array in jax.tree.leaves((self.sampled, self.scores, self.prompt_scores)):
            if isinstance(array, jax.Array):
                array.copy_to_host_async()

    def read(self) -> StepResult:
        """Wait for the results."""
        ids = np.asarray(self.sampled)[: len(self.ending)]
        tokens = dict(zip([r.request_id for r in self.ending], ids.tolist(), strict=True))
        logprobs: dict[str, ScoredToken] = {}
        if self.scores is not None:
            asked = [_num_top(request.sampling_params.logprobs) for request in self.ending]
            scored = _to_scored(ids, self.scores, asked)
            for request, token, top in zip(self.ending, scored, asked, strict=True):
                if top >= 0:
                    logprobs[request.request_id] = token
        prompt_logprobs: dict[str, list[tuple[int, ScoredToken]]] = {}
        if self.prompt_scores is not None:
            wanted, scores = self.prompt_scores
            targets = np.array([token for _, _, token in wanted], np.int32)
            asked = [_num_top(r.sampling_params.prompt_logprobs) for r, _, _ in wanted]
            for (request, position, _), token in zip(
                wanted, _to_scored(targets, scores, asked), strict=True
            ):
                prompt_logprobs.setdefault(request.request_id, []).append((position, token))
        return StepResult(tokens, logprobs, prompt_logprobs)


class Buckets:
    """Sizes that have been compiled; picks one of them for a need, or the size it rounds up to.

    Invariant: ``choose`` returns at least what is needed in every dimension.
    """

    def __init__(self, round_up: RoundUp, slack: Sequence[float]):
        """``slack``: a compiled size up to this many times the rounded one serves, so that a
        shrinking batch keeps its program.
        """
        self._round_up = round_up
        self._slack = tuple(slack)
        self._compiled: set[tuple[int, ...]] = set()

    def choose(self, need: tuple[int, ...]) -> tuple[int, ...]:
        """The smallest compiled size that serves, or a new one."""
        exact = self._round_up(need)
        largest = [size * slack for size, slack in zip(exact, self._slack, strict=True)]
        fitting = [
            size
            for size in self._compiled
            if all(n <= s <= most for n, s, most in zip(need, size, largest, strict=True))
        ]
        best = min(fitting, key=lambda size: (sum(size), size), default=exact)
        self._compiled.add(best)
        return best


def _power(base: int, number: int, first: int = 1) -> int:
    """The least ``first * base ** k`` that is at least ``number``; 0 for 0."""
    size = first
    while size < number:
        size *= base
    return size if number else 0


MATMUL_ROWS = 64
"""What the GPU's matmuls take at once; fewer cost about the same."""


def _matmul_rows(number: int) -> int:
    """``number`` rounded up to 16 or a multiple of MATMUL_ROWS; 0 for 0."""
    return 16 if 0 < number <= 16 else -(-number // MATMUL_ROWS) * MATMUL_ROWS


def _few(number: int) -> int:
    """``number`` rounded up to one of 0, 1, 2, 3, 4, 6, 8, 12, 16, 24, …"""
    power = _power(2, number)
    return power * 3 // 4 if power > 2 and number <= power * 3 // 4 else power


def step_buckets(kernels: str, max_num_seqs: int, max_tiles: int, tile: int) -> Buckets:
    """Of (decode rows, prefill tiles, rank): what a row too many costs decides how fine they are.

    Plain XLA pays for each row, and CPUs compile fast. Pallas kernels follow the tokens that there
    are, so ranks are coarse there, and rows cost what the dense matmuls take for them: on an H200
    0.85 ms each 64 rows beyond the first 64, of a step of 4 to 15 ms (Llama-7B).
    """
    unit = max(128 // tile, 1)

    def fine(need: tuple[int, ...]) -> tuple[int, ...]:
        decode, tiles, rank = need
        return (
            min(_power(2, decode), max_num_seqs),
            min(_power(2, tiles), max_tiles),
            _power(2, rank),
        )

    def coarse(need: tuple[int, ...]) -> tuple[int, ...]:
        decode, tiles, rank = need
        rows = _power(2, max(decode, 1), first=MATMUL_ROWS) if tiles else _matmul_rows(decode)
        tiles = min(unit * _few(-(-tiles // unit)), max_tiles)
        return min(rows, max_num_seqs), tiles, _power(8, rank, first=1024)

    if kernels in PLATFORMS:
        return Buckets(coarse, slack=(4, 1, math.inf))
    return Buckets(fine, slack=(4, 4, 4))


def steps_to_come(
    kernels: str, max_num_seqs: int, max_tiles: int, rank: int
) -> Iterator[tuple[int, int, int]]:
    """Needs whose buckets serve any step of at most these sizes where kernels serve, and otherwise
    steps of the base alone or of adapters whose ranks sum to a quarter of ``rank`` or more."""
    powers = {min(2**power, max_num_seqs) for power in range(max_num_seqs.bit_length() + 1)}
    multiples = {*range(MATMUL_ROWS, max_num_seqs, MATMUL_ROWS)}
    decodes = powers | multiples if kernels in PLATFORMS else powers
    # A size serves where up to four times fewer are needed.
    beside_prefill = powers if kernels in PLATFORMS else {0, max_num_seqs, *sorted(powers)[2::2]}
    for ranks in {0, rank}:
        for decode in sorted(decodes):
            yield decode, 0, ranks
        for decode in sorted(beside_prefill):
            for tiles in range(1, max_tiles + 1):
                yield decode, tiles, ranks


def row_buckets(kernels: str, most: int) -> Buckets:
    """Of rows whose logits are computed: as coarse as rows of decode."""
    if kernels in PLATFORMS:
        return Buckets(lambda need: (min(_matmul_rows(need[0]), most),), slack=(4,))
    return Buckets(lambda need: (min(_power(2, need[0]), most),), slack=(4,))


def make_sample_program(model: Llama, mesh: jax.sharding.Mesh, max_num_seqs: int) -> Programs:
    """(weights, hidden states of ``ending_row``, tokens of the step before, SamplingBatch packed;
    ``size`` rows, ``num_top`` alternatives or -1) → (i32[max_num_seqs], their scores).
    """
    head_of, weights = over_leaves(model)
    shards, vocab_size = model.shards, model.config.vocab_size

    def sample_rows(
        weights: Weights,
        ending: jax.Array,
        sampled: jax.Array,
        packed: Packed,
        size: int,
        num_top: int,
    ) -> tuple[jax.Array, TokenLogprobs | None]:
        logits = head_of(weights).logits(ending[:size])
        how, scores = with_sampled(unpack(packed), sampled), None
        if num_top < 0 and how.truncation is None and vocab_size % shards.count == 0:
            tokens = sample(logits, how, shards)
        else:  # looks at all logits of a row several times: gather them once
            logits = shards.gather(logits)[:, :vocab_size]
            tokens = sample(logits, how)
            scores = token_logprobs(logits, tokens, num_top) if num_top >= 0 else None
        return jnp.pad(tokens, (0, max_num_seqs - len(tokens))), scores

    return Programs(
        _cut(sample_rows, mesh, (specs_of(weights, mesh), SAME, SAME, SAME)),
        static_argnames=("size", "num_top"),
        compiler_options=compiler_options(mesh.devices.flat[0].platform),
    )


def _cut(
    function: Callable[..., Any], mesh: jax.sharding.Mesh, specs: tuple[Any, ...]
) -> Callable[..., Any]:
    """``function`` on each device of ``mesh``, the same results on all; keyword arguments are
    static."""

    def program(*args: Any, **static: Any) -> Any:
        own = functools.partial(function, **static)
        return on_each_device(own, mesh, specs, SAME)(*args)

    return program


class ModelRunner:
    """Weights, pool and programs on a mesh. Not thread-safe; the pool has no second reference."""

    def __init__(
        self,
        model: Llama,
        view: PoolView,
        *,
        num_pages: int,
        dtype: jnp.dtype,
        mesh: jax.sharding.Mesh,
        max_num_seqs: int,
        prefill_tile: int,
        max_prefill_tokens: int,
        max_model_len: int,
        owns_weights: bool = True,
        traces: TraceStore | None = None,
    ):
        self.view = view
        self.max_num_seqs = max_num_seqs
        self._owns_weights = owns_weights
        self.prefill_tile = prefill_tile
        self.max_prefill_tokens = max_prefill_tokens
        self._mesh = mesh
        self._forward = make_forward(model, view, mesh, traces)
        head_of, self._weights = over_leaves(model)
        vocab_size, self._hidden_size = model.config.vocab_size, model.config.hidden_size
        self._allocate_pool = functools.partial(
            allocate_pool,
            model.config.num_layers,
            (num_pages, mesh.size * view.kv.rows_per_page, 128),
            dtype,
            named_sharding(mesh, ("pages", "page_rows", "lanes")),
        )
        self.pool: Pool = self._allocate_pool()
        self._table_width = -(-max_model_len // view.kv.page_size)
        self._adapters = AdapterTables(
            view.adapters, num_layers=model.config.num_layers, max_adapters=num_pages
        )
        max_tiles = max_prefill_tokens // prefill_tile
        self._max_tiles = max_tiles
        self._steps = step_buckets(view.kernels, max_num_seqs, max_tiles, prefill_tile)
        self._samples = row_buckets(view.kernels, max_num_seqs)
        self._scores = row_buckets(view.kernels, max_num_seqs + max_prefill_tokens)
        self._sampled = replicate(mesh, np.zeros(max_num_seqs, np.int32))
        self._weight_bytes = sum(leaf.nbytes for leaf in self._weights)
        self._page_bytes = sum(layer.nbytes for layer in self.pool) // num_pages
        self.num_bytes = 0
        """Bytes that the steps had to read at least: weights, and pages of KV and adapters, each
        once a step."""
        self.num_tokens = 0
        """Tokens computed since the start."""
        self.num_token_rows = 0
        """Rows computed, padding included."""
        self._sampled_rows: dict[str, int] = {}  # request id → row of `_sampled`

        def score_rows(
            weights: Weights, hidden: jax.Array, packed: Packed, num_top: int
        ) -> TokenLogprobs:
            rows, tokens = unpack(packed)
            logits = model.shards.gather(head_of(weights).logits(hidden[rows]))
            return token_logprobs(logits[:, :vocab_size], tokens, num_top)

        self._sample = make_sample_program(model, mesh, max_num_seqs)
        self._score = jax.jit(
            _cut(score_rows, mesh, (specs_of(self._weights, mesh), SAME, SAME)),
            static_argnames="num_top",
            compiler_options=compiler_options(mesh.devices.flat[0].platform),
        )

    @property
    def num_compiles(self) -> int:
        """Programs compiled so far."""
        return self._forward.num_compiles() + len(self._sample) + count_compiles(self._score)

    def warm_up(self, ranks: Sequence[Sequence[int]]) -> None:
        """Compile, in parallel, for any step of greedy requests of adapters of these ``ranks``, one
        for each target.
        """
        largest = sorted((max(of_adapter) for of_adapter in ranks), reverse=True)
        rank = sum(largest[: self.max_num_seqs])
        for of_adapter in ranks:
            self._adapters.expect(of_adapter)
        ending = jax.ShapeDtypeStruct(
            (self.max_num_seqs, self._hidden_size),
            self.pool[0].dtype,
            sharding=named_sharding(self._mesh, ()),
        )
        how = pack(SamplingBatch())
        limits = self.max_num_seqs, self._max_tiles, rank
        needs = list(steps_to_come(self.view.kernels, *limits))
        shapes = {self._steps.choose(need) for need in needs}
        sizes = {self._samples.choose((max(decode, 1),))[0] for decode, _, _ in needs}
        with concurrent.futures.ThreadPoolExecutor() as threads:
            pending = []
            for shape in sorted(shapes, reverse=True):
                batch = pack(self._pack(SchedulerOutput(), [BASE_VERSION], StepShape(*shape)))
                lowered = self._forward.lower(self.pool, self._sampled, batch)
                pending.append(threads.submit(lowered))
            for size in sizes:
                lowered = self._sample.lower(
                    self._weights, ending, self._sampled, how, size=size, num_top=-1
                )
                pending.append(threads.submit(lowered))
            for future in pending:
                future.result()

    def swap_in(self, swap: SwapIn) -> None:
        """Copy an adapter's pages from CPU memory into the pool; later steps see it."""
        self.pool = swap_in(self.pool, swap.pages, swap.packed.pages)
        self._adapters.place(swap.version, swap.packed, swap.pages)

    def forget(self, version: int) -> None:
        """The adapter has left the pool."""
        self._adapters.forget(version)

    def launch(self, output: SchedulerOutput) -> LaunchedStep:
        """Start one step. Tokens in flight may be those of the step launched before, and no older
        ones.
        """
        versions = versions_of(output)
        need = needed_shape(output, self._adapters.sum_of_ranks(versions), self.prefill_tile)
        shape = StepShape(*self._steps.choose(need))
        batch = pack(self._pack(output, versions, shape))
        hidden, self.pool = self._forward(self.pool, self._sampled, batch)
        chunks = (*output.decode, *output.prefill)
        self._count(chunks, versions, shape)
        rows = first_rows(output, shape.decode, self.prefill_tile)
        prompt_scores = self._score_prompts(hidden.all, chunks, rows)
        ending = tuple([chunk.request for chunk in chunks if chunk.is_last])
        scores = self._sample_next(hidden.ending, ending)
        launched = LaunchedStep(self._sampled, ending, scores, prompt_scores)
        launched.start_reading()
        return launched

    def _count(self, chunks: Sequence[Chunk], versions: Sequence[int], shape: StepShape) -> None:
        self.num_tokens += sum([chunk.num_tokens for chunk in chunks])
        self.num_token_rows += shape.decode + shape.tiles * self.prefill_tile
        # KV counts by the token, adapters by the page.
        kv_pages = sum([c.start + c.num_tokens for c in chunks]) / self.view.kv.page_size
        pages = kv_pages + self._adapters.num_pages(versions)
        self.num_bytes += self._weight_bytes + int(self._page_bytes * pages)

    def _pack(
        self, output: SchedulerOutput, versions: Sequence[int], shape: StepShape
    ) -> ForwardBatch:
        return pack_step(
            output,
            self._adapters,
            versions,
            shape,
            self._sampled_rows,
            tile=self.prefill_tile,
            page_size=self.view.kv.page_size,
            table_width=self._table_width,
            max_num_seqs=self.max_num_seqs,
        )

    def _sample_next(self, ending: jax.Array, requests: Sequence[Request]) -> TokenLogprobs | None:
        """Leaves a token for each request in ``_sampled``; ``ending`` has their hidden states."""
        if not requests:
            self._sampled_rows = {}
            return None
        (size,) = self._samples.choose((len(requests),))
        how = pack_sampling(requests, size, self._sampled_rows)
        asked = max([_num_top(request.sampling_params.logprobs) for request in requests])
        self._sampled, scores = self._sample(
            self._weights,
            ending,
            self._sampled,
            pack(how),
            size=size,
            num_top=_bucket_top(asked),
        )
        self._sampled_rows = {request.request_id: row for row, request in enumerate(requests)}
        return scores

    def _score_prompts(
        self, hidden: jax.Array, chunks: Sequence[Chunk], rows: Sequence[int]
    ) -> tuple[list[tuple[Request, int, int]], TokenLogprobs] | None:
        """Each computed prompt position scores the prompt token that follows it."""
        wanted: list[tuple[Request, int, int]] = []  # request, position of the token, the token
        row_of: list[int] = []
        for chunk, first in zip(chunks, rows, strict=True):
            request, prompt = chunk.request, chunk.request.prompt_token_ids
            if request.sampling_params.prompt_logprobs is None:
                continue
            for position in range(
                chunk.start, min(chunk.start + chunk.num_tokens, len(prompt) - 1)
            ):
                row_of.append(first + position - chunk.start)
                wanted.append((request, position + 1, prompt[position + 1]))
        if not wanted:
            return None
        (size,) = self._scores.choose((len(wanted),))
        row_ids, targets = np.zeros((2, size), np.int32)
        row_ids[: len(wanted)] = row_of
        targets[: len(wanted)] = [token for _, _, token in wanted]
        asked = max(_num_top(request.sampling_params.prompt_logprobs) for request, _, _ in wanted)
        scores = self._score(
            self._weights, hidden, pack((row_ids, targets)), num_top=_bucket_top(asked)
        )
        return wanted, scores

    def renew_pool(self) -> None:
        """Start anew after a step failed: an empty pool, no adapters, no tokens on the device."""
        for array in (*self.pool, self._sampled):
            array.delete()
        self._adapters.clear()
        self._sampled_rows = {}
        self._sampled = replicate(self._mesh, np.zeros(self.max_num_seqs, np.int32))
        self.pool = self._allocate_pool()

    def close(self) -> None:
        """Give the device memory back, but for weights that are the caller's."""
        weights = self._weights if self._owns_weights else ()
        for array in jax.tree.leaves((weights, self.pool, self._sampled)):
            array.delete()
        self._adapters.clear()


def _num_top(asked: int | None) -> int:
    return -1 if asked is None else asked


def _bucket_top(asked: int) -> int:
    """-1 (no log-probabilities), 0, 5 or 20: few programs whatever the requests ask for."""
    return next(top for top in (-1, 0, 5, 20) if asked <= top)


def _to_scored(
    tokens: np.ndarray, scores: TokenLogprobs, asked: Sequence[int]
) -> list[ScoredToken]:
    """The first ``len(asked)`` rows, each with as many alternatives as it asked for."""
    logprob, rank = np.asarray(scores.logprob), np.asarray(scores.rank)
    top_ids, top_logprobs = np.asarray(scores.top_ids), np.asarray(scores.top_logprobs)
    return [
        ScoredToken(
            int(tokens[k]),
            float(logprob[k]),
            int(rank[k]),
            tuple(
                (int(i), float(p))
                for i, p in zip(top_ids[k, :top], top_logprobs[k, :top], strict=True)
            )
            if top > 0
            else (),
        )
        for k, top in enumerate(asked)
    ]
