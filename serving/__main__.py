"""`python -m serving`: the command `xllm`."""

import sys

from serving.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
