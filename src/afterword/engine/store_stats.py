"""What a store of prefixes has done, as the worker reports it in its heartbeats."""

from __future__ import annotations

from afterword.engine.protocol import Value


class StoreStats(Value, frozen=True):
    """What a store of prefixes has done since the start of its process.

    `hits`: prefixes that were read; `hit_tokens`: their tokens. `written_bytes`: bytes of written files. `evictions`:
    files deleted for the bound. `failures`: damaged files, and reads and writes that the disk refused. `bytes`: bytes
    in the folder at present.
    """

    hits: int = 0
    hit_tokens: int = 0
    written_bytes: int = 0
    evictions: int = 0
    failures: int = 0
    bytes: int = 0
