"""Applications that talk to a server, and firewalls that take a low TTL for an attack, in the lab.

Everything is moved on by `step()`, so that a test needs neither threads nor processes for it.
"""

from __future__ import annotations

import itertools
import socket
import struct
import time
from contextlib import ExitStack, suppress
from typing import Callable, Iterator, Sequence

from lab import Lab, address, batch, wait_until
from runs import ECHO_TYPES, FAMILY, ICMP, ICMPV6, inside, ones_sum

UPLOAD, DOWNLOAD = 7000, 7001  # ports of the server: it answers what comes, or sends to who asks
REQUESTS, PING = 7002, 0  # of UDP: it sends everything back; no port

LOWEST = 6  # TTLs up to this are followed


def expressions_of(version: int, port: int) -> tuple[str, str, str, str, str]:
    """Names of TTL, destination, protocol, and the flow's own number there and back in nft's rules."""
    ttl, daddr, icmp = ('ip ttl', 'ip daddr', 'icmp') if version == 4 else ('ip6 hoplimit', 'ip6 daddr', 'icmpv6')
    if port == PING:
        return ttl, daddr, 'icmp' if version == 4 else 'ipv6-icmp', f'{icmp} id', f'{icmp} id'
    protocol = 'udp' if port == REQUESTS else 'tcp'
    return ttl, daddr, protocol, f'{protocol} sport', f'{protocol} dport'


def lowering(name: str, version: int, server: str, port: int) -> Iterator[str]:
    """All of a flow's packets get the lowest TTL that one of them had: ttl-evasion-protection of Cisco's ASA."""
    ttl, daddr, protocol, number, _ = expressions_of(version, port)
    for lowest in range(1, LOWEST + 1):
        yield f'set {name}low{lowest} {{ typeof {number}; flags dynamic; size 1000; }}'
    yield f'chain {name} {{'
    yield 'type filter hook forward priority 0'
    for lowest in range(1, LOWEST + 1):
        yield f'{daddr} {server} {ttl} {lowest} meta l4proto {protocol} add @{name}low{lowest} {{ {number} }}'
    for lowest in range(LOWEST, 0, -1):
        yield f'{daddr} {server} {ttl} > {lowest} {number} @{name}low{lowest} {ttl} set {lowest}'
    yield '}'


def blocking(time: str) -> Callable[[str, int, str, int], Iterator[str]]:
    """The flow is blocked for so long, in both directions."""

    def rules(name: str, version: int, server: str, port: int) -> Iterator[str]:
        ttl, daddr, protocol, number, number_back = expressions_of(version, port)
        yield f'set {name} {{ typeof {number}; flags dynamic,timeout; timeout {time}; size 1000; }}'
        yield f'chain {name} {{'
        yield 'type filter hook forward priority 0'
        yield f'{daddr} {server} {ttl} < {LOWEST} meta l4proto {protocol} update @{name} {{ {number} }}'
        yield f'{daddr} {server} {number} @{name} drop'
        yield f'{daddr.replace("daddr", "saddr")} {server} {number_back} @{name} drop'
        yield '}'

    return rules


GIVES_UP = 3.5  # s without anything, after which the application closes the connection and opens another
INTERVAL = 0.01  # s between two segments
SIZE = 64  # of an echo request


class Server:
    """Answers what comes to one port, sends to who asks on another one, at all addresses, and sends back the
    datagrams that come to some. Moved on by `step()`."""

    def __init__(self, lab: Lab, stack: ExitStack, echoes: Sequence[str] = ()) -> None:
        self._connections: dict[socket.socket, bool] = {}  # -> whether the server answers, not sends
        self._echoes = []
        for server in echoes:
            with inside(lab.server):
                echo = stack.enter_context(socket.socket(FAMILY[6 if ':' in server else 4], socket.SOCK_DGRAM))
            echo.bind((server, REQUESTS))
            echo.setblocking(False)
            self._echoes.append(echo)
        stack.callback(self._close)
        self._listeners = {}
        for port in UPLOAD, DOWNLOAD:
            with inside(lab.server):
                listener = stack.enter_context(
                    socket.create_server(('::', port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=100)
                )
            listener.setblocking(False)
            self._listeners[listener] = port == UPLOAD

    def _close(self) -> None:
        for connection in self._connections:
            connection.close()

    def step(self) -> None:
        for echo in self._echoes:
            with suppress(OSError):
                while True:
                    data, source = echo.recvfrom(2000)
                    echo.sendto(data, source)
        for listener, answers in self._listeners.items():
            with suppress(BlockingIOError):
                while True:
                    connection = listener.accept()[0]
                    connection.setblocking(False)
                    self._connections[connection] = answers
        for connection, answers in list(self._connections.items()):
            try:
                if not answers:
                    connection.send(bytes(500))
                elif connection.recv(65536):
                    connection.send(bytes(100))
                else:
                    raise ConnectionResetError
            except BlockingIOError:
                pass
            except OSError:
                del self._connections[connection]
                connection.close()


class Application:
    """Talks to a server, over one connection after the other; with UDP and ping, by one socket after the other.
    Moved on by `step()`."""

    _identifiers = itertools.count(1)  # of pings

    def __init__(self, lab: Lab, server: str, port: int, gives_up: float = GIVES_UP) -> None:
        self._lab, self.server, self._port, self._gives_up = lab, server, port, gives_up
        self._family, self._icmp = (FAMILY[6], ICMPV6) if ':' in server else (FAMILY[4], ICMP)
        self._socket: socket.socket | None = None
        self.lost = self.received = 0

    def step(self) -> None:
        if self._socket is None:
            kinds = {REQUESTS: (socket.SOCK_DGRAM, 0), PING: (socket.SOCK_RAW, self._icmp)}
            with inside(self._lab.client):
                self._socket = socket.socket(self._family, *kinds.get(self._port, (socket.SOCK_STREAM, 0)))
            self._socket.setblocking(False)
            self._heard, self.is_connected = time.monotonic(), False
            self._socket.connect_ex((self.server, self._port))
            self._number, self._identifier = 0, struct.pack('!H', next(self._identifiers))
        with suppress(OSError):
            if self._port == PING:
                self._socket.send(self._echo_request())
            elif self._port != DOWNLOAD:
                self._socket.send(bytes(500))
        with suppress(OSError):
            data = self._socket.recv(65536)
            if self._port != PING or self._identifier == data[-SIZE:][4:6]:
                self.received += len(data)
                self._heard, self.is_connected = time.monotonic(), True
        if time.monotonic() > self._heard + self._gives_up:
            self.lost += self.is_connected
            self.close()

    def _echo_request(self) -> bytes:
        self._number += 1
        kind = struct.pack('!BB', ECHO_TYPES[self._icmp], 0)
        rest = self._identifier + struct.pack('!H', self._number % 65536) + bytes(SIZE - 8)
        return kind + struct.pack('!H', 0xFFFF ^ ones_sum(kind + rest)) + rest

    def close(self) -> None:
        if self._socket:
            self._socket.close()
        self._socket = None


class Talk:
    """Applications that talk to addresses of the server."""

    def __init__(self, lab: Lab, stack: ExitStack, talks: list[tuple[str, int]]) -> None:
        self._server = Server(lab, stack, [server for server, port in talks if port == REQUESTS])
        self.applications = [Application(lab, server, port) for server, port in talks]
        for application in self.applications:
            stack.callback(application.close)
        self._due = 0.0

    def step(self) -> None:
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + INTERVAL
            self._server.step()
            for application in self.applications:
                application.step()

    def talk_for(self, seconds: float) -> None:
        until = time.monotonic() + seconds

        def is_over() -> bool:
            self.step()
            return time.monotonic() > until

        wait_until(is_over, seconds + 10, 'it has talked')


def more_addresses(lab: Lab, versions: list[int]) -> list[str]:
    """Give the server one more address of each of these versions. Routers must take its neighbours for granted."""
    last = len(lab.routers) + 1
    servers = [address(version, last, 0x10 + number) for number, version in enumerate(versions)]
    batch(
        lab.server.name,
        (
            f'address add {server}/{64 if ":" in server else 24} dev eth0 {"nodad" if ":" in server else ""}'
            for server in servers
        ),
    )
    return servers
