"""Tests of what the worker says if vLLM cannot be used, and of how it takes outputs, with parts in place of vLLM."""

from __future__ import annotations

import asyncio
import json
import sys
from argparse import ArgumentParser
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from afterword.engine.messages import LoadVllm
from afterword.engine.vllm.library import Collector, check_version, make_arguments, open_model
from afterword.engine.vllm.requests import SampleOutput
from afterword.errors import SettingError


class BrokenVllm:
    """Finds the module `vllm`, and raises an exception when it is imported."""

    def __init__(self, problem: Exception) -> None:
        self._problem = problem

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        if name == "vllm":
            raise self._problem
        return None


class Arguments:
    """In place of vLLM's `AsyncEngineArgs`."""

    @staticmethod
    def add_cli_args(parser: ArgumentParser) -> ArgumentParser:
        for name in ("--model", "--max-logprobs", "--generation-config", "--dtype"):
            parser.add_argument(name)
        parser.add_argument("--disable-log-stats", action="store_true")
        return parser

    @staticmethod
    def from_cli_args(parsed: Any) -> Any:
        if parsed.dtype == "bad":
            raise TypeError("no such\n  type\n    For further information visit a page")
        return parsed


def settings(path: Path, *flags: str) -> LoadVllm:
    return LoadVllm(str(path), flags, "", False)


@pytest.mark.parametrize("problem", [ImportError("no torch"), RuntimeError("no torch"), OSError("no torch")])
def test_a_vllm_that_cannot_be_imported_is_a_sentence(tmp_path, monkeypatch, problem):
    for name in ("config", "tokenizer"):
        (tmp_path / f"{name}.json").write_text(json.dumps({}))
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    monkeypatch.setitem(sys.modules, "tokenizers", Mock())
    monkeypatch.setattr(sys, "meta_path", [BrokenVllm(problem), *sys.meta_path])
    monkeypatch.setattr("afterword.engine.vllm.library.prepare_environment", lambda _: None)
    with pytest.raises(SettingError, match=r"vLLM cannot be imported: no torch\. .*--vllm-python"):
        open_model(settings(tmp_path))


def test_flags_that_vllm_does_not_accept_are_a_sentence(tmp_path):
    assert make_arguments(settings(tmp_path, "--dtype", "x"), Arguments, ArgumentParser).dtype == "x"
    with pytest.raises(SettingError, match=r"does not accept its flags: .*--other"):
        make_arguments(settings(tmp_path, "--other"), Arguments, ArgumentParser)
    with pytest.raises(SettingError, match=r"does not accept its flags: type\. .*--vllm-python"):
        make_arguments(settings(tmp_path, "--dtype", "bad"), Arguments, ArgumentParser)


@pytest.mark.parametrize("version", ["0.32.0", "0.33.1.dev4+g12", "1.0", "0.1.dev1+g1234567", "0.1.dev20260+gabc.cpu"])
def test_versions_that_may_be_new_enough_are_accepted(version):
    check_version(version)


@pytest.mark.parametrize("version", ["0.31.9", "0.1.0", "0.6.dev3", "0.2.dev1+g12"])
def test_older_versions_are_refused(version):
    with pytest.raises(SettingError, match=rf"vLLM {version.replace('+', '.')} is installed"):
        check_version(version)


class TheirCollector:
    """In place of vLLM's collector: it has one output, or an exception, before it is replaced."""

    def __init__(self, before: Any = None) -> None:
        self._before = before

    def put(self, output: Any) -> None:
        raise AssertionError("the collector was replaced")

    def get_nowait(self) -> Any:
        if isinstance(self._before, Exception):
            raise self._before
        return self._before


def vllm_output(*ids: int, finished: bool = False) -> SimpleNamespace:
    """An output with the members that are read."""
    part = SimpleNamespace(token_ids=list(ids), logprobs=None)
    return SimpleNamespace(outputs=[part], prompt_logprobs=None, num_cached_tokens=None, finished=finished)


def collected(outputs: list[Any], before: Any = None, wanted: int = 9) -> tuple[list[SampleOutput], Collector]:
    """What was taken of these outputs, of which `wanted` are wanted, and the collector after them."""
    taken: list[SampleOutput] = []

    def take(output: SampleOutput) -> bool:
        if output.ids == (0,):
            raise ValueError("an output that cannot be taken")
        taken.append(output)
        return len(taken) < wanted

    async def main() -> Collector:
        collector, theirs = Collector((1, 2), take), TheirCollector(before)
        collector.replace(theirs)
        for output in outputs:
            theirs.put(output)
        return collector

    return taken, asyncio.run(main())


def test_an_output_that_came_before_the_collector_was_replaced_is_the_first():
    taken, collector = collected([vllm_output(4), vllm_output(5, 6, finished=True)], before=vllm_output(3))
    assert [output.ids for output in taken] == [(3,), (4,), (5, 6)]
    assert collector.finished
    assert collector.ended.result() is None


@pytest.mark.parametrize("wanted", [2, 9])
def test_ids_are_taken_without_an_output_of_vllm(wanted: int):
    """vLLM calls `make_request_output` of a request's state for each token, and gives its collector what it returns."""
    taken: list[SampleOutput] = []

    def take(output: SampleOutput) -> bool:
        taken.append(output)
        return len(taken) < wanted

    async def main() -> Collector:
        collector, theirs, state = Collector((1, 2), take), TheirCollector(vllm_output(3)), SimpleNamespace()
        collector.replace(theirs)
        collector.take_ids_of(state)
        state.num_cached_tokens = 1
        for token, reason in ((4, None), (5, "length")):
            assert state.make_request_output([token], None, reason, None, {}, error=None) is None
        state.make_request_output(  # as vLLM calls it when a request is aborted
            new_token_ids=[], pooling_output=None, finish_reason="abort", stop_reason=None, kv_transfer_params=None
        )
        return collector

    collector = asyncio.run(main())
    assert [(output.ids, output.cached) for output in taken] == [((3,), 0), ((4,), 1), ((5,), 1)][:wanted]
    assert collector.ended.result() is None
    assert collector.finished == (wanted > 2)


def test_outputs_after_the_last_that_is_wanted_are_not_taken():
    taken, collector = collected([vllm_output(each) for each in (3, 4, 5)], wanted=2)
    assert [output.ids for output in taken] == [(3,), (4,)]
    assert collector.ended.done()
    assert not collector.finished, "vLLM must be told to end the request"


@pytest.mark.parametrize(("output", "error"), [(KeyError("vLLM"), KeyError), (vllm_output(0), ValueError)])
def test_an_error_ends_the_request_and_reaches_no_code_of_vllm(output: Any, error: type[Exception]):
    """An exception in its output handler would end all requests."""
    taken, collector = collected([vllm_output(3), output, vllm_output(4)])
    assert [each.ids for each in taken] == [(3,)]
    assert isinstance(collector.ended.exception(), error)


def test_taking_the_last_output_may_cancel_the_request():
    """The job cancels its tasks when it ends. The future that its task waits for is then cancelled at once."""

    async def main() -> None:
        def take(_: SampleOutput) -> bool:
            waiting.cancel()
            return False

        collector, theirs = Collector((1, 2), take), TheirCollector()
        collector.replace(theirs)
        waiting = asyncio.ensure_future(wait_for(collector))
        await asyncio.sleep(0)
        theirs.put(vllm_output(3, finished=True))
        assert collector.finished
        assert collector.ended.cancelled()

    async def wait_for(collector: Collector) -> None:
        await collector.ended

    asyncio.run(main())


def test_an_error_before_the_collector_was_replaced_is_raised():
    with pytest.raises(KeyError):
        collected([], before=KeyError("vLLM"))
