"""`advisory("CVE-...")`: names the advisories that a test answers, so that they stand in its test id."""

from __future__ import annotations

import pytest


def advisory(*ids: str) -> pytest.MarkDecorator:
    """The test is told which, as one string (argument `advisory_id`)."""
    return pytest.mark.parametrize("advisory_id", ["+".join(ids)])
