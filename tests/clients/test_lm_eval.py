"""lm-evaluation-harness, as people install it, against the server: every sample's number and text is checked.

Accuracies are not read, since they hide mistakes: a missing last entry moves log-likelihoods by nats, choices seldom.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if find_spec("lm_eval") is None:
    pytest.skip("lm-eval is not installed: make clients", allow_module_level=True)

if TYPE_CHECKING:
    from harness import Evaluate
    from judge import Judge


BOS = 1
"""A token of the built-in model that a copy of it declares as its BOS. Its EOS is another one."""
BUILTIN = Path(__file__).parents[2] / "src" / "afterword" / "models" / "builtin" / "afterword-tiny.gguf"
NATS = 1e-3


@pytest.fixture(scope="module")
def expanded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from oracle.expand import expand

    return expand(BUILTIN, tmp_path_factory.mktemp("expanded") / "afterword-tiny-f32.gguf")


@pytest.fixture(scope="module")
def judge(expanded: Path) -> Iterator[Judge]:
    from judge import Judge
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # the matrices are small
        yield Judge(expanded)


@pytest.fixture(scope="module")
def evaluate(expanded: Path, serve: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Evaluate]:
    """The harness' samples by task."""
    from harness import evaluating

    hub = tmp_path_factory.mktemp("hub")
    with (
        serve(expanded, "--kv-type", "f32", "--parallel", "8", key=None) as server,
        evaluating(server, hub) as run,
    ):
        yield run


def check(samples: dict[str, list[dict[str, Any]]], judge: Judge, window: int = 2046) -> None:
    """Compare every answer: numbers to a thousandth of a nat, flags and texts exactly."""
    for task, rows in samples.items():
        assert len(rows) >= 12
        for row in rows:
            for arguments, (answer,) in zip(row["arguments"], row["resps"], strict=True):
                match task:
                    case "choices":
                        number, greedy = judge.loglikelihood(*arguments)
                        assert answer == (pytest.approx(number, abs=NATS), greedy), arguments
                    case "perplexity":
                        assert answer == pytest.approx(judge.rolling(*arguments, window), abs=NATS), arguments
                    case "stories":
                        prompt, how = arguments
                        assert answer == judge.greedy(prompt, how["max_gen_toks"], tuple(how["until"])), prompt


@pytest.mark.parametrize(
    "arrangement",
    [
        pytest.param({}, id="tokens"),
        pytest.param({"batch_size": 8}, id="tokens-by-8"),
        pytest.param({"num_concurrent": 4, "batch_size": 2}, id="tokens-2-by-4"),
        pytest.param({"tokenized_requests": False}, id="texts"),
        pytest.param({"tokenized_requests": False, "batch_size": 8}, id="texts-by-8"),
    ],
)
def test_every_sample_is_what_the_oracle_says(evaluate: Evaluate, judge: Judge, arrangement: dict[str, Any]) -> None:
    check(evaluate("choices", "perplexity", "stories", **arrangement), judge)


def test_long_texts_in_windows(evaluate: Evaluate, judge: Judge) -> None:
    check(evaluate("perplexity", max_length=34, num_concurrent=4), judge, window=32)


def test_generation_without_a_tokenizer(evaluate: Evaluate, judge: Judge) -> None:
    check(evaluate("stories", tokenizer_backend=None, batch_size=4), judge)


def test_a_missing_last_entry_would_be_seen(evaluate: Evaluate, judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    parse = LocalCompletionsAPI.parse_logprobs

    def lossy(outputs: list[dict[str, Any]], **known: Any) -> list[tuple[float, bool]]:
        for choice in (choice for output in outputs for choice in output["choices"]):
            for column in ("token_logprobs", "top_logprobs"):
                choice["logprobs"][column].pop()
        return parse(outputs=outputs, **known)

    monkeypatch.setattr(LocalCompletionsAPI, "parse_logprobs", staticmethod(lossy))
    with pytest.raises(AssertionError, match="Tom had a red ball"):
        check(evaluate("choices"), judge)


# ---- a model that needs a BOS

TOKENS = [pytest.param({}, id="tokens"), pytest.param({"num_concurrent": 4, "batch_size": 2}, id="tokens-2-by-4")]
WRITTEN: list[dict[str, Any]] = [{"tokenized_requests": False}, {"tokenized_requests": False, "batch_size": 8}]
TEXTS = [pytest.param(arguments, id=name) for arguments, name in zip(WRITTEN, ("texts", "texts-by-8"), strict=True)]


@pytest.fixture(scope="module")
def model_with_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from oracle.expand import expand

    changes = {"tokenizer.ggml.bos_token_id": BOS, "tokenizer.ggml.add_bos_token": True}
    return expand(BUILTIN, tmp_path_factory.mktemp("bos") / "with-bos.gguf", changes)


@pytest.fixture(scope="module")
def judge_with_bos(model_with_bos: Path) -> Iterator[Judge]:
    from judge import Judge
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        yield Judge(model_with_bos, BOS)


@pytest.fixture(scope="module")
def before_ids(model_with_bos: Path, serve: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Evaluate]:
    """The harness' samples by task, from a server with `--bos-before-ids`."""
    yield from _evaluate(model_with_bos, serve, tmp_path_factory, "--bos-before-ids")


@pytest.fixture(scope="module")
def by_default(model_with_bos: Path, serve: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Evaluate]:
    yield from _evaluate(model_with_bos, serve, tmp_path_factory)


def _evaluate(model: Path, serve: Any, tmp_path_factory: pytest.TempPathFactory, *options: str) -> Iterator[Evaluate]:
    from harness import evaluating

    hub = tmp_path_factory.mktemp("hub")
    with (
        serve(model, "--kv-type", "f32", "--parallel", "8", *options, key=None) as server,
        evaluating(server, hub) as run,
    ):
        yield run


@pytest.mark.parametrize("arrangement", [*TOKENS, *TEXTS])
def test_with_the_option_tokens_and_texts_begin_with_the_bos(
    before_ids: Evaluate, judge_with_bos: Judge, arrangement: dict[str, Any]
) -> None:
    check(before_ids("choices", "perplexity", "stories", **arrangement), judge_with_bos)


@pytest.mark.parametrize("arrangement", TEXTS)
def test_texts_begin_with_the_bos_by_default(
    by_default: Evaluate, judge_with_bos: Judge, arrangement: dict[str, Any]
) -> None:
    check(by_default("choices", "perplexity", "stories", **arrangement), judge_with_bos)


def test_tokens_are_read_as_they_are_by_default(
    by_default: Evaluate, judge_with_bos: Judge, model_with_bos: Path
) -> None:
    from judge import Judge

    samples = by_default("choices", "stories")
    check(samples, Judge(model_with_bos))
    with pytest.raises(AssertionError):
        check(samples, judge_with_bos)


@pytest.mark.parametrize("arrangement", TOKENS)
def test_windows_of_long_texts_begin_with_the_bos(
    before_ids: Evaluate, judge_with_bos: Judge, arrangement: dict[str, Any]
) -> None:
    check(before_ids("perplexity", max_length=34, **arrangement), judge_with_bos, window=32)
