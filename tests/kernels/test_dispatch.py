"""Which implementation serves which device, and what is declined before anything is compiled."""

import jax
import pytest

from pallas_kernels import dispatch
from pallas_kernels.layout import AdapterLayout, KVLayout

KV = KVLayout(8, 128, 32)
ADAPTERS = AdapterLayout((4096,) * 6 + (14336,), (4096, 1024, 1024) * 2 + (4096,), 512)
has_kernels = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="kernels need jax 0.11")


class Device:
    """What the dispatch asks of a device."""

    def __init__(self, platform, kind, capability=None):
        self.platform, self.device_kind, self.compute_capability = platform, kind, capability


HOPPER = Device("gpu", "NVIDIA H100 80GB HBM3", "9.0")
T4 = Device("gpu", "Tesla T4", "7.5")
V6E = Device("tpu", "TPU v6 lite")
CPU = Device("cpu", "cpu")


def choose(requested, device, dtype="bfloat16"):
    return dispatch.choose(requested, device, dtype=dtype, num_heads=32, kv=KV, adapters=ADAPTERS)


@has_kernels
@pytest.mark.parametrize(
    ("device", "dtype", "chosen"),
    [
        (HOPPER, "bfloat16", "gpu"),
        (HOPPER, "float16", "gpu"),
        (HOPPER, "float32", "xla"),
        (T4, "float16", "xla"),
        (V6E, "bfloat16", "tpu"),
        (V6E, "float32", "xla"),
        (Device("tpu", "TPU v3"), "bfloat16", "xla"),
        (CPU, "float32", "xla"),
    ],
)
def test_auto_takes_kernels_where_they_can_serve(device, dtype, chosen):
    assert choose("auto", device, dtype) == chosen


@has_kernels
@pytest.mark.parametrize(
    ("name", "device", "dtype", "reason"),
    [
        ("gpu", HOPPER, "float32", "float32"),
        ("gpu", T4, "float16", "capability"),
        ("tpu", V6E, "float16", "float16"),
    ],
)
def test_a_named_one_never_falls_back(name, device, dtype, reason):
    with pytest.raises(NotImplementedError, match=reason):
        choose(name, device, dtype)


@pytest.mark.parametrize(("name", "device"), [("gpu", CPU), ("tpu", CPU), ("tpu", HOPPER)])
def test_kernels_of_another_platform_are_refused_before_they_are_imported(name, device):
    with pytest.raises(NotImplementedError, match=f"{device.device_kind}.*'auto' and 'xla'"):
        choose(name, device)


def test_unknown_names():
    with pytest.raises(ValueError, match="'fast'"):
        choose("fast", CPU)
    with pytest.raises(ValueError, match="'fast'"):
        dispatch.implementation("paged_lora", "fast")


@has_kernels
def test_sizes_of_steps():
    for name, tile in dispatch.PREFILL_TILE.items():
        dispatch.check_step(name, tile=tile, table_entries=256 * 64)
    with pytest.raises(NotImplementedError, match="multiple of 16"):
        dispatch.check_step("gpu", tile=8, table_entries=1)
    with pytest.raises(NotImplementedError, match="scalar memory"):
        dispatch.check_step("tpu", tile=128, table_entries=2**20)


def test_plain_xla_takes_any_step():
    dispatch.check_step("xla", tile=3, table_entries=2**30)
