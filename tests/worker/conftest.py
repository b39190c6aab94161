from pathlib import Path

import pytest

from tests.worker.faults import VARIABLE, Faults
from tests.worker.pool import fork_rank


@pytest.fixture
def pooled_ranks(monkeypatch) -> None:
    """Ranks are forked from a standing pool."""
    monkeypatch.setattr("xllm.worker.processes.start_rank", fork_rank)


@pytest.fixture
def faults(monkeypatch, tmp_path: Path) -> Faults:
    """Ranks can be made to go wrong."""
    monkeypatch.setattr("xllm.worker.processes.RANK_MODULE", "tests.worker.faulty_rank")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "fault"))
    return Faults(tmp_path / "fault")
