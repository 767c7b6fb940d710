"""Tests that models with sliding windows reuse prefixes like models that attend to everything.

The prompts are several windows long, and slots are filled to their last cell. llama.cpp can reuse cells whose tokens
have left the window; no cell of a prefix may be lost that way.
"""

from __future__ import annotations

import itertools
import random

import msgspec
import numpy as np
import pytest

from afterword.config import CHUNK_GRID
from afterword.engine.core.engine_loop import EngineLoop
from afterword.engine.core.forward_batch import BatchEntry, CopyPrefix, ForwardBatch, Truncate
from afterword.engine.llama import library
from afterword.engine.llama.library import native
from afterword.engine.llama.runner import LlamaRunner
from afterword.engine.messages import LoadModel
from afterword.engine.protocol import Job, Sampling, Step
from afterword.errors import EngineError
from engine.test_reproducible import numbers, open_runner, sequential
from oracle.architectures import write_random
from oracle.forms import FORMS, WINDOW, has_window

library.initialize(verbose=False)

CONTEXT = 512  # of `open_runner`
VOCABULARY = 256
FEW = ("gemma2", "gemma3", "gemma4", "gpt-oss", "olmo2/window")
OTHERS = {form for form in FORMS if has_window(form)} - {*FEW, "deepseek4", "dots3note"}
"""Without DeepSeek 4, which has one sequence, and forms whose attention the kernels do not compute."""
_runs = itertools.count()


def windowed_runner(folder, name: str, sequences: int = 4) -> LlamaRunner:
    runner = open_runner(write_random(folder / "windowed.gguf", name), "exact", sequences)
    assert native.llama_model_n_swa(runner.model) > 0
    assert runner.uses_own_attention
    return runner


def jobs() -> list[Job]:
    """Jobs, to be run one after the other, of which most can use the prefix of an earlier one."""
    rng = random.Random(1)
    text, other, third = (tuple(rng.randrange(4, VOCABULARY) for _ in range(CONTEXT)) for _ in range(3))
    short, long = 10 * WINDOW, CONTEXT - 1
    made = [
        *(text[:short], text[:short], text[:long], text[: short + 40]),  # the same and longer prompts
        *(text[: short // 2] + other[:80], text[:WINDOW] + other[:100], text[: short + 7]),  # parts of a prompt
        *(other[:long], other[:long], other[:200] + text[:200], other[:CONTEXT]),
    ]
    scored = [third[:long], third[:long], third[:150] + text[:9], third[:CONTEXT], third[:CONTEXT]]
    return [
        *(job(prompt) for prompt in made),
        *(job(prompt, max_tokens=0, prompt_alternatives=2) for prompt in scored),
        job(text[:short], samples=4, sampling=Sampling(), max_tokens=12),
        job(other[:400], max_tokens=CONTEXT - 400),
        job(other[:450], samples=2, max_tokens=30),
    ]


def job(prompt: tuple[int, ...], **more: object) -> Job:
    defaults = {"samples": 1, "max_tokens": min(4, CONTEXT - len(prompt)) or 0, "sampling": Sampling(temperature=0.0)}
    made = Job(prompt, end_tokens=(), key=b"k" * 16, alternatives=2, **{**defaults, **more})
    return made if made.max_tokens else msgspec.structs.replace(made, prompt_alternatives=2)


def run(loop: EngineLoop, each: Job) -> list[Step]:
    name = f"run {next(_runs)}"
    loop.start(name, each)
    steps: list[Step] = []
    while (passed := loop.step()) is not None:
        steps += passed.values()
    return steps


def cached(steps: list[Step]) -> int:
    return sum(step.cached for step in steps)


def chat(loop: EngineLoop, turns: int = 4) -> list[int]:
    """The cached tokens of the turns of a conversation, and of its second turn with another end."""
    prompt, found, second = tuple(range(20, 120)), [], ()
    for turn in range(turns):
        steps = run(loop, job(prompt, max_tokens=20))
        found.append(cached(steps))
        second = prompt if turn == 1 else second
        prompt += (*(token.id for _, token in (pair for step in steps for pair in step.sampled)), *range(30, 90))
    return [*found, cached(run(loop, job((*second[:-10], 7, 8, 9))))]


def check(folder, name: str) -> None:
    runner = windowed_runner(folder, name)
    kv_type = "exact" if runner.grid == 1 else "f16"
    dense = open_runner(write_random(folder / "dense.gguf", "llama", "Q8_0"), kv_type, 4)
    assert runner.grid == dense.grid
    loop, reference = EngineLoop(runner), EngineLoop(dense)
    warm = [run(loop, each) for each in jobs()]
    assert [cached(steps) for steps in warm] == [cached(run(reference, each)) for each in jobs()]
    found = [numbers(steps, each) for steps, each in zip(warm, jobs(), strict=True)]
    expected = sequential(loop, jobs())
    if runner.promise == "exact":
        assert found == expected
    for (scores, _, _), (wanted, _, _) in zip(found, expected, strict=True):
        assert [each.logprob for each in scores] == pytest.approx([each.logprob for each in wanted], abs=0.05)
    if runner.promise == "exact":  # otherwise the lengths of the prompts depend on the generated tokens
        assert chat(loop) == chat(reference)
    else:
        assert all(count >= 64 for count in chat(loop)[1:])


@pytest.mark.usefixtures("kernel_products")
@pytest.mark.parametrize("name", FEW)
def test_prefixes_are_reused_like_those_of_dense_models(tmp_path, name):
    check(tmp_path, name)


@pytest.mark.usefixtures("kernel_products")
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(OTHERS))
def test_prefixes_are_reused_by_every_architecture_with_a_window(tmp_path, name):
    check(tmp_path, name)


@pytest.mark.usefixtures("kernel_products")
@pytest.mark.parametrize("name", ["gemma4", "gpt-oss", "granite_swa"])
def test_windows_and_sinks_agree_with_the_librarys_attention(tmp_path, name):
    """gpt-oss and Granite have sinks. The weights are random, so their sinks are of the size of their scores."""
    path = write_random(tmp_path / "tiny.gguf", name, "F32")
    own, library_runner = open_runner(path, "exact", 1), open_runner(path, "f32", 1)
    assert own.uses_own_attention
    assert not library_runner.uses_own_attention
    tokens = tuple(i * i % 251 for i in range(CONTEXT))
    found, wanted = fill(own, 0, 0, tokens), fill(library_runner, 0, 0, tokens)
    assert found == pytest.approx(wanted, abs=0.02)
    assert np.ptp(wanted) > 5


# ---- the beginning of a slot is complete, or it is not reused


def row(slot: int, position: int, *tokens: int) -> BatchEntry:
    return BatchEntry(slot, position, tokens, 1)


@pytest.mark.usefixtures("kernel_products")
@pytest.mark.parametrize("operation", [Truncate(1, 50), CopyPrefix(1, 0, 50)], ids=["truncate", "copy"])
def test_a_slot_that_lost_its_beginning_is_not_truncated_to_a_prefix(tmp_path, operation):
    """The library's saved state of a sequence has only the cells in the window."""
    runner = windowed_runner(tmp_path, "gemma2")
    runner.run(ForwardBatch((), (row(1, 0, *range(10, 110)),)))  # three windows
    state = runner._kv_cache._state(1)
    assert native.llama_state_seq_set_data(runner._context, state, len(state), 1)
    runner.run(ForwardBatch((CopyPrefix(1, 2, 100),), (row(1, 100, 7), row(2, 100, 7))))
    with pytest.raises(EngineError, match="lost the beginning"):
        runner.run(ForwardBatch((operation,), (row(1, 50, 7),)))


@pytest.mark.usefixtures("kernel_products")
def test_a_full_slot_can_be_truncated_and_filled_again(tmp_path):
    runner = windowed_runner(tmp_path, "gemma3", sequences=2)
    tokens = tuple(i % 200 for i in range(CONTEXT))
    fill(runner, 0, 0, tokens)
    for keep in (1, WINDOW - 1, WINDOW, 3 * WINDOW + 1, CONTEXT - 1):
        fill(runner, 0, keep, tokens, Truncate(0, keep))
        wanted = fill(runner, 1, 0, tokens, Truncate(1, 0))
        found = fill(runner, 1, keep, tokens, CopyPrefix(0, 1, keep))
        assert (found == wanted).all()


def fill(runner: LlamaRunner, slot: int, start: int, tokens: tuple[int, ...], *operations: CopyPrefix | Truncate):
    """Compute the tokens from `start` on, with chunks that do not depend on it. Returns the last logits."""
    ends = [end for end in range(128, len(tokens) + 1, 128) if end > start]
    for first, end in itertools.pairwise((start, *ends)):
        logits = runner.run(ForwardBatch(operations, (row(slot, first, *tokens[first:end]),)))[-1].copy()
        operations = ()
    return logits


def test_chunked_attention_reuses_prefixes(tmp_path):
    """Llama 4's window begins at the last multiple of 8,192 tokens."""
    path = write_random(tmp_path / "chunked.gguf", "llama4", also={"context_length": 8448})
    settings = LoadModel(str(path), 8448, 2, 1, 256, "exact", 0, False, grid=CHUNK_GRID)
    runner = LlamaRunner(settings)
    tokens = tuple(i * i % 251 for i in range(8320))
    wanted = fill(runner, 0, 0, tokens)
    for keep in (8192, 8064):
        assert fill(runner, 1, keep, tokens, CopyPrefix(0, 1, keep)) == pytest.approx(wanted, abs=0.05)
        assert fill(runner, 0, keep, tokens, Truncate(0, keep)) == pytest.approx(wanted, abs=0.05)
