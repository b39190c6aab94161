"""`Router`: chooses an engine for each call, and keeps count of what the engines have and do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from xllm.routing.choose import choose
from xllm.routing.engine_view import EngineView
from xllm.routing.prompt_marks import PromptMarks


class Router:
    """views: of the engines, by their numbers. Not thread-safe."""

    def __init__(self, views: Iterable[EngineView]):
        self.views = tuple(views)
        self._turn = 0  # the engine that is next among equal ones

    def pick(self, prompts: Sequence[PromptMarks], num_tokens: int, num_requests: int,
             free_tokens: Mapping[int, int]) -> int:
        """The number of the engine for a call. num_tokens: of all its prompts. free_tokens: room in the KV cache of
        each engine that may be chosen, at least one."""
        numbers = sorted(free_tokens)
        turn = next((place for place, number in enumerate(numbers) if number >= self._turn), 0)
        candidates = [self.views[number].candidate(prompts, num_requests, free_tokens[number]) for number in numbers]
        place = choose(candidates, num_tokens, turn)
        self._turn = numbers[place] + 1
        return numbers[place]
