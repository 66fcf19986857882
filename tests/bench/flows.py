"""What elfprobe costs flows through the lab, and how true its rows are there."""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Iterator

from compare import EMPTY_XDP, Comparison, Measured, scene
from figures import Figure, at_most
from lab import Lab
from runs import PROBES, TIME_EXCEEDED, Packet, Row, elfprobe, ip_packets, realtime_offset

MS = 10**6  # ns
CLOCKS_AGREE = 10 * MS  # between two readings around the same event


# Throughput

TOPOLOGIES = {'four routers': 4, 'direct veth': 0}  # their routers
DIRECTIONS: dict[str, tuple[str, ...]] = {'upload': (), 'download': ('-R',)}
STREAMS = {'1 stream': 1, '8 streams': 8}
DATAGRAMS = 'upload, UDP of 64 bytes, sent'


def throughput(quick: bool) -> Iterator[Figure]:
    """Of a program named speedtest that iperf3's server gets data from (upload) or sends to (download).

    Upload is what leaves by the device that elfprobe is attached to, download what arrives there. Empty
    programs with XDP show what attaching XDP costs what arrives.
    """
    rounds = 1 if quick else 5
    for where, routers in TOPOLOGIES.items():
        compared = Comparison()
        with scene(routers) as at, at.lab.iperf3_server():
            speedtest = at.program(shutil.which('iperf3') or 'iperf3')
            compared.run(at.modes(), rounds, partial(measure_transfers, at.lab, speedtest))
        for direction, streams in product(DIRECTIONS, STREAMS):
            what = f'{direction}, {streams}'
            yield from (
                figure._replace(name=f'{where}, {figure.name}')
                for figure in compared.figures(what, 'Gbit/s', partial(resent_note, compared, what))
            )
        if routers:
            yield from (
                figure._replace(name=f'{where}, {figure.name}', goal=None)
                for figure in compared.figures(DATAGRAMS, '1000/s')
            )


def resent_note(compared: Comparison, what: str, mode: str) -> str:
    return f'{compared.total(resent(what), mode):,} segments resent'


def resent(what: str) -> str:
    return f'resent: {what}'


def measure_transfers(lab: Lab, speedtest: Path, mode: str) -> Measured:
    """One second of each kind of transfer."""
    measured: Measured = {}
    for direction, streams in product(DIRECTIONS, STREAMS):
        if mode == EMPTY_XDP and direction == 'upload':
            continue
        what = f'{direction}, {streams}'
        end = transfer(lab, speedtest, '-P', str(STREAMS[streams]), *DIRECTIONS[direction])
        measured[what] = end['sum_received']['bits_per_second'] / 1e9
        measured[resent(what)] = end['sum_sent']['retransmits']
    if lab.routers and mode != EMPTY_XDP:
        end = transfer(lab, speedtest, '-u', '-b', '0', '-l', '64')
        measured[DATAGRAMS] = end['sum']['packets'] / end['sum']['seconds'] / 1000
    return measured


def transfer(lab: Lab, speedtest: Path, *options: str) -> dict[str, Any]:
    """Return what iperf3 says at the end of one second."""
    said = lab.client.run(str(speedtest), '-c', lab.server_address(4), '-t', '1', '-J', *options)
    end: dict[str, Any] = json.loads(said.stdout)['end']
    return end


# Accuracy


def accuracy(quick: bool) -> Iterator[Figure]:
    """Of a probe about each millisecond, against what tcpdump sees on the same device. Answers are passed,
    since tcpdump does not see what XDP drops. What tcpdump adds itself, in its own reading of the clock
    behind ours, counts against us."""
    seconds = 10 if quick else 40
    with tempfile.TemporaryDirectory(prefix='elf-') as directory, Lab(routers=4) as lab, lab.iperf3_server():
        server, cwd = lab.server_address(4), Path(directory)
        before = realtime_offset()
        with lab.client.capture(filter=f'{PROBES} or {TIME_EXCEEDED}', snaplen=200) as seen, elfprobe(
            lab, '-r', 'g', '-p', '1', '-I', 'pass', server, cwd=cwd
        ) as run:
            lab.client.run('ping', '-c1', server)  # from then on the path's length is known
            start = time.monotonic()
            lab.client.run(
                'iperf3',
                '-u',
                '-l',
                '200',
                '-b',
                '32M',
                '--pacing-timer',
                '100',
                '-t',
                str(seconds),
                '-c',
                server,
                timeout=seconds + 30,
            )
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
        if (
            len(replies) != 1
            or replies[0].quote.identity != probes[0].identity
            or row.responder != lab.hop(4, row.outttl)
            or row.recvttl != replies[0].ttl
        ):
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
