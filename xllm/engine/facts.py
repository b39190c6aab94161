"""`EngineFacts`: what is known of a loaded engine for as long as it lives."""

from __future__ import annotations

from dataclasses import dataclass

from xllm.config import EngineConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """config: resolved. model_path: the local folder of the model. num_blocks: KV blocks on the device."""

    config: EngineConfig
    model_path: str
    vocab_size: int
    hidden_size: int
    eos_token_ids: tuple[int, ...]
    num_blocks: int

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest sequence, prompt and output."""
        assert self.config.model.max_model_len is not None, "the config of a loaded engine is resolved"
        return self.config.model.max_model_len
