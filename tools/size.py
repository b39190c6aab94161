"""`make size`: lines of code by folder, and the largest files and functions, beside the guide in the docs."""

from __future__ import annotations

import ast
import subprocess
from collections import Counter
from pathlib import Path

FOLDERS = ("xllm", "backends", "cuda_ops", "npu_ops", "graph", "serving", "tests", "tools", "benchmarks")


def function_sizes(path: Path, tree: ast.Module) -> list[tuple[int, str]]:
    return [(node.end_lineno - node.lineno + 1, f"{path}:{node.lineno} {node.name}") for node in ast.walk(tree)
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno is not None]


def main() -> None:
    listed = subprocess.run(["git", "ls-files", "*.py", "*.c"], capture_output=True, text=True, check=True).stdout
    lines: Counter[str] = Counter()
    files, functions = [], []
    for path in map(Path, listed.split()):
        text = path.read_text()
        count = text.count("\n")
        lines[path.parts[0]] += count
        files.append((count, str(path)))
        if path.suffix == ".py":
            functions += function_sizes(path, ast.parse(text))
    for folder in FOLDERS:
        print(f"{lines[folder]:7}  {folder}")
    print(f"{sum(lines[f] for f in FOLDERS):7}  in all")
    for title, rows in (("largest files", files), ("longest functions", functions)):
        print(f"\n{title}")
        for size, name in sorted(rows, reverse=True)[:8]:
            print(f"{size:7}  {name}")


if __name__ == "__main__":
    main()
