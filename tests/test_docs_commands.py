"""Every fenced block of the documents is checked, or stands in a table that says why not and where it is instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from docs_blocks import CHECKS, Block, Outcome, Workplace, blocks, check, pages, read, spelled
from docs_elsewhere import ELSEWHERE
from docs_hub import serving

Place = Callable[[], Workplace]


@pytest.fixture(scope="module")
def place(serve: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Makes workplaces beside one server."""
    with serve("--parallel", "8", key=None) as server, serving() as hub:
        address = server.url.removeprefix("http://")
        started = tmp_path_factory.mktemp("started")
        yield lambda: Workplace(tmp_path_factory.mktemp("docs"), address, hub, started)


@pytest.fixture(scope="module")
def outcomes(place: Place, request: pytest.FixtureRequest) -> Iterator[dict[str, Future[list[Outcome]]]]:
    """What came of the pages that are to be tested, two at a time: most of it is waiting for programs to start."""
    wanted = [item.callspec.params["page"] for item in request.session.items if "outcomes" in item.fixturenames]
    with ThreadPoolExecutor(2) as pool:
        yield {page: pool.submit(outcomes_of, page, place()) for page in wanted}


def outcomes_of(page: str, place: Workplace) -> list[Outcome]:
    return [(check if runs_here(block) else spelled)(block, place) for block in read(page)]


def runs_here(block: Block) -> bool:
    return block.name not in ELSEWHERE or ELSEWHERE[block.name].possible


def problems_of(outcomes: list[Outcome]) -> str:
    return "\n\n".join(f"{each.block.place}\n{each.problem}" for each in outcomes if each.problem)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", [page for page in pages() if read(page)])
def test_every_block_of_a_page_does_what_it_says(page: str, outcomes: dict[str, Future[list[Outcome]]]) -> None:
    if problems := problems_of(outcomes[page].result()):
        pytest.fail(problems, pytrace=False)


def test_every_block_has_a_language_that_is_checked() -> None:
    every = [block for page in pages() for block in read(page)]
    assert len(every) > 10
    assert not [block.place for block in every if block.language not in CHECKS]


def test_what_is_run_elsewhere_still_exists() -> None:
    assert not set(ELSEWHERE) - {block.name for page in pages() for block in read(page)}


@pytest.mark.parametrize(
    ("language", "good", "bad"),
    [
        ("sh", "curl -s 127.0.0.1:8000/health\ntest -f README.md", "curl -s 127.0.0.1:8000/nowhere"),
        ("sh", "afterword serve path/to/model.gguf --context 256", "afterword serve --context few"),
        ("sh", "afterword pull hf:owner/repo:Q8_0 && make serve", "make nothing-of-that-name"),
        ("sh", "true | cat", "false | true"),
        ("console", "$ echo a\na", "$ exit 3\na"),
        ("python", "import json", "import nothing_of_that_name"),
        ("toml", "a = 1", "a = "),
        ("json", '{"a": 1}', '{"a": 1,}'),
        ("jsonl", '{"a": 1}\n{"b": 2}', '{"a": 1}\n{'),
        ("yaml", "a: [1, 2]", "a: [1, 2"),
        ("ini", "[Unit]\nDescription=a", "Description=a"),
        ("nginx", "location / { proxy_pass http://127.0.0.1:1; }", "location / { "),
        ("caddyfile", ":8080 {\n\trespond ok\n}", ":8080 {"),
        ("lua", "return { a = 1 }", "return { a = 1"),
    ],
)
def test_the_checks_tell_good_from_bad(language: str, good: str, bad: str, place: Place) -> None:
    here = place()
    texts = [f"```{language}\n{text}\n```" for text in (good, bad)]
    fine, wrong = (check(*blocks("page", text), here) for text in texts)
    assert not fine.problem
    assert wrong.problem


def test_a_block_may_be_a_file_for_the_next(place: Place) -> None:
    here = place()
    page = '1. List\n\n   ```json a.json\n   {"a": 1}\n   ```\n\n   ```sh\n   grep -q 1 a.json\n   ```\n'
    assert [block.line for block in blocks("page", page)] == [3, 7]
    assert not problems_of([check(block, here) for block in blocks("page", page)])
