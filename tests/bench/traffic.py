"""Make traffic in short turns; both ends. The benchmarks run it in two labs side by side, in turn.

    traffic.py serve ADDRESS
    traffic.py KIND ADDRESS

The client reads from standard input for how many seconds it shall make traffic, a turn for each line, and
prints what it achieved: transactions a second (`tcp` and `udp` send a byte and wait for the answer; `connect`
does so in a new connection each time, which the server closes first, so that the client's port is free at
once), or bytes a second (`upload`, `download`, `upload8` and `download8`, which have 8 streams), or datagrams
of 64 bytes a second (`datagrams`). Connections stay from turn to turn. The server answers until it is killed.

A copy of the Python interpreter runs it that has the name which elfprobe's -a looks for. It needs no packages.
"""

import fcntl
import os
import selectors
import socket
import struct
import sys
import termios
import time
from typing import Callable, Dict, List

ECHO, DISCARD, CHARGEN = 7, 9, 19
SO_RCVTIMEO = struct.pack('@ll', 5, 0)  # s, us
CHUNK = 1 << 20
NOTHING = bytes(CHUNK)
SIOCOUTQ = termios.TIOCOUTQ  # bytes that the peer has not acknowledged


def connected(kind: int, address: str, port: int) -> socket.socket:
    client = socket.socket(socket.AF_INET, kind)
    # Unlike settimeout(), this adds no system call to each recv().
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, SO_RCVTIMEO)
    client.connect((address, port))
    if kind == socket.SOCK_STREAM:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client


# Turns: each function makes traffic until a time, and returns how much


def repeat(act: Callable[[], int], end: float) -> int:
    done = 0
    while time.perf_counter() < end:
        done += act()
    return done


def exchange(client: socket.socket) -> int:
    client.send(b'.')
    if not client.recv(1):
        raise ConnectionError('the server has closed the connection')
    return 1


def connect(address: str) -> int:
    with connected(socket.SOCK_STREAM, address, ECHO) as client:
        client.send(b'!')  # the last one
        if client.recv(1) != b'!' or client.recv(1):
            raise ConnectionError('the server has not answered as it should')
    return 1


def send_datagram(client: socket.socket) -> int:
    client.send(NOTHING[:64])
    return 1


def unacknowledged(clients: List[socket.socket]) -> int:
    return sum(struct.unpack('i', fcntl.ioctl(client, SIOCOUTQ, bytes(4)))[0] for client in clients)


def transfer(clients: List[socket.socket], when: int, act: Callable[[socket.socket], int], end: float) -> int:
    """Act on each connection when it is ready, until the end. Return the sum of what act() returns, bytes."""
    done = 0
    with selectors.DefaultSelector() as ready:
        for client in clients:
            client.setblocking(False)
            ready.register(client, when)
        while time.perf_counter() < end:
            for key, _ in ready.select(0.1):
                done += act(key.fileobj)  # type: ignore[arg-type]
    return done


def upload(clients: List[socket.socket], end: float) -> int:
    """Send, and wait until all is acknowledged; the caller's clock runs meanwhile."""
    sent = transfer(clients, selectors.EVENT_WRITE, lambda client: client.send(NOTHING), end)
    while unacknowledged(clients):
        time.sleep(0.0001)
    return sent


def download(clients: List[socket.socket], end: float) -> int:
    """Receive. Between turns, nobody reads, and so the server stops when the buffers are full."""
    buffer = bytearray(CHUNK)
    return transfer(clients, selectors.EVENT_READ, lambda client: client.recv_into(buffer), end)


def turns(kind: str, address: str) -> Callable[[float], int]:
    """Return what makes a turn."""
    if kind == 'connect':
        return lambda end: repeat(lambda: connect(address), end)
    if kind in ('tcp', 'udp'):
        client = connected(socket.SOCK_STREAM if kind == 'tcp' else socket.SOCK_DGRAM, address, ECHO)
        return lambda end: repeat(lambda: exchange(client), end)
    if kind == 'datagrams':
        client = connected(socket.SOCK_DGRAM, address, DISCARD)
        return lambda end: repeat(lambda: send_datagram(client), end)
    direction, count = kind.rstrip('8'), 8 if kind.endswith('8') else 1
    act, port = {'upload': (upload, DISCARD), 'download': (download, CHARGEN)}[direction]
    clients = [connected(socket.SOCK_STREAM, address, port) for _ in range(count)]
    return lambda end: act(clients, end)


def make_traffic(kind: str, address: str) -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    turn = turns(kind, address)
    for line in sys.stdin:
        start = time.perf_counter()
        done = turn(start + float(line))
        print(done / (time.perf_counter() - start), flush=True)


# The server


def serve(address: str) -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # the client has the last CPU
    ready, buffer = selectors.DefaultSelector(), bytearray(CHUNK)

    def forget(connection: socket.socket) -> None:
        ready.unregister(connection)
        connection.close()

    def echo(connection: socket.socket) -> None:
        data = connection.recv(1)
        if data:
            connection.send(data)
        if data in (b'', b'!'):
            forget(connection)

    def echo_datagram(datagrams: socket.socket) -> None:
        data, client = datagrams.recvfrom(1)
        datagrams.sendto(data, client)

    def discard(connection: socket.socket) -> None:
        if not connection.recv_into(buffer):
            forget(connection)

    def generate(connection: socket.socket) -> None:
        try:
            connection.send(NOTHING)
        except ConnectionError:
            forget(connection)

    def accept(listener: socket.socket, act: Callable[[socket.socket], None]) -> None:
        connection = listener.accept()[0]
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ready.register(connection, selectors.EVENT_WRITE if act is generate else selectors.EVENT_READ, act)

    services: Dict[int, Callable[[socket.socket], None]] = {ECHO: echo, DISCARD: discard, CHARGEN: generate}
    for port, act in services.items():
        listener = socket.create_server((address, port), backlog=128)
        ready.register(listener, selectors.EVENT_READ, lambda found, act=act: accept(found, act))
    for port, act in {ECHO: echo_datagram, DISCARD: lambda found: found.recv_into(buffer)}.items():
        datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        datagrams.bind((address, port))
        ready.register(datagrams, selectors.EVENT_READ, act)
    while True:
        for key, _ in ready.select():
            try:
                key.data(key.fileobj)
            except ConnectionError:
                forget(key.fileobj)  # type: ignore[arg-type]


if __name__ == '__main__':
    (serve if sys.argv[1] == 'serve' else lambda *found: make_traffic(sys.argv[1], *found))(*sys.argv[2:])
