"""Continue's library against the server: its "llamastack" provider is an editor that sends `suffix`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

NODE = shutil.which("node")
LIBRARY = Path(os.environ.get("NODE_PATH", "")) / "@continuedev" / "openai-adapters"
if NODE is None or not LIBRARY.is_dir():
    pytest.skip("Continue's library is not installed: make clients", allow_module_level=True)

SCRIPT = Path(__file__).parent / "node" / "fill.mjs"


def test_an_editors_gap_is_filled_as_a_plain_request_fills_it(server: Any, http: httpx.Client) -> None:
    fields = {
        "model": server.model,
        "prompt": "def add(a, b):\n    return ",
        "suffix": "\n\nprint(add(1, 2))\n",
        "max_tokens": 12,
        "temperature": 0,
        "stop": ["<|endoftext|>", "\n\n\n"],
    }
    order = {"baseURL": f"{server.url}/v1", "apiKey": server.key, "fields": fields | {"stream": True}}
    command = [str(NODE), str(SCRIPT)]
    done = subprocess.run(command, input=json.dumps(order), capture_output=True, text=True, check=True, timeout=60)
    plain = http.post("/v1/completions", json=fields).raise_for_status().json()
    assert "".join(json.loads(done.stdout)) == plain["choices"][0]["text"]
