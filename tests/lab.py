"""A lab on one machine: network namespaces in a row, joined by veth, forwarding for real.

    client                r1                  r2                        server
    +--------+       +-----------+       +-----------+               +--------+
    |    eth0|-------|eth0   eth1|-------|eth0   eth1|----- ... -----|eth0    |
    +--------+       +-----------+       +-----------+               +--------+
            .1  link 1  .2     .1  link 2  .2     .1     link N+1     .2

Link k is 10.0.k.0/24 and fd00:e1f:k::/64 (k in hexadecimal there); its end nearer to the client is
number 1, the other number 2. So the router that ends TTL k answers from number 2 of link k.

    with Lab(routers=4) as lab:
        lab.client.run('ping', '-c1', lab.server_address(6))

Nothing is created in the root namespace. Names carry the process id and a random part, so labs never
meet; whatever a killed process left behind, the next lab sweeps away.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import struct
import subprocess
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Callable, Iterable, Iterator, TypeVar

NETNS = Path('/run/netns')
NAME = re.compile(r'elf-\d+-[0-9a-f]{6}-\w+')  # elf-PID-RANDOM-HOST
MAX_ROUTERS = 200  # links are numbered in one octet
TCPDUMP_BUFFER = 65536  # KiB
PATIENCE = int(os.environ.get('ELFPROBE_TESTS_PATIENCE', '1'))  # how many times as slow as usual all may be

COMMON_SYSCTLS = (
    'net.ipv6.conf.all.accept_dad=0',
    'net.ipv6.conf.default.accept_dad=0',
    'net.ipv6.conf.default.router_solicitations=0',
    # New namespaces inherit these from the machine, where distributions differ.
    'net.ipv4.conf.all.rp_filter=0',
    'net.ipv4.conf.default.rp_filter=0',
    'net.ipv4.tcp_congestion_control=reno',  # the one that any namespace may use, always
)
ROUTER_SYSCTLS = (
    'net.ipv4.ip_forward=1',
    'net.ipv6.conf.all.forwarding=1',
    'net.ipv4.icmp_ratelimit=0',
    'net.ipv6.icmp.ratelimit=0',
    # Older kernels have one limit on ICMP for the whole machine, which is not ours to change.
    # Types outside these masks escape it: none of IPv4's is inside, of IPv6's only packet too big.
    'net.ipv4.icmp_ratemask=0',
    'net.ipv6.icmp.ratemask=2',
    'net.ipv4.icmp_msgs_per_sec=1000000',
    'net.ipv4.icmp_msgs_burst=100000',
)

T = TypeVar('T')


class CommandFailed(RuntimeError):
    """A command failed or took too long; the text shows it and what it said."""


def wait_until(predicate: Callable[[], T], timeout: float, what: str) -> T:
    """Poll until `predicate()` is true, and return it; TimeoutError with `what` after `timeout` seconds.

    Where PATIENCE is more than 1, it takes as many times longer, and polls as rarely.
    """
    deadline = time.monotonic() + timeout * PATIENCE
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > deadline:
            raise TimeoutError(f'not within {timeout:g} s: {what}')
        time.sleep(0.005 * PATIENCE)


def run(*cmd: str, timeout: float = 30, check: bool = True, **kw: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and capture its text; `kw` goes to Popen, but for `input`.

    CommandFailed where it takes more than `timeout` seconds or, with `check`, exits other than 0.
    """
    text = kw.pop('input', None)
    options = dict(
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors='replace',
        stdin=subprocess.DEVNULL if text is None else subprocess.PIPE,
        start_new_session=True,
    )
    process = subprocess.Popen(cmd, **{**options, **kw})
    try:
        out, err = process.communicate(text, timeout * PATIENCE)
    except subprocess.TimeoutExpired:
        raise CommandFailed(f'{" ".join(cmd)}: took more than {timeout:g} s') from None
    finally:
        end(process)
    if check and process.returncode:
        raise CommandFailed(f'{" ".join(cmd)}: exit status {process.returncode}\n{err or out}')
    return subprocess.CompletedProcess(cmd, process.returncode, out, err)


def end(process: subprocess.Popen[str]) -> None:
    """Kill a process and its group, which it must lead, and reap it. It may have ended before."""
    with process:
        if process.returncode is None:  # not reaped yet, so nobody else has its number
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def interrupt_on_signals() -> None:
    """Make SIGTERM and SIGHUP a KeyboardInterrupt, so that with-blocks and fixtures clean up."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one must not cut the clean-up short
        raise KeyboardInterrupt(signal.Signals(number).name)

    for number in signal.SIGTERM, signal.SIGHUP:
        signal.signal(number, interrupt)


class Capture:
    """What tcpdump has written: see `Host.capture`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._final: bytes | None = None

    def packets(self) -> list[tuple[int, bytes]]:
        """The packets so far, as (nanoseconds of CLOCK_REALTIME, bytes from the link layer on)."""
        data = self._path.read_bytes() if self._final is None else self._final
        packets, offset = [], 24  # the file's header
        while offset + 16 <= len(data):
            seconds, nanoseconds, length, _ = struct.unpack_from('=4I', data, offset)
            offset += 16 + length
            if offset <= len(data):  # the last one may be half written
                packets.append((seconds * 10**9 + nanoseconds, data[offset - length : offset]))
        return packets

    def finish(self) -> None:
        """Keep the packets when the file goes."""
        self._final = self._path.read_bytes()


class Host:
    """A namespace of the lab. `devices` are its interfaces' names, the one nearer to the client first."""

    def __init__(self, name: str, devices: tuple[str, ...]) -> None:
        self.name = name
        self.devices = devices
        self.device = devices[0]
        self._processes: list[subprocess.Popen[str]] = []

    def __repr__(self) -> str:
        return f'Host({self.name!r})'

    def command(self, *cmd: str) -> tuple[str, ...]:
        """The command that runs `cmd` in here."""
        return ('ip', 'netns', 'exec', self.name, *cmd)

    def run(
        self, *cmd: str, timeout: float = 30, check: bool = True, **kw: Any
    ) -> subprocess.CompletedProcess[str]:
        """`run()` in here."""
        return run(*self.command(*cmd), timeout=timeout, check=check, **kw)

    def popen(self, *cmd: str, **kw: Any) -> subprocess.Popen[str]:
        """Start a command in here, in a group of its own that the lab kills on exit; `kw` goes to Popen."""
        options = dict(stdin=subprocess.DEVNULL, text=True, errors='replace', start_new_session=True)
        process = subprocess.Popen(self.command(*cmd), **{**options, **kw})
        self._processes.append(process)
        return process

    def end_processes(self) -> None:
        """Kill what `popen` started."""
        while self._processes:
            end(self._processes.pop())

    def listens(self, port: int) -> bool:
        """Whether a TCP socket listens on `port`, in either family."""
        return bool(self.run('ss', '-Hltn', f'sport = :{port}').stdout)

    def has_link_local_addresses(self) -> bool:
        """Whether each device is up far enough to have its IPv6 link-local address."""
        addresses = self.run('ip', '-6', '-o', 'address', 'show', 'scope', 'link', '-tentative').stdout
        return len(addresses.splitlines()) >= len(self.devices)

    @contextmanager
    def capture(self, device: str | None = None, filter: str = '', snaplen: int = 262144) -> Iterator[Capture]:
        """Record packets of `device` (default: the first) that match tcpdump's `filter`, from entry to exit.

        At exit every packet that has passed by then is in. RuntimeError when the kernel dropped some.
        Gigabytes a second cannot be kept whole: for bulk traffic give a `snaplen` of headers only.
        """
        with tempfile.TemporaryDirectory(prefix='elf-') as directory:
            path = Path(directory, 'capture.pcap')  # AppArmor lets tcpdump write to .pcap only
            process = self.popen(
                'tcpdump',
                '-i',
                device or self.device,
                '-n',
                '-s',
                str(snaplen),
                '-B',
                str(TCPDUMP_BUFFER),
                '--immediate-mode',
                '-U',
                '--time-stamp-precision=nano',
                '-Z',
                'root',
                '-w',
                str(path),
                filter,
                stderr=subprocess.PIPE,
            )
            try:
                wait_for_line(process, 'listening on')
                capture = Capture(path)
                yield capture
                # On SIGINT tcpdump forgets what is still in the ring. When it sleeps, the ring is empty.
                wait_until(lambda: is_asleep(process.pid), 10, 'tcpdump has written everything')
                process.send_signal(signal.SIGINT)
                report = process.communicate(timeout=10)[1]
                if not re.search(r'^0 packets dropped by kernel', report, re.MULTILINE):
                    raise RuntimeError(f'tcpdump on {self.name} lost packets:\n{report}')
                capture.finish()
            finally:
                end(process)


def wait_for_line(process: subprocess.Popen[str], text: str) -> None:
    """Read stderr until a line has `text`; CommandFailed with what was said when the process ends without."""
    assert process.stderr
    said = []
    for line in process.stderr:
        if text in line:
            return
        said.append(line)
    raise CommandFailed(f'{process.args!r} ended:\n{"".join(said)}')


def is_asleep(pid: int) -> bool:
    """Whether a process waits for something to happen."""
    return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] == 'S'


class Lab:
    """client - r1 ... rN - server. Once entered, either family works from end to end."""

    client_device = 'eth0'

    def __init__(self, routers: int = 4) -> None:
        if not 0 <= routers <= MAX_ROUTERS:
            raise ValueError(f'routers: {routers}, not 0 to {MAX_ROUTERS}')
        self.prefix = f'elf-{os.getpid()}-{secrets.token_hex(3)}-'
        self.client = Host(self.prefix + 'client', (self.client_device,))
        self.routers = [Host(f'{self.prefix}r{i}', ('eth0', 'eth1')) for i in range(1, routers + 1)]
        self.server = Host(self.prefix + 'server', ('eth0',))
        self.hosts = [self.client, *self.routers, self.server]
        self._stack = ExitStack()

    def __enter__(self) -> Lab:
        sweep()
        with ExitStack() as stack:
            stack.callback(remove, [host.name for host in self.hosts])
            for host in self.hosts:
                stack.callback(host.end_processes)
            self._build()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def client_address(self, version: int) -> str:
        """The client's address; `version` is 4 or 6."""
        return address(version, 1, 1)

    def server_address(self, version: int) -> str:
        """The server's address; `version` is 4 or 6."""
        return address(version, len(self.routers) + 1, 2)

    def hop(self, version: int, ttl: int) -> str:
        """The address from which the router answers where a packet from the client with `ttl` ends."""
        if not 1 <= ttl <= len(self.routers):
            raise ValueError(f'no router ends ttl {ttl}')
        return address(version, ttl, 2)

    def set_checksum_offload(self, on: bool) -> None:
        """Whether the client leaves checksums to its device (which, as veth, never writes them)."""
        self.client.run('ethtool', '-K', self.client_device, 'tx', 'on' if on else 'off')

    @contextmanager
    def iperf3_server(self, *ports: int, host: Host | None = None) -> Iterator[None]:
        """An iperf3 server on each port (5201 if none is given), listening, on the server or another host."""
        host = host or self.server

        def is_ready(process: subprocess.Popen[str], port: int) -> bool:
            if process.poll() is not None:
                raise CommandFailed(f'iperf3 on port {port}: exit status {process.returncode}')
            return host.listens(port)

        with ExitStack() as stack:
            for port in ports or (5201,):
                process = host.popen('iperf3', '-s', '-p', str(port), stdout=subprocess.DEVNULL)
                stack.callback(end, process)
                wait_until(partial(is_ready, process, port), 10, f'iperf3 listens on port {port}')
            yield

    def _build(self) -> None:
        batch('', (f'netns add {host.name}' for host in self.hosts))
        for host in self.hosts:
            sysctls = COMMON_SYSCTLS + (ROUTER_SYSCTLS if host in self.routers else ())
            host.run('sysctl', '-eqw', *sysctls)  # -e: no kernel has them all
        for i in range(len(self.hosts)):
            self._set_up(i)
        # Without a link-local address a router cannot solicit, and tries again only after a second.
        for host in self.hosts:
            wait_until(host.has_link_local_addresses, 10, f'link-local addresses of {host.name}')
        for version in 4, 6:
            wait_until(partial(self._reaches_server, version), 10, f'IPv{version} from client to server')

    def _set_up(self, i: int) -> None:
        """Give host `i` its links, addresses and routes; those before it have theirs."""
        host, last = self.hosts[i], len(self.hosts) - 1
        commands = ['link set lo up']
        if i > 0:
            commands += attach(host.device, i, 2)
        if i < last:
            # Where both ends have the same index, the kernel takes up to a second to notice the carrier.
            following = self.hosts[i + 1]
            commands += [
                f'link add {host.devices[-1]} index {10 * i + 11} type veth '
                f'peer {following.device} index {10 * i + 12} netns {following.name}',
                *attach(host.devices[-1], i + 1, 1),
            ]
        for version in 4, 6:
            commands += self._routes(version, i)
        batch(host.name, commands)

    def _routes(self, version: int, i: int) -> Iterable[str]:
        """Ends have a default route; routers know the lab's networks only, and say so about others."""
        last = len(self.hosts) - 1
        back, forth = address(version, i, 1), address(version, i + 1, 2)
        if i in (0, last):
            return [f'route add default via {forth if i == 0 else back}']
        width = 24 if version == 4 else 64
        return [
            f'route add {address(version, link, 0)}/{width} via {back if link < i else forth}'
            for link in range(1, last + 1)
            if link not in (i, i + 1)
        ]

    def _reaches_server(self, version: int) -> bool:
        ping = self.client.run('ping', '-nc1', '-W1', self.server_address(version), check=False)
        return ping.returncode == 0


def address(version: int, link: int, side: int) -> str:
    """Address number `side` of a link, in the one form that everybody prints; 0 is the network's."""
    if version == 4:
        return f'10.0.{link}.{side}'
    return f'fd00:e1f:{link:x}::{side or ""}'


def attach(device: str, link: int, side: int) -> list[str]:
    """Commands that make a device end `side` of a link."""
    return [
        f'address add {address(4, link, side)}/24 dev {device}',
        f'address add {address(6, link, side)}/64 dev {device} nodad',
        f'link set {device} up',
    ]


@contextmanager
def nft_table(host: Host, text: str, name: str = 'elf') -> Iterator[None]:
    """An nft table of a host, of the family inet; `text` is what is in it."""
    host.run('nft', '-f', '-', input=f'table inet {name} {{\n{text}\n}}\n')
    try:
        yield
    finally:
        host.run('nft', 'delete', 'table', 'inet', name)


def kernel_counters(host: Host) -> Counter[str]:
    """What the host's stack has counted (SNMP and beyond), by the names of nstat."""
    return Counter(json.loads(host.run('nstat', '-asjz').stdout)['kernel'])


def batch(namespace: str, commands: Iterable[str]) -> None:
    """Have `ip` run commands in a namespace, in one process."""
    run('ip', *(['-n', namespace] if namespace else []), '-batch', '-', input='\n'.join(commands) + '\n')


def tc(host: Host, *commands: str) -> None:
    """Run many tc commands at once, given without the `tc`."""
    run('tc', '-n', host.name, '-batch', '-', input='\n'.join(commands) + '\n')


def namespaces() -> list[str]:
    """Names of the namespaces of all labs."""
    return [name for name in (os.listdir(NETNS) if NETNS.exists() else []) if NAME.fullmatch(name)]


def sweep() -> None:
    """Remove what labs left whose process was killed."""
    remove([name for name in namespaces() if not Path('/proc', name.split('-')[1]).exists()])


def remove(names: Iterable[str]) -> None:
    """Kill everything in these namespaces, then remove those that exist."""
    present = set(names) & set(namespaces())
    if not present:
        return
    with ExitStack() as stack:
        stack.callback(
            run,
            'ip',
            '-force',
            '-batch',
            '-',
            check=False,
            input=''.join(f'netns delete {name}\n' for name in sorted(present)),
        )
        wait_until(lambda: not kill_inside(present), 10, f'processes in {sorted(present)} end')


def kill_inside(names: Iterable[str]) -> set[int]:
    """Kill the processes in these namespaces; returns those it found, never this one."""
    inside = {identity(NETNS / name) for name in names} - {None}
    pids = {int(entry) for entry in os.listdir('/proc') if entry.isdigit()} - {os.getpid()}
    found = {pid for pid in pids if identity(Path(f'/proc/{pid}/ns/net')) in inside}
    for pid in found:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return found


def identity(namespace: Path) -> tuple[int, int] | None:
    """What tells one namespace from another, however it is reached; None where it has gone."""
    try:
        status = namespace.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
