"""`python -m tests.cuda.aot`: every kernel with every entry of the config table, compiled without a device.

The operators themselves are called, with tensors on the CPU, so that what is compiled is what would be launched. Each
(operator, architecture) has a process of its own, which a failed assertion in the compiler would end. Of every kernel:
registers without spills, no local memory, shared memory within the device's; of those that promise it, more than one
buffer for keys and values or weights, copies of 16 bytes into them (of 4 for scales), and Hopper's warp-group
instructions; of those that may start early, that they touch no memory before they have waited. What the table has no
number for today (`ALTERNATIVES`) is compiled as well, so that a measurement on a device can choose it.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.cuda.aot_cases import OPERATORS

ROOT = Path(__file__).parents[2]
# Compute capability, multiprocessors, bytes of shared memory a program may have. Ampere's are those of its smaller
# devices (8.6, 8.9), so that every table entry runs on all of them.
DEVICES = {"sm80": (80, 108, 101_376), "sm90": (90, 132, 232_448)}
ALTERNATIVES: dict[str, list[dict[str, int]]] = {"sm80": [{}], "sm90": [{}, {"PDL": 1}]}
GROUPED = ("grouped_linear_kernel", "grouped_w8a8_kernel")
MEMORY = re.compile(r"\b(?:ld|st|atom|red)\.(?!param|shared)|cp\.async|\bcp\.reduce")
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
SECONDS = 600


class Device:
    """A driver of nothing, from which the compiler learns what to compile for."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def resources(cubin: bytes) -> dict[str, int]:
    """Of one kernel: registers, and bytes of stack and local memory."""
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = RESOURCES.search(text)
    assert found, text
    return dict(zip(("registers", "stack", "static", "local"), map(int, found.groups())))


def num_buffers(ttgir: str) -> int:
    """The fewest buffers of what a pipelined loop loads; 0 without one. A buffer is the outer axis of an allocation."""
    shapes = re.findall(r"ttg\.local_alloc : \(\) -> !ttg\.memdesc<([\dx]+)x[a-z]", ttgir)
    counts = [int(shape.split("x")[0]) for shape in shapes if shape.count("x") == 2]
    return min(counts, default=0)


def examine(kernel: Any, name: str, case: str, arch: str) -> dict[str, Any]:
    """One line of the report; `faults` is empty if all is as promised."""
    used = resources(kernel.asm["cubin"])
    shared, buffers = kernel.metadata.shared, num_buffers(kernel.asm["ttgir"])
    half, of_latents = "float32" not in case, name in ("latent_decode_kernel", "latent_prefill_kernel")
    walks = of_latents or name in ("decode_kernel", "prefill_kernel", "latent_expanded_kernel", *GROUPED)
    # Not: entries of "any", blocks that are smaller than tiles, scales of single numbers.
    in_table = not any(words in case for words in ("P16", "H80", "runs of 40"))
    faults = [f"{key} {used[key]} B" for key in ("stack", "local") if used[key]]
    if shared > DEVICES[arch][2]:
        faults.append(f"shared {shared} B of {DEVICES[arch][2]}")
    if walks and half and in_table and buffers < 2:
        faults.append(f"{buffers} buffers for what the loop reads")
    copies = set(re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*?, 0x(\w+)", kernel.asm["ptx"]))
    expected = {"10", "4"} if "KV" in case else {"10"}  # scales by words
    if (of_latents and "KV" in case) or (name == "latent_expanded_kernel" and "192+64" in case):
        copies -= {"8"}  # the rotated part has few bytes for so many threads
    if walks and half and in_table and copies != expected:
        faults.append(f"copies of {sorted(copies)} bytes (hexadecimal) instead of {sorted(expected)}")
    wgmma = "wgmma.mma_async" in kernel.asm["ptx"]
    multiplies = (name in ("prefill_kernel", "latent_expanded_kernel")
                  or (name == "latent_prefill_kernel" and "KV" not in case)
                  or (name in GROUPED and "R16 " not in case))
    if multiplies and arch == "sm90" and half and in_table and not wgmma:
        faults.append("no wgmma")
    waits, touches = kernel.asm["ptx"].find("griddepcontrol.wait"), MEMORY.search(kernel.asm["ptx"])
    if "PDL" in case and not (touches and 0 <= waits < touches.start()):
        faults.append("touches memory before it has waited")
    return {"kernel": name, "case": case, "arch": arch, "registers": used["registers"], "shared": shared,
            "buffers": buffers, "wgmma": wgmma, "faults": faults}  # fmt: skip


def compile_all(operator: str, arch: str) -> None:
    """In a child: a line of JSON for every kernel."""
    import triton

    from cuda_ops.launch import ahead_of_time, overridden

    capability, num_sms, _ = DEVICES[arch]
    triton.runtime.driver.set_active(Device(capability))
    with tempfile.TemporaryDirectory() as cache_dir:
        triton.knobs.cache.dir = cache_dir
        seen, entries = set(), set()
        for numbers in ALTERNATIVES[arch]:
            for case, call in OPERATORS[operator]():
                if numbers and "KV" in case:
                    continue  # they begin as those of plain numbers do
                with ahead_of_time(arch, num_sms) as compilation, overridden(**numbers):
                    call()
                for name, kernel in compilation.compiled:
                    if kernel.hash not in seen:
                        seen.add(kernel.hash)
                        print(json.dumps(examine(kernel, name, " ".join([case, *numbers]), arch)), flush=True)
                entries |= compilation.entries
    print(json.dumps({"entries": sorted(entries)}), flush=True)


def in_child(operator: str, arch: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.cuda.aot", "--child", operator, arch]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=SECONDS)
        lines, error = done.stdout, done.stderr[-2000:] if done.returncode else ""
    except subprocess.TimeoutExpired as expired:
        lines, error = (expired.stdout or b"").decode(), f"more than {SECONDS} s"
    rows = [json.loads(line) for line in lines.splitlines()]
    if error or len(rows) < 2:
        rows.append({"kernel": operator, "case": "", "arch": arch, "faults": [error or "no kernel"]})
    return rows


def table_entries() -> set[tuple[str, str, str]]:
    table = json.loads((ROOT / "cuda_ops" / "configs.json").read_text())
    return {(op, arch, bucket) for op, archs in table.items() for arch, buckets in archs.items() for bucket in buckets}


def describe(row: dict[str, Any]) -> str:
    facts = "  ".join(f"{key} {value}" for key, value in row.items() if key != "faults")
    return facts + ("  FAILED: " + "; ".join(row["faults"]) if row["faults"] else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("operators", nargs="*", help=f"of {', '.join(OPERATORS)}; all without any")
    parser.add_argument("--arch", choices=DEVICES, help="only this one")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write what was found there")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        compile_all(*options.child)
        return 0
    tasks = [(operator, arch) for operator in options.operators or OPERATORS
             for arch in ([options.arch] if options.arch else DEVICES)]  # fmt: skip
    found, used = [], set()
    with ThreadPoolExecutor(options.workers) as pool:
        for rows in pool.map(lambda task: in_child(*task), tasks):
            used |= {tuple(entry) for row in rows for entry in row.get("entries", ())}
            for row in (row for row in rows if "entries" not in row):
                found.append(row)
                print(describe(row), flush=True)
    if not options.operators and not options.arch:
        found += [{"kernel": op, "case": bucket, "arch": arch, "faults": ["no case has this entry of the table"]}
                  for op, arch, bucket in sorted(table_entries() - used)]
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    failed = sum(bool(row["faults"]) for row in found)
    print(f"{len(found) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
