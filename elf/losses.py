# SPDX-License-Identifier: GPL-3.0-only
"""Loss in time: when a larger share of probes than usual was unanswered, and from which hop on.

    Losses          what became of the probes of a destination, by moment and hop
    Search          looks for the times in which more were unanswered: CUSUM (Page, 1954) for several shares and for
                    all hops from some hop on, the one with the largest likelihood ratio first (Lorden, 1971)
    LossEpisode     such a time: from when until when, the first hop, the share, how sure

Rows of unanswered probes come seconds late. So moments wait for them. Memory is bounded: some counts for each hop
and waiting moment, and SEGMENTS_MAX segments of a search. docs/findings.md has the method.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Iterator, Sequence

from elf.inference import fisher, wilson_share

MOMENT = 10**8  # ns: probes are counted in moments
LATE = 80  # moments, after which rows of unanswered probes have come
AT_THE_END = 10  # moments before the end of a run that do not count: answers may have been on their way
OPEN_MAX = 256  # moments that wait
ENOUGH = 100  # probes to a hop, from which on what is usual is known
REFERENCE_MAX = 20_000  # probes to a hop, above which older ones count half
SHARES = 0.003, 0.01, 0.03, 0.1, 0.2, 0.4, 0.9  # of probes lost that are looked for
WORTH_KEEPING = 0.001  # p of a single test, above which a segment is forgotten
UNIT = 2**-32  # of log likelihood ratios. They are integers, so that a sum is the same in any order
ALARM = round(math.log(len(SHARES) / WORTH_KEEPING) / UNIT)  # of such a p; a fall by as much ends a segment
LOSSY_MIN = 3  # moments with unanswered probes in an episode: those of one moment may have met one full queue
LASTING = 6000  # moments, from which on a higher share is the usual one
FIRST_CHECK = 16  # moments of a search, after which it is looked at for the first time
SEGMENTS_MAX = 200
EPISODES_MAX = 200
LIKELY = 1.92  # log likelihood below the highest one, within which 95 % of the true places are (Wilks)
COUNTER_FROM = 20  # moments, from which on ...
COUNTED_SHARE = 0.9  # ... an identification is a counter, if it rises by 1 with each answer in so many
NEARLY_ALL = 0.9  # of the probes: perhaps an outage


@dataclasses.dataclass
class LossEpisode:
    """More probes than usual were unanswered for a while, at a hop and behind it."""

    begin: int  # ns, CLOCK_MONOTONIC
    end: int
    hop: int  # the first one, most likely
    front: int  # the last one that is surely not among them; 0: none
    until: int  # the last one that may be the first
    share: float  # of the probes to them that were unanswered
    low: float  # between these with 95 %
    high: float
    usual: float  # share
    p: float  # that it is by chance, of this test alone
    probes: int
    behind: int  # how many hops behind answer
    retransmitted: int  # segments, meanwhile
    back: tuple[float, float, float] | None  # share of the losses on the way back, interval; None: not known
    lasts: bool = False

    @property
    def weight(self) -> float:
        return self.share * (self.end - self.begin)


class Counts:
    """Sums over moments."""

    __slots__ = ("hops", "retransmitted", "moments", "lossy", "unanswered", "squares")

    def __init__(self) -> None:
        self.hops: dict[int, tuple[int, int, int, int]] = {}  # answered, unanswered; raised, in_order: see Cell
        self.retransmitted = self.moments = 0
        self.lossy = self.unanswered = self.squares = 0  # moments, probes, and sum of their squares by moment

    def copy(self) -> Counts:
        its = Counts()
        its.hops = dict(self.hops)
        for name in self.__slots__[1:]:
            setattr(its, name, getattr(self, name))
        return its

    def add(self, moment: Moment, numbers: set[int]) -> None:
        """Add a moment. Unanswered probes to other hops than these make it no lossy one."""
        unanswered = 0
        for number, cell in moment.cells.items():
            a, u, raised, in_order = self.hops.get(number, (0, 0, 0, 0))
            unanswered += cell.unanswered if number in numbers else 0
            self.hops[number] = (
                a + cell.answered, u + cell.unanswered, raised + cell.raised, in_order + cell.in_order
            )  # fmt: skip
        self.retransmitted += moment.retransmitted
        self.moments += 1
        self.lossy += unanswered > 0
        self.unanswered += unanswered
        self.squares += unanswered * unanswered

    def since(self, before: Counts) -> Counts:
        its = Counts()
        none = 0, 0, 0, 0
        for number, sums in self.hops.items():
            a, u, raised, in_order = map(int.__sub__, sums, before.hops.get(number, none))
            its.hops[number] = a, u, raised, in_order
        for name in self.__slots__[1:]:
            setattr(its, name, getattr(self, name) - getattr(before, name))
        return its

    def dispersion(self) -> float:
        """Return by what factor the variance of the losses of a moment is above that of independent ones."""
        if not self.unanswered:
            return 1.0
        mean = self.unanswered / self.moments
        return max((self.squares / self.moments - mean * mean) / mean, 1.0)


class Cell:
    """The probes of a moment to a hop."""

    __slots__ = ("answered", "unanswered", "raised", "in_order")

    def __init__(self, answered: int = 0, unanswered: int = 0, raised: int = 0, in_order: int = 0) -> None:
        self.answered, self.unanswered = answered, unanswered
        self.raised = raised  # by how much the responder's IP identification rose meanwhile ...
        self.in_order = in_order  # ... while it answered so many probes


class Moment:
    __slots__ = ("cells", "retransmitted")

    def __init__(self) -> None:
        self.cells: dict[int, Cell] = {}
        self.retransmitted = 0


class HopState:
    """How far the answers of a hop are counted, and what is usual there."""

    __slots__ = (
        "moment", "counted", "latency", "responder", "ident", "answered", "unanswered", "counting", "compared",
    )  # fmt: skip

    def __init__(self, latency: Any) -> None:
        self.moment = -1  # to which answers belong that are not counted yet
        self.counted = latency.count  # answers
        self.latency = latency  # its count is the number of answers
        self.responder = ""  # of the first answer in the moment ...
        self.ident: int | None = None  # ... and its IP identification
        self.answered = self.unanswered = 0  # usually
        self.counting = self.compared = 0  # moments without loss in which the identification counted answers; all

    @property
    def is_known(self) -> bool:
        return self.answered > 0 and self.answered + self.unanswered >= ENOUGH

    @property
    def usual(self) -> float:
        """The share that is unanswered; not 0, since a share of so many that are answered may still be lost."""
        return (self.unanswered + 0.5) / (self.answered + self.unanswered + 1)

    def add(self, answered: int, unanswered: int) -> None:
        if not answered + unanswered:
            return
        self.answered += answered
        self.unanswered += unanswered
        if self.answered + self.unanswered > REFERENCE_MAX:
            self.answered //= 2
            self.unanswered //= 2

    @property
    def counts_answers(self) -> bool:
        """Whether the responder's IP identification is a counter that nothing but these answers raises."""
        return self.compared >= COUNTER_FROM and self.counting >= COUNTED_SHARE * self.compared


class Cusum:
    """The cumulative sum of log likelihood ratios since they were last against loss."""

    __slots__ = ("score", "begin", "before", "most", "end", "after")

    def __init__(self) -> None:
        self.begin = self.end = 0  # moments
        self.clear()

    def clear(self) -> None:
        self.score = self.most = 0  # UNIT
        self.before: Counts | None = None  # sums until begin
        self.after: Counts | None = None  # sums until the most likely end

    def add(self, ratio: int, moment: int, before: Counts, after: Counts) -> Segment | None:
        """Add a moment. Return a segment that has ended, if there may be something in it."""
        if self.before is None:
            if ratio <= 0:
                return None
            self.begin, self.before = moment, before
        self.score += ratio
        if self.score > self.most:
            self.most, self.end, self.after = self.score, moment, after
        if 0 < self.score > self.most - ALARM:
            return None
        found = self.segment()
        self.clear()
        return found

    def segment(self) -> Segment | None:
        if self.before is None or self.after is None or self.most < ALARM:
            return None
        return Segment(self.most * UNIT, self.begin, self.end, self.before, self.after)


@dataclasses.dataclass
class Segment:
    """Moments in which loss is more likely than what is usual."""

    score: float  # log likelihood ratio
    begin: int  # first and last moment
    end: int
    before: Counts
    after: Counts

    def meets(self, other: Segment) -> bool:
        return self.begin <= other.end and other.begin <= self.end


class Search:
    """Looks for segments from the first unanswered probe on, until nothing speaks for loss any more."""

    def __init__(self, begin: int, hops: Sequence[tuple[int, float]]) -> None:
        """hops: numbers, the farthest first, and shares that are usually unanswered."""
        self.begin = begin  # moment
        self.check_at = begin + FIRST_CHECK
        self.numbers = {number for number, _ in hops}
        self.sums = Counts()
        self.segments: list[Segment] = []
        self._hops = [
            (
                number,
                [round(math.log((usual + (1 - usual) * share) / usual) / UNIT) for share in SHARES],
                [Cusum() for _ in SHARES],
            )
            for number, usual in hops
        ]
        self._copy = self.sums.copy()

    def add(self, number: int, moment: Moment) -> None:
        before = self._copy
        self.sums.add(moment, self.numbers)
        after = self._copy = self.sums.copy()
        answered, ratios = 0, [0] * len(SHARES)
        for hop, weights, cusums in self._hops:
            cell = moment.cells.get(hop)
            if cell is None:
                continue
            answered += cell.answered
            unanswered = cell.unanswered
            for place, cusum in enumerate(cusums):
                if unanswered:
                    ratios[place] += unanswered * weights[place]
                ratio = ratios[place] + answered * ANSWERED[place]
                if ratio <= 0 and cusum.before is None:
                    continue  # as most of them: a call takes long
                found = cusum.add(ratio, number, before, after)
                if found:
                    self.segments.append(found)
        self.limit()

    def limit(self) -> None:
        """Forget the least likely segments if there are too many."""
        if len(self.segments) > SEGMENTS_MAX:
            self.segments = sorted(self.segments, key=lambda its: -its.score)[: SEGMENTS_MAX // 2]

    def open_segments(self) -> list[Segment]:
        """Return segments that have not ended."""
        every = (cusum.segment() for _, _, cusums in self._hops for cusum in cusums)
        return [segment for segment in every if segment]

    @property
    def is_over(self) -> bool:
        return all(cusum.before is None for _, _, cusums in self._hops for cusum in cusums)


ANSWERED = [round(math.log1p(-share) / UNIT) for share in SHARES]  # what an answered probe adds to a sum


class Losses:
    """The probes of a destination, answered or not, by moment and hop."""

    __slots__ = ("_tests", "_open", "_states", "_search", "_found", "_closed")

    def __init__(self, tests: Any) -> None:
        """tests: counts comparisons (elf.episodes.Comparisons)."""
        self._tests = tests
        self._open: dict[int, Moment] = {}
        self._states: dict[int, HopState] = {}
        self._search: Search | None = None
        self._found: list[LossEpisode] = []
        self._closed = -1  # the newest moment that waits no longer

    def note_moment(
        self, number: int, latency: Any, moment: int, count: int, responder: str, ident: int | None
    ) -> None:
        """Note that an answered probe left in a later moment than those before. Others are known by their count.

        count: answers of the hop before this one. latency: the histogram of all answers, whose count grows.
        """
        state = self._states.get(number)
        if state is None:
            state = self.new_state(number, latency)
        elif moment <= state.moment:
            return
        else:
            answered = count - state.counted
            cell = self._count(number, state.moment, answered)
            if ident is not None and state.ident is not None and responder == state.responder:
                if moment > state.moment + 1:  # where answers are missing
                    cell = self._cell(number, moment - 1)
                if cell:
                    cell.raised += (ident - state.ident) & 0xFFFF
                    cell.in_order += answered
        state.moment, state.counted, state.responder, state.ident = moment, count, responder, ident

    def new_state(self, number: int, latency: Any) -> HopState:
        state = self._states[number] = HopState(latency)
        return state

    def note_unanswered(self, number: int, moment: int) -> None:
        """Note an unanswered probe."""
        self.add_unanswered(number, moment, 1)
        self.limit()

    def limit(self) -> None:
        """Close the oldest moments if too many wait: those of a destination that does not answer any more."""
        if len(self._open) > OPEN_MAX:
            self.close(max(self._open) - LATE)

    def add_unanswered(self, number: int, moment: int, count: int) -> None:
        """Note unanswered probes. The caller closes moments from time to time, or calls limit()."""
        if not self._states:
            return  # nothing has answered yet: what is usual is not known
        cell = self._cell(number, moment)
        if cell:
            cell.unanswered += count

    def note_retransmitted(self, moment: int, segments: int) -> None:
        if moment > self._closed:
            self._at(moment).retransmitted += segments

    def _at(self, moment: int) -> Moment:
        its = self._open.get(moment)
        if its is None:
            its = self._open[moment] = Moment()
        return its

    def _cell(self, number: int, moment: int) -> Cell | None:
        if moment <= self._closed:
            return None  # later than all others
        cells = self._at(moment).cells
        cell = cells.get(number)
        if cell is None:
            cell = cells[number] = Cell()
        return cell

    def _count(self, number: int, moment: int, answered: int) -> Cell | None:
        cell = self._cell(number, moment)
        if cell:
            cell.answered += answered
        return cell

    def close(self, until: int) -> None:
        """Look at the moments up to this one: no more rows of them are to come."""
        if until <= self._closed:
            return
        for number, state in self._states.items():
            if 0 <= state.moment <= until and state.latency.count > state.counted:
                self._count(number, state.moment, state.latency.count - state.counted)
                state.counted, state.ident = state.latency.count, None
        self._look(until)
        self._closed = until

    def _look(self, until: int) -> None:
        """Look at the moments that wait, up to this one."""
        for number in sorted(number for number in self._open if number <= until):
            self._add(number, self._open.pop(number))

    def end(self) -> None:
        """Look at all moments, but those at the end of the run."""
        self.close(self._newest() - AT_THE_END)

    def _newest(self) -> int:
        """Return the newest moment with a probe, -1 if there is none."""
        return max([*self._open, *(state.moment for state in self._states.values())], default=-1)

    def forget(self) -> None:
        """Forget all but the episodes."""
        self._found = self.episodes()
        self._open, self._states, self._search = {}, {}, None

    def _add(self, number: int, moment: Moment) -> None:
        is_lossy, known = False, 0
        for hop, cell in moment.cells.items():
            is_lossy |= cell.unanswered > 0
            state = self._states.get(hop)
            if state:
                known += state.is_known
                if cell.in_order and not cell.unanswered:
                    state.compared += 1
                    state.counting += cell.raised == cell.in_order
        self._tests.count += known
        search = self._search
        if search is None:
            if not is_lossy:
                for hop, cell in moment.cells.items():
                    self._states[hop].add(cell.answered, 0)
                return
            search = self._search = self._new_search(number)
        search.add(number, moment)
        self._check(search, number)

    def _new_search(self, begin: int) -> Search:
        return Search(begin, list(self._hops_to_search()))

    def _check(self, search: Search, number: int) -> None:
        """End a search if, after this moment, nothing speaks for loss any more, or if it has lasted too long."""
        if search.is_over:
            self._end_search(search)
        elif number >= search.check_at:
            search.check_at = number + min(number - search.begin, LASTING // 8)  # ever more seldom
            segments = search.open_segments()
            lasts = any(number - each.begin > LASTING for each in segments)
            if lasts or not (any(self._episodes_of(search)) if segments else self._may_go_on(search, number)):
                self._end_search(search, lasts)  # what seemed usual may have been too low by chance

    def _may_go_on(self, search: Search, number: int) -> bool:
        """Return whether a search is short, and has fewer probes than what is usual is known by."""
        probes = sum(answered + unanswered for answered, unanswered, *_ in search.sums.hops.values())
        known = sum(state.answered + state.unanswered for state in self._states.values())
        return number - search.begin < LASTING and probes < known

    def _hops_to_search(self) -> Iterator[tuple[int, float]]:
        """Yield hops, the farthest first, and their usual shares: without those that limit their answers."""
        behind = behind_unanswered = 0
        for number, state in sorted(self._states.items(), reverse=True):
            if state.is_known:
                probes = state.answered + state.unanswered
                if not is_clearly_more(state.unanswered, probes, behind_unanswered, behind):
                    behind, behind_unanswered = behind + probes, behind_unanswered + state.unanswered
                    yield number, state.usual

    def _end_search(self, search: Search, is_usual_now: bool = False) -> None:
        """Keep what the search has found. The rest is usual; with is_usual_now, what has lasted so long is, too."""
        self._search = None
        found = list(self._episodes_of(search))
        self._found = sorted([*self._found, *(each for each, _ in found)], key=lambda its: -its.weight)[
            :EPISODES_MAX
        ]
        if is_usual_now:
            for state in self._states.values():
                state.answered = state.unanswered = 0
            found = []
        parts = [segment.after.since(segment.before).hops for _, segment in found]
        for number, (answered, unanswered, *_) in search.sums.hops.items():
            if number in self._states:
                its = [part[number] for part in parts if number in part]
                self._states[number].add(
                    answered - sum(a for a, *_ in its), unanswered - sum(u for _, u, *_ in its)
                )

    def episodes(self) -> list[LossEpisode]:
        """Return the episodes, with those that still last, in the order of time."""
        found = list(self._found)
        if self._search:
            found += (episode for episode, _ in self._episodes_of(self._search))
        return sorted(found, key=lambda its: its.begin)

    def _episodes_of(self, search: Search) -> Iterator[tuple[LossEpisode, Segment]]:
        """Yield what a search has found: the most likely segments, of those that overlap."""
        taken: list[Segment] = []
        last = search.open_segments()
        ended = set(map(id, search.segments))
        for segment in sorted([*search.segments, *last], key=lambda its: -its.score):
            if any(map(segment.meets, taken)):
                continue
            episode = self._episode(segment, search.numbers)
            if episode:
                taken.append(segment)
                episode.lasts = id(segment) not in ended
                yield episode, segment

    def _episode(self, segment: Segment, numbers: set[int]) -> LossEpisode | None:
        """Return the episode that a segment shows at these hops. None: it may be chance, or they limit answers."""
        counts = segment.after.since(segment.before)
        if counts.lossy < LOSSY_MIN:
            return None
        hops = {
            number: (answered + unanswered, unanswered)
            for number, (answered, unanswered, *_) in sorted(counts.hops.items())
            if answered + unanswered and number in numbers
        }
        place = self._place(hops)
        if place is None:
            return None
        first, likely = place
        its = [number for number in hops if number >= first]
        probes, unanswered = (sum(hops[number][part] for number in its) for part in (0, 1))
        states = [self._states[number] for number in its]
        usual_unanswered = sum(state.unanswered for state in states)
        usual = usual_unanswered + sum(state.answered for state in states)
        p = max(len(SHARES) * math.exp(-segment.score), fisher(unanswered, probes, usual_unanswered, usual))
        if p > WORTH_KEEPING:
            return None
        share, low, high = wilson_share(unanswered, probes, probes / counts.dispersion())
        return LossEpisode(
            segment.begin * MOMENT, (segment.end + 1) * MOMENT, first,
            max((number for number in hops if number < likely[0]), default=0), likely[-1],
            share, low, high, usual_unanswered / usual, p, probes, sum(number > first for number in its),
            counts.retransmitted, self._back(counts, its),
        )  # fmt: skip

    def _place(self, hops: dict[int, tuple[int, int]]) -> tuple[int, list[int]] | None:
        """Return the most likely first hop with loss, and all that are likely. None: no hop, but for limited ones.

        hops: probes and unanswered ones. Those that limit their answers are removed.
        """
        more = {
            number: max(round(unanswered - probes * self._states[number].usual), 0)
            for number, (probes, unanswered) in hops.items()
        }
        while hops:
            numbers = list(hops)
            ratios = {first: self._ratio(hops, numbers[place:]) for place, first in enumerate(numbers)}
            alone = {number: self._ratio(hops, [number]) for number in numbers}
            first = max(numbers, key=ratios.__getitem__)
            worst = max(numbers, key=alone.__getitem__)
            behind = [number for number in numbers if number > first]
            total, lost = sum(hops[number][0] for number in behind), sum(map(more.__getitem__, behind))
            if alone[worst] > ratios[first]:
                del hops[worst]
            elif is_clearly_more(more[first], hops[first][0], lost, total):
                del hops[first]
            else:
                break
        if not hops or ratios[first] <= 0:
            return None
        return first, [number for number in numbers if ratios[number] >= ratios[first] - LIKELY]

    def _ratio(self, hops: dict[int, tuple[int, int]], lossy: Sequence[int]) -> float:
        """Return the log likelihood ratio that these hops have a common share of loss, beside what is usual."""
        usual = {number: self._states[number].usual for number in lossy}
        probes, unanswered = (sum(hops[number][part] for number in lossy) for part in (0, 1))
        expected = sum(hops[number][0] * usual[number] for number in lossy)
        share = min((unanswered - expected) / (probes - expected), 1 - 0.5 / probes)
        if share <= 0:
            return 0.0
        return (probes - unanswered) * math.log1p(-share) + math.fsum(
            hops[number][1] * math.log((its + (1 - its) * share) / its) for number, its in usual.items()
        )

    def _back(self, counts: Counts, numbers: Sequence[int]) -> tuple[float, float, float] | None:
        """Return the share of losses on the way back, by responders whose IP identification counts their answers.

        A probe that was lost on its way there does not raise it (Tulip: Mahajan et al., SOSP 2003).
        """
        answers_lost = lost = 0
        for number in numbers:
            state = self._states[number]
            answered, unanswered, raised, in_order = counts.hops[number]
            if state.counts_answers and in_order >= COUNTED_SHARE * answered:
                answers_lost += min(max(raised - in_order, 0), unanswered)
                lost += unanswered
        return wilson_share(answers_lost, lost, lost) if lost else None


def is_clearly_more(high: int, count: int, others_high: int, others: int) -> bool:
    """Return whether a share is larger than another one, by Fisher's exact test."""
    if not others or high * others <= others_high * count:
        return False
    return fisher(high, count, others_high, others) < WORTH_KEEPING
