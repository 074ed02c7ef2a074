"""Trainer: examples in, a trained adapter out.

Owns the optimiser (optax), the compiled step, data parallelism over a mesh, and the loop around
them with its progress bar and checkpoints. The base is frozen: gradients exist for the adapter
only. Refuses to know files (``slora_jax.base_model.save_adapter``) and serving.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import numbers
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from slora_jax.base_model import adapted_modules
from slora_jax.errors import ConfigError, TrainingError
from slora_jax.loading import LoadedModel
from slora_jax.training.checkpointing import TrainingCheckpoints
from slora_jax.training.data import Example, TrainingBatch, batches
from slora_jax.training.forward import BaseWeights, DenseLlama
from slora_jax.training.lora import (
    Arrays,
    Stacked,
    check_adapter,
    init_adapter,
    stack_adapter,
    stack_scaling,
    unstack_adapter,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Options of a run. Sizes that fix a compiled shape say so."""

    num_steps: int = 300
    """Optimiser steps."""
    batch_size: int = 16
    """Rows a step, all devices together. Changing it recompiles."""
    max_length: int = 256
    """Tokens a row. Changing it recompiles."""
    gradient_accumulation_steps: int = 1
    """A step's rows go through the model in so many parts. Changing it recompiles."""
    packing: bool = True
    """Several examples a row; False pads each to a row of its own."""
    learning_rate: float = 1e-3
    """The highest: reached after ``warmup_steps``, then a cosine down to zero at ``num_steps``."""
    warmup_steps: int = 10
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    remat: bool = False
    """Compute activations again in the backward pass, to save memory."""
    seed: int = 0
    """Decides the adapter's first weights and the order of examples."""
    save_every: int = 100
    """Steps between checkpoints, where ``fit`` is given a directory for them."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "gradient_accumulation_steps", "save_every"):
            _require(name, getattr(self, name), numbers.Integral, 1)
        _require("max_length", self.max_length, numbers.Integral, 2)
        for name in ("warmup_steps", "seed"):
            _require(name, getattr(self, name), numbers.Integral, 0)
        for name in ("learning_rate", "weight_decay", "max_grad_norm"):
            _require(name, getattr(self, name), numbers.Real, 0)
        for name in ("packing", "remat"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be True or False")
        for field in dataclasses.fields(self):  # NumPy's numbers as Python's, for checkpoints
            value = getattr(self, field.name)
            if not isinstance(value, bool):
                plain = int(value) if isinstance(value, numbers.Integral) else float(value)
                object.__setattr__(self, field.name, plain)
        if self.seed >= 2**32:
            raise ConfigError(f"seed={self.seed} must be below 2**32")
        if self.batch_size % self.gradient_accumulation_steps:
            raise ConfigError(
                f"batch_size={self.batch_size} is no multiple of gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps}"
            )

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW under a global clip, with linear warm-up and cosine decay."""
        schedule = optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=self.learning_rate,
            warmup_steps=min(self.warmup_steps, self.num_steps),
            decay_steps=max(self.num_steps, self.warmup_steps + 1),
        )
        return optax.chain(
            optax.clip_by_global_norm(self.max_grad_norm),
            optax.adamw(schedule, weight_decay=self.weight_decay),
        )


class Trainer:
    """Trains one LoRA adapter of one base model.

    Example:
        >>> config = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
        >>> trainer = Trainer(base, config, TrainingConfig(num_steps=200))
        >>> trainer.fit([chat_example(base, messages) for messages in conversations])
        >>> llm.load_adapter("mine", trainer.adapter, config)

    The adapter and the optimiser's state are float32; the forward computes in the base's dtype.

    Args:
        base: from ``load_base_model``, or ``LLM.base_model``.
        adapter_config: PEFT's configuration: ``r``, ``lora_alpha``, ``target_modules``,
            ``rank_pattern``, ``use_rslora``, …: whatever ``load_adapter`` takes, and
            ``lora_dropout``.
        config: of the run.
        adapter: tensors by PEFT's names to start from; None begins with A Gaussian and B zero.
        optimizer: an optax transformation in place of ``config.optimizer()``.
        devices: rows are split over them, everything else is replicated; None is the base's own.

    Raises:
        AdapterLoadError: the adapter's configuration or tensors do not fit the base.
        ConfigError: ``devices`` or ``optimizer`` is none; ``batch_size`` cannot be split over the
            devices; ``lora_dropout`` is no share;
            ``init_lora_weights`` asks for another beginning; ``base`` is no loaded model, or is cut
            over several devices.
    """

    def __init__(
        self,
        base: LoadedModel,
        adapter_config: Mapping[str, Any],
        config: TrainingConfig | None = None,
        *,
        adapter: Mapping[str, Any] | None = None,
        optimizer: optax.GradientTransformation | None = None,
        devices: Sequence[Any] | None = None,
    ):
        if config is not None and not isinstance(config, TrainingConfig):
            raise ConfigError(f"config={config!r:.80} must be a TrainingConfig")
        self.config = config or TrainingConfig()
        self.modules = adapted_modules(adapter_config, base)
        self.adapter_config = dict(adapter_config)
        self._dropout = _dropout(adapter_config)
        self.step_number = 0
        """Optimiser steps made."""
        self._vocab_size = base.model.config.vocab_size
        self._about = _fingerprint(base)
        if optimizer is not None and not isinstance(optimizer, optax.GradientTransformation):
            raise ConfigError(f"optimizer={optimizer!r:.80} must be an optax transformation")
        if devices is not None:
            _check_devices(devices)
        else:
            devices = [min(base.model.final_norm.weight[...].devices(), key=lambda d: d.id)]
        self._mesh = Mesh(np.array(devices), ("data",))
        parts = self.config.gradient_accumulation_steps
        if self.config.batch_size % (len(devices) * parts):
            raise ConfigError(
                f"batch_size={self.config.batch_size} must be a multiple of "
                f"{len(devices)} devices × {parts} gradient_accumulation_steps"
            )
        if adapter is not None:
            check_adapter(adapter, self.modules)
            start = {name: jnp.array(value, jnp.float32) for name, value in adapter.items()}
        else:
            if adapter_config.get("init_lora_weights", True) not in (True, None, "gaussian"):
                raise ConfigError(
                    f"init_lora_weights={adapter_config['init_lora_weights']!r}: an adapter begins "
                    "with A Gaussian and B zero; to begin elsewhere, give its tensors as adapter="
                )
            start = init_adapter(self.modules, self.config.seed)
        replicated = NamedSharding(self._mesh, PartitionSpec())
        depth = base.model.config.num_layers
        self._scaling = stack_scaling(self.modules, depth)
        self._adapter: Stacked = jax.device_put(
            stack_adapter(start, self.modules, depth), replicated
        )
        self._start = None if adapter is None else _digest(start)
        self._own_optimizer = optimizer is not None
        self._optimizer = optimizer or self.config.optimizer()
        self._optimizer_state = jax.device_put(self._optimizer.init(self._adapter), replicated)
        self._dense = DenseLlama(base.model, mesh=self._mesh, remat=self.config.remat)
        self._step = jax.jit(self._make_step(), donate_argnums=(0, 1))
        self._evaluate = jax.jit(
            lambda adapter, weights, batch: self._loss_and_grads(adapter, weights, batch, None)
        )

    @property
    def adapter(self) -> Arrays:
        """The tensors now, f32 by PEFT's names: for ``load_adapter``, ``save_adapter``, …

        Copies, which later steps leave alone.
        """
        return unstack_adapter(self._adapter, self.modules)

    def fit(
        self,
        examples: Sequence[Example],
        *,
        directory: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> list[float]:
        """Train until ``config.num_steps`` and return the loss of each step made now.

        Args:
            examples: batches are drawn from them as ``config.seed`` says.
            directory: where checkpoints go. A run that was interrupted goes on from the newest one
                there and ends with the weights of an unbroken run. One optimizer of your own cannot
                be told from another.
            progress: show a bar.

        Raises:
            TrainingError: an example cannot be used; the directory cannot, or has checkpoints of
                another configuration, base, start or data; all steps have been made already; the
                loss is NaN or Inf.
        """
        cfg = self.config
        if self.step_number >= cfg.num_steps:
            raise TrainingError(
                f"all num_steps={cfg.num_steps} have been made: make a Trainer for another run"
            )
        stream = batches(
            examples,
            batch_size=cfg.batch_size,
            max_length=cfg.max_length,
            packing=cfg.packing,
            seed=cfg.seed,
        )
        self._check_tokens(examples)
        checkpoints = None
        if directory is not None:
            if not isinstance(directory, str | os.PathLike):
                raise TrainingError(f"directory={directory!r:.80} must be a path")
            checkpoints = TrainingCheckpoints(Path(directory), self._describe(examples))
        losses: list[jax.Array] = []
        try:
            if checkpoints is not None:
                self._resume(checkpoints)
            with tqdm(
                total=cfg.num_steps, initial=self.step_number, desc="Training", disable=not progress
            ) as bar:
                for batch in itertools.islice(stream, self.step_number, cfg.num_steps):
                    losses.append(self.step(batch))
                    is_last = self.step_number == cfg.num_steps
                    saves = checkpoints is not None and (
                        is_last or self.step_number % cfg.save_every == 0
                    )
                    # To look at each would wait for each.
                    if self.step_number % 10 == 0 or is_last or saves:
                        bar.set_postfix(loss=f"{self._finite(losses[-1]):.4f}", refresh=False)
                    bar.update()
                    if checkpoints is not None and saves:
                        checkpoints.save(self.step_number, self._adapter, self._optimizer_state)
        finally:
            if checkpoints is not None:
                checkpoints.close()
        return [float(loss) for loss in losses]

    def step(self, batch: TrainingBatch) -> jax.Array:
        """One optimiser step; the mean loss f32[] over the batch's completion tokens, before it.

        Does not wait for the device.
        """
        self._adapter, self._optimizer_state, loss = self._step(
            self._adapter,
            self._optimizer_state,
            self._dense.weights,
            self._place(batch),
            np.int32(self.step_number),
        )
        self.step_number += 1
        return loss

    def loss_and_gradients(self, batch: TrainingBatch) -> tuple[jax.Array, Arrays]:
        """(the mean loss f32[] over the batch's completion tokens, its gradients by PEFT's names),
        and no step. Without dropout."""
        loss, grads = self._evaluate(self._adapter, self._dense.weights, self._place(batch))
        return loss, unstack_adapter(grads, self.modules)

    def _make_step(self) -> Any:
        optimizer = self._optimizer

        def step(
            adapter: Stacked,
            state: optax.OptState,
            weights: BaseWeights,
            batch: TrainingBatch,
            number: jax.Array,
        ) -> tuple[Stacked, optax.OptState, jax.Array]:
            key = jax.random.fold_in(jax.random.key(self.config.seed), number)
            loss, grads = self._loss_and_grads(adapter, weights, batch, key)
            with jax.numpy_dtype_promotion("standard"):  # optax mixes int32 and float32
                updates, state = optimizer.update(grads, state, adapter)
                adapter = optax.apply_updates(adapter, updates)  # type: ignore[assignment]
            return adapter, state, loss

        return step

    def _loss_and_grads(
        self, adapter: Stacked, weights: BaseWeights, batch: TrainingBatch, key: jax.Array | None
    ) -> tuple[jax.Array, Stacked]:
        """Over all parts of ``batch`` [parts, rows, S], as if they were one. ``key``: of dropout,
        None for none."""
        dropout = 0.0 if key is None else self._dropout
        keys = jax.random.split(jax.random.key(0) if key is None else key, len(batch.token_ids))
        part_of = jax.value_and_grad(self._summed_loss)

        def add(
            total: tuple[jax.Array, Stacked], part: tuple[TrainingBatch, jax.Array]
        ) -> tuple[tuple[jax.Array, Stacked], None]:
            rows, key = part
            more = part_of(adapter, weights, rows, dropout, key)
            return jax.tree.map(jnp.add, total, more), None

        zero = jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, adapter)
        total, _ = jax.lax.scan(add, zero, (batch, keys))
        count = jnp.maximum(jnp.sum(batch.loss_mask, dtype=jnp.float32), 1.0)
        return jax.tree.map(lambda value: value / count, total)

    def _summed_loss(
        self,
        adapter: Stacked,
        weights: BaseWeights,
        batch: TrainingBatch,
        dropout: float,
        key: jax.Array,
    ) -> jax.Array:
        hidden = self._dense.hidden(
            weights,
            adapter,
            self._scaling,
            jnp.asarray(batch.token_ids),
            jnp.asarray(batch.positions),
            jnp.asarray(batch.segment_ids),
            dropout=dropout,
            key=key,
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(
            self._dense.logits(weights, hidden), batch.targets
        )
        return jnp.sum(jnp.where(batch.loss_mask, losses, 0.0))

    def _place(self, batch: TrainingBatch) -> TrainingBatch:
        """[rows, S] → [parts, rows a part, S] on the devices, each with its share of every part."""
        parts = self.config.gradient_accumulation_steps
        sharding = NamedSharding(self._mesh, PartitionSpec(None, "data"))
        return jax.tree.map(
            lambda x: jax.device_put(x.reshape(parts, -1, x.shape[-1]), sharding), batch
        )

    def _finite(self, loss: jax.Array) -> float:
        value = float(loss)
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss is {value} at step {self.step_number}: lower learning_rate (checkpoints "
                "of earlier steps are kept)"
            )
        return value

    def _resume(self, checkpoints: TrainingCheckpoints) -> None:
        restored = checkpoints.restore(self._adapter, self._optimizer_state)
        if restored is not None:
            self.step_number, self._adapter, self._optimizer_state = restored

    def _describe(self, examples: Sequence[Example]) -> dict[str, Any]:
        """What must be equal for a run to be the same run."""
        digest = 0
        for example in examples:
            ids = np.array((len(example.prompt), *example.prompt, *example.completion), np.int64)
            digest = zlib.crc32(ids.tobytes(), digest)
        adapter = sorted(
            (layer, target, module.rank, module.scaling)
            for (layer, target), module in self.modules.items()
        )
        return {
            "config": dataclasses.asdict(self.config),
            "adapter": zlib.crc32(repr((adapter, self._dropout)).encode()),
            "base": self._about,
            "start": self._start,
            "optimizer": "its own" if self._own_optimizer else "the configuration's",
            "examples": digest,
        }

    def _check_tokens(self, examples: Sequence[Example]) -> None:
        for index, example in enumerate(examples):
            for token in (*example.prompt, *example.completion):
                if not isinstance(token, numbers.Integral) or not 0 <= token < self._vocab_size:
                    raise TrainingError(
                        f"example {index} has token id {token!r}; the base model's vocabulary has "
                        f"{self._vocab_size}, from 0: was it made with another tokenizer?"
                    )


def _fingerprint(base: LoadedModel) -> int:
    """Tells one base from another: over the dtype, the shapes and all weights."""
    about = repr(sorted(base.hyperparameters.items(), key=str))
    return zlib.crc32(about.encode(), _digest(jax.tree.leaves(base.model)))


def _digest(tree: Any) -> int:
    """Of all arrays' bits and shapes: sums in integers, where the arrays are."""
    sums = [
        (leaf.shape, leaf.dtype.name, int(_sum_of_bits(leaf))) for leaf in jax.tree.leaves(tree)
    ]
    return zlib.crc32(repr(sums).encode())


@jax.jit
def _sum_of_bits(array: jax.Array) -> jax.Array:
    """u32[]: each element's bits times an odd number of its place's own, modulo 2**32."""
    unsigned = {2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32).reshape(-1)
    places = jnp.arange(bits.size, dtype=jnp.uint32)
    return jnp.sum(bits * (places * jnp.uint32(2654435769) | jnp.uint32(1)), dtype=jnp.uint32)


def _check_devices(devices: object) -> None:
    if (
        not isinstance(devices, Sequence)
        or not devices
        or not all(isinstance(device, jax.Device) for device in devices)
    ):
        raise ConfigError(
            f"devices={devices!r:.80} must be a list of at least one of JAX's devices"
        )


def _dropout(adapter_config: Mapping[str, Any]) -> float:
    share = adapter_config.get("lora_dropout") or 0.0
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < 1:
        raise ConfigError(f"lora_dropout={share!r} must be a number from 0 to below 1")
    return float(share)


def _require(name: str, value: Any, kind: Any, least: int) -> None:
    fits = isinstance(value, kind) and not isinstance(value, bool)
    if not fits or not value >= least or not math.isfinite(value):
        what = "an integer" if kind is numbers.Integral else "a finite number"
        raise ConfigError(f"{name}={value!r} must be {what} of at least {least}")
