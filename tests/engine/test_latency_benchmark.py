"""The latency benchmark runs, and measures what it says."""

import argparse
import re

import benchmark_latency
import pytest
from workloads import SETTINGS

from checkpoints.synthetic import write_synthetic_llama

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    path = tmp_path_factory.mktemp("latency")
    write_synthetic_llama(path, num_layers=1)
    return {"model": str(path), "pool_bytes": 2**24}


def test_a_cold_adapter(options, capsys):
    args = argparse.Namespace(adapters=2, prompt_tokens=8, **options)
    benchmark_latency.cold(args, SETTINGS["S1"])
    printed = capsys.readouterr().out
    assert len(re.findall(r"ms \(median of 2;", printed)) == 3  # cold, resident, the difference
    assert "from a PEFT directory" in printed


def test_a_long_prompt_among_running_requests(options, capsys):
    args = argparse.Namespace(
        running=2, long_prompt_tokens=100, max_num_batched_tokens=[32], **options
    )
    benchmark_latency.long_prompt(args, SETTINGS["S1"])
    (steps,) = re.findall(r"meanwhile, (\d+) steps", capsys.readouterr().out)
    assert 4 <= int(steps) <= 7  # 100 tokens, 32 a step, and two tokens of its own
