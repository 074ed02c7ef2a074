"""An adapter as a pytree: tensors by PEFT's names, and the same stacked over layers.

The flat dict is what goes in and out (``llm.load_adapter(name, arrays, config)``,
``save_adapter``). Stacked, two arrays a target, is how it is trained: an optimiser launches kernels
for each array. Refuses to know models and optimisers.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from slora_jax.base_model import LoraModule
from slora_jax.errors import AdapterLoadError

Arrays = dict[str, jax.Array]
"""PEFT's name → A f32[rank, in] or B f32[out, rank]."""

Modules = Mapping[tuple[int, str], LoraModule]
"""(layer, target) → what is adapted there (``slora_jax.base_model.adapted_modules``)."""

Stacked = dict[str, tuple[jax.Array, jax.Array]]
"""Target → (a [L, r, in], b [L, out, r])."""


def init_adapter(modules: Modules, seed: int) -> Arrays:
    """A new adapter in float32: A Gaussian, B zero, so that it changes nothing (arXiv 2106.09685
    §4.1).

    A's deviation is 1 / sqrt(in), which keeps the size of x whatever the rank is. Each tensor
    depends on ``seed`` and its own name alone.
    """
    key = jax.random.key(seed)
    arrays: Arrays = {}
    for module in modules.values():
        own_key = jax.random.fold_in(key, zlib.crc32(module.a_name.encode()))
        shape = (module.rank, module.in_features)
        deviation = 1 / math.sqrt(module.in_features)
        arrays[module.a_name] = deviation * jax.random.normal(own_key, shape, jnp.float32)
        arrays[module.b_name] = jnp.zeros((module.out_features, module.rank), jnp.float32)
    return arrays


def check_adapter(arrays: Mapping[str, jax.Array], modules: Modules) -> None:
    """Raise AdapterLoadError unless ``arrays`` has exactly the tensors of ``modules``."""
    expected: dict[str, tuple[int, int]] = {}
    for module in modules.values():
        expected[module.a_name] = module.rank, module.in_features
        expected[module.b_name] = module.out_features, module.rank
    if not isinstance(arrays, Mapping):
        raise AdapterLoadError(f"the adapter is {arrays!r:.80}: give a dict by PEFT's names")
    for name in sorted(expected.keys() ^ arrays.keys(), key=str):
        problem = "is missing" if name in expected else "belongs to no module of the configuration"
        raise AdapterLoadError(f"the adapter's tensor {name!r} {problem}")
    for name, shape in expected.items():
        if not isinstance(arrays[name], np.ndarray | jax.Array):
            raise AdapterLoadError(f"the adapter's tensor {name!r} is no array")
        if jnp.shape(arrays[name]) != shape:
            raise AdapterLoadError(
                f"the adapter's tensor {name!r} has shape {list(jnp.shape(arrays[name]))}, the "
                f"configuration and the base model need {list(shape)}"
            )
        kind = jnp.result_type(arrays[name])
        if not jnp.issubdtype(kind, jnp.floating) or not jnp.isfinite(arrays[name]).all():
            raise AdapterLoadError(
                f"the adapter's tensor {name!r} ({kind}) must hold finite real numbers"
            )


def stack_adapter(arrays: Mapping[str, jax.Array], modules: Modules, num_layers: int) -> Stacked:
    """The tensors of each target side by side, layers first.

    Where ranks differ between layers, and in layers without the target, rows of zeros fill up, in A
    and in B: they add nothing, their gradients are zero, and so they stay zero in training.
    """
    stacked: Stacked = {}
    for target in dict.fromkeys(target for _, target in modules):
        layers = [modules.get((layer, target)) for layer in range(num_layers)]
        present = [module for module in layers if module is not None]
        rank = max(module.rank for module in present)
        a_shape, b_shape = (rank, present[0].in_features), (present[0].out_features, rank)
        a, b = [], []
        for module in layers:
            if module is None:
                a.append(jnp.zeros(a_shape, jnp.float32))
                b.append(jnp.zeros(b_shape, jnp.float32))
            else:
                missing = rank - module.rank
                a.append(jnp.pad(arrays[module.a_name], ((0, missing), (0, 0))))
                b.append(jnp.pad(arrays[module.b_name], ((0, 0), (0, missing))))
        stacked[target] = jnp.stack(a), jnp.stack(b)
    return stacked


def unstack_adapter(stacked: Stacked, modules: Modules) -> Arrays:
    """The inverse of ``stack_adapter``."""
    arrays: Arrays = {}
    for (layer, target), module in modules.items():
        a, b = stacked[target]
        arrays[module.a_name] = a[layer, : module.rank]
        arrays[module.b_name] = b[layer, :, : module.rank]
    return arrays


def stack_scaling(modules: Modules, num_layers: int) -> dict[str, np.ndarray]:
    """Target → its scaling in each layer, f32[L]; 0 in layers without it."""
    scaling = {target: np.zeros(num_layers, np.float32) for _, target in modules}
    for (layer, target), module in modules.items():
        scaling[target][layer] = module.scaling
    return scaling
