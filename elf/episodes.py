# SPDX-License-Identifier: GPL-3.0-only
"""Episodes: times in which something on a path was slower than before, and where. docs/findings.md has the method.

    Watch       the rows of a destination, by way: the flows whose packets take the same routers
    Way         cuts the rows of a way into slices of time, compares each with the slices before, and follows runs
                of raised slices
    Episode     a run of raised slices: where, from when until when, how much, how sure

All of it is fed with answered probes, in any order that is at most as wrong as that of their arrival. Memory is
bounded: a way keeps REFERENCE_MAX values for each hop, and INSIDE_MAX slices of what goes on.
"""

from __future__ import annotations

import array
import collections
import dataclasses
import operator
from typing import Any, Callable, Iterable, Iterator, Sequence, Tuple

from elf.inference import fisher, median, median_interval, spearman, spearman_highest, superiority
from elf.losses import Losses
from elf.returns import ReturnChanges

SLICE_MIN = 50 * 10**6  # ns: a slice is at least so long ...
SLICE_PROBES = 3  # ... and has so many answers for each hop, ...
SLICE_MAX = 10 * 10**9  # ns: ... but is no longer than this
CELL_MAX = 32  # answers of a hop in a slice that are looked at
PAUSE = 10**9  # ns without an answer, which end a slice
REFERENCE_MIN = 20  # slices of a hop, from which on others are compared with them
KNOWN_MIN = 100  # quiet slices, from which on what is usual of a new way is kept
REFERENCE_MAX = 300  # the newest quiet ones, which are kept
NEW_MAX = 4 * REFERENCE_MIN  # slices up to which every fifth gives a new threshold
RENEWED_AFTER = 50  # quiet slices of a way, after which all thresholds are computed again
MARGIN = 500_000  # ns: a smaller rise is not worth a word ...
TCP_MARGIN = 750_000  # ... nor this of TCP's round trip, which the other end's own work is part of
USUAL = 0.975  # share of the quiet slices that are below the threshold
RAISED_MIN = 3  # slices of an episode
TOGETHER = 500 * 10**6  # ns between episodes that are one
QUIET_AFTER = 4  # quiet slices in a row end a run ...
QUIET_NS = 150 * 10**6  # ... if they last so long
WORTH_KEEPING = 0.001  # p of a single test, above which a run is forgotten
RECENT_MAX = 40  # newest slices, quiet or not
INSIDE_MAX = 128  # slices of a run that are kept: of longer ones every second, every fourth ...
LASTING = 600 * 10**9  # ns, from which on a higher level is the usual one
UPPER = 0.75  # place among the raised slices of the one that tells the level
VARIED = 1.5  # upper quartile of the congestion window by the lower one, from which on it may show in delays
STANDS_OUT = 0.9  # share of pairs of slices in which the step is above the variation in front
SRTT_GAIN = 8  # measurements over which TCP smooths its round trip
WAYS_MAX = 8  # of a destination
BALANCED_MIN, BALANCED_SHARE = 8, 1 / 16  # changes of a hop, and per answer, from which on it is several routers
CHANGES_MAX = 100  # of a destination
CHANGE_TOGETHER = 2 * 10**9  # ns: flows that change within this time change together
EPISODES_MAX = 200  # of a destination: the largest ones
WAIT_MIN, WAIT_MAX = 50 * 10**6, 2 * 10**9  # ns for which rows wait for those of probes that left before
TCP = 0  # number of the series of TCP's round trip, in place of a hop's

Row = Tuple[int, int, int, str, Any, Any, Any, Any]  # sendtime, hop, latency, responder, flow, srtt, cwnd, retrans
sendtime_of, latency_of = operator.itemgetter(0), operator.itemgetter(2)
InOrder = Callable[[Iterable[Sequence[float]]], Iterable[Sequence[float]]]


def all_sorted(all_values: Iterable[Sequence[float]]) -> Iterator[Sequence[float]]:
    """Yield each list of values in order."""
    return map(sorted, all_values)


@dataclasses.dataclass
class Episode:
    """Something was slower for a while."""

    begin: int  # ns, CLOCK_MONOTONIC
    end: int
    hop: int  # the first hop that was slower; 0: none, only TCP's round trip
    front: int  # the nearest hop in front of it that answers; 0: none
    size: float  # ns
    low: float  # between these with 95 %
    high: float
    p: float  # that it is by chance, of this test alone
    responders: dict[int, str]
    behind: list[int]  # further hops that answer
    slower: list[int]  # those of them that were slower, too
    tcp: float | None  # by how much TCP's round trip rose, ns; None: not known
    retransmitted: int  # segments, meanwhile
    own: tuple[float, float] | None = None  # correlation with the congestion window, and p that there is none
    own_highest: float | None = None  # with 97.5 % it is below; None: several flows, or the window hardly varied
    lasts: bool = False

    def meets(self, other: Episode) -> bool:
        return self.begin < other.end and other.begin < self.end

    @property
    def weight(self) -> float:
        return self.size * (self.end - self.begin)


@dataclasses.dataclass
class Change:
    """Flows changed from one way to another."""

    begin: int  # ns, CLOCK_MONOTONIC, of the first flow
    end: int  # of the last one
    hop: int  # the first one that differs
    before: str  # its responders
    after: str
    old: dict[int, tuple[float, float, float]]  # what was usual by hop: median_interval()
    was: Way
    new: Way
    hops: dict[int, str]  # those that differ, as far as is known, and who answers there now
    flows: int = 1
    now: dict[int, tuple[float, float, float]] | None = None  # what is usual of the new way, once that is known

    def settle(self) -> None:
        """Keep what is usual soon after the change: later, the new way may be slower for other reasons."""
        if self.now is None and self.new.is_known():
            self.now = self.new.usual()

    def rise(self) -> tuple[int, float, float, float] | None:
        """Return the farthest hop of both ways, and by how much its latency rose: between what with 95 % at least.

        None: too few values.
        """
        new = self.new.usual() if self.now is None else self.now
        far = max((number for number in self.old if number in new), default=TCP)
        if far == TCP:  # that of a socket that only receives stays the same
            return None
        (old, old_low, old_high), (now, low, high) = self.old[far], new[far]
        return far, now - old, low - old_high, high - old_low


class Snapshot:
    """What a slice of time showed, by hop."""

    __slots__ = ("begin", "end", "latency", "excess", "step", "window", "retrans", "updates", "flow")

    def __init__(
        self,
        begin: int,
        end: int,
        latency: dict[int, float],
        window: float | None,
        retrans: int,
        updates: int,
        flow: Any,
    ) -> None:
        self.begin, self.end = begin, end
        self.latency = latency  # medians, ns; [TCP]: its round trip
        self.excess: dict[int, float] = {}  # above what is usual
        self.step: dict[int, float] = {}  # excess over that of the hop in front
        self.window = window  # segments in flight, or allowed to be
        self.retrans = retrans  # segments, so far
        self.flow = flow  # whose window that is; None: of several
        self.updates = updates  # how often TCP's round trip was another one than before


class Reference:
    """The newest quiet values of something: what is usual."""

    __slots__ = ("values", "usual", "threshold")

    def __init__(self) -> None:
        self.values = array.array("d")
        self.usual: float | None = None  # the median; None: too few values yet
        self.threshold = 0.0

    @property
    def is_new(self) -> bool:
        """Whether each value may change what is usual: otherwise only renew() does."""
        return len(self.values) < NEW_MAX

    def add(self, value: float) -> None:
        self.values.append(value)
        count = len(self.values)
        if count >= REFERENCE_MAX + RENEWED_AFTER:
            del self.values[:RENEWED_AFTER]
        if count <= NEW_MAX and not count % 5:
            self.renew(sorted(self.values))

    def add_all(self, values: bytes) -> None:
        """Do what add() does for each of up to RENEWED_AFTER values (C doubles), where it is not new."""
        self.values.frombytes(values)
        if len(self.values) >= REFERENCE_MAX + RENEWED_AFTER:
            del self.values[:RENEWED_AFTER]

    def renew(self, ordered: Sequence[float]) -> None:
        """Compute usual value and threshold from the values, in order. With fewer than REFERENCE_MIN, keep both."""
        if len(ordered) >= REFERENCE_MIN:
            self.usual = float(median(ordered))
            self.threshold = max(float(ordered[int(USUAL * (len(ordered) - 1))]), self.usual + MARGIN)


class Run:
    """Raised slices one behind the other, with few others between them."""

    __slots__ = ("inside", "count", "raised", "quiet", "quiet_since", "end", "_every")

    def __init__(self) -> None:
        self.inside: list[Snapshot] = []
        self.count = self.raised = self.quiet = self.quiet_since = self.end = 0
        self._every = 1

    def add(self, snapshot: Snapshot, is_raised: bool) -> None:
        self.count += 1
        if self.count % self._every == 0 or not self.inside:
            self.inside.append(snapshot)
            if len(self.inside) > INSIDE_MAX:
                del self.inside[1::2]
                self._every *= 2
        if is_raised:
            self.raised += 1
            self.quiet, self.end = 0, snapshot.end
        else:
            self.quiet_since = self.quiet_since if self.quiet else snapshot.begin
            self.quiet += 1

    def is_over(self, now: int) -> bool:
        return self.quiet >= QUIET_AFTER and now - self.quiet_since >= QUIET_NS

    def slices(self) -> list[Snapshot]:
        """Return those until the last raised one."""
        return [each for each in self.inside if each.end <= self.end]


@dataclasses.dataclass
class Comparisons:
    """How many slices of time a run has compared with others."""

    count: int = 0


class Way:
    """The flows to a destination whose packets take the same routers."""

    __slots__ = (
        "responders", "episodes", "tests", "due", "begin", "last", "cells", "srtts", "windows", "retrans", "flow",
        "is_over", "latencies", "steps", "quiet", "renewals", "runs", "recent", "_held",
    )  # fmt: skip

    def __init__(self, responders: dict[int, str], tests: Comparisons) -> None:
        self.responders = responders
        self.episodes: list[Episode] = []
        self.tests = tests
        self.is_over = False  # it made room for another way: flows may still name it, but it keeps nothing
        self.begin = self.due = self.last = 0
        self.cells: dict[int, list[int]] = {}
        self.srtts: list[int] = []
        self.windows: list[int] = []
        self.flow: Any = None  # of the windows; False: several
        self.retrans = 0
        self.latencies: dict[int, Reference] = {}
        self.steps: dict[int, Reference] = {}
        self.quiet = self.renewals = 0  # slices that were added to these; calls of renew()
        self.runs: dict[int, Run] = {}
        self.recent: collections.deque[Snapshot] = collections.deque(maxlen=RECENT_MAX)
        self._held: list[Snapshot] = []  # since the oldest run began

    def note(self, rows: Sequence[Row]) -> None:
        """Add answered probes in the order in which they left. Those that left before former ones do not count."""
        if self.is_over:
            return
        due, last, cells = self.due, self.last, self.cells
        for sendtime, number, latency, _, flow, srtt, window, retrans in rows:
            if sendtime >= due:
                self.last = last
                self._cut(sendtime)
                due, cells = self.due, self.cells
            elif sendtime < last:
                continue
            last = sendtime
            cell = cells.get(number)
            if cell is None:
                cells[number] = [latency]
            elif len(cell) < CELL_MAX:
                cell.append(latency)
            if window is not None:
                if srtt is not None:
                    self.srtts.append(srtt)
                self.windows.append(window)
                if flow is not self.flow:
                    self.flow = flow if self.flow is None else False
                if retrans and retrans != flow.counted:
                    if retrans > flow.counted >= 0:
                        self.retrans += retrans - flow.counted
                    flow.counted = retrans
        self.last = last

    def _cut(self, now: int) -> None:
        """End the slice, if it is long enough and has enough answers; otherwise it goes on."""
        answers = sum(map(len, self.cells.values()))
        is_enough = answers >= SLICE_PROBES * len(self.cells)
        if is_enough or now - self.last > PAUSE or now - self.begin > SLICE_MAX:
            self._end(answers)
            self.begin, self.due = now, now + SLICE_MIN
        else:
            self.due = now + SLICE_MIN // 4

    def end_slice(self) -> None:
        """End the slice that goes on."""
        self._end(sum(map(len, self.cells.values())))

    def _end(self, answers: int) -> None:
        if answers:
            latency: dict[int, float] = {number: median(sorted(cell)) for number, cell in self.cells.items()}
            updates = sum(map(operator.ne, self.srtts, self.srtts[1:])) + 1
            if self.srtts:
                latency[TCP] = median(sorted(self.srtts)) * 1000
            window = sum(self.windows) / len(self.windows) if self.windows else None
            self.add_slice(
                Snapshot(self.begin, self.last, latency, window, self.retrans, updates, self.flow or None)
            )
        self.cells, self.srtts, self.windows, self.flow = {}, [], [], None

    def add_slice(self, snapshot: Snapshot) -> None:
        """Compare a slice with those before, hop by hop."""
        self._set_steps(snapshot)
        self.compare(snapshot)

    def compare(self, snapshot: Snapshot) -> None:
        """Compare a slice, of which excess and steps are known, with those before."""
        raised = []
        for series, step in snapshot.step.items():
            reference = self.steps.get(series)
            if reference is not None and reference.usual is not None:
                self.tests.count += 1
                if step > reference.threshold:
                    raised.append(series)
        self.follow(snapshot, raised)

    def follow(self, snapshot: Snapshot, raised: Sequence[int]) -> None:
        """Add a slice, of which these series are raised, to the runs or to what is usual."""
        runs = self.runs
        for series in raised:
            if series not in runs:
                runs[series] = Run()
        for series, run in runs.items():
            if series in snapshot.step:
                run.add(snapshot, series in raised)
        self.recent.append(snapshot)
        if not runs:
            self._add_quiet(snapshot)
            return
        self._held.append(snapshot)
        if len(self._held) > 2 * INSIDE_MAX:
            del self._held[1::2]  # the first one tells since when
        for series in [series for series, run in runs.items() if run.is_over(snapshot.end)]:
            self._close(series, runs.pop(series))
        if runs and snapshot.end - self._held[0].begin > LASTING:
            self._adopt()
        if not runs:
            quiet, self._held = self._held, []
            last = max((each.end for each in self.episodes), default=0)
            for each in quiet:
                if each.begin >= last:
                    self._add_quiet(each)

    def _set_steps(self, snapshot: Snapshot) -> None:
        front = 0.0
        snapshot.step = {}
        excess = snapshot.excess = {}
        for number in sorted(snapshot.latency):
            reference = self.latencies.get(number)
            if reference is None or reference.usual is None:
                continue
            excess[number] = its = snapshot.latency[number] - reference.usual
            if number != TCP:
                snapshot.step[number] = its - front
                front = its
        if TCP in excess and len(excess) > 1:
            # TCP smooths its round trip, so it still rises and falls when the hops no longer do.
            since = snapshot.begin - SRTT_GAIN * int(snapshot.latency[TCP]) - QUIET_NS
            most = front
            for each in reversed(self.recent):
                if each.end < since:
                    break
                if each.excess:
                    most = max(most, each.excess[max(each.excess)])
            snapshot.step[TCP] = excess[TCP] - most

    def _add_quiet(self, snapshot: Snapshot) -> None:
        is_new = False
        for number, latency in snapshot.latency.items():
            reference = self.latencies.get(number)
            if reference is None:
                reference = self.latencies[number] = Reference()
            was_unknown = reference.usual is None
            reference.add(latency)
            is_new |= was_unknown and reference.usual is not None
        if is_new:  # what is usual of a hop is known now: so are the steps of the slices so far
            for each in self.recent:
                known = set(each.step)
                self._set_steps(each)
                for number in set(each.step) - known:
                    self.steps.setdefault(number, Reference()).add(each.step[number])
        else:
            for number, step in snapshot.step.items():
                self.steps.setdefault(number, Reference()).add(step)
        self.quiet += 1
        if self.until_renewal == RENEWED_AFTER:
            self.renew()

    @property
    def until_renewal(self) -> int:
        """Number of quiet slices until the next renew(): the last of them calls it.

        Until then, only thresholds of series with few values change (Reference.is_new).
        """
        return RENEWED_AFTER - (self.quiet - NEW_MAX) % RENEWED_AFTER

    def renew(self, in_order: InOrder = all_sorted) -> None:
        """Compute the usual values and thresholds of all series again.

        in_order sorts each list of values, at least at the indexes that Reference.renew() reads.
        """
        references = [*self.latencies.values(), *self.steps.values()]
        for reference, ordered in zip(references, in_order(each.values for each in references)):
            reference.renew(ordered)
        self.renewals += 1

    def _adopt(self) -> None:
        """Take the level that lasts as the usual one."""
        for series, run in self.runs.items():
            self._close(series, run)
        self.latencies, self.steps, self.runs, self.quiet = {}, {}, {}, 0
        self.recent.clear()
        held, self._held = self._held[-REFERENCE_MAX:], []
        for each in held:
            each.step = {}
            self._add_quiet(each)

    def _close(self, series: int, run: Run) -> None:
        self.episodes = largest([*self.episodes, *self._episodes_of(series, run)])

    def usual(self) -> dict[int, tuple[float, float, float]]:
        """Return the medians of the quiet slices by hop, each with its interval."""
        found = {}
        for number, reference in self.latencies.items():
            if reference.usual is not None:
                found[number] = median_interval(list(reference.values))
        return found

    def is_known(self) -> bool:
        """Return whether there are enough quiet slices of all hops."""
        known = self.latencies.values()
        return bool(known) and all(len(each.values) >= KNOWN_MIN for each in known)

    def forget(self) -> None:
        """Forget all but the episodes."""
        self.episodes = self.all_episodes()
        self.cells, self.srtts, self.windows = {}, [], []
        self.latencies, self.steps, self.runs, self._held = {}, {}, {}, []
        self.recent.clear()

    def all_episodes(self) -> list[Episode]:
        """Return the episodes, with those that still last."""
        found = list(self.episodes)
        for series, run in self.runs.items():
            found += (dataclasses.replace(its, lasts=its.end == run.end) for its in self._episodes_of(series, run))
        return found

    def _episodes_of(self, series: int, run: Run) -> Iterator[Episode]:
        """Yield what a run of raised slices shows: one episode for each level that is no chance."""
        for inside in levels(series, run.slices(), self.steps[series]):
            episode = self._episode(series, inside)
            if episode:
                yield episode

    def _episode(self, series: int, inside: list[Snapshot]) -> Episode | None:
        """Return the episode that raised slices show, None if they may be chance."""
        reference = self.steps[series]
        raised = sum(each.step.get(series, 0.0) > reference.threshold for each in inside)
        if raised < RAISED_MIN:
            return None
        count, usual = len(inside), reference.values
        others, others_raised = len(usual), sum(value > reference.threshold for value in usual)
        if series == TCP:  # only slices between which it was measured often enough are independent
            measured = sum(each.updates for each in inside)
            independent = min(max(measured // SRTT_GAIN, 1), count)
            raised, count = raised * independent // count, independent
        p = fisher(raised, count, others_raised, others)
        if p > WORTH_KEEPING:
            return None
        return self._measured(series, inside, p)

    def _measured(self, series: int, inside: list[Snapshot], p: float) -> Episode | None:
        """Return the episode that raised slices of a series show. p: that they are chance.

        None: its rise may be below MARGIN (TCP_MARGIN), or does not stand out from the variation in front.
        """
        numbers = sorted({number for each in inside for number in each.excess} - {TCP})
        if series == TCP:
            front, hop, behind = numbers[-1], TCP, []
        else:
            front = max((number for number in numbers if number < series), default=0)
            hop, behind = series, [number for number in numbers if number > series]

        def rise(number: int) -> list[float]:
            return [
                each.excess[number] - (each.excess[front] if front else 0.0)
                for each in inside
                if number in each.excess and (front in each.excess or not front)
            ]

        values = rise(hop)
        if len(values) < RAISED_MIN:
            return None
        size, low, high = median_interval(values)
        noise = [each.excess[front] for each in inside if front in each.excess] if front else []
        if low < (TCP_MARGIN if series == TCP else MARGIN) or not stands_out(values, noise):
            return None
        slower, told = [], []
        for number in behind:
            its = rise(number)
            if len(its) >= min(RAISED_MIN, len(values)):
                told.append(number)
                if median(sorted(its)) > size / 2:
                    slower.append(number)
        tcp = [each.excess[TCP] for each in inside if TCP in each.excess]
        begin = inside[0].begin
        before = [each for each in self.recent if each.end <= begin]
        start = before[-1].retrans if before else inside[0].retrans
        return Episode(
            begin, inside[-1].end, hop, front, size, low, high, p, dict(self.responders), told, slower,
            median(sorted(tcp)) if tcp else None, inside[-1].retrans - start, *self._own(series, before, inside),
        )  # fmt: skip

    @staticmethod
    def _own(
        series: int, before: Sequence[Snapshot], inside: Sequence[Snapshot]
    ) -> tuple[tuple[float, float] | None, float | None]:
        """Return spearman() of congestion window and step, and spearman_highest() of them.

        They are of the slices inside and as many before. None, None: the window is not known. The second is None
        alone if there are several flows, or the window hardly varied.
        """
        known = [
            each for each in [*before[-len(inside) :], *inside] if each.window is not None and series in each.step
        ]
        if not known:
            return None, None
        windows, steps = [each.window or 0.0 for each in known], [each.step[series] for each in known]
        ordered = sorted(windows)
        varied = ordered[3 * len(ordered) // 4] >= VARIED * ordered[len(ordered) // 4]
        flows = {id(each.flow) for each in known}
        highest = spearman_highest(windows, steps) if varied and len(flows) == 1 and known[0].flow else None
        return spearman(windows, steps), highest


class Watch:
    """The answered probes of a destination that wait, its ways, and the changes between ways."""

    __slots__ = ("rows", "tests", "changes", "balanced", "newest", "losses", "returns", "_ways", "_past")

    def __init__(self, tests: Comparisons) -> None:
        self.rows: list[Row] = []
        self.newest = 0  # ns: sendtime of the newest row so far
        self.tests = tests
        self.losses = Losses(tests)
        self.returns = ReturnChanges()
        self._ways: list[Way] = []  # the one of the newest answer last
        self._past: list[Episode] = []  # of ways that were forgotten
        self.changes: list[Change] = []  # the first ones
        self.balanced: set[int] = set()  # hops that are several routers in turn

    def digest(self, hops: dict[int, Any], is_over: bool) -> None:
        """Give the rows that wait to their ways. The newest rows wait on, because answers to older probes may come.

        With is_over, none wait on. hops: of the destination, by number.
        """
        rows = self.rows
        if not rows:
            return
        rows.sort(key=sendtime_of)
        self.newest = max(self.newest, rows[-1][0])
        wait = 0 if is_over else min(max(map(latency_of, rows)) + WAIT_MIN, WAIT_MAX)
        until = rows[-1][0] - wait
        ready = len(rows)
        while ready and rows[ready - 1][0] > until:
            ready -= 1
        before, start = None, 0  # the way of the rows before, and which of them it has not got yet
        for place in range(ready):
            row = rows[place]
            way = row[4].way
            if way is None or way.responders.get(row[1]) != row[3]:
                way = self.settle(row, hops)
            if way is not before:
                if before:
                    before.note(rows[start:place])
                before, start = way, place
        if before:
            before.note(rows[start:ready])
        self.settle_changes()
        del rows[:ready]

    def settle_changes(self) -> None:
        """Keep what is usual of new ways."""
        for change in self.changes:
            change.settle()

    @property
    def is_full(self) -> bool:
        """Whether a new way takes the place of another one."""
        return len(self._ways) >= WAYS_MAX

    def forget(self) -> None:
        """Forget all but the episodes and the changes."""
        for way in self._ways:
            way.forget()
        self.losses.forget()

    def settle(self, row: Row, hops: dict[int, Any]) -> Way:
        """Return the way of the row's flow. Call this if the way has no responder at the hop, or another one.

        The flow may change to another way, or to a new one. A new way may take the place of the oldest.
        """
        number, responder, flow = row[1], row[3], row[4]
        way: Way | None = flow.way
        if way is None or number in way.responders:
            hop = hops.get(number)
            if way is not None and hop and hop.changes > max(BALANCED_MIN, BALANCED_SHARE * hop.latency.count):
                if number not in self.balanced:
                    self.balanced.add(number)
                    self.changes = [change for change in self.changes if change.hop != number]
                return way
            nearer = {} if way is None else {near: its for near, its in way.responders.items() if near < number}
            found = [
                each
                for each in self._ways
                if each.responders.get(number, responder) == responder
                and all(each.responders.get(near, its) == its for near, its in nearer.items())
            ]
            way = found[-1] if found else Way(nearer, self.tests)
            old, flow.way = flow.way, way
            if old is not None and flow.hops[number].before and old is not way:
                self._note_change(row, old, way)
        way.responders.setdefault(number, responder)
        if not self._ways or self._ways[-1] is not way:
            self._ways = [each for each in self._ways if each is not way] + [way]
            if len(self._ways) > WAYS_MAX:
                oldest = self._ways.pop(0)
                self._past = largest(self._past + oldest.all_episodes())
                oldest.forget()
                oldest.episodes, oldest.is_over = [], True
        return way

    def _note_change(self, row: Row, old: Way, new: Way) -> None:
        sent, number = row[0], row[1]
        last = self.changes[-1] if self.changes else None
        is_near = last is not None and sent - last.end < CHANGE_TOGETHER
        # The same flow: a further hop, or one that has told, of a way with other routers in between.
        goes_on = last is not None and last.new is old and last.hops.get(number, row[3]) == row[3]
        if last and is_near and (last.new is new or goes_on):
            last.end = max(last.end, sent)
            last.flows += not goes_on
            last.hops[number] = row[3]
            if number < last.hop:
                last.hop, last.before, last.after = number, old.responders[number], row[3]
            last.new = new
        elif len(self.changes) < CHANGES_MAX:
            before = old.responders[number]
            self.changes.append(Change(sent, sent, number, before, row[3], old.usual(), old, new, {number: row[3]}))

    def episodes(self) -> list[Episode]:
        """Return the episodes of all ways, in the order of time."""
        found = [*self._past, *(episode for way in self._ways for episode in way.all_episodes())]
        of_hops = [each for each in found if each.hop != TCP]
        found = of_hops + [
            each
            for each in found
            if each.hop == TCP and not any(its.size > 2 * each.size and its.meets(each) for its in of_hops)
        ]  # TCP and the hops measure the same delay a little differently
        return joined([each for each in found if not is_explained(each, of_hops)])


def is_explained(episode: Episode, others: Sequence[Episode]) -> bool:
    """Return whether a nearer hop was slower at the same time, and only the hop in front of this one was not."""
    return any(
        its.hop < episode.front and episode.hop in its.slower and episode.front not in its.slower
        and its.meets(episode) and is_like(its.size, episode.size)
        for its in others
    )  # fmt: skip


def joined(episodes: list[Episode]) -> list[Episode]:
    """Return episodes in the order of time. Those at one place with nearly the same level and no gap are one."""
    found: list[Episode] = []
    newest: dict[Any, int] = {}  # places in found, by what was slower
    for each in sorted(episodes, key=lambda each: each.begin):
        place = each.hop, tuple(each.slower)
        before = found[newest[place]] if place in newest else None
        if before and each.begin - before.end < TOGETHER and is_like(before.size, each.size):
            larger = max(before, each, key=lambda its: its.weight)
            found[newest[place]] = dataclasses.replace(
                larger,
                begin=before.begin,
                end=max(before.end, each.end),
                p=min(before.p, each.p),
                lasts=each.lasts,
                retransmitted=before.retransmitted + each.retransmitted,
            )
        else:
            newest[place] = len(found)
            found.append(each)
    return found


def is_like(size: float, other: float) -> bool:
    """Return whether the smaller one is nearer to the larger one than to zero."""
    return 2 * min(size, other) > max(size, other)


def levels(series: int, slices: list[Snapshot], reference: Reference) -> Iterator[list[Snapshot]]:
    """Yield the parts of a run that have levels of their own, the highest one first.

    A slice belongs to a level if it is nearer to it than to what is usual. The part is the maximal scoring segment:
    slices that belong to the level count 1, others -1.
    """
    usual = reference.usual or 0.0
    rises = [each.step.get(series, usual) - usual for each in slices]
    raised = sorted(rise for rise in rises if rise > reference.threshold - usual)
    if len(raised) < RAISED_MIN:
        return
    half = raised[int(UPPER * (len(raised) - 1))] / 2
    score = most = begin = first = last = 0
    for place, rise in enumerate(rises):
        if score <= 0:
            score, begin = 0, place
        score += 1 if rise > half else -1
        if score > most:
            most, first, last = score, begin, place + 1
    yield slices[first:last]
    yield from levels(series, slices[:first], reference)
    yield from levels(series, slices[last:], reference)


def stands_out(steps: list[float], front: list[float]) -> bool:
    """Return whether the steps are clearly more than the excess in front varies by: a busy time is no shift."""
    if not front:
        return True
    usual = median(sorted(front))
    return superiority(steps, [each - usual for each in front]) >= STANDS_OUT


def largest(episodes: list[Episode]) -> list[Episode]:
    """Return the largest EPISODES_MAX."""
    return sorted(episodes, key=lambda each: -each.weight)[:EPISODES_MAX]
