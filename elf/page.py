# SPDX-License-Identifier: GPL-3.0-only
"""The page of elfplot.py --html: one file that needs no other, and that the browser draws (page.js, page.css).

It has counts of latencies by line, bin and value. The browser makes the figures of them, for the time that is
shown. If they take too much room, bins become wider and latencies are rounded more; the page says how exact it is.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
from typing import Any, Iterator, NamedTuple, Sequence

import numpy as np

from elf.addresses import PROTOCOLS
from elf.course import SECOND, STEP, Course
from elf.findings import findings_on, sentence
from elf.paths import Destination
from elf.sources import Results
from elf.usage import printable

SIZE_MAX = 3_000_000  # bytes of a page
SECTIONS_MAX = 200  # destinations of a page
COMPARED_MAX = SIZE_MAX // 5  # bytes of the tables of a comparison
FLOWS_SHOWN = 7  # of a destination; the others are one line
FINDINGS_MAX, TEXT_MAX, HEADING_MAX = 100, 80, 300  # of a destination; characters of a name, of a heading
# How often the picture's bins are joined in pairs, and to how many steps of 2 % latencies are rounded. A section
# uses the first with which it fits.
LEVELS = (0, 1), (1, 1), (1, 2), (2, 2), (3, 2), (4, 4), (6, 8), (10, 16)
STEP_BITS = 11  # of a key: the bin's number is above
MARGIN = 0.012  # of the time, before and behind

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{heading}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'sha256-{style_digest}'; script-src 'sha256-{script_digest}'">
<style>{style}</style></head><body>
<h1>{heading}</h1>
<noscript><p>This page needs JavaScript: the browser draws it. elfplot.py also prints the tables.</p></noscript>
<main></main>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body></html>
"""


class Series(NamedTuple):
    """Counts by bin (from the section's first on) and latency (ns). The names of kinds are those of page.js."""

    kind: str
    hop: int  # 0: of a flow
    name: str
    rank: int
    bins: Any
    latencies: Any
    counts: Any


def text_of(name: str) -> str:
    name = printable(name)
    return name if len(name) <= TEXT_MAX else name[: TEXT_MAX - 1] + "…"


def series_of(course: Course, hops: Sequence[int]) -> Iterator[Series]:
    """Yield all that is counted of a destination. hops: only of these; none: of all."""
    first, _, unanswered, _ = course.by_bin()
    for hop, rank, name, numbers in course.ranked():
        if not hops or hop in hops:
            bins, latencies, counts = course.answers(numbers)
            yield Series("answers", hop, text_of(name), rank, bins - first, latencies, counts)
    for hop, row in zip(course.hops, unanswered):
        if row.any() and (not hops or hop in hops):
            bins = np.flatnonzero(row)
            yield Series("unanswered", hop, "", 0, bins, np.ones_like(bins), row[bins])
    for rank, (key, (bins, latencies, counts), retrans) in enumerate(course.flows(FLOWS_SHOWN)):
        name = "other flows"
        if key:
            _, sport, dport, protocol = key
            name = f"{PROTOCOLS.get(protocol, protocol)} {sport} to {dport}"
        yield Series("srtt", 0, name, rank, bins - first, latencies, counts)
        bins = np.flatnonzero(retrans)
        yield Series("retransmitted", 0, name, rank, bins, np.ones_like(bins), retrans[bins])


def varints(values: Any) -> bytes:
    """Return whole numbers as LEB128: seven bits in each byte, the lowest first."""
    values = values.astype(np.uint64)
    sizes = np.ones(len(values), np.int64)
    for bits in range(7, 64, 7):
        sizes += values >= np.uint64(1 << bits)
    ends = np.cumsum(sizes)
    found = np.empty(int(ends[-1]) if len(ends) else 0, np.uint8)
    for number in range(int(sizes.max(initial=0))):
        has = sizes > number
        low = values[has] >> np.uint64(7 * number) & np.uint64(127)
        found[(ends - sizes)[has] + number] = low + np.uint64(128) * (sizes[has] > number + 1)
    return bytes(found)


def packed(series: Sequence[Series], folds: int, steps: int) -> str:
    """Return the counts for page.js: varints in Base64.

    Each series begins with its number of counts. A count is two numbers: its key less the key before, and itself.
    """
    parts = []
    for each in series:
        rounded = np.rint(np.log(np.maximum(each.latencies, 1)) / (steps * STEP)).astype(np.int64)
        keys, which = np.unique((each.bins >> folds) << STEP_BITS | rounded, return_inverse=True)
        counts = np.bincount(which.ravel(), each.counts, len(keys)).astype(np.int64)
        pairs = np.stack([np.diff(keys, prepend=0), counts], axis=1).ravel()
        parts.append(np.concatenate([[len(keys)], pairs]))
    return base64.b64encode(varints(np.concatenate(parts)) if parts else b"").decode()


def figures_of(destination: Destination | None, hops: Sequence[int]) -> list[list[Any]]:
    """Return the figures of the whole time by hop, as in the printed table: probes, answered, latencies in ms."""
    return [
        [number, hop.probes, hop.latency.count,
         *(round(ns / 1e6, 3) for ns in (hop.latency.stats() if hop.latency.count else ()))]
        for number, hop in sorted(destination.hops.items() if destination else ())
        if not hops or number in hops
    ]  # fmt: skip


def spans_of(results: Results, destination: Destination | None, in_utc: bool, zero: int) -> list[list[Any]]:
    """Return the findings: hop, from, until (s since zero; None: the whole time), sentence."""
    found = []
    for finding in findings_on(destination) if destination and results.summary.has_paths else ():
        span = finding.span()
        ends: list[float | None] = [None, None]
        if span:
            times = results.source.times(results.source.files[0][1], np.array(span), in_utc)
            ends = ((times - zero) / SECOND).round(3).tolist()
        found.append([finding.hop, *ends, printable(sentence(finding, results.summary.when))])
    return found


def as_json(value: object) -> str:
    """Return the JSON with <, > and & escaped, so that a browser finds no tag in texts of the CSV."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def section(
    results: Results,
    dest: str,
    host: str,
    destination: Destination | None,
    in_utc: bool,
    zero: int,
    hops: Sequence[int],
    room: int,
) -> str:
    """Return the JSON of a destination, as exact as there is room (bytes); without figures if there is too little.

    destination: what the summary knows, None if it has forgotten it.
    """
    course = results.courses[dest]
    apps = [text_of(app) for app, _ in course.apps.most_common(4)]
    about = [", ".join(apps[:3]) + (" and others" if len(apps) > 3 else ""), course.flow_text()]
    findings = spans_of(results, destination, in_utc, zero)
    start = (course.start + course.by_bin()[0] * course.width - zero) / SECOND
    series = list(series_of(course, hops))
    content = {
        "dest": text_of(dest),
        "host": text_of(host),
        "about": " · ".join(filter(None, about)),
        "start": start,
        "hops": figures_of(destination, hops),
        "findings": findings[:FINDINGS_MAX],
        "more": len(findings[FINDINGS_MAX:]),
        "series": [each[:4] for each in series],
    }
    levels = [
        *((folds, 1) for folds in range(course.folds)),
        *((course.folds + more, steps) for more, steps in LEVELS),
    ]
    for folds, steps in levels:
        content["width"] = (course.width << folds) / SECOND
        content["step"], content["percent"] = steps * STEP, steps + (steps > 1)
        content["data"] = packed(series, folds, steps)
        text = as_json(content)
        if len(text) <= room:
            return text
    return as_json(dict(content, data="", series=[], hops=[], findings=[], more=len(findings)))


def page(
    heading: str,
    notes: Sequence[str],
    shown: Sequence[tuple[Results, str, str]],
    kinds: str,
    in_utc: bool,
    hops: Sequence[int] = (),
    ylim: tuple[float, float] | None = None,
    compared: Sequence[dict[str, Any]] = (),
) -> str:
    """Return the page. It tells the browser to load nothing, and to run nothing but page.js.

    shown: results, destination and host of each section, the busiest first. kinds: what the sections are of, a
    value of elf.sources.KEYS. compared: tables, each with caption, head and rows.
    """
    shown = [item for item in shown if not hops or set(hops) & set(item[0].courses[item[1]].hops)]
    courses = [each.courses[dest] for each, dest, _ in shown]
    zero = min((course.first for course in courses), default=0)
    span = (max((course.last for course in courses), default=0) - zero) / SECOND
    margin = span * MARGIN or 0.5
    style, script = (read_beside(name) for name in ("page.css", "page.js"))
    tables, room = [], COMPARED_MAX
    for table in compared:
        text = as_json(table)
        room -= len(text)
        if room > 0:
            tables.append(text)
    if len(tables) < len(compared):
        notes = [*notes, f"tables of {len(compared) - len(tables)} more destinations are printed only"]
    common = as_json({
        "utc": zero / 1e6 if in_utc and courses else None,
        "x": [-margin, span + margin],
        "ylim": ylim,
        "kinds": kinds,
        "notes": [printable(note)[:HEADING_MAX] for note in notes],
    })  # fmt: skip
    room = SIZE_MAX - sum(map(len, [style, script, common, *tables])) - len(PAGE) - 20 * HEADING_MAX
    known = {id(each): dict(each.summary.destinations()) for each, _, _ in shown}
    made: list[str] = []
    for number, (each, dest, host) in enumerate(reversed(shown)):
        share = room // (len(shown) - number)
        made.append(section(each, dest, host, known[id(each)].get(dest), in_utc, zero, hops, share))
        room -= len(made[-1]) + 1
    data = f'{common[:-1]},"compared":[{",".join(tables)}],"sections":[{",".join(reversed(made))}]}}'
    return PAGE.format(
        heading=html.escape(printable(heading)[:HEADING_MAX]), data=data, style=style, script=script,
        style_digest=digest(style), script_digest=digest(script),
    )  # fmt: skip


def read_beside(name: str) -> str:
    with open(os.path.join(os.path.dirname(os.path.realpath(__file__)), name), encoding="utf-8") as file:
        return file.read()


def digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
