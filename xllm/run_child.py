"""Runs a module as `python -m` does, from this installation of xLLM and never from the working directory.

`python -m` looks for modules in the working directory first, where a user's graph.py would take the place of ours. Run
as a file; see `child_process.run_module`.
"""

from __future__ import annotations

import sys


def main() -> None:
    """argv: the module, then its own arguments."""
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]  # the folder of this file
    import os.path
    import runpy

    home = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if home not in sys.path:  # the parent may have found xLLM by other means than its children's environment
        sys.path.insert(0, home)
    runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
