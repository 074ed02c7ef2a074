"""What the end-to-end tests share: tiny models on disk with the answers they must give, and taps on
a running engine that show its logits, spoil its unowned pages, or put words in its mouth.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints.hf_llama import LlamaCheckpoint, open_llama
from checkpoints.peft_lora import read_peft_adapter
from checkpoints.synthetic import write_synthetic_adapter, write_synthetic_llama
from slora_jax import LLM
from slora_jax.config import EngineConfig
from slora_jax.engine import Engine
from slora_jax.input_packing import first_rows
from slora_jax.model_runner import LaunchedStep
from slora_jax.page_allocator import NULL_PAGE
from slora_jax.transfer import unpack
from tests.oracle import DenseLlama


@dataclasses.dataclass(eq=False)
class TinyModel:
    """A random model and adapters in their on-disk forms, with the dense oracle's answers."""

    directory: Path
    checkpoint: LlamaCheckpoint
    adapters: dict[str, Path]
    _oracles: dict[str | None, DenseLlama] = dataclasses.field(default_factory=dict)
    _greedy: dict[tuple[Any, ...], list[int]] = dataclasses.field(default_factory=dict)

    @classmethod
    def write(
        cls, directory: Path, adapters: dict[str, dict[str, Any]], **model_options: Any
    ) -> TinyModel:
        """``adapters``: name → options of ``write_synthetic_adapter``; all have their own seed."""
        write_synthetic_llama(directory / "model", **model_options)
        checkpoint = open_llama(directory / "model")
        paths = {}
        for seed, (name, options) in enumerate(adapters.items(), start=1):
            paths[name] = directory / "adapters" / name
            write_synthetic_adapter(paths[name], checkpoint.config, **{"seed": seed, **options})
        return cls(directory / "model", checkpoint, paths)

    def serve(self, **options: Any) -> LLM:
        """An engine with all adapters loaded."""
        llm = LLM(self.directory, progress=False, **{"dtype": "float32", **options})
        for name, path in self.adapters.items():
            llm.load_adapter(name, path)
        return llm

    def oracle(self, adapter: str | None) -> DenseLlama:
        if adapter not in self._oracles:
            config = self.checkpoint.config
            read = read_peft_adapter(self.adapters[adapter], config) if adapter else None
            self._oracles[adapter] = DenseLlama(self.checkpoint, read)
        return self._oracles[adapter]

    def greedy(self, prompt: Sequence[int], adapter: str | None, num_tokens: int) -> list[int]:
        """The oracle's continuation, whatever ends it; computed once."""
        known = self._greedy.setdefault((tuple(prompt), adapter), [])
        if len(known) < num_tokens:
            missing = num_tokens - len(known)
            known += self.oracle(adapter).greedy([*prompt, *known], missing)
        return known[:num_tokens]


@contextlib.contextmanager
def fresh_engine(
    llm: LLM, adapters: Mapping[str, Path], *, num_pages: int | None = None, **options: Any
) -> Iterator[LLM]:
    """``llm`` with an engine in which nothing has happened yet, on the programs compiled already.

    ``num_pages``: use only so many pages of the pool, the null page included. Not to be nested:
    the engines share the pool.
    """
    old = llm._engine
    runner = old._runner
    runner._adapters.clear()
    llm._engine = Engine(
        runner,
        llm.tokenizer,
        EngineConfig(**options),
        num_pages=num_pages or old.allocator.num_usable + 1,
        max_model_len=old.max_model_len,
        vocab_size=old._vocab_size,
        eos_token_ids=old._eos_token_ids,
    )
    try:
        for name, path in adapters.items():
            llm.load_adapter(name, path)
        yield llm
    finally:
        llm._engine = old


def random_prompts(lengths: Sequence[int], *, seed: int = 0, vocab: int = 256) -> list[list[int]]:
    """Prompts of byte tokens."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, vocab, length).tolist() for length in lengths]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


Logits = dict[str, dict[int, np.ndarray]]
"""Request id → position → f32[vocab]."""


@contextlib.contextmanager
def recorded_logits(llm: LLM) -> Iterator[Logits]:
    """The full logits of every token that the engine computes, prompt and output, as it serves."""
    runner, model = llm._engine._runner, llm._loaded.model
    forward, launch = runner._forward, runner.launch
    recorded: Logits = {}
    steps: list[tuple[Any, jax.Array]] = []

    def recording_forward(pool, sampled, packed):
        hidden, pool = forward(pool, sampled, packed)
        steps.append((unpack(packed), hidden.all))
        return hidden, pool

    recording_forward.num_compiles = forward.num_compiles

    def recording_launch(output):
        launched = launch(output)
        batch, hidden = steps.pop()
        logits = np.asarray(model.logits(hidden))
        rows = first_rows(output, batch.attention.num_decode, batch.attention.tile)
        for chunk, first in zip((*output.decode, *output.prefill), rows, strict=True):
            here = logits[first : first + chunk.num_tokens]
            known = recorded.setdefault(chunk.request.request_id, {})
            known.update(enumerate(here, start=chunk.start))
        return launched

    runner._forward, runner.launch = recording_forward, recording_launch
    try:
        yield recorded
    finally:
        runner._forward = forward
        del runner.launch


@functools.partial(jax.jit, donate_argnums=0)
def _with_nan(pool, is_poisoned):
    return tuple(jnp.where(is_poisoned[:, None, None], jnp.nan, layer) for layer in pool)


@contextlib.contextmanager
def poisoned_pages(llm: LLM) -> Iterator[None]:
    """Every page that nobody owns holds NaN, the null page too, whenever a step computes.

    A page is poisoned while it is free, so a new owner finds NaN wherever it has not written.
    """
    engine, runner = llm._engine, llm._engine._runner
    step, launch = engine.step, runner.launch

    def poison() -> None:
        is_poisoned = np.ones(len(runner.pool[0]), bool)
        for pages in engine.allocator.owners().values():
            is_poisoned[pages] = False
        assert is_poisoned[NULL_PAGE]
        runner.pool = _with_nan(runner.pool, is_poisoned)

    def poisoning_step():
        poison()
        return step()

    def poisoning_launch(output):
        poison()  # a swap-in has just written zeros to the null page
        return launch(output)

    engine.step, runner.launch = poisoning_step, poisoning_launch
    try:
        yield
    finally:
        del engine.step, runner.launch


@contextlib.contextmanager
def scripted_tokens(llm: LLM, tokens: Sequence[int]) -> Iterator[None]:
    """Every request generates ``tokens``, whatever the model says."""
    runner = llm._engine._runner
    launch = runner.launch

    def scripted_launch(output):
        launched = launch(output)

        def read():
            result = LaunchedStep.read(launched)
            for request in launched.ending:
                if not request.is_finished:
                    result.tokens[request.request_id] = tokens[len(request.output_token_ids)]
            return result

        object.__setattr__(launched, "read", read)
        return launched

    runner.launch = scripted_launch
    try:
        yield
    finally:
        del runner.launch


def assert_only_idle_adapters_left(llm: LLM) -> None:
    """Nothing waits or runs, and each page is free or an adapter's that nobody uses."""
    engine, stats = llm._engine, llm.stats()
    engine.scheduler.check_invariants()
    assert (stats.requests_running, stats.requests_waiting, stats.pages_kv) == (0, 0, 0)
    assert stats.pages_free + stats.pages_adapters == stats.pages_total
    assert not engine._running
