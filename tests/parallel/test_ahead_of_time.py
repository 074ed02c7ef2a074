"""Llama-3.1-70B over eight devices, compiled for chips that are not here, with their kernels.

A few of its layers: what a layer needs is the difference between two depths.
"""

import importlib.util

import jax
import numpy as np
import pytest

from slora_jax.sharding import model_mesh
from tests.kernels.aot import gpu_mesh, needs_gpu_compiler
from tests.kernels.aot_tpu import devices
from tests.parallel.abstract_step import collectives, config_of, lower_decode

has_kernels = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="kernels need jax 0.11")
has_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
SCHEMES = ("no_extra_collectives", "s_lora")
WEIGHTS = 141.1e9  # bytes of all of it in bfloat16
LAYER = 855.7e6 * 2  # of one layer
EMBEDDING = 128_256 * 8192 * 2  # the output projection is another program's


def expected_counts(scheme, layers):
    if scheme == "no_extra_collectives":
        return {"all-reduce": 2 * layers + 1}
    return {"all-reduce": 4 * layers + 1, "all-gather": 2 * layers}


def check(mesh, kernels, scheme, *, layers=1, rows=64):
    """Collectives and memory of a decode step of 64 adapters."""
    compiled = lower_decode(
        config_of("llama-3.1-70b", num_layers=layers),
        mesh,
        scheme=scheme,
        kernels=kernels,
        rows=rows,
        rank_bucket=8192,
    )()
    counts, _ = collectives(compiled.as_text())
    assert counts == expected_counts(scheme, layers)
    memory = compiled.memory_analysis()
    weights = (layers * LAYER + EMBEDDING) / mesh.size
    pool = memory.alias_size_in_bytes
    assert memory.argument_size_in_bytes - pool == pytest.approx(weights, rel=0.03)
    return memory.temp_size_in_bytes


@has_kernels
@needs_gpu_compiler
@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_eight_h100s(scheme):
    temporaries = check(gpu_mesh(8), "gpu", scheme)
    assert temporaries < 100e6
    assert WEIGHTS / 8 + temporaries < 0.25 * 80e9  # the rest is the pool's


@has_kernels
@has_libtpu
@pytest.mark.full
@pytest.mark.parametrize(("topology", "memory"), [("v6e:2x4", 32e9), ("v5e:4x4", 16e9)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_tpu_slices(topology, memory, scheme):
    """v5e: sixteen chips, which share the eight KV heads; eight cannot hold the weights."""
    mesh = model_mesh(np.array(devices(topology)))
    with jax.set_mesh(mesh):
        temporaries = check(mesh, "tpu", scheme)
    assert temporaries < 100e6
    assert WEIGHTS / mesh.size + temporaries < 0.6 * memory
