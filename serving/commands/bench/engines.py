"""The engines that benchmarks measure, each in a process of its own: this one, and transformers.

A worker reads JSON lines on standard input and answers on standard output:
{"prompts": [[id, ...], ...], "max_tokens": [n, ...]} -> {"seconds": s, "num_tokens": n, "peak_gib": g}
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

Prompts = list[list[int]]


class BenchEngine(Protocol):
    """Greedy generation that ignores end tokens. One may have `settings`, what it chose itself, for the result."""

    def generate(self, prompts: Prompts, max_tokens: list[int]) -> int:
        """Generate exactly `max_tokens[i]` tokens for each prompt; returns how many in all."""
        ...


class XllmEngine:
    """This engine, by its Python API."""

    def __init__(self, folder: str, threads: int, quantization: str | None = None, kv_layout: str = "paged"):
        from xllm import LLM

        # Repetitions reuse their prompts; a prefix cache would make every one but the first a cache test.
        self._llm = LLM(folder, skip_tokenizer_init=True, num_threads=threads, max_model_len=2304, max_num_seqs=32,
                        quantization=quantization, enable_prefix_caching=False, kv_layout=kv_layout)

    def generate(self, prompts: Prompts, max_tokens: list[int]) -> int:
        from xllm import SamplingParams

        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for n in max_tokens]
        outputs = self._llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return sum(len(o.outputs[0].token_ids) for o in outputs)


class TransformersEngine:
    """`generate` with a padded static batch and its default dynamic cache. experts: how it computes those of a mixture;
    None: its own choice."""

    def __init__(self, folder: str, threads: int, experts: str | None = None):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                           experts_implementation=experts).eval()
        self.settings = {"experts_implementation": self._model.config._experts_implementation}

    def generate(self, prompts: Prompts, max_tokens: list[int]) -> int:
        torch, longest = self._torch, max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        new = max(max_tokens)
        with torch.inference_mode():
            out = self._model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new,
                                       min_new_tokens=new, pad_token_id=0)
        assert out.shape[1] == longest + new
        return sum(max_tokens)


class TransformersBatching:
    """transformers' own continuous batching, `generate_batch`."""

    def __init__(self, folder: str, threads: int):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                           attn_implementation="sdpa").eval()

    def generate(self, prompts: Prompts, max_tokens: list[int]) -> int:
        from transformers import GenerationConfig

        config = GenerationConfig(do_sample=False, max_new_tokens=max(max_tokens), eos_token_id=-1, pad_token_id=0)
        outputs = self._model.generate_batch(prompts, generation_config=config)
        return min(sum(max_tokens), sum(len(o.generated_tokens) for o in outputs.values()))


ENGINES: dict[str, Any] = {
    "xllm": XllmEngine,
    "xllm-w8a8": lambda folder, threads: XllmEngine(folder, threads, "w8a8"),
    "xllm-int8": lambda folder, threads: XllmEngine(folder, threads, "int8"),
    "xllm-xtensor": lambda folder, threads: XllmEngine(folder, threads, kv_layout="xtensor"),
    "transformers": TransformersEngine,
    "transformers-eager": lambda folder, threads: TransformersEngine(folder, threads, "eager"),
    "transformers-batched": lambda folder, threads: TransformersEngine(folder, threads, "batched_mm"),
    "transformers-batching": TransformersBatching,
}


@dataclass(frozen=True)
class EngineSet:
    """The engines that a benchmark has. module: its process runs one of `names`, as this module does for `OWN`.

    converters: of engines that do not read the checkpoint: what makes their files of it, given (checkpoint, new path).
    """

    module: str
    names: tuple[str, ...]
    converters: Mapping[str, Callable[[Path, Path], Path]] = field(default_factory=dict)

    def weights_for(self, name: str, checkpoint: Path, scratch: Path) -> Path:
        """The path that an engine loads: the checkpoint, or the same weights in the engine's own format."""
        return self.converters[name](checkpoint, scratch / name) if name in self.converters else checkpoint


OWN = EngineSet("serving.commands.bench.engines", tuple(ENGINES))


def worker(engines: Mapping[str, Any], name: str, folder: str, threads: int) -> None:
    """Load an engine, say so, and answer requests until standard input ends."""
    engine: BenchEngine = engines[name](folder, threads)
    _answer({"ready": True, "settings": getattr(engine, "settings", {})})
    for line in sys.stdin:
        request = json.loads(line)
        began = time.perf_counter()
        num_tokens = engine.generate(request["prompts"], request["max_tokens"])
        seconds = time.perf_counter() - began
        peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        _answer({"seconds": seconds, "num_tokens": num_tokens, "peak_gib": peak_kib / 2**20})


def _answer(message: dict[str, Any]) -> None:
    print("ANSWER " + json.dumps(message), flush=True)  # libraries print to standard output as well


if __name__ == "__main__":
    worker(ENGINES, sys.argv[1], sys.argv[2], int(sys.argv[3]))
