"""AsyncLLM: the engine online. Many callers, one asyncio loop or several, one engine thread.

The thread alone touches the engine: it takes what callers ask for between two steps, steps while
anything is unfinished, and hands outputs over to each caller's loop. Owns the bounded queue, what
becomes of callers when something fails, and the end. Refuses to know how a step is scheduled or
computed.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, TypeVar

from slora_jax.adapter_store import AdapterInfo
from slora_jax.engine import Generation
from slora_jax.errors import (
    ConfigError,
    EngineClosedError,
    InvalidRequestError,
    OverloadedError,
)
from slora_jax.llm import LLM, Params, Prompt
from slora_jax.outputs import EngineStats, RequestOutput

logger = logging.getLogger("slora_jax.async_llm")

MOST_FAILURES = 3
"""Failed device steps in a row after which the engine is given up."""

T = TypeVar("T")


class _Stream:
    """The way of one request's outputs to its caller: the newest one, each holds all before it."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.generation: Generation | None = None  # the engine thread's
        self.is_left = False  # the caller waits no longer
        self._changed = asyncio.Event()
        self._newest: RequestOutput | Exception | None = None

    def put(self, newest: RequestOutput | Exception) -> None:
        """On the caller's loop."""
        self._newest = newest
        self._changed.set()

    async def take(self) -> RequestOutput:
        """Wait for something new."""
        await self._changed.wait()
        self._changed.clear()
        newest = self._newest
        assert newest is not None
        if isinstance(newest, Exception):
            raise newest
        return newest


@dataclasses.dataclass(frozen=True)
class _Command:
    """Something to do between two steps, and whom to tell where it fails."""

    run: Callable[[], None]
    fail: Callable[[Exception], None]


class AsyncLLM:
    """Serves an ``LLM`` to many asyncio callers at once.

    Example:
        >>> llm = LLM("HuggingFaceTB/SmolLM2-135M-Instruct")
        >>> async with AsyncLLM(llm) as engine:
        ...     await engine.load_adapter("pirate", "checkpoints/adapters/pirate")
        ...     async for out in engine.generate("Hello!", "pirate"):
        ...         print(out.outputs[0].text)

    Args:
        llm: what to serve, alone: until ``shutdown`` gives it back, its own methods raise
            EngineInUseError; its ``close`` shuts this down.
        max_waiting: most requests (each of ``n`` completions counts) that may wait for admission;
            more are refused with OverloadedError.

    A failure of one request, or of the adapter it uses, ends that request alone. Where the device
    step fails, the requests that were running end with RequestFailedError and its cause, those that
    wait are served by a new pool; after ``MOST_FAILURES`` in a row, or where there can be no new
    pool, all end with EngineClosedError, and so does everything that is asked later.

    Raises:
        ConfigError: ``llm`` is no LLM, or ``max_waiting`` no positive integer.
        EngineInUseError: another AsyncLLM serves the LLM, or requests of its own are running.
        EngineClosedError: the LLM was closed.
    """

    def __init__(self, llm: LLM, *, max_waiting: int = 1024):
        if not isinstance(llm, LLM):
            raise ConfigError(f"llm={llm!r:.80} must be an LLM")
        if not isinstance(max_waiting, int) or isinstance(max_waiting, bool) or max_waiting < 1:
            raise ConfigError(f"max_waiting={max_waiting!r} must be an integer of at least 1")
        self._llm = llm
        self._max_waiting = max_waiting
        # Guarded by `_wake`.
        self._wake = threading.Condition()
        self._inbox: list[_Command] = []
        self._num_asked = 0  # completions asked for in the inbox
        self._num_taken = 0  # likewise, in commands that are being run
        self._num_waiting = 0  # in the scheduler, after the last step
        self._refusal: str | None = None  # why new requests are refused
        self._is_closed = False  # and why anything else is
        # The engine thread's.
        self._streams: dict[str, _Stream] = {}
        self._when_idle: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
        self._num_failures = 0
        self._thread = threading.Thread(target=self._serve, name="slora-jax engine", daemon=True)
        llm._lend(self._thread, end=lambda: self._end("its LLM was closed"))
        self._thread.start()

    # -- requests ---------------------------------------------------------------------------------

    async def generate(
        self,
        prompt: Prompt,
        adapter_id: str | None = None,
        sampling_params: Params = None,
        *,
        client_id: str | None = None,
        priority: int = 0,
        ttft_slo: float | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Complete one prompt; yields everything so far whenever there is more.

        The last output has ``finished`` set. A caller that is slow misses outputs in between, never
        the last. Leaving the loop, closing the iterator or cancelling the task aborts the request.

        Args:
            prompt: text or token ids.
            adapter_id: a loaded adapter; None and ``"__base__"`` are the base model.
            sampling_params: or a dict of its fields.
            client_id: on whose behalf, for fair scheduling.
            priority: higher ones are admitted first.
            ttft_slo: seconds from now within which the first token must come; a request that can no
                longer make it while it waits is aborted. None: what the engine's options say.

        Raises:
            InvalidRequestError, AdapterNotFoundError, CapacityError: nothing was queued.
            OverloadedError: too many wait; nothing was queued.
            AdapterLoadError: the adapter's files could not be read again.
            DeadlineExceededError: given up while waiting.
            RequestFailedError: the device step failed; its cause says why.
            EngineClosedError: shut down, or dead; the message says why.
        """
        checked = await asyncio.to_thread(self._llm._check_one, prompt, adapter_id, sampling_params)
        text, token_ids, params, adapter_id = checked
        if params.n > self._max_waiting:
            raise InvalidRequestError(
                f"n={params.n} completions can never wait at once: max_waiting={self._max_waiting}"
            )
        stream = _Stream()

        def add() -> None:
            if stream.is_left:
                return
            stream.generation = self._llm.engine.add_request(
                token_ids,
                params,
                adapter_id,
                prompt=text,
                client_id=client_id,
                priority=priority,
                ttft_slo=ttft_slo,
            )
            self._streams[stream.generation.request_id] = stream

        self._ask(add, lambda error: self._tell(stream, error), new_requests=params.n)
        output = None
        try:
            while output is None or not output.finished:
                output = await stream.take()
                if output.error is not None and output.finished:
                    raise output.error
                yield output
        finally:
            stream.is_left = True
            if output is None or not output.finished:
                with contextlib.suppress(EngineClosedError):
                    self._ask(lambda: self._leave(stream), lambda error: None)

    # -- adapters ---------------------------------------------------------------------------------

    async def load_adapter(
        self,
        name: str,
        source: str | os.PathLike[str] | Mapping[str, Any],
        config: Mapping[str, Any] | None = None,
        *,
        pinned: bool = False,
    ) -> AdapterInfo:
        """See ``LLM.load_adapter``. Steps go on while the files are read."""
        await self._call(lambda: self._llm._check_new_name(name))
        adapter = await asyncio.to_thread(self._llm._read_adapter, name, source, config)
        return await self._call(lambda: self._llm._register_adapter(name, adapter, pinned=pinned))

    async def update_adapter(self, name: str, arrays: Mapping[str, Any]) -> AdapterInfo:
        """See ``LLM.update_adapter``. Steps go on while the arrays are laid out."""
        config = await self._call(lambda: self._llm._adapter_config(name))
        packed = await asyncio.to_thread(self._llm._pack_update, name, config, arrays)
        return await self._call(lambda: self._llm._swap_weights(name, arrays, packed))

    async def unload_adapter(self, name: str) -> None:
        """See ``LLM.unload_adapter``."""
        await self._call(lambda: self._llm.unload_adapter(name))

    async def pin_adapter(self, name: str) -> None:
        """See ``LLM.pin_adapter``."""
        await self._call(lambda: self._llm.pin_adapter(name))

    async def unpin_adapter(self, name: str) -> None:
        """See ``LLM.unpin_adapter``."""
        await self._call(lambda: self._llm.unpin_adapter(name))

    async def list_adapters(self) -> list[AdapterInfo]:
        """See ``LLM.list_adapters``."""
        return await self._call(self._llm.list_adapters)

    async def stats(self) -> EngineStats:
        """See ``LLM.stats``."""
        return await self._call(self._llm.stats)

    def stats_between_steps(self, timeout: float = 10.0) -> EngineStats:
        """``stats`` for threads without a loop, as Prometheus' is; not for a coroutine: it waits.

        Raises TimeoutError where a step takes longer than ``timeout`` seconds.
        """
        future = self._call_soon(self._llm.stats)
        return future.result(timeout)

    # -- the end ----------------------------------------------------------------------------------

    async def drain(self) -> None:
        """Refuse new requests and wait until all that were accepted have ended."""
        with self._wake:
            self._refusal = self._refusal or "it is being drained"
        idle = asyncio.Event()
        loop = asyncio.get_running_loop()
        await self._call(lambda: self._when_idle.append((loop, idle)))
        await idle.wait()

    async def shutdown(self) -> None:
        """End all requests with EngineClosedError and give the LLM back, as it is, to whoever made
        it. Doing it twice is fine. ``drain`` first lets requests finish.
        """
        await asyncio.to_thread(self._end, "shutdown() was called")

    def _end(self, why: str) -> None:
        """Does not return before the engine thread has ended."""
        with contextlib.suppress(EngineClosedError):
            self._ask(lambda: self._close(why, None), lambda error: None)
        self._thread.join()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.shutdown()

    # -- from callers to the engine thread --------------------------------------------------------

    async def _call(self, function: Callable[[], T]) -> T:
        """What ``function`` returns or raises, run between two steps."""
        return await asyncio.wrap_future(self._call_soon(function))

    def _call_soon(self, function: Callable[[], T]) -> concurrent.futures.Future[T]:
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        def run() -> None:
            result = function()
            with contextlib.suppress(concurrent.futures.InvalidStateError):  # cancelled
                future.set_result(result)

        def fail(error: Exception) -> None:
            with contextlib.suppress(concurrent.futures.InvalidStateError):
                future.set_exception(error)

        self._ask(run, fail)
        return future

    def _ask(
        self,
        run: Callable[[], None],
        fail: Callable[[Exception], None],
        *,
        new_requests: int = 0,
    ) -> None:
        with self._wake:
            if self._is_closed or (new_requests and self._refusal):
                raise EngineClosedError(f"no requests are taken: {self._refusal}")
            waiting = self._num_waiting + self._num_taken + self._num_asked
            if new_requests and waiting + new_requests > self._max_waiting:
                logger.info("overloaded", extra={"waiting": waiting})
                raise OverloadedError(
                    f"{waiting} requests wait already and at most {self._max_waiting} may "
                    "(max_waiting): try again later"
                )
            self._num_asked += new_requests
            self._inbox.append(_Command(run, fail))
            self._wake.notify()

    # -- the engine thread ------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while not self._is_closed:
                self._turn()
        except BaseException as error:
            logger.exception("the engine thread fails")
            self._close(f"the engine thread failed: {error!r}", error)
        finally:
            self._llm._take_back()

    def _turn(self) -> None:
        """Do what was asked for, then one step."""
        engine = self._llm.engine
        with self._wake:
            self._wake.wait_for(lambda: self._inbox or engine.has_unfinished)
            inbox, self._inbox = self._inbox, []
            self._num_taken, self._num_asked = self._num_asked, 0
        for command in inbox:
            self._run(command)
        if not self._is_closed and engine.has_unfinished:
            self._step()
        with self._wake:
            self._num_taken, self._num_waiting = 0, engine.scheduler.num_waiting
        if not engine.has_unfinished:
            self._tell_idle()

    def _run(self, command: _Command) -> None:
        if self._is_closed:
            command.fail(self._closed_error())
            return
        try:
            command.run()
        except Exception as error:
            command.fail(error)

    def _step(self) -> None:
        try:
            touched = self._llm.engine.step()
            self._num_failures = 0
        except Exception as error:
            logger.exception("a device step failed")
            touched = self._recover(error)
        self._hand_over(touched)

    def _recover(self, error: Exception) -> Sequence[Generation]:
        self._num_failures += 1
        if self._num_failures < MOST_FAILURES:
            try:
                return self._llm.engine.recover()
            except Exception as second:
                logger.exception("there is no way to go on")
                error = second
        self._close(f"the device step keeps failing: {error!r}", error)
        return ()

    def _hand_over(self, touched: Sequence[Generation]) -> None:
        """Outputs to their callers' loops, one call a loop."""
        batches: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, RequestOutput]]] = {}
        for generation in touched:
            stream = self._streams.get(generation.request_id)
            if stream is None:
                continue
            output = self._llm.engine.output(generation)
            batches.setdefault(stream.loop, []).append((stream, output))
            if output.finished:
                del self._streams[generation.request_id]
        for loop, batch in batches.items():
            try:
                loop.call_soon_threadsafe(_put_all, batch)
            except RuntimeError:  # the loop is closed, and nobody listens
                for stream, _ in batch:
                    self._leave(stream)

    def _tell(self, stream: _Stream, error: Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody listens
            stream.loop.call_soon_threadsafe(stream.put, error)

    def _leave(self, stream: _Stream) -> None:
        if stream.generation is not None:
            self._streams.pop(stream.generation.request_id, None)
            self._llm.engine.abort(stream.generation)

    def _tell_idle(self) -> None:
        for loop, idle in self._when_idle:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(idle.set)
        self._when_idle.clear()

    def _close(self, why: str, cause: BaseException | None) -> None:
        """The thread's last act: nobody is left without an answer."""
        with self._wake:
            self._is_closed, self._refusal = True, why
            inbox, self._inbox = self._inbox, []
        for stream in list(self._streams.values()):
            self._leave(stream)
            self._tell(stream, self._closed_error(cause))
        for command in inbox:
            command.fail(self._closed_error(cause))
        self._tell_idle()

    def _closed_error(self, cause: BaseException | None = None) -> EngineClosedError:
        error = EngineClosedError(f"the engine has ended: {self._refusal}")
        error.__cause__ = cause
        return error


def _put_all(batch: Sequence[tuple[_Stream, RequestOutput]]) -> None:
    for stream, output in batch:
        stream.put(output)
