"""Two processes serve one model together, and neither outlives the other by long."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from slora_jax.hosts import GRACE

SCRIPT = pathlib.Path(__file__).with_name("two_processes.py")
PROMPTS = [[1, 2, 3], [7, 8, 9] * 4, [5] * 9]
ADAPTER_IDS = ["all", "attention", None]
SECONDS = 120
"""Any step that takes longer is a hang."""


class Process:
    """Process ``number`` of two."""

    def __init__(self, number, port, folder, what):
        root = SCRIPT.parents[2]
        self._child = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(number), str(port), str(folder), what],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root), "XLA_FLAGS": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for(self, word):
        """The line that begins with ``word``."""
        for line in self._child.stdout:
            if line.startswith(word):
                return line
        pytest.fail(f"no {word!r}: {self._child.stderr.read()[-2000:]}")

    def end(self):
        """(exit code, what it said on stderr)."""
        _, errors = self._child.communicate(timeout=SECONDS)
        return self._child.returncode, errors

    def kill(self):
        self._child.send_signal(signal.SIGKILL)
        self._child.wait(SECONDS)

    def clean_up(self):
        if self._child.poll() is None:
            self._child.kill()
        self._child.communicate()


@pytest.fixture
def two(gqa):
    """Starts the pair."""
    started = []

    def start(what):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        folder = gqa.directory.parent
        started.extend(Process(number, port, folder, what) for number in (0, 1))
        return started

    yield start
    for process in started:
        process.clean_up()


@pytest.mark.slow
def test_two_processes_give_the_tokens_of_one(two, gqa):
    leader, follower = two("serve")
    line = leader.wait_for("[[")
    tokens, _, swap_ins = line.rpartition(" ")
    expected = [gqa.greedy(p, a, 6) for p, a in zip(PROMPTS, ADAPTER_IDS, strict=True)]
    assert json.loads(tokens) == expected
    assert int(swap_ins) == 3
    follower.wait_for("followed")
    assert [leader.end()[0], follower.end()[0]] == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.full), 1])
def test_when_one_dies_the_other_says_so_and_ends(two, victim):
    processes = two("die")
    processes[0].wait_for("served")
    processes[victim].kill()
    began = time.monotonic()
    code, errors = processes[1 - victim].end()
    assert time.monotonic() - began < GRACE + 20
    assert code != 0
    assert f"process {victim} on host" in errors, errors
    assert "is gone" in errors
    if victim:  # where process 0 dies, JAX may end the other before it can raise
        assert "HostLostError" in errors
