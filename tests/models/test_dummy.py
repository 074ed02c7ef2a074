"""Random weights by name: the real shapes, the same each time, served like any model."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints.architectures import ARCHITECTURES
from checkpoints.hf_llama import CONFIG_KEYS, read_config
from checkpoints.synthetic import write_synthetic_adapter, write_synthetic_llama
from slora_jax import LLM, SamplingParams
from slora_jax.device_memory import measure_step_bytes
from slora_jax.errors import ConfigError, ModelLoadError
from slora_jax.forward_programs import WholeForward
from slora_jax.loading import dummy_model
from slora_jax.model_runner import row_buckets, step_buckets
from slora_jax.sharding import single_device_mesh

OPTIONS = {"load": "dummy", "max_num_seqs": 4, "pool_bytes": 2**22, "progress": False}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_are_whole(name):
    assert set(ARCHITECTURES[name]) == set(CONFIG_KEYS)
    assert ARCHITECTURES[name]["num_heads"] * 128 == ARCHITECTURES[name]["hidden_size"]


def test_a_directory_with_a_config_alone_serves_random_weights(tmp_path):
    write_synthetic_llama(tmp_path / "whole")
    only = tmp_path / "only"
    only.mkdir()
    (only / "config.json").write_text((tmp_path / "whole" / "config.json").read_text())
    adapter = tmp_path / "adapter"
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    answers = []
    write_synthetic_adapter(adapter, read_config(only), seed=1, scale=0.5)
    for _ in range(2):
        with LLM(only, **OPTIONS) as llm:
            llm.load_adapter("a", adapter)
            outputs = llm.generate([[1, 2, 3], "abc"], ["a", None], params)
            answers.append([output.outputs[0].token_ids for output in outputs])
            with pytest.raises(ModelLoadError, match="random weights"):
                llm.save(tmp_path / "saved")
    assert answers[0] == answers[1]
    assert all(len(ids) == 5 for ids in answers[0])


def test_weights_differ_from_one_another_and_are_no_zeros(tmp_path):
    write_synthetic_llama(tmp_path)
    mesh = single_device_mesh(jax.devices()[0])
    model = dummy_model(tmp_path, dtype=jnp.dtype("float32"), mesh=mesh).model
    one, other = (np.asarray(model.layers[i].mlp.down.weight[...]) for i in (0, 1))
    assert 0.01 < one.std() < 0.03
    assert np.abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.1


def test_what_is_no_name_and_no_directory_is_refused(tmp_path):
    with pytest.raises(ModelLoadError, match=r"'llama-8b'.*llama-7b"):
        LLM("llama-8b", **OPTIONS)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ModelLoadError, match="gpt2"):
        LLM(tmp_path, **OPTIONS)
    with pytest.raises(ConfigError, match="load='random'"):
        LLM("llama-7b", load="random", progress=False)


def test_after_warming_up_the_runner_compiles_nothing_for_its_sizes(tmp_path):
    """Kernels' sizes, which are few; the programs themselves are XLA's."""
    write_synthetic_llama(tmp_path)
    model = dummy_model(
        tmp_path, dtype=jnp.dtype("float32"), mesh=single_device_mesh(jax.devices()[0])
    ).model
    with LLM(tmp_path, **OPTIONS | {"max_num_batched_tokens": 16}) as llm:
        runner = llm.engine._runner
        runner._forward = WholeForward(model, runner.view, llm._mesh, {})
        runner._steps, runner._samples = step_buckets("gpu", 4, 2, 8), row_buckets("gpu", 4)
        llm.load_dummy_adapters(["a", "b"], [8, 16], ("q", "v"))
        llm.warm_up()
        ready = llm.stats().compiles
        assert ready == 5  # with and without LoRA; decode, decode and prefill; sampling
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        llm.generate(["abc"] * 4, ["a", "b", None, "a"], params)
        llm.generate(["abcdefghij"] * 4, None, params)
        assert llm.stats().compiles == ready
        programs = dict(runner._forward._programs._compiled)
        llm.warm_up()
        assert runner._forward._programs._compiled == programs  # the very same ones


def test_after_warming_up_plain_xla_compiles_nothing_for_its_sizes(tmp_path):
    write_synthetic_llama(tmp_path)
    with LLM(tmp_path, **OPTIONS | {"max_num_seqs": 2, "max_num_batched_tokens": 8}) as llm:
        llm.load_dummy_adapters(["a", "b"], [8, 8], ("q", "v"))
        llm.warm_up()
        ready = llm.stats().compiles
        assert ready == 8 * 3 + 2  # with and without LoRA: decode of 1, 2; prefill beside 0, 2
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        llm.generate(["abc"] * 3, ["a", "b", None], params)
        llm.generate(["abcdefghij"] * 3, None, params)
        assert llm.stats().compiles == ready


def test_a_larger_step_needs_more_memory(tmp_path):
    write_synthetic_llama(tmp_path)
    with LLM(tmp_path, **OPTIONS) as llm:

        def needed(max_num_seqs, max_prefill_tokens):
            return measure_step_bytes(
                llm._loaded.model,
                llm.engine.view,
                dtype=jnp.dtype("float32"),
                mesh=llm._mesh,
                max_num_seqs=max_num_seqs,
                prefill_tile=8,
                max_prefill_tokens=max_prefill_tokens,
                max_model_len=64,
            )

        logits = 64 * llm.vocab_size * 4
        assert needed(64, 32) > 2 * logits
        assert needed(4, 512) > needed(4, 32)
