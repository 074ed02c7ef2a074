"""Names and shapes of a Llama's weights: Hugging Face names, our canonical names, PEFT module
names.

It owns the one table of the seven linear projections and the shapes that a config implies. It
refuses to know files. Canonical names: `embed_tokens` [V, H], `final_norm` [H], `lm_head` [V, H]
(absent when tied), `layers.{i}.{q|k|v|o|gate|up|down}` [out, in], `layers.{i}.input_norm` [H],
`layers.{i}.post_attention_norm` [H].
"""

import re
from collections.abc import Mapping
from typing import Any

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
"""The linear projections of a layer, in the order in which they run; each of them can carry a LoRA
pair.
"""

_MODULES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_TARGET_OF_MODULE = {module: target for target, module in _MODULES.items()}
_LAYER_PARTS = {
    **_MODULES,
    "input_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
}
_PART_OF_MODULE = {module: part for part, module in _LAYER_PARTS.items()}
_OUTER = {"embed_tokens": "model.embed_tokens", "final_norm": "model.norm", "lm_head": "lm_head"}
_OUTER_OF_MODULE = {module: name for name, module in _OUTER.items()}

_LAYER = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,5})\.(.+)")
_CANONICAL_LAYER = re.compile(r"layers\.(0|[1-9][0-9]{0,5})\.(.+)")


def hf_name(canonical: str) -> str:
    """`layers.3.q` -> `model.layers.3.self_attn.q_proj.weight`; `KeyError` for other names."""
    if canonical in _OUTER:
        return _OUTER[canonical] + ".weight"
    match = _CANONICAL_LAYER.fullmatch(canonical)
    if not match or match[2] not in _LAYER_PARTS:
        raise KeyError(canonical)
    return f"model.layers.{match[1]}.{_LAYER_PARTS[match[2]]}.weight"


def canonical_name(hf: str) -> str | None:
    """`model.layers.3.self_attn.q_proj.weight` -> `layers.3.q`; None for other names."""
    module, dot, kind = hf.rpartition(".")
    if not dot or kind != "weight":
        return None
    if module in _OUTER_OF_MODULE:
        return _OUTER_OF_MODULE[module]
    match = _LAYER.fullmatch(module)
    if not match or match[2] not in _PART_OF_MODULE:
        return None
    return f"layers.{match[1]}.{_PART_OF_MODULE[match[2]]}"


def module_name(layer: int, target: str) -> str:
    """(3, "q") -> `model.layers.3.self_attn.q_proj`, the name PEFT knows the module by."""
    return f"model.layers.{layer}.{_MODULES[target]}"


def parse_module(name: str) -> tuple[int, str] | None:
    """`model.layers.3.self_attn.q_proj` -> (3, "q"); None for every other module."""
    match = _LAYER.fullmatch(name)
    if not match or match[2] not in _TARGET_OF_MODULE:
        return None
    return int(match[1]), _TARGET_OF_MODULE[match[2]]


def short_module_name(target: str) -> str:
    """`q` -> `q_proj`, as `target_modules` of a PEFT config usually spells it."""
    return _MODULES[target].rpartition(".")[2]


def other_module_names(num_layers: int) -> list[str]:
    """Every module of transformers' Llama that cannot carry a LoRA pair here."""
    names = [
        "model",
        "model.embed_tokens",
        "model.layers",
        "model.norm",
        "model.rotary_emb",
        "lm_head",
    ]
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}"
        names += [prefix, f"{prefix}.self_attn", f"{prefix}.mlp", f"{prefix}.mlp.act_fn"]
        names += [f"{prefix}.input_layernorm", f"{prefix}.post_attention_layernorm"]
    return names


def target_shape(config: Mapping[str, Any], target: str) -> tuple[int, int]:
    """(out, in) of one projection under a normalised config."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    query = config["num_heads"] * config["head_dim"]
    key = config["num_kv_heads"] * config["head_dim"]
    return {
        "q": (query, hidden),
        "k": (key, hidden),
        "v": (key, hidden),
        "o": (hidden, query),
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
    }[target]


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every tensor that this config implies, in running order."""
    hidden = config["hidden_size"]
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (config["vocab_size"], hidden)}
    for layer in range(config["num_layers"]):
        shapes[f"layers.{layer}.input_norm"] = (hidden,)
        for target in TARGETS:
            if target == "gate":
                shapes[f"layers.{layer}.post_attention_norm"] = (hidden,)
            shapes[f"layers.{layer}.{target}"] = target_shape(config, target)
    shapes["final_norm"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head"] = (config["vocab_size"], hidden)
    return shapes
