"""`AdapterNames`: the adapters that are loaded, by name, and the slot that a request with one gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from xllm.config import LoraSettings
from xllm.errors import ConfigError, EngineStateError, ModelError, RequestError, XllmError
from xllm.kv.block import salt_with_adapter
from xllm.request import Request
from xllm.worker.failures import as_error
from xllm.worker.link import WorkerLink
from xllm.worker.messages import AdapterRead, PutAdapter, ReadAdapter

MAX_NAME_CHARS = 256  # chosen: names stand in log lines, metrics and answers
OnDone = Callable[[XllmError | None], None]


@dataclass(frozen=True, kw_only=True)
class LoadedAdapter:
    """digest: of its files."""

    slot: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class _Reading:
    name: str
    on_done: OnDone


class AdapterNames:
    """Workers read adapters beside the steps, and fill their slots between two steps once every rank has read them.
    Belongs to the core's thread."""

    def __init__(self, settings: LoraSettings, link: WorkerLink, *, is_used: Callable[[str], bool]):
        """Load the adapters that the settings name. is_used(name): whether an open request computes with it. Raises
        ConfigError."""
        self._settings, self._link, self._is_used = settings, link, is_used
        self._adapters: dict[str, LoadedAdapter] = {}
        self._reading: dict[int, _Reading] = {}
        self._next_number = 0
        for module in settings.lora_modules:
            name, _, folder = module.partition("=")
            self._load_now(name, Path(folder).expanduser())

    @property
    def names(self) -> tuple[str, ...]:
        """In the order in which they were loaded."""
        return tuple(self._adapters)

    @property
    def digests(self) -> tuple[str, ...]:
        """Of their files, in the order of `names`."""
        return tuple(adapter.digest for adapter in self._adapters.values())

    @property
    def is_reading(self) -> bool:
        """Whether the workers still have to answer about an adapter."""
        return bool(self._reading)

    def bind(self, request: Request) -> Request:
        """The request with its adapter's slot and a cache of its own, because keys and values depend on the adapter.

        Raises RequestError if there is no such adapter.
        """
        found = self._adapters.get(request.lora)
        if found is None:
            raise RequestError(f"no adapter is called {request.lora[:MAX_NAME_CHARS]!r}", field="lora")
        return replace(request, lora_slot=found.slot, cache_salt=salt_with_adapter(request.cache_salt, found.digest))

    def load(self, name: str, folder: Path, on_done: OnDone) -> None:
        """Begin to read an adapter; `hear` gives it a slot and calls `on_done`, with None or what went wrong
        (ModelError: its files; else as here, if that has changed meanwhile).

        Raises:
            RequestError: the name is taken or unusable. EngineStateError: there is no slot. Nothing has begun then.
        """
        self._check(name)
        self._next_number += 1
        self._reading[self._next_number] = _Reading(name=name, on_done=on_done)
        self._link.send(ReadAdapter(number=self._next_number, folder=str(folder),
                                    max_rank=self._settings.max_lora_rank))

    def hear(self) -> None:
        """Take in the adapters that the workers have read: give each a slot and call its `on_done`."""
        for answer in self._link.take(AdapterRead) if self._reading else ():
            reading = self._reading.pop(answer.number)
            try:
                if answer.error is not None:
                    raise as_error(answer.error)
                slot = self._check(reading.name)
            except XllmError as error:
                self._link.send(PutAdapter(slot=None, number=answer.number))  # some rank may have read it
                reading.on_done(error)
                continue
            self._link.send(PutAdapter(slot=slot, number=answer.number))
            self._adapters[reading.name] = LoadedAdapter(slot=slot, digest=answer.digest)
            reading.on_done(None)

    def unload(self, name: str) -> None:
        """Free an adapter's slot. Raises RequestError if there is no such adapter, EngineStateError while a request
        uses it."""
        if name not in self._adapters:
            raise RequestError(f"no adapter is called {name[:MAX_NAME_CHARS]!r}", field="lora_name")
        if self._is_used(name):
            raise EngineStateError(f"requests with adapter {name!r} are open")
        self._link.send(PutAdapter(slot=self._adapters.pop(name).slot, number=None))

    def _load_now(self, name: str, folder: Path) -> None:
        failed: list[XllmError | None] = []
        self.load(name, folder, failed.append)
        while not failed:
            self._link.wait(1.0)
            self.hear()
        if isinstance(failed[0], ModelError):
            raise ConfigError(f"lora_modules: {name}: {failed[0]}") from None
        if failed[0] is not None:
            raise failed[0]

    def _check(self, name: str) -> int:
        """The slot that a new adapter of this name would get. Raises RequestError or EngineStateError, as `load`."""
        if not self._settings.is_on:
            raise EngineStateError("this engine takes no adapters; start it with --enable-lora")
        if not 0 < len(name) <= MAX_NAME_CHARS or not name.isprintable():
            raise RequestError(f"lora_name must have 1 to {MAX_NAME_CHARS} printable characters", field="lora_name")
        if name in self._adapters:
            raise RequestError(f"an adapter called {name!r} is loaded already", field="lora_name")
        free = sorted(set(range(1, self._settings.max_loras + 1)) - {a.slot for a in self._adapters.values()})
        if not free:
            raise EngineStateError(f"all {self._settings.max_loras} slots (max_loras) are taken: unload an adapter "
                                   "first")
        return free[0]
