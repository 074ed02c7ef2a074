"""Engine: requests in, tokens out, one step at a time.

Joins the host half, which decides, with the model runner, which computes. ``step`` is the whole
serving loop: schedule, swap in, run, postprocess. Owns the lifecycle of requests and adapters;
refuses to know files, prompts as messages, and progress bars (``llm``), and what a step computes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from slora_jax.adapter_cache import AdapterCache
from slora_jax.adapter_store import BASE_VERSION, AdapterInfo, AdapterStore, PackedAdapter
from slora_jax.config import EngineConfig, is_time
from slora_jax.detokenizer import IncrementalDetokenizer
from slora_jax.errors import (
    AdapterInUseError,
    CapacityError,
    EngineClosedError,
    InvalidRequestError,
    RequestFailedError,
    SloraError,
)
from slora_jax.hosts import Alone, Follower, Journal
from slora_jax.metrics import RETRACTED, ServedRequests
from slora_jax.model_runner import LaunchedStep, ModelRunner, ScoredToken, StepResult
from slora_jax.models.llama import PoolView
from slora_jax.outputs import (
    CompletionOutput,
    EngineStats,
    Logprob,
    RequestMetrics,
    RequestOutput,
)
from slora_jax.page_allocator import PageAllocator
from slora_jax.request import Request
from slora_jax.sampling_params import SamplingParams
from slora_jax.scheduler import SchedulerOutput, make_scheduler


class TokenDecoder(Protocol):
    """The part of a tokenizer that the engine needs."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Token ids → text."""
        ...


@dataclasses.dataclass(eq=False)
class Completion:
    """One of a prompt's ``n`` completions while it runs: a scheduler's request and its text."""

    index: int
    request: Request
    detokenizer: IncrementalDetokenizer
    logprobs: list[ScoredToken]


@dataclasses.dataclass(eq=False)
class Generation:
    """One prompt and its ``n`` completions, which the scheduler sees as ``n`` requests."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    adapter_id: str | None
    params: SamplingParams
    completions: list[Completion]
    prompt_logprobs: dict[int, ScoredToken]

    @property
    def finished(self) -> bool:
        """All completions have ended, one way or another."""
        return all(c.request.is_finished for c in self.completions)

    @property
    def num_output_tokens(self) -> int:
        """Of all completions so far."""
        return sum(len(c.request.output_token_ids) for c in self.completions)


class Engine:
    """Serves many adapters of one base model over one page pool.

    Not thread-safe. After an error that names a request or an adapter it goes on serving; after an
    error of the device step it is closed, since the pool was donated to that step. At most one step
    is under way whose tokens have not been read.
    """

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: TokenDecoder,
        config: EngineConfig,
        *,
        num_pages: int,
        max_model_len: int,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        journal: Journal | None = None,
        clock: Callable[[], float] | None = None,
    ):
        """``journal``: who else makes the same calls; ``clock``: instead of the journal's."""
        self._runner = runner
        self.journal = journal or Alone()
        clock = clock or self.journal.clock
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._clock = clock
        self._page_size = runner.view.kv.page_size
        self.max_model_len = max_model_len
        self.allocator = PageAllocator(num_pages)
        self.store = AdapterStore(config.host_adapter_bytes)
        self.cache = AdapterCache(self.allocator, self.store)
        self.scheduler = make_scheduler(
            config,
            self.allocator,
            self.cache,
            self.store,
            page_size=self._page_size,
            max_num_seqs=runner.max_num_seqs,
            prefill_tile=runner.prefill_tile,
            max_num_batched_tokens=runner.max_prefill_tokens,
            max_model_len=max_model_len,
            clock=clock,
        )
        self._served = ServedRequests()
        self.scheduler.on_finish = self._note_end
        self._ttft_slo = config.ttft_slo
        self._running: dict[str, tuple[Generation, Completion]] = {}
        self._ids = itertools.count()
        self._seeds = random.Random(config.seed)
        self._num_steps = 0
        self._wait_seconds = 0.0
        self._launched: LaunchedStep | None = None
        self._closed_because: str | None = None
        self._failure: BaseException | None = None  # of a step, not recovered from
        self._is_stepping = False
        self._abort_after_step: list[Generation] = []

    # -- adapters ---------------------------------------------------------------------------------

    def register_adapter(
        self, name: str, packed: PackedAdapter, reload: Callable[[], PackedAdapter] | None
    ) -> AdapterInfo:
        """Make ``name`` known; its pages stay in CPU memory until a request needs them.

        Raises:
            AdapterInUseError: the name is taken.
            CapacityError: it needs more pages than the pool has, or than the host budget allows.
        """
        self.check_open()
        self._check_pool_holds(name, packed)
        return self.store.info(self.store.register(name, packed, reload=reload))

    def update_adapter(self, name: str, packed: PackedAdapter) -> AdapterInfo:
        """Give ``name`` other weights: requests added from now on use them, others keep theirs.

        A pinned adapter stays pinned.

        Raises:
            AdapterNotFoundError: no adapter has this name.
            CapacityError: as ``register_adapter``, before anything changes; or a pinned one finds
                no room while requests run on the old weights, and is then no longer pinned.
        """
        self.check_open()
        was_pinned = self.cache.is_pinned(self.store.resolve(name))
        self._check_pool_holds(name, packed)
        version = self.store.replace(name, packed)
        if was_pinned:
            try:
                self.scheduler.pin_adapter(version)
            except CapacityError as error:
                raise CapacityError(
                    f"adapter {name!r} has its new weights but is no longer pinned: {error}"
                ) from error
        return self.store.info(version)

    def adapter_config(self, name: str) -> Any:
        """PEFT's configuration that ``name`` was loaded with; AdapterNotFoundError otherwise."""
        self.check_open()
        return self.store.config(self.store.resolve(name))

    def _check_pool_holds(self, name: str, packed: PackedAdapter) -> None:
        usable = self.allocator.num_usable
        if packed.num_pages >= usable:
            raise CapacityError(
                f"adapter {name!r} needs {packed.num_pages} pages and at least one more for a "
                f"request's KV, the pool has {usable}: raise pool_bytes or use a smaller rank"
            )

    def list_adapters(self) -> list[AdapterInfo]:
        """Every name that requests may use."""
        self.check_open()
        return [self.store.info(self.store.resolve(name)) for name in self.store.names()]

    def adapter_version(self, adapter_id: str | None) -> int:
        """What a name stands for now; 0 is the base model. AdapterNotFoundError otherwise."""
        return BASE_VERSION if adapter_id is None else self.store.resolve(adapter_id)

    def check_name_is_free(self, name: str) -> None:
        """Raise AdapterInUseError before an adapter's files are read in vain."""
        self.check_open()
        if name in self.store.names():
            raise AdapterInUseError(
                f"an adapter named {name!r} is already loaded: unload it first, or use another name"
            )

    def unregister_adapter(self, name: str) -> None:
        """New requests are refused at once; memory is freed when the last one that uses it ends."""
        self.record("unregister_adapter", name)
        self.store.unregister(name)
        self._served.by_adapter.pop(name, None)

    def _note_end(self, request: Request) -> None:
        self._served.add(request)
        if request.adapter_id is not None and request.adapter_id not in self.store.names():
            self._served.by_adapter.pop(request.adapter_id, None)  # unloaded while it ran

    def pin_adapter(self, name: str) -> None:
        """Bring the adapter into the pool with the next step and keep it there, come what may.

        Raises:
            CapacityError: pinned adapters would leave too little for requests that were accepted.
        """
        self.record("pin_adapter", name)
        self.scheduler.pin_adapter(self.store.resolve(name))

    def unpin_adapter(self, name: str) -> None:
        """Let the adapter be evicted again when it is idle."""
        self.record("unpin_adapter", name)
        self.scheduler.unpin_adapter(self.store.resolve(name))

    def warm_up(self) -> None:
        """Compile for every size of step that the adapters known so far can need."""
        self.record("warm_up")
        self._runner.warm_up([info.ranks for info in self.list_adapters()])

    # -- requests ---------------------------------------------------------------------------------

    def add_request(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        adapter_id: str | None,
        *,
        prompt: str | None = None,
        client_id: str | None = None,
        priority: int = 0,
        ttft_slo: float | None = None,
    ) -> Generation:
        """Queue one prompt; the adapter's version is bound now.

        ``client_id``, ``priority`` (higher first) and ``ttft_slo`` (seconds from now, instead of
        the configuration's) are for the scheduler.

        Raises:
            AdapterNotFoundError: no adapter has this name.
            InvalidRequestError: the prompt is empty, too long, or has ids outside the vocabulary.
            CapacityError: it can never fit in the pool.
        """
        service = client_id, priority, ttft_slo
        _check_service(*service)
        self.record("add_request", prompt_token_ids, params, adapter_id, prompt, *service)
        prompt_ids = self._check_prompt(prompt_token_ids)
        version = self.adapter_version(adapter_id)
        generation = Generation(
            request_id=str(next(self._ids)),
            prompt=prompt,
            prompt_token_ids=prompt_ids,
            adapter_id=adapter_id,
            params=params,
            completions=[],
            prompt_logprobs={},
        )
        base_seed = self._seeds.getrandbits(63) if params.seed is None else params.seed
        try:
            for index in range(params.n):
                completion = self._new_completion(generation, index, version, base_seed)
                request = completion.request
                request.client_id, request.priority = client_id, priority
                if (slo := self._ttft_slo if ttft_slo is None else ttft_slo) is not None:
                    request.deadline = request.arrival_time + slo
                generation.completions.append(completion)
                self._running[request.request_id] = generation, completion
                self.scheduler.add(request)
        except BaseException:  # a Ctrl-C too must leave nothing in the queue
            self._retract(generation)
            raise
        return generation

    def abort(self, generation: Generation) -> None:
        """End what is left of a generation; its pages are free at once.

        Within a step it waits for the step's end: a generator that is left may be collected, and so
        abort its requests, wherever memory is allocated.
        """
        if self._is_stepping:
            self._abort_after_step.append(generation)
        elif not generation.finished:
            if self._closed_because is None:
                self.record("abort", generation.request_id)
            self._abort(generation)

    def _abort(self, generation: Generation) -> None:
        for completion in generation.completions:
            if self._running.pop(completion.request.request_id, None):
                self.scheduler.abort(completion.request.request_id)
                completion.detokenizer.finish()

    def retract(self, generation: Generation) -> None:
        """Take back what was queued a moment ago, before any step: it counts as never asked for."""
        self.record("retract", generation.request_id)
        self._retract(generation)

    def _retract(self, generation: Generation) -> None:
        for completion in generation.completions:
            if self._running.pop(completion.request.request_id, None):
                self.scheduler.abort(completion.request.request_id, RETRACTED)
                completion.detokenizer.finish()

    @property
    def view(self) -> PoolView:
        """How the pool is laid out, which adapters are packed for."""
        return self._runner.view

    @property
    def has_unfinished(self) -> bool:
        """There is something to step for."""
        return self.scheduler.has_unfinished

    # -- the serving loop -------------------------------------------------------------------------

    def step(self) -> list[Generation]:
        """Launch the next step, then read the one before it. Returns the generations it touched.

        So the device computes while the host reads, decides and packs; the device passes next
        tokens on by itself. A request's end is seen one step late, and what that step computed for
        it is dropped.
        """
        self.record("step")
        self._is_stepping = True
        try:
            output = self.scheduler.schedule()
            self._swap_in(output)
            launched = self._launch(output)
            self.scheduler.update(output)
            previous, self._launched = self._launched, launched
            touched = self._end_failed(output)
            if previous is not None:
                began = self._clock()
                results = previous.read()
                self._wait_seconds += self._clock() - began
                touched += self._postprocess(results)
            return touched
        except BaseException as error:
            # The pool was donated to the call that failed: nothing in it can be relied on.
            self._failure = error
            self._closed_because = f"a device step failed: {error!r}"
            self.journal.explain(error)
            raise
        finally:
            self._is_stepping = False
            while self._abort_after_step:
                self.abort(self._abort_after_step.pop())

    def recover(self) -> list[Generation]:
        """Open again after a step that failed, on a new pool. Returns the generations that ended.

        Requests that ran end with RequestFailedError and the failure as its cause; those that wait
        keep their places, and pinned adapters are brought in again. Raises what stands in the way,
        and the engine stays closed; so does one of several processes, which may have failed alone.
        """
        assert self._failure is not None, "a step has failed"
        if not isinstance(self.journal, Alone):
            raise self._failure
        error = RequestFailedError(f"the device step that served it failed: {self._failure!r}")
        error.__cause__ = self._failure
        self._launched = None
        self._runner.renew_pool()
        self.scheduler.lose_pool(error)
        ended = {}
        for request_id, (generation, completion) in list(self._running.items()):
            if completion.request.is_finished:
                del self._running[request_id]
                completion.detokenizer.finish()
                ended[generation.request_id] = generation
        self._failure = self._closed_because = None
        return list(ended.values())

    def _swap_in(self, output: SchedulerOutput) -> None:
        for version in output.evicted:
            self._runner.forget(version)
        for swap in output.swap_ins:
            self._runner.swap_in(swap)

    def _launch(self, output: SchedulerOutput) -> LaunchedStep | None:
        if output.is_empty:
            return None
        self._num_steps += 1
        compiles, began = self._runner.num_compiles, self._clock()
        launched = self._runner.launch(output)
        if self._runner.num_compiles != compiles:
            self.scheduler.excuse(self._clock() - began)
        return launched

    def _end_failed(self, output: SchedulerOutput) -> list[Generation]:
        touched = []
        for request in output.failed:
            generation, completion = self._running.pop(request.request_id)
            completion.detokenizer.finish()
            touched.append(generation)
        return touched

    def _postprocess(self, result: StepResult) -> list[Generation]:
        touched: dict[Generation, None] = {}  # a set in order
        for request_id, scored in result.prompt_logprobs.items():
            if request_id in self._running:
                self._running[request_id][0].prompt_logprobs.update(scored)
        for request_id, token_id in result.tokens.items():
            running = self._running.get(request_id)
            if running is None:
                continue  # it ended after this step had been launched
            generation, completion = running
            touched[generation] = None
            if request_id in result.logprobs:
                completion.logprobs.append(result.logprobs[request_id])
            self._append_token(completion, token_id)
            if completion.request.is_finished:
                completion.detokenizer.finish()
                del self._running[request_id]
        return list(touched)

    def _append_token(self, completion: Completion, token_id: int) -> None:
        """Give a request its next token and end it where a stop condition holds."""
        request, detokenizer = completion.request, completion.detokenizer
        params = request.sampling_params
        self.scheduler.append_token(request, token_id)
        # An ending token is part of token_ids but not of the text, as in vLLM.
        if token_id in params.stop_token_ids:
            self.scheduler.finish(request, "stop", stop_reason=token_id)
        elif token_id in request.eos_token_ids and not params.ignore_eos:
            self.scheduler.finish(request, "stop")
        elif detokenizer.append(token_id):
            self.scheduler.finish(request, "stop", stop_reason=detokenizer.stop_reason)
        elif request.num_tokens >= request.max_total_tokens:
            self.scheduler.finish(request, "length")

    # -- reports ----------------------------------------------------------------------------------

    def output(self, generation: Generation) -> RequestOutput:
        """A snapshot; text of unfinished completions ends where it can no longer change."""
        errors = [c.request.error for c in generation.completions if c.request.error]
        return RequestOutput(
            request_id=generation.request_id,
            prompt=generation.prompt,
            prompt_token_ids=generation.prompt_token_ids,
            prompt_logprobs=self._prompt_logprobs(generation),
            outputs=tuple(self._completion_output(generation, c) for c in generation.completions),
            finished=generation.finished,
            adapter_id=generation.adapter_id,
            metrics=_metrics(generation),
            error=errors[0] if errors else None,
        )

    def _completion_output(self, generation: Generation, c: Completion) -> CompletionOutput:
        asked = generation.params.logprobs is not None
        finished = c.request.is_finished
        return CompletionOutput(
            index=c.index,
            text=c.detokenizer.text if finished else c.detokenizer.stream_text,
            token_ids=tuple(c.request.output_token_ids),
            cumulative_logprob=sum(t.logprob for t in c.logprobs) if asked else None,
            logprobs=tuple(self._alternatives(t) for t in c.logprobs) if asked else None,
            finish_reason=c.request.finish_reason,
            stop_reason=c.request.stop_reason,
        )

    def _prompt_logprobs(
        self, generation: Generation
    ) -> tuple[dict[int, Logprob] | None, ...] | None:
        if generation.params.prompt_logprobs is None:
            return None
        known = generation.prompt_logprobs
        return tuple(
            self._alternatives(known[position]) if position in known else None
            for position in range(len(generation.prompt_token_ids))
        )

    def _alternatives(self, token: ScoredToken) -> dict[int, Logprob]:
        ranked = {i: (p, k) for k, (i, p) in enumerate(token.top, start=1)}
        ranked[token.token_id] = token.logprob, token.rank
        return {
            i: Logprob(
                logprob=p,
                rank=rank,
                decoded_token=self._tokenizer.decode([i], skip_special_tokens=False),
            )
            for i, (p, rank) in ranked.items()
        }

    def stats(self) -> EngineStats:
        """Counts now and since the start; costs nothing on the device."""
        self.check_open()
        counts = self.allocator.counts()
        layer_pool = self._runner.pool[0]
        return EngineStats(
            pages_total=self.allocator.num_usable,
            pages_free=self.allocator.num_free,
            pages_kv=counts.get("kv", 0),
            pages_adapters=counts.get("adapter", 0),
            page_size=self._page_size,
            page_bytes=len(self._runner.pool) * layer_pool.nbytes // layer_pool.shape[0],
            adapters_registered=len(self.store.names()),
            adapters_resident=self.cache.num_resident,
            adapters_pinned=self.cache.num_pinned,
            adapter_host_bytes=self.store.host_bytes,
            requests_running=self.scheduler.num_running,
            requests_waiting=self.scheduler.num_waiting,
            steps=self._num_steps,
            tokens=self._runner.num_tokens,
            token_rows=self._runner.num_token_rows,
            bytes_read=self._runner.num_bytes,
            wait_seconds=self._wait_seconds,
            swap_ins=self.cache.swap_ins,
            swap_in_bytes=self.cache.swap_in_bytes,
            prefetches=self.scheduler.prefetches,
            disk_reloads=self.store.disk_reloads,
            evictions=self.cache.evictions,
            preemptions=self.scheduler.preemptions,
            compiles=self._runner.num_compiles,
            requests_finished=dict(self._served.by_reason),
            prompt_tokens=self._served.prompt_tokens,
            output_tokens=self._served.output_tokens,
            tokens_by_adapter={
                adapter_id: count
                for adapter_id, count in self._served.by_adapter.items()
                if adapter_id is None or adapter_id in self.store.names()
            },
            queue_time=self._served.queue_time.snapshot(),
            ttft=self._served.ttft.snapshot(),
            tpot=self._served.tpot.snapshot(),
            latency=self._served.latency.snapshot(),
        )

    def close(self) -> None:
        """Abort what runs and give back the memory of the device, and the adapters' in CPU memory.

        Closing twice is fine.
        """
        if self._closed_because is None:
            for generation, _ in list(self._running.values()):
                self.abort(generation)
            self.record("close")
            self._closed_because = "close() was called"
        self.journal.close()
        self._runner.close()
        self.store.drop_all_buffers()

    # -- several processes ------------------------------------------------------------------------

    def record(self, name: str, *args: Any) -> None:
        """Note a call that changes this engine, for the other processes' engines to make too.

        The engine notes its own; what its owner does in one, such as to load an adapter, it notes.
        """
        self.check_open()
        self.journal.record(name, args, self._state())

    def _state(self) -> tuple[int, ...]:
        """Numbers that tell two engines apart that have come apart."""
        return (
            self._num_steps,
            self.allocator.num_free,
            self.scheduler.num_running,
            self.scheduler.num_waiting,
            self.cache.swap_ins,
            self.cache.evictions,
            len(self.store.names()),
        )

    def follow(self, others: Mapping[str, Callable[..., object]]) -> None:
        """Make process 0's calls until it closes its engine. ``others``: calls that are not ours.

        Raises HostLostError where process 0 is gone.
        """
        assert isinstance(self.journal, Follower)
        generations: dict[str, Generation] = {}
        for call in self.journal.calls(self._state):
            # What process 0's call was refused, this one's is: nothing has changed in either.
            with contextlib.suppress(SloraError):
                if call.name == "add_request":
                    *what, prompt, client_id, priority, ttft_slo = call.args
                    generation = self.add_request(
                        *what,
                        prompt=prompt,
                        client_id=client_id,
                        priority=priority,
                        ttft_slo=ttft_slo,
                    )
                    generations[generation.request_id] = generation
                elif call.name == "abort":
                    self.abort(generations[call.args[0]])
                elif call.name == "retract":
                    self.retract(generations.pop(call.args[0]))
                elif call.name == "step":
                    for generation in self.step():
                        if generation.finished:
                            generations.pop(generation.request_id, None)
                elif call.name in others:
                    others[call.name](*call.args)
                else:
                    getattr(self, call.name)(*call.args)

    # -- checks -----------------------------------------------------------------------------------

    def check_open(self) -> None:
        """Raise EngineClosedError, with the reason, where it has been closed."""
        if self._closed_because is not None:
            raise EngineClosedError(
                f"this engine is closed ({self._closed_because}): make a new one"
            )

    def _check_prompt(self, token_ids: Sequence[int]) -> tuple[int, ...]:
        if not len(token_ids):
            raise InvalidRequestError("the prompt is empty: give at least one token")
        if len(token_ids) >= self.max_model_len:
            raise InvalidRequestError(
                f"the prompt has {len(token_ids)} tokens; with at least one token of output it "
                f"must stay within max_model_len={self.max_model_len}: shorten it, or raise "
                "max_model_len or pool_bytes"
            )
        for token_id in token_ids:
            if not 0 <= token_id < self._vocab_size:
                raise InvalidRequestError(
                    f"prompt token id {token_id} is outside the vocabulary of {self._vocab_size}"
                )
        return tuple(int(token_id) for token_id in token_ids)

    def _new_completion(
        self, generation: Generation, index: int, version: int, base_seed: int
    ) -> Completion:
        params, prompt_ids = generation.params, generation.prompt_token_ids
        if params.max_tokens is None:
            limit = self.scheduler.largest_total_tokens(version)
        else:
            limit = len(prompt_ids) + params.max_tokens
        for token_id in params.stop_token_ids:
            if token_id >= self._vocab_size:
                raise InvalidRequestError(
                    f"stop_token_ids has {token_id}, outside the vocabulary of {self._vocab_size}"
                )
        request = Request(
            request_id=f"{generation.request_id}-{index}",
            prompt_token_ids=list(prompt_ids),
            sampling_params=params,
            adapter_id=generation.adapter_id,
            adapter_version=version,
            max_total_tokens=min(limit, self.max_model_len),
            seed=(base_seed + index) % 2**63,
            eos_token_ids=self._eos_token_ids,
            arrival_time=self._clock(),
        )
        skip = params.skip_special_tokens
        return Completion(
            index=index,
            request=request,
            detokenizer=IncrementalDetokenizer(
                lambda ids: self._tokenizer.decode(ids, skip_special_tokens=skip),
                prompt_ids,
                params.stop,
                params.min_tokens,
            ),
            logprobs=[],
        )


def _check_service(client_id: object, priority: object, ttft_slo: object) -> None:
    """What the scheduler is told of a request, before it sorts by it."""
    if client_id is not None and not isinstance(client_id, str):
        raise InvalidRequestError(f"client_id={client_id!r} must be a string or None")
    if not isinstance(priority, int) or isinstance(priority, bool):
        raise InvalidRequestError(f"priority={priority!r} must be an integer; higher goes first")
    if ttft_slo is None:
        return
    if not is_time(ttft_slo):
        raise InvalidRequestError(f"ttft_slo={ttft_slo!r:.80} must be a number of seconds above 0")


def _metrics(generation: Generation) -> RequestMetrics:
    requests = [c.request for c in generation.completions]
    arrival = min(r.arrival_time for r in requests)
    admitted = [r.first_scheduled_time for r in requests if r.first_scheduled_time is not None]
    first = [r.first_token_time for r in requests if r.first_token_time is not None]
    last = max(requests, key=lambda r: r.last_token_time or 0.0)
    loads = [r.adapter_load_time for r in requests if r.adapter_load_time is not None]
    gaps = len(last.output_token_ids) - 1
    return RequestMetrics(
        queue_time=min(admitted) - arrival if admitted else None,
        ttft=min(first) - arrival if first else None,
        tpot=(last.last_token_time - last.first_token_time) / gaps
        if gaps > 0 and last.last_token_time is not None and last.first_token_time is not None
        else None,
        adapter_load_time=max(loads) if loads else None,
        num_preemptions=sum(r.num_preemptions for r in requests),
    )
