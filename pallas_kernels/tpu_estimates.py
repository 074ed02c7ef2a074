"""Estimates of the TPU kernels without a TPU: ``python -m pallas_kernels.tpu_estimates``.

A developer's tool. libtpu compiles each kernel ahead of time and says how many cycles it expects;
one JSON line a kernel, chip and shape sets that against the time that the bytes take from HBM.
What is data on a chip is static here, because the compiler counts a loop of unknown length as
none. It models a copy's latency, not the bandwidth that copies share: a kernel takes the longer of
``cycles_us`` and ``hbm_us``, and ``share`` is the latter's share of that. ``bundles_us`` counts
every instruction bundle of the program once a step of its grid; it leaves out waits for the matrix
unit and repeats of short inner loops, and is all there is on v5e, where the profiler dies on
packed bfloat16. Each estimate is a process of its own, since a failure ends the process.
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
LORA_RANKS = (8, 16, 32, 64, 128)
LORA = {f"LoRA decode, 64 adapters of rank {rank}, 4096 to 4096": rank for rank in LORA_RANKS}


def _attention_case(
    rows: int, context: int, heads: int, kv_heads: int, head_dim: int, page_size: int
) -> tuple[Callable[..., Any], list[Any], int, int]:
    """(function, its arguments, bytes it reads, steps of its grid)."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.layout import KVLayout
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
    return call, args, read, rows * (context // block)


def _lora_case(rank: int) -> tuple[Callable[..., Any], list[Any], int, int]:
    import jax
    import jax.numpy as jnp

    from pallas_kernels.paged_lora import pallas_tpu

    adapters, features = 64, 4096
    number = pallas_tpu.CLASSES.index(rank)
    items = adapters // pallas_tpu.in_parallel(rank)
    ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    table = ints((adapters + 1,))
    args = [
        jax.ShapeDtypeStruct((adapters, features // 128, 128), jnp.bfloat16),
        jax.ShapeDtypeStruct((4096, 512, 128), jnp.bfloat16),
        ints((1,)),
        ints((items * pallas_tpu.ITEM_FIELDS,)),
        table,
        ints((adapters,)),
        *[table] * 2,
        ints((adapters * rank * 10 // 8,)),  # Llama-3.1-8B, all targets
        *[table] * 4,
        jax.ShapeDtypeStruct((adapters + 1,), jnp.float32),
    ]
    call = functools.partial(
        pallas_tpu.decode,
        in_blocks=features // 128,
        out_blocks=(features // 128,),
        classes=pallas_tpu.CLASSES[: number + 1],
        fixed=(items, number),
    )
    return call, args, adapters * 2 * features * rank * 2, items


def _estimate(name: str, chip: str, dump: str) -> dict[str, Any]:
    """Compile one case for one chip; libtpu writes what it estimates under ``dump``."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    case = _attention_case(*ATTENTION[name]) if name in ATTENTION else _lora_case(LORA[name])
    call, args, read, steps = case
    topology, bandwidth, frequency = CHIPS[chip]
    devices = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
    mesh = Mesh(np.array(devices[:1]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())
    args = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in args]
    with jax.set_mesh(mesh):
        jax.jit(call).lower(*args).compile()
    files = pathlib.Path(dump)
    cycles, bundles = [], []
    for path in files.glob("prof/*paged*.textproto"):
        cycles += map(int, re.findall(r"estimated_cycles: (\d+)", path.read_text()))
    for path in files.glob("*paged*schedule-analysis_final_bundles.txt"):
        bundles += map(int, re.findall(r"total scheduled bundles:\s+(\d+)", path.read_text()))
    hbm_us = 1e6 * read / bandwidth
    result = {"kernel": name, "chip": chip, "hbm_us": round(hbm_us, 1)}
    result["bundles_us"] = round(1e6 * max(bundles) * steps / frequency, 1)
    if cycles:
        cycles_us = 1e6 * max(cycles) / frequency
        result["cycles_us"] = round(cycles_us, 1)
        result["share"] = round(hbm_us / max(cycles_us, hbm_us), 3)
    return result


def _run(name: str, chip: str) -> dict[str, Any]:
    """``_estimate`` in a process of its own: with the profile if libtpu survives it."""
    for profile in (True, False):
        with tempfile.TemporaryDirectory() as dump:
            os.mkdir(f"{dump}/prof")
            flags = f"--xla_jf_dump_to={dump}"
            if profile:
                flags += f" --xla_jf_dump_static_llo_profile_to={dump}/prof"
            done = subprocess.run(
                [sys.executable, "-m", "pallas_kernels.tpu_estimates", "--one", name, chip, dump],
                env=os.environ | ENVIRONMENT | {"LIBTPU_INIT_ARGS": flags},
                capture_output=True,
                text=True,
                preexec_fn=functools.partial(setrlimit, RLIMIT_CORE, (0, 0)),
            )
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
    raise RuntimeError(f"{name} for {chip}: {done.stderr[-2000:]}")


def main() -> None:
    """Print one JSON line per kernel and chip."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=3, metavar=("KERNEL", "CHIP", "FOLDER"))
    one = parser.parse_args().one
    if one:
        print(json.dumps(_estimate(*one)))
        return
    for chip in CHIPS:
        for name in (*ATTENTION, *LORA):
            print(json.dumps(_run(name, chip)), flush=True)


if __name__ == "__main__":
    main()
