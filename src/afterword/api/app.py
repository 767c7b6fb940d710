"""The routes, and what stands around them."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp

from afterword.api import completions, gate, models, status, tokens
from afterword.api.service import Service
from afterword.errors import AfterwordError

OPEN = (
    Route("/health", status.health, methods=["GET"]),
    Route("/ready", status.ready, methods=["GET"]),
)
"""Routes that need no key: what a load balancer asks."""

GUARDED = (
    Route("/v1/completions", gate.guarded(completions.create), methods=["POST"]),
    Route("/v1/models", gate.guarded(models.list_models), methods=["GET"]),
    Route("/v1/models/{model:path}", gate.guarded(models.get_model), methods=["GET"]),
    Route("/tokenize", gate.guarded(tokens.tokenize), methods=["POST"]),
    Route("/detokenize", gate.guarded(tokens.detokenize), methods=["POST"]),
    Route("/tokenizer_info", gate.guarded(tokens.tokenizer_info), methods=["GET"]),
    Route("/version", gate.guarded(status.version), methods=["GET"]),
)


def make_app(service: Service) -> ASGIApp:
    """The web application for a service."""
    app = Starlette(
        routes=[*OPEN, *GUARDED],
        exception_handlers={
            AfterwordError: gate.on_problem,
            HTTPException: gate.on_http,
            Exception: gate.on_bug,
        },
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return gate.Labelled(app)
