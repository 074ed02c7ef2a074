"""A base model outside an engine: to train adapters on, to merge one into, to write out.

Owns the way back to files: PEFT directories from arrays, Hugging Face directories from a model. The
base itself is never written to: a merge makes new arrays where the adapter changes something and
shares the others. Refuses to know training and serving.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from slora_jax.errors import AdapterLoadError, ConfigError, ModelLoadError
from slora_jax.layers.linear import LoRALinear
from slora_jax.loading import LoadedModel, load_model, raising
from slora_jax.models.llama import Block, Llama
from slora_jax.sharding import sharded_param, single_device_mesh

if TYPE_CHECKING:
    from checkpoints.peft_lora import LoraAdapter

Adapter = str | os.PathLike[str] | Mapping[str, Any]
"""A PEFT directory or hub id, or tensors by PEFT's names."""

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraModule:
    """One adapted projection of one layer: ``y += scaling · B A x``."""

    rank: int
    scaling: float
    """alpha / rank, or alpha / sqrt(rank) with ``use_rslora``."""
    in_features: int
    out_features: int
    a_name: str
    """PEFT's name of A [rank, in_features]."""
    b_name: str
    """PEFT's name of B [out_features, rank]."""


def load_base_model(
    model: str | os.PathLike[str], *, dtype: str = "float32", progress: bool = True
) -> LoadedModel:
    """Read a base model onto the first device, for ``Trainer``, ``merge_adapter`` and ``LLM``.

    Args:
        model: what ``LLM`` takes: a directory, a hub id, a GGUF file, or the demo alias.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``: of the weights and all that is
            computed with them.
        progress: show bars while it is fetched and read.

    Raises:
        ConfigError: there is no such dtype.
        ModelLoadError: it cannot be read or is not supported.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r}: there are {', '.join(DTYPES)}")
    mesh = single_device_mesh(jax.devices()[0])
    return load_model(model, dtype=jnp.dtype(dtype), mesh=mesh, progress=progress)


def require_one_device(base: LoadedModel) -> None:
    """Raise ConfigError unless ``base`` is a loaded model, still there, and not cut over devices:
    the rows of fused weights lie in another order there."""
    if not isinstance(base, LoadedModel):
        raise ConfigError(
            f"the base is {base!r:.80}: give what load_base_model returns, or LLM.base_model"
        )
    if base.model.final_norm.weight[...].is_deleted():
        raise ConfigError("the base's weights are gone: the LLM that read them has been closed")
    if base.model.shards.count > 1:
        raise ConfigError(
            f"the base is cut over {base.model.shards.count} devices (tensor_parallel): load it on "
            "one, with load_base_model"
        )


def adapted_modules(
    config: Mapping[str, Any], base: LoadedModel
) -> dict[tuple[int, str], LoraModule]:
    """What a PEFT configuration adapts in ``base``: (layer, target) → module, in running order.

    Raises:
        AdapterLoadError: the configuration is not supported, or selects nothing.
        ConfigError: ``base`` is no loaded model, or is cut over several devices.
    """
    from checkpoints import errors, name_map, peft_lora

    require_one_device(base)
    if not isinstance(config, Mapping):
        raise AdapterLoadError(
            f"the adapter's config is {config!r:.80}: give PEFT's adapter_config.json as a dict"
        )
    described = {"peft_type": "LORA", **config}
    about = base.hyperparameters
    try:
        selected = peft_lora.adapted_modules(described, about, source="the adapter")
    except errors.CheckpointError as error:
        raise AdapterLoadError(str(error)) from error
    modules = {}
    for (layer, target), (rank, scaling) in selected.items():
        out_features, in_features = name_map.target_shape(about, target)
        a_name, b_name = peft_lora.tensor_names(layer, target)
        modules[layer, target] = LoraModule(
            rank=rank,
            scaling=scaling,
            in_features=in_features,
            out_features=out_features,
            a_name=a_name,
            b_name=b_name,
        )
    return modules


def save_adapter(
    directory: str | os.PathLike[str],
    arrays: Mapping[str, Any],
    config: Mapping[str, Any],
    base: LoadedModel,
    *,
    dtype: str = "float32",
    base_model: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a PEFT directory that ``peft.PeftModel.from_pretrained`` and ``load_adapter`` read.

    Args:
        directory: must not hold an adapter yet, unless ``overwrite``.
        arrays: tensors by PEFT's names, such as ``Trainer.adapter``.
        config: their PEFT configuration.
        base: the model that they belong to; only shapes are compared.
        dtype: what the tensors are stored as.
        base_model: what the adapter says that it was trained on, a hub id say; None is the
            directory that ``base`` was read from.
        overwrite: write over the adapter that the directory holds.

    Raises:
        AdapterLoadError: arrays, configuration and base do not fit each other, the arrays hold
            values beyond ``dtype``, or the directory cannot be written.
        ConfigError: there is no such dtype; ``base`` is no loaded model, or is cut over devices.
    """
    from checkpoints import peft_lora

    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r}: there are {', '.join(DTYPES)}")
    require_one_device(base)
    adapter = _read_adapter(arrays, config, base)
    pairs = {}
    for (layer, target), pair in adapter.pairs.items():
        a, b = (_cast(array, dtype, f"layer {layer}, {target}") for array in (pair.a, pair.b))
        pairs[layer, target] = peft_lora.LoraPair(a, b, pair.scaling)
    with raising(AdapterLoadError, "directory", directory):
        peft_lora.write_peft_adapter(
            directory,
            pairs,
            base_model=base_model or (base.directory and str(base.directory)),
            adapter_config=config,
            overwrite=overwrite,
        )


def merge_adapter(
    base: LoadedModel, adapter: Adapter, config: Mapping[str, Any] | None = None
) -> LoadedModel:
    """A new model with ``W + scaling · B A`` in place of each adapted W.

    The sum is made in float32 and rounded once to the model's dtype. ``base`` stays as it is; what
    the adapter does not change is shared with it. ``LLM(merged)`` serves the result at the base's
    speed, ``write_llama`` writes it.

    Args:
        base: from ``load_base_model``, or ``LLM.base_model``.
        adapter: a PEFT directory, a hub id, or tensors by PEFT's names.
        config: PEFT's configuration, with tensors only.

    Raises:
        AdapterLoadError: the adapter cannot be used with this base, or the sum is beyond its dtype.
        ConfigError: ``base`` is no loaded model, or is cut over several devices.
    """
    require_one_device(base)
    read = _read_adapter(adapter, config, base)
    merged = nnx.merge(*nnx.split(base.model))  # new modules, the same parameters
    for layer, block in enumerate(merged.layers):
        for linear in _linears(block):
            if any((layer, target) in read.pairs for target in linear.group):
                weight = _merged_weight(base.model, linear, layer, read)
                axes = linear.weight.get_metadata("out_sharding")
                linear.weight = sharded_param(weight, axes)  # the old parameter is the base's
    return dataclasses.replace(base, model=merged)


def write_llama(directory: str | os.PathLike[str], model: LoadedModel) -> None:
    """Write a Hugging Face directory (safetensors, tokenizer) that transformers and ``LLM`` load.

    Raises:
        ModelLoadError: the directory holds a model already or cannot be written, the weights are
            random (``load="dummy"``), or the tokenizer is not where the model was read from.
        ConfigError: it is no loaded model, or is cut over devices (``LLM.save`` takes those).
    """
    from checkpoints import hf_llama, tokenizer

    require_one_device(model)
    if model.directory is None:
        raise ModelLoadError("a model of random weights (load='dummy') is not worth writing")
    with raising(ModelLoadError, "directory", directory):
        tokenizer.require_tokenizer(model.directory)
        hf_llama.write_llama(directory, model.hyperparameters, dict(_stored_tensors(model.model)))
        tokenizer.copy_tokenizer(model.directory, Path(directory).expanduser())


def _read_adapter(
    adapter: Adapter, config: Mapping[str, Any] | None, base: LoadedModel
) -> LoraAdapter:
    from checkpoints import errors, peft_lora, sources

    try:
        if not isinstance(adapter, Mapping):
            if config is not None:
                raise AdapterLoadError(
                    "a directory has its own adapter_config.json: give config only with arrays"
                )
            return peft_lora.read_peft_adapter(
                sources.resolve_adapter(adapter), base.hyperparameters
            )
        if not isinstance(config, Mapping):
            raise AdapterLoadError(
                f"the adapter's config is {config!r:.80}: give PEFT's adapter_config.json as a dict"
            )
        return peft_lora.parse_peft_adapter(
            adapter, {"peft_type": "LORA", **config}, base.hyperparameters, source="the adapter"
        )
    except errors.CheckpointError as error:
        raise AdapterLoadError(str(error)) from error
    except (TypeError, ValueError) as error:
        raise AdapterLoadError(
            f"give the adapter as a directory, or its tensors by PEFT's names: {error}"
        ) from error


def _linears(block: Block) -> tuple[LoRALinear, ...]:
    return block.attention.qkv, block.attention.out, block.mlp.gate_up, block.mlp.down


def _merged_weight(model: Llama, linear: LoRALinear, layer: int, adapter: LoraAdapter) -> jax.Array:
    weight = linear.weight[...]
    merged = np.array(weight, dtype=np.float32)
    first = 0
    for target, size in zip(
        linear.group, model.config.group_features(linear.group)[1], strict=True
    ):
        pair = adapter.pairs.get((layer, target))
        if pair is not None:
            with np.errstate(over="ignore", invalid="ignore"):  # checked below
                delta = pair.b.astype(np.float32) @ pair.a.astype(np.float32)
                merged[first : first + size] += np.float32(pair.scaling) * delta
        first += size
    merged = _cast(merged, weight.dtype.name, f"layer {layer}, {'/'.join(linear.group)}, merged")
    return jax.device_put(merged, weight.sharding)


def _cast(array: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """``array`` as ``dtype``; AdapterLoadError where that makes Inf of its values, or they are."""
    with np.errstate(over="ignore"):
        cast = array.astype(jnp.dtype(dtype))
    if not np.isfinite(cast.astype(np.float32)).all():
        raise AdapterLoadError(f"{name}: values beyond {dtype}, or NaN: was its training stable?")
    return cast


def _stored_tensors(model: Llama) -> Iterator[tuple[str, np.ndarray]]:
    """The model's tensors by canonical name (``checkpoints.name_map``), fused ones taken apart."""
    yield "embed_tokens", np.asarray(model.embed_tokens.weight[...])
    for layer, block in enumerate(model.layers):
        prefix = f"layers.{layer}"
        yield f"{prefix}.input_norm", np.asarray(block.input_norm.weight[...])
        yield f"{prefix}.post_attention_norm", np.asarray(block.post_attention_norm.weight[...])
        for linear in _linears(block):
            sizes = model.config.group_features(linear.group)[1]
            parts = np.split(np.asarray(linear.weight[...]), np.cumsum(sizes)[:-1])
            for target, part in zip(linear.group, parts, strict=True):
                yield f"{prefix}.{target}", part
    yield "final_norm", np.asarray(model.final_norm.weight[...])
    if model.lm_head is not None:
        yield "lm_head", np.asarray(model.lm_head.weight[...])
