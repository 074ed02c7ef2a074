"""Random steps of paged LoRA: a pool with NaN wherever nobody owns a row, and the dense answer."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from pallas_kernels.layout import LANES, TARGETS, AdapterLayout, stored_rank
from pallas_kernels.paged_lora.batch import LoraBatch, lora_bucket_sizes

LAYERS = 2
# q, k, v, o, gate, up, down of a model whose features are no multiples of 128.
SMALL = {"in_features": (96,) * 6 + (200,), "out_features": (128, 40, 40, 96, 200, 200, 96)}
# Blocks enough that segments of large rank cross pages.
WIDE = {"in_features": (384,) * 6 + (640,), "out_features": (384, 128, 128, 384, 640, 640, 384)}


@dataclasses.dataclass
class Case:
    """One step: arrays for the api, and what it takes to compute the answer densely."""

    layout: AdapterLayout
    pool: np.ndarray  # [L, P, R, 128]
    batch: LoraBatch
    adapters: list  # per adapter, per layer: target → (a, b) as stored, in float64
    index: np.ndarray  # [T]
    scaling: np.ndarray  # [L, N, 7]

    def inputs(self, rng, group, dtype):
        """Fresh (y, x) of this step for one group."""
        targets = [TARGETS.index(name) for name in group]
        tokens = len(self.index)
        x = rng.standard_normal((tokens, self.layout.in_features[targets[0]]))
        y = rng.standard_normal((tokens, sum(self.layout.out_features[t] for t in targets)))
        return y.astype(dtype), x.astype(dtype)

    def expected(self, y, x, layer, group):
        """The definition, dense, in float64."""
        deltas = []
        x = x.astype(np.float64)
        for name in group:
            target = TARGETS.index(name)
            delta = np.zeros((len(x), self.layout.out_features[target]))
            for token, row in enumerate(self.index):
                if row and name in self.adapters[row - 1][layer]:
                    a, b = self.adapters[row - 1][layer][name]
                    delta[token] = self.scaling[layer, row, target] * (b @ (a @ x[token]))
            deltas.append(delta)
        return y.astype(np.float64) + np.concatenate(deltas, axis=1)


def make_case(rng, ranks, index, *, features, rows_per_page, dtype, rank_bucket=None, fixed=None):
    """``ranks``: one 7-tuple of true ranks per adapter; ``index``: table row of each token;
    ``fixed``: number of an adapter → generator of its values."""
    layout = AdapterLayout(**features, rows_per_page=rows_per_page)
    ranks = [tuple(r) for r in ranks]
    largest = sum(stored_rank(max(r)) for r in ranks)
    rank_bucket = rank_bucket or max(8, largest)
    rows, page_ids = lora_bucket_sizes(rank_bucket, layout)
    counts = [layout.num_pages(r) for r in ranks]
    num_pages = page_ids + 4  # of the bucket, not of the step: steps share compiled programs
    pool = np.full((LAYERS, num_pages, rows_per_page, LANES), np.nan).astype(dtype)
    free = rng.permutation(np.arange(1, num_pages)).astype(np.int32)

    pages = np.zeros(page_ids, np.int32)
    page_start = np.full(rows, page_ids - 1, np.int32)  # the null page, where nothing is owned
    table = {name: np.zeros((rows, 7), np.int32) for name in ("rank", "a_row", "b_row")}
    scaling = np.full((LAYERS, rows, 7), np.nan, np.float32)
    scaling[:, : len(ranks) + 1] = np.linspace(0.5, 2.0, LAYERS * 7).reshape(LAYERS, 1, 7)
    scaling[:, : len(ranks) + 1] += rng.uniform(0, 1, (len(ranks) + 1, 1)) * (fixed is None)
    adapters, used = [], 0
    for row, adapter_ranks in enumerate(ranks, start=1):
        values = (fixed or {}).get(row - 1, rng)
        layers = [_random_layer(values, layout, adapter_ranks, dtype) for _ in range(LAYERS)]
        own = free[used : used + counts[row - 1]]
        pool[:, own] = layout.pack(layers, LAYERS, adapter_ranks, dtype)
        pages[used : used + len(own)] = own
        page_start[row] = used
        used += len(own)
        table["rank"][row] = [stored_rank(r) for r in adapter_ranks]
        table["a_row"][row], table["b_row"][row], _ = layout.segments(adapter_ranks)
        adapters.append(
            [
                {t: tuple(m.astype(np.float64) for m in ab) for t, ab in layer.items()}
                for layer in layers
            ]
        )
    index = np.asarray(index, np.int32)
    batch = LoraBatch(
        adapter_index=index,
        pages=pages,
        page_start=page_start,
        scaling=scaling,
        rank_bucket=rank_bucket,
        **table,
    )
    return Case(layout, pool, batch, adapters, index, scaling)


def _random_layer(rng, layout, ranks, dtype):
    layer = {}
    for target, (name, rank) in enumerate(zip(TARGETS, ranks, strict=True)):
        if rank:
            inputs, outputs = layout.in_features[target], layout.out_features[target]
            a = rng.standard_normal((rank, inputs)) / np.sqrt(inputs)
            b = rng.standard_normal((outputs, rank)) / np.sqrt(rank)
            layer[name] = (a.astype(dtype), b.astype(dtype))
    return layer


def dtype_of(name):
    """A NumPy dtype, bfloat16 included."""
    return np.dtype(jnp.dtype(name))
