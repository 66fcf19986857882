"""What elfprobe must not do: to the application and its packets, to receivers, to firewalls on the way.

    client - r1 - r2 - r3 - r4 - server        a probe with TTL k ends at lab.hop(version, k)

Flows are of sockets of this process, in the namespaces of client and server. Where nothing else is said,
each packet that may carries a probe. A flow in trouble is not probed.
"""

from __future__ import annotations

import ast
import csv
import itertools
import json
import re
import socket
import struct
import subprocess
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from typing import Any, Callable, Iterator, List, Sequence, Tuple

import pytest

from lab import Host, Lab, address, batch, end, kernel_counters, nft_table, tc, wait_for_line, wait_until
from runs import (
    CLSACT_COMMAND,
    ECHO_TYPES,
    ELFPROBE,
    FAMILY,
    HOPS,
    ICMP,
    ICMPV6,
    PROBES,
    TCP,
    UDP,
    VERSIONS,
    Packet,
    both,
    elfprobe,
    inside,
    ip_packets,
    numbered,
    ones_sum,
)

pytestmark = pytest.mark.root

MSS = 1460  # of Ethernet, at most
PORT, CLIENT_PORT = 7000, 7001  # the server's; the client's, where it is not the kernel's choice
MIB = 1 << 20
WINDOW = MIB // 8  # what is under way at once fits into the queue of a veth with XDP: 256 packets
TCP_FIN, TCP_SYN, TCP_RST = 0x01, 0x02, 0x04

TRUNCATED_AND_WHOLE = pytest.mark.parametrize('options', [[], ['-T']], ids=['truncated', 'whole'])

# asm-generic/socket.h, linux/net_tstamp.h, linux/errqueue.h, which Python does not know
SO_TIMESTAMPING = SCM_TIMESTAMPING = 37
SO_COOKIE = 57
TX_SOFTWARE, SOFTWARE, OPT_ID, OPT_TSONLY = 1 << 1, 1 << 4, 1 << 7, 1 << 11
ERRORS = {4: (socket.IPPROTO_IP, 11), 6: (socket.IPPROTO_IPV6, 25)}  # IP_RECVERR, IPV6_RECVERR

# Counts, on TC egress behind elfprobe, the UDP packets to a port by socket, mark, priority and whether it
# is a probe, until its standard input ends.
WITNESS = """
import socket, sys
from bcc import BPF
from pyroute2 import IPRoute
from elf.source import kernel_headers
with kernel_headers():
    bpf = BPF(text='''
struct kind { u64 cookie; u32 mark, priority; u64 is_probe; };
BPF_HASH(seen, struct kind, u64);
int witness(struct __sk_buff *skb)
{
	int v6 = skb->protocol == bpf_htons(0x86dd);
	struct kind kind = { bpf_get_socket_cookie(skb), skb->mark, skb->priority };

	if (load_byte(skb, v6 ? 20 : 23) != 17 || load_half(skb, v6 ? 56 : 36) != PORT)
		return -1;
	kind.is_probe = load_byte(skb, v6 ? 21 : 22) <= 32;
	seen.increment(kind);
	return -1;
}''', cflags=['-DPORT=' + sys.argv[1]])
filter = dict(kind='bpf', index=socket.if_nametoindex('eth0'), handle=1, prio=100, protocol=3,
              parent=0xFFFFFFF3)
with IPRoute() as ipr:
    ipr.tc('add-filter', fd=bpf.load_func('witness', BPF.SCHED_CLS).fd, name='witness', direct_action=True,
           **filter)
    print('ready', file=sys.stderr, flush=True)
    sys.stdin.read()
    ipr.tc('del-filter', **filter)
print([(kind.cookie, kind.mark, kind.priority, bool(kind.is_probe), count.value)
       for kind, count in bpf['seen'].items()])
"""

BLOCK = """
chain forward {
    type filter hook forward priority 0
    tcp dport 5201 drop
}
"""
STATEFUL = """
counter invalid { }
chain forward {
    type filter hook forward priority 0
    ct state invalid counter name invalid drop
}
"""
MASQUERADE = """
chain postrouting {
    type nat hook postrouting priority 100
    oifname eth1 masquerade
}
"""
# By client port. Refused packets do not prolong a block.


# Traffic


@contextmanager
def udp_sockets(lab: Lab, version: int) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Of client and server, bound."""
    with ExitStack() as stack:
        pair = []
        for host, port in (lab.client, CLIENT_PORT), (lab.server, PORT):
            with inside(host):
                pair.append(stack.enter_context(socket.socket(FAMILY[version], socket.SOCK_DGRAM)))
            pair[-1].settimeout(5)
            pair[-1].bind(('', port))
        yield pair[0], pair[1]


def send_udp(lab: Lab, version: int, sockets: tuple[socket.socket, socket.socket], count: int) -> None:
    """Numbered packets, each once the last has arrived."""
    sender, receiver = sockets
    sender.connect((lab.server_address(version), PORT))
    for number in range(count):
        sender.send(numbered(number))
        assert receiver.recv(2000) == numbered(number)


def send_echo_requests(lab: Lab, version: int, count: int) -> None:
    """With numbered payload, each once the last is answered."""
    protocol = {4: ICMP, 6: ICMPV6}[version]
    with inside(lab.client):
        raw = socket.socket(FAMILY[version], socket.SOCK_RAW, protocol)
    with raw:
        raw.settimeout(5)
        raw.connect((lab.server_address(version), 0))
        for number in range(count):
            data = struct.pack('!HH', CLIENT_PORT, number) + numbered(number)
            kind = struct.pack('!BB', ECHO_TYPES[protocol], 0)
            check = struct.pack('!H', 0xFFFF ^ ones_sum(kind + data))  # IPv6's is the kernel's work
            raw.send(kind + check + data)
            while not raw.recv(2000).endswith(data):
                pass


@contextmanager
def tcp_listener(lab: Lab, version: int) -> Iterator[socket.socket]:
    with inside(lab.server):
        listener = socket.create_server((lab.server_address(version), PORT), family=FAMILY[version])
    with listener:
        listener.settimeout(5)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, WINDOW)
        yield listener


@contextmanager
def tcp_connection(lab: Lab, listener: socket.socket) -> Iterator[tuple[socket.socket, socket.socket]]:
    """The client's end and the server's."""
    with inside(lab.client):
        sender = socket.socket(listener.family)
    with sender:
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, WINDOW)
        sender.settimeout(5)
        sender.connect(listener.getsockname())
        with listener.accept()[0] as receiver:
            for side in sender, receiver:
                side.settimeout(5)
                side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield sender, receiver


@contextmanager
def tcp_pair(lab: Lab, version: int) -> Iterator[tuple[socket.socket, socket.socket]]:
    with tcp_listener(lab, version) as listener, tcp_connection(lab, listener) as pair:
        yield pair


def exchange(client: socket.socket, server: socket.socket, count: int) -> None:
    """Requests and responses, in turn, of one packet each."""
    for number in range(count):
        for source, sink in (client, server), (server, client):
            source.sendall(numbered(number))
            received = b''
            while len(received) < len(numbered(number)):
                received += sink.recv(2000)
            assert received == numbered(number)


def transfer(source: socket.socket, sink: socket.socket, size: int) -> None:
    """As fast as it goes; what arrives is what was sent."""
    data = b''.join(struct.pack('!I', number) for number in range(size // 4))
    received = bytearray()
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(source.sendall, data)
        while len(received) < size:
            received += sink.recv(MIB)
        sent.result()
    assert received == data


# The lab


def packets_counted(host: Host, counter: str) -> int:
    """By a named counter of the table."""
    said = host.run('nft', 'list', 'counter', 'inet', 'elf', counter).stdout
    return int(re.findall(r'packets (\d+)', said)[0])


@contextmanager
def sysctls(hosts: Sequence[Host], values: dict[str, int]) -> Iterator[None]:
    before = {host: [int(host.run('sysctl', '-n', name).stdout) for name in values] for host in hosts}
    try:
        for host in hosts:
            host.run('sysctl', '-qw', *(f'{name}={value}' for name, value in values.items()))
        yield
    finally:
        for host in hosts:
            host.run('sysctl', '-qw', *(f'{name}={value}' for name, value in zip(values, before[host])))


def from_client(lab: Lab) -> str:
    """A filter for captures: what the client sends of UDP, TCP and echo requests."""
    sources = ' or '.join(f'src {lab.client_address(version)}' for version in VERSIONS)
    return f'({sources}) and (dst port {PORT} or icmp[0] == 8 or icmp6[0] == 128)'


def flags(packet: Packet) -> int:
    return packet.segment[13]


def tcp_length(packet: Packet) -> int:
    """Bytes of payload, captured or not."""
    length = int.from_bytes(packet.header[2:4] if packet.version == 4 else packet.header[4:6], 'big')
    return length - packet.l4_length - (len(packet.header) if packet.version == 4 else 0)


# The application's packets

Sent = List[Tuple[int, int, bytes, bytes]]


def datagrams(lab: Lab) -> tuple[Sent, Sent]:
    """UDP and echo requests as they leave the client, but for probes, and as they reach the server.

    Echo comes first, by which the path's length is known.
    """
    applications = f'({from_client(lab)}) and not {PROBES}'
    with lab.client.capture(filter=applications) as left, lab.server.capture(filter=from_client(lab)) as arrived:
        for version in VERSIONS:
            send_echo_requests(lab, version, 200)
            with udp_sockets(lab, version) as sockets:
                send_udp(lab, version, sockets, 200)
    return as_sent(ip_packets(left)), as_sent(ip_packets(arrived))


def as_sent(packets: list[Packet]) -> Sent:
    """Packets; identification or flow label, which sockets choose at random, counted from the first one's."""
    first: dict[Any, int] = {}
    found = []
    for packet in packets:
        assert packet.has_valid_header_checksum
        number = (packet.ip_id - first.setdefault(packet.flow, packet.ip_id)) % 2**16
        header = packet.header
        header = header[:4] + header[6:10] + header[12:] if packet.version == 4 else header[4:]
        found.append((number, packet.tos, header, packet.segment))
    return found


@TRUNCATED_AND_WHOLE
def test_datagrams_are_as_without(lab4: Lab, tmp_path: Path, options: list[str]) -> None:
    """Bytes, order and number, where they leave and where they arrive; no probe arrives."""
    without = datagrams(lab4)
    with elfprobe(lab4, '-p', '0', *options, *both(lab4), cwd=tmp_path) as run:
        beside = datagrams(lab4)
    assert beside == without
    assert [len(packets) for packets in without] == [800, 800]
    probed = Counter((row.dest, row.protocol) for row in run.rows())
    assert len(probed) == 4
    assert min(probed.values()) > 190


@pytest.mark.parametrize('version', VERSIONS)
def test_each_byte_of_a_stream_is_sent_once(lab4: Lab, tmp_path: Path, version: int) -> None:
    """In order, in packets that are yet to be segmented, none of them a retransmission; no probe arrives."""
    early = {'net.ipv4.tcp_early_retrans': 0}  # or else a busy machine looks like a loss
    applications = f'({from_client(lab4)}) and not {PROBES}'
    with sysctls([lab4.client], early), lab4.client.capture(
        filter=applications, snaplen=120
    ) as left, lab4.server.capture(filter=PROBES) as probes, elfprobe(
        lab4, '-p', '0', lab4.server_address(version), cwd=tmp_path
    ) as run, tcp_pair(lab4, version) as (sender, receiver):
        transfer(sender, receiver, 16 * MIB)
        assert run.stop() == 0
    packets = ip_packets(left)
    lengths = [tcp_length(packet) for packet in packets]
    expected = packets[0].sequence
    for packet, length in zip(packets, lengths):
        assert packet.sequence == expected % 2**32
        expected += length + bool(flags(packet) & (TCP_SYN | TCP_FIN))
    assert sum(lengths) == 16 * MIB
    assert max(lengths) > 10 * MSS
    assert not probes.packets()
    assert len(run.rows()) > 100


SHAPERS = {
    'htb': [
        'qdisc add dev eth0 root handle 1: htb default 1',
        'class add dev eth0 parent 1: classid 1:1 htb rate 50mbit',
    ],
    'tbf': ['qdisc add dev eth0 root handle 1: tbf rate 50mbit burst 16kb latency 40ms'],
}


@pytest.mark.parametrize(
    ('shaper', 'command'), [('htb', ()), ('tbf', ()), ('htb', CLSACT_COMMAND)], ids=['htb', 'tbf', 'htb, clsact']
)
def test_shaper_reckons_with_probes_as_they_are(
    lab4: Lab, tmp_path: Path, shaper: str, command: Sequence[str]
) -> None:
    """And not with the packets that they are copies of, which are up to a thousand times as long."""

    def told(*command: str) -> Any:
        return json.loads(lab4.client.run(*command).stdout)

    def bytes_sent() -> int:
        return int(told('ip', '-s', '-j', 'link', 'show', 'eth0')[0]['stats64']['tx']['bytes'])

    with ExitStack() as stack:
        stack.callback(lab4.client.run, 'tc', 'qdisc', 'del', 'dev', 'eth0', 'root', check=False)
        tc(lab4.client, *SHAPERS[shaper])
        before = bytes_sent()
        measuring = stack.enter_context(
            elfprobe(
                lab4, '-p', '0', '-d', lab4.server_address(6), cwd=tmp_path, via=(*lab4.client.command(), *command)
            )
        )
        sender, receiver = stack.enter_context(tcp_pair(lab4, 6))
        transfer(sender, receiver, 8 * MIB)
        sent = bytes_sent() - before
        qdiscs = {qdisc['kind']: qdisc for qdisc in told('tc', '-s', '-j', 'qdisc', 'show', 'dev', 'eth0')}
        assert measuring.stop() == 0
    assert len(measuring.rows()) > 50
    assert measuring.counters['send_failed'] == 0
    assert sent <= qdiscs[shaper]['bytes'] < 1.1 * sent  # it counts the headers of each segment
    if command:
        assert qdiscs['clsact']['drops'] == 0


@pytest.mark.parametrize('version', VERSIONS)
def test_mark_priority_socket_and_time_stamps(lab4: Lab, tmp_path: Path, version: int) -> None:
    """Packets have them behind elfprobe; probes the first two. Each packet is time-stamped once, in order."""
    address = lab4.server_address(version)
    with ExitStack() as stack:
        stack.callback(lab4.client.run, 'tc', 'qdisc', 'del', 'dev', 'eth0', 'clsact', check=False)
        tc(lab4.client, 'qdisc add dev eth0 clsact')
        elf = stack.enter_context(elfprobe(lab4, '-p', '0', address, cwd=tmp_path))
        sender, receiver = stack.enter_context(udp_sockets(lab4, version))
        (cookie,) = struct.unpack('Q', sender.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8))
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 0x77)
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, 5)
        sender.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPING, TX_SOFTWARE | SOFTWARE | OPT_ID | OPT_TSONLY)
        witness = lab4.client.popen(
            sys.executable,
            '-c',
            WITNESS,
            str(PORT),
            cwd=ELFPROBE.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        stack.callback(end, witness)
        wait_for_line(witness, 'ready')
        send_echo_requests(lab4, version, 1)
        send_udp(lab4, version, (sender, receiver), 200)
        stamped = list(time_stamps(sender, version, 200))
        seen = ast.literal_eval(witness.communicate(timeout=10)[0])
    probes = len(elf.rows()) - 1
    assert probes > 190
    assert sorted(seen) == [(0, 0x77, 5, True, probes), (cookie, 0x77, 5, False, 200)]
    assert stamped == list(range(200))


def time_stamps(udp: socket.socket, version: int, count: int) -> Iterator[int]:
    """The numbers of packets of which time stamps have come, of as many as there should be and all others."""
    number = 0
    udp.setblocking(False)
    while True:
        try:
            _, control, _, _ = udp.recvmsg(0, 500, socket.MSG_ERRQUEUE)
        except BlockingIOError:
            assert number >= count
            return
        found = {(level, kind): data for level, kind, data in control}
        assert any(found[socket.SOL_SOCKET, SCM_TIMESTAMPING][:16])
        yield struct.unpack_from('=I4BII', found[ERRORS[version]])[-1]
        number += 1


# Receivers


def counted(lab: Lab, tries: int = 5) -> list[dict[str, int]]:
    """What client and server count of TCP in exchanges of both families, but for what time decides.

    Once more if something was sent again, since the machine may have stood still. It must not be so each time.
    """
    hosts = lab.client, lab.server
    before = [kernel_counters(host) for host in hosts]
    for version in VERSIONS:
        with tcp_pair(lab, version) as pair:
            exchange(*pair, 300)
    now = [kernel_counters(host) for host in hosts]
    grown = [
        Counter({name: host[name] - earlier[name] for name in host if name.startswith('Tcp')})
        for host, earlier in zip(now, before)
    ]
    if tries and any(host['TcpRetransSegs'] for host in grown):
        return counted(lab, tries - 1)
    for host, peer in zip(grown, reversed(grown)):
        host['TcpOutSegs'] -= host['TcpExtDelayedACKs']
        peer['TcpInSegs'] -= host['TcpExtDelayedACKs']
    by_time = re.compile('HP|PureAcks|TW|Delayed')
    return [{name: value for name, value in host.items() if value and not by_time.search(name)} for host in grown]


@TRUNCATED_AND_WHOLE
def test_hosts_count_the_same_segments(lab4: Lab, tmp_path: Path, options: list[str]) -> None:
    """Neither duplicates nor acknowledgements, or whatever else TCP counts, come of probes.

    On a busy machine, an acknowledgement may now and then not wait for data.
    """
    without = [counted(lab4) for _ in range(3)]
    with elfprobe(lab4, '-p', '0', *options, *both(lab4), cwd=tmp_path) as run:
        beside = [counted(lab4) for _ in range(3)]
    assert sum(each in without for each in beside) >= 2, (without, beside)
    assert all(host['TcpInSegs'] > 600 for host in without[0])
    for each in [*without, *beside]:
        for host in each:
            del host['TcpInSegs'], host['TcpOutSegs']
    assert all(each == without[0] for each in beside), (without, beside)
    assert len(run.rows()) > 590 * len(beside)


@TRUNCATED_AND_WHOLE
def test_time_exceeded_do_no_harm(lab4: Lab, tmp_path: Path, options: list[str]) -> None:
    """Sockets get them: no connection is refused or reset, nothing sent again, no UDP socket sees an error.

    Neither SYN, nor FIN, nor RST carried a probe.
    """
    before = kernel_counters(lab4.client)
    with lab4.client.capture(filter=from_client(lab4), snaplen=120) as left, elfprobe(
        lab4, '-p', '0', '-I', 'pass', *options, *both(lab4), cwd=tmp_path
    ) as run:
        for version in VERSIONS:
            send_echo_requests(lab4, version, 1)
            with tcp_listener(lab4, version) as listener:
                for number in range(100):
                    with tcp_connection(lab4, listener) as (client, server):
                        exchange(client, server, 3)
                        leave(client, server, number)
            with udp_sockets(lab4, version) as (sender, receiver):
                send_udp(lab4, version, (sender, receiver), 200)
                assert sender.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        assert run.stop() == 0
    counters = kernel_counters(lab4.client)
    counters.subtract(before)
    answered = [sum(row.is_answered for row in run.rows() if row.dest == dest) for dest in both(lab4)]
    passed = [counters['IcmpInTimeExcds'], counters['Icmp6InTimeExcds']]
    if options:  # but for those that quote data, which TCP would take for its own
        assert all(0.4 * all_ < some < all_ for some, all_ in zip(passed, answered))
    else:
        assert passed == answered
    assert min(answered) > 400
    assert counters['TcpRetransSegs'] == counters['TcpAttemptFails'] == 0
    carriers = list(carriers_of_probes(ip_packets(left)))
    assert len(carriers) == len(run.rows())
    assert not [
        packet for packet in carriers if packet.protocol == TCP and flags(packet) & (TCP_SYN | TCP_FIN | TCP_RST)
    ]
    assert not [
        packet
        for packet in ip_packets(left)
        if packet.ttl <= 32 and packet.protocol == TCP and flags(packet) & (TCP_SYN | TCP_FIN | TCP_RST)
    ]


def leave(client: socket.socket, server: socket.socket, number: int) -> None:
    """End a connection in one of the ways there are: client or server first, with data, by a reset."""
    if number % 4 == 0:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        client.close()
    elif number % 4 == 1:
        server.close()
        assert client.recv(1) == b''
    elif number % 4 == 2:
        client.shutdown(socket.SHUT_WR)
        assert server.recv(1) == b''
    else:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
        client.send(b'last')  # goes with the FIN
        client.close()
        assert server.recv(5) == b'last'


def carriers_of_probes(packets: list[Packet]) -> Iterator[Packet]:
    """For each probe the packet of which it is a copy, which follows it."""
    waiting: dict[Any, int] = Counter()
    for packet in packets:
        if packet.ttl <= 32:
            waiting[packet.flow] += 1
        elif waiting.pop(packet.flow, 0):
            yield packet


# Firewalls


@TRUNCATED_AND_WHOLE
def test_stateful_firewall(lab4: Lab, tmp_path: Path, options: list[str]) -> None:
    """At hop 2, it drops what conntrack calls invalid: nothing, with any TCP options, busy or after silence.

    Conntrack minds acknowledgements, but hardly sequence numbers that are too low. Firewalls that do want
    them no farther back than the receiver's window.
    """
    r2, ends = lab4.routers[1], [lab4.client, lab4.server]
    names = [f'net.ipv4.tcp_{name}' for name in ('window_scaling', 'sack', 'timestamps')]
    variants = [
        dict.fromkeys(names, 1),
        *({**dict.fromkeys(names, 1), name: 0} for name in names),
        dict.fromkeys(names, 0),
    ]
    with ExitStack() as stack:
        stack.enter_context(sysctls([r2], {'net.netfilter.nf_conntrack_tcp_be_liberal': 0}))
        stack.enter_context(nft_table(r2, STATEFUL))
        seen = stack.enter_context(lab4.client.capture(filter=f'tcp port {PORT}', snaplen=120))
        run = stack.enter_context(elfprobe(lab4, '-p', '0', *options, *both(lab4), cwd=tmp_path))
        listeners = [stack.enter_context(tcp_listener(lab4, version)) for version in VERSIONS]
        connections = []
        for variant in variants:
            with sysctls(ends, variant):
                connections += [stack.enter_context(tcp_connection(lab4, listener)) for listener in listeners]
        ports = [client.getsockname()[1] for client, _ in connections]
        for client, server in connections:
            for side in client, server:
                side.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                side.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
            exchange(client, server, 20)
            transfer(client, server, 2 * MIB)
            transfer(server, client, 2 * MIB)
        time.sleep(2)  # the silence, but for keep-alives
        for number, (client, server) in enumerate(connections):
            exchange(client, server, 20)
            transfer(client, server, MIB)
            leave(client, server, number)
            client.close()
            server.close()
        assert run.stop() == 0
        assert packets_counted(r2, 'invalid') == 0
    check_age_of_probes(ip_packets(seen))
    rows = defaultdict(list)
    for row in run.rows():
        rows[row.sport, row.outttl].append(row)
    for port, ttl in product(ports, HOPS):
        assert len(rows[port, ttl]) > 20
        assert sum(row.is_answered for row in rows[port, ttl]) > 0.97 * len(rows[port, ttl])


def check_age_of_probes(packets: list[Packet]) -> None:
    """None begins farther below the end of what was sent before than the receiver's first window."""
    window = min(
        int.from_bytes(packet.segment[14:16], 'big')
        for packet in packets
        if packet.sport == PORT and flags(packet) & TCP_SYN
    )
    ends: dict[Any, int] = {}
    for packet in packets:
        if packet.dport == PORT:
            back = (ends.get(packet.flow, packet.sequence) - packet.sequence + 2**31) % 2**32 - 2**31
            if packet.ttl <= 32:
                assert back <= window
            elif back <= 0:
                ends[packet.flow] = packet.sequence + tcp_length(packet)


PUBLIC = {4: '198.51.100.%d', 6: '2001:db8::%d'}  # by protocol


@contextmanager
def public_addresses(lab: Lab) -> Iterator[None]:
    """Give the server addresses to which private ones do not go untranslated."""
    nets = {4: '198.51.100.0/24', 6: '2001:db8::/64'}
    for version, bits in (4, 32), (6, 128):
        for number, router in enumerate(lab.routers, 1):
            batch(router.name, [f'route add {nets[version]} via {address(version, number + 1, 2)}'])
        nodad = ' nodad' if version == 6 else ''
        addresses = [f'{PUBLIC[version] % protocol}/{bits}' for protocol in (ICMP, UDP, TCP)]
        batch(lab.server.name, [f'address add {one} dev eth0{nodad}' for one in addresses])
    try:
        yield
    finally:
        for version, bits in (4, 32), (6, 128):
            for router in lab.routers:
                batch(router.name, [f'route del {nets[version]}'])
            for protocol in ICMP, UDP, TCP:
                batch(lab.server.name, [f'address del {PUBLIC[version] % protocol}/{bits} dev eth0'])


@pytest.mark.sample
@pytest.mark.parametrize('options', [[], ['-p', '0']], ids=['usual', 'every packet'])
def test_nat(lab4: Lab, tmp_path: Path, options: list[str]) -> None:
    """At hop 1: probes are translated, and their answers back, so that rows are as without.

    But guarded probes to hops behind it are not. Few of these leave it, and nothing arrives twice. Checksums are
    finished: a quoted one that is not (which only veth sends) comes back wrong from any NAT.
    """
    r1 = lab4.routers[0]
    dests = {
        (version, protocol): PUBLIC[version] % protocol for version in VERSIONS for protocol in (ICMP, UDP, TCP)
    }

    def is_settled() -> bool:
        answered = {(row.dest, row.outttl) for row in run.rows() if row.is_answered}
        return answered >= set(product(dests.values(), HOPS))

    with ExitStack() as stack:
        stack.callback(lab4.set_checksum_offload, True)
        lab4.set_checksum_offload(False)
        stack.enter_context(public_addresses(lab4))
        stack.enter_context(nft_table(r1, MASQUERADE))
        outside = stack.enter_context(r1.capture(r1.devices[1], filter=from_client(lab4)))
        run = stack.enter_context(elfprobe(lab4, *options, *dests.values(), cwd=tmp_path))
        talks = [stack.enter_context(conversation(lab4, *what, dest)) for what, dest in dests.items()]
        deadline = time.monotonic() + 30
        while not is_settled():
            assert time.monotonic() < deadline, 'hops behind the NAT answer'
            for talk in talks:
                talk()
            time.sleep(0.005)
        settled = time.monotonic_ns()
        for _ in range(300):
            for talk in talks:
                talk()
            time.sleep(0.002)
        assert run.stop() == 0
    untranslated = ip_packets(outside)
    assert not [packet for packet in untranslated if packet.ttl > 32 or packet.has_valid_checksum]
    assert len(untranslated) <= 2 * len(HOPS) * len(dests)
    for (version, _), dest in dests.items():
        rows = [row for row in run.rows() if row.dest == dest and row.sendtime > settled]
        for ttl in HOPS:
            some = [row for row in rows if row.outttl == ttl]
            answered = [row for row in some if row.is_answered]
            assert len(some) > 15, (dest, ttl)  # the first routers answer all destinations
            assert len(answered) > 0.97 * len(some)
            assert {row.responder for row in answered} == {lab4.hop(version, ttl)}


@contextmanager
def conversation(lab: Lab, version: int, protocol: int, dest: str) -> Iterator[Callable[[], None]]:
    """A flow from the client: a function that sends one packet and waits for its answer, which must be right."""
    numbers = itertools.count()
    if protocol == ICMP:

        def talk() -> None:
            data = struct.pack('!HH', CLIENT_PORT, next(numbers) % 65536) + bytes(56)
            kind = struct.pack('!BB', ECHO_TYPES[{4: ICMP, 6: ICMPV6}[version]], 0)
            raw.send(kind + struct.pack('!H', 0xFFFF ^ ones_sum(kind + data)) + data)
            while not raw.recv(2000).endswith(data):
                pass

        with inside(lab.client):
            raw = socket.socket(FAMILY[version], socket.SOCK_RAW, {4: ICMP, 6: ICMPV6}[version])
        with raw:
            raw.settimeout(5)
            raw.connect((dest, 0))
            yield talk
        return
    with ExitStack() as stack:
        kind = {UDP: socket.SOCK_DGRAM, TCP: socket.SOCK_STREAM}[protocol]
        with inside(lab.server):
            server = stack.enter_context(socket.socket(FAMILY[version], kind))
        with inside(lab.client):
            client = stack.enter_context(socket.socket(FAMILY[version], kind))
        client.settimeout(5)
        server.settimeout(5)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((dest, PORT))
        if protocol == TCP:
            server.listen()
        client.connect((dest, PORT))
        if protocol == TCP:
            server = stack.enter_context(server.accept()[0])

        def answer() -> None:
            data = b'%08d' % next(numbers)
            client.send(data)
            received, source = server.recvfrom(100)
            assert received == data
            if protocol == TCP:
                server.send(data)
            else:
                server.sendto(data, source)
            assert client.recv(100) == data

        yield answer


@pytest.mark.parametrize('version', VERSIONS)
def test_raw_sockets(lab4: Lab, tmp_path: Path, version: int) -> None:
    """TCP that the kernel knows nothing of has no state that could be told, or keep probes from it."""
    # Whatever the kernel took for the next sequence number, it would be beyond one of these. The acknowledgements
    # grow, as of connections that the peer knows.
    segments = [
        struct.pack('!HHIIBBHHH', CLIENT_PORT + flow, PORT, 1 + (flow << 31), ack, 5 << 4, 0x10, 1000, 0, 0)
        for ack in range(1, 31)
        for flow in (0, 1)
    ]
    server = lab4.server_address(version)
    with elfprobe(lab4, '-p', '0', '-d', server, cwd=tmp_path) as measuring, inside(lab4.client), socket.socket(
        FAMILY[version], socket.SOCK_RAW, TCP
    ) as raw:
        for segment in segments:
            raw.sendto(segment, (server, 0))
        wait_until(lambda: len(measuring.rows()) >= 30, 10, 'they have their rows')  # of those due
        assert measuring.stop() == 0
    assert measuring.counters['carrier_resent'] == measuring.counters['flow_stalled'] == 0
    with open(tmp_path / 'elf.csv', encoding='ascii') as file:
        assert {(row['srtt'], row['cwnd'], row['retrans']) for row in csv.DictReader(file)} == {('', '', '')}
