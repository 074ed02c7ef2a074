"""Train the demo adapters that the wheel carries.

Every task of demo_tasks.py, on one GPU in minutes.

    python examples/train_demo_adapters.py [--tasks sql pirate] [--out DIRECTORY]
    python examples/score_demo_adapters.py --write-cards

The data is made by seed, the adapters are written as PEFT directories in bfloat16. With
``--checkpoints`` an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import time
from pathlib import Path

import jax
from demo_tasks import TASKS, Task, conversation

from checkpoints.sources import DEMO_ADAPTERS, DEMO_MODEL
from slora_jax import LoadedModel, load_base_model, save_adapter
from slora_jax.training import Trainer, TrainingConfig, chat_example


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--out", type=Path, default=DEMO_ADAPTERS)
    parser.add_argument("--checkpoints", type=Path, help="a folder for them: one a task")
    parser.add_argument("--steps", type=int, help="in place of each task's own number")
    args = parser.parse_args()

    on_cpu = jax.devices()[0].platform == "cpu"
    base = load_base_model(args.model, dtype="float32" if on_cpu else "bfloat16")
    for name in args.tasks:
        task = TASKS[name]
        config = TrainingConfig(
            num_steps=args.steps or task.num_steps,
            batch_size=task.batch_size,
            max_length=task.max_length,
            learning_rate=task.learning_rate,
            warmup_steps=20,
        )
        directory = args.checkpoints / name if args.checkpoints else None
        train(base, task, config, args.out / name, directory)


def train(
    base: LoadedModel, task: Task, config: TrainingConfig, out: Path, checkpoints: Path | None
) -> None:
    """One adapter, from its examples to its directory."""
    started = time.perf_counter()
    examples = [
        chat_example(base, conversation(text, answer)) for text, answer in task.training_examples()
    ]
    made = time.perf_counter()
    trainer = Trainer(base, task.adapter_config, config)
    losses = trainer.fit(examples, directory=checkpoints)
    trained = time.perf_counter()
    shutil.rmtree(out, ignore_errors=True)
    save_adapter(
        out,
        trainer.adapter,
        task.adapter_config,
        base,
        dtype="bfloat16",
        base_model=DEMO_MODEL,
    )
    last = losses[-10:]
    print(
        f"{task.name}: {len(losses)} steps of {config.batch_size} × {config.max_length} tokens, "
        f"loss {losses[0]:.3f} → {sum(last) / len(last):.4f}; examples {made - started:.1f} s, "
        f"training {trained - made:.1f} s, compilation included ({dataclasses.asdict(config)})",
        flush=True,
    )


if __name__ == "__main__":
    main()
