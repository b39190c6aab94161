"""Write docs/limits.md from the table of limits: `python tools/gen_limits.py [--check]`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from serving.api import call_weight  # noqa: E402
from serving.limits import BODY, CHATS, FIXED, GENERATION, HARD_MAXIMA, HEAD, MEDIA, SAME_AS, Limit  # noqa: E402

TARGET = ROOT / "docs" / "limits.md"
TOP = """# Limits

Made from the table in `serving/limits.py` by `tools/gen_limits.py`; change it there. What is beyond a limit is refused
with the status shown and a message that names the field and the limit; nothing is cut or ignored in silence. Each row
is hit exactly at the limit and one beyond it by `tests/security/test_limits.py` (media: `test_media_fetch.py`,
`test_image_header.py`).
"""
WEIGHTS = (
    ("a sequence (`n` times prompts)", call_weight.SEQUENCE, ""),
    ("a prompt token", call_weight.PROMPT_TOKEN, f"and {call_weight.PROMPT_COPY} for each choice"),
    ("a token that may be generated", call_weight.OUTPUT_TOKEN, ""),
    ("a log-probability of such a token", call_weight.LOGPROB,
     f"the token itself counts as two; {call_weight.KEPT_LOGPROB} with "
     "the Responses API, which keeps answers"),
    ("a log-probability of a prompt token", call_weight.PROMPT_LOGPROB,
     "for each choice; the token itself counts as two"),
    ("an echoed character", call_weight.ECHO_CHAR, "for each choice"),
    ("a character of a stop string", call_weight.STOP_CHAR,
     f"and {call_weight.STOP_OF_SEQUENCE} a string for each sequence"),
    ("a character of a bad word", call_weight.BAD_WORD_CHAR,
     f"and {call_weight.BAD_WORD_OF_SEQUENCE} a word for each sequence"),
    ("an id of `allowed_token_ids`", call_weight.ALLOWED_ID, ""),
    ("an entry of `logit_bias`", call_weight.BIAS, f"and {call_weight.BIAS_OF_SEQUENCE} for each sequence"),
    ("a number of an embedding", call_weight.EMBEDDING_NUMBER, ""),
)
WEIGHT_TEXT = """
## What a call weighs

`--max-call-weight` bounds their sum, in bytes: about what a call makes the server hold at once, with work weighed by
the bytes whose making takes as long. It is known before the engine hears of the call. A call that says no `max_tokens`
gets as many as half of the limit pays for, if the model's length allows more.

| each | weighs | besides |
|---|---|---|
"""
SECTIONS: tuple[tuple[str, str, tuple[Limit, ...]], ...] = (
    ("Heads", "Checked before the path and the key are looked at.", HEAD),
    ("Bodies", "The body is counted while it streams in, its values before it is parsed.", BODY),
    ("Generation", "Checked before tokenising. A flag with a largest value can only be made stricter.", GENERATION),
    ("Chats", "Besides them, rendering may take `--chat-template-timeout` seconds (10; status 400), and what a\n"
     "template makes on its way is bounded by what a machine can bear (`xllm/text/template_limits.py`).", CHATS),
    ("Fixed", "What the engine was built for.", FIXED),
    ("Media", "For `serving/security/media_fetch.py`. No route takes media yet; the flags come with the first.", MEDIA),
)


def render() -> str:
    """The whole page."""
    weights = "".join(f"| {what} | {weight} | {besides} |\n" for what, weight, besides in WEIGHTS)
    return TOP + "".join(_section(*section) for section in SECTIONS) + WEIGHT_TEXT + weights


def _section(title: str, text: str, limits: Iterable[Limit]) -> str:
    rows = [f"| {_name(limit)} | {_amount(limit)} | {limit.status} | {_what(limit)} |" for limit in limits]
    return f"\n## {title}\n\n{text}\n\n| limit | default | status | of |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"


def _name(limit: Limit) -> str:
    return f"`--{limit.name.replace('_', '-')}`" if limit.flag else f"`{limit.name}`"


def _amount(limit: Limit) -> str:
    for power, unit in ((20, "Mi"), (10, "Ki")):
        if limit.default >= 2**max(power, 13) and limit.default % 2**power == 0:
            return f"{limit.default >> power} {unit}"
    return str(limit.default)


def _what(limit: Limit) -> str:
    fields = [limit.field] if limit.field else []
    fields += [name for name, other in SAME_AS.items() if other == limit.name]
    text = limit.what + (f" (`{'`, `'.join(fields)}`)" if fields else "")
    return text + (f"; at most {HARD_MAXIMA[limit.name]}" if limit.name in HARD_MAXIMA else "")


def main(argv: list[str]) -> int:
    page = render()
    if "--check" in argv:
        return 0 if TARGET.is_file() and TARGET.read_text(encoding="utf-8") == page else 1
    TARGET.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
