"""`python -m bench.evaluation`: the time that lm-evaluation-harness takes for a few-shot task on each server.

The task consists of random questions with four choices after the same five examples, like the harness' few-shot tasks.
`make clients` installs the harness (PYTHONPATH=.venv/clients); for a tokenizer's folder it also needs `transformers`.
Each round has new questions, so that no prompt is cached, and the order of the servers alternates.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from random import Random
from time import perf_counter

TASK = {
    "task": "made_up",
    "dataset_path": "json",
    "test_split": "test",
    "fewshot_split": "shots",
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "fewshot_config": {"sampler": "first_n"},
    "num_fewshot": 5,
    "metric_list": [{"metric": "acc"}],
}


def write_task(folder: Path, rng: Random, questions: int, words: int) -> None:
    """Write a task of `questions` questions of `words` words each, and five such examples."""

    def row() -> dict[str, object]:
        def text(count: int) -> str:
            return " ".join(rng.choice(COMMON) for _ in range(count))

        return {"question": text(words), "choices": [text(2) for _ in range(4)], "answer": rng.randrange(4)}

    files = {}
    for split, count in (("test", questions), ("shots", 5)):
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row()) + "\n" for _ in range(count)), encoding="utf-8")
        files[split] = str(path)
    task = TASK | {"dataset_kwargs": {"data_files": files}}
    (folder / "made_up.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is valid YAML


COMMON = ("the", "of", "and", "to", "in", "is", "that", "for", "it", "was", "on", "are", "as", "with", "his", "they")


def seconds(url: str, model: str, tokenizer: Path, folder: Path, at_once: int) -> float:
    """The time in seconds that the harness takes for the task on one server."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    where = {
        "model": model,
        "base_url": f"{url}/v1/completions",
        "tokenizer": str(tokenizer),
        "num_concurrent": at_once,
        "max_retries": 1,
        "timeout": 3600,
    }
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    start = perf_counter()
    simple_evaluate("local-completions", where, ["made_up"], batch_size=1, task_manager=manager, bootstrap_iters=0)
    return perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for each round and the ratio to the first server."""
    parser = argparse.ArgumentParser(prog="python -m bench.evaluation", description=__doc__)
    parser.add_argument(
        "--target", action="append", required=True, metavar="MODEL=URL", help="a server; repeat for several"
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder of `python -m bench model --type hf`")
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--words", type=int, default=30, help="words of a question (30)")
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args(arguments)
    targets = [target.partition("=")[::2] for target in options.target]
    taken: dict[str, list[float]] = {url: [] for _, url in targets}
    with tempfile.TemporaryDirectory() as hub:
        os.environ |= {
            "HF_HOME": hub,
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        for number in range(options.rounds):
            with tempfile.TemporaryDirectory() as folder:
                write_task(Path(folder), Random(), options.questions, options.words)
                for model, url in targets if number % 2 else reversed(targets):
                    taken[url].append(seconds(url, model, options.tokenizer, Path(folder), options.at_once))
                    print(f"round {number + 1}: {url} {taken[url][-1]:.1f} s", flush=True)
    base = statistics.median(taken[targets[0][1]])
    for _, url in targets:
        print(f"{url}: {statistics.median(taken[url]):.1f} s, {base / statistics.median(taken[url]):.2f} times as fast")


if __name__ == "__main__":
    main()
