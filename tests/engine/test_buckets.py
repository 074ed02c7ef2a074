"""Which compiled sizes serve a step."""

import pytest

from slora_jax.model_runner import row_buckets, step_buckets, steps_to_come

NEEDS = [(d, t, r) for d in (0, 1, 5, 33, 48) for t in (0, 1, 3, 16) for r in (0, 8, 700) if d or t]


@pytest.mark.parametrize("kernels", ["xla", "reference", "gpu", "tpu"])
def test_a_bucket_holds_what_is_needed_within_the_largest(kernels):
    buckets = step_buckets(kernels, 48, 16, 8)
    for need in NEEDS:
        size = buckets.choose(need)
        assert all(s >= n for s, n in zip(size, need, strict=True))
        assert size[0] <= 48
        assert size[1] <= 16
        # No tile, no rank: other programs, without attention tiles, without LoRA.
        assert [s == 0 for s in size[1:]] == [n == 0 for n in need[1:]]


def test_plain_xla_pays_for_each_row():
    buckets = step_buckets("xla", 256, 32, 8)
    assert buckets.choose((5, 0, 8)) == (8, 0, 8)
    assert buckets.choose((33, 3, 0)) == (64, 4, 0)
    assert buckets.choose((3, 0, 8)) == (8, 0, 8)  # a shrinking batch keeps its program,
    assert buckets.choose((1, 0, 8)) == (1, 0, 8)  # up to a point


def test_kernels_share_programs():
    buckets = step_buckets("gpu", 256, 128, 16)
    sizes = {buckets.choose((d, 0, r)) for d in range(1, 257) for r in (0, 8, 512, 1024)}
    assert sizes == {(d, 0, r) for d in (16, 64, 128, 192, 256) for r in (0, 1024)}
    mixed = {buckets.choose((d, t, 8)) for d in range(0, 200, 7) for t in range(1, 129)}
    assert mixed == {(d, 8 * t, 1024) for d in (64, 128, 256) for t in (1, 2, 3, 4, 6, 8, 12, 16)}


@pytest.mark.parametrize(
    ("kernels", "ranks"), [("tpu", (0, 1, 700)), ("gpu", (0, 1, 700)), ("xla", (0, 175, 700))]
)
def test_what_is_compiled_ahead_serves_every_step(kernels, ranks):
    buckets = step_buckets(kernels, 100, 32, 16)
    ahead = {buckets.choose(need) for need in steps_to_come(kernels, 100, 32, 700)}
    for decode in range(101):
        for tiles in range(33):
            for rank in ranks:
                if decode or tiles:
                    assert buckets.choose((decode, tiles, rank)) in ahead


def test_rows():
    buckets = row_buckets("xla", 48)
    assert [buckets.choose((n,)) for n in (3, 40, 11, 7)] == [(4,), (48,), (48,), (8,)]
