# SPDX-License-Identifier: GPL-3.0-only
"""Statistics of many durations in little memory."""

from __future__ import annotations

import array
import bisect
import functools
import itertools
import operator
from typing import Any, NamedTuple

# Upper bounds for the metrics: ns, 50 us to 5 s.
BUCKETS = tuple(round(step * 10**power) for power in range(4, 10) for step in (1, 2.5, 5))[2:]
# ns, 1 us to 11 s, each at most 2 % above the one before: quantiles are exact to 1 %. The buckets are among them.
BOUNDS = sorted({*(round(1000 * 1.02**number) for number in range(820)), *BUCKETS})
MIDDLES = [(low + high) / 2 for low, high in zip([BOUNDS[0], *BOUNDS], [*BOUNDS, BOUNDS[-1]])]
EDGES = [BOUNDS.index(bound) + 1 for bound in BUCKETS]  # counts of LatencyHistogram up to each bucket
EXACT_MAX = 512  # values that are kept one by one


@functools.lru_cache(maxsize=None)
def bounds_array() -> Any:
    """Return BOUNDS as an array of numpy."""
    import numpy as np

    return np.array(BOUNDS)


class Stats(NamedTuple):
    """Statistics of a histogram, in ns. jitter is the mean difference of two consecutive values, as Javg
    of mtr."""

    minimum: float
    median: float
    percentile95: float
    percentile99: float
    maximum: float
    jitter: float


class BucketCounts:
    """A distribution of durations (ns) that is only known by BUCKETS."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)  # between the bounds, each of which belongs to the count before it
        self.total = 0  # ns

    def add(self, value: int) -> None:
        self.counts[bisect.bisect_left(BUCKETS, value)] += 1
        self.total += value

    def add_all(self, values: Any) -> None:
        """Add the values of an array of numpy."""
        import numpy as np

        found = np.bincount(np.searchsorted(BUCKETS, values, "left"), minlength=len(self.counts)).tolist()
        self.counts = list(map(operator.add, self.counts, found))
        self.total += int(values.sum())

    def without(self, other: BucketCounts) -> BucketCounts:
        """Return the values that are not in another one, all of whose values are in this one."""
        rest = BucketCounts()
        rest.counts = list(map(operator.sub, self.counts, other.counts))
        rest.total = self.total - other.total
        return rest


class Differences:
    """The distribution of differences of durations (ns), as far as its median needs it.

    Up to EXACT_MAX values it is exact. Above, the median comes from counts between BOUNDS, of both signs.
    """

    __slots__ = ("_recent", "_bins")

    def __init__(self) -> None:
        self._recent = array.array("q")
        self._bins = array.array("I")  # the largest negative differences first; empty until _recent is full

    @property
    def count(self) -> int:
        return sum(self._bins) + len(self._recent)

    def add(self, value: int) -> None:
        self._recent.append(value)
        if len(self._recent) >= EXACT_MAX:
            self._move_into_bins()

    def add_all(self, values: Any) -> None:
        """Do what add() does for each value of an array of numpy."""
        if len(self._recent) + len(values) < EXACT_MAX:
            self._recent.extend(values.tolist())
            return
        import numpy as np

        values = np.concatenate([np.array(self._recent, int), values])
        numbers = np.searchsorted(bounds_array(), np.abs(values), "left")
        numbers = len(MIDDLES) + np.where(values >= 0, numbers, -1 - numbers)
        self._bins = self._bins or array.array("I", bytes(8 * len(MIDDLES)))
        bins = np.frombuffer(self._bins, np.uint32)
        bins += np.bincount(numbers, minlength=len(bins)).astype(np.uint32)
        del self._recent[:]

    def median(self) -> float:
        """Return the median of all values. There must be at least one."""
        if self._bins:
            self._move_into_bins()
            upto = list(itertools.accumulate(self._bins))
            number = bisect.bisect_left(upto, 0.5 * upto[-1]) - len(MIDDLES)
            return float(MIDDLES[number] if number >= 0 else -MIDDLES[-1 - number])
        return float(sorted(self._recent)[(len(self._recent) - 1) // 2])

    def _move_into_bins(self) -> None:
        self._bins = self._bins or array.array("I", bytes(8 * len(MIDDLES)))
        for value in self._recent:
            number = bisect.bisect_left(BOUNDS, abs(value))
            self._bins[len(MIDDLES) + (number if value >= 0 else -1 - number)] += 1
        del self._recent[:]


class LatencyHistogram:
    """The distribution of durations (ns).

    Up to EXACT_MAX values it is exact. Above, quantiles come from counts between BOUNDS; minimum, maximum and
    jitter stay exact.
    """

    __slots__ = ("recent", "_measured", "_binned", "_bins", "_minimum", "_maximum", "_last", "_steps", "_total")

    def __init__(self) -> None:
        self.recent = array.array("Q")  # the newest values, in the order in which they came
        self._measured = 0  # how many of recent are in _minimum, _maximum, _last, _steps and _total
        self._binned = 0  # how many values have left recent and are counted in _bins
        self._bins = array.array("Q")  # counts between BOUNDS; empty until recent is full the first time
        self._minimum = self._maximum = 0
        self._last = 0  # the newest value that is in _steps
        self._steps = 0  # sum of the differences of consecutive values
        self._total = 0  # sum of the values

    @property
    def count(self) -> int:
        return self._binned + len(self.recent)

    def add(self, value: int) -> None:
        self.recent.append(value)
        self.limit()

    def limit(self) -> None:
        """Take no more memory than necessary, after values have been appended to `recent`."""
        if len(self.recent) >= EXACT_MAX:
            self._move_into_bins()

    def add_all(self, values: Any) -> None:
        """Add the values of an array of numpy, in their order: the same as add() for each of them."""
        if len(self.recent) + len(values) < EXACT_MAX:
            self.recent.extend(values.tolist())
            return
        import numpy as np

        if self._measured:
            self._move_into_bins()
        values = np.concatenate([np.array(self.recent, int), values])
        del self.recent[:]
        self._bins = self._bins or array.array("Q", bytes(8 * len(MIDDLES)))
        is_first = not self._binned
        least, most = int(values.min()), int(values.max())
        self._minimum = least if is_first else min(self._minimum, least)
        self._maximum = max(self._maximum, most)
        self._steps += int(np.abs(np.diff(values, prepend=values[:1] if is_first else self._last)).sum())
        self._last = int(values[-1])
        self._total += int(values.sum())
        bins = np.frombuffer(self._bins, np.uint64)
        bins += np.bincount(np.searchsorted(bounds_array(), values, "left"), minlength=len(MIDDLES)).astype(
            np.uint64
        )
        self._binned += len(values)

    def stats(self) -> Stats:
        """Return the statistics of all values. There must be at least one."""
        self.limit()
        if self._bins:
            self._move_into_bins()
            values, upto = MIDDLES, list(itertools.accumulate(self._bins))
        else:
            self._measure()
            values, upto = sorted(self.recent), list(range(1, self.count + 1))
        median, percentile95, percentile99 = (
            min(max(values[bisect.bisect_left(upto, share * self.count)], self._minimum), self._maximum)
            for share in (0.5, 0.95, 0.99)
        )
        jitter = self._steps / max(self.count - 1, 1)
        return Stats(self._minimum, median, percentile95, percentile99, self._maximum, jitter)

    def buckets(self) -> BucketCounts:
        """Return the distribution by BUCKETS."""
        self.limit()
        found = BucketCounts()
        if self._bins:
            self._move_into_bins()
            found.counts = [sum(self._bins[start:end]) for start, end in zip([0, *EDGES], [*EDGES, len(MIDDLES)])]
        else:
            self._measure()
            values = sorted(self.recent)
            upto = [0, *(bisect.bisect_right(values, bound) for bound in BUCKETS), len(values)]
            found.counts = list(map(operator.sub, upto[1:], upto))
        found.total = self._total
        return found

    def _measure(self) -> None:
        """Update minimum, maximum and steps with the values that came since the last time."""
        new = self.recent[self._measured :].tolist()
        if not new:
            return
        is_first = not self._binned and not self._measured
        self._minimum = min(new) if is_first else min(self._minimum, min(new))
        self._maximum = max(self._maximum, max(new))
        first = new[0] if is_first else self._last
        self._steps += abs(new[0] - first) + sum(map(abs, map(operator.sub, new[1:], new)))
        self._last = new[-1]
        self._total += sum(new)
        self._measured = len(self.recent)

    def _move_into_bins(self) -> None:
        self._measure()
        self._bins = self._bins or array.array("Q", bytes(8 * len(MIDDLES)))
        values, done = sorted(self.recent), 0
        while done < len(values):
            number = bisect.bisect_left(BOUNDS, values[done])
            end = bisect.bisect_right(values, BOUNDS[number], done) if number < len(BOUNDS) else len(values)
            self._bins[number] += end - done
            done = end
        self._binned += len(self.recent)
        self._measured = 0
        del self.recent[:]
