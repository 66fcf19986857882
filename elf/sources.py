# SPDX-License-Identifier: GPL-3.0-only
"""The input of elfplot.py: the CSVs of a host, the time of day of their rows, and the results made of them.

sources_of()        sorts the CSVs by host, and finds those that --rotate has written
read()              reads a source once: summary and courses
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import io
import json
import os
import re
from typing import Any, Callable, Iterator, NamedTuple, Sequence

import numpy as np

from elf.addresses import flow_text
from elf.batches import Batch, Survey, Texts, keep_freed_memory, open_regular, read_batches, survey
from elf.bulk import BatchGroups, BulkSummary
from elf.clock import Mapping, time_of_day, utc_ns, zero_at
from elf.course import SECOND, SMALL_BINS, Course, bin_width, round_up
from elf.groups import Groups
from elf.usage import Failure

CLOCK_LINE = re.compile(r"CLOCK_MONOTONIC 0 is (\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,9})?)Z")
RUN_SLACK = 5 * 10**9  # ns by which a row may seem to be outside the run: a clock that moves is noticed later
CLOCK_SLACK = 60.0  # s between the CSV's modification time and its last row
COPY_SLACK = 600.0  # s that may lie between copying the CSV and the log
NAMES_MAX = 1 << 16  # destinations whose probes are counted
KEYS = {"dest": "destinations", "flow": "flows", "responder": "responders", "app": "programs"}
NO_NAME = "(no name)"  # of a program
FOREVER = 1 << 62  # ns
LARGE_MAX = 16  # courses with all details; further ones have wider bins, are rounded sooner, and have no points
FULL_MAX, SMALL_FULL_MAX = 4, 64  # courses, large and small ones, from which on they share memory
FINE_MAX = 4  # courses with narrow bins, where a page wants them
FINE_FOLDS = 2  # how often their bins are joined in pairs to give the usual ones


class Run(NamedTuple):
    """A run, as FILEBASE.json beside FILEBASE.csv describes it."""

    started: int  # ns from 1970
    ended: int | None  # None: it may go on
    mappings: list[Mapping]
    files: list[str]
    host: str

    def has(self, rows: Survey) -> bool:
        """Return whether the rows are of this run. CLOCK_MONOTONIC does not tell: it begins with each boot."""
        return all(
            self.started - RUN_SLACK <= at + zero_at(self.mappings, at) <= (self.ended or 1 << 63) + RUN_SLACK
            for at in rows.span or ()
        )


def read_run(csv: str) -> Run | None:
    """Return the run that the JSON beside the CSV describes. None: no such file, or another format."""
    try:
        with io.TextIOWrapper(open_regular(os.path.splitext(csv)[0] + ".json"), encoding="utf-8") as file:
            found = json.load(file)
        zeros = [Mapping(int(each["since"]), utc_ns(each["utc"])) for each in found["monotonic_zeros"]]
        ended, files = found["ended"] and utc_ns(found["ended"]), list(map(str, found["files"]))
        return Run(utc_ns(found["started"]), ended, zeros, files, str(found.get("host", ""))) if zeros else None
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return None


def utc_of_zero(rows: Survey) -> tuple[int | None, str]:
    """Return the ns from 1970 to CLOCK_MONOTONIC 0 by the log beside the CSV, and a note for the user.

    Versions without FILEBASE.json need it. The ns are None if there is no such log, or if it is another run's.
    """
    path = os.path.splitext(rows.path)[0] + ".log"
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8", errors="replace") as file:
            found = next(filter(None, map(CLOCK_LINE.search, file)), None)
        written, logged = os.stat(rows.path).st_mtime, os.stat(path).st_mtime
        zero = utc_ns(found[1] + "Z") if found else None
    except (OSError, ValueError):
        return None, ""
    if zero is None or not rows.span:
        return None, ""
    first, last = ((zero + at) / SECOND for at in rows.span)
    is_older = written - last > CLOCK_SLACK and written - logged > last - first + COPY_SLACK
    if last > written + CLOCK_SLACK or is_older:
        return None, f"'{path}' seems to be another run's: times are not UTC"
    return zero, ""


@dataclasses.dataclass
class Source:
    """The files of a host, each with the mappings of its CLOCK_MONOTONIC to UTC. No mapping: UTC is not known."""

    host: str
    files: list[tuple[Survey, list[Mapping]]]

    @property
    def is_utc(self) -> bool:
        return all(mappings for _, mappings in self.files)

    @property
    def size(self) -> int:
        return sum(rows.size for rows, _ in self.files)

    def first(self) -> int:
        """Return when the first probe left: CLOCK_MONOTONIC, ns."""
        return min((rows.span[0] for rows, _ in self.files if rows.span), default=0)

    def time_text(self, in_utc: bool) -> Callable[[int], str]:
        """Return a function that tells a time of CLOCK_MONOTONIC (ns): time of day, or s since the first probe."""
        if in_utc and self.files:
            mappings = sorted({mapping for _, its in self.files for mapping in its})
            return lambda at: time_of_day(at + zero_at(mappings, at))
        first = self.first()
        return lambda at: f"{(at - first) / SECOND:.1f} s"

    def times(self, mappings: list[Mapping], sendtime: Any, in_utc: bool) -> Any:
        """Return the times of rows, ns: from 1970, or since the first probe."""
        if not in_utc:
            return sendtime - self.first()
        zeros = np.array([mapping.zero for mapping in mappings])
        since = np.array([mapping.since for mapping in mappings[1:]], np.int64)
        return sendtime + zeros[np.searchsorted(np.maximum.accumulate(since), sendtime, "right")]


def files_of(csv: str) -> tuple[str, list[tuple[Survey, list[Mapping]]], list[str]]:
    """Return the host and the files of a run by the name of its first CSV, and notes. Raises Failure."""
    rows, run = survey(csv), read_run(csv)
    if run is None:
        zero, note = utc_of_zero(rows)
        return "", [(rows, [] if zero is None else [Mapping(0, zero)])], [note] if note else []
    if not run.has(rows):
        return "", [(rows, [])], [f"'{os.path.splitext(csv)[0]}.json' is of another run: times are not UTC"]
    files, notes = [(rows, run.mappings)], []
    others = [name for name in map(os.path.basename, run.files) if name != os.path.basename(csv)]
    is_renamed = len(others) == len(run.files)
    if is_renamed and len(run.files) > 1:
        notes.append(f"the run has {len(run.files) - 1} more files, under other names by now: they are left out")
    for name in () if is_renamed else others:  # SIGHUP renames the files so far: the CSV need not be the first one
        path = os.path.join(os.path.dirname(csv), name)
        part = survey(path) if os.path.exists(path) else None
        if part is None or not run.has(part):
            notes.append(f"'{path}' is missing" if part is None else f"'{path}' is of another run, and left out")
        else:
            files.append((part, run.mappings))
    return run.host, files, notes


def sources_of(csvs: Sequence[str], apart: bool = False) -> tuple[list[Source], list[str]]:
    """Return the sources and notes for the user. Raises Failure.

    Files of one host are one source, in the order of their first rows; with apart, each CSV is its own.
    """
    found: dict[Any, Source] = {}
    notes = []
    seen: set[str] = set()
    for number, csv in enumerate(csvs):
        host, files, said = files_of(csv)
        notes += said
        source = found.setdefault(number if apart else host, Source(host, []))
        for rows, mappings in files:
            if apart or os.path.realpath(rows.path) not in seen:
                seen.add(os.path.realpath(rows.path))
                source.files.append((rows, mappings))
    sources = [source for source in found.values() if source.files]
    for source in sources:
        source.files.sort(key=begin_in_utc if source.is_utc else begin_of)
    return [part for source in sources for part in boots_of(source)], notes


def begin_of(file: tuple[Survey, list[Mapping]]) -> int:
    """Return when the first probe left: CLOCK_MONOTONIC, ns. FOREVER: there is none."""
    return file[0].span[0] if file[0].span else FOREVER


def begin_in_utc(file: tuple[Survey, list[Mapping]]) -> int:
    """Return when the first probe left: ns from 1970."""
    begin = begin_of(file)
    return begin + zero_at(file[1], begin)


def boots_of(source: Source) -> Iterator[Source]:
    """Yield a source for each boot of a host, because CLOCK_MONOTONIC begins anew with each."""
    files = source.files
    begin = 0  # index of the first file of a boot
    for number in range(1, len(files)):
        previous, latest = files[number - 1], max(files[begin:number], key=end_of)
        if source.is_utc and any(is_new_boot(before, files[number]) for before in (previous, latest)):
            yield Source(source.host, files[begin:number])
            begin = number
    yield Source(source.host, files[begin:])


def end_of(file: tuple[Survey, list[Mapping]]) -> int:
    """Return when the last probe left: CLOCK_MONOTONIC, ns. 0: there is none."""
    return file[0].span[1] if file[0].span else 0


def is_new_boot(before: tuple[Survey, list[Mapping]], after: tuple[Survey, list[Mapping]]) -> bool:
    """Return whether the host has booted between two files, of which the second one begins later by UTC.

    Then it begins earlier by CLOCK_MONOTONIC. Or it begins after the end of the first one by UTC, but not by
    CLOCK_MONOTONIC. Files of one run, which have the same mappings, are of one boot.
    """
    if before[1] is after[1] or not before[0].span or not after[0].span:
        return False
    (begin, end), (next_begin, _) = before[0].span, after[0].span
    end_utc, next_utc = (at + zero_at(its, at) for at, (_, its) in ((end, before), (next_begin, after)))
    return next_begin < begin or (next_begin < end and next_utc > end_utc)


class Moment(NamedTuple):
    """A value of --from or --to: seconds since the first probe, or ns from 1970."""

    seconds: float | None
    utc: int

    def place(self, start: int, in_utc: bool, option: str) -> int:
        """Return the moment in ns of the picture's clock. start: when the first probe left, by this clock.

        Raises Failure if the moment is in UTC, but the picture is not.
        """
        if self.seconds is not None:
            return start + round(self.seconds * SECOND)
        if not in_utc:
            raise Failure(
                f"argument {option}: the rows' UTC is not known without elf.json: give seconds since the start"
            )
        return self.utc


def moment(text: str) -> Moment:
    """Return the moment that an argument names. Raises ValueError."""
    try:
        seconds = float(text)
    except ValueError:
        at = datetime.datetime.fromisoformat(text.strip().replace("Z", "+00:00").replace("z", "+00:00"))
        at = at if at.tzinfo else at.replace(tzinfo=datetime.timezone.utc)
        whole = at - datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)
        return Moment(None, (whole.days * 86400 + whole.seconds) * SECOND + whole.microseconds * 1000)
    if not 0 <= seconds < 1e9:
        raise ValueError(text)
    return Moment(seconds, 0)


class Window(NamedTuple):
    """The rows that are wanted: begin, end (ns of the picture's clock), and destinations; none: of all.

    by is one of KEYS: what the rows of a table and a section have in common.
    """

    begin: int
    end: int
    dests: list[str]
    by: str = "dest"


@dataclasses.dataclass
class Results:
    """What is made of the rows of a source."""

    source: Source
    summary: BulkSummary
    courses: dict[str, Course]
    counts: collections.Counter[str]  # probes by destination, of all rows in the window; or by another key


def span_of(sources: Sequence[Source], in_utc: bool) -> tuple[int, int]:
    """Return when the first and the last probe left, ns of the picture's clock."""
    ends = [
        int(source.times(mappings, np.array([at]), in_utc)[0])
        for source in sources
        for rows, mappings in source.files
        for at in rows.span or ()
    ]
    return min(ends, default=0), max(ends, default=0)


def planned_courses(source: Source, in_utc: bool, window: Window, most: int, fine: bool) -> dict[str, Course]:
    """Return empty courses for the busiest destinations, at most this many. The surveys tell which they are."""
    found: collections.defaultdict[str, list[tuple[float, int, int, Any]]] = collections.defaultdict(list)
    for rows, mappings in source.files:
        times = source.times(mappings, rows.batch["sendtime"], in_utc)
        batch, times = kept(rows.batch, times, window)
        groups = Groups(batch["dest"])
        for start, end in zip(groups.starts.tolist(), groups.ends.tolist()):
            its = groups.order[start:end]
            hops = np.bincount(batch["outttl"][its]) / rows.share
            found[batch.text("dest", its[0])].append(
                (len(its) / rows.share, times[its].min(), times[its].max(), hops)
            )
    courses = {}
    busiest = sorted(found, key=lambda dest: (-sum(each[0] for each in found[dest]), dest))[:most]
    large = min(len(busiest), LARGE_MAX)
    share, small_share = -(-large // FULL_MAX), -(-(len(busiest) - large) // SMALL_FULL_MAX)
    for rank, dest in enumerate(busiest):
        hops = np.zeros(256)
        for each in found[dest]:
            hops[: len(each[3])] += each[3]
        start, end = min(each[1] for each in found[dest]), max(each[2] for each in found[dest])
        width = bin_width(int(end - start), float(np.median(hops[hops > 0])))
        if rank >= LARGE_MAX:
            width = max(width, round_up(int(end - start) / SMALL_BINS))
            courses[dest] = Course(dest, int(start), width, window.by, is_small=True, share=small_share)
        else:
            folds = FINE_FOLDS if fine and rank < FINE_MAX else 0
            courses[dest] = Course(dest, int(start), width >> folds, window.by, folds, share=share)
    return courses


def keyed(batch: Batch, by: str) -> Batch:
    """Return the rows with one of KEYS in the place of the destination."""
    if by == "dest":
        return batch
    if by == "responder":
        return Batch(batch.names, {**batch.columns, "dest": batch["responder"]})
    known = len(batch.names)
    if by == "app":
        names, numbers = [NO_NAME], np.where(batch["app"] > 0, batch["app"], known)
    else:
        flows = BatchGroups(batch).flows
        names = [flow_text(*batch.flow(row)) for row in flows.firsts.tolist()]
        numbers = known + flows.of_rows()
    return Batch([*batch.names, *names], {**batch.columns, "dest": numbers})


def kept(batch: Batch, times: Any, window: Window) -> tuple[Batch, Any]:
    """Return the rows in the window, with the key that it asks for, and their times."""
    keep = wanted(batch, times, window)
    if window.by == "responder":
        keep &= batch["responder"] > 0
    if not keep.all():
        batch, times = batch.take(keep), times[keep]
    return keyed(batch, window.by), times


def wanted(batch: Batch, times: Any, window: Window) -> Any:
    """Return a mask of the rows in the window."""
    are_wanted = (times >= window.begin) & (times <= window.end)
    if window.dests:
        numbers = [number for number, name in enumerate(batch.names) if name in window.dests]
        are_wanted &= np.isin(batch["dest"], numbers)
    return are_wanted


def read(
    source: Source,
    in_utc: bool,
    window: Window,
    most: int,
    tell: Callable[[int], None] = lambda _: None,
    fine: bool = False,
) -> Results:
    """Return the results of a source's rows, with courses of at most this many destinations. Raises Failure.

    fine: the courses of the FINE_MAX busiest have narrow bins, for a page that zooms. tell: as for read_batches().
    """
    keep_freed_memory()
    courses = planned_courses(source, in_utc, window, most, fine)
    results = Results(source, BulkSummary(), courses, collections.Counter())
    results.summary.when = source.time_text(in_utc)
    results.summary.has_paths = window.by in ("dest", "flow")
    texts = Texts()
    for rows, mappings in source.files:
        batches = [rows.batch] if rows.share >= 1 else read_batches(rows.path, texts, tell)
        for batch in batches:
            add_batch(results, batch, source.times(mappings, batch["sendtime"], in_utc), window, in_utc)
            del batch  # otherwise it takes memory until the next one is there
    results.summary.digest(is_over=True)
    for dest in [dest for dest, course in courses.items() if not course.probes]:
        del courses[dest]
    return results


def add_batch(results: Results, batch: Batch, times: Any, window: Window, in_utc: bool) -> None:
    """Add rows to the results. times: of the picture's clock, ns."""
    courses = results.courses
    if window.by == "dest":  # all of them: an error names some
        count(results.counts, batch, (times >= window.begin) & (times <= window.end))
    batch, times = kept(batch, times, window)
    if window.by != "dest":
        count(results.counts, batch, slice(None))
    results.summary.note_all(batch)
    results.summary.digest()
    groups = Groups(batch["dest"])
    for start, end in zip(groups.starts.tolist(), groups.ends.tolist()):
        its = groups.order[start:end]
        dest = batch.text("dest", its[0])
        if dest in window.dests and dest not in courses:  # too few rows for the survey
            first, last = span_of([results.source], in_utc)
            courses[dest] = Course(dest, int(times[its[0]]), bin_width(last - first, 0))
        if dest in courses:
            courses[dest].add(batch.take(its), times[its])


def count(counts: collections.Counter[str], batch: Batch, are_wanted: Any) -> None:
    """Add the number of wanted probes of each destination to counts. are_wanted: a mask or a slice."""
    by_number = np.bincount(batch["dest"][are_wanted])
    for number in np.flatnonzero(by_number).tolist():
        if batch.names[number] in counts or len(counts) < NAMES_MAX:
            counts[batch.names[number]] += int(by_number[number])
