"""Builds the ASGI application: the route table, the error handlers and the middleware around them."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.types import ASGIApp

from afterword.api import exception_handlers
from afterword.api.middleware.authentication import ProtectedRoute
from afterword.api.middleware.host_check import LOCAL_PAGES, HostCheck
from afterword.api.middleware.request_middleware import RequestMiddleware
from afterword.api.responses import rate_limit_headers
from afterword.api.routes import (
    adapters,
    batches,
    completions,
    files,
    infill,
    metrics,
    models,
    static_pages,
    status,
    tokenizer,
)
from afterword.api.service import Service
from afterword.api.specification import document
from afterword.config import Config
from afterword.errors import AfterwordError

PUBLIC_ROUTES = (
    Route("/health", status.health, methods=["GET"]),
    Route("/ready", status.ready, methods=["GET"]),
)
"""Routes for load balancers, which need no API key. The playground's files (`static_pages`) need none either."""

PROTECTED_ROUTES = (
    ProtectedRoute("/v1/completions", completions.create, methods=["POST"]),
    ProtectedRoute("/infill", infill.create, methods=["POST"]),
    ProtectedRoute("/v1/models", models.list_models, methods=["GET"]),
    ProtectedRoute("/v1/models/{model:path}", models.get_model, methods=["GET"]),
    ProtectedRoute("/v1/load_lora_adapter", adapters.load, methods=["POST"]),
    ProtectedRoute("/v1/unload_lora_adapter", adapters.unload, methods=["POST"]),
    ProtectedRoute("/v1/files", files.create, methods=["POST"]),
    ProtectedRoute("/v1/files", files.list_files, methods=["GET"]),
    ProtectedRoute("/v1/files/{id}", files.get_file, methods=["GET"]),
    ProtectedRoute("/v1/files/{id}", files.delete, methods=["DELETE"]),
    ProtectedRoute("/v1/files/{id}/content", files.get_content, methods=["GET"]),
    ProtectedRoute("/v1/batches", batches.create, methods=["POST"]),
    ProtectedRoute("/v1/batches", batches.list_batches, methods=["GET"]),
    ProtectedRoute("/v1/batches/{id}", batches.get_batch, methods=["GET"]),
    ProtectedRoute("/v1/batches/{id}/cancel", batches.cancel, methods=["POST"]),
    ProtectedRoute("/tokenize", tokenizer.tokenize, methods=["POST"]),
    ProtectedRoute("/detokenize", tokenizer.detokenize, methods=["POST"]),
    ProtectedRoute("/tokenizer_info", tokenizer.tokenizer_info, methods=["GET"]),
    ProtectedRoute("/version", status.version, methods=["GET"]),
    ProtectedRoute("/metrics", metrics.metrics, methods=["GET"]),
    ProtectedRoute("/openapi.json", document.openapi, methods=["GET"]),
)

OPTIONAL_ROUTES = (Route("/metrics", metrics.metrics, methods=["GET"]),)
"""Routes without a key check that `--metrics-open` puts in front of the protected ones, so that they match first."""


def make_app(service: Service) -> ASGIApp:
    optional = OPTIONAL_ROUTES if service.config.metrics_open else ()
    app = Starlette(
        routes=[*optional, *PROTECTED_ROUTES, *PUBLIC_ROUTES, *static_pages.routes(service.config.limits)],
        exception_handlers={
            AfterwordError: exception_handlers.on_afterword_error,
            HTTPException: exception_handlers.on_routing_error,
            ClientDisconnect: exception_handlers.on_disconnect,
            Exception: exception_handlers.on_unexpected_error,
        },
    )
    app.router.redirect_slashes = False
    app.state.service = service
    checked = HostCheck(with_cors(app, service.config), service.config)
    return RequestMiddleware(checked, service.request_log, service.metrics, service.traces)


def with_cors(app: ASGIApp, config: Config) -> ASGIApp:
    """Add CORS headers, which allow the scripts of web pages to send requests.

    Allowed are pages of this machine and of the origins in `cors_origins`; with API keys, pages of every origin.
    Without keys, a page of any origin could use the model of a user that visits it.
    """
    return CORSMiddleware(
        app,
        allow_origins=["*"] if config.requires_key else config.cors_origins,
        allow_origin_regex=LOCAL_PAGES,
        allow_methods=["DELETE", "GET", "POST"],
        allow_headers=["*"],  # a page that may send requests may send any header with them
        expose_headers=["x-request-id", "retry-after", "x-should-retry", *rate_limit_headers.HEADERS],
    )
