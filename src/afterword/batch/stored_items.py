"""The descriptions of files and batches, as the file store keeps them in its database."""

from __future__ import annotations

import secrets
from typing import Any, Literal

import msgspec

BatchStatus = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
FINAL_STATUSES = frozenset({"failed", "completed", "expired", "cancelled"})

_STORED_NAMES = {
    "input_file": "input",
    "output_file": "output",
    "error_file": "errors",
    "errors": "wrong",
    "lines": "rows",
    "succeeded": "good",
    "failed": "bad",
}
"""The names of fields of `StoredBatch` in the database where they differ, so that existing databases stay readable."""


class StoredFile(msgspec.Struct, frozen=True):
    """The description of a file. `key`: the id of the API key that owns it. `size` in bytes, times in Unix seconds.

    From `expires` on the file is no longer available; None: it does not expire.
    """

    id: str
    key: str
    name: str
    purpose: str
    size: int
    created: int
    expires: int | None = None


class BatchError(msgspec.Struct, frozen=True):
    """A reason why a batch failed. `line` is the number of the faulty input line, or None."""

    code: str
    message: str
    line: int | None = None


class StoredBatch(msgspec.Struct, frozen=True, rename=_STORED_NAMES):
    """The state of a batch. `input_file`, `output_file` and `error_file` are ids of files.

    `times` has the time of each status by its name, in Unix seconds. `errors`: why it failed. `lines`, `succeeded` and
    `failed` count lines; `prompt`, `completion` and `cached` count tokens.
    """

    id: str
    key: str
    endpoint: str
    window: str
    input_file: str
    created: int
    expires: int
    metadata: dict[str, str] | None = None
    status: BatchStatus = "validating"
    times: dict[str, int] = {}
    errors: tuple[BatchError, ...] = ()
    output_file: str | None = None
    error_file: str | None = None
    lines: int = 0
    succeeded: int = 0
    failed: int = 0
    prompt: int = 0
    completion: int = 0
    cached: int = 0

    def with_status(self, status: BatchStatus, now: float, **facts: Any) -> StoredBatch:
        """Return the batch with another status, reached at `now`, and other changed fields."""
        times = {**self.times, status: int(now)}
        return msgspec.structs.replace(self, status=status, times=times, **facts)


def new_id(kind: str) -> str:
    """Return a random id with the prefix `kind`."""
    return kind + secrets.token_hex(16)
