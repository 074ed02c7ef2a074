"""The host half on a simulated device, whose every page remembers what was written to it.

The device's "model" folds a request's tokens and its adapter's content into the next token, reading
both from the pages that it was given. It refuses to read anything but what that request and that
adapter wrote, so a page that was handed out twice, given up too early, never written or left behind
by a reload shows at once, and a request's tokens can be compared with those of the request alone.
"""

import dataclasses
from types import SimpleNamespace
from typing import Any

from slora_jax.adapter_cache import AdapterCache
from slora_jax.adapter_store import AdapterStore, PackedAdapter
from slora_jax.page_allocator import PageAllocator
from slora_jax.request import Request
from slora_jax.scheduler import Chunk, Scheduler, SchedulerOutput

VOCAB = 40
STOP_TOKEN = 0


def next_token(tokens, adapter_digest) -> int:
    state = sum(adapter_digest.encode()) if adapter_digest else 0
    for token in tokens:
        state = (state * 31 + token + 7) % 1009
    return state % VOCAB


def tokens_alone(prompt, adapter_digest, max_total_tokens, stop_token=None) -> list[int]:
    """What a request generates with nothing else in the world."""
    tokens = list(prompt)
    while len(tokens) < max_total_tokens:
        tokens.append(next_token(tokens, adapter_digest))
        if tokens[-1] == stop_token:
            break
    return tokens[len(prompt) :]


def packed_adapter(digest="d", *, num_pages=1, nbytes=10, ranks=(8,) * 7) -> PackedAdapter:
    return PackedAdapter(
        digest=digest, ranks=ranks, num_pages=num_pages, nbytes=nbytes, pages=None, scaling=None
    )


class AdapterFiles:
    """The directory of one adapter: it can be read, break, and change."""

    def __init__(self, packed: PackedAdapter):
        self.packed = packed
        self.is_broken = False

    def change(self, **fields) -> None:
        self.packed = dataclasses.replace(self.packed, **fields)

    def read(self) -> PackedAdapter:
        if self.is_broken:
            raise OSError("the disk is gone")
        return self.packed


def request(name, num_prompt=4, max_new=4, *, version=0, arrival_time=0.0, **fields) -> Request:
    seed = sum(name.encode())
    return Request(
        request_id=name,
        prompt_token_ids=[(seed + 3 * i) % VOCAB for i in range(num_prompt)],
        sampling_params=SimpleNamespace(min_tokens=0, ignore_eos=False, stop_token_ids=None),
        max_total_tokens=num_prompt + max_new,
        adapter_version=version,
        arrival_time=arrival_time,
        **fields,
    )


class SimulatedDevice:
    """Runs steps in the order of their launch, on one pool."""

    def __init__(self, page_size: int):
        self.page_size = page_size
        self.pages: dict[int, Any] = {}
        self.adapters: dict[int, tuple[tuple[int, ...], str]] = {}
        self.last_token: dict[str, int] = {}

    def launch(self, output: SchedulerOutput) -> dict[str, int]:
        """The step's sampled tokens by request id."""
        for version in output.evicted:
            del self.adapters[version]
        for swap in output.swap_ins:
            assert swap.version not in self.adapters, "it is in the pool already"
            self.adapters[swap.version] = swap.pages, swap.packed.digest
            for i, page in enumerate(swap.pages):
                self.pages[page] = ("adapter", swap.version, i)
        chunks = (*output.decode, *output.prefill)
        for chunk in chunks:
            self._write(chunk)
        sampled = {c.request.request_id: self._sample(c) for c in chunks if c.is_last}
        self.last_token |= sampled
        return sampled

    def _write(self, chunk: Chunk) -> None:
        request = chunk.request
        for position in range(chunk.start, chunk.start + chunk.num_tokens):
            if position < request.num_tokens:
                (token,) = request.tokens_between(position, position + 1)
            else:  # sampled by the step before, which nobody has read yet
                assert position == request.num_tokens_with_in_flight - 1
                token = self.last_token[request.request_id]
            page, slot = self._slot(request, position)
            if slot == 0:
                self.pages[page] = [None] * self.page_size
            self.pages[page][slot] = (request.request_id, position, token)

    def _sample(self, chunk: Chunk) -> int:
        request, digest = chunk.request, None
        if request.adapter_version:
            pages, digest = self.adapters[request.adapter_version]
            for i, page in enumerate(pages):
                assert self.pages[page] == ("adapter", request.adapter_version, i)
        tokens = []
        for position in range(chunk.start + chunk.num_tokens):
            page, slot = self._slot(request, position)
            request_id, written_position, token = self.pages[page][slot]
            assert (request_id, written_position) == (request.request_id, position)
            tokens.append(token)
        return next_token(tokens, digest)

    def _slot(self, request: Request, position: int) -> tuple[int, int]:
        return request.pages[position // self.page_size], position % self.page_size


class SimulatedEngine:
    """The loop around the scheduler. ``lag`` steps are launched before the oldest one is read."""

    def __init__(
        self,
        *,
        num_pages=33,
        page_size=4,
        max_num_seqs=8,
        max_num_batched_tokens=16,
        prefill_tile=4,
        max_model_len=1000,
        budget_bytes=None,
        lag=0,
        stop_token=None,
        policy=None,
        max_overtakes=32,
        prefetch=0,
        clock=lambda: 0.0,
    ):
        self.allocator = PageAllocator(num_pages)
        self.store = AdapterStore(budget_bytes)
        self.cache = AdapterCache(self.allocator, self.store)
        self.scheduler = Scheduler(
            self.allocator,
            self.cache,
            self.store,
            page_size=page_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            prefill_tile=prefill_tile,
            max_model_len=max_model_len,
            policy=policy,
            max_overtakes=max_overtakes,
            prefetch=prefetch,
            clock=clock,
        )
        self.device = SimulatedDevice(page_size)
        self._lag = lag
        self._stop_token = stop_token
        self._launched: list[tuple[SchedulerOutput, dict[str, int]]] = []

    def add(self, *args, **fields) -> Request:
        made = request(*args, **fields)
        self.scheduler.add(made)
        return made

    def step(self) -> SchedulerOutput:
        output = self.scheduler.schedule()
        self._launched.append((output, self.device.launch(output)))
        told = {version: pages for version, (pages, _) in self.device.adapters.items()}
        assert told == self.cache.resident()
        self.scheduler.update(output)
        while len(self._launched) > (0 if output.is_empty else self._lag):
            self._retire(*self._launched.pop(0))
        return output

    def _retire(self, output: SchedulerOutput, tokens: dict[str, int]) -> None:
        for chunk in (*output.decode, *output.prefill):
            request = chunk.request
            if not chunk.is_last or request.is_finished:
                continue
            token = tokens[request.request_id]
            self.scheduler.append_token(request, token)
            if token == self._stop_token:
                self.scheduler.finish(request, "stop", stop_reason=token)
            elif request.num_tokens == request.max_total_tokens:
                self.scheduler.finish(request, "length")

    def run(self, max_steps=1000) -> list[SchedulerOutput]:
        """Step until nothing is left to do."""
        outputs = []
        while self.scheduler.has_unfinished:
            assert len(outputs) < max_steps, "no end in sight"
            outputs.append(self.step())
        return outputs


def chunks(output: SchedulerOutput) -> dict[str, list[tuple[str, int, int, bool]]]:
    """A step's tokens as plain values, to compare."""

    def plain(chunks):
        return [(c.request.request_id, c.start, c.num_tokens, c.is_last) for c in chunks]

    return {"decode": plain(output.decode), "prefill": plain(output.prefill)}


def ids(requests) -> list[str]:
    return [request.request_id for request in requests]
