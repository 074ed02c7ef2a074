"""A writer of tiny GGUF files as llama.cpp's converter makes them, for the tests here."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from checkpoints.hf_llama import open_llama
from checkpoints.synthetic import write_synthetic_llama

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
PARTS = {
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
OUTER = {
    "embed_tokens": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "lm_head": "output.weight",
}


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's `LlamaModel.permute` (convert_hf_to_gguf.py)."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def write_tiny_gguf(
    path: Path,
    scratch: Path,
    *,
    tied: bool = False,
    quantization: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    metadata: dict[str, Any] | None = None,
    extra_tensors: tuple[str, ...] = (),
    left_out: tuple[str, ...] = (),
) -> dict[str, np.ndarray]:
    """Write a tiny Llama; return its weights by canonical name, as they are after quantisation.

    `metadata` adds to or replaces the file's (None leaves a key out).
    """
    config = write_synthetic_llama(
        scratch, hidden_size=32, intermediate_size=64, tie_word_embeddings=tied, rope_theta=5e4
    )
    source = open_llama(scratch)
    tokens = [chr(0x100 + i) for i in range(256)] + ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens += [tokens[0x48] + tokens[0x69], "<plain>"]
    tokens += [f"unused{i}" for i in range(384 - len(tokens))]
    types = [1] * 256 + [3, 3, 3, 1, 4] + [5] * (384 - 261)
    values: dict[str, Any] = {
        "general.architecture": "llama",
        "llama.vocab_size": 384,
        "llama.context_length": 512,
        "llama.embedding_length": 32,
        "llama.block_count": 2,
        "llama.feed_forward_length": 64,
        "llama.rope.dimension_count": 8,
        "llama.rope.freq_base": 5e4,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [f"{tokens[0x48]} {tokens[0x69]}"],
        "tokenizer.ggml.bos_token_id": 257,
        "tokenizer.ggml.eos_token_id": 258,
        "tokenizer.ggml.unknown_token_id": 256,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
        **(metadata or {}),
    }
    architecture = values.pop("general.architecture")
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    weights = {}
    for name in source.names():
        stored = source.read(name)
        part = name.rpartition(".")[2]
        ggml = OUTER.get(name) or f"blk.{name.split('.')[1]}.{PARTS[part]}.weight"
        if part in ("q", "k"):
            heads = config["num_heads"] if part == "q" else config["num_kv_heads"]
            stored = permute(stored, heads)
        kind = quantization if stored.ndim > 1 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(stored, kind)
        if ggml not in left_out:
            writer.add_tensor(ggml, data, raw_dtype=kind)
        weights[name] = (stored, gguf.quants.dequantize(data, kind))
    for ggml in extra_tensors:
        writer.add_tensor(ggml, np.ones((4,), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return _undo_permutation(weights, config)


def _undo_permutation(weights, config) -> dict[str, np.ndarray]:
    """By search, not by formula: find the row order that `permute` made."""
    result = {}
    for name, (_, stored) in weights.items():
        part = name.rpartition(".")[2]
        if part in ("q", "k"):
            heads = config["num_heads"] if part == "q" else config["num_kv_heads"]
            order = permute(np.arange(len(stored))[:, None], heads)[:, 0]
            stored = stored[np.argsort(order)]
        result[name] = stored
    return result
