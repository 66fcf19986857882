# SPDX-License-Identifier: GPL-3.0-only
"""Episodes of loss: when a larger share of probes than usual was unanswered, and from which hop on.

    Losses          counts of the answered and unanswered probes of a destination, by moment and hop
    Search          finds times in which more probes were unanswered. It runs a CUSUM (Page, 1954) for each share
                    of SHARES and each first hop with loss. The largest likelihood ratio wins (Lorden, 1971)
    LossEpisode     such a time: begin, end, the first hop with loss, the share, and p

A moment is an interval of 100 ms. The row of an unanswered probe comes seconds late, so a moment waits LATE moments
before it is closed, that is, evaluated. Memory is bounded: a few counts for each hop of each waiting moment, and
SEGMENTS_MAX segments of a search. docs/findings.md has the method.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Iterator, Sequence

from elf.inference import fisher, wilson_share

MOMENT = 10**8  # ns: probes are counted by moments of this length
LATE = 80  # moments after which all rows of a moment have come, those of unanswered probes included
AT_THE_END = 10  # moments before the end of a run that do not count: answers may have been on their way
OPEN_MAX = 256  # moments that may wait
ENOUGH = 100  # probes to a hop, from which on its usual share of loss is known
REFERENCE_MAX = 20_000  # probes to a hop: above it, counts are halved, so that older ones count less
SHARES = 0.003, 0.01, 0.03, 0.1, 0.2, 0.4, 0.9  # shares of lost probes that a search tries
WORTH_KEEPING = 0.001  # p of a single test, above which a segment is forgotten
UNIT = 2**-32  # of log likelihood ratios: integers, so that their sum does not depend on the order
# The log likelihood ratio of such a p. A fall by as much from the maximum ends a segment.
ALARM = round(math.log(len(SHARES) / WORTH_KEEPING) / UNIT)
LOSSY_MIN = 3  # least moments with loss in an episode: one full queue can cause all loss of a moment
LASTING = 6000  # moments after which a higher share becomes the usual one
FIRST_CHECK = 16  # moments after which a search is checked for the first time: see Losses._check()
SEGMENTS_MAX = 200
EPISODES_MAX = 200
LIKELY = 1.92  # with 95 %, the true first hop has a log likelihood at most so far below the highest (Wilks)
COUNTER_FROM = 20  # An IP identification is a counter if at least so many moments without loss were compared, ...
COUNTED_SHARE = 0.9  # ... and in this share of them it rose by 1 with each answer
NEARLY_ALL = 0.9  # share of lost probes above which an episode may be an outage


@dataclasses.dataclass
class LossEpisode:
    """More probes than usual were unanswered for a while, at a hop and behind it."""

    begin: int  # ns, CLOCK_MONOTONIC
    end: int
    hop: int  # most likely the first hop with loss
    front: int  # the hop in front of all that may be the first with loss (95 %); 0: none
    until: int  # the farthest hop that may be the first with loss (95 %)
    share: float  # of the probes to this hop and those behind it, the unanswered ones
    low: float  # confidence interval of the share, 95 %
    high: float
    usual: float  # share that is usually unanswered
    p: float  # probability that it is chance, not corrected for the number of tests
    probes: int  # to this hop and those behind it
    behind: int  # number of hops behind it that were probed meanwhile and do not limit their answers
    retransmitted: int  # TCP segments, meanwhile
    back: tuple[float, float, float] | None  # share of losses on the reverse path, interval; None: not known
    lasts: bool = False  # it had not ended when the data did

    @property
    def weight(self) -> float:
        return self.share * (self.end - self.begin)


class Counts:
    """Sums over moments. The difference of two gives the sums over the moments between them: see since()."""

    __slots__ = ("hops", "retransmitted", "moments", "lossy", "unanswered", "squares")

    def __init__(self) -> None:
        self.hops: dict[int, tuple[int, int, int, int]] = {}  # answered, unanswered; raised, in_order: see Cell
        self.retransmitted = self.moments = 0
        # Lossy moments; unanswered probes; the squares of the unanswered probes of each moment, added up.
        self.lossy = self.unanswered = self.squares = 0

    def copy(self) -> Counts:
        its = Counts()
        its.hops = dict(self.hops)
        for name in self.__slots__[1:]:
            setattr(its, name, getattr(self, name))
        return its

    def add(self, moment: Moment, numbers: set[int]) -> None:
        """Add a moment. numbers: the searched hops. Unanswered probes to others do not make the moment lossy."""
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
        """Return the variance of losses by moment, divided by that of independent losses. At least 1."""
        if not self.unanswered:
            return 1.0
        mean = self.unanswered / self.moments
        return max((self.squares / self.moments - mean * mean) / mean, 1.0)


class Cell:
    """The probes to a hop in a moment."""

    __slots__ = ("answered", "unanswered", "raised", "in_order")

    def __init__(self, answered: int = 0, unanswered: int = 0, raised: int = 0, in_order: int = 0) -> None:
        self.answered, self.unanswered = answered, unanswered
        self.raised = raised  # by how much the responder's IP identification rose meanwhile ...
        self.in_order = in_order  # ... while it sent so many answers


class Moment:
    __slots__ = ("cells", "retransmitted")

    def __init__(self) -> None:
        self.cells: dict[int, Cell] = {}
        self.retransmitted = 0


class HopState:
    """Up to where the answers of a hop are counted by moment, and how many of its probes are usually unanswered."""

    __slots__ = (
        "moment", "counted", "latency", "responder", "ident", "answered", "unanswered", "counting", "compared",
    )  # fmt: skip

    def __init__(self, latency: Any) -> None:
        self.moment = -1  # the newest moment with an answer: its answers are not counted yet
        self.counted = latency.count  # answers in front of this moment
        self.latency = latency  # the histogram of all answers, whose count grows
        self.responder = ""  # of the first answer in the moment ...
        self.ident: int | None = None  # ... and its IP identification
        self.answered = self.unanswered = 0  # probes outside episodes: what is usual
        # Moments without loss: those in which the identification rose by 1 with each answer; all compared.
        self.counting = self.compared = 0

    @property
    def is_known(self) -> bool:
        return self.answered > 0 and self.answered + self.unanswered >= ENOUGH

    @property
    def usual(self) -> float:
        """The share that is usually unanswered; never 0, because answers do not prove that there is no loss."""
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
        """Whether the responder's IP identification is a counter that only its answers to these probes raise."""
        return self.compared >= COUNTER_FROM and self.counting >= COUNTED_SHARE * self.compared


class Cusum:
    """The cumulative sum of log likelihood ratios, for one share and one first hop. It starts anew at 0."""

    __slots__ = ("score", "begin", "before", "most", "end", "after")

    def __init__(self) -> None:
        self.begin = self.end = 0  # moments
        self.clear()

    def clear(self) -> None:
        self.score = self.most = 0  # in UNIT: the sum, and its maximum
        self.before: Counts | None = None  # sums of all moments in front of begin
        self.after: Counts | None = None  # sums of all moments up to end, the moment with the maximum

    def add(self, ratio: int, moment: int, before: Counts, after: Counts) -> Segment | None:
        """Add a moment. Return a segment if one has ended and its maximum was at least ALARM, otherwise None."""
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
    """Successive moments in which more loss than usual is more likely than the usual loss."""

    score: float  # log likelihood ratio
    begin: int  # first and last moment
    end: int
    before: Counts  # sums in front of begin
    after: Counts  # sums up to end

    def meets(self, other: Segment) -> bool:
        return self.begin <= other.end and other.begin <= self.end


class Search:
    """Looks for segments. It begins with a moment with loss, and is over when all cumulative sums are at 0."""

    def __init__(self, begin: int, hops: Sequence[tuple[int, float]]) -> None:
        """begin: moment. hops: the searched ones, the farthest first; each with its usual share of loss."""
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
                    continue  # as in most cases: a call would take longer than this test
                found = cusum.add(ratio, number, before, after)
                if found:
                    self.segments.append(found)
        self.limit()

    def limit(self) -> None:
        """Forget the least likely segments if there are too many."""
        if len(self.segments) > SEGMENTS_MAX:
            self.segments = sorted(self.segments, key=lambda its: -its.score)[: SEGMENTS_MAX // 2]

    def open_segments(self) -> list[Segment]:
        """Return the segments that have not ended, but have reached ALARM."""
        every = (cusum.segment() for _, _, cusums in self._hops for cusum in cusums)
        return [segment for segment in every if segment]

    @property
    def is_over(self) -> bool:
        return all(cusum.before is None for _, _, cusums in self._hops for cusum in cusums)


ANSWERED = [round(math.log1p(-share) / UNIT) for share in SHARES]  # what an answered probe adds to a sum, in UNIT


class Losses:
    """The probes of a destination, answered or not, by moment and hop."""

    __slots__ = ("_tests", "_open", "_states", "_search", "_found", "_closed")

    def __init__(self, tests: Any) -> None:
        """tests: elf.episodes.Comparisons, which counts the tests for the correction of p."""
        self._tests = tests
        self._open: dict[int, Moment] = {}
        self._states: dict[int, HopState] = {}
        self._search: Search | None = None
        self._found: list[LossEpisode] = []
        self._closed = -1  # the newest moment that is closed

    def note_moment(
        self, number: int, latency: Any, moment: int, count: int, responder: str, ident: int | None
    ) -> None:
        """Note the first answered probe to a hop in a moment. The others follow from the growth of the count.

        number: the hop. latency: the histogram of its answers, whose count grows. count: its answers before this
        one. ident: the IP identification of the answer, None if not known. A probe that left before the newest
        moment of the hop counts as one of that moment.
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
                if moment > state.moment + 1:  # the rise is of moments without answers
                    cell = self._cell(number, moment - 1)
                if cell:
                    cell.raised += (ident - state.ident) & 0xFFFF
                    cell.in_order += answered
        state.moment, state.counted, state.responder, state.ident = moment, count, responder, ident

    def new_state(self, number: int, latency: Any) -> HopState:
        state = self._states[number] = HopState(latency)
        return state

    def note_unanswered(self, number: int, moment: int) -> None:
        """Note an unanswered probe to a hop."""
        self.add_unanswered(number, moment, 1)
        self.limit()

    def limit(self) -> None:
        """Close the oldest moments if too many wait. Only a destination that has stopped responding has so many."""
        if len(self._open) > OPEN_MAX:
            self.close(max(self._open) - LATE)

    def add_unanswered(self, number: int, moment: int, count: int) -> None:
        """Note unanswered probes. The caller closes moments from time to time, or calls limit()."""
        if not self._states:
            return  # no hop has answered yet, so the usual share is not known
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
            return None  # the row came too late: its moment is closed
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
        """Close the moments up to this one: evaluate them. Rows of these that come later are ignored."""
        if until <= self._closed:
            return
        for number, state in self._states.items():
            if 0 <= state.moment <= until and state.latency.count > state.counted:
                self._count(number, state.moment, state.latency.count - state.counted)
                state.counted, state.ident = state.latency.count, None
        self._look(until)
        self._closed = until

    def _look(self, until: int) -> None:
        """Evaluate the moments that wait, up to this one, in the order of time."""
        for number in sorted(number for number in self._open if number <= until):
            self._add(number, self._open.pop(number))

    def end(self) -> None:
        """Close all moments but the last AT_THE_END: answers may have been on their way when the run ended."""
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
        """End a search after this moment if it is over, or if an episode in it has lasted longer than LASTING.

        At check_at, also end it if its segments are no episodes, or if it has none and _may_go_on() says no.
        """
        if search.is_over:
            self._end_search(search)
        elif number >= search.check_at:
            search.check_at = number + min(number - search.begin, LASTING // 8)  # doubles, up to LASTING / 8
            segments = search.open_segments()
            lasts = any(number - each.begin > LASTING for each in segments)
            if lasts or not (any(self._episodes_of(search)) if segments else self._may_go_on(search, number)):
                self._end_search(search, lasts)  # the usual share may have been too low by chance

    def _may_go_on(self, search: Search, number: int) -> bool:
        """Return whether a search is shorter than LASTING, and has fewer probes than the usual shares rely on."""
        probes = sum(answered + unanswered for answered, unanswered, *_ in search.sums.hops.values())
        known = sum(state.answered + state.unanswered for state in self._states.values())
        return number - search.begin < LASTING and probes < known

    def _hops_to_search(self) -> Iterator[tuple[int, float]]:
        """Yield hops, the farthest first, with their usual shares of loss.

        Leave out each hop that limits its answers: its usual share is clearly larger than at hops behind it.
        """
        behind = behind_unanswered = 0
        for number, state in sorted(self._states.items(), reverse=True):
            if state.is_known:
                probes = state.answered + state.unanswered
                if not is_clearly_more(state.unanswered, probes, behind_unanswered, behind):
                    behind, behind_unanswered = behind + probes, behind_unanswered + state.unanswered
                    yield number, state.usual

    def _end_search(self, search: Search, is_usual_now: bool = False) -> None:
        """Keep the episodes that the search has found, and add all other probes to what is usual.

        With is_usual_now, replace what is usual by the probes of this search, those of its episodes included.
        """
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
        """Return the episodes, sorted by begin. Include episodes that have not ended."""
        found = list(self._found)
        if self._search:
            found += (episode for episode, _ in self._episodes_of(self._search))
        return sorted(found, key=lambda its: its.begin)

    def _episodes_of(self, search: Search) -> Iterator[tuple[LossEpisode, Segment]]:
        """Yield the episodes that a search has found. Of segments that overlap, yield only the most likely."""
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
        """Return the episode that a segment shows at the searched hops.

        None: it may be chance, it has fewer than LOSSY_MIN moments with loss, or hops limit their answers.
        """
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
        """Return the most likely first hop with loss, and all hops that may be the first one (95 %).

        None: no hop has loss, except hops that limit their answers. hops: probes and unanswered probes by hop,
        ascending. The hops that limit their answers are removed from it.
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
        """Return the log likelihood ratio of a common share of loss at these hops, on top of their usual shares.

        It is 0.0 if not more probes than usual are unanswered.
        """
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
        """Return the share of the losses on the reverse path and its interval (95 %), or None.

        It is known of responders whose IP identification counts their answers. A probe that was lost on the forward
        path does not raise the identification, a lost answer does (Tulip: Mahajan et al., SOSP 2003).
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
    """Return whether high of count is a larger share than others_high of others (Fisher, p < WORTH_KEEPING)."""
    if not others or high * others <= others_high * count:
        return False
    return fisher(high, count, others_high, others) < WORTH_KEEPING
