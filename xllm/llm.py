"""`LLM`: an engine in this process, for batches of prompts."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from xllm.config import EngineConfig
from xllm.engine.core import EngineCore
from xllm.errors import EngineDeadError, RequestError, XllmError
from xllm.inputs import InputProcessor, ProcessedInput, Prompt
from xllm.metrics import EngineStats
from xllm.output_processor import OutputProcessor, RequestState
from xllm.outputs import EmbeddingOutput, RequestOutput
from xllm.pooling import PoolingParams
from xllm.request import SamplingParams
from xllm.tokenizer import Tokenizer, load_tokenizer

Progress = Callable[[str, float], None]
Params = SamplingParams | Sequence[SamplingParams] | None
EMBEDDING_SAMPLING = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)


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
        self._core = EngineCore(config, progress=progress)
        self.config = self._core.config
        self.facts = self._core.facts
        self._tokenizer = load_engine_tokenizer(self._core)
        self._inputs = input_processor(self._core, self._tokenizer)
        self._outputs = OutputProcessor(self._tokenizer)
        self._lock = threading.Lock()
        self._num_requests = 0
        self._dead: str | None = None
        self._is_closed = False

    def generate(self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None, *,
                 use_tqdm: bool = True, priority: int | Sequence[int] | None = None,
                 lora: str | Sequence[str] = "") -> list[RequestOutput]:
        """Complete prompts; the results are in their order.

        prompts: one or a list of: text, token ids, {'prompt': text}, {'prompt_token_ids': ids}.
        sampling_params: one for all, or one each; None: the defaults. priority: smaller runs first. lora: the adapter
        to compute with, one for all or one each; "": none.

        Raises:
            RequestError: a prompt or a parameter is wrong; names its index. Nothing was run then.
            EngineDeadError: the engine failed.
        """
        return self._run(_as_batch(prompts), sampling_params, priority, use_tqdm, lora)

    def chat(self, messages: Sequence[Any], sampling_params: Params = None, *, use_tqdm: bool = True,
             add_generation_prompt: bool = True, continue_final_message: bool = False,
             chat_template: str | None = None, tools: Sequence[Mapping[str, Any]] | None = None,
             chat_template_kwargs: Mapping[str, Any] | None = None) -> list[RequestOutput]:
        """Answer one conversation (a list of messages) or several. Raises like `generate`."""
        if self._tokenizer is None:
            raise RequestError("chat needs a tokenizer, and skip_tokenizer_init is set", field="messages")
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts: list[Prompt] = []
        for index, conversation in enumerate(conversations):
            with _at("messages", index, len(conversations)):
                text = self._tokenizer.render_chat(
                    conversation, add_generation_prompt=add_generation_prompt, tools=tools,
                    continue_final_message=continue_final_message, chat_template=chat_template,
                    **(chat_template_kwargs or {}))
                ids = self._tokenizer.encode(text, add_special_tokens=False, field="messages")
                prompts.append({"prompt": text, "prompt_token_ids": ids})
        return self._run(prompts, sampling_params, None, use_tqdm)

    def get_tokenizer(self) -> Tokenizer:
        """Raises RequestError with skip_tokenizer_init."""
        if self._tokenizer is None:
            raise RequestError("there is no tokenizer: skip_tokenizer_init is set")
        return self._tokenizer

    def stats(self) -> EngineStats:
        return self._core.stats()

    def shutdown(self) -> None:
        """Stop the engine and free what it holds. May be called again."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._dead = self._dead or "it was shut down"
                self._inputs.close()
                self._core.shutdown()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.shutdown()

    def embed(self, prompts: Prompt | Sequence[Prompt], pooling: PoolingParams | None = None, *,
              use_tqdm: bool = False) -> list[EmbeddingOutput]:
        """A vector for each prompt, in order. pooling: the last token's by default.

        Raises:
            RequestError: a prompt is wrong, or `dimensions` is more than the model has; nothing ran.
            EngineDeadError: the engine failed, now or before.
        """
        states = self._run_states(_as_batch(prompts), EMBEDDING_SAMPLING, None, use_tqdm, pooling or PoolingParams())
        return [embedding_output(state) for state in states]

    def load_adapter(self, name: str, folder: Path | str) -> None:
        """Load an adapter (PEFT format) for `generate`. Needs `enable_lora`.

        Raises:
            RequestError: the name is taken. ModelError: the files cannot be used. EngineStateError: no slot is free.
        """
        with self._lock:
            self._load_adapter(name, Path(folder))

    def _load_adapter(self, name: str, folder: Path) -> None:
        answers: list[XllmError | None] = []
        self._core.load_adapter(name, folder, answers.append)
        while not answers:
            time.sleep(0.001)
            self._core.tick()
        if answers[0] is not None:
            raise answers[0]

    def unload_adapter(self, name: str) -> None:
        """Raises RequestError if there is no such adapter."""
        with self._lock:
            self._core.adapters.unload(name)

    def _run(self, prompts: Sequence[Prompt], params: Params, priority: int | Sequence[int] | None,
             use_tqdm: bool, lora: str | Sequence[str] = "") -> list[RequestOutput]:
        return [state.output() for state in self._run_states(prompts, params, priority, use_tqdm, lora=lora)]

    def _run_states(self, prompts: Sequence[Prompt], params: Params, priority: int | Sequence[int] | None,
                    use_tqdm: bool, pooling: PoolingParams | None = None,
                    lora: str | Sequence[str] = "") -> list[RequestState]:
        with self._lock:
            if self._dead is not None:
                raise EngineDeadError(f"the engine is gone: {self._dead}")
            sources = self._process_all(prompts, _one_each(params, SamplingParams(), len(prompts), "sampling_params"),
                                        _one_each(priority, 0, len(prompts), "priority"),
                                        [lora] * len(prompts) if isinstance(lora, str)
                                        else _one_each(lora, "", len(prompts), "lora"), pooling)
            states = [self._outputs.add(source) for source in sources]
            try:
                self._add_all(sources)
                with interrupts_deferred() as check_interrupt:
                    self._step_until_done(states, use_tqdm, check_interrupt)
            finally:
                self._abandon(states)
            return states

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
                    self._core.add(request)

    def _step_until_done(self, states: Sequence[RequestState], use_tqdm: bool,
                         check_interrupt: Callable[[], None]) -> None:
        with _progress_bar(len(states), use_tqdm) as advance:
            while self._outputs.num_open:
                changed, to_abort = self._outputs.process(self._step())
                for engine_id in to_abort:
                    self._core.abort(engine_id)
                advance(sum(state.finished for state in changed))
                check_interrupt()

    def _step(self) -> list[Any]:
        try:
            return self._core.step()
        except Exception as error:
            self._dead = f"{type(error).__name__}: {error}"
            raise EngineDeadError(f"the engine failed: {self._dead}") from error

    def _abandon(self, states: Sequence[RequestState]) -> None:
        """End what still runs (after an error, or what stop strings ended), so that the engine is idle again."""
        for state in states:
            for engine_id in self._outputs.remove(state):
                self._core.abort(engine_id)
        while self._dead is None and self._core.has_work():
            self._step()


def embedding_output(state: RequestState) -> EmbeddingOutput:
    """Of a request with `pooling` that has ended. Raises EngineDeadError if it did not end well."""
    if state.embedding is None:
        raise EngineDeadError(f"no embedding came: {state.completions[0].error or state.completions[0].finish_reason}")
    return EmbeddingOutput(request_id=state.source.request_id, prompt_token_ids=state.source.prompt_token_ids,
                           embedding=state.embedding, num_cached_tokens=state.num_cached_tokens)


def load_engine_tokenizer(core: EngineCore) -> Tokenizer | None:
    """The tokenizer that the engine's settings ask for."""
    from xllm.models.loader import resolve_model_path

    settings = core.config.model
    if settings.skip_tokenizer_init:
        return None
    return load_tokenizer(resolve_model_path(settings.tokenizer) if settings.tokenizer else Path(core.facts.model_path))


def input_processor(core: EngineCore, tokenizer: Tokenizer | None) -> InputProcessor:
    """One that knows the engine's model and limits."""
    assert core.config.model.max_model_len is not None
    return InputProcessor(tokenizer, vocab_size=core.facts.vocab_size,
                          max_model_len=core.config.model.max_model_len, eos_token_ids=core.facts.eos_token_ids)


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
