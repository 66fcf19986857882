#!/usr/bin/python3
# SPDX-License-Identifier: GPL-3.0-only
"""Pictures of what elfprobe measured; needs neither root nor bcc.

$ python3 elfplot.py --html elf.csv
10.0.5.2: 3980 probes, latency in ms
hop  probes answered      min   median      95%      99%      max   jitter  responder
  1     996   100.0%    0.008    0.022    0.069    0.082    0.172    0.011  10.0.1.2
  2     995   100.0%    0.011    0.023    0.069    0.090    0.131    0.012  10.0.2.2
  3     995   100.0%    0.011    0.025    0.076    0.092    0.111    0.013  10.0.3.2
  4     994    99.8%    0.014    0.055   30.550   33.730   34.907    0.517  10.0.4.2

picture: elf.png
page: elf.html

elf.png shows latency over time, with a colour for each hop. Beside it is each hop's spread over the whole time.
Below, if there are any, are unanswered probes, and the flows' own round-trip time and retransmissions. elf.html
is one page that needs no other file: the table, and the picture, which shows figures under the pointer.
Both lie beside the CSV unless -o says otherwise. With elf.json beside elf.csv, times are UTC.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import datetime
import hashlib
import html
import io
import ipaddress
import json
import logging
import os
import re
import sys
import warnings
from typing import Any, NamedTuple

from elf.addresses import PROTOCOLS
from elf.clock import Mapping, utc_ns, zero_at
from elf.console import print_lines
from elf.files import OutputFile
from elf.rows import joined, open_regular, read_csv, records_in
from elf.summary import TABLES_MAX, Summary
from elf.usage import Failure, Parser, as_called, missing_packages, not_empty, printable, why_unusable

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # otherwise it warns about its cache directory
MISSING: dict[str, str] = {}  # module -> why it cannot be used
try:
    import numpy as np
    import pandas as pd
except Exception as error:  # a broken one raises whatever comes up
    MISSING["pandas"] = why_unusable("pandas", error)
try:
    import matplotlib
    from matplotlib.cm import plasma
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
except Exception as error:
    MISSING["matplotlib"] = why_unusable("matplotlib", error)

CLOCK_LINE = re.compile(r"CLOCK_MONOTONIC 0 is (\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,9})?)Z")
RUN_SLACK = 5 * 10**9  # ns by which a row may seem to be outside the run: a clock that moves is noticed later
CLOCK_SLACK = 60.0  # s between the CSV's modification time and its last row
COPY_SLACK = 600.0  # s that may lie between copying the CSV and the log

SECTIONS_MAX, CHOSEN_MAX = 4, 16  # destinations in a picture, at most: without and with --dest
RESPONDERS_MAX = 3  # of a hop that get a line of their own
BINS_MAX = 300
POINTS_MAX = 2000  # of a line that are drawn
LOG_FROM = 10.0  # ratio of slowest to fastest answer from which on the axis is logarithmic
SECOND = 10**9  # ns
STEPS = [m * 10**e for e in range(3, 10) for m in (1, 2, 5)] + [
    s * SECOND for s in (10, 15, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400, 21600, 43200, 86400)
]  # ns, of bins and between ticks

DPI = 130
WIDTH, LEFT, TIME, GAP, HOPS, LIST = 12.4, 0.85, 6.7, 0.12, 1.75, 2.7  # inches
LINE, STYLES = 0.155, ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1, 1, 1)))
FLOW_COLOUR, RETRANS_COLOUR = "#222222", "#009e73"
READING = (
    "Lines are medians, bands the middle half of each bin. Dots are single probes: of many, a sample and each "
    "bin's slowest. On the right, of the whole time: median, middle half, 5th to 95th percentile.",
    "The strip below shows unanswered probes: grey if all of a bin were answered, coloured if not, the stronger "
    "the more were not. White: not probed.",
)
RC = {"font.family": "DejaVu Sans", "font.size": 8, "axes.linewidth": 0.6, "axes.edgecolor": "#888888",
      "xtick.color": "#444444", "ytick.color": "#444444", "axes.axisbelow": True}  # fmt: skip


# ---- Arguments ----------------------------------------------------------------------------------


def address(text: str) -> str:
    """Return an address as rows have it: an argparse type."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not an IPv4 or IPv6 address") from None


def argument_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(
        prog=as_called("elfplot.py"),
        usage=as_called("python3 elfplot.py [-h] [-o FILEBASE] [--html] [--dest ADDRESS] CSV"),
        description="Prints the summary of what elfprobe measured, and draws it.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("csv", type=not_empty, metavar="CSV", help="file of elfprobe, which may still be writing it")
    add("-o", "--filebase", type=not_empty, metavar="FILEBASE",
        help="draw FILEBASE.png and FILEBASE.html (default: the CSV's name without .csv); "
        "existing files are replaced")  # fmt: skip
    add("--html", action="store_true", help="make the page, too: table and picture in one file")
    add("--dest", action="append", default=[], type=address, metavar="ADDRESS",
        help=f"only this destination; may be given again (default: the busiest {TABLES_MAX} in the table, "
        f"{SECTIONS_MAX} in the picture)")  # fmt: skip
    return parser


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Return the arguments. Raises Failure (status 2) for wrong usage."""
    args = argument_parser().parse_intermixed_args(argv)
    args.dest = list(dict.fromkeys(args.dest))
    if len(args.dest) > CHOSEN_MAX:
        raise Failure(f"argument --dest: a picture has {CHOSEN_MAX} destinations at most", 2)
    args.filebase = args.filebase or os.path.splitext(args.csv)[0]
    for path in (args.filebase + ".png", args.filebase + ".html"):
        if os.path.realpath(path) == os.path.realpath(args.csv):
            raise Failure(f"'{args.csv}' would be overwritten by the picture: choose another name with -o", 2)
    return args


# ---- The time of day ------------------------------------------------------------------------------------


class Run(NamedTuple):
    """What FILEBASE.json says of the rows of FILEBASE.csv."""

    started: int  # ns from 1970
    ended: int | None  # None: it may go on
    mappings: list[Mapping]
    files: list[str]

    def has(self, rows: pd.DataFrame) -> bool:
        """Return whether the rows are of this run. CLOCK_MONOTONIC does not tell: it begins with each boot."""
        times = [int(rows.sendtime.iloc[i]) for i in (0, -1)] if len(rows) else []
        return all(
            self.started - RUN_SLACK <= at + zero_at(self.mappings, at) <= (self.ended or 1 << 63) + RUN_SLACK
            for at in times
        )


def read_run(csv: str) -> Run | None:
    """Return what the JSON beside the CSV says, None if there is none, or none of this format."""
    try:
        with io.TextIOWrapper(open_regular(os.path.splitext(csv)[0] + ".json"), encoding="utf-8") as file:
            found = json.load(file)
        zeros = [Mapping(int(each["since"]), utc_ns(each["utc"])) for each in found["monotonic_zeros"]]
        ended = found["ended"] and utc_ns(found["ended"])
        return Run(utc_ns(found["started"]), ended, zeros, list(map(str, found["files"]))) if zeros else None
    except (OSError, ValueError, TypeError, LookupError):
        return None


def read_rows(csv: str) -> tuple[pd.DataFrame, list[Mapping], list[str]]:
    """Return the rows of a run by the name of its first CSV, how their clock maps to UTC, and notes for the user.

    The mappings are empty if they are not known. Raises Failure.
    """
    rows, run = read_csv(csv), read_run(csv)
    if run is None:
        zero, note = utc_of_zero(csv, rows)
        return rows, [] if zero is None else [Mapping(0, zero)], [note] if note else []
    if not run.has(rows):
        return rows, [], [f"'{os.path.splitext(csv)[0]}.json' is of another run: times are not UTC"]
    parts, notes = [rows], []
    is_renamed = run.files[:1] != [os.path.basename(csv)]
    if is_renamed and len(run.files) > 1:
        notes.append(f"the run has {len(run.files) - 1} more files, under other names by now: they are left out")
    for name in () if is_renamed else run.files[1:]:
        path = os.path.join(os.path.dirname(csv), os.path.basename(name))
        part = read_csv(path) if os.path.exists(path) else None
        if part is None or not run.has(part):
            notes.append(f"'{path}' is missing" if part is None else f"'{path}' is of another run, and left out")
        else:
            parts.append(part)
    return joined(parts), run.mappings, notes


def in_utc(rows: pd.DataFrame, mappings: list[Mapping]) -> pd.DataFrame:
    """Return the rows with times that all count from the first mapping's zero, also behind a later mapping."""
    if len(mappings) < 2:
        return rows
    shift = np.zeros(len(rows), "int64")
    for mapping in mappings:
        shift[(rows.sendtime >= mapping.since).to_numpy()] = mapping.zero - mappings[0].zero
    moved = rows.assign(sendtime=rows.sendtime + shift)
    return moved.sort_values("sendtime", kind="mergesort").reset_index(drop=True)


def utc_of_zero(csv: str, rows: pd.DataFrame) -> tuple[int | None, str]:
    """Return the ns from 1970 to CLOCK_MONOTONIC 0 by the log beside the CSV, and a note for the user.

    Versions without FILEBASE.json need it. The ns are None if there is no such log, or if it is another run's.
    """
    path = os.path.splitext(csv)[0] + ".log"
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8", errors="replace") as file:
            found = next(filter(None, map(CLOCK_LINE.search, file)), None)
        written, logged = os.stat(csv).st_mtime, os.stat(path).st_mtime
        zero = int(np.datetime64(found[1], "ns").astype("int64")) if found else None
    except (OSError, ValueError):
        return None, ""
    if zero is None or rows.empty:
        return None, ""
    first, last = ((zero + int(rows.sendtime.iloc[i])) / SECOND for i in (0, -1))
    is_older = written - last > CLOCK_SLACK and written - logged > last - first + COPY_SLACK
    if last > written + CLOCK_SLACK or is_older:
        return None, f"'{path}' seems to be another run's: times are not UTC"
    return zero, ""


# ---- The table ----------------------------------------------------------------------------------


def summary_of(rows: pd.DataFrame) -> list[str]:
    """Return the summary that elfprobe.py makes of these rows: the lines of a table for each destination, and
    an empty line at the end."""
    summary = Summary()
    for probe in records_in(rows):
        summary.note(probe)
    return [*summary.tables()[1:], ""]


def busiest(rows: pd.DataFrame, column: str = "dest") -> list[str]:
    """Return the values of a column, the most frequent first."""
    counts = {str(name): count for name, count in rows[column].value_counts().items() if count}
    return sorted(counts, key=lambda name: (-counts[name], name))


# ---- What is drawn of a destination ---------------------------------------------------------------


@dataclasses.dataclass
class Line:
    """The answers of one responder at a hop, or of all further ones if there are many. Latencies in ms."""

    hop: int
    responder: str
    rank: int  # among the hop's responders
    spread: list[float]  # percentiles 5, 25, 50, 75, 95 of all
    bins: pd.DataFrame  # by number of the bin: t (s, mean), low, median, high (quartiles), max, count
    points: pd.DataFrame  # t (s), ms


@dataclasses.dataclass
class Section:
    """A destination. Times are seconds since the first probe of the picture."""

    dest: str
    title: str
    start: float  # s
    width: int  # ns of a bin
    hops: list[int]
    lines: list[Line]
    slowest: float  # ms, of all answers
    fastest: float
    probes: Any  # array of hops and bins
    unanswered: Any  # the same
    srtt: pd.DataFrame | None  # as Line.bins
    retrans: Any  # array of bins: segments

    def end_of(self, bins: int) -> float:
        return self.start + bins * self.width / SECOND


def round_up(ns: float) -> int:
    """Return the lowest of STEPS, or of whole days, that is not below."""
    return next((step for step in STEPS if step >= ns), -int(-ns // (86400 * SECOND)) * 86400 * SECOND)


def bin_width(span: int, probes: float) -> int:
    """Return the ns of a bin: it has several of a hop's probes, or, if there are few, one of them."""
    bins = BINS_MAX if probes <= 40 else min(max(probes / 8, 40), BINS_MAX)
    return round_up((span or SECOND) / bins)


def binned(rows: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Return Line.bins of each group, computed from t and ms."""
    groups = rows.groupby(by)
    bins = groups.ms.quantile([0.25, 0.5, 0.75]).unstack()
    bins.columns = ["low", "median", "high"]
    return bins.assign(max=groups.ms.max(), t=groups.t.mean(), count=groups.size())


def make_section(dest: str, rows: pd.DataFrame) -> Section:
    """Return the section of a destination. rows are its rows, with t (s)."""
    first, last = int(rows.sendtime.iloc[0]), int(rows.sendtime.iloc[-1])
    per_hop = rows.outttl.value_counts()
    width = bin_width(last - first, float(per_hop.median()))
    rows = rows.assign(bin=(rows.sendtime - first) // width, ms=rows.latency.clip(lower=1) / 1e6)
    hops = sorted(map(int, per_hop.index))
    count = int(rows.bin.iloc[-1]) + 1
    answered = rows[rows.latency >= 0]

    def per_bin(some: pd.DataFrame) -> Any:
        cells = np.searchsorted(hops, some.outttl) * count + some.bin
        return np.bincount(cells, minlength=len(hops) * count).reshape(len(hops), count)

    probes = per_bin(rows)
    title = section_title(dest, rows, len(answered))
    return Section(
        dest, title, float(rows.t.iloc[0]), width, hops, make_lines(answered),
        float(answered.ms.max()), float(answered.ms.min()), probes, probes - per_bin(answered),
        *flow_figures(rows, count),
    )  # fmt: skip


def section_title(dest: str, rows: pd.DataFrame, answered: int) -> str:
    flows = rows.groupby(["protocol", "dport"]).size().sort_values(ascending=False, kind="mergesort").index
    protocol, port = map(int, flows[0])
    flow = PROTOCOLS.get(protocol, f"protocol {protocol}") + (f" port {port}" if port else "")
    apps = busiest(rows, "app")
    parts = [f"to {dest}", ", ".join(apps[:3]) + (" and others" if len(apps) > 3 else ""),
             flow + (" and others" if len(flows) > 1 else ""),
             f"{len(rows):,} probe{'s' * (len(rows) > 1)}, {len(rows) - answered:,} unanswered"]  # fmt: skip
    return "  ·  ".join(filter(None, parts))


def make_lines(answered: pd.DataFrame) -> list[Line]:
    counts = answered.groupby(["outttl", "responder"], observed=True).size()
    counts = counts[counts > 0].sort_values(ascending=False, kind="mergesort")
    if counts.empty:
        return []
    ranks = counts.groupby(level=0).cumcount().clip(upper=RESPONDERS_MAX)
    keys = pd.MultiIndex.from_arrays([answered.outttl, answered.responder.astype(object)])
    ranked = answered[["outttl", "bin", "t", "ms"]].assign(rank=ranks.reindex(keys).to_numpy())
    bins = binned(ranked, ["outttl", "rank", "bin"])
    spreads = ranked.groupby(["outttl", "rank"]).ms.quantile([0.05, 0.25, 0.5, 0.75, 0.95]).unstack()
    slowest = ranked.sort_values("ms").drop_duplicates(["outttl", "rank", "bin"], keep="last")
    sample = ranked.sample(frac=1, random_state=1).groupby(["outttl", "rank"]).head(POINTS_MAX)
    points = pd.concat([sample, slowest])
    points = dict(list(points[~points.index.duplicated()].groupby(["outttl", "rank"])))
    lines = []
    for hop, rank in spreads.index:
        names = [str(name) for name, its in ranks[hop].items() if its == rank]
        name = names[0] if len(names) == 1 else f"{len(names)} others"
        lines.append(Line(int(hop), name, int(rank), list(spreads.loc[(hop, rank)]),
                          bins.loc[(hop, rank)], points[hop, rank]))  # fmt: skip
    return lines


def flow_figures(rows: pd.DataFrame, bins: int) -> tuple[pd.DataFrame | None, Any]:
    """Return the sockets' own round-trip times, and the segments retransmitted in each bin.

    The column retrans counts from the flow's beginning, so each row adds its difference to the one before.
    """
    more = rows.groupby(["protocol", "sport", "dport"]).retrans.diff().clip(lower=0).fillna(0)
    known = rows[rows.srtt.notna()]
    srtt = None if known.empty else binned(known.assign(ms=known.srtt / 1e3), ["bin"])
    return srtt, np.bincount(rows.bin, weights=more, minlength=bins)


# ---- Drawing ------------------------------------------------------------------------------------


class TimeScale:
    """The x axis, in seconds since the first probe. Its labels are UTC if that is known."""

    def __init__(self, span: float, utc: int | None) -> None:
        """span in s; utc: ns from 1970 to the first probe."""
        margin = span * 0.012 or 0.5
        self.low, self.high, self._utc = -margin, span + margin, utc
        self._step = round_up((self.high - self.low) / 8 * SECOND)
        self._in_seconds = utc is None and span <= 120

    def ticks(self) -> dict[float, str]:
        zero = self._utc or 0
        first = -int(-(zero + self.low * SECOND) // self._step)
        last = int((zero + self.high * SECOND) // self._step)
        at = [number * self._step for number in range(first, last + 1)]
        return {(ns - zero) / SECOND: self._text(ns) for ns in at if self._utc or ns >= 0}

    def _text(self, ns: int) -> str:
        if self._in_seconds:
            return f"{ns / SECOND:g}"
        seconds, rest = divmod(ns, SECOND)
        hours = seconds // 3600
        days = datetime.date(1970, 1, 1) + datetime.timedelta(hours // 24) if self._utc else None
        if days and seconds % 86400 == rest == 0:
            return str(days)
        text = f"{hours % 24 if days else hours}:{seconds // 60 % 60:02}".zfill(5 if days else 4)
        if self._step < 60 * SECOND:
            text += f":{seconds % 60:02}"
        if self._step < SECOND:
            text += f".{rest:09}"[: 1 + len(f"{self._step / SECOND:.9f}".rstrip("0").split(".")[1])]
        return text

    def label(self) -> str:
        if self._utc is None:
            minutes = "hours:minutes" + ":seconds" * (self._step < 60 * SECOND)
            return f"{'seconds' if self._in_seconds else minutes} since the first probe"
        ends = [self._utc + x * SECOND for x in (0, self.high)]
        first, last = (datetime.date(1970, 1, 1) + datetime.timedelta(ns // (86400 * SECOND)) for ns in ends)
        return f"UTC, {first}" + (f" to {last}" if first != last else "")


@dataclasses.dataclass
class Panels:
    """The axes in which a section is drawn."""

    time: Any
    hops: Any
    lost: Any = None
    flow: Any = None


def latency_text(ms: float) -> str:
    for unit, size in (("s", 1e3), ("ms", 1.0), ("µs", 1e-3)):
        if ms >= size * 0.9995:
            return f"{ms / size:.3g} {unit}"
    return f"{ms * 1e6:.3g} ns" if ms else "0"


def width_text(ns: int) -> str:
    if ns < 60 * SECOND:
        return latency_text(ns / 1e6)
    return f"{ns // (60 * SECOND)} min" if ns < 7200 * SECOND else f"{ns // (3600 * SECOND)} h"


def plain(text: str, most: int = 130) -> str:
    """Return the text, cut to what fits, for matplotlib, to which dollar signs would mean mathematics."""
    text = printable(text)
    return (text if len(text) <= most else text[: most - 1] + "…").replace("$", r"\$")


def colours_of(section: Section) -> dict[int, Any]:
    """Return the colours by hop. Lightness rises with the hop, for readers who cannot tell colours apart."""
    return {hop: plasma(0.82 * i / max(len(section.hops) - 1, 1)) for i, hop in enumerate(section.hops)}


@dataclasses.dataclass
class Picture:
    """A matplotlib figure and what is in it, section by section."""

    figure: Any
    panels: list[Panels]
    scale: TimeScale
    utc: int | None  # ns from 1970 to the first probe
    sections: list[Section]


def draw(rows: pd.DataFrame, dests: list[str], zero: int | None, heading: str, notes: list[str]) -> Picture:
    """Draw these destinations of the rows. zero: ns from 1970 to CLOCK_MONOTONIC 0."""
    rows = rows[rows.dest.isin(dests)]
    first = 0 if rows.empty else int(rows.sendtime.iloc[0])
    rows = rows.assign(t=(rows.sendtime - first) / SECOND)
    utc = None if zero is None else zero + first
    scale = TimeScale(0.0 if rows.empty else float(rows.t.iloc[-1]), utc)
    sections = [make_section(dest, rows[rows.dest == dest]) for dest in dests]
    return Picture(*draw_figure(sections, scale, heading, notes), scale, utc, sections)


def draw_figure(
    sections: list[Section], scale: TimeScale, heading: str, notes: list[str]
) -> tuple[Any, list[Panels]]:
    matplotlib.rcdefaults()  # not the user's settings: places and colours here depend on each other
    matplotlib.rcParams.update(RC)
    heights = [section_height(section, len(sections) == 1) for section in sections]
    total = 0.9 + sum(map(sum, heights)) + 0.85 * len(sections) + 0.2 * len(notes)
    figure = Figure(figsize=(WIDTH, total), dpi=DPI, facecolor="white")

    def write(text: str, y: float, x: float = 0.2, **options: Any) -> None:
        figure.text(x / WIDTH, 1 - y / total, text, va="center", **options)

    write(plain(heading), 0.26, fontsize=11, fontweight="bold")
    for number, text in enumerate(READING if sections else ["no probes yet"]):
        write(text, 0.5 + 0.17 * number, color="#444444")
    y = 0.9
    panels = []
    for section, height in zip(sections, heights):
        title = plain(f"{section.title}  ·  bins of {width_text(section.width)}")
        write(title, y + 0.19, LEFT, fontsize=9, fontweight="bold")
        panels.append(draw_section(figure, section, scale, y + 0.32, height))
        y += sum(height) + 0.85
    for number, note in enumerate(notes):
        write(plain(note), y + 0.2 * number, color="#444444")
    return figure, panels


def section_height(section: Section, alone: bool) -> tuple[float, float, float]:
    """Return the heights (inches) of the panels latencies, unanswered, flow. The list of hops is beside them."""
    lost = 0.08 + 0.115 * int(section.unanswered.any(axis=1).sum()) if section.unanswered.any() else 0.0
    flow = 0.0 if section.srtt is None else 0.86 if lost else 1.0
    listed = LINE * (len(section.lines) + len(unresponsive_hops(section)) + 2)
    return max(4.2 if alone else 3.2, listed - lost - flow), lost, flow


def draw_section(
    figure: Any, section: Section, scale: TimeScale, top: float, heights: tuple[float, float, float]
) -> Panels:
    total = figure.get_size_inches()[1]

    def place(x: float, width: float, y: float, height: float, **options: Any) -> Any:
        return figure.add_axes([x / WIDTH, 1 - (y + height) / total, width / WIDTH, height / total],
                               label=f"{section.dest} {x} {y}", **options)  # fmt: skip

    main, lost, flow = heights
    colours = colours_of(section)
    panels = Panels(place(LEFT, TIME, top, main), place(LEFT + TIME + GAP, HOPS, top, main))
    draw_latency(panels.time, section, colours)
    draw_spread(panels.hops, section, colours)
    panels.hops.set_ylim(panels.time.get_ylim())
    draw_list(place(WIDTH - LIST - 0.1, LIST, top, sum(heights)), section, colours)
    y = top + main
    if lost:
        panels.lost = place(LEFT, TIME, y + 0.04, lost - 0.04)
        draw_lost(panels.lost, section, colours)
    if flow:
        gap = 0.06 if lost else 0.2  # without the strip, the numbers of the hops panel need the room
        panels.flow = place(LEFT, TIME, y + lost + gap, flow - gap)
        draw_flow(panels.flow, section)
    ticks = scale.ticks()
    below = panels.flow or panels.lost or panels.time
    for axes in filter(None, (panels.time, panels.lost, panels.flow)):
        axes.set_xlim(scale.low, scale.high)
        axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
        axes.set_xticklabels(ticks.values() if axes is below else [])
    panels.time.grid(True, color="#dddddd", linewidth=0.5)
    below.set_xlabel(scale.label())
    return panels


def unresponsive_hops(section: Section) -> list[int]:
    return sorted(set(section.hops) - {line.hop for line in section.lines})


def scale_latency(axes: Any, section: Section) -> None:
    """Set up the y axis of latencies (ms): logarithmic if they lie far apart."""
    if section.slowest > section.fastest * LOG_FROM:
        axes.set_yscale("log")
        low, high = section.fastest / 1.25, section.slowest * 1.25
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 2e4 else (1,), numticks=30))
    else:
        low, high = 0.0, section.slowest * 1.08
        axes.yaxis.set_major_locator(MaxNLocator(7))
    axes.set_ylim(low, high)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: latency_text(ms)))


def with_gaps(bins: pd.DataFrame) -> pd.DataFrame:
    """Return the bins, with a row of NaN where several bins have no answer, so that no line leads across."""
    apart = np.diff(bins.index, prepend=bins.index[0])
    wide = np.flatnonzero(apart > max(3, 5 * np.median(apart)))
    return pd.DataFrame({name: np.insert(bins[name].to_numpy(float), wide, np.nan) for name in bins})


def draw_latency(axes: Any, section: Section, colours: dict[int, Any]) -> None:
    axes.set_ylabel("latency, there and back")
    if not section.lines:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no probe was answered", transform=axes.transAxes, ha="center", color="#444444")
        return
    scale_latency(axes, section)
    for line in section.lines:
        colour, many = colours[line.hop], len(line.points) > 100
        axes.plot(line.points.t, line.points.ms, linestyle="", marker=".", markersize=3 if many else 6,
                  markeredgewidth=0, color=colour, alpha=0.5 if many else 0.8, zorder=2)  # fmt: skip
        bins = with_gaps(line.bins)
        axes.fill_between(bins.t, bins.low, bins.high, color=colour, alpha=0.25, linewidth=0, zorder=3)
        axes.plot(bins.t, bins["median"], color=colour, linestyle=STYLES[line.rank], linewidth=1.3, zorder=4,
                  label=f"{line.hop} {line.responder}")  # fmt: skip


def draw_spread(axes: Any, section: Section, colours: dict[int, Any]) -> None:
    """Draw a mark for each line: median, middle half, and 5th to 95th percentile of the whole time."""
    if section.lines:
        scale_latency(axes, section)
    else:
        axes.set_yticks([])
    place = {hop: x for x, hop in enumerate(section.hops)}
    for line in section.lines:
        of_hop = sum(other.hop == line.hop for other in section.lines)
        x = place[line.hop] + 0.7 * ((line.rank + 0.5) / of_hop - 0.5)
        low, lower, median, upper, high = line.spread
        colour = colours[line.hop]
        axes.vlines(x, low, high, color=colour, linewidth=1)
        axes.vlines(x, lower, upper, color=colour, linewidth=4 if len(section.lines) <= 16 else 2.5)
        axes.plot([x], [median], marker="o", markersize=3.6, color="white", markeredgewidth=0.9,
                  markeredgecolor=colour)  # fmt: skip
    for hop in unresponsive_hops(section) if len(section.hops) <= 16 else ():
        axes.text(place[hop], 0.02, "unresponsive", transform=axes.get_xaxis_transform(), rotation=90,
                  ha="center", va="bottom", fontsize=6, color="#666666")  # fmt: skip
    every = -(-len(section.hops) // 10)
    axes.set_xlim(-0.7, len(section.hops) - 0.3)
    axes.set_xticks(range(0, len(section.hops), every))
    axes.set_xticklabels([str(hop) for hop in section.hops[::every]])
    axes.text(0.04, 0.98, "by hop", transform=axes.transAxes, va="top", fontsize=7, color="#444444")
    axes.tick_params(labelleft=False, left=False)
    axes.grid(True, axis="y", color="#dddddd", linewidth=0.5)


def draw_list(axes: Any, section: Section, colours: dict[int, Any]) -> None:
    """List the hops and who answers there, in the lines' colours."""
    axes.axis("off")
    height = axes.get_position().height * axes.figure.get_size_inches()[1]
    axes.set_xlim(0, LIST)
    axes.set_ylim(height, 0)
    entries = [(line.hop, line.rank, line.responder) for line in section.lines]
    entries += [(hop, 0, "(unresponsive)") for hop in unresponsive_hops(section)]
    axes.text(0.62, LINE / 2, "hop", ha="right", va="center", fontsize=7, color="#444444")
    axes.text(0.75, LINE / 2, "who answers", va="center", fontsize=7, color="#444444")
    for number, (hop, rank, responder) in enumerate(sorted(entries)):
        y = (number + 1.5) * LINE
        axes.plot([0.05, 0.4], [y, y], color=colours[hop], linestyle=STYLES[rank], linewidth=2)
        axes.text(0.62, y, "" if rank else str(hop), ha="right", va="center", fontsize=7.5)
        axes.text(0.75, y, plain(responder, 39), va="center", fontsize=7.5 if len(responder) < 30 else 6.2)


def draw_lost(axes: Any, section: Section, colours: dict[int, Any]) -> None:
    """Draw a row for each hop with unanswered probes: grey for bins in which all were answered, else coloured.

    The colour is the stronger, the more of a bin's probes are unanswered.
    """
    rows = np.flatnonzero(section.unanswered.any(axis=1))
    probes, unanswered = section.probes[rows], section.unanswered[rows]
    image = np.ones((*probes.shape, 4))
    image[probes > 0] = matplotlib.colors.to_rgba("#ececec")
    for row, hop in enumerate(rows):
        share = 0.35 + 0.65 * unanswered[row] / np.maximum(probes[row], 1)
        colour = np.array(colours[section.hops[hop]])
        lost = unanswered[row] > 0
        image[row, lost] = 1 - share[lost, None] * (1 - colour)
    image[..., 3] = 1
    axes.imshow(image, aspect="auto", interpolation="nearest", zorder=2,
                extent=(section.start, section.end_of(probes.shape[1]), len(rows) - 0.5, -0.5))  # fmt: skip
    axes.set_yticks(range(len(rows)))
    axes.set_yticklabels([str(section.hops[hop]) for hop in rows], fontsize=6)
    axes.tick_params(axis="y", length=0)
    axes.set_ylabel("unanswered\nby hop", rotation=0, ha="right", va="center", fontsize=7, labelpad=4)


def draw_flow(axes: Any, section: Section) -> None:
    """Draw the sockets' own round-trip time, and their retransmissions."""
    assert section.srtt is not None
    bins = with_gaps(section.srtt)
    axes.fill_between(bins.t, bins.low, bins.high, color=FLOW_COLOUR, alpha=0.15, linewidth=0)
    axes.plot(bins.t, bins["median"], color=FLOW_COLOUR, linewidth=1.1, label="srtt",
              marker="." if len(bins) == 1 else "")  # fmt: skip
    axes.set_ylim(0, max(section.srtt.high.max() * 1.15, 1e-3))
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: latency_text(ms)))
    axes.set_ylabel("srtt")
    again = np.flatnonzero(section.retrans)
    if not len(again):
        return
    right = axes.twinx()
    right.bar([section.end_of(int(number)) for number in again], section.retrans[again], align="edge",
              width=section.width / SECOND, color=RETRANS_COLOUR, edgecolor=RETRANS_COLOUR)  # fmt: skip
    right.set_zorder(axes.get_zorder() - 1)  # the bars behind the line
    axes.patch.set_visible(False)
    right.set_ylim(0, section.retrans.max() * 1.15)
    right.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    right.tick_params(axis="y", colors=RETRANS_COLOUR)
    right.set_ylabel(f"retransmitted\nin {width_text(section.width)}", color=RETRANS_COLOUR, fontsize=7)


# ---- The page -----------------------------------------------------------------------------------


def hover_data(picture: Picture) -> dict[str, Any]:
    """Return the figures that elf.html shows under the pointer: times in s, latencies in ms.

    Panels are given as fractions of the picture: left, top, width, height.
    """

    def box(axes: Any) -> list[float] | None:
        if axes is None:
            return None
        at = axes.get_position()
        return [round(value, 5) for value in (at.x0, 1 - at.y1, at.width, at.height)]

    def series(bins: pd.DataFrame) -> dict[str, list[Any]]:
        names = "low", "median", "high", "max"
        figures = {name: [float(f"{ms:.4g}") for ms in bins[name]] for name in names}
        return dict(figures, bin=list(bins.index), t=list(bins.t.round(6)), count=list(bins["count"]))

    def lines(section: Section) -> list[dict[str, Any]]:
        colours = {hop: matplotlib.colors.to_hex(colour) for hop, colour in colours_of(section).items()}
        return [dict(series(line.bins), hop=line.hop, responder=printable(line.responder),
                     colour=colours[line.hop]) for line in section.lines]  # fmt: skip

    listed = [
        dict(start=section.start, width=section.width / SECOND, hops=section.hops, lines=lines(section),
             time=box(its.time), lost=box(its.lost), flow=box(its.flow), y=list(its.time.get_ylim()),
             log=its.time.get_yscale() == "log", probes=section.probes.tolist(),
             unanswered=section.unanswered.tolist(), retrans=section.retrans.tolist(),
             srtt=None if section.srtt is None else series(section.srtt))
        for section, its in zip(picture.sections, picture.panels)
    ]  # fmt: skip
    scale = picture.scale
    return {"utc": picture.utc and picture.utc / 1e6, "x": [scale.low, scale.high], "sections": listed}


STYLE = """
body { font: 14px sans-serif; color: #222; background: #fff; margin: 1.5em; max-width: 1612px }
h1 { font-size: 1.3em }
pre { overflow-x: auto; line-height: 1.35 }
#picture { position: relative }
img { width: 100%; display: block }
svg { position: absolute; left: 0; top: 0; width: 100%; height: 100%; pointer-events: none }
#tip { position: absolute; pointer-events: none; white-space: pre; background: #fffffff2; padding: .35em .6em;
       border: 1px solid #888; border-left-width: 6px; border-radius: 3px; font-size: 13px }
"""

SCRIPT = r"""
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const [picture, tip, path] = ["picture", "tip", "path"].map(id => document.getElementById(id));
const [begin, end] = data.x;

const clock = s => data.utc === null ? s.toFixed(3) + " s"
  : new Date(data.utc + s * 1000).toISOString().replace("T", " ").replace("Z", " UTC");
const latency = ms => ms >= 1000 ? +(ms / 1000).toPrecision(3) + " s"
  : ms >= 1 ? +ms.toPrecision(3) + " ms" : +(ms * 1000).toPrecision(3) + " µs";
const within = (box, x, y) => box && x >= box[0] && x < box[0] + box[2]
  && y >= box[1] && y < box[1] + box[3];
const xOf = (s, t) => s.time[0] + s.time[2] * (t - begin) / (end - begin);
const yOf = (s, ms) => s.time[1] + s.time[3] * (1 - (s.log ? Math.log(ms / s.y[0]) / Math.log(s.y[1] / s.y[0])
  : (ms - s.y[0]) / (s.y[1] - s.y[0])));
const figures = (line, i) => `median ${latency(line.median[i])} of ${line.count[i]}` + (line.count[i] < 2 ? ""
  : `, middle half ${latency(line.low[i])} to ${latency(line.high[i])}, max ${latency(line.max[i])}`);
const asked = (s, row, bin) => `hop ${s.hops[row]}: ${s.probes[row][bin] || 0} probes, `
  + `${s.unanswered[row][bin] || 0} unanswered`;

// The line and the number of its bin whose median is nearest to the pointer, in pixels.
function nearest(s, x, y, size) {
  let best = null, least = Infinity;
  for (const line of s.lines) for (let i = 0; i < line.t.length; i++) {
    const dx = Math.abs(xOf(s, line.t[i]) - x) * size.width;
    const away = Math.hypot(3 * dx, (yOf(s, line.median[i]) - y) * size.height);
    if (dx < 40 && away < least) [best, least] = [[line, i], away];
  }
  return best;
}

// Lines of text for the place under the pointer, and the line of the picture that they are about.
function tell(s, x, y, size) {
  const bin = Math.floor((begin + (x - s.time[0]) / s.time[2] * (end - begin) - s.start) / s.width);
  const when = bin => `from ${clock(s.start + bin * s.width)} for ${+s.width.toPrecision(6)} s`;
  if (within(s.time, x, y)) {
    const [line, i] = nearest(s, x, y, size) || [];
    return line && [[when(line.bin[i]), `${line.responder}: ${figures(line, i)}`,
      asked(s, s.hops.indexOf(line.hop), line.bin[i])], line, i];
  }
  if (within(s.lost, x, y)) {
    const rows = [...s.hops.keys()].filter(row => s.unanswered[row].some(n => n));
    return [[when(bin), asked(s, rows[Math.floor((y - s.lost[1]) / s.lost[3] * rows.length)], bin)]];
  }
  if (within(s.flow, x, y)) {
    const i = s.srtt.bin.indexOf(bin);
    return [[when(bin), i < 0 ? "srtt: not known" : `srtt: ${figures(s.srtt, i)}`,
      `retransmitted: ${s.retrans[bin] || 0} segments`]];
  }
}

function show(event) {
  const size = picture.getBoundingClientRect();
  const left = event.clientX - size.left, top = event.clientY - size.top;
  const at = s => tell(s, left / size.width, top / size.height, size);
  const section = data.sections.find(at);
  tip.hidden = !section;
  path.setAttribute("d", "");
  if (!section) return;
  const [text, line, i] = at(section);
  tip.textContent = text.join("\n");
  tip.style.borderLeftColor = line ? line.colour : "#888";
  tip.style.left = Math.max(Math.min(left + 14, size.width - tip.offsetWidth), 0) + "px";
  tip.style.top = Math.max(top - tip.offsetHeight - 12, 0) + "px";
  if (!line) return;
  const point = i => `${xOf(section, line.t[i]).toFixed(5)} ${yOf(section, line.median[i]).toFixed(5)}`;
  const to = n => n && line.bin[n] - line.bin[n - 1] < 4 ? "L" : "M";
  path.setAttribute("d", line.t.map((_, n) => to(n) + point(n)).join("")
    + `M${xOf(section, line.t[i])} ${section.time[1]}v${section.time[3]}`);
}
for (const kind of ["pointermove", "pointerdown", "pointerleave"]) picture.addEventListener(kind, show);
"""

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{heading}</title>
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'">
<style>{style}</style></head><body>
<h1>{heading}</h1>
<pre>{table}</pre>
<div id="picture"><img alt="latency over time, hop by hop" src="data:image/png;base64,{png}">
<svg viewBox="0 0 1 1" preserveAspectRatio="none"><path id="path" d="" fill="none" stroke="#000"
 stroke-width="2" vector-effect="non-scaling-stroke"/></svg>
<div id="tip" hidden></div></div>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body></html>
"""


def page(heading: str, table: list[str], png: bytes, data: dict[str, Any]) -> str:
    """Return the page. It tells the browser to load nothing, and to run nothing but SCRIPT.

    Whatever comes from the CSV is escaped, so that it is only text.
    """
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return PAGE.format(
        heading=html.escape(printable(heading)), table=html.escape("\n".join(table)), data=text, style=STYLE,
        png=base64.b64encode(png).decode(), script=SCRIPT,
        digest=base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode(),
    )  # fmt: skip


# ---- The run --------------------------------------------------------------------------------------


def choose(rows: pd.DataFrame, chosen: list[str]) -> tuple[list[str], list[str]]:
    """Return the destinations to draw, and a note about the others. Raises Failure."""
    there = busiest(rows)
    for dest in chosen:
        if dest not in there:
            known = ", ".join(there[:5]) + (f" and {len(there) - 5} others" if len(there) > 5 else "")
            raise Failure(f"argument --dest: no probe went to {dest}, but to {known or 'nobody'}")
    if chosen or len(there) <= SECTIONS_MAX:
        return chosen or there, []
    others = there[SECTIONS_MAX:]
    named = ", ".join(others[:4]) + (" ..." if len(others) > 4 else "")
    note = f"not drawn (--dest draws them): {len(others)} destinations with fewer probes: {named}"
    return there[:SECTIONS_MAX], [note]


def write(path: str, content: bytes) -> None:
    """Write a file in the place of what has its name. Never through a link: others may write to the folder.
    Raises Failure."""
    file = OutputFile(path, "-o/--filebase")
    try:
        file.overwrite(content)
    finally:
        file.close()


def say(lines: list[str]) -> None:
    """Raises Failure."""
    unwritten = print_lines(lines)
    if unwritten:
        raise Failure(f"cannot write the table: {unwritten}")


def run(args: argparse.Namespace) -> None:
    """Print the table, and make the picture and the page. Raises Failure."""
    rows, mappings, said = read_rows(args.csv)
    chosen, notes = choose(rows, args.dest)
    zero = mappings[0].zero if mappings else None
    if args.dest:
        rows = rows[rows.dest.isin(chosen)]
    notes += said
    table = summary_of(rows) if len(rows) else ["no probes yet", ""]
    say(table + notes)
    heading = os.path.basename(args.csv)
    picture = draw(in_utc(rows, mappings), chosen, zero, heading, notes)
    png = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # characters that no font has
        picture.figure.savefig(png, format="png")
    write(args.filebase + ".png", png.getvalue())
    say([f"picture: {printable(args.filebase)}.png"])
    if args.html:
        text = page(heading, table, png.getvalue(), hover_data(picture))
        write(args.filebase + ".html", text.encode())
        say([f"page: {printable(args.filebase)}.html"])


def main(argv: list[str]) -> int:
    """Return the exit status: 0, 2 for wrong usage, 1 for every other error."""
    try:
        args = parse_arguments(argv)
        if MISSING:
            raise missing_packages(MISSING)
        run(args)
    except Failure as failure:
        print(f"{as_called('elfplot.py')}: {failure}", file=sys.stderr)
        return failure.status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
