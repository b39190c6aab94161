"""What is known of an OpenAI server: by its `/v1/models` and `/metrics`, and by the model's files on this machine."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xllm.config import EngineConfig
from xllm.engine.facts import EngineFacts
from xllm.errors import EngineDeadError, ModelError
from xllm.hub import resolve_model_path
from xllm.model_files import is_there, read_json
from xllm.stats import EngineStats

BLOCK_SIZE = 16  # vLLM's default on GPUs, where a server does not say
# KV blocks of a server that does not say: more than any has, so that memory decides nothing.
MANY_BLOCKS = 2**20
# vLLM's names and ours, which are the same but for the prefix.
_GAUGES = {"num_requests_running": "num_running", "num_requests_waiting": "num_waiting"}
_COUNTERS = {"prompt_tokens_total": "prompt_tokens_total", "generation_tokens_total": "generation_tokens_total",
             "num_preemptions_total": "preemptions_total", "prefix_cache_queries_total": "prefix_queries_total",
             "prefix_cache_hits_total": "prefix_hits_total", "prompt_tokens_cached_total": "cached_prompt_tokens_total",
             "iteration_tokens_total_count": "num_steps"}
_USAGE, _INFO = "kv_cache_usage_perc", "cache_config_info"
_STARTED = ("process_start_time_seconds", "prompt_tokens_created")
_SERIES = re.compile(r"^(?:(vllm|xllm):)?(" + "|".join((*_GAUGES, *_COUNTERS, _USAGE, _INFO, *_STARTED))
                     + r")(?:\{(.*)\})? (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What `/v1/models` says of the model. names: that requests may use, at least one. root: vLLM's name for its folder
    or its id on the Hub."""

    names: tuple[str, ...]
    root: str
    max_model_len: int


@dataclass(frozen=True, slots=True)
class ServerMetrics:
    """stats: what its series say, of all its engines together. started_unix_s: of the process; 0: it does not say."""

    stats: EngineStats
    block_size: int | None
    num_blocks: int
    started_unix_s: float


def read_card(models: Any) -> ModelCard:
    """The first model that is no adapter, with its other names. Raises EngineDeadError: there is none, or its length is
    not told."""
    found = models.get("data") if isinstance(models, dict) else None
    cards = [card for card in (found if isinstance(found, list) else ())
             if isinstance(card, dict) and isinstance(card.get("id"), str) and not card.get("parent")]
    if not cards:
        raise EngineDeadError("its /v1/models names no model")
    first, longest = cards[0], cards[0].get("max_model_len")
    if type(longest) is not int or longest < 2:
        raise EngineDeadError(f"its /v1/models does not say max_model_len of {first['id']}")
    names = tuple(card["id"] for card in cards if card.get("root") == first.get("root"))
    return ModelCard(names, str(first.get("root") or first["id"]), longest)


def read_metrics(text: str) -> ServerMetrics:
    """Of the text of `/metrics`. What is not there is 0, or None."""
    sums, usages, sizes, num_blocks = dict[str, float](), list[float](), list[int](), 0
    series = _SERIES.findall(text)
    others = "xllm" if any(prefix == "vllm" for prefix, *_ in series) else "vllm"  # ours may have both names
    for prefix, name, labels, value in series:
        if prefix == others:
            continue
        if name == _USAGE:
            usages.append(float(value))
        elif name == _INFO:
            facts = dict(_LABEL.findall(labels))
            sizes += [int(facts["block_size"])] if facts.get("block_size", "").isdecimal() else []
            num_blocks += int(facts["num_gpu_blocks"]) if facts.get("num_gpu_blocks", "").isdecimal() else 0
        elif name in _STARTED:
            sums[name] = max(sums.get(name, 0.0), float(value))
        else:
            sums[name] = sums.get(name, 0.0) + float(value)
    usage = sum(usages) / len(usages) if usages else 0.0
    stats = EngineStats(kv_usage=usage, num_blocks=num_blocks, num_free_blocks=round(num_blocks * (1.0 - usage)))
    for name, field in (_GAUGES | _COUNTERS).items():
        setattr(stats, field, int(sums.get(name, 0.0)))
    return ServerMetrics(stats, sizes[0] if sizes else None, num_blocks,
                         next((sums[name] for name in _STARTED if name in sums), 0.0))


def read_facts(card: ModelCard, metrics: ServerMetrics, tokenizer_path: str | None) -> EngineFacts:
    """As if the server had told them. tokenizer_path: where the model's config.json is; None: where the server has it.

    Raises EngineDeadError: it is not on this machine, or does not say what is needed.
    """
    if tokenizer_path is None and not Path(card.root).is_dir():
        raise EngineDeadError(f"its model, {card.root}, is no folder on this machine: --tokenizer-path says where its "
                              "tokenizer is")
    try:
        folder = resolve_model_path(tokenizer_path or card.root)
        whole = read_json(folder / "config.json")
        generation = read_json(folder / "generation_config.json") if is_there(folder / "generation_config.json") else {}
    except ModelError as error:
        raise EngineDeadError(str(error)) from None
    text = whole.get("text_config") or whole
    vocab_size, hidden_size = text.get("vocab_size"), text.get("hidden_size")
    if type(vocab_size) is not int or type(hidden_size) is not int:
        raise EngineDeadError(f"{folder / 'config.json'} does not say vocab_size and hidden_size")
    ends = [*_ids(generation.get("eos_token_id")), *_ids(text.get("eos_token_id"))]
    config = EngineConfig.from_flat(model=str(folder), max_model_len=card.max_model_len,
                                    block_size=metrics.block_size or BLOCK_SIZE)
    return EngineFacts(
        config=config, model_path=str(folder), vocab_size=vocab_size, hidden_size=hidden_size,
        eos_token_ids=tuple(dict.fromkeys(one for one in ends if one < vocab_size)),
        num_blocks=metrics.num_blocks or MANY_BLOCKS)


def _ids(value: Any) -> list[int]:
    return [one for one in (value if isinstance(value, list) else [value]) if type(one) is int and one >= 0]
