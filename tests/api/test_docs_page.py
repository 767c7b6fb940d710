"""The files of the page `/docs` over HTTP. tests/playground tests the page in a browser."""

from __future__ import annotations

import re

import httpx
from openai import OpenAI

from afterword.api.routes.static_pages import PLAYGROUND

PARTS = ("docs.html", "docs.css", "docs.js", "dom.js", "storage.js")


def test_the_page_needs_no_key_and_holds_none(http: httpx.Client, client: OpenAI) -> None:
    answer = httpx.get(f"{http.base_url}/docs", trust_env=False)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert client.api_key not in answer.text
    assert httpx.get(f"{http.base_url}/openapi.json", trust_env=False).status_code == 401


def test_the_page_loads_only_files_that_exist(http: httpx.Client) -> None:
    text = http.get("/docs").text
    names = re.findall(r'(?:href|src)="([^"#]+)"', text)
    assert {"playground/docs.css", "playground/docs.js"} <= set(names)
    for name in names:
        assert http.get(f"/{name.removeprefix('.')}").status_code == 200


def test_the_page_is_small_and_loads_nothing_from_elsewhere() -> None:
    texts = [(PLAYGROUND / name).read_text(encoding="utf-8") for name in PARTS]
    assert sum(len(text.encode()) for text in texts) <= 40_000
    links = {link for text in texts for link in re.findall(r"https?://[^\s\"'`]+", text)}
    assert links <= {"http://www.w3.org/2000/svg"}, "only the SVG namespace, which browsers do not load"
    imported = {name for text in texts for name in re.findall(r'from "\./([^"]+)"', text)}
    assert imported <= set(PARTS)
