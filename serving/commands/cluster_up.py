"""`xllm cluster up`: a master and its instances on this machine, in one command.

The metadata store is in this process and served to the instances, which are `xllm serve` processes of their own. The
cluster's secret and the store's key are new ones, and reach them by their environment alone. Nothing is started again:
an instance whose engine dies starts that again by itself, and one that ends has said why, as this command does.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from serving.cluster.embedded import EmbeddedStore
from serving.cluster.key_value_store import KeyValueStore
from serving.cluster.store_server import StoreServer
from serving.commands.cluster_table import cluster_head, cluster_table
from serving.commands.instance_process import InstanceProcess
from serving.commands.master import Master
from serving.commands.server_life import FrontDoor, front_door
from serving.master_config import MasterConfig
from xllm import env, logs
from xllm.client.cluster_keys import cluster_keys
from xllm.client.cluster_members import ClusterEvent
from xllm.errors import ConfigError

MAX_INSTANCES = 64  # as many as a cluster's index knows
DRAW_S = 0.5  # between two drawings, and looks for news. Chosen: as instances report
END_S = 15.0  # for instances to end, which have nothing to do by then. Chosen: a busy machine's
NAMES = {"DEFAULT": "instance", "PREFILL": "prefill", "DECODE": "decode"}  # of instances, by role; with a number
TAIL = 3  # lines of the log of an instance that ended before it had joined
logger = logging.getLogger("xllm.cluster")


def run(config: MasterConfig, roles: Sequence[str], flags: Sequence[str]) -> int:
    """Serve until a signal comes, or no instance is left. roles: of the instances, one each. flags: of `xllm serve`,
    checked, for each instance. Returns the exit code. Raises ConfigError before anything has started."""
    if not 1 <= len(roles) <= MAX_INSTANCES:
        raise ConfigError(f"instances must be in 1 to {MAX_INSTANCES}, got {len(roles)}")
    logs.take_over()
    folder = Path(tempfile.mkdtemp(prefix="xllm-cluster-"))  # for this user alone
    try:
        with front_door(config.http) as door:
            code = asyncio.run(_ClusterUp(config, door, roles, flags, folder).run())
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if code == 0:
        shutil.rmtree(folder, ignore_errors=True)
    return code


def _role_flags(role: str) -> list[str]:
    return [] if role == "DEFAULT" else ["--instance-role", role, "--enable-disagg-pd"]


class _ClusterUp(Master):
    """A master with a store of its own, and the processes of its instances."""

    def __init__(self, config: MasterConfig, door: FrontDoor, roles: Sequence[str], flags: Sequence[str], folder: Path):
        self._secret = secrets.token_hex(32)
        super().__init__(config, door, cluster_keys(self._secret.encode()), None)
        self._roles = {f"{NAMES[role]}-{list(roles[:place]).count(role)}": role for place, role in enumerate(roles)}
        self._flags, self._folder = flags, folder
        self._processes: list[InstanceProcess] = []
        self._waiting: list[asyncio.Task[None]] = []
        self._last_event: ClusterEvent | None = None  # the last event that was told
        self._told: set[str] = set()
        self._live: Live | None = None

    async def run(self) -> int:
        """See `ServerLife.run`; meanwhile tell, and on a terminal draw, what happens."""
        if sys.stdout.isatty() and not logs.is_json():
            console = Console()
            self._live = Live(console=console, auto_refresh=False, transient=True)
            self._live.start()
            logs.write_by(lambda line: console.print(Text(line), soft_wrap=True))
        telling = asyncio.create_task(self._tell(), name="cluster-news")
        try:
            return await super().run()
        finally:
            telling.cancel()
            self._end_drawing()

    # --- the store and the instances

    def _open_store(self) -> KeyValueStore:
        self._own_store = EmbeddedStore()
        self._served_store = StoreServer(self._own_store)
        return KeyValueStore(self._own_store)

    async def _look_after(self) -> None:
        self._say(f"starting {len(self._roles)} instances, which log to {self._folder}")
        try:
            self._start()
        except OSError as error:
            logger.error("an instance cannot be started: %s", error)
            self._fail()
            return
        await super()._look_after()

    def _start(self) -> None:
        place = self._served_store.place
        for name, role in self._roles.items():
            environment = env.for_instance(secret=self._secret, port=place.port, key=place.key,
                                           api_key=secrets.token_urlsafe(24),
                                           log_level=self._config.log.log_level)
            flags = [*self._flags, *_role_flags(role)]
            process = InstanceProcess(name, flags, environment, self._folder / f"{name}.log")
            self._processes.append(process)
            self._waiting.append(asyncio.create_task(self._await_end(process), name=name))

    async def _await_end(self, process: InstanceProcess) -> None:
        how = await process.wait()
        if self._state.draining:
            return
        self._code = 1  # whatever becomes of the others
        left = [one.name for one in self._processes if one.ended is None]
        rest = f"{len(left)} of {len(self._roles)} left" if left else "none is left"
        self._say(f"{process.name} {how}; it is not started again, {rest}; its log: {process.log}")
        if process.name not in self._told:
            for line in process.last_lines(TAIL):
                self._say(f"  {logs.on_one_line(line)}")
        if not left:
            self._fail()

    async def _shut_down(self) -> None:
        """There are no more calls: the instances end, then the master and its store."""
        self._note_draining()
        for process in self._processes:
            process.drain()
        if self._waiting:
            _, late = await asyncio.wait(self._waiting, timeout=END_S)
            for process in self._processes:
                if process.ended is None:
                    logger.warning("%s did not end within %g s: it is killed", process.name, END_S)
                process.kill()
            if late:
                await asyncio.wait(late)
        await super()._shut_down()
        await self._served_store.close()

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
        self._end_drawing()

    # --- what is shown

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(DRAW_S)
            self._tell_news()
            if self._live is not None:
                self._live.update(await self._screen(), refresh=True)

    def _note_loaded(self) -> None:
        self._tell_news()  # before it is said that the model is served
        super()._note_loaded()

    def _tell_news(self) -> None:
        """Of what has gone, the log tells."""
        for event in self._news():
            if event.kind == "joined":
                again = " again" if event.instance in self._told else ""
                self._told.add(event.instance)
                self._say(f"{event.instance} has joined{again}")

    def _news(self) -> list[ClusterEvent]:
        """Events since the last call, the oldest first."""
        found: list[ClusterEvent] = []
        for event in reversed(self._cluster.members.events):
            if event is self._last_event:
                break
            found.append(event)
        self._last_event = found[0] if found else self._last_event
        return found[::-1]

    async def _screen(self) -> Group:
        assert self._state.cluster is not None
        shown = await self._state.cluster.shown()
        known = {member["name"]: member for member in shown["members"]}
        shown["members"] = [self._row(process, known.get(process.name)) for process in self._processes]
        end = "draining; Ctrl-C again ends all at once" if self._state.draining else "Ctrl-C ends all"
        return Group(Text(""), cluster_head(shown), cluster_table(shown["members"]), Text(end, "dim"))

    def _row(self, process: InstanceProcess, member: dict[str, Any] | None) -> dict[str, Any]:
        if process.ended is not None:
            return {"name": process.name, "state": "ended", "reason": process.ended}
        state = "draining" if self._state.draining else "loading"
        return member or {"name": process.name, "state": state, "reason": f"pid {process.pid}"}

    def _end_drawing(self) -> None:
        if self._live is not None:
            self._live.stop()
            logs.write_by(None)
            self._live = None
