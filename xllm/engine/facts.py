"""`EngineFacts`: the facts about a loaded engine that its clients need."""

from __future__ import annotations

from dataclasses import dataclass, field

from xllm.config import EngineConfig
from xllm.worker.messages import Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """Constant for the life of the engine.

    config: resolved. model_path: the checkpoint's folder. num_blocks: of the KV cache on the device. adapters: names of
    those that were loaded at the start; a running engine may have others. adapter_digests: of their files, in the same
    order. placement: where and how it computes.
    """

    config: EngineConfig
    model_path: str
    vocab_size: int
    hidden_size: int
    eos_token_ids: tuple[int, ...]
    num_blocks: int
    adapters: tuple[str, ...] = ()
    adapter_digests: tuple[str, ...] = ()
    placement: Placement = field(default_factory=Placement)

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest sequence, prompt and output together."""
        assert self.config.model.max_model_len is not None, "a resolved config says it"
        return self.config.model.max_model_len
