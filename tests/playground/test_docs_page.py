"""The page of the API in a real browser: it shows the whole OpenAPI document, sends requests and shows responses."""

from __future__ import annotations

import json
import shlex
from typing import Any

import httpx
import pytest
from playwright.sync_api import Locator, Page, expect

from afterword.api.app import PROTECTED_ROUTES, PUBLIC_ROUTES

from .conftest import Visit


@pytest.fixture
def page(visit: Visit, open_server: Any) -> Page:
    return opened(visit(open_server.url).page, open_server.url)


def opened(page: Page, url: str) -> Page:
    page.goto(f"{url}/docs")
    expect(page.locator(".operation").first).to_be_visible()
    return page


def form(page: Page, operation: str) -> Locator:
    return page.get_by_role("form", name=f"Try {operation}", exact=True)


def test_every_operation_and_every_field_is_there(page: Page, open_server: Any) -> None:
    document = httpx.get(f"{open_server.url}/openapi.json", trust_env=False).json()
    shown = page.locator(".operation h2").all_inner_texts()
    routes = {
        (method, route.path.replace(":path", ""))
        for route in (*PUBLIC_ROUTES, *PROTECTED_ROUTES)
        for method in route.methods or ()
    }
    assert {tuple(each.split()) for each in shown} == {each for each in routes if each[0] != "HEAD"}
    section = page.locator("#post-v1-completions")
    fields = document["components"]["schemas"]["CompletionRequest"]["properties"]
    terms = section.locator("dl").first.locator("dt code").all_inner_texts()
    assert set(fields) <= set(terms)
    assert "include_usage" in terms
    for field in fields.values():
        assert field["description"] in section.inner_text()
    expect(section.locator("dt", has_text="max_tokens")).to_contain_text("integer, at least 0 · default 16")


def test_a_stream_is_shown_while_it_arrives_and_can_be_stopped(page: Page) -> None:
    completions = form(page, "POST /v1/completions")
    body = {"prompt": "Once", "max_tokens": 2000, "ignore_eos": True, "stream": True}
    completions.get_by_label("Body").fill(json.dumps(body))
    completions.get_by_role("button", name="Send").click()
    expect(completions.get_by_label("Answer")).to_contain_text("data: {")
    completions.get_by_role("button", name="Stop").click()
    expect(completions.get_by_role("status")).to_contain_text("Stopped after")
    expect(completions.get_by_role("button", name="Stop")).to_be_disabled()


def test_a_response_is_shown_with_status_headers_and_body(page: Page) -> None:
    completions = form(page, "POST /v1/completions")
    completions.get_by_label("Body").fill('{"prompt": "Once", "max_tokens": 2}')
    completions.get_by_role("button", name="Send").click()
    expect(completions.get_by_role("status")).to_contain_text("200 OK ·")
    answer = json.loads(completions.get_by_label("Answer").inner_text())
    assert answer["usage"]["completion_tokens"] == 2
    completions.get_by_text("Headers", exact=True).click()
    expect(completions.locator("pre", has_text="x-request-id: req_")).to_be_visible()


def test_an_error_is_shown_with_the_servers_message(visit: Visit, open_server: Any) -> None:
    driver = visit(open_server.url)
    completions = form(opened(driver.page, open_server.url), "POST /v1/completions")
    completions.get_by_label("Body").fill('{"n": 0')
    expect(completions.get_by_label("Body")).to_have_attribute("aria-invalid", "true")
    completions.get_by_label("Body").fill('{"n": 0}')
    expect(completions.get_by_label("Body")).to_have_attribute("aria-invalid", "false")
    completions.get_by_role("button", name="Send").click()
    expect(completions.get_by_role("status")).to_contain_text("400 Bad Request")
    expect(completions.get_by_label("Answer")).to_contain_text("integer below minimum value")
    driver.problems.clear()  # the browser reports the 400 that the test expects


def test_path_and_query_parameters_have_inputs(page: Page, open_server: Any) -> None:
    one = form(page, "GET /v1/models/{model}")
    one.get_by_label("model").fill("afterword-tiny")
    one.get_by_role("button", name="Send").click()
    expect(one.get_by_label("Answer")).to_contain_text('"id": "afterword-tiny"')
    many = form(page, "GET /v1/batches")
    many.get_by_label("limit").fill("3")
    many.get_by_text("curl", exact=True).click()
    expect(many.locator("pre").first).to_contain_text(f"curl '{open_server.url}/v1/batches?limit=3'")


def test_a_file_is_sent_as_multipart_form(page: Page) -> None:
    upload = form(page, "POST /v1/files")
    row = b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a"}}\n'
    upload.get_by_label("file").set_input_files({"name": "in.jsonl", "mimeType": "application/jsonl", "buffer": row})
    upload.get_by_role("button", name="Send").click()
    expect(upload.get_by_label("Answer")).to_contain_text('"filename": "in.jsonl"')


def test_curl_sends_the_same_request(page: Page, open_server: Any) -> None:
    completions = form(page, "POST /v1/completions")
    completions.get_by_label("Body").fill('{"prompt": "it\'s", "stream": true}')
    command = completions.locator("pre").first.inner_text()
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:3] == ["curl", "-N", f"{open_server.url}/v1/completions"]
    assert json.loads(words[words.index("-d") + 1]) == {"prompt": "it's", "stream": True}
    page.get_by_label("API key").fill("sk-secret")
    expect(completions.locator("pre").first).to_contain_text("Bearer $AFTERWORD_API_KEY")
    assert "sk-secret" not in page.locator("body").inner_text()


def test_a_server_with_api_keys_requires_one(visit: Visit, serve: Any) -> None:
    with serve("--parallel", "1") as server:
        driver = visit(server.url)
        driver.page.goto(f"{server.url}/docs")
        expect(driver.page.get_by_role("status")).to_have_text("This server requires an API key. Enter it above.")
        driver.problems.clear()  # the browser reports the 401 that the test expects
        driver.page.get_by_label("API key").fill(server.key)
        driver.page.get_by_label("API key").press("Enter")
        version = form(driver.page, "GET /version")
        version.get_by_role("button", name="Send").click()
        expect(version.get_by_label("Answer")).to_contain_text('"version"')


@pytest.mark.parametrize(("width", "dark"), [(1440, False), (820, True), (360, False)])
def test_the_page_fits_every_width_in_light_and_dark(visit: Visit, open_server: Any, width: int, dark: bool) -> None:
    page = opened(visit(open_server.url, width=width, dark=dark).page, open_server.url)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(int(part) for part in paper[4:-1].split(",")) < 300) == dark
    page.get_by_role("button", name="Light or dark").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "light"


def test_the_page_works_without_a_mouse_and_all_fields_have_names(page: Page) -> None:
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the operations")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#operations")).to_be_focused()
    unnamed = """() => [...document.querySelectorAll("input, textarea, button, form, nav, section")]
        .filter((node) => !(node.labels?.length || node.ariaLabel || node.textContent.trim())).length"""
    assert page.evaluate(unnamed) == 0


def test_a_link_scrolls_to_its_operation(visit: Visit, open_server: Any) -> None:
    page = visit(open_server.url).page
    page.goto(f"{open_server.url}/docs#get-ready")
    expect(page.locator("#get-ready")).to_be_in_viewport()
