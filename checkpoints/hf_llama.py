"""Hugging Face Llama directories: `config.json` and safetensors, read and written.

It owns the normalised hyperparameters (what `read_config` returns), which options of a Llama config
are supported and which are refused by name, and the check of every tensor's name, shape and dtype
before one byte of weights is read. It refuses to know jax, devices, adapters, and pickle:
`pytorch_model.bin` is never opened.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from checkpoints.errors import CheckpointError
from checkpoints.files import (
    FLOAT_DTYPES,
    TensorInfo,
    read_header,
    read_json,
    read_tensor,
    require_directory,
    require_float_dtype,
    same_tensor,
    write_json,
    write_safetensors,
)
from checkpoints.name_map import canonical_name, hf_name, tensor_shapes

CONFIG_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "max_position_embeddings",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_ids",
    "dtype",
)
"""Exactly the keys of a normalised config."""

_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_DTYPES = ("float32", "float16", "bfloat16")
_MAX_LAYERS = 10_000
_MAX_SIZE = 2**31 - 1
# Buffers that old checkpoints carry beside the weights; they follow from the config.
_BUFFER = re.compile(r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the hyperparameters of a Llama directory, with exactly the keys `CONFIG_KEYS`.

    `config.json` of transformers 4 (`torch_dtype`, `rope_theta`, `rope_scaling`) and 5 (`dtype`,
    `rope_parameters`) are both understood. `rope_scaling` is None or a dict of exactly `factor`,
    `low_freq_factor`, `high_freq_factor`, `original_max_position_embeddings` (Llama 3's scaling).
    `eos_token_ids` is the union of `config.json` and `generation_config.json`. Raises
    `CheckpointError` for anything missing, inconsistent or not supported.
    """
    path = require_directory(directory, "a Hugging Face Llama model")
    raw = read_json(path / "config.json")
    generation_path = path / "generation_config.json"
    generation = read_json(generation_path) if generation_path.exists() else {}
    return _ConfigReader(raw, generation, str(path / "config.json")).read()


@dataclass(frozen=True)
class _ConfigReader:
    """One raw `config.json` on its way to the normalised form; `fail` prefixes the file's name."""

    raw: Mapping[str, Any]
    generation: Mapping[str, Any]
    source: str

    def fail(self, message: str) -> NoReturn:
        raise CheckpointError(f"{self.source}: {message}")

    def read(self) -> dict[str, Any]:
        self.refuse_unsupported()
        hidden = self.size("hidden_size")
        heads = self.size("num_attention_heads")
        kv_heads = self.size("num_key_value_heads", default=heads)
        if heads % kv_heads:
            self.fail(
                f"num_attention_heads={heads} is not divisible by num_key_value_heads={kv_heads}; "
                "correct the config."
            )
        if self.raw.get("head_dim") is None and hidden % heads:
            self.fail(
                f"hidden_size={hidden} is not divisible by num_attention_heads={heads} and "
                "head_dim is not given."
            )
        head_dim = self.size("head_dim", default=hidden // heads or 1)
        if head_dim % 2:
            self.fail(f"head_dim={head_dim} is odd; rotary embeddings need an even one.")
        rope_theta, rope_scaling = self.rope()
        return {
            "vocab_size": self.size("vocab_size"),
            "hidden_size": hidden,
            "intermediate_size": self.size("intermediate_size"),
            "num_layers": self.size("num_hidden_layers", most=_MAX_LAYERS),
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim": head_dim,
            "rms_norm_eps": self.positive("rms_norm_eps", self.raw.get("rms_norm_eps", 1e-6)),
            "rope_theta": rope_theta,
            "rope_scaling": rope_scaling,
            "max_position_embeddings": self.size("max_position_embeddings", default=2048),
            "tie_word_embeddings": self.boolean("tie_word_embeddings"),
            "bos_token_id": self.token_id("bos_token_id", self.raw.get("bos_token_id", 1)),
            "eos_token_ids": self.eos_token_ids(),
            "dtype": self.dtype(),
        }

    def refuse_unsupported(self) -> None:
        """Every option that changes the maths and that this library does not implement, by name."""
        raw = self.raw
        model_type = raw.get("model_type")
        architectures = raw.get("architectures")
        if model_type is None and architectures is None:
            self.fail(
                "has neither model_type nor architectures; this is no Hugging Face Llama config."
            )
        if model_type not in (None, "llama"):
            self.fail(f"model_type {model_type!r} is not supported; only 'llama' is.")
        if architectures not in (None, [], ["LlamaForCausalLM"]):
            self.fail(
                f"architectures {architectures!r} is not supported; only ['LlamaForCausalLM'] is."
            )
        for key in ("attention_bias", "mlp_bias"):
            if self.boolean(key):
                self.fail(f"{key}=true is not supported; only Llama models without biases are.")
        for key in ("sliding_window", "quantization_config"):
            if raw.get(key) is not None:
                self.fail(f"{key} is set, which is not supported; use a model without it.")
        activation = raw.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):  # two names of one function
            self.fail(f"hidden_act {activation!r} is not supported; only 'silu' is.")
        if raw.get("partial_rotary_factor") not in (None, 1):
            self.fail(
                f"partial_rotary_factor={raw['partial_rotary_factor']!r} is not supported; only 1 "
                "is."
            )
        # pretraining_tp > 1 is ignored as transformers does now: it only cut the same products into
        # slices, to repeat the rounding of a tensor-parallel training run.

    def size(self, key: str, *, default: int | None = None, most: int = _MAX_SIZE) -> int:
        value = self.raw.get(key)
        if value is None:
            value = default
        if value is None:
            self.fail(f"{key} is missing.")
        if type(value) is not int or not 0 < value <= most:
            self.fail(f"{key}={value!r} must be a whole number between 1 and {most}.")
        return value

    def positive(self, key: str, value: Any) -> float:
        if type(value) not in (int, float) or not 0 < value < 1e30:
            self.fail(f"{key}={value!r} must be a finite number above 0.")
        return float(value)

    def boolean(self, key: str) -> bool:
        value = self.raw.get(key)
        if value not in (None, True, False) or type(value) in (int, float):
            self.fail(f"{key}={value!r} must be true or false.")
        return bool(value)

    def token_id(self, key: str, value: Any) -> int | None:
        if value is not None and (type(value) is not int or not 0 <= value <= _MAX_SIZE):
            self.fail(f"{key}={value!r} must be a token id.")
        return value

    def eos_token_ids(self) -> tuple[int, ...]:
        ids: list[int] = []
        for value in (self.raw.get("eos_token_id", 2), self.generation.get("eos_token_id")):
            for item in value if isinstance(value, list) else [value]:
                token = self.token_id("eos_token_id", item)
                if token is not None and token not in ids:
                    ids.append(token)
        return tuple(ids)

    def dtype(self) -> str:
        value = self.raw.get("dtype")
        if value is None:
            value = self.raw.get("torch_dtype")
        if value in (None, "auto"):
            return "float32"
        name = value.removeprefix("torch.") if isinstance(value, str) else value
        if name not in _DTYPES:
            self.fail(
                f"dtype {value!r} is not supported; convert the weights to one of "
                f"{', '.join(_DTYPES)}."
            )
        return name

    def rope(self) -> tuple[float, dict[str, Any] | None]:
        """(theta, Llama 3 scaling or None), from `rope_parameters` or from `rope_theta` and
        `rope_scaling`.
        """
        key = "rope_scaling" if self.raw.get("rope_scaling") else "rope_parameters"
        rope = self.raw.get(key) or {}
        if not isinstance(rope, dict):
            self.fail(f"{key}={rope!r} must be an object.")
        theta = rope.get("rope_theta")
        if theta is None:
            theta = self.raw.get("rope_theta")
        theta = self.positive("rope_theta", 10_000.0 if theta is None else theta)
        if rope.get("partial_rotary_factor") not in (None, 1):
            self.fail(
                f"{key}: partial_rotary_factor={rope['partial_rotary_factor']!r} is not supported; "
                "only 1 is."
            )
        kind = rope.get("rope_type", rope.get("type"))
        others = sorted(set(rope) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"})
        if kind == "default" or (kind is None and not others):
            return theta, None
        if kind is None:
            self.fail(
                f"{key} has no rope_type but {', '.join(others)}; only 'llama3' and 'default' are "
                "supported."
            )
        if kind != "llama3":
            self.fail(f"{key} of type {kind!r} is not supported; only 'llama3' and 'default' are.")
        for name in others:
            if name not in _LLAMA3_KEYS and rope[name] is not None:
                self.fail(f"{key}: {name} is not a known option of the 'llama3' type.")
        for name in _LLAMA3_KEYS:
            if rope.get(name) is None:
                self.fail(f"{key}: {name} is missing; the 'llama3' type needs it.")
        scaling = {name: self.positive(f"{key}.{name}", rope[name]) for name in _LLAMA3_KEYS[:3]}
        if scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
            self.fail(f"{key}: high_freq_factor must be above low_freq_factor.")
        original = rope["original_max_position_embeddings"]
        if type(original) is not int or not 0 < original <= _MAX_SIZE:
            self.fail(
                f"{key}: original_max_position_embeddings={original!r} must be a whole number "
                "above 0."
            )
        return theta, {**scaling, "original_max_position_embeddings": original}


@dataclass(frozen=True)
class LlamaCheckpoint:
    """An opened Llama directory: every tensor checked by name, shape and dtype, none yet read."""

    config: dict[str, Any]
    """The normalised hyperparameters, see `read_config`."""
    directory: Path
    tensors: Mapping[str, TensorInfo]
    """Canonical name -> where it is stored, in running order."""

    def names(self) -> list[str]:
        """The canonical names, in the order in which a forward pass uses them."""
        return list(self.tensors)

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """Return one tensor by canonical name, dtype as stored (float32, float16 or bfloat16).

        With `index`, a slice for each dimension, only that part is read. Raises `CheckpointError`
        if it contains NaN or Inf, or if the name does not exist.
        """
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.directory}: has no tensor {name!r}; names() lists those there are."
            )
        return read_tensor(self.tensors[name], hf_name(name), index)


def open_llama(directory: str | os.PathLike[str]) -> LlamaCheckpoint:
    """Open a Llama directory: one `model.safetensors`, or shards with an index. Reads no weights.

    The config's `dtype` is then the one the embeddings are stored in. Raises `CheckpointError` for
    missing, unexpected or misshapen tensors, dtypes other than float32, float16 and bfloat16,
    truncated or corrupt files, an index that points out of the directory, and pickle-only
    directories.
    """
    config = read_config(directory)
    path = Path(directory).expanduser()
    stored = _stored_tensors(path)

    found: dict[str, TensorInfo] = {}
    unexpected = []
    for name, info in stored.items():
        canonical = canonical_name(name)
        if canonical is not None:
            found[canonical] = info
        elif not _BUFFER.fullmatch(name):
            unexpected.append(name)
    head = found.pop("lm_head", None) if config["tie_word_embeddings"] else None

    expected = tensor_shapes(config)
    missing = [name for name in expected if name not in found]
    unexpected += [hf_name(name) for name in found if name not in expected]
    if unexpected:
        raise CheckpointError(
            f"{path}: unexpected tensor{_listing(unexpected)}; config.json describes a Llama of "
            f"{config['num_layers']} layers without {'it' if len(unexpected) == 1 else 'them'}."
        )
    if missing:
        advice = (
            " (set tie_word_embeddings to true if it is shared)" if missing == ["lm_head"] else ""
        )
        raise CheckpointError(
            f"{path}: missing tensor{_listing([hf_name(name) for name in missing])}{advice}."
        )
    for name, shape in expected.items():
        _check_tensor(found[name], hf_name(name), shape)
    if head is not None:
        _check_tied_head(found["embed_tokens"], head)
    config["dtype"] = FLOAT_DTYPES[found["embed_tokens"].dtype].name
    return LlamaCheckpoint(config, path, {name: found[name] for name in expected})


def _check_tensor(info: TensorInfo, name: str, shape: tuple[int, ...]) -> None:
    if info.shape != shape:
        raise CheckpointError(
            f"{info.path}: tensor {name!r} has shape {list(info.shape)}, config.json implies "
            f"{list(shape)}; the weights and the config belong to different models."
        )
    require_float_dtype(info, name)


def _check_tied_head(embed: TensorInfo, head: TensorInfo) -> None:
    """A tied model may store its head too if it is the same matrix; if not, transformers unties."""
    if not same_tensor(embed, hf_name("embed_tokens"), head, "lm_head.weight"):
        raise CheckpointError(
            f"{head.path}: tensor 'lm_head.weight' differs from the embeddings although "
            "tie_word_embeddings is true; set it to false in config.json, or remove the tensor."
        )


def _stored_tensors(path: Path) -> dict[str, TensorInfo]:
    """Hugging Face name -> `TensorInfo` over the single file or all shards of a directory."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.exists():
        return read_header(single)
    if index.exists():
        return _sharded_tensors(path, index)
    pickles = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth") for file in path.glob(kind))
    if pickles:
        raise CheckpointError(
            f"{path}: has only {pickles[0]}, a pickle, which is never loaded because it can run "
            "code; convert it to safetensors (transformers: model.save_pretrained(directory))."
        )
    raise CheckpointError(
        f"{path}: has neither model.safetensors nor model.safetensors.index.json."
    )


def _sharded_tensors(path: Path, index: Path) -> dict[str, TensorInfo]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map object.")
    for name, file in weight_map.items():
        # A plain file name cannot leave the directory. Symlinks are followed: the hub's cache is
        # made of them, and an index cannot create one.
        if (
            not isinstance(file, str)
            or Path(file).name != file
            or "\\" in file
            or file in ("", ".", "..")
        ):
            raise CheckpointError(
                f"{index}: tensor {name!r} is mapped to {file!r}, which is no plain file name; "
                "refused."
            )
        if not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: tensor {name!r} is mapped to {file!r}; only .safetensors files are read."
            )
    stored: dict[str, TensorInfo] = {}
    for file in sorted(set(weight_map.values())):
        for name, info in read_header(path / file).items():
            if weight_map.get(name) != file:
                raise CheckpointError(
                    f"{path / file}: holds tensor {name!r}, which the index maps to "
                    f"{weight_map.get(name)!r}."
                )
            stored[name] = info
    for name, file in weight_map.items():
        if name not in stored:
            raise CheckpointError(
                f"{path / file}: tensor {name!r} is missing, although the index maps it there."
            )
    return stored


def _listing(names: list[str]) -> str:
    """`['a', 'b', …]` -> "s 'a', 'b' and 7 more", to follow the word "tensor"."""
    shown = ", ".join(repr(name) for name in names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{'s' if len(names) > 1 else ''} {shown}{more}"


def write_llama(
    directory: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    max_shard_bytes: int | None = None,
) -> None:
    """Write a directory that `open_llama` and transformers 4 and 5 load.

    `config` is normalised (`CONFIG_KEYS`; its `dtype` is replaced by that of the embeddings),
    `tensors` are float arrays by canonical name with exactly the shapes the config implies; the
    mapping is read one tensor at a time, so a lazy one keeps memory near `max_shard_bytes`. Tensors
    are cut into shards with an index when they exceed `max_shard_bytes`. Raises `CheckpointError`
    for a name or shape that does not fit, or a directory that already holds a model.
    """
    path = Path(directory).expanduser()
    expected = tensor_shapes(config)
    if set(tensors) != set(expected):
        odd = sorted(set(tensors) ^ set(expected))
        raise CheckpointError(
            f"{path}: the config and the given names disagree about tensor{_listing(odd)}."
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
        if any(path.glob("model*.safetensors*")):
            raise CheckpointError(f"{path}: already holds a model; choose another directory.")
        dtype = _write_weights(path, expected, tensors, max_shard_bytes)
        write_json(path / "config.json", _hf_config({**config, "dtype": dtype}))
        write_json(path / "generation_config.json", _hf_generation_config(config))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error}.") from error


def _write_weights(
    path: Path,
    expected: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, np.ndarray],
    max_shard_bytes: int | None,
) -> str:
    """Write shards as they fill, name them at the end; return the dtype of the embeddings."""
    shards: list[list[str]] = []
    shard: dict[str, np.ndarray] = {}
    total = shard_bytes = 0
    dtype = "float32"

    def flush() -> None:
        nonlocal shard, shard_bytes
        write_safetensors(path / f"part-{len(shards)}.safetensors", shard)
        shards.append(list(shard))
        shard, shard_bytes = {}, 0

    for name, shape in expected.items():
        array = np.asarray(tensors[name])
        if array.shape != shape or array.dtype not in FLOAT_DTYPES.values():
            raise CheckpointError(
                f"{path}: tensor {name!r} has shape {list(array.shape)} and dtype {array.dtype}; "
                f"expected {list(shape)} in {', '.join(_DTYPES)}."
            )
        if name == "embed_tokens":
            dtype = array.dtype.name
        if shard and max_shard_bytes is not None and shard_bytes + array.nbytes > max_shard_bytes:
            flush()
        shard[hf_name(name)] = array
        shard_bytes += array.nbytes
        total += array.nbytes
    flush()

    if len(shards) == 1:
        (path / "part-0.safetensors").rename(path / "model.safetensors")
        return dtype
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (path / f"part-{number}.safetensors").rename(path / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(path / "model.safetensors.index.json", index)
    return dtype


def _hf_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """In the spelling of transformers 4, which transformers 5 reads as well (not the reverse)."""
    scaling = config["rope_scaling"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "num_hidden_layers": config["num_layers"],
        "num_attention_heads": config["num_heads"],
        "num_key_value_heads": config["num_kv_heads"],
        "head_dim": config["head_dim"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": config["rms_norm_eps"],
        "rope_theta": config["rope_theta"],
        "rope_scaling": None if scaling is None else {"rope_type": "llama3", **scaling},
        "max_position_embeddings": config["max_position_embeddings"],
        "tie_word_embeddings": config["tie_word_embeddings"],
        "torch_dtype": config["dtype"],
        **_hf_generation_config(config),
    }


def _hf_generation_config(config: Mapping[str, Any]) -> dict[str, Any]:
    eos = list(config["eos_token_ids"])
    return {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
    }
