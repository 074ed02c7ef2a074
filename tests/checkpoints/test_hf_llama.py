"""Llama directories: round trips against transformers; every kind of damaged or foreign input."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoints import CheckpointError
from checkpoints.hf_llama import CONFIG_KEYS, open_llama, read_config, write_llama
from checkpoints.name_map import canonical_name, hf_name, tensor_shapes
from checkpoints.synthetic import write_synthetic_llama

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
VARIANTS = {
    "gqa": {},
    "mha": {"num_heads": 4, "num_kv_heads": 4},
    "tied bf16 sharded": {
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "max_shard_bytes": 20_000,
    },
    "f16 llama3 wide heads": {
        "dtype": "float16",
        "rope_scaling": LLAMA3,
        "rope_theta": 5e5,
        "head_dim": 32,
    },
}


def edit_weights(model: Path, change) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors")


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_written_is_what_is_read(tmp_path: Path, variant: str):
    written = write_synthetic_llama(tmp_path, seed=3, **VARIANTS[variant])
    checkpoint = open_llama(tmp_path)
    assert checkpoint.config == written == read_config(tmp_path)
    assert tuple(checkpoint.config) == CONFIG_KEYS
    assert checkpoint.names() == list(tensor_shapes(written))
    for name, shape in tensor_shapes(written).items():
        array = checkpoint.read(name)
        assert array.shape == shape
        assert array.dtype.name == written["dtype"]
    assert len(list(tmp_path.glob("*.index.json"))) == ("sharded" in variant)

    again = tmp_path / "again"
    write_llama(again, written, {name: checkpoint.read(name) for name in checkpoint.names()})
    other = open_llama(again)
    assert other.config == written
    for name in checkpoint.names():
        assert other.read(name).tobytes() == checkpoint.read(name).tobytes()


@pytest.mark.oracle
@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_reads_what_is_written_and_back(tmp_path: Path, variant: str):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = write_synthetic_llama(tmp_path / "ours", **VARIANTS[variant])
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype="auto", output_loading_info=True
    )
    assert not any(report.values()), report
    state = model.state_dict()
    ours = open_llama(tmp_path / "ours")
    for name in ours.names():
        expected = state[hf_name(name)].to(torch.float32).numpy()
        np.testing.assert_array_equal(ours.read(name).astype(np.float32), expected)

    # transformers 5 spells the config another way (dtype, rope_parameters)
    model.save_pretrained(tmp_path / "theirs")
    assert "rope_parameters" in json.loads((tmp_path / "theirs/config.json").read_text())
    theirs = open_llama(tmp_path / "theirs")
    assert theirs.config == config
    for name in ours.names():
        assert theirs.read(name).tobytes() == ours.read(name).tobytes()


def test_config_of_transformers_4_and_5_give_the_same(model: Path, edit):
    file = model / "config.json"
    four = read_config(model)
    edit(
        file,
        torch_dtype=...,
        rope_theta=...,
        rope_scaling=...,
        dtype="float32",
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    assert read_config(model) == four


def test_config_defaults_are_those_of_transformers(model: Path, edit):
    removed = [
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "attention_bias",
        "mlp_bias",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
        "max_position_embeddings",
        "tie_word_embeddings",
        "torch_dtype",
        "bos_token_id",
        "eos_token_id",
    ]
    edit(model / "config.json", **dict.fromkeys(removed, ...))
    (model / "generation_config.json").unlink()
    config = read_config(model)
    assert config["num_kv_heads"] == 4
    assert config["head_dim"] == 4
    assert config["rms_norm_eps"] == 1e-6
    assert config["rope_theta"] == 10_000.0
    assert config["rope_scaling"] is None
    assert config["max_position_embeddings"] == 2048
    assert config["tie_word_embeddings"] is False
    assert (config["bos_token_id"], config["eos_token_ids"]) == (1, (2,))
    assert config["dtype"] == "float32"


def test_eos_ids_are_the_union_of_both_files(model: Path, edit):
    edit(model / "config.json", eos_token_id=7)
    edit(model / "generation_config.json", eos_token_id=[9, 7, 11])
    assert read_config(model)["eos_token_ids"] == (7, 9, 11)
    edit(model / "config.json", eos_token_id=None, bos_token_id=None)
    edit(model / "generation_config.json", eos_token_id=None)
    config = read_config(model)
    assert (config["bos_token_id"], config["eos_token_ids"]) == (None, ())


def test_rope_scaling_is_llama3s_or_none(model: Path, edit):
    file = model / "config.json"
    edit(file, rope_scaling={"type": "default"})
    assert read_config(model)["rope_scaling"] is None
    edit(file, rope_scaling={"rope_type": "llama3", **LLAMA3})
    assert read_config(model)["rope_scaling"] == LLAMA3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type 'mistral' is not supported"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"model_type": ..., "architectures": ...}, "neither model_type nor architectures"),
        ({"attention_bias": True}, "attention_bias=true is not supported"),
        ({"mlp_bias": True}, "mlp_bias=true is not supported"),
        ({"attention_bias": "no"}, "attention_bias='no' must be true or false"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings=1 must be true or false"),
        ({"sliding_window": 4096}, "sliding_window is set"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config is set"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "of type 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "of type 'linear'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "of type 'dynamic'"),
        ({"rope_scaling": {"factor": 2.0}}, "no rope_type but factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor is missing"),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "mscale": 2}}, "mscale is not a known"),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}},
            "high_freq_factor must be above",
        ),
        ({"rope_scaling": "llama3"}, "must be an object"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
        ({"rope_theta": float("nan")}, "rope_theta=nan"),
        ({"rope_theta": 10**400}, "rope_theta=1000"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5'"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps=-1.0"),
        ({"hidden_size": 0}, "hidden_size=0"),
        ({"hidden_size": "16"}, "hidden_size='16'"),
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"vocab_size": True}, "vocab_size=True"),
        ({"vocab_size": 384.0}, "vocab_size=384.0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000"),
        ({"num_key_value_heads": 3}, "not divisible by num_key_value_heads=3"),
        ({"hidden_size": 18, "head_dim": ...}, "not divisible by num_attention_heads=4"),
        ({"head_dim": 3}, "head_dim=3 is odd"),
        ({"torch_dtype": "float64"}, "dtype 'float64'"),
        ({"torch_dtype": ["float32"]}, "is not supported"),
        ({"bos_token_id": "1"}, "bos_token_id='1'"),
        ({"eos_token_id": [2, -3]}, "eos_token_id=-3"),
    ],
)
def test_configs_that_are_refused(model: Path, edit, changes, message: str):
    edit(model / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        read_config(model)


def test_harmless_options_are_accepted(model: Path, edit):
    before = read_config(model)
    edit(model / "config.json", pretraining_tp=4, attention_dropout=0.1, unknown_thing={"a": 1})
    assert read_config(model) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[1]", "expected an object"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_config_that_is_no_json_object(model: Path, content: bytes, message: str):
    (model / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_llama(model)


def test_directories_that_are_none(model: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"no such directory"):
        open_llama(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is a file"):
        open_llama(model / "config.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="directory is empty"):
        open_llama(tmp_path / "empty")
    (model / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json: the file is missing"):
        open_llama(model)


def test_pickled_weights_are_refused_by_name(model: Path):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin, a pickle.*convert it to"):
        open_llama(model)
    (model / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"neither model.safetensors nor"):
        open_llama(model)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 2000, -1])
def test_truncated_weights(model: Path, keep: int):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="truncated or corrupt safetensors"):
        open_llama(model)


def test_weights_that_are_a_directory(model: Path):
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        open_llama(model)


def test_missing_tensor(model: Path):
    edit_weights(model, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(
        CheckpointError, match=r"missing tensor 'model.layers.1.mlp.up_proj.weight'"
    ):
        open_llama(model)


def test_missing_head_suggests_tying(model: Path):
    edit_weights(model, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match="set tie_word_embeddings to true"):
        open_llama(model)


def test_layers_beyond_the_config(model: Path, edit):
    edit(model / "config.json", num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"unexpected tensors 'model.layers.1.*a Llama of 1"):
        open_llama(model)


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_norm.weight", "model.layers.00.mlp.up_proj.weight"]
)
def test_unexpected_tensor(model: Path, name: str):
    edit_weights(model, lambda tensors: tensors.update({name: np.ones((4,), np.float32)}))
    with pytest.raises(CheckpointError, match=f"unexpected tensor '{name}'"):
        open_llama(model)


def test_wrong_shape(model: Path, edit):
    edit(model / "config.json", intermediate_size=28)
    with pytest.raises(CheckpointError, match=r"shape \[24, 16\], config.json implies \[28, 16\]"):
        open_llama(model)


@pytest.mark.parametrize("dtype", [np.int8, np.float64])
def test_wrong_dtype(model: Path, dtype):
    name = "model.norm.weight"
    edit_weights(model, lambda tensors: tensors.update({name: tensors[name].astype(dtype)}))
    with pytest.raises(CheckpointError, match=r"has dtype (I8|F64); convert it to F32"):
        open_llama(model)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_inf(model: Path, dtype, value: float):
    def spoil(tensors):
        tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(dtype)
        tensors["lm_head.weight"][3, 5] = value

    edit_weights(model, spoil)
    checkpoint = open_llama(model)
    checkpoint.read("embed_tokens")
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' contains NaN or Inf"):
        checkpoint.read("lm_head")


def test_largest_finite_values_pass(model: Path):
    def stretch(tensors):
        tensors["lm_head.weight"][0, :2] = np.finfo(np.float32).max, np.finfo(np.float32).min

    edit_weights(model, stretch)
    open_llama(model).read("lm_head")


def test_unknown_name_and_vanished_file(model: Path):
    checkpoint = open_llama(model)
    with pytest.raises(CheckpointError, match=r"has no tensor 'layers.9.q'"):
        checkpoint.read("layers.9.q")
    (model / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        checkpoint.read("embed_tokens")


def test_buffers_of_old_checkpoints_are_ignored(model: Path):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones((2,), np.float64)}
    edit_weights(model, lambda tensors: tensors.update(extra))
    open_llama(model)


def test_a_tied_model_may_store_its_head(tmp_path: Path):
    write_synthetic_llama(tmp_path, tie_word_embeddings=True)
    embed = "model.embed_tokens.weight"
    edit_weights(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors[embed]}))
    assert "lm_head" not in open_llama(tmp_path).names()

    edit_weights(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors[embed] * 2}))
    with pytest.raises(CheckpointError, match="differs from the embeddings"):
        open_llama(tmp_path)


# --- shards ---


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write_synthetic_llama(tmp_path / "sharded", max_shard_bytes=60_000)
    return tmp_path / "sharded"


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("model-*.safetensors"))


def remap(sharded: Path, tensor: str, file: object) -> None:
    index = sharded / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    value["weight_map"][tensor] = file
    index.write_text(json.dumps(value))


@pytest.mark.parametrize(
    "file",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "sub/x.safetensors",
        "a\\b.safetensors",
        "..",
        ".",
        "",
        None,
        3,
        ["x"],
    ],
)
def test_index_that_escapes_its_directory(sharded: Path, file: object):
    shutil.copy(shards(sharded)[0], sharded / "../outside.safetensors")
    remap(sharded, "model.embed_tokens.weight", file)
    with pytest.raises(CheckpointError, match=r"no plain file name; refused"):
        open_llama(sharded)


def test_index_that_names_a_pickle(sharded: Path):
    remap(sharded, "model.embed_tokens.weight", "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only .safetensors files are read"):
        open_llama(sharded)


def test_index_and_shards_that_disagree(sharded: Path):
    first, second = (file.name for file in shards(sharded)[:2])
    name = "model.layers.0.input_layernorm.weight"  # it shares the second shard with others
    remap(sharded, name, first)
    with pytest.raises(CheckpointError, match=r"00002.*holds tensor .* which the index maps to"):
        open_llama(sharded)
    remap(sharded, name, second)
    remap(sharded, "model.invented.weight", first)
    with pytest.raises(CheckpointError, match=r"'model.invented.weight' is missing"):
        open_llama(sharded)


def test_missing_shard_and_broken_index(sharded: Path):
    index = sharded / "model.safetensors.index.json"
    shards(sharded)[1].unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-.*: the file is missing"):
        open_llama(sharded)
    index.write_text('{"weight_map": []}')
    with pytest.raises(CheckpointError, match="no weight_map object"):
        open_llama(sharded)


def test_symlinked_files_are_followed(model: Path, tmp_path: Path):
    """The hub's cache keeps blobs elsewhere and links to them."""
    blob = tmp_path / "blob"
    (model / "model.safetensors").rename(blob)
    (model / "model.safetensors").symlink_to(blob)
    open_llama(model).read("embed_tokens")


# --- writing ---


def test_write_refuses_what_does_not_fit(model: Path, tmp_path: Path):
    checkpoint = open_llama(model)
    tensors = {name: checkpoint.read(name) for name in checkpoint.names()}
    with pytest.raises(CheckpointError, match="already holds a model"):
        write_llama(model, checkpoint.config, tensors)
    with pytest.raises(CheckpointError, match="disagree about tensor 'lm_head'"):
        write_llama(tmp_path / "a", {**checkpoint.config, "tie_word_embeddings": True}, tensors)
    with pytest.raises(CheckpointError, match=r"'final_norm' has shape \[15\]"):
        write_llama(tmp_path / "b", checkpoint.config, {**tensors, "final_norm": np.ones(15)})
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_llama(tmp_path / "file", checkpoint.config, tensors)


def test_names_go_both_ways(tiny_config):
    for name in tensor_shapes({**tiny_config, "num_layers": 12}):
        assert canonical_name(hf_name(name)) == name
    for name in ("", "weight", "lm_head", "lm_head.bias", "model.layers.-1.mlp.up_proj.weight"):
        assert canonical_name(name) is None
    with pytest.raises(KeyError):
        hf_name("layers.0.z")
