"""The parts of an adapter that devices have add up to the adapter, by either scheme."""

import numpy as np
import pytest

from pallas_kernels.layout import GROUPS, TARGETS
from slora_jax.adapter_partition import CUT_BY_INPUTS, WIDTH
from slora_jax.loading import adapter_partition
from tests.parallel.abstract_step import config_of

CONFIG = config_of(
    "llama-3.1-8b",
    num_layers=2,
    hidden_size=64,
    intermediate_size=96,
    num_heads=8,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=128,
)
SCHEMES = ("no_extra_collectives", "s_lora")
RANKS = (5, 24, 16, 40, 8, 0, 33)


def layer(rng):
    """a [r, in] and b [out, r] of the targets of rank above 0; k's rank is below its largest."""
    pairs = {}
    for target, rank in zip(TARGETS, RANKS, strict=True):
        inputs, outputs = CONFIG.target_features()[target]
        rank = 11 if target == "k" else rank
        if rank:
            pairs[target] = (
                rng.standard_normal((rank, inputs)),
                rng.standard_normal((outputs, rank)),
            )
    return pairs


def terms(partition, pages, x, devices):
    """Each device's term of each target, computed as the layers do from what is in its pages."""
    rows = partition.rows_per_page
    stages = []
    for device in range(devices):
        own = pages[:, :, device * rows : (device + 1) * rows].reshape(2, 1, -1, 128)
        of_device, first = [], 0
        for layout, ranks in zip(partition.stages, partition.stage_ranks(RANKS), strict=True):
            taken = layout.segments(ranks)[2]
            of_device.append(layout.unpack(own[:, :, first : first + taken], ranks)[1])
            first += taken
        stages.append(of_device)
    for target in TARGETS:
        if target not in stages[0][0]:
            continue
        inputs = [x[target]] * devices
        if target in CUT_BY_INPUTS:
            places = [own[TARGETS.index(target)] for own in partition.owned]
            inputs = [x[target][start:stop] for start, stop in places]
        hidden = [
            of_device[0][target][1] @ (of_device[0][target][0] @ own)
            for of_device, own in zip(stages, inputs, strict=True)
        ]
        if len(partition.stages) == 2:
            group = next(group for group in GROUPS if target in group)
            if target in CUT_BY_INPUTS:
                whole = np.sum(hidden, axis=0)
            else:
                share = partition.rank_share(RANKS[TARGETS.index(target)])
                whole = np.concatenate([own[:share] for own in hidden])[:WIDTH]
                whole = np.pad(whole, (0, WIDTH - len(whole)))
            side_by_side = np.zeros((len(group), WIDTH))
            side_by_side[group.index(target)] = whole
            hidden = [
                of_device[1][target][1] @ (of_device[1][target][0] @ side_by_side.reshape(-1))
                for of_device in stages
            ]
        yield target, hidden


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_parts_add_up(devices, scheme):
    rng = np.random.default_rng(devices)
    partition = adapter_partition(CONFIG, devices, scheme, 64)
    pairs = layer(rng)
    pages = partition.pack({1: pairs}, 2, RANKS, np.float64, range(devices))
    assert pages.shape == (2, partition.num_pages(RANKS), devices * 64, 128)
    x = {t: rng.standard_normal(CONFIG.target_features()[t][0]) for t in TARGETS}
    seen = []
    for target, parts in terms(partition, pages, x, devices):
        a, b = pairs[target]
        expected = b @ (a @ x[target])
        seen.append(target)
        if target in CUT_BY_INPUTS and len(partition.stages) == 2:
            np.testing.assert_allclose(np.concatenate(parts), expected)
        elif target in CUT_BY_INPUTS:
            np.testing.assert_allclose(np.sum(parts, axis=0), expected)
        else:
            for own, part in zip(partition.owned, parts, strict=True):
                np.testing.assert_allclose(part, expected[slice(*own[TARGETS.index(target)])])
    assert seen == ["q", "k", "v", "o", "gate", "down"]


def test_what_a_device_keeps_of_an_adapter():
    """Of 7B's shapes: (1 + 1/N) / 2 of it with ours, 1/N and the identities with S-LoRA's."""
    config = config_of("llama-7b")
    ranks = (64, 64, 64, 64, 0, 0, 0)
    whole = adapter_partition(config, 1, "s_lora", 512).num_rows(ranks)
    ours = [adapter_partition(config, n, "no_extra_collectives", 512) for n in (2, 4, 8)]
    assert [p.num_rows(ranks) / whole for p in ours] == [3 / 4, 5 / 8, 9 / 16]
    theirs = [adapter_partition(config, n, "s_lora", 512).num_rows(ranks) for n in (2, 4, 8)]
    # Beside 1/N: identities of 64 / N rows (in segments of 32) for each of q, k, v and 64 for o in
    # the shrink, and of 3 * 64 rows for each of q, k, v and 64 for o in the expand.
    identities = [3 * max(64 // n, 32) + 64 + 3 * 3 * 64 + 64 for n in (2, 4, 8)]
    parts = [whole // n for n in (2, 4, 8)]
    assert theirs == [part + rows for part, rows in zip(parts, identities, strict=True)]


def test_what_s_lora_does_not_take():
    partition = adapter_partition(CONFIG, 2, "s_lora", 64)
    pair = np.zeros((136, 64)), np.zeros((128, 136))
    with pytest.raises(ValueError, match="up to 128, not 136"):
        partition.pack({0: {"q": pair}}, 1, (136, 0, 0, 0, 0, 0, 0), np.float32, [0])
    with pytest.raises(ValueError, match="hidden size must be a multiple"):
        adapter_partition(config_of("llama-7b", hidden_size=4097), 2, "s_lora", 64)
