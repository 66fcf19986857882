# SPDX-License-Identifier: GPL-3.0-only
"""The file of -w: probes and their answers as packets, so that others' tools can check the rows.

It has what elfprobe records of a probe, and no more: headers, and what the answer quotes. Nothing is captured.
NOTE below, which the file contains, says which header fields are recorded. docs/packets.md has the same for users.

The format is pcapng (draft-ietf-opsawg-pcapng): a section header, one interface, and a block for each packet.
"""

from __future__ import annotations

import functools
import operator
import os
import socket
import stat
import struct
from typing import Any, NamedTuple, Sequence

from elf.addresses import V4_MAPPED, address_text, pack_address
from elf.clock import Clock
from elf.extensions import ones_complement_sum
from elf.files import OutputFile
from elf.usage import Failure, printable

SECTION_HEADER, INTERFACE, ENHANCED_PACKET = 0x0A0D0D0A, 1, 6  # types of blocks
BYTE_ORDER = 0x1A2B3C4D
LINKTYPE_RAW = 101  # packets begin with the IP header
COMMENT, OPERATING_SYSTEM, PROGRAM = 1, 3, 4  # options of a section; all blocks have comments
NAME, TIME_RESOLUTION = 2, 9  # options of an interface
FLAGS, INBOUND, OUTBOUND = 2, 1, 2  # option of a packet, and its values
NANOSECONDS = 9  # 10**-9 s

ICMP, TCP, UDP, ICMPV6 = 1, 6, 17, 58
IPV6_IN_IPV4 = 41
ECHO_REQUEST = {ICMP: 8, ICMPV6: 128}  # types of ICMP
TIME_EXCEEDED = {ICMP: 11, ICMPV6: 3}
TCP_PSH_ACK = 0x18
TCP_WINDOW = 0xFFFF  # nobody knows it; 0 would make Wireshark warn
QUOTED = 8  # bytes of the quoted packet behind its IP header (RFC 792)
PADDED = 128  # bytes of the quoted packet in front of an extension (RFC 4884)

NOTE = (
    "elfprobe made these packets of what it records of its probes; it captured none. Recorded: both times; of "
    "a probe its addresses, protocol, ports, TTL or hop limit, DSCP/ECN, IP identification (IPv6: the low 16 "
    "bits of the flow label), TCP sequence number, UDP length, checksum and 2 bytes of payload if it was "
    "trimmed to these, ICMP echo identifier and sequence number; of an answer its source, TTL or hop limit, "
    "DSCP/ECN, identification, ICMP extension, and of the quoted packet the TTL, DSCP/ECN, identification and "
    "length. All else is reconstructed: an answer goes to the source of the probe, and quotes it; TCP's "
    "flags are ACK and PSH, its window 65535; fields that nobody knows are 0 (TCP acknowledgement number and "
    "checksum; checksum of echo requests; flags of IPv4); there are no options of IP and TCP; a quoted packet "
    "has 8 bytes behind its IP header; other lengths, and the checksums of IPv4 headers and answers, fit this. "
    "Checksums of UDP are as a device completes them; those of guarded probes are wrong on purpose."
)


class Probe(NamedTuple):
    """What is recorded of a probe: fields of struct probe and struct probe_key of elfprobe.c."""

    sendtime: int
    seq: int
    pid: int
    app: bytes
    outipid: int
    outttl: int
    outtos: int
    payload_len: int
    compensation: int
    source: bytes
    dest: bytes
    sport: int
    dport: int
    ident: int
    protocol: int


class Reply(NamedTuple):
    """What is recorded of an answer: fields of struct reply, and seq_offset."""

    recvtime: int
    responder: bytes
    recvttl: int
    inipid: int
    intos: int
    qttl: int
    qlen: int
    rtos: int
    ripid: int
    seq_offset: int = 0


def option(code: int, value: bytes) -> bytes:
    """Return an option of a block."""
    return struct.pack("=HH", code, len(value)) + value + bytes(-len(value) % 4)


def comment(text: str) -> bytes:
    """Return a comment as an option of a block."""
    return option(COMMENT, text.encode(errors="backslashreplace"))


def block(kind: int, content: bytes) -> bytes:
    """Return a block. Its content is padded, and ends with its options."""
    size = struct.pack("=I", len(content) + 16)
    return struct.pack("=I", kind) + size + content + option(0, b"") + size


def beginning(program: str, device: str) -> bytes:
    """Return the blocks in front of all packets."""
    uname = os.uname()
    section = struct.pack("=IHHq", BYTE_ORDER, 1, 0, -1)
    section += option(OPERATING_SYSTEM, f"{uname.sysname} {uname.release}".encode())
    section += option(PROGRAM, program.encode()) + comment(NOTE)
    interface = struct.pack("=HHI", LINKTYPE_RAW, 0, 0)
    interface += option(NAME, device.encode()) + option(TIME_RESOLUTION, bytes((NANOSECONDS,)))
    return block(SECTION_HEADER, section) + block(INTERFACE, interface)


def packet_block(time: int, packet: bytes, size: int, direction: int, text: str) -> bytes:
    """Return the block of a packet. time: ns from 1970. size: bytes that it had on the wire."""
    content = struct.pack("=5I", 0, time >> 32, time & 0xFFFFFFFF, len(packet), size) + packet
    content += bytes(-len(packet) % 4) + option(FLAGS, struct.pack("=I", direction)) + comment(text)
    return block(ENHANCED_PACKET, content)


def is_v4(address: bytes) -> bool:
    return address.startswith(V4_MAPPED)


@functools.lru_cache(maxsize=16384)  # as the texts of addresses
def own_address(dest: bytes) -> bytes:
    """Return the address that this host takes for packets to a destination, without a route the unspecified one."""
    family = socket.AF_INET if is_v4(dest) else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect((address_text(dest), QUOTED))  # any port: nothing is sent
            return pack_address(sock.getsockname()[0])
    except OSError:
        return V4_MAPPED + bytes(4) if family == socket.AF_INET else bytes(16)


def checksum(data: bytes) -> bytes:
    """Return the Internet checksum (RFC 1071)."""
    return struct.pack("!H", 0xFFFF - ones_complement_sum(data))


def ip_header(source: bytes, dest: bytes, tos: int, ident: int, ttl: int, protocol: int, length: int) -> bytes:
    """Return the IP header in front of so many bytes. ident: identification, or the end of the flow label."""
    if not is_v4(dest):
        return struct.pack("!IHBB", 6 << 28 | tos << 20 | ident, length, protocol, ttl) + source + dest
    header = struct.pack("!BBHHHBB", 4 << 4 | 5, tos, 20 + length, ident, 0, ttl, protocol)
    addresses = source[12:] + dest[12:]
    return header + checksum(header + addresses) + addresses


def l4_packet(probe: Probe) -> tuple[bytes, int]:
    """Return what is recorded of a probe behind its IP header, and how many bytes it had there."""
    ports = struct.pack("=HH", probe.sport, probe.dport)  # as in the packet
    if probe.protocol == TCP:
        packet = ports + struct.pack("!IIBBHI", probe.ident, 0, 5 << 4, TCP_PSH_ACK, TCP_WINDOW, 0)
        return packet, len(packet)
    if probe.protocol == UDP:
        packet = ports + struct.pack("!I", probe.ident)
        if probe.payload_len == 2:
            packet += struct.pack("=H", probe.compensation)
        # A guarded probe, which is trimmed, has a length field that says more than there is.
        return packet, len(packet) if probe.payload_len else probe.ident >> 16
    packet = struct.pack("!BBH", ECHO_REQUEST[probe.protocol], 0, 0) + ports[:2] + struct.pack("!H", probe.ident)
    return packet, len(packet) + probe.payload_len


def quote(probe: Probe, reply: Reply, l4: bytes) -> bytes:
    """Return the packet that an answer quotes: its IP header, and QUOTED bytes of those behind it."""
    length = max(reply.qlen - (20 if is_v4(probe.dest) else 40), 0)
    fields = reply.intos, reply.inipid, reply.qttl, probe.protocol, length
    if reply.seq_offset:
        l4 = l4[:4] + struct.pack("!I", (probe.ident + reply.seq_offset) % (1 << 32))
    quoted = ip_header(probe.source, probe.dest, *fields) + l4[:QUOTED]
    if is_v4(reply.responder) and not is_v4(probe.dest):  # the TTL of the IPv4 header around it expired
        outer = own_address(reply.responder), V4_MAPPED + bytes(4)
        return ip_header(*outer, 0, 0, 1, IPV6_IN_IPV4, min(reply.qlen, 0xFFFF - 20)) + quoted
    return quoted


def answer(reply: Reply, dest: bytes, quoted: bytes, extension: bytes) -> bytes:
    """Return the answer, a time exceeded, to an address."""
    length = 0
    if extension:
        quoted, length = quoted.ljust(PADDED, b"\0"), PADDED
    protocol = ICMP if is_v4(reply.responder) else ICMPV6
    lengths = (0, length // 4) if protocol == ICMP else (length // 8, 0)
    rest = struct.pack("!BBH", *lengths, 0) + quoted + extension
    kind = struct.pack("!BB", TIME_EXCEEDED[protocol], 0)
    pseudo = b"" if protocol == ICMP else reply.responder + dest + struct.pack("!II", 4 + len(rest), protocol)
    packet = kind + checksum(pseudo + kind + bytes(2) + rest) + rest
    return ip_header(reply.responder, dest, reply.rtos, reply.ripid, reply.recvttl, protocol, len(packet)) + packet


class PacketFile:
    """A pcapng file. It gets its name by publish(), as all files of a run do."""

    def __init__(
        self, path: str, program: str, device: str, clock: Clock, answered: Sequence[str], unanswered: Sequence[str]
    ) -> None:
        """answered and unanswered are the names of the values that add_answered() and add_unanswered() take.

        Raises Failure.
        """
        if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
            raise Failure(f"argument -w/--write: '{path}' is there, and no regular file")
        self._clock = clock
        self._probe_of_answered = operator.itemgetter(*map(answered.index, Probe._fields))
        self._reply = operator.itemgetter(*map(answered.index, Reply._fields))
        self._probe_of_unanswered = operator.itemgetter(*map(unanswered.index, Probe._fields))
        self._blocks: list[bytes] = []  # that are not written yet
        self._packets = 0
        self.lost = 0  # packets that could not be written
        self.written = 0  # bytes
        self._file = OutputFile(path, "-w/--write")
        try:
            self._file.write_data(beginning(program, device), is_text=False)
        except BaseException:
            self._file.close()
            raise

    @property
    def path(self) -> str:
        return self._file.path

    def publish(self) -> str:
        """As OutputFile.publish()."""
        return self._file.publish()

    def add_answered(self, values: Sequence[Any], extension: bytes) -> None:
        """Add a probe and its answer, with its ICMP extension (RFC 4884) if it has one."""
        probe, reply = Probe(*self._probe_of_answered(values)), Reply(*self._reply(values))
        hop = f"hop {probe.outttl}, latency {(reply.recvtime - probe.sendtime) / 1e6:.6f} ms"
        l4 = self._add(probe, f"{hop}: answered in frame {self._packets + 2}")
        own = probe.source if is_v4(probe.source) == is_v4(reply.responder) else own_address(reply.responder)
        packet = answer(reply, own, quote(probe, reply, l4), extension)
        self._append(reply.recvtime, packet, len(packet), INBOUND, f"{hop}: answers frame {self._packets}")

    def add_unanswered(self, values: Sequence[Any]) -> None:
        """Add a probe without an answer."""
        probe = Probe(*self._probe_of_unanswered(values))
        self._add(probe, f"hop {probe.outttl}, no answer")

    def _add(self, probe: Probe, text: str) -> bytes:
        """Add a probe. Return what is recorded of it behind its IP header."""
        l4, size = l4_packet(probe)
        fields = probe.outtos, probe.outipid, probe.outttl, probe.protocol, size
        header = ip_header(probe.source, probe.dest, *fields)
        row = f"row: seq {probe.seq}, sendtime {probe.sendtime}"
        if probe.pid:
            row += f", app {printable(probe.app.split(bytes(1))[0].decode(errors='replace'))}, pid {probe.pid}"
        self._append(probe.sendtime, header + l4, len(header) + size, OUTBOUND, f"{text}; {row}")
        return l4

    def _append(self, time: int, packet: bytes, size: int, direction: int, text: str) -> None:
        self._packets += 1
        self._blocks.append(packet_block(self._clock.utc(time), packet, size, direction, text))

    def write(self) -> None:
        """Write what was added since the last call, as many whole packets as the disk takes. Raises Failure."""
        blocks, self._blocks = self._blocks, []
        try:
            self._write(b"".join(blocks))
        except Failure:
            for number, each in enumerate(blocks):
                try:
                    self._write(each)
                except Failure:
                    self.lost += len(blocks) - number
                    raise

    def _write(self, data: bytes) -> None:
        if data:
            self._file.write_data(data, is_text=False)
            self.written += len(data)

    def close(self) -> None:
        """Close the file. Remove it if it is not published."""
        self._file.close()
