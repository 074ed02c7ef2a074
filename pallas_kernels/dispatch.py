"""Which implementation serves which device: the one table of names, and the automatic choice.

Every op's folder has a module per name. The kernels are imported only when asked for, because they
need parts of jax that not every supported version and platform has. Refuses to know how any works.
"""

from __future__ import annotations

import dataclasses
import importlib
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.layout import AdapterLayout, KVLayout

MODULES = {"reference": "reference", "xla": "xla", "gpu": "pallas_gpu", "tpu": "pallas_tpu"}
"""Implementation name → module in each op's folder."""

PREFILL_TILE = {"reference": 8, "xla": 8, "gpu": 16, "tpu": 128}
"""Tokens a prefill tile that suit each implementation: the TPU kernels fill a matrix unit with
them, the GPU kernels join as many tiles of a sequence as they need."""

PLATFORMS = {"gpu": ("gpu", "cuda"), "tpu": ("tpu",)}
"""Implementation with kernels → ``jax.Device.platform`` that they are for."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """What an implementation of an op computes once a step and shares between layers."""

    data: Any
    """A pytree of the implementation's own."""

    implementation: str = dataclasses.field(metadata={"static": True})
    """Who made it, and alone can read it."""


def implementation(op: str, name: str) -> ModuleType:
    """The module of ``op`` ("paged_lora", "paged_attention").

    Raises ValueError for an unknown name, NotImplementedError where this jax cannot have it.
    """
    if name not in MODULES:
        raise ValueError(f"no implementation {name!r} of {op}: {', '.join(MODULES)}")
    return importlib.import_module(f"pallas_kernels.{op}.{MODULES[name]}")


def choose(
    requested: str,
    device: Any,
    *,
    dtype: Any,
    num_heads: int,
    kv: KVLayout,
    adapters: AdapterLayout,
) -> str:
    """The name that serves a model on ``device``; "auto" takes its kernels where they can, else
    XLA.

    A named one never falls back: NotImplementedError says why it cannot serve.
    """
    named = requested != "auto"
    kernels = (name for name, platforms in PLATFORMS.items() if device.platform in platforms)
    name = requested if named else next(kernels, "xla")
    if name not in MODULES:
        raise ValueError(f"no implementation {name!r}: auto, {', '.join(MODULES)}")
    if name in PLATFORMS and device.platform not in PLATFORMS[name]:
        raise NotImplementedError(
            f"the device is {device.device_kind}; 'auto' and 'xla' run everywhere"
        )
    try:
        for op in ("paged_attention", "paged_lora"):
            check = getattr(implementation(op, name), "check_support", None)
            if check is not None:
                check(device, dtype=jnp.dtype(dtype), num_heads=num_heads, kv=kv, adapters=adapters)
    except NotImplementedError:
        if named:
            raise
        return "xla"
    return name


def check_step(name: str, *, tile: int, table_entries: int) -> None:
    """Raise NotImplementedError where ``name`` cannot compute steps with prefill tiles of ``tile``
    tokens and page tables of so many entries in all.
    """
    check = getattr(implementation("paged_attention", name), "check_step", None)
    if check is not None:
        check(tile=tile, table_entries=table_entries)
