"""elfprobe at work in the lab: started and stopped, what it wrote read, captured packets taken apart.

with elfprobe(lab, '-r', 'g', address, cwd=tmp_path) as run:
    ...                                  # it is attached; make traffic
for row in run.rows():                   # it has ended
    print(row.outttl, row.responder, row.latency)
"""

from __future__ import annotations

import ast
import csv
import ctypes
import os
import re
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import IO, Any, Iterator, NamedTuple, Sequence, Tuple

from lab import NETNS, PATIENCE, Capture, CommandFailed, Host, Lab, end, kernel_counters, wait_until

ELFPROBE = Path(__file__).resolve().parent.parent / 'elfprobe.py'

# `fault` is raised by the function or method `name`, or it is a signal that comes there first. A Failure of
# Kernel.__init__ is one to load the programs that know the owners of sockets.
FAULT = """
import builtins, signal
from functools import reduce
*owners, last = name.split('.')
owner = reduce(getattr, owners, elfprobe)
real = getattr(owner, last)
def faulty(*args, **kw):
    if name == 'Kernel.__init__' and fault == 'Failure' and not args[2].by_owner:
        return real(*args, **kw)
    if not fault.startswith('SIG'):
        raise {**vars(builtins), **vars(elfprobe)}[fault]('a test broke it')
    os.kill(os.getpid(), signal.Signals[fault])
    return real(*args, **kw)
setattr(owner, last, faulty)
"""


def with_change(change: str) -> tuple[str, ...]:
    """The beginning of a command that changes the module `elfprobe` and then runs it; the interpreter, the
    path of elfprobe.py and its arguments are to follow. `detect` is the platform's detection.
    """
    code = (
        'import os, sys',
        'sys.path.insert(0, os.path.dirname(sys.argv[2]))',
        'import elfprobe',
        'detect = elfprobe.Platform.detect',
        change,
        'sys.exit(elfprobe.main(sys.argv[3:], detect))',
    )
    return sys.executable, '-c', '\n'.join(code)


def platform(**fields: Any) -> str:
    """A change for `with_change()`: the platform has these fields, and the others as they are here."""
    return f'import dataclasses\ndetect = lambda: dataclasses.replace(elfprobe.Platform.detect(), **{fields!r})'


def with_text(old: str, new: str) -> str:
    """A change for `with_change()`: elfprobe.c has another text in one place."""
    assert old in ELFPROBE.with_suffix('.c').read_text()
    return f"""
program_text = elfprobe.program_text
elfprobe.program_text = lambda hooks: program_text(hooks).replace({old!r}, {new!r})
"""


def with_fault(name: str, fault: str, change: str = '') -> tuple[str, ...]:
    """`with_change()` for a fault, and perhaps for a change before it."""
    return with_change(f'{change}\nname, fault = {name!r}, {fault!r}\n{FAULT}')


# elfprobe's options for each way to read answers.
INGRESS_HOOKS = {'auto': (), **{hook: ('--ingress-hook', hook) for hook in ('tc', 'xdp', 'generic')}}

# As before Linux 6.6, which has no tcx links.
NO_TCX = platform(has_tcx=False)
CLSACT_COMMAND = with_change(NO_TCX)


# As with BCC 0.12 on Linux 5.4: no ring buffers and no socket storage, no BPF links, no look-up in batches,
# no run-time statistics, and programs cannot count ticks.
OLD_COMMAND = with_change(
    platform(
        has_links=False, has_tcx=False, has_ring_buffer=False, has_batches=False, has_run_time_stats=False, tick=0
    )
)
# As with PREEMPT_RT.
PREEMPTIBLE_COMMAND = with_change(platform(is_preemptible=True))
# As where the kernel never runs the program at the tracepoint of forks, and counts that it has not.
NO_FORKS_COMMAND = with_change("""
import itertools
find, counter = elfprobe.find_task_pid_offset, itertools.count(1)
def find_and_go(kernel):
    find(kernel)
    os.close(kernel.tracepoint_fds['elf_fork'])
    kernel.tracepoint_fds['elf_fork'] = os.open(os.devnull, os.O_RDONLY)
elfprobe.find_task_pid_offset = find_and_go
elfprobe.Kernel.missed_events = lambda self: next(counter)
""")
# As where no process has its sockets yet when it is first looked at.
LATE_SOCKETS_COMMAND = with_change("""
find, seen = elfprobe.duplicated_sockets, set()
def find_later(pid):
    if pid in seen:
        yield from find(pid)
    seen.add(pid)
elfprobe.duplicated_sockets = find_later
""")

LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNET = 0x40000000  # linux/sched.h

ICMP, TCP, UDP, ICMPV6 = 1, 6, 17, 58
ECHO_TYPES = {ICMP: 8, ICMPV6: 128}
CHECKSUM_AT = {ICMP: 2, TCP: 16, UDP: 6, ICMPV6: 2}
TIME_EXCEEDED_TYPES = {ICMP: 11, ICMPV6: 3}

VERSIONS = 4, 6
HOPS = 1, 2, 3, 4  # of a lab of four routers
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
CLOSED = 'chain forward { type filter hook forward priority 0; policy drop; }'  # for nft_table()
# A connection to port 5001 that carries data until it is killed.
TRANSFER = """
import socket, sys, time
with socket.create_connection((sys.argv[1], 5001)) as connection:
    while True:
        connection.send(bytes(1000))
        time.sleep(0.005)
"""

# Filters for captures. A probe's TTL is below those that systems begin with, but for multicast.
PROBES = '((ip and ip[8] <= 32 and ip[16] < 224) or (ip6 and ip6[7] <= 32 and ip6[24] != 255))'
TIME_EXCEEDED = '(icmp[0] == 11 or icmp6[0] == 3)'

Flow = Tuple[str, int, int, int]  # dest, sport, dport, protocol


class Row(NamedTuple):
    """A row of the CSV: its first fifteen columns, which are always there, and those of headers behind them."""

    recvcpu: int
    seq: int
    origseq: int
    latency: int
    sendtime: int
    recvtime: int
    dest: str
    responder: str
    outttl: int
    recvttl: int
    sport: int
    dport: int
    protocol: int
    outipid: int
    inipid: int
    source: str
    qttl: int | None
    qlen: int | None
    rsize: int | None
    rtos: int | None
    ripid: int | None

    @property
    def is_answered(self) -> bool:
        return self.recvtime != -1

    @property
    def flow(self) -> Flow:
        return self.dest, self.sport, self.dport, self.protocol


class Summary(NamedTuple):
    """What the log says at the end of a run."""

    probes: int
    replies: int
    unanswered: int


class Run:
    """An elfprobe that is attached, or has ended. Files it writes are read in its working directory."""

    def __init__(self, process: subprocess.Popen[str], cwd: Path, stderr: IO[bytes]) -> None:
        self.process = process
        self.cwd = cwd
        self._stderr = stderr
        self._final: str | None = None
        self._files: dict[str, GrowingRows] = {}

    @property
    def log(self) -> str:
        """What it has said so far."""
        if self._final is not None:
            return self._final
        size = os.fstat(self._stderr.fileno()).st_size
        return os.pread(self._stderr.fileno(), size, 0).decode()  # seek() would move its end, too

    def finish(self) -> None:
        """Keep the log when the file goes."""
        self._final = self.log

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    @property
    def summary(self) -> Summary:
        """CommandFailed before its end."""
        found = re.findall(r'(\d+) probes, (\d+) replies, (\d+) unanswered', self.log)
        if not found:
            raise CommandFailed(f'no summary of elfprobe:\n{self.log}')
        return Summary(*map(int, found[-1]))

    @property
    def counters(self) -> dict[str, int]:
        """The BPF program's counters at the end of a run with -d."""
        found: dict[str, int] = ast.literal_eval(re.findall(r'counters: (\{.*\})', self.log)[-1])
        return found

    def rows(self, filebase: str = 'elf') -> list[Row]:
        """The rows written so far."""
        return self._files.setdefault(filebase, GrowingRows(self.cwd / f'{filebase}.csv')).read()

    def is_trusting(self) -> bool:
        """Whether flows have gone well under probes for so long that elfprobe takes a stall for an outage."""
        rows = self.rows()
        return bool(rows) and rows[-1].sendtime - rows[0].sendtime > 7 * 10**9

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, wait for the end, return the exit status. It may have ended before."""
        if self.is_running:
            self.process.send_signal(number)
        return self.wait()

    def wait(self, timeout: float = 20) -> int:
        """Wait for the end and return the exit status; CommandFailed after `timeout` seconds."""
        try:
            return self.process.wait(timeout * PATIENCE)
        except subprocess.TimeoutExpired:
            raise CommandFailed(f'elfprobe does not end:\n{self.log}') from None


@contextmanager
def elfprobe(
    lab: Lab, *arguments: str, cwd: Path, host: Host | None = None, via: Sequence[str] | None = None
) -> Iterator[Run]:
    """elfprobe, on the first device of the client or another host (or as -i says), from when it is attached.

    `via` is the command that enters the namespace (default: ip netns exec). At exit it is stopped, if
    it still runs; CommandFailed when it then exits other than 0 (3 if it has sent no probe), or when it has
    never been attached.
    """
    host = host or lab.client
    device = () if '-i' in takewhile('--'.__ne__, arguments) else ('-i', host.device)
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            [*(via or host.command()), sys.executable, str(ELFPROBE), *device, *arguments],
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )
        run = Run(process, cwd, stderr)
        try:
            wait_until(lambda: 'probing on' in run.log or not run.is_running, 30, 'elfprobe is attached')
            if 'probing on' not in run.log:
                raise CommandFailed(f'elfprobe: exit status {process.returncode}\n{run.log}')
            yield run
            if run.is_running and run.stop() != (0 if run.summary.probes else 3):
                raise CommandFailed(f'elfprobe: exit status {process.returncode}\n{run.log}')
            if 'add up' in run.log:
                raise CommandFailed(f'probes are not accounted for:\n{run.log}')
        finally:
            end(process)
            run.finish()


@contextmanager
def hosts_file(host: Host, text: str) -> Iterator[None]:
    """What /etc/hosts is for commands in a namespace (ip-netns(8))."""
    path = Path('/etc/netns', host.name, 'hosts')
    path.parent.mkdir(parents=True)
    path.write_text(text)
    try:
        yield
    finally:
        path.unlink()
        path.parent.rmdir()


def both(lab: Lab) -> list[str]:
    """The server's addresses."""
    return [lab.server_address(version) for version in VERSIONS]


def numbered(number: int) -> bytes:
    """A payload that tells its packet from others, of changing length."""
    return b'%05d' % number + bytes(number * 37 % 1400)


def time_exceeded_received(host: Host) -> list[int]:
    """How many, with valid checksums, the host's stack has seen: IPv4's, IPv6's."""
    counters = kernel_counters(host)
    return [counters[name] for name in ('IcmpInTimeExcds', 'Icmp6InTimeExcds')]


@contextmanager
def inside(host: Host) -> Iterator[None]:
    """Sockets that this thread makes meanwhile belong to the host's namespace."""

    def enter(namespace: IO[bytes]) -> None:
        if LIBC.setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f'setns: {os.strerror(ctypes.get_errno())}')

    with open('/proc/thread-self/ns/net', 'rb') as here, open(NETNS / host.name, 'rb') as there:
        enter(there)
        try:
            yield
        finally:
            enter(here)


@contextmanager
def tcp_connected(lab: Lab, version: int, port: int) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection from client to server: its end there, and the server's."""
    with inside(lab.server):
        listener = socket.create_server((lab.server_address(version), port), family=FAMILY[version])
    with inside(lab.client):
        sender = socket.socket(FAMILY[version])
    with listener, sender:
        sender.connect(listener.getsockname())
        with listener.accept()[0] as receiver:
            yield sender, receiver


class GrowingRows:
    """The rows of a CSV file, which may be growing. Each line is read once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._columns: list[tuple[int, bool]] = []
        self._rows: list[Row] = []
        self._inode = self._end = 0

    def read(self) -> list[Row]:
        """The whole lines so far. If another file has the name now, those of that one."""
        with open(self._path, 'rb') as file:
            if os.fstat(file.fileno()).st_ino != self._inode:
                self._inode, self._end, self._rows = os.fstat(file.fileno()).st_ino, 0, []
            file.seek(self._end)
            data = file.read()
        whole = data[: data.rfind(b'\n') + 1]
        lines = csv.reader(whole.decode().splitlines())
        if not self._end:
            header = next(lines)
            if tuple(header[:15]) != Row._fields[:15]:
                raise ValueError(f'{self._path}: header {header}')
            self._columns = [(header.index(name), name in ('dest', 'responder', 'source')) for name in Row._fields]
        self._end += len(whole)
        self._rows += [
            Row._make(line[at] if is_text else int(line[at]) if line[at] else None for at, is_text in self._columns)
            for line in lines
        ]
        return self._rows[:]


def read_rows(path: Path) -> list[Row]:
    """The whole lines of a CSV file."""
    return GrowingRows(path).read()


class Packet(NamedTuple):
    """An IPv4 or IPv6 packet, as captured or as quoted, perhaps cut short."""

    time: int  # ns of CLOCK_REALTIME; 0: quoted
    version: int
    source: str
    dest: str
    ttl: int
    tos: int  # DSCP and ECN
    ip_id: int  # IPv6: low 16 bits of the flow label, as in the rows
    label: int  # IPv6's flow label
    protocol: int
    length: int  # as the IP header tells it
    header: bytes  # of IP
    segment: bytes  # what follows it

    def _number(self, code: str, offset: int) -> int:
        number: int = struct.unpack_from(code, self.segment, offset)[0]
        return number

    @property
    def sport(self) -> int:
        """Source port, or the echo identifier."""
        return self._number('!H', 4 if self.protocol in ECHO_TYPES else 0)

    @property
    def dport(self) -> int:
        return 0 if self.protocol in ECHO_TYPES else self._number('!H', 2)

    @property
    def flow(self) -> Flow:
        return self.dest, self.sport, self.dport, self.protocol

    @property
    def sequence(self) -> int:
        """TCP sequence number, ICMP echo sequence, UDP checksum: what rows have as origseq."""
        return self._number('!I', 4) if self.protocol == TCP else self._number('!H', 6)

    @property
    def identity(self) -> tuple[Any, ...]:
        """What a router surely quotes of it, and some of the payload, where checksums are unfinished."""
        return self.flow + (self.ip_id, self.segment[:28])

    @property
    def l4_length(self) -> int:
        """Bytes of the header behind the IP header."""
        return (self.segment[12] >> 4) * 4 if self.protocol == TCP else 8

    @property
    def payload(self) -> bytes:
        return self.segment[self.l4_length :]

    @property
    def is_time_exceeded(self) -> bool:
        return TIME_EXCEEDED_TYPES.get(self.protocol) == self.segment[0]

    @property
    def quote(self) -> Packet:
        """The packet that this ICMP error is about."""
        return parse_packet(self.segment[8:])

    @property
    def has_valid_header_checksum(self) -> bool:
        """IPv6 has none, which is as valid."""
        return self.version == 6 or ones_sum(self.header) == 0xFFFF

    @property
    def pseudo_header(self) -> bytes:
        if self.protocol == ICMP:
            return b''
        addresses = self.header[12:20] if self.version == 4 else self.header[8:40]
        return addresses + struct.pack('!II', len(self.segment), self.protocol)

    @property
    def has_valid_checksum(self) -> bool:
        """Whether the checksum behind the IP header is finished and right."""
        return ones_sum(self.pseudo_header + self.segment) == 0xFFFF

    @property
    def has_unfinished_checksum(self) -> bool:
        """Whether it is what a device expects that is to finish it, which veth never does."""
        at = CHECKSUM_AT[self.protocol]
        return self.segment[at : at + 2] == struct.pack('!H', ones_sum(self.pseudo_header))


def parse_packet(data: bytes, at: int = 0) -> Packet:
    """An IP packet without its link layer, captured at a time."""
    if data[0] >> 4 == 4:
        tos, length, ip_id, ttl, protocol = struct.unpack_from('!xBHH2xBB', data)
        label, offset, addresses, family = 0, (data[0] & 15) * 4, (data[12:16], data[16:20]), socket.AF_INET
    else:
        first, length, protocol, ttl = struct.unpack_from('!IHBB', data)
        tos, label, offset, family = first >> 20 & 0xFF, first & 0xFFFFF, 40, socket.AF_INET6
        ip_id, addresses = label & 0xFFFF, (data[8:24], data[24:40])
        length += offset  # with the header, as IPv4 counts
    source, dest = (socket.inet_ntop(family, address) for address in addresses)
    return Packet(
        at, data[0] >> 4, source, dest, ttl, tos, ip_id, label, protocol, length, data[:offset], data[offset:length]
    )


class Block(NamedTuple):
    """A packet in a file of -w."""

    packet: Packet
    comment: str
    is_inbound: bool


def blocks_in(path: Path) -> Iterator[Block]:
    """The packets in a file of -w."""
    data = path.read_bytes()
    while data:
        kind, size = struct.unpack_from('=II', data)
        assert struct.unpack_from('=I', data, size - 4) == (size,)
        if kind == 6:
            high, low, length = struct.unpack_from('=12x3I', data)
            at, options = 28 + (length + 3) // 4 * 4, {}
            code, count = struct.unpack_from('=HH', data, at)
            while code:
                options[code] = data[at + 4 : at + 4 + count]
                at += 4 + (count + 3) // 4 * 4
                code, count = struct.unpack_from('=HH', data, at)
            packet = parse_packet(data[28 : 28 + length], high << 32 | low)
            yield Block(packet, options[1].decode(), options[2] == struct.pack('=I', 1))
        data = data[size:]


def ip_packets(capture: Capture) -> list[Packet]:
    """The IP packets among a capture's frames, in order."""
    return [
        parse_packet(frame[14:], at)
        for at, frame in capture.packets()
        if frame[12:14] in (b'\x08\x00', b'\x86\xdd')
    ]


def ones_sum(data: bytes) -> int:
    """One's complement sum in 16 bits; 0xFFFF over data that includes its valid checksum."""
    total: int = sum(struct.unpack(f'!{(len(data) + 1) // 2}H', data + b'\0' * (len(data) % 2)))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def realtime_offset() -> int:
    """What to add to CLOCK_MONOTONIC, as in the rows, for CLOCK_REALTIME, as in captures, in ns."""
    before = time.monotonic_ns()
    realtime = time.time_ns()
    return realtime - (before + time.monotonic_ns()) // 2


def check_delays(delays: Sequence[int], usual: int, early: int = 0) -> None:
    """Of two readings around each of many events, ns: the second is nowhere before the first, by more than
    clocks may differ, and most follow at once. Some do not: where others use the machine, too, each of its
    processors stands still now and then."""
    assert all(delay > -early for delay in delays)
    assert not delays or statistics.median(delays) < usual
