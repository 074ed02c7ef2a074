"""A step's host arrays as one buffer: one transfer to the device instead of a dozen.

Owns the packing of a pytree of NumPy arrays into one int32 vector and its inverse inside a compiled
program. Knows nothing of what the arrays mean.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np

ALIGNMENT = 64
"""Words at whose multiples each leaf starts: XLA hands a slice to a kernel where it lies, and
Mosaic GPU takes no buffer that does not start at a multiple of 256 bytes."""

_WORD_TYPES = (np.dtype(np.int32), np.dtype(np.uint32), np.dtype(np.float32))


@dataclasses.dataclass(frozen=True)
class Spec:
    """What ``unpack`` needs: static and hashable, so that equal ones share a compiled program."""

    structure: Any
    """The pytree's structure."""
    leaves: tuple[tuple[tuple[int, ...], np.dtype], ...]
    """Shape and dtype of each leaf."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """A pytree of 32-bit arrays on its way to the device."""

    words: jax.Array | np.ndarray
    """i32[sum of the leaves' sizes, each rounded up to ALIGNMENT]."""

    spec: Spec = dataclasses.field(metadata={"static": True})


def pack(tree: Any) -> Packed:
    """``tree`` of NumPy arrays of int32, uint32 or float32 as one buffer of its own."""
    leaves, structure = jax.tree.flatten(tree)
    for leaf in leaves:
        assert leaf.dtype in _WORD_TYPES, leaf.dtype
    words = np.zeros(sum(_aligned(leaf.size) for leaf in leaves), np.int32)
    start = 0
    for leaf in leaves:
        words[start : start + leaf.size] = leaf.reshape(-1).view(np.int32)
        start += _aligned(leaf.size)
    return Packed(words, Spec(structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)))


def unpack(packed: Packed) -> Any:
    """The tree again, inside a compiled program."""
    leaves, start = [], 0
    for shape, dtype in packed.spec.leaves:
        size = math.prod(shape)
        leaf = jax.lax.slice(packed.words, (start,), (start + size,)).reshape(shape)
        leaves.append(jax.lax.bitcast_convert_type(leaf, dtype))
        start += _aligned(size)
    return packed.spec.structure.unflatten(leaves)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
