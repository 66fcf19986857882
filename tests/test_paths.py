"""elfprobe on paths of real routers: what leaves, what comes back, what the rows make of it.

    client - r1 - r2 - r3 - r4 - server        a probe with TTL k ends at lab.hop(version, k)

Both families are measured in each run. A packet that tcpdump has seen is the truth; rows are compared
with it one by one, in both directions.
"""

from __future__ import annotations

import csv
import os
import re
import socket
import subprocess
import sys
import time
from bisect import bisect
from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from typing import Iterator, NamedTuple

import pytest

from lab import (
    NETNS,
    PATIENCE,
    ROUTER_SYSCTLS,
    CommandFailed,
    Host,
    Lab,
    address,
    attach,
    batch,
    end,
    nft_table,
    wait_until,
)
from runs import (
    CLOSED,
    ECHO_TYPES,
    HOPS,
    ICMP,
    ICMPV6,
    OLD_COMMAND,
    PREEMPTIBLE_COMMAND,
    PROBES,
    TCP,
    TIME_EXCEEDED,
    UDP,
    VERSIONS,
    Packet,
    Row,
    Run,
    both,
    check_delays,
    elfprobe,
    inside,
    ip_packets,
    numbered,
    realtime_offset,
    tcp_connected,
    time_exceeded_received,
)

pytestmark = pytest.mark.root

MS = 1_000_000  # ns
CLOCKS_AGREE = 10 * PATIENCE * MS  # between two readings around the same event; microseconds, as a rule
TCP_PSH, TCP_ACK = 0x08, 0x10
MSS = {4: 1500 - 20 - 32, 6: 1500 - 40 - 32}  # with the timestamp option
EXPLORE_EVERY = 20000  # one probe in so many looks whether the path has become longer
SEQ_BACK = 2048  # how far below its packet's TCP sequence number a probe's may be
TOS = 0x48  # a DSCP that nobody uses by default
UPLOAD, DOWNLOAD, STREAM = 5210, 5220, 5230  # ports; the version is added


# Traffic


def client(lab: Lab, *cmd: str) -> subprocess.Popen[str]:
    return lab.client.popen(*cmd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def ping(lab: Lab, version: int, *options: str) -> subprocess.Popen[str]:
    return client(lab, 'ping', '-nq', *options, lab.server_address(version))


def iperf3(lab: Lab, version: int, port: int, *options: str) -> subprocess.Popen[str]:
    return client(lab, 'iperf3', '-p', str(port), *options, '-c', lab.server_address(version))


def output(process: subprocess.Popen[str]) -> str:
    """What a command said until its end."""
    said: str = process.communicate(timeout=30)[0]
    if process.returncode:
        raise CommandFailed(f'{process.args!r}: exit status {process.returncode}\n{said}')
    return said


@contextmanager
def pinging(lab: Lab, *options: str) -> Iterator[None]:
    """Pings of both families, all the time. At intervals below 10 ms ping would keep a CPU busy."""
    with ExitStack() as stack:
        for version in VERSIONS:
            stack.callback(end, ping(lab, version, *options))
        yield


def udp_socket(host: Host, version: int, port: int = 0) -> socket.socket:
    family, level, tos, recvttl = {
        4: (socket.AF_INET, socket.IPPROTO_IP, socket.IP_TOS, 12),  # IP_RECVTTL, linux/in.h
        6: (socket.AF_INET6, socket.IPPROTO_IPV6, socket.IPV6_TCLASS, socket.IPV6_RECVHOPLIMIT),
    }[version]
    with inside(host):
        udp = socket.socket(family, socket.SOCK_DGRAM)
    udp.setsockopt(level, tos, TOS)
    udp.setsockopt(level, recvttl, 1)
    udp.bind(('', port))
    return udp


def stream(lab: Lab, version: int, count: int = 300) -> list[tuple[bytes, int]]:
    """Send numbered UDP packets; what arrives at the server, in that order: payload and TTL."""
    port = STREAM + version
    arrived: list[tuple[bytes, int]] = []
    with udp_socket(lab.client, version) as sender, udp_socket(lab.server, version, port) as receiver:
        sender.connect((lab.server_address(version), port))
        receiver.setblocking(False)

        def receive() -> bool:
            try:
                while True:
                    payload, ((_, _, ttl),), *_ = receiver.recvmsg(2000, 100)
                    arrived.append((payload, int.from_bytes(ttl, sys.byteorder)))
            except BlockingIOError:
                return len(arrived) >= number

        for number in range(1, count + 1):
            sender.send(numbered(number))
            if number % 10 == 0:
                wait_until(receive, 5, f'{number} packets have arrived')
    return arrived


@contextmanager
def dropping(host: Host, rules: str) -> Iterator[None]:
    """nft rules for what the host itself sends."""
    with nft_table(host, f'chain output {{ type filter hook output priority 0; {rules}; }}'):
        yield


# Rows and packets


class Measured(NamedTuple):
    """A run with a probe for every packet of three protocols, and what was seen at r1 meanwhile."""

    truncated: bool
    offload: bool
    rows: list[Row]
    carriers: list[Packet]  # the applications' own packets
    probes: list[Packet]
    replies: list[Packet]
    offset: int  # CLOCK_REALTIME - CLOCK_MONOTONIC, ns
    streams: dict[int, list[tuple[bytes, int]]]
    pings: dict[int, str]

    def cell(self, version: int, protocol: int, packets: list) -> list:
        """Those of a list of rows or packets that belong to a family and protocol."""
        dest = address(version, 5, 2)
        return [packet for packet in packets if packet.dest == dest and packet.protocol == protocol]


@pytest.fixture(scope='module', params=list(product(('truncated', 'whole'), ('offload', 'finished'))), ids='-'.join)
def measured(lab4: Lab, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    truncated, offload = request.param[0] == 'truncated', request.param[1] == 'offload'
    both_ends = ' or '.join(f'(host {server} and not src {server})' for server in both(lab4))
    options = ['-p', '0', *([] if truncated else ['-T'])]
    ports = [port + version for port in (UPLOAD, DOWNLOAD) for version in VERSIONS]
    seen_at_r1 = dict(filter=f'{both_ends} or {TIME_EXCEEDED}', snaplen=2000)  # of GSO packets not all
    bulk = ['-t', str(PATIENCE), '-b', f'{4000 // PATIENCE}K', '-l', '3000', '-S', str(TOS)]
    lab4.set_checksum_offload(offload)
    try:
        with lab4.iperf3_server(*ports), lab4.routers[0].capture(**seen_at_r1) as seen, elfprobe(
            lab4, *options, *both(lab4), cwd=tmp_path_factory.mktemp('measured')
        ) as run:
            for version in VERSIONS:  # from then on the path's length is known, and its hops are proven
                output(ping(lab4, version, '-c9', '-i.05'))
            wait_until(lambda: len(latest(run.rows())) == 2 * len(HOPS), 10, 'all hops are proven')
            settled = time.monotonic_ns()
            often = f'-i{0.005 * PATIENCE:g}'
            pings = {version: ping(lab4, version, '-c200', often, '-Q', str(TOS)) for version in VERSIONS}
            bulks = [iperf3(lab4, version, UPLOAD + version, *bulk) for version in VERSIONS]
            bulks += [iperf3(lab4, version, DOWNLOAD + version, '-R', *bulk) for version in VERSIONS]
            streams = {version: stream(lab4, version) for version in VERSIONS}
            for process in bulks:
                output(process)
            said = {version: output(pings[version]) for version in VERSIONS}
            assert run.stop() == 0
    finally:
        lab4.set_checksum_offload(True)
    offset = realtime_offset()
    packets = [packet for packet in ip_packets(seen) if packet.time > settled + offset]
    rows = [row for row in run.rows() if row.sendtime > settled]
    replies = [packet for packet in packets if packet.is_time_exceeded]
    carriers = [packet for packet in packets if not packet.is_time_exceeded and packet.ttl > 32]
    probes = [packet for packet in packets if not packet.is_time_exceeded and packet.ttl <= 32]
    return Measured(truncated, offload, rows, carriers, probes, replies, offset, streams, said)


CELLS = pytest.mark.parametrize('version, protocol', [
    (4, ICMP), (4, TCP), (4, UDP),
    (6, ICMPV6), (6, TCP), (6, UDP),
])  # fmt: skip


def pairs(rows: list[Row], probes: list[Packet], offset: int) -> list[tuple[Row, Packet]]:
    """Each row with the captured probe that it stands for: same identity, order and time."""
    sent, seen = defaultdict(list), defaultdict(list)
    for row in rows:
        sent[row.flow + (row.outttl, row.outipid)].append(row)
    for probe in probes:
        seen[probe.flow + (probe.ttl, probe.ip_id)].append(probe)
    assert {key: len(some) for key, some in sent.items()} == {key: len(some) for key, some in seen.items()}
    found = []
    for key, some in sent.items():
        found += zip(sorted(some, key=lambda row: row.sendtime), sorted(seen[key]))
    check_delays([probe.time - (row.sendtime + offset) for row, probe in found], CLOCKS_AGREE, CLOCKS_AGREE)
    return found


def blanked(data: bytes, *ranges: tuple[int, int]) -> bytes:
    for start, stop in ranges:
        data = data[:start] + bytes(stop - start) + data[stop:]
    return data


def comparable(probe: Packet, truncated: bool) -> tuple[bytes, bytes]:
    """IP header and the rest, without what tells a probe from its packet and other probes."""
    header = blanked(probe.header, *{4: ((2, 4), (8, 9), (10, 12)), 6: ((4, 6), (7, 8))}[probe.version])
    segment = probe.segment
    if probe.protocol == TCP:
        segment = blanked(segment, (4, 8), (16, 18))
    elif truncated:
        segment = blanked(segment, (4 if probe.protocol == UDP else 6, 10))
    if probe.protocol == TCP and not truncated:
        # The kernel keeps PSH for the last of the segments it makes, which it does after the probe.
        segment = segment[:13] + bytes([segment[13] & ~TCP_PSH]) + segment[14:]
    return header, segment


def expected(carrier: Packet, truncated: bool) -> tuple[bytes, bytes]:
    """What is comparable of a probe that rides on this packet."""
    segment = carrier.segment
    if carrier.protocol != TCP:
        segment = segment[:8] + bytes(2) if truncated else segment
    elif truncated or not carrier.payload:
        segment = segment[:13] + bytes([TCP_ACK | TCP_PSH]) + segment[14 : carrier.l4_length]
    else:
        segment = segment[: carrier.l4_length + MSS[carrier.version]]
    return comparable(carrier._replace(segment=segment), truncated)


@CELLS
def test_rows_name_the_right_hop(lab4, measured, version, protocol):
    rows = measured.cell(version, protocol, measured.rows)
    answered = [row for row in rows if row.is_answered]
    probes = measured.cell(version, protocol, measured.probes)
    assert len(probes) >= 100
    assert len(answered) >= 0.97 * len(probes)
    assert {row.outttl for row in answered} == set(HOPS)
    for row in answered:
        assert row.responder == lab4.hop(version, row.outttl)
        assert row.recvttl == 65 - row.outttl
        assert row.latency == row.recvtime - row.sendtime > 0
        assert row.inipid == row.outipid
        assert row.recvcpu in range(os.cpu_count())
    nothing = dict(recvcpu=0, latency=-1, recvtime=-1, responder='', recvttl=-1, inipid=-1)
    nothing.update(dict.fromkeys(['qttl', 'qlen', 'rsize', 'rtos', 'ripid']))
    assert all(row.is_answered or row == row._replace(**nothing) for row in rows)
    assert {row.source for row in rows} == {lab4.client_address(version)}


@CELLS
def test_rows_agree_with_the_packets(measured, version, protocol):
    """One row for each probe seen; for each answer in the rows one time exceeded that quotes the probe."""
    rows = measured.cell(version, protocol, measured.rows)
    quoting = defaultdict(list)
    for reply in measured.replies:
        quoting[reply.quote.identity].append(reply)
    answered = [
        (row, probe)
        for row, probe in pairs(rows, measured.cell(version, protocol, measured.probes), measured.offset)
        if row.is_answered
    ]
    delays = []
    for row, probe in answered:
        (reply,) = quoting[probe.identity]
        quote = reply.quote
        assert (row.responder, row.recvttl, row.rsize, row.rtos, row.ripid, row.inipid, row.qttl, row.qlen) == (
            reply.source, reply.ttl, reply.length, reply.tos, reply.ip_id, quote.ip_id, quote.ttl, quote.length
        )  # fmt: skip
        delays.append(row.recvtime + measured.offset - reply.time)
    check_delays(delays, CLOCKS_AGREE, CLOCKS_AGREE)


@CELLS
def test_probes_are_copies(measured, version, protocol):
    """Of a packet that the row tells: fields that choose the path or satisfy firewalls are as there."""
    cell, truncated = measured.cell, measured.truncated
    carriers = defaultdict(list)
    for carrier in cell(version, protocol, measured.carriers):
        carriers[carrier.flow + (carrier.ip_id, carrier.sequence)].append(carrier)
    for row, probe in pairs(
        cell(version, protocol, measured.rows), cell(version, protocol, measured.probes), measured.offset
    ):
        origin = carriers[row.flow + (row.outipid, row.origseq)]
        assert comparable(probe, truncated) in [expected(carrier, truncated) for carrier in origin]
        if protocol == TCP:
            back = (row.origseq - probe.sequence) % 2**32
            assert back == 0 if probe.payload else 1 <= back <= SEQ_BACK
    # Nothing of this was true for want of such packets.
    assert TOS in {probe.tos for probe in cell(version, protocol, measured.probes)}
    if version == 6:
        assert all(probe.label for probe in cell(version, protocol, measured.probes))
    if protocol == TCP:
        lengths = [len(carrier.payload) for some in carriers.values() for carrier in some]
        assert lengths.count(0) > 10
        assert sum(length > (MSS[version] if measured.offload else 0) for length in lengths) > 10


@CELLS
def test_probes_are_valid(measured, version, protocol):
    finished = measured.offload is False or protocol in ECHO_TYPES
    probes = measured.cell(version, protocol, measured.probes)
    assert finished or any(probe.has_unfinished_checksum for probe in probes)
    for probe in probes:
        assert probe.has_valid_header_checksum
        # Linux 7.3 finishes some in spite of offload, perhaps ACKs that it sends without a socket.
        assert probe.has_valid_checksum or not finished and probe.has_unfinished_checksum
        assert protocol != UDP or probe.segment[4:6] == len(probe.segment).to_bytes(2, 'big')


@pytest.mark.parametrize('version', VERSIONS)
def test_application_packets_arrive_as_sent(measured, version):
    """Once each, in order, with the TTL of packets that passed four routers."""
    assert measured.streams[version] == [(numbered(number), 60) for number in range(1, 301)]
    assert re.search('200 packets transmitted, 200 received, 0% packet loss', measured.pings[version])


@pytest.mark.parametrize('version', VERSIONS)
def test_interval_0_probes_every_packet(measured, version):
    for protocol in (ICMP, UDP) if version == 4 else (ICMPV6, UDP):
        assert len(measured.cell(version, protocol, measured.rows)) > 0.99 * len(
            measured.cell(version, protocol, measured.carriers)
        )


def test_every_probe_and_answer_has_its_row(measured):
    assert len(measured.rows) == len(measured.probes)
    assert sum(row.is_answered for row in measured.rows) == len(measured.replies)
    for dest in {row.dest for row in measured.rows}:
        numbers = [row.seq for row in measured.rows if row.dest == dest]
        assert len(numbers) == len(set(numbers))


# The stack beside it

IP_MTU_DISCOVER, IP_PMTUDISC_DONT = 10, 0  # linux/in.h


def test_probes_that_routers_fragment(make_lab, tmp_path):
    """Like the packets whose payload they keep: routers behind quote the first fragment."""
    lab = make_lab(routers=4)
    for router, device in zip(lab.routers, ('eth1', 'eth0')):
        batch(router.name, [f'link set {device} mtu 1000'])
    with udp_socket(lab.client, 4) as sender, udp_socket(lab.server, 4, 7), lab.routers[3].capture(
        filter='ip[6] & 0x20 != 0'
    ) as parts, elfprobe(lab, '-T', '-p', '0', lab.server_address(4), cwd=tmp_path) as run:
        sender.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DONT)
        output(ping(lab, 4, '-c1'))
        for _ in range(200):
            sender.sendto(os.urandom(1400), (lab.server_address(4), 7))
        wait_until(lambda: len(run.rows()) > 190, 10, 'rows')
    assert len(parts.packets()) > 200  # of packets, and of the probes that end here
    rows = [row for row in run.rows() if row.protocol == UDP]
    assert Counter((row.outttl, row.responder) for row in rows if row.is_answered).keys() == {
        (hop, lab.hop(4, hop)) for hop in HOPS
    }
    assert sum(row.is_answered for row in rows) > 0.97 * len(rows)


@pytest.mark.parametrize('ingress', [pytest.param('drop', marks=pytest.mark.sample), 'pass'])
def test_others_are_left_alone(lab4, tmp_path, ingress):
    """Neighbour discovery, ping, traceroute work; with `pass` only the stack gets answers to probes."""
    methods, neighbours = ('-U', '-I', '-T'), (lab4.client, lab4.routers[0])
    before = time_exceeded_received(lab4.client)
    with pinging(lab4, '-i.01'), elfprobe(lab4, '-I', ingress, *both(lab4), cwd=tmp_path) as run:
        wait_until(lambda: len(run.rows()) > 100, 10, '100 rows')
        for host in neighbours:
            host.run('ip', 'neigh', 'flush', 'all')
        for version in VERSIONS:
            # ping counts errors as answers, which is what pass is there for.
            received = '20 received, ' if ingress == 'drop' else ' received, .*errors, '
            assert re.search(received + '0% packet loss', output(ping(lab4, version, '-c20', '-i.005')))
            for method in methods:
                server = lab4.server_address(version)
                lines = output(client(lab4, 'traceroute', '-n', '-q1', method, server)).splitlines()
                hops = [*(lab4.hop(version, ttl) for ttl in HOPS), server]
                assert [line.split()[1] for line in lines[1:]] == hops
        for host in neighbours:
            known = host.run('ip', 'neigh', 'show', 'dev', 'eth0').stdout
            assert all(
                any(line.startswith(net) and 'lladdr' in line for line in known.splitlines())
                for net in ('10.0.1.', 'fd00:e1f:1:')
            )
    passed = [now - then for now, then in zip(time_exceeded_received(lab4.client), before)]
    answered = Counter(row.dest for row in run.rows() if row.is_answered)
    ours = [answered[dest] if ingress == 'pass' else 0 for dest in both(lab4)]
    assert passed == [count + len(methods) * len(HOPS) for count in ours]


# When probes are sent, and where to


def by_dest(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each destination in the order in which their probes left."""
    dests: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.sendtime):
        dests[row.dest].append(row)
    return dests


def gaps(rows: list[Row]) -> list[int]:
    """Times between the probes of rows in order of sendtime, ns."""
    return [later.sendtime - row.sendtime for row, later in zip(rows, rows[1:])]


@contextmanager
def measuring(lab: Lab, *options: str, cwd: Path) -> Iterator[Run]:
    """elfprobe with the server as destination, which no probe reaches; no row is wrong or missing."""
    with lab.server.capture(filter=PROBES) as reached, elfprobe(lab, *options, *both(lab), cwd=cwd) as run:
        yield run
    versions = dict(zip(both(lab), VERSIONS))
    rows = run.rows()
    assert len(reached.packets()) <= len(rows) // EXPLORE_EVERY
    answered = sum(row.is_answered for row in rows)
    assert run.summary == (len(rows), answered, len(rows) - answered)
    assert all(row.responder == lab.hop(versions[row.dest], row.outttl) for row in rows if row.is_answered)
    for some in by_dest(rows).values():
        assert len(some) == len({row.seq for row in some})


def flood(lab: Lab, seconds: int) -> None:
    """Thousands of packets a second to each of the server's addresses: IPv4 UDP, IPv6 ICMP."""
    udp = '-u', '-b', '40M', '-l', '1000', '--pacing-timer', '200', '-t', str(seconds)
    with lab.iperf3_server():
        for process in iperf3(lab, 4, 5201, *udp), ping(lab, 6, '-f', '-w', str(seconds)):
            output(process)


def test_global_rate(lab4, tmp_path):
    """One probe to a destination per interval, the hops in turn; 100 a second, while packets come."""
    with lab4.client.capture(filter=f'not {PROBES}', snaplen=100) as seen, measuring(
        lab4, '-r', 'g', '-p', '10', cwd=tmp_path
    ) as run:
        flood(lab4, 2)
    packets, offset = ip_packets(seen), realtime_offset()
    for rows in by_dest(run.rows()).values():
        assert min(gaps(rows)) >= 10 * MS
        settled = rows[20:-20]
        times = [packet.time - offset for packet in packets if packet.dest == rows[0].dest]
        nexts = [times[bisect(times, row.sendtime + 10 * MS)] for row in settled]  # may carry the next probe
        waits = [following - row.sendtime - 10 * MS for row, following in zip(settled, nexts)]
        rate = 1e9 * (len(settled) - 1) / (sum(gaps(settled)) - sum(waits[:-1]))
        assert 95 <= rate <= 101
        assert all(later.outttl == row.outttl % 4 + 1 for row, later in zip(settled, settled[1:]))


def test_rate_per_hop(lab4, tmp_path):
    """One probe to each hop of a destination per interval, all hops alike."""
    with measuring(lab4, '-r', 'h', '-p', '20', cwd=tmp_path) as run:
        flood(lab4, 2)
    for rows in by_dest(run.rows()).values():
        hops = [[row for row in rows if row.outttl == ttl] for ttl in HOPS]
        assert min(min(gaps(hop)) for hop in hops) >= 20 * MS
        counts = [len(hop) for hop in hops]
        assert min(counts) >= 60
        assert max(counts) - min(counts) <= 5


def test_max_rate(lab4, tmp_path):
    """Never more than that in a second, all destinations together; nearly that many when all packets may."""
    with measuring(lab4, '-p', '0', '--max-rate', '200', cwd=tmp_path) as run:
        flood(lab4, 3)
    times = sorted(row.sendtime for row in run.rows())
    assert len(times) > 400
    # Against the time of a window of one second, how much too early the probe after the 200th left, ns.
    early = [time + 1000 * MS - later for time, later in zip(times, times[200:])]
    assert max(early) < 0
    assert len(by_dest(run.rows())) == 2


def test_parallel_flows(lab4, tmp_path):
    """As fast as it goes, from several CPUs to one destination: every number once, every row right."""
    cpus = sorted(os.sched_getaffinity(0))
    with lab4.iperf3_server(5201, 5202), measuring(lab4, '-p', '0', cwd=tmp_path) as run:
        for process in [
            iperf3(lab4, 4, 5201, '-P4', '-t1', '-A', str(cpus[0])),
            iperf3(lab4, 4, 5202, '-P4', '-t1', '-A', str(cpus[-1])),
        ]:
            output(process)
    rows = run.rows()
    assert len({row.sport for row in rows}) >= 8
    assert len({row.recvcpu for row in rows}) == len({cpus[0], cpus[-1]})
    assert len(rows) > 1000


@pytest.mark.parametrize('options', [('-b20M',), ('-u', '-b5M', '-l500')], ids=['TCP', 'UDP'])
def test_parallel_flows_are_probed_alike(lab4, tmp_path, options):
    """By address, eight flows at once: each is probed, at all hops, about as often as any other.

    Two may share their turns, but only for 256 probes, which this takes longer than.
    """
    with lab4.iperf3_server(), measuring(lab4, cwd=tmp_path) as run:
        output(iperf3(lab4, 4, 5201, '-P8', '-t8', *options))
    protocol = 17 if '-u' in options else 6
    flows = defaultdict(Counter)
    for row in run.rows():
        if row.protocol == protocol:
            flows[row.sport][row.outttl] += 1
    counts = sorted(((sum(hops.values()), dict(hops)) for hops in flows.values()), key=lambda each: each[0])
    data = counts[-8:]  # there may be iperf3's own connection, too, which is nearly idle
    assert len(data) == 8
    least, most = data[0][0], data[-1][0]
    assert least > most / 8, counts
    assert data[2][0] > most / 3, counts
    assert all(set(hops) == {1, 2, 3, 4} for _, hops in data), counts


SYN_PROXY = """\
chain prerouting {
    type filter hook prerouting priority -300
    tcp dport 5001 tcp flags & (syn | ack) == syn notrack
}
chain onward {
    type filter hook forward priority 0
    tcp dport 5001 ct state invalid,untracked synproxy mss 1460 wscale 7 timestamp sack-perm
    ct state invalid drop
}
"""


def test_short_connections_behind_a_syn_proxy(lab4, tmp_path):
    """In r2, which opens each connection in the server's name: hops behind it are probed all the same."""
    proxy = lab4.routers[1]
    dests = both(lab4)
    with ExitStack() as stack:
        try:
            stack.enter_context(nft_table(proxy, SYN_PROXY))
        except CommandFailed:
            pytest.skip('this kernel has no synproxy')
        proxy.run('sysctl', '-qw', 'net.netfilter.nf_conntrack_tcp_loose=0')
        with inside(lab4.server):
            listener = stack.enter_context(
                socket.create_server(('', 5001), family=socket.AF_INET6, dualstack_ipv6=True)
            )
        run = stack.enter_context(measuring(lab4, '-p', '0', cwd=tmp_path))
        for dest in 40 * dests:
            with inside(lab4.client), socket.create_connection((dest, 5001), 5) as client:
                client.sendall(bytes(100))
                with listener.accept()[0] as server:
                    assert server.recv(100)
                    server.sendall(bytes(100))
                    assert client.recv(100)
    answered = {(row.dest, row.outttl) for row in run.rows() if row.is_answered}
    assert answered == {(dest, hop) for dest in dests for hop in HOPS}


CHANGES = """\
chain forward {
    type filter hook forward priority 0
    ip dscp set cs0
    ip6 dscp set cs0
}
chain prerouting {
    type filter hook prerouting priority -300
    iifname eth0 ip saddr %(client)s ip saddr set %(other)s
    iifname eth1 ip daddr %(other)s ip daddr set %(client)s
}
"""


def test_what_the_network_changes(lab4, tmp_path):
    """r2 clears the DSCP and, in IPv4, writes another source address, without telling anybody."""
    r2, other = lab4.routers[1], address(4, 2, 77)
    client, servers = lab4.client_address(4), dict(zip(VERSIONS, both(lab4)))
    batch(lab4.routers[2].name, [f'route replace {other} via {address(4, 3, 1)}'])
    batch(lab4.routers[3].name, [f'route replace {other} via {address(4, 4, 1)}'])
    batch(lab4.server.name, [f'route replace {other} via {address(4, 5, 1)}'])
    try:
        with nft_table(r2, CHANGES % dict(client=client, other=other)), elfprobe(
            lab4, *both(lab4), cwd=tmp_path
        ) as run, pinging(lab4, '-i.01', '-Q', str(TOS)):
            # But for r2 itself, whose answers in IPv4 go to the other address.
            wait_until(lambda: len(latest(run.rows())) == 7, 10, 'rows of the hops of both destinations')
    finally:
        for host in [*lab4.routers[2:], lab4.server]:
            batch(host.name, [f'route del {other}'])
    with open(tmp_path / 'elf.csv', newline='') as file:
        rows = [row for row in csv.DictReader(file) if row['recvtime'] != '-1']
    assert {row['outtos'] for row in rows} == {str(TOS)}
    assert {row['source'] for row in rows} == {client, lab4.client_address(6)}
    assert {(int(row['outttl']) > 2, row['intos']) for row in rows} == {(False, str(TOS)), (True, '0')}
    for version, server in servers.items():
        where = rf'before hop 3 \({re.escape(lab4.hop(version, 3))}\)'
        assert re.search(f'{re.escape(server)}: DSCP/ECN 0x48 becomes 0x00 {where}', run.log)
        translated = re.search(f'{re.escape(server)}: the source address is translated {where}', run.log)
        assert bool(translated) == (version == 4)
    assert run.log.count(' before hop ') == 3


def test_many_destinations(lab4, tmp_path):
    """As many as there may be, from a file, and one more, which is too many."""
    others = [
        address.format(i // 256, i % 256)
        for i in range(32767)
        for address in ('198.18.{}.{}', '2001:db8::{:x}:{:x}')
    ]
    (tmp_path / 'hosts').write_text('\n'.join([*others, *both(lab4)]))
    with measuring(lab4, '@hosts', cwd=tmp_path) as run, pinging(lab4, '-i.01'):
        wait_until(lambda: len(latest(run.rows())) == 8, 20, 'rows of all hops of both destinations')
    with pytest.raises(CommandFailed, match='65537 destinations, at most 65536'), elfprobe(
        lab4, '@hosts', '192.0.2.1', cwd=tmp_path
    ):
        pass


# Paths that are not as they seem, or do not stay so


def latest(rows: list[Row], since: int = 0) -> dict[tuple[str, int], str]:
    """Who has answered for each destination and TTL last, to probes sent since then."""
    return {(row.dest, row.outttl): row.responder for row in rows if row.is_answered and row.sendtime > since}


def test_silent_router(lab4, tmp_path):
    """r2 says nothing for a while: it is asked ever less, the others as before; it comes back by itself."""
    rules = 'icmp type time-exceeded drop; icmpv6 type time-exceeded drop'

    def answers(ttl: int, since: int) -> int:
        """At the destination that has fewer."""
        found = Counter(row.dest for row in run.rows() if row.outttl == ttl and row.recvtime > since)
        return min(found[dest] for dest in both(lab4))

    with measuring(lab4, '-p', '10', cwd=tmp_path) as run, pinging(lab4, '-i.01'):
        wait_until(lambda: answers(2, 0) > 20, 10, 'r2 answers')
        with dropping(lab4.routers[1], rules):
            silent = time.monotonic_ns()
            wait_until(lambda: answers(1, silent) > 120, 20, 'hop 1 goes on')
            heard = time.monotonic_ns()
        wait_until(lambda: answers(2, heard) > 20, 10, 'hop 2 comes back')
    for rows in by_dest(run.rows()).values():
        during = [row for row in rows if silent < row.sendtime < heard]
        counts = [sum(row.outttl == ttl for row in during) for ttl in HOPS]
        second = [row for row in during if row.outttl == 2]
        rests = gaps(second)
        assert not any(row.is_answered for row in second)
        assert all(row.is_answered for row in during if row.outttl != 2)
        assert counts[1] < 25 < 100 < min(counts[0], *counts[2:])
        # Two apart: one alone may be longer, where the machine stood still as it was over.
        assert all(earlier < later for earlier, later in zip(rests[-4:], rests[-2:]))
        assert rests[-1] > 200 * MS


def test_outage(lab4, tmp_path):
    """r2 forwards nothing for a while: when the way is open again, all hops are probed at once, and go on."""
    with measuring(lab4, cwd=tmp_path) as run, pinging(lab4, '-i.01'):
        wait_until(lambda: len(latest(run.rows())) == 8, 10, 'rows of all hops of both destinations')
        wait_until(run.is_trusting, 15, 'a stall is no sign of a firewall')
        with nft_table(lab4.routers[1], CLOSED):
            begin = time.monotonic_ns()
            wait_until(lambda: time.monotonic_ns() - begin > 3000 * MS, 10, 'some rests are over')
        since = time.monotonic_ns()

        def all_go_on() -> bool:
            answered = Counter(
                (row.dest, row.outttl) for row in run.rows() if row.is_answered and row.sendtime > since
            )
            return min(answered[dest, hop] for dest in both(lab4) for hop in HOPS) > 5

        wait_until(all_go_on, 5, 'all hops answer again')


def parallel_pings(lab: Lab, version: int) -> None:
    """Probes are numbered across flows, and so reach a number before any ping does."""
    for process in [ping(lab, version, '-c300', '-i.002') for _ in range(3)]:
        output(process)


def refused_packets(lab: Lab, version: int) -> None:
    """UDP that the server answers with port unreachable."""
    with udp_socket(lab.client, version) as udp:
        udp.settimeout(5)
        udp.connect((lab.server_address(version), 7))
        for number in range(300):
            udp.send(numbered(number))
            with pytest.raises(ConnectionRefusedError):
                udp.recv(1)


def single_bytes(lab: Lab, version: int) -> None:
    """TCP whose sequence numbers grow as slowly as those of probes do."""
    with tcp_connected(lab, version, 7) as (sender, receiver):
        sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(300):
            sender.send(b'x')
            receiver.recv(1)


@pytest.mark.parametrize('traffic, options', [
    (parallel_pings, []), (refused_packets, []), (refused_packets, ['-T']), (single_bytes, []),
])  # fmt: skip
def test_probes_in_flight_are_not_in_the_way(make_lab, tmp_path, traffic, options):
    """While probes wait for a router that says nothing, what is sent and answered is not taken for them."""
    lab = make_lab(routers=4)
    lab.server.run('sysctl', '-eqw', *ROUTER_SYSCTLS)  # no limits on ICMP
    rules = 'icmp type time-exceeded drop; icmpv6 type time-exceeded drop'

    def is_measured(dest: str) -> bool:
        """Whether all other routers have answered often."""
        answered = Counter(row.outttl for row in run.rows() if row.is_answered and row.dest == dest)
        return min(answered[ttl] for ttl in (1, 3, 4)) > 50

    with dropping(lab.routers[1], rules), elfprobe(lab, '-p', '0', *options, *both(lab), cwd=tmp_path) as run:
        for version, dest in zip(VERSIONS, both(lab)):
            for _ in range(50):
                traffic(lab, version)
                if is_measured(dest):
                    break
            assert is_measured(dest)
    assert 'reached their destination' not in run.log
    # Where a hop answers within microseconds, -p 0 is more than --max-rate.
    assert not re.search(r'not measured: (?!over_max_rate \d+ \(more than --max-rate\)$)', run.log, re.M)


def test_unknown_length(lab4, tmp_path):
    """One-way UDP to a server that says nothing: hops are found in turn, few probes go on to the server.

    Those have their rows after five seconds, while it runs.
    """
    rules = 'icmp type destination-unreachable drop; icmpv6 type destination-unreachable drop'
    with ExitStack() as stack:
        stack.enter_context(dropping(lab4.server, rules))
        senders = [stack.enter_context(udp_socket(lab4.client, version)) for version in VERSIONS]
        reached = stack.enter_context(lab4.server.capture(filter=PROBES))
        run = stack.enter_context(elfprobe(lab4, '-p', '50', *both(lab4), cwd=tmp_path))

        def unanswered() -> set[str]:
            for sender, server in zip(senders, both(lab4)):
                sender.sendto(bytes(100), (server, 7))
            return {row.dest for row in run.rows() if not row.is_answered}

        wait_until(lambda: len(unanswered()) == 2, 10, 'unanswered probes become rows')
        now = time.monotonic_ns()
        early = run.rows()
        assert run.is_running
    late = [now - row.sendtime for row in early if not row.is_answered]
    assert min(late) > 5000 * MS
    assert max(late) < 6500 * MS
    rows = run.rows()
    for version, dest in zip(VERSIONS, both(lab4)):
        some = by_dest(rows)[dest]
        assert {row.outttl: row.responder for row in some if row.is_answered} == {
            ttl: lab4.hop(version, ttl) for ttl in HOPS
        }
        counts = Counter(row.outttl for row in some)
        assert min(counts[ttl] for ttl in HOPS) > 50
        firsts = [next(row for row in some if row.outttl == ttl) for ttl in (*HOPS, 5)]
        assert all(row.recvtime < further.sendtime for row, further in zip(firsts, firsts[1:]))
    beyond = [row for row in rows if row.outttl > 4]
    assert len(reached.packets()) == len(beyond) < 10 * len(VERSIONS)


@contextmanager
def uploading(lab: Lab) -> Iterator[None]:
    """TCP of both families, a packet every few milliseconds, all the time."""
    with lab.iperf3_server(*(UPLOAD + version for version in VERSIONS)), ExitStack() as stack:
        for version in VERSIONS:
            stack.callback(end, iperf3(lab, version, UPLOAD + version, '-t0', '-b2M', '-l1000'))
        yield


@contextmanager
def echoed(lab: Lab) -> Iterator[None]:
    """UDP of both families, a packet every 5 ms, to sockets whose answers are what the path is told by."""
    code = (
        'import socket, sys, time\n'
        'there = socket.getaddrinfo(sys.argv[1], 7, type=socket.SOCK_DGRAM)[0]\n'
        'with socket.socket(there[0], socket.SOCK_DGRAM) as udp:\n'
        '    if sys.argv[2:]:\n'
        '        udp.bind(there[4])\n'
        '        while True:\n'
        '            udp.sendto(*udp.recvfrom(2000))\n'
        '    udp.connect(there[4])\n'
        '    while True:\n'
        '        udp.send(bytes(100))\n'
        '        time.sleep(0.005)\n'
    )
    with ExitStack() as stack:
        for server in both(lab):
            stack.callback(end, lab.server.popen(sys.executable, '-c', code, server, 'echo'))
        wait_until(
            lambda: len(lab.server.run('ss', '-Hlun', 'sport = :7').stdout.splitlines()) == 2,
            10,
            'both sockets are there',
        )
        for server in both(lab):
            stack.callback(end, lab.client.popen(sys.executable, '-c', code, server))
        yield


@pytest.mark.parametrize(
    'traffic', [lambda lab: pinging(lab, '-i.01'), uploading, echoed], ids=['ping', 'TCP', 'UDP']
)
def test_path_changes(make_lab, tmp_path, traffic):
    """Ways around r2, and r2 and r3, both ways, one way, back: rows follow, and few probes reach the server.

              +------- link 250 -------+
    client - r1 -------- r2 --------- r3 - r4 - server
              +------- link 251 ------------+
    """
    lab = make_lab(routers=4)
    r1, _, r3, r4 = lab.routers
    # Which of its addresses a router answers from is up to the kernel, for IPv6.
    sides = [(250, 1, 1), (250, 2, 3), (251, 1, 1), (251, 2, 4)]
    sides += [side for router in HOPS for side in ((router, 2, router), (router + 1, 1, router))]
    routers = {address(version, link, side): router for version in VERSIONS for link, side, router in sides}
    for link, far in (250, r3), (251, r4):
        batch(
            r1.name,
            [
                f'link add around{link} index {link} type veth peer around index {link + 10} netns {far.name}',
                *attach(f'around{link}', link, 1),
            ],
        )
        batch(far.name, attach('around', link, 2))
    # From r1 there; from r3 and r4 back.
    ways = {
        'straight': ((2, 2), (3, 1), (4, 1)),
        'around': ((250, 2), (250, 1), (4, 1)),
        'far': ((251, 2), (250, 1), (251, 1)),
    }
    hops = {'straight': (1, 2, 3, 4), 'around': (1, 3, 4), 'far': (1, 4)}

    def route(there: str, back: str) -> None:
        _, r3_back, r4_back = ways[back]
        for version, bits in (4, 24), (6, 64):
            for router, link, via in (r1, 5, ways[there][0]), (r3, 1, r3_back), (r4, 1, r4_back):
                batch(
                    router.name, [f'route replace {address(version, link, 0)}/{bits} via {address(version, *via)}']
                )

    def wait_for(there: str) -> None:
        """Until each hop of this way, and no other, has answered to probes sent from now on."""
        since = time.monotonic_ns()
        wanted = {(dest, ttl): router for dest in both(lab) for ttl, router in enumerate(hops[there], 1)}
        wait_until(
            lambda: wanted == {hop: routers[responder] for hop, responder in latest(run.rows(), since).items()},
            20,
            f'routers by destination and TTL: {wanted}',
        )

    changes = [
        ('around', 'around'),
        ('straight', 'straight'),
        ('straight', 'around'),
        ('around', 'straight'),
        ('far', 'far'),
        ('straight', 'straight'),
    ]
    with lab.server.capture(filter=PROBES) as reached, elfprobe(lab, *both(lab), cwd=tmp_path) as run, traffic(lab):
        wait_for('straight')
        assert not reached.packets()
        for there, back in changes:
            route(there, back)
            wait_for(there)
            wait_for(there)  # and stays so
    assert max(Counter(packet.dest for packet in ip_packets(reached)).values()) < 10
    for version, dest in zip(VERSIONS, both(lab)):
        told = re.findall(rf' to {dest}.*: hop (\d) is now (\S+), no longer (\S+)', run.log)
        assert ('2', lab.hop(version, 2)) in [(hop, before) for hop, _, before in told]
        assert {routers[after] for hop, after, _ in told if hop == '2'} >= {2, 3, 4}
        assert not [hop for hop, after, before in told if hop == '1' or after == before]
    for version in VERSIONS:  # in the table, the last change and perhaps others
        last = rf'from hop 2 on, which is now {lab.hop(version, 2)}, no longer |hop 2 changed '
        assert re.search(last, run.log)


@pytest.mark.parametrize('ttl', ['200', '100'])
def test_odd_initial_ttl(lab4, tmp_path, ttl):
    """A server that begins with a TTL that nobody uses seems to be far away; few probes go on to it."""
    odd = [
        f'net.ipv4.ip_default_ttl={ttl}',
        f'net.ipv6.conf.all.hop_limit={ttl}',
        f'net.ipv6.conf.{lab4.server.device}.hop_limit={ttl}',
    ]
    usual = [setting.replace(ttl, '64') for setting in odd]
    lab4.server.run('sysctl', '-qw', *odd)
    try:
        with lab4.server.capture(filter=PROBES) as reached, uploading(lab4), elfprobe(
            lab4, *both(lab4), cwd=tmp_path
        ) as run:
            wait_until(lambda: len(run.rows()) > 1000, 20, '1000 rows')
    finally:
        lab4.server.run('sysctl', '-qw', *usual)
    assert set(latest(run.rows())) == {(dest, hop) for dest in both(lab4) for hop in HOPS}
    assert max(Counter(packet.dest for packet in ip_packets(reached)).values(), default=0) < 10


@pytest.mark.parametrize('options', [[], ['-T']], ids=['truncated', 'whole'])
@pytest.mark.parametrize('command', [OLD_COMMAND, PREEMPTIBLE_COMMAND], ids=['old', 'preemptible'])
def test_other_system(lab4, tmp_path, command, options):
    """The same rows, without what newer kernels and BCC offer, or with what PREEMPT_RT asks for."""
    seen_at_r1 = dict(filter=f'({PROBES} and not icmp6[0] == 3) or {TIME_EXCEEDED}', snaplen=2000)
    via = lab4.client.command(*command)
    with lab4.routers[0].capture(**seen_at_r1) as seen, uploading(lab4), pinging(lab4, '-i.01'), elfprobe(
        lab4, '-d', *options, *both(lab4), cwd=tmp_path, via=via
    ) as run:
        wait_until(lambda: len(run.rows()) > 1000, 30, '1000 rows')
        assert run.stop() == 0
    assert ('CPU time of the programs is not known' in run.log) == (command is OLD_COMMAND)
    packets = ip_packets(seen)
    rows = run.rows()
    probes = [packet for packet in packets if packet.dest in both(lab4) and not packet.is_time_exceeded]
    assert len(pairs(rows, probes, realtime_offset())) == len(rows)
    assert {(row.dest, row.outttl, row.responder) for row in rows if row.is_answered} == {
        (lab4.server_address(version), hop, lab4.hop(version, hop)) for version in VERSIONS for hop in HOPS
    }
    assert sum(row.is_answered for row in rows) > 0.97 * len(rows)
    assert {row.protocol for row in rows} == {ICMP, ICMPV6, TCP}
    if options:
        assert max(len(probe.payload) for probe in probes if probe.protocol == TCP) in range(900, MSS[4] + 1)


def test_nsenter(lab4, tmp_path):
    """Into the namespace by another way, which keeps /sys as it is outside."""
    enter = 'nsenter', f'--net={NETNS / lab4.client.name}'
    with elfprobe(lab4, *both(lab4), cwd=tmp_path, via=enter) as run, pinging(lab4, '-i.01'):
        wait_until(lambda: len(latest(run.rows())) == 8, 10, 'rows of all hops of both destinations')
    assert run.process.returncode == 0
