"""Compiles grammars with llguidance, and follows the text of a sample in them. Calls take no Python lock meanwhile.

llguidance bounds its own work: the size of a grammar, the work for one token, the states of its lexer. What goes beyond
fails with a message. The limits hold for one sample alone, since each has its own copy of the lexer: what other samples
do cannot change when they are reached.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, regex_to_lark
from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark

from afterword.engine.core.matcher import AllowedTokens, TokenMask
from afterword.engine.grammar.schema_errors import schema_error
from afterword.engine.grammar.schema_rewriting import rewritten
from afterword.engine.protocol import Grammar

_SPECIAL = b"\xff"  # llguidance's mark of a special token; no UTF-8 text has this byte
_LIMITS = LLParserLimits(
    step_lexer_fuel=100_000,  # about 7 ms for one token
    max_lexer_states=50_000,  # about 100 MB for one sample
    verbose_errors=False,  # else a message quotes the whole grammar
)
_ALL_TOKENS = '\n%llguidance {"no_forcing": true}\n'
"""Without it llguidance would allow only one tokenization of a text that must follow, chosen by its own tokenizer."""

WHITESPACE = "( |\n[ \t]{0,20})"
"""What may stand between two parts of a JSON value, if anything: a space, or a line end with an indentation. Without a
limit a model can write spaces until `max_tokens`."""

_JSON_OPTIONS = {"whitespace_pattern": WHITESPACE, "lenient": False}
_NO_CODES = {"json_allowed_escapes": 'nrbtf\\"'}
"""Without `\\u…`: in names of members llguidance would allow it for all characters, and take such a name for another
one. An open object could then have a wrong value of a listed member under its escaped name."""
_DEAD_END = "NoExtension"  # llguidance's name for a text that no token continues
_LONGEST_MESSAGE = 300  # characters


class InvalidGrammar(Exception):
    """A grammar that cannot be used. The text says where and why."""


class GrammarTokens:
    """The tokens that grammars are made of: the bytes of each, b"" for those that are no text, such as special tokens.

    One more token, behind the vocabulary, stands for the end of the text.
    """

    def __init__(self, texts: Sequence[bytes]) -> None:
        texts = [b"" if text.startswith(_SPECIAL) else text for text in texts]
        self.size = len(texts)
        self.words = self.size // 32 + 1  # of a mask, with the end
        is_text = np.zeros(32 * self.words, np.uint8)
        is_text[: self.size] = [bool(text) for text in texts]
        self.is_text: TokenMask = np.packbits(is_text, bitorder="little").view(np.uint32)
        self.tokenizer = LLTokenizer(
            TokenizerWrapper(_Tokens((*texts, _SPECIAL + b"end"))), n_vocab=self.size + 1, eos_token=self.size
        )


class _Tokens:
    """What llguidance's wrapper reads."""

    def __init__(self, tokens: tuple[bytes, ...]) -> None:
        self.tokens = tokens
        self.eos_token_id = len(tokens) - 1
        self.bos_token_id = None
        self.special_token_ids = [self.eos_token_id]

    def __call__(self, _: object) -> list[int]:
        raise NotImplementedError  # it is called only for texts that must follow, see `_ALL_TOKENS`


class Place:
    """A place in a compiled grammar. Calls for one place must not overlap."""

    def __init__(self, tokens: GrammarTokens, matcher: LLMatcher) -> None:
        self._tokens = tokens
        self._matcher = matcher

    def copy(self) -> Place:
        """The same place, to be moved on independently."""
        return Place(self._tokens, self._matcher.deep_copy())

    def append(self, token: int) -> bool:
        """Move on by one token. Returns whether nothing can follow; False if the token or the text so far is wrong."""
        return self._matcher.consume_token(token) and self._matcher.is_stopped() and not self._matcher.is_error()

    def take_back(self, count: int) -> None:
        """Move back by `count` of the tokens that were appended."""
        self._matcher.rollback(count)

    def allowed(self) -> AllowedTokens:
        """The tokens that may follow."""
        complete = self._matcher.is_accepting()
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: self._tokens.words] & self._tokens.is_text
        error = _short(self._matcher.get_error()) if self._matcher.is_error() else ""
        if error.startswith(_DEAD_END):
            return AllowedTokens(np.zeros_like(mask), complete)
        return AllowedTokens(mask, complete, error and f"the text cannot go on as its grammar demands: {error}")


def compile_grammar(grammar: Grammar, tokens: GrammarTokens) -> Place:
    """The beginning of a grammar. Raises `InvalidGrammar`."""
    matcher = LLMatcher(tokens.tokenizer, LLMatcher.grammar_from_lark(_lark(grammar)), log_level=0, limits=_LIMITS)
    if matcher.is_error():
        message = matcher.get_error()
        if grammar.kind == "json":
            message = schema_error(json.loads(grammar.text), _LIMITS) or message
        raise InvalidGrammar(_own_lines(message) if grammar.kind == "lark" else _first_part(message))
    return Place(tokens, matcher)


def _lark(grammar: Grammar) -> str:
    """The grammar in the notation of Lark, as llguidance reads it."""
    match grammar.kind:
        case "json":
            schema = _schema(grammar.text)
            # a schema with control characters needs the codes for them
            options = _JSON_OPTIONS if r"\u00" in grammar.text else _JSON_OPTIONS | _NO_CODES
            whole = {**schema, "x-guidance": options} if isinstance(schema, dict) else schema
            return f"start: %json {json.dumps(whole)}{_ALL_TOKENS}"
        case "regex":
            if _ends_in_escape(grammar.text):
                raise InvalidGrammar("the expression ends with a single backslash.")
            return f"start: TEXT\nTEXT: /{regex_to_lark(_without_anchors(grammar.text), 'd')}/{_ALL_TOKENS}"
        case "choice":
            return "start: TEXT\nTEXT: " + " | ".join(map(json.dumps, json.loads(grammar.text))) + _ALL_TOKENS
        case "gbnf":
            return _from_gbnf(grammar.text) + _ALL_TOKENS
    return grammar.text + _ALL_TOKENS


def _schema(text: str) -> object:
    try:
        return rewritten(json.loads(text))
    except RecursionError:  # far above what a request may have
        raise InvalidGrammar("too many objects and arrays inside each other.") from None


def _from_gbnf(text: str) -> str:
    try:
        return gbnf_to_lark(text)
    except GbnfToLarkError as problem:
        raise InvalidGrammar(_short(str(problem))) from None
    except Exception as problem:  # the converter raises plain exceptions for rules that are missing
        raise InvalidGrammar(f"it cannot be converted from llama.cpp's notation: {_short(str(problem))}") from None


def _without_anchors(pattern: str) -> str:
    """The expression without the ^ and $ around it: the whole text must match anyway."""
    inner = pattern.removeprefix("^")
    if not inner.endswith("$"):
        return inner
    return inner if _ends_in_escape(inner[:-1]) else inner[:-1]


def _ends_in_escape(pattern: str) -> bool:
    return (len(pattern) - len(pattern.rstrip("\\"))) % 2 == 1


def _first_part(message: str) -> str:
    """A message about a text that stands inside a grammar: without the grammar's lines and the place in them."""
    return _short(re.sub(r"^at \d+\(\d+\): ", "", re.split(r"\n\s*\d+ \| ", message, maxsplit=1)[0]))


def _own_lines(message: str) -> str:
    """A message that quotes lines of a grammar, without the line that was added to it."""
    return _short("\n".join(line for line in message.splitlines() if _ALL_TOKENS.strip() not in line))


def _short(message: str) -> str:
    """A message in one line of bounded length, without the marks of an omitted part."""
    line = " ".join(message.replace("<non-verbose/>", "").split())
    return line if len(line) <= _LONGEST_MESSAGE else line[: _LONGEST_MESSAGE - 1] + "…"
