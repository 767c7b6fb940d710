"""Counts requests and tokens by API key, for the `/metrics` endpoint. The event loop owns the counters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, Metric

OTHER_KEYS = "other"
"""The label of all keys beyond the number that is counted apart. No key has this id."""


class KeyCounters:
    """Requests and tokens by API key, for at most `most` keys. Further keys are counted together as `OTHER_KEYS`."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._names: set[str] = set()
        self._requests: Counter[tuple[str, str]] = Counter()
        self._tokens: Counter[tuple[str, str]] = Counter()

    def add(self, key: str, status: int, prompt_tokens: int = 0, generated_tokens: int = 0) -> None:
        """Count a finished request of a key."""
        if not self._most:
            return
        if len(self._names) < self._most:
            self._names.add(key)
        name = key if key in self._names else OTHER_KEYS
        self._requests[name, f"{status // 100}xx"] += 1
        self._tokens[name, "prompt"] += prompt_tokens
        self._tokens[name, "generated"] += generated_tokens

    def families(self, prefix: str) -> Iterator[Metric]:
        """The counters. They are absent, not empty, if keys are not counted."""
        if not self._most:
            return
        for name, description, labels, counts in (
            ("key_requests", "Finished requests by API key.", ("key", "status"), self._requests),
            ("key_tokens", "Tokens of finished requests by API key.", ("key", "kind"), self._tokens),
        ):
            family = CounterMetricFamily(f"{prefix}{name}", description, labels=labels)
            for values, count in sorted(counts.items()):
                family.add_metric(values, count)
            yield family
