"""The evaluation's metrics (S-LoRA, arXiv 2311.03285 §7) over requests that were served, on a
device or in the simulator. Times in seconds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from slora_jax.request import Request

SLO_SECONDS = 6.0
"""Of the paper: time to first token."""


@dataclasses.dataclass(frozen=True)
class Served:
    """One request, ended."""

    tokens: list[int]
    ttft: float | None
    """None where it was aborted before its first token."""
    tpot: float | None
    """None for a single token."""
    latency: float | None
    """None where it was aborted."""
    client_id: str | None = None

    @classmethod
    def of(cls, request: Request, arrival: float) -> Served:
        """``arrival`` on the clock of the request's moments."""
        first, last, gaps = (
            request.first_token_time,
            request.last_token_time,
            len(request.output_token_ids) - 1,
        )
        done = request.finish_reason in ("stop", "length")
        return cls(
            list(request.output_token_ids),
            None if first is None else first - arrival,
            (last - first) / gaps if gaps > 0 and first is not None and last is not None else None,
            request.finish_time - arrival if done and request.finish_time is not None else None,
            request.client_id,
        )


def measure(served: Sequence[Served], seconds: float) -> dict[str, float]:
    """Rates a second, percentiles of times; an aborted request counts 0 in SLO and satisfaction."""
    count = len(served)
    ttfts = [s.ttft for s in served if s.ttft is not None]
    done = [s for s in served if s.latency is not None]
    result = {
        "requests_per_s": len(done) / seconds,
        "output_tokens_per_s": sum(len(s.tokens) for s in served) / seconds,
        "seconds": seconds,
        "requests": count,
        "aborted": count - len(done),
        "slo_attainment": sum(ttft < SLO_SECONDS for ttft in ttfts) / count,
        "satisfaction": sum(max(0.0, 1 - (t / SLO_SECONDS) ** 2) for t in ttfts) / count,
    }
    times = {
        "ttft": ttfts,
        "tpot": [s.tpot for s in served if s.tpot is not None],
        "latency": [s.latency for s in done],
    }
    for name, values in times.items():
        for percent in (50, 90, 99):
            result[f"{name}_p{percent}"] = float(np.percentile(values, percent)) if values else 0.0
    return result
