"""Many callers at once: outputs equal to those alone, and whatever happens to one stays with it."""

import asyncio
import contextlib
import gc
import itertools
import threading
import time

import pytest
import safetensors.numpy

from slora_jax import (
    LLM,
    AdapterLoadError,
    AdapterNotFoundError,
    CapacityError,
    ConfigError,
    DeadlineExceededError,
    EngineClosedError,
    EngineInUseError,
    InvalidRequestError,
    OverloadedError,
    RequestFailedError,
    SamplingParams,
)
from slora_jax.async_llm import MOST_FAILURES, AsyncLLM
from tests.engine.conftest import SERVED
from tests.serving import TinyModel, assert_only_idle_adapters_left, fresh_engine, random_prompts

NAMES = [None, "attention", "mlp", "all", "qv", "wide"]


def greedy(num_tokens: int, **options) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, **options)


async def final(iterator):
    """The last output."""
    return [output async for output in iterator][-1]


def tokens(output) -> list[int]:
    return list(output.outputs[0].token_ids)


def serve(llm: LLM, scenario, **options) -> None:
    """Run ``scenario(engine)`` online, and see that nothing is left behind."""

    async def main():
        before = len(asyncio.all_tasks())
        async with AsyncLLM(llm, **options) as engine:
            await scenario(engine)
            await engine.drain()
            assert not engine._streams
        assert len(asyncio.all_tasks()) == before

    asyncio.run(asyncio.wait_for(main(), timeout=100))
    assert not [t for t in threading.enumerate() if t.name == "slora-jax engine"]
    assert_only_idle_adapters_left(llm)


def test_many_at_once_get_what_they_get_alone(llm: LLM, tiny: TinyModel):
    prompts = random_prompts([3, 20, 7, 31, 1, 12] * 4)

    async def one(engine, prompt, name):
        seen = []
        async for output in engine.generate(prompt, name, greedy(8)):
            seen.append(tokens(output))
            assert output.adapter_id == name
        assert output.finished
        assert all(later[: len(s)] == s for s, later in itertools.pairwise(seen))
        return seen[-1]

    async def scenario(engine):
        asked = [(p, NAMES[k % len(NAMES)]) for k, p in enumerate(prompts)]
        answers = await asyncio.gather(*(one(engine, *a) for a in asked))
        for (prompt, name), answer in zip(asked, answers, strict=True):
            assert answer == tiny.greedy(prompt, name, 8)

    serve(llm, scenario)
    # The LLM is given back in working order.
    (output,) = llm.generate([prompts[0]], "all", greedy(4), progress=False)
    assert tokens(output) == tiny.greedy(prompts[0], "all", 4)


def test_leaving_aborts(llm: LLM, tiny: TinyModel):
    (prompt,) = random_prompts([9])

    async def scenario(engine):
        iterator = engine.generate(prompt, "all", greedy(100))
        async for _ in iterator:
            break
        await iterator.aclose()
        task = asyncio.create_task(final(engine.generate(prompt, "qv", greedy(100))))
        while (await engine.stats()).requests_running == 0:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while (await engine.stats()).requests_running:
            await asyncio.sleep(0.001)
        output = await final(engine.generate(prompt, "qv", greedy(3)))
        assert tokens(output) == tiny.greedy(prompt, "qv", 3)

    serve(llm, scenario)


def test_an_abandoned_iterator_is_aborted(llm: LLM):
    async def scenario(engine):
        async for _ in engine.generate([1, 2, 3], None, greedy(100)):
            break  # and never closed: asyncio does it when the garbage is collected
        gc.collect()

    serve(llm, scenario)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([],), {}, InvalidRequestError, "empty"),
        (({"a": 1},), {}, InvalidRequestError, "prompt 0"),
        ((["two", "texts"],), {}, InvalidRequestError, "prompt 0"),
        (([1], "nobody"), {}, AdapterNotFoundError, "nobody"),
        (([1], 3), {}, InvalidRequestError, "adapter id 3"),
        (([1], None, 3), {}, InvalidRequestError, "sampling_params"),
        (([1], None), {"priority": "high"}, InvalidRequestError, "priority"),
        (([1], None), {"client_id": 3}, InvalidRequestError, "client_id"),
        (([1], None), {"ttft_slo": 0}, InvalidRequestError, "ttft_slo"),
        (([1] * 200,), {}, InvalidRequestError, "200 tokens"),
    ],
)
def test_bad_requests_end_alone(llm: LLM, tiny: TinyModel, arguments, options, error, message):
    async def scenario(engine):
        good = asyncio.create_task(final(engine.generate([5, 6], "mlp", greedy(6))))
        with pytest.raises(error, match=message):
            await final(engine.generate(*arguments, **options))
        assert tokens(await good) == tiny.greedy([5, 6], "mlp", 6)

    serve(llm, scenario)


def test_what_can_never_fit_is_refused(compiled_llm: LLM, tiny: TinyModel):
    with fresh_engine(compiled_llm, tiny.adapters, num_pages=17, **SERVED) as llm:

        async def scenario(engine):
            with pytest.raises(CapacityError, match="can never run"):
                await final(engine.generate([1] * 30, "all", greedy(90)))

        serve(llm, scenario)


def test_overload_is_refused_at_once_and_nothing_is_queued(llm: LLM, tiny: TinyModel):
    async def scenario(engine):
        tasks = [
            asyncio.create_task(final(engine.generate([k, 7], None, greedy(20))))
            for k in range(3 * SERVED["max_num_seqs"])
        ]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        refused = [r for r in results if isinstance(r, OverloadedError)]
        assert refused
        assert "at most 2 may (max_waiting)" in str(refused[0])
        for k, result in enumerate(results):
            if result not in refused:
                assert tokens(result) == tiny.greedy([k, 7], None, 20)
        assert tokens(await final(engine.generate([1], None, greedy(2)))) == tiny.greedy(
            [1], None, 2
        )

        with pytest.raises(InvalidRequestError, match="n=3 completions can never wait"):
            await final(engine.generate([1], None, SamplingParams(n=3, max_tokens=2)))

    serve(llm, scenario, max_waiting=2)


def test_deadlines_priorities_and_clients_reach_the_scheduler(compiled_llm: LLM, tiny: TinyModel):
    with fresh_engine(compiled_llm, {}, scheduler="lcfs", **SERVED) as llm:

        async def scenario(engine):
            busy = [
                asyncio.create_task(final(engine.generate([k], None, greedy(60), client_id="a")))
                for k in range(SERVED["max_num_seqs"])
            ]
            while (await engine.stats()).requests_running < SERVED["max_num_seqs"]:
                await asyncio.sleep(0.001)
            with pytest.raises(DeadlineExceededError, match=r"within 0\.01 s"):
                await final(engine.generate([1], None, greedy(2), ttft_slo=0.01))
            order = []

            async def note(name, priority):
                await final(engine.generate([2], None, greedy(1), priority=priority))
                order.append(name)

            await asyncio.gather(note("low", -1), note("high", 5), note("middle", 0), *busy)
            assert order == ["high", "middle", "low"]

        serve(llm, scenario)


def test_adapters_come_and_go_while_others_are_served(llm: LLM, tiny: TinyModel):
    async def scenario(engine):
        steady = asyncio.create_task(final(engine.generate([3, 4], "mlp", greedy(60))))
        await engine.load_adapter("new", tiny.adapters["all_reloaded"])
        output = await final(engine.generate([1, 2], "new", greedy(4)))
        assert tokens(output) == tiny.greedy([1, 2], "all_reloaded", 4)
        others = safetensors.numpy.load_file(tiny.adapters["all"] / "adapter_model.safetensors")
        await engine.update_adapter("new", others)
        output = await final(engine.generate([1, 2], "new", greedy(4)))
        assert tokens(output) == tiny.greedy([1, 2], "all", 4)
        with pytest.raises(AdapterLoadError, match="tensors by PEFT's names"):
            await engine.update_adapter("new", "path")
        with pytest.raises(AdapterLoadError):
            await engine.load_adapter("broken", tiny.directory / "nowhere")
        for wrong in ("", 5):
            with pytest.raises(InvalidRequestError):
                await engine.load_adapter(wrong, tiny.directory)
            with pytest.raises(InvalidRequestError):
                await engine.update_adapter(wrong, others)
        await engine.pin_adapter("new")
        assert (await engine.stats()).adapters_pinned == 1
        await engine.unpin_adapter("new")
        await engine.unload_adapter("new")
        with pytest.raises(AdapterNotFoundError):
            await final(engine.generate([1], "new", greedy(1)))
        assert "new" not in [info.name for info in await engine.list_adapters()]
        assert tokens(await steady) == tiny.greedy([3, 4], "mlp", 60)

    serve(llm, scenario)


def test_shutdown_answers_everyone(llm: LLM):
    async def main():
        engine = AsyncLLM(llm)
        tasks = [
            asyncio.create_task(final(engine.generate([k], None, greedy(100)))) for k in range(9)
        ]
        while (await engine.stats()).requests_running == 0:
            await asyncio.sleep(0.001)
        await engine.shutdown()
        await engine.shutdown()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, EngineClosedError)
            assert "shutdown() was called" in str(result)
        with pytest.raises(EngineClosedError, match="shutdown"):
            await final(engine.generate([1]))
        with pytest.raises(EngineClosedError):
            await engine.stats()

    asyncio.run(asyncio.wait_for(main(), timeout=100))
    assert_only_idle_adapters_left(llm)


def test_an_llm_that_is_served_answers_nobody_else(llm: LLM, tiny: TinyModel):
    async def main():
        async with AsyncLLM(llm) as engine:
            task = asyncio.create_task(final(engine.generate([1, 2], "qv", greedy(30))))
            for refused in (
                lambda: llm.generate([[1]], progress=False),
                llm.stats,
                lambda: llm.unload_adapter("qv"),
                lambda: AsyncLLM(llm),
            ):
                with pytest.raises(EngineInUseError, match="an AsyncLLM serves this LLM"):
                    refused()
            assert tokens(await task) == tiny.greedy([1, 2], "qv", 30)

    asyncio.run(asyncio.wait_for(main(), timeout=100))
    (output,) = llm.generate([[1, 2]], "qv", greedy(9), progress=False)
    assert tokens(output) == tiny.greedy([1, 2], "qv", 9)


def test_closing_an_llm_that_is_served_answers_everyone(compiled_llm: LLM, monkeypatch):
    async def main(llm):
        engine = AsyncLLM(llm)
        tasks = [
            asyncio.create_task(final(engine.generate([k], None, greedy(100)))) for k in range(9)
        ]
        while (await engine.stats()).requests_running == 0:
            await asyncio.sleep(0.001)
        llm.close()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, EngineClosedError)
            assert "its LLM was closed" in str(result)
        await engine.shutdown()
        with pytest.raises(EngineClosedError, match="close"):
            AsyncLLM(llm)

    monkeypatch.setattr(compiled_llm._engine._runner, "close", lambda: None)  # others need it
    with fresh_engine(compiled_llm, {}, **SERVED) as llm:
        asyncio.run(asyncio.wait_for(main(llm), timeout=100))


def test_a_generate_whose_llm_another_thread_closes_says_so(compiled_llm: LLM, monkeypatch):
    monkeypatch.setattr(compiled_llm._engine._runner, "close", lambda: None)  # others need it
    errors = []

    def ask(llm):
        with pytest.raises(EngineClosedError, match="close") as caught:
            llm.generate([[1, 2], [3]], None, greedy(100), progress=False)
        errors.append(caught.value)

    with fresh_engine(compiled_llm, {}, **SERVED) as llm:
        asking = threading.Thread(target=ask, args=(llm,))
        asking.start()
        while llm.stats().requests_running == 0:
            time.sleep(0.001)
        llm.close()
        asking.join(timeout=60)
    assert len(errors) == 1


def test_requests_that_run_are_not_handed_over(llm: LLM):
    stream = llm.stream([[1, 2]], None, greedy(20))
    next(stream)
    with pytest.raises(EngineInUseError, match="still running"):
        AsyncLLM(llm)
    assert list(stream)[-1][1].finished


def test_draining_finishes_what_was_accepted_and_takes_no_more(llm: LLM, tiny: TinyModel):
    async def main():
        async with AsyncLLM(llm) as engine:
            await engine.drain()
        async with AsyncLLM(llm) as engine:
            task = asyncio.create_task(final(engine.generate([1, 2], "qv", greedy(30))))
            while (await engine.stats()).requests_running == 0:
                await asyncio.sleep(0.001)
            drained = asyncio.create_task(engine.drain())
            await asyncio.sleep(0.001)
            with pytest.raises(EngineClosedError, match="being drained"):
                await final(engine.generate([1]))
            await drained
            assert tokens(await task) == tiny.greedy([1, 2], "qv", 30)

    asyncio.run(asyncio.wait_for(main(), timeout=100))


@contextlib.contextmanager
def failing_steps(llm: LLM, fails):
    """``launch`` raises where ``fails(count)``, after the pool was donated."""
    runner = llm._engine._runner
    launch, count = runner.launch, iter(range(1000))

    def failing_launch(output):
        if fails(next(count)):
            for layer in runner.pool:
                layer.delete()
            raise RuntimeError("the device fell over")
        return launch(output)

    runner.launch = failing_launch
    try:
        yield
    finally:
        del runner.launch


def test_a_failed_step_ends_those_who_ran_and_the_others_are_served(llm: LLM, tiny: TinyModel):
    seats = SERVED["max_num_seqs"]

    async def scenario(engine):
        await engine.pin_adapter("wide")
        with failing_steps(llm, lambda count: count == 3):
            results = await asyncio.gather(
                *(final(engine.generate([k, 1], "all", greedy(9))) for k in range(2 * seats)),
                return_exceptions=True,
            )
        failed = [r for r in results if isinstance(r, RequestFailedError)]
        assert len(failed) == seats
        assert "the device fell over" in str(failed[0])
        assert isinstance(failed[0].__cause__, RuntimeError)
        for k, result in enumerate(results):
            if result not in failed:
                assert tokens(result) == tiny.greedy([k, 1], "all", 9)
        assert (await engine.stats()).adapters_pinned == 1
        output = await final(engine.generate([5], "wide", greedy(5)))
        assert tokens(output) == tiny.greedy([5], "wide", 5)

    serve(llm, scenario)


def test_an_engine_that_keeps_failing_says_that_it_is_dead(compiled_llm: LLM, tiny: TinyModel):
    async def main(llm):
        engine = AsyncLLM(llm)
        with failing_steps(llm, lambda count: True):
            results = await asyncio.gather(
                *(final(engine.generate([k], None, greedy(9))) for k in range(40)),
                return_exceptions=True,
            )
        seats = SERVED["max_num_seqs"]
        failed = [type(result) for result in results]
        assert failed.count(RequestFailedError) == seats * (MOST_FAILURES - 1)
        assert failed.count(EngineClosedError) == 40 - failed.count(RequestFailedError)
        with pytest.raises(EngineClosedError, match=r"keeps failing: .*the device fell over"):
            await final(engine.generate([1]))
        await engine.shutdown()

    with fresh_engine(compiled_llm, {}, **SERVED) as llm:
        asyncio.run(asyncio.wait_for(main(llm), timeout=100))
    compiled_llm._engine._runner.renew_pool()


def test_callers_in_several_loops(llm: LLM, tiny: TinyModel):
    engine = AsyncLLM(llm)
    answers = {}

    def caller(k):
        output = asyncio.run(final(engine.generate([k, 2], "attention", greedy(6))))
        answers[k] = tokens(output)

    threads = [threading.Thread(target=caller, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    asyncio.run(engine.shutdown())
    assert answers == {k: tiny.greedy([k, 2], "attention", 6) for k in range(4)}


def test_a_loop_that_is_gone_leaves_nothing_running(llm: LLM):
    engine = AsyncLLM(llm)
    loop = asyncio.new_event_loop()
    iterator = engine.generate([1, 2], None, greedy(100))
    loop.run_until_complete(anext(iterator))
    loop.close()

    async def main():
        while (await engine.stats()).requests_running:
            await asyncio.sleep(0.001)
        await engine.shutdown()

    asyncio.run(asyncio.wait_for(main(), timeout=60))
    del iterator
    assert_only_idle_adapters_left(llm)


@pytest.mark.parametrize("max_waiting", [0, -1, True, 1.5, None])
def test_bad_bound(llm: LLM, max_waiting):
    with pytest.raises(ConfigError, match="max_waiting"):
        AsyncLLM(llm, max_waiting=max_waiting)


def test_what_is_no_llm():
    with pytest.raises(ConfigError, match="llm='model'"):
        AsyncLLM("model")
