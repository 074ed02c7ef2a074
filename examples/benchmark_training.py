"""Training speed and memory of one LoRA adapter, beside PyTorch + PEFT on the same rows.

    python examples/benchmark_training.py [--peer peft] [--rank 16] [--batch-size 8 --length 512]

Rows are full of random tokens, the second half of each is to be learnt. Both engines run in one
process: base in bfloat16 on a GPU (float32 on CPU), adapter and AdamW in float32, adapters on all
seven linear layers.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs some, too

import jax
import numpy as np

from checkpoints.sources import DEMO_MODEL, resolve_model
from slora_jax import load_base_model
from slora_jax.training import Example, Trainer, TrainingBatch, TrainingConfig, batches

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--peer", choices=["peft"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8, help="rows")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=20, help="of one timing; the best of 3 counts")
    parser.add_argument("--remat", action="store_true")
    args = parser.parse_args()

    directory = resolve_model(args.model)
    on_gpu = jax.devices()[0].platform == "gpu"
    config = {"r": args.rank, "lora_alpha": 2 * args.rank, "target_modules": TARGETS}
    batch = random_batch(args.batch_size, args.length)
    ours = train_ours(directory, config, batch, args.steps, on_gpu, args.remat)
    if args.peer:
        theirs = train_peft(directory, config, batch, args.steps, on_gpu)
        print(f"slora-jax is {ours / theirs:.2f} times as fast")


def random_batch(rows: int, length: int) -> TrainingBatch:
    generator = np.random.default_rng(0)
    half = length // 2
    examples = []
    for _ in range(rows):
        tokens = generator.integers(1000, 40_000, length).tolist()
        examples.append(Example(tuple(tokens[:half]), tuple(tokens[half:])))
    return next(batches(examples, batch_size=rows, max_length=length, packing=False, seed=0))


def train_ours(
    directory: Path, config: dict, batch: TrainingBatch, steps: int, on_gpu: bool, remat: bool
) -> float:
    base = load_base_model(directory, dtype="bfloat16" if on_gpu else "float32")
    rows, length = batch.token_ids.shape
    options = TrainingConfig(batch_size=rows, max_length=length, remat=remat)
    trainer = Trainer(base, config, options)

    def run(count: int) -> float:
        for _ in range(count):
            loss = trainer.step(batch)
        return float(loss)

    rate = measure("slora-jax", run, steps, batch.num_tokens)
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        print(f"slora-jax: peak {stats['peak_bytes_in_use'] / 2**30:.2f} GiB")
    return rate


def train_peft(
    directory: Path, config: dict, batch: TrainingBatch, steps: int, on_gpu: bool
) -> float:
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    device = "cuda" if on_gpu else "cpu"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16 if on_gpu else torch.float32, local_files_only=True
    ).to(device)
    model = get_peft_model(model, LoraConfig(**config, task_type="CAUSAL_LM")).train()
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapter, lr=1e-3, weight_decay=0.0, fused=on_gpu)
    tokens = torch.tensor(batch.token_ids, device=device).long()
    labels = tokens.clone()
    labels[:, : tokens.shape[1] // 2] = -100

    def run(count: int) -> float:
        for _ in range(count):
            loss = model(input_ids=tokens, labels=labels, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(adapter, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    rate = measure("PyTorch + PEFT", run, steps, batch.num_tokens)
    if on_gpu:
        print(f"PyTorch + PEFT: peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    return rate


def measure(name: str, run: Callable[[int], float], steps: int, tokens: int) -> float:
    """Tokens a second; ``run`` makes steps, waits for them, and returns the last loss."""
    started = time.perf_counter()
    first = run(3)
    warm = time.perf_counter() - started
    times = []
    for _ in range(3):
        started = time.perf_counter()
        last = run(steps)
        times.append((time.perf_counter() - started) / steps)
    rate = tokens / min(times)
    print(
        f"{name}: {rate:,.0f} tokens/s, {1e3 * min(times):.2f} ms a step of {tokens} tokens; "
        f"first three steps {warm:.1f} s; loss {first:.3f} → {last:.3f}",
        flush=True,
    )
    return rate


if __name__ == "__main__":
    main()
