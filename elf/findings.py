# SPDX-License-Identifier: GPL-3.0-only
"""Findings: what the figures say of a path, as data. Each kind of finding has its wording in its class.

findings_on() looks at a destination; PathRewrites collects what routers change in the packets' headers.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Callable, ClassVar, Iterable, Iterator

from elf.paths import Destination, Hop, Outage
from elf.rows import Record

ENOUGH_PROBES = 20  # to a hop, from which on its share of answers counts
UNANSWERED_MIN, UNANSWERED_SHARE_MIN = 3, 0.005  # fewer unanswered probes are not reported
TCP_AGREES_FROM = 1 / 10
SENDS_FROM = 1 / 2  # share of probes with new data of TCP, from which on its retransmissions tell of loss
OFTEN = 1 / 4  # changes per answer from which on a hop alternates
SOURCE_TRANSLATED, NUMBER_TRANSLATED = 1, 2  # enum translation of elfprobe.c
NEARLY_ALL = 9 / 10  # of the answers
REWRITES_MAX = 1000  # findings that PathRewrites keeps


@dataclasses.dataclass(frozen=True)
class Finding:
    """What was found at a hop."""

    kind: ClassVar[str]  # its name in FILEBASE.json
    hop: int

    def text(self) -> str:
        """Return the sentence for the user."""
        raise NotImplementedError

    def figures(self) -> dict[str, Any]:
        """Return what the sentence says, by name."""
        fields = (field.name for field in dataclasses.fields(self))
        return {name: getattr(self, name) for name in fields if name not in ("hop", "dest")}

    def span(self) -> tuple[int, int] | None:
        """Return from when until when it was so (CLOCK_MONOTONIC, ns), None for the whole run."""
        return None


@dataclasses.dataclass(frozen=True)
class HopOutage(Finding):
    """The hop did not answer for a while."""

    kind = "outage"
    outage: Outage

    def figures(self) -> dict[str, Any]:
        return {"seconds": self.outage.seconds, "ends_path": self.outage.ends_path}

    def span(self) -> tuple[int, int]:
        return self.outage.begin * 10**9, (self.outage.begin + self.outage.seconds) * 10**9

    def text(self) -> str:
        when = f"for {self.outage.seconds} s from {self.outage.begin} s on (CLOCK_MONOTONIC)"
        if self.outage.ends_path:
            return f"from hop {self.hop} on there was no answer {when}"
        return f"hop {self.hop} was unresponsive {when}, but not those behind it"


@dataclasses.dataclass(frozen=True)
class Unanswered(Finding):
    """A share of the probes to the hop is not answered."""

    share: float

    def _start(self) -> str:
        return f"{self.share:.1%} of the probes to hop {self.hop} are not answered"


@dataclasses.dataclass(frozen=True)
class RateLimit(Unanswered):
    """The hop limits the rate of its answers: clearly more probes are answered by a hop behind it."""

    kind = "rate_limit"
    behind: int  # the hop with most answers
    answered_behind: float  # its share

    def text(self) -> str:
        return (
            f"hop {self.hop} limits the rate of its answers: {self._start()}, but "
            f"{self.answered_behind:.1%} of those that pass it on their way to hop {self.behind}"
        )


@dataclasses.dataclass(frozen=True)
class TooFewBehind(Unanswered):
    """The hop behind with most answers differs too little for its number of probes."""

    kind = "too_few_behind"
    behind: int
    probes_behind: int
    unanswered_behind: int

    def text(self) -> str:
        missing = f"of {self.probes_behind} probes to hop {self.behind} {self.unanswered_behind} are not answered"
        return f"{self._start()}; {missing}: the difference is too small to tell why"


@dataclasses.dataclass(frozen=True)
class UnansweredWithTcp(Unanswered):
    """Only TCP's retransmissions hint at the reason, if probes rode on TCP that sends data."""

    retransmitted: int | None  # segments; None: no probe rode on TCP that mostly sends
    tcp_agrees: bool  # TCP loses about as large a share of its segments: see tcp_on_loss()

    def _tcp(self) -> str:
        if self.retransmitted is None:
            return ""
        if self.tcp_agrees:
            return f"; TCP retransmitted {self.retransmitted} segments"
        few = f"only {self.retransmitted}" if self.retransmitted else "no"
        return (
            f"; but TCP retransmitted {few} segments, so rather answers are limited, or an ACK filter ends probes"
        )


@dataclasses.dataclass(frozen=True)
class NoneBehind(UnansweredWithTcp):
    """No hop behind answers enough probes, so nothing tells loss from a limit."""

    kind = "none_behind"

    def text(self) -> str:
        return f"{self._start()}: no hop behind it tells whether it loses packets{self._tcp()}"


@dataclasses.dataclass(frozen=True)
class Loss(UnansweredWithTcp):
    """Probes to the hops behind it are unanswered as often."""

    kind = "loss"

    def text(self) -> str:
        but = self._tcp() or ", unless all of them limit their answers"
        return (
            f"packets are lost at hop {self.hop} or on the way to it: {self._start()}, and not clearly "
            f"fewer to those behind it{but}"
        )


@dataclasses.dataclass(frozen=True)
class ResponderChanges(Finding):
    """Within a flow, another router answered than before."""

    kind = "responder_changes"
    changes: int
    responders: int
    alternates: bool

    def text(self) -> str:
        if self.alternates:
            return f"hop {self.hop} is {self.responders} routers in turn, within the same flow"
        return f"hop {self.hop} changed {'once' if self.changes == 1 else f'{self.changes} times'}"


@dataclasses.dataclass(frozen=True)
class OneAddress(Finding):
    """The same address answers at several hops."""

    kind = "one_address"
    responder: str
    hops: tuple[int, ...]

    def text(self) -> str:
        *first, last = map(str, self.hops)
        return (
            f"{self.responder} answers at hops {', '.join(first)} and {last}: routers behind a translator have its "
            "address (NAT64, CLAT), or packets go round in a loop"
        )


@dataclasses.dataclass(frozen=True)
class OfDestination(Finding):
    """A finding that knows what it is about, and who answered at the hop."""

    dest: str
    responder: str


@dataclasses.dataclass(frozen=True)
class PathRewrite(OfDestination):
    """A router in front of the hop changed the packets' headers."""

    kind = "rewrite"
    what: str

    def text(self) -> str:
        return f"to {self.dest}: {self.what} before hop {self.hop} ({self.responder})"


@dataclasses.dataclass(frozen=True)
class NearMiss(OfDestination):
    """Answers quote a probed TCP flow, but no probe. They may be the hop's."""

    kind = "near_miss"
    answers: int

    def text(self) -> str:
        return (
            f"to {self.dest}: {self.answers} time exceeded from {self.responder} quote a probed flow, but the TCP "
            f"sequence number of no probe: something changes the numbers before hop {self.hop} or behind it"
        )


def findings_on(destination: Destination) -> Iterator[Finding]:
    """Yield the findings on a destination: outages, unanswered probes, changes of responders."""
    outages = destination.outages()
    answering = {number: hop for number, hop in sorted(destination.hops.items()) if hop.latency.count}
    for number in answering:
        yield from outages_to_tell(number, outages)
    yield from unanswered(destination, {
        number: hop for number, hop in answering.items() if hop.probes >= ENOUGH_PROBES
    }, outages)  # fmt: skip
    for number, hop in answering.items():
        if hop.changes:
            alternates = hop.changes > OFTEN * hop.latency.count
            yield ResponderChanges(number, hop.changes, len(hop.responders), alternates)
    yield from shared_responders(answering)


def outages_to_tell(number: int, outages: dict[int, list[Outage]]) -> Iterator[HopOutage]:
    """Yield a hop's outages, without those that an outage of a nearer hop explains."""
    nearer = [outage for other in outages if other < number for outage in outages[other] if outage.ends_path]
    for outage in outages[number]:
        if not (outage.ends_path and any(outage.overlaps(other) for other in nearer)):
            yield HopOutage(number, outage)


def unanswered(
    destination: Destination, hops: dict[int, Hop], outages: dict[int, list[Outage]]
) -> Iterator[Unanswered]:
    """Yield where probes are unanswered and why, as far as hops behind and TCP tell.

    A hop with an outage is skipped: the outage explains its unanswered probes. Loss at a hop also shows at the
    hops behind it, so these are named only if they are clearly worse.
    """
    lossy: Hop | None = None
    for number, hop in hops.items():
        share = hop.unanswered_share
        if hop.unanswered < UNANSWERED_MIN or share < UNANSWERED_SHARE_MIN or outages[number]:
            continue
        behind = [item for item in hops.items() if item[0] > number and not outages[item[0]]]
        best, other = min(behind, key=lambda item: item[1].unanswered_share, default=(0, hop))
        if hop.is_clearly_worse_than(other):
            yield RateLimit(number, share, best, 1 - other.unanswered_share)
        elif lossy is None or hop.is_clearly_worse_than(lossy):
            lossy = hop
            if not behind:
                yield NoneBehind(number, share, *tcp_on_loss(destination, share))
            elif other.unanswered_share < share / 2:
                yield TooFewBehind(number, share, best, other.probes, other.unanswered)
            else:
                yield Loss(number, share, *tcp_on_loss(destination, share))


def tcp_on_loss(destination: Destination, share: float) -> tuple[int | None, bool]:
    """Return how many segments TCP retransmitted, and whether that agrees with a share of loss.

    It agrees from TCP_AGREES_FROM of the share on: unanswered probes include those whose answer was lost. None: no
    TCP, or TCP that mostly receives. It has nothing to retransmit, whatever is lost.
    """
    probes, retransmitted = destination.tcp_probes, destination.retransmitted
    sends = destination.tcp_advances > probes * SENDS_FROM
    return (retransmitted if sends else None), retransmitted >= share * probes * TCP_AGREES_FROM


def shared_responders(hops: dict[int, Hop]) -> Iterator[OneAddress]:
    """Yield the addresses that give nearly all answers of several hops."""
    by_address: dict[str, list[int]] = {}
    for number, hop in hops.items():
        (address, count), *_ = hop.responders.most_common(1)
        if count > NEARLY_ALL * hop.latency.count:
            by_address.setdefault(address, []).append(number)
    for address, numbers in by_address.items():
        if len(numbers) > 1:
            yield OneAddress(numbers[0], address, tuple(numbers))


class PathRewrites:
    """Collects the header changes that quoted packets show, each with the nearest hop that quotes it."""

    def __init__(self) -> None:
        self._nearest: dict[tuple[str, str], PathRewrite] = {}  # by destination and change
        self.near_misses: Callable[[], Iterable[NearMiss]] = tuple

    def note(self, probe: Record) -> None:
        """Note the changes that the reply to a probe shows."""
        if probe.intos != probe.outtos:
            self._note_change(probe, f"DSCP/ECN {probe.outtos:#04x} becomes {probe.intos:#04x}")
        if probe.translated & SOURCE_TRANSLATED:
            self._note_change(probe, "the source address is translated")
        if probe.translated & NUMBER_TRANSLATED:
            self._note_change(probe, "the TCP sequence numbers are changed")

    def _note_change(self, probe: Record, what: str) -> None:
        found = self._nearest.get((probe.dest, what))
        if found is None and len(self._nearest) >= REWRITES_MAX:
            return
        if found is None or probe.outttl < found.hop:
            self._nearest[probe.dest, what] = PathRewrite(probe.outttl, probe.dest, probe.responder, what)

    def findings(self) -> Iterator[OfDestination]:
        yield from (finding for _, finding in sorted(self._nearest.items()))
        yield from self.near_misses()
