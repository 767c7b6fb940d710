"""The limits of batches and uploaded files."""

from __future__ import annotations

from dataclasses import dataclass

from afterword.settings.limit_table import limit


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Sizes are in bytes. `afterword batch` applies `max_line` only; the others limit uploads to a server."""

    max_line: int = limit(8 * 2**20, "bytes of one line of a batch's input file")
    max_rows: int = limit(50_000, "requests in the input file of a batch")
    max_upload: int = limit(200 * 2**20, "bytes of an uploaded file")
    max_stored: int = limit(10 * 2**30, "bytes of all files of one API key")
    max_batches: int = limit(100, "unfinished batches of one API key")
    batch_seconds: float = limit(86_400.0, "seconds after which a batch expires (completion_window: 24h)")
