"""A soak: mixed traffic on a real server, and what it may not leave behind. `python -m tests.soak --help`."""
