"""The one ZMQ PAIR between the API process and its worker.

``ipc://`` in a private folder (0700) that is removed as soon as the worker has connected, so that not even SIGKILL
leaves one behind; where ipc is unavailable, TCP on the loopback, encrypted and authenticated by a key that only the
worker is told.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import zmq

_MAX_IPC_PATH = 100  # sockaddr_un holds 107 bytes


class Address(msgspec.Struct, frozen=True):
    """Where the worker connects; ``server_key`` is CURVE's public key, set over TCP."""

    url: str
    server_key: str | None = None


@dataclass
class Listener:
    """The API process's end. ``forget_folder`` once the worker has connected; ``close`` at the end."""

    socket: Any
    address: Address
    folder: Path | None

    def forget_folder(self) -> None:
        """Remove the socket file and its folder; the connection stays."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = None

    def close(self) -> None:
        """Close the socket and leave nothing behind."""
        self.socket.close(linger=0)
        self.forget_folder()


def _unbounded(socket: Any) -> Any:
    socket.set_hwm(0)
    return socket


def listen(context: Any, *, allow_ipc: bool = True) -> Listener:
    """Bind the API process's end; ``context`` is a ``zmq.Context`` or ``zmq.asyncio.Context``."""
    if allow_ipc and zmq.has("ipc"):
        folder = Path(tempfile.mkdtemp(prefix="llmctl-"))
        path = folder / "worker"
        if len(str(path).encode()) <= _MAX_IPC_PATH:
            socket = _unbounded(context.socket(zmq.PAIR))
            try:
                socket.bind(f"ipc://{path}")
                return Listener(socket, Address(f"ipc://{path}"), folder)
            except zmq.ZMQError:
                socket.close(linger=0)
        shutil.rmtree(folder, ignore_errors=True)
    return _listen_tcp(context)


def _listen_tcp(context: Any) -> Listener:
    socket = _unbounded(context.socket(zmq.PAIR))
    server_key = None
    if zmq.has("curve"):
        public, secret = zmq.curve_keypair()
        socket.curve_server = True
        socket.curve_publickey, socket.curve_secretkey = public, secret
        server_key = public.decode()
    socket.bind("tcp://127.0.0.1:*")
    return Listener(socket, Address(socket.last_endpoint.decode(), server_key), None)


def connect(context: zmq.Context[Any], address: Address) -> zmq.Socket[Any]:
    """The worker's end; what it still holds at close is sent for up to a second."""
    socket: zmq.Socket[Any] = _unbounded(context.socket(zmq.PAIR))
    socket.linger = 1000
    if address.server_key is not None:
        socket.curve_serverkey = address.server_key.encode()
        socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
    socket.connect(address.url)
    return socket
