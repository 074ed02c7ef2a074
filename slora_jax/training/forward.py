"""The model of ``slora_jax.models.llama`` on whole sequences: no pages, differentiable.

The blocks are the ones that serve; only their Context differs, which attends within rows and takes
the adapter from its arguments. One `lax.scan` over the layers keeps compilation short and makes
rematerialisation one word; it needs the layers' weights stacked, a copy of the base (about 0.2 ms
a step to slice for 135M parameters, little beside a step of thousands of tokens). Refuses to know
losses and optimisers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from pallas_kernels.layout import TARGETS
from slora_jax.forward_programs import Weights, over_leaves, without_layers
from slora_jax.layers.linear import AddLora, dot
from slora_jax.layers.rope import inverse_frequencies, rope_angles
from slora_jax.models.llama import Llama, LlamaConfig
from slora_jax.training.lora import Stacked

LayerLora = dict[str, tuple[jax.Array, jax.Array]]
"""Of one layer: target → (a [r, in], b [out, r])."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseWeights:
    """A frozen base model, as ``DenseLlama`` reads it."""

    outer: Weights
    """Embedding, final norm, output projection."""
    layers: Weights
    """Each parameter of a block, [L, …]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseContext:
    """The Context of whole rows: attention within each row's sequences, one layer's adapter."""

    config: LlamaConfig
    angles: tuple[jax.Array, jax.Array]
    mask: jax.Array
    """bool[B, 1, S, S]: whether a token (third axis) sees another (last axis)."""
    lora: LayerLora
    scaling: Mapping[str, jax.Array]
    """Of one layer: target → f32[]."""
    dropout: float
    key: jax.Array
    """Of this layer; unused where ``dropout`` is 0."""

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, pool: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """See ``Context``; tokens are rows, one after the other."""
        rows, length = self.mask.shape[0], self.mask.shape[-1]
        q, k, v = (x.reshape(rows, length, *x.shape[1:]) for x in (q, k, v))
        precision = "highest" if q.dtype == jnp.float32 else "default"
        # It promotes bfloat16 to float32 inside, also where the user has forbidden that.
        with jax.default_matmul_precision(precision), jax.numpy_dtype_promotion("standard"):
            attended = _attention(q, k, v, self.mask)
        return attended.reshape(rows * length, *q.shape[2:]), pool

    def lora_of_layer(self, layer: int | jax.Array) -> AddLora:
        """See ``Context``: the adapter of the layer at hand, for every token."""
        return self._add_lora

    def _add_lora(
        self, y: jax.Array, x: jax.Array, pool: jax.Array, group: tuple[str, ...]
    ) -> jax.Array:
        if not any(target in self.lora for target in group):
            return y
        deltas = []
        for target, size in zip(group, self.config.group_features(group)[1], strict=True):
            if target not in self.lora:
                deltas.append(jnp.zeros((len(y), size), y.dtype))
                continue
            a, b = self.lora[target]
            seen = x
            if self.dropout:
                own_key = jax.random.fold_in(self.key, TARGETS.index(target))
                kept = jax.random.bernoulli(own_key, 1 - self.dropout, x.shape)
                seen = jnp.where(kept, x / (1 - self.dropout), 0).astype(x.dtype)
            shrunk = self.scaling[target] * dot(seen, a.astype(x.dtype), out_dtype=jnp.float32)
            deltas.append(dot(shrunk.astype(x.dtype), b.astype(x.dtype)))
        return y + jnp.concatenate(deltas, axis=-1)


@jax.checkpoint
def _attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Computed again in the backward pass: kept for it, scores [B, Hq, S, S] in float32 would be
    the most memory of all (8 rows of 512 tokens, 9 heads: 75 MB a layer, more than once).
    """
    return jax.nn.dot_product_attention(q, k, v, mask=mask)


class DenseLlama:
    """A Llama as a function of (weights, adapter, tokens): ``hidden`` and ``logits``.

    Example:
        >>> dense, depth = DenseLlama(base.model), base.model.config.num_layers
        >>> lora, scaling = stack_adapter(arrays, modules, depth), stack_scaling(modules, depth)
        >>> hidden = dense.hidden(dense.weights, lora, scaling, token_ids, positions, segment_ids)

    Args:
        model: the base; its arrays stay as they are, those of the layers are copied.
        mesh: where the weights go, replicated; None leaves them where the model's are.
        remat: compute each layer's activations again in the backward pass instead of keeping them:
            memory for about a third more time.
    """

    def __init__(self, model: Llama, *, mesh: jax.sharding.Mesh | None = None, remat: bool = False):
        self.config = model.config
        self._remat = remat
        self._outer, outer = over_leaves(without_layers(model))
        blocks = [over_leaves(block) for block in model.layers]
        self._block = blocks[0][0]  # all layers have one structure
        layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(w for _, w in blocks))
        self.weights = BaseWeights(outer=outer, layers=layers)
        if mesh is not None:
            self.weights = jax.device_put(self.weights, NamedSharding(mesh, PartitionSpec()))

    def hidden(
        self,
        weights: BaseWeights,
        lora: Stacked,
        scaling: Mapping[str, ArrayLike],
        token_ids: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        *,
        dropout: float = 0.0,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states [B, S, hidden] after the final norm; differentiable in ``lora``.

        Args:
            weights: ``self.weights``, an argument so that jit does not copy it into the program.
            lora: ``{}`` is the base model.
            scaling: f32[L] of each target in ``lora``.
            token_ids: i32[B, S].
            positions: i32[B, S]: of each token in its own sequence.
            segment_ids: i32[B, S]: tokens of one row see those before them with the same id.
            dropout: share of each adapted module's inputs that its adapter does not see (PEFT's
                ``lora_dropout``); the others are scaled up.
            key: decides which, with ``dropout``.
        """
        cfg, (rows, length) = self.config, token_ids.shape
        frequencies = inverse_frequencies(cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
        angles = rope_angles(positions.reshape(-1), jnp.asarray(frequencies))
        same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        mask = same & jnp.tri(length, dtype=bool)[None, None]
        no_pool = jnp.zeros(0)

        def layer(
            x: jax.Array, sliced: tuple[Weights, LayerLora, Mapping[str, jax.Array], jax.Array]
        ) -> tuple[jax.Array, None]:
            block_weights, layer_lora, layer_scaling, layer_key = sliced
            context = DenseContext(
                config=cfg,
                angles=angles,
                mask=mask,
                lora=layer_lora,
                scaling=layer_scaling,
                dropout=dropout,
                key=layer_key,
            )
            x, _ = self._block(block_weights)(x, no_pool, context, 0)
            return x, None

        outer = self._outer(weights.outer)
        x = outer.embed_tokens(token_ids.reshape(-1))
        body = jax.checkpoint(layer) if self._remat else layer
        keys = jax.random.split(jax.random.key(0) if key is None else key, cfg.num_layers)
        scalings = {target: jnp.asarray(value) for target, value in scaling.items()}
        x, _ = jax.lax.scan(body, x, (weights.layers, lora, scalings, keys))
        return outer.final_norm(x).reshape(rows, length, cfg.hidden_size)

    def logits(self, weights: BaseWeights, hidden: jax.Array) -> jax.Array:
        """``hidden`` [..., hidden] → f32[..., vocab]."""
        flat = self._outer(weights.outer).logits(hidden.reshape(-1, hidden.shape[-1]))
        return flat.reshape(*hidden.shape[:-1], -1)
