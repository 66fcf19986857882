"""What elfprobe costs flows through the lab, and how true its rows are there."""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Iterator

import pyroute2

from figures import Figure, at_least, at_most
from lab import Lab
from packets import load
from progtest import elfprobe as driver
from runs import PROBES, TIME_EXCEEDED, Packet, Row, elfprobe, inside, ip_packets, realtime_offset

MS = 10**6  # ns
CLOCKS_AGREE = 10 * MS  # between two readings around the same event


# Throughput


def throughput(quick: bool) -> Iterator[Figure]:
    """Of a program named speedtest, without elfprobe, with programs in its place that do nothing, with its
    address probed, and with -a, in turn. A ratio is the median of those of each round."""
    rounds, seconds = (2, 1) if quick else (9, 2)
    measured: dict[tuple[str, str], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix='elf-') as directory, Lab(routers=4) as lab, lab.iperf3_server():
        speedtest = Path(directory, 'speedtest')
        shutil.copy(shutil.which('iperf3') or 'iperf3', speedtest)
        modes = {'off': (), 'empty programs': (), 'by address': (lab.server_address(4),),
                 '-a': ('-a', 'speedtest')}
        for number in range(rounds):
            order = list(modes) if number % 2 else list(reversed(modes))
            for mode in order:
                with ExitStack() as stack:
                    if mode == 'empty programs':
                        stack.enter_context(empty_programs(lab))
                    elif modes[mode]:
                        stack.enter_context(elfprobe(lab, *modes[mode], cwd=Path(directory)))
                    tcp = transfer(lab, speedtest, seconds)
                    udp = transfer(lab, speedtest, seconds, '-u', '-b', '0', '-l', '64')
                measured['TCP', mode].append(tcp['sum_received']['bits_per_second'] / 1e9)
                measured['resent', mode].append(tcp['sum_sent']['retransmits'])
                measured['UDP', mode].append(udp['sum']['packets'] / udp['sum']['seconds'] / 1000)
    for kind, what, unit in ('TCP', 'TCP bulk', 'Gbit/s'), ('UDP', 'UDP, 64 bytes, sent', '1000/s'):
        without = measured[kind, 'off']
        yield Figure(f'{what}, without elfprobe', statistics.median(without), unit)
        for mode in 'empty programs', 'by address', '-a':
            ratio = statistics.median(on / off for on, off in zip(measured[kind, mode], without))
            yield Figure(f'{what}, {mode}, against without', ratio, 'times',
                         at_least(0.98) if kind == 'TCP' and mode != 'empty programs' else None)
    for mode in modes:
        resent = int(sum(measured['resent', mode]))
        yield Figure(f'TCP retransmissions in {rounds * seconds} s, {mode}', resent)


@contextmanager
def empty_programs(lab: Lab) -> Iterator[None]:
    """On the client's device, where elfprobe has its own."""
    with inside(lab.client), pyroute2.IPRoute() as ipr, load() as programs:
        device = driver.find_device(ipr, lab.client_device)
        egress, ingress = (programs.bpf.funcs[name].fd for name in (b'empty_egress', b'empty_ingress'))
        with driver.XdpAttachment(ipr, device, ingress, is_native=True), \
                driver.TcxAttachment(ipr, device, egress, driver.BPF_TCX_EGRESS):
            yield


def transfer(lab: Lab, speedtest: Path, seconds: int, *options: str) -> dict[str, Any]:
    """What iperf3 says at the end."""
    said = lab.client.run(str(speedtest), '-c', lab.server_address(4), '-t', str(seconds), '-J', *options)
    end: dict[str, Any] = json.loads(said.stdout)['end']
    return end


# Accuracy


def accuracy(quick: bool) -> Iterator[Figure]:
    """Of a probe about each millisecond, against what tcpdump sees on the same device. Answers are passed,
    since tcpdump does not see what XDP drops. What tcpdump adds itself, in its own reading of the clock
    behind ours, counts against us."""
    seconds = 10 if quick else 60
    with tempfile.TemporaryDirectory(prefix='elf-') as directory, Lab(routers=4) as lab, lab.iperf3_server():
        server, cwd = lab.server_address(4), Path(directory)
        before = realtime_offset()
        with lab.client.capture(filter=f'{PROBES} or {TIME_EXCEEDED}', snaplen=200) as seen, \
                elfprobe(lab, '-r', 'g', '-p', '1', '-I', 'pass', server, cwd=cwd) as run:
            lab.client.run('ping', '-c1', server)  # from then on the path's length is known
            start = time.monotonic()
            lab.client.run('iperf3', '-u', '-l', '200', '-b', '32M', '--pacing-timer', '100',
                           '-t', str(seconds), '-c', server, timeout=seconds + 30)
            took = time.monotonic() - start
            run.stop()
        offset = (before + realtime_offset()) // 2
        rows = run.rows()
        yield from compared(lab, rows, ip_packets(seen), offset, took)


def compared(lab: Lab, rows: list[Row], packets: list[Packet], offset: int, took: float) -> Iterator[Figure]:
    sent, answers = Timeline(), Timeline()
    for packet in packets:
        if packet.is_time_exceeded:
            answers.add((packet.quote.flow, packet.quote.ip_id, packet.source), packet)
        else:
            sent.add((packet.flow, packet.ip_id, packet.ttl), packet)
    answered = [row for row in rows if row.is_answered]
    wrong, errors = Counter(), []
    for row in rows:
        probes = sent.around((row.flow, row.outipid, row.outttl), row.sendtime + offset)
        if len(probes) != 1:
            wrong['probe'] += 1
            continue
        if not row.is_answered:
            continue
        replies = answers.around((row.flow, row.inipid, row.responder), row.recvtime + offset)
        if len(replies) != 1 or replies[0].quote.identity != probes[0].identity \
                or row.responder != lab.hop(4, row.outttl) or row.recvttl != replies[0].ttl:
            wrong['reply'] += 1
            continue
        errors.append(abs(row.latency - (replies[0].time - probes[0].time)) / 1000)
    errors.sort()
    time_exceeded = sum(packet.is_time_exceeded for packet in packets)
    yield Figure('probes per second', len(rows) / took)
    yield Figure('time exceeded seen', time_exceeded)
    yield Figure('time exceeded without a row', time_exceeded - len(answered), '', at_most(0))
    yield Figure('wrong rows', sum(wrong.values()), '', at_most(0))
    if errors:
        yield Figure('latency off by, median', statistics.median(errors), 'us', at_most(5))
        yield Figure('latency off by, 99 %', errors[len(errors) * 99 // 100], 'us', at_most(50))


class Timeline:
    """Packets by a key that comes again after a while, in the order of their times."""

    def __init__(self) -> None:
        self._packets: dict[Any, list[Packet]] = defaultdict(list)
        self._times: dict[Any, list[int]] = defaultdict(list)

    def add(self, key: Any, packet: Packet) -> None:
        self._packets[key].append(packet)
        self._times[key].append(packet.time)

    def around(self, key: Any, when: int) -> list[Packet]:
        """Those with the key about then."""
        times = self._times.get(key, [])
        first, end = bisect_left(times, when - CLOCKS_AGREE), bisect_right(times, when + CLOCKS_AGREE)
        return self._packets[key][first:end] if times else []
