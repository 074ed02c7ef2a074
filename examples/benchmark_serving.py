r"""Serving benchmark: throughput and latency of many adapters, beside the base model alone.

Two kinds of models. A real one, with adapters in PEFT's form, which `--peer peft` serves too, with
the outputs compared token by token:

    python examples/benchmark_serving.py --peer peft          # needs torch, transformers, peft

And random weights in the shapes of S-LoRA's settings, for GPUs:

    python examples/benchmark_serving.py --setting S1 --workload batch --requests 128 \
        --prompt-tokens 8 --max-tokens 256 --adapters 0 1 128
    python examples/benchmark_serving.py --setting S1 --workload offline --adapters 0 100 1000
    python examples/benchmark_serving.py --setting S1 --workload trace --rate 10 --duration 30 \
        --adapters 5 2000
    python examples/benchmark_serving.py --setting S4 --tensor-parallel 2 --adapters 0 64

Several numbers of adapters are served one after the other by one engine. All sizes of steps are
compiled first; each workload is run once to warm up, then `--runs` times, and the fastest is
reported. On a GPU the rate at which a kernel only reads is measured in the same process: the roof
of which the steps' least bytes are given a share.

S-LoRA's baselines, a process each, and one picture of everything that was appended to one file:

    for b in bmm no-unify-mem one-adapter merge; do
        python examples/benchmark_serving.py --setting S1 --workload offline --adapters 1 20 \
            --baseline $b --runs 1 --json runs.jsonl --plot runs.png
    done
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ablations_device
import jax
import jax.numpy as jnp
import plots
import workloads
from ablations_device import BASELINES
from serving_metrics import Served, measure
from step_records import StepRecorder
from workloads import ALL_LINEAR, SETTINGS, Setting, TimedRequest

from checkpoints.hf_llama import read_config
from checkpoints.sources import resolve_model
from checkpoints.synthetic import write_synthetic_adapter
from pallas_kernels.paged_attention.bench import read_pages
from slora_jax import LLM, EngineConfig, SamplingParams
from slora_jax.policies import SCHEDULERS


@dataclasses.dataclass(frozen=True)
class Run:
    """One workload, served once."""

    seconds: float
    served: list[Served]
    counters: dict[str, float]
    """What ``LLM.stats`` counted meanwhile."""


def serve(
    llm: LLM, requests: Sequence[TimedRequest], names: Sequence[str], steps_out: Path | None = None
) -> Run:
    """Each request at its time of arrival, in one thread: add what has arrived, step, repeat.

    ``steps_out``: append what each step did and took, for the simulator's fit.
    """
    engine = llm.engine
    recorder = None if steps_out is None else StepRecorder(engine)
    before = dataclasses.asdict(llm.stats())
    waiting = sorted(requests, key=lambda request: request.arrival)
    generations = []
    start = time.monotonic()
    while len(generations) < len(waiting) or engine.has_unfinished:
        now = time.monotonic() - start
        while len(generations) < len(waiting) and waiting[len(generations)].arrival <= now:
            request = waiting[len(generations)]
            length = request.num_output_tokens
            generations.append(
                engine.add_request(
                    request.prompt_token_ids,
                    SamplingParams(temperature=0, max_tokens=length, ignore_eos=True),
                    None if request.adapter is None else names[request.adapter],
                )
            )
        if engine.has_unfinished:
            engine.step()
            if recorder is not None:
                recorder.stepped()
        else:
            time.sleep(max(0.0, waiting[len(generations)].arrival - now))
    seconds = time.monotonic() - start
    served = [
        Served.of(generation.completions[0].request, start + timed.arrival)
        for timed, generation in zip(waiting, generations, strict=True)
    ]
    if recorder is not None:
        recorder.write(steps_out)
    after = dataclasses.asdict(llm.stats())
    counters = {
        name: value - before[name]
        for name, value in after.items()
        if isinstance(value, int | float)
    }
    return Run(seconds, served, counters)


def best_of(run: Callable[[Path | None], Run], runs: int, steps_out: Path | None) -> Run:
    """The fastest of ``runs`` runs after one to warm up, whose steps are told of too: adapters come
    into the pool in these.
    """
    run(steps_out)
    return min((run(steps_out) for _ in range(runs)), key=lambda result: result.seconds)


def measure_read_roof() -> float | None:
    """Bytes a second of a kernel that only reads device memory; None where there is none."""
    if jax.default_backend() != "gpu":
        return None
    pages, rows = 2**14, 512
    pool = jnp.zeros((pages, rows, 128), jnp.bfloat16)
    order = jax.random.permutation(jax.random.key(0), pages).astype(jnp.int32)
    best = math.inf
    for _ in range(6):
        started = time.perf_counter()
        jax.block_until_ready([read_pages(pool, order) for _ in range(10)])
        best = min(best, (time.perf_counter() - started) / 10)
    return pool.nbytes / best


def measure_run(run: Run, roof: float | None) -> dict[str, float]:
    """The evaluation's metrics, and what the engine counted."""
    result = measure(run.served, run.seconds)
    steps = max(run.counters["steps"], 1)
    rows = max(run.counters["token_rows"], 1)
    result["steps"] = run.counters["steps"]
    result["ms_per_step"] = 1e3 * run.seconds / steps
    result["padding_share"] = 1 - run.counters["tokens"] / rows
    result["wait_share"] = run.counters["wait_seconds"] / run.seconds
    result["bytes_per_s"] = run.counters["bytes_read"] / run.seconds
    if roof is not None:
        result["share_of_roof"] = result["bytes_per_s"] / roof
    result["swap_ins"] = run.counters["swap_ins"]
    result["preemptions"] = run.counters["preemptions"]
    result["compiles"] = run.counters["compiles"]
    return result


def sizes(llm: LLM) -> dict[str, int | str]:
    """What of the engine a simulation of the same run needs to know."""
    stats, runner = llm.stats(), llm.engine._runner
    return {
        "pages_total": stats.pages_total,
        "page_size": stats.page_size,
        "seats": runner.max_num_seqs,
        "prefill_tile": runner.prefill_tile,
        "prefill_tokens": runner.max_prefill_tokens,
        "kernels": runner.view.kernels,
    }


def make_requests(
    args: argparse.Namespace, num_adapters: int, vocab_size: int
) -> list[TimedRequest]:
    """The workload that the command line asks for."""
    if args.workload == "offline":
        return workloads.offline(args.requests, num_adapters, vocab_size)
    if args.workload == "trace":
        return workloads.trace(
            args.rate, args.duration, num_adapters, vocab_size, alpha=args.alpha, cv=args.cv
        )
    sizes = args.requests, args.prompt_tokens, args.max_tokens
    return workloads.batch(*sizes, num_adapters, vocab_size)


@contextlib.contextmanager
def dummy_llm(args: argparse.Namespace, setting: Setting) -> Iterator[tuple[LLM, list[str]]]:
    """Random weights, and as many distinct adapters as any run needs."""
    options = {name: value for name, value in engine_options(args).items() if value is not None}
    if args.baseline:  # programs are kept by the engine's code, which a baseline replaces
        options["compilation_cache"] = False
    started = time.perf_counter()
    with LLM(setting.model, load="dummy", progress=False, **options) as llm:
        if args.baseline:
            ablations_device.apply(
                args.baseline,
                llm,
                EngineConfig(**options),
                adapter_share=args.adapter_share,
                rank=max(setting.ranks),
            )
        made = time.perf_counter()
        first = [5] * 8
        llm.generate([first], None, SamplingParams(temperature=0, max_tokens=1), progress=False)
        served = time.perf_counter()
        names = [f"adapter-{i}" for i in range(max(args.adapters))]
        ranks = [setting.ranks[i % len(setting.ranks)] for i in range(len(names))]
        llm.load_dummy_adapters(names, ranks, setting.targets)
        loaded = time.perf_counter()
        llm.warm_up()
        ready = time.perf_counter()
        print(
            f"seconds: weights and pool {made - started:.1f}, first token {served - made:.1f}, "
            f"adapters {loaded - served:.1f}, all sizes of steps {ready - loaded:.1f} "
            f"({llm.stats().compiles} programs)",
            flush=True,
        )
        print(llm.stats())
        yield llm, names


@contextlib.contextmanager
def real_llm(args: argparse.Namespace, directory: Path) -> Iterator[tuple[LLM, list[str]]]:
    """A real model, and adapters in PEFT's form that it and the peer read."""
    config = read_config(directory)
    with tempfile.TemporaryDirectory() as folder:
        args.adapter_paths = {}
        for seed in range(max(args.adapters)):
            path = Path(folder, f"adapter-{seed}")
            write_synthetic_adapter(path, config, seed=seed, rank=args.rank, scale=0.15)
            args.adapter_paths[path.name] = path
        options = {"dtype": "float32", "max_model_len": 512} | {
            name: value for name, value in engine_options(args).items() if value is not None
        }
        with LLM(directory, progress=False, **options) as llm:
            for name, path in args.adapter_paths.items():
                llm.load_adapter(name, path)
            yield llm, list(args.adapter_paths)


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of ``EngineConfig``, None where not given."""
    return {
        "dtype": args.dtype,
        "kernels": args.kernels,
        "max_num_seqs": args.max_num_seqs,
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "max_model_len": args.max_model_len,
        "pool_bytes": args.pool_bytes,
        "tensor_parallel": args.tensor_parallel,
        "lora_partition": args.lora_partition,
        "scheduler": args.scheduler,
        "ttft_slo": args.ttft_slo,
        "cluster_size": args.cluster_size,
        "prefetch": args.prefetch,
    }


def run_peft(
    directory: Path, paths: dict[str, Path], requests: Sequence[TimedRequest], runs: int
) -> tuple[float, list[list[int]]]:
    """(seconds, tokens) of the same through PEFT's mixed batches (``adapter_names``)."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    for index, (name, path) in enumerate(paths.items()):
        if index == 0:
            model = PeftModel.from_pretrained(model, path, adapter_name=name)
        else:
            model.load_adapter(path, adapter_name=name)
    names = list(paths)
    ids = torch.tensor([request.prompt_token_ids for request in requests])
    options = {"adapter_names": [names[r.adapter] for r in requests]} if paths else {}
    length = requests[0].num_output_tokens

    def generate() -> tuple[float, list[list[int]]]:
        started = time.perf_counter()
        with torch.inference_mode():
            outputs = model.eval().generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=length,
                min_new_tokens=length,
                do_sample=False,
                **options,
            )
        return time.perf_counter() - started, outputs[:, ids.shape[1] :].tolist()

    generate()
    return min((generate() for _ in range(runs)), key=lambda result: result[0])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--setting", choices=SETTINGS, help="random weights instead of --model")
    parser.add_argument("--workload", choices=["batch", "offline", "trace"], default="batch")
    parser.add_argument("--requests", type=int, help="default: 32, offline 256")
    parser.add_argument("--adapters", type=int, nargs="+", default=[8])
    parser.add_argument("--rank", type=int, default=16, help="with --model")
    parser.add_argument("--prompt-tokens", type=int, default=20, help="batch")
    parser.add_argument("--max-tokens", type=int, default=64, help="batch")
    parser.add_argument("--rate", type=float, default=10.0, help="trace: requests a second")
    parser.add_argument("--duration", type=float, default=30.0, help="trace: seconds")
    parser.add_argument("--alpha", type=float, default=1.0, help="trace: 1 is uniform adapters")
    parser.add_argument("--cv", type=float, default=1.0, help="trace: burstiness of arrivals")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--peer", choices=["none", "peft"], default="none")
    parser.add_argument("--dtype")
    parser.add_argument("--kernels")
    parser.add_argument("--max-num-seqs", type=int)
    parser.add_argument("--max-num-batched-tokens", type=int)
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--pool-bytes", type=int, help="on each device")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="devices to use")
    parser.add_argument("--lora-partition", choices=["no_extra_collectives", "s_lora"])
    parser.add_argument("--scheduler", choices=SCHEDULERS)
    parser.add_argument("--ttft-slo", type=float, help="seconds; slo needs it")
    parser.add_argument("--cluster-size", type=int)
    parser.add_argument("--prefetch", type=int)
    parser.add_argument("--baseline", choices=BASELINES, help="with --setting: an ablation")
    parser.add_argument("--adapter-share", type=float, default=0.3, help="no-unify-mem")
    parser.add_argument("--steps-out", type=Path, help="append a JSON line a step")
    parser.add_argument("--json", type=Path, help="append a JSON line a row here")
    parser.add_argument("--plot", type=Path, help="draw all rows of --json over their adapters")
    args = parser.parse_args()
    if args.plot and not args.json:
        parser.error("--plot draws what is in --json")
    if args.requests is None:
        args.requests = 256 if args.workload == "offline" else 32
    if args.baseline and not args.setting:
        parser.error("--baseline takes --setting")
    if args.peer == "peft" and (args.setting or args.workload != "batch"):
        parser.error("--peer peft takes --model and the batch workload")

    rows: list[tuple[str, dict[str, Any]]] = []
    tokens: list[list[int]] = []
    if args.setting:
        setting = SETTINGS[args.setting]
        about = f"{args.setting}: {setting.model}, random weights, ranks {setting.ranks}"
        source = dummy_llm(args, setting)
    else:
        directory = resolve_model(args.model)
        about = f"{args.model}, float32, adapters of rank {args.rank} on {', '.join(ALL_LINEAR)}"
        source = real_llm(args, directory)
    print(f"{about}\n{platform.machine()}, {jax.devices()[0].device_kind}, jax {jax.__version__}")
    roof = measure_read_roof()
    if roof is not None:
        roof *= args.tensor_parallel
        print(f"read roof of the devices together: {roof / 1e12:.2f} TB/s")
    with source as (llm, names):
        for count in args.adapters:
            requests = make_requests(args, count, llm.vocab_size)
            run = best_of(
                lambda out, r=requests: serve(llm, r, names, out), args.runs, args.steps_out
            )
            tokens = [served.tokens for served in run.served]
            metrics = {"num_adapters": count, **sizes(llm), **measure_run(run, roof)}
            rows.append((f"slora-jax, {count} adapters", metrics))
            print_row(*rows[-1], baseline(rows, args))
            write_row(args, *rows[-1])
        if args.peer == "peft":
            seconds, others = run_peft(directory, args.adapter_paths, requests, args.runs)
            rate = sum(map(len, others)) / seconds
            print(f"transformers + PEFT, {args.adapters[-1]} adapters: {rate:.1f} output tokens/s")
            print(f"slora-jax is {rows[-1][1]['output_tokens_per_s'] / rate:.2f} times as fast")
            same = sum(a == b for a, b in zip(tokens, others, strict=True))
            print(f"{same} of {len(tokens)} outputs are equal token by token")
            write_row(args, "transformers + PEFT", {"output_tokens_per_s": rate})
    if args.plot:
        lines = args.json.read_text().splitlines()
        plots.against_adapters(args.plot, [json.loads(line) for line in lines])


def baseline(
    rows: Sequence[tuple[str, dict[str, float]]], args: argparse.Namespace
) -> float | None:
    """Output tokens a second of the base model alone, where it was run first."""
    return rows[0][1]["output_tokens_per_s"] if args.adapters[0] == 0 else None


def print_row(name: str, m: dict[str, float], base: float | None) -> None:
    """Three lines for people."""
    retention = "" if base is None else f", {m['output_tokens_per_s'] / base:.1%} of the base"
    counts = ", ".join(f"{int(m[key])} {key}" for key in ("swap_ins", "preemptions", "compiles"))
    times = "; ".join(
        f"{what} " + " / ".join(f"{1e3 * m[f'{what}_p{p}']:.1f}" for p in (50, 90, 99))
        for what in ("ttft", "tpot", "latency")
    )
    print(
        f"{name}: {m['output_tokens_per_s']:.1f} output tokens/s, "
        f"{m['requests_per_s']:.2f} requests/s{retention}\n"
        f"  {int(m['steps'])} steps of {m['ms_per_step']:.2f} ms, "
        f"padding {m['padding_share']:.1%}, the host waits {m['wait_share']:.0%}, "
        f"{m['bytes_per_s'] / 1e12:.2f} TB/s"
        + (f" ({m['share_of_roof']:.1%} of the roof)" if "share_of_roof" in m else "")
        + f", {counts}\n"
        f"  ms at p50 / p90 / p99: {times}; SLO {m['slo_attainment']:.3f}, "
        f"{int(m['aborted'])} aborted",
        flush=True,
    )


def write_row(args: argparse.Namespace, name: str, metrics: dict[str, float]) -> None:
    """One JSON line."""
    if args.json:
        known = {
            k: v
            for k, v in vars(args).items()
            if k not in ("json", "adapter_paths", "steps_out", "plot")
        }
        line = {"name": name, "device": jax.devices()[0].device_kind, **known, **metrics}
        with args.json.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
