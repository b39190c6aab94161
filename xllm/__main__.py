"""The `xllm` command, also as `python -m xllm`. `xllm` is imported first and checks that `serving` is its own."""

from __future__ import annotations

import sys

from serving.commands.cli import main
from serving.commands.cli import master_main as master_main  # of the script `xllm_master_serving`

if __name__ == "__main__":
    sys.exit(main())
