"""LoRA adapters: their numbers beside merged weights, their promises, and files that cannot be used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from msgspec import structs

from afterword.config import CHUNK_GRID, WeightTypes
from afterword.engine.core.engine_loop import EngineLoop
from afterword.engine.core.forward_batch import BatchEntry, ForwardBatch, Logits
from afterword.engine.llama import accelerator, library
from afterword.engine.llama.runner import LlamaRunner
from afterword.engine.llama.vocabulary import make_model_info
from afterword.engine.messages import LoadModel
from afterword.errors import SettingError
from afterword.models.gguf_facts import read_facts
from engine.test_reproducible import compare
from oracle.adapters import random_pairs, write_adapter, write_merged
from oracle.architectures import write_random

library.initialize(verbose=False)

TOKENS = (5, 9, 130, 44, 7, 81)


def settings(path: Path, adapter: Path | None = None, scale: float = 1.0, sequences: int = 12) -> LoadModel:
    facts = read_facts(path)
    weights = WeightTypes(facts.architecture, facts.matrix_types, facts.experts)
    return LoadModel(
        *(str(path), 512, sequences, 1, 128, "exact", 0, False),
        grid=CHUNK_GRID,
        repack=weights.repacked,
        use_kernels=weights.uses_kernels,
        promise=weights.promise("exact", with_kernels=True),
        promise_without_kernels=weights.promise("exact", with_kernels=False),
        adapter=str(adapter) if adapter else "",
        adapter_scale=scale,
        pack_weights=False,
    )


def logits(message: LoadModel) -> Logits:
    return np.array(LlamaRunner(message).run(ForwardBatch((), (BatchEntry(0, 0, TOKENS, len(TOKENS)),))))


@pytest.fixture(autouse=True)
def no_errors_of_other_tests() -> None:
    library._last_errors.clear()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("adapters") / "base.gguf", "llama", "F32")


@pytest.mark.parametrize("scale", [1.0, 0.5, -2.0])
def test_an_adapter_computes_what_merged_weights_compute(base, tmp_path, scale):
    pairs = random_pairs(base, rank=8)
    adapter = write_adapter(tmp_path / "adapter.gguf", pairs)
    merged = write_merged(tmp_path / "merged.gguf", base, pairs, scale=scale)
    found, expected = logits(settings(base, adapter, scale)), logits(settings(merged))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    assert np.abs(found - logits(settings(base))).max() > 0.1


def test_a_scale_of_zero_computes_what_the_model_alone_computes(base, tmp_path):
    adapter = write_adapter(tmp_path / "adapter.gguf", random_pairs(base, rank=8))
    assert logits(settings(base, adapter, 0.0)).tobytes() == logits(settings(base)).tobytes()


@pytest.mark.usefixtures("kernel_products")
@pytest.mark.parametrize(("file_type", "rank"), [("F16", 32), ("F32", 8), ("F32", 64)])
@pytest.mark.parametrize("weights", ["Q8_0", "Q4_0"])
def test_a_model_with_an_adapter_keeps_its_promise(tmp_path, weights, file_type, rank):
    path = write_random(tmp_path / "base.gguf", "llama", weights)
    adapter = write_adapter(tmp_path / "adapter.gguf", random_pairs(path, rank), file_type=file_type)
    runner = LlamaRunner(settings(path, adapter))
    assert runner.promise == "exact"
    compare(EngineLoop(runner), 60, 200)


def test_the_promise_is_withheld_if_the_library_multiplies_with_the_adapter(tmp_path):
    """The kernels multiply F16 weights in steps of 32 elements, and a column of B has as many as the rank."""
    path = write_random(tmp_path / "base.gguf", "llama", "Q8_0")
    adapter = write_adapter(tmp_path / "adapter.gguf", random_pairs(path, rank=16), file_type="F16")
    assert LlamaRunner(settings(path, adapter)).promise == "none"


def test_without_kernels_a_model_with_an_adapter_has_no_promise(base, tmp_path, monkeypatch):
    monkeypatch.setattr(accelerator, "supports_quantized", lambda: False)
    path = write_random(tmp_path / "base.gguf", "llama", "Q8_0")
    adapter = write_adapter(tmp_path / "adapter.gguf", random_pairs(path, rank=32))
    assert [LlamaRunner(settings(path, each)).promise for each in (None, adapter)] == ["exact", "none"]


def test_fingerprints_differ_by_the_content_and_the_scale_of_the_adapter(base, tmp_path):
    first, second = (write_adapter(tmp_path / f"{seed}.gguf", random_pairs(base, rank=8, seed=seed)) for seed in (1, 2))
    messages = [settings(base), settings(base, first), settings(base, first, 0.5), settings(base, second)]
    found = [make_model_info(LlamaRunner(message), message)[0].fingerprint for message in messages]
    assert len(set(found)) == 4


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"architecture": "qwen2"}, "arch mismatch"),
        ({"invocation": (3, 4)}, "is an activated LoRA"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(base, tmp_path, change, expected):
    adapter = write_adapter(tmp_path / "adapter.gguf", random_pairs(base, rank=8), **change)
    with pytest.raises(SettingError, match=expected):
        LlamaRunner(settings(base, adapter))


def test_files_that_are_no_adapter_are_refused(base, tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF no")
    for path in (base, broken):
        with pytest.raises(SettingError, match=f"cannot load the adapter {path}"):
            LlamaRunner(structs.replace(settings(base), adapter=str(path)))
