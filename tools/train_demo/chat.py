"""ChatML: its special tokens, its template, and conversations rendered in it."""

from __future__ import annotations

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = [END_OF_TEXT, IM_START, IM_END]

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- elif message['content'] %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'text' %}
                {{- part['text'] }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

Exchange = tuple[str, str]  # a user's turn and the assistant's answer


def render_conversation(exchanges: list[Exchange], system: str | None) -> str:
    """Render turns in ChatML, as the chat template does."""
    messages = [("system", system)] if system else []
    for question, answer in exchanges:
        messages += [("user", question), ("assistant", answer)]
    return "".join(f"{IM_START}{role}\n{content}{IM_END}\n" for role, content in messages)
