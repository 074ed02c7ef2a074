r"""Decode speed of one model over 1, 2, 4, … devices, with adapters by either partition.

Random weights in the shapes of S-LoRA's settings. For each number of devices and each partition an
engine decodes batches of equal requests, each with an adapter of its own, and the rate is taken
while all of them run:

    NCCL_NVLS_ENABLE=0 python examples/benchmark_tensor_parallel.py --settings S4 G1 \
        --tensor-parallel 1 2 --json tensor_parallel.jsonl

Each engine has a process of its own; all of one setting start and compile side by side, each with
its share of the devices' memory, and then measure one after the other. Prints, beside tokens a
second: the ceiling of retention (with adapters over without), which is what the bytes that a device
must read and the collectives' own measured time allow; memory per device; and, with --profile,
where a step's time goes.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from workloads import SETTINGS, Setting

from pallas_kernels.layout import LANES, TARGETS
from slora_jax import LLM, SamplingParams
from slora_jax.engine import Engine, Generation
from slora_jax.sharding import Shards, model_mesh, on_each_device

PROMPT_TOKENS = 8
SETTLE = 4
"""Steps after the last prefill that are not timed."""

POOL_BYTES = {"llama-13b": 24 * 10**9, "llama-3.1-8b": 10**10, "llama-3.1-70b": 48 * 10**9}
"""That 128 short requests and 64 adapters need on one device; over N, (1 + 1/N) / 2 of it on each
will do, which is the share that adapters take."""

READY_SECONDS, TURN_SECONDS = 280, 120
"""A process that is not ready by then, or takes longer to measure, is given up."""

KINDS = (
    ("collectives", re.compile(r"nccl|all[-_]?reduce|all[-_]?gather|one_shot", re.I)),
    ("attention", re.compile(r"attend|attention|decode_kernel|kv_write|merge", re.I)),
    ("adapters", re.compile(r"lora|mosaic|_decode|body", re.I)),
    ("matmuls", re.compile(r"gemm|cutlass|nvjet|dot|cublas|triton_gemm|matmul", re.I)),
)
"""Kernel names of each kind of work, first match."""


def rank_of(setting: Setting, adapter: int) -> int:
    return setting.ranks[adapter % len(setting.ranks)]


@contextlib.contextmanager
def engine_of(args: argparse.Namespace, setting: Setting, count: int, scheme: str) -> Iterator[LLM]:
    """An engine over ``count`` devices, with as many adapters as the largest batch needs."""
    options = {"dtype": args.dtype, "kernels": args.kernels}
    pool_bytes = args.pool_bytes or POOL_BYTES.get(args.model or setting.model, 2**30)
    with LLM(
        args.model or setting.model,
        load="dummy",
        progress=False,
        tensor_parallel=count,
        lora_partition=scheme,
        max_num_seqs=max(args.batches),
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_model_len=args.max_model_len,
        pool_bytes=pool_bytes * (count + 1) // (2 * count),
        **{name: value for name, value in options.items() if value is not None},
    ) as llm:
        most = max(args.adapters)
        ranks = [rank_of(setting, adapter) for adapter in range(most)]
        llm.load_dummy_adapters([f"adapter-{i}" for i in range(most)], ranks, setting.targets)
        if args.warm_up:
            llm.warm_up()
        yield llm


def start(llm: LLM, batch: int, num_adapters: int, num_tokens: int) -> list[Generation]:
    """Requests of which each is past its prompt."""
    rng = np.random.default_rng(0)
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    engine = llm.engine
    running = [
        engine.add_request(
            rng.integers(0, llm.vocab_size, PROMPT_TOKENS).tolist(),
            params,
            f"adapter-{i % num_adapters}" if num_adapters else None,
        )
        for i in range(batch)
    ]
    while not all(generation.num_output_tokens for generation in running):
        engine.step()
    for _ in range(SETTLE):
        engine.step()
    return running


def time_steps(engine: Engine, count: int) -> float:
    """Seconds a step: each call launches one and waits for the one before it."""
    begin = time.perf_counter()
    for _ in range(count):
        engine.step()
    return (time.perf_counter() - begin) / count


def decode(
    args: argparse.Namespace, llm: LLM, batch: int, num_adapters: int
) -> tuple[float, dict[str, float]]:
    """(seconds a step, the best of ``--runs``; milliseconds a step by kind of work)."""
    steps = args.steps * args.runs + 16 + 2 * SETTLE
    running = start(llm, batch, num_adapters, steps + batch // 4)
    seconds = min(time_steps(llm.engine, args.steps) for _ in range(args.runs))
    shares = profile(llm.engine, 8) if args.profile else {}
    assert not any(generation.finished for generation in running)
    for generation in running:
        llm.engine.abort(generation)
    llm.engine.step()
    return seconds, shares


def profile(engine: Engine, steps: int) -> dict[str, float]:
    """Milliseconds a step that the first device spends in each kind of kernel."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            time_steps(engine, steps)
        (path,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
        totals: collections.Counter[str] = collections.Counter()
        for plane in data.planes:
            if not re.search(r"device:(GPU|TPU):0$", plane.name):
                continue
            for line in plane.lines:
                if not re.search(r"Stream|XLA Ops", line.name):
                    continue
                for event in line.events:
                    kind = next((k for k, found in KINDS if found.search(event.name)), "other")
                    totals[kind] += event.duration_ns
                    totals[f"kernel {event.name[:80]}"] += event.duration_ns
        known = [k for k, _ in totals.most_common() if not k.startswith("kernel ")]
        top = [k for k, _ in totals.most_common() if k.startswith("kernel ")][:12]
        return {name: totals[name] / steps / 1e6 for name in known + top}


def time_all_reduce(count: int, batch: int, features: int, dtype: jnp.dtype) -> float:
    """Seconds of one all-reduce of [batch, features], of many in a row."""
    mesh, shards, chain = model_mesh(jax.devices()[:count]), Shards(count), 100
    same = jax.sharding.PartitionSpec()

    def many(x: jax.Array) -> jax.Array:
        for _ in range(chain):
            x = shards.sum(x) * jnp.asarray(1 / count, dtype)
        return x

    program = jax.jit(on_each_device(many, mesh, (same,), same))
    x = jax.device_put(np.ones((batch, features), dtype), jax.sharding.NamedSharding(mesh, same))
    program(x).block_until_ready()
    begin = time.perf_counter()
    for _ in range(5):
        x = program(x)
    x.block_until_ready()
    return (time.perf_counter() - begin) / (5 * chain)


def bytes_read(llm: LLM, setting: Setting, num_adapters: int) -> tuple[int, int]:
    """(weights, adapters) that one device must read in a step, at least."""
    view, model = llm.engine.view, llm._loaded.model
    embedding = model.embed_tokens.weight[...]
    weights = sum(_own_bytes(leaf) for leaf in jax.tree.leaves(nnx.state(model)))
    if model.lm_head is not None:
        weights -= _own_bytes(embedding)  # a few rows of it
    item = embedding.dtype.itemsize
    rows = 0
    for adapter in range(num_adapters):
        rank = rank_of(setting, adapter)
        ranks = [rank if target in setting.targets else 0 for target in TARGETS]
        rows += view.adapters.num_rows(ranks)
    return weights, rows * LANES * item * model.config.num_layers


def _own_bytes(array: jax.Array) -> int:
    return array.addressable_shards[0].data.nbytes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--settings", choices=SETTINGS, nargs="+", default=["S4", "G1"])
    parser.add_argument("--model", help="another model's shapes: a name, or a directory")
    parser.add_argument("--tensor-parallel", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--partitions", nargs="+", default=["no_extra_collectives", "s_lora"], help="above 1 device"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 32, 1], help="falling")
    parser.add_argument("--adapters", type=int, nargs="+", default=[0, 64])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--read-roof", type=float, default=4.6, help="TB/s that a device reads")
    parser.add_argument("--dtype")
    parser.add_argument("--kernels")
    parser.add_argument("--pool-bytes", type=int, help="on one device")
    parser.add_argument("--max-num-batched-tokens", type=int, default=256)
    parser.add_argument("--max-model-len", type=int, default=512)
    parser.add_argument("--warm-up", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path, help="append a JSON line a row here")
    parser.add_argument("--only", nargs=3, help="setting, devices, partition: one engine's process")
    args = parser.parse_args()
    if args.only:
        measure(args, args.only[0], int(args.only[1]), args.only[2])
        return
    for setting in args.settings:  # one at a time: more do not fit the devices side by side
        engines = [
            (setting, count, scheme)
            for count in args.tensor_parallel
            for scheme in (args.partitions if count > 1 else args.partitions[:1])
        ]
        rows = []
        for of_engine in take_turns(engines):
            for row in of_engine:
                print(f"  {row}", flush=True)  # whatever becomes of the others
            rows += of_engine
        report(rows, args)


def memory_shares(engines: Sequence[tuple[str, int, str]]) -> list[float]:
    """What each engine may take of a device, of which a tenth is left to NCCL and the like.

    Weights are 1/N of one device's, adapters up to (1 + 1/N) / 2.
    """
    needs = [0.3 + 0.7 / count for _, count, _ in engines]
    return [0.9 * need / sum(needs) for need in needs]


def take_turns(engines: Sequence[tuple[str, int, str]]) -> Iterator[list[dict[str, Any]]]:
    """The rows of each engine: all get ready together, then measure one after the other."""
    begin = time.monotonic()
    children = []
    shares = memory_shares(engines)
    for index, engine in enumerate(engines):
        environment = dict(os.environ)
        environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{shares[index]:.3f}")
        environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        environment.setdefault("NCCL_NVLS_ENABLE", "0")
        if engine[1] == 1:  # side by side with others
            environment.setdefault("CUDA_VISIBLE_DEVICES", str(index % max(e[1] for e in engines)))
        command = [sys.executable, *sys.argv, "--only", *map(str, engine)]
        child = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=_read_lines, args=(child, lines), daemon=True).start()
        children.append((engine, child, lines))
    ready = []
    for engine, child, lines in children:
        left = READY_SECONDS - (time.monotonic() - begin)
        if any(line == "ready" for line in _lines(lines, left, until="ready")):
            ready.append((engine, child, lines))
        else:
            print(f"{engine} is given up before it was ready", flush=True)
            child.kill()
    print(f"{len(ready)} engines ready after {time.monotonic() - begin:.0f} s", flush=True)
    for engine, child, lines in ready:
        child.stdin.write("go\n")
        child.stdin.flush()
        yield [
            json.loads(line.removeprefix("row "))
            for line in _lines(lines, TURN_SECONDS)
            if line.startswith("row ")
        ]
        child.kill()
        print(f"{engine} done after {time.monotonic() - begin:.0f} s", flush=True)


def _read_lines(child: subprocess.Popen, lines: queue.SimpleQueue) -> None:
    for line in child.stdout:
        lines.put(line.rstrip("\n"))
    lines.put(None)


def _lines(lines: queue.SimpleQueue, seconds: float, until: str | None = None) -> Iterator[str]:
    """What a process prints within ``seconds``, up to a line ``until`` or its end."""
    end = time.monotonic() + seconds
    while True:
        try:
            line = lines.get(timeout=max(end - time.monotonic(), 0.1))
        except queue.Empty:
            print("  out of time", flush=True)
            return
        if line is None:
            return
        if not line.startswith("row "):
            print(f"  {line}", flush=True)
        yield line
        if line == until:
            return


def measure(args: argparse.Namespace, name: str, count: int, scheme: str) -> None:
    """All batches and numbers of adapters on one engine, once the word is given."""
    setting, begin = SETTINGS[name], time.perf_counter()
    with engine_of(args, setting, count, scheme) as llm:
        dtype, config = llm._dtype, llm._loaded.model.config
        memory = [d.memory_stats() or {} for d in jax.devices()[:count]]
        in_use = max(stats.get("bytes_in_use", 0) for stats in memory)
        stats = llm.stats()
        pool = (stats.pages_total + 1) * stats.page_bytes // count
        print(
            f"{name}, {count} devices, {scheme}: kernels {llm.engine.view.kernels}, "
            f"{max(in_use - pool, 0) / 1e9:.2f} GB on each besides a pool of {pool / 1e9:.2f} GB, "
            f"{stats.compiles} programs, ready after {time.perf_counter() - begin:.0f} s",
            flush=True,
        )
        print("ready", flush=True)
        sys.stdin.readline()
        for batch in args.batches:
            collective = 0.0
            if count > 1:
                collective = time_all_reduce(count, batch, config.hidden_size, dtype)
            for num_adapters in args.adapters:
                if num_adapters == 0 and scheme != args.partitions[0]:
                    continue  # no adapter, no partition
                seconds, shares = decode(args, llm, batch, num_adapters)
                weights, adapters = bytes_read(llm, setting, min(num_adapters, batch))
                roof = args.read_roof * 1e12
                floor = weights / roof + collective * (2 * config.num_layers + 1)
                row = {
                    "setting": name,
                    "tensor_parallel": count,
                    "lora_partition": scheme,
                    "batch": batch,
                    "adapters": num_adapters,
                    "tokens_per_s": batch / seconds,
                    "ms_per_step": 1e3 * seconds,
                    "all_reduce_us": 1e6 * collective,
                    "weight_bytes": weights,
                    "adapter_bytes": adapters,
                    "bytes_in_use": in_use,
                    "pool_bytes": pool,
                    "floor_ms": 1e3 * (floor + adapters / roof),
                    "ceiling_of_retention": floor / (floor + adapters / roof),
                    "ms_by_kind": shares,
                    "compiles": llm.stats().compiles,
                    "device": jax.devices()[0].device_kind,
                    "jax": jax.__version__,
                }
                print("row " + json.dumps(row), flush=True)


def report(rows: Sequence[dict[str, Any]], args: argparse.Namespace) -> None:
    """A line a row, with what only several rows say; JSON where asked for."""
    base = {
        (row["setting"], row["tensor_parallel"], row["batch"]): row["tokens_per_s"]
        for row in rows
        if row["adapters"] == 0
    }
    for row in rows:
        key = row["setting"], row["tensor_parallel"], row["batch"]
        one = next(
            (
                other["tokens_per_s"]
                for other in rows
                if (other["setting"], other["tensor_parallel"], other["batch"])
                == (key[0], 1, key[2])
                and other["adapters"] == row["adapters"]
            ),
            None,
        )
        row["retention"] = row["tokens_per_s"] / base[key] if key in base else None
        row["speedup"] = row["tokens_per_s"] / one if one else None
        share = row["retention"] and row["retention"] / row["ceiling_of_retention"]
        print(
            f"{row['setting']} TP {row['tensor_parallel']} {row['lora_partition']}, batch "
            f"{row['batch']}, {row['adapters']} adapters: {row['tokens_per_s']:.1f} tokens/s, "
            f"{row['ms_per_step']:.3f} ms a step (floor {row['floor_ms']:.3f}), "
            f"{_number(row['speedup'])} x one device, retention {_number(row['retention'])} "
            f"(ceiling {row['ceiling_of_retention']:.3f}, {_number(share)} of it), all-reduce "
            f"{row['all_reduce_us']:.1f} us, adapters {row['adapter_bytes'] / 1e9:.2f} GB a device"
        )
        for kind, ms in row["ms_by_kind"].items():
            print(f"    {ms:8.3f} ms  {kind}")
        if args.json:
            with args.json.open("a") as file:
                file.write(json.dumps(row) + "\n")


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    main()
