"""elfprobe.py without root, BPF and network: arguments, addresses, names of processes, rows, files, text.

The device is one that is nowhere, so that a run ends even where something should have ended it before.
"""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
from contextlib import ExitStack, suppress
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterator, Sequence

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import elfprobe
from elf import addresses, files, machine, processes, usage
from elf.addresses import address_text, pack_address
from elf.console import LogFormat
from elf.extensions import MalformedExtension, extension_texts, ones_complement_sum
from elf.files import DiskUse, OutputFile, RowFiles
from elf.options import Config, parse_arguments
from elf.processes import AppNames, Process
from elf.results import UNANSWERED_AFTER
from elf.rows import HEADER, NOTED, Record, RowMaker, app_text
from elf.source import HOOKS, program_text
from elf.usage import Failure, import_parts
from lab import wait_until

SCRIPT = Path(elfprobe.__file__)
LIMITED_WRITES = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from elf import files
file = files.OutputFile('elf.csv')
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    for line in sys.argv[2:]:
        file.write_lines(line.replace('/', '\\n'))
except files.Failure as failure:
    print(failure)
file.publish()
"""

OPEN_AND_WRITE = """
import sys
sys.path.insert(0, sys.argv[1])
from elf import files
file = files.OutputFile('elf.csv')
file.write_lines('other\\n')
file.publish()
file.close()
"""


def run_python(*arguments: str, **kw: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=30, **kw)


# Arguments

GOOD = {  # arguments in addition to -i none0 and an address: what they change
    '': {},
    '-I pass': {'ingress': 'pass'},
    '-I drop': {},
    '--ingress pass': {'ingress': 'pass'},
    '-l': {'logfile': True},
    '--logfile': {'logfile': True},
    '-f out/run.5': {'filebase': 'out/run.5'},
    '--filebase other': {'filebase': 'other'},
    '-d': {'debug': True},
    '--debug': {'debug': True},
    '-p 0': {'probeint': 0},
    '-p 1000': {'probeint': 1000},
    '--probeint 25': {'probeint': 25},
    '-P 1': {'pids': (1,)},
    '-P 4194304 --pid 17 -P 17': {'pids': (4194304, 17, 17)},
    '-a ping': {'apps': ('ping',)},
    '-a ping --app Iperf3': {'apps': ('ping', 'Iperf3')},
    '-r g': {'rate_global': True},
    '-r global': {'rate_global': True},
    '-r h': {},
    '-r perhop': {},
    '--ratetype global': {'rate_global': True},
    '-i eth1': {'interfaces': ('eth1',)},
    '--interface eth1': {'interfaces': ('eth1',)},
    '-T': {'notrunc': True},
    '--notrunc': {'notrunc': True},
    '-e ethernet': {},
    '--encapsulation ethernet': {},
    '-H other.c': {'hooks': 'other.c'},
    '--hooks other.c': {'hooks': 'other.c'},
    '-q': {'quiet': True, 'logfile': True},
    '--quiet': {'quiet': True, 'logfile': True},
    '--duration 2.5': {'duration': 2.5},
    '--json': {'json': True},
    '--rotate 1': {'rotate': 1},
    '--rotate 1000000': {'rotate': 1000000},
    '-w probes.pcapng': {'capture': 'probes.pcapng'},
    '-n': {'numeric': True},
    '--numeric': {'numeric': True},
    '--max-rate 1': {'max_rate': 1},
    '--max-rate 1000000': {'max_rate': 1000000},
    '--metrics 9817': {'metrics': ('127.0.0.1', 9817)},
    '--metrics 0.0.0.0:1': {'metrics': ('0.0.0.0', 1)},
    '--metrics [::]:65535': {'metrics': ('::', 65535)},
    '--metrics [fe80::1%eth0]:9817': {'metrics': ('fe80::1%eth0', 9817)},
    '-dlT -Ipass -p5': {'debug': True, 'logfile': True, 'notrunc': True, 'ingress': 'pass', 'probeint': 5},
    '--probeint=5 --app=a': {'probeint': 5, 'apps': ('a',)},
}
DEFAULTS = dict(
    interfaces=('none0',),
    addresses=('192.0.2.1',),
    apps=(),
    pids=(),
    ingress='drop',
    logfile=False,
    filebase='elf',
    debug=False,
    probeint=10,
    rate_global=False,
    notrunc=False,
    hooks=str(SCRIPT.with_name('elfhooks.c')),
    quiet=False,
    metrics=None,
    metrics_series=1000,
    duration=None,
    max_rate=50000,
    numeric=False,
    json=False,
    rotate=None,
    capture=None,
)


@pytest.mark.parametrize('line, changes', GOOD.items(), ids=GOOD)
def test_options(line: str, changes: dict[str, Any]) -> None:
    device = [] if 'interfaces' in changes else ['-i', 'none0']
    config = parse_arguments([*device, *line.split(), '192.0.2.1'])
    assert {name: getattr(config, name) for name in DEFAULTS} == {**DEFAULTS, **changes}


def test_defaults_stand_once() -> None:
    config = parse_arguments(['-i', 'none0', '192.0.2.1'])
    assert dataclasses.replace(config, salt=0) == Config(('none0',), ('192.0.2.1',))


@pytest.mark.parametrize(
    'line', ['-i none0 -T a b c', 'a b c -i none0 -T', 'a -i none0 b -T c', '-T a -i none0 b c']
)
def test_addresses_before_between_and_behind_options(line: str) -> None:
    config = parse_arguments(line.split())
    assert (config.addresses, config.interfaces, config.notrunc) == (('a', 'b', 'c'), ('none0',), True)


@pytest.mark.parametrize('line', ['-a ping', '-P 1', 'example.net', '@hosts', '-- curl'])
def test_one_kind_of_target_is_enough(line: str) -> None:
    assert parse_arguments(['-i', 'none0', *line.split()]).interfaces == ('none0',)


def test_options_behind_the_command_are_its_own() -> None:
    config = parse_arguments(['-T', '--', 'curl', '-i', 'none0', '--', '-p', '5'])
    assert (config.interfaces, config.notrunc, config.probeint) == ((), True, 10)
    assert config.child == ('curl', '-i', 'none0', '--', '-p', '5')


PIDS, INTERVAL, RATE, SECONDS = '1 to 4194304', 'milliseconds, 0 to 1000', '1 to 1000000', 'seconds above 0'
BAD: list[tuple[list[str], Sequence[str]]] = [  # arguments; what the message must name
    (['-p', '1001'], ['-p/--probeint', "'1001'", INTERVAL]),
    (['-p', '-1'], ['-p/--probeint', "'-1'", INTERVAL]),
    (['-p', '1.5'], ['-p/--probeint', "'1.5'", INTERVAL]),
    (['-p', 'fast'], ['-p/--probeint', "'fast'", INTERVAL]),
    (['-p', ''], ['-p/--probeint', "''", INTERVAL]),
    (['-p', '1e2'], ['-p/--probeint', "'1e2'", INTERVAL]),
    (['-p', '\u0661'], ['-p/--probeint', INTERVAL]),
    (['-p', '9' * 5000], ['-p/--probeint', INTERVAL]),
    (['-p'], ['-p/--probeint', 'expected one argument']),
    (['--'], ['no command', '--']),
    (['--', ''], ['no command', '--']),
    (['-P', '0'], ['-P/--pid', "'0'", PIDS]),
    (['-P', '-4'], ['-P/--pid', "'-4'", PIDS]),
    (['-P', '4194305'], ['-P/--pid', "'4194305'", PIDS]),
    (['-P', 'ping'], ['-P/--pid', "'ping'", PIDS]),
    (['-a', ''], ['-a/--app', 'empty']),
    (['-a', ' '], ['-a/--app', 'empty']),
    (['-i', ''], ['-i/--interface', 'empty']),
    (['-f', ''], ['-f/--filebase', 'empty']),
    (['-I', 'maybe'], ['-I/--ingress', "'maybe'", 'pass', 'drop']),
    (['-r', 'p'], ['-r/--ratetype', "'p'", 'g, global, h, perhop']),
    (['-r', 'Global'], ['-r/--ratetype', "'Global'", 'g, global, h, perhop']),
    (['-e', 'gre'], ['-e/--encapsulation', "'gre'", 'ethernet', 'ipinip', 'ip6inip']),
    (['--duration', '0'], ['--duration', "'0'", SECONDS]),
    (['--duration', '-1'], ['--duration', "'-1'", SECONDS]),
    (['--duration', 'nan'], ['--duration', "'nan'", SECONDS]),
    (['--duration', 'inf'], ['--duration', "'inf'", SECONDS]),
    (['--duration', 'long'], ['--duration', "'long'", SECONDS]),
    (['--max-rate', '0'], ['--max-rate', "'0'", RATE]),
    (['--max-rate', '1000001'], ['--max-rate', "'1000001'", RATE]),
    (['--max-rate', 'all'], ['--max-rate', "'all'", RATE]),
    (['-w', '-'], ['-w/--write', "'-'", 'standard output']),
    (['-w', ''], ['-w/--write', 'empty']),
    (['--rotate', '0'], ['--rotate', "'0'", 'MiB, 1 to 1000000']),
    (['--rotate', '1.5'], ['--rotate', "'1.5'", 'MiB, 1 to 1000000']),
    *(
        (['--metrics', value], ['--metrics', f"'{value}'", 'IPv6 address in brackets', '1 to 65535'])
        for value in [
            '0',
            '65536',
            '9817x',
            ':9817',
            '192.0.2.1',
            'localhost:9817',
            '::1:9817',
            '[192.0.2.1]:9817',
            '[::1]',
        ]
    ),
    (['--metrics', ''], ['--metrics', 'PORT']),
    (['--metrics-series', '0'], ['--metrics-series', "'0'", 'combinations, 1 to 10000']),
    (['--unknown'], ['--unknown']),
    (['--debu'], ['--debu']),
    (['-l=yes'], ['-l']),
    ([''], ['address', 'empty']),
]


def assert_refuses(
    arguments: list[str], status: int, named: Sequence[str], capfd: pytest.CaptureFixture[str], directory: Path
) -> None:
    """One line on standard error, nothing on the other, this exit status, and no file."""
    os.chdir(directory)
    assert elfprobe.main(arguments) == status
    out, err = capfd.readouterr()
    assert out == ''
    assert re.fullmatch(r'elfprobe\.py: [^\n]+\n', err), err
    assert [word for word in named if word not in err] == [], err
    assert list(directory.iterdir()) == []


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Path]:
    """An empty folder, which the test may make its working directory."""
    here = Path.cwd()
    yield tmp_path
    os.chdir(here)


@pytest.mark.parametrize('arguments, named', BAD, ids=[' '.join(arguments)[:30] for arguments, _ in BAD])
def test_bad_values(
    arguments: list[str], named: Sequence[str], capfd: pytest.CaptureFixture[str], empty: Path
) -> None:
    assert_refuses(['-i', 'none0', '192.0.2.1', *arguments], 2, named, capfd, empty)


@pytest.mark.parametrize(
    'arguments, named',
    [
        ([], ['nothing to probe', '-a', '-P', 'address', '-- COMMAND']),
        (['-i', 'none0'], ['nothing to probe', '-a', '-P', 'address', '-- COMMAND']),
    ],
    ids=['nothing at all', 'no target'],
)
def test_what_is_required(
    arguments: list[str], named: Sequence[str], capfd: pytest.CaptureFixture[str], empty: Path
) -> None:
    assert_refuses(arguments, 2, named, capfd, empty)


def test_not_root(capfd: pytest.CaptureFixture[str], empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elfprobe, 'MISSING', {})
    monkeypatch.setattr(machine, 'effective_capabilities', lambda: 0)
    assert_refuses(['-i', 'none0', '192.0.2.1'], 1, ['root', 'sudo', 'cap_bpf'], capfd, empty)


OPTIONS = '''
-h --help -I --ingress -l --logfile -f --filebase -d --debug -p --probeint -P --pid -a --app -r --ratetype
-i --interface -T --notrunc -e --encapsulation -H --hooks -q --quiet --duration --max-rate --version --metrics
--metrics-series
'''


@pytest.mark.sample
@pytest.mark.parametrize('option', ['-h', '--help'])
def test_help(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        elfprobe.main([option])
    assert raised.value.code == 0
    out, err = capsys.readouterr()
    assert err == ''
    words = ' '.join(out.split())
    assert [option for option in OPTIONS.split() if not re.search(rf'[ ,]{option}[ ,]', words)] == []
    for text in (
        'sudo python3 elfprobe.py [-i INTERFACE]',
        '-- COMMAND',
        'examples:',
        'address',
        '@FILE',
        '(default: 10)',
        'ms, 0 to 1000',
    ):
        assert text in words


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        elfprobe.main(['--version'])
    assert raised.value.code == 0
    out = capsys.readouterr().out
    for text in f'elfprobe {elfprobe.VERSION}', os.uname().release, 'BCC', 'pyroute2':
        assert text in out


# The script itself


def test_script_refuses(empty: Path) -> None:
    done = run_python(str(SCRIPT), '-i', 'none0', '-p', '1001', '192.0.2.1', cwd=empty)
    assert (done.returncode, done.stdout, done.stderr.count('\n')) == (2, '', 1)
    assert 'Traceback' not in done.stderr
    assert list(empty.iterdir()) == []


WITHOUT = '''
import sys
sys.path.insert(0, {folder!r})
sys.modules.update(dict.fromkeys({absent}))  # an import of them fails
import elfprobe
elfprobe.MISSING = {{name: elfprobe.MISSING[name] for name in {absent}}}  # whatever else is missing here
sys.exit(elfprobe.main(sys.argv[1:]))
'''
PACKAGES = {'bcc': 'python3-bpfcc', 'pyroute2': 'python3-pyroute2', 'psutil': 'python3-psutil'}


@pytest.mark.parametrize('absent', [['bcc'], ['pyroute2'], ['psutil'], [*PACKAGES]], ids=' '.join)
def test_missing_packages(absent: list[str], empty: Path) -> None:
    """Where some are, -h and --version still work, and a run says what to install."""
    code = WITHOUT.format(absent=absent, folder=str(SCRIPT.parent))
    done = run_python('-c', code, '-i', 'none0', '192.0.2.1', cwd=empty)
    assert (done.returncode, done.stdout, done.stderr.count('\n')) == (1, '', 1), done.stderr
    for name, package in PACKAGES.items():
        assert (package in done.stderr) == (name in absent)
    assert 'apt install' in done.stderr
    for option in '-h', '--version':
        assert run_python('-c', code, option).returncode == 0
    assert list(empty.iterdir()) == []


BROKEN = {  # content of bcc/__init__.py: what the message names
    'it uses what a library lacks': ('import os\nos.no_such_function\n', ['AttributeError', 'no_such_function']),
    'its library is missing': ("import ctypes\nctypes.CDLL('libbcc.so.none')\n", ['OSError', 'libbcc.so.none']),
    'a part is missing': ('import bcc.libbcc\n', ['ModuleNotFoundError', 'bcc.libbcc']),
    'it ends the process': ("import sys\nsys.exit('wants a display')\n", ['SystemExit', 'wants a display']),
    'another package with a BPF': ('class BPF: pass\n', ['no lib', 'another package']),
    'another package': ("__version__ = '1.0'\n", ['no BPF', 'another package']),
}


@pytest.mark.parametrize('content, named', BROKEN.values(), ids=BROKEN)
def test_broken_bcc(content: str, named: list[str], empty: Path) -> None:
    """What it is, where it is, and what to install. Help, the version and pictures need none."""
    (empty / 'bcc').mkdir()
    (empty / 'bcc' / '__init__.py').write_text(content)
    run = partial(
        run_python, cwd=empty, env={**os.environ, 'PYTHONPATH': str(empty), 'PYTHONDONTWRITEBYTECODE': '1'}
    )
    done = run(str(SCRIPT), '-i', 'none0', '192.0.2.1')
    assert (done.returncode, done.stdout, done.stderr.count('\n')) == (1, '', 1), done.stderr
    named = [*named, str(empty / 'bcc'), 'install python3-bpfcc']
    assert [word for word in named if word not in done.stderr] == [], done.stderr
    needs_none = [(SCRIPT, '-h'), (SCRIPT, '--version'), (SCRIPT.with_name('elfplot.py'), '-h')]
    for script, option in needs_none if 'another package' in named else needs_none[:1]:
        done = run(str(script), option)
        assert (done.returncode, done.stderr) == (0, '')


@pytest.mark.parametrize(
    'content, command',
    [
        ('ID=debian\n', 'apt install python3-bpfcc python3-psutil'),
        ('NAME="Linux Mint"\nID=linuxmint\nID_LIKE="ubuntu debian"\n', 'apt install python3-bpfcc python3-psutil'),
        ('ID="rocky"\nID_LIKE="rhel centos fedora"\n', 'dnf install python3-bcc python3-psutil'),
        ("ID='manjaro'\nID_LIKE=arch\n", 'pacman -S python-bcc python-psutil'),
        ('ID="opensuse-leap"\nID_LIKE="suse opensuse"\n', 'zypper install python3-bcc python3-psutil'),
        ('# minimal\nID=alpine\n', 'apk add py3-bcc py3-psutil'),
        ('ID=other\n', 'apt install python3-bpfcc python3-psutil'),
        ("ID='", 'apt install python3-bpfcc python3-psutil'),
    ],
)
def test_how_to_install_here(content: str, command: str, tmp_path: Path) -> None:
    (tmp_path / 'os-release').write_text(content)
    names = usage.distribution([str(tmp_path / 'nowhere'), str(tmp_path / 'os-release')])
    assert usage.how_to_install(['bcc', 'psutil'], names) == command


def test_import_without_site_packages(empty: Path) -> None:
    """No package but Python's own."""
    done = run_python('-I', '-S', str(SCRIPT), '-i', 'none0', '192.0.2.1', cwd=empty)
    assert (done.returncode, done.stdout, done.stderr.count('\n')) == (1, '', 1), done.stderr
    assert [package for package in PACKAGES.values() if package not in done.stderr] == []


def test_parts_of_a_package(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of a package is only imported where it has other modules than expected."""
    monkeypatch.syspath_prepend(str(empty))
    for name in 'package_a', 'package_b':
        (empty / name).mkdir()
        (empty / name / '__init__.py').write_text("Part = 'from __init__'\n")
    (empty / 'package_a' / 'module.py').write_text("Part = 'from the module'\n")
    found = {name: import_parts(name, {'Part': f'{name}.module'}) for name in ('package_a', 'package_b')}
    assert [each.Part for each in found.values()] == ['from the module', 'from __init__']
    assert all(sys.modules.pop(name) is each for name, each in found.items())
    assert sys.modules.pop('package_a.module') and not [name for name in sys.modules if 'package_b' in name]


def test_imports_start_no_programs(empty: Path) -> None:
    """Nor do they load Python's package for tests: a start would take longer, and for nothing."""
    for name in 'uname', 'file':
        (empty / name).write_text(f'#!/bin/sh\n>{empty}/called-{name}\n')
        (empty / name).chmod(0o755)
    done = run_python('-X', 'importtime', str(SCRIPT), '--version', cwd=empty, env={'PATH': str(empty)})
    modules = [line.rpartition('|')[2].strip() for line in done.stderr.splitlines()]
    assert done.returncode == 0 and 'pyroute2.netlink' in modules
    assert [name for name in modules if name.startswith('unittest')] == [*empty.glob('called-*')] == []


def test_run_by_root_leaves_no_bytecode(empty: Path) -> None:
    """The user could not remove it."""
    shutil.copy(SCRIPT, empty)
    shutil.copytree(SCRIPT.with_name('elf'), empty / 'elf', ignore=shutil.ignore_patterns('__pycache__'))
    environment = {name: value for name, value in os.environ.items() if name != 'PYTHONDONTWRITEBYTECODE'}
    subprocess.run(
        [sys.executable, str(empty / SCRIPT.name), '-h'],
        check=True,
        env=environment,
        stdout=subprocess.DEVNULL,
        timeout=60,
    )
    assert not [*empty.rglob('*.pyc')]


# Addresses

V4, V6 = bytes(10) + b'\xff\xff', bytes.fromhex('20010db8')
ADDRESSES = {  # text: packed, how it is written in rows, whether packets to it leave the host
    '192.0.2.1': (V4 + bytes([192, 0, 2, 1]), '192.0.2.1', True),
    '10.255.0.1': (V4 + bytes([10, 255, 0, 1]), '10.255.0.1', True),
    '::ffff:192.0.2.1': (V4 + bytes([192, 0, 2, 1]), '192.0.2.1', True),
    '2001:db8::1': (V6 + bytes(11) + b'\1', '2001:db8::1', True),
    '2001:0DB8:0:0:0:0:0:1': (V6 + bytes(11) + b'\1', '2001:db8::1', True),
    'fe80::1%eth0': (b'\xfe\x80' + bytes(13) + b'\1', 'fe80::1', True),
    '127.0.0.1': (V4 + bytes([127, 0, 0, 1]), '127.0.0.1', False),
    '127.9.9.9': (V4 + bytes([127, 9, 9, 9]), '127.9.9.9', False),
    '::ffff:127.0.0.1': (V4 + bytes([127, 0, 0, 1]), '127.0.0.1', False),
    '0.0.0.0': (V4 + bytes(4), '0.0.0.0', False),
    '::1': (bytes(15) + b'\1', '::1', False),
    '::': (bytes(16), '::', False),
    '224.0.0.1': (V4 + bytes([224, 0, 0, 1]), '224.0.0.1', False),
    'ff02::1': (b'\xff\2' + bytes(13) + b'\1', 'ff02::1', False),
}


@pytest.mark.parametrize('text', ADDRESSES)
def test_address(text: str) -> None:
    packed, written, remote = ADDRESSES[text]
    assert pack_address(text) == packed
    assert address_text(packed) == written
    assert (addresses.why_unreachable(packed) == '') == remote


@pytest.mark.parametrize(
    'text', ['', 'example.net', '192.0.2', '192.0.2.256', '2001:db8::g', '192.0.2.1/24', '@hosts']
)
def test_no_address(text: str) -> None:
    with pytest.raises(ValueError):
        pack_address(text)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """What resolves, and to what; addresses resolve to themselves. The test fills it."""
    known: dict[str, list[str]] = {}

    def getaddrinfo(host: str, port: object, *_: Any, **__: Any) -> list[tuple[Any, ...]]:
        try:
            addresses = known.get(host) or [host.split('%')[0] and host]
            return [
                (socket.AF_INET, socket.SOCK_STREAM, 6, '', (address, 0))
                for address in addresses
                if pack_address(address)
            ]
        except ValueError:
            raise socket.gaierror(socket.EAI_NONAME, 'Name or service not known') from None

    monkeypatch.setattr(socket, 'getaddrinfo', getaddrinfo)
    return known


def texts(packed: Any) -> list[str]:
    return sorted(address_text(address) for address in packed)


def test_a_name_stands_for_all_its_addresses(names: dict[str, list[str]]) -> None:
    names['example.net'] = ['192.0.2.1', '192.0.2.2', '192.0.2.1', '2001:db8::1']
    assert texts(addresses.resolve('example.net')) == ['192.0.2.1', '192.0.2.2', '2001:db8::1']
    found = addresses.resolve_all(['example.net', '192.0.2.1', '2001:db8::2'], 9)
    assert texts(found) == ['192.0.2.1', '192.0.2.2', '2001:db8::1', '2001:db8::2']
    assert found[pack_address('192.0.2.1')] == 'example.net'


@pytest.mark.parametrize('name', ['localhost', '127.0.0.1', '::1', '0.0.0.0', 'half.example'])
def test_what_never_leaves_the_host_is_refused(names: dict[str, list[str]], name: str) -> None:
    names.update({'localhost': ['127.0.0.1', '::1'], 'half.example': ['192.0.2.1', '127.0.0.1']})
    with pytest.raises(Failure, match=f"'{name}'.* never leaves this host") as raised:
        addresses.resolve_all(['192.0.2.9', name], 9)
    assert raised.value.status == 1


@pytest.mark.parametrize('name', ['no.such.example', '192.0.2.256', '2001:db8::g'])
def test_names_that_do_not_resolve(names: dict[str, list[str]], name: str) -> None:
    with pytest.raises(Failure, match=f"'{name}'.*Name or service not known") as raised:
        addresses.resolve_all([name], 9)
    assert raised.value.status == 1


@pytest.mark.parametrize('name', ['x' * 64 + '.example', 'a..example', '\udcff.example', 'a\0b'])
def test_what_cannot_be_a_host_name(name: str) -> None:
    with pytest.raises(Failure, match='^address '):
        addresses.resolve(name)


def test_address_file(names: dict[str, list[str]], tmp_path: Path) -> None:
    names['example.net'] = ['2001:db8::1', '192.0.2.1']
    hosts = tmp_path / 'hosts'
    hosts.write_bytes(b'# mine\n\n  192.0.2.7  # the first\r\nexample.net\n\t\n2001:db8::5')
    assert [name for name, _ in addresses.read_address_file(str(hosts))] == [
        '192.0.2.7',
        'example.net',
        '2001:db8::5',
    ]
    assert texts(addresses.resolve_all([f'@{hosts}', '192.0.2.8'], 9)) == [
        '192.0.2.1',
        '192.0.2.7',
        '192.0.2.8',
        '2001:db8::1',
        '2001:db8::5',
    ]


@pytest.mark.parametrize(
    'content, reason',
    [
        (None, 'No such file'),
        (b'', 'no address'),
        (b'\n# none\n', 'no address'),
        (b'\xff\xfe1\0', 'not a text file'),
    ],
    ids=['missing', 'empty', 'comments', 'binary'],
)
def test_bad_address_files(content: bytes | None, reason: str, tmp_path: Path) -> None:
    hosts = tmp_path / 'hosts'
    if content is not None:
        hosts.write_bytes(content)
    with pytest.raises(Failure, match=f"address file '{hosts}': .*{reason}"):
        addresses.resolve_all([f'@{hosts}'], 9)


def test_bad_line_in_an_address_file(names: dict[str, list[str]], tmp_path: Path) -> None:
    hosts = tmp_path / 'hosts'
    hosts.write_text('192.0.2.1\nno.such.example\n')
    with pytest.raises(Failure, match='no.such.example'):
        addresses.resolve_all([f'@{hosts}'], 9)


# Processes

PROGRAMS = {  # process name, executable, command line: all names that it goes by
    'a program': (('ping', '/usr/bin/ping', 'ping -c1 host'), {'ping'}),
    'with capitals': (('Xorg', '/usr/lib/xorg/Xorg', '/usr/lib/xorg/Xorg :0'), {'xorg'}),
    'renamed': (('worker', '/opt/bin/server', 'worker 1'), {'worker', 'server'}),
    'a name longer than 15 characters': (
        ('gnome-remote-de', '/usr/libexec/gnome-remote-desktop', 'gnome-remote-desktop'),
        {'gnome-remote-de', 'gnome-remote-desktop'},
    ),
    'of another user': (('sshd', '', ''), {'sshd'}),
    'of another user, with a command line': (('tool', '', '/opt/tool-1.2/Tool --fast'), {'tool'}),
    'nothing known': (('', '', ''), set()),
    'a script': (
        ('python3', '/usr/bin/python3.11', 'python3 /opt/SpeedTest.py --secure'),
        {'python3', 'python3.11', 'speedtest', 'speedtest.py'},
    ),
    'a script without extension': (
        ('speedtest', '/usr/bin/python3', '/usr/bin/python3 /bin/speedtest'),
        {'speedtest', 'python3'},
    ),
    'a script with options before it': (
        ('python3', '/usr/bin/python3', 'python3 -u -OO app.py -v x.py'),
        {'python3', 'app', 'app.py'},
    ),
    'a script behind an option with a value': (
        ('python3', '/usr/bin/python3', 'python3 -W ignore app.py'),
        {'python3', 'app', 'app.py'},
    ),
    'a module of Python': (('python3', '/usr/bin/python3', 'python3 -m speedtest'), {'python3', 'speedtest'}),
    'a module of Python with options': (
        ('python3', '/usr/bin/python3', 'python3 -u -m speedtest --bytes'),
        {'python3', 'speedtest'},
    ),
    'node': (('node', '/usr/bin/node', 'node server.js'), {'node', 'server', 'server.js'}),
    'bash': (('run.sh', '/usr/bin/bash', '/bin/bash ./run.sh'), {'run.sh', 'bash', 'run'}),
    'perl': (('perl', '/usr/bin/perl5.36', 'perl /x/get.pl x'), {'perl', 'perl5.36', 'get', 'get.pl'}),
    'an interpreter alone': (('bash', '/usr/bin/bash', '-bash'), {'bash'}),
    'an interpreter with code': (('sh', '/usr/bin/dash', 'sh -c true/speedtest'), {'sh', 'dash'}),
    'a jar': (('java', '/x/java', 'java -Xmx1g -jar /opt/speed.jar -x'), {'java', 'speed', 'speed.jar'}),
    'a class': (('java', '/x/java', 'java -cp a.jar:b org.example.Main x.y'), {'java', 'org.example.main', 'main'}),
    'a module': (('java', '/x/java', 'java -p lib -m app/org.example.Main'), {'java', 'org.example.main', 'main'}),
    'an assembly': (('dotnet', '/x/dotnet', 'dotnet exec --depsfile d Own.dll'), {'dotnet', 'own', 'own.dll'}),
    'mono': (('mono', '/usr/bin/mono-sgen', 'mono Own.exe'), {'mono', 'mono-sgen', 'own', 'own.exe'}),
    'deno': (('deno', '/x/deno', 'deno run --allow-net -c d.json fetch.ts run'), {'deno', 'fetch', 'fetch.ts'}),
    'deno without a command': (('deno', '/x/deno', 'deno fetch.ts'), {'deno', 'fetch', 'fetch.ts'}),
    'deno with code': (('deno', '/x/deno', 'deno eval fetch.ts'), {'deno'}),
    'bun': (('bun', '/x/bun', 'bun --cwd x run fetch.ts'), {'bun', 'fetch', 'fetch.ts'}),
    'pypy': (('pypy3', '/usr/bin/pypy3.10', 'pypy3 -W ignore app.py'), {'pypy3', 'pypy3.10', 'app', 'app.py'}),
    'uwsgi': (
        ('uwsgi', '/usr/bin/uwsgi-core', 'uwsgi --http :80 --wsgi-file=/srv/app.py'),
        {'uwsgi', 'uwsgi-core', 'app', 'app.py'},
    ),
    'uwsgi with a module': (('uwsgi', '/usr/bin/uwsgi', 'uwsgi -w shop:application'), {'uwsgi', 'shop'}),
    'no interpreter, though it looks like one': (('shell', '/usr/bin/shell', 'shell script'), {'shell'}),
}


@pytest.mark.parametrize('process, wanted', PROGRAMS.values(), ids=PROGRAMS)
def test_names_of_a_process(process: tuple[str, str, str], wanted: set[str]) -> None:
    name, exe, command = process
    assert processes.process_names(Process(1, 0, name, exe, tuple(command.split()))) == wanted


def test_names_close_to_one_that_does_not_run() -> None:
    assert processes.close_programs('Curl', ['curl', 'crul', 'grep']) == ' (close: crul)'
    assert processes.close_programs('curl', ['curl', 'grep']) == ''


def test_process_that_becomes_another_program(tmp_path: Path) -> None:
    """It goes by the name of what it runs now, as often as it has been looked at before."""
    (tmp_path / 'speedtest').symlink_to('/bin/cat')
    command = 'read line; exec "$0"', tmp_path / 'speedtest'
    with subprocess.Popen(['/bin/bash', '-c', *command], stdin=subprocess.PIPE, text=True) as running:
        assert running.stdin

        def names() -> set[str]:
            (found,) = (one for one in processes.running_processes() if one.pid == running.pid)
            return processes.process_names(found)

        assert wait_until(lambda: 'bash' in names(), 5, 'it runs')
        running.stdin.write('go\n')
        running.stdin.flush()
        wait_until(lambda: 'speedtest' in names(), 5, 'it runs the other program')
        assert names() == {'speedtest', 'cat'}


def is_in(text: str, path: Path) -> bool:
    return text in path.read_text()


def test_names_that_are_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an executable, also by a link, and of a script; not of another file with the same name."""
    monkeypatch.chdir(tmp_path)
    for folder in 'here', 'there':
        (tmp_path / folder).mkdir()
        shutil.copy('/bin/cat', tmp_path / folder / 'prog')
        (tmp_path / folder / 'run.sh').write_text('read line\n')
    (tmp_path / 'link').symlink_to('here/prog')
    apps = AppNames(['./link', str(tmp_path / 'here/run.sh'), './nowhere'])
    with ExitStack() as stack:
        for folder, command in product(('here', 'there'), (['./prog'], ['/bin/bash', 'run.sh'])):
            running = stack.enter_context(
                subprocess.Popen(command, cwd=tmp_path / folder, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
            )
            arguments = Path(f'/proc/{running.pid}/cmdline')
            wait_until(partial(is_in, command[-1], arguments), 5, 'it runs')
            assert apps.match(processes.look_at_process(running.pid)) == (folder == 'here')
    assert apps.unseen == {'./nowhere'}


@pytest.mark.parametrize('change', ['removed', 'not told'])
def test_interpreter_whose_executable_is(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by an update of its package, or as to who lacks sys_ptrace. It is an interpreter all the same."""

    def refuse(path: str) -> str:
        raise PermissionError(path)

    interpreter, script = tmp_path / 'bash', tmp_path / 'speedtest.sh'
    shutil.copy('/bin/bash', interpreter)
    script.write_text('read line\n')
    with subprocess.Popen([interpreter, script], stdin=subprocess.PIPE) as running:
        command = str(interpreter), str(script)
        wait_until(lambda: processes.look_at_process(running.pid).cmdline == command, 5, 'it runs')
        if change == 'removed':
            interpreter.unlink()
        else:
            monkeypatch.setattr(os, 'readlink', refuse)
        names = processes.process_names(processes.look_at_process(running.pid))
        monkeypatch.undo()
    assert names == {'bash', 'speedtest.sh', 'speedtest'}


def test_descriptors_that_change_hands(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was a socket when it was looked at may be another file when it is duplicated."""
    readlink, own = os.readlink, f'/proc/{os.getpid()}/fd'

    def was_a_socket(path: str) -> str:
        return 'socket:[1]' if path.startswith(own) else readlink(path)

    with socket.socket() as ours, open(os.devnull):
        descriptors = len(os.listdir(own))
        monkeypatch.setattr(os, 'readlink', was_a_socket)
        found = [one.getsockname() for one in elfprobe.duplicated_sockets(os.getpid())]
        monkeypatch.undo()
        assert ours.getsockname() in found
        assert len(os.listdir(own)) == descriptors


def process(pid: int, ppid: int, name: str, command: str = '') -> Process:
    return Process(pid, ppid, name, f'/usr/bin/{name}', tuple(command.split()))


PROCESSES = [
    process(1, 0, 'init'),
    process(40, 1, 'bash'),
    process(41, 40, 'ping'),
    process(42, 40, 'Browser'),
    process(30, 42, 'renderer'),
    process(31, 30, 'helper'),
    process(50, 1, 'python3', 'python3 -m browser'),
    process(60, 1, 'ping'),
    process(70, 70, 'odd'),
]
CHOICES = {  # names, process IDs: whose processes are targets
    'a name': ((['ping'], []), {41: 'ping', 60: 'ping'}),
    'case does not matter': ((['PING'], []), {41: 'ping', 60: 'ping'}),
    'children and their children': (
        (['browser'], []),
        {42: 'Browser', 30: 'renderer', 31: 'helper', 50: 'python3'},
    ),
    'a process': (([], [30]), {30: 'renderer', 31: 'helper'}),
    'a process of a name and its child': ((['helper'], [30, 60]), {30: 'renderer', 31: 'helper', 60: 'ping'}),
    'its own parent': ((['odd'], [70]), {70: 'odd'}),
    'a part of a name': ((['brows', 'rowser', 'p'], []), {}),
    'no such process': (([], [99]), {}),
    'nothing': (([], []), {}),
    'everything': (([], [1]), {process.pid: process.name for process in PROCESSES if process.pid != 70}),
}


@pytest.mark.parametrize('targets, chosen', CHOICES.values(), ids=CHOICES)
def test_choice_of_processes(targets: tuple[list[str], list[int]], chosen: dict[int, str]) -> None:
    names, pids = targets
    for those in iter(PROCESSES), reversed(PROCESSES):
        assert processes.choose_processes(those, AppNames(names), pids) == chosen


# Layouts and rows


class Address(ctypes.Structure):
    _fields_ = [('word', ctypes.c_uint32 * 4)]


class Inner(ctypes.Structure):
    _fields_ = [('big', ctypes.c_uint64), ('small', ctypes.c_uint8), ('unused', ctypes.c_uint8 * 2)]


class Outer(ctypes.Structure):
    _fields_ = [
        ('byte', ctypes.c_uint8),
        ('inner', Inner),
        ('half', ctypes.c_uint16),
        ('address', Address),
        ('__pad_4', ctypes.c_char * 3),
        ('bytes', ctypes.c_uint8 * 3),
        ('last', ctypes.c_uint16),
    ]


def test_struct_format() -> None:
    layout, found = elfprobe.struct_format(Outer)
    assert found == ['byte', 'big', 'small', 'half', 'address', 'bytes', 'last']
    assert struct.calcsize(layout) == ctypes.sizeof(Outer)
    inner, words = Inner(2**63 + 2, 3, (0xEE, 0xEE)), Address((5, 6, 7, 8))
    outer = Outer(1, inner, 0x1234, words, b'\xee' * 3, (9, 10, 11), 0xFFFF)
    address = struct.pack('=4I', 5, 6, 7, 8)
    assert struct.unpack(layout, bytes(outer)) == (1, 2**63 + 2, 3, 0x1234, address, b'\t\n\v', 0xFFFF)


PROBE: dict[str, Any] = dict(
    seq=7,
    origseq=4294967295,
    sendtime=1000000000001,
    outttl=3,
    outipid=65535,
    app=b'tool\0\0',
    pid=77,
    outtos=72,
    srtt=1500,
    cwnd=10,
    retrans=0,
    inflight=3,
    source=pack_address('192.0.2.77'),
)
KEY: dict[str, Any] = dict(
    dest=pack_address('198.51.100.9'), sport=socket.htons(40112), dport=socket.htons(443), ident=99, protocol=6
)
REPLY: dict[str, Any] = dict(
    recvcpu=5, recvtime=1000000250001, responder=pack_address('192.0.2.1'), recvttl=62, inipid=0, intos=0, qttl=1,
    qlen=52, rsize=80, rtos=192, ripid=0
)  # fmt: skip
VERSION_6: dict[str, Any] = dict(
    app=bytes(16),
    pid=0,
    dest=pack_address('2001:db8::9'),
    responder=pack_address('2001:db8:1::1'),
    source=pack_address('2001:db8::77'),
    protocol=17,
    cwnd=0,
)
ROWS = {
    'answered': (
        {**PROBE, **REPLY, **KEY},
        '5,7,4294967295,250000,1000000000001,1000000250001,198.51.100.9,192.0.2.1,3,62,40112,443,6,65535,0,tool,77'
        ',1500,10,0,72,0,,,192.0.2.77,3,1,52,80,192,0\n',
    ),
    'answered, IPv6': (
        {**PROBE, **REPLY, **KEY, **VERSION_6},
        '5,7,4294967295,250000,1000000000001,1000000250001,2001:db8::9,2001:db8:1::1,3,62,40112,443,17,65535,0,,'
        ',,,,72,0,,,2001:db8::77,,1,52,80,192,0\n',
    ),
    'unanswered': (
        {**PROBE, **KEY},
        '0,7,4294967295,-1,1000000000001,-1,198.51.100.9,,3,-1,40112,443,6,65535,-1,tool,77,1500,10,0,72,,,'
        ',192.0.2.77,3,,,,,\n',
    ),
    'unanswered, IPv6': (
        {**KEY, **PROBE, 'dest': VERSION_6['dest'], 'srtt': 0},
        '0,7,4294967295,-1,1000000000001,-1,2001:db8::9,,3,-1,40112,443,6,65535,-1,tool,77,,10,0,72,,,'
        ',192.0.2.77,3,,,,,\n',
    ),
}


CODES = {bytes: '16s', int: 'Q'}


def made(values: dict[str, Any], *texts: str, count: int = 1) -> tuple[list[str], list[Record]]:
    """Rows of so many probes with these values, and what the summary gets of the probes."""
    layout = '=' + 'x'.join(CODES[type(value)] for value in values.values())
    records = []

    def noter(probe: Record) -> Callable[..., None]:
        return lambda *noted: records.append(probe._replace(**dict(zip(NOTED, noted))))

    maker = RowMaker(layout, list(values), noter)
    return maker.rows(count * struct.pack(layout, *values.values()), *texts), records


@pytest.mark.parametrize('values, row', ROWS.values(), ids=ROWS)
def test_rows(values: dict[str, Any], row: str) -> None:
    backwards = dict(reversed(list(values.items())))
    assert made(values, count=3)[0] == made(backwards, count=3)[0] == 3 * [row]
    assert row.count(',') == HEADER.count(',')


def test_rows_differ_in_each_field() -> None:
    """What rows have in common is not taken for what they have not."""
    values = {**PROBE, **REPLY, **KEY}
    layout = '=' + ''.join(CODES[type(value)] for value in values.values())
    others = [
        {**values, name: value + 1 if isinstance(value, int) else bytes(15) + b'1'}
        for name, value in values.items()
    ]
    maker = RowMaker(layout, list(values), lambda _: lambda *_: None)
    rows = maker.rows(b''.join(struct.pack(layout, *each.values()) for each in [values, *others, values]))
    assert rows == [row for each in [values, *others, values] for row in made(each)[0]]
    assert len(set(rows)) == len(others)  # no column depends on `ident`


def test_row_with_texts() -> None:
    """Texts of an extension and names of programs may have any characters, and those of formats."""
    values = {**PROBE, **REPLY, **KEY, 'app': b'100%d,%s'}
    rows, _ = made(values, '16/0/1/1', 'role=incoming;name=a,%b', count=2)
    (row,) = set(rows)
    assert ',"100%d,%s",' in row
    assert ',72,0,16/0/1/1,"role=incoming;name=a,%b",192.0.2.77,' in row


RECORD = dict(
    dest='198.51.100.9',
    sport=40112,
    dport=443,
    protocol=6,
    outttl=3,
    sendtime=1000000000001,
    latency=250000,
    responder='192.0.2.1',
    srtt=1500,
    cwnd=10,
    retrans=0,
    outtos=72,
    intos=0,
    app='tool',
    pid=77,
    origseq=4294967295,
    source='192.0.2.77',
    ripid=0,
    recvttl=62,
)


@pytest.mark.parametrize(
    'values, changes',
    [
        ({**REPLY, 'translated': 1}, dict(translated=1)),
        ({**REPLY, 'srtt': 0}, dict(srtt=None)),
        ({**REPLY, 'cwnd': 0}, dict(srtt=None, cwnd=None, retrans=None)),
        ({}, dict(latency=-1, responder='', intos=None, ripid=None, recvttl=-1)),
    ],
    ids=['answered', 'no round trip yet', 'not TCP', 'unanswered'],
)
def test_records(values: dict[str, Any], changes: dict[str, Any]) -> None:
    """What the summary gets of a probe is what its row says, with None for what is not known."""
    values = {**PROBE, **KEY, **values}
    assert made(values, count=2)[1] == 2 * [Record(**{**RECORD, **changes})]


def test_columns() -> None:
    names = HEADER.rstrip('\n').split(',')
    assert names[:15] == [
        'recvcpu',
        'seq',
        'origseq',
        'latency',
        'sendtime',
        'recvtime',
        'dest',
        'responder',
        'outttl',
        'recvttl',
        'sport',
        'dport',
        'protocol',
        'outipid',
        'inipid',
    ]
    assert names[15:24] == ['app', 'pid', 'srtt', 'cwnd', 'retrans', 'outtos', 'intos', 'mpls', 'ifinfo']
    assert names[24:] == ['source', 'inflight', 'qttl', 'qlen', 'rsize', 'rtos', 'ripid']


def extension(*objects: tuple[int, int, bytes], version: int = 2, checksum: int | None = None) -> bytes:
    """An extension structure of objects: class, type, content (RFC 4884, 7)."""
    content = b''.join(struct.pack('!HBB', 4 + len(data), kind, subtype) + data for kind, subtype, data in objects)
    head = struct.pack('!BxH', version << 4, 0)
    if checksum is None:
        checksum = 0xFFFF - ones_complement_sum(head + content)
    return struct.pack('!BxH', version << 4, checksum) + content


def label(number: int, tc: int, bottom: int, ttl: int) -> bytes:
    return struct.pack('!I', number << 12 | tc << 9 | bottom << 8 | ttl)


NAME = b'\x0cge-0/0/1\0\0\0'  # its length first, then padded
EXTENSIONS: dict[str, tuple[bytes, tuple[str, str]]] = {
    'one label': (extension((1, 1, label(24001, 5, 1, 1))), ('24001/5/1/1', '')),
    'three labels': (
        extension((1, 1, label(16, 0, 0, 254) + label(1048575, 7, 0, 0) + label(3, 1, 1, 1))),
        ('16/0/0/254;1048575/7/0/0;3/1/1/1', ''),
    ),
    'an interface': (
        extension((2, 0x0F, struct.pack('!IHH', 7, 1, 0) + b'\xc0\0\x02\1' + NAME + struct.pack('!I', 1500))),
        ('', 'role=incoming;index=7;addr=192.0.2.1;name=ge-0/0/1;mtu=1500'),
    ),
    'interfaces of other roles': (
        extension(
            (2, 0x48, struct.pack('!I', 1)),
            (2, 0x84, struct.pack('!HH', 2, 0) + bytes(15) + b'\1'),
            (2, 0xC2, NAME),
        ),
        ('', 'role=sub-ip;index=1|role=outgoing;addr=::1|role=next-hop;name=ge-0/0/1'),
    ),
    'both': (
        extension((2, 8, struct.pack('!I', 2)), (1, 1, label(5, 0, 1, 9))),
        ('5/0/1/9', 'role=incoming;index=2'),
    ),
    'no checksum': (extension((1, 1, label(5, 0, 1, 9)), checksum=0), ('5/0/1/9', '')),
    'objects of unknown kinds': (extension((247, 1, b'what'), (1, 2, b'else')), ('', '')),
    'nothing': (extension(), ('', '')),
}


@pytest.mark.parametrize('data, texts', EXTENSIONS.values(), ids=EXTENSIONS)
def test_extensions(data: bytes, texts: tuple[str, str]) -> None:
    assert extension_texts(data) == texts


@pytest.mark.parametrize(
    'data',
    {
        'another version': extension((1, 1, label(5, 0, 1, 9)), version=1),
        'a wrong checksum': extension((1, 1, label(5, 0, 1, 9)), checksum=1),
        'cut in the header': b'\x20\0\0',
        'an object without end': extension(checksum=0) + b'\0\0\1\1',
        'an object too long': extension(checksum=0) + b'\0\x09\1\1' + label(5, 0, 1, 9),
        'an object cut in its header': extension(checksum=0) + b'\0\x08',
        'half a label': extension((1, 1, b'half a')),
        'an interface without its address': extension((2, 4, b'')),
        'an address of no family': extension((2, 4, struct.pack('!HH', 9, 0) + bytes(4))),
        'half an address': extension((2, 4, struct.pack('!HH', 1, 0) + bytes(2))),
        'a name that is too long': extension((2, 2, b'\x10name')),
        'a name without a length': extension((2, 2, b'\0\0\0\0')),
        'no name': extension((2, 2, b'')),
    }.items(),
    ids=lambda item: item[0],
)
def test_malformed_extensions(data: tuple[str, bytes]) -> None:
    with pytest.raises(MalformedExtension):
        extension_texts(data[1])


@pytest.mark.parametrize(
    'comm, field',
    {
        b'speedtest\0\0\0\0\0\0\0': 'speedtest',
        b'kworker/0:1-eve\0': 'kworker/0:1-eve',
        bytes(16): '',
        b'a,b\0old\0': '"a,b"',
        b'say "hi"\0': '"say ""hi"""',
        b'two\nlines\r\0': 'two?lines?',
        b'\xff\xfe\0': '\ufffd\ufffd',
    }.items(),
)
def test_app_as_a_field(comm: bytes, field: str) -> None:
    assert app_text(comm) == field


# Files


def contents(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir()}


@pytest.fixture
def csv(tmp_path: Path) -> Callable[[], OutputFile]:
    return lambda: OutputFile(str(tmp_path / 'elf.csv'))


def test_output_files_are_never_overwritten(csv: Callable[[], OutputFile], tmp_path: Path) -> None:
    for number, renamed in enumerate(['', 'elf.1.csv', 'elf.2.csv', 'elf.3.csv']):
        file = csv()
        file.write_lines(f'run {number}\n')
        assert file.publish() == (renamed and str(tmp_path / renamed))
        file.close()
    assert contents(tmp_path) == {
        'elf.1.csv': 'run 0\n',
        'elf.2.csv': 'run 1\n',
        'elf.3.csv': 'run 2\n',
        'elf.csv': 'run 3\n',
    }


def test_gaps_between_renamed_files_are_filled(csv: Callable[[], OutputFile], tmp_path: Path) -> None:
    for name in 'elf.csv', 'elf.2.csv':
        (tmp_path / name).write_text(name)
    publish(csv())
    assert contents(tmp_path) == {'elf.csv': '', 'elf.1.csv': 'elf.csv', 'elf.2.csv': 'elf.2.csv'}


def publish(file: OutputFile) -> None:
    file.publish()
    file.close()


@pytest.mark.parametrize('before', [{}, {'elf.csv': 'old'}], ids=['no file', 'an old one'])
def test_an_unpublished_file_leaves_everything_as_it_was(
    csv: Callable[[], OutputFile], tmp_path: Path, before: dict[str, str]
) -> None:
    for name, text in before.items():
        (tmp_path / name).write_text(text)
    file = csv()
    file.write_lines('rows\n')
    file.close()
    assert contents(tmp_path) == before


def test_two_runs_that_begin_at_once(
    csv: Callable[[], OutputFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One opens its file while the other has chosen a name for the old one: waits for it, or loses it."""
    choose = files.next_free_base
    others: list[subprocess.Popen[str]] = []

    def choose_slowly(*names: str) -> str:
        name = choose(*names)
        others.append(
            subprocess.Popen(
                [sys.executable, '-c', OPEN_AND_WRITE, str(SCRIPT.parent)],
                cwd=tmp_path,
                text=True,
                stderr=subprocess.PIPE,
            )
        )
        with suppress(subprocess.TimeoutExpired):
            others[0].communicate(timeout=2)
        return name

    (tmp_path / 'elf.csv').write_text('old')
    with monkeypatch.context() as patched:
        patched.setattr(files, 'next_free_base', choose_slowly)
        publish(csv())
    [other] = others
    assert (other.communicate()[1], other.returncode) == ('', 0)
    assert sorted(contents(tmp_path).values()) == ['', 'old', 'other\n']


def test_a_file_that_a_run_writes_keeps_its_name(csv: Callable[[], OutputFile], tmp_path: Path) -> None:
    (tmp_path / 'elf.1.csv').write_text('old')
    first, second = csv(), csv()
    for name, file in ('elf.csv', first), ('elf.2.csv', second):
        assert file.publish() == ''
        assert file.path == str(tmp_path / name)
        file.write_lines(f'{name}\n')
    assert contents(tmp_path) == {'elf.1.csv': 'old', 'elf.csv': 'elf.csv\n', 'elf.2.csv': 'elf.2.csv\n'}
    first.close()
    assert csv().publish() == str(tmp_path / 'elf.3.csv')
    second.close()


@pytest.mark.parametrize('kind', ['link', 'hard link', 'pipe', 'folder'])
def test_a_link_is_renamed_not_followed(csv: Callable[[], OutputFile], tmp_path: Path, kind: str) -> None:
    """And a pipe is not waited for, nor a folder minded."""
    path, target = tmp_path / 'elf.csv', tmp_path / 'target'
    if kind == 'link':
        path.symlink_to(target)
    elif kind == 'hard link':
        target.write_text('to somebody')
        os.link(target, path)
    elif kind == 'pipe':
        os.mkfifo(path)
    else:
        path.mkdir()
    before = path.lstat().st_ino
    file = csv()
    file.publish()
    file.write_lines('rows')
    file.close()
    assert (tmp_path / 'elf.1.csv').lstat().st_ino == before
    assert path.is_file() and not path.is_symlink()
    assert (target.read_text() if target.exists() else '') == ('to somebody' if kind == 'hard link' else '')


def test_unwritable_output(tmp_path: Path) -> None:
    path = tmp_path / 'missing' / 'elf.csv'
    with pytest.raises(Failure, match=f"-f/--filebase.*'{path}': No such file or directory") as raised:
        OutputFile(str(path))
    assert raised.value.status == 1


@pytest.mark.parametrize('step', ['open', 'rename'])
def test_an_old_file_stays_when_the_new_one_cannot_be_made(
    csv: Callable[[], OutputFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def refuse(*_: Any) -> int:
        raise PermissionError(13, 'Permission denied')

    (tmp_path / 'elf.csv').write_text('old')
    with ExitStack() as stack, monkeypatch.context() as patched:
        patched.setattr(os, step, refuse)
        with pytest.raises(Failure, match='Permission denied'):
            file = csv()
            stack.callback(file.close)
            file.publish()
    assert contents(tmp_path) == {'elf.csv': 'old'}


def test_a_file_system_without_hard_links(
    csv: Callable[[], OutputFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(1, 'Operation not permitted')

    with monkeypatch.context() as patched:
        patched.setattr(os, 'link', refuse)
        publish(csv())
    assert contents(tmp_path) == {'elf.csv': ''}


WRITES = {  # what is written, / for the end of a line, where 1000 bytes have room: what is kept
    'all': (['a' * 498 + '/', 'b' * 500 + '/'], ['a' * 498, 'b' * 500]),
    'the second line of a write is broken': (['head/', f'{"a" * 600}/{"b" * 600}/'], ['head', 'a' * 600]),
    'the only line of a write is broken': (['head/', 'a' * 2000 + '/'], ['head']),
    'the first of many lines is broken': (['head/', 'a' * 2000 + '/' + 'b/' * 9], ['head']),
    'no room for a byte': (['a' * 999 + '/', 'b/'], ['a' * 999]),
    'room for whole lines, exactly': (['a' * 499 + '/', 'b' * 499 + '/' + 'c/'], ['a' * 499, 'b' * 499]),
    'a write begins with what fits': (['head/', 'a/' * 1000], ['head'] + ['a'] * 497),
}


@pytest.mark.parametrize('writes, kept', WRITES.values(), ids=WRITES)
def test_only_whole_lines_where_the_disk_is_full(writes: list[str], kept: list[str], tmp_path: Path) -> None:
    """The limit on a file's size gives what a full disk gives: a short write, then an error."""
    done = run_python('-c', LIMITED_WRITES, str(SCRIPT.parent), *writes, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, '')
    assert contents(tmp_path) == {'elf.csv': ''.join(line + '\n' for line in kept)}
    assert ('cannot write' in done.stdout) == (len(''.join(writes)) > 1000)


@pytest.mark.parametrize('at_once', [1, 7, 1000])
def test_rows_in_several_files(at_once: int, tmp_path: Path) -> None:
    """Each has a header and whole rows, is as full as can be, and replaces nothing."""
    for name in 'elf.csv', 'elf.2.csv', 'elf.7.csv':
        (tmp_path / name).write_text(name)
    limit = len(HEADER) + 100
    rows = [f'{number},{"x" * (number % 9)}\n' for number in range(1000)] + ['y' * 200 + '\n', 'last\n']
    csv = RowFiles(str(tmp_path / 'elf'), limit)
    csv.publish()
    for at in range(0, len(rows), at_once):
        csv.write_lines(''.join(rows[at : at + at_once]))
    csv.close()
    names = ['elf.csv', *(f'elf.{number}.csv' for number in range(2, len(csv.paths) + 1))]
    assert csv.paths == [str(tmp_path / name) for name in names] and len(names) > 10
    texts = [(tmp_path / name).read_text() for name in names]
    assert all(text.startswith(HEADER) and text.endswith('\n') for text in texts)
    assert ''.join(text[len(HEADER) :] for text in texts) == ''.join(rows)
    assert [len(text) for text in texts if len(text) > limit] == [len(HEADER) + 201]
    assert all(len(text) > limit - 15 for text in texts[:-3])
    assert csv.written == len(''.join(rows)) and csv.lines_lost == 0
    others = {'elf.1.csv': 'elf.csv', 'elf.2.1.csv': 'elf.2.csv', 'elf.7.1.csv': 'elf.7.csv'}
    assert {name: contents(tmp_path)[name] for name in others} == others


def test_rows_without_a_next_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    csv = RowFiles(str(tmp_path / 'elf'), len(HEADER) + 10)
    csv.publish()
    monkeypatch.setattr(OutputFile, 'publish', lambda *_, **__: (_ for _ in ()).throw(Failure('no')))
    for _ in range(2):
        with pytest.raises(Failure):
            csv.write_lines('row 1\nrow 2\nrow 3\n')
    csv.close()
    assert contents(tmp_path) == {'elf.csv': HEADER + 'row 1\n'} and csv.lines_lost == 5


def test_what_rows_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told once the number of hops is known. That the disk is short is told whenever it becomes so."""
    now, free = 1000.0, 10**12
    monkeypatch.setattr(files.time, 'monotonic', lambda: now)
    monkeypatch.setattr(files.os, 'statvfs', lambda _: SimpleNamespace(f_bavail=free // 4096, f_frsize=4096))
    use, said = DiskUse(str(tmp_path / 'elf.csv'), 'rows'), []
    looks = [(0, 0, 12), (400, 3, 12), (400, 4, 12), (400, 4, 12), (0, 4, 12), (400, 4, 8), (400, 4, 8)]
    written = rows = 0
    for per_second, hops, exponent in [*looks, (400, 4, 12), (400, 4, 8)]:
        now, free = now + 2, 10**exponent
        rows, written = rows + 2 * per_second, written + 200 * per_second
        said.append(use.look(written, rows, hops))
    what = 'rows take 3.46 GB a day at this rate (400 probes/s to 4 hops), and 1 TB are free'
    short = 'the disk will soon be full: only 100 MB are free, which is enough for 42 minutes at 3.46 GB a day'
    assert said == ['', '', '', what, '', short, '', '', short]


@pytest.mark.root
def test_files_belong_to_the_user_who_called_sudo(
    csv: Callable[[], OutputFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('SUDO_UID', '1234')
    monkeypatch.setenv('SUDO_GID', '4321')
    publish(csv())
    status = (tmp_path / 'elf.csv').stat()
    assert (status.st_uid, status.st_gid) == (1234, 4321)


def test_log_file(tmp_path: Path) -> None:
    """What was logged before there was a file is in it, too."""
    handler = elfprobe.FileLog()
    file = OutputFile(str(tmp_path / 'elf.log'))
    for message in 'first', 'odd name \udcff', 'last':
        handler.emit(logging.LogRecord('elfprobe', logging.INFO, '', 0, message, None, None))
        if message == 'first':
            handler.begin(file)
    publish(file)
    lines = (tmp_path / 'elf.log').read_text().splitlines()
    assert (len(lines), lines[0], lines[-1]) == (3, 'first', 'last')


def test_a_message_is_a_line() -> None:
    """Whatever the names in it: users choose those of their processes, root reads this in a terminal."""
    record = logging.LogRecord('elfprobe', logging.INFO, '', 0, 'now %s', ('a\nb\33[2Jc\u202e',), None)
    assert LogFormat().format(record)[12:] == r' now a\nb\x1b[2Jc\u202e'


# The program's text

HOOK_NAMES = {
    f'elf_v{version}_{what}'
    for version in (4, 6)
    for what in ('icmp_beforesend', 'tcp_beforesend', 'udp_beforesend', 'afterrecv')
}
ONE_HOOK = 'static inline int elf_v4_tcp_beforesend(struct __sk_buff *ctx)\n{\n\treturn 0;\n}'
HOOK_FILES = {
    'the default': SCRIPT.with_name('elfhooks.c').read_text(),
    'empty': '',
    'one hook, no newline at its end': ONE_HOOK,
    'another in a comment': f'/* no elf_v6_tcp_beforesend\n * here */\n// nor elf_v4_afterrecv\n{ONE_HOOK}\n',
    'a macro over two lines': f'#define A \\\n\t1\n{ONE_HOOK}\n',
}


def located(text: str) -> Iterator[tuple[tuple[str, int], str]]:
    """File, number and content of each line, as a compiler takes them."""
    file, number = '', 0
    for line in text.split('\n'):
        directive = re.fullmatch(r'#line (\d+) "(.*)"', line)
        if directive:
            file, number = directive[2], int(directive[1])
        else:
            yield (file, number), line
            number += 1


@pytest.mark.parametrize('hooks', HOOK_FILES.values(), ids=HOOK_FILES)
def test_program_text(hooks: str, tmp_path: Path) -> None:
    path = tmp_path / 'my hooks.c'
    path.write_text(hooks)
    text = program_text(str(path))
    program = SCRIPT.with_name('elfprobe.c')
    lines = dict(located(text))
    for source in program, path:
        for number, line in enumerate(source.read_text().splitlines(), 1):
            if line == '#include "elfhooks.c"':
                assert not lines.get((str(source), number))
            else:
                assert lines[str(source), number] == line
    declarations = text.index('static void elf_v6_afterrecv')
    assert declarations < text.index(f'#line 1 "{path}"') < text.index('static inline int hook_beforesend')
    defined = re.findall(r'(?:int|void) (elf_v\w+)\(struct \w+ \*ctx\)\s*\{', text)
    assert sorted(defined) == sorted(HOOK_NAMES)
    assert set(HOOKS) == HOOK_NAMES


@pytest.mark.parametrize(
    'content, reason',
    [(None, 'No such file or directory'), (b'\xff\xfe\0', 'not a text file')],
    ids=['missing', 'binary'],
)
def test_bad_hooks_file(content: bytes | None, reason: str, tmp_path: Path) -> None:
    path = tmp_path / 'hooks.c'
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(Failure, match=f"-H/--hooks.*'{path}': {reason}") as raised:
        program_text(str(path))
    assert raised.value.status == 1


@pytest.mark.parametrize(
    'options, flags',
    [
        (dict(encapsulation='ipinip'), dict(TUNNEL='4')),
        (dict(probeint=0, max_rate=1, salt=5, notrunc=True, rate_global=True, ingress='pass', apps=('a',)), {}),
    ],
)
def test_build_flags(options: dict[str, Any], flags: dict[str, str]) -> None:
    """Most options are not among them, so that programs are compiled once for all."""
    usual, built = (
        elfprobe.build_flags(Config(('none0',), **some), elfprobe.Build(), elfprobe.Platform())
        for some in ({}, options)
    )
    assert built == {**usual, **flags}


@pytest.mark.parametrize('rate', [1, 50000, 10**6])
def test_sizes_and_parameters_follow_the_rate(rate: int) -> None:
    config = Config(('none0',), max_rate=rate, probeint=20)
    sizes = elfprobe.map_sizes(config, elfprobe.Build(), elfprobe.Platform(has_ring_buffer=True))
    waiting = sizes['in_flight']
    assert waiting & (waiting - 1) == 0 and waiting >= 1024
    assert waiting >= min(rate * (UNANSWERED_AFTER + elfprobe.RENEW_EVERY), elfprobe.IN_FLIGHT_MAX)
    assert 1024 <= sizes['partial_checksums'] <= waiting
    values = elfprobe.parameters(config, sizes)
    assert (values['INTERVAL_NS'], values['MAX_RATE']) == (20 * 10**6, rate)
    assert [values[name] for name in ('RATE_GLOBAL', 'NOTRUNC', 'INGRESS_DROP', 'BY_APP')] == [0, 0, 1, 0]
    changed = Config(('none0',), rate_global=True, notrunc=True, ingress='pass', apps=('a',))
    values = {**values, **elfprobe.parameters(changed, sizes)}
    assert [values[name] for name in ('RATE_GLOBAL', 'NOTRUNC', 'INGRESS_DROP', 'BY_APP')] == [1, 1, 0, 1]
    assert 1 <= values['WAKE_EVERY'] < sizes['results'] / elfprobe.RESULT_BYTES
