"""`Progress`: hears how far loading has come."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float], None]  # the phase, and the share of it that is done
