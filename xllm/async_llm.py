"""`AsyncLLM`: an engine behind async iterators, for servers.

Three threads take part: the engine's own schedules, the runner's computes, and the event loop's
detokenises and hands out. An `AsyncLLM` belongs to one event loop at a time.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from typing import Any, Literal

from xllm.config import EngineConfig
from xllm.engine.core import EngineCore
from xllm.engine_thread import EngineThread
from xllm.errors import ConfigError, EngineDeadError, RequestError
from xllm.inputs import ProcessedInput, Prompt
from xllm.llm import input_processor, load_engine_tokenizer
from xllm.metrics import EngineStats
from xllm.output_processor import OutputProcessor, RequestState
from xllm.outputs import RequestOutput
from xllm.request import OutputDelta, SamplingParams

OutputKind = Literal["cumulative", "delta", "final"]
_LONG_PROMPT_CHARS = 20_000  # tokenising more than this would hold up the event loop for milliseconds


class AsyncLLM:
    """Loads a model (this blocks) and serves requests as they come.

    config, or any setting of `EngineConfig` by its name.

    Raises:
        ConfigError, ModelError, DeviceError: as `LLM`.
    """

    def __init__(self, config: EngineConfig | None = None, *, progress: Callable[[str, float], None] | None = None,
                 **settings: Any):
        if config is not None and settings:
            raise ConfigError("give either a config or settings by name, not both")
        self._core = EngineCore(config or EngineConfig.from_flat(**settings), progress=progress)
        self.config = self._core.config
        self.facts = self._core.facts
        self.tokenizer = load_engine_tokenizer(self._core)
        self.inputs = input_processor(self._core, self.tokenizer)
        self._outputs = OutputProcessor(self.tokenizer)
        self._streams: dict[str, _Stream] = {}  # by request id; touched in the event loop only
        self._streams_by_state: dict[int, _Stream] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._serial = itertools.count()
        self._death: str | None = None
        self._engine = EngineThread(self._core, on_deltas=self._on_deltas, on_end=self._on_end)

    async def generate(self, prompt: Prompt, sampling_params: SamplingParams | None = None,
                       request_id: str | None = None, *, priority: int = 0, offline: bool = False,
                       deadline_s: float | None = None, cache_salt: str = "",
                       output_kind: OutputKind = "cumulative") -> AsyncIterator[RequestOutput]:
        """Run one prompt. Ending the iteration early, or cancelling its task, aborts the request.

        output_kind: each output holds everything so far, or only what is new, or there is one at the end.
        A slow consumer misses no text: what came meanwhile is in its next output. The last output, and
        only it, is `finished`. deadline_s: on the `time.monotonic()` clock.

        Raises:
            RequestError: something is wrong with the request, or the queue is full.
            EngineDeadError: the engine failed or was shut down.
        """
        if request_id is None:
            request_id = f"anonymous-{next(self._serial)}"
        source = await self._process(prompt, sampling_params or SamplingParams(), request_id, priority=priority,
                                     offline=offline, deadline_s=deadline_s, cache_salt=cache_salt)
        stream = self._open(source, only_final=output_kind == "final")
        try:
            while True:
                await stream.wait()
                output = stream.state.take_delta() if output_kind == "delta" else stream.state.output()
                yield output
                if output.finished:
                    return
        finally:
            self._close(stream)

    def abort(self, request_id: str) -> None:
        """End a request early; its iterator gets a last output with finish_reason 'abort'. Unknown ids are ignored.

        Call it in the event loop.
        """
        stream = self._streams.get(request_id)
        if stream is not None:
            self._engine.abort([r.request_id for r in stream.state.source.requests])

    def stats(self) -> EngineStats:
        """What the engine says about itself now."""
        return self._core.stats()

    @property
    def death(self) -> str | None:
        """Why the engine is gone; None while it lives."""
        return self._death

    def shutdown(self) -> None:
        """Stop after the step in progress; open iterators raise EngineDeadError. May be called again."""
        self.inputs.close()
        self._engine.stop()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.shutdown()

    # --- in the event loop

    async def _process(self, prompt: Prompt, sampling: SamplingParams, request_id: str,
                       **options: Any) -> ProcessedInput:
        text = prompt.get("prompt") if isinstance(prompt, dict) and "prompt_token_ids" not in prompt else prompt
        is_long = isinstance(text, str) and len(text) > _LONG_PROMPT_CHARS
        if is_long or sampling.structured is not None:
            return await asyncio.to_thread(self.inputs.process, request_id, prompt, sampling, **options)
        return self.inputs.process(request_id, prompt, sampling, **options)

    def _open(self, source: ProcessedInput, *, only_final: bool) -> _Stream:
        self._bind(asyncio.get_running_loop())
        if source.request_id in self._streams:
            raise RequestError(f"request id {source.request_id!r} is in use", field="request_id")
        stream = _Stream(self._outputs.add(source), only_final)
        self._streams[source.request_id] = self._streams_by_state[id(stream.state)] = stream
        if self._death is not None:  # only now: from here on `_on_end` finds the stream
            self._close(stream)
            raise _dead(self._death)
        self._engine.add(source.requests, lambda error: self._post(stream.fail, error))
        return stream

    def _bind(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._loop is not loop:
            if self._loop is not None and not self._loop.is_closed():
                raise RuntimeError("this AsyncLLM is used in another event loop")
            for stream in list(self._streams.values()):  # their event loop is gone, and with it whoever listened
                self._close(stream)
            self._loop = loop

    def _close(self, stream: _Stream) -> None:
        """Forget the stream; what still runs for it is aborted."""
        self._streams.pop(stream.state.source.request_id, None)
        self._streams_by_state.pop(id(stream.state), None)
        self._engine.abort(self._outputs.remove(stream.state))

    def _deliver(self, deltas: list[OutputDelta]) -> None:
        try:
            changed, to_abort = self._outputs.process(deltas)
        except Exception as error:  # a bug of ours; no stream may hang for it
            self._fail_all(f"{type(error).__name__} while reading its outputs: {error}")
            raise
        self._engine.abort(to_abort)
        for state in changed:
            if (stream := self._streams_by_state.get(id(state))) is not None:
                stream.notify()

    def _fail_all(self, reason: str) -> None:
        for stream in list(self._streams.values()):
            stream.fail(_dead(reason))

    # --- in the engine's thread

    def _on_deltas(self, deltas: list[OutputDelta]) -> bool:
        return self._post(self._deliver, deltas)

    def _on_end(self, reason: str) -> None:
        self._death = reason
        self._post(self._fail_all, reason)

    def _post(self, callback: Callable[..., object], argument: object) -> bool:
        """Call it in the event loop. False: there is none, or it is closed."""
        loop = self._loop
        if loop is None or loop.is_closed():
            return False
        try:
            loop.call_soon_threadsafe(callback, argument)
        except RuntimeError:
            if loop.is_closed():  # since we looked
                return False
            raise
        return True


class _Stream:
    """An open request and the consumer that waits for it. Touched in the event loop only."""

    __slots__ = ("_changed", "_error", "_only_final", "state")

    def __init__(self, state: RequestState, only_final: bool):
        self.state = state
        self._only_final = only_final
        self._changed = asyncio.Event()
        self._error: Exception | None = None

    def notify(self) -> None:
        if self.state.finished or not self._only_final:
            self._changed.set()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._changed.set()

    async def wait(self) -> None:
        """Until there is something new. Raises what the stream failed with."""
        await self._changed.wait()
        self._changed.clear()
        if self._error is not None and not self.state.finished:
            raise self._error


def _dead(reason: str) -> EngineDeadError:
    return EngineDeadError(f"the engine is gone: {reason}")
