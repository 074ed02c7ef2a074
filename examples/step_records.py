"""What each step of a running engine did and how long it took, for the simulator's fit."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

from slora_jax.engine import Engine
from slora_jax.scheduler import SchedulerOutput
from slora_jax.simulator import StepWork


class StepRecorder:
    """Watches an engine's scheduler; ``stepped`` is to be called after each ``Engine.step``.

    The engine reads one step late. So a step's time is from its launch, or from the end of the one
    before where that is later, to the moment when its tokens have been read.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._schedule = engine.scheduler.schedule
        self._previous: tuple[StepWork, float] | None = None
        self._launched: tuple[StepWork, float] | None = None
        self._last_end = 0.0
        self.steps: list[tuple[StepWork, float]] = []
        engine.scheduler.schedule = self._watch

    def _watch(self) -> SchedulerOutput:
        output = self._schedule()
        self._launched = None
        if not output.is_empty:
            store = self._engine.store
            work = StepWork.of(output, lambda version: sum(store.info(version).ranks))
            self._launched = work, time.monotonic()
        return output

    def stepped(self) -> None:
        """The engine has launched one step and read the one before."""
        now = time.monotonic()
        if self._previous is not None:
            work, launched = self._previous
            self.steps.append((work, now - max(launched, self._last_end)))
            self._last_end = now
        self._previous = self._launched

    def write(self, path: Path) -> None:
        """Watch no longer, and append a JSON line a step."""
        self._engine.scheduler.schedule = self._schedule
        with path.open("a") as file:
            for work, seconds in self.steps:
                line = {"work": dataclasses.asdict(work), "seconds": seconds}
                file.write(json.dumps(line) + "\n")
