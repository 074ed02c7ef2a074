"""Out and in again: arrays, PEFT directories and merged models answer as the engine does."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors

from slora_jax import (
    LLM,
    AdapterLoadError,
    AdapterNotFoundError,
    CapacityError,
    ConfigError,
    ModelLoadError,
    SamplingParams,
    load_base_model,
    merge_adapter,
    save_adapter,
    write_llama,
)
from slora_jax.base_model import adapted_modules
from slora_jax.training import DenseLlama, stack_adapter, stack_scaling
from tests.serving import random_prompts
from tests.training.runs import ADAPTER
from tests.training.test_forward import random_adapter

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPT = random_prompts([9])[0]
OPTIONS = {"pool_bytes": 2**22, "max_num_seqs": 4, "max_model_len": 64, "page_size": 16}


@pytest.fixture(scope="module")
def arrays(base):
    return random_adapter(adapted_modules(ADAPTER, base))


@pytest.fixture(scope="module")
def other(base):
    return random_adapter(adapted_modules(ADAPTER, base), seed=6)


@pytest.fixture(scope="module")
def saved(base, arrays, tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "adapter"
    save_adapter(directory, arrays, ADAPTER, base)
    return directory


@pytest.fixture(scope="module")
def llm(base, arrays, saved):
    with LLM(base, progress=False, **OPTIONS) as llm:
        assert llm.base_model is base
        llm.load_adapter("arrays", arrays, ADAPTER)
        llm.load_adapter("files", saved)
        yield llm


def dense_logits(model, arrays=None, base=None):
    dense = DenseLlama(model)
    lora, scaling = {}, {}
    if arrays is not None:
        modules = adapted_modules(ADAPTER, base)
        lora, scaling = stack_adapter(arrays, modules, 2), stack_scaling(modules, 2)
    row = np.array([PROMPT], np.int32)
    hidden = dense.hidden(
        dense.weights, lora, scaling, row, np.arange(9, dtype=np.int32)[None], np.ones_like(row)
    )
    return np.asarray(dense.logits(dense.weights, hidden))[0]


def tokens(llm, adapter):
    return llm.generate([PROMPT], adapter, GREEDY)[0].outputs[0].token_ids


def test_arrays_and_files_give_the_same_tokens(llm):
    served = tokens(llm, "arrays")
    assert served == tokens(llm, "files")
    assert served != tokens(llm, None)


def test_update_swaps_between_steps(llm, arrays, other):
    llm.load_adapter("live", arrays, ADAPTER)
    old, engine = tokens(llm, "live"), llm.engine
    llm.load_adapter("reference", other, ADAPTER)
    new = tokens(llm, "reference")
    assert old != new

    first = engine.add_request(PROMPT, GREEDY, "live")
    for _ in range(3):
        engine.step()
    before = next(info for info in llm.list_adapters() if info.name == "live")
    after = llm.update_adapter("live", other)
    assert after.version > before.version
    second = engine.add_request(PROMPT, GREEDY, "live")
    while engine.has_unfinished:
        engine.step()
    assert engine.output(first).outputs[0].token_ids == old
    assert engine.output(second).outputs[0].token_ids == new
    llm.unload_adapter("reference")


def test_update_of_files_and_of_a_pinned_adapter(llm, arrays, other, saved):
    llm.load_adapter("pinned", saved, pinned=True)
    info = llm.update_adapter("pinned", other)
    assert not info.has_file
    assert llm.stats().adapters_pinned == 1
    assert llm.engine.cache.is_pinned(info.version)
    llm.unload_adapter("pinned")


def test_updates_that_are_refused(llm, arrays):
    served = tokens(llm, "arrays")
    with pytest.raises(AdapterNotFoundError, match="nobody"):
        llm.update_adapter("nobody", arrays)
    name = next(iter(arrays))
    for wrong in ({**arrays, name: arrays[name][:, :-1]}, {}, {**arrays, "x": arrays[name]}, 3):
        with pytest.raises(AdapterLoadError):
            llm.update_adapter("arrays", wrong)
    assert tokens(llm, "arrays") == served


def test_update_within_the_host_budget(base, arrays, other):
    with LLM(base, progress=False, **OPTIONS) as llm:
        nbytes = llm.load_adapter("a", arrays, ADAPTER).nbytes
    with LLM(base, progress=False, host_adapter_bytes=nbytes, **OPTIONS) as llm:
        llm.load_adapter("a", arrays, ADAPTER)
        llm.update_adapter("a", other)  # the old one leaves first
        llm.engine.add_request(PROMPT, GREEDY, "a")
        with pytest.raises(CapacityError, match="host_adapter_bytes"):
            llm.update_adapter("a", arrays)


def test_merged_equals_on_the_fly(base, arrays, saved, llm):
    before = [np.array(leaf) for leaf in jax.tree.leaves(base.model)]
    merged = merge_adapter(base, arrays, ADAPTER)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.leaves(base.model))
    expected = dense_logits(base.model, arrays, base)
    np.testing.assert_allclose(dense_logits(merged.model), expected, atol=1e-3)
    assert np.abs(dense_logits(base.model) - expected).max() > 0.1
    same = merge_adapter(base, saved)
    jax.tree.map(np.testing.assert_array_equal, *map(jax.tree.leaves, (same.model, merged.model)))
    with LLM(merged, progress=False, **OPTIONS) as plain:
        assert tokens(plain, None) == tokens(llm, "arrays")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_written_and_read_again(base, model_directory, tmp_path, dtype):
    model = base if dtype == "float32" else load_base_model(model_directory, dtype=dtype)
    write_llama(tmp_path / "written", model)
    again = load_base_model(tmp_path / "written", dtype=dtype, progress=False)
    jax.tree.map(np.testing.assert_array_equal, *map(jax.tree.leaves, (again.model, model.model)))
    assert again.tokenizer.encode("Hi") == base.tokenizer.encode("Hi")
    assert again.eos_token_ids == base.eos_token_ids
    with pytest.raises(ModelLoadError, match="already holds a model"):
        write_llama(tmp_path / "written", model)


@pytest.mark.oracle
def test_peft_and_transformers_give_equal_logits(base, arrays, saved, tmp_path):
    import torch
    import transformers

    from tests.transformers_oracle import TransformersModel

    expected = dense_logits(base.model, arrays, base)
    peft = TransformersModel(base.directory, {"saved": saved}).logits(PROMPT, "saved")
    np.testing.assert_allclose(expected, peft, atol=1e-3)

    write_llama(tmp_path / "merged", merge_adapter(base, saved))
    merged = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, local_files_only=True
    )
    with torch.inference_mode():
        logits = merged(torch.tensor([PROMPT])).logits[0].numpy()
    np.testing.assert_allclose(expected, logits, atol=1e-3)


def test_a_configuration_that_cannot_be_written_leaves_what_was_there(base, arrays, tmp_path):
    numpy = {**ADAPTER, "lora_dropout": np.float32(0.5)}
    save_adapter(tmp_path, arrays, numpy, base, base_model=Path("somewhere"))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    about = json.loads(before["adapter_config.json"])
    assert (about["lora_dropout"], about["base_model_name_or_path"]) == (0.5, "somewhere")
    doubled = {name: 2 * array for name, array in arrays.items()}
    for odd in (object(), "\ud800", {"a": {1j}}):
        with pytest.raises(AdapterLoadError, match="cannot be written as JSON"):
            save_adapter(tmp_path, doubled, {**ADAPTER, "revision": odd}, base, overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(AdapterLoadError, match="is no name or path"):
        save_adapter(5, arrays, ADAPTER, base)
    odd = tmp_path / "odd"
    (odd / "adapter_model.safetensors").mkdir(parents=True)
    with pytest.raises(AdapterLoadError, match="cannot be written"):
        save_adapter(odd, arrays, ADAPTER, base)
    assert [path.name for path in odd.iterdir()] == ["adapter_model.safetensors"]


def test_a_model_whose_tokenizer_is_gone_is_not_written(model_directory, tmp_path):
    shutil.copytree(model_directory, tmp_path / "source")
    base = load_base_model(tmp_path / "source", progress=False)
    shutil.rmtree(tmp_path / "source")
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json is not there any more"):
        write_llama(tmp_path / "written", base)
    assert not (tmp_path / "written").exists()


def test_the_caller_keeps_its_configuration(llm, arrays):
    config = {**ADAPTER, "target_modules": list(ADAPTER["target_modules"])}
    llm.load_adapter("own", arrays, config)
    config["target_modules"].clear()
    llm.update_adapter("own", arrays)
    llm.unload_adapter("own")


def test_what_cannot_be_saved_or_merged(base, arrays, saved, tmp_path):
    with pytest.raises(AdapterLoadError, match="already holds an adapter"):
        save_adapter(saved, arrays, ADAPTER, base)
    with pytest.raises(ConfigError, match="dtype='int8'"):
        save_adapter(tmp_path / "x", arrays, ADAPTER, base, dtype="int8")
    huge = {name: np.full(np.shape(v), 1e30, np.float32) for name, v in arrays.items()}
    with pytest.raises(AdapterLoadError, match="beyond float16"):
        save_adapter(tmp_path / "x", huge, ADAPTER, base, dtype="float16")
    with pytest.raises(AdapterLoadError, match="beyond float32"):
        merge_adapter(base, huge, ADAPTER)
    config = {**ADAPTER, "target_modules": set(ADAPTER["target_modules"])}  # as PEFT's to_dict
    written = tmp_path / "written"
    for factor in (1, 2):
        save_adapter(
            written, {k: factor * v for k, v in arrays.items()}, config, base, overwrite=True
        )
    about = json.loads((written / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(base.directory)
    with safetensors.safe_open(written / "adapter_model.safetensors", "np") as file:
        for name, array in arrays.items():
            np.testing.assert_array_equal(file.get_tensor(name), 2 * array)
    with pytest.raises(AdapterLoadError, match="lora_A"):
        save_adapter(tmp_path / "x", {"lora_A": jnp.zeros((2, 2))}, ADAPTER, base)
    with pytest.raises(AdapterLoadError, match="give PEFT's adapter_config"):
        merge_adapter(base, arrays)
    with pytest.raises(AdapterLoadError, match="only with arrays"):
        merge_adapter(base, saved, ADAPTER)
    with pytest.raises(AdapterLoadError, match="no such directory"):
        merge_adapter(base, tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="dtype='int8'"):
        load_base_model(base.directory, dtype="int8")
    with pytest.raises(ConfigError, match="loaded in float32"):
        LLM(base, dtype="bfloat16")
    assert not (tmp_path / "x").exists()
