"""Who is next under each policy, that nobody starves, and that fair is fair."""

import random

import pytest

from slora_jax.config import EngineConfig
from slora_jax.errors import ConfigError, DeadlineExceededError
from slora_jax.policies import SCHEDULERS, Fair, SloOrder, make_policy
from slora_jax.waiting import WaitingRequests
from tests.engine.simulated_engine import (
    SimulatedEngine,
    ids,
    packed_adapter,
    request,
    tokens_alone,
)


def waiting(name="fcfs", max_overtakes=1000, **options) -> WaitingRequests:
    return WaitingRequests(make_policy(name, **options), max_overtakes=max_overtakes)


def push(line, *names, **fields):
    made = [request(name, **fields) for name in names]
    for r in made:
        line.push(r)
    return made


def admit_all(line) -> list[str]:
    order = []
    while (r := line.peek()) is not None:
        line.admit(r)
        order.append(r.request_id)
    assert len(line) == 0
    return order


# -- orders ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "order"), [("fcfs", "abc"), ("lcfs", "cba")])
def test_order_of_arrival(name, order):
    line = waiting(name)
    assert line.peek() is None
    push(line, *"abc")
    assert ids(line.upcoming(2)) == list(order[:2])
    assert admit_all(line) == list(order)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_higher_priority_first(name):
    line = waiting(name)
    push(line, "a")
    push(line, "b", priority=-1)
    push(line, "c", priority=7)
    assert admit_all(line) == ["c", "a", "b"]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_preempted_requests_are_next_and_anyone_can_leave(name):
    line = waiting(name)
    a, b, c, d = push(line, *"abcd")
    for r in (a, b):
        assert r in line.upcoming(4)
        line.remove(r)
    line.policy.push(a), line._new.setdefault("a", a)
    line.admit(a)
    line.resume_later(a)
    assert line.peek() is a
    assert line.upcoming(1) == [a]
    line.remove(a)
    line.remove(c)
    assert admit_all(line) == ["d"]
    assert line.upcoming(5) == []
    line.push(d)
    assert line.peek() is d


def test_cluster_keeps_to_the_adapters_of_the_batch():
    line = waiting("cluster", cluster_size=2)
    for number, version in enumerate([1, 2, 3, 1, 3, 2, 0]):
        push(line, str(number), version=version)
    # 0 and 1 fill the cluster; then adapters 1 and 2 and the base, by age; then whoever is oldest.
    assert admit_all(line) == ["0", "1", "3", "5", "6", "2", "4"]


def test_a_cluster_is_left_when_its_requests_end():
    line = waiting("cluster", cluster_size=1)
    first, _, _ = (push(line, name, version=v)[0] for name, v in (("a", 1), ("b", 2), ("c", 1)))
    line.admit(line.peek())
    assert line.peek().request_id == "c"
    line.policy.left(first)
    assert line.peek().request_id == "b"


def test_slo_serves_the_newest_while_arrivals_are_ahead():
    policy = SloOrder()
    line = WaitingRequests(policy, max_overtakes=1000)
    policy.advance(0.0)
    push(line, *"abcd", deadline=100.0)
    line.admit(line.peek())
    policy.advance(0.5)
    assert policy.is_newest_first
    assert (line.peek().request_id, ids(line.upcoming(2))[0]) == ("c", "c")
    for _ in range(2):
        line.admit(line.peek())
    policy.advance(1.0)
    assert not policy.is_newest_first
    assert ids(line.upcoming(2)) == [line.peek().request_id]
    # A long idle time counts by its mean.
    policy.advance(1000.0)
    assert policy._arrival_rate < 1e-1


# -- nobody starves --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("max_overtakes", [1, 4])
def test_nobody_waits_for_ever(name, max_overtakes):
    """Endless newcomers that every policy would prefer, and each old request still gets its turn in
    as many admissions as promised.
    """
    line = waiting(name, max_overtakes, cluster_size=1)
    running = push(line, "first", version=1, client_id="new")
    line.admit(running[0])
    old = push(line, *"abc", version=2, priority=0, client_id="old")
    line.policy.admitted(old[0])  # the old client has been served more than any newcomer
    admissions, left = 0, {r.request_id: k for k, r in enumerate(old)}
    while left:
        push(line, str(admissions), version=1, priority=1, client_id=f"new {admissions}")
        admitted = line.peek()
        line.admit(admitted)
        admissions += 1
        if admitted.request_id in left:
            bound = (left.pop(admitted.request_id) + 1) * (max_overtakes + 1)
            assert admissions <= bound
    assert admissions > len(old)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_everyone_finishes_in_a_full_house(name):
    """A pool under pressure, more arrivals than it can serve, and no request left behind: each ends
    within a bounded number of steps, with the tokens it has alone.
    """
    rng = random.Random(name)
    engine = SimulatedEngine(
        num_pages=14,
        page_size=2,
        max_num_seqs=3,
        max_num_batched_tokens=8,
        policy=make_policy(name, cluster_size=1),
        max_overtakes=4,
        prefetch=2,
    )
    versions = {0: None}
    for digest in "uvw":
        versions[engine.store.register(digest, packed_adapter(digest, num_pages=2))] = digest
    added, added_at, steps, slowest = [], {}, 0, 0
    while steps < 600 or engine.scheduler.has_unfinished:
        if steps < 600 and rng.random() < 0.9:
            r = engine.add(
                str(len(added)),
                rng.randint(1, 6),
                rng.randint(1, 6),
                version=rng.choice(list(versions)),
                priority=rng.randint(0, 1),
                client_id=rng.choice("ab"),
            )
            added.append(r)
            added_at[r.request_id] = len(added), steps
        engine.step()
        engine.scheduler.check_invariants()
        steps += 1
        for r in [r for r in added if r.is_finished and r.request_id in added_at]:
            ahead, start = added_at.pop(r.request_id)
            # Those ahead, the five admitted for each of them, and at most 12 steps for each.
            assert steps - start <= 12 * 5 * (ahead + 3)
            slowest = max(slowest, steps - start)
    assert slowest > 100
    for r in added:
        expected = tokens_alone(r.prompt_token_ids, versions[r.adapter_version], r.max_total_tokens)
        assert r.output_token_ids == expected


# -- early abort -----------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_request_that_cannot_make_it_is_aborted(name):
    clock = Clock()
    engine = SimulatedEngine(max_num_seqs=1, policy=make_policy(name), clock=clock)
    a = engine.add("a", 2, 50, deadline=100.0)
    engine.step()
    b = engine.add("b", 2, 2, deadline=5.0)
    c = engine.add("c", 2, 2)
    clock.now = 4.9
    assert engine.step().failed == ()
    clock.now = 5.0
    output = engine.step()
    assert output.failed == (b,)
    assert (b.finish_reason, b.stop_reason) == ("abort", "deadline")
    assert isinstance(b.error, DeadlineExceededError)
    assert "'b' waited 5.00 s and would not get its first token within 5 s" in str(b.error)
    clock.now = 1000.0  # who has begun is not aborted, and who has no deadline waits
    engine.run()
    assert (a.finish_reason, c.finish_reason) == ("length", "length")
    engine.scheduler.check_invariants()


def test_abort_counts_on_the_time_that_a_first_token_takes():
    line = waiting()
    (r,) = push(line, "a", deadline=10.0)
    for _ in range(50):
        line.note_first_token(2.0)
    assert line.hopeless(7.9) == []
    assert line.hopeless(8.1, is_idle=True) == []  # else nobody would ever say that it got better
    assert line.hopeless(8.1) == [r]
    (r,) = push(line, "b", deadline=10.0)
    assert line.hopeless(10.0, is_idle=True) == [r]


def test_deadlines_of_those_who_left_are_forgotten():
    line = waiting()
    for number in range(1000):
        (r,) = push(line, str(number), deadline=1e9 - number)
        line.remove(r)
    assert len(line._deadlines) <= 70
    assert line.hopeless(2e9) == []


# -- fairness --------------------------------------------------------------------------------------


def test_fair_serves_whoever_had_least():
    line = waiting("vtc")
    push(line, "a1", num_prompt=30, client_id="a")
    push(line, "a2", num_prompt=30, client_id="a")
    push(line, "b1", num_prompt=10, client_id="b")
    push(line, "b2", num_prompt=10, client_id="b")
    push(line, "b3", num_prompt=10, client_id="b")
    push(line, "b4", num_prompt=10, client_id="b")
    assert admit_all(line) == ["a1", "b1", "b2", "b3", "a2", "b4"]


def test_tokens_are_charged_twice_a_prompts_and_once_however_often_preempted():
    line = waiting("vtc")
    (r,) = push(line, "a", num_prompt=10, client_id="a")
    line.admit(r)
    for _ in range(3):
        line.policy.sampled(r)
    r.num_preemptions = 1
    line.resume_later(r)
    line.admit(r)
    assert line.policy.counter("a") == 10 + 3 * 2


def test_a_newcomer_is_lifted_and_saves_nothing_up():
    line = waiting("vtc")
    busy = push(line, *"abcde", num_prompt=100, client_id="busy")
    for _ in range(4):
        line.admit(line.peek())
    push(line, "x", num_prompt=1, client_id="new")
    assert line.policy.counter("new") == line.policy.counter("busy") == 400
    assert line.peek() is busy[4]  # an equal counter, and it waited longer
    # With nobody waiting, a newcomer starts where the last who waited is now.
    admit_all(line)
    push(line, "y", num_prompt=1, client_id="late")
    assert line.policy.counter("late") >= 401


def test_fair_over_adapters_counts_the_base_as_one():
    line = waiting("vtc", fair_over="adapter")
    push(line, "a1", "a2", num_prompt=5, adapter_id="a")
    push(line, "base", num_prompt=5)
    assert admit_all(line) == ["a1", "base", "a2"]


def test_clients_who_are_gone_are_forgotten():
    policy = Fair(lambda r: r.client_id)
    line = WaitingRequests(policy, max_overtakes=32)
    for number in range(20_000):
        (r,) = push(line, str(number), client_id=str(number))
        line.admit(r)
        policy.left(r)
        (other,) = push(line, f"{number}'", client_id="steady")
        line.remove(other)
    assert len(policy._counters) <= 1010
    assert len(policy._heap) <= 70


def test_two_backlogged_clients_get_equal_service():
    """Twice the load from one of them: |difference| ≤ 2 · max(prompt's cost, a full batch's)."""
    rng = random.Random(0)
    seats, largest_prompt, largest_output = 4, 20, 20
    engine = SimulatedEngine(
        num_pages=200, max_num_seqs=seats, max_num_batched_tokens=32, policy=make_policy("vtc")
    )
    service = {"light": 0, "heavy": 0}
    bound = 2 * max(largest_prompt, 2 * seats * (largest_prompt + largest_output))
    added, seen, count = [], {}, 0
    for step in range(1500):
        if step % 2 == 0:
            for client in ("light", "heavy", "heavy"):
                count += 1
                added.append(
                    engine.add(
                        str(count),
                        rng.randint(1, largest_prompt),
                        rng.randint(1, largest_output),
                        client_id=client,
                    )
                )
        engine.step()
        for r in added:
            served = (r.first_scheduled_time is not None) * len(r.prompt_token_ids)
            served += 2 * len(r.output_token_ids)
            service[r.client_id] += served - seen.get(r.request_id, 0)
            seen[r.request_id] = served
        added = [r for r in added if not r.is_finished]
        assert abs(service["light"] - service["heavy"]) <= bound
    assert service["light"] > 10 * bound


# -- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheduler": "sjf"}, "scheduler='sjf' must be one of fcfs, lcfs"),
        ({"scheduler": "slo"}, "scheduler='slo' aborts by ttft_slo"),
        ({"ttft_slo": 0}, "ttft_slo=0 must be a number of seconds above 0"),
        ({"ttft_slo": True}, "ttft_slo=True"),
        ({"fair_over": "user"}, "fair_over='user' must be one of client, adapter"),
        ({"cluster_size": 0}, "cluster_size=0"),
        ({"max_overtakes": 0}, "max_overtakes=0"),
        ({"prefetch": -1}, "prefetch=-1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**options)


# -- prefetch --------------------------------------------------------------------------------------


def load(engine, name, num_pages) -> int:
    return engine.store.register(name, packed_adapter(name, num_pages=num_pages))


def test_adapters_of_those_who_are_next_come_while_pages_are_free():
    engine = SimulatedEngine(num_pages=17, max_num_seqs=1, prefetch=2)
    x, y, z = (load(engine, name, 3) for name in "xyz")
    engine.add("a", 4, 4, version=x)
    for name, version in (("b", y), ("c", z), ("d", z)):
        engine.add(name, 4, 4, version=version)
    output = engine.step()
    assert [s.version for s in output.swap_ins] == [x, y, z]
    assert engine.scheduler.prefetches == 2
    engine.run()
    assert engine.cache.swap_ins == 3
    assert engine.cache.hits == 3


def test_prefetching_takes_no_pages_from_those_who_run_or_are_next():
    # 9 pages: x has 3, a wants 3 in all; y (3) fits beside them, z (3) does not.
    engine = SimulatedEngine(num_pages=10, page_size=4, max_num_seqs=1, prefetch=3)
    x, y, z = (load(engine, name, 3) for name in "xyz")
    engine.add("a", 4, 8, version=x)
    for name, version in (("b", y), ("c", z)):
        engine.add(name, 4, 4, version=version)
    assert [s.version for s in engine.step().swap_ins] == [x, y]
    preemptions = engine.run()
    assert not any(o.preempted for o in preemptions)
    assert engine.cache.swap_ins == 3


def test_idle_adapters_that_are_needed_soon_are_evicted_last():
    engine = SimulatedEngine(num_pages=10, page_size=4, max_num_seqs=1, prefetch=2)
    x, y, z = (load(engine, name, 3) for name in "xyz")
    for name, version in (("a", x), ("b", y)):
        engine.add(name, 2, 2, version=version)
    engine.run()
    assert set(engine.cache.resident()) == {x, y}  # x was used first
    engine.add("c", 2, 6, version=z)
    engine.add("d", 2, 2, version=x)
    engine.step()
    assert set(engine.cache.resident()) == {x, z}
