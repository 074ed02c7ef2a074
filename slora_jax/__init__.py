"""slora-jax: thousands of LoRA adapters of one Llama base model, served together by JAX."""

from slora_jax.adapter_store import AdapterInfo as AdapterInfo
from slora_jax.async_llm import AsyncLLM as AsyncLLM
from slora_jax.base_model import load_base_model as load_base_model
from slora_jax.base_model import merge_adapter as merge_adapter
from slora_jax.base_model import save_adapter as save_adapter
from slora_jax.base_model import write_llama as write_llama
from slora_jax.config import EngineConfig as EngineConfig
from slora_jax.data_parallel import DataParallelLLM as DataParallelLLM
from slora_jax.errors import AdapterError as AdapterError
from slora_jax.errors import AdapterInUseError as AdapterInUseError
from slora_jax.errors import AdapterLoadError as AdapterLoadError
from slora_jax.errors import AdapterNotFoundError as AdapterNotFoundError
from slora_jax.errors import CapacityError as CapacityError
from slora_jax.errors import ConfigError as ConfigError
from slora_jax.errors import DeadlineExceededError as DeadlineExceededError
from slora_jax.errors import EngineClosedError as EngineClosedError
from slora_jax.errors import EngineInUseError as EngineInUseError
from slora_jax.errors import HostLostError as HostLostError
from slora_jax.errors import InvalidRequestError as InvalidRequestError
from slora_jax.errors import ModelLoadError as ModelLoadError
from slora_jax.errors import OverloadedError as OverloadedError
from slora_jax.errors import RequestFailedError as RequestFailedError
from slora_jax.errors import SloraError as SloraError
from slora_jax.errors import TrainingError as TrainingError
from slora_jax.llm import LLM as LLM
from slora_jax.loading import LoadedModel as LoadedModel
from slora_jax.outputs import CompletionOutput as CompletionOutput
from slora_jax.outputs import EngineStats as EngineStats
from slora_jax.outputs import Logprob as Logprob
from slora_jax.outputs import RequestMetrics as RequestMetrics
from slora_jax.outputs import RequestOutput as RequestOutput
from slora_jax.sampling_params import SamplingParams as SamplingParams

__version__ = "0.1.0"

__all__ = [
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
