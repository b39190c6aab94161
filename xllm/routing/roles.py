"""Roles of a cluster's instances: which half of a request each computes. Names as in xllm-service."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

# DEFAULT: whole requests; its KV goes nowhere. PREFILL: prompts, which others go on with. DECODE: goes on with what
# others have computed the prompt of. MIX: either half, or both.
Role = Literal["DEFAULT", "PREFILL", "DECODE", "MIX"]
ROLES: tuple[Role, ...] = ("DEFAULT", "PREFILL", "DECODE", "MIX")
HANDS_OVER = ("PREFILL", "MIX")  # may compute a prompt that another goes on with
TAKES_OVER = ("DECODE", "MIX")  # may go on with a prompt that another has computed
WHOLE = ("DEFAULT", "MIX")  # computes whole requests as a matter of course


def unsuited(roles: Mapping[str, str], *, begins: bool) -> set[str]:
    """The instances, by name, that are there for the other half of a request. begins: nothing of it has been computed;
    else it has output already."""
    wrong = "DECODE" if begins else "PREFILL"
    return {name for name, role in roles.items() if role == wrong}
