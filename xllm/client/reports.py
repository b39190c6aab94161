"""The reports of an engine process beside the answers of its loop: start-up, heartbeats and the reason of its end."""

from __future__ import annotations

from dataclasses import dataclass, field

from xllm.engine.commands import CommandReply
from xllm.engine.facts import EngineFacts
from xllm.engine.step_log import StepReport
from xllm.stats import EngineStats


@dataclass(frozen=True, slots=True)
class StartPhase:
    """Progress of the start-up: `share` of `name` is done."""

    name: str
    share: float


@dataclass(frozen=True, slots=True)
class Ready:
    """The model is loaded."""

    facts: EngineFacts


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A sign of life. step_age_s: seconds since the last step ended (or the work began), while there is work; else
    None."""

    step_age_s: float | None
    stats: EngineStats
    steps: StepReport = field(default_factory=StepReport)


@dataclass(frozen=True, slots=True)
class Fatal:
    """The engine ends for this reason. user_error: a setting or a checkpoint is wrong, rather than the engine."""

    reason: str
    user_error: bool


Report = CommandReply | StartPhase | Ready | Heartbeat | Fatal
