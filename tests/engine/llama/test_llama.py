"""Tests of `LlamaRunner`: its numbers equal an independent forward pass, and do not depend on other requests."""

from __future__ import annotations

import ctypes
import os
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from afterword.engine.core.engine_loop import EngineLoop
from afterword.engine.core.forward_batch import BatchEntry, ForwardBatch, Truncate
from afterword.engine.llama import accelerator, library
from afterword.engine.llama.runner import LlamaRunner
from afterword.engine.llama.vocabulary import make_model_info
from afterword.engine.messages import KvType, LoadModel
from afterword.engine.protocol import Job, ModelInfo, Sampling, Token
from afterword.engine.worker.worker_main import LoadedModel
from afterword.errors import SettingError
from afterword.models.gguf_facts import parts, read_facts
from afterword.models.registry import builtin_path
from oracle.architectures import write_random
from oracle.oracle import Oracle
from oracle.tiny import write_tiny

library.initialize(verbose=False)

GREEDY = Sampling(temperature=0.0)
WARM = Sampling(top_p=0.95)


def open_model(path: Path, sequences: int = 4, kv_type: KvType = "exact", chunk: int = 32) -> LoadedModel:
    grid = 1 if kv_type == "exact" else chunk
    settings = LoadModel(
        str(path), 512, sequences, 1, chunk, kv_type, 0, False, grid=grid, use_kernels=True, promise="exact"
    )
    runner = LlamaRunner(settings)
    model_info, vocabulary = make_model_info(runner, settings)
    return LoadedModel(runner, model_info, vocabulary.tokenize, token_texts=vocabulary.texts())


def test_loading_reports_progress():
    shares: list[float] = []
    LlamaRunner(LoadModel(str(builtin_path()), 64, 1, 1, 32, "exact", 0, False), shares.append)
    assert len(shares) > 1
    assert shares == sorted(shares)
    assert 0 <= shares[0] < shares[-1] == 1


@pytest.fixture(scope="module")
def builtin() -> LoadedModel:
    return open_model(builtin_path(), sequences=8)


@pytest.fixture(scope="module")
def builtin_loop(builtin) -> EngineLoop:
    return EngineLoop(builtin.runner)


def play(loop: EngineLoop, jobs: Sequence[Job], arrivals: random.Random | None = None) -> list[list[tuple[int, Token]]]:
    """The tokens of every job: scored tokens under -1, generated tokens under their sample, in order.

    With `arrivals` the jobs start at random steps, otherwise all at once.
    """
    results: defaultdict[int, list[tuple[int, Token]]] = defaultdict(list)
    first = next(_names)
    waiting = list(enumerate(jobs))
    while True:
        while waiting and (arrivals is None or arrivals.random() < 0.4):
            index, job = waiting.pop(0)
            loop.start(first + index, job)
        passed = loop.step()
        if passed is None and not waiting:
            break
        for job_id, step in (passed or {}).items():
            results[job_id - first] += [(-1, token) for token in step.scored] + list(step.sampled)
    return [sorted(results[index], key=lambda pair: pair[0]) for index in range(len(jobs))]


_names = iter(range(0, 10**9, 10**4))


def random_jobs(count: int, vocabulary: int, seed: int) -> list[Job]:
    rng = random.Random(seed)
    return [
        Job(
            prompt=tuple(rng.randrange(4, vocabulary) for _ in range(rng.randrange(1, 90))),
            samples=rng.choice([1, 1, 2, 4]),
            max_tokens=rng.randrange(1, 24),
            sampling=rng.choice([GREEDY, WARM]),
            end_tokens=(),
            key=bytes([index]) * 16,
            alternatives=2,
            prompt_alternatives=2 if rng.random() < 0.4 else None,
        )
        for index in range(count)
    ]


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("vocabulary", ["bytes", "spm"])
def test_scored_log_probabilities_agree_with_an_independent_forward_pass(arch, vocabulary, tmp_path):
    path = write_tiny(tmp_path / "tiny.gguf", arch=arch, file_type="F32", vocabulary=vocabulary)
    model = open_model(path, kv_type="f32")
    prompt = tuple(random.Random(1).randrange(4, 250) for _ in range(100))
    job = Job(prompt, 1, 0, GREEDY, (), b"k" * 16, prompt_alternatives=3)
    scored = [token for _, token in play(EngineLoop(model.runner), [job])[0]]
    expected = Oracle(path).log_probs(prompt)
    assert [token.id for token in scored] == list(prompt[1:])
    for position, token in enumerate(scored):
        assert token.logprob == pytest.approx(expected[position][token.id], abs=1e-4)
        for other, logprob in token.top:
            assert logprob == pytest.approx(expected[position][other], abs=1e-4)


def test_generated_log_probabilities_agree_with_an_independent_forward_pass(tmp_path):
    path = write_tiny(tmp_path / "tiny.gguf", file_type="F32")
    model = open_model(path, kv_type="f32")
    oracle = Oracle(path)
    job = Job((10, 20, 30), 2, 20, WARM, (), b"k" * 16, alternatives=0)
    results = play(EngineLoop(model.runner), [job])[0]
    for sample in (0, 1):
        tokens = [token for index, token in results if index == sample]
        rows = oracle.log_probs((*job.prompt, *(token.id for token in tokens)))
        for position, token in enumerate(tokens, len(job.prompt) - 1):
            assert token.logprob == pytest.approx(rows[position][token.id], abs=1e-4)


def test_special_tokens_are_no_text(builtin):
    texts, pieces = builtin.token_texts, builtin.model_info.pieces
    special = {*builtin.model_info.end_tokens, builtin.model_info.bos}
    assert all(texts[token] == b"" for token in special if token is not None)
    assert [text or pieces[token] for token, text in enumerate(texts)] == list(pieces)
    assert sum(bool(text) for text in texts) > len(texts) // 2


def test_the_built_in_models_numbers_agree_with_an_independent_forward_pass(builtin, builtin_loop):
    """The matmul of Q8_0 rounds activations to 8 bits, hence the tolerance. A wrong layout would differ by nats."""
    prompt = builtin.tokenize("Once upon a time there was a little girl who lived in a house near the sea.", True)
    job = Job(prompt, 1, 0, GREEDY, (), b"k" * 16, prompt_alternatives=0)
    scored = [token.logprob for _, token in play(builtin_loop, [job])[0]]
    rows = Oracle(builtin_path()).log_probs(prompt)
    expected = [rows[position][token] for position, token in enumerate(prompt[1:])]
    assert np.abs(np.array(scored) - expected).max() < 0.2


def test_greedy_tokens_equal_those_of_a_separate_runner(builtin, builtin_loop):
    texts = ["Once upon a time", "def main():\n", "The cat", "Lily and Ben went to the park. They saw"]
    jobs = [Job(builtin.tokenize(text, True), 3, 24, GREEDY, (), b"k" * 16) for text in texts]
    concurrent = play(builtin_loop, jobs * 3)
    reference = [one_at_a_time(job) for job in jobs]
    for index, results in enumerate(concurrent):
        for sample in range(3):
            assert [token.id for i, token in results if i == sample] == reference[index % len(jobs)]


def one_at_a_time(job: Job) -> list[int]:
    """Greedy tokens from a separate model, without scheduler and sampler."""
    runner = open_model(builtin_path(), sequences=1).runner
    generated: list[int] = []
    position, tokens = 0, job.prompt
    while len(generated) < job.max_tokens:
        for start in range(0, len(tokens), runner.chunk):
            part = tokens[start : start + runner.chunk]
            logits = runner.run(ForwardBatch((), (BatchEntry(0, position, part, 1),)))
            position += len(part)
        generated.append(int(np.argmax(logits[0])))
        tokens = (generated[-1],)
    return generated


@pytest.mark.parametrize("kv_type", ["exact", "f16", "f32"])
@pytest.mark.parametrize("file_type", ["Q8_0", "Q4_0"])
def test_every_float_is_independent_of_other_requests(file_type, kv_type, tmp_path):
    model = open_model(write_tiny(tmp_path / "tiny.gguf", file_type=file_type), kv_type=kv_type)
    loop = EngineLoop(model.runner)
    jobs = random_jobs(16, len(model.model_info.pieces), seed=5)
    sequential = [play(loop, [job])[0] for job in jobs]
    for seed in range(3):
        assert play(loop, jobs, random.Random(seed)) == sequential


def test_every_float_of_the_built_in_model_is_independent_of_other_requests(builtin, builtin_loop):
    jobs = random_jobs(12, len(builtin.model_info.pieces), seed=6)
    sequential = [play(builtin_loop, [job])[0] for job in jobs]
    assert play(builtin_loop, jobs, random.Random(7)) == sequential


@pytest.mark.parametrize("chunk", [32, 256])
def test_every_float_is_the_same_whether_a_token_is_read_or_generated(chunk):
    """With the KV type `exact` the numbers do not depend on the number of tokens of a pass."""
    model = open_model(builtin_path(), chunk=chunk)
    loop = EngineLoop(model.runner)
    prompt = model.tokenize("One day, a little girl named Lily", True)
    for key in (b"a" * 16, b"b" * 16):
        generated = play(loop, [Job(prompt, 1, 150, WARM, (), key, alternatives=3)])[0]
        whole = prompt + tuple(token.id for _, token in generated)
        read = play(loop, [Job(whole, 1, 0, GREEDY, (), key, prompt_alternatives=3)])[0][len(prompt) - 1 :]
        assert [(t.id, t.logprob, t.top) for _, t in read] == [(t.id, t.logprob, t.top) for _, t in generated]


@pytest.mark.parametrize("file_type", ["F32", "F16", "BF16"])
def test_tokens_of_unquantized_weights_are_the_same_read_and_generated(file_type, tmp_path):
    """Up to the end of the context. Without the kernels' matmuls such weights have no promise."""
    model = open_model(write_tiny(tmp_path / "tiny.gguf", file_type=file_type), chunk=64)
    if not accelerator.supports_quantized():
        assert model.model_info.promise == "none"
        return
    loop = EngineLoop(model.runner)
    generated = play(loop, [Job((1, 2, 3), 1, 509, WARM, (), b"k" * 16, alternatives=3)])[0]
    whole = (1, 2, 3, *(token.id for _, token in generated))
    read = play(loop, [Job(whole, 1, 0, GREEDY, (), b"k" * 16, prompt_alternatives=3)])[0][2:]
    assert [(t.id, t.logprob, t.top) for _, t in read] == [(t.id, t.logprob, t.top) for _, t in generated]
    assert len(whole) == 512


def test_without_kernels_the_promise_can_be_weaker(tmp_path, monkeypatch):
    monkeypatch.setattr(accelerator, "supports_quantized", lambda: False)
    assert open_model(write_tiny(tmp_path / "tiny.gguf", file_type="F16")).model_info.promise == "none"


def test_a_slot_can_be_truncated_and_computed_again(tmp_path):
    runner = open_model(write_tiny(tmp_path / "tiny.gguf", file_type="Q8_0"), chunk=8).runner
    whole = runner.run(ForwardBatch((), (BatchEntry(0, 0, (1, 2, 3, 4, 5, 6, 7, 8), 8),))).copy()
    again = runner.run(ForwardBatch((Truncate(0, 0),), (BatchEntry(0, 0, (1, 2, 3, 4, 5, 6, 7, 8), 8),)))
    assert (whole == again).all()


def test_the_model_info_matches_the_file(tmp_path):
    model_info = open_model(write_tiny(tmp_path / "bytes.gguf", infill=True)).model_info
    assert (model_info.context, model_info.sequences, model_info.add_bos) == (512, 4, False)
    assert model_info.eos is not None
    assert model_info.pieces[model_info.eos] == b"<|endoftext|>"
    assert model_info.end_tokens == (model_info.eos,)
    assert model_info.infill is not None
    assert model_info.infill.family == "qwen"
    assert open_model(write_tiny(tmp_path / "plain.gguf", infill=False)).model_info.infill is None
    spm = open_model(write_tiny(tmp_path / "spm.gguf", vocabulary="spm")).model_info
    assert (spm.add_bos, spm.space_prefix) == (True, True)


@pytest.mark.parametrize(
    "text", ["", "Hello", " two  spaces", "tabs\tand\nlines\r\n", "naïve 😀 漢字 \x00 \u200d", "a" * 5000]
)
def test_tokens_of_a_text_spell_the_text(builtin, text):
    spelled = b"".join(builtin.model_info.pieces[token] for token in builtin.tokenize(text, True))
    assert spelled == text.encode()


def test_text_becomes_a_special_token_only_on_request(builtin):
    name = builtin.model_info.pieces[builtin.model_info.eos].decode()
    assert builtin.tokenize(name, True) == (builtin.model_info.eos,)
    assert builtin.model_info.eos not in builtin.tokenize(name, False)


def test_the_fingerprint_depends_on_weights_and_settings(tmp_path):
    one, two = write_tiny(tmp_path / "1.gguf", seed=1), write_tiny(tmp_path / "2.gguf", seed=2)
    names = {
        open_model(one).model_info.fingerprint,
        open_model(two).model_info.fingerprint,
        open_model(one, kv_type="f32").model_info.fingerprint,
        open_model(one, kv_type="f16").model_info.fingerprint,
    }
    assert len(names) == 4
    assert open_model(one, sequences=2).model_info.fingerprint in names  # the number of sequences changes no number


def test_the_fingerprint_depends_on_the_library(tmp_path, monkeypatch):
    model = write_tiny(tmp_path / "tiny.gguf")
    place = tmp_path / "libggml.so"
    monkeypatch.setattr(library, "files", lambda: [place])
    names = set()
    for content in (b"one", b"two", b"one"):
        place.write_bytes(content)
        names.add(open_model(model).model_info.fingerprint)
    assert len(names) == 2


def split_model(folder: Path, seed: int = 0) -> list[Path]:
    """The files of a split model."""
    first = write_tiny(folder / "tiny.gguf", seed=seed, split=8)
    return parts(first, read_facts(first))


def open_split(paths: list[Path]) -> ModelInfo:
    settings = LoadModel(str(paths[0]), 64, 1, 1, 32, "exact", 0, False, parts=tuple(map(str, paths)))
    return make_model_info(LlamaRunner(settings), settings)[0]


def test_the_fingerprint_depends_on_all_parts_of_a_split_model(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    paths, others = split_model(tmp_path / "one"), split_model(tmp_path / "two", seed=1)
    assert len(paths) > 2
    names = {open_split(paths).fingerprint}
    for part in range(1, len(paths)):  # the first part also has the vocabulary
        paths[part].write_bytes(others[part].read_bytes())
        names.add(open_split(paths).fingerprint)
    assert len(names) == len(paths)


def test_a_file_that_changes_while_it_is_loaded_is_a_setting_error(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf")
    settings = LoadModel(str(path), 64, 1, 1, 32, "exact", 0, False)
    runner = LlamaRunner(settings)
    os.truncate(path, path.stat().st_size + 1)
    with pytest.raises(SettingError, match="changed while it was being loaded"):
        make_model_info(runner, settings)


def test_gpu_layers_need_a_build_with_gpu_support(monkeypatch, tmp_path):
    monkeypatch.setattr(library.native, "llama_supports_gpu_offload", lambda: False)
    settings = LoadModel(str(write_tiny(tmp_path / "tiny.gguf")), 64, 1, 1, 32, "f16", -1, False)
    with pytest.raises(SettingError, match="GPU support"):
        LlamaRunner(settings)


@pytest.mark.parametrize("layers", [0, -1])
def test_no_gpu_computes_without_gpu_layers(monkeypatch, tmp_path, layers):
    """Otherwise a build for GPUs computes long passes there, and the promises for CPUs do not hold."""
    lists = []

    def load(_, params):
        lists.append([ctypes.c_void_p.from_address(params.devices).value] if params.devices else "the library's choice")

    monkeypatch.setattr(library.native, "llama_supports_gpu_offload", lambda: True)
    monkeypatch.setattr(library.native, "llama_model_load_from_file", load)
    with pytest.raises(SettingError, match="cannot load"):
        LlamaRunner(LoadModel(str(write_tiny(tmp_path / "tiny.gguf")), 64, 1, 1, 32, "f16", layers, False))
    assert lists == ["the library's choice" if layers else [None]]


@pytest.mark.parametrize("content", [None, b"", b"GGUF", b"GGUF" + b"\xff" * 100])
def test_an_invalid_model_file_is_a_setting_error(content, tmp_path):
    path = tmp_path / "bad.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingError, match=r"bad\.gguf"):
        open_model(path)


def test_an_architecture_that_would_end_the_process_is_refused_only_with_that_library(tmp_path, monkeypatch):
    path = write_random(tmp_path / "model.gguf", "deepseek4")
    monkeypatch.setattr(library.native, "llama_version", lambda: b"0.6.0-dev")
    with pytest.raises(SettingError, match=r"architecture is deepseek4, and the prebuilt llama\.cpp ends its process"):
        open_model(path)
    library.check_architecture("model.gguf", "llama")
    monkeypatch.setattr(library.native, "llama_version", lambda: b"0.5.0-dev")
    library.check_architecture("model.gguf", "deepseek4")
