"""How true the rows are: each against what tcpdump sees on the same device."""

from __future__ import annotations

import statistics
import tempfile
import time
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, Iterator

from figures import Figure, at_most
from lab import Lab
from runs import PROBES, TIME_EXCEEDED, Packet, Row, elfprobe, ip_packets, realtime_offset

MS = 10**6  # ns
CLOCKS_AGREE = 10 * MS  # between two readings around the same event


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
    wrong: Counter[str] = Counter()
    errors = []
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
