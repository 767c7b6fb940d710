"""A server's connection to an engine replica."""

from __future__ import annotations

import asyncio
import socket

from afterword.engine.messages import Heartbeat, ModelReady
from afterword.engine.protocol import Load, ModelInfo
from afterword.engine.replicas import wire

CONNECT_SECONDS = 10.0
PEER_SECONDS = 15.0
"""Seconds without an acknowledgement of the other machine, or without a heartbeat, after which it counts as dead."""


class ReplicaConnection:
    """A replica that has told its model. `samples`: those that this server has there. `leaving`: it ends soon."""

    def __init__(
        self, address: wire.ReplicaAddress, streams: tuple[asyncio.StreamReader, asyncio.StreamWriter], info: ModelInfo
    ) -> None:
        self.address, self.model_info = address, info
        self.load = Load(info.sequences)
        self.samples = 0
        self.leaving = False
        self._reader, self._writer = streams

    @property
    def name(self) -> str:
        """The replica's name, which no other replica has."""
        return self.address.name

    def send(self, message: wire.ToReplica) -> None:
        """Send a message. Does nothing if the replica is gone."""
        if not self._writer.is_closing():
            self._writer.write(wire.frame(message))

    async def receive(self) -> wire.FromReplica | None:
        """The next message but heartbeats. None if the connection has ended or the replica is silent for too long."""
        try:
            while True:
                async with asyncio.timeout(PEER_SECONDS):
                    message = await wire.read_from_replica(self._reader)
                if not isinstance(message, Heartbeat):
                    return message
        except TimeoutError:
            return None

    def close(self) -> None:
        """End the connection. The replica ends all jobs that came through it."""
        self._writer.transport.abort()


async def connect(address: wire.ReplicaAddress, model: str) -> ReplicaConnection:
    """Connect to a replica for one of its models. Raises `OSError` (also `TimeoutError`)."""
    async with asyncio.timeout(CONNECT_SECONDS):
        reader, writer = await asyncio.open_connection(address.host, address.port, limit=2**20)
        try:
            watch_peer(writer)
            writer.write(wire.frame(wire.Hello(address.secret, model)))
            first = await wire.read_from_replica(reader)
            if not isinstance(first, ModelReady):
                raise ConnectionError(f"The replica {address.name} does not serve the model {model}.")
        except BaseException:
            writer.transport.abort()
            raise
    return ReplicaConnection(address, (reader, writer), first.model_info)


def watch_peer(writer: asyncio.StreamWriter) -> None:
    """Let the connection end if the other machine is gone, and send small frames at once."""
    own: socket.socket = writer.get_extra_info("socket")
    own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(PEER_SECONDS * 1000))
    own.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
