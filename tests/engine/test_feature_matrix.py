"""The feature matrix: every pair of features on, and all of them, gives the plain output on every KV layout.

Plain output: the same weights, KV format and precision, block tables, one request at a time, every feature off. A
feature that is on must also be seen to work (a hit, a preemption, an accepted draft): else the pair proves nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import os
import tempfile
import time
from pathlib import Path

import pytest

from tests.adapters import write_adapter
from xllm import LLM, SamplingParams, StructuredOutput

_FOLDERS = contextlib.ExitStack()
atexit.register(_FOLDERS.close)
MAX_MODEL_LEN = 208
NUM_TOKENS = 40

FEATURES = ("overlap", "chunked", "prefix", "ngram", "preemption", "batch", "seeds", "int8", "w8a8", "tiers", "graph",
            "grammar", "lora", "kv8")
WEIGHTS = {"int8", "w8a8"}  # formats of weights: one of them at most
ROUNDED = {"w8a8", "kv8"}
# Those that decide where KV lies or who reads it when: on the xtensor layout all pairs of them run, of the others each
# with one of them. MATRIX_ALL=1 (`make nightly`): all pairs there, too.
ABOUT_KV = {"overlap", "chunked", "prefix", "ngram", "preemption", "tiers", "graph", "kv8"}

SHARED = "import os\nimport sys\n\n\ndef read_lines(path):\n    \"\"\"Return the lines of a file.\"\"\"\n"
LAYOUTS = {"paged": {}, "xtensor": {"kv_layout": "xtensor"},
           "xtensor-capped": {"kv_layout": "xtensor", "xtensor_max_mappings": 8}}
PROMPTS = [
    SHARED + "    with open(path) as file:\n",
    SHARED + "    return [line for line in",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "x = [1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2",
    SHARED,
    "def f(a, b):\n    return a + b\n\ndef f(a, b):\n    return a + b\n\ndef f(a, b):\n    return",
]
# One a prompt, none of which is complete before NUM_TOKENS tokens.
_ITEM = {"type": "object", "required": ["id", "name"], "additionalProperties": False,
         "properties": {"id": {"type": "integer", "minimum": 0, "maximum": 99}, "name": {"enum": ["ab", "cd"]}}}
GRAMMARS = [
    StructuredOutput(json={"type": "array", "items": _ITEM, "minItems": 20}),
    StructuredOutput(regex=r"(return [a-c]\n){60}"),
    StructuredOutput(grammar='start: line{50,60}\nline: "push(" /[a-z]{1,3}/ ")\\n"'),
    StructuredOutput(json={"type": "array", "items": {"enum": [1, 2, 3, 4]}, "minItems": 60}),
    None,
    StructuredOutput(choice=["def g():\n" * 30, "def h():\n" * 30]),
]
ADAPTERS = ["a", "", "b", "a", "", "b"]  # one a prompt


def settings_for(features: frozenset[str]) -> dict:
    """Engine settings that switch exactly these features on."""
    batch = "batch" in features or "preemption" in features
    return {
        "max_model_len": MAX_MODEL_LEN,
        "async_scheduling": "overlap" in features,
        "enable_chunked_prefill": True,
        "max_num_batched_tokens": 23 if "chunked" in features else 2048,
        "enable_prefix_caching": "prefix" in features or "tiers" in features,
        "speculative_method": "ngram" if "ngram" in features else None,
        "num_kv_blocks": 15 if "preemption" in features else 200,
        "watermark": 0.0,
        "max_num_seqs": 6 if batch else 1,
        "quantization": next(iter(WEIGHTS & features), None),
        "num_threads": 1,
        "graph_mode": "checked" if "graph" in features else "off",
        "kv_cache_dtype": "int8" if "kv8" in features else "auto",
        **({"host_cache_size": "16MiB", "disk_cache_size": "64MiB"} if "tiers" in features else {}),
    }


def sampling_for(features: frozenset[str]) -> list[SamplingParams]:
    """Greedy throughout, or a mix of seeded samplers with what makes logits depend on history; with a form or not."""
    extras = [{}, {"top_k": 8}, {"top_p": 0.8}, {"min_p": 0.05}, {"repetition_penalty": 1.2},
              {"presence_penalty": 0.5, "frequency_penalty": 0.3}]
    seeded = "seeds" in features
    return [SamplingParams(temperature=0.7 if seeded else 0, seed=i, max_tokens=NUM_TOKENS, structured=grammar,
                           ignore_eos=grammar is None, **(extra if seeded else {}))
            for i, (extra, grammar) in enumerate(zip(extras, grammars_for(features)))]


def grammars_for(features: frozenset[str]) -> list[StructuredOutput | None]:
    return GRAMMARS if "grammar" in features else [None] * len(PROMPTS)


def run(features: frozenset[str], layout: str = "paged") -> list[list[int]]:
    with contextlib.ExitStack() as stack:
        settings = settings_for(features) | LAYOUTS[layout]
        if "lora" in features:
            settings["lora_modules"] = adapters()
        if "tiers" in features:
            settings["disk_cache_dir"] = stack.enter_context(tempfile.TemporaryDirectory())
        llm = stack.enter_context(LLM(**settings))
        names = ADAPTERS if "lora" in features else [""] * len(PROMPTS)
        first = llm.generate(PROMPTS, sampling_for(features), use_tqdm=False, lora=names)
        if "tiers" in features:
            leave_only_the_lower_tiers(llm, keep_host="overlap" not in features)
        again = llm.generate(PROMPTS, sampling_for(features), use_tqdm=False, lora=names)  # with a warm cache
        if "tiers" in features:
            settle(llm)
        stats = llm.stats()
        assert stats.num_running == stats.num_waiting == 0
        assert stats.num_free_blocks == stats.num_blocks
        check_the_layout(llm, layout)
        check_the_cache(llm, "kv8" in features)
        first_ids, again_ids = ([list(o.outputs[0].token_ids) for o in outputs] for outputs in (first, again))
        check_the_form(llm, grammars_for(features), first_ids)
    check_that_it_worked(features, stats)
    assert_same(features, again_ids, first_ids)  # a warm cache changes nothing
    return first_ids


def assert_same(features: frozenset[str], found: list[list[int]], expected: list[list[int]]) -> None:
    """Token for token. Where activations or KV are rounded to codes a prompt or two may differ: sums in another order
    are other in the last bit, which now and then rounds a number to the next code, 2^-8 away."""
    if not features & ROUNDED:
        assert found == expected
        return
    assert sum(a != b for a, b in zip(found, expected, strict=True)) <= 2, (found, expected)


def settle(llm: LLM) -> None:
    """Let the moves between the tiers end."""
    while len(llm._core.scheduler.kv.source.moves):
        time.sleep(0.001)
        llm._core.tick()


def leave_only_the_lower_tiers(llm: LLM, *, keep_host: bool) -> None:
    """The next request finds nothing on the device: only in host memory, or only on disk."""
    settle(llm)
    kv = llm._core.scheduler.kv
    kv.pool.drop_cached()
    if not keep_host:
        kv.source.clear()
    kv.check_integrity()


def check_that_it_worked(features: frozenset[str], stats) -> None:
    assert (stats.prefix_hits_total > 0) == ("prefix" in features or "tiers" in features)
    if "tiers" in features:
        below = stats.cached_tokens_by_tier_total
        assert below["l4"] > 0 if "overlap" in features else below["l3"] > 0
        assert stats.kv_disk_up
    assert (stats.graphs is not None) == ("graph" in features)
    if stats.graphs is not None:
        assert sum(stats.graphs.replays_total.values()) > sum(stats.graphs.fallbacks_total.values())
        if "overlap" not in features or "ngram" not in features:
            assert (stats.graphs.fed_steps_total > 0) == ("overlap" in features)
        assert ("verify" in {kind.split("-")[0] for kind in stats.graphs.replays_total}) == ("ngram" in features)
        assert any("lora" in kind for kind in stats.graphs.replays_total) == ("lora" in features)
    assert (stats.preemptions_total > 0) == ("preemption" in features)
    assert (stats.spec_accepted_tokens_total > 0) == ("ngram" in features)


def check_the_form(llm: LLM, grammars: list[StructuredOutput | None], outputs: list[list[int]]) -> None:
    for grammar, token_ids in zip(grammars, outputs):
        assert len(token_ids) == NUM_TOKENS
        if grammar is not None:
            assert llm._core.grammars.store.matcher(grammar).validate_tokens(token_ids) == NUM_TOKENS


def check_the_layout(llm: LLM, layout: str) -> None:
    virtual = llm._core.runner.virtual_rows
    assert (virtual is not None) == (layout != "paged")
    if virtual is not None:
        virtual.xtensor.check_integrity()
        assert virtual.xtensor.counters.pages_mapped > 0
        assert (virtual.xtensor.counters.fallbacks > 0) == (layout == "xtensor-capped")


def check_the_cache(llm: LLM, quantised: bool) -> None:
    assert {cache.itemsize for pair in llm._core.runner.kv_cache.layers for cache in pair} == {1 if quantised else 4}


@functools.cache
def plain(what_changes_the_output: frozenset[str]) -> list[list[int]]:
    """One request at a time, every other feature off."""
    return run(what_changes_the_output)


def plain_for(features: frozenset[str]) -> list[list[int]]:
    return plain(features & WEIGHTS | features & {"seeds", "grammar", "lora", "kv8"})


@functools.cache
def adapters() -> tuple[str, ...]:
    """Written once; removed when the process ends."""
    folder = Path(_FOLDERS.enter_context(tempfile.TemporaryDirectory()))
    for seed, name in enumerate("ab"):
        write_adapter(folder / name, seed)
    return tuple(f"{name}={folder / name}" for name in "ab")


PAIRS = [frozenset(pair) for pair in itertools.combinations(FEATURES, 2) if set(pair) != WEIGHTS]
TRIPLES_WORTH_IT = [frozenset(t) for t in (("overlap", "ngram", "preemption"), ("chunked", "prefix", "preemption"),
                                           ("overlap", "prefix", "preemption"),
                                           ("overlap", "ngram", "grammar"), ("grammar", "ngram", "preemption"))]
MOST = frozenset(FEATURES) - WEIGHTS
EXACT = MOST - {"kv8"}
ALL = [MOST | {"int8"}, MOST | {"w8a8"}, EXACT | {"int8"}, EXACT, EXACT - {"seeds"}, EXACT - {"grammar"} | {"int8"}]


ON_XTENSOR = [pair for pair in PAIRS if os.environ.get("MATRIX_ALL") or pair <= ABOUT_KV or "prefix" in pair]


@pytest.mark.parametrize("features", PAIRS + TRIPLES_WORTH_IT + ALL, ids=lambda f: "+".join(sorted(f)))
def test_outputs_equal_plain_ones(features):
    assert_same(features, run(features), plain_for(features))


@pytest.mark.parametrize("features", ON_XTENSOR + TRIPLES_WORTH_IT + ALL, ids=lambda f: "+".join(sorted(f)))
def test_outputs_equal_plain_ones_on_xtensor(features):
    assert_same(features, run(features, "xtensor"), plain_for(features))


@pytest.mark.parametrize("features", ALL, ids=lambda f: "+".join(sorted(f)))
def test_with_sequences_in_fallback(features):
    assert_same(features, run(features, "xtensor-capped"), plain_for(features))
