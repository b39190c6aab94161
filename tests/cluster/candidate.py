"""`python -m tests.cluster.candidate ETCD_URL KEY LEASE_S`: campaigns in a process of its own, and says how it goes."""

from __future__ import annotations

import asyncio
import sys

from serving.cluster.election import Election
from serving.cluster.etcd_link import open_etcd
from serving.cluster.etcd_settings import EtcdSettings
from serving.cluster.key_value import Write


async def main(url: str, key: bytes, lease_s: int) -> None:
    async with open_etcd(EtcdSettings(addresses=(url,))) as store:
        won = await Election(store, key, b"candidate", lease_s=lease_s).campaign()
        print("won", won.token, flush=True)
        while True:
            await asyncio.to_thread(sys.stdin.readline)  # one line, one look
            # First what it knows without asking anybody.
            knows = won.is_current
            print(knows, (await store.commit((won.guard,), (Write(b"by-leader", b"x"),))).succeeded, flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2].encode(), int(sys.argv[3])))
