"""Whether the lab is what the other tests take it for."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from lab import CommandFailed, Host, Lab, end, namespaces, run, sweep, wait_until

pytestmark = pytest.mark.root

HERE = Path(__file__).parent
BOTH_VERSIONS = pytest.mark.parametrize('version', [4, 6])
STAYING_LAB = """
import signal
from lab import Lab, interrupt_on_signals
interrupt_on_signals()
with Lab(routers=1) as lab:
    lab.server.popen('sleep', '1000')
    print(lab.prefix, flush=True)
    signal.pause()
"""

BURST = """
import socket, sys
family, _, _, _, address = socket.getaddrinfo(sys.argv[1], 33434, type=socket.SOCK_DGRAM)[0]
with socket.socket(family, socket.SOCK_DGRAM) as burst:
    burst.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 2)
    if family == socket.AF_INET6:
        burst.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, 2)
    for _ in range(500):
        burst.sendto(b'', address)
"""


def left_of(prefix: str) -> list[str]:
    return [name for name in namespaces() if name.startswith(prefix)]


def pids_in(host: Host) -> list[int]:
    return [int(pid) for pid in run('ip', 'netns', 'pids', host.name).stdout.split()]


def staying_lab() -> subprocess.Popen[str]:
    """Another process that has built a lab and printed its prefix."""
    return subprocess.Popen(
        [sys.executable, '-c', STAYING_LAB],
        cwd=HERE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def received_bytes(report: str) -> int:
    return json.loads(report)['end']['sum_received']['bytes']


def tcp_segment(frame: bytes) -> tuple[int, int, int]:
    """Source port, sequence number and how far it moves on, in IPv4 (without options) in Ethernet."""
    total_length = struct.unpack_from('!H', frame, 16)[0]
    port, _, sequence, _, offset, flags = struct.unpack_from('!HHIIBB', frame, 34)
    syn_or_fin = flags & 3 > 0
    return port, sequence, total_length - 20 - 4 * (offset >> 4) + syn_or_fin


def checksum_is_right(frame: bytes) -> bool:
    """Whether a TCP segment in IPv4 (without options) in Ethernet has its checksum finished."""
    length = struct.unpack_from('!H', frame, 16)[0] - 20
    segment = frame[34 : 34 + length] + b'\0' * (length % 2)
    words = frame[26:34] + struct.pack('!HH', 6, length) + segment
    return sum(struct.unpack(f'!{len(words) // 2}H', words)) % 0xFFFF == 0


# The path


@pytest.mark.sample
@pytest.mark.parametrize('script', ['demo', 'run', 'soak', 'fresh', 'verdicts', 'vm/run'])
def test_help(script):
    """It says how to call the script, from any folder; tests/fresh sees that it installs nothing."""
    shown = run(str(HERE / script), '-h', cwd='/')
    assert f'tests/{script}' in shown.stdout.splitlines()[0] and shown.stderr == ''


def test_lists_of_packages():
    """README.md names what the scripts install, and each list begins with all of the one before."""
    names = 'elfprobe_packages', 'lab_packages', 'test_packages'
    lines = '; '.join(f'echo "${{{name}[*]}}"' for name in names)
    lists = run('bash', '-c', f'source "$0"; {lines}', str(HERE / 'lib.sh')).stdout.splitlines()
    assert all(longer.startswith(shorter + ' ') for shorter, longer in zip(lists, lists[1:]))
    assert f'apt install {lists[0]} &&' in (HERE.parent / 'README.md').read_text()


@BOTH_VERSIONS
def test_traceroute_shows_each_hop(lab4, version):
    output = lab4.client.run('traceroute', f'-{version}', '-n', '-q1', lab4.server_address(version)).stdout
    hops = [lab4.hop(version, ttl) for ttl in range(1, 5)]
    assert [line.split()[1] for line in output.splitlines()[1:]] == [*hops, lab4.server_address(version)]


@BOTH_VERSIONS
def test_routers_answer_every_packet(lab4, version):
    """The kernel's limits, a burst of 50 and then 1000 a second at the most, are off."""
    answers = 'icmp[0] == 11' if version == 4 else 'icmp6[0] == 3'
    with lab4.client.capture(filter=answers) as capture:
        lab4.client.run(sys.executable, '-c', BURST, lab4.server_address(version))
    assert len(capture.packets()) == 500


@pytest.mark.parametrize('ttl', [0, 5])
def test_no_router_beyond_the_path(lab4, ttl):
    with pytest.raises(ValueError, match=f'ttl {ttl}'):
        lab4.hop(4, ttl)


def test_unknown_networks_are_unreachable(lab4):
    output = lab4.client.run('ping', '-nc1', '192.0.2.1', check=False).stdout
    assert f'From {lab4.hop(4, 1)} icmp_seq=1 Destination Net Unreachable' in output


# What runs in it


@BOTH_VERSIONS
def test_iperf3_runs_on_several_ports(lab4, version):
    with lab4.iperf3_server(5201, 5202):
        clients = [
            lab4.client.popen(
                'iperf3', '-J', '-t1', '-p', port, '-c', lab4.server_address(version), stdout=subprocess.PIPE
            )
            for port in ('5201', '5202')
        ]
        for client in clients:
            assert received_bytes(client.communicate(timeout=20)[0]) > 10e6
    assert not lab4.server.listens(5201)


@pytest.mark.sample
def test_capture_sees_each_packet_once(lab4):
    with lab4.client.capture(filter='icmp') as requests, lab4.routers[3].capture('eth1', 'icmp') as forwarded:
        lab4.client.run('ping', '-nc7', '-i0.01', lab4.server_address(4))
    assert len(requests.packets()) == len(forwarded.packets()) == 14
    assert [frame[22] for _, frame in forwarded.packets()] == [60, 64] * 7  # TTL
    times = [time for time, _ in requests.packets()]
    assert times == sorted(times)


def test_capture_keeps_what_tcpdump_has_not_read_yet(lab4):
    with lab4.client.capture(filter='icmp6 and icmp6[0] == 129') as capture:
        (tcpdump,) = pids_in(lab4.client)
        os.kill(tcpdump, signal.SIGSTOP)
        lab4.client.run('ping', '-nc5', '-i0.01', lab4.server_address(6))
        os.kill(tcpdump, signal.SIGCONT)
    assert len(capture.packets()) == 5


def test_capture_sees_bulk_traffic_whole(lab4):
    """The kernel drops nothing: no flow's sequence numbers have a hole."""
    with lab4.iperf3_server(), lab4.client.capture(filter='tcp dst port 5201', snaplen=100) as capture:
        lab4.client.run('iperf3', '-n200M', '-c', lab4.server_address(4))
    flows = defaultdict(list)
    for _, frame in capture.packets():
        port, sequence, length = tcp_segment(frame)
        flows[port].append((sequence, length))
    for segments in flows.values():
        first, reached = segments[0][0], 0
        for start, length in sorted(((sequence - first) % 2**32, length) for sequence, length in segments):
            assert start <= reached
            reached = max(reached, start + length)
    assert reached > 190e6  # of the last flow; iperf3 gives up on the end of it


def test_capture_reads_while_it_runs(lab4):
    with lab4.client.capture(filter='icmp') as capture:
        lab4.client.run('ping', '-nc1', lab4.server_address(4))
        wait_until(lambda: len(capture.packets()) == 2, 5, 'both packets')


def test_capture_reports_a_bad_filter(lab4):
    with pytest.raises(CommandFailed, match='syntax error'), lab4.client.capture(filter='nonsense and'):
        pass


@pytest.mark.parametrize('offload', [True, False])
def test_checksum_offload(lab4, offload):
    lab4.set_checksum_offload(offload)
    try:
        with lab4.iperf3_server(), lab4.routers[0].capture(filter='tcp dst port 5201') as capture:
            lab4.client.run('iperf3', '-n100K', '-c', lab4.server_address(4))
    finally:
        lab4.set_checksum_offload(True)
    right = [checksum_is_right(frame) for _, frame in capture.packets()]
    assert len(right) > 10
    assert not any(right) if offload else all(right)


def test_failure_shows_command_and_stderr(lab4):
    with pytest.raises(CommandFailed, match=r'cat /nowhere: exit status 1\ncat: .*No such file'):
        lab4.client.run('cat', '/nowhere')


def test_command_may_not_take_too_long(lab4):
    with pytest.raises(CommandFailed, match=r'sleep 1000: took more than 0.1 s'):
        lab4.client.run('sh', '-c', 'sleep 1000 & sleep 1000', timeout=0.1)


def test_wait_until_says_what(lab4):
    with pytest.raises(TimeoutError, match='the end of time'):
        wait_until(lambda: False, 0.02, 'the end of time')


# What is left of it


def test_two_labs_at_a_time(make_lab):
    one, other = make_lab(routers=1), make_lab(routers=2)
    with one.server.capture(filter='icmp') as capture:
        other.client.run('ping', '-nc1', other.server_address(4))
        one.client.run('ping', '-nc1', one.server_address(4))
    assert len(capture.packets()) == 2
    assert one.server_address(4) != other.server_address(4)


def test_lab_without_routers(make_lab):
    lab = make_lab(routers=0)
    lab.client.run('ping', '-nc1', '-t1', lab.server_address(6))


def test_nothing_left_after_an_exception():
    with pytest.raises(ZeroDivisionError), Lab(routers=1) as lab:
        process = lab.server.popen('sh', '-c', 'setsid sleep 1000 & wait')
        wait_until(lambda: len(pids_in(lab.server)) == 2, 5, 'shell and sleep run')
        shell_and_sleep = pids_in(lab.server)
        raise ZeroDivisionError
    assert left_of(lab.prefix) == []
    assert process.returncode == -signal.SIGKILL
    assert not [pid for pid in shell_and_sleep if Path(f'/proc/{pid}/exe').exists()]  # zombies have none


@pytest.mark.parametrize('step', range(3))
def test_nothing_left_after_a_failure_to_build(monkeypatch, step):
    real = Lab._set_up

    def set_up(lab: Lab, i: int) -> None:
        if i == step:
            raise ZeroDivisionError
        real(lab, i)

    monkeypatch.setattr(Lab, '_set_up', set_up)
    lab = Lab(routers=1)
    with pytest.raises(ZeroDivisionError):
        lab.__enter__()
    assert left_of(lab.prefix) == []


def test_nothing_left_after_sigterm():
    process = staying_lab()
    try:
        prefix = process.stdout.readline().strip()
        assert len(left_of(prefix)) == 3
        process.terminate()
        process.wait(timeout=20)
        assert left_of(prefix) == []
    finally:
        end(process)


def test_sweep_removes_what_a_killed_process_left(lab4):
    process = staying_lab()
    try:
        prefix = process.stdout.readline().strip()
        sweep()
        assert len(left_of(prefix)) == 3, 'swept while alive'
    finally:
        end(process)
    sweep()
    assert left_of(prefix) == []
    assert len(left_of(lab4.prefix)) == len(lab4.hosts)
