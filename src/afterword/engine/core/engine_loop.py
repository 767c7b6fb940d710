"""The engine's main loop: schedule a forward batch, run it, turn logits into steps.

It works with any `Runner` and must not depend on a model library or on the worker process. It owns the scheduler, the
runner and the step buffer, all in the worker's main thread.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from collections.abc import Sequence as TokenSequence
from itertools import islice

import msgspec

from afterword.engine.core.banned_text import BannedPhrases, HeldTokens
from afterword.engine.core.draft_model import Drafter, DraftModel
from afterword.engine.core.forward_batch import BatchEntry, ForwardBatch, Logits, Runner, slot_rules
from afterword.engine.core.grammar_keeper import GrammarKeeper
from afterword.engine.core.loops import ends_in_loop
from afterword.engine.core.matcher import GrammarCompiler
from afterword.engine.core.phrase_search import AutomatonCache
from afterword.engine.core.prefill_queue import MIN_CHUNK
from afterword.engine.core.prefix_cache import PrefixCache
from afterword.engine.core.prefix_store import PrefixKeeper, PrefixStore
from afterword.engine.core.sampler import Sampler, ScoreQuery, TokenQuery, finite_rows, make_kernel
from afterword.engine.core.scheduler import Scheduler
from afterword.engine.core.sequence import Sequence
from afterword.engine.core.step_buffer import MAX_STEP_BYTES, StepBuffer
from afterword.engine.core.step_builder import StepBuilder, first_step, limit_alternatives, packed_step
from afterword.engine.core.verification import can_verify, confirmed_tokens, is_verification, verification_queries
from afterword.engine.protocol import FinishReason, Job, Load, PassStats, Step, Token, scored_positions

PASS_SECONDS = 0.25
"""Seconds of prefill between two decodes while sequences run; up to twice as long while few sequences run."""

MEMORY_CHECK_SECONDS = 1.0
"""Seconds between two looks at the memory that the machine has left."""


class EngineLoop:
    """Owner of the scheduler and the runner. One thread calls everything.

    `clock`: returns seconds. `threads`: the most threads that the sampler uses. `thread_pool`: address of the function
    that runs them, see `sampler_kernel.CompiledKernel`. `max_step_bytes`: bytes of steps returned at a time, see
    `StepBuffer`.
    """

    def __init__(
        self,
        runner: Runner,
        clock: Callable[[], float] = time.perf_counter,
        threads: int = 1,
        thread_pool: int | None = None,
        max_step_bytes: int = MAX_STEP_BYTES,
    ) -> None:
        self._runner = runner
        self._slots = PrefixCache(slot_rules(runner))
        self._scheduler = Scheduler(self._slots, runner.chunk, runner.grid, runner.joins_prompts)
        self._sampler = Sampler(make_kernel(threads, thread_pool))
        self._clock = clock
        self._keeper = PrefixKeeper(self._slots, None, clock)
        self._grammars = GrammarKeeper()
        self._prefill_speed: float | None = None  # prompt tokens per second, as measured
        self._last_pass = PassStats()
        self._drafter = Drafter(can_verify(runner))
        self._pieces: TokenSequence[bytes] = ()
        self._automata = AutomatonCache()
        self._step_buffer = StepBuffer(max_step_bytes)
        self._next_memory_check = 0.0
        self._pass_next = False  # compute a pass before more jobs are admitted

    def use_store(self, store: PrefixStore | None) -> None:
        """Keep prefixes in a store too. Call it before any job is added."""
        self._keeper.store = store

    def use_grammars(self, compiler: GrammarCompiler) -> None:
        """Accept jobs with a grammar. Call it before any job is added."""
        self._grammars.compiler = compiler

    def use_pieces(self, pieces: TokenSequence[bytes]) -> None:
        """Set the bytes of each token, in which banned phrases are found. Call it before any job is added."""
        self._pieces = pieces

    def draft_ngrams(self) -> None:
        """Draft from each sample's own text too, where the runner permits drafts. Call it before any job is added."""
        self._drafter.ngrams = True

    def use_draft_model(self, model: DraftModel, report: Callable[[str], None]) -> None:
        """Draft with a second model too. `report`: see `Drafter`. Call it before any job is added."""
        self._drafter.model, self._drafter.report = model, report

    def start(self, job_id: int, job: Job) -> None:
        """Add a job. `step` returns its steps under `job_id`."""
        self._scheduler.add(job_id, job)
        self._keeper.request(job_id, job)
        self._grammars.request(job_id, job)
        if self._keeper.is_reading(job_id) or self._grammars.holds_back(job_id):
            self._update_suspension(job_id)

    def drop(self, job_id: int, sample: int) -> None:
        """End one sample."""
        self._scheduler.drop(job_id, sample)
        self._update_suspension(job_id)

    def close(self, job_id: int) -> None:
        """End a job."""
        self._scheduler.close(job_id)
        self._step_buffer.discard(job_id)
        self._keeper.forget((job_id,))
        self._grammars.forget(job_id)

    def pause(self, job_id: int) -> None:
        """Compute and return nothing for a job until `resume`. Unknown ids are ignored."""
        self._step_buffer.paused.add(job_id)
        self._update_suspension(job_id)

    def resume(self, job_id: int) -> None:
        """Continue a paused job."""
        self._step_buffer.paused.discard(job_id)
        self._update_suspension(job_id)

    def load(self) -> Load:
        """The number of slots, running sequences and waiting samples."""
        return self._scheduler.load()

    @property
    def waits(self) -> bool:
        """Whether a job waits for the store of prefixes or for its grammar."""
        return self._keeper.waits or self._grammars.waits

    def pass_stats(self) -> PassStats:
        """The pass since the last call of this method, if there was one, and how full the slots are."""
        last_pass, self._last_pass = self._last_pass, PassStats()
        used, cached = self._scheduler.slot_usage()
        return msgspec.structs.replace(last_pass, used_tokens=used, cached_tokens=cached)

    def check(self) -> None:
        """Raise `AssertionError` if scheduler, slots and runner disagree about any token. Call it only when idle."""
        for slot, tokens in self._scheduler.check().items():
            assert self._runner.cached_tokens(slot) == tokens, f"slot {slot} should hold {tokens} tokens"
        self._drafter.check()

    def give_back_memory(self) -> None:
        """Empty slots whose memory other programs need. Call it now and then while there is nothing to compute."""
        self._limit_slots()
        self._slots.make_room(0)
        if operations := self._slots.take_operations():
            self._runner.run(ForwardBatch(operations, ()))
        self._drafter.give_back_memory(self._slots.capacity)

    def step(self) -> dict[int, Step] | None:
        """Return buffered steps, or else compute one forward pass. Returns steps by job id (possibly none).

        Returns None if there is nothing to do or to wait for. A job's first step is returned before anything is
        computed for it, so that the supervisor knows which jobs may have caused a crash of this process. Passes and
        returns of buffered steps alternate. So jobs that are answered from the prefix cache and jobs that need passes
        do not block each other.
        """
        for job_id in self._keeper.collect():
            self._update_suspension(job_id)
        for job_id, event in self._grammars.collect(self._step_buffer):
            self._grammar_event(job_id, event)
        # Here and not right after a pass: the caller discards passes that were computed with changed weights.
        self._keeper.keep(most=1)
        if self._pass_next and (batch := self._schedule()) is not None:
            self._pass_next = False
            self._compute(batch)
            return self._take()
        self._admit()
        if steps := self._take():
            self._pass_next = True
            return steps
        if (batch := self._schedule()) is None:
            return {} if self._keeper.work_while_idle() or self._grammars.wait(0.02) else None
        self._compute(batch)
        return self._take()

    def _grammar_event(self, job_id: int, step: Step | None) -> None:
        if step is None:
            self._update_suspension(job_id)
            return
        if step.failed:
            self.close(job_id)
        self._add(job_id, step)

    def _admit(self) -> None:
        for admission in self._scheduler.admit(self._step_buffer.free_bytes):
            self._add(admission.job_state.job_id, first_step(admission))
            self._keeper.forget((admission.job_state.job_id,))

    def _schedule(self) -> ForwardBatch | None:
        if self._clock() >= self._next_memory_check:
            self._limit_slots()
        self._drafter.propose(self._scheduler.verification_turns, self._scheduler.running, self._slots.capacity)
        return self._scheduler.schedule(
            None if self._prefill_speed is None else int(self._prefill_speed * PASS_SECONDS)
        )

    def _limit_slots(self) -> None:
        self._next_memory_check = self._clock() + MEMORY_CHECK_SECONDS
        self._slots.limit(self._runner.free_tokens())

    def _add(self, job_id: int, step: Step) -> None:
        self._step_buffer.add(job_id, step)
        self._update_suspension(job_id)

    def _take(self) -> dict[int, Step]:
        steps = self._step_buffer.take()
        for job_id in steps:
            self._update_suspension(job_id)
        # Here and not after a pass: sorting a vocabulary takes as long as a pass, so portions of it are in between.
        return {job_id: packed_step(step, self._sampler.packed) for job_id, step in steps.items()}

    def _update_suspension(self, job_id: int) -> None:
        """Suspend a job that is paused or has buffered steps. Delete the pause of a job that has ended."""
        waits, paused = job_id in self._step_buffer, job_id in self._step_buffer.paused
        reads = self._keeper.is_reading(job_id) or self._grammars.holds_back(job_id)
        if not self._scheduler.suspend(job_id, waits or paused or reads, paused) and paused and not waits:
            self._step_buffer.paused.discard(job_id)

    def _compute(self, batch: ForwardBatch) -> None:
        builders: defaultdict[int, StepBuilder] = defaultdict(StepBuilder)
        start = self._clock()
        logits = self._runner.run(batch)
        seconds = self._clock() - start
        self._update_prefill_speed(batch, seconds)
        prompt = self._scheduler.sequence_in(batch.entries[0].slot).needs_prefill
        self._last_pass = PassStats(prompt, sum(len(entry.tokens) for entry in batch.entries), seconds)
        queries = [query for entry in batch.entries for query in self._entry_queries(entry)]
        tokens = iter(self._sampler.read(logits, queries))
        # with the time of the sampler, which can take longer than the model and reads the rows of rejected tokens too
        with_sampler = self._clock() - start
        self._scheduler.charge(batch, with_sampler)
        self._scheduler.verification_turns.record_pass(batch, with_sampler)
        read = [(entry, self._used_rows(entry, list(islice(tokens, entry.outputs)))) for entry in batch.entries]
        failed = dict.fromkeys(self._failed_jobs(read, logits), "") | self._grammars.errors
        for entry, found in read:
            sequence = self._scheduler.sequence_in(entry.slot)
            if sequence.job_state.job_id in failed:
                self._scheduler.computed(entry, sequence, [])
            elif is_verification(sequence, entry):
                self._verified(entry, sequence, found, builders[sequence.job_state.job_id])
            else:
                self._postprocess(entry, sequence, found, builders[sequence.job_state.job_id])
        for job_id, error in failed.items():
            self._scheduler.discard_failed(job_id)
            self._grammars.forget(job_id)
            self._add(job_id, Step(failed=True, error=error))
        for job_id, builder in builders.items():
            self._add(job_id, builder.step())

    def _used_rows(self, entry: BatchEntry, found: list[list[Token]]) -> list[list[Token]]:
        """The tokens of an entry's rows that are used: not those of rows after a rejected token."""
        sequence = self._scheduler.sequence_in(entry.slot)
        if not is_verification(sequence, entry):
            return found
        return found[: len(confirmed_tokens(sequence.job_state.job, entry, found))]

    def _failed_jobs(self, read: list[tuple[BatchEntry, list[list[Token]]]], logits: Logits) -> set[int]:
        """The ids of jobs with a used logits row that is not finite."""
        finite = finite_rows(logits)
        if finite.all():
            return set()
        failed, row = set(), 0
        for entry, used in read:
            if not finite[row : row + len(used)].all():
                failed.add(self._scheduler.sequence_in(entry.slot).job_state.job_id)
            row += entry.outputs
        return failed

    def _entry_queries(self, entry: BatchEntry) -> list[TokenQuery]:
        """The queries for an entry's logits rows, one a row. Each row predicts the token after its position.

        Scores of prompt tokens get as many alternatives as the scores that the slot has already, so that the slot's
        scores can still be reused for queries with that many alternatives.
        """
        sequence = self._scheduler.sequence_in(entry.slot)
        job, end = sequence.job_state.job, entry.position + len(entry.tokens)
        queries: list[TokenQuery] = []
        if is_verification(sequence, entry):
            return [*verification_queries(sequence, entry)]
        if sequence.is_scored:
            assert sequence.slot is not None
            scored = job.prompt[scored_positions(entry.position, end)]
            alternatives = max(sequence.slot.alternatives, job.prompt_alternatives or 0)  # slots keep no packed rows
            if job.reported_at is None:
                queries += [ScoreQuery(token, alternatives, job.reported) for token in scored]
            else:
                ids = job.reported_at.prompt[scored_positions(entry.position, end)]
                queries += [ScoreQuery(token, 0, each) for token, each in zip(scored, ids, strict=True)]
        if len(queries) < entry.outputs:
            started = sequence.job_state.started
            samples = [sequence.sample] if started else range(job.samples if job.max_tokens else 0)
            queries.append(self._grammars.query(sequence, samples) if end == sequence.length else None)
        return queries

    def _update_prefill_speed(self, batch: ForwardBatch, seconds: float) -> None:
        """Adapt the measured prefill speed: down at once, because running sequences wait for prefill; up slowly.

        Passes of fewer than `MIN_CHUNK` tokens are ignored once a speed is known: fixed costs dominate their time.
        """
        tokens = sum(len(entry.tokens) for entry in batch.entries) if len(batch.entries[0].tokens) > 1 else 1
        if seconds > 0 and (tokens >= MIN_CHUNK or (tokens > 1 and self._prefill_speed is None)):
            speed = tokens / seconds
            self._prefill_speed = (
                speed if self._prefill_speed is None else min(speed, 0.75 * self._prefill_speed + 0.25 * speed)
            )

    def _postprocess(
        self, entry: BatchEntry, sequence: Sequence, found: list[list[Token]], builder: StepBuilder
    ) -> None:
        job = sequence.job_state.job
        scores: list[Token] = []
        if sequence.is_scored:
            following = len(job.prompt[scored_positions(entry.position, entry.position + len(entry.tokens))])
            scores = [token for tokens in found[:following] for token in tokens]
        unsent = self._scheduler.computed(entry, sequence, scores)
        builder.scored.extend(limit_alternatives(unsent, job.prompt_alternatives or 0))
        if sequence.computed < sequence.length or not found:
            return
        if not found[-1] and job.max_tokens:
            self._end_complete(sequence, builder)
        elif sequence.job_state.started:
            if not self._append([sequence], found[-1], builder):
                self._scheduler.end(sequence)
        else:
            self._first_tokens(sequence, found[-1], builder)

    def _end_complete(self, sequence: Sequence, builder: StepBuilder) -> None:
        """End a sample whose text is complete by its grammar; before the first token, all samples of the job."""
        if sequence.job_state.started:
            builder.ended.append((sequence.sample, "stop"))
            self._scheduler.end(sequence)
            return
        builder.ended.extend((sample, "stop") for sample in range(sequence.job_state.job.samples))
        self._grammars.forget(sequence.job_state.job_id)
        self._scheduler.begin(sequence, [])

    def _verified(self, entry: BatchEntry, sequence: Sequence, found: list[list[Token]], builder: StepBuilder) -> None:
        """Append the confirmed tokens of a verification, and remove the others from the slot."""
        self._last_pass = msgspec.structs.replace(
            self._last_pass, drafted_tokens=entry.outputs - 1, accepted_tokens=len(found) - 1
        )
        self._scheduler.computed(entry, sequence, [])
        # A loop ends the sample before the last confirmed token.
        continues = all(self._append([sequence], tokens, builder) for tokens in found)
        assert sequence.slot is not None
        self._slots.truncate(sequence.slot, sequence.length - 1)
        if not continues:
            self._scheduler.end(sequence)

    def _first_tokens(self, first: Sequence, tokens: list[Token], builder: StepBuilder) -> None:
        """Start the samples of a complete prompt. The first tokens of all samples come from the same logits row."""
        state = first.job_state
        if state.job.max_tokens == 0:
            builder.ended.extend((sample, "length") for sample in range(state.job.samples))
            self._scheduler.begin(first, [])
            return
        known = first.known_repetitions()
        phrases = BannedPhrases.of(state.job, self._pieces, self._automata)
        samples = [
            Sequence(
                state,
                index,
                drafts=each,
                repetitions=known.copy() if known else None,
                held=HeldTokens(phrases, state.job) if phrases else None,
            )
            for index, each in enumerate(self._drafter.drafts(state.job))
        ]
        self._grammars.start_samples(state.job_id, samples)
        self._scheduler.begin(first, self._append(samples, tokens, builder))

    def _append(self, samples: list[Sequence], tokens: list[Token], builder: StepBuilder) -> list[Sequence]:
        """Append the next token to each sample of a job. Returns the samples that continue."""
        for sequence, token in zip(samples, tokens, strict=True):
            sequence.append(token.id)
            if sequence.held and (count := sequence.held.append(token)):
                builder.take_back(sequence, count)
                self._grammars.take_back(sequence, count - 1)  # the last token was not noted yet
                self._scheduler.rewind(sequence)
            else:
                builder.add_token(sequence, token, self._end_reason(sequence, token.id))
        ended = {sample for sample, _ in builder.ended}
        return [sequence for sequence in samples if sequence.sample not in ended]

    def _end_reason(self, sequence: Sequence, token: int) -> FinishReason | None:
        """Why a sample ends with its last token. Stop strings are matched in the server process."""
        job = sequence.job_state.job
        if token in job.end_tokens or self._grammars.append(sequence, token):
            return "stop"
        if len(sequence.generated) == job.max_tokens:
            return "length"
        detection = job.repetition_detection if len(sequence.generated) >= job.min_tokens else None
        return "repetition" if detection and ends_in_loop(sequence.generated, detection) else None
