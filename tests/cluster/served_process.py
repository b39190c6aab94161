"""`python -m tests.cluster.served_process PORT PUBLIC SECRET`: an embedded store, served, in a process of its own."""

from __future__ import annotations

import asyncio
import sys

from serving.cluster.embedded import EmbeddedStore
from serving.cluster.store_server import StoreKey, StoreServer


async def main(port: int, key: StoreKey) -> None:
    server = StoreServer(EmbeddedStore(), port=port, key=key)
    print("serving", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.close()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), StoreKey(sys.argv[2].encode(), sys.argv[3].encode())))
