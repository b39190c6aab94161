"""Whole steps on a real tiny model: whatever the plan looks like, a sequence gets what it would get alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.runner.harness import BLOCK_SIZE, GREEDY, MAX_MODEL_LEN, Driver
from tests.runner.tiny_model import NUM_NEW_TOKENS, PROMPT, Truth
from xllm.request import SamplingParams
from xllm.runner import sampler
from xllm.step import ScheduleOutput

MakeDriver = Callable[..., Driver]
SEEDED = SamplingParams(temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, max_tokens=None)
OTHER_PROMPTS = {"one": [7], "block": list(range(8)), "nine": list(range(40, 49)),
                 "long": [3 * i % 199 for i in range(50)]}


@pytest.mark.parametrize("chunk", [37, 1, 5, 8, 36], ids=lambda n: f"chunk-{n}")
def test_greedy_equals_transformers(make_driver: MakeDriver, truth: Truth, chunk: int) -> None:
    driver = make_driver()
    driver.add("a", PROMPT)
    for start in range(0, len(PROMPT), chunk):
        output = driver.step({"a": min(chunk, len(PROMPT) - start)})
        assert output.num_sampled_S.tolist() == [int(start + chunk >= len(PROMPT))]
    assert driver.generate("a", NUM_NEW_TOKENS) == truth.tokens


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_batch_does_not_matter(make_driver: MakeDriver, sampling: SamplingParams) -> None:
    """Sequences that join one by one, prefill among decodes, each as if alone."""
    alone = make_driver()
    expected = {}
    for seed, (name, prompt) in enumerate(OTHER_PROMPTS.items()):
        alone.add(name, prompt, sampling, seed=seed)
        expected[name] = alone.generate(name, 20)
        alone.remove(name)
    together = make_driver()
    for seed, (name, prompt) in enumerate(OTHER_PROMPTS.items()):
        together.add(name, prompt, sampling, seed=seed)
        together.step()
        together.step()
    for _ in range(20):
        together.step(dict.fromkeys(["long", "one", "nine", "block"], 0))
    assert {name: seq.output[:20] for name, seq in together.seqs.items()} == expected


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_preemption_does_not_matter(make_driver: MakeDriver, sampling: SamplingParams) -> None:
    calm, disturbed = make_driver(), make_driver()
    calm.add("a", PROMPT, sampling, seed=11)
    disturbed.add("a", PROMPT, sampling, seed=11)
    disturbed.generate("a", 9)
    seq = disturbed.remove("a")
    disturbed.add("other", PROMPT[::-1], SEEDED)  # takes the row and the blocks
    disturbed.step()
    disturbed.add("a", seq.tokens, sampling, seed=11, num_prompt=len(PROMPT))
    disturbed.step({"a": 20, "other": 0})
    assert disturbed.generate("a", 30) == calm.generate("a", 30)


def test_prefix_hit_and_copied_blocks(make_driver: MakeDriver, truth: Truth) -> None:
    """Two full blocks are shared as they are; the third is copied before this row writes on in it."""
    driver = make_driver()
    first = driver.add("first", PROMPT)
    driver.generate("first", 3)
    copied = driver.free_blocks.pop()
    driver.copies.append((first.blocks[2], copied))
    driver.add("second", PROMPT, num_computed=2 * BLOCK_SIZE + 5, blocks=[*first.blocks[:2], copied])
    driver.step()
    assert driver.generate("second", 20) == truth.tokens[:20]
    assert driver.generate("first", 20) == truth.tokens[:20]


def test_replaced_blocks(make_driver: MakeDriver, truth: Truth) -> None:
    """A block table entry moves to a block with the same contents; the old block may be overwritten."""
    driver = make_driver()
    a = driver.add("a", PROMPT)
    b = driver.add("b", PROMPT)
    driver.step()
    none, tables = np.zeros(0, dtype=np.int32), driver.runner.rows.block_table
    driver.runner.run(ScheduleOutput(
        step=0, rows_S=none, num_tokens_S=none, max_drafts_S=none, samples_S=none.astype(bool),
        replace_rows_C=np.array([b.row, b.row], np.int32), replace_places_C=np.array([0, 3], np.int32),
        replace_ids_C=np.array([a.blocks[0], a.blocks[3]], np.int32)))
    assert tables[b.row, :4].tolist() == [a.blocks[0], b.blocks[1], b.blocks[2], a.blocks[3]]
    for k_cache, v_cache in driver.runner.kv_cache.layers:
        k_cache[[b.blocks[0], b.blocks[3]]] = 1e3
        v_cache[[b.blocks[0], b.blocks[3]]] = 1e3
    assert driver.generate("b", 20) == truth.tokens[:20]


def test_step_without_rows_updates_the_rows(make_driver: MakeDriver) -> None:
    driver = make_driver()
    driver.add("a", PROMPT)
    driver.step({"a": 5})
    row = driver.remove("a").row
    output = driver.step({})
    assert output.num_sampled_S.shape == (0,)
    assert output.token_ids_SR.shape[0] == 0
    assert driver.runner.rows.sampling[row] is None


def test_up_to_the_last_position(make_driver: MakeDriver) -> None:
    """A sequence may fill max_model_len; an overlapped step may even sample one token more."""
    driver = make_driver()
    driver.add("a", PROMPT)
    assert len(driver.generate("a", MAX_MODEL_LEN - len(PROMPT) + 1)) == MAX_MODEL_LEN - len(PROMPT) + 1


@pytest.mark.parametrize("limit_bytes", [1, 3 * 4 * 211], ids=["slices-of-1", "slices-of-3"])
def test_slicing_the_logits_does_not_matter(make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch,
                                            limit_bytes: int) -> None:
    sampling = SamplingParams(temperature=0.8, logprobs=2, presence_penalty=0.5, max_tokens=None)
    results = []
    for _ in range(2):
        driver = make_driver()
        for seed, (name, prompt) in enumerate(OTHER_PROMPTS.items()):
            driver.add(name, prompt, sampling if seed % 2 else GREEDY, seed=seed)
        for _ in range(4):
            driver.step()
        results.append([(seq.output, [entry.token_id for entry in seq.logprobs]) for seq in driver.seqs.values()])
        monkeypatch.setattr(sampler, "SAMPLE_LOGITS_BYTES", limit_bytes)
    assert results[0] == results[1]
    assert [len(logprobs) for _, logprobs in results[0]] == [0, 4, 0, 4]


@pytest.mark.parametrize("max_drafts", [0, 3])
def test_logits_that_are_not_finite_fail_one_row_only(make_driver: MakeDriver, max_drafts: int) -> None:
    """Poison the KV of one row: it fails, the others go on as before, and it can be stepped once more."""
    settings = {"speculative_method": "ngram"} if max_drafts else {}
    clean, poisoned = make_driver(**settings), make_driver(**settings)
    for driver in (clean, poisoned):
        for name, prompt in OTHER_PROMPTS.items():
            driver.add(name, prompt, SEEDED if name == "one" else GREEDY)
        driver.step(max_drafts=max_drafts)
    victim = poisoned.seqs["nine"]
    poisoned.runner.kv_cache.layers[1][1][victim.blocks[0]] = float("nan")
    before = list(victim.output)
    clean.step(max_drafts=max_drafts)
    output = poisoned.step(max_drafts=max_drafts)
    assert output.failed == {2: "the model's logits are not finite"}
    assert victim.output == before
    others = ("one", "block", "long")
    assert [poisoned.seqs[n].output for n in others] == [clean.seqs[n].output for n in others]
    plan_ahead = ScheduleOutput(step=9, rows_S=np.array([victim.row], np.int32), num_tokens_S=np.ones(1, np.int32),
                                max_drafts_S=np.zeros(1, np.int32), samples_S=np.ones(1, bool))
    assert list(poisoned.runner.run(plan_ahead).failed) == [0]
    poisoned.remove("nine")
    clean.remove("nine")
    assert poisoned.generate("long", 12) == clean.generate("long", 12)


def test_infinite_logits_fail(make_driver: MakeDriver) -> None:
    driver = make_driver()
    driver.add("a", PROMPT)
    honest = driver.runner._model

    class Overflowing:
        config = honest.config
        forward = honest.forward

        def compute_logits(self, hidden_SD: torch.Tensor) -> torch.Tensor:
            logits_SV = honest.compute_logits(hidden_SD)
            logits_SV[:, 5] = float("inf")
            return logits_SV

    driver.runner._model = Overflowing()
    assert list(driver.step().failed) == [0]
