"""A Hypothesis state machine over allocator, store, cache and scheduler, on a simulated device.

Adds, steps, aborts, loads, unloads, reloads under the same name, pins, unpins, breaks and changes
files under a byte budget, in any order and with pools so small that adapters are evicted and
requests preempted. After each rule all of the host half's books agree; each request that ends has
the tokens that it has alone; at the end nothing is left behind.
"""

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from slora_jax.errors import (
    AdapterInUseError,
    AdapterLoadError,
    AdapterNotFoundError,
    CapacityError,
)
from slora_jax.policies import SCHEDULERS, make_policy
from slora_jax.request import RequestStatus
from tests.engine.simulated_engine import (
    STOP_TOKEN,
    AdapterFiles,
    SimulatedEngine,
    packed_adapter,
    request,
    tokens_alone,
)

WHICH = st.integers(0, 6)
"""Picks among the loaded adapters, as many as there are."""


class HostHalf(RuleBasedStateMachine):
    requests = Bundle("requests")

    @initialize(
        num_pages=st.integers(4, 20),
        page_size=st.sampled_from([2, 1, 4]),
        max_num_seqs=st.sampled_from([4, 2, 3, 1]),
        tile=st.sampled_from([1, 2, 4]),
        num_tiles=st.integers(1, 4),
        budget_bytes=st.sampled_from([None, 0, 10, 25, 60]),
        lag=st.integers(0, 2),
        adapters=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 30)), min_size=2, max_size=5),
        scheduler=st.sampled_from(SCHEDULERS),
        prefetch=st.sampled_from([0, 3]),
    )
    def make_engine(
        self,
        num_pages,
        page_size,
        max_num_seqs,
        tile,
        num_tiles,
        budget_bytes,
        lag,
        adapters,
        scheduler,
        prefetch,
    ):
        self.now = 0.0  # counts steps
        self.is_fcfs = scheduler == "fcfs"  # and then without priorities and deadlines
        self.page_size = page_size
        self.budget = tile * num_tiles
        self.tile = tile
        self.engine = SimulatedEngine(
            num_pages=num_pages,
            page_size=page_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=self.budget,
            prefill_tile=tile,
            max_model_len=60,
            budget_bytes=budget_bytes,
            lag=lag,
            stop_token=STOP_TOKEN,
            policy=make_policy(scheduler, cluster_size=2),
            max_overtakes=3,
            prefetch=prefetch,
            clock=lambda: self.now,
        )
        self.digests = {0: None}  # of every version there ever was
        self.files = {}  # version → its files, where it has some
        self.unreadable = set()  # versions whose files were broken or changed at some time
        self.added = []
        self.first_scheduled = []
        for name, (num_pages, nbytes) in zip("uvwxy", adapters, strict=False):
            self.load(name, num_pages, nbytes, True)

    # -- adapters ------------------------------------------------------------------------------

    @rule(
        name=st.sampled_from("uvwxyz"),
        num_pages=st.integers(1, 5),
        nbytes=st.integers(1, 30),
        has_files=st.booleans(),
    )
    def load(self, name, num_pages, nbytes, has_files):
        store = self.engine.store
        packed = packed_adapter(f"{name} {len(self.digests)}", num_pages=num_pages, nbytes=nbytes)
        files = AdapterFiles(packed)
        taken, before = name in store.names(), list(store.names())
        try:
            version = store.register(name, packed, reload=files.read if has_files else None)
        except AdapterInUseError:
            assert taken
        except CapacityError:
            assert not has_files
            assert list(store.names()) == before
        else:
            assert not taken
            assert version > max(self.digests)
            self.digests[version] = packed.digest
            if has_files:
                self.files[version] = files

    def loaded(self, which):
        names = list(self.engine.store.names())
        return names[which % len(names)]

    @precondition(lambda self: self.engine.store.names())
    @rule(which=WHICH)
    def unload(self, which):
        name = self.loaded(which)
        self.engine.store.unregister(name)
        with pytest.raises(AdapterNotFoundError):
            self.engine.store.resolve(name)

    @precondition(lambda self: self.engine.store.names())
    @rule(which=WHICH, num_pages=st.integers(1, 5))
    def reload_under_the_same_name(self, which, num_pages):
        name = self.loaded(which)
        old = self.engine.store.resolve(name)
        self.engine.store.unregister(name)
        self.load(name, num_pages, 5, True)
        assert self.engine.store.resolve(name) > old

    @precondition(lambda self: self.engine.store.names())
    @rule(which=WHICH)
    def pin(self, which):
        version = self.engine.store.resolve(self.loaded(which))
        before = self.engine.cache.resident()
        try:
            self.engine.scheduler.pin_adapter(version)
        except CapacityError:
            assert not self.engine.cache.is_pinned(version)
            assert self.engine.cache.resident() == before
        except AdapterLoadError:
            assert version in self.unreadable
            assert self.engine.cache.resident() == before
        else:
            assert version in self.engine.cache.resident()

    @precondition(lambda self: self.engine.cache.num_pinned)
    @rule(which=WHICH)
    def unpin(self, which):
        self.engine.scheduler.unpin_adapter(self.engine.store.resolve(self.loaded(which)))

    @precondition(lambda self: self.engine.store.names())
    @rule(which=WHICH, change=st.sampled_from(["break", "mend", "digest", "num_pages"]))
    def meddle_with_files(self, which, change):
        version = self.engine.store.resolve(self.loaded(which))
        if version in self.files:
            files = self.files[version]
            self.unreadable.add(version)
            if change in ("break", "mend"):
                files.is_broken = change == "break"
            elif change == "digest":
                files.change(digest=f"{files.packed.digest}'")
            else:
                files.change(num_pages=files.packed.num_pages % 5 + 1)

    # -- requests ------------------------------------------------------------------------------

    @rule(
        target=requests,
        shapes=st.lists(
            st.tuples(
                st.integers(1, 12),
                st.integers(1, 16),
                st.integers(-2, 6),
                st.integers(0, 1),
                st.sampled_from("ab"),
                st.one_of(st.none(), st.integers(1, 30)),
            ),
            min_size=1,
            max_size=5,
        ),
    )
    def add(self, shapes):
        return multiple(*filter(None, [self._add(*shape) for shape in shapes]))

    def _add(self, num_prompt, max_new, which, priority, client_id, slo):
        engine = self.engine
        version = 0
        if which >= 0 and engine.store.names():
            version = engine.store.resolve(self.loaded(which))
        made = request(str(len(self.added)), num_prompt, max_new, version=version)
        if not self.is_fcfs:
            made.priority, made.client_id = priority, client_id
            made.deadline = None if slo is None else self.now + slo
        needed = -(-(num_prompt + max_new - 1) // self.page_size) + engine.cache.pinned_pages
        if not engine.cache.is_pinned(version):
            needed += engine.store.num_pages(version)
        try:
            engine.scheduler.add(made)
        except CapacityError:
            assert needed > engine.allocator.num_usable
            return None
        assert needed <= engine.allocator.num_usable
        self.added.append(made)
        return made

    @rule(made=consumes(requests))
    def abort(self, made):
        was_finished = made.is_finished
        aborted = self.engine.scheduler.abort(made.request_id)
        assert (aborted is None) == was_finished

    @precondition(lambda self: self.engine.scheduler.has_unfinished)
    @rule(num_steps=st.integers(1, 20))
    def step(self, num_steps):
        for _ in range(num_steps):
            self._step()

    def _step(self):
        unfinished = [r for r in self.added if not r.is_finished]
        ready = [
            r
            for r in unfinished
            if r.status is RequestStatus.RUNNING
            and r.num_tokens_with_in_flight - r.num_computed_tokens == 1
            and r.num_tokens_with_in_flight < r.max_total_tokens
        ]
        self.now += 1.0
        output = self.engine.step()
        served = [c.request for c in (*output.decode, *output.prefill)]
        assert len(served) == len(set(served))
        assert not set(served) & {*output.preempted, *output.failed}
        # A decode waits for no prefill.
        assert {*ready} <= {*(c.request for c in output.decode), *output.preempted}
        assert all(c.num_tokens == 1 for c in output.decode)
        assert all(c.num_tokens > 1 for c in output.prefill)
        padded = sum(-(-c.num_tokens // self.tile) * self.tile for c in output.prefill)
        assert padded <= self.budget
        for r in output.failed:
            if r.finish_reason == "error":
                assert r.adapter_version in self.unreadable
            else:
                assert (r.finish_reason, r.stop_reason) == ("abort", "deadline")
                assert r.first_scheduled_time is None
        if not self.is_fcfs:
            return
        # Who came first is served first.
        seen = set(self.first_scheduled)
        self.first_scheduled += [r for r in self.added if r in served and r not in seen]
        assert self.first_scheduled == sorted(self.first_scheduled, key=self.added.index)
        # And who is preempted loses no place.
        scheduler = self.engine.scheduler
        waiting = scheduler._waiting.upcoming(len(self.added))
        order = [*scheduler._running, *(r.request_id for r in waiting)]
        assert order == [r.request_id for r in self.added if not r.is_finished]

    # -- what always holds ---------------------------------------------------------------------

    @invariant()
    def books_agree(self):
        self.engine.scheduler.check_invariants()

    @invariant()
    def requests_have_the_tokens_they_have_alone(self):
        for r in self.added:
            expected = tokens_alone(
                r.prompt_token_ids,
                self.digests[r.adapter_version],
                r.max_total_tokens,
                STOP_TOKEN,
            )
            assert r.output_token_ids == expected[: len(r.output_token_ids)]
            if r.finish_reason in ("stop", "length"):
                assert r.output_token_ids == expected
                assert (r.finish_reason == "stop") == (expected[-1] == STOP_TOKEN)
            elif r.finish_reason == "error":
                assert isinstance(r.error, AdapterLoadError)
                assert r.adapter_version in self.unreadable

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        engine = self.engine
        engine.run(max_steps=4 * sum(r.max_total_tokens + 1 for r in self.added) + 1)
        self.books_agree()
        self.requests_have_the_tokens_they_have_alone()
        assert all(r.is_finished for r in self.added)
        engine.store.check({})  # no holds
        assert engine.allocator.counts().keys() <= {"adapter"}
        for name in list(engine.store.names()):
            engine.store.unregister(name)
        assert engine.allocator.num_free == engine.allocator.num_usable
        assert engine.cache.resident() == {}
        assert engine.store.host_bytes == 0


# An example takes some milliseconds, so the quick profile's few are not enough.
HostHalf.TestCase.settings = settings(
    max_examples=max(300, settings().max_examples), stateful_step_count=40
)
TestHostHalf = HostHalf.TestCase
