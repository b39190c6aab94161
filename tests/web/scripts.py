"""What the models of these tests say to the page."""

from __future__ import annotations

# The bundled model says these when a choice of one text is all that it has.
ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)><iframe srcdoc='<script>alert(1)</script>'></iframe>",
    "[click](javascript:alert(1)) [data](data:text/html,<script>alert(1)</script>)",
    "[x](https://example.com/\"onmouseover=alert(1)//)",
    "[a]( javascript:alert(1)) [b](\tjavascript:alert(1)) [c](JaVaScRiPt://%0aalert(1)) [d](//evil.example/)",
    "```\"><script>alert(1)</script>\n</code></pre><img src=x onerror=alert(1)>\n```",
    "![image](https://evil.example/pixel.png) <a href='javascript:alert(1)'>x</a>",
    "**<b onclick=alert(1)>bold</b>** `<script>alert(1)</script>`",
    "# <style>@import 'https://evil.example'</style>\n> <base href=https://evil.example>\n- <meta http-equiv=refresh>",
    "| <img src=x onerror=alert(1)> | b |\n| --- | --- |\n| [x](vbscript:alert) | c |",
]
EVERYTHING = ("# Head\n\nText, `code` and a [link](https://example.com).\n\n> quoted\n\n```py\nx = 1\n```\n\n"
              "| a | b |\n| --- | --- |\n| 1 | 2 |\n\n1. one\n2. two\n   - inner\n\nend")
WIDE = ("word" * 60 + "\n\n```\n" + "x" * 300 + "\n```\n\n| " + "cell " * 60 + "|\n| --- |\n| b |\n\nend")
EVIL = "<img src=x onerror=alert(1)>"

# The scripted model says these, with reasoning and tool calls as Qwen's models write them.
SCRIPTS = {
    "evil": f'<think>\n{EVIL}\n</think>\n<tool_call>\n{{"name": "weather", "arguments": {{"city": "{EVIL}"}}}}\n'
            "</tool_call>",
    "agent": "<think>\nI should look it up.\n</think>\n\nOne moment.\n"
             '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>\n'
             '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>',
    "after": "It rains.",
}
TOOLS = """[
  {"type": "function", "function": {"name": "weather", "parameters": {"type": "object",
    "properties": {"city": {"type": "string"}}}}},
  {"type": "function", "function": {"name": "time"}}
]"""
TEMPLATE = "{%- for message in messages %}{{- message.content }}{% endfor %}"
