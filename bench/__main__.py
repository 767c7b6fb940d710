"""`python -m bench`: measure running servers; or a subcommand `engine`, `limits`, `model`, `serve`. Each has --help."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from random import Random, SystemRandom
from time import perf_counter, process_time

from bench import limits, report
from bench.client import NotPossible
from bench.scenarios import FULL, QUICK, SCENARIOS, Measure, Scenario, Size
from bench.target import Target, common_tokens, find_target

Rounds = dict[str, list[report.Outcome]]
SHARE = Measure("of read bandwidth", "%", more_is_better=True)
"""Read bandwidth is measured right before and after each run, because it changes from minute to minute."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    others = {"engine": _engine, "limits": _limits, "model": _model, "serve": _serve}
    if words and words[0] in others:
        return others[words[0]](words[1:])
    options = _options().parse_args(words)
    try:
        return asyncio.run(_measure(options))
    except (OSError, NotPossible, ValueError) as problem:
        print(f"bench: {problem}", file=sys.stderr)
        return 2


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    names = [scenario.name for scenario in SCENARIOS]
    parser.add_argument(
        "--target", action="append", required=True, metavar="NAME=URL", help="a running server; repeat for several"
    )
    parser.add_argument("--base", metavar="NAME", help="the target that ratios compare with (the first target)")
    parser.add_argument("--scenario", action="append", choices=names, help="repeat for several (all but front-end)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each scenario on each target (3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results as JSON")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="write a bar chart of the ratios (SVG)")
    parser.add_argument(
        "--note", action="append", default=[], help="a text for the JSON, such as a server's options; repeat"
    )
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the served model, to report the share of bandwidth")
    parser.add_argument("--key", help="API key for all targets")
    parser.add_argument(
        "--timeout", type=float, default=900, help="time limit in seconds of one scenario in one round (900)"
    )
    parser.add_argument("--pause", type=float, default=1, help="seconds of idle time before each measurement (1)")
    parser.add_argument("--seed", type=int, help="seed of the prompts (a random one, so that no prompt is cached)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to check that everything works")
    parser.add_argument("--questions", type=int, help="questions in scoring; fewer for slow servers (24)")
    return parser


async def _measure(options: argparse.Namespace) -> int:
    if options.rounds < 1:
        raise ValueError("--rounds must be 1 or more.")
    size: Size = QUICK if options.quick else FULL
    if options.questions:
        size = replace(size, questions=options.questions)
    seed = options.seed if options.seed is not None else SystemRandom().getrandbits(32)
    wanted = options.scenario or [scenario.name for scenario in SCENARIOS if not scenario.tiny]
    targets = await _find(options.target, options.key)
    names = [target.name for target in targets]
    base = options.base or names[0]
    if base not in names:
        raise ValueError(f"--base {base} is not the name of a target.")
    if (load := limits.load()) > 0.3:
        _say(f"other programs use {load:.1f} cores of this machine: figures will be low and ratios uncertain")
    _say("measuring the machine's limits")
    bounds = await limits.measure(options.quick)
    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "quick": options.quick,
        "questions": size.questions,
        "seed": seed,
        "machine": limits.machine(),
        "busy_cores_before": round(load, 2),
        "limits": bounds,
        "targets": {
            t.name: {"model": Path(t.model).name, "version": t.version, "asked": t.dialect.name} for t in targets
        },
        "notes": options.note,
    }
    found: list[report.Row] = []
    for scenario in SCENARIOS:
        if scenario.name in wanted:
            rounds = await _alternate(scenario, targets, size, seed, options)
            found += report.rows(scenario.name, _measures(scenario, options), rounds)
            # After each scenario, so that an interrupted run keeps its results.
            _write(options, found, names, base, about)
    print(report.table(found, names, base), limits.described(bounds, options.gguf), sep="\n\n")
    for target in targets:
        await target.client.close()
    return 0


async def _find(given: Sequence[str], key: str | None) -> list[Target]:
    targets: list[Target] = []
    for name, _, url in (target.rpartition("=") for target in given):
        if not name or name in {target.name for target in targets}:
            raise ValueError("--target must be NAME=URL with a different NAME for each target.")
        try:
            target = await find_target(name, url, key)
        except (OSError, NotPossible) as problem:
            raise NotPossible(f"{name}, {url}: {problem}") from problem
        _say(f"{name}: {Path(target.model).name}, asked with {target.dialect.name} fields, version {target.version}")
        targets.append(target)
    return common_tokens(targets)


async def _alternate(
    scenario: Scenario, targets: Sequence[Target], size: Size, seed: int, options: argparse.Namespace
) -> Rounds:
    """Run a scenario on all targets in each round, in alternating order. Skips a target after a failed run."""
    rounds: Rounds = {target.name: [] for target in targets}
    for number in range(options.rounds):
        for target in targets[:: -1 if number % 2 else 1]:
            if any(isinstance(outcome, str) for outcome in rounds[target.name]):
                continue
            await asyncio.sleep(options.pause)
            # All targets of a round get the same prompts; no prompt occurs in two rounds.
            random = Random(f"{seed} {scenario.name} {number}")
            outcome, share = await _run_with_bandwidth(scenario, target, size, random, options)
            rounds[target.name].append(outcome)
            summary = outcome if isinstance(outcome, str) else _summary(_measures(scenario, options), outcome)
            busy = f"  (the client used {share:.0%} of a core)" if share > 0.1 and not isinstance(outcome, str) else ""
            _say(f"{scenario.name} {number + 1}/{options.rounds} {target.name}: {summary}{busy}")
    return rounds


async def _run_with_bandwidth(
    scenario: Scenario, target: Target, size: Size, random: Random, options: argparse.Namespace
) -> tuple[report.Outcome, float]:
    """Like `_once`, plus the share of read bandwidth for a scenario that reads the whole model for each token."""
    if not (scenario.reads and options.gguf):
        return await _once(scenario, target, size, random, options.timeout)
    before = limits.bandwidth_now()
    outcome, share = await _once(scenario, target, size, random, options.timeout)
    could = (before + limits.bandwidth_now()) / 2
    if isinstance(outcome, str):
        return outcome, share
    read = outcome[scenario.reads] * options.gguf.stat().st_size
    return {**outcome, SHARE.name: 100 * read / could}, share


async def _once(
    scenario: Scenario, target: Target, size: Size, random: Random, timeout: float
) -> tuple[report.Outcome, float]:
    """The outcome of one run, and the share of a core that this process used."""
    wall, busy = perf_counter(), process_time()
    outcome: report.Outcome
    try:
        outcome = await asyncio.wait_for(scenario.run(target, size, random), timeout)
    except NotPossible as problem:
        outcome = str(problem)
    except TimeoutError:
        outcome = f"took more than {timeout:.0f} s"
    except OSError as problem:
        outcome = f"the connection failed: {problem}"
    return outcome, (process_time() - busy) / (perf_counter() - wall)


def _measures(scenario: Scenario, options: argparse.Namespace) -> tuple[Measure, ...]:
    return (*scenario.measures, SHARE) if scenario.reads and options.gguf else scenario.measures


def _summary(measures: Sequence[Measure], numbers: report.Outcome) -> str:
    assert not isinstance(numbers, str)
    return ", ".join(f"{m.name} {numbers[m.name]:.3g} {m.unit}" for m in measures)


def _write(
    options: argparse.Namespace, found: Sequence[report.Row], names: Sequence[str], base: str, about: report.Json
) -> None:
    if options.json:
        text = json.dumps(report.document(found, base, about), indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")
    if options.picture:
        title = f"Times better than {base}, {about['date'][:10]}, {about['machine']['cores']} cores"
        options.picture.write_text(report.picture(found, names, base, title), encoding="utf-8")


def _engine(arguments: Sequence[str]) -> int:
    from bench import engine

    return engine.main(arguments)


def _limits(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench limits", description=limits.__doc__)
    parser.add_argument(
        "--gguf", type=Path, metavar="FILE", help="a model file, to compute its highest tokens per second"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to check that it works")
    options = parser.parse_args(arguments)
    print(limits.described(asyncio.run(limits.measure(options.quick)), options.gguf))
    return 0


def _model(arguments: Sequence[str]) -> int:
    from bench import model

    parser = argparse.ArgumentParser(prog="python -m bench model", description=model.__doc__)
    parser.add_argument("path", type=Path, help="the file to write; a folder for type HF")
    parser.add_argument("--shape", choices=model.FORMS, default="qwen2.5-0.5b")
    kinds = (*sorted(model.TYPES), "HF")
    parser.add_argument(
        "--type", choices=kinds, type=str.upper, default="Q8_0", help="type of the weights, or HF for vLLM"
    )
    options = parser.parse_args(arguments)
    if options.type == "HF":
        model.write_folder(options.path, model.FORMS[options.shape])
    else:
        model.write_gguf(options.path, model.FORMS[options.shape], options.type)
    print(options.path)
    return 0


def _serve(arguments: Sequence[str]) -> int:
    from bench import peers

    return peers.main(arguments)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
