"""One of the processes that compile kernels before they are measured. `python -m benchmarks.gpu.warm_up DEVICE PROFILE
INDEX COUNT` calls every COUNT-th micro-benchmark once, and the checks of every COUNT-th operator."""

from __future__ import annotations

import sys

import torch

from benchmarks.gpu.device import Device
from benchmarks.gpu.micro_cases import all_cases
from benchmarks.gpu.op_cases import World
from benchmarks.gpu.ops import OPERATORS
from benchmarks.gpu.profile import PROFILES


def main(kind: str, profile_name: str, index: int, count: int) -> None:
    device, profile = Device(kind), PROFILES[profile_name]
    with torch.inference_mode():
        for case in list(all_cases(device, profile, once=True))[index::count]:
            case.calls(1)[0]()
        for name in sorted(OPERATORS)[index::count]:
            for check in OPERATORS[name](World(device, seed=0, cases=profile.cases // 2, longest=1024)):
                check.run()
    device.synchronize()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
