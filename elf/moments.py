# SPDX-License-Identifier: GPL-3.0-only
"""Loss, fed with many rows at once: what Losses does row by row, in a tenth of the time.

    note_moments()      counts the answers of a batch by moment
    note_silence()      counts the unanswered probes of a batch by moment
    BulkLosses          keeps these counts until their moments are closed
    BulkSearch          adds many moments at once

elf/losses.py defines moment, cell, search and segment.

Needs numpy, which elfprobe.py does without.
"""

from __future__ import annotations

import bisect
import itertools
from typing import Any, Iterator, NamedTuple, Sequence

import numpy as np

from elf.batches import Batch
from elf.groups import Groups
from elf.losses import (
    ALARM,
    ENOUGH,
    FIRST_CHECK,
    LATE,
    MOMENT,
    OPEN_MAX,
    REFERENCE_MAX,
    SHARES,
    Cell,
    Counts,
    Cusum,
    HopState,
    Losses,
    Moment,
    Search,
    Segment,
)
from elf.losses import ANSWERED as ANSWERED_RATIOS

ANSWERED, UNANSWERED, RAISED, IN_ORDER = range(4)  # rows of counts: the fields of Cell


class Part(NamedTuple):
    """Successive moments and their cells: the probes to a hop in a moment. Arrays have an entry for each cell."""

    numbers: list[int]  # of the moments, ascending
    places: Any  # index of the cell's moment in numbers
    hops: Any
    counts: Any  # four rows: the fields of Cell
    retransmitted: list[int]  # TCP segments, by moment


class Moments:
    """Moments in the order of time, and their cells."""

    def __init__(self, keys: Any, counts: Any, retransmitted: dict[int, int]) -> None:
        """keys: moment << 8 | hop of each cell, ascending. counts: four rows, the fields of Cell."""
        numbers = np.union1d(keys >> 8, np.array(list(retransmitted), int))
        self.numbers: list[int] = numbers.tolist()
        self._keys, self._counts, self._retransmitted = keys, counts, retransmitted
        bounds = np.append(np.searchsorted(keys, numbers << 8), len(keys))
        self._bounds: list[int] = bounds.tolist()  # index of each moment's first cell; then the number of cells
        before = np.append(0, np.cumsum(counts[UNANSWERED]))[bounds]
        self._lossy = [*np.flatnonzero(np.diff(before)).tolist(), len(numbers)]

    def __len__(self) -> int:
        return len(self.numbers)

    def next_lossy(self, at: int) -> int:
        """Return the index of the first moment with loss from at on. Without one, return the number of moments."""
        place: int = self._lossy[bisect.bisect_left(self._lossy, at)]
        return place

    def cells(self, start: int, stop: int) -> tuple[Any, Any]:
        """Return hops and counts (four rows) of the cells of the moments from index start up to stop."""
        chosen = slice(self._bounds[start], self._bounds[stop])
        return self._keys[chosen] & 0xFF, self._counts[:, chosen]

    def moment(self, at: int) -> Moment:
        """Return the moment with this index as Losses has it."""
        hops, counts = self.cells(at, at + 1)
        its = Moment()
        its.retransmitted = self._retransmitted.get(self.numbers[at], 0)
        its.cells = {hop: Cell(*values) for hop, values in zip(hops.tolist(), counts.T.tolist())}
        return its

    def part(self, start: int, stop: int) -> Part:
        hops, counts = self.cells(start, stop)
        places = np.repeat(np.arange(stop - start), np.diff(self._bounds[start : stop + 1]))
        numbers = self.numbers[start:stop]
        return Part(numbers, places, hops, counts, [self._retransmitted.get(number, 0) for number in numbers])


class Sums:
    """The values that Search.sums has after each of many moments."""

    def __init__(self, before: Counts, part: Part, searched: Sequence[int]) -> None:
        """before: sums in front of the part. searched: hops of the search. Other hops make no moment lossy."""
        self._before = before
        self._hops = np.union1d(part.hops, np.array(searched, int))
        counts = np.zeros((4, len(part.numbers), len(self._hops)), int)
        counts[:, part.places, np.searchsorted(self._hops, part.hops)] = part.counts
        unanswered = counts[UNANSWERED][:, np.isin(self._hops, searched)].sum(axis=1)
        self._sums = counts.cumsum(axis=1)
        self._others = np.cumsum([part.retransmitted, unanswered > 0, unanswered, unanswered**2], axis=1)

    def until(self, stop: int) -> Counts:
        """Return the sums of the first stop moments of the part, added to those before."""
        its = self._before.copy()
        if stop:
            for hop, *sums in zip(self._hops.tolist(), *self._sums[:, stop - 1].tolist()):
                a, u, raised, in_order = map(int.__add__, sums, its.hops.get(hop, (0, 0, 0, 0)))
                its.hops[hop] = a, u, raised, in_order
            retransmitted, lossy, unanswered, squares = self._others[:, stop - 1].tolist()
            its.retransmitted += retransmitted
            its.moments += stop
            its.lossy += lossy
            its.unanswered += unanswered
            its.squares += squares
        return its


class BulkSearch(Search):
    """A search to which many moments can be added at once. After add_all(), add() gives wrong results.

    Arrays have a row for each pair of hop and share, and a column for each moment.
    """

    def add_all(self, part: Part) -> int:
        """Do add() for the moments until the search is over. Return the number of moments added."""
        cusums = [cusum for *_, its in self._hops for cusum in its]
        sums = Sums(self.sums, part, sorted(self.numbers))
        ratios = self._ratios(part)
        scores = cusum_scores(ratios, np.array([cusum.score for cusum in cusums], int))
        found: list[tuple[int, int, Segment]] = []
        are_high = scores.max(axis=1, initial=0) >= ALARM
        for row, cusum in enumerate(cusums):
            if are_high[row] or cusum.most >= ALARM:
                its = segments(cusum, ratios[row], scores[row], part.numbers, sums)
                found += ((place, row, segment) for place, segment in its)
        are_on = scores.any(axis=0)
        done = len(part.numbers) if are_on.all() else int(are_on.argmin()) + 1
        for cusum, its_scores in zip(cusums, scores[:, :done]):
            cusum.score = int(its_scores[-1])
            if not cusum.score:
                cusum.clear()
            elif cusum.most < ALARM:
                begin(cusum, its_scores, part.numbers, sums)
        ended = sorted(each for each in found if each[0] < done)
        for _, together in itertools.groupby(ended, key=lambda each: each[0]):
            self.segments += (segment for *_, segment in together)
            self.limit()
        self.sums = sums.until(done)
        return done

    def _ratios(self, part: Part) -> Any:
        """Return the log likelihood ratios (UNIT). A hop without a probe in a moment has 0: it changes no sum."""
        weights = np.array([its for _, its, _ in self._hops], int).reshape(-1, len(SHARES), 1)
        place_of = np.full(256, -1)
        place_of[[number for number, *_ in self._hops]] = range(len(weights))
        hops = place_of[part.hops]
        its = hops >= 0
        at = hops[its], part.places[its]
        shape = len(weights), len(part.numbers)
        answered, unanswered, are_there = (np.zeros(shape, kind) for kind in (int, int, bool))
        answered[at], unanswered[at], are_there[at] = part.counts[ANSWERED, its], part.counts[UNANSWERED, its], True
        ratios = (unanswered[:, None] * weights).cumsum(axis=0)
        ratios += answered.cumsum(axis=0)[:, None] * np.array(ANSWERED_RATIOS)[:, None]
        ratios *= are_there[:, None]
        return ratios.reshape(-1, len(part.numbers))


def cusum_scores(ratios: Any, before: Any) -> Any:
    """Return cumulative sums along the last axis. A sum that would fall below 0 starts anew at 0.

    before: the score of each sum in front of these ratios. After a score of ALARM or more, a sum may have to start
    anew at a value above 0: segments() sees to that.
    """
    sums = ratios.cumsum(axis=-1)
    sums += before[..., None]
    return sums - np.minimum.accumulate(np.minimum(sums, 0), axis=-1)


def begin(cusum: Cusum, scores: Any, numbers: Sequence[int], sums: Sums) -> None:
    """Set begin and before of a sum from its scores, of which the last is above 0.

    It begins behind the last score that is 0. Without one it goes on from earlier moments, and keeps both.
    """
    zeros = np.flatnonzero(scores == 0)
    if len(zeros) or cusum.before is None:
        first = int(zeros[-1]) + 1 if len(zeros) else 0
        cusum.begin, cusum.before = numbers[first], sums.until(first)


def segments(
    cusum: Cusum, ratios: Any, scores: Any, numbers: Sequence[int], sums: Sums
) -> Iterator[tuple[int, Segment]]:
    """Yield each segment that ends, with the index of the moment. Set its score to 0 and correct those behind.

    Below ALARM, Cusum.most, end and after are not kept up to date: nobody reads them there.
    """
    at = 0
    while at < len(scores):
        if cusum.most < ALARM:
            are_high = scores[at:] >= ALARM
            if not are_high.any():
                return
            at += int(are_high.argmax())
            begin(cusum, scores[: at + 1], numbers, sums)
        most = np.maximum.accumulate(np.maximum(scores[at:], cusum.most))
        are_ends = scores[at:] <= np.maximum(most - ALARM, 0)
        end = at + int(are_ends.argmax()) if are_ends.any() else len(scores)
        highest = int(scores[at:end].max(initial=0))
        if highest > cusum.most:
            place = at + int(scores[at:end].argmax())
            cusum.most, cusum.end, cusum.after = highest, numbers[place], sums.until(place + 1)
        if end < len(scores):
            segment = cusum.segment()
            assert segment
            yield end, segment
            cusum.clear()
            scores[end] = 0
            scores[end + 1 :] = cusum_scores(ratios[end + 1 :], np.array(0))
        at = end + 1


class BulkLosses(Losses):
    """The probes of a destination, by moment and hop. Many can be added at once."""

    __slots__ = ("_keys", "_counts")

    def __init__(self, tests: Any) -> None:
        super().__init__(tests)
        self._clear()

    def _clear(self) -> None:
        """Forget the counts in arrays that wait to be closed. _open has those of single rows."""
        self._keys: list[Any] = []  # arrays: moment << 8 | hop
        self._counts: list[Any] = []  # arrays of four rows: the fields of Cell

    @property
    def is_begun(self) -> bool:
        """Whether a hop has answered."""
        return bool(self._states)

    def state(self, number: int) -> HopState | None:
        return self._states.get(number)

    def add_all(self, moments: Any, numbers: Any, counts: Any) -> None:
        """Add counts (four rows: the fields of Cell) to moments and hops. Ignore closed moments.

        The caller closes moments from time to time, or calls limit().
        """
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
        moments, at = self._take(until), 0
        while at < len(moments):
            if self._search is None:
                quiet, at = at, moments.next_lossy(at)
                self._add_quiet(*moments.cells(quiet, at))
                if at == len(moments):
                    return
            search, number = self._search, moments.numbers[at]
            if search is None or number < search.begin + FIRST_CHECK:
                self._add(number, moments.moment(at))  # most searches are short: this is faster then
                at += 1
            else:
                at = self._search_on(search, moments, at)

    def _new_search(self, begin: int) -> Search:
        return BulkSearch(begin, list(self._hops_to_search()))

    def _search_on(self, search: Search, moments: Moments, at: int) -> int:
        """Do _add() for the moments from index at on until the search is checked. Return the index behind them."""
        assert isinstance(search, BulkSearch)
        stop = min(bisect.bisect_left(moments.numbers, search.check_at, at) + 1, len(moments))
        stop = at + search.add_all(moments.part(at, stop))
        hops, counts = moments.cells(at, stop)
        is_counted = (counts[IN_ORDER] > 0) & (counts[UNANSWERED] == 0)
        is_counting = is_counted & (counts[RAISED] == counts[IN_ORDER])
        cells, compared, counting = (
            np.bincount(each, minlength=256).tolist() for each in (hops, hops[is_counted], hops[is_counting])
        )
        for hop, state in self._states.items():
            state.compared += compared[hop]
            state.counting += counting[hop]
            self._tests.count += cells[hop] * state.is_known
        self._check(search, moments.numbers[stop - 1])
        return stop

    def _take(self, until: int) -> Moments:
        """Remove the waiting moments up to this one, and return them."""
        retransmitted = {}
        for number in [number for number in self._open if number <= until]:  # they have the counts of single rows
            moment = self._open.pop(number)
            retransmitted[number] = moment.retransmitted
            for hop, cell in moment.cells.items():
                self._keys.append(np.array([number << 8 | hop]))
                self._counts.append(np.array([[getattr(cell, name)] for name in Cell.__slots__]))
        if not self._keys:
            return Moments(np.zeros(0, int), np.zeros((4, 0), int), retransmitted)
        keys, counts = np.concatenate(self._keys), np.concatenate(self._counts, axis=1)
        self._clear()
        by_key = Groups(keys)
        keys, counts = keys[by_key.firsts], np.add.reduceat(counts[:, by_key.order], by_key.starts, axis=1)
        closed = int(np.searchsorted(keys, until + 1 << 8))
        if closed < len(keys):
            self._keys, self._counts = [keys[closed:]], [counts[:, closed:]]
        return Moments(keys[:closed], counts[:, :closed], retransmitted)

    def _add_quiet(self, numbers: Any, counts: Any) -> None:
        """Do _add() for cells of moments without loss, while there is no search. numbers: the cells' hops."""
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
    """Return the row of the first answer of each destination without earlier answers, by id() of its losses.

    answered and all_losses: as for note_moments(). Call this before note_moments(), which adds the answers.
    """
    found: dict[int, int] = {}
    for losses, row in zip(all_losses, answered.firsts.tolist()):
        if not losses.is_begun:
            found[id(losses)] = min(row, found.get(id(losses), row))
    return found


def note_moments(batch: Batch, answered: Groups, all_losses: Sequence[BulkLosses], hops: Sequence[Any]) -> None:
    """Do Losses.note_moment() for the first answer of each hop in each moment.

    answered: the answers by hop; the hops of a destination are neighbours. all_losses, hops: of each group. Call
    this before the answers are added to the hops' histograms, because it reads their counts.
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
    # If moments without answers lie between, the rise of the identification counts for the last of them.
    apart = np.flatnonzero(has_idents & (moments > before + 1) & ~is_new)
    found_apart = found[:, apart]
    found_apart[ANSWERED] = 0
    found[RAISED:, apart] = 0
    its_numbers = np.array(numbers)[its_group]
    old = np.flatnonzero(~is_new)
    add_to(all_losses, its_group[old], before[old], its_numbers[old], found[:, old])
    add_to(all_losses, its_group[apart], moments[apart] - 1, its_numbers[apart], found_apart)


def note_silence(batch: Batch, silent: Groups, all_losses: Sequence[BulkLosses], begun: dict[int, int]) -> None:
    """Do Losses.add_unanswered() for all unanswered probes of a batch.

    silent: these probes by hop. all_losses: of each group. begun: the result of first_answers(). A probe in
    front of the first answer of its destination does not count.
    """
    if begun:  # rarely: only in the batch with the first answer of a destination
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
    """Add each column of counts to all_losses[which]. which, moments, numbers: losses, moment and hop of each."""
    places = dict(zip(map(id, all_losses), range(len(all_losses))))
    its_losses = np.array([places[id(losses)] for losses in all_losses], int)[which]
    by_losses = Groups(its_losses)
    for place, start, end in zip(
        its_losses[by_losses.firsts].tolist(), by_losses.starts.tolist(), by_losses.ends.tolist()
    ):
        chosen = by_losses.order[start:end]
        all_losses[place].add_all(moments[chosen], numbers[chosen], counts[:, chosen])
