"""Layers behind a decoder's last one that predict further tokens (multi-token prediction; DeepSeek-V3, 2024). They are
not used."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from xllm.models.model_config import MAX_LAYERS
from xllm.models.raw_config import RawConfig

if TYPE_CHECKING:
    from xllm.layers.layer_context import Weights

log = logging.getLogger(__name__)


def read_num_draft_layers(raw: RawConfig) -> int:
    """`num_mtp_layers` is transformers' own name for it. Raises ModelError."""
    return raw.whole("num_nextn_predict_layers", high=MAX_LAYERS) or raw.whole("num_mtp_layers", high=MAX_LAYERS)


def skip_draft_layers(weights: Weights, num_layers: int, num_draft_layers: int) -> None:
    """Leave out their tensors; a warning says so where there are any."""
    behind = range(num_layers, num_layers + num_draft_layers)
    if sum(weights.skip(f"model.layers.{index}.") for index in behind):
        log.warning("the checkpoint's layers for multi-token prediction (%d, from number %d on) are not used",
                    num_draft_layers, num_layers)
