"""A client in a separate process that sends requests, discards the responses and reports their status and size.

It reads a line of JSON per request (port, path, body) and writes a line of JSON: status and bytes. The status is 0
if the response was incomplete.
"""

from __future__ import annotations

import http.client
import json
import sys

_LIMIT = 120  # seconds without a byte
_READ = 2**20


def take(port: int, path: str, body: bytes) -> tuple[int, int]:
    """Send a request. Returns status and bytes of its response."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_LIMIT)
    size = 0
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        while part := answer.read(_READ):
            size += len(part)
    except (OSError, http.client.HTTPException):
        return 0, size
    finally:
        connection.close()
    whole = answer.headers.get("content-length", str(size)) == str(size)
    return answer.status if whole else 0, size


if __name__ == "__main__":
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(take(asked["port"], asked["path"], asked["body"].encode())), flush=True)
