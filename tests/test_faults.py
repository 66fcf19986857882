"""What elfprobe does with bad input, beside what others own, and however it ends.

Each test looks from outside, before and after: at what is attached to the interface, and at the files.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Sequence

import pytest

from lab import Capture, Host, Lab, batch, end, run, tc, wait_for_line, wait_until
from runs import (
    CLSACT_COMMAND,
    ELFPROBE,
    NO_TCX,
    OLD_COMMAND,
    PROBES,
    TCP,
    UDP,
    Row,
    Run,
    Summary,
    elfprobe,
    inside,
    ip_packets,
    read_rows,
    with_change,
    with_fault,
)

root = pytest.mark.root

ANYWHERE = '192.0.2.1'  # RFC 5737: nobody is there, and nobody need be
OLD = 'what was there before\n'
SECOND = 10**9  # ns
SILENT_AFTER = 3 * SECOND  # from a kill to the last probe
NOBODY = 65534
PINGS = 20
SMALL_MTU = 1300
LOG_LIMIT = 4011  # bytes

# Attaches somebody else's program: to XDP, native or generic, or to TC egress, where it drops mark 9, or has
# the last word on packets without a socket: to drop them, but for ARP's, to let them out, or to take the short
# ones to another device.
SOMEONES = """
import signal, socket, sys
from bcc import BPF, lib
from pyroute2 import IPRoute
from elf.source import kernel_headers
where = sys.argv[1]
kind, context, verdict = BPF.XDP, 'xdp_md', '2'
on_egress = {'egress': 'ctx->mark == 9 ? 2 : -1',
             'dropping': 'ctx->sk || load_half(ctx, 12) == 0x806 ? -1 : 2',
             'letting out': 'ctx->sk ? -1 : 0',
             'taking probes': 'ctx->sk || ctx->len > 70 || load_half(ctx, 12) == 0x806 ? -1 : bpf_redirect(1, 0)'}
if where in on_egress:
    kind, context, verdict = BPF.SCHED_CLS, '__sk_buff', on_egress[where]
with kernel_headers():
    bpf = BPF(text='int someones(struct %s *ctx) { return %s; }' % (context, verdict))
fd = bpf.load_func('someones', kind).fd
if sys.argv[2:]:  # by tcx, for as long as this runs
    assert lib.bpf_link_create(fd, socket.if_nametoindex('eth0'), 47, None) >= 0
    signal.pause()
elif where in on_egress:
    with IPRoute() as ipr:
        ipr.tc('add-filter', 'bpf', socket.if_nametoindex('eth0'), handle=1, prio=1, protocol=3, fd=fd,
               name='someones', parent=0xFFFFFFF3, direct_action=True, classid=1)
else:
    assert lib.bpf_attach_xdp(b'eth0', fd, {'generic': 2, 'native': 4}[where]) == 0
"""

# Attaches somebody else's programs, which count IPv6 echo requests as they leave, or the replies as they
# come: by tcx, for as long as this runs, or as TC filters of some priorities. For each line on stdin it
# prints the counts of each program: of packets, and of those that leave without a socket: copies.
COUNTING = """
import ctypes, os, socket, sys
from bcc import BPF, lib
from pyroute2 import IPRoute
from elf.source import kernel_headers
COUNT = '''
int count%d(struct __sk_buff *ctx)
{
    int egress = %d, at = %d;

    if (load_half(ctx, 12) == 0x86dd && load_byte(ctx, 20) == 58 && load_byte(ctx, 21) > 32 &&
        load_byte(ctx, 54) == (egress ? 128 : 129))
        seen.increment(2 * at + (egress && !ctx->sk));
    return -1;
}
'''
places = [place.split() for place in sys.argv[1:]]
text = 'BPF_ARRAY(seen, u64, 16);' + ''.join(
    COUNT % (at, place[1] == 'egress', at) for at, place in enumerate(places))
with kernel_headers():
    bpf = BPF(text=text)
index = socket.if_nametoindex('eth0')
for at, (kind, direction, *prio) in enumerate(places):
    fd = bpf.load_func('count%d' % at, BPF.SCHED_CLS).fd
    if kind == 'tcx':
        if lib.bpf_link_create(fd, index, {'egress': 47, 'ingress': 46}[direction], None) < 0:
            sys.exit(os.strerror(ctypes.get_errno()))
    else:
        with IPRoute() as ipr:
            ipr.tc('add-filter', 'bpf', index, handle=2, prio=int(*prio), protocol=3, fd=fd, name='counting',
                   parent=0xFFFFFFF3 if direction == 'egress' else 0xFFFFFFF2, direct_action=True, classid=1)
print('attached', flush=True)
for line in sys.stdin:
    print(*[bpf['seen'][ctypes.c_int(at)].value for at in range(2 * len(places))], flush=True)
"""

# Runs a command under a seccomp filter that refuses bpf(), as containers have one.
REFUSING_BPF = """
import ctypes, os, platform, struct, sys
BPF = {'x86_64': 321, 'aarch64': 280, 's390x': 351}[platform.machine()]
# Load the system call's number; where it is BPF's, go on, otherwise skip one; return EPERM; allow.
code = (0x20, 0, 0, 0), (0x15, 0, 1, BPF), (0x06, 0, 0, 0x50001), (0x06, 0, 0, 0x7FFF0000)
instructions = ctypes.create_string_buffer(b''.join(struct.pack('HBBI', *one) for one in code))
program = struct.pack('HP', len(code), ctypes.addressof(instructions))
if ctypes.CDLL(None).prctl(22, 2, program):  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
    sys.exit('prctl failed')
os.execvp(sys.argv[1], sys.argv[1:])
"""

# Makes a TUN device that says to be of another link type.
TUN_OF_TYPE = """
import fcntl, os, struct, sys
tun = os.open('/dev/net/tun', os.O_RDWR)
fcntl.ioctl(tun, 0x400454CA, struct.pack('16sH22x', sys.argv[1].encode(), 0x1001))  # TUNSETIFF
fcntl.ioctl(tun, 0x400454CD, int(sys.argv[2]))  # TUNSETLINK
fcntl.ioctl(tun, 0x400454CB, 1)  # TUNSETPERSIST
"""

# Accepts whatever comes, in either family, and forgets it.
SINK = """
import selectors, socket
with socket.socket(socket.AF_INET6) as server, selectors.DefaultSelector() as selector:
    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    server.bind(('::', 9))
    server.listen()
    selector.register(server, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is server:
                selector.register(server.accept()[0], selectors.EVENT_READ)
            elif not key.fileobj.recv(65536):
                selector.unregister(key.fileobj)
                key.fileobj.close()
"""

# Sends there without end, under a process name of its own if one is given.
TALK = """
import socket, sys, time
if sys.argv[2:]:
    open('/proc/self/comm', 'w').write(sys.argv[2])
with socket.create_connection((sys.argv[1], 9)) as connection:
    while True:
        connection.sendall(b'x')
        time.sleep(0.005)
"""

# Answers each UDP packet with its length.
UDP_ECHO = """
import socket
with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as server:
    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    server.bind(('::', 9))
    while True:
        data, client = server.recvfrom(65536)
        server.sendto(b'%d' % len(data), client)
"""

# Sends more than a packet there, after what makes it known how far it is, until all has come through.
SEND_MUCH = """
import socket, sys
protocol, address = sys.argv[1:]
if protocol == 'tcp':
    with socket.create_connection((address, 9)) as connection:
        connection.sendall(bytes(3000000))
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b''
else:
    with socket.socket(socket.AF_INET6 if ':' in address else socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.settimeout(0.02)
        udp.connect((address, 9))
        for size in [100] * 20 + [1400] * 20:
            answer = b''
            while answer != b'%d' % size:
                try:
                    udp.send(bytes(size))
                    answer = udp.recv(100)
                except OSError:  # it was too large, or is lost
                    pass
"""

# Says lines by elfprobe's console: numbered ones that nobody reads, then those that it gets.
SAY = """
import sys
from elf.console import Console
console = Console()
for number in range(int(sys.argv[1])):
    console.say(str(number).rjust(200))
print('said', flush=True)
for line in sys.stdin:
    console.say(line.strip())
console.flush()
"""

COMMAND = sys.executable, str(ELFPROBE)


# What there is to look at


def attached(host: Host, device: str = 'eth0') -> dict[str, Any]:
    """What is attached to a device of a host, whoever did that."""
    said = run('ip', '-n', host.name, '-d', '-j', 'link', 'show', device).stdout
    # Timers, and the number of addresses that a bridge knows, change by themselves.
    link = json.loads(re.sub(r'"(\w+_timer|fdb_n_learned)":[^,}]+', r'"\1":0', said))[0]
    shown = {
        'qdisc': ['qdisc', 'show', 'dev', device],
        'egress': ['filter', 'show', 'dev', device, 'egress'],
        'ingress': ['filter', 'show', 'dev', device, 'ingress'],
    }
    return {
        'xdp': link.pop('xdp', None),
        'link': link,
        'tcx': tcx_programs(host, device),
        'features': host.run('ethtool', '-k', device).stdout,
        **{what: run('tc', '-n', host.name, *command).stdout for what, command in shown.items()},
    }


def tcx_programs(host: Host, device: str) -> dict[str, list[int]]:
    """IDs of the programs at tcx, by direction; none where the kernel has no tcx."""
    from bcc import lib

    found = {}
    for direction, attach_type in ('ingress', 46), ('egress', 47):  # enum bpf_attach_type, linux/bpf.h
        flags, ids, count = ctypes.c_uint32(), (ctypes.c_uint32 * 64)(), ctypes.c_uint32(64)
        with inside(host):
            lib.bpf_prog_query(
                socket.if_nametoindex(device), attach_type, 0, ctypes.byref(flags), ids, ctypes.byref(count)
            )
        found[direction] = [number for number in ids[: count.value] if number]
    return found


def detach_tcx_links(programs: Sequence[int]) -> None:
    """Detach the tcx links that have one of these programs, as `bpftool link detach` does."""
    from bcc import lib

    number = ctypes.c_uint32()
    while lib.bpf_link_get_next_id(number, ctypes.byref(number)) == 0:
        link = lib.bpf_link_get_fd_by_id(number)
        if link < 0:
            continue
        try:
            info = (ctypes.c_uint32 * 32)()  # struct bpf_link_info: the third is the program's ID
            size = ctypes.c_uint32(ctypes.sizeof(info))
            lib.bpf_obj_get_info(link, ctypes.byref(info), ctypes.byref(size))
            if info[2] in programs:
                assert lib.bpf_link_detach(link) == 0
        finally:
            os.close(link)


def files(directory: Path) -> dict[str, tuple[int, str]]:
    """Inode and text of the files in a directory, by name."""
    return {
        path.name: (path.stat().st_ino, path.read_text(errors='replace'))
        for path in directory.iterdir()
        if path.is_file()
    }


def whole_rows(path: Path) -> list[Row]:
    """The rows of a CSV: each line is whole, and only the first is a header."""
    text = path.read_text(encoding='ascii')
    assert text.endswith('\n')
    header, *lines = text.splitlines()
    assert set(Row._fields) <= set(header.split(','))
    assert [line for line in lines if line == header or line.count(',') != header.count(',')] == []
    return read_rows(path)


def check_end(ended: Run) -> None:
    """An orderly end has as many rows as its summary and its report say."""
    assert 'Traceback' not in ended.log
    rows = whole_rows(ended.cwd / 'elf.csv')
    answered = sum(row.is_answered for row in rows)
    assert ended.summary == Summary(len(rows), answered, len(rows) - answered)
    report = json.loads((ended.cwd / 'elf.json').read_text())
    assert report['ended'] and sum(destination['probes'] for destination in report['destinations']) == len(rows)


def check_refused(ended: subprocess.CompletedProcess[str], status: int, words: Sequence[str]) -> str:
    """One line on stderr has these words; returns what follows it, which only a compiler may say."""
    assert ended.returncode == status, ended.stderr
    assert ended.stdout == ''
    assert 'Traceback' not in ended.stderr
    line, _, more = ended.stderr.partition('\n')
    assert [word for word in words if word not in line] == [], line
    return more


@contextmanager
def undone(host: Host) -> Iterator[None]:
    """Takes off the host's first device what a test has attached, and what a defect has left."""
    try:
        yield
    finally:
        run('tc', '-n', host.name, 'qdisc', 'del', 'dev', 'eth0', 'clsact', check=False)
        for mode in 'xdpgeneric', 'xdpdrv':
            run('ip', '-n', host.name, 'link', 'set', 'eth0', mode, 'off', check=False)


@pytest.fixture(scope='module')
def busy(lab4: Lab) -> Lab:
    """The lab, whose client pings its server 300 times a second; the last router is silent."""
    lab4.routers[3].run(
        'nft',
        'table ip silence { chain output { type filter hook output priority 0;icmp type time-exceeded drop; }; }',
    )
    for _ in range(3):  # at intervals below 10 ms ping would keep a CPU busy
        lab4.client.popen('ping', '-nq', '-i0.01', lab4.server_address(4), stdout=subprocess.DEVNULL)
    return lab4


def start_sink(lab: Lab) -> None:
    """The lab's server takes whatever comes to TCP port 9, from now on."""
    if not lab.server.listens(9):
        lab.server.popen(sys.executable, '-c', SINK)
        wait_until(lambda: lab.server.listens(9), 10, 'the sink listens')


def has_rows(measuring: Run, number: int = 10) -> None:
    wait_until(lambda: len(measuring.rows()) >= number, 10, f'{number} rows')


# Bad input: usage, which elfprobe judges before it looks for packages, root or the interface

USAGE = {
    'empty interface': (['-i', '', ANYWHERE], ['-i/--interface', 'empty']),
    'nothing to probe': (['-i', 'eth0'], ['nothing to probe', 'address', '-a', '-P']),
    'empty address': (['-i', 'eth0', ''], ['address', 'empty']),
    'empty name': (['-i', 'eth0', '-a', ''], ['-a/--app', 'empty']),
    **{
        f'interval {text}': (
            ['-i', 'eth0', '-p', text, ANYWHERE],
            ['-p/--probeint', f"'{text}'", 'whole', 'milliseconds', '0 to 1000'],
        )
        for text in ('1001', '-1', '2.5', 'ten', '')
    },
    'rate type': (['-i', 'eth0', '-r', 'fast', ANYWHERE], ['-r/--ratetype', "'fast'", 'g, global, h']),
    'ingress hook': (
        ['-i', 'eth0', '--ingress-hook', 'native', ANYWHERE],
        ['--ingress-hook', "'native'", 'auto', 'xdp', 'generic', 'tc'],
    ),
    'ingress': (['-i', 'eth0', '-I', 'reject', ANYWHERE], ['-I/--ingress', "'reject'", 'pass', 'drop']),
    'encapsulation': (['-i', 'eth0', '-e', 'ring', ANYWHERE], ['-e/--encapsulation', "'ring'", 'ethernet']),
    'process 0': (['-i', 'eth0', '-P', '0'], ['-P/--pid', "'0'", '1 to']),
    'process name': (['-i', 'eth0', '-P', 'init'], ['-P/--pid', "'init'", 'process ID']),
    **{
        f'duration {text}': (
            ['-i', 'eth0', '--duration', text, ANYWHERE],
            ['--duration', f"'{text}'", 'seconds', 'above 0'],
        )
        for text in ('0', '-1', 'nan', 'inf', 'soon')
    },
    'no rate': (['-i', 'eth0', '--max-rate', '0', ANYWHERE], ['--max-rate', "'0'", 'probes per second']),
    'unknown option': (['-i', 'eth0', '--loud', ANYWHERE], ['--loud']),
    'shortened option': (['-i', 'eth0', '--dur', '1', ANYWHERE], ['--dur']),
    'interface twice': (['-i', 'eth0', '-i', 'eth0', ANYWHERE], ['-i/--interface', "'eth0' is given twice"]),
    'no value': (['-i', 'eth0', ANYWHERE, '-p'], ['-p/--probeint']),
    'lines of an interval': (['-i', 'eth0', '-p', '1\n0', ANYWHERE], ['-p/--probeint', "'1\\n0'"]),
    'lines of a rate type': (['-i', 'eth0', '-r', 'g\r\nh', ANYWHERE], ['-r/--ratetype', "'g\\r\\nh'"]),
    'lines of an option': (['-i', 'eth0', '--lo\nud', ANYWHERE], ['--lo\\nud']),
    "a terminal's commands": (['-i', 'eth0', '-p', '\33[2J\x9b2J', ANYWHERE], ["'\\x1b[2J\\x9b2J'"]),
}


# Runs elfprobe's main() with each of several arguments, and prints its status behind what it says.
EACH_IN_TURN = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import elfprobe
for arguments in json.loads(sys.argv[2]):
    os.write(2, b'\\0%d\\0' % elfprobe.main(arguments))
"""


def each_in_turn(
    each: Sequence[Sequence[str]], *python: str, cwd: Path
) -> Iterator[subprocess.CompletedProcess[str]]:
    """Call main() with each of these arguments in one process, because each start would cost half a second."""
    ended = run(*python, EACH_IN_TURN, str(ELFPROBE.parent), json.dumps(each), cwd=cwd, timeout=100)
    texts, statuses = (ended.stderr.split('\0')[at::2] for at in (0, 1))
    assert len(statuses) == len(each) and texts.pop() == ''
    for arguments, text, status in zip(each, texts, statuses):
        yield subprocess.CompletedProcess(arguments, int(status), ended.stdout, text)


def test_wrong_usage(tmp_path):
    """Without packages, too."""
    each = [arguments for arguments, _ in USAGE.values()]
    for ended, (_, words) in zip(each_in_turn(each, sys.executable, '-BSc', cwd=tmp_path), USAGE.values()):
        assert check_refused(ended, 2, words) == ''
    assert files(tmp_path) == {}


def test_help_names_each_option():
    shown = run(*COMMAND, '-h')
    for option in (
        '-h, --help',
        '-I',
        '--ingress',
        '-l, --logfile',
        '-f',
        '--filebase',
        '-d, --debug',
        '-p',
        '--probeint',
        '-P',
        '--pid',
        '-a',
        '--app',
        '-r',
        '--ratetype',
        '-i',
        '--interface',
        '-T, --notrunc',
        '-e',
        '--encapsulation',
        '-H',
        '--hooks',
        '-q, --quiet',
        '--duration',
        '--max-rate',
        '-n, --numeric',
        '--json',
        '--ingress-hook',
        '--version',
        'address',
        '@FILE',
        'examples',
    ):
        assert option in shown.stdout
    assert shown.stderr == ''


def test_version_tells_what_it_runs_on():
    shown = run(*COMMAND, '--version')
    linux = re.escape(os.uname().release)
    assert re.fullmatch(rf'elfprobe \d\S*: Linux {linux}, BCC \d\S*, pyroute2 \d.*\n', shown.stdout)
    assert shown.stderr == ''


def test_python_without_packages(tmp_path):
    """A Python of the user's own, that is; -S and -I take away what this one has."""
    ended = run(sys.executable, '-S', '-I', str(ELFPROBE), '-i', 'lo', ANYWHERE, check=False, cwd=tmp_path)
    packages = ['python3-bpfcc', 'python3-pyroute2', 'python3-psutil']
    assert check_refused(ended, 1, ['bcc', 'pyroute2', 'psutil', 'apt install', *packages]) == ''
    assert files(tmp_path) == {}


def test_without_root(tmp_path):
    reach_checkout = '--inh-caps=+dac_read_search', '--ambient-caps=+dac_read_search'
    nobody = 'setpriv', '--reuid=65534', '--regid=65534', '--clear-groups', *reach_checkout
    become = nobody if os.geteuid() == 0 else ()
    ended = run(*become, *COMMAND, '-i', 'lo', ANYWHERE, check=False, cwd=tmp_path)
    assert check_refused(ended, 1, ['root', 'sudo']) == ''
    assert files(tmp_path) == {}


# Rights

CAPABILITIES = {
    'address': ['net_admin', 'bpf', 'perfmon'],
    'process': ['net_admin', 'bpf', 'perfmon', 'sys_ptrace', 'dac_read_search'],
}


def as_nobody(*capabilities: str) -> Sequence[str]:
    """What runs a command as a user that has these capabilities, and no others."""
    these = ','.join(['-all', *(f'+{name}' for name in capabilities)])
    return (
        'setpriv',
        f'--reuid={NOBODY}',
        f'--regid={NOBODY}',
        '--clear-groups',
        *(f'--{kind}={these}' for kind in ('inh-caps', 'ambient-caps', 'bounding-set')),
    )


@pytest.fixture
def nobodys(monkeypatch) -> Iterator[Path]:
    """A directory of that user's, with an elfprobe that it can read."""
    with tempfile.TemporaryDirectory(prefix='elf-') as directory:
        for name in 'elfprobe.py', 'elfprobe.c', 'elfhooks.c':
            shutil.copy(ELFPROBE.with_name(name), directory)
        shutil.copytree(ELFPROBE.with_name('elf'), Path(directory, 'elf'))
        os.chown(directory, NOBODY, NOBODY)
        monkeypatch.setattr('runs.ELFPROBE', Path(directory, 'elfprobe.py'))
        yield Path(directory)


@root
@pytest.mark.parametrize(
    ('interest', 'capabilities'),
    [
        *CAPABILITIES.items(),
        ('address', ['net_admin', 'sys_admin']),  # before Linux 5.8
    ],
    ids=[*CAPABILITIES, 'older kernel'],
)
def test_least_capabilities(lab4, nobodys, interest, capabilities):
    """The target process is root's, and has its socket before elfprobe starts. (Before Linux 5.11
    BPF maps count as locked memory.)"""
    before = attached(lab4.client)
    start_sink(lab4)
    with ExitStack() as stack:
        stack.enter_context(undone(lab4.client))
        server = lab4.server_address(4)
        talking = lab4.client.popen(sys.executable, '-c', TALK, server)
        stack.callback(end, talking)
        wait_until(lambda: lab4.client.run('ss', '-Htn', f'dst {server}').stdout, 10, 'the process talks')
        of_interest = [server] if interest == 'address' else ['-P', str(talking.pid)]
        outside = 'mount -t cgroup2 none /sys/fs/cgroup; ulimit -l unlimited 2>/dev/null || :'
        via = lab4.client.command(*mounted(outside), *as_nobody(*capabilities))
        with elfprobe(lab4, '-rg', *of_interest, cwd=nobodys, via=via) as measuring:
            has_rows(measuring)
            status = Path(f'/proc/{measuring.process.pid}/status').read_text()
        assert attached(lab4.client) == before
    assert re.search(rf'^Uid:\t{NOBODY}\t', status, re.MULTILINE)
    check_end(measuring)
    rows = measuring.rows()
    assert {(row.dest, row.protocol, row.dport) for row in rows} == {(server, TCP, 9)}
    assert {row.responder for row in rows if row.is_answered} <= {lab4.hop(4, ttl) for ttl in range(1, 5)}
    assert any(row.is_answered for row in rows)
    assert 'not exact' not in measuring.log


@root
@pytest.mark.parametrize(
    ('interest', 'missing'), [(interest, name) for interest, names in CAPABILITIES.items() for name in names]
)
def test_without_a_capability(nobodys, interest, missing):
    rest = [name for name in CAPABILITIES[interest] if name != missing]
    of_interest = [ANYWHERE] if interest == 'address' else ['-P', str(os.getpid())]
    before = files(nobodys)
    ended = run(
        *as_nobody(*rest),
        sys.executable,
        str(nobodys / 'elfprobe.py'),
        '-i',
        'lo',
        *of_interest,
        check=False,
        cwd=nobodys,
    )
    assert check_refused(ended, 1, ['root', 'sudo', f'(missing: cap_{missing})']) == ''
    assert files(nobodys) == before


# Bad input: what only the machine can tell


class Bad(NamedTuple):
    """Arguments, words of the line that refuses them, words of the compiler's lines behind it.

    `via` is a command in front, which changes what this elfprobe sees of the machine.
    """

    arguments: Sequence[str]
    words: Sequence[str]
    more: Sequence[str] = ()
    via: Sequence[str] = ()


def mounted(script: str) -> Sequence[str]:
    """What a command sees after a shell script has mounted something, which nobody else sees."""
    return 'unshare', '-m', 'sh', '-ec', script + '; exec "$@"', 'sh'


def hook(expression: str) -> str:
    return f'static inline int elf_v4_tcp_beforesend(struct __sk_buff *ctx)\n{{\n\treturn {expression};\n}}\n'


OFFLINE = mounted('mount --bind resolv.conf /etc/resolv.conf')
SEALED = mounted('mkdir sealed; mount -t tmpfs -o ro none sealed')
FULL = mounted('mkdir full; mount -t tmpfs -o size=4k none full; head -c4096 /dev/zero >full/rest')
INPUT = {
    'elf.csv': OLD,
    'elf.log': OLD,
    'empty': '# nobody\n\n',
    'hosts': '10.0.0.1\n10.0.0.256  # or was it 255?\n',
    'bytes': '\udcff\udcfe\0',
    'wrong.c': hook('nonsense'),
    'unsafe.c': hook('*(int *)(long)ctx->data'),
    'resolv.conf': 'nameserver 127.0.0.1\n',  # where nobody listens, which is known at once
}
BAD = {
    'no such interface': Bad(['-i', 'eth7', ANYWHERE], ['-i/--interface', "'eth7'", 'lo', 'eth0', 'odd0']),
    'interface is down': Bad(['-i', 'down0', ANYWHERE], ['-i/--interface', "'down0'", 'link set down0 up']),
    'loopback': Bad(['-i', 'lo', ANYWHERE], ['-i/--interface', "'lo'", 'loopback']),
    'neither Ethernet nor IP': Bad(['-i', 'odd0', ANYWHERE], ['-i/--interface', "'odd0'", 'link type 824']),
    'no IPv6 inside': Bad(
        ['-i', 'ipip0', '-e', 'ip6inip', ANYWHERE],
        ['-e/--encapsulation', "'ip6inip'", "'ipip0'", 'ethernet or ipinip'],
    ),
    'no such process': Bad(['-P', '4194304'], ['-P/--pid', 'no process 4194304']),
    'no such name': Bad(['no.such.invalid'], ["address 'no.such.invalid'", 'resolve'], via=OFFLINE),
    'no name at all': Bad(['no..name'], ["address 'no..name'", 'resolve'], via=OFFLINE),
    'malformed address': Bad(['10.0.0.256'], ["address '10.0.0.256'", 'resolve'], via=OFFLINE),
    'own address': Bad(['::1'], ["address '::1'", 'never leaves this host']),
    'no @FILE': Bad(['@nowhere'], ["'nowhere'", 'No such file']),
    'empty @FILE': Bad(['@empty'], ["'empty'", 'no address']),
    'bad line in @FILE': Bad(['@hosts'], ["'10.0.0.256'", 'resolve', 'line 2 of hosts'], via=OFFLINE),
    '@FILE of bytes': Bad(['@bytes'], ["'bytes'", 'not a text file']),
    'no hooks': Bad(['-H', 'nowhere.c', ANYWHERE], ['-H/--hooks', "'nowhere.c'", 'No such file']),
    'hooks are a directory': Bad(['-H', '/proc', ANYWHERE], ['-H/--hooks', "'/proc'", 'Is a directory']),
    'hooks of bytes': Bad(['-H', 'bytes', ANYWHERE], ['-H/--hooks', "'bytes'", 'not a text file']),
    'hooks do not compile': Bad(
        ['-H', 'wrong.c', ANYWHERE],
        ["'wrong.c'", 'compile'],
        ['wrong.c:3:9: error:', "identifier 'nonsense'", 'return nonsense;'],
    ),
    'hooks do not load': Bad(['-H', 'unsafe.c', ANYWHERE], ['elf_probe', 'kernel'], ['invalid access to packet']),
    'no such directory': Bad(
        ['-f', 'nowhere/elf', ANYWHERE], ['-f/--filebase', "'nowhere/elf.csv'", 'No such file']
    ),
    'read-only': Bad(
        ['-f', 'sealed/elf', ANYWHERE], ['-f/--filebase', "'sealed/elf.csv'", 'Read-only'], via=SEALED
    ),
    'log is in use': Bad(
        ['-l', ANYWHERE], ['-f/--filebase', "'elf.log'", 'busy'], via=mounted('mount --bind elf.log elf.log')
    ),
    'disk is full': Bad(['-f', 'full/elf', ANYWHERE], ["'full/elf.csv'", 'No space'], via=FULL),
    'no temporary file': Bad(['--no-cache', ANYWHERE], ['temporary'], via=['prlimit', '--fsize=0']),
    'time namespace': Bad([ANYWHERE], ['time namespace'], via=['unshare', '-T', '--monotonic', '9999', '-f']),
    'not permitted': Bad([ANYWHERE], ['no BPF map', 'not permitted'], via=[sys.executable, '-c', REFUSING_BPF]),
    'lines of an interface': Bad(['-i', 'eth\n0', ANYWHERE], ['-i/--interface', "'eth\\n0'"]),
    'lines of a name': Bad(['no\nname'], ["address 'no\\nname'"], via=OFFLINE),
    'lines of an @FILE': Bad(['@no\nfile'], ["'no\\nfile'", 'No such file']),
    'lines of hooks': Bad(['-H', 'no\n.c', ANYWHERE], ['-H/--hooks', "'no\\n.c'", 'No such file']),
    'lines of a directory': Bad(['-f', 'no\n/elf', ANYWHERE], ['-f/--filebase', "'no\\n/elf.csv'"]),
    'quiet': Bad(['-q', '-i', 'eth7', ANYWHERE], ['-i/--interface', "'eth7'"]),
}


@pytest.fixture(scope='module')
def odd_devices(lab4: Lab) -> Iterator[Lab]:
    """The lab, with devices in the client that are down, or of other link types."""
    batch(lab4.client.name, ['link add down0 type veth peer down1'])
    for name, link_type in ('odd0', 824), ('ipip0', 768):  # of netlink; of what a kernel may lack
        lab4.client.run(sys.executable, '-c', TUN_OF_TYPE, name, str(link_type))
        batch(lab4.client.name, [f'link set {name} up'])
    yield lab4
    batch(lab4.client.name, [f'link del {name}' for name in ('down0', 'odd0', 'ipip0')])


def check_bad_input(client: Host, folder: Path, bads: Sequence[Bad]) -> None:
    """Each is refused, in one process if there are several, and nothing is left."""
    for name, text in INPUT.items():
        (folder / name).write_text(text, errors='surrogateescape')
    before = attached(client), files(folder)
    each = [[*([] if '-i' in bad.arguments else ['-i', 'eth0']), *bad.arguments] for bad in bads]
    with undone(client):
        if len(bads) > 1:
            ends = each_in_turn(each, *client.command(sys.executable, '-Bc'), cwd=folder)
        else:
            ends = iter([client.run(*bads[0].via, *COMMAND, *each[0], check=False, cwd=folder)])
        for ended, bad in zip(ends, bads):
            more = check_refused(ended, 1, bad.words)
            assert [word for word in bad.more if word not in more] == [], more
            assert bad.more or not more
        assert (attached(client), files(folder)) == before


@root
def test_bad_input(odd_devices, tmp_path):
    check_bad_input(odd_devices.client, tmp_path, [bad for bad in BAD.values() if not bad.via])


@root
@pytest.mark.parametrize('name', [name for name, bad in BAD.items() if bad.via])
def test_bad_machine(odd_devices, tmp_path, name):
    check_bad_input(odd_devices.client, tmp_path, [BAD[name]])


# What others own


@contextmanager
def hole(host: Host) -> Iterator[None]:
    """Another device, into which packets vanish."""
    batch(host.name, ['link add hole0 type veth peer hole1', 'link set hole0 up'])
    try:
        yield
    finally:
        batch(host.name, ['link del hole0'])


def someones(host: Host, where: str) -> None:
    """Attach a program of somebody else's to the host's first device."""
    host.run(sys.executable, '-c', SOMEONES, where, cwd=ELFPROBE.parent)


def u32(direction: str, match: str, *then: str) -> str:
    """A command of tc's that adds somebody else's filter."""
    return f'filter add dev eth0 {direction} prio 20 protocol ip u32 match ip {match} {" ".join(then)}'


@root
@pytest.mark.parametrize('mode', ['native', 'generic'])
def test_xdp_program_of_others(busy, tmp_path, mode):
    """It is named if it is in the way, and works beside ours otherwise."""
    with undone(busy.client):
        someones(busy.client, mode)
        before = attached(busy.client)
        assert before['xdp']
        each = [['-i', 'eth0', '--ingress-hook', hook, ANYWHERE] for hook in ('xdp', 'generic')]
        for ended in each_in_turn(each, *busy.client.command(sys.executable, '-Bc'), cwd=tmp_path):
            words = ['-i/--interface', "'eth0'", 'someones', '--ingress-hook tc']
            assert check_refused(ended, 1, words) == ''
        assert attached(busy.client) == before
        assert files(tmp_path) == {}
        with elfprobe(busy, busy.server_address(4), cwd=tmp_path) as measuring:
            wait_until(lambda: any(row.is_answered for row in measuring.rows()), 10, 'an answer')
            assert attached(busy.client)['xdp'] == before['xdp']
        assert 'answers read at TC ingress (someones is at XDP)' in measuring.log
        assert attached(busy.client) == before


@root
def test_xdp_program_is_not_taken_away(lab4, tmp_path):
    client = lab4.client
    before = attached(client)
    with elfprobe(lab4, '--ingress-hook', 'xdp', ANYWHERE, cwd=tmp_path):
        ours = attached(client)['xdp']
        assert ours
        for mode in 'xdpgeneric', 'xdpdrv':
            client.run('ip', 'link', 'set', 'eth0', mode, 'off', check=False)
        assert attached(client)['xdp'] == ours
    assert attached(client) == before


def have_effect(lab: Lab) -> list[bool]:
    """Of the filters in the next test, whether each takes away the packets that it is to take."""
    pings = ['-m9', lab.server_address(4)], [lab.hop(4, 1)], [lab.hop(4, 2)]
    return [lab.client.run('ping', '-nqc1', '-W0.2', *ping, check=False).returncode != 0 for ping in pings]


TC_COMMANDS = pytest.mark.parametrize('command', [(), CLSACT_COMMAND], ids=['tcx', 'clsact'])


@root
@TC_COMMANDS
def test_filters_of_others_stay_in_effect(busy, tmp_path, command):
    client, via = busy.client, (*busy.client.command(), *command)
    away = 'action', 'mirred', 'egress', 'redirect', 'dev', 'hole0'
    with undone(client), hole(client):
        assert have_effect(busy) == [False] * 3
        tc(
            client,
            'qdisc add dev eth0 clsact',
            u32('egress', f'dst {busy.hop(4, 1)}', *away),
            u32('ingress', f'src {busy.hop(4, 2)}', *away),
        )
        someones(client, 'egress')
        before = attached(client)
        assert have_effect(busy) == [True] * 3
        with elfprobe(busy, busy.server_address(4), cwd=tmp_path, via=via) as measuring:
            has_rows(measuring)
            during = attached(client)
            assert have_effect(busy) == [True] * 3
        for direction in 'egress', 'ingress':
            added = set(during[direction].splitlines()) - set(before[direction].splitlines())
            assert set(during[direction].splitlines()) >= set(before[direction].splitlines())
            assert bool(added) == bool(command)
        assert attached(client) == before
        assert have_effect(busy) == [True] * 3


@root
def test_empty_clsact_of_others_stays(lab4, tmp_path):
    with undone(lab4.client):
        tc(lab4.client, 'qdisc add dev eth0 clsact')
        before = attached(lab4.client)
        with elfprobe(lab4, ANYWHERE, cwd=tmp_path, via=(*lab4.client.command(), *CLSACT_COMMAND)):
            assert attached(lab4.client) != before
        assert attached(lab4.client) == before


@root
@pytest.mark.parametrize('direction', ['egress', 'ingress'])
def test_our_clsact_stays_for_who_came_to_use_it(lab4, tmp_path, direction):
    before = attached(lab4.client)
    with undone(lab4.client):
        with elfprobe(lab4, ANYWHERE, cwd=tmp_path, via=(*lab4.client.command(), *CLSACT_COMMAND)):
            tc(lab4.client, u32(direction, f'dst {ANYWHERE}', 'classid', '1:1'))
        after = attached(lab4.client)
        assert 'clsact' in after.pop('qdisc')
        assert 'u32' in after.pop(direction)
        assert after.items() <= before.items()


# As with pyroute2 of another version, where it deletes.
PYROUTE2 = """
from pyroute2 import IPRoute, NetlinkError
tc = IPRoute.tc
def tc_of_version(self, command, *args, **kw):
    if {condition}:
        raise {error}
    return tc(self, command, *args, **kw)
IPRoute.tc = tc_of_version
"""


@root
@pytest.mark.parametrize(
    'condition, error',
    [
        ("str(command).startswith('del')", "NetlinkError(95, 'Operation not supported')"),
        ('isinstance(command, tuple)', "AttributeError('startswith')"),
    ],
    ids=['0.5', '0.9'],
)
def test_pyroute2_detaches(lab4, tmp_path, condition, error):
    before = attached(lab4.client)
    via = *lab4.client.command(), *with_change(NO_TCX + PYROUTE2.format(condition=condition, error=error))
    with undone(lab4.client):
        with elfprobe(lab4, ANYWHERE, cwd=tmp_path, via=via):
            assert attached(lab4.client) != before
        assert attached(lab4.client) == before


@root
@pytest.mark.parametrize('theirs', ['empty', 'in use'])
def test_clsact_that_others_put_in_the_place_of_ours_stays(lab4, tmp_path, theirs):
    with undone(lab4.client):
        with elfprobe(lab4, ANYWHERE, cwd=tmp_path, via=(*lab4.client.command(), *CLSACT_COMMAND)):
            tc(lab4.client, 'qdisc del dev eth0 clsact', 'qdisc add dev eth0 clsact')
            if theirs == 'in use':
                someones(lab4.client, 'egress')  # with our filter's priority and handle
            during = attached(lab4.client)
        assert 'clsact' in during['qdisc']
        assert {**attached(lab4.client), 'xdp': None} == {**during, 'xdp': None}


@root
def test_missing_module_of_clsact(lab4, tmp_path):
    """After an upgrade, the modules of the running kernel may be gone: it knows no such qdisc."""
    unknown = PYROUTE2.format(condition="args[0] == 'clsact'", error="NetlinkError(2, 'kind is unknown')")
    via = with_change(NO_TCX + unknown)
    ended = lab4.client.run(*via, *COMMAND, '-i', 'eth0', ANYWHERE, check=False, cwd=tmp_path)
    check_refused(ended, 1, ['has no clsact qdisc', 'module sch_ingress', 'boot the new one'])
    assert files(tmp_path) == {}


@root
def test_ingress_qdisc_of_others_stays(lab4, tmp_path):
    """tcx does not need its place, clsact does."""
    with undone(lab4.client), ExitStack() as stack:
        tc(lab4.client, 'qdisc add dev eth0 ingress')
        stack.callback(tc, lab4.client, 'qdisc del dev eth0 ingress')
        before = attached(lab4.client)
        folder = tmp_path / 'tcx'
        folder.mkdir()
        with elfprobe(lab4, ANYWHERE, cwd=folder):
            assert attached(lab4.client) != before
        assert attached(lab4.client) == before
        shutil.rmtree(folder)
        ended = lab4.client.run(*CLSACT_COMMAND, *COMMAND, '-i', 'eth0', ANYWHERE, check=False, cwd=tmp_path)
        check_refused(ended, 1, ['-i/--interface', "'eth0'", 'ingress qdisc', 'clsact'])
        assert attached(lab4.client) == before
    assert files(tmp_path) == {}


@root
def test_xdp_program_that_others_remove_ends_the_run(busy, tmp_path):
    """Where there are no BPF links, with which nobody can."""
    via = *busy.client.command(), *OLD_COMMAND
    arguments = '--ingress-hook', 'xdp', busy.server_address(4)
    with undone(busy.client), elfprobe(busy, *arguments, cwd=tmp_path, via=via) as measuring:
        has_rows(measuring)
        busy.client.run('ip', 'link', 'set', 'eth0', 'xdp', 'off')
        assert measuring.wait() == 1
    assert "somebody has removed our XDP program from 'eth0'" in measuring.log.splitlines()[-1]


REMOVALS = {
    'egress filter': (CLSACT_COMMAND, 'filter', 'tc filter del dev eth0 egress prio 1'),
    'ingress filter': (CLSACT_COMMAND, 'filter', 'tc filter del dev eth0 ingress prio 1'),
    'qdisc': (CLSACT_COMMAND, 'filter', 'tc qdisc del dev eth0 clsact'),
    'tcx link': ((), 'TC program', ''),
}


@root
@pytest.mark.parametrize(('command', 'what', 'remove'), REMOVALS.values(), ids=REMOVALS)
def test_program_that_others_remove_ends_the_run(busy, tmp_path, command, what, remove):
    """There will be no more rows, and somebody should know; what there was is written."""
    via = *busy.client.command(), *command
    with undone(busy.client), elfprobe(busy, busy.server_address(4), cwd=tmp_path, via=via) as measuring:
        has_rows(measuring)
        if remove:
            busy.client.run(*remove.split())
        else:
            detach_tcx_links(tcx_programs(busy.client, 'eth0')['egress'])
        assert measuring.wait() == 1
    assert f"somebody has removed our {what} from 'eth0'" in measuring.log.splitlines()[-1]
    assert measuring.summary.probes == len(measuring.rows()) > 0


# Which of others' programs on egress run before ours, and so see the clones as well. Of tcx programs: those
# that were there first. Of clsact's filters: none, unless ours is a filter, too.
PROGRAMS = {
    'tcx': ({'tcx egress': 'if first', 'tcx ingress': ''}, ()),
    'filters': ({'tc egress 1': '', 'tc ingress 1': ''}, ()),
    'tcx, no tcx for us': ({'tcx egress': 'always', 'tcx ingress': ''}, CLSACT_COMMAND),
    'filters, no tcx for us': (
        {'tc egress 1': 'always', 'tc egress 20': '', 'tc ingress 1': '', 'tc ingress 20': ''},
        CLSACT_COMMAND,
    ),
}


@contextmanager
def counting(host: Host, places: Iterable[str]) -> Iterator[Callable[[], list[int]]]:
    """Somebody else's programs in these places of the host's first device. Gives what reads their counts."""
    with host.popen(
        sys.executable,
        '-c',
        COUNTING,
        *places,
        cwd=ELFPROBE.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:

        def counts() -> list[int]:
            process.stdin.write('\n')
            process.stdin.flush()
            return [int(number) for number in process.stdout.readline().split()]

        try:
            if process.stdout.readline() != 'attached\n':
                pytest.skip(f'no place for programs at {places}: {process.stderr.read()}')
            yield counts
        finally:
            end(process)


@root
@pytest.mark.parametrize(
    ('programs', 'since'),
    [
        ('tcx', 'before'),
        ('tcx', 'during'),
        ('filters', 'during'),
        ('tcx, no tcx for us', 'before'),
        ('filters, no tcx for us', 'during'),
    ],
)
def test_programs_of_others_see_each_packet_once(lab4, tmp_path, programs, since):
    """Those of the application, both ways. Those before our program see the clones as well."""
    places, command = PROGRAMS[programs]
    server, via = lab4.server_address(6), (*lab4.client.command(), *command)
    without_us = [PINGS, 0] * len(places)
    with ExitStack() as stack:
        stack.enter_context(undone(lab4.client))

        def attach() -> Callable[[], list[int]]:
            return stack.enter_context(counting(lab4.client, places))

        def seen() -> list[int]:
            then = counts()
            lab4.client.run('ping', '-nqi.005', f'-c{PINGS}', server)
            return [after - before for before, after in zip(then, counts())]

        if since == 'before':
            tc(lab4.client, 'qdisc add dev eth0 clsact')
            counts = attach()
            assert seen() == without_us
        with elfprobe(lab4, '-rg', '-p0', server, cwd=tmp_path, via=via) as measuring:
            if since == 'during':
                if not command and any(place.startswith('tc ') for place in places):
                    tc(lab4.client, 'qdisc add dev eth0 clsact')
                counts = attach()
            with_us = seen()
        assert seen() == without_us
    check_end(measuring)
    probes = len(measuring.rows())
    assert probes > PINGS // 2
    before = {'': False, 'always': True, 'if first': since == 'before'}
    assert with_us == [count for when in places.values() for count in (PINGS, probes * before[when])]


@root
@TC_COMMANDS
@pytest.mark.parametrize('where', ['dropping', 'letting out', 'taking probes'])
def test_copies_that_a_filter_of_others_ends(make_lab, tmp_path, where, command):
    """Those that it drops do no harm; of those that it lets out the destination gets one, and no second."""
    lab = make_lab(routers=1)
    servers, via = [lab.server_address(version) for version in (4, 6)], (*lab.client.command(), *command)
    with undone(lab.client), lab.server.capture(filter='icmp[0] == 8 or icmp6[0] == 128') as arrived:
        tc(lab.client, 'qdisc add dev eth0 clsact')
        if command:
            someones(lab.client, where)
        else:
            lab.client.popen(sys.executable, '-c', SOMEONES, where, 'tcx', cwd=ELFPROBE.parent)
            wait_until(lambda: tcx_programs(lab.client, 'eth0')['egress'], 20, 'their program is attached')
        with elfprobe(lab, '-p0', '-d', *servers, cwd=tmp_path, via=via) as measuring:
            for server in servers:
                lab.client.run('ping', '-nqi.005', f'-c{PINGS}', server)
            assert measuring.stop() == 3
    assert measuring.rows() == []
    copies = where == 'letting out'
    assert len(arrived.packets()) == 2 * (PINGS + copies)
    assert measuring.counters['clone_lost'] >= (2 if copies else PINGS)
    assert [server for server in servers if f'{server}: a filter in front of ours' in measuring.log] == (
        servers if copies else []
    )


@root
@pytest.mark.parametrize('options', [['-rg'], ['-rg', '-T']], ids=' '.join)
def test_path_mtu_is_discovered_by_probed_flows(make_lab, tmp_path, options):
    """Behind the first router is a link for small packets only, which it tells; -T makes probes as large."""
    lab = make_lab(routers=2)
    for router, device in zip(lab.routers, ('eth1', 'eth0')):
        batch(router.name, [f'link set {device} mtu {SMALL_MTU}'])
    start_sink(lab)
    lab.server.popen(sys.executable, '-c', UDP_ECHO)
    wait_until(lambda: lab.server.run('ss', '-Hlun', 'sport = :9').stdout, 10, 'UDP is answered')
    servers = [lab.server_address(version) for version in (4, 6)]
    with elfprobe(lab, *options, '-p0', *servers, cwd=tmp_path) as measuring:
        for version, server in zip('46', servers):
            for protocol in 'tcp', 'udp':
                lab.client.run('ip', f'-{version}', 'route', 'flush', 'cache')
                route = 'ip', f'-{version}', 'route', 'get', server
                assert 'mtu' not in lab.client.run(*route).stdout
                lab.client.run(sys.executable, '-c', SEND_MUCH, protocol, server, timeout=10)
                assert f'mtu {SMALL_MTU}' in lab.client.run(*route).stdout
    check_end(measuring)
    answered = {(row.dest, row.protocol, row.outttl) for row in measuring.rows() if row.is_answered}
    assert answered == set(itertools.product(servers, (TCP, UDP), (1, 2)))


# Takes, as any user may, what could be the lock of an interface, and says how much of it.
USERS_LOCKS = """
import fcntl, os, signal, socket, sys
held = []
for ifindex, _ in socket.if_nameindex():
    held.append(socket.socket(socket.AF_UNIX))
    held[-1].bind(f'\\0elfprobe-{ifindex}')
for folder, _, names in [*os.walk('/proc/sys/net/ipv4'), *os.walk('/run/elfprobe')]:
    for path in [folder, *(os.path.join(folder, name) for name in names)]:
        for mode, lock in (os.O_RDONLY, fcntl.flock), (os.O_WRONLY, fcntl.lockf):
            try:
                held.append(os.open(path, mode | os.O_NONBLOCK))
                lock(held[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                pass
print(len(held), flush=True)
signal.pause()
"""


@contextmanager
def users_locks(host: Host) -> Iterator[None]:
    """A user without rights holds locks on whatever may be locked."""
    user = 'setpriv', f'--reuid={NOBODY}', f'--regid={NOBODY}', '--clear-groups'
    with host.popen(*user, sys.executable, '-c', USERS_LOCKS, stdout=subprocess.PIPE) as holder:
        try:
            assert int(holder.stdout.readline()) > 100
            yield
        finally:
            end(holder)


@root
def test_one_elfprobe_for_each_interface(lab4, tmp_path):
    """Nobody else can keep it from starting: neither by a name in the abstract namespace of sockets, nor by a
    lock of a file that others may open."""
    client, router = lab4.client, lab4.routers[0]
    with hole(client), users_locks(client):
        places = [(client, 'eth0'), (client, 'hole0'), (router, 'eth0')]
        before = [attached(*place) for place in places]
        with elfprobe(lab4, ANYWHERE, cwd=tmp_path) as first:
            during, csv = attached(client), files(tmp_path)
            ended = client.run(*COMMAND, '-i', 'eth0', ANYWHERE, check=False, cwd=tmp_path)
            named = f'elfprobe (pid {first.process.pid})'
            assert check_refused(ended, 1, ['-i/--interface', "'eth0'", named]) == ''
            assert files(tmp_path) == csv
            with elfprobe(lab4, '-i', 'hole0', '-l', ANYWHERE, cwd=tmp_path) as second, elfprobe(
                lab4, '-f', 'three', ANYWHERE, cwd=tmp_path, host=router
            ):
                assert first.is_running
                assert [attached(*place) for place in places][0] == during
                names = ['elf.1.csv', 'elf.1.json', 'elf.1.log']  # the first run still writes its files
                names += ['elf.csv', 'elf.json', 'three.csv', 'three.json']
                assert sorted(path.name for path in tmp_path.iterdir()) == names
                assert 'elf.csv' in second.log and 'rows go to elf.1.csv' in second.log
        assert [attached(*place) for place in places] == before


# Every ending


@root
@pytest.mark.parametrize('signals', ['SIGINT', 'SIGHUP', 'SIGINT SIGTERM', ''])
def test_orderly_end(busy, tmp_path, signals):
    """By signals, or after a while. (SIGTERM alone ends most of the other tests.)"""
    before = attached(busy.client)
    duration = () if signals else ('--duration', '1')
    with undone(busy.client):
        with elfprobe(busy, '-rg', '-p1', *duration, busy.server_address(4), cwd=tmp_path) as measuring:
            has_rows(measuring, 50)
            for name in signals.split():
                measuring.process.send_signal(signal.Signals[name])
            assert measuring.wait() == 0
        assert attached(busy.client) == before
    check_end(measuring)
    assert 0 < measuring.summary.unanswered < measuring.summary.replies


def check_silence(capture: Capture, since: int) -> None:
    """Probes end soon after a time (CLOCK_REALTIME, ns), though packets that could carry some go on."""
    wait_until(lambda: capture.packets()[-1][0] > since + SILENT_AFTER + SECOND // 2, 10, 'packets after it')
    times = [packet.time for packet in ip_packets(capture) if packet.ttl <= 32]
    assert times
    assert max(times) < since + SILENT_AFTER


@pytest.mark.sample
@root
def test_silence_after_sigkill(busy, tmp_path):
    to_server = f'icmp and dst {busy.server_address(4)}'
    with undone(busy.client), busy.routers[0].capture(filter=to_server) as capture:
        with elfprobe(busy, '-rg', '-p1', busy.server_address(4), cwd=tmp_path) as measuring:
            has_rows(measuring)
            measuring.stop(signal.SIGKILL)
        check_silence(capture, time.time_ns())
    whole_rows(tmp_path / 'elf.csv')


@root
def test_silence_while_stopped(busy, tmp_path):
    to_server = f'icmp and dst {busy.server_address(4)}'
    before = attached(busy.client)
    with undone(busy.client):
        with elfprobe(busy, '-rg', '-p1', busy.server_address(4), cwd=tmp_path) as measuring:
            has_rows(measuring)
            with busy.routers[0].capture(filter=to_server) as capture:
                wait_until(capture.packets, 10, 'packets')
                measuring.process.send_signal(signal.SIGSTOP)
                check_silence(capture, time.time_ns())
            resumed = time.monotonic_ns()
            measuring.process.send_signal(signal.SIGCONT)
            wait_until(lambda: measuring.rows()[-1].sendtime > resumed, 10, 'a probe after SIGCONT')
            assert measuring.stop() == 0
        [gap] = re.findall(r'no probes for ([\d.]+) s: elfprobe was stopped', measuring.log)
        assert float(gap) > 0
        assert attached(busy.client) == before
    check_end(measuring)


# Sends a packet at the moment when the log says that packets are probed.
SENDS_AT_ONCE = """
import logging, socket
def send(record):
    if record.msg.startswith('probing on'):
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(bytes(100), (sys.argv[-1], 9))
    return True
elfprobe.log.addFilter(send)
"""


@root
def test_first_packet_after_the_announcement_is_probed(lab4: Lab, tmp_path: Path) -> None:
    via = *lab4.client.command(), *with_change(SENDS_AT_ONCE)
    with elfprobe(lab4, lab4.server_address(4), cwd=tmp_path, via=via) as measuring:
        # It may wait for the address of the next hop first.
        wait_until(lambda: any((row.protocol, row.dport) == (UDP, 9) for row in measuring.rows()), 10, 'its row')
        assert measuring.stop() == 0
    check_end(measuring)


XDP = '--ingress-hook', 'xdp'
KILLED = {  # when, the command before elfprobe's, its options, whether clsact is others', what is left
    'tcx and XDP': ('at work', (), XDP, False, ''),
    'clsact': ('at work', CLSACT_COMMAND, (), False, 'filter'),
    'with filters of others': ('at work', CLSACT_COMMAND, (), True, 'filter'),
    'old system, whose kernel does not see to XDP': ('at work', OLD_COMMAND, XDP, False, 'XDP program'),
    'in the start, clsact': ('in the start', with_fault('output_files', 'SIGKILL', NO_TCX), (), False, 'filter'),
}


@root
@pytest.mark.parametrize(('killed', 'command', 'options', 'theirs', 'left'), KILLED.values(), ids=KILLED)
def test_next_start_clears_what_a_killed_one_left(busy, tmp_path, killed, command, options, theirs, left):
    client = busy.client
    with undone(client):
        if theirs:
            tc(client, 'qdisc add dev eth0 clsact', u32('egress', f'dst {ANYWHERE}', 'classid', '1:1'))
        before = attached(client)
        if killed == 'in the start':
            client.run(*command, *COMMAND, '-i', 'eth0', ANYWHERE, check=False, cwd=tmp_path)
        else:
            via = client.command(*command)
            with elfprobe(busy, *options, ANYWHERE, cwd=tmp_path, via=via) as first:
                first.stop(signal.SIGKILL)
        assert bool(attached(client)['xdp']) == (left == 'XDP program')
        assert (attached(client) != before) == bool(left)
        with elfprobe(busy, busy.server_address(4), cwd=tmp_path) as measuring:
            has_rows(measuring)
        assert attached(client) == before
    check_end(measuring)
    assert ('that a killed elfprobe left' in measuring.log) == bool(left)
    assert (f'{left} that a killed elfprobe left' in measuring.log) == bool(left)


# The files, where with_fault() finds them.
OF_FILES = '''
from elf.files import OutputFile, ReplacedFile
elfprobe.OutputFile, elfprobe.ReplacedFile = OutputFile, ReplacedFile
'''


@root
@pytest.mark.parametrize(
    ('stage', 'fault'),
    [
        ('sole_user', 'Failure'),
        ('Kernel.__init__', 'RuntimeError'),
        ('Results', 'Failure'),
        ('attachments', 'RuntimeError'),
        ('TcxAttachment.attach', 'RuntimeError'),
        ('OutputFile.publish', 'Failure'),
        ('ProcessFollower.followed', 'RuntimeError'),
        ('ClsactAttachment._add_filter', 'Failure'),
        ('tc_filters', 'RuntimeError'),
        ('pyroute2.IPRoute.tc', 'RuntimeError'),
        ('OutputFile.write_lines', 'RuntimeError'),
    ],
)
def test_nothing_is_left_of_a_start_that_fails(lab4, tmp_path, stage, fault):
    (tmp_path / 'elf.csv').write_text(OLD)
    before = attached(lab4.client), files(tmp_path)
    with undone(lab4.client):
        change = NO_TCX if stage.startswith(('Clsact', 'tc_', 'pyroute2')) else ''
        ended = lab4.client.run(
            *with_fault(stage, fault, OF_FILES + change),
            *COMMAND,
            '-i',
            'eth0',
            '-a',
            'speedtest',
            ANYWHERE,
            check=False,
            cwd=tmp_path,
        )
        assert ended.returncode == 1
        assert 'a test broke it' in ended.stderr.splitlines()[-1]
        assert (attached(lab4.client), files(tmp_path)) == before


@root
@pytest.mark.parametrize(
    ('stage', 'fault', 'status'),
    [
        ('Measurement.measure', 'RuntimeError', 1),
        ('Measurement.summarise', 'Failure', 1),
        ('Results.expire', 'RuntimeError', 1),
        ('ReplacedFile.finish', 'Failure', 1),
    ],
)
def test_interface_is_clean_after_a_fault_at_work(busy, tmp_path, stage, fault, status):
    before = attached(busy.client)
    with undone(busy.client):
        ended = busy.client.run(
            *with_fault(stage, fault, OF_FILES),
            *COMMAND,
            '-i',
            'eth0',
            '--duration',
            '0.1',
            busy.server_address(4),
            check=False,
            cwd=tmp_path,
        )
        assert ended.returncode == status, ended.stderr
        assert attached(busy.client) == before
    whole_rows(tmp_path / 'elf.csv')
    assert bool(json.loads((tmp_path / 'elf.json').read_text())['ended']) == (
        stage in ('Measurement.measure', 'Results.expire')
    )


@root
@pytest.mark.parametrize('number', ['SIGINT', 'SIGTERM'])
def test_nothing_is_done_after_a_signal_in_the_start(lab4, tmp_path, number):
    (tmp_path / 'elf.csv').write_text(OLD)
    before = attached(lab4.client), files(tmp_path)
    with undone(lab4.client):
        ended = lab4.client.run(
            *with_fault('Kernel.__init__', number), *COMMAND, '-i', 'eth0', ANYWHERE, cwd=tmp_path
        )
        assert 'before anything was attached' in ended.stdout + ended.stderr
        assert (attached(lab4.client), files(tmp_path)) == before


def pinging(make_lab: Callable[..., Lab]) -> Lab:
    """A lab whose client's device nobody else needs."""
    lab = make_lab(routers=1)
    lab.client.popen(
        'ping', '-nq', '-i0.01', lab.server_address(4), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    return lab


@root
def test_interface_is_deleted(make_lab, tmp_path):
    lab = pinging(make_lab)
    with elfprobe(lab, lab.server_address(4), cwd=tmp_path) as measuring:
        has_rows(measuring)
        batch(lab.client.name, ['link del eth0'])
        assert measuring.wait() == 1
    assert measuring.log.splitlines()[-1] == "elfprobe.py: the interface 'eth0' is gone"
    check_end(measuring)


@root
def test_interface_goes_down_and_up(make_lab, tmp_path):
    lab = pinging(make_lab)
    before = attached(lab.client)
    with elfprobe(lab, lab.server_address(4), cwd=tmp_path) as measuring:
        has_rows(measuring)
        batch(lab.client.name, ['link set eth0 down'])
        wait_until(lambda: 'down' in measuring.log, 3, 'elfprobe says that it is down')
        batch(lab.client.name, ['link set eth0 up', f'route add default via {lab.hop(4, 1)}'])
        has_rows(measuring, len(measuring.rows()) + 10)
        assert measuring.stop() == 0
    assert attached(lab.client) == before
    check_end(measuring)


@root
def test_address_is_removed_and_comes_back(make_lab, tmp_path):
    lab = pinging(make_lab)
    before, route = attached(lab.client), f'route add default via {lab.hop(4, 1)}'
    address = f'{lab.client_address(4)}/24 dev eth0'
    with elfprobe(lab, lab.server_address(4), cwd=tmp_path) as measuring:
        has_rows(measuring)
        batch(lab.client.name, [f'address del {address}'])
        gone = lab.client.run('ip', 'route', 'get', lab.server_address(4), check=False)
        assert 'unreachable' in gone.stderr
        wait_until(lambda: time.monotonic_ns() - measuring.rows()[-1].sendtime > SECOND, 5, 'no more rows')
        batch(lab.client.name, [f'address add {address}', route])
        has_rows(measuring, len(measuring.rows()) + 10)
        assert measuring.stop() == 0
    assert attached(lab.client) == before
    check_end(measuring)


@root
@pytest.mark.parametrize(
    ('place', 'commands'),
    [
        ('client', ['link set eth0 down', 'link set eth0 name eth5', 'link set eth5 up']),
        ('server', ['link set eth0 netns {server} name eth5']),
    ],
)
def test_interface_goes_elsewhere(make_lab, tmp_path, place, commands):
    """It gets another name, or another namespace, where it is another administrator's."""
    lab = pinging(make_lab)
    with elfprobe(lab, lab.server_address(4), cwd=tmp_path) as measuring:
        has_rows(measuring)
        batch(lab.client.name, [command.format(server=lab.server.name) for command in commands])
        assert measuring.stop() in (0, 1)
    assert attached(getattr(lab, place), 'eth5')['xdp'] is None
    check_end(measuring)


@root
def test_console_is_closed(busy, tmp_path):
    before = attached(busy.client)
    with ExitStack() as stack:
        stack.enter_context(undone(busy.client))
        process = busy.client.popen(
            *COMMAND,
            '-i',
            'eth0',
            '-dl',
            busy.server_address(4),
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        stack.callback(end, process)
        wait_for_line(process, 'probing on')
        process.stderr.close()
        measuring = Run(process, tmp_path, stack.enter_context(open(tmp_path / 'elf.log', 'rb')))
        has_rows(measuring)
        assert measuring.stop(signal.SIGHUP) == 0
        assert attached(busy.client) == before
        check_end(measuring)


@contextmanager
def logging_elfprobe(host: Host, *command: str, cwd: Path, **kw: Any) -> Iterator[Run]:
    """An elfprobe with -l, whose log is read where its console cannot be; `kw` goes to Popen."""
    with ExitStack() as stack:
        process = host.popen(*command, cwd=cwd, **kw)
        stack.callback(end, process)
        path = cwd / 'elf.log'
        wait_until(lambda: path.exists() and 'probing on' in path.read_text(), 10, 'elfprobe is attached')
        yield Run(process, cwd, stack.enter_context(open(path, 'rb')))


@root
@pytest.mark.parametrize('closed', ['2>&-', '<&- >&- 2>&-'])
def test_standard_streams_are_closed(busy, tmp_path, closed):
    """What is opened instead must not be written to as if it were one of them."""
    before = attached(busy.client)
    shell = 'sh', '-c', f'exec "$@" {closed}', 'sh'
    with undone(busy.client):
        with logging_elfprobe(
            busy.client, *shell, *COMMAND, '-i', 'eth0', '-dl', busy.server_address(4), cwd=tmp_path
        ) as measuring:
            has_rows(measuring)
            # By device: in a chroot, files of another mount namespace have names outside of it.
            streams = [os.stat(f'/proc/{measuring.process.pid}/fd/{number}').st_rdev for number in (0, 1, 2)]
            assert measuring.stop() == 0
            check_end(measuring)
        assert attached(busy.client) == before
    assert streams[-closed.count('&') :] == [os.stat(os.devnull).st_rdev] * closed.count('&')


@contextmanager
def unread_console(kind: str) -> Iterator[int]:
    """A pipe or a terminal that takes no more, since nobody reads it."""
    reader, console = os.pipe() if kind == 'pipe' else os.openpty()
    try:
        os.set_blocking(console, False)
        with suppress(BlockingIOError):
            while os.write(console, b'x' * 1024):
                pass
        with suppress(BlockingIOError):
            while os.write(console, b'x'):
                pass
        os.set_blocking(console, True)
        yield console
        assert os.get_blocking(console)  # it is others' as well
    finally:
        os.close(reader)
        os.close(console)


@root
@pytest.mark.parametrize('kind', ['pipe', 'terminal'])
def test_console_is_not_read(busy, tmp_path, kind):
    before = attached(busy.client)
    with undone(busy.client), unread_console(kind) as console:
        with logging_elfprobe(
            busy.client, *COMMAND, '-i', 'eth0', '-dl', busy.server_address(4), cwd=tmp_path, stderr=console
        ) as measuring:
            has_rows(measuring)
            assert measuring.stop() == 0
            check_end(measuring)
        assert attached(busy.client) == before


@root
def test_reader_of_the_results_who_has_seen_enough(busy, tmp_path):
    """The results are all that is on standard output, and the files are whole."""
    shell = 'bash', '-c', '"$@" 2>log | head -n 3; exit "${PIPESTATUS[0]}"', 'bash'
    command = [*shell, *COMMAND, '-i', 'eth0', '--duration', '1', busy.server_address(4)]
    shown = busy.client.run(*command, cwd=tmp_path).stdout.splitlines()
    assert len(shown) == 3 and 'latency in ms' in shown[1]
    with open(tmp_path / 'log', 'rb') as log:
        ended = Run(subprocess.Popen(['true'], text=True), tmp_path, log)
        check_end(ended)
        assert 'latency in ms' not in ended.log


@root
def test_results_are_not_read(busy, tmp_path):
    """A second signal gives them up. Until then the device is free for others already."""
    before = attached(busy.client)
    arguments = *COMMAND, '-i', 'eth0', '-l', busy.server_address(4)
    with undone(busy.client), unread_console('pipe') as pipe, logging_elfprobe(
        busy.client, *arguments, cwd=tmp_path, stdout=pipe
    ) as measuring:
        has_rows(measuring)
        measuring.process.terminate()
        wait_until(lambda: 'unanswered' in measuring.log, 10, 'its end')
        wait_until(lambda: attached(busy.client) == before, 10, 'nothing is attached')
        with elfprobe(busy, busy.server_address(4), '-f', 'other', cwd=tmp_path) as other:
            wait_until(lambda: other.rows('other'), 10, 'rows')
        assert measuring.is_running
        assert measuring.stop() == 0
        check_end(measuring)


def test_refusal_is_not_read():
    with unread_console('pipe') as console:
        assert run(*COMMAND, check=False, stderr=console).returncode == 2


def test_lines_left_out_on_the_console_are_counted():
    number = 20000
    with subprocess.Popen(
        [sys.executable, '-c', SAY, str(number)],
        cwd=ELFPROBE.parent,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout.readline() == 'said\n'
            lines = [process.stderr.readline() for _ in range(1000)]  # so there is room for more
            with process.stdin as more:
                more.write('last\n')
            lines += process.stderr.readlines()
        finally:
            end(process)
    assert lines.pop() == 'last\n'
    next_number = 0
    for line in lines:
        left_out = re.fullmatch(r'\((\d+) lines left out: .*\)\n', line)
        assert left_out or int(line) == next_number
        next_number += int(left_out[1]) if left_out else 1
    assert len(lines) < next_number == number


@root
def test_log_is_full(busy, tmp_path):
    """But the disk takes rows: the log of -d goes over its limit."""
    before = attached(busy.client)
    # Standard output and error are a file here, and must not have the limit.
    limited = 'bash', '-c', f'exec prlimit --fsize={LOG_LIMIT} "$@" > >(cat) 2>&1', 'bash'
    via = *busy.client.command(*limited), *with_change('elfprobe.REPORT_EVERY = 0.05')
    with undone(busy.client):
        with elfprobe(busy, '-rg', '-p250', '-dl', busy.server_address(4), cwd=tmp_path, via=via) as measuring:
            has_rows(measuring, 3)
            wait_until(lambda: len(measuring.log) > LOG_LIMIT, 5, 'a long log')
            assert measuring.stop() == 0
            wait_until(lambda: 'latency in ms' in measuring.log, 5, 'cat has written everything')
        assert attached(busy.client) == before
    check_end(measuring)
    log = (tmp_path / 'elf.log').read_text()
    assert 'probing on' in log and len(log) <= LOG_LIMIT < len(measuring.log)
    said = iter(measuring.log.splitlines(True))
    assert all(line in said for line in log.splitlines(True))  # whole ones, in order


SMALL = 'mkdir small; mount -t tmpfs -o size=12k none small; "$@"; s=$?; cp small/elf.csv .; exit $s'
DISKS = {
    'full': ('small/elf', ['unshare', '-m', 'sh', '-c', SMALL, 'sh']),
    'limited': ('elf', ['prlimit', '--fsize=9999']),
}


@root
@pytest.mark.parametrize(('filebase', 'via'), DISKS.values(), ids=DISKS)
def test_disk_is_full(busy, tmp_path, filebase, via):
    before = attached(busy.client)
    with undone(busy.client):
        with elfprobe(
            busy,
            '-rg',
            '-p0',
            '-l',
            '-f',
            filebase,
            busy.server_address(4),
            cwd=tmp_path,
            via=busy.client.command(*via),
        ) as measuring:
            assert measuring.wait() == 1
        assert attached(busy.client) == before
    assert 'Traceback' not in measuring.log
    complaints = [line for line in measuring.log.splitlines() if line.startswith('elfprobe.py: ')]
    assert len(complaints) == 1
    assert f"'{filebase}.csv'" in complaints[0]
    written, ended = len(whole_rows(tmp_path / 'elf.csv')), measuring.summary
    assert written > 20
    [lost] = re.findall(rf'(\d+) rows of them could not be written to {filebase}.csv', measuring.log)
    assert written + int(lost) == ended.replies + ended.unanswered


# Files


@root
def test_existing_files_are_renamed_and_new_ones_are_the_users(busy, tmp_path):
    old_files = {'elf.csv': OLD, 'elf.1.csv': 'older\n', 'precious': 'to somebody\n', 'p.pcapng': 'old packets'}
    for name, text in old_files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / 'elf.log').symlink_to('precious')
    before = files(tmp_path)
    sudo = busy.client.command('env', 'SUDO_UID=1234', 'SUDO_GID=2345')
    with elfprobe(busy, '-l', '-w', 'p.pcapng', busy.server_address(4), cwd=tmp_path, via=sudo) as measuring:
        has_rows(measuring)
    check_end(measuring)
    (tmp_path / 'p.pcapng').write_text('packets')  # which are not text
    after = files(tmp_path)
    moved = {
        'elf.2.csv': 'elf.csv', 'elf.1.csv': 'elf.1.csv', 'elf.1.log': 'elf.log', 'precious': 'precious',
        'p.1.pcapng': 'p.pcapng',
    }  # fmt: skip
    assert {name: after.pop(name) for name in moved} == {name: before[old] for name, old in moved.items()}
    assert sorted(after) == ['elf.csv', 'elf.json', 'elf.log', 'p.pcapng']
    assert after['elf.log'][1] == measuring.log
    for new, old in ('elf.2.csv', 'elf.csv'), ('elf.1.log', 'elf.log'):
        assert re.search(rf'\b{old}\b.*\b{new}\b', measuring.log)
    owners = {
        name: (path.stat().st_uid, path.stat().st_gid)
        for name in moved.keys() | after.keys()
        for path in [tmp_path / name]
    }
    assert owners == {**dict.fromkeys(moved, (0, 0)), **dict.fromkeys(after, (1234, 2345))}


@root
def test_quiet_and_debug(busy, tmp_path):
    """By its own name, as people call it, too."""
    ended = busy.client.run(
        str(ELFPROBE), '-qd', '-i', 'eth0', '--duration', '0.3', busy.server_address(4), cwd=tmp_path
    )
    assert ended.stdout == ended.stderr == ''
    with open(tmp_path / 'elf.log', 'rb') as log:
        measured = Run(subprocess.Popen(['true'], text=True), tmp_path, log)
        check_end(measured)
        assert measured.counters['probes'] == measured.summary.probes > 0
        assert 'probing on eth0' in measured.log
        assert 'no probes for 0.0 s' not in measured.log


# Applications


@root
def test_flows_of_applications(lab4, tmp_path):
    """Each program talks to an address of its own, all of them private; a bystander's is not probed."""
    client: Host = lab4.client
    python = sys.executable
    for name in 'speedtest.py', 'bystander.py':
        (tmp_path / name).write_text(TALK)
    shutil.copy(str(shutil.which('iperf3')), tmp_path / 'SpeedTest')
    (tmp_path / 'other').symlink_to('SpeedTest')  # the process's name is then this
    programs = {
        'fd00:e1f:5::65': (python, '-u', 'speedtest.py'),
        '10.0.5.102': (str(tmp_path / 'other'), '-t60', '-b1M', '-l1K', '-c'),
        '10.0.5.103': ('sh', '-c', 'sh -c \'"$@" & wait\' sh "$@" & wait', 'sh', python, 'bystander.py'),
        '10.0.5.104': (python, 'bystander.py'),
        '10.0.5.105': (python, '-c', TALK),
    }
    bystander = '10.0.5.104'
    for address in programs:
        batch(lab4.server.name, [f'address add {address} dev eth0'])
    start_sink(lab4)

    def start(address: str, *more: str) -> subprocess.Popen[str]:
        return client.popen(*programs[address], address, *more, cwd=tmp_path, stdout=subprocess.DEVNULL)

    with ExitStack() as stack:
        stack.enter_context(lab4.iperf3_server())
        capture = stack.enter_context(lab4.routers[0].capture(filter=PROBES))
        shell = start('10.0.5.103')
        started = [shell, start(bystander), start('10.0.5.102')]
        with elfprobe(lab4, '-a', 'sPeedTest', '-P', str(shell.pid), cwd=tmp_path) as measuring:
            started += [start('fd00:e1f:5::65'), start('10.0.5.105', 'SPEEDTEST')]  # later than elfprobe
            for process in started:
                stack.callback(end, process)
            wanted = programs.keys() - {bystander}
            wait_until(lambda: {row.dest for row in measuring.rows()} >= wanted, 10, f'rows of {wanted}')
    check_end(measuring)
    assert {row.dest for row in measuring.rows()} == wanted
    assert {packet.dest for packet in ip_packets(capture)} == wanted
    text = (tmp_path / 'elf.csv').read_text()  # the shell has children that send
    pids = [f',{process.pid},' in text for process in started]
    assert pids == [process is not shell and process.args[-1] != bystander for process in started]
    assert f'(pid {shell.pid})' in measuring.log
