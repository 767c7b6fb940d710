"""Tests of banned phrases: no text contains one, and the tokens depend on the job alone, not on load and slots."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import msgspec
import pytest
from history_runner import VOCABULARY, HistoryRunner, logits_after, scores
from hypothesis import given, settings
from hypothesis import strategies as st

from afterword.completion.text_stream import StopStrings, TextStream, incomplete_character
from afterword.engine import token_row
from afterword.engine.core import banned_text, repetitions
from afterword.engine.core.banned_text import BannedPhrases, HeldTokens
from afterword.engine.core.engine_loop import EngineLoop
from afterword.engine.core.fair_share import TURN_PASSES
from afterword.engine.core.phrase_search import Automaton, AutomatonCache
from afterword.engine.core.repetitions import EarlierRepetitions, Repetitions
from afterword.engine.core.sampler import Sampler, SampleTokens
from afterword.engine.core.token_counts import TokenCounts
from afterword.engine.most_sampled import most_sampled_for
from afterword.engine.protocol import BannedText, Dry, Job, SamplerChain, Sampling, Step, Token
from afterword.engine.token_row import TokenRow

TEXTS = ("a", "b", "c", "", "A", "B", "ab", "", "bc", " a", " b", "ca", "aa", "abc", "é", "É", "x", "x y", " c")
PIECES = (*(text.encode() for text in TEXTS), b"\xc3", b"\xa9", b"\x89", b"<end>", "ß".encode())
assert len(PIECES) == VOCABULARY
END, NAME = 3, 22

phrases = st.lists(st.text("abcAB éßsxy", min_size=1, max_size=4), max_size=4).map(tuple)
bans = st.builds(
    BannedText,
    exact=phrases,
    folded=phrases,
    silent=st.sampled_from([(), (NAME,)]),
    begun=st.sampled_from([b"", b"\xc3"]),
)
dry = Dry(multiplier=1.0, base=1.5, allowed_length=1, last_n=-1)
samplings = st.sampled_from(
    [
        Sampling(),
        Sampling(temperature=0.0),
        Sampling(presence_penalty=1.5, repetition_penalty=1.3),
        Sampling(chain=SamplerChain(("dry", "top_k"), dry=dry), top_k=8),
        Sampling(chain=SamplerChain((), mirostat=2, mirostat_tau=2.0)),
    ]
)
jobs = st.builds(
    Job,
    prompt=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=12).map(tuple),
    samples=st.integers(1, 4),
    max_tokens=st.integers(1, 12),
    sampling=samplings,
    end_tokens=st.just((END,)),
    key=st.binary(min_size=16, max_size=16),
    alternatives=st.sampled_from([None, 2]),
    min_tokens=st.sampled_from([0, 4]),
    prompt_alternatives=st.sampled_from([None, 0]),
    client=st.sampled_from(["", "someone"]),
    banned=st.sampled_from([(), (0, 1)]),
    banned_text=st.one_of(st.none(), bans),
)
shapes = st.sampled_from([{}, {"grid": 3}, {"capacity": 40}])


@dataclass
class Reference:
    """One sample, computed in the plainest way: the whole text is searched after each token.

    `sent`: how many tokens are never taken back.
    """

    job: Job
    sample: int
    tokens: list[int] = field(default_factory=list)
    excluded: defaultdict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    limits: list[float] = field(default_factory=list)
    taken_back: int = 0
    sent: int = 0
    reason: str = ""

    def run(self) -> Reference:
        chain = self.job.sampling.chain or SamplerChain(())
        self.limits = [2 * chain.mirostat_tau]
        while not self.reason:
            place = len(self.tokens)
            token = self._draw(chain)
            if token in self.excluded[place]:
                self.taken_back, self.reason = self.taken_back + 1, "length"
                break
            self.tokens.append(token)
            begun = self._begun()
            if begun is not None:
                self._take_back(max(begun, self.sent))
                continue
            self.sent = max(self.sent, self._first_begun())
            if token in self.job.end_tokens:
                self.reason = "stop"
            elif len(self.tokens) == self.job.max_tokens:
                self.reason = "length"
        return self

    def _draw(self, chain: SamplerChain) -> int:
        place, history = len(self.tokens), [*self.job.prompt, *self.tokens]
        query = SampleTokens(
            self.job,
            (self.sample,),
            place,
            TokenCounts(self.tokens),
            Repetitions(chain.dry, history) if chain.dry else None,
            [self.limits],
            excluded=tuple(self.excluded[place]),
        )
        ((token,),) = Sampler().read(logits_after(history)[None], [query])
        return token.id

    def _take_back(self, begun: int) -> None:
        self.excluded = defaultdict(set, {place: ids for place, ids in self.excluded.items() if place <= begun})
        self.excluded[begun].add(self.tokens[begun])
        self.taken_back += len(self.tokens) - begun
        del self.tokens[begun:]
        if self.taken_back > 4 * self.job.max_tokens + 8:
            self.reason = "length"

    def _begun(self) -> int | None:
        """The token in which the first complete phrase begins."""
        banned = self.job.banned_text
        if banned is None:
            return None
        characters = characters_of(self.job, self.tokens)
        folded = [(part, place) for character, place in characters for part in character.casefold()]
        for end in range(1, len(characters) + 1):
            whole = "".join(character for character, _ in characters[:end])
            length = len(whole.casefold())
            before = len("".join(character for character, _ in characters[: end - 1]).casefold())
            found = [characters[end - len(each)][1] for each in banned.exact if whole.endswith(each)]
            for stop in range(before + 1, length + 1):
                text = whole.casefold()[:stop]
                wanted = [each.casefold() for each in banned.folded]
                found += [folded[stop - len(each)][1] for each in wanted if text.endswith(each)]
            if found:
                return max(found)
        return None

    def _first_begun(self) -> int:
        """The first token in which the text may end in the beginning of a phrase, or of a character."""
        banned = self.job.banned_text
        if banned is None:
            return len(self.tokens)
        characters = characters_of(self.job, self.tokens)
        data = banned.begun + b"".join(b"" if each in banned.silent else PIECES[each] for each in self.tokens)
        first = [characters.pop()[1]] if incomplete_character(data) else []
        folded = [(part, place) for character, place in characters for part in character.casefold()]
        for found, searched in ((characters, banned.exact), (folded, [each.casefold() for each in banned.folded])):
            text = "".join(character for character, _ in found)
            for size in {size for each in searched for size in range(1, len(each)) if text.endswith(each[:size])}:
                first.append(found[-size][1])
        return min(first, default=len(self.tokens))


def characters_of(job: Job, tokens: list[int]) -> list[tuple[str, int]]:
    """The characters of the text that a client gets, each with the token that has its first byte."""
    stream: TextStream[int] = TextStream(StopStrings(), 0, job.banned_text.begun if job.banned_text else b"")
    silent = job.banned_text.silent if job.banned_text else ()
    for place, token in enumerate(tokens):
        for byte in b"" if token in silent else PIECES[token]:
            stream.push(place, bytes([byte]))
    end = stream.finish()
    first = {0: 0} if job.banned_text and job.banned_text.begun else {}  # that character begins before all tokens
    for each in end.tokens:
        first.setdefault(each.offset, each.token)
    return [(character, first.get(offset, 0)) for offset, character in enumerate(end.text)]


def contains(job: Job, tokens: list[int]) -> bool:
    """Whether a text contains a banned phrase."""
    assert job.banned_text
    text = "".join(character for character, _ in characters_of(job, tokens))
    exact = any(each in text for each in job.banned_text.exact)
    return exact or any(each.casefold() in text.casefold() for each in job.banned_text.folded)


def loop_of(slots: int, chunk: int = 4, **shape: int) -> EngineLoop:
    loop = EngineLoop(HistoryRunner(slots, chunk, **shape))  # type: ignore[arg-type]
    loop.use_pieces(PIECES)
    return loop


def finish(loop: EngineLoop, *wanted: Job) -> list[list[Step]]:
    """The steps of each job."""
    for job_id, job in enumerate(wanted):
        loop.start(job_id, job)
    steps: defaultdict[int, list[Step]] = defaultdict(list)
    while (passed := loop.step()) is not None:
        for job_id, step in passed.items():
            steps[job_id].append(step)
    loop.check()
    return [steps[job_id] for job_id in range(len(wanted))]


def sampled(steps: list[Step], sample: int) -> list[int]:
    return [token.id for step in steps for index, token in step.sampled if index == sample]


@settings(deadline=None, max_examples=200)
@given(st.lists(jobs, min_size=1, max_size=5), st.integers(1, 4), st.integers(3, 8), shapes)
def test_tokens_are_those_of_the_definition_whatever_else_is_computed(wanted, slots, chunk, shape):
    found = finish(loop_of(slots, chunk, **shape), *wanted)
    for job, steps in zip(wanted, found, strict=True):
        references = [Reference(job, sample).run() for sample in range(job.samples)]
        assert dict(end for step in steps for end in step.ended) == {each.sample: each.reason for each in references}
        for each in references:
            assert sampled(steps, each.sample) == each.tokens
            assert not job.banned_text or not contains(job, each.tokens)
        assert sum(step.taken_back for step in steps) == sum(each.taken_back for each in references)
        assert [token for step in steps for token in step.scored] == scores(job)


def job(banned_text: BannedText, **fields: object) -> Job:
    plain = Job((0, 1), 1, 8, Sampling(temperature=0.0), end_tokens=(), key=b"k" * 16, banned_text=banned_text)
    return msgspec.structs.replace(plain, **fields)


def text_of(tokens: list[int]) -> str:
    return b"".join(PIECES[token] for token in tokens).decode()


def test_without_a_phrase_in_it_a_text_is_that_without_bans() -> None:
    plain = job(BannedText(exact=("zzz",)))
    (banned,), (free,) = (
        finish(loop_of(2), each) for each in (plain, msgspec.structs.replace(plain, banned_text=None))
    )
    assert sampled(banned, 0) == sampled(free, 0)
    assert sum(step.taken_back for step in banned) == 0


def test_tokens_that_may_be_taken_back_are_held_and_all_others_are_not() -> None:
    """The forced text is `aab…`; `abx` cannot come, but begins again and again."""
    forced = Sampling(temperature=0.0, logit_bias=((6, 100.0),))  # ab
    (steps,) = finish(loop_of(1), job(BannedText(exact=("ababx",)), sampling=forced, max_tokens=6))
    arrived = [len(step.sampled) for step in steps if step.sampled or step.ended]
    assert sum(arrived) == 6
    assert arrived == [1, 1, 1, 3]  # two tokens are held until the third shows that no phrase begins with them


@pytest.mark.parametrize("allowed", [1 << 6, 1 << 6 | 1 << 0])
def test_a_place_where_nothing_is_left_ends_the_sample(allowed: int) -> None:
    """Only `ab` and `a` may be sampled, and both begin a phrase."""
    chain = SamplerChain((), allowed=allowed.to_bytes(3, "little"))
    banned = BannedText(folded=("aa", "AB", "a"))
    (steps,) = finish(loop_of(1), job(banned, sampling=Sampling(temperature=0.0, chain=chain)))
    assert steps[-1].ended == ((0, "length"),)
    assert sampled(steps, 0) == []
    assert sum(step.taken_back for step in steps) == 1 + allowed.bit_count()


def test_the_work_for_a_sample_is_bounded() -> None:
    """Every text with two tokens is banned, so the first place is drawn again until the bound or no token is left."""
    every = tuple({piece.decode() for piece in PIECES if piece.isascii() and piece} | {"é", "É", "ß"})
    parts = tuple(PIECES.index(each) for each in (b"\xc3", b"\xa9", b"\x89"))
    plain = job(BannedText(exact=every), samples=3, sampling=Sampling(), max_tokens=2, banned=parts)
    (steps,) = finish(loop_of(2), plain)
    assert sorted(end for step in steps for end in step.ended) == [(sample, "length") for sample in range(3)]
    sampled_tokens = sum(step.taken_back + len(step.sampled) for step in steps)
    assert 3 * 4 * 2 < sampled_tokens <= most_sampled_for(plain) == 3 * (5 * 2 + 8)


def test_what_was_taken_back_is_computed_again_and_reused_by_others() -> None:
    """The slot of a sample ends as the slot of its text: a prompt of this text starts from it."""
    banned = job(BannedText(folded=("b",)), max_tokens=12)
    loop = loop_of(1)
    (steps,) = finish(loop, banned)
    tokens = sampled(steps, 0)
    assert sum(step.taken_back for step in steps) > 0
    follow = job(BannedText(exact=("zzz",)), prompt=(*banned.prompt, *tokens), max_tokens=2)
    (steps,) = finish(loop, follow)
    assert steps[0].cached == len(follow.prompt) - 1
    (fresh,) = finish(loop_of(1), follow)
    assert sampled(steps, 0) == sampled(fresh, 0)


def test_case_counts_for_exact_phrases_only() -> None:
    for phrase, free in (("A", "a"), ("a", "A")):
        bias = ((PIECES.index(b"a"), 90.0), (PIECES.index(b"A"), 75.0), (PIECES.index(b"c"), 60.0))
        (steps,) = finish(loop_of(1), job(BannedText(exact=(phrase,)), sampling=Sampling(0.0, logit_bias=bias)))
        assert text_of(sampled(steps, 0)) == 8 * free
        (steps,) = finish(loop_of(1), job(BannedText(folded=(phrase,)), sampling=Sampling(0.0, logit_bias=bias)))
        assert text_of(sampled(steps, 0)) == 8 * "c"


def test_the_first_place_is_drawn_again_from_a_pass_on_the_grid() -> None:
    """The row after the prompt has the same numbers only if its pass begins where it did before."""
    runner = HistoryRunner(1, 4, grid=3)
    loop = EngineLoop(runner)
    loop.use_pieces(PIECES)
    forced = Sampling(temperature=0.0, logit_bias=((6, 100.0),))  # ab
    finish(loop, job(BannedText(exact=("a",)), prompt=(0, 1, 2, 8, 9), sampling=forced, max_tokens=1))
    passes = [(each.position, len(each.tokens)) for batch in runner.batches for each in batch.entries]
    assert passes[:3] == [(0, 3), (3, 2), (3, 2)]
    assert set(passes[3:]) <= {(3, 2)}


def held_tokens(banned: BannedText, **fields: object) -> HeldTokens:
    wanted = job(banned, **fields)
    phrases = BannedPhrases.of(wanted, PIECES, AutomatonCache())
    assert phrases
    return HeldTokens(phrases, wanted)


def test_what_was_sent_is_not_taken_back() -> None:
    """`a` is sent when `abc` cannot follow. Later the place after it is drawn again, and `abc` could follow."""
    a, b, bc, space_c, x = (PIECES.index(each) for each in (b"a", b"b", b"bc", b" c", b"x"))
    held = held_tokens(BannedText(exact=("abc", "b cx")))
    assert [held.append(Token(each)) for each in (a, b, space_c)] == [0, 0, 0]
    assert held.release() == [Token(a)]
    assert held.append(Token(x)) == 3
    assert held.append(Token(bc)) == 1
    assert (held.banned(1), held.taken_back, held.release()) == ((b, bc), 4, [])


def test_few_tokens_are_banned_at_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pass there reads them all."""
    monkeypatch.setattr(banned_text, "MOST_BANNED", 3)
    held = held_tokens(BannedText(exact=("a", "b", "c")), max_tokens=100)
    ended = []
    for token in (0, 1, 2):
        held.append(Token(token))
        ended.append(held.is_exhausted)
    assert ended == [False, False, True]


def test_a_sample_that_would_hold_too_many_rows_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token without bytes is held as long as the text before it is."""
    monkeypatch.setattr(banned_text, "MAX_HELD_BYTES", 12 * 100)
    held = held_tokens(BannedText(exact=("abc",)), samples=2, max_tokens=100)
    a, x, empty = (PIECES.index(each) for each in (b"a", b"x", b""))
    row = TokenRow(25, bytes(100))
    full = []
    for token in (x, a, *[empty] * 6):
        held.append(Token(token, -1.0, row=row))
        held.release()
        full.append(held.is_full)
    assert full == [False] * 7 + [True]
    assert len(held.release(everything=True)) == 7
    assert not held.is_full


def test_the_engine_ends_a_sample_that_would_hold_too_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of its tokens are without bytes, after the first byte of a character."""
    monkeypatch.setattr(token_row, "MAX_LISTED", 5)
    monkeypatch.setattr(banned_text, "MAX_HELD_BYTES", 6 * 4 * VOCABULARY)
    forced = Sampling(temperature=0.0, logit_bias=((7, 100.0),))
    banned = BannedText(exact=("é",), begun=b"\xc3")
    (steps,) = finish(loop_of(1), job(banned, sampling=forced, max_tokens=30, alternatives=VOCABULARY))
    assert sampled(steps, 0) == [7] * 7
    assert [ended for step in steps for ended in step.ended] == [(0, "length")]


def test_the_beginning_of_a_character_in_the_prompt_counts_only_where_the_text_has_it() -> None:
    """The prompt ends with the first byte of `é`."""
    forced = Sampling(temperature=0.0, logit_bias=((PIECES.index(b"\xa9"), 100.0),))
    wanted = job(BannedText(exact=("é",)), prompt=(0, PIECES.index(b"\xc3")), sampling=forced, max_tokens=1)
    (steps,) = finish(loop_of(1), wanted)
    assert sampled(steps, 0) == [PIECES.index(b"\xa9")]
    echoed = msgspec.structs.replace(wanted, banned_text=BannedText(exact=("é",), begun=b"\xc3"))
    (steps,) = finish(loop_of(1), echoed)
    assert sampled(steps, 0) != [PIECES.index(b"\xa9")]


def test_repetitions_are_not_computed_anew_for_what_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only for the prompt. What was taken back is added again at most twice."""
    texts, added = [], []
    whole, add = repetitions._suffix_lengths, Repetitions.add
    monkeypatch.setattr(repetitions, "_suffix_lengths", lambda text: texts.append(len(text)) or whole(text))
    monkeypatch.setattr(Repetitions, "add", lambda each, token: added.append(token) or add(each, token))
    sampling = Sampling(0.0, logit_bias=((0, 100.0),), chain=SamplerChain(("dry",), dry=dry))
    banned = job(BannedText(exact=("a" * 6, "cb")), prompt=(2,) * 30, sampling=sampling, max_tokens=40)
    (steps,) = finish(loop_of(1), banned)
    taken_back = sum(step.taken_back for step in steps)
    assert taken_back > 100
    assert texts == [30]
    assert len(added) <= sum(len(step.sampled) for step in steps) + 3 * taken_back


@settings(deadline=None)
@given(st.lists(st.integers(0, 2), max_size=60), st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=9))
def test_earlier_repetitions_are_those_of_the_shorter_text(text: list[int], moves: list[tuple[int, int]]) -> None:
    """Each move takes tokens back, adds others, and sends some."""
    earlier, known, now = EarlierRepetitions(), Repetitions(dry, []), []
    first = 0

    def extend(tokens: list[int]) -> None:
        for token in tokens:
            earlier.keep(len(now), first, known)
            known.add(token)
            now.append(token)

    extend(text)
    for back, more in moves:
        stop = max(first, len(now) - back)
        if stop < len(now):
            start, known = earlier.take(stop)
            again = now[start:stop]
            del now[start:]
            extend(again)
        expected = Repetitions(dry, now)
        assert known._tokens.tolist() == expected._tokens.tolist() == now
        assert known._lengths.tolist() == expected._lengths.tolist()
        extend(text[:more])
        first += (len(now) - first) // 3
        assert len(earlier) <= 3 + 2 * (len(now) - first + 1).bit_length()


def test_repetitions_of_many_held_tokens_are_few() -> None:
    """Going back by a few tokens needs few additions."""
    for back in range(1, 500):
        earlier, known = EarlierRepetitions(), Repetitions(dry, [])
        for place in range(500):
            earlier.keep(place, 0, known)
        assert len(earlier) <= 12
        start, _ = earlier.take(500 - back)
        assert 500 - back - start < 2 * back


def test_a_client_gets_its_turn_while_another_takes_back_all_that_it_samples() -> None:
    """The text becomes a few tokens longer, and is then taken back almost whole."""
    forced = Sampling(temperature=0.0, logit_bias=((0, 100.0),))  # a
    greedy = job(BannedText(exact=("a" * 20,)), sampling=forced, max_tokens=400, client="greedy")
    patient = Job((0, 1), 1, 1, Sampling(), end_tokens=(), key=b"k" * 16, client="patient")
    loop = loop_of(1)
    loop.start(0, greedy)
    passes = sum(0 not in loop.step() for _ in range(10))
    loop.start(1, patient)
    while 1 not in (loop.step() or {}):
        passes += 1
    assert passes < 2 * TURN_PASSES


short = st.text("ab", min_size=1, max_size=4)


@given(st.lists(short, max_size=6), st.text("abc", max_size=30))
def test_an_automaton_knows_the_phrases_that_begin_and_end_at_a_character(searched: list[str], text: str) -> None:
    automaton, state = Automaton(searched), 0
    assert len(automaton) == len({phrase[:size] for phrase in searched for size in range(len(phrase) + 1)} | {""})
    for stop, character in enumerate(text, 1):
        state = automaton.follow(state, character)
        ends = {text[start:stop] for start in range(stop + 1)}
        begun = {phrase[:size] for phrase in searched for size in range(len(phrase) + 1)}
        assert automaton.lengths[state] == max(map(len, ends & begun), default=0)
        assert automaton.shortest[state] == min(map(len, ends & set(searched)), default=0)


def test_the_search_costs_two_steps_for_each_character() -> None:
    """However many phrases have begun: here 256 after each character."""
    automaton = Automaton(["a" * size + "b" for size in range(256)])

    class Counted(dict[int, int]):
        reads = 0

        def get(self, key: int, default: object = None) -> int | None:  # type: ignore[override]
            self.reads += 1
            return super().get(key)

    automaton._next = counted = Counted(automaton._next)
    state = 0
    for _ in range(1000):
        state = automaton.follow(state, "a")
    assert counted.reads <= 2 * 1000


def test_the_cache_of_automata_is_bounded() -> None:
    cache = AutomatonCache(most=20)
    first = cache.get(("abc", "abd"))
    assert cache.get(("abc", "abd")) is first
    for size in range(1, 10):
        cache.get(("x" * size,))
        assert cache.states <= 20
    assert cache.get(("abc", "abd")) is not first
    assert len(cache.get(("y" * 50,))) == cache.states == 51


def test_samples_of_a_job_and_jobs_with_equal_phrases_share_an_automaton(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    build = Automaton.__init__
    monkeypatch.setattr(Automaton, "__init__", lambda each, given: made.append(given) or build(each, given))
    banned = BannedText(exact=("ab", "x"), folded=("Bc",))
    finish(loop_of(2), job(banned, samples=4), job(banned, samples=2))
    assert sorted(made) == [("ab", "x"), ("bc",)]
