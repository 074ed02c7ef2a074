"""Benchmark of paged LoRA: ``python -m pallas_kernels.paged_lora.bench``, JSON lines out.

One line per step shape and implementation: the time of the LoRA terms of every layer and target of
a model, chained as its layers chain them, without base matmuls or attention. ``copy`` is the
cheating lower bound: the same bytes of the pool, copied and not used.
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
    layout: AdapterLayout, num_layers: int, index: np.ndarray, ranks: tuple[int, ...]
) -> tuple[LoraBatch, int]:
    """A step of adapters of these ranks over shuffled pages; also the number of pages it owns."""
    bucket = sum(map(stored_rank, ranks))
    rows, page_ids = lora_bucket_sizes(bucket, layout)
    counts = [layout.num_pages([r] * len(TARGETS)) for r in ranks]
    pages = np.zeros(page_ids, np.int32)
    pages[: sum(counts)] = 1 + np.random.default_rng(0).permutation(sum(counts))
    page_start = np.zeros(rows, np.int32)
    table = {name: np.zeros((rows, len(TARGETS)), np.int32) for name in ("rank", "a_row", "b_row")}
    for row, rank in enumerate(ranks, start=1):
        page_start[row] = sum(counts[: row - 1])
        table["rank"][row] = stored_rank(rank)
        table["a_row"][row], table["b_row"][row], _ = layout.segments([rank] * len(TARGETS))
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
