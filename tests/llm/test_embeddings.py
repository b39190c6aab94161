"""Embeddings equal those that transformers gives, however the prompt was cut, cached, batched or preempted."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from xllm import LLM, PoolingParams, SamplingParams
from xllm.errors import RequestError
from xllm.pooling import KINDS

TEXTS = ["def add(a, b):\n    return a + b\n", "x", "import os\nimport sys\n\n\nclass Reader:\n    pass\n",
         "def add(a, b):\n    return a - b\n" * 6]
POOLED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "last": lambda h_TD: h_TD[-1], "cls": lambda h_TD: h_TD[0], "mean": lambda h_TD: h_TD.mean(0),
    "max": lambda h_TD: h_TD.max(0), "mean_sqrt_len_tokens": lambda h_TD: h_TD.sum(0) / len(h_TD)**0.5,
    "weightedmean": lambda h_TD: np.average(h_TD, axis=0, weights=np.arange(1, len(h_TD) + 1)),
}
SETTINGS = {
    "plain": {}, "chunked": {"max_num_batched_tokens": 7}, "prefix": {"enable_prefix_caching": True},
    "xtensor": {"kv_layout": "xtensor"}, "ngram": {"speculative_method": "ngram"},
    "graph": {"graph_mode": "checked", "graph_max_prefill_tokens": 64},
    "small": {"num_kv_blocks": 15, "watermark": 0.0},
}


@pytest.fixture(scope="module")
def hidden() -> list[np.ndarray]:
    """The last hidden states of every text, by transformers."""
    from xllm.hub import resolve_model_path

    path = resolve_model_path(None)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with LLM(max_model_len=128, num_threads=1) as llm:
        ids = [output.prompt_token_ids for output in llm.embed(TEXTS)]
    with torch.inference_mode():
        return [model.model(torch.tensor([tokens])).last_hidden_state[0].double().numpy() for tokens in ids]


def expected(hidden_TD: np.ndarray, params: PoolingParams) -> np.ndarray:
    vector = POOLED[params.kind or "last"](hidden_TD)[:params.dimensions]
    return vector if params.normalize is False else vector / np.linalg.norm(vector)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("params", [PoolingParams(), *(PoolingParams(kind=kind, normalize=False) for kind in KINDS),
                                    PoolingParams(kind="mean", dimensions=24)], ids=str)
def test_embeddings_equal_transformers(hidden: list[np.ndarray], name: str, params: PoolingParams) -> None:
    with LLM(max_model_len=128, num_threads=1, **SETTINGS[name]) as llm:
        first, again = (llm.embed(TEXTS, params) for _ in range(2))
        stats = llm.stats()
    for outputs in (first, again):
        for output, states in zip(outputs, hidden, strict=True):
            np.testing.assert_allclose(output.embedding, expected(states, params), atol=2e-5, rtol=1e-4)
    if name == "prefix":
        assert (stats.prefix_hits_total > 0) == (params.kind in (None, "last"))
    assert stats.num_free_blocks == stats.num_blocks


def test_beside_requests_that_generate(hidden: list[np.ndarray]) -> None:
    with LLM(max_model_len=128, num_threads=1, max_num_batched_tokens=16) as llm:
        core = llm._core
        sources = [llm._inputs.process("t", TEXTS[0], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))]
        one = SamplingParams(max_tokens=1)
        sources += [llm._inputs.process(f"e{i}", text, one, pooling=PoolingParams(kind="mean"))
                    for i, text in enumerate(TEXTS)]
        for source in sources:
            core.add(source.requests[0])
        found, num_tokens = {}, 0
        while core.has_work():
            for delta in core.step():
                num_tokens += len(delta.token_ids)
                if delta.embedding is not None:
                    found[delta.request_id[:2]] = delta.embedding
    assert num_tokens == 20 + len(TEXTS)
    for i, states in enumerate(hidden):
        np.testing.assert_allclose(found[f"e{i}"], expected(states, PoolingParams(kind="mean")), atol=2e-5)


def test_what_cannot_be_had_is_refused_by_name() -> None:
    with pytest.raises(RequestError, match="last, cls, mean"):
        PoolingParams(kind="median")
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(RequestError, match="dimensions"):
            PoolingParams(dimensions=wrong)
    with LLM(max_model_len=64, num_threads=1) as llm:
        with pytest.raises(RequestError, match="dimensions: the model's embeddings have"):
            llm.embed("x", PoolingParams(dimensions=10**6))
        assert len(llm.embed("x", PoolingParams(dimensions=2))[0].embedding) == 2
