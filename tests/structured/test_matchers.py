"""`RowMatchers` against a truth that replays every row from its beginning for every mask."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from llguidance import LLMatcher

from xllm import SamplingParams, StructuredOutput
from xllm.step import NewRow
from xllm.structured import matchers as module
from xllm.structured.grammar import build_matcher, grammar_text
from xllm.structured.matchers import ALL, RowMatchers
from xllm.structured.store import GrammarStore

EOS, VOCAB_SIZE, NUM_ROWS, WIDTH = 2, 4096, 4, 160
SPECS = [
    StructuredOutput(json={"type": "array", "items": {"type": "object", "properties": {"a": {"type": "string"}}}}),
    StructuredOutput(regex=r"([a-z]{1,5} ){1,30}"),
    StructuredOutput(grammar='start: "(" start ")" | /[0-9]+/'),
    StructuredOutput(choice=["one", "two and three", "two and four"]),
]


@pytest.fixture(scope="module")
def store(source):
    made = GrammarStore(lambda: source)
    yield made
    made.close()


@pytest.fixture(scope="module")
def vocabulary(source):
    return source.build()


class Bench:
    """Rows as the runner keeps them, and what is true of them."""

    def __init__(self, store, vocabulary, seed: int):
        self.rows = SimpleNamespace(token_ids=np.zeros((NUM_ROWS, WIDTH), np.int32),
                                    num_tokens=np.zeros(NUM_ROWS, np.int32),
                                    num_prompt_tokens=np.zeros(NUM_ROWS, np.int32))
        self.matchers = RowMatchers(self.rows, VOCAB_SIZE)
        self.matchers.store = store
        self.vocabulary = vocabulary
        self.rng = np.random.default_rng(seed)
        self.specs: list[StructuredOutput | None] = [None] * NUM_ROWS

    def enter(self, row: int, spec: StructuredOutput | None, output: list[int]) -> None:
        prompt = self.rng.integers(3, 500, self.rng.integers(1, 9)).tolist()
        tokens = [*prompt, *output]
        self.rows.token_ids[row, : len(tokens)] = tokens
        self.rows.num_tokens[row], self.rows.num_prompt_tokens[row] = len(tokens), len(prompt)
        self.specs[row] = spec
        none = np.zeros(0, np.int32)
        self.matchers.enter(NewRow(row=row, request_id="r", token_ids=np.array(tokens, np.int32),
                                   num_prompt_tokens=len(prompt), num_computed_tokens=0, block_ids=none,
                                   sampling=SamplingParams(structured=spec), eos_token_ids=(EOS,), seed=0))

    def output(self, row: int) -> list[int]:
        return self.rows.token_ids[row, self.rows.num_prompt_tokens[row]: self.rows.num_tokens[row]].tolist()

    def truth(self, row: int, drafts: list[int]) -> np.ndarray | None:
        """The mask behind output and drafts; None: they are not of the grammar."""
        matcher = build_matcher(self.vocabulary, grammar_text(self.specs[row]))
        for token_id in [*self.output(row), *drafts]:
            if matcher.is_stopped() and token_id == EOS:
                break
            if not matcher.consume_token(token_id):
                return None
        return np.frombuffer(matcher.compute_bitmask(), np.int32)[: VOCAB_SIZE // 32]

    def draw(self, mask: np.ndarray) -> int:
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        return int(self.rng.choice(allowed))


def slots_of(rows: list[int], counts: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """rows_Q, offsets_Q."""
    return np.repeat(np.array(rows, np.int32), counts), np.concatenate([np.arange(n) for n in counts])


@pytest.mark.parametrize("begin", [True, False], ids=["beside", "now"])
@pytest.mark.parametrize("seed", range(4))
def test_masks_are_those_of_a_replay(store, vocabulary, seed, begin, monkeypatch):
    monkeypatch.setattr(module, "NUM_THREADS", 1 + seed)
    monkeypatch.setattr(module, "MIN_SHARE", 1)
    bench = Bench(store, vocabulary, seed)
    for row, spec in enumerate([*SPECS[seed % 2: seed % 2 + 3], None]):
        bench.enter(row, spec, [])
    num_checked = num_wrong_drafts = 0
    for _ in range(14):
        rows, drafts = bench.rng.permutation(NUM_ROWS).tolist(), []
        for row in rows:
            drafts.append(draft_tokens(bench, row))
            num = int(bench.rows.num_tokens[row])
            bench.rows.token_ids[row, num:num + len(drafts[-1])] = drafts[-1]
        slots = slots_of(rows, [len(d) + 1 for d in drafts])
        if begin:
            bench.matchers.begin(*slots)
        masks = bench.matchers.masks(*slots)
        assert not masks.failed
        at = dict(zip(masks.slots_X.tolist(), masks.mask_XW))
        assert sorted(at) == [q for q, row in enumerate(slots[0]) if bench.specs[row] is not None]
        for q, (row, offset) in enumerate(zip(*(array.tolist() for array in slots))):
            if bench.specs[row] is None:
                continue
            expected = bench.truth(row, drafts[rows.index(row)][:offset])
            num_checked += 1
            num_wrong_drafts += expected is None
            assert (at[q] == (ALL if expected is None else expected)).all(), (row, offset)
        for row in rows:
            move_on(bench, row, drafts[rows.index(row)])
    assert num_checked > 80
    assert num_wrong_drafts > 3
    bench.matchers.close()


def draft_tokens(bench: Bench, row: int) -> list[int]:
    """Up to three, mostly of the grammar."""
    drafts: list[int] = []
    for _ in range(int(bench.rng.integers(0, 4))):
        mask = bench.truth(row, drafts) if bench.specs[row] is not None else None
        wrong = mask is None or bench.rng.random() < 0.2
        drafts.append(int(bench.rng.integers(300, 4000)) if wrong else bench.draw(mask))
    return drafts


def move_on(bench: Bench, row: int, drafts: list[int]) -> None:
    """Accept some drafts, draw one more token, and sometimes leave and come back, or begin anew."""
    spec, room = bench.specs[row], WIDTH - 8 - int(bench.rows.num_tokens[row])
    if spec is None or room < 0:
        return
    num = int(bench.rng.integers(0, len(drafts) + 1))
    while num and bench.truth(row, drafts[:num]) is None:
        num -= 1
    new = [*drafts[:num], bench.draw(bench.truth(row, drafts[:num]))]
    start = int(bench.rows.num_tokens[row])
    bench.rows.token_ids[row, start:start + len(new)] = new
    bench.rows.num_tokens[row] += len(new)
    if EOS in new or bench.rng.random() < 0.2:
        output = [] if EOS in new else bench.output(row)
        bench.matchers.release(row)
        bench.enter(row, spec, output)


def test_after_the_end_only_the_end_is_left(store, vocabulary):
    bench = Bench(store, vocabulary, 0)
    bench.enter(0, SPECS[3], [])
    ids = [vocabulary.tokenize_str("one")[0]] if len(vocabulary.tokenize_str("one")) == 1 else \
        vocabulary.tokenize_str("one")
    for token_id in [*ids, EOS, EOS]:
        bench.rows.token_ids[0, bench.rows.num_tokens[0]] = token_id
        bench.rows.num_tokens[0] += 1
        masks = bench.matchers.masks(*slots_of([0], [1]))
    assert np.flatnonzero(np.unpackbits(masks.mask_XW.view(np.uint8), bitorder="little")).tolist() == [EOS]
    assert masks.allows(0, EOS)
    assert not masks.allows(0, EOS + 1)


def test_what_is_not_of_the_grammar_fails_and_says_so(store, vocabulary):
    bench = Bench(store, vocabulary, 0)
    bench.enter(1, SPECS[2], vocabulary.tokenize_str("hello"))
    masks = bench.matchers.masks(*slots_of([1], [1]))
    assert list(masks.failed) == [0]
    assert "cannot go on" in masks.failed[0]
    assert (masks.mask_XW == ALL).all()


def test_one_that_turns_out_slow_fails_and_says_so(store, vocabulary, monkeypatch):
    bench = Bench(store, vocabulary, 0)
    bench.enter(0, SPECS[0], [])
    assert not bench.matchers.masks(*slots_of([0], [1])).failed
    bench.rows.token_ids[0, bench.rows.num_tokens[0]] = vocabulary.tokenize_str("[")[0]
    bench.rows.num_tokens[0] += 1
    monkeypatch.setattr(module, "MAX_MASK_CPU_S", 0.0)
    masks = bench.matchers.masks(*slots_of([0], [1]))
    assert "too complex" in masks.failed[0]
    assert (masks.mask_XW == ALL).all()


def test_slices_of_a_step_see_their_own_slots(store, vocabulary):
    bench = Bench(store, vocabulary, 0)
    bench.enter(0, SPECS[1], [])
    bench.enter(2, SPECS[1], [])
    for row in (0, 2):
        num = int(bench.rows.num_tokens[row])
        bench.rows.token_ids[row, num:num + 2] = vocabulary.tokenize_str("abc de")[:2]
    slots = slots_of([0, 1, 2], [3, 1, 3])
    bench.matchers.begin(*slots)
    whole = bench.matchers.masks(*slots)
    for first, end in ((0, 2), (2, 5), (5, 7)):
        part = bench.matchers.masks(*(array[first:end] for array in slots))
        for slot, mask in zip(part.slots_X + first, part.mask_XW):
            assert (mask == whole.mask_XW[np.searchsorted(whole.slots_X, slot)]).all()
    assert bench.matchers.masks(*slots_of([1], [1])) is None
    bench.matchers.close()


def test_copies_of_a_grammar_do_not_know_each_other(store):
    first, second = store.matcher(SPECS[3]), store.matcher(SPECS[3])
    assert isinstance(first, LLMatcher)
    before = second.compute_bitmask()
    assert first.consume_token(int(np.flatnonzero(np.unpackbits(np.frombuffer(before, np.uint8),
                                                                bitorder="little"))[0]))
    assert second.compute_bitmask() == before != first.compute_bitmask()
