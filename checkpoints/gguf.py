"""llama.cpp's GGUF files of Llama models, converted to Hugging Face directories.

It owns the meaning of GGUF's metadata and tensor names for the Llama architecture, the row order of
q and k that llama.cpp permutes, and the tokenizer inside the file. It refuses to know quantised
computation: every weight becomes float32, exactly as transformers' `gguf_file=` makes it.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from checkpoints.errors import CheckpointError
from checkpoints.files import new_directory, write_json
from checkpoints.hf_llama import write_llama
from checkpoints.name_map import tensor_shapes
from checkpoints.tokenizer import build_byte_level_bpe

_PARTS = {
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "input_norm": "attn_norm",
    "post_attention_norm": "ffn_norm",
}
_OUTER = {"embed_tokens": "token_embd", "final_norm": "output_norm", "lm_head": "output"}

_CONTROL, _USER_DEFINED = 3, 4  # GGUF's token types that are matched whole

_MAX_SHARD_BYTES = 4 << 30  # bounds the memory that a large model's conversion takes


def convert_gguf(
    gguf_path: str | os.PathLike[str],
    out_directory: str | os.PathLike[str],
    *,
    on_bytes: Callable[[int], object] | None = None,
) -> None:
    """Write a GGUF Llama as a Hugging Face directory with float32 weights and its tokenizer.

    `out_directory` appears complete, in one rename, or not at all; it must not exist or be empty.
    `on_bytes(n)` is called each time n bytes of the file are converted. Needs the `gguf` package.
    Raises `CheckpointError` for what is no Llama, for options that change
    the result and are not supported, and for tokenizers other than SmolLM's kind.
    """
    path, target = Path(gguf_path).expanduser(), Path(out_directory).expanduser()
    model = _GgufLlama(path, *_read(path))
    config = model.config()
    weights = model.weights(config, on_bytes or (lambda count: None))
    tokenizer = model.tokenizer()
    tokenizer_config = model.tokenizer_config(config)
    with new_directory(target) as directory:
        write_llama(directory, config, weights, max_shard_bytes=_MAX_SHARD_BYTES)
        tokenizer.save(str(directory / "tokenizer.json"))
        write_json(directory / "tokenizer_config.json", tokenizer_config)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(metadata, tensor name -> gguf's tensor, memory-mapped)."""
    require_gguf()
    import gguf

    if not path.is_file():
        raise CheckpointError(f"{path}: no such file.")
    try:
        reader = gguf.GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        return metadata, {tensor.name: tensor for tensor in reader.tensors}
    except Exception as error:  # the reader lets everything from struct to numpy through
        raise CheckpointError(
            f"{path}: truncated or corrupt GGUF file ({error}); fetch it again."
        ) from error


def require_gguf() -> None:
    """Raise `CheckpointError` if the `gguf` package is not installed."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise CheckpointError(
            'reading GGUF files needs the gguf package; pip install "slora-jax[gguf]".'
        ) from error


@dataclass(frozen=True)
class _GgufLlama:
    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Any]

    def fail(self, message: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {message}")

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        value = self.metadata.get(key, default)
        if value is None:
            self.fail(f"metadata {key} is missing.")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            self.fail(f"metadata {key} has the unexpected value {value!r}.")
        return value

    def strings(self, key: str) -> list[str]:
        values = self.get(key, list)
        if not all(isinstance(value, str) for value in values):
            self.fail(f"metadata {key} must be a list of strings.")
        return values

    def config(self) -> dict[str, Any]:
        """The normalised config; refuses by name what is not a plain Llama."""
        architecture = self.get("general.architecture", str)
        if architecture != "llama":
            self.fail(f"architecture {architecture!r} is not supported; only 'llama' is.")
        scaling = self.metadata.get("llama.rope.scaling.type", "none")
        if scaling != "none" or "rope_freqs.weight" in self.tensors:
            self.fail(
                "rope scaling in GGUF is not supported; use the model's Hugging Face directory."
            )
        if self.metadata.get("llama.expert_count"):
            self.fail("llama.expert_count: mixtures of experts are not supported.")
        heads = self.get("llama.attention.head_count", int)
        hidden = self.get("llama.embedding_length", int)
        if heads < 1 or hidden < 1:
            self.fail(f"has {heads} heads and {hidden} features; both must be above 0.")
        head_dim = self.get("llama.attention.key_length", int, hidden // heads)
        rotated = self.get("llama.rope.dimension_count", int, head_dim)
        if (
            rotated != head_dim
            or self.metadata.get("llama.attention.value_length", head_dim) != head_dim
        ):
            self.fail(f"key, value and rotary sizes differ ({head_dim}, {rotated}); not supported.")
        eos = [self.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot")]
        config = {
            "vocab_size": len(self.strings("tokenizer.ggml.tokens")),
            "hidden_size": hidden,
            "intermediate_size": self.get("llama.feed_forward_length", int),
            "num_layers": self.get("llama.block_count", int),
            "num_heads": heads,
            "num_kv_heads": self.get("llama.attention.head_count_kv", int, heads),
            "head_dim": head_dim,
            "rms_norm_eps": self.float32("llama.attention.layer_norm_rms_epsilon"),
            "rope_theta": self.float32("llama.rope.freq_base", 10_000.0),
            "rope_scaling": None,
            "max_position_embeddings": self.get("llama.context_length", int),
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "bos_token_id": self.metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_ids": tuple(dict.fromkeys(id_ for id_ in eos if isinstance(id_, int))),
            "dtype": "float32",
        }
        if not 0 < config["num_layers"] <= 10_000 or heads % max(config["num_kv_heads"], 1):
            self.fail("has inconsistent sizes (layers, heads).")
        return config

    def float32(self, key: str, default: float | None = None) -> float:
        """GGUF stores float32: the shortest decimal of that number, 1e-05 and not 9.9999997e-06."""
        return float(str(np.float32(self.get(key, float, default))))

    def weights(
        self, config: Mapping[str, Any], on_bytes: Callable[[int], object]
    ) -> "_LazyWeights":
        """The tensors by canonical name, checked against the config, not yet converted."""
        shapes = tensor_shapes(config)
        names = {name: _gguf_name(name) for name in shapes}
        missing = [name for name in names.values() if name not in self.tensors]
        extra = sorted(set(self.tensors) - set(names.values()))
        if missing or extra:
            word, name = ("missing", missing[0]) if missing else ("unexpected", extra[0])
            self.fail(
                f"{word} tensor {name!r}; only plain Llama models without biases are supported."
            )
        for name, shape in shapes.items():
            stored = tuple(int(size) for size in reversed(self.tensors[names[name]].shape))
            if stored != shape:
                self.fail(
                    f"tensor {names[name]!r} has shape {list(stored)}, expected {list(shape)}."
                )
        tensors = {name: self.tensors[names[name]] for name in shapes}
        return _LazyWeights(self.path, tensors, config, on_bytes)

    def tokenizer(self) -> Any:
        """The `tokenizers.Tokenizer` that the metadata describes."""
        model, kind = self.get("tokenizer.ggml.model", str), self.metadata.get("tokenizer.ggml.pre")
        if (model, kind) != ("gpt2", "smollm"):
            self.fail(
                f"tokenizer {model!r} with pre-tokenizer {kind!r} is not supported, only 'gpt2' "
                "with 'smollm'; use the model's Hugging Face directory."
            )
        tokens = self.strings("tokenizer.ggml.tokens")
        types: list[int] = self.get("tokenizer.ggml.token_type", list)
        parts = [merge.partition(" ") for merge in self.strings("tokenizer.ggml.merges")]
        if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
            self.fail("the token list is inconsistent (types missing, or a token twice).")
        bos = self.bos(tokens)
        try:
            return build_byte_level_bpe(
                tokens,
                [(first, second) for first, _, second in parts],
                special=[tokens[id_] for id_, kind in enumerate(types) if kind == _CONTROL],
                added=[tokens[id_] for id_, kind in enumerate(types) if kind == _USER_DEFINED],
                split_digits=True,
                bos=bos,
            )
        except Exception as error:  # the Rust library raises bare Exceptions
            raise CheckpointError(
                f"{self.path}: the tokenizer is inconsistent ({error})."
            ) from error

    def bos(self, tokens: list[str]) -> str | None:
        """The token put before every text, if the file says that one is."""
        if not self.metadata.get("tokenizer.ggml.add_bos_token"):
            return None
        id_ = self.get("tokenizer.ggml.bos_token_id", int)
        return tokens[self.token_id("bos", id_, len(tokens))]

    def token_id(self, kind: str, id_: Any, count: int) -> int:
        if not isinstance(id_, int) or not 0 <= id_ < count:
            self.fail(f"tokenizer.ggml.{kind}_token_id={id_!r} is no token.")
        return id_

    def tokenizer_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """`tokenizer_config.json`; its class makes transformers take tokenizer.json as it is."""
        tokens = self.metadata["tokenizer.ggml.tokens"]
        names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        result: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": config["max_position_embeddings"],
        }
        for hf, ggml in names.items():
            id_ = self.metadata.get(f"tokenizer.ggml.{ggml}_token_id")
            if id_ is not None:
                result[f"{hf}_token"] = tokens[self.token_id(ggml, id_, len(tokens))]
        template = self.metadata.get("tokenizer.chat_template")
        if isinstance(template, str):
            result["chat_template"] = template
        return result


def _gguf_name(canonical: str) -> str:
    """`layers.3.q` -> `blk.3.attn_q.weight`."""
    if canonical in _OUTER:
        return f"{_OUTER[canonical]}.weight"
    _, layer, part = canonical.split(".")
    return f"blk.{layer}.{_PARTS[part]}.weight"


class _LazyWeights(Mapping[str, np.ndarray]):
    """Canonical name -> float32 array, dequantised each time it is asked for."""

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, Any],
        config: Mapping[str, Any],
        on_bytes: Callable[[int], object],
    ):
        self._path, self._tensors, self._config, self._on_bytes = path, tensors, config, on_bytes

    def __getitem__(self, name: str) -> np.ndarray:
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        try:
            array = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self._path}: tensor {tensor.name!r} is quantised as {tensor.tensor_type.name}, "
                "which the gguf package cannot dequantise."
            ) from error
        self._on_bytes(int(tensor.n_bytes))
        part = name.rpartition(".")[2]
        if part == "q":
            return _unpermute(array, self._config["num_heads"])
        if part == "k":
            return _unpermute(array, self._config["num_kv_heads"])
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """[heads * head_dim, in] from llama.cpp's row order to Hugging Face's.

    llama.cpp rotates neighbouring rows (0, 1), (2, 3), …; Hugging Face rotates row i with row
    i + head_dim / 2.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, columns))
