"""The order in which KV is brought up for the requests that wait for it."""

import pytest

from xllm.request import MAX_PRIORITY, Request
from xllm.scheduler.kv_waits import _priority
from xllm.sequence import SequenceState


def moves_first(**fields: object) -> int:
    request = Request(request_id="r", prompt_token_ids=[1], **fields)  # type: ignore[arg-type]
    return _priority(SequenceState(request, 0))


@pytest.mark.parametrize("offline", [-MAX_PRIORITY, 0, MAX_PRIORITY])
@pytest.mark.parametrize("online", [-MAX_PRIORITY, 0, MAX_PRIORITY])
def test_online_requests_go_first_whatever_their_priority(online: int, offline: int) -> None:
    assert moves_first(priority=online) < moves_first(priority=offline, offline=True)
