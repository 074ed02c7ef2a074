"""What an engine counts is what happened, and Prometheus reads it."""

import asyncio
import contextlib
import logging

import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families

from slora_jax import LLM, AsyncLLM, RequestFailedError, SamplingParams
from slora_jax.metrics import SECONDS, Distribution, ServedRequests
from slora_jax.prometheus import EngineCollector
from tests.engine.conftest import SERVED
from tests.engine.simulated_engine import SimulatedEngine, request
from tests.serving import TinyModel, fresh_engine


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)


def test_distribution():
    d = Distribution()
    for seconds in (0.0, 0.001, 0.0011, 1.0, 1e6):
        d.observe(seconds)
    h = d.snapshot()
    assert h.bounds == SECONDS
    assert len(h.counts) == len(SECONDS) + 1
    assert h.counts[:2] == (2, 1)
    assert h.counts[SECONDS.index(1.0)] == 1
    assert h.counts[-1] == 1
    assert (h.count, h.sum) == (5, pytest.approx(1000001.0021))


def test_moments_are_those_of_the_requests():
    now = iter(range(1000))
    engine = SimulatedEngine(clock=lambda: float(next(now)))
    served = ServedRequests()
    engine.scheduler.on_finish = served.add
    a = engine.add("a", 4, 3)
    b = engine.add("b", 4, 30)
    late = request("late", arrival_time=0.0, deadline=-1.0)
    engine.scheduler.add(late)
    for _ in range(3):
        engine.step()
    engine.scheduler.abort("b")
    assert dict(served.by_reason) == {"deadline": 1, "length": 1, "abort": 1}
    assert served.prompt_tokens == 8
    assert served.output_tokens == 3 + len(b.output_token_ids)
    assert served.by_adapter == {None: served.prompt_tokens + served.output_tokens}
    assert served.ttft.snapshot().sum == a.first_token_time + b.first_token_time
    assert served.latency.snapshot().sum == a.finish_time
    assert served.tpot.snapshot().count == 2


def scrape(registry) -> dict[tuple, float]:
    text = prometheus_client.generate_latest(registry).decode()
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_prometheus(compiled_llm: LLM, tiny: TinyModel, caplog):
    with fresh_engine(compiled_llm, tiny.adapters, **SERVED) as llm:
        registry = prometheus_client.CollectorRegistry()
        registry.register(EngineCollector(llm.stats, per_adapter=True))
        caplog.set_level(logging.INFO, "slora_jax")
        llm.generate([[1, 2, 3]] * 3, ["all", "qv", None], greedy(4), progress=False)
        found, stats = scrape(registry), llm.stats()
        assert found["slora_up",] == 1
        assert found["slora_requests_finished_total", "length"] == 3
        assert found["slora_ttft_seconds_count",] == 3
        assert found["slora_ttft_seconds_bucket", "+Inf"] == 3
        assert found["slora_ttft_seconds_sum",] == pytest.approx(stats.ttft.sum)
        assert found["slora_output_tokens_total",] == 12
        assert found["slora_prompt_tokens_total",] == 9
        assert found["slora_adapters_resident",] == stats.adapters_resident == 2
        for adapter in ("all", "qv", "__base__"):
            assert found["slora_adapter_tokens_total", adapter] == 7
        owners = ("free", "kv", "adapters")
        assert sum(found["slora_pages", owner] for owner in owners) == stats.pages_total
        assert "3 length" in str(stats)
        # An unloaded adapter's series ends.
        llm.unload_adapter("all")
        assert ("slora_adapter_tokens_total", "all") not in scrape(registry)
        (first, *_) = [r for r in caplog.records if r.name == "slora_jax.requests"]
        assert (first.finish_reason, first.output_tokens) == ("length", 4)


def test_prometheus_of_an_online_engine(llm: LLM):
    registry = prometheus_client.CollectorRegistry()

    async def main():
        async with AsyncLLM(llm) as engine:
            registry.register(EngineCollector(engine.stats_between_steps))
            with contextlib.suppress(RequestFailedError):
                async for _ in engine.generate([1, 2], "qv", greedy(3)):
                    pass
            found = await asyncio.to_thread(scrape, registry)
            assert found["slora_requests_finished_total", "length"] == 1
            assert found["slora_up",] == 1

    asyncio.run(asyncio.wait_for(main(), timeout=60))
    assert scrape(registry) == {("slora_up",): 0}


def test_the_log_is_silent_unless_asked_for(llm: LLM, capfd):
    llm.generate([[1, 2]], None, greedy(1), progress=False)
    logging.getLogger("slora_jax.async_llm").warning("nobody listens")
    assert capfd.readouterr() == ("", "")
