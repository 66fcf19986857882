"""elfprobe on Debian's stock kernels, each in a virtual machine with its suite's own packages; tests/vm/run
calls this.

Virtual machines are emulated, since KVM is not to be had everywhere: they are some ten times as slow as the
machine, and may be of another architecture. Everything that a suite needs is in one image, which is built by
mmdebstrap from the mirror that this machine's apt uses, and kept in $ELFPROBE_VM_CACHE (default:
~/.cache/elfprobe-vm) until it is deleted there. So is what the last run of a suite said: its console, and
output and results of its tests.

With --userland there is no virtual machine: the suite's packages, in a directory tree (trees.py), meet this
machine's kernel, which soon shows whether its BCC compiles and loads the programs, and its pyroute2 attaches
them.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import guest

from lab import interrupt_on_signals
from trees import Failure, bootstrap, cache, recipe, shared_folder, sources, tree, visit


class Suite(NamedTuple):
    """What a virtual machine is made of."""

    name: str
    kernel: str  # the suite that the kernel is from
    architecture: str = 'amd64'
    flavour: str = ''  # of the kernel; default: the architecture


SUITES = {
    'bullseye': Suite('bullseye', 'bullseye'),
    'bookworm': Suite('bookworm', 'bookworm'),
    'trixie': Suite('trixie', 'trixie'),
    'trixie-backports': Suite('trixie', 'trixie-backports'),
    'sid': Suite('sid', 'sid'),
    'bookworm-arm64': Suite('bookworm', 'bookworm', 'arm64'),
    'bookworm-s390x': Suite('bookworm', 'bookworm', 's390x'),
    'trixie-arm64-16k': Suite('trixie', 'trixie', 'arm64', 'arm64-16k'),  # pages of 16 KiB
    'sid-rt': Suite('sid', 'sid', 'amd64', 'rt-amd64'),  # PREEMPT_RT
}


class Machine(NamedTuple):
    """What QEMU is to emulate."""

    emulator: str
    machine: str
    cpu: str
    console: str
    cards: Sequence[str] = ()  # drivers of network cards, of those that guest.py knows


MACHINES = {
    'amd64': Machine('qemu-system-x86_64', 'q35', 'max', 'ttyS0', [*guest.CARDS]),
    # Pointers are signed by QEMU's own algorithm, which its manual calls faster than the architecture's.
    'arm64': Machine('qemu-system-aarch64', 'virt', 'max,pauth-impdef=on', 'ttyAMA0'),
    's390x': Machine('qemu-system-s390x', 's390-ccw-virtio', 'max', 'ttysclp0'),  # big-endian
}

IMAGE_MIB = 2048
MEMORY_MIB = 2048
PATIENCE = 10  # how many times as slow as usual tests let all be
RUN_SECONDS = 1800  # for one run of pytest

USERLAND_RUNS = {
    'builds': ['test_packets.py', '-k', 'all_builds'],
    'paths': ['test_paths.py', '-k', 'test_rows_ or every_probe or other_system'],
    'owners': ['test_owners.py', '-k', 'by_name or fallback or nothing'],
}

# pytest's arguments for each of its runs.
RUNS = {
    'paths': ['test_paths.py', '-k', 'test_rows_ or test_probes_are or arrive_as_sent or every_probe'],
    'owners': ['test_owners.py', '-k', 'by_name or by_pid or each_fork or only_its or nothing_is_left'],
    'others': ['test_faults.py', '-k', 'of_others or taken_away'],
    'ends': ['test_faults.py', '-k', 'orderly or sigkill or killed'],
    'kernel': ['vm/test_kernel.py'],
    'cards': ['vm/test_cards.py'],
}

# Rows of the table, and which tests count: by what matches `module.test[parameters]`.
CELLS = {
    ('IPv4', 'ICMP'): '4-1',
    ('IPv4', 'TCP'): '4-6',
    ('IPv4', 'UDP'): '4-17',
    ('IPv6', 'ICMP'): '6-58',
    ('IPv6', 'TCP'): '6-6',
    ('IPv6', 'UDP'): '6-17',
}
ROWS = {
    **{
        f'{" ".join(cell)}{option}': rf'test_paths\.test_(rows|probes)_.*\[{mode}-.*-{end}\]'
        for cell, end in CELLS.items()
        for mode, option in (('truncated', ''), ('whole', ', `-T`'))
    },
    'whole paths: every probe has its row, packets arrive as sent': r'test_paths\.test_(application|every_probe)',
    '`-a` and `-P` exact': r'test_owners\.(?!test_nothing)',
    "others' filters and XDP programs": r'(others|taken_away|clsact)',
    'clean exit': r'test_owners\.test_nothing|test_faults\.(?!.*(others|taken_away|clsact))',
    'netem: latencies': r'test_kernel\.test_netem',
    'fq and BBR: order and pacing': r'test_kernel\.test_fq',
    'two senders on a CPU: all packets arrive, once': r'test_kernel\.test_preempted',
    'ipip, sit, ip6tnl, gre, ip6gre, WireGuard, PPP': r'test_kernel\.test_tunnel',
    '802.1Q devices': r'test_kernel\.test_vlan',
    'no kprobes': r'test_kernel\.test_kprobes',
    'network cards: all settings as before, offloads stay on': r'test_cards\.',
}
USERLAND_ROWS = {
    'all builds compile without a warning, and load': r'test_packets\.',
    'right rows, IPv4 and IPv6, ICMP, TCP and UDP, with and without `-T`': r'test_paths\.(?!.*other_system)',
    'as with BCC 0.12 on Linux 5.4, as with PREEMPT_RT': r'other_system',
    '`-a` exact, clean exit': r'test_owners\.',
}


class Result(NamedTuple):
    """What became of a test: `passed`, `skipped` or `failed`, and why."""

    test: str
    outcome: str
    reason: str


def userland_suites() -> list[str]:
    """Those whose programs this machine itself runs, each once."""
    native = subprocess.run(
        ['dpkg', '--print-architecture'], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.strip()
    return [name for name, suite in SUITES.items() if name == suite.name and suite.architecture == native]


def enter(name: str, root: Path, runs: dict[str, list[str]]) -> Path:
    """Run tests in a suite's tree, on this machine's kernel; the folder with what came of it."""
    share = prepare(f'{name}.userland', runs, patience=1)
    script = 'cp -r /host/elfprobe /run && cd /run/elfprobe && sh /host/job'
    with open(share / 'console', 'wb') as console:
        status = visit(root, share, script, console, RUN_SECONDS * len(runs))
    if status:
        raise Failure(f'{name}: exit status {status}, see {share / "console"}')
    return share


def image(name: str, packages: list[str]) -> Path:
    """The folder with a suite's disk image, kernel and initrd; builds it where it is missing."""
    suite = SUITES[name]
    kernel = f'linux-image-{suite.flavour or suite.architecture}/{suite.kernel}'
    packages = [kernel, 'initramfs-tools', 'kmod', 'mount', *packages]
    lines = sources(suite.name, suite.kernel)
    folder = cache() / f'{name}-{recipe(*packages, *lines, str(IMAGE_MIB))}'
    if folder.exists():
        return folder
    print(f'{name}: building the image', file=sys.stderr)
    cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='build.', dir=cache()) as build:
        root, new = Path(build, 'root'), Path(build, 'image')
        new.mkdir()
        # The initrd is to have what mounts the image and no more, so that it is unpacked in a moment.
        modules = (
            'mkdir -p "$1/etc/initramfs-tools/conf.d" "$1/usr/share/initramfs-tools/modules.d"; '
            'echo MODULES=list >"$1/etc/initramfs-tools/conf.d/vm"; '
            'printf "%s\\n" virtio_pci virtio_blk ext4 >"$1/usr/share/initramfs-tools/modules.d/vm"'
        )
        bootstrap(
            suite.name,
            packages,
            root,
            f'--architectures={suite.architecture}',
            f'--setup-hook={modules}',
            lines=lines,
        )
        for file in 'vmlinuz', 'initrd.img':
            (found,) = root.glob(f'boot/{file}-*')
            shutil.copy(found, new / file)
        (new / 'disk').touch()  # mke2fs would say that it makes it
        subprocess.run(
            [
                'mke2fs',
                '-q',
                '-t',
                'ext4',
                '-O',
                '^has_journal',
                '-m',
                '0',
                '-d',
                root,
                new / 'disk',
                f'{IMAGE_MIB}M',
            ],
            check=True,
        )
        new.rename(folder)
    return folder


def job(runs: dict[str, list[str]], patience: int) -> str:
    """The script that runs the tests: each run's output and results have its name."""
    lines = [
        f'export ELFPROBE_TESTS_PATIENCE={patience} PYTHONDONTWRITEBYTECODE=1',
        'python3 elfprobe.py --version >/host/out/version 2>&1',
        'cd tests',
    ]
    for name, arguments in runs.items():
        out = f'/host/out/{name}'
        lines += [
            f'echo "== {name}"',
            f'timeout {RUN_SECONDS} python3 -m pytest --junit-xml={out}.xml --durations=10 '
            f'{shlex.join(arguments)} >{out}.log 2>&1',
            f'tail -n 1 {out}.log',
        ]
    return '\n'.join(lines) + '\n'


def prepare(name: str, runs: dict[str, list[str]], patience: int) -> Path:
    """The folder that is shared with the tests: elfprobe's tree, the job, a place for what comes of it."""
    share = shared_folder(name)
    (share / 'job').write_text(job(runs, patience))
    return share


def boot(name: str, folder: Path, runs: dict[str, list[str]]) -> Path:
    """Run tests in a virtual machine; the folder that it shares, with what came of them."""
    share = prepare(f'{name}.run', runs, PATIENCE)
    start(name, folder, share, RUN_SECONDS * len(runs) + 300)
    return share


def start(name: str, folder: Path, share: Path, seconds: float) -> None:
    """Run the job of a shared folder in a virtual machine that has the cards of guest.py, to its end."""
    machine = MACHINES[SUITES[name].architecture]
    command = (
        'modprobe -a 9pnet_virtio 9p; mkdir -p /host; mount -t 9p -o msize=262144 host /host; '
        'exec sh /host/elfprobe/tests/vm/init'
    )
    with open(share / 'console', 'wb') as console, guest.outside(machine.emulator, machine.cards) as outside:
        subprocess.run(
            [
                *outside.prefix,
                machine.emulator,
                '-accel',
                'tcg',
                '-machine',
                machine.machine,
                '-cpu',
                machine.cpu,
                '-smp',
                '1',
                '-m',
                str(MEMORY_MIB),
                '-nodefaults',
                '-display',
                'none',
                '-serial',
                'stdio',
                '-no-reboot',
                '-kernel',
                folder / 'vmlinuz',
                '-initrd',
                folder / 'initrd.img',
                '-snapshot',
                '-drive',
                f'file={folder / "disk"},format=raw,if=virtio',
                '-device',
                'virtio-rng',
                '-virtfs',
                f'local,path={share},mount_tag=host,security_model=none',
                *outside.options,
                '-append',
                f'console={machine.console} quiet panic=-1 root=/dev/vda rw init=/bin/sh -- -c "{command}"',
            ],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
            timeout=seconds,
            check=True,
        )


def text(file: Path) -> str:
    """Nothing where the machine ended before there was anything."""
    return file.read_text() if file.exists() else ''


def results(file: Path) -> list[Result]:
    """What pytest wrote of a run; nothing where it did not come to its end."""
    if not file.exists():
        return []
    found = []
    for case in ElementTree.parse(file).iter('testcase'):
        outcome, reason = 'passed', ''
        for child in case:
            if child.tag in ('failure', 'error', 'skipped'):
                outcome = 'skipped' if child.tag == 'skipped' else 'failed'
                reason = child.get('message', '').partition('\n')[0]
        module = case.get('classname', '').rpartition('.')[2]
        found.append(Result(f'{module}.{case.get("name")}', outcome, reason))
    return found


def cell(tests: list[Result]) -> str:
    passed = sum(test.outcome == 'passed' for test in tests)
    return f'{passed}' if passed and passed == len(tests) else f'**{passed} of {len(tests)}**'


def table(shares: dict[str, Path], every: dict[str, list[Result]], rows: dict[str, str]) -> str:
    """How many tests pass, by row and suite, and below what became of the others."""
    versions = {name: text(share / 'out/version') for name, share in shares.items()}
    lines = ['| | ' + ' | '.join(shares) + ' |', '| --- ' * (len(shares) + 1) + '|']
    for part in 'Linux', 'BCC', 'pyroute2', 'psutil', 'Python':
        found = [re.search(rf'{part} (\S+?)(,|$)', version, re.MULTILINE) for version in versions.values()]
        lines.append(f'| {part} | ' + ' | '.join(match[1] if match else '' for match in found) + ' |')
    for title, pattern in rows.items():
        cells = [cell([test for test in tests if re.search(pattern, test.test)]) for tests in every.values()]
        lines.append(f'| {title} | ' + ' | '.join(cells) + ' |')
    lines.append('')
    causes: dict[tuple[str, str, str], list[str]] = {}
    for name, tests in every.items():
        for test in tests:
            if test.outcome != 'passed':
                causes.setdefault((name, test.outcome, test.reason), []).append(test.test)
    lines += [
        f'- {name}, {outcome}: {reason}: {", ".join(found)}' for (name, outcome, reason), found in causes.items()
    ]
    return '\n'.join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog='tests/vm/run',
        usage='%(prog)s [SUITE...] [-- pytest\'s arguments]',
        description='Run end-to-end tests on stock kernels in virtual machines, and show a table.',
        epilog='Of what pytest is told to run, with paths as seen from tests/, the output is shown instead.',
    )
    parser.add_argument('--packages', type=str.split, help=argparse.SUPPRESS)
    parser.add_argument(
        '--userland',
        action='store_true',
        help='the suites\' packages on this machine\'s kernel, without virtual machines',
    )
    parser.add_argument('suites', nargs='*', metavar='SUITE', help=f'{", ".join(SUITES)} (default: all)')
    own, chosen = sys.argv[1:], None
    if '--' in own:
        at = own.index('--')
        own, chosen = own[:at], own[at + 1 :]
    arguments = parser.parse_args(own)
    possible = userland_suites() if arguments.userland else [*SUITES]
    names = arguments.suites or possible
    for name in names:
        if name not in possible:
            parser.error(f'{name}: no such suite; there are {", ".join(possible)}')
    usual, rows = (USERLAND_RUNS, USERLAND_ROWS) if arguments.userland else (RUNS, ROWS)
    runs = usual if chosen is None else {'chosen': chosen}
    shares = {}
    for name in names:
        start = time.monotonic()
        try:
            if arguments.userland:
                shares[name] = enter(name, tree(name, arguments.packages), runs)
            else:
                shares[name] = boot(name, image(name, arguments.packages), runs)
        except (Failure, subprocess.SubprocessError) as error:  # the others may do better
            print(f'{name}: {error}', file=sys.stderr)
            continue
        print(f'{name}: {time.monotonic() - start:.0f} s, see {shares[name]}', file=sys.stderr)
        if chosen is not None:
            print(text(shares[name] / 'out/chosen.log'))
    every = {
        name: [test for file in sorted(share.glob('out/*.xml')) for test in results(file)]
        for name, share in shares.items()
    }
    if chosen is None:
        print(table(shares, every, rows))
    ended = len(shares) == len(names) and all(
        (share / f'out/{run}.xml').exists() for share in shares.values() for run in runs
    )
    failed = any(test.outcome == 'failed' for tests in every.values() for test in tests)
    return 1 if failed or not ended else 0


if __name__ == '__main__':
    interrupt_on_signals()
    try:
        sys.exit(main())
    except (Failure, OSError, subprocess.SubprocessError) as error:
        sys.exit(f'vm: {error}')
    except KeyboardInterrupt:
        sys.exit(130)
