"""One server and one browser for all tests, and a new page for each test, which must end without problems."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, expect

from oracle.tiny import write_tiny

from .chromium import browsing, path
from .page_driver import PageDriver

Visit = Callable[..., PageDriver]

expect.set_options(timeout=20_000)  # milliseconds; the machine may be busy


@pytest.fixture(scope="package")  # its event loop would disturb that of other tests
def browser() -> Iterator[Browser]:
    if path() is None:
        pytest.skip("Chromium is not on the path")
    with browsing() as browser:
        yield browser


@pytest.fixture(scope="session")
def open_server(serve: Any) -> Iterator[Any]:
    """The built-in model without a key."""
    with serve("--parallel", "4", key=None) as server:
        yield server


@pytest.fixture(scope="session")
def plain_server(serve: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A strict server with a model that does not support infill."""
    model = write_tiny(tmp_path_factory.mktemp("models") / "plain.gguf", infill=False)
    with serve(str(model), "--strict", "--parallel", "2", key=None) as server:
        yield server


@pytest.fixture
def visit(browser: Browser, tmp_path: Path) -> Iterator[Visit]:
    """`visit(url, width=..., height=..., dark=...)`: a new page. Its problems fail the test."""
    drivers: list[PageDriver] = []

    def visit(url: str, width: int = 1440, height: int = 900, dark: bool = False, touch: bool = False) -> PageDriver:
        context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            reduced_motion="reduce",
            has_touch=touch,
            accept_downloads=True,
        )
        context.set_default_timeout(30_000)
        drivers.append(PageDriver(context.new_page(), url))
        return drivers[-1]

    yield visit
    problems = [line for driver in drivers for line in driver.problems]
    for driver in drivers:
        driver.page.context.close()
    assert not problems


@pytest.fixture
def driver(visit: Visit, open_server: Any) -> PageDriver:
    """A page on the built-in model."""
    return visit(open_server.url).open()
