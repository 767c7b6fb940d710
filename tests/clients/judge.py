"""What an evaluation must come to, computed without a server: another tokenizer, the numpy oracle, and arithmetic.

It shares the model's file with the server and nothing else; texts are cut into tokens by the `tokenizers` library.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from oracle.oracle import Oracle

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
PIECES = {"qwen2": (QWEN2,), "smollm": (r"\p{N}", GPT2)}
"""How each pre-tokenizer of the files cuts a text, one expression after the other."""
END = 0
"""The token `<|endoftext|>` of the built-in model: before the first token, and after the last."""


class Judge:
    """The right answers to the three kinds of request that an evaluator makes.

    `bos`: the token that the model reads before every text. Without it, texts are read as they are.
    """

    def __init__(self, path: Path, bos: int | None = None) -> None:
        self.oracle = Oracle(path)
        self._bos = () if bos is None else (bos,)
        self.tokenizer = tokenizer(self.oracle.fields)
        self.loglikelihood = cache(self.loglikelihood)  # the same questions come in every arrangement
        self.rolling = cache(self.rolling)
        self.greedy = cache(self.greedy)

    def loglikelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        """The continuation's log-likelihood, and whether it is the greedy one.

        The harness' own law: the context is read alone, without the blanks at its end; then the rest of the whole.
        """
        head = self.encode(context.rstrip())
        return self._score(head + self.encode(context + continuation)[len(head) :], len(head))

    def rolling(self, text: str, window: int) -> float:
        """A text's log-likelihood in disjoint windows, each with as much before it as fits."""
        tokens = [*(self._bos or (END,)), *self.encode(text)]
        total = 0.0
        for start in range(1, len(tokens), window):
            end = min(start + window, len(tokens))
            first = max(0, end - window - 1)
            total += self._score(tokens[first:end], start - first)[0]
        return total

    def greedy(self, prompt: str, limit: int, stops: tuple[str, ...]) -> str:
        """The likeliest tokens one by one, to the first stop string that is complete."""
        tokens, made, text = [*self._bos, *self.encode(prompt)], list[int](), ""
        while len(made) < limit and (token := int(self.oracle.logits(tokens + made)[-1].argmax())) != END:
            made.append(token)
            text = self.tokenizer.decode(made, skip_special_tokens=False)
            if found := [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]:
                return text[: min(found)[1]]
        return text

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _score(self, tokens: Sequence[int], known: int) -> tuple[float, bool]:
        added = self._bos if tuple(tokens[:1]) != self._bos else ()
        tokens, known = (*added, *tokens), known + len(added)
        rows, wanted = self.oracle.log_probs(tokens[:-1])[known - 1 :], np.array(tokens[known:])
        return float(rows[range(len(wanted)), wanted].sum()), bool((rows.argmax(axis=1) == wanted).all())


def tokenizer(fields: Mapping[str, Any]) -> Tokenizer:
    """The file's vocabulary in the hands of another library. `fields`: the keys of the file."""
    tokens, types, merges = (fields[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type", "merges"))
    pieces = PIECES[fields["tokenizer.ggml.pre"]]
    pairs: Iterable[tuple[str, str]] = [tuple(merge.split(" ")) for merge in merges]
    made = Tokenizer(BPE({token: number for number, token in enumerate(tokens)}, list(pairs)))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(piece), "isolated") for piece in pieces),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    named = (token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.CONTROL)
    made.add_special_tokens([AddedToken(token, normalized=False) for token in named])
    return made
