"""Time that the host half takes for one step, against the number of waiting requests.

The real scheduler, allocator, store and cache serve 2,000 adapters by power law from a pool that is
too small for them; no device, so a step costs only its decisions. The line is kept at its length by
a new request for each that is admitted. Times are CPU time of the thread, garbage collection
included, so that other programs on the machine do not count.

    python examples/benchmark_scheduler.py
"""

import argparse
import gc
import random
import time
from types import SimpleNamespace

from slora_jax.adapter_cache import AdapterCache
from slora_jax.adapter_store import AdapterStore, PackedAdapter
from slora_jax.page_allocator import PageAllocator
from slora_jax.policies import SCHEDULERS, SchedulerName, make_policy
from slora_jax.request import Request
from slora_jax.scheduler import Scheduler

NUM_ADAPTERS = 2000
RANKS = (8, 16, 32, 64)
PAGES_PER_RANK = 1 / 4  # Llama-7B: 2 pages of 8 MiB for rank 8 on q, k, v, o
PAGE_SIZE = 16
NUM_CLIENTS = 1000
SLO_SECONDS = 6.0
PAGES_PER_SEAT = 34  # KV of a running request takes about 27, so adapters and KV compete
MIN_TOKENS, MAX_TOKENS = 8, 512  # of a prompt, and of an output


class Load:
    """A host half with ``num_waiting`` requests in line and up to ``num_running`` running."""

    def __init__(self, num_waiting: int, num_running: int, scheduler: SchedulerName):
        self._rng = random.Random(0)
        self._count = 0
        self.num_waiting = num_waiting
        self._slo = SLO_SECONDS if scheduler == "slo" else None
        self.allocator = PageAllocator(PAGES_PER_SEAT * num_running + 1)
        self.store = AdapterStore()
        self.cache = AdapterCache(self.allocator, self.store)
        self.scheduler = Scheduler(
            self.allocator,
            self.cache,
            self.store,
            page_size=PAGE_SIZE,
            max_num_seqs=num_running,
            max_num_batched_tokens=1024,
            prefill_tile=16,
            max_model_len=2 * MAX_TOKENS,
            policy=make_policy(scheduler),
            prefetch=8,
        )
        for i in range(NUM_ADAPTERS):
            num_pages = int(RANKS[i % len(RANKS)] * PAGES_PER_RANK)
            packed = PackedAdapter(
                digest=str(i),
                ranks=(RANKS[i % len(RANKS)],) * 4 + (0,) * 3,
                num_pages=num_pages,
                nbytes=num_pages << 23,
                pages=None,
                scaling=None,
            )
            self.store.register(f"adapter {i}", packed)
        self._versions = [self.store.resolve(name) for name in self.store.names()]
        self._weights = [1 / (i + 1) for i in range(NUM_ADAPTERS)]

    def fill(self) -> None:
        """Bring the line to its length."""
        missing = self.num_waiting - self.scheduler.num_waiting
        if missing <= 0:
            return
        for version in self._rng.choices(self._versions, self._weights, k=missing):
            num_prompt = self._rng.randint(MIN_TOKENS, MAX_TOKENS)
            self._count += 1
            self.scheduler.add(
                Request(
                    request_id=str(self._count),
                    prompt_token_ids=[1] * num_prompt,
                    sampling_params=SimpleNamespace(),
                    max_total_tokens=num_prompt + self._rng.randint(MIN_TOKENS, MAX_TOKENS),
                    adapter_version=version,
                    client_id=str(self._rng.randrange(NUM_CLIENTS)),
                    deadline=None if self._slo is None else time.monotonic() + self._slo,
                )
            )

    def step(self) -> tuple[float, float]:
        """CPU seconds of schedule and update, and of taking in the step's tokens."""
        scheduler = self.scheduler
        start = time.thread_time()
        output = scheduler.schedule()
        scheduler.update(output)
        middle = time.thread_time()
        for chunk in (*output.decode, *output.prefill):
            if chunk.is_last:
                request = chunk.request
                scheduler.append_token(request, 1)
                if request.num_tokens == request.max_total_tokens:
                    scheduler.finish(request, "length")
        return middle - start, time.thread_time() - middle


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="steps that are timed")
    parser.add_argument("--warm-up", type=int, default=600, help="steps before them")
    parser.add_argument("--waiting", type=int, nargs="*", default=[100, 1_000, 10_000])
    parser.add_argument("--running", type=int, nargs="*", default=[64, 256])
    parser.add_argument("--scheduler", choices=SCHEDULERS, default="fcfs")
    args = parser.parse_args()
    print(f"{args.scheduler}; {NUM_ADAPTERS} adapters by power law; milliseconds a step")
    print(
        f"{'seats':>6} {'waiting':>8} | {'schedule + update':^22} | {'take tokens':>11} | "
        f"{'running':>7} {'swap-ins':>9} {'evicted':>8} {'preempted':>9}"
    )
    print(f"{'':>15} | {'median':>6} {'p99':>7} {'most':>7} | {'median':>11} | {'mean':>7}")
    for num_running in args.running:
        for num_waiting in args.waiting:
            load = Load(num_waiting, num_running, args.scheduler)
            for _ in range(args.warm_up):
                load.fill()
                load.step()
            gc.collect()
            scheduling, taking, running = [], [], 0
            swap_ins, evictions = load.cache.swap_ins, load.cache.evictions
            preemptions = load.scheduler.preemptions
            for _ in range(args.steps):
                load.fill()
                schedule_s, take_s = load.step()
                scheduling.append(1e3 * schedule_s)
                taking.append(1e3 * take_s)
                running += load.scheduler.num_running
            print(
                f"{num_running:>6} {num_waiting:>8} | {percentile(scheduling, 0.5):>6.3f} "
                f"{percentile(scheduling, 0.99):>7.3f} {max(scheduling):>7.3f} | "
                f"{percentile(taking, 0.5):>11.3f} | {running / args.steps:>7.1f} "
                f"{load.cache.swap_ins - swap_ins:>9} {load.cache.evictions - evictions:>8} "
                f"{load.scheduler.preemptions - preemptions:>9}"
            )


if __name__ == "__main__":
    main()
