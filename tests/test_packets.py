"""Packets through the programs of elfprobe.c: declared, run, and compared with what must come of them.

    CLIENT -- packet ---------> elf_egress: a target? due? fit?   --> clone --> elf_probe --> in_flight
    ROUTER -- time exceeded --> elf_ingress: of a probe in flight? --> dropped or passed, and a row
    SERVER -- anything -------> elf_ingress: passed, and the path's length learnt

Nothing goes over a network here: see progtest.py. What a network adds is for the tests in the lab.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import logging
import os
import random
import socket
import struct
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Callable, Dict, Iterator

import pytest

pytest.importorskip('scapy')
pytest.importorskip('bcc')
pytest.importorskip('pyroute2')

from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_NOP, IPOption_RR
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6PacketTooBig,
    ICMPv6ParamProblem,
    ICMPv6TimeExceeded,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    Jumbo,
    PadN,
)
from scapy.layers.l2 import ARP, GRE, Dot1Q, Ether
from scapy.packet import Packet, Raw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from elf.devices import Frame
from elf.findings import PathRewrites
from elf.unmatched import UnmatchedAnswers
from lab import run, wait_until
from odd_routers import ONE_LABEL, structure
from progtest import (
    DROP,
    FALLBACK,
    GUARDED,
    NAMES,
    PASS,
    TC_ACT_SHOT,
    TC_ACT_STOLEN,
    TC_ACT_UNSPEC,
    Flight,
    Programs,
    SkBuff,
    elfprobe,
    get_field,
    own_namespace,
    parsed,
)

pytestmark = [pytest.mark.root, pytest.mark.filterwarnings('ignore:not a bytes object')]  # BCC's own

Load = Callable[..., Programs]
PerVersion = Dict[int, Packet]  # by IP version

MS, SECOND = 10**6, 10**9  # ns
NEVER = 1 << 62  # a time that does not come
TTL = 7  # that probes are sent with, where the test says so
SEQ = 70000  # number of such a probe
MAX_HOPS = 32
CLIENT = {4: '192.0.2.1', 6: '2001:db8:1::1'}
NAT = {4: '192.0.2.200', 6: '2001:db8:1::200'}
SERVER = {4: '198.51.100.80', 6: '2001:db8:2::80'}
ROUTER = {4: '203.0.113.7', 6: '2001:db8:7::7'}
BOTH_VERSIONS = pytest.mark.parametrize('version', [4, 6])
BOTH_HOOKS = pytest.mark.parametrize('ingress_tc', [True, False], ids=['TC', 'XDP'])
TRIMMED_OR_NOT = pytest.mark.parametrize('notrunc', [False, True], ids=['trimmed', 'notrunc'])


# Packets: how they are declared

RECORD_ROUTE = [IPOption_RR(length=11, pointer=4, routers=['0.0.0.0', '0.0.0.0']), IPOption_NOP()]
TIMESTAMPS = [('NOP', None), ('NOP', None), ('Timestamp', (0x01020304, 0x05060708))]
SACK = [('NOP', None), ('NOP', None), ('SAck', (1, 2, 3, 4))]
TTL_FIELD = {4: 'ttl', 6: 'hlim'}


def ip(version: int, **fields: Any) -> Packet:
    """An IP header from the client to the server, but for these fields; `ttl` is either version's."""
    fields = {'src': CLIENT[version], 'dst': SERVER[version], 'ttl': 64, **fields}
    fields[TTL_FIELD[version]] = fields.pop('ttl')
    if version == 4:
        return IP(**{'id': 0x1234, 'flags': 'DF', **fields})
    return IPv6(**{'fl': 0xA4321, **fields})


def segment(**fields: Any) -> Packet:
    return TCP(**{**dict(sport=40112, dport=443, seq=0x80001000, ack=0x70002000, flags='A'), **fields})


def datagram(**fields: Any) -> Packet:
    return UDP(**{**dict(sport=40113, dport=4433), **fields})


def echo(version: int, **fields: Any) -> Packet:
    fields = {'id': 0x4142, 'seq': 0x4344, **fields}
    return ICMP(type=8, **fields) if version == 4 else ICMPv6EchoRequest(**fields)


def data(length: int) -> Packet:
    return Raw((bytes(range(1, 256)) * (length // 255 + 1))[:length])


def is_echo(packet: Packet) -> bool:
    return ICMP in packet or ICMPv6EchoRequest in packet


def frame(*layers: Packet) -> Packet:
    """Layers in Ethernet, with all lengths and checksums filled in."""
    packet = Ether(src='02:00:00:00:00:01', dst='02:00:00:00:00:02')
    for layer in layers:
        packet /= layer
    return Ether(bytes(packet))


def altered(packet: Packet, ttl: int | None = None, **fields: Any) -> Packet:
    """An IP packet with other fields in its header."""
    packet = packet.copy()
    if ttl is not None:
        fields[TTL_FIELD[version_of(packet)]] = ttl
    for name, value in fields.items():
        setattr(packet, name, value)
    return packet


def version_of(packet: Packet) -> int:
    return 4 if IP in packet else 6


def transport(packet: Packet) -> Packet:
    return packet.payload.payload


def finished(packet: Packet) -> Packet:
    """The packet with lengths and checksums filled in anew."""
    packet = layer = packet.payload.copy()
    while layer:
        for name in {'len', 'plen', 'chksum', 'cksum'} & set(layer.fields):
            layer.delfieldval(name)
        layer = layer.payload
    return frame(packet)


def pseudo_sum(packet: Packet) -> int:
    """The checksum of a packet that leaves it to its device: the sum of the pseudo header only."""
    family = {4: socket.AF_INET, 6: socket.AF_INET6}[version_of(packet)]
    header = packet.payload
    words = socket.inet_pton(family, header.src) + socket.inet_pton(family, header.dst)
    words += struct.pack('!II', len(header.payload), header.proto if IP in packet else header.nh)
    return sum(struct.unpack(f'!{len(words) // 2}H', words)) % 0xFFFF or 0xFFFF


def unfinished(packet: Packet) -> Packet:
    packet = packet.copy()
    transport(packet).chksum = pseudo_sum(packet)
    return packet


def without_checksum(packet: Packet) -> Packet:
    packet = packet.copy()
    transport(packet).chksum = 0
    return packet


def checksum(packet: Packet) -> int:
    layer = transport(packet)
    return layer.chksum if 'chksum' in layer.fields else layer.cksum


def is_unfinished(packet: Packet) -> bool:
    return not is_echo(packet) and checksum(packet) == pseudo_sum(packet)


def flight_of(probe: Packet, **known: int) -> Flight:
    """The record of a probe whose checksum is finished: how a quote tells it, and what is known of it."""
    header, layer = probe.payload, transport(probe)
    outipid = header.id if IP in probe else header.fl & 0xFFFF
    known = dict(outttl=getattr(header, TTL_FIELD[version_of(probe)]), outipid=outipid, **known)
    if TCP in probe:
        return Flight(header.dst, layer.sport, layer.dport, layer.seq, 6, **known)
    if UDP in probe:
        return Flight(header.dst, layer.sport, layer.dport, layer.len << 16 | layer.chksum, 17, **known)
    return Flight(header.dst, layer.id, 0, layer.seq, 1 if IP in probe else 58, **known)


def assert_same(got: bytes, wanted: Packet) -> None:
    if got != bytes(wanted):
        assert Ether(got).show(dump=True) == Ether(bytes(wanted)).show(dump=True)
        assert got == bytes(wanted)


# Programs: compiled once for all tests that want them so


@pytest.fixture(scope='module', autouse=True)
def namespace() -> Iterator[None]:
    with own_namespace():
        yield


@pytest.fixture(scope='module')
def load() -> Iterator[Load]:
    """Gives programs of a configuration, their maps empty but for the heartbeat."""
    loaded: dict[str, Programs] = {}
    with ExitStack() as stack:

        def load(**config: Any) -> Programs:
            key = repr(sorted(config.items()))
            if key not in loaded:
                loaded[key] = stack.enter_context(Programs(**{'max_rate': 10000, 'probeint': 0, **config}))
            loaded[key].clear()
            return loaded[key]

        yield load


# Of any two of the seven, every combination of values: each is true in the first build and in two of the others.
PAIRS = list(itertools.combinations(range(1, 6), 2))
BUILDS = [tuple(number == 0 or number in pair for pair in PAIRS[:7]) for number in range(6)]


@pytest.mark.parametrize('notrunc, rate_global, drop, by_owner, preemptible, ingress_tc, tcx', BUILDS)
def test_all_builds_load_and_give_no_warning(
    notrunc: bool,
    rate_global: bool,
    drop: bool,
    by_owner: bool,
    preemptible: bool,
    ingress_tc: bool,
    tcx: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = dict(
        notrunc=notrunc,
        rate_global=rate_global,
        ingress='drop' if drop else 'pass',
        apps=('ping',) if by_owner else (),
    )
    with caplog.at_level(logging.DEBUG, 'elfprobe'), Programs(
        by_owner,
        ingress_tc=ingress_tc,
        tcx=tcx,
        has_routes=True,
        platform=dict(is_preemptible=preemptible),
        with_warnings=True,
        **config,
    ) as programs:
        assert all(programs.kernel.program(name) > 0 for name in ('elf_egress', 'elf_probe', 'elf_ingress'))
    assert not caplog.messages


# elf_probe: what it makes of a clone

NETWORKS = {
    'IPv4': ip(4, tos=0xB8),
    'IPv4 with options': ip(4, id=0xFFFE, ttl=255, flags=0, options=RECORD_ROUTE),
    'IPv6': ip(6, tc=0xB8),
}
CARRIERS: dict[str, list[Packet]] = {
    'TCP pure ACK': [segment()],
    'TCP pure ACK with timestamps': [segment(options=TIMESTAMPS)],
    'TCP pure ACK with 36 bytes of options': [segment(options=SACK + [('NOP', None)] * 2 + TIMESTAMPS[2:])],
    'TCP pure ACK, sequence number about to wrap': [segment(seq=3)],
    'TCP with 1 byte': [segment(), data(1)],
    'TCP with timestamps and 1400 bytes': [segment(options=TIMESTAMPS), data(1400)],
    'TCP with PSH, URG, ECE and CWR': [segment(flags='PAUEC', urgptr=7), data(13)],
    'TCP pure ACK with URG, ECE and CWR': [segment(flags='AUEC', urgptr=7)],
    **{f'UDP with {length} bytes': [datagram(), data(length)] for length in (0, 1, 2, 3, 500, 1301)},
    **{f'ICMP echo with {length} bytes': [data(length)] for length in (0, 1, 2, 3, 56)},
}


def carriers() -> Iterator[Any]:
    """CARRIERS over NETWORKS, with each kind of checksum that such a packet may have."""
    for network, header in NETWORKS.items():
        version = header.version
        for carrier, layers in CARRIERS.items():
            if carrier.startswith('ICMP'):
                yield pytest.param(frame(header, echo(version), *layers), id=f'{network}, {carrier}')
                continue
            packet = frame(header, *layers)
            yield pytest.param(packet, id=f'{network}, {carrier}')
            yield pytest.param(unfinished(packet), id=f'{network}, {carrier}, unfinished')
            if UDP in packet and version == 4:
                yield pytest.param(without_checksum(packet), id=f'{network}, {carrier}, no checksum')


EVERY_CARRIER = pytest.mark.parametrize('sent', list(carriers()))


def probe_of(sent: Packet, came: Packet, trimmed: bool) -> Packet:
    """What the probe that came of this packet must be; what is the probe's own choice as it came."""
    wanted, chosen = altered(sent.payload, ttl=TTL), transport(came)
    if not trimmed:
        if IP in wanted:
            del wanted.chksum
        return frame(wanted)
    layer = wanted.payload
    own_size = len(bytes(layer)) - 8
    layer.remove_payload()
    if TCP in sent:
        layer.seq, layer.flags, layer.urgptr = chosen.seq, 'PA', 0
    else:
        # What balances the checksum; never of the size that the echo request's own data have.
        layer.add_payload(bytes(chosen)[8:10] + bytes(2 if is_echo(sent) and own_size == 2 else 0))
    if is_echo(sent):
        layer.seq = chosen.seq
        if 'data' in layer.fields:
            layer.data = b''
    wanted = finished(Ether() / wanted)
    return unfinished(wanted) if is_unfinished(sent) else wanted


@TRIMMED_OR_NOT
@EVERY_CARRIER
def test_probe(load: Load, sent: Packet, notrunc: bool) -> None:
    programs = load(notrunc=notrunc)
    programs.set_reservation(seq=SEQ, ttl=TTL)
    before = time.monotonic_ns()
    verdict, out = programs.run('elf_probe', sent)
    after = time.monotonic_ns()
    assert verdict == TC_ACT_UNSPEC
    # A TCP probe that keeps nothing of the packet must have a number of its own.
    trimmed = not notrunc or (TCP in sent and not transport(sent).payload)
    probe = Ether(out)
    assert_same(out, probe_of(sent, probe, trimmed))

    own, ours = transport(sent), transport(probe)
    if TCP in sent and trimmed:
        assert 1 <= (own.seq - ours.seq) % 2**32 <= 2048
    if is_echo(sent):
        assert checksum(probe) == checksum(sent)

    [flight] = programs.in_flight()
    assert before <= flight.sendtime <= after
    origseq = own.chksum if UDP in sent else own.seq
    as_seen = probe if checksum(probe) == 0 or not is_unfinished(probe) else finished(probe)
    assert flight == flight_of(as_seen, seq=SEQ, origseq=origseq, sendtime=flight.sendtime)
    assert not programs.counters()


@pytest.mark.parametrize(
    'layers, count',
    [
        pytest.param([segment()], 2048, id='TCP'),
        pytest.param([datagram(), data(20)], 65535, id='UDP'),
        pytest.param([echo(4), data(20)], 65536, id='ICMP'),
    ],
)
@pytest.mark.parametrize('first', [0, 1000, 2**32 - 1000])
def test_numbers_of_probes_in_a_row_differ(load: Load, layers: list[Packet], count: int, first: int) -> None:
    """Over a stretch that wraps: both ends, and many between."""
    programs, sent = load(), bytes(frame(ip(4), *layers))
    offsets = {*range(20), *range(count - 20, count), *random.Random(count).sample(range(count), 400)}
    seqs = sorted((first + offset) % 2**32 for offset in offsets)
    for seq in seqs:
        programs.set_reservation(seq=seq, ttl=1)
        assert programs.run('elf_probe', sent).verdict == TC_ACT_UNSPEC
    flights = programs.in_flight()
    assert sorted(flight.seq for flight in flights) == seqs
    if TCP in layers[0]:
        assert {(flight.origseq - flight.ident) % 2**32 for flight in flights} <= {*range(1, 2049)}


@BOTH_VERSIONS
@pytest.mark.parametrize('seq', [0, 65534, 65535, 65536, 2**32 - 1])
def test_numbers_that_wrap(load: Load, version: int, seq: int) -> None:
    programs = load()
    programs.set_reservation(seq=seq, ttl=TTL)
    for layers in [segment()], [datagram(), data(9)], [echo(version), data(9)]:
        sent = frame(ip(version), *layers)
        out = programs.run('elf_probe', sent).frame
        assert_same(out, probe_of(sent, Ether(out), trimmed=True))
        assert checksum(Ether(out)) != 0  # which would mean none


@BOTH_VERSIONS
def test_checksum_that_comes_out_as_zero(load: Load, version: int) -> None:
    """What the device makes of an unfinished one is then sent as 0xffff (RFC 768)."""
    programs = load(notrunc=True)
    balance = checksum(frame(ip(version), datagram(), Raw(bytes(2)))).to_bytes(2, 'big')
    programs.run('elf_probe', unfinished(frame(ip(version), datagram(), Raw(balance))))
    [flight] = programs.in_flight()
    assert flight.ident == 10 << 16 | 0xFFFF


@BOTH_VERSIONS
@pytest.mark.parametrize('tcx, ended', [(True, TC_ACT_SHOT), (False, TC_ACT_STOLEN)], ids=['tcx', 'clsact'])
@pytest.mark.parametrize('layers', [[segment(options=TIMESTAMPS)], [datagram()]], ids=['TCP', 'UDP'])
def test_notrunc_keeps_the_first_segment_of_a_packet_yet_to_be_segmented(
    load: Load, version: int, layers: list[Packet], tcx: bool, ended: int
) -> None:
    programs = load(notrunc=True, tcx=tcx)
    programs.set_reservation(seq=SEQ, ttl=TTL)
    sent = unfinished(frame(ip(version), *layers, data(1000)))
    verdict, out = programs.run('elf_probe', sent, SkBuff(gso_size=99, gso_segs=11))
    assert verdict == ended  # the clone: the probe, which is shorter, is sent anew
    assert_same(out, unfinished(frame(ip(version, ttl=TTL), *layers, data(99))))


PAIRS = {  # the packets of two probes, and whether both can be in flight at once
    'TCP, trimmed, same number': (False, [segment()], [segment()], False),
    'TCP, same packet again': (True, [segment(), data(5)], [segment(), data(5)], False),
    'TCP, another packet': (True, [segment(), data(5)], [segment(seq=5), data(5)], True),
    'TCP, another port': (False, [segment()], [segment(sport=1)], True),
    'UDP, trimmed, same number': (False, [datagram(), data(5)], [datagram(), data(9)], False),
    'UDP, same packet again': (True, [datagram(), data(5)], [datagram(), data(5)], False),
    'UDP, other data': (True, [datagram(), data(5)], [datagram(), Raw(b'other')], True),
    'UDP, other length': (True, [datagram(), data(5)], [datagram(), data(6)], True),
    'ICMP, trimmed, same number': (False, [echo(4)], [echo(4, seq=1)], False),
    'ICMP, same packet again': (True, [echo(4)], [echo(4)], False),
    'ICMP, another packet': (True, [echo(4)], [echo(4, seq=1)], True),
}
HEAD = bytes(range(32))  # the part of UDP's data that tells unfinished packets apart
HEADS = Raw(HEAD), Raw(HEAD[::-1]), Raw(HEAD + b'x'), Raw(HEAD + b'y')
PAIRS_UNFINISHED = {
    'UDP, same packet again': (True, [datagram(), data(40)], [datagram(), data(40)], False),
    'UDP, other data in the head': (True, [datagram(), HEADS[0]], [datagram(), HEADS[1]], True),
    'UDP, other data behind the head': (True, [datagram(), HEADS[2]], [datagram(), HEADS[3]], False),
    'UDP, trimmed, same number': (False, [datagram(), data(5)], [datagram(), data(9)], False),
}


@pytest.mark.parametrize(
    'notrunc, one, other, both, finish',
    [
        *(pytest.param(*row, finished, id=name) for name, row in PAIRS.items()),
        *(pytest.param(*row, unfinished, id=f'{name}, unfinished') for name, row in PAIRS_UNFINISHED.items()),
    ],
)
def test_probes_that_cannot_be_told_apart_are_not_sent(
    load: Load,
    notrunc: bool,
    one: list[Packet],
    other: list[Packet],
    both: bool,
    finish: Callable[[Packet], Packet],
) -> None:
    programs = load(notrunc=notrunc)
    programs.set_reservation(seq=SEQ, ttl=TTL)
    assert programs.run('elf_probe', finish(frame(ip(4), *one))).verdict == TC_ACT_UNSPEC
    flights = programs.in_flight()
    verdict = programs.run('elf_probe', finish(frame(ip(4), *other))).verdict
    assert verdict == (TC_ACT_UNSPEC if both else TC_ACT_SHOT)
    assert programs.counters() == ({} if both else {'key_busy': 1})
    assert len(programs.in_flight()) == 1 + both
    assert set(flights) <= set(programs.in_flight())


@pytest.mark.parametrize('excluded, kept', [(0, 192), (160, 71), (255, 0), (256, 0)])
def test_room_for_destinations_is_made_by_those_probed_longest_ago(
    load: Load, monkeypatch: pytest.MonkeyPatch, excluded: int, kept: int
) -> None:
    """Excluded ones stay. However many they are, a quarter of the others and one more go at most."""
    monkeypatch.setattr(elfprobe, 'FLOW_DESTINATIONS_MAX', 256)
    programs = load(by_owner=True, apps=('few',))
    kernel, table = programs.kernel, programs.kernel.map('flow_paths')
    programs.empty('flow_paths')
    for number in range(table.max_entries):
        path = table.new(excluded=number < excluded)
        path.pacing.last_sent = 1000 - number
        table.put(number.to_bytes(16, 'big'), path)
    counters = kernel.map('counters').get(0)
    counters[0].no_room = 1 + excluded
    kernel.map('counters').put(0, counters)
    kernel.make_room()
    left = sorted(int.from_bytes(key, 'big') for key, _ in table.raw_items())
    assert left == list(range(excluded + kept))


@pytest.mark.parametrize('tcx, ended', [(True, TC_ACT_SHOT), (False, TC_ACT_STOLEN)], ids=['tcx', 'clsact'])
def test_no_room_in_flight(load: Load, tcx: bool, ended: int) -> None:
    """Where there is a verdict for it, the clone that is given up is no drop."""
    programs = load(max_rate=1, tcx=tcx)
    room = programs.kernel.map('in_flight').max_entries
    for seq in range(room + 1):
        programs.set_reservation(seq=seq, ttl=TTL)
        verdict = programs.run('elf_probe', frame(ip(4), datagram())).verdict
        assert verdict == (TC_ACT_UNSPEC if seq < room else ended)
    assert programs.counters() == {'in_flight_full': 1}
    assert len(programs.in_flight()) == room


# elf_egress: which packets carry a probe

UNFIT = {  # description: the packet, by version; None: nothing is counted, it is none of our business
    'SYN': segment(flags='S', ack=0),
    'SYN, ACK': segment(flags='SA'),
    'FIN, ACK': segment(flags='FA'),
    'FIN, PSH, ACK with data': segment(flags='FPA') / data(10),
    'RST': segment(flags='R'),
    'RST, ACK': segment(flags='RA'),
    'no ACK': segment(flags='') / data(10),
    'PSH alone': segment(flags='P') / data(10),
    'nothing behind the IP header': {4: ip(4, proto=6), 6: ip(6, nh=6)},
    'TCP header cut': Raw(bytes(segment())[:19]),
    'TCP options cut': Raw(bytes(segment(options=TIMESTAMPS))[:31]),
    'TCP header of 16 bytes': segment(dataofs=4),
    'UDP header cut': Raw(bytes(datagram())[:7]),
    'echo reply': {4: ICMP(type=0), 6: ICMPv6EchoReply()},
    'port unreachable': {4: ICMP(type=3, code=3) / data(28), 6: ICMPv6DestUnreach(code=4) / data(48)},
    'time exceeded': {4: ICMP(type=11) / data(28), 6: ICMPv6TimeExceeded() / data(48)},
    'neighbour solicitation': {6: ICMPv6ND_NS(tgt=SERVER[6])},
    'neighbour advertisement': {6: ICMPv6ND_NA(tgt=SERVER[6])},
    "the other version's echo": {4: ICMPv6EchoRequest(), 6: ICMP(type=8)},
    'first fragment': {4: ip(4, flags='MF') / datagram() / data(8), 6: IPv6ExtHdrFragment(m=1) / datagram()},
    'later fragment': {4: ip(4, flags=0, frag=2, proto=17) / data(8), 6: IPv6ExtHdrFragment(offset=2) / data(8)},
    'behind five extension headers': {
        6: IPv6ExtHdrHopByHop()
        / IPv6ExtHdrDestOpt()
        / IPv6ExtHdrDestOpt()
        / IPv6ExtHdrDestOpt()
        / IPv6ExtHdrDestOpt()
        / segment()
    },
    'BIG TCP (RFC 2675)': {
        6: ip(6, plen=0) / IPv6ExtHdrHopByHop(options=[Jumbo(jumboplen=66038)]) / segment() / data(1400)
    },
    'SCTP': {4: ip(4, proto=132) / data(20), 6: ip(6, nh=132) / data(20)},
    'GRE': {4: ip(4, proto=47) / data(20), 6: ip(6, nh=47) / data(20)},
}
# Headers that were cut have lost their number.
for unfit, protocol in ('TCP header cut', 6), ('TCP options cut', 6), ('UDP header cut', 17):
    UNFIT[unfit] = {4: ip(4, proto=protocol) / UNFIT[unfit], 6: ip(6, nh=protocol) / UNFIT[unfit]}


def in_versions(table: dict[str, Any]) -> Iterator[Any]:
    """A table's packets in each version that they are made for, with a header where they have none yet."""
    for description, entry in table.items():
        packets = entry if isinstance(entry, dict) else {4: entry, 6: entry}
        for version, layers in packets.items():
            packet = layers if IP in layers or IPv6 in layers else ip(version) / layers
            yield pytest.param(version, packet, id=f'IPv{version}, {description}')


@pytest.mark.parametrize('version, packet', [*in_versions(UNFIT)])
def test_unfit_carriers(load: Load, version: int, packet: Packet) -> None:
    programs = load()
    programs.follow(SERVER[version], length=9)
    with programs.attached() as send:
        assert send(frame(packet)) == []
    assert programs.counters() == {'carrier_unfit': 1}
    assert programs.in_flight() == []


FIT = {
    'TCP': segment(),
    'TCP with data': segment(flags='PA') / data(100),
    'UDP': datagram() / data(9),
    'ICMP': {4: echo(4) / data(9), 6: echo(6) / data(9)},
    'options': {4: ip(4, options=RECORD_ROUTE) / segment()},
}


@pytest.mark.parametrize('version, packet', [*in_versions(FIT)])
def test_fit_carrier(load: Load, version: int, packet: Packet) -> None:
    programs = load()
    programs.follow(SERVER[version], length=9, last_probed=TTL - 1, seq=SEQ)
    sent = frame(packet)
    with programs.attached() as send:
        [out] = send(sent)
    assert_same(out, probe_of(sent, Ether(out), trimmed=True))
    assert programs.counters() == {'probes': 1}
    [flight] = programs.in_flight()
    assert (flight.outttl, flight.seq) == (TTL, SEQ)


CHECKSUM_FIELD = {('UDP', 4): 'chksum', ('UDP', 6): 'chksum', ('ICMP', 4): 'chksum', ('ICMP', 6): 'cksum'}
UDP_EXCESS = 0x4000


@pytest.mark.parametrize('is_unfinished', [False, True], ids=['finished', 'unfinished'])
@TRIMMED_OR_NOT
@BOTH_VERSIONS
@pytest.mark.parametrize('protocol', ['UDP', 'ICMP'])
def test_guarded_probe(load: Load, protocol: str, version: int, notrunc: bool, is_unfinished: bool) -> None:
    """It is trimmed, and broken for whoever looks: at its length, or at its checksum. A quote of it is known."""
    programs = load(notrunc=notrunc)
    programs.follow(SERVER[version], length=9, reverse=9, proven=TTL - 1)
    programs.set_reservation(seq=SEQ, ttl=TTL, form=GUARDED)
    sent = frame(ip(version), {'UDP': datagram(), 'ICMP': echo(version)}[protocol], data(100))
    if is_unfinished and protocol == 'UDP':
        sent = unfinished(sent)
    probe = Ether(programs.run('elf_probe', sent).frame)
    layer, right = transport(probe), transport(finished(probe))
    assert len(bytes(layer)) == 10
    field = CHECKSUM_FIELD[protocol, version]
    assert getattr(layer, field) not in (getattr(right, field), 0)
    if protocol == 'UDP':
        assert layer.len == 10 + UDP_EXCESS
    else:
        assert getattr(layer, field) == getattr(transport(sent), field)  # load balancers go by it
    assert programs.receive(time_exceeded(version, probe.payload)).verdict == DROP
    assert [row['outttl'] for row in programs.rows()] == [str(TTL)]
    assert programs.path(SERVER[version]).distance.proven == TTL


@TRIMMED_OR_NOT
@BOTH_VERSIONS
def test_fallback_probe(load: Load, version: int, notrunc: bool) -> None:
    """UDP: a copy of the packet, so that the application that may receive it cannot tell it from the packet."""
    programs = load(notrunc=notrunc)
    programs.set_reservation(seq=SEQ, ttl=TTL, form=FALLBACK)
    sent = frame(ip(version), datagram(), data(100))
    probe = Ether(programs.run('elf_probe', sent).frame)
    assert_same(bytes(probe), probe_of(sent, probe, trimmed=False))


TO_MANY = {
    **{many: ip(4, dst=many) for many in ('224.0.0.251', '255.255.255.255')},
    'ff02::fb': ip(6, dst='ff02::fb'),
}
OTHER_PACKETS = {
    'to somebody else': frame(ip(4, dst=ROUTER[4]) / segment()),
    'from the destination': frame(ip(4, src=SERVER[4], dst=CLIENT[4]) / segment()),
    'to somebody else, IPv6': frame(ip(6, dst=ROUTER[6]) / segment()),
    'its v4-mapped address': frame(ip(6, dst='::ffff:198.51.100.81') / segment()),
    'ARP': frame(ARP(psrc=CLIENT[4], pdst=SERVER[4])),
    'with three VLAN tags': frame(Dot1Q(vlan=5) / Dot1Q(vlan=6) / Dot1Q(vlan=7) / ip(4) / segment()),
    'by way of somewhere else': frame(ip(6) / IPv6ExtHdrRouting(addresses=[ROUTER[6]], segleft=1) / segment()),
    **{f'to {many}': frame(header / datagram()) for many, header in TO_MANY.items()},
    'of a wrong version': frame(IP(version=6, src=CLIENT[4], dst=SERVER[4]) / segment()),
    'of a wrong header length': frame(IP(ihl=4, src=CLIENT[4], dst=SERVER[4]) / segment()),
}


@pytest.mark.parametrize('packet', list(OTHER_PACKETS.values()), ids=list(OTHER_PACKETS))
def test_packets_of_no_interest(load: Load, packet: Packet) -> None:
    programs = load()
    for dest in [*SERVER.values(), *TO_MANY]:
        programs.follow(dest, length=9)
    with programs.attached() as send:
        assert send(packet) == []
    assert programs.counters() == {}
    assert programs.in_flight() == []


@BOTH_VERSIONS
@pytest.mark.parametrize(
    'ttl, counter',
    [
        (1, 'carrier_low_ttl'),
        (TTL, 'carrier_low_ttl'),
        (MAX_HOPS, 'carrier_low_ttl'),
        (MAX_HOPS + 1, 'probes'),
        (64, 'probes'),
        (255, 'probes'),
    ],
)
def test_somebodys_traceroute_carries_no_probe(load: Load, version: int, ttl: int, counter: str) -> None:
    programs = load()
    programs.follow(SERVER[version], length=9)
    with programs.attached() as send:
        assert len(send(frame(ip(version, ttl=ttl), datagram()))) == (counter == 'probes')
    assert programs.counters() == {counter: 1}


@pytest.mark.parametrize('seconds, counted', [(-1, {'lease_expired': 1}), (None, {}), (10, {'probes': 1})])
def test_no_probe_without_the_drivers_heartbeat(load: Load, seconds: int | None, counted: dict[str, int]) -> None:
    """Before and after a run there is none, and that is no fault that counts."""
    programs = load()
    programs.follow(SERVER[4], length=9)
    programs.set_alive_until(0 if seconds is None else time.monotonic_ns() + seconds * SECOND)
    with programs.attached() as send:
        assert len(send(frame(ip(4), segment()))) == ('probes' in counted)
    assert programs.counters() == counted


def test_not_due(load: Load) -> None:
    programs = load()
    programs.follow(SERVER[4], length=9, next_due=NEVER)
    with programs.attached() as send:
        assert send(frame(ip(4), segment())) == []
        assert send(frame(ip(4), segment(flags='S'))) == []
    assert programs.counters() == {}


@pytest.mark.parametrize('version', SERVER)
def test_number_of_a_probe_by_a_retransmission_without_a_socket(load: Load, version: int) -> None:
    """It is as if its carrier were new, so that no firewall takes the probe for an old packet."""
    programs = load()
    programs.follow(SERVER[version], length=9)
    carrier = frame(ip(version), segment(), data(100))
    oldest, newest, then = carrier[TCP].seq, carrier[TCP].seq + 50000, time.monotonic_ns() - 1000 * MS
    programs.open_foreign_flow(
        carrier, acked=oldest, next_seq=newest, stalled_at=then, since=then, moved=then,
        position=(carrier[TCP].ack + oldest) % 2**32,
    )  # fmt: skip
    with programs.attached() as send:
        [probe] = send(bytes(carrier))  # of a packet of scapy's, it would open the flow anew
        assert 0 < newest - Ether(probe)[TCP].seq <= 2048
    assert programs.counters() == {'probes': 1}


@pytest.mark.parametrize('sent', [
    frame(IP(src=CLIENT[4], dst=SERVER[4], len=0), segment(), data(1000)),
    frame(IPv6(src=CLIENT[6], dst=SERVER[6], plen=0), segment(), data(1000)),
], ids=['IPv4', 'IPv6'])  # fmt: skip
def test_forwarded_big_tcp(load: Load, sent: Packet) -> None:
    """What has more than 64 KiB has no length in its IP header. A packet sent again is still known as one."""
    programs = load()
    programs.empty('flows')
    programs.follow(sent.payload.dst, length=9)
    with programs.attached() as send:
        send(sent)
        send(bytes(sent))
    [flow] = [flow for _, flow in programs.kernel.map('flows').items()]
    assert (flow.next_seq, flow.repeats) == (segment().seq + 1000, 1)


@pytest.mark.parametrize('due', [0, NEVER], ids=['with a probe', 'without'])
def test_packet_keeps_what_the_kernel_knows_of_it(load: Load, due: int) -> None:
    programs = load()
    programs.follow(SERVER[4], length=9, next_due=due)
    context = SkBuff(mark=0xABC, priority=6, tstamp=12345)
    context.cb[:] = [1, 2, 3, 4, 5]
    packet = bytes(unfinished(frame(ip(4), segment(), data(1000))))
    programs.open_foreign_flow(frame(ip(4), segment()))
    with programs.attached():
        assert programs.run('elf_egress', packet, context) == (TC_ACT_UNSPEC, packet)
    assert programs.counters() == ({} if due else {'probes': 1})
    assert (context.mark, context.priority, context.tstamp) == (0xABC, 6, 12345)
    assert context.cb[:] == [1, 2, 3, 4, 5]


def test_clone_that_does_not_come_through(load: Load) -> None:
    """A filter before ours has let it out as it was, say: here ours is not even attached. The destination
    would get more of them, so that there are no more probes."""
    programs = load(probeint=1000)
    for version in SERVER:
        programs.follow(SERVER[version], length=9)
    packet = bytes(frame(ip(4), segment()))
    programs.open_foreign_flow(frame(ip(4), segment()))
    assert programs.run('elf_egress', packet) == (TC_ACT_UNSPEC, packet)
    assert programs.counters() == {'clone_lost': 1}
    assert programs.in_flight() == []
    with programs.attached() as send:
        assert send(packet) == []
        assert len(send(frame(ip(6), segment()))) == 1  # the next packet is taken for what it is
        assert programs.counters() == {'clone_lost': 1, 'probes': 1}


@pytest.mark.parametrize('size', [0, 1000], ids=['as long', 'shortened'])
def test_probe_that_the_queue_drops(load: Load, size: int) -> None:
    programs = load(probeint=1000)
    programs.follow(SERVER[4], length=9)
    packet = frame(ip(4), segment(), data(size))
    with programs.attached() as send:
        run('tc', 'qdisc', 'add', 'dev', 'lo', 'root', 'pfifo', 'limit', '0')
        try:
            assert send(packet) == []
        finally:
            run('tc', 'qdisc', 'del', 'dev', 'lo', 'root')
        assert programs.counters() == {'send_failed': 1}
        assert programs.in_flight() == []
        assert programs.path(SERVER[4]).hops[1].unanswered == 0
        assert len(send(packet)) == 1
        assert programs.counters() == {'send_failed': 1, 'probes': 1}


# elf_ingress: replies

TIME_EXCEEDED = {4: ICMP(type=11), 6: ICMPv6TimeExceeded()}
PROTOCOLS = pytest.mark.parametrize('protocol', ['TCP', 'UDP', 'ICMP'])
PROBES = {
    'TCP': lambda version: frame(ip(version, ttl=TTL), segment(options=TIMESTAMPS)),
    'UDP': lambda version: frame(ip(version, ttl=TTL), datagram(), data(2)),
    'ICMP': lambda version: frame(ip(version, ttl=TTL), echo(version), data(2)),
}
KNOWN = dict(seq=SEQ, origseq=0xFEDCBA98, sendtime=123)


def from_router(version: int, *layers: Any) -> Packet:
    return frame(ip(version, src=ROUTER[version], dst=CLIENT[version], ttl=61), *layers)


def time_exceeded(version: int, quote: Any) -> Packet:
    return from_router(version, TIME_EXCEEDED[version].copy(), Raw(bytes(quote)))


def flipped(packet: bytes, offset: int) -> bytes:
    return packet[:offset] + bytes([packet[offset] ^ 1]) + packet[offset + 1 :]


def least(quote: Packet) -> bytes:
    return bytes(quote)[: len(quote) - len(quote.payload) + 8]


def with_options(quote: Packet) -> Packet:
    if IP not in quote:
        return quote
    options = finished(Ether() / ip(4, options=RECORD_ROUTE, proto=quote.proto) / bytes(quote.payload))
    return altered(options.payload, id=quote.id, ttl=1)


def extended(quote: Packet | bytes) -> bytes:
    """Padded to 128 bytes, an MPLS label stack behind (RFC 4950)."""
    return bytes(quote).ljust(128, b'\0') + bytes.fromhex('2000 0000 0008 0101 0001 01ff')


# A few, to see what the program does with each. All ways to quote are in WAYS of odd_routers.py: add there.
QUOTES: dict[str, Callable[[Packet], Any]] = {
    'all of it': bytes,
    'no more than every router quotes': least,
    'with TTL 0': lambda quote: altered(quote, ttl=0),
    'with TTL 5': lambda quote: altered(quote, ttl=5),
    'before its source was translated': lambda quote: altered(quote, src=NAT[version_of(quote)]),
    'with IP options': with_options,
    'with a bad IP checksum': lambda quote: altered(quote, chksum=1) if IP in quote else quote,
    'with another DSCP': lambda quote: altered(quote, **{'tos' if IP in quote else 'tc': 4}),
    'with extensions behind': extended,
}
EVERY_QUOTE = pytest.mark.parametrize('quote', list(QUOTES.values()), ids=list(QUOTES))


def row_of(flight: Flight, row: dict[str, str], version: int, inipid: int) -> dict[str, str]:
    """What this row must be, of a reply by the router to this probe. What varies is as the row says."""
    assert int(row['recvcpu']) in range(os.cpu_count() or 1)
    assert flight.sendtime < int(row['recvtime']) < time.monotonic_ns()
    values: dict[str, object] = dict(
        recvcpu=row['recvcpu'],
        seq=flight.seq,
        origseq=flight.origseq,
        sendtime=flight.sendtime,
        recvtime=row['recvtime'],
        latency=int(row['recvtime']) - flight.sendtime,
        dest=flight.dest,
        responder=ROUTER[version],
        outttl=flight.outttl,
        recvttl=61,
        sport=flight.sport,
        dport=flight.dport,
        protocol=flight.protocol,
        outipid=flight.outipid,
        inipid=inipid,
        app='',
        pid='',
    )
    return {name: str(value) for name, value in values.items()}


@BOTH_HOOKS
@pytest.mark.parametrize('ingress, verdict', [('drop', DROP), ('pass', PASS)], ids=['drop', 'pass'])
@BOTH_VERSIONS
@PROTOCOLS
@EVERY_QUOTE
def test_reply(
    load: Load,
    ingress_tc: bool,
    version: int,
    protocol: str,
    quote: Callable[[Packet], Any],
    ingress: str,
    verdict: str,
) -> None:
    programs = load(ingress_tc=ingress_tc, ingress=ingress)
    probe = PROBES[protocol](version)
    flight = flight_of(probe, **KNOWN)
    bystander = flight._replace(sport=1)
    programs.put_in_flight(flight, cwnd=10)  # the flow's socket is on this machine
    programs.put_in_flight(bystander)
    reply = bytes(time_exceeded(version, quote(probe.payload)))

    assert programs.receive(reply) == (verdict, reply)
    assert programs.in_flight() == [bystander]
    [row] = programs.rows()
    assert row_of(flight, row, version, flight.outipid).items() <= row.items()
    assert programs.counters() == {'replies': 1}

    # A second copy answers nothing.
    assert programs.receive(reply) == (PASS, reply)
    assert programs.in_flight() == [bystander]
    assert programs.rows() == []
    assert programs.counters() == {'replies': 1, 'not_ours': 1}


@BOTH_HOOKS
@BOTH_VERSIONS
def test_handshakes_teach_no_distance(load: Load, ingress_tc: bool, version: int) -> None:
    """In the server's name a SYN proxy answers them, and a firewall resets connections, with another TTL."""
    programs = load(ingress_tc=ingress_tc)
    programs.follow(SERVER[version], length=9, reverse=9)
    for flags in 'SA', 'RA', 'R':
        packet = frame(ip(version, src=SERVER[version], dst=CLIENT[version], ttl=63), segment(flags=flags))
        assert programs.receive(packet).verdict == PASS
        assert programs.path(SERVER[version]).distance.length == 9
    programs.receive(frame(ip(version, src=SERVER[version], dst=CLIENT[version], ttl=63), segment()))
    assert programs.path(SERVER[version]).distance.length == 2


@BOTH_HOOKS
@BOTH_VERSIONS
def test_data_tells_the_distance_rather_than_bare_acks(load: Load, ingress_tc: bool, version: int) -> None:
    """A SYN proxy opens each connection with a bare ACK, in the server's name and with a TTL of its own."""
    programs = load(ingress_tc=ingress_tc)
    programs.follow(SERVER[version], length=2, reverse=2)
    for ttl, payload, length in (56, 40, 9), (63, 0, 9), (63, 0, 9), (63, 1, 2):
        header = ip(version, src=SERVER[version], dst=CLIENT[version], ttl=ttl)
        programs.receive(frame(header, segment(), data(payload)))
        assert programs.path(SERVER[version]).distance.length == length


def moved(flight: Flight, probe: Packet, offset: int) -> Packet:
    """The answer to a probe behind a middlebox that adds this to its sequence numbers."""
    quote = probe.payload.copy()
    quote[TCP].seq = (flight.ident + offset) % 2**32
    return time_exceeded(version_of(probe), bytes(quote))


@BOTH_HOOKS
@BOTH_VERSIONS
def test_sequence_numbers_that_a_middlebox_changes(load: Load, ingress_tc: bool, version: int) -> None:
    """Two answers tell what it adds, if no other constant explains them as well. All that follow are matched."""
    programs, probe, offset = load(ingress_tc=ingress_tc), PROBES['TCP'](version), 0xDEADBEEF
    programs.empty('seq_offsets')
    results, now = programs.results, time.monotonic_ns()
    results.unmatched, results.rewrites = UnmatchedAnswers(results.summary), PathRewrites()
    results.rewrites.unmatched = results.unmatched.findings
    known = dict(seq=SEQ, origseq=7, sendtime=now)
    base = flight_of(probe, **known)
    first, second, third, fourth = [
        base._replace(ident=0xFFFFFFF0 + number if number < 16 else number - 16, outttl=ttl)
        for number, ttl in ((0, 3), (1, 4), (5, 3), (23, 4))
    ]
    for flight in first, second, third, fourth:
        programs.put_in_flight(flight)
    assert parsed(results.match_late()) == []  # from here on, user space takes such answers
    for flight in first, third:
        reply = bytes(moved(flight, probe, offset))
        assert programs.receive(reply) == (PASS, reply)
        assert programs.rows() == []
        found = parsed(results.match_late())
        assert len(found) == (0 if flight is first else 2)
    for flight, row in zip((first, third), found):
        assert row_of(flight, row, version, flight.outipid).items() <= row.items()
    assert programs.receive(moved(second, probe, offset)).verdict == DROP
    [row] = programs.rows()
    assert row_of(second, row, version, second.outipid).items() <= row.items()
    assert programs.in_flight() == [fourth]
    # Neither a second copy nor another constant makes a row.
    for ident, other in (second.ident, offset), (fourth.ident, offset + 1), (fourth.ident, offset + 2):
        assert programs.receive(moved(fourth._replace(ident=ident), probe, other)).verdict == PASS
        assert programs.rows() == parsed(results.match_late()) == []
    assert programs.in_flight() == [fourth]
    # One answer is enough if it can quote one probe only. In IPv6, any with the flow's label fits.
    if version == 4:
        single, its = fourth._replace(sport=2), probe.copy()
        its[TCP].sport = single.sport
        programs.put_in_flight(single)
        assert programs.receive(moved(single, its, 2 * offset)).verdict == PASS
        programs.rows()
        [row] = parsed(results.match_late())
        assert row_of(single, row, version, single.outipid).items() <= row.items()
    # If no constant explains the answers, they are told as they are.
    other = fourth._replace(sport=1, outttl=5)
    programs.put_in_flight(other)
    foreign = probe.copy()
    foreign[TCP].sport = other.sport
    for number in 1, 1000:
        assert programs.receive(moved(other, foreign, offset * number)).verdict == PASS
    programs.rows()
    assert not parsed(results.match_late()) and len(programs.expired(1 << 63)) == 2
    texts = [finding.text() for finding in results.rewrites.findings()]
    assert texts[0].endswith(f'the TCP sequence numbers are changed before hop 3 ({ROUTER[version]})')
    assert [text.partition(': ')[2] for text in texts[1:]] == [
        f'2 time exceeded from {ROUTER[version]} quote a probed flow, but the TCP sequence number of no probe: '
        'something changes the numbers before hop 5 or behind it'
    ]


@TRIMMED_OR_NOT
@EVERY_CARRIER
def test_reply_finds_the_probe_that_was_made(load: Load, sent: Packet, notrunc: bool) -> None:
    """As quoted by a router behind a device that finishes checksums, and behind one that does not, and with
    padding and extensions behind the least."""
    programs, version = load(notrunc=notrunc), version_of(sent)
    for finishes, quote in (False, bytes), (True, bytes), (True, least), (True, lambda q: extended(least(q))):
        programs.set_reservation(seq=SEQ, ttl=TTL)
        probe = Ether(programs.run('elf_probe', sent).frame)
        [flight] = programs.in_flight()
        on_the_wire = finished(probe) if finishes and is_unfinished(probe) else probe
        reply = time_exceeded(version, quote(on_the_wire.payload))
        assert programs.receive(reply).verdict == DROP
        assert programs.in_flight() == []
        [row] = programs.rows()
        assert row_of(flight, row, version, flight.outipid).items() <= row.items()


@BOTH_VERSIONS
@TRIMMED_OR_NOT
def test_quote_of_an_unfinished_probe_must_tell_it(load: Load, version: int, notrunc: bool) -> None:
    """All have the same checksum: what tells them apart is in the first 32 bytes of data."""
    programs = load(notrunc=notrunc)
    programs.set_reservation(seq=SEQ, ttl=TTL)
    probe = programs.run('elf_probe', unfinished(frame(ip(version), datagram(), data(40)))).frame
    quote = bytes(Ether(probe).payload)
    needed = len(ip(version)) + 8 + (32 if notrunc else 2)
    for near_miss in quote[: needed - 1], flipped(quote, needed - 1):
        assert programs.receive(time_exceeded(version, near_miss)).verdict == PASS
    assert programs.receive(time_exceeded(version, quote[:needed])).verdict == DROP
    assert len(programs.rows()) == 1


@BOTH_VERSIONS
@PROTOCOLS
def test_each_byte_that_tells_a_probe_counts(load: Load, version: int, protocol: str) -> None:
    programs, probe = load(), PROBES[protocol](version)
    quote, behind = bytes(probe.payload), len(ip(version))
    destination = range(16, 20) if version == 4 else range(24, 40)
    # Not an echo request's code and checksum.
    first_bytes = [0, 4, 5, 6, 7] if protocol == 'ICMP' else range(8)
    for offset in [*destination, *(behind + i for i in first_bytes)]:
        assert_passes(programs, flight_of(probe, **KNOWN), time_exceeded(version, flipped(quote, offset)))


MISQUOTES: dict[str, Callable[[Packet], Any]] = {
    'another protocol': lambda quote: altered(quote, **{'proto' if IP in quote else 'nh': 132}),
    'TCP for UDP, UDP for TCP': lambda quote: altered(
        quote, **{'proto' if IP in quote else 'nh': 6 if UDP in quote else 17}
    ),
    'one byte too few': lambda quote: least(quote)[:-1],
    'the IP header only': lambda quote: bytes(quote)[: len(quote) - len(quote.payload)],
    'nothing': lambda quote: b'',
    'IP header cut': lambda quote: bytes(quote)[:19],
    'IP version 5': lambda quote: altered(quote, version=5),
    'IP version of the other': lambda quote: altered(quote, version=10 - version_of(quote)),
    'IP header of 16 bytes': lambda quote: altered(quote, ihl=4) if IP in quote else b'',
    'IP header of 60 bytes': lambda quote: altered(quote, ihl=15) if IP in quote else b'',
    'shifted by 4 bytes': lambda quote: bytes(4) + bytes(quote),
}


@BOTH_HOOKS
@BOTH_VERSIONS
@PROTOCOLS
@pytest.mark.parametrize('quote', list(MISQUOTES.values()), ids=list(MISQUOTES))
def test_misquotes(
    load: Load, ingress_tc: bool, version: int, protocol: str, quote: Callable[[Packet], Any]
) -> None:
    probe = PROBES[protocol](version)
    programs, reply = load(ingress_tc=ingress_tc), time_exceeded(version, quote(probe.payload))
    assert_passes(programs, flight_of(probe, **KNOWN), reply)


def assert_passes(programs: Programs, flight: Flight, packet: Any) -> None:
    """This packet passes, unchanged, and answers no probe, not even this one."""
    programs.put_in_flight(flight)
    assert programs.receive(packet) == (PASS, bytes(packet))
    assert programs.in_flight() == [flight]
    assert programs.rows() == []
    assert set(programs.counters()) <= {'not_ours'}


WHOLE = {  # what is no time exceeded in transit, and may quote the probe all the same
    'fragment reassembly time exceeded': {4: ICMP(type=11, code=1), 6: ICMPv6TimeExceeded(code=1)},
    'network unreachable': {4: ICMP(type=3, code=0), 6: ICMPv6DestUnreach(code=0)},
    'host unreachable': {4: ICMP(type=3, code=1), 6: ICMPv6DestUnreach(code=3)},
    'port unreachable': {4: ICMP(type=3, code=3), 6: ICMPv6DestUnreach(code=4)},
    'packet too big': {4: ICMP(type=3, code=4, nexthopmtu=1280), 6: ICMPv6PacketTooBig(mtu=1280)},
    'parameter problem': {4: ICMP(type=12), 6: ICMPv6ParamProblem()},
    'redirect': {4: ICMP(type=5, gw=ROUTER[4])},
    'echo reply': {4: ICMP(type=0), 6: ICMPv6EchoReply()},
    'echo request': {4: ICMP(type=8), 6: ICMPv6EchoRequest()},
    'neighbour solicitation': {6: ICMPv6ND_NS(tgt=CLIENT[6])},
    'neighbour advertisement': {6: ICMPv6ND_NA(tgt=ROUTER[6])},
    'router advertisement': {6: ICMPv6ND_RA()},
    "the other version's time exceeded": {4: ICMPv6TimeExceeded(), 6: ICMP(type=11)},
    'UDP': {4: datagram(), 6: datagram()},
    'TCP': {4: segment(), 6: segment()},
}


@BOTH_HOOKS
@pytest.mark.parametrize(
    'version, layer',
    [
        pytest.param(version, layer, id=f'IPv{version}, {name}')
        for name, layers in WHOLE.items()
        for version, layer in layers.items()
    ],
)
def test_everything_else_passes(load: Load, ingress_tc: bool, version: int, layer: Packet) -> None:
    probe = PROBES['TCP'](version)
    packet = from_router(version, layer.copy(), Raw(bytes(probe.payload)))
    assert_passes(load(ingress_tc=ingress_tc), flight_of(probe, **KNOWN), packet)


@BOTH_VERSIONS
@PROTOCOLS
def test_fragments_and_cut_replies_pass(load: Load, version: int, protocol: str) -> None:
    programs, probe = load(ingress_tc=False), PROBES[protocol](version)
    flight = flight_of(probe, **KNOWN)
    reply = time_exceeded(version, least(probe.payload))
    for length in range(14, len(reply)):
        assert_passes(programs, flight, bytes(reply)[:length])
    assert_passes(programs, flight, bytes(reply)[:12] + b'\x08\x06' + bytes(reply)[14:])
    assert_passes(programs, flight, b'\xff' * 6 + bytes(reply)[6:])  # to all
    assert_passes(programs, flight, tagged(0x8100, 0x8100, 0x8100)(bytes(reply)))
    if version == 4:
        assert_passes(programs, flight, frame(altered(reply.payload, flags='MF')))
        assert_passes(programs, flight, frame(altered(reply.payload, flags=0, frag=1)))
    else:
        message = bytes(transport(reply))
        for m, offset in (1, 0), (0, 1):
            fragment = IPv6ExtHdrFragment(nh=58, m=m, offset=offset)
            assert_passes(programs, flight, from_router(6, fragment, Raw(message)))
    assert programs.receive(reply).verdict == DROP


@pytest.mark.parametrize(
    'fields', [dict(options=RECORD_ROUTE), dict(tos=0xC0, flags=0, id=0), dict(ttl=1), dict(ttl=255)]
)
def test_headers_of_replies(load: Load, fields: dict[str, Any]) -> None:
    programs, probe = load(), PROBES['UDP'](4)
    programs.put_in_flight(flight_of(probe, **KNOWN))
    header = ip(4, **{**dict(src=ROUTER[4], dst=CLIENT[4]), **fields})
    reply = frame(header, TIME_EXCEEDED[4].copy(), Raw(bytes(probe.payload)))
    assert programs.receive(reply).verdict == DROP
    [row] = programs.rows()
    assert row['recvttl'] == str(header.ttl)


@BOTH_VERSIONS
@PROTOCOLS
def test_rows_of_unanswered_probes(load: Load, version: int, protocol: str) -> None:
    programs, probe = load(), PROBES[protocol](version)
    old = flight_of(probe, **{**KNOWN, 'sendtime': 4999})
    new = old._replace(ident=old.ident + 1, sendtime=5000)
    for flight in old, new:
        programs.put_in_flight(flight)
    wanted = [
        0,
        SEQ,
        old.origseq,
        -1,
        4999,
        -1,
        SERVER[version],
        '',
        TTL,
        -1,
        old.sport,
        old.dport,
        old.protocol,
        old.outipid,
        -1,
        '',
        '',
        '',
        '',
        '',
        0,
        '',
        '',
        '',
        '::',  # not set
        *[''] * 6,
    ]
    assert programs.expired(5000) == [dict(zip(NAMES, map(str, wanted)))]
    assert programs.in_flight() == [new]


def test_platform_knows_which_helpers_programs_may_call() -> None:
    platform = elfprobe.Platform.detect()
    assert (platform.tick > 0) == (platform.version >= (5, 6, 0))
    assert elfprobe.takes_program([elfprobe.ZERO_R0, elfprobe.EXIT])
    assert not elfprobe.takes_program([(elfprobe.CALL, 0, 0, 0, 9999), elfprobe.ZERO_R0, elfprobe.EXIT])


class Failing:
    """A library, but for one function, which fails with an errno."""

    def __init__(self, library: Any, name: str, error: int) -> None:
        self._library, self._name, self._error = library, name, error

    def __getattr__(self, name: str) -> Any:
        if name != self._name:
            return getattr(self._library, name)

        def fail(*_: Any) -> int:
            ctypes.set_errno(self._error)
            return -1

        return fail


@pytest.mark.parametrize('has_batches', [False, True], ids=['BCC before 0.19', 'Linux before 5.6'])
def test_rows_of_unanswered_probes_without_batches(monkeypatch: pytest.MonkeyPatch, has_batches: bool) -> None:
    flight = flight_of(PROBES['UDP'](6), **KNOWN)
    with Programs(platform=dict(has_batches=has_batches)) as programs:
        failing = Failing(elfprobe.bcc.lib, 'bpf_lookup_batch', errno.EINVAL)
        monkeypatch.setattr(elfprobe.bcc, 'lib', failing)
        for ident in range(5):
            programs.put_in_flight(flight._replace(ident=ident))
        ctypes.set_errno(errno.ENOENT)  # of something before
        assert len(programs.expired(time.monotonic_ns())) == 5
        assert programs.in_flight() == []


@pytest.mark.sample
def test_programs_run_whatever_bcc_declares(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """BCC since 0.31 declares that the options are of a structure of its own."""

    class Other(ctypes.Structure):
        _fields_ = [('sz', ctypes.c_size_t)]

    function = elfprobe.bcc.lib.bpf_prog_test_run_opts
    monkeypatch.setattr(function, 'argtypes', [ctypes.c_int, ctypes.POINTER(Other)])
    packet = frame(ip(4), datagram())
    assert load().receive(packet) == (PASS, bytes(packet))


def test_result_ring_without_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reply is dropped and its probe no longer in flight all the same."""
    monkeypatch.setattr(elfprobe, 'RING_HOLDS', 0)
    monkeypatch.setattr(elfprobe, 'RING_PAGES_MIN', 1)
    probe = PROBES['ICMP'](4)
    with Programs(max_rate=1) as programs:
        for _ in range(60):
            programs.put_in_flight(flight_of(probe, **KNOWN))
            assert programs.receive(time_exceeded(4, probe.payload)).verdict == DROP
            assert programs.in_flight() == []
        rows, lost = len(programs.rows()), programs.counters()['results_lost']
        assert rows > 0 and lost > 0 and rows + lost == 60
        assert programs.counters()['replies'] == 60


def test_results_of_two_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without an extension they are read in their order, all around the ring, and more than once."""
    monkeypatch.setattr(elfprobe, 'RING_HOLDS', 0)
    monkeypatch.setattr(elfprobe, 'RING_PAGES_MIN', 1)
    probe, label = PROBES['TCP'](4), structure(ONE_LABEL)
    plain = time_exceeded(4, probe.payload)
    extended = time_exceeded(4, bytes(probe.payload).ljust(128, b'\0') + label)
    chance, expected, found = random.Random(1), [], []
    with Programs(max_rate=1) as programs:
        for number in range(200):
            has_label = chance.random() < (number % 50) / 50
            expected.append((str(number), '16001/5/1/254' if has_label else ''))
            programs.put_in_flight(flight_of(probe, **{**KNOWN, 'seq': number}))
            assert programs.receive(extended if has_label else plain).verdict == DROP
            if chance.random() < 0.2 or len(expected) - len(found) >= 8 or number == 199:
                found += [(row['seq'], row['mpls']) for row in programs.rows()]
    assert found == expected and len({label for _, label in found}) == 2


# What stands in front of the flow's own headers, and in front of those of replies


def tagged(*tags: int) -> Callable[[bytes], bytes]:
    """VLAN tags of these protocols (IEEE 802.1Q)."""
    return lambda packet: packet[:12] + b''.join(struct.pack('!HH', tag, 5) for tag in tags) + packet[12:]


def wrapped(packet: bytes) -> bytes:
    """In another IPv4 packet, with options, by the protocol that says what is inside."""
    version = packet[14] >> 4
    protocol = 4 if version == 4 else 41
    outer = IP(src='192.0.2.77', dst='192.0.2.78', ttl=64, proto=protocol, options=RECORD_ROUTE)
    return packet[:12] + b'\x08\0' + bytes(outer / Raw(packet[14:]))


def extended_by(*headers: Packet) -> Callable[[bytes], bytes]:
    """Extension headers (RFC 8200)."""

    def extend(packet: bytes) -> bytes:
        (length,), protocol, rest = struct.unpack('!H', packet[18:20]), packet[20], packet[54:]
        chain = IPv6()
        for header in headers:
            chain /= header
        chain.lastlayer().nh = protocol
        built = bytes(chain)
        return (
            packet[:18]
            + struct.pack('!H', length + len(built) - 40)
            + built[6:7]
            + packet[21:54]
            + built[40:]
            + rest
        )

    return extend


FRONTS: dict[str, tuple[int, dict[str, str], Callable[[bytes], bytes]]] = {
    # version, configuration, what puts it in front
    'a VLAN tag': (4, {}, tagged(0x8100)),
    'two VLAN tags': (6, {}, tagged(0x88A8, 0x8100)),
    'a hop-by-hop header': (6, {}, extended_by(IPv6ExtHdrHopByHop())),
    'four extension headers': (
        6,
        {},
        extended_by(
            IPv6ExtHdrHopByHop(),
            IPv6ExtHdrDestOpt(options=[PadN(optdata=bytes(20))]),
            IPv6ExtHdrRouting(),
            IPv6ExtHdrDestOpt(),
        ),
    ),
    'a fragment header of what is whole': (6, {}, extended_by(IPv6ExtHdrFragment())),
    'IPv4 in IPv4': (4, dict(encapsulation='ipinip'), wrapped),
    'IPv6 in IPv4': (6, dict(encapsulation='ip6inip'), wrapped),
    'IPv6 in IPv4, with a VLAN tag': (6, dict(encapsulation='ip6inip'), lambda p: tagged(0x8100)(wrapped(p))),
}


@pytest.mark.parametrize('version, config, front', FRONTS.values(), ids=FRONTS)
@PROTOCOLS
@TRIMMED_OR_NOT
def test_what_is_in_front_stays(
    load: Load, version: int, config: dict[str, str], front: Callable[[bytes], bytes], protocol: str, notrunc: bool
) -> None:
    """The probe is that of the packet without it, with the same in front; its reply finds it, too."""
    sent = bytes(frame(altered(PROBES[protocol](version).payload, ttl=64), data(40)))
    probes, flights = [], []
    for packet, options in (sent, {}), (front(sent), config):
        programs = load(notrunc=notrunc, **options)
        programs.set_reservation(seq=SEQ, ttl=TTL)
        verdict, probe = programs.run('elf_probe', packet)
        assert verdict == TC_ACT_UNSPEC, programs.counters()
        [flight] = programs.in_flight()
        probes.append(probe)
        flights.append(flight._replace(sendtime=0))
    plain, probe = probes
    assert probe == front(plain)
    assert flights[0] == flights[1]
    quote = time_exceeded(version, plain[14:])
    assert programs.receive(front(bytes(quote))).verdict == DROP
    [row] = programs.rows()
    assert (row['responder'], row['outttl']) == (ROUTER[version], str(TTL))


@pytest.mark.parametrize(
    'front',
    [FRONTS[name][2] for name in FRONTS if 'header' in name],
    ids=[name for name in FRONTS if 'header' in name],
)
def test_quotes_with_extension_headers(load: Load, front: Callable[[bytes], bytes]) -> None:
    """As of a probe of a packet that has them."""
    programs, probe = load(), PROBES['TCP'](6)
    programs.put_in_flight(flight_of(probe, **KNOWN))
    assert programs.receive(time_exceeded(6, front(bytes(probe))[14:])).verdict == DROP


GRE_FLAGS = dict(chksum_present=1, key_present=1, seqnum_present=1)


def in_tunnel(*headers: Packet) -> Callable[[bytes], bytes]:
    """Inside another IP packet, which begins with these headers; the last says what is inside."""

    def put_in(packet: bytes) -> bytes:
        outer = headers[0].copy()
        for header in headers[1:]:
            outer /= header
        last, inner_is_4 = outer.lastlayer(), packet[0] >> 4 == 4
        if isinstance(last, GRE):
            last.proto = 0x0800 if inner_is_4 else 0x86DD
        else:
            setattr(last, 'proto' if isinstance(last, IP) else 'nh', 4 if inner_is_4 else 41)
        return bytes(outer / Raw(packet))

    return put_in


OUTER = {4: IP(src='192.0.2.77', dst='192.0.2.78'), 6: IPv6(src='2001:db8::77', dst='2001:db8::78')}
IN_TUNNELS = {
    'IPv4': in_tunnel(OUTER[4]),
    'IPv4 with options': in_tunnel(IP(options=RECORD_ROUTE)),
    'IPv6': in_tunnel(OUTER[6]),
    "IPv6 with ip6tnl's limit": in_tunnel(OUTER[6], IPv6ExtHdrDestOpt(options=[PadN(optdata=bytes(4))])),
    'GRE in IPv4': in_tunnel(OUTER[4], GRE()),
    'GRE in IPv4, with a key': in_tunnel(OUTER[4], GRE(key_present=1, key=7)),
    'GRE in IPv6, with all': in_tunnel(OUTER[6], GRE(**GRE_FLAGS)),
}


def in_ethernet(packet: bytes) -> bytes:
    return bytes(12) + (b'\x08\0' if packet[0] >> 4 == 4 else b'\x86\xdd') + packet


@pytest.mark.parametrize(
    'in_front',
    [
        bytes,
        *IN_TUNNELS.values(),
        *(lambda packet, put_in=put_in: in_ethernet(put_in(packet)) for put_in in IN_TUNNELS.values()),
    ],
    ids=['nothing', *IN_TUNNELS, *(f'Ethernet and {name}' for name in IN_TUNNELS)],
)
@BOTH_VERSIONS
def test_what_xdp_on_a_tunnel_is_shown_in_front(
    load: Load, version: int, in_front: Callable[[bytes], bytes]
) -> None:
    programs, probe = load(frame=Frame.TUNNEL), PROBES['TCP'](version)
    programs.put_in_flight(flight_of(probe, **KNOWN))
    reply = bytes(time_exceeded(version, bytes(probe)[14:]))[14:]
    assert programs.receive(in_front(reply)).verdict == DROP
    [row] = programs.rows()
    assert row['responder'] == ROUTER[version]


# elf_ingress: what packets of the destination teach


@BOTH_VERSIONS
@pytest.mark.parametrize(
    'ttl, length',
    [
        (64, 1),
        (63, 2),
        (60, 5),
        (33, 32),
        (128, 1),
        (120, 9),
        (97, 32),
        (255, 1),
        (250, 6),
        (224, 32),
        (32, 1),
        (30, 3),
        (1, 32),
        (96, 0),
        (65, 0),
        (129, 0),
        (200, 0),
    ],
)
def test_ttl_tells_the_length_of_the_path(load: Load, version: int, ttl: int, length: int) -> None:
    """Systems begin with 32, 64, 128 or 255; what seems farther than MAX_HOPS began with something else."""
    programs = load()
    programs.follow(SERVER[version], max_ttl_tried=4, last_responsive=3, next_due=NEVER)
    packet = frame(ip(version, src=SERVER[version], dst=CLIENT[version], ttl=ttl), segment())
    assert programs.receive(packet) == (PASS, bytes(packet))
    path = programs.path(SERVER[version])
    last = min(3, length - 1) if length else 3
    assert (path.distance.length, path.liveness.last_responsive) == (length, last)
    assert path.pacing.next_due < NEVER
    assert programs.counters() == {}


LESSONS = {  # the TTLs of packets in a row, and the length that they leave behind; at first it is 5
    'the same': ([60], 5),
    'shorter': ([61], 4),
    'longer, once': ([58], 5),
    'longer, 15 times': ([58] * 15, 5),
    'longer, 17 times': ([58] * 17, 7),
    'longer, but not in a row': ([58] * 15 + [60] + [58] * 15, 5),
    'longer, and shorter between': ([58] * 15 + [61] + [58] * 15, 4),
    'longer, 17 times, shorter at last': ([58] * 17 + [60], 5),
    'much longer': ([96] * 17, 0),
}


@pytest.mark.parametrize('ttls, length', LESSONS.values(), ids=LESSONS)
def test_shorter_is_believed_at_once_longer_after_a_while(load: Load, ttls: list[int], length: int) -> None:
    programs = load()
    programs.follow(SERVER[4])
    for ttl in [60, *ttls]:
        programs.receive(frame(ip(4, src=SERVER[4], dst=CLIENT[4], ttl=ttl), segment()))
    assert programs.path(SERVER[4]).distance.length == length


def test_others_teach_nothing(load: Load) -> None:
    programs = load()
    programs.follow(SERVER[4])
    own = frame(ip(4), segment())
    for packet in own, from_router(4, segment()), time_exceeded(4, own.payload):
        programs.receive(packet)
    assert programs.path(SERVER[4]).distance.length == 0


ANSWERS: dict[str, tuple[str, PerVersion]] = {
    'port unreachable': ('UDP', {4: ICMP(type=3, code=3), 6: ICMPv6DestUnreach(code=4)}),
    'administratively prohibited': ('TCP', {4: ICMP(type=3, code=13), 6: ICMPv6DestUnreach(code=1)}),
}


@BOTH_VERSIONS
@pytest.mark.parametrize('protocol, answer', ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize('before, after', [(0, TTL), (TTL + 2, TTL), (TTL, TTL), (TTL - 1, TTL - 1)])
def test_destination_that_answers_a_probe_is_nearer_than_was_thought(
    load: Load, version: int, protocol: str, answer: PerVersion, before: int, after: int
) -> None:
    programs, probe = load(), PROBES[protocol](version)
    flight = flight_of(probe, **KNOWN)
    programs.put_in_flight(flight)
    programs.follow(SERVER[version], length=before, reverse=9, last_responsive=TTL)
    source = ip(version, src=SERVER[version], dst=CLIENT[version], ttl=56)
    packet = frame(source, answer[version].copy(), Raw(bytes(probe.payload)))
    assert programs.receive(packet).verdict == DROP  # the application has not sent what it answers
    assert programs.in_flight() == [flight]
    path = programs.path(SERVER[version])
    assert (path.distance.length, path.liveness.last_responsive) == (after, TTL - 1)
    assert programs.counters() == {'reached': 1}


@pytest.mark.parametrize('length, distances', [(TTL, 0x30), (TTL + 2, 0)], ids=['as long', 'shorter'])
def test_destination_that_answers_from_where_it_was_thought_to_be(load: Load, length: int, distances: int) -> None:
    """How far its last router seems to be stays known: else replies with two TTLs have probes sent to the
    destination again and again, where the router is asked so often that an answer is always due."""
    programs, probe = load(), PROBES['UDP'](4)
    programs.put_in_flight(flight_of(probe, **KNOWN))
    programs.follow(SERVER[4], {TTL - 1: dict(rtt=9, unanswered=1)}, length=length, reverse=9, reply_distances=0x30)
    source = ip(4, src=SERVER[4], dst=CLIENT[4], ttl=56)
    programs.receive(frame(source, ICMP(type=3, code=3), Raw(bytes(probe.payload))))
    path = programs.path(SERVER[4])
    assert (path.distance.length, path.distance.reply_distances) == (TTL, distances)


@BOTH_VERSIONS
@pytest.mark.parametrize('length', [0, 2, 4, 56])
def test_echo_replies_to_a_packet_and_its_probe(load: Load, version: int, length: int) -> None:
    """The packet's may have the number of a probe that waits for a silent router: only their sizes differ."""
    programs = load()
    programs.follow(SERVER[version], length=9, reverse=9)
    programs.set_reservation(seq=SEQ, ttl=TTL)
    probe = Ether(programs.run('elf_probe', frame(ip(version), echo(version), data(length))).frame)
    known = dict(id=0x4142, seq=transport(probe).seq)
    echo_reply = {4: ICMP(type=0, **known), 6: ICMPv6EchoReply(**known)}[version]
    source = ip(version, src=SERVER[version], dst=CLIENT[version], ttl=56)
    own, ours = (frame(source, echo_reply, data(size)) for size in (length, len(transport(probe)) - 8))
    programs.receive(own)
    assert (programs.path(SERVER[version]).distance.length, programs.counters()) == (9, {})
    programs.receive(ours)
    assert (programs.path(SERVER[version]).distance.length, programs.counters()) == (TTL, {'reached': 1})


@BOTH_VERSIONS
@TRIMMED_OR_NOT
def test_echo_reply_to_a_probe(load: Load, version: int, notrunc: bool) -> None:
    """With the payload kept, probe and packet have one number, and the reply is most likely the packet's."""
    programs = load(notrunc=notrunc)
    programs.put_in_flight(flight_of(PROBES['ICMP'](version), **KNOWN, payload_len=0 if notrunc else 2))
    programs.follow(SERVER[version], length=9, reverse=9)
    echo_reply = {4: ICMP(type=0, id=0x4142, seq=0x4344), 6: ICMPv6EchoReply(id=0x4142, seq=0x4344)}
    source = ip(version, src=SERVER[version], dst=CLIENT[version], ttl=56)
    packet = frame(source, echo_reply[version], data(0 if notrunc else 2))
    assert programs.receive(packet).verdict == (PASS if notrunc else DROP)
    assert programs.counters() == ({} if notrunc else {'reached': 1})
    assert programs.path(SERVER[version]).distance.length == (9 if notrunc else TTL)


# Scheduling: which hop is next, and how long it then rests

Hops = Dict[int, Dict[str, int]]
PER_HOP, GLOBAL, EVERY_PACKET = dict(probeint=1000), dict(probeint=1000, rate_global=True), dict(probeint=0)
RESTING = dict(due=NEVER)
ROUTERS = dict(last_responsive=9, farthest_reply=NEVER)  # all hops are, for certain
TURNS: dict[str, tuple[dict[str, Any], dict[str, int], Hops, list[int]]] = {
    # configuration, path, hops; TTLs of the probes that so many packets in a row and a few more carry
    'each hop once in an interval': (PER_HOP, dict(length=5), {}, [1, 2, 3, 4]),
    'one probe in an interval': (GLOBAL, dict(length=5), {}, [1]),
    'one probe in an interval, of the next hop': (GLOBAL, dict(length=5, last_probed=2), {}, [3]),
    'no interval': (EVERY_PACKET, dict(ROUTERS, length=4), {}, [1, 2, 3] * 3),
    'no interval, global': (dict(EVERY_PACKET, rate_global=True), dict(ROUTERS, length=4), {}, [1, 2, 3] * 3),
    'in the middle of a round': (PER_HOP, dict(length=5, last_probed=2), {}, [3, 4, 1, 2]),
    'after a path became shorter': (PER_HOP, dict(length=5, last_probed=9), {}, [1, 2, 3, 4]),
    'a hop that rests': (PER_HOP, dict(length=5), {2: RESTING}, [1, 3, 4]),
    'all hops rest': (PER_HOP, dict(length=3), {1: RESTING, 2: RESTING}, []),
    'nothing before the destination': (PER_HOP, dict(length=1), {}, []),
    'one hop': (EVERY_PACKET, dict(ROUTERS, length=2), {}, [1, 1, 1]),
    'a long path': (PER_HOP, dict(length=32), {}, [*range(1, 32)]),
    'one hop beyond, once': (PER_HOP, dict(length=4, explore=1), {}, [4, 1, 2, 3]),
    'one hop beyond, once, no interval': (
        EVERY_PACKET,
        dict(ROUTERS, length=4, explore=1),
        {},
        [4, 1, 2, 3, 1, 2, 3],
    ),
    'one hop beyond, now and then': (PER_HOP, dict(length=4, seq=19999), {}, [4, 1, 2, 3]),
    'nothing beyond what can be probed': (
        PER_HOP,
        dict(length=33, explore=1, last_probed=31),
        {},
        [32, *range(1, 32)],
    ),
    'length unknown, nothing tried': (PER_HOP, {}, {}, [1]),
    'length unknown, some hops known': (PER_HOP, dict(max_ttl_tried=3), {}, [1, 2, 3]),
    'length unknown, no hop left': (PER_HOP, dict(max_ttl_tried=32, last_probed=30), {}, [31, 32, *range(1, 31)]),
}


@pytest.mark.parametrize('config, path, hops, ttls', TURNS.values(), ids=TURNS)
def test_turns(load: Load, config: dict[str, Any], path: dict[str, int], hops: Hops, ttls: list[int]) -> None:
    programs = load(**config)
    programs.follow(SERVER[4], hops, **path)
    packet = frame(ip(4), segment())
    more = 0 if config.get('probeint') == 0 else 5
    with programs.attached() as send:
        came = [Ether(probe)[IP].ttl for _ in range(len(ttls) + more) for probe in send(packet)]
    assert came == ttls
    flights = sorted(programs.in_flight(), key=lambda flight: flight.sendtime)
    assert [flight.outttl for flight in flights] == ttls
    assert [flight.seq for flight in flights] == [path.get('seq', 0) + i for i in range(len(ttls))]
    assert programs.counters() == ({'probes': len(ttls)} if ttls else {})
    if more:  # the others were not even looked at
        assert programs.path(SERVER[4]).pacing.next_due > time.monotonic_ns()


def test_next_probe_is_due_when_the_interval_is_over(load: Load) -> None:
    packet = frame(ip(4), segment())
    for config in dict(probeint=10), dict(probeint=10, rate_global=True):
        programs = load(**config)
        programs.follow(SERVER[4], length=2, **ROUTERS)
        with programs.attached() as send:
            assert len(send(packet)) == 1
            [flight] = programs.in_flight()
            if 'rate_global' in config:
                assert programs.path(SERVER[4]).pacing.next_due == flight.sendtime + 10 * MS
            sent = flight.sendtime
            while len(programs.in_flight()) < 2:
                without, sent = sent, time.monotonic_ns()
                send(packet)
        assert without < flight.sendtime + 10 * MS <= max(later.sendtime for later in programs.in_flight())


STEPS = {  # horizon, responsive, and for how many ms it has been silent: the next horizon
    'not for long': ((3, 2, 100), 3),
    'long enough': ((3, 2, 600), 4),
    'longer behind a silent one': ((3, 1, 1000), 3),
    'behind a silent one': ((3, 1, 2100), 4),
    'longer still behind two': ((3, 0, 5000), 3),
    'behind two silent ones': ((3, 0, 8100), 4),
    'nearer than what has answered': ((3, 5, 0), 6),
    'no farther': ((32, 31, 60000), 32),
    'asked a little later, by another CPU': ((3, 2, -50), 3),
}


@pytest.mark.parametrize('where, horizon', STEPS.values(), ids=STEPS)
def test_steps_while_the_length_is_unknown(load: Load, where: tuple[int, int, int], horizon: int) -> None:
    farthest, responsive, silent = where
    programs = load()
    hop = dict(unanswered=1, since=time.monotonic_ns() - silent * MS, due=NEVER)
    programs.follow(
        SERVER[4], {farthest: hop}, max_ttl_tried=farthest, last_responsive=responsive, last_probed=horizon - 1
    )
    with programs.attached() as send:
        [probe] = send(frame(ip(4), segment()))
    assert programs.path(SERVER[4]).distance.max_ttl_tried == horizon
    assert Ether(probe)[IP].ttl == (horizon if horizon > farthest else 1)


RECEIVED = {  # what answers a packet, and whether that counts as received in its flow
    'datagram': (datagram(), datagram(sport=4433, dport=40113), {}, 1),
    'first fragment': (datagram(), datagram(sport=4433, dport=40113), dict(flags='MF'), 1),
    'later fragment': (datagram(), datagram(sport=4433, dport=40113), dict(flags=0, frag=100), 0),
    'from another port': (datagram(), datagram(sport=4434, dport=40113), {}, 0),
    'echo reply': (echo(4), ICMP(type=0, id=0x4142, seq=0x4344), {}, 1),
    'echo reply to another': (echo(4), ICMP(type=0, id=0x4143, seq=0x4344), {}, 0),
    'rejection of the echo': (echo(4), ICMP(type=3, code=13) / ip(4, ttl=60) / echo(4), {}, 0),
}


def number_received(programs: Programs) -> int:
    """In all flows without a TCP socket."""
    return sum(flow.received.count for _, flow in programs.kernel.map('flows').items())


@pytest.mark.parametrize('sent, received, fields, count', RECEIVED.values(), ids=RECEIVED)
def test_received_packets_are_counted_by_flow(
    load: Load, sent: Packet, received: Packet, fields: dict[str, Any], count: int
) -> None:
    """Those of flows without a TCP socket. If none comes any more, a firewall may be the reason."""
    programs = load()
    programs.follow(SERVER[4])
    with programs.attached() as send:
        send(frame(ip(4), sent, data(8)))
    before = number_received(programs)
    programs.receive(frame(ip(4, src=SERVER[4], dst=CLIENT[4], ttl=60, **fields), received, data(8)))
    assert number_received(programs) == before + count


def test_ticks_of_two_cpus(load: Load) -> None:
    """Where another CPU has just noted the next tick, nothing was silent meanwhile."""
    programs = load()
    programs.follow(SERVER[4])
    arrived = frame(ip(4, src=SERVER[4], dst=CLIENT[4], ttl=60), segment())
    programs.receive(arrived)
    path = programs.path(SERVER[4])
    path.liveness.last_received = later = path.liveness.last_received + 1000
    programs.set_path(SERVER[4], path)
    programs.receive(arrived)
    path = programs.path(SERVER[4])
    liveness = path.liveness
    assert (liveness.last_received, liveness.outage_start, liveness.outage_end) == (later, 0, 0)


def test_ways_back_that_take_turns(load: Load) -> None:
    """The destination's packets come by two, and so the path seems to be of one length, then of the other;
    the last router's replies fit neither. Few probes go one hop farther."""
    programs = load(probeint=0)
    programs.follow(SERVER[4])
    shorter, longer = (frame(ip(4, src=SERVER[4], dst=CLIENT[4], ttl=ttl), segment()) for ttl in (61, 60))
    came = []
    with programs.attached() as send:
        for _ in range(20):
            for packet in [longer] * 17 + [shorter]:
                programs.receive(packet)
            for _ in range(10):
                for probe in send(frame(ip(4), segment())):
                    ttl = Ether(probe)[IP].ttl
                    came.append(ttl)
                    if ttl < 4:
                        reply = time_exceeded(4, Ether(probe).payload)
                        recvttl = 61 if ttl == 3 else 65 - ttl
                        programs.receive(frame(altered(reply.payload, ttl=recvttl)))
    assert came.count(3) > 20
    assert came.count(4) <= 2


def test_idle_flow_does_not_stall(load: Load) -> None:
    """Its last packet was looked at when it had nothing outstanding, then it is idle, or its packets were
    others' turns, and then the second of two at once is due: it is not to be taken for one of a flow that
    has waited for an acknowledgement all the time."""
    client, server = '127.0.0.3', '127.0.0.4'
    programs = load(probeint=0)
    programs.follow(server, length=2, next_due=NEVER)

    def set_next_due(when: int) -> None:
        programs.set_path(server, programs.new_path(length=2, next_due=when))

    with socket.create_server((server, 0)) as listener, programs.attached(), socket.create_connection(
        listener.getsockname(), source_address=(client, 0)
    ) as ours:
        ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        theirs, _ = listener.accept()
        with theirs:
            ours.send(b'question')
            theirs.recv(100)
            set_next_due(0)
            ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            theirs.send(b'answer')  # which is acknowledged
            wait_until(lambda: programs.counters() == {'probes': 1}, 10, 'a packet without data is looked at')
            ours.recv(100)
            set_next_due(NEVER)
            idle = time.monotonic()
            wait_until(lambda: time.monotonic() > idle + 3.1, 10, 'it would stall')
            theirs.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)
            ours.send(b'another')
            set_next_due(0)
            info = ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
            ours.send(b'question')
            wait_until(lambda: programs.counters() != {'probes': 1}, 10, 'it is looked at again')
    assert struct.unpack_from('=I', info, 24) == (1,)  # unacknowledged: only then could it be mistaken
    assert programs.counters() == {'probes': 2}


REPLIES: dict[str, tuple[dict[str, int], tuple[int, int], dict[str, int]]] = {
    # the path before; TTLs of a probe and its reply; the path afterwards
    'length unknown, the farthest': (
        dict(max_ttl_tried=3, last_responsive=2),
        (3, 62),
        dict(max_ttl_tried=4, last_responsive=3),
    ),
    'length unknown, a nearer one': (
        dict(max_ttl_tried=3, last_responsive=2),
        (2, 63),
        dict(max_ttl_tried=3, last_responsive=2),
    ),
    'length unknown, the last possible': (
        dict(max_ttl_tried=32),
        (32, 30),
        dict(max_ttl_tried=32, last_responsive=32),
    ),
    'a router before the last': (dict(length=9, last_responsive=8), (3, 62), dict(length=9, last_responsive=8)),
    'first answer of that far': (dict(length=9, last_responsive=3), (5, 60), dict(length=9, last_responsive=5)),
    'farther than the path was thought to be long': (
        dict(length=5, reply_distances=1 << 4),
        (5, 60),
        dict(length=6, explore=1, last_responsive=5, reply_distances=0),
    ),
    'last router, one nearer than the destination': (
        dict(length=5, reverse=5),
        (4, 61),
        dict(length=5, explore=0, reply_distances=1 << 4),
    ),
    'last router, as far as the destination': (
        dict(length=5, reverse=5),
        (4, 60),
        dict(length=5, explore=1, reply_distances=1 << 5),
    ),
    'last router, as far as before': (
        dict(length=5, reverse=5, reply_distances=0x30),
        (4, 60),
        dict(length=5, explore=0, reply_distances=0x30),
    ),
}


@pytest.mark.parametrize('before, ttls, after', REPLIES.values(), ids=REPLIES)
def test_replies_teach(load: Load, before: dict[str, int], ttls: tuple[int, int], after: dict[str, int]) -> None:
    programs = load(probeint=10)
    outttl, recvttl = ttls
    now = time.monotonic_ns()
    hop = dict(unanswered=2, due=NEVER, since=1, rtt=9)
    programs.follow(SERVER[4], {outttl: hop}, **before, next_due=NEVER)
    probe = frame(ip(4, ttl=outttl), segment())
    programs.put_in_flight(flight_of(probe, sendtime=now - 5 * MS))
    reply = time_exceeded(4, probe.payload)
    reply = frame(altered(reply.payload, ttl=recvttl))
    assert programs.receive(reply).verdict == DROP
    path = programs.path(SERVER[4])
    assert {name: get_field(path, name) for name in after} == after
    hop = path.hops[outttl]
    [row] = programs.rows()
    received = int(row['recvtime'])
    assert (hop.unanswered, hop.since) == (0, received)
    assert hop.rtt == pytest.approx(int(row['latency']) / 1000, abs=1)
    assert hop.due == path.pacing.next_due == received + 10 * MS


@pytest.mark.parametrize(
    'rests, before, after', [(0, 0, 0), (1, 0, 1), (2, 0, 0), (2, 4, 5), (3, 4, 4), (4, 12, 12)]
)
def test_false_alarms_are_counted(load: Load, rests: int, before: int, after: int) -> None:
    """Answers after the first rests: so it had lost single packets."""
    programs, probe = load(), PROBES['UDP'](4)
    hop = dict(unanswered=rests, level=rests, rtt=9, false_alarms=before)
    programs.follow(SERVER[4], {TTL: hop}, length=9, last_responsive=TTL)
    programs.put_in_flight(flight_of(probe, **{**KNOWN, 'sendtime': time.monotonic_ns()}))
    assert programs.receive(time_exceeded(4, probe.payload)).verdict == DROP
    assert programs.path(SERVER[4]).hops[TTL].backoff.false_alarms == after


def test_replies_do_not_hasten_the_next_of_all_probes(load: Load) -> None:
    programs = load(probeint=1000, rate_global=True)
    programs.follow(SERVER[4], length=9, last_sent=time.monotonic_ns(), next_due=NEVER)
    probe = frame(ip(4, ttl=3), segment())
    programs.put_in_flight(flight_of(probe))
    assert programs.receive(time_exceeded(4, probe.payload)).verdict == DROP
    path = programs.path(SERVER[4])
    assert path.pacing.next_due == path.pacing.last_sent + SECOND


@pytest.mark.parametrize(
    'hop, woken',
    [
        (dict(unanswered=9, level=3, rtt=9, since=10 * SECOND), {5, 6}),
        (dict(unanswered=9, level=3, rtt=9, since=30 * SECOND), set()),  # they were silent before
        (dict(unanswered=9, level=0, rtt=9, since=10 * SECOND), set()),  # it was merely late
        (dict(unanswered=1, level=0, rtt=0, since=10 * SECOND), {5, 6}),  # its first answer
    ],
    ids=['together', 'not together', 'late', 'first'],
)
def test_hops_behind_one_that_answers_again_are_tried_again(
    load: Load, hop: dict[str, int], woken: set[int]
) -> None:
    """Those that fell silent together with it, lest they sleep on when the way is open again; once."""
    programs = load(probeint=0)
    resting = dict(unanswered=3, level=3, state=1, due=NEVER)
    programs.follow(
        SERVER[4],
        {
            4: hop,
            5: dict(resting, since=10 * SECOND + SECOND // 2),
            6: dict(resting, since=11 * SECOND - 1),
            7: dict(resting, since=8 * SECOND),
        },
        length=9,
        last_responsive=3,
    )
    probe = frame(ip(4, ttl=4), segment())
    programs.put_in_flight(flight_of(probe))
    programs.receive(time_exceeded(4, probe.payload))
    with programs.attached() as send:
        came = [Ether(probe)[IP].ttl for _ in range(30) for probe in send(frame(ip(4), segment()))]
    assert sorted(ttl for ttl in came if ttl in (5, 6, 7)) == sorted(woken)


def test_hops_rest_no_more_when_the_destination_is_heard_again(load: Load) -> None:
    """Those that fell silent when it did, or later; after packets without a gap none."""
    programs = load(probeint=0)
    now = time.monotonic_ns()
    resting = dict(unanswered=3, level=3, state=1, due=NEVER)
    packet = frame(ip(4, src=SERVER[4], dst=CLIENT[4], ttl=61), segment())
    for gap, woken in (5, {2}), (0, set()):
        programs.clear()
        programs.follow(
            SERVER[4],
            {1: dict(resting, since=now - 90 * SECOND), 2: dict(resting, since=now - 5 * SECOND)},
            length=4,
            reverse=4,
            last_responsive=3,
        )
        assert programs.receive(packet).verdict == PASS  # tells the tick
        tick = programs.platform.tick
        path = programs.path(SERVER[4])
        path.liveness.last_received -= gap * SECOND // tick
        programs.set_path(SERVER[4], path)
        assert programs.receive(packet).verdict == PASS
        with programs.attached() as send:
            came = [Ether(probe)[IP].ttl for _ in range(20) for probe in send(frame(ip(4), segment()))]
        assert {ttl for ttl in came if ttl < 3} == woken


def test_routers_before_one_that_answers_rest_no_longer_than_routers(load: Load) -> None:
    programs = load(probeint=0)
    resting = dict(unanswered=3, level=3, state=1, due=NEVER, since=SECOND)
    programs.follow(
        SERVER[4],
        {2: resting, 3: resting, 5: dict(unanswered=1, rtt=9, since=9 * SECOND), 6: resting},
        length=9,
        last_responsive=1,
    )
    probe = frame(ip(4, ttl=5), segment())
    programs.put_in_flight(flight_of(probe))
    programs.receive(time_exceeded(4, probe.payload))
    with programs.attached() as send:
        came = [Ether(probe)[IP].ttl for _ in range(20) for probe in send(frame(ip(4), segment()))]
    assert {2, 3} <= set(came)
    assert 6 not in came


def test_replies_of_a_longer_way_that_is_no_more(load: Load) -> None:
    """To probes that left before the way became shorter."""
    for sent, length in (SECOND, 4), (3 * SECOND, 6):
        programs = load()
        programs.follow(SERVER[4], length=4, reverse=4, last_responsive=3, changed_at=2 * SECOND)
        probe = frame(ip(4, ttl=5), segment())
        programs.put_in_flight(flight_of(probe, sendtime=sent))
        assert programs.receive(time_exceeded(4, probe.payload)).verdict == DROP
        assert len(programs.rows()) == 1
        assert programs.path(SERVER[4]).distance.length == length


def test_reply_for_a_destination_no_longer_of_interest(load: Load) -> None:
    programs, probe = load(), PROBES['TCP'](4)
    programs.put_in_flight(flight_of(probe, **KNOWN))
    assert programs.receive(time_exceeded(4, probe.payload)).verdict == DROP
    assert len(programs.rows()) == 1


def test_most_probes_per_second(load: Load) -> None:
    """Over all destinations; what was over the budget is not lost, but tried again by the next packet."""
    programs = load(max_rate=1)
    for version in 4, 6:
        programs.follow(SERVER[version], length=9)
    with programs.attached() as send:
        assert [len(send(frame(ip(version), segment()))) for version in (4, 4, 6)] == [1, 0, 0]
    assert programs.counters() == {'probes': 1, 'over_max_rate': 2}
    assert [programs.path(SERVER[version]).pacing.last_probed for version in (4, 6)] == [1, 0]


def test_probes_expire_in_portions(load: Load) -> None:
    """So that user space can renew the lease meanwhile, however many are in flight."""
    programs = load(max_rate=10000)
    in_flight, number = programs.kernel.map('in_flight'), 3 * elfprobe.BATCH
    for ident in range(number):
        in_flight.put(
            struct.pack('=16sHHII', elfprobe.pack_address(SERVER[4]), 1, 2, 17, ident), in_flight.new(sendtime=1)
        )
    portions = [rows.count('\n') for rows in programs.results.expire(2)]
    assert sum(portions) == number
    assert max(portions) <= elfprobe.BATCH


def test_most_probes_at_once(load: Load) -> None:
    """A hundredth of a second's worth; then one by one, as the rate allows."""
    programs, seconds = load(max_rate=1000), 0.1
    addresses = [f'198.51.100.{i}' for i in range(1, 101)]
    frames = [frame(ip(4, dst=address), segment()) for address in addresses]
    packets = [bytes(one) for one in frames]
    for address, one in zip(addresses, frames):
        programs.follow(address, length=33)
        programs.open_foreign_flow(one)
    with programs.attached() as send:
        start, elapsed, lost = time.monotonic(), 0.0, 0.0
        for packet in itertools.cycle(packets):
            send(packet)
            before, elapsed = elapsed, time.monotonic() - start
            lost += max(elapsed - before - 0.01, 0)  # as nobody sent
            if elapsed > seconds:
                break
    count = programs.counters()
    assert count['over_max_rate'] > 0
    assert 1000 * (elapsed - lost) * 0.8 < count['probes'] <= 1000 * (elapsed + 0.01)


# Packets that nobody would send


def ip_header(version: int, of: bytes) -> tuple[int, int, bytes, bool, bool] | None:
    """Length, extension headers included, protocol, destination, and whether it is of a fragment, and of
    a later one; None: of nothing that is understood."""
    if version == 4:
        if len(of) < 20 or of[0] >> 4 != 4 or not 20 <= of[0] % 16 * 4 <= len(of):
            return None
        fragment = of[6] << 8 & 0x3F00 | of[7]
        return of[0] % 16 * 4, of[9], of[16:20], fragment > 0, fragment & 0x1FFF > 0
    if len(of) < 40 or of[0] >> 4 != 6:
        return None
    at, protocol, fragment = 40, of[6], 0
    for _ in range(4):
        if protocol not in (0, 43, 44, 60):
            break
        if len(of) < at + 4 or (protocol == 43 and of[at + 3]):
            return None
        if protocol == 44:
            fragment = of[at + 2] << 8 | of[at + 3] & 0xF9
        protocol, at = of[at], at + (8 if protocol == 44 else 8 + 8 * of[at + 1])
    return (at, protocol, of[24:40], fragment > 0, fragment > 1) if at - 40 < 1024 else None


def answers(packet: bytes) -> tuple[bytes, int, bytes] | None:
    """Whose probe a packet answers, by the RFCs and by hand: destination, protocol, and 8 bytes; None: none.
    For echo requests those are without type, code and checksum, which do not tell them."""
    at = 12
    while at < 20 and packet[at : at + 2] in (b'\x81\0', b'\x88\xa8'):
        at += 4
    version = {b'\x08\0': 4, b'\x86\xdd': 6}.get(packet[at : at + 2], 0)
    if packet[0] & 1 or not version:
        return None
    time_exceeded_is, icmp_is, echo_is = {4: (11, 1, 8), 6: (3, 58, 128)}[version]
    outer = ip_header(version, packet[at + 2 :])
    message = packet[at + 2 + outer[0] :] if outer else b''
    if not outer or outer[1] != icmp_is or outer[3] or outer[2][0] >= (224 if version == 4 else 255):
        return None
    if len(message) < 8 or message[:2] != bytes([time_exceeded_is, 0]):
        return None
    inner = ip_header(version, message[8:])
    quoted = message[8 + inner[0] :][:8] if inner else b''
    if not inner or inner[4] or len(quoted) < 8:
        return None
    if inner[1] == icmp_is:
        return (inner[2], inner[1], quoted[4:]) if quoted[0] == echo_is else None
    return (inner[2], inner[1], quoted) if inner[1] in (6, 17) else None


ODD_BYTES = bytes([0, 1, 2, 4, 6, 8, 11, 17, 20, 40, 44, 58, 0x45, 0x46, 0x4F, 0x60, 0x80, 0xFF])


def mutated(chance: random.Random, packet: bytes) -> bytes:
    """With bytes changed, most of them where headers are; put in, taken out or said twice, which makes
    options, other headers and nested ones of what follows; or the end cut off."""
    pick = chance.random
    changed, end = bytearray(packet), len(packet)
    for _ in range(1 + int(pick() * 4)):
        at = int(pick() * min(end, 54 if pick() < 0.5 else 120))
        changed[at] = ODD_BYTES[int(pick() * len(ODD_BYTES))] if pick() < 0.8 else int(pick() * 256)
    kind = pick()
    if kind < 0.6:
        return bytes(changed)
    at, size = 14 + 2 * int(pick() * 40), 4 * int(1 + pick() * 10)
    if kind < 0.7:
        changed[at:at] = bytes(size)
    elif kind < 0.8:
        changed[at:at] = changed[at : at + size]
    elif kind < 0.9:
        del changed[at : at + size]
    else:
        del changed[14 + int(pick() * end) :]
    return bytes(changed) if len(changed) >= 14 else packet


# In all, of what arrives and of what leaves. A million take some minutes.
MUTATIONS = int(os.environ.get('ELFPROBE_MUTATIONS', '100000'))


@BOTH_HOOKS
@BOTH_VERSIONS
@PROTOCOLS
def test_mutated_replies(load: Load, ingress_tc: bool, version: int, protocol: str) -> None:
    """No row without its probe, and no verdict but pass for what answers none."""
    programs, probe = load(ingress_tc=ingress_tc), PROBES[protocol](version)
    flight = flight_of(probe, **KNOWN)
    chance = random.Random(f'{version} {protocol}')
    reply = bytes(time_exceeded(version, probe.payload))
    wanted = answers(reply)
    assert wanted
    put_in_flight = programs.putter(flight)
    put_in_flight()
    matches, count = 0, MUTATIONS // 12 + 1
    for number in range(count):
        packet = mutated(chance, reply)
        match = answers(packet) == wanted
        try:
            received = programs.receive(packet)
        except OSError:  # newer kernels run no TC program on what is shorter than its IP header
            assert ingress_tc and not match
            continue
        assert received == (DROP if match else PASS, packet), (number, packet.hex())
        if match:
            put_in_flight()  # which it is no more
            matches += 1
        if number % 5000 == 0:  # the ring has room for more
            assert len(programs.rows()) == matches
            matches = 0
    assert len(programs.rows()) == matches
    assert programs.in_flight() == [flight]
    replies = programs.counters()['replies']
    assert count / 20 < replies < count * 19 / 20  # else this test would show little


@TRIMMED_OR_NOT
@BOTH_VERSIONS
@PROTOCOLS
def test_mutated_packets_leave_unchanged(load: Load, version: int, protocol: str, notrunc: bool) -> None:
    """And nothing but what may carry a probe becomes one, which is then in flight."""
    programs = load(notrunc=notrunc, probeint=0, max_rate=10**6)
    chance = random.Random(f'{version} {protocol} {notrunc}')
    original = frame(altered(PROBES[protocol](version).payload, ttl=64))
    sent = bytes(original)
    server = socket.inet_pton(socket.AF_INET if version == 4 else socket.AF_INET6, SERVER[version])
    dest = slice(30, 34) if version == 4 else slice(38, 54)
    probes, count = 0, MUTATIONS // 12 + 1
    with programs.attached() as send:
        for number in range(count):
            if number % 100 == 0:  # duplicates are soon the same as one in flight, and hops late
                assert len(programs.in_flight()) == programs.counters().get('probes', 0)
                probes += len(programs.in_flight())
                programs.clear()
                programs.follow(SERVER[version], length=9, last_responsive=9, farthest_reply=NEVER)
            packet = mutated(chance, sent)
            programs.open_foreign_flow(original)
            try:
                came = send(packet)
            except OSError:  # newer kernels run no program on what is shorter than its IP header
                continue
            if not came:
                continue
            [probe] = came
            assert probe[dest] == server, (number, packet.hex())
            segment = probe[54:] if version == 6 else probe[14 + probe[14] % 16 * 4 :]
            if probe[20 if version == 6 else 23] == 6:
                assert segment[13] & 7 == 0, (number, packet.hex())  # SYN, FIN, RST
    assert probes > count / 40  # else this test would show little


# Hooks

COUNTING_HOOKS = """\
BPF_ARRAY(calls, u64, 8);

static inline int count(int which)
{
	calls.increment(which);
	return 0;
}

static inline int elf_v4_icmp_beforesend(struct __sk_buff *ctx) { return count(0); }
static inline int elf_v4_tcp_beforesend(struct __sk_buff *ctx) { return count(1); }
static inline int elf_v4_udp_beforesend(struct __sk_buff *ctx) { return count(2); }
static inline int elf_v6_icmp_beforesend(struct __sk_buff *ctx) { return count(3); }
static inline int elf_v6_tcp_beforesend(struct __sk_buff *ctx) { return count(4); }
static inline int elf_v6_udp_beforesend(struct __sk_buff *ctx) { return count(5); }
static inline void elf_v4_afterrecv(struct xdp_md *ctx) { count(6); }
static inline void elf_v6_afterrecv(struct xdp_md *ctx) { count(7); }
"""

SEEING_HOOKS = """\
struct seen {
	u32 length;
	u8 ttl;
};

BPF_QUEUE(probes, struct seen, 16);

int elf_v4_udp_beforesend(struct __sk_buff *ctx)
{
	void *data = (void *)(long)ctx->data, *data_end = (void *)(long)ctx->data_end;
	struct iphdr *ip = data + sizeof(struct ethhdr);
	struct seen seen = { .length = ctx->len };

	if ((void *)(ip + 1) > data_end)
		return -1;
	seen.ttl = ip->ttl;
	probes.push(&seen, 0);
	return 0;
}
"""

DROPPING_HOOKS = '''\
static inline int elf_v4_tcp_beforesend(struct __sk_buff *ctx)
{
	return -1;
}
'''
BROKEN_HOOKS = DROPPING_HOOKS.replace('-1', 'nothing')
HOOKS_THAT_MENTION_ANOTHER = '/* elf_v6_udp_beforesend is left out. */\n' + DROPPING_HOOKS


@pytest.fixture
def hooked(tmp_path: Any) -> Iterator[Callable[[str], Programs]]:
    """Loads programs with these hooks compiled in."""
    with ExitStack() as stack:

        def hooked(text: str) -> Programs:
            (tmp_path / 'hooks.c').write_text(text)
            config = dict(hooks=str(tmp_path / 'hooks.c'), max_rate=100, probeint=0)
            programs = stack.enter_context(Programs(**config))
            programs.clear()
            return programs

        yield hooked


Hooked = Callable[[str], Programs]


def counts(programs: Programs) -> list[int]:
    return [count.value for _, count in programs.kernel.map('calls').items()]


def test_each_hook_is_called_for_its_packets(hooked: Hooked) -> None:
    programs = hooked(COUNTING_HOOKS)
    programs.set_reservation(seq=SEQ, ttl=TTL)
    calls = []
    for version in 4, 6:
        layers = [echo(version)], [segment()], [datagram()]
        probes = [programs.run('elf_probe', frame(ip(version), *layer)).frame for layer in layers]
        calls += [1, 1, 1]
        assert counts(programs)[:6] == calls + [0] * (6 - len(calls))
        for probe in probes:
            for _ in range(2):  # the second answers nothing: no hook
                programs.receive(time_exceeded(version, bytes(probe)[14:]))
    assert counts(programs) == [1] * 6 + [3, 3]


def test_hook_sees_the_complete_probe_and_others_are_not_needed(hooked: Hooked) -> None:
    programs = hooked(SEEING_HOOKS)
    for version in 4, 6:
        programs.follow(SERVER[version], length=9)
    with programs.attached() as send:
        probes = [send(frame(ip(version), datagram(), data(500))) for version in (4, 6)]
    assert [len(probe) for probe in probes] == [1, 1]
    seen = programs.kernel.map('probes')
    assert list(seen.plain_items()) == [{'value': {'length': len(probes[0][0]), 'ttl': 1}}]
    assert list(seen.plain_items()) == []


def test_hook_drops_a_probe_and_only_the_probe(hooked: Hooked) -> None:
    programs = hooked(DROPPING_HOOKS)
    programs.follow(SERVER[4], length=9)
    with programs.attached() as send:
        assert send(frame(ip(4), segment())) == []
        assert programs.counters() == {'hook_dropped': 1}
        assert programs.in_flight() == []
        assert len(send(frame(ip(4), datagram()))) == 1
    assert programs.counters() == {'hook_dropped': 1, 'probes': 1}


def test_hooks_that_do_not_compile(tmp_path: Any) -> None:
    path = tmp_path / 'broken hooks.c'
    path.write_text(BROKEN_HOOKS)
    with pytest.raises(elfprobe.Failure) as raised:
        Programs(hooks=str(path))
    assert f"{path}:3:9: error: use of undeclared identifier 'nothing'" in str(raised.value)
    assert raised.value.status == 1


def test_hook_that_is_only_mentioned(hooked: Hooked) -> None:
    programs = hooked(HOOKS_THAT_MENTION_ANOTHER)
    programs.follow(SERVER[6], length=9)
    with programs.attached() as send:
        assert len(send(frame(ip(6), datagram()))) == 1
