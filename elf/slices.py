# SPDX-License-Identifier: GPL-3.0-only
"""Episodes, fed with many rows at once: what Watch.digest() and Way.note() do row by row, in a tenth of the time.

    Stretch             answers of a destination, in the order of sendtime; note() gives them to the ways
    note_slices()       cuts the answers of a way into slices
    Slices              compares slices with earlier ones: many at once, as long as none is raised

Needs numpy, which elfprobe.py does without.
"""

from __future__ import annotations

import bisect
import itertools
from typing import Any, Iterable, Iterator, Sequence

import numpy as np

from elf.batches import Batch
from elf.episodes import (
    LASTING,
    PAUSE,
    QUIET_AFTER,
    QUIET_NS,
    RAISED_MIN,
    RECENT_MAX,
    RENEWED_AFTER,
    SLICE_MAX,
    SLICE_MIN,
    SLICE_PROBES,
    SRTT_GAIN,
    TCP,
    USUAL,
    Reference,
    Row,
    Snapshot,
    Watch,
    Way,
)
from elf.groups import Groups
from elf.summary import Flow

COLUMNS = "sendtime", "outttl", "latency", "responder", "srtt", "cwnd", "retrans"
COMPARED_AT_ONCE = 64  # slices
UNKNOWN = Reference()  # of a series that a way does not know
# With more first answers of flows and hops than NEW_MAX and this share of the rows, rows are noted one by one.
NEW_MAX, NEW_SHARE = 8, 1 / 64


class Stretch:
    """Answers of a destination, in the order in which their probes left."""

    def __init__(self, batch: Batch, rows: Any, flow_of: Any, flows: list[Flow]) -> None:
        """rows: places in the batch, ordered by sendtime. flow_of: index of the flow of each row of the batch."""
        self._columns = {name: batch[name][rows] for name in COLUMNS}
        self._names = batch.names
        self._flow_of, self._flows = flow_of[rows], flows

    def __len__(self) -> int:
        return len(self._flow_of)

    def rows(self, start: int, end: int) -> Iterator[Row]:
        """Yield the rows from start up to end, as Watch.rows has them."""
        sent, hops, latencies, responders, *known = (its[start:end].tolist() for its in self._columns.values())
        known = [[None if value < 0 else value for value in values] for values in known]
        flows = map(self._flows.__getitem__, self._flow_of[start:end].tolist())
        return zip(sent, hops, latencies, map(self._names.__getitem__, responders), flows, *known)

    def note(self, watch: Watch, hops: dict[int, Any]) -> int:
        """Give the answers to the ways of their flows, up to the first that may change a flow's way.

        Return the number of answers given. The caller gives the others to watch.digest(), row by row.
        """
        end = self._settle(watch, hops)
        way_numbers: dict[Way | None, int] = {}
        of_flows = np.zeros(int(self._flow_of.max()) + 1, int)
        for flow in np.flatnonzero(np.bincount(self._flow_of[:end])).tolist():
            of_flows[flow] = way_numbers.setdefault(self._flows[flow].way, len(way_numbers))
        ways, by_way = list(way_numbers), Groups(of_flows[self._flow_of[:end]])
        for number, first, last in zip(range(len(ways)), by_way.starts.tolist(), by_way.ends.tolist()):
            rows, way = by_way.order[first:last], ways[number]
            assert way
            its = {name: values[rows] for name, values in self._columns.items()}
            note_slices(way, its, self._flow_of[rows], self._flows)
        if end:
            watch.newest = max(watch.newest, int(self._columns["sendtime"][end - 1]))
            watch.settle_changes()
        return end

    def _settle(self, watch: Watch, hops: dict[int, Any]) -> int:
        """Let the watch see the first answers of new flows and hops. Return the place of the first change of a way.

        Without a change it is the number of answers. It is 0 if a known hop has another responder, if a hop of a
        flow has several, or if there are too many new flows and hops.
        """
        keys = self._flow_of << 40 | self._columns["outttl"] << 32 | self._columns["responder"]
        found = np.unique(keys)
        new = []
        for key in found.tolist():
            way, hop = self._flows[key >> 40].way, key >> 32 & 0xFF
            if way is None or hop not in way.responders:
                new.append(key)
            elif way.responders[hop] != self._names[key & 0xFFFFFFFF]:
                return 0
        if len(new) > NEW_MAX + len(self) * NEW_SHARE or (np.diff(found >> 32) == 0).any():
            return 0
        if new:
            found, places = np.unique(keys, return_index=True)
            for place in map(int, sorted(places[np.searchsorted(found, new)].tolist())):
                row = next(self.rows(place, place + 1))
                way, hop, responder = row[4].way, row[1], row[3]
                if (way is None and watch.is_full) or (way and way.responders.get(hop, responder) != responder):
                    return place
                watch.settle(row, hops)
        return len(self)


def note_slices(way: Way, rows: dict[str, Any], flow_of: Any, flows: list[Flow]) -> None:
    """Do Way.note() for answers in the order in which their probes left.

    The slices are not quite those of Way.note(). The first and the last one begin and end with these answers. A
    median is of all answers of a slice, not of CELL_MAX. Each slice needs answers for all hops of these rows.
    rows: arrays by name, see COLUMNS. flow_of: for each row, its index in flows.
    """
    sent = rows["sendtime"]
    edges = slice_edges(way, sent, np.count_nonzero(np.bincount(rows["outttl"])))
    if way.is_over or len(edges) < 2:
        return
    way.end_slice()
    its = {name: values[edges[0] :] for name, values in rows.items()}
    count = len(edges) - 1
    number = np.repeat(np.arange(count), np.diff(edges))
    srtt, window, latencies, hops = its["srtt"], its["cwnd"], its["latency"], its["outttl"]
    has_srtt, has_window = srtt >= 0, window >= 0
    has_srtt &= has_window
    keys = np.concatenate([number << 8 | hops, (number << 8 | TCP)[has_srtt]])
    values = np.concatenate([latencies, srtt[has_srtt] * 1000])
    if len(keys) and count < 1 << 14 and int(values.max()) < 1 << 41:
        both = np.sort(keys << 41 | values)
        keys, values = both >> 41, both & (1 << 41) - 1
    else:
        order = np.lexsort((values, keys))
        keys, values = keys[order], values[order]
    firsts = np.flatnonzero(np.diff(keys, prepend=-1))
    counts = np.diff(np.append(firsts, len(keys)))
    medians = (values[firsts + (counts - 1) // 2] + values[firsts + counts // 2]) / 2
    windows = np.bincount(number[has_window], window[has_window], count)
    window_counts = np.bincount(number[has_window], minlength=count)
    numbers = number[has_srtt]
    changed = numbers[1:][(np.diff(srtt[has_srtt]) != 0) & (np.diff(numbers) == 0)]
    retrans = np.zeros(count)
    by_flow = Groups(flow_of[edges[0] :], np.flatnonzero(has_window))
    if len(by_flow):
        which = flow_of[edges[0] :][by_flow.firsts].tolist()
        counted = its["retrans"][by_flow.order].clip(0)
        highest = np.maximum(by_flow.running(counted, counted[by_flow.starts]), counted)
        before = np.concatenate([[0], highest[:-1]])
        before[by_flow.starts] = [flows[flow].counted for flow in which]
        retrans = np.bincount(number[by_flow.order], (highest - before).clip(0), count)
        for flow, last in zip(which, highest[by_flow.ends - 1].tolist()):
            flows[flow].counted = last
    its_flow: list[Flow | None] = [None] * count
    its_slices, its_flows = number[has_window], flow_of[edges[0] :][has_window]
    firsts_of_flows = np.flatnonzero(np.diff(its_slices, prepend=-1))
    if len(firsts_of_flows):
        least, most = (each.reduceat(its_flows, firsts_of_flows).tolist() for each in (np.minimum, np.maximum))
        for place, low, high in zip(its_slices[firsts_of_flows].tolist(), least, most):
            its_flow[place] = flows[low] if low == high else None
    Slices(
        way,
        sent[edges[:-1]].tolist(),
        sent[np.array(edges[1:]) - 1].tolist(),
        keys[firsts],
        medians,
        [total / many if many else None for total, many in zip(windows.tolist(), window_counts.tolist())],
        (way.retrans + np.cumsum(retrans)).astype(int).tolist(),
        (np.bincount(changed, minlength=count) + 1).tolist(),
        its_flow,
    ).compare()
    way.retrans += int(retrans.sum())
    way.last = way.begin = way.due = int(sent[-1])


def slice_edges(way: Way, sent: Any, hops: int) -> list[int]:
    """Return the index of each slice's first row, then the number of rows. Skip rows that left before way.last.

    sent: when the probes left, in order, ns. hops: how many hops answered.
    """
    count = len(sent)
    places = np.arange(count)
    pauses = np.append(np.flatnonzero(np.diff(sent) > PAUSE) + 1, count)
    ends = np.maximum(np.searchsorted(sent, sent + SLICE_MIN), places + SLICE_PROBES * hops)
    ends = np.minimum(ends, np.searchsorted(sent, sent + SLICE_MAX))
    end_of = np.minimum(ends, pauses[np.searchsorted(pauses, places, "right")]).tolist()
    edges, place = [], int(np.searchsorted(sent, way.last))
    while place < count:
        edges.append(place)
        place = end_of[place]
    return [*edges, count]


class Slices:
    """Successive slices of a way, to be compared. Arrays have a row for each slice, a column for each series."""

    def __init__(
        self,
        way: Way,
        begins: list[int],
        ends: list[int],
        keys: Any,
        medians: Any,
        windows: list[float | None],
        retrans: list[int],
        updates: list[int],
        its_flows: list[Any],
    ) -> None:
        """keys: slice << 8 | series of each median (ns), ascending. The lists have an entry for each slice."""
        self._way = way
        self._others: tuple[list[Any], ...] = (begins, ends, windows, retrans, updates, its_flows)
        self._begins, self._ends = np.array(begins), np.array(ends)
        self._columns = np.flatnonzero(np.bincount(keys & 0xFF)).tolist()  # series that occur
        if self._columns[0] == TCP:
            self._columns = [*self._columns[1:], TCP]  # behind the hops
        column_of = np.zeros(256, int)
        column_of[self._columns] = range(len(self._columns))
        shape = len(begins), len(self._columns)
        self._latency, self._excess, self._step = (np.full(shape, np.nan) for _ in range(3))
        self._latency[keys >> 8, column_of[keys & 0xFF]] = medians
        self._is_there = ~np.isnan(self._latency)

    def __len__(self) -> int:
        return len(self._begins)

    def compare(self) -> None:
        """Compare each slice with those before it, and add it to the way."""
        way, place = self._way, 0
        while place < len(self):
            new = [column for column, series in enumerate(self._columns) if is_new(way, series)]
            has_new = self._is_there[place:, new].any(axis=1)
            end = place + int(has_new.argmax()) if has_new.any() else len(self)
            if end == place:
                way.add_slice(self._snapshot(place))
                place += 1
            else:
                place = self._compare_known(place, end)

    def _compare_known(self, place: int, end: int) -> int:
        """Compare the slices from place up to end, which have no new series, until the way adopts a lasting level.

        Return the place of the first slice that is not compared.
        """
        way = self._way
        latencies, before = way.latencies, list(way.recent)
        fronts, ends = np.full((2, RECENT_MAX + end - place), float("-inf"))  # RECENT_MAX earlier slices come first
        offset = RECENT_MAX - place
        for at, each in enumerate(before, RECENT_MAX - len(before)):
            ends[at] = each.end
            fronts[at] = each.excess[max(each.excess)] if each.excess else float("-inf")
        ends[RECENT_MAX:] = self._ends[place:end]
        kept = place  # way.recent has the slices in front of this one
        while place < end and way.latencies is latencies:
            stop, renewals = min(place + COMPARED_AT_ONCE, end), way.renewals
            are_raised = self._measure(place, stop, fronts[: stop + offset], ends)
            raised_at: dict[int, list[int]] = {}
            for at, column in zip(*(each.tolist() for each in np.nonzero(are_raised))):
                raised_at.setdefault(at + place, []).append(self._columns[column])
            raised, first = [*raised_at, stop], place
            while place < stop and way.renewals == renewals and way.latencies is latencies:
                if not way.runs:
                    quiet, over = self._end_of_quiet(place, stop, raised_at, raised)
                    while place < quiet:
                        place = self._add_quiet(place, quiet)
                    if place == stop or way.renewals > renewals:
                        continue
                    if over > stop and first < place and stop < end:
                        break  # once the next slices are measured, too, the end of these runs may be known
                self._keep_recent(kept, place)
                way.tests.count += int(np.count_nonzero(~np.isnan(self._step[place])))
                way.follow(self._snapshot(place), raised_at.get(place, ()))
                place += 1
                kept = place
        self._keep_recent(kept, place)
        return place

    def _measure(self, place: int, stop: int, fronts: Any, ends: Any) -> Any:
        """Note excess and steps of the slices from place up to stop, as Way does. Return which steps are raised.

        The result has a row for each slice and a column for each series: True above the threshold. fronts, ends: of
        RECENT_MAX slices in front of the first one, then of each slice up to stop: the excess of the farthest hop
        (ns, filled in here), and the time at which the slice ends.
        """
        way, rows, count = self._way, slice(place, stop), stop - place
        latency, are_there = self._latency[rows], self._is_there[rows]
        latencies, steps = (
            [its.get(series, UNKNOWN) for series in self._columns] for its in (way.latencies, way.steps)
        )
        hops = len(self._columns) - (self._columns[-1] == TCP)
        self._excess[rows] = excess = latency - np.array([each.usual for each in latencies], float)
        in_front = np.zeros((count, hops + 1))  # the excess of the nearest hop in front that answered
        in_front[:, 1:] = excess[:, :hops]
        if not are_there[:, :hops].all():
            nearest = np.zeros((count, hops + 1), int)
            nearest[:, 1:] = np.where(are_there[:, :hops], np.arange(1, hops + 1), 0)
            in_front = np.take_along_axis(in_front, np.maximum.accumulate(nearest, axis=1), 1)
        step = self._step[rows]
        step[:, :hops] = excess[:, :hops] - in_front[:, :-1]
        fronts[-count:] = in_front[:, -1]
        if hops < len(self._columns):
            has_hops = are_there[:, :hops].any(axis=1)
            fronts[-count:][~has_hops] = excess[~has_hops, hops]
            since = self._begins[rows] - SRTT_GAIN * np.trunc(latency[:, hops]) - QUIET_NS
            places = np.arange(len(fronts) - count, len(fronts))
            oldest = np.maximum(np.searchsorted(ends[: len(fronts)], since), places - RECENT_MAX)
            before = np.lib.stride_tricks.sliding_window_view(fronts, RECENT_MAX)[places - RECENT_MAX]
            is_out = np.arange(RECENT_MAX) < (RECENT_MAX - places + oldest)[:, None]
            most = np.where(is_out, float("-inf"), before).max(axis=1)
            step[:, hops] = excess[:, hops] - np.maximum(in_front[:, -1], most)
            step[~has_hops, hops] = np.nan
        return step > np.array([each.threshold for each in steps])

    def _end_of_quiet(
        self, place: int, stop: int, raised_at: dict[int, list[int]], raised: list[int]
    ) -> tuple[int, int]:
        """Return the end of slices that are quiet, or raised by chance, from a place on, and what _end_of_chance()
        says of the slice there.

        It is at most stop, and where what is usual is renewed: from there on, others may be raised. raised: the
        keys of raised_at, and stop.
        """
        renewal = place + self._way.until_renewal
        while place < renewal:
            place = min(raised[bisect.bisect_left(raised, place)], renewal)
            if place in (stop, renewal):
                break
            over = self._end_of_chance(place, stop, raised_at)
            if not place < over <= stop:
                return place, over
            place = over
        return place, place

    def _end_of_chance(self, place: int, stop: int, raised_at: dict[int, list[int]]) -> int:
        """Return the place behind the runs that begin at place, if none of them can become an episode.

        Then Way.follow() would add all these slices to the quiet ones. Return place if there may be an episode, and
        stop + 1 if the runs do not end before stop. raised_at: raised series by place of the slice, up to stop.
        """
        begins, ends = self._others[:2]
        counts: dict[int, int] = {}  # raised slices of the runs, by series
        lasts: dict[int, int] = {}  # the slice with which a run is over if nothing is raised again
        last = place
        for at, its_raised in raised_at.items():
            if at < place:
                continue
            if at > last:
                break
            for series in its_raised:
                counts[series] = counts[series] + 1 if lasts.get(series, -1) >= at else 1
                if counts[series] >= RAISED_MIN:
                    return place
                lasts[series] = self._last_of_run(series, at, stop)
            last = max(last, *lasts.values())
        if last >= stop:
            return stop + 1
        was_slower = any(begins[place] < each.end for each in self._way.episodes)
        return place if was_slower or ends[last] - begins[place] > LASTING else last + 1

    def _last_of_run(self, series: int, raised: int, stop: int) -> int:
        """Return the place of the slice that ends a run, if raised is the run's last raised slice; at most stop."""
        begins, ends = self._others[:2]
        are_known = self._step[raised + 1 : stop, self._columns.index(series)]
        quiet = np.flatnonzero(are_known == are_known)[:QUIET_AFTER].tolist()
        if len(quiet) < QUIET_AFTER:
            return stop
        since = begins[raised + 1 + quiet[0]]
        return bisect.bisect_left(ends, since + QUIET_NS, raised + 1 + quiet[-1], stop)

    def _add_quiet(self, place: int, stop: int) -> int:
        """Add slices up to stop, or up to the next renewal, to the quiet ones. Return the place behind them."""
        way = self._way
        stop = min(stop, place + way.until_renewal)
        if place == stop:
            return stop
        latency, step = self._latency[place:stop], self._step[place:stop]
        way.tests.count += int(np.count_nonzero(~np.isnan(step)))
        for references, values in (way.latencies, latency), (way.steps, step):
            has_gaps = np.isnan(values).any()
            for series, its in zip(self._columns, np.ascontiguousarray(values.T)):
                if has_gaps:
                    its = its[~np.isnan(its)]
                if len(its):
                    references[series].add_all(its.tobytes())
        way.quiet += len(latency)
        if way.until_renewal == RENEWED_AFTER:
            way.renew(partitioned)
        return stop

    def _snapshot(self, place: int) -> Snapshot:
        begins, ends, *others = self._others
        snapshot = Snapshot(
            begins[place], ends[place], self.values_at(place, "latency"), *(its[place] for its in others)
        )
        snapshot.excess, snapshot.step = (self.values_at(place, name) for name in ("excess", "step"))
        return snapshot

    def values_at(self, place: int, name: str) -> dict[int, float]:
        """Return a dictionary of Snapshot, by series. name: latency, excess or step; ns."""
        values = getattr(self, "_" + name)[place].tolist()
        return {series: value for series, value in zip(self._columns, values) if value == value}

    def _keep_recent(self, first: int, place: int) -> None:
        """Append the slices from first up to place to way.recent: at most the newest RECENT_MAX of them."""
        newest = range(max(first, place - RECENT_MAX), place)
        self._way.recent.extend(SliceAt(self, at, *(each[at] for each in self._others)) for at in newest)


class SliceAt(Snapshot):
    """A slice that makes its dictionaries when they are first read. Those of most slices are never read."""

    __slots__ = ("_slices", "_place")

    def __init__(self, slices: Slices, place: int, begin: int, end: int, *others: Any) -> None:
        self.begin, self.end = begin, end
        self.window, self.retrans, self.updates, self.flow = others
        self._slices, self._place = slices, place

    def __getattr__(self, name: str) -> Any:  # called only for slots without a value
        if name not in ("latency", "excess", "step"):
            raise AttributeError(name)
        setattr(self, name, self._slices.values_at(self._place, name))
        return getattr(self, name)


def partitioned(all_values: Iterable[Sequence[float]]) -> Iterator[Any]:
    """Yield each list of values, sorted at least at the indexes that Reference.renew() reads."""
    for count, group in itertools.groupby(map(np.array, all_values), len):
        found = np.array(list(group))
        found.partition([(count - 1) // 2, count // 2, int(USUAL * (count - 1))], axis=1)
        yield from found


def is_new(way: Way, series: int) -> bool:
    """Return whether a series has so few values that each slice may change its usual level or its threshold."""
    found = way.latencies.get(series), way.steps.get(series)
    return any(each is None or each.usual is None or each.is_new for each in found)
