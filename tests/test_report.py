"""FILEBASE.json, and how CLOCK_MONOTONIC maps to UTC.

client - r1 - r2 - r3 - r4 - server        a probe with TTL k ends at lab.hop(version, k)
"""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from elf.clock import Clock, utc_ns, utc_text
from elf.findings import PathRewrites
from elf.processes import ProcessLog
from elf.report import Report
from elf.rows import Record
from elf.summary import Summary
from lab import wait_until
from runs import ELFPROBE, HOPS, TCP, VERSIONS, both, elfprobe, read_rows, with_change

root = pytest.mark.root

DOCS = ELFPROBE.with_name('docs')
SECOND = 10**9  # ns
EPOCH = 1793995200 * SECOND  # 2026-11-06T20:00:00Z
KEYS = """schema elfprobe command host kernel bcc interfaces started ended monotonic_zero monotonic_zeros counters
processes destinations findings files"""


def check_schema(report: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip('jsonschema')
    schema = json.loads((DOCS / 'report.schema.json').read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.Draft7Validator(schema).validate(report)


def utc_of(text: str) -> float:
    """Seconds from 1970, read by other means than elfprobe's."""
    return datetime.strptime(text, '%Y-%m-%dT%H:%M:%S.%fZ').replace(tzinfo=timezone.utc).timestamp()


# The clock, by readings of it that are made up: no test may set that of the machine


class Clocks:
    """Three clocks, each of which the test moves."""

    def __init__(self) -> None:
        self.monotonic, self.realtime, self.boottime = 5000 * SECOND, EPOCH, 5000 * SECOND
        self.clock = Clock(lambda: self.monotonic, lambda: self.realtime, lambda: self.boottime)

    def passes(self, seconds: float, *, asleep: float = 0, step: float = 0) -> str:
        self.monotonic += round(seconds * SECOND)
        self.boottime += round((seconds + asleep) * SECOND)
        self.realtime += round((seconds + asleep + step) * SECOND)
        return self.clock.check()


@pytest.mark.parametrize(
    'moved, said',
    [
        ({}, ''),
        ({'step': 0.0009}, ''),
        ({'step': 0.0011}, 'the clock was set forward by 0.001 s'),
        ({'step': -3600}, 'the clock was set back by 3600.000 s'),
        ({'asleep': 30000}, 'the machine slept for 30000.000 s'),
        ({'asleep': 60, 'step': -0.25}, 'the machine slept for 60.000 s, the clock was set back by 0.250 s'),
    ],
)
def test_clock_that_moves(moved: dict[str, float], said: str) -> None:
    clocks = Clocks()
    zero = EPOCH - 5000 * SECOND
    assert clocks.passes(10) == ''
    assert clocks.passes(10, **moved) == said
    assert clocks.passes(10) == ''
    assert len(clocks.clock.mappings) == (2 if said else 1)
    at = [clocks.clock.utc(seconds * SECOND) for seconds in (5015, 5025)]
    later = round(sum(moved.values()) * SECOND) if said else 0
    assert at == [zero + 5015 * SECOND, zero + later + 5025 * SECOND]


def test_small_steps_add_up_and_many_are_bounded() -> None:
    clocks = Clocks()
    said = [clocks.passes(1, step=0.0004) for _ in range(5000)]
    assert said[:4] == ['', '', 'the clock was set forward by 0.001 s', '']
    assert len(clocks.clock.mappings) <= 1001
    assert abs(clocks.clock.utc(clocks.monotonic) - clocks.realtime) < 2 * 10**6
    assert clocks.clock.utc(0) == EPOCH - 5000 * SECOND


def test_times_as_text() -> None:
    assert utc_text(EPOCH + 1234) == '2026-11-06T20:00:00.000001Z'
    assert utc_ns(utc_text(EPOCH + 123456000)) == EPOCH + 123456000
    assert utc_ns('2026-11-06T20:00:00Z') == EPOCH
    for text in '', '2026-11-06', '2026-13-06T20:00:00Z', '2026-11-06T20:00:00+01:00':
        with pytest.raises(ValueError):
            utc_ns(text)


# The object


def made_up(*probes: Record) -> dict[str, Any]:
    """The report on these probes."""
    summary, rewrites = Summary({'192.0.2.1': 'one.example'}.get), PathRewrites()
    for probe in probes:
        summary.note(probe)
        if probe.responder:
            rewrites.note(probe)
    facts = dict(elfprobe='1', command=['-i', 'eth0\udcff'], host='h', kernel='k', bcc='b')
    interfaces = [{'name': 'eth0', 'hook': 'tc', 'mode': 'tcx'}]
    report = Report({**facts, 'interfaces': interfaces}, Clocks().clock, summary, rewrites, ProcessLog())
    pieces = report.pieces({'probes': len(probes)}, ['elf.csv'], has_ended=False)
    found: dict[str, Any] = json.loads(''.join(pieces))
    check_schema(found)
    return found


def test_report_on_nothing() -> None:
    found = made_up()
    assert set(found) == set(KEYS.split())
    assert (found['destinations'], found['findings'], found['processes']) == ([], [], [])
    assert found['ended'] is None and found['monotonic_zero'] == '2026-11-06T18:36:40.000000Z'


def test_report_on_flows() -> None:
    """Each probe is counted once by hop and once by flow and hop; findings are data."""
    tcp: dict[str, Any] = dict(
        protocol=TCP, app='"a ""b"", c"', pid=2**22 + 1, srtt=900, cwnd=10, outtos=0, intos=0,
        source='192.0.2.77'
    )  # fmt: skip

    def probe(sent: int, sport: int, hop: int, latency: int, **more: Any) -> Record:
        responder = f'192.0.2.{hop}' if latency >= 0 else ''
        fields = dict(dest='198.51.100.9', dport=443, sendtime=sent, outttl=hop, latency=latency)
        return Record(**{**tcp, **fields, 'sport': sport, 'responder': responder, **more})

    found = made_up(
        *(probe(sent, 1, 1, 1000 + sent, retrans=3 + sent, origseq=1000 * sent) for sent in range(50)),
        *(probe(100 + sent, 2, 2, 5000 if sent % 2 else -1, intos=8, origseq=sent) for sent in range(50)),
    )
    [destination] = found['destinations']
    one, two = destination['hops']
    assert (destination['probes'], destination['answered']) == (100, 75)
    assert (one['latency']['minimum'], one['latency']['maximum'], two['answered']) == (1000, 1049, 25)
    assert one['responders'] == [{'address': '192.0.2.1', 'name': 'one.example', 'answered': 50}]
    assert destination['tcp']['srtt']['median'] == 900000
    assert (destination['tcp']['retransmitted'], destination['tcp']['retransmitted_before']) == (49, 3)
    first, second = destination['flows']
    assert (first['app'], first['pid'], first['sport'], first['probes']) == ('a "b", c', 2**22 + 1, 1, 50)
    assert first['source'] == '192.0.2.77'
    assert first['hops'] == [
        dict(
            hop=1,
            probes=50,
            answered=50,
            latency=dict(minimum=1000, mean=1024, maximum=1049),
            responder='192.0.2.1',
        )
    ]
    assert (second['hops'][0]['probes'], second['hops'][0]['answered']) == (50, 25)
    assert [process['pid'] for process in found['processes']] == [2**22 + 1]
    kinds = {finding['kind']: finding for finding in found['findings']}
    assert set(kinds) == {'none_behind', 'rewrite'}
    assert kinds['none_behind']['figures'] == {'share': 0.5, 'retransmitted': 49, 'tcp_agrees': True}
    assert kinds['rewrite']['sentence'].startswith('to 198.51.100.9: DSCP/ECN 0x00 becomes 0x08 before hop 2')


def test_each_key_is_explained() -> None:
    def keys(schema: object) -> set[str]:
        if isinstance(schema, list):
            return set().union(*map(keys, schema))
        if not isinstance(schema, dict):
            return set()
        own = set(schema.get('properties', ()))
        return own.union(*map(keys, schema.values()))

    document = (DOCS / 'report.md').read_text()
    named = keys(json.loads((DOCS / 'report.schema.json').read_text()))
    assert {key for key in named if f'`{key}`' not in document} == set()


# Runs


# The clock of the machine seems to be set as soon as there is a file of this name, and FILEBASE.json is soon new.
STEPPED = with_change("""
import time
elfprobe.JSON_EVERY, real = 0.2, time.time_ns
time.time_ns = lambda: real() + (7_250_000_000 if os.path.exists('stepped') else 0)
""")


def current(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def ended(report: dict[str, Any], pid: int) -> bool:
    return any(process['ended'] for process in report['processes'] if process['pid'] == pid)


@root
@pytest.mark.sample
def test_report_of_a_run(lab4, tmp_path):
    """What it says is what the rows say; while it is written again and again, and after the clock was set."""
    (tmp_path / 'elf.json').write_text('old')
    path, server = tmp_path / 'elf.json', lab4.server_address(4)
    via = lab4.client.command('env', 'SUDO_UID=1234', 'SUDO_GID=2345', *STEPPED)
    with elfprobe(lab4, '-l', '-a', 'ping', *both(lab4), cwd=tmp_path, via=via) as run:
        first = current(path)
        assert (first['destinations'], first['ended'], first['files']) == ([], None, [])
        assert (tmp_path / 'elf.1.json').read_text() == 'old' and 'elf.json that was there is now' in run.log
        with lab4.client.popen('ping', '-nq', '-i.01', server, stdout=subprocess.DEVNULL) as ping:
            wait_until(lambda: current(path)['counters']['probes'] > 50, 20, 'it is written again')
            check_schema(current(path))
            (tmp_path / 'stepped').touch()
            wait_until(lambda: 'the clock was set forward by 7.2' in run.log, 5, 'the log says so')
            stepped = time.monotonic_ns()
            wait_until(lambda: run.rows() and run.rows()[-1].sendtime > stepped + SECOND, 10, 'rows behind it')
            ping.kill()
        wait_until(lambda: ended(current(path), ping.pid), 20, 'the process has ended')
        assert run.stop() == 0
    report, rows = current(path), run.rows()
    check_schema(report)
    owners = {name: (tmp_path / name).stat().st_uid for name in ('elf.csv', 'elf.json', 'elf.log')}
    assert owners == dict.fromkeys(owners, 1234)
    assert sorted(file.name for file in tmp_path.iterdir() if file.name.startswith('.')) == []

    # The first lines of the log, and the same as data
    lines = (tmp_path / 'elf.log').read_text().splitlines()
    assert run.log.splitlines()[:4] == lines[:4]
    command = ['-i', 'eth0', '-l', '-a', 'ping', *both(lab4)]
    heading = re.fullmatch(r'\S+ (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) [+-]\d{4} \(\w+\): elfprobe.py (.*)', lines[0])
    assert heading and shlex.split(heading[2]) == report['command'] == command
    versions = f'elfprobe {report["elfprobe"]}, {report["host"]}, Linux {report["kernel"]}, BCC {report["bcc"]}'
    assert lines[1].endswith(versions)
    assert lines[2][13:].startswith('eth0 (veth): 10.0.1.1/24, fd00:e1f:1::1/64')
    assert lines[3].endswith(f'CLOCK_MONOTONIC 0 is {report["monotonic_zero"]}')
    assert (report['interfaces'][0]['name'], report['interfaces'][0]['hook']) == ('eth0', 'tc')

    # Times
    zero, moved = report['monotonic_zeros']
    assert zero['utc'] == report['monotonic_zero']
    assert abs(utc_of(zero['utc']) + time.monotonic() - time.time()) < 0.1
    assert utc_of(moved['utc']) - utc_of(zero['utc']) == pytest.approx(7.25, abs=0.01)
    assert stepped - SECOND < moved['since'] < stepped
    assert abs(utc_of(report['ended']) - 7.25 - time.time()) < 10 and report['started'] < report['ended']

    # Figures
    [destination] = [each for each in report['destinations'] if each['address'] == server]
    rows = [row for row in rows if row.dest == server]
    assert destination['probes'] == len(rows)
    for hop in destination['hops']:
        latencies = [row.latency for row in rows if row.outttl == hop['hop'] and row.is_answered]
        assert (hop['answered'], hop['responders'][0]['address']) == (len(latencies), lab4.hop(4, hop['hop']))
        assert (hop['latency']['minimum'], hop['latency']['maximum']) == (min(latencies), max(latencies))
    assert [hop['hop'] for hop in destination['hops']] == [*HOPS]
    [flow] = destination['flows']
    assert (flow['app'], flow['pid'], flow['sport'], flow['protocol']) == ('ping', ping.pid, rows[0].sport, 1)
    assert {hop['hop']: hop['probes'] for hop in flow['hops']} == Counter(row.outttl for row in rows)
    [process] = [each for each in report['processes'] if each['pid'] == ping.pid]  # other tests have theirs
    assert (process['pid'], process['name'], process['parent']) == (ping.pid, 'ping', process['parent'])
    assert utc_of(report['started']) < utc_of(process['started']) + 0.02  # the kernel counts it in ticks
    assert process['started'] < process['ended'] < report['ended']
    assert report['counters']['probes'] == len(rows) and report['files'] == ['elf.csv']

    # elfplot.py takes the right mapping for each time
    pytest.importorskip('numpy')
    from elf.sources import sources_of, span_of

    sources, notes = sources_of([str(tmp_path / 'elf.csv')])
    assert notes == [] and sources[0].host == report['host']
    (first, last), (before, after) = sources[0].files[0][0].span, span_of(sources, True)
    assert after - before == pytest.approx(last - first + 7.25 * SECOND, abs=1e7)


@root
@pytest.mark.needs('jq')
def test_report_on_standard_output(lab4, tmp_path):
    """In place of the tables, the same as in the file, and as the document's examples read it."""
    ping = lab4.client.popen('ping', '-nq', '-i.01', lab4.server_address(6), stdout=subprocess.DEVNULL)
    command = [sys.executable, str(ELFPROBE), '-i', 'eth0', '--json', '-n', '--duration', '1', *both(lab4)]
    ended = lab4.client.run(*command, cwd=tmp_path)
    ping.kill()
    assert ended.stdout == (tmp_path / 'elf.json').read_text()
    assert 'latency in ms' not in ended.stderr and ' unanswered' in ended.stderr
    examples = re.findall(r'^jq .* elf\.json$', (DOCS / 'report.md').read_text(), re.MULTILINE)
    results = [subprocess.run(shlex.split(line), cwd=tmp_path, capture_output=True, text=True) for line in examples]
    assert [result.stderr for result in results] == [''] * 4
    medians = [line.split('\t') for line in results[0].stdout.splitlines()]
    assert [(dest, int(hop)) for dest, hop, _ in medians] == [(lab4.server_address(6), hop) for hop in HOPS]
    assert all(0 < float(median) < 1000 for *_, median in medians)
    assert len(results[1].stdout.splitlines()) == 1
    assert results[2].stdout in ('false\n', 'true\n') and results[2].returncode == (results[2].stdout == 'false\n')


@root
def test_report_after_sigkill(lab4, tmp_path):
    """It is whole and nearly new; beside it lies at most one that was being written."""
    path = tmp_path / 'elf.json'
    with elfprobe(lab4, *both(lab4), cwd=tmp_path, via=lab4.client.command(*STEPPED)) as run:
        for version in VERSIONS:
            lab4.client.popen('ping', '-nq', '-i.01', lab4.server_address(version), stdout=subprocess.DEVNULL)
        wait_until(lambda: len(run.rows()) > 200, 20, 'rows')
        wait_until(lambda: current(path)['counters']['probes'] > 200, 5, 'the report knows them')
        run.process.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
    lab4.client.end_processes()
    report = current(path)
    check_schema(report)
    assert report['ended'] is None and len(report['destinations']) == 2
    assert len([file for file in tmp_path.iterdir() if file.name.startswith('.')]) <= 1


@root
def test_report_takes_its_time(lab4, tmp_path):
    """One that takes more than its share of a processor is written again later. At the end it is complete."""
    server, versions = lab4.server_address(4), set()
    change = 'elfprobe.JSON_EVERY, elfprobe.JSON_SHARE = 0.01, 1e-6'
    with elfprobe(lab4, server, cwd=tmp_path, via=lab4.client.command(*with_change(change))) as run:
        lab4.client.popen('ping', '-nq', '-i.01', server, stdout=subprocess.DEVNULL)

        def has_rows() -> bool:
            versions.add((tmp_path / 'elf.json').stat().st_mtime_ns)
            return len(run.rows()) > 100

        wait_until(has_rows, 20, 'rows')
        assert run.stop() == 0
    lab4.client.end_processes()
    assert len(versions) <= 2
    assert current(tmp_path / 'elf.json')['counters']['probes'] == len(run.rows())


@root
def test_report_whose_name_somebody_took(lab4, tmp_path):
    """Another run's file is not replaced; one that somebody removed is written again."""
    path, server = tmp_path / 'elf.json', lab4.server_address(4)
    with elfprobe(lab4, server, cwd=tmp_path, via=lab4.client.command(*STEPPED)) as run:
        path.unlink()
        wait_until(path.exists, 5, 'it is written again')
        path.unlink()
        path.write_text('of somebody else')
        wait_until((tmp_path / 'elf.1.json').exists, 5, 'it has another name')
        assert run.stop() == 3
    assert path.read_text() == 'of somebody else' and 'that of this run is elf.1.json' in run.log
    assert current(tmp_path / 'elf.1.json')['ended']


SMALL = 'mkdir small; mount -t tmpfs -o size=100m none small; "$@"; s=$?; cp small/* .; exit $s'


@root
def test_rows_of_a_run_in_several_files(lab4, tmp_path):
    """On a disk that they would fill within the hour."""
    via = lab4.client.command('unshare', '-m', 'sh', '-c', SMALL, 'sh')
    arguments = '-p0', '--rotate', '1', '-f', 'small/elf', *both(lab4)
    with elfprobe(lab4, *arguments, cwd=tmp_path, via=via) as run:
        for version in VERSIONS:
            lab4.client.popen('ping', '-nqf', lab4.server_address(version), stdout=subprocess.DEVNULL)
        wait_until(lambda: 'rows go to small/elf.3.csv from now on' in run.log, 60, 'two files are full')
        wait_until(lambda: 'the disk will soon be full: only ' in run.log, 20, 'the log says so')
        lab4.client.end_processes()
        (inside,) = psutil.Process(run.process.pid).children()
        inside.terminate()
        assert run.wait() == 0
    report = current(tmp_path / 'elf.json')
    assert report['files'] == ['elf.csv', *(f'elf.{number}.csv' for number in range(2, len(report['files']) + 1))]
    assert sorted(report['files']) == sorted(path.name for path in tmp_path.glob('*.csv'))
    sizes = [(tmp_path / name).stat().st_size for name in report['files']]
    assert max(sizes) <= 1 << 20 and min(sizes[:-1]) > (1 << 20) - 400
    rows = [row for name in report['files'] for row in read_rows(tmp_path / name)]
    assert len(rows) == run.summary.probes
    pytest.importorskip('numpy')
    from elf.sources import sources_of

    [source], notes = sources_of([str(tmp_path / 'elf.csv')])
    assert sum(len(part.batch) for part, _ in source.files) == len(rows)
    assert ({len(mappings) for _, mappings in source.files}, notes) == ({1}, [])
