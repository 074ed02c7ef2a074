"""Paged LoRA in the plainest jnp: the specification and the oracle of every other implementation.

Gathers each token's own A and B row by row, masks what lies beyond its rank, and multiplies. Owns
the meaning, refuses to be fast: T × rank_bucket × features values in memory.
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
    """Nothing to prepare: the batch as it came."""

    batch: LoraBatch


def prepare(batch: LoraBatch, layout: AdapterLayout) -> Plan:
    """See ``api.prepare``."""
    return Plan(batch)


def paged_lora(
    y: jax.Array,
    x: jax.Array,
    pool_layer: jax.Array,
    plan: Plan,
    *,
    layer: int | jax.Array,
    group: tuple[str, ...],
    layout: AdapterLayout,
) -> jax.Array:
    """See ``api.paged_lora``."""
    batch = plan.batch
    deltas = []
    for target in map(TARGETS.index, group):
        inputs, outputs = layout.in_features[target], layout.out_features[target]
        a = _matrix(pool_layer, batch, target, batch.a_row, inputs)  # [T, r, in]
        b = _matrix(pool_layer, batch, target, batch.b_row, outputs)  # [T, r, out]
        scaling = batch.scaling[layer, batch.adapter_index, target]  # [T]
        hidden = jnp.einsum("ti,tri->tr", x.astype(jnp.float32), a, precision="highest")
        delta = jnp.einsum("tr,tro->to", hidden, b, precision="highest")
        adapted = batch.rank[batch.adapter_index, target] > 0
        deltas.append(jnp.where(adapted[:, None], scaling[:, None] * delta, 0.0))
    return (y.astype(jnp.float32) + jnp.concatenate(deltas, axis=1)).astype(y.dtype)


def _matrix(
    pool_layer: jax.Array, batch: LoraBatch, target: int, first_row: jax.Array, columns: int
) -> jax.Array:
    """f32[T, rank_bucket, columns]: every token's A (or Bᵀ) of one target, zeros beyond its
    rank."""
    rows_per_page = pool_layer.shape[1]
    index = batch.adapter_index[:, None, None]  # [T, 1, 1]
    rank = batch.rank[index, target]
    k = jnp.arange(batch.rank_bucket)[None, :, None]
    block = jnp.arange(-(-columns // LANES))[None, None, :]
    row = first_row[index, target] + block * rank + k  # [T, rank_bucket, blocks]
    page = batch.pages.at[batch.page_start[index] + row // rows_per_page].get(mode="clip")
    values = pool_layer[page, row % rows_per_page].astype(jnp.float32)
    values = jnp.where((k < rank)[..., None], values, 0.0)
    return values.reshape(*values.shape[:2], -1)[:, :, :columns]
