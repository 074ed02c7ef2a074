"""Orbax round trips: the same bits under other shardings; clear errors for what does not fit."""

import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from checkpoints import CheckpointError, orbax
from checkpoints.hf_llama import open_llama
from checkpoints.tokenizer import Tokenizer

SPECS = {"layers.0.qkv": P("data", "model"), "a/b.c": P("model"), "half": P(None, "model")}


@pytest.fixture
def params() -> dict[str, jax.Array]:
    generator = np.random.default_rng(0)
    return {
        "layers.0.qkv": jnp.asarray(generator.standard_normal((8, 16)), jnp.float32),
        "a/b.c": jnp.asarray(generator.standard_normal(8), jnp.bfloat16),
        "half": jnp.asarray(generator.standard_normal((2, 4)), jnp.float16),
    }


@pytest.fixture
def saved(model: Path, params, tmp_path: Path) -> Path:
    config = open_llama(model).config
    orbax.save_model(tmp_path / "saved", config, params, files_from=model)
    return tmp_path / "saved"


def sharding(mesh: Mesh, name: str) -> NamedSharding:
    return NamedSharding(mesh, SPECS[name])


def mesh_of(*shape: int) -> Mesh:
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices (jax_num_cpu_devices)")
    count = shape[0] * shape[1]
    return Mesh(np.array(jax.devices()[:count]).reshape(shape), ("data", "model"))


def abstract(params, mesh: Mesh | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        name: jax.ShapeDtypeStruct(
            array.shape, array.dtype, sharding=sharding(mesh, name) if mesh else array.sharding
        )
        for name, array in params.items()
    }


def assert_same_bits(left: dict[str, jax.Array], right: dict[str, jax.Array]) -> None:
    assert set(left) == set(right)
    for name, array in left.items():
        assert array.dtype == right[name].dtype
        assert np.asarray(array).tobytes() == np.asarray(right[name]).tobytes()


def test_config_and_tokenizer_travel_along(saved: Path, model: Path):
    assert orbax.is_orbax_model(saved)
    assert not orbax.is_orbax_model(model)
    assert not orbax.is_orbax_model(saved / "nowhere")
    assert orbax.read_config(saved) == open_llama(model).config
    assert Tokenizer.from_directory(saved).encode("Hi") == [72, 105]


def test_onto_meshes_of_other_shapes_and_back(saved: Path, params, tmp_path: Path):
    mesh = mesh_of(2, 4)
    sharded = orbax.restore_model(saved, abstract(params, mesh))
    assert_same_bits(sharded, params)
    for name, array in sharded.items():
        assert array.sharding == sharding(mesh, name)
    assert sharded["layers.0.qkv"].addressable_shards[0].data.shape == (4, 4)

    orbax.save_model(tmp_path / "again", orbax.read_config(saved), sharded)
    other = mesh_of(4, 2)
    resharded = orbax.restore_model(tmp_path / "again", abstract(params, other))
    assert resharded["layers.0.qkv"].addressable_shards[0].data.shape == (2, 8)
    assert_same_bits(resharded, params)
    assert_same_bits(orbax.restore_model(tmp_path / "again", abstract(params)), params)


def test_dtype_of_the_abstract_value_wins(saved: Path, params):
    wanted = abstract(params)
    wanted["half"] = jax.ShapeDtypeStruct((2, 4), jnp.float32, sharding=params["half"].sharding)
    restored = orbax.restore_model(saved, wanted)["half"]
    np.testing.assert_array_equal(restored, params["half"].astype(jnp.float32))


def test_what_does_not_fit(saved: Path, params):
    wanted = abstract(params)
    with pytest.raises(CheckpointError, match=r"'half' was saved, but is not asked for"):
        orbax.restore_model(saved, {name: wanted[name] for name in wanted if name != "half"})
    with pytest.raises(CheckpointError, match=r"'more' was not saved"):
        orbax.restore_model(saved, {**wanted, "more": wanted["half"]})
    wrong = jax.ShapeDtypeStruct((4, 2), jnp.float16)
    with pytest.raises(CheckpointError, match=r"shape \[2, 4\], asked for is \[4, 2\]"):
        orbax.restore_model(saved, {**wanted, "half": wrong})


def test_saving_where_something_is(saved: Path, params):
    with pytest.raises(CheckpointError, match="already exists and is not empty"):
        orbax.save_model(saved, orbax.read_config(saved), params)
    with pytest.raises(CheckpointError, match="not in normalised form"):
        orbax.save_model(saved / "x", {"hidden_size": 3}, params)


def test_damaged_directories(saved: Path, params, model: Path, edit):
    with pytest.raises(CheckpointError, match="no complete model saved by save_model"):
        orbax.restore_model(model, abstract(params))
    with pytest.raises(CheckpointError, match="is not of a model that save_model"):
        orbax.read_config(model)
    edit(saved / "config.json", hidden_size=...)
    with pytest.raises(CheckpointError, match="is damaged"):
        orbax.read_config(saved)
    (saved / "params/_METADATA").write_text("{")
    with pytest.raises(CheckpointError, match="damaged Orbax checkpoint"):
        orbax.restore_model(saved, abstract(params))
    shutil.rmtree(saved / "params")
    assert not orbax.is_orbax_model(saved)


def test_damaged_arrays(saved: Path):
    """In a process of its own: Orbax's other reads end, noisily, after the one that fails."""
    for file in (saved / "params").rglob("d/*"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0xFF
        file.write_bytes(content)
    program = (
        "import sys, jax, jax.numpy as jnp\n"
        "from checkpoints import CheckpointError, orbax\n"
        "shapes = {'layers.0.qkv': (8, 16), 'a/b.c': (8,), 'half': (2, 4)}\n"
        "sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])\n"
        "abstract = {\n"
        "    name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)\n"
        "    for name, shape in shapes.items()\n"
        "}\n"
        "try:\n"
        "    orbax.restore_model(sys.argv[1], abstract)\n"
        "except CheckpointError as error:\n"
        "    print('refused:', error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(saved)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "refused:" in result.stdout, result.stderr


def test_interrupted_save_is_no_model(model: Path, params, tmp_path: Path, monkeypatch):
    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(orbax, "write_json", full_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        orbax.save_model(tmp_path / "saved", open_llama(model).config, params)
    assert not orbax.is_orbax_model(tmp_path / "saved")


def test_hugging_face_reader_says_what_it_is_not(saved: Path):
    with pytest.raises(CheckpointError, match="no Hugging Face Llama config"):
        open_llama(saved)
