"""What is imported is declared: no package comes only because another one needs it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.house import OWN, top_level
from tests.test_house import MODULES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it there

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
# Where the package is not called as the module is; the longest prefix counts.
PACKAGES = {"PIL": "pillow", "zmq": "pyzmq", "llama_cpp": "llama-cpp-python", "openvino": "openvino-genai",
            "cuda": "cuda-bindings", "opentelemetry": "opentelemetry-api",
            "google.protobuf": "protobuf", "grpc": "grpcio", "opentelemetry.sdk": "opentelemetry-sdk",
            "opentelemetry.exporter.otlp.proto.http": "opentelemetry-exporter-otlp-proto-http"}
UNDECLARED = {"vllm"}  # another engine, measured where somebody has it


def package_name(text: str) -> str:
    """`Jinja2>=3; platform_system == "Linux"` -> `jinja2`."""
    found = re.match(r"[A-Za-z0-9._-]+", text)
    assert found, text
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def names(requirements: list[str]) -> set[str]:
    return {package_name(requirement) for requirement in requirements}


def package_of(module: str) -> str:
    known = [prefix for prefix in PACKAGES if module == prefix or module.startswith(prefix + ".")]
    return PACKAGES[max(known, key=len)] if known else package_name(module.partition(".")[0])


def foreign(path: Path, nodes: Any) -> set[str]:
    """Packages of others that are imported. A test may import the file beside it."""
    modules: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module or "")
    return {package_of(module) for module in modules if (top := module.partition(".")[0]) not in OWN
            and top not in sys.stdlib_module_names and not (path.parent / f"{top}.py").exists()} - UNDECLARED


CORE = names(PROJECT["dependencies"])
DECLARED = CORE | {name for requirements in EXTRAS.values() for name in names(requirements)}
FOR_USERS = CORE | {name for extra, listed in EXTRAS.items() if extra != "dev" for name in names(listed)}


def test_what_is_imported_is_declared() -> None:
    missing = {}
    for name, path in MODULES:
        declared = DECLARED if name.startswith(("tests", "tools")) else FOR_USERS
        missing[name] = foreign(path, ast.walk(ast.parse(path.read_text()))) - declared
    assert not {name: packages for name, packages in missing.items() if packages}


def test_what_an_import_needs_is_always_installed() -> None:
    """Extras may be imported where they are used only, so that the rest works without them."""
    found = {name: foreign(path, top_level(ast.parse(path.read_text()))) - CORE for name, path in MODULES
             if name.startswith(("xllm", "serving", "graph"))}
    assert not {name: packages for name, packages in found.items() if packages}


def test_what_is_always_installed_is_used_by_what_is_shipped() -> None:
    used = {package for name, path in MODULES if not name.startswith(("tests", "tools", "benchmarks"))
            for package in foreign(path, ast.walk(ast.parse(path.read_text())))}
    assert not CORE - used


def test_every_dependency_has_the_version_that_was_tested() -> None:
    lines = (ROOT / "requirements" / "constraints.txt").read_text().splitlines()
    pinned = {package_name(line) for line in lines if line and not line.startswith("#")}
    assert all("==" in line for line in lines if line and not line.startswith("#"))
    assert not (CORE | names(EXTRAS["dev"]) | names(EXTRAS["otel"])) - pinned - {"tomli"}


def test_an_undeclared_import_would_be_seen(tmp_path: Path) -> None:
    tree = ast.parse("import os, yaml\nfrom jinja2 import nodes\nfrom xllm import LLM\ndef f():\n    import PIL.Image")
    assert foreign(tmp_path / "x.py", ast.walk(tree)) == {"yaml", "jinja2", "pillow"}
    assert foreign(tmp_path / "x.py", top_level(tree)) == {"yaml", "jinja2"}


# `xllm` on PyPI is another project's tool, which must not be what somebody installs because we said so.
OTHERS = re.compile(r"""\bxllm\\?\[|pip3? (?:install|download|uninstall)[^\n`]*?[ '"]xllm(?=[\s'"`=<>~!;,]|$)""",
                    re.MULTILINE)
OWN_EXTRA = re.compile(r"xllm-engine\\?\[([\w,-]+)")


def test_no_text_names_the_other_distribution() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    texts = {name: (ROOT / name).read_text(errors="ignore") for name in listed.split("\0")
             if name and name != "tests/test_dependencies.py" and (ROOT / name).is_file()}
    assert PROJECT["name"] == "xllm-engine"
    assert not {name: found[0] for name, text in texts.items() if (found := OTHERS.search(text))}
    named = {extra for text in texts.values() for group in OWN_EXTRA.findall(text) for extra in group.split(",")}
    assert {"otel", "structured", "npu", "bench"} <= named <= EXTRAS.keys()


def test_the_name_of_the_other_distribution_would_be_seen() -> None:
    for text in ("pip install xllm", "pip install 'xllm'", "`pip install -U xllm`", "xllm[otel]",
                 r"match='xllm\[npu\]'", "pip install torch xllm==0.1"):
        assert OTHERS.search(text), text
    for text in ("pip install xllm-engine", "pip install 'xllm-engine[otel]'", "pip install -e .\n   xllm doctor",
                 "xllm serve", "pip install torch, then `xllm doctor`"):
        assert not OTHERS.search(text), text
