"""The sockets between a process and the embedded store of another one.

The connection is encrypted (CURVE) and authenticated as that of two nodes is (`xllm/worker/node_wire.py`): the server
proves that it has the key, and whoever does not know its public half, which is handed on as a secret, is not heard.
"""

from __future__ import annotations

import zmq
import zmq.asyncio

from serving.cluster.key_value import MAX_COMMIT_BYTES

# Between signs of life of the connection itself, and how long they may stay out, in milliseconds. Chosen: as those
# between nodes (`node_wire.py`).
_IVL_MS, _TIMEOUT_MS = 1000, 6000
_LINGER_MS = 200  # for last answers to be sent. Chosen: many times what a machine needs
_RECONNECT_MS = 200  # between tries. Chosen: as long as a watch waits at most
_MAX_FRAME_BYTES = 2 * MAX_COMMIT_BYTES  # of a question: a commit and what surrounds it
Socket = zmq.asyncio.Socket


def listen(context: zmq.asyncio.Context, address: str, port: int, secret: bytes) -> tuple[Socket, int]:
    """Await clients; returns the socket and its port, which port 0 leaves open. secret: a CURVE key's secret half.
    Raises zmq.ZMQError, as where the port is taken."""
    socket = _socket(context, zmq.ROUTER)
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
    socket.setsockopt(zmq.MAXMSGSIZE, _MAX_FRAME_BYTES)
    try:
        socket.bind(f"tcp://{address}:{port or '*'}")
    except BaseException:
        socket.close()
        raise
    return socket, int(socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])


def connect(context: zmq.asyncio.Context, address: str, port: int, key: str, *, events: int) -> tuple[Socket, Socket]:
    """A client's end, and where those events of its connection are read, from the first one on. It connects again by
    itself, and takes nothing to be sent while it is not connected. Raises ValueError for what is no key."""
    public, secret = zmq.curve_keypair()
    socket = _socket(context, zmq.DEALER)
    try:
        socket.setsockopt(zmq.CURVE_SERVERKEY, key.encode())
    except zmq.ZMQError:
        socket.close()
        raise ValueError("the store's key must be a CURVE public key of 40 characters") from None
    socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
    socket.setsockopt(zmq.IMMEDIATE, 1)
    socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
    monitor: Socket = socket.get_monitor_socket(events)  # first: what another thread meets before is not told
    socket.connect(f"tcp://{address}:{port}")
    return socket, monitor


def _socket(context: zmq.asyncio.Context, kind: int) -> Socket:
    socket: Socket = context.socket(kind)
    socket.set_hwm(0)
    for option, value in ((zmq.LINGER, _LINGER_MS), (zmq.HEARTBEAT_IVL, _IVL_MS),
                          (zmq.HEARTBEAT_TIMEOUT, _TIMEOUT_MS), (zmq.HEARTBEAT_TTL, _TIMEOUT_MS)):
        socket.setsockopt(option, value)
    return socket
