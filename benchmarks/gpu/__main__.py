"""`python -m benchmarks.gpu SECTION... --out DIR`"""

import sys

from benchmarks.gpu.main import main

if __name__ == "__main__":
    sys.exit(main())
