"""Models cut over simulated devices (``jax_num_cpu_devices`` in tests/conftest.py)."""

import pytest

from tests.serving import TinyModel

ADAPTERS = {
    "all": {"rank": 5},
    "attention": {"rank": 24, "targets": ("q", "k", "v", "o")},
    "mlp": {"rank": 8, "targets": ("gate", "up", "down")},
    "qv": {"rank": 16, "targets": ("q", "v"), "layers_to_transform": [1]},
}
"""Ranks that 2, 4 and 8 devices do not divide; groups that one of them lacks."""

HEADS = {"mha": (8, 8), "gqa": (8, 4)}
"""Query and KV heads; 8 devices share the 4."""


def _write(folder, heads, kv_heads):
    shape = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": 16, "vocab_size": 500}
    return TinyModel.write(folder, ADAPTERS, seed=1, intermediate_size=96, **shape)


@pytest.fixture(scope="session")
def gqa(tmp_path_factory) -> TinyModel:
    return _write(tmp_path_factory.mktemp("gqa"), *HEADS["gqa"])


@pytest.fixture(scope="session")
def mha(tmp_path_factory) -> TinyModel:
    return _write(tmp_path_factory.mktemp("mha"), *HEADS["mha"])
