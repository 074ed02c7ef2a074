"""The device buffer that KV cache and adapters share, and the copy that brings an adapter in.

Owns what adapters' pages look like in CPU memory, and one array ``[pages, rows, 128]`` per layer on
the device. The latter is preallocated once, donated through every step and every swap-in, so that
device memory neither grows nor fragments. It refuses to know who owns which page: that is the page
allocator's.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from slora_jax.errors import CapacityError
from slora_jax.sharding import named_sharding

Pool = tuple[jax.Array, ...]

HostPages = tuple[np.ndarray | jax.Array, ...]
"""An adapter in CPU memory: runs of its pages, each [layers, n, rows, 128] with n of
SWAP_IN_PAGES. Rows are those of all devices side by side; in plain memory, of this process's."""

RUN_AXES = ("layers", "pages", "page_rows", "lanes")
"""Logical axes of a run: each device has its own rows."""

SWAP_IN_PAGES = (8, 4, 2, 1)
"""Pages of one copy, the largest that fits first: few compiled programs, and no padding."""


def run_lengths(num_pages: int) -> list[int]:
    """How an adapter of ``num_pages`` pages is cut into runs."""
    lengths = []
    while num_pages:
        lengths.append(next(size for size in SWAP_IN_PAGES if size <= num_pages))
        num_pages -= lengths[-1]
    return lengths


@dataclasses.dataclass(frozen=True)
class HostMemory:
    """Where adapters wait for their turn: pinned memory where copies to the device come out of it.

    From pinned memory a copy runs beside the device's work and the host does not wait; out of
    plain memory the host itself copies first.
    """

    pinned: jax.sharding.Sharding | None
    """Where ``place`` puts runs of pages; None leaves them as NumPy arrays."""

    shards: tuple[int, ...] = (0,)
    """Which of the devices, along the model axis, are this process's: it keeps their parts."""

    @classmethod
    def of(cls, mesh: jax.sharding.Mesh) -> HostMemory:
        """What suits the devices: pinned memory, but for CPUs, whose memory is the device's."""
        device = mesh.local_devices[0]
        shards = tuple(
            index
            for index, other in enumerate(mesh.devices.flat)
            if other.process_index == device.process_index
        )
        kinds = {memory.kind for memory in device.addressable_memories()}
        if device.platform == "cpu" or "pinned_host" not in kinds:
            return cls(None, shards)
        return cls(named_sharding(mesh, RUN_AXES, memory_kind="pinned_host"), shards)

    def place(self, pages: np.ndarray) -> HostPages:
        """``pages`` [layers, n, rows of this process's devices, 128] as runs, each contiguous and
        ready to be copied.

        Raises CapacityError where no more memory can be pinned.
        """
        runs: list[np.ndarray | jax.Array] = []
        start = 0
        for count in run_lengths(pages.shape[1]):
            runs.append(self.place_run(np.ascontiguousarray(pages[:, start : start + count])))
            start += count
        return tuple(runs)

    def place_run(self, run: np.ndarray) -> np.ndarray | jax.Array:
        """A contiguous run of pages; the array itself where memory is not pinned."""
        if self.pinned is None:
            return run
        try:
            return _put(run, self.pinned)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise CapacityError(
                "the CPU memory that a GPU copies adapters from is used up: XLA pins up to 64 GB, "
                "or what the environment variable XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB says when the "
                "process starts. Set host_adapter_bytes below that, so that adapters with files "
                f"leave CPU memory, unload some, or raise the limit ({error})"
            ) from error


def _of_runs(spec: jax.sharding.PartitionSpec) -> jax.sharding.PartitionSpec:
    """How runs are cut where a layer of the pool is cut by ``spec``."""
    return jax.sharding.PartitionSpec(None, *spec)


def _put(run: np.ndarray | jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
    """A run in ``sharding``; of a NumPy array each device gets its own rows only."""
    if sharding.is_fully_addressable or isinstance(run, jax.Array):
        return jax.device_put(run, sharding)
    return jax.make_array_from_process_local_data(sharding, run)


def allocate_pool(
    num_layers: int, shape: tuple[int, int, int], dtype: jnp.dtype, sharding: jax.sharding.Sharding
) -> Pool:
    """One zeroed array of ``shape`` [pages, rows, 128] per layer."""
    make = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)
    return tuple(make() for _ in range(num_layers))


@functools.partial(jax.jit, donate_argnums=0)
def _write_pages(pool: Pool, page_ids: jax.Array, pages: jax.Array) -> Pool:
    """``pages`` [layers, n, rows, 128] into pages ``page_ids`` i32[n] of each layer, in place."""

    def write_layer(layer_pool: jax.Array, layer_pages: jax.Array) -> jax.Array:
        for index in range(layer_pages.shape[0]):
            layer_pool = jax.lax.dynamic_update_slice(
                layer_pool, layer_pages[index : index + 1], (page_ids[index], 0, 0)
            )
        return layer_pool

    return tuple(write_layer(layer_pool, pages[i]) for i, layer_pool in enumerate(pool))


def swap_in(pool: Pool, page_ids: Sequence[int], pages: HostPages) -> Pool:
    """Copy an adapter's runs of pages to pool pages ``page_ids``, one id a page.

    ``pool`` is donated. The copies are queued: a step launched later sees them.
    """
    start = 0
    sharding = pool[0].sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        sharding = jax.sharding.NamedSharding(sharding.mesh, _of_runs(sharding.spec))
    for run in pages:
        count = run.shape[1]
        ids = np.asarray(page_ids[start : start + count], np.int32)
        pool = _write_pages(pool, ids, _put(run, sharding))
        start += count
    assert start == len(page_ids)
    return pool
