"""What callers get back: vLLM's shapes and names, plus ``adapter_id`` and per-request metrics.

Plain values, snapshots of a request at one moment; nothing here refers to the engine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

FinishReason = str
"""``"stop"`` (end of sequence, stop token or stop string), ``"length"``, ``"abort"``,
``"error"``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logprob:
    """One token's log-probability under the raw model distribution (before temperature)."""

    logprob: float
    rank: int
    """1 is the most likely token."""
    decoded_token: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionOutput:
    """One completion of a prompt."""

    index: int
    """Which of the ``n`` completions."""
    text: str
    token_ids: tuple[int, ...]
    """Includes the end-of-sequence or stop token, which ``text`` leaves out."""
    cumulative_logprob: float | None
    """Sum over ``logprobs``; None where they were not asked for."""
    logprobs: tuple[dict[int, Logprob], ...] | None
    """Per output token: the sampled one and the ``logprobs`` most likely ones, by token id."""
    finish_reason: FinishReason | None
    """None while it is still running."""
    stop_reason: int | str | None
    """The stop string or stop token id that ended it; None for end of sequence and all else."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestMetrics:
    """Seconds on one monotonic clock; None where the moment has not come."""

    queue_time: float | None
    """Arrival to first admission, waiting for pages and for the adapter included."""
    ttft: float | None
    """Time to first token: arrival to the first token of any completion."""
    tpot: float | None
    """Time per output token after the first, mean over the completion that finished last."""
    adapter_load_time: float | None
    """Time to bring the adapter into the pool for this request; 0.0 where it was resident."""
    num_preemptions: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """One prompt's completions."""

    request_id: str
    prompt: str | None
    """None where token ids were given."""
    prompt_token_ids: tuple[int, ...]
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None
    """Per prompt token, None for the first; None as a whole where they were not asked for."""
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    adapter_id: str | None
    metrics: RequestMetrics
    error: Exception | None = None
    """Why ``finish_reason`` is ``"error"``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Histogram:
    """How seconds are distributed."""

    bounds: tuple[float, ...]
    """Upper bounds of the buckets, inclusive; a last bucket has none."""
    counts: tuple[int, ...]
    """Of each bucket, the last included."""
    sum: float

    @property
    def count(self) -> int:
        """All values."""
        return sum(self.counts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineStats:
    """What the pool holds now, and what has happened since the engine started."""

    pages_total: int
    """Usable pages; the null page is not counted."""
    pages_free: int
    pages_kv: int
    pages_adapters: int
    page_size: int
    """Tokens of KV a page holds."""
    page_bytes: int
    """Device bytes of one page over all layers and devices."""
    adapters_registered: int
    adapters_resident: int
    adapters_pinned: int
    adapter_host_bytes: int
    requests_running: int
    requests_waiting: int
    steps: int
    tokens: int
    """Computed in all steps, prompts' and outputs'."""
    token_rows: int
    """The same with padding to the compiled sizes."""
    bytes_read: int
    """Bytes that the steps had to read at least: weights, and pages of KV and adapters, each once a
    step."""
    wait_seconds: float
    """For which the host waited for the device's results. None at all would mean that the host is
    what holds steps back."""
    swap_ins: int
    swap_in_bytes: int
    disk_reloads: int
    prefetches: int
    """Swap-ins for requests that were still waiting."""
    evictions: int
    preemptions: int
    compiles: int
    """Programs compiled so far: steady state adds none."""
    requests_finished: Mapping[str, int]
    """Completions that ended, by reason: ``stop``, ``length``, ``abort`` (by the caller),
    ``deadline`` (early abort), ``error``."""
    prompt_tokens: int
    """Of requests that ended and got a token."""
    output_tokens: int
    """Of requests that ended."""
    tokens_by_adapter: Mapping[str | None, int]
    """Prompts' and outputs' of requests that ended, by loaded adapter; None is the base model."""
    queue_time: Histogram
    ttft: Histogram
    tpot: Histogram
    latency: Histogram

    def __str__(self) -> str:
        mib = self.page_bytes / 2**20

        def share(pages: int) -> str:
            return f"{pages:6d}  {pages * mib:8.1f} MiB  {pages / self.pages_total:6.1%}"

        return "\n".join(
            [
                f"pool: {self.pages_total} pages of {self.page_size} tokens ({mib:.2f} MiB each)",
                f"  free      {share(self.pages_free)}",
                f"  KV        {share(self.pages_kv)}",
                f"  adapters  {share(self.pages_adapters)}",
                f"adapters: {self.adapters_registered} registered "
                f"({self.adapter_host_bytes / 2**20:.1f} MiB in CPU memory), "
                f"{self.adapters_resident} resident, {self.adapters_pinned} pinned",
                f"requests: {self.requests_running} running, {self.requests_waiting} waiting",
                f"since start: {self.steps} steps, {self.tokens} tokens, {self.swap_ins} swap-ins "
                f"({self.swap_in_bytes / 2**20:.1f} MiB), {self.disk_reloads} disk reloads, "
                f"{self.evictions} evictions, {self.preemptions} preemptions, "
                f"{self.compiles} compiles",
                "ended: "
                + (", ".join(f"{n} {why}" for why, n in self.requests_finished.items()) or "none"),
            ]
        )
