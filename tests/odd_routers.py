"""Routers in Python that answer each packet whose TTL ends with them in another way.

    client                      r1                      server
    +--------+     +---------------------------+     +--------+
    |    eth0|-----|eth0 hop 1 ... hop HOPS eth1|-----|eth0    |
    +--------+     +---------------------------+     +--------+

A process in the namespace of r1, whose kernel then forwards nothing, reads from packet sockets what
client and server send to each other. What comes with a TTL of HOPS or less ends at the hop of this number,
which answers with a time exceeded in the next one of WAYS; the rest goes on with a TTL lower by HOPS.
Each protocol has its turn of the ways at each hop. Frames keep what the kernel knows of them beside their
bytes: that the checksum is unfinished, or the packet yet to be segmented (struct virtio_net_hdr).

    with Lab(routers=1) as lab, responding(lab, path) as responder:
        ...                                  # the server is HOPS + 1 hops away; make traffic
        for answer in responder.answers():
            print(answer.hop, answer.way, answer.probe.flow)
"""

from __future__ import annotations

import heapq
import itertools
import json
import selectors
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # it is a program, too

from lab import CommandFailed, Lab, address, end, wait_for_line
from runs import ICMP, ICMPV6, TCP, TIME_EXCEEDED_TYPES, UDP, Packet, ones_sum, parse_packet

HOPS = 4
MTU = 1500
LOW_TTL = 32  # of probes at most, see PROBES in runs.py
LATE = 0.3  # s
SERVICE_TIME = 0.004  # s for a packet, on a link with an ACK filter
PSH, ACK = 0x08, 0x10

# linux/if_packet.h, linux/if_ether.h, linux/virtio_net.h
SOL_PACKET, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 263, 15, 23
ETH_P_ALL = 3
VNET_HDR = 10
NEEDS_CSUM = 1  # flag in it: the checksum is unfinished
LONGEST = VNET_HDR + 14 + 65536
IP_TYPES = {b'\x08\x00': 4, b'\x86\xdd': 6}

HOP_BY_HOP, DESTINATION_OPTIONS = 0, 60  # IPv6 extension headers
SOURCE_AT = {4: slice(12, 16), 6: slice(8, 24)}
DEST_AT = {4: slice(16, 20), 6: slice(24, 40)}
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}


# Packets, from the IP header on


def version_of(packet: bytes) -> int:
    return packet[0] >> 4


def header_length(packet: bytes) -> int:
    """Of the IP header; of IPv6 without extension headers."""
    return (packet[0] & 15) * 4 if version_of(packet) == 4 else 40


def packed(version: int, text: str) -> bytes:
    return socket.inet_pton(FAMILY[version], text)


def replaced(packet: bytes, at: int, field: bytes) -> bytes:
    """With another field in the IP header, whose checksum is made right."""
    packet = packet[:at] + field + packet[at + len(field) :]
    if version_of(packet) == 6:
        return packet
    length = header_length(packet)
    header = packet[:10] + bytes(2) + packet[12:length]
    return header[:10] + struct.pack('!H', ones_sum(header) ^ 0xFFFF) + header[12:] + packet[length:]


def with_ttl(packet: bytes, ttl: int) -> bytes:
    return replaced(packet, 8 if version_of(packet) == 4 else 7, bytes([ttl]))


def ttl_of(packet: bytes) -> int:
    return packet[8 if version_of(packet) == 4 else 7]


def with_tos(packet: bytes, tos: int) -> bytes:
    if version_of(packet) == 4:
        return replaced(packet, 1, bytes([tos]))
    (word,) = struct.unpack_from('!I', packet)
    return replaced(packet, 0, struct.pack('!I', word & 0xF00FFFFF | tos << 20))


def with_mark(packet: bytes) -> bytes:
    """As a router that sees congestion leaves it (ECN)."""
    return with_tos(packet, parse_packet(packet).tos | 3)


def with_identification(packet: bytes) -> bytes:
    """With another identification; IPv6: flow label."""
    if version_of(packet) == 4:
        return replaced(packet, 4, b'\xab\xcd')
    (word,) = struct.unpack_from('!I', packet)
    return replaced(packet, 0, struct.pack('!I', word & 0xFFF00000 | 0x5ABCD))


def with_swapped_length(packet: bytes) -> bytes:
    """As systems quote it that had turned the length into their own byte order."""
    at = 2 if version_of(packet) == 4 else 4
    return replaced(packet, at, packet[at + 1 : at - 1 : -1])


def with_bad_checksum(packet: bytes) -> bytes:
    """As systems quote it that had yet to finish the checksum of the IPv4 header."""
    return packet[:10] + bytes(2) + packet[12:]


def with_source(packet: bytes) -> bytes:
    """With another source in the IP header; no checksum behind it knows."""
    version = version_of(packet)
    return replaced(packet, SOURCE_AT[version].start, packed(version, TRANSLATED[version]))


def with_translation(packet: bytes) -> bytes:
    """As a NAT lets it go on, but for ICMPv6, whose checksum nobody looks at here."""
    version = version_of(packet)
    protocol = parse_packet(packet).protocol
    translated = with_source(packet)
    if protocol in (ICMP, ICMPV6):
        return translated
    at = header_length(packet) + (6 if protocol == UDP else 16)
    # RFC 1624; of an unfinished checksum, which is a sum and no complement, it is no matter which way.
    change = bytes(byte ^ 0xFF for byte in translated[SOURCE_AT[version]]) + packet[SOURCE_AT[version]]
    check = ones_sum(packet[at : at + 2] + change)
    return translated[:at] + struct.pack('!H', check) + translated[at + 2 :]


def with_foreign_checksum(packet: bytes) -> bytes:
    """As a NAT lets the quote come back that translates the source, but not the checksum behind it."""
    at = SOURCE_AT[version_of(packet)]
    return replaced(with_translation(packet), at.start, packet[at])


def with_number(packet: bytes, ahead: int) -> bytes:
    """The same for UDP, where the NAT's addresses differ by so much, as checksums count."""
    at = header_length(packet) + 6
    if parse_packet(packet).protocol != UDP:
        return packet
    check = ones_sum(packet[at : at + 2] + struct.pack('!H', ahead))
    return packet[:at] + struct.pack('!H', check) + packet[at + 2 :]


def with_moved_number(packet: bytes, at: int, offset: int, is_finished: bool = False) -> bytes:
    """With the TCP number at this place of the TCP header higher by the offset, and a checksum as before."""
    at += header_length(packet)
    if parse_packet(packet).protocol != TCP:
        return packet
    before = packet[at : at + 4]
    number = struct.pack('!I', (struct.unpack('!I', before)[0] + offset) % 2**32)
    packet = packet[:at] + number + packet[at + 4 :]
    if not is_finished:
        return packet
    at = header_length(packet) + 16
    check = ones_sum(struct.pack('!H', 0xFFFF ^ struct.unpack_from('!H', packet, at)[0]) + ones(before) + number)
    return packet[:at] + struct.pack('!H', check ^ 0xFFFF) + packet[at + 2 :]


def ones(data: bytes) -> bytes:
    """The complement of each bit."""
    return bytes(byte ^ 0xFF for byte in data)


def with_options(packet: bytes, options: bytes) -> bytes:
    """With IPv4 options that it did not have."""
    first, length = 0x45 + len(options) // 4, struct.unpack_from('!H', packet, 2)[0] + len(options)
    packet = bytes([first]) + packet[1:20] + options + packet[20:]
    return replaced(packet, 2, struct.pack('!H', length))


def with_extension_headers(packet: bytes, *headers: tuple[int, bytes]) -> bytes:
    """With IPv6 extension headers, each a number and what follows its first byte, that it did not have."""
    (length,) = struct.unpack_from('!H', packet, 4)
    following, inserted = packet[6], b''
    for number, rest in reversed(headers):
        inserted = bytes([following]) + rest + inserted
        following = number
    length += len(inserted)
    return packet[:4] + struct.pack('!HB', length, following) + packet[7:40] + inserted + packet[40:]


# How much is quoted. These do not trust the length in the header, which a way may have changed


def whole(packet: bytes) -> bytes:
    """As much as a message of one MTU holds, with 8 bytes of options in its own IP header."""
    return packet[: MTU - (20 if version_of(packet) == 4 else 40) - 8 - 8]


def least(packet: bytes) -> bytes:
    """What every router quotes."""
    return packet[: header_length(packet) + 8]


def first_128(packet: bytes) -> bytes:
    return packet[:128]


def padded(packet: bytes) -> bytes:
    """As RFC 4884 wants it."""
    return packet[:128].ljust(128, b'\0')


def padded_long(packet: bytes) -> bytes:
    """More than RFC 4884 wants, in units of 8 bytes."""
    quote = packet[:512].ljust(128, b'\0')
    return quote + bytes(-len(quote) % 8)


# What stands behind it: RFC 4884, with the objects of RFC 4950 and RFC 5837


def structure(*objects: bytes, version: int = 2, check: int | None = None) -> bytes:
    """An extension structure. `check` is not the checksum, but in its place."""
    data = b''.join(objects)
    if check is None:
        check = ones_sum(struct.pack('!H2x', version << 12) + data) ^ 0xFFFF
    return struct.pack('!HH', version << 12, check) + data


def extension_object(number: int, kind: int, data: bytes, length: int | None = None) -> bytes:
    """An object of a class; `length` is not its length, but in its place."""
    return struct.pack('!HBB', 4 + len(data) if length is None else length, number, kind) + data


def mpls_stack(*entries: tuple[int, int, int, int], length: int | None = None) -> bytes:
    """A label stack of entries of label, traffic class, bottom of stack, TTL."""
    words = (label << 12 | tc << 9 | bottom << 8 | ttl for label, tc, bottom, ttl in entries)
    return extension_object(1, 1, b''.join(struct.pack('!I', word) for word in words), length)


def interface(
    role: int, index: int | None = None, addr: str | None = None, name: bytes | None = None, mtu: int | None = None
) -> bytes:
    """Information about an interface, as much of it as is given."""
    parts = (8, index is not None), (4, addr is not None), (2, name is not None), (1, mtu is not None)
    data = b'' if index is None else struct.pack('!I', index)
    if addr is not None:
        version = 6 if ':' in addr else 4
        data += struct.pack('!HH', 1 if version == 4 else 2, 0) + packed(version, addr)
    if name is not None:
        length = 1 + len(name) + -(1 + len(name)) % 4
        data += (bytes([length]) + name).ljust(length, b'\0')
    if mtu is not None:
        data += struct.pack('!I', mtu)
    return extension_object(2, role << 6 | sum(bit for bit, given in parts if given), data)


ONE_LABEL = mpls_stack((16001, 5, 1, 254))
THREE_LABELS = mpls_stack((1048575, 7, 0, 255), (24000, 0, 0, 1), (3, 1, 1, 64))
INTERFACE = interface(0, 3, '192.0.2.1', b'eth0', 1500)
UNKNOWN = extension_object(200, 1, b'what is it?!')
ONE_LABEL_TEXT = '16001/5/1/254'
THREE_LABELS_TEXT = '1048575/7/0/255;24000/0/0/1;3/1/1/64'
INTERFACE_TEXT = 'role=incoming;index=3;addr=192.0.2.1;name=eth0;mtu=1500'


# Who answers

TRANSLATED = {4: '198.51.100.77', 6: '2001:db8:77::ace'}  # sources of packets behind a NAT
ELSEWHERE = {4: '203.0.113.99', 6: '2001:db8:99::fee'}


def hop_address(version: int, hop: int) -> str:
    return f'192.0.2.{hop}' if version == 4 else f'2001:db8::{hop:x}'


def own_address(packet: bytes, hop: int) -> bytes:
    return packed(version_of(packet), hop_address(version_of(packet), hop))


def another_address(packet: bytes, hop: int) -> bytes:
    return packed(version_of(packet), ELSEWHERE[version_of(packet)])


def destination_address(packet: bytes, hop: int) -> bytes:
    return packet[DEST_AT[version_of(packet)]]


# The ways


class Case(NamedTuple):
    """A probe, as far as it is of matter for whether it can be known from a quote."""

    version: int
    protocol: int
    offload: bool  # the client leaves checksums to its device


class Unmatched(NamedTuple):
    """Why some probes have no answer in their row."""

    reason: str
    applies: Callable[[Case], bool] = lambda case: True


UNFINISHED_UDP = Unmatched(
    'all UDP checksums that no device finishes are alike, and what tells the packets apart is not quoted',
    lambda case: case.protocol == UDP and case.offload,
)
TRANSLATED_UDP = Unmatched(
    'what tells UDP probes apart is the checksum, which the NAT has changed', lambda case: case.protocol == UDP
)

EXACT = -1


class Way(NamedTuple):
    """How a router answers a packet. `quote` makes the quoted bytes of the packet, which has TTL 1 by then."""

    quote: Callable[[bytes], bytes] = whole
    extension: bytes = b''  # behind the quote
    length: int = 0  # that the message says the quote to have, in the version's units; or EXACT
    code: int = 0
    source: Callable[[bytes, int], bytes] = own_address
    header: bytes = b''  # IPv4: options, IPv6: a hop-by-hop header, but for its first byte, of the answer
    ttl: int | None = None  # None: of a system that begins with 64
    delay: float = 0.0  # s
    copies: int = 1
    versions: tuple[int, ...] = (4, 6)
    unmatched: Unmatched | None = None
    alone: bool = False  # not in turn with others, where none is asked for
    mpls: str | None = ''  # the columns' text; None: what there is to say of it is not settled
    ifinfo: str | None = ''


def changed(
    change: Callable[..., bytes], *arguments: Any, quote: Callable[[bytes], bytes] = whole
) -> Callable[[bytes], bytes]:
    """Quote a packet after a change: first `change(packet, *arguments)`, then `quote` cuts it."""
    return lambda packet: quote(change(packet, *arguments))


extended = partial(Way, padded, length=EXACT)
IPV4: dict[str, Any] = dict(versions=(4,))
IPV6: dict[str, Any] = dict(versions=(6,))
RECORD_ROUTE = bytes.fromhex('07 0b 04 00000000 00000000 01')
NOPS = bytes.fromhex('01010101')
ROUTER_ALERT = bytes.fromhex('94040000')
PADN = bytes.fromhex('00 01 04 00000000')  # length and option of an extension header of 8 bytes
PADN_16 = bytes.fromhex('01 01 0c 000000000000000000000000')
ROUTER_ALERT_6 = bytes.fromhex('00 05 02 0000 01 00')

WAYS: dict[str, Way] = {
    'all of it': Way(),
    'no more than every router quotes': Way(least, unmatched=UNFINISHED_UDP),
    '128 bytes': Way(first_128),
    'padded': Way(padded),
    'padded, length given': Way(padded, length=EXACT),
    'of fragments': Way(code=1, unmatched=Unmatched('fragments that did not become a packet: no hop')),
    'one byte too few': Way(
        lambda packet: least(packet)[:-1], unmatched=Unmatched('what every router quotes is not there')
    ),
    'MPLS label': extended(structure(ONE_LABEL), mpls=ONE_LABEL_TEXT),
    'three MPLS labels': extended(structure(THREE_LABELS), mpls=THREE_LABELS_TEXT),
    'interface': extended(structure(INTERFACE), ifinfo=INTERFACE_TEXT),
    'IPv6 interface': extended(
        structure(interface(2, 70000, '2001:db8::5', b'xe-0/0/1.100')),
        ifinfo='role=outgoing;index=70000;addr=2001:db8::5;name=xe-0/0/1.100',
    ),
    'interface index': extended(structure(interface(1, 12)), ifinfo='role=sub-ip;index=12'),
    'next hop': extended(
        structure(interface(3, addr='192.0.2.9', mtu=9000)), ifinfo='role=next-hop;addr=192.0.2.9;mtu=9000'
    ),
    'MPLS label and interface': extended(
        structure(ONE_LABEL, INTERFACE), mpls=ONE_LABEL_TEXT, ifinfo=INTERFACE_TEXT
    ),
    'interface and MPLS labels': extended(
        structure(INTERFACE, THREE_LABELS), mpls=THREE_LABELS_TEXT, ifinfo=INTERFACE_TEXT
    ),
    'unknown objects': extended(structure(UNKNOWN, UNKNOWN, UNKNOWN)),
    'MPLS label behind unknown objects': extended(structure(UNKNOWN, UNKNOWN, ONE_LABEL), mpls=ONE_LABEL_TEXT),
    'MPLS label behind a long quote': Way(padded_long, structure(ONE_LABEL), EXACT, mpls=ONE_LABEL_TEXT),
    'MPLS label, old style': Way(padded, structure(ONE_LABEL), mpls=ONE_LABEL_TEXT),
    'MPLS label without checksum': extended(structure(ONE_LABEL, check=0), mpls=ONE_LABEL_TEXT),
    'extension with a bad checksum': extended(structure(ONE_LABEL, check=0x1234)),
    'extension of another version': extended(structure(ONE_LABEL, version=1)),
    'extension without objects': extended(structure()),
    'extension header cut': extended(b'\x20\0'),
    'extension cut': extended(structure(THREE_LABELS)[:10]),
    'object of no bytes': extended(structure(mpls_stack((16001, 5, 1, 254), length=0))),
    'object shorter than its header': extended(structure(mpls_stack((16001, 5, 1, 254), length=3))),
    'object beyond the end': extended(structure(mpls_stack((16001, 5, 1, 254), length=200))),
    'length of the quote beyond the end': Way(padded, structure(ONE_LABEL), length=255, mpls=ONE_LABEL_TEXT),
    'length in bytes': Way(padded, structure(mpls_stack((84016, 5, 1, 1))), length=0x80, mpls='84016/5/1/1'),
    'length without padding': Way(padded, structure(ONE_LABEL), length=8, mpls=ONE_LABEL_TEXT),
    'length without padding, in words': Way(
        padded, structure(mpls_stack((416240, 0, 1, 1))), length=0x11, mpls='416240/0/1/1', **IPV4
    ),
    'impossible length, nothing behind the quote': Way(length=0x11, **IPV4),
    'twenty MPLS labels': extended(structure(mpls_stack(*[(16001, 0, 0, 1)] * 20)), mpls=None),
    'ten interfaces': extended(structure(*[INTERFACE] * 10), ifinfo=None),
    'interface of an odd name': extended(structure(interface(0, 3, name=b'a,"b\n;=\xff')), ifinfo=None),
    'interface, name of no bytes': extended(structure(extension_object(2, 2, bytes(4))), ifinfo=None),
    'interface, name beyond the end': extended(structure(extension_object(2, 2, b'\xffeth')), ifinfo=None),
    'interface, unknown family': extended(structure(extension_object(2, 4, b'\0\7\0\0elf!')), ifinfo=None),
    'interface cut': extended(structure(extension_object(2, 15, INTERFACE[4:10])), ifinfo=None),
    'quoted TTL 0': Way(changed(with_ttl, 0)),
    'quoted TTL 64': Way(changed(with_ttl, 64)),
    'quoted TTL 255': Way(changed(with_ttl, 255)),
    'another DSCP': Way(changed(with_tos, 0xB8)),
    'congestion': Way(changed(with_mark)),
    'another identification': Way(changed(with_identification)),
    'swapped length': Way(changed(with_swapped_length)),
    'bad header checksum': Way(changed(with_bad_checksum), **IPV4),
    'translated source': Way(changed(with_source)),
    'translated source and checksum': Way(changed(with_translation), unmatched=TRANSLATED_UDP),
    'translated checksum': Way(changed(with_foreign_checksum), unmatched=TRANSLATED_UDP),
    'checksum of another probe': Way(changed(with_number, -128 % 65535), unmatched=TRANSLATED_UDP, alone=True),
    'record route': Way(changed(with_options, RECORD_ROUTE), **IPV4),
    'IPv4 options and 8 bytes': Way(changed(with_options, NOPS, quote=least), unmatched=UNFINISHED_UDP, **IPV4),
    'hop-by-hop header': Way(changed(with_extension_headers, (HOP_BY_HOP, PADN)), **IPV6),
    'destination options': Way(changed(with_extension_headers, (DESTINATION_OPTIONS, PADN_16)), **IPV6),
    'hop-by-hop header and destination options': Way(
        changed(with_extension_headers, (HOP_BY_HOP, PADN_16), (DESTINATION_OPTIONS, PADN)), **IPV6
    ),
    'router alert': Way(header=ROUTER_ALERT, **IPV4),
    'hop-by-hop header of its own': Way(header=ROUTER_ALERT_6, **IPV6),
    'from another address': Way(source=another_address),
    'from the destination': Way(source=destination_address),
    'TTL 1': Way(ttl=1),
    'TTL 255': Way(ttl=255),
    'odd TTL': Way(ttl=77),
    'late': Way(delay=LATE),
    'twice': Way(copies=2),
    'none': Way(copies=0, unmatched=Unmatched('there is no answer')),
}


def ways_of(version: int) -> list[str]:
    return [name for name, way in WAYS.items() if version in way.versions and not way.alone]


def time_exceeded(way: Way, packet: bytes, hop: int) -> bytes:
    """A hop's answer to a packet, from the IP header on."""
    version = version_of(packet)
    source, dest = way.source(packet, hop), packet[SOURCE_AT[version]]
    ttl = 65 - hop if way.ttl is None else way.ttl
    quote = way.quote(with_ttl(packet, 1))
    length = len(quote) // (4 if version == 4 else 8) if way.length == EXACT else way.length
    protocol = ICMP if version == 4 else ICMPV6
    unused = bytes([0, length, 0, 0]) if version == 4 else bytes([length, 0, 0, 0])
    message = bytes([TIME_EXCEEDED_TYPES[protocol], way.code, 0, 0]) + unused + quote + way.extension
    pseudo = source + dest + struct.pack('!II', len(message), protocol) if version == 6 else b''
    check = struct.pack('!H', ones_sum(pseudo + message) ^ 0xFFFF)
    message = message[:2] + check + message[4:]
    if version == 4:
        header = struct.pack(
            '!BBHHHBBH',
            0x45 + len(way.header) // 4,
            0xC0,
            20 + len(way.header) + len(message),
            0x5EED,
            0,
            ttl,
            protocol,
            0,
        )
        return replaced(header + source + dest + way.header + message, 0, header[:1])
    own = bytes([protocol]) + way.header if way.header else b''
    return (
        struct.pack('!IHBB', 0x6C0A5EED, len(own) + len(message), HOP_BY_HOP if own else protocol, ttl)
        + source
        + dest
        + own
        + message
    )


# The log


class Answer(NamedTuple):
    """What became of a packet that was to end at a hop, or of a probe that went on."""

    arrived: int  # ns of CLOCK_MONOTONIC, as are all times here
    hop: int
    way: str  # empty: it went on
    probe: Packet  # as it arrived
    sent: tuple[tuple[int, int], ...]  # of each copy of the answer: just before, just after
    reply: Packet | None


class Responder:
    """The process, from outside."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process = process
        self._log = log
        self._read = 0
        self._outstanding = 0
        self._answers: list[Answer] = []

    def answers(self) -> list[Answer]:
        """Those so far, in the order in which the probes arrived; CommandFailed where it has ended."""
        if self.process.poll() is not None:
            assert self.process.stderr
            raise CommandFailed(f'the responder ended:\n{self.process.stderr.read()}')
        with self._log.open() as log:
            log.seek(self._read)
            text = log.read()
        text = text[: text.rfind('\n') + 1]
        self._read += len(text)
        for line in text.splitlines():
            fields = json.loads(line)
            self._outstanding = fields.pop('outstanding')
            if fields:
                self._answers.append(parse_answer(fields))
        self._answers.sort(key=lambda answer: answer.arrived)
        return self._answers

    def is_idle(self) -> bool:
        """Whether no late answer is yet to be sent."""
        self.answers()
        return not self._outstanding


def parse_answer(fields: dict[str, Any]) -> Answer:
    """A line of the log."""
    probe, reply = (
        parse_packet(bytes.fromhex(fields[name])) if fields[name] else None for name in ('probe', 'reply')
    )
    assert probe
    return Answer(
        fields['arrived'],
        fields['hop'],
        fields['way'],
        probe,
        tuple((before, after) for before, after in fields['sent']),
        reply,
    )


@contextmanager
def responding(
    lab: Lab,
    log: Path,
    ways: Sequence[str] = (),
    middlebox: tuple[int, int] = (HOPS + 1, 0),
    ack_filter: tuple[int, str] = (HOPS + 1, ''),
) -> Iterator[Responder]:
    """The only router of a lab answers in these ways, or in all. It forwards by itself again at exit.

    In front of a hop there may be a middlebox that adds a constant to the client's TCP sequence numbers, or a slow
    link whose queue has no more than one bare ACK of a flow: 'drop' drops the older one, 'overwrite' writes the TCP
    header of the newer one into the older one. 'drop by length' and 'overwrite by length' do not look at PSH.
    """
    (router,) = lab.routers
    forwarding = ['net.ipv4.ip_forward={}', 'net.ipv6.conf.all.forwarding={}']
    macs = [
        host.run('cat', f'/sys/class/net/{host.device}/address').stdout.strip() for host in (lab.client, lab.server)
    ]
    log.touch()
    router.run('sysctl', '-qw', *(setting.format(0) for setting in forwarding))
    try:
        process = router.popen(
            sys.executable,
            __file__,
            *macs,
            str(log),
            json.dumps([ways, middlebox, ack_filter]),
            stderr=subprocess.PIPE,
        )
        try:
            wait_for_line(process, 'ready')
            yield Responder(process, log)
        finally:
            end(process)
    finally:
        router.run('sysctl', '-qw', *(setting.format(1) for setting in forwarding))


# The process itself


class Device:
    """One of the router's, with what is at its other end."""

    def __init__(self, name: str, peer_mac: str, peers: Sequence[str]) -> None:
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK)
        self.socket.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        self.socket.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        self.socket.bind((name, ETH_P_ALL))
        self.peers = {packed(4 if '.' in peer else 6, peer) for peer in peers}
        own_mac = self.socket.getsockname()[4]
        self.ethernet = bytes.fromhex(peer_mac.replace(':', '')) + own_mac

    def receive(self) -> tuple[bytes, bytes] | None:
        """What the kernel knows of the next IP packet of a peer, and the packet; None: no more."""
        while True:
            try:
                data, (_, _, kind, *_) = self.socket.recvfrom(LONGEST)
            except BlockingIOError:
                return None
            frame = data[VNET_HDR:]
            version = IP_TYPES.get(frame[12:14])
            if kind == socket.PACKET_HOST and version and frame[14:][SOURCE_AT[version]] in self.peers:
                return data[:VNET_HDR], frame[14:]

    def send(self, packet: bytes, known: bytes = bytes(VNET_HDR)) -> None:
        kind = b'\x08\x00' if version_of(packet) == 4 else b'\x86\xdd'
        self.socket.send(known + self.ethernet + kind + packet)


class Queued:
    """A packet of the client that waits for a slow link."""

    def __init__(self, known: bytes, packet: bytes, ignored_flags: int) -> None:
        self.known, self.packet, self._ignored_flags = known, packet, ignored_flags

    @property
    def bare_ack_of(self) -> tuple[Any, ...]:
        """The flow of a bare ACK; of any other packet nothing."""
        packet = parse_packet(self.packet)
        if packet.protocol != TCP or packet.l4_length != len(packet.segment):
            return ()
        return packet.flow if packet.segment[13] & ~self._ignored_flags == ACK else ()


class Routers:
    """All of them: what comes in at either end, and what is yet to go out."""

    def __init__(
        self,
        near: Device,
        far: Device,
        log: Path,
        ways: Sequence[str],
        middlebox: tuple[int, int],
        ack_filter: tuple[int, str],
    ) -> None:
        self._queue: list[Queued] = []
        self._queue_before, how = ack_filter
        self._filter, _, by_length = how.partition(' ')
        self._ignored_flags = PSH if by_length else 0
        self._near, self._far = near, far
        self._changed_from, self._offset = middlebox
        self._log = log.open('a', buffering=1)
        self._ways = {version: list(ways) or ways_of(version) for version in (4, 6)}
        self._turns: Counter[tuple[int, int, int]] = Counter()
        self._late: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def run(self) -> None:
        """For ever."""
        selector = selectors.DefaultSelector()
        for device, receive in (self._near, self._from_client), (self._far, self._from_server):
            selector.register(device.socket, selectors.EVENT_READ, receive)
        print('ready', file=sys.stderr, flush=True)
        while True:
            wait = max(0, self._late[0][0] - time.monotonic()) if self._late else None
            for key, _ in selector.select(wait):
                key.data()
            while self._late and self._late[0][0] <= time.monotonic():
                heapq.heappop(self._late)[2]()

    def _from_server(self) -> None:
        for known, packet in iter(self._far.receive, None):
            if packet[DEST_AT[version_of(packet)]] in self._near.peers:
                packet = with_moved_number(packet, 8, -self._offset, not known[0] & NEEDS_CSUM)
                self._near.send(with_ttl(packet, ttl_of(packet) - HOPS), known)

    def _from_client(self) -> None:
        for known, packet in iter(self._near.receive, None):
            if packet[DEST_AT[version_of(packet)]] not in self._far.peers:
                continue
            if self._filter and ttl_of(packet) >= self._queue_before:
                self._enqueue(Queued(known, packet, self._ignored_flags))
            else:
                self._go_on(known, packet)

    def _enqueue(self, new: Queued) -> None:
        flow = new.bare_ack_of
        older = [each for each in self._queue if flow and each.bare_ack_of == flow]
        if older and self._filter == 'overwrite':
            length = header_length(new.packet)
            older[0].packet = older[0].packet[:length] + new.packet[length:]
            return
        if not self._queue:
            self._serve_later()
        self._queue = [each for each in self._queue if each not in older] + [new]

    def _serve_later(self) -> None:
        heapq.heappush(self._late, (time.monotonic() + SERVICE_TIME, next(self._numbers), self._serve))

    def _serve(self) -> None:
        first = self._queue.pop(0)
        if self._queue:
            self._serve_later()
        self._go_on(first.known, first.packet)

    def _go_on(self, known: bytes, packet: bytes) -> None:
        arrived, ttl = time.monotonic_ns(), ttl_of(packet)
        if ttl <= HOPS:
            self._end(packet, ttl, arrived)
            return
        changed = with_moved_number(packet, 4, self._offset, not known[0] & NEEDS_CSUM)
        self._far.send(with_ttl(changed, ttl - HOPS), known)
        if ttl <= LOW_TTL:
            self._note(arrived, ttl, '', packet)

    def _end(self, packet: bytes, hop: int, arrived: int) -> None:
        """The packet's TTL has ended at a hop."""
        version = version_of(packet)
        turn = version, parse_packet(packet).protocol, hop
        names = self._ways[version]
        if hop == HOPS:  # one that might be the destination is not asked again before it has answered
            names = [name for name in names if WAYS[name].copies and not WAYS[name].unmatched] or names
        name = names[(self._turns[turn] + hop * len(names) // HOPS) % len(names)]  # each hop begins elsewhere
        self._turns[turn] += 1
        way = WAYS[name]
        quoted = with_moved_number(packet, 4, self._offset) if hop >= self._changed_from else packet
        reply = time_exceeded(way, quoted, hop)

        def answer() -> None:
            sent = []
            for _ in range(way.copies):
                before = time.monotonic_ns()
                self._near.send(reply)
                sent.append((before, time.monotonic_ns()))
            self._note(arrived, hop, name, packet, sent, reply if sent else b'')

        if way.delay:
            heapq.heappush(self._late, (time.monotonic() + way.delay, next(self._numbers), answer))
            self._write()
        else:
            answer()

    def _note(
        self,
        arrived: int,
        hop: int,
        way: str,
        probe: bytes,
        sent: Sequence[tuple[int, int]] = (),
        reply: bytes = b'',
    ) -> None:
        self._write(arrived=arrived, hop=hop, way=way, probe=probe.hex(), sent=sent, reply=reply.hex())

    def _write(self, **fields: Any) -> None:
        self._log.write(json.dumps(dict(fields, outstanding=len(self._late))) + '\n')


def main() -> None:
    client_mac, server_mac, log, how = sys.argv[1:]
    near = Device('eth0', client_mac, [address(version, 1, 1) for version in (4, 6)])
    far = Device('eth1', server_mac, [address(version, 2, 2) for version in (4, 6)])
    Routers(near, far, Path(log), *json.loads(how)).run()


if __name__ == '__main__':
    main()
