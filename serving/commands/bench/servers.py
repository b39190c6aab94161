"""`xllm serve` processes of a benchmark, on free ports: started as users start them, driven over HTTP."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from serving.commands.bench.serve_bench import connect, model_name, send
from serving.commands.run_batch import own_server
from xllm.errors import XllmError

# As `XllmEngine` has them; a random checkpoint has no tokenizer.
FLAGS = ["--skip-tokenizer-init", "--quantization", "w8a8", "--max-model-len", "2304", "--max-num-seqs", "32",
         "--no-enable-prefix-caching"]


class Servers:
    """So many servers of one checkpoint, each of which has answered; they end with the stack.

    threads: of each (`--num-threads`); None: as many as it takes by itself.
    """

    def __init__(self, folder: Path, number: int, threads: int | None, stack: ExitStack):
        flags = [str(folder), *FLAGS, *([] if threads is None else ["--num-threads", str(threads)])]
        with ThreadPoolExecutor(number) as pool:
            self._addresses = list(pool.map(lambda _: stack.enter_context(own_server(flags)), range(number)))
        self.rates([[1] * 8], 2, number)  # a first step compiles and touches memory

    def rates(self, prompts: list[list[int]], num_tokens: int, number: int) -> list[float]:
        """Generated tokens per second, prompts and HTTP included, of each of the first `number` servers.

        Each gets all prompts, streamed and at once, and all servers get theirs at the same time.
        """
        return asyncio.run(self._rates(prompts, num_tokens, number))

    async def _rates(self, prompts: list[list[int]], num_tokens: int, number: int) -> list[float]:
        return await asyncio.gather(*(_rate(*address, prompts, num_tokens) for address in self._addresses[:number]))


async def _rate(url: str, key: str, prompts: list[list[int]], num_tokens: int) -> float:
    async with connect(url, key) as client:
        name = await model_name(client)
        began = time.perf_counter()
        measured = await send(client, name, prompts, num_tokens)
        seconds = time.perf_counter() - began
    if wrong := [m.error or f"{m.num_tokens} tokens" for m in measured if m.error or m.num_tokens != num_tokens]:
        raise XllmError(f"a server did not generate {num_tokens} tokens, but: {wrong[0]}")
    return len(prompts) * num_tokens / seconds
