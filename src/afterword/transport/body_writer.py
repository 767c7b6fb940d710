"""How an application writes a streamed body past the functions around `send`: an entry of the ASGI scope.

Each part of a stream passes through `send` of the connection and of every middleware, of which none changes a part that
others follow. For a stream of tokens these calls cost more than the encoding of the token.
"""

from __future__ import annotations

from collections.abc import Callable

WriteBody = Callable[[bytes], bool]
"""Writes a part of the body of a response that has started and goes on. It returns False, and has written nothing, if
the part has to be sent with `send`: that may wait, until the client has read more."""

WRITE_BODY_KEY = "afterword.write_body"
"""The key of the ASGI scope that holds a `WriteBody`, if the server has one. A client cannot set it."""
