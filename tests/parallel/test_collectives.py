"""What a compiled decode step communicates: counted, and weighed by S-LoRA's formulas (its 6.2).

With B rows, hidden size h, rank r and N devices the paper gives, for the attention of a layer, a
traffic of 2 (N - 1) B h / N for the base and 5 (N - 1) B r / N for adapters on q, k, v and o: three
gathers of (N - 1) B r / N and an all-reduce of twice that. An all-reduce of x bytes moves
2 (N - 1) x / N, a gather to x bytes (N - 1) x / N.
"""

import jax
import pytest

from pallas_kernels.layout import GROUPS
from slora_jax.sharding import model_mesh
from tests.parallel.abstract_step import collectives, config_of, lower_decode

LAYERS, ROWS, HIDDEN, RANK = 2, 8, 256, 64
ITEM = 4  # bytes of float32
CONFIG = config_of(
    "llama-3.1-8b",
    num_layers=LAYERS,
    hidden_size=HIDDEN,
    intermediate_size=512,
    num_heads=16,
    num_kv_heads=4,
    head_dim=64,
    vocab_size=512,
)
ATTENTION = GROUPS[:2]


def step(devices, scheme="no_extra_collectives", rank=RANK, groups=GROUPS):
    mesh = model_mesh(jax.devices()[:devices])
    compiled = lower_decode(
        CONFIG,
        mesh,
        scheme=scheme,
        dtype="float32",
        rows=ROWS,
        rank_bucket=rank,
        groups=groups,
    )()
    return collectives(compiled.as_text())


def traffic(sizes, devices) -> float:
    """Bytes that a device sends."""
    share = (devices - 1) / devices
    return share * (2 * sizes.get("all-reduce", 0) + sizes.get("all-gather", 0))


def base_traffic(devices) -> float:
    per_linear = 2 * (devices - 1) / devices * ROWS * HIDDEN * ITEM
    return (2 * LAYERS + 1) * per_linear  # and the embedding's


@pytest.mark.parametrize("devices", [2, 8])
def test_the_base_needs_two_all_reduces_a_layer_and_our_adapters_no_more(devices):
    for rank in (0, RANK) if devices == 2 else (RANK,):
        counts, sizes = step(devices, rank=rank)
        assert counts == {"all-reduce": 2 * LAYERS + 1}
        assert traffic(sizes, devices) == base_traffic(devices)


@pytest.mark.parametrize("devices", [8])
def test_s_lora_needs_what_the_paper_says(devices):
    counts, sizes = step(devices, "s_lora", groups=ATTENTION)
    # The paper's three gathers, of q, k and v, in one.
    assert counts == {"all-reduce": 3 * LAYERS + 1, "all-gather": LAYERS}
    adapters = 5 * (devices - 1) / devices * ROWS * RANK * ITEM
    assert traffic(sizes, devices) == base_traffic(devices) + LAYERS * adapters


def test_s_lora_on_every_linear_layer():
    counts, sizes = step(2, "s_lora")
    assert counts == {"all-reduce": 4 * LAYERS + 1, "all-gather": 2 * LAYERS}
    adapters = (5 + 4) / 2 * ROWS * RANK * ITEM  # gate and up: gathers; down: an all-reduce
    assert traffic(sizes, 2) == base_traffic(2) + LAYERS * adapters
