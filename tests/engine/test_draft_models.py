"""Tests of draft models with real models: every text and every float is the same with and without.

Each job is computed alone without drafts, and then alone and in a crowd with a draft model: the model itself, of which
much is accepted, or a random one, of which hardly anything is.
"""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import numpy as np
import pytest
from gguf import GGUFReader, TokenType

from afterword.cli.model_setup import load_message
from afterword.config import EngineSettings
from afterword.engine.core.draft_model import DraftModel
from afterword.engine.core.forward_batch import ForwardBatch, Logits
from afterword.engine.llama import accelerator, library
from afterword.engine.llama.draft_model import open_draft
from afterword.engine.llama.runner import LlamaRunner
from afterword.engine.llama.vocabulary import make_model_info
from afterword.engine.messages import LoadModel
from afterword.engine.protocol import Job
from afterword.models.gguf_facts import read_facts
from afterword.models.registry import Model, builtin_path
from engine.test_predictions import CROWD, VOCABULARY, CountingLoop, check, cleared, make_jobs, predicting
from engine.test_reproducible import open_runner, sequential
from oracle import tiny
from oracle.architectures import write_random

library.initialize(verbose=False)


def message(path: Path) -> LoadModel:
    """The message that loads a model with the slots of `open_runner`."""
    settings = EngineSettings(context=512, parallel=12, threads=1)
    return load_message(Model(path.stem, path, "file"), read_facts(path), settings)


def write_with_vocabulary_of(path: Path, source: Path) -> Path:
    """A tiny model with random weights and the vocabulary of another file."""
    keys = {key: field.contents() for key, field in GGUFReader(source).fields.items()}
    tokens = tuple(keys["tokenizer.ggml.tokens"])
    words = tiny.Vocabulary(
        keys["tokenizer.ggml.model"],
        tokens,
        tuple(map(TokenType, keys["tokenizer.ggml.token_type"])),
        {"eos": tokens[keys["tokenizer.ggml.eos_token_id"]]},
        add_bos=False,
        merges=tuple(keys["tokenizer.ggml.merges"]),
        pre=keys["tokenizer.ggml.pre"],
    )
    shape = tiny.Shape()
    return tiny.write_model(path, shape, words, tiny.random_weights(shape, words, seed=3), "Q8_0")


class Drafted:
    """A runner with a draft model, and loops over both or without the draft model."""

    def __init__(self, path: Path, draft: Path) -> None:
        self.runner = open_runner(path, "exact")
        loaded = open_draft(msgspec.structs.replace(message(path), draft=message(draft)), self.runner)
        assert loaded
        assert isinstance(loaded.runner, LlamaRunner)
        self.draft, self._loaded = loaded.runner, loaded

    def loop(self, *, model: bool) -> CountingLoop:
        loop = CountingLoop(cleared(self.runner))
        if model:
            model_of = DraftModel(cleared(self.draft), self._loaded.context, self._loaded.vocabulary, lambda: 0.0)
            loop.use_draft_model(model_of, fail)
        return loop


def fail(line: str) -> None:
    raise AssertionError(line)


def compare(models: Drafted, jobs: list[Job], vocabulary: int) -> float:
    """Compare jobs with and without the draft model. Returns the share of accepted tokens."""
    expected = sequential(models.loop(model=False), jobs)
    loop = models.loop(model=True)
    check(loop, jobs, expected)
    assert loop.drafted
    share = loop.accepted / loop.drafted
    rng = random.Random(1)
    predicted = [
        predicting(job, [token.id for token in samples[0]], rng, vocabulary)
        for job, (_, samples, _) in zip(jobs, expected, strict=True)
    ]
    loop.draft_ngrams()
    check(loop, predicted, expected)
    return share


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def test_requests_of_the_built_in_model_are_the_same_with_itself_as_draft_model() -> None:
    assert compare(Drafted(builtin_path(), builtin_path()), make_jobs(8, 4000), 4000) > 0.4


def test_requests_of_the_built_in_model_are_the_same_with_a_random_draft_model(folder: Path) -> None:
    draft = write_with_vocabulary_of(folder / "random.gguf", builtin_path())
    assert compare(Drafted(builtin_path(), draft), make_jobs(8, 4000), 4000) < 0.1


def test_requests_of_a_dense_model_are_the_same_with_a_draft_model(folder: Path) -> None:
    path = write_random(folder / "dense.gguf", "llama")
    assert compare(Drafted(path, path), make_jobs(60, VOCABULARY), VOCABULARY) > 0.4


@pytest.mark.slow
@pytest.mark.parametrize("drafts_itself", [True, False])
def test_500_requests_of_the_built_in_model_are_the_same_with_a_draft_model(folder: Path, drafts_itself: bool) -> None:
    path = builtin_path()
    draft = path if drafts_itself else write_with_vocabulary_of(folder / "random.gguf", path)
    many(Drafted(path, draft), 4000)


@pytest.mark.slow
@pytest.mark.parametrize("drafts_itself", [True, False])
@pytest.mark.parametrize("architecture", ["qwen2", "gemma3", "gpt-oss", "qwen3moe"])
def test_500_requests_of_an_architecture_are_the_same_with_a_draft_model(
    folder: Path, architecture: str, drafts_itself: bool
) -> None:
    """A dense shape, two with sliding windows, of which one is a mixture of experts, and a mixture."""
    if not accelerator.supports_quantized():
        pytest.skip("this processor has no instructions for it")
    path = write_random(folder / f"{architecture}.gguf", architecture)
    many(Drafted(path, path if drafts_itself else write_random(folder / "other.gguf", "llama")), VOCABULARY)


def many(models: Drafted, vocabulary: int) -> None:
    for seed in range(500 // CROWD):
        compare(models, make_jobs(CROWD, vocabulary, seed), vocabulary)


def test_numbers_that_are_not_finite_in_the_draft_model_change_nothing(folder: Path) -> None:
    """One token makes the rows of the draft model NaN. Its slots are used for other texts afterwards."""
    path = write_random(folder / "finite.gguf", "llama")
    models = Drafted(path, write_random(folder / "poisoned.gguf", "llama", poison={40: np.nan}))
    jobs = make_jobs(12, VOCABULARY)
    poisoned = [msgspec.structs.replace(job, prompt=(5, 40, *job.prompt)) for job in jobs]
    expected = sequential(models.loop(model=False), poisoned)
    loop = models.loop(model=True)
    check(loop, poisoned, expected)
    assert loop.drafted == 0
    assert compare(models, jobs, VOCABULARY) > 0.4


def test_a_draft_model_that_fails_in_a_pass_changes_nothing() -> None:
    models = Drafted(builtin_path(), builtin_path())
    jobs = make_jobs(4, 4000)
    expected = sequential(models.loop(model=False), jobs)
    lines: list[str] = []
    loop = models.loop(model=False)
    loop.use_draft_model(DraftModel(Broken(models.draft), 512, 4000, lambda: 0.0), lines.append)
    check(loop, jobs, expected)
    assert len(lines) == 1
    assert "llama_decode failed" in lines[0]


class Broken:
    """The draft model's runner, which llama.cpp refuses to compute from some pass on: a slot that does not exist."""

    def __init__(self, runner: LlamaRunner) -> None:
        self._runner, self._passes = cleared(runner), 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._runner, name)

    def run(self, batch: ForwardBatch) -> Logits:
        self._passes += 1
        if self._passes > 20:
            entries = tuple(msgspec.structs.replace(entry, slot=1000) for entry in batch.entries)
            batch = msgspec.structs.replace(batch, entries=entries)
        return self._runner.run(batch)


def test_the_fingerprint_and_the_promise_do_not_depend_on_the_draft_model(folder: Path) -> None:
    path = builtin_path()
    plain = message(path)
    drafting = msgspec.structs.replace(plain, draft=message(write_with_vocabulary_of(folder / "other.gguf", path)))
    infos = []
    for settings in (plain, drafting):
        runner = LlamaRunner(settings)
        open_draft(settings, runner)
        infos.append(make_model_info(runner, settings)[0])
    assert infos[0] == infos[1]


def test_no_draft_model_is_loaded_for_a_model_that_verifies_no_drafts(folder: Path) -> None:
    path = write_random(folder / "recurrent.gguf", "mamba")
    settings = msgspec.structs.replace(message(path), draft=message(builtin_path()))
    assert open_draft(settings, open_runner(path, "exact", 4)) is None
