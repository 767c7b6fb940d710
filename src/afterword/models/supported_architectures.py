"""Refuses model architectures that Afterword does not serve, with the reason."""

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
        *("gemma-embedding", "gemma-embedding2", "llama-embed", "t5encoder"),
    )
)
"""Architectures that compute embeddings. A file with metadata for non-causal attention counts as one too."""

DIFFUSION = frozenset(("dream", "llada", "llada-moe", "rnd1", "diffusion-gemma"))
"""Architectures that refine a whole text in steps, instead of generating one token after the other."""

DRAFTS = frozenset(("eagle3", "dflash", "gemma4-assistant"))
"""Architectures that only propose tokens for a larger model, from that model's own activations."""

ENCODER_DECODERS = frozenset(("t5",))
"""Architectures that read a text with an encoder and write another one with a decoder."""

BROKEN = {
    "chameleon": "the installed llama.cpp excludes the tokens of images from the first sequence of a batch only",
    "cogvlm": "the installed llama.cpp computes different numbers when a prefix of the prompt is already cached",
    "plm": "the installed llama.cpp ends its process when it computes flash attention",
    "qwen4exp": "the installed llama.cpp crashes when it computes several sequences in one batch",
}
"""Architectures of language models that the installed llama.cpp computes wrongly."""


def check_supported(path: Path, architecture: str, header: Header) -> None:
    """Raise `NotLanguageModel` for other kinds of models, `SettingError` for language models that cannot be served."""
    if architecture in DIFFUSION:
        raise NotLanguageModel(
            f"{path} is a diffusion model ({architecture}). Only models that generate token by token can be served."
        )
    if architecture in ENCODERS or header.values.get(f"{architecture}.attention.causal") is False:
        raise NotLanguageModel(
            f"{path} is an embedding model ({architecture}). Only models that generate text can be served."
        )
    if architecture in DRAFTS:
        raise NotLanguageModel(
            f"{path} is a draft model ({architecture}), which only proposes tokens for a larger model. Name that model."
        )
    if architecture in ENCODER_DECODERS:
        raise SettingError(
            f"{path} has an encoder and a decoder ({architecture}). Only decoder-only models can be served."
        )
    if reason := BROKEN.get(architecture):
        raise SettingError(f"{path} cannot be served. Its architecture is {architecture}, and {reason}.")
