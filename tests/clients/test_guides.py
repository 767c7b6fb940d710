"""The blocks of the documents that need other people's programs, which `make clients` installs."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from docs_blocks import Block, Workplace, check, pages, read
from docs_elsewhere import ELSEWHERE
from docs_hub import serving

TASKS = Path(__file__).parent / "tasks"
BLOCKS = [
    block for page in pages() for block in read(page) if ELSEWHERE.get(block.name) and ELSEWHERE[block.name].modules
]


@pytest.fixture(scope="module")
def place(serve: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    """A workplace with the tests' own tasks, beside a server."""
    with serve("--parallel", "8", key=None) as server, serving() as hub:
        folder, started = (tmp_path_factory.mktemp(name) for name in ("docs", "started"))
        made = Workplace(folder, server.url.removeprefix("http://"), hub, started)
        for path in TASKS.iterdir():
            (made.folder / path.name).symlink_to(path)
        offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "HF_HUB_DISABLE_TELEMETRY")
        made.environment |= dict.fromkeys(offline, "1")
        yield made


@pytest.mark.timeout(300)
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.page)
def test_a_block_does_what_it_says(block: Block, place: Workplace) -> None:
    for module in ELSEWHERE[block.name].modules:
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed: make clients")
    if problem := check(block, place).problem:
        pytest.fail(f"{block.place}\n{problem}", pytrace=False)
