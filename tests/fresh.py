"""What README.md says to do first, on fresh Debian systems; tests/fresh calls this.

A fresh system is a copy of a minimal directory tree (trees.py): apt, sudo and what Debian calls essential. It
meets this machine's kernel. So it shows which packages the commands forget, and what the packages' versions
cannot do; tests/vm/run has other kernels.

Commands run as a user with sudo, or as root where there is no sudo. Each begins in a copy of its own, so each
must bring all that it needs. With --short they share one copy, in the order of the lists in lib.sh: as each
list begins with all of the one before, a package that a command forgets is missing still.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from typing import NamedTuple

from lab import interrupt_on_signals
from trees import TREE, Failure, shared_folder, tree, visit

SUITES = 'bookworm', 'trixie', 'testing'
USER = 'newcomer'
SECONDS = 3600  # for a visit
TAIL = 30  # lines of a command that failed
TESTS = 'ELFPROBE_TESTS_STRICT=1 tests/run'
LEFT_OUT = '--ignore=test_page.py --ignore=test_plot.py'  # where there is no time: they fetch most

# A user who may do anything through sudo, in a checkout; or root without sudo. `as_typed` runs what is typed.
AS_USER = f'''
echo '{USER}:x:1000:1000::/home/{USER}:/bin/sh' >>/etc/passwd
echo '{USER}:x:1000:' >>/etc/group
echo '{USER}:*:20000:0:99999:7:::' >>/etc/shadow
echo '{USER} ALL=(ALL:ALL) NOPASSWD: ALL' >/etc/sudoers.d/{USER}
mkdir /home/{USER}
cp -r /host/elfprobe /home/{USER}
chown -R {USER}:{USER} /home/{USER}
cd /home/{USER}/elfprobe
as_typed() {{ runuser -u {USER} -- env HOME=/home/{USER} sh -ec "$1"; }}
'''
AS_ROOT = '''
rm /usr/bin/sudo
cp -r /host/elfprobe /root
cd /root/elfprobe
as_typed() { sh -ec "$1"; }
'''

# -h works before anything is installed, and installs nothing.
HELP = '''
before=$(dpkg-query -W)
for script in tests/demo tests/run tests/soak tests/fresh tests/vm/run; do
    "$script" -h | grep "sudo $script"
done
[ "$(dpkg-query -W)" = "$before" ]
'''
# A network of its own, whose default route leads by a device that is up. It is made with what elfprobe needs.
NETWORK = '''
from pyroute2 import IPRoute
with IPRoute() as ipr:
    ipr.link('add', ifname='uplink', kind='veth', peer='peer')
    for name in 'peer', 'uplink':
        index = ipr.link_lookup(ifname=name)[0]
        ipr.link('set', index=index, state='up')
    ipr.addr('add', index=index, address='192.0.2.1', prefixlen=24)
    ipr.neigh('add', ifindex=index, dst='192.0.2.2', lladdr='02:00:00:00:00:02', state=128)  # permanent
    ipr.route('add', dst='0.0.0.0/0', gateway='192.0.2.2')
'''
# Packets that nobody answers, as long as elfprobe needs to see one.
SENDER = '''
import socket, time
with socket.socket(type=socket.SOCK_DGRAM) as sock:
    for _ in range(50):
        sock.sendto(b'fresh', ('198.51.100.1', 9))
        time.sleep(0.02)
'''
# make deb, install, measure, purge. Status 0 is a run that has sent probes. /var/log and what apt itself keeps of
# packages stay; the checkout and this machine's own folders are not looked at.
PACKAGE = f'''
sudo apt-get update
sudo apt-get install -y make python3
make deb
sudo apt-get install -y ./elfprobe_*_all.deb
mkdir ../elsewhere
cd ../elsewhere
elfprobe --version
elfplot -h
[ -e /usr/share/man/man8/elfprobe.8.gz ]
run='python3 -c "$1"; elfprobe -l -- python3 -c "$2"'
sudo unshare --net sh -ec "$run" sh {shlex.quote(NETWORK)} {shlex.quote(SENDER)}
grep -q 198.51.100.1 elf.csv
[ -n "$(sudo ls /var/cache/elfprobe)" ]
sudo apt-get purge -y elfprobe
others='-path /home -prune -o -path /host -prune -o -path /tmp -prune -o -path */.cache/elfprobe-vm -prune'
set -f
left=$(sudo find / -xdev $others -o -iname '*elfp*' -print)
set +f
echo "left: $left"
[ -z "$left" ]
'''


class Command(NamedTuple):
    """A row of the table: what it is called, and what is typed."""

    title: str
    typed: str


class Visit(NamedTuple):
    """What is done in one copy: as whom, and which commands."""

    who: str
    commands: list[Command]


class Ran(NamedTuple):
    """What came of a command."""

    status: int
    seconds: int


def one_line_install() -> str:
    """Return what is typed for README.md's line, which has to measure on the device that it finds.

    No network is touched that is not the line's own, and it ends by itself. Status 3 is a run without probes.
    """
    found = re.search(
        r'^(sudo apt\S* .*) && (sudo python3 elfprobe\.py .*)$', (TREE / 'README.md').read_text(), re.MULTILINE
    )
    if not found:
        raise Failure('README.md has no line that installs packages and then runs elfprobe.py')
    install, run = found.groups()
    inside = f'python3 -c {shlex.quote(NETWORK)}; runuser -u {USER} -- {run} --duration 1 || [ $? = 3 ]'
    return f'yes | {{ {install}; }}\nsudo unshare --net sh -ec {shlex.quote(inside)}'


def visits(short: bool, chosen: list[str] | None) -> list[Visit]:
    """Return what is done; `chosen` are pytest's arguments, where that is all that is wanted."""
    asked, line = Command('`-h` of each command', HELP), Command('one-line install', one_line_install())
    demo = Command('`sudo tests/demo`', 'sudo tests/demo')
    package = Command('the package', PACKAGE)
    if chosen is not None:
        return [Visit(AS_USER, [Command('`sudo tests/run`, a part', f'sudo {TESTS} {shlex.join(chosen)}')])]
    if short:
        sample = Command('`sudo tests/run`, a sample', f'sudo {TESTS} {LEFT_OUT} -m sample')
        return [Visit(AS_USER, [asked, line, demo, sample, package])]
    return [
        Visit(AS_USER, [asked, line]),
        Visit(AS_USER, [package]),
        Visit(AS_USER, [demo]),
        Visit(AS_ROOT, [Command('`tests/demo` without sudo', 'tests/demo')]),
        Visit(AS_ROOT, [Command('`tests/run` without sudo, a sample', f'{TESTS} -m sample')]),
        Visit(AS_USER, [Command('`sudo tests/run`', f'sudo {TESTS}')]),
    ]


def job(one: Visit, out: list[str]) -> str:
    """Return the script that runs commands in a copy; `out` are names for each one's output and status."""
    lines = ['set -e', one.who, 'set +e', 'export TERM=dumb']
    for name, command in zip(out, one.commands):
        lines += [
            'start=$(date +%s)',
            f'as_typed {shlex.quote(command.typed)} >/host/out/{name}.log 2>&1',
            f'echo $? $(($(date +%s) - start)) >/host/out/{name}.status',
        ]
    return '\n'.join(lines) + '\n'


def examine(suite: str, todo: list[Visit]) -> dict[str, Ran]:
    """Do everything on fresh systems of a suite, and say what failed; return what came of it, by title."""
    out = shared_folder(f'{suite}.fresh') / 'out'  # first, since two runs must not build the same tree
    root, ran = tree(suite, ['sudo']), {}
    for number, one in enumerate(todo, 1):
        names = [f'{number}-{at}' for at, _ in enumerate(one.commands, 1)]
        with open(out / f'{number}.log', 'wb') as console:
            visit(root, out.parent, job(one, names), console, SECONDS)
        for name, command in zip(names, one.commands):
            result = out / f'{name}.status'
            # Where there is no status, the copy could not be made, or was not ready.
            ran[command.title] = Ran(*map(int, result.read_text().split())) if result.exists() else Ran(1, 0)
            log = out / (f'{name}.log' if result.exists() else f'{number}.log')
            told = log.read_text(errors='replace').splitlines()
            status, seconds = ran[command.title]
            print(
                f'{suite}: {command.title}: exit status {status} after {seconds} s, see {log}',
                *told[-1:],
                file=sys.stderr,
                sep='\n    ',
                flush=True,
            )
            if status:
                print(*told[-TAIL:], file=sys.stderr, sep='\n', flush=True)
    return ran


def table(every: dict[str, dict[str, Ran]]) -> str:
    """Return what came of each command in each suite, with the seconds that it took, installing included."""
    titles = dict.fromkeys(title for ran in every.values() for title in ran)
    lines = ['| | ' + ' | '.join(every) + ' |', '| --- ' * (len(every) + 1) + '|']
    for title in titles:
        cells = [
            '**failed**' if one is None or one.status else f'{one.seconds} s'
            for one in (ran.get(title) for ran in every.values())
        ]
        lines.append(f'| {title} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog='tests/fresh', usage='%(prog)s [--short] [SUITE...] [-- pytest\'s arguments]'
    )
    parser.add_argument('--short', action='store_true')
    parser.add_argument('suites', nargs='*', metavar='SUITE')
    own, chosen = sys.argv[1:], None
    if '--' in own:
        at = own.index('--')
        own, chosen = own[:at], own[at + 1 :]
    arguments = parser.parse_args(own)
    todo = visits(arguments.short, chosen)
    every: dict[str, dict[str, Ran]] = {}
    for suite in arguments.suites or SUITES:
        every[suite] = {}
        try:
            every[suite] = examine(suite, todo)
        except (Failure, subprocess.SubprocessError) as error:  # the others may do better
            print(f'fresh: {error}', file=sys.stderr)
    print(table(every))
    return 0 if all(ran and not any(one.status for one in ran.values()) for ran in every.values()) else 1


if __name__ == '__main__':
    interrupt_on_signals()
    try:
        sys.exit(main())
    except (Failure, OSError, subprocess.SubprocessError) as error:
        sys.exit(f'fresh: {error}')
    except KeyboardInterrupt:
        sys.exit(130)
