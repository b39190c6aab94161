"""`nearest`: suggests the name that somebody may have meant by one that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

# Of difflib's ratio (2 x matching characters / all characters). A slip or two in a name of ten letters is above it;
# at 0.5, which it was, `--enforce-eager` was taken for `--no-insecure`.
CUTOFF = 0.75


def nearest(word: str, known: Iterable[str], *, never: Collection[str] = ()) -> str:
    """'; did you mean ...?', or nothing where no name of `known` is near. Those in `never` are not suggested."""
    match = difflib.get_close_matches(word, [name for name in known if name not in never], n=1, cutoff=CUTOFF)
    return f"; did you mean {match[0]!r}?" if match else ""
