"""`GET /metrics`: all figures, for Prometheus. What they mean: docs/metrics.md."""

from __future__ import annotations

import psutil
from starlette.requests import Request
from starlette.responses import Response

from afterword.api.service import Service
from afterword.engine.protocol import Meter
from afterword.engine.roster import Host
from afterword.metrics import TEXT, EngineFigures, KeyFigures


async def metrics(request: Request) -> Response:
    """Everything that is counted."""
    service: Service = request.app.state.service
    engines = [_figures(host) for host in service.models]
    keys = KeyFigures(service.ring.unread, service.ring.skipped)
    text = service.metrics.text(service.life.state(service.models), engines, keys)
    return Response(text, headers={"content-type": TEXT})


def _figures(host: Host) -> EngineFigures:
    engine = host.up
    return EngineFigures(
        model=host.id,
        state=host.state,
        load=host.load,
        meter=engine.meter if engine else Meter(),
        tally=host.tally,
        room=engine.card.sequences * engine.card.context if engine else 0,
        memory=_resident(host.engine.pid) if host.engine else None,
    )


def _resident(pid: int | None) -> int | None:
    """Bytes of memory of a process, None if it is gone."""
    try:
        return int(psutil.Process(pid).memory_info().rss) if pid else None
    except psutil.Error:
        return None
