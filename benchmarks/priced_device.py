"""`PricedDevice`: what a device that nobody has here takes for its steps, from a file in `benchmarks/devices/`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xllm.cost.cost_model import CostModel, StepPrices
from xllm.cost.observations import LOAD, TRANSFER
from xllm.errors import ConfigError

# Of a model that nobody computes: its KV is small enough to be copied beside what is measured. Layers are chosen: KV is
# sent and loaded by layers, a quarter at a time.
SHAPE = {"num_hidden_layers": 4}
TOKEN_BYTES = 4 * 2 * 1 * 16 * 4  # of its KV: layers, k and v, heads, head_dim, and bytes of float32


@dataclass(frozen=True, slots=True)
class PricedDevice:
    """what: in words. kv_token_bytes: of the model that it stands for. link_bytes_per_s, host_bytes_per_s: at which KV
    of the tiny model (`SHAPE`) goes to another instance, and from host memory to the device, so that a prompt's takes
    as long as the real one's."""

    what: str
    prices: StepPrices
    kv_token_bytes: int
    link_bytes_per_s: float
    host_bytes_per_s: float


def read_device(path: Path) -> PricedDevice:
    """Raises ConfigError, naming the file, for what is no such file."""
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        model, kv_token_bytes = CostModel.from_json(data["model"]), int(data["kv_token_bytes"])
        if model.steps is None or kv_token_bytes < 1:
            raise ValueError("steps and kv_token_bytes must be there")
        rates = [TOKEN_BYTES / model.move_s(kind, kv_token_bytes) for kind in (TRANSFER, LOAD)]
        return PricedDevice(str(data["what"]), model.steps, kv_token_bytes, *rates)
    except (OSError, ValueError, LookupError, TypeError, ZeroDivisionError) as error:
        raise ConfigError(f"{path} does not say what a device takes: {error}") from None
