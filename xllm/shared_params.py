"""`SharedParams`: the sampling parameters of many sequences as they cross into another process.

A call's sequences differ in a seed or a length at most, while stop strings, bad words and lists of token ids may be
large: those are written once, and are one object again on the other side.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from xllm.request import COLLECTIONS, SAMPLING_FIELDS, SamplingParams

VARIED = ("max_tokens", "seed", "prompt_logprobs")
_SAME = tuple(name for name in SAMPLING_FIELDS if name not in (*VARIED, *COLLECTIONS))
_UNSET: dict[str, Any] = dict.fromkeys(VARIED)  # so that a base is the same bytes whichever variant came first
_KEPT = 4  # decoded sets that are kept: rows of one call enter in several steps. Chosen: a few large calls at a time
_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(SamplingParams)


@dataclasses.dataclass(frozen=True, slots=True)
class SharedParams:
    """bases: encoded `SamplingParams`. variants: each the index of its base and its own values of `VARIED`."""

    bases: list[bytes]
    variants: list[tuple[int, int | None, int | None, int | None]]


def share(samplings: Sequence[SamplingParams]) -> tuple[SharedParams, list[int]]:
    """The parameters of one message, and for each of them the index of its variant."""
    if len(samplings) == 1:
        (one,) = samplings
        variant = (0, *(getattr(one, name) for name in VARIED))
        return SharedParams([_ENCODER.encode(one.varied(**_UNSET))], [variant]), [0]
    shared, bases, places, indices = SharedParams([], []), dict[tuple[Any, ...], int](), dict[int, int](), list[int]()
    for sampling in samplings:
        if (index := places.get(id(sampling))) is None:
            index = places[id(sampling)] = len(shared.variants)
            # Collections by identity: comparing large ones would cost more than it saves.
            key = (*(getattr(sampling, name) for name in _SAME), *(id(getattr(sampling, name)) for name in COLLECTIONS))
            if (base := bases.get(key)) is None:
                base = bases[key] = len(shared.bases)
                shared.bases.append(_ENCODER.encode(sampling.varied(**_UNSET)))
            shared.variants.append((base, *(getattr(sampling, name) for name in VARIED)))
        indices.append(index)
    return shared, indices


def read_shared(shared: SharedParams) -> list[SamplingParams]:
    """The variants. Raises msgspec.DecodeError or RequestError for what is no set of parameters."""
    bases, found = [_base_of(encoded) for encoded in shared.bases], []
    for index, *values in shared.variants:
        base, varied = bases[index], dict(zip(VARIED, values))
        is_base = all(getattr(base, name) == value for name, value in varied.items())
        found.append(base if is_base else base.varied(**varied))
    return found


@functools.lru_cache(maxsize=_KEPT)
def _base_of(encoded: bytes) -> SamplingParams:
    return _DECODER.decode(encoded)


def without(kind: type, name: str, left_out: Iterable[str], **added: type) -> Any:
    """A dataclass like `kind` but for fields that travel another way, in whose place stand those of `added`."""
    hints, dropped = typing.get_type_hints(kind), set(left_out)
    kept = [(f.name, hints[f.name]) for f in dataclasses.fields(kind) if f.name not in dropped]
    return dataclasses.make_dataclass(name, [*kept, *added.items()], frozen=True, slots=True,
                                      namespace={"__doc__": f"`{kind.__name__}` as it travels."})
