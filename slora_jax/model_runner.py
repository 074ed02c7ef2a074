"""ModelRunner: the compiled steps and the device arrays they run on.

Owns the weights' state, the page pool and the set of compiled sizes. Takes the scheduler's
decision, packs it, launches the programs and brings back tokens. It refuses to know why a request
was chosen and what becomes of its tokens.

Two parts make a step: *forward* (tokens → hidden states; the pool is donated) and *sample* (the
rows that end a chunk → next tokens). They are separate so that the many ways to sample multiply
only the small one's compilations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from slora_jax.adapter_cache import SwapIn
from slora_jax.forward_programs import Weights, count_compiles, make_forward, over_leaves
from slora_jax.input_packing import (
    ResidentAdapter,
    StepShape,
    first_rows,
    last_rows,
    needed_shape,
    pack_sampling,
    pack_step,
)
from slora_jax.models.llama import Llama, PoolView
from slora_jax.page_pool import Pool, allocate_pool, swap_in
from slora_jax.request import Request
from slora_jax.sampling import SamplingBatch, TokenLogprobs, sample, token_logprobs
from slora_jax.scheduler import Chunk, SchedulerOutput
from slora_jax.sharding import named_sharding

BUCKET_SLACK = 4
"""A compiled size up to this many times the needed one is used before a new one is compiled."""


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


class Buckets:
    """Sizes that have been compiled; picks one of them for a need, or the next power of two.

    Invariant: ``choose`` returns at least what is needed in every dimension, and 0 exactly where
    nothing is needed.
    """

    def __init__(self, largest: Sequence[int]):
        self._largest = tuple(largest)
        self._compiled: set[tuple[int, ...]] = set()

    def choose(self, need: Sequence[int]) -> tuple[int, ...]:
        """A shrinking batch keeps its program until it is ``BUCKET_SLACK`` times too large."""
        exact = tuple(
            min(1 << (n - 1).bit_length(), top) if n else 0
            for n, top in zip(need, self._largest, strict=True)
        )
        fitting = [size for size in self._compiled if _serves(size, need, exact)]
        best = min(fitting, key=lambda size: (sum(size), size), default=exact)
        self._compiled.add(best)
        return best


def _serves(size: Sequence[int], need: Sequence[int], exact: Sequence[int]) -> bool:
    return all(s >= n and s <= BUCKET_SLACK * e for s, n, e in zip(size, need, exact, strict=True))


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
    ):
        self.view = view
        self.prefill_tile = prefill_tile
        self.max_prefill_tokens = max_prefill_tokens
        self._forward = make_forward(model, view, mesh.devices.flat[0].platform)
        head_of, self._weights = over_leaves(model)
        self.pool: Pool = allocate_pool(
            model.config.num_layers,
            (num_pages, view.kv.rows_per_page, 128),
            dtype,
            named_sharding(mesh, ("pages", "page_rows", "lanes")),
        )
        self._table_width = -(-max_model_len // view.kv.page_size)
        self._adapters: dict[int, ResidentAdapter] = {}
        self._steps = Buckets((max_num_seqs, max_prefill_tokens // prefill_tile, 1 << 30))
        self._samples = Buckets((1 << 30,))
        self._scores = Buckets((1 << 30,))

        def sample_rows(
            weights: Weights, hidden: jax.Array, rows: jax.Array, how: SamplingBatch, num_top: int
        ) -> tuple[jax.Array, TokenLogprobs | None]:
            logits = head_of(weights).logits(hidden[rows])
            tokens = sample(logits, how)
            return tokens, token_logprobs(logits, tokens, num_top) if num_top >= 0 else None

        def score_rows(
            weights: Weights, hidden: jax.Array, rows: jax.Array, tokens: jax.Array, num_top: int
        ) -> TokenLogprobs:
            return token_logprobs(head_of(weights).logits(hidden[rows]), tokens, num_top)

        self._sample = jax.jit(sample_rows, static_argnames="num_top")
        self._score = jax.jit(score_rows, static_argnames="num_top")

    @property
    def num_compiles(self) -> int:
        """Programs compiled so far."""
        return self._forward.num_compiles() + count_compiles(self._sample, self._score)

    def swap_in(self, swap: SwapIn) -> None:
        """Copy an adapter's pages from CPU memory into the pool; later steps see it."""
        self.pool = swap_in(self.pool, swap.pages, swap.packed.pages)
        self._adapters[swap.version] = ResidentAdapter.place(
            swap.packed, tuple(swap.pages), self.view.adapters
        )

    def forget(self, version: int) -> None:
        """The adapter has left the pool."""
        self._adapters.pop(version, None)

    def run(self, output: SchedulerOutput, seeds: Sequence[int]) -> StepResult:
        """Run one step and wait for its tokens. ``seeds``: one per chunk that ends."""
        need = needed_shape(output, self._adapters, self.prefill_tile)
        shape = StepShape(*self._steps.choose(dataclasses.astuple(need)))
        batch = pack_step(
            output,
            self._adapters,
            shape,
            tile=self.prefill_tile,
            page_size=self.view.kv.page_size,
            table_width=self._table_width,
            layout=self.view.adapters,
        )
        hidden, self.pool = self._forward(self.pool, batch)
        rows = first_rows(output, shape, self.prefill_tile)
        chunks = (*output.decode, *output.prefill)
        prompt_logprobs = self._score_prompts(hidden, chunks, rows)
        tokens, logprobs = self._sample_chunks(
            hidden, [chunk for chunk in chunks if chunk.is_last], rows, seeds
        )
        return StepResult(tokens, logprobs, prompt_logprobs)

    def _sample_chunks(
        self,
        hidden: jax.Array,
        chunks: Sequence[Chunk],
        rows: dict[str, int],
        seeds: Sequence[int],
    ) -> tuple[dict[str, int], dict[str, ScoredToken]]:
        if not chunks:
            return {}, {}
        requests = [chunk.request for chunk in chunks]
        (size,) = self._samples.choose((len(chunks),))
        asked = [_num_top(request.sampling_params.logprobs) for request in requests]
        tokens, scores = self._sample(
            self._weights,
            hidden,
            last_rows(chunks, rows, size),
            pack_sampling(requests, size, seeds),
            num_top=_bucket_top(max(asked)),
        )
        ids = np.asarray(tokens).tolist()
        by_request = {r.request_id: ids[k] for k, r in enumerate(requests)}
        if scores is None:
            return by_request, {}
        scored = _to_scored(np.asarray(tokens), scores, asked)
        return by_request, {
            request.request_id: token
            for request, token, top in zip(requests, scored, asked, strict=False)
            if top >= 0
        }

    def _score_prompts(
        self, hidden: jax.Array, chunks: Sequence[Chunk], rows: dict[str, int]
    ) -> dict[str, list[tuple[int, ScoredToken]]]:
        """Each computed prompt position scores the prompt token that follows it."""
        wanted: list[
            tuple[Request, int, int]
        ] = []  # request, flat row, position of the scored token
        for chunk in chunks:
            request = chunk.request
            if request.sampling_params.prompt_logprobs is None:
                continue
            first = rows[request.request_id]
            last = min(chunk.start + chunk.num_tokens, len(request.prompt_token_ids) - 1)
            wanted += [
                (request, first + position - chunk.start, position + 1)
                for position in range(chunk.start, last)
            ]
        if not wanted:
            return {}
        (size,) = self._scores.choose((len(wanted),))
        row_ids, targets = np.zeros((2, size), np.int32)
        row_ids[: len(wanted)] = [row for _, row, _ in wanted]
        targets[: len(wanted)] = [r.prompt_token_ids[position] for r, _, position in wanted]
        asked = [_num_top(request.sampling_params.prompt_logprobs) for request, _, _ in wanted]
        scores = self._score(
            self._weights, hidden, row_ids, targets, num_top=_bucket_top(max(asked))
        )
        result: dict[str, list[tuple[int, ScoredToken]]] = {}
        scored = _to_scored(targets, scores, asked)
        for (request, _, position), token in zip(wanted, scored, strict=False):
            result.setdefault(request.request_id, []).append((position, token))
        return result

    def close(self) -> None:
        """Give the device memory back."""
        for array in jax.tree.leaves((self._weights, self.pool)):
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
