"""What stock kernels have and the usual test machine may lack: netem, fq and BBR, PREEMPT_RT, tunnels,
802.1Q, kprobes.

    client - r1 - r2 - r3 - r4 - server

tests/vm/run runs this in virtual machines, `sudo tests/run vm/test_kernel.py` on this one. A test is skipped
where the kernel lacks its device or queueing discipline.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections import defaultdict
from contextlib import ExitStack, contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Callable, Iterator, NamedTuple

import pytest

from lab import PATIENCE, CommandFailed, Host, Lab, address, attach, batch, end, run, wait_until
from runs import ICMP, ICMPV6, PROBES, TCP, TIME_EXCEEDED, Packet, Run, elfprobe, ip_packets, realtime_offset
from test_paths import HOPS, STREAM, UPLOAD, VERSIONS, both, iperf3, latest, output, pairs, pinging, udp_socket

pytestmark = pytest.mark.root

US, MS, NS = 1_000, 1_000_000, 1_000_000_000  # ns; of a second
ECHO = {4: ICMP, 6: ICMPV6}
DELAYS = 3, 7, 13, 5  # ms that r1 ... r4 keep what they send towards the client
PACE = 60_000  # bytes a second; from 68,750 on fq lets two packets go at once
SO_RCVBUFFORCE, SO_MAX_PACING_RATE = 33, 47  # asm-generic/socket.h
CONGESTION_CONTROL = Path('/proc/sys/net/ipv4/tcp_available_congestion_control')
KPROBES = Path('/sys/kernel/debug/kprobes')
LINUX = tuple(int(number) for number in os.uname().release.split('-')[0].split('.')[:2])
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
    """By version and hop: the median latency, and how far the median row is from the truth, in ns.

    The truth is what the client's own device sees, where with `-I pass` the answers can be seen, too.
    """
    folder.mkdir()
    with lab.client.capture(filter=f'{PROBES} or {TIME_EXCEEDED}') as seen, elfprobe(
        lab, '-I', 'pass', '-p', str(20 * PATIENCE), *both(lab), cwd=folder
    ) as elf, pinging(lab, f'-i{0.02 * PATIENCE:g}'):
        wait_until(lambda: len(elf.rows()) > 200, 20, '200 rows')
        assert elf.stop() == 0
    packets = ip_packets(seen)
    answers = {packet.quote.identity: packet.time for packet in packets if packet.is_time_exceeded}
    probes = [packet for packet in packets if not packet.is_time_exceeded]
    found, errors = defaultdict(list), defaultdict(list)
    for row, probe in pairs(elf.rows(), probes, realtime_offset()):
        if row.is_answered:
            hop = probe.version, row.outttl
            found[hop].append(row.latency)
            errors[hop].append(abs(row.latency - (answers[probe.identity] - probe.time)))
    return {hop: (median(found[hop]), median(errors[hop])) for hop in found}


def test_netem(lab4, tmp_path):
    """Rows are as it was on the wire; each hop is later by what it was delayed, and so in the right order."""
    before = latencies(lab4, tmp_path / 'before')
    with queueing(*((router, f'netem delay {delay}ms') for router, delay in zip(lab4.routers, DELAYS))):
        during = latencies(lab4, tmp_path / 'during')
    delayed = {
        (version, hop): (delay * MS, *during[version, hop], *before[version, hop])
        for version in VERSIONS
        for hop, delay in zip(HOPS, accumulate(DELAYS))
    }
    for (version, hop), (delay, latency, error, undelayed, _) in delayed.items():
        print(
            f'IPv{version} hop {hop}: {latency / US:.0f} us, on the wire {error / US:.0f} us more or less, '
            f'{(latency - undelayed - delay) / US:.0f} us more than the delay'
        )
    for (_, hop), (delay, latency, error, undelayed, _) in delayed.items():
        assert error < 100 * US
        # Each netem's timer may be late.
        assert delay < latency < delay + undelayed + hop * 100 * US * PATIENCE
    for version in VERSIONS:
        assert sorted(HOPS, key=lambda hop: during[version, hop]) == [*HOPS]


# fq


class Passed(NamedTuple):
    """A packet of the application's, as it passed r1."""

    time: int  # ns
    number: int
    length: int


@contextmanager
def passing(lab: Lab, filter: str) -> Iterator[Callable[[], list[Packet]]]:
    """What gives those packets of the application's that match and have data."""
    with lab.routers[0].capture(filter=filter) as seen:
        yield lambda: [packet for packet in ip_packets(seen) if packet.ttl > 32 and packet.payload]


def datagrams(lab: Lab, version: int) -> list[Passed]:
    """Hand fq a hundred UDP packets at once, to be spaced."""
    port = STREAM + version
    with passing(lab, f'udp and dst port {port}') as packets, udp_socket(lab.client, version) as sender, udp_socket(
        lab.server, version, port
    ):
        sender.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, PACE)
        sender.connect((lab.server_address(version), port))
        for number in range(100):
            sender.send(b'%05d' % number + bytes(1245))
        wait_until(lambda: len(packets()) == 100, 10, 'all packets pass r1')
    return [Passed(packet.time, int(packet.payload[:5]), len(packet.segment)) for packet in packets()]


def segments(lab: Lab, version: int) -> list[Passed]:
    """Upload by TCP with BBR, no faster than the pace."""
    port = UPLOAD + version
    with lab.iperf3_server(port), passing(lab, f'tcp and dst port {port}') as packets:
        output(iperf3(lab, version, port, '-C', 'bbr', '--fq-rate', str(PACE * 8), '-t', str(2 + PATIENCE)))
    ports = [packet.sport for packet in packets()]
    data = max(ports, key=ports.count)  # the other is iperf3's control connection
    return [
        Passed(packet.time, packet.sequence, len(packet.segment)) for packet in packets() if packet.sport == data
    ]


def early(packets: list[Passed]) -> float:
    """The share of packets that follow the one before sooner than half of the time that it has at this pace.

    fq makes up for half a packet's time where its timer was late.
    """
    soon = [
        later.time - sooner.time < sooner.length * NS // PACE // 2 for sooner, later in zip(packets, packets[1:])
    ]
    return sum(soon) / len(soon)


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
    print(f'early: {early(without):.3f}, with elfprobe {early(during):.3f}, of {len(during)}')
    assert len(elf.rows()) > len(during) / 2
    for packets in without, during:
        numbers = [packet.number for packet in packets]
        assert numbers == sorted(set(numbers))
    assert early(during) < early(without) + 0.1


# PREEMPT_RT

# Sends numbered packets, with a real-time priority and a pause in s, until its input ends; prints how many.
SENDER = """
import os, select, socket, sys
server, port, priority, pause = sys.argv[1], *map(int, sys.argv[2:4]), float(sys.argv[4])
os.sched_setaffinity(0, {0})
if priority:
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
number = 0
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
    while not select.select([sys.stdin], [], [], pause)[0]:
        number += 1
        udp.sendto(b'%08d' % number + bytes(200), (server, port))
print(number)
"""


def test_preempted_sender(lab4, tmp_path):
    """All packets of two on one CPU arrive, once each. With PREEMPT_RT one is preempted by the other now and
    then while a probe is made."""
    server, ports = lab4.server_address(4), (STREAM, STREAM + 1)
    with ExitStack() as stack:
        receivers = [stack.enter_context(udp_socket(lab4.server, 4, port)) for port in ports]
        for receiver in receivers:
            receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 28)
            receiver.setblocking(False)
        elf = stack.enter_context(elfprobe(lab4, '-p', '0', server, cwd=tmp_path))
        senders = [
            lab4.client.popen(
                sys.executable,
                '-c',
                SENDER,
                server,
                str(port),
                priority,
                pause,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for port, priority, pause in zip(ports, ('0', '50'), ('0.0001', '0.001'))
        ]
        wait_until(lambda: sum(row.dport == ports[1] for row in elf.rows()) > 1000, 60, '1000 rows')
        sent = [int(sender.communicate(timeout=20 * PATIENCE)[0]) for sender in senders]
        arrived: list[list[int]] = [[], []]

        def all_have_arrived() -> bool:
            for receiver, numbers in zip(receivers, arrived):
                with suppress(BlockingIOError):
                    while True:
                        packet = receiver.recv(1000)
                        if len(packet) == 2:  # a probe: how far the server is away must be found out
                            continue
                        assert packet[8:] == bytes(200)
                        numbers.append(int(packet[:8]))
            return all(len(numbers) >= count for numbers, count in zip(arrived, sent))

        with suppress(TimeoutError):  # the difference is shown below
            wait_until(all_have_arrived, 2, 'all packets arrive')
        assert elf.stop() == 0
    for numbers, count in zip(arrived, sent):
        assert sorted(numbers) == [*range(1, count + 1)]


# Devices

# Sets a WireGuard device's own key, or its peer, and prints the public key.
WIREGUARD = """
import base64, os, sys
from pyroute2 import WireGuard
wireguard, peer = WireGuard(), sys.argv[1:]
if peer:
    wireguard.set('tunnel', peer={'public_key': peer[0], 'endpoint_addr': peer[1], 'endpoint_port': 51820,
                                  'allowed_ips': ['0.0.0.0/0', '::/0']})
else:
    wireguard.set('tunnel', private_key=base64.b64encode(os.urandom(32)).decode(), listen_port=51820)
key = wireguard.info('tunnel')[0].get_attr('WGDEVICE_A_PUBLIC_KEY')
print((key if len(key) == 44 else base64.b64encode(key)).decode())
"""


def wireguard(host: Host, *peer: str) -> str:
    return host.run(sys.executable, '-c', WIREGUARD, *peer).stdout.strip()


@contextmanager
def ppp(client: Host, server: Host) -> Iterator[None]:
    """Devices that speak PPP to each other through a pseudo-terminal, with link-local addresses only."""
    command = 'pppd', 'nodetach', 'noauth', 'local', 'ifname', 'tunnel', 'noip', '+ipv6'
    answering = shlex.join(client.command(*command, 'notty'))
    process = server.popen(*command, 'pty', answering, stdout=subprocess.DEVNULL)

    def shown(host: Host) -> str:
        return run('ip', '-n', host.name, 'address', 'show', 'dev', 'tunnel', check=False).stdout

    try:
        wait_until(lambda: 'inet6' in shown(client) and 'inet6' in shown(server), 20, 'PPP is up')
        yield
    finally:
        end(process)
        wait_until(lambda: not shown(client) and not shown(server), 10, 'PPP has ended')


@contextmanager
def tunnel(lab: Lab, kind: str, version: int, inside: bool) -> Iterator[dict[int, str]]:
    """A tunnel from the client to r2, and the client's way to the server through it; who answers by hop.

    client - r1 - r2 - r3 - r4 - server        The client's packets have its address inside the tunnel,
        ===========                            or with `inside` False the one outside: then what comes
                                               back comes bare.
    """
    r2, r3, r4 = lab.routers[1:]
    outer = 6 if kind.startswith('ip6') else 4
    ends = address(outer, 1, 1), address(outer, 2, 2)
    near, far = (INSIDE[version].format(number) for number in (1, 2))
    net = f'{INSIDE[version].format(0 if version == 4 else "")}/{BITS[version]}'
    with ExitStack() as stack:
        if kind == 'ppp':
            stack.enter_context(ppp(lab.client, r2))
        for host, own, other, address_inside in (lab.client, *ends, near), (r2, *ends[::-1], far):
            if kind != 'ppp':
                # By default the outer TTL is the inner one, and probes of the first hop do not reach it.
                ends_and_ttl = '' if kind == 'wireguard' else f'local {own} remote {other} ttl 64'
                make(host, 'ip', f'link add tunnel type {kind} {ends_and_ttl}')
                stack.callback(batch, host.name, ['link del tunnel'])
            batch(
                host.name,
                [
                    f'address add {address_inside}/{BITS[version]} dev tunnel' + (' nodad' if version == 6 else ''),
                    'link set tunnel up',
                ],
            )
        if kind == 'wireguard':
            keys = wireguard(lab.client), wireguard(r2)
            wireguard(lab.client, keys[1], ends[1])
            wireguard(r2, keys[0], ends[0])
        for host, link in (r3, 3), (r4, 4):
            batch(host.name, [f'route add {net} via {address(version, link, 1)}'])
            stack.callback(batch, host.name, [f'route del {net}'])
        source = near if inside else lab.client_address(version)
        batch(lab.client.name, [f'route add {lab.server_address(version)} dev tunnel src {source}'])
        # Errors of ICMPv6 come from an address of the device that the packet came in by (icmp6_send()).
        first = far if inside or version == 6 else lab.hop(version, 2)
        yield {1: first, 2: lab.hop(version, 3), 3: lab.hop(version, 4)}


def check(lab: Lab, elf: Run, hops: dict[int, dict[int, str]]) -> None:
    """Of TCP in segments large and small, and of pings: each hop of a version answers, nobody else does."""
    right = {
        (lab.server_address(version), protocol, hop, responder)
        for version in hops
        for protocol in (ECHO[version], TCP)
        for hop, responder in hops[version].items()
    }

    def answered() -> set[tuple[str, int, int, str]]:
        return {(row.dest, row.protocol, row.outttl, row.responder) for row in elf.rows() if row.is_answered}

    with lab.iperf3_server(*(UPLOAD + version for version in hops)):
        for version in hops:
            lab.client.popen(
                'ping', '-nq', f'-i{0.02 * PATIENCE:g}', lab.server_address(version), stdout=subprocess.DEVNULL
            )
        for version in hops:
            output(iperf3(lab, version, UPLOAD + version, '-t', '2', '-b', '1M', '-l', '5000'))
        with suppress(TimeoutError):  # the difference is shown below
            wait_until(lambda: answered() >= right, 10, 'all hops answer')
        lab.client.end_processes()
    assert elf.stop() == 0
    assert answered() == right
    rows = elf.rows()
    assert sum(row.is_answered for row in rows) > 0.9 * len(rows) > 30


@pytest.mark.parametrize('kind, version, device, encapsulation, inside, options', [
    ('ipip', 4, 'tunnel', 'ethernet', True, []),
    ('ipip', 4, 'tunnel', 'ipinip', True, ['-T']),
    ('ipip', 4, 'eth0', 'ipinip', True, ['-T']),
    ('ipip', 4, 'eth0', 'ipinip', False, []),
    ('sit', 6, 'tunnel', 'ethernet', True, ['-T']),
    ('sit', 6, 'tunnel', 'ip6inip', True, []),
    ('sit', 6, 'eth0', 'ip6inip', True, []),
    ('sit', 6, 'eth0', 'ip6inip', False, ['-T']),
    ('ip6tnl mode any', 4, 'tunnel', 'ethernet', True, []),
    ('ip6tnl mode any', 6, 'tunnel', 'ethernet', True, ['-T']),
    ('gre', 4, 'tunnel', 'ethernet', True, ['-T']),
    ('gre key 7', 6, 'tunnel', 'ethernet', True, []),
    ('ip6gre', 4, 'tunnel', 'ethernet', True, []),
    ('ip6gre', 6, 'tunnel', 'ethernet', True, ['-T']),
    ('wireguard', 4, 'tunnel', 'ethernet', True, []),
    ('wireguard', 6, 'tunnel', 'ethernet', True, ['-T']),
    ('ppp', 4, 'tunnel', 'ethernet', True, ['-T']),
    ('ppp', 6, 'tunnel', 'ethernet', True, []),
])  # fmt: skip
def test_tunnel(lab4, tmp_path, kind, version, device, encapsulation, inside, options):
    """The hops of the packets inside are those behind the tunnel."""
    if kind == 'ip6gre' and LINUX < (5, 14):
        pytest.skip('bpf_clone_redirect() takes ip6gre for Ethernet here (dev_is_mac_header_xmit())')
    if kind == 'ppp' and not (Path('/dev/ppp').exists() and shutil.which('pppd')):
        pytest.skip('no PPP here, or no pppd')
    options = ['-i', device, '-e', encapsulation, '-p', '20', *options, lab4.server_address(version)]
    with tunnel(lab4, kind, version, inside) as hops:
        if device == 'eth0':
            # BPF cannot trim what the tunnel has wrapped and left to the device below to finish.
            lab4.client.run('ethtool', '-K', 'tunnel', 'tx', 'off')
        with elfprobe(lab4, *options, cwd=tmp_path) as elf:
            check(lab4, elf, {version: hops})


@pytest.mark.parametrize('options', [[], ['-T']], ids=['truncated', 'whole'])
@pytest.mark.parametrize('device', [f'eth0.{VLAN}', 'eth0'])
def test_vlan(lab4, tmp_path, device, options):
    """The way to r1 is an 802.1Q device, at which elfprobe is, or at the one below."""
    with ExitStack() as stack:
        for side, host in (1, lab4.client), (2, lab4.routers[0]):
            make(host, 'ip', f'link add link eth0 name eth0.{VLAN} type vlan id {VLAN}')
            stack.callback(batch, host.name, [f'link del eth0.{VLAN}'])
            batch(host.name, attach(f'eth0.{VLAN}', VLAN, side))
        for version in VERSIONS:
            net = f'{address(version, VLAN, 0)}/{BITS[version]}'
            for link, router in enumerate(lab4.routers[1:], 2):
                batch(router.name, [f'route add {net} via {address(version, link, 1)}'])
                stack.callback(batch, router.name, [f'route del {net}'])
            to_r1 = f'via {address(version, VLAN, 2)}'
            batch(lab4.client.name, [f'route add {lab4.server_address(version)} {to_r1}'])
        hops = {
            version: {1: address(version, VLAN, 2), **{hop: lab4.hop(version, hop) for hop in HOPS[1:]}}
            for version in VERSIONS
        }
        options = ['-p', '20', *options, *both(lab4)]
        check(lab4, stack.enter_context(elfprobe(lab4, '-i', device, *options, cwd=tmp_path)), hops)


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
