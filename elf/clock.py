# SPDX-License-Identifier: GPL-3.0-only
"""The time of day: how CLOCK_MONOTONIC, the clock of the rows, maps to UTC."""

from __future__ import annotations

import datetime
import re
import time
from typing import Callable, NamedTuple, Sequence

SECOND = 10**9  # ns
MOVED = 10**6  # ns by which the mapping must move to be noted again
READINGS = 5  # of the clocks, of which the quickest counts: a program may be interrupted between two clocks
MAPPINGS_MAX = 1000  # that are kept: the first one and the newest


class Mapping(NamedTuple):
    """UTC of CLOCK_MONOTONIC 0, as it is from a time on."""

    since: int  # CLOCK_MONOTONIC, ns
    zero: int  # ns from 1970


class Clock:
    """The mapping of CLOCK_MONOTONIC to UTC.

    It moves when the clock is set, and when the machine sleeps: CLOCK_MONOTONIC stops then. Its slow
    corrections (NTP's) do not move it: they apply to both clocks. The clocks are parameters for the tests.
    """

    def __init__(
        self,
        monotonic: Callable[[], int] = time.monotonic_ns,
        realtime: Callable[[], int] = lambda: time.time_ns(),
        boottime: Callable[[], int] = lambda: time.clock_gettime_ns(time.CLOCK_BOOTTIME),
    ) -> None:
        self._monotonic = monotonic
        self._realtime = realtime
        self._boottime = boottime
        first, self._asleep = self._read()
        self.mappings = [first]

    def _read(self) -> tuple[Mapping, int]:
        """Return the mapping of now, and for how long the machine has slept since it started, ns."""
        quickest = None
        for _ in range(READINGS):
            begin = self._monotonic()
            realtime, boottime = self._realtime(), self._boottime()
            end = self._monotonic()
            if quickest is None or end - begin < quickest[0]:
                middle = (begin + end) // 2
                quickest = end - begin, Mapping(end, realtime - middle), boottime - middle
        assert quickest
        return quickest[1], quickest[2]

    def check(self) -> str:
        """Note the mapping again if it has moved. Return what has happened, in words; empty: it has not moved."""
        now, asleep = self._read()
        moved, slept = now.zero - self.mappings[-1].zero, asleep - self._asleep
        if abs(moved) < MOVED and abs(slept) < MOVED:
            return ""
        self._asleep = asleep
        if abs(moved) >= MOVED:
            self.mappings.append(now)
            del self.mappings[1 : len(self.mappings) - MAPPINGS_MAX + 1]
        words = []
        if slept >= MOVED:
            words.append(f"the machine slept for {slept / SECOND:.3f} s")
        if abs(moved - slept) >= MOVED:
            way = "forward" if moved > slept else "back"
            words.append(f"the clock was set {way} by {abs(moved - slept) / SECOND:.3f} s")
        return ", ".join(words)

    def utc(self, monotonic: int) -> int:
        """Return the ns from 1970 to a time of CLOCK_MONOTONIC (ns)."""
        return monotonic + zero_at(self.mappings, monotonic)


def zero_at(mappings: Sequence[Mapping], monotonic: int) -> int:
    """Return the ns from 1970 to CLOCK_MONOTONIC 0, by the mapping at a time of CLOCK_MONOTONIC (ns)."""
    zero = mappings[0].zero
    for mapping in mappings:
        if mapping.since <= monotonic:
            zero = mapping.zero
    return zero


def utc_text(ns: int) -> str:
    """Return the ns from 1970 as UTC (ISO 8601), in whole microseconds."""
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(ns // SECOND))
    return f"{seconds}.{ns % SECOND // 1000:06}Z"


def time_of_day(ns: int) -> str:
    """Return the ns from 1970 as the time of day (UTC), in tenths of a second."""
    tenths = (ns + SECOND // 20) // (SECOND // 10)
    return f"{time.strftime('%H:%M:%S', time.gmtime(tenths // 10))}.{tenths % 10}Z"


def utc_ns(text: str) -> int:
    """Return the ns from 1970 of UTC as utc_text() writes it. Raises ValueError."""
    match = re.fullmatch(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?Z", text)
    if not match:
        raise ValueError(f"'{text}' is not a time")
    moment = datetime.datetime.fromisoformat(match[1]).replace(tzinfo=datetime.timezone.utc)
    return round(moment.timestamp()) * SECOND + int((match[2] or "").ljust(9, "0"))
