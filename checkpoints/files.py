"""Reading and writing the three kinds of file that checkpoints are made of: JSON, safetensors,
whole directories.

It owns the translation of every low-level failure (missing file, truncation, broken header, bad
JSON, full disk) into a `CheckpointError`, the check for NaN and Inf, and atomic writes. It refuses
to know what a tensor or a key means.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from checkpoints.errors import CheckpointError

FLOAT_DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Safetensors dtype name -> numpy dtype, for the dtypes that weights may have."""

# The bits of an IEEE-like float that are all ones exactly for NaN and Inf.
_EXPONENT_BITS = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}


def require_directory(directory: str | os.PathLike[str], what: str) -> Path:
    """Return `directory` as a Path; `CheckpointError` if it is no directory or is empty."""
    path = Path(directory).expanduser()
    try:
        if not path.exists():
            raise CheckpointError(f"{path}: no such directory; give the directory of {what}.")
        if not path.is_dir():
            raise CheckpointError(f"{path}: is a file; give the directory of {what}.")
        if next(path.iterdir(), None) is None:
            raise CheckpointError(f"{path}: the directory is empty; give the directory of {what}.")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}.") from error
    return path


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`; anything else in it is a `CheckpointError`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: the file is missing.") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not valid JSON ({error}); fetch or write it again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(value).__name__}, expected an object.")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` as indented UTF-8 JSON."""
    path.write_bytes(to_json(value))


def to_json(value: Mapping[str, Any]) -> bytes:
    """`value` as indented UTF-8 JSON; NumPy's numbers, paths and sets as what they stand for.

    Raises `CheckpointError` where something in it is none of these.
    """
    try:
        return (json.dumps(value, indent=2, ensure_ascii=False, default=_plain) + "\n").encode()
    except (TypeError, ValueError) as error:  # no such type; circular, a lone surrogate
        raise CheckpointError(f"the configuration cannot be written as JSON: {error}.") from error


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"{value!r:.80} is no JSON")


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says about one tensor."""

    path: Path
    dtype: str
    """Safetensors' name: F32, F16, BF16, I64, …"""
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return name -> `TensorInfo` of one safetensors file, without reading any tensor.

    The safetensors library checks that the header is well formed and that it accounts for every
    byte of the file, so a truncated file fails here.
    """
    with _open_safetensors(path) as handle:
        return _infos(handle, path)


def _infos(handle: Any, path: Path) -> dict[str, TensorInfo]:
    pieces = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
    return {
        name: TensorInfo(path, piece.get_dtype(), tuple(piece.get_shape()))
        for name, piece in pieces.items()
    }


def read_tensor(info: TensorInfo, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
    """Return one float tensor in the dtype it is stored in; NaN or Inf is a `CheckpointError`.

    With `index`, a slice for each dimension, only that part is read and checked.
    """
    with _open_safetensors(info.path) as handle:
        if index is None:
            array, shape = handle.get_tensor(name), info.shape
        else:
            array = handle.get_slice(name)[index]
            shape = tuple(
                len(range(*part.indices(size)))
                for part, size in zip(index, info.shape, strict=True)
            )
    if array.shape != shape or array.dtype != FLOAT_DTYPES.get(info.dtype):
        raise CheckpointError(f"{info.path}: tensor {name!r} changed while it was being loaded.")
    require_finite(array, f"{info.path}: tensor {name!r}")
    return array


def read_small_file(path: Path) -> dict[str, np.ndarray]:
    """Return all tensors of one file, opened once; they may still hold NaN or Inf.

    Dtypes other than float32, float16 and bfloat16 are `CheckpointError`s.
    """
    with _open_safetensors(path) as handle:
        for name, info in _infos(handle, path).items():
            require_float_dtype(info, name)
        return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118


def require_float_dtype(info: TensorInfo, name: str) -> None:
    """Raise `CheckpointError` unless the tensor is stored as F32, F16 or BF16."""
    if info.dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"{info.path}: tensor {name!r} has dtype {info.dtype}; convert it to F32, F16 or BF16 "
            "(quantised weights are not supported)."
        )


def same_tensor(first: TensorInfo, first_name: str, second: TensorInfo, second_name: str) -> bool:
    """Whether two stored 2-D tensors agree in dtype, shape and bytes; neither is held whole."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with _open_safetensors(first.path) as one, _open_safetensors(second.path) as other:
        left, right = one.get_slice(first_name), other.get_slice(second_name)
        for start in range(0, first.shape[0], 4096):
            piece = slice(start, min(start + 4096, first.shape[0]))
            if left[piece].tobytes() != right[piece].tobytes():
                return False
    return True


@contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    try:
        with safe_open(str(path), framework="numpy") as handle:
            yield handle
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: the file is missing.") from error
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path}: truncated or corrupt safetensors file ({error}); fetch or write it again."
        ) from error


def require_finite(array: np.ndarray, what: str) -> None:
    """Raise `CheckpointError` if a float32, float16 or bfloat16 array holds NaN or Inf."""
    mask = _EXPONENT_BITS[array.dtype.name]
    bits = np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}").reshape(-1)
    for start in range(0, bits.size, 1 << 20):  # in pieces: no temporary as large as the tensor
        if ((bits[start : start + (1 << 20)] & mask) == mask).any():
            raise CheckpointError(
                f"{what} contains NaN or Inf; the file is damaged or the training diverged."
            )


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write float arrays to one safetensors file, marked as transformers wants it."""
    save_file(
        {name: np.ascontiguousarray(array) for name, array in tensors.items()},
        str(path),
        metadata={"format": "pt"},
    )
    # The library makes files that only their owner can read; give them their directory's mode.
    path.chmod(path.parent.stat().st_mode & 0o666)


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Yield a temporary directory that becomes `target`, in one rename, when the block ends well.

    Raises `CheckpointError` if `target` exists and is not empty, before the block runs or when a
    second process was faster, and for any `OSError` of the block. Nothing is left behind on
    failure.
    """
    taken = CheckpointError(f"{target}: already exists and is not empty; choose another directory.")
    if target.is_file() or (target.is_dir() and next(target.iterdir(), None) is not None):
        raise taken
    work = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        inner = work / "content"  # mkdtemp's own directory is private; this gets the usual mode
        inner.mkdir()
        yield inner
        if target.is_dir():
            try:
                target.rmdir()
            except OSError as error:
                raise taken from error
        inner.rename(target)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written: {error}.") from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
