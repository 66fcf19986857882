# SPDX-License-Identifier: GPL-3.0-only
"""Findings: conclusions from the figures of a path, as data. The class of each kind has its wording.

findings_on() yields those on a destination. PathRewrites collects the changes that routers make to headers.
docs/findings.md has the methods.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Callable, ClassVar, Iterable, Iterator, Sequence

from elf.episodes import CHANGE_TOGETHER, CHANGES_MAX, MARGIN, TCP, Change, Episode, Watch
from elf.inference import holm
from elf.losses import NEARLY_ALL as NEARLY_ALL_LOST
from elf.losses import LossEpisode
from elf.paths import PROBED_AFTER, Destination, Hop, Outage
from elf.returns import ReturnChange
from elf.rows import Record

ENOUGH_PROBES = 20  # to a hop, from which on its share of answers counts
UNANSWERED_MIN, UNANSWERED_SHARE_MIN = 3, 0.005  # fewer unanswered probes are not reported
TCP_AGREES_FROM = 1 / 10  # of the loss of probes: TCP agrees if it retransmitted so many segments; tcp_on_loss()
OFTEN = 1 / 4  # changes of the responder per answer, above which a hop alternates
SOURCE_TRANSLATED, NUMBER_TRANSLATED = 1, 2  # enum translation of elfprobe.c
NEARLY_ALL = 9 / 10  # of the answers
REWRITES_MAX = 1000  # findings that PathRewrites keeps
SIGNIFICANT = 0.01  # probability that any of a run's episodes is chance
SHOWN_MAX = 8  # of each sort: episodes of a destination that the table shows, the largest ones
MARKED = "congestion is marked"
ECN, CE = 3, 3  # in the DSCP/ECN byte: mask of the ECN field, its value "congestion experienced" (RFC 3168)
OTHERS_BELOW = 0.3  # upper bound of the rank correlation (97.5 %), below which other flows cause the delay
OWN_FROM = 0.5  # rank correlation from which on the delay follows the flow's own congestion window


@dataclasses.dataclass(frozen=True)
class Finding:
    """What was found at a hop.

    Classes that add no field do without the decorator of dataclasses, because each use of it delays the start.
    """

    kind: ClassVar[str]  # its name in FILEBASE.json
    hop: int

    def text(self) -> str:
        """Return the sentence for the user."""
        raise NotImplementedError

    def figures(self) -> dict[str, Any]:
        """Return the figures of the sentence, by their key in FILEBASE.json."""
        fields = (field.name for field in dataclasses.fields(self))
        return {name: getattr(self, name) for name in fields if name not in ("hop", "dest")}

    def span(self) -> tuple[int, int] | None:
        """Return begin and end (CLOCK_MONOTONIC, ns). None: it is of the whole run."""
        return None

    @property
    def sure(self) -> float | None:
        """The probability that it is not chance. None: it is not computed for this kind."""
        return None


def hop_text(hop: int, responders: dict[int, str]) -> str:
    """Return "hop 3 (192.0.2.1)", or "hop 3" if its responder is not known."""
    responder = responders.get(hop)
    return f"hop {hop} ({responder})" if responder else f"hop {hop}"


@dataclasses.dataclass(frozen=True)
class OfEpisode(Finding):
    """A finding that is an episode."""

    episode: Episode | LossEpisode
    p: float  # probability that it is chance, corrected for the number of tests (Holm)

    def span(self) -> tuple[int, int]:
        return self.episode.begin, self.episode.end

    @property
    def sure(self) -> float:
        return 1 - self.p


@dataclasses.dataclass(frozen=True)
class Slower(OfEpisode):
    """Latencies were higher for a while."""

    episode: Episode

    def figures(self) -> dict[str, Any]:
        its = self.episode
        own, p = its.own or (None, None)
        return {
            "rise": round(its.size), "rise_low": round(its.low), "rise_high": round(its.high),
            "front": its.front or None, "responder": its.responders.get(its.hop),
            "front_responder": its.responders.get(its.front), "behind": its.slower, "lasts": its.lasts,
            "tcp_rise": None if its.tcp is None else round(its.tcp), "tcp_share": self.tcp_share(),
            "retransmitted": its.retransmitted, "own_correlation": own, "own_p": p,
            "own_correlation_highest": its.own_highest,
        }  # fmt: skip

    def tcp_share(self) -> float | None:
        """Return the share of the rise of TCP's round trip that the episode explains, at most 1.

        None: the round trip is not known, or rose by no more than MARGIN.
        """
        rise = self.episode.tcp
        return min(self.episode.size / rise, 1.0) if rise is not None and rise > MARGIN else None

    def _rise(self) -> str:
        its = self.episode
        return f"{its.size / 1e6:+.1f} ms (95 %: {its.low / 1e6:.1f}–{its.high / 1e6:.1f})"

    def _place(self, hop: int) -> str:
        return hop_text(hop, self.episode.responders)

    def _tcp(self) -> str:
        its, share = self.episode, self.tcp_share()
        text = ""
        if share is not None:
            text = f"; explains {share:.0%} of the rise of TCP's round trip"
        elif its.tcp is not None and its.tcp < its.size / 4:
            text = "; TCP's round trip did not rise"
        return text + self._retransmitted()

    def _retransmitted(self) -> str:
        count = self.episode.retransmitted
        return f"; {count} segments retransmitted meanwhile" if count > 0 else ""

    def _cause(self) -> str:
        """Return a clause that says whose packets made the queue: the flow's own, or others'. Empty: not known."""
        rho, p = self.episode.own or (0.0, 1.0)
        if rho >= OWN_FROM and p < SIGNIFICANT:
            return f"; it rises and falls with the flow's own congestion window (rank correlation {rho:.2f})"
        highest = self.episode.own_highest
        if highest is not None and highest < OTHERS_BELOW:
            return (
                "; others' traffic: it does not go with the flow's own congestion window (rank correlation below "
                f"{highest:.2f})"
            )
        return ""


class Queue(Slower):
    """Delay between two hops: packets to the second hop and to those behind it are slower."""

    kind = "queue"

    def text(self) -> str:
        its = self.episode
        fast = [str(number) for number in its.behind if number not in its.slower]
        behind = " and at all behind" * bool(its.behind) + f", but hop {', '.join(fast)}" * bool(fast)
        return (
            f"{self._rise()} between {self._place(its.front)} and {self._place(its.hop)}{behind}, on the way "
            f"there or back{self._tcp()}{self._cause()}"
        )


class QueueInFront(Slower):
    """Delay at all hops: in this host, or in front of the first hop that answers."""

    kind = "queue_in_front"

    def text(self) -> str:
        return (
            f"{self._rise()} at all hops: in this host's own queue, or on the way to {self._place(self.hop)} or "
            f"back{self._tcp()}{self._cause()}"
        )


class QueueBeyond(Slower):
    """Delay of TCP's round trip alone."""

    kind = "queue_beyond"

    def text(self) -> str:
        its = self.episode
        return (
            f"{self._rise()} in TCP's round trip only: behind {self._place(its.front)}, on the way there or back, "
            f"or at the other end{self._retransmitted()}{self._cause()}"
        )


class SlowAnswers(Slower):
    """Delay of a router's answers, but not of the packets that it forwards."""

    kind = "slow_answers"

    def text(self) -> str:
        its = self.episode
        hops = f"hops {', '.join(map(str, [its.hop, *its.slower]))}" if its.slower else self._place(its.hop)
        forwards = "what passes it is not delayed" if its.behind else "TCP's round trip did not rise"
        if its.slower:
            forwards = "what passes them is not delayed: it is the way back from there, or they answer slowly"
        return f"{self._rise()} in the answers of {hops} only; {forwards}"


class SlowLastHop(Slower):
    """Delay at the last hop that answers: no hop behind it shows whether forwarded packets were delayed, too."""

    kind = "slow_last_hop"

    def text(self) -> str:
        return (
            f"{self._rise()} at {self._place(self.hop)}, the last one that answers: a queue, or it answers slowly; "
            "nothing behind it tells"
        )


@dataclasses.dataclass(frozen=True)
class LossForAWhile(OfEpisode):
    """More probes than usual were unanswered for a while, at a hop and at all behind it."""

    kind = "loss_episode"
    episode: LossEpisode
    responders: dict[int, str]
    tcp_sends: bool

    def figures(self) -> dict[str, Any]:
        its = self.episode
        back, low, high = its.back or (None, None, None)
        return {
            "share": its.share, "share_low": its.low, "share_high": its.high, "usual_share": its.usual,
            "probes": its.probes, "front": its.front or None, "first_at_most": its.until,
            "retransmitted": its.retransmitted, "direction": self.direction(), "lasts": its.lasts,
            "back_share": back, "back_low": low, "back_high": high,
        }  # fmt: skip

    def direction(self) -> str | None:
        """Return "there" (forward path) or "back" (reverse path). None: the data cannot tell."""
        if not self.episode.back:
            return None
        _, low, high = self.episode.back
        return "back" if low > 1 / 2 else "there" if high < 1 / 2 else None

    def _place(self, hop: int) -> str:
        return hop_text(hop, self.responders)

    def _share(self) -> str:
        its = self.episode
        usual = f", usually {its.usual:.1%}" if its.usual >= UNANSWERED_SHARE_MIN else ""
        return f"{its.share:.1%} (95 %: {its.low * 100:.1f}–{its.high * 100:.1f}{usual})"

    def _tcp(self) -> str:
        its = self.episode
        return f"; TCP retransmitted {its.retransmitted or 'no'} segments meanwhile" if self.tcp_sends else ""

    def text(self) -> str:
        its = self.episode
        front = self._place(its.front) if its.front else "this host"
        behind = " and at all behind" * bool(its.behind)
        likely = f", most likely in front of hop {its.hop}" if its.until != its.hop else ""
        direction = self.direction()
        way = "on the way there or back" if direction is None else f"on the way {direction}"
        if its.back:
            back, _, _ = its.back
            way += f" (by the routers' IP identifications, {back:.0%} on the way back)"
        return (
            f"{self._share()} of the packets were lost between {front} and {self._place(its.until)}{behind}{likely}"
            f", {way}{self._tcp()}"
        )


class UnansweredForAWhile(LossForAWhile):
    """More unanswered probes at the last hop that answers: no hop behind it tells loss from a rate limit."""

    kind = "unanswered_episode"

    def text(self) -> str:
        return (
            f"{self._share()} of the probes to {self._place(self.hop)}, the last one that answers, were unanswered"
            f": packets were lost, or it limits its answers{self._tcp()}; nothing behind it tells"
        )


@dataclasses.dataclass(frozen=True)
class PathChange(Finding):
    """From a hop on, other routers answer than before."""

    kind = "path_change"
    change: Change

    def figures(self) -> dict[str, Any]:
        far, rise, low, high = self.change.rise() or (None, None, None, None)
        return {
            "before": self.change.before, "after": self.change.after, "flows": self.change.flows,
            "at": far,
            **{name: None if its is None else round(its)
               for name, its in (("rise", rise), ("rise_low", low), ("rise_high", high))},
        }  # fmt: skip

    def span(self) -> tuple[int, int]:
        return self.change.begin, self.change.end

    def text(self) -> str:
        its, found = self.change, self.change.rise()
        flows = f" for {its.flows} flows" if its.flows > 1 else ""
        text = f"the path changed{flows} from hop {self.hop} on, which is now {its.after}, no longer {its.before}"
        if not found:
            return text
        far, rise, low, high = found
        text += f"; the latency of hop {far}"
        if low <= 0 <= high:
            return f"{text} is the same within {math.ceil(max(-low, high) / 1e5) / 10:.1f} ms"
        return f"{text} changed by {rise / 1e6:+.1f} ms (95 %: {low / 1e6:.1f} to {high / 1e6:.1f})"


@dataclasses.dataclass(frozen=True)
class ReturnPathChange(Finding):
    """The reverse path of hops became longer or shorter, and their forward path did not change."""

    kind = "return_path_change"
    change: ReturnChange

    def figures(self) -> dict[str, Any]:
        responder, before, after = self.change.hops[self.hop]
        return {
            "longer_by": self.change.longer_by, "responder": responder, "ttl_before": before, "ttl_after": after,
            "hops": sorted(self.change.hops),
        }  # fmt: skip

    def span(self) -> tuple[int, int]:
        return self.change.begin, self.change.end

    def text(self) -> str:
        responder, before, after = self.change.hops[self.hop]
        others = [str(number) for number in sorted(self.change.hops) if number != self.hop]
        more = f" (and from hop {', '.join(others)})" if others else ""
        longer = self.change.longer_by
        hops = f"{abs(longer)} hop{'s' * (abs(longer) > 1)}"
        became = "longer" if longer > 0 else "shorter"
        way = f"the way back from hop {self.hop} ({responder}){more} became {became} by {hops}"
        return f"{way}, the way there did not change: its answers come with TTL {after}, no longer {before}"


@dataclasses.dataclass(frozen=True)
class HopOutage(Finding):
    """The hop did not answer for a while."""

    kind = "outage"
    outage: Outage
    front: int  # the nearest hop in front of it that answers; 0: none
    path_changed: bool = False  # when the outage began

    def figures(self) -> dict[str, Any]:
        its = self.outage
        return {"seconds": its.seconds, "ends_path": its.ends_path, "front": self.front or None}

    def span(self) -> tuple[int, int]:
        return self.outage.begin * 10**9, (self.outage.begin + self.outage.seconds) * 10**9

    def begins_with(self, change: Change) -> bool:
        """Return whether the path changed, at this hop or in front of it, within a second of the last answer."""
        begin = self.span()[0]
        return change.hop <= self.hop and change.begin < begin + 2 * 10**9 and begin - 10**9 < change.end

    def text(self) -> str:
        seconds = f"for {self.outage.seconds} s"
        if self.outage.ends_path:
            where = f": interrupted behind hop {self.front}" if self.front else ""
            shorter = "; or the path, which changed then, became shorter" if self.path_changed else ""
            return f"from hop {self.hop} on there was no answer {seconds}{where}{shorter}"
        return f"hop {self.hop} was unresponsive {seconds}, but not those behind it"


@dataclasses.dataclass(frozen=True)
class Unanswered(Finding):
    """A share of the probes to the hop is not answered."""

    share: float

    def _start(self) -> str:
        return f"{self.share:.1%} of the probes to hop {self.hop} are not answered"


@dataclasses.dataclass(frozen=True)
class RateLimit(Unanswered):
    """The hop limits the rate of its answers: a hop behind it answers a clearly larger share of probes."""

    kind = "rate_limit"
    behind: int  # the hop behind it that answers the largest share
    answered_behind: float  # the share of probes that this hop answers

    def text(self) -> str:
        return (
            f"hop {self.hop} limits the rate of its answers: {self._start()}, but "
            f"{self.answered_behind:.1%} of those that pass it on their way to hop {self.behind}"
        )


@dataclasses.dataclass(frozen=True)
class TooFewBehind(Unanswered):
    """A hop behind answers a larger share, but for its number of probes the difference may be chance."""

    kind = "too_few_behind"
    behind: int
    probes_behind: int
    unanswered_behind: int

    def text(self) -> str:
        missing = f"of {self.probes_behind} probes to hop {self.behind} {self.unanswered_behind} are not answered"
        return f"{self._start()}; {missing}: the difference is too small to tell why"


@dataclasses.dataclass(frozen=True)
class UnansweredWithTcp(Unanswered):
    """Only TCP's retransmissions hint at the reason, if the carriers were of TCP flows that send data."""

    retransmitted: int | None  # segments; None: no carrier was of a TCP flow that mostly sends
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


class NoneBehind(UnansweredWithTcp):
    """No hop behind answers enough probes, so nothing tells loss from a limit."""

    kind = "none_behind"

    def text(self) -> str:
        return f"{self._start()}: no hop behind it tells whether it loses packets{self._tcp()}"


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


@dataclasses.dataclass
class Rewritten:
    """A change of headers that quoted packets show: the nearest hop that quotes it, and the number of quotes."""

    hop: int
    responder: str
    begin: int  # when the first and the last such probe left, CLOCK_MONOTONIC, ns
    end: int
    answers: int = 0


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
    """A finding that names its destination, and the responder at the hop."""

    dest: str
    responder: str


@dataclasses.dataclass(frozen=True)
class PathRewrite(OfDestination):
    """A router in front of the hop changed the packets' headers."""

    kind = "rewrite"
    what: str
    its: Rewritten

    def figures(self) -> dict[str, Any]:
        return {"what": self.what, "responder": self.its.responder, "answers": self.its.answers}

    def span(self) -> tuple[int, int]:
        return self.its.begin, self.its.end

    def text(self) -> str:
        return f"to {self.dest}: {self.what} before hop {self.hop} ({self.its.responder})"


class CongestionMarks(PathRewrite):
    """A router in front of the hop marks congestion (RFC 3168)."""

    kind = "congestion_marks"

    def text(self) -> str:
        its = self.its
        return (
            f"to {self.dest}: congestion is marked (CE) before hop {self.hop} ({its.responder}): "
            f"in {its.answers} answers from there on"
        )


@dataclasses.dataclass(frozen=True)
class NearMiss(OfDestination):
    """Time exceeded messages quote a probed TCP flow, but no probe. They may come from the hop."""

    kind = "near_miss"
    answers: int

    def text(self) -> str:
        return (
            f"to {self.dest}: {self.answers} time exceeded from {self.responder} quote a probed flow, but the TCP "
            f"sequence number of no probe: something changes the numbers before hop {self.hop} or behind it"
        )


@dataclasses.dataclass(frozen=True)
class AckFilter(OfDestination):
    """An ACK filter in front of the hop wrote acknowledgements of the application into probes."""

    kind = "ack_filter"
    answers: int  # each quotes an acknowledgement in place of a probe
    begin: int  # when the first and the last of them came, ns
    end: int

    def figures(self) -> dict[str, Any]:
        return {"responder": self.responder, "answers": self.answers}

    def span(self) -> tuple[int, int]:
        return self.begin, self.end

    def text(self) -> str:
        return (
            f"{self.dest}: an ACK filter on the way, before hop {self.hop}, writes acknowledgements of the "
            f"application into probes, so these end at routers ({self.answers} did, some at {self.responder}): "
            "destination excluded for the rest of this run"
        )


def findings_on(destination: Destination) -> Iterator[Finding]:
    """Yield the findings on a destination.

    First, in the order of time: episodes, changes of the path and of the reverse path. Then outages, unanswered
    probes, changes of responders, and addresses that answer at several hops.
    """
    outages = destination.outages()
    changes = [PathChange(change.hop, change) for change in destination.watch.changes]
    returns = return_path_changes(destination.watch)
    yield from sorted([*episodes(destination, outages), *changes, *returns], key=lambda each: each.span() or (0, 0))
    answering = {number: hop for number, hop in sorted(destination.hops.items()) if hop.latency.count}
    for number in answering:
        for outage in outages_to_tell(number, {other: outages[other] for other in answering}):
            yield dataclasses.replace(outage, path_changed=any(map(outage.begins_with, destination.watch.changes)))
    yield from unanswered(destination, {
        number: hop for number, hop in answering.items() if hop.probes >= ENOUGH_PROBES
    }, outages)  # fmt: skip
    for number, hop in answering.items():
        alternates = hop.changes > OFTEN * hop.latency.count or number in destination.watch.balanced
        if hop.changes and (alternates or not destination.watch.changes):
            yield ResponderChanges(number, hop.changes, len(hop.responders), alternates)
    yield from shared_responders(answering)


def episodes(destination: Destination, outages: dict[int, list[Outage]]) -> Iterator[Slower | LossForAWhile]:
    """Yield the episodes with a corrected p below SIGNIFICANT, but no loss by an outage or a shorter path."""
    watch = destination.watch
    delays, losses = watch.episodes(), watch.losses.episodes()
    corrected = holm([*(each.p for each in delays), *(each.p for each in losses)], watch.tests.count)
    for delay, p in zip(delays, corrected):
        if p < SIGNIFICANT:
            yield slower(destination, delay, p)
    for loss, p in zip(losses, corrected[len(delays) :]):
        if p < SIGNIFICANT and not is_outage(loss, outages) and not is_shorter_path(loss, watch.changes):
            yield lossy(destination, loss, p)


def return_path_changes(watch: Watch) -> Iterator[ReturnPathChange]:
    """Yield the changes of the reverse path during which the forward path did not change."""
    if len(watch.changes) >= CHANGES_MAX:
        return  # further changes of the forward path were not kept
    for change in watch.returns.all():
        near = change.begin - CHANGE_TOGETHER, change.end + CHANGE_TOGETHER
        farthest = max(change.hops)
        if not any(near[0] < each.end and each.begin < near[1] and each.hop <= farthest for each in watch.changes):
            yield ReturnPathChange(change.hop, change)


def is_outage(loss: LossEpisode, outages: dict[int, list[Outage]]) -> bool:
    """Return whether nearly all probes were lost, and this lasts or is part of an outage."""
    return loss.share > NEARLY_ALL_LOST and (loss.lasts or any(
        outage.begin * 10**9 < loss.end and loss.begin < (outage.begin + outage.seconds) * 10**9
        for number in outages if number >= loss.hop
        for outage in outages[number]
    ))  # fmt: skip


def is_shorter_path(loss: LossEpisode, changes: list[Change]) -> bool:
    """Return whether the path may have become shorter, so that the hops are no longer on it.

    Then nearly all probes to them are unanswered for a few moments, and after that no more are sent.
    """
    if loss.share <= NEARLY_ALL_LOST or loss.retransmitted:
        return False
    return loss.end - loss.begin < PROBED_AFTER * 10**9 or any(
        change.hop <= loss.hop and abs(change.begin - loss.begin) < CHANGE_TOGETHER for change in changes
    )


def lossy(destination: Destination, episode: LossEpisode, p: float) -> LossForAWhile:
    """Return the finding for an episode of loss. At the last hop, only TCP tells loss from a rate limit."""
    responders = {number: hop.responder for number, hop in destination.hops.items() if hop.responder}
    agrees = destination.tcp_sends and episode.retransmitted >= episode.share * episode.probes * TCP_AGREES_FROM
    kind = LossForAWhile if episode.behind or agrees else UnansweredForAWhile
    return kind(episode.hop, episode, p, responders, destination.tcp_sends)


def slower(destination: Destination, episode: Episode, p: float) -> Slower:
    """Return the finding for a delay. Its kind depends on which hops behind were slower, and whether TCP was."""
    hop, tcp = episode.hop, episode.tcp
    if hop == TCP:
        return QueueBeyond(episode.front, episode, p)
    rises = tcp is not None and tcp > episode.size / 2
    if not rises and not destination.tcp_sends:  # a socket that only receives does not measure its round trip
        episode, tcp = dataclasses.replace(episode, tcp=None), None
    if episode.behind:
        passes_on = episode.behind[-1] in episode.slower
    elif rises:
        passes_on = True
    elif tcp is not None:
        passes_on = False
    else:
        return SlowLastHop(hop, episode, p)
    if not passes_on:
        return SlowAnswers(hop, episode, p)
    return Queue(hop, episode, p) if episode.front else QueueInFront(hop, episode, p)


def outages_to_tell(number: int, outages: dict[int, list[Outage]]) -> Iterator[HopOutage]:
    """Yield a hop's outages, without those that an outage of a nearer hop explains."""
    nearer = [outage for other in outages if other < number for outage in outages[other] if outage.ends_path]
    for outage in outages[number]:
        if not (outage.ends_path and any(outage.overlaps(other) for other in nearer)):
            yield HopOutage(number, outage, max((other for other in outages if other < number), default=0))


def unanswered(
    destination: Destination, hops: dict[int, Hop], outages: dict[int, list[Outage]]
) -> Iterator[Unanswered]:
    """Yield the hops with unanswered probes, and why, as far as hops behind and TCP tell.

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

    It agrees if the share of retransmitted segments is at least TCP_AGREES_FROM of that share: less is enough,
    because a probe is also unanswered if its answer was lost. None: no TCP flow was probed, or the probed TCP flows
    mostly receive, and so have nothing to retransmit.
    """
    probes, retransmitted = destination.tcp_probes, destination.retransmitted
    return (retransmitted if destination.tcp_sends else None), retransmitted >= share * probes * TCP_AGREES_FROM


When = Callable[[int], str]  # returns the text of a time (CLOCK_MONOTONIC, ns)


def monotonic_text(at: int) -> str:
    return f"{at / 1e9:.1f} s"


def sentence(finding: Finding, when: When = monotonic_text) -> str:
    """Return the line of the table for a finding, with its span if it has one."""
    span = None if isinstance(finding, OfDestination) else finding.span()
    return f"{when(span[0])}–{when(span[1])}  {finding.text()}" if span else finding.text()


def sentences(findings: Sequence[Finding], when: When = monotonic_text) -> Iterator[str]:
    """Yield the lines of the table for a destination's findings.

    Of delays, losses and changes of the path it has SHOWN_MAX each: of the first two the largest.
    """
    delays, losses = (
        sorted((each for each in findings if isinstance(each, kind)), key=lambda each: -each.episode.weight)
        for kind in (Slower, LossForAWhile)
    )
    changes = [each for each in findings if isinstance(each, PathChange)]
    left_out = set(map(id, [*delays[SHOWN_MAX:], *losses[SHOWN_MAX:], *changes[SHOWN_MAX:]]))
    for finding in findings:
        if id(finding) not in left_out:
            yield sentence(finding, when)
    if left_out:
        smaller = "smaller delays, less loss, changes of the path"
        yield f"{len(left_out)} more are in the JSON file of the run only: {smaller}"


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
        self._found: dict[tuple[str, str], Rewritten] = {}  # by destination and change
        self.unmatched: Callable[[], Iterable[OfDestination]] = tuple  # on answers that quote no probe

    def note(self, probe: Record) -> None:
        """Note the changes that the reply to a probe shows."""
        if probe.intos != probe.outtos:
            self._note_change(probe, tos_change(probe.outtos or 0, probe.intos or 0))
        if probe.translated & SOURCE_TRANSLATED:
            self._note_change(probe, "the source address is translated")
        if probe.translated & NUMBER_TRANSLATED:
            self._note_change(probe, "the TCP sequence numbers are changed")

    def _note_change(self, probe: Record, what: str) -> None:
        its = self._found.get((probe.dest, what))
        if its is None:
            if len(self._found) >= REWRITES_MAX:
                return
            its = Rewritten(probe.outttl, probe.responder, probe.sendtime, probe.sendtime)
            self._found[probe.dest, what] = its
        if probe.outttl < its.hop:
            its.hop, its.responder = probe.outttl, probe.responder
        its.answers += 1
        its.begin, its.end = min(its.begin, probe.sendtime), max(its.end, probe.sendtime)

    def findings(self) -> Iterator[OfDestination]:
        for (dest, what), its in sorted(self._found.items(), key=lambda item: item[0]):
            yield (CongestionMarks if what == MARKED else PathRewrite)(its.hop, dest, its.responder, what, its)
        yield from self.unmatched()


def tos_change(sent: int, quoted: int) -> str:
    """Return the change of the DSCP/ECN byte as text; MARKED if only congestion was marked."""
    if sent | ECN == quoted and sent & ECN and quoted & ECN == CE:
        return MARKED
    return f"DSCP/ECN {sent:#04x} becomes {quoted:#04x}"
