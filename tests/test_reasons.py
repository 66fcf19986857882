"""Why there are no probes: routes that lead elsewhere, other namespaces, translated addresses, idle targets.

            eth0 -- r1 -- r2 -- server, port 7: echo
client -<
            other0 -- a host of its own, 10.9.0.2
"""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Iterator

import pytest

from lab import PATIENCE, Host, Lab, batch, end, nft_table, wait_until
from runs import ELFPROBE, Run, elfprobe

pytestmark = pytest.mark.root

ECHO = """
import socket
with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as udp:
    udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    udp.bind(('', 7))
    print(flush=True)
    while True:
        data, sender = udp.recvfrom(9000)
        udp.sendto(data, sender)
"""
# Sends to all its peers again and again, but to those with a "-" in front. Its name is the first argument.
TALK = """
import contextlib, socket, sys, time
with open('/proc/self/comm', 'w') as file:
    file.write(sys.argv[1])
peers = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in sys.argv[2:]]
for peer, address in zip(peers, sys.argv[2:]):
    peer.connect((address.lstrip('-'), 7))
print(flush=True)
while True:
    for peer in (peer for peer, address in zip(peers, sys.argv[2:]) if address[0] != '-'):
        with contextlib.suppress(ConnectionRefusedError):
            peer.send(bytes(100))
    time.sleep(0.01)
"""


@pytest.fixture(scope='module')
def lab() -> Iterator[Lab]:
    with Lab(routers=2) as built:
        aside = built.prefix + 'aside'
        batch('', [f'netns add {aside}'])
        batch(built.client.name, [
            f'link add other0 type veth peer eth0 netns {aside}',
            'link set other0 up',
            'address add 10.9.0.1/24 dev other0',
        ])  # fmt: skip
        batch(aside, ['link set eth0 up', 'address add 10.9.0.2/24 dev eth0'])
        built.server.popen(sys.executable, '-c', ECHO)
        yield built
        batch('', [f'netns delete {aside}'])


@contextmanager
def talking(host: Host, name: str, *peers: str) -> Iterator[int]:
    """A program of this name that sends to its peers all the time, if it has any; yields its PID."""
    process = host.popen(sys.executable, '-c', TALK, name, *peers, stdout=subprocess.PIPE)
    try:
        assert process.stdout and process.stdout.readline() == '\n'
        yield process.pid
    finally:
        end(process)


def wait_for(run: Run, *words: str) -> str:
    """Until a line of the log has all of the words; returns it."""

    def lines() -> list[str]:
        return [line for line in run.log.splitlines() if all(word in line for word in words)]

    wait_until(lines, 15, f'a line with {words}')
    return lines()[0]


def test_reasons_of_processes(lab: Lab, tmp_path: Path) -> None:
    names = 'crul', 'quiet', 'idle', 'own', 'abroad', 'elsewhere'
    with ExitStack() as stack:
        own = stack.enter_context(talking(lab.client, 'own', '127.0.0.1'))
        quiet = stack.enter_context(talking(lab.client, 'quiet'))
        idle = stack.enter_context(talking(lab.client, 'idle', '-' + lab.server_address(4)))
        elsewhere = stack.enter_context(talking(lab.client, 'elsewhere', '10.9.0.2'))
        abroad = stack.enter_context(talking(lab.server, 'abroad', lab.client_address(4)))
        further = stack.enter_context(talking(lab.routers[1], 'abroad', lab.client_address(4)))
        apps = [word for name in names for word in ('-a', name)]
        with elfprobe(lab, *apps, cwd=tmp_path) as measuring:
            assert wait_for(measuring, 'no process of the name crul').endswith('(close: curl)')
            # Told while it runs: what to do otherwise.
            wait_for(measuring, f'elsewhere (pid {elsewhere}) sends to 10.9.0.2 by other0, not by eth0')
            line = wait_for(measuring, f'abroad (pid {abroad}) is in another network namespace')
            wait_for(measuring, f'abroad (pid {further}) is in another network namespace')  # not the same one
        at_end = measuring.log[measuring.log.index('0 probes, 0 replies') :]
        for text in (
            'no process of the name crul',
            f'elsewhere (pid {elsewhere}) sends to 10.9.0.2 by other0',
            f'abroad (pid {abroad}) is in another',
            f'own (pid {own}) talks to this host itself only (127.0.0.1)',
            f'quiet (pid {quiet}) has no connection',
            f'idle (pid {idle}) is connected to {lab.server_address(4)}, but sends nothing that can carry a probe',
        ):
            assert text in at_end
        assert "'ip route get" not in at_end  # nothing general where the reasons are known
        # The command as it is, in the namespace of that process. It finds the device there.
        command = line.partition('measure there: ')[2]
        assert command.startswith(f'nsenter -t {abroad} -n ')
        (tmp_path / 'there').mkdir()
        with open(tmp_path / 'said', 'w+b') as said:
            process = subprocess.Popen(
                shlex.split(command), cwd=tmp_path / 'there', stderr=said, stdin=subprocess.DEVNULL, text=True
            )
            there = Run(process, tmp_path / 'there', said)
            try:
                wait_for(there, 'probing on eth0')
                wait_until(lambda: {row.dest for row in there.rows()} == {lab.client_address(4)}, 10, 'rows')
                assert there.stop(signal.SIGINT) == 0
            finally:
                process.kill()
                process.wait()


NAT = """chain output {
    type nat hook output priority -100;
    ip daddr 10.8.8.8 dnat to 10.0.3.2
    ip daddr 10.8.8.9 dnat to 10.0.1.1
}"""


def test_reasons_of_addresses(lab: Lab, tmp_path: Path) -> None:
    with ExitStack() as stack:
        stack.enter_context(nft_table(lab.client, NAT))
        stack.enter_context(talking(lab.client, 'talk', '10.8.8.8', '10.8.8.9'))
        addresses = ['10.8.8.8', '10.8.8.9', '10.9.0.2', '10.0.3.99', '10.0.1.1', 'fd00:e1f:1::1']
        addresses += [f'10.0.3.{n}' for n in range(110, 116)]
        measuring = stack.enter_context(elfprobe(lab, *addresses, cwd=tmp_path))
        wait_for(measuring, 'the route to 10.9.0.2 leads by other0, not by eth0')
        wait_for(measuring, 'this host translates 10.8.8.8 to 10.0.3.2', 'name 10.0.3.2 instead')
        wait_for(measuring, 'this host translates 10.8.8.9 to 10.0.1.1', 'nothing leaves')
        wait_for(measuring, 'the route to 10.0.1.1 ends on this host: nothing that is sent there leaves it')
        # Routes that move while it runs.
        batch(lab.client.name, ['route add 10.0.3.99/32 dev other0'])
        wait_for(measuring, 'the route to 10.0.3.99 leads by other0, not by eth0')
        batch(lab.client.name, ['route del 10.0.3.99/32'])
        wait_for(measuring, 'the route to 10.0.3.99 leads by eth0 again')
        assert measuring.stop() == 3
    at_end = measuring.log[measuring.log.index('0 probes, 0 replies') :]
    for text in (
        'translates 10.8.8.8 to 10.0.3.2',
        'translates 10.8.8.9 to 10.0.1.1',
        'the route to 10.9.0.2 leads by other0, not by eth0: use -i other0',
        'no packet to 10.0.3.99 left by eth0: nobody here sends there',
        '10.0.1.1 is an address of this host: nothing that is sent there leaves it',
        'fd00:e1f:1::1 is an address of this host',
    ):
        assert text in at_end
    assert '10.8.8.8 left' not in at_end
    assert '2 more reasons of these kinds' in at_end


@pytest.mark.parametrize('hook', ['tc', 'xdp'])
def test_answers_that_come_in_elsewhere(lab: Lab, tmp_path: Path, hook: str) -> None:
    """As with several uplinks: r1 sends to the client by alt0."""
    client, r1, ours = lab.client.name, lab.routers[0].name, lab.client_address(4)
    batch(client, [
        f'link add alt0 type veth peer alt1 netns {r1}', 'link set alt0 up', 'address add 10.9.1.1/24 dev alt0',
    ])  # fmt: skip
    try:
        batch(r1, [
            'link set alt1 up', 'address add 10.9.1.2/24 dev alt1', f'route add {ours}/32 via 10.9.1.1 dev alt1',
        ])  # fmt: skip
        with talking(lab.client, 'talk', '10.0.3.2'), elfprobe(
            lab, '10.0.3.2', '--ingress-hook', hook, cwd=tmp_path
        ) as measuring:
            line = wait_for(measuring, 'nothing arrives by eth0 from 10.0.3.2, nor from routers')
            if hook == 'xdp':
                assert 'alt0' in line and 'which --ingress-hook tc would read' in line
                return
            told = time.monotonic_ns()
            assert line.endswith('answers are read on other0, alt0, too')
            wait_until(lambda: {row.outttl for row in measuring.rows() if row.is_answered} == {1, 2}, 20, 'rows')
            assert measuring.stop() == 0
        first = min(row.sendtime for row in measuring.rows() if row.is_answered)
        assert first - told < PATIENCE * 10**9  # what was silent before is no reason to back off
    finally:
        batch(client, ['link del alt0'])


def test_default_route_that_moves(lab: Lab, tmp_path: Path) -> None:
    with elfprobe(lab, '-a', 'nobody', cwd=tmp_path) as measuring:
        batch(lab.client.name, ['route add 198.41.0.0/24 dev other0'])
        try:
            wait_for(measuring, 'the default route of IPv4 leads by other0, not by eth0')
        finally:
            batch(lab.client.name, ['route del 198.41.0.0/24'])
        wait_for(measuring, 'the default route of IPv4 leads by eth0 again')


def test_device_is_found(lab: Lab, tmp_path: Path) -> None:
    def ended(*arguments: str, via: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        command = *via, sys.executable, str(ELFPROBE), '--duration', '0.1', *arguments
        return lab.client.run(*command, check=False, cwd=tmp_path)

    # Of a name's addresses, those without a route do not matter: fd99:: has none if the default route is gone.
    batch(lab.client.name, ['route add unreachable fd99::/64'])
    for arguments in (['10.0.3.2', lab.server_address(6), 'fd99::1', '10.0.1.1'], ['-a', 'nobody']):
        assert 'probing on eth0' in ended(*arguments).stderr
    batch(lab.client.name, ['route del unreachable fd99::/64'])
    for arguments, via, words in (
        (['10.0.3.2', '10.9.0.2'], (), ['-i/--interface', 'eth0 to 10.0.3.2', 'other0 to 10.9.0.2']),
        (['10.9.0.2', '-a', 'nobody'], (), ['eth0 to the default route', 'other0 to 10.9.0.2']),
        (['10.9.0.2'], ('unshare', '-n'), ['no route leads to 10.9.0.2']),
        (['10.0.1.1'], (), ['10.0.1.1 is an address of this host']),
        (['-a', 'nobody'], ('unshare', '-n'), ['no default route']),
    ):
        refused = ended(*arguments, via=via)
        assert refused.returncode == 1
        assert re.fullmatch(r'elfprobe\.py: .*\n', refused.stderr)
        assert [word for word in words if word not in refused.stderr] == [], refused.stderr
    balanced = 'route replace 10.7.0.0/16 nexthop via 10.0.1.2 nexthop via 10.9.0.2'
    batch(lab.client.name, [balanced])
    try:
        assert all(name in ended('10.7.0.1').stderr for name in ('by several devices', 'eth0', 'other0'))
    finally:
        batch(lab.client.name, ['route del 10.7.0.0/16'])
