"""PEFT adapters: the same modules, ranks and scalings as PEFT; every kind of bad input."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoints import CheckpointError
from checkpoints.name_map import TARGETS, module_name, parse_module, target_shape
from checkpoints.peft_lora import (
    LoraPair,
    adapted_modules,
    parse_peft_adapter,
    read_peft_adapter,
    write_peft_adapter,
)
from checkpoints.synthetic import write_synthetic_adapter

# 12 layers, so that a pattern for layer 1 can be mistaken for one of layer 11.
CONFIG: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_layers": 12,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 4,
}

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FULL_NAMES = [f"model.layers.{layer}.mlp.up_proj" for layer in range(0, 12, 2)]

# What PEFT accepts; the options decide modules, ranks and scalings.
ACCEPTED: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "mlp": {"target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "default": {},
    "all-linear": {"target_modules": "all-linear"},
    "All-Linear without q": {"target_modules": "All-Linear", "exclude_modules": ["q_proj"]},
    "rslora": {"target_modules": ALL, "use_rslora": True, "r": 6, "lora_alpha": 5},
    "regex": {"target_modules": r".*\.(1|3)\.self_attn\.(q|v)_proj"},
    "unsloth's regex": {
        "target_modules": (
            r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|v_proj).*?)"
            r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|up_proj)))"
        )
    },
    "one name in full": {"target_modules": ["model.layers.1.self_attn.q_proj"]},
    "suffixes": {"target_modules": ["1.self_attn.q_proj", "mlp.up_proj", "no_such_module"]},
    "many names in full": {"target_modules": FULL_NAMES},
    "exclude regex": {"target_modules": ALL, "exclude_modules": r".*\.1\d?\..*"},
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 11]},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": 1},
    "no layers": {"target_modules": ["q_proj"], "layers_to_transform": []},
    "layers_pattern": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [2],
        "layers_pattern": "layers",
    },
    "layers_pattern list": {
        "target_modules": ["v_proj"],
        "layers_to_transform": [0, 2],
        "layers_pattern": ["h", "layers"],
    },
    "layers do not bind full names": {
        "target_modules": ["model.layers.4.self_attn.q_proj", "v_proj"],
        "layers_to_transform": [2],
    },
    "rank_pattern": {
        "target_modules": ALL,
        "rank_pattern": {"q_proj": 2, "layers.1.self_attn.k_proj": 3, r"1\d\.mlp\..*": 5},
    },
    "first pattern wins": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 3, "q_proj": 2, ".*": 7, "v_proj": 1},
        "alpha_pattern": {"^model.layers.1.self_attn.q_proj": 9, "proj": 1, "1.*q_proj": 2.5},
    },
    "both patterns with rslora": {
        "target_modules": "all-linear",
        "use_rslora": True,
        "lora_alpha": 3.5,
        "rank_pattern": {"up_proj": 10},
        "alpha_pattern": {"up_proj": 64, "down_proj": 0},
    },
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
}


def peft_config(**options: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, **options}


def tensors_for(adapter_config: dict[str, Any], prefix: str = "base_model.model.", name: str = ""):
    """A complete state dict for a config, of ones."""
    tensors = {}
    for key, (rank, _) in adapted_modules(adapter_config, CONFIG, source="test").items():
        out_features, in_features = target_shape(CONFIG, key[1])
        module = prefix + module_name(*key)
        tensors[f"{module}.lora_A{name}.weight"] = np.ones((rank, in_features), np.float32)
        tensors[f"{module}.lora_B{name}.weight"] = np.ones((out_features, rank), np.float32)
    return tensors


def parse(tensors, adapter_config):
    return parse_peft_adapter(tensors, adapter_config, CONFIG, source="my adapter")


# --- against PEFT ---


@pytest.fixture(scope="module")
def llama():
    """A function that makes the small transformers model, the same each time."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    def make():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=CONFIG["vocab_size"],
                hidden_size=CONFIG["hidden_size"],
                intermediate_size=CONFIG["intermediate_size"],
                num_hidden_layers=CONFIG["num_layers"],
                num_attention_heads=CONFIG["num_heads"],
                num_key_value_heads=CONFIG["num_kv_heads"],
                head_dim=CONFIG["head_dim"],
            )
        )

    return make


def peft_pairs(model) -> dict[tuple[int, str], LoraPair]:
    """What PEFT holds for each module."""
    pairs = {}
    for name, module in model.base_model.model.named_modules():
        key = parse_module(name)
        if key is not None and hasattr(module, "lora_A"):
            a, b = (getattr(module, half)["default"].weight for half in ("lora_A", "lora_B"))
            scaling = module.scaling["default"]
            pairs[key] = LoraPair(a.detach().numpy(), b.detach().numpy(), scaling)
    return pairs


def assert_same(ours: dict[tuple[int, str], LoraPair], theirs: dict[tuple[int, str], LoraPair]):
    assert set(ours) == set(theirs)
    for key, pair in ours.items():
        assert pair.scaling == theirs[key].scaling, key
        np.testing.assert_array_equal(pair.a, theirs[key].a)
        np.testing.assert_array_equal(pair.b, theirs[key].b)


@pytest.mark.oracle
@pytest.mark.parametrize("case", sorted(ACCEPTED.keys() - {"first pattern wins"}))
def test_adapters_that_peft_saved(tmp_path: Path, llama, case: str):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    options = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, **ACCEPTED[case]}
    model = peft.get_peft_model(llama(), peft.LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path)  # sorts the patterns' keys, so their order is lost
    assert_same(dict(read_peft_adapter(tmp_path, CONFIG).pairs), peft_pairs(model))


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match")
@pytest.mark.parametrize("case", ACCEPTED)
def test_peft_selects_the_same_from_the_unresolved_config(llama, case: str):
    """PEFT resolves "all-linear" and the like before it saves; a hand-written config may not."""
    peft = pytest.importorskip("peft")
    options = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, **ACCEPTED[case]}
    theirs = peft_pairs(peft.get_peft_model(llama(), peft.LoraConfig(**options)))
    ours = adapted_modules(peft_config(**ACCEPTED[case]), CONFIG, source="test")
    assert ours == {key: (pair.rank, pair.scaling) for key, pair in theirs.items()}


@pytest.mark.oracle
def test_arrays_straight_from_a_peft_model(llama):
    """`parse_peft_adapter` takes what PEFT has in memory: torch tensors, sets, enums."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False)
    model = peft.get_peft_model(llama(), config)
    state = peft.get_peft_model_state_dict(model)
    adapter = parse(state, model.peft_config["default"].to_dict())
    assert_same(dict(adapter.pairs), peft_pairs(model))


SYNTHETIC = {
    "plain": {},
    "few": {"targets": ("q", "down"), "rank": 2, "layers_to_transform": [0, 7], "dtype": "float16"},
    "patterns": {
        "rank_pattern": {"layers.1.mlp.up_proj": 3},
        "alpha_pattern": {"k_proj": 1.0},
        "use_rslora": True,
        "alpha": 10,
    },
    "regex": {"target_modules": r".*\.3\..*_proj"},
}


@pytest.mark.oracle
@pytest.mark.parametrize("case", SYNTHETIC)
def test_peft_loads_what_is_written(tmp_path: Path, llama, case: str):
    peft = pytest.importorskip("peft")
    write_synthetic_adapter(tmp_path, CONFIG, seed=1, **SYNTHETIC[case])
    ours = dict(read_peft_adapter(tmp_path, CONFIG).pairs)
    assert_same(ours, peft_pairs(peft.PeftModel.from_pretrained(llama(), tmp_path)))

    # and from the pairs alone, without a config
    write_peft_adapter(tmp_path / "again", ours, base_model="somewhere/base")
    again = read_peft_adapter(tmp_path / "again", CONFIG)
    assert again.base_model == "somewhere/base"
    assert_same(dict(again.pairs), ours)
    theirs = peft_pairs(peft.PeftModel.from_pretrained(llama(), tmp_path / "again"))
    assert_same(ours, theirs)


@pytest.mark.oracle
@pytest.mark.parametrize("target_modules", [r".*self_attn.*", ["self_attn"], ["norm"], r".*"])
def test_selectors_that_peft_refuses_too(llama, target_modules):
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match="not supported"):
        peft.get_peft_model(llama(), peft.LoraConfig(target_modules=target_modules))
    with pytest.raises(CheckpointError, match=r"target_modules selects 'model"):
        adapted_modules(peft_config(target_modules=target_modules), CONFIG, source="test")


@pytest.mark.oracle
def test_every_option_of_pefts_config_is_classified():
    peft = pytest.importorskip("peft")
    from checkpoints import peft_lora

    known = peft_lora._WITHOUT_EFFECT | peft_lora._HANDLED | set(peft_lora._REFUSED)
    assert set(peft.LoraConfig().to_dict()) <= known


# --- what is accepted ---


def test_pairs_are_read_only_copies_in_running_order(adapter: Path, tiny_config):
    loaded = read_peft_adapter(adapter, tiny_config)
    assert list(loaded.pairs) == [(layer, target) for layer in range(2) for target in TARGETS]
    pair = loaded.pairs[1, "down"]
    assert (pair.rank, pair.a.shape, pair.b.shape) == (4, (4, 24), (16, 4))
    with pytest.raises(ValueError, match="read-only"):
        pair.a[0, 0] = 1
    mine = tensors_for(peft_config())
    parsed = parse(mine, peft_config())
    before = parsed.digest
    next(iter(mine.values()))[:] = 7
    assert parse(tensors_for(peft_config()), peft_config()).digest == before


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
@pytest.mark.parametrize("name", ["", ".default", ".my adapter"])
def test_spellings_of_names(prefix: str, name: str):
    config = peft_config(target_modules="all-linear")
    adapter = parse(tensors_for(config, prefix, name), config)
    assert len(adapter.pairs) == 7 * 12


def test_kinds_of_arrays():
    config = peft_config(target_modules=["model.layers.1.self_attn.q_proj"])
    reference = tensors_for(config)
    for convert in (jnp.asarray, np.asfortranarray, np.float64, np.ndarray.tolist):
        adapter = parse({name: convert(value) for name, value in reference.items()}, config)
        assert adapter.digest == parse(reference, config).digest
    for dtype in (np.float16, ml_dtypes.bfloat16):
        adapter = parse({name: x.astype(dtype) for name, x in reference.items()}, config)
        assert adapter.pairs[1, "q"].a.dtype == dtype
        assert adapter.digest != parse(reference, config).digest


def test_digest_is_of_content():
    config = peft_config(target_modules=["q_proj"], base_model_name_or_path="a")
    tensors = tensors_for(config)
    digest = parse(tensors, config).digest
    renamed = {**config, "base_model_name_or_path": "b"}
    assert parse(dict(reversed(tensors.items())), renamed).digest == digest
    assert parse(tensors, {**config, "lora_alpha": 9}).digest != digest
    name = next(iter(tensors))
    changed = {**tensors, name: tensors[name] * 2}
    assert parse(changed, config).digest != digest


def test_untrained_adapter_and_largest_rank():
    config = peft_config(r=256, target_modules=["q_proj"])
    tensors = tensors_for(config)
    tensors = {name: x * (0 if "lora_B" in name else 1) for name, x in tensors.items()}
    assert parse(tensors, config).pairs[0, "q"].rank == 256


# --- what is refused: options ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported"),
        ({"peft_type": None}, "peft_type None"),
        ({"task_type": "SEQ_CLS"}, "task_type 'SEQ_CLS'"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias='all'"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"target_parameters": ["mlp.gate_up_proj"]}, "target_parameters"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"use_qalora": True}, "use_qalora"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config"),
        ({"kasa_config": {"beta": 1e-4}}, "kasa_config"),
        ({"monteclora_config": {"num_samples": 8}}, "monteclora_config"),
        ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
        ({"alora_invocation_tokens": []}, "alora_invocation_tokens"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"runtime_config": {"ephemeral_gpu_offload": True}}, "runtime_config"),
        *(
            ({"init_lora_weights": init}, f"{init}.*path_initial_model_for_weight_conversion")
            for init in ("pissa", "pissa_niter_16", "olora", "OLoRA", "loftq", "corda", "lora_ga")
        ),
        ({"some_future_option": 3}, "some_future_option=3 is not known to this version"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules selects 'lm_head'"),
        ({"target_modules": ["embed_tokens"]}, "target_modules selects 'model.embed_tokens'"),
        ({"target_modules": ["query_key_value"]}, "selects no module of the base model"),
        ({"target_modules": []}, "selects no module of the base model"),
        ({"target_modules": "(unclosed"}, "is no regular expression"),
        ({"target_modules": [1]}, "target_modules=.* must be a string or a list"),
        ({"target_modules": 5}, "target_modules=5 must be"),
        ({"exclude_modules": {"a": [1]}}, "exclude_modules=.* must be a string or a list"),
        ({"exclude_modules": ["q_proj", "v_proj"]}, "selects no module"),
        ({"target_modules": ".*q_proj", "layers_to_transform": [1]}, "to be a list, as in PEFT"),
        ({"target_modules": "all-linear", "layers_to_transform": [1]}, "to be a list, as in PEFT"),
        ({"target_modules": ["q_proj"], "layers_pattern": "h"}, "needs layers_to_transform"),
        ({"layers_to_transform": [12]}, r"names layer 12, but the base model has layers 0 to 11"),
        ({"layers_to_transform": ["1"]}, "names layer '1'"),
        ({"r": 0}, "rank 0"),
        ({"r": 257}, "rank 257 .* is above 256"),
        ({"r": "8"}, "rank '8'"),
        ({"r": True}, "rank True"),
        ({"rank_pattern": {"q_proj": 2.0}}, "rank 2.0"),
        ({"rank_pattern": {"(": 2}}, "is no regular expression"),
        ({"rank_pattern": [2]}, "rank_pattern=.* must be an object"),
        ({"lora_alpha": "16"}, "lora_alpha '16'"),
        ({"lora_alpha": float("nan")}, "lora_alpha nan"),
        ({"lora_alpha": float("inf")}, "lora_alpha inf"),
        ({"alpha_pattern": {"v_proj": None}}, "lora_alpha None"),
        ({"use_rslora": "yes"}, "use_rslora='yes'"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str):
    config = peft_config(**options)
    with pytest.raises(CheckpointError, match=f"my adapter: adapter_config: .*{message}"):
        parse(tensors_for(peft_config()), config)


def test_options_without_effect_are_accepted():
    config = peft_config(
        lora_dropout=0.1,
        inference_mode=True,
        revision="main",
        megatron_core="megatron.core",
        qalora_group_size=16,
        loftq_config={"loftq_bits": 4},
        eva_config={"rho": 2.0},
        runtime_config={"ephemeral_gpu_offload": False},
        some_future_option=None,
        another_one=False,
        bias=None,
        fan_in_fan_out=None,
    )
    assert parse(tensors_for(config), config).pairs


# --- what is refused: tensors ---


def test_tensors_the_config_does_not_select():
    config = peft_config(target_modules=["q_proj"])
    tensors = tensors_for(peft_config(target_modules=["q_proj", "v_proj"]))
    with pytest.raises(CheckpointError, match=r"layers.0.self_attn.v_proj, which target_modules"):
        parse(tensors, config)


def test_tensors_the_config_needs():
    config = peft_config(target_modules=["q_proj", "v_proj"])
    tensors = tensors_for(peft_config(target_modules=["q_proj"]))
    with pytest.raises(CheckpointError, match=r"adapts model.layers.0.self_attn.v_proj, but its"):
        parse(tensors, config)
    tensors = tensors_for(config)
    tensors.pop("base_model.model.model.layers.3.self_attn.v_proj.lora_B.weight")
    with pytest.raises(CheckpointError, match=r"layers.3.self_attn.v_proj, but its lora_B tensor"):
        parse(tensors, config)
    with pytest.raises(CheckpointError, match="holds no LoRA tensor at all"):
        parse({}, config)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("base_model.model.transformer.h.0.attn.c_attn.lora_A.weight", "matches no module"),
        ("model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "matches no module"),
        ("base_model.model.layers.0.self_attn.q_proj.lora_A.weight", "matches no module"),
        ("nonsense", "matches no module"),
        ("base_model.model.model.layers.12.self_attn.q_proj.lora_A.weight", "is for layer 12"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "LoRA on embeddings"),
        ("base_model.model.model.embed_tokens.weight", "retrained, embeddings"),
        ("base_model.model.lm_head.lora_A.weight", "lm_head"),
        ("base_model.model.lm_head.weight", "lm_head"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias", "biases"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", "DoRA"),
    ],
)
def test_tensor_names_that_match_nothing(name: str, message: str):
    config = peft_config()
    with pytest.raises(CheckpointError, match=f"my adapter: .*{message}"):
        parse({name: np.ones((4, 8), np.float32), **tensors_for(config)}, config)


def test_two_adapters_in_one():
    config = peft_config()
    tensors = {**tensors_for(config, name=".one"), **tensors_for(config, name=".two")}
    with pytest.raises(CheckpointError, match="pass one adapter only"):
        parse(tensors, config)


def with_tensor(config: dict[str, Any], half: str, value: Any) -> dict[str, Any]:
    name = f"base_model.model.model.layers.2.self_attn.q_proj.lora_{half}.weight"
    return {**tensors_for(config), name: value}


@pytest.mark.parametrize(
    ("half", "value", "message"),
    [
        ("A", np.ones((4, 9), np.float32), r"shape \[4, 9\], but the base model has 8 inputs"),
        ("B", np.ones((17, 4), np.float32), r"shape \[17, 4\].*16 outputs.*another base model"),
        ("B", np.ones((4, 16), np.float32), r"needs \[16, r\]"),
        ("A", np.ones((8,), np.float32), r"shape \[8\]"),
        ("A", np.ones((1, 4, 8), np.float32), r"shape \[1, 4, 8\]"),
        ("A", np.ones((5, 8), np.float32), "has rank 5, but the config .* says 4"),
        ("B", np.ones((16, 3), np.float32), "has rank 3, but the config .* says 4"),
        ("A", np.ones((4, 8), np.int32), "dtype int32"),
        ("A", np.ones((4, 8), np.complex64), "dtype complex64"),
        ("A", np.ones((4, 8), bool), "dtype bool"),
        ("A", np.full((4, 8), "x"), "dtype <U1"),
        ("A", np.full((4, 8), object(), object), "dtype object"),
        ("A", [[1.0], [1.0, 2.0]], "cannot be made a numpy array"),
        ("A", np.full((4, 8), np.nan, np.float32), "contains NaN or Inf"),
        ("B", np.full((16, 4), -np.inf, np.float16), "contains NaN or Inf"),
        ("B", np.full((16, 4), 1e300), "contains NaN or Inf"),
    ],
)
def test_tensors_that_are_refused(half: str, value: Any, message: str):
    config = peft_config()
    with pytest.raises(CheckpointError, match=message):
        parse(with_tensor(config, half, value), config)


# --- what is refused: directories ---


def test_directories_that_are_none(adapter: Path, tiny_config, tmp_path: Path):
    with pytest.raises(CheckpointError, match="no such directory"):
        read_peft_adapter(tmp_path / "nowhere", tiny_config)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="directory is empty"):
        read_peft_adapter(tmp_path / "empty", tiny_config)
    with pytest.raises(CheckpointError, match="is a file"):
        read_peft_adapter(adapter / "adapter_config.json", tiny_config)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no adapter_config.json"):
        read_peft_adapter(adapter, tiny_config)


def test_bad_json(adapter: Path, tiny_config):
    (adapter / "adapter_config.json").write_text('{"r": 8,')
    with pytest.raises(CheckpointError, match=r"adapter_config.json: not valid JSON"):
        read_peft_adapter(adapter, tiny_config)


def test_missing_truncated_and_pickled_weights(adapter: Path, tiny_config):
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors: truncated or corrupt"):
        read_peft_adapter(adapter, tiny_config)
    file.rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"only adapter_model.bin, a pickle"):
        read_peft_adapter(adapter, tiny_config)
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"has no adapter_model.safetensors"):
        read_peft_adapter(adapter, tiny_config)


def test_stored_integers(adapter: Path, tiny_config):
    file = adapter / "adapter_model.safetensors"
    save_file({name: x.astype(np.int8) for name, x in load_file(file).items()}, file)
    with pytest.raises(CheckpointError, match="has dtype I8; convert it to"):
        read_peft_adapter(adapter, tiny_config)


def test_wrong_base_model(adapter: Path, tiny_config):
    with pytest.raises(CheckpointError, match="probably trained for another base model"):
        read_peft_adapter(adapter, {**tiny_config, "hidden_size": 32})
    with pytest.raises(CheckpointError, match="probably trained for another base model"):
        read_peft_adapter(adapter, {**tiny_config, "num_layers": 1})


def test_options_come_before_tensors(adapter: Path, tiny_config, edit):
    """The user is told "use_dora", not the name of a tensor that DoRA brings."""
    edit(adapter / "adapter_config.json", use_dora=True)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"use_dora \(DoRA\) is not supported"):
        read_peft_adapter(adapter, tiny_config)


def test_writing_twice_is_refused(adapter: Path, tiny_config):
    pairs = read_peft_adapter(adapter, tiny_config).pairs
    with pytest.raises(CheckpointError, match="already holds an adapter"):
        write_peft_adapter(adapter, pairs)
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 4
