"""Benchmark of paged LoRA: ``python -m pallas_kernels.paged_lora.bench``, JSON lines out.

One line per step shape and implementation: the time of the LoRA terms of every layer and target of
a model, chained as its layers chain them, without base matmuls or attention. ``copy`` is the
cheating lower bound: the same bytes of the pool, copied and not used.

On a GPU (``gpu_main``) instead: q, k and v of Llama-7B in one call, over the layers in turn so that
no cache serves them, as a share of the rate at which a kernel that does nothing else reads pages.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.layout import GROUPS, LANES, TARGETS, AdapterLayout, KVLayout, stored_rank
from pallas_kernels.paged_lora import api
from pallas_kernels.paged_lora.batch import LoraBatch, lora_bucket_sizes


@dataclasses.dataclass(frozen=True)
class Model:
    """What of a Llama decides the shapes."""

    layers: int
    hidden: int
    kv: int
    inner: int
    rows_per_page: int

    def layout(self) -> AdapterLayout:
        """The model's adapters."""
        h, kv, f = self.hidden, self.kv, self.inner
        return AdapterLayout((h,) * 6 + (f,), (h, kv, kv, h, f, f, h), self.rows_per_page)


MODELS = {
    "smollm2-135m": Model(30, 576, 192, 1536, KVLayout(3, 64, 64).rows_per_page),
    "llama-3-8b": Model(32, 4096, 1024, 14336, KVLayout(8, 128, 32).rows_per_page),
}
# (tokens, ranks of the step's adapters); tokens are dealt to them in turn for decode, in runs for
# prefill (more than 64 tokens).
STEPS = (
    (32, (16,) * 8),
    (32, (8, 16, 32, 64) * 2),
    (32, (16,)),
    (64, (16,) * 64),
    (256, (16,) * 8),
)


def best_ms(call: Callable[[], Any], repeats: int) -> float:
    """The least time of a call, in ms: the others are our neighbours' noise."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def make_batch(
    layout: AdapterLayout,
    num_layers: int,
    index: np.ndarray,
    ranks: tuple[int, ...],
    targets: tuple[str, ...] = TARGETS,
    rank_bucket: int = 0,
) -> tuple[LoraBatch, int]:
    """A step of adapters of these ranks over shuffled pages; also the number of pages it owns."""
    of_targets = [tuple(rank if name in targets else 0 for name in TARGETS) for rank in ranks]
    bucket = rank_bucket or sum(map(stored_rank, ranks))
    rows, page_ids = lora_bucket_sizes(bucket, layout)
    counts = [layout.num_pages(r) for r in of_targets]
    pages = np.zeros(page_ids, np.int32)
    pages[: sum(counts)] = 1 + np.random.default_rng(0).permutation(sum(counts))
    page_start = np.zeros(rows, np.int32)
    table = {name: np.zeros((rows, len(TARGETS)), np.int32) for name in ("rank", "a_row", "b_row")}
    for row, own in enumerate(of_targets, start=1):
        page_start[row] = sum(counts[: row - 1])
        table["rank"][row] = [stored_rank(rank) for rank in own]
        table["a_row"][row], table["b_row"][row], _ = layout.segments(own)
    scaling = np.ones((num_layers, rows, len(TARGETS)), np.float32)
    return LoraBatch(index, pages, page_start, **table, scaling=scaling, rank_bucket=bucket), sum(
        counts
    )


def chain(
    x: jax.Array,
    pool: tuple[jax.Array, ...],
    batch: LoraBatch,
    layout: AdapterLayout,
    implementation: str,
) -> jax.Array:
    """All layers' LoRA terms, each group's input made of the output before it."""
    plan = api.prepare(batch, layout, implementation=implementation)
    hidden, heads, kv, inner = (
        layout.in_features[0], layout.out_features[0], layout.out_features[1],
        layout.out_features[4]
    )  # fmt: skip
    tokens = x.shape[0]

    def lora(x: jax.Array, layer: int, group: tuple[str, ...]) -> jax.Array:
        outputs = sum(layout.out_features[TARGETS.index(name)] for name in group)
        y = jnp.tile(x[:, :1], (1, outputs))  # stands for the base's output, made when x is
        return api.paged_lora(y, x, pool[layer], plan, layer=layer, group=group, layout=layout)

    for layer in range(len(pool)):
        q, k, v = jnp.split(lora(x, layer, GROUPS[0]), [heads, heads + kv], axis=1)
        x = x + lora(q + jnp.sum(k + v, axis=1, keepdims=True), layer, GROUPS[1])
        gate, up = jnp.split(lora(x, layer, GROUPS[2]), [inner], axis=1)
        x = x + lora(gate * up, layer, GROUPS[3])
    assert x.shape == (tokens, hidden)
    return x


LLAMA_7B = Model(32, 4096, 4096, 11008, KVLayout(32, 128, 16).rows_per_page)
LAYERS, REPEATS = 4, 30
"""Layers whose pools take turns, and how often each within one compiled call."""


def power_law(adapters: int, tokens: int) -> np.ndarray:
    """i32[tokens]: adapters 1, 2, … in proportion to 1, 1/2, …, each at least once, in order."""
    share = 1 / np.arange(1, adapters + 1)
    counts = np.maximum(1, np.round(share / share.sum() * tokens)).astype(int)
    counts[0] += tokens - counts.sum()
    return np.repeat(np.arange(1, adapters + 1, dtype=np.int32), counts)


# name → (table row of each token, ranks of the adapters)
GPU_STEPS: dict[str, tuple[np.ndarray, tuple[int, ...]]] = {
    "base only": (np.zeros(128, np.int32), (16,) * 16),
    "16 tokens, 16 adapters": (np.arange(1, 17, dtype=np.int32), (16,) * 16),
    "256 tokens, the same 16": (power_law(16, 256), (16,) * 16),
    "128 adapters, r 8": (np.arange(1, 129, dtype=np.int32), (8,) * 128),
    "128 adapters, r 16": (np.arange(1, 129, dtype=np.int32), (16,) * 128),
    "128 adapters, r 8 to 64": (np.arange(1, 129, dtype=np.int32), (8, 16, 32, 64) * 32),
    "128 adapters, r 64": (np.arange(1, 129, dtype=np.int32), (64,) * 128),
    "prefill 4096, 32 adapters": (np.repeat(np.arange(1, 33, dtype=np.int32), 128), (16,) * 32),
}


def us_a_call(call: Callable[[Any], Any], state: Any, calls: int) -> float:
    """Microseconds of one of the ``calls`` that ``state = call(state)`` makes.

    From the difference of 8 and 2 in a row, which leaves dispatch and waiting out.
    """
    for _ in range(3):
        state = call(state)
    times = {2: float("inf"), 8: float("inf")}
    for _ in range(5):
        for row in times:
            jax.block_until_ready(state)
            start = time.perf_counter()
            for _ in range(row):
                state = call(state)
            jax.block_until_ready(state)
            times[row] = min(times[row], time.perf_counter() - start)
    return (times[8] - times[2]) / 6 / calls * 1e6


def read_pages(pool: jax.Array) -> jax.Array:
    """Every row of ``pool`` through shared memory and no further: the read roof of a Hopper GPU."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu

    plgpu: Any = mosaic_gpu
    rows, stages, programs = 64, 12, 132
    boxes_a_page = pool.shape[1] // rows
    boxes = pool.shape[0] * boxes_a_page

    def body(pool: Any, out: Any, ring: Any, barrier: Any) -> None:
        program = jax.lax.axis_index("program")
        mine = jax.lax.div(boxes - program + programs - 1, programs)

        def issue(k: Any, slot: Any) -> None:
            box = program + k * programs
            at = pl.multiple_of(jax.lax.rem(box, boxes_a_page) * rows, rows)
            source = pool.at[jax.lax.div(box, boxes_a_page), pl.ds(at, rows)]
            plgpu.copy_gmem_to_smem(source, ring.at[slot], barrier.at[slot])

        for slot in range(stages):
            pl.when(slot < mine)(functools.partial(issue, slot, slot))

        def step(k: Any, total: jax.Array) -> jax.Array:
            slot = jax.lax.rem(k, stages)
            plgpu.barrier_wait(barrier.at[slot])
            first = plgpu.layout_cast(ring[slot, 0], plgpu.Layout.WG_STRIDED((LANES,), vec_size=1))
            plgpu.commit_smem()
            pl.when(k + stages < mine)(functools.partial(issue, k + stages, slot))
            return total + first.astype(jnp.float32)

        zero = jnp.zeros((LANES,), jnp.float32)
        zero = plgpu.layout_cast(zero, plgpu.Layout.WG_STRIDED((LANES,), vec_size=1))
        out[program] = jax.lax.fori_loop(0, mine, step, zero)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((programs, LANES), jnp.float32),
        grid=(programs,),
        grid_names=("program",),
        scratch_types=[
            plgpu.SMEM((stages, rows, LANES), pool.dtype),
            plgpu.Barrier(num_barriers=stages),
        ],
    )(pool)


def gpu_main(names: list[str], implementations: list[str]) -> None:
    """The steps of ``GPU_STEPS``: microseconds, bytes of A and B, share of the read roof."""
    layout, group, dtype = LLAMA_7B.layout(), GROUPS[0], jnp.dtype(jnp.bfloat16)
    header = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    pools = [
        jax.random.normal(key, (4096, LLAMA_7B.rows_per_page, LANES), dtype)
        for key in jax.random.split(jax.random.key(0), LAYERS)
    ]

    @functools.partial(jax.jit, donate_argnums=0)
    def read(total: jax.Array, pools: list[jax.Array]) -> jax.Array:
        return total + sum(jnp.sum(read_pages(p)[0]) for p in pools * 4)

    us = us_a_call(lambda total: read(total, pools), jnp.float32(0), 4 * LAYERS)
    roof = pools[0].nbytes / us / 1e3
    print(json.dumps({**header, "read_roof_gb_s": round(roof)}), flush=True)
    weights = [
        0.02 * jax.random.normal(key, (12288, 4096), dtype)
        for key in jax.random.split(jax.random.key(1), LAYERS)
    ]
    x = jax.random.normal(jax.random.key(2), (4096, 4096), dtype)

    # A weight and a result of its own each, or XLA would compute one for all.
    @functools.partial(jax.jit, donate_argnums=0)
    def base(ys: list[jax.Array], x: jax.Array, weights: list[jax.Array]) -> list[jax.Array]:
        del ys
        return [jax.lax.dot_general(x, w, (((1,), (1,)), ((), ()))) for w in weights]

    ys = [jnp.zeros((4096, 12288), dtype) for _ in weights]
    us = us_a_call(lambda ys: base(ys, x, weights), ys, LAYERS)
    line = {**header, "step": "base qkv matmul of 4096 tokens", "us": round(us, 1)}
    print(json.dumps(line), flush=True)
    # One bucket, and pools that hold any step: those of the same number of tokens share a program.
    bucket = max(sum(map(stored_rank, GPU_STEPS[name][1])) for name in names)
    batches = {name: make_batch(layout, LAYERS, *GPU_STEPS[name], group, bucket) for name in names}
    num_pages = 1 + max(owned for _, owned in batches.values())
    pools = [
        0.02 * jax.random.normal(key, (num_pages, LLAMA_7B.rows_per_page, LANES), dtype)
        for key in jax.random.split(jax.random.key(0), LAYERS)
    ]

    @functools.partial(jax.jit, donate_argnums=0)
    def step(y: jax.Array, x: jax.Array, pools: list[jax.Array], plan: Any) -> jax.Array:
        for _ in range(REPEATS):
            for layer, pool in enumerate(pools):
                y = api.paged_lora(y, x, pool, plan, layer=layer, group=group, layout=layout)
        return y

    for implementation in implementations:
        prepare = jax.jit(
            functools.partial(api.prepare, layout=layout, implementation=implementation)
        )
        for name in names:
            index, ranks = GPU_STEPS[name]
            plan = prepare(batches[name][0])
            few = jax.random.normal(jax.random.key(3), (len(index), LLAMA_7B.hidden), dtype)
            us = us_a_call(
                lambda y: step(y, few, pools, plan),  # noqa: B023
                jnp.zeros((len(index), 3 * LLAMA_7B.hidden), dtype),
                REPEATS * LAYERS,
            )
            used = [ranks[row - 1] for row in set(index.tolist()) - {0}]
            num_bytes = sum(used) * 2 * LANES * 3 * 2 * (LLAMA_7B.hidden // LANES)
            line = {
                **header,
                "step": name,
                "implementation": implementation,
                "mb": round(num_bytes / 1e6, 1),
                "us": round(us, 1),
                "read_roof_us": round(num_bytes / roof / 1e3, 1),
                "share": round(num_bytes / us / 1e3 / roof, 3),
            }
            print(json.dumps(line), flush=True)


def main() -> None:
    """Every step shape, one line per implementation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--step", type=int, help="only this one of the step shapes")
    parser.add_argument("--implementations", default="reference,xla,copy")
    parser.add_argument("--gpu-steps", nargs="*", default=list(GPU_STEPS), choices=GPU_STEPS)
    parser.add_argument("--gpu-implementations", nargs="*", default=["gpu", "xla"])
    options = parser.parse_args()
    if jax.default_backend() == "gpu":
        gpu_main(options.gpu_steps, options.gpu_implementations)
        return
    model, dtype = MODELS[options.model], jnp.dtype(options.dtype)
    layout = model.layout()
    for number, (tokens, ranks) in enumerate(STEPS):
        if options.step not in (None, number):
            continue
        index = 1 + np.arange(tokens, dtype=np.int32) % len(ranks)
        index = np.sort(index) if tokens > 64 else index
        batch, num_pages = make_batch(layout, model.layers, index, ranks)
        keys = jax.random.split(jax.random.key(0), model.layers + 1)
        pool = tuple(
            0.02 * jax.random.normal(key, (num_pages + 1, model.rows_per_page, LANES), dtype)
            for key in keys[1:]
        )
        x = jax.random.normal(keys[0], (tokens, model.hidden), dtype)
        rows = sum(layout.segments([r] * len(TARGETS))[2] for r in ranks)
        line = {
            "model": options.model,
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "dtype": dtype.name,
            "tokens": tokens,
            "ranks": dict(collections.Counter(map(int, ranks))),
            "mib": round(rows * model.layers * LANES * dtype.itemsize / 2**20, 1),
        }
        for name in options.implementations.split(","):
            start = time.perf_counter()
            if name == "copy":
                flat = jnp.arange(rows, dtype=jnp.int32)
                step = (
                    jax.jit(lambda pool, rows: [p.reshape(-1, LANES)[rows] for p in pool])
                    .lower(pool, flat)
                    .compile()
                )
                arguments = (pool, flat)
            else:
                jitted = jax.jit(chain, static_argnames=("layout", "implementation"))
                step = jitted.lower(x, pool, batch, layout=layout, implementation=name).compile()
                arguments = (x, pool, jax.device_put(batch))
            compile_s = time.perf_counter() - start
            ms = best_ms(
                functools.partial(step, *arguments), 2 if name == "reference" else options.repeats
            )
            result = {"ms": round(ms, 2), "compile_s": round(compile_s, 1)}
            print(json.dumps({**line, "implementation": name, **result}), flush=True)


if __name__ == "__main__":
    main()
