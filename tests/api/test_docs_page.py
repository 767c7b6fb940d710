"""`/docs` as it is sent: small, and of this server alone. What it does in a browser is in tests/playground."""

from __future__ import annotations

import re

import httpx
from openai import OpenAI

from afterword.api.routes.static_pages import PLAYGROUND

PARTS = ("docs.html", "docs.css", "docs.js", "dom.js", "store.js")


def test_the_page_needs_no_key_and_holds_none(http: httpx.Client, client: OpenAI) -> None:
    answer = httpx.get(f"{http.base_url}/docs", trust_env=False)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert client.api_key not in answer.text
    assert httpx.get(f"{http.base_url}/openapi.json", trust_env=False).status_code == 401


def test_all_that_it_names_is_here(http: httpx.Client) -> None:
    text = http.get("/docs").text
    names = re.findall(r'(?:href|src)="([^"#]+)"', text)
    assert {"playground/docs.css", "playground/docs.js"} <= set(names)
    for name in names:
        assert http.get(f"/{name.removeprefix('.')}").status_code == 200


def test_it_weighs_little_and_names_no_other_place() -> None:
    texts = [(PLAYGROUND / name).read_text(encoding="utf-8") for name in PARTS]
    assert sum(len(text.encode()) for text in texts) <= 41_000
    links = {link for text in texts for link in re.findall(r"https?://[^\s\"'`]+", text)}
    assert links <= {"http://www.w3.org/2000/svg"}, "a namespace, which nobody asks for"
    imported = {name for text in texts for name in re.findall(r'from "\./([^"]+)"', text)}
    assert imported <= set(PARTS)
