"""PEFT LoRA adapters: directories or in-memory arrays in, one (A, B, scaling) per adapted
projection out.

It owns PEFT's rules for which modules a config adapts, with which rank and scaling, and the
cross-check of the config against the tensors in both directions. Whatever would change the result
and is not implemented is refused by name, never dropped. It refuses to know how adapters are stored
in memory or computed with, and pickle: `adapter_model.bin` is never opened.
"""

import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from checkpoints.errors import CheckpointError
from checkpoints.files import (
    FLOAT_DTYPES,
    read_json,
    read_small_file,
    require_directory,
    require_finite,
    to_json,
    write_safetensors,
)
from checkpoints.name_map import (
    TARGETS,
    module_name,
    other_module_names,
    parse_module,
    short_module_name,
    target_shape,
)

MAX_RANK = 256

# Options that cannot change what a trained, plain LoRA adapter computes: training, bookkeeping, or
# parameters of something that another option switches on.
_WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "lora_dropout",
    "lora_ga_config",
    "loftq_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
}
# Options that this module reads and checks one by one.
_HANDLED = {
    "alpha_pattern",
    "bias",
    "exclude_modules",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "peft_type",
    "r",
    "rank_pattern",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
}
# Options that must be unset, with what they would mean.
_REFUSED = {
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "fan_in_fan_out": "transposed weights",
    "kasa_config": "KaSA",
    "layer_replication": "layer replication",
    "lora_bias": "a bias on B",
    "megatron_config": "Megatron layers",
    "modules_to_save": "fully trained modules beside the LoRA pairs",
    "monteclora_config": "MonteCLoRA",
    "target_parameters": "LoRA on bare parameters",
    "trainable_token_indices": "trained token embeddings",
    "use_bdlora": "block-diagonal LoRA",
    "use_dora": "DoRA",
    "use_qalora": "QA-LoRA",
    "velora_config": "VeLoRA",
}
# Initialisations that leave the base weights alone; the others subtract the initial pair from them.
_PLAIN_INIT = (None, True, False, "eva", "gaussian", "mica", "orthogonal")

_TENSOR = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<half>[AB])(?:\.(?P<adapter>[^.]+))?\.weight"
)
# Tensor names that reveal a feature, in the order in which they are looked for.
_TELLTALES = (
    ("lora_magnitude_vector", "DoRA (use_dora)"),
    ("lora_embedding_", "LoRA on embeddings"),
    ("embed_tokens", "LoRA on, or retrained, embeddings"),
    ("lm_head", "LoRA on, or a retrained, lm_head"),
    ("modules_to_save", "modules_to_save"),
    ("trainable_tokens", "trainable_token_indices"),
    ("bias", "biases (bias or lora_bias)"),
)


@dataclass(frozen=True)
class LoraPair:
    """One adapted projection: y += scaling * B @ (A @ x)."""

    a: np.ndarray
    """[r, in] float32, float16 or bfloat16, read-only"""
    b: np.ndarray
    """[out, r], the dtype as stored, read-only"""
    scaling: float
    """alpha / r, or alpha / sqrt(r) with `use_rslora`"""

    @property
    def rank(self) -> int:
        """The number of rows of A."""
        return self.a.shape[0]


@dataclass(frozen=True)
class LoraAdapter:
    """A checked adapter. Two adapters with the same `digest` compute the same."""

    pairs: Mapping[tuple[int, str], LoraPair]
    """(layer, target) -> pair, in running order"""
    digest: str
    """sha256 over the pairs: layer, target, dtype, shape, bytes and scaling"""
    base_model: str | None
    """What the adapter says it was trained on; never checked, only shapes decide"""
    config: Mapping[str, Any]
    """The PEFT configuration it was read with"""


def read_peft_adapter(
    directory: str | os.PathLike[str], model_config: Mapping[str, Any]
) -> LoraAdapter:
    """Read `adapter_config.json` and `adapter_model.safetensors` of a PEFT directory.

    `model_config` is the base model's normalised config. Raises `CheckpointError` for everything
    `parse_peft_adapter` refuses, for missing, truncated or corrupt files, and for a directory that
    has only `adapter_model.bin`.
    """
    path = require_directory(directory, "a PEFT adapter")
    config_path, weights_path = path / "adapter_config.json", path / "adapter_model.safetensors"
    if not config_path.exists():
        raise CheckpointError(
            f"{path}: has no adapter_config.json; is this the directory that PEFT saved?"
        )
    adapter_config = read_json(config_path)
    source = str(path)
    # The options come before the weights: "use_dora" says more than the name of the tensor it
    # brings.
    adapted_modules(adapter_config, model_config, source=source)
    if not weights_path.exists():
        if (path / "adapter_model.bin").exists():
            raise CheckpointError(
                f"{path}: has only adapter_model.bin, a pickle, which is never loaded because it "
                "can run code; save the adapter again with a current PEFT (it writes "
                "adapter_model.safetensors)."
            )
        raise CheckpointError(f"{path}: has no adapter_model.safetensors.")
    tensors = read_small_file(weights_path)
    return parse_peft_adapter(tensors, adapter_config, model_config, source=source)


def parse_peft_adapter(
    tensors: Mapping[str, Any],
    adapter_config: Mapping[str, Any],
    model_config: Mapping[str, Any],
    *,
    source: str,
) -> LoraAdapter:
    """Check a PEFT state dict against its config and the base model, and return its pairs.

    `tensors`: name -> array-like (numpy, jax, torch on CPU). Names are PEFT's, e.g.
    `base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight`, also with an adapter's name
    before `.weight` and without the `base_model.model.` prefix. float64 arrays become float32,
    other floats stay as they are; the arrays are copied. `source` names the adapter in messages.
    Raises `CheckpointError`.
    """
    expected = adapted_modules(adapter_config, model_config, source=source)
    halves: dict[tuple[int, str], dict[str, np.ndarray]] = {}
    for name, value in tensors.items():
        key, half = _parse_tensor_name(name, model_config, source)
        if half in halves.setdefault(key, {}):
            raise CheckpointError(
                f"{source}: two tensors are lora_{half} of {module_name(*key)}; pass one adapter "
                "only."
            )
        halves[key][half] = _as_float_array(value, name, source)
    if not halves:
        raise CheckpointError(f"{source}: holds no LoRA tensor at all.")

    for key in halves:
        if key not in expected:
            raise CheckpointError(
                f"{source}: has tensors for {module_name(*key)}, which target_modules, "
                "layers_to_transform and exclude_modules of its config do not select; config and "
                "weights belong to different adapters."
            )
    pairs = {}
    for key, (rank, scaling) in expected.items():
        found = halves.get(key, {})
        for half in "AB":
            if half not in found:
                raise CheckpointError(
                    f"{source}: the config adapts {module_name(*key)}, but its lora_{half} tensor "
                    "is missing."
                )
        _check_shapes(key, found, rank, model_config, source)
        pairs[key] = LoraPair(found["A"], found["B"], scaling)
    base_model = adapter_config.get("base_model_name_or_path")
    return LoraAdapter(
        pairs,
        _digest(pairs),
        base_model if isinstance(base_model, str) else None,
        dict(adapter_config),
    )


def _parse_tensor_name(
    name: str, model_config: Mapping[str, Any], source: str
) -> tuple[tuple[int, str], str]:
    match = _TENSOR.fullmatch(name)
    key = parse_module(match["module"]) if match else None
    if match is None or key is None:
        for telltale, feature in _TELLTALES:
            if telltale in name:
                raise CheckpointError(
                    f"{source}: tensor {name!r} belongs to {feature}, which is not supported."
                )
        raise CheckpointError(
            f"{source}: tensor {name!r} matches no module of the Llama base model; expected names "
            f"like 'base_model.model.{module_name(0, 'q')}.lora_A.weight'."
        )
    if key[0] >= model_config["num_layers"]:
        raise CheckpointError(
            f"{source}: tensor {name!r} is for layer {key[0]}, but the base model has layers 0 to "
            f"{model_config['num_layers'] - 1}; the adapter was probably trained for another base "
            "model."
        )
    return key, match["half"]


def _as_float_array(value: Any, name: str, source: str) -> np.ndarray:
    try:
        array = np.asarray(value)
    except Exception as error:  # array-likes raise whatever they like
        raise CheckpointError(
            f"{source}: tensor {name!r} cannot be made a numpy array ({error})."
        ) from error
    array = np.array(array, order="C")  # a copy: the caller may go on writing to its own
    if array.dtype == np.float64:
        with np.errstate(over="ignore"):  # what overflows becomes Inf and is refused below
            array = array.astype(np.float32)
    if array.dtype not in FLOAT_DTYPES.values():
        raise CheckpointError(
            f"{source}: tensor {name!r} has dtype {array.dtype}; expected float32, float16 or "
            "bfloat16."
        )
    require_finite(array, f"{source}: tensor {name!r}")
    array.flags.writeable = False
    return array


def _check_shapes(
    key: tuple[int, str],
    found: Mapping[str, np.ndarray],
    rank: int,
    model_config: Mapping[str, Any],
    source: str,
) -> None:
    """A is [rank, in] and B is [out, rank]: first what the base model fixes, then the rank."""
    out_features, in_features = target_shape(model_config, key[1])
    name = module_name(*key)
    for half, axis, size, word in (
        ("A", 1, in_features, "inputs"),
        ("B", 0, out_features, "outputs"),
    ):
        shape = found[half].shape
        if len(shape) != 2 or shape[axis] != size:
            wanted = f"[r, {size}]" if half == "A" else f"[{size}, r]"
            raise CheckpointError(
                f"{source}: lora_{half} of {name} has shape {list(shape)}, but the base model has "
                f"{size} {word} there and needs {wanted}; the adapter was probably trained for "
                "another base model."
            )
    for half, axis in (("A", 0), ("B", 1)):
        if found[half].shape[axis] != rank:
            raise CheckpointError(
                f"{source}: lora_{half} of {name} has rank {found[half].shape[axis]}, but the "
                f"config (r, rank_pattern) says {rank}."
            )


def _digest(pairs: Mapping[tuple[int, str], LoraPair]) -> str:
    digest = hashlib.sha256()
    for (layer, target), pair in sorted(pairs.items()):
        for array in (pair.a, pair.b):
            digest.update(
                f"{layer}.{target} {array.dtype.name} {array.shape} {pair.scaling!r}\n".encode()
            )
            digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


def adapted_modules(
    adapter_config: Mapping[str, Any], model_config: Mapping[str, Any], *, source: str
) -> dict[tuple[int, str], tuple[int, float]]:
    """(layer, target) -> (rank, scaling) of every projection that an adapter's config selects, as
    PEFT resolves it.

    Raises `CheckpointError` for every option that is not supported, by name.
    """
    return _AdapterConfig(adapter_config, model_config, source).modules()


@dataclass(frozen=True)
class _AdapterConfig:
    """An adapter's config and the base model it is for; `fail` prefixes the adapter's name."""

    raw: Mapping[str, Any]
    model_config: Mapping[str, Any]
    source: str
    patterns: dict[str, re.Pattern[str]] = field(default_factory=dict)

    def fail(self, message: str) -> NoReturn:
        raise CheckpointError(f"{self.source}: adapter_config: {message}")

    def modules(self) -> dict[tuple[int, str], tuple[int, float]]:
        self.refuse_unsupported()
        rank_pattern = self.number_pattern("rank_pattern")
        alpha_pattern = self.number_pattern("alpha_pattern")
        default_rank, default_alpha = self.raw.get("r", 8), self.raw.get("lora_alpha", 8)
        rslora = self.raw.get("use_rslora") or False
        if not isinstance(rslora, bool):
            self.fail(f"use_rslora={rslora!r} must be true or false.")

        modules = {}
        for layer, target in self.selected():
            name = module_name(layer, target)
            rank = self.rank(self.by_pattern(rank_pattern, name, default_rank), name)
            alpha = self.alpha(self.by_pattern(alpha_pattern, name, default_alpha), name)
            modules[layer, target] = rank, alpha / math.sqrt(rank) if rslora else alpha / rank
        return modules

    def refuse_unsupported(self) -> None:
        if self.raw.get("peft_type") != "LORA":
            self.fail(f"peft_type {self.raw.get('peft_type')!r} is not supported; only 'LORA' is.")
        if self.raw.get("task_type") not in (None, "CAUSAL_LM"):
            self.fail(f"task_type {self.raw['task_type']!r} is not supported; only 'CAUSAL_LM' is.")
        if self.raw.get("bias", "none") not in ("none", None):
            self.fail(f"bias={self.raw['bias']!r} is not supported; train with bias='none'.")
        init = self.raw.get("init_lora_weights")
        if (init.lower() if isinstance(init, str) else init) not in _PLAIN_INIT:
            self.fail(
                f"init_lora_weights={init!r} changes the base weights, which is not supported; "
                "convert the adapter to a plain LoRA with PEFT: save_pretrained(path, "
                "path_initial_model_for_weight_conversion=…)."
            )
        runtime = self.raw.get("runtime_config") or {}
        if not isinstance(runtime, dict) or any(runtime.values()):
            self.fail(f"runtime_config={runtime!r} is not supported; remove it.")
        for key, meaning in _REFUSED.items():
            value = self.raw.get(key)
            # Of all these, only aLoRA is switched on by an empty list.
            if value or (value is not None and key == "alora_invocation_tokens"):
                self.fail(
                    f"{key} ({meaning}) is not supported; train or export the adapter without it."
                )
        for key, value in self.raw.items():
            if value and key not in _WITHOUT_EFFECT | _HANDLED | set(_REFUSED):
                self.fail(
                    f"{key}={value!r} is not known to this version, which cannot tell whether it "
                    "changes the result; remove it if it does not."
                )

    def rank(self, value: Any, name: str) -> int:
        if type(value) is not int or value < 1:
            self.fail(f"rank {value!r} of {name} must be a whole number above 0.")
        if value > MAX_RANK:
            self.fail(f"rank {value} of {name} is above {MAX_RANK}, the largest supported.")
        return value

    def alpha(self, value: Any, name: str) -> float:
        if type(value) not in (int, float) or not abs(value) < 1e30:
            self.fail(f"lora_alpha {value!r} of {name} must be a finite number.")
        return value

    def number_pattern(self, key: str) -> dict[str, Any]:
        value = self.raw.get(key) or {}
        if not isinstance(value, dict):
            self.fail(f"{key}={value!r} must be an object of module pattern -> number.")
        return value

    def by_pattern(self, pattern: Mapping[str, Any], name: str, default: Any) -> Any:
        """As PEFT: the first regular expression that matches the name or a dotted suffix of it."""
        for key, value in pattern.items():
            if self.compiled(rf"(.*\.)?({key})$").match(name):
                return value
        return default

    def compiled(self, pattern: str) -> re.Pattern[str]:
        if pattern not in self.patterns:
            try:
                self.patterns[pattern] = re.compile(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                self.fail(f"{pattern!r} is no regular expression ({error}).")
        return self.patterns[pattern]

    def selected(self) -> list[tuple[int, str]]:
        """The projections that the config's module selectors select, in running order."""
        num_layers = self.model_config["num_layers"]
        linear = {
            module_name(layer, target): (layer, target)
            for layer in range(num_layers)
            for target in TARGETS
        }
        wanted = self.target_modules(linear)
        excluded = self.names("exclude_modules")
        layers, layers_patterns = self.layers_to_transform(), self.layers_patterns()
        if isinstance(wanted, str) and (layers is not None or layers_patterns):
            self.fail("layers_to_transform needs target_modules to be a list, as in PEFT.")
        if layers_patterns and layers is None:
            self.fail("layers_pattern needs layers_to_transform, as in PEFT.")

        def selects(name: str) -> bool:
            if excluded and self.names_module(excluded, name):
                return False
            if not self.names_module(wanted, name):
                return False
            # As in PEFT, layers_to_transform does not bind modules that are named in full.
            if isinstance(wanted, str) or layers is None or name in wanted:
                return True
            return self.layer_index(name, layers_patterns) in layers

        for name in other_module_names(num_layers):
            if selects(name):
                self.fail(
                    f"target_modules selects {name!r}; only the projections "
                    f"{', '.join(short_module_name(target) for target in TARGETS)} can be adapted."
                )
        selected = [key for name, key in linear.items() if selects(name)]
        if not selected:
            self.fail(
                f"target_modules={self.raw.get('target_modules')!r} selects no module of the base "
                "model."
            )
        return selected

    def target_modules(self, linear: Mapping[str, Any]) -> str | frozenset[str]:
        wanted = self.names("target_modules")
        if wanted is None:
            return frozenset(("q_proj", "v_proj"))  # PEFT's default for Llama
        if isinstance(wanted, str) and wanted.lower() == "all-linear":
            if self.raw.get("layers_to_transform") is not None:
                self.fail("layers_to_transform needs target_modules to be a list, as in PEFT.")
            return frozenset(linear)
        return wanted

    def names(self, key: str) -> str | frozenset[str] | None:
        """A module selector: None, a regular expression, or a set of names and dotted suffixes."""
        value = self.raw.get(key)
        if value is None or isinstance(value, str):
            return value
        collection = isinstance(value, list | tuple | set | frozenset)
        if not collection or not all(isinstance(item, str) for item in value):
            self.fail(f"{key}={value!r} must be a string or a list of strings.")
        return frozenset(value)

    def names_module(self, selector: str | frozenset[str], name: str) -> bool:
        if isinstance(selector, str):
            return self.compiled(selector).fullmatch(name) is not None
        parts = name.split(".")
        return any(".".join(parts[start:]) in selector for start in range(len(parts)))

    def layers_to_transform(self) -> set[int] | None:
        value = self.raw.get("layers_to_transform")
        if value is None or value == []:
            return None
        layers = value if isinstance(value, list | tuple | set) else [value]
        num_layers = self.model_config["num_layers"]
        for layer in layers:
            if type(layer) is not int or not 0 <= layer < num_layers:
                self.fail(
                    f"layers_to_transform names layer {layer!r}, but the base model has layers 0 "
                    f"to {num_layers - 1}; the adapter was probably trained for another base model."
                )
        return set(layers)

    def layers_patterns(self) -> list[str]:
        self.names("layers_pattern")  # checks the type; the order matters here
        value = self.raw.get("layers_pattern") or []
        return [value] if isinstance(value, str) else list(value)

    def layer_index(self, name: str, layers_patterns: list[str]) -> int | None:
        """The number after the layers' list in a module's name; PEFT takes any list when no pattern
        is given.
        """
        patterns = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in layers_patterns]
        for pattern in patterns or [r".*?\.[^.]*\.(?P<idx>\d+)\."]:
            match = self.compiled(pattern).match(name)
            if match:
                return int(match["idx"])
        return None


def tensor_names(layer: int, target: str) -> tuple[str, str]:
    """The names under which PEFT stores A and B of one projection."""
    prefix = f"base_model.model.{module_name(layer, target)}"
    return f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"


def write_peft_adapter(
    directory: str | os.PathLike[str],
    pairs: Mapping[tuple[int, str], LoraPair],
    *,
    base_model: str | None = None,
    adapter_config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a directory that `read_peft_adapter` and `peft.PeftModel.from_pretrained` load.

    `adapter_config`: what decides modules, ranks and scalings (`r`, `lora_alpha`, `target_modules`,
    …); None derives it from the pairs, as alpha = scaling * rank (exact but for the last bit). The
    fields that every PEFT config has are filled in. Raises `CheckpointError` when the directory
    already holds an adapter, unless `overwrite`, or cannot be written.
    """
    path = Path(directory).expanduser()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        **(_config_of(pairs) if adapter_config is None else adapter_config),
    }
    text = to_json(config)
    tensors = {}
    for key, pair in pairs.items():
        a_name, b_name = tensor_names(*key)
        tensors[a_name], tensors[b_name] = pair.a, pair.b
    try:
        path.mkdir(parents=True, exist_ok=True)
        if (path / "adapter_config.json").exists() and not overwrite:
            raise CheckpointError(
                f"{path}: already holds an adapter; choose another directory, or overwrite it."
            )
        # Aside first: a write that fails leaves what was there.
        final = path / "adapter_model.safetensors", path / "adapter_config.json"
        aside = [file.with_suffix(".tmp") for file in final]
        try:
            write_safetensors(aside[0], tensors)
            aside[1].write_bytes(text)
            for source, target in zip(aside, final, strict=True):
                os.replace(source, target)
        finally:
            for file in aside:
                file.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error}.") from error


def _config_of(pairs: Mapping[tuple[int, str], LoraPair]) -> dict[str, Any]:
    """A config that gives exactly these modules their ranks and scalings."""
    settings = {
        module_name(*key): (pair.rank, pair.scaling * pair.rank) for key, pair in pairs.items()
    }
    (rank, alpha), _ = Counter(settings.values()).most_common(1)[0]
    escaped = {re.escape(name): values for name, values in settings.items()}
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: r for name, (r, _) in escaped.items() if r != rank},
        "alpha_pattern": {name: a for name, (_, a) in escaped.items() if a != alpha},
        "target_modules": sorted(settings),
    }
