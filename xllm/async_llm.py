"""`AsyncLLM`: an engine behind async iterators, for servers.

Three threads take part: the engine's own schedules, the worker's computes, and in the event loop's each
iterator makes its own text. An `AsyncLLM` belongs to one event loop at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from xllm.answer import Answer
from xllm.client.assemble import Assembly
from xllm.client.engine_client import Stream
from xllm.client.local import LocalClient
from xllm.config import EngineConfig
from xllm.engine.commands import Action
from xllm.engine.core import EngineCore
from xllm.engine_count import check_one_engine
from xllm.errors import ConfigError, EngineStateError, RequestError
from xllm.generation_config import default_sampling
from xllm.inputs import (
    EMBEDDING_SAMPLING,
    InputProcessor,
    ProcessedInput,
    Prompt,
    chat_prompt,
    model_tokenizer,
)
from xllm.outputs import EmbeddingOutput, RequestOutput
from xllm.pooling import PoolingParams
from xllm.request import SamplingParams
from xllm.stats import EngineStats
from xllm.text.tokenizer import Tokenizer

OutputKind = Literal["cumulative", "delta", "final"]
_LONG_PROMPT_CHARS = 20_000  # tokenising more than this would hold up the event loop for milliseconds


class AsyncLLM:
    """Loads a model (this blocks) and serves requests as they come.

    model, settings: as for `LLM`. config: all of them in one instead.

    Raises:
        ConfigError, ModelError, DeviceError: as `LLM`.
    """

    def __init__(self, model: str | None = None, *, config: EngineConfig | None = None,
                 progress: Callable[[str, float], None] | None = None, **settings: Any):
        if isinstance(model, EngineConfig):
            raise ConfigError("model must be a folder or a Hub id; settings in one are given as config=")
        if config is not None and (settings or model is not None):
            raise ConfigError("give either a config, or a model and settings by name, not both")
        if config is None:
            config = EngineConfig.from_flat(model=None if model is None else str(model), **settings)
        check_one_engine(config.device)
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
                       deadline_s: float | None = None, cache_salt: str = "", lora: str = "",
                       output_kind: OutputKind = "cumulative") -> AsyncGenerator[RequestOutput, None]:
        """Run one prompt. Ending the iteration early, or cancelling its task, aborts the request.

        sampling_params: None: the model's defaults (`generation_config`). lora: the adapter to compute with; "": none.
        output_kind: each output holds everything so far, or only what is new, or there is one at the end.
        A slow consumer misses no text: what came meanwhile is in its next output, and a stop string is found when it
        is read. The last output, and only it, is `finished`. deadline_s: on the `time.monotonic()` clock.

        Raises:
            RequestError: something is wrong with the request, or the queue is full.
            EngineDeadError: the engine failed or was shut down.
        """
        source = await self._process(prompt, sampling_params or self._default_params, self._new_id(request_id),
                                     priority=priority, offline=offline, deadline_s=deadline_s, cache_salt=cache_salt,
                                     lora=lora)
        async with self._running(source) as (answer, feed):
            while await feed():
                if answer.finished or output_kind != "final":
                    yield answer.take_delta() if output_kind == "delta" else answer.output()

    async def chat(self, messages: Sequence[Any], sampling_params: SamplingParams | None = None,
                   request_id: str | None = None, *, add_generation_prompt: bool = True,
                   continue_final_message: bool = False, chat_template: str | None = None,
                   tools: Sequence[Mapping[str, Any]] | None = None,
                   chat_template_kwargs: Mapping[str, Any] | None = None, priority: int = 0, offline: bool = False,
                   deadline_s: float | None = None, cache_salt: str = "", lora: str = "",
                   output_kind: OutputKind = "cumulative") -> AsyncGenerator[RequestOutput, None]:
        """Answer one conversation (a list of messages). The rest, and what is raised: as for `generate`."""
        prompt = await asyncio.to_thread(  # a template may take long
            chat_prompt, self.tokenizer, messages, add_generation_prompt=add_generation_prompt, tools=tools,
            continue_final_message=continue_final_message, chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs)
        outputs = self.generate(prompt, sampling_params, request_id, priority=priority, offline=offline,
                                deadline_s=deadline_s, cache_salt=cache_salt, lora=lora, output_kind=output_kind)
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                yield output

    async def embed(self, prompt: Prompt, pooling: PoolingParams | None = None, request_id: str | None = None, *,
                    priority: int = 0) -> EmbeddingOutput:
        """The vector of one prompt. pooling: as the checkpoint says by default. Cancelling its task aborts it.

        Raises:
            RequestError: the prompt is wrong, `dimensions` is more than the model has, or the queue is full.
            EngineDeadError: the engine failed or was shut down.
        """
        source = await self._process(prompt, EMBEDDING_SAMPLING, self._new_id(request_id), priority=priority,
                                     pooling=pooling or PoolingParams())
        async with self._running(source) as (answer, feed):
            while await feed():
                pass
        return answer.embedding()

    def get_tokenizer(self) -> Tokenizer:
        """Raises RequestError with skip_tokenizer_init."""
        if self.tokenizer is None:
            raise RequestError("there is no tokenizer: skip_tokenizer_init is set")
        return self.tokenizer

    async def load_adapter(self, name: str, folder: Path | str) -> None:
        """Load an adapter (PEFT format) for `generate` and `chat`. Needs `enable_lora`.

        Raises:
            RequestError: the name is taken, or the files cannot be used. EngineStateError: no slot is free.
        """
        await self._control("load_adapter", name=name, folder=str(folder))

    async def unload_adapter(self, name: str) -> None:
        """Raises RequestError if there is no such adapter."""
        await self._control("unload_adapter", name=name)

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

    def _new_id(self, wish: str | None) -> str:
        return f"anonymous-{next(self._serial)}" if wish is None else wish

    @contextlib.asynccontextmanager
    async def _running(self, source: ProcessedInput) -> AsyncIterator[tuple[Answer, Callable[[], Awaitable[bool]]]]:
        """Submit a prompt; yields its answer and a function that takes in more deltas, which returns False once all has
        ended."""
        self._engine.bind()
        request_id = source.request_id
        if request_id in self._streams and self._streams[request_id].open_ids:
            raise RequestError(f"request id {request_id!r} is in use", field="request_id")
        stream = self._streams[request_id] = self._engine.submit(source.requests)
        assembly = Assembly(source.requests, self.tokenizer, stream.abort)

        async def feed() -> bool:
            deltas = await stream.next()
            if deltas:
                assembly.feed(deltas)
            return bool(deltas)

        try:
            yield Answer(source, assembly.completions, self.tokenizer), feed
        finally:
            stream.close()
            if self._streams.get(request_id) is stream:
                del self._streams[request_id]

    async def _control(self, action: Action, **options: Any) -> None:
        self._engine.bind()
        done = await self._engine.control(action, **options)
        if done.error is not None:
            raise EngineStateError(done.error) if done.is_state else RequestError(done.error, field=done.field)

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
