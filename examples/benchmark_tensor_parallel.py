r"""Decode speed of one model over 1, 2, 4, … devices, with adapters by either partition.

Random weights in the shapes of S-LoRA's settings. For each number of devices and each partition an
engine decodes batches of equal requests, each with an adapter of its own, and the rate is taken
while all of them run:

    NCCL_NVLS_ENABLE=0 python examples/benchmark_tensor_parallel.py --settings S4 G1 \
        --tensor-parallel 1 2 --json tensor_parallel.jsonl

Each engine has a process of its own. As many as fit the devices' memory start and compile side by
side, and then measure one after the other. Prints, beside tokens a second: the ceiling of retention
(with adapters over without), which is what the bytes that a device must read and the collectives'
own measured time allow; memory per device; for how much of a step the host waits for the devices;
and, with --profile, where a step's time goes. --collectives compares ways of XLA to communicate.
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

from checkpoints.architectures import ARCHITECTURES
from pallas_kernels.layout import LANES, TARGETS
from slora_jax import LLM, SamplingParams
from slora_jax.engine import Generation
from slora_jax.sharding import Shards, model_mesh, on_each_device

PROMPT_TOKENS = 8
SETTLE = 4
"""Steps after the last prefill that are not timed."""

POOL_BYTES = {"llama-13b": 20 * 10**9, "llama-3.1-8b": 9 * 10**9, "llama-3.1-70b": 42 * 10**9}
"""That 128 short requests and 64 adapters need on one device; over N, (1 + 1/N) / 2 of it on each
will do, which is the share that adapters take."""

OTHER_BYTES = 4 * 10**9
"""Of a process on each of its devices: contexts, NCCL, a step's temporaries."""

COLLECTIVES = {
    "default": "",
    "graph": "--xla_gpu_enable_command_buffer=+COLLECTIVES",
    "peer": "--xla_gpu_unsupported_use_all_reduce_one_shot_kernel=true",
    "peer-graph": "--xla_gpu_unsupported_use_all_reduce_one_shot_kernel=true "
    "--xla_gpu_enable_command_buffer=+COLLECTIVES",
    "no-graphs": "--xla_gpu_enable_command_buffer=",
    "skip-temp": "--xla_gpu_command_buffer_update_mode=SKIP_TEMP",
    "graph-skip-temp": "--xla_gpu_enable_command_buffer=+COLLECTIVES "
    "--xla_gpu_command_buffer_update_mode=SKIP_TEMP",
}
"""XLA's options: collectives within CUDA graphs; XLA's kernels over peer memory instead of NCCL; no
graphs at all; graphs whose temporaries stay where they are, so that launches need no update."""

READY_SECONDS, TURN_SECONDS = 200, 90
"""A process that is not ready by then, or takes longer to measure, is given up."""

Key = tuple[str, int, str, str]
"""An engine: setting, devices, partition, collectives."""

KINDS = (
    ("collectives", re.compile(r"nccl|psum|all[-_]?reduce|all[-_]?gather|one_shot", re.I)),
    ("attention", re.compile(r"attend|attention|decode_kernel|kv_write|merge", re.I)),
    ("adapters", re.compile(r"lora|mosaic|_decode|body", re.I)),
    ("matmuls", re.compile(r"gemm|cutlass|nvjet|dot|cublas|triton_gemm|matmul", re.I)),
)
"""Kernel names of each kind of work, first match."""


def rank_of(setting: Setting, adapter: int) -> int:
    return setting.ranks[adapter % len(setting.ranks)]


def pool_bytes(args: argparse.Namespace, setting: Setting, count: int) -> int:
    """Of each of ``count`` devices."""
    one = args.pool_bytes or POOL_BYTES.get(args.model or setting.model, 2**30)
    return one * (count + 1) // (2 * count)


@contextlib.contextmanager
def model_shapes(args: argparse.Namespace, setting: Setting) -> Iterator[str]:
    """The model's name, or a directory that says the same of ``--layers`` layers of it."""
    name = args.model or setting.model
    if args.layers is None:
        yield name
        return
    with tempfile.TemporaryDirectory() as folder:
        about = ARCHITECTURES[name]
        config = {
            "model_type": "llama",
            "num_hidden_layers": args.layers,
            "num_attention_heads": about["num_heads"],
            "num_key_value_heads": about["num_kv_heads"],
            "torch_dtype": about["dtype"],
        }
        same = ("hidden_size", "intermediate_size", "vocab_size", "rms_norm_eps", "rope_theta")
        config |= {key: about[key] for key in same}
        Path(folder, "config.json").write_text(json.dumps(config))
        yield folder


@contextlib.contextmanager
def engine_of(args: argparse.Namespace, setting: Setting, count: int, scheme: str) -> Iterator[LLM]:
    """An engine over ``count`` devices, with as many adapters as the largest batch needs."""
    options = {"dtype": args.dtype, "kernels": args.kernels}
    with (
        model_shapes(args, setting) as model,
        LLM(
            model,
            load="dummy",
            progress=False,
            tensor_parallel=count,
            lora_partition=scheme,
            max_num_seqs=max(args.batches),
            max_num_batched_tokens=args.max_num_batched_tokens,
            max_model_len=args.max_model_len,
            pool_bytes=pool_bytes(args, setting, count),
            **{name: value for name, value in options.items() if value is not None},
        ) as llm,
    ):
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


def time_steps(llm: LLM, count: int) -> tuple[float, float]:
    """(seconds a step, of which the host waits): each call launches one and waits for the one
    before it."""
    waited, begin = llm.stats().wait_seconds, time.perf_counter()
    for _ in range(count):
        llm.engine.step()
    seconds = time.perf_counter() - begin
    return seconds / count, (llm.stats().wait_seconds - waited) / count


def decode(
    args: argparse.Namespace, llm: LLM, batch: int, num_adapters: int, profiled: bool
) -> tuple[float, float, dict[str, float]]:
    """(seconds a step, the best of ``--runs``; of which the host waits; milliseconds a step by kind
    of work)."""
    steps = args.steps * args.runs + 16 + 2 * SETTLE
    running = start(llm, batch, num_adapters, steps + batch // 4)
    seconds, waited = min(time_steps(llm, args.steps) for _ in range(args.runs))
    shares = profile(llm, 6) if profiled else {}
    assert not any(generation.finished for generation in running)
    for generation in running:
        llm.engine.abort(generation)
    llm.engine.step()
    return seconds, waited, shares


def profile(llm: LLM, steps: int) -> dict[str, float]:
    """Milliseconds a step that the first device spends in each kind of kernel."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            time_steps(llm, steps)
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
    parser.add_argument("--collectives", nargs="+", choices=COLLECTIVES, default=["default"])
    parser.add_argument("--layers", type=int, help="so many layers of the model")
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 32, 1], help="falling")
    parser.add_argument("--adapters", type=int, nargs="+", default=[0, 64])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--read-roof", type=float, default=4.6, help="TB/s that a device reads")
    parser.add_argument("--dtype")
    parser.add_argument("--kernels")
    parser.add_argument("--pool-bytes", type=int, help="on one device")
    parser.add_argument("--device-memory", type=float, default=140, help="GB that a device has")
    parser.add_argument("--max-num-batched-tokens", type=int, default=128)
    parser.add_argument("--max-model-len", type=int, default=512)
    parser.add_argument("--warm-up", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path, help="append a JSON line a row here")
    parser.add_argument("--only", nargs=4, help="one engine's process: what Key says")
    args = parser.parse_args()
    if args.only:
        setting, count, scheme, collectives = args.only
        measure(args, (setting, int(count), scheme, collectives))
        return
    engines = [
        (setting, count, scheme, collectives)
        for setting in args.settings
        for count in args.tensor_parallel
        for collectives in (args.collectives if count > 1 else args.collectives[:1])
        for scheme in (args.partitions if count > 1 else args.partitions[:1])
    ]
    rows = []
    while engines:
        together, engines = place(engines, args)
        for of_engine in take_turns(together, args):
            write(of_engine, args)  # whatever becomes of the others
            rows += of_engine
    report(rows)


def needed_bytes(engine: Key, args: argparse.Namespace) -> int:
    """Of each of its devices."""
    name, count = engine[:2]
    setting = SETTINGS[name]
    about = dict(ARCHITECTURES.get(args.model or setting.model, {"hidden_size": 0}))
    hidden, layers = about["hidden_size"], args.layers or about.get("num_layers", 0)
    if not hidden:
        return OTHER_BYTES
    kv = about["num_kv_heads"] * about["head_dim"]
    layer = hidden * (2 * hidden + 2 * kv + 3 * about["intermediate_size"])
    weights = 2 * (layers * layer + 2 * about["vocab_size"] * hidden)
    return weights // count + pool_bytes(args, setting, count) + OTHER_BYTES


def place(
    engines: Sequence[Key], args: argparse.Namespace
) -> tuple[list[tuple[Key, list[int], int]], list[Key]]:
    """([(engine, its devices, bytes it needs of each)] that fit together, the other engines)."""
    most = args.device_memory * 1e9 * 0.95
    used = [0] * max(count for _, count, _, _ in engines)
    placed: list[tuple[Key, list[int], int]] = []
    left: list[Key] = []
    for engine in engines:
        need = needed_bytes(engine, args)
        emptiest = sorted(range(len(used)), key=lambda device: used[device])[: engine[1]]
        if placed and max(used[device] for device in emptiest) + need > most:
            left.append(engine)
            continue
        for device in emptiest:
            used[device] += need
        placed.append((engine, sorted(emptiest), need))
    return placed, left


def take_turns(
    engines: Sequence[tuple[Key, list[int], int]], args: argparse.Namespace
) -> Iterator[list[dict[str, Any]]]:
    """The rows of each engine: all get ready together, then measure one after the other."""
    begin = time.monotonic()
    children = []
    for engine, devices, need in engines:
        environment = dict(os.environ)
        share = need / (args.device_memory * 1e9)
        environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{share:.3f}")
        environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        environment.setdefault("NCCL_NVLS_ENABLE", "0")
        environment.setdefault("CUDA_VISIBLE_DEVICES", ",".join(map(str, devices)))
        flags = environment.get("XLA_FLAGS", ""), COLLECTIVES[engine[3]]
        environment["XLA_FLAGS"] = " ".join(filter(None, flags))
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
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
        yield [
            json.loads(line.removeprefix("row "))
            for line in _lines(lines, TURN_SECONDS)
            if line.startswith("row ")
        ]
        child.kill()
        child.wait()
        print(f"{engine} done after {time.monotonic() - begin:.0f} s", flush=True)


def _read_lines(child: subprocess.Popen, lines: queue.SimpleQueue) -> None:
    assert child.stdout is not None
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


def measure(args: argparse.Namespace, engine: Key) -> None:
    """All batches and numbers of adapters on one engine, once the word is given."""
    name, count, scheme, collectives = engine
    setting, begin = SETTINGS[name], time.perf_counter()
    with engine_of(args, setting, count, scheme) as llm:
        dtype, config = llm._dtype, llm._loaded.model.config
        memory = [d.memory_stats() or {} for d in jax.devices()[:count]]
        in_use = max(stats.get("bytes_in_use", 0) for stats in memory)
        stats = llm.stats()
        pool = (stats.pages_total + 1) * stats.page_bytes // count
        print(
            f"{name}, {count} devices, {scheme}, {collectives}: kernels "
            f"{llm.engine.view.kernels}, {max(in_use - pool, 0) / 1e9:.2f} GB on each besides a "
            f"pool of {pool / 1e9:.2f} GB, {stats.compiles} programs, ready after "
            f"{time.perf_counter() - begin:.0f} s",
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
                profiled = args.profile and batch in (args.batches[0], args.batches[-1])
                seconds, waited, shares = decode(args, llm, batch, num_adapters, profiled)
                weights, adapters = bytes_read(llm, setting, min(num_adapters, batch))
                roof = args.read_roof * 1e12
                floor = weights / roof + collective * (2 * config.num_layers + 1)
                row = {
                    "setting": name,
                    "layers": config.num_layers,
                    "tensor_parallel": count,
                    "lora_partition": scheme,
                    "collectives": collectives,
                    "batch": batch,
                    "adapters": num_adapters,
                    "tokens_per_s": batch / seconds,
                    "ms_per_step": 1e3 * seconds,
                    "ms_waited": 1e3 * waited,
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


def write(rows: Sequence[dict[str, Any]], args: argparse.Namespace) -> None:
    """A JSON line a row, where asked for."""
    if args.json:
        with args.json.open("a") as file:
            for row in rows:
                file.write(json.dumps(row) + "\n")


def report(rows: Sequence[dict[str, Any]]) -> None:
    """A line a row, with what only several rows say."""

    def of(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["setting"], row["tensor_parallel"], row["collectives"], row["batch"]

    base = {of(row): row["tokens_per_s"] for row in rows if row["adapters"] == 0}
    for row in rows:
        key = of(row)
        one = next(
            (
                other["tokens_per_s"]
                for other in rows
                if (other["setting"], other["tensor_parallel"], other["batch"])
                == (key[0], 1, key[3])
                and other["adapters"] == row["adapters"]
            ),
            None,
        )
        retention = row["tokens_per_s"] / base[key] if key in base else None
        speedup = row["tokens_per_s"] / one if one else None
        share = retention and retention / row["ceiling_of_retention"]
        print(
            f"{row['setting']} TP {row['tensor_parallel']} {row['lora_partition']} "
            f"{row['collectives']}, batch "
            f"{row['batch']}, {row['adapters']} adapters: {row['tokens_per_s']:.1f} tokens/s, "
            f"{row['ms_per_step']:.3f} ms a step (floor {row['floor_ms']:.3f}; the host waits "
            f"{row['ms_waited']:.3f}), "
            f"{_number(speedup)} x one device, retention {_number(retention)} "
            f"(ceiling {row['ceiling_of_retention']:.3f}, {_number(share)} of it), all-reduce "
            f"{row['all_reduce_us']:.1f} us, adapters {row['adapter_bytes'] / 1e9:.2f} GB a device"
        )
        for kind, ms in row["ms_by_kind"].items():
            print(f"    {ms:8.3f} ms  {kind}")


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    main()
