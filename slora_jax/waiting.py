"""WaitingRequests: everyone who is not running, and who of them is next.

Puts around the chosen policy what holds under every one of them: preempted requests resume before
anyone is admitted, no wait is unbounded, and a request that can no longer get its first token by
its deadline is given up. Refuses to know pages and steps.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict

from slora_jax.policies import Policy
from slora_jax.request import Request

_GAIN, _DEVIATION_GAIN = 1 / 8, 1 / 4
"""Of the running mean and deviation of a delay, and twice the deviation is the margin: as TCP
estimates round trips (Jacobson, SIGCOMM 1988)."""


class WaitingRequests:
    """Preempted requests, then the policy's order, then, every so often, whoever is oldest.

    **No starvation.** Once ``max_overtakes`` admissions in a row have passed over the oldest
    waiting request, it is next, and stays next until it is admitted. So a request with k older ones
    is admitted after at most (k + 1) · (max_overtakes + 1) admissions, whatever arrives.
    Requests with a deadline are left out of that: their wait is bounded by the deadline.

    Every operation is O(1) or O(log n) beside the policy's own: there may be 10,000, and an abort
    may hit any of them.
    """

    def __init__(self, policy: Policy, *, max_overtakes: int):
        self.policy = policy
        self._max_overtakes = max_overtakes
        self._overtakes = 0  # in a row
        self._resuming: OrderedDict[str, Request] = OrderedDict()  # preempted, next one first
        self._new: OrderedDict[str, Request] = OrderedDict()  # never admitted, oldest first
        self._patient: OrderedDict[str, Request] = OrderedDict()  # those of them without a deadline
        self._deadlines: list[tuple[float, int, Request]] = []  # heap; may hold some who left
        self._first_token_delay: float | None = None  # admission to first token: mean
        self._first_token_deviation = 0.0
        self._order = itertools.count()

    def __len__(self) -> int:
        return len(self._resuming) + len(self._new)

    # -- in and out ----------------------------------------------------------------------------

    def push(self, request: Request) -> None:
        """A new request."""
        request.arrival_order = next(self._order)
        self._new[request.request_id] = request
        if request.deadline is None:
            self._patient[request.request_id] = request
        else:
            heapq.heappush(self._deadlines, (request.deadline, request.arrival_order, request))
            if len(self._deadlines) > 64 + 2 * len(self._new):
                self._deadlines = [e for e in self._deadlines if e[2].request_id in self._new]
                heapq.heapify(self._deadlines)
        self.policy.push(request)

    def resume_later(self, request: Request) -> None:
        """A preempted request, which was admitted before all those preempted so far: next."""
        self.policy.left(request)
        self._resuming[request.request_id] = request
        self._resuming.move_to_end(request.request_id, last=False)

    def remove(self, request: Request) -> None:
        """Take out anyone."""
        if self._resuming.pop(request.request_id, None) is None:
            del self._new[request.request_id]
            self._patient.pop(request.request_id, None)
            self.policy.remove(request)

    def peek(self) -> Request | None:
        """Who is next, or None."""
        if self._resuming:
            return next(iter(self._resuming.values()))
        if self._overtakes >= self._max_overtakes and self._patient:
            return next(iter(self._patient.values()))
        return self.policy.peek()

    def admit(self, request: Request) -> None:
        """Whom ``peek`` gave runs from now on."""
        if request.request_id not in self._resuming:
            oldest = next(iter(self._patient), None)
            self._overtakes = 0 if oldest in (None, request.request_id) else self._overtakes + 1
        self.remove(request)
        self.policy.admitted(request)

    def upcoming(self, count: int) -> list[Request]:
        """About the next ``count`` to be admitted."""
        both = itertools.chain(self._resuming.values(), self.policy.upcoming())
        return list(itertools.islice(both, count))

    # -- early abort ---------------------------------------------------------------------------

    def hopeless(self, now: float, *, is_idle: bool = False) -> list[Request]:
        """Requests, still in line, that would miss their deadlines even if admitted now.

        Where nobody runs (``is_idle``) only a deadline that has passed counts: an estimate that
        refuses everybody would never be put right.
        """
        found = []
        soonest = now + (0.0 if is_idle else self._delay_to_expect())
        while self._deadlines and self._deadlines[0][0] <= soonest:
            request = heapq.heappop(self._deadlines)[2]
            if request.request_id in self._new:
                found.append(request)
        return found

    def note_first_token(self, delay: float) -> None:
        """A request got its first token ``delay`` seconds after its admission."""
        if self._first_token_delay is None:
            self._first_token_delay = delay
        error = delay - self._first_token_delay
        self._first_token_delay += _GAIN * error
        self._first_token_deviation += _DEVIATION_GAIN * (abs(error) - self._first_token_deviation)

    def _delay_to_expect(self) -> float:
        return (self._first_token_delay or 0.0) + 2 * self._first_token_deviation
