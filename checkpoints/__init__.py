"""Files to numpy and back: Llama checkpoints, LoRA adapters, tokenizers, GGUF, Orbax.

This package owns the on-disk formats and their errors. It refuses to know the serving engine, the
kernels, devices (only `checkpoints.orbax` touches jax) and pickle: no file that could run code is
ever opened.
"""

from checkpoints.errors import CheckpointError

__all__ = ["CheckpointError"]
