"""Whatever else is served, a request's tokens are those of the request alone.

Hypothesis draws schedules: arrivals between steps, prompts up to two chunks and more, adapters,
aborts, reloads under a name in use, in pools so small that adapters are evicted and requests
preempted. Pages that nobody owns hold NaN at every step, the null page that padding reads and
writes among them, so one number read from the wrong place spoils the output.
"""

import dataclasses
from collections import Counter

import hypothesis
import hypothesis.strategies as st
import pytest

from slora_jax import LLM, SamplingParams
from slora_jax.engine import Generation
from tests.engine.conftest import SERVED, TILE
from tests.serving import (
    TinyModel,
    assert_only_idle_adapters_left,
    fresh_engine,
    poisoned_pages,
    random_prompts,
)

MOST_TOKENS = 34  # two pages more than a prompt fills
TEXTS = random_prompts((60, 60, 60), seed=7)
SAMPLING = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 0.9, "seed": 3},
    "truncated": {"temperature": 1.3, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "seed": 2**40},
}
PAGES = {None: 0, "attention": 8, "mlp": 6, "all": 14, "qv": 4, "wide": 2}
"""That each adapter takes of the pool."""


@dataclasses.dataclass(frozen=True)
class Add:
    text: int
    length: int
    adapter: str | None
    sampling: str
    max_tokens: int
    n: int = 1

    @property
    def prompt(self) -> list[int]:
        return TEXTS[self.text][: self.length]

    @property
    def params(self) -> SamplingParams:
        n = 1 if self.sampling == "greedy" else self.n
        options = SAMPLING[self.sampling]
        return SamplingParams(**options, n=n, max_tokens=self.max_tokens, ignore_eos=True)

    @property
    def pages_alone(self) -> int:
        """The smallest pool that it can run in."""
        return PAGES[self.adapter] - -(self.length + self.max_tokens - 1) // SERVED["page_size"]


@dataclasses.dataclass(frozen=True)
class Step:
    count: int


@dataclasses.dataclass(frozen=True)
class Abort:
    which: int


@dataclasses.dataclass(frozen=True)
class Reload:
    """Unload "all" and load other weights under that name."""


Event = Add | Step | Abort | Reload


@dataclasses.dataclass(frozen=True)
class Schedule:
    spare_pages: int
    """Beyond what the largest request needs alone."""
    chunk_tokens: int
    events: tuple[Event, ...]

    @property
    def adds(self) -> list[Add]:
        return [event for event in self.events if isinstance(event, Add)]

    @property
    def adapters(self) -> set[str]:
        used = {add.adapter for add in self.adds if add.adapter}
        return used | {"all"} if Reload() in self.events else used

    @property
    def num_pages(self) -> int:
        """Of the pool, with the null page, and one that registering an adapter asks for."""
        largest = [add.pages_alone for add in self.adds]
        largest += [PAGES[name] + 1 for name in self.adapters]
        return 1 + max(largest) + self.spare_pages

    def weights(self) -> list[str | None]:
        """What each ``Add`` gets: those under its name when it comes."""
        result, all_is_new = [], False
        for event in self.events:
            if isinstance(event, Reload):
                all_is_new = not all_is_new
            elif isinstance(event, Add):
                renamed = event.adapter == "all" and all_is_new
                result.append("all_reloaded" if renamed else event.adapter)
        return result


def schedules() -> st.SearchStrategy[Schedule]:
    add = st.builds(
        Add,
        text=st.integers(0, len(TEXTS) - 1),
        length=st.integers(1, 60),
        adapter=st.sampled_from(list(PAGES)),
        sampling=st.sampled_from(list(SAMPLING)),
        max_tokens=st.integers(1, MOST_TOKENS),
        n=st.integers(1, 2),
    )
    step = st.builds(Step, st.integers(1, 8))
    abort, reload = st.builds(Abort, st.integers(0, 20)), st.just(Reload())
    burst = st.lists(add, min_size=3, max_size=6)
    rest = st.lists(add | step | step | abort | reload, min_size=4, max_size=12)
    return st.builds(
        Schedule,
        spare_pages=st.integers(0, 6),
        chunk_tokens=st.sampled_from([TILE, 2 * TILE, 4 * TILE]),
        events=st.tuples(burst, rest).map(lambda parts: (*parts[0], *parts[1])),
    )


CROWDED = Schedule(
    spare_pages=0,
    chunk_tokens=2 * TILE,
    events=(
        Add(text=0, length=12, adapter="wide", sampling="greedy", max_tokens=34),
        Add(text=1, length=15, adapter=None, sampling="sampled", max_tokens=34, n=2),
        Add(text=2, length=20, adapter="qv", sampling="truncated", max_tokens=20),
        Step(4),
        Add(text=2, length=7, adapter="wide", sampling="sampled", max_tokens=30),
        Add(text=0, length=31, adapter=None, sampling="greedy", max_tokens=9),
    ),
)
RELOADED = Schedule(
    spare_pages=2,
    chunk_tokens=TILE,
    events=(
        Add(text=0, length=33, adapter="all", sampling="greedy", max_tokens=9),
        Step(1),
        Reload(),
        Add(text=0, length=33, adapter="all", sampling="greedy", max_tokens=9),
        Add(text=1, length=9, adapter="mlp", sampling="greedy", max_tokens=3),
        Step(6),
        Reload(),
        Abort(0),
        Add(text=0, length=33, adapter="all", sampling="greedy", max_tokens=9),
    ),
)


class Alone:
    """What each completion must be: the oracle's greedy tokens, or those of a roomy engine."""

    def __init__(self, compiled_llm: LLM, tiny: TinyModel):
        self._compiled_llm, self._tiny = compiled_llm, tiny

    def tokens(self, add: Add, weights: str | None) -> list[list[int]]:
        """One list for each of the ``n`` completions."""
        if add.sampling == "greedy":
            return [self._tiny.greedy(add.prompt, weights, MOST_TOKENS)[: add.max_tokens]]
        seed = add.params.seed
        return [
            self._sampled(add.prompt, weights, dataclasses.replace(add.params, n=1, seed=seed + k))
            for k in range(add.params.n)
        ]

    def _sampled(self, prompt: list[int], weights: str | None, params: SamplingParams) -> list[int]:
        path = {weights: self._tiny.adapters[weights]} if weights else {}
        with fresh_engine(self._compiled_llm, path, **SERVED, max_num_batched_tokens=32) as llm:
            (output,) = llm.generate(prompt, weights, params, progress=False)
        return list(output.outputs[0].token_ids)


@dataclasses.dataclass
class Ledger:
    """What was asked of an engine, and what must come of it."""

    llm: LLM
    tiny: TinyModel
    generations: list[Generation] = dataclasses.field(default_factory=list)
    aborted: set[int] = dataclasses.field(default_factory=set)
    evicted: set[int] = dataclasses.field(default_factory=set)
    counts: Counter[str] = dataclasses.field(default_factory=Counter)

    def play(self, events: tuple[Event, ...]) -> None:
        engine = self.llm._engine
        all_is_new = False
        for event in events:
            match event:
                case Add():
                    new = engine.add_request(event.prompt, event.params, event.adapter)
                    self.generations.append(new)
                case Step():
                    for _ in range(event.count):
                        self.step()
                case Abort() if self.generations:
                    self.abort(event.which % len(self.generations))
                case Reload():
                    all_is_new = not all_is_new
                    self.reload("all_reloaded" if all_is_new else "all")
        while engine.has_unfinished:
            self.step()

    def step(self) -> None:
        engine = self.llm._engine
        if engine.has_unfinished:
            before = set(engine.cache.resident())
            engine.step()
            engine.scheduler.check_invariants()
            resident = set(engine.cache.resident())
            self.counts["brought back"] += len(resident & self.evicted)
            self.evicted = (self.evicted | before) - resident

    def abort(self, index: int) -> None:
        generation = self.generations[index]
        if not generation.finished:
            self.aborted.add(index)
            self.counts["aborted halfway"] += generation.num_output_tokens > 0
            self.llm._engine.abort(generation)

    def reload(self, weights: str) -> None:
        busy = [g for g in self.generations if g.adapter_id == "all" and not g.finished]
        self.counts["reloaded in use"] += bool(busy)
        self.llm.unload_adapter("all")
        self.llm.load_adapter("all", self.tiny.adapters[weights])

    def check(self, expected: list[list[list[int]]]) -> None:
        for index, generation in enumerate(self.generations):
            for completion, tokens in zip(generation.completions, expected[index], strict=True):
                request = completion.request
                if index in self.aborted and request.finish_reason == "abort":
                    assert request.output_token_ids == tokens[: len(request.output_token_ids)]
                else:
                    assert request.output_token_ids == tokens
                    assert request.finish_reason == "length"


@pytest.mark.slow
def test_a_request_in_company_equals_the_request_alone(compiled_llm: LLM, tiny: TinyModel):
    alone = Alone(compiled_llm, tiny)
    seen: Counter[str] = Counter()

    @hypothesis.settings(max_examples=hypothesis.settings.default.max_examples // 3)
    @hypothesis.example(CROWDED)
    @hypothesis.example(RELOADED)
    @hypothesis.given(schedules())
    def check(schedule: Schedule) -> None:
        expected = list(map(alone.tokens, schedule.adds, schedule.weights()))
        adapters = {name: tiny.adapters[name] for name in sorted(schedule.adapters)}
        options = {**SERVED, "max_num_batched_tokens": schedule.chunk_tokens}
        with (
            fresh_engine(compiled_llm, adapters, num_pages=schedule.num_pages, **options) as llm,
            poisoned_pages(llm),
        ):
            ledger = Ledger(llm, tiny)
            ledger.play(schedule.events)
            ledger.check(expected)
            assert_only_idle_adapters_left(llm)
            seen.update(ledger.counts)
            seen.update(evictions=llm.stats().evictions, preemptions=llm.stats().preemptions)

    check()
    rare = ("evictions", "preemptions", "brought back", "aborted halfway", "reloaded in use")
    assert all(seen[what] for what in rare), seen
