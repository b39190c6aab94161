"""Write docs/settings.md from the config dataclasses: `python tools/gen_settings.py [--check]`."""

from __future__ import annotations

import sys
import typing
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from serving.config import ServerConfig  # noqa: E402
from serving.flags import default_text, leaf_types  # noqa: E402
from xllm.config import EngineConfig, all_options  # noqa: E402

TARGET = ROOT / "docs" / "settings.md"
HEAD = """# Settings

Made from the config dataclasses by `tools/gen_settings.py`; change them there. As a flag, `max_num_seqs` is
`--max-num-seqs` (`_` works too); booleans take `--x`, `--no-x`, `--x=true` and `--x=false`. In Python the same names go
to `LLM(...)`. The aliases are other engines' names. vLLM's `--speculative-config '{"method": "ngram", ...}'` sets the
speculative group at once.

| setting | type | default | group | what it does | aliases |
|---|---|---|---|---|---|
"""


def render() -> str:
    """The whole page."""
    rows = []
    for tree in (EngineConfig, ServerConfig):
        types = leaf_types(tree)
        for name, (group, leaf) in all_options(tree).items():
            text = leaf.metadata["help"]
            if leaf.metadata["choices"]:
                text += f" (one of {', '.join(leaf.metadata['choices'])})"
            aliases = ", ".join(f"`{alias}`" for alias in leaf.metadata["aliases"])
            rows.append(f"| `{name}` | {type_text(types[name])} | {default_text(leaf.default)} | {group} | "
                        f"{text.replace('|', chr(92) + '|')} | {aliases} |")
    return HEAD + "\n".join(rows) + "\n"


def type_text(hint: Any) -> str:
    parts = [t for t in (typing.get_args(hint) or (hint,)) if t not in (type(None), Ellipsis)]
    name = str(parts[0].__name__)
    return f"{name}, repeatable" if typing.get_origin(hint) is tuple else name


def main(argv: list[str]) -> int:
    page = render()
    if "--check" in argv:
        return 0 if TARGET.is_file() and TARGET.read_text(encoding="utf-8") == page else 1
    TARGET.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
