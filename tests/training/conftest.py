"""One tiny base for all tests of training: loaded once, never written to."""

import pytest

from checkpoints.synthetic import write_synthetic_llama
from slora_jax import LoadedModel, load_base_model


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("training") / "model"
    write_synthetic_llama(directory, seed=3, num_layers=2)
    return directory


@pytest.fixture(scope="session")
def base(model_directory) -> LoadedModel:
    return load_base_model(model_directory, progress=False)
