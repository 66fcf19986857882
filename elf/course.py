# SPDX-License-Identifier: GPL-3.0-only
"""The latencies to a destination over time, as a picture shows them. Memory does not grow with the number of rows.

Cells               counts of latencies by line and bin: exact while there are few cells, then rounded by up to 1 %
Course              a destination, fed in bulk; lines(), by_bin() and flows() return what is to be drawn

A bin is an interval of time. A line is a responder at a hop. A cell is a latency in a bin of a line, and its count.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
from typing import Any, Iterator

import numpy as np

from elf.addresses import PROTOCOLS
from elf.batches import Batch
from elf.groups import Groups
from elf.summary import FlowKey

SECOND = 10**9  # ns
STEPS = [m * 10**e for e in range(3, 10) for m in (1, 2, 5)] + [
    s * SECOND for s in (10, 15, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400, 21600, 43200, 86400)
]  # ns: widths of bins, distances between ticks
BINS_MAX, SMALL_BINS = 300, 75  # most bins in the span that the survey saw; the same of a small course
POINTS_MAX, POINTS_LINES = 2000, 64  # points kept of each of up to 64 lines; of more lines, fewer of each
RANKS_MAX = 3  # responders of a hop that have a line of their own
RESPONDERS_MAX = 64  # responders of a hop that are counted separately; all further ones are counted together
FLOWS_MAX = 1 << 15  # flows whose retransmissions are followed; above it, the one with the oldest row is forgotten
FLOWS_TOLD = 32  # flows of a destination that are counted separately: the first ones
NAMES_MAX = 1000  # most applications that are counted, and most pairs of protocol and port

# Answers wait to be counted until there are more of them than WAITING_MIN and than this share of the cells.
WAITING_MIN, WAITING_SHARE = 1 << 10, 1 / 8
EXACT_MAX, SMALL_EXACT_MAX = 1 << 19, 1 << 14  # with more cells, latencies are rounded ...
CELLS_MAX, SMALL_CELLS_MAX = 1 << 19, 1 << 15  # ... and with more rounded ones, bins become wider, ...
FEW_BINS = 16  # ... as long as there are more bins than this
STEP = np.log(1.02)  # between the logarithms of rounded latencies
LATENCY_BITS, BIN_BITS = 36, 11  # of a 64-bit key, lowest first; the line's number is above them
LATENCY_MAX, BINS = (1 << LATENCY_BITS) - 1, 1 << BIN_BITS
BIN_ZERO = BINS // 4  # index of bin 0 in arrays; room below it for rows that are older than those of the survey
QUANTILES = 0.05, 0.25, 0.5, 0.75, 0.95


def round_up(ns: float) -> int:
    """Return the lowest of STEPS that is not below ns. Above the last one: the next whole number of days, in ns."""
    return next((step for step in STEPS if step >= ns), -int(-ns // (86400 * SECOND)) * 86400 * SECOND)


def bin_width(span: int, probes: float) -> int:
    """Return the width of a bin, ns. span: ns. probes: the number of probes to a hop in this span.

    There are 40 to BINS_MAX bins, if possible with 8 probes in each. With up to 40 probes there are BINS_MAX, so
    that most probes have a bin of their own. The width is rounded up, so there may be fewer bins.
    """
    bins = BINS_MAX if probes <= 40 else min(max(probes / 8, 40), BINS_MAX)
    return round_up((span or SECOND) / bins)


def rounded(latencies: Any) -> Any:
    """Return latencies (ns), from 200 ns on rounded to steps of 2 %. Rounding again changes nothing."""
    near = np.rint(np.exp(np.rint(np.log(np.maximum(latencies, 1)) / STEP) * STEP)).astype(np.int64)
    return np.where(latencies < 200, latencies, near)


def quantiles(values: Any, counts: Any, starts: Any, shares: Any) -> Any:
    """Return quantiles of groups of values: an array with a row for each group and a column for each share.

    values: of all groups, sorted within each group. counts: how often each value occurs. starts: the index of each
    group's first value. Between two values it interpolates linearly, the default of numpy.quantile().
    """
    upto = np.cumsum(counts)
    before = np.concatenate([[0], upto])[starts]
    totals = np.add.reduceat(counts, starts)
    places = (totals[:, None] - 1) * np.asarray(shares)
    low = np.floor(places).astype(np.int64)
    high = np.minimum(low + 1, totals[:, None] - 1)
    lower, upper = (values[np.searchsorted(upto, before[:, None] + at, "right")] for at in (low, high))
    return lower + (upper - lower) * (places - low)


@dataclasses.dataclass
class Bins:
    """Figures by bin: arrays of the same length. Times are ns since Course.start, latencies ns."""

    number: Any  # from 0 at Course.start; below 0 before
    t: Any  # mean of the times at which the probes left
    low: Any
    median: Any
    high: Any  # low and high are the quartiles
    max: Any
    count: Any

    def __len__(self) -> int:
        return len(self.number)


@dataclasses.dataclass
class Line:
    """The answers of one responder at a hop, or of all responders beyond the RANKS_MAX busiest. Latencies in ns."""

    hop: int
    responder: str
    rank: int  # among the hop's responders, from 0: the one with the most answers
    spread: list[float]  # QUANTILES of all its latencies
    bins: Bins
    points: tuple[Any, Any]  # times, latencies: a sample, and the slowest answer of each bin
    values: tuple[Any, Any]  # latencies in order, and how often each occurs


class Cells:
    """How often each latency occurs, by line and bin. Also by line and bin: sum of times, slowest answer."""

    def __init__(self, exact_max: int, cells_max: int) -> None:
        self._is_exact = True
        self._exact_max, self._cells_max = exact_max, cells_max
        self._waiting: list[Any] = []  # arrays of key, latency, time
        self._waiting_count = 0
        self._keys = np.zeros(0, np.int64)  # line, bin, latency
        self._counts = np.zeros(0, np.int64)
        # By line and bin:
        self._bins = np.zeros(0, np.int64)
        self._times = np.zeros(0)  # sums of times
        self._slowest = np.zeros((2, 0), np.int64)  # latency, time

    def add(self, lines: Any, bins: Any, latencies: Any, times: Any) -> None:
        keys = (lines << BIN_BITS | bins) << LATENCY_BITS | np.minimum(latencies, LATENCY_MAX)
        self._waiting.append(np.array([keys, latencies, times]))
        self._waiting_count += len(keys)
        if self._waiting_count > max(WAITING_MIN, len(self._keys) * WAITING_SHARE):
            self._count()

    @property
    def is_exact(self) -> bool:
        """Whether latencies are as in the rows: not rounded."""
        self._count()
        return self._is_exact

    @property
    def is_full(self) -> bool:
        """Whether there are too many cells, although latencies are rounded. Answers that wait do not count."""
        return len(self._keys) > self._cells_max

    def __len__(self) -> int:
        self._count()
        return len(self._keys)

    def _count(self) -> None:
        """Count the answers that wait. This takes as long as reading all cells, however few wait."""
        if not self._waiting_count:
            return
        keys, latencies, times = np.concatenate(self._waiting, axis=1)
        self._waiting, self._waiting_count = [], 0
        order = np.argsort(keys)
        keys, times = keys[order], times[order]
        in_bin = keys >> LATENCY_BITS
        starts = np.flatnonzero(np.diff(in_bin, prepend=-1))
        ends = np.append(starts[1:], len(keys)) - 1
        slowest = np.array([latencies[order[ends]], times[ends]])
        self._merge_bins(in_bin[starts], np.add.reduceat(times.astype(float), starts), slowest)
        if not self._is_exact:
            keys = keys & ~LATENCY_MAX | rounded(keys & LATENCY_MAX)
        self._merge(keys, np.ones(len(keys), np.int64))
        if self._is_exact and len(self._keys) > self._exact_max:
            self._is_exact = False
            keys, counts = self._keys, self._counts
            self._keys = self._counts = np.zeros(0, np.int64)
            self._merge(keys & ~LATENCY_MAX | rounded(keys & LATENCY_MAX), counts)

    def _merge(self, keys: Any, counts: Any) -> None:
        starts = np.flatnonzero(np.diff(keys, prepend=-1)) if (np.diff(keys) >= 0).all() else None
        if starts is not None:
            keys, counts = keys[starts], np.add.reduceat(counts, starts)
        keys, counts = np.concatenate([self._keys, keys]), np.concatenate([self._counts, counts])
        order = np.argsort(keys, kind="stable")
        keys, counts = keys[order], counts[order]
        starts = np.flatnonzero(np.diff(keys, prepend=-1))
        self._keys, self._counts = keys[starts], np.add.reduceat(counts, starts)

    def _merge_bins(self, bins: Any, times: Any, slowest: Any) -> None:
        bins, times = np.concatenate([self._bins, bins]), np.concatenate([self._times, times])
        slowest = np.concatenate([self._slowest, slowest], axis=1)
        order = np.lexsort((slowest[0], bins))
        bins, times, slowest = bins[order], times[order], slowest[:, order]
        starts = np.flatnonzero(np.diff(bins, prepend=-1))
        ends = np.append(starts[1:], len(bins)) - 1
        self._bins, self._times, self._slowest = bins[starts], np.add.reduceat(times, starts), slowest[:, ends]

    def fold(self) -> None:
        """Make the bins twice as wide: join pairs of them, so that bin 0 keeps its start."""

        def folded(places: Any) -> Any:
            lines, bins = places >> BIN_BITS, places & (BINS - 1)
            return lines << BIN_BITS | (bins - BIN_ZERO >> 1) + BIN_ZERO

        self._count()
        keys, counts, bins, times, slowest = self._keys, self._counts, self._bins, self._times, self._slowest
        self._keys, self._counts, self._bins = (np.zeros(0, np.int64) for _ in range(3))
        self._times, self._slowest = np.zeros(0), np.zeros((2, 0), np.int64)
        if not len(keys):
            return
        self._merge(folded(keys >> LATENCY_BITS) << LATENCY_BITS | keys & LATENCY_MAX, counts)
        self._merge_bins(folded(bins), times, slowest)

    def counts(self, lines: list[int]) -> tuple[Any, Any, Any]:
        """Return bins, latencies (ns) and counts of these lines together: arrays, sorted by bin, then by latency.

        A latency that several lines have in a bin occurs once for each line.
        """
        self._count()
        which = np.isin(self._keys >> LATENCY_BITS + BIN_BITS, lines)
        keys, counts = self._keys[which] & (1 << LATENCY_BITS + BIN_BITS) - 1, self._counts[which]
        order = np.argsort(keys, kind="stable")
        keys, counts = keys[order], counts[order]
        return (keys >> LATENCY_BITS) - BIN_ZERO, keys & LATENCY_MAX, counts

    def of_lines(self, lines: list[int]) -> tuple[Bins, tuple[Any, Any], tuple[Any, Any]]:
        """Return the figures by bin of these lines together, the slowest answer of each bin (times, latencies), and
        how often each latency occurs (latencies in order, counts). Raises IndexError if they have no answer."""
        bins, values, counts = self.counts(lines)
        starts = np.flatnonzero(np.diff(bins, prepend=bins[0] - 1))
        quarters = quantiles(values, counts, starts, (0.25, 0.5, 0.75)).T
        totals = np.add.reduceat(counts, starts)
        which = np.isin(self._bins >> BIN_BITS, lines)
        bins, times, slowest = self._bins[which] & (BINS - 1), self._times[which], self._slowest[:, which]
        order = np.lexsort((slowest[0], bins))
        bins, times, slowest = bins[order], times[order], slowest[:, order]
        at = np.flatnonzero(np.diff(bins, prepend=-1))
        slowest = slowest[:, np.append(at[1:], len(bins)) - 1]
        mean = np.add.reduceat(times, at) / totals
        order = np.argsort(values, kind="stable")
        low, median, high = quarters
        figures = Bins(bins[at] - BIN_ZERO, mean, low, median, high, slowest[0], totals)
        return figures, (slowest[1], slowest[0]), (values[order], counts[order])


class Course:
    """The rows of a destination. Times are ns of the picture's clock. Bin 0 begins at start. width: of a bin, ns.

    2**folds of these bins make one bin of the picture: coarse() joins them. With is_small, latencies are rounded
    sooner, and no points are kept.
    """

    def __init__(
        self,
        dest: str,
        start: int,
        width: int,
        by: str = "dest",
        folds: int = 0,
        is_small: bool = False,
        share: int = 1,
    ) -> None:
        """share: this number of courses together may have as many cells as one."""
        self.dest = dest
        self.name = f"to {dest}" if by == "dest" else dest  # otherwise dest is another key, see elf/sources.py
        self.start = start
        self.width = width
        self.folds = folds
        self.first, self.last = 1 << 62, 0  # when the first and the last probe left
        self.probes = self.answered = 0
        self.fastest, self.slowest = 1 << 62, 0  # ns
        self.apps: collections.Counter[str] = collections.Counter()
        self.kinds: collections.Counter[tuple[int, int]] = collections.Counter()  # protocol and port
        limits = (SMALL_EXACT_MAX, SMALL_CELLS_MAX) if is_small else (EXACT_MAX, CELLS_MAX)
        self._cells, self._srtt = (Cells(*(limit // share for limit in limits)) for _ in range(2))
        self._points_max = 0 if is_small else POINTS_MAX
        self._by_hop: dict[int, Any] = {}  # arrays of 2 rows: probes and unanswered probes by bin
        self._lines: dict[tuple[int, str], int] = {}
        self._counts: list[int] = []  # answers by line
        self._points: list[Any] = []  # by line: priority, time, latency
        self._random = np.random.default_rng(1)
        self._flows: dict[FlowKey, tuple[int, int]] = {}  # newest row: time, segments retransmitted
        self._told: dict[FlowKey, int] = {}  # flows that are counted separately, each with its line of _srtt
        self._retrans: dict[int, Any] = {}  # by line of _srtt: segments retransmitted, by bin

    def add(self, batch: Batch, times: Any) -> None:
        """Add rows to this destination. times: when each probe left."""
        self.first, self.last = min(self.first, int(times.min())), max(self.last, int(times.max()))
        while (
            not -BIN_ZERO
            <= (self.first - self.start) // self.width
            <= ((self.last - self.start) // self.width)
            < BINS - BIN_ZERO
        ):
            self._fold()
        since = times - self.start
        bins = since // self.width + BIN_ZERO
        self._count_names(batch)
        groups = Groups(batch["outttl"])
        are_answered = batch["latency"] >= 0
        for start, end in zip(groups.starts.tolist(), groups.ends.tolist()):
            rows = groups.order[start:end]
            by_bin = self._by_hop.setdefault(int(batch["outttl"][rows[0]]), np.zeros((2, BINS), np.int32))
            by_bin[0] += np.bincount(bins[rows], minlength=BINS)
            by_bin[1] += np.bincount(bins[rows[~are_answered[rows]]], minlength=BINS)
        self.probes += len(batch)
        if are_answered.any():
            rows = np.flatnonzero(are_answered)
            self._add_answers(batch.take(rows), bins[rows], since[rows])
        self._add_flows(batch, bins, times)
        while (self._cells.is_full or self._srtt.is_full) and (self.last - self.first) // self.width > FEW_BINS:
            self._fold()
            self.folds = max(self.folds - 1, 0)

    def _count_names(self, batch: Batch) -> None:
        counts = np.bincount(batch["app"])
        for number in np.flatnonzero(counts).tolist():
            if number and (batch.names[number] in self.apps or len(self.apps) < NAMES_MAX):
                self.apps[batch.names[number]] += int(counts[number])
        kinds = batch["protocol"] << 16 | batch["dport"]
        for kind, count in zip(*(each.tolist() for each in np.unique(kinds, return_counts=True))):
            if (kind >> 16, kind & 0xFFFF) in self.kinds or len(self.kinds) < NAMES_MAX:
                self.kinds[kind >> 16, kind & 0xFFFF] += count

    def _add_answers(self, batch: Batch, bins: Any, since: Any) -> None:
        latencies = batch["latency"]
        self.answered += len(latencies)
        self.fastest = min(self.fastest, int(latencies.min()))
        self.slowest = max(self.slowest, int(latencies.max()))
        groups = Groups(batch["responder"] << 8 | batch["outttl"])
        lines = np.zeros(len(latencies), np.int64)
        for start, end in zip(groups.starts.tolist(), groups.ends.tolist()):
            rows = groups.order[start:end]
            line = self._line(int(batch["outttl"][rows[0]]), batch.text("responder", rows[0]))
            self._counts[line] += len(rows)
            lines[rows] = line
            self._sample(line, since[rows], latencies[rows])
        self._cells.add(lines, bins, latencies, since)

    def _line(self, hop: int, responder: str) -> int:
        found = self._lines.get((hop, responder))
        if found is None:
            is_full = sum(number == hop for number, _ in self._lines) >= RESPONDERS_MAX
            if is_full and responder:
                return self._line(hop, "")  # counts all further responders
            found = self._lines[hop, responder] = len(self._lines)
            self._counts.append(0)
            self._points.append(np.zeros((3, 0)))
        return found

    def _sample(self, line: int, since: Any, latencies: Any) -> None:
        """Keep a uniform sample of a line's answers: each answer gets a random number, and the lowest ones stay."""
        most = self._points_max * POINTS_LINES // max(len(self._lines), POINTS_LINES)
        priorities, points = self._random.random(len(since)), self._points[line]
        if points.shape[1] >= most > 0:
            low = np.flatnonzero(priorities < points[0, -1])
            priorities, since, latencies = priorities[low], since[low], latencies[low]
        points = np.concatenate([points, [priorities, since, latencies]], axis=1)
        self._points[line] = points[:, np.argsort(points[0], kind="stable")[:most]]

    def _add_flows(self, batch: Batch, bins: Any, times: Any) -> None:
        """Add the sockets' own round-trip times, and the segments retransmitted in each bin.

        A row has the segments retransmitted since the flow began, so it adds its difference to the row before.
        The row of an unanswered probe comes late: if it is older than the flow's newest row of an earlier batch, it
        adds nothing.
        """
        has_srtt, has_retrans = batch["srtt"] >= 0, batch["retrans"] >= 0
        rows = np.flatnonzero(has_srtt | has_retrans)
        rows = rows[np.argsort(times[rows], kind="stable")]
        groups = Groups((batch["sport"] << 24 | batch["dport"] << 8 | batch["protocol"])[rows])
        lines = np.zeros(len(batch), np.int64)
        for start, end in zip(groups.starts.tolist(), groups.ends.tolist()):
            its = rows[groups.order[start:end]]
            key = batch.flow(its[0])
            if key not in self._told and len(self._told) < FLOWS_TOLD:
                self._told[key] = len(self._told) + 1
            lines[its] = line = self._told.get(key, 0)
            its = its[has_retrans[its]]
            if len(its):
                self._add_retrans(key, line, batch["retrans"][its], bins[its], times[its])
        while len(self._flows) > FLOWS_MAX:
            del self._flows[next(iter(self._flows))]
        rows = np.flatnonzero(has_srtt)
        self._srtt.add(lines[rows], bins[rows], batch["srtt"][rows] * 1000, times[rows] - self.start)

    def _add_retrans(self, key: FlowKey, line: int, counts: Any, bins: Any, times: Any) -> None:
        newest, before = self._flows.pop(key, (0, int(counts[0])))
        are_new = times >= newest
        if are_new.any():
            more = np.diff(counts[are_new], prepend=before).clip(0)
            if more.any():
                by_bin = self._retrans.setdefault(line, np.zeros(BINS, np.int64))
                by_bin += np.bincount(bins[are_new], more, BINS).astype(np.int64)
            newest, before = int(times[are_new][-1]), int(counts[are_new][-1])
        self._flows[key] = newest, before

    def _fold(self) -> None:
        self.width *= 2

        def folded(values: Any) -> Any:
            to = (np.arange(BINS) - BIN_ZERO >> 1) + BIN_ZERO
            return np.bincount(to, values, BINS).astype(np.int64)

        for hop, by_bin in self._by_hop.items():
            self._by_hop[hop] = np.array([folded(values) for values in by_bin], np.int32)
        self._retrans = {line: folded(by_bin) for line, by_bin in self._retrans.items()}
        self._cells.fold()
        self._srtt.fold()

    def coarse(self) -> Course:
        """Return the course with the bins of the picture: a copy, or the course itself if it has them already."""
        if not self.folds:
            return self
        course = copy.deepcopy(self)
        for _ in range(self.folds):
            course._fold()
        course.folds = 0
        return course

    @property
    def is_exact(self) -> bool:
        """Whether latencies are as in the rows: not rounded."""
        return self._cells.is_exact

    @property
    def hops(self) -> list[int]:
        return sorted(self._by_hop)

    def by_bin(self) -> tuple[int, Any, Any, Any]:
        """Return the number of the first bin with probes (it may be below 0), and from this bin to the last one
        with probes: the probes and the unanswered probes (arrays of hops by bins), and the segments retransmitted
        (an array of bins)."""
        first, last = ((at - self.start) // self.width + BIN_ZERO for at in (self.first, self.last))
        both = np.array([self._by_hop[hop][:, first : last + 1] for hop in self.hops])
        retrans = sum(self._retrans.values(), np.zeros(BINS, np.int64))
        return first - BIN_ZERO, both[:, 0], both[:, 1], retrans[first : last + 1]

    def lines(self) -> Iterator[Line]:
        """Yield the lines, in the order of hop and rank."""
        for hop, rank, name, numbers in self.ranked():
            bins, slowest, values = self._cells.of_lines(numbers)
            points = np.unique(np.concatenate([self._points_of(numbers), slowest], axis=1), axis=1)
            spread = quantiles(*values, np.array([0]), QUANTILES)[0].tolist()
            yield Line(hop, name, rank, spread, bins, tuple(points), values)

    def _points_of(self, numbers: list[int]) -> Any:
        """Return a sample of the answers of some lines: an array of times and latencies, of POINTS_MAX at most."""
        points = [self._points[line] for line in numbers]
        # A line with more answers than points has lost those with higher priorities.
        lost = (its[0, -1] for line, its in zip(numbers, points) if 0 < its.shape[1] < self._counts[line])
        limit, found = min(lost, default=1.0), np.concatenate(points, axis=1)
        found = found[:, np.argsort(found[0], kind="stable")[:POINTS_MAX]]
        return found[1:, found[0] <= limit]

    def ranked(self) -> Iterator[tuple[int, int, str, list[int]]]:
        """Yield hop, rank, responder and numbers of each line to be drawn, in the order of hop and rank.

        The numbers are those of the lines that are counted: one, or several that are drawn as one.
        """
        for hop in self.hops:
            ranked = sorted(
                ((-self._counts[line], responder == "", line, responder)
                 for (number, responder), line in self._lines.items() if number == hop)
            )  # fmt: skip
            ranks = [[each] for each in ranked[:RANKS_MAX]] + [ranked[RANKS_MAX:]]
            for rank, its in enumerate(filter(None, ranks)):
                name = its[0][3] if len(its) == 1 and its[0][3] else f"{len(its)} others"
                yield hop, rank, name, [line for _, _, line, _ in its]

    def answers(self, numbers: list[int]) -> tuple[Any, Any, Any]:
        """Return Cells.counts() of the answers of these lines. numbers: from ranked(). Bins are as in by_bin()."""
        return self._cells.counts(numbers)

    def of_hop(self, hop: int) -> tuple[Bins, Any, tuple[Any, Any]]:
        """Return Cells.of_lines() of all answers at a hop. Raises IndexError if it has none."""
        return self._cells.of_lines([line for (number, _), line in self._lines.items() if number == hop])

    def srtt(self) -> Bins | None:
        """Return the round-trip times that the sockets measured, ns, by bin. None: there are none."""
        return self._srtt.of_lines([*range(FLOWS_TOLD + 1)])[0] if len(self._srtt) else None

    def flows(self, most: int) -> Iterator[tuple[FlowKey | None, tuple[Any, Any, Any], Any]]:
        """Yield the busiest TCP flows, at most this many, then all others together with None as key.

        After the key: Cells.counts() of the round-trip times that the sockets measured, and the segments
        retransmitted in each bin, from the first bin of by_bin() on.
        """
        first, last = ((at - self.start) // self.width + BIN_ZERO for at in (self.first, self.last))
        found = [(key, [line]) for key, line in self._told.items()]
        found.sort(key=lambda item: -int(self._srtt.counts(item[1])[2].sum()))
        rest = [0, *(line for _, lines in found[most:] for line in lines)]
        for key, lines in [*found[:most], (None, rest)]:
            retrans = sum(
                (self._retrans[line] for line in lines if line in self._retrans), np.zeros(BINS, np.int64)
            )
            counts = self._srtt.counts(lines)
            if len(counts[0]) or retrans.any():
                yield key, counts, retrans[first : last + 1]

    def flow_text(self) -> str:
        """Return protocol and port of most probes: "TCP port 443 and others". Raises ValueError without rows."""
        (protocol, port), *others = (kind for kind, _ in self.kinds.most_common())
        text = PROTOCOLS.get(protocol, f"protocol {protocol}") + (f" port {port}" if port else "")
        return text + (" and others" if others else "")
