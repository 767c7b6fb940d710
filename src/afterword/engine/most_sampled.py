"""The most tokens that are sampled for a job: the worker stops there, and accounts and limits count with them."""

from __future__ import annotations

from afterword.engine.protocol import Job


def most_sampled(max_tokens: int, takes_back: bool) -> int:
    """The most tokens of one sample, those that are taken back included. `takes_back`: the job has banned texts."""
    return max_tokens + (most_taken_back(max_tokens) if takes_back else 0)


def most_taken_back(max_tokens: int) -> int:
    """A sample ends when more of its tokens than this were taken back.

    Those that are then taken back last and those that stay are at most `max_tokens` together, so `most_sampled` holds.
    """
    return 4 * max_tokens + 8


def most_sampled_for(job: Job) -> int:
    """The most tokens of all samples of a job."""
    return job.samples * most_sampled(job.max_tokens, job.banned_text is not None)
