"""What the TPU kernels of both ops share: where they run, and how they multiply."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

KINDS = ("TPU v5 lite", "TPU v5e", "TPU v6 lite", "TPU v6e")
"""``device_kind`` of the TPUs that the kernels are compiled and estimated for."""

VMEM_BYTES = 100 * 2**20
"""Of 128 MiB; XLA's default leaves kernels a fraction of it."""


def check_support(device: Any, *, dtype: Any, **_: Any) -> None:
    """Raise NotImplementedError where the kernels cannot serve. Any heads, layouts, ranks."""
    if device.device_kind not in KINDS:
        raise NotImplementedError(f"kernels are for TPU v5e and v6e, not {device.device_kind}")
    if jnp.dtype(dtype) != jnp.bfloat16:
        raise NotImplementedError(f"the TPU kernels read bfloat16, not {jnp.dtype(dtype)}")


def dot(left: jax.Array, right: jax.Array, *, transposed: bool = False) -> jax.Array:
    """``left @ right`` or ``left @ right.T``, in float32."""
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)
