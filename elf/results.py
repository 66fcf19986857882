# SPDX-License-Identifier: GPL-3.0-only
"""Turn ended probes into rows, the summary and findings. Log events of flows. Save the hooks' maps."""

from __future__ import annotations

import itertools
import json
import logging
import socket
import struct
import time
from typing import Any, Callable, Iterator, Protocol

from elf.addresses import address_text, flow_text, pack_address
from elf.extensions import MalformedExtension, extension_texts
from elf.files import OutputFile, log_renamed
from elf.findings import NUMBER_TRANSLATED, PathRewrites
from elf.live import FlowEvent, LiveView
from elf.loop import Stop
from elf.pcapng import PacketFile
from elf.ring import HEADER, Events, framed, framed_size
from elf.rows import Record, RowMaker
from elf.summary import FlowKey, Summary
from elf.unmatched import Sent, Unmatched, UnmatchedAnswers
from elf.usage import Failure

UNANSWERED_AFTER = 5.0  # s that a probe may be outstanding
PROBE_KEY = struct.Struct("=16sHHII")  # struct probe_key: destination, ports, protocol, ident
FLOW_KEY_BYTES = 20  # at its start: destination and ports
UNMATCHED = 0xFFFF  # as in elfprobe.c
UNMATCHED_AT_ONCE = 128  # answers that user space takes between two calls of match_late()
RESULT_PERF_PAGES = 512  # of each CPU's perf buffer, if there is no ring
FLOW_EVENT_TEXTS = {
    FlowEvent.STALLED: "{flow}: nothing is acknowledged or received any more",
    FlowEvent.RESUMED: "{flow}: moves again",
    FlowEvent.EXCLUDED:
        "{dest}: flows stall if they are probed, {flow} last: a firewall may take a low TTL for an attack: "
        "destination excluded for the rest of this run; open connections anew",
    FlowEvent.INTERCEPTED:
        "{dest}: a filter in front of ours took the copy of a packet, or let it out whole: destination "
        "excluded for the rest of this run",
    FlowEvent.ARRIVED:
        "{dest}: a probe reached it and was answered: a router on the way raises the TTL, or the path is shorter "
        "than it seemed: probes stop before it from now on",
}  # fmt: skip

log = logging.getLogger("elfprobe")


class Kernel(Protocol):
    """The part of Kernel in elfprobe.py that this module uses."""

    @property
    def outstanding(self) -> tuple[str, list[str]]:
        """Return the struct format and the field names of a probe in flight with its key."""

    def layout(self, name: str) -> Any:
        """Return the layout of a struct of elfprobe.c."""

    def on_events(self, name: str, take: Callable[[Events], object], pages: int = ...) -> None:
        """Call a function with the events of a ring buffer, inside take_events()."""

    def take_events(self) -> None:
        """Handle the events that are there."""

    def let_report(self, unmatched: int) -> None:
        """Let elfprobe.c report this many answers that quote no probe, from now on."""

    def in_flight_of(self, flows: set[bytes]) -> Iterator[tuple[bytes, bytes]]:
        """Yield the key and the value of probes in flight. flows are beginnings of keys: destination and ports."""

    def set_seq_offset(self, flow: bytes, offset: int) -> None:
        """Let elfprobe.c subtract an offset from quoted TCP sequence numbers of a flow that fit no probe."""

    def take_probe(self, key: bytes) -> bool:
        """Remove a probe in flight. Return whether it was there: whoever removes a probe owns it."""

    def take_expired(self, sent_before: int) -> Iterator[list[bytes]]:
        """Remove the probes in flight that left before a time (CLOCK_MONOTONIC, ns), and yield lists of them.

        Each probe is the bytes of struct probe and of its key.
        """

    def hook_maps(self) -> list[str]:
        """Return the names of the maps that the hooks file defines."""

    def map(self, name: str) -> Any:
        """Return a map."""


class Results:
    """Turns ended probes from the kernel's maps into rows of text, the summary and the findings."""

    def __init__(self, kernel: Kernel, summary: Summary) -> None:
        self._kernel = kernel
        self.packets: PacketFile | None = None  # to which probes and answers are added
        self.rewrites = PathRewrites()
        self.unmatched = UnmatchedAnswers(summary)
        self.rewrites.unmatched = self.unmatched.findings
        self.summary = summary
        self.replies = 0
        self.matched_late = 0  # of them: the programs did not match these answers
        self.unanswered = 0
        self.malformed = 0  # number of replies with a malformed extension
        extended = kernel.layout("result")  # a struct result, then an extension
        result = extended.member("result")
        self._result, self._extended = struct.Struct(result.format), struct.Struct(extended.format)
        outstanding, self.outstanding_names = kernel.outstanding
        self._outstanding = struct.Struct(outstanding)
        self.names = result.names
        self._answered_rows = RowMaker(framed(result.format), self.names, self._noter_of_answers)
        self._unanswered_rows = RowMaker(outstanding, self.outstanding_names, self._noter)
        self._events: list[Events] = []
        kernel.on_events("results", self._events.append, RESULT_PERF_PAGES)

    def _noter_of_answers(self, probe: Record) -> Callable[..., None]:
        """Return the function that notes answered probes like this one, by their NOTED fields."""
        note = self._noter(probe)
        if not probe.translated and probe.intos == probe.outtos:
            return note

        def note_changed(sendtime: int, *others: Any) -> None:
            self.rewrites.note(probe._replace(sendtime=sendtime))
            note(sendtime, *others)

        return note_changed

    def _noter(self, probe: Record) -> Callable[..., None]:
        """Return the function by which the summary notes probes like this one."""
        forgotten = self.summary.forgotten
        note = self.summary.place(probe).note
        if self.summary.forgotten != forgotten:
            self._answered_rows.forget_noters()
            self._unanswered_rows.forget_noters()
        return note

    def take(self) -> str:
        """Return the rows of all replies that came since the last call."""
        self._kernel.take_events()
        rows: list[str] = []
        for events in self._events:
            if events.size < self._extended.size:
                rows += self._answered_rows.rows(events.data)
            else:
                rows += itertools.chain.from_iterable(map(self._extended_row, events.frames()))
            if self.packets:
                self._add_packets(self.packets, events)
        self._events.clear()
        self.replies += len(rows)
        return "".join(rows)

    def _add_packets(self, packets: PacketFile, events: Events) -> None:
        for data in events.each():
            if events.size < self._extended.size:
                packets.add_answered(self._result.unpack_from(data), b"")
            else:
                *fields, length, extension = self._extended.unpack_from(data)
                if length != UNMATCHED:
                    packets.add_answered(fields, extension[:length])

    def _extended_row(self, frame: bytes) -> list[str]:
        """Return the row of a reply with an extension.

        An answer that quotes no probe has no row. It is kept for match_late().
        """
        *fields, length, extension = self._extended.unpack_from(frame, HEADER.size)
        if length == UNMATCHED:
            its = dict(zip(self.names, fields))
            flow = address_text(its["dest"]), *map(socket.ntohs, (its["sport"], its["dport"])), its["protocol"]
            raw = frame[HEADER.size :][: self._result.size]
            responder = address_text(its["responder"])
            answer = Unmatched(its["ident"], its["inipid"], its["qlen"], its["recvtime"], responder, raw)
            self.unmatched.note(flow, answer)
            return []
        try:
            texts = extension_texts(extension[:length], is_cut=length == len(extension))
        except MalformedExtension:
            self.malformed += 1
            texts = "", ""
        return self._answered_rows.rows(frame[: framed_size(self._result.size)], *texts)

    def match_late(self) -> str:
        """Return the rows of answers whose changed sequence numbers can be explained now.

        elfprobe.c matches later answers of these flows. It may report UNMATCHED_AT_ONCE more that it cannot match.
        """
        self._kernel.let_report(UNMATCHED_AT_ONCE)
        keys = {
            flow: PROBE_KEY.pack(pack_address(flow[0]), *map(socket.htons, flow[1:3]), flow[3], 0)
            for flow in self.unmatched.flows()
        }
        if not keys:
            return ""
        flow_of = {key[:FLOW_KEY_BYTES]: flow for flow, key in keys.items()}
        probes: dict[FlowKey, dict[int, Sent]] = {flow: {} for flow in keys}
        for key, probe in self._kernel.in_flight_of(set(flow_of)):
            its = dict(zip(self.outstanding_names, self._outstanding.unpack(probe + key)))
            sent = Sent(its["ident"], its["origseq"], its["outipid"], its["sendtime"], its["outttl"], key, probe)
            probes[flow_of[key[:FLOW_KEY_BYTES]]][sent.number] = sent
        rows = []
        for flow, of_flow in probes.items():
            if not of_flow:
                self.unmatched.drop(flow)
                continue
            for sent, offset, answer in self.unmatched.match(flow, of_flow):
                self._kernel.set_seq_offset(keys[flow], offset)
                if self._kernel.take_probe(sent.key):
                    rows += self._late_row(sent, offset, answer)
        self.unmatched.forget(time.monotonic_ns() - int(UNANSWERED_AFTER * 1e9))
        self.replies += len(rows)
        self.matched_late += len(rows)
        return "".join(rows)

    def _late_row(self, sent: Sent, offset: int, answer: Unmatched) -> list[str]:
        """Return the row of an answer that the programs did not match."""
        end = len(answer.result) - len(sent.key)  # behind translated, 4 bytes
        (translated,) = struct.unpack_from("=I", answer.result, end - 4)
        reply = answer.result[len(sent.probe) : end - 4]
        result = sent.probe + reply + struct.pack("=I", translated | NUMBER_TRANSLATED) + sent.key  # struct result
        if self.packets:
            its = {**dict(zip(self.names, self._result.unpack(result))), "seq_offset": offset}
            self.packets.add_answered(tuple(its.values()), b"")
        frame = HEADER.pack(len(result), 0) + result
        return self._answered_rows.rows(frame.ljust(framed_size(len(result)), b"\0"))

    def expire(self, sent_before: int) -> Iterator[str]:
        """Yield rows, in portions, of probes in flight that left before this time (CLOCK_MONOTONIC, ns)."""
        for probes in self._kernel.take_expired(sent_before):
            if self.packets:
                for probe in probes:
                    self.packets.add_unanswered(self._outstanding.unpack(probe))
            rows = self._unanswered_rows.rows(b"".join(probes))
            self.unanswered += len(rows)
            yield "".join(rows)


def log_flow_events(kernel: Kernel, view: LiveView) -> None:
    """Log what the kernel finds out about flows and destinations, as it comes. The live view shows it, too."""
    layout = kernel.layout("flow_event")

    def tell(events: Events) -> None:
        for event in map(layout.read, events.each()):
            flow = event.flow
            key = address_text(bytes(flow.dest)), socket.ntohs(flow.sport), socket.ntohs(flow.dport), flow.protocol
            log.warning("%s", FLOW_EVENT_TEXTS[event.kind].format(flow=flow_text(*key), dest=key[0]))
            view.note(event.kind, key)

    kernel.on_events("flow_events", tell)


def save_maps(kernel: Kernel, filebase: str, stop: Stop) -> None:
    """Write the entries of each map of the hooks file to FILEBASE.MAP.json, per-CPU maps with a value for each CPU.

    Write no more once a stop is asked for again. A map that cannot be read is logged. Raises Failure if a file
    cannot be written.
    """
    asked = stop.asked
    for name in kernel.hook_maps():
        try:
            lines = map_lines(kernel, name, lambda: stop.asked > asked)
        except Failure as failure:
            log.warning("the hooks' map '%s' is not saved: %s", name, failure)
            continue
        file = OutputFile(f"{filebase}.{name}.json")
        try:
            file.write_lines(f'{{"map": "{name}", "entries": [\n' + ",\n".join(lines) + "\n]}\n")
            renamed = file.publish()
        finally:
            file.close()
        log_renamed(file.path, renamed)
        log.info("the hooks' map '%s' is in %s", name, file.path)


def map_lines(kernel: Kernel, name: str, is_stopped: Callable[[], bool]) -> list[str]:
    """Return a map's entries as JSON. Raises Failure if they cannot be read, or when told to stop."""
    table = kernel.map(name)
    log.debug("the hooks' map '%s' has room for %d entries", name, table.max_entries)
    lines = []
    for entry in table.plain_items():
        lines.append(json.dumps(entry))
        if is_stopped():
            raise Failure("told to stop")
    return lines
