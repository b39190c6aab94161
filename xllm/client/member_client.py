"""`MemberClient`: what a cluster asks of the client of each of its instances, whatever that speaks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

from xllm.client.commanding import CommandingClient
from xllm.client.gate_wire import ServedModel
from xllm.client.server_place import KVEventsPlace
from xllm.engine.facts import EngineFacts
from xllm.engine.step_log import StepReport
from xllm.errors import EngineDeadError, RequestError
from xllm.request import Request
from xllm.stats import EngineStats


class MemberClient(CommandingClient):
    """A `WatchedEngine` that is another process, perhaps on another machine.

    address: where that is, to be shown. role: which half of requests it says it is for. incarnation: of the engine that
    is, or was last, there: another one has nothing cached. draining: it takes no more requests; those that it has go
    on. takes_commands: about the engine as a whole (`control`). kv_events: where what is cached is published; None:
    `on_cache_changes` tells it. on_condition: called after each sign of life that says how it is. on_lost: called with
    the reason, once a connection.
    """

    def __init__(self, address: str) -> None:
        super().__init__()
        self.address, self.role = address, "DEFAULT"
        self.incarnation: str | None = None
        self.started_unix_s = 0.0
        self.model: ServedModel | None = None
        self.phase = "not connected"
        self.restarting_after: str | None = None  # this client restarts nothing; `dead_reason` says why it is lost
        self.stats = EngineStats()
        self.steps = StepReport()
        self.draining = False
        self.takes_commands = True
        self.kv_events: KVEventsPlace | None = None
        self.on_steps: Callable[[StepReport], None] = lambda steps: None
        self.on_condition: Callable[[], None] = lambda: None
        self.on_lost: Callable[[str], None] = lambda reason: None

    @abstractmethod
    async def connect(self) -> EngineFacts:
        """Connect, for the first time or once more. Raises EngineDeadError, whose reason `dead_reason` is, too."""

    @abstractmethod
    def close(self, reason: str = "this client was closed") -> None:
        """Leave; open requests end with an EngineDeadError of that reason. Idempotent."""

    async def closed(self) -> None:
        """Wait for what goes on behind `close`."""
        return

    @abstractmethod
    def silent_for_s(self) -> float:
        """See `WatchedEngine.silent_for_s`."""

    @property
    def is_up(self) -> bool:
        """Whether requests are taken."""
        return self.dead_reason is None and self.phase == "ready" and not self.draining

    @property
    def engines(self) -> tuple[MemberClient, ...]:
        """Itself: how many engines the instance has is its own affair."""
        return (self,)

    def refusal(self, requests: Sequence[Request]) -> RequestError | None:
        """Why this instance cannot do what these requests ask for, which others may; None: it can."""
        return None

    def _check_up(self) -> None:
        super()._check_up()
        if self.phase != "ready":
            raise EngineDeadError(f"the instance at {self.address} is {self.phase}")
