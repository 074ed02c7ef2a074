"""Llama (Touvron et al., arXiv 2302.13971; grouped-query attention of arXiv 2305.13245) in Flax
NNX.

Reads like the paper: embedding, pre-norm blocks of attention and SwiGLU, final norm, output
projection. K and V live in the page pool, adapters too, so the pool goes through every layer and
comes back. Knows neither requests nor the scheduler: a ForwardBatch is all it sees of a step.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.dispatch import Plan
from pallas_kernels.layout import GROUPS, TARGETS, KVLayout
from pallas_kernels.paged_attention import api as attention_op
from pallas_kernels.paged_attention.api import kv_write, paged_attention
from slora_jax.adapter_partition import AdapterPartition
from slora_jax.batch import ForwardBatch
from slora_jax.layers.embedding import Embedding
from slora_jax.layers.linear import AddLora, LoRALinear, no_lora
from slora_jax.layers.lora import LoraContext
from slora_jax.layers.norm import RMSNorm
from slora_jax.layers.rope import RopeScaling, apply_rope, inverse_frequencies, rope_angles
from slora_jax.sharding import Shards

Pool = tuple[jax.Array, ...]
"""One array [pages, rows, 128] per layer; donated through every step."""

QKV, OUT, GATE_UP, DOWN = GROUPS


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Hyperparameters, by our own names; ``checkpoints`` maps each file format onto them."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    tie_word_embeddings: bool

    def target_features(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of each linear layer an adapter can have."""
        hidden, inner = self.hidden_size, self.intermediate_size
        heads, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q": (hidden, heads),
            "k": (hidden, kv),
            "v": (hidden, kv),
            "o": (heads, hidden),
            "gate": (hidden, inner),
            "up": (hidden, inner),
            "down": (inner, hidden),
        }

    def group_features(self, group: tuple[str, ...]) -> tuple[int, tuple[int, ...]]:
        """Inputs, and outputs of each target, of targets that share an input."""
        features = [self.target_features()[target] for target in group]
        return features[0][0], tuple(out for _, out in features)

    def share(self, shards: int) -> LlamaConfig:
        """What each of ``shards`` devices has: its heads, MLP columns, and rows of the vocabulary.

        Devices that outnumber the KV heads share them: each has the one that its query heads need.
        The vocabulary is padded to equal shares. ValueError says what cannot be cut.
        """
        if self.num_heads % shards or self.intermediate_size % shards:
            raise ValueError(
                f"num_heads={self.num_heads} and intermediate_size={self.intermediate_size} must "
                f"both be multiples of the number of devices, {shards}"
            )
        if self.num_kv_heads % shards and shards % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} cannot be cut over {shards} devices: it must "
                "be a multiple of their number, or divide it (each KV head is then held by several)"
            )
        return dataclasses.replace(
            self,
            num_heads=self.num_heads // shards,
            num_kv_heads=max(self.num_kv_heads // shards, 1),
            intermediate_size=self.intermediate_size // shards,
            vocab_size=-(-self.vocab_size // shards),
        )

    def owned_by(self, shard: int, shards: int) -> dict[str, tuple[int, int]]:
        """(start, stop) of each target's outputs, of o's and down's inputs, on device ``shard``."""
        own, dim = self.share(shards), self.head_dim
        queries, inner = own.num_heads * dim, own.intermediate_size
        first_kv = shard * self.num_kv_heads // shards * dim
        kv = (first_kv, first_kv + own.num_kv_heads * dim)
        heads = (shard * queries, (shard + 1) * queries)
        columns = (shard * inner, (shard + 1) * inner)
        return dict(zip(TARGETS, (heads, kv, kv, heads, columns, columns, columns), strict=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolView:
    """How a device reads its own part of the pool, and by which kernels: static, part of what is
    compiled."""

    kv: KVLayout
    adapters: AdapterPartition
    kernels: str
    """Implementation of both ops (``pallas_kernels.dispatch``)."""


class Context(Protocol):
    """What all layers share within a forward pass, and how they reach K, V and adapters: through
    pages (``StepContext``), or dense (``slora_jax.training.forward``)."""

    @property
    def angles(self) -> tuple[jax.Array, jax.Array]:
        """Of RoPE: (cos, sin), each f32[T, 1, head_dim / 2]."""
        ...

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, pool: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Causal attention of each token over its own sequence: ([T, Hq, Dh], the layer's pool).

        ``q`` [T, Hq, Dh], ``k`` and ``v`` [T, Hkv, Dh], after RoPE.
        """
        ...

    def lora_of_layer(self, layer: int | jax.Array) -> AddLora:
        """The LoRA term of one layer, as its linears call it."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepContext:
    """The Context of a serving step: computed once, read by each layer."""

    angles: tuple[jax.Array, jax.Array]

    attention: Plan

    lora: LoraContext | None
    """None where every token is the base model's."""

    view: PoolView = dataclasses.field(metadata={"static": True})

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, pool: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Write K and V to their slots, then attend over the paged history."""
        pool = kv_write(pool, k, v, self.attention, layout=self.view.kv)
        scale = q.shape[-1] ** -0.5
        return paged_attention(q, pool, self.attention, layout=self.view.kv, scale=scale), pool

    def lora_of_layer(self, layer: int | jax.Array) -> AddLora:
        """See ``Context``."""
        return no_lora if self.lora is None else self.lora.of_layer(layer)


class Attention(nnx.Module):
    """Grouped-query attention over the history of each token's own sequence; ``config`` is the
    device's share of the model."""

    def __init__(self, config: LlamaConfig, shards: Shards, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config = config
        self.qkv = LoRALinear(
            *config.group_features(QKV), QKV, ("heads", "embed"), shards, dtype=dtype, rngs=rngs
        )
        self.out = LoRALinear(
            *config.group_features(OUT), OUT, ("embed", "heads"), shards, dtype=dtype, rngs=rngs
        )

    def __call__(
        self,
        stream: jax.Array,
        x: jax.Array,
        pool: jax.Array,
        context: Context,
        add_lora: AddLora,
    ) -> tuple[jax.Array, jax.Array]:
        """``x`` [T, hidden] → (``stream`` + same, this layer's pool with the new K and V in it)."""
        cfg, tokens = self.config, x.shape[0]
        q_size, kv_size = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
        q, k, v = jnp.split(self.qkv(x, pool, add_lora), [q_size, q_size + kv_size], axis=-1)
        q = apply_rope(q.reshape(tokens, cfg.num_heads, cfg.head_dim), context.angles)
        k = apply_rope(k.reshape(tokens, cfg.num_kv_heads, cfg.head_dim), context.angles)
        v = v.reshape(tokens, cfg.num_kv_heads, cfg.head_dim)
        attended, pool = context.attend(q, k, v, pool)
        return self.out.added_to(stream, attended.reshape(tokens, q_size), pool, add_lora), pool


class MLP(nnx.Module):
    """SwiGLU (Shazeer, arXiv 2002.05202): ``down(silu(gate(x)) * up(x))``; ``config`` is the
    device's share of the model."""

    def __init__(self, config: LlamaConfig, shards: Shards, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.gate_up = LoRALinear(
            *config.group_features(GATE_UP),
            GATE_UP,
            ("mlp", "embed"),
            shards,
            dtype=dtype,
            rngs=rngs,
        )
        self.down = LoRALinear(
            *config.group_features(DOWN), DOWN, ("embed", "mlp"), shards, dtype=dtype, rngs=rngs
        )

    def __call__(
        self, stream: jax.Array, x: jax.Array, pool: jax.Array, add_lora: AddLora
    ) -> jax.Array:
        """``x`` [T, hidden] → ``stream`` + same; ``pool`` holds the adapters."""
        gate, up = jnp.split(self.gate_up(x, pool, add_lora), 2, axis=-1)
        return self.down.added_to(stream, jax.nn.silu(gate) * up, pool, add_lora)


class Block(nnx.Module):
    """One decoder layer: each half reads a normalised stream and adds to it."""

    def __init__(self, config: LlamaConfig, shards: Shards, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.input_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.attention = Attention(config, shards, dtype=dtype, rngs=rngs)
        self.post_attention_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.mlp = MLP(config, shards, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        pool: jax.Array,
        context: Context,
        layer: int | jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """``x`` [T, hidden] and this layer's ``pool`` [P, R, 128] → the same two, after the layer.

        ``layer`` is its index, which only the adapters' scaling depends on.
        """
        add_lora = context.lora_of_layer(layer)
        with jax.named_scope("attention"):
            x, pool = self.attention(x, self.input_norm(x), pool, context, add_lora)
        with jax.named_scope("mlp"):
            return self.mlp(x, self.post_attention_norm(x), pool, add_lora), pool


class Llama(nnx.Module):
    """The decoder. Made with random weights; loading replaces them (``slora_jax.loading``).

    Parameters of a model cut over N devices are theirs side by side; the methods are what one
    device computes on its own part (``slora_jax.sharding.on_each_device``), and communicate.
    """

    def __init__(self, config: LlamaConfig, shards: int = 1, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config = config
        self.shards = Shards(shards)
        own = config.share(shards)

        def embedding() -> Embedding:
            return Embedding(
                config.vocab_size, config.hidden_size, self.shards, dtype=dtype, rngs=rngs
            )

        self.embed_tokens = embedding()
        self.layers = nnx.List(
            [Block(own, self.shards, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)]
        )
        self.final_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.lm_head = None if config.tie_word_embeddings else embedding()

    def __call__(self, batch: ForwardBatch, pool: Pool, view: PoolView) -> tuple[jax.Array, Pool]:
        """One step: (hidden [T, hidden], the pool with the step's K and V in it)."""
        x, context = self.begin(batch, view)
        new_pool = []
        for layer, (block, layer_pool) in enumerate(zip(self.layers, pool, strict=True)):
            with jax.named_scope(f"layer_{layer}"):
                x, layer_pool = block(x, layer_pool, context, layer)
            new_pool.append(layer_pool)
        return self.final_norm(x), tuple(new_pool)

    def begin(self, batch: ForwardBatch, view: PoolView) -> tuple[jax.Array, StepContext]:
        """The stream before the first layer, [T, hidden], and what all layers share."""
        cfg = self.config
        frequencies = jnp.asarray(
            inverse_frequencies(cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
        )
        context = StepContext(
            angles=rope_angles(batch.attention.positions, frequencies),
            attention=attention_op.prepare(
                batch.attention,
                view.kv,
                num_heads=cfg.num_heads // self.shards.count,
                implementation=view.kernels,
            ),
            lora=None
            if batch.lora is None
            else LoraContext.prepare(batch.lora, view.adapters, self.shards, view.kernels),
            view=view,
        )
        return self.embed_tokens(batch.token_ids), context

    def logits(self, hidden: jax.Array) -> jax.Array:
        """``hidden`` [rows, hidden] → f32[rows, the device's share of the vocabulary].

        -inf where the share is padded.
        """
        return (self.lm_head or self.embed_tokens).logits(hidden)
