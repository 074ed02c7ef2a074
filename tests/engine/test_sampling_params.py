"""SamplingParams: what is accepted, what it becomes, and what each refusal says."""

import dataclasses
import math

import numpy as np
import pytest

from slora_jax.errors import InvalidRequestError
from slora_jax.sampling_params import SEED_BITS, SamplingParams, split_seed

VLLM_DEFAULTS = {
    "n": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "seed": None,
    "max_tokens": 16,
    "min_tokens": 0,
    "stop": (),
    "stop_token_ids": (),
    "ignore_eos": False,
    "logprobs": None,
    "prompt_logprobs": None,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "skip_special_tokens": True,
}


def test_names_and_defaults_are_those_of_vllm():
    assert dataclasses.asdict(SamplingParams()) == VLLM_DEFAULTS


def test_frozen_hashable_and_by_name_only():
    params = SamplingParams(stop=["a", "b"], stop_token_ids=[1, 2])
    assert hash(params) == hash(SamplingParams(stop=("a", "b"), stop_token_ids=(1, 2)))
    assert dataclasses.replace(params, n=2).stop == ("a", "b")
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2  # type: ignore
    with pytest.raises(TypeError):
        SamplingParams(2)  # type: ignore


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"stop": "\n"}, {"stop": ("\n",)}),
        ({"stop": ["a", "b", "a"]}, {"stop": ("a", "b")}),
        ({"stop": None, "stop_token_ids": None}, {"stop": (), "stop_token_ids": ()}),
        ({"stop_token_ids": [np.int64(3), 2, 3]}, {"stop_token_ids": (3, 2)}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"temperature": np.float32(0.5)}, {"temperature": 0.5}),
        ({"max_tokens": None, "min_tokens": 10**6}, {"max_tokens": None}),
        ({"max_tokens": 7, "min_tokens": 7}, {"min_tokens": 7}),
        ({"seed": 2**SEED_BITS - 1}, {"seed": 2**63 - 1}),
        ({"logprobs": 0, "prompt_logprobs": 20}, {"logprobs": 0, "prompt_logprobs": 20}),
    ],
    ids=str,
)
def test_values_are_normalised(given, kept):
    params = SamplingParams(**given)
    for name, value in kept.items():
        got = getattr(params, name)
        assert got == value
        assert type(got) is type(value)


BAD = {
    "n": [0, -1, 1.0, "1", True, None, 10**6],
    "temperature": [-0.1, math.nan, math.inf, "1", None, True, 1j, [1]],
    "top_p": [0, -0.5, 1.01, math.nan, None, True, "0.9"],
    "top_k": [-2, 1.5, 2**31, None, False],
    "min_p": [-0.1, 1.1, math.nan, None],
    "seed": [-1, 2**63, 0.5, "0", True],
    "max_tokens": [0, -1, 1.5, True, 2**31],
    "min_tokens": [-1, 17, None, 0.0],
    "stop": ["", ["a", ""], [1], 1, {"a"}, [str(k) for k in range(17)], b"a", [None]],
    "stop_token_ids": [[-1], [1.5], ["1"], [True], 7, "7", [2**31], list(range(257))],
    "ignore_eos": [None, 0, 1, "yes"],
    "logprobs": [-1, 21, 1.0, True],
    "prompt_logprobs": [-1, 21, 1.0, True],
    "repetition_penalty": [0, -1, math.nan, math.inf, None],
    "presence_penalty": [-2.1, 2.1, math.nan, None],
    "frequency_penalty": [-2.1, 2.1, math.nan, None],
    "skip_special_tokens": [None, 0, 1],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD.items() for value in values], ids=str
)
def test_a_bad_value_is_refused_by_name_value_and_range(name, value):
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{name: value})
    message = str(caught.value)
    assert f"SamplingParams.{name} must be " in message
    assert "got " in message
    if not isinstance(value, list):
        assert repr(value) in message or f"{value}" in message
    assert isinstance(caught.value, ValueError)  # What callers of vLLM catch.


def test_every_field_has_bad_values():
    assert set(BAD) == set(VLLM_DEFAULTS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"top_p": 1.5},
            "SamplingParams.top_p must be a finite number > 0 and <= 1, got 1.5 (float)",
        ),
        ({"n": True}, "SamplingParams.n must be an integer from 1 to 16384, got True (bool)"),
        (
            {"max_tokens": 0},
            "SamplingParams.max_tokens must be an integer from 1 to 2147483647 (or None), "
            "got 0 (int)",
        ),
        (
            {"min_tokens": 5, "max_tokens": 4},
            "SamplingParams.min_tokens must be at most max_tokens (4), got 5",
        ),
        (
            {"n": 2, "temperature": 0},
            "SamplingParams.n must be 1 when temperature is 0 (greedy: every output would be the "
            "same), got 2; set temperature > 0 for different outputs",
        ),
    ],
    ids=str,
)
def test_messages(options, message):
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**options)
    assert str(caught.value) == message


def test_from_dict():
    options = {"temperature": 0.5, "stop": ["\n"], "max_tokens": None}
    assert SamplingParams.from_dict(options) == SamplingParams(**options)
    assert SamplingParams.from_dict({}) == SamplingParams()
    with pytest.raises(InvalidRequestError, match=r"'temprature'; did you mean 'temperature'\?"):
        SamplingParams.from_dict({"temprature": 0.5})
    with pytest.raises(InvalidRequestError, match=r"no option 3; It has: n, temperature, top_p"):
        SamplingParams.from_dict({3: 0.5})  # type: ignore
    with pytest.raises(InvalidRequestError, match="top_p must be"):
        SamplingParams.from_dict({"top_p": 7})
    assert SamplingParams.from_dict(dataclasses.asdict(SamplingParams(seed=4))).seed == 4


def test_an_unknown_name_is_an_error():
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)  # type: ignore


def test_what_the_device_has_to_do():
    assert SamplingParams(temperature=0).is_greedy
    assert SamplingParams(temperature=0.9e-5).is_greedy
    assert not SamplingParams(temperature=1e-5).is_greedy
    assert not SamplingParams().has_truncation
    for options in ({"top_k": 1}, {"top_p": 0.9}, {"min_p": 0.1}):
        assert SamplingParams(**options).has_truncation
        assert not SamplingParams(temperature=0, **options).has_truncation
    assert not SamplingParams().has_penalties
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert SamplingParams(**{name: 0.5}).has_penalties


def test_seeds_keep_all_their_bits():
    seeds = [0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**63 - 1]
    words = [split_seed(seed) for seed in seeds]
    assert [high << 32 | low for high, low in words] == seeds
    assert all(0 <= word < 2**32 for pair in words for word in pair)
