"""CPU time of a client's process for each request and each streamed token, over TCP and over the engine's own sockets:
`python -m benchmarks.cpu.remote_client [--json FILE]`.

`RemoteClient`, itself and as the only instance of a `ClusterClient`, asks a real `xllm serve --cluster-listen` process
with the bundled model, `ProcessClient` an engine of its own. Every delta is read from its stream, nothing is made of
it. A request's share is measured with requests of one token, a token's with requests of many, at several numbers of
open requests: what one step brings comes in one frame.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serving.commands.bench import report
from xllm import env
from xllm.client.cluster import ClusterClient
from xllm.client.cluster_keys import cluster_keys
from xllm.client.engine_client import EngineClient
from xllm.client.process import ProcessClient
from xllm.client.remote import RemoteClient
from xllm.config import EngineConfig
from xllm.request import Request, SamplingParams
from xllm.token_ids import token_array

SETTINGS: dict[str, Any] = {"device": "cpu", "max_model_len": 512, "max_num_seqs": 256, "num_kv_blocks": 8192}
OPEN = (1, 16, 64, 256)
NUM_TOKENS = 96
PROMPT = token_array(range(5, 37))
START_S = 60.0
Seconds = Callable[[], float]


async def ask(client: EngineClient, num_open: int, num_requests: int, num_tokens: int) -> None:
    """Have so many requests open until all are done."""
    sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True, seed=1)
    names = iter(range(num_requests))

    async def one_after_the_other() -> None:
        for name in names:
            request = Request(request_id=f"{num_open}-{num_tokens}-{name}", prompt_token_ids=PROMPT, sampling=sampling)
            stream = client.submit([request])
            while await stream.next():
                pass

    await asyncio.gather(*(one_after_the_other() for _ in range(num_open)))


async def measure(client: EngineClient, clocks: dict[str, Seconds]) -> list[dict[str, float]]:
    """Microseconds of CPU time a request and a token, by each of the clocks."""
    await ask(client, 16, 32, 16)
    rows = []
    for num_open in OPEN:
        row: dict[str, float] = {"open_requests": num_open}
        spent = []
        for num_requests, num_tokens in ((max(200, 4 * num_open), 1), (max(8, 2 * num_open), NUM_TOKENS)):
            before = {name: clock() for name, clock in clocks.items()}
            await ask(client, num_open, num_requests, num_tokens)
            spent.append({name: (clock() - before[name]) / num_requests * 1e6 for name, clock in clocks.items()})
        for name in clocks:
            row[f"{name}_us_a_request"] = round(spent[0][name], 1)
            row[f"{name}_us_a_token"] = round((spent[1][name] - spent[0][name]) / (NUM_TOKENS - 1), 2)
        report.note(str(row))
        rows.append(row)
    return rows


async def over_tcp() -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Of a client, and of a cluster's client over that one."""
    secret = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder) / "secret", Path(folder) / "log"
        file.touch(0o600)
        file.write_text(secret)
        flags = [word for name, value in SETTINGS.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        with log.open("wb") as out:
            server = subprocess.Popen(
                [sys.executable, "-m", "serving", "serve", "--port", "0", "--cluster-listen", "127.0.0.1:0",
                 "--cluster-secret-file", str(file), *flags], stdout=out, stderr=out, env=env.for_child())
        try:
            deadline_s = time.monotonic() + START_S
            while (found := re.search(r"answers the cluster at (\S+:\d+)", log.read_text())) is None:
                if server.poll() is not None or time.monotonic() > deadline_s:
                    raise OSError(f"the server did not start: {log.read_text()}")
                await asyncio.sleep(0.1)
            client = RemoteClient(found[1], cluster_keys(secret.encode()))
            await client.connect()
            rows = await measure(client, {"client": time.process_time, "front": lambda: cpu_s(server.pid)})
            cluster = ClusterClient()
            cluster.join("only", client)
            through = await measure(cluster, {"client": time.process_time})
            await cluster.close()
            client.close()
            return rows, through
        finally:
            server.terminate()
            server.wait(30)


def cpu_s(pid: int) -> float:
    """Of a process, by itself and for it, so far (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def over_own_sockets() -> list[dict[str, float]]:
    client = ProcessClient(EngineConfig.from_flat(**SETTINGS))
    await client.start()
    try:
        return await measure(client, {"client": time.process_time})
    finally:
        await client.shutdown()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write the result to this file, too")
    given = parser.parse_args()
    report.check(given.json)
    remote, cluster = asyncio.run(over_tcp())
    result = {"benchmark": "remote client", "tokens_a_request": NUM_TOKENS,
              "remote": remote, "cluster": cluster, "process": asyncio.run(over_own_sockets())}
    report.write(result, given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
