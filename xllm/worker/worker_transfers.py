"""`WorkerTransfers`: a worker's part of sending KV to other instances and of taking it from them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from xllm.errors import ConfigError
from xllm.kv.moves import LAND, Move, MoveDone
from xllm.kv_offer import RankWindow
from xllm.runner.kv_codec import KVCodec
from xllm.runner.kv_reader import KVReader
from xllm.runner.model_runner import ModelRunner
from xllm.transfer.transports import open_window
from xllm.worker.landing_desk import LandingDesk
from xllm.worker.loading import LoadedModel
from xllm.worker.publisher import Publisher


class WorkerTransfers:
    """memory: uint8 of the host tier's slots, which other instances write to: `num_slots` payloads. window: what they
    need to know of it. rank: of those that share the model, or compute the same. Raises ConfigError where it cannot be
    reached in one of the ways that the settings name."""

    def __init__(self, model: LoadedModel, runner: ModelRunner, codec: KVCodec, num_slots: int,
                 report: Callable[[MoveDone], None], *, rank: int):
        settings, backend = model.config.transfer, model.backend
        block_size = model.config.cache.block_size
        assert block_size is not None, "resolve() first"
        reader = KVReader(backend, runner.kv_cache.layers, block_size,
                          [spec.num_heads for spec in model.model_config.kv_specs], rank=rank,
                          num_ranks=model.config.device.num_ranks)
        opened = open_window(settings.ways, num_slots * codec.payload_bytes, host=settings.kv_transfer_host)
        try:
            self.memory: Tensor = backend.share_host(np.frombuffer(opened.memory, dtype=np.uint8))
        except MemoryError as error:
            opened.close()
            raise ConfigError(f"enable_disagg_pd: {error}") from None
        self.window = RankWindow(addresses=opened.addresses, layout=reader.layout(codec),
                                 block_bytes=codec.payload_bytes)
        self._desk = LandingDesk(opened, codec.payload_bytes, report)
        self._publisher = Publisher(reader, runner.departing, report)

    def send(self, move: Move) -> None:
        """Begin a move of `TRANSFERS`."""
        if move.lane == LAND:
            self._desk.begin(move)
        else:
            self._publisher.begin(move)

    def end_landing(self, number: int) -> None:
        """See `messages.EndLanding`."""
        self._desk.revoke(number)

    def close(self) -> None:
        """End all threads and connections. No step is computed any more."""
        self._publisher.close()
        self._desk.close()
