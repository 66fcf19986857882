# SPDX-License-Identifier: GPL-3.0-only
"""Changes from one run to another, hop by hop, and how sure they are.

Probes of the same moment meet the same queues, so they are no independent evidence. A run is therefore cut into up
to SLICES slices of time, and each slice gives one value: its median, its share of answers. The Wilcoxon rank-sum
test compares the values of both runs; its variance is widened for the autocorrelation of neighbouring slices.
Holm's method corrects for the number of comparisons.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Iterator, Sequence

import numpy as np

from elf.course import Course, Line, rounded
from elf.inference import holm, ranks, widening
from elf.sources import KEYS, Results
from elf.usage import printable

SLICES = 40
SLICES_MIN = 8  # slices of each run, below which a hop is not compared
SIGNIFICANT = 0.05
COLUMNS = "hop", "before", "after", "change", "p", "answered", "after", "p", "what changed"
ROUNDED_MIN = 1.03  # ratio of medians, below which rounding may be the reason why they differ


@dataclasses.dataclass
class HopValues:
    """A hop in one of the runs."""

    median: float | None  # ns; None: no answer
    share: float  # of answers
    responder: str  # the busiest one
    medians: Any  # by slice, ns
    shares: Any


@dataclasses.dataclass
class HopChange:
    """A hop in both runs. runs: None for a run that did not probe it."""

    number: int
    runs: tuple[HopValues | None, HopValues | None]
    latency: float | None = None  # corrected p that the medians changed by chance; None: too few slices
    answers: float | None = None  # the same of the shares of answers


def hop_values(course: Course, number: int, lines: list[Line], is_exact: bool) -> HopValues:
    """Return the values of a hop in a run. is_exact: neither run has rounded latencies, so none is here."""
    _, probes, unanswered, _ = course.by_bin()
    row = course.hops.index(number)
    probes, answered = probes[row], probes[row] - unanswered[row]
    slices = np.arange(len(probes)) * min(SLICES, len(probes)) // len(probes)
    by_slice = [np.bincount(slices, values) for values in (probes, answered)]
    shares = (by_slice[1] / np.maximum(by_slice[0], 1))[by_slice[0] > 0]
    its = [line for line in lines if line.hop == number]
    if not its:
        return HopValues(None, 0.0, "", np.zeros(0), shares)
    busiest = max(its, key=lambda line: int(line.bins.count.sum()))
    bins, _, (values, counts) = course.of_hop(number)
    of_bins = slices[bins.number - course.by_bin()[0]]
    # Not the mean of two values: rounded before, it would differ from rounded afterwards.
    medians = np.array([
        np.sort(its)[(len(its) - 1) // 2] for its in (bins.median[of_bins == each] for each in np.unique(of_bins))
    ])  # fmt: skip
    median = values[np.searchsorted(np.cumsum(counts), counts.sum() / 2)]
    if not is_exact:
        median, medians = rounded(median), rounded(medians)
    return HopValues(float(median), float(answered.sum() / probes.sum()), busiest.responder, medians, shares)


def rank_sum(before: Any, after: Any) -> float | None:
    """Return p (two-sided) of the hypothesis that both have the same distribution. None: too few values."""
    if min(len(before), len(after)) < SLICES_MIN:
        return None
    both = np.array(ranks([*before, *after]))
    first, second = both[: len(before)], both[len(before) :]
    variance = float(both.var(ddof=1)) * (widening(first) / len(first) + widening(second) / len(second))
    if not variance:
        return 1.0
    return math.erfc(abs(float(first.mean() - second.mean())) / math.sqrt(2 * variance))


def changes(before: Results, after: Results) -> dict[str, list[HopChange]]:
    """Return the hops of each destination with a course in both runs, in the order of the first run's courses."""
    found: dict[str, list[HopChange]] = {}
    tests: list[tuple[HopChange, str, float]] = []
    for dest in (dest for dest in before.courses if dest in after.courses):
        courses = before.courses[dest], after.courses[dest]
        is_exact = all(course.is_exact for course in courses)
        lines = [list(course.lines()) for course in courses]
        for number in sorted({hop for course in courses for hop in course.hops}):
            first, second = (
                hop_values(course, number, its, is_exact) if number in course.hops else None
                for course, its in zip(courses, lines)
            )
            change = HopChange(number, (first, second))
            found.setdefault(dest, []).append(change)
            if first and second:
                for name, values in (("latency", "medians"), ("answers", "shares")):
                    p = rank_sum(getattr(first, values), getattr(second, values))
                    if p is not None and name == "latency" and not is_exact:
                        low, high = sorted((first.median or 0, second.median or 0))
                        p = p if high > low * ROUNDED_MIN else 1.0
                    if p is not None:
                        tests.append((change, name, p))
    for (change, name, _), p in zip(tests, holm([p for _, _, p in tests])):
        setattr(change, name, p)
    return found


@dataclasses.dataclass
class Comparison:
    """The changes as tables, by destination. A row has a cell for each of COLUMNS."""

    runs: str
    tables: dict[str, list[list[str]]]
    notes: list[str]

    def caption(self, dest: str) -> str:
        return f"{dest}: {self.runs}, median latency in ms, share of answers"

    def lines(self) -> list[str]:
        """Return the tables as lines."""
        found = []
        for dest, rows in self.tables.items():
            found += [self.caption(dest), *(as_line(cells) for cells in (COLUMNS, *rows)), ""]
        return [*found, *self.notes]

    def for_page(self) -> list[dict[str, Any]]:
        """Return the tables as elf.page takes them."""
        return [
            {"caption": self.caption(dest), "head": COLUMNS, "rows": rows} for dest, rows in self.tables.items()
        ]


def comparison(before: Results, after: Results, by: str = "dest", chosen: Sequence[str] = ()) -> Comparison:
    """Return the changes at each destination with a course in both runs. chosen: those of --dest, if any."""
    found = changes(before, after)
    runs = " and ".join(printable(each.source.host) for each in (before, after))
    both = [] if chosen else [dest for dest, _ in before.counts.most_common() if after.counts[dest]]
    left_out = [dest for dest in both if dest not in found]
    notes = []
    if found:
        count = sum(
            (hop.latency is not None) + (hop.answers is not None) for hops in found.values() for hop in hops
        )
        notes = [
            f"p: Wilcoxon rank-sum test of up to {SLICES} slices of time of each run, widened for autocorrelation,",
            f"corrected for {count} comparisons (Holm). A change with p below {SIGNIFICANT} is named.",
        ]
    elif not left_out:
        notes = ["no destination was probed in both runs"]
    if left_out:
        named = ", ".join(map(printable, left_out[:4])) + (" ..." if len(left_out) > 4 else "")
        more = " (--dest compares them)" if by == "dest" else ""
        notes.append(f"not compared{more}: {len(left_out)} {KEYS[by]} with fewer probes: {named}")
    return Comparison(runs, {dest: list(map(hop_cells, hops)) for dest, hops in found.items()}, notes)


def as_line(cells: Sequence[str]) -> str:
    """Return cells as a line of the printed table."""
    hop, low, high, change, latency, first, second, answers, what = cells
    start = f"{hop:>3} {low:>8} {high:>8} {change:>8} {latency:>7}  {first:>8} {second:>8}"
    return f"{start} {answers:>7}  {what}".rstrip()


def hop_cells(hop: HopChange) -> list[str]:
    first, second = hop.runs
    medians = [each.median if each else None for each in hop.runs]
    texts = ["-" if median is None else f"{median / 1e6:.3f}" for median in medians]
    low, high = medians
    texts.append("-" if low is None or high is None else f"{(high - low) / 1e6:+.3f}")
    shares = ["-" if each is None else f"{each.share:.1%}" for each in hop.runs]
    latency, answers = (
        "-" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}" for p in (hop.latency, hop.answers)
    )
    return [str(hop.number), *texts, latency, *shares, answers, "; ".join(what_changed(hop, first, second))]


def what_changed(hop: HopChange, first: HopValues | None, second: HopValues | None) -> Iterator[str]:
    """Yield the changes in words."""
    if not first or not second:
        yield "only probed after" if second else "only probed before"
        return
    if first.responder != second.responder:
        if not first.responder or not second.responder:
            yield f"answers now: {second.responder}" if second.responder else f"unresponsive, was {first.responder}"
            return
        yield f"other router: {printable(second.responder)}, was {printable(first.responder)}"
    if hop.latency is not None and hop.latency < SIGNIFICANT:
        yield "slower" if (second.median or 0) > (first.median or 0) else "faster"
    if hop.answers is not None and hop.answers < SIGNIFICANT:
        yield "fewer answers" if second.share < first.share else "more answers"
