# SPDX-License-Identifier: GPL-3.0-only
"""Tests and intervals of statistics, in plain Python.

wilson_ranks(), median_interval()   interval of a median by its order statistics (Fontugne et al., IMC 2017)
wilson_share()                      Wilson's score interval of a share
fisher()                            Fisher's exact test, one-sided
spearman(), spearman_highest()      rank correlation, and how sure that it is none; how high it may be
superiority()                       how often one of the values is above one of others
holm()                              correction for the number of tests
"""

from __future__ import annotations

import bisect
import math
from typing import Sequence

Z = 1.959964  # of an interval that holds the true value 95 times of 100
CORRELATION_MAX = 0.9
PRECISE = 1e-17  # smaller parts of a sum do not count


def widening(values: Sequence[float]) -> float:
    """Return by what factor autocorrelation raises the variance of the mean: (1 + r) / (1 - r)."""
    count = len(values)
    if count < 3:
        return 1.0
    mean = math.fsum(values) / count
    apart = [value - mean for value in values]
    total = math.fsum(each * each for each in apart)
    r = math.fsum(first * second for first, second in zip(apart, apart[1:])) / total if total else 0.0
    r = min(max(r + (1 + 4 * r) / count, 0.0), CORRELATION_MAX)  # r is too low where there are few values
    return (1 + r) / (1 - r)


def median(ordered: Sequence[float]) -> float:
    """Return the median of values in order."""
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def wilson_ranks(count: int, effective: float) -> tuple[int, int]:
    """Return the places (from 0) of the order statistics between which the median lies: Wilson's score interval.

    effective is the number of independent values among them.
    """
    spread = Z * Z / effective
    half = Z * math.sqrt(0.25 / effective + spread / (4 * effective)) / (1 + spread)
    return max(math.floor(count * (0.5 - half)), 0), min(math.ceil(count * (0.5 + half)) - 1, count - 1)


def wilson_share(found: int, count: int, effective: float) -> tuple[float, float, float]:
    """Return the share found / count and its interval (95 %). effective: the number of independent values."""
    share = found / count
    spread = Z * Z / effective
    middle = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / effective + spread / (4 * effective)) / (1 + spread)
    return share, max(middle - half, 0.0), min(max(middle + half, share), 1.0)


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median of values and its interval (95 %). The values must be in the order of time.

    Their autocorrelation makes the interval wider.
    """
    ordered = sorted(values)
    low, high = wilson_ranks(len(ordered), max(len(ordered) / widening(values), 1.0))
    return median(ordered), ordered[low], ordered[high]


def log_choose(count: int, chosen: int) -> float:
    return math.lgamma(count + 1) - math.lgamma(chosen + 1) - math.lgamma(count - chosen + 1)


def fisher(high: int, count: int, others_high: int, others: int) -> float:
    """Return p: the probability that by chance at least high of count are high, if others_high of others are."""
    every, every_high = count + others, high + others_high
    least, most = max(count - (every - every_high), 0), min(count, every_high)
    if high <= least:
        return 1.0
    if high * every <= every_high * count:  # below the mean: the other tail is the shorter one
        return max(1 - hypergeometric_sum(range(high - 1, least - 1, -1), count, every_high, every), 0.0)
    return min(hypergeometric_sum(range(high, most + 1), count, every_high, every), 1.0)


def hypergeometric_sum(chosen: range, count: int, every_high: int, every: int) -> float:
    """Return the probability that the number of high ones among count is in chosen (hypergeometric distribution).

    chosen must begin with the most likely number, because the sum ends at terms that are too small to count.
    """
    low = every - every_high - count
    its = chosen[0]
    term = math.exp(log_choose(every_high, its) + log_choose(low + count, count - its) - log_choose(every, count))
    total = 0.0
    for its in chosen:
        total += term
        if term < total * PRECISE:
            break
        if chosen.step > 0:
            term *= (every_high - its) * (count - its) / ((its + 1) * (low + its + 1))
        else:
            term *= its * (low + its) / ((every_high - its + 1) * (count - its + 1))
    return total


def ranks(values: Sequence[float]) -> list[float]:
    """Return the ranks of values; equal ones have the same."""
    order = sorted(range(len(values)), key=values.__getitem__)
    found = [0.0] * len(values)
    place = 0
    while place < len(order):
        end = place
        while end + 1 < len(order) and values[order[end + 1]] == values[order[place]]:
            end += 1
        for each in order[place : end + 1]:
            found[each] = (place + end) / 2
        place = end + 1
    return found


def spearman(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Return the rank correlation of two series, and p (two-sided): that there is no correlation."""
    rho, independent = rank_correlation(first, second)
    if independent <= 3:
        return rho, 1.0
    if abs(rho) >= 1:
        return rho, 0.0
    return rho, math.erfc(abs(math.atanh(rho)) * math.sqrt(independent - 3) / math.sqrt(2))


def spearman_highest(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the upper bound (97.5 %) of the rank correlation of two series, by Fisher's transformation.

    It is 1.0 with too few independent pairs, and if the correlation is 1 or -1.
    """
    rho, independent = rank_correlation(first, second)
    if independent <= 3 or abs(rho) >= 1:
        return 1.0
    return math.tanh(math.atanh(rho) + Z / math.sqrt(independent - 3))


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Return the rank correlation of two series, and the number of independent pairs.

    Autocorrelation of both series lowers this number.
    """
    of_first, of_second = ranks(first), ranks(second)
    count, mean = len(first), (len(first) - 1) / 2
    over = math.fsum((a - mean) * (b - mean) for a, b in zip(of_first, of_second))
    spread = math.sqrt(math.fsum((a - mean) ** 2 for a in of_first) * math.fsum((b - mean) ** 2 for b in of_second))
    if count < 4 or not spread:
        return 0.0, 0.0
    return over / spread, count / math.sqrt(widening(of_first) * widening(of_second))


def superiority(values: Sequence[float], others: Sequence[float]) -> float:
    """Return the share of pairs of a value and another in which the value is larger (rank-sum test)."""
    ordered = sorted(others)
    return sum(bisect.bisect_left(ordered, value) for value in values) / (len(values) * len(others))


def holm(found: Sequence[float], tests: int = 0) -> list[float]:
    """Return each p of found, corrected for the number of tests (Holm).

    tests: all tests of which found are those with the lowest p. If it is less, the length of found.
    """
    tests = max(tests, len(found))
    corrected, highest = [0.0] * len(found), 0.0
    for place, number in enumerate(sorted(range(len(found)), key=found.__getitem__)):
        highest = max(highest, min(found[number] * (tests - place), 1.0))
        corrected[number] = highest
    return corrected
