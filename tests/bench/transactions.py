"""What elfprobe costs those who wait: request and response, new connections, new processes.

`transactions`: a client at one end of the lab and a server at the other exchange single bytes, each on a
processor of its own: over one TCP connection, over UDP, and in a new TCP connection each time. Python makes
both ends a few microseconds slower, with and without elfprobe alike.

`forks`: a program that is none of elfprobe's business starts /bin/true and waits for it, again and again,
beside an elfprobe that looks at each new process for the name of -a.
"""

from __future__ import annotations

import multiprocessing
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Iterator

from compare import APP, BY_NAME, EMPTY_XDP, OFF, Comparison, Measured, Scene, scene
from figures import Figure
from lab import Lab
from loaded import pinned
from runs import elfprobe, inside

CLIENT = Path(__file__).with_name('client.py')
PORT = 7  # echo
KINDS = {
    'request and response, TCP': 'tcp',
    'request and response, UDP': 'udp',
    'TCP connections, one byte each way': 'connect',
}


def transactions(quick: bool) -> Iterator[Figure]:
    rounds, seconds = (2, 0.3) if quick else (7, 0.7)
    compared = Comparison()
    with scene(routers=4) as at, echo_server(at.lab):
        modes = at.modes()
        del modes[EMPTY_XDP]
        compared.run(modes, rounds, partial(measure_exchanges, at, seconds))
    for what in KINDS:
        yield from compared.figures(what, '1/s')


def measure_exchanges(at: Scene, seconds: float, mode: str) -> Measured:
    python = at.program(os.path.realpath(sys.executable))

    def rate(how: str) -> float:
        with pinned():
            said = at.lab.client.run(
                str(python), '-I', '-S', str(CLIENT), how, at.lab.server_address(4), str(PORT), str(seconds)
            )
        return float(said.stdout)

    return {what: rate(how) for what, how in KINDS.items()}


@contextmanager
def echo_server(lab: Lab) -> Iterator[None]:
    """Answer at the server, on PORT of TCP and UDP, each byte by the same byte."""
    address = lab.server_address(4), PORT
    with inside(lab.server):
        listener = socket.create_server(address)
        datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with listener, datagrams:
        datagrams.bind(address)
        server = multiprocessing.get_context('fork').Process(target=echo, args=(listener, datagrams), daemon=True)
        server.start()
        try:
            yield
        finally:
            server.kill()
            server.join()


def echo(listener: socket.socket, datagrams: socket.socket) -> None:
    """Serve one client after the other, until killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's business
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # the client has the last one
    while True:
        if datagrams in select.select([listener, datagrams], [], [])[0]:
            data, client = datagrams.recvfrom(1)
            datagrams.sendto(data, client)
        else:
            echo_connection(listener.accept()[0])


def echo_connection(connection: socket.socket) -> None:
    """Answer until the client closes, or sends the byte that asks to close first."""
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while True:
            data = connection.recv(1)
            if data:
                connection.send(data)
            if data in (b'', b'!'):
                return


# Other programs' processes


def forks(quick: bool) -> Iterator[Figure]:
    rounds, seconds = (2, 0.5) if quick else (8, 1)
    true, compared = shutil.which('true') or '/bin/true', Comparison()
    what = "other programs' fork and exec"
    with tempfile.TemporaryDirectory(prefix='elf-') as folder, Lab(routers=1) as lab:
        compared.run(
            {OFF: nullcontext, BY_NAME: partial(elfprobe, lab, '-a', APP, cwd=Path(folder))},
            rounds,
            lambda mode: {what: spawn_rate(true, seconds)},
        )
    yield from compared.figures(what, '1/s')


def spawn_rate(program: str, seconds: float) -> float:
    """Return how many times a second a program can be started and waited for, on one processor."""
    done, start = 0, time.perf_counter()
    end = start + seconds
    with pinned():  # not around elfprobe, which would inherit it
        while time.perf_counter() < end:
            os.waitpid(os.posix_spawn(program, [program], {}), 0)
            done += 1
    return done / (time.perf_counter() - start)
