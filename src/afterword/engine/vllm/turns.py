"""Decides which waiting sample is handed to vLLM next. Pure.

vLLM gets at most as many samples as it computes together, so that a waiting client's first sample is next as soon as
one ends. The clients take turns by the rules of `core.fair_share`, without preemption; the samples of one client are in
order of arrival.
"""

from __future__ import annotations

from afterword.engine.core.fair_share import FairShare


class Turns:
    """The waiting samples, and how many samples of each client vLLM has. `sequences`: the most that it gets."""

    def __init__(self, sequences: int) -> None:
        self.running = 0
        self._sequences = sequences
        self._shares = FairShare(sequences)
        self._waiting: dict[str, dict[int, list[int]]] = {}  # by client and job: samples, in order
        self._taken = 0

    @property
    def waiting(self) -> int:
        """How many samples wait."""
        return sum(len(samples) for jobs in self._waiting.values() for samples in jobs.values())

    def add(self, client: str, job_id: int, samples: list[int]) -> None:
        """Add samples of a job, behind those of the client's other jobs."""
        if samples:
            self._waiting.setdefault(client, {}).setdefault(job_id, []).extend(samples)

    def remove(self, client: str, job_id: int) -> list[int]:
        """Remove a job's waiting samples, and return them."""
        jobs = self._waiting.get(client, {})
        samples = jobs.pop(job_id, [])
        if not jobs:
            self._waiting.pop(client, None)
        return samples

    def discard(self, client: str, job_id: int, sample: int) -> None:
        """Remove one waiting sample of a job. The job's other samples keep their place."""
        samples = self._waiting.get(client, {}).get(job_id, [])
        if sample in samples:
            samples.remove(sample)
            if not samples:
                self.remove(client, job_id)

    def take(self) -> tuple[int, int] | None:
        """The job id and the number of the sample that is next, which counts as running now; None if none may run."""
        if self.running >= self._sequences:
            return None
        self._shares.set_waiting(self._waiting, self._taken)
        order = self._shares.order(has_free_slot=True)
        if not order:
            return None
        client = order[0]
        job_id, samples = next(iter(self._waiting[client].items()))
        sample = samples.pop(0)
        if not samples:
            self.remove(client, job_id)
        self._shares.served(client)
        self._shares.acquire(client)
        self._taken += 1
        self.running += 1
        return job_id, sample

    def release(self, client: str) -> None:
        """Note that a running sample of a client has ended."""
        self._shares.release(client)
        self.running -= 1
