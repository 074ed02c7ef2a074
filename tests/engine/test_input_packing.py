"""A step's arrays against what each token of each chunk must find in them."""

from array import array
from types import SimpleNamespace

import numpy as np
import pytest

from pallas_kernels.layout import GROUPS, TARGETS
from slora_jax.adapter_partition import AdapterPartition
from slora_jax.adapter_tables import AdapterTables
from slora_jax.input_packing import (
    StepShape,
    first_rows,
    needed_shape,
    pack_sampling,
    pack_step,
    versions_of,
)
from slora_jax.request import Request
from slora_jax.sampling_params import SamplingParams
from slora_jax.scheduler import Chunk, SchedulerOutput

PAGE, TILE, WIDTH, SEATS, LAYERS = 4, 8, 12, 16, 3


def partition(scheme="no_extra_collectives", shards=1) -> AdapterPartition:
    features = dict.fromkeys(TARGETS, (256, 256))
    size = 256 // shards
    owned = [dict.fromkeys(TARGETS, (i * size, (i + 1) * size)) for i in range(shards)]
    return AdapterPartition.make(scheme, features, owned, rows_per_page=32)


def packed(ranks, scaling=1.0) -> SimpleNamespace:
    return SimpleNamespace(ranks=ranks, scaling=np.full((LAYERS, len(TARGETS)), scaling))


def request(name, prompt, outputs=(), *, in_flight=0, version=0, pages=()) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=list(prompt),
        sampling_params=SamplingParams(temperature=0),
        max_total_tokens=40,
        adapter_version=version,
        output_token_ids=list(outputs),
        num_tokens_in_flight=in_flight,
        pages=array("i", pages),
    )


def random_step(rng: np.random.Generator, versions: list[int]) -> SchedulerOutput:
    """Some requests that decode, known tokens and tokens in flight, and some that prefill."""
    pages = iter(rng.permutation(np.arange(1, 1 + SEATS * WIDTH)).tolist())
    decode, prefill = [], []
    for number in range(rng.integers(1, SEATS + 1)):
        length = int(rng.integers(1, 40))
        made = request(
            str(number),
            rng.integers(1, 99, length).tolist(),
            version=int(rng.choice(versions)),
            pages=[next(pages) for _ in range(-(-(length + 1) // PAGE))],
        )
        kind = rng.choice(["known", "in flight", "prefill"])
        if kind == "in flight":
            made.num_tokens_in_flight = 1
            decode.append(Chunk(made, length, 1, True))
        elif kind == "known" or length == 1:
            decode.append(Chunk(made, length - 1, 1, True))
        else:
            start = int(rng.integers(0, length - 1))
            stop = int(rng.integers(start + 2, length + 1))
            prefill.append(Chunk(made, start, stop - start, stop == length))
    return SchedulerOutput(decode=tuple(decode), prefill=tuple(prefill))


@pytest.mark.parametrize("seed", range(20))
def test_each_token_finds_its_own(seed):
    rng = np.random.default_rng(seed)
    adapters = AdapterTables(partition(), num_layers=LAYERS, max_adapters=5)
    ranks = {7: (8,) * 7, 3: (16, 0, 8, 0, 0, 0, 24), 5: (0,) * 6 + (8,)}
    for version, of_targets in ranks.items():
        adapters.place(version, packed(of_targets, version), range(version, 2 * version))
    output = random_step(rng, [0, *ranks])
    chunks = (*output.decode, *output.prefill)
    sampled_rows = {chunk.request.request_id: k for k, chunk in enumerate(chunks, start=40)}

    versions = versions_of(output)
    assert versions[0] == 0
    assert sorted(versions) == sorted({0, *(c.request.adapter_version for c in chunks)})
    need = needed_shape(output, adapters.sum_of_ranks(versions), TILE)
    assert need.decode == len(output.decode)
    assert need.rank == sum(max(ranks[version]) for version in versions[1:])
    shape = StepShape(need.decode + 2, need.tiles + 1, need.rank + 16)
    batch = pack_step(
        output,
        adapters,
        versions,
        shape,
        sampled_rows,
        tile=TILE,
        page_size=PAGE,
        table_width=WIDTH,
        max_num_seqs=SEATS,
    )

    attention, lora = batch.attention, batch.lora.stages[0]
    ending, unused = [], set(range(shape.decode + shape.tiles * TILE))
    unused_tables = set(range(shape.decode + shape.tiles))
    for chunk, first in zip(chunks, first_rows(output, shape.decode, TILE), strict=True):
        made, pages = chunk.request, chunk.request.pages.tolist()
        for row, position in enumerate(range(chunk.start, chunk.start + chunk.num_tokens), first):
            unused.remove(row)
            assert attention.positions[row] == position
            assert attention.slots[row] == pages[position // PAGE] * PAGE + position % PAGE
            if position < made.num_tokens:
                assert batch.token_ids[row] == made.prompt_token_ids[position]
                assert row >= shape.decode or batch.sampled_row[row] == -1
            else:
                assert batch.sampled_row[row] == sampled_rows[made.request_id]
            table = row if row < shape.decode else shape.decode + (row - shape.decode) // TILE
            unused_tables.discard(table)
            assert attention.page_table[table].tolist() == pages + [0] * (WIDTH - len(pages))
            version = versions[lora.adapter_index[row]]
            assert version == made.adapter_version
        if chunk.is_last:
            ending.append(first + chunk.num_tokens - 1)
    padding = sorted(unused)
    assert (attention.positions[padding] == -1).all()
    for zeros in (attention.slots, batch.token_ids, lora.adapter_index):
        assert not zeros[padding].any()
    assert not attention.page_table[sorted(unused_tables)].any()
    assert (batch.sampled_row[need.decode :] == -1).all()
    assert batch.ending_row.tolist() == ending + [0] * (SEATS - len(ending))

    for index, version in enumerate(versions):
        assert lora.rank[index].tolist() == list(ranks.get(version, (0,) * 7))
        assert (lora.scaling[:, index] == version).all()
        start = lora.page_start[index]
        assert lora.pages[start : start + version].tolist() == list(range(version, 2 * version))
    assert not lora.rank[len(versions) :].any()


def test_a_step_of_the_base_alone_has_no_lora():
    output = SchedulerOutput(decode=(Chunk(request("a", [1, 2], pages=[3]), 1, 1, True),))
    adapters = AdapterTables(partition(), num_layers=LAYERS, max_adapters=5)
    batch = pack_step(
        output,
        adapters,
        versions_of(output),
        StepShape(1, 0, 0),
        {},
        tile=TILE,
        page_size=PAGE,
        table_width=WIDTH,
        max_num_seqs=SEATS,
    )
    assert batch.lora is None
    assert batch.token_ids.tolist() == [2]


def test_rows_of_adapters_that_left_are_used_again():
    adapters = AdapterTables(partition(), num_layers=LAYERS, max_adapters=2)
    assert adapters.groups == ()
    adapters.place(1, packed((8,) + (0,) * 6, 0.5), [4])
    adapters.place(2, packed((0,) * 6 + (32,), 2.0), [5, 6])
    assert adapters.groups == (GROUPS[0], GROUPS[3])
    assert (adapters.sum_of_ranks([0, 1, 2]), adapters.num_pages([0, 1, 2])) == (40, 3)
    adapters.forget(1)
    adapters.forget(1)
    adapters.place(3, packed((16,) * 7, 3.0), [9])
    index = np.zeros(1, np.int32)
    (lora,) = adapters.pack([0, 3], index, rank_bucket=64, most_adapters=SEATS).stages
    assert lora.rank[:3].tolist() == [[0] * 7, [16] * 7, [0] * 7]
    assert lora.scaling[:, 1].tolist() == [[3.0] * 7] * LAYERS
    assert lora.pages[:2].tolist() == [9, 0]
    adapters.clear()
    adapters.place(4, packed((8,) * 7), [1])
    adapters.place(5, packed((8,) * 7), [2])
    assert adapters.num_pages([0, 4, 5]) == 2


def test_of_several_stages_the_last_one_scales():
    adapters = AdapterTables(partition("s_lora", shards=2), num_layers=LAYERS, max_adapters=2)
    adapters.place(1, packed((16,) * 7, 0.5), [4, 5])
    index = np.zeros(1, np.int32)
    shrink, expand = adapters.pack([0, 1], index, rank_bucket=16, most_adapters=SEATS).stages
    assert (shrink.scaling == 1).all()
    assert (expand.scaling[:, 1] == 0.5).all()
    assert shrink.rank[1].tolist() == [8, 8, 8, 16, 8, 8, 16]
    assert expand.rank[1].tolist() == [16] * 7
    assert shrink.pages.tolist() == expand.pages.tolist()


def test_plain_greedy_requests_compile_no_part_of_sampling():
    plain = SamplingParams(temperature=0, top_p=0.5, stop="x", logprobs=3)
    assert plain.is_argmax
    made = request("a", [1, 2])
    made.sampling_params = plain
    how = pack_sampling([made], 4, {})
    assert (how.randomness, how.truncation, how.penalties, how.banned) == (None,) * 4
    made.sampling_params = SamplingParams(temperature=0, repetition_penalty=1e-300)
    (tiny, *_) = pack_sampling([made], 4, {}).penalties.repetition
    assert np.isfinite(np.float32(1e7) / tiny)  # a large logit's
    for option in ({"min_tokens": 2}, {"presence_penalty": 1.0}, {"temperature": 1.0}):
        assert not SamplingParams(**{"temperature": 0, **option}).is_argmax
