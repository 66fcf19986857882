# SPDX-License-Identifier: GPL-3.0-only
"""FILEBASE.json: the results of a run, as one object. docs/report.md explains the keys.

The object is made in pieces, because for a large run it takes longer than the lease lasts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator  # typing.Iterator takes several times as long in isinstance()
from typing import Any

from elf.clock import Clock, utc_text
from elf.findings import Finding, PathRewrites, findings_on, sentence
from elf.histogram import LatencyHistogram
from elf.paths import Destination, Hop
from elf.processes import ProcessLog
from elf.rows import text_of_field
from elf.summary import Flow, FlowHop, FlowKey, Summary
from elf.ways import Way, ways_to

SCHEMA = 1  # version of the format


class Report:
    """What FILEBASE.json says of a run.

    facts are the keys that stay the same: elfprobe, command, host, kernel, bcc, interfaces.
    """

    def __init__(
        self, facts: dict[str, Any], clock: Clock, summary: Summary, rewrites: PathRewrites, processes: ProcessLog
    ) -> None:
        self._facts = facts
        self._clock = clock
        self._summary = summary
        self._rewrites = rewrites
        self._processes = processes
        self._started = clock.utc(time.monotonic_ns())

    def pieces(self, counters: dict[str, int], files: list[str], has_ended: bool) -> Iterator[str]:
        """Yield the object's text as it is now, in pieces that take little time each."""
        now = self._clock.utc(time.monotonic_ns())
        zeros = [{"since": since, "utc": utc_text(zero)} for since, zero in self._clock.mappings]
        destinations = self._summary.destinations()
        yield from json_pieces({
            "schema": SCHEMA,
            **self._facts,
            "started": utc_text(self._started),
            "ended": utc_text(now) if has_ended else None,
            "monotonic_zero": zeros[0]["utc"],
            "monotonic_zeros": iter(zeros),
            "counters": counters,
            "destinations": self._destinations(destinations),
            "processes": self._all_processes(),  # behind the destinations, whose flows name some of them
            "findings": self._findings(destinations, now),
            "files": files,
        })  # fmt: skip
        yield "\n"

    def _all_processes(self) -> Iterator[dict[str, Any]]:
        for process in self._processes.all():
            times = {key: process[key] and utc_text(process[key]) for key in ("started", "ended")}
            yield {**process, **times}

    def _address(self, address: str) -> dict[str, Any]:
        return {"address": address, "name": self._summary.name_of(address) or None}

    def _destinations(self, destinations: list[tuple[str, Destination]]) -> Iterator[dict[str, Any]]:
        flows = self._summary.flows()
        for dest, destination in destinations:
            hops = sorted(destination.hops.items())
            yield {
                **self._address(dest),
                "probes": destination.probes,
                "answered": sum(hop.latency.count for _, hop in hops),
                "tcp": tcp(destination),
                "hops": (self._hop(destination, *item) for item in hops),
                "ways": [self._way(way) for way in ways_to(destination, reversed(flows.get(dest, [])))],
                "flows": (self._flow(*item) for item in flows.get(dest, [])),
            }

    def _hop(self, destination: Destination, number: int, hop: Hop) -> dict[str, Any]:
        adds = destination.adds(number) if hop.latency.count else None
        return {
            "hop": number,
            "probes": hop.probes,
            "answered": hop.latency.count,
            "latency": statistics(hop.latency),
            "adds": None if adds is None else round(adds),
            "changes": hop.changes,
            "responders": [
                {**self._address(responder), "answered": count} for responder, count in hop.responders.most_common()
            ],
        }

    def _way(self, way: Way) -> dict[str, Any]:
        return {
            "responders": [{"hop": hop, **self._address(responder)} for hop, responder in way.responders.items()],
            "flows": [dict(zip(("sport", "dport", "protocol"), key[1:])) for key in sorted(way.flows)],
            "hop": way.last or None,
            "answered": way.answered,
            "mean": None if way.mean is None else round(way.mean),
        }

    def _flow(self, key: FlowKey, flow: Flow) -> dict[str, Any]:
        _, sport, dport, protocol = key
        app = text_of_field(flow.app)
        if flow.pid:
            self._processes.met(flow.pid, app)
        hops = sorted(flow.updated_hops().items())
        return {
            "source": flow.source or None,
            "sport": sport,
            "dport": dport,
            "protocol": protocol,
            "app": app or None,
            "pid": flow.pid,
            "probes": sum(hop.answered + hop.unanswered for _, hop in hops),
            "hops": [flow_hop(*item) for item in hops],
        }

    def _findings(self, destinations: list[tuple[str, Destination]], now: int) -> Iterator[dict[str, Any]]:
        for dest, destination in destinations:
            for finding in findings_on(destination):
                yield self._finding(dest, finding, now)
        for rewrite in self._rewrites.findings():
            yield self._finding(rewrite.dest, rewrite, now)

    def _finding(self, dest: str, finding: Finding, now: int) -> dict[str, Any]:
        span = finding.span()
        begin, end = (self._clock.utc(at) for at in span) if span else (self._started, now)
        return {
            "kind": finding.kind,
            "destination": dest,
            "hop": finding.hop,
            "from": utc_text(begin),
            "until": utc_text(end),
            "figures": finding.figures(),
            "sure": finding.sure,
            "sentence": sentence(finding, self._summary.when),
        }


def tcp(destination: Destination) -> dict[str, Any] | None:
    """Return what the sockets of TCP flows to a destination measured. None: no round-trip time is known."""
    if not destination.srtt.count:
        return None
    return {
        "srtt": statistics(destination.srtt),
        "retransmitted": destination.retransmitted,
        "retransmitted_before": destination.retransmitted_before,
    }


def flow_hop(number: int, hop: FlowHop) -> dict[str, Any]:
    """Return a hop of a flow."""
    mean = round(hop.total / hop.answered) if hop.answered else None
    return {
        "hop": number,
        "probes": hop.answered + hop.unanswered,
        "answered": hop.answered,
        "latency": {"minimum": hop.minimum, "mean": mean, "maximum": hop.maximum} if hop.answered else None,
        "responder": hop.responder or None,
    }


def statistics(latencies: LatencyHistogram) -> dict[str, int] | None:
    """Return the statistics of a histogram in ns, None if it is empty."""
    if not latencies.count:
        return None
    return {name: round(value) for name, value in latencies.stats()._asdict().items()}


def json_pieces(value: object, indent: str = "") -> Iterator[str]:
    """Yield a value's JSON. An iterator becomes an array with one item in a line; nothing is kept of it."""
    inner = indent + " "
    if isinstance(value, Iterator):
        separator, end = "[\n", "[]"
        for item in value:
            yield separator + inner
            yield from json_pieces(item, inner)
            separator, end = ",\n", f"\n{indent}]"
        yield end
    elif isinstance(value, dict) and any(isinstance(its, Iterator) for its in value.values()):
        separator = "{\n"
        for key, its in value.items():
            yield f"{separator}{inner}{json.dumps(key)}: "
            yield from json_pieces(its, inner)
            separator = ",\n"
        yield f"\n{indent}}}"
    else:
        yield json.dumps(value)
