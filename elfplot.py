#!/usr/bin/python3
# SPDX-License-Identifier: GPL-3.0-only
"""Pictures of what elfprobe measured; needs neither root nor bcc.

$ python3 elfplot.py --html elf.csv
10.0.5.2: 3734 probes, latency in ms
hop  probes answered      min   median      95%      99%      max   jitter     adds  responder
  1     938   100.0%    0.008    0.028    0.062    0.076    0.113    0.015    0.028  10.0.1.2
  2     938   100.0%    0.012    0.032    0.087    0.104    0.127    0.020    0.003  10.0.2.2
  3     938   100.0%    0.016    0.038    0.124    0.151    1.185    0.034    0.003  10.0.3.2
  4     920    99.7%    0.018    0.106   31.784   33.730   34.874    0.536    0.053  10.0.4.2

picture: elf.png
page: elf.html

elf.png shows latency over time, with a colour for each hop. Beside it is each hop's spread over the whole time.
Below, if there are any, are unanswered probes, and the flows' own round-trip time and retransmissions. elf.html
is one page that needs no other file: picture and tables, which follow when you zoom in on a part of the time.
Both lie beside the CSV unless -o says otherwise. With elf.json beside elf.csv, times are UTC.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import io
import ipaddress
import logging
import os
import sys
import time
import warnings
from typing import Any, Sequence

from elf.console import print_lines
from elf.files import OutputFile
from elf.summary import TABLES_MAX
from elf.usage import (
    Failure,
    Parser,
    as_called,
    missing_packages,
    not_empty,
    positive_seconds,
    printable,
    why_unusable,
)

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # otherwise it warns about its cache directory
MISSING: dict[str, str] = {}  # module -> why it cannot be used
try:
    import numpy as np

    from elf.compare import comparison
    from elf.course import SECOND, Bins, Course, Line, round_up
    from elf.page import SECTIONS_MAX as PAGE_MAX
    from elf.page import page
    from elf.sources import FOREVER, KEYS, LARGE_MAX, Moment, Results, Window, moment, read, sources_of, span_of
except Exception as error:  # a broken one raises whatever comes up
    MISSING["numpy"] = why_unusable("numpy", error)
try:
    import matplotlib
    from matplotlib.cm import plasma
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
except Exception as error:
    MISSING["matplotlib"] = why_unusable("matplotlib", error)

SECTIONS_MAX, CHOSEN_MAX = 4, 16  # destinations in a picture, at most: without and with --dest
LOG_FROM = 10.0  # ratio of slowest to fastest answer from which on the axis is logarithmic
FORMATS = "png", "svg", "pdf"
PROGRESS_FROM, PROGRESS_EVERY = 1.0, 0.2  # s: when progress is first shown, and how often

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


def when(text: str) -> Moment:
    """Return the moment: an argparse type."""
    try:
        return moment(text)
    except ValueError:
        wanted = "a UTC time (2026-11-06T20:15:00) or a number of seconds since the first probe"
        raise argparse.ArgumentTypeError(f"'{text}' is not {wanted}") from None


def limits(text: str) -> tuple[float, float]:
    """Return the ends of an axis: an argparse type."""
    try:
        low, high = map(float, text.split(":"))
        if -1e12 < low < high < 1e12:
            return low, high
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"'{text}' is not LOW:HIGH, two numbers that rise")


def hop_number(text: str) -> int:
    """Return the number of a hop: an argparse type."""
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 255:
        raise argparse.ArgumentTypeError(f"'{text}' is not the number of a hop, 1 to 255")
    return int(text)


def argument_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(
        prog=as_called("elfplot.py"),
        usage=as_called("python3 elfplot.py [-h] [options] CSV [CSV ...]"),
        description="Prints the summary of what elfprobe measured, and draws it.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("csv", nargs="+", type=not_empty, metavar="CSV", help="file of elfprobe, which may still be writing it. "
        "Of several files by --rotate the first one; of several hosts one of each")  # fmt: skip
    add("-o", "--filebase", type=not_empty, metavar="FILEBASE",
        help="draw FILEBASE.png and FILEBASE.html (default: the first CSV's name without .csv); "
        "existing files are replaced")  # fmt: skip
    add("--html", action="store_true", help="make the page, too: pictures and tables in one file for the browser")
    add("--compare", action="store_true",
        help="tell what changed from the first CSV to the second, hop by hop, and how sure that is")  # fmt: skip
    add("--dest", action="append", default=[], type=address, metavar="ADDRESS",
        help=f"only this destination; may be given again (default: the busiest {TABLES_MAX} in the table, "
        f"{SECTIONS_MAX} in the picture)")  # fmt: skip
    add("--by", choices=("dest", "flow", "responder", "app"), default="dest",
        help="what each table and each part of the picture is about: a destination, a flow, a router that answers, "
        "a program (default: dest)")  # fmt: skip
    add("--from", dest="begin", type=when, metavar="TIME",
        help="only probes that left from then on: UTC (ISO 8601), or seconds since the first probe")  # fmt: skip
    add("--to", dest="end", type=when, metavar="TIME", help="only probes that left until then")
    add("--last", type=positive_seconds, metavar="SECONDS", help="only probes that left in the last SECONDS")
    add("--format", choices=FORMATS, default=FORMATS[0], help="of the picture (default: png)")
    add("--cdf", action="store_true", help="draw the latencies' distribution (CDF) by hop, small as for a paper")
    add("--hop", action="append", default=[], type=hop_number, metavar="HOP",
        help="draw only this hop; may be given again")  # fmt: skip
    add("--xlim", type=limits, metavar="LOW:HIGH", help="ends of the x axis with --cdf, ms")
    add("--ylim", type=limits, metavar="LOW:HIGH", help="ends of the y axis: ms; with --cdf shares, 0 to 1")
    return parser


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Return the arguments. Raises Failure (status 2) for wrong usage."""
    args = argument_parser().parse_intermixed_args(argv)
    args.dest = list(dict.fromkeys(args.dest))
    if len(args.dest) > CHOSEN_MAX:
        raise Failure(f"argument --dest: a picture has {CHOSEN_MAX} destinations at most", 2)
    if args.compare and len(args.csv) != 2:
        raise Failure("argument --compare: give two CSVs, the one before and the one after", 2)
    if args.last and (args.begin or args.end):
        raise Failure("argument --last: not with --from or --to", 2)
    if args.compare and args.by != "dest":
        raise Failure("argument --compare: not with --by", 2)
    if args.cdf and args.html:
        raise Failure("argument --html: not with --cdf", 2)
    if args.xlim and not args.cdf:
        raise Failure("argument --xlim: only with --cdf; --from and --to choose the time", 2)
    args.filebase = args.filebase or os.path.splitext(args.csv[0])[0]
    written = {os.path.realpath(args.filebase + ending) for ending in (f".{args.format}", ".html")}
    for csv in args.csv:
        if os.path.realpath(csv) in written:
            raise Failure(f"'{csv}' would be overwritten by the picture: choose another name with -o", 2)
    return args


# ---- What is drawn of a destination ---------------------------------------------------------------


@dataclasses.dataclass
class Section:
    """A destination, with the figures of its course that are drawn. Times are as in the course."""

    course: Course
    title: str
    hops: list[int]
    lines: list[Line]
    slowest: float  # ms, of all answers
    fastest: float
    first_bin: int
    probes: Any  # array of hops by bins
    unanswered: Any  # the same
    srtt: Bins | None
    retrans: Any  # array of bins: segments
    since: float  # s from the picture's zero to the course's start

    @property
    def dest(self) -> str:
        return self.course.dest

    @property
    def width(self) -> int:
        """The ns of a bin."""
        return self.course.width

    @property
    def start(self) -> float:
        """When the first bin begins, s since the picture's zero."""
        return self.since + self.first_bin * self.width / SECOND

    def end_of(self, bins: int) -> float:
        return self.start + bins * self.width / SECOND

    def seconds(self, times: Any) -> Any:
        """Return times of the course as s since the picture's zero."""
        return self.since + times / SECOND


def make_section(course: Course, host: str, zero: int, hops: Sequence[int]) -> Section:
    """Return the section of a course. host: empty if there is only one. hops: which to draw; none: all."""
    course = course.coarse()
    apps = [app for app, _ in sorted(course.apps.items(), key=lambda item: (-item[1], item[0]))]
    unanswered = course.probes - course.answered
    parts = [course.name + f" from {host}" * bool(host),
             ", ".join(apps[:3]) + (" and others" if len(apps) > 3 else ""), course.flow_text(),
             f"{course.probes:,} probe{'s' * (course.probes > 1)}, {unanswered:,} unanswered"]  # fmt: skip
    lines = [line for line in course.lines() if not hops or line.hop in hops]
    first_bin, by_probes, by_unanswered, retrans = course.by_bin()
    drawn = [row for row, hop in enumerate(course.hops) if not hops or hop in hops]
    return Section(
        course, "  ·  ".join(filter(None, parts)), [course.hops[row] for row in drawn], lines,
        max((in_ms(line.values[0][-1]) for line in lines), default=0.0),
        min((in_ms(line.values[0][0]) for line in lines), default=0.0),
        first_bin, by_probes[drawn], by_unanswered[drawn], course.srtt(), retrans, (course.start - zero) / SECOND,
    )  # fmt: skip


def in_ms(latencies: Any) -> Any:
    """Return latencies (ns) in ms, above 0: the axis may be logarithmic."""
    return np.maximum(latencies, 1) / 1e6


# ---- Drawing ------------------------------------------------------------------------------------


class TimeScale:
    """The x axis, in seconds since the first probe. Its labels are UTC if that is known."""

    def __init__(self, span: float, utc: int | None) -> None:
        """span in s; utc: ns from 1970 to the first probe."""
        margin = span * 0.012 or 0.5
        self.low, self.high, self.utc = -margin, span + margin, utc
        self._step = round_up((self.high - self.low) / 8 * SECOND)
        self._in_seconds = utc is None and span <= 120

    def ticks(self) -> dict[float, str]:
        zero = self.utc or 0
        first = -int(-(zero + self.low * SECOND) // self._step)
        last = int((zero + self.high * SECOND) // self._step)
        at = [number * self._step for number in range(first, last + 1)]
        return {(ns - zero) / SECOND: self._text(ns) for ns in at if self.utc or ns >= 0}

    def _text(self, ns: int) -> str:
        if self._in_seconds:
            return f"{ns / SECOND:g}"
        seconds, rest = divmod(ns, SECOND)
        hours = seconds // 3600
        days = datetime.date(1970, 1, 1) + datetime.timedelta(hours // 24) if self.utc else None
        if days and seconds % 86400 == rest == 0:
            return str(days)
        text = f"{hours % 24 if days else hours}:{seconds // 60 % 60:02}".zfill(5 if days else 4)
        if self._step < 60 * SECOND:
            text += f":{seconds % 60:02}"
        if self._step < SECOND:
            text += f".{rest:09}"[: 1 + len(f"{self._step / SECOND:.9f}".rstrip("0").split(".")[1])]
        return text

    def label(self) -> str:
        if self.utc is None:
            minutes = "hours:minutes" + ":seconds" * (self._step < 60 * SECOND)
            return f"{'seconds' if self._in_seconds else minutes} since the first probe"
        ends = [self.utc + x * SECOND for x in (0, self.high)]
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
    sections: list[Section]


def draw(
    courses: list[tuple[str, Course]], utc: bool, heading: str, notes: list[str], args: argparse.Namespace
) -> Picture:
    """Draw courses, each with its host (empty if there is only one). utc: their times count from 1970."""
    zero = min((course.first for _, course in courses), default=0)
    last = max((course.last for _, course in courses), default=0)
    scale = TimeScale((last - zero) / SECOND, zero if utc and courses else None)
    sections = [make_section(course, host, zero, args.hop) for host, course in courses]
    if sections and not any(section.hops for section in sections):
        known = ", ".join(map(str, sorted({hop for _, course in courses for hop in course.hops})))
        raise Failure(f"argument --hop: no probe went to hop {args.hop[0]}, but to {known}")
    sections = [section for section in sections if section.hops]
    if args.cdf:
        return Picture(draw_cdf(sections, args), [], scale, sections)
    return Picture(*draw_figure(sections, scale, heading, notes, args.ylim), scale, sections)


def draw_cdf(sections: list[Section], args: argparse.Namespace) -> Any:
    """Draw how the latencies are distributed, a curve for each hop. Axes are in the size of a paper's column."""
    start_figure()
    height = 2.3
    figure = Figure(figsize=(3.5, height * max(len(sections), 1)), dpi=300, facecolor="white")
    figure.subplots_adjust(left=0.15, right=0.94, bottom=0.42 / len(sections or "1") / height, top=1 - 0.1 / height,
                           hspace=0.45)  # fmt: skip
    for number, section in enumerate(sections):
        axes = figure.add_subplot(len(sections), 1, number + 1)
        colours = colours_of(section)
        for hop in section.hops:
            its = [line.values for line in section.lines if line.hop == hop]
            if its:
                values, counts = (np.concatenate(each) for each in zip(*its))
                order = np.argsort(values, kind="stable")
                share = np.cumsum(counts[order]) / counts.sum()
                axes.step(np.append(in_ms(values[order][:1]), in_ms(values[order])), np.append(0, share),
                          where="post", color=colours[hop], linewidth=1, label=f"hop {hop}")  # fmt: skip
        if section.slowest > section.fastest * LOG_FROM and not args.xlim:
            axes.set_xscale("log")
        axes.set_xlim(*(args.xlim or ()))
        axes.set_ylim(*(args.ylim or (0, 1)))
        axes.set_xlabel("latency, there and back (ms)" + f", {plain(section.course.name)}" * (len(sections) > 1))
        axes.set_ylabel("share of answers")
        axes.grid(True, color="#dddddd", linewidth=0.5)
        if section.lines:
            axes.legend(fontsize=6, loc="lower right", ncol=1 + len(section.hops) // 10)
    return figure


def start_figure() -> None:
    """Forget the user's settings: places and colours here depend on each other."""
    matplotlib.rcdefaults()
    matplotlib.rcParams.update(RC)


def draw_figure(
    sections: list[Section], scale: TimeScale, heading: str, notes: list[str], ylim: tuple[float, float] | None
) -> tuple[Any, list[Panels]]:
    start_figure()
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
        panels.append(draw_section(figure, section, scale, y + 0.32, height, ylim))
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
    figure: Any,
    section: Section,
    scale: TimeScale,
    top: float,
    heights: tuple[float, float, float],
    ylim: tuple[float, float] | None,
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
    if ylim and section.lines:
        panels.time.set_ylim(*ylim)
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


def with_gaps(section: Section, bins: Bins) -> list[Any]:
    """Return times (s) and quartiles (ms): low, median, high. Where several bins have no answer there is a NaN, so
    that no line leads across."""
    apart = np.diff(bins.number, prepend=bins.number[0])
    wide = np.flatnonzero(apart > max(3, 5 * np.median(apart)))
    figures = section.seconds(bins.t), in_ms(bins.low), in_ms(bins.median), in_ms(bins.high)
    return [np.insert(values, wide, np.nan) for values in figures]


def draw_latency(axes: Any, section: Section, colours: dict[int, Any]) -> None:
    axes.set_ylabel("latency, there and back")
    if not section.lines:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no probe was answered", transform=axes.transAxes, ha="center", color="#444444")
        return
    scale_latency(axes, section)
    for line in section.lines:
        colour, many = colours[line.hop], len(line.points[0]) > 100
        axes.plot(section.seconds(line.points[0]), in_ms(line.points[1]), linestyle="", marker=".",
                  markersize=3 if many else 6, markeredgewidth=0, color=colour, alpha=0.5 if many else 0.8,
                  zorder=2, rasterized=many)  # fmt: skip
        times, low, median, high = with_gaps(section, line.bins)
        axes.fill_between(times, low, high, color=colour, alpha=0.25, linewidth=0, zorder=3)
        axes.plot(times, median, color=colour, linestyle=STYLES[line.rank], linewidth=1.3, zorder=4,
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
        low, lower, median, upper, high = in_ms(np.array(line.spread))
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
    times, low, median, high = with_gaps(section, section.srtt)
    axes.fill_between(times, low, high, color=FLOW_COLOUR, alpha=0.15, linewidth=0)
    axes.plot(times, median, color=FLOW_COLOUR, linewidth=1.1, label="srtt", marker="." if len(times) == 1 else "")
    axes.set_ylim(0, max(np.nanmax(high) * 1.15, 1e-3))
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


# ---- The run --------------------------------------------------------------------------------------


def choose(results: Sequence[Results], by: str, chosen: list[str]) -> tuple[list[tuple[str, Course]], list[str]]:
    """Return the courses to draw, each with its host, and a note about the others. Raises Failure."""
    drawn, notes = busiest(results, by, chosen, CHOSEN_MAX * len(results) if chosen else SECTIONS_MAX)
    return [(host, each.courses[dest]) for each, dest, host in drawn], notes


def busiest(
    results: Sequence[Results], by: str, chosen: list[str], most: int
) -> tuple[list[tuple[Results, str, str]], list[str]]:
    """Return results, destination and host (empty if there is only one) of so many courses, and a note about the
    others. Raises Failure."""
    counts: collections.Counter[str] = collections.Counter()
    for each in results:
        counts.update(each.counts)
    names = sorted(counts, key=lambda dest: (-counts[dest], dest))
    if by != "dest":
        chosen = []
    for dest in chosen:
        if dest not in counts:
            known = ", ".join(names[:5]) + (f" and {len(names) - 5} others" if len(names) > 5 else "")
            raise Failure(f"argument --dest: no probe went to {dest}, but to {known or 'nobody'}")
    there = [(each, dest) for dest in chosen or names for each in results if each.counts[dest]]
    drawn = [(each, dest) for each, dest in there if dest in each.courses][:most]
    others = list(dict.fromkeys(dest for each, dest in there if (each, dest) not in drawn))
    named = ", ".join(others[:4]) + (" ..." if len(others) > 4 else "")
    more = " (--dest draws them)" if by == "dest" else ""
    notes = (
        [f"not drawn{more}: {len(others)} {KEYS[by]} with fewer probes: {named}"] if others and not chosen else []
    )
    has_hosts = len(results) > 1
    return [(each, dest, each.source.host * has_hosts) for each, dest in drawn], notes


def write(path: str, content: bytes) -> None:
    """Write a file in the place of what has its name. Never through a link: others may write to the folder.
    Raises Failure."""
    file = OutputFile(path, "-o/--filebase")
    try:
        file.overwrite(content)
    finally:
        file.close()


def say(lines: list[str]) -> None:
    """Print lines on standard output. Raises Failure."""
    unwritten = print_lines(lines)
    if unwritten:
        raise Failure(f"cannot write the table: {unwritten}")


class Progress:
    """Shows on a terminal how much of the files has been read. total: bytes."""

    def __init__(self, total: int) -> None:
        self._total, self._done = max(total, 1), 0
        self._next = time.monotonic() + PROGRESS_FROM
        self._is_shown = False

    def tell(self, size: int) -> None:
        self._done += size
        if time.monotonic() >= self._next and sys.stderr.isatty():
            print(f"\rreading: {self._done / self._total:4.0%}", end="", file=sys.stderr, flush=True)
            self._next, self._is_shown = time.monotonic() + PROGRESS_EVERY, True

    def end(self) -> None:
        if self._is_shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def read_all(args: argparse.Namespace) -> tuple[list[Results], bool, list[str]]:
    """Return the results of each source, whether their times are UTC, and notes for the user. Raises Failure."""
    sources, notes = sources_of(args.csv, args.compare)
    in_utc = not args.compare and all(source.is_utc for source in sources)
    if len(sources) > 1 and not (in_utc or args.compare):
        notes.append("times are seconds since each host's first probe")
    progress = Progress(sum(source.size for source in sources))
    begin, end = span_of(sources, in_utc)
    first = args.begin.place(begin, in_utc, "--from") if args.begin else -FOREVER
    last = args.end.place(begin, in_utc, "--to") if args.end else FOREVER
    if args.last:
        first = end - round(args.last * SECOND)
    try:
        window = Window(first, last, args.dest, args.by)
        most = max(PAGE_MAX // len(sources), LARGE_MAX) if args.html or args.compare else LARGE_MAX
        found = [read(source, in_utc, window, most, progress.tell, args.html) for source in sources]
        return found, in_utc, notes
    finally:
        progress.end()


def tables(results: Sequence[Results], none: str) -> list[str]:
    """Return the summaries that elfprobe.py makes of these rows: the lines of a table for each destination.

    none: what to say without a row.
    """
    lines = []
    for each in results:
        heading = [f"from {printable(each.source.host) or 'another host'}:"] if len(results) > 1 else []
        lines += [*heading, *(each.summary.tables()[1:] or [none]), ""]
    return lines


def run(args: argparse.Namespace) -> None:
    """Print the table, and make the picture and the page. Raises Failure."""
    results, in_utc, said = read_all(args)
    names = [*map(os.path.basename, args.csv)]
    if len(set(names)) < len(names):
        names = args.csv
    heading = " and ".join(names[:2]) + " and others" * (len(names) > 2)
    if args.compare:
        for each, name in zip(results, names):
            each.source.host = name
    courses, notes = choose(results, args.by, args.dest)
    notes += said
    none = "no probes in this time" if args.begin or args.end or args.last else "no probes yet"
    compared = comparison(results[0], results[1], args.by, args.dest) if args.compare else None
    table = [*compared.lines(), ""] if compared else tables(results, none)
    picture = draw(courses, in_utc, heading, notes, args)
    say(table + notes)
    write(f"{args.filebase}.{args.format}", picture_bytes(picture, args.format))
    say([f"picture: {printable(args.filebase)}.{args.format}"])
    if args.html:
        shown, notes = busiest(results, args.by, args.dest, PAGE_MAX)
        notes += [*said, *(compared.notes if compared else [])]
        changed = compared.for_page() if compared else []
        kinds = KEYS[args.by]
        text = page(heading, notes, shown, kinds, in_utc, args.hop, args.ylim, changed)
        write(args.filebase + ".html", text.encode())
        say([f"page: {printable(args.filebase)}.html"])


def picture_bytes(picture: Picture, kind: str) -> bytes:
    """Return the picture as a file of one of FORMATS."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # characters that no font has
        picture.figure.savefig(file, format=kind)
    return file.getvalue()


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
