"""Soak: a long random life of an online engine on a tiny model, with everything that goes wrong.

    python examples/soak.py --requests 100000

Random adapters and lengths, callers that leave or are cancelled, deadlines, bad inputs, unknown
adapters, files that vanish for a while, loads that fail, and reloads under the same name with other
weights. It ends with an error unless every request ended with an answer or its own error; no page,
task or stream is left; resident memory is flat after a warm-up; and 1 % of the answers are what the
requests get alone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import gc
import itertools
import os
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

from checkpoints.hf_llama import open_llama
from checkpoints.synthetic import write_synthetic_adapter, write_synthetic_llama
from slora_jax import (
    LLM,
    AdapterError,
    AdapterLoadError,
    AdapterNotFoundError,
    AsyncLLM,
    CapacityError,
    DeadlineExceededError,
    InvalidRequestError,
    OverloadedError,
    SamplingParams,
)

NUM_NAMES = 40
NUM_CONTENTS = 120
"""Different adapters that the names stand for, one after the other."""
HOST_BYTES = 5 * 2**20
"""Of the 7 MiB that 40 adapters take, so that some are read from their files again and again."""
CALLERS = 24
SAMPLE = 0.01
TARGETS = (("q", "v"), ("q", "k", "v", "o"), ("gate", "up", "down"))
BAD = (
    lambda: ([], None, None),
    lambda: ([1] * 500, None, None),
    lambda: ([10**6], None, None),
    lambda: ({"text": "?"}, None, None),
    lambda: ([1], 7, None),
    lambda: ([1], None, {"max_tokens": 0}),
    lambda: ([1], None, {"no_such_field": 1}),
)
RSS_SLACK_BYTES = 24 * 2**20


def resident_bytes() -> int:
    """Of this process, as Linux counts them."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclasses.dataclass(eq=False)
class Name:
    """An adapter's name and what it stands for."""

    name: str
    content: int
    changes: int = 0
    """Reloads begun and ended: odd while one is under way."""
    is_hidden: bool = False
    """Its files are somewhere else."""
    was_hidden: bool = False


@dataclasses.dataclass(frozen=True)
class Sample:
    """An answer to check."""

    prompt: list[int]
    content: int | None
    params: SamplingParams
    tokens: tuple[int, ...]


class Soak:
    """The world around one engine."""

    def __init__(self, directory: Path, seed: int, minutes: float):
        self.rng = random.Random(seed)
        self.directory = directory
        write_synthetic_llama(directory / "model", seed=seed)
        config = open_llama(directory / "model").config
        for content in range(NUM_CONTENTS):
            write_synthetic_adapter(
                self.path(content),
                config,
                seed=content,
                rank=1 + content % 16,
                targets=TARGETS[content % 3],
                scale=2.0,
            )
        self.names = [Name(f"user {k}", k) for k in range(NUM_NAMES)]
        self.asked = 0
        self.until = time.monotonic() + 60 * minutes
        self.outcomes: Counter[str] = Counter()
        self.samples: list[Sample] = []
        self.memory: list[tuple[int, int]] = []  # (requests, bytes)

    def path(self, content: int) -> Path:
        """Where an adapter's files are, unless hidden."""
        return self.directory / "adapters" / str(content)

    def make_llm(self, seats: int) -> LLM:
        """Tiny, and short of everything."""
        llm = LLM(
            self.directory / "model",
            dtype="float32",
            kernels="xla",
            max_num_seqs=seats,
            prefill_tile=8,
            max_num_batched_tokens=32,
            max_model_len=64,
            page_size=16,
            pool_bytes=2**20,
            scheduler="vtc",
            host_adapter_bytes=HOST_BYTES,
            progress=False,
        )
        for name in self.names:
            llm.load_adapter(name.name, self.path(name.content))
        llm.warm_up()
        return llm

    # -- callers ----------------------------------------------------------------------------------

    async def caller(self, engine: AsyncLLM, requests: int) -> None:
        """One thing after the other until enough has been asked for."""
        while self.asked < requests and time.monotonic() < self.until:
            self.asked += 1
            dice = self.rng.random()
            if dice < 0.03:
                await self.ask_badly(engine)
            elif dice < 0.04:
                await self.ask_nobody(engine)
            elif dice < 0.10:
                await self.leave(engine)
            elif dice < 0.12:
                await self.be_cancelled(engine)
            else:
                await self.ask(engine)
            if self.rng.random() < 0.004:
                await self.reload(engine)
            if self.rng.random() < 0.004:
                self.hide_or_show()
            if self.rng.random() < 0.001:
                await self.load_in_vain(engine)
            if self.asked % max(requests // 100, 1) == 0:
                await self.note_memory(engine)

    async def note_memory(self, engine: AsyncLLM) -> None:
        """A hundred times, and tell every tenth."""
        if self.memory and self.memory[-1][0] == self.asked:
            return
        self.memory.append((self.asked, resident_bytes()))
        if len(self.memory) % 10 == 0:
            compiles = (await engine.stats()).compiles
            mib = self.memory[-1][1] / 2**20
            print(f"{self.asked} requests, {mib:.0f} MiB, {compiles} programs", flush=True)

    def request(self) -> tuple[list[int], Name | None, SamplingParams, dict]:
        """A good one."""
        rng = self.rng
        prompt = [rng.randrange(256) for _ in range(rng.randint(1, 24))]
        popular = self.names[int(NUM_NAMES * rng.random() ** 2)]
        name = None if rng.random() < 0.1 else popular
        how = {"temperature": 0} if rng.random() < 0.7 else {"seed": rng.randrange(2**31)}
        params = SamplingParams(max_tokens=rng.randint(1, 8), ignore_eos=True, **how)
        options = {"client_id": str(rng.randrange(50)), "priority": rng.randrange(2)}
        if rng.random() < 0.02:
            options["ttft_slo"] = 0.02
        return prompt, name, params, options

    async def ask(self, engine: AsyncLLM) -> None:
        """A request whose answer may be checked."""
        prompt, name, params, options = self.request()
        content = None if name is None else name.content
        changes = changes_now = 0 if name is None else name.changes
        output = None
        try:
            async for output in engine.generate(prompt, name and name.name, params, **options):
                if name is not None and len(output.outputs[0].token_ids) == 1:
                    changes_now = name.changes
        except AdapterNotFoundError:
            assert name is not None
            assert changes % 2 or name.changes != changes
            self.outcomes["between two loads"] += 1
        except AdapterLoadError:
            assert name is not None
            assert name.was_hidden, "its files were there all the time"
            self.outcomes["files are gone"] += 1
        except (DeadlineExceededError, OverloadedError) as error:
            self.outcomes[type(error).__name__] += 1
        else:
            assert output is not None
            assert output.finished
            assert len(output.outputs[0].token_ids) == params.max_tokens
            self.outcomes["answered"] += 1
            is_known = name is None or (changes % 2 == 0 and changes_now == changes)
            if is_known and self.rng.random() < SAMPLE:
                tokens = output.outputs[0].token_ids
                self.samples.append(Sample(prompt, content, params, tokens))

    async def ask_badly(self, engine: AsyncLLM) -> None:
        """Something that is refused."""
        prompt, adapter, params = self.rng.choice(BAD)()
        try:
            async for _ in engine.generate(prompt, adapter, params):
                raise AssertionError("it was taken")
        except (InvalidRequestError, CapacityError, OverloadedError):
            self.outcomes["refused"] += 1

    async def ask_nobody(self, engine: AsyncLLM) -> None:
        """An adapter that there is not."""
        try:
            async for _ in engine.generate([1, 2], f"nobody {self.rng.random()}"):
                raise AssertionError("it was taken")
        except (AdapterNotFoundError, OverloadedError):
            self.outcomes["refused"] += 1

    async def leave(self, engine: AsyncLLM) -> None:
        """Stop listening after some outputs."""
        prompt, name, params, options = self.request()
        outputs = engine.generate(prompt, name and name.name, params, **options)
        stop = self.rng.randint(1, 3)
        with contextlib.suppress(AdapterError, DeadlineExceededError, OverloadedError):
            async for _ in outputs:
                stop -= 1
                if not stop:
                    break
        await outputs.aclose()
        self.outcomes["left"] += 1

    async def be_cancelled(self, engine: AsyncLLM) -> None:
        """A task that is cancelled at any time."""
        prompt, name, params, options = self.request()

        async def listen() -> None:
            async for _ in engine.generate(prompt, name and name.name, params, **options):
                pass

        task = asyncio.create_task(listen())
        await asyncio.sleep(self.rng.random() * 0.03)
        task.cancel()
        with contextlib.suppress(
            asyncio.CancelledError, AdapterError, DeadlineExceededError, OverloadedError
        ):
            await task
        self.outcomes["cancelled"] += 1

    # -- what happens to adapters -----------------------------------------------------------------

    async def reload(self, engine: AsyncLLM) -> None:
        """Another adapter under the same name."""
        name = self.rng.choice(self.names)
        if name.changes % 2 or name.is_hidden:
            return
        taken = {other.content for other in self.names}
        content = self.rng.choice([c for c in range(NUM_CONTENTS) if c not in taken])
        name.changes += 1
        name.content = content  # taken at once, so that no other name takes it
        await engine.unload_adapter(name.name)
        await engine.load_adapter(name.name, self.path(content))
        name.changes += 1
        self.outcomes["(reloads)"] += 1

    def hide_or_show(self) -> None:
        """Files vanish for a while."""
        name = self.rng.choice(self.names)
        if name.changes % 2:
            return
        path, elsewhere = self.path(name.content), self.directory / f"hidden {name.content}"
        if name.is_hidden:
            elsewhere.rename(path)
        else:
            path.rename(elsewhere)
        name.is_hidden = not name.is_hidden
        name.was_hidden = True
        self.outcomes["(files hidden or shown)"] += 1

    async def load_in_vain(self, engine: AsyncLLM) -> None:
        """A load that fails."""
        with contextlib.suppress(AdapterLoadError):
            await engine.load_adapter("never", self.directory / "model")
            raise AssertionError("it was loaded")
        self.outcomes["(failed loads)"] += 1

    # -- the end ----------------------------------------------------------------------------------

    def check_samples(self, llm: LLM) -> None:
        """Each sampled answer against the request alone."""
        for name in self.names:
            if name.is_hidden:
                (self.directory / f"hidden {name.content}").rename(self.path(name.content))
            llm.unload_adapter(name.name)
        by_content = sorted(self.samples, key=lambda s: -1 if s.content is None else s.content)
        for content, samples in itertools.groupby(by_content, key=lambda s: s.content):
            if content is not None:
                llm.load_adapter("alone", self.path(content))
            for sample in samples:
                (output,) = llm.generate(
                    [sample.prompt],
                    None if content is None else "alone",
                    sample.params,
                    progress=False,
                )
                assert output.outputs[0].token_ids == sample.tokens, sample
            if content is not None:
                llm.unload_adapter("alone")

    def check_memory(self) -> tuple[float, float]:
        """Mean MiB after the warm-up and at the end; the latter must not be more by a slack."""
        third = len(self.memory) // 3
        middle, late = self.memory[third : 2 * third], self.memory[-third:]
        before, after = (sum(b for _, b in part) / max(len(part), 1) for part in (middle, late))
        assert after <= before + RSS_SLACK_BYTES, f"{before / 2**20:.1f} → {after / 2**20:.1f} MiB"
        return before / 2**20, after / 2**20


async def run(soak: Soak, llm: LLM, requests: int) -> None:
    """Everything but the checks of answers."""
    async with AsyncLLM(llm, max_waiting=CALLERS) as engine:
        before = len(asyncio.all_tasks())
        await asyncio.gather(*(soak.caller(engine, requests) for _ in range(CALLERS)))
        while (await engine.stats()).requests_running:  # those who left
            await asyncio.sleep(0.001)
        assert len(asyncio.all_tasks()) == before, asyncio.all_tasks()
        await engine.drain()
        assert not engine._streams
    ended = sum(n for what, n in soak.outcomes.items() if not what.startswith("("))
    assert ended == soak.asked, (ended, soak.asked)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seats", type=int, default=8, help="requests that run at once")
    parser.add_argument("--minutes", type=float, default=1e9, help="ask for no more after these")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), args.seed, args.minutes)
        with soak.make_llm(args.seats) as llm:
            start = time.monotonic()
            asyncio.run(run(soak, llm, args.requests))
            seconds = time.monotonic() - start
            stats = llm.stats()
            engine = llm.engine
            engine.scheduler.check_invariants()
            assert (stats.requests_running, stats.requests_waiting, stats.pages_kv) == (0, 0, 0)
            assert stats.pages_free + stats.pages_adapters == stats.pages_total
            engine.store.check({})
            soak.check_samples(llm)
            del engine
            gc.collect()
            before, after = soak.check_memory()
        print(f"{soak.asked} requests in {seconds:.0f} s: {dict(soak.outcomes)}")
        print(f"resident memory {before:.1f} MiB after the warm-up, {after:.1f} at the end")
        print(f"{len(soak.samples)} answers equal to those of the requests alone")
        print(stats)


if __name__ == "__main__":
    main()
