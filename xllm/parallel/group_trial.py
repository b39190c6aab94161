"""`python -m xllm.parallel.group_trial RANK SIZE STORE`: joins a group of processes on the CPU and times an exchange;
rank 0 reports as one line of JSON. For `xllm doctor`."""

from __future__ import annotations

import json
import sys
import time
from statistics import median

import torch

from backends.cpu.cpu import CpuBackend
from xllm import env
from xllm.parallel.groups import open_group

MEET_S = 60.0  # for the other. Chosen: a slow disk takes that long to give torch
EXCHANGE_S = 10.0  # for one exchange, which takes well below a millisecond. Chosen: a busy machine
NUM_BYTES = 16 << 10  # of an exchange. Chosen: a decode step of a few sequences
NUM_EXCHANGES = 50  # Chosen: done at once, and enough for a median


def main(argv: list[str]) -> int:
    rank, size, store = int(argv[0]), int(argv[1]), argv[2]
    env.keep_exchanges_local()
    torch.set_num_threads(1)
    group = open_group(CpuBackend(compiled=False), rank=rank, size=size, store=store, timeout_s=EXCHANGE_S,
                       meet_s=MEET_S)
    x, taken_s = torch.ones(NUM_BYTES // 4), []
    for _ in range(NUM_EXCHANGES):
        began_s = time.monotonic()
        group.all_reduce(x.fill_(1.0))
        taken_s.append(time.monotonic() - began_s)
    assert x.tolist() == [float(size)] * len(x)
    group.close()
    if rank == 0:
        print(json.dumps({"interface": env.exchange_interface(), "exchange_s": median(taken_s)}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
