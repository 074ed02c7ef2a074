"""Hyperparameters of well-known Llama models by name, for runs with random weights.

In the normalised form of ``hf_llama.read_config``. Sources: LLaMA (arXiv 2302.13971, table 2) and
The Llama 3 Herd of Models (arXiv 2407.21783, table 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LLAMA = {
    "vocab_size": 32_000,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "max_position_embeddings": 2048,
    "head_dim": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_ids": (2,),
    "dtype": "bfloat16",
}
_LLAMA_3_1 = {
    **_LLAMA,
    "vocab_size": 128_256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "max_position_embeddings": 131_072,
    "bos_token_id": 128_000,
    "eos_token_ids": (128_001,),
}


def _sizes(layers: int, hidden: int, inner: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
    }


ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    "llama-7b": {**_LLAMA, **_sizes(32, 4096, 11_008, 32, 32)},
    "llama-13b": {**_LLAMA, **_sizes(40, 5120, 13_824, 40, 40)},
    "llama-3.1-8b": {**_LLAMA_3_1, **_sizes(32, 4096, 14_336, 32, 8)},
    "llama-3.1-70b": {**_LLAMA_3_1, **_sizes(80, 8192, 28_672, 64, 8)},
}
