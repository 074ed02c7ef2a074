"""Estimates of the TPU kernels without a TPU: ``python -m pallas_kernels.tpu_estimates``.

A developer's tool. libtpu compiles each kernel ahead of time and says how many cycles it expects;
one JSON line a kernel, chip and shape sets that against the time that the bytes take from HBM. The
profile follows the scalar core through loops and branches and takes for zero what comes from
outside: of attention only loops of static length are estimated, and LoRA's kernels, as they ship,
are told their metadata by writing it to scalar memory first (the time for that is taken off). It
models a copy's latency, not the bandwidth that copies share: a kernel takes the longer of
``cycles_us`` and ``hbm_us``, and ``share`` is the latter's share of that. ``bundles_us`` counts
every instruction bundle of the program once a step of its grid, branches not taken and the telling
included; it leaves out waits for the matrix unit and repeats of loops, and is all there is where
the profiler dies, as on v5e with packed bfloat16. LoRA's kernels are then compiled without the
branches for ranks that the step has not. Each estimate is a process of its own, since a
failure ends the process.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from resource import RLIMIT_CORE, setrlimit
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.layout import GROUPS, TARGETS, AdapterLayout, KVLayout
from pallas_kernels.paged_lora.batch import LoraBatch, lora_bucket_sizes

CHIPS = {"v6e": ("v6e:2x2", 1640e9, 1.75e9), "v5e": ("v5e:2x2", 819e9, 1.5e9)}
"""Topology, bytes a second from HBM, cycles a second."""

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

ATTENTION = {  # rows, context, query heads, KV heads, head_dim, tokens a page
    "decode attention, 32 over 8 heads": (32, 1024, 32, 8, 128, 32),
    "decode attention, 32 heads": (16, 1024, 32, 32, 128, 16),
    "decode attention, 40 heads": (16, 1024, 40, 40, 128, 16),
    "decode attention, 9 over 3 heads of 64": (32, 2048, 9, 3, 64, 64),
    "decode attention, 8 heads over one": (32, 2048, 8, 1, 128, 128),
}
Q_K_V = ("q", "k", "v")
LLAMA_7B = AdapterLayout((4096,) * 6 + (11008,), (4096,) * 4 + (11008,) * 2 + (4096,), 1024)
LLAMA_8B = AdapterLayout((4096,) * 6 + (14336,), (4096, 1024, 1024, 4096, 14336, 14336, 4096), 512)
LORA_RANKS = (8, 16, 32, 64, 128)
MIXED = [8, 16, 32, 64]


def _lora_cases() -> dict[str, tuple[AdapterLayout, tuple[str, ...], list[int], np.ndarray]]:
    """(layout, group, rank of each adapter, adapter of each token) by name."""
    each, o = np.arange(1, 65), ("o",)
    cases: dict[str, Any] = {
        f"LoRA decode, 64 adapters of rank {rank}, 4096 to 4096": (LLAMA_8B, o, [rank] * 64, each)
        for rank in LORA_RANKS
    }
    for rank in (8, 16, 64):
        name = f"LoRA decode, 64 adapters of rank {rank}, q, k, v of Llama-7B"
        cases[name] = (LLAMA_7B, Q_K_V, [rank] * 64, each)
    name = "LoRA decode, 64 adapters of ranks 8, 16, 32, 64, 4096 to 4096"
    cases[name] = (LLAMA_8B, o, MIXED * 16, each)
    cases["LoRA decode, 64 adapters of rank 24, 4096 to 4096"] = (LLAMA_8B, o, [24] * 64, each)
    eight = np.repeat(np.arange(1, 9), 8)
    cases["LoRA decode, 8 tokens each of 8 adapters of rank 16, 4096 to 4096"] = (
        LLAMA_8B,
        o,
        [16] * 8,
        eight,
    )
    tiles = np.repeat(np.arange(1, 33), 128)
    for rank in (16, 64):
        name = f"LoRA prefill, 4096 tokens, 32 adapters of rank {rank}, q, k, v of Llama-7B"
        cases[name] = (LLAMA_7B, Q_K_V, [rank] * 32, tiles)
    return cases


LORA = _lora_cases()
MATMUL = "base matmul, 4096 tokens, q, k, v of Llama-7B"


def _attention_case(
    rows: int, context: int, heads: int, kv_heads: int, head_dim: int, page_size: int
) -> tuple[Callable[..., Any], list[Any], int, int, str]:
    """(function, its arguments, bytes it reads, steps of its grid, its name)."""
    from pallas_kernels.paged_attention import pallas_tpu

    layout = KVLayout(kv_heads, head_dim, page_size)
    block = pallas_tpu.block_tokens(layout, 2)
    context = max(context // block, 1) * block
    ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    args = [
        jax.ShapeDtypeStruct((rows, heads, 128), jnp.bfloat16),
        jax.ShapeDtypeStruct((4096, layout.rows_per_page, 128), jnp.bfloat16),
        ints((rows,)),
        ints((rows + 1,)),
        ints((rows, context // page_size)),
    ]
    call = functools.partial(pallas_tpu.decode, layout=layout, scale=0.1, context=context)
    read = rows * context * layout.rows_per_token * 256
    return call, args, read, rows * (context // block), "paged_attention_decode"


def _lora_case(
    layout: AdapterLayout,
    group: tuple[str, ...],
    ranks: list[int],
    index: np.ndarray,
    fills: int,
    has_other_ranks: bool,
) -> tuple[Callable[..., Any], list[Any], int, int, str]:
    """One group of targets in a step, every word of which the compiler knows."""
    from pallas_kernels.paged_lora import pallas_tpu

    batch = jax.tree.map(jnp.asarray, _lora_batch(layout, ranks, index.astype(np.int32)))
    classes = pallas_tpu.CLASSES
    if not has_other_ranks:
        needed = {next(c for c in classes if c >= rank) for rank in ranks}
        classes = tuple(c for c in classes if c in needed)
    of_ranks = mock.patch.object(pallas_tpu, "CLASSES", classes)
    with of_ranks:
        plan = jax.tree.map(np.asarray, pallas_tpu.prepare(batch, layout))
    number, target = GROUPS.index(group), TARGETS.index(group[0])
    outputs = sum(layout.out_features[TARGETS.index(name)] for name in group)
    inputs = layout.in_features[target]
    is_prefill = bool(plan.tiles)
    steps = int(plan.num_tiles[number] if is_prefill else plan.num_items[number])
    bf16 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    tokens, name = len(index), "paged_lora_prefill" if is_prefill else "paged_lora_decode"
    args = [
        bf16((tokens, outputs)),
        bf16((tokens, inputs)),
        bf16((4096, layout.rows_per_page, 128)),
    ]

    def call(y: jax.Array, x: jax.Array, pool: jax.Array) -> jax.Array:
        knowing = mock.patch.object(pallas_tpu.pl, "pallas_call", _knowing(name, steps, fills))
        with of_ranks, knowing:
            return pallas_tpu.paged_lora(y, x, pool, plan, layer=0, group=group, layout=layout)

    read = sum(ranks[i - 1] for i in set(index.tolist())) * 2 * (inputs * len(group) + outputs)
    if is_prefill:
        read += 2 * tokens * (inputs + 2 * outputs)
    return call, args, read, steps, name


def _matmul_case() -> tuple[Callable[..., Any], list[Any], int, int, str]:
    tokens, inputs, outputs = 4096, 4096, 3 * 4096
    sizes = ((tokens, inputs), (inputs, outputs))
    args = [jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in sizes]
    read = 2 * (tokens * inputs + inputs * outputs + tokens * outputs)
    return jnp.matmul, args, read, 1, "fusion"


def _lora_batch(layout: AdapterLayout, ranks: list[int], index: np.ndarray) -> LoraBatch:
    """A step on adapters with all targets, their pages one behind another."""
    bucket = sum(ranks)
    num_rows, num_pages = lora_bucket_sizes(bucket, layout)
    pages = np.zeros(num_pages, np.int32)
    page_start = np.zeros(num_rows, np.int32)
    rank, a_row, b_row = np.zeros((3, num_rows, len(TARGETS)), np.int32)
    used = 0
    for row, own in enumerate(ranks, start=1):
        rank[row] = own
        a_row[row], b_row[row], _ = layout.segments(rank[row])
        page_start[row] = used
        used += layout.num_pages(rank[row])
    pages[:used] = np.arange(1, used + 1)
    scaling = np.ones((1, num_rows, len(TARGETS)), np.float32)
    return LoraBatch(index, pages, page_start, rank, a_row, b_row, scaling, bucket)


def _knowing(name: str, steps: int, fills: int) -> Callable[..., Any]:
    """A ``pallas_call`` that tells the compiler, for the kernel ``name``, what its metadata says.

    libtpu's profile follows the scalar core, and takes for zero what comes from outside. So the
    first step of the grid writes the metadata to scalar memory, ``fills`` times, and the kernel,
    the one that ships, finds it there. Only the number of steps is told in another way.
    """
    original = pl.pallas_call

    def pallas_call(kernel: Any, *, grid_spec: Any, **options: Any) -> Any:
        if options["name"] != name:
            return original(kernel, grid_spec=grid_spec, **options)

        def call(*args: Any) -> jax.Array:
            count = grid_spec.num_scalar_prefetch
            known = [
                np.asarray(a).reshape(-1) if a.dtype == jnp.int32 else None for a in args[:count]
            ]
            kept = {number: values for number, values in enumerate(known) if values is not None}

            def knowing(*refs: Any) -> None:
                own, filled = list(refs[: -len(kept)]), refs[-len(kept) :]

                @pl.when(pl.program_id(0) == 0)
                def _() -> None:
                    # A table; one word alone would not count as zero.
                    zero = refs[list(kept)[1]][0]

                    @pl.loop(0, zero + fills)
                    def _(_: Any) -> None:
                        for values, into in zip(kept.values(), filled, strict=True):
                            for place in np.flatnonzero(values):
                                into[int(place)] = zero + int(values[place])

                for number, into in zip(kept, filled, strict=True):
                    own[number] = into
                kernel(*own)

            scratch = [pltpu.SMEM(values.shape, jnp.int32) for values in kept.values()]
            spec = pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=count,
                grid=(steps,),
                in_specs=grid_spec.in_specs,
                out_specs=grid_spec.out_specs,
                scratch_shapes=[*grid_spec.scratch_shapes, *scratch],
            )
            return original(knowing, grid_spec=spec, **options)(*args)

        return call

    return pallas_call


def _estimate(name: str, chip: str, dump: str, fills: int, has_other_ranks: bool) -> dict[str, Any]:
    """Compile one case for one chip; libtpu writes what it estimates under ``dump``."""
    if name == MATMUL:
        case = _matmul_case()
    elif name in ATTENTION:
        case = _attention_case(*ATTENTION[name])
    else:
        case = _lora_case(*LORA[name], fills, has_other_ranks)
    call, args, read, steps, kernel = case
    topology, bandwidth, frequency = CHIPS[chip]
    devices = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
    mesh = Mesh(np.array(devices[:1]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())
    args = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in args]
    with jax.set_mesh(mesh):
        jax.jit(call).lower(*args).compile()
    files = pathlib.Path(dump)
    cycles, bundles = [], []
    for path in files.glob(f"prof/*{kernel}*.textproto"):
        cycles += map(int, re.findall(r"estimated_cycles: (\d+)", path.read_text()))
    for path in files.glob(f"*{kernel}*schedule-analysis_final_bundles.txt"):
        bundles += map(int, re.findall(r"total scheduled bundles:\s+(\d+)", path.read_text()))
    return {
        "hbm_us": 1e6 * read / bandwidth,
        "bundles_us": 1e6 * max(bundles) * steps / frequency,
        "cycles_us": 1e6 * max(cycles) / frequency if cycles else None,
    }


def _run(name: str, chip: str) -> dict[str, Any]:
    """What one case takes, as one JSON line: with the profile if libtpu survives it."""
    result = {"kernel": name, "chip": chip}
    try:
        times = _in_process(name, chip, fills=1, profile=True)
    except RuntimeError:
        times = _in_process(name, chip, fills=1, profile=False)
        return result | {key: round(us, 1) for key, us in times.items() if us is not None}
    if name in LORA:  # telling the metadata costs time that the kernel does not take
        twice = _in_process(name, chip, fills=2, profile=True)
        times["cycles_us"] -= twice["cycles_us"] - times["cycles_us"]
    share = times["hbm_us"] / max(times["hbm_us"], times["cycles_us"])
    return result | {key: round(us, 1) for key, us in times.items()} | {"share": round(share, 3)}


def _in_process(name: str, chip: str, *, fills: int, profile: bool) -> dict[str, Any]:
    """``_estimate`` in a process of its own, as libtpu may end it."""
    with tempfile.TemporaryDirectory() as dump:
        os.mkdir(f"{dump}/prof")
        flags = f"--xla_jf_dump_to={dump}"
        if profile:
            flags += f" --xla_jf_dump_static_llo_profile_to={dump}/prof"
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pallas_kernels.tpu_estimates",
                "--one",
                name,
                chip,
                dump,
                str(fills),
                "all" if profile else "own",
            ],
            env=os.environ | ENVIRONMENT | {"LIBTPU_INIT_ARGS": flags},
            capture_output=True,
            text=True,
            preexec_fn=functools.partial(setrlimit, RLIMIT_CORE, (0, 0)),
        )
    if done.returncode:
        raise RuntimeError(f"{name} for {chip}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print one JSON line per kernel and chip."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--chips", nargs="+", default=list(CHIPS), choices=list(CHIPS))
    parser.add_argument("--one", nargs=5, metavar=("KERNEL", "CHIP", "FOLDER", "FILLS", "RANKS"))
    options = parser.parse_args()
    if options.one:
        name, chip, folder, fills, ranks = options.one
        print(json.dumps(_estimate(name, chip, folder, int(fills), ranks == "all")))
        return
    for chip in options.chips:
        for name in (*ATTENTION, *LORA, MATMUL):
            if options.only in name:
                print(json.dumps(_run(name, chip)), flush=True)


if __name__ == "__main__":
    main()
