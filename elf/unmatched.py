# SPDX-License-Identifier: GPL-3.0-only
"""Time exceeded that quote a flow, but the TCP sequence number of no probe: what does a middlebox add to it?

Some firewalls and NATs add a random constant to all sequence numbers of a connection, so that nobody can guess
them. Routers behind quote the changed number. The constant is the difference between a quoted number and the
probe's. So it is the one that the differences of several answers have in common.
"""

from __future__ import annotations

import collections
from typing import Iterable, Iterator, NamedTuple

from elf.findings import NearMiss
from elf.summary import FlowKey, Summary

ENOUGH_ANSWERS = 2  # that one constant must explain
ANSWERS_KEPT = 16  # of a flow
FLOWS_MAX = 1024
OFFSET_MIN = 1 << 16  # a second answer to a probe differs by less from the probes that followed
SEQUENCE_NUMBERS = 1 << 32


class Unmatched(NamedTuple):
    """A time exceeded that quotes no probe."""

    number: int  # as quoted
    ip_id: int  # IP identification (IPv6: low bits of the flow label), as quoted
    recvtime: int  # CLOCK_MONOTONIC, ns, as all times here
    responder: str
    result: bytes  # struct result, without the probe


class Sent(NamedTuple):
    """A probe in flight."""

    number: int
    ip_id: int
    sendtime: int
    key: bytes  # struct probe_key
    probe: bytes  # struct probe

    def may_be_quoted_by(self, answer: Unmatched) -> bool:
        """Return whether all but the sequence number fits. Who does not see the probes cannot forge the rest."""
        return self.ip_id == answer.ip_id and self.sendtime < answer.recvtime


def find_offset(answers: Iterable[Unmatched], probes: Iterable[Sent], known: int) -> int:
    """Return the constant between quoted numbers and probes that explains most answers, 0 if it is not certain.

    known is the constant that does not explain these answers.
    """
    votes = collections.Counter(
        (answer.number - probe.number) % SEQUENCE_NUMBERS
        for answer in answers
        for probe in probes
        if probe.may_be_quoted_by(answer)
    )
    best = votes.most_common(2)
    if not best or best[0][1] < ENOUGH_ANSWERS or best[0][1] == (best[1][1] if len(best) > 1 else 0):
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

    def note(self, flow: FlowKey, answer: Unmatched) -> None:
        """Keep an answer. That of a router which answers this flow is a second copy, or came too late."""
        if flow not in self._offsets and self._summary.answers(flow, answer.responder):
            return
        key = flow, answer.responder
        if key in self._counts or len(self._counts) < FLOWS_MAX:
            self._counts[key] += 1
        if len(self._waiting) < FLOWS_MAX:
            answers = self._waiting.setdefault(flow, {})
            if len(answers) < ANSWERS_KEPT:
                answers[answer.number] = answer

    def flows(self) -> set[FlowKey]:
        """Return the flows of which answers wait."""
        return set(self._waiting)

    def match(self, flow: FlowKey, probes: dict[int, Sent]) -> Iterator[tuple[Sent, int, Unmatched]]:
        """Yield the probes in flight that waiting answers quote, each with its constant and answer.

        probes are the flow's, by number.
        """
        answers = self._waiting[flow]
        known = self._offsets.get(flow, 0)
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
        """Forget answers from before a time. Their probes are no longer in flight."""
        for flow, answers in list(self._waiting.items()):
            for number in [number for number, answer in answers.items() if answer.recvtime < before]:
                del answers[number]
            if not answers:
                del self._waiting[flow]

    def findings(self) -> Iterator[NearMiss]:
        """Yield the answers to probed flows that stayed unexplained."""
        found: collections.Counter[tuple[str, int, str]] = collections.Counter()
        for (flow, responder), count in self._counts.items():
            hop = self._summary.first_silent_hop(flow)
            if hop and not self._summary.answers(flow, responder):
                found[flow[0], hop, responder] += count
        for (dest, hop, responder), count in sorted(found.items()):
            yield NearMiss(hop, dest, responder, count)
