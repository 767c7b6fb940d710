"""`python -m tests.chaos.serve [--scripted] [--planted G5] serve …`: the `afterword` command with test options.

`--scripted`: the worker is the real one with a scripted model. `--planted`: apply the named gate's bug, in this process
or in the worker. The worker runs this file too, with `worker` as the last argument.
"""

from __future__ import annotations

import argparse
import functools
import runpy
import sys

import pytest

from afterword import cli
from afterword.cli import model_setup
from afterword.engine.parent.supervisor import Supervisor
from afterword.engine.parent.worker_process import WorkerProgram
from afterword.engine.worker import worker_main

from . import scripted_model
from .gate import Fault, find_gate


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--scripted", action="store_true")
    parser.add_argument("--planted")
    parser.add_argument("words", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    fault = find_gate(options.planted).fault if options.planted else None
    name, *arguments = options.words
    sys.argv = [name, *arguments]
    if name == "worker":
        _worker(options.scripted, fault)
        return
    flags = sys.orig_argv[sys.orig_argv.index("tests.chaos.serve") + 1 : -len(options.words)]
    if options.scripted or (fault and fault.where == "worker"):
        program = WorkerProgram((sys.executable, "-m", "tests.chaos.serve", *flags, "worker"))
        model_setup.Supervisor = functools.partial(Supervisor, program=program)  # type: ignore[misc, assignment]
    if fault and fault.where == "server":
        fault.plant(pytest.MonkeyPatch())
    cli.main(options.words, prog_name="afterword")


def _worker(scripted: bool, fault: Fault | None) -> None:
    if fault and fault.where == "worker":
        fault.plant(pytest.MonkeyPatch())
    if scripted:
        worker_main.serve(scripted_model.load)
    else:
        runpy.run_module("afterword.engine.llama", run_name="__main__")


if __name__ == "__main__":
    main()
