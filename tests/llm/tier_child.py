"""Engines with every KV tier, for `test_tier_crash.py`: in its own process, and in children that are killed."""

from __future__ import annotations

from pathlib import Path

from xllm import LLM, SamplingParams
from xllm.kv import failpoints

BLOCK = 16
NUM_BLOCKS = 20  # of the device: one of the prompts below and its output, and little more
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
# Without a common beginning, so that each is served by its own blocks only.
STORED = [f"{i} = {i}\n" + f"def f{i}(a, b):\n    return a * {i} + b\n\n\n" * 4 for i in range(3)]
FRESH = [f"class C{i}:\n" + f"    def m{i}(self):\n        return self.x[{i}]\n\n" * 4 for i in range(3)]


def make_llm(folder: Path | None) -> LLM:
    tiers = {} if folder is None else {"host_cache_size": "4MiB", "disk_cache_size": "32MiB",
                                       "disk_cache_dir": str(folder)}
    return LLM(device="cpu", dtype="float32", block_size=BLOCK, num_kv_blocks=NUM_BLOCKS, max_model_len=256,
               max_num_seqs=2, num_threads=1, watermark=0.0, **tiers)


def answer(llm: LLM, prompts: list[str]) -> list:
    """One prompt after the other."""
    return [llm.generate(prompt, GREEDY, use_tqdm=False)[0] for prompt in prompts]


def main(folder: str, death: str) -> None:
    """What was stored is read, what is new is stored, and what has left the device comes back; `death` is a failpoint's
    on the way."""
    failpoints.arm_all(death)
    with make_llm(Path(folder)) as llm:
        for prompts in (STORED, FRESH, STORED, FRESH):
            answer(llm, prompts)
