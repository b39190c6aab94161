"""Sequences shorter and longer than host memory through a whole engine: on disk at the end, found by the next one."""

from __future__ import annotations

from pathlib import Path

import pytest

from xllm import LLM, SamplingParams

NUM_HOST_BLOCKS, BLOCK = 12, 16


def prompt(number: int, num_blocks: int) -> dict[str, list[int]]:
    return {"prompt_token_ids": [(7 * number + 3 * k * k + k) % 900 + 5 for k in range(num_blocks * BLOCK + 1)]}


def make_llm(folder: Path, **settings: object) -> LLM:
    return LLM(num_kv_blocks=160, host_blocks_factor=NUM_HOST_BLOCKS / 160, max_model_len=2048, max_num_seqs=4,
               disk_cache_size="256MiB", disk_cache_dir=str(folder), skip_tokenizer_init=True, **settings)


def run(llm: LLM, prompts: list[dict[str, list[int]]]) -> list[tuple[list[int], int]]:
    """(tokens, cached tokens) of each."""
    done = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True), use_tqdm=False)
    return [(list(output.outputs[0].token_ids), output.num_cached_tokens or 0) for output in done]


@pytest.mark.parametrize("worker", ["inline", "thread"])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.9, 1.0, 2.0, 5.0])
def test_the_next_engine_finds_all_of_it(tmp_path: Path, ratio: float, worker: str) -> None:
    num = round(ratio * NUM_HOST_BLOCKS)
    prompts = [prompt(number, num) for number in range(2)]
    with make_llm(tmp_path, worker=worker) as llm:
        first = run(llm, prompts)
        assert llm._core.stats().kv_tiers["host"].num_blocks == NUM_HOST_BLOCKS
    with make_llm(tmp_path, worker=worker) as llm:
        assert llm._core.stats().kv_tiers["disk"].num_used == 2 * num
        found = [run(llm, [each])[0] for each in prompts]  # one after the other
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in first]
    assert [cached for _, cached in found] == [num * BLOCK] * 2
    with make_llm(tmp_path, worker=worker) as llm:
        assert run(llm, prompts)[0][0] == first[0][0]  # both at once
