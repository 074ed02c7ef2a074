"""EngineConfig: every size and switch of one engine, fixed when it is made.

This module owns the names, defaults and allowed ranges. It refuses to know devices and models: what
is discovered at run time (how many pages fit, which page size suits the heads) is a return value
of the code that discovers it, never written back here.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from slora_jax.errors import ConfigError
from slora_jax.policies import SCHEDULERS, FairOver, SchedulerName

Kernels = Literal["auto", "gpu", "tpu", "xla", "reference"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Options of one engine. Unknown names are errors; nothing here is ever mutated."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights, activations, KV and adapters. ``auto``: bfloat16 on TPU and on GPUs that have it,
    float16 on older GPUs, float32 on CPU. There bfloat16 takes ten times as long (1.3 s a step of
    32 requests with a pool of 1 GiB): XLA computes it in float32, and converts the whole pool there
    and back for each layer. Changing this recompiles."""

    load: Literal["auto", "dummy"] = "auto"
    """``dummy`` makes random weights instead of reading any: for benchmarks."""

    kernels: Kernels = "auto"
    """``auto`` takes the best for the device and ends at plain XLA; a named one never falls
    back."""

    tensor_parallel: int = 1
    """Devices that the model, the pool and the adapters are cut over. Changing this recompiles."""

    lora_partition: Literal["no_extra_collectives", "s_lora"] = "no_extra_collectives"
    """How adapters are cut over several devices (``adapter_partition``). ``s_lora`` reads fewer of
    their bytes and communicates more; it takes ranks up to 128. Changing this recompiles."""

    max_num_seqs: int | None = None
    """Most requests that run at once. Fixes the largest decode bucket: changing this recompiles.
    ``None``: 64, or 256 with the GPU kernels."""

    max_num_batched_tokens: int | None = None
    """Prefill tokens of one step, tile padding included: a longer prompt is read in chunks. Fixes
    the largest prefill bucket: changing this recompiles. ``None``: 256, or 512 with Pallas kernels;
    less makes running requests wait less for long prompts."""

    prefill_tile: int | None = None
    """Prefill chunks are laid out in tiles of this many tokens, so that a tile belongs to one
    request. Changing this recompiles. ``None``: what suits the kernels, 8, 16 or 128."""

    max_model_len: int | None = None
    """Most tokens of one request, prompt and output together. ``None``: the model's
    ``max_position_embeddings``, or what the pool holds where that is less. Changing this
    recompiles."""

    page_size: int | None = None
    """Tokens of KV in one page. ``None``: chosen from the model's KV heads. Changing this
    recompiles."""

    pool_bytes: int | None = None
    """Bytes of the page pool over all layers, on each device. ``None``: what ``memory_fraction``
    leaves."""

    memory_fraction: float = 0.95
    """Share of the memory that JAX may use of the device (on GPUs three quarters, unless
    XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise) for weights, steps and pool together, when
    ``pool_bytes`` is ``None``. What a step needs is measured, the pool takes what is left. Where
    the device does not tell its memory (CPU), the pool takes 1 GiB."""

    host_adapter_bytes: int | None = None
    """CPU memory for adapters. Least recently used ones beyond it fall back to their files;
    adapters given as arrays have no file and always count. ``None``: no bound but, with a GPU, that
    of XLA's pinned memory, beyond which an adapter is refused (64 GB, or
    ``XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB`` in the environment)."""

    scheduler: SchedulerName = "fcfs"
    """Who is admitted next: ``fcfs``, first come, first served; ``lcfs``, last come, first served;
    ``cluster``, few adapters at once (``cluster_size``); ``slo``, S-LoRA's early abort, newest
    first in overload (needs ``ttft_slo``); ``vtc``, fair over clients or adapters (``fair_over``).
    Requests of higher priority go first under each; within their client under ``vtc``."""

    ttft_slo: float | None = None
    """Seconds after its arrival within which a request should get its first token, unless it says
    so itself. With any scheduler, a waiting request that can no longer make it is aborted early.
    ``None``: nobody is."""

    max_overtakes: int = 32
    """Whoever waits longest is admitted next after this many admissions in a row that passed it
    over: no wait without a deadline is unbounded."""

    cluster_size: int = 8
    """Of ``scheduler="cluster"``: once so many adapters run, their requests go first."""

    fair_over: FairOver = "client"
    """Of ``scheduler="vtc"``: who gets equal service, the ``client_id`` of requests or their
    adapters."""

    prefetch: int = 8
    """Waiting requests, next ones first, whose adapters are brought into the pool while its pages
    are free or held by adapters that nobody needs soon. 0: adapters come with admission."""

    compilation_cache: bool = True
    """Keep compiled programs of GPUs and TPUs in the user's cache folder, so that the next start
    takes seconds (JAX's persistent compilation cache). Where JAX has been told of a folder, that
    one is used."""

    seed: int = 0
    """Of requests that sample without a seed of their own."""

    def __post_init__(self) -> None:
        for name, low in (
            ("tensor_parallel", 1),
            ("seed", 0),
            ("max_overtakes", 1),
            ("cluster_size", 1),
            ("prefetch", 0),
        ):
            _check_int(name, getattr(self, name), low)
        for name in (
            "max_num_seqs",
            "max_num_batched_tokens",
            "prefill_tile",
            "max_model_len",
            "page_size",
            "pool_bytes",
        ):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 1)
        if self.host_adapter_bytes is not None:
            _check_int("host_adapter_bytes", self.host_adapter_bytes, 0)
        if self.prefill_tile is not None:
            self.prefill_sizes(self.prefill_tile, self.prefill_tile)
        _check_choice("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        if not isinstance(self.compilation_cache, bool):
            raise ConfigError(f"compilation_cache={self.compilation_cache!r} must be True or False")
        _check_choice("lora_partition", self.lora_partition, ("no_extra_collectives", "s_lora"))
        _check_choice("load", self.load, ("auto", "dummy"))
        _check_choice("kernels", self.kernels, ("auto", "gpu", "tpu", "xla", "reference"))
        _check_choice("scheduler", self.scheduler, SCHEDULERS)
        _check_choice("fair_over", self.fair_over, ("client", "adapter"))
        if self.ttft_slo is not None and not is_time(self.ttft_slo):
            raise ConfigError(f"ttft_slo={self.ttft_slo!r:.80} must be a number of seconds above 0")
        if self.scheduler == "slo" and self.ttft_slo is None:
            raise ConfigError("scheduler='slo' aborts by ttft_slo: give it, in seconds")
        fraction = self.memory_fraction
        if not _is_number(fraction) or not 0 < fraction <= 1:
            raise ConfigError(f"memory_fraction={fraction!r} must be above 0 and at most 1")

    def prefill_sizes(self, suited_tile: int, suited_tokens: int) -> tuple[int, int]:
        """(tokens a tile, most prefill tokens a step), given what suits the kernels."""
        tile = self.prefill_tile or suited_tile
        tokens = self.max_num_batched_tokens or max(suited_tokens // tile, 1) * tile
        if tokens % tile:
            raise ConfigError(
                f"max_num_batched_tokens={tokens} must be a multiple of prefill_tile={tile}"
            )
        return tile, tokens


def _check_int(name: str, value: object, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ConfigError(f"{name}={value!r} must be an integer of at least {low}")


def is_time(value: object) -> bool:
    """Whether it is a number of seconds above 0, which may be infinite."""
    try:
        return _is_number(value) and float(value) > 0  # type: ignore[arg-type]
    except OverflowError:  # an integer that no float holds
        return False


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{name}={value!r} must be one of {', '.join(choices)}")
