"""`ServerState`: the objects that all routes share."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.api.cluster_view import ClusterView
from serving.api.errors import ApiError, invalid, unavailable
from serving.api.responses_store import ResponseStore
from serving.api.text_work import TextWork
from serving.config import ServerConfig
from serving.engine.intake import Intake
from serving.engine.waiting import WaitingTokens
from serving.observe.caller_log import CallerLog
from serving.observe.engine_history import EngineHistory
from serving.observe.metrics.refusals import UNAVAILABLE, Refusals
from serving.observe.metrics.request_histograms import RequestHistograms
from serving.observe.request_log import RequestLog, RequestRecord
from serving.observe.tracing import Tracer
from serving.parsers.output import Parsers
from serving.security.keys import KeyRing
from serving.security.paths import hide_paths
from xllm.client.engine_client import WatchedEngine
from xllm.engine.facts import EngineFacts
from xllm.errors import RequestError

if TYPE_CHECKING:
    from serving.engine.supervisor import Supervisor
    from xllm.inputs import InputProcessor
    from xllm.text.tokenizer import Tokenizer

# That /v1/responses keeps for later calls, over all callers. Chosen: bounds memory.
MAX_RESPONSES, MAX_RESPONSES_CHARS = 1024, 64 * 2**20


@dataclass(eq=False)
class ServerState:
    """Filled in while the server starts; `tokenizer` stays None with `skip_tokenizer_init`.

    states: of all models that the server has, in the order in which they came. A master may serve several; each has a
    state of its own, which shares with the others what is of the server (`beside`).
    """

    engine: WatchedEngine
    config: ServerConfig
    keys: KeyRing = field(default_factory=KeyRing)
    tokenizer: Tokenizer | None = None
    model_name: str | None = None  # as it was given on the command line
    sampling_defaults: dict[str, Any] = field(default_factory=dict)
    loaded: bool = False
    draining: bool = False
    num_open: int = 0  # HTTP calls that are generating
    started_unix_s: int = field(default_factory=lambda: int(time.time()))
    refusals: Refusals = field(default_factory=Refusals)
    requests: RequestLog = field(default_factory=RequestLog)
    callers: CallerLog = field(default_factory=CallerLog)
    history: EngineHistory = field(default_factory=EngineHistory)
    tracer: Tracer | None = None
    num_viewers: Counter[str] = field(default_factory=Counter)  # of `/v1/stats/stream`, by caller
    closed_connections: Counter[str] = field(default_factory=Counter)  # by the server, by reason
    responses: ResponseStore = field(default_factory=lambda: ResponseStore(MAX_RESPONSES, MAX_RESPONSES_CHARS))
    text_work: TextWork = field(default_factory=TextWork)
    cluster: ClusterView | None = None  # of a master
    supervisors: Sequence[Supervisor] = ()  # one an engine, once the model is loaded
    states: list[ServerState] = field(default_factory=list, repr=False, compare=False)
    admission: Intake = field(init=False)  # requests reach the engine through it
    metrics: Sequence[RequestHistograms] = field(init=False)  # of each engine's requests, by its number

    def __post_init__(self) -> None:
        resilience = self.config.resilience
        self.metrics = [RequestHistograms() for _ in self.engine.engines]
        self.admission = Intake(self.engine, WaitingTokens(
            self.config.limits.max_queue_tokens, low_share=resilience.low_priority_watermark,
            offline_share=resilience.offline_watermark), self.callers)
        self.requests.on_end = self.note_end
        self.states = self.states or [self]

    def beside(self, engine: WatchedEngine) -> ServerState:
        """A state for another model of this server; it is one of `states` once it has been put there."""
        return ServerState(
            engine, self.config, self.keys, draining=self.draining, refusals=self.refusals, requests=self.requests,
            callers=self.callers, tracer=self.tracer, num_viewers=self.num_viewers, responses=self.responses,
            closed_connections=self.closed_connections, text_work=self.text_work, states=self.states)

    def of_model(self, name: str | None) -> ServerState:
        """The state of the model, or of the model with the adapter, by that name; None: of the only one. Raises
        ApiError 404 if it is not served here, 400 without a name where several are."""
        if len(self.states) == 1:
            self.check_model(name)
            return self
        if name is None:
            raise invalid(f"model: several models are served here; name one: {', '.join(self.all_names)}", "model")
        for state in self.states:
            if name in state._accepted_names:
                return state
        for state in self.states:
            if name in state.engine.adapters:
                return state
        raise self._unknown(name)

    @property
    def all_names(self) -> tuple[str, ...]:
        """What requests may name: each model of the server and its adapters."""
        return tuple(name for state in self.states for name in (*state.served_names, *state.engine.adapters))

    @property
    def num_open_in_all(self) -> int:
        """HTTP calls that are generating, whichever the model."""
        return sum(state.num_open for state in self.states)

    @property
    def any_accepting(self) -> ServerState:
        """The first that takes requests; if none does, the first of all."""
        if len(self.states) == 1:
            return self
        return next((state for state in self.states if state.is_accepting), self.states[0])

    @property
    def is_accepting(self) -> bool:
        """Whether new requests can be taken."""
        try:
            self._check_available()
        except ApiError:
            return False
        return True

    def note_end(self, record: RequestRecord) -> None:
        """Record that a request has ended, in its caller's figures and in traces."""
        self.callers.note_end(record)
        if self.tracer is not None:
            self.tracer.record(record)

    @cached_property
    def inputs(self) -> InputProcessor:
        """Makes the engine's requests; only after loading."""
        from xllm.inputs import InputProcessor

        return InputProcessor.of(self.facts, self.tokenizer)

    @cached_property
    def parsers(self) -> Parsers:
        """How this model's output is taken apart; only after loading."""
        templates = "" if self.tokenizer is None else "\n".join(self.tokenizer.chat_template_sources)
        return Parsers.chosen(self.config.chat.tool_call_parser, self.config.chat.reasoning_parser, templates)

    @property
    def facts(self) -> EngineFacts:
        assert self.engine.facts is not None, "only after the engine is ready"
        return self.engine.facts

    @cached_property
    def served_names(self) -> tuple[str, ...]:
        """The names under which the model is served, the first its main one."""
        if self.config.http.served_model_name:
            return self.config.http.served_model_name
        given = self.model_name or Path(self.facts.model_path).name
        return (given if hide_paths(given) == given else Path(given).resolve().name,)

    def serve_names(self, names: Sequence[str]) -> None:
        """Serve the model under these names, unless others were asked for: instances bring theirs."""
        if not self.config.http.served_model_name:
            self.served_names = tuple(names)
            vars(self).pop("_accepted_names", None)

    def forget_model(self) -> None:
        """Another model is to be loaded in the place of this one; until it is, requests are refused."""
        self.loaded, self.tokenizer = False, None
        for name in ("inputs", "parsers"):
            vars(self).pop(name, None)

    @cached_property
    def _accepted_names(self) -> frozenset[str]:
        """A local model's path is a name for those who know it, but it is not shown."""
        given = () if self.config.http.served_model_name else (self.model_name,)
        return frozenset(name for name in (*self.served_names, *given) if name is not None)

    def check_accepting(self) -> None:
        """Raise ApiError 503 unless new requests can be taken."""
        try:
            self._check_available()
        except ApiError:
            self.refusals.note(UNAVAILABLE)
            raise

    def _check_available(self) -> None:
        if self.engine.dead_reason is not None:
            raise ApiError(503, hide_paths(f"the engine stopped: {self.engine.dead_reason}"))
        if self.engine.restarting_after is not None:
            why = self.engine.restarting_after
            raise unavailable(hide_paths(why if self.cluster else f"the engine is starting again after: {why}"))
        if self.draining:
            raise unavailable("the server is shutting down")
        if not self.loaded:
            raise unavailable(f"the model is still loading (phase: {self.engine.phase})")

    def check_loaded(self) -> None:
        """Raise ApiError 503 while there is no model to speak of."""
        if not self.loaded:
            self.check_accepting()

    def check_model(self, name: str | None) -> None:
        """Raise ApiError 404 if `name` is not what is served here; no name means whatever is."""
        if name is not None and name not in self._accepted_names and name not in self.engine.adapters:
            raise self._unknown(name)

    def _unknown(self, name: str) -> ApiError:
        served = ", ".join(self.all_names)
        return ApiError(404, f"the model {name[:256]!r} does not exist; served here: {served}", param="model")

    def adapter_of(self, model: str | None) -> str:
        """The adapter that a request's model names; "" for the model itself, whose names come first. Raises ApiError
        404 as `check_model` does: it may have been unloaded while the request's text was read."""
        if model is None or model in self._accepted_names:
            return ""
        self.check_model(model)
        return model

    def check_adapter_name(self, name: str, field: str) -> None:
        """Raise RequestError if requests by that name get the model itself; the adapter would never be used."""
        if any(name in state._accepted_names for state in self.states):
            raise RequestError(f"{field}: {name[:256]!r} is the served model's own name; an adapter needs another one",
                               field=field)
        if any(name in state.engine.adapters for state in self.states if state is not self):
            raise RequestError(f"{field}: {name[:256]!r} is an adapter of another model that is served here",
                               field=field)

    def need_tokenizer(self, param: str) -> Tokenizer:
        """The tokenizer. Raises ApiError naming `param` if there is none."""
        if self.tokenizer is None:
            raise ApiError(400, f"{param}: this server runs without a tokenizer; send token ids", param=param)
        return self.tokenizer
