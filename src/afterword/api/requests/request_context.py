"""The request context: the facts about a request that are known when the server has accepted it.

`ProtectedRoute` creates it and puts it into the ASGI scope. Routes read it. What happens afterwards goes to its
`RequestRecorder`.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from typing import TypeVar

from starlette.types import Scope

from afterword.api.requests.request_recorder import RequestRecorder
from afterword.keys.key_registry import Grant

T = TypeVar("T")
CONTEXT_KEY = "afterword.request_context"
"""The key of the ASGI scope that holds the request context."""


@dataclass(frozen=True, slots=True)
class RequestContext:
    """One accepted request.

    - `grant`: the share of its account's limits that the request may use; None without an API key.
    - `in_process`: the request is a batch line and has no waiting client.
    - `resources`: the context managers that `ProtectedRoute` exits before the response ends.
    """

    grant: Grant | None
    in_process: bool
    recorder: RequestRecorder
    resources: AsyncExitStack

    @property
    def key(self) -> str:
        """The id of the API key, from which the key cannot be derived; "" on a server without keys."""
        return self.grant.key if self.grant else ""

    @property
    def cache_name(self) -> str:
        """The name of the API key for its prefixes; "" on a server without keys."""
        return self.grant.cache_name if self.grant else ""

    async def enter(self, resource: AbstractAsyncContextManager[T]) -> T:
        """Enter a context manager and exit it when the response ends."""
        return await self.resources.enter_async_context(resource)


def request_context_of(scope: Scope) -> RequestContext:
    """The context of a request to a protected route."""
    request_context: RequestContext = scope[CONTEXT_KEY]
    return request_context
