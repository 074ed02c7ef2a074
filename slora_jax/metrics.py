"""What an engine tells of the requests it has served: counts, distributions, and a log.

Plain counters that cost a microsecond a request; ``EngineStats`` shows them, ``prometheus`` exports
them. The log is Python's own under ``"slora_jax"``, with fields in ``extra``, and silent until the
application adds a handler.
"""

from __future__ import annotations

import bisect
import dataclasses
import logging
from collections import Counter

from slora_jax.outputs import Histogram
from slora_jax.request import Request

logging.getLogger("slora_jax").addHandler(logging.NullHandler())  # else Python prints warnings
logger = logging.getLogger("slora_jax.requests")

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5)
SECONDS = (*SECONDS, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0)
"""Upper bounds of the histograms' buckets."""


RETRACTED = "retracted"
"""``stop_reason`` of a request that was taken back before any step: it is not counted."""


class Distribution:
    """Counts of seconds by bucket."""

    def __init__(self) -> None:
        self._counts = [0] * (len(SECONDS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one value."""
        self._counts[bisect.bisect_left(SECONDS, seconds)] += 1
        self._sum += seconds

    def snapshot(self) -> Histogram:
        """As it is now."""
        return Histogram(bounds=SECONDS, counts=tuple(self._counts), sum=self._sum)


@dataclasses.dataclass(eq=False)
class ServedRequests:
    """Totals over the requests that have ended, each completion counted."""

    by_reason: Counter[str] = dataclasses.field(default_factory=Counter)
    """``stop``, ``length``, ``abort`` (by the caller), ``deadline`` (early abort), ``error``."""
    prompt_tokens: int = 0
    """Of requests that got a token at all."""
    output_tokens: int = 0
    by_adapter: Counter[str | None] = dataclasses.field(default_factory=Counter)
    """Tokens, prompts' and outputs', by adapter name; None is the base model."""
    queue_time: Distribution = dataclasses.field(default_factory=Distribution)
    ttft: Distribution = dataclasses.field(default_factory=Distribution)
    tpot: Distribution = dataclasses.field(default_factory=Distribution)
    latency: Distribution = dataclasses.field(default_factory=Distribution)
    """Arrival to end, of requests that ended by ``stop`` or ``length``."""

    def add(self, request: Request) -> None:
        """A request has ended."""
        if request.stop_reason == RETRACTED:
            return
        assert request.finish_reason is not None
        assert request.finish_time is not None
        is_late = request.finish_reason == "abort" and request.stop_reason == "deadline"
        self.by_reason["deadline" if is_late else request.finish_reason] += 1
        arrival = request.arrival_time
        if request.first_scheduled_time is not None:
            self.queue_time.observe(request.first_scheduled_time - arrival)
        num_output = len(request.output_token_ids)
        if request.first_token_time is not None and request.last_token_time is not None:
            self.prompt_tokens += len(request.prompt_token_ids)
            self.output_tokens += num_output
            self.by_adapter[request.adapter_id] += len(request.prompt_token_ids) + num_output
            self.ttft.observe(request.first_token_time - arrival)
            if num_output > 1:
                decoding = request.last_token_time - request.first_token_time
                self.tpot.observe(decoding / (num_output - 1))
        if request.finish_reason in ("stop", "length"):
            self.latency.observe(request.finish_time - arrival)
        if logger.isEnabledFor(logging.INFO):
            _log(request)


def _log(request: Request) -> None:
    logger.info(
        "request %s: %s",
        request.request_id,
        request.finish_reason,
        extra={
            "request_id": request.request_id,
            "adapter_id": request.adapter_id,
            "client_id": request.client_id,
            "finish_reason": request.finish_reason,
            "error": None if request.error is None else str(request.error),
            "prompt_tokens": len(request.prompt_token_ids),
            "output_tokens": len(request.output_token_ids),
            "arrival_time": request.arrival_time,
            "first_token_time": request.first_token_time,
            "finish_time": request.finish_time,
            "num_preemptions": request.num_preemptions,
        },
    )
