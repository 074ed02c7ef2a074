"""Orbax checkpoints of a loaded model: arrays saved as they lie, restored into any sharding.

It owns the layout of such a directory: `params/` (Orbax's), the tokenizer's files, and
`config.json` in normalised form, written last, so that a directory with one is complete. It refuses
to know what the arrays are: names, shapes and shardings are the caller's. The only module here that
imports jax.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from checkpoints.errors import CheckpointError
from checkpoints.files import read_json, require_directory, write_json
from checkpoints.hf_llama import CONFIG_KEYS
from checkpoints.tokenizer import copy_tokenizer, require_tokenizer

_MARK = "slora_jax_format"
_FORMAT = "orbax-1"


def save_model(
    directory: str | os.PathLike[str],
    config: Mapping[str, Any],
    params: Mapping[str, jax.Array],
    *,
    files_from: str | os.PathLike[str] | None = None,
) -> None:
    """Save arrays under their names, with the normalised config and the tokenizer of `files_from`.

    Sharded arrays are written shard by shard, from one process (saving a multi-host model is not
    supported). Raises `CheckpointError` if `directory` exists and is not empty, or cannot be
    written.
    """
    path = Path(directory).expanduser().absolute()
    if jax.process_count() > 1:
        raise NotImplementedError("save_model works from one process only")
    if path.is_file() or (path.is_dir() and next(path.iterdir(), None) is not None):
        raise CheckpointError(f"{path}: already exists and is not empty; choose another directory.")
    if set(config) != set(CONFIG_KEYS):
        odd = sorted(set(config) ^ set(CONFIG_KEYS))
        raise CheckpointError(f"{path}: config is not in normalised form (see {', '.join(odd)}).")
    if files_from is not None:
        require_tokenizer(files_from)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path / "params", dict(params))
        if files_from is not None:
            copy_tokenizer(files_from, path)
        write_json(path / "config.json", {_MARK: _FORMAT, **config})
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be written: {error}.") from error


def is_orbax_model(directory: str | os.PathLike[str]) -> bool:
    """Whether `save_model` wrote this directory, completely."""
    path = Path(directory).expanduser()
    try:
        return (path / "params").is_dir() and _MARK in read_json(path / "config.json")
    except CheckpointError:
        return False


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the normalised config that was saved, as `hf_llama.read_config` returns it."""
    path = require_directory(directory, "a model saved by save_model") / "config.json"
    config = read_json(path)
    if config.pop(_MARK, None) != _FORMAT:
        raise CheckpointError(f"{path}: is not of a model that save_model of this version wrote.")
    if set(config) != set(CONFIG_KEYS) or not isinstance(config["eos_token_ids"], list):
        raise CheckpointError(f"{path}: is damaged; save the model again.")
    config["eos_token_ids"] = tuple(config["eos_token_ids"])
    return config


def restore_model(
    directory: str | os.PathLike[str], abstract: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Return the saved arrays, each read straight into the sharding and dtype of its abstract
    value.

    The mesh may differ from the one at saving time. `abstract` must name exactly what was saved,
    with the same shapes. Raises `CheckpointError` if it does not, or for damaged files.
    """
    path = Path(directory).expanduser().absolute()
    if not is_orbax_model(path):
        raise CheckpointError(f"{path}: is no complete model saved by save_model.")
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            metadata = checkpointer.metadata(path / "params")
            tree = metadata.item_metadata.tree  # None.tree if Orbax finds no metadata
            saved = {name: tuple(info.shape) for name, info in tree.items()}
        except Exception as error:  # tensorstore and Orbax raise many types
            raise CheckpointError(f"{path}: damaged Orbax checkpoint ({error}).") from error
        _check_names_and_shapes(path, saved, abstract)
        try:
            return checkpointer.restore(path / "params", dict(abstract))
        except Exception as error:
            raise CheckpointError(f"{path}: the arrays cannot be restored ({error}).") from error


def _check_names_and_shapes(
    path: Path,
    saved: Mapping[str, tuple[int, ...]],
    abstract: Mapping[str, jax.ShapeDtypeStruct],
) -> None:
    for name in sorted(set(saved) ^ set(abstract)):
        where = "was not saved" if name in abstract else "was saved, but is not asked for"
        raise CheckpointError(f"{path}: array {name!r} {where}; the models differ.")
    for name, value in abstract.items():
        if saved[name] != tuple(value.shape):
            raise CheckpointError(
                f"{path}: array {name!r} was saved with shape {list(saved[name])}, asked for is "
                f"{list(value.shape)}; the models differ."
            )
