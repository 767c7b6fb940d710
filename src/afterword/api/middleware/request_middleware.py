"""The outermost middleware: one request recorder per request.

It creates the recorder, adds the common headers to the response, and reports the ended request to the log, the metrics
and the traces.
"""

from __future__ import annotations

import ipaddress

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from afterword.api.in_process_client import SCOPE_KEY
from afterword.api.middleware.request_ids import new_request_id
from afterword.api.requests.request_context import CONTEXT_KEY, RequestContext
from afterword.api.requests.request_recorder import RECORDER_KEY, REQUEST_ID_KEY, RequestRecorder
from afterword.api.responses.response_headers import response_headers
from afterword.observability.metrics import Metrics
from afterword.observability.request_log import RequestLog
from afterword.observability.traces import PARENT_HEADERS, Traces


class RequestMiddleware:
    """Outermost middleware: adds the common headers to each response; logs, counts and traces each ended request."""

    def __init__(
        self, app: ASGIApp, request_log: RequestLog | None, metrics: Metrics, traces: Traces | None = None
    ) -> None:
        self._app = app
        self._log = request_log
        self._metrics = metrics
        self._traces = traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Create the request recorder, run the application, then report the outcome."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = scope.get(REQUEST_ID_KEY) or new_request_id()
        recorder = RequestRecorder(request_id, client_address(scope), SCOPE_KEY in scope)
        scope[RECORDER_KEY] = recorder

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                recorder.record_status(message["status"])
                request_context: RequestContext | None = scope.get(CONTEXT_KEY)  # None before a key is accepted
                grant = request_context.grant if request_context else None
                MutableHeaders(scope=message).update(response_headers(recorder, grant))
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception:
            recorder.record_bug()
            raise
        finally:
            route = getattr(scope.get("route"), "path", None)
            if self._log is not None and not recorder.is_routine:
                self._log.write(recorder.log_line(route))
            outcome = recorder.outcome(scope["method"], route)
            self._metrics.record_request(outcome)
            if self._traces is not None and not recorder.is_routine:
                headers = Headers(scope=scope)
                self._traces.record_request(
                    outcome, {name: headers[name] for name in PARENT_HEADERS if name in headers}
                )


def client_address(scope: Scope) -> str:
    """The client's IP address; "" if the server or a proxy states no valid one."""
    try:
        return str(ipaddress.ip_address((scope.get("client") or ("",))[0]))
    except ValueError:
        return ""
