"""The live view: what it shows, in few bytes; its keys; a terminal that is left as it was.

client - r1 - r2 - r3 - r4 - server        a probe with TTL k ends at lab.hop(version, k)
"""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import random
import re
import signal
import struct
import subprocess
import sys
import termios
import unicodedata
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from elf.console import Screen
from elf.lines import Line, Mark
from lab import Lab, end, wait_until
from runs import ELFPROBE, HOPS, VERSIONS, both, hosts_file, read_rows

root = pytest.mark.root


class Emulator:
    """What a terminal shows, as far as elfprobe uses one: ECMA-48's CPL, CNL, CHA, EL, ED, SGR, and line breaks."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.rows: list[list[tuple[str, str]]] = [[]]  # characters with their colours; '': behind a wide one
        self.row = self.column = 0
        self.colour = ''
        self._rest = ''  # the beginning of what is not whole yet

    def feed(self, written: str) -> None:
        written = self._rest + written
        self._rest = re.search(r'(\r|\x1b(\[\d*)?)?\Z', written)[0]
        whole = written[: len(written) - len(self._rest)]
        for part in re.split(r'(\x1b\[\d*[A-Zm])', whole.replace('\r\n', '\n')):
            if part.startswith('\x1b'):
                self._control(part[-1], part[2:-1])
            else:
                assert '\x1b' not in part
                for character in part:
                    self._put(character)

    def _control(self, name: str, number: str) -> None:
        if name == 'm':
            self.colour = number
        elif name == 'G':
            self.column = int(number) - 1
        elif name in 'EF':
            self.row += int(number) if name == 'E' else -int(number)
            self.column = 0
            assert 0 <= self.row < len(self.rows)
        elif name in 'KJ':
            assert self.column < self.columns  # elsewhere terminals differ
            del self.rows[self.row][self.column :]
            if name == 'J':
                del self.rows[self.row + 1 :]
        else:
            raise AssertionError(name)

    def _put(self, character: str) -> None:
        if character != '\n' and self.column < self.columns:
            line = self.rows[self.row]
            line += [(' ', '')] * (self.column - len(line))
            width = 2 if unicodedata.east_asian_width(character) in 'WF' else 1
            line[self.column : self.column + width] = [(character, self.colour), ('', '')][:width]
            self.column += width
            return
        self.row, self.column = self.row + 1, 0
        if self.row == len(self.rows):
            self.rows.append([])
        if character != '\n':
            self._put(character)

    @property
    def lines(self) -> list[str]:
        return [''.join(character for character, _ in line).rstrip() for line in self.rows]

    @property
    def colours(self) -> list[set[str]]:
        """Those of each line."""
        return [{colour for character, colour in line if character} for line in self.rows]


# Few bytes


def lines_of(random_: random.Random, count: int, columns: int) -> list[Line]:
    marks = list(Mark)
    return [
        Line(
            ''.join(random_.choices('aab  \N{CJK UNIFIED IDEOGRAPH-65E5}', k=random_.randrange(columns // 2))),
            random_.choice(marks),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize('seed', range(20))
def test_screen_shows_what_was_drawn(seed: int) -> None:
    """Whatever was there before: other lines, more or fewer of them, in other colours, log lines, another size."""
    random_ = random.Random(seed)
    columns = random_.choice((30, 80))
    screen, terminal, logged = Screen(has_colours=True), Emulator(columns), []
    table = lines_of(random_, 5, columns)
    for number in range(100):
        if random_.random() < 0.2:
            logged.append(f'{number}:' + 'x' * random_.randrange(3 * columns))
            terminal.feed(screen.log(logged[-1], (columns, 24)))
        else:
            table = [line if random_.random() < 0.6 else lines_of(random_, 1, columns)[0] for line in table]
            table = table[: random_.randrange(1, 9)] + lines_of(random_, random_.randrange(4), columns)
            terminal.feed(screen.draw(table, (columns, 24)))
            wrapped = [line[at : at + columns] for line in logged for at in range(0, len(line), columns)]
            assert terminal.lines == [*wrapped, *(line.text.rstrip() for line in table), '']
            colours = [{line.mark.value} if line.text else set() for line in table]
            assert terminal.colours[len(wrapped) :] == [*colours, set()]
    terminal.feed(screen.clear((columns, 24)))
    assert not any(terminal.lines[sum(-(-len(line) // columns) for line in logged) :])


def test_only_changes_are_written() -> None:
    def table(probes: int, latency: float) -> list[Line]:
        hops = [
            f'{hop:3} {probes + hop:7}   100.0%    1.234 {latency:8.3f}    9.876  192.0.2.{hop} r{hop}.example'
            for hop in HOPS
        ]
        return [Line(f'eth0: {probes} replies'), Line(''), *(Line(hop, Mark.NOTABLE) for hop in hops), Line('end')]

    screen = Screen(has_colours=False)
    first = screen.draw(table(1000, 5.5), (80, 24))
    assert screen.draw(table(1000, 5.5), (80, 24)) == ''
    again = screen.draw(table(1001, 5.6), (80, 24))
    assert 0 < len(again) < len(first) / 3
    assert '\x1b[J' not in again and '\x1b[K' not in again
    assert '\x1b[' in screen.draw(table(1001, 5.6), (79, 24))  # a terminal of another size may have moved the lines


# Keys

# A leader of a session with a job, as a shell. It says what becomes of the job, and continues it on SIGUSR1 in the
# foreground, on SIGUSR2 in the background. Unlike a shell it never touches the terminal's settings.
LEADER = """
import fcntl, os, resource, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
wishes = {signal.SIGUSR1, signal.SIGUSR2}
signal.pthread_sigmask(signal.SIG_BLOCK, wishes)
job = os.fork()
if not job:
    os.setpgid(0, 0)
    os.tcsetpgrp(0, os.getpid())
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, wishes)
    os.execvp(sys.argv[1], sys.argv[1:])
print(f'(job {job})', flush=True)
while True:
    _, status = os.waitpid(job, os.WUNTRACED)
    os.tcsetpgrp(0, os.getpgrp())
    if os.WIFEXITED(status):
        print(f'(exit {os.WEXITSTATUS(status)})', flush=True)
        break
    if os.WIFSIGNALED(status):
        print(f'(ended by {os.WTERMSIG(status)})', flush=True)
        break
    print('(stopped)', flush=True)
    if signal.sigwait(wishes) == signal.SIGUSR1:
        os.tcsetpgrp(0, job)
    os.kill(-job, signal.SIGCONT)
    print('(continued)', flush=True)
    if os.tcgetpgrp(0) != job:
        signal.sigwait({signal.SIGUSR1})
        print('(to the foreground)', flush=True)
        os.tcsetpgrp(0, job)
"""

# A live view of two destinations, with a flow that is stalled, one that is excluded, one that is active. One more
# row comes with each drawing. It ends with status 7 when a key says so; with an argument, soon by an exception.
VIEW = """
import sys, time
from elf.console import Console
from elf.live import FlowEvent, LiveView
from elf.rows import Record
from elf.summary import Summary
console, summary = Console(), Summary()
view = LiveView(console, 'eth0', summary)
def note(number, dest, sport, hop, responder='192.0.2.1', latency=10**6):
    summary.note(Record(dest, sport, 443, 6, hop, number * 10**7, latency, responder, pid=7, app='curl'))
for number in range(100):
    note(number, '198.51.100.9', 1000, 1)
    note(number, '198.51.100.9', 1000, 2, latency=10**8 if number % 10 == 0 else 10**6)
    note(number, '198.51.100.9', 1001, 3, '')
    note(number, '203.0.113.5', 1002, 1)
view.note(FlowEvent.STALLED, ('198.51.100.9', 1001, 443, 6))
view.note(FlowEvent.EXCLUDED, ('203.0.113.5', 1002, 443, 6))
with view.shown():
    number = 100
    while not view.take_keys():
        number += 1
        note(number, '198.51.100.9', 1000, 1)
        view.draw(4 * number, number, 0)
        time.sleep(0.02)
        if len(sys.argv) > 1 and number > 150:
            raise ValueError('a test broke it')
view.clear()
console.say('done')
console.flush()
sys.exit(7)
"""


class Terminal:
    """A command as the job of a session on a terminal."""

    def __init__(self, *command: str, columns: int = 120, cwd: Path = ELFPROBE.parent, **environment: str) -> None:
        self.fd, its = pty.openpty()
        fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack('4H', 40, columns, 0, 0))
        os.set_blocking(self.fd, False)
        self.settings = termios.tcgetattr(self.fd)
        self.written = ''
        self._decoder = codecs.getincrementaldecoder('utf-8')()
        self.emulator = Emulator(columns)
        options: dict[str, Any] = dict(
            stdin=its, stdout=its, stderr=its, start_new_session=True, cwd=cwd,
            env={**{name: value for name, value in os.environ.items() if name != 'NO_COLOR'}, 'TERM': 'xterm',
                 'PYTHONDONTWRITEBYTECODE': '1', **environment},
        )  # fmt: skip
        self.leader = subprocess.Popen([sys.executable, '-c', LEADER, *command], **options)
        os.close(its)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.leader.poll() is None:
            for pid in re.findall(r'\(job (\d+)\)', self.read()):
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        end(self.leader)
        os.close(self.fd)

    def read(self) -> str:
        """All that was written so far."""
        while True:
            try:
                text = self._decoder.decode(os.read(self.fd, 65536))
            except OSError:  # EAGAIN, or EIO at the end
                return self.written
            self.written += text
            self.emulator.feed(text)

    def type(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    @property
    def screen(self) -> str:
        self.read()
        return '\n'.join(self.emulator.lines)

    @property
    def job(self) -> int:
        return int(re.search(r'\(job (\d+)\)', self.read())[1])

    @property
    def shows_keys(self) -> bool:
        return bool(termios.tcgetattr(self.fd)[3] & termios.ECHO)

    def wait_for_work(self) -> None:
        """The job has gone through its loop some times more."""

        def waits() -> int:
            return int(
                re.search(r'^voluntary_ctxt_switches:\s+(\d+)', Path(f'/proc/{self.job}/status').read_text(), re.M)[
                    1
                ]
            )

        before = waits()
        wait_until(lambda: waits() > before + 50, 20, 'it goes on')

    def wait_for(self, text: str) -> str:
        wait_until(lambda: text in self.screen, 20, text)
        return self.screen

    def wait_for_end(self, text: str) -> None:
        """The job has ended, and the terminal is as it was."""
        self.wait_for(text)
        assert termios.tcgetattr(self.fd) == self.settings


VIEWED = sys.executable, '-c', VIEW


def replies(screen: str) -> int:
    """How many the live table tells."""
    return int(re.findall(r'(\d+) replies', screen)[-1])


@pytest.mark.sample
def test_keys() -> None:
    with Terminal(*VIEWED) as terminal:
        screen = terminal.wait_for('h: keys')
        assert not terminal.shows_keys
        assert re.search(r'^eth0: 0:00:0\d, \d+ probes/s, \d+ replies, 0 unanswered; h: keys$', screen, re.M)
        tables = [line for line in screen.splitlines() if line.endswith('latency in ms')]
        assert [line.split(':')[0] for line in tables] == ['198.51.100.9', '203.0.113.5']
        assert 'active: curl (pid 7): TCP port 1000 to 198.51.100.9 port 443' in screen
        assert 'stalled: curl (pid 7): TCP port 1001 to 198.51.100.9 port 443' in screen
        assert 'excluded: curl (pid 7): TCP port 1002 to 203.0.113.5 port 443' in screen

        terminal.type('h')
        assert 'q  end the run' in terminal.wait_for('this help')
        assert 'latency in ms' not in terminal.screen
        terminal.type('h')
        assert 'q  end the run' not in terminal.wait_for('latency in ms')

        terminal.type('d')
        wait_until(lambda: '203.0.113.5' not in terminal.screen, 20, 'one destination')
        terminal.type('f')
        flows = terminal.wait_for('hop mean, ms').split('hop mean, ms')[1].splitlines()[1:]
        assert [line.split()[0] for line in flows if line] == ['stalled', 'active']  # of this destination
        rate, rows, answered, hop, mean = flows[1].split()[1:6]
        assert 10 < float(rate) < 60 and int(rows) > 200 and answered == '100.0%'
        assert (hop, mean) == ('2', '10.900')
        terminal.type('d')  # the other destination
        wait_until(
            lambda: 'excluded' in terminal.screen and '198.51.100.9' not in terminal.screen, 20, 'the next one'
        )
        terminal.type('\x1b[D')  # an arrow is no key
        terminal.wait_for_work()
        assert '203.0.113.5' in terminal.screen and '198.51.100.9' not in terminal.screen
        terminal.type('df')  # all destinations, by hops
        assert '203.0.113.5' in terminal.wait_for('198.51.100.9: ')

        terminal.type('p')
        paused = terminal.wait_for(', paused, ')
        terminal.wait_for_work()
        assert terminal.screen == paused
        terminal.type('p')
        wait_until(lambda: replies(terminal.screen) > replies(paused) + 10, 20, 'it goes on')

        terminal.type('q')
        terminal.wait_for_end('(exit 7)')
        assert terminal.screen.splitlines()[-2:] == ['done', '(exit 7)']
        assert 'eth0' not in terminal.screen


def test_job_control() -> None:
    """The terminal is the shell's while the job is stopped or in the background. What others have written stays."""
    with Terminal(*VIEWED) as terminal:
        terminal.wait_for('eth0')
        terminal.type('\x1a')
        terminal.wait_for('(stopped)')
        assert termios.tcgetattr(terminal.fd) == terminal.settings
        terminal.leader.send_signal(signal.SIGUSR1)
        wait_until(
            lambda: terminal.screen.rfind('eth0') > terminal.screen.find('(continued)') > 0, 20, 'a new table'
        )
        assert terminal.screen.count('eth0') == 2 and not terminal.shows_keys

        terminal.type('\x1a')
        wait_until(lambda: terminal.screen.count('(stopped)') == 2, 20, 'a second stop')
        terminal.leader.send_signal(signal.SIGUSR2)
        wait_until(lambda: terminal.screen.count('(continued)') == 2, 20, 'it goes on in the background')
        terminal.type('h\n')  # to the one in the foreground, so to say
        wait_until(lambda: 'h' in terminal.screen.rpartition('(continued)')[2], 20, 'the echo')
        screen = terminal.screen
        terminal.wait_for_work()
        assert terminal.screen == screen and termios.tcgetattr(terminal.fd) == terminal.settings
        terminal.leader.send_signal(signal.SIGUSR1)
        terminal.wait_for('this help')  # nobody else has read it

        os.kill(terminal.job, signal.SIGSTOP)  # which cannot be seen coming, and this shell changes no settings
        wait_until(lambda: terminal.screen.count('(stopped)') == 3, 20, 'a third stop')
        terminal.leader.send_signal(signal.SIGUSR1)
        wait_until(lambda: terminal.screen.rfind('this help') > terminal.screen.rfind('(continued)'), 20, 'a table')
        terminal.type('q')
        terminal.wait_for_end('(exit 7)')


ENDS = {
    'an exception': (['soon'], '', '(exit 1)'),
    'SIGQUIT': ([], '\x1c', '(ended by 3)'),
    'SIGUSR2': ([], signal.SIGUSR2, '(ended by 12)'),
}


@pytest.mark.parametrize('end', ENDS)
def test_terminal_is_left_as_it_was(end: str) -> None:
    arguments, cause, said = ENDS[end]
    with Terminal(*VIEWED, *arguments) as terminal:
        terminal.wait_for('eth0')
        assert not terminal.shows_keys
        if isinstance(cause, str):
            terminal.type(cause)
        else:
            os.kill(terminal.job, cause)
        terminal.wait_for_end(said)


def test_standard_input_that_is_no_terminal() -> None:
    with Terminal('/bin/sh', '-c', 'exec "$@" </dev/null', 'sh', *VIEWED, 'soon') as terminal:
        terminal.wait_for('eth0')
        assert termios.tcgetattr(terminal.fd) == terminal.settings
        terminal.wait_for_end('(exit 1)')


def test_colours() -> None:
    with Terminal(*VIEWED) as coloured, Terminal(*VIEWED, NO_COLOR='1') as plain:
        for terminal in coloured, plain:
            terminal.wait_for('eth0')
        found = dict(zip(coloured.screen.splitlines(), coloured.emulator.colours))
        for begin, colour in {
            'stalled': Mark.BAD, 'excluded': Mark.BAD, 'active': Mark.NONE, '  2 ': Mark.NOTABLE,
            '  3 ': Mark.INACTIVE, 'hop': Mark.NONE,
        }.items():  # fmt: skip
            assert [colours for line, colours in found.items() if line.startswith(begin)][0] == {colour.value}, (
                begin
            )
        assert not re.search(r'\x1b\[\d*m', plain.written) and 'stalled' in plain.screen


def test_terminal_that_can_do_nothing() -> None:
    with Terminal(*VIEWED, 'soon', TERM='dumb') as terminal:
        terminal.wait_for_end('(exit 1)')
        assert '\x1b' not in terminal.written and 'eth0' not in terminal.written


# elfprobe


def on_a_terminal(lab: Lab, cwd: Path, *arguments: str, columns: int = 80) -> Terminal:
    """elfprobe in the client."""
    command = lab.client.command(sys.executable, str(ELFPROBE), '-i', lab.client.device, *arguments)
    return Terminal(*command, columns=columns, cwd=cwd)


@root
@pytest.mark.parametrize('columns', [80, 120])
def test_table_on_a_terminal(lab4, tmp_path, columns):
    """Redrawn in place, fitting, with names; log lines stand above it; in the end log and final tables are left,
    which fit as well, and leave out nothing but columns. Keys work, and the terminal is left as it was."""
    names = ''.join(
        f'{lab4.hop(version, hop)} r{hop}.{"long-" * 3}example\n' for version in VERSIONS for hop in HOPS
    )
    with hosts_file(lab4.client, names), on_a_terminal(lab4, tmp_path, *both(lab4), columns=columns) as terminal:
        terminal.wait_for('probing on')
        for server in both(lab4):
            lab4.client.popen('ping', '-nq', '-i.01', server, stdout=subprocess.DEVNULL)
        wait_until(lambda: re.search(r' r4\.long-.*\n.* r4\.long-', terminal.screen, re.DOTALL), 20, 'names')
        before = replies(terminal.screen)
        wait_until(lambda: replies(terminal.screen) > before + 500, 20, 'more rows')
        lines = terminal.screen.splitlines()
        table = lines[[line.startswith('eth0: ') for line in lines].index(True) :]
        assert len(table) < 40 and max(map(len, table)) < columns
        assert (' 99% ' in ' '.join(table)) == (columns == 120)
        assert 'active: ICMP echo ' in terminal.screen
        terminal.wait_for(' a day at this rate')  # the last line of the log before the end
        terminal.type('p')
        paused = terminal.wait_for(', paused, ')
        written = len(read_rows(tmp_path / 'elf.csv'))
        wait_until(lambda: len(read_rows(tmp_path / 'elf.csv')) > written + 200, 20, 'more rows')
        assert terminal.screen == paused
        if columns == 80:
            terminal.type('q')
        else:
            os.kill(terminal.job, signal.SIGTERM)
        terminal.wait_for_end('(exit 0)')
        final = terminal.screen.splitlines()[:-1]
    lab4.client.end_processes()
    assert not any(line.startswith('eth0: ') for line in final)
    [end_of_log] = [number for number, line in enumerate(final) if line.endswith(' unanswered')]
    results = final[end_of_log + 1 :]
    assert sum('latency in ms' in line for line in final) == sum('latency in ms' in line for line in results) == 2
    assert max(map(len, results)) <= columns and (' 99% ' in ' '.join(results)) == (columns == 120)
    assert sum('r4.long-long-long-example' in line for line in results) == 2


@root
@pytest.mark.parametrize('option', ['--no-live', '-q'])
def test_no_table_on_a_terminal(lab4, tmp_path, option):
    with on_a_terminal(lab4, tmp_path, option, '--duration', '2.5', *both(lab4)) as terminal:
        for server in both(lab4):
            lab4.client.popen('ping', '-nq', '-i.01', server, stdout=subprocess.DEVNULL)
        wait_until(lambda: (tmp_path / 'elf.csv').exists(), 20, 'it measures')
        assert terminal.shows_keys
        terminal.wait_for_end('(exit 0)')
        assert '\x1b' not in terminal.written
        assert ('latency in ms' in terminal.written) == (option != '-q')
    lab4.client.end_processes()
    assert 'latency in ms' in (tmp_path / 'elf.log').read_text() if option == '-q' else True
