"""Why a request to the upstream has failed."""

from __future__ import annotations

_BUSY = (429, 503)


class UpstreamFailure(Exception):
    """Base class. `quoted`: what the upstream has said, which may contain a prompt, so it is not logged by default."""

    def __init__(self, reason: str, quoted: str = "") -> None:
        super().__init__(reason)
        self.quoted = " ".join(quoted.split())[:500]

    @property
    def detailed(self) -> str:
        """The reason with the quotation."""
        return f"{self}: {self.quoted}" if self.quoted else str(self)


class Unavailable(UpstreamFailure):
    """The upstream did not take the request: there was no connection, or it is overloaded."""


class Broken(UpstreamFailure):
    """The upstream took the request and did not answer it to the end."""


class Refused(UpstreamFailure):
    """The upstream refuses the request. `status`: of HTTP."""

    def __init__(self, status: int, quoted: str) -> None:
        super().__init__(f"status {status}", quoted)
        self.status = status


class Malformed(UpstreamFailure):
    """The upstream has sent something that is not a response of its route."""


class TooFewAlternatives(Malformed):
    """The upstream lists fewer alternatives of a token than were requested, as a gateway with a limit does."""

    def __init__(self) -> None:
        super().__init__("a token has fewer alternatives than were requested")


class SeveralModels(Malformed):
    """The upstream serves several models, and none of them is certainly the one that is meant."""


def failure(status: int, text: str) -> UpstreamFailure:
    """The failure that an HTTP status means. `text`: what the upstream says."""
    if status in _BUSY:
        return Unavailable(f"status {status}", text)
    return Broken(f"status {status}", text) if status >= 500 else Refused(status, text)
