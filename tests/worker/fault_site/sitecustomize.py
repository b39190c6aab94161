"""On PYTHONPATH of a server: ranks of its engine are `tests.worker.faulty_rank`."""

import sys

if "xllm.client.engine_process" in sys.orig_argv:
    import xllm.worker.processes

    xllm.worker.processes.RANK_MODULE = "tests.worker.faulty_rank"
