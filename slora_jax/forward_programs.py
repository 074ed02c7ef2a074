"""How a step's forward pass is compiled: as one program, or as one program per layer kind.

Both run the same model code and give the same values. *Whole* is what a GPU or TPU wants: one
launch a step, which XLA captures as one CUDA graph. *Layered* is what a CPU wants: all layers share
one compiled program, so that a new bucket of a 30-layer model compiles in about a second instead of
half a minute, for 30 calls of about 0.1 ms in a step of 50 ms and more. Refuses to know requests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from slora_jax.batch import ForwardBatch
from slora_jax.models.llama import Llama, PoolView, StepContext
from slora_jax.page_pool import Pool
from slora_jax.sharding import on_each_device, partition_spec, replicate, specs_of
from slora_jax.transfer import Packed, unpack

Weights = tuple[jax.Array, ...]
"""A module's parameters in a fixed order: what a jitted call flattens fastest."""

POOL_SPEC = partition_spec(("pages", "page_rows", "lanes"))
"""Of each layer of the pool."""

SAME = PartitionSpec()
"""What every device has whole."""

M = TypeVar("M", bound=nnx.Module)


class Forward(Protocol):
    """Tokens → hidden states; the pool is donated and comes back."""

    def __call__(self, pool: Pool, sampled: jax.Array, batch: Packed) -> tuple[jax.Array, Pool]:
        """(hidden [T, hidden], pool). ``sampled`` i32[any]: the tokens of the step before;
        ``batch`` is a packed ForwardBatch.
        """
        ...

    def num_compiles(self) -> int:
        """Programs compiled so far."""
        ...


def make_forward(model: Llama, view: PoolView, mesh: Mesh) -> Forward:
    """The form that suits the platform of the devices."""
    platform = mesh.devices.flat[0].platform
    return (LayeredForward if platform == "cpu" else WholeForward)(model, view, mesh)


class WholeForward:
    """The step as one program."""

    def __init__(self, model: Llama, view: PoolView, mesh: Mesh):
        call, self._weights = over_leaves(model)

        def forward(
            weights: Weights, pool: Pool, sampled: jax.Array, batch: Packed
        ) -> tuple[jax.Array, Pool]:
            return call(weights)(_receive(batch, sampled), pool, view)

        self._program = jax.jit(
            on_each_device(
                forward,
                mesh,
                (specs_of(self._weights, mesh), POOL_SPEC, SAME, SAME),
                (SAME, POOL_SPEC),
            ),
            donate_argnums=1,
        )

    def lower(self, pool: Any, sampled: Any, batch: Packed) -> jax.stages.Lowered:
        """The program of these shapes, for a compiler: arguments may be abstract."""
        return self._program.lower(self._weights, pool, sampled, batch)

    def __call__(self, pool: Pool, sampled: jax.Array, batch: Packed) -> tuple[jax.Array, Pool]:
        """See ``Forward``."""
        return self._program(self._weights, pool, sampled, batch)

    def num_compiles(self) -> int:
        """See ``Forward``."""
        return count_compiles(self._program)


class LayeredForward:
    """The step as a program for what comes before the layers, one for any layer, one for the
    end."""

    def __init__(self, model: Llama, view: PoolView, mesh: Mesh):
        call, self._outer_weights = over_leaves(without_layers(model))
        layers = [over_leaves(block) for block in model.layers]
        call_block = layers[0][0]  # all layers have one structure
        self._layer_weights = [weights for _, weights in layers]
        self._layer_indices = [
            replicate(mesh, np.asarray(index, np.int32)) for index in range(len(layers))
        ]

        def begin(
            weights: Weights, sampled: jax.Array, batch: Packed
        ) -> tuple[jax.Array, StepContext]:
            return call(weights).begin(_receive(batch, sampled), view)

        def block(
            weights: Weights,
            pool: jax.Array,
            x: jax.Array,
            context: StepContext,
            layer: jax.Array,
        ) -> tuple[jax.Array, jax.Array]:
            return call_block(weights)(x, pool, context, layer)

        def end(weights: Weights, x: jax.Array) -> jax.Array:
            return call(weights).final_norm(x)

        outer_specs = specs_of(self._outer_weights, mesh)
        block_specs = specs_of(self._layer_weights[0], mesh)
        self._begin = jax.jit(on_each_device(begin, mesh, (outer_specs, SAME, SAME), SAME))
        self._end = jax.jit(on_each_device(end, mesh, (outer_specs, SAME), SAME))
        self._block = jax.jit(
            on_each_device(
                block, mesh, (block_specs, POOL_SPEC, SAME, SAME, SAME), (SAME, POOL_SPEC)
            ),
            donate_argnums=(1, 2),
        )

    def __call__(self, pool: Pool, sampled: jax.Array, batch: Packed) -> tuple[jax.Array, Pool]:
        """See ``Forward``."""
        x, context = self._begin(self._outer_weights, sampled, batch)
        new_pool = []
        for weights, layer_pool, layer in zip(
            self._layer_weights, pool, self._layer_indices, strict=True
        ):
            x, layer_pool = self._block(weights, layer_pool, x, context, layer)
            new_pool.append(layer_pool)
        return self._end(self._outer_weights, x), tuple(new_pool)

    def num_compiles(self) -> int:
        """See ``Forward``."""
        return count_compiles(self._begin, self._block, self._end)


def _receive(packed: Packed, sampled: jax.Array) -> ForwardBatch:
    """The batch, with the tokens that never left the device in their places."""
    batch: ForwardBatch = unpack(packed)
    row, num_decode = batch.sampled_row, batch.attention.num_decode
    fed = jnp.where(row >= 0, sampled[jnp.maximum(row, 0)], batch.token_ids[:num_decode])
    return dataclasses.replace(
        batch, token_ids=jnp.concatenate([fed, batch.token_ids[num_decode:]])
    )


def over_leaves(module: M) -> tuple[Callable[[Weights], M], Weights]:
    """(weights → module, the module's own weights)."""
    graph, state = nnx.split(module)
    leaves, structure = jax.tree.flatten(state)
    return lambda weights: nnx.merge(graph, structure.unflatten(weights)), tuple(leaves)


def count_compiles(*programs: Any) -> int:
    """How many shapes jitted functions have been compiled for."""
    return sum(program._cache_size() for program in programs)


def without_layers(model: Llama) -> Llama:
    """The same arrays, less the layers."""
    outer = nnx.merge(*nnx.split(model))
    outer.layers = nnx.List([])
    return outer
