"""Tests that every architecture keeps what it promises, and that docs/architectures.md says what the code does.

The other forms, and other types of weights, are judged by `python -m tests.architectures`.
"""

from __future__ import annotations

import pytest

from afterword.config import TESTED_ARCHITECTURES, TESTED_MIXTURES, WeightTypes
from afterword.engine.llama.library import native
from oracle.forms import FORMS, architecture_of, has_experts

from . import known, table
from .__main__ import TYPES, names, run

FEW = (
    *("qwen3", "gemma2", "phi3", "mpt", "lfm2", "mamba", "qwen35", "qwen3moe", "granitemoe"),
    *("deepseek2", "gemma3n", "grok"),
)
"""Among them capped scores (Gemma 2), ALiBi (MPT), latent attention (DeepSeek 2), recurrent states and experts."""


def check(form: str, file_type: str) -> None:
    (verdict,) = run(form, [file_type], 12)
    assert not verdict.faults
    if not verdict.refused:
        assert verdict.promise == announced(form, file_type)
        assert verdict.largest > 0 or verdict.spread == 0, "the reference must not be computed by the kernels"


def announced(form: str, file_type: str) -> str:
    types = WeightTypes(architecture_of(form), frozenset({file_type}), experts=8 * has_experts(form))
    return types.promise("exact", with_kernels=True)


@pytest.mark.usefixtures("kernel_products")
@pytest.mark.parametrize("form", FEW)
def test_some_forms(form):
    check(form, "Q8_0")


@pytest.mark.usefixtures("kernel_products")
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("file_type", TYPES)
@pytest.mark.parametrize("form", sorted(FORMS))
def test_every_form(form, file_type):
    if architecture_of(form) not in known.architectures():
        pytest.skip("the installed llama.cpp is older than this architecture")
    check(form, file_type)


def test_the_page_has_every_form_and_every_architecture_of_the_library():
    """An older library than that of the page may know fewer architectures."""
    rows = table.read(table.PAGE)
    architectures = {architecture_of(row.name) for row in rows}
    assert {row.name for row in rows} >= set(names([]))
    assert architectures >= known.architectures()
    if f"llama.cpp {native.llama_version().decode()}" in table.PAGE.read_text(encoding="utf-8"):
        assert architectures == known.architectures()


def test_the_page_announces_the_promises_of_the_code():
    rows = [row for row in table.read(table.PAGE) if row.promise]
    assert {row.name: row.promise for row in rows} == {row.name: announced(row.name, "Q8_0") for row in rows}


def test_every_promise_has_a_form():
    forms = {architecture_of(form) for form in FORMS if not has_experts(form)}
    mixtures = {architecture_of(form) for form in FORMS if has_experts(form)}
    assert forms >= TESTED_ARCHITECTURES
    assert mixtures >= TESTED_MIXTURES


def test_the_page_has_no_faults():
    assert not [row.text for row in table.read(table.PAGE) if "**" in row.text]


def test_a_process_that_ends_is_a_fault():
    """An architecture that does not exist is refused in words; a type that does not exist ends the process."""
    assert "unknown model architecture" in run("no-such-architecture", ["Q8_0"], 1)[0].refused
    ((fault,),) = (verdict.faults for verdict in run("llama", ["no such type"], 1))
    assert "ended with status 1" in fault
