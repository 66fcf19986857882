# SPDX-License-Identifier: GPL-3.0-only
"""Changes of the reverse path: the TTL of a router's answers changes, and the forward path does not.

AnswerTtl       the TTL of the answers of a hop to a flow, moment by moment
ReturnChange    a change of it that stayed
"""

from __future__ import annotations

import dataclasses

STAYS = 10  # moments in a row with the same new TTL, from which on it has changed
TOGETHER = 2 * 10**9  # ns: changes within this time are one
CHANGES_MAX = 100  # of a destination
OFTEN = 8  # changes of a hop, from which on its answers take several reverse paths in turn
INITIAL = 32, 64, 128, 255  # TTLs with which systems send


@dataclasses.dataclass
class ReturnChange:
    """The reverse path of hops has more or fewer routers than before."""

    begin: int  # ns, CLOCK_MONOTONIC
    end: int
    hops: dict[int, tuple[str, int, int]]  # responder, TTL before and after

    @property
    def hop(self) -> int:
        """The nearest hop whose reverse path changed."""
        return min(self.hops)

    @property
    def longer_by(self) -> int:
        """By how many routers the reverse path of the nearest hop became longer; negative: shorter."""
        _, before, after = self.hops[self.hop]
        return before - after


@dataclasses.dataclass
class AnswerTtl:
    """The TTL of the answers of a hop to a flow."""

    __slots__ = ("responder", "ttl", "new", "count", "since")
    responder: str
    ttl: int
    new: int  # another TTL ...
    count: int  # ... for so many moments in a row
    since: int  # ns

    def add(self, ttl: int, sent: int) -> int | None:
        """Add the first answer of a moment. Return the TTL before, if it has changed."""
        if ttl == self.ttl:
            self.count = 0
            return None
        if not self.count or ttl != self.new:
            self.new, self.count, self.since = ttl, 0, sent
        self.count += 1
        if self.count < STAYS:
            return None
        before, self.ttl, self.count = self.ttl, ttl, 0
        return before


class ReturnChanges:
    """The changes of the reverse path for a destination."""

    __slots__ = ("_found", "_counts")

    def __init__(self) -> None:
        self._found: list[ReturnChange] = []
        self._counts: dict[int, int] = {}  # by hop

    def note(self, number: int, responder: str, before: int, after: int, at: int) -> None:
        """Note that a TTL has changed. Flows and hops that change at nearly the same time are one change."""
        if initial(before) != initial(after):
            return  # another system, or another kind of answer
        self._counts[number] = self._counts.get(number, 0) + 1
        for its in self._found:
            known = its.hops.get(number)
            is_near = its.begin - TOGETHER < at < its.end + TOGETHER
            if is_near and (known[1:] == (before, after) if known else its.longer_by == before - after):
                its.begin, its.end = min(its.begin, at), max(its.end, at)
                its.hops.setdefault(number, (responder, before, after))
                return
        if len(self._found) < CHANGES_MAX:
            self._found.append(ReturnChange(at, at, {number: (responder, before, after)}))

    def all(self) -> list[ReturnChange]:
        """Return the changes in the order of time, without hops with several reverse paths in turn."""
        found = []
        for its in self._found:
            hops = {number: each for number, each in its.hops.items() if self._counts[number] < OFTEN}
            if hops:
                found.append(dataclasses.replace(its, hops=hops))
        return sorted(found, key=lambda its: its.begin)


def initial(ttl: int) -> int:
    """Return the TTL with which a packet was most likely sent: the lowest of INITIAL that is not below ttl."""
    return next((each for each in INITIAL if ttl <= each), 255)
