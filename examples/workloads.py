"""S-LoRA's evaluation workloads (arXiv 2311.03285 §7 and its released benchmark), as requests.

Settings give a base model, the ranks that adapters take in turn, and their targets; workloads give
lengths, adapters and arrival times. Output lengths are forced.
"""

from __future__ import annotations

import dataclasses

import numpy as np

ATTENTION = ("q", "k", "v", "o")
ALL_LINEAR = (*ATTENTION, "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class Setting:
    """A base model and the adapters that it serves."""

    model: str
    ranks: tuple[int, ...]
    """Taken by the adapters in turn."""
    targets: tuple[str, ...]


SETTINGS = {
    "S1": Setting("llama-7b", (8,), ATTENTION),
    "S2": Setting("llama-7b", (64, 32, 16, 8), ATTENTION),
    "S3": Setting("llama-13b", (16,), ATTENTION),
    "S4": Setting("llama-13b", (64, 32, 16), ATTENTION),
    "G1": Setting("llama-3.1-8b", (16,), ALL_LINEAR),
    "G2": Setting("llama-3.1-70b", (64,), ATTENTION),  # S6, but for the real model's KV heads
}


@dataclasses.dataclass(frozen=True)
class TimedRequest:
    """One request of a workload."""

    arrival: float
    """Seconds after the start."""
    prompt_token_ids: tuple[int, ...]
    num_output_tokens: int
    adapter: int | None
    """Number of its adapter; None is the base model."""


def batch(
    num_requests: int, prompt_tokens: int, output_tokens: int, num_adapters: int, vocab_size: int
) -> list[TimedRequest]:
    """Equal lengths, all at once, adapters in turn."""
    lengths = np.full(num_requests, prompt_tokens), np.full(num_requests, output_tokens)
    adapters = np.arange(num_requests) % max(num_adapters, 1)
    return _requests(np.zeros(num_requests), *lengths, adapters, num_adapters, vocab_size)


def offline(num_requests: int, num_adapters: int, vocab_size: int) -> list[TimedRequest]:
    """Lengths uniform in 8..512, all at once, adapters by a power law."""
    rng = np.random.default_rng(0)
    inputs = rng.integers(8, 513, num_requests)
    outputs = rng.integers(8, 513, num_requests)
    weights = 1 / np.arange(1, max(num_adapters, 1) + 1)
    adapters = rng.choice(len(weights), num_requests, p=weights / weights.sum())
    return _requests(np.zeros(num_requests), inputs, outputs, adapters, num_adapters, vocab_size)


def trace(
    rate: float, duration: float, num_adapters: int, vocab_size: int, *, alpha: float, cv: float
) -> list[TimedRequest]:
    """S-LoRA's synthetic trace: gamma arrivals of ``rate`` a second and burstiness ``cv``, lengths
    uniform in 8..511; ``alpha`` 1 is uniform over the adapters, towards 0 all go to the first.
    """
    rng = np.random.RandomState(42)  # the released benchmark's generator, in its order of draws
    total = int(rate * duration)
    adapters = (rng.power(alpha, total) * max(num_adapters, 1)).astype(int)
    inputs = rng.randint(8, 512, total)
    outputs = rng.randint(8, 512, total)
    arrivals = np.cumsum(rng.gamma(1 / cv**2, cv**2 / rate, total))
    return _requests(arrivals, inputs, outputs, adapters, num_adapters, vocab_size)


def _requests(
    arrivals: np.ndarray,
    inputs: np.ndarray,
    outputs: np.ndarray,
    adapters: np.ndarray,
    num_adapters: int,
    vocab_size: int,
) -> list[TimedRequest]:
    rng = np.random.default_rng(1)
    lowest = min(1000, vocab_size // 2)  # no special tokens
    return [
        TimedRequest(
            float(arrival),
            tuple(rng.integers(lowest, vocab_size, int(num_in)).tolist()),
            int(num_out),
            int(adapter) if num_adapters else None,
        )
        for arrival, num_in, num_out, adapter in zip(
            arrivals, inputs, outputs, adapters, strict=True
        )
    ]
