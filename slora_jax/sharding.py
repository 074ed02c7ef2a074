"""Logical axis → mesh axis: one table, read by everything that places an array.

Layers name what an axis *is*; this module alone says where it goes. It refuses to know layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MESH_AXES: dict[str, str | None] = {
    "embed": None,  # the residual stream is replicated
    "vocab": "model",  # embedding rows and lm_head outputs
    "heads": "model",  # outputs of q, k, v; inputs of o
    "mlp": "model",  # outputs of gate, up; inputs of down
    "norm": None,
    "pages": None,  # a page id means the same page on every device
    "page_rows": "model",  # each device's rows hold its own KV heads and adapter slices
    "lanes": None,
}


def sharded_param(value: jax.Array, axes: tuple[str, ...]) -> nnx.Param:
    """A parameter annotated with its logical axes.

    It is placed by who makes the model (``slora_jax.loading``), not at once by an ambient mesh.
    """
    return nnx.Param(value, out_sharding=axes, eager_sharding=False)


def partition_spec(axes: Sequence[str]) -> PartitionSpec:
    """The mesh axes of an array whose logical axes are ``axes``, outermost first."""
    return PartitionSpec(*(MESH_AXES[axis] for axis in axes))


def named_sharding(mesh: Mesh, axes: Sequence[str]) -> NamedSharding:
    """Where an array with these logical axes lives on ``mesh``."""
    if mesh.size == 1:
        # The one spelling that jit's outputs have: for others it would trace and lower again.
        return NamedSharding(mesh, PartitionSpec())
    return NamedSharding(mesh, partition_spec(axes))


def single_device_mesh(device: Any) -> Mesh:
    """A mesh of one device, so that one device is not a special case of placement."""
    return Mesh(np.array([device]), ("model",))
