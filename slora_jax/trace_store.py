"""Traced programs on disk, so that a later start need not trace and lower them again.

JAX's persistent compilation cache spares XLA's work, but not the Python before it: tracing a model
and lowering its Pallas kernels takes 5 s for each size of step (Llama-7B on an H100's host), where
reading the result back takes a tenth of one. What is stored is StableHLO (``jax.export``), named
after everything that it was made from. Owns the files and their names; refuses to know programs.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax
import jax
import jaxlib.version
from jax import export

MOST_FILES = 200
"""Least recently used ones beyond it are deleted; one is about 1 MB."""

OUR_PACKAGES = ("slora_jax", "pallas_kernels")

CUSTOM_CALLS = ("mosaic_gpu", "mosaic_gpu_v2", "AllocateBuffer", "tpu_custom_call")
"""Operations that ``jax.export`` does not promise to support for years to come. Nor need they be: a
file serves the very versions that wrote it."""


class TraceStore:
    """Files of one folder. Any number of processes may share it."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._fingerprint = _fingerprint()

    @staticmethod
    def is_supported() -> bool:
        """Whether what ``jax.export`` needs to write is installed (flatbuffers)."""
        return importlib.util.find_spec("flatbuffers") is not None

    def load_or_make(self, made_from: object, make: Callable[[], export.Exported]) -> Any:
        """The program made from ``made_from``, whose ``repr`` must say all that it depends on
        besides our code, JAX's and the kind of device. One that cannot be read is made anew; one
        that cannot be written is no error.
        """
        text = repr((self._fingerprint, made_from))
        path = self._folder / f"{hashlib.sha256(text.encode()).hexdigest()}.jax"
        with contextlib.suppress(Exception):  # absent, cut short, of another format
            program = export.deserialize(bytearray(path.read_bytes()))
            os.utime(path)
            return program
        program = make()
        with contextlib.suppress(OSError):
            self._write(path, program.serialize())
        return program

    def _write(self, path: Path, data: bytes | bytearray) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as file:
            file.write(data)
        os.replace(file.name, path)
        files = sorted(self._folder.glob("*.jax"), key=lambda file: file.stat().st_mtime)
        for old in files[:-MOST_FILES]:
            old.unlink(missing_ok=True)


def exported(
    function: Callable[..., Any], arguments: tuple[Any, ...], donate_argnums: int
) -> export.Exported:
    """``function`` of plain tuples of arrays, lowered for the platform that computes."""
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arguments)
    checks = [export.DisabledSafetyCheck.custom_call(name) for name in CUSTOM_CALLS]
    jitted = jax.jit(function, donate_argnums=donate_argnums)
    return export.export(jitted, disabled_checks=checks)(*shapes)


def _fingerprint() -> tuple[str, ...]:
    """Of what programs are made by: code, versions, the kind of device."""
    code = hashlib.sha256()
    for package in OUR_PACKAGES:
        spec = importlib.util.find_spec(package)
        for location in (spec and spec.submodule_search_locations) or ():
            for path in sorted(Path(location).rglob("*.py")):
                code.update(path.name.encode() + b"\0" + path.read_bytes())
    device = jax.devices()[0]
    versions = jax.__version__, jaxlib.version.__version__, flax.__version__
    names = "jax_enable_x64", "jax_default_matmul_precision"
    options = [jax.config.values[name] for name in names]
    return (code.hexdigest(), *versions, *map(str, options), device.platform, device.device_kind)
