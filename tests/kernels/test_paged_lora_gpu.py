"""Paged LoRA by the Mosaic GPU kernel: interpreted on a CPU with race detection, or on a GPU.

The interpreter has no TMA that adds, so that one copy is done in plain jnp there. Tests marked gpu
check the very kernel that ships.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels.layout import GROUPS, LANES, TARGETS, AdapterLayout, KVLayout
from pallas_kernels.paged_lora import api, pallas_gpu
from pallas_kernels.paged_lora.batch import LoraBatch, lora_bucket_sizes
from tests.kernels import test_paged_lora as suite
from tests.kernels.aot import gpu_compile, needs_gpu_compiler
from tests.kernels.lora_cases import LAYERS, SMALL, WIDE, dtype_of, make_case

interpretable = hasattr(mosaic_gpu, "force_gpu_interpret_mode") and jax.default_backend() != "gpu"
interpreted_only = pytest.mark.skipif(not interpretable, reason="needs jax 0.11 and a CPU")
QKV, DOWN = GROUPS[0], GROUPS[3]


def add(staged, y, token, block, real):
    """``pallas_gpu._add`` as the interpreter can do it."""
    for row in range(pallas_gpu.WINDOW):

        @pl.when(row < real)
        def _(row=row):
            y[token, block + row] = y[token, block + row] + staged[row]


@pytest.fixture
def interpreted(monkeypatch, capfd):
    """The kernel run by the interpreter; a race is a failure."""
    monkeypatch.setattr(pallas_gpu, "_add", add)
    # Few programs, so that each has several items.
    monkeypatch.setattr(pallas_gpu, "PROGRAMS", 3)
    with mosaic_gpu.force_gpu_interpret_mode(mosaic_gpu.InterpretGPUParams(detect_races=True)):
        yield
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


def uniform(*ranks):
    return [(rank,) * 7 for rank in ranks]


STEPS = {
    "mixed ranks": (uniform(1, 16, 24, 64), [0, 1, 2, 3, 4, 2, 1, 0, 4, 2, 2, 0], SMALL, 96),
    "targets that are absent": (*suite.STEPS["rank pattern"], SMALL, 32),
    "one adapter": (uniform(16), [1] * 12, SMALL, 64),
    "base only": (uniform(16), [0] * 3, SMALL, 64),
    "up to 256": (
        [*uniform(256, 128), (1, 0, 256, 17, 0, 100, 8)],
        [3, 1, 0, 2, 3],
        WIDE,
        64,
    ),
}


# Inputs wide enough for segments of fewer tokens in decode than in prefill.
TALL = {**WIDE, "in_features": (2560,) * 6 + (640,)}


def case_of(rng, step, dtype):
    ranks, index, features, rows_per_page = STEPS[step]
    return make_case(rng, ranks, index, features=features, rows_per_page=rows_per_page, dtype=dtype)


@interpreted_only
@pytest.mark.parametrize("step", STEPS)
def test_interpreted(step, interpreted):
    rng = np.random.default_rng(len(step))
    dtype = dtype_of("float16" if step == "up to 256" else "bfloat16")
    suite.check(rng, case_of(rng, step, dtype), dtype, "gpu", groups=(QKV, DOWN))


def bits_of_one_token(others, garbage):
    """The bits of the last token of adapter 1, its adapter and its row of x and y always the
    same."""
    rng = np.random.default_rng([others, 3])
    dtype = dtype_of("bfloat16")
    # The last step is too large for the segments of decode.
    index = np.array([[2, 2, 1], [1] * 9, [2, 1, 0, 2, 1, 2, 1], [0] * 297 + [2, 1, 1]][others])
    row = int(np.flatnonzero(np.asarray(index) == 1)[-1])
    case = make_case(
        rng,
        uniform(16, 40),
        index,
        features=TALL,
        rows_per_page=64,
        dtype=dtype,
        fixed={0: np.random.default_rng(99)},
    )
    y, x = case.inputs(rng, QKV, dtype)
    if garbage:
        y[:], x[:] = np.nan, np.nan
    own = np.random.default_rng(5)
    y[row], x[row] = own.standard_normal(y.shape[1]), own.standard_normal(x.shape[1])
    arguments = {"layer": 0, "groups": (QKV,), "layout": case.layout, "implementation": "gpu"}
    (result,) = suite.run([y], [x], case.pool, case.batch, **arguments)
    return np.asarray(result)[row].view(np.uint16)


@interpreted_only
def test_a_row_does_not_depend_on_the_others(interpreted):
    alone = bits_of_one_token(0, garbage=False)
    for others, garbage in ((0, True), (1, False), (2, True), (3, False)):
        np.testing.assert_array_equal(bits_of_one_token(others, garbage), alone)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("step", STEPS)
def test_on_the_gpu(step, dtype):
    rng = np.random.default_rng()
    suite.check(rng, case_of(rng, step, dtype_of(dtype)), dtype_of(dtype), "gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("rows_per_page", [64, 96, 512])
def test_many_tokens_on_the_gpu(rows_per_page):
    rng = np.random.default_rng()
    dtype = dtype_of("bfloat16")
    ranks = [tuple(rng.integers(1, 129, 7)) for _ in range(6)]
    features = {
        "in_features": (1024,) * 6 + (2816,),
        "out_features": (1024, 256, 256) * 2 + (1024,),
    }
    case = make_case(
        rng,
        ranks,
        rng.integers(0, 7, 600),
        features=features,
        rows_per_page=rows_per_page,
        dtype=dtype,
    )
    suite.check(rng, case, dtype, "gpu")


@pytest.mark.gpu
def test_bits_on_the_gpu():
    alone = bits_of_one_token(0, garbage=False)
    for others, garbage in ((0, True), (1, False), (2, True), (3, False)):
        np.testing.assert_array_equal(bits_of_one_token(others, garbage), alone)


@pytest.mark.parametrize(
    ("dtype", "capability", "reason"),
    [("float32", "9.0", "float32|jax 0.11"), ("bfloat16", "8.0", "capability 9.0|jax 0.11")],
)
def test_what_it_declines(dtype, capability, reason):
    device = type("Device", (), {"compute_capability": capability, "device_kind": "a GPU"})()
    layout = AdapterLayout(**SMALL, rows_per_page=64)
    with pytest.raises(NotImplementedError, match=reason):
        pallas_gpu.check_support(
            device, dtype=dtype, num_heads=4, kv=KVLayout(2, 64, 32), adapters=layout
        )


# Hidden, KV and inner features on one device, rows a page.
MODELS = {
    "Llama-7B": (4096, 4096, 4096, 11008, 512),
    "Llama-13B": (5120, 5120, 5120, 13824, 640),
    "Llama-3.1-8B": (4096, 4096, 1024, 14336, 512),
    "SmolLM2-135M": (576, 576, 192, 1536, 192),
    "Llama-70B on 8 devices": (8192, 1024, 128, 3584, 128),
}


@needs_gpu_compiler
@pytest.mark.skipif(not hasattr(mosaic_gpu, "force_gpu_interpret_mode"), reason="needs jax 0.11")
@pytest.mark.parametrize("model", MODELS)
def test_compiles_for_hopper(model):
    hidden, heads, kv, inner, rows_per_page = MODELS[model]
    layout = AdapterLayout(
        (hidden,) * 3 + (heads, hidden, hidden, inner),
        (heads, kv, kv, hidden, inner, inner, hidden),
        rows_per_page,
    )
    pool = jax.ShapeDtypeStruct((4096, rows_per_page, LANES), jnp.bfloat16)
    batch = batch_of_shapes(128, 1024, layout)

    def step(ys, xs, pool, batch):
        plan = api.prepare(batch, layout, implementation="gpu")
        term = functools.partial(api.paged_lora, plan=plan, layer=0, layout=layout)
        return [
            term(y, x, pool, group=group) for y, x, group in zip(ys, xs, GROUPS, strict=True)
        ], pool

    features = [[TARGETS.index(name) for name in group] for group in GROUPS]
    xs = [jax.ShapeDtypeStruct((128, layout.in_features[g[0]]), pool.dtype) for g in features]
    ys = [
        jax.ShapeDtypeStruct((128, sum(layout.out_features[t] for t in g)), pool.dtype)
        for g in features
    ]
    memory = gpu_compile(step, (ys, xs, pool, batch), donate=(0, 2)).memory_analysis()
    pool_bytes = 2 * int(np.prod(pool.shape))
    assert memory.alias_size_in_bytes >= pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes // 10


def batch_of_shapes(tokens, rank_bucket, layout):
    rows, page_ids = lora_bucket_sizes(rank_bucket, layout)
    whole = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    fields = {
        "adapter_index": whole((tokens,)),
        "pages": whole((page_ids,)),
        "page_start": whole((rows,)),
        **{name: whole((rows, 7)) for name in ("rank", "a_row", "b_row")},
        "scaling": jax.ShapeDtypeStruct((LAYERS, rows, 7), jnp.float32),
    }
    assert set(fields) | {"rank_bucket"} == {f.name for f in dataclasses.fields(LoraBatch)}
    return LoraBatch(**fields, rank_bucket=rank_bucket)
