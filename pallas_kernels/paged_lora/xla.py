"""Paged LoRA in plain XLA: gather the step's adapters rank by rank, then two masked dense matmuls.

Serves CPU, T4 and whatever has no kernel of its own. Every adapter of the step is read once, however
many tokens it has.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.layout import LANES, TARGETS, AdapterLayout
from pallas_kernels.paged_lora.batch import LoraBatch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """Rank slots: adapter after adapter, each with as many as its largest target rank; S in all."""

    a_rows: tuple[jax.Array, ...]
    """Per target i32[S * in_blocks]: rows of the flat pool that hold A, rank slot by rank slot."""

    b_rows: tuple[jax.Array, ...]
    """Per target i32[S * out_blocks]: likewise of Bᵀ."""

    mask: jax.Array
    """bool[7, T, S]: slot s is a rank of token t's adapter, within the target's rank."""

    scaling: jax.Array
    """f32[L, 7, S]: of the adapter that owns the slot."""

    adapted: jax.Array
    """bool[T]: the token has an adapter at all."""


def prepare(batch: LoraBatch, layout: AdapterLayout) -> Plan:
    """See ``api.prepare``."""
    slots = jnp.arange(batch.rank_bucket, dtype=jnp.int32)
    largest = jnp.max(batch.rank, axis=1)  # [N]
    end = jnp.cumsum(largest)
    owner = jnp.sum(slots[:, None] >= end[None, :], axis=1, dtype=jnp.int32)  # N past the last
    owner = jnp.minimum(owner, largest.shape[0] - 1)
    k = slots - (end - largest)[owner]
    rank = jnp.where((k < largest[owner])[:, None], batch.rank[owner], 0)  # [S, 7]
    used = k[:, None] < rank

    def rows(first_row: jax.Array, target: int, num_blocks: int) -> jax.Array:
        block = jnp.arange(num_blocks, dtype=jnp.int32)[None, :]
        row = first_row[owner, target][:, None] + block * rank[:, target, None] + k[:, None]
        # Slots without a rank read row 0 of the step's first adapter: finite, and masked by h = 0.
        row = jnp.where(used[:, target, None], row, 0)
        start = jnp.where(used[:, target], batch.page_start[owner], 0)[:, None]
        page = batch.pages.at[start + row // layout.rows_per_page].get(mode="promise_in_bounds")
        return (page * layout.rows_per_page + row % layout.rows_per_page).reshape(-1)

    mine = batch.adapter_index[:, None] == owner[None, :]  # [T, S]
    return Plan(
        a_rows=tuple(rows(batch.a_row, t, n) for t, n in enumerate(layout.in_blocks)),
        b_rows=tuple(rows(batch.b_row, t, n) for t, n in enumerate(layout.out_blocks)),
        mask=mine[None, :, :] & used.T[:, None, :],
        scaling=jnp.transpose(batch.scaling[:, owner, :], (0, 2, 1)),
        adapted=(jnp.max(batch.rank, axis=1) > 0)[batch.adapter_index],
    )


def paged_lora(
    y: jax.Array,
    x: jax.Array,
    pool_layer: jax.Array,
    plan: Plan,
    *,
    layer: int,
    group: tuple[str, ...],
    layout: AdapterLayout,
) -> jax.Array:
    """See ``api.paged_lora``."""
    targets = [TARGETS.index(name) for name in group]
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    flat = pool_layer.reshape(-1, LANES)

    def gather(rows: jax.Array) -> jax.Array:
        values = flat.at[rows].get(mode="promise_in_bounds")
        return values.reshape(plan.mask.shape[2], -1)

    x = jnp.pad(x, ((0, 0), (0, layout.in_blocks[targets[0]] * LANES - x.shape[1])))
    deltas = []
    for target in targets:
        hidden = jax.lax.dot_general(
            x,
            gather(plan.a_rows[target]),
            (((1,), (1,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        hidden = jnp.where(plan.mask[target], hidden * plan.scaling[layer, target][None, :], 0.0)
        delta = jax.lax.dot_general(
            hidden.astype(x.dtype),
            gather(plan.b_rows[target]),
            (((1,), (0,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        deltas.append(delta[:, : layout.out_features[target]])
    delta = jnp.concatenate(deltas, axis=1)
    delta = jnp.where(plan.adapted[:, None], delta, 0.0)
    return (y.astype(jnp.float32) + delta).astype(y.dtype)
