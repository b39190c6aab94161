"""Translates what the APIs say about how much a model shall think and say into variables of its chat template.

A wish is honoured where the template reads a variable for it, and refused by name where it does not.
"""

from __future__ import annotations

from typing import Any

from serving.api.errors import invalid
from serving.api.state import ServerState
from xllm.text.chat_template import template_variables

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
VERBOSITIES = ("low", "medium", "high")
SWITCHES = ("enable_thinking", "thinking")  # Qwen's and GLM's name, DeepSeek's name


def read_variables(state: ServerState, template: str | None = None) -> frozenset[str]:
    """The variables that the model's chat templates read, or the request's own. Raises ApiError without a tokenizer."""
    sources = state.need_tokenizer("messages").chat_template_sources if template is None else (template,)
    return template_variables(sources)


def thinking_switches(variables: frozenset[str], on: bool) -> dict[str, Any]:
    """The variable that turns thinking on or off; empty if there is none."""
    return {name: on for name in SWITCHES if name in variables}


def effort_variables(state: ServerState, effort: str | None, field: str,
                     template: str | None = None) -> dict[str, Any]:
    """The variables for an effort of EFFORTS. field: its name in the request. Raises ApiError."""
    if effort is None:
        return {}
    if effort not in EFFORTS:
        raise invalid(f"{field} must be one of {', '.join(EFFORTS)}", field.partition(".")[0])
    variables = read_variables(state, template)
    switches = thinking_switches(variables, effort != "none")
    if effort == "none" and (switches or (state.parsers.reasoning is None and "reasoning_effort" not in variables)):
        return switches  # without either the model does not think at all
    if "reasoning_effort" in variables:
        return {**switches, "reasoning_effort": effort}
    if effort == "medium":  # as the model thinks without being told
        return switches
    known = "none and medium: its chat template only switches thinking on and off" if switches else (
        "medium only: its chat template has no variable for it")
    raise invalid(f"{field}: {effort!r} is not supported; this model knows {known}", field.partition(".")[0])


def verbosity_variables(state: ServerState, verbosity: str | None, field: str,
                        template: str | None = None) -> dict[str, Any]:
    """The variables for a verbosity of VERBOSITIES; "medium" is what a model does unasked. Raises ApiError."""
    if verbosity is None:
        return {}
    if verbosity not in VERBOSITIES:
        raise invalid(f"{field} must be one of {', '.join(VERBOSITIES)}", field.partition(".")[0])
    if "verbosity" in read_variables(state, template):
        return {"verbosity": verbosity}
    if verbosity == "medium":
        return {}
    raise invalid(f"{field}: {verbosity!r} is not supported; the model's chat template has no variable for it",
                  field.partition(".")[0])
