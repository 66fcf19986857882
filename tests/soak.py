"""elfprobe for a long time, while everything goes wrong; tests/soak calls this.

              +--- link 250 ---+
    client - r1 ----- r2 ----- r3 ----- r4 - server

One process makes all traffic, in steps of 50 ms, and is the target process of elfprobe:

- STEADY flows to addresses that elfprobe is given: TCP up and down, UDP, ping. They must be probed to the end.
- Connections that come and go, to 4096 addresses: some all the time, and many at once now and then.
- Datagrams to addresses that never answer, each from a socket of its own.
- Connections behind firewalls at r1, which block a flow for a while when they see a low TTL. elfprobe excludes
  such a destination, so there are new ones in each sixth of the time.

Disturbances (outages, routes, storms of processes, SIGSTOP) are generators that yield how long they wait. They go
on independently of each other, so that each meets every other one.

What elfprobe takes is compared with what it took after a sixth of the time, 10 minutes at most.
"""

from __future__ import annotations

import argparse
import ctypes
import heapq
import ipaddress
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Callable, Generator, Iterator, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from elf.counters import LOST_PROBES, in_words
from elf.rows import NAMES
from elf.summary import FLOWS_MAX
from elfprobe import bpf_call, map_info
from lab import CommandFailed, Lab, address, attach, batch, interrupt_on_signals, nft_table
from runs import CLOSED, FAMILY, ICMP, ICMPV6, TCP, UDP, VERSIONS, Run, elfprobe, inside
from talk import DOWNLOAD, UPLOAD, Application, Server, blocking

FILEBASE = 'elf-soak'
STEP = 0.05  # s
SAMPLES = 36  # lines of the table
BASE_MAX = 600  # s after which elfprobe has all that it needs
ECHO, SILENT = 7, 9  # ports
DETOUR = 250  # the link from r1 to r3
WAYS = {'straight': (1, 2, 3, 4), 'around': (1, 3, 4)}  # the router at each hop
OUTAGES = 1, 2.5, 5, 30  # s
SUSPENSIONS = 1, 5, 12  # s
BLOCKS = {1: '500ms', 2: '3s', 3: '60s'}  # how long a firewall blocks, by the network behind it
FOUND_OUT = ('60s',)  # these cost connections, and must be found out
ROTATE = 4  # MiB
SILENT_RATE_MAX = 100  # new destinations per second
MEMORY_PER_FLOW = 2048  # bytes of elfprobe, for each flow that it remembers
MEMORY_PER_ROW = 17  # bytes: latency and difference, which each hop keeps one by one at first (elf/histogram.py)
PAGE = os.sysconf('SC_PAGE_SIZE')
TICK = os.sysconf('SC_CLK_TCK')
# What counts as more than before: bytes; entries of a map, some of which is in flight; shares of a processor.
MEMORY_MORE, ENTRIES_MORE, CPU_MORE, CPU_TIMES = 4 << 20, 64, 0.01, 1.5
PROBED_WITHIN, FOUND_WITHIN = 30, 120  # s
TABLE = (  # titles and widths
    ('s', 6), ('rows', 9), ('unanswered', 10), ('wrong', 5), ('CPU', 5), ('MB', 6), ('files', 5), ('entries', 7),
    ('cached', 7), ('flows', 7), ('outages', 7), ('routes', 6), ('storms', 6), ('suspended', 9), ('excluded', 8),
)  # fmt: skip
MAP_HASH, MAP_LRU_HASH = 1, 9  # linux/bpf.h


def there(version: int, net: int, number: int) -> str:
    """An address behind the routers. Net 0 to 3 and 16 to 31 are the server's, those from 256 on are nobody's."""
    if version == 4:
        return f'10.{8 + net // 256}.{net % 256}.{number}'
    return str(ipaddress.ip_address(f'fd00:{8 + net // 256}:{net % 256:x}::{number:x}'))


def network(version: int, net: int) -> str:
    return f'10.8.{net}.0/24' if version == 4 else f'fd00:8:{net:x}::/48'


BEHIND = {4: '10.8.0.0/15', 6: 'fd00:8::/31'}  # all that there() can return
LOCAL = {4: '10.8.0.0/16', 6: 'fd00:8::/32'}  # the server's part of it
PREFIXES = '10.8.', '10.9.', 'fd00:8:', 'fd00:9:'


class Sample(NamedTuple):
    """What elfprobe takes, and what it has written by then."""

    at: float  # s since the start
    memory: int  # bytes
    descriptors: int
    entries: dict[str, int]  # of its hash maps that keep what they are told
    cached: int  # entries of those that forget what is old
    seconds: float  # of CPU time
    rows: int
    unanswered: int
    flows: int  # that the traffic has made so far


def entries_of(map_id: int) -> tuple[str, int, int]:
    """Return the name, type and number of entries of a map; none unless it is a hash."""
    fd = bpf_call('bpf_map_get_fd_by_id', map_id)
    try:
        info, count = map_info(fd), 0
        if info.type in (MAP_HASH, MAP_LRU_HASH):
            key, after = ctypes.create_string_buffer(info.key_size), None
            # An entry that goes meanwhile makes the kernel begin again.
            while count <= info.max_entries:
                try:
                    bpf_call('bpf_get_next_key', fd, after, key)
                except OSError:
                    break
                after, count = key.raw, count + 1
        return info.name.decode(), info.type, count
    finally:
        os.close(fd)


def cpu_seconds(pid: int) -> float:
    fields = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def take_sample(pid: int, at: float, rows: Rows, flows: int) -> Sample:
    maps = set()
    for info in Path(f'/proc/{pid}/fdinfo').iterdir():
        with suppress(OSError):
            maps |= set(re.findall(r'^map_id:\s*(\d+)', info.read_text(), re.MULTILINE))
    counted = [entries_of(int(map_id)) for map_id in maps]
    return Sample(
        at,
        int(Path(f'/proc/{pid}/statm').read_text().split()[1]) * PAGE,
        len(os.listdir(f'/proc/{pid}/fd')),
        {name: count for name, kind, count in sorted(counted) if kind == MAP_HASH},
        sum(count for _, kind, count in counted if kind == MAP_LRU_HASH),
        cpu_seconds(pid),
        rows.count,
        rows.unanswered,
        flows,
    )


class Change(NamedTuple):
    """Routes that change: between these times (CLOCK_MONOTONIC, ns) both ways are possible."""

    begin: int
    end: int
    way: str


class Rows:
    """Reads the CSVs of a run while they grow. It checks each row, and removes files that are full."""

    def __init__(self, folder: Path, routers: dict[str, int], steady: dict[str, int]) -> None:
        """`routers` have these addresses. `steady` are destinations, with the protocols of their flows."""
        self._folder, self._routers, self._steady = folder, routers, steady
        self.number, self._offset = 1, 0  # of the newest file
        self.pids = {'', str(os.getpid())}  # that have flows
        self.changes = [Change(0, 0, 'straight')]
        self.begun = time.monotonic_ns()
        self.count = self.unanswered = self.wrong = 0
        self.examples: list[str] = []  # of wrong rows
        self.by_dest = dict.fromkeys(steady, 0)
        self.answered = {dest: {} for dest in steady}  # type: dict[str, dict[int, int]]  # by TTL: the newest
        self._seen = {dest: bytearray() for dest in steady}  # a bit for each sequence number

    def _path(self, number: int) -> Path:
        return self._folder / (f'{FILEBASE}.{number}.csv' if number > 1 else f'{FILEBASE}.csv')

    def read(self) -> None:
        """Check what is new."""
        is_full = True
        while is_full:
            path, is_full = self._path(self.number), self._path(self.number + 1).exists()
            with open(path, 'rb') as file:
                file.seek(self._offset)
                data = file.read()
            lines = data[: data.rfind(b'\n') + 1]
            for line in lines.decode().splitlines():
                self._take(line)
            self._offset += len(lines)
            if is_full:
                if lines != data:
                    self._note('a file ends within a row', data.decode())
                path.unlink()
                self.number, self._offset = self.number + 1, 0

    def _note(self, why: str, line: str) -> None:
        self.wrong += 1
        if len(self.examples) < 5:
            self.examples.append(f'{why}: {line}')

    def _take(self, line: str) -> None:
        if line.startswith('recvcpu'):
            return
        self.count += 1
        try:
            why = self._wrong(line.split(','))
        except (ValueError, IndexError) as error:
            why = str(error)
        if why:
            self._note(why, line)

    def _wrong(self, fields: list[str]) -> str:
        """Return why a row cannot be true; empty: it can."""
        if len(fields) != len(NAMES):
            return 'number of fields'
        _, seq, _, latency, sent, received = map(int, fields[:6])
        dest, responder = fields[6:8]
        ttl, recvttl, sport, dport, protocol, sent_id, quoted_id = map(int, fields[8:15])
        is_answered = received != -1
        self.unanswered += not is_answered
        if not self.begun < sent < time.monotonic_ns() or not 1 <= ttl <= 32:
            return 'time or TTL'
        if fields[16] not in self.pids:
            return 'process'
        if dest in self._steady:
            self.by_dest[dest] += 1
            if protocol != self._steady[dest]:
                return 'protocol'
            seen, byte, bit = self._seen[dest], seq // 8, 1 << seq % 8
            if byte > len(seen) + (1 << 20):
                return 'sequence number'
            seen.extend(bytes(max(byte + 1 - len(seen), 0)))
            if seen[byte] & bit:
                return 'sequence number, the second time'
            seen[byte] |= bit
        elif not dest.startswith(PREFIXES) or protocol not in (TCP, UDP):
            return 'destination'
        if not is_answered:
            return '' if (latency, responder, recvttl, quoted_id) == (-1, '', -1, -1) else 'half an answer'
        if not latency == received - sent > 0 or received > time.monotonic_ns():
            return 'latency'
        if sent_id != quoted_id:
            return 'identification'
        if not 60 <= recvttl <= 64:
            return 'TTL of the answer'
        if self._routers.get(responder, 0) not in self._possible(ttl, sent, received):
            return 'responder'
        if dest in self._steady:
            self.answered[dest][ttl] = max(sent, self.answered[dest].get(ttl, 0))
        return ''

    def _possible(self, ttl: int, sent: int, received: int) -> Iterator[int]:
        """Yield the routers where a packet with this TTL may have ended in this time."""
        until = received
        for change in reversed(self.changes):
            if change.begin <= received and until >= sent:
                yield from WAYS[change.way][ttl - 1 : ttl]
            until = change.end
            if change.end < sent and change.begin < sent:
                return


class Short:
    """Connections that come and go."""

    def __init__(self, lab: Lab, chance: random.Random) -> None:
        self._lab, self._chance = lab, chance
        self._open: dict[socket.socket, int] = {}  # -> how many more requests

    def begin(self, count: int) -> None:
        for _ in range(count):
            version = self._chance.choice(VERSIONS)
            with inside(self._lab.client):
                connection = socket.socket(FAMILY[version])
            connection.setblocking(False)
            dest = there(version, 16 + self._chance.randrange(16), self._chance.randrange(1, 255))
            connection.connect_ex((dest, UPLOAD))
            self._open[connection] = self._chance.randrange(1, 40)

    def step(self) -> None:
        for connection, left in list(self._open.items()):
            with suppress(OSError):
                connection.send(bytes(300))
            with suppress(OSError):
                connection.recv(65536)
            self._open[connection] = left - 1
            if not left:
                del self._open[connection]
                connection.close()

    def close(self) -> None:
        for connection in self._open:
            connection.close()


class Echo:
    """Datagrams to a server's address, which come back."""

    def __init__(self, lab: Lab, version: int, stack: ExitStack) -> None:
        with inside(lab.server):
            self._server = stack.enter_context(socket.socket(FAMILY[version], socket.SOCK_DGRAM))
        with inside(lab.client):
            self._client = stack.enter_context(socket.socket(FAMILY[version], socket.SOCK_DGRAM))
        self._server.bind((lab.server_address(version), ECHO))
        self._client.connect((lab.server_address(version), ECHO))
        for end in self._server, self._client:
            end.setblocking(False)

    def step(self) -> None:
        with suppress(OSError):
            self._client.send(bytes(100))
        with suppress(OSError):
            while True:
                self._server.sendto(*self._server.recvfrom(2000))
        with suppress(OSError):
            while True:
                self._client.recv(2000)


Disturbance = Generator[float, None, None]  # how long it waits


class Soak:
    """A run of `length` seconds."""

    def __init__(self, lab: Lab, length: float, folder: Path, stack: ExitStack) -> None:
        self._lab, self._length, self._folder, self._stack = lab, length, folder, stack
        self._base = min(length / 6, BASE_MAX)
        self._chance = random.Random(1)
        self.did = dict.fromkeys(('outages', 'routes', 'storms', 'suspended'), 0)
        self.samples: list[Sample] = []
        self.flows = 0
        self.behind: list[tuple[float, str, Application]] = []  # since when, how long it blocks, who is behind it
        self._steady: dict[str, int] = {}
        self._prepare()

    def _prepare(self) -> None:
        lab, stack = self._lab, self._stack
        r1, _, r3, _ = lab.routers
        batch(
            r1.name,
            [
                f'link add around index {DETOUR} type veth peer around index {DETOUR + 10} netns {r3.name}',
                *attach('around', DETOUR, 1),
            ],
        )
        batch(r3.name, attach('around', DETOUR, 2))
        for number, router in enumerate(lab.routers, 1):
            batch(router.name, (f'route add {BEHIND[v]} via {address(v, number + 1, 2)}' for v in VERSIONS))
        batch(lab.server.name, (f'route add local {LOCAL[v]} dev lo' for v in VERSIONS))
        rules = '\n'.join(
            line
            for net, block in BLOCKS.items()
            for version in VERSIONS
            for line in blocking(block)(f'net{net}v{version}', version, network(version, net), UPLOAD)
        )
        stack.enter_context(nft_table(r1, rules, 'firewall'))
        self._server = Server(lab, stack)
        self._applications: list[Application] = []
        self._echoes: list[Echo] = []
        for version in VERSIONS:
            for port in UPLOAD, DOWNLOAD:
                # One connection survives only short outages, the other all but the longest.
                patience = 3.5 if version == 4 else 20
                dest = there(version, 0, 10 + port % 10)
                self._applications.append(Application(lab, dest, port, patience))
                self._steady[dest] = TCP
            self._echoes.append(Echo(lab, version, stack))
            self._steady[lab.server_address(version)] = UDP
            self._steady[there(version, 0, 99)] = ICMP if version == 4 else ICMPV6
        self._short = Short(lab, self._chance)
        stack.callback(self._short.close)
        stack.callback(self._close)
        self._silent_rate = min(1.2 * FLOWS_MAX / self._base, SILENT_RATE_MAX)

    def _close(self) -> None:
        for application in self._applications:
            application.close()

    def _send_to_silent(self, count: int) -> None:
        with ExitStack() as stack, inside(self._lab.client):
            for _ in range(count):
                version = self._chance.choice(VERSIONS)
                dest = there(version, 256 + self._chance.randrange(64), self._chance.randrange(1, 255))
                datagram = stack.enter_context(socket.socket(FAMILY[version], socket.SOCK_DGRAM))
                with suppress(OSError):
                    datagram.sendto(bytes(50), (dest, SILENT))
                self.flows += 1

    def _step(self, number: int) -> None:
        self._server.step()
        movers: list[Application | Echo | Short] = [*self._applications, *self._echoes, self._short]
        for moved in movers:
            moved.step()
        rate = self._silent_rate * STEP
        self._send_to_silent(int((number + 1) * rate) - int(number * rate))
        if number % 5 == 0:
            self._begin_short(1)

    def _begin_short(self, count: int) -> None:
        self._short.begin(count)
        self.flows += count

    def _outages(self) -> Disturbance:
        count = max(4, round(self._length / 180))
        gap = (self._length * 0.9 - count * statistics.mean(OUTAGES)) / count
        for number in range(count):
            yield gap
            router = self._lab.routers[(number + number // 4) % 4]
            with nft_table(router, CLOSED):
                self.did['outages'] += 1
                yield OUTAGES[number % 4]

    def _routes(self) -> Disturbance:
        r1, _, r3, _ = self._lab.routers
        while True:
            for way, wait, there_link, back_link in (('around', 40, DETOUR, DETOUR), ('straight', 20, 2, 3)):
                yield wait
                begin = time.monotonic_ns()
                for version in VERSIONS:
                    far, near = (address(version, there_link, 2), address(version, back_link, 1))
                    client = address(version, 1, 0) + ('/24' if version == 4 else '/64')
                    server = address(version, 5, 0) + ('/24' if version == 4 else '/64')
                    batch(r1.name, [f'route replace {prefix} via {far}' for prefix in (server, BEHIND[version])])
                    batch(r3.name, [f'route replace {client} via {near}'])
                self.rows.changes.append(Change(begin, time.monotonic_ns(), way))
                self.did['routes'] += 1

    def _storms(self) -> Disturbance:
        """Many short processes, some of which are targets; many connections at once."""
        program = self._folder / 'soakexec'
        shutil.copy('/bin/true', program)
        script = 'i=0; while [ $i -lt 450 ]; do ./soakexec & i=$((i + 1)); done; wait'
        while True:
            yield min(60, self._length / 6)
            self.did['storms'] += 1
            self._begin_short(200)
            storm = self._lab.client.popen('sh', '-c', script, cwd=self._folder)
            while storm.poll() is None:
                yield 0.2

    def _suspensions(self, run: Run) -> Disturbance:
        for seconds in itertools.cycle(SUSPENSIONS):
            yield min(240, self._length / 5)
            run.process.send_signal(signal.SIGSTOP)
            try:
                self.did['suspended'] += 1
                yield seconds
            finally:
                run.process.send_signal(signal.SIGCONT)

    def _newcomers(self) -> Disturbance:
        """Connections behind firewalls."""
        for number in itertools.count(1):
            for net, block in BLOCKS.items():
                port = DOWNLOAD if number % 3 == 0 else UPLOAD
                application = Application(self._lab, there(VERSIONS[number % 2], net, number), port)
                self._applications.append(application)
                self.behind.append((time.monotonic(), block, application))
            yield self._length / 6

    def _reading(self) -> Disturbance:
        while True:
            yield 1
            self.rows.read()

    def _sampling(self, run: Run) -> Disturbance:
        print(*(f'{title:>{width}}' for title, width in TABLE), flush=True)
        while True:
            yield self._length / SAMPLES
            before = self.samples[-1] if self.samples else Sample(0, 0, 0, {}, 0, self._cpu_before, 0, 0, 0)
            now = take_sample(run.process.pid, time.monotonic() - self._begun, self.rows, self.flows)
            self.samples.append(now)
            rows = now.rows - before.rows
            figures = (
                f'{now.at:.0f}',
                f'{now.rows}',
                f'{100 * (now.unanswered - before.unanswered) / max(rows, 1):.1f}',
                f'{self.rows.wrong}',
                f'{100 * share(before, now):.1f}',
                f'{now.memory / 1e6:.1f}',
                f'{now.descriptors}',
                f'{sum(now.entries.values())}',
                f'{now.cached}',
                f'{now.flows}',
                *map(str, self.did.values()),
                f'{len(excluded(run.log))}',
            )
            print(*(f'{figure:>{width}}' for figure, (_, width) in zip(figures, TABLE)), flush=True)

    def run(self) -> list[str]:
        """Do it all. Return what went wrong."""
        lab = self._lab
        arguments = '-n', '-l', '-f', FILEBASE, '--rotate', str(ROTATE), '-P', str(os.getpid()), '-a', 'soakexec'
        until = str(self._length + 60)  # if this process is killed
        self._stack.callback(self._keep_files)
        with elfprobe(lab, *arguments, '--duration', until, *self._steady, cwd=self._folder) as run:
            self.rows = Rows(self._folder, self._addresses(), self._steady)
            for version in VERSIONS:
                ping = lab.client.popen('ping', '-nqi.2', there(version, 0, 99), stdout=subprocess.DEVNULL)
                self.rows.pids.add(str(ping.pid))
            self._begun, self._cpu_before = time.monotonic(), cpu_seconds(run.process.pid)
            self._move(run)
            if not run.is_running:
                raise CommandFailed(f'elfprobe has ended by itself:\n{run.log[-1000:]}')
            ended = time.monotonic_ns()
        self.rows.read()
        report = json.loads((self._folder / f'{FILEBASE}.json').read_text())
        return [*self._rows_wrong(run, report, ended), *self._exclusions_wrong(run.log), *self._grown()]

    def _keep_files(self) -> None:
        """Copy the log and the report to where the user is."""
        for suffix in '.log', '.json':
            with suppress(FileNotFoundError):
                shutil.copy(self._folder / (FILEBASE + suffix), '.')

    def _addresses(self) -> dict[str, int]:
        """Return the routers by their addresses."""
        sides = [(number + side, 2 - side, number) for number in WAYS['straight'] for side in (0, 1)]
        sides += [(DETOUR, 1, 1), (DETOUR, 2, 3)]
        return {address(version, link, side): router for version in VERSIONS for link, side, router in sides}

    def _move(self, run: Run) -> None:
        """Move everything on until the time is over."""
        going = (
            self._outages(),
            self._routes(),
            self._storms(),
            self._suspensions(run),
            self._newcomers(),
            self._reading(),
            self._sampling(run),
        )
        end = self._begun + self._length
        with ExitStack() as stack:
            due: list[tuple[float, int]] = []
            for number, disturbance in enumerate(going):
                stack.callback(disturbance.close)
                heapq.heappush(due, (self._begun, number))
            number = 0
            while time.monotonic() < end and run.is_running:
                self._step(number)
                number += 1
                while due and due[0][0] <= time.monotonic():
                    _, which = heapq.heappop(due)
                    wait = next(going[which], None)
                    if wait is not None:
                        heapq.heappush(due, (time.monotonic() + wait, which))
                time.sleep(max(0, self._begun + number * STEP - time.monotonic()))

    def _rows_wrong(self, run: Run, report: Any, ended: int) -> Iterator[str]:
        """Print the sums of rows, and yield what is wrong with them."""
        rows, count = self.rows, report['counters']
        losses = in_words(LOST_PROBES, count)
        print(f'{rows.count} rows in {rows.number} files, {rows.unanswered} unanswered; {losses or "nothing lost"}')
        if rows.wrong:
            yield f'{rows.wrong} wrong rows: {rows.examples}'
        if count['probes'] != rows.count + count['results_lost']:
            yield f'{count["probes"]} probes, but {rows.count} rows and {count["results_lost"]} lost results'
        if run.summary != (count['probes'], rows.count - rows.unanswered, rows.unanswered):
            yield f'the log says {run.summary}, the rows {rows.count}, {rows.unanswered} of them unanswered'
        if len(report['files']) != rows.number:
            yield f'{len(report["files"])} files in the report, but {rows.number} on the disk'
        probes = {destination['address']: destination['probes'] for destination in report['destinations']}
        for dest, written in rows.by_dest.items():
            if probes.get(dest) != written:
                yield f'{probes.get(dest)} probes to {dest} in the report, but {written} rows'
            hops = [ttl for ttl in (1, 2, 3) if rows.answered[dest].get(ttl, 0) > ended - PROBED_WITHIN * 10**9]
            if hops != [1, 2, 3]:
                yield f'{dest}: only hops {hops} answered in the last {PROBED_WITHIN} s'

    def _exclusions_wrong(self, log: str) -> Iterator[str]:
        """Print which firewalls were found, and yield what is wrong with that, and in the log."""
        told, since = excluded(log), self._begun + self._length - FOUND_WITHIN
        for block in BLOCKS.values():
            old = {its.server: its.lost for at, how, its in self.behind if how == block and at < since}
            found, lost = told & set(old), list(old.values())
            print(f'block of {block}: {len(found)} of {len(old)} firewalls found; connections lost: {lost}')
            if block in FOUND_OUT and len(found) < len(old):
                yield f'not excluded behind a firewall that blocks for {block}: {sorted(set(old) - told)}'
        told -= {its.server for _, _, its in self.behind}
        if told:
            yield f'excluded without a firewall: {sorted(told)}'
        for line in log.splitlines():
            if re.search('Traceback|add up|has ended|not done any more', line):
                yield f'the log has: {line}'

    def _grown(self) -> Iterator[str]:
        """Print what elfprobe takes, and yield what of it has grown."""
        last = self._sixth(6)
        base = [sample for sample in self.samples if sample.at < self._base + self._length / SAMPLES / 2]

        def compared(what: Callable[[Sample], float]) -> tuple[float, float]:
            return max(map(what, base)), statistics.median(map(what, last))

        remembered = min(last[-1].flows, FLOWS_MAX) - min(base[-1].flows, FLOWS_MAX)
        before, then = (figure / 1e6 for figure in compared(lambda sample: sample.memory))
        rows = last[-1].rows - base[-1].rows
        print(f'memory: {before:.1f} MB, then {then:.1f} MB, with {remembered} more flows and {rows} more rows')
        if then > before + (MEMORY_MORE + MEMORY_PER_FLOW * remembered + MEMORY_PER_ROW * rows) / 1e6:
            yield f'memory grows from {before:.1f} to {then:.1f} MB'
        before = max(sample.descriptors for sample in base)
        then = min(sample.descriptors for sample in last)  # there is one more while the report is written
        print(f'descriptors: {before:.0f}, then {then:.0f}')
        if then > before:
            yield f'descriptors grow from {before:.0f} to {then:.0f}'
        for name in last[-1].entries:
            before, then = compared(lambda sample, name=name: sample.entries[name])  # type: ignore[misc]
            print(f'entries of {name}: {before:.0f} at most, then {then:.0f}')
            if then > before + ENTRIES_MORE:
                yield f'entries of {name} grow from {before:.0f} to {then:.0f}'
        shares = [100 * share(sixth[0], sixth[-1]) for sixth in map(self._sixth, range(1, 7))]
        print('CPU time in each sixth:', ', '.join(f'{part:.1f} %' for part in shares))
        if shares[-1] > CPU_TIMES * shares[1] + 100 * CPU_MORE:
            yield f'CPU time grows from {shares[1]:.1f} to {shares[-1]:.1f} % of a processor'
        used = os.times()
        own, children = used.user + used.system, used.children_user + used.children_system
        print(f'CPU time of all: {100 * (own + children) / self._length:.0f} % of a processor')

    def _sixth(self, number: int) -> list[Sample]:
        """Return the samples of a sixth of the time, with the one before them."""
        begin, end = self._length * (number - 1) / 6, self._length * number / 6
        margin = self._length / SAMPLES / 2
        return [sample for sample in self.samples if begin - margin < sample.at < end + margin]


def share(before: Sample, after: Sample) -> float:
    """Return elfprobe's share of a processor between two samples."""
    return (after.seconds - before.seconds) / max(after.at - before.at, 1e-9)


def excluded(log: str) -> set[str]:
    """Return the destinations that elfprobe takes to be behind firewalls."""
    return set(re.findall(r'(\S+): flows stall', log))


def main() -> int:
    parser = argparse.ArgumentParser(prog='tests/soak')
    parser.add_argument('--minutes', type=float, default=60)
    length = parser.parse_args().minutes * 60
    if length < 120:
        parser.error('--minutes: 2 at least')
    os.nice(10)
    interrupt_on_signals()
    try:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix='elf-soak-')))
            lab = stack.enter_context(Lab(routers=4))
            wrong = Soak(lab, length, folder, stack).run()
    except CommandFailed as failure:
        wrong = [str(failure)]
    except KeyboardInterrupt:
        return 130
    for what in wrong:
        print(f'soak: {what}')
    return 1 if wrong else 0


if __name__ == '__main__':
    sys.exit(main())
