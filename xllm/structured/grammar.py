"""Makes llguidance's grammar text and matcher of a `StructuredOutput`.

All that llguidance may spend is bounded here; what it spends in spite of that is found out by `grammar_probe.py`, in a
process that may be killed for it (`grammar_compiler.py`).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from xllm.structured.json_schema import prepared
from xllm.structured.lark import with_schemas
from xllm.structured.spec import StructuredOutput

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# A blank, or a line's end and the next one's indentation: as JSON is usually written. With the standard's unbounded
# blanks, a model that likes them never comes back.
JSON_WHITESPACE = r"\x20|\r?\n[\x20\t]{0,24}"
FREE_TEXT = r"(.|\n)*"
_MAX_REASON_CHARS = 400  # of llguidance's reason in a message, which may repeat the whole grammar


class GrammarError(ValueError):
    """The grammar cannot be compiled, allows no text at all, or costs too much."""


def grammar_text(spec: StructuredOutput) -> str:
    """The specification as llguidance reads it. Raises GrammarError. What llguidance accepts wrongly, `form_check.py`
    finds."""
    return _form(spec) if spec.after is None else _behind(spec.after, _form(spec))


def _behind(after: str, form: str) -> str:
    """Free text that ends with the first `after`, then the form. A form is Lark, or JSON with a list of grammars."""
    first, *others = json.loads(form)["grammars"] if form.startswith("{") else [{"lark_grammar": form}]
    head = f"start: head /\\n{{0,2}}/ @form\nhead[lazy]: /{FREE_TEXT}/ {json.dumps(after)}"
    return json.dumps({"grammars": [{"name": "all", "lark_grammar": head}, {**first, "name": "form"}, *others]})


def schema_grammar(schema: str) -> str:
    """JSON of the schema, with blanks as JSON_WHITESPACE has them unless it says otherwise."""
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": JSON_WHITESPACE})


def _form(spec: StructuredOutput) -> str:
    from llguidance import LLMatcher

    source = spec.source
    if spec.kind == "json":
        return schema_grammar(json.dumps(prepared(json.loads(source))))
    if spec.kind == "regex":
        return LLMatcher.grammar_from_regex(source)
    if spec.kind == "choice":
        return LLMatcher.grammar_from_lark("start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, json.loads(source))))
    if spec.kind == "structural_tag":
        return _tags_to_lark(json.loads(source))
    return LLMatcher.grammar_from_lark(lark_text(source))


def lark_text(source: str) -> str:
    """The grammar in Lark, its JSON schemas prepared. Raises GrammarError, SchemaError."""
    return with_schemas(as_lark(source), prepared)


def as_lark(source: str) -> str:
    """The grammar as it stands, unless it came in GBNF. Raises GrammarError."""
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return any_to_lark(source)
    except RecursionError:
        raise GrammarError("it is nested too deep") from None
    except Exception as error:  # the converter raises whatever its hand-written parser meets
        raise GrammarError(str(error)) from None


def checked_structures(tag: dict[str, Any]) -> list[dict[str, Any]]:
    """The structures of a structural tag in vLLM's and SGLang's form. Raises GrammarError for a malformed tag, which is
    not checked anywhere else."""
    _check_keys(tag, ("structures", "triggers"), "a structural tag")
    structures, triggers = tag.get("structures"), tag.get("triggers")
    if not isinstance(structures, list) or not structures or not all(isinstance(s, dict) for s in structures):
        raise GrammarError("'structures' must be a list of objects")
    if not isinstance(triggers, list) or not triggers or not all(isinstance(t, str) and t for t in triggers):
        raise GrammarError("'triggers' must be a list of texts")
    for structure in structures:
        _check_keys(structure, ("begin", "schema", "end"), "a structure")
        begin, end, schema = structure.get("begin"), structure.get("end", ""), structure.get("schema", {})
        if not isinstance(begin, str) or not isinstance(end, str) or not isinstance(schema, dict):
            raise GrammarError("a structure needs the texts 'begin' and 'end' and the object 'schema'")
    return structures


def _tags_to_lark(tag: dict[str, Any]) -> str:
    from llguidance import LLMatcher, StructTag

    tags = []
    for structure in checked_structures(tag):
        begin, schema = structure["begin"], structure.get("schema", {})
        trigger = next((t for t in tag["triggers"] if begin.startswith(t)), None)
        if trigger is None:
            raise GrammarError(f"no trigger begins {begin!r}")
        schema = {"x-guidance": {"whitespace_pattern": JSON_WHITESPACE}, **prepared(schema)}
        tags.append(StructTag(trigger=trigger, begin=begin, grammar=schema, end=structure.get("end", "")))
    return LLMatcher.grammar_from_lark(StructTag.to_grammar(tags, assume_special=False, text_regex=FREE_TEXT))


def _check_keys(given: dict[str, Any], known: tuple[str, ...], what: str) -> None:
    for name in given:
        if name not in known:
            raise GrammarError(f"{what} has no {name[:64]!r}, only {', '.join(known)}")


def build_matcher(vocabulary: LLTokenizer, text: str) -> LLMatcher:
    """A matcher at its beginning, its first mask computed. Lets other Python threads run. Raises GrammarError."""
    from llguidance import LLMatcher, LLParserLimits

    # A step is a mask: the first two bound what it costs to some 10 ms, nearly always. The others bound memory.
    limits = LLParserLimits(step_lexer_fuel=50_000, step_max_items=30_000, initial_lexer_fuel=1_000_000,
                            max_lexer_states=20_000, max_grammar_size=300_000, verbose_errors=False)
    matcher = LLMatcher(vocabulary, text, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
    check_matcher(matcher)
    return matcher


def check_matcher(matcher: LLMatcher) -> None:
    """Raise GrammarError if it met a limit or a contradiction."""
    if matcher.is_error():
        raise GrammarError(_short(matcher.get_error()))


def _short(reason: str) -> str:
    """llguidance's reason, without the state of its parser and without what the user said, repeated at length."""
    reason = reason.partition("\n<non-verbose/>")[0].partition("\n<state>")[0].strip()
    if reason.startswith("NoExtension"):
        return "no text is of this form"
    if reason.startswith("oneOf constraints are not supported"):
        return ("oneOf: a value may be of two of these schemas; say anyOf, or tell them apart by a required property "
                "with a const of its own in each, or by a discriminator")
    return reason if len(reason) <= _MAX_REASON_CHARS else reason[:_MAX_REASON_CHARS] + "..."
