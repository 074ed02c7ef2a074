"""Request: one sequence on its way through the engine.

Owns what is known of it (tokens, progress, page table, outcome, moments). It refuses to decide
anything: the scheduler alone moves it between its states and touches ``pages`` and
``num_computed_tokens``. Text, stop strings and log-probabilities are the engine's.
"""

from __future__ import annotations

import dataclasses
import enum
from array import array
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from slora_jax.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


class RequestStatus(enum.Enum):
    """Waiting → running → finished; a running request may be preempted and runs again later."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    PREEMPTED = enum.auto()
    FINISHED = enum.auto()


@dataclasses.dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """A prompt, how to continue it, and how far that has come.

    Invariants: ``pages`` holds the K and V of the first ``num_computed_tokens`` tokens, and is
    empty unless the request is running; tokens in flight are the last ones, and only their values
    are unknown.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    max_total_tokens: int
    """Hard limit on prompt and output together."""
    adapter_id: str | None = None
    adapter_version: int = 0
    """Bound when the request is made, so that it finishes on the weights it started with."""
    seed: int = 0
    """What its tokens are drawn with, unless it is greedy; 0 <= seed < 2**63."""
    eos_token_ids: tuple[int, ...] = ()
    """What ends the sequence unless ``sampling_params.ignore_eos``."""
    client_id: str | None = None
    """On whose behalf: what fair scheduling is fair over."""
    priority: int = 0
    """Higher ones are admitted first."""
    deadline: float | None = None
    """Moment on the scheduler's clock by which the first token must come; a request that waits and
    can no longer make it is aborted."""

    # State. `output_token_ids` grows by the scheduler's append_token.
    status: RequestStatus = RequestStatus.WAITING
    output_token_ids: list[int] = dataclasses.field(default_factory=list)
    num_computed_tokens: int = 0
    """Tokens whose K and V are in ``pages``, or will be once the launched steps have run."""
    num_tokens_in_flight: int = 0
    """Tokens that launched steps sample and the host has not read yet."""
    pages: array[int] = dataclasses.field(default_factory=lambda: array("i"))
    """The page table: page ``i`` holds the tokens from ``i * page_size`` on. 32-bit integers, whose
    bytes a step's page table takes as they are."""

    arrival_order: int = 0
    """Among all requests of its scheduler."""

    # Outcome.
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop token or stop string that ended it."""
    error: Exception | None = None
    """Why ``finish_reason`` is ``"error"``, or which deadline it is ``"abort"`` for."""

    # Moments, on the scheduler's clock; None until they come.
    arrival_time: float = 0.0
    first_scheduled_time: float | None = None
    excused_time: float = 0.0
    """Seconds between that and the first token in which a step was compiled."""
    first_token_time: float | None = None
    last_token_time: float | None = None
    finish_time: float | None = None
    adapter_load_time: float | None = None
    """Seconds that admission spent on fetching the adapter; about 0 where it was resident."""
    num_preemptions: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens whose values the host knows."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_tokens_with_in_flight(self) -> int:
        """Tokens that exist, on the host or on the device."""
        return len(self.prompt_token_ids) + len(self.output_token_ids) + self.num_tokens_in_flight

    @property
    def is_finished(self) -> bool:
        """Nothing changes any more."""
        return self.finish_reason is not None

    def tokens_between(self, start: int, stop: int) -> list[int]:
        """The known tokens [start, stop), prompt and output as one sequence."""
        assert 0 <= start <= stop <= self.num_tokens
        num_prompt = len(self.prompt_token_ids)
        if stop <= num_prompt:
            return self.prompt_token_ids[start:stop]
        outputs = self.output_token_ids[max(start - num_prompt, 0) : stop - num_prompt]
        return self.prompt_token_ids[start:] + outputs

    def banned_token_ids(self) -> set[int]:
        """What may not be sampled next: everything that would end it, before ``min_tokens``."""
        params = self.sampling_params
        if len(self.output_token_ids) + self.num_tokens_in_flight >= params.min_tokens:
            return set()
        eos = () if params.ignore_eos else self.eos_token_ids
        return {*eos, *(params.stop_token_ids or ())}
