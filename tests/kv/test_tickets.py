"""`Ticket` and `TicketBoard`, with real threads."""

import threading
import time

import pytest

from xllm.errors import DeviceError
from xllm.kv.tickets import Ticket, TicketBoard

LONG_S = 20.0  # a test that waits so long has failed


def in_thread(function, *arguments):
    """Runs in a thread; returns (thread, what it returned or raised)."""
    outcome = []

    def body():
        try:
            outcome.append(function(*arguments))
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    return thread, outcome


def test_a_layer_may_be_read_once_it_has_come():
    ticket = Ticket(1, 3)
    order = []
    waiters = [in_thread(lambda layer: (ticket.wait(layer), order.append(layer)), layer) for layer in (2, 0, 1)]
    for layer in range(3):
        ticket.advance()
        deadline_s = time.monotonic() + LONG_S
        while len(order) <= layer:
            assert time.monotonic() < deadline_s
            time.sleep(0.001)
        assert order == list(range(layer + 1)), "nobody before his layer"
    for thread, outcome in waiters:
        thread.join(LONG_S)
        assert not isinstance(outcome[0], Exception)
    ticket.wait(2)


def test_a_failed_load_ends_every_wait_for_what_has_not_come():
    ticket, cause = Ticket(1, 3), ValueError("lost")
    waiting = [in_thread(ticket.wait, layer) for layer in (1, 2)]
    ticket.advance()
    ticket.fail(cause)
    for thread, outcome in waiting:
        thread.join(LONG_S)
        assert isinstance(outcome[0], DeviceError) and outcome[0].__cause__ is cause
    ticket.wait(0)
    with pytest.raises(DeviceError):
        ticket.wait(1)


def test_the_board_lists_the_loads_that_are_open():
    board = TicketBoard()
    board.open(1, 2)
    board.open(2, 2)
    first, second = board[1], board[2]
    assert (first.ticket_id, second.num_layers, len(board)) == (1, 2, 2)
    board.close(first)
    assert 1 not in board and 2 in board and len(board) == 1
    assert board.tickets((1, 2, 99)) == [second]
    with pytest.raises(AssertionError):
        board.open(2, 2)
