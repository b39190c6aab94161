"""`xllm bench serve`: load on a running server, by streaming completions."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from serving.commands.bench import report
from serving.commands.flags import FlagParser
from xllm.errors import XllmError

if TYPE_CHECKING:
    import httpx


@dataclass
class Measured:
    """One request: seconds on the perf_counter clock."""

    sent_s: float = 0.0
    token_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    error: str | None = None


def main(argv: list[str]) -> int:
    parser = FlagParser(prog="xllm bench serve", description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server")
    parser.add_argument("--api-key", help="its key")
    parser.add_argument("--num-requests", type=int, default=64)
    parser.add_argument("--request-rate", type=float, default=0.0, help="requests per second, Poisson; 0: all at once")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--json", help="write the result to this file as well")
    args = parser.parse_args(argv)
    report.check(args.json)
    result = asyncio.run(run(args))
    report.write(result, args.json)
    return 1 if result["failed"] else 0


async def run(args: argparse.Namespace) -> dict:
    """Send everything, wait for all of it, sum up."""
    from tqdm import tqdm

    rng = random.Random(0)
    prompts = [[rng.randrange(3, 1000) for _ in range(args.input_len)] for _ in range(args.num_requests)]
    async with connect(args.url.rstrip("/").removesuffix("/v1"), args.api_key) as client:
        name = await model_name(client)
        with tqdm(total=args.num_requests, desc="requests") as progress:
            began = time.perf_counter()
            measured = await send(client, name, prompts, args.output_len, rate=args.request_rate,
                                  advance=progress.update)
            elapsed = time.perf_counter() - began
    return _summary(measured, elapsed)


def connect(base_url: str, api_key: str | None) -> httpx.AsyncClient:
    """A client of any number of connections that waits for as long as it takes."""
    import httpx

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return httpx.AsyncClient(base_url=base_url, headers=headers, timeout=None,
                             limits=httpx.Limits(max_connections=None))


async def model_name(client: httpx.AsyncClient) -> str:
    """What the server's model is called. Raises XllmError."""
    import httpx

    try:
        return str((await client.get("/v1/models")).raise_for_status().json()["data"][0]["id"])
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError) as error:
        raise XllmError(f"{str(client.base_url).rstrip('/')}/v1/models does not answer as it should: {error}") from None


async def send(client: httpx.AsyncClient, model: str, prompts: Iterable[list[int]], num_tokens: int, *,
               rate: float = 0.0, advance: Callable[[int], object] = lambda number: None) -> list[Measured]:
    """Each prompt as a streamed completion of num_tokens, whatever end tokens come; waits for all of them.

    rate: requests per second, Poisson; 0: all at once. advance: called with 1 as each one ends.
    """
    rng, tasks = random.Random(0), []
    for prompt in prompts:
        body = {"model": model, "prompt": prompt, "stream": True, "max_tokens": num_tokens, "temperature": 0,
                "ignore_eos": True, "stream_options": {"include_usage": True}}
        tasks.append(asyncio.create_task(_one(client, body, advance)))
        if rate:
            await asyncio.sleep(rng.expovariate(rate))
    return await asyncio.gather(*tasks)


async def _one(client: httpx.AsyncClient, body: dict, advance: Callable[[int], object]) -> Measured:
    import httpx

    m = Measured(sent_s=time.perf_counter())
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                m.error = f"{response.status_code}: {(await response.aread()).decode()[:200]}"
            async for line in response.aiter_lines():
                _take_event(m, line)
    except httpx.HTTPError as error:
        m.error = f"{type(error).__name__}: {error}"
    advance(1)
    return m


def _take_event(m: Measured, line: str) -> None:
    if not line.startswith("data: ") or line == "data: [DONE]":
        return
    event = json.loads(line.removeprefix("data: "))
    if "error" in event:
        m.error = event["error"]["message"]
    if event.get("choices"):
        m.token_s.append(time.perf_counter())
    if event.get("usage"):
        m.num_tokens = event["usage"]["completion_tokens"]


def _summary(measured: list[Measured], elapsed: float) -> dict:
    good = [m for m in measured if m.error is None and m.token_s]
    errors = sorted({m.error for m in measured if m.error is not None})
    result = {"requests": len(measured), "failed": len(measured) - len(good), "errors": errors[:5],
              "seconds": elapsed, "output_tokens_per_s": sum(m.num_tokens for m in good) / elapsed}
    if good:
        result["time_to_first_token_ms"] = report.quantiles([(m.token_s[0] - m.sent_s) * 1e3 for m in good])
        result["time_per_output_token_ms"] = report.quantiles(
            [(m.token_s[-1] - m.token_s[0]) / max(1, m.num_tokens - 1) * 1e3 for m in good])
    return result
