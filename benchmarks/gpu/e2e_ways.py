"""The ways in which a token can be computed, each with what transformers must do to compute the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from backends.reference.kv_codes import QUANTISED
from benchmarks.gpu.device import Device
from xllm.request import OutputDelta
from xllm.stats import EngineStats

Proof = Callable[[EngineStats, list[list[OutputDelta]]], bool]
TOLERANCE = 2e-3  # of a log-probability
# Where numbers are rounded to few codes, a small error before may make one of them the next one. What such rounding
# changes at all is 0.2 to 1 at most; where each step rounds anew, the difference is judged by its root mean square.
CODES_TOLERANCE, DYNAMIC_TOLERANCE = 5e-2, 0.15


@dataclass(frozen=True, kw_only=True)
class Way:
    """settings: of the engine. logprobs: ask for them (graphs then end with logits, not with tokens). happened: that
    what it is about took place. waves: the requests are sent that many times, one after the other is done. crowded:
    they fill their first blocks all at the same time.

    kv_format, quantization: what transformers rounds as the engine is to. adapters: that many, of which requests take
    turns, with none after the last. structured: each output is letters, as a grammar says. absent: why it cannot be;
    may_refuse: a ConfigError of the engine says that as well."""

    settings: dict[str, Any] = field(default_factory=dict)
    logprobs: bool = True
    prompt_logprobs: bool = False
    shuffled: bool = False
    crowded: bool = False
    waves: int = 1
    happened: Proof = lambda stats, outputs: True
    kv_format: str | None = None
    quantization: str | None = None
    adapters: int = 0
    structured: bool = False
    absent: str = ""
    may_refuse: bool = False

    @property
    def tolerance(self) -> float:
        """Of a log-probability; a weight's codes are the same for all."""
        if self.typical:
            return DYNAMIC_TOLERANCE
        return CODES_TOLERANCE if self.kv_format else TOLERANCE

    @property
    def typical(self) -> bool:
        return self.quantization == "w8a8"


def replayed(kind: str) -> Proof:
    return lambda stats, _: stats.graphs is not None and any(kind in key for key in stats.graphs.replays_total)


def cached(stats: EngineStats, outputs: list[list[OutputDelta]]) -> bool:
    return stats.cached_prompt_tokens_total > 0


PLAIN = {"graph_mode": "off", "async_scheduling": False, "enable_prefix_caching": False}
OVERLAP = {"async_scheduling": True}


def graphs_on(device: Device) -> dict[str, Any]:
    """On a CPU the capturer that checks stands in for graphs."""
    return {**PLAIN, "graph_mode": "auto" if device.is_cuda else "checked"}


def ways(device: Device, block_size: int) -> dict[str, Way]:
    """By name: those of every family."""
    graphs = graphs_on(device)
    found = {
        "paged": Way(settings=PLAIN, prompt_logprobs=True),
        "tokens only": Way(settings=PLAIN, logprobs=False),
        "chunked": Way(settings={**PLAIN, "max_num_batched_tokens": 19}, prompt_logprobs=True),
        "prefix-cached": Way(settings={**PLAIN, "enable_prefix_caching": True}, waves=2, happened=cached),
        "preempted": Way(settings={**PLAIN, "num_kv_blocks": 8, "watermark": 0.0, "max_model_len": 4 * block_size},
                         crowded=True, happened=lambda stats, _: stats.preemptions_total > 0),
        "overlapped": Way(settings={**PLAIN, **OVERLAP}),
        "graphs": Way(settings=graphs, logprobs=False, happened=replayed("tokens")),
        "graphs, logits": Way(settings=graphs, happened=replayed("logits")),
        "graphs, overlapped": Way(settings={**graphs, **OVERLAP}, logprobs=False, happened=replayed("tokens")),
        "graphs, prefill": Way(settings={**graphs, "graph_max_prefill_tokens": 64, "max_num_batched_tokens": 64},
                               happened=replayed("mixed")),
        "all, shuffled": Way(settings={**graphs, **OVERLAP, "enable_prefix_caching": True,
                                       "max_num_batched_tokens": 40}, shuffled=True, waves=2, happened=cached),
    }  # fmt: skip
    if device.backend.vmm is not None:
        found["xtensor"] = Way(settings={**PLAIN, "kv_layout": "xtensor"})
    return found


def more_ways(device: Device) -> dict[str, Way]:
    """Those of one family: other numbers, adapters, grammars."""
    found, everything = {}, {**graphs_on(device), **OVERLAP, "enable_prefix_caching": True}
    for format in QUANTISED.values():
        over = {"kv_cache_dtype": format}
        found[f"kv {format}"] = Way(settings={**PLAIN, **over}, prompt_logprobs=True, kv_format=format, may_refuse=True)
        found[f"kv {format}, all"] = Way(settings={**everything, **over}, waves=2, happened=cached, kv_format=format,
                                         may_refuse=True)  # fmt: skip
    for name in ("int8", "fp8", "w8a8"):
        found[f"weights {name}"] = Way(settings={**PLAIN, "quantization": name}, quantization=name, may_refuse=True)
    found["adapters"] = Way(settings={**PLAIN, "enable_lora": True}, adapters=2, prompt_logprobs=True)
    found["adapters, all"] = Way(settings={**everything, "enable_lora": True}, adapters=2, waves=2, happened=cached)
    why = "" if find_spec("llguidance") else "the package llguidance is not installed"
    found["structured"] = Way(settings={**PLAIN, **OVERLAP, "skip_tokenizer_init": False}, structured=True,
                              logprobs=False, absent=why)  # fmt: skip
    return found
