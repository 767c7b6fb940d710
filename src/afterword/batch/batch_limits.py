"""How large batches may be."""

from __future__ import annotations

from dataclasses import dataclass

from afterword.settings.limit_table import limit


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Sizes in bytes. `afterword batch` heeds `max_line` alone; the others are for what is uploaded."""

    max_line: int = limit(8 * 2**20, "bytes of a line of a batch")
    max_rows: int = limit(50_000, "rows of an uploaded batch")
    max_upload: int = limit(200 * 2**20, "bytes of an uploaded file")
    max_stored: int = limit(10 * 2**30, "bytes of files that are kept for one key")
    max_batches: int = limit(100, "batches of one key that have not ended")
    batch_seconds: float = limit(86_400.0, "seconds that a batch may take, a completion_window of 24h")
