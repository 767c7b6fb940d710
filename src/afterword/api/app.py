"""The routes, and what stands around them."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.types import ASGIApp

from afterword.api import completions, gate, models, openapi, ratelimit, status, tokens
from afterword.api.gate import GuardedRoute
from afterword.api.service import Service
from afterword.api.sites import LOCAL_PAGES, KnownSites
from afterword.config import Config
from afterword.errors import AfterwordError

OPEN = (
    Route("/health", status.health, methods=["GET"]),
    Route("/ready", status.ready, methods=["GET"]),
)
"""Routes that need no key: what a load balancer asks."""

GUARDED = (
    GuardedRoute("/v1/completions", completions.create, methods=["POST"]),
    GuardedRoute("/v1/models", models.list_models, methods=["GET"]),
    GuardedRoute("/v1/models/{model:path}", models.get_model, methods=["GET"]),
    GuardedRoute("/tokenize", tokens.tokenize, methods=["POST"]),
    GuardedRoute("/detokenize", tokens.detokenize, methods=["POST"]),
    GuardedRoute("/tokenizer_info", tokens.tokenizer_info, methods=["GET"]),
    GuardedRoute("/version", status.version, methods=["GET"]),
    GuardedRoute("/openapi.json", openapi.openapi, methods=["GET"]),
)


def make_app(service: Service) -> ASGIApp:
    """The web application for a service."""
    app = Starlette(
        routes=[*OPEN, *GUARDED],
        exception_handlers={
            AfterwordError: gate.on_problem,
            HTTPException: gate.on_http,
            ClientDisconnect: gate.on_gone,
            Exception: gate.on_bug,
        },
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return gate.Labelled(KnownSites(with_cors(app, service.config), service.config), service.log)


def with_cors(app: ASGIApp, config: Config) -> ASGIApp:
    """Web pages may ask from this machine and from where the operator says; with keys, from anywhere.

    Without keys a page from anywhere could use the model of whoever looks at it.
    """
    return CORSMiddleware(
        app,
        allow_origins=["*"] if config.guarded else config.cors_origins,
        allow_origin_regex=LOCAL_PAGES,
        allow_methods=["GET", "POST"],
        allow_headers=["authorization", "content-type"],
        expose_headers=["x-request-id", "retry-after", "x-should-retry", *ratelimit.HEADERS],
    )
