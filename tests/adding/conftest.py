"""`new/` is no part of this tree: it is laid over a copy of it (`scratch.py`)."""

collect_ignore = ["new"]
