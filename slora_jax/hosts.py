"""Several processes that serve one model together: process 0 decides, the others repeat.

Under ``jax.distributed`` every process must launch the same programs in the same order. So process
0 writes a journal of its engine's calls, and each other process's engine makes the same calls
(state-machine replication): one host schedules, tokens are the same everywhere, and nothing but
short messages is sent over TCP. That both are in the same state is checked with every message.
Making the same calls in every process by hand would be simpler, and wrong as soon as one request is
aborted by a person or a lost connection, or a decision looks at the clock.

Owns the connections, and the watch over the other processes: when one dies, this one prints which,
raises where it can, and exits within GRACE seconds, since a collective that waits for it would wait
for ever. Refuses to know what the calls do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from slora_jax.errors import HostLostError, InvalidRequestError

GRACE = 10.0
"""Seconds from another process's death to this one's exit."""

State = tuple[int, ...]
"""Numbers that are equal where two engines are in the same state."""


@dataclasses.dataclass(frozen=True)
class Call:
    """One entry of the journal."""

    name: str
    args: tuple[Any, ...]
    time: float
    """Of process 0: what every process takes for the time of the call."""
    state: State
    """Before the call."""


class Alone:
    """The journal of a process that serves by itself: nobody reads it."""

    clock = staticmethod(time.monotonic)

    def record(self, name: str, args: tuple[Any, ...], state: State) -> None:
        """Nothing."""

    def explain(self, error: BaseException) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Leader:
    """The journal of process 0, sent to the others as it is written."""

    def __init__(self) -> None:
        self._now = time.monotonic()
        key = secrets.token_bytes(16)
        listener = Listener(("", 0), "AF_INET", backlog=jax.process_count(), authkey=key)
        _share_address(_address(), int(listener.address[1]), key)
        self._watch = _Watch()
        self._followers: list[Connection] = []
        for _ in range(jax.process_count() - 1):
            connection = listener.accept()
            _keep_alive(connection)
            number, host = connection.recv()
            self._followers.append(connection)
            self._watch.start(connection, f"process {number} on host {host!r}")
        listener.close()

    def clock(self) -> float:
        """The time of the call that is being made."""
        return self._now

    def record(self, name: str, args: tuple[Any, ...], state: State) -> None:
        """Tell the others of a call before it is made here.

        Raises HostLostError where one of them is gone.
        """
        self._watch.check()
        self._now = time.monotonic()
        if name == "close":
            self._watch.stop()
        for connection in self._followers:
            try:
                connection.send(Call(name, args, self._now, state))
            except OSError as error:
                self._watch.explain(error)

    def explain(self, error: BaseException) -> None:
        """Raise HostLostError where a step failed because another process is gone."""
        self._watch.explain(error)

    def close(self) -> None:
        """The last call has been recorded."""
        self._watch.stop()
        for connection in self._followers:
            with contextlib.suppress(OSError):
                connection.close()


class Follower:
    """The journal as another process reads it, and makes the calls in it."""

    def __init__(self) -> None:
        self._now = time.monotonic()
        host, port, key = _share_address("", 0, b"")
        self._connection = Client((host, port), "AF_INET", authkey=key)
        _keep_alive(self._connection)
        self._connection.send((jax.process_index(), socket.gethostname()))
        self._calls: queue.SimpleQueue[Call] = queue.SimpleQueue()
        self._watch = _Watch()
        self._watch.start(self._connection, f"process 0 on host {host!r}", self._calls.put)
        self._is_following = False

    def clock(self) -> float:
        """The time of the call that is being made, by process 0's clock."""
        return self._now

    def record(self, name: str, args: tuple[Any, ...], state: State) -> None:
        """Refuse what process 0 did not ask for."""
        if not self._is_following:
            raise InvalidRequestError(
                f"process {jax.process_index()} does what process 0 says: call follow() here, and "
                f"{name}() on process 0"
            )

    def calls(self, state: Callable[[], State]) -> Iterator[Call]:
        """Each call of process 0 in turn, up to its ``close``.

        Raises HostLostError where process 0 is gone, RuntimeError where the two have come apart.
        """
        self._is_following = True
        try:
            while True:
                with contextlib.suppress(queue.Empty):
                    call = self._calls.get(timeout=0.5)
                    self._now = call.time
                    if call.state != state():
                        raise RuntimeError(
                            f"process {jax.process_index()} is in state {state()} before "
                            f"{call.name}(), process 0 in {call.state}: do both read the same "
                            "model and adapters?"
                        )
                    yield call
                    if call.name == "close":
                        return
                    continue
                self._watch.check()
        finally:
            self._is_following = False

    def explain(self, error: BaseException) -> None:
        """Raise HostLostError where a step failed because another process is gone."""
        self._watch.explain(error)

    def close(self) -> None:
        """Leave."""
        self._watch.stop()
        with contextlib.suppress(OSError):
            self._connection.close()


Journal = Alone | Leader | Follower


def open_journal(mesh: jax.sharding.Mesh) -> Journal:
    """This process's part in serving on ``mesh``."""
    if not mesh.is_multi_process:
        return Alone()
    return Leader() if jax.process_index() == 0 else Follower()


class _Watch:
    """Threads that notice the end of a connection, which is the end of the process behind it."""

    def __init__(self) -> None:
        self._lost = threading.Event()
        self._stopped = threading.Event()
        self._who = ""

    def start(
        self, connection: Connection, who: str, receive: Callable[[Any], None] | None = None
    ) -> None:
        """Watch ``connection`` and hand over what comes."""

        def run() -> None:
            try:
                while True:
                    message = connection.recv()
                    if receive is not None:
                        receive(message)
                    if isinstance(message, Call) and message.name == "close":
                        self.stop()
            except (EOFError, OSError):
                if not self._stopped.is_set():
                    self._on_loss(who)

        threading.Thread(target=run, daemon=True, name=f"watch {who}").start()

    def _on_loss(self, who: str) -> None:
        self._who = who
        self._lost.set()
        print(
            f"slora_jax: {who} is gone; process {jax.process_index()} cannot go on without it and "
            f"ends within {GRACE:.0f} s",
            file=sys.stderr,
            flush=True,
        )
        if not self._stopped.wait(GRACE):
            # The main thread may wait in a collective that never ends, or in JAX's own shutdown.
            os._exit(1)

    def explain(self, error: BaseException) -> None:
        """Raise HostLostError from ``error`` where a process is gone, or is found to be shortly."""
        if self._lost.wait(1.0):
            raise HostLostError(f"{self._who} is gone: start all processes again") from error

    def check(self) -> None:
        """Raise HostLostError where a process is gone."""
        if self._lost.is_set():
            raise HostLostError(f"{self._who} is gone: start all processes again")

    def stop(self) -> None:
        """From now on connections may end."""
        if not self._lost.is_set():
            self._stopped.set()


def _address() -> str:
    """Where the other processes reach this one."""
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return "127.0.0.1"
    return name


def _share_address(host: str, port: int, key: bytes) -> tuple[str, int, bytes]:
    """Process 0's, in every process."""
    text = host.encode().ljust(240, b"\0")[:240] + port.to_bytes(4, "big") + key.ljust(16, b"\0")
    shared = multihost_utils.broadcast_one_to_all(np.frombuffer(text, np.uint8))
    data = np.asarray(shared).astype(np.uint8).tobytes()
    return data[:240].rstrip(b"\0").decode(), int.from_bytes(data[240:244], "big"), data[244:]


def _keep_alive(connection: Connection) -> None:
    """Let the system find out within 20 s that the other host is gone, not its process alone."""
    own = socket.socket(fileno=os.dup(connection.fileno()))
    with own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for option, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, option):  # not everywhere
                own.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
