# SPDX-License-Identifier: GPL-3.0-only
"""Time exceeded that quote a flow, but the TCP sequence number of no probe: what does a middlebox add to it?

Some firewalls and NATs add a random constant to all sequence numbers of a connection, so that nobody can guess
them. Routers behind quote the changed number. The constant is the difference between a quoted number and the
probe's. So it is the one that the differences of several answers have in common, or the only difference that there
is.
"""

from __future__ import annotations

import collections
from typing import Iterable, Iterator, NamedTuple

from elf.findings import AckFilter, NearMiss, OfDestination
from elf.summary import FlowKey, Summary

ENOUGH_ANSWERS = 2  # that one constant must explain, unless there is one answer and it can quote one probe only
# So many overwritten probes tell an ACK filter, or two that are apart. In a routing loop, bare ACKs end at routers,
# too, but for a moment, and mostly at routers that have answered.
ENOUGH_OVERWRITTEN = 3
OVERWRITTEN_APART, OVERWRITTEN_WITHIN = 5 * 10**8, 60 * 10**9  # ns
BARE_LENGTH_MAX = 120  # of IP and TCP headers, bytes
ANSWERS_KEPT = 16  # of a flow
FLOWS_MAX = 1024
OFFSET_MIN = 1 << 16  # a second answer to a probe differs by less from the probes that followed
SEQUENCE_NUMBERS = 1 << 32


class Unmatched(NamedTuple):
    """A time exceeded that quotes no probe."""

    number: int  # as quoted
    ip_id: int  # IP identification (IPv6: low bits of the flow label), as quoted
    length: int  # IP total length, as quoted
    recvtime: int  # CLOCK_MONOTONIC, ns, as all times here
    responder: str
    result: bytes  # struct result, without the probe
    is_copy: bool = False  # of a router that answers this flow: perhaps a second copy, or too late


class Sent(NamedTuple):
    """A probe in flight."""

    number: int
    carrier: int  # TCP sequence number of the packet that it was cloned from
    ip_id: int
    sendtime: int
    hop: int  # its TTL
    key: bytes  # struct probe_key
    probe: bytes  # struct probe

    def may_be_quoted_by(self, answer: Unmatched) -> bool:
        """Return whether the answer fits this probe, but for the sequence number.

        A host that does not see the probes cannot forge the identification.
        """
        return self.ip_id == answer.ip_id and self.sendtime < answer.recvtime

    def is_overwritten(self, answer: Unmatched, offset: int) -> bool:
        """Return whether an answer quotes the IP header of this probe, but the application's bare ACK behind it.

        An ACK filter that goes by length wrote the ACK into the probe that waited in its queue.
        """
        number = (self.carrier + offset) % SEQUENCE_NUMBERS
        is_bare = answer.length <= BARE_LENGTH_MAX
        return is_bare and self.number != self.carrier and answer.number == number and self.may_be_quoted_by(answer)


class Overwritten(NamedTuple):
    """A probe into which an ACK filter wrote an acknowledgement: when and from whom its answer came."""

    recvtime: int
    hop: int
    responder: str


def find_offset(answers: Iterable[Unmatched], probes: Iterable[Sent], known: int) -> int:
    """Return the constant between quoted numbers and probes that explains most answers, 0 if it is not certain.

    Each flow has a constant of its own, and a hop that has not been proven is probed seldom, by one flow after the
    other. So a single answer must do where the identification leaves no other probe that it can quote: in IPv4, if
    it is not 0, but not in IPv6, whose flow label is that of all packets of the flow.

    known is the constant that does not explain these answers.
    """
    fitting = [
        (answer, probe)
        for answer in answers
        if not answer.is_copy
        for probe in probes
        if probe.may_be_quoted_by(answer)
    ]
    votes = collections.Counter((answer.number - probe.number) % SEQUENCE_NUMBERS for answer, probe in fitting)
    best = votes.most_common(2)
    is_unique = len(fitting) == 1 and fitting[0][0].ip_id != 0 and ":" not in fitting[0][0].responder
    if not best or (best[0][1] < ENOUGH_ANSWERS and not is_unique):
        return 0
    if len(best) > 1 and best[0][1] == best[1][1]:
        return 0
    difference = (best[0][0] - known) % SEQUENCE_NUMBERS
    return best[0][0] if OFFSET_MIN < difference < SEQUENCE_NUMBERS - OFFSET_MIN else 0


class UnmatchedAnswers:
    """Keeps answers that quote no probe until their flow's constant is known, and counts those that stay."""

    def __init__(self, summary: Summary) -> None:
        self._summary = summary
        self._waiting: dict[FlowKey, dict[int, Unmatched]] = {}  # by flow and quoted number
        self._offsets: dict[FlowKey, int] = {}
        self._counts: collections.Counter[tuple[FlowKey, str]] = collections.Counter()  # by flow and responder
        self._overwritten: dict[str, list[Overwritten]] = {}  # the newest ones, by destination
        self._ack_filters: dict[str, AckFilter] = {}  # by destination

    def note(self, flow: FlowKey, answer: Unmatched) -> None:
        """Keep an answer, and count it.

        An answer of a router that answers this flow is not counted: it may be a second copy, or late.
        """
        key = flow, answer.responder
        is_copy = flow not in self._offsets and self._summary.answers(flow, answer.responder)
        if not is_copy and (key in self._counts or len(self._counts) < FLOWS_MAX):
            self._counts[key] += 1
        if len(self._waiting) < FLOWS_MAX:
            answers = self._waiting.setdefault(flow, {})
            if len(answers) < (ANSWERS_KEPT // 2 if is_copy else ANSWERS_KEPT):
                answers[answer.number] = answer._replace(is_copy=is_copy)

    def flows(self) -> set[FlowKey]:
        """Return the flows of which answers wait."""
        return set(self._waiting)

    def match(self, flow: FlowKey, probes: dict[int, Sent]) -> Iterator[tuple[Sent, int, Unmatched]]:
        """Yield the probes in flight that waiting answers quote, each with its constant and answer.

        probes are the flow's, by number.
        """
        answers = self._waiting[flow]
        known = self._offsets.get(flow, 0)
        for answer in list(answers.values()):
            overwritten = [probe for probe in probes.values() if probe.is_overwritten(answer, known)]
            if overwritten:
                del answers[answer.number]
                for each in [each for each in self._counts if each[0] == flow]:
                    del self._counts[each]
                if not answer.is_copy and flow[0] not in self._ack_filters:
                    # In IPv6 several may fit. None to a hop that answers does, and the newest of the others may.
                    silent = self._summary.first_silent_hop(flow)
                    probe = max(overwritten, key=lambda probe: (probe.hop >= silent, probe.sendtime))
                    found = Overwritten(answer.recvtime, probe.hop, answer.responder)
                    self._overwritten.setdefault(flow[0], []).append(found)
        for is_known in (True, False):
            offset = known if is_known else find_offset(answers.values(), probes.values(), known)
            for answer in list(answers.values()) if offset else ():
                number = (answer.number - offset) % SEQUENCE_NUMBERS
                if number in probes and probes[number].may_be_quoted_by(answer):
                    self._offsets.pop(flow, None)
                    self._offsets[flow] = offset
                    del answers[answer.number]
                    self._explained(flow, answer.responder)
                    yield probes[number], offset, answer
        if len(self._offsets) > FLOWS_MAX:
            del self._offsets[next(iter(self._offsets))]

    def take_ack_filters(self) -> list[AckFilter]:
        """Return the ACK filters that were found since the last call, one for each destination."""
        found = []
        for dest, probes in list(self._overwritten.items()):
            newest = max(probe.recvtime for probe in probes)
            probes[:] = [probe for probe in probes if newest - probe.recvtime < OVERWRITTEN_WITHIN]
            oldest = min(probe.recvtime for probe in probes)
            if len(probes) >= ENOUGH_OVERWRITTEN or newest - oldest >= OVERWRITTEN_APART:
                nearest = min(probes, key=lambda probe: probe.hop)
                found.append(AckFilter(nearest.hop, dest, nearest.responder, len(probes), oldest, newest))
                del self._overwritten[dest]
        self._ack_filters.update((each.dest, each) for each in found)
        return found

    def _explained(self, flow: FlowKey, responder: str) -> None:
        """Count one answer less that stays unexplained."""
        if self._counts[flow, responder] > 1:
            self._counts[flow, responder] -= 1
        else:
            self._counts.pop((flow, responder), None)

    def drop(self, flow: FlowKey) -> None:
        """Forget the answers to a flow that has no probe in flight: strangers' traceroutes, forged messages."""
        for answer in self._waiting.pop(flow).values():
            self._explained(flow, answer.responder)

    def forget(self, before: int) -> None:
        """Forget answers from before a time. Their probes are no longer in flight.

        Signs of ACK filters are kept for longer.
        """
        for flow, answers in list(self._waiting.items()):
            for number in [number for number, answer in answers.items() if answer.recvtime < before]:
                del answers[number]
            if not answers:
                del self._waiting[flow]
        for dest, probes in list(self._overwritten.items()):
            if max(probe.recvtime for probe in probes) < before - OVERWRITTEN_WITHIN:
                del self._overwritten[dest]

    def findings(self) -> Iterator[OfDestination]:
        """Yield the ACK filters, and the answers to probed flows that stayed unexplained."""
        yield from self._ack_filters.values()
        found: collections.Counter[tuple[str, int, str]] = collections.Counter()
        for (flow, responder), count in self._counts.items():
            hop = self._summary.first_silent_hop(flow)
            if hop and not self._summary.answers(flow, responder):
                found[flow[0], hop, responder] += count
        for (dest, hop, responder), count in sorted(found.items()):
            yield NearMiss(hop, dest, responder, count)
