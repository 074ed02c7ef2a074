"""Examples and settings that the training tests share, also in a process that is killed."""

from __future__ import annotations

import numpy as np

from slora_jax.training import Example, TrainingConfig

ADAPTER = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"],
    "rank_pattern": {"layers.1.self_attn.q_proj": 6},
    "use_rslora": True,
}
RUN = TrainingConfig(
    num_steps=24, batch_size=4, max_length=32, learning_rate=2e-2, warmup_steps=2, save_every=8
)


def random_examples(count: int = 6, *, seed: int = 0) -> list[Example]:
    """Of 6 to 14 byte tokens, half of them to be learnt."""
    generator = np.random.default_rng(seed)
    examples = []
    for _ in range(count):
        tokens = generator.integers(0, 256, generator.integers(6, 15)).tolist()
        cut = len(tokens) // 2
        examples.append(Example(tuple(tokens[:cut]), tuple(tokens[cut:])))
    return examples
