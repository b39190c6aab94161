"""`LLM`: an engine in this process, for batches of prompts."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from xllm.answer import Answer
from xllm.client.assemble import Assembly
from xllm.client.local import InlineClient
from xllm.config import EngineConfig
from xllm.engine.core import EngineCore
from xllm.engine_count import check_one_engine
from xllm.errors import RequestError, XllmError
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
from xllm.progress import Progress
from xllm.request import SamplingParams
from xllm.stats import EngineStats
from xllm.text.tokenizer import Tokenizer

Params = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """Loads a model and answers prompts.

    model: local folder or Hub id; None: the bundled demo model. `settings`: any setting of `EngineConfig`
    by its name, such as `dtype`, `max_model_len`, `device`.

    One call runs at a time; others wait. Ctrl-C ends the call after the step in progress, and the engine can be
    used again. Close it with `shutdown()` or use it in a `with` statement.

    Raises:
        ConfigError: a setting is unknown or wrong. ModelError: the checkpoint is. DeviceError: the device is.
    """

    def __init__(self, model: str | None = None, *, progress: Progress | None = None, **settings: Any):
        config = EngineConfig.from_flat(model=None if model is None else str(model), **settings)
        check_one_engine(config.device)
        self._tokenizer = model_tokenizer(config.model)  # before the weights, which may take minutes
        self._core = EngineCore(config, progress=progress)
        self.config = self._core.config
        self.facts = self._core.facts
        self._engine = InlineClient(self._core)
        self._inputs = InputProcessor.of(self._core.facts, self._tokenizer)
        self._lock = threading.Lock()
        self._num_requests = 0

    def generate(self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None, *,
                 use_tqdm: bool = True, priority: int | Sequence[int] | None = None,
                 lora: str | Sequence[str] = "") -> list[RequestOutput]:
        """Complete prompts; the results are in their order.

        prompts: one or a list of: text, token ids, {'prompt': text}, {'prompt_token_ids': ids}.
        sampling_params: one for all, or one each; None: the model's defaults (`generation_config`). priority: smaller
        runs first. lora: the adapter to compute with, one for all or one each; "": none.

        Raises:
            RequestError: a prompt or a parameter is wrong; names its index. Nothing was run then.
            EngineDeadError: the engine failed.
        """
        return self._run(_as_batch(prompts), sampling_params, priority, use_tqdm, lora)

    def chat(self, messages: Sequence[Any], sampling_params: Params = None, *, use_tqdm: bool = True,
             priority: int | Sequence[int] | None = None, lora: str | Sequence[str] = "",
             add_generation_prompt: bool = True, continue_final_message: bool = False,
             chat_template: str | None = None, tools: Sequence[Mapping[str, Any]] | None = None,
             chat_template_kwargs: Mapping[str, Any] | None = None) -> list[RequestOutput]:
        """Answer one conversation (a list of messages) or several. The rest, and what is raised: as for `generate`."""
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts: list[Prompt] = []
        for index, conversation in enumerate(conversations):
            with _at("messages", index, len(conversations)):
                prompts.append(chat_prompt(
                    self._tokenizer, conversation, add_generation_prompt=add_generation_prompt, tools=tools,
                    continue_final_message=continue_final_message, chat_template=chat_template,
                    chat_template_kwargs=chat_template_kwargs))
        return self._run(prompts, sampling_params, priority, use_tqdm, lora)

    def get_tokenizer(self) -> Tokenizer:
        """Raises RequestError with skip_tokenizer_init."""
        if self._tokenizer is None:
            raise RequestError("there is no tokenizer: skip_tokenizer_init is set")
        return self._tokenizer

    def stats(self) -> EngineStats:
        return self._engine.stats

    def shutdown(self) -> None:
        """Stop the engine and free what it holds. May be called again."""
        with self._lock:
            self._inputs.close()
            self._engine.shutdown()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.shutdown()

    def embed(self, prompts: Prompt | Sequence[Prompt], pooling: PoolingParams | None = None, *,
              use_tqdm: bool = False) -> list[EmbeddingOutput]:
        """A vector for each prompt, in order. pooling: as the checkpoint says by default.

        Raises:
            RequestError: a prompt is wrong, or `dimensions` is more than the model has; nothing ran.
            EngineDeadError: the engine failed, now or before.
        """
        answers = self._answer(_as_batch(prompts), EMBEDDING_SAMPLING, None, use_tqdm, pooling or PoolingParams())
        return [answer.embedding() for answer in answers]

    def load_adapter(self, name: str, folder: Path | str) -> None:
        """Load an adapter (PEFT format) for `generate`. Needs `enable_lora`.

        Raises:
            RequestError: the name is taken. ModelError: the files cannot be used. EngineStateError: no slot is free.
        """
        with self._lock:
            self._engine.load_adapter(name, Path(folder))

    def unload_adapter(self, name: str) -> None:
        """Raises RequestError if there is no such adapter."""
        with self._lock:
            self._engine.unload_adapter(name)

    @cached_property
    def _default_params(self) -> SamplingParams:
        return default_sampling(self.config.model.generation_config, self.facts.model_path)

    def _run(self, prompts: Sequence[Prompt], params: Params, priority: int | Sequence[int] | None,
             use_tqdm: bool, lora: str | Sequence[str] = "") -> list[RequestOutput]:
        return [answer.output() for answer in self._answer(prompts, params, priority, use_tqdm, lora=lora)]

    def _answer(self, prompts: Sequence[Prompt], params: Params, priority: int | Sequence[int] | None,
                use_tqdm: bool, pooling: PoolingParams | None = None, lora: str | Sequence[str] = "") -> list[Answer]:
        with self._lock:
            self._engine.check_up()
            sources = self._process_all(prompts, _one_each(self._default_params if params is None else params, None,
                                                           len(prompts), "sampling_params"),
                                        _one_each(priority, 0, len(prompts), "priority"),
                                        [lora] * len(prompts) if isinstance(lora, str)
                                        else _one_each(lora, "", len(prompts), "lora"), pooling)
            assembly = Assembly([request for source in sources for request in source.requests], self._tokenizer,
                                self._engine.abort)
            try:
                self._add_all(sources)
                answers = self._answers(sources, assembly)
                with interrupts_deferred() as check_interrupt:
                    self._step_until_done(answers, assembly, use_tqdm, check_interrupt)
            finally:  # after an error something still runs, and what stop strings ended has not settled
                self._engine.abandon(assembly.open_ids)
            return answers

    def _process_all(self, prompts: Sequence[Prompt], params: Sequence[SamplingParams],
                     priorities: Sequence[int], adapters: Sequence[str],
                     pooling: PoolingParams | None) -> list[ProcessedInput]:
        sources = []
        for index, (prompt, sampling, priority, lora) in enumerate(zip(prompts, params, priorities, adapters)):
            with _at("prompts", index, len(prompts)):
                source = self._inputs.process(str(self._num_requests), prompt, sampling, priority=priority,
                                              pooling=pooling, lora=lora)
            self._num_requests += 1
            sources.append(source)
        return sources

    def _add_all(self, sources: Sequence[ProcessedInput]) -> None:
        for index, source in enumerate(sources):
            with _at("prompts", index, len(sources)):
                for request in source.requests:
                    self._engine.add(request)

    def _answers(self, sources: Sequence[ProcessedInput], assembly: Assembly) -> list[Answer]:
        completions = iter(assembly.completions)
        return [Answer(source, [next(completions) for _ in source.requests], self._tokenizer) for source in sources]

    def _step_until_done(self, answers: Sequence[Answer], assembly: Assembly, use_tqdm: bool,
                         check_interrupt: Callable[[], None]) -> None:
        owners = [answer for answer in answers for _ in answer.source.requests]  # by a piece's index
        with _progress_bar(len(answers), use_tqdm) as advance:
            while not assembly.finished:
                pieces = assembly.feed(self._engine.step())
                ended = {owners[piece.index] for piece in pieces if piece.finish_reason is not None}
                advance(sum(answer.finished for answer in ended))
                check_interrupt()


def _as_batch(prompts: Any) -> Sequence[Any]:
    """A lone prompt (text, a mapping, or a list of ints) becomes a batch of one."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise RequestError(f"prompts must be a prompt or a list of prompts, got {type(prompts).__name__}",
                           field="prompts")
    return [prompts] if prompts and all(type(p) is int for p in prompts) else prompts


def _one_each(given: Any, default: Any, count: int, name: str) -> Sequence[Any]:
    if given is None or not isinstance(given, Sequence):
        return [default if given is None else given] * count
    if len(given) != count:
        raise RequestError(f"{name}: {len(given)} given for {count} prompts", field=name)
    return given


@contextmanager
def _at(name: str, index: int, count: int) -> Iterator[None]:
    """Put the index of a batch's member into its error."""
    try:
        yield
    except XllmError as error:
        if count == 1 or not isinstance(error, RequestError):
            raise
        raise RequestError(f"{name}[{index}]: {error}", field=error.field) from error


@contextmanager
def interrupts_deferred() -> Iterator[Callable[[], None]]:
    """Hold Ctrl-C back until the yielded function is called, so that no step is torn; a second one acts at once.

    Does nothing outside the main thread, or where the program handles SIGINT itself.
    """
    usual = signal.default_int_handler
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not usual:
        yield lambda: None
        return
    interrupted = False

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted:
            usual(number, frame)
        interrupted = True

    def check() -> None:
        if interrupted:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, remember)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, usual)


@contextmanager
def _progress_bar(total: int, shown: bool) -> Iterator[Callable[[int], object]]:
    if not shown:
        yield lambda count: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc="prompts", dynamic_ncols=True) as bar:
        yield bar.update
