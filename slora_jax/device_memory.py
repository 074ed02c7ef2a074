"""What a step needs of the device's memory beside the weights and the pool: measured, not guessed.

Owns the measurement: the largest step that a configuration allows is compiled, and the compiler's
own account is read. Two layers stand for all of them, because a layer's temporaries are gone before
the next one's. Refuses to know how the rest is shared out.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels.layout import TARGETS
from slora_jax.adapter_store import BASE_VERSION
from slora_jax.adapter_tables import AdapterTables
from slora_jax.forward_programs import WholeForward, compiler_options, over_leaves
from slora_jax.input_packing import StepShape, pack_step
from slora_jax.model_runner import make_sample_program, step_buckets
from slora_jax.models.llama import Llama, PoolView
from slora_jax.sampling import Penalties, Randomness, SamplingBatch, Truncation
from slora_jax.scheduler import SchedulerOutput
from slora_jax.sharding import named_sharding
from slora_jax.trace_store import TraceStore
from slora_jax.transfer import pack

LAYERS = 2
"""Of the model that is compiled."""

PAGES = 8
"""Of its pool."""

HISTORY = 2048
"""Tokens that a request with penalties has behind it."""


def measure_step_bytes(
    model: Llama,
    view: PoolView,
    *,
    dtype: jnp.dtype,
    mesh: jax.sharding.Mesh,
    max_num_seqs: int,
    prefill_tile: int,
    max_prefill_tokens: int,
    max_model_len: int,
    traces: TraceStore | None = None,
) -> int:
    """Bytes of temporaries and results of the largest step on one device; two may be under way.

    Compiles two small programs; nothing runs.
    """
    short = nnx.merge(*nnx.split(model))
    short.layers = nnx.List(list(model.layers)[:LAYERS])
    max_tiles = max_prefill_tokens // prefill_tile
    buckets = step_buckets(view.kernels, max_num_seqs, max_tiles, prefill_tile)
    adapters = AdapterTables(view.adapters, num_layers=LAYERS, max_adapters=0)
    adapters.expect([1] * len(TARGETS))
    batch = pack_step(
        SchedulerOutput(),
        adapters,
        [BASE_VERSION],
        StepShape(*buckets.choose((max_num_seqs, max_tiles, 8))),
        {},
        tile=prefill_tile,
        page_size=view.kv.page_size,
        table_width=-(-max_model_len // view.kv.page_size),
        max_num_seqs=max_num_seqs,
    )

    # Shapes stand for arrays, which the types do not know.
    def abstract(shape: tuple[int, ...], dtype: Any, *axes: str) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=named_sharding(mesh, axes))

    pool_shape = (PAGES, mesh.size * view.kv.rows_per_page, 128)
    pool = (abstract(pool_shape, dtype, "pages", "page_rows", "lanes"),) * LAYERS
    sampled = abstract((max_num_seqs,), jnp.int32)
    options = compiler_options(mesh.devices.flat[0].platform)
    forward = WholeForward(short, view, mesh, options, traces)
    lowered = forward.lower(pool, sampled, pack(batch))

    _, weights = over_leaves(model)
    ending = abstract((max_num_seqs, model.config.hidden_size), dtype)
    sample = make_sample_program(model, mesh, max_num_seqs)
    everything = pack(_every_option(max_num_seqs))
    sampling = sample.lower(weights, ending, sampled, everything, size=max_num_seqs, num_top=20)
    return 2 * max(_bytes_of(lowered()), _bytes_of(sampling()))


def _every_option(rows: int) -> SamplingBatch:
    def column(dtype: type) -> np.ndarray:
        return np.zeros(rows, dtype)

    return SamplingBatch(
        Randomness(column(np.float32), np.zeros((rows, 2), np.uint32), column(np.int32)),
        Truncation(column(np.int32), column(np.float32), column(np.float32)),
        Penalties(
            np.zeros((rows, HISTORY), np.int32),
            column(np.int32),
            *(column(np.float32) for _ in range(3)),
        ),
    )


def _bytes_of(program: jax.stages.Compiled) -> int:
    memory: Any = program.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.temp_size_in_bytes + max(results, 0)
