"""Tiny random models and adapters in the real on-disk formats, for tests, benchmarks and examples.

It owns the distributions: logits spread widely enough that greedy choices are no near-ties,
attention that depends on positions, adapters that visibly change the output. It refuses to know
anything that only a test would: what it writes is read by the same code as every other checkpoint.
"""

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from checkpoints.errors import CheckpointError
from checkpoints.files import write_json
from checkpoints.hf_llama import write_llama
from checkpoints.name_map import TARGETS, short_module_name, target_shape, tensor_shapes
from checkpoints.peft_lora import LoraPair, adapted_modules, write_peft_adapter
from checkpoints.tokenizer import build_byte_level_bpe

SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
"""Ids 256, 257, …; ids 0 to 255 are the bytes."""
BOS_TOKEN_ID, EOS_TOKEN_ID = 256, 257

CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)

_LOGIT_SPREAD = 5.0
"""Standard deviation of the logits: the best is then typically 1.5 above the second."""


def write_synthetic_llama(
    directory: str | os.PathLike[str],
    *,
    seed: int = 0,
    dtype: str = "float32",
    vocab_size: int = 384,
    hidden_size: int = 64,
    intermediate_size: int = 128,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int | None = None,
    rms_norm_eps: float = 1e-5,
    rope_theta: float = 10_000.0,
    rope_scaling: Mapping[str, Any] | None = None,
    max_position_embeddings: int = 2048,
    tie_word_embeddings: bool = False,
    max_shard_bytes: int | None = None,
    add_bos_token: bool = False,
) -> dict[str, Any]:
    """Write a random Llama with a working tokenizer; return its normalised config.

    `add_bos_token`: whether the tokenizer puts BOS before every text, as Llama 3's does.

    The tokenizer has one token per byte, `SPECIAL_TOKENS`, and pairs of letters up to `vocab_size`
    (at least 261). `rope_scaling`: None, or Llama 3's four numbers. Equal arguments give equal
    files.
    """
    config = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim or hidden_size // num_heads,
        "rms_norm_eps": rms_norm_eps,
        "rope_theta": rope_theta,
        "rope_scaling": None if rope_scaling is None else dict(rope_scaling),
        "max_position_embeddings": max_position_embeddings,
        "tie_word_embeddings": tie_word_embeddings,
        "bos_token_id": BOS_TOKEN_ID,
        "eos_token_ids": (EOS_TOKEN_ID,),
        "dtype": dtype,
    }
    path = Path(directory).expanduser()
    write_llama(path, config, _random_weights(config, seed), max_shard_bytes=max_shard_bytes)
    _write_tokenizer(path, vocab_size, max_position_embeddings, add_bos_token)
    return config


def write_synthetic_adapter(
    directory: str | os.PathLike[str],
    model_config: Mapping[str, Any],
    *,
    seed: int,
    rank: int = 8,
    targets: Sequence[str] = TARGETS,
    alpha: float | None = None,
    use_rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    layers_to_transform: Sequence[int] | None = None,
    target_modules: Sequence[str] | str | None = None,
    dtype: str = "float32",
    scale: float = 0.5,
) -> None:
    """Write a random PEFT adapter for a model, with non-zero A and B.

    `alpha` defaults to twice the rank; `target_modules` overrides `targets` and is PEFT's: a list,
    a regular expression or "all-linear". `scale`: size of the change of each projection's output
    relative to a random model's own, whatever rank and alpha are.
    """
    adapter_config: dict[str, Any] = {
        "r": rank,
        "lora_alpha": 2 * rank if alpha is None else alpha,
        "use_rslora": use_rslora,
        "rank_pattern": dict(rank_pattern or {}),
        "alpha_pattern": dict(alpha_pattern or {}),
        "target_modules": [short_module_name(target) for target in targets],
        "layers_to_transform": None if layers_to_transform is None else list(layers_to_transform),
    }
    if target_modules is not None:
        named = target_modules if isinstance(target_modules, str) else list(target_modules)
        adapter_config["target_modules"] = named
    described = {"peft_type": "LORA", **adapter_config}
    generator = np.random.default_rng([1, seed])
    pairs = {}
    for key, (pair_rank, scaling) in adapted_modules(
        described, model_config, source=os.fspath(directory)
    ).items():
        out_features, in_features = target_shape(model_config, key[1])
        # With unit inputs, A x has variance 1, and B A x has (scale / scaling)².
        a = generator.normal(0, in_features**-0.5, (pair_rank, in_features))
        b = generator.normal(0, scale / (scaling * pair_rank**0.5), (out_features, pair_rank))
        pairs[key] = LoraPair(a.astype(_dtype(dtype)), b.astype(_dtype(dtype)), scaling)
    write_peft_adapter(directory, pairs, adapter_config=adapter_config)


def _random_weights(config: Mapping[str, Any], seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng([0, seed])
    dtype = _dtype(config["dtype"])
    weights = {}
    for name, shape in tensor_shapes(config).items():
        if name.endswith("norm"):
            weight = 1 + 0.1 * generator.standard_normal(shape)
        elif name in ("embed_tokens", "lm_head"):
            # The last norm's output has variance 1 per feature, so this is the spread of logits.
            weight = generator.normal(0, _LOGIT_SPREAD * shape[1] ** -0.5, shape)
        else:
            # Gain 1.5: sharp attention, and layers that outweigh the token's own embedding, which
            # a tied head would only repeat.
            weight = generator.normal(0, 1.5 * shape[1] ** -0.5, shape)
        weights[name] = weight.astype(dtype)
    return weights


def _dtype(name: str) -> np.dtype:
    if name not in ("float32", "float16", "bfloat16"):
        raise CheckpointError(f"dtype {name!r} is none of float32, float16, bfloat16.")
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def _write_tokenizer(path: Path, vocab_size: int, max_length: int, add_bos_token: bool) -> None:
    tokens = [*_byte_alphabet(), *SPECIAL_TOKENS]
    if vocab_size < len(tokens):
        raise CheckpointError(f"{path}: vocab_size={vocab_size} is below {len(tokens)}.")
    letters = "etaoinsrhldcumfpgwybvk"
    merges = list(itertools.islice(itertools.product(letters, letters), vocab_size - len(tokens)))
    tokens += [first + second for first, second in merges]
    bos, eos, _, _, pad = SPECIAL_TOKENS
    tokenizer = build_byte_level_bpe(
        tokens, merges, special=SPECIAL_TOKENS, bos=bos if add_bos_token else None
    )
    tokenizer.save(str(path / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(path / "tokenizer_config.json", tokenizer_config)


def _byte_alphabet() -> list[str]:
    """GPT-2's character for each byte: its own where that is printable, else one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
