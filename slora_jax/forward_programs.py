"""How a step's forward pass is compiled: as one program, or as one program per layer kind.

Both run the same model code and give the same values. *Whole* is what Pallas kernels want: one
launch a step, which XLA captures as one CUDA graph. *Layered* is for plain XLA, on a CPU or where
kernels decline: all layers share one compiled program, so that a new bucket of a 30-layer model
compiles in a second or a few instead of half a minute (for CPUs and for GPUs alike, 2 cores), for
30 calls of about 0.1 ms a step. Refuses to know requests.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.dispatch import PLATFORMS
from slora_jax.batch import ForwardBatch
from slora_jax.models.llama import Llama, PoolView, StepContext
from slora_jax.page_pool import Pool
from slora_jax.sharding import on_each_device, partition_spec, replicate, specs_of
from slora_jax.trace_store import TraceStore, exported
from slora_jax.transfer import Packed, Spec, unpack

Weights = tuple[jax.Array, ...]
"""A module's parameters in a fixed order: what a jitted call flattens fastest."""

POOL_SPEC = partition_spec(("pages", "page_rows", "lanes"))
"""Of each layer of the pool."""

SAME = PartitionSpec()
"""What every device has whole."""

M = TypeVar("M", bound=nnx.Module)


class Forward(Protocol):
    """Tokens → hidden states; the pool is donated and comes back."""

    def __call__(self, pool: Pool, sampled: jax.Array, batch: Packed) -> tuple[Hidden, Pool]:
        """``sampled`` i32[any]: the tokens of the step before; ``batch``: a packed ForwardBatch."""
        ...

    def lower(self, pool: Pool, sampled: jax.Array, batch: Packed) -> Callable[[], Any]:
        """A function that makes ready for a call with arguments of these shapes, in any thread."""
        ...

    def num_compiles(self) -> int:
        """Programs compiled so far."""
        ...


class Hidden(NamedTuple):
    """What the last layer says."""

    all: jax.Array
    """[T, hidden]."""
    ending: jax.Array
    """[most requests at once, hidden]: the rows ``ForwardBatch.ending_row`` of ``all``."""


def make_forward(model: Llama, view: PoolView, mesh: Mesh, traces: TraceStore | None) -> Forward:
    """The form that suits the kernels."""
    options = compiler_options(mesh.devices.flat[0].platform)
    if view.kernels in PLATFORMS:
        return WholeForward(model, view, mesh, options, traces)
    return LayeredForward(model, view, mesh, options)


def compiler_options(platform: str) -> dict[str, bool]:
    """XLA's, for the programs of a step.

    On GPUs cuBLAS alone multiplies: what XLA's autotuner picks among Triton's kernels too is slower
    in place (Llama-7B, 128 rows, H100: 9.84 against 9.31 ms a step), and to try them takes most
    of the compilation's time (8 to 10 s against 3).

    No dynamic slice fusions: a kernel that is handed a slice where it lies makes XLA update the
    CUDA graph at each launch. Ours take slices of the step's packed arrays, so that three to five
    kernels a layer would be such; without them each of these arrays is copied out once a step. XLA
    (jax 0.11.2) updates all nodes nonetheless, since its temporaries come at another address each
    time: 2.0 ms of the host's time for the 397 of Llama-7B, hidden behind the step before.
    """
    if platform in PLATFORMS["gpu"]:
        return {
            "xla_gpu_enable_triton_gemm": False,
            "xla_gpu_enable_dynamic_slice_fusion": False,
        }
    return {}


class Programs:
    """A function's compiled programs, one for each packed argument's shape: compiled ahead, or at
    the first call.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        traces: TraceStore | None = None,
        made_from: object = None,
        **options: Any,
    ):
        """``function(…, packed, **static)``; ``options`` are ``jax.jit``'s.

        With ``traces``, what was traced before is not traced again; the other arguments and the
        results must then be plain tuples of arrays, and the ``repr`` of ``made_from``, of the
        shapes and of ``static`` must say all that the function depends on.
        """
        self._function, self._options = function, options
        self._jitted = jax.jit(function, **options)
        self._compiled: dict[Any, Any] = {}
        self._traces, self._made_from = traces, made_from

    def lower(self, *args: Any, **static: Any) -> Callable[[], Any]:
        """A function that compiles for these arguments, which may be called in any thread.

        It returns the program (``jax.stages.Compiled``).
        """
        key = _key(args, static)
        if key in self._compiled:
            return lambda: self._compiled[key]
        jitted = self._jitted
        if self._traces is not None:
            jitted, static = self._traced(self._traces, args, static), {}
        lowered = jitted.lower(*args, **static)

        def compile_() -> Any:
            self._compiled[key] = lowered.compile()
            return self._compiled[key]

        return compile_

    def _traced(self, traces: TraceStore, args: tuple[Any, ...], static: dict[str, Any]) -> Any:
        """The jitted function for ``args`` alone, read from disk or kept there."""
        *arrays, packed = args

        def function(*flat: Any) -> Any:
            return self._function(*flat[:-1], Packed(flat[-1], packed.spec), **static)

        plain = (*arrays, packed.words)
        shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), plain)
        program = traces.load_or_make(
            (self._made_from, _key(args, static), shapes),
            lambda: exported(function, plain, self._options["donate_argnums"]),
        )

        def call(*args: Any) -> Any:
            return program.call(*args[:-1], args[-1].words)

        return jax.jit(call, **self._options)

    def __call__(self, *args: Any, **static: Any) -> Any:
        """What the function returns."""
        program = self._compiled.get(_key(args, static))
        return (program or self.lower(*args, **static)())(*args)

    def __len__(self) -> int:
        """Programs compiled so far."""
        return len(self._compiled)


def _key(args: tuple[Any, ...], static: Mapping[str, Any]) -> Any:
    packed: Packed = args[-1]
    return packed.spec, tuple(static.values())


class WholeForward:
    """The step as one program a size."""

    def __init__(
        self,
        model: Llama,
        view: PoolView,
        mesh: Mesh,
        options: Mapping[str, bool],
        traces: TraceStore | None = None,
    ):
        """``options``: the compiler's; ``traces`` keeps what was traced for a later start, of
        programs for one device."""
        call, self._weights = over_leaves(model)

        def forward(
            weights: Weights, pool: Pool, sampled: jax.Array, packed: Packed
        ) -> tuple[jax.Array, jax.Array, Pool]:
            batch = _receive(packed, sampled)
            hidden, pool = call(weights)(batch, pool, view)
            return hidden, hidden[batch.ending_row], pool

        specs = (specs_of(self._weights, mesh), POOL_SPEC, SAME, SAME)
        self._programs = Programs(
            on_each_device(forward, mesh, specs, (SAME, SAME, POOL_SPEC)),
            donate_argnums=1,
            compiler_options=dict(options),
            traces=traces if mesh.size == 1 else None,
            made_from=(model.config, view),
        )

    def __call__(self, pool: Pool, sampled: jax.Array, batch: Packed) -> tuple[Hidden, Pool]:
        """See ``Forward``."""
        hidden, ending, pool = self._programs(self._weights, pool, sampled, batch)
        return Hidden(hidden, ending), pool

    def lower(self, pool: Pool, sampled: jax.Array, batch: Packed) -> Callable[[], Any]:
        """See ``Forward``."""
        return self._programs.lower(self._weights, pool, sampled, batch)

    def num_compiles(self) -> int:
        """See ``Forward``."""
        return len(self._programs)


class LayeredForward:
    """The step as a program for what comes before the layers, one for any layer, one for the
    end."""

    def __init__(self, model: Llama, view: PoolView, mesh: Mesh, options: Mapping[str, bool]):
        """``options``: the compiler's."""
        call, self._outer_weights = over_leaves(without_layers(model))
        layers = [over_leaves(block) for block in model.layers]
        call_block = layers[0][0]  # all layers have one structure
        self._layer_weights = [weights for _, weights in layers]
        self._layer_indices = [
            replicate(mesh, np.asarray(index, np.int32)) for index in range(len(layers))
        ]

        def begin(
            weights: Weights, sampled: jax.Array, batch: Packed
        ) -> tuple[jax.Array, StepContext, jax.Array]:
            received = _receive(batch, sampled)
            return *call(weights).begin(received, view), received.ending_row

        def block(
            weights: Weights,
            pool: jax.Array,
            x: jax.Array,
            context: StepContext,
            layer: jax.Array,
        ) -> tuple[jax.Array, jax.Array]:
            return call_block(weights)(x, pool, context, layer)

        def end(weights: Weights, x: jax.Array, ending_row: jax.Array) -> Hidden:
            hidden = call(weights).final_norm(x)
            return Hidden(hidden, hidden[ending_row])

        outer_specs = specs_of(self._outer_weights, mesh)
        block_specs = specs_of(self._layer_weights[0], mesh)
        jit = functools.partial(jax.jit, compiler_options=dict(options))
        self._begin = jit(on_each_device(begin, mesh, (outer_specs, SAME, SAME), SAME))
        self._end = jit(on_each_device(end, mesh, (outer_specs, SAME, SAME), SAME))
        self._block = jit(
            on_each_device(
                block, mesh, (block_specs, POOL_SPEC, SAME, SAME, SAME), (SAME, POOL_SPEC)
            ),
            donate_argnums=(1, 2),
        )
        self._same = NamedSharding(mesh, SAME)
        self._compiled: dict[Spec, tuple[Any, Any, Any]] = {}

    def __call__(self, pool: Pool, sampled: jax.Array, batch: Packed) -> tuple[Hidden, Pool]:
        """See ``Forward``."""
        programs = self._compiled.get(batch.spec) or self.lower(pool, sampled, batch)()
        begin, block, end = programs
        x, context, ending_row = begin(self._outer_weights, sampled, batch)
        new_pool = []
        for weights, layer_pool, layer in zip(
            self._layer_weights, pool, self._layer_indices, strict=True
        ):
            x, layer_pool = block(weights, layer_pool, x, context, layer)
            new_pool.append(layer_pool)
        return end(self._outer_weights, x, ending_row), tuple(new_pool)

    def lower(self, pool: Pool, sampled: jax.Array, batch: Packed) -> Callable[[], Any]:
        """See ``Forward``."""
        if batch.spec in self._compiled:
            return lambda: self._compiled[batch.spec]
        begin = self._begin.lower(self._outer_weights, sampled, batch)
        x, context, ending_row = jax.tree.map(
            lambda out: jax.ShapeDtypeStruct(out.shape, out.dtype, sharding=self._same),
            begin.out_info,
        )
        weights, index = self._layer_weights[0], self._layer_indices[0]
        block = self._block.lower(weights, pool[0], x, context, index)
        end = self._end.lower(self._outer_weights, x, ending_row)

        def compile_() -> tuple[Any, Any, Any]:
            self._compiled[batch.spec] = begin.compile(), block.compile(), end.compile()
            return self._compiled[batch.spec]

        return compile_

    def num_compiles(self) -> int:
        """See ``Forward``."""
        return sum(map(len, self._compiled.values()))


def _receive(packed: Packed, sampled: jax.Array) -> ForwardBatch:
    """The batch, with the tokens that never left the device in their places."""
    # A copy, so that one kernel alone reads what comes at another address in each step: the host
    # must update a CUDA graph for each kernel whose addresses change (`compiler_options`).
    words = jax.lax.optimization_barrier(jnp.concatenate([packed.words, sampled]))
    batch: ForwardBatch = unpack(dataclasses.replace(packed, words=words))
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
