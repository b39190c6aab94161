"""Scheduler and engine reach the KV cache through `KVManager` alone, and need not know what stands below the device."""

import ast
from pathlib import Path

import numpy as np
import pytest

import xllm
from xllm.kv.kv_source import NO_EXTENSION, KVSource, NoSource
from xllm.kv.manager import KVManager
from xllm.kv.moves import LOAD
from xllm.kv.tiers import TieredStore

ROOT = Path(xllm.__file__).parent
BENEATH = {"pool", "source", "tiers", "board", "loader", "stager", "saver", "writer", "lanes", "moves"}


def kv_members(path: Path) -> list[tuple[int, str]]:
    """(line, member) of everything that a file takes from something called `kv` or `_kv`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            owner = node.value
            name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
            if name in ("kv", "_kv"):
                found.append((node.lineno, node.attr))
    return found


@pytest.mark.parametrize("folder", ["scheduler", "engine"])
def test_nothing_beneath_the_manager_is_used(folder):
    members = [(path.name, line, member) for path in sorted((ROOT / folder).glob("*.py"))
               for line, member in kv_members(path)]
    assert len(members) > 5
    assert [found for found in members if found[2] in BENEATH or found[2].startswith("_")] == []


def test_every_member_that_they_use_is_there():
    kv = KVManager(num_blocks=4, block_size=2, num_rows=1, max_tokens_per_row=8)
    for folder in ("scheduler", "engine"):
        for path in (ROOT / folder).glob("*.py"):
            for line, member in kv_members(path):
                assert hasattr(kv, member), f"{path.name}:{line}"


def members_of(protocol: type) -> set[str]:
    return {name for name in (*vars(protocol), *protocol.__annotations__) if not name.startswith("_")}


@pytest.mark.parametrize("source", [NoSource, TieredStore])
def test_the_sources_have_all_that_the_protocol_asks_for(source):
    assert {name for name in members_of(KVSource) if not hasattr(source, name)} == set()


def test_without_a_source_nothing_is_found_nothing_moves_and_nothing_is_waited_for():
    kv = KVManager(num_blocks=4, block_size=2, num_rows=1, max_tokens_per_row=8)
    tokens = np.arange(6, dtype=np.int32)
    match = kv.lookup(tokens, "")
    assert not kv.has_tiers and not kv.can_stage
    assert kv.extend(match, tokens) is NO_EXTENSION and kv.extend(match, tokens).on_host(0) == 0
    assert kv.num_loading == 0 and kv.open_tickets(np.arange(4)) == () and not kv.is_loading((1,))
    assert kv.load_s(1) == kv.swap_s(1) == kv.source.move_s(LOAD, 1) == float("inf")
    assert kv.poll(1.0) == 0 and not kv.wait(1.0) and kv.idle_s(1.0) is None
    assert kv.source_stats({}).kv_tiers == {}
    with pytest.raises(AssertionError):
        kv.load(0, match, NO_EXTENSION, 0)
    kv.close(1.0)
