"""Paged attention by Mosaic GPU kernels: interpreted on a CPU with race detection, or on a GPU.

The interpreter cannot multiply registers by shared memory, so that one step of the kernels is done
in plain jnp there. Tests marked gpu check the very kernels that ship.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.layout import LANES, KVLayout
from pallas_kernels.paged_attention import api, pallas_gpu
from pallas_kernels.paged_attention.batch import AttentionBatch
from tests.kernels import test_paged_attention as suite
from tests.kernels.aot import gpu_compile, needs_gpu_compiler
from tests.kernels.attention_cases import make_case
from tests.kernels.lora_cases import dtype_of

interpretable = hasattr(plgpu, "force_gpu_interpret_mode") and jax.default_backend() != "gpu"
interpreted_only = pytest.mark.skipif(not interpretable, reason="needs jax 0.11 and a CPU")


def add_values(state, weights, v_ref):
    """``pallas_gpu._add_values`` as the interpreter can do it."""
    values = v_ref[...]
    plgpu.commit_smem()  # a read that the copy engine's next write must wait for
    added = jnp.dot(weights, values, preferred_element_type=jnp.float32)
    return state[0] + added, *state[1:]


@pytest.fixture
def interpreted(monkeypatch, capfd):
    """Kernels run by the interpreter; a race is a failure."""
    monkeypatch.setattr(pallas_gpu, "_add_values", add_values)
    # A few programs share the work, so that each has several items.
    monkeypatch.setattr(pallas_gpu, "CTAS", 2)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


DECODE = {"decode": [1, 40, 129, 64, 17], "prefill": [], "pad_decode": 2, "max_pages": 12}
CASES = {
    "decode, pages of 16": DECODE | {"page_size": 16, "heads": (4, 2), "head_dim": 128},
    "decode, pages of 32, a group of 7": DECODE
    | {"page_size": 32, "heads": (7, 1), "head_dim": 128, "dtype": "float16"},
    "decode, pages of 64, 3 KV heads of 64": DECODE | {"page_size": 64, "heads": (9, 3)},
    "decode, 5 KV heads": DECODE | {"page_size": 16, "heads": (10, 5), "head_dim": 128},
    "decode, 40 KV heads": DECODE | {"page_size": 16, "heads": (40, 40), "head_dim": 16},
    "decode, several splits": {
        "decode": [700, 3, 300],
        "prefill": [],
        "page_size": 32,
        "heads": (8, 1),
        "head_dim": 128,
        "pad_decode": 1,
    },
    "prefill, whole tiles": {
        "decode": [],
        "prefill": [(0, 128), (37, 130)],
        "tile": 128,
        "pad_tiles": 1,
        "heads": (2, 1),
        "page_size": 16,
        "head_dim": 128,
    },
    "prefill, pages of 64, heads of 64": {
        "decode": [],
        "prefill": [(200, 20)],
        "tile": 128,
        "heads": (3, 3),
        "page_size": 64,
    },
    "short and long chunks": {
        "decode": [9],
        "prefill": [(0, 8), (40, 150), (0, 16), (16, 17), (0, 2)],
        "tile": 16,
        "pad_tiles": 9,
        "heads": (2, 1),
        "head_dim": 128,
        "page_size": 32,
    },
    "mixed": {
        "decode": [30, 2],
        "prefill": [(0, 5), (150, 9)],
        "tile": 128,
        "pad_tiles": 1,
        "heads": (2, 1),
        "head_dim": 80,
        "page_size": 32,
    },
    "padding only": {
        "decode": [],
        "prefill": [],
        "pad_decode": 2,
        "pad_tiles": 1,
        "tile": 128,
    },
}


@interpreted_only
@pytest.mark.parametrize("name", CASES)
def test_interpreted(name, interpreted):
    options = {"dtype": "bfloat16"} | CASES[name]
    options["dtype"] = dtype_of(options["dtype"])
    suite.check(make_case(np.random.default_rng(1), **options), "gpu")


@interpreted_only
def test_neighbours_interpreted(interpreted):
    suite.check_neighbours("gpu", dtype=dtype_of("bfloat16"), tile=128)


@interpreted_only
@pytest.mark.parametrize("head_dim", [64, 80])
def test_kv_write_interpreted(head_dim, interpreted):
    suite.check_kv_write("gpu", "bfloat16", head_dim)


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize(
    "heads", [(4, 4), (8, 4), (9, 3), (32, 8), (7, 1), (8, 1), (14, 2), (32, 32), (40, 40)]
)
def test_on_gpu(heads, page_size):
    """Every query group; rows of one split and of several; chunks within tiles and over them."""
    head_dim, dtype = {16: (128, "bfloat16"), 32: (64, "float16"), 64: (128, "float16")}[page_size]
    case = make_case(
        np.random.default_rng(),
        decode=[1, 40, 700, 333, 64, 1025],
        prefill=[(0, 5), (37, 130), (300, 40)],
        tile=128,
        heads=heads,
        head_dim=head_dim,
        page_size=page_size,
        dtype=dtype_of(dtype),
        pad_decode=12 if page_size == 16 else 2,  # longer splits, shorter ones
        pad_tiles=1,
    )
    suite.check(case, "gpu", dense=True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_cases_on_gpu(name):
    options = {"dtype": "bfloat16"} | CASES[name]
    options["dtype"] = dtype_of(options["dtype"])
    suite.check(make_case(np.random.default_rng(), **options), "gpu", dense=True)


@pytest.mark.gpu
def test_neighbours_on_gpu():
    suite.check_neighbours("gpu", dtype=dtype_of("bfloat16"), tile=128)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_kv_write_on_gpu(dtype, head_dim):
    suite.check_kv_write("gpu", dtype, head_dim)


class Device:
    """What ``check_support`` asks of a device."""

    def __init__(self, capability):
        self.compute_capability = capability


@interpreted_only
@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("compute capability", {"device": Device("8.0")}),
        ("compute capability", {"device": Device("10.0")}),
        ("float32", {"dtype": "float32"}),
        ("query heads", {"num_heads": 96}),
        ("page_size", {"kv": KVLayout(8, 128, 4)}),
    ],
)
def test_declines(what, options):
    defaults = {"dtype": "bfloat16", "num_heads": 32, "kv": KVLayout(8, 128, 32)}
    options = {"device": Device("9.0"), "adapters": None} | defaults | options
    device = options.pop("device")
    with pytest.raises(NotImplementedError, match=what):
        pallas_gpu.check_support(device, **options)
    pallas_gpu.check_support(Device("9.0"), adapters=None, **defaults)


# (query heads, KV heads, head_dim, page size): whole models, and one of eight devices of a 70B.
MODELS = {
    "llama-7b": (32, 32, 128, 16),
    "llama-13b": (40, 40, 128, 16),
    "llama-3.1-8b": (32, 8, 128, 32),
    "smollm2-135m": (9, 3, 64, 64),
    "llama-70b, 1 of 8": (8, 1, 128, 64),
}


@needs_gpu_compiler
@pytest.mark.parametrize(
    ("model", "decode"), [*((model, 64) for model in MODELS), ("llama-3.1-8b", 3)]
)
def test_compiles_for_hopper_in_place(model, decode):
    """A mixed step of one layer: the write, decode and prefill; the pool is not copied."""
    heads, kv_heads, head_dim, page_size = MODELS[model]
    layout = KVLayout(kv_heads, head_dim, page_size)
    tiles, tile, pages = 4, 128, 4096 // page_size
    tokens = decode + tiles * tile
    struct = jax.ShapeDtypeStruct
    batch = AttentionBatch(
        slots=struct((tokens,), jnp.int32),
        positions=struct((tokens,), jnp.int32),
        page_table=struct((decode + tiles, pages), jnp.int32),
        num_decode=decode,
        tile=tile,
    )
    pool = struct((4096, layout.rows_per_page, LANES), jnp.bfloat16)
    q = struct((tokens, heads, head_dim), jnp.bfloat16)
    kv = struct((tokens, kv_heads, head_dim), jnp.bfloat16)

    def layer(pool, q, k, v, batch):
        plan = api.prepare(batch, layout, num_heads=heads, implementation="gpu")
        pool = api.kv_write(pool, k, v, plan, layout=layout)
        return pool, api.paged_attention(q, pool, plan, layout=layout, scale=0.1)

    memory = gpu_compile(layer, (pool, q, kv, kv, batch), donate=(0,)).memory_analysis()
    pool_bytes = 2 * int(np.prod(pool.shape))
    assert memory.alias_size_in_bytes >= pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes // 4
