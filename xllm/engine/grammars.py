"""`GrammarGate`: requests wait here until their grammar is built, so that no step waits for that."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

from xllm.config import EngineConfig
from xllm.errors import RequestError
from xllm.models.config import ModelConfig
from xllm.request import FinishReason, OutputDelta, Request
from xllm.structured.store import GrammarStore
from xllm.structured.vocabulary import VocabularySource, vocabulary_source
from xllm.tokenizer import load_tokenizer

MAX_WAIT_S = 0.05


class GrammarGate:
    """Before the scheduler's queue. Single-threaded, but for the thread of its `store`."""

    def __init__(self, config: EngineConfig, model_path: Path, model_config: ModelConfig):
        self._settings, self._model_path, self._model_config = config.model, model_path, model_config
        self.store = GrammarStore(self._vocabulary_source)
        self._held: dict[str, tuple[Request, Future[Any]]] = {}
        self._ended: list[OutputDelta] = []

    @property
    def has_work(self) -> bool:
        return bool(self._held or self._ended)

    @property
    def request_ids(self) -> tuple[str, ...]:
        """Of those that wait here."""
        return tuple(self._held)

    @property
    def requests(self) -> tuple[Request, ...]:
        return tuple(request for request, _ in self._held.values())

    def hold(self, request: Request) -> bool:
        """Whether the request has to wait; `admit` will add it then. Raises RequestError."""
        spec = request.sampling.structured
        if spec is None:
            return False
        if self._settings.skip_tokenizer_init:
            raise RequestError("structured outputs need a tokenizer, and skip_tokenizer_init is set",
                               field="structured")
        built = self.store.prepare(spec)
        if built.done():
            _check(built)
            return False
        self._held[request.request_id] = request, built
        return True

    def admit(self, add: Callable[[Request], None]) -> None:
        """Add those whose grammar is there."""
        for request_id in [request_id for request_id, (_, built) in self._held.items() if built.done()]:
            request, built = self._held.pop(request_id)
            try:
                _check(built)
                add(request)
            except RequestError as error:
                self._end(request_id, FinishReason.ERROR, str(error))

    def abort(self, request_id: str) -> bool:
        """Whether it was held here."""
        if self._held.pop(request_id, None) is None:
            return False
        self._end(request_id, FinishReason.ABORT)
        return True

    def wait(self) -> None:
        """Until a grammar is built, or for MAX_WAIT_S."""
        if not self._ended:
            wait([built for _, built in self._held.values()], timeout=MAX_WAIT_S, return_when=FIRST_COMPLETED)

    def take_ended(self) -> list[OutputDelta]:
        """Terminal outputs of requests that ended here."""
        ended, self._ended = self._ended, []
        return ended

    def _end(self, request_id: str, reason: FinishReason, error: str | None = None) -> None:
        self._ended.append(OutputDelta(request_id, [], finish_reason=reason, error=error))

    def _vocabulary_source(self) -> VocabularySource:
        from xllm.models.loader import resolve_model_path

        name = self._settings.tokenizer
        tokenizer = load_tokenizer(resolve_model_path(name) if name else self._model_path)
        return vocabulary_source(tokenizer, self._model_config.vocab_size, self._model_config.eos_token_ids)


def _check(built: Future[Any]) -> None:
    error = built.exception()
    if isinstance(error, ValueError):  # RequestError and GrammarError are: whatever it was, this request has to end
        raise RequestError(f"structured: {error}", field="structured") from None
    if error is not None:
        raise error
