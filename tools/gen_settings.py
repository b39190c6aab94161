"""Write docs/settings.md from the config dataclasses and docs/flags.md from the table of other engines' flags:
`python tools/gen_settings.py [--check]`."""

from __future__ import annotations

import dataclasses
import sys
import typing
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from serving.commands.flags import default_text, leaf_types  # noqa: E402
from serving.config import ServerConfig  # noqa: E402
from serving.master_config import NOT_OF_A_MASTER, MasterConfig  # noqa: E402
from xllm.config import EngineConfig  # noqa: E402
from xllm.foreign.flag import ForeignFlag  # noqa: E402
from xllm.foreign.upstream import UPSTREAM_ENGINE, UPSTREAM_SERVER  # noqa: E402
from xllm.foreign.vllm_engine import VLLM_ENGINE  # noqa: E402
from xllm.foreign.vllm_server import VLLM_SERVER  # noqa: E402
from xllm.setting_tree import all_options  # noqa: E402

SETTINGS_PAGE = ROOT / "docs" / "settings.md"
FLAGS_PAGE = ROOT / "docs" / "flags.md"
HEAD = """# Settings

Made from the config dataclasses by `tools/gen_settings.py`; change them there. As a flag, `max_num_seqs` is
`--max-num-seqs` (`_` works too); booleans take `--x`, `--no-x`, `--x=true` and `--x=false`. In Python the same names go
to `LLM(...)`. The aliases are other engines' names; [flags](flags.md) says what becomes of their other
flags. vLLM's `--speculative-config '{"method": "ngram", ...}'` sets the speculative group at once.

| setting | type | default | group | what it does | aliases |
|---|---|---|---|---|---|
"""


FLAGS_HEAD = """# Flags of other engines

Made from `xllm/foreign/` by `tools/gen_settings.py`; change it there. `xllm serve` judges every flag below, in either
spelling, and `LLM(...)`, `xllm generate` and `xllm chat` those of the engine:

- **accepted**: it sets what the second column names, with the same meaning but for the remark;
- **ignored**: answers are the same without it. The start goes on, and says once why it has no effect;
- **refused**: the start ends with the reason, for it would not do what was asked. Values that ask for what is done
  anyway are taken.

A flag that is in no list is unknown, and ends the start as well. Flags that take several values after one name in vLLM
(`--api-key`, `--served-model-name`, `--lora-modules`) are given once a value. Of its short flags `-tp`, `-pp`, `-dp`,
`-q`, `-O`, `-cc` and `-asc` are known.
"""


def render_flags() -> str:
    """docs/flags.md."""
    options = {**all_options(EngineConfig), **all_options(ServerConfig)}
    aliases = {alias: name for name, (_, leaf) in options.items() for alias in leaf.metadata["aliases"]}
    page = [FLAGS_HEAD]
    vllm = {entry.name for entry in (*VLLM_ENGINE, *VLLM_SERVER)}
    for title, table, more in (("vLLM: the engine", VLLM_ENGINE, ()), ("vLLM: the server", VLLM_SERVER, ()),
                               ("xLLM in C++", (*UPSTREAM_ENGINE, *UPSTREAM_SERVER), sorted(aliases.keys() - vllm))):
        counts = {verdict: sum(entry.verdict == verdict for entry in table) for verdict in
                  ("accepted", "ignored", "refused")}
        page.append(f"\n## {title}\n\n{counts['accepted'] + len(more)} accepted, {counts['ignored']} ignored, "
                    f"{counts['refused']} refused.\n")
        page.append("| accepted | sets | remark |\n| --- | --- | --- |")
        page += [f"| `{entry.flag}` | `--{(entry.ours or aliases.get(entry.name, entry.name)).replace('_', '-')}` | "
                 f"{cell(entry.note)} |" for entry in table if entry.verdict == "accepted"]
        page += [f"| `--{alias.replace('_', '-')}` | `--{aliases[alias].replace('_', '-')}` | |" for alias in more]
        page.append("\n| ignored | why nothing is lost |\n| --- | --- |")
        page += [f"| `{entry.flag}` | {cell(entry.note)}{only(entry)} |" for entry in table
                 if entry.verdict == "ignored"]
        page.append("\n| refused | why, and what to do | but taken |\n| --- | --- | --- |")
        page += [f"| `{entry.flag}` | {cell(entry.note)} | {taken(entry)} |" for entry in table
                 if entry.verdict == "refused"]
    return "\n".join(page) + "\n"


def only(entry: ForeignFlag) -> str:
    return f"; `--no-{entry.flag[2:]}` is refused" if entry.only else ""


def taken(entry: ForeignFlag) -> str:
    if entry.takes == "switch":
        return f"`--no-{entry.flag[2:]}`"
    return ", ".join(f"`{cell(word)}`" if word else "an empty text" for word in entry.unless)


def cell(text: str) -> str:
    return text.replace("|", "\\|")


MASTER_HEAD = """
## `xllm master`

It takes the settings of the groups http, log, limits, chat, resilience and connections above, but for {left_out}, which
are an engine's; what follows is its own, or has another default.

| setting | type | default | group | what it does | aliases |
|---|---|---|---|---|---|
"""


def render() -> str:
    """docs/settings.md."""
    server = all_options(ServerConfig)
    own = {name: found for name, found in all_options(MasterConfig).items()
           if found[0] == "master" or _said(found[1]) != _said(server[name][1])}
    left_out = ", ".join(f"`{name}`" for name in NOT_OF_A_MASTER)
    return (HEAD + table(EngineConfig, all_options(EngineConfig)) + table(ServerConfig, server)
            + MASTER_HEAD.format(left_out=left_out) + table(MasterConfig, own))


def _said(leaf: dataclasses.Field) -> tuple[Any, ...]:
    return leaf.default, leaf.metadata["help"], leaf.metadata["aliases"]


def table(tree: type, options: dict[str, tuple[str, dataclasses.Field]]) -> str:
    """Rows of settings of a tree."""
    rows = []
    types = leaf_types(tree)
    for name, (group, leaf) in options.items():
        text = leaf.metadata["help"]
        if leaf.metadata["choices"]:
            text += f" (one of {', '.join(leaf.metadata['choices'])})"
        aliases = ", ".join(f"`{alias}`" for alias in leaf.metadata["aliases"])
        rows.append(f"| `{name}` | {type_text(types[name])} | {default_text(leaf.default)} | {group} | "
                    f"{text.replace('|', chr(92) + '|')} | {aliases} |")
    return "\n".join(rows) + "\n"


def type_text(hint: Any) -> str:
    parts = [t for t in (typing.get_args(hint) or (hint,)) if t not in (type(None), Ellipsis)]
    name = str(parts[0].__name__)
    return f"{name}, repeatable" if typing.get_origin(hint) is tuple else name


def main(argv: list[str]) -> int:
    pages = {SETTINGS_PAGE: render(), FLAGS_PAGE: render_flags()}
    if "--check" in argv:
        fresh = (path.is_file() and path.read_text(encoding="utf-8") == page for path, page in pages.items())
        return 0 if all(fresh) else 1
    for path, page in pages.items():
        path.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
