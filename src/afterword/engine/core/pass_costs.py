"""What forward passes cost by their number of tokens, as measured in this process. Pure: durations are arguments."""

from __future__ import annotations

_RISE = 1.1  # how much a cost can rise with one pass: another program may have delayed that pass
_FADE = 0.999  # by how much a cost seems to fall when no pass is made because of it, so that it is measured again


class PassCosts:
    """Seconds for each token of passes that compute a logits row for every token.

    Passes of similar size count as one: 1, 2 to 3, 4 to 7 tokens and so on.
    """

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}  # for each token, by the bit length of the number of tokens
        self._faded: dict[int, float] = {}  # factors of these, since the last pass

    def record(self, tokens: int, seconds: float) -> None:
        """Record a pass. Costs fall at once and rise slowly."""
        size, cost = tokens.bit_length(), seconds / tokens
        self._seconds[size] = min(cost, self._seconds[size] * _RISE) if self._seconds.get(size) else cost
        self._faded[size] = 1.0

    def of(self, tokens: int) -> float | None:
        """Seconds for each token of a pass; None if no similar pass was made."""
        size = tokens.bit_length()
        return self._seconds[size] * self._faded[size] if size in self._seconds else None

    def is_fresh(self, tokens: int) -> bool:
        """Whether the last pass of this size was made more recently than any was left out because of its cost."""
        return self._faded.get(tokens.bit_length()) == 1.0

    def fade(self, tokens: int) -> None:
        """Note that a pass of this size was not made because of its cost."""
        size = tokens.bit_length()
        if size in self._faded:
            self._faded[size] *= _FADE
