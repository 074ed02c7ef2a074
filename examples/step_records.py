"""What each step of a running engine did and how long it took, for the simulator's fit."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

from slora_jax.engine import Engine
from slora_jax.scheduler import SchedulerOutput
from slora_jax.simulator import MeasuredStep, StepWork


@dataclasses.dataclass
class _Launched:
    work: StepWork
    moment: float
    """When the launch was over."""
    host_seconds: float = 0.0
    """Of its ``Engine.step``, once that is over."""


class StepRecorder:
    """Watches an engine's scheduler; ``stepped`` is to be called after each ``Engine.step``.

    The engine reads one step late. So one call's time is the host's for the step that it launches,
    but for its wait, which is for the step before.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._schedule, self._update = engine.scheduler.schedule, engine.scheduler.update
        self._began = 0.0
        self._previous: _Launched | None = None
        self._launched: _Launched | None = None
        self._last_end = 0.0
        self._waited, self._num_rows = engine._wait_seconds, engine._runner.num_token_rows
        self.steps: list[MeasuredStep] = []
        engine.scheduler.schedule, engine.scheduler.update = (
            self._watch_schedule,
            self._watch_update,
        )

    def _watch_schedule(self) -> SchedulerOutput:
        self._began = time.monotonic()
        return self._schedule()

    def _watch_update(self, output: SchedulerOutput) -> None:
        moment = time.monotonic()
        self._launched = None
        if not output.is_empty:
            store, num_rows = self._engine.store, self._engine._runner.num_token_rows
            work = StepWork.of(
                output,
                lambda version: sum(store.info(version).ranks),
                num_rows - self._num_rows,
            )
            self._num_rows = num_rows
            self._launched = _Launched(work, moment)
        self._began += time.monotonic() - moment  # to describe it is no work of the engine's
        self._update(output)

    def stepped(self) -> None:
        """The engine has launched one step and read the one before."""
        end, waited = time.monotonic(), self._engine._wait_seconds
        wait, self._waited = waited - self._waited, waited
        if self._launched is not None:
            self._launched.host_seconds = end - self._began - wait
        if self._previous is not None:
            step = self._previous
            seconds = end - max(step.moment, self._last_end)
            self.steps.append(
                MeasuredStep(
                    work=step.work,
                    seconds=seconds,
                    wait_seconds=wait,
                    host_seconds=step.host_seconds,
                )
            )
            self._last_end = end
        self._previous = self._launched

    def write(self, path: Path) -> None:
        """Watch no longer, and append a JSON line a step."""
        scheduler = self._engine.scheduler
        scheduler.schedule, scheduler.update = self._schedule, self._update
        with path.open("a") as file:
            for step in self.steps:
                file.write(json.dumps(dataclasses.asdict(step)) + "\n")
