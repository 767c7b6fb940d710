"""The routes, and what stands around them."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.types import ASGIApp

from afterword.api import batches, completions, files, gate, metrics, models, openapi, pages, ratelimit, status, tokens
from afterword.api.gate import GuardedRoute
from afterword.api.service import Service
from afterword.api.sites import LOCAL_PAGES, KnownSites
from afterword.config import Config
from afterword.errors import AfterwordError

OPEN = (
    Route("/health", status.health, methods=["GET"]),
    Route("/ready", status.ready, methods=["GET"]),
)
"""Routes that need no key: what a load balancer asks. The playground's files (`pages`) need none either."""

GUARDED = (
    GuardedRoute("/v1/completions", completions.create, methods=["POST"]),
    GuardedRoute("/v1/models", models.list_models, methods=["GET"]),
    GuardedRoute("/v1/models/{model:path}", models.get_model, methods=["GET"]),
    GuardedRoute("/v1/files", files.create, methods=["POST"]),
    GuardedRoute("/v1/files", files.list_files, methods=["GET"]),
    GuardedRoute("/v1/files/{id}", files.get_file, methods=["GET"]),
    GuardedRoute("/v1/files/{id}", files.delete, methods=["DELETE"]),
    GuardedRoute("/v1/files/{id}/content", files.get_content, methods=["GET"]),
    GuardedRoute("/v1/batches", batches.create, methods=["POST"]),
    GuardedRoute("/v1/batches", batches.list_batches, methods=["GET"]),
    GuardedRoute("/v1/batches/{id}", batches.get_batch, methods=["GET"]),
    GuardedRoute("/v1/batches/{id}/cancel", batches.cancel, methods=["POST"]),
    GuardedRoute("/tokenize", tokens.tokenize, methods=["POST"]),
    GuardedRoute("/detokenize", tokens.detokenize, methods=["POST"]),
    GuardedRoute("/tokenizer_info", tokens.tokenizer_info, methods=["GET"]),
    GuardedRoute("/version", status.version, methods=["GET"]),
    GuardedRoute("/metrics", metrics.metrics, methods=["GET"]),
    GuardedRoute("/openapi.json", openapi.openapi, methods=["GET"]),
)

OPENED = (Route("/metrics", metrics.metrics, methods=["GET"]),)
"""In front of the guarded ones with `--metrics-open`."""


def make_app(service: Service) -> ASGIApp:
    """The web application for a service."""
    opened = OPENED if service.config.metrics_open else ()
    app = Starlette(
        routes=[*OPEN, *pages.routes(service.config.limits), *opened, *GUARDED],
        exception_handlers={
            AfterwordError: gate.on_problem,
            HTTPException: gate.on_http,
            ClientDisconnect: gate.on_gone,
            Exception: gate.on_bug,
        },
    )
    app.router.redirect_slashes = False
    app.state.service = service
    known = KnownSites(with_cors(app, service.config), service.config)
    return gate.Labelled(known, service.log, service.metrics, service.traces)


def with_cors(app: ASGIApp, config: Config) -> ASGIApp:
    """Web pages may ask from this machine and from where the operator says; with keys, from anywhere.

    Without keys a page from anywhere could use the model of whoever looks at it.
    """
    return CORSMiddleware(
        app,
        allow_origins=["*"] if config.guarded else config.cors_origins,
        allow_origin_regex=LOCAL_PAGES,
        allow_methods=["DELETE", "GET", "POST"],
        allow_headers=["*"],  # those that the page asks for: a page that may send requests may name anything in them
        expose_headers=["x-request-id", "retry-after", "x-should-retry", *ratelimit.HEADERS],
    )
