"""The memory that a layer of 64 experts takes beside its weights and what it is given, as JSON: for one chunk, and for
a prompt of 32,768 tokens in one call. Linux alone. Usage: python -m benchmarks.expert_memory
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from backends import get_backend
from backends.expert_choice import RouteRule
from xllm import env
from xllm.layers.experts import MAX_ROWS, Experts, ExpertShape
from xllm.layers.layer_context import LayerContext, Part
from xllm.layers.workspace import Workspace
from xllm.parallel.shard import Shard

PROMPT_TOKENS = 32_768
SHAPE = ExpertShape(hidden_size=256, ffn_size=128, num_experts=64, rule=RouteRule(num_chosen=8, renormalise=True))


class RandomWeights:
    """Of any name."""

    is_bare = False

    def take(self, name: str, shape: tuple[int, ...], shard: Shard | None = None, *,
             dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape) * shape[-1] ** -0.5

    def take_matrix(self, name: str, shape: tuple[int, ...], shard: Shard | None = None) -> Tensor:
        return self.take(name, shape, shard)

    def take_experts(self, name: str, shape: tuple[int, int, int], parts: Sequence[Part]) -> Iterator[Tensor]:
        raise AssertionError("experts stand apart here")

    def has(self, name: str) -> bool:
        return "experts." not in name or name.endswith(".weight")

    def skip(self, prefix: str) -> int:
        return 0


def peak_bytes() -> int:
    """The most memory that this process has had so far, as the system counts it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measure() -> dict[str, float]:
    """peak_bytes above what the process had before either; the second call may use what the first has left."""
    backend = get_backend("cpu", cache_dir=env.cache_dir())
    layer = Experts(LayerContext(ops=backend.ops, device=backend.device, max_model_len=PROMPT_TOKENS,
                                 workspace=Workspace()), RandomWeights(), "mlp", SHAPE)
    num_tokens = MAX_ROWS // SHAPE.rule.num_chosen
    x_TD = torch.randn(PROMPT_TOKENS, SHAPE.hidden_size)
    layer(x_TD[:1].clone())  # what is loaded at the first call
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = peak_bytes()
    layer(x_TD[:num_tokens])
    chunk = peak_bytes() - before
    layer(x_TD)
    prompt = peak_bytes() - before
    return {"chunk_tokens": num_tokens, "chunk_bytes": chunk, "prompt_tokens": PROMPT_TOKENS, "prompt_bytes": prompt,
            "ratio": round(prompt / chunk, 4)}


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    print(json.dumps(measure()))
