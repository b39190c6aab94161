"""`AsyncLLM`: an engine behind async iterators, for servers.

Three threads take part: the engine's own schedules, the worker's computes, and in the event loop's each
iterator makes its own text. An `AsyncLLM` belongs to one event loop at a time.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from functools import cached_property
from typing import Any, Literal

from xllm.answer import Answer
from xllm.client.assemble import Assembly
from xllm.client.base import Stream
from xllm.client.local import LocalClient
from xllm.config import EngineConfig
from xllm.engine.core import EngineCore
from xllm.errors import ConfigError, RequestError
from xllm.generation_config import default_sampling
from xllm.inputs import InputProcessor, ProcessedInput, Prompt, model_tokenizer
from xllm.metrics import EngineStats
from xllm.outputs import RequestOutput
from xllm.request import SamplingParams

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
        config = config or EngineConfig.from_flat(**settings)
        self.tokenizer = model_tokenizer(config.model)  # before the weights, which may take minutes
        self._core = EngineCore(config, progress=progress)
        self.config = self._core.config
        self.facts = self._core.facts
        self.inputs = InputProcessor.of(self._core.facts, self.tokenizer)
        self._streams: dict[str, Stream] = {}  # by request id; touched in the event loop only
        self._serial = itertools.count()
        self._engine = LocalClient(self._core)

    async def generate(self, prompt: Prompt, sampling_params: SamplingParams | None = None,
                       request_id: str | None = None, *, priority: int = 0, offline: bool = False,
                       deadline_s: float | None = None, cache_salt: str = "",
                       output_kind: OutputKind = "cumulative") -> AsyncIterator[RequestOutput]:
        """Run one prompt. Ending the iteration early, or cancelling its task, aborts the request.

        sampling_params: None: the model's defaults (`generation_config`).
        output_kind: each output holds everything so far, or only what is new, or there is one at the end.
        A slow consumer misses no text: what came meanwhile is in its next output, and a stop string is found when it
        is read. The last output, and only it, is `finished`. deadline_s: on the `time.monotonic()` clock.

        Raises:
            RequestError: something is wrong with the request, or the queue is full.
            EngineDeadError: the engine failed or was shut down.
        """
        if request_id is None:
            request_id = f"anonymous-{next(self._serial)}"
        source = await self._process(prompt, sampling_params or self._default_params, request_id, priority=priority,
                                     offline=offline, deadline_s=deadline_s, cache_salt=cache_salt)
        self._engine.bind()
        if request_id in self._streams and self._streams[request_id].open_ids:
            raise RequestError(f"request id {request_id!r} is in use", field="request_id")
        stream = self._streams[request_id] = self._engine.submit(source.requests)
        assembly = Assembly(source.requests, self.tokenizer, stream.abort)
        answer = Answer(source, assembly.completions, self.tokenizer)
        try:
            while deltas := await stream.next():
                assembly.feed(deltas)
                if answer.finished or output_kind != "final":
                    yield answer.take_delta() if output_kind == "delta" else answer.output()
        finally:
            stream.close()
            if self._streams.get(request_id) is stream:
                del self._streams[request_id]

    def abort(self, request_id: str) -> None:
        """End a request early; its iterator gets a last output with finish_reason 'abort'. Unknown ids are ignored.

        Call it in the event loop.
        """
        if (stream := self._streams.get(request_id)) is not None:
            self._engine.abort(stream.open_ids)

    def stats(self) -> EngineStats:
        """What the engine says about itself now."""
        return self._engine.stats

    def shutdown(self) -> None:
        """Stop after the step in progress; open iterators raise EngineDeadError. May be called again."""
        self.inputs.close()
        self._engine.shutdown()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.shutdown()

    @cached_property
    def _default_params(self) -> SamplingParams:
        return default_sampling(self.config.model.generation_config, self.facts.model_path)

    async def _process(self, prompt: Prompt, sampling: SamplingParams, request_id: str,
                       **options: Any) -> ProcessedInput:
        text = prompt.get("prompt") if isinstance(prompt, dict) and "prompt_token_ids" not in prompt else prompt
        is_long = isinstance(text, str) and len(text) > _LONG_PROMPT_CHARS
        if is_long or sampling.structured is not None:
            return await asyncio.to_thread(self.inputs.process, request_id, prompt, sampling, **options)
        return self.inputs.process(request_id, prompt, sampling, **options)
