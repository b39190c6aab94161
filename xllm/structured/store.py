"""`GrammarStore`: keeps the engine's compiled grammars. Only grammars that have passed a `GrammarChecker` come here."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from xllm.structured.grammar import build_matcher, grammar_text
from xllm.structured.heap import allocated_bytes
from xllm.structured.spec import StructuredOutput
from xllm.structured.token_trie import VocabularySource, need_llguidance

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# Kept at a time. Chosen: more forms than most applications use at once; their memory is bounded by the next line.
MAX_GRAMMARS = 64
# Most need less than a tenth of GRAMMAR_BYTES (`grammar_compiler.py`); the states of a lexer, which are added while
# texts are written, come to 1 KB each.
MAX_GROWTH_BYTES = 2**27


class GrammarStore:
    """Builds matchers in a thread of its own. Keeps the MAX_GRAMMARS last used, or only the last one once the heap has
    grown by MAX_GROWTH_BYTES. Usable from several threads."""

    def __init__(self, source: Callable[[], VocabularySource]):
        """source: called once, in that thread, when the first grammar comes."""
        self._source = source
        self._vocabulary: LLTokenizer | None = None
        self._built: OrderedDict[StructuredOutput, Future[LLMatcher]] = OrderedDict()
        self._lock = threading.Lock()
        self._heap_bytes = 0  # when the first grammar came, or the others were last let go
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="xllm-grammar")

    def prepare(self, spec: StructuredOutput) -> Future[LLMatcher]:
        """Begin to build a grammar's matcher, unless that has begun. The future's matcher must only be copied, never
        used itself."""
        with self._lock:
            built = self._built.get(spec)
            if built is None:
                self._make_room()
                built = self._built[spec] = self._pool.submit(self._build, spec)
                if len(self._built) > MAX_GRAMMARS:
                    self._built.popitem(last=False)
            self._built.move_to_end(spec)
            return built

    def _make_room(self) -> None:
        if not self._built:
            self._heap_bytes = allocated_bytes()
        elif allocated_bytes() - self._heap_bytes > MAX_GROWTH_BYTES:
            self._built.clear()  # rows that use them keep what they use
            self._heap_bytes = allocated_bytes()

    def matcher(self, spec: StructuredOutput) -> LLMatcher:
        """A new matcher at the beginning of its grammar, for the caller alone. Waits until it is built. Raises
        GrammarError or RequestError."""
        return self.prepare(spec).result().deep_copy()

    def _build(self, spec: StructuredOutput) -> LLMatcher:
        need_llguidance()
        if self._vocabulary is None:
            self._vocabulary = self._source().build()
        return build_matcher(self._vocabulary, grammar_text(spec))

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(wait=False, cancel_futures=True)
