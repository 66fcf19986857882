"""Devices and packets other than plain IP in Ethernet: TUN, VLAN tags, IP in IPv4.

client: tun0 === a program that plays three routers and a host behind them
client: eth0 --- r1 --- ... --- server, which takes IP out of IPv4 and plays routers for what is inside
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator

import pytest

from lab import Host, Lab, address, attach, batch, end, wait_for_line, wait_until
from runs import ELFPROBE, Run, elfprobe, inside

pytestmark = pytest.mark.root

HOPS = 1, 2, 3
HOST = {4: '192.0.2.80', 6: '2001:db8::80'}
ROUTERS = {4: '192.0.2.{}', 6: '2001:db8::{}'}
PROTOCOLS = {4: 4, 6: 41}  # of IP in IPv4

# Answers like routers whose addresses end in 1, 2 and 3, and like a host behind them that answers echo
# requests; given an address, it wraps what it says in IPv4 from there. `play` makes the answer to a packet.
PLAYER = """
import sys
from scapy.layers.inet import IP, ICMP
from scapy.layers.inet6 import IPv6, ICMPv6TimeExceeded, ICMPv6EchoReply, ICMPv6EchoRequest
from scapy.packet import Raw

def play(packet, outer):
    if packet[0] >> 4 == 4:
        asked, version, left, field = IP(packet), IP, 'ttl', '192.0.2.%d'
    else:
        asked, version, left, field = IPv6(packet), IPv6, 'hlim', '2001:db8::%d'
    hop = getattr(asked, left)
    if version is IPv6 and asked.dst.startswith('ff'):
        return None
    if hop <= 3:
        answer = ICMP(type=11) if version is IP else ICMPv6TimeExceeded()
        said = version(src=field % hop, dst=asked.src, **{left: 65 - hop}) / answer / Raw(packet[:120])
    elif version is IP and ICMP in asked:
        said = version(src=asked.dst, dst=asked.src, ttl=61) / ICMP(
            type=0, id=asked[ICMP].id, seq=asked[ICMP].seq) / Raw(bytes(asked[ICMP].payload))
    elif version is IPv6 and ICMPv6EchoRequest in asked:
        request = asked[ICMPv6EchoRequest]
        said = version(src=asked.dst, dst=asked.src, hlim=61) / ICMPv6EchoReply(
            id=request.id, seq=request.seq, data=request.data)
    else:
        return None
    if outer:
        said = IP(src=outer[0], dst=outer[1], proto=4 if version is IP else 41) / said
    return bytes(said)
"""

TUN_PLAYER = (
    PLAYER
    + """
import fcntl, os, struct
tun = os.open('/dev/net/tun', os.O_RDWR)
fcntl.ioctl(tun, 0x400454CA, struct.pack('16sH22x', b'tun0', 0x1001))  # TUNSETIFF: IFF_TUN, IFF_NO_PI
print('ready', file=sys.stderr, flush=True)
while True:
    said = play(os.read(tun, 65536), sys.argv[1:])
    if said:
        os.write(tun, said)
"""
)

# Takes packets out of those of a protocol, as the end of a tunnel does, and answers through it.
TUNNEL_PLAYER = (
    PLAYER
    + """
import socket
protocol, own, others = int(sys.argv[1]), sys.argv[2], sys.argv[3]
with socket.socket(socket.AF_INET, socket.SOCK_RAW, protocol) as tunnel, \\
        socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as out:
    print('ready', file=sys.stderr, flush=True)
    while True:
        packet = tunnel.recv(65536)
        said = play(packet[packet[0] % 16 * 4:], (own, others))
        if said:
            out.sendto(said, (others, 0))
"""
)

# Sends echo requests inside IPv4 packets, as a tunnel does, 200 a second.
TUNNEL_PING = """
import socket, sys, time
from itertools import count
from scapy.layers.inet import IP, ICMP
from scapy.layers.inet6 import IPv6, ICMPv6EchoRequest
protocol, server = int(sys.argv[1]), sys.argv[2]
with socket.socket(socket.AF_INET, socket.SOCK_RAW, protocol) as tunnel:
    for number in count():
        inner = IP(src='192.0.2.99', dst='192.0.2.80', ttl=64) / ICMP(id=7, seq=number % 65536) / bytes(40)
        if protocol == 41:
            inner = IPv6(src='2001:db8::99', dst='2001:db8::80') / ICMPv6EchoRequest(
                id=7, seq=number % 65536, data=bytes(40))
        tunnel.sendto(bytes(inner), (server, 0))
        time.sleep(0.005)
"""

# Sends UDP in Ethernet with VLAN tags, to a device of which there is none that could add them.
TAGGED = """
import socket, sys, time
from scapy.layers.l2 import Ether, Dot1Q, Dot1AD
from scapy.layers.inet import IP, UDP
tags = {1: Dot1Q(vlan=5), 2: Dot1AD(vlan=5) / Dot1Q(vlan=6)}[int(sys.argv[1])]
inner = IP(src='192.0.2.99', dst='192.0.2.80') / UDP(dport=9) / bytes(40)
packet = Ether(dst='02:00:00:00:00:01') / tags / inner
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire:
    wire.bind(('eth0', 0))
    while True:
        wire.send(bytes(packet))
        time.sleep(0.005)
"""


@contextmanager
def playing(lab: Lab, host: str, code: str, *arguments: str) -> Iterator[None]:
    process = getattr(lab, host).popen(sys.executable, '-c', code, *arguments, stderr=subprocess.PIPE)
    try:
        wait_for_line(process, 'ready')
        yield
    finally:
        end(process)


def answered(run: Run) -> dict[int, str]:
    """Who has answered for each hop."""
    return {row.outttl: row.responder for row in run.rows() if row.is_answered}


def check(run: Run, version: int) -> None:
    """Each hop's router answers, and no other for it; nothing else does."""
    right = {hop: ROUTERS[version].format(hop) for hop in HOPS}
    wait_until(lambda: answered(run).items() >= right.items(), 20, 'each hop has answered')
    assert run.stop() == 0
    rows = run.rows()
    assert {(row.outttl, row.responder) for row in rows if row.is_answered} == set(right.items())
    assert {row.dest for row in rows} == {HOST[version]}


@pytest.mark.skipif(not Path('/dev/net/tun').exists(), reason='no TUN here')
@pytest.mark.parametrize('version, wrapped, options', [
    (4, False, []), (6, False, ['-T']), (4, True, ['-T']), (6, True, []),
])  # fmt: skip
def test_tun(lab4, tmp_path, version, wrapped, options):
    """Packets without Ethernet header; bare on the way out, their answers perhaps in IPv4."""
    outer = ['198.51.100.1', '198.51.100.2'] if wrapped else []
    if wrapped:
        options = [*options, '-e', 'ipinip' if version == 4 else 'ip6inip']
    with playing(lab4, 'client', TUN_PLAYER, *outer):
        batch(
            lab4.client.name,
            [
                'link set tun0 up',
                'address add 192.0.2.99/24 dev tun0',
                'address add 2001:db8::99/64 dev tun0 nodad',
            ],
        )
        with elfprobe(lab4, '-i', 'tun0', *options, HOST[version], cwd=tmp_path) as run:
            ping = lab4.client.popen('ping', '-nq', '-i.01', HOST[version], stdout=subprocess.DEVNULL)
            check(run, version)
            end(ping)


@pytest.mark.parametrize('version, options', [(4, []), (6, []), (6, ['-T'])])
def test_ip_in_ipv4_on_ethernet(lab4, tmp_path, version, options):
    """The TTL of the inner packet counts; the routers of the outer one's way are no hops."""
    protocol, server = str(PROTOCOLS[version]), lab4.server_address(4)
    option = 'ipinip' if version == 4 else 'ip6inip'
    with playing(lab4, 'server', TUNNEL_PLAYER, protocol, server, lab4.client_address(4)), elfprobe(
        lab4, '-e', option, *options, HOST[version], cwd=tmp_path
    ) as run:
        ping = lab4.client.popen(sys.executable, '-c', TUNNEL_PING, protocol, server)
        check(run, version)
        end(ping)


@pytest.mark.parametrize('tags', [pytest.param(1, marks=pytest.mark.sample), 2])
def test_vlan_tags(lab4, tmp_path, tags):
    """Probes have the tags of the packets that they are copies of."""
    probes = f'{"vlan and " * tags}ip[8] <= 32'
    with lab4.routers[0].capture(filter=probes) as seen, elfprobe(lab4, HOST[4], cwd=tmp_path) as run:
        sender = lab4.client.popen(sys.executable, '-c', TAGGED, str(tags))
        wait_until(seen.packets, 10, 'a probe')
        end(sender)
        assert run.stop() == 0
    for _, frame in seen.packets():
        assert frame[12 + 4 * tags : 14 + 4 * tags] == b'\x08\x00'
        assert frame[14 + 4 * tags] == 0x45
    assert len(run.rows()) == len(seen.packets()) > 0


PROBE, CARRIER = 14 + 20 + 8 + 2, 14 + 20 + 8 + 1000  # bytes of their frames


def queue_counts(host: Host) -> dict[str, tuple[int, int]]:
    """Frames and bytes that each queue of the device has sent."""
    shown = json.loads(host.run('tc', '-s', '-j', 'qdisc', 'show', 'dev', host.device).stdout)
    return {queue['parent']: (queue['packets'], queue['bytes']) for queue in shown if 'parent' in queue}


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason='needs two CPUs')
@pytest.mark.parametrize('is_steered', [False, True], ids=['by hash', 'by CPU'])
def test_queue_of_the_probe(make_lab, tmp_path, is_steered):
    """A probe takes the queue of its flow. Only if the device has a queue for each CPU (XPS), and the process moves
    to another one, then the socket keeps its queue for a while, and the probe has the new one's.

    client: many, two queues --- r1 --- server
    """
    lab, usable = make_lab(routers=1), os.sched_getaffinity(0)
    cpus = sorted(usable)[:2]
    client, queues, dest = Host(lab.client.name, ('many',)), 'numtxqueues 2 numrxqueues 2', lab.server_address(4)
    peer = f'peer many index 260 {queues} netns {lab.routers[0].name}'
    batch(client.name, [f'link add many index 250 {queues} type veth {peer}', *attach('many', 250, 1)])
    batch(lab.routers[0].name, attach('many', 250, 2))
    batch(client.name, [f'route add {dest}/32 via {address(4, 250, 2)}'])
    client.run('tc', 'qdisc', 'replace', 'dev', 'many', 'root', 'handle', '1:', 'mq')
    for queue, cpu in enumerate(cpus):
        mask = f'{(1 << cpu) if is_steered else 0:x}'
        client.run('tee', f'/sys/class/net/many/queues/tx-{queue}/xps_cpus', input=mask)
    with inside(lab.server):
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with inside(lab.client):
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    def queues_taken(run):
        """Send 100 packets and as many probes. Return the queue of most packets, and that of most probes."""
        before, probes, packets = queue_counts(client), len(run.rows()), 0

        def is_enough():
            nonlocal packets
            packets += sender.send(bytes(1000)) // 1000
            return packets >= 100 and len(run.rows()) >= probes + 50

        wait_until(is_enough, 20, '50 rows')
        carriers, others = {}, {}
        for name, (frames, size) in queue_counts(client).items():
            frames, size = frames - before[name][0], size - before[name][1]
            carriers[name] = (size - PROBE * frames) / (CARRIER - PROBE)
            others[name] = frames - carriers[name]
        return max(carriers, key=carriers.get), max(others, key=others.get)

    with receiver, sender:
        receiver.bind((dest, 7))
        sender.connect((dest, 7))
        try:
            with elfprobe(lab, dest, cwd=tmp_path, host=client) as run:
                os.sched_setaffinity(0, cpus[:1])
                packets, probes = queues_taken(run)
                assert packets == probes
                os.sched_setaffinity(0, cpus[1:])
                later = queues_taken(run)
        finally:
            os.sched_setaffinity(0, usable)
    assert later[0] == packets
    assert (later[1] == packets) == (not is_steered)


# Several devices


@pytest.mark.skipif(not Path('/dev/net/tun').exists(), reason='no TUN here')
def test_two_devices(make_lab: Callable[..., Lab], tmp_path: Path) -> None:
    """Two ways to r1, each with its destination. Answers to probes on one may arrive on the other."""

    def hops() -> set[tuple[str, int]]:
        return {(row.dest, row.outttl) for row in measuring.rows() if row.is_answered}

    lab = make_lab(routers=2)
    client, r1 = lab.client, lab.routers[0]
    batch(client.name, [
        f'link add eth1 type veth peer eth2 netns {r1.name}', 'address add 10.9.1.1/24 dev eth1',
        'link set eth1 up', 'tuntap add dev tun9 mode tun', 'link set tun9 up',
    ])  # fmt: skip
    batch(r1.name, ['address add 10.9.1.2/24 dev eth2', 'link set eth2 up'])
    server, r2 = lab.server_address(4), lab.hop(4, 2)
    batch(client.name, [f'route add {r2}/32 via 10.9.1.2 dev eth1 src {lab.client_address(4)}'])
    command = sys.executable, str(ELFPROBE), '-i', 'eth0', '-i', 'tun9', server
    ended = client.run(*command, check=False, cwd=tmp_path)
    assert ended.returncode == 1
    assert "'eth0' (Ethernet) and 'tun9' (IP) are not of the same kind" in ended.stderr
    for target in server, r2:
        client.popen('ping', '-nqi.02', target, stdout=subprocess.DEVNULL)
    with elfprobe(lab, '-i', 'eth0', '-i', 'eth1', '-w', 'packets', server, r2, cwd=tmp_path) as measuring:
        wait_until(lambda: hops() == {(server, 1), (server, 2), (r2, 1)}, 20, 'rows of both')
        batch(client.name, [f'route replace {r2}/32 via {lab.hop(4, 1)} dev eth0'])
        wait_until(lambda: f'the route to {r2} leads by eth0 now' in measuring.log, 10, 'that is told')
        batch(r1.name, ['link set eth2 down'])
        wait_until(lambda: 'the interface eth1 has no carrier' in measuring.log, 10, 'that is told, too')
        assert measuring.stop() == 0
    report = json.loads((tmp_path / 'elf.json').read_text())
    assert [each['name'] for each in report['interfaces']] == ['eth0', 'eth1']
    assert 'probing on eth0, eth1,' in measuring.log
    assert hops() == {(server, 1), (server, 2), (r2, 1)}
