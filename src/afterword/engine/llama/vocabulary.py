"""Tokenizes texts with llama.cpp, and reads a model's vocabulary, model info and fingerprint."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import itertools
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import msgspec

from afterword.engine.core import sampler_kernel
from afterword.engine.core.verification import can_verify
from afterword.engine.kernels.compiled import digest
from afterword.engine.llama import accelerator, gpus, library
from afterword.engine.llama.infill_families import find_layout, parse_template
from afterword.engine.llama.library import metadata, native
from afterword.engine.llama.runner import LlamaRunner
from afterword.engine.llama.special_tokens import SpecialToken, SpecialTokens
from afterword.engine.llama.split_points import PIECE_LENGTH, SplitPoints
from afterword.engine.messages import LoadModel
from afterword.engine.protocol import InfillLayout, ModelInfo

_NO_TOKEN = -1
_SPACE = "▁".encode()  # SentencePiece's symbol for a space
_CACHED_PIECES = 256  # pieces of one text with cached tokens

_BY_NAME = native.LLAMA_TOKEN_ATTR_CONTROL | native.LLAMA_TOKEN_ATTR_UNKNOWN
_SPECIAL = _BY_NAME | native.LLAMA_TOKEN_ATTR_USER_DEFINED
_PRIVATE = range(0xE000, 0xF900)  # the private use area of Unicode: most vocabularies have no such character
_SLOW_RUNS = {"deepseek-llm": (r"\s", 256), "superbpe": (r"\d", 256), "jais-2": (r"\s", 2**16)}
"""llama.cpp's pre-tokenizers whose time is quadratic in the length of a run of characters: the run, its limit."""
_ANY_CHARACTER = ("(?s:.)", 2**16)  # the limit where llama.cpp must find the special tokens, in quadratic time


class Vocabulary:
    """The vocabulary of a loaded model. All methods may be called from any thread."""

    def __init__(self, model: object) -> None:
        self._vocab = native.llama_model_get_vocab(model)
        self.size = int(native.llama_vocab_n_tokens(self._vocab))
        self._kind = native.llama_vocab_type(self._vocab)
        self._splits = {special: SpecialTokens(self._special_tokens(special)) for special in (False, True)}
        self._split_points = SplitPoints(self._texts()) if self._kind == native.LLAMA_VOCAB_TYPE_SPM else None
        self._leading_tokens = self._count_leading_tokens() if self._split_points else 0
        self._pre_tokenizer = metadata(model, b"tokenizer.ggml.pre")

    def tokenize(self, text: str, special: bool) -> tuple[int, ...]:
        """The token ids of a text, without BOS. `special`: text that spells a special token becomes that token."""
        return tuple(itertools.chain.from_iterable(self.parts(text, special)))

    def parts(self, text: str, special: bool) -> Iterator[Sequence[int]]:
        """Like `tokenize`, but part by part, so that a caller can stop in between. The tokens equal llama.cpp's."""
        data = text.encode()
        if self.ambiguous:
            yield self._ids(data, special)
            return
        plain = lru_cache(_CACHED_PIECES)(partial(self._ids, special=False))  # a repetitive text has equal pieces
        for piece in self._splits[special].split(data):
            if isinstance(piece, int):
                yield (piece,)
            else:
                yield from self._plain(data[slice(*piece)], plain)

    @property
    def ambiguous(self) -> bool:
        """Whether only llama.cpp can split texts at the special tokens; see `SpecialTokens.ambiguous`."""
        return any(tokens.ambiguous for tokens in self._splits.values())

    @property
    def slow_runs(self) -> tuple[str, int] | None:
        """See `ModelInfo.slow_runs`."""
        return _ANY_CHARACTER if self.ambiguous else _SLOW_RUNS.get(self._pre_tokenizer)

    def _plain(self, data: bytes, tokenize: Callable[[bytes], Sequence[int]]) -> Iterator[Sequence[int]]:
        """The tokens of a text without special tokens, part by part."""
        if self._split_points is None or len(data) <= PIECE_LENGTH:
            yield tokenize(data)
            return
        leading = 0
        for piece in self._split_points.pieces(data.decode("utf-8", "surrogateescape"), self._leading_tokens > 0):
            yield tokenize(piece.encode("utf-8", "surrogateescape"))[leading:]
            # llama.cpp puts a space before each piece, but only the one before the whole text belongs there.
            leading = self._leading_tokens

    def _ids(self, data: bytes, special: bool) -> Sequence[int]:
        """The tokens of a text by llama.cpp."""
        size = len(data) + 8
        ids = (ctypes.c_int32 * size)()
        count = native.llama_tokenize(self._vocab, data, len(data), ids, size, False, special)
        if count < 0:
            ids = (ctypes.c_int32 * -count)()
            count = native.llama_tokenize(self._vocab, data, len(data), ids, -count, False, special)
        return array("i", memoryview(ids)[:count].tobytes())  # avoids a Python object for each token of a long text

    def _special_tokens(self, special: bool) -> Iterator[SpecialToken]:
        """The special tokens that llama.cpp searches in a text before it tokenizes the rest."""
        left, right = native.LLAMA_TOKEN_ATTR_LSTRIP, native.LLAMA_TOKEN_ATTR_RSTRIP
        for token in range(self.size):
            kind = native.llama_vocab_get_attr(self._vocab, token)
            if kind & _SPECIAL and (special or not kind & _BY_NAME):
                text = native.llama_vocab_get_text(self._vocab, token)
                yield SpecialToken(token, text, bool(kind & left), bool(kind & right))

    def _texts(self) -> Iterator[str]:
        for token in range(self.size):
            yield native.llama_vocab_get_text(self._vocab, token).decode("utf-8", "replace")

    def _count_leading_tokens(self) -> int:
        """How many tokens llama.cpp puts before a text, measured with a character that is no token."""
        known = set("".join(self._texts()))
        letter = next(chr(code) for code in _PRIVATE if chr(code) not in known)
        once, twice = (len(self._ids(text.encode(), False)) for text in (letter, letter * 2))
        return 2 * once - twice

    def pieces(self) -> tuple[bytes, ...]:
        """The bytes of every token id: for special tokens the name, for ids without text b""."""
        return tuple(self._piece(token) for token in range(self.size))

    def special(self) -> tuple[int, ...]:
        """The ids of control tokens and of the unknown token."""
        return tuple(t for t in range(self.size) if native.llama_vocab_get_attr(self._vocab, t) & _BY_NAME)

    def texts(self) -> tuple[bytes, ...]:
        """The bytes of every token id that can be part of a text; b"" for the others.

        Special tokens are no text, also those that a vocabulary calls user-defined and that are spelled like a tag.
        """
        return tuple(b"" if self._is_special(token) else self._piece(token) for token in range(self.size))

    def _is_special(self, token: int) -> bool:
        kind = native.llama_vocab_get_attr(self._vocab, token)
        name = native.llama_vocab_get_text(self._vocab, token)
        tag = kind & native.LLAMA_TOKEN_ATTR_USER_DEFINED and name[:1] + name[-1:] in (b"<>", b"[]") and len(name) > 2
        return bool(kind & _BY_NAME or tag or native.llama_vocab_is_eog(self._vocab, token))

    def ends(self) -> tuple[int, ...]:
        """The token ids that end a generation."""
        return tuple(t for t in range(self.size) if native.llama_vocab_is_eog(self._vocab, t))

    def bos(self) -> int | None:
        return _known(native.llama_vocab_bos(self._vocab))

    def eos(self) -> int | None:
        return _known(native.llama_vocab_eos(self._vocab))

    def add_bos(self) -> bool:
        """Whether the model expects BOS before a text."""
        return bool(native.llama_vocab_get_add_bos(self._vocab))

    def infill(self, model_name: str, template: str = "") -> InfillLayout | None:
        """How the model fills gaps: by the operator's template, or by the tokens that the vocabulary has.

        Raises `SettingError` if the template is invalid.
        """
        special = self._splits[True].ids()
        if template:
            return parse_template(template, lambda text: self.tokenize(text, True), set(special.values()).__contains__)
        prefix = self._used(native.llama_vocab_fim_pre(self._vocab))
        suffix = self._used(native.llama_vocab_fim_suf(self._vocab))
        middle = self._used(native.llama_vocab_fim_mid(self._vocab))
        known = None if prefix is None or suffix is None or middle is None else (prefix, suffix, middle)
        return find_layout(special, model_name, known, lambda text: self.tokenize(text, False))

    def _used(self, token: int) -> int | None:
        """The token, if the model uses it. llama.cpp's conversion states CodeGemma's ids for all models of Gemma 1."""
        known = _known(token)
        if known is None or native.llama_vocab_get_text(self._vocab, token).startswith(b"<unused"):
            return None
        return known

    @property
    def keeps_text(self) -> bool:
        """Whether the tokens spell the text byte for byte. Other tokenizers may fold or drop characters."""
        return self._kind in (native.LLAMA_VOCAB_TYPE_BPE, native.LLAMA_VOCAB_TYPE_SPM)

    def _piece(self, token: int) -> bytes:
        piece = self._llama_piece(token)
        if self._kind != native.LLAMA_VOCAB_TYPE_SPM or _SPACE not in piece:
            return piece
        # llama.cpp tokenizes spaces to a user-defined token "▁▁", but does not turn its text back into spaces.
        user_defined = native.llama_vocab_get_attr(self._vocab, token) & native.LLAMA_TOKEN_ATTR_USER_DEFINED
        return piece.replace(_SPACE, b" ") if user_defined else piece

    def _llama_piece(self, token: int) -> bytes:
        capacity = 64
        while True:
            buffer = ctypes.create_string_buffer(capacity)
            size = native.llama_token_to_piece(self._vocab, token, buffer, capacity, 0, True)
            if size >= 0:
                return buffer.raw[:size]
            capacity = -size


_NOT_NUMBERS: dict[str, Any] = {"sequences": 0, "promise": "none", "verifies_drafts": False, "takes_back": True}


def make_model_info(runner: LlamaRunner, settings: LoadModel) -> tuple[ModelInfo, Vocabulary]:
    """The model info and the vocabulary of a runner's model.

    Raises `SettingError` if the model's files changed while they were loaded, because the fingerprint would be wrong.
    """
    vocabulary = Vocabulary(runner.model)
    pieces = vocabulary.pieces()
    # Some SentencePiece tokenizers put a space before a text. The pieces of a short text show whether this one does.
    plain = vocabulary.tokenize("a", False)
    model_info = ModelInfo(
        parameters=int(native.llama_model_n_params(runner.model)),
        context=settings.context,
        sequences=runner.slots,
        capacity=runner.capacity,
        pieces=pieces,
        end_tokens=vocabulary.ends(),
        bos=vocabulary.bos(),
        eos=vocabulary.eos(),
        add_bos=vocabulary.add_bos(),
        space_prefix=b"".join(pieces[t] for t in plain).startswith(b" "),
        # A space has three bytes in SentencePiece's vocabularies.
        longest_token=max(len(piece.replace(b" ", _SPACE)) for piece in pieces) if vocabulary.keeps_text else 0,
        infill=vocabulary.infill(metadata(runner.model, b"general.name"), settings.infill_template),
        fingerprint="",
        promise=runner.promise,
        slow_runs=vocabulary.slow_runs,
        verifies_drafts=can_verify(runner),
        takes_back=runner.can_truncate,
        special=vocabulary.special(),
    )
    model_info = msgspec.structs.replace(model_info, fingerprint=fingerprint(settings, runner, model_info))
    runner.files.confirm_loaded()
    return model_info, vocabulary


def fingerprint(settings: LoadModel, runner: LlamaRunner, model_info: ModelInfo) -> str:
    """A short hash of everything that can change a number: libraries, kernels, weights, shape of the computation.

    The model info is included except for `_NOT_NUMBERS`, so equal fingerprints mean equal tokens too.
    """
    content = hashlib.sha256(library.version().encode())
    content.update(digest(*library.files()).encode())
    content.update(digest(sampler_kernel.LIBRARY, *([accelerator.LIBRARY] if runner.accelerated else [])).encode())
    content.update(importlib.metadata.version("llguidance").encode())
    content.update(runner.files.digest())
    content.update(msgspec.msgpack.encode(msgspec.structs.replace(model_info, **_NOT_NUMBERS)))
    shape = (settings.context, settings.kv_type, runner.grid, settings.repack, settings.gpu_layers)
    adapter = settings.adapter_scale if settings.adapter else None  # its content is among the files
    content.update(repr((*shape, runner.uses_kernels, runner.uses_own_attention, adapter)).encode())
    if settings.gpu_layers:
        content.update(f"{gpus.gpu_names()} {settings.sequences if settings.fixed_shape else 0}".encode())
    return "fp_" + content.hexdigest()[:16]


def _known(token: int) -> int | None:
    return None if token == _NO_TOKEN else int(token)
