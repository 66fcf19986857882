"""Where answers are read: native XDP, generic XDP or TC ingress, on several kinds of devices.

client - r1 - server        the client reaches r1 by a veth, or by a bridge or macvlan device above it
client: tap0 === this process, which plays a router and sends packets in pieces
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import struct
import time
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import count, product
from pathlib import Path
from typing import Callable, Iterator

import pytest

pytest.importorskip('scapy')

from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.inet6 import ICMPv6TimeExceeded, IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Raw

from lab import Host, Lab, attach, batch, nft_table, run, wait_until
from runs import VERSIONS, Run, both, elfprobe, inside, platform, with_change
from test_faults import COMMAND, attached, check_refused
from test_harm import BLOCK
from test_paths import latest, pinging

pytestmark = pytest.mark.root

HOOKS = 'auto', 'xdp', 'generic', 'tc'
PLACES = {'auto': 'TC ingress', 'xdp': 'native XDP', 'generic': 'generic XDP', 'tc': 'TC ingress'}
LARGE_MTU = 9000  # native XDP of veth takes 3520 bytes or so

# linux/if_tun.h
TUNSETIFF, IFF_TAP, IFF_NAPI, IFF_NAPI_FRAGS, IFF_NO_PI = 0x400454CA, 2, 0x10, 0x20, 0x1000
# asm-generic/socket.h, linux/socket.h, linux/errqueue.h
SO_ZEROCOPY, MSG_ZEROCOPY, SO_EE_ORIGIN_ZEROCOPY, SO_EE_CODE_ZEROCOPY_COPIED = 60, 0x4000000, 5, 1
ERROR = struct.Struct('=IBBBBII')  # struct sock_extended_err

FREE_XDP = "elfprobe.XDP_WITHOUT_RESET = {'veth'}"  # as if native XDP cost nothing on a veth
# As where the kernel does not tell where it marks packets of MSG_ZEROCOPY.
WITHOUT_BTF = """
import dataclasses
detect = lambda: dataclasses.replace(elfprobe.Platform.detect(), shared_info=elfprobe.SharedInfo())
"""


@pytest.fixture(scope='module')
def lab1() -> Iterator[Lab]:
    with Lab(routers=1) as lab:
        yield lab


def check_hops(lab: Lab, measuring: Run, device: str = 'eth0') -> None:
    """The router answers in both families, and nobody else."""
    right = {(server, 1): lab.hop(version, 1) for version, server in zip(VERSIONS, both(lab))}
    with pinging(lab, '-i0.02'):
        wait_until(lambda: latest(measuring.rows()) == right, 20, 'answers of both families')
    assert measuring.stop() == 0
    assert latest(measuring.rows()) == right


# Each place, on each kind of device


@contextmanager
def above(lab: Lab, kind: str) -> Iterator[str]:
    """Give the client another device above eth0, which has its addresses and routes meanwhile."""
    client, moved = lab.client, f'{kind}0'
    with ExitStack() as stack:
        made = run(
            'ip',
            '-n',
            client.name,
            'link',
            'add',
            *([] if kind == 'bridge' else ['link', 'eth0']),
            moved,
            'type',
            kind,
            check=False,
        )
        if made.returncode:
            pytest.skip(f'this kernel has no such device: {made.stderr.strip()}')
        stack.callback(batch, client.name, [f'link del {moved}'])
        stack.callback(run, 'ip', '-n', lab.routers[0].name, 'neigh', 'flush', 'dev', 'eth0')
        if kind == 'bridge':
            batch(client.name, [f'link set eth0 master {moved}'])
            stack.callback(batch, client.name, ['link set eth0 nomaster'])
        batch(client.name, ['address flush dev eth0 scope global'])
        routes = [f'route replace default via {lab.hop(version, 1)}' for version in VERSIONS]
        stack.callback(batch, client.name, [*attach('eth0', 1, 1), *routes])
        batch(client.name, [*attach(moved, 1, 1), *(f'{route} dev {moved}' for route in routes)])
        run('ip', '-n', lab.routers[0].name, 'neigh', 'flush', 'dev', 'eth0')
        yield moved


@pytest.mark.parametrize('hook', HOOKS)
def test_answers_are_read_at_each_hook(lab1: Lab, tmp_path: Path, hook: str) -> None:
    """And the device, offloads included, is as before afterwards."""
    before = attached(lab1.client), attached(lab1.routers[0])
    with elfprobe(lab1, '--ingress-hook', hook, *both(lab1), cwd=tmp_path) as measuring:
        check_hops(lab1, measuring)
    assert f'probing on eth0, answers read at {PLACES[hook]} (' in measuring.log
    assert (attached(lab1.client), attached(lab1.routers[0])) == before


@pytest.mark.parametrize('hook', ['auto', 'generic'])
@pytest.mark.parametrize('kind', ['bridge', 'macvlan'])
def test_answers_are_read_on_devices_above_others(
    make_lab: Callable[..., Lab], tmp_path: Path, kind: str, hook: str
) -> None:
    lab = make_lab(routers=1)
    with above(lab, kind) as device:
        before = attached(lab.client), attached(lab.client, device)
        with elfprobe(lab, '-i', device, '--ingress-hook', hook, *both(lab), cwd=tmp_path) as measuring:
            right = {(server, 1) for server in both(lab)}
            with pinging(lab, '-i0.02'):
                wait_until(lambda: latest(measuring.rows()).keys() == right, 20, 'answers of both families')
        assert (attached(lab.client), attached(lab.client, device)) == before
    assert f'answers read at {PLACES[hook]} (' in measuring.log


def test_auto_leaves_the_offloads_of_the_other_end(lab1: Lab, tmp_path: Path) -> None:
    def offloads() -> str:
        return lab1.routers[0].run('ethtool', '-k', 'eth0').stdout

    before = offloads()
    with elfprobe(lab1, *both(lab1), cwd=tmp_path) as measuring:
        assert offloads() == before
        assert attached(lab1.client)['xdp'] is None
    assert 'native XDP would take the segmentation offload of the other end of a veth' in measuring.log


def test_auto_takes_native_xdp_where_that_costs_nothing(lab1: Lab, tmp_path: Path) -> None:
    via = *lab1.client.command(), *with_change(FREE_XDP)
    with elfprobe(lab1, *both(lab1), cwd=tmp_path, via=via) as measuring:
        assert attached(lab1.client)['xdp']
        check_hops(lab1, measuring)
    assert 'answers read at native XDP (the driver veth takes a program without a reset)' in measuring.log


def test_auto_takes_tc_where_native_xdp_is_refused(make_lab: Callable[..., Lab], tmp_path: Path) -> None:
    lab = make_lab(routers=1)
    for host in lab.client, lab.routers[0]:
        batch(host.name, [f'link set eth0 mtu {LARGE_MTU}'])
    before = attached(lab.client)
    refused = lab.client.run(*COMMAND, '-i', 'eth0', '--ingress-hook', 'xdp', *both(lab), check=False, cwd=tmp_path)
    check_refused(refused, 1, ["'eth0'", 'native XDP', '--ingress-hook tc'])
    assert attached(lab.client) == before
    assert list(tmp_path.iterdir()) == []
    via = *lab.client.command(), *with_change(FREE_XDP)
    with elfprobe(lab, *both(lab), cwd=tmp_path, via=via) as measuring:
        check_hops(lab, measuring)
    assert 'answers read at TC ingress (veth refuses native XDP)' in measuring.log
    assert attached(lab.client) == before


def test_without_tcx_in_spite_of_the_version(lab1: Lab, tmp_path: Path) -> None:
    """The kernel's version says that it has tcx links, and it has none: clsact is taken."""
    via = (
        *lab1.client.command(),
        *with_change(
            """
real = elfprobe.create_link
def without_tcx(program, target, attach_type, flags=0):
    if attach_type in (elfprobe.BPF_TCX_INGRESS, elfprobe.BPF_TCX_EGRESS):
        raise OSError(22, 'Invalid argument')
    return real(program, target, attach_type, flags)
elfprobe.create_link = without_tcx
"""
            + platform(has_tcx=True)
        ),
    )
    before = attached(lab1.client)
    with elfprobe(lab1, *both(lab1), cwd=tmp_path, via=via) as measuring:
        during = attached(lab1.client)
        assert 'elf_egress' in during['egress']
        assert 'elf_ingress' in during['ingress']
        check_hops(lab1, measuring)
    assert attached(lab1.client) == before


# The carrier


def test_lost_carrier_is_told(make_lab: Callable[..., Lab], tmp_path: Path) -> None:
    """With the way out where the driver takes the link down for an XDP program."""
    lab = make_lab(routers=1)
    with elfprobe(lab, '--ingress-hook', 'xdp', lab.server_address(4), cwd=tmp_path) as measuring:
        batch(lab.routers[0].name, ['link set eth0 down'])
        wait_until(lambda: 'the interface eth0 has no carrier' in measuring.log, 5, 'elfprobe sees that')
        batch(lab.routers[0].name, ['link set eth0 up'])
        wait_until(lambda: 'the interface eth0 is up again' in measuring.log, 5, 'elfprobe sees that')
        assert measuring.stop() == 3
    assert 'use --ingress-hook tc' in measuring.log


@pytest.mark.parametrize('has_carrier', [True, False])
def test_stall_without_carrier_is_held_against_no_flow(
    make_lab: Callable[..., Lab], tmp_path: Path, has_carrier: bool
) -> None:
    """Nothing of a flow is acknowledged for seconds, while its first hop answers. elfprobe is made to see no
    carrier. (Without a carrier in fact, no packet would leave that could show the stall.)"""
    lab = make_lab(routers=1)
    server = lab.server_address(4)
    via = (
        *lab.client.command(),
        *with_change('' if has_carrier else 'from elf import devices; devices.IFF_RUNNING = 1 << 15'),
    )
    with lab.iperf3_server(), elfprobe(lab, '-p', '0', server, cwd=tmp_path, via=via) as measuring:
        lab.client.popen('iperf3', '-c', server, '-b', '1M', '-l', '1000', '-t', '60')
        wait_until(lambda: len(measuring.rows()) > 20, 10, 'rows')
        with nft_table(lab.routers[0], BLOCK):
            blocked = time.monotonic()
            wait_until(
                lambda: 'nothing is acknowledged' in measuring.log or time.monotonic() > blocked + 8,
                15,
                'a stall, or long enough for one',
            )
        assert measuring.stop() == 0
    assert ('nothing is acknowledged' in measuring.log) == has_carrier
    assert ('the interface eth0 has no carrier' in measuring.log) != has_carrier


# Packets in pieces


@contextmanager
def tap(host: Host, name: str = 'tap0') -> Iterator[int]:
    """A TAP device of a host, which takes each piece of a write for a fragment of the packet."""
    with inside(host):
        fd = os.open('/dev/net/tun', os.O_RDWR)
    try:
        flags = IFF_TAP | IFF_NO_PI | IFF_NAPI | IFF_NAPI_FRAGS
        fcntl.ioctl(fd, TUNSETIFF, struct.pack('16sH22x', name.encode(), flags))
        batch(
            host.name,
            [
                f'link set {name} up',
                f'address add 192.0.2.99/24 dev {name}',
                f'address add 2001:db8::99/64 dev {name} nodad',
                f'neigh add 192.0.2.1 lladdr 02:00:00:00:00:09 dev {name}',
                f'neigh add 2001:db8::1 lladdr 02:00:00:00:00:09 dev {name}',
                'route add 198.51.100.80 via 192.0.2.1',  # what is on-link gets no probe
                'route add 2001:db8:1::80 via 2001:db8::1',
            ],
        )
        yield fd
    finally:
        os.close(fd)


PIECES = {  # at which bytes a packet is cut
    'Ethernet alone': [14],
    'in the IP header': [14, 24],
    'in the ICMP header': [14, 38],
    'in the quote': [60, 70],
    'whole': [],
}


def answer(asked: IP | IPv6, padding: int) -> IP | IPv6:
    """The time exceeded of the router behind the TAP device, with padding by which its row is known."""
    quote = Raw(bytes(asked) + bytes(padding))
    if IP in asked:
        return IP(src='192.0.2.1', dst='192.0.2.99') / ICMP(type=11) / quote
    return IPv6(src='2001:db8::1', dst='2001:db8::99') / ICMPv6TimeExceeded() / quote


def is_answered_in_pieces(fd: int, sender: socket.socket, cuts: list[int], padding: int, run: Run) -> bool:
    """Send a packet, and answer its probe to the first hop with a packet that is cut. Has an answer a row yet?"""
    sender.send(bytes(100))
    while True:
        frame = Ether(os.read(fd, 4096))
        asked = frame.payload
        if UDP in asked and (asked.ttl if IP in asked else asked.hlim) == 1:
            break
        if UDP in asked:
            return False
    data = bytes(Ether(src=frame.dst, dst=frame.src) / answer(asked, padding))
    ends = [*cuts, len(data)]
    os.writev(fd, [data[start:end] for start, end in zip([0, *ends], ends)])
    return any(row.rsize == len(data) - 14 for row in run.rows())


@pytest.mark.skipif(not Path('/dev/net/tun').exists(), reason='no TAP here')
def test_answers_in_pieces(lab1: Lab, tmp_path: Path) -> None:
    """At TC ingress only the linear part of a packet can be read at first."""
    dests = {4: '198.51.100.80', 6: '2001:db8:1::80'}
    with tap(lab1.client) as fd, elfprobe(
        lab1, '-i', 'tap0', '--ingress-hook', 'tc', '-p', '0', *dests.values(), cwd=tmp_path
    ) as measuring:
        for padding, (version, name) in zip(count(200, 64), product(VERSIONS, PIECES)):
            with inside(lab1.client):
                sender = socket.socket({4: socket.AF_INET, 6: socket.AF_INET6}[version], socket.SOCK_DGRAM)
            with sender:
                sender.connect((dests[version], 9))
                is_over = partial(is_answered_in_pieces, fd, sender, PIECES[name], padding, measuring)
                wait_until(is_over, 10, f'an answer in IPv{version}, cut {name}')
        assert measuring.stop() == 0
    assert {row.responder for row in measuring.rows() if row.is_answered} == {'192.0.2.1', '2001:db8::1'}


# MSG_ZEROCOPY


def send_without_copy(host: Host, dest: str, count: int) -> tuple[int, int]:
    """Send UDP packets from this process's own memory. Return how many the kernel says it has sent, and how
    many of these it has copied."""
    sent = copied = 0
    with inside(host):
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with sender:
        sender.setsockopt(socket.SOL_SOCKET, SO_ZEROCOPY, 1)
        sender.connect((dest, 9))
        data = bytearray(1400)

        def told() -> list[bytes]:
            with suppress(BlockingIOError):
                _, ancillary, *_ = sender.recvmsg(100, 512, socket.MSG_ERRQUEUE | socket.MSG_DONTWAIT)
                return [content for _, _, content in ancillary]
            return []

        for _ in range(count):
            sender.send(data, MSG_ZEROCOPY)
            for content in wait_until(told, 5, 'the kernel says what became of it'):
                _, origin, _, code, _, first, last = ERROR.unpack_from(content)
                assert origin == SO_EE_ORIGIN_ZEROCOPY
                sent += last - first + 1
                copied += (last - first + 1) * (code & SO_EE_CODE_ZEROCOPY_COPIED)
    return sent, copied


@pytest.mark.parametrize('options', [[], ['-T']], ids=['truncated', 'whole'])
@pytest.mark.parametrize('can_tell', [True, False], ids=['told apart', 'not told apart'])
def test_zero_copy_stays_zero_copy(lab1: Lab, tmp_path: Path, options: list[str], can_tell: bool) -> None:
    """For a probe of such a packet the kernel would say that the packet was copied, as it does if elfprobe
    cannot tell such packets from others. (What an ifb device sends ends there, so nobody else copies it.)"""
    made = run('ip', '-n', lab1.client.name, 'link', 'add', 'ifb0', 'type', 'ifb', check=False)
    if made.returncode:
        pytest.skip(f'this kernel has no ifb devices: {made.stderr.strip()}')
    with ExitStack() as stack:
        stack.callback(batch, lab1.client.name, ['link del ifb0'])
        batch(
            lab1.client.name,
            [
                'link set ifb0 up',
                'address add 192.0.2.1/24 dev ifb0',
                'neigh add 192.0.2.2 lladdr 02:00:00:00:00:09 dev ifb0',
                'route add 198.51.100.80 via 192.0.2.2',
            ],
        )
        assert send_without_copy(lab1.client, '198.51.100.80', 20) == (20, 0)
        change = '' if can_tell else WITHOUT_BTF
        via = *lab1.client.command(), *with_change(change)
        arguments = ['-i', 'ifb0', '-p', '0', *options, '198.51.100.80']
        with elfprobe(lab1, *arguments, cwd=tmp_path, via=via) as measuring:
            sent, copied = send_without_copy(lab1.client, '198.51.100.80', 20)
            assert measuring.stop() == (3 if can_tell else 0)
    assert sent == 20
    assert copied >= len(measuring.rows())
    assert bool(copied) != can_tell
    assert bool(re.search(r'carrier_zerocopy 20 \(', measuring.log)) == can_tell
