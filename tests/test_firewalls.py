"""Who could take a probe amiss, or pay for it: servers with SYN cookies, sockets that see time exceeded, firewalls
that take a low TTL for an attack, network cards that stamp packets, and the first routers.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import struct
import threading
import time
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Callable, Iterator

import pytest

from lab import Lab, address, batch, kernel_counters, nft_table, wait_until
from runs import CLOSED, ECHO_TYPES, FAMILY, HOPS, ICMP, ICMPV6, TCP, VERSIONS, both, elfprobe, inside, ones_sum
from talk import DOWNLOAD, PING, REQUESTS, UPLOAD, Talk, blocking, lowering, more_addresses
from test_harm import (
    OPT_ID,
    OPT_TSONLY,
    PORT,
    SO_TIMESTAMPING,
    SOFTWARE,
    TX_SOFTWARE,
    exchange,
    numbered,
    send_echo_requests,
    send_udp,
    sysctls,
    tcp_pair,
    time_stamps,
    udp_sockets,
)

pytestmark = pytest.mark.root

TX_HARDWARE = 1  # linux/net_tstamp.h
IP_RECVERR = {4: (socket.IPPROTO_IP, 11), 6: (socket.IPPROTO_IPV6, 25)}

# A way back that seems five routers longer than the forward path: packets begin with a lower TTL.
FARTHER_BACK = {
    'net.ipv4.ip_default_ttl': 59,
    'net.ipv6.conf.all.hop_limit': 59,
    'net.ipv6.conf.eth0.hop_limit': 59,
}


@contextmanager
def served(lab: Lab, version: int) -> Iterator[None]:
    """A server in threads that answers what it gets."""
    with inside(lab.server):
        listener = socket.socket(FAMILY[version])
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((lab.server_address(version), PORT))
    listener.settimeout(0.1)
    ended = threading.Event()
    threads = []

    def serve(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.settimeout(0.1)
            while not ended.is_set():
                with suppress(socket.timeout):
                    if not connection.recv(2000):
                        return
                    connection.sendall(bytes(100))

    def accept() -> None:
        while not ended.is_set():
            with suppress(socket.timeout):
                threads.append(threading.Thread(target=serve, args=(listener.accept()[0],)))
                threads[-1].start()

    listener.listen(100)
    threads.append(threading.Thread(target=accept))
    threads[0].start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()
        listener.close()


# SYN cookies


def connect_often(lab: Lab, version: int, count: int) -> list[str]:
    """Short connections with one request each. Return their errors."""
    errors = []
    for number in range(count):
        with inside(lab.client):
            client = socket.socket(FAMILY[version])
        with client:
            client.settimeout(5)
            try:
                client.connect((lab.server_address(version), PORT))
                time.sleep(0.001)  # until then only the handshake has said anything
                client.sendall(numbered(number))
                client.recv(2000)
            except OSError as error:
                errors.append(errno.errorcode.get(error.errno or 0, str(error)))
    return errors


@pytest.mark.parametrize('version', VERSIONS)
@pytest.mark.parametrize('where', ['own', 'forwarded'])
def test_syn_cookies(lab4: Lab, tmp_path: Path, where: str, version: int) -> None:
    """No connection is reset by a probe that arrives before the server knows it, though the way back is longer."""
    host = lab4.client if where == 'own' else lab4.routers[0]
    with sysctls([lab4.server], {'net.ipv4.tcp_syncookies': 2, **FARTHER_BACK}), served(lab4, version), elfprobe(
        lab4, '-i', host.devices[-1], '-p', '0', '-d', lab4.server_address(version), cwd=tmp_path, host=host
    ) as run:
        before = kernel_counters(lab4.client)
        assert connect_often(lab4, version, 150) == []
        counters = kernel_counters(lab4.client)
        counters.subtract(before)
        assert counters['TcpEstabResets'] == counters['TcpAttemptFails'] == 0
        assert run.stop() == 0
    assert run.counters['carrier_early'] > 100
    assert run.counters['probes'] > 50


@pytest.mark.parametrize('version', VERSIONS)
def test_a_server_that_speaks_first_has_not_stalled(lab4: Lab, tmp_path: Path, version: int) -> None:
    """Its greetings carry no probes, because the client has confirmed nothing yet. Counters say so."""
    count = 30
    with inside(lab4.server):
        server = socket.create_server((lab4.server_address(version), PORT), family=FAMILY[version])
    server.settimeout(5)
    with server, elfprobe(
        lab4, '-p', '0', '-d', lab4.client_address(version), cwd=tmp_path, host=lab4.server
    ) as run:
        for _ in range(count):
            with inside(lab4.client), socket.socket(FAMILY[version]) as client:
                client.settimeout(5)
                client.connect(server.getsockname()[:2])
                accepted = server.accept()[0]
                with accepted:
                    accepted.sendall(b'220 ready')
                    assert client.recv(9)
        assert run.stop() in (0, 3)  # 3: no probe at all
    assert run.counters['carrier_early'] >= count > 3 * run.counters['flow_stalled']


# -I pass

# Nothing that the server says arrives, so that all that the client sends stays outstanding.
MUTE = f"""
chain forward {{
    type filter hook forward priority 0
    tcp sport {PORT} drop
}}
"""


@pytest.mark.parametrize('version', VERSIONS)
@pytest.mark.parametrize('options', [[], ['-T']], ids=['truncated', 'whole'])
def test_passed_answers_are_no_errors_of_tcp(lab4: Lab, tmp_path: Path, options: list[str], version: int) -> None:
    """With much outstanding, neither SO_ERROR nor, with IP_RECVERR, send() tells of a time exceeded."""
    errors = []
    with elfprobe(
        lab4, '-p', '0', '-I', 'pass', *options, lab4.server_address(version), cwd=tmp_path
    ) as run, tcp_pair(lab4, version) as (client, server):
        client.setsockopt(*IP_RECVERR[version], 1)
        exchange(client, server, 20)
        before = kernel_counters(lab4.client)
        with nft_table(lab4.routers[3], MUTE):
            rows = len(run.rows())
            for _ in range(9):  # the congestion window allows 10
                try:
                    client.send(bytes(1000))
                except OSError as error:
                    errors.append(error.errno)
            wait_until(lambda: len(run.rows()) >= rows + 9, 10, 'they have their rows')
            errors += [client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)]
        counters = kernel_counters(lab4.client)
        counters.subtract(before)
        assert run.stop() == 0
    assert errors == [0]
    assert all(row.is_answered for row in run.rows() if row.protocol == TCP)
    if not options:  # TCP has seen the answers and found their numbers to be old
        assert counters['TcpExtOutOfWindowIcmps'] >= 9


# Time stamps


@pytest.mark.parametrize('version', VERSIONS)
def test_packets_that_a_card_stamps(lab4: Lab, tmp_path: Path, version: int) -> None:
    """They carry no probe. Those that the kernel stamps do, and have as many time stamps as without."""
    found = {}
    for name, flags, options in (
        ('without', TX_SOFTWARE, None),
        ('beside', TX_SOFTWARE, []),
        ('by the card', TX_SOFTWARE | TX_HARDWARE, []),
    ):
        with ExitStack() as stack:
            run = None
            if options is not None:
                command = elfprobe(lab4, '-p', '0', '-d', lab4.server_address(version), cwd=tmp_path)
                run = stack.enter_context(command)
            send_echo_requests(lab4, version, 1)  # by which the path's length is known
            sockets = stack.enter_context(udp_sockets(lab4, version))
            sockets[0].setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPING, flags | SOFTWARE | OPT_ID | OPT_TSONLY)
            send_udp(lab4, version, sockets, 100)
            found[name] = list(time_stamps(sockets[0], version, 100))
            if run:
                assert run.stop() in (0, 3)  # 3: no probe
                stamped = run.counters['carrier_stamped']
                assert (stamped, run.counters['probes'] > 30) == ((0, True) if name == 'beside' else (100, False))
    assert found['without'] == found['beside'] == found['by the card'] == list(range(100))


# Firewalls that take a low TTL for an attack, at hop 2, and outages

OUTAGES = int(os.environ.get('ELFPROBE_OUTAGES', '5'))  # in a row; tests/soak has more, and longer ones
FIREWALLS = {
    'half': blocking('500ms'),
    'three': blocking('3s'),
    'minute': blocking('60s'),
    'ever': blocking('1d'),
    'low': lowering,
}


@pytest.mark.parametrize('where', ['own', 'forwarded'])
def test_firewalls_cost_two_connections(make_lab: Callable[..., Lab], tmp_path: Path, where: str) -> None:
    """At most. Then the destination is excluded, and all goes on as without elfprobe. One without a firewall is not
    excluded. Nor is, so soon, one whose connections are blocked so shortly that none is lost."""
    lab = make_lab(routers=3 if where == 'own' else 4)
    host = lab.client if where == 'own' else lab.routers[0]
    # Of a forwarded download that is blocked, nothing leaves that tells of it.
    kinds = (UPLOAD, DOWNLOAD, REQUESTS, PING) if where == 'own' else (UPLOAD, REQUESTS, PING)
    names = ['none', *FIREWALLS] if where == 'own' else ['none', 'three', 'ever', 'low']
    cells = [(name, port) for name in names for port in kinds]
    versions = [4 + number // len(kinds) % 2 * 2 for number in range(len(cells))]
    servers = more_addresses(lab, versions)
    rules = [
        line
        for number, ((name, port), version, server) in enumerate(zip(cells, versions, servers))
        if name != 'none'
        for line in FIREWALLS[name](f'{name}{number}', version, server, port)
    ]
    spared = [server for server, (name, _) in zip(servers, cells) if name == 'none']
    unseen = ('three', DOWNLOAD)  # nothing of it leaves while it is blocked
    blocked = [s for s, cell in zip(servers, cells) if cell[0] not in ('none', 'half') and cell != unseen]
    with ExitStack() as stack:
        stack.enter_context(nft_table(lab.routers[1 if where == 'own' else 2], '\n'.join(rules)))
        run = stack.enter_context(elfprobe(lab, '-d', '-i', host.devices[-1], *servers, cwd=tmp_path, host=host))
        talk = Talk(lab, stack, [(server, port) for server, (_, port) in zip(servers, cells)])

        def excluded() -> set[str]:
            return set(re.findall(r'(\S+): flows stall', run.log))

        def all_are_excluded() -> bool:
            talk.step()
            return set(blocked) <= excluded()

        def all_go_on() -> bool:
            talk.step()
            return all(application.received > then + 20_000 for application, then in zip(talk.applications, before))

        wait_until(all_are_excluded, 60, 'the destinations are excluded')
        before = [application.received for application in talk.applications]
        wait_until(all_go_on, 20, 'all applications go on')
        assert run.stop() == 0
    assert not excluded() & set(spared)
    lost = {cell: application.lost for cell, application in zip(cells, talk.applications)}
    assert max(lost.values()) <= 2, lost
    assert all(count == 0 for (name, _), count in lost.items() if name in ('none', 'half')), lost


def test_outages(lab4: Lab, tmp_path: Path) -> None:
    """Rows tell up to where answers still come, by retransmissions of stalled flows. All goes on after each outage,
    and no destination is excluded."""
    outages = [(near, seconds) for seconds in (1, 2.5, 5) for near in (True, False)]
    times = []
    with ExitStack() as stack:
        run = stack.enter_context(elfprobe(lab4, '-d', *both(lab4), cwd=tmp_path))
        talk = Talk(lab4, stack, [(server, port) for server in both(lab4) for port in (UPLOAD, DOWNLOAD)])

        def all_go_on() -> bool:
            talk.step()
            return all(application.received > then for application, then in zip(talk.applications, before))

        talk.talk_for(8)  # until the destinations are trusted
        for near, seconds in outages:
            before = [application.received + 5000 for application in talk.applications]
            with nft_table(lab4.routers[0 if near else 3], CLOSED):
                times.append((time.monotonic_ns(), int((time.monotonic() + seconds) * 1e9)))
                talk.talk_for(seconds)
            wait_until(all_go_on, 20, 'all applications go on')
            talk.talk_for(3)
        assert run.stop() == 0
    assert run.log.count('excluded') == 0
    rows = run.rows()
    for server in both(lab4):
        for (near, seconds), (begin, end) in zip(outages, times):
            during = [row for row in rows if row.dest == server and begin + 5e7 < row.sendtime < end - 5e7]
            hops = {row.outttl for row in during if row.is_answered}
            assert hops <= ({1} if near else {1, 2, 3, 4}), (server, near, seconds)
            # In 2.5 s there are four retransmissions. One carries no probe, in case that this is a firewall. Others
            # may only find that their hops are unresponsive.
            assert seconds < 5 or hops >= ({1} if near else {1, 2}), (server, near, seconds)
            later = [row for row in during if row.sendtime > begin + 5e8]
            assert later or near or seconds < 5, (server, near, seconds)
            after = {
                row.outttl
                for row in rows
                if row.dest == server and row.is_answered and end < row.sendtime < end + 9e9
            }
            assert after == {1, 2, 3, 4}, (server, near, seconds)


def test_outages_of_conversations(lab4: Lab, tmp_path: Path) -> None:
    """They exclude no destination. Once it is trusted, there are rows of an outage, too."""
    servers = more_addresses(lab4, [4, 6, 4, 6])
    kinds = REQUESTS, REQUESTS, PING, PING
    with ExitStack() as stack:
        run = stack.enter_context(elfprobe(lab4, '-d', *servers, cwd=tmp_path))
        talk = Talk(lab4, stack, list(zip(servers, kinds)))
        for seconds in 2, 16:
            talk.talk_for(seconds)
            with nft_table(lab4.routers[2], CLOSED):
                begin = time.monotonic_ns()
                talk.talk_for(5)
                end = time.monotonic_ns()
        talk.talk_for(2)
        assert run.stop() == 0
    assert 'excluded' not in run.log
    for server in servers:
        rows = [row for row in run.rows() if row.dest == server and row.sendtime > begin]
        during = [row.outttl for row in rows if row.is_answered and begin + 2e9 < row.sendtime < end - 1e8]
        assert {1, 2} <= set(during), server
        assert {row.outttl for row in rows if row.is_answered and row.sendtime > end} == {1, 2, 3, 4}, server


def test_many_outages(lab4: Lab, tmp_path: Path) -> None:
    """At each router in turn. After each, uploads are measured by all hops again."""
    with ExitStack() as stack:
        run = stack.enter_context(elfprobe(lab4, *both(lab4), cwd=tmp_path))
        talk = Talk(lab4, stack, [(server, UPLOAD) for server in both(lab4)])
        wanted = {(server, hop) for server in both(lab4) for hop in HOPS}

        def is_measured() -> bool:
            talk.talk_for(0.2)
            answered = (row for row in run.rows() if row.is_answered and row.sendtime > until)
            return wanted == {(row.dest, row.outttl) for row in answered}

        talk.talk_for(8)  # until the destinations are trusted
        for number in range(OUTAGES):
            with nft_table(lab4.routers[number % 4], CLOSED):
                talk.talk_for(1 + number % 3 / 2)
                until = time.monotonic_ns()
            wait_until(is_measured, 30, f'the hops are measured again after outage {number}')
            talk.talk_for(4)  # outages in a row, but not one without end: that would be as a firewall
        assert run.stop() == 0
    assert 'excluded' not in run.log


# The first routers, which answer the probes to all destinations


class Pings:
    """Echo requests to addresses of both families, one to each with each `step()`."""

    def __init__(self, lab: Lab, servers: list[str], stack: ExitStack) -> None:
        self._servers, self._count, self._sockets = servers, 0, {}
        for version, protocol in (4, ICMP), (6, ICMPV6):
            with inside(lab.client):
                raw = socket.socket(FAMILY[version], socket.SOCK_RAW, protocol)
            self._sockets[version] = stack.enter_context(raw), struct.pack('!BB', ECHO_TYPES[protocol], 0)

    def step(self) -> None:
        self._count += 1
        for server in self._servers:
            raw, kind = self._sockets[6 if ':' in server else 4]
            data = struct.pack('!HH8x', PORT, self._count % 65536)
            raw.sendto(kind + struct.pack('!H', 0xFFFF ^ ones_sum(kind + data)) + data, (server, 0))


def test_routers_answer_a_hundred_times_a_second(make_lab: Callable[..., Lab], tmp_path: Path) -> None:
    """However many destinations are behind them, which all get the same share. One that is alone gets it all."""
    lab = make_lab(routers=2)
    many, alone = [address(4, 3, 100 + number) for number in range(50)], lab.server_address(6)
    batch(lab.server.name, (f'address add {server}/24 dev eth0' for server in many))
    with ExitStack() as stack:
        run = stack.enter_context(elfprobe(lab, '-d', *many, alone, cwd=tmp_path))
        pings = Pings(lab, [*many, alone], stack)

        def has_rows(count: int) -> bool:
            for _ in range(20):
                pings.step()
            return sum(row.is_answered and row.dest == alone for row in run.rows()) >= count

        wait_until(lambda: has_rows(100), 20, 'the paths are known')
        begin = time.monotonic_ns()
        wait_until(lambda: has_rows(500), 20, 'routers have answered for some seconds')
        seconds = (time.monotonic_ns() - begin) / 1e9
        assert run.stop() == 0
    rows = [row for row in run.rows() if row.is_answered and row.sendtime >= begin]
    for ttl in 1, 2:
        found = Counter(row.dest for row in rows if row.outttl == ttl)
        shares = [found[server] for server in many]
        assert 80 * seconds < sum(shares) <= 102 * seconds + 1
        assert max(shares) <= min(shares) + 2
        assert found[alone] > 10 * max(shares)
