"""Metrics for Prometheus: --metrics.

client - r1 - r2 - r3 - r4 - server        a probe with TTL k ends at lab.hop(version, k)
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from elf.findings import PathRewrites
from elf.metrics import BUCKETS, IDLE, Exporter, Metrics, listen
from elf.rows import Record
from elf.summary import Summary
from elf.usage import Failure
from lab import Host, end, nft_table, wait_until
from runs import ELFPROBE, HOPS, TCP, TRANSFER, Run, both, elfprobe, inside, with_change

prometheus_client = pytest.importorskip('prometheus_client')

from prometheus_client.openmetrics.parser import text_string_to_metric_families  # noqa: E402

root = pytest.mark.root

DOCS = ELFPROBE.with_name('docs')
SECOND = 10**9  # ns
OPEN_METRICS = 'application/openmetrics-text; version=1.0.0'
PORT = 9817  # in namespaces of the tests' own


def parsed(text: str) -> dict[str, Any]:
    """The metrics of a scrape, by their names."""
    return {family.name: family for family in text_string_to_metric_families(text)}


def values(text: str, name: str, *labels: str) -> dict[Any, float]:
    """The samples of this name, by the values of some labels."""
    found: dict[Any, float] = {}
    for family in parsed(text).values():
        for sample in family.samples:
            if sample.name == name:
                key = tuple(sample.labels[label] for label in labels)
                assert key not in found
                found[key] = sample.value
    return found


BY_HOP = 'elfprobe_probes_total', 'destination', 'hop'


# One exporter, asked over the loopback interface


def response(data: bytes) -> tuple[int, str]:
    """Status and body."""
    head, _, body = data.partition(b'\r\n\r\n')
    length = re.search(rb'\r\nContent-Length: (\d+)', head)
    assert not length or int(length[1]) in (len(body), len(body) or int(length[1]))
    return int(head.split()[1]), body.decode()


def ask(
    port: int, request: str = f'GET /metrics HTTP/1.1\r\nHost: a\r\nACCEPT:{OPEN_METRICS}\r\n\r\n'
) -> tuple[int, str]:
    with socket.create_connection(('127.0.0.1', port), timeout=30) as connection:
        connection.sendall(request.encode())
        data = b''
        while part := connection.recv(1 << 20):
            data += part
    return response(data)


class Serving:
    """An exporter, and a thread in elfprobe's place, which gives it snapshots."""

    def __init__(self, series_max: int = 1000, address: str = '127.0.0.1') -> None:
        self.summary, self.rewrites = Summary(), PathRewrites()
        self.exporter = Exporter(address, 0)
        facts = {'interface': 'eth0', 'version': '1'}
        self.metrics = Metrics(self.exporter, facts, self.summary, series_max)
        self.is_stuck = False
        self.snapshots = 0
        self._has_ended = False
        self._thread = threading.Thread(target=self._answer)

    def __enter__(self) -> Serving:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._has_ended = True
        self._thread.join()
        self.exporter.close()

    def _figures(self) -> Any:
        self.snapshots += 1
        return self.rewrites.findings(), {'bpf': {'probes': 7}, 'user': {'replies': 5}}

    def _answer(self) -> None:
        while not self._has_ended:
            if not self.is_stuck:
                self.metrics.answer(self._figures, 0.001)
            time.sleep(0.01)

    @property
    def port(self) -> int:
        return self.exporter.port

    @property
    def process(self) -> psutil.Process:
        [found] = [child for child in psutil.Process().children() if 'elf.exporter' in ' '.join(child.cmdline())]
        return found


def probe(dest: str, hop: int, latency: int, sent: int = 0, responder: str = '', **more: Any) -> Record:
    """A probe; -1 is the latency of one without an answer."""
    who = (responder or f'192.0.2.{hop}') if latency >= 0 else ''
    return Record(dest, 1, 443, TCP, hop, sent, latency, who, **more)


def test_figures_of_made_up_probes() -> None:
    """Each probe is counted once, in the right bucket, in both formats; hops, findings and TCP beside them."""
    with Serving() as serving:
        tcp = dict(srtt=900, cwnd=10, outtos=0, intos=0)
        for latency in 50_000, 50_001, 5 * SECOND, 6 * SECOND:
            serving.summary.note(probe('198.51.100.9', 1, latency, retrans=3, **tcp))
        for number in range(40):
            serving.summary.note(probe('198.51.100.9', 3, 10**6 if number % 2 else -1, retrans=4, **tcp))
        serving.summary.note(probe('2001:db8::9', 2, 10**6, responder='2001:db8::"\\2'))
        serving.rewrites.note(probe('198.51.100.9', 3, 10**6, outtos=0, intos=8))
        status, text = ask(serving.port)
        plain_status, plain = ask(serving.port, 'GET /metrics?x=1 HTTP/1.0\r\n\r\n')
    assert (status, plain_status) == (200, 200)
    assert [line for line in plain.splitlines() if line.startswith('elfprobe_probes_total')] == [
        line for line in text.splitlines() if line.startswith('elfprobe_probes_total')
    ]
    assert text.endswith('# EOF\n') and '# EOF' not in plain
    name = 'elfprobe_hop_latency_seconds'
    buckets = values(text, f'{name}_bucket', 'destination', 'hop', 'responder', 'le')
    cumulative = [int(count) for (_, hop, _, _), count in buckets.items() if hop == '1']
    assert cumulative == [1, *[2] * (len(BUCKETS) - 2), 3, 4]
    assert ('2001:db8::9', '2', '2001:db8::"\\2', '+Inf') in buckets
    assert values(text, f'{name}_sum', 'hop')['1',] == pytest.approx(11.000100001)
    assert values(text, f'{name}_count', 'hop') == {('1',): 4, ('2',): 1, ('3',): 20}
    assert values(text, 'elfprobe_probes_total', 'hop') == {('1',): 4, ('2',): 1, ('3',): 40}
    assert values(text, 'elfprobe_probes_answered_total', 'hop') == {('1',): 4, ('2',): 1, ('3',): 20}
    assert {*values(text, 'elfprobe_hop_info', 'destination', 'hop', 'previous')} == {
        ('198.51.100.9', '1', '0'), ('198.51.100.9', '3', '1'), ('2001:db8::9', '2', '0'),
    }  # fmt: skip
    assert values(text, 'elfprobe_findings', 'hop', 'kind') == {('3', 'none_behind'): 1, ('3', 'rewrite'): 1}
    assert values(text, 'elfprobe_tcp_srtt_seconds_count', 'destination') == {('198.51.100.9',): 44}
    assert values(text, 'elfprobe_tcp_congestion_window_segments', 'interface') == {('eth0',): 10}
    assert values(text, 'elfprobe_tcp_retransmitted_segments_total', 'interface') == {('eth0',): 1}
    assert values(text, 'elfprobe_bpf_events_total', 'counter') == {('probes',): 7}
    assert values(text, 'elfprobe_user_events_total', 'counter') == {('replies',): 5}
    assert values(text, 'elfprobe_info', 'version') == {('1',): 1}
    assert values(text, 'process_resident_memory_bytes')[()] > 10**7


def test_series_are_bounded(caplog: pytest.LogCaptureFixture) -> None:
    """A destination keeps its place until it is idle and others want it. The log says once that some have none."""
    with Serving(series_max=5) as serving:
        note = serving.summary.note
        for number in 1, 2, 3:
            for hop in 1, 2:
                note(probe(f'198.51.100.{number}', hop, 1000 if hop == 1 else -1, sent=number, srtt=1, cwnd=1))
        text = ask(serving.port)[1]
        assert values(text, 'elfprobe_metrics_series') == {(): 4}
        assert values(text, 'elfprobe_metrics_series_max') == {(): 5}
        assert values(text, 'elfprobe_metrics_destinations_left_out') == {(): 1}
        for name in 'elfprobe_probes_total', 'elfprobe_responder_changes_total':
            assert {dest for dest, _ in values(text, name, 'destination', 'hop')} == {
                '198.51.100.1',
                '198.51.100.2',
            }
        assert len(values(text, 'elfprobe_tcp_srtt_seconds_count', 'destination')) == 2
        note(probe('198.51.100.3', 1, 1000, sent=3, responder='192.0.2.8'))  # more probes take nobody's place
        note(probe('198.51.100.4', 1, 1000, sent=1))
        wait_until(lambda: values(ask(serving.port)[1], 'elfprobe_metrics_series') == {(): 5}, 5, 'one more')
        assert values(ask(serving.port)[1], 'elfprobe_metrics_destinations_left_out') == {(): 1}
        for number, sent in (2, IDLE * 10**9), (3, (IDLE + 2) * 10**9):
            note(probe(f'198.51.100.{number}', 1, 1000, sent=sent))
        probes = {('198.51.100.2', '1'): 2, ('198.51.100.3', '1'): 3}
        probes.update({(f'198.51.100.{number}', '2'): 1 for number in (2, 3)})
        wait_until(lambda: values(ask(serving.port)[1], *BY_HOP) == probes, 5, 'those that are idle have gone')
    assert len([line for line in caplog.messages if 'more than 5 combinations' in line]) == 1


def fill(serving: Serving) -> None:
    """Make the text megabytes long."""
    for number in range(1000):
        serving.summary.note(probe(f'198.51.{number // 10}.1', number % 10 + 1, 1000))


def test_slow_and_hostile_scrapers() -> None:
    """They get their own answers, or none. Others are answered at once meanwhile, and memory stays bounded."""
    with Serving() as serving, ExitStack() as stack:
        fill(serving)
        assert len(ask(serving.port)[1]) > 2_000_000

        def hold(data: bytes, times: int) -> list[socket.socket]:
            held = [
                stack.enter_context(socket.create_connection(('127.0.0.1', serving.port))) for _ in range(times)
            ]
            for connection in held:
                connection.sendall(data)
            return held

        slow = hold(b'GET /metrics HTTP/1.1\r\nHost', 20)
        mute = hold(b'GET /metrics HTTP/1.1\r\n\r\n', 20)  # reads nothing
        began = time.monotonic()
        before = serving.snapshots
        for _ in range(20):
            assert ask(serving.port)[0] == 200
        took = time.monotonic() - began
        assert took < 4 and serving.snapshots - before <= took + 1, (took, serving.snapshots - before)
        for data, status in {
            b'GET /metrics HTTP/1.1\r\nX: ' + b'a' * 9000 + b'\r\n\r\n': 431,
            b'GET /metrics HTTP/1.1\r\nX: ' + b'a' * 70000: 431,
            b'\r\n\r\n': 400,
            b'\x16\x03\x01\x00\r\n\r\n': 400,
            b'GET /metrics\r\n\r\n': 400,
            b'GET / HTTP/1.1\r\n\r\n': 404,
            b'GET /../metrics HTTP/1.1\r\n\r\n': 404,
            b'POST /metrics HTTP/1.1\r\n\r\n': 405,
            b'HEAD /metrics HTTP/1.1\r\n\r\n': 200,
        }.items():
            with socket.create_connection(('127.0.0.1', serving.port)) as connection:
                connection.sendall(data)
                assert connection.recv(100).startswith(b'HTTP/1.1 %d ' % status), data[:40]
        drip = hold(b'', 1)[0]
        with pytest.raises(OSError):  # each byte is in time, the whole never
            for _ in range(1000):
                drip.sendall(b'a')
                time.sleep(0.01)
        for connection in slow:  # each had its time
            connection.settimeout(10)
            assert connection.recv(100) == b''
        many = hold(b'', 100)  # the oldest ones make room
        assert ask(serving.port)[0] == 200
        assert many[0].recv(1) == b''
        del mute
        assert serving.process.memory_info().rss < 150 << 20
        assert serving.process.num_fds() < 100


def test_elfprobe_that_is_stuck_or_gone() -> None:
    with Serving() as serving:
        assert ask(serving.port)[0] == 200
        process = serving.process
        serving.is_stuck = True
        wait_until(lambda: ask(serving.port)[0] == 503, 10, 'no old figures are given')
        serving.is_stuck = False
        assert ask(serving.port)[0] == 200
        process.suspend()  # which keeps nobody from ending
    assert not process.is_running()


def test_exporter_that_is_gone(caplog: pytest.LogCaptureFixture) -> None:
    """The log says so once; elfprobe goes on."""
    with Serving() as serving:
        serving.process.kill()
        wait_until(lambda: 'metrics are not served any more' in caplog.text, 5, 'the log says so')
    assert caplog.text.count('not served') == 1


def test_addresses() -> None:
    """Whose socket it is; a port that somebody has is named."""
    for address in '::1', '::', '0.0.0.0':
        with closing(listen(address, 0)) as listener:
            port = listener.getsockname()[1]
            for own in ('127.0.0.1', '::1'):
                kind = socket.AF_INET6 if ':' in own else socket.AF_INET
                with socket.socket(kind) as client:
                    reached = client.connect_ex((own, port)) == 0
                assert reached == (address == '::' or address.count(':') == own.count(':')), (address, own)
            shown = f'[{address}]:{port}' if ':' in address else f'{address}:{port}'
            with pytest.raises(Failure, match=re.escape(f'cannot listen on {shown}: Address already in use')):
                listen(address, port)


# Runs

SINK = """
import socket, sys
listener = socket.create_server((sys.argv[1], 5001))
connection = listener.accept()[0]
while connection.recv(100000):
    pass
"""
HAMMER = """
import socket, sys
while True:
    for accept in 'text/plain', 'application/openmetrics-text':
        with socket.create_connection(('::1', 9817)) as connection:
            connection.sendall(f'GET /metrics HTTP/1.1\\r\\nAccept: {accept}\\r\\n\\r\\n'.encode())
            while connection.recv(1 << 20):
                pass
"""


def scrape(host: Host, address: str = '[::1]') -> str:
    url = f'http://{address}:{PORT}/metrics'
    return host.run('curl', '-gsSf', '-H', f'Accept: {OPEN_METRICS}', url).stdout


@root
@pytest.mark.needs('curl')
@pytest.mark.sample
def test_metrics_of_a_run(lab4, tmp_path):
    """What they say is what the rows say, while others scrape without pause; the document names them all."""
    client, server = lab4.client, lab4.server_address(4)
    with ExitStack() as stack:
        stack.callback(client.end_processes)
        stack.callback(lab4.server.end_processes)
        lab4.server.popen(sys.executable, '-c', SINK, server)
        wait_until(lambda: lab4.server.listens(5001), 10, 'the sink listens')
        silent = 'chain mute { type filter hook output priority 0; icmp type time-exceeded drop; }'
        stack.enter_context(nft_table(lab4.routers[2], silent))
        run = stack.enter_context(elfprobe(lab4, '--metrics', f'[::1]:{PORT}', '-d', *both(lab4), cwd=tmp_path))
        assert f'metrics are at http://[::1]:{PORT}/metrics' in run.log
        assert rights(exporter_of(run).pid) == (65534, 0)
        hammer = client.popen(sys.executable, '-c', HAMMER)
        transfer = client.popen(sys.executable, '-c', TRANSFER, server)
        ping = client.popen('ping', '-nq', '-i.01', lab4.server_address(6), stdout=subprocess.DEVNULL)
        wait_until(lambda: len(run.rows()) > 1000, 30, 'rows')
        for process in transfer, ping:
            end(process)
        wait_until(lambda: is_settled(scrape(client)), 20, 'each probe has ended')
        assert hammer.poll() is None
        end(hammer)
        text = scrape(client)
        assert client.run('curl', '-s', f'http://127.0.0.1:{PORT}/metrics', check=False).returncode == 7  # refused
    rows = run.rows()
    probes = Counter((row.dest, str(row.outttl)) for row in rows)
    answered = Counter((row.dest, str(row.outttl), row.responder) for row in rows if row.is_answered)
    latencies = Counter()
    for row in rows:
        if row.is_answered:
            latencies[row.dest, str(row.outttl), row.responder] += row.latency / SECOND
    assert values(text, *BY_HOP) == probes
    name, labels = 'elfprobe_hop_latency_seconds', ('destination', 'hop', 'responder')
    assert values(text, f'{name}_count', *labels) == answered
    assert values(text, f'{name}_sum', *labels) == pytest.approx(latencies)
    assert values(text, f'{name}_bucket', *labels, 'le') == {
        (*key, le): sum(
            row.is_answered
            and (row.dest, str(row.outttl), row.responder) == key
            and row.latency <= float(le) * SECOND
            for row in rows
        )
        for key in answered
        for le in [*(repr(bound / SECOND) for bound in BUCKETS), '+Inf']
    }
    assert [*values(text, 'elfprobe_hop_info', 'destination', 'hop', 'previous')] == [
        *((server, hop, before) for hop, before in (('1', '0'), ('2', '1'), ('4', '2'))),  # the third one is silent
        *((lab4.server_address(6), str(hop), str(hop - 1)) for hop in HOPS),
    ]
    assert values(text, 'elfprobe_bpf_events_total', 'counter')['probes',] == len(rows) == run.counters['probes']
    assert run.counters['results_lost'] == 0 and 'no probes for' not in run.log
    srtt = values(text, 'elfprobe_tcp_srtt_seconds_count', 'destination')
    assert list(srtt) == [(server,)] and 0 < srtt[server,] <= sum(row.protocol == TCP for row in rows)
    assert values(text, 'elfprobe_info', 'interface', 'hook', 'mode')['eth0', 'tc', 'tcx'] == 1
    check_document(text)


def exporter_of(run: Run) -> psutil.Process:
    """The process that serves the metrics."""
    [found] = [
        each for each in psutil.Process(run.process.pid).children() if 'elf.exporter' in ' '.join(each.cmdline())
    ]
    return found


def rights(pid: int) -> tuple[int, int]:
    """A process's user, and the capabilities that it could have."""
    status = Path(f'/proc/{pid}/status').read_text()
    return int(re.findall(r'^Uid:\t(\d+)', status, re.MULTILINE)[0]), int(
        re.findall(r'^CapPrm:\t(\w+)', status, re.MULTILINE)[0], 16
    )


def is_settled(text: str) -> bool:
    counters = values(text, 'elfprobe_bpf_events_total', 'counter')
    ended = values(text, 'elfprobe_user_events_total', 'counter')
    return counters['probes',] == ended['replies',] + ended['unanswered',]


def check_document(text: str) -> None:
    """The table in docs/metrics.md has each metric of a scrape, with type and labels, and no others."""
    table = re.findall(r'^\| `(\w+)` \| (\w+) \|(.*?)\| .+ \|$', (DOCS / 'metrics.md').read_text(), re.MULTILINE)
    documented = {name: (kind, {*re.findall(r'`(\w+)`', labels)}) for name, kind, labels in table}
    suffix = {'counter': '_total', 'info': '_info'}
    found = {}
    for family in parsed(text).values():
        labels = {label for sample in family.samples for label in sample.labels} - {'interface', 'le'}
        found[family.name + suffix.get(family.type, '')] = family.type, labels
    assert documented.pop('elfprobe_findings') == ('gauge', {'destination', 'hop', 'kind'})
    found.pop('elfprobe_findings')  # there may be none
    assert found == documented


HIDDEN = with_change("sys.path[:] = [path for path in sys.path if 'packages' not in path]")


@root
def test_no_metrics(lab4, tmp_path):
    """Without the package, and where somebody has the port: one line, and nothing is attached or written."""
    arguments = str(ELFPROBE), '-i', 'eth0', '--metrics', str(PORT), lab4.server_address(4)
    ended = lab4.client.run(*HIDDEN, sys.executable, *arguments, cwd=tmp_path, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr.count('\n')) == (1, '', 1), ended.stderr
    assert 'no module prometheus_client: apt install python3-prometheus-client' in ended.stderr
    with inside(lab4.client):
        taken = socket.create_server(('127.0.0.1', PORT))
    with taken:
        ended = lab4.client.run(sys.executable, *arguments, cwd=tmp_path, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr.count('\n')) == (1, '', 1), ended.stderr
    assert f'argument --metrics: cannot listen on 127.0.0.1:{PORT}: Address already in use' in ended.stderr
    assert list(tmp_path.iterdir()) == []
