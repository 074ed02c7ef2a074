import pytest

from slora_jax.adapter_store import BASE_VERSION, AdapterStore
from slora_jax.errors import (
    AdapterInUseError,
    AdapterLoadError,
    AdapterNotFoundError,
    CapacityError,
)
from tests.engine.simulated_engine import AdapterFiles, packed_adapter


def register_files(store, name, **fields):
    files = AdapterFiles(packed_adapter(name, **fields))
    return files, store.register(name, files.packed, reload=files.read)


def in_memory(store) -> list[str]:
    return [n for n in store.names() if store.info(store.resolve(n)).in_host_memory]


def test_names_and_versions():
    store = AdapterStore()
    packed = packed_adapter(num_pages=3, nbytes=7, ranks=(4, 0, 4, 0, 0, 0, 0))
    version = store.register("pirate", packed)
    assert store.resolve("pirate") == version
    assert list(store.names()) == ["pirate"]
    info = store.info(version)
    assert (info.name, info.version, info.ranks) == ("pirate", version, packed.ranks)
    assert (info.num_pages, info.nbytes) == (store.num_pages(version), 7) == (3, 7)
    assert info.in_host_memory
    assert not info.has_file
    assert store.fetch(version) is packed
    assert store.host_bytes == 7
    store.check({})


def test_a_taken_name_is_refused():
    store = AdapterStore()
    version = store.register("pirate", packed_adapter())
    with pytest.raises(AdapterInUseError, match=r"'pirate' is already loaded: unload it first"):
        store.register("pirate", packed_adapter())
    assert store.resolve("pirate") == version


def test_an_unknown_name_is_told_what_exists():
    store = AdapterStore()
    with pytest.raises(AdapterNotFoundError, match="none is loaded"):
        store.resolve("pirate")
    for name in ("pirates", "poet", "lawyer", "clerk"):
        store.register(name, packed_adapter())
    with pytest.raises(AdapterNotFoundError, match=r"close names among the 4 loaded: 'pirates'$"):
        store.resolve("pirate")
    with pytest.raises(AdapterNotFoundError, match=r"some names .* 'pirates', 'poet', 'lawyer'$"):
        store.unregister("xyz")


def test_a_version_lives_until_its_last_hold():
    store = AdapterStore()
    dropped = []
    store.on_drop = dropped.append
    old = store.register("pirate", packed_adapter("old"))
    store.hold(old)
    store.hold(old)
    assert store.unregister("pirate") == old
    with pytest.raises(AdapterNotFoundError):
        store.resolve("pirate")
    new = store.register("pirate", packed_adapter("new"))
    assert new > old
    assert store.fetch(old).digest == "old"
    store.check({old: 2})
    store.release(old)
    assert dropped == []
    store.release(old)
    assert dropped == [old]
    assert store.host_bytes == 10
    with pytest.raises(KeyError):
        store.info(old)
    store.unregister("pirate")
    assert dropped == [old, new]
    assert store.host_bytes == 0
    assert store.register("pirate", packed_adapter("new")) > new


def test_the_base_is_there_and_takes_nothing():
    store = AdapterStore()
    store.hold(BASE_VERSION)
    store.release(BASE_VERSION)
    assert store.num_pages(BASE_VERSION) == 0
    assert list(store.names()) == []


def test_a_release_needs_a_hold():
    store = AdapterStore()
    version = store.register("a", packed_adapter())
    with pytest.raises(AssertionError, match="not held"):
        store.release(version)


def test_least_recently_used_buffers_leave_and_come_back():
    store = AdapterStore(30)
    _, a = register_files(store, "a")
    register_files(store, "b")
    register_files(store, "c")
    assert store.fetch(a).digest == "a"  # so that b is the oldest
    register_files(store, "d")
    assert in_memory(store) == ["a", "c", "d"]
    assert store.disk_reloads == 0
    assert store.fetch(store.resolve("b")).digest == "b"
    assert in_memory(store) == ["a", "b", "d"]
    assert (store.disk_reloads, store.host_bytes) == (1, 30)
    store.check({})


def test_buffers_without_files_never_leave():
    store = AdapterStore(30)
    store.register("array", packed_adapter(nbytes=15))
    register_files(store, "a")
    register_files(store, "b")
    assert in_memory(store) == ["array", "b"]
    store.register("array 2", packed_adapter(nbytes=15))
    assert in_memory(store) == ["array", "array 2"]
    with pytest.raises(CapacityError, match=r"'array 3' needs 1 bytes .*=30, .* take 30 already"):
        store.register("array 3", packed_adapter(nbytes=1))
    assert list(store.names()) == ["array", "a", "b", "array 2"]
    store.unregister("array")
    store.register("array 3", packed_adapter(nbytes=1))
    store.check({})


def test_an_adapter_larger_than_the_budget_is_read_each_time():
    store = AdapterStore(15)
    _, small = register_files(store, "small")
    _, large = register_files(store, "large", nbytes=16)
    assert in_memory(store) == ["small"]
    for reloads in (1, 2):
        assert store.fetch(large).digest == "large"
        assert store.disk_reloads == reloads
    assert in_memory(store) == ["small"]
    assert store.fetch(small).digest == "small"
    store.check({})


def test_a_budget_of_zero_keeps_nothing():
    store = AdapterStore(0)
    _, version = register_files(store, "a")
    assert store.fetch(version).digest == "a"
    assert store.host_bytes == 0


@pytest.mark.parametrize(
    "change", [{"digest": "x"}, {"num_pages": 2}, {"nbytes": 11}, {"ranks": (16,) * 7}]
)
def test_files_that_changed_are_refused(change):
    store = AdapterStore(10)
    files, version = register_files(store, "a")
    register_files(store, "b")
    original = files.packed
    files.change(**change)
    with pytest.raises(AdapterLoadError, match="'a': the files changed since they were loaded"):
        store.fetch(version)
    assert in_memory(store) == ["b"]
    files.packed = original
    assert store.fetch(version) is original
    assert store.disk_reloads == 1


def test_files_that_cannot_be_read_are_an_error_of_that_adapter():
    store = AdapterStore(10)
    files, version = register_files(store, "a")
    register_files(store, "b")
    files.is_broken = True
    with pytest.raises(AdapterLoadError, match=r"'a' .* read from its files again: the disk") as e:
        store.fetch(version)
    assert isinstance(e.value.__cause__, OSError)
    assert in_memory(store) == ["b"]
    store.check({})


def test_a_held_version_can_be_dropped_from_memory_and_read_again():
    store = AdapterStore(10)
    _, a = register_files(store, "a")
    store.hold(a)
    store.unregister("a")
    register_files(store, "b")
    assert not store.info(a).in_host_memory
    assert store.fetch(a).digest == "a"
    store.release(a)
    assert store.host_bytes == 0
    store.check({})
