"""The benchmark's baselines serve everyone, and all but merging give the engine's own tokens."""

import argparse
import json
from pathlib import Path

import ablations_device
import plots
import pytest
from ablations import OneAdapter, SplitCache
from benchmark_serving import dummy_llm, measure_run, serve
from simulated_serving import read_steps
from workloads import ATTENTION, Setting, batch

from checkpoints.synthetic import write_synthetic_llama
from slora_jax import LLM, EngineConfig
from slora_jax.policies import Policy
from slora_jax.simulator import StepTimeModel
from slora_jax.waiting import WaitingRequests
from tests.engine.conftest import SERVED
from tests.engine.simulated_engine import SimulatedEngine, packed_adapter, request
from tests.serving import TinyModel, fresh_engine

NAMES = ["attention", "qv", "wide"]


def requests():
    return batch(12, 12, 6, len(NAMES), 256)


@pytest.fixture(scope="module")
def expected(compiled_llm: LLM, tiny: TinyModel) -> list[list[int]]:
    with fresh_engine(compiled_llm, tiny.adapters, **SERVED) as llm:
        return [s.tokens for s in serve(llm, requests(), NAMES).served]


@pytest.mark.parametrize("baseline", ["no-unify-mem", "one-adapter"])
def test_baselines_of_the_host_half(compiled_llm: LLM, tiny: TinyModel, expected, baseline):
    with fresh_engine(compiled_llm, {}, num_pages=50, **SERVED) as llm:
        config = EngineConfig(**SERVED)
        ablations_device.apply(baseline, llm, config, adapter_share=0.5, rank=24)
        for name in NAMES:
            llm.load_adapter(name, tiny.adapters[name])
        run = serve(llm, requests(), NAMES)
        assert [s.tokens for s in run.served] == expected
        assert measure_run(run, None)["aborted"] == 0
        assert llm.stats().output_tokens == sum(len(tokens) for tokens in expected)
        llm.engine.scheduler.check_invariants()


@pytest.mark.slow
def test_baselines_of_the_device_half(tmp_path, monkeypatch):
    from slora_jax.layers import lora
    from slora_jax.models import llama

    for module, name in ((lora, "paged_lora"), (lora, "lora_op"), (llama, "attention_op")):
        monkeypatch.setattr(module, name, getattr(module, name))  # `bmm` replaces them
    write_synthetic_llama(tmp_path / "model", seed=1)
    setting = Setting(str(tmp_path / "model"), (16, 8), ATTENTION)
    options = {"dtype": "float32", "max_num_seqs": 4, "max_num_batched_tokens": 32}
    options |= {"kernels": "xla", "max_model_len": 128, "pool_bytes": 2**21}
    names = ("scheduler", "ttft_slo", "cluster_size", "prefetch", "tensor_parallel")
    others = dict.fromkeys((*names, "lora_partition"))
    tokens = {}
    for baseline in (None, "bmm", "merge"):
        args = argparse.Namespace(
            adapters=[len(NAMES)], baseline=baseline, adapter_share=0.5, **others, **options
        )
        with dummy_llm(args, setting) as (llm, names):
            tokens[baseline] = [s.tokens for s in serve(llm, requests(), names).served]
    assert tokens["bmm"] == tokens[None]
    assert [len(t) for t in tokens["merge"]] == [6] * 12  # its adapters are others


def test_steps_are_recorded_and_fit(compiled_llm: LLM, tiny: TinyModel, expected, tmp_path):
    path = tmp_path / "steps.jsonl"
    with fresh_engine(compiled_llm, tiny.adapters, **SERVED) as llm:
        tokens = llm.engine._runner.num_tokens
        run = serve(llm, requests(), NAMES, path)
        tokens = llm.engine._runner.num_tokens - tokens
        llm.engine.step()  # is not watched any more
    assert [s.tokens for s in run.served] == expected
    steps = read_steps(path)
    assert len(steps) == run.counters["steps"] == len(path.read_text().splitlines())
    works = [json.loads(line)["work"] for line in path.read_text().splitlines()]
    assert sum(w["decode_rows"] + w["prefill_tokens"] for w in works) == tokens
    assert sum(w["swap_in_bytes"] for w in works) == run.counters["swap_in_bytes"]
    assert 0 < sum(step.seconds for step in steps) <= run.seconds
    assert sum(step.wait_seconds for step in steps) == pytest.approx(run.counters["wait_seconds"])
    assert all(0 < step.wait_seconds < step.seconds for step in steps)
    assert all(step.host_seconds > 0 for step in steps)
    assert sum(step.host_seconds + step.wait_seconds for step in steps) <= run.seconds
    model = StepTimeModel.fit(steps)
    assert model.seconds(steps[-1].work) > 0
    assert model.host_seconds(steps[-1].work) > 0


def test_runs_of_a_file_are_one_curve_a_system(monkeypatch, tmp_path):
    folder = Path(plots.__file__).parent / "reports" / "h200"
    rows = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["workload"] == "offline" and row["setting"] == "S2"]
    rows += [row | {"baseline": "bmm", "output_tokens_per_s": 1.0} for row in reversed(rows)]
    plots.against_adapters(tmp_path / "runs.png", [*rows, {"name": "transformers + PEFT"}])
    assert (tmp_path / "runs.png").stat().st_size > 5000
    panels = {}
    monkeypatch.setattr(plots, "draw", lambda *args, **_: panels.update(args[3]))
    plots.against_adapters(tmp_path / "runs.png", rows)
    ours = [(row["num_adapters"], row["output_tokens_per_s"]) for row in rows[:2]]
    assert panels["output tokens/s"] == {"slora-jax": ours, "bmm": [(100, 1.0), (1000, 1.0)]}
    assert set(panels["TTFT p50, ms"]) == {"slora-jax", "bmm"}


# -- their host halves -----------------------------------------------------------------------------


def test_a_split_pool_gives_neither_part_to_the_other():
    engine = SimulatedEngine(num_pages=21, page_size=2, max_num_seqs=8)
    engine.cache = SplitCache(engine.allocator, engine.store, adapter_pages=6)
    engine.scheduler._cache = engine.cache
    versions = [engine.store.register(name, packed_adapter(name, num_pages=2)) for name in "uvwxyz"]
    for number in range(12):
        engine.add(str(number), 5, 5, version=versions[number % 6])
    engine.add("base", 20, 8)
    while engine.scheduler.has_unfinished:
        engine.step()
        counts = engine.allocator.counts()
        assert counts.get("adapter", 0) <= 6
        assert counts.get("kv", 0) <= 14
        engine.scheduler.check_invariants()
    assert engine.cache.evictions > 0


def test_one_adapter_a_batch():
    line = WaitingRequests(OneAdapter(), max_overtakes=10**9)
    for number, version in enumerate([1, 2, 1, 0, 2]):
        line.push(request(str(number), version=version))
    running = []
    for _ in range(2):
        running.append(line.peek())
        line.admit(running[-1])
    assert [r.request_id for r in running] == ["0", "2"]
    assert line.peek() is None
    for r in running:
        line.policy.left(r)
    assert line.peek().request_id == "1"
    assert isinstance(line.policy, Policy)
