"""Roles of a cluster's instances: which half of a request each computes. Names as in xllm-service."""

from __future__ import annotations

from typing import Literal

# DEFAULT: whole requests; its KV goes nowhere. PREFILL: prompts, which others go on with. DECODE: goes on with what
# others have computed the prompt of. MIX: either half, or both.
Role = Literal["DEFAULT", "PREFILL", "DECODE", "MIX"]
ROLES: tuple[Role, ...] = ("DEFAULT", "PREFILL", "DECODE", "MIX")
HANDS_OVER = ("PREFILL", "MIX")  # may compute a prompt that another goes on with
TAKES_OVER = ("DECODE", "MIX")  # may go on with a prompt that another has computed
WHOLE = ("DEFAULT", "MIX")  # computes whole requests as a matter of course
