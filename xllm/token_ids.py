"""A prompt's token ids as one array of int32, and the checks that a prompt must pass.

`InputProcessor` makes the array once; it crosses into the engine's process as bytes, and the scheduler reads the same
memory through numpy. A list of as many ints would be made, decoded and converted element by element.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

from xllm.errors import RequestError

TYPE = "i"  # C int: 32 bits on every platform that Python runs on today
assert array(TYPE).itemsize == 4


def token_array(token_ids: Sequence[int]) -> array[int]:
    """The ids as an array, itself if it is one. Raises OverflowError for an id that int32 cannot hold."""
    return token_ids if isinstance(token_ids, array) else array(TYPE, token_ids)


def are_integers(values: list[Any]) -> bool:
    """Whether all are ints, no bool among them. One pass in C: 2 ms for 131k."""
    return set(map(type, values)) <= {int}


def are_within(token_ids: Sequence[int], vocab_size: int) -> bool:
    """Whether all ids lie in [0, vocab_size). Fast for what `token_array` made."""
    ids = np.asarray(token_ids)
    return not len(ids) or bool(ids.min() >= 0 and ids.max() < vocab_size)


def check_prompt_length(num_tokens: int, max_model_len: int, field: str = "prompt") -> None:
    """Raise RequestError, naming `field`, for a prompt that is empty or leaves no room for one token."""
    name = "the prompt" if field == "prompt" else field
    if not num_tokens:
        raise RequestError(f"{name} is empty", field=field)
    if num_tokens >= max_model_len:
        raise RequestError(f"{name} has {num_tokens} tokens; with max_model_len {max_model_len} it may have at "
                           f"most {max_model_len - 1}", field=field)


def check_generated(num_prompt: int, num_generated: int, max_tokens: int | None, max_model_len: int) -> None:
    """Raise RequestError unless a request that goes on after so many tokens has one left to draw."""
    longest = max_model_len if max_tokens is None else min(max_model_len, num_prompt + max_tokens)
    if num_generated and num_prompt + num_generated >= longest:
        raise RequestError(f"generated_token_ids: after {num_prompt} tokens of prompt and {num_generated} generated "
                           f"ones no token is left to draw: the sequence may have {longest}",
                           field="generated_token_ids")
