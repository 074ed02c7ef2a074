"""The page layout: what goes where, that it comes back, and what is refused."""

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import layout as layout_module
from pallas_kernels.layout import (
    LANES,
    MAX_RANK,
    SEGMENT_ROWS,
    TARGETS,
    AdapterLayout,
    KVLayout,
    choose_page_size,
    stored_rank,
)

features = st.integers(1, 300)
layouts = st.builds(
    AdapterLayout,
    in_features=st.tuples(*[features] * 7),
    out_features=st.tuples(*[features] * 7),
    rows_per_page=st.integers(1, 8).map(lambda k: 32 * k),
)
rank_tuples = st.tuples(*[st.one_of(st.just(0), st.integers(1, 40), st.just(MAX_RANK))] * 7)


@given(layouts, rank_tuples)
def test_segments_never_overlap(layout, ranks):
    a_row, b_row, total = layout.segments(ranks)
    spans = []
    for target, rank in enumerate(ranks):
        stored = stored_rank(rank)
        if stored:
            spans.append((a_row[target], layout.in_blocks[target] * stored))
            spans.append((b_row[target], layout.out_blocks[target] * stored))
    end = 0
    for start, rows in sorted(spans):
        assert start % SEGMENT_ROWS == 0
        assert end <= start < end + SEGMENT_ROWS
        end = start + rows
    assert end <= total < end + SEGMENT_ROWS
    pages = layout.num_pages(ranks)
    assert (pages - 1) * layout.rows_per_page < total <= pages * layout.rows_per_page or total == 0
    assert layout.num_pages([0] * 7) == 0


@given(layouts, rank_tuples, st.integers(0, 2**32 - 1))
def test_pack_and_unpack(layout, ranks, seed):
    rng = np.random.default_rng(seed)
    layers = [{}, {}, {}]
    for target, (name, rank) in enumerate(zip(TARGETS, ranks, strict=True)):
        for layer in layers:
            if rank and rng.random() < 0.8:
                # An adapter may have fewer ranks in one layer than another.
                true = int(rng.integers(1, rank + 1))
                layer[name] = (
                    rng.standard_normal((true, layout.in_features[target]), np.float32),
                    rng.standard_normal((layout.out_features[target], true), np.float32),
                )
    pages = layout.pack(layers, 3, ranks, np.float32)
    assert pages.shape == (3, layout.num_pages(ranks), layout.rows_per_page, LANES)
    nonzero = 0
    for layer, unpacked in zip(layers, layout.unpack(pages, ranks), strict=True):
        assert set(unpacked) == {name for name, rank in zip(TARGETS, ranks, strict=True) if rank}
        for name, (a, b) in unpacked.items():
            true_a, true_b = layer.get(name, (a[:0], b[:, :0]))
            rank = len(true_a)
            np.testing.assert_array_equal(a[:rank], true_a)
            np.testing.assert_array_equal(b[:, :rank], true_b)
            assert not a[rank:].any()
            assert not b[:, rank:].any()
            nonzero += np.count_nonzero(true_a) + np.count_nonzero(true_b)
    assert np.count_nonzero(pages) == nonzero  # padding rows and lanes are zeros


def test_rows_are_where_the_contract_says():
    """A of rank r: row j * r + rank holds columns 128 j .. 128 j + 127 of that rank."""
    layout = AdapterLayout((300,) * 7, (200,) * 7, rows_per_page=32)
    a = np.arange(3 * 300, dtype=np.float32).reshape(3, 300) + 1
    b = -np.arange(200 * 3, dtype=np.float32).reshape(200, 3) - 1
    ranks = (0, 3, 0, 0, 0, 0, 0)
    a_row, b_row, _ = layout.segments(ranks)
    rows = layout.pack({1: {"k": (a, b)}}, 2, ranks, np.float32)[1].reshape(-1, LANES)
    assert (a_row[1], b_row[1]) == (0, 32)
    np.testing.assert_array_equal(rows[1 * 8 + 2], a[2, 128:256])
    np.testing.assert_array_equal(rows[2 * 8 + 1, : 300 - 256], a[1, 256:])
    np.testing.assert_array_equal(rows[32 + 0 * 8 + 2], b[:128, 2])
    np.testing.assert_array_equal(rows[32 + 1 * 8 + 0, : 200 - 128], b[128:, 0])


def test_a_target_missing_everywhere_is_zeros():
    layout = AdapterLayout((64,) * 7, (64,) * 7, rows_per_page=32)
    assert not layout.pack({}, 2, (8,) * 7, np.float32).any()


@pytest.mark.parametrize("dtype", [np.dtype("float16"), np.dtype(ml_dtypes.bfloat16)])
def test_values_beyond_the_dtype_are_refused(dtype):
    layout = AdapterLayout((64,) * 7, (64,) * 7, rows_per_page=32)
    limit = float(ml_dtypes.finfo(dtype).max)
    a, b = np.zeros((4, 64), np.float32), np.zeros((64, 4), np.float32)
    b[5, 2] = np.nextafter(np.float32(limit), np.float32(np.inf))  # rounds down to the limit
    ranks = (0, 0, 4, 0, 0, 0, 0)
    assert layout.pack([{"v": (a, b)}], 1, ranks, dtype).max() == limit
    b[5, 2] = np.finfo(np.float32).max
    with pytest.raises(ValueError, match=r"layer 0, v, B: 3\.4\S*e\+38 at \[5, 2\] is beyond"):
        layout.pack([{"v": (a, b)}], 1, ranks, dtype)
    b[5, 2] = np.inf  # not ours to refuse
    layout.pack([{"v": (a, b)}], 1, ranks, dtype)


def test_shapes_that_do_not_fit_are_refused():
    layout = AdapterLayout((64,) * 7, (32,) * 7, rows_per_page=32)
    good = (np.zeros((4, 64)), np.zeros((32, 4)))
    for a, b, ranks in (
        (good[0][:, 1:], good[1], (4,) * 7),
        (good[0], good[1][1:], (4,) * 7),
        (good[0], good[1][:, 1:], (4,) * 7),
        (np.zeros((9, 64)), np.zeros((32, 9)), (8,) * 7),
    ):
        with pytest.raises(ValueError, match="layer 0, up: A"):
            layout.pack([{"up": (a, b)}], 1, ranks, np.float32)
    with pytest.raises(ValueError, match="layer 1 of an adapter of a model of 1 layers"):
        layout.pack([{}, {}], 1, (4,) * 7, np.float32)
    with pytest.raises(ValueError, match=r"rank 257 is outside 0\.\.256"):
        layout.num_pages((257,) + (0,) * 6)


def test_kv_layout():
    assert KVLayout(3, 64, 64).rows_per_page == 192
    assert KVLayout(3, 16, 64).padded_head_dim == 64
    assert KVLayout(8, 128, 32).rows_per_page == 512
    assert KVLayout(8, 80, 32).padded_head_dim == 128
    with pytest.raises(ValueError, match=r"multiple of 32, such as 32, 64, 128"):
        KVLayout(3, 64, 16)
    with pytest.raises(ValueError, match="head_dim=256 is not supported"):
        KVLayout(3, 256, 16).rows_per_page  # noqa: B018


@pytest.mark.parametrize(
    ("num_kv_heads", "head_dim", "itemsize", "expected"),
    [
        (8, 128, 2, 32),  # Llama-3-8B in bfloat16: 128 KiB
        (32, 128, 2, 16),  # Llama-7B: 256 KiB
        (3, 64, 4, 64),  # SmolLM2-135M in float32: 96 KiB
        (3, 64, 2, 128),  # in bfloat16: 96 KiB
        (2, 16, 4, 64),
    ],
)
def test_choose_page_size(num_kv_heads, head_dim, itemsize, expected):
    assert choose_page_size(num_kv_heads, head_dim, itemsize) == expected
    assert KVLayout(num_kv_heads, head_dim, expected).rows_per_page % SEGMENT_ROWS == 0


@given(st.integers(1, 128), st.integers(1, 128), st.sampled_from([2, 4]))
def test_every_model_has_a_page_size(num_kv_heads, head_dim, itemsize):
    KVLayout(num_kv_heads, head_dim, choose_page_size(num_kv_heads, head_dim, itemsize))


def test_layout_imports_no_jax():
    code = f"import sys, {layout_module.__name__}; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
