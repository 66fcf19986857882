"""Exchange single bytes with a server for a while, and print how many times a second that succeeded.

    client.py {tcp,udp,connect} ADDRESS PORT SECONDS

`tcp` and `udp` send a byte and wait for the answer; `connect` does so in a new connection each time, which
the server closes first, so that the client's port is free at once. transactions.py runs this by a copy of the
Python interpreter, which has the name that elfprobe's -a looks for.
"""

import socket
import struct
import sys
import time
from typing import Callable

SO_RCVTIMEO = struct.pack('@ll', 5, 0)  # s, us


def connected(kind: int, address: str, port: int) -> socket.socket:
    client = socket.socket(socket.AF_INET, kind)
    # Unlike settimeout(), this adds no system call to each recv().
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, SO_RCVTIMEO)
    client.connect((address, port))
    return client


def exchange(client: socket.socket) -> None:
    client.send(b'.')
    if not client.recv(1):
        raise ConnectionError('the server has closed the connection')


def connect(address: str, port: int) -> None:
    with connected(socket.SOCK_STREAM, address, port) as client:
        client.send(b'!')  # the last one
        if client.recv(1) != b'!' or client.recv(1):
            raise ConnectionError('the server has not answered as it should')


def rate(act: Callable[[], None], seconds: float) -> float:
    done, start = 0, time.perf_counter()
    end = start + seconds
    while time.perf_counter() < end:
        act()
        done += 1
    return done / (time.perf_counter() - start)


def main(how: str, address: str, port: str, seconds: str) -> None:
    if how == 'connect':
        print(rate(lambda: connect(address, int(port)), float(seconds)))
        return
    kind = socket.SOCK_STREAM if how == 'tcp' else socket.SOCK_DGRAM
    with connected(kind, address, int(port)) as client:
        if how == 'tcp':
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        print(rate(lambda: exchange(client), float(seconds)))


if __name__ == '__main__':
    main(*sys.argv[1:])
