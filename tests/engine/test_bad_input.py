"""Bad input, bad luck and rough handling: one clear error each, and the engine serves on.

One tiny LLM serves the whole module. Whatever a test does to it, afterwards it must give the same
tokens as at first and hold nothing; what is refused must not have run anything at all. A test that
has to break an engine gets one of its own (``scratch``).
"""

import contextlib
import copy
import dataclasses
import gc
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import checkpoints
from checkpoints.synthetic import write_synthetic_adapter
from slora_jax import (
    LLM,
    AdapterInUseError,
    AdapterLoadError,
    AdapterNotFoundError,
    CapacityError,
    ConfigError,
    EngineClosedError,
    EngineConfig,
    InvalidRequestError,
    ModelLoadError,
    RequestFailedError,
    SamplingParams,
    SloraError,
    page_pool,
)
from slora_jax.page_pool import RUN_AXES, HostMemory
from slora_jax.sharding import named_sharding
from tests.serving import TinyModel, assert_only_idle_adapters_left, fresh_engine

OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "prefill_tile": 16,
    "max_model_len": 128,
    "page_size": 16,
    "pool_bytes": 21 * 2**15,  # 20 usable pages of 16 tokens
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "good": {"rank": 4, "targets": ("q", "v")},
    "wide": {"rank": 24},  # 14 pages: with it, 6 are left for KV
    "huge": {"rank": 64},  # more than all
}
STEP_SIZES = {(d, t, rank) for d in (0, 4) for t in (0, 4) for rank in (0, 32) if d or t}
"""(decode rows, tiles, ranks): the few that are compiled."""

USER = {"role": "user", "content": "hi"}
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def answer(llm: LLM, prompt="hello there", adapter="good", num_tokens=3) -> tuple[int, ...]:
    (output,) = llm.generate(prompt, adapter, greedy(num_tokens), progress=False)
    return output.outputs[0].token_ids


@dataclasses.dataclass(eq=False)
class Served:
    model: TinyModel
    llm: LLM
    answer: tuple[int, ...] = ()


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Served]:
    model = TinyModel.write(tmp_path_factory.mktemp("bad_input"), ADAPTERS)
    with LLM(model.directory, progress=False, **OPTIONS) as llm:
        runner = llm._engine._runner
        runner._steps._compiled |= STEP_SIZES
        runner._samples._compiled.add((4,))
        llm.load_adapter("good", model.adapters["good"])
        served = Served(model, llm)
        served.answer = answer(llm)
        ids = llm.tokenizer.encode("hello there")
        assert list(served.answer) == model.greedy(ids, "good", 3)
        yield served


@pytest.fixture
def llm(served: Served) -> Iterator[LLM]:
    """The module's LLM, found after the test as it was before."""
    names = [info.name for info in served.llm.list_adapters()]
    host_bytes = served.llm.stats().adapter_host_bytes
    yield served.llm
    for name in {info.name for info in served.llm.list_adapters()} - set(names):
        served.llm.unload_adapter(name)
    assert_only_idle_adapters_left(served.llm)
    assert answer(served.llm) == served.answer
    assert_only_idle_adapters_left(served.llm)
    assert served.llm.stats().adapter_host_bytes == host_bytes
    assert served.llm.stats().adapters_pinned == 0


@pytest.fixture
def scratch(served: Served) -> Iterator[LLM]:
    """The same LLM with an engine of its own, which the test may break."""
    runner = served.llm._engine._runner
    pool, resident = tuple(map(jnp.copy, runner.pool)), copy.deepcopy(runner._adapters)
    close = runner.close
    runner.close = lambda: None  # the weights and the programs are the module's
    try:
        good = {"good": served.model.adapters["good"]}
        with fresh_engine(served.llm, good, **OPTIONS) as llm:
            yield llm
    finally:
        runner.pool, runner._adapters, runner.close = pool, resident, close


@pytest.fixture(scope="module")
def arrays(served: Served) -> dict[str, np.ndarray]:
    return load_file(served.model.adapters["good"] / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def adapter_config(served: Served) -> dict[str, Any]:
    return json.loads((served.model.adapters["good"] / "adapter_config.json").read_text())


@contextlib.contextmanager
def refused(llm: LLM, error: type[SloraError], *words: str) -> Iterator[None]:
    """The block raises exactly ``error``, saying all ``words``, and leaves no trace."""
    before = llm.stats()
    with pytest.raises(SloraError) as caught:
        yield
    assert type(caught.value) is error
    message = str(caught.value)
    for word in words:
        assert word in message
    assert len(message) < 1000
    assert llm.stats() == before


def cases(*given: tuple[Any, ...]) -> pytest.MarkDecorator:
    """``(id, value, error, *words)`` → parameters ``value, error, words``."""
    return pytest.mark.parametrize(
        ("value", "error", "words"),
        [pytest.param(value, error, words, id=name) for name, value, error, *words in given],
    )


# --- prompts ---

BAD_PROMPTS = (
    ("none", None, InvalidRequestError, "prompts is None", "give text"),
    ("int", 5, InvalidRequestError, "prompts is 5"),
    ("float", 1.5, InvalidRequestError, "prompts is 1.5"),
    ("bytes", b"abc", InvalidRequestError, "prompts is b'abc'"),
    ("bytearray", bytearray(b"abc"), InvalidRequestError, "bytearray"),
    ("dict", {"prompt": "a"}, InvalidRequestError, "prompts is {'prompt'"),
    ("set", {1, 2, 3}, InvalidRequestError, "prompts is {1, 2, 3}"),
    ("class", list, InvalidRequestError, "prompts is <class 'list'>"),
    ("scalar_array", np.array(3), InvalidRequestError, "prompts is array(3)"),
    ("path", Path("x"), InvalidRequestError, "Path"),
    ("sampling_params", SamplingParams(), InvalidRequestError, "prompts is SamplingParams"),
    ("empty_text", "", InvalidRequestError, "prompt 0", "empty"),
    ("empty_ids", [[]], InvalidRequestError, "prompt 0", "empty"),
    ("second_empty", ["a", ""], InvalidRequestError, "prompt 1", "empty"),
    ("nested", [[[1]]], InvalidRequestError, "prompt 0 is [[1]]", "token ids"),
    ("bools", [[True, False]], InvalidRequestError, "prompt 0 is [True, False]"),
    ("one_bool", [[1, True]], InvalidRequestError, "prompt 0 is [1, True]"),
    ("floats", [[1, 2.0]], InvalidRequestError, "prompt 0 is [1, 2.0]"),
    ("float_array", np.array([[1.0, 2.0]]), InvalidRequestError, "prompt 0 is array"),
    ("cube", np.zeros((1, 1, 2), int), InvalidRequestError, "prompt 0 is array"),
    ("bytes_in_list", ["ok", b"abc"], InvalidRequestError, "prompt 1 is b'abc'"),
    ("none_in_list", ["ok", None], InvalidRequestError, "prompt 1 is None"),
    ("class_in_list", ["ok", list], InvalidRequestError, "prompt 1 is <class 'list'>"),
    ("dict_in_list", ["ok", {"a": 1}], InvalidRequestError, "prompt 1 is {'a': 1}"),
    ("ids_and_text", [5, "a"], InvalidRequestError, "prompt 0 is 5"),
    ("negative_id", ["ok", [1, -1]], InvalidRequestError, "prompt 1", "-1", "vocabulary of 384"),
    ("large_id", [[384]], InvalidRequestError, "384", "vocabulary of 384"),
    ("enormous_id", [[10**30]], InvalidRequestError, "1" + "0" * 30, "vocabulary"),
    ("unsigned_id", np.array([2**63], np.uint64), InvalidRequestError, str(2**63)),
    ("too_long", ["ok", [1] * 128], InvalidRequestError, "prompt 1", "128 tokens", "max_model_len"),
    ("far_too_long", "a b " * 10_000, InvalidRequestError, "max_model_len=128", "shorten"),
    ("surrogate", ["ok", "a\ud800b"], InvalidRequestError, "prompt 1", "position 1", "surrogates"),
)


@cases(*BAD_PROMPTS)
def test_bad_prompts(llm: LLM, value, error, words):
    with refused(llm, error, *words):
        llm.generate(value)
    with refused(llm, error, *words):
        llm.stream(value)  # not at the first next()


def test_other_forms_of_a_prompt(llm: LLM, served: Served):
    ids = llm.tokenizer.encode("hello there")
    forms: list[Any] = [
        np.array(ids),
        np.array(ids, np.uint16),
        np.array([ids]),
        np.array(["hello there"]),
        tuple(ids),
        (text for text in ["hello there"]),
        {"a": "hello there"}.values(),
    ]
    for form in forms:
        (output,) = llm.generate(form, ("good",), [{"temperature": 0, "max_tokens": 3}])
        assert output.outputs[0].token_ids == served.answer


def test_no_prompts_give_no_outputs(llm: LLM):
    steps = llm.stats().steps
    for none in ([], (), np.array([], int), {}.values(), iter([])):
        assert llm.generate(none) == []
        assert list(llm.stream(none)) == []
    assert llm.chat([]) == []
    assert llm.generate([], [], []) == []
    assert llm.stats().steps == steps


# --- adapter ids ---

BAD_ADAPTER_IDS = (
    ("unknown", "god", AdapterNotFoundError, "'god'", "close names", "'good'"),
    ("empty", "", AdapterNotFoundError, "no adapter named ''"),
    ("second_unknown", [None, "nope"], AdapterNotFoundError, "'nope'", "'good'"),
    ("too_few", ["good"], InvalidRequestError, "1 entries for 2 prompts"),
    ("too_many", ["good"] * 3, InvalidRequestError, "3 entries for 2 prompts"),
    ("none_of_them", [], InvalidRequestError, "0 entries for 2 prompts"),
    ("int", 5, InvalidRequestError, "adapter_ids is 5"),
    ("bool", True, InvalidRequestError, "adapter_ids is True"),
    ("dict", {"a": "good"}, InvalidRequestError, "{'a': 'good'}"),
    ("set", {"good", "x"}, InvalidRequestError, "adapter_ids is {"),
    ("array", np.array(["good", "good"]), InvalidRequestError, "adapter_ids is array"),
    ("array_within", [np.array(["good", "x"]), None], InvalidRequestError, "not a name"),
    ("list_within", [["good"], None], InvalidRequestError, "['good'] is not a name"),
    ("int_within", [None, 3], InvalidRequestError, "adapter id 3"),
    ("params", SamplingParams(), InvalidRequestError, "second argument", "by name"),
    ("params_within", [SamplingParams(), None], InvalidRequestError, "not a name"),
)


@cases(*BAD_ADAPTER_IDS)
def test_bad_adapter_ids(llm: LLM, value, error, words):
    conversation = [{"role": "user", "content": "a"}]
    for call in (llm.generate, llm.stream):
        with refused(llm, error, *words):
            call(["a", "b"], value)
    with refused(llm, error, *words):
        llm.chat([conversation, conversation], value)


# --- sampling parameters ---

BAD_PARAMS = (
    ("text", "greedy", InvalidRequestError, "sampling_params is 'greedy'"),
    ("int", 3, InvalidRequestError, "sampling_params is 3"),
    ("class", SamplingParams, InvalidRequestError, "sampling_params is <class"),
    ("config", EngineConfig(), InvalidRequestError, "sampling_params is EngineConfig"),
    ("too_few", [None], InvalidRequestError, "sampling_params has 1 entries for 2 prompts"),
    ("text_within", [None, "x"], InvalidRequestError, "sampling_params is 'x'"),
    ("unknown", {"temprature": 1}, InvalidRequestError, "'temprature'", "'temperature'"),
    ("no_name", {3: 1}, InvalidRequestError, "no option 3"),
    ("bad_value", {"top_p": 7}, InvalidRequestError, "top_p", "7", "<= 1"),
    ("bad_value_within", [None, {"n": 0}], InvalidRequestError, "SamplingParams.n", "got 0"),
    ("logprobs", {"logprobs": 21}, InvalidRequestError, "logprobs", "0 to 20", "got 21"),
    ("n", {"n": 20_000}, InvalidRequestError, "1 to 16384", "got 20000"),
    ("stop_token", {"stop_token_ids": [384]}, InvalidRequestError, "stop_token_ids", "384"),
    ("stop_token_large", {"stop_token_ids": [2**31 - 1]}, InvalidRequestError, str(2**31 - 1)),
    ("crossed", {"min_tokens": 5, "max_tokens": 4}, InvalidRequestError, "min_tokens", "(4)"),
)


@cases(*BAD_PARAMS)
def test_bad_sampling_params(llm: LLM, value, error, words):
    with refused(llm, error, *words):
        llm.generate(["a", "b"], "good", value)
    with refused(llm, error, *words):
        llm.stream(["a", "b"], "good", value)


def test_extreme_values_that_are_allowed_harm_nobody(llm: LLM, served: Served):
    extremes: list[dict[str, Any]] = [
        {"temperature": 1e300},
        {"temperature": 1e-5},
        {"top_p": 1e-300, "min_p": 1e-300, "top_k": 2**31 - 1},
        {"temperature": 0, "repetition_penalty": 1e300},
        {"repetition_penalty": 1e-300},
        {"stop": ["\ud800", "\0", "x" * 10_000]},
    ]
    # Uses all there is, so that all batches compile to one program.
    everything = {"top_p": 0.9, "repetition_penalty": 2, "stop_token_ids": list(range(256))}
    for one, other in zip(extremes[::2], extremes[1::2], strict=True):
        params = [
            SamplingParams(**{"max_tokens": 3, "min_tokens": 3, "seed": 2**63 - 1, **options})
            for options in (everything, one, other)
        ]
        outputs = llm.generate(["a"] * 3 + ["hello there"], "good", [*params, greedy(3)])
        assert outputs[3].outputs[0].token_ids == served.answer
        assert all(len(output.outputs[0].token_ids) == 3 for output in outputs)


# --- anything at all ---

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 400),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.text(st.characters(exclude_characters="/"), max_size=8),  # no id that a hub could have
    st.binary(max_size=4),
    st.sampled_from(["good", "__base__", "role", "content", "user", "temperature", "n", "stop"]),
    st.sampled_from([int, len, ..., SamplingParams(), EngineConfig(), Path("x")]),
    st.sampled_from([np.array(3), np.arange(3), np.array([["a"]]), np.float16(1), jnp.arange(3)]),
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.lists(inner, max_size=3).map(iter),
        st.dictionaries(st.one_of(st.text(max_size=3), st.integers(), st.binary()), inner),
        st.dictionaries(st.sampled_from(["role", "content", "n", "stop", "r"]), inner),
    ),
    max_leaves=6,
)


@given(prompts=ANYTHING, adapter_ids=ANYTHING, params=ANYTHING)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_given_is_taken_or_refused(llm: LLM, prompts, adapter_ids, params):
    """Streams and chats that never start: all is checked and nothing runs."""
    steps = llm.stats().steps
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm, "_run", lambda checked, progress: llm._abort_all(llm._add_all(checked)))
        calls: list[Callable[[], object]] = [
            lambda: llm.stream(prompts),
            lambda: llm.stream("a", adapter_ids),
            lambda: llm.stream("a", "good", params),
            lambda: llm.stream(prompts, adapter_ids, params),
            lambda: llm.chat(prompts),
            lambda: llm.chat([USER], adapter_ids, params),
            lambda: llm.pin_adapter(prompts),
            lambda: llm.load_adapter("good", prompts),
            lambda: llm.load_adapter("new", prompts),
            lambda: llm.load_adapter("new", {A: prompts}, adapter_ids),
            lambda: llm.load_adapter("new", {A: prompts}, {"r": params}),
            lambda: EngineConfig(dtype=prompts, seed=adapter_ids, memory_fraction=params),
        ]
        for call in calls:
            with contextlib.suppress(SloraError):
                call()
    llm.unpin_adapter("good")
    assert llm.stats().steps == steps
    assert_only_idle_adapters_left(llm)


# --- what can never fit ---


def test_output_is_cut_at_max_model_len(llm: LLM):
    (output,) = llm.generate([[1] * 120], None, greedy(10**6))
    assert output.outputs[0].finish_reason == "length"
    assert len(output.outputs[0].token_ids) == 8


def test_request_that_can_never_fit(llm: LLM, served: Served):
    llm.load_adapter("wide", served.model.adapters["wide"])
    pages = llm.list_adapters()[-1].num_pages
    for call in (llm.generate, llm.stream):
        with refused(llm, CapacityError, "prompt 1", f"{pages} for adapter 'wide'", "max_tokens"):
            call(["a", "b"], "wide", [greedy(2), greedy(126)])
    with refused(llm, CapacityError, "prompt 0", "raise pool_bytes"):
        llm.generate([[1] * 127], "wide", {"max_tokens": None})
    (output,) = llm.generate("a", "wide", {"max_tokens": None, "ignore_eos": True})
    assert len(output.outputs[0].token_ids) == (20 - pages) * 16


# --- conversations ---

CYCLE: list[Any] = []
CYCLE.append({"role": "user", "content": CYCLE})

BAD_CONVERSATIONS = (
    ("none", None, InvalidRequestError, "messages is None", "role"),
    ("text", "hi", InvalidRequestError, "messages is 'hi'"),
    ("message", USER, InvalidRequestError, "messages is {'role'"),
    ("generator", iter([USER]), InvalidRequestError, "messages is <list_iterator"),
    ("empty", [[]], InvalidRequestError, "conversation is empty"),
    ("second_empty", [[USER], []], InvalidRequestError, "conversation is empty"),
    ("texts", ["hi"], InvalidRequestError, "conversation is 'hi'"),
    ("ints", [5], InvalidRequestError, "conversation is 5"),
    ("text_within", [USER, "hi"], InvalidRequestError, "message is 'hi'"),
    ("message_within", [[USER], USER], InvalidRequestError, "conversation is {'role'"),
    ("no_role", [{"content": "hi"}], InvalidRequestError, "{'content': 'hi'}", "'user'"),
    ("no_message", [[USER], [{}]], InvalidRequestError, "message is {}"),
    ("bad_role", [{"role": 5, "content": "hi"}], InvalidRequestError, "message is {'role': 5"),
    ("no_content", [{"role": "user"}], InvalidRequestError, "no attribute 'content'"),
    ("bad_content", [{"role": "user", "content": {1}}], InvalidRequestError, "JSON types"),
    ("bytes", [{"role": "user", "content": b"hi"}], InvalidRequestError, "chat template"),
    ("bad_key", [{**USER, (1, 2): 3}], InvalidRequestError, "cannot be rendered"),
    ("cycle", CYCLE, InvalidRequestError, "cannot be rendered", "recursion"),
    ("surrogate", [{"role": "user", "content": "\ud800"}], InvalidRequestError, "surrogates"),
)


@cases(*BAD_CONVERSATIONS)
def test_bad_conversations(llm: LLM, value, error, words):
    with refused(llm, error, *words):
        llm.chat(value)


def test_chat_without_a_template(llm: LLM, monkeypatch):
    monkeypatch.setattr(llm.tokenizer, "_templates", {})
    with refused(llm, InvalidRequestError, "no chat template", "plain text"):
        llm.chat([USER])


def test_chat_template_that_refuses_a_role(llm: LLM, monkeypatch):
    template = "{{ raise_exception('roles must be user or assistant, not ' + messages[0].role) }}"
    monkeypatch.setattr(llm.tokenizer, "_templates", {"default": template})
    monkeypatch.setattr(llm.tokenizer, "_compiled", {})
    with refused(llm, InvalidRequestError, "roles must be user or assistant, not alien"):
        llm.chat([{"role": "alien", "content": "hi"}])


# --- loading adapters: names, sources, pins ---

BAD_NAMES = ("", "__base__", None, 3, ["good"], b"good")


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
def test_bad_adapter_names(llm: LLM, served: Served, name):
    calls: list[Callable[[], object]] = [
        lambda: llm.load_adapter(name, served.model.adapters["good"]),
        lambda: llm.unload_adapter(name),
        lambda: llm.pin_adapter(name),
        lambda: llm.unpin_adapter(name),
    ]
    for call in calls:
        with refused(llm, InvalidRequestError, repr(name), "non-empty string"):
            call()


def test_names_that_are_taken_or_unknown(llm: LLM, served: Served):
    good = served.model.adapters["good"]
    with refused(llm, AdapterInUseError, "'good'", "already loaded", "unload"):
        llm.load_adapter("good", "/not/even/looked/at")
    for call in (llm.unload_adapter, llm.pin_adapter, llm.unpin_adapter):
        with refused(llm, AdapterNotFoundError, "'goood'", "'good'"):
            call("goood")
    llm.load_adapter("twice", good)
    llm.unload_adapter("twice")
    with refused(llm, AdapterNotFoundError, "'twice'"):
        llm.unload_adapter("twice")
    with refused(llm, AdapterNotFoundError, "'twice'"):
        llm.generate("a", "twice")


BAD_SOURCES = (
    ("none", None, AdapterLoadError, "None", "string or a Path"),
    ("int", 5, AdapterLoadError, "adapter 5"),
    ("bytes", b"abc", AdapterLoadError, "b'abc'"),
    ("list", ["a"], AdapterLoadError, "['a']"),
    ("empty", "", AdapterLoadError, "no such directory"),
    ("missing", "/not/there", AdapterLoadError, "/not/there", "no such directory"),
    ("long", "a" * 300, AdapterLoadError, "aaaa"),
    ("nobody", "~nobody-here/x", AdapterLoadError, "~nobody-here/x"),
    ("nul", "a\0b", AdapterLoadError, "no such directory"),
    ("surrogate", "\ud800", AdapterLoadError, "no such directory"),
)


@cases(*BAD_SOURCES)
def test_bad_adapter_sources(llm: LLM, value, error, words):
    with refused(llm, error, *words):
        llm.load_adapter("new", value)


def test_config_is_for_arrays_and_arrays_need_one(llm: LLM, served, arrays, adapter_config):
    with refused(llm, AdapterLoadError, "'new'", "own adapter_config.json"):
        llm.load_adapter("new", served.model.adapters["good"], adapter_config)
    with refused(llm, AdapterLoadError, "'new'", "config={'r': 8"):
        llm.load_adapter("new", arrays)
    for wrong in (5, "config", [1], adapter_config.items()):
        with refused(llm, AdapterLoadError, "'new'", "config is ", "dict"):
            llm.load_adapter("new", arrays, wrong)


def test_the_config_that_the_error_suggests_is_enough(llm: LLM, served: Served, arrays):
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    llm.load_adapter("new", arrays, config)
    assert answer(llm, adapter="new") == served.answer


def test_adapters_that_do_not_fit(llm: LLM, served: Served):
    paths = served.model.adapters
    with refused(llm, CapacityError, "'huge'", "pages", "the pool has 20", "smaller rank"):
        llm.load_adapter("huge", paths["huge"])
    llm.load_adapter("wide", paths["wide"], pinned=True)
    with refused(llm, CapacityError, "'more'", "pinned", "unpin"):
        llm.load_adapter("more", paths["wide"], pinned=True)
    llm.unpin_adapter("wide")
    llm.unload_adapter("wide")


def test_pin_is_refused_where_a_waiting_request_would_never_run(llm: LLM, served: Served):
    llm.load_adapter("wide", served.model.adapters["wide"])
    stream = llm.stream([[1] * 100], "good", greedy(28))
    next(stream)
    with refused(llm, CapacityError, "pinning adapter 'wide'", "wait", "unpin"):
        llm.pin_adapter("wide")
    stream.close()
    llm.pin_adapter("wide")
    llm.pin_adapter("wide")  # twice is once
    with refused(llm, CapacityError, "pinned", "unpin"):
        llm.generate([[1] * 100], "good", greedy(28))
    llm.unpin_adapter("wide")
    llm.unpin_adapter("wide")


def test_pin_whose_files_have_gone_leaves_no_name(scratch: LLM, served: Served, tmp_path):
    config = served.model.checkpoint.config
    write_synthetic_adapter(tmp_path / "a", config, seed=9, rank=4)
    with fresh_engine(scratch, {}, host_adapter_bytes=0, **OPTIONS) as llm:
        register = llm._engine.register_adapter

        def register_and_lose(name, packed, reload):
            info = register(name, packed, reload)
            (tmp_path / "a" / "adapter_config.json").unlink()
            return info

        llm._engine.register_adapter = register_and_lose
        with pytest.raises(AdapterLoadError, match=r"no adapter_config\.json"):
            llm.load_adapter("lost", tmp_path / "a", pinned=True)
        assert llm.list_adapters() == []
        assert_only_idle_adapters_left(llm)


def test_host_budget(scratch: LLM, served: Served, arrays, adapter_config):
    with fresh_engine(scratch, {}, host_adapter_bytes=2**19, **OPTIONS) as llm:
        size = llm.load_adapter("first", arrays, adapter_config).nbytes
        for number in range(2**19 // size - 1):
            llm.load_adapter(f"number {number}", arrays, adapter_config)
        with refused(llm, CapacityError, "'last'", "host_adapter_bytes=524,288", "directory"):
            llm.load_adapter("last", arrays, adapter_config)
        llm.load_adapter("last", served.model.adapters["good"])  # has files: no room needed
        assert answer(llm, adapter="last") == answer(llm, adapter="first") == served.answer


# --- loading adapters: what is in them ---


BAD_ARRAYS = (
    ("none", dict.clear, AdapterLoadError, "no LoRA tensor"),
    ("missing_half", lambda t: t.pop(A), AdapterLoadError, "layers.0.self_attn.q_proj", "lora_A"),
    ("extra", lambda t: t.update({"foo": t[A]}), AdapterLoadError, "'foo'", "no module"),
    ("no_name", lambda t: t.update({3: t[A]}), AdapterLoadError, "PEFT's names"),
    ("none_value", lambda t: t.update({A: None}), AdapterLoadError, A, "object"),
    ("text_value", lambda t: t.update({A: "x"}), AdapterLoadError, A, "dtype"),
    ("ragged", lambda t: t.update({A: [[1.0], [1.0, 2.0]]}), AdapterLoadError, A, "numpy"),
    ("ints", lambda t: t.update({A: t[A].astype(int)}), AdapterLoadError, A, "int64", "float32"),
    ("bools", lambda t: t.update({A: t[A] > 0}), AdapterLoadError, A, "bool"),
    ("complex", lambda t: t.update({A: t[A] * 1j}), AdapterLoadError, A, "complex"),
    ("nan", lambda t: t.update({A: t[A] * np.nan}), AdapterLoadError, A, "NaN"),
    ("inf", lambda t: t.update({A: t[A] * np.inf}), AdapterLoadError, A, "Inf"),
    ("beyond", lambda t: t.update({A: t[A] * np.float64(1e300)}), AdapterLoadError, A, "Inf"),
    ("vector", lambda t: t.update({A: t[A][0]}), AdapterLoadError, "q_proj", "[64]", "[r, 64]"),
    ("inputs", lambda t: t.update({A: t[A][:, 1:]}), AdapterLoadError, "[4, 63]", "base model"),
    ("rank", lambda t: t.update({A: t[A][1:]}), AdapterLoadError, "rank 3", "says 4"),
    (
        "layers",
        lambda t: t.update({A.replace(".0.", ".7."): t[A]}),
        AdapterLoadError,
        "layer 7",
        "another base",
    ),
)


@cases(*BAD_ARRAYS)
def test_bad_adapter_arrays(llm: LLM, arrays, adapter_config, value, error, words):
    tensors = dict(arrays)
    value(tensors)
    with refused(llm, error, "'new'", *words):
        llm.load_adapter("new", tensors, adapter_config)


BAD_ADAPTER_CONFIGS = (
    ("dora", {"use_dora": True}, AdapterLoadError, "use_dora (DoRA)", "not supported"),
    ("bias", {"bias": "all"}, AdapterLoadError, "bias='all'", "not supported"),
    ("saved", {"modules_to_save": ["lm_head"]}, AdapterLoadError, "modules_to_save"),
    ("fan", {"fan_in_fan_out": True}, AdapterLoadError, "fan_in_fan_out"),
    ("lora_bias", {"lora_bias": True}, AdapterLoadError, "lora_bias"),
    ("pissa", {"init_lora_weights": "pissa"}, AdapterLoadError, "init_lora_weights='pissa'"),
    ("replication", {"layer_replication": [[0, 1]]}, AdapterLoadError, "layer_replication"),
    ("new_option", {"use_magic": 1}, AdapterLoadError, "use_magic=1", "remove it"),
    ("ia3", {"peft_type": "IA3"}, AdapterLoadError, "peft_type 'IA3'", "'LORA'"),
    ("task", {"task_type": "SEQ_CLS"}, AdapterLoadError, "task_type 'SEQ_CLS'"),
    ("no_module", {"target_modules": ["nope"]}, AdapterLoadError, "['nope']", "no module"),
    ("lm_head", {"target_modules": ["lm_head"]}, AdapterLoadError, "'lm_head'"),
    ("regex", {"target_modules": "("}, AdapterLoadError, "'('", "regular expression"),
    ("layers", {"layers_to_transform": [7]}, AdapterLoadError, "layer 7", "layers 0 to 1"),
    ("rank_0", {"r": 0}, AdapterLoadError, "rank 0", "above 0"),
    ("rank_257", {"r": 257}, AdapterLoadError, "rank 257", "256"),
    ("rank_text", {"r": "4"}, AdapterLoadError, "rank '4'"),
    ("alpha", {"lora_alpha": float("nan")}, AdapterLoadError, "lora_alpha nan"),
    ("pattern", {"rank_pattern": [1]}, AdapterLoadError, "rank_pattern=[1]"),
)
ODD_VALUES = (
    ("array", {"bias": np.array(["a", "b"])}, AdapterLoadError, "plain values"),
    ("array_option", {"use_magic": np.arange(3)}, AdapterLoadError, "plain values"),
    ("no_name", {3: 4}, AdapterLoadError, "3=4"),
)


@cases(*BAD_ADAPTER_CONFIGS, *ODD_VALUES)
def test_bad_adapter_configs(llm: LLM, arrays, adapter_config, value, error, words):
    with refused(llm, error, "'new'", *words):
        llm.load_adapter("new", arrays, {**adapter_config, **value})


def _rewrite(directory: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    (directory / name).write_bytes(change((directory / name).read_bytes()))


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BROKEN_DIRECTORIES = (
    ("config_missing", lambda d: (d / CONFIG).unlink(), AdapterLoadError, f"no {CONFIG}"),
    ("config_cut", lambda d: _rewrite(d, CONFIG, lambda b: b[:9]), AdapterLoadError, "JSON"),
    ("config_list", lambda d: _rewrite(d, CONFIG, lambda b: b"[]"), AdapterLoadError, "list"),
    ("config_binary", lambda d: _rewrite(d, CONFIG, lambda b: b"\xff"), AdapterLoadError, CONFIG),
    ("config_deep", lambda d: _rewrite(d, CONFIG, lambda b: b"[" * 9**5), AdapterLoadError, CONFIG),
    ("weights_missing", lambda d: (d / WEIGHTS).unlink(), AdapterLoadError, f"no {WEIGHTS}"),
    (
        "weights_cut",
        lambda d: _rewrite(d, WEIGHTS, lambda b: b[:-9]),
        AdapterLoadError,
        "truncated",
    ),
    ("weights_empty", lambda d: _rewrite(d, WEIGHTS, lambda b: b""), AdapterLoadError, "corrupt"),
    (
        "weights_noise",
        lambda d: _rewrite(d, WEIGHTS, lambda b: b"\xff" * len(b)),
        AdapterLoadError,
        "corrupt",
    ),
    (
        "header_too_long",
        lambda d: _rewrite(d, WEIGHTS, lambda b: struct.pack("<Q", 2**60) + b[8:]),
        AdapterLoadError,
        "corrupt",
    ),
    (
        "only_pickle",
        lambda d: (d / WEIGHTS).rename(d / "adapter_model.bin"),
        AdapterLoadError,
        "adapter_model.bin",
        "pickle",
        "safetensors",
    ),
    (
        "weights_directory",
        lambda d: ((d / WEIGHTS).unlink(), (d / WEIGHTS).mkdir()),
        AdapterLoadError,
        WEIGHTS,
    ),
    ("empty", lambda d: [file.unlink() for file in d.iterdir()], AdapterLoadError, "empty"),
)


@pytest.fixture
def adapter_copy(served: Served, tmp_path) -> Path:
    directory = tmp_path / "copy"
    directory.mkdir()
    for file in served.model.adapters["good"].iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


@cases(*BROKEN_DIRECTORIES)
def test_broken_adapter_directories(llm: LLM, adapter_copy, value, error, words):
    value(adapter_copy)
    with refused(llm, error, "copy", *words):
        llm.load_adapter("new", adapter_copy)


def test_adapter_files_for_another_base_model(llm: LLM, served: Served, tmp_path):
    other = {**served.model.checkpoint.config, "hidden_size": 96}
    write_synthetic_adapter(tmp_path / "other", other, seed=1)
    with refused(llm, AdapterLoadError, "96", "64 inputs", "another base model"):
        llm.load_adapter("new", tmp_path / "other")
    with refused(llm, AdapterLoadError, CONFIG, "is a file"):
        llm.load_adapter("new", tmp_path / "other" / CONFIG)
    with refused(llm, AdapterLoadError, "no adapter_config.json"):
        llm.load_adapter("new", served.model.directory)


def test_other_forms_of_arrays(llm: LLM, served: Served, arrays, adapter_config):
    forms: dict[str, Callable[[np.ndarray], Any]] = {
        "jax": jnp.asarray,
        "float64": lambda array: array.astype(np.float64),
        "lists": lambda array: array.tolist(),
        "fortran": np.asfortranarray,
    }
    for name, form in forms.items():
        llm.load_adapter(name, {key: form(array) for key, array in arrays.items()}, adapter_config)
        assert answer(llm, adapter=name) == served.answer
    mapping = types.MappingProxyType(arrays)
    llm.load_adapter("proxy", mapping, types.MappingProxyType(adapter_config))
    assert answer(llm, adapter="proxy") == served.answer


def test_arrays_may_change_after_loading(llm: LLM, served: Served, arrays, adapter_config):
    mine = {name: array.copy() for name, array in arrays.items()}
    llm.load_adapter("mine", mine, adapter_config)
    for array in mine.values():
        array[:] = np.nan
    assert answer(llm, adapter="mine") == served.answer


# --- other uses of adapters ---


def test_names_may_be_any_text(llm: LLM, served: Served):
    for name in ("пират 🏴‍☠️", "a\nb\0c", "x" * 10_000, " ", "None", "../../etc", "\ud800"):
        llm.load_adapter(name, served.model.adapters["good"])
        assert answer(llm, adapter=name) == served.answer
        llm.unload_adapter(name)


def test_alpha_0_is_the_base(llm: LLM, arrays, adapter_config):
    llm.load_adapter("nothing", arrays, {**adapter_config, "lora_alpha": 0})
    assert answer(llm, adapter="nothing") == answer(llm, adapter=None)


def test_largest_rank_and_one_layer(llm: LLM, served: Served, tmp_path):
    config = served.model.checkpoint.config
    options = {"rank": 256, "targets": ("k",), "layers_to_transform": [1], "scale": 5.0}
    write_synthetic_adapter(tmp_path / "a", config, seed=3, **options)
    assert llm.load_adapter("largest", tmp_path / "a").ranks[1] == 256
    other = TinyModel(served.model.directory, served.model.checkpoint, {"a": tmp_path / "a"})
    prompt = [1, 2, 3, 4]
    tokens = answer(llm, [prompt], "largest", 4)
    assert list(tokens) == other.greedy(prompt, "a", 4)
    assert tokens != answer(llm, [prompt], None, 4)


def test_an_adapter_that_overflows_harms_only_itself(llm: LLM, served, arrays, adapter_config):
    worst = {name: np.sign(a) * np.finfo(np.float32).max for name, a in arrays.items()}
    llm.load_adapter("worst", worst, adapter_config)
    for ids in (["worst", "good", "worst"], ["good", "worst", "good"]):
        outputs = llm.generate(["hello there"] * 3, ids, greedy(3))
        for output in outputs:
            if output.adapter_id == "good":
                assert output.outputs[0].token_ids == served.answer


def test_unload_and_reload_during_a_stream(llm: LLM, served: Served, tmp_path):
    """Who started on the old weights ends on them; who comes later gets the new ones."""
    config = served.model.checkpoint.config
    for seed, rank in ((5, 4), (6, 16)):
        write_synthetic_adapter(tmp_path / str(rank), config, seed=seed, rank=rank, targets=("q",))
    llm.load_adapter("v", tmp_path / "4")
    old = answer(llm, adapter="v", num_tokens=6)
    stream = llm.stream("hello there", "v", greedy(6))
    next(stream)
    llm.unload_adapter("v")
    with refused(llm, AdapterNotFoundError, "'v'"):
        llm.generate("a", "v")
    llm.load_adapter("v", tmp_path / "16")
    new = answer(llm, adapter="v", num_tokens=6)
    *_, (_, last) = stream
    assert last.outputs[0].token_ids == old
    assert new != old
    assert answer(llm, adapter="v", num_tokens=6) == new


def test_two_threads_load_one_name(llm: LLM, served: Served):
    outcomes: list[object] = []
    barrier = threading.Barrier(2)

    def load():
        barrier.wait()
        try:
            outcomes.append(llm.load_adapter("both", served.model.adapters["good"]))
        except AdapterInUseError as error:
            outcomes.append(error)

    _run_together(load, load)
    assert sum(isinstance(outcome, AdapterInUseError) for outcome in outcomes) == 1
    assert len(outcomes) == 2
    assert answer(llm, adapter="both") == served.answer


def test_files_that_go_after_loading(scratch: LLM, served: Served, adapter_copy):
    """In memory nobody misses them; on the disk tier only their own requests fail."""
    for budget in (None, 0):
        good = {"good": served.model.adapters["good"]}
        with fresh_engine(scratch, good, host_adapter_bytes=budget, **OPTIONS) as llm:
            llm.load_adapter("gone", adapter_copy)
            hidden = adapter_copy.rename(adapter_copy.with_name("hidden"))
            calls = (["a", "hello there"], ["gone", "good"], greedy(3))
            if budget is None:
                outputs = llm.generate(*calls)
            else:
                with pytest.raises(RequestFailedError, match=r"1 of 2 .*'gone'.*again") as caught:
                    llm.generate(*calls)
                outputs = caught.value.outputs
                assert outputs[0].outputs[0].finish_reason == "error"
                assert isinstance(outputs[0].error, AdapterLoadError)
                with pytest.raises(RequestFailedError):
                    list(llm.stream(*calls))
            assert outputs[1].outputs[0].token_ids == served.answer
            assert_only_idle_adapters_left(llm)
            hidden.rename(adapter_copy)


# --- streams ---


def test_a_stream_that_is_never_iterated_queues_nothing(llm: LLM):
    before = llm.stats()
    stream = llm.stream(["a", "b"], "good")
    assert llm.stats() == before
    stream.close()
    llm.stream("a")
    assert llm.stats() == before


def test_a_stream_that_is_left_early_gives_everything_back(llm: LLM):
    for _index, _output in llm.stream(["a", "b"], "good", greedy(20)):
        break
    stream = llm.stream("a", None, SamplingParams(n=3, max_tokens=20))
    next(stream)
    assert llm.stats().requests_running == 3
    stream.close()
    assert_only_idle_adapters_left(llm)
    assert list(stream) == []


def test_generate_within_a_stream(llm: LLM, served: Served):
    steps = 0
    for _, output in llm.stream("hello there", "good", greedy(3)):
        assert answer(llm) == served.answer
        assert output.outputs[0].token_ids == served.answer[: len(output.outputs[0].token_ids)]
        steps += 1
    assert steps >= 1


def test_a_stream_collected_within_a_step(llm: LLM, served: Served, monkeypatch):
    """A lost generator may be collected at any allocation, so in the midst of another's step."""
    runner = llm._engine._runner
    launch = runner.launch

    def launch_and_collect(output):
        launched = launch(output)
        gc.collect()
        return launched

    cycle: list[Any] = [llm.stream("a", None, greedy(20))]
    cycle.append(cycle)
    next(cycle[0])
    gc.disable()
    try:
        del cycle
        assert llm.stats().requests_running == 1
        monkeypatch.setattr(runner, "launch", launch_and_collect)
        assert answer(llm) == served.answer
    finally:
        gc.enable()
    assert llm.stats().requests_running == 0


# --- threads, interrupts, failures ---


def _run_together(*tasks: Callable[[], None]) -> None:
    threads = [threading.Thread(target=task, daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)


def test_two_threads_generate(llm: LLM):
    batches = [(["one", "two words"], ["good", None]), (["three", "and a fourth"], [None, "good"])]
    expected = [llm.generate(*batch, greedy(5)) for batch in batches]
    outputs: dict[int, list[Any]] = {0: [], 1: []}

    def work(index: int):
        for _ in range(3):
            outputs[index].append(llm.generate(*batches[index], greedy(5)))

    _run_together(lambda: work(0), lambda: work(1))
    for index, runs in outputs.items():
        assert len(runs) == 3
        for run in runs:
            assert [o.outputs for o in run] == [o.outputs for o in expected[index]]


def test_two_threads_stream(llm: LLM):
    """Each sees the end of its own prompts, whoever's step brought it."""
    last: dict[int, dict[int, Any]] = {0: {}, 1: {}}
    expected = llm.generate(["one", "two words"], "good", greedy(9))

    def work(index: int):
        for prompt, output in llm.stream(["one", "two words"], "good", greedy(9)):
            last[index][prompt] = output

    _run_together(lambda: work(0), lambda: work(1))
    for outputs in last.values():
        assert [outputs[k].outputs for k in (0, 1)] == [o.outputs for o in expected]
        assert all(output.finished for output in outputs.values())


def test_a_stream_whose_requests_end_in_other_calls(llm: LLM, served: Served):
    stream = llm.stream(["hello there", "a"], "good", greedy(3))
    next(stream)
    answer(llm, num_tokens=9)
    last = dict(stream)
    assert last[0].outputs[0].token_ids == served.answer
    assert last[0].finished
    assert last[1].finished


def test_close_while_another_thread_generates(scratch: LLM):
    started, outputs, errors = threading.Event(), [], []

    def work():
        try:
            for _, output in scratch.stream("a", "good", greedy(100)):
                started.set()
                outputs.append(output)
        except EngineClosedError as error:
            errors.append(error)

    def close():
        assert started.wait(60)
        scratch.close()

    _run_together(work, close)
    assert outputs[-1].finished
    assert outputs[-1].outputs[0].finish_reason == ("abort" if errors else "length")
    with pytest.raises(EngineClosedError):
        scratch.generate("a")


def test_a_step_that_fails_closes_the_engine_with_the_cause(scratch: LLM, monkeypatch):
    def fail(output):
        raise RuntimeError("the device is on fire")

    stream = scratch.stream("a", "good", greedy(9))
    next(stream)
    monkeypatch.setattr(scratch._engine._runner, "launch", fail)
    with pytest.raises(RuntimeError, match="the device is on fire"):
        scratch.generate(["b", "c"], "good")
    calls: list[Callable[[], object]] = [
        lambda: scratch.generate("a"),
        lambda: next(stream),
        lambda: scratch.stats(),
        lambda: scratch.list_adapters(),
    ]
    for call in calls:
        with pytest.raises(EngineClosedError, match="the device is on fire"):
            call()
    assert not scratch._engine._running
    scratch.close()


def test_a_failed_llm_can_be_closed(served: Served, monkeypatch):
    with LLM(served.model.directory, progress=False, **OPTIONS) as llm:
        runner = llm._engine._runner

        def fail(pool, sampled, batch):
            for array in pool:
                array.delete()  # it was donated
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

        fail.num_compiles = runner._forward.num_compiles
        monkeypatch.setattr(runner, "_forward", fail)
        with pytest.raises(jax.errors.JaxRuntimeError):
            llm.generate("a")
        llm.close()
        with pytest.raises(EngineClosedError, match="RESOURCE_EXHAUSTED"):
            llm.generate("a")


needs_signals = pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="signals go to the main one"
)


@contextlib.contextmanager
def interrupts_in_step(llm: LLM, count: int) -> Iterator[None]:
    """Ctrl-C, ``count`` times, in the midst of the third step from now."""
    runner = llm._engine._runner
    launch, steps = runner.launch, iter(range(10**6))

    def launch_interrupted(output):
        if next(steps) == 2:
            for _ in range(count):
                signal.raise_signal(signal.SIGINT)
        return launch(output)

    runner.launch = launch_interrupted
    try:
        yield
    finally:
        del runner.launch


@needs_signals
def test_an_interrupt_waits_for_the_step_and_aborts_the_call(llm: LLM):
    handler = signal.getsignal(signal.SIGINT)
    with interrupts_in_step(llm, 1), pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"], ["good", None], greedy(50))
    assert signal.getsignal(signal.SIGINT) is handler
    assert_only_idle_adapters_left(llm)
    with interrupts_in_step(llm, 1), pytest.raises(KeyboardInterrupt):
        list(llm.stream(["a", "b"], ["good", None], greedy(50)))
    assert signal.getsignal(signal.SIGINT) is handler


@needs_signals
def test_a_second_interrupt_does_not_wait_and_closes_the_engine(scratch: LLM):
    with interrupts_in_step(scratch, 2), pytest.raises(KeyboardInterrupt):
        scratch.generate("a", "good", greedy(50))
    with pytest.raises(EngineClosedError, match="KeyboardInterrupt"):
        scratch.generate("a")


def test_an_interrupt_while_queueing_leaves_nothing_queued(llm: LLM, monkeypatch):
    scheduler = llm._engine.scheduler
    add, calls = scheduler.add, iter(range(10**6))

    def add_interrupted(request):
        add(request)
        if next(calls) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(scheduler, "add", add_interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"], "good", SamplingParams(n=3))
    monkeypatch.undo()
    assert_only_idle_adapters_left(llm)


def test_many_completions_and_many_equal_prompts(llm: LLM, served: Served):
    (output,) = llm.generate("a", None, SamplingParams(n=100, max_tokens=1, seed=1))
    assert len(output.outputs) == 100
    assert len({completion.token_ids for completion in output.outputs}) > 1
    outputs = llm.generate(["hello there"] * 20, "good", greedy(3))
    assert {output.outputs[0].token_ids for output in outputs} == {served.answer}


def test_short_calls_print_nothing(llm: LLM, capfd):
    llm.generate("a", "good", greedy(2))
    llm.chat([USER], None, greedy(2))
    list(llm.stream("a", "good", greedy(2)))
    assert capfd.readouterr() == ("", "")


# --- after close ---


def test_everything_but_close_is_refused_after_close(served: Served, tmp_path):
    with LLM(served.model.directory, progress=False, **OPTIONS) as llm:
        good = served.model.adapters["good"]
        llm.load_adapter("good", good)
        stream = llm.stream("a")
        llm.close()
        llm.close()
        calls: list[Callable[[], object]] = [
            lambda: llm.generate("a"),
            lambda: llm.generate([]),
            lambda: llm.generate(None),
            lambda: llm.stream("a"),
            lambda: next(stream),
            lambda: llm.chat([USER]),
            lambda: llm.load_adapter("more", good),
            lambda: llm.load_adapter("good", "/not/there"),
            lambda: llm.unload_adapter("good"),
            lambda: llm.pin_adapter("good"),
            lambda: llm.unpin_adapter("good"),
            lambda: llm.list_adapters(),
            lambda: llm.stats(),
            lambda: llm.save(tmp_path / "saved"),
        ]
        for call in calls:
            with pytest.raises(EngineClosedError, match=r"close\(\) was called.*make a new one"):
                call()
        assert llm.max_model_len == 128
    assert not (tmp_path / "saved").exists()


def test_close_frees_the_cpu_memory_of_adapters(scratch: LLM):
    answer(scratch)
    store = scratch.engine.store
    (info,) = scratch.list_adapters()
    buffers = [weakref.ref(run) for run in store.fetch(info.version).pages]
    assert all(buffer() is not None for buffer in buffers)
    scratch.close()
    gc.collect()
    assert store.host_bytes == 0
    assert all(buffer() is None for buffer in buffers)


def test_no_more_pinned_memory_is_an_error_of_the_one_adapter(
    served: Served, llm: LLM, monkeypatch
):
    def refuse(*args):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of host memory while trying to allocate 64.00MiB"
        )

    mesh = llm.engine._runner._mesh
    pinned = named_sharding(mesh, RUN_AXES, memory_kind="pinned_host")
    with monkeypatch.context() as patch:
        patch.setattr(llm, "_host", HostMemory(pinned))
        patch.setattr(page_pool, "_put", refuse)
        with pytest.raises(CapacityError, match=r"host_adapter_bytes.*Out of host memory"):
            llm.load_adapter("more", served.model.adapters["good"])
    assert answer(llm) == served.answer
    llm.load_adapter("more", served.model.adapters["good"])
    assert answer(llm, adapter="more") == served.answer


def test_a_step_that_had_to_be_compiled_refuses_nobody_after_it(served: Served):
    with LLM(served.model.directory, progress=False, ttft_slo=0.2, **OPTIONS) as llm:
        began = time.perf_counter()
        answers = [answer(llm, adapter=None)]
        assert time.perf_counter() - began > 0.2, "nothing had to be compiled?"
        answers += [answer(llm, adapter=None) for _ in range(5)]
        assert len(set(answers)) == 1
        assert all(answers)
        assert llm.engine.scheduler._waiting._delay_to_expect() < 0.2


def test_tokens_of_an_unloaded_adapter_are_forgotten(llm: LLM, served: Served):
    llm.load_adapter("gone", served.model.adapters["good"])
    stream = llm.stream("hello there", "gone", greedy(4))
    next(stream)
    llm.unload_adapter("gone")
    assert len(list(stream)) > 0
    assert "gone" not in llm.stats().tokens_by_adapter


# --- making an LLM ---

BAD_OPTIONS = (
    ("unknown", {"pool_byte": 1}, ConfigError, "pool_byte", "pool_bytes"),
    ("config", {"config": {"seed": 1}}, ConfigError, "config is {'seed': 1}", "EngineConfig"),
    ("dtype", {"dtype": "float8"}, ConfigError, "dtype='float8'", "bfloat16"),
    ("dtype_class", {"dtype": jnp.float32}, ConfigError, "dtype=", "float32"),
    ("dtype_array", {"dtype": np.array(["a", "b"])}, ConfigError, "dtype="),
    ("kernels", {"kernels": "cuda"}, ConfigError, "kernels='cuda'", "xla"),
    ("kernels_gpu", {"kernels": "gpu"}, ConfigError, "kernels='gpu'", "'auto'"),
    ("seqs", {"max_num_seqs": 0}, ConfigError, "max_num_seqs=0", "at least 1"),
    ("seqs_bool", {"max_num_seqs": True}, ConfigError, "max_num_seqs=True"),
    ("batched", {"max_num_batched_tokens": 17}, ConfigError, "17", "prefill_tile=16"),
    ("tile", {"prefill_tile": 1.0}, ConfigError, "prefill_tile=1.0"),
    ("len_text", {"max_model_len": "128"}, ConfigError, "max_model_len='128'"),
    ("len_1", {"max_model_len": 1}, ConfigError, "max_model_len=1", "2 to 2048"),
    ("len_model", {"max_model_len": 4096}, ConfigError, "4096", "max_position_embeddings"),
    ("len_pool", {"max_model_len": 1024}, ConfigError, "1024", "320 tokens", "raise pool_bytes"),
    ("page", {"page_size": 17}, ConfigError, "page_size=17", "multiple of 16", "16, 32, 64"),
    ("page_0", {"page_size": 0}, ConfigError, "page_size=0"),
    ("page_huge", {"page_size": 2**20}, ConfigError, "pool_bytes must be at least"),
    ("pool", {"pool_bytes": 2**16 - 1}, ConfigError, "65,535 bytes", "at least 65,536"),
    ("pool_text", {"pool_bytes": "1GB"}, ConfigError, "pool_bytes='1GB'"),
    ("pool_huge", {"pool_bytes": 2**60}, ConfigError, "lower pool_bytes", f"{2**60:,}"),
    ("pool_huger", {"pool_bytes": 2**70}, ConfigError, "lower pool_bytes", f"{2**70:,}"),
    ("slo_huge", {"ttft_slo": 10**400}, ConfigError, "ttft_slo=1000", "number of seconds"),
    ("fraction", {"memory_fraction": 1.5}, ConfigError, "memory_fraction=1.5"),
    ("fraction_nan", {"memory_fraction": float("nan")}, ConfigError, "memory_fraction=nan"),
    ("fraction_bool", {"memory_fraction": True}, ConfigError, "memory_fraction=True"),
    ("host", {"host_adapter_bytes": -1}, ConfigError, "host_adapter_bytes=-1"),
    ("cache", {"compilation_cache": "no"}, ConfigError, "compilation_cache='no'"),
    ("load", {"load": "random"}, ConfigError, "load='random'", "dummy"),
    ("seed", {"seed": None}, ConfigError, "seed=None"),
)


def _message(error: type[SloraError], make: Callable[[], object]) -> str:
    with pytest.raises(SloraError) as caught:
        make()
    assert type(caught.value) is error
    assert len(str(caught.value)) < 1000
    return str(caught.value)


@cases(*BAD_OPTIONS)
def test_bad_options(served: Served, value, error, words):
    options = {**OPTIONS, "progress": False, **value}
    message = _message(error, lambda: LLM(served.model.directory, **options))
    for word in words:
        assert word in message


def test_options_by_name_win_over_the_config(served: Served):
    config = EngineConfig(**{**OPTIONS, "page_size": 32})
    with LLM(served.model.directory, config=config, progress=False, max_model_len=64) as llm:
        assert (llm.stats().page_size, llm.max_model_len) == (32, 64)


BAD_MODELS = (
    ("none", None, ModelLoadError, "model None", "Path"),
    ("int", 5, ModelLoadError, "model 5"),
    ("bytes", b"abc", ModelLoadError, "b'abc'"),
    ("empty", "", ModelLoadError, "''", "directory"),
    ("missing", "/not/there", ModelLoadError, "/not/there", "no such directory", "hub id"),
    ("long", "a" * 300, ModelLoadError, "aaaa"),
    ("nobody", "~nobody-here/x", ModelLoadError, "~nobody-here/x"),
    ("file", __file__, ModelLoadError, "test_bad_input.py", "is a file"),
)


@cases(*BAD_MODELS)
def test_bad_model_names(value, error, words):
    message = _message(error, lambda: LLM(value, progress=False))
    for word in words:
        assert word in message


def _config_with(**changes: Any) -> Callable[[Path], object]:
    def change(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def _sharded_to(target: str) -> Callable[[Path], object]:
    def change(directory: Path) -> None:
        (directory / "model.safetensors").rename(directory.parent / "outside.safetensors")
        index = {"weight_map": {"model.embed_tokens.weight": target}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def _weight(change: Callable[[np.ndarray], None]) -> Callable[[Path], object]:
    def change_file(directory: Path) -> None:
        file = directory / "model.safetensors"
        tensors = load_file(file)
        change(tensors["model.layers.1.mlp.up_proj.weight"])
        save_file(tensors, file)

    return change_file


def _unlink(name: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).unlink()


def _cut(name: str) -> Callable[[Path], object]:
    return lambda directory: _rewrite(directory, name, lambda data: data[: len(data) // 2])


QUANTIZED = {"quant_method": "gptq"}
BAD_DIRECTORIES = (
    ("empty", lambda d: [f.unlink() for f in d.iterdir()], ModelLoadError, "empty"),
    ("no_config", _unlink("config.json"), ModelLoadError, "config.json", "missing"),
    ("no_tokenizer", _unlink("tokenizer.json"), ModelLoadError, "no tokenizer.json"),
    ("no_weights", _unlink("model.safetensors"), ModelLoadError, "neither model.safetensors"),
    ("cut_config", _cut("config.json"), ModelLoadError, "config.json", "JSON"),
    ("cut_tokenizer", _cut("tokenizer.json"), ModelLoadError, "tokenizer.json", "JSON"),
    ("cut_weights", _cut("model.safetensors"), ModelLoadError, "truncated or corrupt"),
    ("escape", _sharded_to("../outside.safetensors"), ModelLoadError, "'../outside", "refused"),
    ("absolute", _sharded_to("/etc/passwd"), ModelLoadError, "'/etc/passwd'", "refused"),
    ("bias", _config_with(attention_bias=True), ModelLoadError, "attention_bias=true"),
    ("window", _config_with(sliding_window=4), ModelLoadError, "sliding_window"),
    ("quantized", _config_with(quantization_config=QUANTIZED), ModelLoadError, "quantization_conf"),
    ("mistral", _config_with(model_type="mistral"), ModelLoadError, "'mistral'", "'llama'"),
    ("gpt2", _config_with(architectures=["GPT2"]), ModelLoadError, "['GPT2']", "LlamaForCausalLM"),
    ("layers", _config_with(num_hidden_layers=3), ModelLoadError, "model.layers.2"),
    ("sizes", _config_with(hidden_size=32), ModelLoadError, "[384, 64]", "[384, 32]"),
    ("nan", _weight(lambda w: w.fill(np.nan)), ModelLoadError, "layers.1.mlp.up_proj", "NaN"),
)


@pytest.fixture
def model_copy(served: Served, tmp_path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    for file in served.model.directory.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


@cases(*BAD_DIRECTORIES)
def test_bad_model_directories(model_copy: Path, value, error, words):
    value(model_copy)
    message = _message(error, lambda: LLM(model_copy, progress=False, **OPTIONS))
    assert str(model_copy) in message
    for word in words:
        assert word in message


def test_values_beyond_float16(served: Served, model_copy: Path, arrays, adapter_config):
    options = {**OPTIONS, "dtype": "float16", "progress": False}
    with LLM(served.model.directory, **options) as llm:
        arrays = {**arrays, A: arrays[A] * np.float32(1e6)}
        with refused(llm, AdapterLoadError, "float16", "layer 0, q, A"):
            llm.load_adapter("new", arrays, adapter_config)
    _weight(lambda weight: weight.fill(1e6))(model_copy)
    message = _message(ModelLoadError, lambda: LLM(model_copy, **options))
    assert "layers.1.up has values beyond float16" in message


# --- save ---


def test_save_where_it_cannot_be_written(llm: LLM, served: Served, tmp_path):
    (tmp_path / "file").write_text("mine")
    taken = served.model.directory
    for value, *words in (
        (None, "None", "Path"),
        (3, "directory 3"),
        (b"x", "b'x'"),
        (tmp_path / "file", "file", "already exists"),
        (tmp_path / "file" / "below", "below", "cannot be written"),
        (taken, str(taken), "not empty", "choose another"),
        (tmp_path / ("x" * 300), "cannot be"),
        ("~nobody-here/x", "~nobody-here/x"),
        (os.devnull, os.devnull),
    ):
        with refused(llm, ModelLoadError, *words):
            llm.save(value)
    assert (tmp_path / "file").read_text() == "mine"


# --- a foreign package called checkpoints ---


def test_a_foreign_checkpoints_package(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "__init__.py").write_text("files = 'not ours'\n")
    root = Path(__file__).resolve().parents[2]
    code = (
        "import slora_jax\n"
        "try:\n    slora_jax.LLM('x')\n"
        "except slora_jax.ModelLoadError as error:\n    print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"},
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    for words in ("another package named 'checkpoints'", str(tmp_path), "slora-jax", "sys.path"):
        assert words in run.stdout


def test_a_foreign_checkpoints_module_that_fails(llm: LLM, served, monkeypatch, tmp_path):
    (tmp_path / "checkpoints.py").write_text("import nowhere_to_be_found\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "checkpoints")
    with refused(llm, ModelLoadError, "'checkpoints'", "nowhere_to_be_found", "sys.path"):
        llm.load_adapter("new", served.model.adapters["good"])
    monkeypatch.undo()
    assert sys.modules["checkpoints"] is checkpoints
