"""Many host arrays as one buffer, and back inside a compiled program."""

import dataclasses

import jax
import numpy as np

from slora_jax.transfer import ALIGNMENT, pack, unpack


def test_a_tree_comes_back_bit_for_bit():
    rng = np.random.default_rng(0)
    tree = {
        "ids": rng.integers(-5, 5, 7).astype(np.int32),
        "empty": np.zeros((0, 3), np.int32),
        "scaling": rng.standard_normal((2, 3, 4)).astype(np.float32),
        "seed": rng.integers(0, 2**32, (5, 2), dtype=np.uint32),
        "absent": None,
    }
    tree["scaling"][0, 0, 0] = np.nan
    packed = pack(tree)
    assert packed.words.size % ALIGNMENT == 0
    back = jax.jit(unpack)(packed)
    assert back["absent"] is None
    for name in ("ids", "empty", "scaling", "seed"):
        assert back[name].dtype == tree[name].dtype
        np.testing.assert_array_equal(np.asarray(back[name]), tree[name])


def test_equal_shapes_share_a_program():
    program = jax.jit(lambda packed: unpack(packed)["x"] + 1)
    for value in (1, 2):
        program(pack({"x": np.full((2, 2), value, np.int32)}))
    assert program._cache_size() == 1
    program(pack({"x": np.zeros(4, np.int32)}))
    assert program._cache_size() == 2


def test_leaves_start_where_kernels_can_read_them():
    packed = pack([np.full(n, n, np.int32) for n in (1, 65, 3)])
    assert [int(np.flatnonzero(packed.words == n)[0]) for n in (1, 65, 3)] == [0, 64, 192]


def test_packing_copies():
    array = np.zeros(3, np.int32)
    packed = pack({"x": array})
    array[:] = 9
    assert not packed.words.any()
    assert dataclasses.is_dataclass(packed)
