"""What peers and applications notice of probes that nothing stops on their way: nothing.

    client - r1 - r2 - r3 - r4 - server        and the same with one router, and with none

Each way has its own reason why probes may arrive. The server has an address for each way and kind of flow, so
that no flow knows the path by another one. A run without elfprobe says what is to be expected.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections import Counter, defaultdict
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

# What is special of the path to some addresses of the server, `there`, and back.
SET_TTL = """
chain set_ttl_%(hook)s {
    type filter hook %(hook)s priority -150
    iifname eth0 ip daddr { %(v4)s } ip ttl set 65
    iifname eth0 ip6 daddr { %(v6)s } ip6 hoplimit set 65
}
"""
# Packets of the server look as if their way was longer or shorter than it is.
SET_TTL_BACK = """
chain set_ttl_%(ttl)d {
    type filter hook prerouting priority -150
    iifname eth1 ip saddr { %(v4)s } ip ttl set %(ttl)d
    iifname eth1 ip6 saddr { %(v6)s } meta l4proto { tcp, udp } ip6 hoplimit set %(ttl)d
    iifname eth1 ip6 saddr { %(v6)s } icmpv6 type echo-reply ip6 hoplimit set %(ttl)d
}
"""


class Way(NamedTuple):
    """A path to some addresses of the server."""

    hops: int  # how many answer,
    hops_known: int  # and how many do if the destination's packets tell how far away it is
    router: int = 0  # the one with this nft table; 0: none
    table: str = ''
    values: dict[str, Any] = {}


WAYS = {  # by the number of routers
    0: {'on-link': Way(0, 0)},
    1: {'one router': Way(1, 1)},
    4: {
        'four routers': Way(4, 4),
        'TTL set at r2': Way(1, 1, 2, SET_TTL, dict(hook='prerouting')),
        'TTL set behind r2': Way(2, 2, 2, SET_TTL, dict(hook='postrouting')),
        'way back longer': Way(4, 4, 4, SET_TTL_BACK, dict(ttl=57)),
        'way back shorter': Way(4, 1, 1, SET_TTL_BACK, dict(ttl=64)),
    },
}

# Packets that a host drops because they are broken are counted. No flow may cost more than so many of these.
BROKEN_MAX = 6
BROKEN = 'UdpInErrors', 'Udp6InErrors', 'IcmpInErrors', 'IcmpInCsumErrors', 'Icmp6InErrors', 'Icmp6InCsumErrors'
COUNTERS = (
    'UdpInDatagrams', 'UdpNoPorts', 'UdpInCsumErrors', 'Udp6InDatagrams', 'Udp6NoPorts', 'Udp6InCsumErrors',
    'IcmpInEchos', 'Icmp6InEchos', 'IcmpOutEchoReps', 'Icmp6OutEchoReplies',
    'TcpInErrs', 'TcpRetransSegs', 'TcpOutRsts', 'TcpEstabResets', 'TcpAttemptFails',
    'TcpExtTCPDSACKRecv', 'TcpExtTCPDSACKOldSent', 'TcpExtDelayedACKLost', 'TcpExtTCPSACKReneging',
)  # fmt: skip


def flow_address(lab: Lab, version: int, way: str, flow: str) -> str:
    """Return the server's address for a way and a kind of flow."""
    number = 10 * (1 + list(WAYS[len(lab.routers)]).index(way)) + FLOWS.index(flow)
    return re.sub('2$', str(number), lab.server_address(version))


@pytest.fixture(scope='module')
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    with Lab(routers=request.param) as lab, ExitStack() as stack:
        tables: dict[int, str] = defaultdict(str)
        for name, way in WAYS[request.param].items():
            there = {v: [flow_address(lab, v, name, flow) for flow in FLOWS] for v in VERSIONS}
            commands = [f'address add {one}/24 dev eth0' for one in there[4]]
            commands += [f'address add {one}/64 dev eth0 nodad' for one in there[6]]
            batch(lab.server.name, commands)
            tables[way.router] += way.table % dict(v4=', '.join(there[4]), v6=', '.join(there[6]), **way.values)
        for router, table in tables.items():
            if router:
                stack.enter_context(nft_table(lab.routers[router - 1], table))
        yield lab


# Flows. Each returns what its application and its peer notice.


def udp(host: Host, version: int, address: str = '') -> socket.socket:
    with inside(host):
        made = socket.socket(FAMILY[version], socket.SOCK_DGRAM)
    made.bind((address, PORT if address else 0))
    made.settimeout(2)
    return made


@contextmanager
def receiving(lab: Lab, version: int, way: str, flow: str, is_echoed: bool) -> Iterator[list[bytes]]:
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

    with udp(lab.server, version, flow_address(lab, version, way, flow)) as receiver:
        receiver.settimeout(0.2)
        thread = threading.Thread(target=receive)
        thread.start()
        try:
            yield received
        finally:
            is_over.set()
            thread.join()


def requests(lab: Lab, version: int, way: str) -> Any:
    """UDP: requests, each with its answer. What both ends receive; an answer too many shifts all others."""
    answers: list[bytes] = []
    with receiving(lab, version, way, 'requests', True) as received, udp(lab.client, version) as client:
        client.connect((flow_address(lab, version, way, 'requests'), PORT))
        for number in range(REQUESTS):
            client.send(numbered(number))
            answers.append(client.recv(4000))
            time.sleep(0.01)
        client.settimeout(0.1)
        with suppress(socket.timeout):
            answers.append(client.recv(4000))
    return received, answers


def one_way(lab: Lab, version: int, way: str) -> Any:
    """UDP without an answer. What the server receives."""
    with receiving(lab, version, way, 'one-way', False) as received, udp(lab.client, version) as client:
        client.connect((flow_address(lab, version, way, 'one-way'), PORT))
        for number in range(DATAGRAMS):
            client.send(numbered(number))
            time.sleep(0.005)
        wait_until(lambda: len(received) >= DATAGRAMS, 5, 'all datagrams arrive')
    return received


def ping(lab: Lab, version: int, way: str) -> Any:
    """What ping says, but for times."""
    said = lab.client.run('ping', '-n', f'-c{PINGS}', '-i.02', flow_address(lab, version, way, 'ping')).stdout
    lines = [line for line in said.splitlines() if line and not line.startswith('rtt')]
    return [re.sub(r',? *time[ =][\d.]+ ?ms', '', line) for line in lines]


def tcp(lab: Lab, version: int, way: str) -> Any:
    """Requests and answers. What both ends receive."""
    with inside(lab.server):
        listener = socket.create_server((flow_address(lab, version, way, 'tcp'), PORT), family=FAMILY[version])
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
    with ThreadPoolExecutor(64) as pool:
        running = {
            (way, version, flow.__name__): pool.submit(flow, lab, version, way)
            for way in WAYS[len(lab.routers)]
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
def without(lab: Lab) -> tuple[Any, list[Counter[str]]]:
    """What is noticed without elfprobe."""
    return noticed(lab)


@pytest.mark.parametrize(
    'lab, options',
    [
        pytest.param(routers, options, id=f'{routers} routers-{name}')
        for routers in WAYS
        for name, options in OPTIONS.items()
        if routers > 1 or '-p' in options  # no probe is sent without routers, and few with one
    ],
    indirect=['lab'],
)
def test_nobody_notices(
    lab: Lab, without: tuple[Any, list[Counter[str]]], tmp_path: Path, options: list[str]
) -> None:
    """Datagrams, streams, what ping says, and the kernels' counters are as without elfprobe.

    Packets that a host drops because they are broken may be counted, a few for each destination.
    """
    ways = WAYS[len(lab.routers)]
    dests = {
        flow_address(lab, version, name, flow): way.hops if flow == 'one-way' else way.hops_known
        for version in VERSIONS
        for name, way in ways.items()
        for flow in FLOWS
    }
    with elfprobe(lab, '-d', *options, *dests, cwd=tmp_path) as run:
        found, grown = noticed(lab)
        assert run.stop() == (0 if lab.routers else 3)  # without routers no probe is sent
    different = {name: (usual, found[name]) for name, usual in without[0].items() if found[name] != usual}
    assert not different
    for host, usual in zip(grown, without[1]):
        assert {name: host[name] for name in COUNTERS} == {name: usual[name] for name in COUNTERS}
    broken = {name: grown[1][name] for name in BROKEN if grown[1][name]}
    print(f'{len(dests)} destinations: {broken}')
    assert sum(broken.values()) <= BROKEN_MAX * len(dests)
    answered: dict[str, set[int]] = {dest: set() for dest in dests}
    for row in run.rows():
        if row.is_answered:
            answered[row.dest].add(row.outttl)
    assert answered == {dest: set(range(1, hops + 1)) for dest, hops in dests.items()}
    if not lab.routers:
        assert not run.rows()
        assert not broken
