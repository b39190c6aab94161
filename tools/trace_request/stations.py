"""The stations of a streamed chat request, in their order, and the rule by which a trace is held against them.

A station is one place where the data is handed on or takes a new form: one to three functions through which it goes,
with all that they call on the way (`holds`). A module that the request comes back to for something else is another
station by the functions that do it; so a return counts. Which function belongs where is said by name:

    at      the functions through which the data goes, `module:function`, in the order in which they are first called
    waits   those of them that were begun before and wait there for the data: generators, coroutines, callbacks. The
            two are of three modules at most
    holds   what else belongs to the station: `module:function`, `module:Class`, `module`, or `package.*`; where several
            match the longest counts
    makes   the types that are born there and carry the request on

A type carries the request if it holds the request or its output as it goes from station to station. Parts of such a
type, what reads or writes it, caches, facts and what is noted down beside it are in `ASIDE`, each with its reason.
Plain values (dict, list, str, bytes, arrays) have no names and are not counted.

`complaints` finds a function of ours that belongs to no station, a station that is not visited or not in its order,
and a type that is in neither list.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

MAX_MODULES = 3


@dataclass(frozen=True)
class Station:
    """is_answer: on the way back only to say that the request was taken, which is no crossing of the request."""

    process: str
    name: str
    at: tuple[str, ...]
    waits: tuple[str, ...] = ()
    holds: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()
    is_answer: bool = False

    @property
    def modules(self) -> set[str]:
        """Through which the data goes."""
        return {place.partition(":")[0] for place in (*self.at, *self.waits)}


def owner_of(module: str, function: str, stations: Sequence[Station]) -> Station | None:
    """The station that names it most closely."""
    found, closest = None, -1
    for station in stations:
        for place in (*station.at, *station.waits, *station.holds):
            if _matches(place, module, function) and len(place) > closest:
                found, closest = station, len(place)
    return found


def _matches(place: str, module: str, function: str) -> bool:
    where, _, name = place.partition(":")
    if name:
        return where == module and (function == name or function.startswith(name + "."))
    return where == module or (where.endswith(".*") and module.startswith(where[:-1]))


def num_crossings(stations: Iterable[Station]) -> int:
    """How often the request goes into another process."""
    return len(list(groupby(station.process for station in stations if not station.is_answer))) - 1


def complaints(visits: Sequence[tuple[str, str, str]], types: Sequence[str], stations: Sequence[Station],
               aside: Mapping[str, Sequence[str]], by_the_clock: Sequence[str] = ()) -> list[str]:
    """What a trace and the list say differently. visits: (process, module, function) by the time of the first call.
    aside: types by why they do not count. by_the_clock: functions that no request calls."""
    found = list[str]()
    first: dict[tuple[str, str], int] = {}
    for number, (process, module, function) in enumerate(visits):
        first.setdefault((process, f"{module}:{function}"), number)
        is_own = any(_matches(place, module, function) for place in by_the_clock)
        if not is_own and owner_of(module, function, stations) is None:
            found.append(f"{module}:{function} belongs to no station")
    latest: dict[str, tuple[int, str]] = {}
    for station in stations:
        if len(station.modules) > MAX_MODULES:
            found.append(f"{station.name}: more than {MAX_MODULES} modules are no single station")
        for place in station.at:
            when = first.get((station.process, place))
            before, name = latest.get(station.process, (-1, ""))
            if when is None:
                found.append(f"{station.name}: {place} is not visited")
            elif when < before:
                found.append(f"{station.name}: {place} is visited before {name}")
            else:
                latest[station.process] = when, place
        found += [f"{station.name}: {place} is not visited" for place in station.waits
                  if (station.process, place) not in first]
    known = [name for station in stations for name in station.makes]
    known += [name for names in aside.values() for name in names]
    found += [f"{name} carries the request or does not: it is in no list" for name in types if name not in known]
    found += [f"{name} is made at {station.name!r} and did not come" for station in stations for name in station.makes
              if name not in types]
    twice = {name for name in known if known.count(name) > 1}
    return found + [f"{name} is listed twice" for name in sorted(twice)]


STATIONS = (
    Station("api", "bytes of a connection",
            at=("serving.api.connection:Connection.data_received",),
            holds=("serving.api.connection", "serving.api.connections", "serving.api.answer_port")),
    Station("api", "the call: its id, its log line",
            at=("serving.observe.call_log:CallLog.__call__", "serving.observe.call:Call.__init__"),
            holds=("serving.observe.call_log", "serving.observe.call", "serving.observe.log_rate", "xllm.logs",
                   "xllm.log_writer")),
    Station("api", "the gate: head, host, path, key, quota",
            at=("serving.api.gate:AccessGate.__call__",),
            holds=("serving.api.gate", "serving.api.body:check_head",
                   "serving.api.body:declares_too_much", "serving.security.hosts", "serving.security.keys",
                   "serving.security.quotas")),
    Station("api", "the route: is there an engine",
            at=("serving.api.route:Route.answer", "serving.api.state:ServerState.check_accepting"),
            holds=("serving.api.route", "serving.api.state"), makes=("starlette.requests.Request",)),
    Station("api", "the body: bytes within bounds, JSON, its type",
            at=("serving.api.body:read_body", "serving.api.types:parse"), holds=("serving.api.body",),
            makes=("serving.api.types.ChatBody",)),
    Station("api", "the chat: its route, its checks, its tools",
            at=("serving.api.routes.chat:create_chat_completion", "serving.api.routes.chat:begin_chat",
                "serving.api.tools:chat_tools"),
            holds=("serving.api.routes.chat", "serving.api.params:check_fan_out", "serving.api.tools"),
            makes=("serving.api.tools.ToolWish",)),
    Station("api", "its text, through the template, and its tokens",
            at=("serving.api.chat_prompt:chat_prompt", "xllm.text.tokenizer:Tokenizer.encode_chat",
                "xllm.text.chat_template:ChatTemplate.render"),
            holds=("serving.api.chat_prompt", "serving.api.effort", "serving.api.text_work", "xllm.text.chat_template",
                   "xllm.text.template_proof", "xllm.text.template_limits", "xllm.text.template_weights",
                   "serving.api.call_weight:check_texts", "serving.api.call_weight:max_text_chars",
                   "xllm.engine.facts", "xllm.text.tokenizer")),
    Station("api", "the call: what reads its answers",
            at=("serving.api.routes.chat:ChatCall.__post_init__", "serving.api.structured:read_structured",
                "serving.parsers.output:OutputParser.__init__"),
            holds=("serving.api.routes.chat:ChatCall", "serving.api.params:call_id", "serving.parsers.tool_set",
                   "serving.api.logprob_shapes"),
            makes=("serving.api.routes.chat.ChatCall",)),
    Station("api", "how to sample it: for how long, its weight, its form",
            at=("serving.api.params:engine_requests", "serving.api.call_weight:check_weight",
                "serving.api.structured:check_structured"),
            holds=("serving.api.params", "serving.api.call_weight", "serving.api.structured", "serving.security.caller",
                   "xllm.token_ids", "xllm.request"),
            makes=("xllm.request.SamplingParams",)),
    Station("api", "the engine's requests",
            at=("xllm.inputs:InputProcessor.requests",), holds=("xllm.inputs",),
            makes=("xllm.request.Request",)),
    Station("api", "the generation is begun",
            at=("serving.api.drive:drive", "serving.api.sse:until_disconnect",
                "serving.api.generation:begin_generation"),
            holds=("serving.api.drive", "serving.api.sse:_disconnected", "serving.api.generation",
                   "serving.api.routes.chat:ChatWriter.__init__", "serving.api.routes.chat:ChatWriter._head")),
    Station("api", "it is let in, and counted among those that wait",
            at=("serving.engine.intake:Intake.submit", "serving.engine.waiting:WaitingTokens.enter"),
            holds=("serving.engine.intake", "serving.engine.waiting", "serving.observe.caller_log")),
    Station("api", "it is submitted: its bytes go out",
            at=("xllm.client.commanding:CommandingClient.submit", "xllm.client.process:ProcessClient._send",
                "xllm.client.command_codec:_CommandCodec.encode"),
            holds=("xllm.client.commanding", "xllm.client.engine_client:Stream.__init__", "xllm.client.process",
                   "xllm.client.command_codec", "xllm.shared_params"),
            makes=("xllm.client.engine_client.Stream", "xllm.engine.commands.Submit")),
    Station("engine", "its bytes come in",
            at=("xllm.client.command_codec:_CommandCodec.decode", "xllm.engine.loop:EngineLoop._submit"),
            holds=("xllm.engine.loop",)),
    Station("engine", "it is checked against the model",
            at=("xllm.engine.core:EngineCore.add",), holds=("xllm.engine.core", "xllm.engine.adapter_names")),
    Station("engine", "it passes the gates",
            at=("xllm.engine.gates:PauseGate.hold", "xllm.engine.grammars:GrammarGate.hold"),
            holds=("xllm.engine.core:EngineCore._pass_on", "xllm.engine.gates", "xllm.engine.grammars",
                   "xllm.engine.landings")),
    Station("engine", "it is queued",
            at=("xllm.scheduler.scheduler:Scheduler.add", "xllm.sequence:SequenceState.__init__",
                "xllm.scheduler.queues:WaitingQueue.push"),
            holds=("xllm.scheduler.scheduler", "xllm.sequence", "xllm.scheduler.queues", "xllm.scheduler.policy"),
            makes=("xllm.sequence.SequenceState",)),
    Station("api", "that it was taken is heard", is_answer=True,
            at=("xllm.client.commanding:CommandingClient._hand_out",
                "xllm.client.engine_client:Stream.admit", "xllm.client.assemble:Completion.__init__"),
            holds=("xllm.client.engine_client",
                   "xllm.client.assemble:Assembly.__init__", "xllm.text.detokenizer:Detokenizer.__init__",
                   "xllm.text.text_stream:text_stream", "xllm.text.text_stream:ByteStream.__init__",
                   "xllm.text.text_stream:ByteStream._tail", "xllm.text.text_stream:_unfinished",
                   "xllm.text.token_text", "serving.observe.request_log:RequestLog.begin"),
            makes=("xllm.engine.commands.Outputs", "xllm.client.assemble.Completion")),
    Station("engine", "it gets blocks and a row",
            at=("xllm.scheduler.admission:Admission.admit",),
            holds=("xllm.engine.step_loop", "xllm.scheduler.admission", "xllm.scheduler.kv_waits",
                   "xllm.scheduler.row_table", "xllm.scheduler.running", "xllm.scheduler.preemption", "xllm.kv.*"),
            makes=("xllm.step.NewRow",)),
    Station("engine", "it is planned",
            at=("xllm.scheduler.plan:PlanBuilder.build",),
            holds=("xllm.scheduler.plan", "xllm.scheduler.token_budget", "xllm.scheduler.departures", "xllm.step"),
            makes=("xllm.step.ScheduleOutput",)),
    Station("engine", "the plan goes to the worker",
            at=("xllm.worker.thread:ThreadLink.send", "xllm.worker.worker:Worker.receive",
                "xllm.worker.worker:Worker.perform"),
            holds=("xllm.worker.link", "xllm.worker.thread", "xllm.worker.inline", "xllm.worker.worker",
                   "backends.cpu.threads")),
    Station("engine", "its row",
            at=("xllm.runner.model_runner:ModelRunner.start", "xllm.runner.row_state:RowState.enter",
                "xllm.runner.sampler:Sampler.enter"),
            holds=("xllm.runner.model_runner", "xllm.runner.row_state", "xllm.runner.pooler",
                   "xllm.runner.sampler:Sampler.release", "xllm.structured.matchers:RowMatchers.release",
                   "xllm.runner.logit_edits", "xllm.runner.kv_cache")),
    Station("engine", "the step's arrays",
            at=("xllm.runner.batch:gather_batch",), holds=("xllm.runner.batch",),
            makes=("xllm.runner.batch.HostBatch",)),
    Station("engine", "the model, and the token that is drawn",
            at=("xllm.runner.eager:EagerForward.run", "xllm.models.decoder:Decoder.forward",
                "xllm.runner.sampler:Sampler.draw"),
            holds=("xllm.runner.model_runner:ModelRunner._forward", "xllm.runner.eager", "xllm.runner.graphs",
                   "xllm.models.*", "xllm.layers.*", "backends.cpu.kernels", "xllm.parallel.*",
                   "xllm.runner.batch:HostBatch", "xllm.runner.batch:as_tensor", "xllm.runner.sampler",
                   "xllm.structured.matchers"),
            makes=("xllm.runner.graphs.Forwarded",)),
    Station("engine", "the step's results",
            at=("xllm.runner.model_runner:ModelRunner._settle", "xllm.worker.worker:Worker._report_step",
                "xllm.worker.inline:InlineLink._report"),
            holds=("xllm.runner.row_state:RowState.advance", "xllm.speculative.*", "xllm.worker.worker:Worker._settle"),
            makes=("xllm.step.StepOutput",)),
    Station("engine", "they are taken in",
            at=("xllm.scheduler.scheduler:Scheduler.update", "xllm.scheduler.output_writer:OutputWriter.append"),
            waits=("xllm.engine.step_loop:StepLoop._settle_oldest",),
            holds=("xllm.scheduler.output_writer", "xllm.scheduler.counters", "xllm.cost.*", "xllm.engine.cache_watch"),
            makes=("xllm.request.OutputDelta",)),
    Station("engine", "the answer's bytes go out",
            at=("xllm.engine.step_log:StepLog.note",), waits=("xllm.engine.loop:EngineLoop._step",),
            holds=("xllm.engine.step_log",)),
    Station("api", "the answer is handed out",
            at=("xllm.client.commanding:CommandingClient._deliver", "xllm.client.engine_client:Stream.push"),
            waits=("xllm.client.engine_client:Stream.next",)),
    Station("api", "its text",
            at=("xllm.client.assemble:Assembly.feed", "xllm.text.detokenizer:Detokenizer.feed",
                "xllm.text.text_stream:ByteStream.push"),
            holds=("xllm.client.assemble", "xllm.text.detokenizer", "xllm.text.text_stream",
                   "serving.api.generation:Generation._note", "serving.api.generation:Generation._end",
                   "serving.observe.request_log", "serving.observe.metrics.*",
                   "serving.observe.caller_log:CallerLog.note_end"),
            makes=("xllm.client.assemble.Piece",)),
    Station("api", "the chunk: answer, thought, calls",
            at=("serving.api.routes.chat:ChatWriter.piece", "serving.parsers.output:OutputParser.feed"),
            holds=("serving.api.routes.chat:ChatWriter", "serving.api.routes.chat:ChatCall.read",
                   "serving.parsers.output", "serving.parsers.events")),
    Station("api", "the event's bytes, one after the other",
            at=("serving.api.sse:event",), waits=("serving.api.sse:EventStream._pump",), holds=("serving.api.sse",)),
    Station("api", "the answer's head and bytes go out",
            at=(), waits=("serving.observe.call_log:CallLog.__call__.answer",)),
)
ASIDE = {
    "parts of what carries it": (
        "serving.api.types.ChatMessage", "serving.parsers.tool_set.ToolSet", "serving.api.call_weight.Term",
        "xllm.shared_params.SharedParams", "backends.metadata.AttentionMetadata", "backends.cpu.kernels.StepPlan",
        "serving.api.sse.LastEvents"),
    "what reads or writes it": (
        "serving.api.connection.BoundConnection", "xllm.text.chat_template._Wish",
        "serving.parsers.output.OutputParser", "serving.api.logprob_shapes.ChoiceLogprobs",
        "serving.api.routes.chat.ChatWriter", "serving.api.generation.Generation",
        "xllm.scheduler.plan.PlanBuilder", "xllm.scheduler.token_budget.Share",
        "xllm.client.assemble.Assembly", "xllm.text.detokenizer.Detokenizer", "xllm.text.text_stream.ByteStream",
        "serving.api.sse.EventStream", "serving.api.answer_port._Answer"),
    "what is noted, bounded or found beside it": (
        "serving.observe.call.Call", "serving.observe.request_log.RequestRecord",
        "serving.observe.throughput_log.ThroughputLog", "xllm.text.template_limits._Clock",
        "xllm.text.template_weights.TemplateWeights", "xllm.kv.prefix_index.PrefixMatch",
        "backends.cpu.threads.Seen", "backends.cpu.threads.Pace", "xllm.cost.observations.StepWork",
        "xllm.cost.cost_model.StepPrices", "xllm.cost.cost_model.FitError", "xllm.cost.least_squares.Normal"),
}
# What runs every few seconds, and so perhaps while the request is traced and not in the idle time before.
BY_THE_CLOCK = (
    "serving.commands.serve", "serving.commands.server_life", "serving.engine.supervisor",
    "serving.observe.throughput_log", "serving.observe.engine_history", "serving.observe.caller_log:CallerLog.sample",
    "serving.observe.caller_log:CallerFigures", "xllm.child_end", "xllm.client.process:ProcessClient.silent_for_s",
    "xllm.engine.collect_stats", "backends.cpu.threads",
)
