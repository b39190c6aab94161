"""The feature matrix: whatever features are on, whichever way leads to the worker and however KV lies, the output is
the plain one.

Plain output: the same weights, KV format and precision, block tables, one request at a time, every feature off, in the
same thread. A feature that is on must also be seen to work (a hit, a preemption, an accepted draft): else the row
proves nothing.

The rows are a covering array (`covering.py`): any STRENGTH values of different columns meet in one of them, fewer
on SHARED_WAY. A feature is a word in FEATURES, a way a line in WAYS, a
layout a line in LAYOUTS, a model a line in `matrix_models.py`; what cannot be in one row goes into EXCLUSIONS.
`make nightly` (MATRIX_ALL=1) also runs every feature and every pair of features alone, each way and on each layout.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from llguidance import LLTokenizer

from tests.engine.covering import covering_rows
from tests.engine.matrix_engines import hear_from_ranks, leave_only_the_lower_tiers, settle, split
from tests.engine.matrix_models import BUNDLED, MODELS, adapters, model_folder
from tests.worker.pool import fork_rank
from xllm import LLM, SamplingParams, StructuredOutput
from xllm.models.adapter_layers import AdapterLayers, read_layers
from xllm.stats import EngineStats
from xllm.structured.checker import GrammarChecker
from xllm.structured.grammar import build_matcher, grammar_text
from xllm.structured.token_trie import VocabularySource, vocabulary_source
from xllm.text.tokenizer import load_tokenizer

MATRIX_ALL = bool(os.environ.get("MATRIX_ALL"))
MAX_MODEL_LEN = 208
NUM_TOKENS = 40

# Off or on. Overlapped steps are no feature of their own: they are what some WAYS do.
FEATURES = ("chunked", "prefix", "ngram", "preemption", "batch", "seeds", "int8", "w8a8", "tiers", "graph", "grammar",
            "lora", "kv8")
WEIGHTS = {"int8", "w8a8"}  # formats of weights: one of them at most
ROUNDED = {"w8a8", "kv8"}
CHANGES_THE_OUTPUT = WEIGHTS | {"seeds", "grammar", "lora", "kv8"}


@dataclass(frozen=True)
class Way:
    """How the engine reaches the worker. overlaps: a step is scheduled while the one before runs. in_process: the
    worker's runner is an object of this process, into which a check may look."""

    settings: Mapping[str, Any]
    overlaps: bool
    in_process: bool = True


WAYS = {
    "inline": Way({"async_scheduling": False}, overlaps=False),
    "thread": Way({"async_scheduling": True}, overlaps=True),
    "codec": Way({"worker": "codec", "async_scheduling": True}, overlaps=True),
    # Two ranks that compute the same, and with XLLM_CHECK the engine compares all that they compute.
    "processes": Way({"worker": "processes", "worker_ranks": 2, "async_scheduling": True}, overlaps=True,
                     in_process=False),
    # Two ranks that share the model: each holds half the heads, and what differs are the tokens, if anything.
    "tp2": Way({"tensor_parallel_size": 2, "async_scheduling": True}, overlaps=True, in_process=False),
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "paged": {}, "xtensor": {"kv_layout": "xtensor"},
    "xtensor-capped": {"kv_layout": "xtensor", "xtensor_max_mappings": 8},
}
COLUMNS = {**dict.fromkeys(FEATURES, ("off", "on")), "way": tuple(WAYS), "layout": tuple(LAYOUTS),
           "model": MODELS}
EXCLUSIONS = [
    {"int8": "on", "w8a8": "on"},
    {"layout": "xtensor-capped", "batch": "off", "preemption": "off"},  # one sequence needs few mappings
    # Sums of parts are other in the last bit in every step, which rounds a number to the next code here and there:
    # logits move by up to 0.1, and draws with them, of 3 or 4 prompts in 6. Greedy, of one or two.
    {"way": "tp2", "w8a8": "on", "seeds": "on"},
]
# Pairs of features meet on every layout, in every way and with every model, as they did when each had a test of its
# own: 50 rows. With 2 there would be 15.
STRENGTH = 3
# Two ranks take turns at the same cores and wait for each other twice a layer, so rows of theirs take long: only what
# is a pair with that way meets, and pairs of features on it in `make nightly`.
SHARED_WAY = "tp2"


@dataclass(frozen=True)
class Case:
    """A row: the features that are on, the way to the worker, the KV layout, the model. is_split: one engine computes
    prompts, and another one, which gets their KV, goes on."""

    features: frozenset[str]
    way: str = "inline"
    layout: str = "paged"
    model: str = "bundled"
    is_split: bool = False

    def __str__(self) -> str:
        split = "split:" if self.is_split else ""
        return f"{split}{'+'.join(sorted(self.features)) or 'plain'}@{self.way}@{self.layout}@{self.model}"

    @property
    def overlaps(self) -> bool:
        return WAYS[self.way].overlaps


def is_possible(case: Case) -> bool:
    """Whether no exclusion is about it."""
    values = {**{name: "on" if name in case.features else "off" for name in FEATURES},
              "way": case.way, "layout": case.layout, "model": case.model}
    return not any(excluded.items() <= values.items() for excluded in EXCLUSIONS)


SHARED = "import os\nimport sys\n\n\ndef read_lines(path):\n    \"\"\"Return the lines of a file.\"\"\"\n"
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


def settings_for(case: Case) -> dict[str, Any]:
    """Engine settings that switch exactly these features on."""
    features = case.features
    batch = "batch" in features or "preemption" in features
    return {
        "model": str(model_folder(case.model)),
        "max_model_len": MAX_MODEL_LEN,
        "enable_chunked_prefill": True,
        "max_num_batched_tokens": 23 if "chunked" in features else 2048,
        "enable_prefix_caching": "prefix" in features or "tiers" in features or case.is_split,
        "speculative_method": "ngram" if "ngram" in features else None,
        "num_kv_blocks": 15 if "preemption" in features else 200,
        "watermark": 0.0,
        "max_num_seqs": 6 if batch else 1,
        "quantization": next(iter(WEIGHTS & features), None),
        "num_threads": 1,
        "graph_mode": "checked" if "graph" in features else "off",
        "kv_cache_dtype": "int8" if "kv8" in features else "auto",
        **({"host_cache_size": "16MiB", "disk_cache_size": "64MiB"} if "tiers" in features else {}),
        **({"enable_disagg_pd": True} if case.is_split else {}),
        **WAYS[case.way].settings,
        **LAYOUTS[case.layout],
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


def run(case: Case, *, twice: bool = True) -> list[list[int]]:
    """twice: the second time with what the first has left in the cache."""
    features = case.features
    with contextlib.ExitStack() as stack:
        settings = settings_for(case)
        if not WAYS[case.way].in_process:
            stack.enter_context(mock.patch.dict(os.environ, XLLM_CHECK="1"))
            stack.enter_context(mock.patch("xllm.worker.processes.start_rank", fork_rank))
        if "lora" in features:
            settings["lora_modules"] = adapters(case.model)
        if "tiers" in features:
            settings["disk_cache_dir"] = stack.enter_context(tempfile.TemporaryDirectory())
        llm = stack.enter_context(LLM(**settings))
        if case.is_split:
            stack.enter_context(split(llm, settings))
        names = ADAPTERS if "lora" in features else [""] * len(PROMPTS)
        first = llm.generate(PROMPTS, sampling_for(features), use_tqdm=False, lora=names)
        if "tiers" in features:
            leave_only_the_lower_tiers(llm, keep_host=not case.overlaps)
        again = first if not twice else llm.generate(PROMPTS, sampling_for(features), use_tqdm=False, lora=names)
        if "tiers" in features or case.is_split:
            settle(llm)
        if not WAYS[case.way].in_process:
            hear_from_ranks(llm)
        stats = llm.stats()
        if case.is_split:
            assert llm._core.num_moved, "no request went on at the other engine"
        if WAYS[case.way].in_process:
            check_the_worker(llm, case)
    first_ids, again_ids = ([list(o.outputs[0].token_ids) for o in outputs] for outputs in (first, again))
    check_that_it_worked(case, stats)
    check_the_form(grammars_for(features), first_ids)
    assert_same(features, again_ids, first_ids)  # a warm cache changes nothing
    return first_ids


def assert_same(features: frozenset[str], found: list[list[int]], expected: list[list[int]]) -> None:
    """Token for token. Where activations or KV are rounded to codes a prompt or two may differ: sums in another order
    are other in the last bit, which now and then rounds a number to the next code, 2^-8 away."""
    if not features & ROUNDED:
        assert found == expected
        return
    assert sum(a != b for a, b in zip(found, expected, strict=True)) <= 2, (found, expected)


def check_that_it_worked(case: Case, stats: EngineStats) -> None:
    """From outside, so that it holds for a worker in another process, too."""
    features = case.features
    assert stats.num_running == stats.num_waiting == 0
    assert stats.num_free_blocks == stats.num_blocks
    assert (stats.prefix_hits_total > 0) == ("prefix" in features or "tiers" in features or case.is_split)
    if case.is_split:  # what is seen of a feature is seen of both engines, by half each
        assert stats.cached_tokens_by_tier_total["l3"] > 0
        assert (stats.spec_accepted_tokens_total > 0) == ("ngram" in features)
        return
    if "tiers" in features:
        below = stats.cached_tokens_by_tier_total
        assert below["l4"] > 0 if case.overlaps else below["l3"] > 0
        assert stats.kv_disk_up
    assert (stats.graphs is not None) == ("graph" in features)
    if stats.graphs is not None:
        assert sum(stats.graphs.replays_total.values()) > sum(stats.graphs.fallbacks_total.values())
        # A step with drafts or with logits that the host edits waits: of every batch here with seeds or forms, and of
        # every prompt with both, as the one without a form has a penalty.
        edits = {"seeds", "grammar"} & features
        never_plain = len(edits) == 2 or ({"batch", "preemption"} & features and edits)
        if not case.overlaps or not ("ngram" in features or never_plain):
            assert (stats.graphs.fed_steps_total > 0) == case.overlaps
        assert ("verify" in {kind.split("-")[0] for kind in stats.graphs.replays_total}) == ("ngram" in features)
        assert any("lora" in kind for kind in stats.graphs.replays_total) == ("lora" in features)
    assert (stats.preemptions_total > 0) == ("preemption" in features)
    assert (stats.spec_accepted_tokens_total > 0) == ("ngram" in features)


@functools.cache
def vocabulary() -> LLTokenizer:
    """Of all models here, beside the engine's own."""
    return vocabulary_source(load_tokenizer(BUNDLED), vocab_size=4096, eos_token_ids=(2,)).build()


def check_the_form(grammars: list[StructuredOutput | None], outputs: list[list[int]]) -> None:
    for grammar, token_ids in zip(grammars, outputs):
        assert len(token_ids) == NUM_TOKENS
        if grammar is not None:
            matcher = build_matcher(vocabulary(), grammar_text(grammar))
            assert matcher.validate_tokens(token_ids) == NUM_TOKENS


# --- what looks into the engine


def check_the_worker(llm: LLM, case: Case) -> None:
    """KV lies as it was asked for. Only where the runner is in this process."""
    runner = llm._core.link.worker.runner
    assert {cache.itemsize for pair in runner.kv_cache.layers for cache in pair} == {1 if "kv8" in case.features else 4}
    virtual = runner.virtual_rows
    assert (virtual is not None) == (case.layout != "paged")
    if virtual is not None:
        virtual.xtensor.check_integrity()
        assert virtual.xtensor.counters.pages_mapped > 0
        assert (virtual.xtensor.counters.fallbacks > 0) == (case.layout == "xtensor-capped")


# --- the rows


class KeptChecker(GrammarChecker):
    """Serves one engine after the other."""

    def close(self) -> None:
        pass


@pytest.fixture(scope="module", autouse=True)
def kept_answers() -> Iterator[None]:
    """Whether forms can be compiled and what the adapters say of a model's layers is found out in processes beside the
    engine's: once, and not for every row."""
    checkers: dict[str, KeptChecker] = {}

    def keep(source: Callable[[], VocabularySource]) -> KeptChecker:
        vocabulary = source()
        return checkers.setdefault(repr(vocabulary), KeptChecker(lambda: vocabulary))

    @functools.cache
    def read_once(folder: Path, names: tuple[str, ...]) -> AdapterLayers:
        return read_layers(folder, names)

    with (mock.patch("xllm.inputs.GrammarChecker", keep),
          mock.patch("xllm.models.adapter.read_layers", lambda folder, names: read_once(folder, tuple(names)))):
        yield
    for checker in checkers.values():
        GrammarChecker.close(checker)


@functools.cache
def plain(what_changes_the_output: frozenset[str], model: str) -> list[list[int]]:
    """One request at a time, every other feature off; so nothing is in a cache when they come again."""
    return run(Case(what_changes_the_output, model=model), twice=False)


def covering_of(ways: Iterable[str], strength: int, models: Iterable[str] = MODELS,
                excluded: Iterable[Mapping[str, str]] = ()) -> list[Case]:
    """So many values of different columns meet in a row, on some of these ways and models."""
    columns = {**COLUMNS, "way": tuple(ways), "model": tuple(models)}
    return [Case(frozenset(name for name in FEATURES if row[name] == "on"), row["way"], row["layout"], row["model"])
            for row in covering_rows(columns, [*EXCLUSIONS, *excluded], strength=strength)]


# Chosen by hand to be short. Every layout, and each feature off and on.
SHARED_CASES = [Case(frozenset(), SHARED_WAY),
                Case(frozenset({"batch", "w8a8", "kv8"}), SHARED_WAY, "xtensor", "dense"),
                # Without seeds: sums of parts are other in the last bit, and a draw next to its boundary falls to the
                # other side on one processor and not on another.
                Case(frozenset(FEATURES) - {"w8a8", "kv8", "seeds"}, SHARED_WAY, "xtensor-capped"),
                Case(frozenset({"batch", "chunked", "prefix", "graph"}), SHARED_WAY, "paged", "moe"),
                Case(frozenset({"batch", "ngram", "tiers", "seeds"}), SHARED_WAY, "xtensor", "mla")]
OTHER_WAYS = [way for way in WAYS if way != SHARED_WAY]
COVERING = [*covering_of(OTHER_WAYS, STRENGTH), *SHARED_CASES]


OTHER_KINDS = [model for model in MODELS if model != "dense"]


def chosen_cases() -> Iterator[Case]:
    """Combinations of which somebody once had reason to be afraid, and everything at once."""
    triples = [("thread", ("ngram", "preemption")), ("inline", ("chunked", "prefix", "preemption")),
               ("thread", ("prefix", "preemption")), ("thread", ("ngram", "grammar")),
               ("inline", ("grammar", "ngram", "preemption"))]
    most = frozenset(FEATURES) - WEIGHTS
    exact = most - {"kv8"}
    everything = [most | {"int8"}, most | {"w8a8"}, exact | {"int8"}, exact, exact - {"seeds"},
                  exact - {"grammar"} | {"int8"}]
    for layout in LAYOUTS:
        if layout != "xtensor-capped":
            yield from (Case(frozenset(features), way, layout, "dense") for way, features in triples)
    places = [(way, layout) for way, layout in itertools.product(WAYS, LAYOUTS)
              if WAYS[way].overlaps and (way != SHARED_WAY or MATRIX_ALL)]
    if MATRIX_ALL:
        yield from (Case(features, way, layout) for way, layout in places for features in everything)
    else:  # each somewhere, and something in each place and with each model
        yield from (Case(features, way, layout, model) for (way, layout), features, model in zip(
            places, itertools.cycle(everything), itertools.cycle(("bundled", *OTHER_KINDS))))


def isolated_cases() -> Iterator[Case]:
    """Each feature and each pair of them with nothing else on, each way and on each layout."""
    for features in itertools.chain(*(itertools.combinations(FEATURES, count) for count in (0, 1, 2))):
        for way, layout in itertools.product(WAYS, LAYOUTS):
            case = Case(frozenset(features), way, layout)
            if is_possible(case):
                yield case


# With prompts and answers at two engines: any two values meet.
SPLIT = [replace(case, is_split=True) for case in covering_of(OTHER_WAYS, 2, excluded=[
    {"w8a8": "on", "kv8": "on", "seeds": "on"}])]  # rounded twice, and drawn: more than a prompt or two differ
SPLIT.append(Case(frozenset({"batch", "chunked", "prefix"}), SHARED_WAY, is_split=True))

CASES = [*COVERING, *filter(is_possible, chosen_cases()), *SPLIT]
if MATRIX_ALL:
    CASES += [*covering_of([SHARED_WAY], 2), *isolated_cases()]


@pytest.mark.parametrize("case", dict.fromkeys(CASES), ids=str)
def test_the_output_is_the_plain_one(case: Case) -> None:
    assert_same(case.features, run(case), plain(case.features & CHANGES_THE_OUTPUT, case.model))
