# SPDX-License-Identifier: GPL-3.0-only
"""Metrics for --metrics: the summary as numbers for scrapers, and the process that serves them.

    Metrics     makes snapshots of the summary
    Exporter    the other process, elf/exporter.py, which listens and makes the text

The exporter is no thread: while one makes a long text, it keeps Python's lock for 5 ms between any two of the
kernel's events, whose callbacks need it. It is a process without rights. It asks for a snapshot when somebody
scrapes. elfprobe writes one into shared memory, between two looks at events, and never waits for the exporter.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ipaddress
import itertools
import json
import logging
import os
import re
import resource
import socket
import subprocess
import sys
import time
from typing import Any, Callable, Dict, Iterable, Iterator, Tuple

from elf.findings import Finding, OfDestination, findings_on
from elf.histogram import BUCKETS
from elf.paths import Destination
from elf.processes import OWN_PIDS
from elf.summary import Summary
from elf.usage import Failure, missing_packages

SERIES_DEFAULT = 1000  # of --metrics-series
IDLE = 600  # s without a probe, after which a destination makes room for others
START_PATIENCE = 30.0  # s for the exporter to start
END_PATIENCE = 2.0  # s for it to end by itself; at the highest --metrics-series it may be making a text
BACKLOG = 128  # connections that wait to be accepted
LOOPBACK = "127.0.0.1"
# Python leaves out the user's folder and the working directory (-I); what elfprobe imports from is given instead.
PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from elf.exporter import main; main(*map(int, sys.argv[2:]))"
)

log = logging.getLogger("elfprobe")

Figures = Tuple[Iterable[OfDestination], Dict[str, Dict[str, int]]]  # what Metrics.answer() asks for


def listening_address(text: str) -> tuple[str, int]:
    """Return the address and port of [ADDRESS:]PORT: an argparse type."""
    match = re.fullmatch(r"(?:(\[[^\[\]]+\]|[^:\[\]]+):)?(\d{1,5})", text, re.ASCII)
    address = (match and match[1]) or LOOPBACK
    is_bracketed = address.startswith("[")
    with contextlib.suppress(ValueError):
        version = ipaddress.ip_address(re.sub(r"%[^%\]]+(?=\]$)", "", address).strip("[]")).version
        if match and version == (6 if is_bracketed else 4) and 0 < int(match[2]) < 65536:
            return address.strip("[]"), int(match[2])
    right = "an IPv4 address, or an IPv6 address in brackets, and a port, 1 to 65535"
    raise argparse.ArgumentTypeError(f"'{text}' is not [ADDRESS:]PORT: {right}")


class Metrics:
    """Makes the snapshots, of destinations with at most so many combinations of destination, hop and responder.

    A destination of the last snapshot stays in the next one, with two exceptions: it has been idle for IDLE, or the
    destinations of that snapshot now have too many combinations. The log says once that destinations are left out.
    """

    def __init__(self, exporter: Exporter, facts: dict[str, str], summary: Summary, series_max: int) -> None:
        """facts are labels that say what runs, on which "interface"."""
        self._exporter = exporter
        self._facts = facts
        self._summary = summary
        self._series_max = series_max
        self._chosen: set[str] = set()
        self._is_told = False  # that something is left out
        self._lines: list[str] = []  # of the snapshot that is being made
        self._more: Iterator[str] | None = None  # its further lines; None: none is being made
        self._took = 0.0  # s that it has taken so far

    def answer(self, figures: Callable[[], Figures], seconds: float) -> None:
        """Go on with a snapshot for so long, if the exporter has asked for one. Never waits.

        figures returns the header changes that were found, and counters: those of elfprobe.c ("bpf") and of user
        space ("user").
        """
        if self._more is None and not self._exporter.asks():
            return
        begun = time.monotonic()
        try:
            if self._more is None:
                self._lines, self._more, self._took = [], self.snapshot(*figures()), 0.0
            for line in self._more:
                self._lines.append(line)
                if time.monotonic() > begun + seconds:
                    self._took += time.monotonic() - begun
                    return
            self._more = None
            self._exporter.give("\n".join(self._lines), self._took + time.monotonic() - begun)
        except BaseException:
            self._more = None
            self._exporter.give("", 0.0)  # it asks again only when it has an answer
            raise

    def snapshot(self, rewrites: Iterable[OfDestination], counters: dict[str, dict[str, int]]) -> Iterator[str]:
        """Yield lines of JSON: the figures of the whole run, then those of each destination."""
        ordered = self._choose()
        chosen = [item for item in ordered if item[0] in self._chosen]
        left_out = len(ordered) - len(chosen)
        if left_out and not self._is_told:
            self._is_told = True
            log.warning(
                "metrics: more than %d combinations of destination, hop and responder: destinations are left out "
                "(--metrics-series sets how many); rows and tables have them all",
                self._series_max,
            )  # fmt: skip
        usage = resource.getrusage(resource.RUSAGE_SELF)
        yield json.dumps({
            "facts": self._facts,
            "buckets": BUCKETS,
            "counters": counters,
            "series_max": self._series_max,
            "left_out": left_out,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "resident": resident_bytes(),
        })  # fmt: skip
        rewritten: dict[str, list[OfDestination]] = {}
        for rewrite in rewrites:
            rewritten.setdefault(rewrite.dest, []).append(rewrite)
        for dest, destination in chosen:
            yield json.dumps(figures_of(dest, destination, rewritten.get(dest, [])))

    def _choose(self) -> list[tuple[str, Destination]]:
        """Choose the destinations for which there is room. Return all, those first that are to have room."""
        ordered = self._summary.destinations()
        idle_before = max((destination.last_second for _, destination in ordered), default=0) - IDLE
        ordered.sort(key=lambda item: (item[1].last_second < idle_before, item[0] not in self._chosen))
        self._chosen, room = set(), self._series_max
        for dest, destination in ordered:
            needed = sum(max(len(hop.responders), 1) for hop in destination.hops.values())
            if needed <= room:
                self._chosen.add(dest)
                room -= needed
        return ordered


def figures_of(dest: str, destination: Destination, rewrites: Iterable[Finding]) -> dict[str, Any]:
    """Return a destination as a snapshot has it. A histogram is its counts and its sum."""
    found = collections.Counter(
        (finding.hop, finding.kind) for finding in itertools.chain(findings_on(destination), rewrites)
    )
    has_tcp = destination.tcp_probes > 0
    srtt = destination.srtt.buckets()
    return {
        "destination": dest,
        "hops": [
            {
                "hop": number,
                "probes": hop.probes,
                "answered": hop.latency.count,
                "changes": hop.changes,
                "responders": [(who, its.counts, its.total) for who, its in hop.by_responder().items()],
            }
            for number, hop in sorted(destination.hops.items())
        ],
        "findings": [(hop, kind, count) for (hop, kind), count in found.items()],
        "tcp": {
            "srtt": (srtt.counts, srtt.total),
            "cwnd": destination.cwnd,
            "retransmitted": destination.retransmitted,
        }
        if has_tcp
        else None,
    }


def resident_bytes() -> int:
    """Return how much memory this process has, 0 if that is not known."""
    with contextlib.suppress(OSError), open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
    return 0


def place_text(address: str, port: int) -> str:
    """Return an address and a port as a URL has them."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def listen(address: str, port: int) -> socket.socket:
    """Return a socket that listens there. :: is IPv4, too. Raises Failure."""
    try:
        # Of the forms of an address it knows the index of a device behind a link-local one (%eth0). Bytes, because
        # Python encodes a str as the name of a host, which fails for some names of devices.
        kind, _, _, _, place = socket.getaddrinfo(
            os.fsencode(address), port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
        )[0]
        return socket.create_server(place, family=kind, backlog=BACKLOG, dualstack_ipv6=address == "::")
    except OSError as err:
        why = os.strerror(err.errno) if err.errno and err.errno > 0 else err.strerror  # getaddrinfo's are negative
        raise Failure(f"argument --metrics: cannot listen on {place_text(address, port)}: {why}") from err


class Exporter:
    """The process that serves metrics. It has a socket that listens, and no capabilities."""

    def __init__(self, address: str, port: int) -> None:
        """Listen, and start the process. Raises Failure."""
        self._has_ended = False
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(listen(address, port))
            self.port = listener.getsockname()[1]
            self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.enter_context(theirs)
            self._memory = os.memfd_create("elfprobe-metrics", os.MFD_CLOEXEC)
            fds = listener.fileno(), theirs.fileno(), self._memory
            paths = json.dumps([path for path in sys.path if path])
            self._process = subprocess.Popen(
                [sys.executable, "-IBc", PROGRAM, paths, *map(str, fds)], pass_fds=fds, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            OWN_PIDS.add(self._process.pid)
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise
        log.info("metrics are at http://%s/metrics", place_text(address, self.port))

    def _wait_until_ready(self) -> None:
        self._socket.settimeout(START_PATIENCE)
        try:
            problem = self._socket.recv(4096).decode(errors="replace")
        except OSError as err:
            problem = f"its process does not start ({err.strerror or err})"
        if problem.startswith("missing: "):
            raise missing_packages({"prometheus_client": problem[len("missing: ") :]})
        if problem != "ready":
            raise Failure(f"argument --metrics: {problem or 'its process has ended'}")
        self._socket.setblocking(False)

    def asks(self) -> bool:
        """Return whether the process asks for a snapshot. Log it once if the process has ended."""
        if self._has_ended:
            return False
        try:
            if self._socket.recv(1):
                return True
        except BlockingIOError:
            return False
        except OSError:
            pass
        self._has_ended = True
        log.warning("metrics are not served any more: their process has ended")
        return False

    def give(self, snapshot: str, took: float) -> None:
        """Give the process the snapshot that it has asked for, and tell it how long (s) that took."""
        data = snapshot.encode()
        os.pwrite(self._memory, data, 0)
        with contextlib.suppress(OSError):  # it has ended, which asks() finds out
            self._socket.send(b"%d %f" % (len(data), took))

    def close(self) -> None:
        """End the process: it ends when nobody has the other end of its socket, unless it is stopped."""
        self._socket.close()
        os.close(self._memory)
        try:
            self._process.wait(END_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def exporting(where: tuple[str, int] | None) -> Iterator[Exporter | None]:
    """Serve metrics there inside the block; None: do not. Raises Failure."""
    if not where:
        yield None
        return
    with contextlib.closing(Exporter(*where)) as serving:
        yield serving
