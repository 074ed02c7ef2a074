r"""The demo model's greedy tokens here against those of another device, and what bfloat16 changes.

    python examples/compare_devices.py --write cpu_tokens.json       # on a CPU
    python examples/compare_devices.py --against cpu_tokens.json     # on a GPU

Two dozen prompts in one mixed batch over the base and the demo adapters. In float32 (true float32:
kernels that decline it leave it to XLA) the tokens must be the other device's. In bfloat16, with
kernels: where each request's tokens leave those, and how far its prompt's log-probabilities are.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from quickstart import PROMPTS, SHARED_PROMPT

from checkpoints.sources import DEMO_ADAPTERS, DEMO_MODEL, resolve_model
from slora_jax import LLM, RequestOutput, SamplingParams

TEXTS = ("What is gravity?", "Write a haiku about rain.", "Who wrote Romeo and Juliet?")
Answer = tuple[list[int], list[float]]
"""(tokens, log-probabilities of the prompt's tokens but its first)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--write", type=Path, help="this device's float32 answers")
    parser.add_argument("--against", type=Path, help="another device's float32 answers")
    args = parser.parse_args()

    directory = resolve_model(args.model)
    device = jax.devices()[0].device_kind
    exact, kernels = answers(directory, "float32", args.max_tokens)
    print(f"{device}, jax {jax.__version__}: {len(exact)} requests in float32 by {kernels}")
    if args.write:
        args.write.write_text(json.dumps({"device": device, "answers": exact}))
    if args.against:
        other = json.loads(args.against.read_text())
        print(f"float32 against {other['device']}: {difference(exact, other['answers'])}")
        exact = other["answers"]
    rounded, kernels = answers(directory, "bfloat16", args.max_tokens)
    print(f"bfloat16 by {kernels} against float32: {difference(rounded, exact)}")
    if kernels != "xla":
        plain, _ = answers(directory, "bfloat16", args.max_tokens, kernels="xla")
        print(f"bfloat16 by xla against float32: {difference(plain, exact)}")
        print(f"bfloat16 by {kernels} against xla: {difference(rounded, plain)}")


def answers(
    directory: Path, dtype: str, max_tokens: int, kernels: str = "auto"
) -> tuple[list[Answer], str]:
    """All requests' answers in one batch, and by which kernels."""
    with LLM(directory, dtype=dtype, kernels=kernels, max_model_len=512, progress=False) as llm:
        for name in PROMPTS:
            llm.load_adapter(name, DEMO_ADAPTERS / name)
        requests = [(text, None) for text in TEXTS]
        for name, prompt in PROMPTS.items():
            requests += [(prompt, None), (prompt, name), (SHARED_PROMPT, name)]
        outputs = llm.chat(
            [[{"role": "user", "content": prompt}] for prompt, _ in requests],
            adapter_ids=[adapter for _, adapter in requests],
            sampling_params=SamplingParams(
                temperature=0, max_tokens=max_tokens, ignore_eos=True, prompt_logprobs=0
            ),
        )
        return [answer(output) for output in outputs], llm.engine.view.kernels


def answer(output: RequestOutput) -> Answer:
    scores = zip(output.prompt_token_ids, output.prompt_logprobs or (), strict=True)
    return list(output.outputs[0].token_ids), [at[token].logprob for token, at in scores if at]


def difference(ours: Sequence[Answer], theirs: Sequence[Answer]) -> str:
    """Equal outputs, where the others part, and the error of prompts' log-probabilities."""
    parted = []
    for (tokens, _), (others, _) in zip(ours, theirs, strict=True):
        pairs = enumerate(zip(tokens, others, strict=True))
        parted += [next((n for n, (a, b) in pairs if a != b), len(tokens))]
    length = len(ours[0][0])
    early = [n for n in parted if n < length]
    scores = [np.subtract(a, b) for (_, a), (_, b) in zip(ours, theirs, strict=True)]
    error = np.abs(np.concatenate(scores))
    where = ""
    if early:
        where = f", the others from token {min(early)} on (median {statistics.median(early):g})"
    equal = f"{len(parted) - len(early)} of {len(parted)} equal in all {length} tokens"
    errors = f"by {error.mean():.5f} (mean), {error.max():.5f} (most)"
    return f"{equal}{where}; prompts' log-probabilities differ {errors}"


if __name__ == "__main__":
    main()
