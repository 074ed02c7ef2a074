"""Simulator: the host half under a clock that a model of step times drives, without a device.

The real scheduler, allocator, cache and store serve a trace of thousands of adapters in seconds;
only how long a step takes the device and the host is modelled, by linear models fitted to measured
steps. Owns these and the discrete-event loop, which reads one step late as the engine does. Refuses
to know devices and tokens: a request's output has the length that the trace says.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from slora_jax.adapter_cache import AdapterCache, SwapIn
from slora_jax.adapter_store import BASE_VERSION, AdapterStore, PackedAdapter
from slora_jax.config import EngineConfig
from slora_jax.errors import CapacityError, ConfigError
from slora_jax.page_allocator import PageAllocator
from slora_jax.policies import Policy
from slora_jax.request import Request
from slora_jax.sampling_params import SamplingParams
from slora_jax.scheduler import SchedulerOutput, make_scheduler

FREE_ROWS = 64
"""Rows that the dense matmuls take while they read their weights (``model_runner.MATMUL_ROWS``)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepWork:
    """What one step does, as far as its time depends on it: the features of the models."""

    decode_rows: int = 0
    context_tokens: int = 0
    """Tokens whose K and V the decode rows read."""
    prefill_tokens: int = 0
    prefill_pairs: int = 0
    """(token, token before it) pairs of the prefill chunks' attention."""
    adapters: int = 0
    """Distinct adapters."""
    rank_sum: int = 0
    """Of all targets of the distinct adapters: proportional to the weights that are read."""
    lora_tokens: int = 0
    """Tokens that have an adapter."""
    swap_ins: int = 0
    """Adapters that come into the pool before it."""
    swap_in_bytes: int = 0
    has_prefill: int = 0
    """1 with prefill tokens: another, larger program."""
    largest_rank: int = 0
    """Of one adapter, all its targets: how long a kernel takes that reads adapters side by side. On
    an H200, 5.8 ms a step of Llama-7B for adapters up to rank 16, 7.5 ms with one of rank 64."""
    extra_rows: int = 0
    """Rows that are computed, padding included, beyond ``FREE_ROWS``."""

    @classmethod
    def of(cls, output: SchedulerOutput, ranks_of: Callable[[int], int], num_rows: int) -> StepWork:
        """Of a scheduled step; ``ranks_of`` gives the sum of an adapter version's ranks,
        ``num_rows`` counts what is computed, padding included.
        """
        prefill = [(chunk.start, chunk.num_tokens) for chunk in output.prefill]
        chunks = (*output.decode, *output.prefill)
        versions = {chunk.request.adapter_version for chunk in chunks} - {BASE_VERSION}
        ranks = [ranks_of(version) for version in versions]
        return cls(
            decode_rows=len(output.decode),
            context_tokens=sum(chunk.start + 1 for chunk in output.decode),
            prefill_tokens=sum(n for _, n in prefill),
            prefill_pairs=sum(n * start + n * (n + 1) // 2 for start, n in prefill),
            adapters=len(versions),
            rank_sum=sum(ranks),
            lora_tokens=sum(
                c.num_tokens for c in chunks if c.request.adapter_version != BASE_VERSION
            ),
            swap_ins=len(output.swap_ins),
            swap_in_bytes=sum(swap.packed.nbytes for swap in output.swap_ins),
            has_prefill=int(bool(prefill)),
            largest_rank=max(ranks, default=0),
            extra_rows=max(num_rows - FREE_ROWS, 0),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasuredStep:
    """A step of a real engine."""

    work: StepWork
    seconds: float
    """From its launch, or from the end of the one before where that is later, until its tokens had
    been read."""
    wait_seconds: float | None = None
    """The last part of ``seconds``, in which the host had nothing to do but wait. None: unknown."""
    host_seconds: float | None = None
    """Of the ``Engine.step`` that launched it, its wait left out. None: unknown."""

    @property
    def host_waited(self) -> bool:
        """Whether ``seconds`` are the device's: the host was there when the step ended."""
        return self.wait_seconds is None or self.wait_seconds > 0.05 * self.seconds


FEATURES = tuple(field.name for field in dataclasses.fields(StepWork))


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTimeModel:
    """Seconds of a step = ``constant`` + Σ coefficient · feature of its ``StepWork``, none of them
    negative; for the device and, likewise, for the host.
    """

    constant: float
    coefficients: dict[str, float]
    """By feature; those that are absent cost nothing."""
    host_constant: float = 0.0
    """Of ``Engine.step`` without its wait for the device. Who arrives meanwhile misses the step,
    which is itself delayed only where the device has nothing else to do."""
    host_coefficients: dict[str, float] = dataclasses.field(default_factory=dict)
    copy_bytes_per_second: float | None = None
    """Of adapters on their way to the device where that runs beside the steps, so that a step waits
    only for the adapters it uses. None: all that a copy costs is in the coefficients."""
    about: str = ""
    """Where it comes from."""

    def __post_init__(self) -> None:
        unknown = sorted({*self.coefficients, *self.host_coefficients} - set(FEATURES))
        if unknown:
            raise ConfigError(f"unknown features {', '.join(unknown)}: there are {FEATURES}")

    def seconds(self, work: StepWork) -> float:
        """How long the device takes for a step that does ``work``."""
        return self.constant + _weighted(work, self.coefficients)

    def host_seconds(self, work: StepWork) -> float:
        """How long the host takes to decide and launch it, and to take in the one before."""
        return self.host_constant + _weighted(work, self.host_coefficients)

    @classmethod
    def fit(cls, steps: Sequence[MeasuredStep], *, about: str = "") -> StepTimeModel:
        """The device's from the steps that the host waited for, or from all where these are too
        few; the host's, where it was not measured, is 0.

        Raises ConfigError for fewer steps than terms, or a step that took no time.
        """
        waited = [step for step in steps if step.host_waited]
        used = waited if len(waited) > len(FEATURES) else steps
        constant, coefficients = _fit([(step.work, step.seconds) for step in used])
        model = cls(constant=constant, coefficients=coefficients, about=about)
        known = [(s.work, s.host_seconds) for s in steps if s.host_seconds is not None]
        if not known:
            return model
        constant, coefficients = _fit(known)
        return dataclasses.replace(model, host_constant=constant, host_coefficients=coefficients)

    def save(self, path: str | os.PathLike[str]) -> None:
        """As JSON."""
        Path(path).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> StepTimeModel:
        """What ``save`` wrote."""
        return cls(**json.loads(Path(path).read_text()))


def _weighted(work: StepWork, coefficients: Mapping[str, float]) -> float:
    return sum(value * getattr(work, name) for name, value in coefficients.items())


def _fit(measured: Sequence[tuple[StepWork, float]]) -> tuple[float, dict[str, float]]:
    """(constant, coefficients) with the least Σ error² / predicted seconds, no term negative.

    That weighs an error by the share of the time that it is in, and the predicted total is the
    measured one; but for errors larger than what is predicted, which count as if they were no
    larger (Huber's): a compilation says nothing of the steps to come.
    """
    from scipy.optimize import nnls  # with jax; slow to import

    times = np.array([seconds for _, seconds in measured], np.float64)
    if len(times) <= len(FEATURES) or times.min() <= 0:
        raise ConfigError(
            f"{len(times)} measured steps cannot be fitted: give more than {len(FEATURES)}, "
            "each of more than 0 seconds"
        )
    columns = np.array([[1, *dataclasses.astuple(work)] for work, _ in measured], np.float64)
    scale = np.maximum(columns.max(axis=0), 1)  # so that bytes and rows weigh alike
    columns /= scale
    predicted, solution = np.full(len(times), np.median(times)), np.zeros(len(scale))
    for _ in range(10):  # the weights settle
        weights = np.maximum(predicted, abs(times - predicted)) ** -0.5
        solution, _ = nnls(columns * weights[:, None], times * weights)
        predicted = np.maximum(columns @ solution, times.min() / 10)
    constant, *rest = (solution / scale).tolist()
    return constant, {name: value for name, value in zip(FEATURES, rest, strict=True) if value}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimulatedRequest:
    """One line of a trace."""

    arrival: float
    """Seconds after the start."""
    num_prompt_tokens: int
    num_output_tokens: int
    adapter: str | None = None
    client_id: str | None = None
    priority: int = 0
    ttft_slo: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimulatedRun:
    """What became of a trace."""

    requests: list[Request]
    """In the order of the trace, all finished; their moments are seconds after the start."""
    refused: int
    """Requests that could never fit; they are not among the others."""
    seconds: float
    """Until the last one ended."""
    num_steps: int
    busy_seconds: float
    """Of the device."""
    swap_ins: int
    evictions: int
    preemptions: int
    prefetches: int


class Simulator:
    """A host half and a clock.

    Args:
        config: its scheduling fields, ``host_adapter_bytes`` and ``max_num_seqs`` (None: 256) hold;
            those of devices and models do not matter.
        num_pages: of the pool, the null page included.
        page_size: tokens a page.
        prefill_tile, max_num_batched_tokens: see ``EngineConfig``.
        step_time: how long a step takes.
        num_rows: (decode rows, prefill tiles) → rows that a step of them computes, padding
            included. None: as many as there are.
        make_cache: makes the cache, for baselines that divide the pool in another way.
        policy: instead of ``config.scheduler``, for baselines that admit in another order.
    """

    def __init__(
        self,
        config: EngineConfig,
        step_time: StepTimeModel,
        *,
        num_pages: int,
        page_size: int,
        max_model_len: int,
        prefill_tile: int = 128,
        max_num_batched_tokens: int = 2048,
        num_rows: Callable[[int, int], int] | None = None,
        make_cache: Callable[[PageAllocator, AdapterStore], AdapterCache] = AdapterCache,
        policy: Policy | None = None,
    ):
        self.now = 0.0
        self.allocator = PageAllocator(num_pages)
        self.store = AdapterStore(config.host_adapter_bytes)
        self.cache = make_cache(self.allocator, self.store)
        self.scheduler = make_scheduler(
            config,
            self.allocator,
            self.cache,
            self.store,
            page_size=page_size,
            max_num_seqs=config.max_num_seqs or 256,
            prefill_tile=prefill_tile,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            clock=lambda: self.now,
            policy=policy,
        )
        self._ttft_slo = config.ttft_slo
        self._step_time = step_time
        self._prefill_tile = prefill_tile
        self._num_rows = num_rows or (lambda decode, tiles: decode + tiles * prefill_tile)
        self._ranks: dict[int, int] = {}
        self._device_free = 0.0  # when the last launched step ends
        self._copier_free = 0.0  # when the last adapter's copy ends
        self._copied: dict[int, float] = {}  # version → when its copy ends
        self._busy_seconds = 0.0
        self._num_steps = 0

    def register_adapter(self, name: str, packed: PackedAdapter) -> None:
        """Make an adapter known; ``pages`` and ``scaling`` of ``packed`` may be None."""
        version = self.store.register(name, packed)
        self._ranks[version] = sum(packed.ranks)

    def run(
        self,
        trace: Sequence[SimulatedRequest],
        *,
        observe: Callable[[Simulator, SchedulerOutput], None] | None = None,
    ) -> SimulatedRun:
        """Serve ``trace`` to its end. ``observe`` is told of each step when its tokens are known.

        Once for each object: it starts with an empty pool at time 0.
        """
        order = sorted(range(len(trace)), key=lambda index: trace[index].arrival)
        made: dict[int, Request] = {}
        scheduler, arrived = self.scheduler, 0
        previous: tuple[SchedulerOutput, float] | None = None
        while arrived < len(order) or scheduler.has_unfinished or previous is not None:
            while arrived < len(order) and trace[order[arrived]].arrival <= self.now:
                self._arrive(order[arrived], trace[order[arrived]], made)
                arrived += 1
            if previous is None and not scheduler.has_unfinished:
                if arrived < len(order):
                    self.now = trace[order[arrived]].arrival
                continue
            output = scheduler.schedule()
            launched = self._launch(output)
            scheduler.update(output)
            if launched is None and previous is None and not output.failed:
                # Only a cache that divides the pool can bring this about.
                assert arrived < len(order), "whoever is next does not fit into an empty pool"
                self.now = max(self.now, trace[order[arrived]].arrival)
            if previous is not None:
                self._retire(*previous)
                if observe is not None:
                    observe(self, previous[0])
            previous = launched
        requests = [made[index] for index in sorted(made)]
        return SimulatedRun(
            requests=requests,
            refused=len(trace) - len(requests),
            seconds=max((r.finish_time or 0.0 for r in requests), default=0.0),
            num_steps=self._num_steps,
            busy_seconds=self._busy_seconds,
            swap_ins=self.cache.swap_ins,
            evictions=self.cache.evictions,
            preemptions=scheduler.preemptions,
            prefetches=scheduler.prefetches,
        )

    def _arrive(self, index: int, line: SimulatedRequest, made: dict[int, Request]) -> None:
        slo = self._ttft_slo if line.ttft_slo is None else line.ttft_slo
        request = Request(
            request_id=str(index),
            prompt_token_ids=[0] * line.num_prompt_tokens,
            sampling_params=_GREEDY,
            max_total_tokens=line.num_prompt_tokens + line.num_output_tokens,
            adapter_id=line.adapter,
            adapter_version=self.store.resolve(line.adapter) if line.adapter else BASE_VERSION,
            client_id=line.client_id,
            priority=line.priority,
            deadline=None if slo is None else line.arrival + slo,
            arrival_time=line.arrival,
        )
        try:
            self.scheduler.add(request)
        except CapacityError:
            return
        made[index] = request

    def _launch(self, output: SchedulerOutput) -> tuple[SchedulerOutput, float] | None:
        """The step and when it ends. The host's time passes first; the device begins after the one
        before, with the step's adapters there.
        """
        self._copy(output.swap_ins)
        if output.is_empty:
            return None
        tiles = sum(-(-chunk.num_tokens // self._prefill_tile) for chunk in output.prefill)
        num_rows = self._num_rows(len(output.decode), tiles)
        work = StepWork.of(output, self._ranks.__getitem__, num_rows)
        self.now += self._step_time.host_seconds(work)
        ready = 0.0
        for chunk in (*output.decode, *output.prefill):
            ready = max(ready, self._copied.get(chunk.request.adapter_version, 0.0))
        took = self._step_time.seconds(work)
        self._device_free = max(self.now, self._device_free, ready) + took
        self._busy_seconds += took
        self._num_steps += 1
        return output, self._device_free

    def _copy(self, swap_ins: Sequence[SwapIn]) -> None:
        """Begin the copies of adapters, one after the other, beside the steps."""
        bandwidth = self._step_time.copy_bytes_per_second
        if bandwidth is not None:
            for swap in swap_ins:
                self._copier_free = (
                    max(self.now, self._copier_free) + swap.packed.nbytes / bandwidth
                )
                self._copied[swap.version] = self._copier_free

    def _retire(self, output: SchedulerOutput, end: float) -> None:
        self.now = max(self.now, end)
        for chunk in (*output.decode, *output.prefill):
            request = chunk.request
            if chunk.is_last and not request.is_finished:
                self.scheduler.append_token(request, 0)
                if request.num_tokens == request.max_total_tokens:
                    self.scheduler.finish(request, "length")


_GREEDY = SamplingParams(temperature=0, ignore_eos=True)
