"""Applications that talk to a server, and firewalls that take a low TTL for an attack, in the lab.

Everything is moved on by `step()`, so that a test needs neither threads nor processes for it.
"""

from __future__ import annotations

import socket
import time
from contextlib import ExitStack, suppress
from typing import Callable, Iterator

from lab import Lab, address, batch, wait_until
from runs import FAMILY, inside

UPLOAD, DOWNLOAD = 7000, 7001  # ports of the server: it answers what comes, or sends to who asks

LOWEST = 6  # TTLs up to this are followed


def addresses_of(version: int) -> tuple[str, str]:
    """Names of TTL and destination in nft's rules."""
    return ('ip ttl', 'ip daddr') if version == 4 else ('ip6 hoplimit', 'ip6 daddr')


def lowering(name: str, version: int, server: str) -> Iterator[str]:
    """All of a flow's packets get the lowest TTL that one of them had: ttl-evasion-protection of Cisco's ASA."""
    ttl, daddr = addresses_of(version)
    for lowest in range(1, LOWEST + 1):
        yield f'set {name}low{lowest} {{ type inet_service; flags dynamic; size 1000; }}'
    yield f'chain {name} {{'
    yield 'type filter hook forward priority 0'
    for lowest in range(1, LOWEST + 1):
        yield f'{daddr} {server} {ttl} {lowest} add @{name}low{lowest} {{ tcp sport }}'
    for lowest in range(LOWEST, 0, -1):
        yield f'{daddr} {server} {ttl} > {lowest} tcp sport @{name}low{lowest} {ttl} set {lowest}'
    yield '}'


def blocking(time: str) -> Callable[[str, int, str], Iterator[str]]:
    """The flow is blocked for so long, in both directions."""

    def rules(name: str, version: int, server: str) -> Iterator[str]:
        ttl, daddr = addresses_of(version)
        yield f'set {name} {{ type inet_service; flags dynamic,timeout; timeout {time}; size 1000; }}'
        yield f'chain {name} {{'
        yield 'type filter hook forward priority 0'
        yield f'{daddr} {server} {ttl} < {LOWEST} tcp dport > 0 update @{name} {{ tcp sport }}'
        yield f'{daddr} {server} tcp sport @{name} drop'
        yield f'{daddr.replace("daddr", "saddr")} {server} tcp dport @{name} drop'
        yield '}'

    return rules


GIVES_UP = 3.5  # s without anything, after which the application closes the connection and opens another
INTERVAL = 0.01  # s between two segments


class Server:
    """Answers what comes to one port, sends to who asks on another one, at all addresses. Moved on by `step()`."""

    def __init__(self, lab: Lab, stack: ExitStack) -> None:
        self._connections: dict[socket.socket, bool] = {}  # -> whether the server answers, not sends
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
    """Talks to a server, over one connection after the other. Moved on by `step()`."""

    def __init__(self, lab: Lab, server: str, port: int, gives_up: float = GIVES_UP) -> None:
        self._lab, self.server, self._port, self._gives_up = lab, server, port, gives_up
        self._socket: socket.socket | None = None
        self.lost = self.received = 0

    def step(self) -> None:
        if self._socket is None:
            with inside(self._lab.client):
                self._socket = socket.socket(FAMILY[6 if ':' in self.server else 4])
            self._socket.setblocking(False)
            self._heard, self.is_connected = time.monotonic(), False
            self._socket.connect_ex((self.server, self._port))
        with suppress(OSError):
            if self._port == UPLOAD:
                self._socket.send(bytes(500))
        with suppress(OSError):
            self.received += len(self._socket.recv(65536))
            self._heard, self.is_connected = time.monotonic(), True
        if time.monotonic() > self._heard + self._gives_up:
            self.lost += self.is_connected
            self.close()

    def close(self) -> None:
        if self._socket:
            self._socket.close()
        self._socket = None


class Talk:
    """Applications that talk to addresses of the server."""

    def __init__(self, lab: Lab, stack: ExitStack, talks: list[tuple[str, int]]) -> None:
        self._server = Server(lab, stack)
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
