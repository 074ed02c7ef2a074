"""LLM: the public face. Prompts and adapter names in, texts out.

Owns what a Python caller sees: prompts as text, token ids or chat messages, one or many; adapter
names; progress bars; Ctrl-C. Everything is checked before anything runs. Refuses to know how a step
is scheduled or computed: that is the engine it drives.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from pallas_kernels import dispatch
from pallas_kernels.layout import KVLayout, choose_page_size
from slora_jax import hosts, loading
from slora_jax.adapter_partition import AdapterPartition
from slora_jax.adapter_store import AdapterInfo, PackedAdapter
from slora_jax.config import EngineConfig
from slora_jax.device_memory import measure_step_bytes
from slora_jax.engine import Engine, Generation
from slora_jax.errors import (
    AdapterLoadError,
    CapacityError,
    ConfigError,
    EngineInUseError,
    InvalidRequestError,
    RequestFailedError,
    SloraError,
)
from slora_jax.loading import LoadedModel
from slora_jax.model_runner import ModelRunner
from slora_jax.models.llama import PoolView
from slora_jax.outputs import EngineStats, RequestOutput
from slora_jax.page_pool import HostMemory
from slora_jax.sampling_params import SamplingParams
from slora_jax.sharding import MODEL_AXIS, model_mesh

BASE = "__base__"
"""Names the base model where an adapter name is expected, as in PEFT; the same as ``None``."""

DEFAULT_POOL_BYTES = 2**30
"""Of the pool where the device does not tell its memory (CPU)."""

SUITED_SIZES = {"gpu": (256, 512), "tpu": (64, 512)}
"""Kernels → (max_num_seqs, max_num_batched_tokens) where they are not given; else 64 and 256. A TPU
holds the page tables of a step in its scalar memory, which is small."""

Prompt = str | Sequence[int]
Params = SamplingParams | Mapping[str, Any] | None
_NO_LIST = (str, bytes, bytearray, memoryview, Mapping, Set, type)
"""Have items, but are no list of prompts or of token ids."""
_Checked = tuple[str | None, list[int], SamplingParams, str | None]


@dataclasses.dataclass(frozen=True, eq=False)
class _ReadAdapter:
    """What was asked for, and what became of it."""

    source: str | os.PathLike[str] | Mapping[str, Any]
    config: Mapping[str, Any] | None
    packed: PackedAdapter
    reload: Callable[[], PackedAdapter] | None


class _Turns:
    """The lock under which threads take turns at an engine, or one thread has it for itself."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._owner: threading.Thread | None = None

    def __enter__(self) -> None:
        self._lock.acquire()
        if self._owner not in (None, threading.current_thread()):
            self._lock.release()
            raise EngineInUseError(
                "an AsyncLLM serves this LLM: call the AsyncLLM, or shut it down first"
            )

    def __exit__(self, *exc_info: object) -> None:
        self._lock.release()

    def keep_to(self, owner: threading.Thread | None) -> None:
        """From now on only ``owner`` gets in; None: everybody."""
        with self._lock:
            self._owner = owner


class LLM:
    """Many LoRA adapters of one Llama base model, served together.

    Example:
        >>> llm = LLM("HuggingFaceTB/SmolLM2-135M-Instruct")
        >>> llm.load_adapter("pirate", "checkpoints/adapters/pirate")
        >>> outs = llm.generate(["Hello!", "Hello!"], adapter_ids=["pirate", None])
        >>> outs[0].outputs[0].text

    Args:
        model: a directory (Hugging Face or Orbax form, or a GGUF file), a Hugging Face hub id, or
            the demo alias ``"smollm2-135m-instruct"``; or a ``LoadedModel`` (``load_base_model``,
            ``merge_adapter``), served in its own dtype without a second copy and kept when this is
            closed; with ``load="dummy"`` a directory with a ``config.json``, or ``"llama-7b"``,
            ``"llama-13b"``, ``"llama-3.1-8b"``, ``"llama-3.1-70b"``.
        config: an ``EngineConfig``; or give its fields by name.
        mesh: devices to cut the model over, those of its axis ``"model"``; in place of
            ``tensor_parallel``, which takes the first so many of ``jax.devices()``.
        progress: show bars while a model is fetched and read.

    Raises:
        ConfigError: an option is unknown or cannot work with this model and device.
        ModelLoadError: the base model cannot be read or is not supported.

    May be used from several threads; their requests share the steps. While an ``AsyncLLM`` serves
    it, its methods raise EngineInUseError, but for ``close``.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | LoadedModel,
        *,
        config: EngineConfig | None = None,
        mesh: jax.sharding.Mesh | None = None,
        progress: bool = True,
        **options: Any,
    ):
        config = engine_config(config, options)
        self._mesh = mesh = _choose_mesh(config, mesh)
        self._device = mesh.local_devices[0]
        self._dtype = _choose_dtype(config, self._device)
        self._host = HostMemory.of(mesh)
        self._traces = None
        if config.compilation_cache and self._device.platform != "cpu":
            self._traces = loading.keep_compiled_programs()
        self._owns_weights = not isinstance(model, LoadedModel)
        if isinstance(model, LoadedModel):
            _check_devices_of(model, mesh)
            self._loaded, self._dtype = model, _dtype_of(model, config)
        elif config.load == "dummy":
            self._loaded = loading.dummy_model(model, dtype=self._dtype, mesh=mesh)
        else:
            self._loaded = loading.load_model(
                model, dtype=self._dtype, mesh=mesh, progress=progress
            )
        self.tokenizer = self._loaded.tokenizer
        self._lock = _Turns()
        self._end_server: Callable[[], None] | None = None
        self._engine = self._make_engine(config)

    @property
    def engine(self) -> Engine:
        """The loop underneath, for loops of one's own (``add_request``, ``step``, ``output``).

        It is not thread-safe: keep to one thread, and away from this object's other methods.
        """
        return self._engine

    @property
    def base_model(self) -> LoadedModel:
        """The base by itself: to train on (``slora_jax.training``), to merge an adapter into.

        ``close`` takes it along, unless it was given to this object.
        """
        return self._loaded

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        return self._loaded.model.config.vocab_size

    def _make_engine(self, config: EngineConfig) -> Engine:
        model = self._loaded.model.config
        shards = self._mesh.size
        own = model.share(shards)
        kv = _kv_layout(config, own.num_kv_heads, own.head_dim, self._dtype)
        try:
            adapters = loading.adapter_partition(
                model, shards, config.lora_partition, kv.rows_per_page
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error
        kernels = _choose_kernels(config, self._device, self._dtype, own.num_heads, kv, adapters)
        view = PoolView(kv=kv, adapters=adapters, kernels=kernels)
        suited_seqs, suited_tokens = SUITED_SIZES.get(kernels, (64, 256))
        max_num_seqs = config.max_num_seqs or suited_seqs
        tile, prefill_tokens = config.prefill_sizes(dispatch.PREFILL_TILE[kernels], suited_tokens)
        page_bytes = model.num_layers * kv.rows_per_page * 128 * jnp.dtype(self._dtype).itemsize
        pool_bytes = config.pool_bytes or self._measure_pool_bytes(
            config, view, max_num_seqs=max_num_seqs, tile=tile, prefill_tokens=prefill_tokens
        )
        num_pages = _num_pages(pool_bytes, page_bytes, self._mesh)
        max_model_len = _max_model_len(
            config, model.max_position_embeddings, (num_pages - 1) * kv.page_size
        )
        table_rows = max_num_seqs + prefill_tokens // tile
        try:
            dispatch.check_step(
                kernels, tile=tile, table_entries=table_rows * -(-max_model_len // kv.page_size)
            )
        except NotImplementedError as error:
            raise ConfigError(f"the {kernels} kernels do not take {error}") from error
        try:
            runner = ModelRunner(
                self._loaded.model,
                view,
                num_pages=num_pages,
                dtype=self._dtype,
                mesh=self._mesh,
                max_num_seqs=max_num_seqs,
                prefill_tile=tile,
                max_prefill_tokens=prefill_tokens,
                max_model_len=max_model_len,
                traces=self._traces,
                owns_weights=self._owns_weights,
            )
        except jax.errors.JaxRuntimeError as error:
            raise ConfigError(
                f"the device cannot give the pool's {num_pages * page_bytes:,} bytes: lower "
                f"pool_bytes or memory_fraction ({error})"
            ) from error
        return Engine(
            runner,
            self.tokenizer,
            config,
            num_pages=num_pages,
            max_model_len=max_model_len,
            vocab_size=model.vocab_size,
            eos_token_ids=self._loaded.eos_token_ids,
            journal=hosts.open_journal(self._mesh),
        )

    def _measure_pool_bytes(
        self,
        config: EngineConfig,
        view: PoolView,
        *,
        max_num_seqs: int,
        tile: int,
        prefill_tokens: int,
    ) -> int:
        """What ``memory_fraction`` of a device's memory leaves to the pool, on the fullest one."""
        memories = [device.memory_stats() or {} for device in self._mesh.local_devices]
        if any("bytes_limit" not in memory for memory in memories):
            return DEFAULT_POOL_BYTES
        model = self._loaded.model
        step = measure_step_bytes(
            model,
            view,
            dtype=self._dtype,
            mesh=self._mesh,
            max_num_seqs=max_num_seqs,
            prefill_tile=tile,
            max_prefill_tokens=prefill_tokens,
            max_model_len=config.max_model_len or model.config.max_position_embeddings,
            traces=self._traces,
        )
        limit = min(memory["bytes_limit"] for memory in memories)
        used = max(memory.get("bytes_in_use", 0) for memory in memories)
        left = int(config.memory_fraction * limit) - used - step
        if left <= 0:
            raise ConfigError(
                f"no memory is left for the pool: of {limit:,} bytes that JAX may use of the "
                f"device, weights and other arrays take {used:,} and the largest step "
                f"{step:,}: lower max_num_seqs or max_num_batched_tokens, raise memory_fraction "
                f"({config.memory_fraction}), or let JAX use more (XLA_PYTHON_CLIENT_MEM_FRACTION)"
            )
        return left

    # -- generating -------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        adapter_ids: str | Sequence[str | None] | None = None,
        sampling_params: Params | Sequence[Params] = None,
        *,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Complete each prompt with its adapter, all in one continuously batched run.

        Args:
            prompts: text, token ids, or a list of either.
            adapter_ids: one name for all prompts, or one per prompt; ``None`` and ``"__base__"``
            are
                the base model.
            sampling_params: one for all, or one per prompt; dicts of its fields will do.
            progress: show a bar on calls that take more than a second.

        Returns:
            One ``RequestOutput`` per prompt, in the order of ``prompts``.

        Raises:
            InvalidRequestError, AdapterNotFoundError, CapacityError: before anything runs.
            RequestFailedError: an accepted request could not be finished; its ``outputs`` has them
                all, the finished ones included.
        """
        return self._run(self.check(prompts, adapter_ids, sampling_params), progress)

    def chat(
        self,
        messages: Sequence[Mapping[str, str]] | Sequence[Sequence[Mapping[str, str]]],
        adapter_ids: str | Sequence[str | None] | None = None,
        sampling_params: Params | Sequence[Params] = None,
        *,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """``generate`` on conversations: lists of ``{"role": …, "content": …}`` messages.

        One conversation or a list of them, rendered by the model's own chat template.
        """
        self._engine.check_open()
        prompts = [
            loading.render_chat(self.tokenizer, conversation)
            for conversation in _conversations(messages)
        ]
        return self._run(
            self.check(prompts, adapter_ids, sampling_params, special_tokens=False), progress
        )

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        adapter_ids: str | Sequence[str | None] | None = None,
        sampling_params: Params | Sequence[Params] = None,
    ) -> Iterator[tuple[int, RequestOutput]]:
        """Like ``generate``, but yields ``(index of the prompt, partial output)`` as tokens arrive.

        Each output holds everything so far; the last one of a prompt has ``finished`` set.
        Arguments are checked at once; requests are queued when iteration begins, and aborted when
        it is left early.
        """
        checked = self.check(prompts, adapter_ids, sampling_params)
        one_each = [
            (text, token_ids, dataclasses.replace(params, n=1, seed=0), adapter_id)
            for text, token_ids, params, adapter_id in checked
        ]
        with _deferred_interrupt(), self._lock:
            # Some things only queueing refuses: queue once, and take all back.
            self._retract_all(self._add_all(one_each))
        return self._stream(checked)

    def _run(self, checked: list[_Checked], progress: bool) -> list[RequestOutput]:
        generations: list[Generation] = []
        try:
            with (
                _deferred_interrupt() as interrupted,
                tqdm(
                    total=len(checked),
                    desc="Generating",
                    unit="prompt",
                    disable=not progress,
                    delay=1.0,
                ) as bar,
            ):
                generations = self._add_all(checked)
                shown = time.monotonic()
                for generation in generations:  # any behind it may finish before it
                    while not generation.finished:
                        self._step()
                        if time.monotonic() - shown > 0.1:  # there may be thousands to look at
                            bar.update(sum(g.finished for g in generations) - bar.n)
                            shown = time.monotonic()
                        if interrupted.is_set():
                            raise KeyboardInterrupt
                bar.update(len(generations) - bar.n)
        finally:
            self._abort_all(generations)
        with self._lock:
            return self._outputs_of(generations)

    def _stream(self, checked: list[_Checked]) -> Iterator[tuple[int, RequestOutput]]:
        generations: list[Generation] = []
        shown = [0] * len(checked)  # tokens, and one more for the end
        is_done = [False] * len(checked)  # not `finished`: another thread's step may have ended it
        try:
            with _deferred_interrupt():
                generations = self._add_all(checked)
            while not all(is_done):
                with _deferred_interrupt():
                    self._step()
                for index, generation in enumerate(generations):
                    with self._lock:
                        count = generation.num_output_tokens + generation.finished
                        if count == shown[index]:
                            continue
                        output = self._engine.output(generation)
                    shown[index], is_done[index] = count, output.finished
                    yield index, output
        finally:
            self._abort_all(generations)
        with self._lock:
            self._outputs_of(generations)

    def _outputs_of(self, generations: list[Generation]) -> list[RequestOutput]:
        """Of generations that have ended, unless one failed, or the engine was closed under it."""
        outputs = [self._engine.output(generation) for generation in generations]
        _raise_failures(outputs)
        ends = [completion.finish_reason for output in outputs for completion in output.outputs]
        if "abort" in ends:  # all that its caller did not abort
            self._engine.check_open()
        return outputs

    def _step(self) -> None:
        with self._lock:
            if self._engine.has_unfinished:
                self._engine.step()

    def _add_all(self, checked: list[_Checked]) -> list[Generation]:
        """All or none: where one is refused, those already queued are taken back."""
        generations: list[Generation] = []
        with self._lock:
            try:
                for text, token_ids, params, adapter_id in checked:
                    generations.append(
                        self._engine.add_request(token_ids, params, adapter_id, prompt=text)
                    )
            except BaseException as error:  # a Ctrl-C too must leave nothing in the queue
                self._retract_all(generations)
                if isinstance(error, InvalidRequestError | CapacityError):
                    raise type(error)(f"prompt {len(generations)}: {error}") from error
                raise
        return generations

    def _retract_all(self, generations: list[Generation]) -> None:
        for generation in generations:
            self._engine.retract(generation)

    def _abort_all(self, generations: list[Generation]) -> None:
        with self._lock:
            for generation in generations:
                self._engine.abort(generation)

    # -- adapters ---------------------------------------------------------------------------------

    def load_adapter(
        self,
        name: str,
        source: str | os.PathLike[str] | Mapping[str, Any],
        config: Mapping[str, Any] | None = None,
        *,
        pinned: bool = False,
    ) -> AdapterInfo:
        """Register an adapter under ``name``; requests can use it from now on.

        Args:
            name: what ``adapter_ids`` will call it.
            source: a PEFT directory, a hub id, or tensors by PEFT's names (numpy or jax arrays)
                with PEFT's configuration in ``config``.
            config: PEFT's ``adapter_config.json`` as a dict, with arrays only.
            pinned: bring it into the pool now and keep it there.

        Raises:
            AdapterLoadError: its files or arrays cannot be used; the message says what to change.
            AdapterInUseError: the name is taken.
            CapacityError: it does not fit in the pool, in ``host_adapter_bytes``, or in what CPU
                memory XLA pins for a GPU (64 GB unless ``XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB``).
        """
        self._check_new_name(name)
        adapter = self._read_adapter(name, source, config)
        return self._register_adapter(name, adapter, pinned=pinned)

    def _check_new_name(self, name: str) -> None:
        _check_adapter_name(name)
        with self._lock:
            self._engine.check_name_is_free(name)

    def _read_adapter(
        self,
        name: str,
        source: str | os.PathLike[str] | Mapping[str, Any],
        config: Mapping[str, Any] | None,
    ) -> _ReadAdapter:
        """The slow part of loading, which touches nothing that steps do."""
        partition = self._engine.view.adapters
        about = self._loaded.hyperparameters
        if isinstance(source, Mapping):
            if config is None:
                raise AdapterLoadError(
                    f"adapter {name!r} is given as arrays: give its PEFT configuration too, "
                    "such as config={'r': 8, 'lora_alpha': 16, 'target_modules': ['q_proj']}"
                )
            if isinstance(config, Mapping):  # kept, for `update_adapter`
                config = copy.deepcopy(dict(config))
            packed = loading.adapter_from_arrays(
                source,
                config,
                about,
                partition,
                self._dtype,
                self._host,
                source=f"adapter {name!r}",
            )
            reload = None
        else:
            if config is not None and isinstance(source, str | os.PathLike):
                raise AdapterLoadError(
                    f"adapter {name!r} is a directory and has its own adapter_config.json: "
                    "give config only together with arrays"
                )
            reload = loading.adapter_loader(source, about, partition, self._dtype, self._host)
            packed = reload()
        return _ReadAdapter(source, config, packed, reload)

    def _register_adapter(self, name: str, adapter: _ReadAdapter, *, pinned: bool) -> AdapterInfo:
        with self._lock:
            self._engine.record("load_adapter", name, adapter.source, adapter.config)
            info = self._engine.register_adapter(name, adapter.packed, adapter.reload)
            if pinned:
                try:
                    self._engine.pin_adapter(name)
                except SloraError:
                    self._engine.unregister_adapter(name)
                    raise
        return info

    def update_adapter(self, name: str, arrays: Mapping[str, Any]) -> AdapterInfo:
        """Give a loaded adapter other weights, between steps: the loop of reinforcement learning.

        Requests added from now on use them; those already queued or running finish on the old
        ones, which are then dropped. The new weights have no files to be read from again.

        Args:
            name: of a loaded adapter; its PEFT configuration stays.
            arrays: tensors by PEFT's names, such as ``Trainer.adapter``.

        Raises:
            AdapterNotFoundError: no adapter has this name.
            AdapterLoadError: the tensors do not fit its configuration; the old ones stay.
            CapacityError: they do not fit in ``host_adapter_bytes`` beside the old ones; or the
                adapter was pinned and finds no room while requests run on the old weights: then it
                has the new ones and is no longer pinned.
        """
        packed = self._pack_update(name, self._adapter_config(name), arrays)
        with self._lock:
            return self._swap_weights(name, arrays, packed)

    def _adapter_config(self, name: str) -> Mapping[str, Any]:
        _check_adapter_name(name)
        with self._lock:
            return self._engine.adapter_config(name)

    def _pack_update(
        self, name: str, config: Mapping[str, Any], arrays: Mapping[str, Any]
    ) -> PackedAdapter:
        if not isinstance(arrays, Mapping):
            raise AdapterLoadError(
                f"adapter {name!r} is updated with {_short(arrays)}: give tensors by PEFT's names"
            )
        return loading.adapter_from_arrays(
            arrays,
            config,
            self._loaded.hyperparameters,
            self._engine.view.adapters,
            self._dtype,
            self._host,
            source=f"adapter {name!r}",
        )

    def _swap_weights(
        self, name: str, arrays: Mapping[str, Any], packed: PackedAdapter
    ) -> AdapterInfo:
        self._engine.record("update_adapter", name, arrays)
        return self._engine.update_adapter(name, packed)

    def load_dummy_adapters(
        self, names: Sequence[str], ranks: Sequence[int], targets: Sequence[str]
    ) -> None:
        """Register distinct random adapters, for benchmarks.

        ``ranks``: one a name, multiples of 8; ``targets``: of q, k, v, o, gate, up, down.
        """
        with self._lock:
            self._engine.record("load_dummy_adapters", names, ranks, targets)
            packed = loading.dummy_adapters(
                ranks,
                targets,
                self._loaded.model.config.num_layers,
                self._engine.view.adapters,
                self._dtype,
                self._host,
            )
            for name, adapter in zip(names, packed, strict=True):
                self._engine.register_adapter(name, adapter, None)

    def warm_up(self) -> None:
        """Compile, in parallel, every size of step that greedy requests of the adapters loaded so
        far can need, so that no request waits for it. Without it each is compiled when first
        needed. Plain XLA has many more sizes than Pallas kernels: there those of the base alone,
        and of adapters whose ranks sum to a quarter of the most or more.
        """
        with self._lock:
            self._engine.warm_up()

    def unload_adapter(self, name: str) -> None:
        """Forget ``name``: new requests are refused at once, running ones finish on it.

        Its memory is freed when the last of them ends. The name may be loaded anew at once; that is
        another version, and old requests keep the old one.
        """
        _check_adapter_name(name)
        with self._lock:
            self._engine.unregister_adapter(name)

    def pin_adapter(self, name: str) -> None:
        """Bring the adapter into the pool now and never evict it.

        Raises:
            CapacityError: pinned adapters would leave too little for accepted requests.
        """
        _check_adapter_name(name)
        with self._lock:
            self._engine.pin_adapter(name)

    def unpin_adapter(self, name: str) -> None:
        """Let a pinned adapter be evicted again when it is idle."""
        _check_adapter_name(name)
        with self._lock:
            self._engine.unpin_adapter(name)

    def list_adapters(self) -> list[AdapterInfo]:
        """Every loaded adapter: name, version, ranks, pages, bytes, and where it is."""
        with self._lock:
            return self._engine.list_adapters()

    # -- the engine -------------------------------------------------------------------------------

    @property
    def max_model_len(self) -> int:
        """Most tokens of one request, prompt and output together."""
        return self._engine.max_model_len

    def stats(self) -> EngineStats:
        """The pool's pages by owner, and counts since the start; ``print`` shows a report."""
        with self._lock:
            return self._engine.stats()

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the base model in Orbax form, with its tokenizer; ``LLM(directory)`` reads it."""
        self._engine.check_open()
        loading.save_model(self._loaded, directory)

    def close(self) -> None:
        """Abort what runs; give the device's memory back and the adapters' CPU memory.

        Closing twice is fine. A ``LoadedModel`` that was given stays: it is the caller's. An
        ``AsyncLLM`` that serves this is shut down first.
        """
        end_server = self._end_server
        if end_server is not None:
            end_server()
        with self._lock:
            self._engine.close()

    def _lend(self, owner: threading.Thread, end: Callable[[], None]) -> None:
        """Serve ``owner`` alone until ``_take_back``; ``end`` makes it give this back.

        Raises:
            EngineInUseError: another thread has it, or requests run that the owner does not know.
            EngineClosedError: closed.
        """
        with self._lock:
            self._engine.check_open()
            if self._engine.has_unfinished:
                raise EngineInUseError("requests of this LLM are still running: let them end first")
            self._lock.keep_to(owner)
            self._end_server = end

    def _take_back(self) -> None:
        self._end_server = None
        self._lock.keep_to(None)

    def follow(self) -> None:
        """Where several processes serve one model: in all but process 0, do what that one does,
        until it calls ``close``.

        Raises:
            ConfigError: there is nobody to follow.
            HostLostError: process 0 is gone.
        """
        if not isinstance(self._engine.journal, hosts.Follower):
            raise ConfigError("there is no process 0 to follow: this one decides for itself")
        self._engine.follow(
            {
                "load_adapter": self.load_adapter,
                "update_adapter": self.update_adapter,
                "load_dummy_adapters": self.load_dummy_adapters,
            }
        )
        self.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # -- checking arguments -----------------------------------------------------------------------

    def check(
        self,
        prompts: Any,
        adapter_ids: Any,
        sampling_params: Any,
        *,
        special_tokens: bool = True,
    ) -> list[_Checked]:
        """Everything that can be known to be wrong is refused here, before anything is queued."""
        self._engine.check_open()
        if isinstance(adapter_ids, SamplingParams):
            raise InvalidRequestError(
                "the second argument is adapter_ids: pass sampling_params by name"
            )
        prompts = prompt_list(prompts)
        adapters = [_adapter_id(a) for a in spread("adapter_ids", adapter_ids, len(prompts))]
        params = [
            _sampling_params(p) for p in spread("sampling_params", sampling_params, len(prompts))
        ]
        with self._lock:
            for adapter_id in adapters:
                self._engine.adapter_version(adapter_id)
        return [
            (*self._tokens(index, prompt, special_tokens), params[index], adapters[index])
            for index, prompt in enumerate(prompts)
        ]

    def _check_one(
        self, prompt: Any, adapter_id: Any, sampling_params: Any
    ) -> tuple[str | None, list[int], SamplingParams, str | None]:
        """One request's arguments but for what the engine's state decides; takes no lock."""
        return (
            *self._tokens(0, prompt, special_tokens=True),
            _sampling_params(sampling_params),
            _adapter_id(adapter_id),
        )

    def _tokens(
        self, index: int, prompt: Any, special_tokens: bool
    ) -> tuple[str | None, list[int]]:
        if isinstance(prompt, str):
            try:
                prompt.encode()  # a lone surrogate is no text: this says where it is
                return prompt, self.tokenizer.encode(prompt, add_special_tokens=special_tokens)
            except Exception as error:  # the library of tokenizers raises what it likes
                raise InvalidRequestError(
                    f"prompt {index} is no text that the tokenizer takes: {error}"
                ) from error
        if not _is_token_ids(prompt):
            raise InvalidRequestError(
                f"prompt {index} is {_short(prompt)}: give text or a list of token ids"
            )
        return None, [int(token_id) for token_id in prompt]


def engine_config(config: EngineConfig | None, options: Mapping[str, Any]) -> EngineConfig:
    """``config`` with ``options`` in their places. ConfigError for what is none of its fields."""
    known = [field.name for field in dataclasses.fields(EngineConfig)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigError(f"unknown option {', '.join(unknown)}: there are {', '.join(known)}")
    if config is None:
        return EngineConfig(**options)
    if not isinstance(config, EngineConfig):
        raise ConfigError(f"config is {_short(config)}: give an EngineConfig")
    return dataclasses.replace(config, **options)


def _choose_mesh(config: EngineConfig, mesh: jax.sharding.Mesh | None) -> jax.sharding.Mesh:
    """The devices that the model is cut over."""
    count = config.tensor_parallel
    if mesh is None:
        devices = jax.devices()
        if count > len(devices):
            raise ConfigError(
                f"tensor_parallel={count} needs as many devices, there are {len(devices)} of "
                f"platform {devices[0].platform!r}"
            )
        return model_mesh(devices[:count])
    if not isinstance(mesh, jax.sharding.Mesh) or MODEL_AXIS not in mesh.axis_names:
        raise ConfigError(f"mesh={_short(mesh)} has no axis {MODEL_AXIS!r} to cut the model over")
    size = mesh.shape[MODEL_AXIS]
    if mesh.size != size:
        raise ConfigError(
            f"mesh has {mesh.size} devices and only {size} of them along {MODEL_AXIS!r}: give a "
            "mesh of that axis alone, or make a DataParallelLLM"
        )
    if not mesh.local_devices:
        raise ConfigError(f"none of mesh={_short(mesh)} are devices of this process")
    if count not in (1, size):
        raise ConfigError(
            f"tensor_parallel={count} and a mesh of {size} devices: give one of the two"
        )
    return model_mesh(list(mesh.devices.flat))


def _choose_kernels(
    config: EngineConfig,
    device: Any,
    dtype: jnp.dtype,
    num_heads: int,
    kv: KVLayout,
    adapters: AdapterPartition,
) -> str:
    """The implementation that serves every stage of the adapters; ``num_heads`` of one device."""
    names = set()
    for layout in adapters.stages:
        try:
            names.add(
                dispatch.choose(
                    config.kernels,
                    device,
                    dtype=dtype,
                    num_heads=num_heads,
                    kv=kv,
                    adapters=layout,
                )
            )
        except NotImplementedError as error:
            raise ConfigError(f"kernels={config.kernels!r}: {error}") from error
    return names.pop() if len(names) == 1 else "xla"


def _choose_dtype(config: EngineConfig, device: Any) -> jnp.dtype:
    if config.dtype != "auto":
        return jnp.dtype(config.dtype)
    if device.platform == "tpu":
        return jnp.dtype(jnp.bfloat16)
    if device.platform == "gpu":
        capability = float(getattr(device, "compute_capability", "0"))
        return jnp.dtype(jnp.bfloat16 if capability >= 8 else jnp.float16)
    return jnp.dtype(jnp.float32)


def _check_devices_of(model: LoadedModel, mesh: jax.sharding.Mesh) -> None:
    weight = model.model.final_norm.weight[...]
    if weight.is_deleted():
        raise ConfigError("the model's weights are gone: the LLM that read them has been closed")
    devices, wanted = weight.sharding.device_set, set(mesh.devices.flat)
    if model.model.shards.count != mesh.size or devices != wanted:
        raise ConfigError(
            f"the model given is loaded on {sorted(map(str, devices))}, but it is to be served on "
            f"{sorted(map(str, wanted))}: give the model's name, and it is loaded there"
        )


def _dtype_of(model: LoadedModel, config: EngineConfig) -> jnp.dtype:
    """The loaded model's own, which an explicit ``dtype`` must not contradict."""
    dtype = jnp.dtype(model.model.final_norm.weight[...].dtype)
    if config.dtype not in ("auto", dtype.name):
        raise ConfigError(
            f"dtype={config.dtype!r}, but the model given is loaded in {dtype.name}: leave dtype "
            "out, or load the model in the dtype you want"
        )
    return dtype


def _kv_layout(
    config: EngineConfig, num_kv_heads: int, head_dim: int, dtype: jnp.dtype
) -> KVLayout:
    page_size = config.page_size or choose_page_size(num_kv_heads, head_dim, dtype.itemsize)
    try:
        return KVLayout(num_kv_heads, head_dim, page_size)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _num_pages(pool_bytes: int, page_bytes: int, mesh: jax.sharding.Mesh) -> int:
    """Pages of the pool, the null page included; bytes of one device."""
    if mesh.is_multi_process:  # as many on all devices
        pages = np.asarray(min(pool_bytes // page_bytes, 2**31 - 1), np.int32)
        pool_bytes = page_bytes * int(np.min(multihost_utils.process_allgather(pages)))
    if pool_bytes < 2 * page_bytes:
        where = "" if mesh.size == 1 else f" on each of {mesh.size} devices"
        raise ConfigError(
            f"the pool of {pool_bytes:,} bytes{where} holds less than one page of KV: pool_bytes "
            f"must be at least {2 * page_bytes:,}, the null page included"
        )
    if pool_bytes // page_bytes >= 2**31:
        raise ConfigError(
            f"the pool of {pool_bytes:,} bytes has more pages than the 2**31 - 1 that can have an "
            "id: lower pool_bytes"
        )
    return pool_bytes // page_bytes


def _max_model_len(config: EngineConfig, model_limit: int, pool_tokens: int) -> int:
    if pool_tokens < 2:
        raise ConfigError("the pool holds less than one page of KV: raise pool_bytes")
    asked = config.max_model_len
    if asked is None:
        return min(model_limit, pool_tokens)
    if asked < 2 or asked > model_limit:
        raise ConfigError(
            f"max_model_len={asked} must be 2 to {model_limit}, the model's max_position_embeddings"
        )
    if asked > pool_tokens:
        raise ConfigError(
            f"max_model_len={asked} does not fit: the pool holds {pool_tokens} tokens of KV; "
            "raise pool_bytes or lower max_model_len"
        )
    return asked


def prompt_list(prompts: Any) -> list[Any]:
    """One prompt or many as a list."""
    if isinstance(prompts, str) or (_is_token_ids(prompts) and len(prompts)):
        return [prompts]
    with contextlib.suppress(TypeError):
        if not isinstance(prompts, _NO_LIST):
            return list(prompts)
    raise InvalidRequestError(
        f"prompts is {_short(prompts)}: give text, token ids, or a list of either"
    )


def _is_token_ids(value: Any) -> bool:
    return (
        hasattr(value, "__len__")
        and hasattr(value, "__iter__")
        and not isinstance(value, _NO_LIST)
        and getattr(value, "ndim", 1) == 1
        and all(isinstance(i, Integral) and not isinstance(i, bool) for i in value)
    )


def spread(name: str, value: Any, count: int) -> list[Any]:
    """One value for all prompts, or a list with one for each."""
    if value is None or isinstance(value, str | SamplingParams | Mapping):
        return [value] * count
    if not isinstance(value, Sequence):
        raise InvalidRequestError(
            f"{name} is {_short(value)}: give one, or a list with one a prompt"
        )
    if len(value) != count:
        raise InvalidRequestError(
            f"{name} has {len(value)} entries for {count} prompts: give one, or as many as prompts"
        )
    return list(value)


def _adapter_id(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise InvalidRequestError(
            f"adapter id {_short(value)} is not a name: give a loaded adapter's name, "
            f"or None or {BASE!r} for the base model"
        )
    return None if value == BASE else value


def _sampling_params(value: Any) -> SamplingParams:
    if value is None:
        return SamplingParams()
    if isinstance(value, SamplingParams):
        return value
    if isinstance(value, Mapping):
        return SamplingParams.from_dict(value)
    raise InvalidRequestError(f"sampling_params is {_short(value)}: give SamplingParams or a dict")


def _check_adapter_name(name: Any) -> None:
    if not isinstance(name, str) or not name or name == BASE:
        raise InvalidRequestError(
            f"adapter name {_short(name)} cannot be used: give a non-empty "
            f"string other than {BASE!r}"
        )


def _conversations(messages: Any) -> list[Any]:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise InvalidRequestError(
            f"messages is {_short(messages)}: give a list of "
            "{'role': …, 'content': …} messages, or a list of such lists"
        )
    one = bool(messages) and isinstance(messages[0], Mapping)
    conversations = [messages] if one else list(messages)
    for conversation in conversations:
        if isinstance(conversation, str) or not isinstance(conversation, Sequence):
            raise InvalidRequestError(
                f"a conversation is {_short(conversation)}: give a list of messages"
            )
        if not conversation:
            raise InvalidRequestError("a conversation is empty: give at least one message")
        for message in conversation:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise InvalidRequestError(
                    f"a message is {_short(message)}: give {{'role': …, 'content': …}} with a role "
                    "such as 'user'"
                )
    return conversations


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _raise_failures(outputs: list[RequestOutput]) -> None:
    failed = [output for output in outputs if output.error is not None]
    if failed:
        first = failed[0]
        raise RequestFailedError(
            f"{len(failed)} of {len(outputs)} requests failed; the first (adapter "
            f"{first.adapter_id!r}): {first.error}",
            outputs,
        ) from first.error


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """Ctrl-C inside is raised at the end: a step cut in half would lose the donated pool.

    A second Ctrl-C is not held back. Outside the main thread signals do not arrive, and nothing is
    changed.
    """
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return

    def note(signum: int, frame: object) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, previous)

    previous = signal.getsignal(signal.SIGINT)
    if not callable(previous):
        yield interrupted
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)
    if interrupted.is_set():
        raise KeyboardInterrupt
