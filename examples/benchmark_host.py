"""The host's own time a step in steady decode: schedule, pack, launch, read, with no device behind.

    python examples/benchmark_host.py [--adapters 0 128] [--running 1 32 128 256]

The engine is whole but for the programs: they return at once what is always the same. Pages of 16
tokens, 32 layers, sizes of steps as for the GPU kernels. CPU time of the thread, the best of some
rounds, garbage collection off: what a GPU's host adds is dispatching the real programs.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints.synthetic import write_synthetic_llama
from slora_jax import LLM, EngineConfig, SamplingParams, model_runner
from slora_jax.engine import Engine
from slora_jax.forward_programs import Hidden
from slora_jax.model_runner import row_buckets, step_buckets

MAX_RUNNING, MAX_PREFILL_TOKENS, TILE, NUM_PAGES = 256, 512, 16, 30_000


class Forward:
    """Stands for the compiled step."""

    def __init__(self) -> None:
        self.num_bytes = 0
        """That the last step was sent."""
        self._hidden = Hidden(jnp.zeros((1, 8)), jnp.zeros((MAX_RUNNING, 8)))

    def __call__(self, pool: Any, sampled: jax.Array, packed: Any) -> tuple[Hidden, Any]:
        """The same at once, whatever it is given."""
        self.num_bytes = packed.words.nbytes
        return self._hidden, pool

    def num_compiles(self) -> int:
        """None."""
        return 0


class Sample:
    """Stands for the sampler."""

    def __init__(self, token_ids: list[int]):
        choices = np.random.default_rng(0).choice(np.array(token_ids, np.int32), (64, MAX_RUNNING))
        self._tokens = [jnp.asarray(row) for row in choices]
        self._calls = 0

    def __call__(self, *args: Any, **options: Any) -> tuple[jax.Array, None]:
        """Tokens at once, no log-probabilities."""
        self._calls += 1
        return self._tokens[self._calls % len(self._tokens)], None

    def __len__(self) -> int:
        return 0


def engine_without_device(directory: Path) -> tuple[LLM, Forward]:
    """An engine that thinks it has ``NUM_PAGES`` pages."""
    llm = LLM(
        directory,
        load="dummy",
        progress=False,
        max_num_seqs=MAX_RUNNING,
        max_num_batched_tokens=MAX_PREFILL_TOKENS,
        prefill_tile=TILE,
        page_size=16,
        max_model_len=1024,
        pool_bytes=2**27,
    )
    runner = llm.engine._runner
    llm._engine = Engine(
        runner,
        llm.tokenizer,
        EngineConfig(),
        num_pages=NUM_PAGES,
        max_model_len=1024,
        vocab_size=llm.vocab_size,
        eos_token_ids=(),
    )
    runner._steps = step_buckets("gpu", MAX_RUNNING, MAX_PREFILL_TOKENS // TILE, TILE)
    runner._samples = row_buckets("gpu", MAX_RUNNING)
    runner._forward = forward = Forward()
    runner._sample = Sample(llm.tokenizer.encode("abcdefghijklmnopqrstuvwxyz .,"))
    model_runner.swap_in = lambda pool, pages, runs: pool  # there are fewer pages than it says
    return llm, forward


def measure(llm: LLM, running: int, names: list[str], args: argparse.Namespace) -> float:
    """Seconds of the thread's CPU time a step, the best of ``--rounds``."""
    engine = llm.engine
    params = SamplingParams(temperature=0, max_tokens=800, ignore_eos=True)
    generations = [
        engine.add_request([97] * 128, params, names[i % len(names)] if names else None)
        for i in range(running)
    ]
    while engine.scheduler.num_waiting:
        engine.step()
    for _ in range(8):
        engine.step()
    times = []
    gc.collect()
    gc.disable()
    for _ in range(args.rounds):
        begin = time.thread_time()
        for _ in range(args.steps):
            engine.step()
        times.append((time.thread_time() - begin) / args.steps)
    gc.enable()
    assert engine.scheduler.num_running == running
    for generation in generations:
        engine.abort(generation)
    while engine.has_unfinished:
        engine.step()
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=int, nargs="+", default=[0, 128])
    parser.add_argument("--running", type=int, nargs="+", default=[1, 32, 128, 256])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_synthetic_llama(folder, num_layers=32)
        llm, forward = engine_without_device(Path(folder))
        for count in args.adapters:
            names = [f"{count}-{i}" for i in range(count)]
            llm.load_dummy_adapters(names, [args.rank] * count, ["q", "k", "v", "o"])
            for running in args.running:
                seconds = measure(llm, running, names, args)
                print(
                    f"{count} adapters, {running} running: {1e3 * seconds:.3f} ms a step, "
                    f"{forward.num_bytes / 1000:.0f} kB sent",
                    flush=True,
                )


if __name__ == "__main__":
    main()
