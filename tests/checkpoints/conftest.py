"""Fixtures of the checkpoint tests: tiny models and adapters in temporary directories."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoints.hf_llama import read_config
from checkpoints.synthetic import write_synthetic_adapter, write_synthetic_llama


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untied GQA Llama; do not write into it."""
    path = tmp_path_factory.mktemp("tiny") / "model"
    write_synthetic_llama(path, hidden_size=16, intermediate_size=24, num_heads=4, num_kv_heads=2)
    return path


@pytest.fixture(scope="session")
def tiny_config(tiny_source: Path) -> dict[str, Any]:
    return read_config(tiny_source)


@pytest.fixture
def model(tiny_source: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_source, tmp_path / "model"))


@pytest.fixture
def adapter(tiny_config: dict[str, Any], tmp_path: Path) -> Path:
    """An adapter of the tiny model that a test may damage: rank 4 on all projections."""
    path = tmp_path / "adapter"
    write_synthetic_adapter(path, tiny_config, seed=0, rank=4)
    return path


@pytest.fixture
def edit() -> Callable[..., None]:
    """`edit(path, key=value, other=None)` changes a JSON file; `...` removes a key."""

    def change(path: Path, **changes: Any) -> None:
        value = json.loads(path.read_text())
        for key, new in changes.items():
            if new is ...:
                value.pop(key, None)
            else:
                value[key] = new
        path.write_text(json.dumps(value))

    return change
