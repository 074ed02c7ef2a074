"""Whatever a model is cut over, and however its adapters are, its tokens are those of the dense
oracle: in roomy pools and in pools so small that adapters leave and requests are preempted."""

import pytest

from slora_jax import LLM, SamplingParams
from slora_jax.forward_programs import WholeForward
from slora_jax.model_runner import row_buckets, step_buckets
from tests.serving import TinyModel, assert_only_idle_adapters_left, fresh_engine, random_prompts

NUM_TOKENS = 12
SEQS, TILE = 4, 8
OPTIONS = {"max_num_seqs": SEQS, "prefill_tile": TILE, "max_num_batched_tokens": 2 * TILE}
PROMPTS = random_prompts((29, 30, 31, 28, 27), seed=2)
ADAPTER_IDS = ["all", None, "attention", "mlp", "qv"]
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
SAMPLED = [
    SamplingParams(temperature=0.8, seed=1, max_tokens=6, ignore_eos=True),
    SamplingParams(temperature=0.8, seed=2, frequency_penalty=0.5, max_tokens=6, ignore_eos=True),
    SamplingParams(temperature=1.2, seed=3, top_k=30, top_p=0.9, max_tokens=6, ignore_eos=True),
    SamplingParams(temperature=0, logprobs=3, max_tokens=6, ignore_eos=True),
    SamplingParams(temperature=0, min_tokens=4, max_tokens=6),
]


def serve(model: TinyModel, devices: int, scheme: str) -> LLM:
    llm = model.serve(
        tensor_parallel=devices,
        lora_partition=scheme,
        max_model_len=64,
        page_size=32,
        pool_bytes=2**22,
        **OPTIONS,
    )
    runner = llm.engine._runner
    # Few programs: these serve any step, for the base's request is never alone.
    runner._steps._compiled |= {(0, 2, 64), (SEQS, 0, 64), (SEQS, 2, 64)}
    runner._samples._compiled.add((SEQS,))
    return llm


def tokens_of(llm: LLM, params) -> list[list[int]]:
    outputs = llm.generate(PROMPTS, ADAPTER_IDS, params, progress=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def check(
    model: TinyModel, devices: int, scheme: str, params=None, *, is_whole: bool = False
) -> list[list[int]]:
    """Greedy tokens are the oracle's; returns those of ``params``. ``is_whole``: by the form of
    program that GPUs and TPUs get, compiled ahead."""
    expected = [
        model.greedy(prompt, adapter, NUM_TOKENS)
        for prompt, adapter in zip(PROMPTS, ADAPTER_IDS, strict=True)
    ]
    with serve(model, devices, scheme) as llm:
        runner = llm.engine._runner
        if is_whole:
            runner._forward = WholeForward(llm._loaded.model, runner.view, llm._mesh, {})
            runner._steps, runner._samples = step_buckets("gpu", 4, 2, TILE), row_buckets("gpu", 4)
            llm.warm_up()
            ready = llm.stats().compiles
        assert tokens_of(llm, GREEDY) == expected
        assert not is_whole or llm.stats().compiles == ready
        others = [] if params is None else tokens_of(llm, params)
        assert_only_idle_adapters_left(llm)
        # As many pages as the largest adapter and one request need, and a few more.
        pages = max(info.num_pages for info in llm.list_adapters())
        with fresh_engine(llm, model.adapters, num_pages=pages + 4, **OPTIONS) as tight:
            assert tokens_of(tight, GREEDY) == expected
            stats = tight.stats()
            assert stats.evictions > 0
            assert stats.preemptions > 0
            assert_only_idle_adapters_left(tight)
        assert {array.sharding.num_devices for array in runner.pool} == {devices}
        return others


@pytest.mark.parametrize(
    ("devices", "scheme"),
    [
        pytest.param(2, "no_extra_collectives", marks=pytest.mark.full),
        (2, "s_lora"),
        pytest.param(4, "no_extra_collectives", marks=pytest.mark.full),
        (8, "no_extra_collectives"),
        pytest.param(4, "s_lora", marks=pytest.mark.full),
    ],
)
def test_tokens_do_not_depend_on_the_number_of_devices(gqa, devices, scheme):
    check(gqa, devices, scheme)


@pytest.mark.full
def test_devices_that_share_heads_sample_as_one_does(gqa):
    on_one = check(gqa, 1, "no_extra_collectives", SAMPLED)
    assert check(gqa, 8, "no_extra_collectives", SAMPLED) == on_one
    check(gqa, 8, "s_lora")


@pytest.mark.parametrize(
    "scheme", ["no_extra_collectives", pytest.param("s_lora", marks=pytest.mark.full)]
)
def test_a_model_whose_every_head_has_its_own_keys(mha, scheme):
    check(mha, 4, scheme, is_whole=scheme == "no_extra_collectives")
