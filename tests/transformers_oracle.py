"""transformers + PEFT as an oracle: one prompt at a time, adapters beside the base, float32, CPU.

Imports PyTorch when it is used, so that tests that are skipped without it can import this module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


class TransformersModel:
    """A base model with its adapters, as PEFT serves them: never merged."""

    def __init__(self, directory: Path, adapters: Mapping[str, Path]):
        import torch
        import transformers
        from peft import PeftModel

        torch.set_num_threads(1)  # two of them wait for each other where the cores are shared
        base = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, local_files_only=True
        )
        for name, path in adapters.items():
            if isinstance(base, PeftModel):
                base.load_adapter(path, adapter_name=name)
            else:
                base = PeftModel.from_pretrained(base, path, adapter_name=name)
        self.model: Any = base.eval()

    def generate(
        self,
        prompt: Sequence[int],
        adapter: str | None,
        max_tokens: int,
        *,
        eos_token_ids: Sequence[int],
    ) -> tuple[list[int], np.ndarray]:
        """Greedy: (tokens, the one that ends them included; f32[tokens, vocab] raw logits)."""
        import torch

        with self._active(adapter), torch.inference_mode():
            result = self.model.generate(
                input_ids=torch.tensor([list(prompt)]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                do_sample=False,
                max_new_tokens=max_tokens,
                eos_token_id=list(eos_token_ids) or -1,
                pad_token_id=0,
                use_cache=True,
                output_logits=True,
                return_dict_in_generate=True,
            )
        tokens = result.sequences[0, len(prompt) :].tolist()
        return tokens, torch.cat(result.logits).numpy()

    def logits(self, token_ids: Sequence[int], adapter: str | None) -> np.ndarray:
        """f32[tokens, vocab]: row t predicts token t + 1."""
        import torch

        with self._active(adapter), torch.inference_mode():
            return self.model(torch.tensor([list(token_ids)])).logits[0].numpy()

    def _active(self, adapter: str | None) -> contextlib.AbstractContextManager[None]:
        if adapter is None:
            return self.model.disable_adapter()
        self.model.set_adapter(adapter)
        return contextlib.nullcontext()
