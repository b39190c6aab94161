"""What the rules of `test_house.py` are computed from: syntax trees, and which of our modules names which.

Every function takes the modules it judges, so that `test_house_rules.py` can show it trees that break a rule.
"""

from __future__ import annotations

import ast
import functools
import io
import re
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
OWN = ("cuda_ops", "npu_ops", "backends", "graph", "xllm", "serving", "tests", "benchmarks", "tools")
KERNELS = ("cuda_ops", "npu_ops")
MAX_LINES, MAX_KERNEL_LINES = 400, 600
WRITTEN = (".py", ".c", ".h", ".js", ".css", ".html", ".sh")  # by hand
MAX_COLLABORATORS = 8
PLAIN = {"int", "float", "str", "bool", "bytes", "None"}

Modules = Mapping[str, Path]  # dotted name -> file; a package has its __init__.py
Graph = Mapping[str, set[str]]


def modules_of(root: Path, tops: Iterable[str] = OWN) -> dict[str, Path]:
    found = {}
    for top in tops:
        for path in sorted((root / top).rglob("*.py")):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def top_level(node: ast.AST) -> Iterator[ast.AST]:
    """Statements that run at import: not those in functions or under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        yield child
        yield from top_level(child)


def imports(tree: ast.Module, *, lazy: bool = True) -> list[tuple[int, str]]:
    """(line, module) of every import; with lazy=False only those that run when the module is imported."""
    found = []
    for node in ast.walk(tree) if lazy else top_level(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            module = node.module or ""
            found += [(node.lineno, f"{module}.{alias.name}" if is_module(f"{module}.{alias.name}") else module)
                      for alias in node.names]
    return found


def is_module(name: str) -> bool:
    """Whether a dotted name is one of our modules or packages."""
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


# --- circles


def import_graph(modules: Modules) -> dict[str, set[str]]:
    """Which of our modules each one names in an import, under TYPE_CHECKING and in functions too.

    `from package import name` names the module package.name if there is one, else the package's `__init__`. That a
    package is imported on the way to one of its modules names nothing: `__init__` may hand on what its modules have,
    and they may name each other.
    """
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        named: set[str] = set()
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                named |= {module if module in modules else node.module for module in inner}
        graph[name] = (named & modules.keys()) - {name}
    return graph


def circles(graph: Graph) -> list[frozenset[str]]:
    """Sets of modules each of which leads to all others of its set (Tarjan 1972), the largest first."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for target in sorted(graph[name]):
            if target not in order:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], order[target])
        if low[name] == order[name]:
            start = stack.index(name)
            if len(stack) - start > 1:
                found.append(frozenset(stack[start:]))
            del stack[start:]

    for name in sorted(graph):
        if name not in order:
            visit(name)
    return sorted(found, key=len, reverse=True)


def shortest_way_round(graph: Graph, circle: frozenset[str]) -> str:
    """One way through the circle and back, to be read: `a -> b -> a`."""
    ways = []
    for start in sorted(circle):
        reached, way = {start: [start]}, [start]
        while way:
            name = way.pop(0)
            if start in graph[name]:
                ways.append([*reached[name], start])
                break
            for target in sorted((graph[name] & circle) - reached.keys()):
                reached[target] = [*reached[name], target]
                way.append(target)
    return " -> ".join(min(ways, key=len))


def complaints_of_circles(modules: Modules, known: Iterable[frozenset[str]] = ()) -> list[str]:
    """Circles that are not within a known one, and known ones that are cut."""
    graph = import_graph(modules)
    found, known = circles(graph), list(known)
    new = [f"a circle of {len(circle)}: {shortest_way_round(graph, circle)}" for circle in found
           if not any(circle <= other for other in known)]
    return new + [f"no circle any more, take it off the list: {', '.join(sorted(other))}" for other in known
                  if not any(circle <= other for circle in found)]


# --- sizes


def complaints_of_sizes(root: Path, tops: Iterable[str] = OWN) -> list[str]:
    """Files written by hand with more lines than they may have. Those of tests, too."""
    found = []
    for top in tops:
        for path in sorted((root / top).rglob("*")):
            if path.suffix in WRITTEN and path.is_file():
                num_lines = len(path.read_text().splitlines())
                most = MAX_KERNEL_LINES if top in KERNELS or path.suffix in (".c", ".h") else MAX_LINES
                if num_lines > most:
                    found.append(f"{path.relative_to(root)} has {num_lines} lines, and {most} at most are allowed")
    return found


# --- numbers


def bare_numbers(tree: ast.Module, source: str) -> list[str]:
    """Constants that are numbers without a comment, which would say the unit and where the value comes from.

    A constant: an upper-case name, assigned in a module or a class that is no enumeration. A number: int and float
    literals alone, their sums and products, and tuples of these. What is computed from another name has its reason
    there; strings, tables, calls (`range(4)`, a list of states; a `Struct`) and enumerations are no numbers. The
    comment stands on the same line, or ends on the line above.
    """
    comments = {token.start[0]: token.string for token in tokenize.generate_tokens(io.StringIO(source).readline)
                if token.type == tokenize.COMMENT and not re.match(r"#\s*(-|noqa|type:|fmt:)", token.string)}
    alone = {number for number, line in enumerate(source.splitlines(), 1) if line.lstrip().startswith("#")}
    found = []
    for body in [tree.body, *(node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
                              and not any("Enum" in ast.unparse(base) for base in node.bases))]:
        for node in body:
            names, value = _assigned(node)
            if names and value is not None and all(re.fullmatch(r"_?[A-Z][A-Z0-9_]*", name) for name in names):
                said = any(line in comments for line in range(node.lineno, (node.end_lineno or node.lineno) + 1))
                above = node.lineno - 1 in alone and node.lineno - 1 in comments
                if _is_number(value) and not said and not above:
                    found.append(", ".join(names))
    return found


def _assigned(node: ast.stmt) -> tuple[list[str], ast.expr | None]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
    return [inner.id for target in targets for inner in ast.walk(target) if isinstance(inner, ast.Name)], value


def _is_number(value: ast.expr) -> bool:
    if isinstance(value, ast.Tuple):
        return bool(value.elts) and all(map(_is_number, value.elts))
    if isinstance(value, ast.BinOp):
        return _is_number(value.left) and _is_number(value.right)
    if isinstance(value, ast.UnaryOp):
        return _is_number(value.operand)
    return isinstance(value, ast.Constant) and type(value.value) in (int, float)


def complaints_of_numbers(modules: Modules) -> list[str]:
    return [f"{module}.{name} is a number without a comment: its unit, and where the value comes from"
            for module, path in modules.items() for name in bare_numbers(parse(path), path.read_text())]


# --- collaborators


def num_collaborators(init: ast.FunctionDef) -> int:
    """What an `__init__` is given: every parameter but self and keyword-only plain settings, `*` and `**` too.

    Plain: numbers, text, bytes, truth values, or one of them and None. Other keyword-only values (a list, a function,
    an object of ours) count: somebody has to make them.
    """
    given = init.args
    count = len(given.posonlyargs + given.args) - 1 + (given.vararg is not None) + (given.kwarg is not None)
    return count + sum(not _is_plain(arg.annotation) for arg in given.kwonlyargs)


def _is_plain(annotation: ast.expr | None) -> bool:
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        return _is_plain(annotation.left) and _is_plain(annotation.right)
    if isinstance(annotation, ast.Constant):
        return annotation.value is None
    return isinstance(annotation, ast.Name) and annotation.id in PLAIN


def complaints_of_collaborators(modules: Modules, known: Iterable[str] = ()) -> list[str]:
    """Classes, as `module.Class`, that are built from more than they may be and are not known, and known ones that are
    not. A dataclass is data: it writes no `__init__`."""
    found = {}
    for name, path in modules.items():
        for node in ast.walk(parse(path)):
            for init in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(init, ast.FunctionDef) and init.name == "__init__":
                    found[f"{name}.{node.name}"] = num_collaborators(init)
    much = {name for name, count in found.items() if count > MAX_COLLABORATORS}
    return [f"{name} is built from {found[name]} collaborators, and {MAX_COLLABORATORS} at most are allowed"
            for name in sorted(much - {*known})] + [f"no longer so, take it off the list: {name}"
                                                    for name in sorted({*known} - much)]


# --- names that exist twice


def twin_modules(modules: Modules) -> dict[str, list[str]]:
    """Last names of modules that occur more than once, with the modules. Packages and `__main__` are not counted."""
    named: dict[str, list[str]] = {}
    for name, path in modules.items():
        if path.name not in ("__init__.py", "__main__.py"):
            named.setdefault(name.rpartition(".")[2], []).append(name)
    return {name: sorted(places) for name, places in named.items() if len(places) > 1}


def twin_classes(modules: Modules) -> dict[str, list[str]]:
    """Public classes and type aliases of that name in more than one module, with the modules."""
    named: dict[str, list[str]] = {}
    for name, path in modules.items():
        for node in parse(path).body:
            if isinstance(node, ast.ClassDef):
                named.setdefault(node.name, []).append(name)
            elif isinstance(node, ast.Assign) and isinstance(node.value, (ast.Subscript, ast.BinOp)):
                named.setdefault(ast.unparse(node.targets[0]), []).append(name)
    return {name: sorted(places) for name, places in named.items()
            if len(places) > 1 and re.fullmatch(r"[A-Z]\w*[a-z]\w*", name)}


def complaints_of_twins(found: Mapping[str, list[str]], known: Iterable[str] = ()) -> list[str]:
    """Names of two things, and known ones that are none (any more)."""
    return [f"{name} is {' and '.join(places)}: one of them says too little" for name, places in sorted(found.items())
            if name not in known] + [f"not there twice, take it off the list: {name}"
                                     for name in sorted({*known} - found.keys())]


# --- what is reached


def reached_from(modules: Modules, roots: Iterable[str]) -> set[str]:
    """The modules that these lead to: by imports (a module brings the packages that it lies in) and by name.

    By name: a string that is a module's dotted name (`"xllm.models.llama"`, an entry of a registry or an argument of
    `python -m`) names that module. An f-string `f"serving.commands.bench.{name}_bench"` names those modules below
    `serving.commands.bench` whose last names, but for `_bench`, stand in strings of the same file or of one that it
    imports.
    """
    graph = import_graph(modules)
    strings = {name: set(_strings(parse(path))) for name, path in modules.items()}
    reached: set[str] = set()
    open_names = list(roots)
    while open_names:
        name = open_names.pop()
        if name in reached:
            continue
        reached.add(name)
        spelt = strings[name].union(*(strings[other] for other in graph[name]))
        open_names += graph[name] | _packages(name, modules) | (strings[name] & modules.keys())
        open_names += [module for prefix, end in _patterns(parse(modules[name])) for module in modules
                       if module.startswith(prefix) and module.endswith(end)
                       and module.removesuffix(end).rpartition(".")[2] in spelt]
    return reached


def _packages(name: str, modules: Modules) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:i]) for i in range(1, len(parts))} & modules.keys()


def _strings(tree: ast.Module) -> Iterator[str]:
    """Each, and what stands before a colon in it (`"hermes:HermesParser"`), as a module would be called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
            yield node.value.partition(":")[0].replace("-", "_")


def _patterns(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """`serving.commands.bench.` and `_bench` of f"serving.commands.bench.{name}_bench"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr) and node.values and isinstance(node.values[0], ast.Constant):
            prefix, last = str(node.values[0].value), node.values[-1]
            if prefix.endswith(".") and prefix.partition(".")[0] in OWN:
                yield prefix, str(last.value) if isinstance(last, ast.Constant) else ""


def complaints_of_reach(modules: Modules, roots: Iterable[str], waiting: Iterable[str] = ()) -> list[str]:
    """Modules that nothing leads to and that do not wait, and waiting ones (modules, or `module.name` of one that is
    reached) that are used."""
    reached, waiting = reached_from(modules, roots), {*waiting}
    found = [f"no entry point leads to {name}" for name in sorted(modules.keys() - reached - waiting)]
    for name in sorted(waiting):
        module, _, inner = (name, "", "") if name in modules else name.rpartition(".")
        if module not in modules or (inner and not _defines(parse(modules[module]), inner)):
            found.append(f"{name} is listed as waiting and is not there")
            continue
        users = (other for other in reached - {module} if _mentions(parse(modules[other]), inner))
        if any(users) if inner else module in reached:
            found.append(f"{name} is used now, take it off the list")
    return found


def is_run(tree: ast.Module) -> bool:
    """Whether the module does something when it is run as `python -m`."""
    return any(isinstance(node, ast.If) and "__name__" in ast.dump(node.test) for node in tree.body)


def _defines(tree: ast.Module, name: str) -> bool:
    return any(isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name for node in tree.body)


def _mentions(tree: ast.Module, name: str) -> bool:
    """Whether the identifier occurs: as a name, an attribute or in an import."""
    return any((isinstance(node, ast.Name) and node.id == name)
               or (isinstance(node, ast.Attribute) and node.attr == name)
               or (isinstance(node, ast.alias) and node.name == name) for node in ast.walk(tree))
