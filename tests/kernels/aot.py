"""Real compilation for an H100 that is not here: XLA's GPU compiler and ptxas, ahead of time.

Needs jax's CUDA plugin and NVIDIA's compilers as wheels, without their dependencies and without a
driver; ``h100_target_config.txtpb`` describes the chip.
"""

import functools
import importlib.util
import os
import pathlib

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

TARGET = pathlib.Path(__file__).with_name("h100_target_config.txtpb")

needs_gpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins.xla_cuda13") is None
    if importlib.util.find_spec("jax_plugins")
    else True,
    reason="jax-cuda13-plugin is not installed",
)


@functools.cache
def gpu_mesh(count=1):
    """``count`` H100s of one host, along an axis "model"."""
    # Without a driver the plugin's check of the CUDA libraries cannot pass.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        target_config=TARGET.read_text(),
        topology=f"1x1x{count}",
    )
    return topologies.make_mesh(topo=topology, mesh_shape=(count,), axis_names=("model",))


def gpu_compile(fn, args, donate=()):
    """``fn`` compiled for one H100; ``args``: a pytree of ShapeDtypeStruct."""
    sharding = NamedSharding(gpu_mesh(), PartitionSpec())
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args)
    return jax.jit(fn, donate_argnums=donate).lower(*args).compile()
