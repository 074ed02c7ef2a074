from collections import Counter

import pytest

from slora_jax.adapter_cache import AdapterCache
from slora_jax.adapter_store import BASE_VERSION, AdapterStore
from slora_jax.errors import AdapterLoadError, CapacityError
from slora_jax.page_allocator import PageAllocator
from tests.engine.simulated_engine import AdapterFiles, packed_adapter

KV = ("kv", "request")


class Pool:
    """A cache over a pool of ``usable`` pages, and adapters a, b, c, … of the given pages."""

    def __init__(self, usable, **num_pages):
        self.allocator = PageAllocator(usable + 1)
        self.store = AdapterStore()
        self.cache = AdapterCache(self.allocator, self.store)
        self.versions = {
            name: self.store.register(name, packed_adapter(name, num_pages=n, nbytes=100 * n))
            for name, n in num_pages.items()
        }
        self._used = Counter()

    def acquire(self, name):
        pages = self.cache.acquire(self.versions[name])
        self._used[self.versions[name]] += pages is not None
        self.check()
        return pages

    def release(self, name):
        self.cache.release(self.versions[name])
        self._used[self.versions[name]] -= 1
        self.check()

    def pin(self, name):
        self.cache.pin(self.versions[name])
        self.check()

    def unpin(self, name):
        self.cache.unpin(self.versions[name])
        self.check()

    def check(self):
        self.allocator.check()
        self.cache.check(self._used)

    def resident(self) -> str:
        names = {version: name for name, version in self.versions.items()}
        return " ".join(sorted(names[version] for version in self.cache.resident()))


def test_swap_in_once_then_hits():
    pool = Pool(10, a=3)
    pages = pool.acquire("a")
    assert pages == (1, 2, 3)
    (swap_in,) = pool.cache.take_swap_ins()
    assert (swap_in.version, swap_in.pages) == (pool.versions["a"], pages)
    assert swap_in.packed is pool.store.fetch(pool.versions["a"])
    assert pool.acquire("a") == pages
    pool.release("a")
    pool.release("a")
    assert pool.acquire("a") == pages
    assert pool.cache.take_swap_ins() == ()
    assert (pool.cache.swap_ins, pool.cache.swap_in_bytes, pool.cache.hits) == (1, 300, 2)
    assert pool.cache.resident() == {pool.versions["a"]: pages}
    assert pool.allocator.pages_of(("adapter", pool.versions["a"])) == [1, 2, 3]


def test_the_base_takes_nothing():
    pool = Pool(0)
    assert pool.cache.acquire(BASE_VERSION) == ()
    assert pool.cache.num_available(BASE_VERSION) == 0
    pool.cache.release(BASE_VERSION)
    assert pool.cache.resident() == {}
    assert pool.cache.take_swap_ins() == ()


def test_the_least_recently_used_idle_adapter_leaves():
    pool = Pool(6, a=2, b=2, c=2, d=2)
    for name in "abc":
        pool.acquire(name)
    for name in "bca":
        pool.release(name)
    pool.acquire("b")  # in use again, so c is the oldest idle one
    assert pool.acquire("d") is not None
    assert pool.resident() == "a b d"
    assert pool.cache.evictions == 1


def test_evicts_only_as_many_as_needed_and_none_in_vain():
    pool = Pool(7, a=2, b=2, c=2, d=4, e=8)
    for name in "abc":
        pool.acquire(name)
    for name in "abc":
        pool.release(name)
    assert pool.acquire("e") is None
    assert pool.resident() == "a b c"
    assert pool.acquire("d") is not None  # 1 is free, so two have to go
    assert pool.resident() == "c d"
    pool.acquire("c")
    assert pool.acquire("a") is None
    assert pool.resident() == "c d"


def test_evictions_are_reported_but_for_swap_ins_that_never_happened():
    pool = Pool(4, a=2, b=4)
    pool.acquire("a")
    pool.release("a")
    assert pool.cache.evict_idle(4)
    assert (pool.cache.take_swap_ins(), pool.cache.take_evicted()) == ((), ())
    pool.acquire("a")
    pool.cache.take_swap_ins()
    pool.release("a")
    assert pool.cache.evict_idle(4)
    pool.acquire("a")
    assert pool.cache.take_evicted() == (pool.versions["a"],)
    assert [swap_in.version for swap_in in pool.cache.take_swap_ins()] == [pool.versions["a"]]
    assert pool.cache.take_evicted() == ()


def test_kv_takes_the_pages_of_idle_adapters():
    pool = Pool(6, a=2, b=2)
    for name in "ab":
        pool.acquire(name)
    assert not pool.cache.evict_idle(3)
    pool.release("a")
    assert pool.cache.evict_idle(2)
    assert pool.resident() == "a b"
    assert not pool.cache.evict_idle(5)
    assert pool.resident() == "a b"
    assert pool.cache.evict_idle(4)
    assert pool.resident() == "b"
    assert pool.allocator.allocate(4, KV) is not None


def test_num_available():
    pool = Pool(10, a=3, b=4)
    a, b = pool.versions["a"], pool.versions["b"]
    assert pool.cache.num_available(a) == 7  # absent
    pool.acquire("a")
    assert pool.cache.num_available(a) == 7  # in use
    assert pool.cache.num_available(b) == 3
    pool.release("a")
    assert pool.cache.num_available(a) == 7  # idle
    assert pool.cache.num_available(b) == 6  # a would leave for it
    pool.pin("a")
    assert pool.cache.num_available(a) == 7  # pinned
    pool.allocator.allocate(5, KV)
    assert pool.cache.num_available(b) == -2


def test_pinned_adapters_stay():
    pool = Pool(6, a=2, b=4)
    pool.pin("a")
    pool.pin("a")
    assert [swap_in.version for swap_in in pool.cache.take_swap_ins()] == [pool.versions["a"]]
    assert (pool.cache.pinned_pages, pool.cache.num_pinned) == (2, 1)
    pool.acquire("a")
    pool.release("a")
    assert not pool.cache.evict_idle(5)
    pool.acquire("b")
    pool.release("b")
    assert pool.cache.evict_idle(4)
    assert pool.resident() == "a"
    pool.unpin("a")
    pool.unpin("a")
    assert pool.cache.pinned_pages == 0
    assert pool.cache.evict_idle(6)
    assert pool.resident() == ""


def test_a_pin_taken_and_given_up_while_in_use():
    pool = Pool(4, a=2)
    pool.acquire("a")
    pool.pin("a")
    pool.unpin("a")
    assert not pool.cache.evict_idle(3)
    pool.release("a")
    assert pool.cache.evict_idle(4)


def test_a_pin_that_finds_no_room_says_so_and_changes_nothing():
    pool = Pool(6, a=3, b=2, c=2)
    pool.pin("b")
    pool.allocator.allocate(2, KV)
    pool.acquire("c")
    pool.release("c")
    message = r"'a' takes 3 pages, and only 2 of 6 can be freed now \(2 are pinned"
    with pytest.raises(CapacityError, match=message):
        pool.pin("a")
    assert pool.resident() == "b c"
    assert pool.cache.pinned_pages == 2


@pytest.mark.parametrize("operation", ["acquire", "pin"])
def test_an_adapter_that_cannot_be_read_leaves_everything_as_it_was(operation):
    pool = Pool(4, a=3)
    files = AdapterFiles(packed_adapter("file", num_pages=2, nbytes=10))
    pool.store = store = AdapterStore(0)
    pool.cache = cache = AdapterCache(pool.allocator, store)
    a = store.register("a", packed_adapter(num_pages=3, nbytes=0))
    version = store.register("file", files.packed, reload=files.read)
    cache.acquire(a)
    cache.release(a)
    files.is_broken = True
    with pytest.raises(AdapterLoadError):
        getattr(cache, operation)(version)
    assert list(cache.resident()) == [a]
    assert cache.evictions == 0
    files.is_broken = False
    getattr(cache, operation)(version)
    assert list(cache.resident()) == [version]


def test_a_dropped_version_frees_its_pages_at_once():
    pool = Pool(6, a=2, b=2)
    for name in "ab":
        pool.acquire(name)
    pool.cache.take_swap_ins()
    pool.release("a")
    pool.store.unregister("a")
    assert pool.resident() == "b"
    assert pool.allocator.num_free == 4
    assert pool.cache.take_evicted() == (pool.versions["a"],)
    assert pool.cache.evictions == 0
    pool.check()


@pytest.mark.parametrize("is_held", [False, True])
def test_a_pin_ends_when_the_adapter_is_unregistered(is_held):
    pool = Pool(6, a=2)
    pool.pin("a")
    if is_held:
        pool.store.hold(pool.versions["a"])
    pool.store.unregister("a")
    assert pool.cache.pinned_pages == 0
    if is_held:
        assert pool.resident() == "a"
        pool.store.release(pool.versions["a"])
    assert pool.allocator.num_free == 6
    assert pool.cache.take_swap_ins() == ()
    pool.check()


def test_an_unregistered_adapter_stays_while_someone_waits_for_it():
    pool = Pool(6, a=2)
    version = pool.versions["a"]
    pool.store.hold(version)
    pool.acquire("a")
    pool.store.unregister("a")
    pool.release("a")  # preempted
    assert pool.resident() == "a"
    assert pool.acquire("a") is not None
    pool.release("a")
    pool.store.release(version)
    assert pool.resident() == ""
    pool.check()
