"""What every benchmark prints: one JSON object, with what it ran on."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serving.commands.output_file import check_output
from xllm.errors import XllmError
from xllm.processor import processor_name


def environment() -> dict[str, Any]:
    """The machine in words, as far as a reader needs it to judge figures."""
    return {"python": platform.python_version(), "machine": platform.machine(), "cores": os.cpu_count(),
            "cpu": processor_name()}


def ended(work: Callable[[], int]) -> int:
    """The exit status of a benchmark; what is wrong with its input, or an interruption, is told in a line."""
    try:
        return work()
    except (XllmError, OSError) as error:
        print(f"xllm: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def check(path: str | None, *reads: str | Path | None) -> None:
    """Raise ConfigError unless the result can be saved there. reads: files and folders that the benchmark reads."""
    if path:
        check_output(Path(path), [Path(read) for read in reads if read])


def write(result: dict[str, Any], path: str | None) -> None:
    """Print the result, and save it if a path is given."""
    print(_text(result))
    save(result, path)


def save(result: dict[str, Any], path: str | None) -> None:
    """Save the result if a path is given."""
    if path:
        Path(path).write_text(_text(result) + "\n")


def _text(result: dict[str, Any]) -> str:
    return json.dumps({**result, "environment": environment()}, indent=2)


def note(message: str) -> None:
    """A line for the person who waits; results alone go to standard output."""
    print(message, file=sys.stderr, flush=True)


def quantiles(samples: list[float]) -> dict[str, float]:
    """Minimum, median and 99th percentile."""
    ordered = sorted(samples)
    return {"min": ordered[0], "p50": ordered[len(ordered) // 2], "p99": ordered[int(0.99 * (len(ordered) - 1))]}
