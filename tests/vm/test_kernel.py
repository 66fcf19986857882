"""What stock kernels have and the usual test machine may lack: netem, fq and BBR, tunnels, 802.1Q, kprobes.

    client - r1 - r2 - r3 - r4 - server

tests/vm/run runs this in virtual machines, `sudo tests/run vm/test_kernel.py` on this one. A test is skipped
where the kernel lacks its device or queueing discipline.
"""

from __future__ import annotations

import re
import socket
import subprocess
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Iterator

import pytest

from lab import PATIENCE, CommandFailed, Host, Lab, address, attach, batch, end, run, wait_until
from runs import ICMP, ICMPV6, PROBES, TCP, TIME_EXCEEDED, Packet, Run, elfprobe, ip_packets, realtime_offset
from test_paths import HOPS, UPLOAD, VERSIONS, both, iperf3, latest, output, pairs, pinging, udp_socket

pytestmark = pytest.mark.root

US, MS = 1_000, 1_000_000  # ns
ECHO = {4: ICMP, 6: ICMPV6}
DELAYS = 3, 7, 13, 5  # ms that r1 ... r4 keep what they send towards the client
PACE = 125_000  # bytes a second
SO_MAX_PACING_RATE = 47  # asm-generic/socket.h
CONGESTION_CONTROL = Path('/proc/sys/net/ipv4/tcp_available_congestion_control')
KPROBES = Path('/sys/kernel/debug/kprobes')
INSIDE = {4: '192.168.77.{}', 6: 'fd00:77::{}'}  # addresses of a tunnel's ends
BITS = {4: 24, 6: 64}
VLAN = 200  # its ID, and the number of the link that it is


def make(host: Host, program: str, command: str) -> None:
    """`ip` or `tc`; skips the test where the kernel lacks what is to be made."""
    made = run(program, '-n', host.name, *command.split(), check=False)
    if re.search('Unknown device type|kind is unknown|not supported|No such file', made.stderr):
        pytest.skip(f'this kernel cannot: {program} {command}: {made.stderr.strip()}')
    if made.returncode:
        raise CommandFailed(f'{program} {command}: {made.stderr}')


@contextmanager
def queueing(*queues: tuple[Host, str]) -> Iterator[None]:
    """Queueing disciplines at the hosts' first devices."""
    with ExitStack() as stack:
        for host, queue in queues:
            make(host, 'tc', f'qdisc add dev {host.device} root {queue}')
            stack.callback(run, 'tc', '-n', host.name, 'qdisc', 'del', 'dev', host.device, 'root')
        yield


# netem

def latencies(lab: Lab, folder: Path) -> dict[tuple[int, int], tuple[float, float]]:
    """By version and hop: the median latency, and by how much the median row is off, in ns.

    The truth is the time from r1's receiving the probe to its sending the answer, which is when netem has
    let it go: all but one link of veth, which takes microseconds.
    """
    folder.mkdir()
    seen_at_r1 = f'{PROBES} or {TIME_EXCEEDED}'
    with lab.routers[0].capture(filter=seen_at_r1) as seen, \
            elfprobe(lab, '-p', str(50 * PATIENCE), *both(lab), cwd=folder) as elf, \
            pinging(lab, f'-i{0.02 * PATIENCE:g}'):
        wait_until(lambda: len(elf.rows()) > 400, 20, '400 rows')
        assert elf.stop() == 0
    offset = realtime_offset()
    packets = ip_packets(seen)
    sent = {reply.quote.identity: reply.time for reply in packets if reply.is_time_exceeded}
    probes = [packet for packet in packets if not packet.is_time_exceeded]
    found, errors = defaultdict(list), defaultdict(list)
    for row, probe in pairs(elf.rows(), probes, offset):
        if row.is_answered:
            hop = probe.version, row.outttl
            found[hop].append(row.latency)
            errors[hop].append(abs(row.latency - (sent[probe.identity] - probe.time)))
    return {hop: (median(found[hop]), median(errors[hop])) for hop in found}


def test_netem(lab4, tmp_path):
    """Each hop is as much slower as it was made, and in the right order; rows are as it was on the wire."""
    before = latencies(lab4, tmp_path / 'before')
    with queueing(*((router, f'netem delay {delay}ms') for router, delay in zip(lab4.routers, DELAYS))):
        during = latencies(lab4, tmp_path / 'during')
    for version in VERSIONS:
        for hop, delay in zip(HOPS, accumulate(DELAYS)):
            latency, error = during[version, hop]
            added = latency - before[version, hop][0]
            print(f'IPv{version} hop {hop}: {latency / US:.0f} us, wire off {error / US:.0f} us, '
                  f'added {added / US:.0f} us')
    assert 0


# fq

def datagrams(lab: Lab, version: int) -> list[tuple[int, int]]:
    """Hand fq a hundred UDP packets at once, to be spaced; when each passed r1, ns, and its number."""
    with lab.routers[0].capture(filter=f'udp and dst {lab.server_address(version)}') as seen, \
            udp_socket(lab.client, version) as sender:
        sender.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, PACE)
        sender.connect((lab.server_address(version), 9))
        for number in range(100):
            sender.send(b'%05d' % number + bytes(1245))

        def passed() -> list[Packet]:
            return [packet for packet in ip_packets(seen) if packet.ttl > 32]

        wait_until(lambda: len(passed()) >= 100, 10, 'all packets pass r1')
    return [(packet.time, int(packet.payload[:5])) for packet in passed()]


def segments(lab: Lab, version: int) -> list[tuple[int, int]]:
    """Upload by TCP with BBR at a pace; when each segment passed r1, ns, and its number."""
    port = UPLOAD + version
    with lab.iperf3_server(port), \
            lab.routers[0].capture(filter=f'tcp and dst port {port}', snaplen=128) as seen:
        output(iperf3(lab, version, port, '-C', 'bbr', '--fq-rate', str(PACE * 8), '-t', '3'))
    packets = [packet for packet in ip_packets(seen) if packet.ttl > 32]
    data = max({packet.sport for packet in packets}, key=[packet.sport for packet in packets].count)
    return [(packet.time, packet.sequence) for packet in packets if packet.sport == data and packet.payload]


@pytest.mark.parametrize('version', VERSIONS)
@pytest.mark.parametrize('traffic', [datagrams, segments], ids=['UDP', 'BBR'])
def test_fq(lab4, tmp_path, traffic, version):
    """The application's packets leave in the same order, and as evenly, as without elfprobe."""
    if traffic is segments and 'bbr' not in CONGESTION_CONTROL.read_text().split():
        pytest.skip('this kernel lacks BBR')
    with queueing((lab4.client, 'fq')):
        without = traffic(lab4, version)
        with elfprobe(lab4, '-p', '0', lab4.server_address(version), cwd=tmp_path) as elf:
            during = traffic(lab4, version)
    assert len([row for row in elf.rows() if row.is_answered]) > 50
    for some in without, during:
        gaps = sorted(b - a for (a, _), (b, _) in zip(some, some[1:]))
        print(version, len(some), [number for _, number in some] == sorted({number for _, number in some}),
              [f'{gaps[len(gaps) * q // 100] / MS:.2f}' for q in (0, 5, 10, 25, 50, 75, 90, 95, 99)])
    assert 0


# Devices

@contextmanager
def tunnel(lab: Lab, kind: str, version: int, inside: bool) -> Iterator[dict[int, str]]:
    """A tunnel from the client to r2, and the client's way to the server through it; who answers by hop.

        client - r1 - r2 - r3 - r4 - server        The client's packets have its address inside the tunnel,
            ===========                            or with `inside` False the one outside: then what comes
                                                   back comes bare.
    """
    r2, r3, r4 = lab.routers[1:]
    outer = 6 if kind.startswith('ip6tnl') else 4
    ends = address(outer, 1, 1), address(outer, 2, 2)
    near, far = (INSIDE[version].format(number) for number in (1, 2))
    net = f'{INSIDE[version].format(0 if version == 4 else "")}/{BITS[version]}'
    with ExitStack() as stack:
        for host, own, other, address_inside in (lab.client, *ends, near), (r2, *ends[::-1], far):
            make(host, 'ip', f'link add tunnel type {kind} local {own} remote {other}')
            stack.callback(batch, host.name, ['link del tunnel'])
            batch(host.name, [f'address add {address_inside}/{BITS[version]} dev tunnel'
                              + (' nodad' if version == 6 else ''), 'link set tunnel up'])
        for host, link in (r3, 3), (r4, 4):
            batch(host.name, [f'route add {net} via {address(version, link, 1)}'])
            stack.callback(batch, host.name, [f'route del {net}'])
        source = near if inside else lab.client_address(version)
        batch(lab.client.name, [f'route add {lab.server_address(version)} dev tunnel src {source}'])
        first = far if inside else lab.hop(version, 2)
        yield {1: first, 2: lab.hop(version, 3), 3: lab.hop(version, 4)}


def check(lab: Lab, elf: Run, version: int, hops: dict[int, str]) -> None:
    """Of TCP in segments large and small, and of pings: each hop answers, nobody else does."""
    server, port = lab.server_address(version), UPLOAD + version
    right = {(protocol, *hop) for protocol in (ECHO[version], TCP) for hop in hops.items()}

    def answered() -> set[tuple[int, int, str]]:
        return {(row.protocol, row.outttl, row.responder) for row in elf.rows() if row.is_answered}

    with lab.iperf3_server(port):
        pings = lab.client.popen('ping', '-nq', f'-i{0.02 * PATIENCE:g}', server, stdout=subprocess.DEVNULL)
        bulk = iperf3(lab, version, port, '-t', '2', '-b', '1M', '-l', '5000')
        output(bulk)
        wait_until(lambda: answered() >= right, 20, f'protocols, hops and who answers: {right}')
        end(pings)
    assert elf.stop() == 0
    assert answered() == right
    rows = elf.rows()
    assert {row.dest for row in rows} == {server}
    assert sum(row.is_answered for row in rows) > 0.97 * len(rows) > 30


@pytest.mark.parametrize('options', [[], ['-T']], ids=['truncated', 'whole'])
@pytest.mark.parametrize('kind, version, device, encapsulation, inside', [
    ('ipip', 4, 'tunnel', 'ethernet', True),
    ('ipip', 4, 'tunnel', 'ipinip', True),
    ('ipip', 4, 'eth0', 'ipinip', True),
    ('ipip', 4, 'eth0', 'ipinip', False),
    ('sit', 6, 'tunnel', 'ethernet', True),
    ('sit', 6, 'tunnel', 'ip6inip', True),
    ('sit', 6, 'eth0', 'ip6inip', True),
    ('sit', 6, 'eth0', 'ip6inip', False),
    ('ip6tnl mode any', 4, 'tunnel', 'ethernet', True),
    ('ip6tnl mode any', 6, 'tunnel', 'ethernet', True),
])  # fmt: skip
def test_tunnel(lab4, tmp_path, kind, version, device, encapsulation, inside, options):
    """The hops of the packets inside are those behind the tunnel."""
    with tunnel(lab4, kind, version, inside) as hops, \
            elfprobe(lab4, '-i', device, '-e', encapsulation, '-p', '20', *options,
                     lab4.server_address(version), cwd=tmp_path) as elf:
        check(lab4, elf, version, hops)


@pytest.mark.parametrize('options', [[], ['-T']], ids=['truncated', 'whole'])
@pytest.mark.parametrize('version', VERSIONS)
@pytest.mark.parametrize('device', [f'eth0.{VLAN}', 'eth0'])
def test_vlan(lab4, tmp_path, device, version, options):
    """The way to r1 is an 802.1Q device, at which elfprobe is, or at the one below."""
    r1 = lab4.routers[0]
    net = f'{address(version, VLAN, 0)}/{BITS[version]}'
    with ExitStack() as stack:
        for side, host in (1, lab4.client), (2, r1):
            make(host, 'ip', f'link add link eth0 name eth0.{VLAN} type vlan id {VLAN}')
            stack.callback(batch, host.name, [f'link del eth0.{VLAN}'])
            batch(host.name, attach(f'eth0.{VLAN}', VLAN, side))
        for link, router in enumerate(lab4.routers[1:], 2):
            batch(router.name, [f'route add {net} via {address(version, link, 1)}'])
            stack.callback(batch, router.name, [f'route del {net}'])
        batch(lab4.client.name, [f'route add {lab4.server_address(version)} via {address(version, VLAN, 2)}'])
        hops = {1: address(version, VLAN, 2), **{hop: lab4.hop(version, hop) for hop in HOPS[1:]}}
        elf = stack.enter_context(elfprobe(lab4, '-i', device, '-p', '20', *options,
                                           lab4.server_address(version), cwd=tmp_path))
        check(lab4, elf, version, hops)


# Kprobes

@pytest.mark.skipif(not KPROBES.exists(), reason='no kprobes here, or no debugfs')
@pytest.mark.parametrize('enabled', ['1', '0'])
def test_kprobes(lab4, tmp_path, enabled):
    """None is used, whether they are switched on or off."""
    before, probes = (KPROBES / 'enabled').read_text(), (KPROBES / 'list').read_text()
    (KPROBES / 'enabled').write_text(enabled)
    try:
        with elfprobe(lab4, '-a', 'ping', cwd=tmp_path) as elf, pinging(lab4, f'-i{0.02 * PATIENCE:g}'):
            wait_until(lambda: len(latest(elf.rows())) == 8, 20, 'rows of all hops of both families')
            assert (KPROBES / 'list').read_text() == probes
    finally:
        (KPROBES / 'enabled').write_text(before)
    assert 'connection tables' not in elf.log
