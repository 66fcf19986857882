# SPDX-License-Identifier: GPL-3.0-only
"""The process that answers scrapers for --metrics. elf/metrics.py starts it, and makes the snapshots.

A scraper that is slow or hostile costs others nothing: each connection has PATIENCE to ask and to take its answer,
a request has at most HEAD_MAX bytes, and a connection beyond CONNECTIONS_MAX closes the oldest one of the address
that has most. However often somebody scrapes, elfprobe makes at most one snapshot in FRESH seconds, and this
process one text of it for each content type.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import ctypes
import itertools
import json
import os
import resource
import signal
import socket
import sys
from typing import Any, Callable, Iterable, Iterator

from elf.usage import why_unusable

PATIENCE = 5.0  # s for a connection, from its first byte to its last
SNAPSHOT_PATIENCE = 3.0  # s to wait for elfprobe
FRESH = 1.0  # s for which a snapshot is good, at least
SHARE = 1 / 50  # of its time that elfprobe takes for snapshots, at most
HEAD_MAX = 8192  # bytes of a request
CONNECTIONS_MAX = 64
CHUNK = 65536  # bytes of an answer that are handed to the kernel at once
NICENESS = 10
NOBODY = 65534
CAPABILITY_VERSION_3 = 0x20080522  # linux/capability.h
PR_SET_NO_NEW_PRIVS = 38  # linux/prctl.h


class Unavailable(Exception):
    """elfprobe gives no snapshot."""


def families(known: dict[str, Any], destinations: list[dict[str, Any]]) -> Iterator[Any]:
    """Yield the metrics of a snapshot. docs/metrics.md explains them."""
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        InfoMetricFamily,
    )

    interface = known["facts"]["interface"]
    of_dest = "interface", "destination"
    of_hop = *of_dest, "hop"
    bounds = [repr(bound / 1e9) for bound in known["buckets"]] + ["+Inf"]
    hops = [(each["destination"], hop) for each in destinations for hop in each["hops"]]
    tcp = [(each["destination"], each["tcp"]) for each in destinations if each["tcp"]]

    def filled(kind: Callable[..., Any], name: str, text: str, labels: Iterable[str], rows: Iterable[Any]) -> Any:
        """Return a family with the rows: label values, but for the interface, and the value behind them."""
        family = kind(name, text, labels=labels)
        for *values, value in rows:
            family.add_metric([interface, *map(str, values)], value)
        return family

    def histogram(name: str, text: str, labels: Iterable[str], rows: Iterable[Any]) -> Any:
        """Return a family with the rows: as above, but behind them counts, and the sum in ns."""
        family = HistogramMetricFamily(name, text, labels=labels, unit="seconds")
        for *values, counts, total in rows:
            buckets = list(zip(bounds, itertools.accumulate(counts)))
            family.add_metric([interface, *map(str, values)], buckets, total / 1e9)
        return family

    yield InfoMetricFamily("elfprobe", "What runs.", known["facts"])
    yield histogram(
        "elfprobe_hop_latency_seconds", "Round-trip time to a responder.", (*of_hop, "responder"),
        ((dest, hop["hop"], *responder) for dest, hop in hops for responder in hop["responders"]),
    )  # fmt: skip
    for key, name, text in (
        ("probes", "elfprobe_probes", "Probes that have ended."),
        ("answered", "elfprobe_probes_answered", "Probes that were answered."),
        ("changes", "elfprobe_responder_changes", "Changes of the responder within a flow."),
    ):
        yield filled(CounterMetricFamily, name, text, of_hop, ((dest, hop["hop"], hop[key]) for dest, hop in hops))
    yield filled(
        InfoMetricFamily, "elfprobe_hop", "The hop before it that answers, 0 if there is none.", of_hop,
        ((each["destination"], *hop) for each in destinations for hop in with_previous(each["hops"])),
    )  # fmt: skip
    yield filled(
        GaugeMetricFamily, "elfprobe_findings", "Findings on the whole run, as below the table.", (*of_hop, "kind"),
        ((each["destination"], *finding) for each in destinations for finding in each["findings"]),
    )  # fmt: skip
    yield histogram(
        "elfprobe_tcp_srtt_seconds", "Smoothed round-trip time of the sockets, read with each probe.", of_dest,
        ((dest, *its["srtt"]) for dest, its in tcp),
    )  # fmt: skip
    yield filled(
        GaugeMetricFamily, "elfprobe_tcp_congestion_window_segments", "Of the socket with the newest probe.",
        of_dest, ((dest, its["cwnd"]) for dest, its in tcp),
    )  # fmt: skip
    yield filled(
        CounterMetricFamily, "elfprobe_tcp_retransmitted_segments", "By flows since their first probe.", of_dest,
        ((dest, its["retransmitted"]) for dest, its in tcp),
    )  # fmt: skip
    for whose, name, text in (
        ("bpf", "elfprobe_bpf_events", "Counters of the BPF programs."),
        ("user", "elfprobe_user_events", "Counters of user space."),
    ):
        yield filled(CounterMetricFamily, name, text, ("interface", "counter"), known["counters"][whose].items())
    series = sum(max(len(hop["responders"]), 1) for _, hop in hops)
    yield GaugeMetricFamily("elfprobe_metrics_series", "Combinations of destination, hop, responder.", series)
    yield GaugeMetricFamily("elfprobe_metrics_series_max", "Their bound.", known["series_max"])
    yield GaugeMetricFamily("elfprobe_metrics_destinations_left_out", "For which no room is.", known["left_out"])
    yield CounterMetricFamily("process_cpu_seconds", "CPU time of elfprobe.", known["cpu_seconds"])
    yield GaugeMetricFamily("process_resident_memory_bytes", "Memory of elfprobe.", known["resident"])


def with_previous(hops: Iterable[dict[str, Any]]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield each hop that has answered, with a label for the one before it."""
    previous = 0
    for hop in hops:
        if hop["answered"]:
            yield hop["hop"], {"previous": str(previous)}
            previous = hop["hop"]


class Snapshot:
    """A registry, as far as prometheus_client's encoders ask for one."""

    def __init__(self, text: bytes) -> None:
        known, *destinations = map(json.loads, text.splitlines())
        self._families = list(families(known, destinations))

    def collect(self) -> list[Any]:
        return self._families


class Source:
    """The newest snapshot, and the texts that were made of it."""

    def __init__(self, parent: socket.socket, memory: int) -> None:
        self._parent = parent
        self._memory = memory
        self._snapshot: Snapshot | None = None
        self._texts: dict[str, bytes] = {}  # by content type
        self._good_until = float("-inf")
        self._asked: asyncio.Future[None] | None = None
        asyncio.get_running_loop().add_reader(parent, self._receive)

    def _receive(self) -> None:
        """Take the snapshot that has come: no bytes if elfprobe could not make one. End if elfprobe has ended."""
        told = self._parent.recv(64).split()
        if not told:
            os._exit(0)
        length, took = int(told[0]), float(told[1])
        asked, self._asked = self._asked, None
        if not length:
            if asked:
                asked.set_exception(Unavailable())
            return
        self._snapshot = Snapshot(os.pread(self._memory, length, 0))
        self._texts.clear()
        self._good_until = asyncio.get_running_loop().time() + max(FRESH, took / SHARE)
        if asked:
            asked.set_result(None)

    async def text(self, accept: str) -> tuple[str, bytes]:
        """Return the content type that a scraper accepts, and the text of now. Raises Unavailable."""
        from prometheus_client.exposition import choose_encoder

        loop = asyncio.get_running_loop()
        if loop.time() > self._good_until:
            if not self._asked:  # elfprobe answers each question once, so the next one waits for that
                self._asked = loop.create_future()
                self._parent.send(b"?")
            try:
                await asyncio.wait_for(asyncio.shield(self._asked), SNAPSHOT_PATIENCE)
            except asyncio.TimeoutError:
                raise Unavailable from None
        encode, kind = choose_encoder(accept)
        if kind not in self._texts:
            self._texts[kind] = encode(self._snapshot)
        return kind, self._texts[kind]


def parse(head: bytes) -> tuple[str, str, str]:
    """Return method, path and what is accepted, of the head of a request. Raises ValueError."""
    first, *lines = head.decode("latin-1").split("\r\n")
    method, target, version = first.split(" ")
    if not version.startswith("HTTP/1."):
        raise ValueError(version)
    fields = (line.partition(":") for line in lines)
    accepted = [value.strip() for name, _, value in fields if name.strip().lower() == "accept"]
    return method, target.partition("?")[0], ",".join(accepted)


async def response(head: bytes, source: Source) -> tuple[bytes, bytes]:
    """Return the head and the body of the response to a request."""
    status, kind, body = "200 OK", "text/plain; charset=utf-8", b""
    method = ""
    try:
        method, path, accept = parse(head)
        if method not in ("GET", "HEAD"):
            status, body = "405 Method Not Allowed", b"only GET and HEAD\n"
        elif path != "/metrics":
            status, body = "404 Not Found", b"the metrics of elfprobe are at /metrics\n"
        else:
            kind, body = await source.text(accept)
    except ValueError:
        status, body = "400 Bad Request", b"that is no request of HTTP/1\n"
    except Unavailable:
        status, body = "503 Service Unavailable", b"elfprobe is busy or stopped\n"
    allow = "Allow: GET, HEAD\r\n" if status.startswith("405") else ""
    content = f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
    start = f"HTTP/1.1 {status}\r\n{content}{allow}Connection: close\r\n\r\n"
    return start.encode(), b"" if method == "HEAD" else body


class Server:
    """Answers each connection, within bounds."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._open: dict[asyncio.StreamWriter, str] = {}  # address of the other end; the oldest first

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer a connection, and close it."""
        if len(self._open) >= CONNECTIONS_MAX:
            self._close_one()
        self._open[writer] = (writer.get_extra_info("peername") or ("",))[0]
        try:
            await asyncio.wait_for(self._answer(reader, writer), PATIENCE)
        except (asyncio.TimeoutError, asyncio.IncompleteReadError, OSError):
            pass
        finally:
            writer.transport.abort()  # nothing, if everything was sent
            self._open.pop(writer, None)

    def _close_one(self) -> None:
        """Close the oldest connection of the address that has most, so that who opens many closes no one else's."""
        counts = collections.Counter(self._open.values())
        oldest = max(self._open, key=lambda writer: counts[self._open[writer]])
        oldest.transport.abort()
        del self._open[oldest]

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head, body = await response(await reader.readuntil(b"\r\n\r\n"), self._source)
        except asyncio.LimitOverrunError:
            head, body = b"HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\n\r\n", b""
        writer.write(head)
        for at in range(0, len(body), CHUNK):
            writer.write(body[at : at + CHUNK])
            await writer.drain()
        writer.close()
        await writer.wait_closed()


def give_up_rights() -> None:
    """Become nobody, without capabilities: whoever takes this process over by a request has nothing.

    Without the right to change users (a container, a service) the user stays. That user's files, such as programs
    that elfprobe keeps for its next start, cannot be written either. Raises OSError if a capability stays.
    """
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    with contextlib.suppress(OSError):
        os.setgroups([])
    with contextlib.suppress(OSError):
        os.setresgid(NOBODY, NOBODY, NOBODY)
    with contextlib.suppress(OSError):
        os.setresuid(NOBODY, NOBODY, NOBODY)
    header, none = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    # If the user is still root, execve(2) would give it all capabilities of the bounding set again.
    one, zero = ctypes.c_ulong(1), ctypes.c_ulong(0)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, one, zero, zero, zero) or libc.capset(header, none):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


async def run(listener: socket.socket, parent: socket.socket, memory: int) -> None:
    """Answer scrapers until elfprobe ends."""
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # there is nobody to read it
    server = Server(Source(parent, memory))
    await asyncio.start_server(server.serve, sock=listener, limit=HEAD_MAX)
    parent.send(b"ready")
    await asyncio.get_running_loop().create_future()


def main(listener: int, parent: int, memory: int) -> None:
    """Serve, with these descriptors: a socket that listens, one to elfprobe, and the memory for snapshots."""
    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:  # it ends with elfprobe
        signal.signal(number, signal.SIG_IGN)
    to_elfprobe = socket.socket(fileno=parent)
    try:
        import prometheus_client.core
        import prometheus_client.exposition  # noqa: F401
    except Exception as error:  # a broken one raises whatever comes up
        to_elfprobe.send(f"missing: {why_unusable('prometheus_client', error)}".encode()[:4000])
        sys.exit(1)
    os.nice(NICENESS)
    try:
        give_up_rights()
    except OSError as error:
        to_elfprobe.send(f"its process cannot give up its rights: {error.strerror}".encode())
        sys.exit(1)
    asyncio.run(run(socket.socket(fileno=listener), to_elfprobe, memory))
