"""What docs/fleet.md says: the service, Prometheus, Grafana, and the query over the rows of many hosts.

client - r1 - r2 - r3 - r4 - server        a probe with TTL k ends at lab.hop(version, k)
"""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Iterator
from urllib.parse import quote

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lab import Host, address, batch, end, nft_table, remove, tc, wait_until
from runs import ELFPROBE, HOPS, TRANSFER, Run, elfprobe, read_rows
from test_metrics import exporter_of, rights

root = pytest.mark.root

DOCS = ELFPROBE.with_name('docs')
UNIT = DOCS / 'elfprobe.service'
NOBODY = 65534
PORT = 9817

# Where each connection of TRANSFER ends.
SINK = """
import socket, threading
listener = socket.create_server(('', 5001))
def drain(connection):
    while connection.recv(100000):
        pass
while True:
    threading.Thread(target=drain, args=(listener.accept()[0],), daemon=True).start()
"""


def examples(language: str) -> list[str]:
    """The blocks in this language of docs/fleet.md."""
    return re.findall(rf'^```{language}\n(.*?)^```', (DOCS / 'fleet.md').read_text(), re.MULTILINE | re.DOTALL)


# The service


def setting(name: str) -> str:
    [value] = re.findall(rf'^{name}=(.*)$', UNIT.read_text(), re.MULTILINE)
    return value


def test_unit_is_valid(tmp_path: Path) -> None:
    """Each line is one of systemd's kinds, and systemd finds nothing, where it is installed."""
    lines = [line for line in UNIT.read_text().splitlines() if line and not line.startswith('#')]
    assert [
        line for line in lines if not re.fullmatch(r'\[(Unit|Service|Install)\]|[A-Z][A-Za-z]+=\S.*', line)
    ] == []
    if shutil.which('systemd-analyze'):
        shutil.copy(UNIT, tmp_path)
        verify = 'systemd-analyze', 'verify', '--recursive-errors=no', str(tmp_path / UNIT.name)
        told = subprocess.run(verify, capture_output=True, text=True)
        assert [line for line in told.stderr.splitlines() if UNIT.name in line] == []


@pytest.fixture
def nobodys() -> Iterator[Path]:
    """A folder of nobody's, with what nobody may read."""
    with tempfile.TemporaryDirectory(prefix='elf-') as directory:
        os.chown(directory, NOBODY, NOBODY)
        opt = Path(directory, 'opt')
        opt.mkdir()
        for name in 'elfprobe.py', 'elfprobe.c', 'elfhooks.c':
            shutil.copy(ELFPROBE.with_name(name), opt)
        shutil.copytree(ELFPROBE.with_name('elf'), opt / 'elf')
        os.chmod(directory, 0o755)
        yield Path(directory)


@root
@pytest.mark.sample
@pytest.mark.needs('setpriv')
def test_service(lab4, nobodys):
    """As the unit starts it: its capabilities, its arguments, its signals; told as systemd is told."""
    capabilities = setting('AmbientCapabilities').lower().replace('cap_', '')
    assert setting('AmbientCapabilities') == setting('CapabilityBoundingSet')
    these = ','.join(['-all', *(f'+{name}' for name in capabilities.split())])
    held = [f'--{kind}={these}' for kind in ('inh-caps', 'ambient-caps', 'bounding-set')]
    python, script, *arguments = shlex.split(setting('ExecStart'))
    options = ['-i', 'eth0', '-l', '-a', 'ping', '-P', str(os.getpid())]  # -l, to see what becomes of the log
    at = arguments.index('$ELFPROBE_OPTIONS')
    arguments[at : at + 1] = options
    with ExitStack() as stack:
        stack.callback(lab4.client.end_processes)
        manager = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        path = str(nobodys / 'notify')
        manager.bind(path)
        os.chmod(path, 0o777)
        manager.settimeout(60)
        ping = lab4.client.popen('ping', '-nq', '-i.01', lab4.server_address(4), stdout=subprocess.DEVNULL)
        log = stack.enter_context(tempfile.TemporaryFile())
        service = lab4.client.popen(
            'sh', '-c', 'mount -t cgroup2 none /sys/fs/cgroup; ulimit -l unlimited; exec "$@"', 'sh',
            'env', f'NOTIFY_SOCKET={path}', 'setpriv', f'--reuid={NOBODY}', f'--regid={NOBODY}', '--clear-groups',
            '--no-new-privs', *held, sys.executable, str(nobodys / 'opt' / Path(script).name), *arguments,
            cwd=nobodys, stderr=log, stdout=log,
        )  # fmt: skip
        run = Run(service, nobodys, log)
        assert python == '/usr/bin/python3' and Path(script).name == 'elfprobe.py'
        try:
            assert manager.recv(100) == b'READY=1', run.log
        except TimeoutError:
            pytest.fail(run.log)
        wait_until(lambda: 'probing on' in run.log, 10, 'the log, which another thread writes, says so')
        exporter = exporter_of(run).pid
        assert rights(exporter) == (NOBODY, 0)
        assert [manager.recv(100) for _ in range(3)] == [b'WATCHDOG=1'] * 3
        wait_until(lambda: len(run.rows()) > 20, 10, 'rows')
        # Somebody has moved the CSV, as logrotate does, but not the log.
        (nobodys / 'elf.csv').rename(nobodys / 'moved.csv')
        service.send_signal(signal.SIGHUP)
        wait_until(lambda: (nobodys / 'elf.1.log').exists(), 10, 'there is another log')
        wait_until(
            lambda: (nobodys / 'elf.csv').exists() and len(run.rows()) > 20, 10, 'there are rows in a new file'
        )
        # Nobody has; this time the new one cannot be written at first.
        os.chown(nobodys, 0, 0)
        service.send_signal(signal.SIGHUP)
        wait_until(lambda: 'the file that was there goes on' in run.log, 10, 'the log says so')
        before = len(run.rows())
        wait_until(lambda: len(run.rows()) > before, 10, 'it goes on')
        os.chown(nobodys, NOBODY, NOBODY)
        service.send_signal(signal.SIGHUP)
        wait_until(lambda: (nobodys / 'elf.1.csv').exists(), 10, 'it is renamed')
        wait_until(
            lambda: (nobodys / 'elf.csv').exists() and len(run.rows()) > 20, 10, 'there are rows in a new file'
        )
        end(ping)
        told = []
        service.send_signal(signal.SIGTERM)
        assert run.wait() == 0, run.log
        manager.setblocking(False)
        while True:
            try:
                told.append(manager.recv(100))
            except BlockingIOError:
                break
        assert told[-1] == b'STOPPING=1' and set(told[:-1]) <= {b'WATCHDOG=1'}
        run.finish()
    rows = [row for name in ('moved.csv', 'elf.1.csv', 'elf.csv') for row in read_rows(nobodys / name)]
    assert len(rows) == run.summary.probes and len({(row.dest, row.seq) for row in rows}) == len(rows)
    logs = [
        (nobodys / name).read_text() for name in ('elf.1.log', 'elf.2.log', 'elf.log') if (nobodys / name).exists()
    ]
    assert 'probing on' in logs[0] and 'latency in ms' in logs[-1]
    report = json.loads((nobodys / 'elf.json').read_text())
    assert report['files'] == ['elf.1.csv', 'elf.csv']
    traced = {process['pid'] for process in report['processes']}
    assert ping.pid in traced and exporter not in traced  # though it descends from a target, too


# Prometheus


@pytest.mark.needs('promtool')
def test_rules_and_configuration(tmp_path: Path) -> None:
    shutil.copy(DOCS / 'prometheus-rules.yml', tmp_path)
    [configuration] = examples('yaml')
    (tmp_path / 'prometheus.yml').write_text(configuration)
    for what, name in ('rules', 'prometheus-rules.yml'), ('config', 'prometheus.yml'):
        told = subprocess.run(['promtool', 'check', what, name], cwd=tmp_path, capture_output=True, text=True)
        assert told.returncode == 0, told.stdout + told.stderr


def test_dashboard_names_what_there_is() -> None:
    """Each panel asks for metrics that are documented or recorded; ids are unique and nothing overlaps."""
    dashboard = json.loads((DOCS / 'grafana-dashboard.json').read_text())
    known = {*re.findall(r'^\| `(\w+)` \|', (DOCS / 'metrics.md').read_text(), re.MULTILINE)}
    known |= {f'{name}_{part}' for name in known for part in ('bucket', 'count', 'sum')} | recorded()
    asked = {
        name for expression in expressions() for name in re.findall(r'[a-z_:0-9]*elfprobe_[a-z_:0-9]+', expression)
    }
    assert asked - known == set()
    assert len({panel['id'] for panel in dashboard['panels']}) == len(dashboard['panels'])
    cells = [
        (x, y)
        for place in (panel['gridPos'] for panel in dashboard['panels'])
        for x in range(place['x'], place['x'] + place['w'])
        for y in range(place['y'], place['y'] + place['h'])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24


def recorded() -> set[str]:
    return {*re.findall(r'- record: (\S+)', (DOCS / 'prometheus-rules.yml').read_text())}


def expressions() -> list[str]:
    """What the dashboard asks Prometheus."""
    dashboard = json.loads((DOCS / 'grafana-dashboard.json').read_text())
    return [target['expr'] for panel in dashboard['panels'] for target in panel['targets']]


@root
@pytest.mark.needs('prometheus', 'promtool', 'curl')
def test_prometheus_finds_the_slow_hop(lab4, tmp_path):
    """Two elfprobes, one at each end, in the view of one Prometheus. A queue at the third router grows."""
    client, server, slow = lab4.client, lab4.server, lab4.routers[2]
    shutil.copy(DOCS / 'prometheus-rules.yml', tmp_path)
    [configuration] = examples('yaml')
    targets = {client: f'127.0.0.1:{PORT}', server: f'[{lab4.server_address(6)}]:{PORT}'}
    configuration = re.sub(r'targets: .*', f'targets: {json.dumps([*targets.values()])}', configuration)
    configuration = configuration.replace('scrape_interval: 15s', 'scrape_interval: 1s')
    (tmp_path / 'prometheus.yml').write_text(f'global: {{evaluation_interval: 1s}}\n{configuration}')

    def ask(query: str) -> list[tuple[dict[str, str], float]]:
        url = f'http://127.0.0.1:9090/api/v1/query?query={quote(query)}'
        answer = json.loads(client.run('curl', '-gsS', url).stdout)
        assert answer['status'] == 'success', (query, answer)
        return [(each['metric'], float(each['value'][1])) for each in answer['data']['result']]

    with ExitStack() as stack:
        for host in lab4.hosts:
            stack.callback(host.end_processes)
        for host, peer in (client, server), (server, client):
            to = lab4.server_address(4) if peer is server else lab4.client_address(4)
            (tmp_path / host.name).mkdir()
            stack.enter_context(elfprobe(lab4, '--metrics', targets[host], to, cwd=tmp_path / host.name, host=host))
            host.popen('ping', '-nq', '-i.01', to, stdout=subprocess.DEVNULL)
        # What leaves the third router for the fourth waits 30 to 60 ms in its queue, which too much UDP keeps full.
        tc(slow, 'qdisc add dev eth1 root tbf rate 5mbit burst 4kb latency 60ms')
        stack.callback(tc, slow, 'qdisc del dev eth1 root')
        stack.enter_context(lab4.iperf3_server())
        client.popen('iperf3', '-ub', '6M', '-t', '100', '-c', lab4.server_address(4), stdout=subprocess.DEVNULL)
        client.popen(
            'prometheus', '--config.file=prometheus.yml', '--storage.tsdb.path=data',
            '--web.listen-address=127.0.0.1:9090', '--log.level=error', cwd=tmp_path,
        )  # fmt: skip
        wait_until(lambda: client.listens(9090), 20, 'prometheus listens')
        wait_until(lambda: [up for _, up in ask('up == 1')] == [1, 1], 20, 'it has scraped both')
        query, *_ = re.findall(r'^topk.*$', (DOCS / 'fleet.md').read_text(), re.MULTILINE)

        def slowed() -> dict[str, tuple[str, float]]:
            return {labels['instance']: (labels['hop'], added) for labels, added in ask(query)}

        wait_until(
            lambda: slowed().get(targets[client], ('', 0))[1] > 0.02, 30, 'the rules show that a hop is slow'
        )
        assert slowed()[targets[client]][0] == '4', slowed()
        # Each series of the dashboard is there, and each rule gives one.
        variables = {'$instance': '.*', '$destination': '.*'}
        for expression in [*expressions(), *recorded()]:
            for name, value in variables.items():
                expression = expression.replace(name, value)
            found = ask(expression)
            assert found or 'tcp' in expression or ' > 0' in expression, expression
        coverage = 'instance_hop:elfprobe_probes_answered:ratio_rate5m'
        wanted = {(instance, str(hop)) for instance in targets.values() for hop in HOPS}
        wait_until(
            lambda: {(labels['instance'], labels['hop']) for labels, _ in ask(coverage)} == wanted,
            30,
            'each hop of each has its share of answers',
        )
        names = client.run('curl', '-gsSf', f'http://{targets[client]}/metrics').stdout
        told = subprocess.run(['promtool', 'check', 'metrics'], input=names, capture_output=True, text=True)
        assert (told.returncode, told.stdout, told.stderr) == (0, '', '')


# The rows of many hosts


def answer_of_sqlite(folders: dict[str, Path]) -> list[tuple[Any, ...]]:
    """What links.sql says of the rows in SQLite."""
    database = sqlite3.connect(':memory:')
    for number, (host, folder) in enumerate(folders.items()):
        with open(folder / 'elf.csv', newline='') as file:
            names, *rows = csv.reader(file)
        numbers = {'dest': str, 'responder': str, 'app': str, 'mpls': str, 'ifinfo': str, 'source': str}
        if not number:
            database.execute(f'CREATE TABLE probes (host, {", ".join(names)})')
        database.executemany(
            f'INSERT INTO probes VALUES (?{", ?" * len(names)})',
            (
                [host, *(numbers.get(name, int)(text) if text else None for name, text in zip(names, row))]
                for row in rows
            ),
        )
    return database.execute((DOCS / 'links.sql').read_text()).fetchall()


DUCKDB = """
import json, sys
sys.path.insert(0, sys.argv[1])
import duckdb
connection = duckdb.connect()
connection.execute(sys.argv[2])
print(json.dumps(connection.execute(sys.argv[3]).fetchall(), default=float))
"""


def answer_of_duckdb(package: str, folder: Path) -> list[tuple[Any, ...]]:
    """What links.sql says of the rows in DuckDB, loaded as the document says."""
    load, query = examples('sql')[0], (DOCS / 'links.sql').read_text()
    told = subprocess.run(
        [sys.executable, '-c', DUCKDB, package, load, query], cwd=folder, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    return [tuple(row) for row in json.loads(told.stdout)]


@root
def test_flows_vote_for_the_bad_link(make_lab, tmp_path):
    """Three clients behind one link that loses packets, each with another destination behind it:

    client  -- r1 ==bad== r2 -- r3 -- r4 -- server
    client2 --'           client2 talks to r4
    client3 --'           client3 talks to r3
    """
    lab = make_lab(routers=4)
    first, *behind = lab.routers
    with ExitStack() as stack:
        clients = [lab.client]
        for number in 2, 3:
            host = Host(f'{lab.prefix}client{number}', ('eth0',))
            near, far = address(4, 100 + number, 1), address(4, 100 + number, 2)
            batch('', [f'netns add {host.name}'])
            stack.callback(remove, [host.name])
            link = f'link add eth0 index {number * 100} type veth peer to{number} index {number * 100 + 1}'
            ours = f'address add {near}/24 dev eth0', 'link set eth0 up', f'route add default via {far}'
            batch(host.name, ['link set lo up', f'{link} netns {first.name}', *ours])
            batch(first.name, [f'address add {far}/24 dev to{number}', f'link set to{number} up'])
            for place, router in enumerate(behind, 2):
                batch(router.name, [f'route add {near}/32 via {address(4, place, 1)}'])
            clients.append(host)
        for host in [*lab.hosts, *clients]:
            stack.callback(host.end_processes)
        destinations = [lab.server_address(4), lab.hop(4, 4), lab.hop(4, 3)]
        for host in [lab.server, *lab.routers[2:]]:
            host.popen(sys.executable, '-c', SINK)
            wait_until(partial(host.listens, 5001), 10, 'the sink listens')
        lossy = 'chain f { type filter hook forward priority 0; oif eth1 numgen random mod 100 < 4 drop; }'
        stack.enter_context(nft_table(first, lossy))
        folders, runs = {}, []
        for number, (host, destination) in enumerate(zip(clients, destinations), 1):
            folders[f'client{number}'] = folder = tmp_path / f'client{number}'
            folder.mkdir()
            runs.append(stack.enter_context(elfprobe(lab, destination, cwd=folder, host=host)))
            host.popen(sys.executable, '-c', TRANSFER, destination)
        wait_until(
            lambda: all(has_resent(folder) for folder in folders.values()), 60, 'each flow has retransmitted'
        )
        for run in runs:
            assert run.stop() == 0
    answers = [answer_of_sqlite(folders)]
    package = os.environ.get('ELFPROBE_TESTS_DUCKDB')
    if package:
        answers.append(answer_of_duckdb(package, tmp_path))
    for answer in answers:
        near, far, flows, with_trouble, hosts, votes = answer[0]
        assert (far, flows, with_trouble, hosts) == (lab.hop(4, 2), 3, 3, 3)
        assert votes == pytest.approx(1 / 4 + 1 / 3 + 1 / 2)
        assert near in [lab.hop(4, 1), address(4, 102, 2), address(4, 103, 2)]
        assert [row[1] for row in answer[1:3]] == [lab.hop(4, 3), address(4, 103, 2)]
        assert len(answer) == 6 and answer[1][5] == pytest.approx(1 / 4 + 1 / 3)
    assert [row[:5] for row in answers[-1]] == [row[:5] for row in answers[0]]


def has_resent(folder: Path) -> bool:
    """Whether rows of the folder say that the flow has retransmitted while it was probed, and each hop answered."""
    with open(folder / 'elf.csv', newline='') as file:
        rows = [row for row in csv.DictReader(file) if row['ifinfo'] is not None]
    counts = {int(row['retrans']) for row in rows if row['retrans']}
    return len(counts) > 1 and len(rows) > 300
