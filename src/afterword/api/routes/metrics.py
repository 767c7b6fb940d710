"""`GET /metrics`: all metrics in Prometheus' text format. docs/metrics.md describes them."""

from __future__ import annotations

import psutil
from starlette.requests import Request
from starlette.responses import Response

from afterword.api.service import Service
from afterword.engine.parent.model_manager import ManagedModel
from afterword.engine.protocol import PassStats
from afterword.observability.metrics import TEXT, EngineSnapshot, KeySnapshot


async def metrics(request: Request) -> Response:
    service: Service = request.app.state.service
    engines = [_engine_metrics(managed_model) for managed_model in service.models]
    keys = KeySnapshot(service.key_registry.seconds_since_sync, service.key_registry.skipped_rows)
    text = service.metrics.text(service.readiness.state(service.models), engines, keys)
    return Response(text, headers={"content-type": TEXT})


def _engine_metrics(managed_model: ManagedModel) -> EngineSnapshot:
    engine = managed_model.loaded_engine
    return EngineSnapshot(
        model=managed_model.id,
        state=managed_model.state,
        load=managed_model.load,
        pass_stats=engine.pass_stats if engine else PassStats(),
        metrics=managed_model.engine_metrics,
        token_capacity=engine.model_info.sequences * engine.model_info.context if engine else 0,
        memory=_resident(managed_model.engine.pid) if managed_model.engine else None,
    )


def _resident(pid: int | None) -> int | None:
    """Resident memory of a process in bytes; None if the process has ended."""
    try:
        return int(psutil.Process(pid).memory_info().rss) if pid else None
    except psutil.Error:
        return None
