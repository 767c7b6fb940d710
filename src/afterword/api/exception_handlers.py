"""Turns exceptions of routes and of routing into error responses, and records them in the request recorder."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from afterword.api.middleware.authentication import bearer_token
from afterword.api.requests.request_recorder import recorder_of
from afterword.api.responses.error_response import error_response
from afterword.api.service import Service
from afterword.errors import AfterwordError, RequestError

OTHER_PATHS = frozenset(
    (
        *("/v1/chat/completions", "/v1/responses", "/v1/embeddings", "/v1/fim/completions", "/v1/messages", "/v1"),
        *("/completions", "/chat/completions", "/models", "/v1/v1/completions", "/v1/v1/models", "/v1/completions/"),
        *("/v1/models/", "/v1/tokenize", "/v1/detokenize", "/v1/engines", "/v1/rerank", "/v1/score"),
        *("/api/generate", "/api/chat", "/api/tags", "/api/show", "/api/version", "/completion", "/props", "/slots"),
        *("/generate", "/ping", "/server_info", "/get_model_info"),
    )
)
"""Paths of other servers and frequent mistakes, which the log names. It contains no other path, because a path is text
from the client and may contain a secret."""


async def on_afterword_error(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, AfterwordError)
    recorder_of(request.scope).record_error(problem)
    return error_response(problem)


async def on_routing_error(request: Request, problem: Exception) -> Response:
    """The response for an unknown path or a method that the path does not have."""
    assert isinstance(problem, HTTPException)
    service: Service = request.app.state.service
    if account := service.key_registry.find(bearer_token(request.headers.get("authorization", ""))):
        # for the log only: the response does not depend on it
        recorder_of(request.scope).record_account(account.key.id)
    if problem.status_code == 404:
        if request.url.path in OTHER_PATHS:
            recorder_of(request.scope).record_other_path(request.url.path)
        message = f"Unknown request URL: {request.method} {request.url.path[:128]}. Please check the URL for typos."
        return await on_afterword_error(request, RequestError(message, code="unknown_url", status=404))
    if problem.status_code == 405:
        allowed = ", ".join(methods_of(request))
        message = f"This path does not have the method {request.method}. Allowed: {allowed}."
        response = await on_afterword_error(request, RequestError(message, code="method_not_supported", status=405))
        response.headers["allow"] = allowed
        return response
    return await on_afterword_error(request, RequestError(problem.detail, status=problem.status_code))


def methods_of(request: Request) -> list[str]:
    """The sorted methods of all routes that match the path."""
    routes = [each for each in request.app.routes if isinstance(each, Route)]
    matching = [each for each in routes if each.path_regex.match(request.scope["path"])]
    return sorted({method for each in matching for method in each.methods or ()})


async def on_disconnect(_: Request, __: Exception) -> Response:
    """The client disconnected before its body was complete. Only the log shows this status."""
    return Response(status_code=499)


async def on_unexpected_error(request: Request, _: Exception) -> Response:
    """The response for a bug. The traceback goes to the log and not to the client."""
    problem = AfterwordError("The server had an error while processing your request. Sorry about that!")
    return await on_afterword_error(request, problem)
