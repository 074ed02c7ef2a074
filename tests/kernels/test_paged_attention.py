"""Paged attention and the KV write: one suite for every implementation, on fresh random steps."""

import functools

import jax
import numpy as np
import pytest

from pallas_kernels.layout import LANES, KVLayout
from pallas_kernels.paged_attention import api
from pallas_kernels.paged_attention.batch import AttentionBatch
from tests.kernels.attention_cases import make_case
from tests.kernels.lora_cases import dtype_of
from tests.kernels.tolerances import assert_close

IMPLEMENTATIONS = ("reference", "xla")


@functools.partial(jax.jit, static_argnames=("layout", "scale", "implementation"))
def run(q, k, v, pool, batch, *, layout, scale, implementation):
    """The write of the step's own tokens, then attention, as one compiled step."""
    plan = api.prepare(batch, layout, num_heads=q.shape[1], implementation=implementation)
    pool = api.kv_write(pool, k, v, plan, layout=layout)
    return api.paged_attention(q, pool, plan, layout=layout, scale=scale), pool


@functools.partial(jax.jit, static_argnames=("layout", "implementation"))
def write(pool, k, v, batch, *, layout, implementation):
    plan = api.prepare(batch, layout, num_heads=k.shape[1], implementation=implementation)
    return api.kv_write(pool, k, v, plan, layout=layout)


def run_case(case, implementation):
    return run(
        case.q,
        case.k,
        case.v,
        case.pool,
        case.batch,
        layout=case.layout,
        scale=case.scale,
        implementation=implementation,
    )


def check(case, implementation, dense=False):
    """The reference equals the dense answer; every other implementation equals the reference, or
    the ``dense`` answer too (on a GPU, where compiling the reference takes longest)."""
    actual, _ = run_case(case, implementation)
    assert actual.dtype == case.q.dtype
    if dense or implementation == "reference":
        expected = case.expected()
    else:
        expected = run_case(case, "reference")[0]
    assert_close(actual, expected, case.q.dtype, implementation)
    padding = case.batch.positions < 0
    assert not np.asarray(actual)[padding].astype(np.float32).any()
    return np.asarray(actual)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("page_size", [16, 32, 64])
def test_mixed_step(page_size, implementation):
    """Decode rows and chunks that start and end mid-page, with padding in both parts."""
    case = make_case(
        np.random.default_rng(page_size),
        decode=[1, 40, 129, 64, 17],
        prefill=[(0, 5), (0, 24), (37, 11), (150, 9)],
        page_size=page_size,
        pad_decode=3,
        pad_tiles=2,
        max_pages=24,
    )
    check(case, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
def test_head_dims_and_dtypes(head_dim, dtype, implementation):
    case = make_case(
        np.random.default_rng(head_dim),
        decode=[3, 70],
        prefill=[(20, 13)],
        head_dim=head_dim,
        dtype=dtype_of(dtype),
    )
    check(case, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("heads", [(3, 3), (4, 2), (9, 3), (4, 1), (7, 1), (16, 2)])
def test_query_groups(heads, implementation):
    """Groups of 1, 2, 3, 4, 7 and 8 query heads a KV head."""
    case = make_case(np.random.default_rng(heads), decode=[33, 2], prefill=[(10, 12)], heads=heads)
    check(case, implementation)


PARTS = {
    "decode only": {"decode": [12, 90], "prefill": []},
    "prefill only": {"decode": [], "prefill": [(0, 20), (40, 3)]},
    "single decode token": {"decode": [1], "prefill": []},
    "single prefill token": {"decode": [], "prefill": [(0, 1)], "tile": 1},
    "padding only": {"decode": [], "prefill": [], "pad_decode": 2, "pad_tiles": 1},
    "tile of 16": {"decode": [5], "prefill": [(31, 33)], "tile": 16},
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("parts", PARTS)
def test_empty_parts(parts, implementation):
    check(make_case(np.random.default_rng(5), **PARTS[parts]), implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_long_context(implementation):
    """Many chunks of keys, next to rows that end in the first."""
    case = make_case(
        np.random.default_rng(6),
        decode=[900, 4, 513],
        prefill=[(700, 8), (0, 8)],
        page_size=16,
        max_pages=64,
    )
    check(case, implementation)


def check_neighbours(implementation, **options):
    """Rows keep their bits next to garbage and with other page ids."""
    make = functools.partial(
        make_case,
        decode=[40, 300],
        prefill=[(30, 8), (250, 8)],
        page_size=32,
        max_pages=16,
        **options,
    )
    case = make(np.random.default_rng(20))
    alone, _ = run_case(case, implementation)
    rows = {40: [0], 30: list(range(2, 10))}  # the decode row of 40 keys, the first tile's tokens

    other = make(np.random.default_rng(21))  # shuffled otherwise, other values everywhere
    pool = other.pool.copy()
    for row, length in ((0, 40), (2, 38)):
        used = -(-length // 32)
        pool[other.batch.page_table[row, :used]] = case.pool[case.batch.page_table[row, :used]]
    for tokens in rows.values():
        for name in ("q", "k", "v"):
            getattr(other, name)[tokens] = getattr(case, name)[tokens]
    for name in ("q", "k", "v"):
        getattr(other, name)[1] = np.nan
    other.pool = pool
    mixed, _ = run_case(other, implementation)
    for tokens in rows.values():
        np.testing.assert_array_equal(np.asarray(alone)[tokens], np.asarray(mixed)[tokens])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_row_does_not_depend_on_its_neighbours(implementation):
    """Bit for bit: with longer neighbours, with garbage in them, and with other page ids."""
    check_neighbours(implementation)


def check_kv_write(implementation, dtype, head_dim):
    """Exactly the tokens' own slots change, and only the null page besides."""
    dtype = dtype_of(dtype)
    rng = np.random.default_rng(head_dim)
    layout = KVLayout(num_kv_heads=2, head_dim=head_dim, page_size=16)
    pool = rng.standard_normal((5, layout.rows_per_page, LANES)).astype(dtype)
    slots = np.append(16 + rng.permutation(4 * 16)[:9], [0, 3, 3]).astype(np.int32)
    k, v = rng.standard_normal((2, len(slots), 2, head_dim)).astype(dtype)
    batch = AttentionBatch(
        slots=slots,
        positions=np.append(slots[:9], [-1] * 3).astype(np.int32),
        page_table=np.zeros((len(slots), 1), np.int32),
        num_decode=len(slots),
        tile=1,
    )
    written = write(pool, k, v, batch, layout=layout, implementation=implementation)
    expected = pool.copy()
    for slot, new_k, new_v in zip(slots[:9], k, v, strict=False):
        page, token = divmod(slot, 16)
        if layout.padded_head_dim == 64:
            rows = expected[page].reshape(16, 2, LANES)[token]
            rows[:] = 0
            rows[:, :head_dim], rows[:, 64 : 64 + head_dim] = new_k, new_v
        else:
            rows = expected[page].reshape(2, 16, 2, LANES)[:, token]
            rows[:] = 0
            rows[0, :, :head_dim], rows[1, :, :head_dim] = new_k, new_v
    np.testing.assert_array_equal(np.asarray(written)[1:], expected[1:])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kv_write(dtype, head_dim, implementation):
    check_kv_write(implementation, dtype, head_dim)


def test_dispatch_by_name():
    case = make_case(np.random.default_rng(1), decode=[3], prefill=[])
    with pytest.raises(ValueError, match="no implementation 'fast'"):
        run_case(case, "fast")
