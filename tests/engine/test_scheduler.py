"""Decisions as values, and long random runs against the tokens of each request alone."""

import random

import pytest

from slora_jax.errors import AdapterLoadError, CapacityError
from slora_jax.request import RequestStatus
from slora_jax.scheduler import SchedulerOutput
from tests.engine.simulated_engine import (
    STOP_TOKEN,
    AdapterFiles,
    SimulatedEngine,
    chunks,
    ids,
    packed_adapter,
    tokens_alone,
)


def load(engine, name, num_pages=1, *, files=False, nbytes=10):
    packed = packed_adapter(name, num_pages=num_pages, nbytes=nbytes)
    where = AdapterFiles(packed)
    version = engine.store.register(name, packed, reload=where.read if files else None)
    return version, where


def step(engine) -> dict:
    output = engine.step()
    engine.scheduler.check_invariants()
    return chunks(output)


# -- steps -----------------------------------------------------------------------------------------


def test_a_prompt_in_one_chunk_then_one_token_a_step():
    engine = SimulatedEngine()
    r = engine.add("a", 5, 3)
    assert r.status is RequestStatus.WAITING
    assert step(engine) == {"decode": [], "prefill": [("a", 0, 5, True)]}
    assert r.status is RequestStatus.RUNNING
    assert step(engine) == {"decode": [("a", 5, 1, True)], "prefill": []}
    assert step(engine) == {"decode": [("a", 6, 1, True)], "prefill": []}
    assert (r.status, r.finish_reason) == (RequestStatus.FINISHED, "length")
    assert r.output_token_ids == tokens_alone(r.prompt_token_ids, None, 8)
    assert not engine.scheduler.has_unfinished
    assert engine.allocator.num_free == engine.allocator.num_usable
    assert engine.step() == SchedulerOutput()


def test_a_long_prompt_is_read_in_chunks():
    engine = SimulatedEngine()
    engine.add("a", 37, 2)
    assert [step(engine)["prefill"] for _ in range(3)] == [
        [("a", 0, 16, False)],
        [("a", 16, 16, False)],
        [("a", 32, 5, True)],
    ]
    assert step(engine) == {"decode": [("a", 37, 1, True)], "prefill": []}


def test_prefill_budget_is_counted_in_whole_tiles():
    engine = SimulatedEngine()  # 16 tokens in tiles of 4
    for name, num_prompt in (("a", 5), ("b", 2), ("c", 9), ("d", 3)):
        engine.add(name, num_prompt, 8)
    # a takes two tiles, b one, c what is left: one.
    assert step(engine)["prefill"] == [("a", 0, 5, True), ("b", 0, 2, True), ("c", 0, 4, False)]
    assert engine.scheduler.num_waiting == 1
    assert step(engine) == {
        "decode": [("a", 5, 1, True), ("b", 2, 1, True)],
        "prefill": [("c", 4, 5, True), ("d", 0, 3, True)],
    }


def test_a_chunk_of_one_token_is_a_decode_and_costs_no_prefill_budget():
    engine = SimulatedEngine(max_num_batched_tokens=4)
    engine.add("one", 1, 4)
    engine.add("five", 5, 4)
    assert step(engine) == {"decode": [("one", 0, 1, True)], "prefill": [("five", 0, 4, False)]}
    engine.add("four", 4, 4)
    assert step(engine) == {
        "decode": [("one", 1, 1, True), ("five", 4, 1, True)],
        "prefill": [("four", 0, 4, True)],
    }


def test_decodes_do_not_wait_for_a_long_prompt():
    engine = SimulatedEngine(num_pages=200)
    engine.add("a", 2, 40)
    step(engine)
    engine.add("long", 100, 2)
    for k in range(5):
        assert step(engine) == {
            "decode": [("a", 2 + k, 1, True)],
            "prefill": [("long", 16 * k, 16, False)],
        }


def test_a_decode_behind_a_long_prompt_does_not_wait_for_it():
    engine = SimulatedEngine(max_num_batched_tokens=4)
    engine.add("long", 12, 4)
    engine.add("one", 1, 4)
    for k in range(3):
        assert step(engine) == {
            "decode": [("one", k, 1, True)],
            "prefill": [("long", 4 * k, 4, k == 2)],
        }


def test_seats_are_limited_and_the_line_is_first_come_first_served():
    engine = SimulatedEngine(max_num_seqs=2)
    for name in "abcd":
        engine.add(name, 2, 3)
    assert ids(c.request for c in engine.step().prefill) == ["a", "b"]
    assert engine.scheduler.num_waiting == 2
    engine.scheduler.abort("b")
    assert step(engine) == {"decode": [("a", 2, 1, True)], "prefill": [("c", 0, 2, True)]}
    assert [(s.num_running, s.num_waiting) for s in [engine.scheduler]] == [(2, 1)]
    engine.run()


def test_the_line_stops_at_the_first_that_does_not_fit():
    engine = SimulatedEngine(num_pages=9, page_size=4)  # 8 pages
    engine.add("a", 12, 4)
    engine.step()
    engine.add("big", 17, 4)
    engine.add("small", 1, 1)
    assert step(engine) == {"decode": [("a", 12, 1, True)], "prefill": []}
    engine.scheduler.abort("big")
    assert step(engine)["decode"] == [("a", 13, 1, True), ("small", 0, 1, True)]


def test_pages_are_allocated_as_tokens_come():
    engine = SimulatedEngine(page_size=4)
    r = engine.add("a", 20, 12)
    counts = []
    while not r.is_finished:
        engine.step()
        counts.append(engine.allocator.counts().get("kv", 0))
    # 16 and 4 tokens of prompt, then a decode a step; the 32nd token is never computed.
    assert counts == [4, 5, *[6] * 4, *[7] * 4, *[8] * 2, 0]


def test_admission_leaves_room_for_those_who_run():
    engine = SimulatedEngine(num_pages=7, page_size=4)  # 6 pages
    engine.add("a", 8, 12)  # 2 pages now, one more soon
    engine.add("b", 8, 12)  # likewise
    engine.add("c", 1, 3)  # one page would be free, but a and b will want it
    step(engine)
    assert (engine.scheduler.num_running, engine.scheduler.num_waiting) == (2, 1)
    assert engine.allocator.num_free == 2


def test_a_request_that_has_all_its_pages_reserves_none():
    engine = SimulatedEngine(num_pages=4, page_size=8)  # 3 pages
    for name in "abc":
        engine.add(name, 4, 4)
    step(engine)
    assert engine.scheduler.num_running == 3


def test_admission_wants_room_for_the_whole_prompt():
    engine = SimulatedEngine(num_pages=11, page_size=4)  # 10 pages
    engine.add("a", 16, 20)
    step(engine)
    engine.add("long", 24, 2)  # 6 pages: with 4 taken and one reserved there are 5
    step(engine)
    assert engine.scheduler.num_waiting == 1
    assert engine.scheduler.preemptions == 0


# -- preemption ------------------------------------------------------------------------------------


def test_the_last_admitted_is_preempted_and_resumes_with_the_same_output():
    engine = SimulatedEngine(num_pages=7, page_size=4)
    a = engine.add("a", 8, 12)
    b = engine.add("b", 8, 12)
    c = engine.add("c", 8, 4)
    outputs = engine.run()
    preempting = [o for o in outputs if o.preempted]
    assert ids(preempting[0].preempted) == ["b"]
    assert preempting[0].prefill == ()  # nobody is admitted in a step that preempts
    assert b.num_preemptions >= 1
    assert a.num_preemptions == 0
    assert engine.scheduler.preemptions == sum(r.num_preemptions for r in (a, b, c))
    for r in (a, b, c):
        assert r.output_token_ids == tokens_alone(r.prompt_token_ids, None, r.max_total_tokens)
    # b resumes ahead of c, and reads its prompt and outputs again in one go.
    resumed = [
        x for o in outputs for x in chunks(o)["prefill"] if x[0] in "bc" and o not in preempting
    ]
    assert [x[0] for x in resumed] == ["b", *["b"] * b.num_preemptions, "c"]
    assert resumed[1][1] == 0
    assert resumed[1][2] > 8


def test_a_preempted_request_keeps_its_version_and_gives_up_its_reference():
    engine = SimulatedEngine(num_pages=9, page_size=2)
    version, _ = load(engine, "x", num_pages=2)
    engine.add("a", 4, 9)
    b = engine.add("b", 2, 6, version=version)
    engine.step()
    assert engine.scheduler.num_running == 2
    engine.store.unregister("x")
    while b.status is not RequestStatus.PREEMPTED:
        engine.step()
        engine.scheduler.check_invariants()
    assert (list(b.pages), b.num_computed_tokens) == ([], 0)
    engine.run()
    assert b.output_token_ids == tokens_alone(b.prompt_token_ids, "x", 8)
    assert engine.allocator.num_free == 8
    engine.store.check({})


def test_idle_adapters_leave_before_anyone_is_preempted():
    engine = SimulatedEngine(num_pages=9, page_size=2)
    version, _ = load(engine, "x", num_pages=4)
    engine.add("a", 2, 1, version=version)
    engine.step()
    assert engine.allocator.counts() == {"adapter": 4}
    engine.add("b", 8, 8)
    (b,) = {c.request for o in engine.run() for c in (*o.decode, *o.prefill)}
    assert b.num_preemptions == 0
    assert engine.cache.evictions == 1


def test_the_adapter_of_a_running_request_never_leaves():
    engine = SimulatedEngine(num_pages=9, page_size=2)
    version, _ = load(engine, "x", num_pages=4)
    engine.add("a", 1, 6, version=version)
    engine.add("b", 2, 14)
    while engine.scheduler.num_running:
        engine.step()
        running = [r for r in engine.scheduler._running.values() if r.adapter_version]
        assert not running or version in engine.cache.resident()


# -- adapters --------------------------------------------------------------------------------------


def test_a_step_swaps_in_what_its_requests_need():
    engine = SimulatedEngine()
    x, _ = load(engine, "x", num_pages=2)
    y, _ = load(engine, "y", num_pages=3)
    for name, version in (("a", x), ("b", y), ("c", x), ("d", 0)):
        engine.add(name, 2, 2, version=version)
    output = engine.step()
    assert [(s.version, s.pages) for s in output.swap_ins] == [(x, (1, 2)), (y, (4, 5, 6))]
    assert engine.step().swap_ins == ()
    assert engine.cache.hits == 1
    assert not engine.scheduler.has_unfinished
    assert set(engine.cache.resident()) == {x, y}


def test_evictions_are_part_of_the_step():
    engine = SimulatedEngine(num_pages=6)
    x, _ = load(engine, "x", num_pages=3)
    y, _ = load(engine, "y", num_pages=3)
    engine.add("a", 2, 1, version=x)
    assert engine.step().evicted == ()
    engine.add("b", 2, 1, version=y)
    assert engine.step().evicted == (x,)
    engine.store.unregister("y")
    assert engine.step().evicted == (y,)


def test_an_adapter_that_cannot_be_read_fails_its_request_alone():
    engine = SimulatedEngine(budget_bytes=0)
    good, _ = load(engine, "good", files=True)
    bad, files = load(engine, "bad", files=True)
    files.is_broken = True
    a = engine.add("a", 2, 2, version=good)
    b = engine.add("b", 2, 2, version=bad)
    c = engine.add("c", 2, 2)
    output = engine.step()
    assert output.failed == (b,)
    assert ids(x.request for x in output.prefill) == ["a", "c"]
    assert (b.status, b.finish_reason) == (RequestStatus.FINISHED, "error")
    assert isinstance(b.error, AdapterLoadError)
    engine.scheduler.check_invariants()
    engine.run()
    assert (a.finish_reason, c.finish_reason) == ("length", "length")
    files.is_broken = False
    engine.add("d", 2, 2, version=bad)
    assert engine.step().failed == ()


def test_a_request_finishes_on_the_version_it_was_added_with():
    engine = SimulatedEngine(max_num_seqs=1)
    old, _ = load(engine, "old")
    first = engine.add("a", 3, 6, version=old)
    waiting = engine.add("b", 3, 6, version=old)
    engine.step()
    engine.store.unregister("old")
    new = engine.store.register("old", packed_adapter("new"))
    last = engine.add("c", 3, 6, version=new)
    engine.run()
    for r, digest in ((first, "old"), (waiting, "old"), (last, "new")):
        assert r.output_token_ids == tokens_alone(r.prompt_token_ids, digest, 9)
    assert list(engine.cache.resident()) == [new]


# -- ends ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_abort(num_steps):
    engine = SimulatedEngine()
    version, _ = load(engine, "x")
    r = engine.add("a", 20, 8, version=version)
    for _ in range(num_steps):
        engine.step()
    assert engine.scheduler.abort("a") is r
    assert (r.status, r.finish_reason, list(r.pages)) == (RequestStatus.FINISHED, "abort", [])
    engine.scheduler.check_invariants()
    assert engine.allocator.counts().get("kv") is None
    assert engine.scheduler.abort("a") is None
    assert engine.step().is_empty


def test_abort_of_a_preempted_request():
    engine = SimulatedEngine(num_pages=7, page_size=4)
    engine.add("a", 8, 12)
    b = engine.add("b", 8, 12)
    while b.status is not RequestStatus.PREEMPTED:
        engine.step()
    engine.scheduler.abort("b")
    engine.scheduler.check_invariants()
    engine.run()


def test_nothing_ends_twice():
    engine = SimulatedEngine()
    r = engine.add("a")
    engine.scheduler.finish(r, "stop", stop_reason="end")
    assert (r.finish_reason, r.stop_reason) == ("stop", "end")
    with pytest.raises(AssertionError, match="finished already"):
        engine.scheduler.finish(r, "stop")


def test_moments():
    times = iter(range(100))
    engine = SimulatedEngine(clock=lambda: next(times))
    r = engine.add("a", 4, 2, arrival_time=-5.0)
    assert r.first_scheduled_time is None
    engine.run()
    # Schedule, before and after fetching the adapter, first token; schedule, last token, end.
    assert (r.first_scheduled_time, r.adapter_load_time) == (2, 1)
    assert (r.first_token_time, r.last_token_time, r.finish_time) == (3, 5, 6)


# -- what can never fit ----------------------------------------------------------------------------


def test_a_request_is_refused_by_its_worst_case():
    engine = SimulatedEngine(num_pages=5, page_size=4)
    engine.add("fits", 8, 9)  # 16 tokens are computed
    message = r"'b' can never run: it needs 5 pages for 8 prompt tokens and up to 10 .* pool has 4"
    with pytest.raises(CapacityError, match=message):
        engine.add("b", 8, 10)
    version, _ = load(engine, "x", num_pages=2)
    with pytest.raises(CapacityError, match=r"needs 3 pages .*, 2 for adapter 'x': 5 in all"):
        engine.add("c", 8, 2, version=version)
    assert engine.scheduler.num_waiting == 1
    engine.scheduler.check_invariants()
    engine.run()


def test_pinned_adapters_count_against_others_and_not_against_their_own():
    engine = SimulatedEngine(num_pages=5, page_size=4)
    x, _ = load(engine, "x", num_pages=2)
    engine.scheduler.pin_adapter(x)
    with pytest.raises(CapacityError, match=r"2 taken by pinned adapters: 5 in all.*unpin an"):
        engine.add("a", 8, 2)
    r = engine.add("b", 7, 2, version=x)
    engine.run()
    assert r.output_token_ids == tokens_alone(r.prompt_token_ids, "x", 9)
    engine.scheduler.unpin_adapter(x)
    engine.add("a", 8, 2)
    engine.run()


def test_a_pin_that_would_make_a_request_impossible_is_refused():
    engine = SimulatedEngine(num_pages=5, page_size=4)
    x, _ = load(engine, "x", num_pages=2)
    engine.add("own", 4, 4, version=x)
    engine.add("other", 8, 5)
    with pytest.raises(CapacityError, match=r"'x' \(2 pages\) .* request 'other'.* 3 of 4 pages"):
        engine.scheduler.pin_adapter(x)
    assert engine.cache.resident() == {}
    engine.scheduler.abort("other")
    engine.scheduler.pin_adapter(x)
    engine.scheduler.pin_adapter(x)
    engine.scheduler.check_invariants()
    engine.run()
    assert engine.cache.pinned_pages == 2


def test_largest_total_tokens_is_what_add_accepts():
    engine = SimulatedEngine(num_pages=5, page_size=4, max_model_len=12)
    x, _ = load(engine, "x", num_pages=2)
    y, _ = load(engine, "y", num_pages=4)
    largest = engine.scheduler.largest_total_tokens
    assert (largest(0), largest(x), largest(y)) == (12, 9, 1)
    engine.add("a", 8, 1, version=x)
    with pytest.raises(CapacityError):
        engine.add("b", 8, 2, version=x)
    for num_prompt, version in ((9, x), (1, y)):  # not even the prompt fits
        with pytest.raises(CapacityError):
            engine.add("c", num_prompt, largest(version) - num_prompt, version=version)
    engine.run()
    engine.scheduler.pin_adapter(x)
    assert (largest(0), largest(x), largest(y)) == (9, 9, 1)


# -- a loop that reads one step late ---------------------------------------------------------------


def test_the_next_step_is_scheduled_before_the_last_one_is_read():
    engine = SimulatedEngine(lag=1)
    r = engine.add("a", 3, 3)
    assert step(engine)["prefill"] == [("a", 0, 3, True)]
    assert (r.output_token_ids, r.num_tokens_in_flight) == ([], 1)
    assert step(engine)["decode"] == [("a", 3, 1, True)]
    assert (len(r.output_token_ids), r.num_tokens_in_flight) == (1, 1)
    assert step(engine)["decode"] == [("a", 4, 1, True)]
    # The last token is in flight: nothing to compute, and the engine reads what is left.
    assert step(engine) == {"decode": [], "prefill": []}
    assert r.output_token_ids == tokens_alone(r.prompt_token_ids, None, 6)
    assert r.is_finished


def test_a_request_preempted_with_a_token_in_flight_resumes_when_it_is_known():
    engine = SimulatedEngine(num_pages=7, page_size=4, lag=1)
    requests = [engine.add(name, 8, 12) for name in "abc"]
    in_flight = 0
    while engine.scheduler.has_unfinished:
        output = engine.scheduler.schedule()
        in_flight += sum(r.num_tokens_in_flight for r in output.preempted)
        engine._launched.append((output, engine.device.launch(output)))
        engine.scheduler.update(output)
        engine.scheduler.check_invariants()
        while len(engine._launched) > (0 if output.is_empty else 1):
            engine._retire(*engine._launched.pop(0))
    assert in_flight > 0
    for r in requests:
        assert r.output_token_ids == tokens_alone(r.prompt_token_ids, None, 20)


# -- long random runs ------------------------------------------------------------------------------


@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize("seed", [0, 1])
def test_tiny_pools_serve_everyone(seed, lag):
    """Under constant pressure each request ends, soon, with the tokens of the request alone."""
    rng = random.Random(100 * lag + seed)
    preemptions = evictions = reloads = 0
    for _ in range(12):
        tile = rng.choice([1, 2, 4])
        engine = SimulatedEngine(
            num_pages=rng.randint(6, 20),
            page_size=rng.choice([1, 2, 4]),
            max_num_seqs=rng.randint(1, 6),
            max_num_batched_tokens=tile * rng.randint(1, 4),
            prefill_tile=tile,
            budget_bytes=rng.choice([None, 0, 30]),
            lag=lag,
            stop_token=STOP_TOKEN,
        )
        versions = {}
        for name in "uvwxyz":
            files = rng.random() < 0.7  # the others always count in the budget, which may be 0
            version, _ = load(
                engine, name, rng.randint(1, 4), files=files, nbytes=10 if files else 0
            )
            versions[version] = name
        requests, num_steps, work = [], 0, 0
        while num_steps < 250 or engine.scheduler.has_unfinished:
            if num_steps < 250 and rng.random() < 0.3:
                version = rng.choice([0, *versions])
                largest = engine.scheduler.largest_total_tokens(version)
                if largest >= 2:
                    num_tokens = rng.randint(2, min(largest, 40))
                    num_prompt = rng.randint(1, num_tokens - 1)
                    requests.append(
                        engine.add(
                            str(len(requests)), num_prompt, num_tokens - num_prompt, version=version
                        )
                    )
                    work += num_tokens
            engine.step()
            engine.scheduler.check_invariants()
            num_steps += 1
            # The first in the running line computes a token in each step but those that wait
            # for one in flight.
            assert num_steps <= 250 + (1 + lag) * (work + len(requests))
        assert len(requests) > 20
        for r in requests:
            expected = tokens_alone(
                r.prompt_token_ids,
                versions.get(r.adapter_version),
                r.max_total_tokens,
                STOP_TOKEN,
            )
            assert r.output_token_ids == expected
            assert r.finish_reason == ("stop" if expected[-1] == STOP_TOKEN else "length")
        assert engine.allocator.counts().keys() <= {"adapter"}
        preemptions += engine.scheduler.preemptions
        evictions += engine.cache.evictions
        reloads += engine.store.disk_reloads
        assert engine.cache.evict_idle(engine.allocator.num_usable)
    assert preemptions > 20
    assert evictions > 20
    assert reloads > 20
