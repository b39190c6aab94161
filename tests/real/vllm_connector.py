"""`python -m tests.real.vllm_connector [VLLM]`: our KV store inside a real `vllm serve` on the CPU: what one process
has computed the next one loads, and a damaged block is computed again. VLLM: the command, if there is one; else vLLM is
installed for the run."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.real.foreign import Foreign
from tests.real.vllm_process import BLOCK_SIZE, MODEL, VllmProcess
from tests.serving.server_process import ROOT

NUM_PROMPTS, PROMPT_CHARS, MIN_SHARE = 12, 900, 0.9
ENV = {"PYTHONPATH": str(ROOT)}  # xllm is not installed beside vLLM
# Of all layers of the bundled model: keys and values of two heads, each of 64 numbers of four bytes.
BLOCK_BYTES = 6 * BLOCK_SIZE * 2 * 2 * 64 * 4
Answers = list[dict[str, Any]]


def prompts() -> list[str]:
    """Of different text, each of several blocks."""
    texts = [path.read_text() for path in sorted((ROOT / "xllm" / "kv").glob("*.py"))]
    return [text[:PROMPT_CHARS] for text in texts if len(text) > PROMPT_CHARS][:NUM_PROMPTS]


def transfer(folder: Path, **changes: Any) -> tuple[str, str]:
    config = {"kv_connector": "XllmConnector", "kv_connector_module_path": "xllm.integrations.vllm",
              "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
              "kv_connector_extra_config": {"folder": str(folder), "size": "1GiB"}, **changes}
    return "--kv-transfer-config", json.dumps(config)


def ask(server: VllmProcess, texts: list[str], **wishes: Any) -> Answers:
    """Of all of them at once."""
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda text: server.complete(text, **wishes), texts))


def tokens(answers: Answers) -> list[list[int]]:
    return [answer["choices"][0]["token_ids"] for answer in answers]


def num_cached(answers: Answers) -> int:
    """Blocks that did not have to be computed."""
    details = [answer["usage"]["prompt_tokens_details"] or {} for answer in answers]
    return sum((one.get("cached_tokens") or 0) // BLOCK_SIZE for one in details)


def num_damaged(server: VllmProcess) -> int:
    """Requests that met a block that could not be loaded: vLLM counts it as cached all the same."""
    return server.log.read_text().count("are damaged or gone")


def num_blocks(answers: Answers) -> int:
    """That could be found: a token of each prompt has to be computed."""
    return sum((answer["usage"]["prompt_tokens"] - 1) // BLOCK_SIZE for answer in answers)


def damage(folder: Path, every: int) -> int:
    """Change a byte within every so many bytes of all files; returns how many bytes are changed."""
    num_changed = 0
    for file in folder.rglob("*.kv"):
        data = bytearray(file.read_bytes())
        for place in range(every // 2, len(data), every):
            data[place] ^= 0xFF
            num_changed += 1
        file.write_bytes(data)
    return num_changed


def refused(command: Path, folder: Path, named: str, **changes: Any) -> None:
    """vLLM does not start, and says why."""
    _, config = transfer(folder, **changes)
    log = folder.parent / "refused.log"
    with log.open("wb") as out:
        status = subprocess.run(
            [command, "serve", MODEL, "--max-model-len", "512", "--dtype", "float32", "--enforce-eager", "--port", "0",
             "--block-size", str(BLOCK_SIZE), "--kv-transfer-config", config],
            cwd=folder.parent, stdout=out, stderr=out, timeout=300, env=VllmProcess.environment(ENV)).returncode
    assert status != 0 and named in log.read_text(), log.read_text()[-3000:]


def run(command: Path, folder: Path, *flags: str) -> None:
    texts, store = prompts(), folder / "store"
    with VllmProcess(command, folder / "plain.log", *flags, env=ENV) as plain:
        expected = ask(plain, texts)
    total = num_blocks(expected)
    with VllmProcess(command, folder / "first.log", *flags, *transfer(store), env=ENV) as first:
        answers = ask(first, texts)
        assert tokens(answers) == tokens(expected) and num_cached(answers) == 0
    print(f"the first computed {total} blocks of {len(texts)} prompts, and answers as vLLM does alone", flush=True)
    with VllmProcess(command, folder / "second.log", *flags, *transfer(store), env=ENV) as second:
        salted = ask(second, texts[:2], cache_salt="tenant")
        assert num_cached(salted) == 0 and tokens(salted) == tokens(expected[:2])
        answers = ask(second, texts)
        hits = second.metric("vllm:external_prefix_cache_hits_total")
        assert tokens(answers) == tokens(expected) and num_cached(answers) >= MIN_SHARE * total, num_cached(answers)
        assert hits == num_cached(answers) * BLOCK_SIZE and num_damaged(second) == 0, (hits, num_cached(answers))
    print(f"the second found {num_cached(answers)} of them in the store, and its tokens are the same; with a salt none",
          flush=True)
    num_changed = damage(store, 5 * BLOCK_BYTES)
    with VllmProcess(command, folder / "third.log", *flags, *transfer(store), env=ENV) as third:
        answers = ask(third, texts)
        assert tokens(answers) == tokens(expected) and num_damaged(third) > 0
    print(f"{num_changed} blocks were damaged: the third met some in {num_damaged(third)} prompts, and its tokens are "
          "the same", flush=True)
    reads = transfer(store, kv_role="kv_consumer")
    with VllmProcess(command, folder / "fourth.log", *flags, *reads, env=ENV) as fourth:
        answers = ask(fourth, texts)
        assert tokens(answers) == tokens(expected) and num_cached(answers) >= MIN_SHARE * total
        assert num_damaged(fourth) == 0
    print(f"a fourth that only reads found {num_cached(answers)}: the damaged ones were replaced", flush=True)
    refused(command, store, "kv_load_failure_policy", kv_load_failure_policy="fail")
    print("without kv_load_failure_policy recompute vLLM does not start, and says so", flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="xllm-real-") as name:
        run(Path(sys.argv[1]) if len(sys.argv) > 1 else Foreign(Path(name)).vllm_server(), Path(name), *sys.argv[2:])
