# SPDX-License-Identifier: GPL-3.0-only
"""The summary, fed with many rows at once: what Summary.note() does row by row, in a tenth of the time.

Needs numpy, which elfprobe.py does without.
"""

from __future__ import annotations

import array
import bisect
from typing import Any, NamedTuple

import numpy as np

from elf.batches import Batch
from elf.groups import Groups
from elf.losses import LATE, MOMENT
from elf.moments import BulkLosses, first_answers, note_moments, note_silence
from elf.paths import OUTAGE_MIN, Destination, Hop
from elf.slices import Stretch
from elf.summary import (
    FLOW_HOPS_MAX,
    FLOWS_MAX,
    HOPS_MAX,
    MOMENTS_APART,
    MOMENTS_KEPT,
    REUSE_AFTER,
    Flow,
    FlowHop,
    Summary,
    note_retrans,
    note_ttl,
)

WATCHED_AT_ONCE = 1 << 14  # answers of a destination that are given to its watch at once
NEW_FLOWS_SHARE = 1 / 16  # new flows by rows of a batch. Without room and above it, rows are noted one by one


class BatchGroups:
    """The rows of a batch by flow, by destination and hop, and by flow and hop."""

    def __init__(self, batch: Batch) -> None:
        ports = batch["sport"] << 24 | batch["dport"] << 8 | batch["protocol"]
        self.batch = batch
        self.flows = Groups(batch["dest"] << 40 | ports)
        self.flow_of = self.flows.of_rows()
        self.hops = Groups(batch["dest"] << 8 | batch["outttl"])
        self.flow_hops = Groups(self.flow_of << 8 | batch["outttl"])


class Fronts:
    """Finds the nearest answering hop in front of a hop, as Destination.front() does, for many rows at once."""

    def __init__(self, groups: BatchGroups, destinations: list[Destination], are_answered: Any) -> None:
        """destinations: of each group of groups.hops. Call this before the batch's answers are added to them."""
        batch, by_hop = groups.batch, groups.hops
        answered, which = by_hop.only(are_answered)
        dests = batch["dest"][by_hop.firsts].tolist()
        rows = {
            dest << 8 | number: -1
            for dest, destination in dict(zip(dests, destinations)).items()
            for number, hop in destination.hops.items()
            if hop.latency.count
        }
        numbers = batch["outttl"][by_hop.firsts].tolist()
        for group, row in zip(which.tolist(), answered.firsts.tolist()):
            rows.setdefault(dests[group] << 8 | numbers[group], row)
        self._keys = np.array(sorted(rows), int)
        # The row of each hop's first answer; -1: it answered before this batch.
        self._rows = np.array([rows[key] for key in sorted(rows)], int)

    def of(self, dests: Any, numbers: Any, rows: Any) -> Any:
        """Return the number of the hop that Destination.front() finds when each row comes; 0: none answers."""
        found = np.zeros(len(rows), int)
        left = np.arange(len(rows))
        for step in range(1, 1 << 8):
            left = left[numbers[left] > step]
            if not len(left):
                break
            keys = dests[left] << 8 | numbers[left] - step
            at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
            are_found = (self._keys[at] == keys) & (self._rows[at] < rows[left])
            found[left[are_found]] = numbers[left[are_found]] - step
            left = left[~are_found]
        return found


class Events(NamedTuple):
    """The first answers of a hop in each second (events)."""

    hop: Hop
    number: int
    rows: list[int]
    seconds: list[int]
    # Indexes of the events that matter: an outage may end with the event or with the next one, or it is the last.
    places: list[int]
    before: int  # the hop's active seconds in front of these events
    last_before: int  # the last of these seconds

    def count_until(self, row: int) -> None:
        """Set the hop's active seconds and last second to what they are in front of a row."""
        done = bisect.bisect_left(self.rows, row)
        self.hop.active_seconds = self.before + done
        self.hop.last_second = self.seconds[done - 1] if done else self.last_before


def note_seconds(destination: Destination, events: dict[int, Events]) -> None:
    """Do Hop.note_second() for all events of a destination, in the order of their rows. events: by hop.

    If all these hops have answered before, only the events that matter are noted one by one.
    """
    if not all(its.before for its in events.values()):
        found = [(row, number, at) for number, its in events.items() for at, row in enumerate(its.rows)]
        for _, number, at in sorted(found):
            its = events[number]
            its.hop.note_second(its.seconds[at], *destination.neighbours(number))
        return
    answering = sorted(number for number, hop in destination.hops.items() if hop.active_seconds)
    near = dict(zip(answering, zip([0, *answering], [*answering[1:], 0])))
    found = [(its.rows[at], number, at) for number, its in events.items() for at in its.places]
    for row, number, at in sorted(found):
        for each in (number, *near[number]):
            if each in events:
                events[each].count_until(row)
        events[number].hop.note_second(events[number].seconds[at], *map(destination.hops.get, near[number]))
    for its in events.values():
        its.hop.active_seconds, its.hop.last_second = its.before + len(its.rows), its.seconds[-1]


def note_ttls(
    batch: Batch, rows: Any, groups: Groups, flow_hops: list[FlowHop], destinations: dict[str, Destination]
) -> None:
    """Do note_ttl() for the first answer of each flow and hop in each moment.

    rows: these answers, ordered by flow and hop. groups: bounds of each flow_hop in rows.
    """
    ttls, responders = batch["recvttl"][rows], batch["responder"][rows]
    least, most, lowest, highest = (
        groups.reduce(function, values).tolist()
        for values in (ttls, responders)
        for function in (np.minimum, np.maximum)
    )
    for group, of_flow in enumerate(flow_hops):
        its = of_flow.ttl
        is_one = least[group] == most[group] and lowest[group] == highest[group]
        is_known = its and not its.count and (its.ttl, its.responder) == (least[group], batch.names[lowest[group]])
        if is_one and is_known:
            continue
        which = rows[groups.starts[group] : groups.ends[group]]
        destination, number = destinations[batch.text("dest", which[0])], int(batch["outttl"][which[0]])
        sent, its_ttls = batch["sendtime"][which].tolist(), batch["recvttl"][which].tolist()
        for responder, ttl, at in zip(batch.texts("responder", which), its_ttls, sent):
            note_ttl(destination, of_flow, number, responder, ttl, at)


class BulkSummary(Summary):
    """A summary to which many rows can be added at once."""

    def _new_destination(self, dest: str) -> Destination:
        destination = super()._new_destination(dest)
        destination.watch.losses = BulkLosses(self._tests)
        return destination

    def note_all(self, batch: Batch) -> None:
        """Add many probes, as note() would one by one, in their order.

        Episodes may differ a little: see elf.slices.note_slices(). What depends on the order of single probes is
        done one by one: new flows and hops, the first answer of a hop in each second, a flow's new responder, a
        retransmission count that falls.
        """
        while len(batch):
            groups = BatchGroups(batch)
            if not self._has_room(groups) and len(groups.flows) > len(batch) * NEW_FLOWS_SHARE:
                for probe in batch.records():
                    self.note(probe)
                return
            row = self._row_that_needs_room(groups)
            if row == len(batch):
                self._note_groups(groups)
                return
            if row:
                self._note_groups(BatchGroups(batch.take(slice(row))))
            self.note(batch.record(row))
            batch = batch.take(slice(row + 1, None))

    def _has_room(self, groups: BatchGroups) -> bool:
        """Return whether nothing must be forgotten for the batch, even if all its flows and their hops are new."""
        return (
            len(self._flows) + len(groups.flows) <= FLOWS_MAX
            and self._flow_hops + len(groups.flow_hops) <= FLOW_HOPS_MAX
            and (self.hops + len(groups.hops) <= HOPS_MAX or self.hops + len(self._new_hops(groups)) <= HOPS_MAX)
        )

    def _new_hops(self, groups: BatchGroups) -> list[int]:
        """Return the first row of each hop that the summary does not have."""
        rows, batch = groups.hops.firsts, groups.batch
        known = {dest: destination.hops for dest, destination in self._destinations.items()}
        dests, numbers = batch.texts("dest", rows), batch["outttl"][rows].tolist()
        return [
            row for row, dest, number in zip(rows.tolist(), dests, numbers) if number not in known.get(dest, ())
        ]

    def _row_that_needs_room(self, groups: BatchGroups) -> int:
        """Return the first row for which older entries must be forgotten; without one, the number of rows."""
        batch = groups.batch
        if self._has_room(groups):
            return len(batch)
        # In the order in which note() does it: 0 is a new hop, 1 a new flow, 2 a new hop of a flow.
        new = [(row, 0) for row in self._new_hops(groups)]
        rows = groups.flows.firsts
        new += ((row, 1) for row, key in zip(rows.tolist(), batch.flows(rows)) if key not in self._flows)
        rows = groups.flow_hops.firsts
        for row, key, number in zip(rows.tolist(), batch.flows(rows), batch["outttl"][rows].tolist()):
            flow = self._flows.get(key)
            if not flow or number not in flow.hops:
                new.append((row, 2))
        hops, flows, flow_hops = self.hops, len(self._flows), self._flow_hops
        for row, kind in sorted(new):
            if (
                kind == 0
                and hops >= HOPS_MAX
                or kind == 1
                and max(flows - FLOWS_MAX, flow_hops - FLOW_HOPS_MAX) >= 0
            ):
                return int(row)
            hops, flows, flow_hops = hops + (kind == 0), flows + (kind == 1), flow_hops + (kind == 2)
        return len(batch)

    def _note_groups(self, groups: BatchGroups) -> None:
        """Add a batch for which there is room."""
        batch = groups.batch
        are_answered = batch["latency"] >= 0
        destinations, hops = self._hops_of(groups)
        fronts = Fronts(groups, destinations, are_answered)
        self._note_hops(groups, destinations, hops, are_answered)
        flows: list[Any] = [None] * len(groups.flows)
        rows = groups.flows.firsts
        keys = batch.flows(rows)
        for group in rows.argsort().tolist():
            key = keys[group]
            flows[group] = self._flows.get(key) or self._new_flow(
                key, self._destinations[key[0]], batch.record(int(rows[group]))
            )
        self._note_flow_hops(groups, flows, fronts, are_answered)
        self._note_tcp(groups, flows)
        self._watch(groups, flows, are_answered)

    def _watch(self, groups: BatchGroups, flows: list[Flow], are_answered: Any) -> None:
        """Give the answers of each destination to its watch."""
        batch = groups.batch
        by_dest = Groups(batch["dest"], np.flatnonzero(are_answered))
        for start, end in zip(by_dest.starts.tolist(), by_dest.ends.tolist()):
            its = by_dest.order[start:end]
            destination = self._destinations[batch.text("dest", int(its[0]))]
            watch = destination.watch
            if not self._may_watch(destination, int(batch["sendtime"][its[-1]])):
                watch.losses.forget()
                continue
            its = its[np.argsort(batch["sendtime"][its], kind="stable")]
            for first in range(0, len(its), WATCHED_AT_ONCE):
                stretch = Stretch(batch, its[first : first + WATCHED_AT_ONCE], groups.flow_of, flows)
                watch.digest(destination.hops, is_over=True)
                done = stretch.note(watch, destination.hops)
                if done < len(stretch):
                    if not watch.rows:
                        self.waiting.append(destination)
                    watch.rows += stretch.rows(done, len(stretch))
                    watch.digest(destination.hops, is_over=False)
            watch.losses.close(int(batch["sendtime"][its[-1]]) // MOMENT - LATE)
        for row in Groups(batch["dest"]).firsts.tolist():
            self._destinations[batch.text("dest", row)].watch.losses.limit()

    def _hops_of(self, groups: BatchGroups) -> tuple[list[Destination], list[Hop]]:
        """Return the destination and the hop of each group in groups.hops. Create new destinations and hops."""
        batch, by_hop = groups.batch, groups.hops
        newest = by_hop.reduce(np.maximum, batch["sendtime"][by_hop.order] // 10**9).tolist()
        found: list[Any] = [None] * len(by_hop)
        rows = by_hop.firsts
        dests, numbers = batch.texts("dest", rows), batch["outttl"][rows].tolist()
        for group in rows.argsort().tolist():
            dest, number = dests[group], numbers[group]
            destination = self._destinations.get(dest) or self._new_destination(dest)
            found[group] = destination, destination.hops.get(number) or self._new_hop(destination, number)
            destination.note_second(newest[group])
        return [each[0] for each in found], [each[1] for each in found]

    def _note_hops(
        self, groups: BatchGroups, destinations: list[Destination], hops: list[Hop], are_answered: Any
    ) -> None:
        batch, by_hop = groups.batch, groups.hops
        answered, numbers = by_hop.only(are_answered)
        for group, size in enumerate(by_hop.sizes.tolist()):
            hops[group].unanswered += size
        latencies, responders = (batch[name][answered.order] for name in ("latency", "responder"))
        lowest, highest = (answered.reduce(function, responders).tolist() for function in (np.minimum, np.maximum))
        which = numbers.tolist()
        all_losses: list[Any] = [each.watch.losses for each in destinations]
        its_losses = [all_losses[group] for group in which]
        begun = first_answers(answered, its_losses)
        note_moments(batch, answered, its_losses, [hops[group] for group in which])
        for index, (group, start, end) in enumerate(
            zip(numbers.tolist(), answered.starts.tolist(), answered.ends.tolist())
        ):
            hop = hops[group]
            hop.unanswered -= end - start
            hop.latency.add_all(latencies[start:end])
            if lowest[index] == highest[index]:
                hop.note_answers(batch.names[lowest[index]], latencies[start:end])
                continue
            its = responders[start:end]
            for first in sorted(np.unique(its, return_index=True)[1].tolist()):
                hop.note_answers(batch.names[int(its[first])], latencies[start:end][its == its[first]])
        seconds = batch["sendtime"][answered.order] // 10**9
        before = np.array([hops[group].last_second for group in which], int)
        self._note_events(batch, answered, seconds, before, [destinations[group] for group in which])
        silent, numbers = by_hop.only(~are_answered)
        which = numbers.tolist()
        seconds = silent.numbers() << 35 | batch["sendtime"][silent.order] // 10**9
        for key in np.unique(seconds).tolist():
            hop, second = hops[which[key >> 35]], key & (1 << 35) - 1
            if second > hop.unanswered_until:
                hop.note_unanswered(second)
        note_silence(batch, silent, [all_losses[group] for group in which], begun)

    @staticmethod
    def _note_events(
        batch: Batch, answered: Groups, seconds: Any, before: Any, destinations: list[Destination]
    ) -> None:
        """Note the seconds in which hops answered.

        answered: the answers by hop. seconds: of each answer, in this order. before, destinations: of each hop, the
        last second in which it answered before, and its destination.
        """
        are_first = seconds > answered.running(seconds, before)
        events = Groups(answered.numbers()[are_first])
        rows, seconds = answered.order[are_first], seconds[are_first]
        which = answered.numbers()[are_first][events.starts]
        previous = np.concatenate([[0], seconds[:-1]])[: len(seconds)]
        previous[events.starts] = before[which]
        matter = seconds - previous > OUTAGE_MIN
        matter[:-1] |= matter[1:]
        matter[events.ends - 1] = True
        places = np.flatnonzero(matter)
        bounds = np.searchsorted(places, [events.starts, events.ends]).T.tolist()
        numbers, its_rows, its_seconds = (
            batch["outttl"][rows[events.starts]].tolist(),
            rows.tolist(),
            seconds.tolist(),
        )
        by_destination: dict[int, tuple[Destination, dict[int, Events]]] = {}
        for group, number, start, end, (first, last) in zip(
            which.tolist(), numbers, events.starts.tolist(), events.ends.tolist(), bounds
        ):
            destination = destinations[group]
            hop = destination.hops[number]
            its = Events(
                hop, number, its_rows[start:end], its_seconds[start:end],
                (places[first:last] - start).tolist(), hop.active_seconds, hop.last_second,
            )  # fmt: skip
            by_destination.setdefault(id(destination), (destination, {}))[1][number] = its
        for destination, its_events in by_destination.values():
            note_seconds(destination, its_events)

    def _note_flow_hops(self, groups: BatchGroups, flows: list[Flow], fronts: Fronts, are_answered: Any) -> None:
        batch, by_both = groups.batch, groups.flow_hops
        found = []
        rows = by_both.firsts
        of_flows, numbers = groups.flow_of[rows].tolist(), batch["outttl"][rows].tolist()
        for flow, number, size in zip(of_flows, numbers, by_both.sizes.tolist()):
            of_flow = flows[flow].hops.get(number) or self._new_flow_hop(flows[flow], number)
            of_flow.unanswered += size
            found.append(of_flow)
        answered, which = by_both.only(are_answered)
        self._note_moments(groups, flows, fronts, answered, [found[group] for group in which.tolist()])
        latencies, responders = (batch[name][answered.order] for name in ("latency", "responder"))
        figures = [
            answered.reduce(function, values).tolist()
            for function, values in (
                (np.add, latencies), (np.minimum, latencies), (np.maximum, latencies),
                (np.minimum, responders), (np.maximum, responders),
            )
        ]  # fmt: skip
        for group, start, end, total, least, most, lowest, highest in zip(
            which.tolist(), answered.starts.tolist(), answered.ends.tolist(), *figures
        ):
            of_flow = found[group]
            of_flow.answered += end - start
            of_flow.unanswered -= end - start
            of_flow.total += total
            of_flow.minimum = min(of_flow.minimum, least)
            of_flow.maximum = max(of_flow.maximum, most)
            if lowest == highest and batch.names[lowest] == of_flow.responder:
                continue
            key, number = batch.flow(int(answered.order[start])), numbers[group]
            hop = self._destinations[key[0]].hops[number]
            sent = batch["sendtime"][answered.order[start:end]].tolist()
            for responder, sendtime in zip(map(batch.names.__getitem__, responders[start:end].tolist()), sent):
                if of_flow.responder != responder:
                    self.note_responder(hop, of_flow, key, number, responder, sendtime)
                elif lowest == highest:
                    break  # one responder gave all these answers, so it does not change any more

    def _note_moments(
        self, groups: BatchGroups, flows: list[Flow], fronts: Fronts, answered: Groups, flow_hops: list[FlowHop]
    ) -> None:
        """Compare latencies with those of the hop in front, of the same flow, up to MOMENTS_APART moments before.

        Only the first answer of a flow and hop in each moment counts. answered: the answers of each of flow_hops.
        """
        batch = groups.batch
        moments = batch["sendtime"][answered.order] // MOMENT
        are_first = moments > answered.running(
            moments, np.array([its.until // MOMENT - 1 for its in flow_hops], int)
        )
        rows, moments = answered.order[are_first], moments[are_first]
        if not len(rows):
            return
        numbers, latencies, dests = (batch[name][rows] for name in ("outttl", "latency", "dest"))
        keys = groups.flow_of[rows] << 8 | numbers
        # What earlier batches left: negative row numbers place it in front of all rows.
        before = [
            (flow << 8 | number, its.moments)
            for flow, each in enumerate(flows)
            for number, its in each.hops.items()
        ]
        lengths = np.array([len(its) // 2 for _, its in before], int)
        pairs = array.array("q")
        for _, its_moments in before:
            pairs.extend(its_moments)
        places = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        known = (
            np.repeat([key for key, _ in before], lengths),
            places - MOMENTS_KEPT,
            *np.array(pairs, int).reshape(-1, 2).T,
        )
        all_keys, all_rows, all_moments, all_latencies = (
            np.concatenate([before, now]) for before, now in zip(known, (keys, rows, moments, latencies))
        )
        order = np.lexsort((all_rows, all_keys))  # also the order of time: the moments of a flow and hop only grow
        all_keys, all_rows, all_moments, all_latencies = (
            values[order] for values in (all_keys, all_rows, all_moments, all_latencies)
        )
        front = fronts.of(dests, numbers, rows)
        its_keys = groups.flow_of[rows] << 8 | front
        oldest = int(all_moments.min())
        newest = np.searchsorted(all_keys << 32 | all_rows + MOMENTS_KEPT, its_keys << 32 | rows + MOMENTS_KEPT) - 1
        at = np.searchsorted(all_keys << 35 | all_moments - oldest, its_keys << 35 | moments - oldest, "right") - 1
        at = np.minimum(at, newest)
        are_compared = (
            (front > 0)
            & (at >= 0)
            & (newest - at < MOMENTS_KEPT)
            & (all_keys[at] == its_keys)
            & (moments - all_moments[at] <= MOMENTS_APART)
        )
        differences = (latencies - all_latencies[at])[are_compared]
        by_hop = Groups((dests << 8 | numbers)[are_compared])
        compared = rows[are_compared]
        for start, end in zip(by_hop.starts.tolist(), by_hop.ends.tolist()):
            row = int(compared[by_hop.order[start]])
            hop = self._destinations[batch.text("dest", row)].hops[int(batch["outttl"][row])]
            hop.added.add_all(differences[by_hop.order[start:end]])
        of_rows = Groups(answered.numbers()[are_first])
        which, starts, ends = answered.numbers()[are_first][of_rows.starts].tolist(), of_rows.starts, of_rows.ends
        newest = np.array([moments, latencies]).T
        for group, start, end in zip(which, np.maximum(starts, ends - MOMENTS_KEPT).tolist(), ends.tolist()):
            flow_hops[group].note_moments(newest[start:end].tobytes())
        note_ttls(batch, rows, of_rows, [flow_hops[group] for group in which], self._destinations)

    def _note_tcp(self, groups: BatchGroups, flows: list[Flow]) -> None:
        batch = groups.batch
        rows = np.flatnonzero(batch["cwnd"] >= 0)
        by_dest = Groups(batch["dest"], rows[batch["srtt"][rows] >= 0])
        for start, end in zip(by_dest.starts.tolist(), by_dest.ends.tolist()):
            its_rows = by_dest.order[start:end]
            self._destinations[batch.text("dest", int(its_rows[0]))].srtt.add_all(batch["srtt"][its_rows] * 1000)
        if not len(rows):
            return
        with_window = Groups(batch["dest"], rows)
        for last in with_window.order[with_window.ends - 1].tolist():
            self._destinations[batch.text("dest", last)].cwnd = int(batch["cwnd"][last])
        by_flow = Groups(groups.flow_of, rows)
        which = groups.flow_of[by_flow.firsts].tolist()
        sequences, sent = batch["origseq"][by_flow.order], batch["sendtime"][by_flow.order]
        before = np.concatenate([[0], sequences[:-1]])[: len(sequences)]
        before[by_flow.starts] = [flows[flow].sequence for flow in which]
        advances = by_flow.reduce(np.add, (sequences != before).astype(int)).tolist()
        retrans = batch["retrans"][by_flow.order].clip(0)
        highest = by_flow.running(retrans, np.array([flows[flow].retrans for flow in which]))
        falls = by_flow.reduce(np.maximum, retrans < highest).tolist()
        most, newest = (by_flow.reduce(np.maximum, values).tolist() for values in (retrans, sent))
        for index, (group, start, end) in enumerate(zip(which, by_flow.starts.tolist(), by_flow.ends.tolist())):
            flow, destination = flows[group], self._destinations[batch.text("dest", int(by_flow.order[start]))]
            destination.tcp_probes += end - start
            destination.tcp_advances += advances[index]
            flow.sequence = int(sequences[end - 1])
            if falls[index]:
                its_sent, its_retrans = sent[start:end], retrans[start:end]
                earlier = np.maximum.accumulate(np.concatenate([[flow.last_sent], its_sent[:-1]]))
                if ((its_retrans < highest[start:end]) & (its_sent > earlier + REUSE_AFTER)).any():
                    for each in zip(its_sent.tolist(), its_retrans.tolist()):
                        note_retrans(destination, flow, *each)
                    continue  # a new connection uses the same ports
            if most[index] > flow.retrans:
                destination.retransmitted += most[index] - flow.retrans
                new = np.diff(np.maximum.accumulate(np.concatenate([[flow.retrans], retrans[start:end]])))
                for place in np.flatnonzero(new).tolist():
                    moment = int(sent[start + place]) // MOMENT
                    destination.watch.losses.note_retransmitted(moment, int(new[place]))
            flow.retrans = max(flow.retrans, most[index])
            flow.last_sent = max(flow.last_sent, newest[index])
