"""The proposers by name. A new one is an entry here."""

from __future__ import annotations

from collections.abc import Callable

from xllm.config import SpeculativeSettings
from xllm.speculative.ngram import NgramProposer
from xllm.speculative.proposer import Proposer


def _ngram(settings: SpeculativeSettings) -> Proposer:
    return NgramProposer(min_length=settings.prompt_lookup_min, max_length=settings.prompt_lookup_max)


PROPOSERS: dict[str, Callable[[SpeculativeSettings], Proposer]] = {"ngram": _ngram}


def make_proposer(settings: SpeculativeSettings) -> Proposer | None:
    """The proposer that the settings name, or None without speculation."""
    method = settings.speculative_method
    return None if method is None else PROPOSERS[method](settings)
