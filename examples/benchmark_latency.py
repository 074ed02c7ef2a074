r"""What one request costs others, and what a cold adapter costs a request: two latencies.

    python examples/benchmark_latency.py cold --setting S1
    python examples/benchmark_latency.py long-prompt --setting G1

`cold`: on an idle engine, time to first token of requests whose adapter is in CPU memory, in the
pool already, or on disk alone (a PEFT directory that has to be read again). `long-prompt`: while a
batch decodes, a long prompt arrives; the running requests' gaps between tokens before and
meanwhile. Random weights, no shape is compiled within a measurement.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from workloads import SETTINGS, Setting

from checkpoints.architectures import ARCHITECTURES
from checkpoints.hf_llama import read_config
from checkpoints.synthetic import write_synthetic_adapter
from slora_jax import LLM, SamplingParams


def ttft(llm: LLM, adapter: str | None, prompt: Sequence[int]) -> float:
    """Seconds from adding one request to having its only token."""
    begin = time.perf_counter()
    params = SamplingParams(temperature=0, max_tokens=1)
    llm.generate([list(prompt)], adapter, params, progress=False)
    return time.perf_counter() - begin


def milliseconds(values: Sequence[float]) -> str:
    """Median and range, for people."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{1e3 * middle:.2f} ms (median of {len(values)}; {1e3 * low:.2f} to {1e3 * high:.2f})"


def cold(args: argparse.Namespace, setting: Setting) -> None:
    """Time to first token by where the adapter is."""
    rank, prompt = setting.ranks[0], [5] * args.prompt_tokens
    with (
        LLM(
            args.model or setting.model,
            load="dummy",
            progress=False,
            max_model_len=256,
            max_num_seqs=8,
            max_num_batched_tokens=128,
            pool_bytes=args.pool_bytes,
        ) as llm,
        tempfile.TemporaryDirectory() as folder,
    ):
        names = [f"adapter-{i}" for i in range(args.adapters + 1)]
        llm.load_dummy_adapters(names, [rank] * len(names), setting.targets)
        warm, *names = names
        for _ in range(3):
            ttft(llm, warm, prompt)
        before = llm.stats()
        times = {"in CPU memory": [], "resident": []}
        for name in names:
            times["in CPU memory"].append(ttft(llm, name, prompt))
            times["resident"].append(ttft(llm, name, prompt))
        after = llm.stats()
        assert after.swap_ins - before.swap_ins == len(names), (before, after)
        assert after.compiles == before.compiles
        size = next(info.nbytes for info in llm.list_adapters() if info.name == warm)
        print(f"time to first token of {args.prompt_tokens} tokens, adapter of {size / 1e6:.1f} MB")
        for where, values in times.items():
            print(f"  {where}: {milliseconds(values)}")
        differences = [a - b for a, b in zip(*times.values(), strict=True)]
        print(f"  cold minus resident: {milliseconds(differences)}")
        name = args.model or setting.model
        config = ARCHITECTURES.get(name) or read_config(Path(name))
        paths = []
        for seed in range(3):
            path = Path(folder, f"disk-{seed}")
            write_synthetic_adapter(path, config, seed=seed, rank=rank, targets=setting.targets)
            paths.append(path)
        from_disk = []
        for path in paths:
            begin = time.perf_counter()
            llm.load_adapter(path.name, path)
            ttft(llm, path.name, prompt)
            from_disk.append(time.perf_counter() - begin)
        print(
            f"  from a PEFT directory, reading and checking it included: {milliseconds(from_disk)}"
        )


def long_prompt(args: argparse.Namespace, setting: Setting) -> None:
    """Gaps between the tokens of running requests, before and while a long prompt is read."""
    for budget in args.max_num_batched_tokens:
        with LLM(
            args.model or setting.model,
            load="dummy",
            progress=False,
            max_model_len=args.long_prompt_tokens + 256,
            max_num_seqs=args.running + 1,
            max_num_batched_tokens=budget,
            pool_bytes=args.pool_bytes,
        ) as llm:
            rng = np.random.default_rng(0)
            _interrupt(llm, args, rng)  # compiles
            gaps_before, gaps_meanwhile = _interrupt(llm, args, rng)
            steps = len(gaps_meanwhile)
            median = statistics.median(gaps_before)
            worst, later = max(gaps_meanwhile), max(gaps_meanwhile[1:])
            print(
                f"{args.running} requests decode, a prompt of {args.long_prompt_tokens} tokens "
                f"arrives, {budget} prefill tokens a step:\n"
                f"  gaps before: {milliseconds(gaps_before)}\n"
                f"  meanwhile, {steps} steps: {milliseconds(gaps_meanwhile)}\n"
                f"  worst gap is {worst / median:.2f} times the median before; the first "
                f"{gaps_meanwhile[0] / median:.2f}, the worst of the others {later / median:.2f}",
                flush=True,
            )


def _interrupt(
    llm: LLM, args: argparse.Namespace, rng: np.random.Generator
) -> tuple[list[float], list[float]]:
    engine = llm.engine
    params = SamplingParams(temperature=0, max_tokens=2000, ignore_eos=True)
    running = [
        engine.add_request(rng.integers(0, llm.vocab_size, 32).tolist(), params, None)
        for _ in range(args.running)
    ]
    while not all(generation.num_output_tokens for generation in running):
        engine.step()
    for _ in range(20):
        engine.step()
    before, meanwhile = [], []
    last = time.perf_counter()
    for _ in range(60):
        engine.step()
        before.append(-last + (last := time.perf_counter()))
    long = engine.add_request(
        rng.integers(0, llm.vocab_size, args.long_prompt_tokens).tolist(),
        SamplingParams(temperature=0, max_tokens=2, ignore_eos=True),
        None,
    )
    while not long.finished:
        engine.step()
        meanwhile.append(-last + (last := time.perf_counter()))
    assert not any(generation.finished for generation in running)
    for generation in running:
        engine.abort(generation)
    while engine.has_unfinished:
        engine.step()
    return before, meanwhile


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["cold", "long-prompt"])
    parser.add_argument("--setting", choices=SETTINGS, default="S1")
    parser.add_argument("--model", help="another model's shapes: a name, or a directory")
    parser.add_argument("--adapters", type=int, default=20, help="cold: how many are tried")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="cold")
    parser.add_argument("--running", type=int, default=64, help="long-prompt: requests that decode")
    parser.add_argument("--long-prompt-tokens", type=int, default=8000)
    parser.add_argument("--max-num-batched-tokens", type=int, nargs="+", default=[512])
    parser.add_argument("--pool-bytes", type=int)
    args = parser.parse_args()
    name = args.model or SETTINGS[args.setting].model
    print(f"{name}, {jax.devices()[0].device_kind}, jax {jax.__version__}")
    measure = cold if args.what == "cold" else long_prompt
    measure(args, SETTINGS[args.setting])


if __name__ == "__main__":
    main()
