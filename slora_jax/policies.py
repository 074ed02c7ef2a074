"""Policies: who among the waiting requests is admitted next.

Each is an order over the requests that have not run yet, and hears what happens to them: that they
were admitted, got a token, stopped running. It refuses to know pages, steps and deadlines, and it
bounds nobody's wait: `waiting` does that for all of them alike.

A request of higher ``priority`` goes first, whatever the policy; ``Fair`` applies priorities within
a client, so that nobody gets more than a fair share by asking for it. Every operation is O(1), or
O(adapters in the batch), O(clients that were just served), never O(requests that wait).
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Literal

from slora_jax.request import Request

SchedulerName = Literal["fcfs", "lcfs", "cluster", "slo", "vtc"]
SCHEDULERS: tuple[SchedulerName, ...] = ("fcfs", "lcfs", "cluster", "slo", "vtc")
FairOver = Literal["client", "adapter"]

NEW_SHARE = 0.7
"""Of the newest window in the moving averages of early abort: S-LoRA's value."""
WINDOW_SECONDS = 0.5
"""S-LoRA updates its averages every ten decode steps, about half a second on its GPUs."""

INPUT_TOKEN_COST, OUTPUT_TOKEN_COST = 1, 2
"""VTC's prices of service (Sheng et al., arXiv 2401.00588, §3.1)."""


class Line:
    """Requests by priority, highest first, and within one by arrival.

    OrderedDicts, because looking for a plain dict's first key walks over all that were deleted
    before it.
    """

    def __init__(self) -> None:
        self._levels: dict[int, OrderedDict[str, Request]] = {}

    def __bool__(self) -> bool:
        return bool(self._levels)

    def push(self, request: Request) -> None:
        """Put a request last in its level."""
        self._levels.setdefault(request.priority, OrderedDict())[request.request_id] = request

    def remove(self, request: Request) -> None:
        """Take out anyone."""
        level = self._levels[request.priority]
        del level[request.request_id]
        if not level:
            del self._levels[request.priority]

    def first(self) -> Request | None:
        """The oldest of the highest priority."""
        return next(iter(self._top().values()), None)

    def last(self) -> Request | None:
        """The newest of the highest priority."""
        return next(reversed(self._top().values()), None)

    def oldest_first(self) -> Iterator[Request]:
        """All of them, highest priority first."""
        for priority in sorted(self._levels, reverse=True):
            yield from self._levels[priority].values()

    def newest_first(self) -> Iterator[Request]:
        """All of them, highest priority first, each level backwards."""
        for priority in sorted(self._levels, reverse=True):
            yield from reversed(self._levels[priority].values())

    def _top(self) -> OrderedDict[str, Request]:
        return self._levels[max(self._levels)] if self._levels else OrderedDict()


class Policy:
    """First come, first served; the others say what they do instead."""

    def __init__(self) -> None:
        self._line = Line()

    # -- who waits: push / remove --------------------------------------------------------------

    def push(self, request: Request) -> None:
        """A request begins to wait."""
        self._line.push(request)

    def remove(self, request: Request) -> None:
        """A request waits no longer: admitted, aborted, or admitted out of turn."""
        self._line.remove(request)

    def peek(self) -> Request | None:
        """Who should be admitted next; None where nobody waits."""
        return self._line.first()

    def upcoming(self) -> Iterator[Request]:
        """Who will be admitted soon, about in this order: what prefetching looks at."""
        return self._line.oldest_first()

    # -- what happens to requests --------------------------------------------------------------

    def advance(self, now: float) -> None:
        """A step is about to be scheduled; seconds on the scheduler's clock."""

    def admitted(self, request: Request) -> None:
        """A request begins to run, for the first time or again after a preemption."""

    def sampled(self, request: Request) -> None:
        """A request got one token."""

    def left(self, request: Request) -> None:
        """A request stops running: finished or preempted."""


class NewestFirst(Policy):
    """Last come, first served: in overload those who are served are served soon."""

    def peek(self) -> Request | None:
        """The newest."""
        return self._line.last()

    def upcoming(self) -> Iterator[Request]:
        """Newest first."""
        return self._line.newest_first()


class Clustered(Policy):
    """S-LoRA's adapter clustering (§4.1, appendix A): few adapters a batch read few weights.

    Once ``size`` adapters run, requests for those go before all others; where none of them waits,
    the oldest request is next, so no seat stays empty. The base model costs no adapter and counts
    as one that runs.
    """

    def __init__(self, size: int):
        super().__init__()
        self._size = size
        self._by_version: dict[int, Line] = {}
        self._running: dict[int, int] = {}  # adapter version → its running requests

    def push(self, request: Request) -> None:
        """See ``Policy``."""
        super().push(request)
        self._by_version.setdefault(request.adapter_version, Line()).push(request)

    def remove(self, request: Request) -> None:
        """See ``Policy``."""
        super().remove(request)
        line = self._by_version[request.adapter_version]
        line.remove(request)
        if not line:
            del self._by_version[request.adapter_version]

    def peek(self) -> Request | None:
        """The oldest request for an adapter of the batch once that is full, else the oldest."""
        oldest = self._line.first()
        if oldest is None or len(self._running.keys() - {0}) < self._size:
            return oldest
        lines = (self._by_version.get(version) for version in {0, *self._running})
        heads = [head for line in lines if line and (head := line.first())]
        mate = min(heads, key=lambda r: (-r.priority, r.arrival_order), default=oldest)
        return mate if mate.priority >= oldest.priority else oldest

    def admitted(self, request: Request) -> None:
        """See ``Policy``."""
        version = request.adapter_version
        self._running[version] = self._running.get(version, 0) + 1

    def left(self, request: Request) -> None:
        """See ``Policy``."""
        version = request.adapter_version
        self._running[version] -= 1
        if not self._running[version]:
            del self._running[version]


class SloOrder(Policy):
    """The order of S-LoRA's early abort (§4.2, appendix B): newest first while more arrive than can
    be admitted, else oldest first.

    Both rates are moving averages over windows of ``WINDOW_SECONDS``. In overload the newest are
    those who can still be served in time (theorem B.1); the others are dropped at their deadlines,
    which is not this class's doing.
    """

    def __init__(self) -> None:
        super().__init__()
        self._window_end: float | None = None
        self._arrived = self._admitted = 0
        self._arrival_rate = self._admission_rate = 0.0  # a window

    def push(self, request: Request) -> None:
        """See ``Policy``."""
        super().push(request)
        self._arrived += 1

    def admitted(self, request: Request) -> None:
        """See ``Policy``."""
        self._admitted += 1

    def advance(self, now: float) -> None:
        """Close the window once its time is over."""
        if self._window_end is None:
            self._window_end = now + WINDOW_SECONDS
        if now < self._window_end:
            return
        # Late, as after an idle time, it counts as several windows with its mean.
        windows = 1 + (now - self._window_end) / WINDOW_SECONDS
        share = 1 - (1 - NEW_SHARE) ** windows
        self._arrival_rate += share * (self._arrived / windows - self._arrival_rate)
        self._admission_rate += share * (self._admitted / windows - self._admission_rate)
        self._arrived = self._admitted = 0
        self._window_end = now + WINDOW_SECONDS

    @property
    def is_newest_first(self) -> bool:
        """Whether arrivals are ahead of admissions."""
        return self._arrival_rate >= self._admission_rate

    def peek(self) -> Request | None:
        """The newest or the oldest."""
        return self._line.last() if self.is_newest_first else self._line.first()

    def upcoming(self) -> Iterator[Request]:
        """In the order of now."""
        return self._line.newest_first() if self.is_newest_first else self._line.oldest_first()


class Fair(Policy):
    """Virtual Token Counter (Sheng et al., arXiv 2401.00588): the waiting client that has been
    served least is next.

    ``key`` names a request's client. A client's counter grows by ``INPUT_TOKEN_COST`` a prompt
    token when its request is admitted and by ``OUTPUT_TOKEN_COST`` a token sampled; what a
    preemption computes again is not charged. One who begins to wait is lifted to the smallest
    counter among those who wait, or of the last who waited: what it did not use is not saved up.
    Between two clients that both wait, service differs by at most 2 · max(input cost of a prompt,
    output cost of all tokens of a full batch) (theorem 4.4), whoever arrives; with free capacity
    everyone is served (work-conserving).
    """

    def __init__(self, key: Callable[[Request], Hashable]):
        super().__init__()
        self._key = key
        self._lines: dict[Hashable, Line] = {}  # of clients who have requests waiting
        self._counters: dict[Hashable, float] = {}
        self._running: Counter[Hashable] = Counter()
        # (counter when pushed, tie, client): counters only grow, so an entry is a lower bound.
        self._heap: list[tuple[float, int, Hashable]] = []
        self._ties = itertools.count()
        self._floor = 0.0  # where a newcomer starts
        self._last_waiting: Hashable = None

    def push(self, request: Request) -> None:
        """See ``Policy``; lifts the counter of a client who had nobody waiting."""
        client = self._key(request)
        line = self._lines.get(client)
        if line is None:
            floor = self._raise_floor()
            line = self._lines[client] = Line()
            self._forget_old_clients()
            self._counters[client] = max(self._counters.get(client, 0.0), floor)
            heapq.heappush(self._heap, (self._counters[client], next(self._ties), client))
            if len(self._heap) > 64 + 2 * len(self._lines):  # old entries of clients who came back
                self._heap = [(self._counters[c], next(self._ties), c) for c in self._lines]
                heapq.heapify(self._heap)
        line.push(request)

    def remove(self, request: Request) -> None:
        """See ``Policy``."""
        client = self._key(request)
        self._lines[client].remove(request)
        if not self._lines[client]:
            self._raise_floor()
            del self._lines[client]
            self._last_waiting = client

    def peek(self) -> Request | None:
        """The first request of the client that has been served least."""
        self._settle()
        return self._lines[self._heap[0][2]].first() if self._heap else None

    def upcoming(self) -> Iterator[Request]:
        """By a glance at the top of the heap: about the next ones."""
        self._settle()
        clients = [client for _, _, client in self._heap[:64] if client in self._lines]
        clients.sort(key=self._counters.__getitem__)
        for client in clients:
            yield from itertools.islice(self._lines[client].oldest_first(), 2)

    def admitted(self, request: Request) -> None:
        """Charge the prompt, once."""
        self._running[self._key(request)] += 1
        if request.num_preemptions == 0:
            self._charge(request, INPUT_TOKEN_COST * len(request.prompt_token_ids))

    def sampled(self, request: Request) -> None:
        """Charge a token."""
        self._charge(request, OUTPUT_TOKEN_COST)

    def left(self, request: Request) -> None:
        """See ``Policy``."""
        client = self._key(request)
        self._running[client] -= 1
        if not self._running[client]:
            del self._running[client]

    def counter(self, client: Hashable) -> float:
        """What a client has been charged, lifts included; 0 for an unknown one."""
        return self._counters.get(client, 0.0)

    def _charge(self, request: Request, cost: float) -> None:
        client = self._key(request)
        # A client that was forgotten had no more than the floor.
        self._counters[client] = self._counters.get(client, self._floor) + cost

    def _settle(self) -> None:
        """Bring to the top of the heap whoever waits and has the smallest counter now."""
        heap = self._heap
        while heap:
            known, tie, client = heap[0]
            if client not in self._lines:
                heapq.heappop(heap)
            elif (counter := self._counters[client]) != known:
                heapq.heapreplace(heap, (counter, tie, client))
            else:
                return

    def _raise_floor(self) -> float:
        self._settle()
        if self._heap:
            self._floor = max(self._floor, self._heap[0][0])
        else:
            self._floor = max(self._floor, self._counters.get(self._last_waiting, 0.0))
        return self._floor

    def _forget_old_clients(self) -> None:
        """Drop counters that say no more than the floor, now and then."""
        if len(self._counters) > 1000 + 2 * len(self._lines):
            self._counters = {
                client: counter
                for client, counter in self._counters.items()
                if counter > self._floor or client in self._lines or client in self._running
            }


def make_policy(
    name: SchedulerName, *, cluster_size: int = 8, fair_over: FairOver = "client"
) -> Policy:
    """The policy of ``EngineConfig.scheduler``; the other arguments are its fields too."""
    if name == "lcfs":
        return NewestFirst()
    if name == "cluster":
        return Clustered(cluster_size)
    if name == "slo":
        return SloOrder()
    if name == "vtc":
        return Fair(_client if fair_over == "client" else _adapter)
    assert name == "fcfs", "EngineConfig checks it"
    return Policy()


def _client(request: Request) -> Hashable:
    return request.client_id


def _adapter(request: Request) -> Hashable:
    return request.adapter_id
