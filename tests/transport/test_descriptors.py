"""Without free file descriptors the server pauses accepting, and resumes when some are free again."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import asyncio, os, resource, socket, sys
from afterword.transport.transport_limits import TransportLimits
from afterword.transport.connection_limiter import is_scarce_descriptor
from afterword.transport.server import TransportServer

kind, loop = sys.argv[1:]

async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})

async def status_of(client):
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(client, b"GET / HTTP/1.1\\r\\nHost: a\\r\\n\\r\\n")
    try:
        return (await asyncio.wait_for(loop.sock_recv(client, 12), 30))[9:]
    except ConnectionError:
        return b"cut"

async def main():
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
    listener = socket.create_server(("127.0.0.1", 0))
    clients = [socket.socket() for _ in range(7)]
    for client in clients:
        client.setblocking(False)
    server = TransportServer(app, listener, TransportLimits())
    async with server:
        address = listener.getsockname()
        await asyncio.get_running_loop().sock_connect(clients[6], address)  # loads lazily imported modules
        assert await status_of(clients[6]) == b"200"
        opened = []
        try:
            while kind == "none" or not opened or not is_scarce_descriptor(opened[-1] + 1):
                opened.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            pass
        for client in clients[:5]:
            await asyncio.get_running_loop().sock_connect(client, address)
        statuses = [asyncio.ensure_future(status_of(client)) for client in clients[:5]]
        await asyncio.sleep(0.3)
        print([each.result() for each in statuses if each.done()].count(b"200"))
        for number in opened:
            os.close(number)
        late = [await each for each in statuses]
        print(set(late) <= {b"200", b"503", b"cut"}, kind != "none" or set(late) == {b"200"})
        await asyncio.get_running_loop().sock_connect(clients[5], address)
        print(await status_of(clients[5]))
        for client in clients:
            client.close()

if loop == "uvloop":
    import uvloop
    uvloop.run(main())
else:
    asyncio.run(main())
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("kind", ["none", "few"])
def test_connections_wait_while_no_file_descriptor_is_free(kind, loop):
    """Without any free descriptor the connections wait. With few, which a worker may need, they get 503."""
    if loop == "uvloop":
        pytest.importorskip("uvloop")
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, kind, loop], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.stdout.splitlines() == ["0", "True True", "b'200'"], result.stderr
    assert result.stderr.count("Raise the limit on open files") == 1
    assert "Traceback" not in result.stderr
