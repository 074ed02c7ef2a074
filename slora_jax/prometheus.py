"""An engine's counts for Prometheus (extra ``metrics``: prometheus-client).

    registry = prometheus_client.CollectorRegistry()
    registry.register(EngineCollector(llm.stats))         # AsyncLLM: engine.stats_between_steps

Nothing is added to the serving path: a scrape reads ``EngineStats``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from slora_jax.errors import EngineClosedError
from slora_jax.outputs import EngineStats, Histogram

GAUGES = {
    "requests_waiting": "Requests that wait for admission, preempted ones included.",
    "requests_running": "Requests that are running.",
    "adapters_registered": "Adapters that requests can ask for.",
    "adapters_resident": "Adapters in the page pool.",
    "adapters_pinned": "Adapters that are never evicted.",
    "adapter_host_bytes": "CPU memory of adapters.",
}
COUNTERS = {
    "steps": "Device steps.",
    "swap_ins": "Adapters copied into the page pool.",
    "swap_in_bytes": "Bytes of them.",
    "prefetches": "Of them, for requests that were still waiting.",
    "evictions": "Idle adapters that gave up their pages.",
    "disk_reloads": "Adapters read from their files again.",
    "preemptions": "Running requests that gave up their pages and ran again.",
    "prompt_tokens": "Prompt tokens of requests that were served.",
    "output_tokens": "Tokens that they got.",
    "compiles": "Programs compiled.",
}
HISTOGRAMS = {
    "queue_time": "Arrival to admission.",
    "ttft": "Arrival to first token.",
    "tpot": "Time a token after the first.",
    "latency": "Arrival to end.",
}


class EngineCollector(Collector):
    """Turns ``EngineStats`` into metrics named ``slora_…`` whenever a registry is scraped.

    ``per_adapter`` adds tokens by adapter: one series for each name, so mind their number.
    """

    def __init__(self, stats: Callable[[], EngineStats], *, per_adapter: bool = False):
        self._stats = stats
        self._per_adapter = per_adapter

    def describe(self) -> list[Metric]:
        """Nothing: to register it reads no stats."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The metrics now; of a closed engine only that it is not up."""
        try:
            stats = self._stats()
        except EngineClosedError:
            yield GaugeMetricFamily("slora_up", "Whether the engine serves.", value=0)
            return
        yield GaugeMetricFamily("slora_up", "Whether the engine serves.", value=1)
        for name, about in GAUGES.items():
            yield GaugeMetricFamily(f"slora_{name}", about, value=getattr(stats, name))
        pages = GaugeMetricFamily("slora_pages", "Pages of the pool by owner.", labels=["owner"])
        for owner in ("free", "kv", "adapters"):
            pages.add_metric([owner], getattr(stats, f"pages_{owner}"))
        yield pages
        for name, about in COUNTERS.items():
            yield CounterMetricFamily(f"slora_{name}", about, value=getattr(stats, name))
        finished = CounterMetricFamily(
            "slora_requests_finished", "Requests that ended, by reason.", labels=["reason"]
        )
        for reason, count in sorted(stats.requests_finished.items()):
            finished.add_metric([reason], count)
        yield finished
        for name, about in HISTOGRAMS.items():
            yield _histogram(f"slora_{name}_seconds", about, getattr(stats, name))
        if self._per_adapter:
            tokens = CounterMetricFamily(
                "slora_adapter_tokens", "Tokens of served requests.", labels=["adapter"]
            )
            for adapter_id, count in stats.tokens_by_adapter.items():
                tokens.add_metric([adapter_id or "__base__"], count)
            yield tokens


def _histogram(name: str, about: str, histogram: Histogram) -> HistogramMetricFamily:
    buckets, total = [], 0
    for bound, count in zip((*histogram.bounds, "+Inf"), histogram.counts, strict=True):
        total += count
        buckets.append((str(bound), total))
    return HistogramMetricFamily(name, about, buckets=buckets, sum_value=histogram.sum)
