"""DataParallelLLM: many prompts over several copies of a model, each on its own devices.

Owns the copies, and who serves which prompt. Each copy is an LLM of its own, with its own pool and
scheduler, in a thread of its own: a step of one waits for no other. For offline work; requests that
come and go want one LLM a copy behind a load balancer. Refuses to know how any of them serves.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from tqdm import tqdm

from slora_jax.config import EngineConfig
from slora_jax.errors import AdapterNotFoundError, ConfigError, RequestFailedError
from slora_jax.llm import LLM, Params, Prompt, engine_config, prompt_list, spread
from slora_jax.outputs import EngineStats, RequestOutput
from slora_jax.sharding import DATA_AXIS, MODEL_AXIS

LEAST_PART = 64
"""Prompts that a copy takes at a time, or more of many: the next go to whichever is free first."""


class DataParallelLLM:
    """Several copies of one model that share the prompts of a call.

    Example:
        >>> mesh = jax.make_mesh((2, 4), ("data", "model"))
        >>> llm = DataParallelLLM("meta-llama/Llama-3.1-8B", mesh=mesh)
        >>> llm.load_adapter("pirate", "checkpoints/adapters/pirate")
        >>> outs = llm.generate(many_prompts, "pirate")

    Args:
        model: as for ``LLM``.
        mesh: one copy for each place along its axis ``"data"``, cut over its axis ``"model"``, if
            it has one. Devices of this process.
        config: an ``EngineConfig`` for every copy; or give its fields by name. A request without a
            seed of its own draws from ``seed`` plus the number of its copy.

    Raises:
        ConfigError, ModelLoadError: as ``LLM``; ConfigError also for a mesh without ``"data"``, or
            of several processes.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        mesh: jax.sharding.Mesh,
        config: EngineConfig | None = None,
        progress: bool = True,
        **options: Any,
    ):
        meshes = _meshes_of_copies(mesh)
        config = engine_config(config, options)
        self._copies: list[LLM] = []
        with contextlib.ExitStack() as made:
            for number, own in enumerate(meshes):
                seeded = engine_config(config, {"seed": config.seed + number})
                llm = LLM(model, mesh=own, config=seeded, progress=progress and not number)
                self._copies.append(made.enter_context(llm))
            self._close = made.pop_all()

    @property
    def copies(self) -> tuple[LLM, ...]:
        """One LLM for each place along the data axis."""
        return tuple(self._copies)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        adapter_ids: str | Sequence[str | None] | None = None,
        sampling_params: Params | Sequence[Params] = None,
        *,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """``LLM.generate``: outputs in the order of ``prompts``, whoever has served them. Their ids
        begin with the copy's number. Ctrl-C takes effect when the parts being served are done.

        Raises:
            InvalidRequestError, AdapterNotFoundError: before anything runs.
            CapacityError: a prompt can never fit; others may have been served.
            RequestFailedError: with the ``outputs`` of all, the finished ones included.
        """
        prompts = prompt_list(prompts)
        # What is wrong with any of them is said before one runs: the copies are all alike.
        self._copies[0].check(prompts, adapter_ids, sampling_params)
        count = len(prompts)
        ids = spread("adapter_ids", adapter_ids, count)
        params = spread("sampling_params", sampling_params, count)
        # Each part's last requests run in a batch that empties: few parts, but no copy idle long.
        size = max(LEAST_PART, -(-count // (8 * len(self._copies))))
        outputs: list[RequestOutput | None] = [None] * count
        failed: RequestFailedError | None = None
        with (
            tqdm(
                total=count, desc="Generating", unit="prompt", disable=not progress, delay=1.0
            ) as bar,
            concurrent.futures.ThreadPoolExecutor(len(self._copies)) as threads,
        ):
            starts = iter(range(0, count, size))
            running: dict[concurrent.futures.Future[list[RequestOutput]], tuple[LLM, int]] = {}

            def begin(llm: LLM) -> None:
                start = next(starts, None)
                if start is not None:
                    part = slice(start, start + size)
                    future = threads.submit(
                        llm.generate, prompts[part], ids[part], params[part], progress=False
                    )
                    running[future] = llm, start

            for llm in self._copies:
                begin(llm)
            while running:
                done, _ = concurrent.futures.wait(
                    running, return_when=concurrent.futures.FIRST_COMPLETED
                )
                for future in done:
                    llm, start = running.pop(future)
                    try:
                        served = future.result()
                    except RequestFailedError as error:
                        failed, served = error, error.outputs
                    copy = self._copies.index(llm)
                    outputs[start : start + len(served)] = [
                        dataclasses.replace(out, request_id=f"{copy}-{out.request_id}")
                        for out in served
                    ]
                    bar.update(len(served))
                    begin(llm)
        if failed is not None:
            raise RequestFailedError(str(failed), [o for o in outputs if o is not None]) from failed
        return [output for output in outputs if output is not None]

    def load_adapter(
        self,
        name: str,
        source: str | os.PathLike[str] | Mapping[str, Any],
        config: Mapping[str, Any] | None = None,
        *,
        pinned: bool = False,
    ) -> None:
        """``LLM.load_adapter`` in every copy, or in none."""
        loaded: list[LLM] = []
        try:
            for llm in self._copies:
                llm.load_adapter(name, source, config, pinned=pinned)
                loaded.append(llm)
        except BaseException:
            for llm in loaded:
                llm.unload_adapter(name)
            raise

    def unload_adapter(self, name: str) -> None:
        """``LLM.unload_adapter`` in every copy that has it; AdapterNotFoundError if none does."""
        missing: list[AdapterNotFoundError] = []
        for llm in self._copies:
            try:
                llm.unload_adapter(name)
            except AdapterNotFoundError as error:
                missing.append(error)
        if len(missing) == len(self._copies):
            raise missing[0]

    def stats(self) -> list[EngineStats]:
        """``LLM.stats`` of each copy."""
        return [llm.stats() for llm in self._copies]

    def close(self) -> None:
        """Give the device memory back. Closing twice is fine."""
        self._close.close()

    def __enter__(self) -> DataParallelLLM:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _meshes_of_copies(mesh: jax.sharding.Mesh) -> list[jax.sharding.Mesh]:
    if not isinstance(mesh, jax.sharding.Mesh) or DATA_AXIS not in mesh.axis_names:
        raise ConfigError(f"mesh={mesh!r:.80} has no axis {DATA_AXIS!r} to spread copies over")
    if not {DATA_AXIS, MODEL_AXIS}.issuperset(mesh.axis_names):
        raise ConfigError(
            f"mesh has axes {', '.join(mesh.axis_names)}: only {DATA_AXIS!r} and {MODEL_AXIS!r} "
            "mean anything here"
        )
    if mesh.is_multi_process:
        raise ConfigError("mesh has devices of other processes: make one in each, of its own")
    rows = mesh.devices if mesh.axis_names[0] == DATA_AXIS else mesh.devices.T
    return [
        jax.sharding.Mesh(row, (MODEL_AXIS,)) for row in rows.reshape(mesh.shape[DATA_AXIS], -1)
    ]
