"""lm-evaluation-harness against a running server, without a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

TASKS = Path(__file__).parent / "tasks"

Evaluate = Callable[..., dict[str, list[dict[str, Any]]]]


@contextmanager
def evaluating(server: Any, hub: Path) -> Iterator[Evaluate]:
    """A function that runs tasks of the folder `tasks` and returns the harness' samples by task.

    `hub`: an empty folder, which the harness uses as its cache.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(hub))
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "HF_EVALUATE_OFFLINE"):
            patch.setenv(name, "1")
        patch.delenv("OPENAI_API_KEY", raising=False)
        patch.chdir(TASKS)  # the tasks name their files from here
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=str(TASKS), include_defaults=False)

        def run(*tasks: str, batch_size: int = 1, **arguments: Any) -> dict[str, list[dict[str, Any]]]:
            where = {"model": server.model, "base_url": f"{server.url}/v1/completions", "max_retries": 1}
            found = simple_evaluate(
                "local-completions",
                where | arguments,
                list(tasks),
                batch_size=batch_size,
                task_manager=manager,
                bootstrap_iters=0,
                log_samples=True,
            )
            return found["samples"]

        yield run
