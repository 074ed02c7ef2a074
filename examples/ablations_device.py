"""S-LoRA's baselines on a device: they change a running engine, for benchmarks alone.

All keep continuous batching, chunked prefill and the same attention. What they do to an engine
cannot be undone: use a fresh one for each. Outputs of `merge` are those of random adapters.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
from ablations import OneAdapter, OneResidentCache, SplitCache

from pallas_kernels.layout import TARGETS, AdapterLayout
from pallas_kernels.paged_attention import api as attention_op
from pallas_kernels.paged_lora import reference
from pallas_kernels.paged_lora.batch import LoraBatch
from slora_jax import LLM, EngineConfig
from slora_jax.forward_programs import over_leaves
from slora_jax.layers import lora
from slora_jax.models import llama
from slora_jax.scheduler import make_scheduler

BASELINES = ("bmm", "no-unify-mem", "one-adapter", "merge")


def apply(baseline: str, llm: LLM, config: EngineConfig, *, adapter_share: float, rank: int):
    """Turn ``llm``'s engine, which has no adapters yet, into a baseline.

    ``adapter_share``: of the pool, for ``no-unify-mem``; ``rank``: the largest of all adapters.
    """
    if baseline == "no-unify-mem":
        pages = int(adapter_share * llm.engine.allocator.num_usable)
        _new_host_half(llm, config, functools.partial(SplitCache, adapter_pages=pages))
    elif baseline == "one-adapter":
        _new_host_half(llm, config, type(llm.engine.cache), policy=OneAdapter())
    elif baseline == "merge":
        _new_host_half(llm, config, OneResidentCache, policy=OneAdapter())
        _merge_weights(llm, rank)
    elif baseline == "bmm":
        use_padded_bmm(rank)
    else:
        raise ValueError(f"no baseline {baseline!r}: {', '.join(BASELINES)}")


def _new_host_half(llm: LLM, config: EngineConfig, make_cache: Callable, policy=None) -> None:
    """The same engine with another cache and another order of admission."""
    engine, runner = llm.engine, llm.engine._runner
    if policy is not None:  # it bounds waits itself
        config = dataclasses.replace(config, max_overtakes=10**9, prefetch=0)
    engine.cache = make_cache(engine.allocator, engine.store)
    on_finish = engine.scheduler.on_finish  # the engine's counts
    engine.scheduler = make_scheduler(
        config,
        engine.allocator,
        engine.cache,
        engine.store,
        page_size=llm.stats().page_size,
        max_num_seqs=runner.max_num_seqs,
        prefill_tile=runner.prefill_tile,
        max_num_batched_tokens=runner.max_prefill_tokens,
        max_model_len=llm.max_model_len,
        clock=engine._clock,
        policy=policy,
    )
    engine.scheduler.on_finish = on_finish


# -- bmm -------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """A step's adapters, and how its tokens are laid out."""

    batch: LoraBatch
    num_decode: int = dataclasses.field(metadata={"static": True})
    tile: int = dataclasses.field(metadata={"static": True})


def use_padded_bmm(largest_rank: int) -> None:
    """Put ``padded_bmm`` in the place of ``paged_lora`` in the model, for good."""
    layout_of_step: list[int] = []

    def prepare_attention(batch, *args, **options):
        layout_of_step[:] = [batch.num_decode, batch.tile]
        return attention_op.prepare(batch, *args, **options)

    def prepare_lora(batch: LoraBatch, layout: AdapterLayout, *, implementation: str) -> Rows:
        return Rows(batch, *layout_of_step)

    llama.attention_op = types.SimpleNamespace(prepare=prepare_attention)
    lora.lora_op = types.SimpleNamespace(prepare=prepare_lora)
    lora.paged_lora = functools.partial(padded_bmm, largest_rank)


def padded_bmm(
    largest_rank: int,
    y: jax.Array,
    x: jax.Array,
    pool_layer: jax.Array,
    rows: Rows,
    *,
    layer: int | jax.Array,
    group: tuple[str, ...],
    layout: AdapterLayout,
) -> jax.Array:
    """``paged_lora`` as S-LoRA's bmm baseline: the step's adapters are copied out of their pages
    into contiguous matrices, padded to the largest rank of all; batched matmuls read them, a matrix
    for each decode row and for each prefill tile.
    """
    batch, num_decode, tile = rows.batch, rows.num_decode, rows.tile
    # One "token" for each adapter, so that the reference's gather makes one matrix an adapter.
    every = jnp.arange(batch.rank.shape[0], dtype=jnp.int32)
    padded = dataclasses.replace(batch, adapter_index=every, rank_bucket=largest_rank)
    x_tiles = x[num_decode:].reshape(-1, tile, x.shape[1])
    parts = [
        (x[:num_decode, None], batch.adapter_index[:num_decode]),
        (x_tiles, batch.adapter_index[num_decode::tile]),
    ]
    deltas = []
    for target in map(TARGETS.index, group):
        inputs, outputs = layout.in_features[target], layout.out_features[target]
        a = reference._matrix(pool_layer, padded, target, batch.a_row, inputs).astype(x.dtype)
        b = reference._matrix(pool_layer, padded, target, batch.b_row, outputs).astype(x.dtype)
        a, b = jax.lax.optimization_barrier((a, b))  # contiguous copies, not fused away
        found = []
        for tokens, index in parts:
            if index.shape[0]:
                hidden = jnp.einsum(
                    "gti,gri->gtr", tokens, a[index], preferred_element_type=jnp.float32
                )
                found.append(
                    jnp.einsum(
                        "gtr,gro->gto",
                        hidden.astype(x.dtype),
                        b[index],
                        preferred_element_type=jnp.float32,
                    ).reshape(-1, outputs)
                )
        scaling = batch.scaling[layer, batch.adapter_index, target]
        adapted = batch.rank[batch.adapter_index, target] > 0
        delta = jnp.concatenate(found) * scaling[:, None]
        deltas.append(jnp.where(adapted[:, None], delta, 0.0))
    return (y.astype(jnp.float32) + jnp.concatenate(deltas, axis=1)).astype(y.dtype)


# -- merge -----------------------------------------------------------------------------------------


def _merge_weights(llm: LLM, rank: int) -> None:
    """Steps compute no LoRA; before a step of another adapter, W₀ + B·A is written into the
    attention's weights, from a copy of W₀ that is kept, so that nothing drifts.
    """
    runner, model = llm.engine._runner, llm._loaded.model
    linears = [x for block in model.layers for x in (block.attention.qkv, block.attention.out)]
    originals = [jnp.array(linear.weight[...]) for linear in linears]
    key = jax.random.key(0)
    factors = []
    for original in originals:
        out_features, in_features = original.shape
        a = 0.02 * jax.random.normal(key, (rank, in_features), original.dtype)
        b = 0.02 * jax.random.normal(key, (out_features, rank), original.dtype)
        factors.append((a, b))

    @functools.partial(jax.jit, donate_argnums=0)
    def merge(old, original, a, b):
        del old  # its memory is the result's
        return original + b @ a

    launch, merged = runner.launch, [0]

    def launch_merged(output):
        version = next(iter((*output.decode, *output.prefill))).request.adapter_version
        if version != merged[0]:
            for linear, original, (a, b) in zip(linears, originals, factors, strict=True):
                linear.weight[...] = merge(linear.weight[...], original, a, b)
            _pass_weights_on(runner, model)
            merged[0] = version
        return launch(output)

    place = runner.swap_in

    def swap_in(swap):  # resident, with no rank to compute
        packed = dataclasses.replace(swap.packed, ranks=(0,) * len(TARGETS))
        place(dataclasses.replace(swap, packed=packed))

    runner.launch, runner.swap_in = launch_merged, swap_in


def _pass_weights_on(runner, model) -> None:
    """Hand the model's changed arrays to the compiled programs."""
    forward = runner._forward
    runner._weights = over_leaves(model)[1]
    if hasattr(forward, "_layer_weights"):
        forward._layer_weights = [over_leaves(block)[1] for block in model.layers]
    else:
        forward._weights = over_leaves(model)[1]
