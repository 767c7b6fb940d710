"""Tokenizes texts with the library `tokenizers`, and reads the facts about a model's vocabulary."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from afterword.engine.llama.infill_families import find_layout, parse_template
from afterword.engine.protocol import InfillLayout, JobLimits, ModelInfo
from afterword.engine.vllm.model_folder import ModelFolder, read_json
from afterword.engine.vllm.token_bytes import keeps_text, token_bytes
from afterword.errors import SettingError

_SPACE_BYTES = 3  # of SentencePiece's symbol for a space


class FolderTokenizer:
    """The tokenizer of a model's folder. `parts` may be called from any thread.

    `library`: the module `tokenizers`, which only the worker's environment has. `size`: number of the model's tokens.
    """

    def __init__(self, folder: ModelFolder, size: int, library: Any) -> None:
        self._content = read_json(folder.tokenizer_path)
        self._folder = folder
        self.pieces = token_bytes(self._content, size)
        try:
            # One reads special tokens in a text as tokens, the other as text.
            self._with_special, self._plain = (
                library.Tokenizer.from_file(str(folder.tokenizer_path)) for _ in range(2)
            )
        except Exception as problem:  # the library raises exceptions of the class Exception itself
            raise SettingError(f"{folder.tokenizer_path} cannot be read: {problem}.") from None
        for tokenizer in (self._with_special, self._plain):
            tokenizer.no_truncation()
            tokenizer.no_padding()
        self._plain.encode_special_tokens = True
        self._special = {
            added["content"]: added["id"] for added in self._content.get("added_tokens") or [] if added.get("special")
        }

    def parts(self, text: str, special: bool) -> Iterator[Sequence[int]]:
        """The token ids of a text, without BOS, as one part."""
        yield self.tokenize(text, special)

    def tokenize(self, text: str, special: bool) -> Sequence[int]:
        """The token ids of a text, without BOS. `special`: text that spells a special token becomes that token."""
        tokenizer = self._with_special if special else self._plain
        ids: Sequence[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    @property
    def bos(self) -> int | None:
        return self._token("bos_token")

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The tokens that end a generation; that of the tokenizer if the model states none."""
        eos = self._token("eos_token")
        return self._folder.end_tokens or (() if eos is None else (eos,))

    @property
    def eos(self) -> int | None:
        eos = self._token("eos_token")
        return next(iter(self.end_tokens), None) if eos is None else eos

    @property
    def add_bos(self) -> bool:
        """Whether the model expects BOS before a text: the tokenizer's settings say so, or it puts one there."""
        stated = self._folder.tokenizer_config.get("add_bos_token")
        if isinstance(stated, bool):
            return stated and self.bos is not None
        ids = self._with_special.encode("a", add_special_tokens=True).ids
        return self.bos is not None and ids[:1] == [self.bos]

    @property
    def space_prefix(self) -> bool:
        """Whether the tokenizer puts a space before a text."""
        return b"".join(self.pieces[token] for token in self.tokenize("a", False)).startswith(b" ")

    @property
    def longest_token(self) -> int:
        """See `ModelInfo.longest_token`."""
        if not keeps_text(self._content):
            return 0
        return max(len(piece) + (_SPACE_BYTES - 1) * piece.count(b" ") for piece in self.pieces)

    def infill(self, template: str) -> InfillLayout | None:
        """How the model fills gaps: by the operator's template, or by the tokens that the vocabulary has.

        Raises `SettingError` if the template is invalid.
        """
        if template:
            ids = set(self._special.values())
            return parse_template(template, lambda text: self.tokenize(text, True), ids.__contains__)
        names = {added["content"]: added["id"] for added in self._content.get("added_tokens") or []}
        return find_layout(names, self._folder.path.name, None, lambda text: self.tokenize(text, False))

    def model_info(self, limits: JobLimits, infill_template: str) -> ModelInfo:
        """The model info without sizes and fingerprint. Raises `SettingError`."""
        return ModelInfo(
            parameters=0,
            context=0,
            sequences=0,
            pieces=self.pieces,
            end_tokens=self.end_tokens,
            bos=self.bos,
            eos=self.eos,
            add_bos=self.add_bos,
            space_prefix=self.space_prefix,
            longest_token=self.longest_token,
            infill=self.infill(infill_template),
            fingerprint="",
            promise="none",
            job_limits=limits,
            special=tuple(sorted(self._special.values())),
        )

    def _token(self, name: str) -> int | None:
        """The id of a token that the tokenizer's settings or the model's name."""
        found = self._folder.tokenizer_config.get(name)
        text = found.get("content") if isinstance(found, dict) else found
        if isinstance(text, str) and (token := self._with_special.token_to_id(text)) is not None:
            return int(token)
        ids = self._folder.config.get(f"{name}_id")
        return next(itertools.chain(ids), None) if isinstance(ids, list) else ids
