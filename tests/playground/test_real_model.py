"""The page with a model that knows English and facts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from playwright.sync_api import expect

from .conftest import Visit


def test_a_fact_is_streamed_scored_and_explained(visit: Visit, serve: Any, real_model: Path) -> None:
    with serve(str(real_model), "--parallel", "2", key=None) as server:
        driver = visit(server.url).open()
        driver.set(temperature=0)
        driver.begins_endless("The capital of France is")
        begun = driver.text
        expect(driver.tokens.nth(driver.tokens.count() + 10)).to_be_attached()
        assert driver.text.startswith(begun)
        assert len(driver.text) > len(begun)
        driver.press("Escape")
        driver.expect_status("Stopped")
        assert "Paris" in driver.text
        driver.scores()
        paris = driver.find("#mirror .token").get_by_text("Paris", exact=True).first
        expect(driver.hover(paris)).to_contain_text("Paris")
