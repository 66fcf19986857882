# SPDX-License-Identifier: GPL-3.0-only
"""The summary: all probes that have ended, by destination and hop, in bounded memory, and its tables."""

from __future__ import annotations

import array
import itertools
import logging
import math
import random
from typing import Callable, Iterable, Iterator, Tuple

from elf.addresses import flow_text
from elf.episodes import Comparisons, Way
from elf.findings import When, findings_on, monotonic_text, sentences
from elf.histogram import Stats
from elf.lines import Line, Mark, fitting
from elf.losses import LATE, MOMENT
from elf.paths import Destination, Hop
from elf.returns import AnswerTtl
from elf.rows import NOTED, Record, text_of_field
from elf.usage import printable
from elf.ways import ways_texts, ways_to

HOPS_MAX = 8192  # of all destinations together
FLOWS_MAX = 32768  # that are remembered
FLOWS_LOOKED_AT = 8192  # for a table, to find those of a destination
FLOW_HOPS_MAX = 65536  # of all of them together
WAITING_MAX = 4096  # rows of a destination that wait for digest()
WATCHED_MAX, WATCHED_IDLE = 64, 60 * 10**9  # destinations; ns without a probe, after which another takes the place
NEVER = 1 << 63  # ns, above every latency
# Latencies are compared between the first answers of hops in each moment of a flow.
MOMENTS_KEPT = 8  # of a flow and hop: an answer may come so many later than that of the hop behind
MOMENTS_APART = 20  # between answers that are compared, at most
REUSE_AFTER = 10**9  # ns without a probe, after which a lower retransmission count is a new connection's
CHANGES_LOGGED = 10  # changes of a hop's responder; further ones are only counted

TABLES_MAX = 50  # destinations in the tables at the end
RESPONDERS_SHOWN = 4  # of a hop
HEADS = dict(zip(Stats._fields, ("min", "median", "95%", "99%", "max", "jitter")))
WIDE_ONLY = "percentile99", "jitter"  # columns that a narrow table does not have
WIDE = 100  # columns of a terminal
# Latency rises at times if its 95th percentile exceeds the median by this factor, and by so many ns.
SWINGS_FACTOR, SWINGS_BY = 3, 10**6

log = logging.getLogger(__name__)

FlowKey = Tuple[str, int, int, int]  # destination, ports, protocol: the first fields of Record


class FlowHop:
    """The probes of a flow to a hop that have ended, and who answers there."""

    __slots__ = (
        "answered", "unanswered", "total", "minimum", "maximum", "responder", "since", "before", "recent", "until",
        "moments", "ttl",
    )  # fmt: skip

    def __init__(self) -> None:
        self.answered = self.unanswered = 0
        self.total = 0  # sum of the latencies, ns
        self.minimum, self.maximum = NEVER, 0  # ns
        self.responder = ""
        self.since = 0  # when the first probe left that this responder answered, ns
        self.before = ""  # the responder before it
        self.recent = array.array("Q")  # latencies that are not in the figures yet
        self.until = 0  # end of the newest moment in which a probe left that was answered, ns
        self.ttl: AnswerTtl | None = None  # of the answers of the newest responder
        self.moments = array.array("q")  # the last such moments, and the latency of the first answer in each

    def update(self) -> None:
        """Add the newest latencies to the figures."""
        new = self.recent
        if new:
            self.answered += len(new)
            self.total += sum(new)
            self.minimum = min(self.minimum, min(new))
            self.maximum = max(self.maximum, max(new))
            del new[:]

    def note_moment(self, moment: int, latency: int) -> None:
        """Note the first answer in a new moment, ns."""
        self.until = (moment + 1) * MOMENT
        moments = self.moments
        moments.append(moment)
        moments.append(latency)
        if len(moments) > 2 * MOMENTS_KEPT:
            del moments[:2]

    def note_moments(self, newest: bytes) -> None:
        """Do what note_moment() does for the newest of several: moments and latencies (64 bits) in turn."""
        moments = self.moments
        moments.frombytes(newest)
        del moments[: -2 * MOMENTS_KEPT]
        self.until = (moments[-2] + 1) * MOMENT

    def latency_in(self, moment: int) -> int | None:
        """Return the latency in a moment, or in the newest one shortly before it, ns. None: there is none."""
        moments = self.moments
        for at in range(len(moments) - 2, -1, -2):
            if moments[at] <= moment:
                return moments[at + 1] if moment - moments[at] <= MOMENTS_APART else None
        return None


def note_ttl(
    destination: Destination, of_flow: FlowHop, number: int, responder: str, recvttl: int, sendtime: int
) -> None:
    """Note the TTL of the first answer in a moment."""
    its = of_flow.ttl
    if its is None or responder != its.responder:
        of_flow.ttl = AnswerTtl(responder, recvttl, recvttl, 0, sendtime)
    elif recvttl != its.ttl or its.count:
        before = its.add(recvttl, sendtime)
        if before is not None:
            destination.watch.returns.note(number, responder, before, recvttl, its.since)


class Flow:
    """What the probes of a flow showed."""

    __slots__ = ("app", "pid", "source", "hops", "retrans", "last_sent", "sequence", "way", "counted")

    def __init__(self, app: str, pid: int | None, source: str, retrans: int) -> None:
        self.app = app
        self.pid = pid
        self.source = source  # address; empty if it is not known
        self.hops: dict[int, FlowHop] = {}
        self.retrans = retrans  # segments, the highest count so far
        self.sequence = 0  # TCP sequence number of the newest packet that was cloned
        self.last_sent = 0  # when the newest probe with a retransmission count left, ns
        self.way: Way | None = None  # elf.episodes follows it
        self.counted = retrans  # segments, the retransmissions that it has counted

    def updated_hops(self) -> dict[int, FlowHop]:
        """Return the hops, with all probes in their figures."""
        for of_flow in self.hops.values():
            of_flow.update()
        return self.hops


class Place:
    """Where a Summary notes the probes of a flow to a hop that a responder answers, or that nobody answers."""

    __slots__ = (
        "summary", "destination", "hop", "flow", "of_flow", "key", "number", "responder", "recvttl", "rows",
        "add_latency", "add_of_flow", "add_srtt",
    )  # fmt: skip

    def __init__(
        self, summary: Summary, destination: Destination, flow: Flow, of_flow: FlowHop, probe: Record
    ) -> None:
        self.summary = summary
        self.destination = destination
        self.hop = hop = destination.hops[probe.outttl]
        self.flow = flow
        self.of_flow = of_flow
        self.key: FlowKey = (probe.dest, probe.sport, probe.dport, probe.protocol)
        self.number = probe.outttl  # of the hop
        self.responder = probe.responder
        self.recvttl = probe.recvttl
        self.rows = destination.watch.rows  # that wait for digest()
        self.add_latency = hop.latency.recent.append
        self.add_of_flow = of_flow.recent.append
        self.add_srtt = destination.srtt.recent.append

    def note(
        self,
        sendtime: int,
        latency: int,
        origseq: int,
        srtt: int | None,
        cwnd: int | None,
        retrans: int | None,
        ripid: int | None,
    ) -> None:
        """Add a probe that has ended: the NOTED fields of Record.

        This runs for each row. What can wait is done once a second.
        """
        flow = self.flow
        if cwnd is not None:
            destination = self.destination
            if srtt is not None:
                self.add_srtt(srtt * 1000)
            if retrans != flow.retrans:
                note_retrans(destination, flow, sendtime, retrans or 0)
            elif sendtime > flow.last_sent:
                flow.last_sent = sendtime
            destination.tcp_probes += 1
            destination.cwnd = cwnd
            if origseq != flow.sequence:
                destination.tcp_advances += 1
                flow.sequence = origseq
        responder, of_flow = self.responder, self.of_flow
        if not responder:
            self._note_unanswered(sendtime)
            return
        self.add_latency(latency)
        self.add_of_flow(latency)
        if sendtime >= of_flow.until:
            self._note_moment(sendtime, latency, ripid)
        if responder != self.hop.responder:
            self.hop.note_other(responder, latency)
        if responder != of_flow.responder:
            self.summary.note_responder(self.hop, of_flow, self.key, self.number, responder, sendtime)
        rows = self.rows
        if len(rows) < WAITING_MAX:
            if not rows:
                self.summary.waiting.append(self.destination)
            rows.append((sendtime, self.number, latency, responder, flow, srtt, cwnd, retrans))

    def _note_unanswered(self, sendtime: int) -> None:
        self.hop.unanswered += 1
        self.of_flow.unanswered += 1
        second = sendtime // 10**9
        self.destination.note_second(second)
        if second > self.hop.unanswered_until:
            self.hop.note_unanswered(second)
        self.destination.watch.losses.note_unanswered(self.number, sendtime // MOMENT)

    def _note_moment(self, sendtime: int, latency: int, ripid: int | None) -> None:
        """Note that an answered probe of the flow left in a later moment than those before."""
        destination, hop, of_flow, number = self.destination, self.hop, self.of_flow, self.number
        moment, second, second_before = sendtime // MOMENT, sendtime // 10**9, (of_flow.until - 1) // 10**9
        of_flow.note_moment(moment, latency)
        note_ttl(destination, of_flow, number, self.responder, self.recvttl, sendtime)
        destination.watch.losses.note_moment(
            number, hop.latency, moment, hop.latency.count - 1, self.responder, ripid
        )
        front = self.flow.hops.get(destination.front(number))
        before = front.latency_in(moment) if front else None
        if before is not None:
            hop.added.add(latency - before)
        hop.latency.limit()  # now, since many are slower to sort than few at a time
        destination.note_second(second)
        if second > second_before:
            of_flow.update()
        if second > hop.last_second:
            hop.note_second(second, *destination.neighbours(number))


def note_retrans(destination: Destination, flow: Flow, sendtime: int, retrans: int) -> None:
    """Note that the retransmission count of a flow is not the one before."""
    if retrans < flow.retrans and sendtime > flow.last_sent + REUSE_AFTER:
        flow.retrans = 0  # a new connection with the same ports
    if retrans > flow.retrans:
        destination.retransmitted += retrans - flow.retrans
        destination.watch.losses.note_retransmitted(sendtime // MOMENT, retrans - flow.retrans)
        flow.retrans = retrans
    flow.last_sent = max(flow.last_sent, sendtime)


class Summary:
    """All probes that have ended, by destination and hop, and by flow and hop.

    name_of returns the host name of an address, empty if it has none. It is called as soon as an address is
    seen, so that a name that takes time to find is there when the first table is made.
    """

    def __init__(self, name_of: Callable[[str], str] = lambda _: "") -> None:
        self.name_of = name_of
        self._destinations: dict[str, Destination] = {}
        self._flows: dict[FlowKey, Flow] = {}
        self._flows_are_forgotten = False  # some of them
        self.hops = 0  # of all destinations together
        self._flow_hops = 0
        self._probes_left_out = 0
        self.forgotten = 0  # how often destinations or flows were forgotten
        self.waiting: list[Destination] = []  # those with rows that wait for digest()
        self._watched: dict[int, Destination] = {}  # by id, the newest of them last
        self._random = random.Random(1)
        self._tests = Comparisons()
        self.when: When = monotonic_text  # how times are told
        self.has_paths = True  # otherwise elf.sources has put others in the place of destinations

    def _label(self, address: str) -> str:
        """Return the address, followed by its name if that is known."""
        return printable(f"{address} {self.name_of(address)}".rstrip())

    def destinations(self) -> list[tuple[str, Destination]]:
        """Return the destinations, those with most probes first."""
        return sorted(self._destinations.items(), key=lambda item: -item[1].probes)

    def flows(self) -> dict[str, list[tuple[FlowKey, Flow]]]:
        """Return the flows that are remembered, by destination."""
        found: dict[str, list[tuple[FlowKey, Flow]]] = {}
        for item in self._flows.items():
            found.setdefault(item[0][0], []).append(item)
        return found

    def answers(self, flow: FlowKey, responder: str) -> bool:
        """Return whether this router is the one that answers a flow at one of its hops."""
        return flow in self._flows and responder in (hop.responder for hop in self._flows[flow].hops.values())

    def first_silent_hop(self, flow: FlowKey) -> int:
        """Return the nearest hop that has answered no probe of a flow, 0 if there is none."""
        hops = self._flows[flow].hops.items() if flow in self._flows else ()
        return min((number for number, hop in hops if not hop.answered), default=0)

    def newest_flows(self) -> Iterator[tuple[FlowKey, Flow]]:
        """Return the flows that are remembered, the newest first."""
        return reversed(self._flows.items())

    def flow_label(self, key: FlowKey, flow: Flow) -> str:
        """Return a flow's description, with its process if that is known."""
        dest, *others = key
        process = f"{printable(text_of_field(flow.app))} (pid {flow.pid}): " if flow.pid else ""
        return process + flow_text(self._label(dest), *others)

    def destination_after(self, dest: str | None) -> str | None:
        """Return the destination that came after this one, the first for None, None after the last."""
        known: list[str | None] = [None, *self._destinations, None]
        return known[known.index(dest) + 1] if dest in known else None

    def note(self, probe: Record) -> None:
        """Add a probe that has ended."""
        self.place(probe).note(*map(probe.__getattribute__, NOTED))

    def place(self, probe: Record) -> Place:
        """Return where to note probes like this one, until `forgotten` grows."""
        dest, number, key = probe.dest, probe.outttl, (probe.dest, probe.sport, probe.dport, probe.protocol)
        destination = self._destinations.get(dest) or self._new_destination(dest)
        if number not in destination.hops:
            self._new_hop(destination, number)
        flow = self._flows.get(key) or self._new_flow(key, destination, probe)
        of_flow = flow.hops.get(number) or self._new_flow_hop(flow, number)
        return Place(self, destination, flow, of_flow, probe)

    def _may_watch(self, destination: Destination, now: int) -> bool:
        """Return whether there is room to look for episodes of a destination.

        At most WATCHED_MAX are watched. One without probes for WATCHED_IDLE makes room. now: CLOCK_MONOTONIC, ns.
        """
        watched = self._watched
        is_new = watched.pop(id(destination), None) is None
        if is_new and len(watched) >= WATCHED_MAX:
            oldest = next(iter(watched.values()))
            if now < oldest.watch.newest + WATCHED_IDLE:
                return False
            oldest.watch.forget()
            del watched[id(oldest)]
        watched[id(destination)] = destination
        return True

    def digest(self, most: int | None = None, is_over: bool = False) -> None:
        """Look for episodes in the rows that wait.

        most: with more rows than this, look only at a sample of about so many. is_over: no more rows are to come.
        """
        waiting, self.waiting = self.waiting, []
        count = sum(len(each.watch.rows) for each in waiting)
        for destination in waiting:
            watch = destination.watch
            if not watch.rows:
                continue  # BulkSummary has looked at them
            if not self._may_watch(destination, watch.rows[-1][0]):
                del watch.rows[:]
                watch.losses.forget()
                continue
            if most is not None and count > most:
                watch.rows[:] = self._random.sample(watch.rows, max(len(watch.rows) * most // count, 1))
            watch.digest(destination.hops, is_over)
            watch.losses.close(watch.newest // MOMENT - LATE)
            if watch.rows:
                self.waiting.append(destination)
        if is_over:
            for destination in self._destinations.values():
                destination.watch.losses.end()

    def note_responder(
        self, hop: Hop, of_flow: FlowHop, key: FlowKey, number: int, responder: str, sendtime: int
    ) -> None:
        """Note the responder of a flow at a hop, if it is the first one or another one than before."""
        self.name_of(responder)
        if of_flow.responder:
            if sendtime < of_flow.since:
                return  # a late answer, from before the change
            self._log_change(hop, key, number, responder, of_flow.responder)
            of_flow.before = of_flow.responder
        of_flow.responder = responder
        of_flow.since = sendtime

    def _log_change(self, hop: Hop, key: FlowKey, number: int, now: str, before: str) -> None:
        hop.changes += 1
        if hop.changes > CHANGES_LOGGED:
            return
        more = "; from now on its changes are only counted" if hop.changes == CHANGES_LOGGED else ""
        flow = flow_text(self._label(key[0]), *key[1:])
        log.info("%s: hop %d is now %s, no longer %s%s", flow, number, self._label(now), self._label(before), more)

    def _new_destination(self, dest: str) -> Destination:
        self.name_of(dest)
        destination = self._destinations[dest] = Destination(self._tests)
        return destination

    def _new_hop(self, destination: Destination, number: int) -> Hop:
        if self.hops >= HOPS_MAX:
            self._make_room(destination)
        self.hops += 1
        hop = destination.hops[number] = Hop()
        return hop

    def _make_room(self, newest: Destination) -> None:
        """Forget a quarter of the destinations: those whose last probe is oldest."""
        self.forgotten += 1
        ordered = sorted(self._destinations.items(), key=lambda item: item[1].last_second)
        for dest, destination in ordered[: len(ordered) // 4 + 1]:
            if destination is not newest:
                self._probes_left_out += destination.probes
                self.hops -= len(destination.hops)
                del self._destinations[dest]

    def _new_flow(self, key: FlowKey, destination: Destination, probe: Record) -> Flow:
        """Return a new flow, in place of the oldest ones if there are too many.

        What it retransmitted before its first probe counts apart. Once flows have been forgotten, this may be one
        of them: then its retransmissions so far have been counted already.
        """
        if len(self._flows) >= FLOWS_MAX or self._flow_hops >= FLOW_HOPS_MAX:
            self.forgotten += 1
            self._flows_are_forgotten = True
            for oldest in list(itertools.islice(self._flows, len(self._flows) // 4 + 1)):
                self._flow_hops -= len(self._flows.pop(oldest).hops)
        retrans = probe.retrans or 0
        if not self._flows_are_forgotten:
            destination.retransmitted_before += retrans
        flow = self._flows[key] = Flow(probe.app, probe.pid, probe.source, retrans)
        return flow

    def _new_flow_hop(self, flow: Flow, number: int) -> FlowHop:
        self._flow_hops += 1
        of_flow = flow.hops[number] = FlowHop()
        return of_flow

    def tables(self, most: int = TABLES_MAX, columns: int | None = None) -> list[str]:
        """Return the lines of a table, with findings, for each of the destinations with most probes.

        With columns, no line is longer than that.
        """
        ordered = self.destinations()
        lines = [line.text for item in ordered[:most] for line in self.table(*item, columns)]
        if len(ordered) > most:
            lines.append(f"{len(ordered) - most} more destinations, with fewer probes each")
        if self._probes_left_out:
            left_out = f"{self._probes_left_out} probes to destinations not probed lately"
            lines.append(f"{left_out} are only in the rows")
        return lines

    def busiest(self) -> list[tuple[str, Destination]]:
        """Return the destinations, those with most probes lately first. Each call makes older probes count less."""
        lately = {dest: destination.probes_lately() for dest, destination in self._destinations.items()}
        return sorted(self._destinations.items(), key=lambda item: (-int(math.log2(lately[item[0]] + 1)), item[0]))

    def table(
        self, dest: str, destination: Destination, columns: int | None, flows: Iterable[Line] = ()
    ) -> Iterator[Line]:
        """Yield the table of a destination, with findings. flows are lines for below its heading."""
        is_narrow = columns is not None and columns < WIDE
        names = [name for name in Stats._fields if not (is_narrow and name in WIDE_ONLY)]
        answering = [number for number, hop in destination.hops.items() if hop.latency.count]
        heads = " ".join(f"{HEADS[name]:>8}" for name in names)
        yield Line("")
        for text in fitting(f"{self._label(dest)}: {destination.probes} probes, latency in ms", columns):
            yield Line(text)
        yield from flows
        yield Line(f"hop  probes answered {heads} {'adds':>8}  responder")
        for number, hop in sorted(destination.hops.items()):
            share = f"{number:3} {hop.probes:7} {hop.latency.count / hop.probes:8.1%}"
            if hop.latency.count:
                stats = hop.latency.stats()
                mark = Mark.NOTABLE if swings(stats) else Mark.NONE
                added = destination.adds(number) if self.has_paths else None
                adds = "-" if added is None else f"{added / 1e6:.3f}"
                for line in self._responders(hop, f"{share} {stats_text(stats, names)} {adds:>8}  "):
                    for text in fitting(line, columns):
                        yield Line(text, mark)
            else:
                last = " (or the destination)" if number > max(answering, default=0) else ""
                yield Line(f"{share}  unresponsive{last}", Mark.INACTIVE)
        if destination.srtt.count:
            resent = f"+{destination.retransmitted}, {destination.retransmitted_before} before"
            srtt = stats_text(destination.srtt.stats(), names)
            line = f"TCP {'':16} {srtt} {'':8}  round trip by the kernel (srtt); segments retransmitted: {resent}"
            for text in fitting(line, columns):
                yield Line(text)
        if not self.has_paths:
            return
        newest = itertools.islice(self.newest_flows(), FLOWS_LOOKED_AT)
        for way in ways_texts(ways_to(destination, (item for item in newest if item[0][0] == dest))):
            for text in fitting(way, columns):
                yield Line(text)
        for sentence in sentences(list(findings_on(destination)), self.when):
            for text in fitting(sentence, columns):
                yield Line(text, Mark.NOTABLE)

    def _responders(self, hop: Hop, start: str) -> Iterator[str]:
        """Yield the lines of a hop that answers: one for each responder, behind the start or below it."""
        (first, count), *others = hop.responders.most_common()
        more = f" {count / hop.latency.count:.0%}" if others else ""
        yield f"{start}{self._label(first)}{more}"
        shown = others[: RESPONDERS_SHOWN - 1]
        for other, count in shown:
            yield f"{'':{len(start)}}{self._label(other)} {count / hop.latency.count:.0%}"
        if len(others) > len(shown):
            yield f"{'':{len(start)}}and {len(others) - len(shown)} more"


def swings(stats: Stats) -> bool:
    """Return whether the latency is far above its median at times, as behind a queue that fills."""
    excess = stats.percentile95 - stats.median
    return excess > SWINGS_BY and stats.percentile95 > SWINGS_FACTOR * stats.median


def stats_text(stats: Stats, names: list[str]) -> str:
    """Return the named statistics in ms, in columns."""
    return " ".join(f"{getattr(stats, name) / 1e6:8.3f}" for name in names)
