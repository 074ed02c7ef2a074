"""Sampling, log-probabilities, stopping, streaming and Ctrl-C, through a whole engine.

What an option does to one row of logits is tested in tests/models/test_sampling.py. Here the logits
are the dense oracle's, and the tokens must be what the options' definitions make of them.
"""

import functools
import signal
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from slora_jax import LLM, SamplingParams
from slora_jax.outputs import CompletionOutput, RequestOutput
from tests.engine.conftest import SERVED
from tests.models.test_sampling import numpy_kept, numpy_penalise
from tests.oracle import DenseLlama
from tests.serving import (
    TinyModel,
    assert_only_idle_adapters_left,
    fresh_engine,
    log_softmax,
    random_prompts,
    scripted_tokens,
)
from tests.transformers_oracle import TransformersModel

PROMPTS = random_prompts((14, 41, 1, 30), seed=5)
ADAPTER_IDS = ["wide", None, "wide", "qv"]


def generate(llm: LLM, prompts, adapter_ids, params) -> list[RequestOutput]:
    return llm.generate(prompts, adapter_ids, params, progress=False)


def one(llm: LLM, params: SamplingParams, prompt=PROMPTS[0], adapter="wide") -> CompletionOutput:
    return generate(llm, prompt, adapter, params)[0].outputs[0]


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    return [list(completion.token_ids) for output in outputs for completion in output.outputs]


def numpy_greedy(
    oracle: DenseLlama, prompt: list[int], count: int, adjust: Callable[..., np.ndarray]
) -> list[int]:
    """The likeliest tokens after ``adjust(logits, output so far)``."""
    output: list[int] = []
    for _ in range(count):
        logits = oracle.logits([*prompt, *output])[-1]
        output.append(int(np.argmax(adjust(logits, output))))
    return output


@pytest.fixture
def cramped(compiled_llm: LLM, tiny: TinyModel) -> Iterator[LLM]:
    """A pool in which not all of ``PROMPTS`` can run at once."""
    adapters = {name: tiny.adapters[name] for name in ADAPTER_IDS if name}
    options = {**SERVED, "max_num_batched_tokens": 32}
    with fresh_engine(compiled_llm, adapters, num_pages=10, **options) as llm:
        yield llm
        assert_only_idle_adapters_left(llm)


# --- seeds ---

SEEDED = [
    SamplingParams(seed=seed, temperature=0.9, max_tokens=30, ignore_eos=True, **truncation)
    for seed, truncation in zip((1, 2, 3, 2**62), ({}, {"top_p": 0.9}, {}, {}), strict=True)
]


@pytest.fixture(scope="module")
def seeded_tokens(compiled_llm: LLM, tiny: TinyModel) -> list[list[int]]:
    """Of each prompt served alone."""
    with fresh_engine(compiled_llm, tiny.adapters, **SERVED, max_num_batched_tokens=32) as llm:
        requests = zip(PROMPTS, ADAPTER_IDS, SEEDED, strict=True)
        return [tokens_of(generate(llm, *request))[0] for request in requests]


def test_seeded_tokens_do_not_depend_on_neighbours(llm: LLM, seeded_tokens):
    others = random_prompts((9, 3), seed=6)
    unseeded = [SamplingParams(max_tokens=50), SamplingParams(temperature=0, max_tokens=7)]
    outputs = generate(llm, [*others, *PROMPTS], ["qv", None, *ADAPTER_IDS], [*unseeded, *SEEDED])
    assert tokens_of(outputs[2:]) == seeded_tokens


def test_seeded_tokens_survive_preemption(cramped: LLM, seeded_tokens):
    outputs = generate(cramped, PROMPTS, ADAPTER_IDS, SEEDED)
    assert tokens_of(outputs) == seeded_tokens
    assert sum(output.metrics.num_preemptions for output in outputs) > 0


def test_n_completions_are_n_requests_with_seeds_that_follow(llm: LLM):
    sampled = {"temperature": 0.9, "max_tokens": 6, "ignore_eos": True}
    (together,) = generate(llm, PROMPTS[0], "qv", SamplingParams(n=3, seed=7, **sampled))
    each = [SamplingParams(seed=7 + k, **sampled) for k in range(3)]
    apart = tokens_of(generate(llm, [PROMPTS[0]] * 3, "qv", each))
    assert tokens_of([together]) == apart
    assert [completion.index for completion in together.outputs] == [0, 1, 2]
    assert len(set(map(tuple, apart))) == 3


def test_requests_without_a_seed_draw_from_the_engines(compiled_llm: LLM):
    def draw(seed: int) -> list[list[int]]:
        options = {**SERVED, "max_num_batched_tokens": 32, "seed": seed}
        with fresh_engine(compiled_llm, {}, **options) as llm:
            return tokens_of(generate(llm, [PROMPTS[0]] * 2, None, SamplingParams(max_tokens=6)))

    first, again, other = draw(1), draw(1), draw(2)
    assert first == again != other
    assert first[0] != first[1]


# --- log-probabilities ---

SCORED = SamplingParams(
    temperature=0, max_tokens=20, ignore_eos=True, logprobs=5, prompt_logprobs=3
)


def check_logprobs(outputs: list[RequestOutput], logits_of: Callable[..., np.ndarray]) -> None:
    """Those of every token, against ``logits_of(token ids, adapter)``."""
    for output in outputs:
        (completion,) = output.outputs
        prompt, tokens = list(output.prompt_token_ids), list(completion.token_ids)
        expected = log_softmax(np.float64(logits_of([*prompt, *tokens[:-1]], output.adapter_id)))
        first, *prompt_scores = output.prompt_logprobs
        assert first is None
        assert len(prompt_scores) == len(prompt) - 1
        scores = [*((s, 3) for s in prompt_scores), *((s, 5) for s in completion.logprobs)]
        for row, token, (score, num_top) in zip(
            expected, [*prompt[1:], *tokens], scores, strict=True
        ):
            likeliest = np.argsort(-row)[:num_top].tolist()
            assert set(score) == {*likeliest, token}
            for token_id, entry in score.items():
                assert entry.logprob == pytest.approx(row[token_id], abs=1e-3)
                assert entry.rank == 1 + (row > row[token_id]).sum()
        own = [score[t].logprob for score, t in zip(completion.logprobs, tokens, strict=True)]
        assert completion.cumulative_logprob == pytest.approx(sum(own))


def test_logprobs_are_the_log_softmax_of_the_raw_logits(llm: LLM, tiny: TinyModel):
    outputs = generate(llm, PROMPTS, ADAPTER_IDS, SCORED)
    check_logprobs(outputs, lambda ids, adapter: tiny.oracle(adapter).logits(ids))
    assert outputs[1].outputs[0].logprobs[0][outputs[1].outputs[0].token_ids[0]].decoded_token


@pytest.mark.oracle
def test_logprobs_equal_transformers(llm: LLM, tiny: TinyModel):
    adapters = {name: tiny.adapters[name] for name in ADAPTER_IDS if name}
    reference = TransformersModel(tiny.directory, adapters)
    check_logprobs(generate(llm, PROMPTS, ADAPTER_IDS, SCORED), reference.logits)


def test_logprobs_survive_preemption(cramped: LLM, tiny: TinyModel):
    outputs = generate(cramped, PROMPTS, ADAPTER_IDS, SCORED)
    assert sum(output.metrics.num_preemptions for output in outputs) > 0
    check_logprobs(outputs, lambda ids, adapter: tiny.oracle(adapter).logits(ids))


def test_logprobs_are_raw_whatever_the_sampling(llm: LLM, tiny: TinyModel):
    options = {"repetition_penalty": 1.5, "top_k": 3, "min_tokens": 2, "seed": 1}
    completion = one(llm, SamplingParams(logprobs=0, max_tokens=4, temperature=2.0, **options))
    tokens = list(completion.token_ids)
    logits = tiny.oracle("wide").logits([*PROMPTS[0], *tokens[:-1]])
    expected = log_softmax(logits)[-len(tokens) :]
    for row, token, score in zip(expected, tokens, completion.logprobs, strict=True):
        assert list(score) == [token]
        assert score[token].logprob == pytest.approx(row[token], abs=1e-3)


# --- truncation and penalties ---


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 5, "temperature": 3.0},
        {"top_p": 0.8, "temperature": 1.5},
        {"min_p": 0.1, "temperature": 1.5},
        {"top_k": 20, "top_p": 0.9, "min_p": 0.05, "temperature": 2.0},
    ],
    ids=lambda options: "+".join(options),
)
def test_what_truncation_keeps_is_drawn_and_nothing_else(llm: LLM, tiny: TinyModel, options):
    draws = 200
    (output,) = generate(
        llm, PROMPTS[2], "qv", SamplingParams(n=draws, seed=1, max_tokens=1, **options)
    )
    drawn = {tokens[0] for tokens in tokens_of([output])}
    full = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, **options}
    kept, probabilities = numpy_kept(tiny.oracle("qv").logits(PROMPTS[2])[-1], **full)
    assert drawn <= set(np.flatnonzero(kept).tolist())
    shares = np.where(kept, probabilities, 0) / probabilities[kept].sum()
    likely = set(np.flatnonzero(shares > 0.05).tolist())  # missed by 200 draws: once in 28,000
    assert len(likely) > 1
    assert likely <= drawn


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.8},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 1.5},
        {"repetition_penalty": 0.8, "presence_penalty": -1.0, "frequency_penalty": 0.7},
    ],
    ids=lambda options: "+".join(options),
)
def test_penalties_change_the_greedy_tokens_as_defined(llm: LLM, tiny: TinyModel, options):
    names = ("repetition_penalty", "presence_penalty", "frequency_penalty")
    values = [options.get(name, float(name == "repetition_penalty")) for name in names]
    expected = numpy_greedy(
        tiny.oracle("wide"),
        PROMPTS[0],
        30,
        lambda logits, output: numpy_penalise(logits, PROMPTS[0], output, *values),
    )
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, **options)
    assert list(one(llm, params).token_ids) == expected
    assert expected != tiny.greedy(PROMPTS[0], "wide", 30)


# --- how it ends ---

Greedy = functools.partial(SamplingParams, temperature=0)


def test_max_tokens_ends_with_length(llm: LLM, tiny: TinyModel):
    completion = one(llm, Greedy(max_tokens=5, ignore_eos=True))
    assert list(completion.token_ids) == tiny.greedy(PROMPTS[0], "wide", 5)
    assert (completion.finish_reason, completion.stop_reason) == ("length", None)
    assert completion.text == llm.tokenizer.decode(completion.token_ids)


def test_without_max_tokens_the_model_length_is_the_end(llm: LLM):
    prompt = random_prompts((120,))[0]
    completion = one(llm, Greedy(max_tokens=None, ignore_eos=True), prompt)
    assert len(completion.token_ids) == llm.max_model_len - 120
    assert completion.finish_reason == "length"


def test_end_of_sequence_and_stop_tokens(llm: LLM, tiny: TinyModel):
    greedy = tiny.greedy(PROMPTS[0], "wide", 12)
    end = greedy[4]
    assert greedy.index(end) == 4
    stopped = one(llm, Greedy(max_tokens=12, stop_token_ids=[end]))
    assert list(stopped.token_ids) == greedy[:5]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", end)
    assert stopped.text == llm.tokenizer.decode(greedy[:4])

    assert llm._engine._eos_token_ids == tiny.checkpoint.config["eos_token_ids"]
    llm._engine._eos_token_ids = (end,)
    ended = one(llm, Greedy(max_tokens=12))
    assert list(ended.token_ids) == greedy[:5]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", None)
    assert ended.text == stopped.text
    ignored = one(llm, Greedy(max_tokens=12, ignore_eos=True))
    assert list(ignored.token_ids) == greedy

    def without_ends(logits: np.ndarray, output: list[int]) -> np.ndarray:
        return np.where((np.arange(len(logits)) == end) & (len(output) < 8), -np.inf, logits)

    later = one(llm, Greedy(max_tokens=12, min_tokens=8))
    expected = numpy_greedy(tiny.oracle("wide"), PROMPTS[0], 12, without_ends)
    cut = expected.index(end) + 1 if end in expected else 12
    assert list(later.token_ids) == expected[:cut]
    assert cut > 8


def test_stop_strings_cut_the_text_across_tokens(llm: LLM):
    script = list(b"the quick brown fox jumps over the lazy dog")
    with scripted_tokens(llm, script):
        completion = one(llm, Greedy(max_tokens=40, stop=["wolf", "n fo"]))
        assert (completion.finish_reason, completion.stop_reason) == ("stop", "n fo")
        assert completion.text == "the quick brow"
        assert list(completion.token_ids) == script[:18]
        later = one(llm, Greedy(max_tokens=40, stop="the", min_tokens=3))
        assert later.text == "the quick brown fox jumps over "
        unmatched = one(llm, Greedy(max_tokens=9, stop="quick brown"))
        assert (unmatched.finish_reason, unmatched.text) == ("length", "the quick")


# --- streaming ---


def test_streamed_deltas_add_up_to_what_generate_returns(llm: LLM):
    params = [
        SamplingParams(seed=1, n=2, max_tokens=9),
        Greedy(max_tokens=12, stop=["e"]),
        Greedy(max_tokens=1),
        SamplingParams(seed=5, max_tokens=20, temperature=0.5),
    ]
    expected = generate(llm, PROMPTS, ADAPTER_IDS, params)
    texts: dict[tuple[int, int], str] = {}
    finished = []
    for index, output in llm.stream(PROMPTS, ADAPTER_IDS, params):
        assert index not in finished
        for completion in output.outputs:
            before = texts.get((index, completion.index), "")
            delta = completion.text.removeprefix(before)
            assert before + delta == completion.text  # what was shown is never taken back
            texts[index, completion.index] = before + delta
        if output.finished:
            finished.append(index)
            assert tokens_of([output]) == tokens_of([expected[index]])
    assert sorted(finished) == [0, 1, 2, 3]
    whole = {(i, c.index): c.text for i, output in enumerate(expected) for c in output.outputs}
    assert texts == whole


def test_streams_never_split_a_character(llm: LLM):
    text = "naïve 你好, 🌍🏽!"
    script = list(text.encode())
    with scripted_tokens(llm, script):
        partial = [
            output.outputs[0].text
            for _, output in llm.stream(PROMPTS[0], None, Greedy(max_tokens=len(script)))
        ]
    assert len(partial) == len(script)
    assert partial[-1] == text
    assert set(partial) == {text[:end] for end in range(1, len(text) + 1)}


def test_leaving_a_stream_aborts_its_requests(llm: LLM):
    stream = llm.stream(PROMPTS, ADAPTER_IDS, Greedy(max_tokens=50, ignore_eos=True))
    for _ in range(6):
        next(stream)
    assert llm.stats().pages_kv > 0
    stream.close()
    assert_only_idle_adapters_left(llm)


def test_a_stream_that_nobody_reads_queues_nothing(llm: LLM):
    llm.stream(PROMPTS, ADAPTER_IDS, Greedy(max_tokens=50))
    assert_only_idle_adapters_left(llm)


# --- Ctrl-C ---


@pytest.mark.parametrize("how", ["generate", "stream"])
@pytest.mark.parametrize("where", ["add_request", "step"])
def test_ctrl_c_aborts_the_call_and_the_engine_serves_on(
    llm: LLM, tiny: TinyModel, monkeypatch, how: str, where: str
):
    engine, calls = llm._engine, []
    method = getattr(engine, where)

    def interrupted(*args, **kwargs):
        result = method(*args, **kwargs)
        calls.append(result)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return result

    handler = signal.getsignal(signal.SIGINT)
    params = Greedy(max_tokens=20, ignore_eos=True)
    with monkeypatch.context() as patch:
        patch.setattr(engine, where, interrupted)
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012 (a stream raises when it is read)
            if how == "generate":
                generate(llm, PROMPTS, ADAPTER_IDS, params)
            else:
                list(llm.stream(PROMPTS, ADAPTER_IDS, params))
    assert len(calls) <= 4
    assert signal.getsignal(signal.SIGINT) is handler
    assert_only_idle_adapters_left(llm)
    outputs = generate(llm, PROMPTS, ADAPTER_IDS, params)
    assert tokens_of(outputs) == [
        tiny.greedy(prompt, adapter, 20)
        for prompt, adapter in zip(PROMPTS, ADAPTER_IDS, strict=True)
    ]
