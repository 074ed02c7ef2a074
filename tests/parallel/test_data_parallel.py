"""Copies of a model share the prompts of a call, each as if it were alone."""

import jax
import numpy as np
import pytest

from slora_jax import DataParallelLLM, SamplingParams, data_parallel
from slora_jax.errors import AdapterInUseError, AdapterNotFoundError, ConfigError
from tests.serving import random_prompts

OPTIONS = {
    "dtype": "float32",
    "progress": False,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 16,
    "max_model_len": 32,
    "pool_bytes": 2**21,
}


def mesh_of(shape, *axes):
    count = int(np.prod(shape))
    return jax.sharding.Mesh(np.array(jax.devices()[:count]).reshape(shape), axes)


def test_prompts_are_shared_and_come_back_in_order(gqa, monkeypatch):
    monkeypatch.setattr(data_parallel, "LEAST_PART", 2)
    prompts = random_prompts((5, 9, 3, 12, 7), seed=4)
    adapter_ids = ["qv", None, "qv", "qv", None]
    mesh = mesh_of((1, 2), "model", "data")
    with DataParallelLLM(gqa.directory, mesh=mesh, **OPTIONS) as llm:
        owners = [{d for d in copy._mesh.devices.flat} for copy in llm.copies]
        assert owners == [set(mesh.devices[:, 0]), set(mesh.devices[:, 1])]
        llm.load_adapter("qv", gqa.adapters["qv"])
        with pytest.raises(AdapterInUseError):
            llm.load_adapter("qv", gqa.adapters["qv"])
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        outputs = llm.generate(prompts, adapter_ids, params, progress=False)
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        assert tokens == [gqa.greedy(p, a, 4) for p, a in zip(prompts, adapter_ids, strict=True)]
        assert all(stats.steps for stats in llm.stats())
        assert len({output.request_id for output in outputs}) == len(prompts)
        with pytest.raises(AdapterNotFoundError):
            llm.generate(prompts, ["qv", None, "no", None, None], params)
        llm.copies[0].unload_adapter("qv")
        llm.unload_adapter("qv")
        with pytest.raises(AdapterNotFoundError):
            llm.unload_adapter("qv")
        with pytest.raises(AdapterNotFoundError):
            llm.generate(prompts, "qv", params)


def test_a_mesh_of_copies_alone(gqa):
    with DataParallelLLM(gqa.directory, mesh=mesh_of((2,), "data"), **OPTIONS) as llm:
        owners = [list(copy._mesh.devices.flat) for copy in llm.copies]
    assert owners == [[device] for device in jax.devices()[:2]]


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (mesh_of((2,), "model"), "no axis 'data'"),
        (mesh_of((2, 2), "data", "rows"), "axes data, rows: only 'data' and 'model'"),
    ],
)
def test_meshes_without_copies(gqa, mesh, message):
    with pytest.raises(ConfigError, match=message):
        DataParallelLLM(gqa.directory, mesh=mesh, **OPTIONS)
