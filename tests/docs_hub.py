"""A Hub for the commands of the documents: every repository has the built-in model, under names of four kinds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from docs_blocks import BUILTIN

NAMES = [f"model-{kind}.gguf" for kind in ("Q8_0", "Q4_0", "Q4_K_M", "F16")]


class Handler(BaseHTTPRequestHandler):
    """As much of the Hub's protocol as one download takes."""

    def do_GET(self) -> None:
        data, headers = BUILTIN.read_bytes(), {"X-Repo-Commit": "c" * 40}
        if self.path.startswith("/api/models/"):
            lfs = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 1}
            files = [{"rfilename": name, "size": len(data), "lfs": lfs} for name in NAMES]
            data, headers = (
                json.dumps({"id": "owner/repo", "siblings": files}).encode(),
                {"Content-Type": "application/json"},
            )
        else:
            headers["ETag"] = f'"{hashlib.sha256(self.path.encode()).hexdigest()}"'
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_HEAD = do_GET  # noqa: N815 - the name that http.server looks for

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def serving() -> Iterator[str]:
    """The address of a Hub in this process."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
