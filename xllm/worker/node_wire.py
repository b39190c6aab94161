"""What node 0 and another node say to each other over their TCP connection, and its two ends.

A message has a kind and a payload, which is empty for `BEAT` and `UP`. Commands and reports are the bytes that go to
ranks of node 0 and come from them. The connection is encrypted (CURVE): node 0 proves that it has the key that it wrote
at the meeting, and whoever has not read that key is not heard.
"""

from __future__ import annotations

import zmq

# Down: a command for every rank; the model is loaded on all nodes; the engine ends, and why ("": in order).
COMMAND, UP, END = b"C", b"U", b"E"
# Up: a sign of life; a rank's report, behind a byte with its number; this node's part has failed, and why.
BEAT, REPORT, FAILED = b"B", b"R", b"F"
# Between signs of life of the connection itself, and how long they may stay out. Chosen: as those of a rank
# (`processes.py:HEARTBEAT_S`, `SILENT_S`), in milliseconds.
_IVL_MS, _TIMEOUT_MS = 1000, 6000
# For last words to be sent, and read. Chosen: many times a way through a network.
LINGER_MS = 1000


def listen(context: zmq.Context[zmq.Socket[bytes]], address: str) -> tuple[zmq.Socket[bytes], int, str]:
    """Await one node at a free port of the address. Returns the socket, its port and its key."""
    public, secret = zmq.curve_keypair()
    socket = _socket(context)
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
    socket.bind(f"tcp://{_bracketed(address)}:*")
    port = int(socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
    return socket, port, public.decode()


def connect(context: zmq.Context[zmq.Socket[bytes]], address: str, port: int, key: str, *, events: int
            ) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
    """The other end, and where those events of its connection are read, from the first one on. It does not connect
    again once it has lost node 0."""
    public, secret = zmq.curve_keypair()
    socket = _socket(context)
    socket.setsockopt(zmq.CURVE_SERVERKEY, key.encode())
    socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
    socket.setsockopt(zmq.RECONNECT_IVL, -1)
    monitor = socket.get_monitor_socket(events)  # first: what another thread meets before is not told
    socket.connect(f"tcp://{_bracketed(address)}:{port}")
    return socket, monitor


def message_of(socket: zmq.Socket[bytes]) -> tuple[bytes, bytes]:
    """The kind and the payload of the message that is there; what is no message has kinds that nobody knows."""
    parts = socket.recv_multipart()
    return (parts[0], parts[1]) if len(parts) == 2 else (b"", b"")


def _socket(context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.DEALER)
    socket.set_hwm(0)
    for option, value in ((zmq.IPV6, 1), (zmq.LINGER, LINGER_MS), (zmq.HEARTBEAT_IVL, _IVL_MS),
                          (zmq.HEARTBEAT_TIMEOUT, _TIMEOUT_MS), (zmq.HEARTBEAT_TTL, _TIMEOUT_MS)):
        socket.setsockopt(option, value)
    return socket


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address
