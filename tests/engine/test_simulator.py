"""The clock adds up, the fit finds what made the times, and the paper's headlines come out."""

import dataclasses
import math
import random

import pytest
import reports
import simulated_serving as sim

from slora_jax.config import EngineConfig
from slora_jax.errors import ConfigError
from slora_jax.scheduler import SchedulerOutput
from slora_jax.simulator import (
    FEATURES,
    MeasuredStep,
    SimulatedRequest,
    Simulator,
    StepTimeModel,
    StepWork,
)
from tests.engine.simulated_engine import SimulatedEngine, packed_adapter


def simulator(
    step_time, *, num_pages=100, seats=4, adapters=(), num_rows=None, **options
) -> Simulator:
    made = Simulator(
        EngineConfig(max_num_seqs=seats, **options),
        step_time,
        num_pages=num_pages,
        page_size=4,
        max_model_len=100,
        prefill_tile=4,
        max_num_batched_tokens=16,
        num_rows=num_rows,
    )
    for name, num_pages, nbytes in adapters:
        made.register_adapter(name, packed_adapter(name, num_pages=num_pages, nbytes=nbytes))
    return made


def line(arrival, prompt=4, output=3, **fields) -> SimulatedRequest:
    return SimulatedRequest(
        arrival=arrival, num_prompt_tokens=prompt, num_output_tokens=output, **fields
    )


SECOND = StepTimeModel(constant=1.0, coefficients={})


# -- the clock -------------------------------------------------------------------------------------


def test_steps_follow_each_other_and_are_read_one_late():
    run = simulator(SECOND).run([line(10.0)])
    (r,) = run.requests
    # It arrives when nothing runs: one step a token, each a second.
    assert (r.arrival_time, r.first_scheduled_time) == (10.0, 10.0)
    assert (r.first_token_time, r.last_token_time, r.finish_time) == (11.0, 13.0, 13.0)
    assert (run.num_steps, run.busy_seconds, run.seconds) == (3, 3.0, 13.0)


def test_who_arrives_during_a_step_is_in_the_step_after_the_next():
    run = simulator(SECOND).run([line(0.0, output=9), line(0.5, output=1)])
    first, second = run.requests
    assert first.finish_time == 9.0
    # Steps 1 and 2 are launched at 0 and 0; at 1 the first is read and the third is launched.
    assert second.first_scheduled_time == 1.0
    assert second.finish_time == 3.0


def test_the_host_takes_its_time_before_the_launch():
    quick = StepTimeModel(constant=1.0, coefficients={}, host_constant=0.25)
    run = simulator(quick).run([line(10.0), line(10.25, output=1), line(10.5, output=1)])
    first, second, third = run.requests
    # An idle device waits for the host; a busy one does not.
    assert (first.first_token_time, first.finish_time) == (11.25, 13.25)
    # Step 2 is decided at 10.25 and launched at 10.5; step 3 when step 1 has been read, at 11.25.
    assert (second.first_scheduled_time, second.finish_time) == (10.25, 12.25)
    assert (third.first_scheduled_time, third.finish_time) == (11.25, 13.25)
    assert (run.num_steps, run.busy_seconds) == (3, 3.0)


def test_a_slow_host_reads_late():
    slow = StepTimeModel(constant=1.0, coefficients={}, host_coefficients={"swap_ins": 9.0})
    run = simulator(slow, adapters=[("x", 1, 5)]).run(
        [line(0.0, output=3), line(0.5, output=1, adapter="x")]
    )
    # Steps 1 and 2 end at 1 and 2. Step 3, with the adapter, is decided at 1 and launched at 10;
    # only then are the tokens of step 2 read.
    assert [r.first_token_time for r in run.requests] == [1.0, 11.0]
    assert run.requests[0].finish_time == 11.0


def test_steps_are_padded_as_the_engine_pads_them():
    rows = sim.padded_rows("gpu", 256, 512, 16)
    sizes = {(1, 0): 16, (17, 0): 64, (65, 0): 128, (0, 1): 64 + 128, (65, 9): 128 + 256}
    assert {need: rows(*need) for need in sizes} == sizes
    times = StepTimeModel(constant=1.0, coefficients={"extra_rows": 0.5})
    run = simulator(times).run([line(0.0, prompt=4, output=1)])
    assert run.seconds == 1.0
    padded = simulator(times, num_rows=lambda decode, tiles: decode + 66 * tiles)
    assert padded.run([line(0.0, prompt=4, output=2)]).seconds == 2.0 + 0.5 * 2


def test_requests_come_back_in_the_order_of_the_trace():
    trace = [line(5.0), line(0.0), line(5.0, prompt=60)]
    run = simulator(SECOND, num_pages=10, seats=1).run(trace)
    assert run.refused == 1
    assert [r.arrival_time for r in run.requests] == [5.0, 0.0]
    assert all(r.finish_reason == "length" for r in run.requests)


def test_a_step_waits_for_its_own_adapters_alone():
    slow = StepTimeModel(constant=1.0, coefficients={}, copy_bytes_per_second=1.0)
    serve = simulator(slow, adapters=[("x", 1, 5), ("y", 1, 50)], prefetch=0)
    run = serve.run([line(0.0, output=1, adapter="x")])
    assert run.requests[0].finish_time == 6.0
    # A prefetched adapter's copy goes on while others are served.
    serve = simulator(slow, seats=1, adapters=[("x", 1, 5), ("y", 1, 7)], prefetch=1)
    run = serve.run([line(0.0, output=10, adapter="x"), line(0.0, output=1, adapter="y")])
    assert [r.finish_time for r in run.requests] == [15.0, 16.0]
    assert run.prefetches == 1
    serve = simulator(slow, seats=1, adapters=[("x", 1, 5), ("y", 1, 7)], prefetch=0)
    run = serve.run([line(0.0, output=10, adapter="x"), line(0.0, output=1, adapter="y")])
    assert run.requests[1].finish_time > 20.0


def test_early_abort_and_priorities_work_on_the_simulated_clock():
    serve = simulator(SECOND, seats=1, ttft_slo=5.0)
    run = serve.run([line(0.0, output=9), line(1.0), line(1.0, ttft_slo=50.0), line(2.0)])
    assert [r.finish_reason for r in run.requests] == ["length", "abort", "length", "abort"]
    assert run.requests[1].finish_time <= 6.0
    run = simulator(SECOND, seats=1).run([line(0.0), line(0.5), line(0.6, priority=1)])
    assert run.requests[2].finish_time < run.requests[1].finish_time


def test_the_same_trace_gives_the_same_run():
    rng = random.Random(0)
    trace = [line(rng.random() * 50, rng.randint(1, 20), rng.randint(1, 20)) for _ in range(60)]

    def moments():
        times = StepTimeModel(constant=0.1, coefficients={"decode_rows": 0.01})
        requests = simulator(times, num_pages=30).run(trace).requests
        return [(r.first_token_time, r.finish_time) for r in requests]

    assert moments() == moments()


# -- step times ------------------------------------------------------------------------------------


def test_work_of_a_step():
    engine = SimulatedEngine()
    x = engine.store.register("x", packed_adapter("x", num_pages=2, nbytes=100))
    engine.add("a", 5, 3, version=x)
    engine.add("b", 9, 3)
    outputs = [engine.step(), engine.step()]
    works = [StepWork.of(output, lambda version: {x: 56}[version], 100) for output in outputs]
    assert works[0] == StepWork(
        prefill_tokens=13,  # 5 in two tiles of 4; then 8 of b's 9
        prefill_pairs=15 + 36,
        adapters=1,
        rank_sum=56,
        lora_tokens=5,
        swap_ins=1,
        swap_in_bytes=100,
        has_prefill=1,
        largest_rank=56,
        extra_rows=36,
    )
    assert works[1] == StepWork(
        decode_rows=2,
        context_tokens=6 + 9,
        adapters=1,
        rank_sum=56,
        lora_tokens=1,
        largest_rank=56,
        extra_rows=36,
    )
    assert StepWork.of(SchedulerOutput(), {}.get, 0) == StepWork()


def random_work(rng) -> StepWork:
    return StepWork(**{name: rng.randint(0, 10 ** rng.randint(0, 6)) for name in FEATURES})


def test_fit_finds_the_coefficients(tmp_path):
    rng = random.Random(0)
    coefficients = {name: 10.0 ** -rng.randint(4, 8) for name in FEATURES[:5]}
    truth = StepTimeModel(constant=0.01, coefficients=coefficients)
    works = [random_work(rng) for _ in range(300)]
    steps = [MeasuredStep(work=work, seconds=truth.seconds(work)) for work in works]
    model = StepTimeModel.fit(steps, about="made up")
    assert model.constant == pytest.approx(0.01)
    for name in FEATURES:
        found, true = model.coefficients.get(name, 0.0), coefficients.get(name, 0.0)
        assert found == pytest.approx(true, abs=1e-12)
    assert model.host_seconds(works[0]) == 0.0
    model.save(tmp_path / "model.json")
    assert StepTimeModel.load(tmp_path / "model.json") == model


def test_fit_is_never_negative_and_keeps_the_total():
    rng = random.Random(1)
    works = [StepWork(decode_rows=n) for n in range(1, 200)]
    steps = [
        MeasuredStep(work=w, seconds=(0.01 + 1e-4 * w.decode_rows) * rng.uniform(0.9, 1.1))
        for w in works
    ]
    model = StepTimeModel.fit(steps)
    assert all(value > 0 for value in model.coefficients.values())
    errors = [model.seconds(step.work) / step.seconds - 1 for step in steps]
    assert math.fsum(map(abs, errors)) / len(errors) < 0.06
    total = math.fsum(step.seconds for step in steps)
    assert math.fsum(map(model.seconds, works)) == pytest.approx(total, rel=1e-6)


def test_fit_of_the_host_and_of_a_device_that_it_waited_for():
    rng = random.Random(2)
    truth = StepTimeModel(
        constant=0.005,
        coefficients={"context_tokens": 1e-7},
        host_constant=0.002,
        host_coefficients={"has_prefill": 0.008, "decode_rows": 1e-5},
    )

    def measured(late: bool) -> MeasuredStep:
        work = StepWork(
            decode_rows=rng.randint(0, 200),
            context_tokens=rng.randint(0, 10**5),
            has_prefill=rng.randint(0, 1),
        )
        seconds = truth.seconds(work)
        return MeasuredStep(
            work=work,
            seconds=seconds + late * rng.random(),
            wait_seconds=0.0 if late else 0.5 * seconds,
            host_seconds=truth.host_seconds(work),
        )

    model = StepTimeModel.fit([measured(late=number % 3 == 0) for number in range(300)])
    assert (model.constant, model.host_constant) == pytest.approx((0.005, 0.002))
    assert model.coefficients["context_tokens"] == pytest.approx(1e-7)
    for name, value in truth.host_coefficients.items():
        assert model.host_coefficients[name] == pytest.approx(value)
    # A compilation on the way changes little.
    steps = [measured(late=False) for _ in range(300)]
    steps[7] = dataclasses.replace(steps[7], host_seconds=1.0)
    assert StepTimeModel.fit(steps).host_constant == pytest.approx(0.002, rel=0.02)
    # An engine whose host is always late: its steps take what they were seen to take.
    always = StepTimeModel.fit([measured(late=True) for _ in range(100)])
    assert always.constant > 0.1


def test_records_of_before_hosts_were_measured_can_be_read(tmp_path):
    path = tmp_path / "steps.jsonl"
    path.write_text('{"work": {"decode_rows": 3}, "seconds": 0.5}\n')
    assert sim.read_steps(path) == [MeasuredStep(work=StepWork(decode_rows=3), seconds=0.5)]


NOTHING = MeasuredStep(work=StepWork(), seconds=1.0)


@pytest.mark.parametrize(
    "steps", [[], [NOTHING] * 5, [MeasuredStep(work=StepWork(), seconds=0.0)] * 50]
)
def test_what_cannot_be_fitted(steps):
    with pytest.raises(ConfigError, match="cannot be fitted"):
        StepTimeModel.fit(steps)


def test_unknown_features():
    with pytest.raises(ConfigError, match="unknown features sorcery"):
        StepTimeModel(constant=0.0, coefficients={}, host_coefficients={"sorcery": 1.0})


# -- traces ----------------------------------------------------------------------------------------


def test_20_000_adapters():
    device = sim.Device.of("a100-80", "S2")
    run = device.serve(sim.trace(8.0, 20.0, 20_000), 20_000)
    m = sim.metrics(run)
    assert (m["requests"], m["aborted"], m["refused"]) == (160, 0, 0)
    assert run.swap_ins > 100


def test_predictions_are_for_a_workload_that_was_served_before_unless_cold():
    device = sim.Device.of("a100-80", "S2")
    row = {"setting": "S2", "workload": "trace", "alpha": 1.0, "cv": 1.0, "rate": 8.0}
    row |= {"duration": 3.0, "num_adapters": 50, "pages_total": device.num_pages - 1}
    row |= {"seats": 256, "prefill_tile": 16, "prefill_tokens": 512, "kernels": "gpu"}
    row |= dict.fromkeys(("scheduler", "ttft_slo", "cluster_size", "prefetch"))
    options = {"prefill_tile": 16, "max_num_batched_tokens": 512}
    real = sim.metrics(device.serve(sim.trace(8.0, 3.0, 50), 50, **options))
    times = device.step_time
    first = sim.compare(row | real, times, cold=True)
    assert all(found == pytest.approx(measured) for measured, found in first.values())
    again = sim.compare(row | real, times)
    assert first["swap_ins"][1] > 10
    assert again["swap_ins"][1] == 0
    assert again["ttft_p50"][1] < first["ttft_p50"][1]
    assert again["requests_per_s"][1] == pytest.approx(first["requests_per_s"][1], rel=0.05)


@pytest.fixture(scope="module")
def bench() -> reports.Bench:
    """The paper's A10G S2 with 200 adapters for a tenth of its time, at fcfs' .27 there."""
    return reports.Bench(sim.Device.of("a10g", "S2"), 60.0, 200, 2.6)


@pytest.mark.parametrize("name", ["slo", "fairness"])
def test_reports(bench, name, tmp_path):
    report = reports.REPORTS[name](bench)
    report.write(name, tmp_path, {"device": bench.device.name})
    assert (tmp_path / f"{name}.json").stat().st_size > 500
    assert report.checks
    missed = {what for what, (_, _, holds) in report.checks.items() if not holds}
    assert not missed - {"fcfs"}  # the rate is not this short trace's own
