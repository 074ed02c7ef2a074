"""The TPU kernels of paged LoRA: interpreted here, and compiled for TPUs that are not here."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.layout import GROUPS, LANES, TARGETS, AdapterLayout, KVLayout
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
    """To targets of a pair of units of blocks, and of one."""
    index = np.random.default_rng(10).integers(0, 4, 40)
    features = {"in_features": (2200,) * 7, "out_features": (2200,) + (40,) * 6}
    ranks = suite.uniform(8, 3, 16)
    check(10, ranks, index, features=features, rows_per_page=32, groups=(("q", "k", "v"),))


@pytest.mark.usefixtures("few_in_parallel")
@pytest.mark.parametrize("inputs", [2200, 4200])
def test_a_token_does_not_depend_on_how_many_share_its_adapter(inputs):
    """Alone, with a few others and in a tile of many it takes three paths: same bits.

    A pair of units of blocks, or a pair and a unit; the last one is not full.
    """
    features = {"in_features": (128,) * 6 + (inputs,), "out_features": (128,) * 6 + (inputs,)}
    results = []
    for index in ([1, 0, 0], [1, 1, 2], [1] * 40 + [2] * 80):
        fixed = {0: np.random.default_rng(99), 1: np.random.default_rng(98)}
        rng = np.random.default_rng(11)
        case = make_case(
            rng,
            suite.uniform(16, 32),
            np.pad(index, (0, 128 - len(index))),
            features=features,
            rows_per_page=96,
            dtype=BF16,
            fixed=fixed,
        )
        with interpreted():
            _, actual = suite.check(rng, case, BF16, "tpu", groups=(("down",),))
        results.append(np.asarray(actual[0])[0].astype(np.float32))
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)


TILED = {  # of 8 + 128 tokens, the first tile short; an item of prefill takes 32
    "tiles and decode": [1, 2, 0, 3, 0, 0, 0, 3] + [1] * 50 + [2, 0, 3] * 5 + [2] * 33 + [1] * 30,
    "interleaved": [*range(4)] * 2 + [1, 3, 2, 3] * 32,
    "no tile is worth it": [0] * 8 + [1, 2, 3, 0] * 7 + [0] * 100,
    "one adapter": [3] * 136,
    "base only": [0],
}


@pytest.mark.usefixtures("few_in_parallel")
@pytest.mark.parametrize("step", TILED)
def test_tiles(step):
    """Ranks of a class, between two of them, and absent from a target."""
    index = np.pad(TILED[step], (0, 136 - len(TILED[step])))
    ranks = [(16,) * 7, (20, 0, 8, 0, 0, 0, 0), (8,) * 7]
    check(len(step), ranks, index, groups=(("q", "k", "v"),), rank_bucket=48)


@pytest.mark.usefixtures("few_in_parallel")
def test_tiles_of_large_ranks_cross_pages():
    """More tokens than a multiple of eight, and blocks than a multiple of 16."""
    features = {"in_features": (128,) * 6 + (2200,), "out_features": (128,) * 6 + (300,)}
    ranks = [(0,) * 6 + (72,), (0,) * 6 + (40,)]
    index = [1] * 40 + [2] * 60 + [0] * 20 + [2, 1] * 5 + [1]
    check(12, ranks, index, features=features, rows_per_page=32, groups=(("down",),))


@pytest.mark.usefixtures("few_in_parallel")
def test_garbage_in_a_tile_stays_in_its_rows():
    rng = np.random.default_rng(13)
    index = np.array(TILED["tiles and decode"])
    ranks = [(16,) * 7, (20, 0, 8, 0, 0, 0, 0), (8,) * 7]
    case = make_case(
        rng, ranks, index, features=SMALL, rows_per_page=96, dtype=BF16, rank_bucket=48
    )
    groups = (("q", "k", "v"),)
    options = {"layer": 1, "groups": groups, "layout": case.layout, "implementation": "tpu"}
    y, x = case.inputs(rng, groups[0], BF16)
    spoiled = np.arange(3, 136, 7)
    others = np.setdiff1d(np.arange(136), spoiled)
    results = []
    for garbage in (0, np.nan):
        y[spoiled], x[spoiled] = garbage, garbage
        with interpreted():
            (result,) = suite.run([y], [x], case.pool, case.batch, **options)
        results.append(np.asarray(result)[others].astype(np.float32))
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("rows_per_page", [32, 96, 512])
def test_pieces_of_a_run_cover_it_within_pages(rows_per_page):
    from pallas_kernels.paged_lora import pallas_tpu

    sizes = ((1, 1), (5, 7), (32, 32))
    for (in_blocks, out_blocks), rank in itertools.product(sizes, (8, 24, 72)):
        class_rank = next(c for c in pallas_tpu.CLASSES if c >= rank)
        pieces = pallas_tpu._pieces(class_rank, in_blocks, (out_blocks,), rows_per_page)
        row = np.arange(0, 2 * rows_per_page, 32, dtype=np.int32)[:, None]
        rows = pallas_tpu._run_rows(rank, in_blocks, out_blocks)
        number = np.arange(pieces + 1, dtype=np.int32)[None, :]
        cuts = np.asarray(
            pallas_tpu._cut(row, np.int32(rows), np.int32(pieces), number, rows_per_page)
        )
        assert (cuts[:, 0] == 0).all()
        assert (cuts[:, -1] == rows).all()
        assert (np.diff(cuts) >= 8).all()
        assert (cuts % 8 == 0).all()
        first, last = row + cuts[:, :-1], row + cuts[:, 1:] - 1
        assert (first // rows_per_page == last // rows_per_page).all()


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
    """All groups, decode rows and tiles, the pool kept: it is read where it lies, not copied."""
    layout, tokens, rank_bucket = MODELS[name], 64 + 2 * 128, 64
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


def test_pages_too_small_for_the_narrowest_target_are_declined():
    from pallas_kernels.paged_lora import pallas_tpu

    device = type("Device", (), {"device_kind": "TPU v6 lite", "platform": "tpu"})()
    outputs = (18 * LANES, LANES, LANES)
    layout = AdapterLayout((LANES,) * 7, (*outputs, LANES, LANES, LANES, LANES), rows_per_page=32)
    with pytest.raises(NotImplementedError, match="larger page_size"):
        pallas_tpu.check_support(
            device, dtype=BF16, num_heads=1, kv=KVLayout(1, 128, 16), adapters=layout
        )
