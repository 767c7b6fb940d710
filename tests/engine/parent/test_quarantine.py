"""Tests of the quarantine, with simulated time."""

from __future__ import annotations

from afterword.engine.parent.quarantine import QUARANTINE_SECONDS, Quarantine
from afterword.engine.protocol import Job, Sampling


def test_a_job_is_quarantined_for_an_hour_whatever_its_client():
    quarantine = Quarantine()
    job = Job((1, 2), 1, 5, Sampling(), (), b"k" * 16, client="one")
    other = Job((1, 2), 1, 5, Sampling(), (), b"x" * 16, client="another", namespace="n")
    assert not quarantine.contains(job, 0)
    quarantine.add(job, 0)
    assert quarantine.contains(other, QUARANTINE_SECONDS - 1)
    assert not quarantine.contains(Job((1, 3), 1, 5, Sampling(), (), b"k" * 16), 1)
    assert not quarantine.contains(other, QUARANTINE_SECONDS)


def test_the_quarantine_is_bounded():
    quarantine = Quarantine()
    for number in range(2000):
        quarantine.add(str(number), 0)
    assert not quarantine.contains("0", 1)
    assert quarantine.contains("1999", 1)
