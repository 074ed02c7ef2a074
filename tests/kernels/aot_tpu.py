"""Real compilation for TPUs that are not here: libtpu's compiler, ahead of time, on any Linux."""

import functools
import os

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# What libtpu asks a TPU machine for; it does not look for one then.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}


@functools.cache
def devices(topology):
    """All devices of a described topology, such as "v6e:2x4"."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return topologies.get_topology_desc(topology_name=topology, platform="tpu").devices


def device(chip):
    """One device of a described topology; its ``device_kind`` is the real one's."""
    return devices(TOPOLOGIES[chip])[0]


def tpu_compile(fn, args, donate=(), *, chip="v6e"):
    """``fn`` compiled for one ``chip``; ``args``: a pytree of ShapeDtypeStruct."""
    mesh = Mesh(np.array([device(chip)]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args)
    with jax.set_mesh(mesh):
        return jax.jit(fn, donate_argnums=donate).lower(*args).compile()
