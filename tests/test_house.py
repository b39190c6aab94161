"""The floors of the house (docs/structure.md), checked on the syntax trees: imports run downwards only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OWN = ("cuda_ops", "npu_ops", "backends", "graph", "xllm", "serving", "tests", "benchmarks", "tools")

# Which of our own modules may be imported from where; the longest matching prefix decides.
BASE = ["xllm.config", "xllm.errors", "xllm.sizes", "xllm.env", "xllm.request", "xllm.sequence", "xllm.step",
        "xllm.metrics", "xllm.pooling", "xllm.structured.spec"]
MODEL_FLOOR = [*BASE, "xllm.parallel", "xllm.layers", "xllm.models", "xllm.multimodal", "backends"]
RUN_FLOOR = [*MODEL_FLOOR, "xllm.kv", "xllm.scheduler", "graph", "xllm.speculative", "xllm.disagg", "xllm.structured",
             "xllm.runner"]
ALLOWED = {
    "cuda_ops": ["cuda_ops"],
    "npu_ops": ["npu_ops"],
    "backends": ["backends"],
    "backends.cuda": ["backends", "cuda_ops"],
    "backends.npu": ["backends", "npu_ops"],
    "backends.npu_graphs": ["backends", "npu_ops"],
    "backends.npu_probe": ["backends", "npu_ops"],
    "graph": ["graph", "backends"],
    **dict.fromkeys(BASE, BASE),
    "xllm.kv": [*BASE, "xllm.kv"],
    "xllm.scheduler": [*BASE, "xllm.kv", "xllm.scheduler"],
    "xllm.parallel": MODEL_FLOOR,
    "xllm.layers": MODEL_FLOOR,
    "xllm.models": MODEL_FLOOR,
    "xllm.speculative": [*RUN_FLOOR],
    "xllm.structured": [*BASE, "xllm.structured"],
    "xllm.runner": RUN_FLOOR,
    "xllm.client": [*BASE, "xllm.engine", "xllm.client", "xllm.detokenizer", "xllm.tokenizer"],
    "xllm": ["xllm", "backends", "graph"],
    "serving": ["serving", "xllm"],
    "serving.doctor": ["serving", "xllm", "backends"],  # it looks at devices
    "serving.bench": ["serving", "xllm", "backends"],  # it measures parts
    "benchmarks": ["benchmarks", "serving", "xllm", "backends", "graph", "cuda_ops", "npu_ops"],
    "tools": ["tools", "serving", "xllm"],
}
NO_TORCH = [*BASE, "xllm.kv", "xllm.scheduler", "serving"]
PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "shelve", "marshal"}


def modules() -> list[tuple[str, Path]]:
    found = []
    for top in OWN:
        for path in sorted((ROOT / top).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found.append((name.removesuffix(".__init__"), path))
    return found


MODULES = modules()
SHIPPED = [(name, path) for name, path in MODULES if not name.startswith("tests")]


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def rule_for(name: str) -> list[str]:
    return ALLOWED[max((p for p in ALLOWED if within(name, p)), key=len)]


def imports(tree: ast.Module, *, lazy: bool = True) -> list[tuple[int, str]]:
    """(line, module) of every import; with lazy=False only those that run when the module is imported."""
    found = []
    nodes = ast.walk(tree) if lazy else top_level(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found.append((node.lineno, node.module or ""))
    return found


def top_level(node: ast.AST):
    """Statements that run at import: not those in functions or under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        yield child
        yield from top_level(child)


@pytest.mark.parametrize(("name", "path"), SHIPPED, ids=[name for name, _ in SHIPPED])
def test_imports_run_downwards(name, path):
    allowed = rule_for(name)
    for line, target in imports(ast.parse(path.read_text())):
        if target.split(".")[0] in OWN:
            assert any(within(target, prefix) for prefix in allowed), f"{path.name}:{line} imports {target}"


@pytest.mark.parametrize(("name", "path"), SHIPPED, ids=[name for name, _ in SHIPPED])
def test_what_is_forbidden_by_name(name, path):
    tree = ast.parse(path.read_text())
    for line, target in imports(tree):
        top = target.split(".")[0]
        assert top not in PICKLES, f"{path.name}:{line} imports {target}"
        if any(within(name, prefix) for prefix in NO_TORCH):
            assert top != "torch" or name.startswith("serving."), f"{path.name}:{line} imports torch"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        owner = node.value.id if isinstance(node.value, ast.Name) else ""
        where = f"{path.name}:{node.lineno}"
        if owner == "torch":
            device_floor = name.startswith(("backends", "cuda_ops", "npu_ops", "benchmarks"))
            assert node.attr not in ("cuda", "npu") or device_floor, f"{where} uses torch.{node.attr}"
            assert node.attr != "load", f"{where} uses torch.load"
        if owner == "os" and node.attr in ("environ", "getenv", "putenv"):
            assert name == "xllm.env" or name.startswith(("tools", "benchmarks")), f"{where} reads the environment"
        assert node.attr not in ("recv_pyobj", "send_pyobj"), f"{where} sends pickles"


@pytest.mark.parametrize(("name", "path"), SHIPPED, ids=[name for name, _ in SHIPPED])
def test_light_modules_do_not_pull_torch_at_import(name, path):
    if any(within(name, prefix) for prefix in NO_TORCH):
        for line, target in imports(ast.parse(path.read_text()), lazy=False):
            assert target.split(".")[0] not in ("torch", "transformers"), f"{path.name}:{line} imports {target}"


@pytest.mark.parametrize("module", ["xllm", "xllm.scheduler.scheduler", "xllm.kv.manager", "serving.cli"])
def test_importing_it_loads_no_torch(module):
    code = f"import sys, {module}; print(sorted(m for m in ('torch', 'transformers', 'fastapi') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_every_package_is_listed_for_installation():
    listed = (ROOT / "pyproject.toml").read_text()
    for top in ("xllm", "backends", "serving", "graph", "cuda_ops", "npu_ops"):
        for init in (ROOT / top).rglob("__init__.py"):
            name = ".".join(init.parent.relative_to(ROOT).parts)
            assert f'"{name}"' in listed, f"{name} is not in pyproject.toml"


def test_nothing_says_where_or_by_whom_it_was_made():
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True).stdout.split()
    for name in listed:
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".c", ".txt", "") and path.is_file():
            text = path.read_text(errors="ignore")
            for word in ("/wor" + "k/main", "/roo" + "t/", "/opt/whe" + "els"):
                assert word not in text, f"{name} names a path of one machine: {word}"
