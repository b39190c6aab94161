"""`Ticket` and `TicketBoard`: let a forward pass wait, layer by layer, for KV that is being loaded from host memory,
and whoever sends KV away for the forward pass that computes it.
"""

from __future__ import annotations

import threading

from xllm.errors import DeviceError


class Ticket:
    """The progress of one load, or of a step that fills blocks: layer l may be read once `wait(l)` returns. A lane
    writes it and the runner reads it; or the runner writes it and whoever sends the blocks away reads it."""

    __slots__ = ("_condition", "_error", "_layers_done", "num_layers", "ticket_id")

    def __init__(self, ticket_id: int, num_layers: int):
        self.ticket_id = ticket_id
        self.num_layers = num_layers
        self._layers_done = 0
        self._error: BaseException | None = None
        self._condition = threading.Condition()

    @property
    def layers_done(self) -> int:
        return self._layers_done

    def advance(self) -> None:
        """Note that one more layer has arrived, and wake the waiters."""
        with self._condition:
            self._layers_done += 1
            self._condition.notify_all()

    def finish(self) -> None:
        """Note that all layers have arrived."""
        with self._condition:
            self._layers_done = self.num_layers
            self._condition.notify_all()

    def fail(self, error: BaseException) -> None:
        """Note that the rest will not come: waiters raise DeviceError."""
        with self._condition:
            self._error = error
            self._condition.notify_all()

    def wait_any(self) -> None:
        """Block until the first layer has arrived, or none ever will."""
        with self._condition:
            self._condition.wait_for(lambda: self._layers_done or self._error is not None)

    def wait(self, layer: int) -> None:
        """Block until layer `layer` (from 0) has arrived. Raises DeviceError if it never will."""
        if self._layers_done <= layer:
            with self._condition:
                self._condition.wait_for(lambda: self._layers_done > layer or self._error is not None)
        if self._layers_done <= layer:
            raise DeviceError("KV could not be copied to the device, or computed there") from self._error


class TicketBoard:
    """The tickets of loads that are not complete, by number, beside the device that waits for them.

    A number that is not listed belongs to a load that is complete. Opened in the thread that receives the moves,
    before a step that names it; closed by whoever advanced it to its end: the lane that ran the load, or the runner.
    """

    def __init__(self) -> None:
        self._tickets: dict[int, Ticket] = {}

    def __len__(self) -> int:
        return len(self._tickets)

    def open(self, ticket_id: int, num_layers: int) -> None:
        """Open the ticket of a load that has arrived. The number must be new."""
        assert ticket_id not in self._tickets
        self._tickets[ticket_id] = Ticket(ticket_id, num_layers)

    def close(self, ticket: Ticket) -> None:
        """Take a ticket off the board: all its layers have arrived."""
        del self._tickets[ticket.ticket_id]

    def fail_all(self, error: BaseException) -> None:
        """Fail every ticket that is open."""
        for ticket in list(self._tickets.values()):
            ticket.fail(error)

    def __contains__(self, ticket_id: int) -> bool:
        return ticket_id in self._tickets

    def __getitem__(self, ticket_id: int) -> Ticket:
        return self._tickets[ticket_id]

    def tickets(self, ticket_ids: tuple[int, ...]) -> list[Ticket]:
        """The tickets among these numbers that are still open."""
        found = (self._tickets.get(ticket_id) for ticket_id in ticket_ids)
        return [ticket for ticket in found if ticket is not None]
