"""S-LoRA's settings and traces on a simulated device: the real host half, modelled step times.

A device is a model of step times and a pool. Step times, the host's among them, come from measured
steps (`benchmark_serving.py --steps-out`, then `python examples/simulated_serving.py fit
steps.jsonl --out h100_s2.json`), or from a roofline: what a step must read and compute over a share
of the chip's rates, and a host that takes no time. Rooflines give the shapes of curves, not figures
to quote.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import workloads
from serving_metrics import Served, measure
from workloads import SETTINGS, Setting

from checkpoints.architectures import ARCHITECTURES
from pallas_kernels.layout import TARGETS, AdapterLayout, KVLayout, choose_page_size, stored_rank
from slora_jax.adapter_cache import AdapterCache
from slora_jax.adapter_store import PackedAdapter
from slora_jax.config import EngineConfig
from slora_jax.model_runner import step_buckets
from slora_jax.policies import Policy
from slora_jax.scheduler import SchedulerOutput
from slora_jax.simulator import (
    MeasuredStep,
    SimulatedRequest,
    SimulatedRun,
    Simulator,
    StepTimeModel,
    StepWork,
)

BYTES = 2  # of a weight: 16-bit


@dataclasses.dataclass(frozen=True)
class Chip:
    """Rates of a GPU by its data sheet, and what of them a serving engine gets."""

    memory_bytes: float
    read_bytes_per_s: float
    flops_per_s: float
    copy_bytes_per_s: float
    """Host to device."""
    read_share: float = 0.7
    flops_share: float = 0.5
    step_overhead_s: float = 2e-3
    memory_share: float = 0.9


CHIPS = {
    "a10g": Chip(24e9, 600e9, 70e12, 25e9),
    "a100-40": Chip(40e9, 1555e9, 312e12, 25e9),
    "a100-80": Chip(80e9, 2039e9, 312e12, 25e9),
    "h100": Chip(80e9, 3350e9, 990e12, 50e9),
}


@dataclasses.dataclass(frozen=True)
class Model:
    """A base model's sizes that step times and pages follow from."""

    num_weights: int
    kv: KVLayout
    adapters: AdapterLayout
    num_layers: int
    hidden: int
    num_kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, name: str) -> Model:
        """By a name of ``checkpoints.architectures``."""
        a = ARCHITECTURES[name]
        hidden, inner, heads = a["hidden_size"], a["intermediate_size"], a["num_heads"]
        head_dim, kv_heads, layers = a["head_dim"], a["num_kv_heads"], a["num_layers"]
        q, kv = heads * head_dim, kv_heads * head_dim
        features = [(hidden, q), (hidden, kv), (hidden, kv), (q, hidden)]
        features += [(hidden, inner), (hidden, inner), (inner, hidden)]
        page_size = choose_page_size(kv_heads, head_dim, BYTES)
        layout = KVLayout(kv_heads, head_dim, page_size)
        return cls(
            num_weights=layers * sum(i * o for i, o in features) + 2 * a["vocab_size"] * hidden,
            kv=layout,
            adapters=AdapterLayout(
                in_features=tuple(i for i, _ in features),
                out_features=tuple(o for _, o in features),
                rows_per_page=layout.rows_per_page,
            ),
            num_layers=layers,
            hidden=hidden,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
        )

    @property
    def page_bytes(self) -> int:
        """Over all layers."""
        return self.num_layers * self.kv.rows_per_page * 128 * BYTES

    def adapter(self, rank: int, targets: Sequence[str], digest: str) -> PackedAdapter:
        """Its pages, without weights."""
        ranks = tuple(stored_rank(rank) if t in targets else 0 for t in TARGETS)
        num_pages = self.adapters.num_pages(ranks)
        return PackedAdapter(
            digest=digest,
            ranks=ranks,
            num_pages=num_pages,
            nbytes=num_pages * self.page_bytes,
            pages=None,
            scaling=None,
        )


def roofline(chip: Chip, model: Model) -> StepTimeModel:
    """What a step must read and compute, at the chip's rates times what is reached of them."""
    read, flops = chip.read_bytes_per_s * chip.read_share, chip.flops_per_s * chip.flops_share
    kv_bytes = 2 * model.num_layers * model.num_kv_heads * model.head_dim * BYTES
    rank_bytes = 2 * model.num_layers * model.hidden * BYTES  # a row of A and one of Bᵀ
    return StepTimeModel(
        constant=chip.step_overhead_s + model.num_weights * BYTES / read,
        coefficients={
            # Nothing for decode rows: their products hide behind the reading of the weights.
            "context_tokens": kv_bytes / read,
            "prefill_tokens": 2 * model.num_weights / flops,
            "prefill_pairs": 4 * model.num_layers * model.hidden / flops,
            "rank_sum": rank_bytes / read,
            "swap_in_bytes": 2 / read,  # from where the copy put it to its pages
        },
        copy_bytes_per_second=chip.copy_bytes_per_s,
        about=f"roofline of {chip}",
    )


def padded_rows(
    kernels: str, max_num_seqs: int, max_num_batched_tokens: int, tile: int
) -> Callable[[int, int], int]:
    """(decode rows, prefill tiles) → rows that an engine computes which has compiled all sizes."""

    @functools.cache
    def num_rows(decode: int, tiles: int) -> int:
        buckets = step_buckets(kernels, max_num_seqs, max_num_batched_tokens // tile, tile)
        decode, tiles, _ = buckets.choose((decode, tiles, 0))
        return decode + tiles * tile

    return num_rows


@dataclasses.dataclass(frozen=True)
class Device:
    """Where a setting is served."""

    name: str
    setting: Setting
    model: Model
    step_time: StepTimeModel
    pool_bytes: float
    kernels: str = "gpu"
    """Whose sizes of steps there are."""

    @classmethod
    def of(cls, chip: str, setting: str, *, pool_bytes: float | None = None) -> Device:
        """A roofline of ``CHIPS``, or fitted times from a file (then give ``pool_bytes``)."""
        model = Model.of(SETTINGS[setting].model)
        if chip in CHIPS:
            spec = CHIPS[chip]
            step_time = roofline(spec, model)
            free = spec.memory_bytes * spec.memory_share - model.num_weights * BYTES
        else:
            step_time = StepTimeModel.load(chip)
            free = 40e9
        name = f"{chip} {setting}"
        return cls(name, SETTINGS[setting], model, step_time, pool_bytes or free)

    @property
    def num_pages(self) -> int:
        """The null page included."""
        return int(self.pool_bytes // self.model.page_bytes)

    def serve(
        self,
        trace: Sequence[SimulatedRequest],
        num_adapters: int,
        *,
        max_num_seqs: int = 256,
        prefill_tile: int = 128,
        max_num_batched_tokens: int = 2048,
        make_cache: Callable = AdapterCache,
        policy: Policy | None = None,
        observe: Callable[[Simulator, SchedulerOutput], None] | None = None,
        step_time: StepTimeModel | None = None,
        make_adapter: Callable[[int, Sequence[str], str], PackedAdapter] | None = None,
        **options,
    ) -> SimulatedRun:
        """``trace`` over ``num_adapters`` adapters of the setting's ranks; ``options`` of
        ``EngineConfig``.
        """
        simulator = Simulator(
            EngineConfig(max_num_seqs=max_num_seqs, **options),
            step_time or self.step_time,
            num_pages=self.num_pages,
            page_size=self.model.kv.page_size,
            max_model_len=2048,
            prefill_tile=prefill_tile,
            max_num_batched_tokens=max_num_batched_tokens,
            num_rows=padded_rows(self.kernels, max_num_seqs, max_num_batched_tokens, prefill_tile),
            make_cache=make_cache,
            policy=policy,
        )
        ranks, targets = self.setting.ranks, self.setting.targets
        make = make_adapter or self.model.adapter
        for index in range(num_adapters):
            packed = make(ranks[index % len(ranks)], targets, f"adapter-{index}")
            simulator.register_adapter(f"adapter-{index}", packed)
        return simulator.run(trace, observe=observe)


def simulated(
    requests: Sequence[workloads.TimedRequest], client_id: Callable[[int], str] | None = None
) -> list[SimulatedRequest]:
    """A workload's lengths instead of its tokens."""
    return [
        SimulatedRequest(
            arrival=request.arrival,
            num_prompt_tokens=len(request.prompt_token_ids),
            num_output_tokens=request.num_output_tokens,
            adapter=None if request.adapter is None else f"adapter-{request.adapter}",
            client_id=None if client_id is None else client_id(index),
        )
        for index, request in enumerate(requests)
    ]


def trace(
    rate: float,
    duration: float,
    num_adapters: int,
    *,
    alpha: float = 1.0,
    cv: float = 1.0,
    client_id: Callable[[int], str] | None = None,
) -> list[SimulatedRequest]:
    """S-LoRA's synthetic trace."""
    made = workloads.trace(rate, duration, num_adapters, 32_000, alpha=alpha, cv=cv)
    return simulated(made, client_id)


def metrics(run: SimulatedRun) -> dict[str, float]:
    """As of a real run, and the simulator's counts."""
    served = [Served.of(request, request.arrival_time) for request in run.requests]
    result = measure(served, run.seconds)
    for name in ("num_steps", "busy_seconds", "swap_ins", "evictions", "preemptions", "refused"):
        result[name] = getattr(run, name)
    return result


def read_steps(path: Path) -> list[MeasuredStep]:
    """What ``benchmark_serving.py --steps-out`` wrote; older files lack the host's time."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [MeasuredStep(**{**line, "work": StepWork(**line["work"])}) for line in lines]


def describe_fit(model: StepTimeModel, steps: Sequence[MeasuredStep]) -> Iterator[str]:
    """How far the model is from what it was fitted to, a line a kind of step."""
    known = [step for step in steps if step.host_seconds is not None]
    waited = [step for step in steps if step.host_waited]
    pairs = {
        "device, decode alone": [
            (model.seconds(s.work), s.seconds) for s in waited if not s.work.prefill_tokens
        ],
        "device, with prefill": [
            (model.seconds(s.work), s.seconds) for s in waited if s.work.prefill_tokens
        ],
        "host": [(model.host_seconds(s.work), s.host_seconds) for s in known],
    }
    for what, times in pairs.items():
        if times:
            found, real = np.array(times).T
            errors = np.quantile(abs(found / real - 1), [0.5, 0.9])
            yield (
                f"{what}: {len(times)} of {len(steps)} steps, relative error "
                f"p50 {errors[0]:.1%}, p90 {errors[1]:.1%}; "
                f"total {found.sum() / real.sum():.3f} of the measured"
            )


def compare(
    row: dict, step_time: StepTimeModel, *, cold: bool = False
) -> dict[str, tuple[float, float]]:
    """Metric → (measured, predicted), for a line that ``benchmark_serving.py --json`` wrote.

    As there, the workload has been served before, so the pool has its adapters; not if ``cold``.
    """
    setting = SETTINGS[row["setting"]]
    model = Model.of(setting.model)
    if row["workload"] == "trace":
        shape = {"alpha": row["alpha"], "cv": row["cv"]}
        requests = trace(row["rate"], row["duration"], row["num_adapters"], **shape)
    elif row["workload"] == "offline":
        requests = simulated(workloads.offline(row["requests"], row["num_adapters"], 32_000))
    else:
        lengths = row["requests"], row["prompt_tokens"], row["max_tokens"]
        requests = simulated(workloads.batch(*lengths, row["num_adapters"], 32_000))
    pool_bytes = (row["pages_total"] + 1) * model.page_bytes
    names = ("scheduler", "ttft_slo", "cluster_size", "prefetch")
    serve = functools.partial(
        Device("", setting, model, step_time, pool_bytes, row["kernels"] or "gpu").serve,
        num_adapters=row["num_adapters"],
        max_num_seqs=row["seats"],
        prefill_tile=row["prefill_tile"],
        max_num_batched_tokens=row["prefill_tokens"],
        **{name: row[name] for name in names if row[name] is not None},
    )
    run = serve(requests)
    predicted = metrics(run)
    if not cold:
        start, swap_ins = run.seconds, run.swap_ins
        again = [dataclasses.replace(r, arrival=start + r.arrival) for r in requests]
        run = serve([*requests, *again])
        served = [Served.of(r, r.arrival_time) for r in run.requests if r.arrival_time >= start]
        predicted = measure(served, run.seconds - start)
        predicted["swap_ins"] = run.swap_ins - swap_ins
    keys = ("requests_per_s", "output_tokens_per_s", "ttft_p50", "tpot_p50", "slo_attainment")
    keys += ("swap_ins",)
    return {key: (row[key], predicted[key]) for key in keys}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    fit = commands.add_parser("fit", help="a model of step times from measured steps")
    fit.add_argument("steps", type=Path, nargs="+")
    fit.add_argument("--out", type=Path, required=True)
    check = commands.add_parser("compare", help="predictions with real runs")
    check.add_argument("rows", type=Path, help="of benchmark_serving.py --json")
    check.add_argument("--device", required=True, help="a fitted file")
    check.add_argument("--cold", action="store_true", help="no adapter was in the pool before")
    serve = commands.add_parser("serve", help="one trace")
    serve.add_argument("--device", default="a10g", help=f"{', '.join(CHIPS)}, or a fitted file")
    serve.add_argument("--setting", choices=SETTINGS, default="S2")
    serve.add_argument("--pool-bytes", type=float)
    serve.add_argument("--max-num-seqs", type=int, default=256)
    serve.add_argument("--max-num-batched-tokens", type=int, default=2048)
    serve.add_argument("--adapters", type=int, default=200)
    serve.add_argument("--rate", type=float, default=2.0)
    serve.add_argument("--duration", type=float, default=300.0)
    serve.add_argument("--alpha", type=float, default=1.0)
    serve.add_argument("--cv", type=float, default=1.0)
    serve.add_argument("--scheduler", default="fcfs")
    serve.add_argument("--ttft-slo", type=float)
    args = parser.parse_args()
    if args.command == "fit":
        steps = [step for path in args.steps for step in read_steps(path)]
        model = StepTimeModel.fit(steps, about=f"{len(steps)} steps of {args.steps}")
        model.save(args.out)
        print("\n".join(describe_fit(model, steps)))
        return
    if args.command == "compare":
        for line in args.rows.read_text().splitlines():
            row = json.loads(line)
            print(f"{row['setting']}, {row['workload']}, {row['num_adapters']} adapters")
            compared = compare(row, StepTimeModel.load(args.device), cold=args.cold)
            for key, (real, found) in compared.items():
                error = f"{found / real - 1:+.1%}" if real else "-"
                print(f"  {key:20} measured {real:9.3f}, predicted {found:9.3f}: {error}")
        return
    device = Device.of(args.device, args.setting, pool_bytes=args.pool_bytes)
    requests = trace(args.rate, args.duration, args.adapters, alpha=args.alpha, cv=args.cv)
    run = device.serve(
        requests,
        args.adapters,
        scheduler=args.scheduler,
        ttft_slo=args.ttft_slo,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
    )
    print(json.dumps(metrics(run), indent=1))


if __name__ == "__main__":
    main()
