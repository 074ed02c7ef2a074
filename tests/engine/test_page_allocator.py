import random

import pytest

from slora_jax.page_allocator import NULL_PAGE, PageAllocator

ANNE, BOB, ADAPTER = ("kv", "anne"), ("kv", "bob"), ("adapter", 1)


def test_all_or_nothing():
    allocator = PageAllocator(6)
    assert allocator.allocate(3, ANNE) == [1, 2, 3]
    assert allocator.allocate(3, BOB) is None
    assert allocator.num_free == 2
    assert allocator.allocate(0, BOB) == []
    assert allocator.allocate(2, BOB) == [4, 5]
    assert allocator.allocate(1, ANNE) is None


def test_free_pages_are_given_out_again():
    allocator = PageAllocator(5)
    pages = allocator.allocate(4, ANNE)
    allocator.free(pages[1:3], ANNE)
    assert allocator.pages_of(ANNE) == [1, 4]
    assert sorted(allocator.allocate(2, BOB)) == [2, 3]


def test_reports():
    allocator = PageAllocator(10)
    allocator.allocate(2, ANNE)
    allocator.allocate(1, BOB)
    allocator.allocate(4, ADAPTER)
    assert allocator.num_usable == 9
    assert allocator.counts() == {"kv": 3, "adapter": 4}
    assert allocator.owners() == {ANNE: [1, 2], BOB: [3], ADAPTER: [4, 5, 6, 7]}
    allocator.free([4, 5, 6, 7], ADAPTER)
    assert allocator.counts() == {"kv": 3}


def test_a_pool_of_the_null_page_alone():
    allocator = PageAllocator(1)
    assert allocator.num_usable == allocator.num_free == 0
    assert allocator.allocate(1, ANNE) is None
    allocator.check()


@pytest.mark.parametrize(
    ("pages", "owner"), [([3], BOB), ([4], ANNE), ([1, 1], ANNE), ([NULL_PAGE], ANNE)]
)
def test_only_the_owner_frees_and_only_once(pages, owner):
    allocator = PageAllocator(6)
    allocator.allocate(3, ANNE)
    with pytest.raises(AssertionError):
        allocator.free(pages, owner)


def test_random_use_keeps_the_invariant():
    rng = random.Random(0)
    allocator = PageAllocator(40)
    owned = {("kv", i): [] for i in range(6)}
    for _ in range(2000):
        owner = rng.choice(list(owned))
        if rng.random() < 0.5:
            n, free = rng.randrange(10), allocator.num_free
            pages = allocator.allocate(n, owner)
            assert (pages is None) == (n > free)
            owned[owner] += pages or []
        else:
            rng.shuffle(owned[owner])
            keep = rng.randint(0, len(owned[owner]))
            allocator.free(owned[owner][keep:], owner)
            del owned[owner][keep:]
        allocator.check()
        assert allocator.owners() == {o: sorted(p) for o, p in owned.items() if p}
        assert NULL_PAGE not in allocator.pages_of(owner)
