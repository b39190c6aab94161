"""`AdapterNames`: which adapters are loaded, under which names, and what that means for a request."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xllm.config import LoraSettings
from xllm.errors import ConfigError, EngineStateError, ModelError, RequestError, XllmError
from xllm.request import Request

if TYPE_CHECKING:
    from xllm.engine.loading import LoadedModel
    from xllm.layers.adapters import Adapter

MAX_NAME_CHARS = 256


@dataclass(frozen=True, kw_only=True)
class ReadAdapter:
    """An adapter's files, read and found good. digest: of both."""

    weights: Adapter
    digest: str
    folder: Path


@dataclass(frozen=True, kw_only=True)
class LoadedAdapter:
    """digest: of its files. folder: where it was read from."""

    slot: int
    digest: str
    folder: Path


@dataclass(frozen=True, slots=True)
class _Reading:
    """An adapter whose files are being read."""

    name: str
    read: Future[ReadAdapter]
    on_done: Callable[[XllmError | None], None]


class AdapterNames:
    """`put(slot, adapter)` fills or empties a slot, `is_used(name)` tells whether an open request computes with one."""

    def __init__(self, settings: LoraSettings, loaded: LoadedModel, *, put: Callable[[int, Any], None],
                 is_used: Callable[[str], bool]):
        """Loads what the settings name. Raises ConfigError."""
        self._settings, self._loaded, self._put, self._is_used = settings, loaded, put, is_used
        self._adapters: dict[str, LoadedAdapter] = {}
        self._reader = ThreadPoolExecutor(1, "adapter-reader")  # its thread starts with the first adapter
        self._reading: deque[_Reading] = deque()
        for module in settings.lora_modules:
            name, _, folder = module.partition("=")
            try:
                self.load(name, Path(folder).expanduser())
            except ModelError as error:
                raise ConfigError(f"lora_modules: {name}: {error}") from None

    @property
    def names(self) -> tuple[str, ...]:
        """In the order in which they were loaded."""
        return tuple(self._adapters)

    def bind(self, request: Request) -> Request:
        """The request with its adapter's slot, and with a cache of its own: keys and values depend on the adapter.

        Raises RequestError if there is no such adapter.
        """
        if not request.lora:
            return request
        found = self._adapters.get(request.lora)
        if found is None:
            raise RequestError(f"no adapter is called {request.lora[:MAX_NAME_CHARS]!r}", field="model")
        return replace(request, lora_slot=found.slot, cache_salt=f"{request.cache_salt}\0lora:{found.digest}")

    def load(self, name: str, folder: Path) -> None:
        """Read an adapter and give it a slot; `check`, `read` and `enter` in one.

        Raises:
            RequestError: the name is taken or unusable. ModelError: the files are. EngineStateError: there is no slot.
        """
        self.check(name)
        self.enter(name, self.read(folder))

    def begin(self, name: str, folder: Path, on_done: Callable[[XllmError | None], None]) -> None:
        """As `load`, but the files are read in a thread of their own, one adapter after the other; `enter_read` does
        the rest and calls `on_done`. Raises as `check` does; nothing is read then."""
        self.check(name)
        self._reading.append(_Reading(name, self._reader.submit(self.read, folder), on_done))

    @property
    def is_reading(self) -> bool:
        """Whether `enter_read` has something to wait for or to enter."""
        return bool(self._reading)

    def enter_read(self) -> None:
        """Give the adapters that have been read their slots."""
        while self._reading and self._reading[0].read.done():
            reading = self._reading.popleft()
            try:
                self.enter(reading.name, reading.read.result())
            except XllmError as error:
                reading.on_done(error)
            else:
                reading.on_done(None)

    def close(self) -> None:
        """Read no more; what was begun is never entered."""
        self._reader.shutdown(wait=False, cancel_futures=True)

    def read(self, folder: Path) -> ReadAdapter:
        """Read the files, which may take long; any thread may. Raises ModelError if they cannot be used."""
        from xllm.models.adapter import adapter_digest, read_adapter

        slots = self._loaded.adapters
        assert slots is not None, "check comes first"
        try:
            weights = read_adapter(folder, slots.shapes(), self._settings.max_lora_rank)
            return ReadAdapter(weights=weights, digest=adapter_digest(folder), folder=folder)
        except OSError as error:
            raise ModelError(f"{folder} cannot be read: {error.strerror}") from None

    def enter(self, name: str, adapter: ReadAdapter) -> None:
        """Give an adapter that was read a slot. Raises as `check` does."""
        slot = self.check(name)
        self._put(slot, adapter.weights)
        self._adapters[name] = LoadedAdapter(slot=slot, digest=adapter.digest, folder=adapter.folder)

    def check(self, name: str) -> int:
        """The slot that an adapter of this name would get now.

        Raises:
            RequestError: the name is taken or unusable. EngineStateError: there is no slot.
        """
        if self._loaded.adapters is None:
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

    def unload(self, name: str) -> None:
        """Raises RequestError if there is no such adapter, EngineStateError while a request uses it."""
        if name not in self._adapters:
            raise RequestError(f"no adapter is called {name[:MAX_NAME_CHARS]!r}", field="lora_name")
        if self._is_used(name):
            raise EngineStateError(f"requests with adapter {name!r} are open")
        self._put(self._adapters.pop(name).slot, None)
