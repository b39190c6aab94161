"""A user's files are called as our packages are: `import xllm` names the one that is in the way, and a server that is
started in their folder does not look at them. Real processes, with this checkout on the module path."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from xllm.child_process import run_module
from xllm.own_packages import NAMES

ROOT = Path(__file__).parent.parent
# As an editable installation does it: the packages are found last, after all folders of the path.
FOUND_LAST = f"""
import sys
from importlib.machinery import PathFinder
class Last:
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, [{str(ROOT)!r}]) if path is None else None
sys.path[:] = [path for path in sys.path if path != {str(ROOT)!r}]
sys.meta_path[:] = [finder for finder in sys.meta_path if "ditable" not in str(finder)] + [Last]
"""


def run(*args: object, cwd: Path, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, args)], cwd=cwd, env={**os.environ, "PYTHONPATH": str(path)},
                          capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", NAMES)
def test_a_users_module_or_package_is_named(name: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import xllm\nprint('imported')\n")
    module = tmp_path / f"{name}.py"
    module.write_text("raise SystemExit('it was executed')\n")
    refused = run(script, cwd=ROOT)
    assert refused.returncode == 1 and f"finds {module} first. Rename it, or run `python -" in refused.stderr
    assert "it was executed" not in refused.stderr

    module.unlink()
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    refused = run(script, cwd=ROOT)
    assert refused.returncode == 1 and f"finds {tmp_path / name} first." in refused.stderr
    assert f"needs its own package {name!r}" in refused.stderr


def test_a_folder_of_that_name_is_in_the_way_only_where_ours_are_found_later(tmp_path: Path) -> None:
    (tmp_path / "graph").mkdir()
    script = tmp_path / "script.py"
    script.write_text("import xllm\n")
    assert run(script, cwd=ROOT).returncode == 0
    script.write_text(f"{FOUND_LAST}\nimport xllm\n")
    refused = run(script, cwd=ROOT, path=tmp_path / "none")
    assert f"finds {tmp_path / 'graph'} first" in refused.stderr
    (tmp_path / "graph").rmdir()
    assert run(script, cwd=ROOT, path=tmp_path / "none").returncode == 0


def test_a_loaded_module_of_that_name_is_named(tmp_path: Path) -> None:
    made = run("-c", "import sys, types; sys.modules['graph'] = types.ModuleType('graph'); import xllm", cwd=tmp_path)
    assert "finds sys.modules['graph'] first" in made.stderr


def test_links_to_our_packages_are_ours(tmp_path: Path) -> None:
    for name in ("xllm", *NAMES):
        (tmp_path / name).symlink_to(ROOT / name)
    assert run("-c", "import xllm, graph", cwd=ROOT, path=tmp_path).returncode == 0


def test_the_command_says_so_too(tmp_path: Path) -> None:
    (tmp_path / "serving.py").write_text("")
    command = tmp_path / "bin" / "xllm"
    command.parent.mkdir()
    command.write_text("import sys\nfrom xllm.__main__ import main\nsys.exit(main())\n")  # what pip makes of [scripts]
    refused = run(command, "--help", cwd=tmp_path, path=Path(f"{tmp_path}{os.pathsep}{ROOT}"))
    assert f"finds {tmp_path / 'serving.py'} first. Rename it, or take {tmp_path} off the module path" in refused.stderr
    assert run("-m", "xllm", "doctor", "--help", cwd=ROOT).stdout.startswith("usage: xllm doctor")
    assert run(command, "--help", cwd=tmp_path).returncode == 0


def test_processes_of_ours_do_not_look_into_the_working_directory(tmp_path: Path) -> None:
    for name in (*NAMES, "torch", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('it was executed')\n")
    for path in (ROOT, tmp_path / "none"):  # the latter: the parent found xLLM by other means
        done = run(*run_module("serving.commands.cli"), "--help", cwd=tmp_path, path=path)
        assert done.stdout.startswith("usage: xllm"), done.stderr
