"""Training LoRA adapters of the models that slora_jax serves. Needs the extra ``train`` (optax)."""

from slora_jax.training.data import Example as Example
from slora_jax.training.data import TrainingBatch as TrainingBatch
from slora_jax.training.data import batches as batches
from slora_jax.training.data import chat_example as chat_example
from slora_jax.training.forward import DenseLlama as DenseLlama
from slora_jax.training.lora import init_adapter as init_adapter
from slora_jax.training.lora import stack_adapter as stack_adapter
from slora_jax.training.lora import stack_scaling as stack_scaling
from slora_jax.training.lora import unstack_adapter as unstack_adapter
from slora_jax.training.trainer import Trainer as Trainer
from slora_jax.training.trainer import TrainingConfig as TrainingConfig

__all__ = [
    "DenseLlama",
    "Example",
    "Trainer",
    "TrainingBatch",
    "TrainingConfig",
    "batches",
    "chat_example",
    "init_adapter",
    "stack_adapter",
    "stack_scaling",
    "unstack_adapter",
]
