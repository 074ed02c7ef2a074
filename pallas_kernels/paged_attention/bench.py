"""Benchmark of paged attention: ``python -m pallas_kernels.paged_attention.bench``, JSON lines out.

One line per step shape and implementation: the time of all layers of a model, each writing the
step's K and V and attending, the output of one being the queries of the next, in one program. On a
GPU four layers stand for a model, gone through several times, so that no cache serves them.
``copy`` and, on a GPU, ``read`` are the cheating lower bounds: the pages that the step reads,
copied or only read. What ``read`` reaches is the read roof; later lines say their share of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.layout import LANES, KVLayout
from pallas_kernels.paged_attention import api
from pallas_kernels.paged_attention.batch import AttentionBatch


@dataclasses.dataclass(frozen=True)
class Model:
    """What of a Llama decides the shapes of the benchmark."""

    layers: int
    heads: int
    layout: KVLayout
    max_tokens: int


MODELS = {
    "smollm2-135m": Model(30, 9, KVLayout(3, 64, 64), 2048),
    "llama-3-8b": Model(32, 32, KVLayout(8, 128, 32), 8192),
    "llama-7b": Model(32, 32, KVLayout(32, 128, 16), 4096),
}
# (decode rows, their context; prefill sequences, tokens before the chunk, tokens of the chunk);
# a context below 0: uniform from 8 to its magnitude.
STEPS = (
    (32, 100, 0, 0, 0),
    (32, 1000, 0, 0, 0),
    (1, 100, 0, 0, 0),
    (0, 0, 1, 0, 256),
    (0, 0, 1, 1024, 256),
    (32, 100, 2, 0, 128),
)
GPU_STEPS = (
    ("llama-3-8b", (256, 1024, 0, 0, 0)),
    ("llama-3-8b", (64, 4096, 0, 0, 0)),
    ("llama-3-8b", (8, 16384, 0, 0, 0)),
    ("llama-3-8b", (32, 1000, 0, 0, 0)),
    ("llama-3-8b", (1, 1000, 0, 0, 0)),
    ("llama-7b", (128, -1024, 0, 0, 0)),
    ("llama-3-8b", (0, 0, 8, 0, 2048)),
    ("llama-3-8b", (0, 0, 1, 4096, 2048)),
)
GPU_LAYERS, GPU_ROUNDS = 4, 8


def best_us(call: Callable[[], Any], repeats: int) -> float:
    """The least time of a call, in µs: the others are our neighbours' noise.

    On a GPU several calls in a row: waiting for a result takes the host near a millisecond.
    """
    calls = 4 if jax.default_backend() == "gpu" else 1
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready([call() for _ in range(calls)])
        times.append(time.perf_counter() - start)
    return min(times) / calls * 1e6


@dataclasses.dataclass(frozen=True)
class Step:
    """A step over shuffled pages."""

    batch: AttentionBatch
    pages: np.ndarray
    """i32[n]: what the step's sequences own."""

    keys: int
    """Keys that the step must read: those of each sequence once."""

    pairs: int
    """(query, key) pairs that see each other."""


def make_step(model: Model, shape: tuple[int, ...], tile: int) -> Step:
    """The step of one of the shapes above."""
    decode, context, prefill, before, count = shape
    rng = np.random.default_rng(0)
    size = model.layout.page_size
    contexts = rng.integers(8, 1 - context, decode) if context < 0 else [context] * decode
    lengths = np.append(contexts, [before + count] * prefill).astype(int)
    pages_of = -(-lengths // size)
    ids = 1 + rng.permutation(sum(pages_of)).astype(np.int32)
    width = max(-(-model.max_tokens // size), *pages_of)
    owned = np.zeros((len(lengths), width), np.int32)
    for row, pages in enumerate(np.split(ids, np.cumsum(pages_of)[:-1])):
        owned[row, : len(pages)] = pages
    tiles = -(-count // tile)
    last = lengths[:decode] - 1
    positions = [last]
    slots = list(owned[np.arange(decode), last // size] * size + last % size)
    for row in range(decode, decode + prefill):
        place = before + np.arange(tiles * tile)
        real = place < before + count
        positions.append(np.where(real, place, -1))
        page = owned[row, np.minimum(place, before + count - 1) // size]
        slots.extend(np.where(real, page * size + place % size, 0))
    table = np.concatenate([owned[:decode], np.repeat(owned[decode:], tiles, axis=0)])
    batch = AttentionBatch(
        slots=np.array(slots, np.int32),
        positions=np.concatenate(positions).astype(np.int32),
        page_table=table,
        num_decode=decode,
        tile=tile,
    )
    pairs = int(sum(np.concatenate(positions) + 1))
    return Step(batch, ids, int(sum(lengths)), pairs)


Pool = tuple[jax.Array, ...]


@functools.partial(jax.jit, static_argnames=("model", "implementation", "rounds"), donate_argnums=1)
def chain(
    q: jax.Array,
    pool: Pool,
    batch: AttentionBatch,
    *,
    model: Model,
    implementation: str,
    rounds: int,
) -> tuple[jax.Array, Pool]:
    """All layers, ``rounds`` times; K and V are made of q."""
    plan = api.prepare(batch, model.layout, num_heads=q.shape[1], implementation=implementation)
    for _ in range(rounds):
        written = []
        for layer in pool:
            k = q[:, : model.layout.num_kv_heads]
            layer = api.kv_write(layer, k, -k, plan, layout=model.layout)
            q = api.paged_attention(q, layer, plan, layout=model.layout, scale=0.1)
            written.append(layer)
        pool = tuple(written)
    return q, pool


@jax.jit
def copy(pool: Pool, pages: list[jax.Array]) -> list[jax.Array]:
    """The pages of every layer, once for each order of ``pages``."""
    return [layer.at[order].get(mode="promise_in_bounds") for order in pages for layer in pool]


@jax.jit
def read(pool: Pool, pages: list[jax.Array]) -> list[jax.Array]:
    """Reads the pages of every layer, once for each order, and keeps next to nothing."""
    return [read_pages(layer, order) for order in pages for layer in pool]


@jax.jit
def read_pages(pool_layer: jax.Array, pages: jax.Array) -> jax.Array:
    """Reads ``pages`` on a GPU, boxes of 64 rows into rings of six, two programs a multiprocessor:
    as fast as the memory gives."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu

    plgpu: Any = mosaic_gpu
    lax = jax.lax
    stages, programs, rows = 6, 264, math.gcd(64, pool_layer.shape[1])
    boxes = pool_layer.shape[1] // rows
    count = len(pages) * boxes

    def body(pages_ref: Any, pool_ref: Any, out_ref: Any, ring: Any, full: Any) -> None:
        program = lax.axis_index("program")
        steps = lax.div(count - program + (programs - 1), programs)

        def load(step: Any) -> None:
            box = program + step * programs
            first = pl.multiple_of(lax.rem(box, boxes) * rows, rows)
            source = pool_ref.at[pages_ref[lax.div(box, boxes)], pl.ds(first, rows)]
            slot = lax.rem(step, stages)
            plgpu.copy_gmem_to_smem(source, ring.at[slot], full.at[slot])

        def take(step: Any, total: Any) -> Any:
            slot = lax.rem(step, stages)
            plgpu.barrier_wait(full.at[slot])
            total = total + ring[slot, 0].astype(jnp.float32)
            plgpu.commit_smem()
            pl.when(step + stages < steps)(lambda: load(step + stages))
            return total

        lax.fori_loop(0, jnp.minimum(steps, stages), lambda step, _: load(step), None)
        layout = plgpu.Layout.WG_STRIDED((LANES,), vec_size=1)
        zeros = plgpu.layout_cast(jnp.zeros((LANES,), jnp.float32), layout)
        out_ref[program] = lax.fori_loop(0, steps, take, zeros)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((programs, LANES), jnp.float32),
        grid=(programs,),
        grid_names=("program",),
        scratch_types=(
            plgpu.SMEM((stages, rows, LANES), pool_layer.dtype),
            plgpu.Barrier(num_barriers=stages),
        ),
    )(pages, pool_layer)


def main() -> None:
    """Every step shape, one line per implementation."""
    on_gpu = jax.default_backend() == "gpu"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, help="with the steps of a CPU's benchmark")
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--step", type=int, help="only this one of the step shapes")
    default = "read,gpu,xla" if on_gpu else "reference,xla,copy"
    parser.add_argument("--implementations", default=default, help="and: copy, read")
    options = parser.parse_args()
    dtype = jnp.dtype(options.dtype)
    name = options.model or "smollm2-135m"
    cases = GPU_STEPS if on_gpu and not options.model else [(name, step) for step in STEPS]
    for number, (name, shape) in enumerate(cases):
        if options.step not in (None, number):
            continue
        model = MODELS[name]
        layers, rounds = (GPU_LAYERS, GPU_ROUNDS) if on_gpu else (model.layers, 1)
        step = make_step(model, shape, tile=128 if on_gpu else 16)
        rows = model.layout.rows_per_page
        head_dim = model.layout.head_dim
        q = jax.random.normal(jax.random.key(0), (len(step.batch.slots), model.heads, head_dim))
        q = q.astype(dtype)
        read_bytes = step.keys * model.layout.rows_per_token * LANES * dtype.itemsize
        flops = 4 * step.pairs * model.heads * head_dim
        line = {
            "model": name,
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "dtype": dtype.name,
            "step": dict(
                zip(("decode", "context", "prefill", "before", "chunk"), shape, strict=True)
            ),
            "mib_a_layer": round(read_bytes / 2**20, 1),
        }
        roof = None
        for name in options.implementations.split(","):
            make = jax.jit(jax.random.normal, static_argnums=(1, 2))
            shape_of_layer = (len(step.pages) + 1, rows, LANES)
            pool = tuple(make(jax.random.key(i), shape_of_layer, dtype) for i in range(layers))
            us, compile_s = run(name, q, pool, step, model, rounds, options.repeats)
            us /= layers * rounds
            rate = read_bytes / us * 1e-6
            if name == "read":
                rate *= len(step.pages) * rows / (step.keys * model.layout.rows_per_token)
                roof = rate
            result = {"us_a_layer": round(us, 1), "tb_s": round(rate, 3)}
            if roof:
                result["share_of_read"] = round(rate / roof, 3)
            if shape[2]:
                result["tflop_s"] = round(flops / us * 1e-6, 1)
            result["compile_s"] = round(compile_s, 1)
            print(json.dumps({**line, "implementation": name, **result}), flush=True)


def run(
    name: str,
    q: jax.Array,
    pool: Pool,
    step: Step,
    model: Model,
    rounds: int,
    repeats: int,
) -> tuple[float, float]:
    """(µs, seconds to compile) of one implementation, or of a lower bound."""
    start = time.perf_counter()
    if name in ("copy", "read"):
        # An order of its own for each round, or XLA would do all rounds at once.
        rng = np.random.default_rng(0)
        pages = [jnp.asarray(rng.permutation(step.pages)) for _ in range(rounds)]
        program = (copy if name == "copy" else read).lower(pool, pages).compile()
        compile_s = time.perf_counter() - start
        return best_us(lambda: program(pool, pages), repeats), compile_s
    batch = jax.device_put(step.batch)
    program = chain.lower(q, pool, batch, model=model, implementation=name, rounds=rounds).compile()
    compile_s = time.perf_counter() - start

    def call() -> jax.Array:
        nonlocal pool
        out, pool = program(q, pool, batch)
        return out

    return best_us(call, 3 if name == "reference" else repeats), compile_s


if __name__ == "__main__":
    main()
