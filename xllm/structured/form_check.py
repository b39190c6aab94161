"""`check_form`: finds forms that llguidance compiles although some of their outputs cannot end."""

from __future__ import annotations

import json
import time
from typing import Any

from xllm.structured.grammar import GrammarError, as_lark, checked_structures, grammar_text, schema_grammar
from xllm.structured.grammar_probe import DeadEnds
from xllm.structured.json_schema import prepared, reachable
from xllm.structured.lark import regexes_of, schemas_of
from xllm.structured.regexes import RegexError, check_regex
from xllm.structured.spec import StructuredOutput

# For finding the innermost wrong part of a schema. Chosen: a better message is worth that much and no more.
SEARCH_CPU_S = 0.05
SHOWN_CHARS = 80  # of an expression, in a message


def check_form(spec: StructuredOutput, dead_ends: DeadEnds) -> None:
    """Raise ValueError that names the place of such a mistake. With `after` the form behind it is checked."""
    source = spec.source
    if spec.kind == "json":
        _check_schema(json.loads(source), dead_ends)
    elif spec.kind == "regex":
        check_regex(source)
    elif spec.kind == "structural_tag":
        structures = checked_structures(json.loads(source))
        for index, structure in enumerate(structures):
            try:
                _check_schema(structure.get("schema", {}), dead_ends, 1 / len(structures))
            except ValueError as error:
                raise GrammarError(f"structures.{index}.schema: {error}") from None
    elif spec.kind == "grammar":
        _check_lark(source, dead_ends)


def _check_schema(schema: dict[str, Any], dead_ends: DeadEnds, share: float = 1.0) -> None:
    ready = prepared(schema, dead_ends.has_more_names)
    try:
        dead_ends.look(schema_grammar(json.dumps(ready)), share)
    except GrammarError as error:
        raise GrammarError(_innermost(str(error), schema, dead_ends)) from None


def _innermost(reason: str, schema: dict[str, Any], dead_ends: DeadEnds) -> str:
    """What is wrong with the innermost part that is refused alike when it stands alone, behind the JSON pointer to it;
    the reason as it is if that is the whole, or takes more than SEARCH_CPU_S to find."""
    around: dict[str, Any] = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    expires_s = time.thread_time() + SEARCH_CPU_S
    for pointer, node in sorted(reachable(schema), key=lambda found: -found[0].count("/")):
        found = _fault({**around, **node}, dead_ends) if pointer else reason
        if found is not None and found.partition(":")[0] == reason.partition(":")[0]:
            return _of_pattern(pointer, node, dead_ends) or (f"{pointer}: {found}" if pointer else reason)
        if time.thread_time() > expires_s:
            break
    return reason


def _fault(schema: dict[str, Any], dead_ends: DeadEnds) -> str | None:
    """Why llguidance refuses a schema."""
    try:
        dead_ends.look(schema_grammar(json.dumps(prepared(schema))), share=0)
    except GrammarError as error:
        return str(error)
    return None


def _of_pattern(pointer: str, node: dict[str, Any], dead_ends: DeadEnds) -> str | None:
    """What is wrong with the schema's regular expressions, as they came and not as llguidance was given them."""
    patterns: dict[str, Any] = {f"{pointer}/pattern": node.get("pattern")}
    if isinstance(node.get("patternProperties"), dict):
        patterns |= {f"{pointer}/patternProperties/{name[:64]}": name for name in node["patternProperties"]}
    for place, pattern in patterns.items():
        if not isinstance(pattern, str):
            continue
        reason = _fault({"type": "string", "pattern": pattern}, dead_ends)
        if reason is not None:
            return f"{place}: the regular expression {_shown(pattern)}: {_worded(reason)}"
    return None


def _worded(reason: str) -> str:
    """llguidance's reason without the expression that it was given."""
    if "Regex is empty" in reason:
        return "no text matches it"
    if "lookarounds not supported" in reason:
        return "^ and $ can stand at its beginning and end only"
    return reason.rpartition("error: ")[2].partition(" in regex /")[0]


def _shown(pattern: str) -> str:
    return repr(pattern if len(pattern) <= SHOWN_CHARS else f"{pattern[:SHOWN_CHARS]}...")


def _check_lark(source: str, dead_ends: DeadEnds) -> None:
    text = as_lark(source)
    for line, pattern in regexes_of(text):
        try:
            check_regex(pattern)
        except RegexError as error:
            raise GrammarError(f"line {line}: {error}") from None
    schemas = [schema for _, _, schema in schemas_of(text)]
    for schema in schemas:
        prepared(schema, dead_ends.has_more_names)
    try:
        dead_ends.look(grammar_text(StructuredOutput(grammar=source)))
    except GrammarError:
        for schema in schemas:  # it is named as if it stood alone, if it is at fault
            _check_schema(schema, dead_ends, share=0)
        raise
