"""`ReplicaControl`: sends commands about the engine as a whole to all of several engines, so that they stay alike."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from xllm.client.commanding import CommandingClient
from xllm.engine.commands import Action, Controlled, EngineState
from xllm.errors import EngineDeadError


class ReplicaControl:
    """One command at a time, to every engine that is up; `catch_up` brings one that comes later to the same state.

    up: called for the engines that take requests, by what errors call them. state: what the engines are in, as of the
    last command; None: as they started. folders: of the adapters that were loaded at run time; None: unloaded then.
    """

    def __init__(self, up: Callable[[], Mapping[str, CommandingClient]]):
        self.state: EngineState | None = None
        self.folders: dict[str, str | None] = {}
        self._up = up
        self._start_folders: dict[str, str] = {}
        self._turn = asyncio.Lock()

    def know_adapters(self, lora_modules: Sequence[str]) -> None:
        """Take note of the adapters that engines start with, as in `LoraSettings`."""
        self._start_folders |= dict(module.split("=", 1) for module in lora_modules if "=" in module)

    async def run(self, action: Action, options: dict[str, Any]) -> Controlled:
        """The merged answer. If an engine refuses, its error, and the others are brought back to what they were.

        Raises: EngineDeadError: none of them is up, or all have died meanwhile.
        """
        async with self._turn:
            folder = self._folder_of(options.get("name", ""))
            answers = await self._tell(engines := self._up(), action, options)
            failed = {number: answer for number, answer in answers.items() if answer.error is not None}
            if not failed:
                done = _merged(list(answers.values()))
                self.state = done.state
                self._note_folder(action, options)
                return done
            number, answer = next(iter(failed.items()))
            others = {other: engines[other] for other in answers if other not in failed}
            kept = await self._undo(others, action, {**options, "folder": folder})
            return replace(_merged(list(answers.values())), error=f"{number}: {answer.error}{kept}",
                           field=answer.field, is_state=answer.is_state, num_blocks=0)

    async def _tell(self, engines: Mapping[str, CommandingClient], action: Action,
                    options: dict[str, Any]) -> dict[str, Controlled]:
        """The answers of those that lived to give one. Raises EngineDeadError if there are none."""
        if not engines:
            raise EngineDeadError("no engine is up")
        answers = await asyncio.gather(*(engine.control(action, **options) for engine in engines.values()),
                                       return_exceptions=True)
        found, died = dict[str, Controlled](), list[EngineDeadError]()
        for number, answer in zip(engines, answers, strict=True):
            if isinstance(answer, Controlled):
                found[number] = answer
            elif isinstance(answer, EngineDeadError):
                died.append(answer)  # when it is back it gets what it missed
            else:
                raise answer
        if not found:
            raise died[0]
        return found

    async def _undo(self, engines: Mapping[str, CommandingClient], action: Action, options: dict[str, Any]) -> str:
        """Bring engines back that did what another one refused; returns what is to be said of those that stayed.
        options: with the folder that an adapter had been loaded from."""
        before = self.state or EngineState()
        back: tuple[Action, dict[str, Any]] | None = None
        if action in ("sleep", "wakeup"):
            back = ("sleep", {"level": before.sleep_level}) if before.sleep_level else ("wakeup", {})
        elif action in ("pause", "resume"):
            back = ("pause", {"mode": before.paused}) if before.paused else ("resume", {})
        elif action == "load_adapter":
            back = "unload_adapter", {"name": options["name"]}
        elif action == "unload_adapter":
            back = "load_adapter", {"name": options["name"], "folder": options["folder"]}
        if back is None or not engines:
            return ""
        try:
            answers = await self._tell(engines, *back)
        except EngineDeadError:
            return ""
        stayed = [f"{number} did it and cannot go back: {answer.error}" for number, answer in answers.items()
                  if answer.error is not None]
        return "".join(f"; {text}" for text in stayed)

    async def catch_up(self, engine: CommandingClient) -> None:
        """Give an engine that has been started again the adapters and the state of the others. Raises EngineDeadError
        if it dies meanwhile."""
        async with self._turn:
            if self.state is None:
                return
            wanted = dict(zip(self.state.adapters, self.state.adapter_digests, strict=True))
            loaded = dict(zip(engine.adapters, engine.adapter_digests, strict=True))
            for name in [name for name, digest in loaded.items() if wanted.get(name) != digest]:
                await engine.control_or_log("unload_adapter", name=name)
            for name in [name for name in wanted if name not in engine.adapters]:
                await engine.control_or_log("load_adapter", name=name, folder=self._folder_of(name))
            if self.state.paused:
                await engine.control_or_log("pause", mode=self.state.paused)
            if self.state.sleep_level:
                await engine.control_or_log("sleep", level=self.state.sleep_level)

    def _note_folder(self, action: Action, options: Mapping[str, Any]) -> None:
        if action == "load_adapter":
            self.folders[options["name"]] = options["folder"]
        elif action == "unload_adapter":
            self.folders[options["name"]] = None

    def _folder_of(self, name: str) -> str:
        """Where an adapter was loaded from; "": it is not."""
        return self.folders.get(name) or self._start_folders.get(name, "")


def _merged(answers: list[Controlled]) -> Controlled:
    state = replace(answers[0].state, num_open=sum(answer.state.num_open for answer in answers))
    return replace(answers[0], state=state, num_blocks=sum(answer.num_blocks for answer in answers))
