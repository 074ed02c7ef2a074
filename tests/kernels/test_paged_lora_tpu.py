"""The TPU kernel of paged LoRA: interpreted here, and compiled for TPUs that are not here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.layout import GROUPS, TARGETS, AdapterLayout, KVLayout
from pallas_kernels.paged_lora.batch import LoraBatch, lora_bucket_sizes
from tests.kernels import test_paged_lora as suite
from tests.kernels.aot_tpu import tpu_compile
from tests.kernels.interpret_tpu import interpreted, needs_libtpu, needs_new_jax
from tests.kernels.lora_cases import SMALL, WIDE, dtype_of, make_case

pytestmark = needs_new_jax
BF16 = dtype_of("bfloat16")
SOME_GROUPS = (("q", "k", "v"), ("down",))


@pytest.fixture
def few_in_parallel(monkeypatch):
    """The kernel unrolls adapters that it computes together; two of them show what eight would."""
    from pallas_kernels.paged_lora import pallas_tpu

    monkeypatch.setattr(pallas_tpu, "PARALLEL_RANKS", 16)


def check(seed, ranks, index, *, features=SMALL, rows_per_page=96, groups=SOME_GROUPS, **options):
    rng = np.random.default_rng(seed)
    case = make_case(
        rng, ranks, index, features=features, rows_per_page=rows_per_page, dtype=BF16, **options
    )
    with interpreted():
        return suite.check(rng, case, BF16, "tpu", groups=groups)


@pytest.mark.usefixtures("few_in_parallel")
@pytest.mark.parametrize("step", suite.STEPS)
def test_steps(step):
    ranks, index = suite.STEPS[step]
    index = np.pad(index, (0, suite.TOKENS - len(index)))
    check(len(step), ranks, index, rank_bucket=suite.RANK_BUCKET)


@pytest.mark.usefixtures("few_in_parallel")
def test_large_ranks_cross_pages():
    ranks = [(128, 0, 0, 0, 0, 0, 128), (100, 0, 0, 0, 0, 0, 8)]
    check(8, ranks, [2, 1, 0, 2], features=WIDE, rows_per_page=64, groups=(("down",),))


def test_as_many_in_parallel_as_there_are():
    """The form that ships, on ranks small enough to be interpreted."""
    index = [1, 2, 0, 3, 2, *range(1, 19)]
    check(9, suite.uniform(*[8] * 17, 16), index, groups=(("o",),))


@pytest.mark.usefixtures("few_in_parallel")
def test_more_tokens_than_a_register_has_rows():
    index = np.random.default_rng(10).integers(0, 4, 40)
    check(10, suite.uniform(8, 3, 16), index, rows_per_page=32, groups=(("q", "k", "v"),))


@pytest.mark.usefixtures("few_in_parallel")
def test_a_token_does_not_depend_on_how_many_share_its_adapter():
    """Alone it takes the path of single tokens, with others the path of several: same bits."""
    results = []
    for index in ([1, 0, 0], [1, 1, 2], [1, 2, 0]):
        fixed = {0: np.random.default_rng(99), 1: np.random.default_rng(98)}
        rng = np.random.default_rng(11)
        case = make_case(
            rng,
            suite.uniform(16, 32),
            index,
            features=SMALL,
            rows_per_page=96,
            dtype=BF16,
            fixed=fixed,
        )
        with interpreted():
            _, actual = suite.check(rng, case, BF16, "tpu", groups=(("q", "k", "v"),))
        results.append(np.asarray(actual[0])[0].astype(np.float32))
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)


def model(hidden, heads, kv_heads, inner, page_size, head_dim=128, in_features=None):
    q, kv = heads * head_dim, kv_heads * head_dim
    rows = KVLayout(kv_heads, head_dim, page_size).rows_per_page
    inputs = in_features or (hidden, hidden, hidden, q, hidden, hidden, inner)
    return AdapterLayout(inputs, (q, kv, kv, hidden, inner, inner, hidden), rows)


MODELS = {
    "llama-7b": model(4096, 32, 32, 11008, 16),
    "llama-13b": model(5120, 40, 40, 13824, 16),
    "llama-3.1-8b": model(4096, 32, 8, 14336, 32),
    "smollm2": model(576, 9, 3, 1536, 64, head_dim=64),
    "llama-70b, one of 8 devices": model(8192, 8, 1, 28672 // 8, 128),
}


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize("name", MODELS)
def test_compiles(name, chip):
    """All groups of targets, in a step that also keeps the pool: read where it lies, not copied."""
    layout, tokens, rank_bucket = MODELS[name], 64, 64
    num_rows, num_ids = lora_bucket_sizes(rank_bucket, layout)
    shape, ints = jax.ShapeDtypeStruct, functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    per_target = ints((num_rows, 7))
    batch = LoraBatch(
        adapter_index=ints((tokens,)),
        pages=ints((num_ids,)),
        page_start=ints((num_rows,)),
        rank=per_target,
        a_row=per_target,
        b_row=per_target,
        scaling=shape((1, num_rows, 7), jnp.float32),
        rank_bucket=rank_bucket,
    )
    pages = 2**29 // (layout.rows_per_page * 256)
    pool = shape((1, pages, layout.rows_per_page, 128), jnp.bfloat16)
    targets = [[TARGETS.index(name) for name in group] for group in GROUPS]
    ys, xs = (
        [shape((tokens, size), jnp.bfloat16) for size in sizes]
        for sizes in (
            [sum(layout.out_features[t] for t in group) for group in targets],
            [layout.in_features[group[0]] for group in targets],
        )
    )
    options = {"layer": 0, "groups": GROUPS, "layout": layout, "implementation": "tpu"}

    def step(pool, ys, xs, batch):
        return pool, suite.run.__wrapped__(ys, xs, pool, batch, **options)

    program = tpu_compile(step, (pool, ys, xs, batch), donate=(0,), chip=chip)
    memory, pool_bytes = program.memory_analysis(), 2 * int(np.prod(pool.shape))
    assert memory.alias_size_in_bytes >= pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes // 10
