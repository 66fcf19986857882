"""Flows by process: whose packets are probed, and whose name their rows have.

    client: speedtest ---+
            other -------+-- r1 - r2 - r3 - r4 -- server, port 7: echo, UDP and TCP
            sh - other --+

The programs are Python under many names; what one does is a line of code in the words of TALK. Each has a
port of its own, by which its rows are found. All talk to the same server and port, so that nothing but whose
a packet is tells whether it is a target's. With `-p 0` each packet of a target has its row.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from ast import literal_eval
from collections import Counter
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

import psutil
import pytest

from lab import NETNS, PATIENCE, CommandFailed, Host, Lab, end, kill_inside, nft_table, run, wait_until
from runs import (
    LATE_SOCKETS_COMMAND,
    NO_FORKS_COMMAND,
    OLD_COMMAND,
    PROBES,
    TCP,
    UDP,
    VERSIONS,
    Run,
    elfprobe,
    ip_packets,
    platform,
    with_change,
    with_fault,
    with_text,
)

INITIAL_PID_NAMESPACE = 0xEFFFFFFC  # PROC_PID_INIT_INO, linux/proc_ns.h: its inode number, always
pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(
        os.stat('/proc/self/ns/pid').st_ino != INITIAL_PID_NAMESPACE, reason='in a PID namespace of its own'
    ),
]

LINUX = tuple(map(int, os.uname().release.split('.')[:2]))
HAS_BTF = Path('/sys/kernel/btf/vmlinux').exists()  # Debian's kernels for s390x have no BTF
# Without BTF, the kernel has no helper that finds an MPTCP socket.
HAS_MPTCP = Path('/proc/sys/net/mptcp').exists() and LINUX >= (5, 19) and HAS_BTF
SECONDS = float(os.environ.get('ELFPROBE_TESTS_SECONDS', 5))  # beside somebody else's flows
SHORT_FLOWS = 200
ENOUGH = 20  # packets of each program, at least
# Counters of packets without a probe, where the machine is too slow.
STARVED = 'lease_expired', 'hop_unresponsive', 'flow_stalled', 'carrier_resent', 'over_max_rate', 'results_lost'
MANY = ','.join(f'10.0.5.{number}' for number in range(2, 10))  # addresses of the server
PORTS = count(20000)
PEER_OFFSET = 5000  # to the port of the one who connects, from that of the program that listens

PYTHON = os.path.realpath(sys.executable)
LONG = 'network-throughput-measurement'  # the kernel keeps 15 characters of it
SAME_BEGINNING = 'network-throughout-the-building'
FIFTEEN = 'exactly-fifteen'
NAMES = (
    'speedtest',
    'SPEEDtest',
    'speedtest2',
    'speedtes',
    'other',
    LONG,
    LONG[:15],
    SAME_BEGINNING,
    FIFTEEN,
    FIFTEEN + '-and-more',
)
ODD_NAMES = {  # -> as in the CSV
    'comma,quote"': 'comma,quote"', '"': '"', 'a\nb\tc\r': 'a?b?c?', '\udcff\udcfe': '\ufffd\ufffd',
    'm\xfcnchen': 'm\xfcnchen', '\x85': '?', 'a\u2028b': 'a?b', ' ': ' ',
}  # fmt: skip
ATTACHED = (
    'cgroup_sock',
    'cgroup_sock_addr',
    'raw_tracepoint',
)  # what kinds of programs are, beside those of the interface

# Sends back whatever comes, from the address that it came to.
ECHO = """
import selectors, socket
with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as udp, selectors.DefaultSelector() as selector, \\
        socket.create_server(('', 7), family=socket.AF_INET6, dualstack_ipv6=True, backlog=100) as tcp:
    udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    udp.bind(('', 7))
    selector.register(udp, selectors.EVENT_READ)
    selector.register(tcp, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is tcp:
                selector.register(tcp.accept()[0], selectors.EVENT_READ)
            elif key.fileobj is udp:
                data, arrived_at, _, sender = udp.recvmsg(9000, 100)
                udp.sendmsg([data], arrived_at, 0, sender)
            else:
                try:
                    data = key.fileobj.recv(9000)
                    key.fileobj.sendall(data)
                except OSError:
                    data = b''
                if not data:
                    selector.unregister(key.fileobj)
                    key.fileobj.close()
"""

# Sends one packet each to more addresses than are kept in mind, then many to the server.
MANY_PEERS = """
import socket, sys, time
with open('/proc/self/comm', 'w') as file:
    file.write('manypeers')
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
    for number in range(1000):
        udp.sendto(b'x', ('198.18.%d.%d' % (number // 250, number % 250 + 1), 9))
        if number % 50 == 0:
            time.sleep(0.05)  # however fast the machine, the rate lets many have their probes
    while True:
        udp.sendto(bytes(100), (sys.argv[1], 7))
        time.sleep(0.005)
"""

SENDING = """
import socket, sys, time
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
    while True:
        udp.sendto(b'x', (sys.argv[1], 7))
        time.sleep(0.005)
"""

# Sends as fast as it goes, each packet to another destination; nobody answers.
FLOOD = """
import itertools, socket
with open('/proc/self/comm', 'w') as file:
    file.write('flood')
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
    for number in itertools.count():
        udp.sendto(b'x', ('198.%d.%d.%d' % (18 + (number >> 16) % 2, number >> 8 & 255, number & 255), 9))
"""
SILENT = (
    'chain flood { type filter hook prerouting priority -300; ip daddr 198.18.0.0/15 drop; }'  # for nft_table()
)

# The target goes from one destination to the next, the other sends to the same all the time.
SAME_PEERS = """
import mmap, os, socket, struct
shared, cpus = mmap.mmap(-1, 4), sorted(os.sched_getaffinity(0))
child = os.fork()
os.sched_setaffinity(0, [cpus[-1 if child else 0]])
if child:
    with open('/proc/self/comm', 'w') as file:
        file.write('manypeers')
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
    number = 1
    while number:
        if child:
            number = (number + 1) % 16000
            struct.pack_into('I', shared, 0, number)
        [number] = struct.unpack('I', shared)
        udp.sendto(b'x', ('198.18.%d.%d' % (number // 250, number % 250 + 1), 9))
"""

# A server whose connections are not for the process that listens. The file has who answers which peer's port. To
# accept without an address tells less.
SERVER = """
import ctypes, os, socket, sys
how, port, notes = sys.argv[1], int(sys.argv[2]), sys.argv[3]

def answer(connection):
    data = connection.recv(100, socket.MSG_WAITALL)
    with open(notes, 'a') as file:
        file.write(f'{port} {os.getpid()} {int(data)}\\n')
    while data:
        connection.sendall(data)
        data = connection.recv(100)

def accept():
    if how != 'blind':
        return listener.accept()[0]
    number = ctypes.CDLL(None).accept(listener.fileno(), None, None)
    return socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, number)

if how == 'activated':
    listener = socket.socket(fileno=3)
else:
    listener = socket.create_server(('', port))
if how != 'handing' and os.fork() and os.fork():
    os.wait()
while True:
    connection = accept()
    if how == 'handing' and os.fork():
        connection.close()
        continue
    answer(connection)
"""
# Listens for a program, and becomes it when there is a connection, as systemd-socket-activate(1) does.
ACTIVATOR = """
import os, select, socket, sys
listener = socket.create_server(('', int(sys.argv[1])))
os.dup2(listener.fileno(), 3)
os.set_inheritable(3, True)
select.select([3], [], [])
os.execv(sys.argv[2], sys.argv[2:])
"""
# Has two connections to each of the ports at a time, and says on each which port is its own.
CLIENT = """
import socket, sys, time
connections = [socket.create_connection((sys.argv[1], port)) for port in map(int, sys.argv[2:]) for _ in range(2)]
while True:
    for connection in connections:
        connection.sendall(b'%100d' % connection.getsockname()[1])
    for connection in connections:
        connection.recv(100, socket.MSG_WAITALL)
    time.sleep(0.005)
"""

# talk.py. Files PORT.pids get who has had the socket, PORT.sent, at the end, how many packets were sent.
TALK = """
import ctypes, os, socket, struct, threading, time
PORT, SERVERS, FOLDER = int(os.environ['PORT']), os.environ['SERVERS'].split(','), os.environ['FOLDER']
SERVER_PORT = int(os.environ.get('SERVER_PORT', 7))
FAMILY, ICMP, TYPE = (socket.AF_INET6, 58, 128) if ':' in SERVERS[0] else (socket.AF_INET, 1, 8)
ECHO_REQUEST = struct.pack('!BBHHH', TYPE, 0, 0xFFFF - 0x800 - PORT, PORT, 0)

def note(kind, number):
    with open('%s/%d.%s' % (FOLDER, PORT, kind), 'a') as file:
        file.write('%d\\n' % number)

def note_pid():
    note('pids', int(os.readlink('/proc/self')))  # as outside of a PID namespace

def exists(name):
    return os.path.exists(os.path.join(FOLDER, name))

class Flow:
    def __init__(self, sock, to=(None,)):
        self.sock, self.to, self.sent = sock, to, 0
        sock.settimeout(1)
        self.exchange()
        note_pid()

    def exchange(self):
        data = ECHO_REQUEST if self.sock.proto == ICMP else bytes(100)
        for server in self.to:
            self.sent += 1
            try:
                self.sock.sendto(data, server) if server else self.sock.send(data)
                self.sock.recv(9000)
            except socket.timeout:
                pass

MPTCP = 262  # socket.IPPROTO_MPTCP since Python 3.10

def bound(kind, protocol=0):
    sock = socket.socket(FAMILY, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if kind != socket.SOCK_RAW:
        sock.bind(('', PORT))
    return sock

def connected(sock):
    sock.connect((SERVERS[0], SERVER_PORT))
    return Flow(sock)

def tcp(): return connected(bound(socket.SOCK_STREAM))
def mptcp(): return connected(bound(socket.SOCK_STREAM, MPTCP))
def udp(): return connected(bound(socket.SOCK_DGRAM))
def ping(): return connected(bound(socket.SOCK_DGRAM, ICMP))
def raw_ping(): return connected(bound(socket.SOCK_RAW, ICMP))
def sendto(): return Flow(bound(socket.SOCK_DGRAM), [(server, SERVER_PORT) for server in SERVERS])

def listening(protocol=0):
    sock = bound(socket.SOCK_STREAM, protocol)
    sock.listen()
    note_pid()
    return sock

def go():
    while not exists('go'):
        time.sleep(0.005)

def talk(flow):
    go()
    while flow.sent < ENOUGH or not exists('stop'):
        flow.exchange()
        time.sleep(0.005)
    note('sent', flow.sent)

def answer(listener):
    connection, sent = listener.accept()[0], 0
    note_pid()
    try:
        while True:
            data = connection.recv(9000)
            if not data:
                break
            connection.send(data)
            sent += 1
    except ConnectionError:  # the other end was closed before the last answer came
        pass
    note('sent', sent)

def fork():
    if os.fork():
        os.wait()
        os._exit(0)
    if exists('%d.pids' % PORT):  # and so the socket
        note_pid()

def daemon():
    parent = os.getpid()
    if os.fork():
        os._exit(0)
    os.setsid()
    while os.getppid() == parent:
        time.sleep(0.005)

def thread(function):
    with open('/proc/self/comm') as file:  # its own name would be the thread's from Python 3.14 on
        started = threading.Thread(target=function, name=file.read()[:-1])
    started.start()
    started.join()

def outlive(function):
    threading.Thread(target=lambda: [time.sleep(0.01), function()]).start()
    exit_thread = {'x86_64': 60, 's390x': 1}.get(os.uname().machine, 93)
    ctypes.CDLL(None).syscall(exit_thread)

def name(text):
    with open('/proc/thread-self/comm', 'wb', 0) as file:
        file.write(os.fsencode(text))

def execute(program, code='talk(udp())'):
    os.execv(program, [program, '-c', 'from talk import *; ' + code])

def handed(what):
    number = os.dup(getattr(what, 'sock', what).fileno())
    os.set_inheritable(number, True)
    return ('talk(Flow(%s))' if isinstance(what, Flow) else 'answer(%s)') % f'socket.socket(fileno={number})'
""".replace('ENOUGH', str(ENOUGH)).replace('0.005', str(0.005 * PATIENCE**2))  # dozens run at once

# Prints the ports of flows of 20 to 30 ms each, every other one a child's.
FLOWS = """
import os, socket, sys, time
for number in range(int(sys.argv[2])):
    if number % 2 and os.fork():
        os.wait()
        continue
    start = time.monotonic()
    with socket.create_connection((sys.argv[1], 7)) as connection:
        while time.monotonic() < start + 0.02 + number % 11 / 1000:
            connection.sendall(bytes(100))
            connection.recv(9000)
            time.sleep(0.004)
        print(connection.getsockname()[1], flush=True)
    if number % 2:
        os._exit(0)
"""

# As where each process that it begins to follow has just ended.
TOO_LATE_COMMAND = with_change("""
import contextlib, psutil
real = elfprobe.ProcessFollower._adopt
def adopt(self, pid, *args):
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        process.kill()
        process.wait()
    real(self, pid, *args)
elfprobe.ProcessFollower._adopt = adopt
""")


class Row(NamedTuple):
    """What is looked at here in a row of the CSV."""

    dest: str
    sport: int
    protocol: int
    app: str
    pid: str
    dport: int = 7


def read_rows(elf: Run) -> list[Row]:
    """The rows so far; the last line may be half written."""
    text = (elf.cwd / 'elf.csv').read_bytes().decode()
    header, *lines = csv.reader(io.StringIO(text[: text.rfind('\n') + 1], newline=''), strict=True)
    assert header[15:17] == ['app', 'pid']
    assert {len(line) for line in lines} <= {len(header)}
    dest, sport, protocol, dport = (header.index(name) for name in ('dest', 'sport', 'protocol', 'dport'))
    return [
        Row(line[dest], int(line[sport]), int(line[protocol]), *line[15:17], int(line[dport])) for line in lines
    ]


def wait_for_rows(elf: Run, number: int = ENOUGH, **values: object) -> None:
    """Until there are so many rows with these values."""
    wait_until(
        lambda: sum(values.items() <= row._asdict().items() for row in read_rows(elf)) >= number,
        10,
        f'{number} rows with {values}',
    )


# Programs


@pytest.fixture(scope='module')
def net(lab4: Lab) -> Lab:
    serve(lab4)
    return lab4


def serve(lab: Lab) -> None:
    """Have the server of a lab answer, at many addresses."""
    for address in MANY.split(',')[1:]:
        lab.server.run('ip', 'address', 'add', f'{address}/24', 'dev', lab.server.device)
    lab.client.run('sysctl', '-qw', 'net.ipv4.ping_group_range=0 2147483647')
    lab.server.popen(PYTHON, '-c', ECHO)
    wait_until(lambda: lab.server.listens(7), 10, 'the server listens')


@pytest.fixture(scope='module')
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with Python under many names, and scripts."""
    folder = tmp_path_factory.mktemp('programs')
    for sub in 'copies', 'odd', 'scripts':
        (folder / sub).mkdir()
    for name in NAMES:
        (folder / name).symlink_to(PYTHON)
    for name in ODD_NAMES:
        (folder / 'odd' / name).symlink_to(PYTHON)
    for name in LONG, SAME_BEGINNING, 'speedtest':
        shutil.copy(PYTHON, folder / 'copies' / name)
    (folder / 'link').symlink_to('copies/speedtest')
    (folder / 'talk.py').write_text(TALK)
    script = 'from talk import *; talk(udp())\n'
    for name, text in {
        'speedtest.py': f'#!{PYTHON}\n{script}',
        'speedtest': f'#!/usr/bin/env python3\n{script}',
        'speedtest.sh': '"$@"\n:\n',
        'other.py': script,
    }.items():
        (folder / 'scripts' / name).write_text(text)
        (folder / 'scripts' / name).chmod(0o755)
    return folder


class Program:
    """A program in the lab, by what it has noted so far."""

    def __init__(self, folder: Path, port: int, process: subprocess.Popen[str] | None = None) -> None:
        self.port = port
        self._process = process
        self._folder = folder

    def _notes(self, kind: str) -> list[int]:
        path = self._folder / f'{self.port}.{kind}'
        text = path.read_text() if path.exists() else ''
        return [int(line) for line in text[: text.rfind('\n') + 1].splitlines()]

    @property
    def pids(self) -> list[int]:
        """The processes that have had its socket, if it is open."""
        return self._notes('pids')

    @property
    def sent(self) -> int:
        """Packets it has sent, all in all; 0 before it ends."""
        return sum(self._notes('sent'))

    @property
    def process(self) -> subprocess.Popen[str]:
        assert self._process
        return self._process


class Stage:
    """Programs in a lab, and the folder for their notes."""

    def __init__(self, lab: Lab, programs: Path, folder: Path) -> None:
        folder.mkdir()
        self._lab, self._programs, self._folder = lab, programs, folder

    def command(self, *cmd: str, **variables: object) -> tuple[str, ...]:
        """A command with the surroundings that a program needs."""
        path = f'{self._programs}:{self._programs}/scripts'
        return (
            'env',
            '-C',
            str(self._programs),
            f'FOLDER={self._folder}',
            f'PYTHONPATH={path}',
            *(f'{name}={value}' for name, value in variables.items()),
            *cmd,
        )

    def talk(self, name: str, code: str = 'talk(udp())', version: int = 4, port: int = 0) -> Program:
        """Start a program by itself, and see it open its socket."""
        port = port or next(PORTS)
        command = self.command(
            *name.split(), '-c', f'from talk import *; {code}', PORT=port, SERVERS=self._lab.server_address(version)
        )
        program = Program(self._folder, port, self._lab.client.popen(*command))
        self.wait_for('pids', program)
        return program

    def shell(self, host: Host | None = None) -> subprocess.Popen[str]:
        host = host or self._lab.client
        return host.popen(*self.command('sh'), stdin=subprocess.PIPE, errors='surrogateescape')

    def start(
        self, shell: subprocess.Popen[str], port: int, command: str, code: str, **variables: object
    ) -> Program:
        """Have a shell start a program."""
        words = [f'{name}={value}' for name, value in {'PORT': port, **variables}.items()] + [command]
        if code:
            words += ['-c', shlex.quote(f'from talk import *; {code}')]
        assert shell.stdin
        shell.stdin.write(' '.join([*words, '&\n']))
        shell.stdin.flush()
        return Program(self._folder, port)

    def wait_for(self, kind: str, *programs: Program) -> None:
        """Until all have noted this."""
        waiting = list(programs)

        def noted() -> bool:
            waiting[:] = [program for program in waiting if not getattr(program, kind)]
            return not waiting

        try:
            wait_until(noted, 60, '')
        except TimeoutError:
            ports = [program.port for program in waiting]
            raise CommandFailed(f'programs with ports {ports} have noted no {kind}') from None

    def go(self) -> None:
        """From now on programs send again and again."""
        (self._folder / 'go').touch()

    def begin_again(self) -> None:
        """After all have finished: others do not have to."""
        (self._folder / 'stop').unlink()

    def finish(self, *programs: Program) -> None:
        """Have all come to their end."""
        (self._folder / 'stop').touch()
        self.wait_for('sent', *programs)


@pytest.fixture
def stage(net: Lab, programs: Path, tmp_path: Path) -> Iterator[Stage]:
    yield Stage(net, programs, tmp_path / 'stage')
    net.client.end_processes()
    kill_inside([net.client.name])  # what those have started would send beside the next tests


# Many of them at once


class Case(NamedTuple):
    """A program, and what its rows must say."""

    command: str
    code: str = ''  # for -c, where the command is not a script
    app: str | None = None  # None: not one row
    late: bool = False  # a target by what only user space sees, so the first packets may have no row
    older: bool = False  # than elfprobe, and so is its socket
    outside: bool = False  # not a child of the shell that is a target
    peer: str = ''  # it listens, and is connected `before` or `after` elfprobe is there
    servers: str = ''


class Outcome(NamedTuple):
    program: Program
    rows: list[Row]
    starved: int  # packets of all programs that carried no probe, since the machine was too slow


def perform(
    lab: Lab,
    programs: Path,
    folder: Path,
    cases: dict[str, Case],
    arguments: Callable[[int, dict[str, Program]], list[str]],
) -> dict[str, Outcome]:
    """Run elfprobe beside programs of all cases. `arguments` makes its command line of the PID of the shell
    that is a target, and of the programs that are older."""
    stage = Stage(lab, programs, folder / 'stage')
    inner, outer, remote = stage.shell(), stage.shell(), stage.shell(lab.server)
    started: dict[str, Program] = {}

    def start(older: bool) -> None:
        for name, case in cases.items():
            if case.older == older:
                port = next(PORTS)
                started[name] = stage.start(
                    outer if case.outside else inner,
                    port,
                    case.command,
                    case.code,
                    SERVERS=case.servers or lab.server_address(VERSIONS[port % 2]),
                )
        stage.wait_for('pids', *started.values())

    def connect(when: str) -> None:
        peers = []
        for port in [started[name].port for name, case in cases.items() if case.peer == when]:
            peers.append(
                stage.start(
                    remote,
                    port + PEER_OFFSET,
                    PYTHON,
                    'talk(tcp())',
                    SERVER_PORT=port,
                    SERVERS=lab.client_address(VERSIONS[port % 2]),
                )
            )
        stage.wait_for('pids', *peers)

    def all_have_rows() -> bool:
        ports = [row.sport for row in read_rows(elf)]
        wanted = [started[name].port for name, case in cases.items() if case.app is not None]
        return all(ports.count(port) >= ENOUGH for port in wanted)

    try:
        start(older=True)
        connect('before')
        with elfprobe(lab, '-d', '-p', '0', *arguments(inner.pid, started), cwd=folder) as elf:
            stage.go()
            start(older=False)
            connect('after')
            with suppress(TimeoutError):  # the tests say which of them have none
                wait_until(all_have_rows, 10, 'rows of all targets')
            stage.finish(*started.values())
    finally:
        end(remote)
        lab.client.end_processes()
    rows = read_rows(elf)
    assert {row.sport for row in rows} <= {program.port for program in started.values()}
    starved = sum(elf.counters[name] for name in STARVED)
    return {
        name: Outcome(program, [row for row in rows if row.sport == program.port], starved)
        for name, program in started.items()
    }


def check(case: Case, program: Program, rows: list[Row], starved: int) -> None:
    assert program.sent >= (ENOUGH // 2 if case.peer else ENOUGH)  # one answer may be to two of the peer's
    if case.app is None:
        assert rows == []
        return
    assert len(rows) >= ENOUGH
    assert {row.app for row in rows} == {case.app}
    assert {int(row.pid) for row in rows} <= set(program.pids)
    assert case.late or case.older or len(rows) >= program.sent - starved
    assert not case.servers or {row.dest for row in rows} == set(case.servers.split(','))


TALKING = 'talk(udp())'
NAMED = {  # with -a SpeedTest -a LONG -a FIFTEEN
    'command name': Case('./speedtest', TALKING, 'speedtest'),
    'capitals': Case('./SPEEDtest', TALKING, 'SPEEDtest'),
    'more': Case('./speedtest2', TALKING),
    'less': Case('./speedtes', TALKING),
    'long name': Case(f'./{LONG}', TALKING, LONG[:15], late=True),
    'long name of a file': Case(f'copies/{LONG}', TALKING, LONG[:15], late=True),
    'same beginning': Case(f'./{SAME_BEGINNING}', TALKING),
    'same beginning of a file': Case(f'copies/{SAME_BEGINNING}', TALKING),
    'nothing but the beginning': Case(f'./{LONG[:15]}', TALKING),
    'fifteen characters': Case(f'./{FIFTEEN}', TALKING, FIFTEEN, late=True),
    'fifteen characters and more': Case(f'./{FIFTEEN}-and-more', TALKING),
    'link to an executable': Case('./link', TALKING, 'link', late=True),
    'script': Case('./other scripts/speedtest.py', app='other', late=True),
    'script without extension': Case('python3 scripts/speedtest', app='python3', late=True),
    'script after an option': Case('python3 -u scripts/speedtest.py', app='python3', late=True),
    'script after a word': Case('python3 -W ignore scripts/speedtest.py', app='python3', late=True),
    'script of a shell': Case('sh -e scripts/speedtest.sh ./other', TALKING, 'other', late=True),
    'module': Case('python3 -m speedtest', app='python3', late=True),
    'shebang': Case('scripts/speedtest.py', app='speedtest.py', late=True),
    'shebang with env': Case('scripts/speedtest', app='python3'),
    'argument': Case('python3 scripts/other.py scripts/speedtest.py speedtest'),
    'word in a shell': Case("sh -c 'sleep 0.2; \"$@\"; : scripts/speedtest' sh ./other", TALKING),
    'PID namespace': Case('unshare --pid --fork ./speedtest', TALKING, 'speedtest'),
    'renamed to it': Case('./other', 'name("SpeedTest"); talk(udp())', 'SpeedTest'),
    'renamed from it': Case('./speedtest', 'name("worker"); talk(udp())', 'worker'),
    'thread of this name': Case('./other', 'thread(lambda: [name("speedtest"), talk(udp())])'),
    'thread of another name': Case('./speedtest', 'thread(lambda: [name("x"), talk(udp())])', 'speedtest'),
    'forked': Case('./speedtest', 'fork(); talk(udp())', 'speedtest'),
    'forked worker': Case('./speedtest', 'flow = tcp(); fork(); talk(flow)', 'speedtest'),
    'child that is another program': Case('./speedtest', 'fork(); execute("./other")', 'other'),
    'socket brought along': Case('./other', 'execute("./speedtest", handed(udp()))', 'speedtest', late=True),
    'socket of the parent': Case(
        './other', 'flow = tcp(); fork(); execute("./speedtest", handed(flow))', 'speedtest', late=True
    ),
    'sendto': Case('./speedtest', 'talk(sendto())', 'speedtest', servers=MANY),
    'ping': Case('./speedtest', 'talk(ping())', 'speedtest'),
    'raw ping': Case('./speedtest', 'talk(raw_ping())', 'speedtest'),
    'accepted': Case('./speedtest', 'answer(listening())', 'speedtest', peer='after'),
    'accepted by a worker': Case(
        './speedtest', 'sock = listening(); fork(); answer(sock)', 'speedtest', peer='after'
    ),
    'accepted, listener brought along': Case(
        './other', 'execute("./speedtest", handed(listening()))', 'speedtest', late=True, peer='after'
    ),
    'accepted by another': Case('./other', 'answer(listening())', peer='after'),
    **{  # as every server in Go since 1.24
        f'{which}accepted by MPTCP': Case(
            './speedtest', 'answer(listening(MPTCP))', 'speedtest', older=bool(which), peer='after'
        )
        for which in ('', 'older ')
        if HAS_MPTCP
    },
    **{
        f'{which}MPTCP': Case('./speedtest', 'talk(mptcp())', 'speedtest', older=bool(which))
        for which in ('', 'older ')
        if HAS_MPTCP
    },
    'older TCP': Case('./speedtest', 'talk(tcp())', 'speedtest', older=True),
    'older UDP': Case('./speedtest', 'talk(udp())', 'speedtest', older=True),
    'older sendto': Case('./speedtest', 'talk(sendto())', 'speedtest', older=True, servers=MANY),
    'older ping': Case('./speedtest', 'talk(ping())', 'speedtest', older=True),
    'older raw ping': Case('./speedtest', 'talk(raw_ping())', 'speedtest', older=True),
    'older thread': Case('./speedtest', 'thread(lambda: talk(tcp()))', 'speedtest', older=True),
    'older worker': Case('./speedtest', 'flow = tcp(); fork(); talk(flow)', 'speedtest', older=True),
    'older long name': Case(f'copies/{LONG}', 'talk(tcp())', LONG[:15], older=True),
    'older same beginning': Case(f'copies/{SAME_BEGINNING}', 'talk(tcp())', older=True),
    'older script': Case('scripts/speedtest.py', app='speedtest.py', older=True),
    'older other': Case('./other', 'talk(tcp())', older=True),
    'older socket brought along': Case(
        './other', 'flow = udp(); go(); execute("./speedtest", handed(flow))', 'speedtest', older=True
    ),
    'older one of the parent': Case(
        './other', 'flow = tcp(); fork(); execute("./speedtest", handed(flow))', 'speedtest', older=True
    ),
    'older accepted': Case('./speedtest', 'answer(listening())', 'speedtest', older=True, peer='before'),
    'accepted by older': Case('./speedtest', 'answer(listening())', 'speedtest', older=True, peer='after'),
}

DESCENDANTS = {  # with -P of a shell, the parent of all but those outside, and of `itself`
    'itself': Case('./other', 'talk(tcp())', 'other', older=True, outside=True),
    'somebody else': Case('./other', TALKING, outside=True),
    'somebody else older': Case('./other', 'talk(tcp())', older=True, outside=True),
    'child': Case('./other', TALKING, 'other'),
    'older child': Case('./other', 'talk(tcp())', 'other', older=True),
    'grandchild': Case('./other', 'fork(); fork(); talk(udp())', 'other'),
    'older grandchild': Case('./other', 'fork(); fork(); talk(tcp())', 'other', older=True),
    'later grandchild': Case('./other', 'udp(); go(); fork(); talk(tcp())', 'other', older=True),
    'later program': Case('./other', 'udp(); go(); fork(); execute("./speedtest")', 'speedtest', older=True),
    'worker': Case('./other', 'flow = tcp(); fork(); talk(flow)', 'other'),
    'later worker': Case('./other', 'flow = udp(); go(); fork(); talk(flow)', 'other', older=True),
    'thread': Case('./other', 'thread(lambda: talk(udp()))', 'other'),
    'thread that outlives the first': Case('./other', 'outlive(lambda: talk(udp()))', 'other'),
    'forked by a thread': Case('./other', 'thread(lambda: [fork(), talk(udp())])', 'other'),
    'executed by a thread': Case('./other', 'thread(lambda: execute("./speedtest"))', 'speedtest'),
    'executed': Case('./other', 'execute("./speedtest")', 'speedtest'),
    'socket brought along': Case('./other', 'execute("./speedtest", handed(udp()))', 'other', late=True),
    'shell that executes': Case("sh -c 'sleep 0.05; exec \"$@\"' sh ./other", TALKING, 'other'),
    'subshell': Case("sh -c '(\"$@\" &)' sh ./other", TALKING, 'other'),
    'session': Case('setsid ./other', TALKING, 'other'),
    'daemon': Case('./other', 'daemon(); talk(udp())', 'other'),
    'daemon of a daemon': Case('./other', 'daemon(); daemon(); execute("./speedtest")', 'speedtest'),
    'accepted': Case('./other', 'answer(listening())', 'other', peer='after'),
    'accepted by older': Case('./other', 'answer(listening())', 'other', older=True, peer='after'),
    'older accepted by a worker': Case(
        './other', 'sock = listening(); fork(); answer(sock)', 'other', older=True, peer='before'
    ),
    **{f'named {name!a}': Case(shlex.quote(f'odd/{name}'), TALKING, app) for name, app in ODD_NAMES.items()},
    **{
        f'renamed {name!a}': Case('./other', f'name({name!a}); talk(udp())', app) for name, app in ODD_NAMES.items()
    },
}


@pytest.fixture(scope='module')
def by_name(net: Lab, programs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    return perform(
        net,
        programs,
        tmp_path_factory.mktemp('by_name'),
        NAMED,
        lambda shell, older: ['-a', 'SpeedTest', '-a', LONG, '-a', FIFTEEN],
    )


@pytest.fixture(scope='module')
def by_pid(net: Lab, programs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    return perform(
        net,
        programs,
        tmp_path_factory.mktemp('by_pid'),
        DESCENDANTS,
        lambda shell, older: ['-P', str(shell), '-P', str(older['itself'].pids[0])],
    )


@pytest.mark.parametrize('name', NAMED)
def test_by_name(by_name, name):
    check(NAMED[name], *by_name[name])


@pytest.mark.parametrize('name', DESCENDANTS)
def test_by_pid(by_pid, name):
    check(DESCENDANTS[name], *by_pid[name])


class Server(NamedTuple):
    name: str
    how: str
    by_pid: bool = False  # one of its two workers is a target by its PID, and it alone
    older: bool = False


SERVERS = (
    Server('other', 'prefork', by_pid=True, older=True),
    Server('other', 'blind', by_pid=True, older=True),
    Server('speedtest', 'prefork', older=True),
    Server('speedtest', 'blind'),
    Server('speedtest', 'handing'),  # as postgres and sshd
    Server('speedtest', 'activated'),
)


def test_who_has_a_connection(net, programs, tmp_path):
    """Not the process that listens, but the one that accepts, or that was handed the connection."""
    ports = {next(PORTS): server for server in SERVERS}
    notes = tmp_path / 'notes'
    workers, handing = [], 0

    def start(older: bool) -> None:
        nonlocal handing
        for port, server in ports.items():
            if server.older == older:
                command = [str(programs / server.name), '-c', SERVER, server.how, str(port), str(notes)]
                if server.how == 'activated':
                    command = [sys.executable, '-c', ACTIVATOR, str(port), *command]
                started = net.client.popen(*command)
                wait_until(lambda port=port: net.client.listens(port), 10, f'{server} listens')
                if server.how == 'handing':
                    handing = started.pid
                if server.by_pid:
                    children = wait_until(psutil.Process(started.pid).children, 10, 'it has a worker')
                    workers.append(children[0].pid)

    start(older=True)
    options = [word for pid in workers for word in ('-P', str(pid))]
    with elfprobe(net, '-a', 'speedtest', *options, '-p', '0', cwd=tmp_path) as elf:
        start(older=False)
        client = net.server.popen(sys.executable, '-c', CLIENT, net.client_address(4), *map(str, ports))
        wait_until(lambda: notes.exists() and len(notes.read_text().splitlines()) == 2 * len(ports), 20, 'answers')
        answered = {
            (port, peer): (ports[port].name, pid)
            for port, pid, peer in (map(int, line.split()) for line in notes.read_text().splitlines())
            if not ports[port].by_pid or pid in workers
        }
        with suppress(TimeoutError):  # the difference is shown below
            wait_until(lambda: {(row.sport, row.dport) for row in read_rows(elf)} >= answered.keys(), 10, 'all')
        end(client)
        net.client.end_processes()
    assert len({pid for _, pid in answered.values()}) == 1 + 1 + 2 + 2 + 2 + 2  # each worker has one
    owners = {((row.sport, row.dport), (row.app, int(row.pid))) for row in read_rows(elf)}
    owners = {(connection, (app, pid)) for connection, (app, pid) in owners if pid != handing}  # it had them first
    assert owners == set(answered.items())


NGINX = """
daemon off; pid nginx.pid; worker_processes 2; user root; error_log stderr crit;
events { }
http {
    access_log off; keepalive_requests 1000000; client_body_temp_path body; proxy_temp_path proxy;
    fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi; scgi_temp_path scgi;
    server { listen 8080; location / { return 200 $pid; } }
}
"""
# Opens connections until both workers have answered, says who has which, and goes on with all of them.
NGINX_CLIENT = """
import http.client, itertools, sys, time
connections, workers = [], {}
def ask(connection):
    connection.request('GET', '/')
    return int(connection.getresponse().read())
while len(set(workers.values())) < 2:
    connections.append(http.client.HTTPConnection(sys.argv[1], 8080))
    connections[-1].connect()
    workers[connections[-1].sock.getsockname()[1]] = ask(connections[-1])
print(workers, flush=True)
while True:
    for connection in connections:
        ask(connection)
    time.sleep(0.005)
"""


@pytest.mark.needs('nginx')
def test_worker_of_nginx(net, tmp_path):
    """-P names one of two workers: the connections of the other one have no rows."""
    (tmp_path / 'nginx.conf').write_text(NGINX)
    master = net.client.popen('nginx', '-p', str(tmp_path), '-c', 'nginx.conf', '-e', 'stderr')
    wait_until(lambda: net.client.listens(8080), 10, 'nginx listens')
    worker, _ = wait_until(
        lambda: len(psutil.Process(master.pid).children()) == 2 and psutil.Process(master.pid).children(),
        10,
        'both',
    )
    try:
        with elfprobe(net, '-P', str(worker.pid), '-p', '0', cwd=tmp_path) as elf:
            client = net.server.popen(
                sys.executable, '-c', NGINX_CLIENT, net.client_address(4), stdout=subprocess.PIPE
            )
            workers = literal_eval(client.stdout.readline())
            ports = {port for port, pid in workers.items() if pid == worker.pid}
            wait_until(lambda: {row.dport for row in read_rows(elf)} >= ports, 20, 'rows of its connections')
            end(client)
    finally:
        net.client.end_processes()
    assert {(row.dport, row.app, row.pid) for row in read_rows(elf)} == {
        (port, 'nginx', str(worker.pid)) for port in ports
    }


# Sends all that it can by MPTCP, or receives all that comes, at port 8.
MPTCP_BULK = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262) as mptcp:
    if sys.argv[1:]:
        mptcp.connect((sys.argv[1], 8))
        while True:
            mptcp.sendall(bytes(1 << 20))
    mptcp.bind(('', 8))
    mptcp.listen()
    connection = mptcp.accept()[0]
    while connection.recv(1 << 20):
        pass
"""


@pytest.mark.skipif(not HAS_MPTCP, reason='programs cannot know MPTCP sockets, or there are none')
def test_mptcp_subflows(net, programs, tmp_path):
    """Those that the kernel adds by itself belong to the process, too."""
    second = '10.0.1.77'
    net.client.run('ip', 'address', 'add', f'{second}/24', 'dev', net.client_device)
    for host in net.client, net.server:
        host.run('ip', 'mptcp', 'limits', 'set', 'subflow', '2', 'add_addr_accepted', '2')
    net.client.run('ip', 'mptcp', 'endpoint', 'add', second, 'dev', net.client_device, 'subflow')
    server = net.server.popen(sys.executable, '-c', MPTCP_BULK)
    try:
        wait_until(lambda: net.server.listens(8), 10, 'the server listens')
        with elfprobe(net, '-a', 'speedtest', cwd=tmp_path) as elf:
            client = net.client.popen(str(programs / 'speedtest'), '-c', MPTCP_BULK, net.server_address(4))
            wait_until(lambda: len({row.sport for row in read_rows(elf)}) == 2, 20, 'rows of two subflows')
    finally:
        net.client.end_processes()
        end(server)
        net.client.run('ip', 'mptcp', 'endpoint', 'flush')
        net.client.run('ip', 'address', 'del', f'{second}/24', 'dev', net.client_device)
    assert {(row.app, row.pid) for row in read_rows(elf)} == {('speedtest', str(client.pid))}


# Beside others


@pytest.mark.sample
def test_only_its_flows(net, stage, tmp_path):
    """Two programs with the same kinds of flows, to the same ports: all rows and probes are one's."""
    flows = {
        (name, net.server_address(version), protocol): stage.talk(f'./{name}', f'talk({code})', version)
        for name in ('speedtest', 'other')
        for version in VERSIONS
        for protocol, code in ((TCP, 'tcp()'), (UDP, 'udp()'))
    }
    stage.go()
    with net.routers[0].capture(filter=PROBES) as seen, elfprobe(net, '-a', 'speedtest', cwd=tmp_path) as elf:
        time.sleep(SECONDS)
        stage.finish(*flows.values())
    rows = read_rows(elf)
    assert set(rows) == {
        Row(dest, program.port, protocol, name, str(program.process.pid))
        for (name, dest, protocol), program in flows.items()
        if name == 'speedtest'
    }
    assert sorted(row[:3] for row in rows) == sorted((p.dest, p.sport, p.protocol) for p in ip_packets(seen))
    assert min(program.sent for program in flows.values()) > 10 * SECONDS / PATIENCE


def test_short_flows(net, programs, tmp_path):
    """Each of hundreds, of a program that is started later, has a row."""
    command = str(programs / 'speedtest'), '-c', FLOWS, net.server_address(4), str(SHORT_FLOWS)
    with elfprobe(net, '-a', 'speedtest', '-r', 'g', '-p', '1', cwd=tmp_path) as elf:
        ports = set(map(int, net.client.run(*command, timeout=60).stdout.split()))
    assert len(ports) == SHORT_FLOWS
    assert {row.sport for row in read_rows(elf)} == ports


# As where few destinations of flows have room.
FEW_PEERS_COMMAND = with_change('elfprobe.FLOW_DESTINATIONS_MAX = 256')


def test_many_peers(net, tmp_path):
    """The destinations without probes for longest make room."""
    via = *net.client.command(), *FEW_PEERS_COMMAND
    with elfprobe(net, '-a', 'manypeers', '--max-rate', '1000', '-d', cwd=tmp_path, via=via) as elf:
        net.client.popen(sys.executable, '-c', MANY_PEERS, net.server_address(4))
        server = net.server_address(4)
        wait_until(
            lambda: {row.outttl for row in elf.rows() if row.dest == server} == {1, 2, 3, 4},
            20,
            'the server is among those that are kept in mind',
        )
    assert len({row.dest for row in elf.rows()}) > 50
    assert elf.stop() == 0
    assert elf.counters['no_room'] > 100


def test_process_that_sends_to_everybody(net, tmp_path):
    """It takes what others leave of the rate: a ping beside it is probed as before."""
    server = net.server_address(4)
    options = '-a', 'flood', '-a', 'ping', '-p', '0', '--max-rate', '500', '-d'
    with nft_table(net.routers[0], SILENT), elfprobe(net, *options, cwd=tmp_path) as elf:
        ping = net.client.popen('ping', '-nqi.02', server, stdout=subprocess.DEVNULL)
        wait_for_rows(elf, dest=server)
        flood = net.client.popen(sys.executable, '-c', FLOOD)
        wait_until(lambda: any(row.dest != server for row in elf.rows()), 20, 'rows of the flood')
        end(flood)
        end(ping)
        assert elf.stop() == 0
    start = min(row.sendtime for row in elf.rows() if row.dest != server)
    seconds = 4  # of the five after which the first row is written
    during = [row.dest for row in elf.rows() if start < row.sendtime < start + seconds * 10**9]
    assert during.count(server) > seconds / 0.02 / 2 / PATIENCE
    assert len(during) > 2 * during.count(server)
    assert elf.counters['over_new_paths'] > 1000
    assert 'no probes for' not in elf.log


# As where any number of destinations may be new in a second.
ALL_NEW = with_text('#define NEW_PATHS_RATE 1000', '#define NEW_PATHS_RATE 1000000')


def test_peers_that_others_have_too(net, tmp_path):
    """A destination is a target from one packet to the next, and no packet of others is taken for one."""
    via = *net.client.command(), *with_change(ALL_NEW)
    with elfprobe(net, '-a', 'manypeers', '--max-rate', '100000', cwd=tmp_path, via=via) as elf:
        net.client.run(sys.executable, '-c', SAME_PEERS, timeout=60)
        assert elf.stop() == 0
    rows = read_rows(elf)
    assert len(rows) > 1000
    assert {row.app for row in rows} == {'manypeers'}


def test_other_network_namespace(net, stage, programs, tmp_path, make_lab):
    """The same program with the same addresses and port, in another network."""
    elsewhere = make_lab(routers=len(net.routers))
    serve(elsewhere)
    other_stage = Stage(elsewhere, programs, tmp_path / 'elsewhere')
    with elfprobe(net, '-a', 'speedtest', '-p', '0', cwd=tmp_path) as elf:
        there = other_stage.talk('./speedtest')
        here = stage.talk('./speedtest', port=there.port)
        for each in other_stage, stage:
            each.go()
        wait_for_rows(elf)
        other_stage.finish(there)
        stage.finish(here)
    assert {row.pid for row in read_rows(elf)} == {str(here.process.pid)}


def with_pid(pid: int, start: Callable[[], Program]) -> Program:
    """Start a program again and again until it has this PID, which nobody has."""
    for _ in range(100):
        Path('/proc/sys/kernel/ns_last_pid').write_text(str(pid - 1))
        program = start()
        if program.process.pid == pid:
            return program
        end(program.process)
    raise CommandFailed(f'no program gets PID {pid}')


def test_reused_pid(net, stage, tmp_path):
    """Programs with the PIDs of former targets, by PID and by name, are no targets."""
    stage.go()
    by_pid = stage.talk('./other')
    with elfprobe(net, '-P', str(by_pid.process.pid), '-a', 'speedtest', '-p', '0', cwd=tmp_path) as elf:
        by_name = stage.talk('./speedtest')
        for program in by_pid, by_name:
            wait_for_rows(elf, sport=program.port, pid=str(program.process.pid))
        stage.finish(by_pid, by_name)
        for program in by_pid, by_name:
            program.process.wait(10)
            stage.finish(with_pid(program.process.pid, lambda: stage.talk('./other')))
    assert {row.sport for row in read_rows(elf)} == {by_pid.port, by_name.port}


def test_reused_pid_of_short_program(net, stage, tmp_path):
    """The driver comes to look at a program that has ended already: its PID is free all the same."""
    path = tmp_path / f'short-{os.getpid()}'  # nobody else's, since those of this name are killed
    path.symlink_to(PYTHON)
    via = *net.client.command(), *TOO_LATE_COMMAND
    with elfprobe(net, '-a', path.name, '-p', '0', cwd=tmp_path, via=via) as elf:
        short = net.client.popen(str(path), '-c', 'import time; time.sleep(60)')
        wait_until(lambda: short.poll() and f'(pid {short.pid})' in elf.log, 10, 'it was a target')
        stage.go()
        stage.finish(with_pid(short.pid, lambda: stage.talk('./other')))
    assert read_rows(elf) == []


# The child connects once the file is there; the parent ends when told to.
ORPHAN = """
import os, socket, sys, time
if os.fork():
    sys.stdin.read()
    os._exit(0)
os.setsid()  # the PID would be taken as long as it is that of our session
while not os.path.exists('connect'):
    time.sleep(0.005)
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
    udp.connect((sys.argv[1], 7))
    time.sleep(60)
"""
CONNECTED = """
import socket, sys, time
with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as udp:
    udp.connect((sys.argv[1], 7))
    print('connected', flush=True)
    time.sleep(60)
"""


def test_connection_tables_follow_processes_not_pids(net, tmp_path):
    """A child whose parent has ended, and not who has the parent's PID by then."""
    popen, server, other = net.client.popen, net.server_address(4), net.server_address(6)
    parent = popen(sys.executable, '-c', ORPHAN, server, stdin=subprocess.PIPE, cwd=tmp_path)
    children = Path(f'/proc/{parent.pid}/task/{parent.pid}/children')
    wait_until(children.read_text, 10, 'the child is there')
    via = *net.client.command(), *OLD_COMMAND
    with elfprobe(net, '-P', str(parent.pid), cwd=tmp_path, via=via) as elf:
        parent.communicate('')
        latecomer = with_pid(
            parent.pid,
            lambda: Program(tmp_path, 0, popen(sys.executable, '-c', CONNECTED, other, stdout=subprocess.PIPE)),
        )
        assert latecomer.process.stdout.readline()
        (tmp_path / 'connect').touch()
        wait_until(lambda: f'tracing destination {server}' in elf.log, 10, 'the child is followed')
        assert elf.stop() == 3
    assert f'tracing destination {other}' not in elf.log


# Columns


def test_addresses_only(net, stage, tmp_path):
    """Nobody asks for processes, so none is named."""
    with elfprobe(net, '-p', '0', net.server_address(4), cwd=tmp_path) as elf:
        stage.go()
        program = stage.talk('./speedtest')
        wait_for_rows(elf, sport=program.port)
        stage.finish(program)
    assert {row[3:5] for row in read_rows(elf)} == {('', '')}
    header = (tmp_path / 'elf.csv').read_text().splitlines()[0].split(',')
    assert header[13:17] == ['outipid', 'inipid', 'app', 'pid']


def test_addresses_and_names(net, stage, tmp_path):
    """Whoever sends to the address has rows; targets are named, however late that is seen."""
    with elfprobe(net, '-a', 'speedtest', '-p', '0', net.server_address(4), cwd=tmp_path) as elf:
        elf.process.send_signal(signal.SIGSTOP)
        named, executable, child, nobody = map(
            stage.talk, ('./speedtest', './link', 'sh scripts/speedtest.sh ./other', './other')
        )
        elf.process.send_signal(signal.SIGCONT)
        stage.go()
        for program, app in (named, 'speedtest'), (executable, 'link'), (child, 'other'), (nobody, ''):
            wait_for_rows(elf, sport=program.port, app=app, pid=str(program.pids[0]) if app else '')
        stage.finish(named, executable, child, nobody)
    owners = {(row.sport, row.app) for row in read_rows(elf)}
    assert owners <= {
        (named.port, 'speedtest'),
        (executable.port, ''),
        (executable.port, 'link'),
        (child.port, ''),
        (child.port, 'other'),
        (nobody.port, ''),
    }


# Where it runs


def cgroup_mount() -> str:
    """Where cgroup version 2 is mounted."""
    return next(found.mountpoint for found in psutil.disk_partitions(all=True) if found.fstype == 'cgroup2')


@pytest.fixture
def own_cgroup() -> Iterator[Path]:
    """A new cgroup, which must be empty at the end."""
    path = Path(cgroup_mount(), f'elf-{os.getpid()}')
    path.mkdir()
    yield path
    path.rmdir()


def is_polling(elf: Run, missing: str = '') -> bool:
    """Whether it says, once, that it only looks at connections, and what is missing."""
    lines = [line for line in elf.log.splitlines() if 'instead' in line]
    assert len(lines) <= 1
    assert all(missing in line for line in lines)
    return bool(lines)


@pytest.mark.parametrize(
    'enter, unshare, polling',
    [
        ('nsenter', '', False),  # with /sys as it is outside, which ip replaces
        ('nsenter', '--cgroup', False),
        ('ip', '--mount', False),
        ('ip', '--mount --cgroup', True),  # where sockets of other cgroups cannot be had
    ],
)
def test_namespaces(net, stage, tmp_path, own_cgroup, enter, unshare, polling):
    """From a cgroup to which nobody else belongs, with or without namespaces, in which nothing is mounted."""
    script = 'echo $$ > $0/cgroup.procs; exec "$@"'
    if unshare:
        unmount = 'umount --all --lazy --types cgroup2; ' if '--mount' in unshare else ''
        script = f'echo $$ > $0/cgroup.procs; exec unshare {unshare} sh -c \'{unmount}exec "$@"\' sh "$@"'
    namespace = net.client.command() if enter == 'ip' else ('nsenter', f'--net={NETNS / net.client.name}')
    via = 'sh', '-c', script, str(own_cgroup), *namespace
    with elfprobe(net, '-a', 'speedtest', '-p', '0', cwd=tmp_path, via=via) as elf:
        stage.go()
        program = stage.talk('./speedtest')
        wait_for_rows(elf, sport=program.port)
        stage.finish(program)
    assert is_polling(elf, 'cgroup') == polling
    if not polling:
        assert [row[3:5] for row in read_rows(elf)] == [('speedtest', str(program.pids[0]))] * program.sent


@pytest.mark.parametrize(
    'name, error, missing',
    [
        ('ProcessFollower._attach_to_cgroup', 'Unsupported', 'a test broke it'),
        ('open_cgroup_root', 'OSError', 'cgroup version 2'),
        ('Kernel.__init__', 'Failure', "lockdown is 'confidentiality', which lets programs read no memory"),
    ],
)
def test_fallback(net, stage, tmp_path, name, error, missing):
    """Without the kernel's help, connections are looked for."""
    (tmp_path / 'lockdown').write_text('none integrity [confidentiality]\n')
    change = f'from elf import machine\nmachine.LOCKDOWN = {str(tmp_path / "lockdown")!r}'
    via = *net.client.command(), *with_fault(name, error, change)
    older = stage.talk('./speedtest', 'talk(tcp())')
    with elfprobe(net, '-a', 'speedtest', '-p', '0', cwd=tmp_path, via=via) as elf:
        stage.go()
        younger = stage.talk('./speedtest', 'talk(tcp())', version=6)
        for program in older, younger:
            wait_for_rows(elf, sport=program.port, app='', pid='')
        stage.finish(older, younger)
    assert is_polling(elf, missing)


# As where there are no ring buffers, and a destination is soon no longer a target.
FORGETFUL_COMMAND = with_change(f'from elf import poller\npoller.LINGER = 0.5\n{platform(has_ring_buffer=False)}')


def test_destination_that_is_a_target_again(net, stage, tmp_path):
    """Where connections are looked for: no sequence number comes twice (INTERFACE: unique per dest)."""
    via = *net.client.command(), *FORGETFUL_COMMAND
    with elfprobe(net, '-a', 'speedtest', '-p', '0', cwd=tmp_path, via=via) as elf:
        for _ in range(2):
            program = stage.talk('./speedtest')
            stage.go()
            wait_for_rows(elf, sport=program.port)
            stage.finish(program)
            wait_until(lambda: 'no longer tracing' in elf.log.splitlines()[-1], 20, 'it is forgotten')
            stage.begin_again()
        assert elf.stop() == 0
    numbers = [(row.dest, row.seq) for row in elf.rows()]
    assert len(numbers) == len(set(numbers)) > 1


# As where what processes tell has little room.
SMALL_RING_COMMAND = with_change(with_text('process_events, 64', 'process_events, 1'))
# As where elfprobe takes so long for each that no further one may wait.
NO_QUEUE_COMMAND = with_change('elfprobe.EVENTS_MAX = 0')


@pytest.mark.parametrize('command', [SMALL_RING_COMMAND, NO_QUEUE_COMMAND], ids=['ring', 'queue'])
def test_events_without_room_are_made_up_for(net, stage, tmp_path, command):
    """elfprobe is stopped while a target starts among many others."""
    via = *net.client.command(), *command
    with elfprobe(net, '-a', 'speedtest', '-d', cwd=tmp_path, via=via) as elf:
        os.kill(elf.process.pid, signal.SIGSTOP)
        forks = 300 * os.sysconf('SC_PAGESIZE') // 4096
        run('bash', '-c', f'for ((i = 0; i < {forks}; i++)); do /bin/true; done')
        program = stage.talk('./link')  # whose name alone does not tell
        stage.go()
        os.kill(elf.process.pid, signal.SIGCONT)
        wait_for_rows(elf, sport=program.port)
        stage.finish(program)
        assert elf.stop() == 0
    assert (elf.counters['events_lost'] > 0) == (command == SMALL_RING_COMMAND)
    assert ('an event of a process could not wait: ' in elf.log) == (command == NO_QUEUE_COMMAND)


@pytest.mark.parametrize(
    'name, told',
    [
        ('_decide', 'the connection tables are read'),
        ('_take_events', 'an event of process_events could not be handled'),
    ],
)
def test_errors_in_the_background(net, stage, tmp_path, name, told):
    """They are logged once, and told in the summary. The flows of a process that starts later are found."""
    via = *net.client.command(), *with_fault(f'ProcessFollower.{name}', 'RuntimeError')
    with elfprobe(net, '-a', 'speedtest', cwd=tmp_path, via=via) as elf:
        program = stage.talk('./link', 'talk(tcp())')  # whose name alone does not tell
        stage.go()
        wait_for_rows(elf, sport=program.port)
        stage.finish(program)
        assert elf.stop() == 0
    assert elf.log.count('a test broke it') == 1
    assert elf.log.count(told) == 2
    assert 'Traceback' not in elf.log


FULL_COMMAND = with_change(with_text('struct process, 16384', 'struct process, 3'))


def test_more_processes_than_have_room(net, stage, tmp_path):
    """Some run already, one starts later. No process of other tests has their name and takes the room."""
    older = [stage.talk('./link') for _ in range(3)]
    via = *net.client.command(), *FULL_COMMAND
    with elfprobe(net, '-a', 'link', cwd=tmp_path, via=via) as elf:
        younger = stage.talk('./link')
        stage.go()
        wait_for_rows(elf, app='link')
        stage.finish(*older, younger)
        assert elf.stop() == 0
    assert elf.log.count('no room for a target process') == 2  # one line as it happens, one in the summary
    assert 'Traceback' not in elf.log


@pytest.mark.parametrize('by_process', [True, False])
def test_own_lookups_are_not_probed(net, tmp_path, by_process):
    """elfprobe is a python3, a child of the shell, and asks a name server that is a target."""
    server = net.server_address(4)
    (tmp_path / 'resolv.conf').write_text(f'nameserver {server}\noptions attempts:1\n')
    mount = f'mount --bind {tmp_path}/resolv.conf /etc/resolv.conf && exec "$@"'
    via = *net.client.command(), 'unshare', '-m', 'sh', '-c', mount, 'sh'
    targets = ('-a', 'python3', '-P', str(os.getpid()), server) if by_process else (server,)
    with net.client.capture(filter='udp port 53') as asked, elfprobe(
        net, '-p', '0', *targets, cwd=tmp_path, via=via
    ) as elf:
        sending = net.client.popen(sys.executable, '-c', SENDING, server)
        wait_until(lambda: len(elf.rows()) > 100, 20, 'rows')
        end(sending)
        assert elf.stop() == 0
    assert {row.dport for row in elf.rows()} == {7}
    assert bool(asked.packets()) == by_process
    assert ('no more names are looked up' in elf.log) != by_process


def test_socket_in_the_making(net, stage, tmp_path):
    """One that has no descriptor yet, as in the midst of socket(2), when its process is found."""
    program = stage.talk('./speedtest')
    stage.go()
    via = *net.client.command(), *LATE_SOCKETS_COMMAND
    with elfprobe(net, '-a', 'speedtest', cwd=tmp_path, via=via) as elf:
        wait_for_rows(elf, sport=program.port, app='speedtest')
        stage.finish(program)


def test_pid_namespace(net, stage, tmp_path):
    """PIDs are not the kernel's there: connections are looked for, of those processes that can be seen."""
    program = stage.command(
        './speedtest', '-c', 'from talk import *; talk(tcp())', PORT=next(PORTS), SERVERS=net.server_address(4)
    )
    stage.go()
    via = (
        *net.client.command(),
        'unshare',
        '--pid',
        '--fork',
        '--mount-proc',
        'sh',
        '-c',
        f'{shlex.join(program)} & exec "$@"',
        'sh',
    )
    with elfprobe(net, '-a', 'speedtest', '-p', '0', cwd=tmp_path, via=via) as elf:
        wait_for_rows(elf, protocol=TCP)
        (inside,) = psutil.Process(elf.process.pid).children()
        inside.terminate()
        assert elf.wait() == 0
    assert is_polling(elf, 'PID namespace')


# What is left


def ours() -> set[tuple[str, int]]:
    """Programs of all elfprobes for cgroups and tracepoints, and links to them."""

    def objects(*what: str) -> list[dict[str, Any]]:
        def listed() -> str | None:
            ended = run('bpftool', '-j', *what, check=False)
            return None if ended.returncode else ended.stdout  # it fails where one comes or goes meanwhile

        found: list[dict[str, Any]] = json.loads(wait_until(listed, 10, f'bpftool lists {what}'))
        return found

    programs = {
        found['id']
        for found in objects('prog')
        if found['type'] in ATTACHED and found.get('name', '').startswith('elf_')
    }
    for cgroup in objects('cgroup', 'tree', cgroup_mount()):
        programs |= {found['id'] for found in cgroup['programs'] if found['name'].startswith('elf_')}
    links = {found['id'] for found in objects('link') if found['prog_id'] in programs}
    return {('prog_id', number) for number in programs} | {('link_id', number) for number in links}


def held(pid: int) -> set[tuple[str, int]]:
    """The programs and links that a process has a descriptor of."""
    found: set[tuple[str, int]] = set()
    with suppress(OSError):
        for path in Path(f'/proc/{pid}/fdinfo').iterdir():
            with suppress(OSError):
                pairs = re.findall(r'^(prog_id|link_id):\s*(\d+)', path.read_text(), re.MULTILINE)
                found |= {(kind, int(number)) for kind, number in pairs}
    return found


@contextmanager
def nothing_left() -> Iterator[None]:
    """At exit there is nothing new of ours that stays without a process."""

    def left() -> set[tuple[str, int]]:
        return ours().difference(*map(held, psutil.pids()))

    before = left()
    yield
    wait_until(lambda: left() <= before, 10, 'nothing of ours is attached without a process')


BRANCHES = 150
BASE_PORT = 30000
BRANCH = 'exec 3<>/dev/udp/"$2"/$(({port} + i)); until read -t 1 -u 9; do echo >&3; done'
BRANCHING = """
exec 9<>"$1"
read -u 9
for ((i = 0; i < {branches}; i++)); do
    {branch}
done
read -u 9
"""


@pytest.mark.parametrize(
    'branch, command',
    [(f'(({BRANCH}) &)', ()), (f'({BRANCH}) &', NO_FORKS_COMMAND)],
    ids=['told, and its parent ends', 'missed'],
)
def test_each_fork_among_many(net, tmp_path, branch, command):
    """Linux 7.2 does not run a program at a tracepoint where another run of it was preempted on that CPU."""
    fifo = tmp_path / 'fifo'
    os.mkfifo(fifo)
    script = BRANCHING.format(branches=BRANCHES, branch=branch.format(port=BASE_PORT))
    tree = net.client.popen(
        'bash', '-c', script, 'bash', str(fifo), net.server_address(4), stderr=subprocess.DEVNULL
    )
    via = *net.client.command(), *command
    with elfprobe(net, '-P', str(tree.pid), '-p', '0', cwd=tmp_path, via=via) as elf:
        for _ in range(4):
            net.client.popen('sh', '-c', 'while :; do (:); done')
        fifo.write_text('go\n')
        with suppress(TimeoutError):  # the difference is shown below
            wait_until(lambda: len({row.dport for row in elf.rows()}) == BRANCHES, 60, 'rows of all')
        net.client.end_processes()
        ports = {row.dport for row in elf.rows()}
        assert elf.stop() == 0
    assert ports == set(range(BASE_PORT, BASE_PORT + BRANCHES)), elf.log


@pytest.mark.needs('bpftool')
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left(net, tmp_path, number):
    with nothing_left(), elfprobe(net, '-a', 'speedtest', cwd=tmp_path) as elf:
        during = held(elf.process.pid) & ours()
        kinds = Counter(kind for kind, _ in during)
        assert kinds['prog_id'] == kinds['link_id'] >= 4
        assert elf.stop(number) == (-number if number == signal.SIGKILL else 3)  # no probe was sent
        assert not held(elf.process.pid)
        wait_until(lambda: not during & ours(), 10, 'all is gone')


# Forks a child that stays each time it is told to.
FORKING = """
import os, signal, time
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
with open('/proc/self/comm', 'w') as file:
    file.write('forking')
while True:
    if signal.sigwait([signal.SIGUSR1]) and os.fork() == 0:
        time.sleep(60)
        break
"""
# As where a target process forks so often that there is a new child whenever all were looked at.
FORKS_EACH_TIME = """
import glob, signal, time
look = elfprobe.running_processes
def look_and_fork():
    found = [process for process in look() if process.name == 'forking']
    os.kill({parent}, signal.SIGUSR1)
    while len(open('/proc/{parent}/task/{parent}/children').read().split()) < len(found):
        time.sleep(0.001)
    return found
elfprobe.running_processes = look_and_fork
"""


def test_process_that_forks_all_the_time(net, tmp_path):
    """elfprobe starts nonetheless."""
    process = net.client.popen(sys.executable, '-c', FORKING)
    ready = Path('/proc', str(process.pid), 'comm')
    wait_until(lambda: ready.read_text() == 'forking\n', 10, 'it waits to be told')
    via = *net.client.command(), *with_change(FORKS_EACH_TIME.format(parent=process.pid))
    with elfprobe(net, '-a', 'forking', cwd=tmp_path, via=via) as elf:
        assert elf.stop() == 3  # it sends nothing
    assert elf.log.count('tracing forking (pid ') == 1
    assert re.search(r'tracing forking: [1-9]\d* processes so far', elf.log)  # parent and child


# As where a process is another program by the time its first one's entry is taken away.
SLOW_TO_FORGET = """
import time
def forget_slowly(self, process_id, pid):
    if self.entry(process_id, pid):
        time.sleep(0.5)
        self._processes.remove(pid)
elfprobe.ProcessTable.forget = forget_slowly
"""


def test_program_that_follows_one_that_is_forgotten(net, tmp_path):
    """An interpreter, whose script must be looked for."""
    (tmp_path / 'speedtest').write_text(SENDING)
    via = *net.client.command(), *with_change(SLOW_TO_FORGET)
    with elfprobe(net, '-a', 'speedtest', cwd=tmp_path, via=via) as elf:
        sending = net.client.popen(
            'sh', '-c', 'sleep 0.1; exec "$0" speedtest "$1"', sys.executable, net.server_address(4), cwd=tmp_path
        )
        wait_until(elf.rows, 20, 'it is probed')
        end(sending)
        assert elf.stop() == 0


# Notes in the log at which processes user space looks, because the kernel cannot decide alone.
LOOKING = """
look = elfprobe.look_at_process
def look_and_tell(pid):
    process = look(pid)
    print('looked at', pid, file=sys.stderr, flush=True)
    return process
elfprobe.look_at_process = look_and_tell
"""

# Its child, which was there before it had its name, runs a program whose name says nothing.
LATE_NAME = """
import os, socket, sys, time
ready, go = os.pipe()
if os.fork() == 0:
    os.read(ready, 1)
    os.execv(sys.argv[1], ['plain', '-c', *sys.argv[2:]])
with open('/proc/self/comm', 'w') as file:
    file.write('speedtest')
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM):
    os.write(go, b'x')
    time.sleep(60)
"""


@pytest.mark.skipif(not HAS_BTF, reason='without BTF, user space looks at each program')
def test_programs_that_only_the_kernel_looks_at(net, tmp_path):
    """Whose names say that they are none of -a. An interpreter may be one, and so may a target's child."""
    plain = shutil.copy(PYTHON, tmp_path / 'plain')
    via = *net.client.command(), *with_change(LOOKING)
    with elfprobe(net, '-a', 'speedtest', cwd=tmp_path, via=via) as elf:
        commands = ('tail', '-f', '/dev/null'), ('sh', '-c', 'sleep 61; :'), (PYTHON, '-c', 'input()')
        tail, *interpreters = started = [net.client.popen(*each, stdin=subprocess.PIPE) for each in commands]

        def is_looked_at(program):
            return f'looked at {program.pid}\n' in elf.log

        wait_until(lambda: all(map(is_looked_at, interpreters)), 10, 'the interpreters are looked at')
        assert not is_looked_at(tail)
        late = net.client.popen(sys.executable, '-c', LATE_NAME, str(plain), SENDING, net.server_address(4))
        wait_until(elf.rows, 20, 'the child is probed')
        end(late)
        for program in started:
            end(program)
        assert elf.stop() == 0
    assert {row.app for row in read_rows(elf)} == {'plain'}


def test_unusual_surroundings(net, tmp_path):
    """SIGCHLD is ignored, which is inherited, and something is mounted at a name that is no UTF-8."""
    mount = os.fsdecode(b'mkdir m\xff && mount -t tmpfs none m\xff && exec "$0" "$@"')
    ignore = 'signal.signal(signal.SIGCHLD, signal.SIG_IGN)'
    via = (
        *net.client.command(),
        'unshare',
        '-m',
        'sh',
        '-c',
        mount,
        sys.executable,
        '-c',
        (f'import os, signal, sys; {ignore}; os.execv(sys.argv[1], sys.argv[1:])'),
    )
    with elfprobe(net, '-a', 'speedtest', cwd=tmp_path, via=via) as elf:
        assert elf.stop() == 3
    assert 'connection tables' not in elf.log


@pytest.mark.needs('bpftool')
@pytest.mark.parametrize('name', ['ProcessFollower._adopt_running', 'TcxAttachment.attach'])
def test_nothing_is_left_by_errors(net, tmp_path, name):
    via = *net.client.command(), *with_fault(name, 'RuntimeError')
    with nothing_left(), pytest.raises(CommandFailed, match='a test broke it'), elfprobe(
        net, '-a', 'speedtest', cwd=tmp_path, via=via
    ):
        pass


def test_many_processes_of_a_name(net, tmp_path):
    """A line for the name, then counts. Only the name that a process has now is one."""
    shell = net.client.popen('sh', '-c', 'read line; for i in $(seq 100); do ./swarm 0.3 & done; exec ./swarm2 60',
                             stdin=subprocess.PIPE, cwd=tmp_path)  # fmt: skip
    for name in 'swarm', 'swarm2':
        shutil.copy(str(shutil.which('sleep')), tmp_path / name)
    with elfprobe(net, '-a', 'swarm', '-a', 'swarm2', cwd=tmp_path) as elf:
        shell.stdin.write('go\n')
        shell.stdin.flush()
        wait_until(lambda: f'tracing swarm2 (pid {shell.pid})' in elf.log, 20, 'the last one is followed')
    assert elf.log.count('tracing swarm (pid ') == 1
    [count] = re.findall(r'tracing swarm: (\d+) processes so far', elf.log)[-1:]
    assert 50 < int(count) <= 100  # on a slow machine some end before they are looked at
    assert elf.log.count('tracing swarm') <= 6
    assert 'tracing sh ' not in elf.log
