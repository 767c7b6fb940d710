"""An `Engine` without a model, for tests: a script decides which tokens each sample gets.

The vocabulary is every byte, then `WORDS`, `SPECIAL` and a token without text. The tokenizer splits a text into the
longest pieces. Log probabilities depend on the token alone and are exact in binary. The words are the most likely
tokens, in order.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field

from afterword.engine.protocol import FinishReason, InfillLayout, Job, JobHandle, ModelInfo, Step, Token
from afterword.errors import Overloaded, WorkerDied

WORDS = (b" the", b" cat", b" sat", b"Hello", b" world", b"\xf0\x9f", b"\x98\x80", b" \xe2\x80", b"\xe2\x80")
SPECIAL = ("<s>", "</s>", "<pre>", "<suf>", "<mid>")
PIECES = (*(bytes([byte]) for byte in range(256)), *WORDS, *(name.encode() for name in SPECIAL), b"")
BOS, EOS, PRE, SUF, MID, BLANK = range(256 + len(WORDS), len(PIECES))
INFILL = InfillLayout("other", (PRE, "prefix", SUF, "suffix", MID))
MODEL_INFO = ModelInfo(0, 64, 4, PIECES, (EOS,), None, EOS, False, False, 6, None, "fp_0")

Script = Callable[[Job, int], Iterable[int]]
_LONGEST_FIRST = re.compile(b"|".join(re.escape(piece) for piece in sorted(PIECES[:-1], key=len)[::-1]), re.DOTALL)


def ids(text: str | bytes) -> tuple[int, ...]:
    """The token ids of a text; the name of a special token becomes that token."""
    data = text.encode() if isinstance(text, str) else text
    return tuple(PIECES.index(piece) for piece in _LONGEST_FIRST.findall(data))


def text_script(*texts: str | bytes) -> Script:
    """A script in which each sample generates its text, then the end token. Without a text it is only the end token."""
    return lambda _, sample: (*ids(texts[sample] if sample < len(texts) else ""), EOS)


def report(token: int, alternatives: int | None = 0) -> Token:
    """A token as the engine reports it, with this many alternatives; None: without log probabilities."""
    logprobs = [-(1 + (token - 256) % 512) / 4 for token in (token, *range(256, 256 + (alternatives or 0)))]
    return Token(token) if alternatives is None else Token(token, logprobs[0], tuple(enumerate(logprobs[1:], 256)))


@dataclass
class ScriptedEngine:
    """Accepts at most `max_jobs` jobs. A job fails with `WorkerDied` after `dies_after` passes.

    `tokens_per_step`: tokens of each sample in a step, as if drafts were verified. `yields`: yield to the event loop
    after each pass; if not, the caller cannot react to a step in time. `taken_back`: tokens that each job took back.
    """

    script: Script
    model_info: ModelInfo = MODEL_INFO
    max_jobs: int = 100
    dies_after: int | None = None
    yields: bool = True
    tokens_per_step: int = 1
    taken_back: int = 0
    jobs: list["ScriptedJob"] = field(default_factory=list)

    async def tokenize(self, text: str, special: bool, client: str = "") -> tuple[int, ...]:
        parts = re.split(f"({'|'.join(SPECIAL)})", text) if special else re.split("(<)", text)  # `<` begins each name
        space = " " if self.model_info.space_prefix else ""
        return tuple(token for part in parts if part for token in ids(part if part in SPECIAL else space + part))

    def start(self, job: Job) -> "ScriptedJob":
        if len(self.jobs) == self.max_jobs:
            raise Overloaded("The scripted engine accepts no more jobs.")
        self.jobs.append(ScriptedJob(self, job))
        return self.jobs[-1]


class ScriptedJob:
    """A job. `live`: running samples with their remaining tokens. `dropped`: samples that the caller has ended."""

    def __init__(self, engine: ScriptedEngine, job: Job) -> None:
        self.engine, self.job, self.closed = engine, job, False
        self.live = {sample: iter(engine.script(job, sample)) for sample in range(job.samples)}
        self.dropped: list[int] = []
        self.going = asyncio.Event()
        self.going.set()
        self.pauses = 0

    async def __aiter__(self) -> AsyncIterator[Step]:
        wanted = self.job.prompt_alternatives
        scored = tuple(report(token, wanted) for token in self.job.prompt[1:] if wanted is not None)
        yield Step(
            scored[:1], taken_back=self.engine.taken_back
        )  # the first score alone; the others come with the first tokens
        length = 0
        while self.live:
            await self.going.wait()
            if length == self.engine.dies_after:
                raise WorkerDied
            step = None
            for _ in range(self.engine.tokens_per_step):
                length += 1
                part = self.step(length, scored[1:] if length == 1 else ())
                step = Step(step.scored, step.sampled + part.sampled, step.ended + part.ended) if step else part
            assert step is not None
            yield step
            await asyncio.sleep(0) if self.engine.yields else None

    def deliver_to(self, receive: Callable[[Step | Exception | None], None]) -> None:
        self.delivery = asyncio.create_task(deliver(self, receive))

    def step(self, length: int, scored: tuple[Token, ...]) -> Step:
        tokens = {sample: next(rest) for sample, rest in self.live.items() if self.job.max_tokens}
        ended: dict[int, FinishReason] = dict.fromkeys(self.live, "length") if length >= self.job.max_tokens else {}
        ended |= {sample: "stop" for sample, token in tokens.items() if token in self.job.end_tokens}
        self.live = {sample: rest for sample, rest in self.live.items() if sample not in ended}
        sampled = ((sample, report(token, self.job.alternatives)) for sample, token in tokens.items())
        return Step(scored, tuple(sampled), tuple(ended.items()))

    def drop(self, sample: int) -> None:
        self.dropped += [sample] if self.live.pop(sample, None) else []

    def close(self) -> None:
        self.closed |= bool(self.live)
        self.live.clear()
        self.going.set()

    def pause(self) -> None:
        self.pauses += 1
        self.going.clear()

    def resume(self) -> None:
        self.going.set()


async def deliver(handle: JobHandle, receive: Callable[[Step | Exception | None], None]) -> None:
    """Deliver the steps of a handle that is iterated over."""
    try:
        async for step in handle:
            receive(step)
    except Exception as error:
        receive(error)
    else:
        receive(None)
