"""A dense Llama in NumPy float64: adapters merged into the weights, no pages, no cache, no jax.

The answer that the engine must give, by another road: straight from the stored tensors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from checkpoints.hf_llama import LlamaCheckpoint
from checkpoints.peft_lora import LoraAdapter


class DenseLlama:
    """One base model with at most one adapter merged in, in float64."""

    def __init__(self, checkpoint: LlamaCheckpoint, adapter: LoraAdapter | None = None):
        self.config: dict[str, Any] = checkpoint.config
        self.weights = {n: checkpoint.read(n).astype(np.float64) for n in checkpoint.names()}
        for (layer, target), pair in (adapter.pairs if adapter else {}).items():
            delta = pair.scaling * pair.b.astype(np.float64) @ pair.a.astype(np.float64)
            self.weights[f"layers.{layer}.{target}"] += delta

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """f64[tokens, vocab]: row t predicts token t + 1."""
        cfg, weights = self.config, self.weights
        x = weights["embed_tokens"][list(token_ids)]
        for layer in range(cfg["num_layers"]):
            w = functools.partial(lambda layer, name: weights[f"layers.{layer}.{name}"], layer)
            x = x + self._attention(self._norm(x, w("input_norm")), w) @ w("o").T
            h = self._norm(x, w("post_attention_norm"))
            gate = h @ w("gate").T
            x = x + (gate / (1 + np.exp(-gate)) * (h @ w("up").T)) @ w("down").T
        head = weights.get("lm_head", weights["embed_tokens"])
        return self._norm(x, weights["final_norm"]) @ head.T

    def greedy(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """The most likely continuation, token by token."""
        tokens = list(prompt)
        for _ in range(num_tokens):
            tokens.append(int(np.argmax(self.logits(tokens)[-1])))
        return tokens[len(prompt) :]

    def _norm(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        variance = np.mean(x * x, axis=-1, keepdims=True)
        return weight * x / np.sqrt(variance + self.config["rms_norm_eps"])

    def _attention(self, x: np.ndarray, w: Any) -> np.ndarray:
        cfg, count = self.config, len(x)
        heads, kv_heads, dim = cfg["num_heads"], cfg["num_kv_heads"], cfg["head_dim"]
        q = self._rotate((x @ w("q").T).reshape(count, heads, dim))
        k = self._rotate((x @ w("k").T).reshape(count, kv_heads, dim))
        v = (x @ w("v").T).reshape(count, kv_heads, dim)
        k, v = (np.repeat(part, heads // kv_heads, axis=1) for part in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(dim)
        scores = np.where(np.tri(count, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        return np.einsum("hqk,khd->qhd", weights, v).reshape(count, heads * dim)

    def _rotate(self, x: np.ndarray) -> np.ndarray:
        angles = np.arange(len(x))[:, None] * self._frequencies()[None, :]
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        first, second = np.split(x, 2, axis=-1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    def _frequencies(self) -> np.ndarray:
        dim, theta = self.config["head_dim"], self.config["rope_theta"]
        freqs = theta ** -(np.arange(0, dim, 2) / dim)
        scaling = self.config["rope_scaling"]
        if scaling is None:
            return freqs
        turns = scaling["original_max_position_embeddings"] * freqs / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = np.clip((turns - low) / (high - low), 0, 1)  # 1: high frequency, kept as it is
        return keep * freqs + (1 - keep) * freqs / scaling["factor"]
