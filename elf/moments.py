# SPDX-License-Identifier: GPL-3.0-only
"""Loss in many rows at once: what Losses does with each of them, in a tenth of its time.

    note_moments()      counts the answers of a batch by moment
    note_silence()      counts its unanswered probes
    BulkLosses          has these counts until moments close; looks at many at once where nothing is lost

Needs numpy, which elfprobe.py does without.
"""

from __future__ import annotations

import bisect
from typing import Any, Sequence

import numpy as np

from elf.batches import Batch
from elf.groups import Groups
from elf.losses import ENOUGH, LATE, MOMENT, OPEN_MAX, REFERENCE_MAX, Cell, HopState, Losses, Moment

ANSWERED, UNANSWERED, RAISED, IN_ORDER = range(4)  # as of Cell


class BulkLosses(Losses):
    """The probes of a destination. It can also be fed many at once."""

    __slots__ = ("_keys", "_counts")

    def __init__(self, tests: Any) -> None:
        super().__init__(tests)
        self._clear()

    def _clear(self) -> None:
        """Forget what waits beside _open."""
        self._keys: list[Any] = []  # arrays: moment and number of the hop
        self._counts: list[Any] = []  # arrays of four rows, as of Cell

    @property
    def is_begun(self) -> bool:
        """Whether a hop has answered."""
        return bool(self._states)

    def state(self, number: int) -> HopState | None:
        return self._states.get(number)

    def add_all(self, moments: Any, numbers: Any, counts: Any) -> None:
        """Add counts (as of Cell) to moments and hops. The caller closes moments from time to time."""
        are_open = moments > self._closed
        if not self._states or not are_open.any():
            return
        self._keys.append((moments << 8 | numbers)[are_open])
        self._counts.append(counts[:, are_open])

    def _newest(self) -> int:
        newest = [int(keys.max()) >> 8 for keys in self._keys]
        return max([super()._newest(), *newest])

    def limit(self) -> None:
        if sum(map(len, self._keys)) + len(self._open) > OPEN_MAX:
            moments = {number for keys in self._keys for number in np.unique(keys >> 8).tolist()}
            if len(moments.union(self._open)) > OPEN_MAX:
                self.close(max(moments.union(self._open)) - LATE)

    def forget(self) -> None:
        super().forget()
        self._clear()

    def _look(self, until: int) -> None:
        keys, counts, retransmitted = self._take(until)
        starts = np.flatnonzero(np.diff(keys >> 8, prepend=-1))
        ends, numbers = [*starts.tolist(), len(keys)], (keys[starts] >> 8).tolist()
        places = dict(zip(numbers, range(len(numbers))))
        lossy = np.flatnonzero(np.add.reduceat(counts[UNANSWERED], starts) > 0).tolist() if numbers else []
        lossy.append(len(numbers))
        queue, at = sorted({*numbers, *retransmitted}), 0
        while at < len(queue):
            place = places.get(queue[at])
            if self._search is None:
                if place is None:
                    at += 1
                    continue
                stop = lossy[bisect.bisect_left(lossy, place)]
                if place < stop:
                    chosen = slice(ends[place], ends[stop])
                    self._add_quiet(keys[chosen] & 0xFF, counts[:, chosen])
                    at = bisect.bisect_left(queue, numbers[stop]) if stop < len(numbers) else len(queue)
                    continue
            moment = Moment()
            moment.retransmitted = retransmitted.get(queue[at], 0)
            if place is not None:
                chosen = slice(ends[place], ends[place + 1])
                cells = zip(*counts[:, chosen].tolist())
                moment.cells = {hop: Cell(*its) for hop, its in zip((keys[chosen] & 0xFF).tolist(), cells)}
            self._add(queue[at], moment)
            at += 1

    def _take(self, until: int) -> tuple[Any, Any, dict[int, int]]:
        """Take the moments up to this one: in order their keys and counts, and segments retransmitted."""
        retransmitted = {}
        for number in [number for number in self._open if number <= until]:  # of single rows
            moment = self._open.pop(number)
            retransmitted[number] = moment.retransmitted
            for hop, cell in moment.cells.items():
                self._keys.append(np.array([number << 8 | hop]))
                self._counts.append(np.array([[getattr(cell, name)] for name in Cell.__slots__]))
        if not self._keys:
            return np.zeros(0, int), np.zeros((4, 0), int), retransmitted
        keys, counts = np.concatenate(self._keys), np.concatenate(self._counts, axis=1)
        self._clear()
        by_key = Groups(keys)
        keys, counts = keys[by_key.firsts], np.add.reduceat(counts[:, by_key.order], by_key.starts, axis=1)
        closed = int(np.searchsorted(keys, until + 1 << 8))
        if closed < len(keys):
            self._keys, self._counts = [keys[closed:]], [counts[:, closed:]]
        return keys[:closed], counts[:, :closed], retransmitted

    def _add_quiet(self, numbers: Any, counts: Any) -> None:
        """Do what _add() does with moments in which nothing was lost, while nothing is searched for."""
        by_hop = Groups(numbers)
        counts = counts[:, by_hop.order]
        is_counted = counts[IN_ORDER] > 0
        ordered = by_hop.reduce(np.add, is_counted.astype(int)).tolist()
        counting = by_hop.reduce(np.add, (is_counted & (counts[RAISED] == counts[IN_ORDER])).astype(int)).tolist()
        totals = by_hop.reduce(np.add, counts[ANSWERED]).tolist()
        for place, (start, end) in enumerate(zip(by_hop.starts.tolist(), by_hop.ends.tolist())):
            state, answered = self._states[int(numbers[by_hop.order[start]])], counts[ANSWERED, start:end]
            state.compared += ordered[place]
            state.counting += counting[place]
            if state.is_known:
                self._tests.count += end - start
            else:
                before = np.cumsum(answered) - answered
                are_known = (state.answered + before > 0) & (state.answered + state.unanswered + before >= ENOUGH)
                self._tests.count += int(np.count_nonzero(are_known))
            if state.answered + state.unanswered + totals[place] > REFERENCE_MAX:
                for each in answered.tolist():
                    state.add(each, 0)
            else:
                state.add(totals[place], 0)


def first_answers(answered: Groups, all_losses: Sequence[BulkLosses]) -> dict[int, int]:
    """Return, for destinations that have not answered before, the row of the first answer, by id() of their losses.

    answered and all_losses: as for note_moments(), which comes after it.
    """
    found: dict[int, int] = {}
    for losses, row in zip(all_losses, answered.firsts.tolist()):
        if not losses.is_begun:
            found[id(losses)] = min(row, found.get(id(losses), row))
    return found


def note_moments(batch: Batch, answered: Groups, all_losses: Sequence[BulkLosses], hops: Sequence[Any]) -> None:
    """Do Losses.note_moment() for the first answer of hops in each moment, before the hops have these answers.

    answered: the answers of each of the hops, of which those of a destination come one behind the other.
    """
    numbers = batch["outttl"][answered.firsts].tolist()
    states = [losses.state(number) for losses, number in zip(all_losses, numbers)]
    moments = batch["sendtime"][answered.order] // MOMENT
    known = np.array([state.moment if state else -1 for state in states], int)
    at = np.flatnonzero(moments > answered.running(moments, known))
    if not len(at):
        return
    its_group = answered.numbers()[at]
    rows, moments = answered.order[at], moments[at]
    counts = np.array([hop.latency.count for hop in hops], int)[its_group] + at - answered.starts[its_group]
    idents, responders = batch["ripid"][rows], batch["responder"][rows]
    by_hop = Groups(its_group)
    firsts, lasts = by_hop.starts, by_hop.ends - 1
    before, counts_before, idents_before = (np.roll(values, 1) for values in (moments, counts, idents))
    is_same = np.roll(responders, 1) == responders
    is_new = np.zeros(len(at), bool)
    which = its_group[firsts].tolist()
    for place, group, responder in zip(firsts.tolist(), which, responders[firsts].tolist()):
        state = states[group]
        if state is None:
            state = states[group] = all_losses[group].new_state(numbers[group], hops[group].latency)
            is_new[place] = True
        before[place], counts_before[place] = state.moment, state.counted
        idents_before[place] = -1 if state.ident is None else state.ident
        is_same[place] = state.responder == batch.names[responder]
    for group, last in zip(which, lasts.tolist()):
        state = states[group]
        assert state
        state.moment, state.counted = int(moments[last]), int(counts[last])
        state.responder = batch.names[int(responders[last])]
        state.ident = None if idents[last] < 0 else int(idents[last])
    found = np.zeros((4, len(at)), int)
    found[ANSWERED] = counts - counts_before
    has_idents = (idents >= 0) & (idents_before >= 0) & is_same
    found[RAISED] = np.where(has_idents, idents - idents_before & 0xFFFF, 0)
    found[IN_ORDER] = np.where(has_idents, found[ANSWERED], 0)
    # Where answers are missing, the identification tells of the moment in front of this one.
    apart = np.flatnonzero(has_idents & (moments > before + 1) & ~is_new)
    found_apart = found[:, apart]
    found_apart[ANSWERED] = 0
    found[RAISED:, apart] = 0
    its_numbers = np.array(numbers)[its_group]
    old = np.flatnonzero(~is_new)
    add_to(all_losses, its_group[old], before[old], its_numbers[old], found[:, old])
    add_to(all_losses, its_group[apart], moments[apart] - 1, its_numbers[apart], found_apart)


def note_silence(batch: Batch, silent: Groups, all_losses: Sequence[BulkLosses], begun: dict[int, int]) -> None:
    """Do Losses.add_unanswered() for the unanswered probes to hops, as note_moments() does for answers.

    begun: what first_answers() has returned. Probes before that row do not count.
    """
    since = np.array([begun.get(id(losses), -1) for losses in all_losses], int)
    do_count = np.zeros(len(batch), bool)
    do_count[silent.order] = silent.order > since[silent.numbers()]
    silent, which = silent.only(do_count)
    all_losses = [all_losses[group] for group in which.tolist()]
    by_both = Groups(silent.numbers() << 35 | batch["sendtime"][silent.order] // MOMENT)
    rows, its_group = silent.order[by_both.firsts], silent.numbers()[by_both.firsts]
    counts = np.zeros((4, len(by_both)), int)
    counts[UNANSWERED] = by_both.sizes
    add_to(all_losses, its_group, batch["sendtime"][rows] // MOMENT, batch["outttl"][rows], counts)


def add_to(all_losses: Sequence[BulkLosses], which: Any, moments: Any, numbers: Any, counts: Any) -> None:
    """Give each of the losses its counts. which: places of the losses, in order."""
    places = dict(zip(map(id, all_losses), range(len(all_losses))))
    its_losses = np.array([places[id(losses)] for losses in all_losses], int)[which]
    by_losses = Groups(its_losses)
    for place, start, end in zip(
        its_losses[by_losses.firsts].tolist(), by_losses.starts.tolist(), by_losses.ends.tolist()
    ):
        chosen = by_losses.order[start:end]
        all_losses[place].add_all(moments[chosen], numbers[chosen], counts[:, chosen])
