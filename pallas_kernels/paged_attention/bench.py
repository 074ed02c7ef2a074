"""Benchmark of paged attention: ``python -m pallas_kernels.paged_attention.bench``, JSON lines out.

One line per step shape and implementation: the time of all layers of a model, each writing the
step's K and V and attending, the output of one being the queries of the next. ``copy`` is the
cheating lower bound: the pages that the step reads, copied and not used.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
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
    """What of a Llama decides the shapes."""

    layers: int
    heads: int
    layout: KVLayout
    max_tokens: int


MODELS = {
    "smollm2-135m": Model(30, 9, KVLayout(3, 64, 64), 2048),
    "llama-3-8b": Model(32, 32, KVLayout(8, 128, 32), 8192),
}
# (decode rows, their context; prefill sequences, tokens before the chunk, tokens of the chunk)
STEPS = (
    (32, 100, 0, 0, 0),
    (32, 1000, 0, 0, 0),
    (1, 100, 0, 0, 0),
    (0, 0, 1, 0, 256),
    (0, 0, 1, 1024, 256),
    (32, 100, 2, 0, 128),
)
TILE = 16


def best_ms(call: Callable[[], Any], repeats: int) -> float:
    """The least time of a call, in ms: the others are our neighbours' noise."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def make_batch(model: Model, step: tuple[int, ...]) -> tuple[AttentionBatch, int]:
    """The step over shuffled pages; also how many pages its sequences own."""
    decode, context, prefill, before, count = step
    size = model.layout.page_size
    lengths = [context] * decode + [before + count] * prefill
    pages_of = [-(-length // size) for length in lengths]
    ids = 1 + np.random.default_rng(0).permutation(sum(pages_of)).astype(np.int32)
    width = -(-model.max_tokens // size)
    owned = np.zeros((len(lengths), width), np.int32)
    for row, pages in enumerate(np.split(ids, np.cumsum(pages_of)[:-1])):
        owned[row, : len(pages)] = pages
    tiles = -(-count // TILE)
    positions, slots = [np.full(decode, context - 1)], []
    for row in range(decode):
        slots.append(owned[row, (context - 1) // size] * size + (context - 1) % size)
    for row in range(decode, decode + prefill):
        place = before + np.arange(tiles * TILE)
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
        tile=TILE,
    )
    return batch, sum(pages_of)


@functools.partial(jax.jit, static_argnames=("model", "implementation"), donate_argnums=1)
def chain(
    q: jax.Array,
    pool: tuple[jax.Array, ...],
    batch: AttentionBatch,
    *,
    model: Model,
    implementation: str,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """All layers; K and V are made of q."""
    plan = api.prepare(batch, model.layout, num_heads=q.shape[1], implementation=implementation)
    written = []
    for layer in pool:
        k = q[:, : model.layout.num_kv_heads]
        layer = api.kv_write(layer, k, -k, plan, layout=model.layout)
        q = api.paged_attention(q, layer, plan, layout=model.layout, scale=0.1)
        written.append(layer)
    return q, tuple(written)


@jax.jit
def copy(pool: tuple[jax.Array, ...], pages: jax.Array) -> list[jax.Array]:
    """The pages of every layer."""
    return [layer.at[pages].get(mode="promise_in_bounds") for layer in pool]


def main() -> None:
    """Every step shape, one line per implementation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--step", type=int, help="only this one of the step shapes")
    parser.add_argument("--implementations", default="reference,xla,copy")
    options = parser.parse_args()
    model, dtype = MODELS[options.model], jnp.dtype(options.dtype)
    for number, step in enumerate(STEPS):
        if options.step not in (None, number):
            continue
        batch, num_pages = make_batch(model, step)
        rows = model.layout.rows_per_page
        page_bytes = rows * LANES * dtype.itemsize
        head_dim = model.layout.head_dim
        q = jax.random.normal(jax.random.key(0), (len(batch.slots), model.heads, head_dim), dtype)
        line = {
            "model": options.model,
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "dtype": dtype.name,
            "step": dict(
                zip(("decode", "context", "prefill", "before", "chunk"), step, strict=True)
            ),
            "mib": round(num_pages * page_bytes * model.layers / 2**20, 1),
        }
        for name in options.implementations.split(","):
            pool = tuple(
                jnp.zeros((num_pages + 1, rows, LANES), dtype) for _ in range(model.layers)
            )
            ms, compile_s = run(
                name, q, pool, jax.device_put(batch), num_pages, model, options.repeats
            )
            result = {"ms": round(ms, 2), "compile_s": round(compile_s, 1)}
            print(json.dumps({**line, "implementation": name, **result}), flush=True)


def run(
    name: str,
    q: jax.Array,
    pool: tuple[jax.Array, ...],
    batch: AttentionBatch,
    num_pages: int,
    model: Model,
    repeats: int,
) -> tuple[float, float]:
    """(ms, seconds to compile) of one implementation, or of the copy."""
    start = time.perf_counter()
    if name == "copy":
        pages = 1 + jnp.arange(num_pages, dtype=jnp.int32)
        program = copy.lower(pool, pages).compile()
        compile_s = time.perf_counter() - start
        return best_ms(lambda: program(pool, pages), repeats), compile_s
    program = chain.lower(q, pool, batch, model=model, implementation=name).compile()
    compile_s = time.perf_counter() - start

    def step() -> jax.Array:
        nonlocal pool
        out, pool = program(q, pool, batch)
        return out

    return best_ms(step, 3 if name == "reference" else repeats), compile_s


if __name__ == "__main__":
    main()
