"""The engines that `xllm bench throughput` compares, each in a process of its own.

A worker reads JSON lines on standard input and answers on standard output:
{"prompts": [[id, ...], ...], "max_tokens": [n, ...]} -> {"seconds": s, "num_tokens": n, "peak_gib": g}
"""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any, Protocol

Prompts = list[list[int]]


class Engine(Protocol):
    """Greedy generation that ignores end tokens."""

    def generate(self, prompts: Prompts, max_tokens: list[int]) -> int:
        """Generate exactly `max_tokens[i]` tokens for each prompt; returns how many in all."""
        ...


class XllmEngine:
    """This engine, by its Python API."""

    def __init__(self, folder: str, threads: int, quantization: str | None = None):
        from xllm import LLM

        # Repetitions reuse their prompts; a prefix cache would make every one but the first a cache test.
        self._llm = LLM(folder, skip_tokenizer_init=True, num_threads=threads, max_model_len=2304, max_num_seqs=32,
                        quantization=quantization, enable_prefix_caching=False)

    def generate(self, prompts: Prompts, max_tokens: list[int]) -> int:
        from xllm import SamplingParams

        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for n in max_tokens]
        outputs = self._llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return sum(len(o.outputs[0].token_ids) for o in outputs)


class TransformersEngine:
    """`generate` with a padded static batch and its default dynamic cache."""

    def __init__(self, folder: str, threads: int):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

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


class VllmEngine:
    """vLLM's offline API, where it is installed."""

    def __init__(self, folder: str, threads: int):
        from vllm import LLM  # type: ignore[import-not-found]

        self._llm = LLM(folder, skip_tokenizer_init=True, dtype="float32", max_model_len=2304, max_num_seqs=32,
                        enable_prefix_caching=False)

    def generate(self, prompts: Prompts, max_tokens: list[int]) -> int:
        from vllm import SamplingParams

        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for n in max_tokens]
        outputs = self._llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return sum(len(o.outputs[0].token_ids) for o in outputs)


ENGINES: dict[str, Any] = {
    "xllm": XllmEngine,
    "xllm-int8": lambda folder, threads: XllmEngine(folder, threads, "int8"),
    "transformers": TransformersEngine,
    "transformers-batching": TransformersBatching,
    "vllm": VllmEngine,
}


def worker(name: str, folder: str, threads: int) -> None:
    """Load an engine, say so, and answer requests until standard input ends."""
    engine: Engine = ENGINES[name](folder, threads)
    _answer({"ready": True})
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
    worker(sys.argv[1], sys.argv[2], int(sys.argv[3]))
