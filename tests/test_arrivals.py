"""What peers and applications notice of probes that nothing stops on their way: nothing.

    client - r1 - r2 - r3 - r4 - server        and the same with one router, and with none

Each topology has its own reason why probes may arrive. The server has an address for each kind of flow, so
that no flow knows the path by another one. A run without elfprobe says what is to be expected.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Iterator, NamedTuple

import pytest

from lab import Host, Lab, batch, kernel_counters, nft_table, wait_until
from runs import FAMILY, VERSIONS, elfprobe, inside, numbered

pytestmark = pytest.mark.root

PORT = 7100
REQUESTS, DATAGRAMS, PINGS = 80, 200, 60
FLOWS = 'requests', 'one-way', 'ping', 'tcp'
OPTIONS = {
    'truncated': [],
    'whole': ['-T'],
    'truncated, every packet': ['-p', '0'],
    'whole, every packet': ['-T', '-p', '0'],
}

SET_TTL = """
chain set_ttl {
    type filter hook %s priority -150
    iifname eth0 ip ttl set 65
    iifname eth0 ip6 hoplimit set 65
}
"""
# Packets of the server look as if their way was longer or shorter than it is.
SET_TTL_BACK = """
chain set_ttl {
    type filter hook prerouting priority -150
    iifname eth1 meta l4proto { udp, tcp } ip ttl set %(ttl)d
    iifname eth1 meta l4proto { udp, tcp } ip6 hoplimit set %(ttl)d
    iifname eth1 icmp type echo-reply ip ttl set %(ttl)d
    iifname eth1 icmpv6 type echo-reply ip6 hoplimit set %(ttl)d
}
"""


class Topology(NamedTuple):
    routers: int
    router: int = 0  # the one with this nft table; 0: none
    table: str = ''
    hops: int = 0  # how many answer


TOPOLOGIES = {
    'on-link': Topology(0),
    'one router': Topology(1, hops=1),
    'four routers': Topology(4, hops=4),
    'TTL set at r2': Topology(4, 2, SET_TTL % 'prerouting', hops=1),
    'TTL set behind r2': Topology(4, 2, SET_TTL % 'postrouting', hops=2),
    'way back longer': Topology(4, 4, SET_TTL_BACK % dict(ttl=57), hops=4),
    'way back shorter': Topology(4, 1, SET_TTL_BACK % dict(ttl=64), hops=4),
}

# Packets that a host drops because they are broken are counted. No flow may cost more than so many of these.
BROKEN_MAX = 12
BROKEN = 'UdpInErrors', 'Udp6InErrors', 'IcmpInErrors', 'IcmpInCsumErrors', 'Icmp6InErrors', 'Icmp6InCsumErrors'
COUNTERS = (
    'UdpInDatagrams', 'UdpNoPorts', 'UdpInCsumErrors', 'Udp6InDatagrams', 'Udp6NoPorts', 'Udp6InCsumErrors',
    'IcmpInEchos', 'Icmp6InEchos', 'IcmpOutEchoReps', 'Icmp6OutEchoReplies',
    'TcpInErrs', 'TcpRetransSegs', 'TcpOutRsts', 'TcpEstabResets', 'TcpAttemptFails',
    'TcpExtTCPDSACKRecv', 'TcpExtTCPDSACKOldSent', 'TcpExtDelayedACKLost', 'TcpExtTCPSACKReneging',
)  # fmt: skip


def flow_address(lab: Lab, version: int, flow: str) -> str:
    """Return the server's address for a kind of flow."""
    return re.sub('2$', str(11 + FLOWS.index(flow)), lab.server_address(version))


@pytest.fixture(scope='module', params=TOPOLOGIES)
def topology(request: pytest.FixtureRequest) -> Iterator[tuple[Lab, Topology]]:
    chosen = TOPOLOGIES[request.param]
    with Lab(routers=chosen.routers) as lab, ExitStack() as stack:
        for version, bits in (4, 24), (6, 64):
            for flow in FLOWS:
                nodad = ' nodad' if version == 6 else ''
                batch(lab.server.name, [f'address add {flow_address(lab, version, flow)}/{bits} dev eth0{nodad}'])
        if chosen.router:
            stack.enter_context(nft_table(lab.routers[chosen.router - 1], chosen.table))
        yield lab, chosen


# Flows. Each returns what its application and its peer notice.


def udp(host: Host, version: int, address: str = '') -> socket.socket:
    with inside(host):
        made = socket.socket(FAMILY[version], socket.SOCK_DGRAM)
    made.bind((address, PORT if address else 0))
    made.settimeout(2)
    return made


@contextmanager
def receiving(lab: Lab, version: int, flow: str, is_echoed: bool) -> Iterator[list[bytes]]:
    """The server receives datagrams until the end of the block, and perhaps sends them back."""
    received: list[bytes] = []
    is_over = threading.Event()

    def receive() -> None:
        while not is_over.is_set():
            with suppress(socket.timeout):
                data, source = receiver.recvfrom(4000)
                received.append(data)
                if is_echoed:
                    receiver.sendto(data, source)

    with udp(lab.server, version, flow_address(lab, version, flow)) as receiver:
        receiver.settimeout(0.2)
        thread = threading.Thread(target=receive)
        thread.start()
        try:
            yield received
        finally:
            is_over.set()
            thread.join()


def requests(lab: Lab, version: int) -> Any:
    """UDP: requests, each with its answer. What both ends receive; an answer too many shifts all others."""
    answers: list[bytes] = []
    with receiving(lab, version, 'requests', True) as received, udp(lab.client, version) as client:
        client.connect((flow_address(lab, version, 'requests'), PORT))
        for number in range(REQUESTS):
            client.send(numbered(number))
            answers.append(client.recv(4000))
            time.sleep(0.01)
        client.settimeout(0.1)
        with suppress(socket.timeout):
            answers.append(client.recv(4000))
    return received, answers


def one_way(lab: Lab, version: int) -> Any:
    """UDP without an answer. What the server receives."""
    with receiving(lab, version, 'one-way', False) as received, udp(lab.client, version) as client:
        client.connect((flow_address(lab, version, 'one-way'), PORT))
        for number in range(DATAGRAMS):
            client.send(numbered(number))
            time.sleep(0.005)
        wait_until(lambda: len(received) >= DATAGRAMS, 5, 'all datagrams arrive')
    return received


def ping(lab: Lab, version: int) -> Any:
    """What ping says, but for times."""
    said = lab.client.run('ping', '-n', f'-c{PINGS}', '-i.02', flow_address(lab, version, 'ping')).stdout
    lines = [line for line in said.splitlines() if line and not line.startswith('rtt')]
    return [re.sub(r',? *time[ =][\d.]+ ?ms', '', line) for line in lines]


def tcp(lab: Lab, version: int) -> Any:
    """Requests and answers. What both ends receive."""
    with inside(lab.server):
        listener = socket.create_server((flow_address(lab, version, 'tcp'), PORT), family=FAMILY[version])
    with inside(lab.client):
        client = socket.socket(FAMILY[version])
    streams = bytearray(), bytearray()
    with listener, client:
        client.settimeout(5)
        client.connect(listener.getsockname())
        with listener.accept()[0] as server:
            server.settimeout(5)
            for number in range(REQUESTS):
                client.sendall(numbered(number))
                for side, stream, other in (server, streams[0], client), (client, streams[1], None):
                    got = b''
                    while len(got) < len(numbered(number)):
                        got += side.recv(4000)
                    stream += got
                    if other:
                        side.sendall(got)
                time.sleep(0.01)
    return streams


def noticed(lab: Lab) -> tuple[Any, list[Counter[str]]]:
    """Run all flows at once: what they notice, and by how much the counters of client and server grow."""
    hosts = lab.client, lab.server
    before = [kernel_counters(host) for host in hosts]
    with ThreadPoolExecutor(8) as pool:
        running = {
            (version, flow.__name__): pool.submit(flow, lab, version)
            for version in VERSIONS
            for flow in (requests, one_way, ping, tcp)
        }
        found = {name: future.result() for name, future in running.items()}
    grown = []
    for host, earlier in zip(hosts, before):
        now = kernel_counters(host)
        now.subtract(earlier)
        grown.append(now)
    return found, grown


@pytest.fixture(scope='module')
def without(topology: tuple[Lab, Topology]) -> tuple[Any, list[Counter[str]]]:
    """What is noticed without elfprobe."""
    return noticed(topology[0])


@pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS)
def test_nobody_notices(
    topology: tuple[Lab, Topology], without: tuple[Any, list[Counter[str]]], tmp_path: Path, options: list[str]
) -> None:
    """Datagrams, streams, what ping says, and the kernels' counters are as without elfprobe.

    Packets that a host drops because they are broken may be counted, a few for each destination.
    """
    lab, expected = topology
    dests = [flow_address(lab, version, flow) for version in VERSIONS for flow in FLOWS]
    with elfprobe(lab, '-d', *options, *dests, cwd=tmp_path) as run:
        found, grown = noticed(lab)
        assert run.stop() == 0
    for name, usual in without[0].items():
        assert found[name] == usual, name
    for host, usual in zip(grown, without[1]):
        assert {name: host[name] for name in COUNTERS} == {name: usual[name] for name in COUNTERS}
        assert sum(host[name] for name in BROKEN) <= BROKEN_MAX * len(dests)
    hops = {(row.dest, row.outttl) for row in run.rows() if row.is_answered}
    assert hops == {(dest, hop) for dest in dests for hop in range(1, expected.hops + 1)}
    if not expected.routers:
        assert not run.rows()
        assert sum(host[name] for host in grown for name in BROKEN) == 0
