"""Architectures that are not served, each with a sentence that says why."""

from __future__ import annotations

from pathlib import Path

from afterword.errors import NotLanguageModel, SettingError
from afterword.models.gguf_header import Header

ENCODERS = frozenset(
    (
        *(
            "bert",
            "nomic-bert",
            "nomic-bert-moe",
            "neo-bert",
            "jina-bert-v2",
            "jina-bert-v3",
            "modern-bert",
            "eurobert",
        ),
        *("gemma-embedding", "llama-embed", "t5encoder"),
    )
)
"""They make embeddings of texts. Also any other architecture whose file says that its attention is not causal."""

DIFFUSION = frozenset(("dream", "llada", "llada-moe", "rnd1", "diffusion-gemma"))
"""They fill in a whole text in steps, not one token after the other."""

BROKEN = {
    "cogvlm": "the installed llama.cpp computes other numbers when the beginning of a prompt is already computed",
    "qwen4exp": "the installed llama.cpp ends its process when several texts of it are computed together",
}
"""Language models that the library computes wrongly."""


def check_supported(path: Path, architecture: str, header: Header) -> None:
    """Raises `NotLanguageModel` for what is no language model, `SettingError` for one that cannot be computed
    rightly.
    """
    if architecture in DIFFUSION:
        raise NotLanguageModel(
            f"{path} is a diffusion model ({architecture}), and only models that continue a text are served."
        )
    if architecture in ENCODERS or header.values.get(f"{architecture}.attention.causal") is False:
        raise NotLanguageModel(
            f"{path} is a model for embeddings ({architecture}), and only models that continue a text are served."
        )
    if reason := BROKEN.get(architecture):
        raise SettingError(f"{path} is not served: its architecture is {architecture}, and {reason}.")
