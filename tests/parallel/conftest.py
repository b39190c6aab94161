"""The ranks that all tests of this folder share: to import torch takes longer than most of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.parallel.ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(tmp_path_factory.mktemp("ranks"), "tests.parallel.cases", "tests.parallel.tensor_cases")
    yield started
    started.close()
