"""Scheduler: what each step computes, and who waits, runs and yields.

Owns the requests from ``add`` to ``finish`` and their page tables. In what order those who wait are
admitted is a policy's (``policies``, within the bounds that ``waiting`` keeps). It returns a value
that describes the step and touches no array, so a simulated device drives it as well as a real one.
It refuses to know how a step is computed or how long that takes, what its tokens mean, and what an
adapter or a page contains.

One step, with the engine's part indented::

    output = scheduler.schedule()
        evict and swap in as `output` says, launch its chunks
    scheduler.update(output)
        read the sampled tokens
    scheduler.append_token(request, token)    for each chunk with `is_last`
    scheduler.finish(request, reason)         for those that this token ends

``update`` says that the step has been *launched*, not that it is done: the next ``schedule`` may
come before this step's tokens have been read. It then counts on tokens whose values only the device
knows (``num_tokens_in_flight``), and a request that turns out to have ended one step ago has
computed one token for nothing. An engine that reads before it schedules again needs no other order
of calls.

Pages that are given up (finish, preemption, eviction) may be given out again by the next
``schedule``, although a launched step may still use them. That is safe because steps and swap-ins
run on the device in the order of their launch, on one pool that each takes over from the one
before: whoever writes to a page again runs after everyone who was launched with it. An engine that
writes to the pool out of this order must call ``finish`` later.
"""

from __future__ import annotations

import dataclasses
import time
from array import array
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from slora_jax.adapter_cache import AdapterCache, SwapIn
from slora_jax.adapter_store import AdapterStore
from slora_jax.config import EngineConfig
from slora_jax.errors import AdapterLoadError, CapacityError, DeadlineExceededError
from slora_jax.page_allocator import Owner, PageAllocator
from slora_jax.policies import Policy, make_policy
from slora_jax.request import FinishReason, Request, RequestStatus
from slora_jax.waiting import WaitingRequests


class Chunk(NamedTuple):
    """Compute the tokens [start, start + num_tokens) of one request."""

    request: Request
    start: int
    num_tokens: int
    is_last: bool
    """The chunk ends at the last token there is, so the step samples the one after it."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerOutput:
    """One step, as a value. The engine applies ``evicted``, then ``swap_ins``, then computes."""

    decode: tuple[Chunk, ...] = ()
    """Chunks of exactly one token, whatever it is: an output's, or the last of a prompt."""
    prefill: tuple[Chunk, ...] = ()
    """Longer chunks; each takes whole tiles."""
    swap_ins: tuple[SwapIn, ...] = ()
    evicted: tuple[int, ...] = ()
    """Adapter versions that have left the pool since the step before."""
    preempted: tuple[Request, ...] = ()
    """Requests that gave up their pages; they run again later, with the same output."""
    failed: tuple[Request, ...] = ()
    """Requests that ended before they were served: with ``"error"``, their adapter could not be
    read; or with ``"abort"``, their deadline could not be met."""

    @property
    def is_empty(self) -> bool:
        """Whether there is no token to compute (there may still be adapters to swap in)."""
        return not self.decode and not self.prefill


class Scheduler:
    """Continuous batching with chunked prefill over one pool of pages.

    **Order.** Requests are admitted in the policy's order, up to the first that does not fit yet:
    nobody is admitted past it. Running requests are served in the order of their admission. When
    pages are short, idle adapters are evicted, then the running request admitted last is preempted:
    its pages are freed, its tokens are computed again later. The adapter of a running request never
    leaves. Preempted requests are next before all that wait, so nobody overtakes them.

    **Progress.** The first running request is preempted by nobody else, gets its chunk in every
    step, and so finishes: were it alone, everything not pinned would be its to use, and ``add`` and
    ``pin_adapter`` refuse whatever would make that too little. Then the next one is first. With
    nobody running, whoever is next is admitted. So each admitted request finishes, and each waiting
    one is admitted after a bounded number of others (``WaitingRequests``), whatever arrives.

    **Prefetch.** Of the next ``prefetch`` waiting requests, adapters that are resident become the
    most recently used, so that they are evicted last; others are swapped in as far as pages are
    free or held by idle adapters that none of these requests needs. A prefetched adapter is idle
    until its request is admitted, so whoever runs and is short of pages takes them.

    **Invariants.** A request is waiting, running or finished, and has pages only while it runs.
    Each unfinished request holds its adapter's version in the store; each running one has one
    reference to it in the cache. ``finish`` gives all of that back, once.
    """

    def __init__(
        self,
        allocator: PageAllocator,
        cache: AdapterCache,
        store: AdapterStore,
        *,
        page_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        prefill_tile: int,
        max_model_len: int,
        policy: Policy | None = None,
        max_overtakes: int = 32,
        prefetch: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ):
        """``policy``: the order of admission; None is first come, first served. ``max_overtakes``:
        see ``WaitingRequests``. ``prefetch``: waiting requests whose adapters are fetched ahead.
        """
        assert max_num_batched_tokens % prefill_tile == 0, "EngineConfig checks it"
        self._allocator = allocator
        self._cache = cache
        self._store = store
        self._page_size = page_size
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._prefill_tile = prefill_tile
        self._max_model_len = max_model_len
        self._clock = clock
        self._prefetch_depth = prefetch
        self._waiting = WaitingRequests(policy or Policy(), max_overtakes=max_overtakes)
        self._running: dict[str, Request] = {}  # in order of admission
        self._requests: dict[str, Request] = {}  # all that are not finished
        self.preemptions = 0
        self.on_finish: Callable[[Request], None] = lambda request: None
        """Told of each request that has ended."""
        self.prefetches = 0
        """How often an adapter was swapped in for a request that still waits."""

    @property
    def has_unfinished(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self._requests)

    @property
    def num_waiting(self) -> int:
        """Requests in line, preempted ones included."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Admitted requests."""
        return len(self._running)

    # -- in and out: add / finish --------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Put a request in line and hold its adapter.

        Raises CapacityError, with nothing changed, where it could not even run alone.
        """
        assert request.request_id not in self._requests, f"{request.request_id} is in use"
        assert request.status is RequestStatus.WAITING
        assert 0 < len(request.prompt_token_ids) < self._max_model_len, "the engine checks it"
        assert request.max_total_tokens <= self._max_model_len
        self._check_fits(request)
        assert len(request.prompt_token_ids) < request.max_total_tokens
        self._store.hold(request.adapter_version)
        self._requests[request.request_id] = request
        self._waiting.push(request)

    def finish(
        self,
        request: Request,
        reason: FinishReason,
        stop_reason: int | str | None = None,
        error: Exception | None = None,
    ) -> None:
        """End a request, wherever it stands, and give back all that it has."""
        assert not request.is_finished, f"{request.request_id} has finished already"
        if request.status is RequestStatus.RUNNING:
            del self._running[request.request_id]
            self._give_up_pages(request)
            self._waiting.policy.left(request)
        else:
            self._waiting.remove(request)
        del self._requests[request.request_id]
        # The reference goes first: the last release may drop the version.
        self._store.release(request.adapter_version)
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        request.stop_reason = stop_reason
        request.error = error
        request.finish_time = self._clock()
        self.on_finish(request)

    def abort(self, request_id: str, stop_reason: str | None = None) -> Request | None:
        """Finish a request with ``"abort"``; None where no unfinished one has this id."""
        request = self._requests.get(request_id)
        if request is not None:
            self.finish(request, "abort", stop_reason)
        return request

    def lose_pool(self, error: Exception) -> None:
        """Everything in the pool is gone: end what runs with ``error``, and let the others wait.

        Tokens in flight are lost and will be sampled again. Pinned adapters come in anew.
        """
        for request in list(self._running.values()):
            self.finish(request, "error", error=error)
        for request in self._requests.values():
            request.num_tokens_in_flight = 0
        self._cache.lose_pool()

    # -- a step: schedule / update -------------------------------------------------------------

    def schedule(self) -> SchedulerOutput:
        """Choose the next step: every running request's next chunk, then as many new ones as fit.

        Chunks longer than one token share ``max_num_batched_tokens`` in whole tiles, first come
        first served; chunks of one token cost none of it, so a decode waits for no prefill.
        """
        chunks: list[Chunk] = []
        preempted: list[Request] = []
        failed = self._abort_hopeless()
        budget = self._max_num_batched_tokens
        for request in list(self._running.values()):
            if preempted and request.status is not RequestStatus.RUNNING:
                break  # it had to yield to one before it, and so had all behind it
            chunk = self._next_chunk(request, budget)
            if chunk is None:
                continue
            if not self._extend_pages(chunk, preempted):
                break
            chunks.append(chunk)
            budget -= self._prefill_cost(chunk)
        if self._waiting and not preempted:
            # Before admission evicts what the next ones need.
            self._cache.touch(self._upcoming_versions())
            reserved = sum(map(self._pages_wanted, self._running.values()))
            self._admit(budget, reserved, chunks, failed)
            self._prefetch(reserved)
        decode = [chunk for chunk in chunks if chunk.num_tokens == 1]
        # Rows of one adapter side by side read it while it is in the nearest cache: 4 % on a CPU.
        decode.sort(key=lambda chunk: chunk.request.adapter_version)
        return SchedulerOutput(
            decode=tuple(decode),
            prefill=tuple([chunk for chunk in chunks if chunk.num_tokens > 1]),
            swap_ins=self._cache.take_swap_ins(),
            evicted=self._cache.take_evicted(),
            preempted=tuple(preempted),
            failed=tuple(failed),
        )

    def update(self, output: SchedulerOutput) -> None:
        """Say that the step has been launched: once for each ``schedule``, before the next one."""
        for chunk in (*output.decode, *output.prefill):
            request = chunk.request
            if request.status is RequestStatus.RUNNING:  # else aborted since
                assert request.num_computed_tokens == chunk.start, "update comes once a step"
                request.num_computed_tokens += chunk.num_tokens
                request.num_tokens_in_flight += chunk.is_last

    def excuse(self, seconds: float) -> None:
        """A step's launch took ``seconds`` more, once and for all: it had to be compiled. Nobody's
        first token is to be expected that late."""
        for request in self._running.values():
            if request.first_token_time is None:
                request.excused_time += seconds

    def append_token(self, request: Request, token_id: int) -> None:
        """Add a token that a launched step has sampled, in the order of the steps.

        The request may have been preempted meanwhile, which changes nothing. Tokens of a request
        that has finished meanwhile are the caller's to drop.
        """
        assert not request.is_finished
        assert request.num_tokens_in_flight > 0, "no launched step samples for it"
        request.num_tokens_in_flight -= 1
        request.output_token_ids.append(token_id)
        self._waiting.policy.sampled(request)
        request.last_token_time = self._clock()
        if request.first_token_time is None:
            request.first_token_time = request.last_token_time
            assert request.first_scheduled_time is not None, "it has been admitted"
            delay = request.first_token_time - request.first_scheduled_time
            self._waiting.note_first_token(max(delay - request.excused_time, 0.0))

    # -- kept whatever comes: pin / unpin ------------------------------------------------------

    def pin_adapter(self, version: int) -> None:
        """Swap an adapter in with the next step and never evict it.

        Raises CapacityError where it finds no room now, or where a request in the queue could then
        never run; AdapterLoadError where it cannot be read. Looks at every unfinished request.
        """
        if not self._cache.is_pinned(version):
            num_pages = self._store.num_pages(version)
            for request in self._requests.values():
                extra = 0 if request.adapter_version == version else num_pages
                if self._pages_alone(request) + extra > self._allocator.num_usable:
                    info = self._store.info(version)
                    raise CapacityError(
                        f"pinning adapter {info.name!r} ({num_pages} pages) would leave too little "
                        f"for request {request.request_id!r}, which may need "
                        f"{self._pages_alone(request)} of {self._allocator.num_usable} pages, "
                        f"{self._cache.pinned_pages} pinned ones included: unpin another adapter, "
                        "wait for the request to finish, or raise pool_bytes"
                    )
        self._cache.pin(version)

    def unpin_adapter(self, version: int) -> None:
        """Undo ``pin_adapter``; nothing where it is not pinned."""
        self._cache.unpin(version)

    # -- how schedule does it ------------------------------------------------------------------

    def _abort_hopeless(self) -> list[Request]:
        """Early abort: whoever would miss its deadline makes room for those who will not."""
        now = self._clock()
        hopeless = self._waiting.hopeless(now, is_idle=not self._running)
        for request in hopeless:
            assert request.deadline is not None
            message = (
                f"request {request.request_id!r} waited {now - request.arrival_time:.2f} s and "
                f"would not get its first token within {request.deadline - request.arrival_time:g} "
                "s of its arrival: send fewer requests, or give it more time"
            )
            self.finish(request, "abort", "deadline", DeadlineExceededError(message))
        self._waiting.policy.advance(now)
        return hopeless

    def _prefetch(self, reserved: int) -> None:
        """Bring in adapters of those who are about to be admitted; see the class."""
        versions = self._upcoming_versions()
        wanted = self._cache.touch(versions)
        for version in versions:
            try:
                fetched = self._cache.prefetch(version, spare=reserved + wanted)
            except AdapterLoadError:
                continue  # its request will be told when it is admitted
            if fetched:
                self.prefetches += 1
                wanted += self._store.num_pages(version)

    def _upcoming_versions(self) -> list[int]:
        upcoming = self._waiting.upcoming(self._prefetch_depth)
        return list(dict.fromkeys(request.adapter_version for request in upcoming))

    def _admit(
        self, budget: int, reserved: int, chunks: list[Chunk], failed: list[Request]
    ) -> None:
        """Admit whoever is next, up to the first that does not fit.

        A request is admitted when there is room for *all* its known tokens and for what the running
        requests will want soon, though it gets only the pages of its first chunk. With room for the
        first chunk alone, a long prompt would be admitted, run short, be preempted with its work
        lost, and be next for another try.
        """
        while len(self._running) < self._max_num_seqs:
            request = self._waiting.peek()
            if request is None or request.num_tokens_in_flight:
                return  # the tokens of a preempted request must be known before it is resumed
            chunk = self._next_chunk(request, budget)
            wanted = reserved + self._num_pages(request.num_tokens)
            if chunk is None or wanted > self._cache.num_available(request.adapter_version):
                return
            before = self._clock()
            try:
                acquired = self._cache.acquire(request.adapter_version)
            except AdapterLoadError as error:
                self.finish(request, "error", error=error)
                failed.append(request)
                continue
            assert acquired is not None, "num_available counted its pages"
            now = self._clock()
            if request.first_scheduled_time is None:
                request.first_scheduled_time = now
                request.adapter_load_time = now - before
            self._waiting.admit(request)
            request.status = RequestStatus.RUNNING
            self._running[request.request_id] = request
            self._extend_pages(chunk, preempted=None)
            chunks.append(chunk)
            budget -= self._prefill_cost(chunk)
            reserved += self._pages_wanted(request)

    def _next_chunk(self, request: Request, budget: int) -> Chunk | None:
        """As many of its tokens as fit; None where there is none to compute or no budget left."""
        end = request.num_tokens_with_in_flight
        if end >= request.max_total_tokens:
            return None  # only the last token's value is missing, and nothing follows it
        start = request.num_computed_tokens
        if end - start == 1:
            return Chunk(request, start, 1, True)
        num_tokens = min(end - start, budget)
        return Chunk(request, start, num_tokens, start + num_tokens == end) if num_tokens else None

    def _prefill_cost(self, chunk: Chunk) -> int:
        if chunk.num_tokens == 1:
            return 0
        return -(-chunk.num_tokens // self._prefill_tile) * self._prefill_tile

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_size)

    def _most_pages(self, request: Request) -> int:
        # Nothing is computed for the last token, so it needs no place.
        return self._num_pages(max(request.max_total_tokens - 1, len(request.prompt_token_ids)))

    def _pages_wanted(self, request: Request) -> int:
        """Pages that a running request lacks for its known tokens, and one more to grow into.

        Without the latter, admission would hand out the last page, and the next decode would
        preempt whom it was given to.
        """
        soon = self._num_pages(request.num_tokens_with_in_flight) + 1
        return min(soon, self._most_pages(request)) - len(request.pages)

    def _extend_pages(self, chunk: Chunk, preempted: list[Request] | None) -> bool:
        """Give a running request the pages for its next chunk, whatever that takes.

        False where it had to be preempted itself. ``preempted`` None: there is room, no one yields.
        """
        request, start, num_tokens, _ = chunk
        if start + num_tokens <= len(request.pages) * self._page_size:
            return True
        lacking = self._num_pages(start + num_tokens) - len(request.pages)
        while not self._cache.evict_idle(lacking):
            assert preempted is not None, "admission found room for it"
            assert len(self._running) > 1, "add and pin_adapter left it enough to run alone"
            victim = next(reversed(self._running.values()))
            self._preempt(victim)
            preempted.append(victim)
            if victim is request:
                return False
        pages = self._allocator.allocate(lacking, _owner(request))
        assert pages is not None
        request.pages.extend(pages)
        return True

    def _preempt(self, request: Request) -> None:
        del self._running[request.request_id]
        self._give_up_pages(request)
        request.num_computed_tokens = 0
        request.status = RequestStatus.PREEMPTED
        request.num_preemptions += 1
        self.preemptions += 1
        self._waiting.resume_later(request)

    def _give_up_pages(self, request: Request) -> None:
        self._allocator.free(request.pages, _owner(request))
        request.pages = array("i")
        self._cache.release(request.adapter_version)

    # -- what can run at all -------------------------------------------------------------------

    def largest_total_tokens(self, version: int) -> int:
        """The largest ``max_total_tokens`` that ``add`` accepts now for this adapter version.

        Less than two where not even one token fits: ``add`` then says why.
        """
        num_pages = self._allocator.num_usable - self._adapter_pages_alone(version)
        return min(max(num_pages, 0) * self._page_size + 1, self._max_model_len)

    def _adapter_pages_alone(self, version: int) -> int:
        own = 0 if self._cache.is_pinned(version) else self._store.num_pages(version)
        return own + self._cache.pinned_pages

    def _pages_alone(self, request: Request) -> int:
        """Pages that it may take to finish with nobody else running, pinned ones included."""
        return self._most_pages(request) + self._adapter_pages_alone(request.adapter_version)

    def _check_fits(self, request: Request) -> None:
        needed, usable = self._pages_alone(request), self._allocator.num_usable
        if needed <= usable:
            return
        num_prompt = len(request.prompt_token_ids)
        parts = [
            f"{self._most_pages(request)} pages for {num_prompt} prompt tokens and up to "
            f"{max(request.max_total_tokens - num_prompt, 1)} of output ({self._page_size} a page)"
        ]
        changes = ["ask for fewer tokens (max_tokens)", "raise pool_bytes"]
        version = request.adapter_version
        if version and not self._cache.is_pinned(version):
            parts.append(
                f"{self._store.num_pages(version)} for adapter {self._store.info(version).name!r}"
            )
        if self._cache.pinned_pages:
            parts.append(f"{self._cache.pinned_pages} taken by pinned adapters")
            changes.append("unpin an adapter")
        raise CapacityError(
            f"request {request.request_id!r} can never run: it needs {', '.join(parts)}: "
            f"{needed} in all, and the pool has {usable}; {' or '.join(changes)}"
        )

    def check_invariants(self) -> None:
        """Assert that allocator, cache, store and requests agree. For tests."""
        running, requests = self._running.values(), self._requests.values()
        self._allocator.check()
        self._cache.check(Counter(request.adapter_version for request in running))
        self._store.check(Counter(request.adapter_version for request in requests))
        page_tables = {_owner(request): sorted(request.pages) for request in running}
        assert {owner: pages for owner, pages in page_tables.items() if pages} == {
            owner: pages for owner, pages in self._allocator.owners().items() if owner[0] == "kv"
        }
        assert len(self._running) <= self._max_num_seqs
        assert len(self._running) + len(self._waiting) == len(self._requests)
        for request in requests:
            assert self._pages_alone(request) <= self._allocator.num_usable
            assert request.num_tokens_with_in_flight <= request.max_total_tokens
            if request.request_id in self._running:
                assert request.status is RequestStatus.RUNNING
                assert 0 <= request.num_computed_tokens <= request.num_tokens_with_in_flight
                assert request.num_computed_tokens <= len(request.pages) * self._page_size
                assert len(request.pages) <= self._most_pages(request)
            else:
                assert request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)
                assert not request.pages
                assert request.num_computed_tokens == 0


def make_scheduler(
    config: EngineConfig,
    allocator: PageAllocator,
    cache: AdapterCache,
    store: AdapterStore,
    *,
    page_size: int,
    max_num_seqs: int,
    prefill_tile: int,
    max_num_batched_tokens: int,
    max_model_len: int,
    clock: Callable[[], float],
    policy: Policy | None = None,
) -> Scheduler:
    """What ``config`` asks for, over sizes that were found out for a model and a device.

    ``policy`` takes the place of ``config.scheduler``, for orders that have no name.
    """
    named = make_policy(
        config.scheduler, cluster_size=config.cluster_size, fair_over=config.fair_over
    )
    return Scheduler(
        allocator,
        cache,
        store,
        page_size=page_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        prefill_tile=prefill_tile,
        max_model_len=max_model_len,
        policy=policy or named,
        max_overtakes=config.max_overtakes,
        prefetch=config.prefetch,
        clock=clock,
    )


def _owner(request: Request) -> Owner:
    return ("kv", request.request_id)
