"""One step of a model cut over devices, as a compiler sees it: shapes and shardings, no weights."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints.architectures import ARCHITECTURES
from pallas_kernels.layout import GROUPS, KVLayout, choose_page_size
from pallas_kernels.paged_attention.api import AttentionBatch
from pallas_kernels.paged_lora.api import LoraBatch, lora_bucket_sizes
from slora_jax.batch import ForwardBatch, StepLora
from slora_jax.forward_programs import WholeForward, compiler_options
from slora_jax.loading import abstract_model, adapter_partition
from slora_jax.models.llama import LlamaConfig, PoolView
from slora_jax.sharding import named_sharding
from slora_jax.transfer import pack


def config_of(name: str, **changes) -> LlamaConfig:
    """A well-known architecture."""
    fields = {field.name for field in dataclasses.fields(LlamaConfig)}
    known = {key: value for key, value in ARCHITECTURES[name].items() if key in fields}
    return LlamaConfig(**{**known, "rope_scaling": None, **changes})


def lower_decode(
    config: LlamaConfig,
    mesh: jax.sharding.Mesh,
    *,
    scheme: str = "no_extra_collectives",
    kernels: str = "xla",
    dtype="bfloat16",
    rows: int = 32,
    tiles: int = 0,
    tile: int = 128,
    rank_bucket: int = 64,
    groups=GROUPS,
    num_pages: int = 64,
    max_model_len: int = 1024,
) -> Callable[[], jax.stages.Compiled]:
    """A step of ``rows`` decode rows and ``tiles`` of prefill; ``rank_bucket`` 0 is the base's.

    Returns what compiles it.
    """
    dtype = jnp.dtype(dtype)
    own = config.share(mesh.size)
    page_size = choose_page_size(own.num_kv_heads, own.head_dim, dtype.itemsize)
    kv = KVLayout(own.num_kv_heads, own.head_dim, page_size)
    partition = adapter_partition(config, mesh.size, scheme, kv.rows_per_page)
    tokens, width = rows + tiles * tile, -(-max_model_len // page_size)
    batch = ForwardBatch(
        token_ids=np.zeros(tokens, np.int32),
        sampled_row=np.zeros(rows, np.int32),
        ending_row=np.zeros(rows, np.int32),
        attention=AttentionBatch(
            slots=np.zeros(tokens, np.int32),
            positions=np.zeros(tokens, np.int32),
            page_table=np.zeros((rows + tiles, width), np.int32),
            num_decode=rows,
            tile=tile,
        ),
        lora=_no_adapters(partition, config.num_layers, tokens, rank_bucket, groups),
    )
    forward = WholeForward(
        abstract_model(config, dtype, mesh),
        PoolView(kv=kv, adapters=partition, kernels=kernels),
        mesh,
        compiler_options(mesh.devices.flat[0].platform),
    )

    def abstract(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=named_sharding(mesh, axes))

    packed = pack(batch)
    pool_shape = (num_pages, mesh.size * kv.rows_per_page, 128)
    pool = abstract(pool_shape, dtype, "pages", "page_rows", "lanes")
    return forward.lower(
        (pool,) * config.num_layers,
        abstract((rows,), jnp.int32),
        dataclasses.replace(packed, words=abstract(packed.words.shape, jnp.int32)),
    )


def _no_adapters(partition, num_layers, tokens, rank_bucket, groups):
    if not rank_bucket:
        return None
    adapters, pages = lora_bucket_sizes(rank_bucket, partition)
    stage = LoraBatch(
        adapter_index=np.zeros(tokens, np.int32),
        pages=np.zeros(pages, np.int32),
        page_start=np.zeros(adapters, np.int32),
        rank=np.zeros((adapters, 7), np.int32),
        a_row=np.zeros((adapters, 7), np.int32),
        b_row=np.zeros((adapters, 7), np.int32),
        scaling=np.zeros((num_layers, adapters, 7), np.float32),
        rank_bucket=rank_bucket,
    )
    return StepLora(stages=(stage,) * len(partition.stages), groups=groups)


COLLECTIVE = re.compile(
    r"= (?P<type>\S.*?) "
    r"(?P<kind>all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(-start)?\("
)
ARRAY = re.compile(r"(bf16|f16|f32|s32|u32|pred)\[([\d,]*)\]")
ITEM = {"bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "pred": 1}


def collectives(hlo: str) -> tuple[Counter, Mapping[str, int]]:
    """(how many of each kind, bytes of their results by kind) in a compiled program's text.

    A collective of several arrays counts as one for each, however the compiler has combined them.
    """
    counts: Counter = Counter()
    sizes: Counter = Counter()
    for match in COLLECTIVE.finditer(hlo):
        arrays = ARRAY.findall(match["type"])
        if match[3] and match["type"].startswith("(("):  # ((operands), results)
            arrays = arrays[len(arrays) // 2 :]
        for name, shape in arrays:
            items = int(np.prod([int(n) for n in shape.split(",") if n], dtype=np.int64))
            counts[match["kind"]] += 1
            sizes[match["kind"]] += ITEM[name] * items
    return counts, sizes
