"""The pool's arrays and the copy of adapters into them, from plain and from pinned memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slora_jax.page_pool import (
    RUN_AXES,
    SWAP_IN_PAGES,
    HostMemory,
    _write_pages,
    allocate_pool,
    swap_in,
)
from slora_jax.sharding import model_mesh, named_sharding

DEVICE = jax.devices()[0]
PINNED = jax.sharding.SingleDeviceSharding(DEVICE, memory_kind="pinned_host")
LAYERS, PAGES, ROWS = 3, 40, 32


@pytest.mark.parametrize("pinned", [None, PINNED], ids=["plain", "pinned"])
@pytest.mark.parametrize("num_pages", [1, 2, 7, 8, 21])
def test_an_adapter_lands_in_its_pages_and_nowhere_else(num_pages, pinned):
    rng = np.random.default_rng(num_pages)
    pages = rng.standard_normal((LAYERS, num_pages, ROWS, 128)).astype(np.float32)
    runs = HostMemory(pinned).place(pages)
    assert sum(run.shape[1] for run in runs) == num_pages
    assert all(run.shape[1] in SWAP_IN_PAGES for run in runs)
    assert len(runs) == bin(num_pages % 8).count("1") + num_pages // 8
    sharding = jax.sharding.SingleDeviceSharding(DEVICE)
    pool = allocate_pool(LAYERS, (PAGES, ROWS, 128), jnp.float32, sharding)
    ids = rng.permutation(np.arange(1, PAGES))[:num_pages].tolist()
    before = pool
    pool = swap_in(pool, ids, runs)
    assert all(layer.is_deleted() for layer in before)
    expected = np.zeros((LAYERS, PAGES, ROWS, 128), np.float32)
    expected[:, ids] = pages
    np.testing.assert_array_equal(np.stack([np.asarray(layer) for layer in pool]), expected)
    assert all(layer.sharding.memory_kind == "device" for layer in pool)


@pytest.mark.parametrize("kind", [None, "pinned_host"])
def test_each_device_gets_its_own_rows(kind):
    mesh = model_mesh(jax.devices()[:4])
    pinned = kind and named_sharding(mesh, RUN_AXES, memory_kind=kind)
    pages = np.random.default_rng(0).standard_normal((LAYERS, 3, 4 * ROWS, 128), np.float32)
    runs = HostMemory(pinned, (0, 1, 2, 3)).place(pages)
    sharding = named_sharding(mesh, ("pages", "page_rows", "lanes"))
    pool = allocate_pool(LAYERS, (PAGES, 4 * ROWS, 128), jnp.float32, sharding)
    copied = jax.device_put(runs[0], named_sharding(mesh, RUN_AXES))
    program = _write_pages.lower(pool, np.array([5, 7], np.int32), copied).compile()
    assert "all-" not in program.as_text()  # nothing is sent from one to another
    pool = swap_in(pool, [5, 7, 2], runs)
    for layer, expected in zip(pool, pages, strict=True):
        assert layer.sharding.is_equivalent_to(sharding, 3)
        for shard in layer.addressable_shards:
            assert shard.data.shape == (PAGES, ROWS, 128)
            rows = shard.index[1]
            np.testing.assert_array_equal(shard.data[np.array([5, 7, 2])], expected[:, rows])


def test_a_cpu_keeps_plain_arrays():
    assert HostMemory.of(model_mesh([DEVICE])).pinned is None
