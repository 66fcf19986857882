# SPDX-License-Identifier: GPL-3.0-only
"""The figures of a path: latencies, responders and outages of each hop, and what TCP measured."""

from __future__ import annotations

import collections
import math
from typing import Any, NamedTuple

from elf.episodes import Comparisons, Watch
from elf.histogram import BucketCounts, Differences, LatencyHistogram

SIGNIFICANT = 3  # standard errors by which two shares must differ
OUTAGE_MIN = 3  # s: an outage is longer, and another hop answers in more seconds of it
OUTAGE_CHANCE = 1e-4  # if unanswered probes in a row are more likely than this by chance, they are no outage
PROBED_AFTER = 2  # s after the last answer: of a path that became shorter, all probes have left before
OUTAGES_MAX = 5  # of a hop, that are kept
PAUSES_MAX = 100  # of a hop, which may still turn out to be outages
RESPONDERS_MAX = 64  # of a hop, that are told apart
SENDS_FROM = 1 / 2  # share of TCP probes whose carriers had new data, above which retransmissions tell of loss


class Outage(NamedTuple):
    """A time in which a hop did not answer probes, but the next hop that answers, in front or behind, did."""

    begin: int  # s, CLOCK_MONOTONIC
    seconds: int
    ends_path: bool  # the hops behind did not answer, either

    def overlaps(self, other: Outage) -> bool:
        return self.begin < other.begin + other.seconds and other.begin < self.begin + self.seconds


class Hop:
    """The probes with one TTL to one destination that have ended."""

    __slots__ = (
        "latency", "added", "unanswered", "responder", "_others", "changes", "outages", "active_seconds",
        "last_second", "unanswered_until", "_pauses", "_neighbours_active",
    )  # fmt: skip

    def __init__(self) -> None:
        self.latency = LatencyHistogram()
        self.added = Differences()  # from the latency of the last hop in front that answers
        self.unanswered = 0
        self.responder = ""  # the first one; all of latency is its, but for what is in _others
        self._others: dict[str, BucketCounts] = {}  # by responder; "": of those above RESPONDERS_MAX
        self.changes = 0  # how often a flow's responder changed
        self.outages: list[Outage] = []  # those that are over
        self.active_seconds = 0  # seconds in which at least one probe left that was answered
        self.last_second = 0  # the last of them
        self.unanswered_until = 0  # s, when the newest unanswered probe left
        self._pauses: list[Outage] = []  # without an answer; no unanswered probe is known
        self._neighbours_active = 0, 0  # active_seconds of the hops in front and behind, in last_second

    @property
    def probes(self) -> int:
        return self.latency.count + self.unanswered

    def note_other(self, responder: str, latency: int) -> None:
        """Note who answered with this latency, if it is not self.responder."""
        if not self.responder:
            self.responder = responder
            return
        if responder not in self._others and len(self._others) >= RESPONDERS_MAX - 1:
            responder = ""
        self._others.setdefault(responder, BucketCounts()).add(latency)

    def note_answers(self, responder: str, latencies: Any) -> None:
        """Do what note_other() does for each latency of an array of numpy."""
        self.responder = self.responder or responder
        if responder == self.responder:
            return
        if responder not in self._others and len(self._others) >= RESPONDERS_MAX - 1:
            responder = ""
        self._others.setdefault(responder, BucketCounts()).add_all(latencies)

    @property
    def responders(self) -> collections.Counter[str]:
        """How often each responder answered."""
        if not self.responder:
            return collections.Counter()
        others = {responder: sum(its.counts) for responder, its in self._others.items()}
        first = self.latency.count - sum(others.values())
        others.pop("", None)
        return collections.Counter({self.responder: first, **others})

    def by_responder(self) -> dict[str, BucketCounts]:
        """Return the latencies of each responder."""
        if not self.responder:
            return {}
        first = self.latency.buckets()
        for other in self._others.values():
            first = first.without(other)
        return {self.responder: first, **{who: its for who, its in self._others.items() if who}}

    @property
    def unanswered_share(self) -> float:
        return self.unanswered / self.probes

    def may_be_chance(self, seconds: int) -> bool:
        """Return whether a time without answers may be chance, given the share of unanswered probes. seconds: s."""
        probes = self.probes / max(self.active_seconds, 1) * seconds
        return bool(self.unanswered_share**probes > OUTAGE_CHANCE)

    def is_clearly_worse_than(self, other: Hop) -> bool:
        """Return whether significantly more probes are unanswered here: a test of two proportions."""
        pooled = (self.unanswered + other.unanswered) / (self.probes + other.probes)
        error = math.sqrt(pooled * (1 - pooled) * (1 / self.probes + 1 / other.probes))
        return self.unanswered_share - other.unanswered_share > SIGNIFICANT * error

    def note_second(self, second: int, front: Hop | None, behind: Hop | None) -> None:
        """Note that an answered probe left in a later second than the last one.

        front and behind are the nearest hops that answer.
        """
        pause = self._pause_until(second, front, behind)
        if pause and self.unanswered_until >= pause.begin + PROBED_AFTER:
            self._keep(pause)
        elif pause and len(self._pauses) < PAUSES_MAX:
            self._pauses.append(pause)
        self.last_second = second
        self.active_seconds += 1
        self._neighbours_active = active_seconds(front), active_seconds(behind)

    def note_unanswered(self, second: int) -> None:
        """Note that an unanswered probe left in a later second than the last one. Its row comes seconds later."""
        self.unanswered_until = second
        while self._pauses and self._pauses[0].begin + PROBED_AFTER <= second:
            pause = self._pauses.pop(0)
            if second < pause.begin + pause.seconds:
                self._keep(pause)

    def _keep(self, outage: Outage) -> None:
        if len(self.outages) < OUTAGES_MAX:
            self.outages.append(outage)

    def outage_until(self, second: int, front: Hop | None, behind: Hop | None) -> Outage | None:
        """Return the outage from this hop's last answer until that second, None if there is none."""
        if self.unanswered_until < self.last_second + PROBED_AFTER:
            return None  # the path may have become shorter: nothing was sent to the hop
        return self._pause_until(second, front, behind)

    def _pause_until(self, second: int, front: Hop | None, behind: Hop | None) -> Outage | None:
        seconds = second - self.last_second
        if not self.active_seconds or seconds <= OUTAGE_MIN:
            return None
        front_before, behind_before = self._neighbours_active
        front_since = active_seconds(front) - front_before
        behind_since = active_seconds(behind) - behind_before
        if max(front_since, behind_since) <= OUTAGE_MIN:
            return None
        return Outage(self.last_second, seconds, behind_since <= OUTAGE_MIN)


def active_seconds(hop: Hop | None) -> int:
    """Return the hop's active seconds, 0 where there is no hop."""
    return hop.active_seconds if hop else 0


class Destination:
    """The hops on the path to a destination, by TTL, and what TCP says of the flows to it."""

    def __init__(self, tests: Comparisons | None = None) -> None:
        self.hops: dict[int, Hop] = {}
        self.srtt = LatencyHistogram()
        self.retransmitted = 0  # segments, by each probed flow since its first probe
        self.retransmitted_before = 0  # by flows that had begun before that
        self.cwnd = 0  # segments, of the flow with the newest probe on TCP
        self.tcp_probes = 0
        self.tcp_advances = 0  # of these, those whose flow had sent data since the probe before
        self._lately = 0.0  # as of the last probes_lately()
        self._probes_before = 0  # then
        self.last_second = 0  # in which the newest probe left, CLOCK_MONOTONIC
        self.watch = Watch(tests or Comparisons())

    @property
    def probes(self) -> int:
        return sum(hop.probes for hop in self.hops.values())

    def probes_lately(self) -> float:
        """Return a decaying count of probes: each call counts the new ones, and halves the count before."""
        probes = self.probes
        self._lately = self._lately / 2 + probes - self._probes_before
        self._probes_before = probes
        return self._lately

    def note_second(self, second: int) -> None:
        """Note that a probe left in this second."""
        self.last_second = max(self.last_second, second)
        self.srtt.limit()

    @property
    def tcp_sends(self) -> bool:
        """Whether the flows mostly send: a receiver has nothing to retransmit, and measures no round trip."""
        return self.tcp_advances > self.tcp_probes * SENDS_FROM

    def neighbours(self, number: int) -> tuple[Hop | None, Hop | None]:
        """Return the nearest hops that answer: in front of this one, and behind it."""
        front = behind = 0
        for other, hop in self.hops.items():
            if not hop.active_seconds:
                continue
            if front < other < number:
                front = other
            elif number < other and (not behind or other < behind):
                behind = other
        return self.hops.get(front), self.hops.get(behind)

    def front(self, number: int) -> int:
        """Return the number of the last hop in front of this one that answers, 0 if there is none."""
        for front in range(number - 1, 0, -1):
            hop = self.hops.get(front)
            if hop and hop.responder:
                return front
        return 0

    def adds(self, number: int) -> float | None:
        """Return what the link in front of a hop that answers adds, ns: the median. None: not known.

        It is the whole latency if no hop in front answers.
        """
        hop = self.hops[number]
        if hop.added.count:
            return hop.added.median()
        return None if self.front(number) else hop.latency.stats().median

    def outages(self) -> dict[int, list[Outage]]:
        """Return the outages by hop, including those that still last."""
        found = {}
        for number, hop in self.hops.items():
            lasting = hop.outage_until(self.last_second, *self.neighbours(number))
            every = [*hop.outages, lasting] if lasting else hop.outages
            found[number] = [outage for outage in every if not hop.may_be_chance(outage.seconds)]
        return found
