"""The pool is written in place and never copied, in a step that reads adapters before and after."""

import functools

import jax
import numpy as np
import pytest

from pallas_kernels.layout import AdapterLayout, KVLayout
from pallas_kernels.paged_attention import api as attention
from pallas_kernels.paged_attention.batch import AttentionBatch
from pallas_kernels.paged_lora import api as lora
from pallas_kernels.paged_lora.batch import LoraBatch, lora_bucket_sizes

IMPLEMENTATIONS = ("xla",)
HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 4, 2, 64, 256


@functools.partial(jax.jit, static_argnames=("kv", "adapters", "implementation"), donate_argnums=0)
def layer(pool, x, tokens, adapters_of_step, *, kv, adapters, implementation):
    """One layer's use of the pool: LoRA on q, k, v; the KV write; attention; LoRA on o."""
    plan = lora.prepare(adapters_of_step, adapters, implementation=implementation)
    term = functools.partial(lora.paged_lora, plan=plan, layer=0, layout=adapters)
    qkv = term(jax.numpy.tile(x, (1, 2)), x, pool, group=("q", "k", "v"))
    heads = qkv.reshape(len(x), HEADS + 2 * KV_HEADS, HEAD_DIM)
    q, k, v = jax.numpy.split(heads, [HEADS, HEADS + KV_HEADS], axis=1)
    rows = attention.prepare(tokens, kv, num_heads=HEADS, implementation=implementation)
    pool = attention.kv_write(pool, k, v, rows, layout=kv)
    attended = attention.paged_attention(q, pool, rows, layout=kv, scale=0.1)
    return pool, term(x, attended.reshape(len(x), HIDDEN), pool, group=("o",))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("decode", "tiles"), [(1, 0), (6, 0), (0, 1), (3, 2)])
def test_the_pool_is_not_copied(decode, tiles, implementation):
    kv = KVLayout(KV_HEADS, HEAD_DIM, page_size=32)
    outputs = (HIDDEN, 128, 128, HIDDEN, 512, 512, HIDDEN)
    adapters = AdapterLayout((HIDDEN,) * 6 + (512,), outputs, kv.rows_per_page)
    num_tokens = decode + 8 * tiles
    num_rows, num_ids = lora_bucket_sizes(32, adapters)
    zeros = functools.partial(np.zeros, dtype=np.int32)
    adapters_of_step = LoraBatch(
        adapter_index=zeros(num_tokens),
        pages=zeros(num_ids),
        page_start=zeros(num_rows),
        rank=zeros((num_rows, 7)),
        a_row=zeros((num_rows, 7)),
        b_row=zeros((num_rows, 7)),
        scaling=np.zeros((1, num_rows, 7), np.float32),
        rank_bucket=32,
    )
    tokens = AttentionBatch(
        slots=zeros(num_tokens),
        positions=zeros(num_tokens),
        page_table=zeros((decode + tiles, 16)),
        num_decode=decode,
        tile=8,
    )
    pool = jax.ShapeDtypeStruct((4096, kv.rows_per_page, 128), np.float32)
    x = jax.ShapeDtypeStruct((num_tokens, HIDDEN), np.float32)
    options = {"kv": kv, "adapters": adapters, "implementation": implementation}
    program = layer.lower(pool, x, tokens, adapters_of_step, **options).compile()
    memory = program.memory_analysis()
    pool_bytes = 4 * int(np.prod(pool.shape))
    assert memory.alias_size_in_bytes >= pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes // 10
