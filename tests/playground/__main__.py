"""`python -m tests.playground`: takes pictures of the playground by width and theme, for the documents."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

from PIL import Image

TESTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))

from playwright.sync_api import Browser, expect  # noqa: E402

from conftest import running  # noqa: E402

from .chromium import browsing  # noqa: E402
from .page_driver import PageDriver  # noqa: E402

SIZES = {"-phone": (390, 844), "-tablet": (820, 1000), "": (1440, 900)}
STORY = "Once upon a time there was a little girl named Lily. She had a small red boat, and every morning she"
TIDY = """() => {
  for (const details of document.querySelectorAll("#fields details")) details.open = false;
  document.querySelector("#pane-settings").scrollTop = 0;
}"""
COLOURS = 96  # of a picture's palette


def main() -> None:
    """Take six pictures: three widths, light and dark."""
    parser = argparse.ArgumentParser(prog="python -m tests.playground", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=TESTS.parent / "docs" / "pictures")
    folder: Path = parser.parse_args().folder
    with running("--parallel", "4", key=None) as server, browsing() as browser:
        for name, (width, height) in SIZES.items():
            for dark in (False, True):
                file = folder / f"playground{name}{'-dark' if dark else ''}.png"
                size = save(take(browser, server.url, width, height, dark), file)
                print(f"{file.name} {size // 1024} KiB")


def take(browser: Browser, url: str, width: int, height: int, dark: bool) -> bytes:
    """Take a picture of a story that was generated and scored."""
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme="dark" if dark else "light",
        reduced_motion="reduce",
    )
    driver = PageDriver(context.new_page(), url).open()
    driver.write(STORY)
    driver.set(max_tokens=220, temperature=0.7, seed=11)
    driver.page.evaluate(TIDY)
    driver.press("Escape")
    driver.continues()
    driver.scores()
    if dark:
        driver.find('#colour [value="surprise"]').check(force=True)
    expect(driver.find("#numbers")).to_be_visible()
    expect(driver.find("#context-text")).to_contain_text(f"{driver.tokens.count()} /")
    driver.find("#page").evaluate("(page) => { page.scrollTop = 0; }")
    if width == SIZES["-phone"][0] and dark:
        driver.shows("settings")
    elif width == SIZES["-tablet"][0] and dark:
        several(driver)
    else:
        driver.hover(driver.find("#mirror .model.p9").nth(2))
    picture = driver.page.screenshot()
    context.close()
    return picture


def several(driver: PageDriver) -> None:
    """Generate three choices side by side."""
    driver.set(n=3, max_tokens=40, min_tokens=30, seed=5)
    driver.press("Escape")
    driver.area.focus()
    driver.press("Control+Enter")
    driver.ended()


def save(picture: bytes, file: Path) -> int:
    """Write a PNG with few colours. Returns its size in bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(io.BytesIO(picture)) as image:
        image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(file, optimize=True)
    return file.stat().st_size


if __name__ == "__main__":
    main()
