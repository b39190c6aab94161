"""What an index answered, against what an instance had, checked when it is over: each answer is that of a state which
the instance was in, not after the answer, not too long before the question, and never older than an earlier one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from xllm.kv.block import TIERS


@dataclass(frozen=True, slots=True)
class Changed:
    """What an instance removed, and then stored, in tiers, in one step. at_s: not after it was told."""

    at_s: float
    removed: tuple[tuple[int, frozenset[int]], ...] = ()
    stored: tuple[tuple[int, frozenset[int]], ...] = ()


@dataclass(frozen=True, slots=True)
class LookUp:
    """keys: of a prompt's blocks. answer: how many of them, from the first on, in the tiers up to each."""

    begun_s: float
    ended_s: float
    keys: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(slots=True)
class Judgement:
    """furthest_behind_s: how old a state was at most that an answer was of."""

    complaints: list[str] = field(default_factory=list)
    furthest_behind_s: float = 0.0


def judge(changes: Sequence[Changed], look_ups: Sequence[LookUp], *, stale_s: float) -> Judgement:
    """look_ups: of one index, in their order; the instance began with nothing. stale_s: what happened so long before a
    question must be known."""
    judgement, number = Judgement(), 0  # of changes that the state has behind it
    tiers = [set[int]() for _ in TIERS]

    def answer(keys: Sequence[int]) -> tuple[int, ...]:
        runs = []
        for tier in range(len(TIERS)):
            there = set[int]().union(*tiers[: tier + 1])
            runs.append(next((place for place, key in enumerate(keys) if key not in there), len(keys)))
        return tuple(runs)

    for look_up in look_ups:
        while True:
            is_last = number == len(changes) or changes[number].at_s > look_up.ended_s
            must = not is_last and changes[number].at_s < look_up.begun_s - stale_s
            if not must and answer(look_up.keys) == look_up.answer:
                if not is_last:
                    judgement.furthest_behind_s = max(judgement.furthest_behind_s,
                                                      look_up.begun_s - changes[number].at_s)
                break
            if is_last:
                judgement.complaints.append(f"at {look_up.begun_s:.3f} the answer was {look_up.answer}, which is none "
                                            f"of the states up to {number}, where it is {answer(look_up.keys)}")
                break
            for tier, keys in changes[number].removed:
                tiers[tier] -= keys
            for tier, keys in changes[number].stored:
                tiers[tier] |= keys
            number += 1
    return judgement
