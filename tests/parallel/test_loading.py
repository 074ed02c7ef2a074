"""Each device reads what it has and nothing else, from safetensors and from Orbax."""

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints import files
from checkpoints.hf_llama import read_config
from checkpoints.synthetic import write_synthetic_llama
from slora_jax import loading
from slora_jax.sharding import model_mesh

FLOAT32 = jnp.dtype("float32")


def arrays(model):
    flat = loading._flat_params(loading.nnx.state(model))
    return {loading._dotted(path): variable[...] for path, variable in flat}


@pytest.fixture
def directory(tmp_path):
    # A vocabulary that 4 and 8 do not divide; KV heads that 8 devices share.
    shape = {"num_heads": 8, "num_kv_heads": 4, "head_dim": 16, "vocab_size": 301}
    write_synthetic_llama(tmp_path / "model", seed=3, intermediate_size=96, **shape)
    return tmp_path / "model"


@pytest.mark.parametrize("devices", [4, 8])
def test_no_part_is_read_twice_and_none_for_nothing(directory, devices, monkeypatch):
    read = collections.Counter()
    read_tensor = files.read_tensor

    def counting(info, name, index=None):
        array = read_tensor(info, name, index)
        read[name] += array.size
        return array

    monkeypatch.setattr("checkpoints.hf_llama.read_tensor", counting)
    mesh = model_mesh(jax.devices()[:devices])
    loading.load_model(directory, dtype=FLOAT32, mesh=mesh, progress=False)
    for name, info in files.read_header(directory / "model.safetensors").items():
        copies = 1
        if "norm" in name:
            copies = devices if read[name] > math.prod(info.shape) else 1
        elif "k_proj" in name or "v_proj" in name:
            copies = max(devices // 4, 1)
        assert read[name] == copies * math.prod(info.shape), name


@pytest.mark.parametrize("devices", [2, 8])
def test_orbax_is_read_into_any_number_of_devices(directory, devices, tmp_path):
    def load(folder, count):
        mesh = model_mesh(jax.devices()[:count])
        return loading.load_model(folder, dtype=FLOAT32, mesh=mesh, progress=False)

    loading.save_model(load(directory, 8 // devices), tmp_path / "orbax")
    restored = arrays(load(tmp_path / "orbax", devices).model)
    expected = arrays(load(directory, devices).model)
    assert restored.keys() == expected.keys()
    for name, array in expected.items():
        assert restored[name].sharding == array.sharding, name
        np.testing.assert_array_equal(restored[name], array, err_msg=name)


def test_the_saved_form_knows_no_devices(directory, tmp_path):
    config = read_config(directory)
    for count in (1, 8):
        mesh = model_mesh(jax.devices()[:count])
        loaded = loading.load_model(directory, dtype=FLOAT32, mesh=mesh, progress=False)
        parts = {}
        for path, variable in loading._flat_params(loading.nnx.state(loaded.model)):
            parts |= loading._taken_apart(path, variable[...], loaded.model)
        for name, part in parts.items():
            stored = loading_source(directory).read(name)
            np.testing.assert_array_equal(part, stored, err_msg=name)
    assert config["num_kv_heads"] == 4


def loading_source(directory):
    from checkpoints.hf_llama import open_llama

    return open_llama(directory)
