"""`python -m tests.playground`: pictures of the playground by width and theme, for the docs and for looking at."""

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
    """Six pictures: three widths, light and dark."""
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
    """One picture, of a story that was written and scored."""
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme="dark" if dark else "light",
        reduced_motion="reduce",
    )
    visitor = PageDriver(context.new_page(), url).open()
    visitor.write(STORY)
    visitor.set(max_tokens=220, temperature=0.7, seed=11)
    visitor.page.evaluate(TIDY)
    visitor.press("Escape")
    visitor.continues()
    visitor.scores()
    if dark:
        visitor.find('#colour [value="surprise"]').check(force=True)
    expect(visitor.find("#numbers")).to_be_visible()
    expect(visitor.find("#context-text")).to_contain_text(f"{visitor.tokens.count()} /")
    visitor.find("#page").evaluate("(page) => { page.scrollTop = 0; }")
    if width == SIZES["-phone"][0] and dark:
        visitor.shows("settings")
    elif width == SIZES["-tablet"][0] and dark:
        several(visitor)
    else:
        visitor.hover(visitor.find("#mirror .model.p9").nth(2))
    picture = visitor.page.screenshot()
    context.close()
    return picture


def several(visitor: PageDriver) -> None:
    """Three answers side by side."""
    visitor.set(n=3, max_tokens=40, min_tokens=30, seed=5)
    visitor.press("Escape")
    visitor.area.focus()
    visitor.press("Control+Enter")
    visitor.ended()


def save(picture: bytes, file: Path) -> int:
    """As a PNG with few colours; its size in bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(io.BytesIO(picture)) as image:
        image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(file, optimize=True)
    return file.stat().st_size


if __name__ == "__main__":
    main()
