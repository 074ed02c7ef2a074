"""Paged LoRA: one suite for every implementation, on fresh random steps."""

import functools

import jax
import numpy as np
import pytest

from pallas_kernels.layout import GROUPS, TARGETS, AdapterLayout
from pallas_kernels.paged_lora import api
from tests.kernels.lora_cases import LAYERS, SMALL, WIDE, dtype_of, make_case
from tests.kernels.tolerances import assert_close

IMPLEMENTATIONS = ("reference", "xla")
ALL = tuple(range(7))


@functools.partial(jax.jit, static_argnames=("layer", "groups", "layout", "implementation"))
def run(ys, xs, pool, batch, *, layer, groups, layout, implementation):
    """Each group's result, as one compiled step."""
    plan = api.prepare(batch, layout, implementation=implementation)
    return [
        api.paged_lora(y, x, pool[layer], plan, layer=layer, group=group, layout=layout)
        for y, x, group in zip(ys, xs, groups, strict=True)
    ]


def check(rng, case, dtype, implementation, *, groups=GROUPS, layer=LAYERS - 1):
    """The reference equals the dense answer; every other implementation equals the reference."""
    inputs = [case.inputs(rng, group, dtype) for group in groups]
    ys, xs = zip(*inputs, strict=True)
    arguments = {"layer": layer, "groups": groups, "layout": case.layout}
    actual = run(ys, xs, case.pool, case.batch, implementation=implementation, **arguments)
    if implementation == "reference":
        expected = [case.expected(y, x, layer, g) for (y, x), g in zip(inputs, groups, strict=True)]
    else:
        expected = run(ys, xs, case.pool, case.batch, implementation="reference", **arguments)
    for result, wanted, y, group in zip(actual, expected, ys, groups, strict=True):
        assert result.dtype == y.dtype
        assert_close(result, wanted, dtype, f"{implementation} {group}")
        base = case.index == 0
        np.testing.assert_array_equal(np.asarray(result)[base], y[base])
    return inputs, actual


def uniform(*ranks):
    return [(rank,) * 7 for rank in ranks]


STEPS = {
    "mixed ranks": (uniform(1, 16, 8, 33), [0, 1, 2, 3, 4, 2, 1, 0, 4]),
    "rank pattern": (
        [(4, 0, 16, 8, 0, 3, 40), (0, 9, 0, 0, 64, 0, 0), (0, 0, 0, 0, 0, 0, 8)],
        [3, 1, 2, 0, 1, 1, 2],
    ),
    "one adapter": (uniform(16), [1] * 12),
    "all distinct": (uniform(8, 2, 24, 8, 16, 1), [4, 2, 6, 1, 3, 5]),
    "one token with an adapter": (uniform(16), [0, 0, 0, 1]),
    "base only": (uniform(16), [0]),
    "base only, no adapter": ([], [0]),
    "an adapter without tokens": (uniform(8, 16), [0, 1, 0]),
}
TOKENS, RANK_BUCKET = 12, 128  # of all of them: the rest is padding


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows_per_page", [32, 96])
@pytest.mark.parametrize("step", STEPS)
def test_steps(step, rows_per_page, implementation):
    rng = np.random.default_rng([rows_per_page, len(step)])
    ranks, index = STEPS[step]
    index = np.pad(index, (0, TOKENS - len(index)))
    dtype = np.dtype("float32")
    case = make_case(
        rng,
        ranks,
        index,
        features=SMALL,
        rows_per_page=rows_per_page,
        dtype=dtype,
        rank_bucket=RANK_BUCKET,
    )
    check(rng, case, dtype, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(dtype, implementation):
    rng = np.random.default_rng(7)
    dtype = dtype_of(dtype)
    index = rng.integers(0, 5, TOKENS)
    case = make_case(
        rng,
        uniform(8, 12, 64, 1),
        index,
        features=SMALL,
        rows_per_page=96,
        dtype=dtype,
        rank_bucket=RANK_BUCKET,
    )
    check(rng, case, dtype, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_step_of_one_token(implementation):
    rng = np.random.default_rng(15)
    dtype = np.dtype("float32")
    case = make_case(rng, uniform(16), [1], features=SMALL, rows_per_page=64, dtype=dtype)
    check(rng, case, dtype, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_input_of_many_column_blocks(implementation):
    """More than an implementation may care to unroll, and no multiple of it."""
    rng = np.random.default_rng(16)
    dtype = np.dtype("float32")
    features = {"in_features": (64,) * 6 + (2200,), "out_features": (64,) * 7}
    ranks = [(0,) * 6 + (rank,) for rank in (8, 20)]
    index = [1, 2, 0, 2, 1]
    case = make_case(rng, ranks, index, features=features, rows_per_page=64, dtype=dtype)
    check(rng, case, dtype, implementation, groups=(("down",),))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ranks_up_to_256(implementation):
    """Segments that cross pages, in a wider model."""
    rng = np.random.default_rng(8)
    dtype = np.dtype("float32")
    ranks = [*uniform(256, 128), (1, 0, 256, 17, 0, 100, 8)]
    case = make_case(rng, ranks, [3, 1, 0, 2, 3], features=WIDE, rows_per_page=64, dtype=dtype)
    check(rng, case, dtype, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_many_tokens_in_any_order(implementation):
    """Prefill-like: more tokens than ranks, adapters interleaved."""
    rng = np.random.default_rng(10)
    dtype = np.dtype("float32")
    index = rng.integers(0, 4, 150)
    case = make_case(rng, uniform(8, 3, 16), index, features=SMALL, rows_per_page=32, dtype=dtype)
    check(rng, case, dtype, implementation, groups=(("q", "k", "v"), ("down",)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_rows_do_not_influence_each_other(garbage, implementation):
    """Garbage in x and y of some rows changes no bit of the others."""
    rng = np.random.default_rng(11)
    dtype = np.dtype("float32")
    index = np.pad([0, 1, 2, 2, 1, 0, 0, 2], (0, TOKENS - 8))
    case = make_case(
        rng,
        uniform(16, 8),
        index,
        features=SMALL,
        rows_per_page=96,
        dtype=dtype,
        rank_bucket=RANK_BUCKET,
    )
    inputs, clean = check(rng, case, dtype, implementation)
    spoiled = np.array([3, 4, 6, 7])
    others = np.setdiff1d(np.arange(TOKENS), spoiled)
    for y, x in inputs:
        y[spoiled] = garbage
        x[spoiled] = garbage
    ys, xs = zip(*inputs, strict=True)
    dirty = run(
        ys,
        xs,
        case.pool,
        case.batch,
        layer=LAYERS - 1,
        groups=GROUPS,
        layout=case.layout,
        implementation=implementation,
    )
    for before, after in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(np.asarray(before)[others], np.asarray(after)[others])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_row_does_not_depend_on_its_neighbours_adapters(implementation):
    """Bit for bit: with other adapters beside it, other ranks, table rows and page ids."""
    dtype = np.dtype("float32")
    mine = (16, 3, 0, 40, 8, 1, 24)
    results = []
    for seed, others in enumerate(([], [(64,) * 7], [(8,) * 7, (0, 0, 30, 0, 0, 0, 9)])):
        rng = np.random.default_rng([17, seed])
        row = len(others) // 2  # before, between or behind them
        ranks = [*others[:row], mine, *others[row:]]
        index = rng.integers(0, len(ranks) + 1, TOKENS)
        index[5] = row + 1
        case = make_case(
            rng,
            ranks,
            index,
            features=SMALL,
            rows_per_page=96,
            dtype=dtype,
            rank_bucket=RANK_BUCKET,
            fixed={row: np.random.default_rng(99)},
        )
        inputs = [case.inputs(rng, group, dtype) for group in GROUPS]
        for number, (y, x) in enumerate(inputs):
            fixed = np.random.default_rng(number)
            y[5], x[5] = fixed.standard_normal(y.shape[1]), fixed.standard_normal(x.shape[1])
        ys, xs = zip(*inputs, strict=True)
        outs = run(
            ys,
            xs,
            case.pool,
            case.batch,
            layer=LAYERS - 1,
            groups=GROUPS,
            layout=case.layout,
            implementation=implementation,
        )
        results.append([np.asarray(out)[5] for out in outs])
    for other in results[1:]:
        for before, after in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_random_steps(implementation):
    """Anything goes: adapters, ranks per target, absent targets, tokens."""
    dtype = np.dtype("float32")
    for seed in range(8):
        rng = np.random.default_rng([12, seed])
        ranks = [tuple(rng.choice([0, 0, 1, 5, 8, 16, 32], 7)) for _ in range(rng.integers(1, 5))]
        ranks = [r if max(r) else (8, *r[1:]) for r in ranks]
        index = rng.integers(0, len(ranks) + 1, TOKENS)
        case = make_case(
            rng,
            ranks,
            index,
            features=SMALL,
            rows_per_page=96,
            dtype=dtype,
            rank_bucket=RANK_BUCKET,
        )
        check(rng, case, dtype, implementation)


def test_bucket_sizes_never_overflow():
    layout = AdapterLayout(**SMALL, rows_per_page=64)
    for seed in range(50):
        rng = np.random.default_rng([13, seed])
        ranks = [tuple(rng.integers(0, 257, 7)) for _ in range(rng.integers(1, 9))]
        bucket = sum(-(-max(r) // 8) * 8 for r in ranks)
        rows, pages = api.lora_bucket_sizes(bucket, layout)
        assert rows >= len(ranks) + 1
        assert pages >= sum(layout.num_pages(r) for r in ranks)
    assert api.lora_bucket_sizes(0, layout) == (1, 1)
    with pytest.raises(ValueError, match="multiple of 8"):
        api.lora_bucket_sizes(12, layout)


def test_dispatch_by_name():
    rng = np.random.default_rng(14)
    dtype = np.dtype("float32")
    case = make_case(rng, uniform(8), [1, 0], features=SMALL, rows_per_page=64, dtype=dtype)
    with pytest.raises(ValueError, match="no implementation 'xlaa'"):
        api.prepare(case.batch, case.layout, implementation="xlaa")
    assert set(TARGETS) == {name for group in GROUPS for name in group}
