"""Logical axis → mesh axis: one table, read by everything that places an array.

Layers name what an axis *is*; this module alone says where it goes. It also owns the collectives
that layers use (``Shards``) and the wrapping of what each device runs on its own part. It refuses
to know layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MODEL_AXIS = "model"
"""The mesh axis that tensor parallelism cuts a model over."""

DATA_AXIS = "data"
"""The mesh axis that copies of a model are spread over (``data_parallel``)."""

MESH_AXES: dict[str, str | None] = {
    "embed": None,  # the residual stream is replicated
    "vocab": MODEL_AXIS,  # embedding rows and lm_head outputs
    "heads": MODEL_AXIS,  # outputs of q, k, v; inputs of o
    "mlp": MODEL_AXIS,  # outputs of gate, up; inputs of down
    "norm": None,
    "layers": None,
    "pages": None,  # a page id means the same page on every device
    "page_rows": MODEL_AXIS,  # each device's rows hold its own KV heads and adapter slices
    "lanes": None,
}


@dataclasses.dataclass(frozen=True)
class Shards:
    """The devices of the model axis, as code that each of them runs on its own part sees them.

    With ``count`` 1 nothing is communicated and no mesh is needed.
    """

    count: int = 1

    def index(self) -> jax.Array | int:
        """i32[]: which of them this is."""
        return 0 if self.count == 1 else jax.lax.axis_index(MODEL_AXIS)

    def sum(self, x: jax.Array) -> jax.Array:
        """All devices' ``x`` added up, on each (all-reduce)."""
        return x if self.count == 1 else jax.lax.psum(x, MODEL_AXIS)

    def max(self, x: jax.Array) -> jax.Array:
        """The largest of all devices' ``x``, on each (all-reduce)."""
        return x if self.count == 1 else jax.lax.pmax(x, MODEL_AXIS)

    def min(self, x: jax.Array) -> jax.Array:
        """The smallest of all devices' ``x``, on each (all-reduce)."""
        return x if self.count == 1 else jax.lax.pmin(x, MODEL_AXIS)

    def gather(self, x: jax.Array) -> jax.Array:
        """All devices' ``x``, side by side along the last axis, on each (all-gather)."""
        if self.count == 1:
            return x
        return jax.lax.all_gather(x, MODEL_AXIS, axis=x.ndim - 1, tiled=True)


def sharded_param(value: jax.Array, axes: tuple[str, ...]) -> nnx.Param:
    """A parameter annotated with its logical axes.

    It is placed by who makes the model (``slora_jax.loading``), not at once by an ambient mesh.
    """
    return nnx.Param(value, out_sharding=axes, eager_sharding=False)


def partition_spec(axes: Sequence[str]) -> PartitionSpec:
    """The mesh axes of an array whose logical axes are ``axes``, outermost first."""
    return PartitionSpec(*(MESH_AXES[axis] for axis in axes))


def named_sharding(
    mesh: Mesh, axes: Sequence[str], *, memory_kind: str | None = None
) -> NamedSharding:
    """Where an array with these logical axes lives on ``mesh``."""
    # With one device, the one spelling that jit's outputs have: for others it would trace and lower
    # again.
    spec = PartitionSpec() if mesh.size == 1 else partition_spec(axes)
    return NamedSharding(mesh, spec, memory_kind=memory_kind)


def replicate(mesh: Mesh, value: np.ndarray) -> jax.Array:
    """``value``, which every process has, on every device of ``mesh``."""
    if mesh.size == 1:
        return jnp.asarray(value)
    return jax.make_array_from_callback(
        value.shape, named_sharding(mesh, ()), lambda index: value[index]
    )


def on_each_device(
    function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """``function`` as each device of ``mesh`` runs it, on its own part of every argument.

    Specs are PartitionSpecs, or pytrees of them; with one device there is nothing to cut.
    """
    if mesh.size == 1:
        return function
    # Kernels' outputs carry no record of what varies over the mesh, so the check cannot be had.
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def specs_of(arrays: Sequence[jax.Array], mesh: Mesh) -> tuple[PartitionSpec, ...]:
    """How each of the placed ``arrays`` (or abstract ones with a sharding) is cut over ``mesh``."""
    if mesh.size == 1:
        return (PartitionSpec(),) * len(arrays)
    shardings = [array.sharding for array in arrays]
    assert all(isinstance(sharding, NamedSharding) for sharding in shardings)
    return tuple(sharding.spec for sharding in shardings)  # type: ignore[union-attr]


def single_device_mesh(device: Any) -> Mesh:
    """A mesh of one device, so that one device is not a special case of placement."""
    return model_mesh([device])


def model_mesh(devices: Sequence[Any]) -> Mesh:
    """A mesh that cuts a model over all of ``devices``."""
    return Mesh(np.array(devices), (MODEL_AXIS,))
