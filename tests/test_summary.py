"""What a run says of itself: the summary, the table on a terminal, TCP's state, the hooks' maps.

client - r1 - r2 - r3 - r4 - server        a probe with TTL k ends at lab.hop(version, k)
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import random
import re
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from elf import histogram, paths, summary
from elf.addresses import ReverseDns
from elf.clock import utc_ns
from elf.histogram import LatencyHistogram
from elf.rows import Record
from elf.summary import Summary
from lab import (
    COMMON_SYSCTLS,
    ROUTER_SYSCTLS,
    Host,
    Lab,
    address,
    attach,
    batch,
    nft_table,
    remove,
    run,
    wait_until,
)
from runs import CLOSED, ELFPROBE, FAMILY, HOPS, TCP, UDP, VERSIONS, Run, both, hosts_file, inside, tcp_connected
from runs import elfprobe as probing

root = pytest.mark.root

MS = 1_000_000  # ns
DEST = '198.51.100.9'
A, B, C = (f'192.0.2.{number}' for number in (1, 2, 3))


# Statistics


def histogram_of(values: list[int]) -> LatencyHistogram:
    latencies = LatencyHistogram()
    for value in values:
        latencies.add(value)
    return latencies


@pytest.mark.parametrize(
    'values, stats',
    [
        ([7000], (7000, 7000, 7000, 7000, 7000, 0)),
        ([3, 1, 2], (1, 2, 3, 3, 3, 1.5)),
        (list(range(1000, 101000, 1000)), (1000, 50000, 95000, 99000, 100000, 1000)),
        ([5000] * 1000, (5000, 5000, 5000, 5000, 5000, 0)),
    ],
)
def test_stats(values: list[int], stats: tuple[float, ...]) -> None:
    assert tuple(histogram_of(values).stats()) == stats


@pytest.mark.parametrize('low, high', [(10, 20_000_000_000), (50_000, 60_000), (1_000_000, 40_000_000)])
def test_stats_of_many(low: int, high: int) -> None:
    """Quantiles are exact to 1 %, the others exactly, whatever was asked in between."""
    chance = random.Random(low)
    values = [chance.randint(low, high) for _ in range(20011)]
    latencies = histogram_of(values[:777])
    assert latencies.stats().minimum == min(values[:777])
    for value in values[777:]:
        latencies.add(value)
    stats, ordered = latencies.stats(), sorted(values)
    assert (stats.minimum, stats.maximum) == (ordered[0], ordered[-1])
    for share, value in (0.5, stats.median), (0.95, stats.percentile95), (0.99, stats.percentile99):
        exact = ordered[int(share * len(ordered))]
        within = 0.01 * exact + 2 * (high - low) / len(values)
        assert abs(value - exact) < within or exact > histogram.BOUNDS[-1]
    assert stats.jitter == pytest.approx(statistics.mean(abs(a - b) for a, b in zip(values, values[1:])))


def ended(
    number: int,
    sendtime: int,
    responder: str = '',
    latency: int = 10_000,
    dest: str = DEST,
    sport: int = 1,
    protocol: int = UDP,
    **tcp: int,
) -> Record:
    """A probe to this hop; without a responder it is unanswered."""
    return Record(dest, sport, 2, protocol, number, sendtime, latency if responder else -1, responder, **tcp)


# What the summary says of unanswered probes


def table_from(
    counts: dict[int, tuple[int, int]], retransmitted: int | None = None, is_download: bool = False
) -> str:
    """The table of a destination: probes and unanswered ones by hop; with TCP, its retransmitted segments."""
    summary = Summary()
    for number, (probes, missing) in counts.items():
        for sent in range(probes):
            tcp = {} if retransmitted is None else dict(srtt=900, cwnd=10, retrans=retransmitted * (sent > 0))
            tcp['origseq'] = sent // 10 if is_download else sent
            summary.note(ended(number, sent, '' if sent < missing else A, protocol=TCP, **tcp))
    return '\n'.join(summary.tables())


LIMITS, LOST, UNKNOWN = 'limits the rate of its answers', 'packets are lost at hop', 'no hop behind it tells'
TOO_FEW = 'the difference is too small to tell why'
REMARKS: dict[str, tuple[dict[int, tuple[int, int]], list[str]]] = {
    'all answered': ({1: (100, 0), 2: (100, 0)}, []),
    'one missing': ({1: (500, 1), 2: (500, 0)}, []),
    'too few to say anything': ({1: (10, 5), 2: (10, 0)}, []),
    'limited': ({1: (100, 0), 2: (100, 40), 3: (100, 0)}, [f'hop 2 {LIMITS}']),
    'limited, the next as well': (
        {1: (100, 60), 2: (100, 40), 3: (100, 0)},
        [f'hop 1 {LIMITS}', f'hop 2 {LIMITS}'],
    ),
    'lost': ({1: (500, 0), 2: (500, 26), 3: (500, 24), 4: (500, 25)}, [f'{LOST} 2']),
    'limited, lost behind': ({1: (500, 250), 2: (500, 26), 3: (500, 24)}, [f'hop 1 {LIMITS}', f'{LOST} 2']),
    'lost twice': ({1: (500, 50), 2: (500, 51), 3: (500, 200), 4: (500, 203)}, [f'{LOST} 1', f'{LOST} 3']),
    'the last one': ({1: (500, 0), 2: (500, 50)}, [UNKNOWN]),
    'unresponsive behind': ({1: (500, 0), 2: (500, 50), 3: (30, 30)}, [UNKNOWN]),
    'not clear': ({1: (100, 10), 2: (100, 1)}, [f'; of 100 probes to hop 2 1 are not answered: {TOO_FEW}']),
    'few behind': ({1: (100, 5), 2: (25, 0)}, [TOO_FEW]),
    'few behind, none missing': ({1: (60, 6), 2: (60, 0), 3: (60, 0)}, [TOO_FEW]),
    'very few behind': ({1: (1000, 100), 2: (20, 0)}, [TOO_FEW]),
}


@pytest.mark.parametrize('counts, said', REMARKS.values(), ids=REMARKS)
def test_remarks(counts: dict[int, tuple[int, int]], said: list[str]) -> None:
    remarks = [
        line
        for line in table_from(counts).splitlines()
        if any(word in line for word in (LIMITS, LOST, UNKNOWN, TOO_FEW))
    ]
    assert len(remarks) == len(said)
    assert all(word in remark for remark, word in zip(remarks, said))


@pytest.mark.parametrize(
    'retransmitted, said',
    [
        (None, ', unless all of them limit their answers'),
        (0, '; but TCP retransmitted no segments, so rather answers are limited, or an ACK filter ends probes'),
        (3, '; but TCP retransmitted only 3 segments, so rather answers are limited, or an ACK filter ends probes'),
        (400, '; TCP retransmitted 400 segments'),
    ],
)
def test_what_tcp_says_of_loss(retransmitted: int | None, said: str) -> None:
    assert said in table_from({1: (500, 250), 2: (500, 251), 3: (500, 250)}, retransmitted)
    said = '' if retransmitted is None else said
    assert (
        f'{UNKNOWN} whether it loses packets{said}\n'
        in table_from({1: (500, 0), 2: (500, 250)}, retransmitted) + '\n'
    )


def test_address_that_answers_at_several_hops() -> None:
    """Told once, and not of a router that the path's change has moved to another hop."""
    summary = Summary()
    for number, responder in enumerate((A, B, B, A, B, B), 1):
        for sent in range(20):
            summary.note(ended(number, sent, A if number == 6 and sent < 10 else responder))
            summary.note(ended(number + 10, sent, f'192.0.2.{100 + number}'))
    lines = [line for line in summary.tables() if 'answers at hops' in line]
    assert [line.partition(':')[0] for line in lines] == [
        f'{A} answers at hops 1 and 4',
        f'{B} answers at hops 2, 3 and 5',
    ]


def test_tcp_that_receives_says_nothing_of_loss() -> None:
    """A download: this side has next to nothing to retransmit, whatever the peer has."""
    for counts in {1: (500, 250), 2: (500, 251), 3: (500, 250)}, {1: (500, 0), 2: (500, 250)}:
        remarks = table_from(counts, 0, is_download=True)
        assert 'TCP retransmitted' not in remarks
        assert any(word in remarks for word in (LOST, UNKNOWN))


def timeline(*hops: str) -> str:
    """The table of a run in which each hop, in each second of its line, answers 20 probes, if there is an x.
    Without an x in any there is no traffic, with a space no probe to this hop."""
    summary = Summary()
    for second in range(len(hops[0])):
        for part in range(20):
            for number, line in enumerate(hops, 1):
                sent = (100 + second) * 10**9 + part * 10**7
                is_asked = part == 0 and line[second] != ' ' and any(other[second] == 'x' for other in hops)
                if line[second] == 'x' or is_asked:  # an unresponsive hop is probed less often
                    summary.note(ended(number, sent, A if line[second] == 'x' else ''))
    return '\n'.join(summary.tables())


OUTAGES = {
    'none': (['xxxxxxxxxxxxxxxx', 'xxxxxxxxxxxxxxxx'], []),
    'short': (['xxxxxxxxxxxxxxxx', 'xxxx..xxxxxxxxxx'], []),
    'the way': (
        # from second 104 on, the last with an answer
        ['xxxxxxxxxxxxxxxx', 'xxxxx......xxxxx', 'xxxxx......xxxxx'],
        ['from hop 2 on there was no answer for 7 s'],
    ),
    'the way, to the end': (
        ['xxxxxxxxxxxxxxxx', 'xxxxxxx.........', 'xxxxxxx.........'],
        ['from hop 2 on there was no answer for 9 s'],
    ),
    'one hop': (['xxxxxxxxxxxxxxxx', 'xxxxx......xxxxx', 'xxxxxxxxxxxxxxxx'], ['hop 2 was unresponsive for 7 s']),
    'the first': (['xxxxxxxx........', 'xxxxxxxxxxxxxxxx'], ['hop 1 was unresponsive for 8 s']),
    'the last': (['xxxxxxxxxxxxxxxx', 'xxxxx......xxxxx'], ['from hop 2 on there was no answer for 7 s']),
    'no traffic': (['xxxxx......xxxxx', 'xxxxx......xxxxx'], []),
    'a shorter path': (['xxxxxxxxxxxxxxxx', 'xxxxx.     xxxxx'], []),
    'a shorter path, to the end': (['xxxxxxxxxxxxxxxx', 'xxxxx.          '], []),
}


@pytest.mark.parametrize('hops, said', OUTAGES.values(), ids=OUTAGES)
def test_outages(hops: list[str], said: list[str]) -> None:
    text = timeline(*hops)
    remarks = [line.split('  ', 1) for line in text.splitlines() if ' s–' in line]
    assert len(remarks) == len(said), text
    for (times, remark), word in zip(remarks, said):
        assert remark.startswith(word), text
        begin, end = (float(time.split()[0]) for time in times.split('–'))
        assert end - begin == float(word.split()[-2]) and begin == 99 + max(
            line.index('.') for line in hops if '.' in line
        )
    assert LIMITS not in text and LOST not in text


def test_unanswered_probes_of_an_outage_end_later() -> None:
    """Their rows come after the first answers behind the outage. The path changes as it begins."""
    summary = Summary()
    for second in range(40):
        for number in 1, 2, 3:
            responder = f'192.0.2.{number if second < 20 or number == 1 else number + 10}'
            if number < 3 or not 20 <= second < 28:
                summary.note(ended(number, second * 10**9, responder))
        if second == 30:
            summary.note(ended(3, 24 * 10**9))
    summary.digest(is_over=True)
    (outage,) = (line for line in summary.tables() if 'there was no answer' in line)
    assert 'from hop 3 on there was no answer for 9 s' in outage
    assert outage.endswith('; or the path, which changed then, became shorter')


def changes_told(summary: Summary) -> list[str]:
    """The changes of the path in the table, without their times and latencies."""
    summary.digest(is_over=True)
    told = [line.partition('  ')[2] for line in summary.tables() if 'path changed' in line]
    return [line.partition(';')[0] for line in told]


def test_a_hop_that_changes_twice_at_once_is_two_changes() -> None:
    """Several hops that change at nearly the same time are one."""
    summary = Summary()
    for step in range(400):
        second, third = (2, 3) if step < 200 else (12, 13) if step < 204 else (22, 13)
        for number, name in enumerate((1, second, third, 4), 1):
            summary.note(ended(number, step * 10**7 + number, f'192.0.2.{name}'))
    assert changes_told(summary) == [
        'the path changed from hop 2 on, which is now 192.0.2.12, no longer 192.0.2.2',
        'the path changed from hop 2 on, which is now 192.0.2.22, no longer 192.0.2.12',
    ]


def test_a_change_is_told_once_whichever_hop_tells_first() -> None:
    """There and back again, the farther hop first: the flow has a way in between that never was."""
    summary = Summary()
    for step in range(600):
        is_other, is_first = 200 <= step < 400, step in (200, 400)
        for number in 3, 1, 2, 4:
            other = is_other and not (is_first and number != 3)
            if step == 400 and number != 3:
                other = True
            summary.note(ended(number, step * 10**7 + number, f'192.0.2.{number + 10 * (other and number > 1)}'))
    assert changes_told(summary) == [
        'the path changed from hop 2 on, which is now 192.0.2.12, no longer 192.0.2.2',
        'the path changed from hop 2 on, which is now 192.0.2.2, no longer 192.0.2.12',
    ]


@pytest.mark.sample
def test_table() -> None:
    lines = table_from({1: (4, 0), 2: (3, 3), 3: (2, 1), 4: (5, 5)}, 7).splitlines()
    assert lines[0] == '' and lines[1] == '198.51.100.9: 14 probes, latency in ms'
    words = [line.split() for line in lines[3:8]]
    assert words[0] == ['1', '4', '100.0%', *['0.010'] * 5, '0.000', '0.010', '192.0.2.1']
    assert words[1] == ['2', '3', '0.0%', 'unresponsive']
    assert words[2][:3] == ['3', '2', '50.0%']
    assert words[3] == ['4', '5', '0.0%', 'unresponsive', '(or', 'the', 'destination)']
    assert words[4][:7] == ['TCP', *['0.900'] * 5, '0.000'] and lines[7].endswith(': +7, 0 before')


# What a link adds


def adds_of(noted: Summary) -> dict[int, float | None]:
    """By hop, in ms, as elf.json has it; the table has it, too."""
    [(_, destination)] = noted.destinations()
    found = {number: destination.adds(number) for number, hop in destination.hops.items() if hop.latency.count}
    table = [line.split()[-2] for line in noted.tables() if re.match(' *[0-9]+ .*192', line)]
    assert table == ['-' if value is None else f'{value / MS:.3f}' for value in found.values()]
    return {number: value and value / MS for number, value in found.items()}


def test_what_a_link_adds() -> None:
    """The first link has a queue of 50 ms in 45 of 100 tenths of a second, in which alone hop 2 answers mostly:
    the medians of both hops say that the second link had it. Each probe of hop 2 is 5 ms behind that of hop 1, and
    answered when hop 1 has answered many later ones."""
    noted, records = Summary(), []
    for number in range(1000):
        sent, queue = 10**12 + number * 10 * MS, 50 * MS if number % 100 < 45 else 0
        records.append((sent + queue, ended(1, sent, A, MS + queue)))
        if queue or number % 10 == 9:
            latency = 3 * MS + queue + number % 3
            records.append((sent + latency + 400 * MS, ended(2, sent + 5 * MS, A, latency)))
        records.append((sent + 500 * MS, ended(3, sent + 7 * MS, A, 2 * MS + queue)))
    for _, record in sorted(records, key=lambda item: item[0]):
        noted.note(record)
    [(_, destination)] = noted.destinations()
    first, second = (destination.hops[number].latency.stats().median for number in (1, 2))
    assert second - first > 50 * MS
    found = adds_of(noted)
    assert found[1] == pytest.approx(1, rel=0.01)
    assert found[2] == pytest.approx(2, abs=0.001) and found[3] == pytest.approx(-1, abs=0.001)


def test_what_is_not_compared() -> None:
    """Other flows, other moments, and hops behind one that answers other flows only."""
    noted = Summary()
    for second in range(10, 110, 10):
        noted.note(ended(2, second * 10**9, A, 7 * MS, sport=1))
        noted.note(ended(3, second * 10**9, A, 9 * MS, sport=2))
        noted.note(ended(3, (second + 3) * 10**9, A, 9 * MS, sport=1))
        noted.note(ended(4, second * 10**9, A, 12 * MS, sport=3))
    assert adds_of(noted) == {2: 7, 3: None, 4: None}
    noted.note(ended(3, 200 * 10**9, A, 9 * MS, sport=3))
    noted.note(ended(4, 201 * 10**9, A, 12 * MS, sport=3))
    assert adds_of(noted) == {2: 7, 3: None, 4: 3}


# Flows that differ


def ways_in(noted: Summary) -> list[str]:
    """The lines that say so."""
    lines = noted.tables()
    begin = next((number for number, line in enumerate(lines) if line.startswith('flows take')), len(lines))
    return [line.strip() for line in lines[begin:] if ' by 192' in line or line.startswith('flows take')]


def balanced(starts: dict[int, int], responder: Callable[[int, int], str]) -> Summary:
    """Flows by source port, each from a second on for 10 s: three hops, of which the second one varies.

    From it on, latencies are 20 ms longer if it is C.
    """
    noted = Summary()
    for number in range(100):
        for sport, second in starts.items():
            sent = second * 10**9 + number * 100 * MS
            second_hop = responder(sport, number)
            for hop, who, latency in (1, A, MS), (2, second_hop, 2 * MS), (3, A, 3 * MS):
                slower = 20 * MS if hop > 1 and second_hop == C else 0
                noted.note(ended(hop, sent + hop * MS, who, latency + slower, sport=sport))
    return noted


def test_flows_that_take_several_ways() -> None:
    noted = balanced(dict.fromkeys(range(1, 11), 100), lambda sport, _: B if sport % 3 else C)
    assert ways_in(noted) == [
        'flows take 2 ways; mean latency of hop 3, ms, the fastest first:',
        f'3.000  by {B} (hop 2): UDP 1, UDP 2, UDP 4, UDP 5 and 3 more',
        f'23.000  by {C} (hop 2): UDP 3, UDP 6, UDP 9',
    ]
    noted.note(ended(3, 100 * 10**9, A, sport=11))  # a flow whose way is not known changes nothing
    assert len(ways_in(noted)) == 3


@pytest.mark.parametrize(
    'starts, responder',
    [
        (dict.fromkeys(range(1, 11), 100), lambda sport, number: B),
        ({1: 100, 2: 200, 3: 300}, lambda sport, number: B if sport == 2 else C),
        (dict.fromkeys(range(1, 11), 100), lambda sport, number: B if number % 2 else C),
        (dict.fromkeys(range(1, 11), 100), lambda sport, number: B if number < 50 else C),
    ],
    ids=['the same way', 'one after the other', 'balanced packets', 'a path that changes for all'],
)
def test_flows_that_do_not_differ(starts: dict[int, int], responder: Callable[[int, int], str]) -> None:
    assert ways_in(balanced(starts, responder)) == []


@pytest.mark.parametrize('count', [5, 511, 512, 4001])
def test_median_of_differences(count: int) -> None:
    chance = random.Random(count)
    values = [round(chance.gauss(-2, 3) * MS) for _ in range(count)]
    differences = histogram.Differences()
    for value in values:
        differences.add(value)
    assert differences.count == count
    error = 0 if count < 512 else 0.02
    assert differences.median() == pytest.approx(statistics.median_low(values), rel=error)


# Changes of the way, and bounds


def test_changes_are_by_flow(caplog: pytest.LogCaptureFixture) -> None:
    """Flows that go different ways change nothing; a late answer of the way that was is no change."""
    summary = Summary()
    with caplog.at_level('INFO', 'elf'):
        for sendtime in range(10):
            summary.note(ended(3, sendtime, A, sport=1))
            summary.note(ended(3, sendtime, B, sport=2))
        assert not caplog.messages
        summary.note(ended(3, 20, C, sport=1))
        summary.note(ended(3, 15, A, sport=1))
        summary.note(ended(3, 21, C, sport=1))
    [message] = caplog.messages
    assert message == ('UDP port 1 to 198.51.100.9 port 2: hop 3 is now 192.0.2.3, no longer 192.0.2.1')
    table = summary.tables()
    assert 'hop 3 changed once' in table[-1]
    assert [line.split()[-2:] for line in table[3:6]] == [
        ['192.0.2.1', '48%'],
        ['192.0.2.2', '43%'],
        ['192.0.2.3', '9%'],
    ]


def test_changes_without_end_are_told_only_so_often(caplog: pytest.LogCaptureFixture) -> None:
    noted = Summary()
    with caplog.at_level('INFO', 'elf'):
        for sendtime in range(1001):
            noted.note(ended(3, sendtime, (A, B)[sendtime % 2]))
    assert len(caplog.messages) == summary.CHANGES_LOGGED
    assert 'only counted' in caplog.messages[-1]
    assert 'hop 3 is 2 routers in turn, within the same flow' in noted.tables()[-1]
    for sendtime in range(2000, 6000):
        noted.note(ended(3, sendtime, A))
    assert 'hop 3 changed 1000 times' in noted.tables()[-1]


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, 'HOPS_MAX', 100)
    monkeypatch.setattr(summary, 'FLOWS_MAX', 40)
    noted = Summary()
    for number in range(60):
        for hop in 1, 2:
            for sport in range(3):
                noted.note(ended(hop, number, A, dest=f'198.51.100.{number}', sport=sport))
    assert len(noted._flows) <= 40
    text = '\n'.join(noted.tables(100))
    assert 198 <= 6 * text.count('latency in ms') + int(re.search('([0-9]+) probes to dest', text)[1]) == 360
    assert '198.51.100.59: 6 probes' in text and '198.51.100.0: ' not in text  # the latest are there
    for number in range(1000):
        noted.note(ended(3, number, f'2001:db8::{number:x}'))
    [more] = re.findall('^ *and ([0-9]+) more$', '\n'.join(noted.tables(100)), re.MULTILINE)
    assert int(more) == paths.RESPONDERS_MAX - summary.RESPONDERS_SHOWN


def test_latencies_by_responder() -> None:
    """Each responder's latencies are counted by their bounds, however many there are; above a maximum,
    together with nobody's."""
    chance = random.Random(7)
    hop, expected = paths.Hop(), {}
    assert (hop.responders, hop.by_responder()) == (Counter(), {})
    for number in range(5000):
        who = f'192.0.2.{min(number, chance.randint(0, 99))}'
        value = chance.choice((*histogram.BUCKETS, chance.randint(0, 10**10)))
        hop.latency.add(value)
        if who != hop.responder:
            hop.note_other(who, value)
        expected.setdefault(who, []).append(value)
        if number in (1, 100, 600, 4999):
            told = dict(list(expected.items())[: paths.RESPONDERS_MAX])
            assert hop.responders == {who: len(values) for who, values in told.items()}
            for who, counts in hop.by_responder().items():
                upto = [sum(value <= bound for value in told[who]) for bound in histogram.BUCKETS]
                assert [*itertools.accumulate(counts.counts)] == [*upto, len(told[who])]
                assert counts.total == sum(told[who])
    assert len(expected) == 100


def tcp_probe(sendtime: int, responder: str = A, sport: int = 1, retrans: int = 0) -> Record:
    return ended(3, sendtime, responder, sport=sport, protocol=TCP, srtt=900, cwnd=10, retrans=retrans)


def retransmitted(noted: Summary) -> tuple[int, ...]:
    """Segments, as the table says: since each flow's first probe, and before it."""
    [numbers] = re.findall(r'segments retransmitted: \+(\d+), (\d+) before', '\n'.join(noted.tables()))
    return tuple(map(int, numbers))


def test_retransmissions_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a flow beside which there are so many others that it is forgotten now and then."""
    monkeypatch.setattr(summary, 'FLOWS_MAX', 40)
    noted = Summary()
    for number in range(1000):
        noted.note(tcp_probe(number, retrans=min(number, 30)))
        if number >= 30:
            noted.note(tcp_probe(number, sport=1000 + number))
    assert retransmitted(noted) == (30, 0)


def test_retransmissions_of_connections_by_the_same_ports() -> None:
    """One after the other, each sends two segments again; rows that come late, or unanswered, add nothing.
    Nor do two at once, from different addresses, make more than one has sent. What one of them had sent again
    before its first probe counts apart."""
    noted = Summary()
    for second in range(2, 202, 2):
        sent = second * 10**9
        for number, retrans in enumerate((0, 1, 2, 2)):
            noted.note(tcp_probe(sent + number, retrans=retrans))
        noted.note(tcp_probe(sent + 1, '', retrans=1))
    for number in range(1000):
        noted.note(tcp_probe(number * 10**6, sport=3, retrans=5 + 4 * (number % 2)))
    assert retransmitted(noted) == (2 * 100 + 4, 5)


def test_names_are_asked_for_in_the_background(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for a resolver that does not answer; what it says may be printed."""
    answer = threading.Event()

    def slow(address: str) -> Any:
        answer.wait(20)
        if address != '192.0.2.1':
            raise socket.herror(1, 'Unknown host')
        return 'one.example\x1b[2J', [], [address]

    monkeypatch.setattr(socket, 'gethostbyaddr', slow)
    names = ReverseDns()
    assert [names.name_of(address) for address in (A, B)] == ['', '']
    answer.set()
    wait_until(lambda: names.name_of(A), 5, 'the name is known')
    assert [names.name_of(address) for address in (A, B)] == ['one.example\\x1b[2J', '']


# Runs


def table_of(log: str, dest: str) -> list[str]:
    """The lines of a destination's table in the log, up to the next one or what else is logged."""
    return re.split(r'\n(?:\n|\d\d:)', log.split(f'\n{dest}: ')[1])[0].splitlines()


def figures_of(log: str, dest: str) -> dict[int, list[str]]:
    """Hop -> probes, answered, least, median, 95 %, 99 %, greatest, jitter, adds (ms), responder."""
    rows = [line.split() for line in table_of(log, dest) if re.match(' *[0-9]+ ', line)]
    return {int(row[0]): row[1:] for row in rows[1:]}


def pings(lab: Lab, *options: str) -> list[subprocess.Popen[str]]:
    return [lab.client.popen('ping', '-nq', *options, server, stdout=subprocess.DEVNULL) for server in both(lab)]


@root
def test_summary_says_what_the_rows_say(lab4, tmp_path):
    with probing(lab4, *both(lab4), '-l', cwd=tmp_path) as run:
        pings(lab4, '-i.01')
        wait_until(lambda: len(run.rows()) > 600, 20, 'rows')
        assert run.stop() == 0
    lab4.client.end_processes()
    assert re.search(r' 0 unanswered\n\n', run.log)  # the tables are below the log
    assert table_of(run.log, both(lab4)[0]) == table_of((tmp_path / 'elf.log').read_text(), both(lab4)[0])
    for version, dest in zip(VERSIONS, both(lab4)):
        found = figures_of(run.log, dest)
        assert set(found) == set(HOPS)
        for hop, (probes, answered, *figures, responder) in found.items():
            latencies = [row.latency for row in run.rows() if (row.dest, row.outttl) == (dest, hop)]
            assert (int(probes), answered, responder) == (len(latencies), '100.0%', lab4.hop(version, hop))
            low, high = statistics.median_low(latencies), statistics.median_high(latencies)
            bounds = {0: (min(latencies),) * 2, 1: (low, high), 4: (max(latencies),) * 2}
            for column, (least, most) in bounds.items():
                assert least / MS * 0.98 - 0.001 <= float(figures[column]) <= most / MS * 1.02 + 0.001
            assert abs(float(figures[6])) < max(latencies) / MS


@root
@pytest.mark.parametrize(
    'dest, traffic, says',
    [
        ('server', None, 'no packet to 10.0.5.2 left by eth0: nobody here sends there'),
        ('near', 'ping', 'one hop away, with no router between: 10.0.1.2'),
        ('server', 'traceroute', 'none that could carry a probe: carrier_low_ttl'),
    ],
)
def test_why_there_is_nothing(lab4, tmp_path, dest, traffic, says):
    to = {'server': lab4.server_address(4), 'near': lab4.hop(4, 1)}[dest]
    with probing(lab4, to, cwd=tmp_path) as run:
        if traffic == 'ping':
            lab4.client.run('ping', '-nqc5', '-i.01', to)
        if traffic == 'traceroute':
            lab4.client.run('traceroute', '-n', '-q1', to)
        assert run.stop() == 3
    assert run.summary.probes == 0
    assert says in run.log


@root
def test_names_of_responders(lab4, tmp_path):
    names = ''.join(f'{lab4.hop(version, hop)} r{hop}.example\n' for version in VERSIONS for hop in HOPS)
    names += f'{lab4.server_address(4)} server.example\n'
    with hosts_file(lab4.client, names), probing(lab4, *both(lab4), cwd=tmp_path) as run:
        pings(lab4, '-i.01')
        wait_until(lambda: len(run.rows()) > 100, 20, 'rows')
        assert run.stop() == 0
        with probing(lab4, '-n', *both(lab4), cwd=tmp_path) as numeric:
            wait_until(lambda: len(numeric.rows()) > 100, 20, 'rows')
    lab4.client.end_processes()
    table = run.log.split(lab4.server_address(4) + ' server.example: ')[1]
    assert re.findall(r'\S+ r[0-9]\.example', table)[:4] == [f'{lab4.hop(4, hop)} r{hop}.example' for hop in HOPS]
    assert '.example' not in numeric.log


@root
def test_an_outage_is_named(make_lab, tmp_path):
    """r2 forwards nothing for some seconds. Few probes are unanswered: unresponsive hops get fewer."""
    lab = make_lab(routers=4)
    with probing(lab, *both(lab), cwd=tmp_path) as run:
        pings(lab, '-i.01')
        wait_until(lambda: len({(row.dest, row.outttl) for row in run.rows()}) == 8, 20, 'all hops')
        wait_until(run.is_trusting, 15, 'a stall is no sign of a firewall')
        with nft_table(lab.routers[1], CLOSED):
            begin = time.monotonic()
            wait_until(lambda: time.monotonic() - begin > 6, 10, 'it lasts')
        since = time.monotonic_ns()
        wait_until(
            lambda: (
                len(
                    {
                        (row.dest, row.outttl)
                        for row in run.rows()
                        if row.is_answered and row.sendtime > since + 10**9
                    }
                )
                == 8
            ),
            20,
            'all hops again',
        )
        assert run.stop() == 0
    for dest in both(lab):
        said = re.findall(
            r'from hop (\d) on there was no answer for (\d+) s', re.split(rf'{dest}: \d+ probes', run.log)[1]
        )
        hop, seconds = map(int, said[0])
        assert hop == 3 and 5 <= seconds <= 9
        report = json.loads((tmp_path / 'elf.json').read_text())
        (found,) = (each for each in report['findings'] if (each['kind'], each['destination']) == ('outage', dest))
        zero = utc_ns(report['monotonic_zero'])
        assert abs((utc_ns(found['from']) - zero) / 1e9 - begin) < 2
        assert found['sentence'] in run.log


@root
def test_clock_in_the_log(lab4, tmp_path):
    with probing(lab4, lab4.server_address(4), cwd=tmp_path) as run:
        said = re.search(r'CLOCK_MONOTONIC 0 is (\S+)Z', run.log)[1]
    then = datetime.strptime(said, '%Y-%m-%dT%H:%M:%S.%f').replace(tzinfo=timezone.utc)
    assert abs(then.timestamp() + time.monotonic() - time.time()) < 0.1


def is_enough(run: Run) -> bool:
    """So many rows of each hop that chance decides nothing; the last one rests when it loses answers."""
    counts = Counter((row.dest, row.outttl) for row in run.rows())
    return len(counts) == 2 * len(HOPS) and all(
        count > (250 if hop < len(HOPS) else 60) for (_, hop), count in counts.items()
    )


@root
def test_icmp_limits_and_loss_are_told_apart(make_lab, tmp_path):
    """r1 answers once in a while only; r2 loses a twentieth of what it forwards, in both directions."""
    lab = make_lab(routers=4)
    limit = 'limit rate over 5/second burst 2 packets drop'
    limits = (
        f'chain output {{ type filter hook output priority 0; icmp type time-exceeded {limit};'
        f' icmpv6 type time-exceeded {limit}; }}'
    )
    loss = 'chain forward { type filter hook forward priority 0; numgen random mod 20 < 1 drop; }'
    with nft_table(lab.routers[0], limits), nft_table(lab.routers[1], loss), probing(
        lab, *both(lab), cwd=tmp_path
    ) as run:
        for _ in range(4):
            pings(lab, '-i.01')
        wait_until(lambda: is_enough(run), 90, 'rows')
        assert run.stop() == 0
    for dest in both(lab):
        remarks = [line for line in table_of(run.log, dest) if re.search('hop [1-3]', line)]
        assert len(remarks) == 2, run.log
        assert remarks[0].startswith('hop 1 limits the rate of its answers: ')
        assert remarks[1].startswith('packets are lost at hop 3 or on the way to it: ')


@contextmanager
def tcp_stream(lab: Lab, version: int) -> Iterator[socket.socket]:
    """A connection over which the server takes all that comes."""
    with tcp_connected(lab, version, 7) as (sender, receiver):

        def take() -> None:
            while receiver.recv(1 << 16):
                pass

        thread = threading.Thread(target=take)
        thread.start()
        try:
            yield sender
        finally:
            sender.close()
            thread.join()


def tcp_info(connection: socket.socket) -> tuple[int, int, int]:
    """srtt (us), cwnd, retransmitted segments (struct tcp_info, linux/tcp.h)."""
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    rtt, cwnd, retrans = (struct.unpack_from('=I', info, at)[0] for at in (68, 80, 100))
    return rtt, cwnd, retrans


def unacknowledged(connection: socket.socket) -> int:
    """Segments sent and not acknowledged (tcpi_unacked)."""
    number: int = struct.unpack_from('=I', connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104), 24)[0]
    return number


def csv_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


@root
@pytest.mark.parametrize('version', VERSIONS)
def test_tcp_state_beside_each_probe(lab4, tmp_path, version):
    """What the kernel itself says of the socket, before and after; nothing for UDP.

    Then no acknowledgement comes back, and each segment of 100 bytes leaves with one more in front of it.
    """
    deaf = 'chain forward { type filter hook forward priority 0; tcp sport 7 drop; }'
    loss = 'chain forward { type filter hook forward priority 0; tcp dport 7 numgen random mod 30 < 1 drop; }'
    server = lab4.server_address(version)
    with probing(lab4, '-p0', server, cwd=tmp_path) as run, tcp_stream(lab4, version) as sender:
        before = tcp_info(sender)
        sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sender.send(bytes(100))
        wait_until(lambda: not unacknowledged(sender), 10, 'the peer has acknowledged it')
        with nft_table(lab4.routers[1], deaf):
            begun = time.monotonic_ns()
            for _ in range(8):
                sender.send(bytes(100))
            wait_until(
                lambda: any(int(row['inflight'] or 0) == 7 for row in csv_rows(tmp_path / 'elf.csv')),
                10,
                'rows of segments that nobody acknowledges',
            )
        wait_until(lambda: not unacknowledged(sender), 10, 'the peer has acknowledged all')
        heard = time.monotonic_ns()
        with nft_table(lab4.routers[1], loss):
            wait_until(lambda: sender.send(bytes(20000)) and tcp_info(sender)[2] > 5, 20, 'segments are lost')
        last = tcp_info(sender)[2] - 1
        wait_until(
            lambda: (
                sender.send(bytes(2000))
                and any(int(row['retrans'] or 0) >= last for row in csv_rows(tmp_path / 'elf.csv'))
            ),
            20,
            'rows know it',
        )
        with inside(lab4.client), socket.socket(FAMILY[version], socket.SOCK_DGRAM) as udp:
            udp.sendto(bytes(40), (server, 7))
        assert run.stop() == 0
        after = tcp_info(sender)
    rows = csv_rows(tmp_path / 'elf.csv')
    columns = 'srtt', 'cwnd', 'retrans', 'inflight'
    assert [[row[name] for name in columns] for row in rows if row['protocol'] == str(UDP)] == [[''] * 4]
    waiting = {
        int(row['origseq']): int(row['inflight'])
        for row in rows
        if row['protocol'] == str(TCP) and begun < int(row['sendtime']) < heard
    }
    zero = min(waiting)
    assert len(waiting) > 3 and all(inflight == (seq - zero) // 100 for seq, inflight in waiting.items())
    tcp = [row for row in rows if row['protocol'] == str(TCP)]
    retrans = [int(row['retrans']) for row in sorted(tcp, key=lambda row: int(row['sendtime']))]
    assert retrans == sorted(retrans)
    assert (retrans[0], before[2]) == (0, 0) and last <= retrans[-1] <= after[2]
    first = int(min(tcp, key=lambda row: int(row['sendtime']))['cwnd'])  # when the peer has acknowledged data
    assert before[1] == 10 <= first <= 20  # RFC 6928, and slow start for one round trip
    srtt = [int(row['srtt']) for row in tcp]
    assert min(before[0], after[0]) / 10 < statistics.median(srtt) < 10 * max(before[0], after[0])
    began = re.search(r'segments retransmitted: \+(\d+), (\d+) before', run.log)
    assert [int(number) for number in began.groups()] == [retrans[-1] - retrans[0], retrans[0]]


@root
def test_balanced_flows(make_lab, tmp_path):
    """r1 balances flows over two routers, one of them behind a slow link, whose queue the flows fill.

              +- 20 - other - 21 -+
    client - r1 ----- r2 ------- r3 - server
    """
    lab = make_lab(routers=3)
    r1, _, r3 = lab.routers
    other = Host(f'{lab.prefix}other', ('eth0', 'eth1'))
    with ExitStack() as stack:
        stack.callback(remove, [other.name])
        batch('', [f'netns add {other.name}'])
        other.run('sysctl', '-eqw', *COMMON_SYSCTLS, *ROUTER_SYSCTLS)
        batch(other.name, ['link set lo up'])
        for near, device, link, side in (r1, 'eth0', 20, 2), (r3, 'eth1', 21, 1):
            peer = f'link add way index {100 + link} type veth peer {device} index {200 + link} netns {other.name}'
            batch(near.name, [peer, *attach('way', link, 3 - side)])
            batch(other.name, attach(device, link, side))
        for version, bits in (4, 24), (6, 64):
            net = {link: f'{address(version, link, 0)}/{bits}' for link in (1, 4)}
            batch(other.name, [f'route add {net[1]} via {address(version, 20, 1)}',
                               f'route add {net[4]} via {address(version, 21, 2)}'])  # fmt: skip
            ways = ' '.join(f'nexthop via {address(version, link, 2)}' for link in (2, 20))
            batch(r1.name, [f'route replace {net[4]} {ways}'])
        r1.run('sysctl', '-qw', 'net.ipv4.fib_multipath_hash_policy=1', 'net.ipv6.fib_multipath_hash_policy=1')
        r1.run(
            'tc', 'qdisc', 'add', 'dev', 'way', 'root', 'tbf', 'rate', '1mbit', 'burst', '2kb', 'latency', '60ms'
        )
        servers = [lab.server_address(version) for version in VERSIONS]
        with inside(lab.client):
            flows = [socket.socket(FAMILY[version], socket.SOCK_DGRAM) for version in VERSIONS for _ in range(12)]
        for flow in flows:
            stack.enter_context(flow)
        with probing(lab, *servers, cwd=tmp_path) as run:

            def has_answers() -> bool:
                """After some more packets: whether each flow has enough answers of each hop."""
                for number, flow in enumerate(flows):
                    flow.sendto(bytes(200), (servers[number // 12], 9))
                counts = Counter((row.dest, row.sport, row.outttl) for row in run.rows() if row.is_answered)
                return len(counts) == len(flows) * 3 and min(counts.values()) > 10

            wait_until(has_answers, 60, 'answers of each hop to each flow')
            rows = run.rows()
            assert run.stop() == 0
    report = json.loads((tmp_path / 'elf.json').read_text())
    for destination in report['destinations']:
        dest = destination['address']
        version = 6 if ':' in dest else 4
        taken = {
            (row.sport, row.responder) for row in rows if (row.dest, row.outttl, row.is_answered) == (dest, 2, True)
        }
        fast, slow = destination['ways']
        for way, router in (fast, lab.hop(version, 2)), (slow, address(version, 20, 2)):
            # In IPv6, r3 may answer from another address on either way.
            assert way['responders'][0] == dict(hop=2, address=router, name=None) and way['hop'] == 3
            assert {flow['sport'] for flow in way['flows']} == {
                sport for sport, responder in taken if responder == router
            }
            latencies = [row.latency for row in rows if row.responder and (row.dest, row.outttl) == (dest, 3)
                         and (row.sport, router) in taken]  # fmt: skip
            assert way['mean'] == pytest.approx(statistics.mean(latencies), rel=0.2)
        assert slow['mean'] > 3 * fast['mean']
        said = [line.strip() for line in table_of(run.log, dest)]
        [begin] = [
            number
            for number, line in enumerate(said)
            if line.startswith('flows take 2 ways; mean latency of hop 3')
        ]
        assert f'by {lab.hop(version, 2)} (hop 2)' in said[begin + 1]
        assert f'by {address(version, 20, 2)} (hop 2)' in said[begin + 2]


@root
def test_a_queue_that_grows_for_a_while(make_lab, tmp_path):
    """The link behind r2 is slow in the middle of a transfer: the summary shows the hop behind it, rows show
    when, and the flow's own round-trip time with it."""
    lab = make_lab(routers=4)
    slow = 'qdisc', 'add', 'dev', 'eth1', 'root', 'tbf', 'rate', '20mbit', 'burst', '16kb', 'latency', '40ms'

    def answers(since: int, enough: int) -> bool:
        later = [row for row in run.rows() if row.sendtime > since and row.is_answered]
        return all(sum(row.outttl == hop for row in later) > enough for hop in HOPS)

    with lab.iperf3_server(), probing(lab, lab.server_address(4), cwd=tmp_path) as run:
        lab.client.popen('iperf3', '-c', lab.server_address(4), '-t', '60', '-b', '60M', stdout=subprocess.DEVNULL)
        wait_until(lambda: answers(0, 50), 20, 'a fast way')
        lab.routers[1].run('tc', *slow)
        begin = time.monotonic_ns()
        wait_until(lambda: answers(begin, 50), 20, 'a slow way')
        stop = time.monotonic_ns()
        lab.routers[1].run('tc', 'qdisc', 'del', 'dev', 'eth1', 'root')
        wait_until(lambda: answers(stop + 500 * MS, 50), 20, 'a fast way again')
        assert run.stop() == 0
    rows = [row for row in csv_rows(tmp_path / 'elf.csv') if row['responder']]

    def median(column: str, hop: int, since: int, until: int) -> float:
        return statistics.median(
            int(row[column])
            for row in rows
            if row[column] and int(row['outttl']) == hop and since < int(row['sendtime']) < until
        )

    middle, end_of_run = (begin + stop) // 2, time.monotonic_ns()
    for hop in HOPS:
        calm, busy = median('latency', hop, 0, begin), median('latency', hop, middle, stop)
        after = median('latency', hop, stop + 500 * MS, end_of_run)
        if hop >= 3:
            assert busy > 5 * MS > 5 * max(calm, after), hop
        else:
            assert max(busy, calm, after) < MS, hop
    for hop in HOPS:  # the flow's own, whichever hop its probe went to
        assert median('srtt', hop, middle, stop) > 5000 > 2 * median('srtt', hop, 0, begin)
    found = figures_of(run.log, lab.server_address(4))
    assert [float(found[hop][4]) > 5 for hop in HOPS] == [False, False, True, True]  # 95 %
    assert any('round trip by the kernel' in line for line in table_of(run.log, lab.server_address(4)))


# Hooks and cost

HOOKS = Path(__file__).parent / 'hooks'


@root
def test_bytes_by_dscp(lab4, tmp_path):
    """The first worked example: two flows that differ in their DSCP."""
    server = lab4.server_address(4)
    with lab4.client.capture(filter='ip[8] <= 32 and ip[16] < 224') as seen, probing(
        lab4, '-H', str(HOOKS / 'dscp.c'), '-T', '-p0', server, cwd=tmp_path
    ) as run:
        for tos, size in (0, 100), (0xB8, 500):
            lab4.client.run('ping', '-nq', '-c50', '-i.002', '-Q', str(tos), '-s', str(size), server)
    counted = {}
    for _, frame in seen.packets():
        counted[frame[15] >> 2] = counted.get(frame[15] >> 2, 0) + len(frame) - 14
    saved = json.loads((tmp_path / 'elf.bytes_by_dscp.json').read_text())
    assert saved['map'] == 'bytes_by_dscp'
    assert {entry['key']: entry['value'] for entry in saved['entries']} == counted
    assert set(counted) == {0, 0x2E}
    assert len(run.rows()) == len(seen.packets())


@root
def test_histogram_of_reply_ttls(lab4, tmp_path):
    """The second worked example; an older file of the same name is kept."""
    (tmp_path / 'elf.reply_ttl.json').write_text('old')
    with probing(lab4, '-H', str(HOOKS / 'reply_ttl.c'), *both(lab4), cwd=tmp_path) as run:
        pings(lab4, '-i.01')
        wait_until(lambda: len(run.rows()) > 200, 20, 'rows')
        assert run.stop() == 0
    lab4.client.end_processes()
    saved = json.loads((tmp_path / 'elf.reply_ttl.json').read_text())['entries']
    assert {len(entry['value']) for entry in saved} == {os.cpu_count()}
    found = {entry['key']: sum(entry['value']) for entry in saved if any(entry['value'])}
    hops = [row.outttl for row in run.rows() if row.is_answered]
    assert found == {65 - hop: hops.count(hop) for hop in HOPS}
    assert (tmp_path / 'elf.reply_ttl.1.json').read_text() == 'old'


ODD_MAPS = """\
struct inner { u16 half; char name[6]; };
struct pair { u32 number; struct inner inner[2]; };
BPF_HASH(path, u32, struct pair);
struct prefix { u32 length; u32 address[4]; };
BPF_LPM_TRIE(prefixes, struct prefix, u64, 10);
BPF_QUEUE(waiting, u64, 10);
BPF_RINGBUF_OUTPUT(stream, 1);
BPF_HISTOGRAM(sizes);

static inline int elf_v4_icmp_beforesend(struct __sk_buff *ctx)
{
	struct pair pair = { 7, { { 1, "one" }, { 2, "two" } } };
	u32 key = 1 << 31;
	u64 number = 5;
	struct prefix prefix = { 128, { 1, 2, 3, 4 } };

	path.update(&key, &pair);
	prefixes.update(&prefix, &number);
	waiting.push(&number, 0);
	sizes.increment(bpf_log2l(ctx->len));
	return 0;
}
"""


@root
def test_maps_of_all_kinds(lab4, tmp_path):
    """Named as a type of ours, with structs and texts, without keys; one that cannot be read is told of."""
    (tmp_path / 'hooks.c').write_text(ODD_MAPS)
    with probing(lab4, '-H', 'hooks.c', lab4.server_address(4), cwd=tmp_path) as run:
        lab4.client.run('ping', '-nc1', lab4.server_address(4))
        wait_until(run.rows, 10, 'a row')
    maps = {path.name: json.loads(path.read_text())['entries'] for path in tmp_path.glob('elf.*.json')}
    assert maps['elf.path.json'] == [
        {'key': 1 << 31, 'value': {'number': 7, 'inner': [{'half': 1, 'name': 'one'}, {'half': 2, 'name': 'two'}]}}
    ]
    assert maps['elf.prefixes.json'] == [{'key': {'length': 128, 'address': [1, 2, 3, 4]}, 'value': 5}]
    assert maps['elf.waiting.json'] == [{'value': 5}]
    assert [entry for entry in maps['elf.sizes.json'] if entry['value']] == [{'key': 6, 'value': 1}]
    assert set(maps) == {f'elf.{name}.json' for name in ('path', 'prefixes', 'waiting', 'sizes')}
    assert "the hooks' map 'stream' is not saved" in run.log


# In a thread, for which glibc allocates above 4 GiB.
NAMES_FROM_A_THREAD = """\
import sys
import threading
sys.path.insert(0, sys.argv[1])
import elfprobe
from elf.options import Config

descriptors = elfprobe.map_descriptors

def tell_address(module):
    print(module.value >> 32 > 0)
    return descriptors(module)

elfprobe.map_descriptors = tell_address

def find():
    config = Config(('lo',), hooks=sys.argv[2], cache=False)
    kernel = elfprobe.Kernel(config, elfprobe.Build(), elfprobe.Platform.detect())
    print(*kernel.hook_maps())
    kernel.close()

thread = threading.Thread(target=find)
thread.start()
thread.join()
"""


@root
def test_names_of_maps_wherever_memory_is(tmp_path):
    """Where Python is a position-independent executable, BCC has its memory there, too."""
    (tmp_path / 'hooks.c').write_text(ODD_MAPS)
    done = run(sys.executable, '-c', NAMES_FROM_A_THREAD, str(ELFPROBE.parent), str(tmp_path / 'hooks.c'))
    assert sorted(done.stdout.split()) == ['True', 'path', 'prefixes', 'sizes', 'stream', 'waiting']


def run_counts() -> dict[int, int]:
    """Of elfprobe's programs, by ID, as far as the kernel has counted."""
    programs = json.loads(run('bpftool', '-j', 'prog', 'show').stdout)
    return {
        program['id']: program.get('run_cnt', 0)
        for program in programs
        if program.get('name', '') in ('elf_egress', 'elf_ingress')
    }


@root
@pytest.mark.needs('bpftool')
def test_what_the_programs_take(lab4, tmp_path):
    """Measured by the kernel with -d, and only meanwhile."""
    ping = 'ping', '-nq', '-c100', '-i.002', lab4.server_address(4)
    with probing(lab4, '-d', lab4.server_address(4), cwd=tmp_path) as first, probing(
        lab4, '-f', 'other', lab4.hop(4, 1), host=lab4.routers[3], cwd=tmp_path
    ) as second:
        lab4.client.run(*ping)
        assert first.stop() == 0
        assert max(run_counts().values()) >= 100

        def is_not_measured() -> bool:
            before = run_counts()
            lab4.client.run(*ping)  # by way of the other one
            after = run_counts()
            return {number: after[number] for number in before if number in after}.items() <= before.items()

        wait_until(is_not_measured, 60, 'the kernel counts no more: other tests may ask it to, too')
    found = re.findall(r'(elf_\w+) ran (\d+) times, (\d+) ns each: ([0-9.]+)% of a core', first.log)
    ran = {name: (int(times), int(each)) for name, times, each, _ in found}
    # Two runs for each probe, since it is shorter than the ping. Neighbours are discovered meanwhile, too.
    assert 100 <= ran['elf_egress'][0] <= 150 + 2 * len(first.rows())
    assert ran['elf_ingress'][0] >= 100 and ran['elf_ingress'][1] > 0
    assert ' ns each' not in second.log
