"""A model's tokens: text to ids by llama.cpp, and the table of what each id stands for."""

from __future__ import annotations

import ctypes
import hashlib

import msgspec

from afterword.engine.compiled import digest
from afterword.engine.core import rows
from afterword.engine.frames import Open
from afterword.engine.llama import accelerator, cards
from afterword.engine.llama.library import native, version
from afterword.engine.llama.runner import LlamaRunner
from afterword.engine.protocol import Card, Infill

_NO_TOKEN = -1


class Vocabulary:
    """The vocabulary of a loaded model. Safe to use from any thread."""

    def __init__(self, model: object) -> None:
        self._vocab = native.llama_model_get_vocab(model)
        self.size = int(native.llama_vocab_n_tokens(self._vocab))
        self._kind = native.llama_vocab_type(self._vocab)

    def tokenize(self, text: str, special: bool) -> tuple[int, ...]:
        """Tokens without BOS. `special`: text that spells a special token becomes that token."""
        data = text.encode()
        if not data:
            return ()
        room = len(data) + 8
        ids = (ctypes.c_int32 * room)()
        count = native.llama_tokenize(self._vocab, data, len(data), ids, room, False, special)
        if count < 0:
            ids = (ctypes.c_int32 * -count)()
            count = native.llama_tokenize(self._vocab, data, len(data), ids, -count, False, special)
        return tuple(ids[:count])

    def pieces(self) -> tuple[bytes, ...]:
        """The bytes of every id; special tokens by their name, ids without text b""."""
        return tuple(self._piece(token) for token in range(self.size))

    def ends(self) -> tuple[int, ...]:
        """Ids that end a generation."""
        return tuple(t for t in range(self.size) if native.llama_vocab_is_eog(self._vocab, t))

    def bos(self) -> int | None:
        """Beginning of a text."""
        return _known(native.llama_vocab_bos(self._vocab))

    def eos(self) -> int | None:
        """End of a text."""
        return _known(native.llama_vocab_eos(self._vocab))

    def add_bos(self) -> bool:
        """Whether the model wants BOS before a text."""
        return bool(native.llama_vocab_get_add_bos(self._vocab))

    def infill(self) -> Infill | None:
        """The model's fill-in-the-middle tokens, if it has all three."""
        ids = [
            _known(native.llama_vocab_fim_pre(self._vocab)),
            _known(native.llama_vocab_fim_suf(self._vocab)),
            _known(native.llama_vocab_fim_mid(self._vocab)),
        ]
        prefix, suffix, middle = ids
        if prefix is None or suffix is None or middle is None:
            return None
        return Infill(prefix, suffix, middle)

    @property
    def keeps_text(self) -> bool:
        """Whether tokens spell the text byte for byte (others may fold or drop some of it)."""
        return self._kind in (native.LLAMA_VOCAB_TYPE_BPE, native.LLAMA_VOCAB_TYPE_SPM)

    def _piece(self, token: int) -> bytes:
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            size = native.llama_token_to_piece(self._vocab, token, buffer, room, 0, True)
            if size >= 0:
                return buffer.raw[:size]
            room = -size


def make_card(runner: LlamaRunner, settings: Open) -> tuple[Card, Vocabulary]:
    """Facts about the model that a runner holds, and its vocabulary.

    Raises `SettingError` if its files changed while they were loaded: the fingerprint would name other bytes.
    """
    vocabulary = Vocabulary(runner.model)
    pieces = vocabulary.pieces()
    # SentencePiece texts gain a leading space; the joined pieces of any text show whether this model's do.
    plain = vocabulary.tokenize("a", False)
    card = Card(
        parameters=int(native.llama_model_n_params(runner.model)),
        context=settings.context,
        sequences=settings.sequences,
        pieces=pieces,
        ends=vocabulary.ends(),
        bos=vocabulary.bos(),
        eos=vocabulary.eos(),
        add_bos=vocabulary.add_bos(),
        space_prefix=b"".join(pieces[t] for t in plain).startswith(b" "),
        # In a text SentencePiece's own sign for a space has three bytes.
        longest=max(len(piece.replace(b" ", "▁".encode())) for piece in pieces) if vocabulary.keeps_text else 0,
        infill=vocabulary.infill(),
        fingerprint="",
        promise=runner.promise,
    )
    card = msgspec.structs.replace(card, fingerprint=fingerprint(settings, runner, card))
    runner.files.confirm_loaded()
    return card, vocabulary


def fingerprint(settings: Open, runner: LlamaRunner, card: Card) -> str:
    """A short name for all that can change a number: libraries, weights, and the shape of the computation.

    Also for what else the card says of the model, such as its tokens: cards of one fingerprint are alike.
    """
    named = hashlib.sha256(version().encode())
    named.update(digest(rows.FILE, *([accelerator.FILE] if runner.accelerated else [])).encode())
    named.update(runner.files.digest())
    named.update(msgspec.msgpack.encode(msgspec.structs.replace(card, sequences=0, promise="none")))
    shape = (settings.context, settings.kv_type, runner.grid, settings.repack, settings.gpu_layers)
    named.update(repr((*shape, runner.own_products, runner.own_attention)).encode())
    if settings.gpu_layers:
        named.update(f"{cards.names()} {settings.sequences if settings.full else 0}".encode())
    return "fp_" + named.hexdigest()[:16]


def _known(token: int) -> int | None:
    return None if token == _NO_TOKEN else int(token)
