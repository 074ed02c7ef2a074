"""The public names: exactly these, each documented, and the tree of errors as it is drawn."""

import inspect
import re

import pytest

import slora_jax
from slora_jax import errors

PUBLIC_NAMES = [
    "LLM",
    "AdapterError",
    "AdapterInUseError",
    "AdapterInfo",
    "AdapterLoadError",
    "AdapterNotFoundError",
    "AsyncLLM",
    "CapacityError",
    "CompletionOutput",
    "ConfigError",
    "DataParallelLLM",
    "DeadlineExceededError",
    "EngineClosedError",
    "EngineConfig",
    "EngineInUseError",
    "EngineStats",
    "HostLostError",
    "InvalidRequestError",
    "LoadedModel",
    "Logprob",
    "ModelLoadError",
    "OverloadedError",
    "RequestFailedError",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "SloraError",
    "TrainingError",
    "load_base_model",
    "merge_adapter",
    "save_adapter",
    "write_llama",
]

ERRORS = {
    name: value
    for name, value in vars(errors).items()
    if inspect.isclass(value) and value.__module__ == errors.__name__
}


def test_public_names():
    assert sorted(slora_jax.__all__) == sorted(PUBLIC_NAMES)


def test_every_error_is_public():
    assert {name: getattr(slora_jax, name) for name in ERRORS} == ERRORS


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_public_name_is_documented(name):
    value = getattr(slora_jax, name)
    assert value.__module__.partition(".")[0] == "slora_jax"
    assert value.__doc__
    # A dataclass without a docstring of its own gets its signature for one.
    assert not value.__doc__.startswith(f"{name}(")
    for attribute, member in vars(value).items():
        if not attribute.startswith("_") and (
            inspect.isroutine(member) or isinstance(member, property | classmethod | staticmethod)
        ):
            assert inspect.getdoc(member), f"{name}.{attribute} has no docstring"


def test_error_tree_is_as_drawn():
    drawn, ancestors = {}, []
    for line in errors.__doc__.splitlines():
        branch = re.match(r"    ([│ ]*(?:[├└]── )?)([A-Z]\w*Error)\b", line)
        if branch is None:
            continue
        depth, name = len(branch[1]) // 4, branch[2]
        ancestors[depth:] = [name]
        drawn[name] = ancestors[depth - 1] if depth else None
    defined = {
        name: next((base.__name__ for base in value.__bases__ if base in ERRORS.values()), None)
        for name, value in ERRORS.items()
    }
    assert drawn == defined
