"""The TPU kernels of paged attention: interpreted here, and compiled for TPUs that are not here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.layout import AdapterLayout, KVLayout
from pallas_kernels.paged_attention.batch import AttentionBatch
from tests.kernels import test_paged_attention as suite
from tests.kernels.aot_tpu import device, tpu_compile
from tests.kernels.attention_cases import make_case
from tests.kernels.interpret_tpu import interpreted, needs_libtpu, needs_new_jax
from tests.kernels.lora_cases import dtype_of

pytestmark = needs_new_jax
BF16 = dtype_of("bfloat16")


def check(seed, **parts):
    """Attention close to the reference's, and the pool written exactly as it writes it."""
    case = make_case(np.random.default_rng(seed), dtype=BF16, **parts)
    with interpreted():
        suite.check(case, "tpu")
        pool = np.asarray(suite.run_case(case, "tpu")[1])
    expected = np.asarray(suite.run_case(case, "reference")[1])
    np.testing.assert_array_equal(pool[1:].astype(np.float32), expected[1:].astype(np.float32))


@pytest.mark.parametrize("page_size", [16, 32, 64])
def test_mixed_step(page_size):
    """Chunks that start and end mid-page, tiles that share a page, padding in both parts."""
    check(
        page_size,
        decode=[1, 40, 129, 64, 17],
        prefill=[(0, 5), (0, 24), (37, 11), (150, 9)],
        page_size=page_size,
        pad_decode=3,
        pad_tiles=2,
        max_pages=24,
    )


@pytest.mark.parametrize(("head_dim", "heads"), [(16, (9, 3)), (80, (4, 2)), (128, (8, 8))])
def test_head_dims(head_dim, heads):
    check(head_dim, decode=[3, 70], prefill=[(20, 13)], head_dim=head_dim, heads=heads)


@pytest.mark.parametrize("heads", [(4, 1), (7, 1), (16, 2)])
def test_query_groups(heads):
    check(heads[0], decode=[33, 2], prefill=[(10, 12)], heads=heads)


@pytest.mark.parametrize("parts", suite.PARTS)
def test_empty_parts(parts):
    check(5, **suite.PARTS[parts])


def test_long_context():
    """Several blocks of keys, next to rows that end in the first."""
    check(
        6,
        decode=[900, 4, 2100],
        prefill=[(700, 8), (0, 8)],
        page_size=16,
        max_pages=140,
        heads=(8, 4),
        head_dim=128,
    )


def test_a_row_does_not_depend_on_its_neighbours():
    with interpreted():
        suite.check_neighbours("tpu", dtype=BF16)


MODELS = {  # query heads, KV heads, head_dim, tokens a page
    "llama-7b": (32, 32, 128, 16),
    "llama-13b": (40, 40, 128, 16),
    "llama-3.1-8b": (32, 8, 128, 32),
    "smollm2": (9, 3, 64, 64),
    "llama-70b, one of 8 devices": (8, 1, 128, 128),
}


@needs_libtpu
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize("model", MODELS)
def test_compiles_in_place(model, chip):
    """A mixed step: the pool is written where it lies, and no copy of it is made."""
    heads, kv_heads, head_dim, page_size = MODELS[model]
    layout = KVLayout(kv_heads, head_dim, page_size)
    decode, tiles, tile = 64, 4, 128
    tokens = decode + tiles * tile
    shape, ints = jax.ShapeDtypeStruct, functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    table = ints((decode + tiles, 4096 // page_size))
    batch = AttentionBatch(ints((tokens,)), ints((tokens,)), table, decode, tile)
    pool = shape((2**30 // (layout.rows_per_page * 256), layout.rows_per_page, 128), jnp.bfloat16)
    q = shape((tokens, heads, head_dim), jnp.bfloat16)
    kv = shape((tokens, kv_heads, head_dim), jnp.bfloat16)
    step = functools.partial(suite.run.__wrapped__, layout=layout, scale=0.1, implementation="tpu")
    program = tpu_compile(step, (q, kv, kv, pool, batch), donate=(3,), chip=chip)
    memory, pool_bytes = program.memory_analysis(), 2 * int(np.prod(pool.shape))
    assert memory.alias_size_in_bytes >= pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes // 10


@needs_libtpu
def test_what_is_declined():
    from pallas_kernels import dispatch

    kv = KVLayout(8, 128, 32)
    adapters = AdapterLayout((4096,) * 7, (4096,) * 7, kv.rows_per_page)
    choose = functools.partial(dispatch.choose, num_heads=32, kv=kv, adapters=adapters)
    for chip in ("v5e", "v6e"):
        assert choose("auto", device(chip), dtype=jnp.bfloat16) == "tpu"
        assert choose("auto", device(chip), dtype=jnp.float16) == "xla"
        with pytest.raises(NotImplementedError, match="bfloat16"):
            choose("tpu", device(chip), dtype=jnp.float32)
