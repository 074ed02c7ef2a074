"""The LoRA term as the linears call it, on one device or cut over several.

Owns what is computed and communicated in each scheme of ``adapter_partition``; refuses to know
where adapters come from and how the ops work.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Plan
from pallas_kernels.layout import TARGETS
from pallas_kernels.paged_lora import api as lora_op
from pallas_kernels.paged_lora.api import paged_lora
from slora_jax.adapter_partition import CUT_BY_INPUTS, WIDTH, AdapterPartition
from slora_jax.batch import StepLora
from slora_jax.layers.linear import AddLora
from slora_jax.sharding import Shards


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraContext:
    """The step's adapters, computed once for all layers."""

    plans: tuple[Plan, ...]
    """One a stage."""

    cut_rank: jax.Array | None
    """i32[T, 7], ``s_lora`` alone: of the rank of each token's adapter, one device's share."""

    widths: tuple[int, int] = dataclasses.field(metadata={"static": True})
    """``s_lora`` alone: columns of the intermediate that devices gather, and that they add up."""

    groups: tuple[tuple[str, ...], ...] = dataclasses.field(metadata={"static": True})
    """Those that an adapter of the step may have; the others cost nothing."""

    partition: AdapterPartition = dataclasses.field(metadata={"static": True})

    shards: Shards = dataclasses.field(metadata={"static": True})

    @classmethod
    def prepare(
        cls, lora: StepLora, partition: AdapterPartition, shards: Shards, kernels: str
    ) -> LoraContext:
        """What the layers share; called inside the compiled step."""
        plans = tuple(
            lora_op.prepare(batch, layout, implementation=kernels)
            for batch, layout in zip(lora.stages, partition.stages, strict=True)
        )
        cut_rank, widths = None, (0, 0)
        if len(partition.stages) > 1:
            shrink = lora.stages[0]
            cut_rank = shrink.rank[shrink.adapter_index]
            most = min(lora.stages[1].rank_bucket, WIDTH)
            widths = partition.rank_share(most), most
        return cls(plans, cut_rank, widths, lora.groups, partition, shards)

    def of_layer(self, layer: int | jax.Array) -> AddLora:
        """The term of one layer."""
        add = self._add if len(self.plans) == 1 else self._add_in_two
        return lambda y, x, pool, group: (
            add(y, x, pool, layer, group) if group in self.groups else y
        )

    def _add(
        self,
        y: jax.Array,
        x: jax.Array,
        pool: jax.Array,
        layer: int | jax.Array,
        group: tuple[str, ...],
        stage: int = 0,
    ) -> jax.Array:
        return paged_lora(
            y,
            x,
            pool,
            self.plans[stage],
            layer=layer,
            group=group,
            layout=self.partition.stages[stage],
        )

    def _add_in_two(
        self,
        y: jax.Array,
        x: jax.Array,
        pool: jax.Array,
        layer: int | jax.Array,
        group: tuple[str, ...],
    ) -> jax.Array:
        """S-LoRA's: shrink, communicate, expand. ``y`` is the device's own part."""
        tokens, targets = len(x), len(group)
        hidden = jnp.zeros((tokens, WIDTH * targets), y.dtype)
        hidden = self._add(hidden, x, pool, layer, group, 0).reshape(tokens, targets, WIDTH)
        gathered, summed = self.widths
        if group[0] not in CUT_BY_INPUTS:
            assert self.cut_rank is not None
            hidden = self.shards.gather(hidden[:, :, :gathered])
            # Each device has sent as many columns as the largest rank's share: where an adapter's
            # is smaller, its ranks are not side by side yet.
            first = TARGETS.index(group[0])
            share = jnp.maximum(self.cut_rank[:, first : first + targets], 1)[:, :, None]
            rank = jnp.arange(WIDTH, dtype=jnp.int32)[None, None, :]
            column = rank // share * gathered + rank % share
            hidden = jnp.take_along_axis(hidden, column, axis=2, mode="clip")
            return self._add(y, hidden.reshape(tokens, -1), pool, layer, group, 1)
        hidden = self.shards.sum(hidden[:, :, :summed])
        hidden = jnp.pad(hidden, ((0, 0), (0, 0), (0, WIDTH - summed))).reshape(tokens, -1)
        # Only the device's own outputs: the base's all-reduce brings them to the others.
        width = y.shape[1] // self.shards.count
        start = self.shards.index() * width
        own = jax.lax.dynamic_slice_in_dim(y, start, width, axis=1)
        own = self._add(own, hidden, pool, layer, group, 1)
        return jax.lax.dynamic_update_slice_in_dim(y, own, start, axis=1)
