"""Lays out a prompt, its `suffix` and other files with the model's infill tokens, as the model was trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from afterword.completion.infill_trim import InfillTexts, trim
from afterword.completion.object_fields import ContextFile
from afterword.completion.request import CompletionRequest
from afterword.engine.protocol import InfillLayout, ModelInfo
from afterword.errors import RequestError

_MARK = "\ue000"  # a character that no token continues
_SNIPPET = "\n\n--- snippet ---\n\n"  # what llama-server puts before a file for models without file separators
_GIVEN = ("prefix", "suffix", "file")


@dataclass(frozen=True, slots=True)
class InfillRules:
    """What differs between routes and servers in the layout of infill prompts.

    `always`: lay out prompts without suffix and files too. `snippets`: put files before the prompt as text if the model
    has no file separators. `fill_context`: reduce `max_tokens` to the rest of the context, and so that all candidates
    have at most `most_tokens` tokens together. `trim`: leave out what does not fit into the context (`infill_trim`).
    `rerank`: for models without infill tokens, sample several middles after the prefix and return the one under which
    the suffix is most likely (`rerank`). `ends_texts`: the route ends texts by rules of its own, see `middle_end`.
    """

    always: bool = False
    snippets: bool = False
    fill_context: bool = False
    most_tokens: int = 2**31
    trim: bool = False
    rerank: bool = False
    ends_texts: bool = False

    def apply_to(self, request: CompletionRequest) -> bool:
        """Whether the request's prompts are laid out with infill tokens."""
        return self.always or request.is_infill


NO_RULES = InfillRules()

RERANK = InfillLayout("rerank", ("prefix",))
"""The layout for models without infill tokens: the suffix is not in the prompt."""


@dataclass(frozen=True, slots=True)
class InfillPrompt:
    """The tokens that the model reads. `before`: how many come before the prefix. `given`: see `PromptPlan.given`.

    `suffix`: the suffix, if it is not among these tokens.
    """

    ids: tuple[int, ...]
    before: int
    given: tuple[tuple[int, int], ...]
    suffix: tuple[int, ...] = ()


def layout_of(request: CompletionRequest, model_info: ModelInfo, rules: InfillRules) -> InfillLayout:
    """The model's layout. Raises `RequestError` if the model has none, or none for the request's files."""
    layout = model_info.infill
    if layout is None and rules.rerank:
        if request.suffix and request.temperature == 0:
            raise RequestError(
                "This model has no fill-in-the-middle tokens. The server samples several middles and returns the best "
                "one, so 'temperature' must be above 0.",
                param="temperature",
            )
        layout = RERANK
    if layout is None:
        if rules.always:
            raise RequestError("Infill is not supported by this model: it has no fill-in-the-middle tokens.")
        name = "suffix" if request.suffix else "input_extra"
        raise _unsupported(name, "this model has no fill-in-the-middle tokens")
    if request.input_extra and not layout.file and not rules.snippets:
        raise _unsupported("input_extra", f"the infill family of this model, {layout.family}, has no file separators")
    return layout


def _unsupported(name: str, reason: str) -> RequestError:
    return RequestError(
        f"Unrecognized request argument supplied: {name} ({reason}, so {name} is not supported)", param=name
    )


def file_text(file: ContextFile, layout: InfillLayout) -> str:
    """The text of a file as the layout contains it."""
    return f"{file.filename}\n{file.text}" if layout.file else _SNIPPET + file.text


def infill_prompt(
    layout: InfillLayout, texts: InfillTexts, room: int | None = None, pieces: Sequence[bytes] = ()
) -> InfillPrompt:
    """Lay out a prompt.

    `room`: the most tokens that it may have; what is far from the cursor is left out. None: leave nothing out.
    `pieces`: the bytes of each token of the vocabulary, for `room`.
    """
    if room is not None:
        own = sum(len(ids) for kind, ids in _segments(layout, InfillTexts((), (), texts.files[:1])) if kind == "own")
        separators = sum(isinstance(part, int) for part in layout.file)
        texts = trim(texts, room - own + separators * bool(texts.files), separators, pieces)
    prompt: list[int] = []
    given = []
    before = 0
    for kind, ids in _segments(layout, texts):
        if kind == "prefix":
            before = len(prompt)
        if kind in _GIVEN and ids:
            given.append((len(prompt), len(prompt) + len(ids)))
        prompt.extend(ids)
    suffix = () if "suffix" in layout.parts else texts.suffix
    return InfillPrompt(tuple(prompt), before, tuple(given), suffix)


def _segments(layout: InfillLayout, texts: InfillTexts) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The parts of a prompt in order: their kind, "own" for tokens of the layout, and their tokens."""
    with_files = layout.with_files if layout.file else ("files", *layout.parts)
    for part in with_files if texts.files else layout.parts:
        if part == "files":
            for file in texts.files:
                for each in layout.file or ("file",):
                    yield ("file", file) if each == "file" else ("own", (int(each),))
        elif part == "prefix":
            yield "prefix", texts.prefix
        elif part == "suffix":
            yield "suffix", texts.suffix
        else:
            yield "own", (int(part),)


def before_suffix(model_info: ModelInfo) -> str:
    """What to put before a suffix or a file when it is tokenized; `suffix_tokens` removes it again.

    Some tokenizers put a space before a text. It belongs before the prefix and not before the suffix, which follows
    the gap: models with such tokenizers (CodeLlama, Codestral) were trained without it.
    """
    return _MARK if model_info.space_prefix else ""


def suffix_tokens(ids: tuple[int, ...], model_info: ModelInfo) -> tuple[int, ...]:
    """The tokens of the suffix, from the tokens of `before_suffix` and the suffix."""
    rest = len(f" {_MARK}".encode()) if model_info.space_prefix else 0
    for count, token in enumerate(ids):
        if rest <= 0:
            return ids[count:]
        rest -= len(model_info.pieces[token])
    return ()
