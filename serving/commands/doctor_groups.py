"""Which groups of ranks this machine can form, as findings of `xllm doctor`."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from serving.commands.finding import HINT, MISSING, OK, Finding
from xllm import env
from xllm.child_process import run_module
from xllm.errors import ConfigError, XllmError

NUM_RANKS = 2  # that are tried
TRY_S = 90.0  # for them to meet and exchange. Chosen: their own limits, and torch's import
MOST_RANKS = 16  # that are looked at for a model


def group_findings(num_cores: int, devices: list[str],
                   probe_group: Callable[[str], dict[str, Any]]) -> Iterator[Finding]:
    """num_cores: for ranks on the CPU. devices: the accelerators that open here. probe_group: what their ranks would
    exchange by (`backends/probe.py:describe_group`)."""
    yield _cpu_group(num_cores)
    for name in devices:
        found = probe_group(name)
        if "problem" in found:
            yield Finding(MISSING, f"{name} group", found["problem"])
            continue
        most = found["devices"]
        detail = f"{most} devices, so up to {most} ranks, by {found['library']}" if most > 1 else "1 device: no group"
        small = f"; small sums: {found['small']}" if found["small"] and most > 1 else ""
        yield Finding(OK if most > 1 else HINT, f"{name} group", detail + small)
    yield from _variables()


def model_findings(model: str) -> Iterator[Finding]:
    """How many ranks can share the model in a local folder."""
    from xllm.models.model_registry import read_model_config

    folder = Path(model).expanduser()
    if not folder.is_dir():
        yield Finding(MISSING, "model", f"{model} is no folder here; nothing is fetched to look at it")
        return
    try:
        config = read_model_config(folder)
    except XllmError as error:
        yield Finding(MISSING, "model", str(error))
        return
    sizes, refusals = [], []
    for size in range(1, MOST_RANKS + 1):
        try:
            config.check_shared(size)
            sizes.append(str(size))
        except ConfigError as error:
            refusals.append(str(error))
    why = f" ({refusals[0]})" if refusals else ""
    yield Finding(OK if len(sizes) > 1 else HINT, "tensor_parallel_size", f"of {model}: {', '.join(sizes)}{why}")


def _cpu_group(num_cores: int) -> Finding:
    answer = try_group()
    if "problem" in answer:
        return Finding(MISSING, "cpu group", f"{NUM_RANKS} ranks cannot exchange: {answer['problem']}")
    return Finding(OK, "cpu group", f"{NUM_RANKS} ranks by gloo over {answer['interface'] or 'its own choice'}: "
                                    f"16 KiB take {answer['exchange_s'] * 1e6:.0f} us; they share {num_cores} cores")


def try_group() -> dict[str, Any]:
    """Have real processes meet and exchange (`xllm/parallel/group_trial.py`); returns what rank 0 says, or {"problem":
    why they cannot}."""
    with tempfile.TemporaryDirectory(prefix="xllm-group-") as folder:
        command = [sys.executable, "-W", "ignore", *run_module("xllm.parallel.group_trial")]
        ranks = [subprocess.Popen([*command, str(rank), str(NUM_RANKS), f"file://{folder}/store"], text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE) for rank in range(NUM_RANKS)]
        texts = []
        try:
            for rank in ranks:
                texts.append(rank.communicate(timeout=TRY_S))
        except subprocess.TimeoutExpired:
            return {"problem": f"no answer within {TRY_S:.0f} s"}
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    for number, (rank, (_, errors)) in enumerate(zip(ranks, texts)):
        if rank.returncode:
            return {"problem": f"rank {number}: {(errors.strip() or 'no message').splitlines()[-1]}"}
    answer: dict[str, Any] = json.loads(texts[0][0])
    return answer


def _variables() -> Iterator[Finding]:
    """What the environment says of exchanges."""
    found = env.exchange_variables()
    if found:
        detail = ", ".join(f"{name}={value}" for name, value in found.items())
        if env.hccl_runs_on_vector_cores():
            yield Finding(HINT, "exchanges", f"{detail}: AIV goes with --graph-mode off only")
        else:
            yield Finding(OK, "exchanges", detail)
