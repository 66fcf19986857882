"""Runs that need no name: -- COMMAND, and the device that is found without -i.

    client -- r1 -- r2 -- server, port 7: echo

The command is Python, which says on its standard output what it has and what it gets.
"""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Iterator

import pytest

from lab import Host, Lab, wait_until
from runs import ELFPROBE, read_rows

pytestmark = pytest.mark.root

ECHO = """
import socket
listener = socket.create_server(('', 7))
while True:
    with listener.accept()[0] as connection:
        while connection.send(connection.recv(9000)):
            pass
"""
# A request each time a line comes.
TALK = """
import json, os, pathlib, socket, sys
connection = socket.create_connection((sys.argv[1], 7))
for line in sys.stdin:
    connection.sendall(bytes(100))
    connection.recv(9000)
print(json.dumps([os.getresuid(), os.getresgid(), os.getgroups(), dict(os.environ), os.getcwd()]))
sys.exit(3)
"""
# Says which signals come. SIGTERM is the last.
SIGNALLED = """
import signal
numbers = {signal.SIGINT, signal.SIGHUP, signal.SIGTERM}
signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
print('ready', flush=True)
number = 0
while number != signal.SIGTERM:
    number = signal.sigwait(numbers)
    print(signal.Signals(number).name, flush=True)
"""


@pytest.fixture(scope='module')
def lab() -> Iterator[Lab]:
    with Lab(routers=2) as built:
        built.server.popen(sys.executable, '-c', ECHO)
        wait_until(lambda: built.server.listens(7), 10, 'the server listens')
        yield built


@pytest.fixture
def client(lab: Lab) -> Iterator[Host]:
    yield lab.client
    lab.client.end_processes()


def command(*words: str) -> tuple[str, ...]:
    return sys.executable, str(ELFPROBE), *words


def test_command_is_the_users_and_probed_from_its_first_packet(lab: Lab, client: Host, tmp_path: Path) -> None:
    sudo = 'env', 'SUDO_UID=65534', 'SUDO_GID=65533', 'SUDO_USER=nobody', 'MAIL=/var/mail/root', 'KEPT=yes'
    sudo += 'setpriv', '--groups=4'
    talk = sys.executable, '-c', TALK, lab.server_address(4)
    ended = client.run(*sudo, *command('-p', '0', '-l', '--', *talk), input='go\n' * 40, cwd=tmp_path)
    # Standard input and output are the command's. What elfprobe says goes elsewhere.
    users, groups, more_groups, environment, folder = json.loads(ended.stdout.splitlines()[0])
    assert (users, groups, folder) == ([65534] * 3, [65533] * 3, str(tmp_path))
    assert 4 not in more_groups and 65533 in more_groups
    assert {name: environment.get(name) for name in ('USER', 'LOGNAME', 'HOME', 'KEPT', 'MAIL')} == {
        'USER': 'nobody', 'LOGNAME': 'nobody', 'HOME': '/nonexistent', 'KEPT': 'yes', 'MAIL': None,
    }  # fmt: skip
    assert not [name for name in environment if name.startswith('SUDO_')]
    name = os.path.basename(sys.executable)
    log = (tmp_path / 'elf.log').read_text()
    pid = re.search(rf'tracing {re.escape(name)} \(pid (\d+)\)', log)
    assert pid and log.count('tracing ') == 1
    assert f'{name} (pid {pid[1]}) has ended with exit status 3' in log
    assert 'probing on eth0' in log
    rows = read_rows(tmp_path / 'elf.csv')
    assert len(rows) >= 40  # one for each request: the first one, too


def test_command_that_cannot_be_run(client: Host, tmp_path: Path) -> None:
    (tmp_path / 'text').write_text('no program\n')
    (tmp_path / 'text').chmod(0o755)
    for words, said in {
        ('crul',): ["'crul'", 'no such program', 'curl'],
        ('./nowhere',): ["'./nowhere'", 'no such file'],
        ('./text',): ["'text'", 'Exec format error'],
    }.items():
        ended = client.run(*command('--', *words), check=False, cwd=tmp_path)
        assert ended.returncode == 1
        last = ended.stderr.splitlines()[-1]
        assert [word for word in said if word not in last] == [], ended.stderr


class Terminal:
    """elfprobe with a command on a terminal, in a session of its own."""

    def __init__(self, host: Host, *words: str, cwd: Path) -> None:
        self._ours, its = pty.openpty()
        os.set_blocking(self._ours, False)
        self._said = ''
        # The terminal becomes that of the session, as of a shell's. Signals go to the foreground, as with a shell.
        leader = (sys.executable, '-c', TERMINAL_LEADER)
        self.process = host.popen(*leader, *words, stdin=its, stdout=its, stderr=its, cwd=cwd)
        os.close(its)

    def type(self, text: bytes) -> None:
        os.write(self._ours, text)

    @property
    def said(self) -> str:
        try:
            while True:
                self._said += os.read(self._ours, 65536).decode()
        except OSError:  # EAGAIN, or EIO at the end
            return self._said.replace('\r\n', '\n')


TERMINAL_LEADER = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
modes = termios.tcgetattr(0)
modes[3] = modes[3] & ~termios.ECHO | termios.NOFLSH  # or ^C would drop what was written meanwhile
termios.tcsetattr(0, termios.TCSANOW, modes)
os.execv(sys.argv[1], sys.argv[1:])
"""


def lines(text: str, *words: str) -> list[str]:
    return [line for line in text.splitlines() if line in words]


NAMES = 'SIGINT', 'SIGHUP', 'SIGTERM'


def pending_signals(pid: int) -> int:
    """Return the set of signals that wait for a process, none if it has ended."""
    found = re.search(r'^ShdPnd:\s*(\w+)', Path(f'/proc/{pid}/status').read_text(), re.M)
    return int(found[1], 16) if found else 0


def test_signals_are_the_commands(client: Host, tmp_path: Path) -> None:
    """Each comes once: one that is sent to elfprobe, and one that the terminal sends to both.

    A signal that is sent while elfprobe has not taken the one before would be lost, so the test waits for that.
    """
    terminal = Terminal(client, *command('-l', '--', sys.executable, '-c', SIGNALLED), cwd=tmp_path)
    wait_until(lambda: lines(terminal.said, 'ready'), 20, 'the command runs')
    pid = terminal.process.pid
    expected = []
    for send, name in (
        (lambda: terminal.type(b'\x03'), 'SIGINT'),
        (lambda: terminal.process.send_signal(signal.SIGINT), 'SIGINT'),
        (lambda: terminal.process.send_signal(signal.SIGHUP), 'SIGHUP'),
        (lambda: terminal.type(b'\x03'), 'SIGINT'),
        (lambda: terminal.process.send_signal(signal.SIGTERM), 'SIGTERM'),
    ):
        send()
        expected.append(name)
        wait_until(lambda: len(lines(terminal.said, *NAMES)) >= len(expected), 10, f'{name} arrives')
        wait_until(lambda: not pending_signals(pid), 10, f'elfprobe takes {name}')
    assert terminal.process.wait(20) == 3
    assert lines(terminal.said, *NAMES) == expected
    assert 'has ended with exit status 0' in (tmp_path / 'elf.log').read_text()
    assert '\x1b' not in terminal.said  # no table: the terminal is the command's


def test_run_that_ends_before_its_command(client: Host, tmp_path: Path) -> None:
    """elfprobe stays, detached, since signals come to it."""
    process = client.popen(
        *command('-l', '--duration', '0.1', '--', sys.executable, '-c', SIGNALLED),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path,
    )  # fmt: skip
    for line in process.stderr or ():
        if 'still runs' in line:
            break
    assert not client.run('tc', 'filter', 'show', 'dev', 'eth0', 'egress').stdout
    process.send_signal(signal.SIGTERM)
    out, said = process.communicate(timeout=20)
    assert process.returncode == 3
    assert lines(out, 'ready', *NAMES) == ['ready', 'SIGTERM']
    assert 'has ended with exit status 0' in said
