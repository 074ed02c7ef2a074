"""Throughput of a mixed batch of adapters, beside transformers + PEFT on the same requests.

All requests arrive at once; every adapter sits on all seven linear layers; output lengths are
forced. Each engine runs the workload once to warm up (compilation, caches) and then `--runs` times;
the best is reported. Outputs are compared token by token.

    python examples/benchmark_serving.py --peer peft          # needs torch, transformers, peft
    python examples/benchmark_serving.py --adapters 0         # the base model alone
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from checkpoints.hf_llama import read_config
from checkpoints.sources import resolve_model
from checkpoints.synthetic import write_synthetic_adapter
from slora_jax import LLM, SamplingParams

Tokens = list[list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=20)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--peer", choices=["none", "peft"], default="none")
    parser.add_argument("--json", type=Path, help="append one JSON line here")
    args = parser.parse_args()

    directory = resolve_model(args.model)
    config = read_config(directory)
    rng = np.random.default_rng(0)
    prompts = rng.integers(1000, config["vocab_size"], (args.requests, args.prompt_tokens)).tolist()
    adapters = [f"adapter-{i}" for i in range(args.adapters)]
    adapter_ids = [adapters[i % len(adapters)] if adapters else None for i in range(args.requests)]
    with tempfile.TemporaryDirectory() as folder:
        for seed, name in enumerate(adapters):
            write_synthetic_adapter(
                Path(folder, name), config, seed=seed, rank=args.rank, scale=0.15
            )
        paths = {name: Path(folder, name) for name in adapters}
        workload = (directory, paths, prompts, adapter_ids, args.max_tokens, args.runs)
        rows = [("slora-jax", *run_slora_jax(*workload))]
        if args.peer == "peft":
            rows.append(("transformers + PEFT", *run_peft(*workload)))
    report(rows, args)


def run_slora_jax(
    directory: Path,
    paths: dict[str, Path],
    prompts: Tokens,
    adapter_ids: list[str | None],
    max_tokens: int,
    runs: int,
) -> tuple[float, Tokens]:
    """(best seconds, output tokens)."""
    with LLM(directory, dtype="float32", max_model_len=512, progress=False) as llm:
        for name, path in paths.items():
            llm.load_adapter(name, path)
        params = SamplingParams(temperature=0, max_tokens=max_tokens, min_tokens=max_tokens)

        def run() -> Tokens:
            outputs = llm.generate(prompts, adapter_ids, params, progress=False)
            return [list(output.outputs[0].token_ids) for output in outputs]

        return best_of(run, runs)


def run_peft(
    directory: Path,
    paths: dict[str, Path],
    prompts: Tokens,
    adapter_ids: list[str | None],
    max_tokens: int,
    runs: int,
) -> tuple[float, Tokens]:
    """The same through PEFT's mixed batches (``adapter_names``)."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    for index, (name, path) in enumerate(paths.items()):
        if index == 0:
            model = PeftModel.from_pretrained(model, path, adapter_name=name)
        else:
            model.load_adapter(path, adapter_name=name)
    ids = torch.tensor(prompts)
    options = {"adapter_names": adapter_ids} if paths else {}

    def run() -> Tokens:
        with torch.inference_mode():
            outputs = model.eval().generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                min_new_tokens=max_tokens,
                do_sample=False,
                **options,
            )
        return outputs[:, ids.shape[1] :].tolist()

    return best_of(run, runs)


def best_of(run: Callable[[], Tokens], runs: int) -> tuple[float, Tokens]:
    """(seconds of the fastest of ``runs`` runs after a warm-up, its result)."""
    result, best = run(), float("inf")
    for _ in range(runs):
        started = time.perf_counter()
        result = run()
        best = min(best, time.perf_counter() - started)
    return best, result


def report(rows: list[tuple[str, float, Tokens]], args: argparse.Namespace) -> None:
    """A table of the engines, the last one being what the others are compared with."""
    total = args.requests * args.max_tokens
    slowest = rows[-1][1]
    print(
        f"{args.requests} requests x {args.max_tokens} tokens, {args.adapters} adapters of rank "
        f"{args.rank} on all linear layers, {args.model}, float32"
    )
    print(f"{platform.machine()}, {jax.devices()[0].device_kind}, jax {jax.__version__}\n")
    print(f"{'engine':22s} {'output tokens/s':>16s} {'seconds':>9s} {'speed-up':>9s}")
    for name, seconds, _ in rows:
        print(f"{name:22s} {total / seconds:16.1f} {seconds:9.2f} {slowest / seconds:8.2f}x")
    if len(rows) > 1:
        same = sum(a == b for a, b in zip(rows[0][2], rows[1][2], strict=True))
        print(f"\n{same} of {args.requests} outputs are equal token by token")
    if args.json:
        line = {name: total / seconds for name, seconds, _ in rows} | {
            key: value for key, value in vars(args).items() if key != "json"
        }
        with args.json.open("a") as file:
            file.write(json.dumps(line, default=str) + "\n")


if __name__ == "__main__":
    main()
