import pytest

from tests.worker.pool import fork_rank


@pytest.fixture
def pooled_ranks(monkeypatch) -> None:
    """Ranks are forked from a standing pool."""
    monkeypatch.setattr("xllm.worker.processes.start_rank", fork_rank)
