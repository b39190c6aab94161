"""A connection of the server without a socket: what is written to it is kept."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from serving.api.connection import Connection, connection_class
from serving.api.connections import Connections
from serving.config import ConnectionSettings

MAX_UNREAD = 2**17


class Written(asyncio.Transport):
    """Keeps what is written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.writes = list[bytes]()
        self.is_closed = self.is_paused = False

    def write(self, data: Any) -> None:
        if data:
            self.writes.append(bytes(data))

    def is_closing(self) -> bool:
        return self.is_closed

    def close(self) -> None:
        self.is_closed = True

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        self.is_paused = True

    def resume_reading(self) -> None:
        self.is_paused = False


def connected(app: Any) -> tuple[Connection, Written]:
    """A connection to the app, and what is under it."""
    config = uvicorn.Config(app, lifespan="off", log_config=None)
    kind: Any = connection_class(Connections(ConnectionSettings(), Counter()), MAX_UNREAD)
    connection: Connection = kind(config=config, server_state=ServerState(), app_state={})
    transport = Written()
    connection.connection_made(transport)
    return connection, transport
